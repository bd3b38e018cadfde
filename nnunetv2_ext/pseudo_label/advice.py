"""What to do first with scans that nobody has labelled. Figures: docs/methods/pseudo-label.md, a prototype only."""

from itertools import chain

from nnunetv2_ext.core.outside import Advice
from nnunetv2_ext.data.facts import DatasetFacts, PlansFacts, Trained
from nnunetv2_ext.data.find import datasets_of_id

_MANY = 0.5  # share of the label maps that were read
_UNKNOWN = (
    "whether unlabelled scans pay on nnU-Net is not measured at convergence: pseudo-labels made in the training were "
    "+1.8 and -1.5 Dice points against plain nnU-Net with twice the steps (a prototype, 500 steps), which is nothing"
)


def advice(facts: DatasetFacts) -> list[Advice]:
    """With a pool, or with many cases that hold nothing but the ignore label."""
    if facts.plans is not None and facts.plans.pool:
        return [_of_pool(facts, facts.plans)]
    if facts.pattern == "none" or facts.unlabelled < _MANY * len(facts.read):
        return []
    plans = facts.plans.name if facts.plans else "nnUNetPlans"
    return [
        Advice(
            "run",
            "a pool of the cases without any annotation: move their images to a folder, remove their label maps, lower "
            "numTraining, plan and preprocess again",
            f"{facts.unlabelled} of {len(facts.read)} label maps teach plain nnU-Net nothing; in a pool pseudo-label "
            f"and nnUNetTrainerWTBCP can take their images. But {_UNKNOWN}",
            (f"nnUNetv2_ext unlabelled -d {facts.id} -c {facts.configuration} -p {plans} -i FOLDER",),
            "plain nnU-Net with twice the steps",
            "you train nnUNetTrainerRADA, which takes such cases as they are",
        )
    ]


def _of_pool(facts: DatasetFacts, plans: PlansFacts) -> Advice:
    there = [t for t in facts.trained if (t.plans, t.configuration) == (plans.name, facts.configuration) and t.finished]
    model = max(there, key=lambda t: (t.trainer == "nnUNetTrainer", len(t.finished)), default=None)
    return Advice(
        "run",
        f"pseudo-label, the control of whatever learns from the pool's {plans.pool} scans",
        _UNKNOWN + ("" if model else "; it needs a finished fold of plain nnU-Net with these plans"),
        _commands(facts, model) if model else (),
        f"plain nnU-Net with twice the steps: nnUNet_ext_settings=num_epochs=2000 nnUNetv2_train {facts.id} "
        f"{facts.configuration} 0 -p {plans.name} -tr nnUNetTrainerExt",
        "the scans are of another site or contrast, where the model is confidently wrong: adapt takes a few labels",
    )


def _commands(facts: DatasetFacts, model: Trained) -> tuple[str, ...]:
    """From the first finished fold to a training on its labels; a fold of its own keeps the validation honest."""
    new = next(n for n in chain(range(facts.id + 100, 1000), range(1, 1000)) if not datasets_of_id(n))
    fold, of_plans = model.finished[0], f"{model.plans} -c {model.configuration}"
    folder = f"$nnUNet_results/{facts.name}/{model.trainer}__{model.plans}__{model.configuration}"
    return (
        f"nnUNetv2_ext pseudo-label -d {facts.id} -m {folder} -o {new} -f {fold}",
        f"nnUNetv2_preprocess -d {new} -plans_name {of_plans}",
        f"nnUNetv2_train {new} {model.configuration} {fold} -p {model.plans}",
    )
