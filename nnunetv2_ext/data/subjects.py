"""Which cases belong to one subject (patient): recorded in dataset.json, found in the names, or listed in a table."""

import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from nnunetv2_ext.core.files import read_json
from nnunetv2_ext.data.case_table import read_column

BLOCK = "nnunetv2_ext"  # our block in dataset.json

# what the names of one subject's cases differ in: a visit or frame with its number, a side, a moment
_NUMBERED = "session|ses|visit|frame|timepoint|time|tp|t|scan|run|day|week|month|year|phase|exam|study|acq|v|fu"
_SIDES = "left|right|lh|rh|l|r"
_WORDS = f"{_SIDES}|baseline|followup|follow-up|pre|post|ed|es"
_CUT = r"(?:[_.-]+|(?<=\d))"  # before such a word


class PairsSuggested(NamedTuple):
    """Names that look as if several cases were of one subject."""

    regex: str  # would group them; finds a subject in every name
    subjects: dict[str, str]  # case to subject by that expression
    example: tuple[str, str]  # two cases that look like one subject

    def __str__(self) -> str:
        number = len(set(self.subjects.values()))
        return (
            f"{' and '.join(self.example)} look like one subject: {shlex.quote(self.regex)} would make {number} "
            f"subjects of {len(self.subjects)} cases"
        )


def subjects_of_dataset(
    dataset_json: Mapping[str, Any], cases: Iterable[str], regex: str | None = None, table: Path | None = None
) -> dict[str, str] | None:
    """The subject of each case: by regular expression or table if one is given, else as dataset.json records it.

    Returns:
        Case to subject for all `cases`; one that the record leaves out is its own. None: nothing is known.

    Raises:
        ValueError: both are given, or they are unusable, or leave a case without a subject.
    """
    cases = list(cases)
    if regex is not None and table is not None:
        raise ValueError("subjects come from a regular expression or from a table: give one of the two")
    if regex is not None:
        return subjects_by_regex(cases, regex)
    if table is not None:
        return subjects_from_table(cases, table)
    recorded = recorded_subjects(dataset_json)
    return None if recorded is None else {case: recorded.get(case, case) for case in cases}


def subjects_by_regex(cases: Iterable[str], regex: str, setting: str = "group_regex") -> dict[str, str]:
    r"""The subject of each case: the first group of `regex` searched in its id, or the whole match without a group.

    >>> subjects_by_regex(["patient001_frame01", "patient001_frame12"], r"^(patient\d+)")
    {'patient001_frame01': 'patient001', 'patient001_frame12': 'patient001'}

    Raises (with `setting`, which is what the user calls the expression):
        ValueError: the expression is invalid, or finds no subject in a case, or an empty one.
    """
    try:
        expression = re.compile(regex)
    except re.error as error:
        raise ValueError(f"{setting}={regex!r} is not a regular expression ({error}): correct or unset it") from None
    subjects = {}
    for case in cases:
        found = expression.search(case)
        subject = found and (found.group(1) if expression.groups else found.group(0))
        if not subject:
            raise ValueError(
                f"{setting}={regex!r} does not find a subject in the case id {case!r}: it must match every case, with "
                "the subject as its first group"
            )
        subjects[case] = subject
    return subjects


def subjects_from_table(cases: Iterable[str], file: Path) -> dict[str, str]:
    """The subject of each case from a JSON object ``{"case": "subject"}`` or a CSV with the columns case,subject.

    Raises:
        ValueError: the file cannot be read or is of another form, a case has no subject, or two different ones.
    """
    content = read_column(file, "subject") if file.suffix.lower() in (".csv", ".tsv") else read_json(file)
    if not isinstance(content, dict):
        raise ValueError(f'{file} must hold one object {{"case": "subject", ...}}')
    subjects = {}
    for case in cases:
        subject = content.get(case)
        if isinstance(subject, bool) or not isinstance(subject, (str, int)) or subject == "":
            remedy = f"{subject!r} is not a name; write a text" if case in content else "add it"
            raise ValueError(f"{file} gives no subject for the case {case!r}: {remedy}")
        subjects[case] = str(subject)
    return subjects


def recorded_subjects(dataset_json: Mapping[str, Any]) -> dict[str, str] | None:
    """Case to subject as dataset.json records it under ``nnunetv2_ext.subjects``, or None.

    Versions up to 0.1 recorded it under ``nnunetv2_ext.sparsify.subjects``.

    Raises:
        ValueError: the record is not an object of names.
    """
    block = dataset_json.get(BLOCK)
    if not isinstance(block, Mapping):
        return None
    older = block.get("sparsify")
    subjects = block.get("subjects") or (older.get("subjects") if isinstance(older, Mapping) else None)
    if subjects and not (isinstance(subjects, Mapping) and all(isinstance(s, (str, int)) for s in subjects.values())):
        raise ValueError(f'subjects in the block {BLOCK} of dataset.json must be one object {{"case": "subject", ...}}')
    return {case: str(subject) for case, subject in subjects.items()} if subjects else None


def pairs_suggested(cases: Collection[str]) -> PairsSuggested | None:
    """What to tell a user whose cases have no known subjects, but names like sub-1Ses1, sub-1Ses2 or p01_L, p01_R.

    Returns:
        None if no two names look like one subject, or all of them do.
    """
    found = []
    for regex in _expressions(cases):
        members = members_of(cases, subjects := subjects_by_regex(cases, regex))
        largest = max(members.values(), key=len, default=[])
        if len(members) > 1 and len(largest) > 1:
            found.append((len(members) < len(largest), PairsSuggested(regex, subjects, (largest[0], largest[1]))))
    # many subjects with few cases each look more like patients than few with many (sites, scanners)
    return min(found, key=lambda one: one[0])[1] if found else None


def _expressions(cases: Collection[str]) -> Iterator[str]:
    """Expressions that may group `cases`, likely ones first; each matches every name, and its group is the subject."""
    token = re.compile(rf"(?i){_CUT}(?:({_NUMBERED})[_.-]?\d|({_WORDS})(?![a-z0-9]))")
    seen = [match for case in cases if (match := token.search(case, 1))]
    numbered, words = (sorted({m[group].lower() for m in seen if m[group]}) for group in (1, 2))
    alternatives = [rf"{word}[_.-]?\d" for word in numbered] + [rf"{word}(?![a-z0-9])" for word in words]
    if alternatives:
        yield rf"(?i)^(.+?)(?:{_CUT}(?:{'|'.join(alternatives)}).*)?$"
    if any(re.match(rf"(?i)(?:.*[_.-])?(?:{_SIDES})[_.-]|left|right", case) for case in cases):
        yield rf"(?i)^(?:(?:.*[_.-])?(?:{_SIDES})[_.-]+|(?:left|right)(?=.))?(.+)$"
    regex = r"^(.+?)(?:(?<=\d)[_.-]\d+)?$"  # p01_1, p01_2; but not site1_001, site1_002 ...
    members = members_of(cases, subjects_by_regex(cases, regex)).values()
    if max(map(len, members), default=0) <= len(members):
        yield regex


def members_of(cases: Iterable[str], subjects: Mapping[str, str] | None) -> dict[str, list[str]]:
    """Subject to its sorted cases, sorted; without `subjects` each case is its own."""
    members: dict[str, list[str]] = {}
    for case in sorted(cases):
        members.setdefault(subjects.get(case, case) if subjects else case, []).append(case)
    return dict(sorted(members.items()))


def divided(one: Iterable[str], other: Iterable[str], subjects: Mapping[str, str] | None) -> list[str]:
    """Subjects with cases in both groups, sorted."""
    return sorted(set(members_of(one, subjects)) & set(members_of(other, subjects)))
