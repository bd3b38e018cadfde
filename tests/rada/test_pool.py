"""Unlabelled patches from the pool: beside a batch that is all labelled, without a label, and taught as others are."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from nnunetv2_ext.core.checkpoint import EXTENSION_KEY, read
from nnunetv2_ext.data.fill_pool import fill_pool
from nnunetv2_ext.data.unlabelled import UnlabelledStream
from nnunetv2_ext.rada.batches import JoinedStream
from nnunetv2_ext.rada.propagation.propagate import NONE
from nnunetv2_ext.rada.views import INSIDE
from tests.conftest import TinyDataset
from tests.rada.trainers import IGNORE, log_of

pytestmark = pytest.mark.usefixtures("no_pictures")
POOL = "rada.unlabelled=true rada.min_labelled=2"  # which leaves the cases without annotation out


@pytest.fixture(scope="module")
def pooled(sparse_tiny: TinyDataset, tmp_path_factory: pytest.TempPathFactory) -> TinyDataset:
    """The sparse dataset with a pool of two images."""
    root = tmp_path_factory.mktemp("pooled")
    shutil.copytree(sparse_tiny.raw, root / "raw", symlinks=True)
    shutil.copytree(sparse_tiny.preprocessed, root / "preprocessed")
    dataset = TinyDataset(root, sparse_tiny.dataset_id, sparse_tiny.name)
    (root / "scans").mkdir()
    for number, file in enumerate(sorted(dataset.images_ts.glob("*_0000.nii.gz"))):
        sitk.WriteImage(sitk.ReadImage(str(file)) * 1.5, str(root / "scans" / f"new_{number}_0000.nii.gz"))
    with pytest.MonkeyPatch.context() as patch:
        for key, value in dataset.environment(root / "results").items():
            patch.setenv(key, value)
        fill_pool(dataset.dataset_id, "3d_fullres", "tiny", root / "scans", say=lambda line: None)
    return dataset


def started(make_rada: Any, pooled: TinyDataset, settings: str = "") -> Any:
    trainer = make_rada(f"{POOL} {settings}", dataset=pooled)
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    return trainer


def test_a_batch_is_all_labelled_and_as_many_patches_of_the_pool(make_rada, pooled) -> None:
    trainer = started(make_rada, pooled)
    assert said_of(trainer) == "RADA draws for each batch 2 patches of 3 labelled cases, and 2 of the pool."
    loader = pickle.loads(pickle.dumps(trainer.dataloader_train.data_loader))  # as a spawned worker gets it
    loader.set_thread_id(0)
    for batch in (next(trainer.dataloader_train), next(loader)):
        keys, target = list(batch["keys"]), batch["target"]
        assert set(keys[:2]) <= trainer.labelled_cases and set(keys[2:]) <= {"new_0", "new_1"} and len(keys) == 4
        assert len(batch["data"]) == len(target) == 4 and "unlabelled" not in batch and target.shape[1] == 2
        assert bool((target[2:, 0] == IGNORE).all()) and bool((target[:2, 0] != IGNORE).any())
        assert set(target[2:, 1].unique().tolist()) <= {0, INSIDE} and bool((target[2:, 1] == INSIDE).any())
        assert batch["data"][2:].std() > 0.1


def said_of(trainer: Any) -> str:
    [line] = [line for line in log_of(trainer).splitlines() if "RADA draws" in line]
    return line.partition(": ")[2].strip()


def test_what_the_pool_holds_moves_the_networks_by_the_others_lessons(make_rada, pooled) -> None:
    moved = []
    for change in (0.0, 1.0):
        trainer = started(make_rada, pooled, "rada.lambda_max=0.5 num_epochs=2 seed=4")
        trainer.global_step = 5
        batch = next(trainer.dataloader_train)
        noise = torch.randn(batch["data"][2:].shape, generator=torch.Generator().manual_seed(1))
        batch["data"][2:] += change * noise
        figures = trainer.train_step(batch)
        assert {"supervised_1", "co_training_1", "co_training_2", "co_training_3"} <= set(figures)
        moved.append(torch.cat([p.detach().flatten() for p in trainer.network.parameters()]))
    assert not torch.equal(*moved)
    trainer.last_batch = batch
    assert trainer.directions_of_case("new_0") is not None  # so the panel stands upright
    trainer.draw_panel(Path(trainer.output_folder) / "panel.png")
    assert (Path(trainer.output_folder) / "panel.png").stat().st_size > 10_000


def test_a_continued_training_keeps_the_cases_of_the_pool(make_rada, pooled) -> None:
    trainer = started(make_rada, pooled)
    trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_latest.pth"))
    latest = Path(trainer.output_folder) / "checkpoint_latest.pth"
    states = read(latest)[EXTENSION_KEY]["methods"]
    assert states["unlabelled"] == {"cases": ["new_0", "new_1"]} and set(states["rada"]) == {"clip", "figures"}
    again = make_rada(POOL, dataset=pooled, continued=True)
    again.load_checkpoint(str(latest))
    again._unlabelled = ["new_0", "gone"]
    with pytest.raises(ValueError, match="started with 2 unlabelled cases, of which gone is gone"):
        again.on_train_start()


def test_without_a_pool_and_with_another_source_it_says_so(make_rada, sparse_tiny) -> None:
    trainer = make_rada(POOL, dataset=sparse_tiny)
    with pytest.raises(ValueError, match="has no unlabelled cases for 3d_fullres: run nnUNetv2_ext unlabelled -d 002"):
        trainer.on_train_start()
    with pytest.raises(ValueError, match=r"rada\.unlabelled"):
        make_rada("rada.unlabelled=rest train_cases=2").initialize()


def test_nothing_is_propagated_in_patches_of_the_pool() -> None:
    class Labelled:
        def __next__(self) -> dict[str, Any]:
            target = torch.zeros(1, 8, 4, 4, 4, dtype=torch.int16)
            return {"data": torch.zeros(1, 1, 4, 4, 4), "target": target, "keys": np.array(["a"])}

    class Unlabelled:
        def __next__(self) -> dict[str, Any]:
            target = torch.ones(2, 1, 4, 4, 4, dtype=torch.int16)
            target[:, :, 0] = 0  # turned in by the augmentation
            return {"data": torch.ones(2, 1, 4, 4, 4), "target": target, "keys": np.array(["b", "c"])}

    batch = next(JoinedStream(UnlabelledStream(Labelled(), Unlabelled()), IGNORE))  # type: ignore[arg-type]
    assert list(batch["keys"]) == ["a", "b", "c"] and batch["data"][:, 0, 0, 0, 0].tolist() == [0, 1, 1]
    target = batch["target"]
    assert bool((target[0] == 0).all()) and bool((target[1:, [0, 2, 3, 4]] == IGNORE).all())
    assert bool((target[1:, 1, 0] == 0).all()) and bool((target[1:, 1, 1:] == INSIDE).all())
    assert bool((target[1:, 5:] == NONE).all()) and target.dtype == torch.int16
