"""The long table: what it holds, and what does not count in it."""

import json
import shutil

import numpy as np
import pytest
import tifffile

from nnunetv2_ext.compare import pictures
from nnunetv2_ext.compare.arms import Arm, predictions_arm
from nnunetv2_ext.compare.scores import Scores, collect, independent
from nnunetv2_ext.compare.statistics import all_differences
from nnunetv2_ext.evaluate.folder import Source
from nnunetv2_ext.evaluate.metrics import Rules
from nnunetv2_ext.evaluate.structures import from_dataset_json
from tests.compare.conftest import LABELS, save, truth_of
from tests.compare.test_statistics import scores_of

SOURCE = Source(from_dataset_json({"labels": LABELS}), Rules(("dice", "hd95"), {}))


def predicted(world, name: str, shift: int, cases=("c0", "c1")) -> str:
    for case in cases:
        save(world.root / name / f"{case}.nii.gz", np.roll(truth_of(case), shift, axis=2))
    return name


def arm(world, name: str, *folders: str) -> Arm:
    return predictions_arm(name, [world.root / folder for folder in folders], ".nii.gz")


def scored(world, *arms: Arm, **options) -> Scores:
    predicted(world, "truth", 0)
    return collect(arms, world.root / "truth", SOURCE, own_truth=False, **options)


def test_a_row_per_arm_repeat_fold_case_structure_and_metric(world) -> None:
    arms = [
        arm(world, "x", predicted(world, "x0", 2)),
        arm(world, "y", predicted(world, "y0", 1), predicted(world, "y1", 2)),
    ]
    found = scored(world, *arms, subjects={"c0": "p", "c1": "p"})
    keys = ["arm", "repeat", "fold", "case", "subject", "structure", "metric"]
    assert list(found.table[keys].itertuples(index=False))[:4] == [
        ("x", "repeat 1", "test", "c0", "p", s, m) for s in ("a", "b") for m in ("dice", "hd95")
    ]
    assert len(found.table) == 3 * 2 * 2 * 2 and not found.table.duplicated(keys).any()
    assert found.case_scores("dice", "a").loc["c0"].to_dict() == pytest.approx({"x": 4 / 6, "y": (5 / 6 + 4 / 6) / 2})
    assert found.case_scores("dice", "mean of structures")["x"].tolist() == pytest.approx([(4 / 6 + 1 / 3) / 2] * 2)


@pytest.mark.parametrize("copied", ["folder", "compressed anew"])
def test_a_copied_training_counts_once(copied: str, world) -> None:
    plain = arm(world, "x", predicted(world, "x0", 2))
    for number, shift in enumerate((1, 0, 1)):
        predicted(world, f"y{number}", shift)
    if copied == "folder":
        shutil.rmtree(world.root / "y2")
        shutil.copytree(world.root / "y0", world.root / "y2")
    else:  # the same label maps in other bytes
        for case in ("c0", "c1"):
            save(world.root / "y2" / f"{case}.nii.gz", np.roll(truth_of(case), 1, axis=2).astype(np.int16))
    found = scored(world, plain, arm(world, "y", "y0", "y1", "y2"))
    assert [r.label for r in found.arms[1].repeats] == ["y0", "y1"]
    assert set(found.table.query("arm == 'y'")["repeat"]) == {"y0", "y1"}
    assert found.notes == ["y: y2 has the scores of y0 in every case of fold test; that is one training given twice, "
                           "and it counts once"]  # fmt: skip
    # one case that differs makes another training
    save(world.root / "y2" / "c1.nii.gz", np.roll(truth_of("c1"), 2, axis=2))
    found = scored(world, plain, arm(world, "y", "y0", "y1", "y2"))
    assert len(found.arms[1].repeats) == 3 and not found.notes


def test_3d_tiff_is_compared_in_the_mm_of_the_predictions(world, monkeypatch, capsys) -> None:
    """nnU-Net's gt_segmentations have no .json with the spacing, its predictions do."""
    source = Source(from_dataset_json({"labels": LABELS}), Rules(("hd95",), {}), ".tif")
    arms = []
    for name, shift in (("truth", 0), ("x", 2), ("y", 1)):
        (world.root / name).mkdir()
        for case in ("c0", "c1"):
            tifffile.imwrite(world.root / name / f"{case}.tif", np.roll(truth_of(case), shift, axis=2))
            if name != "truth":
                (world.root / name / f"{case}.json").write_text('{"spacing": [2.0, 1.0, 0.5]}')
        arms.append(predictions_arm(name, [world.root / name], ".tif"))
    found = collect(arms[1:], world.root / "truth", source, own_truth=False)
    assert found.case_scores("hd95", "a").loc["c0"].to_dict() == {"x": 1.0, "y": 0.5}
    assert set(found.files["remark"]) == {"spacing of the prediction only"}
    shown = []
    monkeypatch.setattr(pictures, "draw_slice", lambda *args, **how: shown.append(how["spacing"]))
    (difference,) = [d for d in all_differences(found) if d.structure == "a"]
    assert pictures.draw_cases(found, difference, world.root / "x.png", None, 1)[1] == ["c1"]
    assert set(shown) == {(1.0, 0.5)} and capsys.readouterr().out == ""  # across the thickest axis, without chatter

    (world.root / "y" / "c1.json").write_text(json.dumps({"spacing": [1, 1, 1]}))
    with pytest.raises(ValueError, match=r"case c1: the predictions tell different sizes of a voxel in mm .*x/c1.tif"):
        collect(arms[1:], world.root / "truth", source, own_truth=False)
    (world.root / "y" / "c1.json").unlink()
    with pytest.raises(ValueError, match=r"case c1: neither .*y/c1.tif nor the truth tells the size of a voxel"):
        collect(arms[1:], world.root / "truth", source, own_truth=False)
    for file in (world.root / "x").glob("*.json"):
        file.unlink()
    (world.root / "y" / "c0.json").unlink()
    found = collect(arms[1:], world.root / "truth", source, own_truth=False)
    assert found.metrics["hd95"].title == "HD95 [voxels]" and found.table["truth_ml"].isna().all()


def test_a_copied_fold_makes_the_whole_repeat_doubtful() -> None:
    plain, ours = [[0.5, 0.6, 0.7]], [[0.5, 0.6, 0.7], [0.5, 0.6, 0.8], [0.4, 0.7, 0.7]]
    given = scores_of(plain, ours, folds=["0", "0", "1"])
    given.table = given.table.assign(truth_ml=1.0, prediction_ml=1.0)
    found = independent(given)
    assert [r.label for r in found.arms[1].repeats] == ["seed 0"]
    assert ["fold 0" in found.notes[0], "fold 1" in found.notes[1]] == [True, True]
