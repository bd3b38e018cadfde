"""Mamba-Sea as the rest of the house sees it."""

from nnunetv2_ext.core.outside import Method, Network, Promise, Trainer

METHOD = Method(
    name="mambasea",
    summary="augmented feature sequences and a brightened second branch, for another scanner (arXiv 2504.17515)",
    trainers={
        "nnUNetTrainerMambaSea": Trainer(
            summary="augmentation of feature statistics, and a second branch behind a brightening network",
            off={"mambasea.lsa": 0, "mambasea.gva": 0},
            # two plain steps, and GVA at the resolution of the image; promised for the plan's own network
            promises={
                "": Promise(cpu=2.4, cuda=2.2, memory=1.15, predict=1.0),
                "mambasea.branch=shared": Promise(cpu=2.4, cuda=2.2, memory=1.15, predict=1.0),
                "mambasea.gva=0": Promise(cpu=1.2, cuda=1.2, memory=1.15, predict=1.0),
            },
        )
    },
    networks={
        "vmunet": Network(
            "VM-UNet, 27 million parameters, 2-D",
            "nnunetv2_ext.mambasea.plans:architecture",
            settings={"optimizer": "adamw", "initial_lr": 3e-4, "weight_decay": 1e-2},
        )
    },
    extras={"mamba": ("mambapy>=1.2",)},
    card="methods/mambasea.md",
    advice="nnunetv2_ext.mambasea.advice:advice",
    citation="Cheng, Z., Guo, J., Zhang, J., Qi, L., Zhou, L., Shi, Y., & Gao, Y. (2025). Mamba-Sea: A Mamba-Based "
    "Framework With Global-to-Local Sequence Augmentation for Generalizable Medical Image Segmentation. IEEE TMI. "
    "arXiv:2504.17515",
)
