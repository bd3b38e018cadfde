"""What a trained J-RAS model reads of its guides for an image of a file, for ``nnUNetv2_ext guides``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunetv2_ext.core.checkpoint import EXTENSION_KEY, read, unwrap
from nnunetv2_ext.core.labelmaps import logits_to_labels, target_to_labels
from nnunetv2_ext.core.orientation import directions_of
from nnunetv2_ext.core.quiet import quiet
from nnunetv2_ext.data.channels import channel_names
from nnunetv2_ext.data.find import find_checkpoint
from nnunetv2_ext.data.folders import preprocess_case
from nnunetv2_ext.data.patches import corner_around, cut_patch
from nnunetv2_ext.data.subjects import subjects_of_dataset
from nnunetv2_ext.jras.build import group_ids
from nnunetv2_ext.jras.network import JRASNetwork
from nnunetv2_ext.jras.panel import ReadingView, view_of_patch
from nnunetv2_ext.jras.settings import FIRST_DESIGN


def load_model(model_folder: Path, fold: str, checkpoint: str, device: torch.device) -> nnUNetPredictor:
    """nnU-Net's predictor with one fold of a J-RAS model.

    Raises:
        ValueError: no such model or fold, not a J-RAS model, or one without guides.
    """
    file = find_checkpoint(model_folder, fold, checkpoint)
    weights = read(file)["network_weights"]
    if "null_logit" in weights:
        raise ValueError(FIRST_DESIGN)
    if "bank.images" not in weights:
        raise ValueError(f"{file} has no guide bank: it was not trained with J-RAS, or with jras.retriever=none")
    if not len(weights["bank.images"]):
        raise ValueError(f"the guide bank of {file} is empty: it was stripped; use the model it was exported from")
    with quiet():
        predictor = nnUNetPredictor(
            use_mirroring=False, perform_everything_on_device=device.type == "cuda", device=device, allow_tqdm=False
        )
        predictor.initialize_from_trained_model_folder(str(model_folder), (fold,), checkpoint)
    return predictor


def known_case(file: Path, dataset_json: Mapping[str, Any], image: Path) -> str | None:
    """The case that an image file is named after, if guides of a checkpoint are of its subject; else None.

    A checkpoint that was exported does not tell.
    """
    checkpoint = read(file)
    extension = checkpoint.get(EXTENSION_KEY) or {}
    state = _bank_state(checkpoint)
    if "group_key" not in state:
        return None
    case = image.name.removesuffix(dataset_json["file_ending"]).removesuffix("_0000")
    try:
        subjects = subjects_of_dataset(dataset_json, [case], extension.get("settings", {}).get("group_regex"))
    except ValueError:  # a name of another kind, in which the expression finds no subject
        subjects = None
    number = group_ids([case], state["group_key"], subjects)
    return case if bool(torch.isin(number, checkpoint["network_weights"]["bank.groups"].cpu()).any()) else None


def cases_of_guides(file: Path) -> Sequence[str] | None:
    """The case of each guide of a checkpoint; None for one that was exported or whose bank was replaced."""
    return _bank_state(read(file)).get("cases")


def _bank_state(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    return (checkpoint.get(EXTENSION_KEY) or {}).get("methods", {}).get("jras", {})


def look_at_image(
    predictor: nnUNetPredictor, images: Sequence[Path], label: Path | None = None, cases: Sequence[str] | None = None
) -> ReadingView:
    """Predict an image, one file per channel, and look at the guides of the patch in the middle of what was found.

    Args:
        label: drawn beside the prediction.
        cases: of the guides, if they are known.

    Raises:
        ValueError: missing, damaged or misfitting files, another number of channels than the model's, or a cascaded
            configuration.
    """
    configuration, plans = predictor.configuration_manager, predictor.plans_manager
    channels = len(channel_names(predictor.dataset_json))
    if len(images) != channels:
        raise ValueError(f"this model takes {channels} channel(s), one file each, not {len(images)}; give all of them")
    if configuration.previous_stage_name is not None:
        raise ValueError(
            f"a cascaded configuration needs the prediction of {configuration.previous_stage_name} first, which this "
            "command does not make; look at the pictures in the fold folder, or at the previous stage's model"
        )
    case = images[0].name
    image, seg, properties = preprocess_case(case, images, label, plans, configuration, predictor.dataset_json)
    labels, device = predictor.label_manager, predictor.device
    logits = predictor.predict_sliding_window_return_logits(torch.from_numpy(np.ascontiguousarray(image)))
    corner = middle_corner(logits_to_labels(logits.float(), labels) > 0, configuration.patch_size)
    x, truth = cut_patch(image, np.zeros_like(image[:1]) if seg is None else seg, corner, configuration.patch_size)
    network, patch = unwrap(predictor.network), x[None].to(device)
    assert isinstance(network, JRASNetwork)
    with torch.inference_mode(), torch.autocast("cuda", enabled=device.type == "cuda"):
        logits = network.eval()(patch)
    truth, regions = truth.clamp(min=0)[None], labels.foreground_regions if labels.has_regions else []
    target = torch.cat([torch.isin(truth, torch.tensor(region)) for region in regions]) if regions else truth
    known = None if seg is None else target_to_labels(target, labels)
    view = view_of_patch(network, logits, patch, case, labels, known, cases)
    return view._replace(directions=directions_of(properties, plans.transpose_forward))


def middle_corner(found: np.ndarray, patch_size: Sequence[int]) -> tuple[int, ...]:
    """Lowest voxel (Z, Y, X) of the patch around the middle of `found`, or of the image; outside of a smaller image.

    A 2-D patch is the slice of axis 0 that holds most.
    """
    places = np.argwhere(found)
    if len(patch_size) == 2 and len(places):
        places = places[places[:, 0] == found.sum((1, 2)).argmax()]
    centre = places.mean(0).round() if len(places) else np.array(found.shape) // 2
    return corner_around(centre.astype(int).tolist(), found.shape, patch_size)
