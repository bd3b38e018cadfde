"""Adaptation as the rest of the house sees it."""

from nnunetv2_ext.core.outside import Command, Method, Promise, Trainer

METHOD = Method(
    name="adapt",
    summary="a finished model adapted to a new scanner or site with a few labelled cases",
    trainers={
        "nnUNetTrainerAdapt": Trainer(
            summary="a short fine-tune with old cases in each batch; `nnUNetv2_ext adapt` runs it",
            off={"initial_lr": 0.01},
            promises={"": Promise(cpu=1.1, cuda=1.1, memory=1.05, predict=1.0)},
        )
    },
    commands={
        "adapt": Command(
            "nnunetv2_ext.adapt.commands.adapt",
            "adapt a finished model to a new site with a few labelled cases; stock model in, stock model out",
            "train",
        )
    },
    card="methods/adapt.md",
    citation="Shi, G., Xiao, L., Chen, Y., & Zhou, S. K. (2021). Marginal loss and exclusion loss for partially "
    "supervised multi-organ segmentation. Medical Image Analysis 70, 101979. arXiv:2007.03868 (--not-drawn)",
)
