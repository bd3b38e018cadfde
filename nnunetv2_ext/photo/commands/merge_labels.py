"""``nnUNetv2_ext merge-labels``: binary predictions put together to one label map."""

import argparse
from pathlib import Path

EPILOG = """\
Example: nnUNetv2_ext merge-labels -i P1 P2 P3 P4 -labels 1 2 3 4 -o OUT
         nnUNetv2_ext merge-labels -i P1 P2 P3 P4 -labels 1 2 3 4 -o OUT --by order --order SE EX HE MA
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("-i", required=True, type=Path, nargs="+", metavar="FOLDER", help="predictions of each model")
    parser.add_argument(
        "-labels", required=True, type=int, nargs="+", metavar="VALUE", help="value of each in the result"
    )
    parser.add_argument("-o", required=True, type=Path, metavar="FOLDER", help="new folder")
    parser.add_argument(
        "--by",
        choices=("probability", "order"),
        default="probability",
        help="who wins where several claim a voxel (default: %(default)s, needs --save_probabilities)",
    )
    parser.add_argument("--order", nargs="+", default=[], metavar="LABEL", help="names or values, the later wins")
    parser.add_argument(
        "--threshold", type=float, nargs="+", default=[0.5], help="of the probability, one or one each (0.5)"
    )


def run(args: argparse.Namespace) -> int:
    """Merge, and say how often the models disagreed."""
    from nnunetv2_ext.photo.split import merge_labels

    if args.order and args.by != "order":
        raise ValueError("--order goes with --by order")
    merged = merge_labels(args.i, args.labels, args.o, args.by, args.order, args.threshold)
    share = merged.overlap / merged.claimed if merged.claimed else 0.0
    print(f"{merged.cases} cases in {args.o}; {merged.overlap} of {merged.claimed} voxels ({share:.1%}) claimed twice")
    for value, number in merged.lost.items():
        print(f"  label {value} left {number} voxels to another")
    return 0
