"""What methods show to the outside: found without importing anything slow, by module, by class and by name."""

from __future__ import annotations

import subprocess
import sys

import pytest

from nnunetv2_ext import installed_trainers
from nnunetv2_ext.core.outside import load, load_trainer, method_of, methods, methods_of, trainer_of
from nnunetv2_ext.core.trainer import ExtTrainer
from tests.core.signed.outside import METHOD as SIGNED
from tests.core.signed.training import nnUNetTrainerSigned, nnUNetTrainerWide


def test_a_method_is_found_by_any_of_its_modules() -> None:
    found = methods()
    assert list(found) == sorted(found) and {"jras", "medcontext", "rada"} <= set(found)
    assert all(name == method.name for name, method in found.items())
    for name in found:
        for module in (f"nnunetv2_ext.{name}.training", f"nnunetv2_ext.{name}.deep.below", f"nnunetv2_ext.{name}.x"):
            assert method_of(module) is found[name]
    assert method_of("tests.core.signed.training") is SIGNED


@pytest.mark.parametrize(
    "module",
    ["nnunetv2_ext.core.trainer", "nnunetv2_ext.core.outside", "builtins", "__main__", "torch.nn.modules.module"],
)
def test_what_is_of_no_method_has_none(module: str) -> None:
    assert method_of(module) is None


def test_an_outside_that_lacks_a_module_says_so(tmp_path, monkeypatch) -> None:
    (tmp_path / "broken_method").mkdir()
    (tmp_path / "broken_method" / "outside.py").write_text("import a_module_that_nobody_has\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="a_module_that_nobody_has"):
        method_of("broken_method.training")


def test_a_trainer_has_the_methods_of_its_bases_the_nearest_first() -> None:
    both = load_trainer("nnUNetTrainerMedContextJRAS")
    assert {method.name for method in methods_of(both)} == {"medcontext", "jras"}
    assert [method.name for method in methods_of(nnUNetTrainerSigned)] == ["signed", "medcontext"]
    assert methods_of(ExtTrainer) == [] and trainer_of(ExtTrainer) is None
    assert trainer_of(both) is methods()["jras"].trainers["nnUNetTrainerMedContextJRAS"]
    assert trainer_of(nnUNetTrainerSigned) is SIGNED.trainers["nnUNetTrainerSigned"]
    assert trainer_of(nnUNetTrainerWide) is None, "of the same package, but not named"


def test_every_trainer_is_named_by_the_method_that_it_is_of() -> None:
    for name in installed_trainers():
        cls = load_trainer(name)
        assert (trainer_of(cls) is None) == (methods_of(cls) == []), name


@pytest.mark.parametrize("method", methods().values(), ids=lambda method: method.name)
def test_what_a_method_names_is_there(method) -> None:
    assert set(method.trainers) <= set(installed_trainers())
    assert all(callable(load(edit.apply)) for edit in method.export_edits.values())
    for command in method.commands.values():
        assert callable(load(f"{command.module}:add_arguments")) and callable(load(f"{command.module}:run"))


def test_no_option_of_export_is_taken_twice() -> None:
    names = [name for method in methods().values() for name in method.export_edits]
    assert len(names) == len(set(names)) and not {"weights", "best", "help"} & set(names)


def test_all_of_it_imports_the_standard_library_only() -> None:
    code = (
        "import sys; before = set(sys.modules); from nnunetv2_ext.core.outside import methods; methods()\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new - sys.stdlib_module_names))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert process.stdout.strip() == "['nnunetv2_ext']", process.stdout + process.stderr
