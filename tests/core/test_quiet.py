"""Chatter is kept back, and shown if something fails."""

import warnings

import pytest

from nnunetv2_ext.core.quiet import quiet


def test_what_goes_well_is_silent(capsys) -> None:
    with quiet(), warnings.catch_warnings(record=True) as warned:
        print("Searching in external trainer paths")
        warnings.warn("will be gone", FutureWarning, stacklevel=1)
    print("answer")
    assert capsys.readouterr().out == "answer\n" and not warned


def test_what_fails_says_what_it_said(capsys) -> None:
    with pytest.raises(RuntimeError, match="not found"), quiet():
        print("Searching in external trainer paths")
        raise RuntimeError("not found")
    assert capsys.readouterr().out == "Searching in external trainer paths\n"


def test_other_warnings_stay() -> None:
    with pytest.warns(UserWarning, match="heed me"), quiet():
        warnings.warn("heed me", UserWarning, stacklevel=1)
