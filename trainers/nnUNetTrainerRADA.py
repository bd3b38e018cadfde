"""nnUNetv2_train DATASET CONFIGURATION FOLD -tr nnUNetTrainerRADA"""

from nnunetv2_ext.rada.training import RADATraining


class nnUNetTrainerRADA(RADATraining):
    """nnU-Net that learns from a few annotated planes per volume: three co-trained networks (after RADA, https://arxiv.org/abs/2604.11164)."""
