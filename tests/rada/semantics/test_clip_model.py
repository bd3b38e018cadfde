"""Finding a CLIP model and its weights, and what is said when they cannot be had."""

from __future__ import annotations

import json
import os
import shutil
import sys

import pytest
import torch
from safetensors.torch import save_file

from nnunetv2_ext.rada.semantics.clip_encoder import load_encoder
from nnunetv2_ext.rada.semantics.clip_model import ClipSource, load_clip

quiet = {"log": lambda _: None}


def fails(source, words):
    with pytest.raises(ValueError, match=words) as error:
        load_clip(source, **quiet)
    assert "\n" not in str(error.value)
    return str(error.value)


def assert_ways_out(text):
    assert "rada.clip_weights=/path/to" in text or "rada.clip_weights:" in text
    assert "rada.semantics=learned" in text and "rada.semantics=off" in text


def same_weights(model, state):
    found = model.state_dict()
    return found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


@pytest.mark.parametrize("kind", ["safetensors", "pt", "half", "local-dir", "local-dir as weights"])
def test_local_weights(tiny_clip, tmp_path, kind, said, caplog):
    lines, log = said
    source = ClipSource(tiny_clip.name, str(tiny_clip.weights))
    expected = tiny_clip.state
    if kind == "pt":
        torch.save(tiny_clip.state, tmp_path / "w.pt")
        source = ClipSource(tiny_clip.name, str(tmp_path / "w.pt"))
    if kind == "half":  # OpenAI's are; the model is fp32 all the same
        expected = {name: tensor.half().float() for name, tensor in tiny_clip.state.items()}
        save_file({name: tensor.half() for name, tensor in tiny_clip.state.items()}, tmp_path / "w.safetensors")
        source = ClipSource(tiny_clip.name, str(tmp_path / "w.safetensors"))
    if kind == "local-dir":
        source = ClipSource(tiny_clip.local_dir)
    if kind == "local-dir as weights":
        source = ClipSource(weights=tiny_clip.local_dir)
    model, tokenizer = load_clip(source, log)
    assert same_weights(model, expected)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert tokenizer(["a liver"]).shape == (1, 24)
    assert any(line.startswith("CLIP: ") for line in lines)
    assert "randomly" not in caplog.text


def test_torchscript_archive_is_refused_and_not_run(tiny_clip, tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "ViT.pt"))
    text = fails(ClipSource(tiny_clip.name, str(tmp_path / "ViT.pt")), "TorchScript")
    assert "set rada.clip_weights=openai" in text
    assert_ways_out(text)


class _Shell:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("setting", ["clip_weights", "alpha_weights"])
def test_code_in_a_weights_file_is_not_executed(tiny_clip, tmp_path, monkeypatch, setting):
    monkeypatch.chdir(tmp_path)
    torch.save({"w": _Shell()}, tmp_path / "evil.pt")
    weights = str(tiny_clip.weights) if setting == "alpha_weights" else "evil.pt"
    source = ClipSource(tiny_clip.name, weights, "evil.pt" if setting == "alpha_weights" else None)
    with pytest.raises(ValueError, match=rf"rada\.{setting}: .*evil\.pt"):
        load_encoder(source, **quiet)
    assert not (tmp_path / "executed").exists()


def test_openai_weights_need_quickgelu():
    text = fails(ClipSource("ViT-B-16", "openai"), "plain GELU")
    assert "rada.clip_model=ViT-B-16-quickgelu" in text


def test_other_weights_need_the_plain_gelu(monkeypatch):
    # open_clip lists no such pair, but a later one may
    from open_clip import pretrained

    monkeypatch.setitem(pretrained._PRETRAINED["ViT-B-16-quickgelu"], "laion2b", {"url": "", "hf_hub": "a/b/"})
    text = fails(ClipSource("ViT-B-16-quickgelu", "laion2b"), "QuickGELU")
    assert "rada.clip_model=ViT-B-16" in text and "ViT-B-16-quickgelu and" not in text


def test_plain_model_with_a_file_of_unknown_origin_is_told(tiny_clip, said):
    lines, log = said
    load_clip(ClipSource(tiny_clip.plain, str(tiny_clip.weights)), log)
    assert any(f"set rada.clip_model={tiny_clip.name}" in line for line in lines)


def test_alpha_weights_need_quickgelu(tiny_clip):
    source = ClipSource(tiny_clip.plain, str(tiny_clip.weights), str(tiny_clip.alpha_weights))
    text = fails(source, "rada.alpha_weights: Alpha-CLIP was trained with QuickGELU")
    assert f"rada.clip_model={tiny_clip.name}" in text


def test_package_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    text = fails(ClipSource(), "open_clip_torch")
    assert "pip install open_clip_torch" in text and "rada.semantics=learned" in text and "rada.semantics=off" in text


def test_unknown_model():
    assert "ViT-B-16-quickgelu" in fails(ClipSource("ViT-B16-quickgelu"), "open_clip knows no model ViT-B16-quickgelu")
    fails(ClipSource("xyzzy"), "list_models")


def test_unknown_tag():
    text = fails(ClipSource(weights="openia"), "openia is neither a file nor weights that open_clip lists")
    assert "openai" in text
    assert_ways_out(text)


def test_missing_file(tmp_path):
    text = fails(ClipSource(weights=str(tmp_path / "none.safetensors")), "there is no file")
    assert "none.safetensors" in text
    assert_ways_out(text)


@pytest.mark.parametrize("keep", [0, 0.3, 0.95])
@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_truncated_file(tiny_clip, tmp_path, ending, keep):
    path = tmp_path / f"w{ending}"
    save_file(tiny_clip.state, path) if ending == ".safetensors" else torch.save(tiny_clip.state, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    assert_ways_out(fails(ClipSource(tiny_clip.name, str(path)), r"cannot be loaded .* damaged"))


@pytest.mark.parametrize("content", [[1, 2], {}, {"epoch": 3}, torch.ones(2)])
def test_file_without_a_state_dict(tiny_clip, tmp_path, content):
    torch.save(content, tmp_path / "w.pt")
    assert_ways_out(fails(ClipSource(tiny_clip.name, str(tmp_path / "w.pt")), r"w\.pt' of .* cannot be loaded"))


def test_weights_of_another_size(tiny_clip):
    text = fails(ClipSource("ViT-B-32-quickgelu", str(tiny_clip.weights)), "of ViT-B-32-quickgelu cannot be loaded")
    assert "of another model than rada.clip_model" in text
    assert_ways_out(text)


def test_offline_names_the_ways_out(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    text = fails(ClipSource(), "weights 'openai' of ViT-B-16-quickgelu cannot be loaded")
    assert "Hugging Face hub" in text
    assert_ways_out(text)
    text = fails(ClipSource("hf-hub:someone/some-clip"), "hf-hub:someone/some-clip cannot be loaded")
    assert_ways_out(text)


def test_local_dir_problems(tiny_clip, tmp_path):
    assert_ways_out(fails(ClipSource(f"local-dir:{tmp_path / 'none'}"), "cannot be loaded"))
    shutil.copy(tiny_clip.folder / "model" / "open_clip_config.json", tmp_path)
    assert_ways_out(fails(ClipSource(f"local-dir:{tmp_path}"), "cannot be loaded"))  # would be random
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"short")
    assert_ways_out(fails(ClipSource(f"local-dir:{tmp_path}"), "cannot be loaded"))


def test_weights_beside_a_model_that_brings_its_own(tiny_clip):
    fails(ClipSource(tiny_clip.local_dir, str(tiny_clip.weights)), "brings its own weights")


def test_identity_follows_the_content(tiny_clip, tmp_path):
    copy = shutil.copy(tiny_clip.weights, tmp_path / "copy.safetensors")
    one, two = ClipSource(tiny_clip.name, str(tiny_clip.weights)), ClipSource(tiny_clip.name, str(copy))
    assert one.identity() == two.identity()
    save_file({**tiny_clip.state, "logit_scale": torch.tensor(1.0)}, copy)
    assert one.identity() != two.identity()
    assert ClipSource(tiny_clip.name, str(tiny_clip.weights), str(tiny_clip.alpha_weights)).identity() != one.identity()
    assert ClipSource().identity() != ClipSource("ViT-B-32-quickgelu").identity()
    moved = shutil.copytree(tiny_clip.folder / "model", tmp_path / "moved")
    assert ClipSource(f"local-dir:{moved}").identity() == ClipSource(tiny_clip.local_dir).identity()
    config = json.loads((moved / "open_clip_config.json").read_text())
    (moved / "open_clip_config.json").write_text(json.dumps({**config, "preprocess_cfg": {"mean": [0, 0, 0]}}))
    assert ClipSource(f"local-dir:{moved}").identity() != ClipSource(tiny_clip.local_dir).identity()
    json.dumps(one.identity())


def test_identity_needs_the_files(tmp_path):
    for source in (
        ClipSource(weights=str(tmp_path / "a.pt")),
        ClipSource(alpha_weights=str(tmp_path / "b.pt")),
        ClipSource(f"local-dir:{tmp_path / 'c'}"),
    ):
        with pytest.raises(ValueError, match=os.path.basename(tmp_path)):
            source.identity()
