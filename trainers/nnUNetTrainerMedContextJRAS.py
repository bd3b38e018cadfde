"""nnUNetv2_train DATASET CONFIGURATION FOLD -tr nnUNetTrainerMedContextJRAS"""

from nnunetv2_ext.jras.training import JRASTraining
from nnunetv2_ext.medcontext.training import MedContextTraining


class nnUNetTrainerMedContextJRAS(JRASTraining, MedContextTraining):
    """Both at once: guides for the whole and for the masked patch; the teacher looks into the student's guide bank."""
