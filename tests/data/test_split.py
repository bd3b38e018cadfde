"""Unlabelled cases train in every fold and validate in none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnunetv2_ext.data.split import clean_fold, labelled_splits, read_split, require_fold, write_split_if_absent


def names(prefix: str, number: int) -> list[str]:
    return [f"{prefix}_{i:02d}" for i in range(number)]


def test_fully_labelled_dataset_is_split_as_nnunet_does() -> None:
    cases = names("case", 13)
    stock = generate_crossval_split(cases, seed=12345, n_splits=5)
    assert labelled_splits(cases) == [{part: [str(c) for c in fold[part]] for part in fold} for fold in stock]


@given(labelled=st.integers(2, 12), unlabelled=st.integers(0, 9))
def test_every_labelled_case_validates_once(labelled, unlabelled) -> None:
    with_labels, without = names("a", labelled), names("b", unlabelled)
    splits = labelled_splits(with_labels, without)
    assert len(splits) == min(5, labelled)
    assert sorted(case for fold in splits for case in fold["val"]) == with_labels
    for fold in splits:
        assert set(fold["train"]) == {*with_labels, *without} - set(fold["val"])
        assert set(with_labels) & set(fold["train"])


@given(data=st.data())
def test_subjects_are_never_on_both_sides(data) -> None:
    cases = names("c", data.draw(st.integers(4, 16)))
    subjects = {case: f"s{data.draw(st.integers(0, 4))}" for case in cases}
    labelled = data.draw(st.lists(st.sampled_from(cases), min_size=2, unique=True))
    if len({subjects[case] for case in labelled}) < 2:
        return
    splits = labelled_splits(labelled, set(cases) - set(labelled), subjects)
    assert sorted(case for fold in splits for case in fold["val"]) == sorted(labelled)
    for fold in splits:
        assert not {subjects[c] for c in fold["train"]} & {subjects[c] for c in fold["val"]}
        assert all(c in fold["train"] for c in cases if subjects[c] not in {subjects[v] for v in fold["val"]})


@pytest.mark.parametrize(
    ("labelled", "subjects", "message"),
    [
        ([], None, "annotate some planes first"),
        (["a"], None, "fold 'all'"),
        (["a", "b"], {"a": "s", "b": "s", "c": "t"}, "only 1 subject"),
    ],
)
def test_what_cannot_be_split(labelled, subjects, message) -> None:
    with pytest.raises(ValueError, match=message):
        labelled_splits(labelled, ["c"], subjects)


def test_existing_split_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "splits_final.json"
    assert write_split_if_absent(file, names("a", 4), names("b", 2))
    assert json.loads(file.read_text()) == labelled_splits(names("a", 4), names("b", 2))
    file.write_text("[]")
    assert not write_split_if_absent(file, names("a", 4), names("b", 2))
    assert file.read_text() == "[]"


def test_unlabelled_cases_leave_validation_with_a_warning() -> None:
    said: list[str] = []
    assert clean_fold(["a", "u"], ["b", "v", "w"], {"a", "b"}, said.append) == (["a", "u"], ["b"])
    assert len(said) == 1 and "2 of 3 validation cases" in said[0] and "splits_final.json" in said[0]
    assert clean_fold(["a"], ["b"], {"a", "b"}, said.append) == (["a"], ["b"]) and len(said) == 1


def test_folds_without_labelled_cases_are_refused() -> None:
    with pytest.raises(ValueError, match=r"training cases .* delete splits_final\.json"):
        clean_fold(["u"], ["b"], {"b"}, print)
    with pytest.raises(ValueError, match=r"validation cases .* delete splits_final\.json"):
        clean_fold(["a"], ["u"], {"a"}, print)


def test_a_fold_that_the_split_does_not_have(tmp_path: Path) -> None:
    require_fold(tmp_path, "4")  # nnU-Net writes five
    with pytest.raises(ValueError, match=r"has no fold 5: -f takes 0 to 4, or all"):
        require_fold(tmp_path, "5")
    (tmp_path / "splits_final.json").write_text(json.dumps([{"train": ["a"], "val": ["b"]}] * 2))
    for fold in ("0", "1", "all"):
        require_fold(tmp_path, fold)
    with pytest.raises(ValueError, match=r"splits_final.json has no fold 2: -f takes 0 to 1, or all"):
        require_fold(tmp_path, "2")


@pytest.mark.parametrize("text", ["{", "{}x", '{"a": 1}', '[{"train": []}]', "[1]", '["train"]', "7"])
def test_a_damaged_split_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "splits_final.json").write_text(text)
    with pytest.raises(ValueError, match=r"splits_final.json (cannot be read as JSON|is not a list of folds)"):
        read_split(tmp_path / "splits_final.json")
