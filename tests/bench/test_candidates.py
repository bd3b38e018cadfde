"""Trainers and settings from the command line."""

import pytest

from nnunetv2_ext.bench.candidates import Candidate, find_trainer, parse_candidates, promise_of
from nnunetv2_ext.core.outside import Promise
from tests.core.signed.training import nnUNetTrainerSigned

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


@pytest.mark.parametrize(
    ("settings", "step", "predict"),
    [
        ("", 1.5, None),
        ("seed=1 num_epochs=7", 2.5, 3.0),  # in any order
        ("num_epochs=8", None, None),
        ("FILE", 2.5, 3.0),
        ("num_epochs=1000", 1.5, None),  # the default
    ],
)
def test_a_trainer_outside_the_package_promises_too(settings, step, predict, tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("nnUNet_ext_settings", raising=False)
    file = tmp_path / "settings.yaml"
    file.write_text("num_epochs: 7\nseed: 1\n")
    candidate = Candidate("nnUNetTrainerSigned", str(file) if settings == "FILE" else settings)
    promise = promise_of(candidate, nnUNetTrainerSigned)
    assert (promise.step("cpu"), promise.predict, promise.step("mps")) == (step, predict, None)


def test_a_promise_for_the_defaults_does_not_hold_for_the_settings_of_the_environment(monkeypatch) -> None:
    monkeypatch.setenv("nnUNet_ext_settings", "num_epochs=7 seed=1")
    assert promise_of(Candidate("nnUNetTrainerSigned"), nnUNetTrainerSigned).step("cpu") == 2.5
    monkeypatch.setenv("nnUNet_ext_settings", "seed=1")
    assert promise_of(Candidate("nnUNetTrainerSigned"), nnUNetTrainerSigned) == Promise()


def test_which_file_a_setting_names_changes_no_promise(monkeypatch) -> None:
    monkeypatch.delenv("nnUNet_ext_settings", raising=False)
    pemma = find_trainer("nnUNetTrainerPEMMA")
    promised = promise_of(Candidate("nnUNetTrainerPEMMA", "pemma.base=/a/model"), pemma)
    assert promised.missing == 1.02
    assert promise_of(Candidate("nnUNetTrainerPEMMA", "pemma.base=/a/model pemma.rank=8"), pemma) == Promise()


def test_plain_nnunet_promises_nothing() -> None:
    assert promise_of(Candidate("nnUNetTrainer"), find_trainer("nnUNetTrainer")) == Promise()
