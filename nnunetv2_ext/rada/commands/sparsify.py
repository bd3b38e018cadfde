"""``nnUNetv2_ext sparsify``: a dense dataset with an ignore label on all but a few planes, for nnUNetTrainerRADA."""

import argparse
from pathlib import Path

EPILOG = """\
Examples:
  nnUNetv2_ext sparsify -d 4 -o 104 --labelled 10                   three planes in ten cases, all others unlabelled
  nnUNetv2_ext sparsify -d 4 -o 104 --labelled 0.1 --test-share 0.2 --group-regex '^(sub-[0-9]+)'
  nnUNetv2_ext sparsify -d 104 -o 114 --thicken-only                own planes that resampling would erase
  nnUNetv2_ext sparsify -d 104 -o 114 --thicken-only -c 3d_lowres   for a coarser configuration of planned data

The source is not changed. Images are linked, labelsTr_dense keeps the dense truth for nnUNetv2_ext evaluate only.
Thickness follows the spacing nnU-Net will choose for 3d_fullres; with -p the plans of the source dataset decide.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("-d", required=True, metavar="DATASET", help="id or name of the source dataset")
    parser.add_argument("-o", required=True, type=int, metavar="ID", help="id of the new dataset; must be free")
    parser.add_argument("--labelled", metavar="N", help="labelled training cases: a number, or a share such as 0.1")
    parser.add_argument(
        "--rule",
        choices=("largest", "middle"),
        default="largest",
        help="slice with most classes, then most foreground; or the middle of the foreground (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws of cases (default: %(default)s)")
    parser.add_argument("--test-share", type=float, default=0.0, help="of the cases, set aside with dense labels")
    parser.add_argument(
        "--planes",
        default="0,1,2",
        help="array axis of each plane of a labelled case, 0 = z, 1 = y, 2 = x of a NIfTI file; repeat an axis for "
        "several planes on it (default: %(default)s)",
    )
    parser.add_argument("--group-regex", metavar="REGEX", help="finds the subject in a case's name; it stays whole")
    parser.add_argument(
        "--groups",
        type=Path,
        metavar="FILE",
        help='the same from a JSON file {"case": "subject", ...} or a CSV with the columns case,subject '
        "(default: what dataset.json of the source records)",
    )
    parser.add_argument("--allow-split-subjects", action="store_true", help="divide subjects between training and test")
    parser.add_argument("--thicken-only", action="store_true", help="copy a sparse dataset and thicken its planes")
    parser.add_argument("-p", metavar="PLANS", help="plans of the source dataset, which tell the target spacing")
    parser.add_argument(
        "-c", default="3d_fullres", metavar="CONFIGURATION", help="configuration of these plans (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Write the dataset and say what to type next."""
    if args.thicken_only == (args.labelled is not None):
        raise ValueError("give either --labelled N (dense dataset) or --thicken-only (sparse dataset)")
    if args.thicken_only and (args.rule, args.seed, args.test_share, args.planes) != ("largest", 0, 0.0, "0,1,2"):
        raise ValueError("--rule, --seed, --test-share and --planes choose planes in a dense dataset: leave them out")
    from nnunetv2_ext.data.raw import open_raw, planned_spacing
    from nnunetv2_ext.data.subjects import subjects_of_dataset
    from nnunetv2_ext.rada.annotation.sparsify import SparsifyOptions, sparsify, thicken_dataset

    raw = open_raw(args.d)
    if args.p and planned_spacing(raw.name, args.p, args.c) is None:
        raise ValueError(
            f"{raw.name} has no plans {args.p}: run nnUNetv2_plan_experiment -d {raw.name}, or leave out -p"
        )
    subjects = subjects_of_dataset(raw.json, raw.cases, args.group_regex, args.groups)
    if args.thicken_only:
        thicken_dataset(args.d, args.o, args.p or "nnUNetPlans", args.c, subjects)
    else:
        labelled, axes = _number(args.labelled), _axes(args.planes)
        chosen = args.rule, args.seed, args.test_share, subjects, args.p, args.c, args.allow_split_subjects
        sparsify(args.d, args.o, SparsifyOptions(labelled, axes, *chosen))
    which = f"-d {args.o} -c {args.c}"
    print(f"next: nnUNetv2_plan_and_preprocess {which}; nnUNetv2_ext check-planes {which}")
    return 0


def _number(text: str) -> int | float:
    try:
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    except ValueError:
        raise ValueError(f"--labelled is a number of cases or a share such as 0.1, got {text!r}") from None


def _axes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--planes is a list of array axes such as 0,1,2, got {text!r}") from None
