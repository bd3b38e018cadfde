"""``nnUNetv2_ext settings``: every key with type, default and meaning, in words a user can type back."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, Union

import pytest
from pydantic import BaseModel, Field

from nnunetv2_ext import installed_trainers
from nnunetv2_ext.cli import main
from nnunetv2_ext.cli.settings import type_name
from nnunetv2_ext.core.outside import load_trainer
from nnunetv2_ext.core.resolve import resolve
from nnunetv2_ext.core.settings import fields_by_key
from nnunetv2_ext.core.sources import from_environment
from nnunetv2_ext.medcontext.settings import MedContextSettings
from nnunetv2_ext.parts.settings import HouseSettings
from nnunetv2_ext.trainers.nnUNetTrainerMedContext import nnUNetTrainerMedContext

HEAD = re.compile(r"^(\S+) = (.*?)    \[(.+)\]$", re.MULTILINE)


def printed(capsys: pytest.CaptureFixture[str], *trainer: str) -> tuple[str, dict[str, tuple[str, str, str]]]:
    """The output, and per key its default, type and meaning."""
    assert main(["settings", *trainer]) == 0
    text = capsys.readouterr().out
    heads = list(HEAD.finditer(text))
    blocks = {}
    for head in heads:
        meaning = text[head.end() :].lstrip("\n").split("\n\n")[0]
        blocks[head[1]] = (head[2], head[3], " ".join(meaning.split()))
    assert len(blocks) == len(heads), "a key is listed twice"
    return text, blocks


@pytest.mark.parametrize(
    ("arguments", "model"), [([], HouseSettings), (["nnUNetTrainerMedContext"], nnUNetTrainerMedContext)]
)
def test_every_key_has_its_default_type_and_meaning(capsys, arguments, model):
    text, blocks = printed(capsys, *arguments)
    fields = fields_by_key(model if model is HouseSettings else model.settings_model())
    assert set(blocks) == set(fields)
    for key, field in fields.items():
        default, kind, meaning = blocks[key]
        value = field.get_default(call_default_factory=True)
        assert default == ("none" if value is None else str(value)), key
        assert not re.search(r"Optional|Literal|Union|Annotated|typing|NoneType|None|class|\[\[|FieldInfo", kind), kind
        assert meaning.startswith(field.description[:20]) and meaning.endswith("."), key
        assert not meaning.endswith(".."), key
    assert max(map(len, text.split("stands for")[0].splitlines())) <= 110


def test_json_says_the_same(capsys):
    _, blocks = printed(capsys, "nnUNetTrainerMedContext")
    assert main(["settings", "nnUNetTrainerMedContext", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["trainer"] == "nnUNetTrainerMedContext" and list(content["settings"]) == list(blocks)
    for key, (default, kind, _) in blocks.items():
        found = content["settings"][key]
        assert (found["type"], "none" if found["default"] is None else str(found["default"])) == (kind, default)
    assert content["settings"]["num_epochs"]["resumable"] and not content["settings"]["seed"]["resumable"]
    assert content["presets"]["medcontext.preset=paper_code"] == {
        f"medcontext.{key}": value for key, value in MedContextSettings.PRESETS["paper_code"].items()
    }


def test_marks_say_what_may_change_on_continue(capsys):
    _, blocks = printed(capsys)
    assert "May be changed on --c." in blocks["num_epochs"][2]
    assert "May be changed" not in blocks["initial_lr"][2]


def test_without_a_trainer_only_the_common_keys(capsys):
    text, blocks = printed(capsys)
    assert re.match(r"Common to all trainers \(.*nnUNetTrainerMedContext", text, re.DOTALL)
    assert not any("." in key for key in blocks) and "preset" not in text


def test_the_preset_is_spelled_out_as_it_could_be_typed(capsys):
    text, _ = printed(capsys, "nnUNetTrainerMedContext")
    line = next(line for line in text.splitlines() if "paper_code stands for" in line)
    typed = resolve(nnUNetTrainerMedContext.settings_model(), environment=line.split("stands for: ")[1])
    preset = resolve(nnUNetTrainerMedContext.settings_model(), environment="medcontext.preset=paper_code")
    assert typed.settings.medcontext.model_dump(exclude={"preset"}) == preset.settings.medcontext.model_dump(
        exclude={"preset"}
    )
    assert set(from_environment(line.split("stands for: ")[1])) == {
        f"medcontext.{key}" for key in MedContextSettings.PRESETS["paper_code"]
    }


@pytest.mark.parametrize(
    ("annotation", "name"),
    [
        (int, "int"),
        (bool, "bool"),
        (Optional[float], "float | none"),  # noqa: UP045
        (float | None, "float | none"),
        (Literal["a", "b"], "a | b"),
        (Literal["paper_code"] | None, "paper_code | none"),
        (Optional[Literal["paper_code"]], "paper_code | none"),  # noqa: UP045
        (Union[int, list[str], None], "int | list of str | none"),  # noqa: UP007
        (
            Annotated[list[Annotated[int, Field(ge=1)]], Field(max_length=3)] | Annotated[int, Field(ge=1)] | None,
            "list of int | int | none",
        ),
        (list[int], "list of int"),
        (dict[str, int], "dict"),
        (tuple[int, int], "tuple"),
        (list, "list"),
        (Path, "Path"),
    ],
)
def test_types_are_readable(annotation: Any, name: str):
    class Model(BaseModel):
        field: annotation

    assert type_name(Model.model_fields["field"]) == name


def test_bounds_follow_the_type():
    class Model(BaseModel):
        share: float = Field(0.5, ge=0, le=1)
        seed: int | None = Field(None, ge=0, lt=10)
        rate: float = Field(0.1, gt=0)

    names = {key: type_name(field) for key, field in Model.model_fields.items()}
    assert names == {"share": "float, >= 0, <= 1", "seed": "int | none, >= 0, < 10", "rate": "float, > 0"}


@pytest.mark.parametrize("typo", ["nnUNetTrainerMedContex", "nnunettrainermedcontext", "MedContext"])
def test_an_unknown_trainer_is_one_line_that_names_the_nearest(capsys, typo):
    assert main(["settings", typo]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert f"'{typo}'" in line and "did you mean nnUNetTrainerMedContext?" in line


def test_a_name_like_nothing_lists_what_there_is(capsys):
    assert main(["settings", "zzz"]) == 2
    error = capsys.readouterr().err
    assert "did you mean" not in error and "there is nnUNetTrainer" in error


def test_the_real_command_without_any_nnunet_folder_prints_only_its_list(tmp_path):
    import os

    environment = {k: v for k, v in os.environ.items() if not k.startswith("nnUNet_")}
    command = [str(Path(sys.executable).with_name("nnUNetv2_ext")), "settings", "nnUNetTrainerMedContext"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("nnUNetTrainerMedContext:\n\nnum_epochs = 1000    [int, >= 1]\n")


@pytest.mark.parametrize("trainer", sorted(installed_trainers()))
def test_a_number_is_never_true(trainer):
    """pydantic reads true as 1: no key of any trainer that holds numbers may take it."""
    model = load_trainer(trainer).settings_model()
    numbers = [
        key
        for key, field in fields_by_key(model).items()
        if not {"bool", "str"} & set(re.findall(r"\w+", str(field.annotation)))
        and "Literal" not in str(field.annotation)
    ]
    assert len(numbers) > 8
    for key in numbers:
        for value in ("true", "[true, 1]"):
            with pytest.raises(ValueError, match=re.escape(key)):
                resolve(model, environment=f"'{key}={value}'")
