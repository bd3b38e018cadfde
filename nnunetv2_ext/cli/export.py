"""``nnUNetv2_ext export MODEL_FOLDER OUT``: a model folder that plain nnU-Net can predict with."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("model_folder", type=Path, help="nnUNet_results/DATASET/TRAINER__PLANS__CONFIGURATION")
    parser.add_argument(
        "output",
        type=Path,
        help="folder to write; must not exist. nnU-Net finds a model by -d and -tr if it is named "
        "nnUNetTrainer__PLANS__CONFIGURATION",
    )
    parser.add_argument(
        "--weights",
        default="student",
        help="student (the trained network, default), teacher (MedContext's moving average), or one of RADA's three "
        "networks (net1, net2, net3)",
    )
    bank = parser.add_mutually_exclusive_group()
    bank.add_argument(
        "--strip-bank",
        action="store_true",
        help="write a J-RAS model without patients' patches; it predicts with this package, on the plain path",
    )
    bank.add_argument(
        "--blank-groups",
        action="store_true",
        help="write a J-RAS model that keeps its guides, and with them patients' patches, but not the numbers of their "
        "subjects; it predicts as before, with this package",
    )
    parser.add_argument(
        "--best",
        action="store_true",
        help="also export checkpoint_best.pth of each fold; it was chosen by the trained network's pseudo Dice",
    )
    parser.add_argument(
        "--drop-semantics",
        action="store_true",
        help="leave out the semantic head of a RADA network, which plain nnU-Net cannot compute: predictions change, "
        "so validate the exported model",
    )


def run(args: argparse.Namespace) -> int:
    """Export, and print how to predict."""
    import torch

    from nnunetv2_ext.core.export import export_model

    written = export_model(
        args.model_folder,
        args.output,
        args.weights,
        args.strip_bank,
        args.drop_semantics,
        args.blank_groups,
        args.best,
    )
    for path in written:
        print(f"wrote {path}")
    names = {path.name for path in written}
    name = next((n for n in ("checkpoint_final.pth", "checkpoint_latest.pth") if n in names), written[0].name)
    folds = [p.parent.name.removeprefix("fold_") for p in written if p.name == name]  # nnU-Net's default is all five
    command = ["nnUNetv2_predict_from_modelfolder", "-i", "INPUT", "-o", "OUTPUT", "-m", str(args.output), "-f", *folds]
    command += [] if name == "checkpoint_final.pth" else ["-chk", name]
    command += [] if torch.cuda.is_available() else ["-device", "cpu"]
    needs = "with" if args.strip_bank or args.blank_groups else "without"
    if args.blank_groups:
        print("PRIVACY: these checkpoints hold image patches of training cases; --strip-bank leaves them out")
    print(f"Predict {needs} this package: {shlex.join(command)}")
    return 0
