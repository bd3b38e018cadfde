"""``nnUNetv2_ext adapt MODEL -i IMAGES -l LABELS -o MODEL2``: for a few labelled cases of a new site."""

import argparse
from pathlib import Path

EPILOG = """\
IMAGES and LABELS are named as in a raw nnU-Net dataset: CASE_0000.nii.gz and CASE.nii.gz.
Learning rate, batch size, seed and the like are also taken from nnUNet_ext_settings, see
`nnUNetv2_ext settings nnUNetTrainerAdapt`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("model", type=Path, help="nnUNet_results/DATASET/TRAINER__PLANS__CONFIGURATION, or an export")
    parser.add_argument("-i", "--images", type=Path, required=True, help="images of the new site's labelled cases")
    parser.add_argument("-l", "--labels", type=Path, required=True, help="their labels")
    parser.add_argument("-o", "--output", type=Path, required=True, help="model folder to write; must not exist")
    parser.add_argument("-f", "--folds", nargs="+", default=[], help="folds that are adapted (default: all there are)")
    parser.add_argument("-chk", "--checkpoint", default="checkpoint_final.pth", help="default: %(default)s")
    parser.add_argument(
        "--not-drawn", nargs="+", default=[], metavar="NAME",
        help="classes or regions of the model that the new labels leave in the background: neither punished nor "
        "forgotten",
    )  # fmt: skip
    parser.add_argument(
        "--ignore", type=int, metavar="VALUE",
        help="label value that marks what nobody looked at; the model's own ignore label needs no option",
    )  # fmt: skip
    replay = parser.add_mutually_exclusive_group()
    replay.add_argument(
        "--replay", type=float, metavar="SHARE",
        help="share of each batch that is old training cases (default: 0.7 where nnUNet_preprocessed has them)",
    )  # fmt: skip
    replay.add_argument("--no-replay", dest="replay", action="store_const", const=0.0, help="new cases only")
    parser.add_argument(
        "--head-only", action="store_true",
        help="fit the last layer in closed form: seconds on a CPU, and less gain; the old site loses more",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=300, help="optimiser steps (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=1e-3, help="first learning rate (default: %(default)s)")
    parser.add_argument(
        "--report", choices=("first", "all", "none"), default="first",
        help="for which folds the given cases are left out one by one, a training each, and the old validation cases "
        "are predicted (default: the first)",
    )  # fmt: skip
    parser.add_argument("--previous-stage", type=Path, metavar="FOLDER",
                        help="of a cascade: the given images as predicted by the previous stage")  # fmt: skip
    parser.add_argument("--group-regex", metavar="REGEX",
                        help="its first group is the subject in a case's name, who is left out whole")  # fmt: skip
    parser.add_argument("--c", action="store_true", help="go on with the same command that was interrupted")
    parser.add_argument("-device", choices=("cpu", "cuda", "mps"), default="cuda", help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    """Adapt and say what came out."""
    for name, wrong in (("steps", args.steps < 1), ("rate", not 0 < args.rate < 1)):
        if wrong:
            raise ValueError(f"--{name} {getattr(args, name)}: give a number above 0{' below 1' * (name == 'rate')}")
    if args.replay is not None and not 0 <= args.replay < 1:
        raise ValueError(f"--replay {args.replay}: the share of old cases is 0 or more and below 1")
    from nnunetv2_ext.adapt.adaptation import Request, adapt
    from nnunetv2_ext.core.devices import check_device

    check_device(args.device)
    known = {key: value for key, value in vars(args).items() if key not in ("c", "folds", "not_drawn")}
    request = Request(**known, folds=tuple(args.folds), not_drawn=tuple(args.not_drawn))
    try:
        adapt(request, args.c)
    except KeyboardInterrupt:
        return 130
    return 0
