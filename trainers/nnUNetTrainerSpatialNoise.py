"""nnUNetv2_train DATASET CONFIGURATION FOLD -tr nnUNetTrainerSpatialNoise"""

from nnunetv2_ext.spatialnoise.training import SpatialNoiseTraining


class nnUNetTrainerSpatialNoise(SpatialNoiseTraining):
    """nnU-Net for labels with errors: a robust loss, or corrected labels (after arXiv 2504.14795)."""
