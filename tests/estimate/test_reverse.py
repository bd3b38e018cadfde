"""SPE's reverse segmenters: worse masks score lower, UniverSeg against its equations, files of something else."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from nnunetv2_ext.estimate.reverse import Slices, by_universeg, joined, open_segmenter, score, slices_of, tiny_unet
from nnunetv2_ext.estimate.universeg import UniverSeg


def discs(number: int, seed: int, eroded: int = 0) -> Slices:
    """Bright discs in noise, with masks that many voxels too small."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:48, :48]
    images, masks = [], []
    for _ in range(number):
        centre, radius = rng.uniform(18, 30, 2), rng.uniform(9, 13)
        disc = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2
        images.append(disc + 0.1 * rng.normal(size=disc.shape))
        masks.append(ndimage.binary_erosion(disc, iterations=eroded) if eroded else disc)
    pair = [torch.from_numpy(np.stack(a)[:, None].astype(np.float32)) for a in (images, masks)]
    return Slices(pair[0], pair[1], [f"case{n // 2}" for n in range(number)])


def test_the_more_masks_are_eroded_the_lower_their_score() -> None:
    query = discs(6, 1)
    found = [
        score(lambda s, images: tiny_unet(s, images, "cpu", steps=120), discs(12, 0, eroded), query)[0]
        for eroded in range(5)
    ]
    assert all(a > b for a, b in pairwise(found)) and found[0] > 0.85 and found[-1] < 0.7
    assert tiny_unet(discs(12, 0), query.images, "cpu", 3).equal(tiny_unet(discs(12, 0), query.images, "cpu", 3))


def test_a_score_is_the_mean_over_cases_that_have_the_structure() -> None:
    truth = torch.zeros(3, 2, 2, 2)
    truth[0, 0, 0], truth[2, 0, 0, 0] = 1, 1
    found = torch.zeros(3, 2, 2, 2, dtype=torch.bool)
    found[0, 0, 0, 0] = found[1, 0, 0, 0] = found[2, 0, 0, 0] = True  # case a: 1 of 2, one too many; case b: all
    query = Slices(torch.zeros(3, 1, 2, 2), truth, ["a", "a", "b"])
    first, second = score(lambda *_: found, query, query)
    assert first == pytest.approx((2 / 4 + 1) / 2) and math.isnan(second)
    assert all(math.isnan(v) for v in score(lambda *_: found, None, query))


def test_slices_are_those_with_a_structure_evenly_spread() -> None:
    masks = torch.zeros(1, 30, 4, 6, dtype=torch.bool)
    masks[0, 3:23, 1] = True
    image = np.broadcast_to(np.arange(30, dtype=np.float32)[None, :, None, None], (2, 30, 4, 6)).copy()
    found = slices_of("c", image, masks)
    assert found.images.shape == (8, 2, 128, 128) and found.masks.shape == (8, 1, 128, 128)
    assert (
        found.images[:, 0, 0, 0].tolist() == pytest.approx([3, 6, 8, 11, 14, 17, 19, 22]) and found.cases == ["c"] * 8
    )
    assert found.masks.mean() == pytest.approx(1 / 4)
    empty = slices_of("e", image, torch.zeros_like(masks))
    assert not empty.cases and joined([empty]) is None
    assert joined([empty, found, found]).cases == ["c"] * 16  # type: ignore[union-attr]


def random_weights(widths: tuple[int, ...] = (3, 4, 5), seed: int = 0) -> dict[str, Tensor]:
    """Of a small network, by the names of the released file."""
    generator, weights = torch.Generator().manual_seed(seed), {}

    def add(place: str, out: int, inside: int, size: int = 3) -> None:
        weights[f"{place}.weight"] = torch.randn(out, inside, size, size, generator=generator) / math.sqrt(9 * inside)
        weights[f"{place}.bias"] = torch.randn(out, generator=generator)

    channels = [3, *(2 * w for w in widths[:-1])]
    for n, (inside, width) in enumerate(zip(channels, widths)):
        block(add, f"enc_blocks.{n}", inside, width)
    below = widths[-1]
    for n, width in enumerate(reversed(widths[:-1])):
        block(add, f"dec_blocks.{n}", 2 * (below + width), width)
        below = width
    add("out_conv.conv", 1, below, 1)
    return weights


def block(add, name: str, inside: int, width: int) -> None:
    add(f"{name}.cross.cross_conv", width, inside)
    add(f"{name}.target.vmapped.conv", width, width)
    add(f"{name}.support.vmapped.conv", width, width)


def slow_universeg(w: dict[str, Tensor], image: Tensor, support: list[Tensor], depth: int = 3) -> Tensor:
    """The paper's equations, one pair at a time."""

    def conv(place: str, x: Tensor) -> Tensor:
        weight = w[f"{place}.weight"]
        return F.conv2d(x, weight, w[f"{place}.bias"], padding=weight.shape[-1] // 2)

    def crossed(name: str, u: Tensor, vs: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        z = [conv(f"{name}.cross.cross_conv", torch.cat((u, v), 1)) for v in vs]
        mean = sum(z[1:], z[0]) / len(z)
        new = [F.leaky_relu(conv(f"{name}.support.vmapped.conv", one)) for one in z]
        return F.leaky_relu(conv(f"{name}.target.vmapped.conv", mean)), new

    up = torch.nn.UpsamplingBilinear2d(scale_factor=2)
    u, vs, kept = image, support, []
    for n in range(depth):
        u, vs = crossed(f"enc_blocks.{n}", u, vs)
        if n < depth - 1:
            kept.append((u, vs))
            u, vs = F.max_pool2d(u, 2), [F.max_pool2d(v, 2) for v in vs]
    for n in range(depth - 1):
        left, lefts = kept.pop()
        u, vs = torch.cat((up(u), left), 1), [torch.cat((up(v), k), 1) for v, k in zip(vs, lefts)]
        u, vs = crossed(f"dec_blocks.{n}", u, vs)
    return conv("out_conv.conv", u)


def test_universeg_is_its_equations(tmp_path: Path) -> None:
    weights = random_weights()
    torch.save(weights, tmp_path / "w.pt")
    network = UniverSeg(tmp_path / "w.pt", "cpu")
    generator = torch.Generator().manual_seed(1)
    image, support = (torch.rand(n, c, 16, 24, generator=generator) for n, c in ((1, 1), (5, 2)))
    slow = slow_universeg(weights, image, list(support.split(1)))
    assert torch.allclose(network(image, support), slow, atol=1e-5) and slow.std() > 1e-3
    # what the structure's masks say counts, and the images' units do not
    masks = (torch.rand(5, 2, 16, 24, generator=generator) > 0.5).float()
    known, asked = Slices(support[:, :1], masks, ["c"] * 5), torch.rand(3, 1, 16, 24, generator=generator)
    found = by_universeg(network, known, asked)
    assert found.shape == (3, 2, 16, 24) and found.dtype == torch.bool
    scaled = Slices(7 * known.images - 3, masks, known.cases)
    low, high = asked.amin((2, 3), keepdim=True), asked.amax((2, 3), keepdim=True)
    assert by_universeg(network, scaled, 5 * asked).equal(found)
    pair = known.images - known.images.amin((2, 3), keepdim=True)
    pair = torch.cat((pair / pair.amax((2, 3), keepdim=True), masks[:, 1:]), 1)
    slow = slow_universeg(weights, ((asked - low) / (high - low))[:1], list(pair.split(1)))
    assert (found[:1, 1:] == (slow > 0)).float().mean() > 0.99


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("unet", "tiny-unet or universeg:FILE"),
        ("universeg", "tiny-unet or universeg:FILE"),
        ("universeg:missing.pt", "is not a file"),
        ("universeg:text.pt", "cannot be read as plain tensors"),
        ("universeg:lacking.pt", "out_conv.conv.bias is missing"),
        ("universeg:more.pt", "other is unknown"),
        ("universeg:narrow.pt", "do not fit each other"),
    ],
)
def test_other_files_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    weights = random_weights()
    (tmp_path / "text.pt").write_text("no tensors")
    torch.save({k: v for k, v in weights.items() if k != "out_conv.conv.bias"}, "lacking.pt")
    torch.save({**weights, "other": torch.zeros(1)}, "more.pt")
    torch.save({**weights, "out_conv.conv.weight": torch.zeros(1, 9, 1, 1)}, "narrow.pt")
    with pytest.raises(ValueError, match=words):
        open_segmenter(name, "cpu")
