#!/usr/bin/env python3
"""Run an ablation ladder: the same training under several settings, seeds and few-shot sizes, and print one table.

    python examples/ladder.py examples/ladders/medcontext.yaml -d 4 -c 3d_fullres -p small --steps 2000 --seeds 3 \\
        --output ladder_output

Each run is an ordinary training of one fold in a results folder of its own, OUTPUT/RUN/nN_seedS. It can be looked at,
resumed and predicted with. A finished run is kept: calling the same command again continues where the last call
ended. Before the first run a few steps of each are timed, for an estimate of the whole and for --equal-time. At the end
`nnUNetv2_ext compare` writes OUTPUT/comparison_nN: paired differences with intervals, Dice, HD95, NSD, pictures; the
others are compared with the run that the file names as `reference` (of several, each further one has its own folder).
Simplified: final checkpoint only, one fold.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ladder_steps
import yaml

from nnunetv2_ext.core.sources import to_yaml

DEFAULT_TRAINER = "nnUNetTrainerMedContext"
# torch 2.15's bfloat16 convolution gives NaN gradients now and then on their maps of a few voxels
IN_FP32 = ("retriever", "guide_encoder")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ladder", type=Path, help="YAML file: trainer, settings common to all runs, and runs")
    parser.add_argument("-d", dest="dataset", required=True, help="dataset id or name, planned and preprocessed")
    parser.add_argument("-c", dest="configuration", default="3d_fullres")
    parser.add_argument("-p", dest="plans", default="nnUNetPlans")
    parser.add_argument("-f", dest="fold", type=lambda text: text if text == "all" else int(text), default=0)
    parser.add_argument(
        "--test-set",
        type=Path,
        metavar="RAW_DATASET",
        help="score on imagesTs and labelsTs of this raw dataset folder instead of the fold's validation cases",
    )
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
    parser.add_argument(
        "--equal-time",
        metavar="RUN",
        help="give every run the time that RUN needs for --steps, instead of equal steps; steps_factor is ignored",
    )
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
        speed_up_trainer(trainer)
    trainer.run_training()
    if task["no_mirroring"]:
        trainer.inference_allowed_mirroring_axes = None
    if task["test_set"]:
        predict_test_set(trainer, Path(task["test_set"]), Path(task["output"]) / "test")
    else:
        trainer.perform_actual_validation()


def predict_test_set(trainer: Any, dataset: Path, output: Path) -> None:
    """Predictions of the dataset's imagesTs in ``output``, and their summary.json against labelsTs."""
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    trainer.set_deep_supervision_enabled(False)
    mirroring = trainer.inference_allowed_mirroring_axes
    predictor = nnUNetPredictor(device=trainer.device, use_mirroring=mirroring is not None, allow_tqdm=False)
    predictor.manual_initialization(
        trainer.network.eval(),
        trainer.plans_manager,
        trainer.configuration_manager,
        [trainer.network.state_dict()],
        trainer.dataset_json,
        type(trainer).__name__,
        mirroring,
    )
    output.mkdir(parents=True, exist_ok=True)
    predictor.predict_from_files_sequential(str(dataset / "imagesTs"), str(output), save_probabilities=False)
    example = next((dataset / "imagesTs").iterdir())
    compute_metrics_on_folder(
        str(dataset / "labelsTs"),
        str(output),
        str(output / "summary.json"),
        determine_reader_writer_from_dataset_json(trainer.dataset_json, str(example), verbose=False)(),
        trainer.dataset_json["file_ending"],
        trainer.label_manager.foreground_regions
        if trainer.label_manager.has_regions
        else trainer.label_manager.foreground_labels,
        None,
        num_processes=1,
    )


def speed_up_trainer(trainer: Any) -> None:
    """Its network and, if it has one, its teacher."""
    for network in (trainer.network, getattr(getattr(trainer, "teacher", None), "module", None)):
        speed_up_on_cpu(network)


def speed_up_on_cpu(network: Any) -> None:
    """bfloat16 convolutions in channels-last layout, outputs back in fp32.

    2.2 times faster on a CPU that has AVX-512 BF16.
    """
    import torch

    if network is None:
        return
    layout = torch.channels_last_3d if any(p.ndim == 5 for p in network.parameters()) else torch.channels_last
    small = [getattr(network, name, None) for name in IN_FP32]
    kept = {id(p) for module in small if module is not None for p in module.parameters()}
    for parameter in network.parameters():
        if parameter.ndim == (5 if layout == torch.channels_last_3d else 4) and id(parameter) not in kept:
            parameter.data = parameter.data.contiguous(memory_format=layout)
    for module in small:
        if module is not None:
            module.forward = torch.autocast("cpu", enabled=False)(module.forward)
    for part in getattr(network, "members", [network]):  # several networks in one: each is called by itself
        part.forward = in_bfloat16(part.forward, layout)


def in_bfloat16(stock_forward: Callable[..., Any], layout: Any) -> Callable[..., Any]:
    """``stock_forward`` under autocast, its data in ``layout``, every tensor it returns in fp32."""
    import torch
    from torch.utils._pytree import tree_map_only

    def forward(x: torch.Tensor, *further: Any, **named: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = stock_forward(x.contiguous(memory_format=layout), *further, **named)
        return tree_map_only(torch.Tensor, torch.Tensor.float, output)

    return forward


def sparsify_labelled(dataset: Path) -> list[str]:
    """The cases that `nnUNetv2_ext sparsify` left labelled in this raw dataset."""
    return sorted(json.loads((dataset / "dataset.json").read_text())["nnunetv2_ext"]["sparsify"]["labelled"])


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


def settings_of(args: argparse.Namespace, ladder: dict[str, Any], size: int, seed: int, name: str) -> dict[str, Any]:
    """Trainer, steps_factor and all settings of one run, before its length is known."""
    settings = {
        "trainer": ladder.get("trainer", DEFAULT_TRAINER),
        "steps_factor": 1,
        "num_val_iterations_per_epoch": 2,
        "panel_every": 0,
        **ladder.get("settings", {}),
        **{key: yaml.safe_load(value) for key, _, value in (pair.partition("=") for pair in args.set)},
        **ladder["runs"][name],
        "seed": seed,
        "train_cases_seed": seed,
        "num_iterations_per_epoch": args.epoch_steps,
    }
    if size:
        settings["train_cases"] = size
    elif settings.get("train_cases") == "labelled":
        settings["train_cases"] = sparsify_labelled(args.test_set)
    return settings


def start(args: argparse.Namespace, folder: Path, settings: dict[str, Any], target: Callable, **further: Any) -> bool:
    """``train`` or ``ladder_steps.measure`` with these settings, in a process of its own; False if it failed."""
    settings = dict(settings)
    trainer = settings.pop("trainer")
    settings.pop("steps_factor")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.yaml").write_text(to_yaml(settings))
    names = ("dataset", "configuration", "fold", "plans", "device", "threads", "no_mirroring", "fast_cpu")
    task = {
        "environment": {"nnUNet_results": str(folder), "nnUNet_ext_settings": str(folder / "settings.yaml")},
        "log": str(folder / "log.txt"),
        "continue": any(folder.glob(f"*/*/fold_{args.fold}/checkpoint_*.pth")),
        "trainer": trainer,
        "output": str(folder),
        "test_set": args.test_set and str(args.test_set.resolve()),
        **{name: getattr(args, name) for name in names},
        **further,
    }
    arguments = (task, speed_up_trainer if args.fast_cpu else None) if target is ladder_steps.measure else (task,)
    # spawn: neither CUDA nor FAISS survives a fork
    process = multiprocessing.get_context("spawn").Process(target=target, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        print(f"error: {folder.name} ended with code {process.exitcode}; see {task['log']}", file=sys.stderr)
    return not process.exitcode


def time_steps(args: argparse.Namespace, ladder: dict[str, Any], names: list[str], size: int) -> ladder_steps.Timing:
    """Seconds per step of each run, measured once per output folder."""
    timing = ladder_steps.Timing(args.output / "seconds_per_step.json")
    for name in names:
        if name not in timing.seconds:
            print(f"timing a step of {name}", flush=True)
            folder = args.output / "timing" / name
            settings = settings_of(args, ladder, size, args.first_seed, name) | {"num_epochs": 2}
            if not start(args, folder, settings, ladder_steps.measure, seconds=str(folder / "seconds.txt")):
                raise SystemExit(1)
            timing.add(name, float((folder / "seconds.txt").read_text()))
    return timing


def main() -> int:
    args = parse_arguments()
    args.output = args.output.resolve()
    ladder = yaml.safe_load(args.ladder.read_text())
    references = ladder_steps.references(ladder)
    unknown = {*(args.runs or ()), *filter(None, [args.equal_time]), *references} - set(ladder["runs"])
    if unknown:
        has = ", ".join(ladder["runs"])
        print(f"error: {args.ladder} has no run {', '.join(sorted(unknown))}; it has {has}", file=sys.stderr)
        return 2
    sizes = args.train_cases if args.train_cases is not None else ladder.get("train_cases", [0])
    names = [name for name in ladder["runs"] if not args.runs or name in args.runs]
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    folders = {
        (size, seed, name): args.output / name / f"n{size or 'all'}_seed{seed}"
        for seed in seeds
        for size in sizes
        for name in names
    }
    summary = "test/summary.json" if args.test_set else f"*/*/fold_{args.fold}/validation/summary.json"
    waiting = [key for key, folder in folders.items() if not any(folder.glob(summary))]
    if waiting and not args.table_only:
        timed = list(dict.fromkeys([*names, *filter(None, [args.equal_time])]))
        timing = time_steps(args, ladder, timed, sizes[0])
        factors = {name: settings_of(args, ladder, 0, 0, name)["steps_factor"] for name in names}
        if args.equal_time:
            factors = timing.equal_time_factors(args.equal_time)
        epochs = {name: max(1, round(factors[name] * args.steps / args.epoch_steps)) for name in names}
        hours = timing.hours({n: epochs[n] * args.epoch_steps for n in names}, [name for _, _, name in waiting])
        needed = f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} min"
        print(f"{len(waiting)} runs, about {needed} of training steps (validation comes on top)", flush=True)
        began = time.time()
        for number, (size, seed, name) in enumerate(waiting):
            left = (
                f", about {(time.time() - began) / number * (len(waiting) - number) / 60:.0f} min left"
                if number
                else ""
            )
            print(f"[{number + 1}/{len(waiting)}] {name}, {size or 'all'} cases, seed {seed}{left}", flush=True)
            settings = settings_of(args, ladder, size, seed, name) | {"num_epochs": epochs[name]}
            if not start(args, folders[size, seed, name], settings, train):
                return 1
            if not any(folders[size, seed, name].glob(summary)):
                print(f"{name} was stopped before its end; the same command continues it", file=sys.stderr)
                return 1
    results: dict[tuple[int, str], dict[int, float]] = {(size, name): {} for size in sizes for name in names}
    for (size, seed, name), folder in folders.items():
        for file in folder.glob(summary):
            results[size, name][seed] = statistics.fmean(case_dice(file))
    print_table({key: by_seed for key, by_seed in results.items() if by_seed})
    status = 0
    for size in sizes:
        finished = {n: [folders[size, seed, n] for seed in results[size, n]] for n in names if results[size, n]}
        if len(finished) > 1:
            status |= ladder_steps.compare_all(args, size, finished, references)
    return status


if __name__ == "__main__":
    sys.exit(main())
