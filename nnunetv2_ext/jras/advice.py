"""When J-RAS is worth running: nowhere yet. Figures: docs/results.md, hippocampus, two seeds."""

from nnunetv2_ext.core.outside import Advice
from nnunetv2_ext.data.facts import DatasetFacts


def advice(facts: DatasetFacts) -> list[Advice]:
    """The same on every dataset: networks were found to ignore their guides."""
    return [
        Advice(
            "skip",
            "nnUNetTrainerJRAS",
            "no benefit was found, because networks ignore their guides (hippocampus, two seeds); its checkpoints hold "
            "patients' patches",
            control="jras.retriever=none, which is plain nnU-Net bit for bit, if you try it all the same",
        )
    ]
