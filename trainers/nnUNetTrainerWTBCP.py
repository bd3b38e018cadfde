"""nnUNetv2_train DATASET CONFIGURATION FOLD -tr nnUNetTrainerWTBCP"""

from nnunetv2_ext.wtbcp.training import WTBCPTraining


class nnUNetTrainerWTBCP(WTBCPTraining):
    """nnU-Net that also learns from unlabelled scans (after BCP and WT-BCP, https://arxiv.org/abs/2504.14445)."""
