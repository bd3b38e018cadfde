"""What RADA needs besides its packages: CLIP's weights, which open_clip downloads. For ``nnUNetv2_ext doctor``."""

import os

from nnunetv2_ext.core.outside import OK, WARN, Finding
from nnunetv2_ext.rada.semantics.clip_model import ClipSource


def findings() -> list[Finding]:
    """Whether the default weights are in the hub's cache, found without the network; [] if open_clip is not there."""
    try:
        import open_clip
        from huggingface_hub import try_to_load_from_cache
        from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
    except ImportError:  # a finding of the section on software
        return []
    source = ClipSource()
    repository, file = os.path.split(open_clip.get_pretrained_cfg(source.model, source.weights)["hf_hub"])
    names = [file] if file else [HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME]
    subject, what = "CLIP weights", f"{source.weights} of {source.model}"
    if any(isinstance(try_to_load_from_cache(repository, name), str) for name in names):
        return [Finding(OK, subject, f"{what}, downloaded")]
    download = f"import open_clip; open_clip.create_model('{source.model}', pretrained='{source.weights}')"
    missing = f"{what} are not downloaded; nnUNetTrainerRADA does that at its first start, which needs the network"
    remedy = f'python -c "{download}"   (or train with rada.semantics=off)'
    return [Finding(WARN, subject, missing, remedy)]
