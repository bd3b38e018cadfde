"""WT-BCP as the rest of the house sees it."""

from nnunetv2_ext.core.outside import Method, Promise, Trainer

METHOD = Method(
    name="wtbcp",
    summary="unlabelled patches, labelled by a moving-average teacher (after BCP and WT-BCP, arXiv 2504.14445)",
    trainers={
        "nnUNetTrainerWTBCP": Trainer(
            summary="pseudo-labels, mean teacher or copy-paste on a pool of unlabelled cases",
            smallest={
                "wtbcp.unlabelled": "rest",
                "train_cases": 2,
                "wtbcp.unlabelled_start": 0,
                "wtbcp.unlabelled_ramp": 0,
            },
            off={"wtbcp.unlabelled_weight": 0},
            refuses={"cascade": "cannot train a cascade on unlabelled cases"},
            # forward F, backward 2F: pseudo is two passes and the teacher's forward, 7F to 3F; bcp 4F; wtbcp 10F
            # and losses of their own; measured 2.4, 2.3, 1.4, 4.0 beside a network of 16 to 96 channels
            promises={
                "": Promise(cpu=2.5, cuda=2.4, memory=1.1, predict=1.0),
                "wtbcp.mode=mean_teacher": Promise(cpu=2.5, cuda=2.4, memory=1.1, predict=1.0),
                "wtbcp.mode=bcp": Promise(cpu=1.55, cuda=1.4, memory=1.15, predict=1.0),
                "wtbcp.mode=wtbcp": Promise(cpu=4.2, cuda=4.2, memory=4.3, predict=2.2),
            },
        )
    },
    requires=("connected-components-3d",),  # comes with acvl-utils, which nnU-Net needs
    card="methods/wtbcp.md",
    advice="nnunetv2_ext.wtbcp.advice:advice",
    citation="Zhang, M., Wang, L., Gu, L., Ling, T., & Tao, X. (2025). WT-BCP: Wavelet Transform based Bidirectional "
    "Copy-Paste for Semi-Supervised Medical Image Segmentation. ICME 2025. arXiv:2504.14445. Bai, Y., Chen, D., Li, "
    "Q., Shen, W., & Wang, Y. (2023). Bidirectional Copy-Paste for Semi-Supervised Medical Image Segmentation. CVPR "
    "2023, 11514-11524. arXiv:2305.00673",
)
