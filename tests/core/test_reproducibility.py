"""With a seed, two trainings are the same; RADA's are in tests/rada, with its data."""

from __future__ import annotations

import pytest

from nnunetv2_ext.trainers.nnUNetTrainerJRAS import nnUNetTrainerJRAS
from nnunetv2_ext.trainers.nnUNetTrainerMedContext import nnUNetTrainerMedContext
from tests.repeatable import assert_the_seed_decides


@pytest.mark.parametrize("cls", [nnUNetTrainerMedContext, nnUNetTrainerJRAS])
def test_the_same_seed_gives_the_same_table_and_another_seed_another(cls, make_trainer, no_pictures, tmp_path) -> None:
    assert_the_seed_decides(
        lambda settings, results: make_trainer(cls, settings, configuration="2d", results=results), tmp_path
    )
