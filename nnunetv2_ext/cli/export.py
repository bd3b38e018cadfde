"""``nnUNetv2_ext export MODEL_FOLDER OUT``: a model folder that plain nnU-Net can predict with."""

from __future__ import annotations

import argparse
import shlex
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from nnunetv2_ext import installed_trainers
from nnunetv2_ext.cli._trainers import load_trainer

if TYPE_CHECKING:
    from nnunetv2_ext.core.export_edit import ExportEdit


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
    parser.add_argument(
        "--best",
        action="store_true",
        help="also export checkpoint_best.pth of each fold; it was chosen by the trained network's pseudo Dice",
    )
    for name, edit in _export_edits().items():
        explained = edit.description.replace("%", "%%")
        parser.add_argument(f"--{name}", dest="edits", action="append_const", const=name, help=explained)


def _export_edits() -> dict[str, ExportEdit]:
    """What the installed trainers let one take out of their models, by the name of the option."""
    edits: dict[str, ExportEdit] = {}
    for name in installed_trainers():
        with suppress(Exception):  # it cannot be imported; its models say so themselves
            edits.update(load_trainer(name).all_export_edits())
    return edits


def run(args: argparse.Namespace) -> int:
    """Export, and print how to predict."""
    import torch

    from nnunetv2_ext.core.checkpoint import read
    from nnunetv2_ext.core.export import STOCK_TRAINER, export_model

    written = export_model(args.model_folder, args.output, args.weights, args.edits or [], args.best)
    for path in written:
        print(f"wrote {path}")
    names = {path.name for path in written}
    name = next((n for n in ("checkpoint_final.pth", "checkpoint_latest.pth") if n in names), written[0].name)
    folds = [p.parent.name.removeprefix("fold_") for p in written if p.name == name]  # nnU-Net's default is all five
    command = ["nnUNetv2_predict_from_modelfolder", "-i", "INPUT", "-o", "OUTPUT", "-m", str(args.output), "-f", *folds]
    command += [] if name == "checkpoint_final.pth" else ["-chk", name]
    command += [] if torch.cuda.is_available() else ["-device", "cpu"]
    needs = "without" if read(written[0])["trainer_name"] == STOCK_TRAINER else "with"
    print(f"Predict {needs} this package: {shlex.join(command)}")
    return 0
