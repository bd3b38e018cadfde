"""The network: plain where there is nothing to retrieve, weights that are right, gradients that reach the retriever."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from nnunetv2_ext.jras.network import Exclusion, excluding
from nnunetv2_ext.jras.strip import plain_weights
from tests.jras.conftest import empty


def loss_of(outputs: list[torch.Tensor]) -> torch.Tensor:
    return sum(output.square().mean() for output in outputs)


def nobody(batch: int, dropout: float = 0.0) -> Exclusion:
    return Exclusion(torch.full((batch,), -1), dropout, torch.Generator().manual_seed(0))


def gradient_norms(network) -> tuple[float, float]:
    """Of the retriever and of b0."""
    norm = sum(float(p.grad.norm()) for p in network.retriever.parameters() if p.grad is not None)
    return norm, 0.0 if network.null_logit.grad is None else float(network.null_logit.grad.abs())


# ---- plain paths


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("deep_supervision", [False, True])
def test_with_an_empty_bank_the_output_is_the_backbones(make_network, dim, residual, deep_supervision):
    network = make_network(dim, guides=0, residual=residual).eval()
    network.decoder.deep_supervision = deep_supervision
    x = torch.randn(2, 1, *(16,) * dim)
    ours, plain = network(x), network.backbone(x)
    assert isinstance(ours, list) == deep_supervision
    assert all(torch.equal(a, b) for a, b in zip(ours, plain))


@pytest.mark.parametrize("fusion", ["attention", "concat"])
def test_with_every_guide_dropped_the_output_is_that_of_an_empty_bank(make_network, fusion):
    network, x = make_network(fusion=fusion), torch.randn(2, 1, 16, 16, 16)
    with excluding(nobody(2, dropout=1.0)), torch.no_grad():
        dropped = network(x)
    assert torch.equal(network.last.weights[:, -1], torch.ones(2))
    empty(network.bank)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(dropped, network(x)))


def test_guides_do_change_the_output(make_network):
    for fusion in ("attention", "concat"):
        network, x = make_network(fusion=fusion).eval(), torch.randn(2, 1, 16, 16, 16)
        guided = network(x)
        empty(network.bank)
        assert (guided[0] - network(x)[0]).abs().max() > 1e-4


def test_training_with_an_empty_bank_is_an_error(make_network):
    with pytest.raises(ValueError, match="empty guide bank"):
        make_network(guides=0)(torch.randn(1, 1, 16, 16, 16))


def test_concat_with_zeros_below_the_image_is_the_network_with_the_first_convolution_cut(make_network):
    network = make_network(guides=0, fusion="concat", input_channels=2).eval()
    plain = make_network(guides=0, input_channels=2).backbone.eval()
    plain.load_state_dict(plain_weights(network.state_dict(), {k: v.shape for k, v in plain.state_dict().items()}))
    x = torch.randn(2, 2, 16, 16, 16)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(network(x), plain(x)))


# ---- state


def test_no_weight_is_in_the_state_twice_by_our_doing(make_network):
    network = make_network()
    names = set(network.state_dict())
    assert not any(name.startswith(("encoder.", "decoder.")) for name in names)
    assert {f"backbone.{name}" for name in network.backbone.state_dict()} <= names
    assert network.decoder is network.backbone.decoder and network.encoder is network.backbone.encoder


def test_deep_supervision_is_switched_on_the_backbone(make_network):
    network = make_network().eval()
    network.decoder.deep_supervision = False
    assert isinstance(network(torch.randn(1, 1, 16, 16, 16)), torch.Tensor)


def test_a_bank_of_another_size_loads_strictly_and_predicts_the_same(make_network):
    source, target = make_network(guides=9, seed=1).eval(), make_network(guides=4).eval()
    with torch.inference_mode():  # as nnU-Net's predictor does
        target.load_state_dict(source.state_dict())
        x = torch.randn(1, 1, 16, 16, 16)
        assert all(torch.equal(a, b) for a, b in zip(source(x), target(x)))
    target.train()
    loss_of(target(torch.randn(2, 1, 16, 16, 16))).backward()


def test_a_wrong_backbone_is_refused(make_network):
    from nnunetv2_ext.jras.network import JRASNetwork
    from nnunetv2_ext.jras.settings import JRASSettings

    with pytest.raises(ValueError, match="encoder and a decoder"):
        JRASNetwork(nn.Conv2d(1, 1, 1), JRASSettings(), 1, 2, (16, 16))


# ---- weights


def test_weights_are_the_softmax_with_the_null_guide_last(make_network):
    network = make_network(tau=0.2, num_guides=3).eval()
    network(torch.randn(2, 1, 16, 16, 16))
    last = network.last
    assert torch.allclose(last.weights.sum(1), torch.ones(2), atol=1e-6)
    cosines = last.queries @ network.bank.keys.T
    nearest = cosines.topk(3, 1)
    assert torch.equal(last.ids, nearest.indices)
    expected = torch.softmax(torch.cat((nearest.values, torch.full((2, 1), 0.5)), 1) / 0.2, 1)
    assert torch.allclose(last.weights, expected, atol=1e-5)


@pytest.mark.parametrize("guides", [1, 3])
def test_fewer_guides_than_asked_for_leave_their_weight_to_the_others(make_network, guides):
    network = make_network(guides=guides, num_guides=4)
    with excluding(nobody(2)):
        outputs = network(torch.randn(2, 1, 16, 16, 16))
    assert network.last.valid.sum(1).tolist() == [guides, guides]
    assert network.last.weights[:, guides:-1].abs().max() == 0
    loss_of(outputs).backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


def test_where_the_own_subject_is_the_whole_bank_all_weight_falls_to_the_null(make_network):
    network = make_network(guides=3)  # all of subject 0
    with excluding(Exclusion(torch.tensor([0, 7]))):
        outputs = network(torch.randn(2, 1, 16, 16, 16))
    assert network.last.weights[0].tolist() == [0, 0, 0, 0, 1] and network.last.weights[1, -1] < 1
    loss_of(outputs).backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


def test_random_weighs_all_guides_alike_and_repeats_itself_when_predicting(make_network):
    network = make_network(retriever="random", num_guides=3).eval()
    x = torch.randn(1, 1, 16, 16, 16)
    first = network(x)
    assert torch.allclose(network.last.weights, torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0.0]]))
    network(torch.randn(1, 1, 16, 16, 16))
    assert torch.equal(first[0], network(x)[0])


def test_results_do_not_depend_on_the_batchs_order(make_network):
    network, x = make_network().eval(), torch.randn(4, 1, 16, 16, 16)
    order = torch.tensor([2, 0, 3, 1])
    straight, ids = network(x)[0], network.last.ids
    turned = network(x[order])[0]
    assert torch.equal(network.last.ids, ids[order])
    assert torch.allclose(turned, straight[order], atol=1e-5)


# ---- who must not see whom


def test_own_subjects_are_excluded_within_the_context_only(make_network):
    network, x = make_network(num_guides=12).eval(), torch.randn(2, 1, 16, 16, 16)
    with excluding(Exclusion(torch.tensor([1, 3]))):
        network(x)
    seen = network.bank.groups[network.last.ids]
    assert not ((seen == torch.tensor([[1], [3]])) & network.last.valid).any()
    assert network.last.valid.sum(1).tolist() == [9, 9]
    network(x)
    assert network.last.valid.all()


def test_the_context_ends_with_an_exception(make_network):
    network, x = make_network(num_guides=12).eval(), torch.randn(1, 1, 16, 16, 16)
    with pytest.raises(RuntimeError, match="stop"), excluding(Exclusion(torch.tensor([1]))):
        raise RuntimeError("stop")
    network(x)
    assert network.last.valid.all()


def test_a_copy_of_the_network_respects_the_exclusion(make_network):
    teacher = copy.deepcopy(make_network(num_guides=12).eval())
    with excluding(Exclusion(torch.tensor([1]))):
        teacher(torch.randn(1, 1, 16, 16, 16))
    assert not ((teacher.bank.groups[teacher.last.ids] == 1) & teacher.last.valid).any()


# ---- gradients


@pytest.mark.parametrize("fusion", ["attention", "concat"])
@pytest.mark.parametrize(
    ("guides", "null", "moves"), [(2, True, True), (1, True, True), (2, False, True), (1, False, False)]
)
def test_the_loss_reaches_the_retriever(make_network, fusion, guides, null, moves):
    network = make_network(fusion=fusion, num_guides=guides)
    if not null:
        network.null_logit.data.fill_(-torch.inf)
    with excluding(nobody(2)):
        loss_of(network(torch.randn(2, 1, 16, 16, 16))).backward()
    norm, of_null = gradient_norms(network)
    assert (norm > 1e-7) == moves
    assert (of_null > 0) == null


def test_autograd_agrees_with_a_finite_difference(make_network):
    network = make_network(tau=0.2, num_guides=12)  # all guides, so that none comes or goes
    network.null_logit.data.fill_(0.95)  # about the cosine of untrained embeddings: every bit of it counts
    for gate in (network.fusion.deep_gate, network.fusion.skip_gate):
        gate.data.fill_(3.0)  # a slope well above fp32's noise
    x, weight = torch.randn(2, 1, 16, 16, 16), network.retriever.blocks[0][0].weight
    loss_of(network(x)).backward()
    slope = weight.grad.norm()
    direction, step, values = weight.grad / slope, 2e-2, []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step * direction
        values.append(loss_of(network(x)).item())
        with torch.no_grad():
            weight -= sign * step * direction
    assert slope > 3e-4
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope.item(), rel=0.05)


def test_detached_keys_get_no_gradient(make_network):
    both, queries = make_network(num_guides=2), make_network(num_guides=2, detach_keys=True)
    x = torch.randn(2, 1, 16, 16, 16)
    calls = []
    for network in (both, queries):
        number = []
        network.retriever.register_forward_hook(lambda *args, number=number: number.append(len(args[1][0])))
        loss_of(network(x)).backward()
        calls.append(number)
    assert calls == [[2, 4], [2]]
    one, other = (n.retriever.project.weight.grad for n in (both, queries))
    assert other.abs().max() > 0 and (one - other).abs().max() > 1e-8


def test_a_fixed_retriever_gets_a_gradient_of_exactly_zero(make_network):
    network = make_network()
    network.retriever_is_fixed = True
    loss_of(network(torch.randn(2, 1, 16, 16, 16))).backward()
    gradients = [p.grad for p in network.retrieval_parameters()]
    assert all(g is not None and g.abs().max() == 0 for g in gradients)  # None would hang DDP
    assert network.guide_encoder.blocks[0][0].weight.grad.abs().max() > 0


def test_guide_dropout_keeps_every_module_in_the_graph(make_network):
    network = make_network()
    with excluding(nobody(2, dropout=1.0)):
        loss_of(network(torch.randn(2, 1, 16, 16, 16))).backward()
    lost = [name for name, p in network.named_parameters() if p.grad is None]
    assert all(".seg_layers." in name or "decoder" in name for name in lost)
    assert gradient_norms(network) == (0.0, 0.0)


def test_embedding_the_bank_leaves_mode_gradients_and_random_state_alone(make_network):
    network = make_network().train()
    loss_of(network(torch.randn(1, 1, 16, 16, 16))).backward()
    before = [p.grad.clone() for p in network.retriever.parameters()], torch.get_rng_state()
    keys = network.embed_bank(batch=5)
    assert network.training and network.retriever.training and not keys.requires_grad
    assert all(torch.equal(a, p.grad) for a, p in zip(before[0], network.retriever.parameters()))
    assert torch.equal(before[1], torch.get_rng_state())
    assert torch.allclose(keys, network.retriever(network.bank.stored_images(torch.arange(12))), atol=1e-5)
    assert torch.equal(network.embed_bank(3, 7), keys[3:7])


# ---- compile


def test_the_number_of_graphs_does_not_grow_with_groups_or_bank(make_network):
    graphs = []

    def count(module, inputs):
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    network = make_network().eval()
    compiled = torch.compile(network, backend=count)
    x = torch.randn(2, 1, 16, 16, 16)
    with torch.no_grad():
        compiled(x)
        first = len(graphs)
        for group in range(3):
            with excluding(Exclusion(torch.tensor([group, group]))):
                compiled(x)
        other = make_network(guides=7, seed=3)
        network.load_state_dict(other.state_dict())
        compiled(x)
    assert 2 <= first <= 4
    assert len(graphs) == first


@pytest.mark.parametrize("fusion", ["attention", "concat"])
def test_the_number_of_graphs_of_a_training_is_bounded(make_network, fusion):
    """Not one for every group, bank size, step or epoch: one set in the warm-up, one after it."""
    graphs = []

    def count(module, inputs):
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    network = make_network(fusion=fusion).train()
    compiled = torch.compile(network, backend=count)
    x, generator = torch.randn(2, 1, 16, 16, 16), torch.Generator().manual_seed(0)

    def step(group: int, dropout: float) -> None:
        network.zero_grad()
        with excluding(Exclusion(torch.tensor([group, group + 1]), dropout, generator)):
            loss_of(compiled(x)).backward()

    numbers = []
    for fixed in (True, False):
        network.retriever_is_fixed = fixed
        step(0, 0.1)
        numbers.append(len(graphs))
        for guides in (12, 7, 9, 15):
            if guides != 12:
                network.load_state_dict(make_network(guides=guides, fusion=fusion, seed=guides).state_dict())
            for group in range(3):
                step(group, dropout=group / 2)
            with torch.no_grad():  # a refresh
                network.bank.set_keys(network.embed_bank())
        assert len(graphs) == numbers[-1]
        assert gradient_norms(network)[0] == 0 or not fixed
    for fixed in (True, False):  # both sets are kept
        network.retriever_is_fixed = fixed
        step(1, 0.0)
    assert len(graphs) == numbers[-1] and 2 <= numbers[0] <= 6 and numbers[-1] <= 2 * numbers[0]


# ---- mixed precision


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("fusion", ["attention", "concat"])
def test_under_bf16_queries_keys_and_weights_are_fp32_and_gradients_finite(make_network, fusion, dim):
    network = make_network(dim, fusion=fusion).train()
    embedded, seen = [], []
    network.retriever.register_forward_hook(lambda *args: embedded.append(args[2].dtype))
    network.encoder.register_forward_hook(lambda *args: seen.append(args[2][-1].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16), excluding(nobody(2)):
        outputs = network(torch.randn(2, 1, *[16] * dim))
        loss = loss_of([output.float() for output in outputs])
    loss.backward()
    assert seen == [torch.bfloat16] and outputs[0].dtype == torch.bfloat16  # it was under autocast indeed
    assert embedded == [torch.float32] * 2  # queries, then keys
    last = network.last
    assert {last.queries.dtype, last.similarities.dtype, last.weights.dtype} == {torch.float32}
    assert torch.allclose(last.weights.sum(1), torch.ones(2), atol=1e-6)
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in gradients.values())
    assert gradient_norms(network)[0] > 0 and gradient_norms(network)[1] > 0
    network.eval()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert torch.isfinite(network(torch.randn(1, 1, *[16] * dim))[0]).all()


# ---- the segmentation network's own encoder as retriever


def bottleneck_network(make_network, dim: int = 3, guides: int = 12) -> tuple:
    """The network and the guides' patches at full resolution."""
    network = make_network(dim, guides=0, retriever_encoder="bottleneck", guide_dropout=0.0)
    patches = torch.randn(guides, 1, *[16] * dim, generator=torch.Generator().manual_seed(5))
    lut = torch.zeros(256, 3, dtype=torch.uint8)
    lut[[0, 1, 2], [0, 1, 2]] = 1
    labels = torch.randint(0, 3, (guides, *network.low_shape), dtype=torch.uint8)
    network.bank.fill(network.low_resolution(patches), labels, torch.arange(guides), lut)
    network.bank.set_keys(network.embed_bank(batch=5, read=lambda rows: patches[list(rows)]))
    return network, patches


@pytest.mark.parametrize("dim", [2, 3])
def test_by_its_bottleneck_a_stored_patch_finds_itself(make_network, dim):
    network, patches = bottleneck_network(make_network, dim)
    with torch.no_grad():
        network.eval()(patches)
    assert network.last.ids[:, 0].tolist() == list(range(12))
    assert torch.allclose(network.last.similarities[:, 0], torch.ones(12), atol=1e-5)
    assert torch.allclose(network.bank.keys, network.embed(patches), atol=1e-6)


def test_the_loss_reaches_projection_and_encoder_through_the_bottlenecks_query(make_network):
    network, patches = bottleneck_network(make_network)
    network.train()
    x = patches[:2] + 0.1
    for fixed in (False, True):
        network.zero_grad()
        network.retriever_is_fixed = fixed
        network(x)
        q = network.last
        assert q is not None and q.weights.shape == (2, 5)
        # only what depends on w: the skips as they come are cut off
        skips = [skip.detach() for skip in network.encoder(x)]
        deep = network.encoder(x)[-1]
        _, weights = network._retrieve(network.retriever(deep))
        (weights[:, 0].sum() + 0 * sum(skip.sum() for skip in skips)).backward()
        moved = float(network.retriever.project.weight.grad.abs().max())
        encoder = max(float(p.grad.abs().max()) for p in network.encoder.parameters() if p.grad is not None)
        assert (moved == 0) == (encoder == 0) == fixed


def test_with_an_empty_bank_the_bottlenecks_output_is_the_backbones(make_network):
    network, patches = bottleneck_network(make_network)
    empty(network.bank)
    network.eval()
    assert all(torch.equal(a, b) for a, b in zip(network(patches[:2]), network.backbone(patches[:2])))
