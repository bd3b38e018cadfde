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
    export_prediction_from_logits,
)
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
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
        folds: to load, numbers or ``all``; each has its weights.
        checkpoint: file name.
        device: of torch.

    Raises:
        ValueError: the model is the last stage of a cascade.
    """

    def __init__(self, model: Path, folds: Sequence[int | str], checkpoint: str, device: str) -> None:
        with quiet():  # nnU-Net's search for the trainer
            self.predictor = nnUNetPredictor(
                device=torch.device(device), perform_everything_on_device=device == "cuda", allow_tqdm=False
            )
            self.predictor.initialize_from_trained_model_folder(str(model), tuple(folds), checkpoint)
        self.folds = list(folds)
        self._weights = list(self.predictor.list_of_parameters)
        require_one_stage(self.predictor.configuration_manager, model)

    @property
    def is_ct(self) -> bool:
        """Whether all channels are normalised as CT."""
        return set(self.predictor.configuration_manager.normalization_schemes) == {OF_CT}

    @cached_property
    def structures(self) -> dict[str, int | tuple[int, ...]]:
        """Name to label value, or to the values of a region, in the order of the heads without the background."""
        return structures_of(self.predictor.dataset_json, self.predictor.label_manager)

    def logits(self, data: Array) -> Iterator[Tensor]:
        """Of each fold ``(heads, *S)`` on the CPU.

        Args:
            data: ``(C, *S)`` preprocessed.
        """
        tensor = torch.from_numpy(np.asarray(data, dtype=np.float32))
        for weights in self._weights:
            self.predictor.list_of_parameters = [weights]
            with quiet():
                yield self.predictor.predict_logits_from_preprocessed_data(tensor)

    def probabilities(self, logits: Tensor) -> Array:
        """Softmax or sigmoid, ``(heads, *S)``."""
        return np.asarray(self.predictor.label_manager.apply_inference_nonlin(logits))

    @property
    def has_regions(self) -> bool:
        return bool(self.predictor.label_manager.has_regions)

    def preprocess(self, files: Sequence[Path]) -> tuple[Array, dict[str, Any]]:
        """As ``nnUNetv2_predict`` does; raises what nnU-Net raises."""
        p = self.predictor
        preprocessor = p.configuration_manager.preprocessor_class(verbose=False)
        names = [str(file) for file in files]
        data, _, properties = preprocessor.run_case(
            names, None, p.plans_manager, p.configuration_manager, p.dataset_json
        )
        return data, properties

    def segmentation(self, logits: Tensor, properties: dict[str, Any]) -> Array:
        """On the image's grid, as nnU-Net writes it."""
        p = self.predictor
        found = convert_predicted_logits_to_segmentation_with_correct_shape(
            logits, p.plans_manager, p.configuration_manager, p.label_manager, properties, num_threads_torch=1
        )
        return np.asarray(found)

    def on_image(self, logits: Tensor, properties: dict[str, Any]) -> tuple[Array, Array]:
        """Segmentation and probabilities ``(heads, X, Y, Z)`` on the image's grid, as ``--save_probabilities``."""
        p = self.predictor
        segmentation, probabilities = convert_predicted_logits_to_segmentation_with_correct_shape(
            logits,
            p.plans_manager,
            p.configuration_manager,
            p.label_manager,
            properties,
            return_probabilities=True,
            num_threads_torch=1,
        )
        return np.asarray(segmentation), np.asarray(probabilities)

    def write(self, logits: Tensor, properties: dict[str, Any], target: Path) -> None:
        """nnU-Net's file of the segmentation; ``target`` without its ending."""
        p = self.predictor
        export_prediction_from_logits(
            logits, properties, p.configuration_manager, p.plans_manager, p.dataset_json, str(target)
        )
