"""When random convolutions of the input are worth it."""

from nnunetv2_ext.core.outside import Advice
from nnunetv2_ext.data.channels import are_colours
from nnunetv2_ext.data.facts import DatasetFacts


def advice(facts: DatasetFacts) -> list[Advice]:
    """For scans without absolute units, where images wait that nobody has labelled."""
    if not facts.test_cases or are_colours(facts.channels) or any(c.casefold() == "ct" for c in facts.channels):
        return []
    options = f"{facts.id} {facts.configuration} 0"
    return [
        Advice(
            "run",
            f"nnUNetTrainerGIN, if the {facts.test_cases} images of imagesTs show another contrast",
            "on heart MRI: +0.13 to +0.16 Dice on a real second contrast (a prototype, two seeds), -0.02 at home and "
            "nothing certain on another scanner of the same contrast (three seeds)",
            (f"nnUNetv2_train {options} -tr nnUNetTrainerGIN",),
            f"nnUNet_ext_settings=augmentation=da5 nnUNetv2_train {options} -tr nnUNetTrainerExt; score the own site "
            "and the new one",
            "the new images have the same contrast, or five of them can be labelled",
        )
    ]
