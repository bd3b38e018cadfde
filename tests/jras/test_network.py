"""The network: plain at the start and where nothing is read; wrong masks change it; the bank is encoded once."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from nnunetv2_ext.core.checkpoint import unwrap
from nnunetv2_ext.jras.network import Episode, Exclusion, JRASNetwork, read_level, reading
from nnunetv2_ext.jras.settings import JRASSettings
from tests.jras.conftest import empty, random_bank, random_episode


def image(batch: int = 2, dim: int = 2, seed: int = 5) -> torch.Tensor:
    return torch.randn(batch, 1, *(16,) * dim, generator=torch.Generator().manual_seed(seed))


def equal(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# ---- plain


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("deep_supervision", [False, True])
def test_at_the_start_it_is_the_plain_network_bit_for_bit(make_network, dim, residual, deep_supervision):
    network, x = make_network(dim, residual=residual, moved=False), image(dim=dim)
    network.decoder.deep_supervision = deep_supervision
    plain = network.backbone(x)
    with reading(random_episode(2, 3, dim)):
        trained = network(x)
    network.eval()
    assert isinstance(trained, list) == deep_supervision
    for ours in (trained, network(x)):  # of an episode, and of the bank
        assert equal(ours, plain) if deep_supervision else torch.equal(ours, plain)


def test_with_an_empty_bank_and_for_dropped_samples_it_is_plain(make_network):
    network, x = make_network(), image()
    plain = network.backbone(x)
    episode = random_episode(2, 3, 2)
    with reading(episode._replace(kept=torch.tensor([False, True]))):
        output = network(x)
    assert torch.equal(output[0][0], plain[0][0]) and not torch.allclose(output[0][1], plain[0][1])
    empty(network.bank)
    assert equal(network.eval()(x), plain)
    assert network.last is None


def test_training_without_an_episode_is_an_error(make_network):
    with pytest.raises(ValueError, match="guides of an episode"):
        make_network()(image())


def test_a_wrong_backbone_is_refused():
    with pytest.raises(ValueError, match="convolution blocks"):
        JRASNetwork(nn.Conv2d(1, 1, 1), JRASSettings(), 1, 2, (16, 16))


# ---- reading


@pytest.mark.parametrize("dim", [2, 3])
def test_wrong_masks_change_the_logits_by_more_than_a_hundredth(make_network, dim):
    network, x = make_network(dim), image(dim=dim)
    episode = random_episode(2, 3, dim)
    with torch.no_grad():
        with reading(episode):
            right = network(x)[0]
        with reading(episode._replace(masks=episode.masks.roll(1, 2))):
            wrong = network(x)[0]
    assert (right - wrong).abs().mean() > 0.01 * right.abs().mean()


def test_the_bank_reads_as_an_episode_of_the_same_guides(make_network):
    """Predicting = reading in train mode with gradients off; the bank's bytes are the images."""
    network, x = make_network(num_guides=3).eval(), image()
    with torch.no_grad():
        of_bank = network(x)
        ids = network.last.ids
        masks, known = zip(*(network.bank.masks(row) for row in ids))
        images = torch.stack([network.bank.stored_images(row) for row in ids])
        episode = Episode(images, torch.stack(masks), torch.stack(known), torch.ones(2, dtype=torch.bool))
        network.train()
        with reading(episode):
            of_episode = network(x)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(of_bank, of_episode))


def test_results_do_not_depend_on_the_batchs_order(make_network):
    network, x = make_network().eval(), image(4)
    order = torch.tensor([2, 0, 3, 1])
    straight, ids = network(x)[0], network.last.ids
    turned = network(x[order])[0]
    assert torch.equal(network.last.ids, ids[order]) and torch.allclose(turned, straight[order], atol=1e-5)


def test_the_guides_are_the_nearest_by_their_vectors(make_network):
    network = make_network(num_guides=3).eval()
    network(image())
    vectors = network.bank_features(1).vectors
    assert torch.equal(network.last.ids, (network.last.vectors @ vectors.T).topk(3, 1).indices)


def test_random_retrieval_has_no_scores_and_repeats_itself(make_network):
    network = make_network(retriever="random").eval()
    assert not hasattr(network.reader, "guide_vector")
    first = network(image())
    network(image(seed=9))
    assert equal(first, network(image()))


@pytest.mark.parametrize("dim", [2, 3])
def test_gradients_reach_the_encoder_through_the_first_guides_only(make_network, dim):
    network = make_network(dim, guides_with_gradient=1)
    episode = random_episode(2, 3, dim)
    images = episode.images.clone().requires_grad_()
    with reading(episode._replace(images=images)):
        network(image(dim=dim))[0].square().sum().backward()
    assert images.grad[:, 0].abs().max() > 0 and images.grad[:, 1:].abs().max() == 0
    missing = [n for n, p in network.named_parameters() if p.grad is None and ".seg_layers." not in n]
    assert missing == []


def test_a_cascades_channels_are_zero_for_guides(make_network):
    network = make_network(input_channels=3).eval()
    seen = []
    network.encoder.stages[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    x = torch.randn(2, 3, 16, 16)
    network(x)
    assert torch.equal(seen[0], x) and all(part.shape[1] == 3 and part[:, 1:].abs().max() == 0 for part in seen[1:])


@pytest.mark.parametrize(
    ("patch", "strides", "level"),
    [
        ((64, 64), [1, 2, 2, 2], 2),  # a quarter, 16 cells
        ((128, 128, 128), [1, 2, 2, 2, 2, 2], 3),  # a quarter would be 32,768 cells
        ((128, 128), [1, 2, 2, 2, 2], 3),  # a quarter would be 1,024
        ((512, 512), [1, 2, 2, 2, 2, 2, 2], 3),  # not coarser than an eighth, which has 4,096
        ((1024, 1024), [1, 2, 2, 2, 2, 2, 2], 4),
        ((160, 128), [1, 2, 2, 2, 2], 3),  # 320; the next one has 8 along an axis
        ((40, 40), [1, 2, 2, 2], 1),  # a quarter has 10
        ((40, 56, 40), [1, 2, 2, 2], 2),  # 10 cells along an axis; a half would have 11,200 in all
        ((24, 32, 24), [1, 2, 2, 2], 1),  # 2,304 cells
        ((16, 16), [1, 2, 2], 0),
        ((64, 64), [1, 2, 2], 1),  # the bottleneck has no skip
    ],
)
def test_the_resolution_that_is_read_at(patch, strides, level):
    assert read_level(patch, [(s,) * len(patch) for s in strides]) == level


def test_an_anisotropic_patch_goes_by_its_plane():
    assert read_level((16, 256, 256), [(1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2)]) == 3
    assert read_level((8, 96, 96), [(1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2)]) == 2


# ---- exclusion


def test_own_subjects_are_excluded_within_the_context_only(make_network):
    network, x = make_network(num_guides=12).eval(), image()
    with reading(Exclusion(torch.tensor([1, 3]))):
        network(x)
    seen = network.bank.groups[network.last.ids]
    assert not ((seen == torch.tensor([[1], [3]])) & network.last.valid).any()
    assert network.last.valid.sum(1).tolist() == [9, 9]
    with pytest.raises(RuntimeError, match="stop"), reading(Exclusion(torch.tensor([1, 1]))):
        raise RuntimeError("stop")
    network(x)
    assert network.last.valid.all()


def test_excluded_guides_are_as_if_they_were_not_there(make_network):
    network, x = make_network(num_guides=12).eval(), image(1)
    with reading(Exclusion(torch.tensor([1]))):
        excluded = network(x)
    others = torch.tensor([0, 1, 2, *range(6, 12)])
    network.bank.fill({n: v[others] if n != "lut" else v for n, v in random_bank(12, 2).items()})
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(network(x), excluded))


def test_a_query_whose_bank_is_its_own_subject_is_plain(make_network):
    network, x = make_network(guides=3).eval(), image()  # all of subject 0
    with reading(Exclusion(torch.tensor([0, 7]))):
        output = network(x)[0]
    plain = network.backbone(x)[0]
    assert torch.equal(output[0], plain[0]) and not torch.allclose(output[1], plain[1])


def test_a_copy_of_the_network_respects_the_exclusion_and_has_its_own_cache(make_network):
    network = make_network(num_guides=12).eval()
    network(image())
    teacher = copy.deepcopy(network)
    with reading(Exclusion(torch.tensor([1, 1]))):
        teacher(image())
    assert not ((teacher.bank.groups[teacher.last.ids] == 1) & teacher.last.valid).any()
    assert teacher._features is not network._features
    pickle.loads(pickle.dumps(network._features))


# ---- state and cache


def counted(network: JRASNetwork) -> list[int]:
    """Guides that are encoded from now on."""
    calls: list[int] = []
    encode = network.encode_guides
    network.encode_guides = lambda images, *rest: calls.append(len(images)) or encode(images, *rest)
    return calls


def test_the_bank_is_encoded_once_for_each_weights_and_content(make_network):
    network, x = make_network().eval(), image()
    calls = counted(network)
    first = network(x)
    network(x)
    assert sum(calls) == 12
    with torch.no_grad():
        network.reader.key.weight.mul_(1.5)
    changed = network(x)
    assert sum(calls) == 24 and not equal(first, changed)
    network.bank.fill(random_bank(9, 2, seed=3))
    other = network(x)
    assert sum(calls) == 33 and not equal(changed, other)


def test_weights_that_are_loaded_again_keep_their_features_and_others_do_not(make_network):
    """As nnU-Net's predictor does for every case and fold, under inference mode."""
    network, x = make_network(guides=4).eval(), image()
    folds = [make_network(guides=n, seed=n).state_dict() for n in (9, 6)]
    fresh = []
    for state in folds:
        other = make_network(guides=4).eval()
        other.load_state_dict(state)
        with torch.no_grad():
            fresh.append(other(x))
    calls = counted(network)
    with torch.inference_mode():
        for _ in range(2):
            for state, expected in zip(folds, fresh):
                network.load_state_dict(state)
                network.to(torch.device("cpu"))  # which it is on
                assert equal(network(x), expected)
        assert sum(calls) == 15
        folds[0]["bank.labels"] = folds[0]["bank.labels"].flip(0)  # masks shuffled
        network.load_state_dict(folds[0])
        assert not equal(network(x), fresh[0])
    folds[1]["reader.value.weight"].mul_(2)
    network.load_state_dict(folds[1])
    assert not equal(network(x), fresh[1]) and sum(calls) == 15 + 9 + 6


def test_no_weight_is_in_the_state_twice_by_our_doing(make_network):
    network = make_network()
    names = set(network.state_dict())
    assert not any(name.startswith(("encoder.", "decoder.")) for name in names)
    assert {f"backbone.{name}" for name in network.backbone.state_dict()} <= names
    assert {name for name in names if name.startswith("bank.")} == set(network.buffers_of_any_size)


def test_what_was_loaded_under_inference_mode_trains_later(make_network):
    source, target = make_network(guides=9, seed=1), make_network(guides=4)
    with torch.inference_mode():
        target.load_state_dict(source.state_dict())
        target.eval()(image())
    target.train()
    with reading(random_episode(2, 3, 2)):
        target(image())[0].square().mean().backward()
    assert target.reader.key.weight.grad is not None


def test_compiled_it_computes_the_same_and_a_bank_of_another_size_compiles_nothing_anew(make_network):
    graphs: list[int] = []

    def counting(graph, inputs):
        graphs.append(len(inputs))
        return graph.forward

    torch._dynamo.reset()
    network, x = make_network().eval(), image()
    compiled = torch.compile(network, backend=counting)
    with torch.no_grad():
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(compiled(x), network(x)))
        number = len(graphs)
        for guides in (7, 20):
            unwrap(compiled).bank.fill(random_bank(guides, 2))
            compiled(x)
    assert len(graphs) == number
    network.train()
    with reading(random_episode(2, 3, 2)):
        one = compiled(x)
        one[0].square().mean().backward()
    assert network.reader.guide_vector.weight.grad.abs().max() > 0
    assert network.last.transported.requires_grad
    torch._dynamo.reset()


def test_under_bf16_what_is_read_is_computed_in_fp32(make_network):
    network, x = make_network(), image()
    with torch.autocast("cpu", torch.bfloat16), reading(random_episode(2, 3, 2)):
        output = network(x)
    assert network.last.transported.dtype == torch.float32 and output[0].dtype == torch.bfloat16
