"""What is benchmarked: dataset, configuration, plans, fold and device, checked before anything is built."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nnunetv2_ext.core.devices import check_device
from nnunetv2_ext.core.files import read_json
from nnunetv2_ext.data.find import PREPROCESSED, nnunet_folder
from nnunetv2_ext.data.preprocessed import open_preprocessed


@dataclass(frozen=True)
class Target:
    """Where the trainers run.

    Attributes:
        dataset: folder name, ``Dataset004_hippocampus``.
        configuration: ``3d_fullres``.
        plans_name: the plans file without ``.json``.
        fold: a number, or ``all``.
        device: ``cpu``, ``cuda`` or ``mps``.
        threads: of torch on the CPU; None leaves torch's own choice.
    """

    dataset: str
    configuration: str
    plans_name: str = "nnUNetPlans"
    fold: int | str = 0
    device: str = "cpu"
    threads: int | None = None

    @property
    def folder(self) -> Path:
        """The preprocessed dataset's folder."""
        return nnunet_folder(PREPROCESSED) / self.dataset

    def plans(self) -> dict[str, Any]:
        """A fresh copy of the plans; trainers change theirs."""
        return read_json(self.folder / f"{self.plans_name}.json")

    def dataset_json(self) -> dict[str, Any]:
        """A fresh copy of dataset.json."""
        return read_json(self.folder / "dataset.json")


def check(target: Target) -> None:
    """Raise ValueError, one line, if plans, configuration, preprocessed data or device are missing."""
    open_preprocessed(target.dataset, target.configuration, target.plans_name)
    check_device(target.device)


def default_device() -> str:
    """``cuda`` if there is one, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"
