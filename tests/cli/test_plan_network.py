"""``plan-network``: other networks in the plans, of methods and of the user's own packages."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nnunetv2_ext.cli import main

OWN = """
from torch import nn


class Decoder(nn.Module):
    deep_supervision = False


class Net(nn.Module):
    def __init__(self, input_channels, num_classes, width=4, strides=None, deep_supervision=False):
        super().__init__()
        self.layer = nn.Conv2d(input_channels, num_classes, 1)
        self.decoder = Decoder()

    def forward(self, x):
        y = self.layer(x)
        return [y, y[..., ::2, ::2]] if self.decoder.deep_supervision else y


class NoStrides(Net):
    def __init__(self, input_channels, num_classes, deep_supervision=False):
        super().__init__(input_channels, num_classes)


class Flat(Net):
    def forward(self, x):
        return self.layer(x)


class Fails(Net):
    def __init__(self, **kwargs):
        raise RuntimeError("no such thing")
"""


@pytest.fixture
def world(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The tiny dataset's preprocessed folder, cleaned of what a test adds."""
    for key, value in tiny.environment(tmp_path).items():
        monkeypatch.setenv(key, value)
    (tmp_path / "own_networks.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    base = tiny.preprocessed / tiny.name
    before = set(base.iterdir())
    yield base
    for file in set(base.iterdir()) - before:
        file.unlink()
    sys.modules.pop("own_networks", None)


def plan(*options: str) -> int:
    return main(["plan-network", "-d", "1", "-p", "tiny", "--no-timing", *options])


def test_med2d_trains_under_the_stock_trainer_on_the_same_data(world: Path, make_trainer, capsys) -> None:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    before = json.loads((world / "tiny.json").read_text())
    assert main(["plan-network", "-d", "1", "-p", "tiny", "-network", "med2d", "--width", "0.5"]) == 0
    said = capsys.readouterr().out
    assert "tiny_med2d" in said and "parameters" in said and "ratio" in said
    plans = json.loads((world / "tiny_med2d.json").read_text())
    changed = {
        k
        for k in before["configurations"]["2d"]
        if before["configurations"]["2d"][k] != plans["configurations"]["2d"][k]
    }
    assert (
        changed == {"architecture"} and plans["configurations"]["3d_fullres"] == before["configurations"]["3d_fullres"]
    )
    trainer = make_trainer(nnUNetTrainer, "", configuration="2d", plans=plans)
    trainer.num_iterations_per_epoch = trainer.num_val_iterations_per_epoch = 1
    trainer.on_train_start()
    assert type(trainer.network).__name__ == "Med2DSegNet"
    import numpy as np

    assert np.isfinite(trainer.train_step(next(trainer.dataloader_train))["loss"])


@pytest.mark.parametrize("network", ["med2d", "smp:Unet:tu-mobilenetv3_small_050"])
def test_methods_train_on_planned_networks_and_the_predictor_has_the_same(world: Path, make_trainer, network) -> None:
    import numpy as np
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    from nnunetv2_ext.trainers.nnUNetTrainerMedContext import nnUNetTrainerMedContext

    if network.startswith("smp"):
        pytest.importorskip("segmentation_models_pytorch", reason="needs the extra photo")
    assert plan("-network", network, "-o", "planned") == 0
    plans = json.loads((world / "planned.json").read_text())
    trainer = make_trainer(nnUNetTrainerMedContext, "seed=1", configuration="2d", plans=plans)
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    outputs = [trainer.train_step(next(trainer.dataloader_train)) for _ in range(2)]
    assert all(np.isfinite(value) for output in outputs for value in output.values())
    trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    predictor = nnUNetPredictor(device=torch.device("cpu"), use_mirroring=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(trainer.output_folder_base, (0,), "checkpoint_final.pth")
    predictor.network.load_state_dict(predictor.list_of_parameters[0])
    trainer.network.eval()
    trainer.set_deep_supervision_enabled(False)
    x = torch.randn(2, trainer.num_input_channels, *trainer.configuration_manager.patch_size)
    with torch.no_grad():
        assert torch.equal(predictor.network.eval()(x), trainer.network(x))


def test_a_class_of_the_users_own(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("-network", "own_networks.Net", "--kwargs", '{"width": 7}', "-o", "mine") == 0
    architecture = json.loads((world / "mine.json").read_text())["configurations"]["2d"]["architecture"]
    assert architecture["network_class_name"] == "own_networks.Net"
    assert architecture["arch_kwargs"]["width"] == 7 and set(architecture["arch_kwargs"]) == {"width", "strides"}
    assert "needs own_networks installed" in capsys.readouterr().out


@pytest.mark.parametrize(("network", "resolutions"), [("med2d", 5), ("smp:Unet:tu-mobilenetv3_small_050", 2)])
def test_networks_with_fewer_stages_than_the_plan(world: Path, make_trainer, network: str, resolutions: int) -> None:
    """nnU-Net plans seven stages for photographs: the network's own strides say what it returns."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    if network.startswith("smp"):
        pytest.importorskip("segmentation_models_pytorch", reason="needs the extra photo")
    plans = json.loads((world / "tiny.json").read_text())
    configuration = plans["configurations"]["2d"]
    configuration["patch_size"] = [64, 64]
    configuration["architecture"]["arch_kwargs"].update(
        n_stages=7,
        features_per_stage=[4] * 7,
        strides=[[1, 1]] + [[2, 2]] * 6,
        kernel_sizes=[[3, 3]] * 7,
        n_conv_per_stage=[1] * 7,
        n_conv_per_stage_decoder=[1] * 6,
    )
    (world / "deep.json").write_text(json.dumps(plans | {"plans_name": "deep"}))
    # nnU-Net's own network of such a plan cannot train a map of one voxel; only its cost is asked for here
    configuration["architecture"]["arch_kwargs"]["norm_op"] = None
    configuration["architecture"]["arch_kwargs"]["norm_op_kwargs"] = None
    (world / "deep.json").write_text(json.dumps(plans | {"plans_name": "deep"}))
    command = ["plan-network", "-d", "1", "-p", "deep", "-network", network, "-o", "shallow", "--no-timing"]
    assert main(command) == 0
    trainer = make_trainer(
        nnUNetTrainer, "", configuration="2d", plans=json.loads((world / "shallow.json").read_text())
    )
    trainer.initialize()
    assert len(trainer._get_deep_supervision_scales()) == resolutions


def test_existing_plans_of_another_network_stay(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("-network", "med2d", "-o", "other") == 0
    content = (world / "other.json").read_bytes()
    assert plan("-network", "med2d", "-o", "other") == 0  # the same again
    assert plan("-network", "med2d", "-o", "other", "--gap", "none") == 2
    assert "--force" in capsys.readouterr().err and (world / "other.json").read_bytes() == content
    assert plan("-network", "med2d", "-o", "other", "--gap", "none", "--force") == 0
    assert (world / "other.json").read_bytes() != content


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-network", "nothing"], "-network takes "),
        (["-network", "own_networks.Nothing"], "Python can import"),
        (["-network", "own_networks.Flat"], "with deep supervision"),
        (["-network", "own_networks.Fails"], "no such thing"),
        (["-network", "own_networks.NoStrides"], "takes no strides"),
        (["-network", "own_networks.Net", "--gap", "none"], "takes --kwargs"),
        (["-network", "own_networks.Net", "--kwargs", "{"], "is not JSON"),
        (["-network", "own_networks.Net", "--kwargs", "[1]"], "an object"),
        (["-network", "med2d", "--width", "x"], "--width is a factor"),
        (["-network", "med2d", "-c", "3d_fullres"], "use -c 2d"),
        (["-network", "med2d", "-c", "4d"], "have no configuration"),
        (["-network", "med2d", "-o", "a__b"], "cannot be a plans name"),
        (["-network", "med2d", "-o", "tiny"], "stay as they are"),
        (["-network", "smp:Unet"], "smp:ARCHITECTURE:ENCODER"),
    ],
)
def test_what_cannot_be_is_one_line_and_writes_nothing(
    world: Path, capsys: Any, options: list[str], words: str
) -> None:
    before = set(world.iterdir())
    assert plan(*options) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert set(world.iterdir()) == before
