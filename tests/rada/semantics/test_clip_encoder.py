"""The four-channel image encoder against open_clip's own and against Alpha-CLIP's stem written out."""

from __future__ import annotations

import open_clip
import pytest
import torch
import torch.nn.functional as F

from nnunetv2_ext.rada.semantics.clip_encoder import RegionEncoder, load_encoder
from nnunetv2_ext.rada.semantics.clip_model import ClipSource, load_clip

quiet = {"log": lambda _: None}


@pytest.fixture(scope="module")
def encoder(tiny_clip):
    return load_encoder(ClipSource(tiny_clip.name, str(tiny_clip.weights)), **quiet)


@pytest.fixture(scope="module")
def alpha_encoder(tiny_clip):
    return load_encoder(ClipSource(tiny_clip.name, str(tiny_clip.weights), str(tiny_clip.alpha_weights)), **quiet)


@pytest.fixture
def pictures():
    generator = torch.Generator().manual_seed(3)
    return torch.rand(5, 3, 32, 32, generator=generator), (torch.rand(5, 1, 32, 32, generator=generator) > 0.5).float()


def open_clips_own(tiny_clip, images):
    """open_clip's model and preparation, untouched."""
    model = open_clip.create_model(tiny_clip.local_dir, require_pretrained=True).eval()
    _, preprocess = None, open_clip.image_transform(32, is_train=False)
    normalise = preprocess.transforms[-1]
    with torch.no_grad():
        return model.encode_image(normalise(images), normalize=True)


def test_without_alpha_weights_it_is_open_clip_for_any_mask(tiny_clip, encoder, pictures):
    images, masks = pictures
    expected = open_clips_own(tiny_clip, images)
    for mask in (masks, torch.ones_like(masks), torch.zeros_like(masks), torch.rand_like(masks)):
        torch.testing.assert_close(encoder.encode_images(images, mask), expected, atol=1e-5, rtol=0)


def test_alpha_stem_is_the_sum_of_two_convolutions(tiny_clip, alpha_encoder, pictures):
    """Alpha-CLIP written out: its own convolution of the normalised mask is added before anything else."""
    images, masks = pictures
    released = torch.load(tiny_clip.alpha_weights, weights_only=True)
    model, _ = load_clip(ClipSource(tiny_clip.name, str(tiny_clip.weights)), **quiet)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
    extra = F.conv2d((masks - 0.5) / 0.26, released["module.conv1_alpha.weight"], stride=8)
    handle = model.visual.conv1.register_forward_hook(lambda module, inputs, output: output + extra)
    with torch.no_grad():
        expected = F.normalize(model.visual((images - mean) / std), dim=1)
    handle.remove()
    torch.testing.assert_close(alpha_encoder.encode_images(images, masks), expected, atol=1e-5, rtol=0)
    assert (alpha_encoder.encode_images(images, 1 - masks) - expected).abs().max() > 1e-3, "masks are seen"


def test_all_visual_weights_come_from_the_alpha_file(tiny_clip, tmp_path):
    """Round trip of the key map: every tensor arrives, under its own name."""
    released = {name: torch.randn_like(t) for name, t in torch.load(tiny_clip.alpha_weights, weights_only=True).items()}
    torch.save(released, tmp_path / "alpha.pth")
    source = ClipSource(tiny_clip.name, str(tiny_clip.weights), str(tmp_path / "alpha.pth"))
    encoder = load_encoder(source, **quiet)
    found = encoder._visual.state_dict()
    for name, tensor in released.items():
        name = name.removeprefix("module.").replace("in_proj.", "in_proj_")
        if name == "conv1_alpha.weight":
            assert torch.equal(found["conv1.weight"][:, 3:], tensor)
        elif name == "conv1.weight":
            assert torch.equal(found["conv1.weight"][:, :3], tensor)
        else:
            assert torch.equal(found[name], tensor), name
    assert len(found) == len(released) - 1
    for name, tensor in encoder._model.state_dict().items():
        if not name.startswith("visual."):
            assert torch.equal(tensor, tiny_clip.state[name]), "the text encoder stays CLIP's"


def test_vectors_are_unit_fp32_and_without_gradient(alpha_encoder, pictures):
    for vectors in (
        alpha_encoder.encode_images(*pictures),
        alpha_encoder.encode_pooled(*pictures),
        alpha_encoder.encode_text(["a liver", "a spleen"]),
    ):
        assert vectors.dtype == torch.float32 and vectors.shape[1] == alpha_encoder.dim == 16
        assert not vectors.requires_grad
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(vectors)))


def test_text_is_open_clips(tiny_clip, alpha_encoder):
    model = open_clip.create_model(tiny_clip.local_dir, require_pretrained=True).eval()
    tokens = open_clip.get_tokenizer(tiny_clip.local_dir)(["a CT slice showing the liver", "a dog"])
    with torch.no_grad():
        expected = model.encode_text(tokens, normalize=True)
    found = alpha_encoder.encode_text(["a CT slice showing the liver", "a dog"])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_pooled_tokens_against_a_loop(encoder, pictures):
    images, masks = pictures
    masks = torch.zeros_like(masks)
    masks[:, :, 3:17, 10:30] = 1
    visual = encoder._visual
    x = visual._embeds(encoder._stack(images, torch.ones_like(masks)))
    tokens = visual.ln_post(visual.transformer(x))[:, 1:].detach()  # (n, 16, width), patches of 8 in rows
    for number in range(len(images)):
        total, weight = torch.zeros(32), 0.0
        for patch in range(16):
            row, column = divmod(patch, 4)
            share = masks[number, 0, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].mean()
            total, weight = total + share * tokens[number, patch], weight + share
        expected = F.normalize((total / weight) @ visual.proj, dim=0)
        found = encoder.encode_pooled(images, masks)[number]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_pooling_needs_a_mask(encoder, pictures):
    with pytest.raises(ValueError, match="empty mask"):
        encoder.encode_pooled(pictures[0], torch.zeros(5, 1, 32, 32))


def test_loading_leaves_the_random_stream_as_it_was(tiny_clip):
    before = torch.get_rng_state()
    load_encoder(ClipSource(tiny_clip.name, str(tiny_clip.weights), str(tiny_clip.alpha_weights)), **quiet)
    assert torch.equal(torch.get_rng_state(), before)


def test_notices_are_printed(tiny_clip, said):
    lines, log = said
    load_encoder(ClipSource(tiny_clip.name, str(tiny_clip.weights), str(tiny_clip.alpha_weights)), log=log)
    assert any("research only" in line and "CC BY-NC" in line for line in lines)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("module.conv1_alpha.weight"), "no Alpha-CLIP weights: conv1_alpha.weight not found"),
        (lambda state: state.update({"module.proj": torch.zeros(32, 24)}), "size mismatch for proj"),
        (
            lambda state: state.update({"module.conv1_alpha.weight": torch.zeros(32, 1, 3, 3)}),
            "conv1_alpha.weight is 32x1x3x3 beside conv1.weight of 32x3x8x8",
        ),
        (lambda state: state.pop("module.proj"), 'Missing key.* "proj"'),
        (lambda state: state.update({"module.lora": torch.zeros(1)}), 'Unexpected key.* "lora"'),
    ],
)
def test_alpha_file_that_does_not_fit(tiny_clip, tmp_path, change, words):
    released = torch.load(tiny_clip.alpha_weights, weights_only=True)
    change(released)
    torch.save(released, tmp_path / "alpha.pth")
    source = ClipSource(tiny_clip.name, str(tiny_clip.weights), str(tmp_path / "alpha.pth"))
    with pytest.raises(ValueError, match=words) as error:
        load_encoder(source, **quiet)
    assert str(error.value).startswith("rada.alpha_weights: ") and "alpha.pth" in str(error.value)


@pytest.mark.parametrize("content", [b"<!DOCTYPE html><html><body>Quota exceeded</body></html>", b"", b"PK\x03\x04"])
def test_damaged_alpha_file(tiny_clip, tmp_path, content):
    (tmp_path / "alpha.pth").write_bytes(content)
    source = ClipSource(tiny_clip.name, str(tiny_clip.weights), str(tmp_path / "alpha.pth"))
    with pytest.raises(ValueError, match=r"rada.alpha_weights: .*alpha.pth cannot be read as weights") as error:
        load_encoder(source, **quiet)
    assert "\n" not in str(error.value) and "rada.semantics=learned" in str(error.value)


@pytest.mark.parametrize("content", [[1, 2], {}, {"state_dict": {"conv1.weight": 3}}, torch.ones(2)])
def test_file_that_is_not_alpha_clips(tiny_clip, tmp_path, content):
    torch.save(content, tmp_path / "alpha.pth")
    source = ClipSource(tiny_clip.name, str(tiny_clip.weights), str(tmp_path / "alpha.pth"))
    with pytest.raises(ValueError, match=r"no Alpha-CLIP weights: conv1\.weight and"):
        load_encoder(source, **quiet)


def test_missing_alpha_file(tiny_clip, tmp_path):
    source = ClipSource(tiny_clip.name, str(tiny_clip.weights), str(tmp_path / "none.pth"))
    with pytest.raises(ValueError, match=r"rada.alpha_weights: there is no file .*none.pth"):
        load_encoder(source, **quiet)


def test_image_encoder_without_a_patch_embedding_of_its_own_reads_images_only(tiny_clip, pictures):
    """timm's encoders (BiomedCLIP) have no conv1: masks are ignored, pooling and Alpha-CLIP are refused."""
    model, tokenizer = load_clip(ClipSource(tiny_clip.name, str(tiny_clip.weights)), **quiet)
    inner = model.visual

    class Other(torch.nn.Module):
        image_size, preprocess_cfg = inner.image_size, inner.preprocess_cfg

        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            assert x.shape[1] == 3
            return self.inner(x)

    model.visual = Other()
    encoder = RegionEncoder(model, tokenizer)
    images, masks = pictures
    torch.testing.assert_close(
        encoder.encode_images(images, masks), open_clips_own(tiny_clip, images), atol=1e-5, rtol=0
    )
    with pytest.raises(ValueError, match=r"rada\.region=pool"):
        encoder.encode_pooled(images, masks)
    with pytest.raises(ValueError, match=r"rada\.alpha_weights"):
        encoder.load_alpha(str(tiny_clip.alpha_weights), "Other")
