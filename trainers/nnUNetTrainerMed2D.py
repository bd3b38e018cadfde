"""nnUNetv2_train DATASET 2d FOLD -tr nnUNetTrainerMed2D"""

from nnunetv2_ext.med2d.training import Med2DTraining


class nnUNetTrainerMed2D(Med2DTraining):
    """nnU-Net with a small 2-D network in the manner of Med-2D SegNet (https://arxiv.org/abs/2504.14715) and AdamW."""
