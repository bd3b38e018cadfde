#!/usr/bin/env python3
"""Run an ablation ladder: the same training under several settings, seeds and few-shot sizes, and print one table.

    python examples/ladder.py examples/ladders/medcontext.yaml -d 4 -c 3d_fullres -p small --steps 2000 --seeds 3 \\
        --output ladder_output

Each run is an ordinary training of one fold in a results folder of its own (OUTPUT/RUN/nN_seedS), so it can be looked
at, resumed and predicted with. A finished run is kept: calling the same command again continues where the last call
ended. Simplified: final checkpoint only, one fold, Dice only (mean over the foreground classes and cases of the fold's
validation part).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

DEFAULT_TRAINER = "nnUNetTrainerMedContext"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ladder", type=Path, help="YAML file: trainer, settings common to all runs, and runs")
    parser.add_argument("-d", dest="dataset", required=True, help="dataset id or name, planned and preprocessed")
    parser.add_argument("-c", dest="configuration", default="3d_fullres")
    parser.add_argument("-p", dest="plans", default="nnUNetPlans")
    parser.add_argument("-f", dest="fold", type=int, default=0)
    parser.add_argument("--runs", nargs="*", help="only these runs of the file")
    parser.add_argument(
        "--train-cases", nargs="*", type=int, help="few-shot sizes (default: those of the file; 0 = all)"
    )
    parser.add_argument(
        "--seeds", type=int, default=2, help="seeds 0 .. N-1; the draw of the cases changes with the seed"
    )
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2000, help="optimiser steps of a run")
    parser.add_argument(
        "--epoch-steps", type=int, default=100, help="steps per epoch; the learning rate changes with the epoch"
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda", "mps"])
    parser.add_argument("--threads", type=int, help="CPU threads of a run")
    parser.add_argument(
        "--no-mirroring", action="store_true", help="validate without test-time mirroring (8 times faster in 3-D)"
    )
    parser.add_argument(
        "--fast-cpu", action="store_true", help="bfloat16 networks on the CPU; say so beside the results"
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings common to all runs")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--table-only", action="store_true", help="run nothing, print the table of what is there")
    return parser.parse_args()


def train(task: dict[str, Any]) -> None:
    """One run, in a process of its own: nnU-Net reads its folders and settings from the environment."""
    os.environ.update(task["environment"])
    sys.stdout = sys.stderr = open(task["log"], "a", buffering=1)  # noqa: SIM115  # for the rest of this process
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint

    if task["threads"]:
        torch.set_num_threads(task["threads"])
    trainer = get_trainer_from_args(
        task["dataset"],
        task["configuration"],
        task["fold"],
        task["trainer"],
        task["plans"],
        task["continue"],
        torch.device(task["device"]),
    )
    trainer.logger.plot_progress_png = lambda folder: None  # nnU-Net's takes 1 to 2 s an epoch
    maybe_load_checkpoint(trainer, task["continue"], False)
    if task["fast_cpu"]:
        if not trainer.was_initialized:
            trainer.initialize()
        for network in (trainer.network, getattr(getattr(trainer, "teacher", None), "module", None)):
            speed_up_on_cpu(network)
    trainer.run_training()
    if task["no_mirroring"]:
        trainer.inference_allowed_mirroring_axes = None
    trainer.perform_actual_validation()


def speed_up_on_cpu(network: Any) -> None:
    """bfloat16 convolutions in channels-last layout, logits back in fp32.

    2.2 times faster on a CPU that has AVX-512 BF16.
    """
    import torch

    if network is None:
        return
    layout = torch.channels_last_3d if any(p.ndim == 5 for p in network.parameters()) else torch.channels_last
    network.to(memory_format=layout)
    stock_forward = network.forward

    def forward(x: torch.Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = stock_forward(x.contiguous(memory_format=layout))
        return [level.float() for level in output] if isinstance(output, (list, tuple)) else output.float()

    network.forward = forward


def case_dice(summary_file: Path) -> list[float]:
    """Mean foreground Dice of each validation case."""
    summary = json.loads(summary_file.read_text())
    return [
        statistics.fmean(m["Dice"] for m in case["metrics"].values() if m["Dice"] == m["Dice"])
        for case in summary["metric_per_case"]
    ]


def print_table(results: dict[tuple[int, str], dict[int, float]]) -> None:
    """Mean Dice over the seeds with its spread, and the mean paired difference to the first run of the same size."""
    print("\n| train cases | run | seeds | Dice, mean of seeds | each seed | to the first run |")
    print("|---|---|---|---|---|---|")
    first: dict[int, dict[int, float]] = {}
    for (size, run), by_seed in results.items():
        reference = first.setdefault(size, by_seed)
        paired = [value - reference[seed] for seed, value in by_seed.items() if seed in reference]
        difference = f"{statistics.fmean(paired):+.3f}" if paired else ""
        each = " ".join(f"{by_seed[seed]:.3f}" for seed in sorted(by_seed))
        print(
            f"| {size or 'all'} | {run} | {len(by_seed)} | {statistics.fmean(by_seed.values()):.3f} "
            f"| {each} | {difference} |"
        )


def main() -> int:
    args = parse_arguments()
    ladder = yaml.safe_load(args.ladder.read_text())
    runs: dict[str, dict[str, Any]] = ladder["runs"]
    unknown = set(args.runs or ()) - set(runs)
    if unknown:
        print(
            f"error: {args.ladder} has no run {', '.join(sorted(unknown))}; it has {', '.join(runs)}", file=sys.stderr
        )
        return 2
    sizes = args.train_cases if args.train_cases is not None else ladder.get("train_cases", [0])
    names = [name for name in runs if not args.runs or name in args.runs]
    common = {key: yaml.safe_load(value) for key, _, value in (pair.partition("=") for pair in args.set)}
    plan = [
        (size, seed, name)
        for seed in range(args.first_seed, args.first_seed + args.seeds)
        for size in sizes
        for name in names
    ]
    results: dict[tuple[int, str], dict[int, float]] = {(size, name): {} for size in sizes for name in names}
    spent, done = 0.0, 0
    # importing all of nnU-Net's trainers takes 10 s: once here, and the runs inherit it (CUDA allows no fork)
    context: Any = multiprocessing.get_context("fork" if args.device == "cpu" and hasattr(os, "fork") else "spawn")
    if context.get_start_method() == "fork":
        recursive_find_trainer_class_by_name(ladder.get("trainer", DEFAULT_TRAINER))
    for number, (size, seed, name) in enumerate(plan, 1):
        folder = args.output.resolve() / name / f"n{size or 'all'}_seed{seed}"
        summaries = list(folder.glob(f"*/*/fold_{args.fold}/validation/summary.json"))
        if not summaries and not args.table_only:
            # a run of its own length (equal wall time instead of equal steps): a factor on the number of epochs
            settings = {
                "num_val_iterations_per_epoch": 2,
                "panel_every": 0,
                **ladder.get("settings", {}),
                **common,
                **runs[name],
            }
            factor = settings.pop("steps_factor", 1)
            settings |= {
                "num_epochs": max(1, round(factor * args.steps / args.epoch_steps)),
                "num_iterations_per_epoch": args.epoch_steps,
            }
            settings |= {"seed": seed, "train_cases_seed": seed, "train_cases": size or None}
            folder.mkdir(parents=True, exist_ok=True)
            settings_file = folder / "settings.yaml"
            settings_file.write_text(yaml.safe_dump(settings))
            estimate = f", about {spent / done * (len(plan) - number + 1) / 60:.0f} min left" if done else ""
            print(f"[{number}/{len(plan)}] {name}, {size or 'all'} cases, seed {seed}{estimate}", flush=True)
            task = {
                "environment": {"nnUNet_results": str(folder), "nnUNet_ext_settings": str(settings_file)},
                "log": str(folder / "log.txt"),
                "continue": bool(list(folder.glob(f"*/*/fold_{args.fold}/checkpoint_*.pth"))),
                "trainer": ladder.get("trainer", DEFAULT_TRAINER),
            } | {
                key: getattr(args, key)
                for key in (
                    "dataset",
                    "configuration",
                    "fold",
                    "plans",
                    "device",
                    "threads",
                    "no_mirroring",
                    "fast_cpu",
                )
            }
            start = time.time()
            process = context.Process(target=train, args=(task,))
            process.start()
            process.join()
            if process.exitcode:
                print(f"error: this run ended with code {process.exitcode}; see {task['log']}", file=sys.stderr)
                return 1
            spent, done = spent + time.time() - start, done + 1
            summaries = list(folder.glob(f"*/*/fold_{args.fold}/validation/summary.json"))
        if summaries:
            results[size, name][seed] = statistics.fmean(case_dice(summaries[0]))
    print_table({key: by_seed for key, by_seed in results.items() if by_seed})
    return 0


if __name__ == "__main__":
    sys.exit(main())
