"""Photographs as the rest of the house sees them."""

from nnunetv2_ext.core.outside import Command, Method, Network, Trainer

METHOD = Method(
    name="photo",
    summary="pre-trained encoders for few photographs, and their preparation (after arXiv 2504.17306)",
    trainers={
        "nnUNetTrainerPhoto": Trainer(
            summary="a 2-D network with an ImageNet encoder instead of the plan's",
            smallest={"photo.encoder": "tu-mobilenetv3_small_050"},
            refuses={"3d": "is a 2-D network", "cascade": "is a 2-D network", "export": "is part of it"},
        )
    },
    commands={
        "enhance": Command(
            "nnunetv2_ext.photo.commands.enhance", "CLAHE and a blank surround for colour photographs", "prepare data"
        ),
        "split-labels": Command(
            "nnunetv2_ext.photo.commands.split_labels", "write one binary dataset a label", "prepare data"
        ),
        "merge-labels": Command(
            "nnunetv2_ext.photo.commands.merge_labels", "put binary predictions together again", "judge"
        ),
    },
    networks={
        "smp": Network(
            "a network of segmentation-models-pytorch, as smp:Unet:tu-tf_efficientnet_lite0",
            "nnunetv2_ext.photo.plans:architecture",
        )
    },
    extras={"photo": ("segmentation-models-pytorch>=0.5", "safetensors")},
    card="methods/photo.md",
    advice="nnunetv2_ext.photo.advice:advice",
    citation="Boulaabi, M., Ben Aïcha Gader, T., Kacem Echi, A., & Mbarek, S. (2024). Advanced Segmentation of "
    "Diabetic Retinopathy Lesions Using DeepLabv3+. AICCSA 2024. arXiv:2504.17306",
)
