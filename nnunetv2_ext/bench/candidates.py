"""Which trainers are measured, with which settings, and how a mistyped name is answered."""

import contextlib
import difflib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from nnunetv2_ext import installed_trainers
from nnunetv2_ext.core.outside import Promise, load_trainer, trainer_of

BASELINE = "nnUNetTrainer"


@dataclass(frozen=True)
class Candidate:
    """A trainer with its settings."""

    trainer: str  # class name, as for nnUNetv2_train -tr
    # what nnUNet_ext_settings is while it is built: key=value pairs or a YAML file's path; empty: what it holds already
    settings: str = ""

    @property
    def label(self) -> str:
        """Name for tables: the class and, shortened to the last part of each key, the settings."""
        if "=" not in self.settings:
            return f"{self.trainer} {self.settings}".strip()
        pairs = [pair.partition("=") for pair in self.settings.split()]
        return " ".join([self.trainer, *(f"{key.rpartition('.')[2]}{sign}{value}" for key, sign, value in pairs)])


def parse_candidates(trainers: Sequence[str], settings: Sequence[str] = ()) -> list[Candidate]:
    """Candidates from the command line; plain nnUNetTrainer always comes first, once.

    An entry of ``trainers`` is ``NAME`` or ``NAME:SETTINGS``. One of ``settings``, ``NAME=SETTINGS``, is for every
    occurrence of the name and joined with what follows its own colon. ValueError: settings without a name or for a
    trainer that is not measured, a file joined with pairs, or one candidate twice.
    """
    common: dict[str, str] = {}
    for entry in settings:
        name, _, value = entry.partition("=")
        if not value or not name.isidentifier():
            raise ValueError(
                f"--settings {entry!r} is not of the form TRAINER=SETTINGS; write for example "
                '--settings nnUNetTrainerExt="batch_size=4"'
            )
        common[name] = f"{common.get(name, '')} {value}".strip()
    if BASELINE in common:
        raise ValueError(f"--settings: plain {BASELINE} takes no settings; only the trainers of nnunetv2-ext do")
    candidates = [Candidate(BASELINE)]
    for entry in trainers:
        name, _, own = entry.partition(":")
        given = [text for text in (common.get(name, ""), own.strip()) if text]
        if len(given) > 1 and not all("=" in text for text in given):
            raise ValueError(
                f"a settings file of {name} cannot be joined with other settings; write all of them into the file"
            )
        candidate = Candidate(name, " ".join(given))
        if candidate == candidates[0]:
            continue
        if candidate in candidates:
            raise ValueError(f"-tr names {entry!r} twice with the same settings; give each its own after a colon")
        candidates.append(candidate)
    for name in sorted(common.keys() - {c.trainer for c in candidates}):
        raise ValueError(f"--settings names {name}, which is not among the trainers of -tr; add it there")
    return candidates


def check_settings(candidate: Candidate, cls: type) -> None:
    """Raise ValueError if ``cls`` takes no settings or refuses those of ``candidate``."""
    from nnunetv2_ext.core.trainer_settings import SettingsTrainer

    if issubclass(cls, SettingsTrainer):
        _settings(cls, candidate.settings or None)
    elif candidate.settings:
        raise ValueError(f"{candidate.trainer} takes no settings; only the trainers of nnunetv2-ext do")


def promise_of(candidate: Candidate, cls: type) -> Promise:
    """What the trainer's method promises with the candidate's settings, however they are written; else nothing.

    Which file a setting names is not compared: a promise is for every such file.
    """
    trainer = trainer_of(cls)
    if trainer is None:
        return Promise()
    given = _settings(cls, candidate.settings or None)
    return next((p for settings, p in trainer.promises.items() if _settings(cls, settings) == given), Promise())


def _settings(cls: Any, text: str | None) -> dict[str, Any]:
    """A trainer's settings by key with what ``nnUNet_ext_settings`` would hold, without files; None: what it holds."""
    from nnunetv2_ext.core.resolve import resolve
    from nnunetv2_ext.core.settings import flatten, without_local_paths

    found = flatten(resolve(cls.settings_model(), trainer_defaults=cls.trainer_defaults(), environment=text).settings)
    return without_local_paths(found, cls.settings_model())


def find_trainer(name: str) -> type:
    """The class that ``nnUNetv2_train -tr NAME`` would use.

    ValueError: no such trainer (with the nearest names), or its module cannot be imported.
    """
    if name in installed_trainers():  # nnU-Net's own search imports all its trainers, which takes seconds
        try:
            return load_trainer(name)
        except ImportError as error:
            raise ValueError(
                f"{name} cannot be imported ({error}); install what is missing, nnUNetv2_ext doctor says more"
            ) from error
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return recursive_find_trainer_class_by_name(name)
    except RuntimeError as error:
        if "Could not find requested nnunet trainer" not in str(error):
            raise
    except AssertionError as error:
        raise ValueError(f"{name} is not a trainer: {error}") from error
    known = {*installed_trainers(), *_names_below(nnUNetTrainer)}
    near = difflib.get_close_matches(name, sorted(n for n in known if n.startswith(BASELINE)), n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ValueError(
        f"there is no trainer {name!r}; {hint}nnUNetv2_ext doctor lists ours and where nnU-Net looks for others"
    )


def _names_below(cls: Any) -> Iterator[str]:
    """Of ``cls`` and its subclasses that are imported by now."""
    yield cls.__name__
    for subclass in cls.__subclasses__():
        yield from _names_below(subclass)
