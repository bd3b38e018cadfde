"""Result folders as nnU-Net leaves them, written in milliseconds: label maps, summary.json, logs; no training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import yaml

LABELS = {"background": 0, "a": 1, "b": 2}
CASES = {"0": ["c0", "c1", "c2", "c3"], "1": ["d0", "d1", "d2"]}


def truth_of(case: str) -> np.ndarray:
    """(Z, Y, X): a box of a and one of b; case c3 has no b."""
    label = np.zeros((10, 16, 16), dtype=np.uint8)
    label[2:8, 3:9, 3:9] = 1
    if case != "c3":
        label[2:8, 11:14, 11:14] = 2
    return label


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((1.0, 1.0, 2.0))
    sitk.WriteImage(image, str(path))


def dice(prediction: np.ndarray, truth: np.ndarray, value: int) -> float:
    p, t = prediction == value, truth == value
    return float(2 * (p & t).sum() / (p.sum() + t.sum())) if p.any() or t.any() else float("nan")


@dataclass
class World:
    """nnU-Net's folders for dataset 5 with truth, images and a split; ``train`` adds finished folds."""

    root: Path

    @property
    def name(self) -> str:
        return "Dataset005_x"

    @property
    def truth(self) -> Path:
        return self.root / "preprocessed" / self.name / "gt_segmentations"

    def prepare(self) -> None:
        for case in (c for cases in CASES.values() for c in cases):
            save(self.truth / f"{case}.nii.gz", truth_of(case))
            noise = np.random.default_rng(len(case)).standard_normal((10, 16, 16)).astype(np.float32)
            save(self.root / "raw" / self.name / "imagesTr" / f"{case}_0000.nii.gz", noise + truth_of(case))
        split = [{"train": [], "val": cases} for cases in CASES.values()]
        (self.truth.parent / "splits_final.json").write_text(json.dumps(split))
        (self.truth.parent / "dataset.json").write_text(self.dataset_json())

    @staticmethod
    def dataset_json(labels: Mapping[str, Any] = LABELS) -> str:
        return json.dumps({"labels": labels, "file_ending": ".nii.gz"})

    def model(self, trainer: str, results: str = "results", plans: str = "nnUNetPlans") -> Path:
        return self.root / results / self.name / f"{trainer}__{plans}__3d_fullres"

    def train(
        self,
        trainer: str,
        shifts: Mapping[str, int] | int = 0,
        *,
        folds: Sequence[str] = ("0",),
        results: str = "results",
        plans: str = "nnUNetPlans",
        settings: Mapping[str, Any] | None = None,
        missed: Sequence[str] = (),
        labels: Mapping[str, Any] = LABELS,
    ) -> Path:
        """Write folds whose predictions are the truth moved by ``shifts`` voxels; cases in ``missed`` have no b."""
        model = self.model(trainer, results, plans)
        for fold in folds:
            folder = model / f"fold_{fold}"
            rows = []
            for case in CASES[fold]:
                truth = truth_of(case)
                moved = np.roll(truth, shifts if isinstance(shifts, int) else shifts.get(case, 0), axis=2)
                if case in missed:
                    moved[moved == 2] = 0
                save(folder / "validation" / f"{case}.nii.gz", moved)
                metrics = {str(v): {"Dice": dice(moved, truth, v)} for v in (1, 2)}
                file = str(folder / "validation" / f"{case}.nii.gz")
                rows.append({"prediction_file": file, "reference_file": "", "metrics": metrics})
            (folder / "validation" / "summary.json").write_text(json.dumps({"metric_per_case": rows}))
            (folder / "checkpoint_final.pth").touch()
            (folder / "debug.json").write_text(json.dumps({"num_epochs": "2", "num_iterations_per_epoch": "5"}))
            if settings is None:
                (folder / "training_log_2026_1_1_00_00_00.txt").write_text(LOG)
            else:
                (folder / "nnunetv2_ext_settings.yaml").write_text("# header\n" + yaml.safe_dump(dict(settings)))
                (folder / "epochs.csv").write_text(EPOCHS)
        (model / "dataset.json").write_text(self.dataset_json(labels))
        return model


LOG = """
2026-01-01 10:00:00.000001: Epoch 0
2026-01-01 10:00:09.000001: train_loss -0.1
2026-01-01 10:00:09.000001: val_loss -0.2
2026-01-01 10:00:09.000001: Pseudo dice [np.float32(0.5), np.float32(nan), np.float64(0.7)]
2026-01-01 10:00:09.000001: Epoch time: 9.0 s
2026-01-01 10:00:09.000001: Yayy! New best EMA pseudo Dice: 0.6
2026-01-01 10:00:10.000001:
2026-01-01 10:00:10.000001: Epoch 1
2026-01-01 10:00:20.000001: val_loss -3e-1
2026-01-01 10:00:20.000001: Pseudo dice [0.8, 0.6]
2026-01-01 10:00:20.000001: Epoch time: 9.0 s
2026-01-01 10:00:21.000001: Training done.
"""
EPOCHS = "epoch,train_losses,val_losses,mean_fg_dice,epoch_seconds\n0,-0.1,-0.3,0.4,18\n1,-0.2,,0.9,18\n"


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """Prepared, with nnU-Net's variables set to it."""
    result = World(tmp_path)
    result.prepare()
    for variable in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{variable}", str(tmp_path / variable))
    monkeypatch.chdir(tmp_path)
    return result
