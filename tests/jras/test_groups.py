"""Case id -> subject -> number."""

from __future__ import annotations

import hashlib

import torch

from nnunetv2_ext.jras.build import group_ids

KEY = bytes(range(16))


def test_without_subjects_every_case_is_its_own():
    assert len(set(group_ids(["a", "b", "c"], KEY).tolist())) == 3


def test_two_frames_of_one_patient_are_one_subject_and_case_order_is_kept():
    cases = ["patient002_frame09", "patient001_frame01", "patient001_frame12"]
    ids = group_ids(cases, KEY, {case: case[:10] for case in cases})
    assert ids[1] == ids[2] != ids[0] and torch.equal(ids[:1], group_ids(["patient002"], KEY))


def test_the_number_is_keyed_blake2b_of_eight_bytes():
    digest = hashlib.blake2b(b"case_1", digest_size=8, key=KEY).digest()
    ids = group_ids(["case_1"], KEY)
    assert ids.dtype == torch.int64
    assert ids.item() == int.from_bytes(digest, "little", signed=True)


def test_another_key_gives_other_numbers():
    assert group_ids(["case_1"], KEY) != group_ids(["case_1"], bytes(16))
