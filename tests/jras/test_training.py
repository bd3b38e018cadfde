"""The trainer: plain where it must be, nobody guides himself, and a continued training is the uninterrupted one."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_ext.core import randomness
from nnunetv2_ext.core.checkpoint import EXTENSION_KEY, read
from nnunetv2_ext.core.export import export_model
from nnunetv2_ext.core.step import Batch
from nnunetv2_ext.jras import bank_training as banked
from nnunetv2_ext.jras import training
from nnunetv2_ext.jras.build import cut_patch
from nnunetv2_ext.jras.network import JRASNetwork
from nnunetv2_ext.jras.panel import view_of_batch
from nnunetv2_ext.trainers.nnUNetTrainerJRAS import nnUNetTrainerJRAS
from nnunetv2_ext.trainers.nnUNetTrainerMedContextJRAS import nnUNetTrainerMedContextJRAS
from tests.jras.conftest import empty

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture
def make_jras(make_trainer, small_jras) -> Callable[..., Any]:
    """``make_jras("key=value ...", cls=, **make_trainer's options)``: a trainer with small encoders, seed 3."""

    def make(settings: str = "", cls: type = nnUNetTrainerJRAS, **options: Any) -> Any:
        keys = {pair.split("=")[0] for pair in settings.split()}
        base = " ".join(pair for pair in f"{small_jras} seed=3".split() if pair.split("=")[0] not in keys)
        return make_trainer(cls, f"{base} {settings}", **{"configuration": "2d", **options})

    return make


def own_batches(trainer: Any, batches: list[dict]) -> list[dict]:
    """The batches under case ids of the training set."""
    cases = trainer._datasets[0].identifiers
    return [batch | {"keys": np.array(cases[: len(batch["data"])])} for batch in batches]


def log(trainer: Any) -> str:
    return Path(trainer.log_file).read_text()


# ---- controls


def test_a_frozen_retriever_moves_in_the_warm_up_only(make_jras):
    trainer = make_jras("jras.retriever=frozen num_epochs=3 num_iterations_per_epoch=2")
    trainer.on_train_start()
    states = []
    for _ in range(3):
        states.append([p.detach().clone() for p in trainer.network.retrieval_parameters()])
        trainer.on_epoch_start()
        trainer.on_train_epoch_start()
        outputs = [trainer.train_step(next(trainer.dataloader_train)) for _ in range(2)]
        assert ("contrastive" in outputs[0]) == (trainer.current_epoch == 0)
        trainer.on_train_epoch_end(outputs)
        trainer.current_epoch += 1
    states.append(list(trainer.network.retrieval_parameters()))
    moved = [any(not torch.equal(a, b) for a, b in zip(x, y)) for x, y in pairwise(states)]
    assert moved == [True, False, False]


def test_the_segmentation_loss_leaves_the_retriever_alone_in_the_warm_up_only(make_jras, fixed_batches):
    trainer = make_jras("jras.contrastive_weight=0 num_epochs=2 jras.guide_dropout=0")
    trainer.on_train_start()
    norms = []
    for epoch in (0, 1):
        trainer.current_epoch = epoch
        trainer.on_train_epoch_start()
        trainer.train_step(own_batches(trainer, fixed_batches(trainer, 1))[0])
        norms.append(float(sum(p.grad.norm() for p in trainer.network.retriever.parameters())))
    assert norms[0] == 0 and norms[1] > 1e-8


def test_a_random_retriever_never_moves_and_weighs_alike(make_jras):
    trainer = make_jras("jras.retriever=random num_epochs=1 jras.guide_dropout=0")
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    before = [p.clone() for p in trainer.network.retriever.parameters()]
    output = trainer.train_step(next(trainer.dataloader_train))
    assert "contrastive" not in output
    assert torch.allclose(trainer.network.last.weights[:, :-1], torch.tensor(0.25))
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.network.retriever.parameters()))


def test_the_contrastive_pass_comes_every_fourth_step_after_the_warm_up(make_jras):
    trainer = make_jras("num_epochs=2 num_iterations_per_epoch=6 jras.contrastive_every=4 jras.warmup_fraction=0")
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    has_it = ["contrastive" in trainer.train_step(next(trainer.dataloader_train)) for _ in range(6)]
    assert has_it == [True, False, False, False, True, False]


def watch_overlap_loss(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, ...]]:
    """Gets `(similarities, overlap, allowed)` of every contrastive loss from here on."""
    seen: list[tuple[torch.Tensor, ...]] = []
    original = training.overlap_loss

    def watched(similarities: Any, overlap: Any, allowed: Any, tau: float) -> Any:
        seen.append((similarities, overlap, allowed))
        return original(similarities, overlap, allowed, tau)

    monkeypatch.setattr(training, "overlap_loss", watched)
    return seen


@pytest.mark.parametrize("chosen", ["", "jras.retriever_encoder=bottleneck"])
def test_the_contrastive_candidates_of_the_bank_are_of_other_subjects(make_jras, fixed_batches, monkeypatch, chosen):
    trainer = make_jras(rf"jras.group_regex=phantom_00(?=[23])|phantom_00[0145] {chosen}")  # 002 and 003: one subject
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    seen = watch_overlap_loss(monkeypatch)
    batch = fixed_batches(trainer, 1, size=4)[0] | {"keys": np.array([f"phantom_00{n}" for n in (2, 3, 4, 5)])}
    trainer.train_step(batch)
    ((_, _, allowed),) = seen
    subjects = {"phantom_002": "a", "phantom_003": "a", "phantom_004": "b", "phantom_005": "c"}
    cases = [trainer._bank_state["cases"][row] for row in trainer._compared[1]]
    expected = [[subjects[key] != subjects[case] for case in cases] for key in batch["keys"]]
    assert allowed[:, :4].all() and allowed[:, 4:].tolist() == expected
    assert 0 < sum(map(sum, expected)) < 4 * len(cases)


# ---- mixed precision


def test_under_bf16_a_step_compares_and_weighs_in_fp32(make_jras, fixed_batches, monkeypatch):
    seen = watch_overlap_loss(monkeypatch)
    trainer = make_jras("jras.warmup_fraction=0 jras.guide_dropout=0")
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    (batch,) = own_batches(trainer, fixed_batches(trainer, 1))
    kinds: list[torch.dtype] = []
    trainer.network.backbone.encoder.register_forward_hook(lambda *args: kinds.append(args[2][-1].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        figures = trainer.train_step(batch)
    assert kinds == [torch.bfloat16]  # it was under autocast indeed
    assert seen[0][0].dtype == seen[0][1].dtype == torch.float32
    assert trainer.network.last.weights.dtype == torch.float32
    assert "contrastive" in figures and all(np.isfinite(value) for value in figures.values())
    assert all(torch.isfinite(p).all() for p in trainer.network.parameters())


def test_an_overflow_in_the_contrastive_pass_skips_the_step_and_the_next_one_trains(make_jras, fixed_batches):
    trainer = make_jras("jras.warmup_fraction=0 jras.contrastive_every=1 jras.contrastive_weight=1000")
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)  # times 1000: infinite
    first, second = own_batches(trainer, fixed_batches(trainer, 2))
    before = {name: value.clone() for name, value in trainer.network.state_dict().items()}
    figures = trainer.train_step(first)
    after = trainer.network.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert not np.isfinite(figures["grad_norm"])
    assert np.isfinite(figures["contrastive"]) and np.isfinite(figures["supervised"])
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    assert np.isfinite(trainer.train_step(second)["grad_norm"])
    moved = [name for name, value in trainer.network.state_dict().items() if not torch.equal(before[name], value)]
    assert any(name.startswith("retriever.") for name in moved) and not any(name.startswith("bank.") for name in moved)


# ---- the optimiser


def test_the_retrievers_rate_is_a_third_at_every_epoch_and_after_continuing(make_jras):
    trainer = make_jras("num_epochs=5 save_every=1")
    trainer.on_train_start()
    group = trainer.optimizer.param_groups[1]
    assert {id(p) for p in group["params"]} == {id(p) for p in trainer.network.retrieval_parameters()}
    assert sum(len(g["params"]) for g in trainer.optimizer.param_groups) == len(list(trainer.network.parameters()))

    def ratios(trainer: Any, epochs: range) -> list[float]:
        found = []
        for trainer.current_epoch in epochs:
            trainer.on_train_epoch_start()
            segmenter, retriever = (g["lr"] for g in trainer.optimizer.param_groups)
            assert segmenter == pytest.approx(0.01 * (1 - trainer.current_epoch / 5) ** 0.9)
            found.append(retriever / segmenter)
        return found

    assert ratios(trainer, range(2)) == pytest.approx([0.3] * 2)
    path = str(Path(trainer.output_folder) / "checkpoint_latest.pth")
    trainer.save_checkpoint(path)
    again = make_jras("num_epochs=5 save_every=1", continued=True)
    again.load_checkpoint(path)
    assert ratios(again, range(2, 5)) == pytest.approx([0.3] * 3)


# ---- continuing


@pytest.mark.parametrize(
    ("cls", "chosen"),
    [
        (nnUNetTrainerJRAS, "jras.fusion=concat jras.num_guides=2 jras.detach_keys=true"),
        (nnUNetTrainerJRAS, "jras.retriever_encoder=bottleneck jras.refresh_every=1"),
        (nnUNetTrainerJRAS, "jras.retriever=frozen"),
        (nnUNetTrainerJRAS, "jras.retriever=random"),
    ],
)
def test_continuing_from_the_middle_equals_not_stopping(make_jras, fixed_batches, cls, chosen):
    def steps(trainer: Any, batches: list[dict]) -> None:
        trainer.on_train_epoch_start()
        outputs = [trainer.train_step(batch) for batch in own_batches(trainer, batches)]
        trainer.on_train_epoch_end(outputs)
        trainer.current_epoch += 1

    settings = f"num_epochs=2 num_iterations_per_epoch=3 jras.contrastive_every=2 {chosen}"
    trainer = make_jras(settings, cls)
    trainer.on_train_start()
    batches = fixed_batches(trainer, 6)
    steps(trainer, batches[:3])
    path = Path(trainer.output_folder) / "checkpoint_latest.pth"
    trainer._save_latest(completed_epochs=1)
    steps(trainer, batches[3:])

    randomness.seed_everything(777)
    again = make_jras(settings, cls, continued=True)
    again.load_checkpoint(str(path))
    again.on_train_start()
    randomness.set_random_state(again._random_states[0], again.generator)
    assert "a new one is drawn" not in log(again)
    steps(again, batches[3:])
    one, other = trainer.network.state_dict(), again.network.state_dict()
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []
    assert [g["lr"] for g in trainer.optimizer.param_groups] == [g["lr"] for g in again.optimizer.param_groups]
    assert trainer._bank_state["cases"] == again._bank_state["cases"]
    assert trainer._bank_state["group_key"] == again._bank_state["group_key"]


def test_another_patch_size_on_continuing_is_refused(make_jras, tiny):
    trainer = make_jras("save_every=1")
    trainer.on_train_start()
    path = str(Path(trainer.output_folder) / "checkpoint_latest.pth")
    trainer.save_checkpoint(path)
    plans = tiny.plans()
    plans["configurations"]["2d"]["patch_size"] = [48, 48]
    again = make_jras("save_every=1", continued=True, plans=plans)
    with pytest.raises(ValueError, match="patch size"):
        again.load_checkpoint(path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"patch_size": [32, 24]}, "patch size 28 x 24, the plans now say 32 x 24"),  # 8 x 8 cells either way
        ({"spacing": [1.5, 1.0]}, "spacing .* the plans now say 1.5 x 1:"),
    ],
)
def test_another_geometry_with_as_many_cells_is_refused_on_continuing(make_jras, tiny, changed, message):
    plans = tiny.plans()
    plans["configurations"]["2d"]["patch_size"] = [28, 24]
    trainer = make_jras(plans=plans)
    trainer.on_train_start()
    path = str(Path(trainer.output_folder) / "checkpoint_latest.pth")
    trainer.save_checkpoint(path)
    again = make_jras(continued=True, plans=plans)
    again.load_checkpoint(path)
    assert again._bank_state["patch_size"] == (28, 24)

    plans["configurations"]["2d"] |= changed
    other = make_jras(continued=True, plans=plans)
    with pytest.raises(ValueError, match=message) as caught:
        other.load_checkpoint(path)
    assert other.retrieval_network.low_shape == trainer.retrieval_network.low_shape
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_does_not_say_its_geometry_continues(make_jras):
    trainer = make_jras()
    trainer.on_train_start()
    path = str(Path(trainer.output_folder) / "checkpoint_latest.pth")
    trainer.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=False)
    for name in ("patch_size", "spacing"):
        del checkpoint[EXTENSION_KEY]["methods"]["jras"][name]
    torch.save(checkpoint, path)
    again = make_jras(continued=True)
    again.load_checkpoint(path)
    again.on_train_start()
    assert "a new one is drawn" not in log(again)
    assert torch.equal(again.network.bank.keys, trainer.network.bank.keys)
    assert again.method_state()["jras"]["patch_size"] == (24, 24)


def test_a_split_that_moved_a_bank_case_to_validation_is_refused(make_jras):
    trainer = make_jras()
    trainer.on_train_start()
    path = str(Path(trainer.output_folder) / "checkpoint_latest.pth")
    trainer.save_checkpoint(path)
    other = make_jras(continued=True, fold=1)
    other.load_checkpoint(path)
    with pytest.raises(ValueError, match="not training cases of this fold any more: phantom_004, phantom_005"):
        other.on_train_start()


def test_a_checkpoint_without_the_key_draws_a_new_bank_and_says_so(make_jras):
    trainer = make_jras()
    trainer.on_train_start()
    trainer.current_epoch = 1
    path = Path(trainer.output_folder) / "checkpoint_latest.pth"
    trainer.save_checkpoint(str(path))
    checkpoint = torch.load(path, weights_only=False)
    del checkpoint[EXTENSION_KEY]["methods"]["jras"]
    torch.save(checkpoint, path)
    again = make_jras(continued=True)
    again.load_checkpoint(str(path))
    again.on_train_start()
    assert "a new one is drawn" in log(again)
    again.on_train_epoch_start()
    again.train_step(next(again.dataloader_train))


def test_the_segmenter_starts_from_a_plain_model(make_trainer, make_jras, fixed_batches, tmp_path):
    plain = make_trainer(nnUNetTrainer, configuration="2d", results=tmp_path / "plain")
    plain.initialize()
    path = tmp_path / "plain.pth"
    plain.save_checkpoint(str(path))
    for fusion in ("attention", "concat"):
        ours = make_jras(f"jras.fusion={fusion} jras.init_from={path}")
        ours.initialize()
        ours.network.eval(), plain.network.eval()
        x = torch.randn(1, 1, 24, 24)
        assert torch.allclose(ours.network(x)[0], plain.network(x)[0], atol=1e-5)
    with pytest.raises(ValueError, match="does not exist"):
        make_jras("jras.init_from=nowhere.pth").initialize()


def test_continuing_does_not_read_the_plain_model_again(make_trainer, make_jras, tmp_path):
    plain = make_trainer(nnUNetTrainer, configuration="2d", results=tmp_path / "plain")
    plain.initialize()
    source = tmp_path / "plain.pth"
    plain.save_checkpoint(str(source))
    trainer = make_jras(f"jras.init_from={source}")
    trainer.on_train_start()
    path = str(Path(trainer.output_folder) / "checkpoint_latest.pth")
    trainer.save_checkpoint(path)
    source.unlink()
    again = make_jras("", continued=True)
    again.load_checkpoint(path)
    assert again.settings.init_from == str(source)
    one, other = trainer.network.state_dict(), again.network.state_dict()
    assert all(torch.equal(one[key], other[key]) for key in one)
    with pytest.raises(ValueError, match="does not exist"):  # --c without a checkpoint is a new training
        make_jras(f"jras.init_from={source}", continued=True).on_train_start()


@pytest.mark.parametrize("kind", ["strip-bank", "blank-groups"])
def test_an_export_does_not_name_the_plain_model(make_trainer, make_jras, tmp_path, kind):
    plain = make_trainer(nnUNetTrainer, configuration="2d", results=tmp_path / "plain")
    plain.initialize()
    source = tmp_path / "plain.pth"
    plain.save_checkpoint(str(source))
    trainer = make_jras(f"jras.init_from={source} jras.tau=0.2")
    trainer.on_train_start()
    trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    folder = Path(trainer.output_folder_base)
    assert str(source) in (folder / "plans.json").read_text()
    export_model(folder, tmp_path / "out", edits=[kind])
    for path in (p for p in (tmp_path / "out").rglob("*") if p.is_file()):
        assert str(tmp_path).encode() not in path.read_bytes(), path
    block = json.loads((tmp_path / "out" / "plans.json").read_text())["nnunetv2_ext"]
    assert "init_from" not in block and block["jras"]["tau"] == 0.2
    assert str(source) in (folder / "plans.json").read_text()  # the source is only read


@pytest.mark.parametrize("kind", ["strip-bank", "blank-groups"])
def test_an_export_names_no_training_case(make_jras, tmp_path, kind):
    """A case id is often a patient's."""
    trainer = make_jras("train_cases=[phantom_002,phantom_003]")
    trainer.on_train_start()
    trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    folder = Path(trainer.output_folder_base)
    named = [path for path in folder.rglob("*.pth") if b"phantom_002" in path.read_bytes()]
    assert named and "phantom_002" in (folder / "plans.json").read_text()  # what must not go along
    export_model(folder, tmp_path / "out", edits=[kind])
    for path in (p for p in (tmp_path / "out").rglob("*") if p.is_file()):
        assert b"phantom_00" not in path.read_bytes(), path
    block = json.loads((tmp_path / "out" / "plans.json").read_text())["nnunetv2_ext"]
    assert "train_cases" not in block and "jras" in block


# ---- nobody guides himself


class LeakyJRAS(nnUNetTrainerJRAS):
    """The defect this method is prone to: nothing is excluded."""

    def _excluding(self, cases, dropout=0.0):
        from contextlib import nullcontext

        return nullcontext()


def batch_of_guides(trainer: Any, rows: list[int]) -> dict:
    """The very patches the bank holds, at full resolution, under their case ids."""
    state, patch = trainer._bank_state, trainer.configuration_manager.patch_size
    cases = [state["cases"][row] for row in rows]
    whole = [trainer._datasets[0].load_case(case)[:2] for case in cases]
    read_ = [cut_patch(*case, state["coordinates"][row], patch) for case, row in zip(whole, rows)]
    data = torch.stack([image for image, _, _ in read_])
    label = torch.stack([label.clamp(min=0) for _, label, _ in read_])[:, None]
    scales = trainer._get_deep_supervision_scales()
    shapes = [[round(p * s) for p, s in zip(patch, scale)] for scale in scales]
    target = [torch.nn.functional.interpolate(label.float(), shape).to(torch.int16) for shape in shapes]
    return {"data": data, "target": target, "keys": np.array(cases)}


def test_guides_that_hardly_know_a_label_are_warned_of(make_jras):
    trainer = make_jras()
    trainer.label_manager = SimpleNamespace(has_ignore_label=True, all_labels=[0, 1, 2])
    labels = torch.full((4, 8, 8), 255, dtype=torch.uint8)
    labels[0, 0, 0] = 1
    trainer._describe_labels(SimpleNamespace(labels=labels))
    assert "WARNING: 0.39 % of the guides' cells are annotated, none with the label 2" in log(trainer)
    trainer._describe_labels(SimpleNamespace(labels=torch.ones_like(labels) + (labels < 255)))
    assert log(trainer).count("WARNING") == 1  # nothing more: all cells are known


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_a_patch_finds_itself_only_where_exclusion_is_switched_off(make_jras, configuration):
    rows = [0, 7, 13, 23]
    for cls, leaks in ((LeakyJRAS, True), (nnUNetTrainerJRAS, False)):
        # as they lie on disk, or the batch would have to be mirrored as its guides are
        trainer = make_jras("jras.warmup_fraction=0 jras.mirror_guides=false", cls, configuration=configuration)
        trainer.on_train_start()
        trainer.on_train_epoch_start()
        batch = batch_of_guides(trainer, rows)
        trainer.train_step(batch)
        last = trainer.network.last
        assert (last.ids[:, 0].tolist() == rows) == leaks
        own = trainer.network.bank.groups[last.ids] == trainer.groups_of(batch["keys"])[:, None]
        assert bool((own & last.valid).any()) == leaks
        trainer.network.eval()
        with torch.no_grad():
            trainer.validation_step(batch_of_guides(trainer, rows))
        assert (trainer.network.last.ids[:, 0].tolist() == rows) == leaks


@pytest.mark.parametrize("cls", [nnUNetTrainerJRAS, nnUNetTrainerMedContextJRAS])
def test_in_a_whole_epoch_no_forward_ever_gets_a_guide_of_its_own_subject(make_jras, cls):
    trainer = make_jras(
        "num_epochs=1 num_iterations_per_epoch=6 num_val_iterations_per_epoch=2 jras.num_guides=24", cls
    )
    seen: list[tuple[Any, Any]] = []
    lookup = banked.JRASNetwork._lookup

    def watched(network: Any, queries: torch.Tensor) -> Any:
        from nnunetv2_ext.jras.network import _EXCLUSION

        guides = lookup(network, queries)
        seen.append((_EXCLUSION.get(), network.bank.groups[guides.ids].masked_fill(~guides.valid, 0)))
        return guides

    trainer.on_train_start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(banked.JRASNetwork, "_lookup", watched)
        trainer.on_train_epoch_start()
        outputs = [trainer.train_step(next(trainer.dataloader_train)) for _ in range(6)]
        trainer.on_train_epoch_end(outputs)
        trainer.on_validation_epoch_start()
        with torch.no_grad():
            for _ in range(2):
                trainer.validation_step(next(trainer.dataloader_val))
    assert len(seen) >= 8
    for exclusion, groups in seen:
        assert exclusion is not None
        assert not (groups == exclusion.groups[:, None]).any()
    from nnunetv2_ext.jras.network import _EXCLUSION

    assert _EXCLUSION.get() is None


def test_cases_of_one_subject_do_not_guide_each_other(make_jras):
    # of the training cases phantom_002 .. 005, 002 and 003 are one subject; 004 and 005 are another
    trainer = make_jras(
        r"jras.group_regex='phantom_00(?=[23])|phantom_0(?=0[45])|phantom_' jras.num_guides=24 jras.warmup_fraction=0"
    )
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    groups = trainer.groups_of([f"phantom_00{n}" for n in (2, 3, 4, 5)])
    assert groups[0] == groups[1] != groups[2] == groups[3]
    trainer.train_step(batch_of_guides(trainer, [0, 23]))
    cases = np.array(trainer._bank_state["cases"])
    for row, other in ((0, {"phantom_004", "phantom_005"}), (1, {"phantom_002", "phantom_003"})):
        last = trainer.network.last
        assert set(cases[last.ids[row][last.valid[row]]]) in (other, set())  # no guide where the dropout took them


def test_subjects_come_from_the_methods_setting_the_common_one_or_the_record(make_jras, tmp_path):
    cases = [f"phantom_00{n}" for n in (2, 3, 4, 5)]

    def groups(settings: str = "", recorded: dict | None = None) -> list[int]:
        trainer = make_jras(settings, results=tmp_path / str(len(list(tmp_path.iterdir()))))
        if recorded is not None:
            trainer.dataset_json["nnunetv2_ext"] = {"subjects": recorded}
        trainer.on_train_start()
        numbers = trainer.groups_of(cases).tolist()
        assert set(trainer.network.bank.groups.tolist()) == set(numbers)  # as the guides are numbered
        return [numbers.index(number) for number in numbers]

    record = {"phantom_004": "s", "phantom_005": "s"}
    common = r"group_regex='phantom_00(?=[23])|phantom_00.'"
    assert groups() == [0, 1, 2, 3]
    assert groups(recorded=record) == [0, 1, 2, 2]
    assert groups(common, record) == [0, 0, 2, 3]
    assert groups(f"jras.{common}", record) == [0, 0, 2, 3]  # its old name
    with pytest.raises(ValueError, match="keep 'group_regex'"):
        groups(f"{common} jras.{common}")


def test_a_bank_of_a_version_without_recorded_subjects_excludes_by_them(make_jras):
    """Its guides have numbers of their cases; with those of subjects a sample would get its own patches."""
    first = make_jras()
    first.on_train_start()
    path = Path(first.output_folder) / "checkpoint_latest.pth"
    first.save_checkpoint(str(path))
    second = make_jras(continued=True)
    second.dataset_json["nnunetv2_ext"] = {"sparsify": {"subjects": dict.fromkeys(first._bank_state["cases"][:1], "s")}}
    second.initialize()
    second.load_checkpoint(str(path))
    second.on_train_start()
    assert second.network.bank.groups.tolist() == second.groups_of(second._bank_state["cases"]).tolist()
    assert second.network.bank.groups.tolist() != first.network.bank.groups.tolist()


def test_a_group_regex_that_does_not_match_is_refused(make_jras):
    with pytest.raises(ValueError, match=r"group_regex='patient'.*phantom_00"):
        make_jras("jras.group_regex=patient").on_train_start()


def test_validation_cases_of_a_training_subject_void_the_validation(make_jras, tmp_path):
    trainer = make_jras("jras.group_regex='phantom_00(?=[05])|phantom_0(?=0[1-4])'")
    trainer.on_train_start()
    assert "validation cases phantom_000, phantom_001 share a subject with training cases" in log(trainer)
    assert "VOID" in log(trainer)
    other = make_jras(results=tmp_path / "other")  # two trainers of one second share a log file
    other.on_train_start()
    assert "VOID" not in log(other)
    assert other._bank_state["group_key"] != trainer._bank_state["group_key"]  # whatever the seed


def test_fold_all_warns_loudly(make_jras):
    trainer = make_jras(fold="all")
    trainer.on_train_start()
    assert "fold all validates on training cases" in log(trainer) and "VOID" in log(trainer)


def test_one_training_case_is_nothing_to_retrieve_from(make_jras):
    with pytest.raises(ValueError, match=r"nothing to retrieve.*jras\.retriever=none"):
        make_jras("train_cases=1").on_train_start()
    make_jras("train_cases=1 jras.retriever=none").on_train_start()


# ---- the bank's life


def test_the_bank_holds_training_cases_only_and_its_growth_is_logged(make_jras):
    trainer = make_jras()
    trainer.on_train_start()
    training, validation = trainer.do_split()
    assert set(trainer._bank_state["cases"]) == set(training) and not set(training) & set(validation)
    megabytes = float(re.search(r"these image patches of training cases, ([0-9.]+) MB", log(trainer))[1])
    path = Path(trainer.output_folder) / "checkpoint_latest.pth"
    trainer.save_checkpoint(str(path))
    full = path.stat().st_size
    empty(trainer.network.bank)
    trainer.save_checkpoint(str(path))
    assert (full - path.stat().st_size) / 1e6 == pytest.approx(megabytes, abs=0.06)


@pytest.mark.parametrize("chosen", ["", "jras.retriever=random", "jras.fusion=concat"])
def test_a_checkpoints_whole_growth_is_logged(make_trainer, make_jras, fixed_batches, tmp_path, chosen):
    wide = "jras.retriever_widths=[32,64,128] jras.guide_widths=[32,64,128] jras.bank_size=400 jras.warmup_fraction=0"
    sizes, found = [], ""
    for name in ("plain", "ours"):
        if name == "plain":
            trainer = make_trainer(nnUNetTrainer, configuration="2d", results=tmp_path / name)
            trainer.initialize()
        else:
            trainer = make_jras(f"{wide} {chosen}")
            trainer.on_train_start()
            found = log(trainer)
        for batch in fixed_batches(trainer, 1):  # from the first step on there is momentum
            trainer.train_step(batch if name == "plain" else own_batches(trainer, [batch])[0])
        path = tmp_path / f"{name}.pth"
        trainer.save_checkpoint(str(path))
        sizes.append(path.stat().st_size)
    match = re.search(r"grows by ([0-9.]+) MB \(modules ([0-9.]+), momentum ([0-9.]+), guides ([0-9.]+)\)", found)
    total, modules, momentum, guides = map(float, match.groups())
    assert total == pytest.approx((sizes[1] - sizes[0]) / 1e6, abs=0.1)
    assert total == pytest.approx(modules + momentum + guides, abs=0.16) and guides > 0
    assert modules > 0.3 and (momentum < modules - 0.3) == (chosen == "jras.retriever=random")


def test_the_refresh_fits_the_keys_to_the_weights(make_jras):
    trainer = make_jras("num_epochs=1")
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    outputs = [trainer.train_step(next(trainer.dataloader_train)) for _ in range(2)]
    stale = trainer.network.bank.keys.clone()
    state = torch.get_rng_state()
    trainer.on_train_epoch_end(outputs)
    assert torch.equal(torch.get_rng_state(), state) and trainer.network.training
    assert not torch.allclose(stale, trainer.network.bank.keys, atol=1e-5)
    assert torch.allclose(trainer.network.embed_bank(), trainer.network.bank.keys, atol=1e-5)


def test_a_broken_retriever_is_named_at_the_refresh(make_jras):
    trainer = make_jras()
    trainer.on_train_start()
    trainer.network.retriever.project.bias.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        trainer._refresh(trainer.network)


def test_a_bank_of_background_is_reported(make_jras, monkeypatch):
    original = banked.draw_bank

    def background(*args: Any, **kwargs: Any) -> Any:
        content = original(*args, **kwargs)
        return content._replace(labels=torch.zeros_like(content.labels))

    monkeypatch.setattr(banked, "draw_bank", background)
    trainer = make_jras()
    trainer.on_train_start()
    assert "no guide contains any foreground" in log(trainer)
    trainer.on_train_epoch_start()
    assert np.isfinite(trainer.train_step(next(trainer.dataloader_train))["loss"])


def test_a_fold_with_other_structure_stops(make_jras):
    first = make_jras()
    first.on_train_start()
    first.save_checkpoint(str(Path(first.output_folder) / "checkpoint_final.pth"))
    with pytest.raises(ValueError, match=r"jras\.num_guides=4, this fold has jras\.num_guides=2"):
        make_jras("jras.num_guides=2", fold=1).on_train_start()
    make_jras("jras.bank_size=15", fold=1).on_train_start()  # comes with the weights


# ---- figures


def test_the_epochs_figures_are_logged(make_jras):
    trainer = make_jras("num_epochs=1 num_iterations_per_epoch=4 jras.guide_dropout=0")
    trainer.run_training()
    header, row = (Path(trainer.output_folder) / "epochs.csv").read_text().splitlines()[:2]
    figures = dict(zip(header.split(","), map(float, row.split(","))))
    assert 0 <= figures["jras/weight_entropy"] <= np.log(5)
    assert 0 < figures["jras/null_weight"] < 1 and 0 < figures["jras/bank_share_used"] <= 1
    assert 0 <= figures["jras/guide_overlap"] <= 1 and 0 <= figures["jras/random_overlap"] <= 1
    assert figures["jras/retriever_grad_norm"] > 0 and figures["jras/lookup_ms"] > 0
    assert figures["jras/refresh_seconds"] > 0


def test_the_controls_log_what_their_guides_share_with_the_patches(make_jras):
    """In the same steps as the method itself, or `random` and `joint` could not be compared."""
    for retriever in ("random", "frozen"):
        trainer = make_jras(f"jras.retriever={retriever} jras.warmup_fraction=0 jras.guide_dropout=0")
        trainer.on_train_start()
        trainer.on_train_epoch_start()
        outputs = [trainer.train_step(next(trainer.dataloader_train)) for _ in range(2)]
        assert not any("contrastive" in output for output in outputs)
        assert {"guide_overlap", "random_overlap"} <= trainer._figures.read().keys()


# ---- the bottleneck as retriever


def test_the_bottlenecks_keys_are_of_the_patches_on_disk_and_renewed_every_fifth_epoch(make_jras):
    trainer = make_jras("num_epochs=12 jras.retriever_encoder=bottleneck")
    trainer.on_train_start()
    network, state, patch = trainer.network, trainer._bank_state, trainer.configuration_manager.patch_size
    row = int(state["mirrored"].any(1).nonzero()[0])  # a mirrored one
    case = trainer._datasets[0].load_case(state["cases"][row])[:2]
    image = cut_patch(*case, state["coordinates"][row], patch)[0]
    axes = [axis + 1 for axis in state["mirrored"][row].nonzero().flatten().tolist()]
    expected = network.embed(image.flip(axes)[None])[0]
    assert torch.allclose(network.bank.keys[row], expected, atol=1e-5)
    assert not torch.allclose(network.bank.keys[row], network.embed(image[None])[0], atol=1e-5)
    trainer.on_train_epoch_start()
    outputs = [trainer.train_step(next(trainer.dataloader_train)) for _ in range(2)]
    renewed = []
    for trainer.current_epoch in range(12):
        before = network.bank.keys
        trainer.on_train_epoch_end(outputs)
        renewed.append(network.bank.keys is not before)
    assert [epoch for epoch, new in enumerate(renewed) if new] == [4, 9, 11]


def test_the_bottlenecks_contrastive_pass_teaches_projection_and_encoder(make_jras):
    trainer = make_jras("jras.retriever_encoder=bottleneck")
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    batch = next(trainer.dataloader_train)
    passes = {p.name: p for p in trainer.loss_passes(Batch.from_loader(batch, trainer.device))}
    passes["contrastive"].compute()["contrastive"].value.backward()
    for module in (trainer.network.retriever, trainer.network.encoder):
        assert max(float(p.grad.abs().max()) for p in module.parameters()) > 0
    assert all(p.grad is None for p in trainer.network.decoder.seg_layers.parameters())


def test_keys_are_not_renewed_once_the_retriever_is_frozen(make_jras):
    trainer = make_jras("jras.retriever=frozen num_epochs=3")
    trainer.on_train_start()
    renewed = []
    for trainer.current_epoch in range(3):
        before = trainer.network.bank.keys
        trainer.on_train_epoch_start()
        trainer.on_train_epoch_end([trainer.train_step(next(trainer.dataloader_train))])
        renewed.append(trainer.network.bank.keys is not before)
        assert torch.allclose(trainer.network.embed_bank(), trainer.network.bank.keys, atol=1e-6)
    assert renewed == [True, False, False]


# ---- architectures and data that spoil everything


@dataclasses.dataclass(frozen=True)
class Relabelled:
    """The tiny dataset under another label table; its preprocessed data do not change."""

    original: Any
    changes: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)

    def dataset_json(self) -> dict[str, Any]:
        return self.original.dataset_json() | self.changes


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize("regions", [False, True])
def test_every_kind_of_label_trains_and_fills_the_masks(make_jras, tiny, monkeypatch, configuration, ignore, regions):
    labels = {"background": 0, "organ_1": 1, "organ_2": 2}
    if regions:
        labels = {"background": 0, "whole": [1, 2], "organ_2": 2}
    if ignore:  # every voxel counts as annotated; the loss and the bank see an ignore label that nobody wrote
        labels["ignore"] = 3
    order = {"regions_class_order": [1, 2]} if regions else {}
    trainer = make_jras(
        "num_epochs=1 jras.guide_dropout=0",
        configuration=configuration,
        dataset=Relabelled(tiny, {"labels": labels} | order),
    )
    if ignore:
        add_annotated_voxels(trainer, monkeypatch)
    trainer.on_train_start()
    bank = trainer.network.bank
    masks = bank.masks(torch.arange(len(bank)))
    organs = [(bank.labels == value) for value in (1, 2)]
    expected = [organs[0] | organs[1], organs[1]] if regions else [bank.labels == 0, *organs]
    assert all(torch.equal(masks[:, m].bool(), mask) for m, mask in enumerate(expected)) and organs[1].any()
    trainer.on_train_epoch_start()
    outputs = [trainer.train_step(next(trainer.dataloader_train)) for _ in range(2)]
    assert all(np.isfinite(value) for output in outputs for value in output.values())
    assert float(outputs[0]["contrastive"]) > 0
    trainer.on_train_epoch_end(outputs)
    with torch.no_grad():
        trainer.on_validation_epoch_start()
        assert np.isfinite(trainer.validation_step(next(trainer.dataloader_val))["loss"])


def add_annotated_voxels(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nnU-Net's preprocessing writes for a dataset with an ignore label: the places of all annotated voxels."""
    original = type(trainer).get_tr_and_val_datasets
    key = (-1, *trainer.label_manager.all_labels)

    def datasets(self: Any) -> Any:
        found = original(self)
        for dataset in found:

            def load_case(name: str, load: Any = dataset.load_case) -> Any:
                data, seg, previous, properties = load(name)
                places = {k: v for k, v in properties["class_locations"].items() if len(v)}
                everything = {key: np.concatenate(list(places.values()))}
                return data, seg, previous, properties | {"class_locations": places | everything}

            dataset.load_case = load_case
        return found

    monkeypatch.setattr(type(trainer), "get_tr_and_val_datasets", datasets)


def test_a_case_with_nan_is_named_before_training(make_jras, monkeypatch):
    trainer = make_jras()
    original = type(trainer).get_tr_and_val_datasets

    def spoilt(self: Any) -> Any:
        train, validation = original(self)
        load = train.load_case

        def load_case(name: str) -> Any:
            data, *rest = load(name)
            return (np.full(data.shape, np.nan, np.float32) if name == "phantom_003" else data), *rest

        train.load_case = load_case
        return train, validation

    monkeypatch.setattr(type(trainer), "get_tr_and_val_datasets", spoilt)
    with pytest.raises(ValueError, match=r"case phantom_003 holds values that are not finite"):
        trainer.on_train_start()


# ---- together with MedContext


def test_the_teacher_looks_into_the_students_bank_and_stores_it_once(make_jras):
    trainer = make_jras("num_epochs=1", nnUNetTrainerMedContextJRAS)
    trainer.on_train_start()
    assert trainer.teacher.module.bank is trainer.network.bank
    assert trainer.teacher.module.retriever is not trainer.network.retriever
    trainer.on_train_epoch_start()
    output = trainer.train_step(next(trainer.dataloader_train))
    assert {"contrastive", "masked_supervised", "consistency", "supervised"} <= output.keys()
    assert trainer.teacher.module.last is not None
    path = Path(trainer.output_folder) / "checkpoint_latest.pth"
    trainer.save_checkpoint(str(path))
    saved = read(path)
    teacher, student = saved[EXTENSION_KEY]["methods"]["medcontext"]["teacher"], saved["network_weights"]
    assert teacher["bank.images"].data_ptr() == student["bank.images"].data_ptr()


def test_guides_are_dropped_in_training_only_never_for_the_teacher_an_evaluation_or_a_picture(make_jras, monkeypatch):
    """With a dropout of 1 no guide is left where it applies."""
    seen: list[tuple[bool, bool]] = []  # by whom: the trained network or another; and whether any guide was left
    lookup = JRASNetwork._lookup

    def noting(network: JRASNetwork, queries: torch.Tensor) -> Any:
        guides = lookup(network, queries)
        seen.append((network is trainer.retrieval_network, bool(guides.valid.any())))
        return guides

    def seen_in(action: Callable[[], Any]) -> set[tuple[bool, bool]]:
        seen.clear()
        action()
        return set(seen)

    trainer = make_jras("num_epochs=1 jras.guide_dropout=1", nnUNetTrainerMedContextJRAS)
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    monkeypatch.setattr(JRASNetwork, "_lookup", noting)
    batch = next(trainer.dataloader_train)
    student, teacher = True, False
    assert seen_in(lambda: trainer.train_step(batch)) == {(student, False), (teacher, True)}
    on_device = Batch.from_loader(batch, trainer.device)
    assert seen_in(lambda: view_of_batch(trainer, on_device)) == {(student, True)}
    assert trainer.network.training
    with torch.no_grad():
        trainer.on_validation_epoch_start()
        assert seen_in(lambda: trainer.validation_step(next(trainer.dataloader_val))) == {(student, True)}
        assert seen_in(lambda: trainer.forward(on_device)) == {(student, True)}
        assert seen_in(lambda: trainer.network(on_device.data)) == {(student, True)}
