"""One step as loss passes: gradients of the summed loss, memory of one pass, the order of a mixed-precision step."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nnunetv2_ext.core.step import Batch, LossPass, Term, backward_passes
from nnunetv2_ext.core.trainer import ExtTrainer

CPU = torch.device("cpu")


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 8, 3, padding=1), nn.Tanh()).double()


def forward_loss(network: nn.Module, data: Tensor) -> Callable[[], Tensor]:
    return lambda: (network(data) ** 2).mean()


def inputs(number: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 1, 12, 12, dtype=torch.float64, generator=generator) for _ in range(number)]


def gradients(network: nn.Module) -> list[Tensor]:
    return [p.grad for p in network.parameters()]


def one_term(name: str, loss: Callable[[], Tensor], weight: float = 1.0, pass_weight: float = 1.0) -> LossPass:
    return LossPass(name, lambda: {name: Term(loss(), weight)}, pass_weight)


def test_passes_accumulate_exactly_and_equal_the_summed_loss():
    data = inputs(3)
    sequential, accumulated, summed = small_network(), small_network(), small_network()
    backward_passes([one_term(f"p{i}", forward_loss(sequential, d)) for i, d in enumerate(data)], sequential, CPU, None)
    for d in data:
        forward_loss(accumulated, d)().backward()
    sum(forward_loss(summed, d)() for d in data).backward()
    for ours, plain, oracle in zip(gradients(sequential), gradients(accumulated), gradients(summed)):
        assert torch.equal(ours, plain)
        torch.testing.assert_close(ours, oracle, rtol=1e-12, atol=1e-15)


def test_weights_of_terms_and_passes_multiply():
    first, second = inputs(2)
    ours, oracle = small_network(), small_network()

    def two_terms() -> dict[str, Term]:
        output = ours(first)
        return {"square": Term((output**2).mean(), 0.5), "mean": Term(output.mean(), 3.0)}

    passes = [LossPass("two", two_terms, 2.0), one_term("last", forward_loss(ours, second), 0.25)]
    weights: dict[str, float] = {}
    values = backward_passes(passes, ours, CPU, None, weights)
    assert weights == {"square": 1.0, "mean": 6.0, "last": 0.25}
    output = oracle(first)
    (1.0 * (output**2).mean() + 6.0 * output.mean() + 0.25 * forward_loss(oracle, second)()).backward()
    for a, b in zip(gradients(ours), gradients(oracle)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
    # the values that come back are unweighted, detached and 0-dim
    assert values["square"] == (output**2).mean() and values["mean"] == output.mean()
    assert list(values) == ["square", "mean", "last"]
    assert all(v.ndim == 0 and not v.requires_grad for v in values.values())


def test_a_term_of_weight_zero_is_reported_and_costs_no_gradient():
    (data,) = inputs(1)
    ours, oracle = small_network(), small_network()
    broken = torch.tensor(float("inf"), dtype=torch.float64)

    def terms() -> dict[str, Term]:
        output = ours(data)
        return {"kept": Term((output**2).mean()), "off": Term((output * broken).mean(), 0.0)}  # 0 * inf would be NaN

    values = backward_passes([LossPass("p", terms)], ours, CPU, None)
    forward_loss(oracle, data)().backward()
    assert all(torch.equal(a, b) for a, b in zip(gradients(ours), gradients(oracle)))
    assert not torch.isfinite(values["off"])


def test_a_pass_of_weight_zero_leaves_the_others_alone_and_still_has_a_gradient_when_alone():
    first, second = inputs(2)
    ours, oracle = small_network(), small_network()
    passes = [one_term("off", forward_loss(ours, first), pass_weight=0.0), one_term("on", forward_loss(ours, second))]
    backward_passes(passes, ours, CPU, None)
    forward_loss(oracle, second)().backward()
    assert all(torch.equal(a, b) for a, b in zip(gradients(ours), gradients(oracle)))
    alone = small_network()
    backward_passes([one_term("off", forward_loss(alone, first), 0.0)], alone, CPU, None)
    assert all(g is not None and not g.any() for g in gradients(alone))  # DDP waits for every parameter


def test_a_term_without_gradient_is_only_reported():
    network = small_network()
    passes = [
        LossPass("constant", lambda: {"constant": Term(torch.tensor(3.0))}),
        one_term("on", forward_loss(network, inputs(1)[0])),
    ]
    assert backward_passes(passes, network, CPU, None)["constant"] == 3
    assert gradients(network)[0].any()


@pytest.mark.parametrize("name", ["same", "loss", "grad_norm"])
def test_a_name_is_refused_when_it_is_taken(name):
    network = small_network()
    passes = [one_term("same", forward_loss(network, d)) for d in inputs(1)]
    passes += [one_term(name, forward_loss(network, d)) for d in inputs(1)]
    with pytest.raises(ValueError, match=f"cannot be called '{name}'"):
        backward_passes(passes, network, CPU, None)


def test_no_pass_is_an_error():
    with pytest.raises(ValueError, match="at least one"):
        backward_passes([], small_network(), CPU, None)


def test_a_pass_is_computed_only_after_the_one_before_was_back_propagated():
    network, order = small_network(), []
    first = next(network.parameters())
    first.register_hook(lambda grad: order.append("backward"))

    def compute(name: str) -> dict[str, Term]:
        order.append(name)
        return {name: Term(forward_loss(network, inputs(1)[0])())}

    backward_passes([LossPass(n, lambda n=n: compute(n)) for n in ("a", "b")], network, CPU, None)
    assert order == ["a", "backward", "b", "backward"]


class Resident:
    """Bytes of saved activations that are alive, and their peak."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def pack(self, tensor: Tensor) -> Resident.Saved:
        return Resident.Saved(self, tensor)

    class Saved:
        def __init__(self, count: Resident, tensor: Tensor) -> None:
            self.count, self.tensor, self.size = count, tensor, tensor.numel() * tensor.element_size()
            count.now += self.size
            count.peak = max(count.peak, count.now)

        def __del__(self) -> None:
            self.count.now -= self.size


def peak_bytes(run: Callable[[], object]) -> int:
    resident = Resident()
    with torch.autograd.graph.saved_tensors_hooks(resident.pack, lambda saved: saved.tensor):
        run()
    return resident.peak


def test_two_passes_keep_the_activations_of_one():
    network, data = small_network(), inputs(2)
    one = peak_bytes(lambda: backward_passes([one_term("a", forward_loss(network, data[0]))], network, CPU, None))
    passes = [one_term(f"p{i}", forward_loss(network, d)) for i, d in enumerate(data)]
    two = peak_bytes(lambda: backward_passes(passes, network, CPU, None))
    together = peak_bytes(lambda: sum(forward_loss(network, d)() for d in data).backward())
    assert two == one > 0
    assert together == pytest.approx(2 * one, rel=0.05)  # the measure does see a second pass


def test_scaled_gradients_are_those_of_the_scaled_sum():
    data = inputs(2)
    ours, oracle = small_network(), small_network()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    backward_passes([one_term(f"p{i}", forward_loss(ours, d)) for i, d in enumerate(data)], ours, CPU, scaler)
    for d in data:
        (2.0**10 * forward_loss(oracle, d)()).backward()
    assert all(torch.equal(a, b) for a, b in zip(gradients(ours), gradients(oracle)))


# ---- batches


def test_a_batch_comes_from_the_loader_and_gives_samples_in_order():
    targets = [torch.arange(3).reshape(3, 1, 1, 1), torch.arange(3).reshape(3, 1, 1, 1) * 10]
    batch = Batch.from_loader(
        {"data": torch.arange(3.0)[:, None], "target": targets, "keys": np.array(list("abc"))}, CPU
    )
    assert batch.keys == ("a", "b", "c") and batch.top_target is batch.target[0]
    part = batch.select([2, 0])
    assert part.keys == ("c", "a")
    assert part.data.flatten().tolist() == [2.0, 0.0]
    assert [t.flatten().tolist() for t in part.target] == [[2, 0], [20, 0]]
    other = part.with_data(torch.zeros(2, 1))
    assert other.keys == part.keys and other.target is part.target and not other.data.any()
    assert batch.data.flatten().tolist() == [0.0, 1.0, 2.0]


def test_a_batch_without_deep_supervision_has_one_target():
    target = torch.arange(2).reshape(2, 1, 1)
    batch = Batch.from_loader({"data": torch.zeros(2, 1, 1), "target": target, "keys": ["a", "b"]}, CPU)
    assert batch.top_target is batch.target
    assert batch.select([1]).target.tolist() == [[[1]]]


# ---- the optimiser step of a trainer, in mixed precision


class TwoPasses(ExtTrainer):
    def loss_passes(self, batch: Batch) -> list[LossPass]:
        doubled = LossPass("doubled", lambda: {"doubled": Term(self.loss(self.forward(batch), batch.target), 2.0)})
        return [doubled, *super().loss_passes(batch)]

    def after_step(self) -> None:
        super().after_step()
        self.seen = [*getattr(self, "seen", []), self.global_step]


def a_batch(trainer: ExtTrainer, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    patch = trainer.configuration_manager.patch_size
    scales = trainer._get_deep_supervision_scales() or [[1] * len(patch)]
    target = [
        torch.randint(0, 3, (2, 1, *(round(p * s) for p, s in zip(patch, scale))), generator=generator).short()
        for scale in scales
    ]
    data = torch.randn(2, 1, *patch, generator=generator)
    return {
        "data": data,
        "target": target if trainer.enable_deep_supervision else target[0],
        "keys": np.array(["case_a", "case_b"]),
    }


def prepared(make_trainer, cls=TwoPasses, **options) -> ExtTrainer:
    trainer = make_trainer(cls, "seed=1", configuration="2d", **options)
    trainer.initialize()
    return trainer


def test_the_scaler_path_unscales_clips_steps_and_updates_as_nnunet_does(make_trainer):
    trainer = prepared(make_trainer)
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
    oracle = prepared(make_trainer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
    for seed in range(3):
        batch = a_batch(trainer, seed)
        figures = trainer.train_step(batch)
        oracle.optimizer.zero_grad()
        losses = []
        for weight in (2.0, 1.0):
            loss = oracle.loss(oracle.network(batch["data"]), batch["target"])
            scaler.scale(weight * loss).backward()
            losses.append(loss.detach())
        scaler.unscale_(oracle.optimizer)
        norm = nn.utils.clip_grad_norm_(oracle.network.parameters(), 12)
        scaler.step(oracle.optimizer)
        scaler.update()
        assert figures["doubled"] == losses[0] and figures["supervised"] == figures["loss"] == losses[1]
        assert figures["grad_norm"] == norm
    assert scaler.get_scale() == trainer.grad_scaler.get_scale() == 2.0**9
    for ours, theirs in zip(trainer.network.parameters(), oracle.network.parameters()):
        assert torch.equal(ours, theirs)
    assert trainer.seen == [0, 1, 2] and trainer.global_step == 3


def test_a_step_the_scaler_skips_leaves_the_weights_and_still_counts(make_trainer):
    trainer = prepared(make_trainer)
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)  # scaled gradients overflow
    before = [p.detach().clone() for p in trainer.network.parameters()]
    figures = trainer.train_step(a_batch(trainer))
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.network.parameters()))
    assert not np.isfinite(figures["grad_norm"]) and np.isfinite(figures["supervised"])
    assert trainer.grad_scaler.get_scale() == 2.0**126
    assert trainer.seen == [0] and trainer.global_step == 1


class NoDeepSupervision(TwoPasses):
    def __init__(self, plans, configuration, fold, dataset_json, device=CPU) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.enable_deep_supervision = False


def test_without_deep_supervision_a_step_is_one_output_and_one_target(make_trainer):
    trainer = prepared(make_trainer, NoDeepSupervision)
    trainer.set_deep_supervision_enabled(False)
    batch = a_batch(trainer)
    expected = trainer.loss(trainer.network(batch["data"]), batch["target"]).item()
    figures = trainer.train_step(batch)
    assert figures["doubled"] == figures["supervised"] == pytest.approx(expected, rel=1e-6)


def test_a_step_reports_zero_dimensional_arrays(make_trainer):
    figures = (trainer := prepared(make_trainer)).train_step(a_batch(trainer))
    assert list(figures) == ["loss", "doubled", "supervised", "grad_norm"]
    assert all(isinstance(v, np.ndarray) and v.ndim == 0 for v in figures.values())
