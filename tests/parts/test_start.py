"""`init_from`: what is loaded of whose checkpoint, what is refused, and that it is read once."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.run.run_training import maybe_load_checkpoint
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from nnunetv2_ext.core.checkpoint import read
from nnunetv2_ext.core.export import export_model
from nnunetv2_ext.parts.start import start_from, stock_tensors, within_plan
from nnunetv2_ext.trainers.nnUNetTrainerExt import nnUNetTrainerExt
from nnunetv2_ext.trainers.nnUNetTrainerJRAS import nnUNetTrainerJRAS
from nnunetv2_ext.trainers.nnUNetTrainerMedContext import nnUNetTrainerMedContext
from nnunetv2_ext.trainers.nnUNetTrainerMedContextJRAS import nnUNetTrainerMedContextJRAS

SMALL_JRAS = "jras.key_dim=8 jras.value_dim=4 jras.num_guides=2 jras.bank_size=24"


def unet(channels: int = 1, heads: int = 3, dim: int = 2, residual: bool = False, seed: int = 0, **kwargs) -> nn.Module:
    torch.manual_seed(seed)
    common = {
        "input_channels": channels,
        "n_stages": 3,
        "features_per_stage": [4, 8, 12],
        "conv_op": {2: nn.Conv2d, 3: nn.Conv3d}[dim],
        "kernel_sizes": 3,
        "strides": [1, 2, 2],
        "num_classes": heads,
        "n_conv_per_stage_decoder": 1,
        "conv_bias": True,
        "norm_op": {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}[dim],
        "norm_op_kwargs": {"affine": True},
        "nonlin": nn.LeakyReLU,
        "deep_supervision": False,
        **kwargs,
    }
    if residual:
        return ResidualEncoderUNet(**common, n_blocks_per_stage=1)
    network = PlainConvUNet(**common, n_conv_per_stage=1)
    for parameter in network.parameters():  # norms start equal everywhere
        nn.init.normal_(parameter)
    return network


class Holder(nn.Module):
    """A network of ours that holds those of the plan."""

    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.own = nn.ModuleList(inner), nn.Linear(2, 2)
        self.stock_prefixes = tuple(f"inner.{k}." for k in range(len(inner)))


def save(network: nn.Module | dict, path: Path, prefix: str = "") -> Path:
    state = network if isinstance(network, dict) else network.state_dict()
    torch.save({"network_weights": {prefix + name: value for name, value in state.items()}}, path)
    return path


def copied(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def assert_same(a: nn.Module, b: nn.Module | dict[str, torch.Tensor]) -> None:
    mine, other = a.state_dict(), b if isinstance(b, dict) else b.state_dict()
    assert [name for name in mine if not torch.equal(mine[name], other[name])] == []


def line(table: str, part: str, what: str = "") -> str:
    return next(row for row in table.splitlines() if row.split()[0] == part and what in row)


# ---- what is loaded


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "backbone.", "inner.1."])
@pytest.mark.parametrize("residual", [False, True])
def test_all_of_a_plain_checkpoint_is_loaded_whatever_stands_before_its_names(tmp_path, prefix, residual):
    theirs, ours = unet(residual=residual, seed=1), unet(residual=residual, seed=2)
    own = nn.Linear(3, 4).state_dict()
    file = save(
        {**{prefix + k: v for k, v in theirs.state_dict().items()}, "own.weight": own["weight"]}, tmp_path / "a"
    )
    table = start_from(ours, file)
    assert_same(ours, theirs)
    assert table.startswith("100.0 % of the ") and "stays random" not in table
    total = sum(p.numel() for p in ours.parameters())
    assert f"{total:,} values" in table.splitlines()[0]
    counts = [re.search(r"(\d+) tensors +([\d,]+) values", row) for row in table.splitlines()[1:-1]]
    assert sum(int(c[2].replace(",", "")) for c in counts) == total  # every tensor once, not once a name
    assert sum(int(c[1]) for c in counts) == len(list(ours.parameters()))
    assert "1 tensors of the file belong to nothing here" in table


def test_every_network_that_ours_holds_starts_from_it_and_the_rest_is_untouched(tmp_path):
    theirs, ours = unet(seed=1), Holder(unet(seed=2), unet(seed=3))
    own = copied(ours.own)
    table = start_from(ours, save(theirs, tmp_path / "a"))
    assert_same(ours.inner[0], theirs), assert_same(ours.inner[1], theirs), assert_same(ours.own, own)
    assert "in each of 2 networks" in table
    again = Holder(unet(seed=4), unet(seed=5))
    start_from(again, save(ours, tmp_path / "b"))  # from its own: the first of its networks
    assert_same(again.inner[1], theirs)


def test_a_file_without_the_further_names_of_a_tensor_is_understood(tmp_path):
    """nnU-Net's own loader, and one that goes by names, refuse it or put random weights back."""
    theirs, ours = unet(seed=1), unet(seed=2)
    few = {n: v for n, v in theirs.state_dict().items() if "all_modules" not in n and "decoder.encoder" not in n}
    other = {n: v for n, v in theirs.state_dict().items() if n.startswith("decoder.") and ".conv." not in n}
    assert len(few) < len(theirs.state_dict())
    for state in (few, other):
        ours = unet(seed=2)
        assert start_from(ours, save(state, tmp_path / "a")).startswith("100.0 %")
        assert_same(ours, theirs)


def test_further_inputs_of_the_first_convolution_start_with_weight_0(tmp_path):
    theirs, ours = unet(1, seed=1), unet(3, seed=2)
    table = start_from(ours, save(theirs, tmp_path / "a"))
    assert "adapted: 2 further input channels start with weight 0" in line(table, "encoder.stages", "adapted")
    assert table.startswith("100.0 %")
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(ours.eval()(x), theirs.eval()(x[:, :1]))


def test_fewer_inputs_leave_the_first_convolution_random_and_say_so(tmp_path):
    theirs, ours = unet(3, seed=1), unet(1, seed=2)
    before = copied(ours)
    table = start_from(ours, save(theirs, tmp_path / "a"))
    assert "stays random: 4x3x3x3 there, 4x1x3x3 here" in line(table, "encoder.stages", "stays random: 4x3")
    assert "a part of this unit does not fit" in table
    first = "encoder.stages.0.0.convs.0"
    now = ours.state_dict()
    for name in ("conv.weight", "conv.bias", "norm.weight", "norm.bias"):  # its norm stays with it
        assert torch.equal(now[f"{first}.{name}"], before[f"{first}.{name}"]), name
    assert torch.equal(
        now["encoder.stages.1.0.convs.0.norm.bias"], theirs.state_dict()["encoder.stages.1.0.convs.0.norm.bias"]
    )


def test_segmentation_layers_of_another_number_of_classes_stay_random(tmp_path):
    theirs, ours = unet(heads=3, seed=1), unet(heads=5, seed=2)
    before = copied(ours)
    table = start_from(ours, save(theirs, tmp_path / "a"))
    assert "stays random: 3 classes there, 5 here" in line(table, "decoder.seg_layers")
    now, plain = ours.state_dict(), theirs.state_dict()
    for name in now:
        assert torch.equal(now[name], (before if ".seg_layers." in name else plain)[name]), name
    share = sum(v.numel() for n, v in ours.named_parameters() if ".seg_layers." not in n)
    assert table.startswith(f"{100 * share / sum(p.numel() for p in ours.parameters()):.1f} %")


def test_half_precision_is_read(tmp_path):
    theirs, ours = unet(seed=1), unet(seed=2)
    start_from(ours, save({n: v.half() for n, v in theirs.state_dict().items()}, tmp_path / "a"))
    assert_same(ours, {n: v.half().float() for n, v in theirs.state_dict().items()})


def test_the_names_of_a_tensor_are_counted_once():
    network = unet()
    (wanted,) = stock_tensors(network)
    assert len(wanted) == len(list(network.parameters())) < len(network.state_dict())
    assert sum(map(len, wanted)) == len(network.state_dict())
    assert within_plan({}, wanted) == {}


def test_a_network_in_ddp_starts_like_any_other(tmp_path):
    theirs, ours = unet(seed=1), unet(seed=2)
    distributed.init_process_group("gloo", f"file://{tmp_path / 'meet'}", world_size=1, rank=0)
    try:
        start_from(DistributedDataParallel(ours), save(theirs, tmp_path / "a"))
    finally:
        distributed.destroy_process_group()
    assert_same(ours, theirs)


# ---- what is refused, with nothing changed


@pytest.mark.parametrize(
    ("theirs", "says"),
    [
        (lambda: unet(dim=3), "encoder.stages.0.0.convs.0.conv.weight: 4x1x3x3x3 there, 4x1x3x3 here"),
        # its decoder would fit: nnU-Net's newer loader says "Loaded Network" and has loaded no encoder
        (lambda: unet(residual=True), "encoder.stages.0.0.convs.0.conv.weight: not in the file"),
        (lambda: {"bottleneck.weight": torch.ones(3)}, "not in the file"),
        (lambda: {}, "not in the file"),
        (lambda: unet(features_per_stage=[5, 9, 13]), "5x1x3x3 there, 4x1x3x3 here"),
    ],
)
def test_a_start_that_loads_no_encoder_is_an_error(tmp_path, theirs, says):
    ours = unet(seed=2)
    before = copied(ours)
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        start_from(ours, save(theirs(), tmp_path / "a"))
    assert "\n" not in str(caught.value) and str(tmp_path / "a") in str(caught.value)
    assert_same(ours, before)


def test_nan_is_refused_before_anything_is_written(tmp_path):
    theirs, ours = unet(seed=1), unet(seed=2)
    before = copied(ours)
    with torch.no_grad():
        theirs.decoder.seg_layers[0].weight[0, 0] = np.inf
    with pytest.raises(ValueError, match=r"seg_layers\.0\.weight holds NaN or infinite"):
        start_from(ours, save(theirs, tmp_path / "a"))
    assert_same(ours, before)


def test_what_is_no_checkpoint_is_told_apart(tmp_path):
    def refusal(path: Path | str) -> str:
        with pytest.raises(ValueError) as caught:
            start_from(unet(), Path(path))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "does not exist" in refusal(tmp_path / "nowhere.pth")
    assert "download" in refusal("https://example.org/model.pth")
    file = tmp_path / "model.pth"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    assert "git lfs pull" in refusal(file)
    assert "a folder; name a checkpoint file" in refusal(tmp_path / "..")
    (tmp_path / "fold_0").mkdir()
    whole = save(unet(), tmp_path / "fold_0" / "checkpoint_final.pth").read_bytes()
    assert "fold_0/checkpoint_final.pth" in refusal(tmp_path)
    file.write_bytes(whole[: len(whole) // 2])
    assert "broken or cut short" in refusal(file)
    torch.save({"state_dict": {}}, file)
    assert "is not an nnU-Net checkpoint" in refusal(file)


# ---- through the trainers


@pytest.fixture
def plain(make_trainer, tmp_path):
    """A plain training's network, and its checkpoint."""
    trainer = make_trainer(nnUNetTrainer, configuration="2d", results=tmp_path / "plain")
    trainer.initialize()
    trainer.save_checkpoint(str(tmp_path / "plain.pth"))
    return trainer.network, tmp_path / "plain.pth"


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (nnUNetTrainerExt, ""),
        (nnUNetTrainerMedContext, ""),
        (nnUNetTrainerJRAS, SMALL_JRAS),
        (nnUNetTrainerMedContextJRAS, SMALL_JRAS),
    ],
)
def test_every_trainer_starts_from_plain_nnunet_and_from_its_own(make_trainer, plain, tmp_path, cls, settings):
    network, file = plain
    trainer = make_trainer(cls, f"{settings} init_from={file}", configuration="2d")
    trainer.on_train_start()
    inner = getattr(trainer.network, "backbone", trainer.network)
    assert_same(inner, network)
    assert f"init_from={file}: 100.0 % of the " in Path(trainer.log_file).read_text()
    if getattr(trainer, "teacher", None) is not None:
        assert_same(trainer.teacher.module, trainer.network)
    own = tmp_path / "own.pth"
    trainer.save_checkpoint(str(own))
    again = make_trainer(cls, f"{settings} init_from={own}", configuration="2d", results=tmp_path / "again")
    again.initialize()
    assert_same(getattr(again.network, "backbone", again.network), network)
    if cls is nnUNetTrainerJRAS:  # other patients' patches stay where they are
        assert again.network.bank.is_empty


def test_it_is_read_once_and_may_be_gone_by_then(make_trainer, plain, tmp_path):
    _, file = plain
    trainer = make_trainer(nnUNetTrainerExt, f"init_from={file}", configuration="2d")
    trainer.run_training()
    final = str(Path(trainer.output_folder) / "checkpoint_final.pth")
    file.unlink()
    for settings, continued in ((f"init_from={file}", True), ("", True), ("", False)):
        again = make_trainer(nnUNetTrainerExt, settings, configuration="2d", continued=continued)
        again.load_checkpoint(final)
        assert_same(again.network, trainer.network)
    with pytest.raises(ValueError, match=r"started with init_from=.*, but .* now says init_from=other.pth"):
        make_trainer(nnUNetTrainerExt, "init_from=other.pth", configuration="2d", continued=True).load_checkpoint(final)
    with pytest.raises(ValueError, match="does not exist"):  # --c without a checkpoint is a new training
        make_trainer(nnUNetTrainerExt, f"init_from={file}", configuration="2d", continued=True).on_train_start()


def test_not_set_it_changes_nothing_and_may_be_set_by_its_old_name(make_trainer, plain):
    network, file = plain
    trainer = make_trainer(nnUNetTrainerJRAS, f"{SMALL_JRAS} jras.init_from={file}", configuration="2d")
    trainer.initialize()
    assert_same(trainer.network.backbone, network)
    with pytest.raises(ValueError, match="keep 'init_from'"):
        make_trainer(nnUNetTrainerJRAS, f"jras.init_from={file} init_from={file}", configuration="2d")


def test_pretrained_weights_beside_it_are_refused(make_trainer, plain):
    _, file = plain
    trainer = make_trainer(nnUNetTrainerExt, f"init_from={file}", configuration="2d")
    trainer.initialize()
    load_pretrained_weights(trainer.network, str(file))
    with pytest.raises(ValueError, match="-pretrained_weights"):
        trainer.on_train_start()
    alone = make_trainer(nnUNetTrainerExt, "", configuration="2d")
    alone.initialize()
    load_pretrained_weights(alone.network, str(file))
    alone.on_train_start()


def test_pretrained_weights_that_do_not_fit_name_what_does(make_trainer, plain):
    """nnU-Net alone ends in an AssertionError."""
    _, file = plain
    with pytest.raises(ValueError, match=rf"-pretrained_weights {file} .* set (init_from={file}), which") as refused:
        maybe_load_checkpoint(make_trainer(nnUNetTrainerJRAS, SMALL_JRAS, "2d"), False, False, str(file))
    remedy = re.search(r"set (init_from=.*), which", str(refused.value))[1]
    maybe_load_checkpoint(make_trainer(nnUNetTrainerJRAS, f"{SMALL_JRAS} {remedy}", "2d"), False, False)
    with pytest.raises(ValueError, match=r"first at encoder\..*: use a checkpoint of the same network") as refused:
        maybe_load_checkpoint(make_trainer(nnUNetTrainerExt), False, False, str(file))  # 3-D
    assert "init_from" not in str(refused.value)
    with pytest.raises(ValueError, match="does not exist"):
        maybe_load_checkpoint(make_trainer(nnUNetTrainerExt), False, False, "nowhere.pth")
    fits = make_trainer(nnUNetTrainerExt, "", "2d")
    maybe_load_checkpoint(fits, False, False, str(file))
    theirs = read(file)["network_weights"]
    assert all(torch.equal(v, theirs[k]) for k, v in fits.network.state_dict().items() if ".seg_layers." not in k)


def test_the_folder_of_the_training_itself_is_refused(make_trainer, plain, tmp_path):
    trainer = make_trainer(nnUNetTrainerExt, "", configuration="2d")
    trainer.initialize()
    own = Path(trainer.output_folder) / "checkpoint_final.pth"
    trainer.save_checkpoint(str(own))
    again = make_trainer(nnUNetTrainerExt, f"init_from={own}", configuration="2d")
    with pytest.raises(ValueError, match="copy it to another folder"):
        again.initialize()
    copy = tmp_path / "copy.pth"
    copy.write_bytes(own.read_bytes())
    make_trainer(nnUNetTrainerExt, f"init_from={copy}", configuration="2d").initialize()


def test_an_export_does_not_name_the_file(make_trainer, plain, tmp_path):
    _, file = plain
    trainer = make_trainer(nnUNetTrainerJRAS, f"{SMALL_JRAS} init_from={file}", configuration="2d")
    trainer.on_train_start()
    trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    export_model(Path(trainer.output_folder_base), tmp_path / "out", edits=["strip-bank"])
    assert "init_from" not in json.loads((tmp_path / "out" / "plans.json").read_text())["nnunetv2_ext"]
    for path in (p for p in (tmp_path / "out").rglob("*") if p.is_file()):
        assert str(tmp_path).encode() not in path.read_bytes(), path
