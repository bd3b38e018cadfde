"""`init_from`: each of RADA's networks starts from the plain one."""

from __future__ import annotations

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


def test_all_networks_start_from_plain_nnunet(make_trainer, make_rada, sparse_tiny, tmp_path):
    plain = make_trainer(nnUNetTrainer, dataset=sparse_tiny, results=tmp_path / "plain")
    plain.initialize()
    plain.save_checkpoint(str(tmp_path / "plain.pth"))
    trainer = make_rada(f"rada.semantics=learned init_from={tmp_path / 'plain.pth'}")
    trainer.initialize()
    wanted = plain.network.state_dict()
    for member in trainer.network.members:
        assert all(torch.equal(value, wanted[name]) for name, value in member.network.state_dict().items())
