"""nnUNetv2_train DATASET CONFIGURATION FOLD -tr nnUNetTrainerMedContext"""

from nnunetv2_ext.medcontext.training import MedContextTraining


class nnUNetTrainerMedContext(MedContextTraining):
    """nnU-Net trained with a masked-context EMA teacher (MedContext, MICCAI 2024, https://arxiv.org/abs/2402.17725)."""
