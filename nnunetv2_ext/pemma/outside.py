"""PEMMA as the rest of the house sees it."""

from nnunetv2_ext.core.outside import Command, ExportEdit, Method, Promise, Trainer

METHOD = Method(
    name="pemma",
    summary="an input channel added to a finished model, which keeps its weights (after PEMMA, arXiv 2404.13704)",
    trainers={
        "nnUNetTrainerPEMMA": Trainer(
            summary="adapters for a new channel beside a frozen model, which it is bit for bit without the channel",
            smallest={"pemma.base": "{model}", "pemma.rank": 2},
            data="added_channel",
            refuses={"cascade": "second stage of a cascade"},
            # forward F, backward 2F: the base's weights need no gradient, 2F of 3F; adapters are many small kernels.
            # Measured beside 16 to 96 channels; a prediction runs both networks, or the base alone
            promises={"": Promise(cpu=1.5, cuda=1.5, memory=1.3, predict=2.0, missing=1.02)},
        )
    },
    commands={
        "add-channel": Command(
            "nnunetv2_ext.pemma.commands.add_channel",
            "prepare a dataset with a further channel for a finished model; write zeros for channels that are missing",
            "prepare data",
        )
    },
    weights={"base": "the finished model that a channel was added to"},
    export_edits={
        "merged": ExportEdit(
            "write a model whose adapters of convolutions are folded into the base: for sites where the new channel is "
            "always there; it predicts with this package",
            "nnunetv2_ext.pemma.export:merged",
            keeps_trainer=True,
            notice="without the new channel a merged model is not the base any more: give it both channels",
        )
    },
    descriptions={
        "base": "nnunetv2_ext.pemma.export:described_as_base",
        "merged": "nnunetv2_ext.pemma.export:described_as_merged",
    },
    card="methods/pemma.md",
    advice="nnunetv2_ext.pemma.advice:advice",
    citation="Saadi, Saeed, Yaqub, & Nandakumar (2024). PEMMA: Parameter-Efficient Multi-Modal Adaptation for Medical "
    "Image Segmentation. arXiv:2404.13704",
)
