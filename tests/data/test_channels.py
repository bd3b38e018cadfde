"""Colour images whose channel names make nnU-Net z-score them."""

import pytest

from nnunetv2_ext.data.channels import channel_names, hint_on_rgb


@pytest.mark.parametrize("names", [("R", "G", "B"), ("red", "Green", "BLUE"), ("rgb_0", "rgb_1", "rgb_2")])
def test_names_of_colours_get_a_hint_with_the_name_to_use(names: tuple[str, ...]) -> None:
    hint = hint_on_rgb({"channel_names": dict(enumerate(names))})
    assert hint is not None and "rgb_to_0_1" in hint and names[0] in hint


@pytest.mark.parametrize("names", [("rgb_to_0_1",) * 3, ("T1", "T2", "FLAIR"), ("R",), ("R", "G", "B", "NIR"), ()])
def test_other_channels_get_none(names: tuple[str, ...]) -> None:
    assert hint_on_rgb({"channel_names": dict(enumerate(names))}) is None


def test_names_come_in_the_order_of_their_numbers_and_from_older_datasets() -> None:
    numbered = {str(n): f"c{n}" for n in (10, 2, 0)}
    assert channel_names({"channel_names": numbered}) == ["c0", "c2", "c10"]
    assert channel_names({"modality": {"1": "T2", "0": "T1"}}) == ["T1", "T2"]
    assert channel_names({}) == channel_names({"channel_names": ["T1"]}) == []


def test_nnunet_scales_by_255_under_the_name_of_the_remedy_only() -> None:
    from nnunetv2.preprocessing.normalization.map_channel_name_to_normalization import get_normalization_scheme

    assert get_normalization_scheme("rgb_to_0_1").__name__ == "RGBTo01Normalization"
    assert get_normalization_scheme("R").__name__ == "ZScoreNormalization"


def test_trainers_say_it_at_their_start(make_trainer, tiny, monkeypatch) -> None:
    from pathlib import Path

    from nnunetv2_ext.trainers.nnUNetTrainerExt import nnUNetTrainerExt

    trainer = make_trainer(nnUNetTrainerExt, "", configuration="2d")
    names = {"channel_names": {"0": "R", "1": "G", "2": "B"}, "nnunetv2_ext": {"notices": ["made by somebody"]}}
    trainer.initialize()
    monkeypatch.setattr(trainer, "dataset_json", {**trainer.dataset_json, **names})
    trainer.on_train_start()
    log = next(Path(trainer.output_folder).glob("training_log*.txt")).read_text()
    assert "rgb_to_0_1" in log and "NOTE: made by somebody" in log


def test_a_dataset_that_names_modalities_trains_with_gin(make_trainer, monkeypatch) -> None:
    from nnunetv2_ext.trainers.nnUNetTrainerExt import nnUNetTrainerExt

    trainer = make_trainer(nnUNetTrainerExt, "gin=0.5", configuration="2d")
    trainer.initialize()
    older = {key: value for key, value in trainer.dataset_json.items() if key != "channel_names"}
    monkeypatch.setattr(trainer, "dataset_json", older | {"modality": {"0": "MRI"}})
    trainer.on_train_start()
    assert trainer._hint_on_gin() is None
