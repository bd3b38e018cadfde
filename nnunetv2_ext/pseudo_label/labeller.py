"""The model that labels a pool: which folds, what it was trained on, and why it may not label."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_ext.core.checkpoint import EXTENSION_KEY, read
from nnunetv2_ext.core.files import read_json
from nnunetv2_ext.data.fill_pool import content_hash
from nnunetv2_ext.data.find import Model, as_model, find_checkpoint, require_model
from nnunetv2_ext.data.subjects import BLOCK

PROVENANCE = "pseudo_label"  # in our block of dataset.json


@dataclass(frozen=True)
class Labeller:
    """A trained model.

    Attributes:
        model: its folder.
        plans, dataset_json: that it was trained with.
        folds: that label.
        checkpoint: file name.
        hashes: of their checkpoints, by fold.
    """

    model: Model
    plans: PlansManager
    dataset_json: dict[str, Any]
    folds: list[str]
    checkpoint: str
    hashes: dict[str, str]

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.model.dataset}/{self.model.folder.name}, fold{'s' * (len(self.folds) > 1)} " + ", ".join(
            self.folds
        )


def open_labeller(folder: Path, folds: Sequence[str] | None, checkpoint: str) -> Labeller:
    """The model in a folder; `folds`: None takes all finished numbered ones, or ``all`` if there are none.

    Raises:
        ValueError: not a model folder, no finished fold, no such fold, or one twice.
    """
    require_model(folder)
    model = as_model(folder.resolve())
    if model is None:
        raise ValueError(f"{folder} is not a model folder named TRAINER__PLANS__CONFIGURATION")
    there = [fold for fold in model.folds() if (model.folder / f"fold_{fold}" / checkpoint).is_file()]
    wanted = list(folds) if folds else [fold for fold in there if fold != "all"] or there
    if not wanted:
        raise ValueError(f"{model.folder} has no fold with {checkpoint}: finish a training, or give -chk")
    if len(set(wanted)) < len(wanted):
        raise ValueError(f"-f {' '.join(wanted)} names a fold twice: name it once")
    files = {fold: find_checkpoint(model.folder, fold, checkpoint) for fold in wanted}
    plans = PlansManager(read_json(model.folder / "plans.json"))
    hashes = {fold: content_hash(file) for fold, file in files.items()}
    return Labeller(model, plans, read_json(model.folder / "dataset.json"), wanted, checkpoint, hashes)


def require_untaught(
    labeller: Labeller, dataset: str, labels: Mapping[str, Any], pool: Collection[str], of: int
) -> None:
    """Raise ValueError unless a model may label the pool of a dataset in round `of`.

    In round 1 it has never seen a case of the pool. In round N it was trained on what round N - 1 wrote.

    Args:
        labeller: the model.
        dataset: name of the labelled dataset.
        labels: of its dataset.json.
        pool: ids of the pool's cases.
        of: round, 1 or more.
    """
    name = labeller.model.dataset
    ours, theirs = (
        {k: v for k, v in one.items() if k != "ignore"} for one in (labels, labeller.dataset_json["labels"])
    )
    made = (labeller.dataset_json.get(BLOCK) or {}).get(PROVENANCE) or {}
    if dataset not in (name, made.get("dataset")):
        raise ValueError(
            f"{labeller.model.folder} was trained on {name}, not on {dataset}: give a model of {dataset}, or of a "
            "dataset with its pseudo-labels"
        )
    if ours != theirs:
        raise ValueError(
            f"{labeller.model.folder} was trained with other labels than {dataset} declares now: train it again"
        )
    taught = int(made["round"]) if made.get("dataset") == dataset else 0
    if not taught and (cases := sorted(_unlabelled(labeller) & set(pool))):
        raise ValueError(
            f"{labeller.model.folder} trained on {len(cases)} cases of the pool, such as {cases[0]}, without labels. "
            "It would confirm itself: give a model that has not seen them"
        )
    if of == taught + 1:
        return
    if taught:
        remedy = f"give --round {taught + 1}, or a model of {dataset}"
        raise ValueError(f"{labeller.model.folder} trained on the pool's cases with labels of round {taught}: {remedy}")
    raise ValueError(
        f"--round {of} takes a model of the dataset that round {of - 1} wrote, and {labeller.model.folder} was trained "
        "on real labels only: give --round 1, or that model"
    )


def _unlabelled(labeller: Labeller) -> set[str]:
    """Cases that the training of any fold has seen without labels, as trainers of this package record it."""
    found: set[str] = set()
    for fold in labeller.folds:
        checkpoint = read(labeller.model.folder / f"fold_{fold}" / labeller.checkpoint)
        states = (checkpoint.get(EXTENSION_KEY) or {}).get("methods") or {}
        found |= set((states.get("unlabelled") or {}).get("cases") or ())
    return found
