"""Settings: which source wins, what is refused and how it is said, what a continued training keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field

from nnunetv2_ext.core.resolve import resolve, resume
from nnunetv2_ext.core.settings import (
    LOCAL_PATH,
    STRUCTURAL,
    describe,
    fields_by_key,
    flatten,
    is_marked,
    settings_model,
    without_local_paths,
)
from nnunetv2_ext.core.sources import ENVIRONMENT_VARIABLE, _Loader, from_environment, to_yaml
from nnunetv2_ext.medcontext.settings import MedContextSettings


class ToySettings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {"strong": {"weight": 9.0, "scale": 8}}

    preset: str | None = Field(None, description="preset")
    weight: float = Field(1.0, ge=0, description="weight")
    scale: int = Field(1, ge=1, description="scale")
    width: float = Field(0.5, description="width of the network", json_schema_extra=STRUCTURAL)


MODEL = settings_model("nnUNetTrainerToy", {"toy": ToySettings})
MEDCONTEXT = settings_model("nnUNetTrainerMedContext", {"medcontext": MedContextSettings})


def value(key: str, environment: str = " ", model=MODEL, **sources):
    return flatten(resolve(model, environment=environment, **sources).settings)[key]


def message(environment: str = " ", model=MEDCONTEXT, **sources) -> str:
    with pytest.raises(ValueError) as caught:
        resolve(model, environment=environment, **sources)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_later_sources_win_and_each_value_knows_its_source():
    layers: dict[str, Any] = {}
    assert value("toy.weight", **layers) == 1.0
    layers["trainer_defaults"] = {"toy.weight": 2.0}
    assert value("toy.weight", **layers) == 2.0
    layers["plans"] = {
        "toy": {"preset": "strong"}
    }  # a preset is beneath explicit keys, above the trainer's own default
    assert value("toy.weight", **layers) == 9.0
    layers["plans"] = {"toy": {"preset": "strong", "weight": 3.0}}
    assert value("toy.weight", **layers) == 3.0
    resolved = resolve(MODEL, environment="toy.weight=4", **layers)
    assert flatten(resolved.settings)["toy.weight"] == 4.0
    assert resolved.sources == {
        "toy.weight": ENVIRONMENT_VARIABLE,
        "toy.preset": "plans",
        "toy.scale": "preset",
    }
    assert resolved.explicit() == {"toy.weight": 4.0, "toy.preset": "strong"}


def test_a_preset_of_a_later_source_wins_over_keys_of_an_earlier_one():
    """The plans.json of a model folder holds every key: a preset typed today must not be without effect."""
    full = MODEL().model_dump(mode="json")
    resolved = resolve(MODEL, plans=full, environment="toy.preset=strong toy.scale=2")
    assert (resolved.settings.toy.weight, resolved.settings.toy.scale) == (9.0, 2)
    resolved = resolve(MODEL, plans={"toy.preset": "strong"}, environment="toy.scale=3")
    assert (resolved.settings.toy.weight, resolved.settings.toy.scale) == (9.0, 3)


@pytest.mark.parametrize("preset", ["paper", "none"])
def test_of_two_presets_of_a_method_only_the_later_one_counts(preset):
    """Else a training would bear the name of one and have values of both."""
    plans = {"medcontext.preset": "paper_code", "medcontext.tube": False}
    mixed = resolve(MEDCONTEXT, plans=plans, environment=f"medcontext.preset={preset}")
    assert mixed.settings == resolve(MEDCONTEXT, environment=f"medcontext.preset={preset}").settings
    assert "preset" not in mixed.sources.values() if preset == "none" else mixed.settings.medcontext.beta == 0.5


@pytest.mark.parametrize("block", [{"toy.weight": 7}, {"toy": {"weight": 7}}])
def test_plans_block_may_be_dotted_or_nested(block):
    assert value("toy.weight", plans=block) == 7.0


@pytest.mark.parametrize(
    "text",
    [
        "num_epochs: 250\ninitial_lr: 1e-3\nmedcontext:\n  mask_ratio: 0.6\n  mask_block: [8, 8, 8]\n",
        "num_epochs: 250\ninitial_lr: 0.001\nmedcontext.mask_ratio: 0.6\nmedcontext.mask_block: [8, 8, 8]\n",
        "num_epochs: 250\ninitial_lr: 1.0e-3\nmedcontext: {mask_ratio: 0.6}\nmedcontext.mask_block: [8, 8, 8]\n",
    ],
)
def test_yaml_file_and_pairs_say_the_same(tmp_path, text):
    path = tmp_path / "my settings=1.yaml"  # blanks and "=" in a path are no reason to read it as pairs
    path.write_text(text)
    pairs = "num_epochs=250 initial_lr=1e-3 medcontext.mask_ratio=0.6 medcontext.mask_block=[8,8,8]"
    resolved = resolve(MEDCONTEXT, environment=str(path))
    assert resolved.settings == resolve(MEDCONTEXT, environment=pairs).settings
    assert resolved.settings.initial_lr == 1e-3


def test_the_variable_is_read_when_no_text_is_given(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "num_epochs=7")
    assert resolve(MODEL).settings.num_epochs == 7
    monkeypatch.delenv(ENVIRONMENT_VARIABLE)
    assert resolve(MODEL).settings.num_epochs == 1000


def test_pairs_hold_lists_blanks_and_none():
    assert from_environment("train_cases=[case_1,case_2]") == {"train_cases": ["case_1", "case_2"]}
    assert from_environment("train_cases='[a b, c]'  seed=3") == {"train_cases": ["a b", "c"], "seed": 3}
    assert value("batch_size", "batch_size=null", plans={"batch_size": 4}) is None
    assert from_environment("  ") == from_environment(None) == {}


@pytest.mark.parametrize("quote", ["", "'", '"'])
@pytest.mark.parametrize(
    "text", [r"C:\Users\me\model.pth", r"\\server\share\n.pth", r"^(sub-\d+)_\w", "ends_in\\", "a#b"]
)
def test_a_backslash_of_a_pair_stands_for_itself(text, quote):
    """Windows paths and expressions: without its backslash, ``sub-\\d*`` matches every case as one subject."""
    assert from_environment(f"group_regex={quote}{text}{quote} seed=1") == {"group_regex": text, "seed": 1}


def test_quotes_group_what_holds_backslashes_and_blanks():
    assert from_environment(r"""a="C:\My files\x" b='[p\1, q r]'""") == {"a": r"C:\My files\x", "b": [r"p\1", "q r"]}
    with pytest.raises(ValueError, match=r"No closing quotation.*close the quotes"):
        from_environment(r"a='C:\x")


@pytest.mark.parametrize("nothing", ["none", "None", "null", "~", ""])
def test_none_means_nothing_in_pairs_and_in_a_file(tmp_path, nothing):
    path = tmp_path / "settings.yaml"
    path.write_text(f"seed: {nothing}\nmedcontext:\n  mask_block: {nothing}\n  preset: {nothing}\n")
    for text in (str(path), f"seed={nothing} medcontext.mask_block={nothing} medcontext.preset={nothing}"):
        given = {"seed": 1, "medcontext.mask_block": 4, "medcontext.preset": "paper"}
        settings = resolve(MEDCONTEXT, plans=given, environment=text).settings
        assert (settings.seed, settings.medcontext.mask_block, settings.medcontext.preset) == (None, None, None)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("0", 0),
        ("-3", -3),
        ("1e3", "1e3"),
        ("1.e3", 1000.0),
        ("1e+3", 1000.0),
        ("1e-05", 1e-5),
        ("12345e78", "12345e78"),
        ("1.5E+2", 150.0),
        (".5", 0.5),
        ("2.", 2.0),
        ("010", "010"),  # 8 in YAML 1.1
        ("001", "001"),
        ("12:30", "12:30"),  # 750
        ("1_000", "1_000"),
        ("on", "on"),  # True
        ("no", "no"),
        ("true", True),
        ("e5", "e5"),
        (".", "."),
        ("[001, 10, a1]", ["001", 10, "a1"]),
    ],
)
def test_values_are_what_they_look_like(tmp_path, written, read):
    path = tmp_path / "settings.yaml"
    path.write_text(f"key: {written}\n")
    for got in (from_environment(f"'key={written}'")["key"], from_environment(str(path))["key"]):
        assert got == read and type(got) is type(read)


# PyYAML does not put JSON's surrogate pairs together
TEXT = st.text(st.characters(max_codepoint=0xFFFF, exclude_categories=["Cs"]))
NUMBERS = st.floats(allow_nan=False, allow_infinity=False) | st.integers()


@given(NUMBERS | st.booleans() | st.none() | TEXT | st.from_regex(r"[-+]?[0-9.]*(e[0-9])?", fullmatch=True))
@example("none")
@example("1e3")
@example("12345e78")
@example(".5e1")
@example("on")
def test_what_is_written_is_read_back(value):
    for text in (to_yaml({"key": value}), json.dumps({"key": value})):
        assert yaml.load(text, _Loader) == {"key": value}
    assert yaml.safe_load(to_yaml({"key": value})) == {"key": value}  # and other programs read the same


def test_a_count_with_a_leading_zero_is_decimal_and_a_clock_no_number():
    assert value("num_epochs", "num_epochs=010") == 10
    assert value("initial_lr", "initial_lr=1e3") == value("num_epochs", "num_epochs=1e+3") == 1000
    assert "num_epochs" in message("num_epochs=12:30")


def test_case_ids_of_digits_stay_ids_and_their_order_means_nothing():
    assert value("train_cases", "train_cases=[002,001]") == ["001", "002"]
    assert value("train_cases", "train_cases=[11,2,11,12345e78]") == ["11", "12345e78", "2"]
    assert "train_cases" in message("train_cases=[[1]]") and "train_cases" in message("train_cases=[true]")


def test_a_value_in_the_place_of_a_method_says_how_to_write_its_settings():
    assert "medcontext=5" in message("medcontext=5") and "write them as medcontext.NAME=VALUE" in message(
        "medcontext=5"
    )


def test_a_long_list_of_cases_is_not_taken_for_a_file_name():
    cases = [f"patient_{number:05d}" for number in range(400)]
    assert value("train_cases", f"train_cases=[{','.join(cases)}]") == cases


def test_an_empty_block_of_a_file_sets_nothing(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("num_epochs: 3\nmedcontext:\n#  beta: 1\n")
    assert resolve(MEDCONTEXT, environment=str(path)).explicit() == {"num_epochs": 3}
    path.write_text("# nothing yet\n")
    assert resolve(MEDCONTEXT, environment=str(path)).explicit() == {}


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("num_epoch=5", "num_epochs"),
        ("medcontext.mask_ratoi=0.5", "medcontext.mask_ratio"),
        ("mask_ratio=0.5", "medcontext.mask_ratio"),  # the block is missing
        ("medcontex.beta=0.5", "medcontext.beta"),
    ],
)
def test_a_typo_is_answered_with_the_nearest_key(wrong, nearest):
    text = message(wrong)
    assert repr(wrong.partition("=")[0]) in text and nearest in text and ENVIRONMENT_VARIABLE in text


def test_a_key_nothing_is_near_to_points_to_the_list():
    assert "`nnUNetv2_ext settings nnUNetTrainerMedContext`" in message("xyzzy=1")
    assert "plans" in message(plans={"medcontext": {"xyzzy": 1}})
    assert "medcontext" in message("medcontext=5")  # a block is no key


@pytest.mark.parametrize(
    "pair",
    [
        "medcontext.mask_ratio=1.2",
        "medcontext.ema_base=1.5",
        "medcontext.beta=-1",
        "medcontext.masked_every=0",
        "medcontext.fill=blue",
        "medcontext.mask_ratio=.nan",
        "num_epochs=0",
        "num_epochs=many",
        "num_epochs=2.5",
        "num_epochs=yes",
        "batch_size=true",
        "train_cases=0",
        "train_cases=-3",
        "train_cases=[]",
        "train_cases=true",
        "train_cases=case_1",
        "initial_lr=0",
        "initial_lr=inf",
        "weight_decay=.nan",
        "seed=-1",
        "oversample_foreground_percent=1.01",
        "tensorboard=perhaps",
    ],
)
def test_a_wrong_value_is_named_with_its_key_source_and_meaning(pair):
    key, text = pair.partition("=")[0], message(pair)
    read = from_environment(pair)[key]
    assert f"{key}={read!r} (from {ENVIRONMENT_VARIABLE})" in text or f"{key}={read}" in text
    assert fields_by_key(MEDCONTEXT)[key].description in text


def test_a_contradiction_within_a_block_names_its_source():
    text = message("medcontext.ema_final=0.5")
    assert f"(from {ENVIRONMENT_VARIABLE})" in text and "ema_base" in text


def test_all_wrong_values_are_reported_at_once():
    text = message("num_epochs=0", plans={"medcontext.mask_ratio": 2})
    assert "num_epochs=0 (from nnUNet_ext_settings)" in text and "medcontext.mask_ratio=2 (from plans)" in text


def test_an_unknown_preset_lists_the_known_ones():
    assert "medcontext.preset='papers'" in message("medcontext.preset=papers")
    assert "medcontext.preset=['paper']" in message("medcontext.preset=[paper]")
    assert "medcontext.preset={'paper': 1}" in message(plans={"medcontext": {"preset": {"paper": 1}}})
    assert "there is paper, paper_code" in message("medcontext.preset=papers")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/no/such/file.yaml", "does not exist"),
        ("num_epochs = 5", "without blanks around"),
        ("num_epochs=5 seed", "'seed' is not of the form key=value"),
        ("=5", "not of the form key=value"),
        ("num_epochs=5 num_epochs=6", "sets 'num_epochs' twice"),
        ("train_cases='[a", "close the quotes"),
        ("train_cases=[a", "the value of 'train_cases' cannot be read"),
        ("'medcontext={beta: 0.1}' medcontext.beta=0.2", "sets 'medcontext.beta' twice"),
    ],
)
def test_text_that_cannot_be_read(text, expected):
    assert expected in message(text)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"- num_epochs\n- 5\n", "not a list"),
        (b"just words", "not a str"),
        (b"num_epochs: [5\nseed: }", "cannot be read as YAML"),
        (b"\xff\xfe\x00num_epochs: 5", "cannot be read as YAML"),
        (b"num_epochs: 5\nseed: 1\nnum_epochs: 6\n", "'num_epochs' is set twice"),
        (b"medcontext: {beta: 0.1}\nmedcontext.beta: 0.2\n", "sets 'medcontext.beta' twice"),
        (b"5: 6\n", "unknown setting '5'"),
        (b"!!python/object/apply:os.system [ls]", "cannot be read as YAML"),
    ],
)
def test_a_file_that_is_no_settings_file(tmp_path, content, expected):
    path = tmp_path / "settings.yaml"
    path.write_bytes(content)
    text = message(str(path))
    assert expected in text


def test_a_folder_is_no_settings_file(tmp_path):
    assert str(tmp_path) in message(str(tmp_path))


@pytest.mark.parametrize("block", [["medcontext.beta"], "num_epochs=5", 3])
def test_a_plans_block_that_is_no_mapping(block):
    assert "plans['nnunetv2_ext'] must hold settings" in message(plans=block)


def test_every_key_says_what_it_means_and_lengths_are_resumable():
    fields = fields_by_key(MEDCONTEXT)
    assert all(field.description for field in fields.values())
    assert is_marked(fields["num_epochs"], "resumable") and not is_marked(fields["initial_lr"], "resumable")
    assert is_marked(fields_by_key(MODEL)["toy.width"], "structural")


class ReadingSettings(BaseModel):
    start: str | None = Field(None, description="file", json_schema_extra=LOCAL_PATH)
    depth: int = Field(1, description="depth")


def test_paths_of_this_machine_are_dropped_from_a_block_nested_or_dotted():
    model = settings_model("nnUNetTrainerReading", {"reading": ReadingSettings, "toy": ToySettings})
    block = {"reading": {"start": "/a/b.pth", "depth": 2}, "toy": {"scale": 3}, "num_epochs": 4}
    kept = without_local_paths(block, model)
    assert kept == {"reading": {"depth": 2}, "toy": {"scale": 3}, "num_epochs": 4}
    assert block["reading"]["start"] == "/a/b.pth"
    assert without_local_paths({"reading.start": "/a/b.pth", "toy.scale": 3}, model) == {"toy.scale": 3}
    assert resolve(model, plans=kept, environment=" ").settings.reading.start is None


def test_describe_shows_every_key_and_the_source_of_what_is_no_default():
    resolved = resolve(MODEL, plans={"toy.scale": 4}, environment="num_epochs=5")
    lines = describe(resolved.settings, resolved.sources).splitlines()
    assert len(lines) == len(fields_by_key(MODEL))
    assert f"  num_epochs = 5    ({ENVIRONMENT_VARIABLE})" in lines
    assert "  toy.scale = 4    (plans)" in lines and "  toy.weight = 1.0" in lines


# ---- continuing


def saved(**changes) -> dict[str, Any]:
    return flatten(resolve(MODEL, environment=" ").settings) | changes


def test_a_continued_training_keeps_its_settings():
    old = saved(initial_lr=0.5, num_epochs=3, **{"toy.scale": 5})
    resolved = resume(MODEL, old, resolve(MODEL, environment=" "), strict=True)
    assert flatten(resolved.settings) == old
    assert set(resolved.sources.values()) == {"checkpoint"}


def test_training_lengths_may_change_and_other_keys_may_be_repeated():
    now = resolve(MODEL, environment="num_epochs=9 initial_lr=0.5")
    resolved = resume(MODEL, saved(initial_lr=0.5, num_epochs=3), now, strict=True)
    assert (resolved.settings.num_epochs, resolved.settings.initial_lr) == (9, 0.5)
    assert resolved.sources["num_epochs"] == ENVIRONMENT_VARIABLE


@pytest.mark.parametrize(
    ("sources", "key", "old", "new", "named"),
    [
        ({"environment": "initial_lr=0.1"}, "initial_lr", 0.5, 0.1, ENVIRONMENT_VARIABLE),
        ({"environment": " ", "plans": {"toy": {"scale": 2}}}, "toy.scale", 5, 2, "plans"),
        ({"environment": "toy.preset=strong"}, "toy.preset", None, "strong", ENVIRONMENT_VARIABLE),
        ({"environment": "train_cases=3"}, "train_cases", ["a", "b"], 3, ENVIRONMENT_VARIABLE),
    ],
)
def test_a_conflict_shows_both_values_and_the_source(sources, key, old, new, named):
    now = resolve(MODEL, **sources)
    with pytest.raises(ValueError) as caught:
        resume(MODEL, saved(**{key: old}), now, strict=True)
    text = str(caught.value)
    assert f"{key}={old}" in text and f"{key}={new}" in text and named in text and "\n" not in text
    lenient = resume(MODEL, saved(**{key: old}), now, strict=False)  # --val and predicting take what was trained
    assert flatten(lenient.settings)[key] == old


def test_a_key_an_older_checkpoint_does_not_have_had_its_default():
    old = saved()
    del old["toy.scale"]
    assert resume(MODEL, old, resolve(MODEL, environment="toy.scale=1"), strict=True).settings.toy.scale == 1
    with pytest.raises(ValueError, match=r"started with toy\.scale=1.*toy\.scale=2"):
        resume(MODEL, old, resolve(MODEL, environment="toy.scale=2"), strict=True)


def test_a_key_that_no_longer_exists_is_dropped():
    old = saved() | {"toy.gone": 3}
    assert resume(MODEL, old, resolve(MODEL, environment=" "), strict=True).settings == MODEL()


# ---- what is written can be read again

names = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=8)
explicit = st.fixed_dictionaries(
    {},
    optional={
        "num_epochs": st.integers(1, 10**9),
        "initial_lr": st.floats(1e-12, 1e6),
        "weight_decay": st.floats(0, 1),
        "seed": st.none() | st.integers(0, 2**31 - 1),
        "train_cases": st.none() | st.integers(1, 100) | st.lists(names, min_size=1, max_size=4),
        "tensorboard": st.booleans(),
        "medcontext.mask_ratio": st.floats(0, 1),
        "medcontext.preset": st.sampled_from([None, "paper_code"]),
        "medcontext.mask_block": st.none() | st.integers(1, 64) | st.lists(st.integers(1, 64), min_size=2, max_size=3),
    },
)


@hypothesis_settings(max_examples=60, deadline=None)
@given(plans=explicit)
def test_written_settings_resolve_to_the_same_settings(tmp_path_factory, plans):
    first = resolve(MEDCONTEXT, plans=plans, environment=" ").settings
    path = tmp_path_factory.mktemp("settings") / "written.yaml"
    path.write_text(yaml.safe_dump(flatten(first), sort_keys=False), encoding="utf-8")
    second = resolve(MEDCONTEXT, environment=str(path)).settings
    assert second == first and flatten(second) == flatten(first)


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("medcontext.mask_ration", ["medcontext.mask_ratio"]),
        ("medcontext.mask_ratoi", ["medcontext.mask_ratio"]),
        ("mask_ratio", ["medcontext.mask_ratio"]),  # the method's name forgotten
        ("medcontext.seed", ["seed"]),
        ("num_epoch", ["num_epochs"]),
        ("medcontext.mask_evry", ["medcontext.masked_every", "medcontext.mask_ratio"]),  # two letters, but one of many
        ("something_else_altogether", []),
    ],
)
def test_an_unknown_key_offers_the_nearest_alone_where_it_is_clearly_meant(typed, offered):
    with pytest.raises(ValueError, match="unknown setting") as error:
        resolve(MEDCONTEXT, environment=f"{typed}=1")
    found = str(error.value).partition("did you mean ")[2].partition("?")[0]
    keys = found.split(" or ") if found else []
    assert keys[: len(offered)] == offered and len(keys) <= max(3 * (len(offered) > 1), len(offered))
    if len(offered) == 1:
        assert keys == offered


def test_the_documents_example_of_an_unknown_setting_is_what_is_printed():
    document = (Path(__file__).resolve().parents[2] / "docs/use.md").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="unknown setting") as error:
        resolve(MEDCONTEXT, environment="medcontext.mask_ration=0.6")
    assert f"`{str(error.value).partition('? `')[0]}?" in document
