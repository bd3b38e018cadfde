"""When J-RAS is worth running: nowhere yet. Figures: docs/results.md, heart MRI, three seeds."""

from nnunetv2_ext.core.outside import Advice
from nnunetv2_ext.data.facts import DatasetFacts


def advice(facts: DatasetFacts) -> list[Advice]:
    """The same on every dataset: networks were found to read little of their guides."""
    return [
        Advice(
            "skip",
            "nnUNetTrainerJRAS",
            "no benefit was found: networks read little of their guides, and wrong ones cost 0.0 to 0.6 Dice points "
            "(heart, three seeds, small networks); its checkpoints hold patients' patches",
            control="jras.retriever=none, which is plain nnU-Net bit for bit, if you try it all the same",
        )
    ]
