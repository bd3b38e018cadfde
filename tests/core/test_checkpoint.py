"""Checkpoint files: what is in ours, who can read them, and what is said about broken ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from nnunetv2_ext.core import checkpoint as checkpoints
from nnunetv2_ext.trainers.nnUNetTrainerMedContext import nnUNetTrainerMedContext


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(np.array_equal(a, b))


def write(path: Path, **extra) -> Path:
    torch.save({"network_weights": {"w": torch.zeros(1000)}, **extra}, path)
    return path


def cut(path: Path, keep: float = 0.5) -> Path:
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    return path


def one_line(call) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- reading


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_named(tmp_path, keep):
    path = cut(write(tmp_path / "checkpoint_final.pth"), keep)
    text = one_line(lambda: checkpoints.read_or_fall_back(path))
    assert f"the checkpoint {path} is broken or cut short" in text and text.count("checkpoint_final.pth") >= 1


def test_a_file_of_another_kind_does_not_get_torchs_advice(tmp_path):
    (tmp_path / "checkpoint_final.pth").write_bytes(b"garbage")
    text = one_line(lambda: checkpoints.read(tmp_path / "checkpoint_final.pth"))
    assert "(it is not a file of torch.save)" in text and "mmap" not in text


def test_a_damaged_tensor_is_found_though_the_file_is_whole(tmp_path):
    """torch reads the directory at the end: the damage would come to light in the middle of a restart, or never."""
    path, best = write(tmp_path / "checkpoint_latest.pth"), write(tmp_path / "checkpoint_best.pth", mark=7)
    content = bytearray(path.read_bytes())
    content[content.index(bytes(3000)) + 2000] = 0xFF  # among the tensor's 4000 zeros
    path.write_bytes(content)
    assert torch.load(path, weights_only=False)["network_weights"]["w"].any()  # notices nothing
    assert checkpoints.read(path)["network_weights"].keys() == {"w"}
    assert f"the checkpoint {path} is broken" in one_line(lambda: checkpoints.read(path, whole=True))
    assert checkpoints.read_or_fall_back(path)[1] == best


@settings(max_examples=60)
@given(position=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
def test_a_changed_byte_anywhere_is_harmless_or_one_line(tmp_path_factory, position, value):
    path = write(tmp_path_factory.mktemp("fuzz") / "checkpoint_final.pth")
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] = value
    path.write_bytes(content)
    try:
        checkpoint = checkpoints.read(path, whole=True)
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert torch.equal(checkpoint["network_weights"]["w"], torch.zeros(1000))


def test_a_damaged_directory_of_the_file_is_one_line(tmp_path):
    path = write(tmp_path / "checkpoint_final.pth")
    content = bytearray(path.read_bytes())
    content[content.rindex(b"PK\x06\x07") + 16] = 2  # parts of the archive: zipfile then raises where it should answer
    path.write_bytes(content)
    assert "is broken or cut short" in one_line(lambda: checkpoints.read(path, whole=True))


def test_other_files_are_no_checkpoints(tmp_path):
    path = tmp_path / "checkpoint_final.pth"
    path.write_text("hello")
    assert str(path) in one_line(lambda: checkpoints.read(path))
    torch.save([1, 2], path)
    assert "is not an nnU-Net checkpoint" in one_line(lambda: checkpoints.read(path))
    assert "does not exist" in one_line(lambda: checkpoints.read(tmp_path / "none.pth"))
    assert str(tmp_path) in one_line(lambda: checkpoints.read(tmp_path))


def test_a_broken_latest_falls_back_to_best_and_says_so(tmp_path):
    latest, best = tmp_path / "checkpoint_latest.pth", write(tmp_path / "checkpoint_best.pth", mark=7)
    cut(write(latest))
    checkpoint, path, warning = checkpoints.read_or_fall_back(latest)
    assert checkpoint["mark"] == 7 and path == best
    assert warning.startswith("WARNING") and str(latest) in warning and str(best) in warning and "\n" not in warning


def test_a_good_latest_is_taken(tmp_path):
    latest = write(tmp_path / "checkpoint_latest.pth", mark=1)
    write(tmp_path / "checkpoint_best.pth", mark=7)
    checkpoint, path, warning = checkpoints.read_or_fall_back(latest)
    assert (checkpoint["mark"], path, warning) == (1, latest, None)


def test_a_broken_final_does_not_fall_back_silently(tmp_path):
    final = cut(write(tmp_path / "checkpoint_final.pth"))
    write(tmp_path / "checkpoint_best.pth")
    assert str(final) in one_line(lambda: checkpoints.read_or_fall_back(final))


def test_when_both_are_broken_both_are_named(tmp_path):
    latest, best = (cut(write(tmp_path / f"checkpoint_{name}.pth")) for name in ("latest", "best"))
    text = one_line(lambda: checkpoints.read_or_fall_back(latest))
    assert str(latest) in text and str(best) in text


def test_a_checkpoint_of_a_newer_version_is_refused():
    checkpoints.require_known_format({"format": checkpoints.FORMAT}, Path("a.pth"))
    with pytest.raises(ValueError, match=r"a\.pth was written by a newer nnunetv2-ext"):
        checkpoints.require_known_format({"format": checkpoints.FORMAT + 1}, Path("a.pth"))


# ---- another architecture


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (nn.Linear(4, 3), r"weight is 3 x 4 there and 2 x 4 here"),
        (nn.Linear(4, 2, bias=False), r"bias is missing there and 2 here"),
        (nn.Sequential(nn.Linear(4, 2)), r"weight is missing there"),
    ],
)
def test_the_first_difference_of_another_network_is_named(other, named):
    with pytest.raises(ValueError, match=named):
        checkpoints.check_weights(other.state_dict(), nn.Linear(4, 2), Path("x.pth"))


def test_an_additional_layer_in_the_file_is_named():
    with pytest.raises(ValueError, match=r"bias is 2 there and missing here"):
        checkpoints.check_weights(nn.Linear(4, 2).state_dict(), nn.Linear(4, 2, bias=False), Path("x.pth"))


def test_the_same_network_fits_also_with_a_wrapper_s_prefix():
    network = nn.Linear(4, 2)
    checkpoints.check_weights({f"module.{k}": v for k, v in network.state_dict().items()}, network, Path("x.pth"))


def test_unwrapping_a_compiled_network():
    network = nn.Linear(1, 1)
    assert checkpoints.unwrap(torch.compile(network)) is network
    assert checkpoints.unwrap(network) is network


# ---- ours, read by nnU-Net


@pytest.fixture
def trained(make_trainer, fixed_batches, tmp_path):
    """A trainer after two steps and two logged epochs, its checkpoint and that of nnU-Net's own method."""
    trainer = make_trainer(nnUNetTrainerMedContext, "seed=2", configuration="2d")
    trainer.initialize()
    trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    for batch in fixed_batches(trainer, 2):
        trainer.train_step(batch)
    for epoch in range(2):
        for key in ("train_losses", "val_losses", "mean_fg_dice", "lrs"):
            trainer.logger.log(key, 0.5 + epoch, epoch)
    trainer._best_ema, trainer.current_epoch = 0.25, 1
    folder = Path(trainer.output_folder)
    trainer.save_checkpoint(str(folder / "checkpoint_final.pth"))
    nnUNetTrainer.save_checkpoint(trainer, str(tmp_path / "plain.pth"))
    return trainer, folder / "checkpoint_final.pth", tmp_path / "plain.pth"


def test_nnunet_s_keys_and_values_are_all_there(trained):
    _, ours, theirs = trained
    ours, theirs = checkpoints.read(ours), checkpoints.read(theirs)
    assert set(ours) - set(theirs) == {checkpoints.EXTENSION_KEY}
    for key in theirs:
        assert same(ours[key], theirs[key]), key


def test_plain_nnunet_continues_from_ours(trained, make_trainer):
    trainer, path, _ = trained
    plain = make_trainer(nnUNetTrainer, configuration="2d")
    plain.load_checkpoint(str(path))
    assert same(dict(plain.network.state_dict()), dict(trainer.network.state_dict()))
    assert same(plain.optimizer.state_dict(), trainer.optimizer.state_dict())
    assert (plain.current_epoch, plain._best_ema) == (2, 0.25)


def test_plain_nnunet_starts_from_ours_as_pretrained_weights(trained, make_trainer):
    trainer, path, _ = trained
    plain = make_trainer(nnUNetTrainer, configuration="2d")
    plain.initialize()
    load_pretrained_weights(plain.network, str(path))
    ours, theirs = trainer.network.state_dict(), plain.network.state_dict()
    backbone = [key for key in ours if ".seg_layers." not in key]
    assert backbone and all(torch.equal(ours[key], theirs[key]) for key in backbone)


def test_the_predictor_reads_our_model_folder_and_predicts_as_the_student(trained):
    trainer, path, _ = trained
    base = path.parent.parent
    (base / "plans.json").write_text(json.dumps(trainer.plans_manager.plans))
    (base / "dataset.json").write_text(json.dumps(trainer.dataset_json))
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(base), (0,), "checkpoint_final.pth")
    predictor.network.load_state_dict(predictor.list_of_parameters[0])  # strict
    x = torch.randn(1, 1, *trainer.configuration_manager.patch_size)
    trainer.set_deep_supervision_enabled(False)
    trainer.network.eval()
    predictor.network.eval()
    assert torch.equal(predictor.network(x), trainer.network(x))


def test_a_killed_write_leaves_the_old_checkpoint(trained, monkeypatch):
    trainer, path, _ = trained
    before = path.read_bytes()

    def dies(obj, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        trainer.save_checkpoint(str(path))
    assert path.read_bytes() == before and [p.name for p in path.parent.glob("*.tmp")] == []


def test_disabled_checkpointing_writes_none_and_says_so(trained):
    trainer, path, _ = trained
    path.unlink()
    trainer.disable_checkpointing = True
    trainer.save_checkpoint(str(path))
    assert not path.exists() and "checkpointing is disabled" in Path(trainer.log_file).read_text()
