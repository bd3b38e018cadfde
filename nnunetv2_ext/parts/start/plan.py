"""Plans for a dataset on which a file's weights are at home: its network, patch, spacing and normalisation."""

import copy
import re
from collections.abc import Mapping
from typing import Any

from nnunetv2_ext.data.channels import OF_CT, channel_names
from nnunetv2_ext.parts.start.source import Source

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
# what of the file's configuration a network has seen of its images
_SEEN = ("resampling_fn_data", "resampling_fn_data_kwargs", "resampling_fn_seg", "resampling_fn_seg_kwargs")
_OF_A_CASCADE = ("inherits_from", "previous_stage", "next_stage")


def configuration_for(source: Source) -> str:
    """The name of the configuration that plans like the file's have: its own, or that of its dimension.

    Raises:
        ValueError: the file does not say which network, or which patch.
    """
    if not source.configuration.get("architecture") or not source.configuration.get("patch_size"):
        if source.family:
            raise ValueError(f"{source.path} is a network of {source.family}, which these trainers do not build")
        raise ValueError(
            f"{source.path} does not say which network and patch it was trained with (no init_args, and no "
            "nnssl_adaptation_plan with a ResEncL network): look at it with `nnUNetv2_ext weights`, and plan as usual"
        )
    name = source.configuration_name
    if not name or source.configuration.get("previous_stage"):
        return "2d" if len(source.configuration["patch_size"]) == 2 else "3d_fullres"
    return name


def plans_like(
    source: Source, plans: Mapping[str, Any], ours: Mapping[str, Any], dataset_json: Mapping[str, Any], name: str
) -> dict[str, Any]:
    """Plans with one configuration, that of `configuration_for`.

    Network, patch, spacing, resampling and normalisation are the file's; batch size, reader and what was measured on
    the dataset stay. Where the numbers of channels differ, a normalisation that all channels share there is that of all
    channels here; else ours stays.

    Args:
        source: the file.
        plans: the dataset's own.
        ours: its configuration of the same dimension, complete.
        dataset_json: of the dataset.
        name: of the new plans.

    Raises:
        ValueError: the file lacks a plan, or the name cannot be one.
    """
    if not _NAME.fullmatch(name) or "__" in name:
        raise ValueError(f"{name} cannot be a plans name: use letters, digits and single underscores")
    configuration_name, theirs = configuration_for(source), source.configuration
    configuration = {key: value for key, value in ours.items() if key not in _OF_A_CASCADE}
    configuration |= {key: theirs[key] for key in _SEEN if key in theirs}
    configuration |= {
        "data_identifier": f"{name}_{configuration_name}",
        "patch_size": list(theirs["patch_size"]),
        "spacing": list(theirs.get("spacing") or ours["spacing"]),
        "architecture": theirs["architecture"],
    }
    made: dict[str, Any] = {**plans, "plans_name": name, "configurations": {configuration_name: configuration}}
    made |= {key: source.plans[key] for key in ("transpose_forward", "transpose_backward") if key in source.plans}
    schemes, masks = theirs.get("normalization_schemes") or (), theirs.get("use_mask_for_norm") or ()
    number = len(channel_names(dataset_json))
    if len(schemes) == number:
        chosen = list(range(number))
    elif len(set(zip(schemes, masks))) == 1:
        chosen = [0] * number
    else:
        return copy.deepcopy(made)
    intensities = source.plans.get("foreground_intensity_properties_per_channel") or {}
    if any(schemes[i] == OF_CT and str(i) not in intensities for i in chosen):
        return copy.deepcopy(made)
    configuration["normalization_schemes"] = [schemes[i] for i in chosen]
    configuration["use_mask_for_norm"] = [masks[i] for i in chosen]
    kept = dict(plans["foreground_intensity_properties_per_channel"])
    kept |= {str(here): intensities[str(i)] for here, i in enumerate(chosen) if schemes[i] == OF_CT}
    made["foreground_intensity_properties_per_channel"] = kept
    return copy.deepcopy(made)
