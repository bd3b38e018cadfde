"""Where the time inside a training step goes, for any trainer, without touching its code.

The step is cut at the beginning and end of calls that every trainer makes: a network, the loss, a backward pass, the
optimiser. Each stretch of time belongs to the innermost call that is running, the rest is ``other``. On CUDA the cuts
are events on the stream, so nothing waits and the stretches are the GPU's; elsewhere they are clock readings.

A trainer adds parts of its own by the class attribute ``bench_parts``. It maps a part to names of methods, of the
trainer or, with dots, of objects below it: ``{"lookup": ("network.bank.lookup",), "contrastive": ("my_terms",)}``. On
such a path networks are taken without their torch.compile and DDP wrappers. What a trainer does not have is left out.
A method that compiled code calls is not compiled together with what is around it while the parts are measured.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from nnunetv2_ext.core.checkpoint import unwrap

FORWARD, LOSS, BACKWARD, OPTIMISER, AFTER, OTHER = "forward", "loss", "backward", "optimiser", "after step", "other"
CORE_PARTS = {OPTIMISER: ("clip_gradients",), AFTER: ("after_step",)}


class Timeline:
    """Cuts in time, each with the part that begins there."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self.cuts: list[tuple[Any, str]] = []
        self._running: list[str] = [OTHER]

    def enter(self, part: str) -> None:
        """``part`` begins."""
        self._running.append(part)
        self.cut()

    def leave(self) -> None:
        """The part that began last ends, the one around it goes on."""
        self._running.pop()
        self.cut()

    def cut(self) -> None:
        """Now begins what is running."""
        moment: Any = torch.cuda.Event(enable_timing=True) if self._on_gpu else time.perf_counter()
        if self._on_gpu:
            moment.record()
        self.cuts.append((moment, self._running[-1]))

    def seconds(self) -> dict[str, float]:
        """Time of each part between the first and the last cut."""
        if self._on_gpu:
            torch.cuda.synchronize()
        total: dict[str, float] = defaultdict(float)
        for (begin, part), (end, _) in pairwise(self.cuts):
            total[part] += begin.elapsed_time(end) / 1000 if self._on_gpu else end - begin
        return dict(total)


def measure_parts(trainer: Any, batch: dict[str, Any], steps: int) -> dict[str, float]:
    """Seconds per step of each part, over ``steps`` training steps after one that does not count."""
    timeline = Timeline(trainer.device)
    with _cuts_at_calls(trainer, timeline):
        trainer.train_step(batch)  # compiled code that calls a method of ``bench_parts`` is compiled anew
        timeline.cuts.clear()
        timeline.cut()
        for _ in range(steps):
            trainer.train_step(batch)
        timeline.cut()
    seconds = timeline.seconds()
    place = {FORWARD: 0, LOSS: 1, BACKWARD: 2, OPTIMISER: 4, AFTER: 5, OTHER: 6}  # further parts before the optimiser
    return {part: seconds[part] / steps for part in sorted(seconds, key=lambda part: place.get(part, 3))}


def other_networks(trainer: Any) -> dict[str, nn.Module]:
    """Networks beside the trained one, by attribute: modules, or objects that hold one as ``module`` (a teacher)."""
    networks = {}
    for name, value in vars(trainer).items():
        module = value if isinstance(value, nn.Module) else getattr(value, "module", None)
        if name in ("network", "loss") or not isinstance(module, nn.Module) or module is trainer.network:
            continue
        if next(module.parameters(), None) is not None:
            networks[name] = module
    return networks


@contextmanager
def _cuts_at_calls(trainer: Any, timeline: Timeline) -> Iterator[None]:
    modules = {FORWARD: trainer.network, **other_networks(trainer)}
    calls = [
        (torch.autograd, ("backward", "grad"), BACKWARD),
        (nn.utils, ("clip_grad_norm_",), OPTIMISER),
        (trainer.optimizer, ("zero_grad", "step"), OPTIMISER),
        (trainer.grad_scaler, ("unscale_", "step", "update"), OPTIMISER),
    ]
    if isinstance(trainer.loss, nn.Module):
        modules[LOSS] = trainer.loss
    else:
        calls.append((trainer, ("loss",), LOSS))
    for part, paths in _method_parts(trainer).items():
        calls += [(_owner(trainer, path), (path.rpartition(".")[2],), part) for path in paths]
    with ExitStack() as stack:
        for part, module in modules.items():
            stack.enter_context(_module_calls(module, part, timeline))
        for owner, names, part in calls:
            for name in names:
                if hasattr(owner, name):
                    stack.enter_context(patch.object(owner, name, _timed(getattr(owner, name), part, timeline)))
        yield


def _method_parts(trainer: Any) -> dict[str, tuple[str, ...]]:
    parts: dict[str, tuple[str, ...]] = dict(CORE_PARTS)
    for base in reversed(type(trainer).__mro__):  # a combination of two methods has the parts of both
        parts |= vars(base).get("bench_parts", {})
    return parts


def _owner(trainer: Any, path: str) -> Any:
    """The object whose method a dotted path names; None if it is not there."""
    owner = trainer
    for name in path.split(".")[:-1]:
        owner = getattr(owner, name, None)
        owner = unwrap(owner) if isinstance(owner, nn.Module) else owner
    return owner


@contextmanager
def _module_calls(module: nn.Module, part: str, timeline: Timeline) -> Iterator[None]:
    compiled = getattr(module, "_compiled_call_impl", None)
    if compiled is not None and not hasattr(module, "_orig_mod"):
        # after module.compile() hooks would be compiled in, clock and all
        with patch.object(module, "_compiled_call_impl", _timed(compiled, part, timeline)):
            yield
        return
    before = module.register_forward_pre_hook(lambda *_: timeline.enter(part))
    after = module.register_forward_hook(lambda *_: timeline.leave(), always_call=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()


def _timed(function: Callable[..., Any], part: str, timeline: Timeline) -> Callable[..., Any]:
    @torch.compiler.disable(recursive=False)  # compiled code that calls it leaves the clock readings alone
    @wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        timeline.enter(part)
        try:
            return function(*args, **kwargs)
        finally:
            timeline.leave()

    return timed
