"""RADA as the rest of the house sees it."""

from nnunetv2_ext.core.outside import Command, ExportEdit, Method, Promise, Trainer

# three networks are trained; prediction takes their mean, one after the other
_COST = Promise(cpu=3.6, cuda=3.6, memory=1.6, predict=3.1)

METHOD = Method(
    name="rada",
    summary="three co-trained networks from a few annotated planes a volume (arXiv 2604.11164)",
    trainers={
        "nnUNetTrainerRADA": Trainer(
            summary="three networks that teach each other, from a few annotated planes",
            smallest={"rada.semantics": "off", "rada.min_labelled": 1},
            data="sparse",
            refuses={
                "2d": "is 2-D, but RADA learns from planes along the three axes",
                "cascade": "is a cascade, and RADA's networks have no input for",
                "regions": "declares regions .* but RADA needs classes that exclude each other",
                "ddp": "nnUNetTrainerRADA runs on one GPU",
            },
            promises={
                **dict.fromkeys(("", "rada.semantics=learned", "rada.semantics=off"), _COST),
                "rada.semantics=learned rada.infer=single:1": Promise(cpu=3.6, cuda=3.6, memory=1.6, predict=1.0),
            },
        )
    },
    commands={
        "sparsify": Command(
            "nnunetv2_ext.rada.commands.sparsify",
            "make a dense dataset sparse for nnUNetTrainerRADA, or thicken own planes",
            "prepare data",
        ),
        "check-planes": Command(
            "nnunetv2_ext.rada.commands.check_planes",
            "show which annotated planes a preprocessed sparse dataset has",
            "prepare data",
            formerly="check",
        ),
    },
    weights=dict.fromkeys(("net1", "net2", "net3"), "one of RADA's three networks"),
    export_edits={
        "drop-semantics": ExportEdit(
            "leave out the semantic head of a RADA network, which plain nnU-Net cannot compute: predictions change, so "
            "validate the exported model",
            "nnunetv2_ext.rada.export:drop_semantics",
        )
    },
    requires=("open_clip_torch>=3", "safetensors"),  # 3 is the first with require_pretrained and local-dir: models
    card="methods/rada.md",
    citation="Zeng, Xie, Zhu, Zhang, Hu, Yao, Li, Lu, & Lu (2026). RADA: Region-Aware Dual-encoder Auxiliary learning "
    "for Barely-supervised Medical Image Segmentation. arXiv:2604.11164",
    advice="nnunetv2_ext.rada.advice:advice",
    doctor="nnunetv2_ext.rada.installation:findings",
)
