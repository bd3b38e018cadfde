#!/usr/bin/env python3
"""Does a trained J-RAS model read its guides, and does a replaced bank help at another site?

    python examples/guides_at_test.py RESULTS/Dataset004_X/nnUNetTrainerJRAS__nnUNetPlans__2d -f 0 \\
        --site RAW/Dataset005_Y --plain RESULTS/Dataset004_X/nnUNetTrainerExt__nnUNetPlans__2d ADAPTED_MODEL

Prints the mean Dice (x 100) of, on the fold's validation cases and on the site's:
  as trained          the model with the bank of its training cases
  wrong masks         the same guides, each with the mask of another one: are the masks read?
  any guides          guides drawn at random: does retrieval matter?
  no guides           an empty bank, as after `nnUNetv2_ext bank MODEL --strip`
  new bank            with --site: the bank replaced by a few of the site's cases (`nnUNetv2_ext bank`), scored on its
                      other cases; and with wrong masks
  plain               with --plain: the fold of other models on the same cases, an adapted one say
Simplified: one shuffle with a fixed seed, one draw of site cases (several scans a
patient: --group-regex); Dice of labels on the preprocessed grid.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import Tensor

from nnunetv2_ext.core.labelmaps import logits_to_labels
from nnunetv2_ext.data.folders import cases_of_images, preprocess_case
from nnunetv2_ext.jras.replace import replace_bank
from nnunetv2_ext.jras.strip import empty_bank

LABELS, VECTORS = "bank.labels", "reader.query_vector.weight"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="J-RAS model folder: TRAINER__PLANS__CONFIGURATION")
    parser.add_argument("-f", dest="fold", default="0")
    parser.add_argument("--raw", type=Path, help="raw dataset folder (default: of that name in nnUNet_raw)")
    parser.add_argument("--site", type=Path, help="raw dataset folder of another site, with imagesTr and labelsTr")
    parser.add_argument("--bank-cases", type=int, default=5, help="cases of the site in the new bank")
    parser.add_argument("--draw", type=int, default=0, help="which draw of site cases")
    parser.add_argument("--group-regex", help="its first group names the patient: scans of the bank's are not scored")
    parser.add_argument("--site-labels", type=int, nargs="+", help="labels that the site draws (default: all)")
    parser.add_argument("--plain", type=Path, nargs="+", default=[], help="model folders to compare with, same fold")
    parser.add_argument("--checkpoint", default="checkpoint_final.pth")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--no-mirroring", action="store_true", help="without test-time mirroring, faster")
    return parser.parse_args()


def banks(weights: dict[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Versions of the weights, by name."""
    others = torch.randperm(len(weights[LABELS]), generator=torch.Generator().manual_seed(0))
    yield "as trained", weights
    yield "wrong masks", weights | {LABELS: weights[LABELS][others]}
    if VECTORS in weights:
        noise = torch.randn(weights[VECTORS].shape, generator=torch.Generator().manual_seed(0))
        yield "any guides", weights | {VECTORS: noise}
    yield "no guides", empty_bank(weights)


class Cases:
    """Preprocessed images with labels that predictions are scored on."""

    def __init__(
        self, raw: Path, names: Sequence[str], predictor: nnUNetPredictor, labels: Sequence[int] | None
    ) -> None:
        dataset_json, plans = predictor.dataset_json, predictor.plans_manager
        self.labels = labels or [label for label in predictor.label_manager.all_labels if label]
        self.read = []
        files = cases_of_images(raw / "imagesTr", dataset_json["file_ending"])
        for name in names:
            label = raw / "labelsTr" / f"{name}{dataset_json['file_ending']}"
            how = plans, predictor.configuration_manager, dataset_json
            self.read.append(preprocess_case(name, files[name], label, *how)[:2])

    def score(self, predictor: nnUNetPredictor) -> float:
        """Dice, mean over the cases that show a label, then over the labels; x 100."""
        found: dict[int, list[float]] = {label: [] for label in self.labels}
        for image, truth in self.read:
            logits = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(image))
            prediction = logits_to_labels(logits.float(), predictor.label_manager)
            for label, scores in found.items():
                one, other = prediction == label, truth[0] == label
                if other.any():
                    scores.append(2 * (one & other).sum() / (one.sum() + other.sum()))
        return 100 * sum(sum(scores) / len(scores) for scores in found.values()) / len(found)


def load(model: Path, args: argparse.Namespace) -> nnUNetPredictor:
    predictor = nnUNetPredictor(device=torch.device(args.device), use_mirroring=not args.no_mirroring, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (args.fold,), args.checkpoint)
    return predictor


def validation_cases(base: Path, fold: str) -> list[str]:
    """Of nnU-Net's split."""
    splits = Path(os.environ["nnUNet_preprocessed"]) / base.name / "splits_final.json"
    return list(json.loads(splits.read_text())[int(fold)]["val"])


def others_of(names: Sequence[str], guides: Sequence[str], group_regex: str | None) -> list[str]:
    """The site's cases of other patients than the bank's; without a pattern each case is a patient."""

    def patient(name: str) -> str:
        found = re.search(group_regex, name) if group_regex else None
        return found.group(1) if found else name

    in_bank = {patient(name) for name in guides}
    return [name for name in names if patient(name) not in in_bank]


def main() -> None:
    args = parse_arguments()
    raw = args.raw or Path(os.environ.get("nnUNet_raw", ".")) / args.model.resolve().parent.name
    if not (raw / "imagesTr").is_dir():
        raise SystemExit(f"{raw} has no imagesTr: set nnUNet_raw, or give the raw dataset's folder with --raw")
    predictor = load(args.model, args)
    weights = predictor.list_of_parameters[0]
    if not len(weights.get(LABELS, ())):
        raise SystemExit(f"{args.model} has no guides: it is not a J-RAS model, or its bank was stripped")
    where = {"own site": Cases(raw, validation_cases(raw, args.fold), predictor, None)}
    with tempfile.TemporaryDirectory() as scratch:
        new = None
        if args.site:
            names = sorted(cases_of_images(args.site / "imagesTr", predictor.dataset_json["file_ending"]))
            guides = sorted(random.Random(args.draw).sample(names, args.bank_cases))
            for kind in ("imagesTr", "labelsTr"):
                (Path(scratch) / kind).mkdir()
                for file in (args.site / kind).iterdir():
                    if any(file.name.startswith((f"{case}_", f"{case}.")) for case in guides):
                        (Path(scratch) / kind / file.name).symlink_to(file.resolve())
            others = others_of(names, guides, args.group_regex)
            where["other site"] = Cases(args.site, others, predictor, args.site_labels)
            output = Path(scratch) / args.model.name
            replace_bank(args.model, Path(scratch) / "imagesTr", Path(scratch) / "labelsTr", output)
            new = load(output, args)
        for place, cases in where.items():
            print(f"{place}, {len(cases.read)} cases", flush=True)
            rows = list(banks(weights))
            for name, changed in rows:
                predictor.list_of_parameters = [changed]
                print(f"  {name:<26} {cases.score(predictor):.1f}", flush=True)
            if new is not None and place == "other site":
                replaced = new.list_of_parameters[0]
                for name, changed in list(banks(replaced))[:3]:
                    new.list_of_parameters = [changed]
                    name = "" if name == "as trained" else f", {name}"
                    print(f"  {'new bank' + name:<26} {cases.score(new):.1f}", flush=True)
            for number, plain in enumerate(args.plain, 1):
                print(f"  {f'plain {number}':<26} {cases.score(load(plain, args)):.1f}", flush=True)


if __name__ == "__main__":
    main()
