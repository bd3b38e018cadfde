"""How far the mirrored passes of a prediction agree with their mean: the optional feature ``tta``."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import Tensor

from nnunetv2_ext.estimate.features import masks_of
from nnunetv2_ext.parts.prediction import FoldPredictor


class MirrorPredictor(nnUNetPredictor):  # type: ignore[misc]
    """nnU-Net's predictor, with the same bits, that counts in how far its mirrored passes agree with their mean.

    Counts are summed over tiles, class by class, so that no further volume is held.
    """

    counts: Tensor | None = None  # (passes, structures, 2): twice the intersection, sum of sizes

    def predict_logits_from_preprocessed_data(self, data: Tensor) -> Tensor:
        """As nnU-Net's; counting begins anew."""
        self.counts = None
        return super().predict_logits_from_preprocessed_data(data)  # type: ignore[no-any-return]

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

    def agreement(self) -> list[float]:
        """Of each structure the mean Dice of the last image's passes with their mean; 0: never found."""
        assert self.counts is not None
        both, size = self.counts.double().unbind(-1)
        return [float(value) for value in (both / size.clamp(min=1)).mean(0)]


def open_predictor(model: Path, folds: Sequence[int], checkpoint: str, device: str, tta: bool) -> FoldPredictor:
    """Of any model, cascades' last stages among them; `tta`: count how mirrored passes agree."""
    return FoldPredictor(model, folds, checkpoint, device, True, MirrorPredictor if tta else nnUNetPredictor)


def agreement_of_passes(predictor: FoldPredictor) -> list[float] | None:
    """By structure, of what was predicted last; None where passes are not counted."""
    return predictor.predictor.agreement() if isinstance(predictor.predictor, MirrorPredictor) else None
