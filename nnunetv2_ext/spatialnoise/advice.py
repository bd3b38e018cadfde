"""Where labels can be audited at once."""

from nnunetv2_ext.core.outside import Advice
from nnunetv2_ext.data.facts import DatasetFacts


def advice(facts: DatasetFacts) -> list[Advice]:
    """For datasets with two finished folds or more, which can judge each other's cases."""
    for model in facts.trained:
        if len({*model.finished} - {"all"}) >= 2:
            folder = f"$nnUNet_results/{facts.name}/{model.trainer}__{model.plans}__{model.configuration}"
            return [
                Advice(
                    "run",
                    "audit: which labels of this dataset are probably wrong",
                    "its folds have not seen each other's validation cases; the list costs one prediction a case",
                    (f"nnUNetv2_ext audit {folder} -o REPORT",),
                    "the rankings by 1 - p(label) and by Dice; the report has both",
                    "all annotators make the same error: the model makes it too",
                )
            ]
    return []
