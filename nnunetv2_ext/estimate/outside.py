"""Estimate as the rest of the house sees it."""

from nnunetv2_ext.core.outside import Command, Method

METHOD = Method(
    name="estimate",
    summary="expected Dice of cases that nobody has labelled (after SPE, arXiv 2504.15667)",
    commands={
        "estimate": Command(
            "nnunetv2_ext.estimate.commands.estimate",
            "expected Dice of unlabelled cases, with intervals, worst first",
            "judge",
        )
    },
    card="methods/estimate.md",
    citation="Zou, et al. (2025). Performance Estimation for Supervised Medical Image Segmentation Models on "
    "Unlabeled Data Using UniverSeg. arXiv:2504.15667",
)
