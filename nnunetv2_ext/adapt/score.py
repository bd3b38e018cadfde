"""Segmenting preprocessed cases with nnU-Net's predictor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot
from torch import Tensor

from nnunetv2_ext.adapt.model import FinishedModel


def read_preprocessed(
    folder: Path, case: str, model: FinishedModel, previous: Path | None = None
) -> tuple[Tensor, np.ndarray, dict[str, Any]]:
    """Network input ``(C, X, Y, Z)``, label ``(X, Y, Z)`` and properties of a preprocessed case.

    Args:
        folder: of the configuration.
        case: in it.
        model: that is to see the case.
        previous: folder of the previous stage's segmentations, which a cascade sees one-hot behind the image.
    """
    dataset = infer_dataset_class(str(folder))(str(folder), [case], None if previous is None else str(previous))
    data, label, stage, properties = dataset.load_case(case)
    image = torch.from_numpy(np.asarray(data[:], dtype=np.float32))
    if stage is not None:
        one_hot = convert_labelmap_to_one_hot(np.asarray(stage[:]), model.labels.foreground_labels, np.float32)
        image = torch.vstack((image, torch.from_numpy(one_hot)))
    return image, np.asarray(label[:])[0], properties


class Segmenter:
    """nnU-Net's prediction of a model, with other weights each time: its tiles, mirroring and way back to the image."""

    def __init__(self, model: FinishedModel, device: torch.device) -> None:
        self.model = model
        self.predictor = nnUNetPredictor(device=device, allow_tqdm=False)
        self.network = model.network().to(device)
        self.predictor.manual_initialization(
            self.network,
            model.plans,
            model.configuration,
            [],
            model.dataset_json,
            model.trainer.__name__,
            model.mirror_axes,
        )

    def segment(self, weights: Mapping[str, Tensor], image: Tensor, properties: dict[str, Any]) -> np.ndarray:
        """Label map ``(X, Y, Z)`` in the image's own grid and array order."""
        self.predictor.list_of_parameters = [dict(weights)]
        logits = self.predictor.predict_logits_from_preprocessed_data(image)
        segmentation = convert_predicted_logits_to_segmentation_with_correct_shape(
            logits,
            self.model.plans,
            self.model.configuration,
            self.model.labels,
            properties,
            num_threads_torch=torch.get_num_threads(),
        )
        return np.asarray(segmentation)
