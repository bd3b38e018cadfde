"""``nnUNetv2_ext enhance``: CLAHE and a blank surround for a dataset of photographs, and for new images like it."""

import argparse
from pathlib import Path

EPILOG = """\
Examples:
  nnUNetv2_ext enhance -d 8 -o 108                                  a new dataset; the old one is not changed
  nnUNetv2_ext enhance -d 8 -o 108 --clahe off                      only the surround, which nnU-Net then crops away
  nnUNetv2_ext enhance -i IMAGES -o ENHANCED --like 108             new images, with the parameters of dataset 108

CLAHE did not help where it was measured (docs/methods/photo.md). Compare with the images as they are.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("-d", metavar="DATASET", help="id or name of the source dataset")
    source.add_argument("-i", type=Path, metavar="FOLDER", help="images to predict")
    parser.add_argument("-o", required=True, help="with -d: id of the new dataset; with -i: a new folder")
    parser.add_argument("--like", metavar="DATASET", help="with -i: a dataset that this command has made")
    parser.add_argument("--clahe", choices=("L", "grey", "off"), help="lightness of RGB, one channel, or not (L)")
    parser.add_argument("--clip", type=float, help="contrast limit, times a flat histogram (2.0)")
    parser.add_argument("--grid", type=int, help="tiles along each axis (8)")
    parser.add_argument(
        "--blank-outside",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="set what lies outside the field of view to 0 (yes)",
    )
    parser.add_argument("-np", type=int, default=2, metavar="N", help="processes (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Enhance, and say what to type next."""
    from nnunetv2_ext.photo.enhance import enhance_dataset, enhance_folder
    from nnunetv2_ext.photo.enhancement import Enhancement

    names = ("clahe", "clip", "grid", "blank_outside")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.np < 1:
        raise ValueError(f"-np is a number of processes, at least 1, got {args.np}")
    if args.i is not None:
        if args.like is None:
            raise ValueError("-i needs --like DATASET, the dataset whose parameters the images get")
        if given:
            option = next(iter(given)).replace("_", "-")
            raise ValueError(f"with --like the parameters are those of dataset {args.like}: leave out --{option}")
        number = enhance_folder(args.i, Path(args.o), args.like, args.np)
        print(f"{number} images in {args.o}; next: nnUNetv2_predict -i {args.o} -o PREDICTIONS -d {args.like} -c 2d")
        return 0
    if args.like is not None:
        raise ValueError("--like goes with -i; a dataset (-d) gets the parameters that are typed")
    if not args.o.isdigit():
        raise ValueError(f"-o is the id of the new dataset, a number, got {args.o!r}")
    print(enhance_dataset(args.d, int(args.o), Enhancement(**given), args.np))
    print(f"next: nnUNetv2_plan_and_preprocess -d {args.o} -c 2d")
    return 0
