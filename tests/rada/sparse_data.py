"""A phantom dataset made sparse, planned and preprocessed by nnU-Net's own functions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nnunetv2_ext.phantom import write_phantom_dataset
from tests.conftest import TinyDataset, in_this_process, plan_and_preprocess

DENSE_ID, SPARSE_ID = 1, 2


def make_sparse_tiny(
    root: Path, labelled: int = 4, test_share: float = 0.2, lowres: float | None = None, **phantom: Any
) -> TinyDataset:
    """Ten phantoms: `labelled` with three planes, two for testing, the others unlabelled; plans ``tiny``, 3d_fullres.

    With `lowres` the planes are thick enough for a 3d_lowres of so many mm, which the plans then have too.

    The dense source is dataset 1 in the same raw folder. splits_final.json is the one sparsify wrote: fold k validates
    on one labelled case.
    """
    from nnunetv2_ext.rada.annotation.sparsify import SparsifyOptions, sparsify

    options = {"num_train": 10, "num_test": 0, "shape": (24, 32, 24), "num_organs": 2, **phantom}
    write_phantom_dataset(root / "raw", DENSE_ID, **options)
    dataset = TinyDataset(root, SPARSE_ID, f"Dataset{SPARSE_ID:03d}_Phantom")
    environment = dataset.environment(root / "results") | {"nnUNet_n_proc_DA": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for key, value in environment.items():
            patch.setenv(key, value)
        chosen = {}
        if lowres is not None:
            dense = dataset.preprocessed / f"Dataset{DENSE_ID:03d}_Phantom"
            dense.mkdir(parents=True)
            coarse = {"transpose_backward": [0, 1, 2], "configurations": {"3d_lowres": {"spacing": [lowres] * 3}}}
            (dense / "coarse.json").write_text(json.dumps(coarse))
            chosen = {"plans": "coarse", "configuration": "3d_lowres"}
        sparsify(DENSE_ID, SPARSE_ID, SparsifyOptions(labelled, test_share=test_share, **chosen))
    plan_and_preprocess(dataset)
    if lowres is not None:
        add_lowres(dataset, lowres)
    return dataset


def add_lowres(dataset: TinyDataset, spacing: float) -> None:
    """Give the plans ``tiny`` a 3d_lowres of so many mm, and preprocess it."""
    plans = dataset.plans()
    fullres = plans["configurations"]["3d_fullres"]
    lowres = fullres | {"data_identifier": "tiny_3d_lowres", "spacing": [spacing] * 3}
    plans["configurations"]["3d_lowres"] = lowres
    (dataset.preprocessed / dataset.name / "tiny.json").write_text(json.dumps(plans))
    with in_this_process(dataset) as (api, _):
        api.preprocess([dataset.dataset_id], "tiny", configurations=("3d_lowres",), num_processes=(1,))
