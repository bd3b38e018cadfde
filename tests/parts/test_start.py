"""`init_from`: what is loaded of whose checkpoint, what is refused, and that it is read once."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
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

from nnunetv2_ext import installed_trainers
from nnunetv2_ext.core.checkpoint import read
from nnunetv2_ext.core.export import export_model
from nnunetv2_ext.core.outside import load_trainer, methods
from nnunetv2_ext.parts.start.source import read_source
from nnunetv2_ext.parts.start.start import Home, look_at
from nnunetv2_ext.parts.start.units import Asked, stock_tensors, within_plan
from nnunetv2_ext.trainers.nnUNetTrainerExt import nnUNetTrainerExt
from nnunetv2_ext.trainers.nnUNetTrainerJRAS import nnUNetTrainerJRAS

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


LABELS = {"background": 0, "organ": 1, "tumour": 2}


def home(dim: int = 2, labels: dict | None = None, **configuration) -> Home:
    """Where weights are to live; also what a file says of where it comes from."""
    architecture = {"network_class_name": "nets.PlainConvUNet", "arch_kwargs": {}, "_kw_requires_import": []}
    given = {"patch_size": [16] * dim, "spacing": [1.0] * dim, "architecture": architecture, **configuration}
    return Home(given, {"labels": labels or LABELS})


def save(network: nn.Module | dict, path: Path, prefix: str = "", dim: int = 2, labels: dict | None = None) -> Path:
    state = network if isinstance(network, dict) else network.state_dict()
    plans = {"configurations": {"2d": home(dim).configuration}}
    init_args = {"plans": plans, "configuration": "2d", "dataset_json": {"labels": labels or LABELS}}
    weights = {prefix + name: value for name, value in state.items()}
    torch.save({"network_weights": weights, "init_args": init_args}, path)
    return path


def start_from(network: nn.Module, path: Path, there: Home | None = None, **asked) -> str:
    return look_at(network, read_source(path), there or home(), Asked(**asked)).apply()


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
    counts = [c for row in table.splitlines()[1:] if (c := re.search(r"(\d+) tensors +([\d,]+) values", row))]
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


@pytest.mark.parametrize(
    ("there", "here", "how"), [(1, 3, "repeat"), (2, 4, "repeat"), (3, 1, "repeat"), (1, 3, "mean")]
)
def test_the_response_to_equal_channels_is_kept_whatever_their_number(tmp_path, there, here, how):
    theirs, ours = unet(there, seed=1).eval(), unet(here, seed=2).eval()
    table = start_from(ours, save(theirs, tmp_path / "a"), channels=how)
    assert table.startswith("100.0 %") and f"{there} to {here}" in line(table, "encoder.stages.0", "adapted")
    x = torch.randn(2, 1, 16, 16)
    # before the norm, which hides another scale
    mine, other = (
        net.encoder.stages[0][0].convs[0].conv(x.expand(-1, number, -1, -1))
        for net, number in ((ours, here), (theirs, there))
    )
    assert torch.allclose(mine, other, atol=1e-4)


def test_a_convolution_and_its_norm_are_taken_together_or_not_at_all(tmp_path):
    unit, ours = "encoder.stages.2.0.convs.0", unet(seed=2)
    theirs, before = without(unet(seed=1), "stages.2.0.convs.0.norm.weight"), copied(ours)
    theirs = {name: value for name, value in theirs.items() if "stages.2.0.convs.0.all_modules.1.weight" not in name}
    table = start_from(ours, save(theirs, tmp_path / "a"))
    assert line(table, "encoder.stages.2").endswith("stays random: not in the file")  # why the unit does not fit
    now = ours.state_dict()
    for name in ("conv.weight", "conv.bias", "norm.weight", "norm.bias"):
        assert torch.equal(now[f"{unit}.{name}"], before[f"{unit}.{name}"]), name
    assert torch.equal(now["decoder.stages.0.convs.0.conv.weight"], theirs["decoder.stages.0.convs.0.conv.weight"])


def test_three_channels_for_four_are_their_mean(tmp_path):
    theirs, ours = unet(3, seed=1), unet(4, seed=2)
    table = start_from(ours, save(theirs, tmp_path / "a"))
    assert "mean of the input channels: 3 to 4" in table
    first = "encoder.stages.0.0.convs.0.conv.weight"
    mean = theirs.state_dict()[first].mean(1, keepdim=True) * 3 / 4
    assert torch.allclose(ours.state_dict()[first], mean.expand(-1, 4, -1, -1))


def test_the_first_channels_alone_leave_further_ones_without_weight(tmp_path):
    theirs, ours = unet(1, seed=1), unet(3, seed=2)
    table = start_from(ours, save(theirs, tmp_path / "a"), channels="first")
    assert "2 further input channels start with weight 0" in line(table, "encoder.stages.0", "adapted")
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(ours.eval()(x), theirs.eval()(x[:, :1]))
    fewer = unet(1, seed=2)
    start_from(fewer, save(ours, tmp_path / "b"), channels="first")
    assert_same(fewer, theirs)


def test_a_kernel_that_shrinks_to_1_is_summed_and_one_that_grows_is_centred(tmp_path):
    flat, deep = [[1, 3, 3], [3, 3, 3], [3, 3, 3]], [[3, 3, 3]] * 3
    for there, here in ((deep, flat), (flat, deep)):
        theirs, ours = unet(dim=3, kernel_sizes=there, seed=1).eval(), unet(dim=3, kernel_sizes=here, seed=2).eval()
        table = start_from(ours, save(theirs, tmp_path / "a", dim=3), home(3))
        assert "kernel " in line(table, "encoder.stages.0", "adapted") and table.startswith("100.0 %")
        # away from the border, where there is nothing to sum
        x = torch.randn(1, 1, 1, 8, 8).expand(-1, -1, 5, -1, -1)
        mine, other = (net.encoder.stages[0][0].convs[0].conv(x)[:, :, 2] for net in (ours, theirs))
        assert torch.allclose(mine, other, atol=1e-4), (there, here)


@pytest.mark.parametrize(("there", "here"), [(3, 4), (4, 3)])
def test_deeper_and_shallower_networks_share_their_first_stages(tmp_path, there, here):
    def net(stages: int, seed: int) -> nn.Module:
        features = [4, 8, 12, 16][:stages]
        return unet(n_stages=stages, features_per_stage=features, strides=[1, 2, 2, 2][:stages], seed=seed)

    theirs, ours = net(there, 1), net(here, 2)
    before = copied(ours)
    table = start_from(ours, save(theirs, tmp_path / "a"))
    now, other = ours.state_dict(), theirs.state_dict()
    for name in (n for n in now if n.startswith("encoder.stages.")):
        assert torch.equal(now[name], (other if name in other else before)[name]), name
    assert f"3 of the {here} convolutions of the encoder are loaded" in table
    assert ("stays random: not in the file" in table) == (here > there)


def test_the_encoder_alone_is_taken_if_that_is_asked_for(tmp_path):
    theirs, ours = unet(seed=1), unet(seed=2)
    before, other = copied(ours), theirs.state_dict()
    table = start_from(ours, save(theirs, tmp_path / "a"), parts="encoder")
    for name, value in ours.state_dict().items():
        inside = name.startswith(("encoder.", "decoder.encoder."))
        assert torch.equal(value, (other if inside else before)[name]), name
    assert "not asked for" in line(table, "decoder.stages.0")


@pytest.mark.parametrize("heads", [None, True, False])
def test_segmentation_layers_are_taken_where_the_labels_are_the_same(tmp_path, heads):
    theirs, other = unet(seed=1).state_dict(), {"background": 0, "organ": 2, "tumour": 1}
    for labels in (LABELS, other, {**LABELS, "ignore": 3}):
        ours = unet(seed=2)
        before, same = copied(ours), labels is not other
        file = save(theirs, tmp_path / "a", labels=labels)
        if heads and not same:
            with pytest.raises(ValueError, match="init_heads=true needs the same labels"):
                start_from(ours, file, heads=heads)
            assert_same(ours, before)
            continue
        table = start_from(ours, file, heads=heads)
        taken = same and heads is not False
        for name, value in ours.state_dict().items():
            assert torch.equal(value, (theirs if taken or ".seg_layers." not in name else before)[name]), name
        why = "not asked for" if heads is False else "its labels are others"
        assert (why in line(table, "decoder.seg_layers.0")) == (not taken)


@pytest.mark.parametrize("container", ["network_weights", "state_dict", "net", "student", "model_state_dict", None])
def test_weights_are_found_in_any_container(tmp_path, container):
    theirs, ours = unet(seed=1), unet(seed=2)
    state = {f"module.{name}": value for name, value in theirs.state_dict().items()}
    torch.save({container: state, "epoch": 3} if container else state, tmp_path / "a")
    table = start_from(ours, tmp_path / "a")
    assert_same(ours.encoder, theirs.encoder)
    assert "its labels are others, or not known" in line(table, "decoder.seg_layers.0")


def test_what_nnssl_publishes_is_understood(tmp_path):
    """Weights with an adaptation plan, which names the pre-training's spacing and patch."""
    theirs, ours = unet(residual=True, seed=1), unet(residual=True, seed=2)
    plan = {
        "architecture_plans": {"arch_class_name": "ResEncL", "arch_kwargs": None},
        "pretrain_plan": {"configurations": {"onemmiso": {"spacing": [1, 1, 1], "patch_size": [192, 192, 192]}}},
        "recommended_downstream_patchsize": (160, 160, 160),
        "pretrain_num_input_channels": 1,
    }
    torch.save({"network_weights": theirs.state_dict(), "nnssl_adaptation_plan": plan}, tmp_path / "a")
    source = read_source(tmp_path / "a")
    assert source.configuration["patch_size"] == [160, 160, 160] and source.configuration["spacing"] == [1, 1, 1]
    assert source.configuration["architecture"]["network_class_name"].endswith("ResidualEncoderUNet")
    table = start_from(ours, tmp_path / "a")
    assert_same(ours.encoder, theirs.encoder)
    assert re.search(r"^\* patch +160 x 160 x 160 +16 x 16$", table, re.MULTILINE)


def test_the_plans_are_compared_and_differences_marked(tmp_path):
    file = save(unet(seed=1), tmp_path / "a")
    table = start_from(unet(seed=2), file, home(spacing=[2.0, 1.0]))
    assert re.search(r"^\* spacing +1 x 1 +2 x 1$", table, re.MULTILINE)
    assert re.search(r"^  patch +16 x 16 +16 x 16$", table, re.MULTILINE)


def test_plans_that_lack_the_configuration_do_not_keep_the_weights_from_being_read(tmp_path):
    theirs, ours = unet(seed=1), unet(seed=2)
    file = save(theirs, tmp_path / "a")
    content = torch.load(file, weights_only=False)
    content["init_args"]["configuration"] = "3d_fullres"
    torch.save(content, file)
    assert start_from(ours, file).startswith("100.0 %")
    assert_same(ours, theirs)


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
        (lambda: unet(dim=3), r"nothing of its encoder .*: 4x1x3x3x3 there, 4x1x3x3 here.* It is 3-D and these plans"),
        # its decoder would fit: nnU-Net's newer loader says "Loaded Network" and has loaded no encoder
        (
            lambda: unet(residual=True),
            r"nothing of its encoder .*stages\.0\.0\.convs\.0\.conv\.weight: not in the file",
        ),
        (lambda: {"bottleneck.weight": torch.ones(3)}, "not in the file"),
        (lambda: {}, "holds no weights"),
        (lambda: unet(features_per_stage=[5, 9, 13]), "5x1x3x3 there, 4x1x3x3 here"),
        (lambda: unet(features_per_stage=[4, 9, 13]), "only 1 of 3 convolutions of its encoder fits"),
        (lambda: {"swinViT.x.weight": torch.ones(3)}, "It is a network of Swin UNETR"),
        (lambda: {"conv_blocks_context.0.weight": torch.ones(3)}, "It is a network of nnU-Net v1 or STU-Net"),
        (lambda: {"eva.blocks.0.weight": torch.ones(3)}, "It is a network of Primus"),
        (lambda: without(unet(), "stages.0."), r"encoder\.stages\.0 would stay random and encoder\.stages\.1 behind"),
        (lambda: without(unet(), "encoder."), "nothing of its encoder fits"),
        (lambda: unet(seed=2), "all its values are those that this network has already"),
    ],
)
def test_a_start_that_is_worth_nothing_is_an_error(tmp_path, theirs, says):
    ours = unet(seed=2)
    before = copied(ours)
    with pytest.raises(ValueError, match=says) as caught:
        start_from(ours, save(theirs(), tmp_path / "a"))
    assert "\n" not in str(caught.value) and str(tmp_path / "a") in str(caught.value)
    assert_same(ours, before)


def without(network: nn.Module, part: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in network.state_dict().items() if part not in name}


def test_a_smaller_share_is_taken_if_that_is_asked_for(tmp_path):
    theirs, ours = unet(features_per_stage=[4, 9, 13], seed=1), unet(seed=2)
    start_from(ours, save(theirs, tmp_path / "a"), min_share=0.3)
    assert torch.equal(ours.encoder.stages[0][0].convs[0].conv.weight, theirs.encoder.stages[0][0].convs[0].conv.weight)


class Program:
    """A pickle that does something when it is opened."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def test_a_file_that_is_a_program_is_not_run_and_what_it_needs_is_named(tmp_path):
    file, ran = tmp_path / "model.pth", tmp_path / "ran"
    torch.save({"network_weights": unet(seed=1).state_dict(), "more": Program(ran)}, file)
    with pytest.raises(ValueError, match=r"holds (posix|nt)\.mkdir.*init_trust=true"):
        start_from(unet(), file)
    with pytest.raises(ValueError, match=r"holds (posix|nt)\.mkdir.*TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1"):
        read(file)
    assert not ran.exists()
    assert look_at(unet(), read_source(file, trust=True)).refusal == "" and ran.exists()


def test_the_remedy_for_other_files_works(tmp_path, monkeypatch):
    file = tmp_path / "model.pth"
    torch.save({"network_weights": {}, "more": Program(tmp_path / "ran")}, file)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    assert read(file)["network_weights"] == {} and (tmp_path / "ran").exists()


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
    start_from(unet(seed=3), tmp_path / "fold_0")  # which fold is said
    file.write_bytes(whole[: len(whole) // 2])
    assert "broken or cut short" in refusal(file)
    torch.save({"state_dict": {}}, file)
    assert "holds no weights (it has state_dict)" in refusal(file)
    (tmp_path / "model.pkl").write_bytes(whole)
    assert "nnU-Net v1" in refusal(tmp_path / "model.pkl")


# ---- through the trainers


@pytest.fixture
def plain(make_trainer, tmp_path):
    """A plain training's network, and its checkpoint."""
    trainer = make_trainer(nnUNetTrainer, configuration="2d", results=tmp_path / "plain")
    trainer.initialize()
    trainer.save_checkpoint(str(tmp_path / "plain.pth"))
    return trainer.network, tmp_path / "plain.pth"


TRAINERS = {name: facts for method in methods().values() for name, facts in method.trainers.items()}
OWN_NETWORK = {"nnUNetTrainerMed2D", "nnUNetTrainerPhoto"}  # which plain nnU-Net's weights do not fit
ELSEWHERE = {"nnUNetTrainerPEMMA", "nnUNetTrainerRADA"}  # refuses it, tests/pemma; 3-D and sparse, tests/rada


def smallest(name: str) -> str:
    facts = TRAINERS.get(name)
    return " ".join(f"{key}={value}" for key, value in (facts.smallest if facts else {}).items())


@pytest.mark.parametrize("name", sorted({*installed_trainers()} - OWN_NETWORK - ELSEWHERE))
def test_every_trainer_starts_from_plain_nnunet_and_from_its_own(make_trainer, plain, tmp_path, name):
    network, file = plain
    cls, settings = load_trainer(name), smallest(name)
    trainer = make_trainer(cls, f"{settings} init_from={file}", configuration="2d")
    trainer.on_train_start()
    inner = getattr(trainer.network, "backbone", trainer.network)
    assert_same(inner, network)
    assert read(own_checkpoint(trainer, tmp_path))["nnunetv2_ext"]["methods"]["init_from"].startswith("100.0 %")
    assert f"init_from={file}: 100.0 % of the " in Path(trainer.log_file).read_text()
    if getattr(trainer, "teacher", None) is not None:
        assert_same(trainer.teacher.module, trainer.network)
    own = own_checkpoint(trainer, tmp_path)
    again = make_trainer(cls, f"{settings} init_from={own}", configuration="2d", results=tmp_path / "again")
    again.initialize()
    assert_same(getattr(again.network, "backbone", again.network), network)
    if cls is nnUNetTrainerJRAS:  # other patients' patches stay where they are
        assert again.network.bank.is_empty


@pytest.mark.parametrize("name", sorted(OWN_NETWORK))
def test_a_trainer_with_a_network_of_its_own_starts_from_its_own_only(make_trainer, plain, tmp_path, name):
    if name == "nnUNetTrainerPhoto":
        pytest.importorskip("segmentation_models_pytorch")
    cls, settings = load_trainer(name), smallest(name)
    with pytest.raises(ValueError, match=r"init_from=.*plain\.pth: nothing of its encoder fits"):
        make_trainer(cls, f"{settings} init_from={plain[1]}", configuration="2d").initialize()
    trainer = make_trainer(cls, settings, configuration="2d")
    trainer.initialize()
    own = own_checkpoint(trainer, tmp_path)
    again = make_trainer(cls, f"{settings} init_from={own} seed=5", configuration="2d", results=tmp_path / "again")
    again.initialize()
    assert_same(again.network, trainer.network)


def own_checkpoint(trainer, folder: Path) -> Path:
    trainer.save_checkpoint(str(folder / "own.pth"))
    return folder / "own.pth"


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


@pytest.mark.slow
def test_two_ranks_start_from_it_alike(plain, tiny, tmp_path):
    file, base = plain[1], tiny.preprocessed / tiny.name
    worker = Path(__file__).parents[1] / "contract" / "ddp_worker.py"
    what = [nnUNetTrainerExt.__module__, "nnUNetTrainerExt", "2d", str(base / "tiny.json"), str(base / "dataset.json")]
    settings = f"init_from={file} batch_size=4 num_epochs=1 num_iterations_per_epoch=2 num_val_iterations_per_epoch=1"
    done = subprocess.run(
        [sys.executable, str(worker), *what, str(tmp_path)],
        env={**os.environ, **tiny.environment(tmp_path, settings)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    ranks = [torch.load(tmp_path / f"rank_{rank}.pt", weights_only=False) for rank in (0, 1)]
    theirs = read(file)["network_weights"]
    for name, value in ranks[0]["start"].items():
        assert torch.equal(value, ranks[1]["start"][name])
        assert torch.equal(value, theirs[name.removeprefix("network.")]), name
    assert ranks[0]["losses"] != ranks[1]["losses"]


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
