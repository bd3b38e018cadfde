"""``weights`` and ``plan-like``: what a file would do to a dataset, and plans on which all of it loads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_ext.cli import main
from tests.contract.data import residual


@pytest.fixture
def base(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The tiny dataset's preprocessed folder, cleaned of what a test adds."""
    for key, value in tiny.environment(tmp_path).items():
        monkeypatch.setenv(key, value)
    folder = tiny.preprocessed / tiny.name
    before = set(folder.iterdir())
    yield folder
    for file in set(folder.iterdir()) - before:
        file.unlink()


@pytest.fixture
def other(make_trainer: Any, tiny, tmp_path: Path) -> Path:
    """A checkpoint of plain nnU-Net with a residual encoder and another spacing."""
    plans = residual(tiny.plans())
    plans["configurations"]["3d_fullres"]["spacing"] = [1.5, 1.0, 1.0]
    trainer = make_trainer(nnUNetTrainer, plans=plans, results=tmp_path / "plain")
    trainer.initialize()
    trainer.save_checkpoint(str(tmp_path / "other.pth"))
    return tmp_path / "other.pth"


def test_a_file_is_described_and_compared_with_a_dataset(base, other, capsys, monkeypatch) -> None:
    assert main(["weights", str(other)]) == 0
    said = capsys.readouterr().out
    assert "ResidualEncoderUNet" in said and "1.5 x 1 x 1" in said and "3-D" in said
    assert f"next: nnUNetv2_ext weights {other} -d DATASET says" in said
    parts = torch.load(other, weights_only=False)["network_weights"].values()
    tensors = {tensor.data_ptr(): tensor.numel() for tensor in parts}
    assert f"{len(tensors)} tensors, {sum(tensors.values()):,} values" in said and len(tensors) < len(parts)
    assert main(["weights", str(other), "-d", "1", "-p", "tiny"]) == 1  # ResEnc on PlainConv
    said = capsys.readouterr()
    assert "* network" in said.out and "* spacing" in said.out
    stages = [line.split()[0] for line in said.out.splitlines() if " tensors " in line and "of the file" not in line]
    assert len(stages) == len(set(stages)), "a line a stage"
    assert "nothing of its encoder fits" in said.err and f"plan-like {other} -d" in said.err
    assert main(["weights", str(other), "-d", "1", "-c", "2d", "-p", "tiny"]) == 1
    assert "It is 3-D and these plans are 2-D" in capsys.readouterr().err
    assert main(["weights", "https://example.org/a.pth"]) == 2


def test_a_plan_like_the_files_takes_all_of_it(base, other, capsys) -> None:
    assert main(["plan-like", str(other), "-d", "1", "-p", "tiny", "-o", "like"]) == 0
    assert (
        "100.0 % of the" in (said := capsys.readouterr().out) and "nnUNetv2_preprocess -d 001 -plans_name like" in said
    )
    plans, ours = (json.loads((base / f"{name}.json").read_text()) for name in ("like", "tiny"))
    made, old = plans["configurations"]["3d_fullres"], ours["configurations"]["3d_fullres"]
    assert made["spacing"] == [1.5, 1.0, 1.0] and made["batch_size"] == old["batch_size"]
    assert made["data_identifier"] == "like_3d_fullres" and list(plans["configurations"]) == ["3d_fullres"]
    assert main(["weights", str(other), "-d", "1", "-p", "like"]) == 0
    before = (base / "like.json").read_bytes()
    assert main(["plan-like", str(other), "-d", "1", "-p", "tiny", "-o", "like"]) == 0  # the same again
    (base / "taken.json").write_text("{}")
    assert main(["plan-like", str(other), "-d", "1", "-p", "tiny", "-o", "taken"]) == 2
    assert "give another name" in capsys.readouterr().err
    assert (base / "like.json").read_bytes() == before and (base / "taken.json").read_text() == "{}"


def test_a_file_without_a_plan_is_refused(base, tmp_path, capsys) -> None:
    torch.save({"state_dict": {"encoder.weight": torch.ones(2, 2)}}, tmp_path / "bare.pth")
    assert main(["plan-like", str(tmp_path / "bare.pth"), "-d", "1", "-p", "tiny"]) == 2
    assert "does not say which network" in capsys.readouterr().err
