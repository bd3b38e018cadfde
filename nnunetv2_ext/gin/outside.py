"""GIN as the rest of the house sees it."""

from nnunetv2_ext.core.outside import Method, Promise, Trainer

METHOD = Method(
    name="gin",
    summary="random convolutions of the input for scans of an unseen contrast (arXiv 2111.12525)",
    trainers={
        "nnUNetTrainerGIN": Trainer(
            summary="plain nnU-Net whose training samples go through random convolutions",
            off={"gin": 0},
            promises={"": Promise(cpu=1.05, cuda=1.02, memory=1.02, predict=1.0)},
        )
    },
    card="methods/gin.md",
    advice="nnunetv2_ext.gin.advice:advice",
    citation="Ouyang, C., Chen, C., Li, S., Li, Z., Qin, C., Bai, W., & Rueckert, D. (2023). Causality-Inspired "
    "Single-Source Domain Generalization for Medical Image Segmentation. IEEE TMI 42(4), 1095-1106. arXiv:2111.12525",
)
