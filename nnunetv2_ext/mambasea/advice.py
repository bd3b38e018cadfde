"""When Mamba-Sea is worth running: nowhere yet."""

from nnunetv2_ext.core.outside import Advice
from nnunetv2_ext.data.facts import DatasetFacts


def advice(facts: DatasetFacts) -> list[Advice]:
    """Where images of another site wait, it suggests itself."""
    if not facts.test_cases:
        return []
    return [
        Advice(
            "skip",
            "nnUNetTrainerMambaSea for the sake of another scanner",
            "its parts brought 0 to +3 Dice points on small networks (a prototype, two seeds); not measured on "
            "nnU-Net's plans, and a step costs two",
            control="GIN, DA5 and twice the steps, on the own site and the new one, if you try it all the same",
        )
    ]
