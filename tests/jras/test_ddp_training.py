"""Two ranks train together: one bank, keys and weights that agree, each rank embedding its share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nnunetv2_ext.jras.build import group_ids
from tests.conftest import TinyDataset

WORKER = Path(__file__).with_name("ddp_training_worker.py")
MOMENTS = ("start", "stepped", "refreshed")


@pytest.fixture(scope="module")
def ranks(tiny: TinyDataset, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found."""
    folder = tmp_path_factory.mktemp("ddp")
    base = tiny.preprocessed / tiny.name
    command = [sys.executable, str(WORKER), str(base / "tiny.json"), str(base / "dataset.json"), str(folder)]
    environment = {**os.environ, **tiny.environment(folder)}
    done = subprocess.run(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=240
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.parametrize("moment", MOMENTS)
def test_weights_bank_and_keys_are_equal_on_both_ranks(ranks, moment):
    first, second = (found[moment]["weights"] for found in ranks)
    assert first.keys() == second.keys() and len(first["bank.keys"]) == 15
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_the_ranks_share_cases_places_and_the_key_of_the_subjects(ranks):
    first, second = (found["start"]["bank_state"] for found in ranks)
    assert first["group_key"] == second["group_key"] and first["cases"] == second["cases"]
    assert (first["coordinates"] == second["coordinates"]).all()
    for found in ranks:  # and the numbers in the bank are of that key
        groups = group_ids(first["cases"], first["group_key"])
        assert torch.equal(found["start"]["weights"]["bank.groups"], groups)


def test_the_shares_of_both_ranks_are_the_whole_bank_in_order(ranks):
    """15 guides on 2 ranks: 8 and 7; the oracle is one process that embeds all of them."""
    for found in ranks:
        for moment, fits in zip(MOMENTS, (True, False, True)):
            keys, alone = found[moment]["weights"]["bank.keys"], found[moment]["whole_bank_embedded_alone"]
            assert torch.allclose(keys, alone, atol=1e-6) == fits, moment


def test_two_steps_of_both_kinds_moved_retriever_and_segmenter(ranks):
    for found in ranks:
        assert found["batch_size"] == 2  # 4 over both
        assert found["figures"] == [
            ["contrastive", "grad_norm", "loss", "supervised"],
            ["grad_norm", "loss", "supervised"],
        ]
        before, after = found["start"]["weights"], found["stepped"]["weights"]
        for part in ("retriever.", "guide_encoder.", "backbone.encoder.", "null_logit"):
            assert any(not torch.equal(before[n], after[n]) for n in before if n.startswith(part)), part
    generators = [found["start"]["generator"] for found in ranks]
    assert not torch.equal(*generators)  # flips, dropout and candidates differ
