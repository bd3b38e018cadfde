"""nnUNetv2_train DATASET CONFIGURATION FOLD -tr nnUNetTrainerPEMMA -p nnUNetPlans_pemma"""

from nnunetv2_ext.pemma.training import PEMMATraining


class nnUNetTrainerPEMMA(PEMMATraining):
    """A finished nnU-Net that gets an input channel more and keeps its weights (after https://arxiv.org/abs/2404.13704)."""
