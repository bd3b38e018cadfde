"""``nnUNetv2_ext estimate``: the Dice to expect of cases that nobody has labelled."""

import argparse
from pathlib import Path

EPILOG = """\
Examples:
  nnUNetv2_ext estimate fit MODEL_FOLDER
  nnUNetv2_ext estimate apply MODEL_FOLDER -i IMAGES -o OUT
  nnUNetv2_ext estimate apply MODEL_FOLDER -i IMAGES -o OUT --local-labels FOLDER

MODEL_FOLDER is nnUNet_results/DATASET/TRAINER__PLANS__CONFIGURATION with its finished folds, of any nnU-Net trainer.
`fit` predicts each fold's validation cases. `apply` writes what nnUNetv2_predict would, and a list, worst case first.
An estimate is not a measurement. At another site it is a ranking, until at least three local cases are labelled.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare both steps' arguments."""
    steps = parser.add_subparsers(dest="step", required=True, metavar="fit|apply")
    first = steps.add_parser("fit", help="from the folds' own validation cases")
    first.add_argument("model", type=Path, metavar="MODEL_FOLDER")
    first.add_argument("-f", nargs="+", metavar="FOLD", help="folds (default: all that are finished)")
    first.add_argument("-chk", default="checkpoint_final.pth", metavar="FILE", help="(default: %(default)s)")
    first.add_argument("--groups", type=Path, metavar="FILE", help="CSV or JSON: which cases are of one subject")
    first.add_argument("--no-corrupted", action="store_true", help="fit on clean images only; narrower, less robust")
    first.add_argument("--features", nargs="+", default=[], choices=("+tta", "+ens"), metavar="+tta|+ens",
                       help="further features: agreement of mirrored passes, agreement of folds")  # fmt: skip
    first.add_argument("--npz", action="store_true", help="from the probabilities of nnUNetv2_train ... --val --npz")
    second = steps.add_parser("apply", help="segment new images, with estimates")
    second.add_argument("model", type=Path, metavar="MODEL_FOLDER")
    second.add_argument("-i", required=True, type=Path, metavar="IMAGES")
    second.add_argument("-o", required=True, type=Path, metavar="FOLDER", help="new or empty")
    second.add_argument("--local-labels", type=Path, metavar="FOLDER", help="true segmentations of some of the images")
    second.add_argument("--previous-stage", type=Path, metavar="FOLDER", help="of a cascade: its segmentations")
    second.add_argument("--npz", type=Path, metavar="FOLDER", help="as nnUNetv2_predict --save_probabilities left it")
    second.add_argument("--reverse", metavar="tiny-unet|universeg:FILE", help="also SPE's score; see the card")
    for step in (first, second):
        step.add_argument("--threshold", type=float, default=0.7, metavar="DICE", help="look below (%(default)s)")
        step.add_argument(
            "-device", default=None, choices=("cpu", "cuda", "mps"), help="(default: cuda if there is one)"
        )


def run(args: argparse.Namespace) -> int:
    """Fit or apply, and say where the results are."""
    import torch

    from nnunetv2_ext.core.devices import check_device
    from nnunetv2_ext.estimate import report

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    if args.step == "fit":
        from nnunetv2_ext.core.files import atomic_write_text
        from nnunetv2_ext.estimate.fit import FILE, fit

        optional = [name.removeprefix("+") for name in dict.fromkeys(args.features)]
        fitted = fit(args.model, args.f, args.chk, args.groups, not args.no_corrupted, optional, args.npz, device)
        text = report.fit_report(fitted, args.threshold)
        atomic_write_text(args.model / "estimate_fit.md", text)
        model = args.model.resolve()
        report.draw_fit(fitted.calibration, args.model / "estimate_fit.png", f"{model.parent.name}, {model.name}")
        print(f"{text}\nwrote {FILE}, estimate_fit.md and estimate_fit.png to {args.model}")
        return 0
    from nnunetv2_ext.core.files import read_json
    from nnunetv2_ext.estimate.apply import apply

    result = apply(
        args.model, args.i, args.o, args.local_labels, args.threshold, device, args.previous_stage, args.npz,
        args.reverse,
    )  # fmt: skip
    report.write_results(result, args.o)
    report.draw_worst(result, args.i, args.o, read_json(args.model / "dataset.json"), args.o / "estimate_worst.png")
    print(f"{report.apply_report(result)}\nwrote segmentations, estimate.md, .csv, .json and a picture to {args.o}")
    return 0
