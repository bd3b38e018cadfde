"""Settings: what is written is what is meant, and what makes no sense is refused in one sentence."""

from __future__ import annotations

import inspect
import re

import pytest

from nnunetv2_ext.core.resolve import resolve
from nnunetv2_ext.core.settings import fields_by_key, is_marked, without_local_paths
from nnunetv2_ext.jras import network as network_module
from nnunetv2_ext.jras.bank_training import BankTraining
from nnunetv2_ext.jras.settings import JRASSettings
from nnunetv2_ext.trainers.nnUNetTrainerJRAS import nnUNetTrainerJRAS
from nnunetv2_ext.trainers.nnUNetTrainerMedContextJRAS import nnUNetTrainerMedContextJRAS


def jras(text: str):
    return resolve(nnUNetTrainerJRAS.settings_model(), environment=text).settings.jras


def test_every_setting_says_what_it_is_and_where_it_comes_from():
    for key, field in fields_by_key(nnUNetTrainerJRAS.settings_model()).items():
        if key.startswith("jras."):
            assert field.description and "Source:" in field.description, key


def test_what_shapes_the_network_must_agree_in_all_folds():
    fields = fields_by_key(nnUNetTrainerJRAS.settings_model())
    structural = {key.removeprefix("jras.") for key, field in fields.items() if is_marked(field, "structural")}
    assert structural == {
        *(
            "retriever",
            "retriever_encoder",
            "fusion",
            "num_guides",
            "tau",
            "key_dim",
            "store_stride",
            "retriever_widths",
            "guide_widths",
            "dedup_cosine",
        )
    }


def test_the_predictor_reads_nothing_in_which_folds_may_differ():
    """It builds every fold's network from the one plans.json they share; a bank's size comes with its weights."""
    source = inspect.getsource(network_module) + inspect.getsource(BankTraining.build_network_architecture)
    read = set(re.findall(r"settings\.(\w+)", source)) & set(JRASSettings.model_fields)
    assert {"num_guides", "dedup_cosine"} <= read
    assert {name for name in read if not is_marked(JRASSettings.model_fields[name], "structural")} == set()


def test_both_methods_blocks_are_there_together():
    blocks = {
        key.partition(".")[0] for key in fields_by_key(nnUNetTrainerMedContextJRAS.settings_model()) if "." in key
    }
    assert blocks == {"jras", "medcontext"}


def test_none_is_a_retriever():
    assert jras("jras.retriever=none").retriever == "none" and not jras("jras.retriever=none").has_retrieval


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("jras.num_guides=0", "greater than or equal to 1"),
        ("jras.num_guides=600", r"num_guides \(600\) must not exceed bank_size \(512\)"),
        ("jras.num_guides=true", "not true or false"),
        ("jras.tau=0", "greater than 0"),
        ("jras.tau=.nan", "finite"),
        ("jras.fusion=add", "attention"),
        ("jras.guide_dropout=1.5", "less than or equal to 1"),
        ("jras.retriever_widths=[4]", "at least 3"),
        ("jras.retriever_encoder=bottleneck jras.fusion=concat", "cannot be combined with fusion=concat"),
        ("jras.retriever_encoder=bottleneck jras.retriever=frozen", "cannot be combined with retriever=frozen"),
        ("jras.refresh_every=0", "greater than or equal to 1"),
        ("jras.num_guide=3", "did you mean jras.num_guides"),
    ],
)
def test_mistakes_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        jras(text)


def test_the_bottleneck_teaches_the_query_side_only():
    assert jras("").trains_keys and not jras("jras.retriever_encoder=bottleneck").trains_keys
    # without retrieval nothing is contradictory
    assert not jras("jras.retriever=none jras.retriever_encoder=bottleneck jras.fusion=concat").has_retrieval


@pytest.mark.parametrize("text", ["jras.index=IVF256,Flat", "jras.nprobe=8", "jras.ef_search=32"])
def test_what_an_approximate_search_was_set_to_is_read_and_told_to_have_no_effect(text):
    with pytest.warns(UserWarning, match="jras.index, nprobe and ef_search have no effect") as told:
        jras(text)
    assert len({str(warning.message) for warning in told}) == 1


def test_old_settings_of_the_exact_search_are_read_in_silence(recwarn):
    assert jras("jras.index=Flat jras.nprobe=none jras.ef_search=none") == jras("") and not recwarn.list


def test_an_old_model_folders_start_file_is_left_out_of_exports():
    block = {"jras": {"init_from": "/home/somebody/plain.pth", "tau": 0.2}}
    assert without_local_paths(block, nnUNetTrainerJRAS.settings_model()) == {"jras": {"tau": 0.2}}
