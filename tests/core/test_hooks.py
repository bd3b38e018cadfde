"""What a method may hook into: each hook does what its contract says, and misuse is told in one line."""

from __future__ import annotations

import inspect
import math
import re
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.primus.primus_trainers import AbstractPrimus
from nnunetv2.training.nnUNetTrainer.variants.lr_schedule.nnUNetTrainerCosAnneal import nnUNetTrainerCosAnneal
from pydantic import Field
from torch import nn

from nnunetv2_ext.core.checkpoint import EXTENSION_KEY, read, unwrap
from nnunetv2_ext.core.compat import clip_norm_in
from nnunetv2_ext.core.hooks import HOOKS, MethodHooks
from nnunetv2_ext.core.settings import Settings, from_model_folder, settings_model
from nnunetv2_ext.core.step import Batch, LossPass, Passes, Term
from nnunetv2_ext.core.trainer import ExtTrainer

pytestmark = pytest.mark.usefixtures("no_pictures")
CPU = torch.device("cpu")


# ---- the table


def test_there_are_at_most_fifteen_hooks_and_each_says_what_it_is():
    assert len(HOOKS) <= 15
    for name in HOOKS:
        hook = vars(MethodHooks)[name]
        if callable(hook) or isinstance(hook, classmethod):
            assert len(inspect.getdoc(getattr(MethodHooks, name)) or "") > 20, name
        else:
            assert f"{name}:" in inspect.getdoc(MethodHooks)
    assert {"method_settings", "make_train_loader", "export_weights"} < set(HOOKS)


def test_contributing_names_exactly_these_hooks():
    text = (Path(__file__).resolve().parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^ *\| (`.+?`) \|", text, flags=re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`(\w+)[^`]*`", row)]
    assert sorted(named) == sorted(HOOKS)


# ---- training modules


class WithHead(ExtTrainer):
    """A head on the logits that is needed in training only."""

    def build_training_modules(self) -> dict[str, nn.Module]:
        torch.manual_seed(1)
        return {**super().build_training_modules(), "head": nn.Conv2d(3, 2, 1)}

    def loss_passes(self, batch: Batch) -> Passes:
        return super().loss_passes(batch).before("supervised", LossPass("head", lambda: self.head_terms(batch)))

    def head_terms(self, batch: Batch) -> dict[str, Term]:
        output = self.forward(batch)
        top = output[0] if isinstance(output, list) else output
        return {"head": Term((self.training_modules["head"](top) ** 2).mean(), 0.5)}


def trained(make_trainer, fixed_batches, steps: int, cls: type = WithHead, settings: str = "seed=4") -> Any:
    trainer = make_trainer(cls, settings, "2d")
    trainer.initialize()
    for batch in fixed_batches(trainer, steps):
        trainer.train_step(batch)
    return trainer


def head(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.training_modules["head"].state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_training_module_is_stepped_zeroed_and_clipped_as_one_with_the_network(make_trainer, fixed_batches):
    trainer = trained(make_trainer, fixed_batches, 3, settings="seed=4 clip_norm=0.01")
    oracle = make_trainer(WithHead, "seed=4", "2d")
    oracle.initialize()
    network, module = oracle.network, oracle.training_modules["head"]
    parameters = [*network.parameters(), *module.parameters()]
    optimiser = torch.optim.SGD(parameters, 1e-2, weight_decay=3e-5, momentum=0.99, nesterov=True)
    for batch in fixed_batches(oracle, 3):
        optimiser.zero_grad()
        (0.5 * (module(network(batch["data"])[0]) ** 2).mean()).backward()
        oracle.loss(network(batch["data"]), batch["target"]).backward()
        norm = nn.utils.clip_grad_norm_(parameters, 0.01)
        assert norm > 0.01, "the clipping must matter"
        optimiser.step()
    assert equal(head(trainer), dict(module.state_dict()))
    assert equal(dict(trainer.network.state_dict()), dict(network.state_dict()))


def test_under_amp_a_training_module_is_unscaled_clipped_and_skipped_with_the_network(make_trainer, fixed_batches):
    plain = trained(make_trainer, fixed_batches, 3, settings="seed=4 clip_norm=0.01")
    scaled = make_trainer(WithHead, "seed=4 clip_norm=0.01", "2d")
    scaled.initialize()
    scaled.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for batch in fixed_batches(scaled, 3):
        scaled.train_step(batch)
    # a power of two leaves the digits alone, so a gradient that stayed scaled or unclipped would show
    assert equal(head(scaled), head(plain))
    assert equal(dict(scaled.network.state_dict()), dict(plain.network.state_dict()))
    before = head(scaled), {name: value.clone() for name, value in scaled.network.state_dict().items()}
    scaled.training_modules["head"].weight.register_hook(lambda gradient: gradient * math.inf)
    (batch,) = fixed_batches(scaled, 1)
    scaled.train_step(batch)
    assert equal(head(scaled), before[0]) and equal(dict(scaled.network.state_dict()), before[1])
    assert scaled.grad_scaler.get_scale() == 2.0**9


def test_a_compiled_training_module_learns_the_same_and_keeps_its_names(make_trainer, fixed_batches, monkeypatch):
    plain = trained(make_trainer, fixed_batches, 2)
    real, compiled = torch.compile, []

    def by_dynamo_alone(model: Any, **options: Any) -> Any:  # generating code would take a minute
        compiled.append(getattr(model, "__self__", model))
        return real(model, **{**options, "backend": "eager"})

    monkeypatch.setattr(torch, "compile", by_dynamo_alone)
    monkeypatch.setattr(nnUNetTrainer, "_do_i_compile", lambda self: True)
    trainer = trained(make_trainer, fixed_batches, 2)
    assert trainer.training_modules["head"] in compiled
    assert trainer.training_modules["head"]._compiled_call_impl is not None
    assert equal(head(trainer), head(plain))


def test_a_training_module_is_not_in_the_network_and_follows_its_mode(make_trainer, fixed_batches, tmp_path):
    trainer = trained(make_trainer, fixed_batches, 1)
    trainer.save_checkpoint(str(tmp_path / "checkpoint_latest.pth"))
    checkpoint = read(tmp_path / "checkpoint_latest.pth")
    stock = make_trainer(ExtTrainer, "", "2d")
    stock.initialize()
    assert checkpoint["network_weights"].keys() == stock.network.state_dict().keys()
    assert equal(checkpoint[EXTENSION_KEY]["training_modules"]["head"], head(trainer))
    trainer.on_validation_epoch_start()
    assert not trainer.training_modules["head"].training
    trainer.on_train_epoch_start()
    assert trainer.training_modules["head"].training


def test_a_training_module_goes_on_where_it_was_saved(make_trainer, fixed_batches, tmp_path):
    whole = trained(make_trainer, fixed_batches, 4)
    half = trained(make_trainer, fixed_batches, 2)
    half.save_checkpoint(str(tmp_path / "checkpoint_latest.pth"))
    assert not equal(head(half), head(whole))
    again = make_trainer(WithHead, "", "2d", continued=True)
    again.load_checkpoint(str(tmp_path / "checkpoint_latest.pth"))
    for batch in fixed_batches(again, 4)[2:]:
        again.train_step(batch)
    assert equal(head(again), head(whole))
    assert equal(dict(again.network.state_dict()), dict(whole.network.state_dict()))


def test_a_training_module_starts_fresh_from_a_checkpoint_without_it(make_trainer, fixed_batches, tmp_path, capsys):
    plain = trained(make_trainer, fixed_batches, 2, cls=ExtTrainer)
    path = tmp_path / "checkpoint_latest.pth"
    plain.save_checkpoint(str(path))
    trainer = make_trainer(WithHead, "", "2d", continued=True)
    trainer.initialize()
    fresh = head(trainer)
    trainer.load_checkpoint(str(path))
    assert "has no 'head', it starts fresh" in capsys.readouterr().out
    assert equal(head(trainer), fresh)
    for batch in fixed_batches(trainer, 1):
        trainer.train_step(batch)
    assert not equal(head(trainer), fresh), "its group is still in the optimiser"
    stock = read(path)  # as plain nnU-Net writes it
    del stock[EXTENSION_KEY]
    torch.save(stock, path.with_name("plain.pth"))  # the file that was read is memory-mapped
    again = make_trainer(WithHead, "", "2d", continued=True)
    again.load_checkpoint(str(path.with_name("plain.pth")))
    assert len(again.optimizer.param_groups) == 2


def test_another_module_than_the_checkpoints_is_refused(make_trainer, fixed_batches, tmp_path):
    class Wider(WithHead):
        def build_training_modules(self):
            return {"head": nn.Conv2d(3, 5, 1)}

    trained(make_trainer, fixed_batches, 1).save_checkpoint(str(tmp_path / "checkpoint_latest.pth"))
    trainer = make_trainer(Wider, "", "2d", continued=True)
    with pytest.raises(ValueError, match=r"Wider: 'head' of the checkpoint is another module: weight is"):
        trainer.load_checkpoint(str(tmp_path / "checkpoint_latest.pth"))


@pytest.mark.parametrize("shares", ["network", "each other"])
def test_a_shared_parameter_names_method_and_hook(make_trainer, shares):
    class Sharing(ExtTrainer):
        def build_training_modules(self):
            layer = nn.Conv2d(3, 2, 1)
            own = unwrap(self.network).decoder.seg_layers if shares == "network" else nn.Sequential(layer)
            return {"first": nn.Sequential(layer), "second": own}

    trainer = make_trainer(Sharing, "", "2d")
    with pytest.raises(ValueError, match=r"Sharing: build_training_modules: 'second' shares its parameter .* with "):
        trainer.initialize()


def test_what_is_not_a_module_names_method_and_hook(make_trainer):
    class Wrong(ExtTrainer):
        def build_training_modules(self):
            return {"head": [nn.Conv2d(3, 2, 1)]}

    trainer = make_trainer(Wrong, "", "2d")
    with pytest.raises(ValueError, match=r"Wrong: build_training_modules: 'head' is a list, not a torch.nn.Module"):
        trainer.initialize()


# ---- passes


def named(*names: str) -> Passes:
    return Passes([LossPass(name, dict) for name in names], "MyTrainer")


def test_passes_are_placed_by_name():
    passes, mine = named("teacher", "supervised"), LossPass("mine", dict)
    assert passes.before("supervised", mine).names == ("teacher", "mine", "supervised")
    assert passes.first(mine).names == ("mine", "teacher", "supervised")
    assert passes.replaced("supervised", mine, LossPass("other", dict)).names == ("teacher", "mine", "other")
    assert passes.replaced("teacher").names == ("supervised",)
    assert passes.weighted("supervised", 0.5)["supervised"].weight == 0.5
    assert passes.names == ("teacher", "supervised"), "each method returns a new one"
    assert [p.name for p in passes] == [passes[0].name, passes[-1].name]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: named("a", "b", "a"), "MyTrainer: loss_passes has two passes called 'a'; give yours another name"),
        (lambda: named("a").first(LossPass("a", dict)), "MyTrainer: loss_passes has two passes called 'a'"),
        (lambda: named("a", "b").before("c"), "MyTrainer: loss_passes has no pass called 'c'; it has a, b"),
    ],
)
def test_a_pass_named_twice_or_not_there_names_method_and_hook(wrong, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        wrong()


# ---- extras and the loader


class BoxLoader(nnUNetDataLoader):
    """A loader that says more than nnU-Net's."""

    def generate_train_batch(self) -> dict[str, Any]:
        batch = super().generate_train_batch()
        size = len(batch["keys"])
        other = {"data": torch.ones(3, 1), "keys": ["u1", "u2", "u3"]}
        return batch | {"places": torch.arange(size), "notes": [f"n{i}" for i in range(size)], "unlabelled": other}


class WithExtras(ExtTrainer):
    seen: Batch | None = None

    def make_train_loader(self, dataset: Any, **nnunet_arguments: Any) -> BoxLoader:
        return BoxLoader(dataset, **nnunet_arguments)

    def loss_passes(self, batch: Batch) -> Passes:
        self.seen = batch
        return super().loss_passes(batch)


def test_what_the_loader_adds_reaches_the_passes(make_trainer):
    trainer = make_trainer(WithExtras, "", "2d")
    trainer.initialize()
    train, validation = trainer.get_dataloaders()
    trainer.train_step(next(train))
    batch = trainer.seen
    assert batch is not None and set(batch.extras) == {"places", "notes", "unlabelled"}
    one = batch.select([1])
    assert one.extra("places").tolist() == [1] and one.extra("notes") == ["n1"]
    assert one.extra("unlabelled")["data"].shape == (3, 1), "another stream has rows of its own"
    assert one.with_data(one.data).extras == one.extras
    with pytest.raises(
        ValueError, match=r"WithExtras: the batch has no 'boxes' \(it has .*places.*\); .*make_train_loader"
    ):
        batch.extra("boxes")
    assert set(next(validation)) == {"data", "target", "keys"}


# ---- the score


class Scored(ExtTrainer):
    """Scores as told, epoch by epoch."""

    told: ClassVar[list[float | None]] = []

    def validation_score(self, outputs: Any) -> float | None:
        super().validation_score(outputs)
        return self.told[self.current_epoch]


def run(make_trainer, cls: type, settings: str) -> tuple[Any, Path]:
    trainer = make_trainer(cls, f"num_iterations_per_epoch=1 {settings}", "2d")
    trainer.run_training()
    return trainer, Path(trainer.output_folder)


def test_the_best_checkpoint_and_the_log_go_by_a_methods_own_score(make_trainer, monkeypatch):
    monkeypatch.setattr(Scored, "told", [1.0, 5.0, math.nan, -20.0])
    _, folder = run(make_trainer, Scored, "num_epochs=4")
    best = read(folder / "checkpoint_best.pth")
    assert best["current_epoch"] == 2 and best["_best_ema"] == pytest.approx(0.9 * 1 + 0.1 * 5)
    lines = (folder / "epochs.csv").read_text().splitlines()
    column = lines[0].split(",").index("validation_score/moving_average")
    averages = [line.split(",")[column] for line in lines[1:]]
    assert [float(value) for value in averages] == pytest.approx([1.0, 1.4, 1.4, 1.4 * 0.9 - 2])


def test_early_stop_goes_by_a_methods_own_score(make_trainer, monkeypatch):
    monkeypatch.setattr(Scored, "told", [3.0, 2.0, math.nan, 1.0, 9.0, 9.0])
    trainer, _ = run(make_trainer, Scored, "num_epochs=6 early_stop_patience=2")
    assert trainer.current_epoch == 4, "the epoch that says nothing does not count"


def test_a_training_without_score_has_no_best_checkpoint_and_does_not_stop_early(make_trainer, monkeypatch):
    monkeypatch.setattr(Scored, "told", [None] * 3)
    trainer, folder = run(make_trainer, Scored, "num_epochs=3 early_stop_patience=1")
    assert trainer.current_epoch == 3
    assert {p.name for p in folder.glob("checkpoint_*")} == {"checkpoint_final.pth"}


class WithoutDice(ExtTrainer):
    """Learns without labels: nothing of nnU-Net's validation is there."""

    needs_foreground: ClassVar[bool] = False

    def loss_passes(self, batch: Batch) -> Passes:
        plain = super().loss_passes(batch)
        return plain.replaced("supervised", LossPass("restore", lambda: {"restore": self._term(batch)}))

    def _term(self, batch: Batch) -> Term:
        return Term(sum((output.float() ** 2).mean() for output in self.forward(batch)))

    def validation_step(self, batch: dict) -> dict:
        return {"loss": np.array(0.25)}

    def validation_score(self, outputs: Any) -> float | None:
        return -float(np.mean([output["loss"] for output in outputs])) if outputs else None


def test_a_training_without_any_dice_runs_to_its_end(make_trainer):
    trainer, folder = run(make_trainer, WithoutDice, "num_epochs=2")
    assert read(folder / "checkpoint_best.pth")["_best_ema"] == -0.25
    assert trainer.logger.get_value("val_losses", step=None) == [0.25, 0.25]


def test_without_validation_batches_there_is_no_score(make_trainer):
    _, folder = run(make_trainer, ExtTrainer, "num_epochs=2 num_val_iterations_per_epoch=0")
    assert (folder / "checkpoint_final.pth").is_file() and not (folder / "checkpoint_best.pth").exists()


def test_one_epoch_without_foreground_does_not_end_the_search_for_the_best(make_trainer, monkeypatch):
    values = iter([0.5, math.nan, 0.9])

    def log(self, outputs):
        self.logger.log("mean_fg_dice", next(values), self.current_epoch)
        self.logger.log("dice_per_class_or_region", [0.0], self.current_epoch)
        self.logger.log("val_losses", 0.0, self.current_epoch)

    monkeypatch.setattr(nnUNetTrainer, "on_validation_epoch_end", log)
    _, folder = run(make_trainer, ExtTrainer, "num_epochs=3")
    best = read(folder / "checkpoint_best.pth")
    assert best["current_epoch"] == 3 and best["_best_ema"] == pytest.approx(0.5 * 0.9 + 0.09)


def test_labels_without_foreground_are_refused_only_where_they_are_needed(make_trainer, monkeypatch):
    monkeypatch.setattr(
        "nnunetv2.training.dataloading.nnunet_dataset.nnUNetDatasetBlosc2.load_case",
        lambda self, case: (None, None, None, {"class_locations": {1: []}}),
    )
    for cls, refuses in ((ExtTrainer, True), (WithoutDice, False)):
        trainer = make_trainer(cls, "", "2d")
        trainer.initialize()
        if refuses:
            with pytest.raises(ValueError, match="has a foreground voxel"):
                trainer.get_tr_and_val_datasets()
        else:
            assert trainer.get_tr_and_val_datasets()[0].identifiers


# ---- checkpoints that are kept


def test_keep_every_keeps_and_a_new_start_sets_them_aside(make_trainer):
    _, folder = run(make_trainer, ExtTrainer, "num_epochs=3 keep_every=2")
    assert [p.name for p in folder.glob("checkpoint_epoch_*")] == ["checkpoint_epoch_0002.pth"]
    assert read(folder / "checkpoint_epoch_0002.pth")["current_epoch"] == 2
    run(make_trainer, ExtTrainer, "num_epochs=1")
    assert not list(folder.glob("checkpoint_epoch_*"))
    assert (folder / "previous_checkpoint_epoch_0002.pth").is_file()


# ---- another base trainer


class PrimusWithSettings(ExtTrainer, AbstractPrimus):
    """nnU-Net's Primus trainer with a network of the tests' size."""

    @staticmethod
    def build_network_architecture(
        plans_manager: Any, configuration_manager: Any, inputs: int, outputs: int, enable_deep_supervision: bool = True
    ) -> nn.Module:
        return nnUNetTrainer.build_network_architecture(plans_manager, configuration_manager, inputs, outputs, False)


def test_a_base_trainers_own_values_survive_unless_set(make_trainer, fixed_batches):
    trainer = make_trainer(PrimusWithSettings, "", "2d")
    trainer.initialize()
    trainer.on_train_epoch_start()
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    assert trainer.settings.initial_lr == trainer.initial_lr == 3e-4
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {5e-2}
    assert trainer.clip_norm == 1 and trainer.resolved.sources["initial_lr"] == "base trainer"
    before = [p.detach().clone() for p in trainer.network.parameters()]
    assert trainer.train_step(fixed_batches(trainer, 1)[0])["grad_norm"] > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.network.parameters()))
    other = make_trainer(PrimusWithSettings, "initial_lr=0.5 weight_decay=0.25 clip_norm=7", "2d")
    assert (other.initial_lr, other.weight_decay, other.clip_norm) == (0.5, 0.25, 7)


def test_the_clipping_of_a_base_trainer_bounds_the_step(make_trainer, fixed_batches):
    trainer = make_trainer(PrimusWithSettings, "", "2d")
    trainer.initialize()
    trainer.loss = lambda output, target: 1e4 * output.square().sum()
    norms = []
    trainer.optimizer.step = lambda: norms.append(
        torch.linalg.vector_norm(
            torch.stack([p.grad.norm() for p in trainer.network.parameters() if p.grad is not None])
        )
    )
    assert trainer.train_step(fixed_batches(trainer, 1)[0])["grad_norm"] > 1
    assert float(norms[0]) == pytest.approx(1, rel=1e-3)


def test_a_base_trainer_can_be_continued(make_trainer, fixed_batches, tmp_path):
    trainer = make_trainer(PrimusWithSettings, "", "2d")
    trainer.initialize()
    trainer.train_step(fixed_batches(trainer, 1)[0])
    trainer.save_checkpoint(str(tmp_path / "checkpoint_latest.pth"))
    again = make_trainer(PrimusWithSettings, "", "2d", continued=True)
    again.load_checkpoint(str(tmp_path / "checkpoint_latest.pth"))
    assert equal(dict(again.network.state_dict()), dict(trainer.network.state_dict()))
    assert again.settings.initial_lr == 3e-4


def test_the_norm_is_read_from_nnunets_own_steps():
    assert clip_norm_in(nnUNetTrainer.train_step) == 12 == clip_norm_in(AbstractPrimus.train_step) * 12
    assert clip_norm_in(len) is None
    assert clip_norm_in(lambda p: nn.utils.clip_grad_norm_(p, max(1, 2))) is None


# ---- settings of other versions


class Today(Settings):
    RENAMED: ClassVar[dict[str, str]] = {"old_ratio": "toy.ratio", "file": "init_from"}
    ratio: float = Field(0.5, ge=0, le=1)


def test_unknown_and_renamed_keys_of_a_model_folder_do_not_stop_a_prediction(recwarn):
    assert from_model_folder({"old_ratio": 0.25, "file": "x"}, Today, "toy").ratio == 0.25
    assert not recwarn.list, "a renamed key is known"
    with pytest.warns(UserWarning, match=r"another version of nnunetv2-ext: its toy.depth, toy.width mean nothing"):
        assert from_model_folder({"ratio": 0.75, "depth": 3, "width": 1}, Today, "toy").ratio == 0.75
    with pytest.raises(ValueError, match=r"toy\.ratio='many', which this version .* does not know"):
        from_model_folder({"ratio": "many"}, Today, "toy")


class Longer(ExtTrainer):
    default_settings: ClassVar = {"num_epochs": 7, "save_every": 3}


class Slower(ExtTrainer):
    default_settings: ClassVar = {"num_epochs": 9, "initial_lr": 0.5}


class LongerAndSlower(Longer, Slower):
    default_settings: ClassVar = {"save_every": 5}


def test_defaults_of_all_base_classes_count_and_the_nearest_wins():
    assert LongerAndSlower.trainer_defaults() == {"num_epochs": 7, "initial_lr": 0.5, "save_every": 5}
    assert ExtTrainer.trainer_defaults() == {} and Longer.trainer_defaults() == Longer.default_settings


class Moved(Settings):
    """Two keys went to other places, and this block has fields of the names that they have there."""

    RENAMED: ClassVar[dict[str, str]] = {"file": "init_from", "mask": "other.ratio"}
    init_from: str = "ours"
    ratio: float = 0.5


def test_a_key_that_moved_to_another_block_is_not_taken_for_a_field_of_this_one(recwarn):
    assert from_model_folder({"file": "x", "mask": 0.1}, Moved, "toy") == Moved()
    assert not recwarn.list
    assert from_model_folder({"file": "x", "init_from": "y", "ratio": 0.2}, Moved, "toy") == Moved(
        init_from="y", ratio=0.2
    )


def test_renamed_keys_are_taken_where_a_user_writes_them():
    from nnunetv2_ext.core.resolve import resolve, resume

    model = settings_model("T", {"toy": Today})
    now = resolve(model, environment="toy.old_ratio=0.125")
    assert now.settings.toy.ratio == 0.125 and now.sources["toy.ratio"] == "nnUNet_ext_settings"
    with pytest.raises(ValueError, match=r"sets 'toy.old_ratio' and 'toy.ratio'.*keep 'toy.ratio'"):
        resolve(model, environment="toy.old_ratio=0.125 toy.ratio=0.5")
    saved = resume(model, {"toy.old_ratio": 0.25, "toy.gone": 1}, resolve(model, environment=""), strict=True)
    assert saved.settings.toy.ratio == 0.25


# ---- found by a hostile reader


def test_early_stop_without_validation_is_refused_and_without_a_score_is_said(make_trainer, monkeypatch, capsys):
    with pytest.raises(ValueError, match="early_stop_patience goes by the validation score, and num_val_iterations"):
        make_trainer(ExtTrainer, "num_val_iterations_per_epoch=0 early_stop_patience=3", "2d")
    monkeypatch.setattr(Scored, "told", [None] * 2)
    run(make_trainer, Scored, "num_epochs=2 early_stop_patience=1")
    assert capsys.readouterr().out.count("early_stop_patience has no effect") == 1


def test_continuing_warns_of_settings_it_does_not_know():
    from nnunetv2_ext.core.resolve import resolve, resume

    model = settings_model("T", {"toy": Today})
    with pytest.warns(UserWarning, match=r"does not know the checkpoint's toy\.depth: passed over"):
        resume(model, {"toy.depth": 1, "toy.ratio": 0.25}, resolve(model, environment=""), strict=True)
    both = resume(model, {"toy.ratio": 0.25, "toy.old_ratio": 0.75}, resolve(model, environment=""), strict=True)
    assert both.settings.toy.ratio == 0.25, "the name of today counts"


class CosineWithHead(WithHead, nnUNetTrainerCosAnneal):
    """A base trainer whose scheduler keeps a rate per group from its start."""


def test_a_schedulers_own_rates_reach_the_training_modules(make_trainer, fixed_batches):
    trainer = make_trainer(CosineWithHead, "", "2d")
    trainer.initialize()
    trainer.train_step(fixed_batches(trainer, 1)[0])
    trainer.lr_scheduler.step(trainer.num_epochs // 2)
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    assert len(rates) == 2 and rates[0] == rates[1] < trainer.initial_lr


class PrimusWithHead(WithHead, PrimusWithSettings):
    """Configures its optimiser again while it loads a checkpoint."""


def test_a_base_that_configures_again_takes_up_a_checkpoint_without_the_head(make_trainer, fixed_batches, tmp_path):
    plain = trained(make_trainer, fixed_batches, 1, cls=PrimusWithSettings, settings="")
    plain.save_checkpoint(str(tmp_path / "checkpoint_latest.pth"))
    trainer = make_trainer(PrimusWithHead, "", "2d", continued=True)
    trainer.load_checkpoint(str(tmp_path / "checkpoint_latest.pth"))
    assert [group.get("name") for group in trainer.optimizer.param_groups] == [None, "training_modules"]
    before = head(trainer)
    trainer.train_step(fixed_batches(trainer, 1)[0])
    assert not equal(before, head(trainer))


def test_building_modules_leaves_nnunets_random_stream_alone(make_trainer):
    class Random(ExtTrainer):
        def build_training_modules(self):
            assert self.generator is not None
            return {"head": nn.Linear(4, 4)}

    drawn = []
    for cls in (ExtTrainer, Random):
        make_trainer(cls, "seed=3", "2d").initialize()
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)
