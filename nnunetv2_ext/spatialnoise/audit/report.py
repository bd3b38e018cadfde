"""What an audit leaves for people to read: Markdown, two CSV files, JSON."""

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

from nnunetv2_ext.core.files import atomic_write_text
from nnunetv2_ext.spatialnoise.audit.audit import MAPS, PANELS, Audited, panel_name
from nnunetv2_ext.spatialnoise.audit.verdict import FLAGGED, MOST_REGIONS, SMALLEST_REGION

_SHOWN = 30  # cases and regions in the Markdown tables; the CSV files have all
# A Dice below which a structure is not found, and the share of its cases from which on the model is to blame: one fold
# of five is a fifth. Of labels alone with the worst errors of examples/label_errors.py it was a fourteenth
_NOT_FOUND, _NOT_LEARNT = 0.1, 0.15


def write_report(found: Audited) -> str:
    """Write report.md, cases.csv, regions.csv and audit.json; returns the Markdown."""
    text = markdown(found)
    atomic_write_text(found.output / "report.md", text)
    _write_csv(
        found.output / "cases.csv", [row for rank, r in enumerate(found.records, 1) for row in _case_rows(rank, r)]
    )
    regions = [_region_row(r["case"], region) for r in found.records for region in r["regions"]]
    regions.sort(key=lambda row: -row["expected_wrong_voxels"])
    _write_csv(found.output / "regions.csv", regions, list(_region_row("", _NO_REGION)))
    content = {
        "dataset": found.dataset.name,
        "predictions": found.title,
        "pointwise": found.rho == 0,
        "rho": found.rho,
        "not_judged_seen_by_every_fold": found.seen,
        "not_judged_no_prediction": found.without,
        "cases": [{k: v for k, v in record.items() if k != "files"} for record in found.records],
    }
    atomic_write_text(found.output / "audit.json", json.dumps(_without_nan(content), indent=1) + "\n")
    return text


def markdown(found: Audited) -> str:
    """The report."""
    lines = [f"# Which labels of {found.dataset.name} are probably wrong", ""]
    lines += [
        "A model predicted each case without having learnt from it. Where the model is sure and the label says "
        "otherwise, one of the two is wrong.",
        "This is a list of where to look. It is not a proof: look at the picture before you change a label.",
        "",
        f"- Predictions: {found.title}.",
        "- Expected wrong voxels: the sum of the probabilities of error. Share: of the voxels with a structure in "
        "label or prediction; the cases are sorted by it.",
        "- Every voxel was judged by itself (pointwise)."
        if found.rho == 0
        else f"- Neighbours support one another (field, rho {found.rho:g}). The column 1 - p is pointwise.",
        "- Control columns: 1 - p is the same share by the network's own probability (above 1 where the network is "
        "unsure of the whole image); Dice is that of label and prediction. A ranking that agrees with the control has "
        "told you nothing that it would not.",
        "- What all annotators leave out, the model leaves out too. No audit finds that.",
        f"- Pictures, worst first: `{PANELS}/`. Maps to load over the images: `{MAPS}/`. All numbers: `cases.csv`, "
        "`regions.csv`, `audit.json`.",
        "",
    ]
    for names, why in (
        (found.seen, "not judged, because every finished fold trained on them"),
        (found.without, "not judged, because they have no prediction"),
        ([r["case"] for r in found.records if not r["summary"]["judged_voxels"]], "ignored in every voxel"),
        (
            [r["case"] for r in found.records if r["summary"]["judged_voxels"] and not r["summary"]["labelled_voxels"]],
            "labelled as background everywhere; judged as such",
        ),
    ):
        if names:
            lines += [f"**{len(names)} cases {why}:** {_listed(names)}.", ""]
    for name, cases, number in _not_learnt(found):
        lines += [
            f"**{name} is not found (Dice below {_NOT_FOUND:g}) in {len(cases)} of {number} cases that have it:** "
            f"{_listed(cases)}. A model that has not learnt a structure cannot judge its labels. Look at that fold, "
            "and train longer before you believe the ranks of these cases.",
            "",
        ]
    lines += ["## Cases", "", f"The worst {min(_SHOWN, len(found.records))} of {len(found.records)}.", ""]
    lines += [
        "| rank | case | expected wrong voxels | share | control: 1 - p | control: Dice | largest doubtful region |"
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    for rank, record in enumerate(found.records[:_SHOWN], 1):
        s, case = record["summary"], record["case"]
        first = _in_words(record["regions"][0]) if record["regions"] else "none"
        dice = "-" if math.isnan(s["dice"]) else f"{s['dice']:.3f}"
        cells = [str(rank), f"[{case}]({PANELS}/{panel_name(rank, case)})", f"{s['expected_wrong_voxels']:.0f}"]
        cells += [f"{s['score']:.3f}", f"{s['control']:.3f}", dice, first]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## Regions", ""]
    lines += [
        f"Connected voxels whose label is more probably wrong than right (above {FLAGGED:g}), of at least "
        f"{SMALLEST_REGION} voxels, at most {MOST_REGIONS} a case. Places are voxels x, y, z of the file, from 0.",
        "",
        "| case | labelled as | predicted as | voxels | mm3 | x | y | z |",
        "|---|---|---|---|---|---|---|---|",
    ]
    regions = [(r["case"], region) for r in found.records for region in r["regions"]]
    regions.sort(key=lambda pair: -pair[1]["expected_wrong_voxels"])
    for case, region in regions[:_SHOWN]:
        cells = [case, region["labelled"], region["predicted"], str(region["voxels"]), f"{region['mm3']:.0f}"]
        cells += [f"{low} to {high}" for low, high in region["box"]]
        lines.append(f"| {' | '.join(cells)} |")
    if not regions:
        lines.append("| none | | | | | | | |")
    return "\n".join(lines) + "\n"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _not_learnt(found: Audited) -> list[tuple[str, list[str], int]]:
    """Structures that the model misses too often, with these cases and the number of cases that have it."""
    dice: dict[str, dict[str, float]] = {}
    for record in found.records:
        for row in record["classes"]:
            if row["labelled_voxels"]:
                dice.setdefault(row["class"], {})[record["case"]] = row["dice_label_prediction"]
    missed = {name: sorted(case for case in all_ if all_[case] < _NOT_FOUND) for name, all_ in dice.items()}
    return [
        (name, cases, len(dice[name]))
        for name, cases in missed.items()
        if len(cases) > 1 and len(cases) >= _NOT_LEARNT * len(dice[name])
    ]


_NO_REGION = {
    "voxels": 0, "mm3": 0, "expected_wrong_voxels": 0, "labelled": "", "predicted": "", "box": [[0, 0]] * 3
}  # fmt: skip


def _in_words(region: dict[str, Any]) -> str:
    return f"{region['voxels']} voxels of {region['labelled']}, predicted as {region['predicted']}"


def _region_row(case: str, region: dict[str, Any]) -> dict[str, Any]:
    row = {"case": case, **{k: v for k, v in region.items() if k != "box"}}
    for axis, (low, high) in zip("xyz", region["box"]):
        row |= {f"{axis}_first": low, f"{axis}_last": high}
    return row


def _case_rows(rank: int, record: dict[str, Any]) -> list[dict[str, Any]]:
    summary = record["summary"]
    largest = {row["class"]: _NO_REGION for row in record["classes"]}
    for region in reversed(record["regions"]):  # the largest is first, and so the last to be entered
        largest |= {region[side]: region for side in ("labelled", "predicted")}
    rows = []
    for row in record["classes"]:
        region = _region_row("", largest[row["class"]])
        rows.append(
            {
                "rank": rank,
                "case": record["case"],
                **row,
                "case_share_wrong": summary["score"],
                "case_control_1_minus_p": summary["control"],
                "largest_region_voxels": region["voxels"],
                **{f"largest_region_{k}": region[k] for k in region if k[1:] in ("_first", "_last")},
            }
        )
    return rows


def _write_csv(file: Path, rows: list[dict[str, Any]], names: list[str] | None = None) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else names or [], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: _cell(v) for k, v in row.items()})
    atomic_write_text(file, text.getvalue())


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.4f}"
    return value


def _without_nan(value: Any) -> Any:
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    return [_without_nan(v) for v in value] if isinstance(value, list) else value
