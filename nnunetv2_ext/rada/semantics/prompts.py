"""One sentence per class for CLIP's text encoder."""

import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any

_CT = re.compile(r"^(ct|cta|cect|ncct|cbct)$")
_MRI = re.compile(r"^(mri?|mra|t[12].*|pdw?|flair|dwi|adc|swi|lge|bssfp|cine|dce|dixon|vibe)$")


def modality(channel_names: Mapping[str, Any], channel: int = 0) -> str:
    """``CT``, ``MRI`` or ``medical``, from the words of a channel's name in dataset.json (``T2-FLAIR``: MRI)."""
    words = re.split(r"[^a-z0-9]+", str(channel_names.get(str(channel), "")).lower())
    if any(_CT.match(word) for word in words):
        return "CT"
    return "MRI" if any(_MRI.match(word) for word in words) else "medical"


def class_prompts(
    labels: Mapping[str, Any],
    channel_names: Mapping[str, Any],
    overrides: Mapping[str, str] | None = None,
    channel: int = 0,
    log: Callable[[str], None] = print,
) -> tuple[str, ...]:
    """Sentences of the C classes ordered by label value, background first: "a CT slice showing the left kidney".

    Args:
        labels: dataset.json's ``labels``; ``ignore`` is left out.
        channel_names: dataset.json's.
        overrides: class name to sentence (`rada.prompts`). Classes it does not name keep the built-in sentence, and the
            log says which ones.
        channel: image channel that CLIP sees.
        log: told every sentence.

    Raises:
        ValueError: an override for no class, an empty override, or no such channel.
    """
    overrides = dict(overrides or {})
    if str(channel) not in channel_names:
        raise ValueError(f"rada.image_channel={channel}: dataset.json names the channels {', '.join(channel_names)}")
    values = {name: value for name, value in labels.items() if name != "ignore"}
    _require_classes(overrides, values)
    kind = modality(channel_names, channel)
    start = f"{'an' if kind == 'MRI' else 'a'} {kind} slice showing the"
    names = sorted(values, key=lambda name: values[name])
    words = {name: re.sub(r"[_\s]+", " ", name).strip() for name in names}
    prompts = {name: f"{start} {words[name]}" for name in names} | overrides
    untold = [name for name in names if values[name] > 0 and name not in overrides]
    if overrides and untold:
        log(f"rada.prompts names no {', '.join(untold)}: the built-in sentence is used there.")
    for name in names:
        log(f"prompt {values[name]} {name}: {prompts[name]}")
    return tuple(prompts[name] for name in names)


def _require_classes(overrides: Mapping[str, str], values: Mapping[str, int]) -> None:
    for name, sentence in overrides.items():
        if name not in values:
            close = difflib.get_close_matches(name, values, 1)
            hint = f"did you mean {close[0]}?" if close else f"classes are {', '.join(values)}"
            raise ValueError(f"rada.prompts: dataset.json has no class {name}; {hint}")
        if not isinstance(sentence, str) or not sentence.strip():
            raise ValueError(f"rada.prompts: the sentence for {name} is empty; write one or leave {name} out")
