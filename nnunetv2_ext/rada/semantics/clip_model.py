"""CLIP models by open_clip's names: found, checked and loaded, or refused with the way out. Never random weights."""

from __future__ import annotations

import difflib
import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from nnunetv2_ext.rada.semantics.clip_weights import (
    OPENAI_NOTICE,
    WITHOUT_CLIP,
    file_hash,
    first_line,
    load_strict,
    read_weights,
    require_file,
)
from nnunetv2_ext.rada.semantics.torchscript import is_torchscript

Log = Callable[[str], None]
_SCHEMAS = ("local-dir:", "hf-hub:")
_QUICK = "-quickgelu"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
_MODEL, _WEIGHTS, _ALPHA = "rada.clip_model", "rada.clip_weights", "rada.alpha_weights"


@dataclass(frozen=True)
class ClipSource:
    """Where a CLIP model comes from.

    Attributes:
        model: open_clip's name of the architecture, or ``local-dir:FOLDER`` or ``hf-hub:ORG/REPOSITORY``, which bring
            their own weights (open_clip's schemas; also accepted for `weights`).
        weights: a tag that open_clip lists for that model (downloaded on first use), or a local file: ``.safetensors``,
            a ``torch.save`` file, or OpenAI's TorchScript archive.
        alpha_weights: local file with Alpha-CLIP's visual weights, or None.
    """

    model: str = "ViT-B-16-quickgelu"
    weights: str | None = "openai"
    alpha_weights: str | None = None

    @property
    def located(self) -> str | None:
        """The ``local-dir:`` or ``hf-hub:`` name that brings architecture and weights, if there is one."""
        names = (self.weights or "", self.model)
        return next((name for name in names if name.startswith(_SCHEMAS)), None)

    def identity(self) -> dict[str, str]:
        """What tells these weights from others, for cache keys: names of published ones, hashes of local files.

        Raises:
            ValueError: a local file or folder is missing.
        """
        return {name: tell() for name, tell in self._identifiers().items()}

    def known_identity(self) -> dict[str, str]:
        """`identity` without the entries of files that are missing."""
        found = {}
        for name, tell in self._identifiers().items():
            with suppress(ValueError):
                found[name] = tell()
        return found

    def _identifiers(self) -> dict[str, Callable[[], str]]:
        found: dict[str, Callable[[], str]] = {"model": partial(str, self.located or self.model)}
        if self.located is None:
            local = _local_file(self.weights)
            found["weights"] = partial(_file_identity, local, _WEIGHTS) if local else partial(str, self.weights)
        elif self.located.startswith("local-dir:"):
            # the content, not the folder's name, which may be moved
            folder = Path(self.located.removeprefix("local-dir:")).expanduser()
            found["model"] = partial(_folder_identity, folder)
        alpha = self.alpha_weights
        found["alpha"] = partial(_file_identity, alpha, _ALPHA) if alpha else partial(str, "none")
        return found


def load_clip(source: ClipSource, log: Log = print) -> tuple[nn.Module, Any]:
    """The model in eval mode on the CPU in fp32, without gradients, and its tokenizer.

    Raises:
        ValueError: open_clip is not installed, the model is unknown, the weights are missing, unreadable or of another
            size, or model and weights disagree on the activation. One line with the ways out.
    """
    open_clip = _import_open_clip()
    if source.located is not None:
        name = source.located
        if source.weights not in (None, "openai", name):
            raise ValueError(
                f"{_MODEL}={source.model} brings its own weights, so {_WEIGHTS}={source.weights} is of no use: "
                "leave it out"
            )
        model = _create(open_clip, name, None)
        log(f"CLIP: model and weights from {name}.")
    else:
        name = source.model
        model = _load_named(open_clip, source, log)
    if source.alpha_weights is not None and not _is_quick(model):
        raise ValueError(
            f"{_ALPHA}: Alpha-CLIP was trained with QuickGELU and {name} has the plain GELU, which spoils its "
            f"features; set {_MODEL}={_sister(open_clip, name) or 'a -quickgelu model'}"
        )
    try:
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # transformers is missing, or tokenizer files are not at hand
        raise ValueError(
            f"{_MODEL}: the tokenizer of {name} cannot be made ({first_line(error)}); {_ways_out()}"
        ) from error
    return model.eval().requires_grad_(False), tokenizer


def _import_open_clip() -> Any:
    try:
        import open_clip
    except ImportError as error:
        raise ValueError(
            f"rada.semantics=clip needs the package open_clip_torch, which cannot be imported ({first_line(error)}): "
            f"pip install open_clip_torch, {WITHOUT_CLIP}"
        ) from error
    return open_clip


def _load_named(open_clip: Any, source: ClipSource, log: Log) -> nn.Module:
    """A model by its name, with weights from a tag or a local file."""
    config = open_clip.get_model_config(source.model)
    if config is None:
        close = difflib.get_close_matches(source.model, open_clip.list_models(), 3)
        hint = (
            f"did you mean {' or '.join(close)}?"
            if close
            else "python -c 'import open_clip; print(open_clip.list_models())' lists them"
        )
        raise ValueError(f"{_MODEL}: open_clip knows no model {source.model}; {hint}")
    if source.weights is None:
        raise ValueError(f"{_WEIGHTS} is not set, and a random encoder says nothing about images; {_ways_out()}")
    local = _local_file(source.weights)
    if local is not None:
        return _load_local(open_clip, source.model, config, local, log)
    tags = open_clip.list_pretrained_tags_by_model(source.model)
    if source.weights not in tags:
        raise ValueError(
            f"{_WEIGHTS}={source.weights} is neither a file nor weights that open_clip lists for {source.model} "
            f"({', '.join(tags) or 'none'}); {_ways_out()}"
        )
    _require_same_gelu(open_clip, source, config)
    model = _create(open_clip, source.model, source.weights)
    log(f"CLIP: {source.model} with open_clip's weights '{source.weights}'.")
    if source.weights == "openai":
        log(OPENAI_NOTICE)
    return model


def _load_local(open_clip: Any, name: str, config: dict[str, Any], path: Path, log: Log) -> nn.Module:
    state = read_weights(path, _WEIGHTS, log)
    archive = is_torchscript(path)
    if not config.get("quick_gelu", False):
        sister = _sister(open_clip, name)
        if archive:
            raise ValueError(
                f"{_WEIGHTS}: {path} has the form of OpenAI's files, which were trained with QuickGELU, and {name} has "
                f"the plain GELU, which spoils its features; set {_MODEL}={sister or 'a -quickgelu model'}"
            )
        if sister:
            log(f"CLIP: if {path} comes from OpenAI's weights, set {_MODEL}={sister}: {name} has another activation.")
    with _without_random_warning():
        model = open_clip.create_model(name, load_weights=False, pretrained_text=False)
    # an archive stores constants beside the weights (the causal mask of the text encoder)
    load_strict(model, state, path, _WEIGHTS, name, extra_ok=archive)
    log(f"CLIP: {name} with the weights of {path}.")
    if archive:
        log(OPENAI_NOTICE)
    return model


def _create(open_clip: Any, name: str, tag: str | None) -> nn.Module:
    """open_clip's own loading; it never falls back to random weights here."""
    what = f"weights '{tag}' of {name}" if tag else name
    try:
        return open_clip.create_model(name, pretrained=tag, require_pretrained=True, weights_only=True)
    except Exception as error:  # a download, a file and a hub client can fail in too many ways to list
        setting = _MODEL if tag is None else _WEIGHTS
        origin = "that folder must hold open_clip_config.json and the weights"
        if not name.startswith("local-dir:"):
            origin = "open_clip downloads them from the Hugging Face hub on first use, which needs the network once"
        raise ValueError(
            f"{setting}: {what} cannot be loaded ({first_line(error)}): {origin}; {_ways_out()}"
        ) from error


def _require_same_gelu(open_clip: Any, source: ClipSource, config: dict[str, Any]) -> None:
    from open_clip.pretrained import get_pretrained_cfg

    trained = bool(get_pretrained_cfg(source.model, source.weights).get("quick_gelu", False))
    if trained != bool(config.get("quick_gelu", False)):
        used, other = ("QuickGELU", "the plain GELU") if trained else ("the plain GELU", "QuickGELU")
        raise ValueError(
            f"{_MODEL}={source.model} has {other} and the weights '{source.weights}' were trained with {used}, which "
            f"spoils their features; set {_MODEL}={_sister(open_clip, source.model) or 'a model of that activation'}"
        )


def _sister(open_clip: Any, name: str) -> str | None:
    """The same architecture with the other activation, if open_clip lists it."""
    other = name.removesuffix(_QUICK) if name.endswith(_QUICK) else f"{name}{_QUICK}"
    return other if other in open_clip.list_models() else None


def _is_quick(model: nn.Module) -> bool:
    from open_clip.transformer import QuickGELU

    return any(isinstance(module, QuickGELU) for module in model.visual.modules())  # type: ignore[union-attr, operator]


def _ways_out() -> str:
    return f"give a local file with {_WEIGHTS}=/path/to/weights.safetensors, {WITHOUT_CLIP}"


def _local_file(weights: str | None) -> Path | None:
    """The path, if `weights` is meant as one: it exists, or has a folder or a weights file's ending in it."""
    if weights is None or weights.startswith(_SCHEMAS):
        return None
    path = Path(weights).expanduser()
    looks = "/" in weights or "\\" in weights or path.suffix in _WEIGHT_SUFFIXES
    return path if looks or path.is_file() else None


def _file_identity(path: str | Path, setting: str) -> str:
    return f"sha256:{file_hash(require_file(path, setting))}"


def _folder_identity(folder: Path) -> str:
    if not folder.is_dir():
        raise ValueError(f"{_MODEL}: there is no folder {folder}; {_ways_out()}")
    files = sorted(p for p in folder.iterdir() if p.suffix in (".json", *_WEIGHT_SUFFIXES))
    content = "".join(f"{p.name} {file_hash(p)}\n" for p in files)
    return f"sha256:{hashlib.sha256(content.encode()).hexdigest()}"


@contextmanager
def _without_random_warning() -> Iterator[None]:
    """open_clip warns that the model is random before we fill it."""

    def keep(record: logging.LogRecord) -> bool:
        return "initialized randomly" not in record.getMessage()

    root = logging.getLogger()
    root.addFilter(keep)
    try:
        yield
    finally:
        root.removeFilter(keep)
