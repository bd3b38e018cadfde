"""The consistency between teacher and student: hand-computed values, invariances, gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nnunetv2_ext.parts import consistency
from nnunetv2_ext.parts.consistency import consistency_loss, disagreement, valid_mask
from nnunetv2_ext.parts.masking import apply_mask, block_mask
from nnunetv2_ext.parts.ramps import gaussian_ramp, momentum, ramp
from nnunetv2_ext.parts.teacher import EMATeacher

KINDS = ["prob_mse", "kl", "relative_logits", "logits_over_norm"]
VOXEL_FREE = KINDS[:3]  # the released code's own form shrinks with the number of voxels


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these tensors are tiny: more threads only wait for each other
    yield
    torch.set_num_threads(threads)


def logits(*shape: int, seed: int = 0, scale: float = 2.0, dtype=torch.float32) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=draw, dtype=torch.float64)).to(dtype)


def some_valid(batch: int, *shape: int, seed: int = 9) -> torch.Tensor:
    return torch.rand(batch, 1, *shape, generator=torch.Generator().manual_seed(seed)) < 0.6


def one_hot(labels: list[int], classes: int) -> torch.Tensor:
    """Logits `(1, C, 1, n)` whose softmax is one-hot to within e^-50."""
    z = torch.zeros(1, classes, 1, len(labels))
    for i, label in enumerate(labels):
        z[0, label, 0, i] = 50.0
    return z


def probabilities(z: list[float], regions: bool) -> list[float]:
    if regions:
        return [1 / (1 + math.exp(-v)) for v in z]
    total = sum(math.exp(v) for v in z)
    return [math.exp(v) / total for v in z]


def slow(teacher, student, valid, kind, regions) -> float:
    """The formulas of the design, voxel by voxel in Python floats."""
    batch, channels = teacher.shape[:2]
    t, s = (z.double().flatten(2) for z in (teacher, student))
    v = torch.ones(batch, t.shape[2]) if valid is None else valid.flatten(1)
    total, count, ratios, squares, norm = 0.0, 0, [], 0.0, 0.0
    for b in range(batch):
        apart, size, seen = 0.0, 0.0, 0
        for x in range(t.shape[2]):
            if not v[b, x]:
                continue
            seen += 1
            z_t, z_s = t[b, :, x].tolist(), s[b, :, x].tolist()
            p_t, p_s = probabilities(z_t, regions), probabilities(z_s, regions)
            if kind == "prob_mse":
                total += sum((p - q) ** 2 for p, q in zip(p_t, p_s))
            elif kind == "kl":
                total += sum(p * (math.log(p) - math.log(q)) for p, q in zip(p_t, p_s))
                if regions:
                    total += sum((1 - p) * (math.log(1 - p) - math.log(1 - q)) for p, q in zip(p_t, p_s))
            apart += sum((p - q) ** 2 for p, q in zip(z_t, z_s))
            size += sum(p**2 for p in z_t)
        count += seen
        squares, norm = squares + apart, norm + size
        if seen:
            ratios.append(apart / max(size, 1e-6))
    if kind == "relative_logits":
        return sum(ratios) / len(ratios) if ratios else 0.0
    if kind == "logits_over_norm":
        return squares / (max(1, count) * channels) / max(math.sqrt(norm), 1e-6)
    return total / max(1, count)


@settings(max_examples=120, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    regions=st.booleans(),
    masked=st.booleans(),
    batch=st.integers(1, 3),
    channels=st.integers(1, 4),
    shape=st.lists(st.integers(1, 3), min_size=2, max_size=3),
    seed=st.integers(0, 10_000),
)
def test_value_equals_the_slow_reference(kind, regions, masked, batch, channels, shape, seed):
    t, s = logits(batch, channels, *shape, seed=seed), logits(batch, channels, *shape, seed=seed + 1)
    v = some_valid(batch, *shape, seed=seed) if masked else None
    loss = consistency_loss(t, s, v, kind, regions)
    assert loss.ndim == 0 and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(slow(t, s, v, kind, regions), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("regions", [False, True])
def test_equal_logits_give_exactly_zero_with_zero_gradient(kind, regions):
    z = logits(2, 3, 4, 4)
    s = z.clone().requires_grad_()
    loss = consistency_loss(z, s, None, kind, regions)
    loss.backward()
    assert loss.item() == 0.0
    assert s.grad.abs().max() == 0.0


@pytest.mark.parametrize("classes", [2, 3, 14])
def test_uniform_against_one_hot_gives_one_minus_one_over_c(classes):
    uniform, certain = torch.zeros(1, classes, 1, 4), one_hot([0, 1, 0, 1], classes)
    for pair in ((uniform, certain), (certain, uniform)):
        assert consistency_loss(*pair, None, "prob_mse").item() == pytest.approx(1 - 1 / classes, abs=1e-6)
    assert consistency_loss(certain, uniform, None, "kl").item() == pytest.approx(math.log(classes), abs=1e-5)


def test_two_different_one_hots_give_two():
    loss = consistency_loss(one_hot([0, 1], 3), one_hot([1, 2], 3), None, "prob_mse")
    assert loss.item() == pytest.approx(2.0, abs=1e-6)


def test_regions_use_the_sigmoid_of_each_channel():
    t, s = torch.full((1, 3, 2, 2), 50.0), torch.full((1, 3, 2, 2), -50.0)
    assert consistency_loss(t, s, None, "prob_mse", regions=True).item() == pytest.approx(3.0)  # C
    assert consistency_loss(t, s, None, "prob_mse", regions=False).item() == 0.0  # softmax sees no difference
    half = torch.zeros(1, 3, 2, 2)
    assert consistency_loss(t, half, None, "prob_mse", regions=True).item() == pytest.approx(0.75)
    assert consistency_loss(t, half, None, "kl", regions=True).item() == pytest.approx(3 * math.log(2))


@pytest.mark.parametrize("kind", ["prob_mse", "kl"])
def test_adding_a_constant_to_all_logits_of_a_voxel_changes_nothing(kind):
    t, s = logits(2, 3, 4, 4), logits(2, 3, 4, 4, seed=1)
    shift = logits(2, 1, 4, 4, seed=2, scale=5)
    expected = consistency_loss(t, s, None, kind).item()
    assert consistency_loss(t, s + shift, None, kind).item() == pytest.approx(expected, rel=1e-5)
    assert consistency_loss(t - shift, s, None, kind).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("factor", [1e-2, 0.5, 40.0])
def test_scaling_both_logits_changes_nothing_for_relative_logits(factor):
    t, s = logits(2, 3, 4, 4), logits(2, 3, 4, 4, seed=1)
    expected = consistency_loss(t, s, None, "relative_logits").item()
    assert consistency_loss(factor * t, factor * s, None, "relative_logits").item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", VOXEL_FREE)
@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_tiling_the_volume_or_copying_the_samples_changes_nothing(kind, regions, masked):
    t, s = logits(2, 3, 2, 4, 4), logits(2, 3, 2, 4, 4, seed=1)
    v = some_valid(2, 2, 4, 4) if masked else None

    def value(transform):
        return consistency_loss(transform(t), transform(s), None if v is None else transform(v), kind, regions).item()

    expected = value(lambda z: z)
    assert value(lambda z: torch.cat((z, z), dim=-1)) == pytest.approx(expected, rel=1e-5)
    assert value(lambda z: torch.cat((z, z), dim=2)) == pytest.approx(expected, rel=1e-5)
    assert value(lambda z: torch.cat((z, z), dim=0)) == pytest.approx(expected, rel=1e-5)


def test_the_released_form_shrinks_with_the_volume():
    t, s = logits(1, 3, 4, 4), logits(1, 3, 4, 4, seed=1)
    small = consistency_loss(t, s, None, "logits_over_norm").item()
    tiled = consistency_loss(*(torch.cat([z] * 4, dim=-1) for z in (t, s)), None, "logits_over_norm").item()
    assert tiled == pytest.approx(small / 2, rel=1e-5)
    assert small == pytest.approx(((t - s) ** 2).mean().item() / t.norm().item(), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("regions", [False, True])
def test_all_voxels_ignored_gives_zero_with_zero_gradient(kind, regions):
    t, s = logits(2, 3, 4, 4), logits(2, 3, 4, 4, seed=1).requires_grad_()
    loss = consistency_loss(t, s, torch.zeros(2, 1, 4, 4, dtype=torch.bool), kind, regions)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(s.grad, torch.zeros_like(s))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("value", [-30.0, float("inf"), float("nan")])
def test_an_ignored_voxel_matters_only_without_the_mask(kind, regions, value):
    t, s = logits(2, 3, 4, 4), logits(2, 3, 4, 4, seed=1)
    v = some_valid(2, 4, 4)
    b, _, x, y = (~v).nonzero()[0].tolist()

    def run(t, s, mask):
        s = s.clone().requires_grad_()
        loss = consistency_loss(t, s, mask, kind, regions)
        loss.backward()
        return loss.detach(), s.grad

    flipped_t, flipped_s = t.clone(), s.clone()
    flipped_s[b, :, x, y] = -s[b, :, x, y] if math.isfinite(value) else value
    flipped_t[b, 0, x, y] = value
    (loss, grad), (other, other_grad) = run(t, s, v), run(flipped_t, flipped_s, v)
    assert torch.equal(loss, other) and torch.equal(grad, other_grad)
    assert (grad[b, :, x, y] == 0).all()
    assert (grad[~(grad == 0)].numel()) > 0
    assert not torch.equal(run(t, s, None)[0], run(flipped_t, flipped_s, None)[0])  # cons_on_ignored=True


def test_relative_logits_leaves_out_samples_without_a_valid_voxel():
    t, s = logits(2, 3, 4, 4), logits(2, 3, 4, 4, seed=1)
    v = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    v[1] = False
    alone = consistency_loss(t[:1], s[:1], None, "relative_logits")
    assert consistency_loss(t, s, v, "relative_logits").item() == pytest.approx(alone.item(), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_closed_form_gradient_passes_gradcheck(kind, regions, masked):
    t = logits(2, 3, 2, 3, dtype=torch.float64)
    s = logits(2, 3, 2, 3, seed=1, dtype=torch.float64).requires_grad_()
    v = some_valid(2, 2, 3) if masked else None
    assert torch.autograd.gradcheck(lambda z: consistency_loss(t, z, v, kind, regions), (s,), eps=1e-6, atol=1e-8)


@pytest.mark.parametrize("regions", [False, True])
def test_closed_form_gradient_equals_autograds(regions):
    t, v = logits(2, 5, 3, 4, 4, dtype=torch.float64), some_valid(2, 3, 4, 4)
    ours, theirs = (logits(2, 5, 3, 4, 4, seed=1, dtype=torch.float64).requires_grad_() for _ in range(2))
    (0.3 * consistency_loss(t, ours, v, "prob_mse", regions)).backward()
    p_t, p_s = (z.sigmoid() if regions else z.softmax(1) for z in (t, theirs))
    (0.3 * ((p_t - p_s).square() * v).sum() / v.sum()).backward()
    assert (ours.grad - theirs.grad).abs().max() < 1e-16


def test_no_gradient_reaches_the_teacher():
    for kind in KINDS:
        t, s = logits(1, 3, 4, 4).requires_grad_(), logits(1, 3, 4, 4, seed=1).requires_grad_()
        consistency_loss(t, s, None, kind).backward()
        assert t.grad is None and s.grad is not None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_working_piecewise_changes_nothing(kind, regions, dtype, monkeypatch):
    t, s = logits(3, 4, 5, 4, 4), logits(3, 4, 5, 4, 4, seed=1).to(dtype)
    v = some_valid(3, 5, 4, 4)
    results = []
    for limit in (2**24, 2 * 4 * 80, 4 * 16 * 2, 1):  # everything, two samples, two slabs of a sample, one slab
        monkeypatch.setattr(consistency, "_PIECE_ELEMENTS", limit)
        z = s.clone().requires_grad_()
        loss = consistency_loss(t, z, v, kind, regions)
        loss.backward()
        results.append((loss.detach(), z.grad))
    for loss, grad in results[1:]:
        assert loss.item() == pytest.approx(results[0][0].item(), rel=1e-5)
        assert grad.dtype == dtype
        torch.testing.assert_close(grad, results[0][1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_only_one_tensor_in_the_logits_dtype_is_kept_for_the_backward_pass(kind, dtype):
    t, s = logits(2, 7, 8, 8, dtype=dtype), logits(2, 7, 8, 8, seed=1, dtype=dtype).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x), x)[1], lambda x: x):
        loss = consistency_loss(t, s, some_valid(2, 8, 8), kind)
    large = [x for x in kept if x.numel() > 2]
    assert len(large) == 1 and large[0].dtype == dtype and large[0].shape == s.shape
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("kind", ["prob_mse", "kl", "relative_logits"])
def test_half_precision_gradients_survive_the_division_by_many_voxels(kind):
    """1/N = 5e-7 rounds an fp16 gradient away; the scaler's 65536 must arrive before the rounding."""
    shape = (1, 2, 128, 128, 128)
    t, s = torch.zeros(shape, dtype=torch.float16), torch.zeros(shape, dtype=torch.float16)
    t[:, 0] = 1.0
    s[:, 1] = 1.0
    exact = consistency_gradient(t[..., :4, :4].float(), s[..., :4, :4].float(), kind) / (32 * 32)
    half = consistency_gradient(t, s, kind, scale=65536.0)[..., :4, :4].float() / 65536.0
    assert exact.abs().max() > 0
    torch.testing.assert_close(half, exact, rtol=2e-3, atol=0)


def consistency_gradient(t, s, kind, scale=1.0):
    s = s.clone().requires_grad_()
    (scale * consistency_loss(t, s, None, kind)).backward()
    return s.grad


@pytest.mark.parametrize("kind", KINDS)
def test_large_half_precision_logits_neither_overflow_nor_vanish(kind):
    """The released form became exactly 0 in fp16 once the norm of the logits passed 65504."""
    t, s = logits(2, 3, 32, 32, scale=2000), logits(2, 3, 32, 32, seed=1, scale=2000)
    t, s = t.clamp(-6e4, 6e4).half(), s.clamp(-6e4, 6e4).half().requires_grad_()
    loss = consistency_loss(t, s, None, kind)
    loss.backward()
    assert math.isfinite(loss.item()) and loss.item() > 0.1
    assert s.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_changes_nothing(kind):
    t, s = logits(2, 3, 8, 8), logits(2, 3, 8, 8, seed=1)
    plain = consistency_loss(t, s, None, kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = consistency_loss(t, s, None, kind)
        assert torch.is_autocast_enabled("cpu")
    assert inside.dtype == torch.float32 and torch.equal(plain, inside)


def test_every_device_type_gets_a_usable_context(recwarn):
    for device_type in ("cpu", "mps", "cuda", "meta"):
        with consistency._no_autocast(device_type):
            pass
    assert not [w for w in recwarn if "autocast" in str(w.message).lower() and "cuda" not in str(w.message).lower()]


def test_numeric_valid_masks_are_read_as_zero_and_one():
    t, s, v = logits(2, 3, 4, 4), logits(2, 3, 4, 4, seed=1), some_valid(2, 4, 4)
    expected = consistency_loss(t, s, v, "prob_mse")
    for dtype in (torch.float32, torch.uint8, torch.int16):
        assert torch.equal(expected, consistency_loss(t, s, v.to(dtype), "prob_mse"))


@pytest.mark.parametrize(
    ("teacher", "student", "valid", "kind", "message"),
    [
        ((1, 3, 4, 4), (1, 2, 4, 4), None, "kl", "same shape"),
        ((3, 4), (3, 4), None, "kl", "same shape"),
        ((1, 3, 4, 4), (1, 3, 4, 4), (1, 3, 4, 4), "kl", "valid mask"),
        ((1, 3, 4, 4), (1, 3, 4, 4), (1, 1, 2, 2), "kl", "valid mask"),
        ((1, 3, 4, 4), (1, 3, 4, 4), None, "mse", "unknown consistency"),
    ],
)
def test_bad_arguments_are_refused(teacher, student, valid, kind, message):
    mask = None if valid is None else torch.ones(valid, dtype=torch.bool)
    with pytest.raises(ValueError, match=message):
        consistency_loss(torch.zeros(teacher), torch.zeros(student), mask, kind)


@pytest.mark.parametrize(
    ("step", "value"),
    [(0, math.exp(-5)), (250, math.exp(-5 * 0.9**2)), (1250, math.exp(-1.25)), (2500, 1.0), (9999, 1.0)],
)
def test_ramp_values(step, value):
    assert ramp(step, 250_000, 0.01) == pytest.approx(value, rel=1e-12)  # T_r = 2500


@pytest.mark.parametrize(
    "schedule",
    [
        lambda: gaussian_ramp(1.1),
        lambda: gaussian_ramp(math.nan),
        lambda: ramp(-1, 100, 0.5),
        lambda: ramp(0, 0, 0.5),
        lambda: ramp(0, 100, -0.5),
        lambda: ramp(0, 100, 1.5),
        lambda: momentum(-2, 100),
        lambda: momentum(0, 0),
        lambda: momentum(5, 100, base=1.5),
        lambda: momentum(5, 100, final=-1.0),
    ],
)
def test_a_schedule_outside_its_range_is_refused(schedule):
    with pytest.raises(ValueError, match=r"must lie between 0 and 1|needs step >= 0"):
        schedule()


def test_disagreement_of_other_shapes_is_refused():
    with pytest.raises(ValueError, match="shapes differ"):
        disagreement(torch.zeros(1, 2, 4, 4), torch.zeros(3, 2, 4, 4))


def test_ramp_is_off_at_zero_and_rises_otherwise():
    assert [ramp(t, 100, 0.0) for t in (0, 50, 100)] == [1.0] * 3
    values = [ramp(t, 100, 0.5) for t in range(101)]
    assert values == sorted(values) and values[49] < 1 and set(values[50:]) == {1.0}


def test_valid_mask_of_classes_with_and_without_ignore_label():
    target = torch.tensor([[[[0, 1, 3], [3, 2, 0]]]], dtype=torch.int16)
    expected = torch.tensor([[[[True, True, False], [False, True, True]]]])
    assert torch.equal(valid_mask(target, 3, has_regions=False), expected)
    assert torch.equal(valid_mask(target.float(), 3, has_regions=False), expected)
    assert valid_mask(target, None, has_regions=False) is None


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int16, torch.float32])
def test_valid_mask_of_regions_reads_the_last_channel(dtype):
    target = torch.zeros(1, 3, 2, 2, dtype=dtype)
    target[0, 0] = 1  # a region everywhere does not matter
    target[0, 2, 0, 1] = 1
    valid = valid_mask(target, 7, has_regions=True)
    assert valid.dtype == torch.bool and valid.shape == (1, 1, 2, 2)
    assert valid.flatten().tolist() == [True, False, True, True]
    assert valid_mask(target, None, has_regions=True) is None


def test_disagreement_counts_voxels():
    t, s = one_hot([0, 1, 2, 0], 3), one_hot([0, 1, 0, 1], 3)
    assert disagreement(t, s).item() == 0.5
    assert disagreement(t, 3 * t).item() == 0.0
    region_t = torch.tensor([[[[1.0, 1.0, -1.0, -1.0]], [[1.0, 1.0, 1.0, 1.0]]]])
    region_s = torch.tensor([[[[2.0, -1.0, -3.0, 1.0]], [[0.1, -1.0, 0.1, 0.1]]]])
    share = disagreement(region_t, region_s, regions=True)
    assert share.item() == 0.5 and share.ndim == 0  # two regions differing in one voxel count once


@pytest.mark.parametrize(
    ("kind", "beta", "lowest", "highest"), [("prob_mse", 0.5, 1e-3, 1.0), ("logits_over_norm", 0.4, 0.0, 1e-3)]
)
def test_gradient_is_a_real_share_by_default_and_negligible_for_the_released_form(kind, beta, lowest, highest):
    """A small network learning to threshold a noisy image, with masks and teacher as in training.

    The released form falls with the root of the number of voxels; 64^3 is at the small end of real patches.
    """
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(1)
    net = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.LeakyReLU(), nn.Conv3d(4, 3, 3, padding=1))
    teacher = EMATeacher(net)
    optimiser = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
    image = torch.randn(2, 1, 64, 64, 64, generator=draw)
    target = (image[:, 0] > -0.4).long() + (image[:, 0] > 0.4).long()
    ratios = []
    for t in range(4):
        masked = apply_mask(image, block_mask(2, (64,) * 3, (16,) * 3, 0.4, draw))
        student = net(masked)
        supervised = nn.functional.cross_entropy(net(image), target) + nn.functional.cross_entropy(student, target)
        loss = beta * consistency_loss(teacher(image), student, None, kind)
        of_loss = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
        of_supervised = torch.autograd.grad(supervised, list(net.parameters()))
        ratios.append(math.sqrt(sum(g.square().sum() for g in of_loss) / sum(g.square().sum() for g in of_supervised)))
        for p, a, b in zip(net.parameters(), of_loss, of_supervised):
            p.grad = a + b
        optimiser.step()
        teacher.update(net, momentum(t, 1200))
    assert all(lowest < ratio < highest for ratio in ratios), ratios


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_never_waits_for_the_gpu(kind, masked):
    t = logits(2, 3, 8, 8, 8).half().cuda()
    s = logits(2, 3, 8, 8, 8, seed=1).half().cuda().requires_grad_()
    target = torch.zeros(2, 1, 8, 8, 8, dtype=torch.int16, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        valid = valid_mask(target, 3 if masked else None, has_regions=False)
        consistency_loss(t, s, valid, kind).backward()
        disagreement(t, s)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert s.grad.abs().sum().item() > 0
