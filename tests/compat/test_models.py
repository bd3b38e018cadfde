"""Trainings that commit c9702fb left predict as they did, train on as they would have, and export."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.run import run_training

from nnunetv2_ext.cli import main
from nnunetv2_ext.core.checkpoint import read
from tests.compat import make_models as made

pytestmark = pytest.mark.usefixtures("no_pictures")
IMAGE = made.HERE / "models" / "image" / "small_0000.nii.gz"
OURS = [name for name, model in made.MODELS.items() if model.trainer != "nnUNetTrainer"]
LOGITS = 0.02  # float16 of values up to 10, and other builds of torch
# models whose mathematics a later version changed on purpose, so that they train on differently
CHANGED: dict[str, str] = {}
# models whose network this version does not compute any more: it says so, and their export is the plain network
REFUSED = {
    "jras": "a J-RAS model of the first design.* `nnUNetv2_ext export MODEL OUT`",
    "medcontext_jras": "a J-RAS model of the first design.* `nnUNetv2_ext export MODEL OUT`",
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both datasets, preprocessed."""
    root = tmp_path_factory.mktemp("compat")
    made.recreate_datasets(root)
    return root


def expected(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(made.HERE / "models" / name / "expected.npz"))


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_refused_model_says_what_to_do_and_doing_that_predicts(name: str, data: Path, tmp_path: Path, capsys) -> None:
    model = made.MODELS[name]
    folder = made.install(name, tmp_path)
    with pytest.raises(ValueError, match=REFUSED[name]) as error:
        made.predict(folder, IMAGE)
    assert "\n" not in str(error.value)
    with made.environ(made.environment(data, tmp_path, made.Model(model.trainer))):
        trainer = run_training.get_trainer_from_args(
            model.dataset, made.CONFIGURATION, 0, model.trainer, made.PLANS, True, torch.device("cpu")
        )
        with pytest.raises(ValueError, match=REFUSED[name]):
            run_training.maybe_load_checkpoint(trainer, True, False)
    for option in ("--strip-bank", "--blank-groups"):  # what would be a model of the first design again
        assert main(["export", str(folder), str(tmp_path / "no"), option]) == 2
        assert "first design" in capsys.readouterr().err
    command = ["bank", str(folder), "-o", str(tmp_path / "no"), "-i", str(IMAGE.parent), "-l", str(IMAGE.parent)]
    assert main(command) == 2 and "first design" in capsys.readouterr().err
    command = ["guides", str(folder), str(IMAGE), "-o", str(tmp_path / "no.png"), "-chk", "checkpoint_latest.pth"]
    assert main(command) == 2
    assert "first design" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    assert main(["export", str(folder), str(tmp_path / "plain")]) == 0
    logits = made.predict(tmp_path / "plain", IMAGE)["logits"]
    # what that version predicted where no guide was found
    assert made.distance(logits, expected(name)["logits_strip_bank"]) < LOGITS


@pytest.mark.parametrize("name", [name for name in made.MODELS if name not in REFUSED])
def test_it_predicts_as_it_did(name: str, tmp_path: Path) -> None:
    found, before = made.predict(made.install(name, tmp_path), IMAGE), expected(name)
    assert made.distance(found["logits"], before["logits"]) < LOGITS
    assert (found["segmentation"] != before["segmentation"]).mean() < 0.002
    assert before["logits"].astype(np.float32).std() > 0.1 and len(np.unique(before["segmentation"])) > 1


@pytest.mark.parametrize("name", [name for name in OURS if name not in REFUSED])
def test_it_trains_on_as_it_would_have(name: str, data: Path, tmp_path: Path) -> None:
    model = made.MODELS[name]
    fold = made.install(name, tmp_path) / "fold_0"
    before = read(fold / "checkpoint_latest.pth")
    with made.environ(made.environment(data, tmp_path, model)):
        trainer = run_training.get_trainer_from_args(
            model.dataset, made.CONFIGURATION, 0, model.trainer, made.PLANS, True, torch.device("cpu")
        )
        run_training.maybe_load_checkpoint(trainer, True, False)
        assert trainer.global_step == made.STOP_AFTER
        trainer.run_training()
    after = read(fold / "checkpoint_final.pth")
    assert after["current_epoch"] == 3 and after["nnunetv2_ext"]["global_step"] == 6
    assert any(
        not torch.equal(value, after["network_weights"][key]) for key, value in before["network_weights"].items()
    )
    apart = made.rows_apart(fold / "epochs.csv", made.HERE / "models" / name / "continued.csv")
    assert {k: v for k, v in apart.items() if v > 1e-4 and not k.endswith("_ms")} == {} or name in CHANGED


@pytest.mark.parametrize(
    ("name", "export"), [(n, e) for n, exports in made.EXPORTS.items() for e in exports if n not in REFUSED]
)
def test_its_export_predicts_as_that_of_its_time(name: str, export: str, tmp_path: Path) -> None:
    model, output = made.install(name, tmp_path / "results"), tmp_path / "exported"
    assert main(["export", str(model), str(output), *made.EXPORTS[name][export]]) == 0
    logits = made.predict(output, IMAGE)["logits"]
    assert made.distance(logits, expected(name)[f"logits_{export}"]) < LOGITS
