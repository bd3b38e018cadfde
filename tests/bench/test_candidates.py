"""Trainers and settings from the command line."""

import pytest

from nnunetv2_ext.bench.candidates import Candidate, find_trainer, parse_candidates

MED = "nnUNetTrainerMedContext"


def test_plain_comes_first_and_once() -> None:
    assert parse_candidates([]) == [Candidate("nnUNetTrainer")]
    assert parse_candidates([MED, "nnUNetTrainer"]) == [Candidate("nnUNetTrainer"), Candidate(MED)]


def test_one_trainer_with_several_settings() -> None:
    found = parse_candidates([MED, f"{MED}:medcontext.masked_fraction=0.5 seed=1"])
    assert found[1:] == [Candidate(MED), Candidate(MED, "medcontext.masked_fraction=0.5 seed=1")]
    assert [c.label for c in found] == ["nnUNetTrainer", MED, f"{MED} masked_fraction=0.5 seed=1"]


def test_settings_of_a_name_reach_each_of_its_occurrences() -> None:
    found = parse_candidates([MED, f"{MED}:seed=1"], [f"{MED}=medcontext.beta=0"])
    assert [c.settings for c in found] == ["", "medcontext.beta=0", "medcontext.beta=0 seed=1"]


def test_a_settings_file_is_taken_as_it_is() -> None:
    assert parse_candidates([f"{MED}:/a/b.yaml"])[1] == Candidate(MED, "/a/b.yaml")


@pytest.mark.parametrize(
    ("trainers", "settings", "message"),
    [
        ([MED, MED], [], "twice"),
        ([MED], ["medcontext.beta=0"], "TRAINER=SETTINGS"),
        ([MED], ["nnUNetTrainerOther=seed=1"], "not among"),
        ([f"{MED}:a.yaml"], [f"{MED}=seed=1"], "file"),
    ],
)
def test_mistakes_are_named(trainers: list[str], settings: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_candidates(trainers, settings)


def test_an_unknown_trainer_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=f"no trainer 'nnUNetTrainerMedContxt'; did you mean {MED}"):
        find_trainer("nnUNetTrainerMedContxt")
