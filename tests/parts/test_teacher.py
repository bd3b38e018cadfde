"""The teacher: its schedule, its average, and that nothing else ever changes it."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn

from nnunetv2_ext.parts.ramps import momentum, released_momentum
from nnunetv2_ext.parts.teacher import EMATeacher

T = 250_000


class Decoder(nn.Module):
    """Two resolutions behind nnU-Net's switch."""

    def __init__(self) -> None:
        super().__init__()
        self.deep_supervision = True
        self.top = nn.Conv2d(4, 3, 1)
        self.low = nn.Conv2d(4, 3, 1)

    def forward(self, x):
        if not self.deep_supervision:
            return self.top(x)
        return [self.top(x), self.low(x[..., ::2, ::2])]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))
        self.decoder = Decoder()

    def forward(self, x):
        return self.decoder(self.encoder(x))


@pytest.fixture
def student():
    torch.manual_seed(0)
    return Net()


def perturb(module: nn.Module, seed: int = 1) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.is_floating_point():
                tensor += torch.rand(tensor.shape, generator=draw)
            else:
                tensor += 1


def equal(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return list(first) == list(second) and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize(
    ("step", "value", "tolerance"),
    [(0, 0.0, 0), (1, 0.5, 0), (10, 0.909, 5e-4), (249, 0.996, 1e-9), (T // 2, 0.998, 1e-12), (T - 1, 1 - 1 / T, 0)],
)
def test_momentum_takes_the_printed_values(step, value, tolerance):
    assert momentum(step, T) == pytest.approx(value, abs=tolerance, rel=0)


@pytest.mark.parametrize("total", [1, 100, 1200, T])
def test_momentum_rises_and_stays_below_a_plain_average_and_below_the_cosine(total):
    steps = sorted({*range(min(total, 300)), *range(0, total, max(1, total // 300)), total - 1})
    values = [momentum(t, total) for t in steps]
    assert values == sorted(values)
    for t, m in zip(steps, values):
        cosine = 1 - 0.004 * (math.cos(math.pi * t / total) + 1) / 2
        assert 0 <= m <= 1 - 1 / (t + 1)
        assert m <= cosine + 1e-15
        assert m == pytest.approx(min(cosine, t / (t + 1)), abs=1e-12)


def test_momentum_stays_at_its_end_after_the_last_step():
    assert momentum(10 * T, T, base=0.5, final=0.9) == pytest.approx(0.9)
    assert momentum(3 * T, T) > momentum(T, T) - 1e-12


def test_constant_and_zero_momentum():
    assert momentum(10_000, T, base=0.9, final=0.9) == pytest.approx(0.9)
    assert momentum(10_000, T, base=0.0, final=0.0) == 0.0


def test_released_momentum_never_leaves_the_start_of_its_schedule():
    assert released_momentum(0) == 0
    assert released_momentum(249) == pytest.approx(0.0496, abs=5e-5)
    assert released_momentum(4999) == released_momentum(6000) == pytest.approx(0.996)


def test_400_updates_equal_a_hand_written_loop():
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    teacher = EMATeacher(student)
    expected = [p.detach().double().clone() for p in student.parameters()]
    draw = torch.Generator().manual_seed(1)
    for t in range(400):
        m = min(1 - 0.004 * (1 + math.cos(math.pi * t / 400)) / 2, 1 - 1 / (t + 1))
        with torch.no_grad():
            for p in student.parameters():
                p += 0.1 * torch.randn(p.shape, generator=draw)
        for e, p in zip(expected, student.parameters()):
            for i, value in enumerate(p.detach().flatten().tolist()):
                e.view(-1)[i] = m * e.view(-1)[i] + (1 - m) * value
        teacher.update(student, momentum(t, 400))
    for e, p in zip(expected, teacher.module.parameters()):
        assert (e - p).abs().max() < 1e-6


def test_the_first_updates_are_a_plain_average_of_the_students_seen():
    student = nn.Linear(1, 1, bias=False)
    teacher = EMATeacher(student)
    for t, value in enumerate([3.0, 5.0, 10.0]):
        nn.init.constant_(student.weight, value)
        teacher.update(student, momentum(t, T))
    assert teacher.module.weight.item() == pytest.approx(6.0)


def test_half_precision_student_still_moves_an_fp32_teacher():
    student = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    nn.init.constant_(student.weight, 1.0)
    teacher = EMATeacher(student)
    assert teacher.module.weight.dtype == torch.float32
    nn.init.constant_(student.weight, 1.125)
    for _ in range(2000):
        teacher.update(student, 0.998)
    assert teacher.module.weight.item() == pytest.approx(1.125 - 0.125 * 0.998**2000, abs=1e-4)


def test_momentum_zero_copies_and_one_keeps(student):
    teacher = EMATeacher(student)
    start = copy.deepcopy(teacher.module)
    perturb(student)
    teacher.update(student, 1.0)
    for a, b in zip(teacher.module.parameters(), start.parameters()):
        assert torch.equal(a, b)
    teacher.update(student, 0.0)
    assert equal(teacher.module, student)


def test_batchnorm_buffers_equal_the_students_after_an_update(student):
    teacher = EMATeacher(student)
    student.train()
    student(torch.randn(4, 1, 8, 8))
    assert not torch.equal(teacher.module.encoder[1].running_mean, student.encoder[1].running_mean)
    teacher.update(student, 0.9)
    for (name, a), (_, b) in zip(teacher.module.named_buffers(), student.named_buffers(), strict=True):
        assert torch.equal(a, b) and a.data_ptr() != b.data_ptr(), name
    assert teacher.module.encoder[1].num_batches_tracked == 1


def test_teacher_has_no_gradient_and_changes_only_in_the_update(student):
    student(torch.randn(2, 1, 8, 8))[0].sum().backward()
    teacher = EMATeacher(student)
    assert all(not p.requires_grad and p.grad is None for p in teacher.module.parameters())
    assert all(p.grad is not None for n, p in student.named_parameters() if "low" not in n), "student keeps its own"
    start = copy.deepcopy(teacher.module)
    optimiser = torch.optim.SGD(student.parameters(), 0.1)
    x = torch.randn(2, 1, 8, 8)
    (student(x)[0] - teacher(x)).square().mean().backward()
    optimiser.step()
    assert equal(teacher.module, start)
    assert all(p.grad is None for p in teacher.module.parameters())
    teacher.update(student, 0.5)
    assert not equal(teacher.module, start)


def test_training_the_student_leaves_the_teacher_in_eval_and_its_targets_without_dropout(student):
    teacher = EMATeacher(student.train())
    student.train()
    assert not any(m.training for m in teacher.module.modules()) and student.training
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(teacher(x), teacher(x))
    assert teacher.module.encoder[1].num_batches_tracked == 0


def test_teacher_is_registered_nowhere(student):
    student.teacher = EMATeacher(student)
    assert len(list(student.modules())) == len(list(Net().modules()))
    assert list(student.state_dict()) == list(Net().state_dict())


def test_deep_supervision_is_off_in_the_teacher_only(student):
    teacher = EMATeacher(student)
    assert student.decoder.deep_supervision and not teacher.module.decoder.deep_supervision
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(teacher(x), student.eval()(x)[0])


def test_nnunets_own_network_with_its_shared_encoder():
    torch.manual_seed(0)
    student = PlainConvUNet(
        1, 2, [4, 8], nn.Conv3d, 3, [1, 2], 1, 3, 1, norm_op=nn.InstanceNorm3d, nonlin=nn.ReLU, deep_supervision=True
    )
    teacher = EMATeacher(student)
    perturb(student)
    teacher.update(student, 0.0)
    x = torch.randn(2, 1, 8, 8, 8)
    assert equal(teacher.module, student)
    assert torch.equal(teacher(x), student.eval()(x)[0]) and teacher(x).shape == (2, 3, 8, 8, 8)


@pytest.mark.parametrize("container", [list, tuple])
def test_a_network_without_the_switch_gives_its_first_resolution(container):
    class Multi(nn.Module):
        def forward(self, x):
            return container([x, x[..., ::2]])

    assert EMATeacher(Multi())(torch.ones(3, 1, 8, 8)).shape == (3, 1, 8, 8)


def test_a_network_without_deep_supervision_gives_all_samples():
    x = torch.randn(4, 1, 8, 8)
    assert EMATeacher(nn.Conv2d(1, 3, 1))(x).shape == (4, 3, 8, 8)


def test_targets_can_be_used_in_a_differentiable_loss(student):
    teacher = EMATeacher(student)
    x = torch.randn(2, 1, 8, 8)
    target = teacher(x)
    assert not target.requires_grad and not target.is_inference()
    nn.functional.mse_loss(student(x)[0], target).backward()


def test_copy_from_follows_weights_loaded_later(student):
    teacher = EMATeacher(student)
    perturb(student)
    assert not equal(teacher.module, student)
    teacher.copy_from(student)
    assert equal(teacher.module, student)
    perturb(student, 2)
    assert not equal(teacher.module, student), "the copy must not share memory"


def test_copy_from_lists_replaced_parameters_anew(student):
    teacher = EMATeacher(student)
    teacher.update(student, 0.5)
    student.load_state_dict({k: v + 1 for k, v in student.state_dict().items()}, assign=True)
    teacher.copy_from(student)
    assert equal(teacher.module, student)
    perturb(student)
    teacher.update(student, 0.0)
    assert equal(teacher.module, student)


def test_another_student_object_is_noticed(student):
    teacher = EMATeacher(student)
    teacher.update(student, 0.5)
    other = copy.deepcopy(student)
    perturb(other)
    teacher.update(other, 0.0)
    assert equal(teacher.module, other)


def change_shape(net):
    net.decoder.top = nn.Conv2d(4, 5, 1)


def add_parameter(net):
    net.extra = nn.Linear(1, 1)


def drop_buffers(net):
    net.encoder[1] = nn.BatchNorm2d(4, track_running_stats=False)


def reorder(net):
    net.encoder, encoder = None, net.encoder
    del net.encoder
    net.encoder = encoder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_shape, "decoder.top.weight"),
        (add_parameter, "extra.weight"),
        (drop_buffers, "running_mean"),
        (reorder, "parameter"),
    ],
)
def test_another_architecture_is_refused_before_anything_changes(student, change, message):
    teacher = EMATeacher(student)
    start = copy.deepcopy(teacher.module)
    perturb(student)
    change(student)
    with pytest.raises(ValueError, match=message):
        teacher.update(student, 0.5)
    with pytest.raises(ValueError, match=message):
        teacher.copy_from(student)
    assert equal(teacher.module, start)


@pytest.mark.parametrize("m", [-0.1, 1.1, float("nan")])
def test_a_momentum_outside_0_to_1_is_refused(student, m):
    with pytest.raises(ValueError, match="between 0 and 1"):
        EMATeacher(student).update(student, m)


def test_wrapped_networks_are_refused_by_name(student):
    with pytest.raises(ValueError, match="_orig_mod"):
        EMATeacher(torch.compile(student))
    with pytest.raises(ValueError, match="DataParallel"):
        EMATeacher(nn.DataParallel(student))
    with pytest.raises(ValueError, match="unwrapped"):
        EMATeacher(student).update(nn.DataParallel(student), 0.5)


def test_state_round_trip_and_keys(student):
    teacher = EMATeacher(student)
    perturb(student)
    teacher.update(student, 0.3)
    state = copy.deepcopy(teacher.state_dict())
    assert list(state) == list(student.state_dict())
    fresh = EMATeacher(student)
    fresh.update(student, 0.7)
    fresh.load_state_dict(state)
    assert equal(fresh.module, teacher.module)
    perturb(student, 3)
    for each in (fresh, teacher):  # a loaded teacher goes on as the saved one
        each.update(student, 0.6)
    assert equal(fresh.module, teacher.module)


def test_a_state_of_another_architecture_is_refused_in_one_line(student):
    with pytest.raises(ValueError, match="does not fit this network") as caught:
        EMATeacher(student).load_state_dict(nn.Linear(1, 1).state_dict())
    assert "\n" not in str(caught.value)


def test_compiling_keeps_the_keys_and_the_prediction(student):
    teacher = EMATeacher(student)
    x = torch.randn(2, 1, 8, 8)
    plain = teacher(x)
    teacher.module.compile(backend="eager")
    assert torch.allclose(teacher(x), plain) and list(teacher.state_dict()) == list(student.state_dict())
    perturb(student)
    teacher.update(student, 0.0)
    assert torch.allclose(teacher(x), student.eval()(x)[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_updating_never_waits_for_the_gpu(student):
    student.cuda()
    teacher = EMATeacher(student)
    torch.cuda.set_sync_debug_mode("error")
    try:
        teacher.update(student, 0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
