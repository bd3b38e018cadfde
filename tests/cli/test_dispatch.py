"""The command ``nnUNetv2_ext``: subcommands, exit status, mistakes of the user."""

import subprocess
import sys
import types

import pytest

from nnunetv2_ext import __version__
from nnunetv2_ext.cli import dispatch
from nnunetv2_ext.core.outside import STORIES, Command, methods

COMMANDS = dispatch.HOUSE | {name: command for m in methods().values() for name, command in m.commands.items()}


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> None:
    """A subcommand ``echo TEXT`` that returns 3, or raises the text as a ValueError with ``--raise``."""

    def add_arguments(parser) -> None:
        parser.add_argument("text")
        parser.add_argument("--raise", dest="fails", action="store_true")

    def run(args) -> int:
        if args.fails:
            raise ValueError(args.text)
        print(args.text)
        return 3

    module = types.ModuleType("echo_command")
    module.add_arguments, module.run = add_arguments, run
    module.EPILOG = "Example:\n  echo hello\n"
    monkeypatch.setitem(sys.modules, "echo_command", module)
    monkeypatch.setitem(dispatch.HOUSE, "echo", Command("echo_command", "print a text", "train", formerly="say"))
    monkeypatch.setitem(dispatch.HOUSE, "absent", Command("no_such_module", "never imported", "judge"))


def test_a_command_gets_its_arguments_and_gives_the_exit_status(echo, capsys) -> None:
    assert dispatch.main(["echo", "hello"]) == 3
    assert capsys.readouterr().out == "hello\n"


def test_a_value_error_is_one_line_and_exit_status_2(echo, capsys) -> None:
    assert dispatch.main(["echo", "--raise", "first\n  second"]) == 2
    assert capsys.readouterr().err == "nnUNetv2_ext echo: first second\n"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_every_command_without_importing_any(echo, arguments: list[str], capsys) -> None:
    assert dispatch.main(arguments) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in (*COMMANDS, "echo", "never imported"))
    assert len(out.splitlines()) > len(COMMANDS) and max(map(len, out.splitlines())) <= 110
    assert [line for line in out.splitlines() if line in STORIES] == list(STORIES)
    assert out.index("\njudge\n") < out.index("never imported") < out.index("\nhand on")


def test_a_disk_that_cannot_be_written_is_one_line(echo, monkeypatch, capsys) -> None:
    def full(args) -> int:
        raise OSError(28, "No space left on device", "model/plans.json")

    monkeypatch.setattr(sys.modules["echo_command"], "run", full)
    assert dispatch.main(["echo", "hello"]) == 2
    assert capsys.readouterr().err == "nnUNetv2_ext echo: [Errno 28] No space left on device: 'model/plans.json'\n"


def test_help_of_a_command_ends_with_its_examples_as_they_stand(echo, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        dispatch.main(["echo", "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: nnUNetv2_ext echo") and "Print a text." in out
    assert out.endswith("Example:\n  echo hello\n")


def test_missing_arguments_are_exit_status_2(echo, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        dispatch.main(["echo"])
    assert caught.value.code == 2
    assert "usage: nnUNetv2_ext echo" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("exprot", "did you mean export? "),
        ("echos", "did you mean echo? "),
        ("--verion", "did you mean --version? "),
        ("zzzz", ""),
    ],
)
def test_an_unknown_command_is_one_line_with_the_nearest(echo, typed: str, hint: str, capsys) -> None:
    assert dispatch.main([typed, "text"]) == 2
    expected = f"nnUNetv2_ext: there is no command {typed!r}; {hint}nnUNetv2_ext --help lists them\n"
    assert capsys.readouterr().err == expected


def test_an_old_name_works_and_says_so_in_one_line(echo, capsys) -> None:
    assert dispatch.main(["say", "hello"]) == 3
    output = capsys.readouterr()
    assert output.out == "hello\n"
    assert output.err == "nnUNetv2_ext say is now called echo; use the new name\n"


def test_check_planes_was_called_check() -> None:
    assert COMMANDS["check-planes"].formerly == "check"


def test_every_command_belongs_to_a_story() -> None:
    assert {command.story for command in COMMANDS.values()} == set(STORIES)


def test_no_name_is_taken_twice() -> None:
    groups = [dispatch.HOUSE, *(method.commands for method in methods().values())]
    names = [name for group in groups for name in group]
    names += [command.formerly for group in groups for command in group.values() if command.formerly]
    assert len(names) == len(set(names)) > 8


HEAVY = ("torch", "nnunetv2", "matplotlib", "pandas", "scipy", "SimpleITK")
EXPLAIN = f"""
import contextlib, io, sys
from nnunetv2_ext.cli import main
for name in sys.argv[1:]:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as out:
        main([*name.split(), "--help"])
    found = sorted(set({HEAVY}) & set(sys.modules))
    print(name, *found, "usage: nnUNetv2_ext " + name in out.getvalue())
"""


def test_help_of_every_command_imports_nothing_that_is_slow() -> None:
    """Importing torch takes a second, nnU-Net two, pandas half of one."""
    names = list(COMMANDS)
    process = subprocess.run([sys.executable, "-c", EXPLAIN, *names], capture_output=True, text=True, timeout=120)
    assert process.stdout.splitlines() == [f"{name} True" for name in names], process.stdout + process.stderr


def test_the_overview_needs_neither_torch_nor_nnunet() -> None:
    code = (
        "import sys; from nnunetv2_ext.cli import main\n"
        "main([]); main(['--version']); print({'torch', 'nnunetv2', 'pydantic', 'numpy'} & set(sys.modules))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert process.stdout.splitlines()[-2:] == [f"nnunetv2-ext {__version__}", "set()"], process.stderr
