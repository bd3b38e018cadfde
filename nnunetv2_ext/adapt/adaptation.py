"""One adaptation from start to end: check, preprocess, train or solve, score, write. What is done is not done again.

Everything is built in ``OUTPUT.adapting``, beside the output, and renamed at the end; an interrupted adaptation stays
there and is continued.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from nnunetv2_ext.adapt.cases import (
    Given,
    check_cases,
    dataset_json_with_ignore,
    find_cases,
    preprocess,
    read_truth,
)
from nnunetv2_ext.adapt.head import Head
from nnunetv2_ext.adapt.model import open_model
from nnunetv2_ext.adapt.old import OldData, find_old_data
from nnunetv2_ext.adapt.recipes import Solved, Trained
from nnunetv2_ext.adapt.report import Comparison, Pictured, draw_cases, warning, write_csv
from nnunetv2_ext.adapt.segments import Segments, Weights
from nnunetv2_ext.adapt.settings import REPLAY
from nnunetv2_ext.adapt.training import RATE, STEPS, hidden_heads
from nnunetv2_ext.core.export import write_descriptions
from nnunetv2_ext.core.files import atomic_torch_save, atomic_write_text, read_json, require_writable
from nnunetv2_ext.core.orientation import directions_of
from nnunetv2_ext.core.progress import progress_bar
from nnunetv2_ext.data.case import read_image, read_label_map, spacing_of
from nnunetv2_ext.data.find import PREPROCESSED
from nnunetv2_ext.data.preprocessed import file_stamp
from nnunetv2_ext.data.raw import declared_values
from nnunetv2_ext.data.subjects import members_of, pairs_suggested, subjects_of_dataset
from nnunetv2_ext.parts.dice import dice

FIRST, ALL = "first", "all"  # folds of which a report is made; else of none
REPORT = "adaptation"  # folder in the result

Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What the user asked for; see the command's help."""

    model: Path
    images: Path
    labels: Path
    output: Path
    folds: tuple[str, ...] = ()
    checkpoint: str = "checkpoint_final.pth"
    not_drawn: tuple[str, ...] = ()
    ignore: int | None = None
    replay: float | None = None  # None: half where the old data is at hand
    head_only: bool = False
    steps: int = STEPS
    rate: float = RATE
    report: str = FIRST
    previous_stage: Path | None = None
    group_regex: str | None = None
    device: str = "cuda"


def adapt(request: Request, continued: bool = False, say: Say = print) -> Path:
    """Adapt the model and write it to ``request.output``, as a model of nnU-Net's own trainer with a report.

    Args:
        request: what is wanted.
        continued: go on with an adaptation of the same request that was interrupted.
        say: gets a line for whatever takes time, and the outcome.

    Returns:
        The output folder.

    Raises:
        ValueError: whatever is wrong with model, cases, options or disk; nothing is overwritten.
        SystemExit: a training was stopped by a signal or the stop file.
    """
    job = Job(request, say)
    job.open(continued)
    try:
        return job.run()
    except (SystemExit, KeyboardInterrupt):
        say(f"stopped; what is done is in {job.work}. The same command with --c goes on")
        raise


class Job:
    """An adaptation; its constructor reads and checks, and writes nothing.

    Raises:
        ValueError: see `adapt`.
    """

    def __init__(self, request: Request, say: Say) -> None:
        self.request, self.say = request, say
        self.output = request.output.absolute()
        self.work = self.output.with_name(f"{self.output.name}.adapting")
        if self.output.exists():
            raise ValueError(f"{self.output} exists; name a folder that does not, or remove it")
        if self.output.is_relative_to(request.model.resolve()):
            raise ValueError(f"{self.output} lies in the model folder; name a folder outside it")
        self.device = torch.device(request.device)
        self.model = open_model(request.model, request.folds, request.checkpoint)
        self.not_drawn = list(dict.fromkeys(request.not_drawn))
        self.hidden = hidden_heads(self.model.names, self.not_drawn, self.model.labels.has_regions)
        stage = self.model.configuration.previous_stage_name
        if (stage is None) != (request.previous_stage is None):
            raise ValueError(
                f"{self.model.configuration_name} is the last stage of a cascade: predict the given images with "
                f"{stage} and give the folder as --previous-stage"
                if stage
                else f"{self.model.configuration_name} is not a cascade's last stage: leave out --previous-stage"
            )
        self.cases = find_cases(request.images, request.labels, self.model, request.previous_stage)
        checked = check_cases(self.cases, self.model, self.not_drawn, request.ignore)
        self.drawn = checked.drawn
        for line in checked.warnings:
            say(f"WARNING: {line}")
        self.units = self._units()
        self.old, self.replay = self._old()
        if request.head_only:
            Head(self.model.network(), self.model.labels, self.hidden)
        self.dataset_json = dataset_json_with_ignore(self.model, request.ignore)
        self._require_space()

    def _units(self) -> list[list[str]]:
        """Cases that are left out together: those of a subject."""
        names = [given.case for given in self.cases]
        file = self.request.images.parent / "dataset.json"
        subjects = subjects_of_dataset(read_json(file) if file.is_file() else {}, names, self.request.group_regex)
        if subjects is None and (pairs := pairs_suggested(names)):
            self.say(f"WARNING: {pairs}. Left out one by one they flatter the report: give it as --group-regex")
        return list(members_of(names, subjects).values())

    def _old(self) -> tuple[OldData | None, float]:
        wanted = self.request.replay
        found = find_old_data(self.model)
        if isinstance(found, OldData):
            return found, REPLAY if wanted is None else wanted
        if wanted:
            raise ValueError(
                f"--replay needs the model's own preprocessed data, and {found}: set {PREPROCESSED} to where it is, or "
                "say --no-replay"
            )
        if wanted is None:
            self.say(f"no replay: {found}. Without old cases the old site is forgotten more")
        return None, 0.0

    def _require_space(self) -> None:
        folder = require_writable(self.output.parent)
        tensors = self.model.checkpoint(next(iter(self.model.files)))["network_weights"].values()
        weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        files = sum(file.stat().st_size for given in self.cases for file in (*given.images, given.label))
        # source and result of each fold, two trainings with their momentum; compressed images become arrays
        needed, free = weights * (2 * len(self.model.files) + 4) + 6 * files, shutil.disk_usage(folder).free
        if free < needed:
            raise ValueError(
                f"about {needed / 1e6:.0f} MB are needed in {folder}, and {free / 1e6:.0f} MB are free: free some "
                "space, or name an output on another disk"
            )

    # ---- the folder of work ------------------------------------------------------------------------------------------
    def open(self, continued: bool) -> None:
        """Make the folder of work, or take up the one that is there.

        Raises:
            ValueError: there is one and nobody asked to continue, or it is of another request.
        """
        note, wanted = self.work / "request.json", self._note()
        if not self.work.exists():
            require_writable(self.work)
        elif not continued:
            raise ValueError(f"{self.work} holds an interrupted adaptation: continue it with --c, or remove it")
        if note.is_file():
            theirs = read_json(note)
            if differ := [key for key in wanted if theirs.get(key) != wanted[key]]:
                raise ValueError(
                    f"{self.work} was started with {differ[0]}={theirs.get(differ[0])}, and now it is "
                    f"{wanted[differ[0]]}: continue with the same, or remove that folder"
                )
        atomic_write_text(note, json.dumps(wanted, indent=1))

    def _note(self) -> dict[str, Any]:
        request = self.request
        return {
            "model": {str(file): file_stamp(file) for file in self.model.files.values()},
            "cases": {str(f): file_stamp(f) for given in self.cases for f in (*given.images, given.label)},
            "not_drawn": self.not_drawn,
            "ignore": request.ignore,
            "replay": self.replay,
            "head_only": request.head_only,
            "steps": request.steps,
            "rate": request.rate,
            "group_regex": request.group_regex,
        }

    @property
    def base(self) -> Path:
        """The given cases as a preprocessed dataset."""
        return self.work / "preprocessed" / self.model.plans.dataset_name

    @property
    def folder(self) -> Path:
        """Of the model's configuration in it."""
        return self.base / self.model.configuration.data_identifier

    @cached_property
    def previous(self) -> Path | None:
        """Of the given cases' segmentations by the previous stage."""
        return None if self.request.previous_stage is None else self.work / "previous_stage"

    # ---- running -----------------------------------------------------------------------------------------------------
    def run(self) -> Path:
        """All of it; the output folder."""
        started = time.monotonic()
        self.base.mkdir(parents=True, exist_ok=True)
        preprocess(self.cases, self.model, self.dataset_json, self.folder, self.request.ignore, self.previous)
        fingerprint = self.request.model / "dataset_fingerprint.json"
        text = fingerprint.read_text() if fingerprint.is_file() else "{}"
        atomic_write_text(self.base / fingerprint.name, text)  # nnU-Net's trainer copies it
        result = self.work / "model"
        shutil.rmtree(result, ignore_errors=True)
        result.mkdir()
        comparisons: dict[str, list[Comparison]] = {}
        for number, fold in enumerate(self.model.files):
            reported = self.request.report == ALL or (self.request.report == FIRST and number == 0)
            comparisons[fold] = self._fold(fold, result, reported)
        write_descriptions(self.request.model, result)
        lines = self._write_report(result / REPORT, comparisons, time.monotonic() - started)
        result.rename(self.output)
        shutil.rmtree(self.work, ignore_errors=True)
        for line in lines:
            self.say(line)
        self.say(f"wrote {self.output}; predict with nnUNetv2_predict_from_modelfolder -m {self.output} -f "
                 f"{' '.join(self.model.files)}")  # fmt: skip
        return self.output

    def _fold(self, fold: str, result: Path, reported: bool) -> list[Comparison]:
        """Adapt a fold, write its checkpoint, and compare before with after."""
        source = self.model.checkpoint(fold)
        before: Weights = source["network_weights"]
        replayed, validation, remark = self.old.split(fold, self.model.group_regex) if self.old else ([], [], "")
        if remark:
            self.say(f"fold {fold}: {remark}")
        names = [given.case for given in self.cases]
        recipe = Solved(self, before, replayed) if self.request.head_only else Trained(self, fold, replayed)
        after = recipe.weights(names, "final")
        recipe.keep(result / REPORT / f"fold_{fold}")
        target = result / f"fold_{fold}" / "checkpoint_final.pth"
        target.parent.mkdir()
        atomic_torch_save(source | {"network_weights": after}, target)
        if not reported:
            return []
        segments = Segments(self, fold)
        structures = {n: v for n, v in self.model.structures.items() if n not in self.not_drawn}
        known = {given.case: given for given in self.cases}
        for case in progress_bar(names, "the given cases before"):
            segments.new("before", case, before)
        for unit in self.units if len(self.units) > 1 else ():
            if any(not segments.file("left_out", case).is_file() for case in unit):
                others = [case for case in names if case not in unit]
                left_out = recipe.weights(others, f"without_{unit[0]}")
                for case in unit:
                    segments.new("left_out", case, left_out)
                recipe.forget(f"without_{unit[0]}")
        truths = {case: read_truth(known[case], self.model, self.request.ignore) for case in names}
        new = Comparison(
            f"new site, fold {fold}",
            {case: dice(segments.new("before", case), *truths[case], structures) for case in names},
            {case: dice(segments.new("left_out", case), *truths[case], structures) for case in names}
            if len(self.units) > 1
            else {},
        )
        self._draw(result / REPORT / f"cases_fold_{fold}.png", segments, known)
        found = [new]
        if self.old and validation:
            both = {"before": before, "after": after}
            scores = [self._old_scores(segments, what, weights, validation) for what, weights in both.items()]
            found.append(Comparison(f"old site, fold {fold}", *scores))
        return found

    def _old_scores(self, segments: Segments, what: str, weights: Weights, cases: Sequence[str]) -> dict[str, Any]:
        assert self.old is not None
        reader = self.model.plans.image_reader_writer_class()
        scores = {}
        for case in progress_bar(cases, f"the old site {what}"):
            truth, _ = read_label_map(case, self.old.truth_file(case), reader)
            ignore = self.model.labels.ignore_label
            ignored = None if ignore is None else truth == ignore
            scores[case] = dice(segments.old(what, case, weights), truth, ignored, self.model.structures)
        return scores

    # ---- the report --------------------------------------------------------------------------------------------------
    def _draw(self, path: Path, segments: Segments, known: Mapping[str, Given]) -> None:
        reader = self.model.plans.image_reader_writer_class()
        pictured = []
        for case, given in known.items():
            image, properties = read_image(case, given.images, reader)
            truth, _ = read_label_map(case, given.label, reader)
            after = segments.new("left_out", case) if segments.file("left_out", case).is_file() else None
            place = tuple(float(s) for s in spacing_of(properties)), directions_of(properties)
            pictured.append(Pictured(case, image[0], truth, segments.new("before", case), after, *place))
        if self.model.labels.has_regions:  # whose label maps hold values, not regions
            classes = {value: str(value) for value in sorted(declared_values(self.model.dataset_json["labels"]))}
        else:
            classes = {int(value): name for name, value in self.model.structures.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_cases(path, pictured, classes, f"{self.model.plans.dataset_name}: the given cases of the new site")

    def _write_report(self, folder: Path, comparisons: Mapping[str, Sequence[Comparison]], seconds: float) -> list[str]:
        """Write tables; the lines that the user sees."""
        folder.mkdir(exist_ok=True)
        request = self.request
        how = "last layer in closed form" if request.head_only else f"{request.steps} steps, rate {request.rate:g}"
        replay = f"{100 * self.replay:.0f} % of old cases" if self.replay else "none"
        text = [
            f"# {self.output.name}: {self.model.plans.dataset_name} adapted with {len(self.cases)} cases",
            "",
            f"{self.model.trainer.__name__}, {self.model.configuration_name}, folds {', '.join(self.model.files)}. "
            f"{how[0].upper()}{how[1:]}; replay: {replay}; not drawn: {', '.join(self.not_drawn) or 'nothing'}. "
            f"It took {seconds:.0f} s.",
            "",
            f"Given cases: {', '.join(given.case for given in self.cases)}.",
            "A given case is scored by a model that was adapted without the case. The model in this folder saw all.",
        ]
        lines = []
        for one in (one for several in comparisons.values() for one in several):
            text += ["", f"## {one.title[0].upper()}{one.title[1:]}", "", one.table()]
            if one.after:
                line = f"{one.title}: Dice {one.mean(one.before):.3f} -> {one.mean(one.after):.3f}, {one.sentence()}"
            else:
                line = f"{one.title}: Dice {one.mean(one.before):.3f} before; after is unknown: no case can be left out"
            lines.append(line)
            if one.title.startswith("new") and (caution := warning(one)):
                lines.append(caution)
        if request.head_only:
            lines.append("WARNING: --head-only costs the old site more than a fine-tune does; see the old site's row")
        atomic_write_text(folder / "report.md", "\n".join([*text, "", *lines]) + "\n")
        write_csv(folder / "dice.csv", comparisons)
        return lines
