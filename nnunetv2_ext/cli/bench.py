"""``nnUNetv2_ext bench``: what trainers cost on this machine, as ratios to plain nnUNetTrainer."""

import argparse
import json
import os
from pathlib import Path

from nnunetv2_ext.bench.candidates import parse_candidates
from nnunetv2_ext.core.files import require_picture

EPILOG = """\
Example:
  nnUNetv2_ext bench -d 4 -c 3d_fullres -tr nnUNetTrainerExt "nnUNetTrainerExt:batch_size=4" --plot cost.png

Nothing is written into nnUNet_results. Every trainer steps on one fixed batch, so loading and augmentation do not
count; --workers 2 adds the share of a step that waits for them.
Exit status: 0, or 1 if a trainer failed (the others are still reported).
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-d", help="id or name of a preprocessed dataset", required=True, metavar="DATASET")
    add("-c", help="e.g. 3d_fullres", required=True, metavar="CONFIGURATION")
    add("-p", help="plans name (default: %(default)s)", default="nnUNetPlans", metavar="PLANS")
    add("-f", help="fold, a number or all (default: %(default)s)", default="0", metavar="FOLD")
    add("-tr", help="trainers beside plain nnUNetTrainer, which is always measured; TRAINER:SETTINGS for one with "
        "settings, also several times", nargs="+", default=[], metavar="TRAINER")  # fmt: skip
    add("--settings", help="nnUNet_ext_settings of one trainer: key=value pairs or a YAML file", nargs="+",
        action="extend", default=[], metavar="TRAINER=SETTINGS")  # fmt: skip
    add("-device", help="default: cuda if there is a GPU, else cpu", choices=("cpu", "cuda", "mps"))
    add("--rounds", help="turns of each trainer (default: %(default)s)", type=int, default=5)
    add("--steps-per-round", help="steps in each turn (default: %(default)s)", type=int, default=4)
    add("--warm-up", help="steps that do not count (default: %(default)s)", type=int, default=2)
    add("--batches", help="one batch of the dataset, or noise and random labels of the same shape (default: "
        "%(default)s)", choices=("both", "real", "synthetic"), default="both")  # fmt: skip
    add("--threads", help="torch's CPU threads; 1 gives the steadiest CPU times", type=int)
    add("--no-resident", help="on the CPU, start no process per trainer for its resident size", action="store_true")
    add("--workers", help="also measure how long a step waits for so many loader processes (nnUNet_n_proc_DA)",
        type=int, default=0)  # fmt: skip
    add("--json", help="write everything that was measured", type=Path, metavar="FILE")
    add("--plot", help="write a bar chart (PNG)", type=Path, metavar="FILE")


def run(args: argparse.Namespace) -> int:
    candidates = parse_candidates(args.tr, args.settings)
    if args.json is not None and (args.json.is_dir() or not os.access(args.json.absolute().parent, os.W_OK)):
        raise ValueError(f"--json {args.json} cannot be written: it is a folder, or its folder is not writable")
    if args.plot is not None:
        require_picture(args.plot, "--plot")
    if args.f != "all" and not args.f.isdigit():
        raise ValueError(f"-f {args.f!r} is neither a number nor all")
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"--threads must be 1 or more, but it is {args.threads}")

    import torch

    from nnunetv2_ext.bench.chart import draw
    from nnunetv2_ext.bench.report import as_text
    from nnunetv2_ext.bench.session import Options, Session
    from nnunetv2_ext.bench.subject import BATCHES, Target
    from nnunetv2_ext.core.files import atomic_write_text
    from nnunetv2_ext.data.find import PREPROCESSED, find_dataset
    from nnunetv2_ext.data.split import require_fold

    fold = int(args.f) if args.f != "all" else "all"
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    base = find_dataset(args.d, PREPROCESSED)
    require_fold(base, args.f)
    target = Target(base.name, args.c, args.p, fold, device, args.threads)
    kinds = BATCHES if args.batches == "both" else (args.batches,)
    options = Options(args.rounds, args.steps_per_round, args.warm_up, kinds, not args.no_resident, args.workers)
    report = Session(target, candidates, options).run()
    print(as_text(report))
    if args.json is not None:
        atomic_write_text(args.json, json.dumps(report.as_dict(), indent=2) + "\n")
        print(f"\nwrote {args.json}")
    failed = [r.failure is not None for r in report.results]
    if args.plot is not None and all(failed):
        print(f"{args.plot} was not written: no trainer could be measured")
    elif args.plot is not None:
        draw(report, args.plot)
        print(f"wrote {args.plot}")
    return 1 if any(failed) else 0
