"""The common setting ``optimizer``."""

from __future__ import annotations

import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler

from nnunetv2_ext.trainers.nnUNetTrainerExt import nnUNetTrainerExt


def test_adamw_is_torchs_with_nnunets_schedule(make_trainer) -> None:
    trainer = make_trainer(nnUNetTrainerExt, "optimizer=adamw initial_lr=0.002 weight_decay=0.03 seed=1")
    trainer.on_train_start()
    optimizer = trainer.optimizer
    assert type(optimizer) is torch.optim.AdamW and type(trainer.lr_scheduler) is PolyLRScheduler
    (group,) = optimizer.param_groups
    assert group["lr"] == 0.002 and group["weight_decay"] == 0.03
    assert [id(p) for p in group["params"]] == [id(p) for p in trainer.network.parameters()]
    # one step by hand: the first step of Adam moves each weight by the rate, after the decay
    before = [p.detach().clone() for p in trainer.network.parameters()]
    trainer.on_train_epoch_start()
    rate = group["lr"]
    trainer.train_step(next(trainer.dataloader_train))
    for old, new in zip(before, trainer.network.parameters()):
        grad = new.grad
        if grad is None:
            continue
        expected = old * (1 - rate * 0.03) - rate * grad / (grad.abs() + 1e-8)
        assert torch.allclose(new, expected, atol=1e-6)


def test_sgd_by_name_is_nnunets(make_trainer) -> None:
    groups = []
    for settings in ("", "optimizer=sgd"):
        trainer = make_trainer(nnUNetTrainerExt, settings)
        trainer.initialize()
        (group,) = trainer.optimizer.param_groups
        groups.append({key: value for key, value in group.items() if key != "params"})
    assert groups[0] == groups[1] and groups[0]["momentum"] == 0.99 and groups[0]["nesterov"]
