"""Every kind of configuration and label: two steps and a prediction, or the refusal that outside.py states."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunetv2_ext.core.settings import PLANS_KEY
from tests.contract.data import CASCADE, cascade, residual, write_first_stage
from tests.contract.table import Row, over

pytestmark = pytest.mark.usefixtures("no_pictures")
PROPERTIES = ("2d", "3d", "resenc", "regions", "ignore", "cascade")


@pytest.fixture
def made(build: Callable[..., Any], row: Row, request: pytest.FixtureRequest) -> Callable[[str], Any]:
    """``made(property)``: a trainer of the row that has the property; raises what the trainer's constructor raises."""

    def make(wanted: str) -> Any:
        name = wanted if wanted in ("regions", "ignore") and row.facts.data == "dense" else row.facts.data
        dataset = request.getfixturevalue("regions" if wanted == "regions" else name)
        options: dict[str, Any] = {"configuration": row.configuration, "dataset": dataset}
        if wanted in ("2d", "3d"):
            options["configuration"] = {"2d": "2d", "3d": "3d_fullres"}[wanted]
        if wanted == "resenc":
            options["plans"] = residual(dataset.plans())
        if wanted == "cascade":
            options |= {"configuration": CASCADE, "plans": cascade(dataset.plans())}
        if options["configuration"] not in (options.get("plans") or dataset.plans())["configurations"]:
            options["plans"] = request.getfixturevalue("dense").plans()  # refused before any data is read
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
        "resenc": "ResidualEncoder" in trainer.configuration_manager.network_arch_class_name,
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


READS_SETTINGS = ("nnUNetTrainerJRAS", "nnUNetTrainerMedContextJRAS", "nnUNetTrainerRADA")


@pytest.mark.parametrize("place", ["common", "method"])
@over()
def test_settings_of_another_version_in_a_model_folder_stop_no_prediction(row: Row, place: str, build, request) -> None:
    if place == "method" and row.name in READS_SETTINGS:
        request.applymarker(pytest.mark.xfail(strict=True, reason="unknown keys are errors (issue 11)"))
    trainer = build("seed=3 num_epochs=1")
    trainer.on_train_start()
    trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    model = Path(trainer.output_folder_base)
    image = torch.randn(trainer.num_input_channels, *_volume(trainer), generator=torch.Generator().manual_seed(0))
    expected = _predictor(model).predict_logits_from_preprocessed_data(image)
    plans = json.loads((model / "plans.json").read_text())
    common = plans[PLANS_KEY]
    blocks = [common] if place == "common" else [block for block in common.values() if isinstance(block, dict)]
    if not blocks:
        pytest.skip("no method of it has settings")
    for block in blocks:
        block["of_a_later_version"] = [1, {"a": 2}]
    (model / "plans.json").write_text(json.dumps(plans))
    assert torch.equal(_predictor(model).predict_logits_from_preprocessed_data(image), expected)
