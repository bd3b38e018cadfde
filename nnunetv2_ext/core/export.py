"""Export: a model folder that plain nnU-Net, without this package, predicts with."""

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_ext.core.checkpoint import EXTENSION_KEY, first_difference, read
from nnunetv2_ext.core.files import atomic_torch_save, atomic_write_text, read_json, require_writable
from nnunetv2_ext.core.outside import ExportEdit, load, methods_of
from nnunetv2_ext.core.quiet import quiet
from nnunetv2_ext.core.settings import PLANS_KEY, without_local_paths
from nnunetv2_ext.core.stock import stock_network
from nnunetv2_ext.core.trainer import ExtTrainer

# What nnU-Net's own zip export takes along besides checkpoints, plans.json and dataset.json; without its debug.json,
# which holds the training machine's paths and the cases' names
_FINGERPRINT = "dataset_fingerprint.json"
_PROGRESS, _VALIDATION = "progress.png", "validation/summary.json"
_DESCRIPTIONS = {"plans": "plans", "dataset_json": "dataset"}  # files by what a checkpoint calls them
_FILE_LISTS = ("dataset", "training", "validation", "test")  # of dataset.json: files of the training machine
_PREFERRED = ("checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth")
STOCK_TRAINER = nnUNetTrainer.__name__


def export_model(
    model_folder: Path,
    output: Path,
    weights: str = "student",
    edits: Collection[str] = (),
    best: bool = False,
    tell: Callable[[str], None] = print,
) -> list[Path]:
    """Write ``model_folder`` (TRAINER__PLANS__CONFIGURATION) to ``output`` as a model of the stock nnUNetTrainer.

    Of every fold the final checkpoint is taken, of an unfinished fold the latest. It gets the chosen weights under
    ``network_weights`` and the stock trainer's name. It loses this package's key and the optimiser's state. The
    fold's progress picture and validation result go along if they belong to these weights. No file holds a path of the
    training machine, nor of a file that a setting names: a stock model has no block of settings, one of our trainers
    loses the keys marked LOCAL_PATH. Cases are named in the validation result only. The source is only read. The
    checkpoints written are returned.

    A training cannot be continued from it (``--c``), which needs the source; it can start one (-pretrained_weights).
    nnU-Net's own zip export takes plans and checkpoints as they are, with the settings and the paths in them.

    Args:
        output: must not exist; nothing is left there if something goes wrong.
        weights: which network, see the trainer's ``export_weights``.
        edits: what is to be taken out, by name in the ``export_edits`` of the trainer's methods. One that keeps the
            trainer makes the result a model of that trainer, which needs this package to predict.
        best: take every fold's checkpoint_best.pth along; it was chosen by the trained network's pseudo Dice.
        tell: gets a line if the validation result was left out, and what the edits have to say.

    Raises:
        ValueError: no model folder, output exists or lies in it, not one of our trainers, no such weights or edit,
            edits that exclude each other, no best checkpoint, or a network that plain nnU-Net does not build.
    """
    missing = [name for name in ("plans.json", "dataset.json") if not (model_folder / name).is_file()]
    files = _checkpoints(model_folder, best)
    if missing or not files:
        raise ValueError(
            f"{model_folder} is not a trained model folder ({', '.join(missing) or 'fold_*/checkpoint_*.pth'} "
            "missing); give the folder named TRAINER__PLANS__CONFIGURATION below nnUNet_results"
        )
    if output.exists():
        raise ValueError(f"{output} exists; name a folder that does not, or remove it")
    if model_folder.resolve() in output.resolve().parents:
        raise ValueError(f"{output} lies in the model folder {model_folder}, of which it would be a part: name another")
    if best and not any(file.name == "checkpoint_best.pth" for file in files):
        raise ValueError(f"no fold of {model_folder} has a checkpoint_best.pth; export without --best")
    # beside the output, so that the rename stays on one disk; a name of our own, so that nobody's folder is touched
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=require_writable(output.parent)))
    try:
        validated = []
        needed: set[str] = set()
        ours: type[ExtTrainer] | None = None  # whose model is written, if it is not the stock trainer's
        for file in files:
            checkpoint = read(file, whole=True)
            trainer = _trainer_of(checkpoint, file)
            chosen = _chosen(trainer, edits, weights)
            ours = trainer if any(edit.keeps_trainer for edit in chosen) else None
            describe = _descriptions(trainer, (weights, *edits))
            exported = _exported(checkpoint, trainer, weights, chosen, describe)
            if ours is None:
                _require_stock_network(exported, trainer, file)
            target = partial / file.relative_to(model_folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            atomic_torch_save(exported, target)
            as_before = bool(chosen) and weights == "student" and all(edit.same_predictions for edit in chosen)
            validated.append(as_before or _same_weights(checkpoint, exported))
            needed |= _foreign_classes(exported["init_args"])
        write_descriptions(model_folder, partial, ours, describe)
        if all(validated):
            for file in files:
                _copy_results(file, partial / file.parent.relative_to(model_folder))
        else:
            tell(
                f"left out {_PROGRESS} and validation/: they belong to the network that was trained and validated, "
                "not to the exported one; evaluate it before you use it"
            )
        for name in sorted(needed):
            tell(f"whoever predicts with this model needs its network class {name}, which is not part of nnU-Net")
        for notice in dict.fromkeys(edit.notice for edit in chosen if edit.notice):
            tell(notice)
        partial.chmod(model_folder.stat().st_mode & 0o777)  # mkdtemp lets nobody else in
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [output / file.relative_to(model_folder) for file in files]


def _checkpoints(model_folder: Path, best: bool) -> list[Path]:
    """Of each fold the final checkpoint, else the latest, else another; with ``best`` also checkpoint_best.pth."""
    chosen: set[Path] = set()
    for fold in sorted({file.parent for file in model_folder.glob("fold_*/checkpoint_*.pth")}):
        # what comes before a NaN was kept to look into, not to predict with
        names = sorted(file.name for file in fold.glob("checkpoint_*.pth") if file.name != "checkpoint_before_nan.pth")
        if names:  # with keep_every the newest of those that are kept
            chosen.add(fold / next((name for name in _PREFERRED if name in names), names[-1]))
        if best and "checkpoint_best.pth" in names:
            chosen.add(fold / "checkpoint_best.pth")
    return sorted(chosen)


def _chosen(trainer: type[ExtTrainer], edits: Collection[str], weights: str) -> list[ExportEdit]:
    available = {name: edit for method in methods_of(trainer) for name, edit in method.export_edits.items()}
    for name in edits:
        if name not in available:
            has = ", ".join(f"--{name}" for name in available) or "nothing of the kind"
            raise ValueError(
                f"models of {trainer.__name__} have nothing that --{name} could take out (they know {has}); "
                f"export without --{name}"
            )
    chosen = {name: edit for name, edit in available.items() if name in edits}
    keep = [f"--{name}" for name, edit in chosen.items() if edit.keeps_trainer]
    if len(keep) > 1:
        raise ValueError(f"{' and '.join(keep)} exclude each other; choose one of them")
    if keep and weights != "student":
        raise ValueError(
            f"{keep[0]} writes a model of {trainer.__name__}, with the network that was trained; "
            f"leave out --weights {weights}"
        )
    return list(chosen.values())


def _descriptions(trainer: type[ExtTrainer], names: Collection[str]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What the chosen weights and edits make of ``plans`` and ``dataset_json``, of a trainer's methods."""
    described = {name: text for method in methods_of(trainer) for name, text in method.descriptions.items()}
    changes = [load(described[name]) for name in names if name in described]
    return lambda both: reduce(lambda now, change: change(now), changes, both)


def _exported(
    checkpoint: dict[str, Any],
    trainer: type[ExtTrainer],
    weights: str,
    edits: Sequence[ExportEdit],
    describe: Callable[[dict[str, Any]], dict[str, Any]],
) -> dict[str, Any]:
    for edit in edits:
        checkpoint = load(edit.apply)(checkpoint)
    checkpoint = {**checkpoint, "init_args": describe(checkpoint["init_args"])}
    if any(edit.keeps_trainer for edit in edits):
        return portable(checkpoint, trainer)
    exported = {"network_weights": trainer.export_weights(checkpoint, weights), "trainer_name": STOCK_TRAINER}
    return portable(checkpoint) | exported


def portable(checkpoint: dict[str, Any], ours: type[ExtTrainer] | None = None) -> dict[str, Any]:
    """A checkpoint without this package's key, the optimiser's state and the training machine's paths.

    Args:
        checkpoint: of any trainer.
        ours: whose model it stays; None: of none of our trainers, and the settings are left out.
    """
    left_out = (EXTENSION_KEY, "optimizer_state", "grad_scaler_state")
    init_args = {
        **checkpoint["init_args"],
        "plans": _shareable_plans(checkpoint["init_args"]["plans"], ours),
        "dataset_json": _without_file_lists(checkpoint["init_args"]["dataset_json"]),
    }
    return {key: value for key, value in checkpoint.items() if key not in left_out} | {"init_args": init_args}


def write_descriptions(
    model_folder: Path,
    target: Path,
    ours: type[ExtTrainer] | None = None,
    describe: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> None:
    """Write what lies beside the folds of a model, without settings and paths unless it is one of `ours`.

    `describe` takes and returns both files' content, as ``plans`` and ``dataset_json``.
    """
    both = describe({name: read_json(model_folder / f"{file}.json") for name, file in _DESCRIPTIONS.items()})
    both = {"plans": _shareable_plans(both["plans"], ours), "dataset_json": _without_file_lists(both["dataset_json"])}
    for name, file in _DESCRIPTIONS.items():
        atomic_write_text(target / f"{file}.json", json.dumps(both[name], indent=2))
    _copy(model_folder / _FINGERPRINT, target / _FINGERPRINT)


def _require_stock_network(exported: dict[str, Any], trainer: type[ExtTrainer], source: Path) -> None:
    """Raise ValueError unless the weights have the names and shapes of the network that nnU-Net builds of the plans."""
    remedy = f"predict with {trainer.__name__} and this package instead, whose models need no export"
    init_args = exported["init_args"]
    configuration = PlansManager(init_args["plans"]).get_configuration(init_args["configuration"])
    network = configuration.network_arch_class_name
    if network.partition(".")[0] == __name__.partition(".")[0]:
        raise ValueError(
            f"plain nnU-Net without this package could not build the network of {source}: the plans name {network}, "
            f"which is part of it; {remedy}"
        )
    try:
        stock = stock_network(exported["init_args"]).state_dict()
    except Exception as error:  # whatever the architecture that the plans name raises
        reason = " ".join(str(error).split())
        raise ValueError(f"plain nnU-Net cannot build the network of {source} ({reason}); {remedy}") from error
    if difference := first_difference(stock, exported["network_weights"]):
        name, there, here = difference
        raise ValueError(
            f"plain nnU-Net could not load {source}: {name} is {here} in the weights and {there} in its network of "
            f"these plans, because {trainer.__name__} trains another network; {remedy}"
        )


def _foreign_classes(init_args: dict[str, Any]) -> set[str]:
    """The network class that the plans name, if nnU-Net does not bring it along."""
    name: str = PlansManager(init_args["plans"]).get_configuration(init_args["configuration"]).network_arch_class_name
    return set() if name.partition(".")[0] in ("dynamic_network_architectures", "nnunetv2") else {name}


def _same_weights(source: dict[str, Any], exported: dict[str, Any]) -> bool:
    before, after = source["network_weights"], exported["network_weights"]
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def _shareable_plans(plans: dict[str, Any], ours: type[ExtTrainer] | None) -> dict[str, Any]:
    """Without our block, which one of our trainers needs (``ours``): its list of cases and its paths stay behind."""
    shared = {key: value for key, value in plans.items() if key != PLANS_KEY}
    if ours is None or PLANS_KEY not in plans:
        return shared
    block = {key: value for key, value in plans[PLANS_KEY].items() if key != "train_cases"}
    return {**shared, PLANS_KEY: without_local_paths(block, ours.settings_model())}


def _without_file_lists(dataset_json: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in dataset_json.items() if key not in _FILE_LISTS}


def _copy_results(checkpoint: Path, target: Path) -> None:
    """The fold's progress picture, and the validation's summary.json with file names instead of whole paths."""
    _copy(checkpoint.parent / _PROGRESS, target / _PROGRESS)
    source = checkpoint.parent / _VALIDATION
    if (
        not source.is_file() or checkpoint.name != "checkpoint_final.pth"
    ):  # an unfinished fold's is of an older training
        return
    summary = read_json(source)
    for case in summary["metric_per_case"]:
        for key in ("prediction_file", "reference_file"):
            if key in case:
                case[key] = re.split(r"[\\/]", case[key])[-1]
    (target / _VALIDATION).parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(target / _VALIDATION, json.dumps(summary, indent=2, sort_keys=True))


def _trainer_of(checkpoint: dict[str, Any], source: Path) -> type[ExtTrainer]:
    name = checkpoint.get("trainer_name", "an unnamed trainer")
    try:
        with quiet():
            trainer = recursive_find_trainer_class_by_name(name)
    except RuntimeError as error:  # nnU-Net's for a name it does not find
        raise ValueError(
            f"{source} was trained with {name}, which nnU-Net does not find here: install the package it comes from "
            "(`nnUNetv2_ext doctor` lists our trainers)"
        ) from error
    if not issubclass(trainer, ExtTrainer):
        raise ValueError(
            f"{source} was trained with {name}, which is not one of our trainers; there is nothing to export"
        )
    return trainer


def _copy(source: Path, target: Path) -> None:
    if source.is_file():
        shutil.copyfile(source, target)
