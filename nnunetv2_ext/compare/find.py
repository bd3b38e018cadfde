"""Finding nnU-Net's result folders: ROOT/DatasetXXX_name/TRAINER__PLANS__CONFIGURATION/fold_N."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunetv2_ext.evaluate.datasets import find_dataset_json


@dataclass(frozen=True)
class Model:
    """A result folder.

    Attributes:
        folder: ``TRAINER__PLANS__CONFIGURATION``.
        trainer, plans, configuration: the parts of its name.
        root: the results folder that holds the dataset's folder.
    """

    folder: Path
    trainer: str
    plans: str
    configuration: str

    @property
    def root(self) -> Path:
        """The results folder (``nnUNet_results`` of that training)."""
        return self.folder.parent.parent

    @property
    def dataset(self) -> str:
        """The dataset's folder name."""
        return self.folder.parent.name

    def folds(self) -> list[str]:
        """``0``, ``1``, ..., ``all``: those with a folder."""
        names = (p.name.removeprefix("fold_") for p in self.folder.glob("fold_*") if p.is_dir())
        return sorted(names, key=lambda f: (not f.isdigit(), int(f) if f.isdigit() else 0))


def as_model(folder: Path) -> Model | None:
    """The model in a folder if its name is of nnU-Net's form, else None."""
    parts = folder.name.split("__")
    return Model(folder, *parts) if len(parts) == 3 and folder.is_dir() else None


def models_of(root: Path, dataset: str) -> list[Model]:
    """All models of a dataset in a results folder, by name."""
    folders = sorted((root / dataset).glob("*")) if (root / dataset).is_dir() else []
    return [model for folder in folders if (model := as_model(folder)) is not None]


def find_trainer(root: Path, dataset: str, trainer: str, plans: str, configuration: str) -> Model:
    """The model of a trainer in a results folder.

    Raises:
        ValueError: there is none; says which trainers, plans or configurations there are instead.
    """
    there = models_of(root, dataset)
    if not there:
        found = ", ".join(sorted(p.name for p in root.glob("Dataset*"))) or "no results at all"
        raise ValueError(f"{root} has no results of {dataset} (it has {found}); --results names another folder")
    same = [m for m in there if m.trainer == trainer]
    if not same:
        names = sorted({m.trainer for m in there})
        near = difflib.get_close_matches(trainer, names, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"there are no results of {trainer} in {root / dataset}: {hint}It has {', '.join(names)}")
    fitting = [m for m in same if m.configuration == configuration]
    if not fitting:
        names = sorted({m.configuration for m in same})
        raise ValueError(
            f"{trainer} has no results of {configuration} in {root / dataset}; -c takes {', '.join(names)}"
        )
    for model in fitting:
        if model.plans == plans:
            return model
    names = sorted({m.plans for m in fitting})
    raise ValueError(
        f"{trainer} has no {configuration} results with the plans {plans} in {root / dataset}; "
        f"-p takes {', '.join(names)}"
    )


def find_in(folder: Path, dataset: str | None, plans: str, configuration: str) -> tuple[Model, str | None]:
    """The one model that a folder of ``--run`` stands for: a fold, a model or a results folder.

    Returns:
        The model, and the fold if the folder is one.

    Raises:
        ValueError: no such folder, nothing in it, or more than one model that would fit.
    """
    folder = folder.absolute()
    if not folder.is_dir():
        raise ValueError(f"--run: the folder {folder} does not exist")
    for candidate, fold in ((folder, None), (folder.parent, folder.name.removeprefix("fold_"))):
        model = as_model(candidate)
        if model is not None and (fold is None or folder.name.startswith("fold_")):
            return _require_fitting(model, plans, configuration), fold
    datasets = [dataset] if dataset else sorted(p.name for p in folder.glob("Dataset*"))
    there = [model for name in datasets for model in models_of(folder, name)]
    fitting = [m for m in there if (m.plans, m.configuration) == (plans, configuration)]
    if len(fitting) == 1:
        return fitting[0], None
    names = ", ".join(m.folder.name for m in fitting or there) or "none"
    cause = "more than one model of" if fitting else "no model of"
    raise ValueError(
        f"--run: {folder} has {cause} {dataset or 'a dataset'} with plans {plans}, {configuration} (there: {names}); "
        "give the folder TRAINER__PLANS__CONFIGURATION itself, or another -p or -c"
    )


def _require_fitting(model: Model, plans: str, configuration: str) -> Model:
    if (model.plans, model.configuration) != (plans, configuration):
        raise ValueError(
            f"{model.folder} was trained with plans {model.plans}, {model.configuration}, not {plans}, "
            f"{configuration}: one comparison is about one plan; give -p and -c that fit"
        )
    return model


def dataset_name(name_or_id: str, roots: Sequence[Path]) -> str:
    """``4`` to ``Dataset004_x``, from nnUNet_preprocessed, nnUNet_raw or the results.

    Raises:
        ValueError: nowhere there.
    """
    try:
        return find_dataset_json(name_or_id).parent.name
    except ValueError:
        pattern = f"Dataset{int(name_or_id):03d}_*" if name_or_id.isdigit() else name_or_id
        found = sorted({p.name for root in roots for p in root.glob(pattern) if p.is_dir()})
        if len(found) == 1:
            return found[0]
        raise
