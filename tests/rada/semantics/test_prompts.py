"""Sentences for CLIP's text encoder."""

from __future__ import annotations

import pytest

from nnunetv2_ext.rada.semantics.prompts import class_prompts, modality

LABELS = {"background": 0, "left_kidney": 2, "liver": 1, "ignore": 3}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("CT", "CT"),
        ("ct_portal", "CT"),
        ("CTA", "CT"),
        ("T1", "MRI"),
        ("T1w", "MRI"),
        ("t2star", "MRI"),
        ("T2-FLAIR", "MRI"),
        ("MRI", "MRI"),
        ("ADC", "MRI"),
        ("noNorm", "medical"),
        ("zscore", "medical"),
        ("contrast", "medical"),  # neither CT nor T1 because letters of them are in it
        ("PET", "medical"),
        ("", "medical"),
    ],
)
def test_modality(name, expected):
    assert modality({"0": name}) == expected


def test_modality_of_the_chosen_channel():
    assert modality({"0": "CT", "1": "T2"}, 1) == "MRI"
    assert modality({"0": "CT"}, 4) == "medical"


def test_sentences_are_ordered_by_label_and_all_printed(said):
    lines, log = said
    found = class_prompts(LABELS, {"0": "CT"}, log=log)
    assert found == (
        "a CT slice showing the background",
        "a CT slice showing the liver",
        "a CT slice showing the left kidney",
    )
    assert all(any(sentence in line for line in lines) for sentence in found)
    assert not any("ignore" in line for line in lines)


def test_article():
    assert class_prompts({"background": 0, "x": 1}, {"0": "T1"}, log=lambda _: None)[1] == "an MRI slice showing the x"
    assert (
        class_prompts({"background": 0, "x": 1}, {"0": "?"}, log=lambda _: None)[1] == "a medical slice showing the x"
    )


def test_own_sentence(said):
    lines, log = said
    found = class_prompts(LABELS, {"0": "CT"}, {"liver": "a bright liver"}, log=log)
    assert found[1:] == ("a bright liver", "a CT slice showing the left kidney")
    assert any("left_kidney" in line and "built-in sentence" in line for line in lines), "a class left out is named"
    lines.clear()
    class_prompts(LABELS, {"0": "CT"}, {"liver": "x", "left_kidney": "y"}, log=log)
    assert not any("built-in" in line for line in lines)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"livre": "x"}, "no class livre; did you mean liver"),
        ({"xyzzy": "x"}, "no class xyzzy; classes are background, left_kidney, liver"),
        ({"ignore": "x"}, "no class ignore"),
        ({"liver": "  "}, "sentence for liver is empty"),
    ],
)
def test_wrong_sentences(overrides, words):
    with pytest.raises(ValueError, match=words):
        class_prompts(LABELS, {"0": "CT"}, overrides, log=lambda _: None)


def test_a_missing_channel_is_refused():
    with pytest.raises(ValueError, match=r"rada.image_channel=1: dataset.json names the channels 0"):
        class_prompts(LABELS, {"0": "CT"}, channel=1, log=lambda _: None)
