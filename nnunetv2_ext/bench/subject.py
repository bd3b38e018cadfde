"""A trainer that is ready to step, built from the preprocessed dataset without leaving a trace."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nnunetv2_ext.bench import batches, memory
from nnunetv2_ext.bench.candidates import Candidate, check_settings, find_trainer
from nnunetv2_ext.bench.parts import other_networks
from nnunetv2_ext.bench.plan import Target
from nnunetv2_ext.core.checkpoint import unwrap
from nnunetv2_ext.core.sources import ENVIRONMENT_VARIABLE


@contextlib.contextmanager
def dry_environment() -> Iterator[Path]:
    """nnUNet_results is a temporary folder, data are loaded in this process, and what nnU-Net prints is swallowed.

    nnU-Net's own ``splits_final.json`` is still written into the preprocessed dataset if it is missing there, as
    training would.
    """
    with tempfile.TemporaryDirectory(prefix="nnunetv2_ext_bench_", ignore_cleanup_errors=True) as folder:
        changed = {"nnUNet_results": folder, "nnUNet_n_proc_DA": "0"}
        with environment(changed), contextlib.redirect_stdout(io.StringIO()):
            yield Path(folder)


@contextlib.contextmanager
def environment(changed: dict[str, str]) -> Iterator[None]:
    """Environment variables for a while."""
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class Subject:
    """One candidate's trainer after ``on_train_start``, and its fixed batches.

    Args:
        candidate: trainer and settings.
        target: dataset, plans, device.
        kinds: batches to prepare, of ``batches.KINDS``.

    Attributes:
        trainer: as nnU-Net would train it.
        batches: by kind.

    Raises:
        ValueError: settings for a trainer that takes none, or settings it refuses.
    """

    def __init__(self, candidate: Candidate, target: Target, kinds: tuple[str, ...] = batches.KINDS) -> None:
        cls = find_trainer(candidate.trainer)
        check_settings(candidate, cls)
        device = torch.device(target.device)
        self.candidate = candidate
        self._allocated_before = memory.allocated(device)
        batches.seed_everything()
        plans = target.plans()
        plans["continue_training"] = False
        with environment({ENVIRONMENT_VARIABLE: candidate.settings} if candidate.settings else {}):
            self.trainer: Any = cls(plans, target.configuration, target.fold, target.dataset_json(), device)
            if device.type == "cuda":  # nnUNetv2_train sets these before it trains
                torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = False, True
            self.trainer.on_train_start()
        self._cudnn = (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark)
        self.trainer.current_epoch = self.trainer.num_epochs // 2  # an ordinary step: warm-ups and ramps are over
        self.trainer.on_epoch_start()
        self.trainer.on_train_epoch_start()
        real = batches.real_batch(self.trainer)
        labels = self.trainer.label_manager
        num_labels = len(labels.all_labels)
        self.batches = {k: real if k == "real" else batches.synthetic_batch(real, num_labels) for k in kinds}
        self.batch_size = len(real["data"])
        patch = torch.randn(1, *real["data"].shape[1:])
        self._patch = patch.to(self.trainer.device)

    def step(self, kind: str) -> None:
        """One training step on the fixed batch."""
        self.trainer.train_step(self.batches[kind])

    def predict(self) -> None:
        """The network on one patch, ``(1, C, *patch)``, as nnU-Net's predictor calls it for each tile and mirroring."""
        on_gpu = self.trainer.device.type == "cuda"
        with torch.inference_mode(), torch.autocast("cuda") if on_gpu else contextlib.nullcontext():
            self.trainer.network(self._patch)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """While it is this trainer's turn, cudnn's switches, which are global, stand as it left them."""
        before = (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = self._cudnn
        try:
            yield
        finally:
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before

    @contextlib.contextmanager
    def predicting(self) -> Iterator[None]:
        """The network as it is for prediction: eval mode, one output resolution."""
        network = self.trainer.network
        # as it is, not as the trainer's attribute says: one that makes its own targets may switch the loader's off
        decoder = getattr(unwrap(network), "decoder", None)
        deep_supervision = bool(getattr(decoder, "deep_supervision", self.trainer.enable_deep_supervision))
        network.eval()
        self.trainer.set_deep_supervision_enabled(False)
        try:
            yield
        finally:
            self.trainer.set_deep_supervision_enabled(deep_supervision)
            network.train()

    def own_bytes(self) -> int:
        """Bytes this trainer occupies on a CUDA device between steps."""
        return memory.allocated(self.trainer.device) - self._allocated_before

    def others_bytes(self) -> int:
        """Bytes that were in use on the device before this trainer was built."""
        return self._allocated_before

    def facts(self) -> dict[str, Any]:
        """What a reader must know to judge the figures."""
        network = self.trainer.network
        first = next(network.parameters())
        gpu = self.trainer.device.type == "cuda"
        return {
            "batch_size": self.batch_size,
            "patch_size": [int(n) for n in self.trainer.configuration_manager.patch_size],
            "data_shape": list(next(iter(self.batches.values()))["data"].shape),
            "parameters": sum(p.numel() for p in unwrap(network).parameters()),
            "weights_dtype": str(first.dtype).removeprefix("torch."),
            "autocast_dtype": str(torch.get_autocast_dtype("cuda")).removeprefix("torch.") if gpu else None,
            "grad_scaler": self.trainer.grad_scaler is not None,
            "compiled": is_compiled(network),
            "other_networks": {n: is_compiled(m) for n, m in other_networks(self.trainer).items()},
            "deep_supervision": bool(self.trainer.enable_deep_supervision),
            "cudnn_benchmark": bool(self._cudnn[1]) if gpu else None,
        }


def is_compiled(network: nn.Module) -> bool:
    """Whether calls of ``network`` run through torch.compile."""
    return hasattr(network, "_orig_mod") or getattr(network, "_compiled_call_impl", None) is not None
