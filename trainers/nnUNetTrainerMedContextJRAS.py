"""nnUNetv2_train DATASET CONFIGURATION FOLD -tr nnUNetTrainerMedContextJRAS"""

from nnunetv2_ext.jras.training import JRASTraining
from nnunetv2_ext.medcontext.training import MedContextTraining


class nnUNetTrainerMedContextJRAS(JRASTraining, MedContextTraining):
    """Both at once: guides for the whole and for the masked patch; the teacher looks into the student's guide bank."""

    def initialize(self) -> None:
        """nnU-Net's; ValueError with unlabelled patches, for which no guides are drawn."""
        if self.has_unlabelled:
            raise ValueError(
                "nnUNetTrainerMedContextJRAS draws guides for labelled patches only: set medcontext.unlabelled=false, "
                "or train nnUNetTrainerMedContext on the pool"
            )
        super().initialize()
