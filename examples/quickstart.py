"""From nothing to a comparison: data, plan, plain nnU-Net and MedContext, prediction of unseen cases, Dice, a picture.

    python examples/quickstart.py                              # synthetic scans; some minutes on 2 CPU cores
    python examples/quickstart.py --dataset .../Dataset004_X   # your data in nnU-Net's raw format; it is only read
    python examples/quickstart.py --dataset 4 --small-plans-only   # reduced plans for a planned dataset, nothing else

Everything lands in one folder (--output); your data are planned and preprocessed again there. Cases are held out as
unseen: those of imagesTs with a label in labelsTs, else the validation cases of fold 0 of the dataset's
splits_final.json in nnUNet_preprocessed, else the last fifth by name. The steps are nnU-Net's own commands, printed as
they are run, so that each can be repeated by hand. What is simplified: a training of a minute or two instead of 1000
epochs of 250 steps, one training each, one fold instead of five, and, without a CUDA GPU, a small network (plans
`nnUNetPlans_small`, written beside the default ones) that learns from your data at a learning rate of 0.05 instead of
0.01.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    from nnunetv2_ext.phantom import write_phantom_dataset
except ModuleNotFoundError as error:
    sys.exit(f"{error}: install the package first, in its folder type  pip install .")

from quickstart_data import (
    QuickstartError,
    adopt_dataset,
    inner_splits,
    labelled_cases,
    read_description,
    read_splits,
)
from quickstart_steps import (
    LOG_NAME,
    CaseLines,
    EpochLines,
    Steps,
    choose_device,
    draw_case,
    is_volume,
    prepare_output,
    reduce_plans,
    report,
    write_small_plans,
)

PLAIN = "nnUNetTrainerExt"  # plain nnU-Net, bit for bit, with our settings of length and seed
REQUIRED_DICE = 0.8  # mean over classes and unseen phantom cases: less means that the model did not learn
# epochs, steps per epoch; everything is meant to end within 5 minutes on 2 idle CPU cores
LENGTH = {"cpu": (8, 30), "mps": (8, 30), "cuda": (20, 50)}


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    description, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dataset", type=Path, metavar="FOLDER", help="nnU-Net raw dataset; default: a phantom is made"
    )
    parser.add_argument(
        "--small-plans-only",
        action="store_true",
        help="write the reduced plans of --dataset (its id, name or folder) beside its plans in nnUNet_preprocessed, "
        "and end",
    )
    parser.add_argument("--output", type=Path, default=Path("quickstart_output"), help="default: %(default)s")
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder of an earlier run")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="default: %(default)s")
    parser.add_argument("--epochs", type=int, help="default: 8, on cuda 20")
    parser.add_argument("--iterations", type=int, help="training steps per epoch; default: 30, on cuda 50")
    parser.add_argument("--num-train", type=int, default=15, help="phantom cases to train on; default: %(default)s")
    parser.add_argument("--num-test", type=int, default=3, help="unseen phantom cases; default: %(default)s")
    parser.add_argument(
        "--shape",
        type=int,
        nargs=3,
        default=(40, 48, 44),
        metavar="N",
        help="phantom size in voxels; default: 40 48 44",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the phantom; default: %(default)s")
    parser.add_argument("--trainer", default="nnUNetTrainerMedContext", help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    for name in ("epochs", "iterations", "num_test"):
        value = getattr(parsed, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if parsed.small_plans_only and parsed.dataset is None:
        parser.error("--small-plans-only needs --dataset: the id, name or folder of a planned dataset")
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all steps; returns the exit status: 0, or 1 after a failed step or a phantom Dice below `REQUIRED_DICE`."""
    options = parse_arguments(arguments)
    start = time.monotonic()
    try:
        if options.small_plans_only:
            write_small_plans(options.dataset, options.overwrite)
            return 0
        dice = run(options)
    except (QuickstartError, ValueError) as error:
        print(f"\nquickstart stopped: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        print("\nquickstart stopped: the program that read its output has ended", file=sys.stderr)
        return 1
    except OSError as error:
        # the second name is the one written to; a write to an open file, as on a full disk, names none
        file = error.filename2 or error.filename or options.output
        print(
            f"\nquickstart stopped: {file}: {error.strerror or error}. Make room or correct the rights there, or "
            "choose another folder with --output",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("\nquickstart interrupted", file=sys.stderr)
        return 130
    print(f"\nAll of it took {time.monotonic() - start:.0f} s.")
    if options.dataset is None and not dice >= REQUIRED_DICE:
        print(
            f"The mean Dice on unseen phantom cases is {dice:.3f}, below {REQUIRED_DICE}: the model did not learn.\n"
            "Either the training was too short (--epochs, --iterations) or something is wrong with the installation:\n"
            "see the log, and try  nnUNetv2_ext doctor",
            file=sys.stderr,
        )
        return 1
    return 0


def run(options: argparse.Namespace) -> float:
    """All steps; returns the mean Dice of the method on unseen cases."""
    device = choose_device(options.device)
    output = options.output.resolve()
    splits: list[dict[str, list[str]]] = []
    splits_path: Path | None = None
    if options.dataset is not None:  # read first: a mistake in it must not cost an earlier run that is to be replaced
        source = options.dataset.resolve()
        read_description(source)
        if os.environ.get("nnUNet_preprocessed"):
            splits_path = Path(os.environ["nnUNet_preprocessed"]) / source.name / "splits_final.json"
            splits = read_splits(splits_path)
    prepare_output(output, options.overwrite, options.dataset)
    folders = {f"nnUNet_{kind}": str(output / f"nnUNet_{kind}") for kind in ("raw", "preprocessed", "results")}
    for folder in folders.values():
        Path(folder).mkdir()
    cores = os.cpu_count() or 1
    workers = str(min(cores, 8))
    environment = {
        **os.environ,
        **folders,
        "PYTHONUNBUFFERED": "1",
        "nnUNet_def_n_proc": workers,
        "nnUNet_npp": "1",
        "nnUNet_nps": "1",
    }
    if device == "cpu":
        # nnUNet_n_proc_DA=0, below, loads in the training process: best on few cores, but it crashes the planner.
        # Waiting threads that spin make a step 3 times slower as soon as another process wants a core (measured).
        environment.update(nnUNet_n_proc_DA="1", OMP_WAIT_POLICY="PASSIVE")
    print("In your own shell, the commands below need these three variables:")
    for name, folder in folders.items():
        print(f"    export {name}={shlex.quote(folder)}")
    trainers = list(dict.fromkeys((PLAIN, options.trainer)))
    steps = Steps(output / LOG_NAME, environment, total=2 + 3 * len(trainers))

    steps.announce("Data")
    raw = output / "nnUNet_raw"
    if options.dataset is None:
        dataset = write_phantom_dataset(
            raw,
            1,
            num_train=options.num_train,
            num_test=options.num_test,
            shape=options.shape,
            seed=options.seed,
            channels=2,
        )
        print(f"    {options.num_train} synthetic patients (T1 and T2) to train on and {options.num_test} unseen ones")
    else:
        dataset = adopt_dataset(source, raw, splits, splits_path)
    print(f"    {dataset}")
    number = str(int(dataset.name[7:10]))

    configuration = "3d_fullres" if is_volume(dataset) else "2d"
    steps.run(
        "Plan and preprocess",
        ["nnUNetv2_plan_and_preprocess", "-d", number, "-c", configuration, "-npfp", workers, "-np", workers],
        OMP_NUM_THREADS="1",  # the workers are the parallelism
    )
    plans_name, plans_path = "nnUNetPlans", output / "nnUNet_preprocessed" / dataset.name / "nnUNetPlans.json"
    if device != "cuda":
        plans = reduce_plans(json.loads(plans_path.read_text(encoding="utf-8")), [configuration])
        plans_name = plans["plans_name"]
        plans_path = plans_path.with_name(f"{plans_name}.json")
        plans_path.write_text(json.dumps(plans, indent=2), encoding="utf-8")
        settings = plans["configurations"][configuration]
        print(f"    no CUDA GPU: training the reduced plans {plans_path}")
        features = settings["architecture"]["arch_kwargs"]["features_per_stage"]
        print(f"    (patch {settings['patch_size']}, features {features}); on a GPU leave out -p to train the default")

    description = read_description(dataset)
    inner = inner_splits(splits, labelled_cases(dataset, "Tr", description))
    if inner:
        plans_path.with_name("splits_final.json").write_text(json.dumps(inner, indent=2), encoding="utf-8")
        print(f"    splits_final.json: the other folds of {splits_path}, so that its groups stay together")
    fold = "0" if inner or description["numTraining"] >= 5 else "all"  # nnU-Net splits into five folds
    epochs, iterations = options.epochs or LENGTH[device][0], options.iterations or LENGTH[device][1]
    length = f"seed=0 num_epochs={epochs} num_iterations_per_epoch={iterations} num_val_iterations_per_epoch=4"
    if options.dataset is not None and device != "cuda":
        length += " initial_lr=0.05"  # nnU-Net's 0.01 needs thousands of steps on real data (docs/results.md)
    summaries: dict[str, dict[str, Any]] = {}
    for trainer in trainers:
        model = ["-tr", trainer, "-p", plans_name, "-device", device]
        what = "plain nnU-Net" if trainer == PLAIN else trainer.removeprefix("nnUNetTrainer")
        steps.run(
            f"Train {what}: {epochs} epochs of {iterations} steps",
            ["nnUNetv2_train", number, configuration, fold, *model],
            watch=EpochLines(epochs),
            nnUNet_ext_settings=length,
            **({"nnUNet_n_proc_DA": "0"} if device == "cpu" else {}),
        )
        predictions, summary = output / "predictions" / trainer, output / f"dice_{trainer}.json"
        folders_in_out = ["-i", str(dataset / "imagesTs"), "-o", str(predictions)]
        steps.run(
            f"Predict the unseen cases with {what}",
            ["nnUNetv2_predict", "-d", number, "-c", configuration, "-f", fold, *model, *folders_in_out],
            watch=CaseLines(),
        )
        references = ["-djfile", str(dataset / "dataset.json"), "-pfile", str(plans_path), "-o", str(summary)]
        steps.run(
            f"Evaluate {what}",
            ["nnUNetv2_evaluate_folder", str(dataset / "labelsTs"), str(predictions), *references],
        )
        summaries[trainer] = json.loads(summary.read_text(encoding="utf-8"))

    dice = report(summaries, description)
    first = {trainer: summary["metric_per_case"][0] for trainer, summary in summaries.items()}
    draw_case(dataset, first, output / "overlay.png")
    results = output / "nnUNet_results" / dataset.name
    model_folder = results / f"{options.trainer}__{plans_name}__{configuration}"
    print("\nPictures:")
    print(f"    {output / 'overlay.png'}   an unseen case: image, truth, prediction of each")
    for path in sorted((model_folder / f"fold_{fold}").glob("panel_epoch_*.png")):
        print(f"    {path}   what the method does in training")
    for trainer in trainers:
        curves = results / f"{trainer}__{plans_name}__{configuration}" / f"fold_{fold}" / "progress_ext.png"
        print(f"    {curves}   learning curves")
    print("Files:")
    print(f"    {output / 'predictions'}, {output}/dice_TRAINER.json, log {output / LOG_NAME}, models in {results}")
    print_next_steps(options, number, configuration, fold, plans_name, device, model_folder)
    return dice


def print_next_steps(
    options: argparse.Namespace,
    number: str,
    configuration: str,
    fold: str,
    plans_name: str,
    device: str,
    model_folder: Path,
) -> None:
    """What a person would want to do now, as commands."""
    pair = f"{PLAIN} {options.trainer}"
    reduced = plans_name != "nnUNetPlans"
    print("\nWhat to do next (with the three variables above):")
    print("    # is this machine ready for a real training?")
    print("    nnUNetv2_ext doctor")
    print("    # these two trainings case by case, with intervals and pictures")
    print(f"    nnUNetv2_ext compare -d {number} -c {configuration} -p {plans_name} -f {fold} -tr {pair}")
    print("    # what can be set, with its meaning")
    print(f"    nnUNetv2_ext settings {options.trainer}")
    if options.dataset is None:
        print("    # the same on your data, which are only read")
        print(f"    python {shlex.quote(sys.argv[0])} --dataset FOLDER --output OUTPUT")
    print("    # the full trainings, on a GPU: all folds of the method and of its control")
    training = f"nnUNetv2_train {number} {configuration} $f -tr $tr"
    print(f"    for f in 0 1 2 3 4; do for tr in {pair}; do {training}; done; done")
    if reduced:
        print(f"    # without a GPU: -p {plans_name} -device {device}, which trains the small network")
    print("    # a model folder that plain nnU-Net predicts with, without this package")
    print(f"    nnUNetv2_ext export {shlex.quote(str(model_folder))} OUTPUT_FOLDER")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that the running command is ended too
    sys.exit(main())
