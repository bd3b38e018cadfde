"""``nnUNetv2_ext export MODEL_FOLDER OUT``: a model folder that plain nnU-Net can predict with."""

import argparse
import shlex
from pathlib import Path
from typing import Any

from nnunetv2_ext.core.outside import methods


def add_arguments(parser: argparse.ArgumentParser) -> None:
    def add(name: str, text: str, **how: Any) -> None:
        parser.add_argument(name, help=text.replace("%", "%%"), **how)

    add("model_folder", "nnUNet_results/DATASET/TRAINER__PLANS__CONFIGURATION", type=Path)
    add("output", "folder to write; must not exist. nnU-Net finds a model by -d and -tr if it is named "
        "nnUNetTrainer__PLANS__CONFIGURATION", type=Path)  # fmt: skip
    # what one phrase explains stands together: student (...), teacher (...), net1 or net2 (...)
    phrases = {"the trained network, default": ["student"]}
    for method in methods().values():
        for name, phrase in method.weights.items():
            phrases.setdefault(phrase, []).append(name)
    weights = ", ".join(f"{' or '.join(names)} ({phrase})" for phrase, names in phrases.items())
    add("--weights", weights, default="student")
    add("--best", "also export checkpoint_best.pth of each fold; it was chosen by the trained network's pseudo Dice",
        action="store_true")  # fmt: skip
    parser.set_defaults(edits=[])
    for method in methods().values():
        for name, edit in method.export_edits.items():
            add(f"--{name}", edit.description, dest="edits", action="append_const", const=name)


def run(args: argparse.Namespace) -> int:
    import torch

    from nnunetv2_ext.core.checkpoint import read
    from nnunetv2_ext.core.export import STOCK_TRAINER, export_model

    written = export_model(args.model_folder, args.output, args.weights, args.edits, args.best)
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
