"""Reading weights files: every kind, every damage, no code executed, Alpha-CLIP's names."""

from __future__ import annotations

import os
import pickle
import re
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from nnunetv2_ext.rada.semantics.clip_weights import alpha_state_dict, file_hash, load_strict, read_weights
from nnunetv2_ext.rada.semantics.torchscript import is_torchscript, read_torchscript

SETTING = "rada.clip_weights"
TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.float16)}


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.scale = nn.Parameter(torch.tensor(2.5))
        self.register_buffer("table", torch.arange(24).reshape(4, 6)[::2, 1:5])  # neither contiguous nor at the start

    def forward(self, x):
        return self.linear(x) * self.scale


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([_Block(), _Block()])
        self.sizes = [2, 3]
        self.tied = self.blocks[0].scale

    def forward(self, x):
        return self.blocks[0](x) + self.blocks[1](x)


def archive(path, half=False):
    torch.manual_seed(0)
    net = _Net().half() if half else _Net()
    torch.jit.script(net).save(str(path))
    return path


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}], ids=["plain", "checkpoint"])
@pytest.mark.parametrize("ending", [".pt", ".bin", ".pth"])
def test_torch_files(tmp_path, ending, wrap):
    torch.save(wrap({f"module.{name}": tensor for name, tensor in TENSORS.items()}), tmp_path / f"w{ending}")
    found = read_weights(tmp_path / f"w{ending}", SETTING)
    assert found.keys() == TENSORS.keys() and all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


def test_safetensors(tmp_path):
    save_file(TENSORS, tmp_path / "w.safetensors")
    found = read_weights(tmp_path / "w.safetensors", SETTING)
    assert found.keys() == TENSORS.keys() and all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


@pytest.mark.parametrize("half", [False, True])
def test_torchscript_archive_gives_what_torch_jit_gives(tmp_path, half, said):
    lines, log = said
    path = archive(tmp_path / "net.pt", half)
    expected = torch.jit.load(str(path)).state_dict()
    found = read_weights(path, SETTING, log)
    assert expected.keys() <= found.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    assert "TorchScript archive" in lines[0] and "not run" in lines[0]


def test_ordinary_torch_file_is_no_torchscript_archive(tmp_path):
    torch.save(TENSORS, tmp_path / "w.pt")
    assert not is_torchscript(tmp_path / "w.pt")
    (tmp_path / "text").write_text("no zip")
    assert not is_torchscript(tmp_path / "text")


class _Shell:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("ending", [".pt", ".bin"])
def test_code_in_a_torch_file_is_not_executed(tmp_path, monkeypatch, ending):
    monkeypatch.chdir(tmp_path)
    torch.save({"w": _Shell()}, tmp_path / f"evil{ending}")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        read_weights(tmp_path / f"evil{ending}", SETTING)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("evil", [_Shell(), eval, pickle.loads], ids=["system", "eval", "loads"])
def test_code_in_a_torchscript_archive_is_not_executed(tmp_path, monkeypatch, evil):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile(tmp_path / "evil.pt", "w") as file:
        file.writestr("evil/data.pkl", pickle.dumps(evil))
        file.writestr("evil/constants.pkl", pickle.dumps(()))
    with pytest.raises(ValueError, match="cannot be read as weights"):
        read_weights(tmp_path / "evil.pt", SETTING, lambda _: None)
    assert not (tmp_path / "executed").exists()


def test_torchscript_setstate_is_not_run(tmp_path):
    class Stateful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))

        def forward(self, x):
            return x + self.weight

        @torch.jit.export
        def __getstate__(self):
            return self.weight, self.training

        @torch.jit.export
        def __setstate__(self, state: tuple[torch.Tensor, bool]):
            raise RuntimeError("code of the archive was run")

    path = tmp_path / "s.pt"
    try:
        torch.jit.script(Stateful()).save(str(path))
    except RuntimeError as error:  # this torch cannot script such a class: nothing to show
        pytest.skip(str(error).splitlines()[0])
    read_torchscript(path)
    with pytest.raises(torch.jit.Error, match="code of the archive was run"):
        torch.jit.load(str(path))


@pytest.mark.parametrize("ending", [".safetensors", ".pt", "torchscript.pt"])
@pytest.mark.parametrize("keep", [0, 0.3, 0.95])
def test_truncated_file(tmp_path, ending, keep):
    path = tmp_path / f"w{ending}"
    if ending == ".safetensors":
        save_file(TENSORS, path)
    elif ending == ".pt":
        torch.save(TENSORS, path)
    else:
        archive(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(ValueError, match="cannot be read as weights") as error:
        read_weights(path, SETTING)
    assert_one_line_with_ways_out(error, path.name)


def test_web_page_instead_of_weights(tmp_path):
    (tmp_path / "w.pth").write_text("<!DOCTYPE html><html><body>Quota exceeded</body></html>")
    with pytest.raises(ValueError, match="cannot be read as weights") as error:
        read_weights(tmp_path / "w.pth", SETTING)
    assert_one_line_with_ways_out(error, "w.pth")


@pytest.mark.parametrize("content", [[1, 2], {}, {"epoch": 3}, torch.ones(2)])
def test_file_without_a_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="holds no state dict") as error:
        read_weights(tmp_path / "w.pt", SETTING)
    assert_one_line_with_ways_out(error, "w.pt")


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match="there is no file") as error:
        read_weights(tmp_path / "none.safetensors", SETTING)
    assert_one_line_with_ways_out(error, "none.safetensors")


def assert_one_line_with_ways_out(error, name):
    text = str(error.value)
    assert "\n" not in text and name in text and SETTING in text
    assert "rada.semantics=learned" in text and "rada.semantics=off" in text


def alpha_names(**changes):
    state = {
        "module.conv1.weight": torch.randn(4, 3, 2, 2),
        "module.conv1_alpha.weight": torch.randn(4, 1, 2, 2),
        "module.transformer.resblocks.0.attn.in_proj.weight": torch.randn(12, 4),
        "module.transformer.resblocks.0.attn.in_proj.bias": torch.randn(12),
        "module.ln_pre.weight": torch.ones(4),
    }
    return {name: value for name, value in {**state, **changes}.items() if value is not None}


def test_alpha_names_become_open_clips():
    state = alpha_names()
    found = alpha_state_dict(state)
    assert set(found) == {
        "conv1.weight",
        "transformer.resblocks.0.attn.in_proj_weight",
        "transformer.resblocks.0.attn.in_proj_bias",
        "ln_pre.weight",
    }
    assert torch.equal(found["conv1.weight"][:, :3], state["module.conv1.weight"])
    assert torch.equal(found["conv1.weight"][:, 3:], state["module.conv1_alpha.weight"])
    assert torch.equal(
        found["transformer.resblocks.0.attn.in_proj_weight"],
        state["module.transformer.resblocks.0.attn.in_proj.weight"],
    )


@pytest.mark.parametrize("name", ["module.conv1.weight", "module.conv1_alpha.weight"])
def test_plain_clip_is_no_alpha_clip(name):
    with pytest.raises(ValueError, match=f"no Alpha-CLIP weights: {name.removeprefix('module.')} not found"):
        alpha_state_dict(alpha_names(**{name: None}))


def test_kernels_that_do_not_belong_together():
    with pytest.raises(ValueError, match=r"conv1_alpha\.weight is 4x1x3x3 beside conv1\.weight of 4x3x2x2"):
        alpha_state_dict(alpha_names(**{"module.conv1_alpha.weight": torch.zeros(4, 1, 3, 3)}))


def test_strict_loading_names_the_difference(tmp_path):
    linear = nn.Linear(3, 2)
    good = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}
    load_strict(linear, good, "f.pt", SETTING, "M")
    assert torch.equal(linear.weight, good["weight"]) and torch.equal(linear.bias, good["bias"])
    for state, words in (
        ({**good, "weight": torch.ones(2, 4)}, "weight is 2x4 instead of 2x3"),
        ({"weight": good["weight"]}, "bias is missing"),
        ({**good, "more": torch.ones(1)}, "more has no place in the model"),
        ({"weight": torch.ones(1, 1)}, "weight is 1x1 instead of 2x3 and 1 more differences"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"f.pt does not fit M: {words}")) as error:
            load_strict(linear, state, "f.pt", SETTING, "M")
        assert_one_line_with_ways_out(error, "f.pt")
    assert torch.equal(linear.weight, good["weight"]), "a refused file changes nothing"
    load_strict(linear, {**good, "more": torch.ones(1)}, "f.pt", SETTING, "M", extra_ok=True)


def test_file_hash_is_sha256(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert file_hash(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
