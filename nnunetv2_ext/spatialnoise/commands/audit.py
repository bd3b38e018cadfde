"""``nnUNetv2_ext audit``: which cases and regions of a dataset's labels are probably wrong."""

import argparse
from pathlib import Path

EPILOG = """\
Examples:
  nnUNetv2_ext audit MODEL_FOLDER -o REPORT
  nnUNetv2_ext audit MODEL_FOLDER/fold_*/validation -o REPORT          of nnUNetv2_train ... --npz
  nnUNetv2_ext audit MODEL_FOLDER -o REPORT --ignore-above 0.9 -d 104  after reading the report

MODEL_FOLDER is nnUNet_results/DATASET/TRAINER__PLANS__CONFIGURATION with its finished folds, of any nnU-Net trainer.
Each case is judged by a fold that has not trained on it. No label is edited. An interrupted audit goes on.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "sources",
        nargs="+",
        type=Path,
        metavar="MODEL_FOLDER",
        help="a model, or folders with saved probabilities (CASE.npz) of cases that their model has not seen",
    )
    parser.add_argument("-o", required=True, type=Path, metavar="FOLDER", help="new, empty, or of the same audit")
    parser.add_argument("-f", nargs="+", metavar="FOLD", help="folds (default: all that are finished)")
    parser.add_argument("-chk", default="checkpoint_final.pth", metavar="FILE", help="(default: %(default)s)")
    parser.add_argument("--spatial", action="store_true", help="let the errors of neighbours support one another")
    parser.add_argument(
        "--ignore-above",
        type=float,
        metavar="P",
        help="write a dataset with voxels of a higher error probability ignored",
    )
    parser.add_argument("-d", type=int, metavar="ID", help="id of that dataset; must be free")
    parser.add_argument("-device", default=None, choices=("cpu", "cuda", "mps"), help="(default: cuda if there is one)")


def run(args: argparse.Namespace) -> int:
    """Audit, and say where the report is."""
    import torch

    from nnunetv2_ext.core.devices import check_device
    from nnunetv2_ext.spatialnoise.audit.audit import audit
    from nnunetv2_ext.spatialnoise.audit.ignored import ignore_doubtful, require_request
    from nnunetv2_ext.spatialnoise.audit.report import write_report

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    if args.ignore_above is not None:
        require_request(args.ignore_above, args.d)
    elif args.d is not None:
        raise ValueError("-d is the id of the dataset that --ignore-above writes: give both")
    found = audit(args.sources, args.o, args.f, args.chk, args.spatial, device)
    print(f"{write_report(found)}\nwrote report.md, cases.csv, regions.csv, audit.json, maps and pictures to {args.o}")
    if args.ignore_above is not None:
        folder, voxels, cases = ignore_doubtful(found, args.ignore_above, args.d)
        print(f"wrote {folder}: {voxels} voxels of {cases} cases are ignored")
        print(f"next: nnUNetv2_plan_and_preprocess -d {args.d}, and a training with any trainer")
    return 0
