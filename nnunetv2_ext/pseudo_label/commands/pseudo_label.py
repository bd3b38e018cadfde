"""``nnUNetv2_ext pseudo-label``: a dataset with labelled cases, and unlabelled ones that a model has labelled."""

import argparse
from pathlib import Path

EPILOG = """\
Examples:
  nnUNetv2_ext unlabelled -d 4 -c 3d_fullres -i SCANS
  nnUNetv2_ext pseudo-label -d 4 -m MODEL_FOLDER -o 104 -f 0             then train fold 0 of dataset 104
  nnUNetv2_ext pseudo-label -d 4 -m MODEL_FOLDER -o 104                  all folds label; judge on test cases only
  nnUNetv2_ext pseudo-label -d 4 -m MODEL_FOLDER_OF_104 -o 105 --round 2

MODEL_FOLDER is nnUNet_results/DATASET/TRAINER__PLANS__CONFIGURATION with finished folds, of any nnU-Net trainer. Voxels
on which its folds disagree, or of which they are unsure, go under the ignore label. Real labels stay as they are.
Each fold's validation labels have taught all other folds. After labelling by several folds a validation is therefore
too good: judge on test cases, or label with -f N and train fold N only. An interrupted run goes on with the same
command.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("-d", required=True, metavar="DATASET", help="id or name of the labelled dataset with a pool")
    parser.add_argument("-m", required=True, type=Path, metavar="MODEL_FOLDER", help="whose predictions become labels")
    parser.add_argument("-o", required=True, type=int, metavar="ID", help="id of the new dataset; must be free")
    parser.add_argument("-f", nargs="+", metavar="FOLD", help="folds that label (default: all that are finished)")
    parser.add_argument("-chk", default="checkpoint_final.pth", metavar="FILE", help="(default: %(default)s)")
    parser.add_argument("--round", type=int, default=1, metavar="N",
                        help="2: the model was trained on the dataset of round 1 (default: %(default)s)")  # fmt: skip
    parser.add_argument("--confidence", type=float, default=0.7, metavar="P",
                        help="voxels with a lower probability are ignored (default: %(default)s)")  # fmt: skip
    parser.add_argument("--keep", type=float, default=0.8, metavar="SHARE",
                        help="share of the cases that is kept, best first (default: %(default)s)")  # fmt: skip
    parser.add_argument("-device", default=None, choices=("cpu", "cuda", "mps"), help="(default: cuda if there is one)")


def run(args: argparse.Namespace) -> int:
    """Label, write the dataset, and say what to type next."""
    import torch

    from nnunetv2_ext.core.devices import check_device
    from nnunetv2_ext.pseudo_label.dataset import Request, pseudo_label

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    request = Request(args.d, args.m, args.o, args.f, args.chk, args.round, args.confidence, args.keep)
    pseudo_label(request, device)
    return 0
