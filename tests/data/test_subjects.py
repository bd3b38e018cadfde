"""Which cases belong to one patient: recorded, by an expression, by a table, or suggested by their names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nnunetv2_ext.data.subjects import (
    divided,
    members_of,
    pairs_suggested,
    recorded_subjects,
    subjects_by_regex,
    subjects_of_dataset,
)

CASES = ["p1_a", "p1_b", "p2_a"]
GROUPED = {"p1_a": "p1", "p1_b": "p1", "p2_a": "p2"}


def test_an_expression_goes_before_the_record_and_the_record_before_nothing() -> None:
    recorded = {"nnunetv2_ext": {"subjects": {"p1_a": "x", "p1_b": "x"}}}
    assert subjects_of_dataset({}, CASES) is None
    assert subjects_of_dataset(recorded, CASES) == {"p1_a": "x", "p1_b": "x", "p2_a": "p2_a"}
    assert subjects_of_dataset(recorded, CASES, r"^(p\d)_") == GROUPED
    with pytest.raises(ValueError, match="one of the two"):
        subjects_of_dataset({}, CASES, r"p\d", Path("groups.json"))


def test_records_of_older_versions_are_read() -> None:
    assert recorded_subjects({"nnunetv2_ext": {"sparsify": {"subjects": {"a": "s"}}}}) == {"a": "s"}
    assert recorded_subjects({"nnunetv2_ext": {"sparsify": {"subjects": None}}}) is None
    assert recorded_subjects({"labels": {}}) is None
    with pytest.raises(ValueError, match="one object"):
        recorded_subjects({"nnunetv2_ext": {"subjects": ["a"]}})


def test_an_expression_gives_its_first_group_or_the_whole_match() -> None:
    assert subjects_by_regex(CASES, r"^(p\d)_.$") == subjects_by_regex(CASES, r"p\d") == GROUPED


@pytest.mark.parametrize(
    ("regex", "what"),
    [
        (r"^q(\d)", "'p1_a'"),
        (r"(x*)p1", "'p1_a'"),  # matches, but its group is empty: all cases would become one subject
        (r"(y)?p1", "'p1_a'"),
        ("", "'p1_a'"),
        ("(", "not a regular expression"),
    ],
)
def test_an_expression_that_finds_no_subject_is_refused_in_one_line(regex: str, what: str) -> None:
    with pytest.raises(ValueError, match="my_setting") as error:
        subjects_by_regex(CASES, regex, "my_setting")
    assert what in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.json", json.dumps(GROUPED)),
        ("t.csv", "case,subject\np1_a,p1\np1_b,p1\np2_a,p2\n"),
        ("t.csv", "\ufeffsubject,site,case\r\np1,x,p1_a\r\np1,x,p1_b\r\np2,y,p2_a\r\nnobody,y,other\r\n"),
        ("t.tsv", "case\tsubject\np1_a\tp1\np1_b\tp1\np2_a\tp2\n"),
    ],
)
def test_a_table_is_json_or_csv(tmp_path: Path, name: str, content: str) -> None:
    file = tmp_path / name
    file.write_text(content, encoding="utf-8", newline="")
    assert subjects_of_dataset({}, CASES, table=file) == GROUPED


def test_numbers_are_names_of_subjects(tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    file.write_text('{"p1_a": 0, "p1_b": 0, "p2_a": 1}')
    assert subjects_of_dataset({}, CASES, table=file) == {"p1_a": "0", "p1_b": "0", "p2_a": "1"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.json", None, "cannot be read as JSON"),
        ("t.json", "{", "cannot be read as JSON"),
        ("t.json", "[]", "must hold one object"),
        ("t.json", '{"p1_a": "p1"}', "'p1_b'"),
        ("t.json", '{"p1_a": null}', "'p1_a'.*None is not a name"),
        ("t.csv", None, "cannot be read as CSV"),
        ("t.csv", "", "columns case,subject"),
        ("t.csv", "case;subject\np1_a;p1\n", "columns case,subject"),
        ("t.csv", "case,subject\np1_a,p1\np1_a,p2\n", "'p1_a' two entries of subject, 'p1' and 'p2'"),
        ("t.csv", "case,subject\np1_a,p1\np1_b\n", "'p1_b'"),
        ("t.csv", b"\xff\xfe\x00", "cannot be read as CSV"),
    ],
)
def test_an_unusable_table_is_named(tmp_path: Path, name: str, content: str | bytes | None, message: str) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as error:
        subjects_of_dataset({}, CASES, table=file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_members_and_divided_subjects() -> None:
    assert members_of(CASES[::-1], GROUPED) == {"p1": ["p1_a", "p1_b"], "p2": ["p2_a"]}
    assert members_of(["b", "a"], None) == {"a": ["a"], "b": ["b"]}
    assert divided(["p1_a", "p2_a"], ["p1_b"], GROUPED) == ["p1"]
    assert divided(["p2_a"], ["p1_b"], GROUPED) == []


PAIRS = [  # cases, and the number of their subjects
    (["sub-9709Ses1", "sub-9709Ses2", "sub-9710Ses1", "sub-9711"], 3),
    (["patient001_frame01", "patient001_frame12", "patient002_frame01"], 2),
    (["a_L", "a_R", "b_L"], 2),
    (["hip07left", "hip07right", "hip08left"], 2),
    (["left_001", "right_001", "left_002"], 2),
    (["knee_left_1", "knee_left_2", "knee_left_3", "knee_right_1", "knee_right_2", "knee_right_3"], 3),
    (["sub-01_ses-1_L", "sub-01_ses-2_R", "sub-02_ses-1_L"], 2),
    (["p1_pre", "p1_post", "p2_pre"], 2),
    (["p01_1", "p01_2", "p02_1"], 2),
]


@pytest.mark.parametrize(("cases", "number"), PAIRS, ids=[cases[0] for cases, _ in PAIRS])
def test_names_that_look_like_pairs_come_with_an_expression_that_groups_them(cases: list[str], number: int) -> None:
    found = pairs_suggested(cases)
    assert found is not None
    assert subjects_of_dataset({}, cases, found.regex) == found.subjects  # the remedy passes its own check
    assert len(set(found.subjects.values())) == number
    one, other = found.example
    assert found.subjects[one] == found.subjects[other]
    assert one in str(found) and found.regex in str(found)


@pytest.mark.parametrize(
    "cases",
    [
        [f"hippocampus_{n:03d}" for n in range(20)],
        [f"BraTS2021_{n:05d}" for n in range(20)],
        [f"site{n // 10}_{n}" for n in range(20)],
        ["LA_001", "LA_002", "RA_001"],
        ["process1", "process2"],
        ["k0", "k1", "k2"],
        ["case1_left", "case1_right"],  # one subject alone: nothing to group
        [],
    ],
    ids=lambda cases: cases[0] if cases else "none",
)
def test_numbered_names_are_no_pairs(cases: list[str]) -> None:
    assert pairs_suggested(cases) is None
