"""With a seed, two trainings with RADA are the same: batches of both streams, noise, own vectors, registration."""

from __future__ import annotations

import pytest

from tests.repeatable import assert_the_seed_decides


@pytest.mark.parametrize("semantics", ["clip", "learned"])
def test_the_same_seed_gives_the_same_table_and_another_seed_another(
    semantics, make_rada, tiny_clip, no_pictures, tmp_path
) -> None:
    clip = f"rada.clip_model={tiny_clip.name} rada.clip_weights={tiny_clip.weights}"
    method = f"rada.semantics={semantics} rada.min_voxels=4 rada.passes=1 rada.registration=on {clip}"
    (row, _) = assert_the_seed_decides(
        lambda settings, results: make_rada(f"{settings} {method}", results=results), tmp_path
    )
    assert {"loss/co_training_1", "loss/align_1", "loss/propagated_1", "rada/gate_1"} <= row.keys()
