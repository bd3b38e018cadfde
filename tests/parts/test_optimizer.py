"""The common settings of the optimiser: which one, warm-up, the encoder's rate, and an encoder that is held still."""

from __future__ import annotations

import pytest
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


def test_the_rate_warms_up_and_the_encoder_has_its_share(make_trainer) -> None:
    settings = "num_epochs=6 warmup_epochs=2 encoder_lr_factor=0.1 initial_lr=0.01"
    trainer = make_trainer(nnUNetTrainerExt, settings, configuration="2d")
    trainer.initialize()
    encoder = {id(p) for p in trainer.network.encoder.parameters()}
    rest, mine = trainer.optimizer.param_groups
    assert {id(p) for p in mine["params"]} == encoder and not encoder & {id(p) for p in rest["params"]}
    rates = []
    for epoch in range(6):
        trainer.lr_scheduler.step(epoch)
        assert mine["lr"] == pytest.approx(rest["lr"] / 10)
        rates.append(rest["lr"])
    assert rates == pytest.approx([0.005, 0.01, 0.01, *(0.01 * (1 - k / 4) ** 0.9 for k in (1, 2, 3))])
    with pytest.raises(ValueError, match="warmup_epochs=6 leaves nothing"):
        make_trainer(nnUNetTrainerExt, "num_epochs=6 warmup_epochs=6", configuration="2d").initialize()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_encoder_is_held_still_in_the_first_epochs(make_trainer, optimizer) -> None:
    """Nor does momentum gather what it does not follow."""
    trainer = make_trainer(nnUNetTrainerExt, f"freeze_encoder_epochs=1 optimizer={optimizer}", configuration="2d")
    trainer.on_train_start()
    encoder, decoder = trainer.network.encoder, trainer.network.decoder.stages
    before = [p.detach().clone() for p in encoder.parameters()]
    first = next(decoder.parameters()).detach().clone()
    trainer.on_train_epoch_start()
    trainer.train_step(next(trainer.dataloader_train))
    assert all(torch.equal(a, b) for a, b in zip(before, encoder.parameters(), strict=True))
    assert not torch.equal(first, next(decoder.parameters()))
    assert not any(p in trainer.optimizer.state for p in encoder.parameters())
    trainer.current_epoch = 1
    trainer.train_step(next(trainer.dataloader_train))
    assert not any(torch.equal(a, b) for a, b in zip(before[:1], encoder.parameters()))
