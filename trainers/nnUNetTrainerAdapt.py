"""nnUNetv2_ext adapt MODEL -i IMAGES -l LABELS -o MODEL2, which trains with this class."""

from nnunetv2_ext.adapt.training import AdaptTraining


class nnUNetTrainerAdapt(AdaptTraining):
    """nnU-Net fine-tuned on a few cases of a new site, with old cases in each batch."""
