"""Datasets that all rows share, made once a session, and trainers of the table on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.conftest import TinyDataset, make_tiny_dataset
from tests.contract import table
from tests.contract.data import with_model
from tests.contract.table import Row
from tests.rada.sparse_data import make_sparse_tiny


@pytest.fixture(autouse=True)
def found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net finds the trainers of the table by their names."""
    for name, value in table.environment().items():
        monkeypatch.setenv(name, value)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Tensors this small are slower on several threads, and far slower on a busy machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def dense(tiny: TinyDataset) -> TinyDataset:
    """Two organs; 2d and 3d_fullres."""
    return tiny


@pytest.fixture(scope="session")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> TinyDataset:
    """An ignore label on all but three planes of four cases, everywhere in the others."""
    return make_sparse_tiny(tmp_path_factory.mktemp("sparse"))


@pytest.fixture(scope="session")
def regions(tmp_path_factory: pytest.TempPathFactory) -> TinyDataset:
    """As ``dense``, with regions and an ignore label."""
    return make_tiny_dataset(tmp_path_factory.mktemp("regions"), num_test=0, regions=True, ignore=True)


@pytest.fixture(scope="session")
def ignore(tmp_path_factory: pytest.TempPathFactory) -> TinyDataset:
    """As ``dense``, with an ignore label."""
    return make_tiny_dataset(tmp_path_factory.mktemp("ignore"), num_test=0, ignore=True)


@pytest.fixture(scope="session")
def added_channel(tmp_path_factory: pytest.TempPathFactory) -> TinyDataset:
    """Two channels; 2d and 3d_fullres, and a model of the first channel in 2d."""
    dataset = make_tiny_dataset(tmp_path_factory.mktemp("added_channel"), channels=2)
    return with_model(dataset, dataset.root / "model", "2d", steps=3)


@pytest.fixture(scope="session")
def added_channel_regions(tmp_path_factory: pytest.TempPathFactory) -> TinyDataset:
    """As ``added_channel``, with regions and an ignore label."""
    root = tmp_path_factory.mktemp("added_channel_regions")
    dataset = make_tiny_dataset(root, configurations=("2d",), num_test=0, regions=True, ignore=True, channels=2)
    return with_model(dataset, dataset.root / "model", "2d")


@pytest.fixture
def build(make_trainer: Callable[..., Any], request: pytest.FixtureRequest, row: Row) -> Callable[..., Any]:
    """``build("key=value ...", **make_trainer's options)``: a trainer of the row with its smallest settings."""

    def make(settings: str = "", **options: Any) -> Any:
        return make_trainer(row.cls, row.settings(settings), **_defaults(request, row) | options)

    return make


def _defaults(request: pytest.FixtureRequest, row: Row) -> dict[str, Any]:
    return {"configuration": row.configuration, "dataset": request.getfixturevalue(row.facts.data)}
