"""nnU-Net's own predictor, one case at a time: logits on the network's grid, and the segmentation it would write."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from nnunetv2.inference.export_prediction import (
    convert_predicted_logits_to_segmentation_with_correct_shape,
)
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import Tensor

from nnunetv2_ext.core.labelmaps import structures_of
from nnunetv2_ext.core.quiet import quiet
from nnunetv2_ext.data.channels import OF_CT

Array = npt.NDArray[Any]


def require_one_stage(configuration: ConfigurationManager, model: Path) -> None:
    """Raise ValueError if a model's configuration is the last stage of a cascade."""
    if configuration.previous_stage_name is not None:
        raise ValueError(
            f"{model} is the last stage of a cascade, which needs the previous stage's segmentations: use the model of "
            "its previous stage, or of 3d_fullres"
        )


class FoldPredictor:
    """The folds of a model folder.

    Args:
        model: ``TRAINER__PLANS__CONFIGURATION``.
        folds: to load; each has its weights.
        checkpoint: file name.
        device: of torch.
        cascade: the caller brings the previous stage's segmentations where the model needs them.
        kind: of predictor.

    Raises:
        ValueError: the model is the last stage of a cascade, and `cascade` is not set.
    """

    def __init__(
        self,
        model: Path,
        folds: Sequence[int | str],
        checkpoint: str,
        device: str,
        cascade: bool = False,
        kind: type[nnUNetPredictor] = nnUNetPredictor,
    ) -> None:
        with quiet():  # nnU-Net's search for the trainer
            self.predictor = kind(
                device=torch.device(device), perform_everything_on_device=device == "cuda", allow_tqdm=False
            )
            self.predictor.initialize_from_trained_model_folder(str(model), tuple(folds), checkpoint)
        self.folds = list(folds)
        self._weights = list(self.predictor.list_of_parameters)
        self.configuration = self.predictor.configuration_manager
        self.plans = self.predictor.plans_manager
        self.labels = self.predictor.label_manager
        self.dataset_json: dict[str, Any] = self.predictor.dataset_json
        if not cascade:
            require_one_stage(self.configuration, model)

    @property
    def is_ct(self) -> bool:
        """Whether all channels are normalised as CT."""
        return set(self.configuration.normalization_schemes) == {OF_CT}

    @property
    def previous_stage(self) -> str | None:
        """Of a cascade, whose segmentations the network sees."""
        name: str | None = self.configuration.previous_stage_name
        return name

    @property
    def has_regions(self) -> bool:
        """Whether the heads are regions, each decided by itself."""
        return bool(self.labels.has_regions)

    @property
    def mirrored(self) -> list[int]:
        """Axes along which predictions are mirrored."""
        return list(self.predictor.allowed_mirroring_axes or ())

    @cached_property
    def structures(self) -> dict[str, int | tuple[int, ...]]:
        """Name to label value, or to the values of a region, in the order of the heads without the background."""
        return structures_of(self.dataset_json, self.labels)

    def logits_of(self, fold: int | str, data: Array) -> Tensor:
        """Of one fold ``(heads, *S)`` on the CPU.

        Args:
            data: ``(C, *S)`` preprocessed.
        """
        self.predictor.list_of_parameters = [self._weights[self.folds.index(fold)]]
        with quiet():
            found: Tensor = self.predictor.predict_logits_from_preprocessed_data(
                torch.from_numpy(np.asarray(data, dtype=np.float32))
            )
        return found

    def logits(self, data: Array) -> Iterator[Tensor]:
        """Of each fold, as `logits_of` gives them."""
        return (self.logits_of(fold, data) for fold in self.folds)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Softmax or sigmoid, ``(heads, *S)``."""
        found: Tensor = self.labels.apply_inference_nonlin(logits)
        return found

    def preprocess(self, files: Sequence[Path], previous: Path | None = None) -> tuple[Array, dict[str, Any]]:
        """As ``nnUNetv2_predict`` does; `previous`: segmentation of the previous stage. Raises what nnU-Net raises."""
        preprocessor = self.configuration.preprocessor_class(verbose=False)
        names = [str(file) for file in files]
        data, stage, properties = preprocessor.run_case(
            names, None if previous is None else str(previous), self.plans, self.configuration, self.dataset_json
        )
        return self.with_stage(np.asarray(data, dtype=np.float32), None if previous is None else stage[0]), properties

    def label_on_grid(self, files: Sequence[Path], label: Path) -> Array:
        """A label map ``(*S)`` on the grid of the preprocessed image; -1 outside of the body."""
        preprocessor = self.configuration.preprocessor_class(verbose=False)
        names = [str(file) for file in files]
        return np.asarray(
            preprocessor.run_case(names, str(label), self.plans, self.configuration, self.dataset_json)[1][0]
        )

    def with_stage(self, image: Array, stage: Array | None) -> Array:
        """The image with the previous stage's segmentation ``(*S)`` behind its channels, one-hot."""
        if stage is None:
            return image
        return np.vstack((image, convert_labelmap_to_one_hot(stage, self.labels.foreground_labels, image.dtype)))

    def segmentation(self, logits: Tensor, properties: dict[str, Any]) -> Array:
        """On the image's grid, as nnU-Net writes it."""
        return np.asarray(self._converted(logits, properties, False))

    def on_image(self, logits: Tensor, properties: dict[str, Any]) -> tuple[Array, Array]:
        """Segmentation and probabilities ``(heads, X, Y, Z)`` on the image's grid, as ``--save_probabilities``."""
        segmentation, probabilities = self._converted(logits, properties, True)
        return np.asarray(segmentation), np.asarray(probabilities)

    def _converted(self, logits: Tensor, properties: dict[str, Any], both: bool) -> Any:
        return convert_predicted_logits_to_segmentation_with_correct_shape(
            logits, self.plans, self.configuration, self.labels, properties, both, num_threads_torch=1
        )

    def reader(self) -> Any:
        """nnU-Net's of images and label maps."""
        return self.plans.image_reader_writer_class()
