"""When WTBCP is worth running: not first. Figures: docs/methods/wtbcp.md, a prototype only."""

from nnunetv2_ext.core.outside import Advice
from nnunetv2_ext.data.facts import DatasetFacts


def advice(facts: DatasetFacts) -> list[Advice]:
    """Where a pool suggests it."""
    if facts.plans is None or not facts.plans.pool:
        return []
    return [
        Advice(
            "skip",
            "nnUNetTrainerWTBCP, before pseudo-label and more steps of plain nnU-Net were tried",
            "no mode is known to win: in a prototype (500 steps, two data sets) its pseudo-labels were +1.8 and -1.5 "
            "Dice points against plain nnU-Net with twice the steps, and copy-paste lost 3 to 4; a step costs 2.4 "
            "plain ones",
            control="plain nnU-Net with the same wall time, and pseudo-label, if you try it all the same",
        )
    ]
