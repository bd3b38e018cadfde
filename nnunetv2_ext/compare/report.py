"""A comparison as text for the terminal, as markdown, JSON and CSV, and everything written to a folder."""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from nnunetv2_ext import __version__
from nnunetv2_ext.compare import curves, pictures, plots
from nnunetv2_ext.compare.arms import differing_facts
from nnunetv2_ext.compare.groups import GroupDifferences
from nnunetv2_ext.compare.runs import TRAINING_FACTS
from nnunetv2_ext.compare.scores import COMMON_RULE, Scores
from nnunetv2_ext.compare.statistics import Difference, headline, verdict
from nnunetv2_ext.core.files import atomic_write_text
from nnunetv2_ext.evaluate.groups import caution, count_groups, figures_grid, gaps_grid
from nnunetv2_ext.evaluate.intervals import RESAMPLES, signed
from nnunetv2_ext.evaluate.metrics import INVENTED, MISSED
from nnunetv2_ext.evaluate.table import as_csv, as_json, count_states, definitions, grid, number, relaxations, summarise

# beside the method: what a fair comparison keeps the same
_OUGHT_TO_BE_EQUAL = (*TRAINING_FACTS, "mirroring")


@dataclass
class Report:
    """Everything that goes into the files."""

    title: str  # dataset, configuration, plans, arms
    scores: Scores
    differences: Sequence[Difference]  # of statistics.all_differences
    notes: list[str]  # warnings for the reader
    command: str  # that repeats this
    date: str  # ISO
    groups: GroupDifferences | None = None
    pictures: dict[str, str] = field(default_factory=dict)  # file name to caption, of the plots that were written
    extremes: dict[str, tuple[list[str], list[str]]] = field(default_factory=dict)  # arm: cases that lost, gained most

    def answered(self, arm: str) -> list[Difference]:
        """Of each metric the mean over structures: the figures that were fixed before looking."""
        return [d for d in self.differences if d.arm == arm and d.structure == self.scores.columns[-1]]

    @property
    def primary(self) -> list[Difference]:
        """The first metric's of each arm: the one that decides."""
        return [self.answered(arm.name)[0] for arm in self.scores.arms[1:]]

    def answers(self) -> dict[str, list[str]]:
        """By arm: all metrics in one sentence, then a verdict on each."""
        found = {d.arm: self.answered(d.arm) for d in self.primary}
        return {
            a: [f"{a} against {some[0].first}: {headline(some)}.", *map(verdict, some)] for a, some in found.items()
        }


def as_markdown(report: Report) -> str:
    return "\n\n".join([as_text(report), *_details(report)]) + "\n"


def as_text(report: Report) -> str:
    """What the terminal shows: the answer, scores and paired differences."""
    scores = report.scores
    answer = []
    for sentence, *verdicts in report.answers().values():
        answer += [f"- **{sentence}**", *(f"  - {one}" for one in verdicts)]
    answer += [f"- {caution}" for caution in cautions(scores)]
    folds = list(scores.per_case["fold"].unique())
    what = ("test cases", "repeats") if folds == ["test"] else (f"cases, fold {', '.join(folds)}", "repeated trainings")
    repeats = ", ".join(f"{arm.name}: {len(arm.repeats)}" for arm in scores.arms)
    first = next(iter(scores.metrics.values()))
    summary, counts = summarise(scores.averaged), count_states(scores.table)
    table = [["structure", "method", *(m.title for m in scores.metrics.values()), MISSED, INVENTED]]
    for structure, arm in itertools.product(scores.columns, scores.arms):
        shown = [summary[arm.name, key, structure] for key in scores.metrics]
        cells = [f"{number(s['mean'])} ± {number(s['sd'])}" for s in shown]
        cells += [f"{counts.get((arm.name, structure, s), 0) / len(arm.repeats):g}" for s in (MISSED, INVENTED)]
        table.append([structure, arm.name, *cells])
    parts = [
        f"# {report.title}",
        f"{len(scores.cases)} {what[0]}; {what[1]}: {repeats}; {report.date}",
        f"## Answer ({scores.columns[-1]}; {first.name} decides, the rest is detail)",
        "\n".join(answer),
        "\n".join(f"- Note: {note.removesuffix('.')}." for note in [*report.notes, *relaxations(scores)]),
        "## Scores (mean ± SD over cases, each averaged over repeats)",
        grid(table, left=2),
        "## Paired differences",
        differences_grid({"": report.differences}),
        *_group_sections(report),
    ]
    return "\n\n".join(part for part in parts if part)


def differences_grid(by_group: Mapping[str, Sequence[Difference]]) -> str:
    """Differences as a markdown table, with a column for their group unless that has no name."""
    named = any(by_group)
    unit = next(iter(by_group.values()))[0].unit
    rows = [["metric", "method", "structure", *["group"] * named, "difference", f"95 % over {unit}", "cases",
             "better : worse", "reading"]]  # fmt: skip
    for group, differences in by_group.items():
        for d in differences:
            wins = f"{d.wins} : {d.losses}" + (f" ({d.ties} equal)" if d.ties else "")
            cells = [signed(d.mean), str(d.interval), str(d.n), wins, d.direction]
            rows.append([d.metric.title, d.arm, d.structure, *[group] * named, *cells])
    return grid(rows, left=3 + named)


def _group_sections(report: Report) -> list[str]:
    """Scores, paired differences and differences between groups, if cases are grouped; words first."""
    if (by := report.groups) is None:
        return []
    scores, unit, last = report.scores, by.groups.unit, report.scores.columns[-1]
    answers = [line for head, lines in by.answers(last) for line in (f"- {head}", *(f"  - {one}" for one in lines))]
    repeats = {arm.name: len(arm.repeats) for arm in scores.arms}
    counts = {key: count / repeats[key[0]] for key, count in count_groups(scores.table).items()}
    gains = by.gain_gaps.assign(arm=by.gain_gaps["arm"] + f" minus {scores.first}")
    return [
        f"## Groups by {by.groups.column} ({last})",
        "\n".join(answers),
        figures_grid(by.figures, scores.metrics, counts, unit),
        "### Paired differences within groups",
        differences_grid(by.within),
        "### Differences between groups",
        gaps_grid(pd.concat([gains, by.gaps]), scores.metrics, unit),
        caution(unit),
    ]


def cautions(scores: Scores) -> list[str]:
    """What a reader of the answer alone must know: structures that were never found, unequal settings, sparse truth."""
    lines = []
    key, metric = next(iter(scores.metrics.items()))
    for structure in [s.name for s in scores.source.labels.structures] if metric.higher_is_better else []:
        best = scores.case_scores(key, structure).max()
        if never := list(best.index[~(best > 0)]):
            lines.append(
                f"**{structure} was found in no case by {', '.join(never)}**: trainings that have not learned "
                "a structure yet say little about methods; train longer."
            )
    unequal = [key for key in differing_facts(scores.arms) if key in _OUGHT_TO_BE_EQUAL]
    if unequal:
        lines.append(f"The trainings differ in {', '.join(unequal)} as well, which may explain a difference (below).")
    if scores.source.labels.ignore is not None:
        lines.append(
            "Voxels that the truth marks as ignore were not scored; --predictions with a dense --truth scores all."
        )
    return lines


def _details(report: Report) -> list[str]:
    scores, facts = report.scores, differing_facts(report.scores.arms)
    repeats = [["method", "differences by repeat", "95 % over repeats", "differences by fold"]]
    for d in report.primary:
        texts = [", ".join(f"{k}: {signed(v)}" for k, v in some.items()) for some in (d.by_repeat, d.by_fold)]
        repeats.append([d.arm, texts[0], str(d.repeat_interval), texts[1]])
    remark = "The interval over repeats is Student's t on these figures; with two repeats it is very wide."
    if all(len(d.by_repeat) < 2 for d in report.primary):
        remark = "One training each: how much a repeated training would change the result was not measured."
    elif all(d.paired_repeats for d in report.primary):
        remark = f"Repeats of the same name are paired. {remark}"
    else:
        how = "Repeats have no common names: each one minus the first method's average, interval by Welch's t."
        remark = f"{how} {remark}"
    parts = ["## Repeated trainings and folds", grid(repeats), remark, "## How the trainings differ"]
    rows = [["setting", *(arm.name for arm in scores.arms)], *([key, *values] for key, values in facts.items())]
    hours = [curves.training_hours(arm) for arm in scores.arms]
    if any(map(math.isfinite, hours)):
        rows.append(["hours per fold", *("-" if not math.isfinite(h) else f"{h:.2g}" for h in hours)])
    parts.append(grid(rows) if len(rows) > 1 else "They have the same settings, as far as the result folders tell.")
    if any(run.settings for arm in scores.arms for run in arm.runs()):
        parts.append("Settings that only one kind of trainer has are in each fold's nnunetv2_ext_settings.yaml.")
    if report.extremes:
        names = {arm: [", ".join(some) or "no case" for some in both] for arm, both in report.extremes.items()}
        lines = [f"- {arm} lost most in {lost}; gained most in {gained}." for arm, (lost, gained) in names.items()]
        parts += ["## Cases that differ most", "\n".join(lines)]
    if report.pictures:
        parts += ["## Pictures", "\n\n".join(f"![{text}]({name})\n\n{text}" for name, text in report.pictures.items())]
    folders = [f"- {arm.name}, {r.label}: {', '.join(str(run.predictions) for run in r.folds.values())}"
               for arm in scores.arms for r in arm.repeats]  # fmt: skip
    return [
        *parts, "## How to read this", "\n".join(f"- {line}" for line in reading(report)),
        "## Made of", "\n".join(folders), f"nnunetv2-ext {__version__}, {report.date}:\n\n    {report.command}",
    ]  # fmt: skip


def reading(report: Report) -> list[str]:
    """What the figures mean and what they do not."""
    scores = report.scores
    first = next(iter(scores.metrics.values()))
    unit = report.differences[0].unit
    dependent = "Cases of one patient, or validated" if unit == "cases" else "Subjects validated"
    return [
        f"Differences are method minus {scores.first}, case by case. The paired unit is the case: its score is first "
        "averaged over repeated trainings, so more seeds do not count as more patients.",
        f"The interval is a bootstrap over {unit} of {scores.columns[-1]} and of each structure (BCa, {RESAMPLES} "
        "draws, scipy.stats.bootstrap, fixed seed; a subject is drawn with all of its cases). It tells what other "
        "patients of the same kind would give with these trained networks, and does not know that a repeated training "
        "gives other networks; that is the interval over repeats.",
        f"{dependent} by the same fold's network, are not quite independent; the interval is then somewhat too narrow.",
        f"There are {len(report.differences)} intervals here, each 95 %, not corrected for their number: about one in "
        f"twenty misses by chance. {first.name} of {scores.columns[-1]} decides; take the others as hints.",
        "A difference beyond chance may still be too small to matter; judge its size in the scores' units.",
        "Validation cases that were used to choose settings favour the method they were chosen for; a test set "
        "does not.",
        "Missed: empty in the prediction only; invented: empty in the truth only; numbers per repeat.",
        COMMON_RULE + ".",
        *(line for line in definitions(scores) if not line.startswith("Spread")),
    ]


def write(report: Report, output: Path, images: Path | None = None, worst: int = 3) -> None:
    """All files of a comparison; pictures first, as the report gains their names and the extreme cases."""
    scores = report.scores
    folds = list(scores.per_case["fold"].unique())
    heading = report.title if folds == ["test"] else f"{report.title}; fold {', '.join(folds)}"
    plots.draw_differences(scores, report.differences, output / "differences.png", heading)
    report.pictures["differences.png"] = "Differences case by case, with their means and 95 % intervals"
    plots.draw_boxes(scores, output / "boxes.png", heading)
    report.pictures["boxes.png"] = "Scores of all cases"
    if curves.draw(scores.arms, output / "curves.png", plots.colours(scores), heading):
        report.pictures["curves.png"] = "Learning curves; thin lines: single trainings, thick: their mean"
    for d in report.primary if worst else ():
        file = f"cases_{re.sub(r'[^A-Za-z0-9_.-]+', '_', d.arm)}.png"
        report.extremes[d.arm] = pictures.draw_cases(scores, d, output / file, images, worst, heading)
        if any(report.extremes[d.arm]):
            report.pictures[file] = f"Cases in which {d.arm} lost and gained most against {d.first}"
    atomic_write_text(output / "comparison.json", as_json(as_dict(report)))
    atomic_write_text(output / "cases.csv", as_csv(scores))
    atomic_write_text(output / "differences.csv", differences_csv(report))
    atomic_write_text(output / "report.md", as_markdown(report))


def as_dict(report: Report) -> dict[str, Any]:
    scores = report.scores
    summary = summarise(scores.averaged)
    shown = ("n", "mean", "sd", "median", "worst")
    return {
        "title": report.title,
        "date": report.date,
        "command": report.command,
        "nnunetv2_ext": __version__,
        "notes": report.notes,
        "structures": {s.key: s.name for s in scores.source.labels.structures},
        "tolerance_mm": dict(scores.source.rules.tolerance),
        "reading": reading(report),
        "cases": len(scores.cases),
        "arms": [
            {
                "name": arm.name,
                "trainer": arm.trainer,
                "repeats": {r.label: {f: str(run.predictions) for f, run in r.folds.items()} for r in arm.repeats},
                "scores": {
                    m.name: {c: {k: summary[arm.name, key, c][k] for k in shown} for c in scores.columns}
                    for key, m in scores.metrics.items()
                },
            }
            for arm in scores.arms
        ],
        "differing_settings": differing_facts(scores.arms),
        "differences": [_difference(d) for d in report.differences],
        "answers": [" ".join(sentences) for sentences in report.answers().values()],
        "by_groups": _groups(report),
        "extremes": {name: {"lost": lost, "gained": gained} for name, (lost, gained) in report.extremes.items()},
    }


def _groups(report: Report) -> dict[str, Any] | None:
    if (by := report.groups) is None:
        return None
    within = {group: [_difference(d) for d in some] for group, some in by.within.items()}
    return {**by.as_dict(report.scores.columns[-1]), "within": within}


def _difference(d: Difference) -> dict[str, Any]:
    return {
        "method": d.arm, "reference": d.first, "metric": d.metric.name, "structure": d.structure, "mean": d.mean,
        "interval_over_cases": [d.interval.low, d.interval.high], "resampled": d.unit, "number_resampled": d.units,
        "cases": d.n, "better": d.wins, "worse": d.losses, "equal": d.ties, "reading": d.direction,
        "by_repeat": d.by_repeat, "repeats_paired": d.paired_repeats, "pairs_of_trainings": d.agreeing[0],
        "pairs_that_agree": d.agreeing[1], "interval_over_repeats": [d.repeat_interval.low, d.repeat_interval.high],
        "by_fold": d.by_fold,
    }  # fmt: skip


def differences_csv(report: Report) -> str:
    """One row per method, metric, structure and case: the pairs behind every interval."""
    parts = []
    for d in report.differences:
        both = report.scores.case_scores(d.key, d.structure)
        pairs = {"value": both[d.arm], "reference": both[d.first], "difference": d.per_case}
        about = report.scores.per_case.assign(method=d.arm, metric=d.metric.name, structure=d.structure, **pairs)
        parts.append(about.rename_axis("case").reset_index())
    table = pd.concat(parts, ignore_index=True)
    head = ["method", "metric", "structure", "case", "fold", *pairs]
    return table[[*head, *(c for c in table if c not in head)]].to_csv(index=False, lineterminator="\n")
