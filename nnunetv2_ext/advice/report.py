"""The advice of the house and of every method on one dataset, as text and as JSON."""

import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from nnunetv2_ext import __version__
from nnunetv2_ext.advice.general import general
from nnunetv2_ext.core.outside import Advice, load, methods
from nnunetv2_ext.data.case import by
from nnunetv2_ext.data.facts import DatasetFacts

WIDTH = 110
HOUSE = "nnunetv2_ext"
TITLES = {"fix": "Before anything else", "run": "Run", "skip": "Not worth running here"}
Said = Sequence[tuple[str, Advice]]  # who says so, a method's name or `HOUSE`, and what


def all_advice(facts: DatasetFacts) -> list[tuple[str, Advice]]:
    """Of the house, then of each method by name; what to fix first stands first."""
    found = [(HOUSE, advice) for advice in general(facts)]
    for method in methods().values():
        if method.advice:
            found += [(method.name, advice) for advice in load(method.advice)(facts)]
    return sorted(found, key=lambda one: list(TITLES).index(one[1].kind))


def as_dict(facts: DatasetFacts, said: Said) -> dict[str, Any]:
    """For ``--json``. Keys are added in later versions, and none is taken away."""
    plans = facts.plans
    return {
        "nnunetv2_ext": __version__,
        "dataset": facts.name,
        "configuration": facts.configuration,
        "facts": {
            "cases": len(facts.cases),
            "labels_read": len(facts.read),
            "unlabelled_of_read": facts.unlabelled,
            "images_without_label": len(facts.without_label),
            "test_cases": facts.test_cases,
            "subjects": len(set(facts.subjects.values())) if facts.subjects else None,
            "labels": {name: list(values) for name, values in facts.labels.items()},
            "ignore": facts.ignore,
            "annotation": facts.pattern,
            "channels": list(facts.channels),
            "shape": list(facts.shape),
            "spacing": list(facts.spacing),
            "mirrored": [pair._asdict() for pair in facts.mirrored],
            "plans": None if plans is None else {**plans._asdict()},
            "folds": len(facts.split) or None,
            "trained": [trained._asdict() for trained in facts.trained],
        },
        "advice": [{"from": source, **asdict(advice)} for source, advice in said],
    }


def as_text(facts: DatasetFacts, said: Said) -> str:
    """A few lines of what was seen, and the advice with its reasons."""
    lines = [f"{facts.name}, {facts.configuration}", *(_row(*row) for row in _seen(facts))]
    for kind, title in TITLES.items():
        of_kind = [advice for _, advice in said if advice.kind == kind]
        lines += ["", title] if of_kind else []
        for advice in of_kind:
            lines += _wrapped(advice.run, "- ", "  ")
            lines += _wrapped(f"why: {advice.reason}")
            lines += [f"      {command}" for command in advice.commands]  # not wrapped: it is copied
            lines += _wrapped(f"beside it: {advice.control}") if advice.control else []
            lines += _wrapped(f"not when: {advice.not_when}") if advice.not_when else []
    return "\n".join(lines)


def _seen(facts: DatasetFacts) -> list[tuple[str, str]]:
    """What the advice rests on, in rows."""
    subjects = f"{facts.number_of_subjects} subjects" if facts.subjects else "subjects are not recorded"
    of_read = "" if len(facts.read) == len(facts.cases) else f"; {len(facts.read)} label maps were read"
    without = f", {facts.unlabelled} of them without any annotation" if facts.unlabelled else ""
    elsewhere = f"{facts.test_cases} in imagesTs" + (
        f", {len(facts.without_label)} in imagesTr without a label" if facts.without_label else ""
    )
    elsewhere += f", {facts.plans.pool} in the pool" if facts.plans and facts.plans.pool else ""
    patterns = {
        "dense": "every voxel",
        "slices": "a few whole slices a volume, the rest ignored",
        "scattered": "parts of a volume, the rest ignored",
        "none": "nothing",
    }
    shape, spacing = (of[1:] if facts.is_2d else of for of in (facts.shape, facts.spacing))
    images = (
        f"{by(shape)} voxels of {by([round(s, 3) for s in spacing])} mm (median, {'y x' if facts.is_2d else 'z y x'})"
    )
    rows = [
        ("cases", f"{len(facts.cases)} with a label{without}; {subjects}{of_read}"),
        ("other images", elsewhere),
        ("labels", ", ".join(facts.labels) + (", ignore" if facts.ignore is not None else "")),
        ("annotated", patterns[facts.pattern]),
        ("images", images),
        ("channels", ", ".join(facts.channels)),
    ]
    if plans := facts.plans:
        sizes = f"patch {by(plans.patch)} of a median image of {by([round(n) for n in plans.image])}"
        rows.append(("plans", f"{plans.name}: {sizes}, batch {plans.batch_size}"))
    else:
        rows.append(("plans", "none yet"))
    for trained in facts.trained:
        folds = f"finished: {' '.join(trained.finished) or 'none'}"
        folds += f"; unfinished: {' '.join(trained.unfinished)}" if trained.unfinished else ""
        rows.append(("trained", f"{trained.trainer}, {trained.plans}, {trained.configuration}; {folds}"))
    return rows


def _row(name: str, text: str) -> str:
    return textwrap.fill(f"  {name:<14}{text}", WIDTH, subsequent_indent=" " * 16, break_on_hyphens=False)


def _wrapped(text: str, first: str = "    ", later: str = "      ") -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=later, break_on_hyphens=False,
                         break_long_words=False)  # fmt: skip
