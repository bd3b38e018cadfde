"""nnUNetv2_train DATASET CONFIGURATION FOLD -tr nnUNetTrainerJRAS"""

from nnunetv2_ext.jras.training import JRASTraining


class nnUNetTrainerJRAS(JRASTraining):
    """nnU-Net that retrieves image-mask guides for every patch, the retriever trained jointly (J-RAS, https://arxiv.org/abs/2510.09953)."""
