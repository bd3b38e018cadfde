"""Where a user writes settings: the environment variable ``nnUNet_ext_settings``, or the YAML file it names."""

import re
import shlex
from pathlib import Path
from typing import Any

import yaml

ENVIRONMENT_VARIABLE = "nnUNet_ext_settings"


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: each key once, numbers as they look, and ``none`` for nothing.

    PyYAML follows YAML 1.1 and keeps the last of two equal keys. There 010 is 8, 12:30 is 750, on and off are booleans,
    and 1e-3 is text.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for number, key in enumerate(keys) if key in keys[:number]]
        if twice:
            raise yaml.constructor.ConstructorError(problem=f"{twice[0]!r} is set twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes the text that either this package or YAML 1.1 would read as something else."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", "~|null|Null|NULL|none|None|NONE|", ["~", "n", "N", ""]),
    ("bool", "true|True|TRUE|false|False|FALSE", list("tTfF")),
    # 001 is text, and so is 123e45: both may be a case's name
    ("int", "[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", r"[-+]?((0|[1-9][0-9]*)\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", "[-+]?(0|[1-9][0-9]*)[eE][-+][0-9]+", list("-+0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def to_yaml(values: dict[str, Any]) -> str:
    """Settings as the text of a file that ``nnUNet_ext_settings`` may name."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


def from_environment(text: str | None) -> dict[str, Any]:
    """Parse the value of ``nnUNet_ext_settings``: the path of a YAML file, or ``key=value`` pairs separated by blanks.

    Values are YAML scalars, ``none``, or flow lists (``train_cases=[case_1,case_2]``); quote a value that contains
    blanks. A backslash stands for itself, in quotes too.

    Raises:
        ValueError: missing or unreadable file, something that is not YAML, or a part that is not ``key=value``.
    """
    text = (text or "").strip()
    if not text:
        return {}
    if "=" not in text or _is_file(text):
        return _from_file(Path(text))
    pairs: dict[str, Any] = {}
    words = shlex.shlex(text, posix=True, punctuation_chars=False)
    words.whitespace_split, words.commenters, words.escape = True, "", ""  # a backslash is part of a path or expression
    try:
        parts = list(words)
    except ValueError as error:
        raise ValueError(f"{ENVIRONMENT_VARIABLE} cannot be read ({error}): close the quotes in {text!r}") from error
    for part in parts:
        key, separator, value = part.partition("=")
        if not separator or not key:
            raise ValueError(
                f"{ENVIRONMENT_VARIABLE}: {part!r} is not of the form key=value; write for example "
                f'{ENVIRONMENT_VARIABLE}="num_epochs=250 seed=1", without blanks around "="'
            )
        if key in pairs:
            raise ValueError(f"{ENVIRONMENT_VARIABLE} sets {key!r} twice; keep one of the two")
        try:
            pairs[key] = yaml.load(value, _Loader)
        except yaml.YAMLError as error:
            raise ValueError(f"{ENVIRONMENT_VARIABLE}: the value of {key!r} cannot be read: {value!r}") from error
    return pairs


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except OSError:  # longer than a file name can be: a list of cases, for example
        return False


def _from_file(path: Path) -> dict[str, Any]:
    if not _is_file(str(path)):
        raise ValueError(
            f"{ENVIRONMENT_VARIABLE} names the settings file {str(path)!r}, which does not exist; "
            "give the path of a YAML file or key=value pairs"
        )
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"the settings file {str(path)!r} cannot be read as YAML ({reason}); fix it or unset {ENVIRONMENT_VARIABLE}"
        ) from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"the settings file {str(path)!r} must hold key: value lines, not a {type(content).__name__}")
    return content
