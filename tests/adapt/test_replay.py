"""Batches of new and old cases."""

import numpy as np
import pytest
import torch

from nnunetv2_ext.adapt.replay import ReplayLoader


class Source:
    """A loader whose samples are all its number; like nnU-Net's it makes as many as ``batch_size`` says."""

    def __init__(self, number: int, batch_size: int, levels: bool = True) -> None:
        self.number, self.batch_size, self.levels, self.thread = number, batch_size, levels, None

    def __next__(self) -> dict:
        data = torch.full((self.batch_size, 1, 2), float(self.number))
        target = [data.short(), data[..., :1].short()] if self.levels else data.short()
        return {"data": data, "target": target, "keys": np.array([f"case_{self.number}"] * self.batch_size)}

    def set_thread_id(self, thread: int) -> None:
        self.thread = thread


def loader(share: float, size: int, levels: bool = True) -> ReplayLoader:
    return ReplayLoader(Source(1, size, levels), Source(2, size, levels), share)


@pytest.mark.parametrize(("size", "share", "old"), [(4, 0.5, 2), (8, 0.25, 2), (2, 0.5, 1)])
def test_the_share_of_old_samples_stands_behind_the_new_ones(size: int, share: float, old: int) -> None:
    batch = next(loader(share, size))
    wanted = [1] * (size - old) + [2] * old
    assert batch["data"][:, 0, 0].tolist() == wanted
    assert [level[:, 0, 0].tolist() for level in batch["target"]] == [wanted] * 2
    assert batch["keys"].tolist() == [f"case_{number}" for number in wanted]
    assert batch["domain"] == ("new",) * (size - old) + ("old",) * old


def test_without_deep_supervision_targets_are_joined_too() -> None:
    assert next(loader(0.5, 2, levels=False))["target"][:, 0, 0].tolist() == [1, 2]


@pytest.mark.parametrize("size", [1, 3])
def test_what_is_left_of_a_whole_sample_is_drawn(size: int) -> None:
    np.random.seed(0)
    numbers = [next(batches)["domain"].count("old") for batches in [loader(0.5, size)] for _ in range(400)]
    assert set(numbers) == {size // 2, size // 2 + 1}
    assert np.mean(numbers) == pytest.approx(size / 2, abs=0.1)


def test_both_loaders_are_told_their_worker() -> None:
    batches = loader(0.5, 2)
    batches.set_thread_id(3)
    assert (batches.new.thread, batches.old.thread) == (3, 3)
