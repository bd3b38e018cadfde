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
        help="student (the trained network, default) or teacher (MedContext's moving average)",
    )
    parser.add_argument(
        "--strip-bank",
        action="store_true",
        help="write a J-RAS model without patients' patches; it predicts with this package, on the plain path",
    )


def run(args: argparse.Namespace) -> int:
    """Export, and print how to predict."""
    from nnunetv2_ext.core.export import export_model

    written = export_model(args.model_folder, args.output, args.weights, args.strip_bank)
    for path in written:
        print(f"wrote {path}")
    final = [p for p in written if p.name == "checkpoint_final.pth"]
    shown = final or [p for p in written if p.name == written[0].name]
    folds = [p.parent.name.removeprefix("fold_") for p in shown]  # nnU-Net's default is all five
    command = ["nnUNetv2_predict_from_modelfolder", "-i", "INPUT", "-o", "OUTPUT", "-m", str(args.output), "-f", *folds]
    needs = "with" if args.strip_bank else "without"
    print(f"Predict {needs} this package: {shlex.join(command if final else [*command, '-chk', written[0].name])}")
    return 0
