"""ExtTrainer against plain nnUNetTrainer: identical with nothing added, and identical after interruptions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_ext.core import randomness
from nnunetv2_ext.core.trainer import ExtTrainer


def fixed_batches(trainer: nnUNetTrainer, number: int, seed: int = 0) -> list[dict]:
    """The same random batches for any trainer of the same configuration."""
    generator = torch.Generator().manual_seed(seed)
    patch = trainer.configuration_manager.patch_size
    scales = trainer._get_deep_supervision_scales()
    batches = []
    for _ in range(number):
        data = torch.randn(2, 1, *patch, generator=generator)
        shapes = [[round(p * s) for p, s in zip(patch, scale)] for scale in scales]
        target = [torch.randint(0, 3, (2, 1, *shape), generator=generator).to(torch.int16) for shape in shapes]
        batches.append({"data": data, "target": target, "keys": np.array(["case_a", "case_b"])})
    return batches


def trained_weights(trainer: nnUNetTrainer, steps: int) -> dict[str, torch.Tensor]:
    randomness.seed_everything(3)
    trainer.initialize()
    for batch in fixed_batches(trainer, steps):
        trainer.train_step(batch)
    return trainer.network.state_dict()


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_a_single_pass_gives_the_weights_of_plain_nnunet_bit_for_bit(make_trainer, configuration):
    plain = trained_weights(make_trainer(nnUNetTrainer, configuration=configuration), 5)
    ours = trained_weights(make_trainer(ExtTrainer, configuration=configuration), 5)
    assert plain.keys() == ours.keys()
    assert all(torch.equal(plain[key], ours[key]) for key in plain)
