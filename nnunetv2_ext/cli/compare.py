"""``nnUNetv2_ext compare``: does one trainer do better than another on your data, and is it more than chance?"""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from nnunetv2_ext.cli.evaluate import add_metric_arguments, add_subject_arguments

EPILOG = """\
Examples:
  finished folds of two trainers in nnUNet_results (the first is what the others are compared with)
    nnUNetv2_ext compare -d 4 -c 3d_fullres -tr nnUNetTrainer TRAINER
  repeated trainings (seeds) in results folders of their own
    nnUNetv2_ext compare -d 4 -c 3d_fullres -tr nnUNetTrainer TRAINER --results seed0 seed1 seed2
  runs named by hand: each folder is a results folder, a model folder or a fold, and one repeated training
    nnUNetv2_ext compare -d 4 -c 3d_fullres --run plain ladder/A/n5_seed* --run ours ladder/E/n5_seed*
  predictions of a test set
    nnUNetv2_ext compare -d 4 --predictions plain OUT_A --predictions ours OUT_B --truth labelsTs --images imagesTs

Writes report.md, comparison.json, cases.csv, differences.csv and PNGs. The paired unit is a case, averaged
over repeats; intervals resample subjects where they are known. From Python: nnunetv2_ext.compare.request.compare.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Each ``dest`` is a field of ``compare.request.Request``."""
    add = parser.add_argument
    add("-d", help="id or name of the dataset", dest="dataset", required=True, metavar="DATASET")
    add("-c", help="(default: %(default)s)", dest="configuration", default="3d_fullres", metavar="CONFIGURATION")
    add("-p", help="plans name (default: %(default)s)", dest="plans", default="nnUNetPlans", metavar="PLANS")
    add(
        "-tr", help="two or more; the first is the reference", dest="trainers", nargs="+", default=[], metavar="TRAINER"
    )
    add("-f", help="folds (default: all that the first one has)", dest="folds", nargs="+", metavar="FOLD")
    add("--results", help="results folders, one per repeat (default: nnUNet_results)", nargs="+", default=[], type=Path,
        metavar="DIR")  # fmt: skip
    named: dict[str, Any] = {"nargs": "+", "action": "append", "default": [], "metavar": ("NAME", "DIR")}
    add("--run", help="a name and its folders", dest="runs", **named)
    add("--predictions", help="a name and its folders of test predictions, one per repeat; goes with --truth", **named)
    add("--allow-different-training-cases", help="compare trainings that learned from different training cases "
        "(train_cases); the report says so", action="store_true")  # fmt: skip
    add("--truth", help="true segmentations (default: the dataset's own)", type=Path, metavar="DIR")
    add("--images", help="images for the pictures (default: imagesTr in nnUNet_raw)", type=Path, metavar="DIR")
    add_subject_arguments(parser)
    add("--worst", help="cases drawn of either kind; 0: none (default: 3)", type=int, default=3, metavar="N")
    add_metric_arguments(parser)
    add("-o", help="output folder (default: comparison_DATASET_CONFIGURATION)", dest="output", type=Path, metavar="DIR")


def run(args: argparse.Namespace) -> int:
    from nnunetv2_ext.compare.report import as_text
    from nnunetv2_ext.compare.request import Request, compare

    report, output = compare(Request(**{field.name: getattr(args, field.name) for field in fields(Request)}))
    print(f"{as_text(report)}\n\nwrote report.md, comparison.json, cases.csv, differences.csv and pictures to {output}")
    return 0
