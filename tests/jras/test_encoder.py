"""The encoders: any patch shape gives unit embeddings, and guide features of the promised sizes."""

from __future__ import annotations

import pytest
import torch

from nnunetv2_ext.jras.encoder import GuideEncoder, Retriever, conv_blocks


def sizes(shape: tuple[int, ...], blocks: int) -> list[tuple[int, ...]]:
    """Cells per axis after each block."""
    x, found = torch.zeros(1, 1, *shape), []
    for block in conv_blocks(1, shape, [1] * blocks):
        x = block[0](x)
        found.append(tuple(x.shape[2:]))
    return found


@pytest.mark.parametrize("shape", [(8, 8, 8), (10, 14, 10), (5, 8, 1), (8, 8), (128, 3)])
def test_two_cells_are_kept_of_every_axis_that_has_two(shape):
    assert all(after >= min(2, before) for after, before in zip(sizes(shape, 6)[-1], shape))


def test_all_but_the_first_halve_where_they_can():
    assert sizes((32, 8), 4) == [(32, 8), (16, 4), (8, 2), (4, 2)]


@pytest.mark.parametrize("shape", [(8, 8, 8), (3, 9, 5), (8, 11)])
def test_embeddings_are_of_unit_length(shape):
    torch.manual_seed(0)
    keys = Retriever(2, shape, key_dim=16)(torch.randn(4, 2, *shape))
    assert keys.shape == (4, 16) and keys.dtype == torch.float32
    assert torch.allclose(keys.norm(dim=1), torch.ones(4), atol=1e-6)


def test_the_documented_number_of_parameters():
    retriever, guide = Retriever(1, (32, 32, 32)), GuideEncoder(4, (32, 32, 32))
    assert 0.70e6 < sum(p.numel() for p in retriever.parameters()) < 0.78e6
    assert 0.68e6 < sum(p.numel() for p in guide.parameters()) < 0.76e6


def test_embeddings_tell_bright_from_dark():
    # an instance norm right before the mean would remove exactly this
    torch.manual_seed(0)
    retriever, noise = Retriever(1, (8, 8, 8)), torch.randn(1, 1, 8, 8, 8)
    keys = retriever(torch.cat((noise, noise * 5 + 3, noise + 0.01)))
    assert keys[0] @ keys[2] > keys[0] @ keys[1]


def test_under_autocast_embeddings_are_fp32_and_close():
    torch.manual_seed(0)
    retriever, patches = Retriever(1, (8, 8, 8)), torch.randn(3, 1, 8, 8, 8)
    exact = retriever(patches)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = retriever(patches)
    assert rounded.dtype == torch.float32
    assert (exact * rounded).sum(1).min() > 0.999
    assert torch.allclose(rounded.norm(dim=1), torch.ones(3), atol=1e-6)


def test_guide_features_are_a_quarter_and_an_eighth():
    fine, coarse = GuideEncoder(4, (32, 32, 32), [4, 4, 6, 8])(
        torch.zeros(2, 1, 32, 32, 32), torch.zeros(2, 3, 32, 32, 32)
    )
    assert fine.shape == (2, 6, 8, 8, 8) and coarse.shape == (2, 8, 4, 4, 4)
