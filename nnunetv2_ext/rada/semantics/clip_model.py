"""CLIP models by open_clip's names: loaded by open_clip, or refused with the way out. Never random weights."""

import difflib
import hashlib
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from nnunetv2_ext.data.cache import file_hash

Log = Callable[[str], None]
WITHOUT_CLIP = "or train without CLIP: rada.semantics=learned or rada.semantics=off"
OPENAI_NOTICE = (
    "OpenAI CLIP: the code is MIT; the model card puts deployed use, and so clinical use, out of scope"
    " (https://github.com/openai/CLIP/blob/main/model-card.md)."
)
_SCHEMAS = ("local-dir:", "hf-hub:")
_QUICK = "-quickgelu"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
_MODEL, _WEIGHTS, _ALPHA = "rada.clip_model", "rada.clip_weights", "rada.alpha_weights"
_WAYS_OUT = f"give a local file with {_WEIGHTS}=/path/to/weights.safetensors, {WITHOUT_CLIP}"


@dataclass(frozen=True)
class ClipSource:
    """Where a CLIP model comes from.

    Attributes:
        model: open_clip's name of the architecture, or ``local-dir:FOLDER`` or ``hf-hub:ORG/REPOSITORY``, which bring
            their own weights (open_clip's schemas; also accepted for `weights`).
        weights: a tag that open_clip lists for that model (downloaded on first use), or a local file that open_clip
            loads: ``.safetensors`` or a ``torch.save`` file with a state dict.
        alpha_weights: local file with Alpha-CLIP's visual weights, or None.
    """

    model: str = "ViT-B-16-quickgelu"
    weights: str = "openai"
    alpha_weights: str | None = None

    @property
    def located(self) -> str | None:
        """The ``local-dir:`` or ``hf-hub:`` name that brings architecture and weights, if there is one."""
        return next((name for name in (self.weights, self.model) if name.startswith(_SCHEMAS)), None)

    def identity(self, before: Mapping[str, str] | None = None) -> dict[str, str]:
        """What tells these weights from others, for cache keys: names of published ones, hashes of local files.

        Args:
            before: that of a training that is continued; what is gone by now counts as it was.

        Raises:
            ValueError: a local file or folder is missing without `before`, or what is at hand is other than before.
        """
        places = [("model", _MODEL, self.located or self.model), ("alpha", _ALPHA, self.alpha_weights)]
        if self.located is None:
            places.append(("weights", _WEIGHTS, self.weights))
        found, changed = {}, []
        for name, setting, place in places:
            try:
                now = _identity_of(place, setting)
            except ValueError:
                if before is None:
                    raise
                continue
            found[name] = now
            if before is not None and before.get(name) != now:
                changed.append(f"{setting}: {before.get(name)} became {now}")
        if changed:
            raise ValueError(
                f"this training was started with vectors of other CLIP weights ({'; '.join(changed)}): give the same "
                "ones, whose place may be another one, or start a new training without --c"
            )
        return found if before is None else dict(before)


def load_clip(source: ClipSource, log: Log = print) -> tuple[nn.Module, Any]:
    """The model in eval mode on the CPU in fp32, without gradients, and its tokenizer.

    Raises:
        ValueError: open_clip is not installed, the model is unknown, the weights are missing, unreadable or of another
            size, or model and weights disagree on the activation. One line with the ways out.
    """
    try:
        import open_clip
    except ImportError as error:
        raise ValueError(
            f"rada.semantics=clip needs the package open_clip_torch, which cannot be imported ({in_one_line(error)}): "
            f"pip install open_clip_torch, {WITHOUT_CLIP}"
        ) from error
    name = source.located or source.model
    weights = None if source.located else _require_weights(open_clip, source, log)
    if weights is None and source.weights not in ("openai", name):
        raise ValueError(f"{_MODEL}={source.model} brings its own weights: leave out {_WEIGHTS}={source.weights}")
    model = _create(open_clip, name, weights)
    log(f"CLIP: {name} with {'its own weights' if weights is None else f'the weights {weights}'}.")
    if weights == "openai":
        log(OPENAI_NOTICE)
    quick = open_clip.transformer.QuickGELU
    if source.alpha_weights is not None and not any(isinstance(m, quick) for m in model.visual.modules()):
        raise ValueError(
            f"{_ALPHA}: Alpha-CLIP was trained with QuickGELU and {name} has the plain GELU, which spoils its "
            f"features; set {_MODEL}={_sister(open_clip, name) or 'a -quickgelu model'}"
        )
    try:
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # transformers is missing, or tokenizer files are not at hand
        raise ValueError(
            f"{_MODEL}: the tokenizer of {name} cannot be made ({in_one_line(error)}); {_WAYS_OUT}"
        ) from error
    return model.eval().requires_grad_(False), tokenizer


def _require_weights(open_clip: Any, source: ClipSource, log: Log) -> str:
    """The weights as open_clip takes them: a tag it lists for that model, or an existing file."""
    config = open_clip.get_model_config(source.model)
    if config is None:
        close = difflib.get_close_matches(source.model, open_clip.list_models(), 3)
        listed = "python -c 'import open_clip; print(open_clip.list_models())' lists them"
        hint = f"did you mean {' or '.join(close)}?" if close else listed
        raise ValueError(f"{_MODEL}: open_clip knows no model {source.model}; {hint}")
    quick, sister = bool(config.get("quick_gelu", False)), _sister(open_clip, source.model)
    if _is_file(source.weights):
        if sister and not quick:
            log(
                f"CLIP: if {source.weights} comes from OpenAI's weights, set {_MODEL}={sister}: {source.model} has "
                "another activation."
            )
        return str(require_file(source.weights, _WEIGHTS).absolute())  # a bare name could also be a tag
    tags = open_clip.list_pretrained_tags_by_model(source.model)
    if source.weights not in tags:
        raise ValueError(
            f"{_WEIGHTS}={source.weights} is neither a file nor weights that open_clip lists for {source.model} "
            f"({', '.join(tags) or 'none'}); {_WAYS_OUT}"
        )
    trained = bool(open_clip.get_pretrained_cfg(source.model, source.weights).get("quick_gelu", False))
    if trained != quick:
        used, other = ("QuickGELU", "the plain GELU") if trained else ("the plain GELU", "QuickGELU")
        raise ValueError(
            f"{_MODEL}={source.model} has {other} and the weights '{source.weights}' were trained with {used}, which "
            f"spoils their features; set {_MODEL}={sister or 'a model of that activation'}"
        )
    return source.weights


def _create(open_clip: Any, name: str, weights: str | None) -> Any:
    """open_clip's own loading, which never falls back to random weights and never runs code of a file."""
    try:
        return open_clip.create_model(name, pretrained=weights, require_pretrained=True, weights_only=True)
    except Exception as error:  # a download, a file and a hub client can fail in too many ways to list
        what = f"{_MODEL}: {name}" if weights is None else f"{_WEIGHTS}: weights '{weights}' of {name}"
        if weights is not None and _is_file(weights):
            remedy = f"the file is damaged or of another model than {_MODEL}"
        elif name.startswith("local-dir:"):
            remedy = "that folder must hold open_clip_config.json and the weights"
        else:
            remedy = "open_clip downloads them from the Hugging Face hub on first use, which needs the network once"
        raise ValueError(f"{what} cannot be loaded ({in_one_line(error)}): {remedy}; {_WAYS_OUT}") from error


def _sister(open_clip: Any, name: str) -> str | None:
    """The same architecture with the other activation, if open_clip lists it."""
    other = name.removesuffix(_QUICK) if name.endswith(_QUICK) else f"{name}{_QUICK}"
    return other if other in open_clip.list_models() else None


def require_file(path: str | Path, setting: str) -> Path:
    """The path with ``~`` expanded; ValueError, naming the setting, if there is no such file, or if it is a program."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"{setting}: there is no file {path}; give the path of a weights file, {WITHOUT_CLIP}")
    # torch before 2.6 would run it in spite of weights_only
    if zipfile.is_zipfile(path) and any(n.endswith("/constants.pkl") for n in zipfile.ZipFile(path).namelist()):
        openai = f"set {_WEIGHTS}=openai, " if setting == _WEIGHTS else ""
        raise ValueError(
            f"{setting}: {path} is a program (TorchScript), as OpenAI's own .pt files are, and is not run: {openai}"
            f"give a file with a state dict, {WITHOUT_CLIP}"
        )
    return path


def in_one_line(error: BaseException) -> str:
    """The beginning of an error, 200 characters: libraries put pages of advice into theirs."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."


def _is_file(weights: str) -> bool:
    """Whether `weights` is meant as a path: it exists, or has a folder or a weights file's ending in it."""
    path = Path(weights).expanduser()
    return "/" in weights or "\\" in weights or path.suffix in _WEIGHT_SUFFIXES or path.is_file()


def _identity_of(place: str | None, setting: str) -> str:
    """The name itself, or SHA-256 of the file (about a second for ViT-B/16) or of the folder's files."""
    if place is None:
        return "none"
    if setting == _ALPHA or (setting == _WEIGHTS and _is_file(place)):
        return f"sha256:{file_hash(require_file(place, setting))}"
    if not place.startswith("local-dir:"):
        return place
    folder = Path(place.removeprefix("local-dir:")).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{_MODEL}: there is no folder {folder}; {_WAYS_OUT}")
    files = sorted(p for p in folder.iterdir() if p.suffix in (".json", *_WEIGHT_SUFFIXES))
    content = "".join(f"{p.name} {file_hash(p)}\n" for p in files)  # not its name: a folder may be moved
    return f"sha256:{hashlib.sha256(content.encode()).hexdigest()}"
