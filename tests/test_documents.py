"""README and docs are true: what they name exists, links resolve, commands parse, code runs, tables stay readable."""

import argparse
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import yaml
from pydantic.fields import FieldInfo

from nnunetv2_ext import __version__, installed_trainers
from nnunetv2_ext.cli.dispatch import HOUSE
from nnunetv2_ext.core.outside import Command, load_trainer, methods
from nnunetv2_ext.core.settings import fields_by_key
from nnunetv2_ext.core.sources import from_environment

CHECKOUT = Path(__file__).resolve().parents[1]
README = CHECKOUT / "README.md"
DOCUMENTS = sorted([README, CHECKOUT / "CONTRIBUTING.md", *CHECKOUT.glob("docs/**/*.md")])
FOR_USERS = [path for path in DOCUMENTS if path.name not in ("CONTRIBUTING.md", "architecture.md", "results.md")]
CARDS = {f"docs/{method.card}" for method in methods().values()} | {"docs/methods/ext.md"}
TYPING_ERROR = "medcontext.mask_ration"  # of the troubleshooting, see test_settings.py
CARD_SECTIONS = [
    "What it is for",
    "When not to use it",
    "Commands",
    "Settings that matter",
    "Equation",
    "Paper, released code, ours",
    "What was measured",
    "Control to beat",
    "Cost",
    "Privacy",
    "Citation",
]
of_each = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(CHECKOUT).as_posix())
of_users = pytest.mark.parametrize("path", FOR_USERS, ids=lambda path: path.relative_to(CHECKOUT).as_posix())


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def commands() -> dict[str, Command]:
    return HOUSE | {name: command for method in methods().values() for name, command in method.commands.items()}


@cache
def settings() -> dict[str, FieldInfo]:
    """Of all trainers, by dotted key."""
    models = [load_trainer(name).settings_model() for name in installed_trainers()]
    return {key: field for model in models for key, field in fields_by_key(model).items()}


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def typed_commands(text: str) -> list[list[str]]:
    """Words of the commands in the code of a document; variables set in front and comments are left out."""
    text = re.sub(r"\\\n\s*", "", text)
    lines = re.findall(r"^    (.*)$", text, re.MULTILINE)
    lines += [line for block in code_blocks(text, "bash") for line in block.splitlines()]
    lines += [code for code in inline_code(text) if " -" in code]  # a bare name is a name, not a command
    found = []
    for line in lines:
        for part in re.split(r"&&|[;&]| do ", re.sub(r"(^|\s)#.*", "", line)):
            match = re.match(r"""\s*(?:\w+=(?:"[^"]*"|\S*)\s+)*((?:nnUNetv2_\w+|python examples/\w+\.py)\s.*)""", part)
            if match:
                found.append(shlex.split(match[1].replace("python examples/", "examples/")))
    return found


def inline_code(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def cells(text: str) -> Iterator[str]:
    for line in text.splitlines():
        if re.match(r"\s*\|", line):
            yield from (cell.strip() for cell in line.strip().strip("|").split("|"))


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_is_read_in_a_minute() -> None:
    assert len(read(README).splitlines()) <= 120


@of_each
def test_no_table_cell_is_longer_than_25_words(path: Path) -> None:
    assert [cell for cell in cells(read(path)) if len(cell.split()) > 25] == []


def test_readme_names_every_trainer_and_every_command() -> None:
    words = {word for code in inline_code(read(README)) for word in code.split()}
    assert {*installed_trainers(), *commands()} <= words


def test_every_method_has_a_card_and_every_card_a_method() -> None:
    assert {path.relative_to(CHECKOUT).as_posix() for path in CHECKOUT.glob("docs/methods/*.md")} == CARDS


@pytest.mark.parametrize("card", sorted(CARDS))
def test_a_card_answers_every_question(card: str) -> None:
    text = read(CHECKOUT / card)
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == CARD_SECTIONS
    assert len(code_blocks(text, "bibtex")) == 1


@of_each
def test_links_within_the_repository_resolve(path: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", read(path)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        if not file.exists() or (anchor and anchor not in anchors(read(file))):
            broken.append(target)
    assert broken == []


@of_users
def test_every_settings_key_exists(path: Path) -> None:
    text, keys = read(path), set(settings())
    blocks = "|".join(sorted({key.partition(".")[0] for key in keys if "." in key}))
    named = set(re.findall(rf"(?<![\w/.])(?:{blocks})\.(?!md\b|yaml\b|json\b)[a-z_]+", text))
    for value in re.findall(r'nnUNet_ext_settings="([^"]*)"', text):
        named |= set(from_environment(value))
    for code in inline_code(text):  # `key=value key=value`
        parts = code.split()
        if all(re.fullmatch(r"[a-z_.]+=\S+", part) for part in parts):
            named |= {part.partition("=")[0] for part in parts}
    assert named - keys <= {TYPING_ERROR}


def test_the_table_of_common_settings_is_complete_and_has_the_defaults() -> None:
    section = read(CHECKOUT / "docs/use.md").partition("## Settings")[2].partition("\n## ")[0]
    table = dict(re.findall(r"^\| `([a-z_]+)` \| (\S+) \|", section, re.MULTILINE))
    fields = fields_by_key(load_trainer("nnUNetTrainerExt").settings_model())
    assert table == {key: str(field.default).lower() for key, field in fields.items()}


@of_users
def test_the_defaults_on_the_cards_are_the_programs(path: Path) -> None:
    rows = re.findall(r"^\| `((?:[a-z]+)\.[a-z_]+)` \| (\S+) \|", read(path), re.MULTILINE)
    for key, default in rows:
        program = settings()[key].default
        stated = from_environment(f"{key}={default}")[key]
        assert stated in (program, program.lower() if isinstance(program, str) else program), key


class ParsedError(Exception):
    """Raised in the place of a command's work."""


@of_each
def test_commands_of_the_documents_parse(path: Path, monkeypatch, capsys) -> None:
    parse = argparse.ArgumentParser.parse_known_args

    def parse_only(parser, args=None, namespace=None):
        unknown = parse(parser, args, namespace)[1]
        raise ParsedError(unknown)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_only)
    programs = {entry.name: entry for entry in entry_points(group="console_scripts")}
    for words in typed_commands(read(path)):
        program, *rest = words
        monkeypatch.setattr(sys, "argv", words)
        monkeypatch.syspath_prepend(str(CHECKOUT / "examples"))  # as of a script that runs there
        try:
            if program.startswith("examples/"):
                runpy.run_path(str(CHECKOUT / program), run_name="__main__")
            elif rest != ["--help"]:
                programs[program].load()()
                pytest.fail(f"{words} does not reach its parser: {capsys.readouterr().err}")
        except ParsedError as parsed:
            assert parsed.args == ([],), words
        except SystemExit:
            pytest.fail(f"{words}\n{capsys.readouterr().err}")


@of_users
def test_trainers_of_the_documents_exist(path: Path) -> None:
    named = set(re.findall(r"\bnnUNetTrainer[A-Z][A-Za-z0-9]*", read(path)))
    assert named <= set(installed_trainers())


@of_users
def test_python_blocks_run(path: Path) -> None:
    for block in code_blocks(read(path), "python"):
        exec(compile(block, str(path), "exec"), {})


@pytest.mark.skipif(sys.platform == "win32", reason="a batch script of SLURM")
def test_the_slurm_script_stops_the_training_and_queues_itself_again(tmp_path: Path) -> None:
    [script] = [block for block in code_blocks(read(CHECKOUT / "docs/use.md"), "bash") if "#SBATCH" in block]
    fold = tmp_path / "Dataset004_X" / "nnUNetTrainerExt__nnUNetPlans__3d_fullres" / "fold_0"
    fold.mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    programs = {  # a training that takes the stop file as ours does; SLURM's signal comes when it has begun
        "nnUNetv2_train": f'kill -USR1 $PPID; for _ in $(seq 100); do [ -e "{fold}/stop" ] && break; sleep 0.1; done\n'
        f'sleep 0.3; rm "{fold}/stop" && touch "{fold}/checkpoint_latest.pth"',
        "scontrol": f'[ -e "{fold}/checkpoint_latest.pth" ] && echo "$@" > "{tmp_path}/requeued"',
    }
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "job.sh").write_text(script)
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "nnUNet_results": str(tmp_path),
        "SLURM_JOB_ID": "17",
    }
    ended = subprocess.run(["bash", str(tmp_path / "job.sh")], env=environment, timeout=60)
    assert ended.returncode == 0 and (tmp_path / "requeued").read_text().split() == ["requeue", "17"]


def test_the_citation_file_is_of_this_version() -> None:
    citation = yaml.safe_load(read(CHECKOUT / "CITATION.cff"))
    assert citation["version"] == __version__ and citation["license"] == "Apache-2.0"
    assert all(reference["title"] and reference["authors"] for reference in citation["references"])


@pytest.mark.parametrize("method", [m for m in methods().values() if m.card], ids=lambda method: method.name)
def test_what_a_trainer_asks_to_cite_is_what_its_card_and_the_citation_file_name(method) -> None:
    [entry] = code_blocks(read(CHECKOUT / "docs" / method.card), "bibtex")
    title = re.sub(r"[{}]", "", re.search(r"title\s*=\s*\{(.*)\},?\n", entry)[1])
    preprint = re.search(r"arXiv:([\d.]+)", entry)
    titles = [reference["title"] for reference in yaml.safe_load(read(CHECKOUT / "CITATION.cff"))["references"]]
    assert title in titles
    assert title in method.citation and (preprint is None or preprint[0] in method.citation)


def test_the_picture_of_the_readme_is_small() -> None:
    [picture] = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", read(README))
    assert (CHECKOUT / picture).stat().st_size < 150_000
