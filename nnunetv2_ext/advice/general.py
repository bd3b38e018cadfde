"""Rules about any dataset: what to fix first, plain nnU-Net used well, mirroring, subjects, configurations.

A rule states its reason: what nnU-Net's code or documentation says, or what was measured (docs/results.md).
"""

import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from nnunetv2.configuration import ANISO_THRESHOLD

from nnunetv2_ext.core.outside import Advice
from nnunetv2_ext.data.channels import SCALED, are_colours
from nnunetv2_ext.data.facts import DatasetFacts, Trained

_PLAIN = "nnUNetTrainer"
_RESENC = "nnUNetResEncUNetLPlans"
_FOLDS = 5  # of nnU-Net's split, which needs as many cases
_FEW_SUBJECTS = 20  # the gain of a start was measured with 3 and 5


def general(facts: DatasetFacts) -> list[Advice]:
    """What holds whatever the method."""
    rules = (_files, _absent, _intensities, _colours, _subjects, _plain, _mirroring, _slices, _resolution, _start)
    return [advice for rule in rules for advice in rule(facts)]


def _files(facts: DatasetFacts) -> list[Advice]:
    found = [Advice("fix", problem, "planning or training stops on it") for problem in facts.problems]
    if facts.pattern == "none":
        found.append(Advice("fix", "annotate some voxels", "no label map that was read holds any annotation"))
    if facts.without_label:
        example = facts.without_label[0]
        found.append(
            Advice(
                "fix",
                f"move {len(facts.without_label)} cases without a label (e.g. {example}) from imagesTr to imagesTs, "
                "and lower numTraining",
                "nnU-Net takes every image in imagesTr for a training case and stops where its label is missing",
            )
        )
    return found


def _absent(facts: DatasetFacts) -> list[Advice]:
    """A structure that is named and drawn nowhere."""
    found = {value for label in facts.read.values() for value in label.values}
    absent = [name for name, values in facts.labels.items() if not found & {*values} - {0} and any(values)]
    if not found or not absent:
        return []
    others = "" if len(facts.read) == len(facts.cases) else "; --cases 0 reads all"
    return [
        Advice(
            "fix",
            f"take {', '.join(absent)} out of dataset.json, or add cases that have it",
            f"none of the {len(facts.read)} label maps that were read has it, and a training learns that it never "
            f"occurs{others}",
            not_when="these cases are a second site, to which a finished model is adapted: that site need not draw all",
        )
    ]


def _intensities(facts: DatasetFacts) -> list[Advice]:
    """CT with an ignore label: nnU-Net's fingerprint counts ignored voxels as foreground (data/fingerprint.py)."""
    is_ct = facts.ignore is not None and any(name.casefold() == "ct" for name in facts.channels)
    if not is_ct or (facts.plans and not facts.plans.wrong_intensities):
        return []
    return [
        Advice(
            "fix",
            "correct the CT intensities after planning, before preprocessing",
            "nnU-Net counts ignored voxels as foreground: on a CT phantom the percentiles 70 and 148 HU became -1036 "
            "and 118 HU",
            (
                f"nnUNetv2_plan_and_preprocess -d {facts.id} --no_pp",
                f"nnUNetv2_ext fix-fingerprint -d {facts.id}",
                f"nnUNetv2_preprocess -d {facts.id} -c {facts.configuration}",
            ),
        )
    ]


def _colours(facts: DatasetFacts) -> list[Advice]:
    if not are_colours(facts.channels) or all(name == SCALED for name in facts.channels):
        return []
    return [
        Advice(
            "fix",
            f"name the colour channels {SCALED} in dataset.json, then plan again",
            f"nnU-Net z-scores channels of any other name image by image, {', '.join(facts.channels)} too; {SCALED} "
            "divides by 255 and keeps colours comparable between images",
            not_when="values are not 0 to 255",
        )
    ]


def _subjects(facts: DatasetFacts) -> list[Advice]:
    """Cases of one patient in training and validation make the validation too good."""
    if facts.subjects is None and facts.suggested is None:
        return []
    if facts.split and not facts.divided:
        return []
    reason = "cases of one subject in training and validation make the validation look better than it is"
    steps = []
    if facts.split:
        reason += "; splits_final.json divides them"
        steps.append(f"rm $nnUNet_preprocessed/{facts.name}/splits_final.json")
    settings = ""
    if facts.suggested is not None:
        what = f"say which cases are of one subject: {facts.suggested}"
        settings = f"nnUNet_ext_settings={shlex.quote(f'group_regex={facts.suggested.regex}')} "
    elif facts.split:
        what = "split again: dataset.json records which cases are of one subject"
    else:
        return []  # our trainers write a split by the record; nothing has to be done
    plans, _ = _plans_of_plain(facts)
    steps += _plan(facts, plans)
    steps.append(f"{settings}nnUNetv2_train {facts.id} {facts.configuration} 0 -p {plans} -tr nnUNetTrainerExt")
    not_when = "the names mean something else" if facts.suggested else ""
    return [
        Advice(
            "fix",
            what,
            f"{reason}; the first training writes a split that keeps them whole, for every trainer",
            tuple(steps),
            not_when=not_when,
        )
    ]


def _plain(facts: DatasetFacts) -> list[Advice]:
    """Plain nnU-Net on every fold: whatever is tried must beat this."""
    control = "none: it is the control of everything else"
    plans, trained = _plans_of_plain(facts)
    if trained is not None:
        finished, began = set(trained.finished), set(trained.unfinished)
        rest = [fold for fold in _folds(facts) if fold not in finished]
        where = f"{_PLAIN} with {plans}, {facts.configuration}"
        if not rest:
            reason = f"{where} has finished {', '.join(sorted(finished))}: take it as the baseline"
            commands = [_find_best(facts, plans)] if len(finished) > 1 else []
            return [Advice("run", "keep the plain nnU-Net that is trained", reason, tuple(commands), control)]
        reason = f"{where} has finished {', '.join(sorted(finished)) or 'no fold'}"
        continued = [fold for fold in rest if fold in began]
        reason += f"; {', '.join(continued)} began, and --c continues" if continued else ""
        commands = _train(facts, continued, f"-p {plans} --npz --c")
        commands += _train(facts, [fold for fold in rest if fold not in began], f"-p {plans} --npz")
        return [Advice("run", "finish the folds of plain nnU-Net", reason, tuple(commands), control)]
    commands = _plan(facts, plans)
    reason = "nnU-Net's documentation recommends residual encoder plans (L is planned for 24 GB of GPU memory)"
    if _folds(facts) == ["all"]:
        reason += f"; {facts.number_of_subjects} {'subjects' if facts.subjects else 'cases'} make no five folds"
    if facts.ignore is not None:
        reason += "; its losses leave the ignore label out"
    commands += _train(facts, _folds(facts), f"-p {plans} --npz")
    commands += [_find_best(facts, plans)] if len(_folds(facts)) > 1 else []
    what = "plain nnU-Net, used well: the baseline to beat"
    control = "the default plans, nnUNetPlans: ResEnc was not measured here"
    return [Advice("run", what, reason, tuple(commands), control, "the GPU has less memory: nnUNetPlannerResEncM")]


def _plans_of_plain(facts: DatasetFacts) -> tuple[str, Trained | None]:
    """The plans that plain nnU-Net is trained with: those it has most folds of, else ResEnc L."""
    there = [t for t in facts.trained if (t.trainer, t.configuration) == (_PLAIN, facts.configuration)]
    best = max(there, key=lambda t: len(t.finished), default=None)
    return (best.plans, best) if best else (_RESENC, None)


def _plan(facts: DatasetFacts, plans: str) -> list[str]:
    """The line that plans and preprocesses for plain nnU-Net; none where that is done."""
    if plans != _RESENC or (facts.plans and facts.plans.name == plans and facts.plans.preprocessed):
        return []
    return [f"nnUNetv2_plan_and_preprocess -d {facts.id} -c {facts.configuration} -pl nnUNetPlannerResEncL"]


def _folds(facts: DatasetFacts) -> list[str]:
    """Of the split, or of the one nnU-Net will write; ``all`` where there are too few cases for one."""
    if not facts.split and facts.number_of_subjects < _FOLDS:
        return ["all"]
    return [str(fold) for fold in range(len(facts.split) or _FOLDS)]


def _train(facts: DatasetFacts, folds: Sequence[str], options: str, configuration: str = "") -> list[str]:
    """A line that trains plain nnU-Net on these folds; none without a fold."""
    line = f"nnUNetv2_train {facts.id} {configuration or facts.configuration}"
    if len(folds) < 2:
        return [f"{line} {fold} {options}" for fold in folds]
    return [f"for f in {' '.join(folds)}; do {line} $f {options}; done"]


def _find_best(facts: DatasetFacts, plans: str, *configurations: str) -> str:
    names = " ".join([facts.configuration, *configurations])
    return f"nnUNetv2_find_best_configuration {facts.id} -c {names} -p {plans}"


def _mirroring(facts: DatasetFacts) -> list[Advice]:
    if not facts.mirrored:
        return []
    shown = "; ".join(map(str, facts.mirrored[:3]))
    more = f"; and {len(facts.mirrored) - 3} pairs more" if len(facts.mirrored) > 3 else ""
    train = f"nnUNetv2_train {facts.id} {facts.configuration} 0 -p {_plans_of_plain(facts)[0]} -tr nnUNetTrainerExt"
    return [
        Advice(
            "run",
            "training without mirroring",
            f"{shown}{more}. Mirrored patches make such labels look alike; on hippocampus mirroring cost 0.2 Dice "
            "(0.67 against 0.87) in short runs of 800 steps, one seed",
            (f'nnUNet_ext_settings="mirroring=false" {train}',),
            f"the same with mirroring, in a results folder of its own: {train}",
            "images lie in different orientations, so that no side can be told from the array",
        )
    ]


def _slices(facts: DatasetFacts) -> list[Advice]:
    """nnU-Net's own threshold of anisotropy, from which on it also treats axes differently."""
    if facts.anisotropy < ANISO_THRESHOLD or facts.configuration == "2d":
        return []
    plans, _ = _plans_of_plain(facts)
    return [
        Advice(
            "run",
            "the 2d configuration beside the 3-D one",
            f"slices are {facts.anisotropy:.1f} times as thick as pixels are wide, above nnU-Net's threshold of "
            f"{ANISO_THRESHOLD}; find_best_configuration compares both on the same folds",
            (
                f"nnUNetv2_preprocess -d {facts.id} -plans_name {plans} -c 2d",
                *_train(facts, _folds(facts), f"-p {plans} --npz", "2d"),
                _find_best(facts, plans, "2d"),
            ),
            f"the same folds of {facts.configuration}",
        )
    ]


def _resolution(facts: DatasetFacts) -> list[Advice]:
    """nnU-Net plans 3d_lowres where a patch sees too little of the image."""
    plans = facts.plans
    if plans is None or facts.configuration != "3d_fullres" or "3d_lowres" not in plans.configurations:
        return []
    seen = math.prod(min(1.0, patch / image) for patch, image in zip(plans.patch, plans.image, strict=True))
    coarser = [name for name in ("3d_lowres", "3d_cascade_fullres") if name in plans.configurations]
    folds, options = _folds(facts), f"-p {plans.name} --npz"
    return [
        Advice(
            "run",
            f"{' and '.join(coarser)} beside 3d_fullres",
            f"a patch of 3d_fullres sees {seen:.0%} of the median image, for which nnU-Net planned coarser ones",
            (
                f"nnUNetv2_preprocess -d {facts.id} -plans_name {plans.name} -c 3d_lowres",
                *(line for name in coarser for line in _train(facts, folds, options, name)),
                _find_best(facts, plans.name, *coarser),
            ),
            "the same folds of 3d_fullres",
        )
    ]


def _start(facts: DatasetFacts) -> list[Advice]:
    """Somebody's weights of the same kind of image and of some of the structures, where cases are few."""
    if facts.number_of_subjects > _FEW_SUBJECTS:
        return []
    ours = set(facts.labels) - {"background"}
    for model in facts.elsewhere:
        common = sorted(ours & (set(model.labels) - {"background"}))
        if model.channels != facts.channels or model.configuration != facts.configuration or not common:
            continue
        file = shlex.quote(f"{model.folder}/fold_{model.fold}/checkpoint_final.pth")
        where = f"{facts.id} {facts.configuration} 0 -p nnUNetPlans_like -tr nnUNetTrainerExt"
        return [
            Advice(
                "run",
                f"a start from the finished model of {Path(model.folder).parent.name}, which knows {', '.join(common)}",
                "heart MRI, a start from a model of another scanner: +3 and +8 Dice points with 3 and 5 patients (a "
                "prototype, 800 steps, one seed); longer trainings gain less",
                (
                    f"nnUNetv2_ext plan-like {file} -d {facts.id}",
                    f"nnUNetv2_preprocess -d {facts.id} -plans_name nnUNetPlans_like -c {facts.configuration}",
                    f'nnUNet_ext_settings="init_from={file}" nnUNetv2_train {where}',
                ),
                f"nnUNetv2_train {where}, with as many steps as both trainings together",
                "the model is of another organ or another kind of image, whatever its labels are called",
            )
        ]
    return []
