#!/usr/bin/env python3
"""Does a trained J-RAS model use its guides? Predict with the bank as it is, with a spoilt one and with none.

    python examples/guides_at_test.py RESULTS/Dataset004_X/nnUNetTrainerJRAS__nnUNetPlans__3d_fullres -f 0

Segments the fold's validation cases (those with a prediction in fold_F/validation) four times and prints the mean Dice
of each:
  as trained          the guides the model retrieves
  masks shuffled      the same guides, each with the mask of another one: are the masks read?
  guides shuffled     other guides than the retrieved ones, each with its own mask: does retrieval matter?
  no guides           an empty bank, as after `nnUNetv2_ext export --strip-bank`
Simplified: one shuffle, of the whole bank, with a fixed seed; foreground Dice only, by nnU-Net's own evaluation.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

import torch
from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import Tensor

from nnunetv2_ext.jras.strip import empty_bank

KEYS, LABELS = "bank.keys", "bank.labels"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model folder: TRAINER__PLANS__CONFIGURATION")
    parser.add_argument("-f", dest="fold", default="0")
    parser.add_argument("--raw", type=Path, help="raw dataset folder (default: of that name in nnUNet_raw)")
    parser.add_argument("--checkpoint", default="checkpoint_final.pth")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--no-mirroring", action="store_true", help="without test-time mirroring, faster")
    return parser.parse_args()


def banks(weights: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The four versions of the weights."""
    others = torch.randperm(len(weights[KEYS]), generator=torch.Generator().manual_seed(0))
    return {
        "as trained": weights,
        "masks shuffled": weights | {LABELS: weights[LABELS][others]},
        "guides shuffled": weights | {KEYS: weights[KEYS][others]},
        "no guides": empty_bank(weights),
    }


def main() -> None:
    args = parse_arguments()
    raw = args.raw or Path(os.environ.get("nnUNet_raw", ".")) / args.model.resolve().parent.name
    if not (raw / "imagesTr").is_dir():
        raise SystemExit(f"{raw} has no imagesTr: set nnUNet_raw, or give the raw dataset's folder with --raw")
    predictor = nnUNetPredictor(device=torch.device(args.device), use_mirroring=not args.no_mirroring, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(args.model), (args.fold,), args.checkpoint)
    weights = predictor.list_of_parameters[0]
    if not len(weights.get(KEYS, ())):
        raise SystemExit(f"{args.model} has no guides: it is no J-RAS model, or its bank was stripped")
    ending = predictor.dataset_json["file_ending"]
    cases = sorted(
        p.name.removesuffix(ending) for p in (args.model / f"fold_{args.fold}/validation").glob(f"*{ending}")
    )
    if not cases:
        raise SystemExit(
            f"{args.model}/fold_{args.fold}/validation has no predictions: finish the training, or run --val"
        )
    images = [sorted(map(str, (raw / "imagesTr").glob(f"{case}_[0-9][0-9][0-9][0-9]{ending}"))) for case in cases]
    reader = determine_reader_writer_from_dataset_json(predictor.dataset_json, images[0][0], verbose=False)()
    labels = predictor.label_manager
    for name, changed in banks(weights).items():
        predictor.list_of_parameters = [changed]
        with tempfile.TemporaryDirectory() as folder:
            predictor.predict_from_files_sequential(images, [f"{folder}/{case}" for case in cases])
            compute_metrics_on_folder(
                str(raw / "labelsTr"),
                folder,
                f"{folder}/summary.json",
                reader,
                ending,
                labels.foreground_regions if labels.has_regions else labels.foreground_labels,
                labels.ignore_label,
                num_processes=1,
                chill=True,
            )
            summary = json.loads(Path(f"{folder}/summary.json").read_text())
        print(f"{name:<16} {summary['foreground_mean']['Dice']:.4f}", flush=True)


if __name__ == "__main__":
    main()
