"""LSA and GVA by their definitions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from nnunetv2_ext.mambasea.gva import GVA, brightness
from nnunetv2_ext.mambasea.lsa import LSA, Spread, piece, restyled, scan_order


def active(share: float = 0.75, seed: int = 0) -> LSA:
    lsa = LSA(torch.Generator().manual_seed(seed), share)
    lsa.active = True
    return lsa


def features(*shape: int) -> torch.Tensor:
    scale = torch.rand(shape[0], shape[1], *[1] * (len(shape) - 2), generator=torch.Generator().manual_seed(1))
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(2)) + 5 * scale


@pytest.mark.parametrize("shape", [(6, 3, 8, 10), (2, 3, 4, 5, 6), (7, 2, 1, 9)])
def test_one_contiguous_piece_of_each_sample_changes_and_the_rest_is_bit_equal(shape: tuple[int, ...]) -> None:
    x, stage = features(*shape), nn.Identity()
    size, length = shape[2:], x[0, 0].numel()
    seen = set()
    for seed in range(12):
        changed = active(seed=seed).hook(stage, (), x) != x
        for sample in changed:
            assert bool((sample == sample[0]).all()), "the same tokens of all channels"
            assert int(sample[0].sum()) == round(0.75 * length)
            runs = []
            for axis in range(len(size)):
                order = scan_order(size, axis, x.device)
                where = sample[0].flatten()[order.flatten().argsort()].nonzero().flatten()
                runs.append(int(where[-1] - where[0]) + 1 == len(where))
            assert any(runs)
            seen.add(tuple(runs))
    assert len(seen) > 1 or 1 in size, "along one axis in some samples, along another one in others"


def test_scans_run_along_rows_and_columns() -> None:
    assert scan_order((2, 3), 0, torch.device("cpu")).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert scan_order((2, 3), 1, torch.device("cpu")).tolist() == [[0, 2, 4], [1, 3, 5]]


def test_statistics_inside_are_those_that_were_drawn() -> None:
    x = features(4, 3, 50)
    mu, sd = x.mean(-1), x.std(-1, unbiased=False)
    beta, gamma = mu + 2, 3 * sd
    y = restyled(x, mu, sd, beta, gamma)
    assert torch.allclose(y.mean(-1), beta, atol=1e-4)
    assert torch.allclose(y.std(-1, unbiased=False), gamma, rtol=1e-3)


def test_the_batch_gives_the_spread_from_six_samples_on() -> None:
    """Drawn means scatter about the sample's own by the batch's standard deviation, and so do standard deviations."""
    x = features(6, 2, 30, 20)
    lsa = active(share=1.0)
    drawn = torch.stack([lsa.hook(nn.Identity(), (), x) for _ in range(400)])
    flat = x.flatten(2)
    for found, own in (
        (drawn.flatten(3).mean(-1), flat.mean(-1)),
        (drawn.flatten(3).std(-1, unbiased=False), flat.std(-1, unbiased=False)),
    ):
        assert torch.allclose((found - own).std((0, 1)), own.std(0), rtol=0.15)
    assert lsa.spread.batches == 0


def test_small_batches_take_the_running_spread() -> None:
    spread = Spread()
    values = torch.randn(90, 2, 5, generator=torch.Generator().manual_seed(0))
    found = [spread.update(sample[None]) for sample in values]
    assert found[0] is None, "one sample says nothing about others"
    assert torch.allclose(found[-1], values.std(0, unbiased=False), rtol=1e-4)
    for sample in 3 + 0.1 * torch.randn(1000, 2, 5):  # the network moves on: after some hundred batches
        last = spread.update(sample[None])
    assert bool((last < 0.3).all())
    again = Spread()
    again.load_state_dict(copy.deepcopy(spread.state_dict()), torch.device("cpu"))
    assert torch.equal(again.update(values[:1]), spread.update(values[:1]))


def test_one_sample_is_left_alone_at_first_and_changed_from_the_second_step_on() -> None:
    lsa, stage = active(), nn.Identity()
    first, second = features(2, 3, 4, 4).split(1)
    assert torch.equal(lsa.hook(stage, (), first), first)
    assert not torch.equal(lsa.hook(stage, (), second), second)


@pytest.mark.parametrize("how", ["eval", "inactive", "copy"])
def test_it_is_off_in_eval_in_other_passes_and_in_copies(how: str) -> None:
    lsa, stage, x = active(), nn.Identity(), features(6, 2, 5, 5)
    assert not torch.equal(lsa.hook(stage, (), x), x)
    if how == "eval":
        stage.eval()
    if how == "inactive":
        lsa.active = False
    if how == "copy":
        stage.register_forward_hook(lsa.hook)
        stage = copy.deepcopy(stage)
        assert torch.equal(stage(x), x)
        return
    assert lsa.hook(stage, (), x) is x


def test_every_place_of_a_piece_occurs() -> None:
    position = torch.arange(10)
    starts = {
        int(piece(position, 10, 0.5, torch.tensor(u)).nonzero()[0]) for u in torch.linspace(0, 0.9999, 60).tolist()
    }
    assert starts == set(range(6))
    assert int(piece(position, 10, 1.0, torch.tensor(0.5)).sum()) == 10


def test_gradients_flow_and_half_precision_stays() -> None:
    x = features(6, 2, 5, 5).bfloat16().requires_grad_()
    y = active().hook(nn.Identity(), (), x)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad is not None and bool(torch.isfinite(x.grad).all())


# ---- GVA


def images(*brightness_of: float, dim: int = 2) -> torch.Tensor:
    """A sample for each mean brightness, on some scale of its own."""
    noise = torch.rand(len(brightness_of), 2, *[8] * dim, generator=torch.Generator().manual_seed(3))
    out = []
    for sample, wanted in zip(noise, brightness_of):
        sample = sample ** (1 / wanted - 1)  # the mean of u^k is 1 / (k + 1)
        out.append(100 * (sample - sample.min()) / (sample.max() - sample.min()) - 30)
    return torch.stack(out)


@pytest.mark.parametrize("dim", [2, 3])
def test_only_dark_samples_are_brightened_and_only_if_the_draw_says_so(dim: int) -> None:
    torch.manual_seed(0)
    gva, x = GVA(2, dim, tau=0.4, probability=0.8), images(0.2, 0.2, 0.7, dim=dim)
    assert brightness(x).tolist() == pytest.approx([0.2, 0.2, 0.7], abs=0.06)
    y, chosen = gva(x, torch.tensor([0.79, 0.81, 0.0]))
    y = y.detach()
    assert chosen.tolist() == [True, False, False]
    assert torch.equal(y[1:], x[1:]) and not torch.equal(y[0], x[0])
    assert float(y[0].min()) == pytest.approx(float(x[0].min()), abs=1e-3)
    assert float(y[0].max()) == pytest.approx(float(x[0].max()), abs=1e-3)


def test_it_learns_and_a_constant_image_stays() -> None:
    gva = GVA(1, 2, 0.4, 1.0)
    constant = torch.full((1, 1, 6, 6), 3.0)
    assert torch.equal(gva.enhance(constant), constant)
    gva.enhance(torch.rand(2, 1, 6, 6)).square().sum().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in gva.parameters())


def test_the_formula() -> None:
    torch.manual_seed(1)
    gva: Any = GVA(1, 2, 0.4, 1.0)
    x = torch.rand(1, 1, 5, 5)
    x01 = (x - x.min()) / (x.max() - x.min())
    y = gva.first(x01)
    for _ in range(3):
        y = y + torch.relu(nn.functional.instance_norm(gva.repeated[0](y)))
    e = x01 + 1 / (1 + torch.exp(-gva.last(y)))
    e = (e - e.min()) / (e.max() - e.min())
    assert torch.allclose(gva.enhance(x), x.min() + e * (x.max() - x.min()), atol=1e-5)
