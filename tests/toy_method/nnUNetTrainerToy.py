"""nnUNetv2_train DATASET CONFIGURATION FOLD -tr nnUNetTrainerToy"""

from .training import ToyTraining


class nnUNetTrainerToy(ToyTraining):
    """nnU-Net with a teacher on unlabelled patches: a toy that shows what a method is made of."""
