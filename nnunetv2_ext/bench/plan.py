"""What is benchmarked: dataset, configuration, plans, fold and device, checked before anything is built."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nnunetv2_ext.core.devices import check_device
from nnunetv2_ext.core.files import read_json


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
        return preprocessed_folder() / self.dataset

    def plans(self) -> dict[str, Any]:
        """A fresh copy of the plans; trainers change theirs."""
        return read_json(self.folder / f"{self.plans_name}.json")

    def dataset_json(self) -> dict[str, Any]:
        """A fresh copy of dataset.json."""
        return read_json(self.folder / "dataset.json")


def preprocessed_folder() -> Path:
    """The folder in nnUNet_preprocessed; ValueError if the variable is not set."""
    value = os.environ.get("nnUNet_preprocessed")
    if not value:
        raise ValueError("nnUNet_preprocessed is not set; export it as for nnUNetv2_train")
    return Path(value)


def find_dataset(name_or_id: str) -> str:
    """``4`` or ``Dataset004_hippocampus`` -> the folder's name in nnUNet_preprocessed.

    Raises:
        ValueError: not there, or several folders of that id.
    """
    base = preprocessed_folder()
    prefix = f"Dataset{int(name_or_id):03d}_" if name_or_id.isdigit() else name_or_id
    found = sorted(p.name for p in base.glob("Dataset*") if p.is_dir())
    matching = [name for name in found if (name.startswith(prefix) if name_or_id.isdigit() else name == prefix)]
    if len(matching) == 1:
        return matching[0]
    if matching:
        raise ValueError(f"dataset {name_or_id} is ambiguous in {base}: {', '.join(matching)}; give the full name")
    raise ValueError(
        f"there is no dataset {name_or_id} in {base} (it has {', '.join(found) or 'none'}); "
        f"run nnUNetv2_plan_and_preprocess -d {name_or_id}"
    )


def check(target: Target) -> None:
    """Raise ValueError, one line, if plans, configuration, preprocessed data or device are missing."""
    if not (target.folder / f"{target.plans_name}.json").is_file():
        names = sorted(p.stem for p in target.folder.glob("*.json"))
        names = [n for n in names if n not in ("dataset", "dataset_fingerprint", "splits_final")]
        raise ValueError(
            f"there are no plans {target.plans_name!r} in {target.folder}; -p takes one of {', '.join(names) or 'none'}"
        )
    configurations = target.plans()["configurations"]
    if target.configuration not in configurations:
        raise ValueError(
            f"plans {target.plans_name} have no configuration {target.configuration!r}; "
            f"-c takes one of {', '.join(configurations)}"
        )
    check_device(target.device)


def default_device() -> str:
    """``cuda`` if there is one, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"
