"""nnU-Net's own predictor, one case at a time: logits on the network's grid, and the segmentation it would write."""

import itertools
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot
from torch import Tensor

from nnunetv2_ext.core.labelmaps import foreground_names
from nnunetv2_ext.core.quiet import quiet
from nnunetv2_ext.data.channels import OF_CT
from nnunetv2_ext.estimate.features import masks_of

Array = npt.NDArray[Any]


class MirrorPredictor(nnUNetPredictor):  # type: ignore[misc]
    """nnU-Net's predictor, with the same bits, that counts in how far its mirrored passes agree with their mean.

    Counts are summed over tiles, class by class, so that no further volume is held.
    """

    counts: Tensor | None = None  # (passes, structures, 2): twice the intersection, sum of sizes

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def _internal_maybe_mirror_and_predict(self, x: Tensor) -> Tensor:
        axes = [axis + 2 for axis in (self.allowed_mirroring_axes or ()) if self.use_mirroring]
        prediction = self.network(x)
        passes = [self._masks(prediction)]
        for n in range(1, len(axes) + 1):
            for flipped in itertools.combinations(axes, n):
                one = torch.flip(self.network(torch.flip(x, flipped)), flipped)
                passes.append(self._masks(one))
                prediction += one
        if axes:
            prediction /= len(passes)
        mean = self._masks(prediction)
        dimensions = tuple(range(1, mean.ndim))
        counts = [[2 * (p & mean).sum(dimensions), p.sum(dimensions) + mean.sum(dimensions)] for p in passes]
        found = torch.stack([torch.stack(pair, -1) for pair in counts])
        self.counts = found if self.counts is None else self.counts + found
        return prediction  # type: ignore[no-any-return]

    def _masks(self, logits: Tensor) -> Tensor:
        regions = self.label_manager.has_regions
        return masks_of(logits[0].sigmoid() if regions else logits[0], regions)

    def take_agreement(self) -> list[float]:
        """Of each structure the mean Dice of the passes with their mean since the last call; 0: never found."""
        assert self.counts is not None
        both, size = self.counts.double().unbind(-1)
        self.counts = None
        return [float(value) for value in (both / size.clamp(min=1)).mean(0)]


class FoldPredictor:
    """The folds of a model folder.

    Args:
        model: ``TRAINER__PLANS__CONFIGURATION``.
        folds: to load; each has its weights.
        checkpoint: file name.
        device: of torch.
        tta: count how mirrored passes agree.
    """

    def __init__(self, model: Path, folds: Sequence[int], checkpoint: str, device: str, tta: bool = False) -> None:
        with quiet():  # nnU-Net's search for the trainer
            self.predictor = (MirrorPredictor if tta else nnUNetPredictor)(
                device=torch.device(device), perform_everything_on_device=device == "cuda", allow_tqdm=False
            )
            self.predictor.initialize_from_trained_model_folder(str(model), tuple(folds), checkpoint)
        self.folds = list(folds)
        self._weights = list(self.predictor.list_of_parameters)
        self.configuration = self.predictor.configuration_manager
        self.plans = self.predictor.plans_manager
        self.labels = self.predictor.label_manager
        self.dataset_json: dict[str, Any] = self.predictor.dataset_json

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
        return bool(self.labels.has_regions)

    @property
    def mirrored(self) -> list[int]:
        """Axes along which predictions are mirrored."""
        return list(self.predictor.allowed_mirroring_axes or ())

    @cached_property
    def structures(self) -> dict[str, int | tuple[int, ...]]:
        """Name to label value, or to the values of a region, in the order of the heads without the background."""
        values = self.labels.foreground_regions if self.has_regions else self.labels.foreground_labels
        return dict(zip(foreground_names(self.dataset_json, self.labels), values, strict=True))

    def logits(self, data: Array, fold: int) -> tuple[Tensor, list[float] | None]:
        """Of a fold ``(heads, *S)`` on the CPU, and the agreement of its mirrored passes by structure if asked for.

        Args:
            data: ``(C, *S)`` preprocessed.
        """
        self.predictor.list_of_parameters = [self._weights[self.folds.index(fold)]]
        with quiet():
            found = self.predictor.predict_logits_from_preprocessed_data(torch.from_numpy(data))
        return found, self.predictor.take_agreement() if isinstance(self.predictor, MirrorPredictor) else None

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

    def with_stage(self, image: Array, stage: Array | None) -> Array:
        """The image with the previous stage's segmentation ``(*S)`` behind its channels, one-hot."""
        if stage is None:
            return image
        return np.vstack((image, convert_labelmap_to_one_hot(stage, self.labels.foreground_labels, image.dtype)))

    def segmentation(self, logits: Tensor, properties: dict[str, Any]) -> Array:
        """On the image's grid, as nnU-Net writes it."""
        found = convert_predicted_logits_to_segmentation_with_correct_shape(
            logits, self.plans, self.configuration, self.labels, properties, num_threads_torch=1
        )
        return np.asarray(found)

    def reader(self) -> Any:
        """nnU-Net's of images and label maps."""
        return self.plans.image_reader_writer_class()
