"""Few-shot training sets: nested, reproducible, and strict about what there is."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunetv2_ext.core.fewshot import select_train_cases
from nnunetv2_ext.core.trainer import ExtTrainer

CASES = [f"case_{number:03d}" for number in range(10)]


@given(st.integers(0, 2**31 - 1), st.integers(1, 10), st.integers(1, 10), st.permutations(CASES))
def test_smaller_sets_are_part_of_larger_ones_whatever_the_order_of_the_list(seed, a, b, shuffled):
    small, large = (select_train_cases(CASES, n, seed) for n in sorted((a, b)))
    assert set(small) <= set(large) and len(small) == min(a, b) and len(set(large)) == max(a, b)
    assert select_train_cases(shuffled, a, seed) == select_train_cases(CASES, a, seed)


def test_the_draw_is_fixed_for_ever():
    # published few-shot numbers depend on it: numpy's RandomState(0).permutation(10) begins 2, 8, 4
    assert select_train_cases(CASES, 3, 0) == ["case_002", "case_004", "case_008"]
    assert select_train_cases(CASES, 3, 1) == ["case_002", "case_006", "case_009"]


def test_every_case_is_drawn_first_under_some_seed():
    assert {select_train_cases(CASES, 1, seed)[0] for seed in range(100)} == set(CASES)


def test_none_keeps_the_list_and_its_order():
    shuffled = CASES[::-1]
    chosen = select_train_cases(shuffled, None)
    assert chosen == shuffled and chosen is not shuffled


def test_named_cases_are_taken_once_each():
    assert select_train_cases(CASES, ["case_007", "case_001", "case_007"]) == ["case_001", "case_007"]


@pytest.mark.parametrize("wanted", [0, -1, 11])
def test_a_number_that_cannot_be_had(wanted):
    with pytest.raises(ValueError, match=f"train_cases={wanted}, but this fold has 10 training cases; choose 1 to 10"):
        select_train_cases(CASES, wanted)


@pytest.mark.parametrize(
    ("wanted", "named"), [([], "is empty"), (["case_001", "case_010", "x"], "names case_010, x, not among the 10")]
)
def test_names_that_cannot_be_had(wanted, named):
    with pytest.raises(ValueError, match=named):
        select_train_cases(CASES, wanted)


def test_a_trainer_trains_on_the_chosen_cases_and_validates_on_all(make_trainer):
    trainer = make_trainer(ExtTrainer, "train_cases=2 train_cases_seed=4")
    full_train, full_validation = make_trainer(ExtTrainer).do_split()
    train, validation = trainer.get_tr_and_val_datasets()
    assert sorted(train.identifiers) == select_train_cases(full_train, 2, 4)
    assert sorted(validation.identifiers) == sorted(full_validation)
    assert "train_cases: 2 of 4 training cases" in Path(trainer.log_file).read_text()


def test_more_cases_than_the_fold_has_or_a_validation_case_is_an_error(make_trainer):
    with pytest.raises(ValueError, match="train_cases=5, but this fold has 4"):
        make_trainer(ExtTrainer, "train_cases=5").do_split()
    outsider = make_trainer(ExtTrainer).do_split()[1][0]
    with pytest.raises(ValueError, match=f"names {outsider}, not among the 4 training cases"):
        make_trainer(ExtTrainer, f"train_cases=[{outsider}]").do_split()
