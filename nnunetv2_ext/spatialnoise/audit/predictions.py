"""Where an audit's predictions come from: the folds of a model, or probabilities that nnU-Net saved."""

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_ext.core.files import read_json
from nnunetv2_ext.data.find import as_model, find_checkpoint
from nnunetv2_ext.data.preprocessed import file_stamp, open_preprocessed
from nnunetv2_ext.data.split import read_split
from nnunetv2_ext.parts.prediction import FoldPredictor

Array = npt.NDArray[Any]


class Predictions(Protocol):
    """Of the cases of one dataset.

    Attributes:
        dataset: the name of its folder.
        dataset_json, plans: of the model.
        cases: those with a prediction, in the order in which they are cheap to ask for.
        seen: cases that every model has trained on.
        key: whose predictions they are; JSON.
        title: of the model, for people.
    """

    dataset: str
    dataset_json: dict[str, Any]
    plans: PlansManager
    cases: list[str]
    seen: list[str]
    key: dict[str, Any]
    title: str

    def stamp(self, case: str) -> list[int]:
        """Of the file that decides the case's prediction: of its checkpoint, or of the probabilities."""
        ...

    def predict(self, case: str) -> tuple[Array, Array]:
        """Segmentation ``(X, Y, Z)`` and probabilities ``(heads, X, Y, Z)`` on the image's grid."""
        ...


class OfFolds:
    """Each case by a fold that has not trained on it, the one that validates on it first.

    Args:
        folder: ``TRAINER__PLANS__CONFIGURATION``.
        folds: default: all that are finished.
        checkpoint: file name.
        device: of torch.

    Raises:
        ValueError: no finished fold but ``all``, a cascade, no split, a fold that the split lacks, or every case is
            known to all.
    """

    def __init__(self, folder: Path, folds: Sequence[str] | None, checkpoint: str, device: str) -> None:
        model = as_model(folder.resolve())
        if model is None:
            raise ValueError(f"{folder} is not a model folder named TRAINER__PLANS__CONFIGURATION")
        there = [f for f in model.folds() if (model.folder / f"fold_{f}" / checkpoint).is_file()]
        wanted = list(dict.fromkeys(folds or [f for f in there if f != "all"]))
        if not wanted or "all" in wanted:
            named = "" if wanted else f"{model.folder} has no numbered fold with {checkpoint}: "
            raise ValueError(
                f"{named}fold all has trained on every case, and who has learnt a label does not find its errors; "
                "train the folds 0 to 4, or give others with -f or -chk"
            )
        self._folder, self._checkpoint, self._device = model.folder, checkpoint, device
        files = {fold: find_checkpoint(model.folder, fold, checkpoint) for fold in wanted}
        self.dataset, self.title = model.dataset, f"{model.folder.name}, folds {', '.join(wanted)}"
        self.dataset_json = read_json(model.folder / "dataset.json")
        plans = read_json(model.folder / "plans.json")
        self.plans = PlansManager(plans)
        if self.plans.get_configuration(model.configuration).previous_stage_name is not None:
            raise ValueError(
                f"{model.folder} is the last stage of a cascade, which needs the previous stage's segmentations: "
                "validate its folds with nnUNetv2_train ... --val --npz, and give the folders fold_*/validation"
            )
        self._data = open_preprocessed(model.dataset, model.configuration, str(plans["plans_name"]))
        if not self._data.splits_file.is_file():
            raise ValueError(
                f"{self._data.splits_file} is missing: without the split nobody knows which cases a fold has not seen; "
                "restore the file that the folds were trained with"
            )
        split = read_split(self._data.splits_file)
        if unknown := [fold for fold in wanted if int(fold) >= len(split)]:
            raise ValueError(
                f"{self._data.splits_file} has {len(split)} folds, and the model has fold {unknown[0]}: restore the "
                "split that the folds were trained with"
            )
        self._fold = {
            case: fold
            for part in ("unseen", "val")  # a fold that validates on a case is preferred
            for fold in reversed(wanted)
            for case in (split[int(fold)]["val"] if part == "val" else self._data.cases)
            if case not in split[int(fold)]["train"]
        }
        self.cases = sorted(self._fold, key=lambda case: (int(self._fold[case]), case))
        self.seen = sorted(set(self._data.cases) - set(self._fold))
        if not self.cases:
            raise ValueError(f"every case of {model.dataset} was trained on by every fold: train further folds")
        self.key = {"model": model.folder.name, "checkpoint": checkpoint}
        self._stamps = {fold: [int(fold), *file_stamp(file)] for fold, file in files.items()}
        self._loaded: tuple[str, FoldPredictor] | None = None

    def stamp(self, case: str) -> list[int]:
        """Of the checkpoint of the case's fold."""
        return self._stamps[self._fold[case]]

    def predict(self, case: str) -> tuple[Array, Array]:
        """By the fold of the case."""
        fold = self._fold[case]
        if self._loaded is None or self._loaded[0] != fold:
            self._loaded = (
                fold,
                FoldPredictor(self._folder, [int(fold)], self._checkpoint, self._device),
            )
        image, _, properties = self._data.read_case(case)
        data = np.asarray(image[:], dtype=np.float32)
        if not np.isfinite(data).all():
            raise ValueError(f"case {case}: its preprocessed image holds NaN or infinite values: preprocess it again")
        predictor = self._loaded[1]
        return predictor.on_image(next(predictor.logits(data)), properties)


class SavedProbabilities:
    """Files CASE.npz of ``nnUNetv2_predict --save_probabilities`` or ``nnUNetv2_train ... --npz``.

    Args:
        folders: with the files; plans.json and dataset.json lie beside them, or with the model of a validation folder.

    Raises:
        ValueError: no such files, a case in two folders, or no plans.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self._files: dict[str, Path] = {}
        for folder in folders:
            files = sorted(folder.glob("*.npz")) if folder.is_dir() else []
            if not files:
                raise ValueError(
                    f"{folder} is neither a model folder nor one with saved probabilities (CASE.npz): predict with "
                    "--save_probabilities, or validate with nnUNetv2_train ... --val --npz"
                )
            for file in files:
                if file.stem in self._files:
                    raise ValueError(
                        f"case {file.stem} is in {self._files[file.stem].parent} and in {folder}: give one"
                    )
                self._files[file.stem] = file
        content = {name: read_json(_beside(folders[0], name)) for name in ("plans.json", "dataset.json")}
        self.plans, self.dataset_json = PlansManager(content["plans.json"]), content["dataset.json"]
        self.dataset = str(content["plans.json"]["dataset_name"])
        self.title = "saved probabilities; whoever saved them knows whether their models had seen the cases"
        self.cases, self.seen = sorted(self._files), list[str]()
        self.key = {"model": "saved probabilities"}

    def stamp(self, case: str) -> list[int]:
        """Of the case's file."""
        return file_stamp(self._files[case])

    def predict(self, case: str) -> tuple[Array, Array]:
        """Read it."""
        file = self._files[case]
        labels = self.plans.get_label_manager(self.dataset_json)
        try:
            with np.load(file) as content:
                probabilities = np.asarray(content["probabilities"], dtype=np.float32)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"case {case}: {file} does not hold nnU-Net's probabilities ({error}): save it again"
            ) from error
        if probabilities.ndim != 4 or len(probabilities) != labels.num_segmentation_heads:
            raise ValueError(
                f"case {case}: {file} has shape {probabilities.shape}, and the plans have "
                f"{labels.num_segmentation_heads} classes: give the predictions of this model"
            )
        return np.asarray(labels.convert_probabilities_to_segmentation(probabilities)), probabilities


def open_predictions(sources: Sequence[Path], folds: Sequence[str] | None, checkpoint: str, device: str) -> Predictions:
    """Of the folds of a model folder, or of folders with saved probabilities. Raises ValueError as both do."""
    if len(sources) == 1 and not any(sources[0].glob("*.npz")):
        if as_model(sources[0].resolve()) is None:
            return SavedProbabilities(sources)  # which says what is missing
        return OfFolds(sources[0], folds, checkpoint, device)
    return SavedProbabilities(sources)


def _beside(folder: Path, name: str) -> Path:
    places: Mapping[str, Path] = {"here": folder / name, "model": folder.resolve().parents[1] / name}
    for file in places.values():
        if file.is_file():
            return file
    raise ValueError(f"{places['here']} is missing: copy it from the model that made the predictions")
