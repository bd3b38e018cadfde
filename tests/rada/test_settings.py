"""Settings: bounds, words YAML reads as booleans, and values that contradict each other."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from nnunetv2_ext.core import resolve as core_resolve
from nnunetv2_ext.core import settings as ext_settings
from nnunetv2_ext.rada.settings import RADASettings

MODEL = ext_settings.settings_model("T", {"rada": RADASettings})


def resolve(text: str) -> RADASettings:
    return core_resolve.resolve(MODEL, environment=text).settings.rada


def test_on_off_two_and_none_arrive_as_the_words_they_are():
    found = resolve(
        "rada.semantics=off rada.deep_supervision=off rada.registration=on rada.gate_base=2 rada.alpha_weights=none"
    )
    assert (found.semantics, found.deep_supervision, found.registration) == ("off", "off", "on")
    assert found.gate_base == "2" and found.alpha_weights is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rada.lambda_max=0.6", "less than or equal to 0.5"),
        ("rada.labelled_share=0", "greater than 0"),
        ("rada.num_networks=2", "1 or 3"),
        ("rada.infer=single:4", "pattern"),
        ("rada.infer=single:2 rada.num_networks=1", "names a network that num_networks"),
        ("rada.region=alpha", "rada.region=alpha needs Alpha-CLIP's weights"),
        ("rada.clip_weights=none", "semantics=clip needs clip_weights"),
        ("rada.semantics=on", "'clip', 'learned' or 'off'"),
        ("rada.passes=true", "not true or false"),
        ("rada.tau=0", "greater than 0"),
        ("rada.lambda_mx=0.1", "did you mean rada.lambda_max"),
    ],
)
def test_a_value_that_cannot_be_is_one_line_with_its_key(text, said):
    with pytest.raises(ValueError, match=r"rada") as error:
        resolve(text)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_prompts_are_a_mapping():
    assert resolve("'rada.prompts={liver: a CT slice of the liver}'").prompts == {"liver": "a CT slice of the liver"}
    with pytest.raises(ValidationError):
        RADASettings(prompts="liver")


def test_every_setting_says_its_source_and_inference_can_be_changed_later():
    for name, field in RADASettings.model_fields.items():
        assert "Source:" in str(field.description), name
    assert ext_settings.is_marked(RADASettings.model_fields["infer"], "resumable")
    for name in ("num_networks", "semantics", "infer"):
        assert ext_settings.is_marked(RADASettings.model_fields[name], "structural")


def test_which_network_predicts():
    assert RADASettings().single_network is None and RADASettings(infer="single:3").single_network == 2


def test_region_auto():
    assert RADASettings(alpha_weights="file").region_shown == "alpha" and RADASettings().region_shown == "crop"
    assert RADASettings(region="pool", alpha_weights="file").region_shown == "pool"


def test_the_paper_digest_preset_switches_registration_on():
    assert resolve("rada.preset=paper-digest").registration == "on"
    assert resolve("rada.preset=paper-digest rada.registration=off").registration == "off"
