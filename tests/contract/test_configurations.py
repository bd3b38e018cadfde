"""Every kind of configuration and label: two steps and a prediction, or the refusal that outside.py states."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunetv2_ext.core.settings import PLANS_KEY
from nnunetv2_ext.core.trainer import ExtTrainer
from tests.contract.data import CASCADE, RESENC, cascade, residual, with_model, write_first_stage
from tests.contract.table import Row, over

pytestmark = pytest.mark.usefixtures("no_pictures")
PROPERTIES = ("2d", "3d", "resenc", "regions", "ignore", "cascade")


# fixtures by the data of a row and a property that they do not have
VARIANTS = {
    ("dense", "regions"): "regions",
    ("dense", "ignore"): "ignore",
    ("sparse", "regions"): "regions",
    ("added_channel", "regions"): "added_channel_regions",
    ("added_channel", "ignore"): "added_channel_regions",
}


@pytest.fixture
def made(build: Callable[..., Any], row: Row, request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], Any]:
    """``made(property)``: a trainer of the row that has the property; raises what the trainer's constructor raises."""

    def make(wanted: str) -> Any:
        dataset = request.getfixturevalue(VARIANTS.get((row.facts.data, wanted), row.facts.data))
        options: dict[str, Any] = {"configuration": row.configuration, "dataset": dataset}
        if wanted in ("2d", "3d"):
            options["configuration"] = {"2d": "2d", "3d": "3d_fullres"}[wanted]
        if wanted == "resenc":
            options["plans"] = residual(dataset.plans())
        if wanted == "cascade":
            options |= {"configuration": CASCADE, "plans": cascade(dataset.plans())}
        if options["configuration"] not in (options.get("plans") or dataset.plans())["configurations"]:
            options["plans"] = request.getfixturevalue("dense").plans()  # refused before any data is read
        if dataset.model is not None and wanted in ("3d", "resenc"):
            options["dataset"] = with_model(dataset, tmp_path / "model", options["configuration"], options.get("plans"))
        trainer = build("seed=3", **options)
        if wanted == "cascade":
            write_first_stage(trainer, dataset)
        return trainer

    return make


@pytest.mark.parametrize("wanted", PROPERTIES)
@over()
def test_a_property_trains_and_predicts_or_is_refused_in_the_words_of_outside(row: Row, wanted: str, made) -> None:
    words = row.facts.refuses.get(wanted)  # type: ignore[call-overload]
    if words is not None:
        with pytest.raises((ValueError, NotImplementedError), match=words) as refusal:
            made(wanted).on_train_start()
        assert "\n" not in str(refusal.value)
        return
    trainer = made(wanted)
    trainer.on_train_start()
    before = [parameter.detach().clone() for parameter in trainer.network.parameters()]
    trainer.on_train_epoch_start()
    outputs = [trainer.train_step(next(trainer.dataloader_train)) for _ in range(2)]
    assert all(np.isfinite(value) for output in outputs for value in output.values())
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.network.parameters(), strict=True))
    trainer.on_train_epoch_end(outputs)
    with torch.no_grad():
        trainer.on_validation_epoch_start()
        assert np.isfinite(trainer.validation_step(next(trainer.dataloader_val))["loss"])
    trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    _has(trainer, wanted)
    image = torch.randn(trainer.num_input_channels, *_volume(trainer), generator=torch.Generator().manual_seed(0))
    logits = _predictor(Path(trainer.output_folder_base)).predict_logits_from_preprocessed_data(image)
    assert logits.shape == (trainer.label_manager.num_segmentation_heads, *_volume(trainer))
    assert bool(torch.isfinite(logits).all()) and float(logits.float().std()) > 0


def _has(trainer: Any, wanted: str) -> None:
    """What was asked for is what was trained."""
    labels, dim = trainer.label_manager, len(trainer.configuration_manager.patch_size)
    found = {
        "2d": dim == 2,
        "3d": dim == 3,
        # a trainer may bring its own network instead of the plan's
        "resenc": trainer.configuration_manager.network_arch_class_name.startswith((RESENC, "nnunetv2_ext.")),
        "regions": labels.has_regions,
        "ignore": labels.has_ignore_label,
        "cascade": trainer.is_cascaded and trainer.num_input_channels == 1 + len(labels.foreground_labels),
    }
    assert found[wanted]


def _volume(trainer: Any) -> tuple[int, ...]:
    """One patch, as a volume."""
    patch = tuple(trainer.configuration_manager.patch_size)
    return (1, *patch) if len(patch) == 2 else patch


def _predictor(model: Path) -> nnUNetPredictor:
    predictor = nnUNetPredictor(device=torch.device("cpu"), use_mirroring=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (0,), "checkpoint_final.pth")
    return predictor


# ---- a model folder of another version


@pytest.fixture
def model(row: Row, build: Callable[..., Any]) -> Path:
    """A model folder as the start of a training leaves it."""
    trainer = build("seed=3 num_epochs=1")
    trainer.on_train_start()
    trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    return Path(trainer.output_folder_base)


def _logits(model: Path) -> torch.Tensor:
    predictor = _predictor(model)
    patch = predictor.configuration_manager.patch_size
    volume = (1, *patch) if len(patch) == 2 else tuple(patch)
    channels = len(predictor.dataset_json["channel_names"])
    image = torch.randn(channels, *volume, generator=torch.Generator().manual_seed(0))
    return predictor.predict_logits_from_preprocessed_data(image)


def _rewrite(model: Path, change: Callable[[dict[str, Any]], None]) -> None:
    plans = json.loads((model / "plans.json").read_text())
    change(plans[PLANS_KEY])
    (model / "plans.json").write_text(json.dumps(plans))


@over()
def test_unknown_settings_in_a_model_folder_stop_no_prediction(row: Row, model) -> None:
    expected = _logits(model)

    def change(block: dict[str, Any]) -> None:
        for settings in (block, *(inner for inner in block.values() if isinstance(inner, dict))):
            settings["of_a_later_version"] = [1, {"a": 2}]

    _rewrite(model, change)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert torch.equal(_logits(model), expected)
    said = [warning for warning in caught if "of_a_later_version" in str(warning.message)]
    ours = [c for c in row.cls.__mro__ if issubclass(c, ExtTrainer)]
    reads_the_block = any("build_network_architecture" in vars(c) for c in ours)
    assert len(said) == int(reads_the_block)


@over(lambda row: any("." in key for key in row.facts.smallest))
def test_a_renamed_setting_in_a_model_folder_is_read_by_its_old_name(row: Row, model, monkeypatch) -> None:
    """Each of the smallest settings in turn; some of them decide what the network looks like."""
    expected, plans = _logits(model), (model / "plans.json").read_text()
    for dotted in (key for key in row.facts.smallest if "." in key):
        method, key = dotted.split(".")
        block = row.cls.settings_model().model_fields[method].annotation
        monkeypatch.setattr(block, "RENAMED", {"formerly": dotted})
        _rewrite(model, lambda old: old[method].update(formerly=old[method].pop(key)))  # noqa: B023
        assert torch.equal(_logits(model), expected)
        (model / "plans.json").write_text(plans)
