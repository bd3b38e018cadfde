"""nnU-Net's own resolver finds our trainers by name, with no environment variable set by the user."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import nnunetv2_ext
from nnunetv2_ext._register import EXT_VARIABLE, OPT_OUT_VARIABLE, SHIM_FOLDER, auto_register, register

SHIM_MODULE = "nnunetv2_ext_trainer_shim"
PACKAGE_PARENT = str(Path(nnunetv2_ext.__file__).parents[1])


def _set(monkeypatch: pytest.MonkeyPatch, *folders: str) -> None:
    monkeypatch.setenv(EXT_VARIABLE, os.pathsep.join(folders))


def _folders() -> list[str]:
    return os.environ[EXT_VARIABLE].split(os.pathsep)


def _isolated(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a Python without site-packages and without our start-up file."""
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, *arguments], capture_output=True, text=True, timeout=60
    )


def test_register_sets_an_unset_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(EXT_VARIABLE, raising=False)
    register()
    assert _folders() == [SHIM_FOLDER]


def test_register_goes_first_and_keeps_the_users_folders_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, "/b", "/a", "/b")
    register()
    assert _folders() == [SHIM_FOLDER, "/b", "/a", "/b"]


def test_register_twice_is_register_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, "/a")
    register()
    register()
    assert _folders() == [SHIM_FOLDER, "/a"]


def test_register_moves_our_folder_to_the_front(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, "/a", SHIM_FOLDER + os.sep, "", "/b")
    register()
    assert _folders() == [SHIM_FOLDER, "/a", "/b"]


@pytest.mark.parametrize("value", ["0", "false", "No", " off "])
def test_opt_out_stops_the_automatic_registration_only(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    _set(monkeypatch, "/a")
    monkeypatch.setenv(OPT_OUT_VARIABLE, value)
    auto_register()
    assert _folders() == ["/a"]
    register()
    assert _folders() == [SHIM_FOLDER, "/a"]


def test_import_loads_nothing_but_its_two_modules() -> None:
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); before = set(sys.modules); import nnunetv2_ext; "
        "print(*sorted(set(sys.modules) - before)); print(os.environ['nnUNet_extTrainer'])"
    )
    process = _isolated(code, PACKAGE_PARENT)
    assert process.stdout.splitlines() == ["nnunetv2_ext nnunetv2_ext._register", SHIM_FOLDER], process.stderr


def test_medcontext_is_installed() -> None:
    assert "nnUNetTrainerMedContext" in nnunetv2_ext.installed_trainers()


@pytest.mark.parametrize("name", nnunetv2_ext.installed_trainers())
def test_nnunet_finds_each_trainer_and_the_class_pickles(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    monkeypatch.delenv(EXT_VARIABLE, raising=False)
    register()
    trainer = recursive_find_trainer_class_by_name(name)
    assert issubclass(trainer, nnUNetTrainer)
    assert trainer.__module__ == f"nnunetv2_ext.trainers.{name}"
    assert "__" not in name, "nnU-Net splits result folders there"
    assert SHIM_MODULE not in sys.modules, "nnU-Net forgets the shim; only then is the next assertion about its purge"
    assert recursive_find_trainer_class_by_name(name) is trainer
    assert pickle.loads(pickle.dumps(trainer)) is trainer


def test_a_trainer_of_the_user_is_still_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    (tmp_path / "own_trainer.py").write_text(
        "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n"
        "class nnUNetTrainerOfTheUser(nnUNetTrainer):\n    pass\n"
    )
    _set(monkeypatch, str(tmp_path))
    register()
    assert recursive_find_trainer_class_by_name("nnUNetTrainerOfTheUser").__module__ == "own_trainer"


def test_an_unknown_name_stays_nnunets_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    monkeypatch.delenv(EXT_VARIABLE, raising=False)
    register()
    with pytest.raises(RuntimeError, match="Could not find requested nnunet trainer nnUNetTrainerNobodyWrote"):
        recursive_find_trainer_class_by_name("nnUNetTrainerNobodyWrote")


@pytest.fixture
def shim(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(SHIM_FOLDER)
    monkeypatch.delitem(sys.modules, SHIM_MODULE, raising=False)
    yield __import__(SHIM_MODULE)
    sys.modules.pop(SHIM_MODULE, None)


@pytest.mark.parametrize("name", ["nnUNetTrainer", "__path__", "_helper", "torch"])
def test_shim_answers_for_no_other_name(shim, name: str) -> None:
    assert not hasattr(shim, name)


def test_shim_names_the_trainer_whose_file_is_broken(shim, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken_trainer_file.py").write_text("import os\nos.no_such_function()\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(nnunetv2_ext, "installed_trainers", lambda: {"nnUNetTrainerBroken": "broken_trainer_file"})
    with pytest.raises(
        ImportError, match=r"broken_trainer_file could not provide nnUNetTrainerBroken.*no_such_function"
    ):
        hasattr(shim, "nnUNetTrainerBroken")


def test_shim_is_harmless_where_our_package_is_missing() -> None:
    # the variable is inherited by child processes of other Python installations
    code = (
        f"import sys; sys.path.insert(0, sys.argv[1]); import {SHIM_MODULE} as s; print(hasattr(s, 'nnUNetTrainerX'))"
    )
    process = _isolated(code, SHIM_FOLDER)
    assert (process.stdout.strip(), process.stderr) == ("False", "")
