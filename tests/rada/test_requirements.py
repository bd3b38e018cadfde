"""The refusals: one line with cause and remedy, and nothing else refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from nnunetv2_ext.rada.requirements import (
    require_ignore_label,
    require_plain_labels,
    require_volumes,
)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: require_volumes((64, 64), "2d"), ("configuration 2d is 2-D", "use 3d_fullres or 3d_lowres")),
        (lambda: require_volumes((64, 64)), ("configuration of these plans is 2-D",)),
        (
            lambda: require_plain_labels({"background": 0, "whole": [1, 2], "core": (2,)}, "Dataset007_X"),
            ("dataset.json of Dataset007_X declares regions (whole, core)", "one integer per class"),
        ),
        (
            lambda: require_ignore_label(None, "Dataset007_X"),
            ("Dataset007_X has no ignore label", 'declare "ignore"', "nnUNetv2_ext sparsify --labelled"),
        ),
    ],
)
def test_cause_and_remedy_in_one_line(call: Callable[[], object], said: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as error:
        call()
    assert "\n" not in str(error.value) and all(part in str(error.value) for part in said)


def test_what_fits_passes() -> None:
    require_volumes((20, 64, 64), "3d_fullres")
    require_plain_labels({"background": 0, "organ": 1, "ignore": 2}, "Dataset007_X")
    assert require_ignore_label(2, "Dataset007_X") == 2
