"""Make the model folders of ``models/``, once, with the code of commit c9702fb; recreate their datasets in the tests.

    git worktree add ../old c9702fb && pip install -e ../old        # in an environment of its own
    cd ../old && python THIS_FILE OUTPUT

Every folder of ``models/`` is a nnUNet_results folder with one training of three epochs of two steps, stopped by the
stop file after the first step of the second epoch. Kept are nnU-Net's and our own files, without pictures, logs,
checkpoint_best.pth and debug.json, which names paths of the machine; checkpoints are packed (xz, see `install`). In
that of ``rada_learned`` most numbers of the large layers were set to 0 (see `thin`). Beside the training lie:

* ``expected.npz``: what that code predicts for ``image/small_0000.nii.gz``, see `predict` and `EXPORTS`.
* ``continued.csv``: epochs.csv of that code after ``--c`` to the end (one thread, no loader processes).
"""

from __future__ import annotations

import csv
import json
import lzma
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
CONFIGURATION, PLANS = "3d_fullres", "tiny"
DENSE, SPARSE = "Dataset001_Phantom", "Dataset002_Phantom"
PHANTOM: dict[str, Any] = {"num_train": 6, "num_test": 0, "shape": (24, 32, 24), "num_organs": 2}
PATCH, FEATURES, STRIDES = [16, 24, 16], [4, 8, 8], [[1, 1, 1], [2, 2, 2], [2, 2, 2]]
LENGTH = "num_epochs=3 num_iterations_per_epoch=2 num_val_iterations_per_epoch=1 save_every=1 panel_every=0 seed=1"
STOP_AFTER = 3  # steps: the first of the second epoch
SMALL_JRAS = "jras.retriever_widths=[4,8,8] jras.guide_widths=[4,8,8] jras.key_dim=16 jras.bank_size=12"


@dataclass(frozen=True)
class Model:
    """A training: its trainer, dataset and settings."""

    trainer: str
    settings: str = ""
    dataset: str = DENSE

    @property
    def folder(self) -> Path:
        """Of the model below a results folder."""
        return Path(self.dataset) / f"{self.trainer}__{PLANS}__{CONFIGURATION}"


MODELS = {
    "plain": Model("nnUNetTrainer"),
    "medcontext": Model("nnUNetTrainerMedContext"),
    "jras": Model("nnUNetTrainerJRAS", SMALL_JRAS),
    "medcontext_jras": Model("nnUNetTrainerMedContextJRAS", SMALL_JRAS),
    "rada_learned": Model("nnUNetTrainerRADA", "rada.semantics=learned", SPARSE),
    "rada_off": Model("nnUNetTrainerRADA", "rada.semantics=off rada.min_labelled=1", SPARSE),
}
# options of ``nnUNetv2_ext export`` whose result has an entry of this name in expected.npz
EXPORTS: dict[str, dict[str, list[str]]] = {
    "plain": {},
    "medcontext": {"student": [], "teacher": ["--weights", "teacher"]},
    "jras": {"strip_bank": ["--strip-bank"], "blank_groups": ["--blank-groups"]},
    "medcontext_jras": {"strip_bank": ["--strip-bank"], "blank_groups": ["--blank-groups"]},
    "rada_learned": {"net1_dropped": ["--weights", "net1", "--drop-semantics"]},
    "rada_off": {"net1": ["--weights", "net1"], "net3": ["--weights", "net3"]},
}


# ---- what the tests use


def environment(root: Path, results: Path, model: Model) -> dict[str, str]:
    """Environment of a process that works on the datasets in ``root``."""
    return {
        "nnUNet_raw": str(root / "raw"),
        "nnUNet_preprocessed": str(root / "preprocessed"),
        "nnUNet_results": str(results),
        "nnUNet_n_proc_DA": "0",
        "nnUNet_def_n_proc": "1",
        "nnUNet_ext_settings": "" if model.trainer == "nnUNetTrainer" else f"{LENGTH} {model.settings}".strip(),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "CUDA_VISIBLE_DEVICES": "",
    }


def recreate_datasets(root: Path, stored: Path = HERE / "models" / "datasets") -> None:
    """Write both datasets into ``root/raw`` and ``root/preprocessed``, preprocessed with the stored plans ``tiny``.

    Takes two seconds: nothing is planned, and no process is started.
    """
    write_raw(root)
    for name in (DENSE, SPARSE):
        preprocess(root, name, stored / name)


def install(name: str, results: Path, stored: Path = HERE / "models") -> Path:
    """Copy a stored training into a nnUNet_results folder, checkpoints unpacked; the model's folder is returned."""
    model = MODELS[name]
    target = results / model.folder
    shutil.copytree(stored / name / model.folder, target)
    for packed in target.rglob("*.xz"):
        packed.with_suffix("").write_bytes(lzma.decompress(packed.read_bytes()))
        packed.unlink()
    return target


def predict(model_folder: Path, image: Path) -> dict[str, np.ndarray]:
    """What fold 0 of a model folder predicts without mirroring.

    Returns:
        ``logits``: every second voxel, float16, tiles averaged with equal weights: nnU-Net's Gaussian is so small in
        the corners of half-precision tiles that the last digit of a logit decides between 1 and 2 there.
        ``segmentation``: uint8, as the command predicts, with the Gaussian.
    """
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(
        use_mirroring=False, perform_everything_on_device=False, device=torch.device("cpu"), allow_tqdm=False
    )
    checkpoint = next(f.name for f in sorted((model_folder / "fold_0").glob("checkpoint_*.pth")))
    predictor.initialize_from_trained_model_folder(str(model_folder), (0,), checkpoint)
    preprocessor = predictor.configuration_manager.preprocessor_class(verbose=False)
    data, _, _ = preprocessor.run_case(
        [str(image)], None, predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json
    )
    found = {}
    for gaussian in (False, True):
        predictor.use_gaussian = gaussian
        found[gaussian] = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(data)).cpu().numpy()
    return {
        "logits": found[False][:, ::2, ::2, ::2].astype(np.float16),
        "segmentation": found[True].argmax(0).astype(np.uint8),
    }


# ---- datasets


def write_raw(root: Path) -> None:
    """Dense phantoms, and the same with three planes in three of them, by the commands' own code."""
    from nnunetv2_ext.cli import main

    write_phantom_dataset = find_phantom()
    write_phantom_dataset(root / "raw", 1, **PHANTOM)
    (root / "preprocessed").mkdir()
    variables = environment(root, root / "results", MODELS["plain"])
    with environ(variables):
        code = main(["sparsify", "-d", "1", "-o", "2", "--labelled", "3"])
    if code:
        raise RuntimeError("sparsify failed")


def find_phantom() -> Any:
    """``write_phantom_dataset``, which c9702fb had in core."""
    try:
        from nnunetv2_ext.phantom import write_phantom_dataset
    except ImportError:
        from nnunetv2_ext.core.phantom import write_phantom_dataset
    return write_phantom_dataset


def preprocess(root: Path, name: str, stored: Path) -> None:
    """``nnUNetv2_preprocess`` in this process, with the plans, split and fingerprint in ``stored``."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    folder, raw = root / "preprocessed" / name, root / "raw" / name
    folder.mkdir(exist_ok=True)
    for file in stored.iterdir():
        shutil.copyfile(file, folder / file.name)
    plans = PlansManager(json.loads((folder / f"{PLANS}.json").read_text()))
    configuration = plans.get_configuration(CONFIGURATION)
    dataset_json = json.loads((folder / "dataset.json").read_text())
    preprocessor = configuration.preprocessor_class(verbose=False)
    output = folder / configuration.data_identifier
    for sub in (output, folder / "gt_segmentations"):
        sub.mkdir()
    for label in sorted((raw / "labelsTr").glob("*.nii.gz")):
        case = label.name.removesuffix(".nii.gz")
        shutil.copyfile(label, folder / "gt_segmentations" / label.name)
        image = raw / "imagesTr" / f"{case}_0000.nii.gz"
        target = str(output / case)
        preprocessor.run_case_save(target, [str(image)], str(label), plans, configuration, dataset_json)


def shrink(plans: dict[str, Any]) -> dict[str, Any]:
    """nnU-Net's plans with one configuration, a small patch and few features."""
    configuration = plans["configurations"][CONFIGURATION]
    stages = len(FEATURES)
    configuration |= {"patch_size": PATCH, "batch_size": 2}
    configuration["architecture"]["arch_kwargs"] |= {
        "n_stages": stages,
        "features_per_stage": FEATURES,
        "strides": STRIDES,
        "kernel_sizes": [[3, 3, 3]] * stages,
        "n_conv_per_stage": [1] * stages,
        "n_conv_per_stage_decoder": [1] * (stages - 1),
    }
    return {**plans, "plans_name": PLANS, "configurations": {CONFIGURATION: configuration}}


# ---- making them, with the old code only


def make(output: Path) -> None:
    """Write ``output/models``: stored plans, the small image, and all models."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        make_plans(root / "plans", output / "datasets")
        (root / "data").mkdir()
        recreate_datasets(root / "data", output / "datasets")
        image = make_image(root / "image", output)
        for name, model in MODELS.items():
            make_model(root / "data", root / name, name, model, image, output / name)


def make_plans(root: Path, output: Path) -> None:
    """Let nnU-Net plan both datasets."""
    root.mkdir()
    write_raw(root)
    for name in (DENSE, SPARSE):
        command = ["nnUNetv2_plan_and_preprocess", "-d", name[7:10], "-npfp", "1", "--no_pp"]
        run(command, environment(root, root / "results", MODELS["plain"]) | {"nnUNet_n_proc_DA": "1"})
        folder, target = root / "preprocessed" / name, output / name
        target.mkdir(parents=True)
        plans = shrink(json.loads((folder / "nnUNetPlans.json").read_text()))
        (target / f"{PLANS}.json").write_text(json.dumps(plans, indent=1))
        shutil.copyfile(folder / "dataset_fingerprint.json", target / "dataset_fingerprint.json")
        shutil.copyfile(root / "raw" / name / "dataset.json", target / "dataset.json")
    cases = [f"phantom_{n:03d}" for n in range(PHANTOM["num_train"])]
    write_split(output / DENSE, [{"train": cases[2:], "val": cases[:2]}])
    shutil.copyfile(root / "preprocessed" / SPARSE / "splits_final.json", output / SPARSE / "splits_final.json")


def write_split(folder: Path, splits: Sequence[Mapping[str, list[str]]]) -> None:
    (folder / "splits_final.json").write_text(json.dumps(splits))


def make_image(root: Path, output: Path) -> Path:
    """Another patient, one and a half patches long, as 8-bit integers."""
    import SimpleITK as sitk

    options = {**PHANTOM, "num_train": 1, "shape": (24, 24, 16), "vary_size": False, "seed": 7}
    source = find_phantom()(root, 1, **options) / "imagesTr" / "phantom_000_0000.nii.gz"
    picture = sitk.ReadImage(str(source))
    array = sitk.GetArrayFromImage(picture).astype(np.float64)
    array = np.round((array - array.min()) / np.ptp(array) * 255).astype(np.uint8)
    small = sitk.GetImageFromArray(array)
    small.CopyInformation(picture)
    (output / "image").mkdir()
    sitk.WriteImage(small, str(output / "image" / "small_0000.nii.gz"), useCompression=True)
    return output / "image" / "small_0000.nii.gz"


def make_model(root: Path, results: Path, name: str, model: Model, image: Path, output: Path) -> None:
    """Train until `STOP_AFTER`, keep what is needed, and record what this code does with it."""
    print(f"==== {name}", flush=True)
    with environ(environment(root, results, model)):
        train(model)
    if name == "rada_learned":
        thin(results / model.folder / "fold_0" / "checkpoint_latest.pth")
    keep(results / model.folder, output / model.folder)
    folder = install(name, results / "stored", output.parent)
    expected = predict(folder, image)
    for export, options in EXPORTS[name].items():
        exported = results / export
        run_export(folder, exported, options)
        expected[f"logits_{export}"] = predict(exported, image)["logits"]
    np.savez_compressed(output / "expected.npz", **expected)  # type: ignore[arg-type]
    if model.trainer != "nnUNetTrainer":
        shutil.copyfile(go_on(root, output.parent, name, results / "again") / "epochs.csv", output / "continued.csv")


def train(model: Model) -> None:
    """In this process; the plain trainer has neither settings nor the stop file and ends after its first epoch."""
    from nnunetv2.run.run_training import get_trainer_from_args

    trainer = get_trainer_from_args(
        model.dataset, CONFIGURATION, 0, model.trainer, PLANS, continue_training=False, device=torch.device("cpu")
    )
    torch.set_num_threads(1)
    if model.trainer == "nnUNetTrainer":
        torch.manual_seed(1)
        np.random.seed(1)
        trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 1, 2, 1
        trainer.run_training()
        return
    step, done = trainer.train_step, []

    def train_step(batch: Any) -> Any:
        result = step(batch)
        done.append(1)
        if len(done) == STOP_AFTER:
            Path(trainer.output_folder, "stop").touch()
        return result

    trainer.train_step = train_step
    with suppress(SystemExit):
        trainer.run_training()
    if len(done) != STOP_AFTER:
        raise RuntimeError(f"{model.trainer} made {len(done)} steps")


def keep(source: Path, target: Path) -> None:
    """Copy a model folder without what is large, or names the machine."""
    ignored = shutil.ignore_patterns("*.png", "*.pdf", "training_log_*", "checkpoint_best.pth", "debug.json")
    shutil.copytree(source, target, ignore=ignored)
    for file in list(target.rglob("*.pth")):
        file.with_suffix(".pth.xz").write_bytes(lzma.compress(file.read_bytes(), preset=9 | lzma.PRESET_EXTREME))
        file.unlink()


def thin(file: Path, weights: int = 1000, momenta: int = 300) -> None:
    """Keep so many numbers of every large matrix, as bfloat16, and set the others to 0, so that the file packs well.

    The semantic head has layers of a fixed width of up to 1024: 17 MB with the optimiser's state. What is kept is
    enlarged to the tensor's norm, so that the class vectors still reach the prediction.
    """
    checkpoint = torch.load(file, weights_only=False)
    buffers = [entry["momentum_buffer"] for entry in checkpoint["optimizer_state"]["state"].values()]
    kept = [(tensor, weights) for tensor in checkpoint["network_weights"].values()]
    kept += [(tensor, momenta) for tensor in buffers if tensor is not None]
    for tensor, number in kept:
        if tensor.ndim == 2 and tensor.numel() > 1000:  # convolutions have more axes
            least = tensor.abs().flatten().topk(min(number, tensor.numel() // 5)).values[-1]
            large = torch.where(tensor.abs() >= least, tensor, 0)
            tensor.copy_((large * (tensor.norm() / large.norm().clamp_min(1e-12))).bfloat16())
    torch.save(checkpoint, file)


def go_on(root: Path, stored: Path, name: str, results: Path) -> Path:
    """What ``nnUNetv2_train --c`` does, on a copy of a stored training; the fold's folder."""
    from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint

    model = MODELS[name]
    folder = install(name, results, stored)
    with environ(environment(root, results, model)):
        device = torch.device("cpu")
        trainer = get_trainer_from_args(model.dataset, CONFIGURATION, 0, model.trainer, PLANS, True, device)
        maybe_load_checkpoint(trainer, True, False)
        trainer.run_training()
    return folder / "fold_0"


def run_export(folder: Path, output: Path, options: Sequence[str]) -> None:
    """``nnUNetv2_ext export`` in this process."""
    from nnunetv2_ext.cli import main

    if main(["export", str(folder), str(output), *options]):
        raise RuntimeError(f"export {' '.join(options)} of {folder} failed")


# ---- checking them


def verify(stored: Path, names: Sequence[str] = ()) -> None:
    """Repeat with the code of this environment what `make` recorded, and say how far the results are apart."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        (root / "data").mkdir()
        recreate_datasets(root / "data", stored / "datasets")
        image = stored / "image" / "small_0000.nii.gz"
        for name, model in MODELS.items():
            if names and name not in names:
                continue
            results = root / name
            folder = install(name, results, stored)
            expected = np.load(stored / name / "expected.npz")
            now = predict(folder, image)
            checkpoint = next((folder / "fold_0").glob("checkpoint_*.pth")).name
            command = ["nnUNetv2_predict_from_modelfolder", "-m", str(folder), "-f", "0"]
            command += ["-i", str(image.parent), "-o", str(results / "out"), "-chk", checkpoint, "--disable_tta"]
            command += ["-device", "cpu", "--disable_progress_bar"]
            run(command, environment(root / "data", results, MODELS["plain"]))
            by_command = read_label(results / "out" / "small.nii.gz")
            same = np.array_equal(expected["segmentation"], now["segmentation"])
            same_command = np.array_equal(expected["segmentation"], by_command)
            shares = np.bincount(by_command.ravel(), minlength=3) / by_command.size
            print(f"{name}: logits apart {distance(now['logits'], expected['logits']):.2g}", end="; ")
            print(f"segmentation same {same}, by command {same_command}, classes {np.round(shares, 2)}", flush=True)
            for export, options in EXPORTS[name].items():
                run_export(folder, results / export, options)
                apart = distance(predict(results / export, image)["logits"], expected[f"logits_{export}"])
                print(f"{name}: export {export}: apart {apart:.2g}", flush=True)
            if model.trainer != "nnUNetTrainer":
                fold = go_on(root / "data", stored, name, results / "again")
                apart = rows_apart(fold / "epochs.csv", stored / name / "continued.csv")
                print(f"{name}: continued, {sorted(f.name for f in fold.glob('*.pth'))}; columns apart {apart}")


def distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(np.float32) - other.astype(np.float32)).max())


def rows_apart(one: Path, other: Path) -> dict[str, float]:
    """Columns of two epochs.csv that differ, and by how much at most; durations aside."""
    tables = [list(csv.DictReader(path.open())) for path in (one, other)]
    if len(tables[0]) != len(tables[1]):
        raise ValueError(f"{len(tables[0])} rows and {len(tables[1])}")
    apart: dict[str, float] = {}
    for here, there in zip(*tables):
        for column in here.keys() | there.keys():
            if here.get(column) != there.get(column) and "time" not in column and "seconds" not in column:
                values = [float(row.get(column) or "nan") for row in (here, there)]
                apart[column] = max(apart.get(column, 0), abs(values[0] - values[1]))
    return apart


def read_label(path: Path) -> np.ndarray:
    import SimpleITK as sitk

    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def run(command: list[str], variables: Mapping[str, str]) -> None:
    executable = Path(sys.executable).with_name(command[0])
    done = subprocess.run(
        [str(executable), *command[1:]],
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-3000:]}")


@contextmanager
def environ(variables: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "--verify":
        verify(Path(sys.argv[2]), sys.argv[3:])
    else:
        make(Path(sys.argv[1]))
