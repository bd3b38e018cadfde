"""Med-2D SegNet as the rest of the house sees it."""

from nnunetv2_ext.core.outside import Method, Network, Trainer

METHOD = Method(
    name="med2d",
    summary="a small 2-D network of 2.07 million parameters (after Med-2D SegNet, arXiv 2504.14715)",
    trainers={
        "nnUNetTrainerMed2D": Trainer(
            summary="Med2DSegNet and AdamW instead of the plan's network and SGD",
            smallest={"med2d.width": 0.5},
            refuses={"3d": "is a 2-D network", "cascade": "is a 2-D network", "export": "is part of it"},
        )
    },
    networks={
        "med2d": Network(
            "Med2DSegNet, 2.07 million parameters",
            "nnunetv2_ext.med2d.plans:architecture",
            {"width": "factor of all widths (1)", "gap": "use of the global average: gate, add or none (gate)"},
        )
    },
    card="methods/med2d.md",
    citation="Sabrin, L., Chowdhury, M. S., Tapu, S., Sarkar, N. K., & Ali, F. B. (2025). Med-2D SegNet: A Light "
    "Weight Deep Neural Network for Medical 2D Image Segmentation. arXiv:2504.14715",
)
