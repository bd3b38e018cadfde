"""nnUNet_ext_settings="photo.weights=FILE" nnUNetv2_train DATASET 2d FOLD -tr nnUNetTrainerPhoto"""

from nnunetv2_ext.photo.training import PhotoTraining


class nnUNetTrainerPhoto(PhotoTraining):
    """nnU-Net with a 2-D network whose encoder was trained on photographs (after https://arxiv.org/abs/2504.17306)."""
