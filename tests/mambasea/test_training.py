"""The trainer: passes, branches, LSA's place, checkpoints, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nnunetv2_ext.mambasea.training import BRANCH, GVA_MODULE
from nnunetv2_ext.trainers.nnUNetTrainerMambaSea import nnUNetTrainerMambaSea


@pytest.fixture
def build(make_trainer: Callable[..., Any]) -> Callable[..., Any]:
    return lambda settings="", **options: make_trainer(
        nnUNetTrainerMambaSea,
        settings if "seed=" in settings else f"seed=1 {settings}",
        **{"configuration": "2d", **options},
    )


def started(trainer: Any) -> Any:
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    return trainer


def log_of(trainer: Any) -> str:
    return next(Path(trainer.output_folder).glob("training_log*.txt")).read_text()


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
@pytest.mark.parametrize("branch", ["own", "shared"])
def test_both_branches_learn_and_the_weights_are_the_plan_s(build, configuration: str, branch: str) -> None:
    trainer = started(build(f"mambasea.branch={branch} mambasea.tau=1 mambasea.gva=1", configuration=configuration))
    assert set(trainer.training_modules) == {GVA_MODULE, *([BRANCH] if branch == "own" else [])}
    before = {n: [p.detach().clone() for p in m.parameters()] for n, m in trainer.training_modules.items()}
    figures = [trainer.train_step(next(trainer.dataloader_train)) for _ in range(2)]
    assert {"supervised", "mambasea_branch", "mambasea_consistency", "grad_norm", "loss"} == set(figures[0])
    for name, module in trainer.training_modules.items():
        assert any(not torch.equal(a, b) for a, b in zip(before[name], module.parameters())), name
    trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    saved = torch.load(Path(trainer.output_folder) / "checkpoint_final.pth", weights_only=False)["network_weights"]
    assert not [name for name in saved if "mambasea" in name or "gva" in name]
    stock = trainer.build_network_architecture(
        trainer.plans_manager, trainer.configuration_manager, trainer.num_input_channels, 3, True
    )
    assert saved.keys() == stock.state_dict().keys()


def test_the_loss_is_the_mean_of_both_and_a_tenth_of_the_difference(build) -> None:
    trainer = started(build("mambasea.lsa=0 mambasea.consistency=0.1 mambasea.tau=1 mambasea.gva=1"))
    batch = trainer.on_device(next(trainer.dataloader_train))
    passes = trainer.loss_passes(batch)
    assert passes.names == ("mambasea", "supervised")
    terms = {name: term for p in passes for name, term in p.compute().items()}
    assert {name: term.weight for name, term in terms.items()} == {
        "mambasea_branch": 0.5,
        "supervised": 0.5,
        "mambasea_consistency": 0.1,
    }
    plain = trainer.network(batch.data)
    assert torch.equal(terms["supervised"].value, trainer.loss(plain, batch.target))
    seen, _ = trainer.training_modules[GVA_MODULE](batch.data, torch.zeros(len(batch.data)))
    other = trainer.training_modules[BRANCH](seen)
    assert torch.allclose(terms["mambasea_branch"].value, trainer.loss(other, batch.target), atol=1e-5)
    difference = (plain[0] - other[0]).square().mean()
    assert torch.allclose(terms["mambasea_consistency"].value, difference, rtol=1e-4) and float(difference.detach()) > 0


def test_the_own_branch_starts_as_the_network_does_also_from_other_weights(build, tmp_path: Path) -> None:
    first = build("seed=5", results=tmp_path / "first")
    first.initialize()
    file = tmp_path / "start.pth"
    first.save_checkpoint(str(file))
    trainer = build(f"init_from={file}", results=tmp_path / "second")
    trainer.initialize()
    branch = trainer.training_modules[BRANCH].state_dict()
    assert all(torch.equal(v, branch[k]) for k, v in trainer.network.state_dict().items())
    assert all(torch.equal(v, branch[k]) for k, v in first.network.state_dict().items())


def test_lsa_changes_the_supervised_pass_and_nothing_else(build) -> None:
    trainer = started(build("mambasea.lsa=1 mambasea.gva=0"))
    assert not trainer.training_modules and len(trainer._lsa) == len(trainer.network.encoder.stages)
    batch = trainer.on_device(next(trainer.dataloader_train))
    plain = trainer.loss(trainer.network(batch.data), batch.target)
    assert torch.equal(plain, trainer.loss(trainer.network(batch.data), batch.target)), "off outside of its pass"
    [only] = trainer.loss_passes(batch)
    [term] = only.compute().values()
    assert term.weight == 1 and not torch.equal(term.value, plain)
    assert torch.equal(plain, trainer.loss(trainer.network(batch.data), batch.target))
    counted = trainer._lsa["0"].spread.batches
    trainer.network.eval()
    only.compute()
    assert counted == trainer._lsa["0"].spread.batches == 1


def test_lsa_is_on_in_its_share_of_the_steps(build) -> None:
    trainer = build("mambasea.lsa=0.9 mambasea.gva=0")
    trainer.initialize()
    on = []
    for _ in range(400):
        with trainer._lsa_for_this_step():
            on.append(trainer._lsa["0"].active)
    assert 0.85 < sum(on) / len(on) < 0.95


def test_one_sample_a_batch_says_so_and_trains(build) -> None:
    trainer = started(build("batch_size=1 mambasea.lsa=1"))
    trainer.train_step(next(trainer.dataloader_train))
    trainer.train_step(next(trainer.dataloader_train))
    assert "LSA changes nothing in the first step" in log_of(trainer)
    assert trainer._lsa["0"].spread.samples == 2


def test_it_trains_under_torch_compile(build, monkeypatch) -> None:
    """Dynamo's part of it; no compiler of C++ is needed."""
    trainer = build("mambasea.lsa=1 mambasea.gva=0")
    trainer.initialize()
    network = torch.compile(trainer.network, backend="eager")
    x = torch.randn(2, 1, *trainer.configuration_manager.patch_size)
    plain = network(x)[0]
    with trainer._lsa_for_this_step():
        changed = network(x)[0]
        loss = changed.square().mean()
    loss.backward()
    assert not torch.equal(plain, changed) and torch.equal(plain, network(x)[0])


def test_the_panel_shows_patches_brightening_and_a_piece(build, tmp_path: Path) -> None:
    for configuration in ("2d", "3d_fullres"):
        trainer = started(build(configuration=configuration, results=tmp_path / configuration))
        trainer.train_step(next(trainer.dataloader_train))
        file = tmp_path / f"{configuration}.png"
        trainer.draw_panel(file)
        assert file.stat().st_size > 10_000 and trainer.network.training


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("mambasea.weights=gone.pth", "are for the network vmunet"),
        ("mambasea.lsa_share=0", "mambasea.lsa_share"),
        ("mambasea.branch=both", "mambasea.branch"),
    ],
)
def test_refusals_are_one_line(build, settings: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as refusal:
        build(settings).initialize()
    assert "\n" not in str(refusal.value)


# ---- on VM-UNet


@pytest.fixture
def vmunet_plans(tiny: Any) -> dict[str, Any]:
    pytest.importorskip("mambapy", reason="needs the extra mamba")
    from nnunetv2_ext.mambasea.plans import architecture

    plans = tiny.plans()
    configuration = plans["configurations"]["2d"]
    configuration["patch_size"] = [32, 32]
    configuration["architecture"] = architecture(configuration)
    configuration["architecture"]["arch_kwargs"].update(
        widths=[8, 16, 24, 32], depths=[1, 1, 1, 1], depths_up=[1, 1, 1, 1]
    )
    return plans


def test_on_vmunet_lsa_is_in_every_block_and_it_trains(build, vmunet_plans, tmp_path: Path) -> None:
    trainer = started(build("mambasea.lsa=1", plans=vmunet_plans))
    assert "results will not match the paper" in log_of(trainer)
    assert len(trainer._lsa) == 8 and all(lsa.spread.batches == 0 for lsa in trainer._lsa.values())
    trainer.train_step(next(trainer.dataloader_train))
    assert all(lsa.spread.batches == 1 for lsa in trainer._lsa.values())
    assert [m.augment for m in trainer.training_modules[BRANCH].modules() if hasattr(m, "augment")] == [None] * 8


def test_vmambas_weights_are_read_once(build, vmunet_plans, tmp_path: Path) -> None:
    from nnunetv2_ext.mambasea.vmunet import VMUNet
    from tests.mambasea.test_vmunet import of_vmamba

    kwargs = vmunet_plans["configurations"]["2d"]["architecture"]["arch_kwargs"]
    theirs = of_vmamba(VMUNet(1, 3, **kwargs))
    torch.save(theirs, tmp_path / "w.pth")
    trainer = build(f"mambasea.weights={tmp_path / 'w.pth'}", plans=vmunet_plans)
    trainer.initialize()
    key = "layers.1.blocks.0.ln_1.weight"
    for network in (trainer.network, trainer.training_modules[BRANCH]):
        assert torch.equal(network.state_dict()[f"encoder.{key}"], theirs[key])
    assert "values are loaded" in log_of(trainer)
    file = tmp_path / "checkpoint_latest.pth"
    trainer.save_checkpoint(str(file))
    (tmp_path / "w.pth").unlink()
    again = build(f"mambasea.weights={tmp_path / 'w.pth'}", plans=vmunet_plans, continued=True)
    again.load_checkpoint(str(file))
    assert torch.equal(again.network.state_dict()[f"encoder.{key}"], theirs[key])
    with pytest.raises(ValueError, match="give one of the two"):
        build(f"mambasea.weights=w.pth init_from={file}", plans=vmunet_plans).initialize()
