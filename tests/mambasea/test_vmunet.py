"""VM-UNet: the scan against the recurrence, four directions, the network's contract, weights of a file."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("mambapy", reason="needs the extra mamba")

from nnunetv2_ext.mambasea import scan
from nnunetv2_ext.mambasea.plans import architecture
from nnunetv2_ext.mambasea.scan import selective_scan
from nnunetv2_ext.mambasea.vmunet import SS2D, VMUNet, four_folds, four_scans
from nnunetv2_ext.mambasea.weights import load_vmamba

SMALL: dict[str, Any] = {"widths": (8, 16, 24, 32), "depths": (1, 1, 1, 1), "depths_up": (1, 1, 1, 1)}


def recurrence(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Step by step."""
    h = torch.zeros(*u.shape[:3], A.shape[-1], dtype=u.dtype)
    steps = []
    for t in range(u.shape[-1]):
        d = delta[..., t, None]  # (batch, K, D, 1)
        h = torch.exp(d * A) * h + d * B[:, :, None, :, t] * u[..., t, None]
        steps.append((h * C[:, :, None, :, t]).sum(-1))
    return torch.stack(steps, -1) + D[..., None] * u


def arguments(length: int, batch: int = 2, K: int = 2, D: int = 3, N: int = 4, dtype: Any = torch.float64) -> list:
    torch.manual_seed(length)
    sequences = [torch.randn(batch, K, D, length, dtype=dtype), torch.rand(batch, K, D, length, dtype=dtype)]
    states = [torch.randn(batch, K, N, length, dtype=dtype) for _ in range(2)]
    return [*sequences, -torch.rand(K, D, N, dtype=dtype), *states, torch.randn(K, D, dtype=dtype)]


@pytest.mark.parametrize("length", [1, 2, 3, 8, 13, 36])
def test_the_scan_is_the_recurrence(length: int) -> None:
    values = arguments(length)
    assert torch.allclose(selective_scan(*values), recurrence(*values), atol=1e-12)


def test_its_gradients_are_right() -> None:
    values = [value.requires_grad_() for value in arguments(5, batch=1, D=2, N=2)]
    assert torch.autograd.gradcheck(selective_scan, values)


def test_the_state_is_float32_under_autocast() -> None:
    values = arguments(16, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = selective_scan(*values)
    assert found.dtype == torch.float32
    assert torch.allclose(found, recurrence(*(v.float() for v in values)), atol=1e-4)


def test_mamba_ssms_kernel_gets_what_it_expects(monkeypatch) -> None:
    """By its interface: (B, G D, L), A (G D, N), B and C (B, G, N, L); here computed on the CPU."""
    called = []

    def fused(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        called.append(u.shape)
        groups = B.shape[1]
        split = [v.unflatten(1, (groups, -1)) for v in (u, delta)]
        own = [v.unflatten(0, (groups, -1)) for v in (A, D)]
        return recurrence(*split, own[0], B, C, own[1]).flatten(1, 2)

    values = arguments(7)
    monkeypatch.setattr(scan, "kernel", lambda: fused)
    assert torch.allclose(selective_scan(*values), recurrence(*values)) and not called, "no GPU, no kernel"

    class OnGPU(torch.Tensor):
        device = types.SimpleNamespace(type="cuda")

    monkeypatch.setattr(torch, "autocast", lambda kind, enabled: torch.no_grad())
    gpu = selective_scan(values[0].as_subclass(OnGPU), *values[1:])
    assert called == [(2, 6, 7)] and torch.allclose(gpu.as_subclass(Tensor), recurrence(*values))


def test_a_kernel_that_does_not_load_is_said_once_and_passed_over(monkeypatch) -> None:
    scan.kernel.cache_clear()
    monkeypatch.setattr(scan, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "mamba_ssm", types.ModuleType("mamba_ssm"))  # without its interface
    with pytest.warns(UserWarning, match="mamba-ssm does not load"):
        assert scan.kernel() is None
    assert scan.kernel() is None
    scan.kernel.cache_clear()


def test_without_a_scan_the_remedy_is_named(monkeypatch) -> None:
    monkeypatch.setattr(scan, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'pip install "nnunetv2-ext\[mamba\]"'):
        VMUNet(1, 2, **SMALL)


def test_four_directions_and_back() -> None:
    x = torch.arange(6.0).view(1, 1, 2, 3)
    rows, columns, back, up = four_scans(x)[0, :, 0].tolist()
    assert rows == [0, 1, 2, 3, 4, 5] and columns == [0, 3, 1, 4, 2, 5]
    assert back == rows[::-1] and up == columns[::-1]
    x = torch.randn(2, 3, 4, 5)
    assert torch.allclose(four_folds(four_scans(x), x.shape[2:]), 4 * x)


def slow_block(block: SS2D, x: Tensor) -> Tensor:
    """Direction by direction, token by token, of one image ``(H, W, C)``."""
    height, width, _ = x.shape
    inner, gate = (x @ block.in_proj.weight.T).chunk(2, -1)
    inner = torch.nn.functional.silu(block.conv2d(inner.permute(2, 0, 1)[None])[0]).permute(1, 2, 0)
    rows = [(a, b) for a in range(height) for b in range(width)]
    columns = [(a, b) for b in range(width) for a in range(height)]
    total = torch.zeros_like(inner)
    decays, rank, D = -torch.exp(block.A_logs).view(4, -1, 16), block.rank, inner.shape[-1]
    for k, places in enumerate((rows, columns, rows[::-1], columns[::-1])):
        h = torch.zeros(D, 16, dtype=x.dtype)
        for a, b in places:
            u = inner[a, b]
            low, B, C = (block.x_proj_weight[k] @ u).split((rank, 16, 16))
            delta = torch.log1p(torch.exp(block.dt_projs_weight[k] @ low + block.dt_projs_bias[k]))
            h = torch.exp(delta[:, None] * decays[k]) * h + delta[:, None] * B * u[:, None]
            total[a, b] += h @ C + block.Ds.view(4, -1)[k] * u
    normed = torch.nn.functional.layer_norm(total, (D,), block.out_norm.weight, block.out_norm.bias)
    return (normed * torch.nn.functional.silu(gate)) @ block.out_proj.weight.T


def test_a_block_is_its_slow_reference() -> None:
    torch.manual_seed(0)
    block = SS2D(8).double()
    nn.init.normal_(block.Ds)
    x = torch.randn(2, 3, 4, 8, dtype=torch.float64)
    with torch.no_grad():
        slow = torch.stack([slow_block(block, image) for image in x])
        # the steps of time are taken in float32
        assert torch.allclose(block(x), slow, atol=1e-5)


def test_the_decoder_adds_the_map_in_front_of_each_stage() -> None:
    network = VMUNet(1, 2, **SMALL).eval()
    x, up = torch.randn(1, 1, 32, 32), network.decoder.layers_up
    with torch.no_grad():
        patches, one, two, three, four = network.encoder(x)
        assert [m.shape[-1] for m in (patches, one, two, three, four)] == [8, 16, 24, 32, 32]
        y = up[3](up[2](up[1](up[0](four) + three) + two) + one)
        assert y.shape == patches.shape
        assert torch.equal(network(x), network.decoder.final_conv(network.decoder.final_up(y).permute(0, 3, 1, 2)))


def test_the_paper_s_number_of_parameters() -> None:
    assert sum(p.numel() for p in VMUNet(1, 4).parameters()) == 27_424_564  # the literature: 27.43 million


@pytest.mark.parametrize("size", [(32, 64), (40, 33)])
def test_sides_are_padded_and_cropped_and_every_parameter_learns(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    network = VMUNet(2, 3, **SMALL, drop_path=0.0, deep_supervision=True)
    x = torch.randn(2, 2, *size)
    full, half = network(x)
    assert full.shape == (2, 3, *size) and half.shape == (2, 3, *(round(n / 2) for n in size))
    full.square().mean().backward()
    assert [n for n, p in network.named_parameters() if p.grad is None or not bool(p.grad.any())] == []
    network.decoder.deep_supervision = False
    network.eval()
    with torch.no_grad():
        whole = network(torch.nn.functional.pad(x, (0, -size[1] % 32, 0, -size[0] % 32), mode="replicate"))
        assert torch.equal(network(x), whole[..., : size[0], : size[1]])


def test_dropped_paths_are_whole_samples_in_training_only() -> None:
    torch.manual_seed(0)
    block = VMUNet(1, 2, **SMALL).encoder.layers[0].blocks[0]
    block.drop_path = 0.5
    x = torch.randn(200, 2, 2, 8)
    with torch.no_grad():
        kept = (block(x) != x).flatten(1).any(1)
        assert 0.4 < float(kept.float().mean()) < 0.6
        block.eval()
        y = block(x)
        assert torch.allclose(y - x, block.self_attention(block.ln_1(x)), atol=1e-6)


def test_lsa_works_on_the_scan_outputs() -> None:
    from nnunetv2_ext.mambasea.lsa import LSA

    torch.manual_seed(0)
    block = SS2D(8)
    x, seen = torch.randn(6, 4, 4, 8), []
    plain = block(x)
    block.augment = LSA(torch.Generator().manual_seed(0), 0.75)
    of_scans = block.augment.of_scans
    block.augment.of_scans = lambda y, training: seen.append((y, of_scans(y, training))) or seen[-1][1]  # type: ignore
    assert torch.equal(block(x), plain), "not active"
    block.augment.active = True
    assert not torch.equal(block(x), plain)
    before, after = seen[-1]
    assert before.shape == (6, 4, 16, 16)
    changed = (before != after).flatten(0, 1)  # of each sample and direction
    assert all(bool((c == c[0]).all()) and int(c[0].sum()) == 12 for c in changed)
    block.eval()
    assert torch.equal(block(x), plain)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"widths": (8, 16, 32)}, "four stages"), ({"widths": (6, 12, 24, 48)}, "multiples of 4")],
)
def test_wrong_arguments_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        VMUNet(1, 2, **{**SMALL, **change})


@pytest.mark.parametrize(
    ("patch", "rest", "words"),
    [([64, 64, 64], "", "use -c 2d"), ([24, 64], "", "at least 32 x 32"), ([64, 64], "small", "no variants")],
)
def test_plans_that_do_not_fit_are_refused(patch: list[int], rest: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        architecture({"patch_size": patch}, rest)


# ---- weights


def of_vmamba(network: nn.Module, channels: int = 3) -> dict[str, Tensor]:
    """The encoder under VMamba's names, with other values."""
    state = {k.removeprefix("encoder."): v for k, v in network.state_dict().items() if k.startswith("encoder.")}
    state = {k: torch.randn_like(v) for k, v in state.items()}
    width = state["patch_embed.proj.weight"].shape[0]
    state["patch_embed.proj.weight"] = torch.randn(width, channels, 4, 4)
    return {**state, "classifier.head.weight": torch.randn(7, 5)}


@pytest.mark.parametrize("prefix", ["", "module.", "backbone."])
def test_vmambas_weights_fill_the_encoder_and_the_decoders_blocks(tmp_path: Path, prefix: str) -> None:
    network = VMUNet(1, 2, **SMALL)
    theirs = of_vmamba(network)
    torch.save({"model": {prefix + name: value for name, value in theirs.items()}}, tmp_path / "w.pth")
    table = load_vmamba(network, tmp_path / "w.pth")
    state = network.state_dict()
    assert "% of" in table and "decoder.final_conv" in table and "encoder.layers.0" in table
    key = "layers.3.blocks.0.self_attention.x_proj_weight"
    assert torch.equal(state[f"encoder.{key}"], theirs[key])
    assert torch.equal(state["decoder.layers_up.0.blocks.0.self_attention.x_proj_weight"], theirs[key])
    # a grey image gives what it gave in all three channels
    assert torch.allclose(state["encoder.patch_embed.proj.weight"], theirs["patch_embed.proj.weight"].sum(1, True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.update({"layers.1.blocks.0.ln_1.weight": torch.ones(5)}), "of another width"),
        (lambda s: [s.pop(k) for k in list(s) if k.startswith(("layers", "patch"))], "has nothing for the encoder"),
        (lambda s: s["layers.0.blocks.0.ln_1.bias"].fill_(float("nan")), "NaN"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_nothing_is_loaded(tmp_path: Path, change: Any, words: str) -> None:
    network = VMUNet(1, 2, **SMALL)
    theirs = of_vmamba(network)
    change(theirs)
    torch.save(theirs, tmp_path / "w.pth")
    before = {k: v.clone() for k, v in network.state_dict().items()}
    with pytest.raises(ValueError, match=words) as refusal:
        load_vmamba(network, tmp_path / "w.pth")
    assert "\n" not in str(refusal.value)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
