"""The command ``nnUNetv2_ext``: subcommands, exit status, mistakes of the user."""

import subprocess
import sys
import types

import pytest

from nnunetv2_ext import __version__
from nnunetv2_ext.cli import dispatch


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
    monkeypatch.setitem(sys.modules, "echo_command", module)
    monkeypatch.setitem(dispatch.COMMANDS, "echo", ("echo_command", "print a text"))
    monkeypatch.setitem(dispatch.COMMANDS, "absent", ("no_such_module", "never imported"))


def test_a_command_gets_its_arguments_and_gives_the_exit_status(echo, capsys) -> None:
    assert dispatch.main(["echo", "hello"]) == 3
    assert capsys.readouterr().out == "hello\n"


def test_a_value_error_is_one_line_and_exit_status_2(echo, capsys) -> None:
    assert dispatch.main(["echo", "--raise", "first\n  second"]) == 2
    assert capsys.readouterr().err == "nnUNetv2_ext echo: first second\n"


def test_help_lists_every_command_without_importing_any(echo, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        dispatch.main(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert all(name in out for name in (*dispatch.COMMANDS, "never imported"))


def test_a_disk_that_cannot_be_written_is_one_line(echo, monkeypatch, capsys) -> None:
    def full(args) -> int:
        raise OSError(28, "No space left on device", "model/plans.json")

    monkeypatch.setattr(sys.modules["echo_command"], "run", full)
    assert dispatch.main(["echo", "hello"]) == 2
    assert capsys.readouterr().err == "nnUNetv2_ext echo: [Errno 28] No space left on device: 'model/plans.json'\n"


@pytest.mark.parametrize("arguments", [[], ["no-such-command"], ["echo"]])
def test_a_mistyped_command_line_is_exit_status_2(echo, arguments: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        dispatch.main(arguments)
    assert caught.value.code == 2
    assert "usage: nnUNetv2_ext" in capsys.readouterr().err


@pytest.mark.parametrize("name", dispatch.COMMANDS)
def test_each_listed_command_explains_itself(name: str, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        dispatch.main([name, "--help"])
    assert caught.value.code == 0
    assert f"usage: nnUNetv2_ext {name}" in capsys.readouterr().out


def test_the_overview_needs_neither_torch_nor_nnunet() -> None:
    code = (
        "import sys; from nnunetv2_ext.cli import main\n"
        "try: main(['--version'])\n"
        "finally: print({'torch', 'nnunetv2', 'pydantic', 'numpy'} & set(sys.modules))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert process.stdout.splitlines() == [f"nnunetv2-ext {__version__}", "set()"], process.stderr
