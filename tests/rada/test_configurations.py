"""A binary dataset in two configurations: check, a step, the validation and nnU-Net's predictor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunetv2_ext.cli.dispatch import main
from tests.conftest import TinyDataset
from tests.rada.sparse_data import make_sparse_tiny
from tests.rada.trainers import mixed_keys

pytestmark = pytest.mark.usefixtures("no_pictures")

SPACING = {"3d_fullres": 1.0, "3d_lowres": 1.5}
IGNORE = 2  # one organ


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> TinyDataset:
    """Six phantoms of one organ, three labelled and one for testing; 3d_fullres and 3d_lowres."""
    options = {"num_train": 6, "num_organs": 1}
    return make_sparse_tiny(tmp_path_factory.mktemp("binary"), labelled=3, lowres=SPACING["3d_lowres"], **options)


@pytest.mark.parametrize("configuration", list(SPACING))
@pytest.mark.parametrize("semantics", ["off", "learned"])
def test_check_train_validate_and_predict(make_rada, binary, capsys, configuration: str, semantics: str) -> None:
    trainer = make_rada(f"rada.semantics={semantics} rada.min_voxels=4", dataset=binary, configuration=configuration)
    if semantics == "off":
        assert main(["check-planes", "-d", "2", "-c", configuration, "-p", "tiny", "--cases", "0"]) == 0
        out = capsys.readouterr().out
        assert "total: 3 labelled and 2 unlabelled cases" in out and "preprocessing erased" not in out
        assert "planes of the raw labels are found in the preprocessed ones" in out
    trainer.on_train_start()
    assert trainer.configuration_manager.spacing == [SPACING[configuration]] * 3
    assert trainer.label_manager.num_segmentation_heads == 2 and trainer.ignore_label == IGNORE
    assert trainer.masks == (0b011, 0b101, 0b110)
    trainer.on_train_epoch_start()
    before = [p.detach().clone() for p in trainer.network.parameters()]
    batch = next(trainer.dataloader_train)
    assert set(batch["target"][:, 0].unique().tolist()) <= {0, 1, IGNORE}
    figures = trainer.train_step(batch)
    assert all(np.isfinite(value) for value in figures.values())
    assert {"supervised_1", "supervised_2", "supervised_3", "co_training_1"} <= figures.keys()
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.network.parameters(), strict=True))
    with torch.no_grad():
        trainer.on_validation_epoch_start()
        found = trainer.validation_step(next(trainer.dataloader_val))
    assert np.isfinite(found["loss"]) and len(found["tp_hard"]) == 1
    assert int(found["tp_hard"][0] + found["fn_hard"][0]) > 0  # annotated organ was seen
    trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    _predicts(Path(trainer.output_folder_base), binary)
    assert mixed_keys(trainer)


def _predicts(model: Path, dataset: TinyDataset) -> None:
    """In the image's own grid, with labels of the dataset and no ignore."""
    predictor = nnUNetPredictor(device=torch.device("cpu"), use_mirroring=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (0,), "checkpoint_final.pth")
    file = next(dataset.images_ts.glob("*.nii.gz"))
    image = sitk.ReadImage(str(file))
    volume, spacing = sitk.GetArrayFromImage(image)[None].astype(np.float32), image.GetSpacing()[::-1]
    found = predictor.predict_single_npy_array(volume, {"spacing": list(spacing)}, None, None, False)
    assert found.shape == volume.shape[1:] and set(np.unique(found)) <= {0, 1}
