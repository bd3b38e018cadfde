"""A file of weights that somebody else trained: which network they are of, and the plan it was trained with."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor

from nnunetv2_ext.core.checkpoint import load
from nnunetv2_ext.data.channels import channel_names

_LFS_POINTER = b"version https://git-lfs"
_CONTAINERS = ("network_weights", "state_dict", "model_state_dict", "net", "student", "model")
_ADAPTATION = "nnssl_adaptation_plan"
# networks whose layers have no counterpart in nnU-Net v2's U-Nets, by a part of their tensors' names
_FAMILIES = {
    "conv_blocks_context.": "nnU-Net v1 or STU-Net",
    "swinViT.": "Swin UNETR",
    "eva.": "Primus",
}
_UNET = "dynamic_network_architectures.architectures.unet."
# nnU-Net's ResEnc L as nnssl pre-trains it; the plan that comes with the weights gives its name only
_RESENC_L: dict[str, Any] = {
    "network_class_name": f"{_UNET}ResidualEncoderUNet",
    "arch_kwargs": {
        "n_stages": 6,
        "features_per_stage": [32, 64, 128, 256, 320, 320],
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3]] * 6,
        "strides": [[1, 1, 1]] + [[2, 2, 2]] * 5,
        "n_blocks_per_stage": [1, 3, 4, 6, 6, 6],
        "n_conv_per_stage_decoder": [1] * 5,
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    },
    "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
}


@dataclass(frozen=True)
class Source:
    """What a file holds.

    Attributes:
        path: of the file.
        weights: tensors by their names there.
        plans: nnU-Net's, of the training; empty if the file does not say.
        configuration: of them, complete, with as much as the file says.
        dataset_json: of the training; empty if the file does not say.
    """

    path: Path
    weights: dict[str, Tensor]
    plans: Mapping[str, Any]
    configuration: Mapping[str, Any]
    dataset_json: Mapping[str, Any]
    configuration_name: str = ""

    @property
    def labels(self) -> dict[str, Any] | None:
        """Names and values of what its heads stand for; None: the file does not say."""
        return heads_of(self.dataset_json)

    @property
    def family(self) -> str | None:
        """A network of another kind than nnU-Net v2's U-Nets; None: not known to be one."""
        return next((name for part, name in _FAMILIES.items() if any(part in key for key in self.weights)), None)

    @property
    def dimensions(self) -> int:
        """Spatial axes of its convolutions; 0 if it has none."""
        return max((tensor.ndim - 2 for tensor in self.weights.values() if tensor.ndim > 3), default=0)


def heads_of(dataset_json: Mapping[str, Any]) -> dict[str, Any] | None:
    """Names and values of the labels that a network has heads for, background included; None without labels."""
    labels = dataset_json.get("labels")
    return {name: value for name, value in labels.items() if name != "ignore"} if labels else None


def facts_of(configuration: Mapping[str, Any], dataset_json: Mapping[str, Any]) -> dict[str, str]:
    """What of a plan decides whether weights of another one are at home in it, in words, by name."""
    network = str((configuration.get("architecture") or {}).get("network_class_name", ""))
    facts = {
        "network": network.rpartition(".")[2],
        "channels": ", ".join(channel_names(dataset_json)),
        "normalisation": ", ".join(
            name.removesuffix("Normalization") for name in configuration.get("normalization_schemes") or ()
        ),
        "spacing": _numbers(configuration.get("spacing")),
        "patch": _numbers(configuration.get("patch_size")),
        "labels": ", ".join(heads_of(dataset_json) or ()),
    }
    return {name: fact or "?" for name, fact in facts.items()}


def _numbers(values: Any) -> str:
    return " x ".join(f"{value:.4g}" for value in values) if values else ""


def read_source(path: Path, trust: bool = False) -> Source:
    """Read the weights of a file; what people name instead of one is told apart.

    Args:
        path: a checkpoint, or the folder of a fold, whose checkpoint_final.pth is taken.
        trust: read also what is neither a tensor nor a plain value.

    Raises:
        ValueError: the file cannot be read or holds no weights.
    """
    path = _file(path)
    try:
        content = load(path, trust=trust, remedy="set init_trust=true")
    except ValueError as error:
        raise ValueError(f"init_from: {error}") from error
    container: Any = content
    if isinstance(content, Mapping):
        container = next((content[k] for k in _CONTAINERS if isinstance(content.get(k), Mapping)), content)
    weights = {}
    if isinstance(container, Mapping):
        weights = {str(name): value for name, value in container.items() if isinstance(value, Tensor)}
    if not weights:
        keys = ", ".join(map(str, list(content)[:6])) if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(
            f"init_from={path} holds no weights (it has {keys or 'nothing'}); name a checkpoint of a network"
        )
    return Source(path, weights, *_plan(content))


def _plan(content: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any], str]:
    args, adaptation = content.get("init_args"), content.get(_ADAPTATION)
    if isinstance(args, Mapping) and {"plans", "configuration", "dataset_json"} <= set(args):
        name = str(args["configuration"])
        try:
            whole = PlansManager(args["plans"]).get_configuration(name).configuration
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError):  # of a version that writes other plans
            whole = (args["plans"].get("configurations") or {}).get(name) or {}
        return args["plans"], whole, args["dataset_json"], name
    if isinstance(adaptation, Mapping):
        configurations = (adaptation.get("pretrain_plan") or {}).get("configurations") or {}
        whole = dict(next(iter(configurations.values()), {}))
        if adaptation.get("recommended_downstream_patchsize"):
            whole["patch_size"] = list(adaptation["recommended_downstream_patchsize"])
        architecture = adaptation.get("architecture_plans") or {}
        whole.pop("architecture", None)
        if architecture.get("arch_class_name") == "ResEncL" and not architecture.get("arch_kwargs"):
            whole["architecture"] = _RESENC_L
        return {}, whole, {}, ""
    return {}, {}, {}, ""


def _file(path: Path) -> Path:
    if str(path).startswith(("http:/", "https:/")):
        raise ValueError(f"init_from={path} is an address; download the file and name its place on this machine")
    if path.is_dir():
        final = path / "checkpoint_final.pth"
        if final.is_file():
            return final
        inside = sorted(p.relative_to(path) for p in [*path.glob("*.pth"), *path.glob("fold_*/*.pth")])
        which = f"name one of its files: {', '.join(map(str, inside))}" if inside else "name a checkpoint file"
        raise ValueError(f"init_from={path} is a folder; {which}")
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise ValueError(f"init_from={path} is a pointer of Git LFS, not the file itself; run `git lfs pull`")
        if path.suffix == ".pkl":
            raise ValueError(
                f"init_from={path} is not a file of weights: beside a model of nnU-Net v1 such a file holds its plans"
            )
    return path


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
