"""``nnUNetv2_ext evaluate``: Dice, HD95 and NSD of a folder of predictions, per structure and case."""

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nnunetv2_ext.evaluate.groups import Groups

EPILOG = """\
Examples:
  nnUNetv2_ext evaluate PREDICTIONS TRUTH -d 4
  nnUNetv2_ext evaluate PREDICTIONS TRUTH -djfile dataset.json --tolerance 1 tumour=2 -o scores
  nnUNetv2_ext evaluate PREDICTIONS TRUTH -d 4 --by cases.csv:scanner

PREDICTIONS and TRUTH hold files of the same names, as for nnUNetv2_evaluate_folder (which takes them the other way
round). Without -d, -djfile or --labels the dataset.json in PREDICTIONS (nnUNetv2_predict puts it there) or beside
TRUTH is used.
Writes evaluation.json (laid out like nnU-Net's summary.json), .csv, .md and .png. The definitions of the metrics and
what happens to empty structures are in the output.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("predictions", metavar="PRED", type=Path, help="folder of predicted segmentations")
    parser.add_argument("truth", metavar="TRUTH", type=Path, help="folder of the true segmentations")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("-djfile", type=Path, metavar="FILE", help="dataset.json, which names the labels")
    which.add_argument("-d", metavar="DATASET", help="id or name of a dataset in nnUNet_preprocessed or nnUNet_raw")
    which.add_argument("--labels", nargs="+", type=int, metavar="VALUE", help="these label values only")
    parser.add_argument("--ignore", type=int, metavar="VALUE", help="with --labels: the truth's ignore label")
    add_metric_arguments(parser)
    parser.add_argument("--chill", action="store_true", help="not every case of TRUTH must have been predicted")
    add_subject_arguments(parser)
    parser.add_argument("-o", type=Path, metavar="DIR", help="output folder (default: PRED/evaluation)")


def add_metric_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that ``evaluate`` and ``compare`` share."""
    add = parser.add_argument
    names = ["dice", "hd95", "nsd"]
    add("--metrics", help="(default: all three)", nargs="+", default=names, choices=names)
    add("--tolerance", help="NSD: surfaces this close agree; mm for all structures, or NAME=mm for some. Take what "
        "two experts differ by (default: 1)", nargs="+", default=["1"], metavar="MM")  # fmt: skip
    add("--empty", help="HD95 of a structure that only truth or prediction has: the image's diagonal, or none "
        "(default: worst)", choices=["worst", "leave-out"], default="worst")  # fmt: skip
    add("--ignore-origin", help="score voxel by voxel even where origin or direction of prediction and truth differ; "
        "all outputs say so", action="store_true")  # fmt: skip
    add("-np", help="processes (default: %(default)s)", dest="processes", type=int, default=1, metavar="N")


def add_subject_arguments(parser: argparse.ArgumentParser) -> None:
    """Groups and subjects of cases, for both commands."""
    add = parser.add_argument
    add("--by", help="every figure also for each group of cases and for the difference between groups: a column of a "
        "CSV that has the column case too, or what dataset.json records, site say", metavar="FILE:COLUMN")  # fmt: skip
    add("--group-regex", help="subject of a case: the first group of this expression in its name. Subjects, not "
        "cases, are resampled (default: as dataset.json records them)", metavar="REGEX")  # fmt: skip
    add("--groups", help="subject of each case: CSV with the columns case,subject, or JSON", type=Path, metavar="FILE")


def run(args: argparse.Namespace) -> int:
    if args.processes < 1:
        raise ValueError(f"-np must be 1 or more, but it is {args.processes}")
    if args.ignore is not None and args.labels is None:
        raise ValueError("--ignore goes with --labels; otherwise dataset.json says which label is ignored")
    if args.by is None and (args.group_regex, args.groups) != (None, None):
        raise ValueError("--group-regex and --groups go with --by: without groups no interval is computed")
    from nnunetv2_ext.core.files import atomic_write_text
    from nnunetv2_ext.evaluate.folder import evaluate_folder, make_source
    from nnunetv2_ext.evaluate.groups import add_groups, by_groups
    from nnunetv2_ext.evaluate.pairs import file_ending, require_output, require_roles
    from nnunetv2_ext.evaluate.plot import draw
    from nnunetv2_ext.evaluate.structures import from_values, read_labels
    from nnunetv2_ext.evaluate.table import as_csv, as_dict, as_json, as_markdown

    folders = predictions, truth = args.predictions, args.truth
    for what, folder in zip(("predictions", "the truth"), folders, strict=True):
        if not folder.is_dir():
            raise ValueError(f"the folder of {what}, {folder}, does not exist")
    require_roles(predictions, truth)
    content: dict[str, Any] = {}
    if args.labels is None:
        content, labels = read_labels(dataset_json_file(args, predictions, truth))
    else:
        labels = from_values(args.labels, args.ignore)
    source = make_source(args, labels, content, "" if content.get("file_ending") else file_ending(truth))
    groups, notes = (None, []) if args.by is None else groups_of(args, content, source.ending)
    output = require_output(args.o or predictions / "evaluation", folders)
    evaluation = evaluate_folder(predictions, truth, source, chill=args.chill, processes=args.processes)
    title = f"{short_name(predictions)} against {short_name(truth)}"
    measured = as_dict(evaluation, str(predictions), str(truth))
    sections: list[str] = []
    if groups is not None:
        evaluation.table = add_groups(evaluation.table, groups)
        sections, measured["by_groups"] = by_groups(evaluation, groups)
        sections += [f"Note: {note}." for note in notes]
    text = as_markdown(evaluation, title, sections)
    atomic_write_text(output / "evaluation.json", as_json(measured))
    atomic_write_text(output / "evaluation.csv", as_csv(evaluation))
    atomic_write_text(output / "evaluation.md", text)
    draw(evaluation, output / "evaluation.png", title)
    print(f"{text}\nwrote evaluation.json, .csv, .md and .png to {output}")
    return 0


def groups_of(args: argparse.Namespace, content: dict[str, Any], ending: str) -> tuple["Groups", list[str]]:
    """The groups of the cases that are to be scored, and notes; dataset.json may also be that beside the truth."""
    from nnunetv2_ext.core.files import read_json
    from nnunetv2_ext.evaluate.groups import find_groups, find_subjects
    from nnunetv2_ext.evaluate.pairs import find_pairs

    beside = [folder / "dataset.json" for folder in (args.predictions, args.truth, args.truth.absolute().parent)]
    contents = [content, *(read_json(file) for file in beside if file.is_file())]
    cases = [pair.case for pair in find_pairs(args.predictions, args.truth, ending, args.chill)]
    subjects, notes = find_subjects(cases, contents, args.group_regex, args.groups)
    return find_groups(args.by, contents, cases, subjects), notes


def short_name(folder: Path) -> str:
    """A folder for a title: from nnU-Net's DatasetXXX_name on, else its own name; the JSON holds the whole path."""
    parts = folder.resolve().parts
    starts = [i for i, part in enumerate(parts) if re.fullmatch(r"Dataset\d{3}_.+", part)]
    return "/".join(parts[starts[-1] :] if starts else parts[-1:])


def dataset_json_file(args: argparse.Namespace, predictions: Path, truth: Path | None) -> Path:
    """The dataset.json that the arguments (djfile, d) name, or the one beside the files."""
    if args.djfile is not None:
        return Path(args.djfile)
    if args.d is not None:
        from nnunetv2_ext.data.find import find_dataset_json

        return find_dataset_json(args.d)
    for folder in (predictions, *((truth, truth.absolute().parent) if truth else ())):
        if (folder / "dataset.json").is_file():
            return folder / "dataset.json"
    raise ValueError(
        f"there is no dataset.json in {predictions}{f' or beside {truth}' if truth else ''}: give -d DATASET, "
        f"-djfile FILE{', or --labels 1 2 ...' if hasattr(args, 'labels') else ''}"
    )
