"""A trainer that is ready to step, built from the preprocessed dataset without leaving a trace."""

import contextlib
import io
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from nnunetv2_ext.bench.candidates import Candidate, check_settings, find_trainer
from nnunetv2_ext.bench.parts import other_networks
from nnunetv2_ext.bench.result import MISSING, PREDICT
from nnunetv2_ext.core.checkpoint import unwrap
from nnunetv2_ext.core.outside import trainer_of
from nnunetv2_ext.core.randomness import seed_everything
from nnunetv2_ext.core.sources import ENVIRONMENT_VARIABLE
from nnunetv2_ext.data.preprocessed import open_preprocessed

BATCHES = ("real", "synthetic")
SEED = 20240705  # any fixed number: trainers then start with the same weights, their loaders draw the same patches


@dataclass(frozen=True)
class Target:
    """Where the trainers run."""

    dataset: str  # folder name, Dataset004_hippocampus
    configuration: str
    plans_name: str = "nnUNetPlans"
    fold: int | str = 0  # a number, or "all"
    device: str = "cpu"  # or cuda, mps
    threads: int | None = None  # of torch on the CPU; None leaves torch's own choice


@contextlib.contextmanager
def dry_environment(workers: int = 0) -> Iterator[Path]:
    """nnUNet_results is a temporary folder, data are loaded by so many workers, and what nnU-Net prints is swallowed.

    nnU-Net's own ``splits_final.json`` is still written into the preprocessed dataset if it is missing there, as
    training would.
    """
    with tempfile.TemporaryDirectory(prefix="nnunetv2_ext_bench_", ignore_cleanup_errors=True) as folder:
        changed = {"nnUNet_results": folder, "nnUNet_n_proc_DA": str(workers)}
        with patch.dict(os.environ, changed), contextlib.redirect_stdout(io.StringIO()):
            yield Path(folder)


class Subject:
    """One candidate's ``trainer`` after ``on_train_start``, and its fixed ``batches``.

    They are by kind (of ``BATCHES``: one of its own loader, or synthetic of the same shape), on the CPU and pinned for
    a GPU as nnU-Net's loaders do it. ``others_bytes`` were in use on a CUDA device before this trainer was built.
    ``missing`` is a patch without the channels that the trainer adds to a finished model; None: it adds none.
    ValueError: settings for a trainer that takes none, or settings it refuses; data that are not there.
    """

    def __init__(self, candidate: Candidate, target: Target, kinds: tuple[str, ...] = BATCHES) -> None:
        cls = find_trainer(candidate.trainer)
        check_settings(candidate, cls)
        device = torch.device(target.device)
        on_gpu = device.type == "cuda"
        self.others_bytes = torch.cuda.memory_allocated(device) if on_gpu else 0
        seed_everything(SEED)
        data = open_preprocessed(target.dataset, target.configuration, target.plans_name)
        plans = data.plans.plans | {"continue_training": False}
        with patch.dict(os.environ, {ENVIRONMENT_VARIABLE: candidate.settings} if candidate.settings else {}):
            self.trainer: Any = cls(plans, target.configuration, target.fold, data.dataset_json, device)
            if on_gpu:  # nnUNetv2_train sets these before it trains
                torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = False, True
            self.trainer.on_train_start()
        self._cudnn = (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark)
        self.trainer.current_epoch = self.trainer.num_epochs // 2  # an ordinary step: warm-ups and ramps are over
        self.trainer.global_step = self.trainer.current_epoch * self.trainer.num_iterations_per_epoch
        self.trainer.on_epoch_start()
        self.trainer.on_train_epoch_start()
        seed_everything(SEED)
        real = next(self.trainer.dataloader_train)
        num_labels = len(self.trainer.label_manager.all_labels)
        self.batches = {k: real if k == "real" else synthetic_batch(real, num_labels) for k in kinds}
        if on_gpu:
            self.batches = {k: _map(batch, Tensor.pin_memory) for k, batch in self.batches.items()}
        self._patch = torch.randn(1, *real["data"].shape[1:]).to(self.trainer.device)
        self.missing: Tensor | None = None
        if getattr(trainer_of(cls), "data", None) == "added_channel":
            self.missing = self._patch.clone()
            self.missing[:, self.trainer.old_channels :] = 0

    def step(self, kind: str) -> None:
        """One training step on the fixed batch."""
        self.trainer.train_step(self.batches[kind])

    def predict(self, patch: Tensor) -> None:
        """The network on one patch, ``(1, C, *patch)``, as nnU-Net's predictor calls it for each tile and mirroring."""
        on_gpu = self.trainer.device.type == "cuda"
        with torch.inference_mode(), torch.autocast("cuda") if on_gpu else contextlib.nullcontext():
            self.trainer.network(patch)

    @contextlib.contextmanager
    def turn(self, what: str) -> Iterator[Callable[[], None]]:
        """While it is this trainer's turn; gives `step` on a batch kind, or `predict` for ``PREDICT`` or ``MISSING``.

        cudnn's switches, which are global, stand as this trainer left them. For prediction the network is in eval mode
        and has one output resolution.
        """
        network, cudnn, predicts = self.trainer.network, torch.backends.cudnn, what in (PREDICT, MISSING)
        before = (cudnn.deterministic, cudnn.benchmark)
        # as it is, not as the trainer's attribute says: one that makes its own targets may switch the loader's off
        decoder = getattr(unwrap(network), "decoder", None)
        deep_supervision = bool(getattr(decoder, "deep_supervision", self.trainer.enable_deep_supervision))
        cudnn.deterministic, cudnn.benchmark = self._cudnn
        if predicts:
            network.eval()
            self.trainer.set_deep_supervision_enabled(False)
        try:
            patch = self.missing if what == MISSING and self.missing is not None else self._patch
            yield partial(self.predict, patch) if predicts else partial(self.step, what)
        finally:
            if predicts:
                self.trainer.set_deep_supervision_enabled(deep_supervision)
                network.train()
            cudnn.deterministic, cudnn.benchmark = before

    def facts(self) -> dict[str, Any]:
        """What a reader must know to judge the figures."""
        network, data = self.trainer.network, next(iter(self.batches.values()))["data"]
        gpu = self.trainer.device.type == "cuda"
        return {
            "batch_size": len(data),
            "patch_size": [int(n) for n in self.trainer.configuration_manager.patch_size],
            "data_shape": list(data.shape),
            "parameters": sum(p.numel() for p in unwrap(network).parameters()),
            "weights_dtype": str(next(network.parameters()).dtype).removeprefix("torch."),
            "autocast_dtype": str(torch.get_autocast_dtype("cuda")).removeprefix("torch.") if gpu else None,
            "grad_scaler": self.trainer.grad_scaler is not None,
            "compiled": _is_compiled(network),
            "other_networks": {n: _is_compiled(m) for n, m in other_networks(self.trainer).items()},
            "deep_supervision": bool(self.trainer.enable_deep_supervision),
            "cudnn_benchmark": bool(self._cudnn[1]) if gpu else None,
        }


def synthetic_batch(batch: Mapping[str, Any], num_labels: int) -> dict[str, Any]:
    """A batch of the shapes and types of ``batch``: noise as ``data``, random labels as ``target``, the rest kept.

    Labels are drawn from 0..``num_labels``-1; targets of regions get 0 and 1.
    """
    generator = torch.Generator().manual_seed(SEED)

    def labels(like: Tensor) -> Tensor:
        # regions are stacked along the channels
        highest = 2 if like.dtype == torch.bool or like.shape[1] > 1 else num_labels
        return torch.randint(highest, like.shape, generator=generator).to(like.dtype)

    data = torch.randn(batch["data"].shape, generator=generator).to(batch["data"].dtype)
    return {**batch, "data": data, "target": _map(batch["target"], labels)}


def _map(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Every tensor of a dictionary or of nested lists through ``function``."""
    if isinstance(value, dict):
        return {key: _map(v, function) for key, v in value.items()}
    if isinstance(value, list):
        return [_map(v, function) for v in value]
    return function(value) if isinstance(value, Tensor) else value


def _is_compiled(network: nn.Module) -> bool:
    """Whether calls of ``network`` run through torch.compile."""
    return hasattr(network, "_orig_mod") or getattr(network, "_compiled_call_impl", None) is not None
