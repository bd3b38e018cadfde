"""MedContext's settings: the documented defaults, and refusal of everything that cannot be meant."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from pydantic import ValidationError

from nnunetv2_ext.medcontext.settings import MedContextSettings


def test_defaults_are_those_of_the_design():
    assert MedContextSettings().model_dump() == {
        "unlabelled": None,
        "unlabelled_weight": 2.0,
        "unlabelled_start": 0.0,
        "unlabelled_ramp": 0.1,
        "unlabelled_refresh": None,
        "preset": None,
        "supervised_weight": 2.0,
        "masked_supervised_weight": 0.0,
        "beta": 2.0,
        "consistency": "prob_mse",
        "ramp_fraction": 0.01,
        "cons_on_ignored": False,
        "mask_ratio": 0.4,
        "mask_warmup": 0.0,
        "mask_rounding": "nearest",
        "mask_block": None,
        "mask_per_sample": True,
        "tube": False,
        "fill": "zero",
        "ema_base": 0.996,
        "ema_final": 1.0,
        "ema_schedule": "global",
        "masked_fraction": 1.0,
        "masked_every": 1,
    }


def test_every_setting_says_what_it_means_and_where_it_comes_from():
    for name, field in MedContextSettings.model_fields.items():
        assert field.description and len(field.description) > 30, name
        assert "Source: " in field.description, name


def test_paper_code_preset_holds_valid_settings_and_changes_the_defaults():
    overrides = MedContextSettings.PRESETS["paper_code"]
    chosen = MedContextSettings(preset="paper_code", **overrides)
    assert chosen.beta == 0.4 and chosen.consistency == "logits_over_norm" and chosen.ramp_fraction == 0
    assert chosen.mask_ratio == 0.4 and chosen.mask_rounding == "floor" and chosen.mask_block == [4, 4]
    assert chosen.tube and not chosen.mask_per_sample and chosen.fill == "zero"
    assert chosen.ema_schedule == "released" and chosen.ema_base == 0.996
    assert MedContextSettings(preset="paper_code").beta == 2, "the model itself must not merge a preset"


@pytest.mark.parametrize(
    "given",
    [
        {"mask_ratoi": 0.5},
        {"mask_ratio": 1.2},
        {"mask_ratio": -0.1},
        {"mask_ratio": "much"},
        {"mask_ratio": True},
        {"mask_ratio": float("nan")},
        {"beta": -1},
        {"beta": float("inf")},
        {"supervised_weight": -0.5},
        {"masked_supervised_weight": -0.5},
        {"mask_warmup": 1.5},
        {"ramp_fraction": 1.5},
        {"ema_base": 1.01},
        {"ema_final": 1.01},
        {"ema_base": 0.9, "ema_final": 0.5},
        {"ema_final": 0.5},
        {"masked_fraction": 2},
        {"masked_every": 0},
        {"masked_every": 1.5},
        {"masked_every": True},
        {"mask_block": 0},
        {"mask_block": [4, 0]},
        {"mask_block": [4]},
        {"mask_block": [4, 4, 4, 4]},
        {"mask_block": [4, True]},
        {"mask_block": 2.5},
        {"consistency": "mse"},
        {"fill": "mean"},
        {"preset": "papers"},
        {"mask_rounding": "up"},
        {"ema_schedule": "epoch"},
        {"tube": "maybe"},
        {"cons_on_ignored": None},
        {"supervised_weight": 0, "beta": 0},
    ],
)
def test_bad_settings_are_refused_by_name(given):
    with pytest.raises(ValidationError) as caught:
        MedContextSettings(**given)
    assert next(reversed(given)) in str(caught.value)


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ({"mask_block": 8}, 8),
        ({"mask_block": "8"}, 8),
        ({"mask_block": [4, 8, 8]}, [4, 8, 8]),
        ({"mask_block": None}, None),
        ({"beta": "1e-3"}, 1e-3),  # PyYAML reads 1e-3 as text
        ({"beta": 0}, 0.0),
        ({"masked_fraction": 0}, 0.0),
        ({"masked_every": "3"}, 3),
        ({"tube": "true"}, True),
    ],
)
def test_values_in_the_forms_users_type_them(given, value):
    assert getattr(MedContextSettings(**given), next(iter(given))) == value


def test_a_teacher_equal_to_the_student_can_be_asked_for():
    assert MedContextSettings(ema_base=0, ema_final=0).ema_final == 0


def test_settings_are_frozen_and_survive_json():
    chosen = MedContextSettings(mask_block=[4, 8, 8], beta=0.1)
    with pytest.raises(ValidationError, match="frozen"):
        chosen.beta = 0.2
    assert MedContextSettings(**json.loads(json.dumps(chosen.model_dump()))) == chosen


def test_reading_settings_does_not_load_torch():
    code = "import sys, nnunetv2_ext.medcontext.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
