"""GIN against a slow reference, and its place in nnU-Net's pipeline."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunetv2_ext.parts import random_convolution as module
from nnunetv2_ext.parts.random_convolution import RandomConvolution, convolve_volume, random_convolution


def slow(x: torch.Tensor, layers: int, hidden: int, seed: int) -> torch.Tensor:
    """The same draws, voxel by voxel, two spatial axes."""
    generator = torch.Generator().manual_seed(seed)
    widths = [len(x), *[hidden] * (layers - 1), len(x)]
    y = x
    for layer in range(layers):
        size = (1, 3)[int(torch.randint(2, (1,), generator=generator))]
        weight = torch.randn(widths[layer + 1], widths[layer], size, size, generator=generator)
        bias = torch.randn(widths[layer + 1], generator=generator)
        out = torch.zeros(widths[layer + 1], *x.shape[1:])
        half = size // 2
        for o in range(widths[layer + 1]):
            for a in range(x.shape[1]):
                for b in range(x.shape[2]):
                    total = bias[o].clone()
                    for i in range(widths[layer]):
                        for da in range(size):
                            for db in range(size):
                                row, column = a + da - half, b + db - half
                                if 0 <= row < x.shape[1] and 0 <= column < x.shape[2]:
                                    total += weight[o, i, da, db] * y[i, row, column]
                    out[o, a, b] = total
        y = torch.where(out > 0, out, 0.01 * out) if layer + 1 < layers else out
    alpha = torch.rand(1, generator=generator)
    mixed = alpha * y + (1 - alpha) * x
    return mixed * x.norm() / (mixed.norm() + 1e-5)


@pytest.mark.parametrize(("channels", "layers", "hidden"), [(1, 4, 2), (3, 4, 2), (2, 1, 2), (2, 2, 3)])
def test_it_is_the_slow_reference(channels: int, layers: int, hidden: int) -> None:
    x = torch.randn(channels, 5, 4, generator=torch.Generator().manual_seed(3))
    for seed in range(4):
        found = random_convolution(x, layers, hidden, torch.Generator().manual_seed(seed))
        assert torch.allclose(found, slow(x, layers, hidden, seed), atol=1e-4)


@pytest.mark.parametrize("chunk", [7, 100, 1 << 17])
@pytest.mark.parametrize(("shape", "outputs"), [((1, 6, 5, 4), 2), ((2, 1, 7, 8), 2), ((3, 5, 2, 3), 1)])
def test_the_fast_convolution_of_volumes_is_torchs(shape: Any, outputs: int, chunk: int, monkeypatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", chunk)
    torch.manual_seed(0)
    x, weight, bias = torch.randn(shape), torch.randn(outputs, shape[0], 3, 3, 3), torch.randn(outputs)
    expected = torch.nn.functional.conv3d(x[None], weight, bias, padding=1)[0]
    assert torch.allclose(convolve_volume(x, weight, bias), expected, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3),
    st.sampled_from([(8, 9), (1, 6), (4, 5, 6), (1, 7, 8)]),
    st.floats(1e-3, 1e3),
    st.integers(0, 2**31 - 1),
)
def test_the_norm_is_kept_and_nothing_is_lost(channels: int, shape: tuple[int, ...], scale: float, seed: int) -> None:
    x = scale * torch.randn(channels, *shape, generator=torch.Generator().manual_seed(seed))
    y = random_convolution(x, generator=torch.Generator().manual_seed(seed))
    assert y.shape == x.shape and bool(torch.isfinite(y).all())
    assert float(y.norm()) == pytest.approx(float(x.norm()), rel=1e-2 if scale < 0.1 else 1e-3)


def test_no_share_is_the_identity_and_a_blank_image_stays_blank() -> None:
    x = torch.randn(2, 6, 6)
    assert torch.allclose(random_convolution(x, alpha=0.0), x, atol=1e-4)
    assert not torch.allclose(random_convolution(x, alpha=1.0), x, atol=1e-1)
    assert torch.equal(random_convolution(torch.zeros(1, 4, 4)), torch.zeros(1, 4, 4))


@pytest.mark.parametrize("arguments", [{"layers": 0}, {"hidden": 0}, {"x": torch.zeros(5, 5)}])
def test_nonsense_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="random_convolution takes"):
        random_convolution(**{"x": torch.zeros(1, 5, 5), **arguments})


def transform(p: float, channels: Any = "separate") -> RandomConvolution:
    return RandomConvolution(torch.full((1,), p), channels)


def test_channels_of_their_own_never_mix() -> None:
    x = torch.randn(2, 16, 16)
    x[1] = 0  # a canary: whatever leaks into it came from the other channel
    torch.manual_seed(0)
    separate = transform(1, "separate")(image=x.clone())["image"]
    joint = transform(1, "joint")(image=x.clone())["image"]
    assert torch.equal(separate[1], x[1]) and not torch.equal(separate[0], x[0])
    assert not torch.equal(joint[1], x[1])


def test_the_probability_can_be_changed_from_outside() -> None:
    gin = transform(0.3)
    torch.manual_seed(0)
    x = torch.randn(1, 6, 6)

    def share() -> float:
        return float(np.mean([not torch.equal(gin(image=x.clone())["image"], x) for _ in range(1000)]))

    assert 0.25 < share() < 0.35
    gin.probability.fill_(0)
    assert share() == 0
    gin.probability.fill_(1)
    assert share() == 1


def test_labels_are_left_alone() -> None:
    label = torch.randint(0, 3, (1, 8, 8))
    found = transform(1)(image=torch.randn(1, 8, 8), segmentation=label.clone())
    assert torch.equal(found["segmentation"], label)


@pytest.mark.parametrize("shape", [(3, 2, 9, 8), (2, 2, 3, 6, 5)])
@pytest.mark.parametrize("channels", ["separate", "joint"])
def test_a_batch_on_the_device_is_changed_as_a_worker_changes_it(shape: tuple[int, ...], channels: Any) -> None:
    images = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    one_hot = (torch.rand(shape[0], 1, *shape[2:]) < 0.5).float()  # of a previous stage
    gin = transform(0.7, channels)
    torch.manual_seed(4)
    expected = torch.stack([gin(image=image.clone())["image"] for image in images])
    state = torch.get_rng_state()
    found = gin.of_batch(torch.cat((images, one_hot), 1), [False, False], seed=4)
    assert torch.equal(found[:, :2], expected) and torch.equal(found[:, 2:], one_hot)
    assert torch.equal(torch.get_rng_state(), state), "nnU-Net's stream is left alone"
    assert not torch.equal(expected, images)


def test_zeros_outside_of_a_mask_stay_on_the_device() -> None:
    images = torch.randn(2, 2, 8, 8)
    images[..., :3] = 0
    found = transform(1).of_batch(images, [True, False], seed=0)
    assert bool((found[:, 0, :, :3] == 0).all()) and bool((found[:, 0, :, 3:] != images[:, 0, :, 3:]).all())
    assert bool((found[:, 1, :, :3] != 0).all())


# ---- in trainers


@pytest.fixture
def build(make_trainer):
    from nnunetv2_ext.trainers.nnUNetTrainerExt import nnUNetTrainerExt

    def make(text: str, configuration: str = "2d", **options: Any) -> Any:
        trainer = make_trainer(nnUNetTrainerExt, f"seed=1 {text}", configuration=configuration, **options)
        trainer.initialize()
        return trainer

    return make


def pipeline(trainer: Any, use_mask: bool = False) -> Any:
    rotation, dummy, _, axes = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    patch = trainer.configuration_manager.patch_size
    return trainer.get_training_transforms(patch, rotation, None, axes, dummy, use_mask_for_norm=[use_mask])


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_off_is_nnunets_pipeline_and_on_changes_every_sample(build, configuration: str) -> None:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    trainers = [build(text, configuration) for text in ("gin=0", "gin=1")]
    pipes = [pipeline(trainer) for trainer in trainers]
    names = [[repr(t).partition("(")[0] for t in pipe.transforms] for pipe in pipes]
    rotation, dummy, _, axes = trainers[0].configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    patch = trainers[0].configuration_manager.patch_size
    stock = nnUNetTrainer.get_training_transforms(patch, rotation, None, axes, dummy, use_mask_for_norm=[False])
    assert names[0] == [repr(t).partition("(")[0] for t in stock.transforms]
    assert [n for n in names[1] if n != "RandomConvolution"] == names[0] and len(names[1]) == len(names[0]) + 1
    size = [n + 4 for n in patch]
    sample = {"image": torch.randn(1, *size), "segmentation": torch.ones(1, *size, dtype=torch.int16)}
    found = []
    for pipe in pipes:
        torch.manual_seed(5)
        np.random.seed(5)
        found.append(pipe(**{key: value.clone() for key, value in sample.items()}))
    assert not torch.equal(found[0]["image"], found[1]["image"])
    assert torch.equal(found[0]["segmentation"], found[1]["segmentation"])


def test_what_a_mask_blanks_stays_exactly_zero(build) -> None:
    trainer = build("gin=1")
    pipe = pipeline(trainer, use_mask=True)
    size = [n + 4 for n in trainer.configuration_manager.patch_size]
    label = torch.zeros(1, *size, dtype=torch.int16)
    label[:, : size[0] // 2] = -1
    torch.manual_seed(0)
    for _ in range(5):
        found = pipe(image=torch.randn(1, *size), segmentation=label.clone())
        image = found["image"][0]
        assert bool((image == 0).any()) and bool((image != 0).any())


def test_it_is_off_after_its_share_of_the_training(build) -> None:
    trainer = build("gin=0.5 gin_until=0.5 num_epochs=4")
    trainer.on_train_start()
    shared = trainer._gin.probability
    found = []
    for epoch in range(4):
        trainer.current_epoch = epoch
        trainer.on_train_epoch_start()
        found.append(float(shared))
    assert found == [0.5, 0.5, 0, 0]


@pytest.mark.parametrize("stream", [False, True])
def test_on_the_device_the_pipeline_is_nnunets_and_the_step_changes_every_stream(build, stream: bool) -> None:
    trainer = build("gin=1 gin_on=device gin_until=0.5 num_epochs=2")
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    names = [repr(t).partition("(")[0] for t in pipeline(trainer).transforms]
    assert "RandomConvolution" not in names and "SpatialTransform" in names
    batch = next(trainer.dataloader_train)
    if stream:
        batch["unlabelled"] = {"data": batch["data"].clone(), "keys": batch["keys"]}
    state = trainer.generator.get_state()
    first = trainer.on_device(batch)
    changed = [not torch.equal(a, b) for a, b in zip(first.data, batch["data"])]
    assert all(changed) and torch.equal(first.top_target, batch["target"][0])
    if stream:
        other = first.stream("unlabelled").data
        assert not torch.equal(other, batch["data"]) and not torch.equal(other, first.data)
    trainer.generator.set_state(state)  # as --c does
    assert torch.equal(trainer.on_device(batch).data, first.data)
    trainer.current_epoch = 1
    trainer.on_train_epoch_start()
    assert torch.equal(trainer.on_device(batch).data, batch["data"])


def test_ct_is_warned_of_by_name(build, tiny) -> None:
    from pathlib import Path

    plans = tiny.plans()
    plans["configurations"]["2d"]["normalization_schemes"] = ["CTNormalization"]
    trainer = build("gin=0.5", plans=plans)
    trainer.on_train_start()
    log = next(Path(trainer.output_folder).glob("training_log*.txt")).read_text()
    channel = next(iter(trainer.dataset_json["channel_names"].values()))
    assert f"gin changes the intensities of {channel}" in log


def test_workers_of_their_own_see_the_switch_and_draw_differently(build, monkeypatch) -> None:
    trainer = build("gin=1 num_epochs=1")
    monkeypatch.setenv("nnUNet_n_proc_DA", "2")
    trainer.on_train_start()
    try:
        batches = [next(trainer.dataloader_train)["data"] for _ in range(4)]
        assert not torch.equal(batches[0], batches[1])
    finally:
        trainer.dataloader_train._finish()
        trainer.dataloader_val._finish()
