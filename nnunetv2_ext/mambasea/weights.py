"""VMamba's ImageNet weights in VM-UNet, from a local file."""

from pathlib import Path

import torch
from torch import Tensor

from nnunetv2_ext.mambasea.vmunet import VMUNet
from nnunetv2_ext.parts.weights import read_weights

_PREFIXES = ("", "module.", "backbone.", "encoder.", "vmunet.")


def load_vmamba(network: VMUNet, path: Path) -> str:
    """Load the encoder, and each stage's blocks into the decoder's stage of the same width, as VM-UNet's authors did.

    Returns:
        The table of what was loaded.

    Raises:
        ValueError: the file cannot be read, holds NaN, or has weights of another width; nothing of it fits.
    """
    theirs = read_weights(path, "mambasea.weights")
    prefix = next((p for p in _PREFIXES if f"{p}patch_embed.proj.weight" in theirs), "")
    ours = dict(network.named_parameters())
    chosen: dict[str, Tensor] = {}
    for name, parameter in ours.items():
        source = theirs.get(prefix + _name_of_vmamba(name))
        if source is None:
            continue
        if name.endswith("patch_embed.proj.weight") and source.ndim == 4 and source.shape[1] == 3 != parameter.shape[1]:
            # of RGB: a grey image in all three channels gives the same
            source = source.sum(1, keepdim=True).repeat(1, parameter.shape[1], 1, 1) / parameter.shape[1]
        if source.shape != parameter.shape:
            there, here = ("x".join(map(str, value.shape)) for value in (source, parameter))
            raise ValueError(
                f"mambasea.weights={path} is of another width: {name} is {there} there and {here} here; take VMamba's "
                "weights of the widths 96, 192, 384 and 768, or unset mambasea.weights"
            )
        if not bool(torch.isfinite(source).all()):
            raise ValueError(f"mambasea.weights={path}: its tensor for {name} holds NaN or infinite values")
        chosen[name] = source
    if not any(name.startswith("encoder.layers.") for name in chosen):
        raise ValueError(
            f"mambasea.weights={path} has nothing for the encoder of VM-UNet, whose tensors are called as VMamba's are "
            f"(layers.0.blocks.0.ln_1.weight); the file's first is {next(iter(theirs))}"
        )
    with torch.no_grad():
        for name, source in chosen.items():
            ours[name].copy_(source)
    return _table(network, chosen)


def _name_of_vmamba(name: str) -> str:
    part, _, rest = name.partition(".")
    if part == "encoder":
        return rest
    _, number, *within = rest.split(".")  # layers_up.0.blocks... from the coarsest stage
    return ".".join(["layers", str(3 - int(number)), *within]) if number.isdigit() else name


def _table(network: VMUNet, chosen: dict[str, Tensor]) -> str:
    parts: dict[str, list[int]] = {}
    for name, parameter in network.named_parameters():
        counts = parts.setdefault(".".join(name.split(".")[: 3 if ".layers" in name else 2]), [0, 0])
        counts[0] += parameter.numel()
        counts[1] += parameter.numel() * (name in chosen)
    loaded, total = (sum(counts[i] for counts in parts.values()) for i in (1, 0))
    lines = [f"{100 * loaded / total:.1f} % of {total:,} values are loaded, the rest stays random"]
    return "\n".join([*lines, *(f"  {part:<26} {new:>12,} of {all_:>12,}" for part, (all_, new) in parts.items())])
