"""Starting the segmenter from a plain nnU-Net: nnU-Net's own -pretrained_weights refuses, our names differ."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from nnunetv2_ext.core.checkpoint import check_weights, read
from nnunetv2_ext.jras.strip import backbone_weights


def load_backbone(backbone: nn.Module, path: Path) -> None:
    """Load a plain nnU-Net checkpoint into the backbone; further inputs (`fusion=concat`) start with weight 0.

    Raises:
        ValueError: the file is missing or broken, or belongs to another architecture.
    """
    weights = backbone_weights(read(path)["network_weights"], backbone.state_dict())
    check_weights(weights, backbone, path)
    backbone.load_state_dict(weights)
