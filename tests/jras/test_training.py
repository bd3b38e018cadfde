"""The trainer: plain where it must be, nobody guides himself, and a continued training is the uninterrupted one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_ext.core.checkpoint import EXTENSION_KEY
from nnunetv2_ext.core.export import export_model
from nnunetv2_ext.jras import network as networks
from nnunetv2_ext.jras.labels import mask_lut, masks_of_target
from nnunetv2_ext.trainers.nnUNetTrainerJRAS import nnUNetTrainerJRAS
from nnunetv2_ext.trainers.nnUNetTrainerMedContextJRAS import nnUNetTrainerMedContextJRAS
from tests.conftest import make_tiny_dataset

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture
def make_jras(make_trainer, small_jras) -> Callable[..., Any]:
    """``make_jras("key=value ...", cls=, **make_trainer's options)``: a trainer with a small reader, seed 3."""

    def make(settings: str = "", cls: type = nnUNetTrainerJRAS, **options: Any) -> Any:
        keys = {pair.split("=")[0] for pair in settings.split()}
        base = " ".join(pair for pair in f"{small_jras} seed=3".split() if pair.split("=")[0] not in keys)
        return make_trainer(cls, f"{base} {settings}", **{"configuration": "2d", **options})

    return make


def log(trainer: Any) -> str:
    return Path(trainer.log_file).read_text()


def started(trainer: Any) -> Any:
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    return trainer


# ---- a step


def test_a_step_learns_from_the_transported_mask_and_keeps_no_graph(make_jras):
    trainer = started(make_jras("jras.guide_dropout=0"))
    before = {name: value.clone() for name, value in trainer.network.named_parameters()}
    outputs = [trainer.train_step(next(trainer.dataloader_train)) for _ in range(2)]
    assert set(outputs[0]) == {"loss", "supervised", "transported", "grad_norm"}
    assert outputs[0]["loss"] == outputs[0]["supervised"] and outputs[0]["transported"] > 0
    moved = {name for name, value in trainer.network.named_parameters() if not torch.equal(value, before[name])}
    for part in ("reader.key.weight", "reader.guide_vector.weight", "reader.log_scale", "columns.0.weight"):
        assert part in moved
    assert trainer.network.last is None


def test_the_weight_of_the_transported_loss_scales_its_gradient(make_jras, tmp_path):
    def gradient(weight: float) -> torch.Tensor:
        text = f"jras.transport_weight={weight} jras.guide_dropout=0 clip_norm=1e9"
        trainer = started(make_jras(text, results=tmp_path / str(weight)))
        trainer.train_step(next(trainer.dataloader_train))
        return trainer.network.reader.key.weight.grad

    one, two = gradient(0.5), gradient(1.0)  # at the start the columns are zero and pass nothing else on
    assert one.abs().max() > 0 and torch.allclose(2 * one, two, rtol=1e-3)
    assert gradient(0) is None or gradient(0).abs().max() == 0


def test_guide_dropout_is_for_the_trained_network_in_training_only(make_jras, monkeypatch):
    trainer = started(make_jras("jras.guide_dropout=1", nnUNetTrainerMedContextJRAS))
    seen = []
    forward = networks.JRASNetwork.forward

    def watched(network, x):
        context = networks._CONTEXT.get()
        seen.append((network is trainer.network, context.kept.any().item() if hasattr(context, "kept") else None))
        return forward(network, x)

    monkeypatch.setattr(networks.JRASNetwork, "forward", watched)
    trainer.train_step(next(trainer.dataloader_train))
    assert {kept for own, kept in seen if own} == {False} and {kept for own, kept in seen if not own} == {True}


def test_batches_without_guides_are_refused_by_name(make_jras, fixed_batches):
    trainer = started(make_jras())
    with pytest.raises(ValueError, match="nnUNetTrainerJRAS: the batch has no 'guide_data'"):
        trainer.train_step(fixed_batches(trainer, 1)[0])


@pytest.mark.parametrize("regions", [False, True])
def test_masks_of_a_target_are_those_of_the_bank(make_jras, regions, request):
    dataset = request.getfixturevalue("labelled_otherwise") if regions else None
    trainer = started(make_jras(dataset=dataset))
    labels, batch = trainer.label_manager, next(trainer.dataloader_train)
    target = batch["target"][0]
    if regions:
        target[0, -1, :5] = True  # ignored
    masks, known = masks_of_target(target, labels)
    lut = mask_lut(labels)
    assert masks.shape[1] == lut.shape[1] == labels.num_segmentation_heads
    if regions:
        assert torch.equal(known[:, 0], target[:, -1] == 0) and not known.all()
        assert torch.equal(masks.bool(), target[:, :-1].bool() & known)
    else:
        assert known.all() and torch.equal(masks.argmax(1), target[:, 0].long())


@pytest.fixture(scope="module")
def labelled_otherwise(tmp_path_factory):
    """Regions and an ignore label."""
    return make_tiny_dataset(tmp_path_factory.mktemp("regions"), num_test=0, regions=True, ignore=True)


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_regions_and_an_ignore_label_train_and_are_read(make_jras, labelled_otherwise, configuration):
    trainer = started(make_jras(dataset=labelled_otherwise, configuration=configuration))
    outputs = [trainer.train_step(next(trainer.dataloader_train)) for _ in range(2)]
    assert all(np.isfinite(value) for output in outputs for value in output.values())
    assert "of the guides' voxels are annotated" in log(trainer)
    labels = trainer.network.bank.labels
    assert (labels == 255).any() and labels[labels != 255].max() <= 2


# ---- nobody guides himself


@pytest.mark.parametrize("cls", [nnUNetTrainerJRAS, nnUNetTrainerMedContextJRAS])
def test_in_a_whole_epoch_no_forward_ever_reads_its_own_subject(make_jras, cls, monkeypatch):
    trainer = make_jras("num_epochs=1 num_iterations_per_epoch=6 num_val_iterations_per_epoch=2", cls)
    found: list[Any] = []
    lookup = networks.JRASNetwork._looked_up

    def watched(network, vectors, inputs):
        features, ids, valid = lookup(network, vectors, inputs)
        context = networks._CONTEXT.get()
        found.append((context.groups, network.bank.groups[ids].masked_fill(~valid, 0)))
        return features, ids, valid

    monkeypatch.setattr(networks.JRASNetwork, "_looked_up", watched)
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    outputs = []
    for _ in range(6):
        batch = next(trainer.dataloader_train)
        for case, guides in zip(batch["keys"], batch["guide_keys"]):
            assert case not in guides
        outputs.append(trainer.train_step(batch))
    assert not found  # training reads the episode, not the bank
    trainer.on_train_epoch_end(outputs)
    trainer.on_validation_epoch_start()
    with torch.no_grad():
        for _ in range(2):
            trainer.validation_step(next(trainer.dataloader_val))
    assert len(found) >= 3  # figures and validation
    for own, groups in found:
        assert not (groups == own[:, None]).any()
    assert networks._CONTEXT.get() is None


def test_a_sample_of_a_bank_case_is_excluded_in_validation(make_jras):
    """Canary: the validation batch is renamed to training cases, whose own patches would come first."""
    trainer = started(make_jras("jras.num_guides=3 jras.bank_size=8"))
    trainer.network.eval()
    batch = next(trainer.dataloader_val)
    cases = trainer._bank_state["cases"]
    batch["keys"] = np.array([cases[0], cases[-1]])
    with torch.no_grad():
        trainer.validation_step(batch)
    last, groups = trainer.network.last, trainer.network.bank.groups
    own = trainer.groups_of(batch["keys"])
    assert not ((groups[last.ids] == own[:, None]) & last.valid).any() and last.valid.any()


def test_subjects_come_from_the_methods_setting_the_common_one_or_the_record(make_jras, tmp_path):
    cases = [f"phantom_00{n}" for n in (2, 3, 4, 5)]

    def groups(settings: str = "", recorded: dict | None = None) -> list[int]:
        trainer = make_jras(f"jras.num_guides=1 {settings}", results=tmp_path / str(len(list(tmp_path.iterdir()))))
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


def test_a_group_regex_that_does_not_match_is_refused(make_jras):
    with pytest.raises(ValueError, match=r"group_regex='patient'.*phantom_00"):
        make_jras("jras.group_regex=patient").on_train_start()


def test_validation_cases_of_a_training_subject_void_the_validation(make_jras, tmp_path):
    trainer = make_jras("jras.num_guides=1 jras.group_regex='phantom_00(?=[05])|phantom_0(?=0[1-4])'")
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


def test_too_few_subjects_for_the_guides_are_refused_with_what_works(make_jras):
    with pytest.raises(ValueError, match=r"leaves 3: set jras\.num_guides=3") as error:
        make_jras("jras.num_guides=4").on_train_start()
    assert "\n" not in str(error.value)
    make_jras("jras.num_guides=3").on_train_start()
    with pytest.raises(ValueError, match="retriever=none"):
        make_jras("jras.num_guides=1 train_cases=1").on_train_start()


# ---- the bank


def test_the_bank_holds_training_cases_only_and_its_size_and_privacy_are_logged(make_jras):
    trainer = make_jras()
    trainer.on_train_start()
    assert set(trainer._bank_state["cases"]) == {f"phantom_00{n}" for n in (2, 3, 4, 5)}
    text = log(trainer)
    assert "PRIVACY" in text and f"{len(trainer.network.bank)} guides of 4 cases" in text
    size = sum(buffer.nbytes for buffer in trainer.network.bank.buffers()) / 1e6
    assert f"training cases, {size:.1f} MB" in text and "bank MODEL --strip" in text


def test_figures_of_the_epoch_are_logged(make_jras):
    trainer = started(make_jras())
    trainer.train_step(next(trainer.dataloader_train))
    figures = trainer.epoch_figures()
    assert 0 < figures["jras/mass_recall"] <= 1 + 1e-5
    assert trainer.network.training


# ---- continuing


def saved(trainer: Any) -> str:
    path = str(Path(trainer.output_folder) / "checkpoint_latest.pth")
    trainer.save_checkpoint(path)
    return path


def test_continuing_keeps_the_bank_and_who_is_in_it(make_jras):
    trainer = started(make_jras())
    trainer.train_step(next(trainer.dataloader_train))
    path = saved(trainer)
    again = make_jras(continued=True)
    again.load_checkpoint(path)
    again.on_train_start()
    assert "a new one is drawn" not in log(again)
    assert again._bank_state == trainer._bank_state
    one, other = trainer.network.state_dict(), again.network.state_dict()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


@pytest.mark.parametrize(("patch", "message"), [([48, 48], "another network"), ([28, 24], "patch size, channels or")])
def test_another_patch_size_on_continuing_is_refused(make_jras, tiny, patch, message):
    trainer = make_jras("save_every=1")
    trainer.on_train_start()
    path = saved(trainer)
    plans = tiny.plans()
    plans["configurations"]["2d"]["patch_size"] = patch
    again = make_jras("save_every=1", continued=True, plans=plans)
    with pytest.raises(ValueError, match=message):
        again.load_checkpoint(path)


def test_a_split_that_moved_a_bank_case_to_validation_is_refused(make_jras):
    trainer = make_jras()
    trainer.on_train_start()
    path = saved(trainer)
    other = make_jras(continued=True, fold=1)
    other.load_checkpoint(path)
    with pytest.raises(ValueError, match="not training cases of this fold any more: phantom_004, phantom_005"):
        other.on_train_start()


def test_a_checkpoint_without_the_key_draws_a_new_bank_and_says_so(make_jras):
    trainer = make_jras()
    trainer.on_train_start()
    trainer.current_epoch = 1
    path = saved(trainer)
    checkpoint = torch.load(path, weights_only=False)
    del checkpoint[EXTENSION_KEY]["methods"]["jras"]
    torch.save(checkpoint, path)
    again = make_jras(continued=True)
    again.load_checkpoint(path)
    again.on_train_start()
    assert "a new one is drawn" in log(again)


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_it_starts_from_a_plain_model_bit_for_bit(make_trainer, make_jras, tmp_path, configuration):
    plain = make_trainer(nnUNetTrainer, configuration=configuration, results=tmp_path / "plain")
    plain.initialize()
    path = tmp_path / "plain.pth"
    plain.save_checkpoint(str(path))
    ours = make_jras(f"init_from={path}", configuration=configuration)
    ours.on_train_start()
    ours.network.eval(), plain.network.eval()
    x = torch.randn(1, 1, *ours.configuration_manager.patch_size)
    assert len(ours.network.bank) > 0
    assert all(torch.equal(a, b) for a, b in zip(ours.network(x), plain.network(x)))
    assert ours.network.last.valid.any()  # guides were read
    with pytest.raises(ValueError, match="does not exist"):
        make_jras("init_from=nowhere.pth").initialize()


def test_a_fold_with_other_structure_stops(make_jras):
    first = make_jras()
    first.on_train_start()
    saved(first)
    with pytest.raises(ValueError, match=r"jras.value_dim=4, this fold has jras.value_dim=6"):
        make_jras("jras.value_dim=6", fold=1).on_train_start()
    make_jras("jras.bank_size=9 jras.style_share=0", fold=1).on_train_start()


@pytest.mark.parametrize("kind", ["strip-bank", "blank-groups"])
def test_an_export_names_neither_a_training_case_nor_a_file(make_trainer, make_jras, tmp_path, kind):
    """A case id is often a patient's."""
    plain = make_trainer(nnUNetTrainer, configuration="2d", results=tmp_path / "plain")
    plain.initialize()
    source = tmp_path / "plain.pth"
    plain.save_checkpoint(str(source))
    trainer = make_jras(f"train_cases=[phantom_002,phantom_003] jras.num_guides=1 init_from={source}")
    trainer.on_train_start()
    trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    folder = Path(trainer.output_folder_base)
    plans = (folder / "plans.json").read_text()
    assert "phantom_002" in plans and str(source) in plans  # what must not go along
    export_model(folder, tmp_path / "out", edits=[kind])
    for path in (p for p in (tmp_path / "out").rglob("*") if p.is_file()):
        assert b"phantom_00" not in path.read_bytes() and str(tmp_path).encode() not in path.read_bytes(), path
    block = json.loads((tmp_path / "out" / "plans.json").read_text())["nnunetv2_ext"]
    assert "train_cases" not in block and "jras" in block


def test_the_teacher_looks_into_the_students_bank_and_stores_it_once(make_jras):
    trainer = started(make_jras("", nnUNetTrainerMedContextJRAS))
    assert trainer.teacher.module.bank is trainer.network.bank
    trainer.train_step(next(trainer.dataloader_train))
    weights = trainer._checkpoint(0, None)["network_weights"]
    assert len(weights["bank.images"]) == len(trainer.network.bank)
