"""``-tr nnUNetTrainerMambaSea``: another scanner, by augmented features and a second branch (arXiv 2504.17515)."""

from nnunetv2_ext.mambasea.training import MambaSeaTraining


class nnUNetTrainerMambaSea(MambaSeaTraining):
    """nnU-Net with LSA, GVA and their consistency; settings ``mambasea.*``."""
