"""Groups of cases (site, scanner, vendor): which case is in which, their figures, and the differences between them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from nnunetv2_ext.data.case_table import read_column
from nnunetv2_ext.data.subjects import BLOCK, pairs_suggested, recorded_subjects, subjects_of_dataset
from nnunetv2_ext.evaluate.folder import Evaluation, with_mean
from nnunetv2_ext.evaluate.intervals import TOO_FEW_CASES, Interval, bootstrap_interval, gap_interval, signed
from nnunetv2_ext.evaluate.metrics import INVENTED, METRICS, MISSED, Metric
from nnunetv2_ext.evaluate.pairs import listed
from nnunetv2_ext.evaluate.table import count_states, grid, number, summarise

OTHERS = "all others"


class Groups(NamedTuple):
    """What cases are grouped by."""

    column: str  # site, say
    of: Mapping[str, str]  # case to group
    subjects: Mapping[str, str] | None  # case to subject; None: not known, each case is its own

    @property
    def unit(self) -> str:
        """What the intervals draw."""
        return "cases" if self.subjects is None else "subjects"


def find_groups(
    by: str, contents: Iterable[Mapping[str, Any]], cases: Sequence[str], subjects: Mapping[str, str] | None
) -> Groups:
    """The groups that ``--by`` asks for: ``FILE:COLUMN``, or a name that one of the dataset.json records.

    The record is ``{"nnunetv2_ext": {"site": {"case": "group", ...}}}``. ValueError: neither is there, a case is
    without a group, all are in one, or a group has a single subject, from which there is no interval.
    """
    where, colon, column = by.rpartition(":")
    if not colon and (by.lower().endswith((".csv", ".tsv")) or Path(by).is_file()):
        raise ValueError(f"--by {by} names a table without a column: give --by {by}:COLUMN")
    if colon:
        if not Path(where).is_file():
            raise ValueError(f"--by {by}: the table {where or '(no name)'} does not exist; give --by FILE:COLUMN")
        entries = read_column(Path(where), column)
    else:
        where = "dataset.json"
        records = [record for content in contents if (record := (content.get(BLOCK) or {}).get(column))]
        if not records:
            raise ValueError(
                f"--by {by}: dataset.json does not record a {column} of its cases; give --by FILE:COLUMN, or write "
                f'"{BLOCK}": {{"{column}": {{"case": "group", ...}}}} into it'
            )
        record = max(records, key=lambda some: len(set(some) & set(cases)) if isinstance(some, Mapping) else 0)
        if not (isinstance(record, Mapping) and all(isinstance(g, (str, int)) for g in record.values())):
            raise ValueError(f'{column} in the block {BLOCK} of dataset.json must be one object {{"case": "group"}}')
        entries = {case: str(group) for case, group in record.items()}
    if without := sorted(case for case in cases if not entries.get(case)):
        raise ValueError(f"--by {by}: {where} gives no {column} for {listed(without)}: add it")
    groups = {case: entries[case] for case in cases}
    members: dict[str, list[str]] = {}
    for case, group in sorted(groups.items()):
        members.setdefault(group, []).append(case)
    if len(members) < 2:
        raise ValueError(
            f"--by {by}: all {len(cases)} cases have the {column} {next(iter(members))!r}, so there are no groups to "
            "compare: give another column, or leave --by out"
        )
    for group, some in sorted(members.items()):
        if len({subjects[case] if subjects else case for case in some}) < 2:
            unit = "subject" if subjects else "case"
            raise ValueError(
                f"--by {by}: the {column} {group!r} has one {unit} ({listed(some)}), and an interval needs two: give "
                f"it and another group one name in {where}"
            )
    return Groups(column, groups, subjects)


def find_subjects(
    cases: Sequence[str], contents: Iterable[Mapping[str, Any]], regex: str | None = None, table: Path | None = None
) -> tuple[dict[str, str] | None, list[str]]:
    """Case to subject if it is known, and a note where it is not and names look like pairs.

    By expression or table if one is given, else as the first dataset.json has it that knows one of the cases.
    ValueError: see ``data.subjects.subjects_of_dataset``.
    """
    if regex is not None or table is not None:
        return subjects_of_dataset({}, cases, regex, table), []
    for content in contents:
        if set(recorded_subjects(content) or ()) & set(cases):
            return subjects_of_dataset(content, cases), []
    if (pairs := pairs_suggested(cases)) is None:
        return None, []
    return None, [
        f"subjects are not known, so cases were resampled one by one; {pairs} (--group-regex; or --groups FILE). "
        "Cases of one subject make the interval too narrow"
    ]


def add_groups(frame: pd.DataFrame, groups: Groups) -> pd.DataFrame:
    """A table that has the column ``case``, with the column ``group`` and, where known, ``subject`` behind it."""
    known = {"group": groups.of} | ({} if groups.subjects is None else {"subject": groups.subjects})
    columns = {name: frame["case"].map(dict(of)) for name, of in known.items()}
    at = list(frame).index("case") + 1
    rest = [name for name in list(frame)[at:] if name not in columns]
    return frame.assign(**columns)[[*list(frame)[:at], *columns, *rest]]


def group_figures(table: pd.DataFrame) -> pd.DataFrame:
    """Distribution over the cases of each group, of a long table with the column ``group``.

    A row per arm if there are any, metric, structure and group: ``cases`` that count, ``units`` (their subjects, where
    the table has them), the figures of ``table.summarise``, and ``low, high``: the 95 % interval of the mean.
    """
    rows = []
    for group, part in table.groupby("group"):
        figures, keys = summarise(part), _keys(part)
        for key, some in part.dropna(subset="value").groupby(keys, sort=False):
            unit = _unit(some)
            low, high = bootstrap_interval(some["value"], unit)
            head = {**dict(zip(keys, key, strict=True)), "group": group, "cases": len(some), "units": unit.nunique()}
            rows.append({**head, **{k: v for k, v in figures[key].items() if k != "n"}, "low": low, "high": high})
    return pd.DataFrame(rows)


def gap_figures(table: pd.DataFrame) -> pd.DataFrame:
    """Mean of each group's cases minus that of the other cases, of a long table with the column ``group``.

    A row per arm if there are any, metric, structure and group: ``other`` (the other group or ``OTHERS``),
    ``difference``, its 95 % interval ``low, high``, and ``fewest``, the subjects on the side that has fewer. Of two
    groups the second alone has a row.
    """
    groups, keys, rows = sorted(table["group"].unique()), _keys(table), []
    for key, some in table.dropna(subset="value").groupby(keys, sort=False):
        for group in groups[1:] if len(groups) == 2 else groups:
            unit, others = _unit(some), some["group"] != group
            sides = some["value"].groupby(others).mean()
            difference = float(sides.get(False, math.nan) - sides.get(True, math.nan))
            low, high = gap_interval(some["value"], others, unit)
            fewest = min(unit[side].nunique() for side in (others, ~others))
            other = groups[0] if len(groups) == 2 else OTHERS
            head = {**dict(zip(keys, key, strict=True)), "group": group, "other": other}
            rows.append({**head, "difference": difference, "low": low, "high": high, "fewest": fewest})
    return pd.DataFrame(rows)


def _keys(table: pd.DataFrame) -> list[str]:
    return [key for key in ("arm", "metric", "structure") if key in table]


def _unit(table: pd.DataFrame) -> pd.Series:
    return table["subject"] if "subject" in table else table["case"]


def gap_reading(gap: Any, metric: Metric) -> str:
    """better, worse, too few, or unclear: the interval holds zero. ``gap`` is a row of ``gap_figures``."""
    if gap.fewest < TOO_FEW_CASES:
        return "too few"
    if not Interval(gap.low, gap.high).excludes_zero:
        return "unclear"
    return "better" if (gap.difference > 0) == metric.higher_is_better else "worse"


def worst_groups(figures: pd.DataFrame, gaps: pd.DataFrame, metrics: Mapping[str, Metric], unit: str) -> list[str]:
    """The worst group of each metric in words, and whether it differs from the others beyond chance.

    Rows of ``group_figures`` and ``gap_figures`` of one arm and structure; ``unit``: subjects or cases.
    """
    lines = []
    for key, metric in metrics.items():
        means = figures[figures["metric"] == key].set_index("group")["mean"]
        if len(means) < 2:
            lines.append(f"{metric.name}: fewer than two groups have a case that counts, so nothing can be said.")
            continue
        worst = means.idxmin() if metric.higher_is_better else means.idxmax()
        rows = gaps[gaps["metric"] == key]
        gap = rows[rows["group"] == worst] if (rows["group"] == worst).any() else rows
        (row,) = gap.itertuples()
        sign = 1 if row.group == worst else -1
        low, high = sorted((sign * row.low, sign * row.high))
        other = row.other if sign > 0 else row.group
        size = f"{signed(sign * row.difference)} {metric.unit}".rstrip()
        what = f"worst group **{worst}**, {f'{number(means[worst])} {metric.unit}'.rstrip()}"
        found = gap_reading(row, metric)
        claim = f"no difference between them beyond chance in {unit}"
        if found == "too few":
            claim = f"too few {unit} to conclude anything ({row.fewest} on one side; {TOO_FEW_CASES} are needed)"
        elif found != "unclear":
            claim = f"worse beyond chance in {unit}"
        picked = "" if len(means) == 2 else f" The worst of {len(means)} was picked after looking."
        lines.append(f"{metric.name}: {what}, {size} {Interval(low, high)} against {other}: {claim}.{picked}")
    return lines


def figures_grid(figures: pd.DataFrame, metrics: Mapping[str, Metric], counts: Mapping[Any, float], unit: str) -> str:
    """``group_figures`` as a markdown table; ``counts``: of ``count_groups``, how often a structure was missed."""
    arms = ["arm"] if "arm" in figures else []
    head = ["method"] * len(arms)
    rows = [["metric", "structure", *head, "group", "mean ± SD", f"95 % over {unit}", "median", "worst", "cases",
             MISSED, INVENTED]]  # fmt: skip
    for f in figures.itertuples():
        arm = [getattr(f, name) for name in arms]
        states = (f"{counts.get((*arm, f.group, f.structure, state), 0):g}" for state in (MISSED, INVENTED))
        interval = f"[{number(f.low)}, {number(f.high)}]" if math.isfinite(f.low) else "-"
        cells = [f"{number(f.mean)} ± {number(f.sd)}", interval, number(f.median), number(f.worst), str(f.cases)]
        rows.append([metrics[f.metric].title, f.structure, *arm, f.group, *cells, *states])
    return grid(rows, left=3 + len(arms))


def count_groups(table: pd.DataFrame) -> dict[tuple[Any, ...], int]:
    """By (arm if there are any, group, structure, state): in how many cases."""
    found: dict[tuple[Any, ...], int] = {}
    for group, part in table.groupby("group"):
        found |= {(*key[:-2], group, *key[-2:]): count for key, count in count_states(part).items()}
    return found


def gaps_grid(gaps: pd.DataFrame, metrics: Mapping[str, Metric], unit: str) -> str:
    """``gap_figures`` as a markdown table."""
    arms = ["arm"] if "arm" in gaps else []
    rows = [["metric", "structure", *["method"] * len(arms), "groups", "difference", f"95 % over {unit}", "reading"]]
    for gap in gaps.itertuples():
        cells = [signed(gap.difference), str(Interval(gap.low, gap.high)), gap_reading(gap, metrics[gap.metric])]
        arm = [getattr(gap, name) for name in arms]
        rows.append([metrics[gap.metric].title, gap.structure, *arm, f"{gap.group} minus {gap.other}", *cells])
    return grid(rows, left=3 + len(arms))


def caution(unit: str) -> str:
    """What the intervals of groups are, and what a difference of groups need not mean."""
    return (
        f"Intervals of groups: bootstrap over {unit}, 95 % each (BCa), not corrected for their number. Groups differ "
        "in patients as well, so a difference need not come from what they are named after."
    )


class GroupReport(NamedTuple):
    """An evaluation by groups: as markdown, and as what JSON holds."""

    sections: list[str]
    content: dict[str, Any]


def by_groups(evaluation: Evaluation, groups: Groups) -> GroupReport:
    """Figures, differences and words of an evaluation whose ``table`` went through ``add_groups``."""
    table, metrics, unit = with_mean(evaluation.table), evaluation.metrics, groups.unit
    figures, gaps, last = group_figures(table), gap_figures(table), evaluation.columns[-1]
    lines = []
    for group, some in figures[figures["structure"] == last].groupby("group"):
        texts = []
        for f in some.itertuples():
            size = f"{number(f.mean)} {metrics[f.metric].unit}".rstrip()
            texts.append(f"{metrics[f.metric].name} {size} [{number(f.low)}, {number(f.high)}]")
        cases = [case for case, of in groups.of.items() if of == group]
        drawn = "" if groups.subjects is None else f" of {len({groups.subjects[c] for c in cases})} subjects"
        lines.append(f"**{group}**, {len(cases)} cases{drawn}: {', '.join(texts)}.")
    lines += worst_groups(figures[figures["structure"] == last], gaps[gaps["structure"] == last], metrics, unit)
    sections = [
        f"## Groups by {groups.column} ({last})",
        "\n".join(f"- {line}" for line in lines),
        figures_grid(figures, metrics, count_groups(evaluation.table), unit),
        "## Differences between groups",
        gaps_grid(gaps, metrics, unit),
        caution(unit),
    ]
    return GroupReport(sections, as_dict(groups, lines, figures, gaps, metrics))


def as_dict(
    groups: Groups, answers: Sequence[str], figures: pd.DataFrame, gaps: pd.DataFrame, metrics: Mapping[str, Metric]
) -> dict[str, Any]:
    """For JSON; metrics by their names, ``reading`` as in ``gap_reading``."""
    reading = [gap_reading(gap, METRICS[gap.metric]) for gap in gaps.itertuples()]
    named = {key: metric.name for key, metric in metrics.items()}
    tables = [some.assign(metric=some["metric"].map(named)).rename(columns={"arm": "method"}).to_dict("records")
              for some in (figures, gaps.assign(reading=reading))]  # fmt: skip
    return {
        "by": groups.column,
        "resampled": groups.unit,
        "groups": dict(groups.of),
        "answers": list(answers),
        "figures": tables[0],
        "differences": tables[1],
    }
