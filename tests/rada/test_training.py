"""Class vectors, propagated planes, pictures, and a continued training that is the uninterrupted one."""

from __future__ import annotations

import json
import math
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from safetensors.torch import save_file

from nnunetv2_ext.core import randomness
from nnunetv2_ext.core.checkpoint import EXTENSION_KEY, read
from nnunetv2_ext.phantom import write_phantom_dataset
from nnunetv2_ext.rada import training
from nnunetv2_ext.rada.panel import AGREE, DISAGREE, DROPPED, pseudo_label_states
from nnunetv2_ext.rada.propagation.propagate import plane_weight
from nnunetv2_ext.rada.semantics.bank import mean_vectors, vectors_of
from nnunetv2_ext.rada.semantics.head import GATE_BOUND
from tests.conftest import TinyDataset, run_command, shrink
from tests.rada.trainers import log_of, mixed_keys, sparse_batch

pytestmark = pytest.mark.usefixtures("no_pictures")


def clip_settings(tiny_clip: Any) -> str:
    return (
        f"rada.semantics=clip rada.clip_model={tiny_clip.name} rada.clip_weights={tiny_clip.weights} rada.min_voxels=4"
    )


def started(trainer: Any) -> Any:
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    return trainer


# ---- class vectors


def test_clip_fills_the_bank_from_training_cases_alone(make_rada, tiny_clip, sparse_tiny):
    trainer = started(make_rada(clip_settings(tiny_clip)))
    bank = trainer.rada_network.bank
    cases = set(trainer.training_data.identifiers) & trainer.labelled_cases
    assert bank.is_filled and bank.text.shape == (3, 16) and len(trainer._own_vectors) == len(cases) == 3
    mean = mean_vectors(*(torch.stack(parts) for parts in zip(*trainer._own_vectors.values())))
    torch.testing.assert_close(bank.image, mean)
    vectors, valid = vectors_of(trainer._own_vectors, mixed_keys(trainer))
    assert valid[0].any() and not valid[1].any()
    assert valid[0, :, 0].all() and torch.equal(vectors[0, 0, 0], vectors[0, 1, 0])  # one background per case
    assert (sparse_tiny.preprocessed / sparse_tiny.name / "nnunetv2_ext" / "rada").is_dir()
    figures = trainer.train_step(sparse_batch(trainer, mixed_keys(trainer)))
    assert {f"align_{k}" for k in (1, 2, 3)} <= figures.keys()
    assert all(float(member.head.gate.grad) != 0 for member in trainer.rada_network.members)


def test_a_second_training_reads_the_vectors_from_disk(make_rada, tiny_clip, monkeypatch, tmp_path):
    first = started(make_rada(clip_settings(tiny_clip)))
    monkeypatch.setattr("nnunetv2_ext.rada.vector_training.load_encoder", None)  # calling it would fail
    second = started(make_rada(clip_settings(tiny_clip), results=tmp_path / "second"))
    assert torch.equal(first.rada_network.bank.image, second.rada_network.bank.image)
    assert "0 of them computed now" in log_of(second)


def test_missing_weights_stop_before_the_first_worker_with_the_ways_out(make_rada, tmp_path, monkeypatch):
    settings = f"rada.semantics=clip rada.clip_weights={tmp_path / 'nowhere.safetensors'}"
    with pytest.raises(ValueError, match=r"nowhere.safetensors"):
        make_rada(settings).on_train_start()


def test_own_vectors_are_used_at_their_rate_by_labelled_samples_only(make_rada, tiny_clip):
    from nnunetv2_ext.core.step import Batch

    for probability, used in ((0, False), (1, True)):
        trainer = started(make_rada(f"{clip_settings(tiny_clip)} rada.own_embedding_p={probability}"))
        batch = Batch.from_loader(sparse_batch(trainer, mixed_keys(trainer)), trainer.device)
        trainer.loss_passes(batch)
        assert trainer._own[2].tolist() == [used, False]
        network = trainer.rada_network
        conditioned = network.conditioning(0, *trainer._own)
        torch.testing.assert_close(conditioned[1], network.bank.in_view(0))
        assert torch.allclose(conditioned[0], network.bank.in_view(0)) != used


def test_learned_tokens_train_without_any_file(make_rada):
    trainer = started(make_rada("rada.semantics=learned rada.min_voxels=4"))
    tokens = [member.tokens.detach().clone() for member in trainer.rada_network.members]
    figures = trainer.train_step(sparse_batch(trainer, mixed_keys(trainer)))
    assert "align_1" in figures
    assert all(not torch.equal(t, m.tokens) for t, m in zip(tokens, trainer.rada_network.members))
    assert {f"rada/gate_{k}" for k in (1, 2, 3)} <= trainer.epoch_figures().keys()


def test_gates_stay_bounded_at_an_absurd_learning_rate(make_rada):
    trainer = started(make_rada("rada.semantics=learned rada.min_voxels=4 initial_lr=5"))
    heads = [member.head for member in trainer.rada_network.members]
    for gradient in (1e6, -1e6):  # clipped together with the others, which become small beside it
        hooks = [head.gate.register_hook(lambda _, g=gradient: torch.tensor(g)) for head in heads]
        for seed in range(3):
            trainer.train_step(sparse_batch(trainer, mixed_keys(trainer), seed))
        assert [float(head.gate.detach()) for head in heads] == [-math.copysign(GATE_BOUND, gradient)] * 3
        for hook in hooks:
            hook.remove()
        trainer.optimizer.state.clear()


@pytest.mark.parametrize("gate", [0.3, -1.0, 35.0])
def test_the_gate_of_an_old_checkpoint_counts_as_it_is(make_rada_net, gate):
    net, data = make_rada_net(semantics="learned").eval(), torch.randn(1, 1, 16, 16, 16)
    closed = net(data)
    weights = {name: torch.tensor(gate) if name.endswith("gate") else v for name, v in net.state_dict().items()}
    net.load_state_dict(weights)
    assert all(float(member.head.gate.detach()) == pytest.approx(gate) for member in net.members)
    maps = torch.zeros_like(closed)
    for member in net.members:  # the same with the gate written out
        tokens = member.unit_tokens()
        skips = member.network.encoder(data)
        _, features = member(data)
        maps += member.head.semantic_map(features, member.head.controlled(skips[-1], tokens, tokens[None])) / len(
            net.members
        )
    torch.testing.assert_close(net(data), closed + gate * maps)


def test_samples_with_vectors_of_their_own_teach_nobody_from_their_training_pass(make_rada, tiny_clip, monkeypatch):
    trainer = started(make_rada(f"{clip_settings(tiny_clip)} rada.own_embedding_p=1"))
    labelled, unlabelled = mixed_keys(trainer)
    calls: list[tuple[bool, bool]] = []  # of the first network: with gradient, conditioned on the bank
    network = trainer.rada_network
    original = network.forward_member

    def recorded(k, data, vectors=None):
        if k == 0:
            calls.append((torch.is_grad_enabled(), vectors is None))
        return original(k, data, vectors)

    monkeypatch.setattr(network, "forward_member", recorded)
    trainer.train_step(sparse_batch(trainer, [labelled] * 2))
    assert calls == [(False, True), (True, False)], "a pass of its own, on the bank's vectors as at prediction"
    calls.clear()
    trainer.train_step(sparse_batch(trainer, [labelled, unlabelled]))
    assert calls == [(True, False)], "the taught sample has the bank's vectors in the training pass too"


def test_prediction_needs_neither_open_clip_nor_weights(make_rada, tiny_clip, monkeypatch):
    trainer = started(make_rada(clip_settings(tiny_clip)))
    batch = sparse_batch(trainer, mixed_keys(trainer))
    trainer.train_step(batch)
    trainer.network.eval()
    weights = {name: value.clone() for name, value in trainer.network.state_dict().items()}
    for name in [name for name in sys.modules if name == "open_clip" or name.startswith("open_clip.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "open_clip", None)  # importing it fails
    network = type(trainer).build_network_architecture(
        trainer.plans_manager, trainer.configuration_manager, 1, 3, enable_deep_supervision=False
    )
    network.load_state_dict(weights)
    network.eval()
    with torch.no_grad():
        assert torch.equal(network(batch["data"]), trainer.network(batch["data"]))


# ---- propagated planes


def test_propagated_planes_reach_only_the_networks_that_do_not_hold_them(make_rada):
    trainer = started(make_rada("rada.registration=on rada.lambda_max=0"))
    batch = next(trainer.dataloader_train)
    assert batch["target"].shape[1] == 8
    key = mixed_keys(trainer)[0]
    batch = sparse_batch(trainer, [key, key])
    target = torch.full((2, 8, *batch["target"].shape[2:]), 3, dtype=torch.int16)
    target[:, 1], target[:, 5:] = 8, 255
    target[:, 4, 2:6], target[:, 7, 2:6] = 1, 2  # planes of axis 2 came two slices far
    target[0, :, :4] = 0  # padding
    batch["target"] = target
    figures = trainer.train_step(batch)
    assert float(figures["propagated_1"]) > 0  # network 1 holds axes 0 and 1
    assert float(figures["propagated_2"]) == float(figures["propagated_3"]) == 0
    moved = [
        any(float(p.grad.abs().sum()) for p in m.parameters() if p.grad is not None) for m in trainer.network.members
    ]
    assert moved == [True, False, False]


def test_the_weight_of_propagated_voxels_falls_with_distance_and_time(make_rada):
    trainer = started(make_rada("rada.registration=on rada.lambda_max=0 num_epochs=2 num_iterations_per_epoch=2"))
    key = mixed_keys(trainer)[0]
    batch = sparse_batch(trainer, [key, key])
    target = torch.full((2, 8, *batch["target"].shape[2:]), 3, dtype=torch.int16)
    target[:, 1], target[:, 5:] = 8, 255
    values = {}
    trainer.network.eval()
    for distance in (1, 3):
        for step in (0, 2):
            target[:, 4], target[:, 7] = 1, distance
            trainer.global_step = step
            terms = trainer.further_terms(
                0,
                training.Batch(batch["data"], target, (key, key)),
                trainer.rada_network.forward_member(0, batch["data"]),
                1.0,
            )
            values[distance, step] = float(terms["propagated"].value.detach())
    for (distance, step), value in values.items():
        expected = plane_weight(step / 4) ** distance / plane_weight(0)
        assert value / values[1, 0] == pytest.approx(expected, rel=1e-5)


# ---- hidden labels


def test_dense_labels_beside_the_dataset_are_never_read(make_rada, sparse_tiny, tmp_path, monkeypatch):
    losses = []
    for raw in ("there", "gone"):
        trainer = make_rada("seed=5", results=tmp_path / raw)
        if raw == "gone":
            monkeypatch.setenv("nnUNet_raw", str(tmp_path / "nothing here"))
        trainer.on_train_start()
        trainer.on_train_epoch_start()
        losses.append([float(trainer.train_step(next(trainer.dataloader_train))["loss"]) for _ in range(2)])
    assert losses[0] == losses[1]
    assert (sparse_tiny.raw / sparse_tiny.name / "labelsTr_dense").is_dir()  # it was there to be read


# ---- pictures


def test_the_state_of_pseudo_labels():
    labels = np.array([[0, 1, 1, 2, 0], [0, 1, 2, 2, 0], [1, 1, 2, 1, 0]])
    keeps = np.array([[1, 1, 1, 0, 1], [1, 0, 1, 0, 1], [0, 0, 1, 0, 1]], dtype=bool)
    unannotated = np.array([True, True, True, True, False])
    states = pseudo_label_states(labels[:, :, None, None], keeps[:, :, None, None], unannotated[:, None, None])
    assert states.ravel().tolist() == [AGREE, AGREE, DISAGREE, DROPPED, 0]


@pytest.mark.parametrize(
    "settings", ["rada.passes=1", "rada.num_networks=1 rada.lambda_max=0", "rada.labelled_share=1"]
)
def test_the_picture_is_drawn_and_leaves_the_training_alone(make_rada, tmp_path, settings):
    from PIL import Image

    trainer = started(make_rada(settings))
    trainer.train_step(next(trainer.dataloader_train))
    weights = [p.clone() for p in trainer.network.parameters()]
    trainer.draw_panel(tmp_path / "panel.png")
    with Image.open(tmp_path / "panel.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 10 and picture.width > 300
    assert trainer.network.training and all(torch.equal(a, b) for a, b in zip(weights, trainer.network.parameters()))


# ---- continuing


@pytest.mark.parametrize("semantics", ["off", "clip"])
def test_continuing_from_the_middle_of_an_epoch_equals_not_stopping(make_rada, tiny_clip, tmp_path, semantics):
    settings = "num_epochs=2 num_iterations_per_epoch=3 rada.passes=1 rada.noise_std=0.5"
    settings += f" {clip_settings(tiny_clip)}" if semantics == "clip" else ""
    whole = make_rada(settings, results=tmp_path / "whole")
    whole.run_training()

    stopped = make_rada(settings, results=tmp_path / "stopped")
    step, calls = stopped.train_step, []

    def count(batch: dict) -> dict:
        result = step(batch)
        calls.append(1)
        if len(calls) == 2:
            (Path(stopped.output_folder) / "stop").touch()
        return result

    stopped.train_step = count
    with pytest.raises(SystemExit):
        stopped.run_training()
    assert len(calls) == 2

    randomness.seed_everything(777)
    again = make_rada(settings, results=tmp_path / "stopped", continued=True)
    again.load_checkpoint(str(Path(again.output_folder) / "checkpoint_latest.pth"))
    again.run_training()
    one, other = (read(Path(t.output_folder) / "checkpoint_final.pth") for t in (whole, again))
    weights = one["network_weights"], other["network_weights"]
    assert weights[0].keys() == weights[1].keys()
    assert [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])] == []
    for name in ("train_losses", "val_losses", "mean_fg_dice"):
        np.testing.assert_array_equal(one["logging"][name], other["logging"][name])
    assert one[EXTENSION_KEY]["global_step"] == other[EXTENSION_KEY]["global_step"] == 6
    rows = [(Path(t.output_folder) / "epochs.csv").read_text().splitlines() for t in (whole, again)]
    strip = [[line.rsplit(",", 1)[0] for line in lines] for lines in rows]  # without the seconds
    assert strip[0] == strip[1] and "rada/kept_share" in rows[0][0]


def test_continuing_takes_the_bank_of_the_checkpoint_and_needs_no_weights(make_rada, tiny_clip, tmp_path, monkeypatch):
    here, there = tmp_path / "here.safetensors", tmp_path / "there.safetensors"
    shutil.copy(tiny_clip.weights, here)

    def settings(weights: Path) -> str:
        return f"{clip_settings(tiny_clip)} rada.clip_weights={weights}".replace(
            f"rada.clip_weights={tiny_clip.weights} ", ""
        )

    first = started(make_rada(settings(here)))
    first.train_step(sparse_batch(first, mixed_keys(first)))
    first.rada_network.bank.image.copy_(first.rada_network.bank.image.flip(0))  # not what the cache would give
    first.save_checkpoint(str(Path(first.output_folder) / "checkpoint_latest.pth"))

    def continued(weights: Path) -> Any:
        trainer = make_rada(settings(weights), continued=True)
        trainer.load_checkpoint(str(Path(trainer.output_folder) / "checkpoint_latest.pth"))
        trainer.on_train_start()
        return trainer

    def same(trainer: Any) -> bool:
        keys = sorted(first.labelled_cases)
        own = all(map(torch.equal, *(vectors_of(one._own_vectors, keys) for one in (trainer, first))))
        return own and torch.equal(trainer.rada_network.bank.image, first.rada_network.bank.image)

    here.rename(there)
    assert same(continued(here)) and same(continued(there))  # gone, and at another place
    other = {name: tensor + 1 if "visual" in name else tensor for name, tensor in tiny_clip.state.items()}
    save_file(other, here)
    with pytest.raises(ValueError, match=r"other CLIP weights \(rada.clip_weights: sha256:\w+ became sha256"):
        continued(here)
    here.unlink()
    monkeypatch.setattr("nnunetv2_ext.rada.vector_training.cache_root", lambda folder: tmp_path / "no cache")
    with pytest.raises(ValueError, match=r"rada.clip_weights: there is no file .*here.safetensors"):
        continued(here)
    assert same(continued(there))  # computed anew


def test_alpha_weights_reach_the_encoder_of_a_training(make_rada, tiny_clip):
    images = {}
    for region, settings in (("crop", ""), ("alpha", f" rada.alpha_weights={tiny_clip.alpha_weights}")):
        trainer = started(make_rada(clip_settings(tiny_clip) + settings))
        assert f"rada.region: {region}" in log_of(trainer)
        images[region] = trainer.rada_network.bank.image[:, 1:]
        assert bool(trainer.rada_network.bank.is_filled)
    assert "Alpha-CLIP" in log_of(trainer) and float((images["alpha"] - images["crop"]).abs().max()) > 0.01
    figures = trainer.train_step(sparse_batch(trainer, mixed_keys(trainer)))
    assert all(np.isfinite(float(figures[f"align_{k}"])) for k in (1, 2, 3))


# ---- the real commands


def test_the_real_commands_from_a_dense_dataset_to_a_score(tiny_clip, tmp_path):
    """CLIP (random here, read as real ones are) for training; prediction without open_clip; better than chance."""
    write_phantom_dataset(
        tmp_path / "raw", 1, num_train=6, num_test=0, shape=(24, 32, 24), num_organs=1, bias_field=0, noise=0.01
    )
    dataset = TinyDataset(tmp_path, 2, "Dataset002_Phantom")
    iterations = "num_epochs=1 num_iterations_per_epoch=40 num_val_iterations_per_epoch=1 panel_every=1 seed=1"
    environment = dataset.environment(
        tmp_path / "results", f"{iterations} rada.clip_model={tiny_clip.local_dir} rada.min_voxels=4"
    )

    def run(command: str, **changes: str) -> str:
        return run_command(shlex.split(command), environment | changes, tmp_path).stdout

    said = run("nnUNetv2_ext sparsify -d 1 -o 2 --labelled 3 --test-share 0.34")
    assert "3 labelled and 1 unlabelled cases, 2 for testing" in said
    run("nnUNetv2_plan_and_preprocess -d 2 -c 3d_fullres -np 1 -npfp 1", nnUNet_n_proc_DA="1")
    plans = json.loads((dataset.preprocessed / dataset.name / "nnUNetPlans.json").read_text())
    (dataset.preprocessed / dataset.name / "tiny.json").write_text(json.dumps(shrink(plans)))
    assert "all 9 planes of the raw labels are found" in run("nnUNetv2_ext check-planes -d 2 -p tiny -c 3d_fullres")
    assert (dataset.preprocessed / dataset.name / "nnunetv2_ext" / "rada" / "planes_tiny_3d_fullres.png").is_file()
    model = "-p tiny -tr nnUNetTrainerRADA -device cpu"
    run(f"nnUNetv2_train 2 3d_fullres 0 {model}")
    fold = next((tmp_path / "results").rglob("fold_0"))
    assert (fold / "panel_epoch_0000.png").is_file() and (fold / "validation" / "summary.json").is_file()
    assert "align_1" in (fold / "epochs.csv").read_text()
    blocked = tmp_path / "blocked" / "open_clip"
    blocked.mkdir(parents=True)
    (blocked / "__init__.py").write_text("raise ImportError('blocked by the test')\n")
    predict = f"nnUNetv2_predict -d 2 -c 3d_fullres -f 0 {model} -i {dataset.images_ts} -o {tmp_path / 'out'}"
    run(f"{predict} --disable_tta -npp 1 -nps 1", PYTHONPATH=str(tmp_path / "blocked"), nnUNet_ext_settings="")
    truth = dataset.raw / dataset.name / "labelsTs"
    run(f"nnUNetv2_ext evaluate {tmp_path / 'out'} {truth} -d 2 --metrics dice -o {tmp_path / 'scores'}")
    scores = json.loads((tmp_path / "scores" / "evaluation.json").read_text())
    assert len(scores["metric_per_case"]) == 2
    shares = [(sitk.GetArrayFromImage(sitk.ReadImage(str(file))) == 1).mean() for file in truth.glob("*.nii.gz")]
    everything = float(np.mean([2 * share / (1 + share) for share in shares]))  # Dice of calling all voxels organ
    assert scores["foreground_mean"]["Dice"] > everything + 0.1
