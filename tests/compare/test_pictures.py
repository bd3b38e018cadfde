"""Which cases and which slice are shown."""

import io

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk

from nnunetv2_ext.compare import pictures
from nnunetv2_ext.compare.arms import predictions_arm
from nnunetv2_ext.compare.scores import collect
from nnunetv2_ext.compare.statistics import NO_INTERVAL, Difference, all_differences, paired_difference
from nnunetv2_ext.evaluate.folder import Source
from nnunetv2_ext.evaluate.metrics import METRICS, Rules
from nnunetv2_ext.evaluate.structures import from_dataset_json
from tests.compare.conftest import LABELS, save, truth_of
from tests.compare.test_statistics import scores_of


def difference(values, metric="dice") -> Difference:
    cases = pd.Series(values, index=[f"case{i}" for i in range(len(values))])
    about = ("arm1", "arm0", metric, METRICS[metric], "a")
    return Difference(*about, cases, 0.0, NO_INTERVAL, 0, "cases", 0, 0, 0, {}, True, (1, 1), NO_INTERVAL, {})


def test_the_largest_losses_and_gains_are_chosen_and_undefined_cases_are_not() -> None:
    d = difference([0.1, -0.3, np.nan, 0.0, -0.2, 0.4, -0.1])
    assert pictures.worst_first(d, 2) == (["case1", "case4"], ["case5", "case0"])
    assert pictures.worst_first(difference([3.0, -1.0, 2.0], "hd95"), 2) == (["case0", "case2"], ["case1"])


def test_the_pair_of_trainings_nearest_to_the_average_is_shown() -> None:
    plain, ours = [[0.5, 0.5], [0.1, 0.5], [0.9, 0.5]], [[0.4, 0.5], [0.45, 0.5]]
    free = scores_of(plain, ours, labels=[["r0", "r1", "r2"], ["seed 0", "seed 1"]])
    d = paired_difference(free, "arm1", "dice", "a")  # -0.075 in the first case
    shown = pictures.shown_repeats(free.trainings("dice", "a").loc["case0"], d)
    assert d.per_case.iloc[0] == pytest.approx(-0.075) and shown["arm0"] == "r0"
    common = scores_of(plain, [[0.4, 0.5], [0.1, 0.5], [0.8, 0.5]])
    d = paired_difference(common, "arm1", "dice", "a")  # -0.1, 0, -0.1: -0.067 on average
    shown = pictures.shown_repeats(common.trainings("dice", "a").loc["case0"], d)
    assert shown == {"arm0": "seed 0", "arm1": "seed 0"}


def test_the_slice_in_which_the_errors_differ_most() -> None:
    truth, first, second = (np.zeros((6, 4, 4), dtype=int) for _ in range(3))
    truth[1, :2] = 1
    assert pictures.telling_slice([truth, truth, truth], 0) == 1
    first[4, 0] = 1
    second[5, :3] = 2  # outside the truth in both, more in slice 5
    assert pictures.telling_slice([truth, first, second], 0) == 5
    truth[5] = 9
    assert pictures.telling_slice([truth, first, second], 0, ignore=9) == 4


def test_thick_slices_are_not_cut_through() -> None:
    def axis(spacing, shape=(4, 5, 6)) -> int:
        return pictures.viewing_axis(pictures.Volume(np.zeros(shape), spacing, None))

    assert axis((1, 1, 1)) == 0 and axis((1, 5, 1)) == 1 and axis((1, 1, 1.4)) == 0
    assert axis((1, 1, 5), (4, 1, 6)) == 1


def test_errors_are_told_apart_by_who_made_them_and_not_counted_where_nobody_knows() -> None:
    truth = np.array([1, 1, 1, 1, 0, 9])
    first = np.array([1, 0, 1, 0, 2, 1])
    second = np.array([1, 1, 0, 2, 1, 0])
    only_second, only_first, both = pictures.error_masks(truth, first, second, ignore=9)
    assert only_second.tolist() == [False, False, True, False, False, False]
    assert only_first.tolist() == [False, True, False, False, False, False]
    assert both.tolist() == [False, False, False, True, True, False]
    assert pictures.error_masks(truth, first, second, ignore=None)[2].tolist() == [*both[:5].tolist(), True]


def test_a_worst_case_stands_upright_with_letters_and_its_error_map(world, monkeypatch) -> None:
    """Of files whose rows run from back to front and whose columns run from left to right of the patient (RAS)."""
    truth, wrong = np.zeros((6, 20, 20), dtype=np.uint8), np.zeros((6, 20, 20), dtype=np.uint8)
    truth[2:5, 5:15, 5:15] = wrong[2:5, 5:15, 5:15] = 1
    wrong[3, 14, 5:15] = 0  # the front of the structure is missed
    wrong[3, 5:15, 15] = 1  # and at the patient's right there is too much
    for name, array in (("truth", truth), ("x", truth), ("y", wrong)):
        image = sitk.GetImageFromArray(array)
        image.SetDirection((-1.0, 0, 0, 0, -1.0, 0, 0, 0, 1.0))
        (world.root / name).mkdir()
        sitk.WriteImage(image, str(world.root / name / "c0.nii.gz"))
    source = Source(from_dataset_json({"labels": {"background": 0, "a": 1}}), Rules(("dice",), {}))
    arms = [predictions_arm(name, [world.root / name], ".nii.gz") for name in ("x", "y")]
    found = collect(arms, world.root / "truth", source)
    figures = []
    monkeypatch.setattr("nnunetv2_ext.evaluate.plot.save", lambda figure, path: figures.append(figure))
    (d,) = [d for d in all_differences(found) if d.structure == "a"]
    assert pictures.draw_cases(found, d, world.root / "x.png", None, 1) == (["c0"], [])
    (figure,) = figures
    assert len(figure.axes) == 5 and "y against x" in figure.get_suptitle()
    for axes in figure.axes:
        letters = {text.get_text(): text.get_position() for text in axes.texts}
        assert letters == {"R": (0.02, 0.5), "L": (0.98, 0.5), "A": (0.5, 0.98), "P": (0.5, 0.02)}
    only_second, only_first, both = (image.get_array()[..., 3] > 0 for image in figure.axes[4].images[1:])
    assert not only_first.any() and not both.any()
    rows, columns = np.nonzero(only_second)
    structure = figure.axes[1].images[1].get_array()[..., 3] > 0
    top, left = np.argwhere(structure).min(0)
    assert set(zip(rows.tolist(), columns.tolist())) == {(top, left + i) for i in range(10)} | {
        (top + i, left - 1) for i in range(10)
    }
    entries = {text.get_text(): patch for text, patch in zip(figure.legends[0].texts, figure.legends[0].get_patches())}
    assert entries["only y is wrong"].get_facecolor()[:3] == tuple(
        figure.axes[4].images[1].get_array()[rows[0], columns[0], :3]
    )


@pytest.mark.parametrize("repeats", [1, 2])
def test_titles_of_the_first_row_lie_inside_the_picture_and_apart(world, monkeypatch, repeats) -> None:
    source = Source(from_dataset_json({"labels": LABELS}), Rules(("dice",), {}))
    arms = []
    for arm, moved in (("nnUNetTrainer", 1), ("nnUNetTrainerWithAVeryLongNameOfSixtyCharactersForABadTitle", 2)):
        folders = []
        for repeat in range(repeats):
            folder = world.root / f"{arm}{repeat}"
            folders.append(folder)
            save(folder / "c0.nii.gz", np.roll(truth_of("c0"), moved + repeat, axis=2))
        arms.append(predictions_arm(arm, folders, ".nii.gz"))
    found = collect(arms, world.truth, source, own_truth=False)
    figures = []
    monkeypatch.setattr("nnunetv2_ext.evaluate.plot.save", lambda figure, path: figures.append(figure))
    (d,) = [d for d in all_differences(found) if d.structure == "a"]
    pictures.draw_cases(found, d, world.root / "x.png", None, 1)
    (figure,) = figures
    figure.savefig(io.BytesIO())
    texts = [axes.title for axes in figure.axes] + [figure._suptitle, *figure.legends[0].get_texts()]
    boxes = [text.get_window_extent() for text in texts]
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i]), texts[i].get_text()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width and box.y0 >= 0 and box.y1 <= figure.bbox.height
