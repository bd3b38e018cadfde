"""Two ranks compute the gradients of one process, in every kind of step, and keep their banks to themselves."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("ddp_worker.py")
CASES = ("warmup", "contrastive", "dropout", "compiled")


def run(size: int, output: Path) -> dict[str, dict[str, torch.Tensor]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(size), str(port), str(output), *CASES],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        texts = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(texts)[-3000:]
    return torch.load(output)


@pytest.fixture(scope="module")
def gradients(tmp_path_factory) -> list[dict[str, dict[str, torch.Tensor]]]:
    """Of one process, and of two ranks."""
    folder = tmp_path_factory.mktemp("ddp")
    return [run(size, folder / f"{size}.pt") for size in (1, 2)]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_give_the_gradients_of_one_process(gradients, case):
    expected, found = (all_cases[case] for all_cases in gradients)
    assert expected.keys() == found.keys()
    assert all(torch.allclose(expected[name], found[name], atol=1e-6, rtol=1e-4) for name in expected)
    retriever = max(float(found[name].abs().max()) for name in found if name.startswith("retriever."))
    assert (retriever == 0) == (case == "warmup")
