"""``nnUNetv2_ext split-labels``: one binary dataset a label."""

import argparse

EPILOG = """\
Example: nnUNetv2_ext split-labels -d 8 -o 81 82 83 84

Region-based training learns the same binary tasks in one network, at one N-th of the cost: in dataset.json write
"labels": {"background": 0, "MA": [1], "HE": [2], ...} and "regions_class_order": [1, 2, ...].
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("-d", required=True, metavar="DATASET", help="id or name of the source dataset")
    parser.add_argument(
        "-o", required=True, type=int, nargs="+", metavar="ID", help="a free id for each label, in dataset.json's order"
    )


def run(args: argparse.Namespace) -> int:
    """Write the datasets, and say what to type next."""
    from nnunetv2_ext.photo.split import split_labels

    for folder in split_labels(args.d, args.o):
        print(folder)
    print(f"next: nnUNetv2_plan_and_preprocess -d {' '.join(map(str, args.o))} -c 2d, and a training of each")
    return 0
