"""Memory of a step: what autograd keeps, and what counts as out of memory."""

import subprocess
import sys

import pytest
import torch

from nnunetv2_ext.bench.memory import SavedTensors, is_out_of_memory, saved_tensor_peak


def test_saved_bytes_are_those_of_the_formula() -> None:
    x = torch.randn(1000)
    w = torch.randn(1000, requires_grad=True)

    # x * w keeps x (w is a parameter); exp keeps its result; the sum keeps nothing: 2 x 4000 bytes
    assert saved_tensor_peak(lambda: (x * w).exp().sum().backward(), 3) == 8000


def test_a_storage_that_is_saved_twice_counts_once() -> None:
    x = torch.randn(1000)
    a, b = torch.randn(1000, requires_grad=True), torch.randn(1000, requires_grad=True)
    assert saved_tensor_peak(lambda: (x * a + x[:1000] * b).sum().backward(), 1) == 4000


def test_a_frozen_parameter_does_not_count() -> None:
    """It is saved for the gradient of what comes in, and is there anyway."""
    frozen, w = torch.nn.Parameter(torch.randn(1000), requires_grad=False), torch.randn(1000, requires_grad=True)
    assert saved_tensor_peak(lambda: (w * frozen).sum().backward(), 1) == 0


def test_passes_in_turn_hold_one_pass_and_passes_together_hold_all() -> None:
    w = torch.randn(1000, requires_grad=True)

    def loss() -> torch.Tensor:
        return (torch.randn(1000) * w).sum()

    def in_turn() -> None:
        loss().backward()
        loss().backward()

    assert saved_tensor_peak(in_turn, 1) == 4000
    assert saved_tensor_peak(lambda: (loss() + loss()).backward(), 1) == 8000


def test_gradients_are_the_same_with_and_without_counting() -> None:
    network = torch.nn.Sequential(
        torch.nn.Conv2d(1, 3, 3), torch.nn.InstanceNorm2d(3, affine=True), torch.nn.LeakyReLU()
    )
    x = torch.randn(2, 1, 8, 8)
    plain = torch.autograd.grad(network(x).square().mean(), list(network.parameters()))
    saved = SavedTensors()
    with saved:
        counted = torch.autograd.grad(network(x).square().mean(), list(network.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(plain, counted))
    assert saved.peak > 0


def test_resident_peak_sees_memory_that_is_gone_after_the_step() -> None:
    # in a process of its own, as the benchmark does: not every kernel resets the peak of a larger past
    script = (
        "import torch; from nnunetv2_ext.bench.memory import resident_peak as peak;"
        "quiet = peak(lambda: None, 1); print(peak(lambda: torch.ones(100_000_000), 1) - quiet)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 250e6  # 400 MB of float32, touched and freed


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), True),
        (MemoryError(), True),
        (RuntimeError("size mismatch"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_which_errors_mean_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected
