"""When MedContext is worth running: nowhere yet. Figures: docs/results.md, hippocampus, three seeds, 800 steps."""

from nnunetv2_ext.core.outside import Advice
from nnunetv2_ext.data.facts import DatasetFacts

_MEASURED = 40  # most training cases it was measured with


def advice(facts: DatasetFacts) -> list[Advice]:
    """With few labelled cases it suggests itself."""
    if facts.number_of_subjects > _MEASURED:
        return []
    return [
        Advice(
            "skip",
            "nnUNetTrainerMedContext for the sake of few labelled cases",
            "no gain over two plain passes: Dice -0.001 with 5 cases, +0.005 with 40 (hippocampus, three seeds, no "
            "mirroring); a step costs 2.3 plain ones",
            control="two clean passes, as its card says, if you try it all the same",
        )
    ]
