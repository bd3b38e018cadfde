"""Mistakes of ``nnUNetv2_ext guides``; its pictures are in tests/jras/test_look.py."""

from pathlib import Path

import pytest
import torch

from nnunetv2_ext.cli import dispatch


def test_a_gpu_that_is_not_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    picture = tmp_path / "panel.png"
    command = ["guides", str(tmp_path), str(tmp_path / "image.nii.gz"), "-o", str(picture), "-device", "cuda"]
    assert dispatch.main(command) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("nnUNetv2_ext guides: -device cuda: ") and "sees no GPU; use -device cpu" in error
    assert not picture.exists()


@pytest.mark.parametrize("output", [".", "panel.xyz"])
def test_a_picture_that_cannot_be_written_is_said_before_anything_is_read(tmp_path: Path, output: str, capsys) -> None:
    command = ["guides", str(tmp_path / "model"), str(tmp_path / "image.nii.gz"), "-o", str(tmp_path / output)]
    assert dispatch.main(command) == 2
    assert "does not name a picture: give a file that ends in .png" in capsys.readouterr().err
