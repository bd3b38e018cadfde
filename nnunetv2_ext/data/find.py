"""Finding datasets in nnU-Net's folders, and models: RESULTS/DatasetXXX_name/TRAINER__PLANS__CONFIGURATION/fold_N.

The folders are those that nnU-Net's variables name at the time of the call.
"""

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2_ext.core.files import read_json

RAW, PREPROCESSED, RESULTS = "nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"
_SHOWN = 8  # names in a message
_NEXT = {  # the command that makes a dataset appear in a folder
    RAW: "correct the id or name, or nnUNet_raw",
    PREPROCESSED: "run nnUNetv2_plan_and_preprocess -d {}",
    RESULTS: "train it first with nnUNetv2_train",
}


def nnunet_folder(variable: str) -> Path:
    """The folder that one of nnU-Net's variables names; ValueError if the variable is not set."""
    value = os.environ.get(variable)
    if not value:
        raise ValueError(f"{variable} is not set; export {variable}=FOLDER as for nnUNetv2_train")
    return Path(value)


def find_dataset(dataset: int | str, *variables: str, holding: str = "", instead: str = "") -> Path:
    """The folder of a dataset, by id or name, in the first of nnU-Net's folders that has it.

    Args:
        dataset: ``4``, ``"4"`` or ``"Dataset004_hippocampus"``.
        variables: ``RAW``, ``PREPROCESSED``, ``RESULTS``; if there are several, those that are not set are passed over.
        holding: a file that the folder must hold.
        instead: what the user can do instead, for the error.

    Raises:
        ValueError: no variable is set, or no or several datasets have this id; says which there are.
    """
    there = [nnunet_folder(v) for v in variables] if len(variables) == 1 else _set_folders(variables)
    instead = instead or _NEXT[variables[0]].format(dataset)
    if not there:
        raise ValueError(f"there is no dataset {dataset} in {' and '.join(variables)}, which are not set; {instead}")
    return find_below(there, dataset, instead, holding)


def dataset_if_there(dataset: int | str, *variables: str) -> Path | None:
    """`find_dataset` without an error for what is not there: None.

    Raises:
        ValueError: several datasets have this id.
    """
    there = [root for root in _set_folders(variables) if matching(root, dataset)]
    return find_below(there[:1], dataset, "") if there else None


def find_below(roots: Sequence[Path], dataset: int | str, instead: str, holding: str = "") -> Path:
    """`find_dataset` in folders of one's own, at least one."""
    for root in roots:
        found = [p for p in matching(root, dataset) if not holding or (p / holding).is_file()]
        if len(found) > 1:
            names = ", ".join(p.name for p in found)
            raise ValueError(f"dataset {dataset} is ambiguous in {root}: {names}; give the full name")
        if found:
            return found[0]
    places = " and ".join(f"{root} ({_datasets_in(root)})" for root in roots)
    raise ValueError(f"there is no dataset {dataset} in {places}; {instead}")


def plans_files_in(base: Path) -> list[Path]:
    """All plans of a preprocessed dataset."""
    contents = {file: read_json(file) for file in sorted(base.glob("*.json"))}
    return [file for file, content in contents.items() if isinstance(content, dict) and "plans_name" in content]


def read_plans(base: Path, name: str, remedy: str) -> dict[str, Any]:
    """The plans of this name of a preprocessed dataset.

    Raises:
        ValueError: there are none, or the file is damaged; says which there are, and `remedy`.
    """
    file = base / f"{name}.json"
    if not file.is_file():
        names = ", ".join(plans.stem for plans in plans_files_in(base)) or "none"
        raise ValueError(f"there are no plans {name} in {base} (-p takes {names}): {remedy}")
    plans = read_json(file)
    if not (isinstance(plans, dict) and isinstance(plans.get("configurations"), dict)):
        raise ValueError(f"{file} does not hold nnU-Net's plans (it has no configurations): {remedy}")
    for key in ("transpose_forward", "transpose_backward"):
        if plans.get(key) is not None and sorted(map(str, plans[key])) != ["0", "1", "2"]:
            raise ValueError(f"{file} is damaged ({key} is {plans[key]!r}): {remedy}")
    return plans


def find_dataset_json(dataset: int | str) -> Path:
    """dataset.json of a dataset in nnUNet_preprocessed or nnUNet_raw; ValueError as `find_dataset`."""
    folder = find_dataset(dataset, PREPROCESSED, RAW, holding="dataset.json", instead="give -djfile FILE instead")
    return folder / "dataset.json"


def datasets_of_id(number: int) -> list[str]:
    """Names of all datasets with this id among raw data, preprocessed data and results, sorted."""
    return sorted({p.name for root in _set_folders((RAW, PREPROCESSED, RESULTS)) for p in matching(root, number)})


def _set_folders(variables: Sequence[str]) -> list[Path]:
    return [Path(value) for variable in variables if (value := os.environ.get(variable))]


def matching(root: Path, dataset: int | str) -> list[Path]:
    """Folders of this id (``Dataset004_...``) or name in one of nnU-Net's folders, sorted."""
    name = str(dataset).strip()
    if name.isdecimal():
        prefix = f"Dataset{int(name):03d}"
        return sorted(p for p in root.glob(f"{prefix}*") if p.is_dir() and p.name.partition("_")[0] == prefix)
    exact = root / name
    return [exact] if name.startswith("Dataset") and exact.parent == root and exact.is_dir() else []


def _datasets_in(root: Path) -> str:
    if not root.is_dir():
        return "which does not exist"
    names = sorted(p.name for p in root.glob("Dataset*") if p.is_dir())
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"it has {', '.join(names[:_SHOWN])}{more}" if names else "it has none"


@dataclass(frozen=True)
class Model:
    """A result folder."""

    folder: Path  # TRAINER__PLANS__CONFIGURATION
    trainer: str
    plans: str
    configuration: str

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


def models_of(dataset: Path) -> list[Model]:
    """All models in a dataset's folder of results, by name."""
    return [model for folder in sorted(dataset.glob("*")) if (model := as_model(folder)) is not None]


def find_trainer(root: Path, dataset: int | str, trainer: str, plans: str, configuration: str) -> Model:
    """The model of a trainer in a results folder.

    Raises:
        ValueError: there is none; says which datasets, trainers, plans or configurations there are instead.
    """
    folder = find_below([root], dataset, "train it first, or name another folder with --results")
    there = models_of(folder)
    for option, part, wanted in (
        ("-tr", "trainer", trainer), ("-c", "configuration", configuration), ("-p", "plans", plans)
    ):  # fmt: skip
        names = sorted({getattr(model, part) for model in there})
        there = [model for model in there if getattr(model, part) == wanted]
        if not there:
            near = difflib.get_close_matches(wanted, names, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            what = f"{part} {wanted}" + (f" of {trainer}" if part != "trainer" else "")
            takes = ", ".join(names) or "none, as there is no model"
            raise ValueError(f"there are no results of the {what} in {folder}: {hint}{option} takes {takes}")
    return there[0]


def find_in(folder: Path, dataset: int | str, plans: str, configuration: str) -> tuple[Model, str | None]:
    """The one model that a folder of ``--run`` stands for: a fold, a model or a results folder.

    Returns:
        The model, and the fold if the folder is one.

    Raises:
        ValueError: no such folder, nothing in it, or more than one model that would fit.
    """
    folder = folder.absolute()
    if not folder.is_dir():
        raise ValueError(f"--run: the folder {folder} does not exist")
    fold = folder.name.removeprefix("fold_") if folder.name.startswith("fold_") else None
    model = as_model(folder.parent if fold else folder)
    there = [model] if model else [one for below in matching(folder, dataset) for one in models_of(below)]
    fitting = [one for one in there if (one.plans, one.configuration) == (plans, configuration)]
    if len(fitting) == 1:
        return fitting[0], fold if model else None
    if model is not None:
        raise ValueError(
            f"{model.folder} was trained with plans {model.plans}, {model.configuration}, not {plans}, "
            f"{configuration}: one comparison is about one plan; give -p and -c that fit"
        )
    names = ", ".join(one.folder.name for one in fitting or there) or "none"
    raise ValueError(
        f"--run: {folder} has {'more than one' if fitting else 'no'} model of dataset {dataset} with plans {plans}, "
        f"{configuration} (there: {names}); give the folder TRAINER__PLANS__CONFIGURATION itself, or another -p or -c"
    )


def find_checkpoint(folder: Path, fold: str, checkpoint: str = "checkpoint_final.pth") -> Path:
    """A checkpoint of a model folder that is complete.

    Raises:
        ValueError: not a model folder, or no such fold or checkpoint; says which there are.
    """
    require_model(folder)
    file = folder / f"fold_{fold}" / checkpoint
    if not file.is_file():
        there = sorted(p.relative_to(folder).as_posix() for p in folder.glob("fold_*/checkpoint_*.pth"))
        raise ValueError(
            f"{file} does not exist (there is {', '.join(there) or 'no checkpoint'}): give another -f or -chk"
        )
    return file


def require_model(folder: Path) -> None:
    """Raise ValueError unless a folder has the plans and the dataset.json of a trained model."""
    missing = [name for name in ("plans.json", "dataset.json") if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} is not a trained model ({missing[0]} is missing): give the folder TRAINER__PLANS__CONFIGURATION "
            "below nnUNet_results"
        )
