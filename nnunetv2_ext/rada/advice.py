"""When RADA is worth it. Figures: docs/results.md; hippocampus, ten volumes, two seeds, 800 steps, no mirroring."""

from nnunetv2_ext.core.outside import Advice
from nnunetv2_ext.data.facts import DatasetFacts
from nnunetv2_ext.rada.requirements import require_plain_labels, require_volumes

_NAME = "nnUNetTrainerRADA"


def advice(facts: DatasetFacts) -> list[Advice]:
    """For volumes with a few annotated slices; what speaks against it elsewhere."""
    if facts.ignore is None:
        if not facts.test_cases or facts.is_2d:
            return []
        reason = "labels are complete, and 70 unlabelled volumes brought nothing measurable"
        return [Advice("skip", f"{_NAME} for the sake of unlabelled images", reason)]
    if facts.pattern == "none":
        return []
    if refusal := _refusal(facts):
        return [Advice("skip", _NAME, refusal)]
    if facts.pattern == "dense":
        reason = "labels are complete; dense labels of the same volumes were worth twice RADA's gain"
        return [Advice("skip", _NAME, reason)]
    if facts.pattern != "slices":
        reason = "annotations lie on no whole slices, which its views need; plain nnU-Net's ignore label takes them"
        return [Advice("skip", _NAME, reason)]
    options = f"{facts.id} {facts.configuration} 0"
    return [
        Advice(
            "run",
            f"{_NAME}, from a few annotated slices",
            "0.804 and 0.804 Dice against 0.776 and 0.767 of plain nnU-Net on the same slices: a hint, not proof "
            "(hippocampus, ten volumes, two seeds, 800 steps). A step costs 3.2 to 3.7 plain ones",
            (
                f"nnUNetv2_plan_and_preprocess -d {facts.id} -c {facts.configuration}",
                f"nnUNetv2_ext check-planes -d {facts.id} -c {facts.configuration}",
                f'nnUNet_ext_settings="rada.semantics=off" nnUNetv2_train {options} -tr {_NAME}',
            ),
            f"plain nnU-Net on the same slices and steps: nnUNet_ext_settings=num_epochs=250 nnUNetv2_train {options} "
            "-tr nnUNetTrainerExt",
            "you can annotate whole volumes: dense labels were worth twice its gain",
        )
    ]


def _refusal(facts: DatasetFacts) -> str:
    """Why the trainer would refuse this dataset; empty if it would not."""
    plans = facts.plans
    try:
        require_volumes(plans.patch if plans else (2 if facts.is_2d or facts.configuration == "2d" else 3) * (1,),
                        facts.configuration)  # fmt: skip
        require_plain_labels({name: v[0] if len(v) == 1 else list(v) for name, v in facts.labels.items()}, facts.name)
    except ValueError as error:
        return str(error)
    if facts.configuration == "3d_cascade_fullres":
        return "the configuration is a cascade, and its networks have no input for the previous stage"
    return ""
