"""Synthetic scans with known labels: single cases, and whole datasets in nnU-Net's raw format."""

from nnunetv2_ext.phantom.dataset import write_phantom_dataset
from nnunetv2_ext.phantom.image import MAX_ORGANS, MIN_VOXELS, make_phantom

__all__ = ["MAX_ORGANS", "MIN_VOXELS", "make_phantom", "write_phantom_dataset"]
