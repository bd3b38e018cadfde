"""What a trained J-RAS model retrieves for an image of a file, for ``nnUNetv2_ext guides``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunetv2_ext.core.checkpoint import read, unwrap
from nnunetv2_ext.core.labelmaps import logits_to_labels
from nnunetv2_ext.data.case import Volume, read_image, read_label_map, require_same_grid
from nnunetv2_ext.data.find import find_checkpoint
from nnunetv2_ext.jras.network import JRASNetwork
from nnunetv2_ext.jras.panel import GuideView, view_of_patch


def load_model(model_folder: Path, fold: str, checkpoint: str, device: torch.device) -> nnUNetPredictor:
    """nnU-Net's predictor with one fold of a J-RAS model.

    Raises:
        ValueError: no such model or fold, no J-RAS model, or one without guides.
    """
    file = find_checkpoint(model_folder, fold, checkpoint)
    weights = read(file)["network_weights"]
    if "bank.keys" not in weights:
        raise ValueError(f"{file} has no guide bank: it was not trained with J-RAS, or with jras.retriever=none")
    if not len(weights["bank.keys"]):
        raise ValueError(f"the guide bank of {file} is empty: it was stripped; use the model it was exported from")
    predictor = nnUNetPredictor(use_mirroring=False, device=device, verbose=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model_folder), (fold,), checkpoint)
    return predictor


def look_at_image(predictor: nnUNetPredictor, images: Sequence[Path], label: Path | None = None) -> GuideView:
    """Predict an image, and look at the guides of the patch in the middle of what was found.

    Args:
        predictor: from `load_model`.
        images: one file per channel, in the order of the dataset.
        label: the true label, if it is known.

    Raises:
        ValueError: missing, damaged or misfitting files, another number of channels than the model's, or a cascaded
            configuration.
    """
    configuration, plans = predictor.configuration_manager, predictor.plans_manager
    channels = len(predictor.dataset_json.get("channel_names", predictor.dataset_json.get("modality")))
    if len(images) != channels:
        raise ValueError(f"this model takes {channels} channel(s), one file each, not {len(images)}; give all of them")
    if configuration.previous_stage_name is not None:
        raise ValueError(
            f"a cascaded configuration needs the prediction of {configuration.previous_stage_name} first, which this "
            "command does not make; look at the pictures in the fold folder, or at the previous stage's model"
        )
    case, reader = images[0].name, plans.image_reader_writer_class()
    image, properties = read_image(case, images, reader)
    seg = None
    if label is not None:
        seg, of_label = read_label_map(case, label, reader)
        here, there = Volume("label", seg.shape, of_label), Volume("image", image.shape[1:], properties)
        require_same_grid(case, here, there, "give the label of this image")
        seg = seg[None]
    preprocessor = configuration.preprocessor_class(verbose=False)
    image, seg, _ = preprocessor.run_case_npy(image, seg, properties, plans, configuration, predictor.dataset_json)
    data = torch.from_numpy(np.ascontiguousarray(image))
    logits = predictor.predict_sliding_window_return_logits(data).float().cpu()
    corner, patch = middle_patch(logits_to_labels(logits, predictor.label_manager) > 0, configuration.patch_size)
    x = crop(image, corner, patch)
    truth = None if label is None else crop(np.asarray(seg), corner, patch)[0]
    return _look(predictor, x, truth, images[0].name)


def middle_patch(found: np.ndarray, patch_size: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Lowest voxel and shape, in three axes, of the patch around the middle of `found` (Z, Y, X), or of the image.

    A 2-D patch is the slice of axis 0 that holds most.
    """
    flat = len(patch_size) == 2
    patch = (1, *patch_size) if flat else tuple(patch_size)
    places = np.argwhere(found)
    centre = np.array(found.shape) // 2 if not len(places) else places.mean(0).round().astype(int)
    if flat and len(places):
        slices = found.reshape(len(found), -1).sum(1)
        centre[0] = slices.argmax()
        centre[1:] = np.argwhere(found[centre[0]]).mean(0).round().astype(int)
    corner = [
        min(max(0, int(c) - p // 2), n - p) if n > p else -((p - n) // 2) for c, p, n in zip(centre, patch, found.shape)
    ]
    return tuple(corner), patch


def crop(data: np.ndarray, corner: Sequence[int], patch: Sequence[int]) -> np.ndarray:
    """The patch of (C, Z, Y, X), zero outside of the image."""
    result = np.zeros((len(data), *patch), dtype=data.dtype)
    inner = [
        slice(max(0, -c), max(0, -c) + min(c + p, n) - max(0, c)) for c, p, n in zip(corner, patch, data.shape[1:])
    ]
    outer = [slice(max(0, c), min(c + p, n)) for c, p, n in zip(corner, patch, data.shape[1:])]
    here, there = (slice(None), *inner), (slice(None), *outer)
    result[here] = data[there]
    return result


def label_map(truth: np.ndarray, labels: LabelManager) -> np.ndarray:
    """Labels as core/labelmaps.py numbers them: with regions, 1 + index of the last one that contains the voxel."""
    if not labels.has_regions:
        return truth
    result = np.zeros_like(truth)
    for number, region in enumerate(labels.foreground_regions, 1):
        result[np.isin(truth, region)] = number
    return result


@torch.inference_mode()
def _look(predictor: nnUNetPredictor, x: np.ndarray, truth: np.ndarray | None, name: str) -> GuideView:
    network = unwrap(predictor.network)
    assert isinstance(network, JRASNetwork)
    flat = len(predictor.configuration_manager.patch_size) == 2
    patch = torch.from_numpy(x[:, 0] if flat else x)[None].to(predictor.device)
    with torch.autocast("cuda", enabled=predictor.device.type == "cuda"):
        logits = network.eval()(patch)
    if truth is not None:
        truth = label_map(np.maximum(truth[0] if flat else truth, 0), predictor.label_manager)
    return view_of_patch(network, logits, patch, name, predictor.label_manager, truth)
