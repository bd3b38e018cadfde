"""The data side of the trainer: what it refuses and how it says so, the split, the views, the validation."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_ext.core.fewshot import select_train_cases
from nnunetv2_ext.data.fingerprint import MARK
from nnunetv2_ext.rada.views import AXES, INSIDE
from nnunetv2_ext.trainers.nnUNetTrainerRADA import nnUNetTrainerRADA
from tests.conftest import TinyDataset
from tests.rada.trainers import IGNORE, log_of, mixed_keys, sparse_batch

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture
def copy(sparse_tiny, tmp_path) -> TinyDataset:
    """The preprocessed sparse dataset again, to be edited; raw data are not there, no trainer reads them."""
    shutil.copytree(sparse_tiny.preprocessed, tmp_path / "copy" / "preprocessed")
    base = tmp_path / "copy" / "preprocessed" / sparse_tiny.name
    shutil.rmtree(base / "nnunetv2_ext", ignore_errors=True)
    return TinyDataset(tmp_path / "copy", sparse_tiny.dataset_id, sparse_tiny.name)


def base_of(dataset: TinyDataset) -> Path:
    return dataset.preprocessed / dataset.name


def edit_dataset_json(dataset: TinyDataset, labels: dict[str, Any]) -> None:
    file = base_of(dataset) / "dataset.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"labels": labels}))


def edit_labels(dataset: TinyDataset, change: Any) -> None:
    """Pass every preprocessed label (X, Y, Z), and the raw one nnU-Net keeps, through ``change``."""
    import SimpleITK as sitk

    folder = base_of(dataset) / "nnUNetPlans_3d_fullres"
    cases = infer_dataset_class(str(folder))
    for case in cases.get_identifiers(str(folder)):
        data, label, _, properties = cases(str(folder), [case]).load_case(case)
        image, label = data[:], change(label[:][0].copy())[None]
        locations = {key: np.argwhere(np.isin(label, key)) for key in properties["class_locations"]}
        for file in folder.glob(f"{case}*.b2nd"):
            file.unlink()
        size = [1, 24, 32, 24]
        cases.save_case(
            image, label, properties | {"class_locations": locations}, str(folder / case), chunks=size, blocks=size
        )
        truth = base_of(dataset) / "gt_segmentations" / f"{case}.nii.gz"
        raw = sitk.ReadImage(str(truth))
        changed = sitk.GetImageFromArray(change(sitk.GetArrayFromImage(raw)))
        changed.CopyInformation(raw)
        sitk.WriteImage(changed, str(truth))


def test_a_2d_configuration_is_refused(make_rada, sparse_tiny):
    plans = sparse_tiny.plans()
    plans["configurations"]["3d_fullres"]["patch_size"] = [24, 24]
    with pytest.raises(ValueError, match=r"is 2-D.*use 3d_fullres or 3d_lowres"):
        make_rada(plans=plans).initialize()


def test_a_cascade_is_refused(make_rada, sparse_tiny):
    plans = sparse_tiny.plans()
    plans["configurations"]["3d_lowres"] = plans["configurations"]["3d_fullres"]
    plans["configurations"]["cascade"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    with pytest.raises(ValueError, match=r"is a cascade.*use 3d_fullres or 3d_lowres"):
        make_rada(plans=plans, configuration="cascade").initialize()


def test_a_dataset_without_ignore_label_is_refused(make_rada, copy):
    edit_dataset_json(copy, {"background": 0, "one": 1, "two": 2})
    with pytest.raises(ValueError, match=r"has no ignore label.*sparsify"):
        make_rada(dataset=copy).initialize()


def test_regions_are_refused(make_rada, copy):
    edit_dataset_json(copy, {"background": 0, "both": [1, 2], "one": [2], "ignore": IGNORE})
    file = base_of(copy) / "dataset.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"regions_class_order": [1, 2]}))
    with pytest.raises(ValueError, match=r"declares regions \(both, one\).*one integer per class"):
        make_rada(dataset=copy).initialize()


def test_several_gpus_are_refused_with_the_reason(make_rada):
    trainer = make_rada()
    trainer.is_ddp = True
    with pytest.raises(NotImplementedError, match=r"one GPU: its three networks"):
        trainer.initialize()


def test_a_dataset_without_any_annotation_is_refused_before_training(make_rada, copy):
    edit_labels(copy, lambda label: np.full_like(label, IGNORE))
    with pytest.raises(ValueError, match=r"none of the 8 cases has any annotation"):
        make_rada(dataset=copy).on_train_start()


def test_a_fold_without_labelled_training_case_is_refused(make_rada, copy):
    trainer = make_rada(dataset=copy)
    trainer.initialize()
    annotations = trainer.annotations
    empty = [case for case, annotation in annotations.items() if not annotation.labelled]
    full = [case for case, annotation in annotations.items() if annotation.labelled]
    (base_of(copy) / "splits_final.json").write_text(json.dumps([{"train": empty, "val": full}]))
    with pytest.raises(ValueError, match=r"none of the 4 training cases.*annotations"):
        trainer.do_split()


@pytest.mark.parametrize("fold", [0, "all"])
def test_few_training_cases_without_a_labelled_one_are_refused_with_the_cause(make_rada, fold):
    whole = make_rada(fold=fold)
    whole.initialize()
    train, _ = whole.do_split()
    labelled = {case for case, annotation in whole.annotations.items() if annotation.labelled}
    seed = next(seed for seed in range(100) if not labelled.intersection(select_train_cases(train, 1, seed)))
    trainer = make_rada(f"train_cases=1 train_cases_seed={seed}", fold=fold)
    trainer.initialize()
    with pytest.raises(ValueError, match=r"train_cases chose 1 unlabelled cases and no labelled one"):
        trainer.do_split()


def test_planes_erased_by_preprocessing_stop_the_training(make_rada, copy):
    folder = base_of(copy) / "nnUNetPlans_3d_fullres"
    cases = infer_dataset_class(str(folder))
    trainer = make_rada(dataset=copy)
    trainer.initialize()
    case, annotation = next((c, a) for c, a in trainer.annotations.items() if a.labelled)
    data, label, _, properties = cases(str(folder), [case]).load_case(case)
    image, label = data[:], label[:].copy()
    index = annotation.planes.indices[1][0]
    label[0, :, index, ::2] = IGNORE
    for file in folder.glob(f"{case}*.b2nd"):
        file.unlink()
    size = [1, 24, 32, 24]
    cases.save_case(image, label, properties, str(folder / case), chunks=size, blocks=size)
    with pytest.raises(ValueError, match=f"erased 1 annotated planes, first in {case}: axis 1.*--thicken-only"):
        make_rada(dataset=copy).on_train_start()


def test_without_a_split_one_is_written_that_plain_nnunet_reads(make_rada, make_trainer, copy):
    (base_of(copy) / "splits_final.json").unlink()
    trainer = make_rada(dataset=copy)
    trainer.initialize()
    train, validation = trainer.do_split()
    unlabelled = {case for case, annotation in trainer.annotations.items() if not annotation.labelled}
    assert unlabelled and unlabelled <= set(train) and not unlabelled & set(validation) and validation
    assert "RADA wrote" in log_of(trainer)
    plain = make_trainer(nnUNetTrainer, dataset=copy)
    plain.initialize()
    assert tuple(plain.do_split()) == (train, validation)


def test_unlabelled_validation_cases_are_dropped_with_a_warning(make_rada, copy):
    trainer = make_rada(dataset=copy)
    trainer.initialize()
    annotations = trainer.annotations
    full = [case for case, annotation in annotations.items() if annotation.labelled]
    empty = [case for case in annotations if case not in full]
    split = [{"train": full[:-1] + empty[1:], "val": [full[-1], empty[0]]}]
    (base_of(copy) / "splits_final.json").write_text(json.dumps(split))
    assert trainer.do_split() == (split[0]["train"], [full[-1]])
    assert "WARNING: 1 of 2 validation cases have no annotation" in log_of(trainer)


def test_fold_all_trains_on_all_and_validates_on_the_labelled(make_rada):
    trainer = make_rada(fold="all")
    trainer.initialize()
    train, validation = trainer.do_split()
    assert len(train) == 8 and len(validation) == 4


def test_the_log_names_the_planes_of_every_case_and_the_views(make_rada):
    trainer = make_rada()
    trainer.on_train_start()
    log = log_of(trainer)
    for case in trainer.labelled_cases:
        assert f"{case}  axis0 [" in log
    assert "4 labelled and 4 unlabelled cases; planes axis0 4, axis1 4, axis2 4" in log
    assert "network 1 learns from planes of axes 0, 1; network 2 learns from planes of axes 0, 2" in log
    assert "1 patches of 3 labelled cases and 1 of 4 unlabelled cases" in log
    assert trainer.rada_network.bank.view_axes == ((0, 1), (0, 2), (1, 2))
    assert not [p for p in Path(trainer.preprocessed_dataset_folder).iterdir() if p.suffix == ".json"]


def without_axes(*axes: int) -> Any:
    """A label change: planes of these axes become ignore."""

    def change(label: np.ndarray) -> np.ndarray:
        known = label != IGNORE
        keep = np.zeros(label.shape, bool)
        for axis in set(range(3)) - set(axes):
            others = tuple(a for a in range(3) if a != axis)
            planes = known.mean(others) > 0.95
            keep[(slice(None),) * axis + (planes,)] = True
        return np.where(keep, label, IGNORE).astype(label.dtype)

    return change


@pytest.mark.parametrize(
    ("removed", "masks", "said"),
    [((1,), (0b101, 0b001, 0b100), "planes on axes 0 and 2 only"), ((0, 2), (0b111,) * 3, "planes on axis 1 only")],
)
def test_with_planes_on_fewer_axes_the_views_follow_and_training_works(make_rada, copy, removed, masks, said):
    edit_labels(copy, without_axes(*removed))
    trainer = make_rada(dataset=copy)
    trainer.on_train_start()
    assert trainer.masks == masks and said in log_of(trainer)
    trainer.on_train_epoch_start()
    assert np.isfinite(float(trainer.train_step(next(trainer.dataloader_train))["loss"]))


def test_the_cards_semi_supervised_command_takes_unlabelled_volumes(make_trainer, sparse_tiny):
    card = (Path(__file__).parents[2] / "docs/methods/rada.md").read_text(encoding="utf-8")
    [settings] = re.findall(r'^ +nnUNet_ext_settings="(.*?)" nnUNetv2_train .*# semi-supervised$', card, re.MULTILINE)
    trainer = make_trainer(nnUNetTrainerRADA, settings, dataset=sparse_tiny)
    trainer.on_train_start()
    assert re.search(r"each batch 2 patches of \d+ labelled cases and 2 of \d+ unlabelled cases", log_of(trainer))
    batch = next(trainer.dataloader_train)
    assert sum(key in trainer.labelled_cases for key in batch["keys"]) == 2 and len(batch["keys"]) == 4
    trainer.on_train_epoch_start()
    assert np.isfinite(float(trainer.train_step(batch)["loss"]))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("rada.min_labelled=2", "a larger batch_size takes the unlabelled cases in"),
        ("rada.labelled_share=1", "are left out (rada.labelled_share=1)"),
    ],
)
def test_a_batch_without_unlabelled_cases_says_so(make_rada, settings, said):
    trainer = make_rada(settings)
    trainer.on_train_start()
    assert said in log_of(trainer)
    trainer.on_train_epoch_start()
    assert set(next(trainer.dataloader_train)["keys"]) <= set(trainer.labelled_cases)


def test_scribbles_supervise_all_networks_and_the_log_says_so(make_rada, copy):
    def scribble(label: np.ndarray) -> np.ndarray:
        if not (label != IGNORE).any():
            return label
        changed = np.full_like(label, IGNORE)
        changed[8:14, 10:20, 11] = 1
        changed[8:14, 10:20, 5] = 0
        return changed

    edit_labels(copy, scribble)
    trainer = make_rada(dataset=copy)
    trainer.on_train_start()
    assert trainer.masks == (0b111,) * 3 and "scribbles only" in log_of(trainer)
    trainer.on_train_epoch_start()
    batch = next(trainer.dataloader_train)
    assert ((batch["target"][0, 1] & 7) == 7).any()
    figures = trainer.train_step(batch)
    assert all(float(figures[f"supervised_{k}"]) != -1 for k in (1, 2, 3))


def test_planes_in_some_cases_and_scribbles_in_another(make_rada, copy):
    looked_at: list[int] = []

    def change(label: np.ndarray) -> np.ndarray:
        if not (label != IGNORE).any():
            return label
        looked_at.append(1)
        if len(looked_at) > 2:  # the first labelled case, preprocessed and raw, becomes one of scribbles
            return label
        changed = np.full_like(label, IGNORE)
        changed[8:14, 10:20, 11] = 1
        return changed

    edit_labels(copy, change)
    trainer = make_rada(dataset=copy, fold="all")
    trainer.on_train_start()
    log = log_of(trainer)
    assert trainer.masks == (0b011, 0b101, 0b110)
    assert "4 labelled and 4 unlabelled cases; planes axis0 3, axis1 3, axis2 3" in log
    assert "2 patches" not in log and "1 patches of 4 labelled cases and 1 of 4 unlabelled cases" in log
    (scribbled,) = [case for case, a in trainer.annotations.items() if a.labelled and not a.planes]
    assert f"{scribbled}  axis0 []  axis1 []  axis2 []" in log and "preprocessing erased" not in log
    train, _ = trainer.get_tr_and_val_datasets()
    whole = (slice(None), *map(slice, (99, 99, 99)))
    found = {case: set(np.unique(train.load_case(case)[1][whole][1])) for case in train.identifiers}
    assert found[scribbled] == {INSIDE, INSIDE | AXES}  # for all networks
    assert all({INSIDE | 1, INSIDE | 2, INSIDE | 4} <= found[c] for c in trainer.labelled_cases - {scribbled})
    trainer.on_train_epoch_start()
    assert np.isfinite(float(trainer.train_step(next(trainer.dataloader_train))["loss"]))


def test_annotations_that_preprocessing_erased_are_warned_about_by_name(make_rada, copy):
    import SimpleITK as sitk

    trainer = make_rada(dataset=copy)
    trainer.initialize()
    case = next(case for case, a in trainer.annotations.items() if not a.labelled)
    file = base_of(copy) / "gt_segmentations" / f"{case}.nii.gz"
    image = sitk.ReadImage(str(file))
    raw = sitk.GetArrayFromImage(image)
    raw[8, :20, 10] = 1  # in the raw label only: it was too thin
    changed = sitk.GetImageFromArray(raw)
    changed.CopyInformation(image)
    sitk.WriteImage(changed, str(file))
    trainer.on_train_start()
    log = log_of(trainer)
    assert f"WARNING: {case} is annotated" in log and "it counts as one of the 4 unlabelled cases" in log
    assert "4 labelled and 4 unlabelled cases" in log


@pytest.mark.parametrize("stale", [True, False])
def test_ct_preprocessed_before_its_fingerprint_was_corrected_is_warned_about(make_rada, copy, stale):
    file = base_of(copy) / "tiny.json"
    images = base_of(copy).glob("nnUNetPlans_3d_fullres/*.b2nd")
    times = [p.stat().st_mtime for p in images if not p.name.endswith("_seg.b2nd")]
    plans = json.loads(file.read_text()) | {MARK: {"corrected_at": max(times) + 1 if stale else min(times) - 1}}
    plans["configurations"]["3d_fullres"]["normalization_schemes"] = ["CTNormalization"]
    file.write_text(json.dumps(plans))
    trainer = make_rada(dataset=copy)
    trainer.on_train_start()
    said = "WARNING: 8 of 8 images in nnUNetPlans_3d_fullres" in log_of(trainer)
    assert said == stale and "fix-fingerprint -d" not in log_of(trainer)


def test_without_unlabelled_cases_all_samples_are_labelled(make_rada, copy):
    trainer = make_rada(dataset=copy)
    trainer.initialize()
    full = [case for case, annotation in trainer.annotations.items() if annotation.labelled]
    (base_of(copy) / "splits_final.json").write_text(json.dumps([{"train": full[:-1], "val": full[-1:]}]))
    trainer.on_train_start()
    assert "2 patches of 3 labelled cases; there are no unlabelled cases" in log_of(trainer)
    trainer.on_train_epoch_start()
    assert "co_training_1" in trainer.train_step(next(trainer.dataloader_train))


def test_validation_counts_annotated_voxels_with_a_bit_only(make_rada):
    trainer = make_rada()
    trainer.on_train_start()
    trainer.on_validation_epoch_start()
    batch = sparse_batch(trainer, mixed_keys(trainer))
    batch["target"][0, 0, :2], batch["target"][0, 1, :2] = 0, 0  # padding: background to nnU-Net
    with torch.no_grad():
        found = trainer.validation_step({**batch, "target": batch["target"].clone()})
        prediction = trainer.network(batch["data"]).argmax(1)
    label = torch.where((batch["target"][:, 1] & 7) != 0, batch["target"][:, 0], IGNORE)
    for c in (1, 2):
        assert found["tp_hard"][c - 1] == ((prediction == c) & (label == c)).sum()
        assert found["fp_hard"][c - 1] == ((prediction == c) & (label != c) & (label != IGNORE)).sum()
        assert found["fn_hard"][c - 1] == ((prediction != c) & (label == c)).sum()


def test_plans_without_the_settings_block_are_refused_by_the_predictor(sparse_tiny):
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    plans = PlansManager(sparse_tiny.plans())
    configuration = plans.get_configuration("3d_fullres")
    with pytest.raises(ValueError, match=r"plans.json of its model folder"):
        nnUNetTrainerRADA.build_network_architecture(plans, configuration, 1, 3, False)
