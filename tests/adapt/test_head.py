"""The closed form against a slow solver, and what it leaves alone."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from nnunetv2_ext.adapt.head import RIDGE, Head, Sums, joined, solve


class Tiny(nn.Module):
    """A decoder of one 1 x 1 layer on two convolution features."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.decoder = nn.Module()
        self.decoder.seg_layers = nn.ModuleList([nn.Conv2d(4, classes, 1)])

    def forward(self, x):
        return self.decoder.seg_layers[-1](torch.tanh(self.stem(x)))


LABELS = SimpleNamespace(all_labels=[0, 1, 2], has_regions=False)
REGIONS = SimpleNamespace(all_labels=[0, 1, 2], has_regions=True, foreground_regions=[(1, 2), 2])


def case(seed: int = 0, shape: tuple[int, ...] = (2, 5, 7)) -> tuple[torch.Tensor, np.ndarray]:
    generator = np.random.default_rng(seed)
    label = generator.integers(-1, 4, shape)  # -1 is padding, 3 the ignore label
    label[0, 0, :3] = 0, 1, 2
    return torch.from_numpy(generator.normal(size=(1, *shape)).astype(np.float32)), label


def slow(network: Tiny, image, label, targets_of, ridge: float = RIDGE) -> np.ndarray:
    """Weighted least squares voxel by voxel, with what holds the old layer as further rows."""
    rows, wanted, classes = [], [], []
    for z in range(label.shape[0]):
        with torch.no_grad():
            features = torch.tanh(network.stem(image[None, :, z]))[0]
            logits = network(image[None, :, z])[0]
        for y in range(label.shape[1]):
            for x in range(label.shape[2]):
                if label[z, y, x] in (0, 1, 2):
                    target, kind = targets_of(int(label[z, y, x]), logits[:, y, x].double().numpy())
                    rows.append([*features[:, y, x].double().numpy(), 1.0])
                    wanted.append(10 * (np.array(target) - 0.5))
                    classes.append(kind)
    rows, wanted, classes = np.array(rows), np.array(wanted), np.array(classes)
    kinds = np.unique(classes)
    weights = np.array([1 / (classes == kind).sum() / len(kinds) for kind in classes])
    gram = sum(w * np.outer(row, row) for w, row in zip(weights, rows))
    amount = ridge * np.mean(np.diag(gram)[:-1])
    layer = network.decoder.seg_layers[-1]
    old = np.concatenate((layer.weight.detach().flatten(1).T.numpy(), layer.bias.detach()[None].numpy())).astype(float)
    weighted = np.sqrt(weights)[:, None]
    fits = (weighted * (rows @ old)).ravel()  # the number by which they fit best: least squares of one unknown
    scale = np.linalg.lstsq(fits[:, None], (weighted * wanted).ravel(), rcond=None)[0][0]
    left = np.concatenate((weighted * rows, np.sqrt(amount) * np.eye(rows.shape[1])))
    right = np.concatenate((weighted * wanted, np.sqrt(amount) * max(scale, 0) * old))
    return np.linalg.lstsq(left, right, rcond=None)[0]


def fitted(network: Tiny, labels, hidden=(), patch=(5, 7), seed: int = 0) -> torch.Tensor:
    head = Head(network, labels, hidden)
    return solve(head.sums(*case(seed), patch, torch.device("cpu")), head.before(network.state_dict()))


def test_it_is_the_ridge_solution_of_class_balanced_voxels() -> None:
    network = Tiny()
    wanted = slow(network, *case(), lambda label, logits: (np.eye(3)[label], label))
    assert np.allclose(fitted(network, LABELS), wanted, rtol=1e-4, atol=1e-4)


def test_tiles_that_overlap_or_are_larger_than_the_case_change_little_or_nothing() -> None:
    network = nn.Sequential()
    network = Tiny()
    network.stem = nn.Conv2d(1, 4, 1)  # sees no neighbour, so that padding cannot matter
    assert torch.allclose(fitted(network, LABELS, patch=(8, 8)), fitted(network, LABELS, patch=(5, 7)), atol=1e-5)


def test_background_that_the_model_takes_for_a_hidden_class_is_shared() -> None:
    network = Tiny()

    def target(label: int, logits: np.ndarray):
        if label:
            return np.eye(3)[label], label
        p = np.exp(logits[:2] - logits[:2].max())
        shared = np.array([*(p / p.sum()), 0.0])
        return shared, int(shared.argmax())

    wanted = slow(network, *case(), target)
    found = fitted(network, LABELS, hidden=(1,))
    assert np.allclose(found, wanted, rtol=1e-4, atol=1e-4)
    assert not np.allclose(found, fitted(network, LABELS), atol=1e-2)


def test_regions_have_targets_of_their_own_and_hidden_ones_keep_their_layer() -> None:
    network = Tiny(classes=2)
    wanted = slow(network, *case(), lambda label, logits: ([label > 0, label == 2], label))
    head = Head(network, REGIONS, (1,))
    found = solve(head.sums(*case(), (5, 7), torch.device("cpu")), head.before(network.state_dict()))
    assert np.allclose(found, wanted, rtol=1e-4, atol=1e-4)
    before = network.state_dict()
    after = head.weights(before, found)
    name = "decoder.seg_layers.0.weight"
    assert torch.equal(after[name][1], before[name][1]) and not torch.equal(after[name][0], before[name][0])


def test_weights_of_the_layer_give_what_was_fitted_and_nothing_else_changes() -> None:
    network = Tiny()
    head = Head(network, LABELS, ())
    image, label = case()
    solution = solve(head.sums(image, label, (5, 7), torch.device("cpu")), head.before(network.state_dict()))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    after = head.weights(network.state_dict(), solution)
    with torch.no_grad():
        features = torch.tanh(network.stem(image[None, :, 0]))[0].flatten(1).T.double()
        wanted = torch.cat((features, torch.ones(len(features), 1)), 1) @ solution
        network.load_state_dict(after)
        assert torch.allclose(network(image[None, :, 0])[0].flatten(1).T.double(), wanted, atol=1e-4)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder.seg_layers.0.weight", "decoder.seg_layers.0.bias"}


def test_replay_mixes_the_means_whatever_the_number_of_voxels() -> None:
    network = Tiny()
    head = Head(network, LABELS, ())
    layer = head.before(network.state_dict())
    new, old = (head.sums(*case(seed), (5, 7), torch.device("cpu")) for seed in (0, 1))
    twice = joined([old, old])
    assert torch.allclose(solve(new, layer, twice, 0.5), solve(new, layer, old, 0.5))
    assert torch.allclose(solve(new, layer, old, 0.0), solve(new, layer))
    assert not torch.allclose(solve(new, layer, old, 0.5), solve(new, layer), atol=1e-3)


def test_held_firmly_the_layer_stays_what_it_was_and_free_it_fits() -> None:
    network = Tiny()
    head = Head(network, LABELS, ())
    sums = head.sums(*case(), (5, 7), torch.device("cpu"))
    free = solve(sums, head.before(network.state_dict()), ridge=1e-12)
    a, b = sums.means()
    assert torch.allclose(a @ free, b, atol=1e-4)
    # a layer twice as sure as the targets is held at half of itself, one that says the opposite at nothing
    assert torch.allclose(solve(sums, 2 * free, ridge=1e9), free, atol=1e-4)
    assert float(solve(sums, -free, ridge=1e9).abs().max()) < 1e-4


def test_a_class_without_a_voxel_does_not_count() -> None:
    sums = Sums.empty(3, 3, 2)
    x = torch.tensor([[1.0, 2.0, 1.0], [0.0, 1.0, 1.0]])
    sums.add(x, torch.eye(2), torch.tensor([0, 2]))
    a, b = sums.means()
    assert torch.equal(a, (x.double().T @ x.double()) / 2) and torch.equal(b, x.double().T / 2)


def test_a_network_without_such_a_layer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--head-only needs a U-Net .* Linear has none"):
        Head(nn.Linear(2, 2), LABELS, ())
