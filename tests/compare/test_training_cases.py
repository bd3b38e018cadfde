"""Trainings of other training cases are refused, or compared with a note."""

import pytest

from nnunetv2_ext.compare.arms import Arm, make_arm, predictions_arm, require_same_training_cases
from nnunetv2_ext.data import find

ENDING = ".nii.gz"
PLAIN, OURS = "nnUNetTrainer", "nnUNetTrainerMedContext"


def arm(world, trainer: str, *results: str) -> Arm:
    models = [find.find_trainer(world.root / r, world.name, trainer, "nnUNetPlans", "3d_fullres") for r in results]
    return make_arm(trainer, [(model, ("0",)) for model in models], ENDING)


def trained(world, *settings: dict) -> list[Arm]:
    """Plain nnUNetTrainer, and ours with these settings, a repeat each."""
    for number, some in enumerate(settings):
        world.train(OURS, results=f"r{number}", settings=some)
    world.train(PLAIN, results="r0")
    return [arm(world, PLAIN, "r0"), arm(world, OURS, *[f"r{n}" for n in range(len(settings))])]


@pytest.mark.parametrize(
    ("settings", "described"),
    [
        ([{"train_cases": 5}], "5 of draw 0"),
        ([{"train_cases": 5, "train_cases_seed": 2}, {"train_cases": 5}], "5 of draw 0 / 5 of draw 2"),
        ([{"train_cases": ["x", "w"]}], "cases w, x"),
        ([{"train_cases": None}, {"train_cases": 5}], "5 of draw 0 / all"),
    ],
)
def test_fewer_training_cases_than_the_plain_trainer(world, settings, described: str) -> None:
    arms = trained(world, *settings)
    with pytest.raises(ValueError, match=r"training cases differ .*--allow-different-training-cases$") as caught:
        require_same_training_cases(arms)
    assert f"({PLAIN}: all; {OURS}: {described})" in str(caught.value) and "\n" not in str(caught.value)
    (note,) = require_same_training_cases(arms, allowed=True)
    assert f"training cases differ ({PLAIN}: all; {OURS}: {described})" in note


@pytest.mark.parametrize("settings", [{}, {"train_cases": None, "train_cases_seed": 3}])
def test_all_cases_are_all_cases_whoever_says_so(world, settings: dict) -> None:
    assert require_same_training_cases(trained(world, settings)) == []


def test_the_same_few_cases_and_another_draw_of_them(world) -> None:
    few = {"train_cases": 5, "medcontext.beta": 0.0}
    for seed in (0, 1):
        world.train(OURS, results=f"r{seed}", settings=few | {"train_cases_seed": seed, "seed": seed})
    arms = [arm(world, OURS, "r0", "r1"), arm(world, OURS, "r1", "r0")]
    assert require_same_training_cases(arms) == []
    with pytest.raises(ValueError, match=r"5 of draw 0; .*5 of draw 1"):
        require_same_training_cases([arm(world, OURS, "r0"), arm(world, OURS, "r1")])


def test_what_predictions_come_from_is_not_known(world) -> None:
    folder = world.train(PLAIN) / "fold_0" / "validation"
    arms = [predictions_arm(name, [folder], ENDING) for name in "ab"]
    assert "do not tell" in require_same_training_cases(arms)[0]
