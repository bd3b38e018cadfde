"""The floor plan: which room may import which, and that the tools of the house name no method.

Read from the sources with `ast`, imports inside functions included. A method's room is found by its ``outside.py``.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from nnunetv2_ext.core.outside import methods

CHECKOUT = Path(__file__).resolve().parents[1]
PACKAGE, TRAINERS = CHECKOUT / "nnunetv2_ext", CHECKOUT / "trainers"
METHODS = sorted(methods())
FLOOR = ["core", "data", "parts"]  # each may import what stands before it
TOOLS = ["evaluate", "compare", "bench", "advice", "phantom", "cli"]
ROOMS = {
    **{room: {*FLOOR[: n + 1]} for n, room in enumerate(FLOOR)},
    **{method: {*FLOOR, method} for method in METHODS},
    "trainers": {*FLOOR, *METHODS},
    **{tool: {*FLOOR, *TOOLS} for tool in TOOLS},
    "shim": set(),
}
# the package itself: version, registration, what is installed
OF_ALL = {"__version__", "installed_trainers", "register", "_register"}

# Each is to go: (file, room it must not import) and files that name a method. A test says when one is gone.
IMPORTS_TO_GO: dict[tuple[str, str], str] = {}
NAMES_TO_GO: dict[str, str] = {}


def sources(room: str) -> list[Path]:
    return sorted((TRAINERS if room == "trainers" else PACKAGE / room).rglob("*.py"))


def imports_of(source: str) -> Iterator[str]:
    """Full names of what a module imports of ours, wherever in it: ``nnunetv2_ext.core.files.read_json``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: a relative import; write the whole name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.partition(".")[0] == "nnunetv2_ext")


def foreign_rooms(source: str, room: str) -> set[str]:
    """Rooms that a module of ``room`` imports and may not."""
    imported = {name.split(".")[1] for name in imports_of(source) if "." in name}
    return imported - OF_ALL - ROOMS[room] - {room}


def names_in(text: str) -> list[str]:
    """Names of methods and of their trainers in a text, in any case and hyphenation; not within a word (gradation)."""
    spellings = ["-?".join(name) for name in METHODS]
    classes = [name.removeprefix("nnUNetTrainer") for method in methods().values() for name in method.trainers]
    found = re.findall(rf"(?<![A-Za-z])(?i:{'|'.join(spellings)})(?![a-z])|(?<![A-Z])(?:{'|'.join(classes)})", text)
    return sorted(set(found))


@pytest.mark.parametrize(
    ("source", "room", "expected"),
    [
        ("from nnunetv2_ext.rada.views import View", "jras", {"rada"}),
        ("def f():\n    import nnunetv2_ext.jras.bank", "parts", {"jras"}),
        ("from nnunetv2_ext import trainers", "cli", {"trainers"}),
        ("from nnunetv2_ext.parts.ramps import ramp", "data", {"parts"}),
        ("from nnunetv2_ext.compare.find import find", "core", {"compare"}),
        ("from nnunetv2_ext.core.files import x\nfrom nnunetv2_ext import __version__\nimport torch", "data", set()),
        ("from nnunetv2_ext.evaluate.pairs import x\nfrom nnunetv2_ext.data.raw import y", "compare", set()),
    ],
)
def test_an_import_of_a_foreign_room_is_seen(source: str, room: str, expected: set[str]) -> None:
    assert foreign_rooms(source, room) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("for nnUNetTrainerRADA only", ["RADA"]),
        ("jras.bank_size and J-RAS", ["J-RAS", "jras"]),
        ("class JRASNetwork: medcontext_loss", ["JRAS", "medcontext"]),
        ("a gradation on the radar", []),
        ("nnUNetTrainerMedContext", ["MedContext"]),
    ],
)
def test_a_name_of_a_method_is_seen(text: str, expected: list[str]) -> None:
    assert names_in(text) == expected


def test_every_folder_is_a_room() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders - set(ROOMS) == set(), "a new room: give it a place in the floor plan, or an outside.py"
    assert all(sources(room) for room in ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_it_may(room: str) -> None:
    for file in sources(room):
        name = file.relative_to(CHECKOUT).as_posix()
        foreign = {other for other in foreign_rooms(file.read_text(), room) if (name, other) not in IMPORTS_TO_GO}
        assert not foreign, f"{name} imports {', '.join(sorted(foreign))}"


@pytest.mark.parametrize("room", ["core", "evaluate", "compare", "bench", "advice", "cli"])
def test_a_tool_names_no_method(room: str) -> None:
    for file in sources(room):
        name = file.relative_to(CHECKOUT).as_posix()
        assert name in NAMES_TO_GO or not names_in(file.read_text()), f"{name} names {names_in(file.read_text())}"


@pytest.mark.parametrize(("name", "room"), IMPORTS_TO_GO)
@pytest.mark.xfail(strict=True, reason="is to go")
def test_a_known_foreign_import_is_gone(name: str, room: str) -> None:
    file = CHECKOUT / name
    assert not file.exists() or room not in foreign_rooms(file.read_text(), name.split("/")[1])


@pytest.mark.parametrize("name", NAMES_TO_GO)
@pytest.mark.xfail(strict=True, reason="is to go")
def test_a_known_name_of_a_method_is_gone(name: str) -> None:
    file = CHECKOUT / name
    assert not file.exists() or not names_in(file.read_text())


# ---- the page that shows the house


def imported_rooms() -> dict[str, set[str]]:
    """Room to the rooms that it imports in fact; the methods are one room, ``a method``."""
    found: dict[str, set[str]] = {}
    for room in ROOMS:
        name = "a method" if room in METHODS else room
        for file in sources(room):
            rooms = {full.split(".")[1] for full in imports_of(file.read_text()) if "." in full} - OF_ALL - {room}
            found.setdefault(name, set()).update("a method" if other in METHODS else other for other in rooms)
    return found


def test_the_table_of_the_architecture_page_is_true() -> None:
    text = (CHECKOUT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w[\w ]*) \| ([\w ,-]+) \| [^|]+ \|$", text, flags=re.MULTILINE)
    table = {room: set() if rooms == "nothing" else set(rooms.split(", ")) for room, rooms in rows if room != "room"}
    assert table == imported_rooms()
