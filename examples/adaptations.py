"""What `nnUNetv2_ext adapt` brings, measured on cases of the new site that it was not given.

    python examples/adaptations.py MODEL --site RAW_FOLDER --folds 0 1 2 --not-drawn NAME --output FOLDER

Draws k cases of the new site's raw dataset, adapts with the real command by each recipe, and scores the adapted model
on the site's other cases and on the fold's validation cases of the model's own dataset, which nnUNet_preprocessed has
to hold. Draws are disjoint, and each adapts the next fold. What is done stays in FOLDER and is not done again.
Simplified: means and single draws, no intervals.
"""

import argparse
import json
import random
import subprocess
import time
from pathlib import Path

import numpy as np
import torch

from nnunetv2_ext.adapt.cases import find_cases, preprocess, read_truth
from nnunetv2_ext.adapt.model import open_model
from nnunetv2_ext.adapt.old import OldData, find_old_data
from nnunetv2_ext.adapt.score import Segmenter, read_preprocessed
from nnunetv2_ext.core.files import atomic_write_text
from nnunetv2_ext.data.case import read_label_map
from nnunetv2_ext.parts.dice import dice

RECIPES = {
    "default": [],
    "replay 0.5": ["--replay", "0.5"],
    "no replay": ["--no-replay"],
    "head only": ["--head-only"],
    "head only, no replay": ["--head-only", "--no-replay"],
}


def draws(names: list[str], k: int, number: int, seed: int) -> list[list[str]]:
    """Disjoint sets of k names."""
    order = random.Random(seed).sample(sorted(names), k * number)
    return [sorted(order[k * i : k * (i + 1)]) for i in range(number)]


class Sites:
    """Scores of a fold on all cases of the new site and on the validation cases of the old one."""

    def __init__(self, args: argparse.Namespace, fold: str) -> None:
        self.args, self.fold, self.model = args, fold, open_model(args.model, [fold])
        given = find_cases(args.site / "imagesTr", args.site / "labelsTr", self.model)
        self.new = {one.case: one for one in given}
        self.folder = args.output / "site" / self.model.configuration.data_identifier
        preprocess(given, self.model, self.model.dataset_json, self.folder, None)
        found = find_old_data(self.model)
        if not isinstance(found, OldData):
            raise SystemExit(f"the old site cannot be scored: {found}")
        self.old, (_, self.validation, _) = found, found.split(fold)
        self.validation = self.validation[:: max(1, len(self.validation) // args.old_cases)]

    def scores(self, folder: Path) -> dict[str, dict[str, float]]:
        """Case to mean Dice over structures, of ``new`` and ``old``; kept in a file."""
        file = self.args.output / f"scores_{folder.name}.json"
        if folder == self.args.model:
            file = self.args.output / f"scores_fold{self.fold}_before.json"
        if not file.is_file():
            model, not_drawn = open_model(folder, [self.fold]), self.args.not_drawn
            segmenter = Segmenter(model, torch.device(self.args.device))
            segmenter.predictor.use_mirroring = not self.args.no_mirroring
            weights = model.checkpoint(self.fold)["network_weights"]
            reader, structures = model.plans.image_reader_writer_class(), model.structures
            drawn = {name: value for name, value in structures.items() if name not in not_drawn}
            found: dict[str, dict[str, float]] = {"new": {}, "old": {}}
            for case, given in self.new.items():
                image, _, properties = read_preprocessed(self.folder, case, model)
                labels = segmenter.segment(weights, image, properties)
                found["new"][case] = float(np.nanmean([*dice(labels, *read_truth(given, model, None), drawn).values()]))
            for case in self.validation:
                image, _, properties = read_preprocessed(self.old.data.folder, case, model)
                labels = segmenter.segment(weights, image, properties)
                truth, _ = read_label_map(case, self.old.truth_file(case), reader)
                found["old"][case] = float(np.nanmean([*dice(labels, truth, None, structures).values()]))
            atomic_write_text(file, json.dumps(found))
        return json.loads(file.read_text())


def adapt(args: argparse.Namespace, fold: str, cases: list[str], options: list[str], output: Path) -> None:
    """Run the command on these cases, and keep its seconds."""
    folder = output.with_name(f"{output.name}_cases")
    for sub, tail in (("imagesTr", "_????.*"), ("labelsTr", ".*")):
        (folder / sub).mkdir(parents=True, exist_ok=True)
        for file in (file for case in cases for file in (args.site / sub).glob(f"{case}{tail}")):
            if not (folder / sub / file.name).exists():
                (folder / sub / file.name).symlink_to(file.resolve())
    command = ["nnUNetv2_ext", "adapt", str(args.model), "-i", str(folder / "imagesTr"), "-l", str(folder / "labelsTr")]
    command += ["-o", str(output), "-f", fold, "--report", "none", "-device", args.device, *options]
    command += ["--not-drawn", *args.not_drawn] if args.not_drawn else []
    started = time.monotonic()
    subprocess.run([*command, "--c"], check=True)
    atomic_write_text(output / "seconds.txt", f"{time.monotonic() - started:.1f}")


def main() -> None:
    """Run what is missing, then print a row a recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="nnUNet_results/DATASET/TRAINER__PLANS__CONFIGURATION")
    parser.add_argument("--site", type=Path, required=True, help="raw dataset of the new site, all of it labelled")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--folds", nargs="+", default=["0"], help="of the model; default: %(default)s")
    parser.add_argument("--not-drawn", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--k", type=int, nargs="+", default=[3, 5], help="cases given; default: %(default)s")
    parser.add_argument("--draws", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the draws; default: %(default)s")
    parser.add_argument("--only", type=int, nargs="+", help="of the draws; default: all")
    parser.add_argument("--old-cases", type=int, default=1000, help="validation cases scored at most, about")
    parser.add_argument("--no-mirroring", action="store_true", help="score without, at a quarter of the time")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="RECIPE")
    parser.add_argument("-device", default="cpu")
    args = parser.parse_args()
    only = range(args.draws) if args.only is None else args.only
    folds = dict.fromkeys(args.folds[number % len(args.folds)] for number in only)
    sites = {fold: Sites(args, fold) for fold in folds}
    before = {fold: site.scores(args.model) for fold, site in sites.items()}
    for fold, scores in before.items():
        new, old = (np.mean([*scores[site].values()]) for site in ("new", "old"))
        print(f"fold {fold} before: new {100 * new:.1f}, old {100 * old:.1f}", flush=True)
    for recipe, k in ((name, k) for name in args.recipes for k in args.k):
        gains, losses, seconds = [], [], []
        names = list(next(iter(sites.values())).new)
        for number in only:
            cases = draws(names, k, args.draws, args.seed)[number]
            fold = args.folds[number % len(args.folds)]
            output = args.output / "_".join(f"fold{fold} {recipe} {k} {number}".replace(",", "").split())
            if not output.exists():
                adapt(args, fold, cases, RECIPES[recipe], output)
            after, was = sites[fold].scores(output), before[fold]
            gains.append(np.mean([after["new"][c] - was["new"][c] for c in names if c not in cases]))
            losses.append(np.mean([after["old"][c] - was["old"][c] for c in was["old"]]))
            seconds.append(float((output / "seconds.txt").read_text()))
        each = " ".join(f"{100 * gain:+.1f}/{100 * loss:+.1f}" for gain, loss in zip(gains, losses))
        print(f"{recipe:21s} k={k}: new {100 * np.mean(gains):+.1f}, old {100 * np.mean(losses):+.1f} ({each}), "
              f"{np.mean(seconds):.0f} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
