"""nnUNetv2_train DATASET CONFIGURATION FOLD -tr nnUNetTrainerGIN"""

from nnunetv2_ext.gin.training import GINTraining


class nnUNetTrainerGIN(GINTraining):
    """nnU-Net whose samples go through random convolutions, for scans of an unseen contrast (https://arxiv.org/abs/2111.12525)."""
