"""``nnUNetv2_ext compare``: does one trainer do better than another on your data, and is it more than chance?"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from nnunetv2_ext.cli.evaluate import add_metric_arguments

EPILOG = """\
Examples:
  finished folds of two trainers in nnUNet_results (the first is what the others are compared with)
    nnUNetv2_ext compare -d 4 -c 3d_fullres -tr nnUNetTrainer nnUNetTrainerMedContext
  repeated trainings (seeds) in results folders of their own
    nnUNetv2_ext compare -d 4 -c 3d_fullres -tr nnUNetTrainer nnUNetTrainerMedContext --results seed0 seed1 seed2
  runs named by hand: each folder is a results folder, a model folder or a fold, and one repeated training
    nnUNetv2_ext compare -d 4 -c 3d_fullres --run plain ladder/A_plain/n5_seed* --run ours ladder/E_default/n5_seed*
  predictions of a test set
    nnUNetv2_ext compare -d 4 --predictions plain OUT_A --predictions ours OUT_B --truth labelsTs --images imagesTs

Writes report.md, comparison.json, cases.csv, differences.csv and PNGs. The paired unit is a case, averaged
over repeats.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("-d", required=True, metavar="DATASET", help="id or name of the dataset")
    parser.add_argument("-c", default="3d_fullres", metavar="CONFIGURATION", help="(default: %(default)s)")
    parser.add_argument("-p", default="nnUNetPlans", metavar="PLANS", help="plans name (default: %(default)s)")
    parser.add_argument("-tr", nargs="+", default=[], metavar="TRAINER", help="two or more; the first is the reference")
    parser.add_argument("-f", nargs="+", metavar="FOLD", help="folds (default: all that the first one has)")
    parser.add_argument(
        "--results",
        nargs="+",
        type=Path,
        metavar="DIR",
        help="results folders, one per repeat (default: nnUNet_results)",
    )
    parser.add_argument(
        "--run",
        dest="runs",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "DIR"),
        help="a name and its folders",
    )
    parser.add_argument(
        "--predictions",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "DIR"),
        help="a name and its folders of test predictions, one per repeat; goes with --truth",
    )
    parser.add_argument(
        "--allow-different-training-cases",
        action="store_true",
        help="compare trainings that learned from different training cases (train_cases); the report says so",
    )
    parser.add_argument("--truth", type=Path, metavar="DIR", help="true segmentations (default: the dataset's own)")
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="images for the pictures (default: imagesTr in nnUNet_raw)"
    )
    parser.add_argument(
        "--worst", type=int, default=3, metavar="N", help="cases drawn of either kind; 0: none (default: 3)"
    )
    add_metric_arguments(parser)
    parser.add_argument(
        "-o", type=Path, metavar="DIR", help="output folder (default: comparison_DATASET_CONFIGURATION)"
    )


def run(args: argparse.Namespace) -> int:
    """Check, score, print, write."""
    if args.np < 1 or args.worst < 0:
        raise ValueError(f"-np must be 1 or more and --worst 0 or more, but they are {args.np} and {args.worst}")
    from nnunetv2_ext.cli._compare_inputs import gather, images_folder, truth_folder
    from nnunetv2_ext.compare.collect import collect
    from nnunetv2_ext.compare.report import Report, as_text
    from nnunetv2_ext.compare.runs import require_comparable
    from nnunetv2_ext.compare.statistics import all_differences
    from nnunetv2_ext.compare.training_cases import require_same_training_cases
    from nnunetv2_ext.core.files import require_writable

    dataset, arms, source, split = gather(args)
    notes = require_comparable(arms, split)
    notes += require_same_training_cases(arms, args.allow_different_training_cases)
    truth, own = truth_folder(args, dataset)
    images = images_folder(args, dataset)
    output = require_writable(args.o or Path(f"comparison_{dataset}_{args.c}"))
    scores = collect(arms, truth, source, args.np, own_truth=own)
    what = "test set" if args.predictions else f"{args.c}, plans {args.p}"
    report = Report(
        title=f"{dataset}, {what}: {', '.join(a.name for a in arms[1:])} against {arms[0].name}",
        scores=scores,
        differences=all_differences(scores),
        notes=notes,
        command=shlex.join(["nnUNetv2_ext", *sys.argv[1:]]),
        date=datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
    )
    write(report, output, images, args.worst)
    print(f"{as_text(report)}\n\nwrote report.md, comparison.json, cases.csv, differences.csv and pictures to {output}")
    return 0


def write(report: Any, output: Path, images: Path | None, worst: int) -> None:
    """All files; pictures first, as the report names them."""
    from nnunetv2_ext.compare import curves, pictures, plots
    from nnunetv2_ext.compare.report import as_dict, as_markdown, cases_csv, differences_csv, primary_differences
    from nnunetv2_ext.core.files import atomic_write_text

    scores = report.scores
    plots.draw_differences(scores, report.differences, output / "differences.png")
    report.pictures["differences.png"] = "Differences case by case, with their means and 95 % intervals"
    plots.draw_boxes(scores, output / "boxes.png")
    report.pictures["boxes.png"] = "Scores of all cases"
    if curves.draw(scores.arms, output / "curves.png", plots.colours(len(scores.arms))):
        report.pictures["curves.png"] = "Learning curves; thin lines: single trainings, thick: their mean"
    for difference in primary_differences(report) if worst else ():
        name = scores.arms[difference.arm].name
        file = f"cases_{re.sub(r'[^A-Za-z0-9_.-]+', '_', name)}.png"
        report.extremes[name] = pictures.draw_cases(scores, difference, output / file, images, worst)
        if any(report.extremes[name]):
            report.pictures[file] = f"Cases in which {name} lost and gained most against {scores.arms[0].name}"
    content = json.dumps(as_dict(report), indent=1, allow_nan=False)
    atomic_write_text(output / "comparison.json", content + "\n")
    atomic_write_text(output / "cases.csv", cases_csv(scores))
    atomic_write_text(output / "differences.csv", differences_csv(report))
    atomic_write_text(output / "report.md", as_markdown(report))
