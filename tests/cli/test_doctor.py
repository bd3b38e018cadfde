"""``nnUNetv2_ext doctor`` sees what is wrong and says what to type."""

import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from nnunetv2_ext._register import EXT_VARIABLE, OPT_OUT_VARIABLE, SHIM_FOLDER, register
from nnunetv2_ext.cli import _check_discovery, _check_machine, _check_software, doctor, main
from nnunetv2_ext.cli._finding import FAIL, OK, WARN, Finding
from nnunetv2_ext.core import compat
from nnunetv2_ext.core.outside import Method

GIB = 2**30


def _statuses(findings) -> list[str]:
    return [finding.status for finding in findings]


# -- the command ----------------------------------------------------------------------------------------------------


def _checks(monkeypatch: pytest.MonkeyPatch, *checks) -> None:
    monkeypatch.setattr(doctor, "SECTIONS", {"Everything": checks})


def test_warnings_alone_are_exit_status_0(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    _checks(monkeypatch, lambda: [Finding(OK, "this", "fine"), Finding(WARN, "that", "slow", "buy more")])
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "1 OK, 1 WARN, 0 FAIL" in out
    assert "-> buy more" in out


def test_json_holds_every_finding_and_nothing_else_is_printed(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    _checks(monkeypatch, lambda: [Finding(OK, "this", "fine"), Finding(FAIL, "that", "broken", "buy a new one")])
    assert main(["doctor", "--json"]) == 1
    first, second = json.loads(capsys.readouterr().out)["findings"]
    assert first == {"section": "Everything", "status": "OK", "subject": "this", "detail": "fine", "remedy": ""}
    assert second["remedy"] == "buy a new one"


def test_a_failure_is_exit_status_1(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    _checks(monkeypatch, lambda: [Finding(FAIL, "this", "broken", "fix it")])
    assert main(["doctor"]) == 1


def test_a_check_that_breaks_is_a_failure_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def fragile():
        yield Finding(OK, "before", "fine")
        raise OSError("disk on fire")

    _checks(monkeypatch, fragile, lambda: [Finding(OK, "after", "fine")])
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "fragile" in out and "disk on fire" in out and "after" in out


def test_details_are_in_one_column(capsys) -> None:
    lines = [doctor.render(Finding(s, n, "detail", "remedy")).splitlines() for s, n in ((OK, "a"), (FAIL, "longer"))]
    assert len({line[0].index("detail") for line in lines}) == 1
    assert lines[0][1].strip() == "-> remedy"


def test_every_section_runs_on_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    monkeypatch.delenv(EXT_VARIABLE, raising=False)
    monkeypatch.delenv("nnUNet_n_proc_DA", raising=False)
    register()
    for variable in _check_machine.NNUNET_FOLDERS:
        monkeypatch.setenv(variable, str(tmp_path))
    status = main(["doctor"])
    out = capsys.readouterr().out
    assert status == 0, out
    for subject in ("Python", "nnunetv2", "torch", "faiss", "registration", "nnUNetTrainerMedContext", "RAM", "CPUs"):
        assert subject in out
    assert "broke" not in out


# -- software -------------------------------------------------------------------------------------------------------


def test_an_unsupported_nnunet_fails_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "version", lambda name: "2.6.4")
    [finding] = _check_software.nnunet()
    assert finding.status == FAIL and "2.6.4" in finding.detail
    assert finding.remedy == 'pip install "nnunetv2>=2.8,<3"'


def test_another_nnunet_in_the_working_directory_is_pointed_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "nnunetv2").mkdir()
    (tmp_path / "nnunetv2" / "paths.py").touch()
    monkeypatch.chdir(tmp_path)
    findings = list(_check_software.nnunet())
    assert _statuses(findings) == [OK, WARN]
    assert "not the one that runs" in findings[1].detail


@pytest.fixture
def needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """``needs(*requires)``: the findings on a method with these needs; ``needs.install`` makes a distribution."""

    class Needs:
        def install(self, name: str, version: str, module: str, source: str = "") -> None:
            info = tmp_path / f"{name}-{version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            (info / "RECORD").write_text(f"{module}/__init__.py,,\n{module}/inner/__init__.py,,\n")
            (tmp_path / module).mkdir(exist_ok=True)
            (tmp_path / module / "__init__.py").write_text(source)

        def __call__(self, *requires: str) -> list[Finding]:
            method = Method("toy", "a toy", requires=requires)
            monkeypatch.setattr(_check_software, "methods", lambda: {"toy": method})
            return list(_check_software.requirements())

    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return Needs()


def test_what_a_method_needs_and_has_is_shown_with_its_version(needs) -> None:
    needs.install("toy_dep", "1.5", "toy_dep")
    assert needs("toy_dep>=1.2,<2") == [Finding(OK, "toy_dep", "1.5, for toy")]
    assert needs("toy_dep>=1.2; sys_platform == 'nowhere'") == []


def test_what_can_use_gpus_says_how_many_it_sees(needs) -> None:
    needs.install("toy_dep", "1.5", "toy_dep", "def get_num_gpus():\n    return 3\n")
    assert needs("toy_dep") == [Finding(OK, "toy_dep", "1.5, sees 3 GPU(s), for toy")]


def test_what_is_missing_or_too_old_warns_with_the_command(needs) -> None:
    needs.install("toy_dep", "1.5", "toy_dep")
    missing, old = needs("toy_other[more]>=3; python_version > '3'", "toy_dep>=2")
    assert missing == Finding(WARN, "toy_other", "not installed; toy needs it", 'pip install "toy_other[more]>=3"')
    assert old == Finding(WARN, "toy_dep", "1.5 is installed; toy needs >=2", 'pip install "toy_dep>=2"')


def test_what_does_not_load_shows_its_last_line(needs) -> None:
    needs.install("toy_dep", "1.5", "toy_module", "raise ImportError('libcublas.so missing')")
    [finding] = needs("toy_dep")
    assert finding.status == WARN and "ImportError: libcublas.so missing; toy needs it" in finding.detail
    assert finding.remedy == 'pip install --force-reinstall "toy_dep"'
    (Path(os.environ["PYTHONPATH"]) / "toy_module" / "__init__.py").write_text("import os; os._exit(3)")
    [finding] = needs("toy_dep")
    assert finding.status == WARN and "exit status 3" in finding.detail


ONE_OF_TWO = ("toy_gpu>=1; sys_platform != 'nowhere'", "toy_cpu; sys_platform == 'nowhere'")


def test_two_distributions_of_the_same_files_warn(needs) -> None:
    for name in ("toy_gpu", "toy_cpu"):
        needs.install(name, "1.0", "toy_module")
    [finding] = needs(*ONE_OF_TWO)
    assert finding.status == WARN and finding.detail == "toy_gpu and toy_cpu overwrite each other's files"
    assert finding.remedy == 'pip uninstall -y toy_cpu toy_gpu; pip install "toy_gpu>=1"'


def test_the_distribution_of_another_platform_is_named(needs) -> None:
    needs.install("toy_cpu", "1.0", "toy_module")
    [finding] = needs(*ONE_OF_TWO)
    assert finding.status == WARN and finding.detail == "not installed, but toy_cpu is; toy needs it"
    assert "uninstall -y toy_cpu toy_gpu" in finding.remedy


def test_distributions_of_other_files_go_together(needs) -> None:
    for name in ("toy_gpu", "toy_cpu"):
        needs.install(name, "1.0", f"module_of_{name}")
    assert _statuses(needs(*ONE_OF_TWO)) == [OK]


# -- trainers -------------------------------------------------------------------------------------------------------


def test_registration_is_automatic_in_this_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(OPT_OUT_VARIABLE, raising=False)
    [finding] = _check_discovery.startup()
    assert finding.status == OK, finding
    assert finding.detail.endswith(("nnunetv2_ext.pth", "nnunetv2_ext.start"))


def test_opt_out_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OPT_OUT_VARIABLE, "0")
    [finding] = _check_discovery.startup()
    assert finding.status == WARN and f"{OPT_OUT_VARIABLE}=0" in finding.detail


def test_a_startup_file_without_effect_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = types.SimpleNamespace(stdout="/elsewhere\n")
    monkeypatch.setattr(_check_discovery.subprocess, "run", lambda *a, **k: answer)
    monkeypatch.delenv(OPT_OUT_VARIABLE, raising=False)
    [finding] = _check_discovery.startup()
    assert finding.status == WARN and SHIM_FOLDER in finding.remedy


def test_an_overwritten_variable_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(EXT_VARIABLE, str(tmp_path))
    findings = list(_check_discovery.folders())
    assert _statuses(findings) == [FAIL, OK]
    assert SHIM_FOLDER in findings[0].remedy


def test_missing_and_broken_folders_after_ours_warn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("import a_module_that_nobody_has\n")
    missing = tmp_path / "missing"
    monkeypatch.setenv(EXT_VARIABLE, os.pathsep.join([SHIM_FOLDER, str(missing), str(tmp_path)]))
    findings = list(_check_discovery.folders())
    assert _statuses(findings) == [OK, WARN, WARN]
    assert "does not exist" in findings[1].detail
    assert "a_module_that_nobody_has" in findings[2].detail


def test_a_broken_folder_before_ours_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("raise SystemExit(5)\n")
    monkeypatch.setenv(EXT_VARIABLE, os.pathsep.join([str(tmp_path), SHIM_FOLDER]))
    findings = list(_check_discovery.folders())
    assert _statuses(findings) == [FAIL, OK]
    assert "status 5" in findings[0].detail


def test_a_trainer_that_nnunet_takes_from_elsewhere_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "copied.py").write_text(
        "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n"
        "class nnUNetTrainerMedContext(nnUNetTrainer):\n    pass\n"
    )
    monkeypatch.setenv(EXT_VARIABLE, os.pathsep.join([str(tmp_path), SHIM_FOLDER]))
    finding = next(f for f in _check_discovery.trainers() if f.subject == "nnUNetTrainerMedContext")
    assert finding.status == FAIL and "module copied" in finding.detail
    [copy] = [f for f in _check_discovery.stale_copies() if f.status == WARN]
    assert str(tmp_path / "copied.py") in copy.detail


def test_a_trainer_that_nnunet_cannot_find_fails_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(EXT_VARIABLE, raising=False)
    finding = next(f for f in _check_discovery.trainers() if f.subject == "nnUNetTrainerMedContext")
    assert finding.status == FAIL and "Could not find" in finding.detail and SHIM_FOLDER in finding.remedy


def test_a_trainer_that_does_not_import_is_not_a_matter_of_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    from nnunetv2.utilities import find_objects

    def fail(name: str) -> None:
        raise ImportError("libfaiss.so: cannot open")

    monkeypatch.setenv(EXT_VARIABLE, SHIM_FOLDER)
    monkeypatch.setattr(find_objects, "recursive_find_trainer_class_by_name", fail)
    found = list(_check_discovery.trainers())
    assert all(f.status == FAIL and "libfaiss.so" in f.detail and EXT_VARIABLE not in f.remedy for f in found)


def test_no_installed_trainer_at_all_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_check_discovery, "installed_trainers", dict)
    assert _statuses(_check_discovery.trainers()) == [FAIL]


def test_planners_of_residual_encoders_and_the_one_for_this_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    for gib, size in ((None, "M"), (6, "M"), (12, "M"), (23.6, "L"), (80, "XL")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gib=gib: gib is not None)
        memory = types.SimpleNamespace(total_memory=(gib or 0) * GIB)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, memory=memory: memory)
        [finding] = _check_software.planners()
        assert finding.status == OK and finding.detail.endswith(f"-pl nnUNetPlannerResEnc{size}")


def test_methods_say_themselves_what_they_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("needy")
    module.findings = lambda: [Finding(WARN, "coffee", "is out", "buy some")]
    monkeypatch.setitem(sys.modules, "needy", module)
    needy, content = Method("needy", "a method", doctor="needy:findings"), Method("content", "another")
    monkeypatch.setattr(_check_software, "methods", lambda: {"needy": needy, "content": content})
    assert list(_check_software.of_methods()) == [Finding(WARN, "coffee", "is out", "buy some")]


# -- machine --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gib", "expected"), [(8, WARN), (64, OK)])
def test_little_memory_warns(monkeypatch: pytest.MonkeyPatch, gib: int, expected: str) -> None:
    monkeypatch.setattr(_check_machine, "ram", lambda: (gib * GIB, gib * GIB // 2))
    [finding] = _check_machine.memory()
    assert finding.status == expected and f"{gib}.0 GiB" in finding.detail


def test_ram_is_positive_and_consistent() -> None:
    total, available = _check_machine.ram()
    assert 0 < available <= total


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="shared memory is a folder on Linux only")
@pytest.mark.parametrize(("mib", "expected"), [(64, WARN), (16384, OK)])
def test_little_shared_memory_warns(monkeypatch: pytest.MonkeyPatch, mib: int, expected: str) -> None:
    usage = types.SimpleNamespace(total=mib * 2**20, used=0, free=mib * 2**20)
    monkeypatch.setattr(_check_machine.shutil, "disk_usage", lambda path: usage)
    [finding] = _check_machine.shared_memory()
    assert finding.status == expected
    assert ("--shm-size" in finding.remedy) == (expected == WARN)


@pytest.mark.parametrize(
    ("value", "expected", "word"),
    [
        ("0", WARN, "main process"),
        ("2", OK, "2 worker processes"),
        ("8", WARN, "on 4 CPUs"),
        ("many", FAIL, "whole number"),
        ("-1", FAIL, "whole number"),
        ("", FAIL, "whole number"),
    ],
)
def test_worker_setting_is_explained(monkeypatch: pytest.MonkeyPatch, value: str, expected: str, word: str) -> None:
    monkeypatch.setenv("nnUNet_n_proc_DA", value)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(_check_machine, "usable_cpus", lambda: 4)
    monkeypatch.setattr(_check_machine, "ram", lambda: (64 * GIB, 32 * GIB))
    monkeypatch.setenv("nnUNet_def_n_proc", "4")
    cpus, finding, *export = _check_machine.workers()
    assert [f.status for f in export] == ([] if expected == FAIL else [OK])
    assert cpus.detail == "4 usable of 16"
    assert finding.status == expected and word in finding.detail
    assert bool(finding.remedy) == (expected != OK)


def test_many_workers_for_the_memory_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_n_proc_DA", "12")
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(_check_machine, "usable_cpus", lambda: 16)
    monkeypatch.setattr(_check_machine, "ram", lambda: (16 * GIB, 8 * GIB))
    _, finding, _ = _check_machine.workers()
    assert finding.status == WARN and finding.remedy == "export nnUNet_n_proc_DA=8"
    monkeypatch.setenv("nnUNet_n_proc_DA", "20")
    assert list(_check_machine.workers())[1].remedy == "export nnUNet_n_proc_DA=8"  # not 16, which would warn again
    monkeypatch.setenv("nnUNet_n_proc_DA", "8")
    assert list(_check_machine.workers())[1].status == OK


def test_the_remedy_for_little_memory_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_check_machine, "ram", lambda: (8 * GIB, 4 * GIB))
    monkeypatch.delenv("nnUNet_n_proc_DA", raising=False)
    [finding] = _check_machine.memory()
    name, _, value = finding.remedy.split()[1].partition("=")
    monkeypatch.setenv(name, value)
    assert _statuses(_check_machine.memory()) == [OK]


@pytest.mark.parametrize(
    ("value", "expected", "remedy"),
    [
        (None, WARN, "export nnUNet_def_n_proc=2"),  # nnU-Net's 8
        ("2", OK, ""),
        ("3", WARN, "export nnUNet_def_n_proc=2"),
        ("0", FAIL, "export nnUNet_def_n_proc=2"),
        ("two", FAIL, "export nnUNet_def_n_proc=2"),
    ],
)
def test_processes_that_export_segmentations(monkeypatch, value: str | None, expected: str, remedy: str) -> None:
    monkeypatch.setattr(_check_machine, "usable_cpus", lambda: 2)
    monkeypatch.delenv("nnUNet_n_proc_DA", raising=False)
    if value is None:
        monkeypatch.delenv("nnUNet_def_n_proc", raising=False)
    else:
        monkeypatch.setenv("nnUNet_def_n_proc", value)
    finding = next(f for f in _check_machine.workers() if f.subject == "nnUNet_def_n_proc")
    assert (finding.status, finding.remedy) == (expected, remedy)
    assert ("656 s" in finding.detail) == (expected == WARN)


def test_nnunets_default_number_of_processes_is_the_one_stated(monkeypatch) -> None:
    code = "import nnunetv2.configuration as c; print(c.default_num_processes)"
    environment = {k: v for k, v in os.environ.items() if k != "nnUNet_def_n_proc"}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert int(process.stdout) == _check_machine.NNUNET_EXPORT_PROCESSES


@pytest.mark.parametrize("variable", ["nnUNet_n_proc_DA", "nnUNet_def_n_proc"])
def test_one_wrong_number_has_one_remedy(monkeypatch, variable: str) -> None:
    """nnU-Net reads both when it is imported: then no trainer is found, and no setting can be tried."""
    monkeypatch.setenv(variable, "many")
    monkeypatch.setenv("nnUNet_ext_settings", "num_epochs=5")
    [about] = _check_discovery.trainers()
    assert about.status == FAIL and variable in about.detail and about.remedy == "see Machine, below"
    assert list(_check_discovery.settings()) == [] and list(_check_software.planners()) == []
    failed = [f for f in _check_machine.workers() if f.status == FAIL]
    assert [f.subject for f in failed] == [variable]


@pytest.mark.parametrize("variable", ["nnUNet_n_proc_DA", "nnUNet_def_n_proc"])
def test_every_other_command_names_the_wrong_number(monkeypatch, variable: str, capsys) -> None:
    monkeypatch.setenv(variable, "many")
    assert main(["settings"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"nnUNetv2_ext settings: {variable} is 'many'; it must be a whole number")
    assert error.count("\n") == 1
    monkeypatch.setenv(variable, error.split(f"export {variable}=")[1].split(",")[0])
    assert main(["settings"]) == 0


def test_nnunet_folders_unset_missing_wrong_and_right(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "missing"))
    monkeypatch.setenv("nnUNet_results", str(file))
    findings = {f.subject: f for f in _check_machine.nnunet_folders()}
    assert findings["nnUNet_raw"].status == OK
    assert findings["nnUNet_preprocessed"].remedy == f"mkdir -p {tmp_path / 'missing'}"
    assert findings["nnUNet_results"].status == FAIL
    assert list(tmp_path.iterdir()) == [file], "checking must leave nothing behind"
    monkeypatch.delenv("nnUNet_results")
    findings = {f.subject: f for f in _check_machine.nnunet_folders()}
    assert findings["nnUNet_results"].status == FAIL and findings["nnUNet_results"].remedy.startswith("export ")


@pytest.mark.parametrize("written", ['"{}"', "'{}' ", "{} ", " {}", "~/raw", "$HOME/raw", "'~/raw'\r"])
def test_quotes_blanks_and_a_tilde_that_no_shell_took_away(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, written: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "raw"
    folder.mkdir()
    monkeypatch.setenv("nnUNet_raw", written.format(folder))
    finding = next(f for f in _check_machine.nnunet_folders() if f.subject == "nnUNet_raw")
    assert finding.status == FAIL and "literally" in finding.detail
    assert finding.remedy == f"export nnUNet_raw={folder}"
    monkeypatch.setenv("nnUNet_raw", finding.remedy.partition("=")[2])
    assert next(f for f in _check_machine.nnunet_folders() if f.subject == "nnUNet_raw").status == OK


@pytest.mark.parametrize(("variable", "expected"), [("nnUNet_raw", WARN), ("nnUNet_results", FAIL)])
def test_a_folder_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str, expected: str
) -> None:
    def refuse(**kwargs):
        raise PermissionError(kwargs["dir"])

    monkeypatch.setattr(_check_machine.tempfile, "TemporaryFile", refuse)
    for name in _check_machine.NNUNET_FOLDERS:
        monkeypatch.setenv(name, str(tmp_path))
    finding = next(f for f in _check_machine.nnunet_folders() if f.subject == variable)
    assert finding.status == expected and "not writable" in finding.detail


def test_the_folder_check_reports_free_space(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in _check_machine.NNUNET_FOLDERS:
        monkeypatch.setenv(name, str(tmp_path))
    free = shutil.disk_usage(tmp_path).free / GIB
    stated = [float(f.detail.split(", ")[-1].split()[0]) for f in _check_machine.nnunet_folders()]
    assert stated == pytest.approx([free] * 3, abs=5)


# -- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "status", "says"),
    [
        ("", OK, "not set"),
        ("num_epochs=5", WARN, "'num_epochs=5' is what every training of nnUNetTrainer"),
        ("medcontext.beta=1", WARN, "every training of nnUNetTrainerMedContext, nnUNetTrainerMedContextJRAS will take"),
        ("num_epoch=5", FAIL, "did you mean num_epochs"),
        ("medcontext.beta=-1", FAIL, "medcontext.beta=-1 (from nnUNet_ext_settings): Input should be greater"),
        ("rada.region=alpha", FAIL, "needs Alpha-CLIP's weights"),
        ("num_epochs 5", FAIL, "does not exist"),
        ("/no/such/settings.yaml", FAIL, "/no/such/settings.yaml"),
    ],
)
def test_settings_that_are_still_exported_are_shown(monkeypatch: pytest.MonkeyPatch, text, status, says) -> None:
    monkeypatch.setenv("nnUNet_ext_settings", text)
    [finding] = _check_discovery.settings()
    assert finding.status == status and says in finding.detail
    assert ("unset nnUNet_ext_settings" in finding.remedy) == (status != OK)


def test_a_trainer_that_cannot_be_imported_has_no_say_in_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    real = _check_discovery.load_trainer

    def load(name: str):
        if name == "nnUNetTrainerRADA":
            raise ImportError("No module named 'open_clip'")
        return real(name)

    monkeypatch.setattr(_check_discovery, "load_trainer", load)
    monkeypatch.setenv("nnUNet_ext_settings", "num_epochs=5")
    [finding] = _check_discovery.settings()
    assert finding.status == WARN and "nnUNetTrainerMedContext" in finding.detail and "RADA" not in finding.detail


def test_colour_images_under_other_names_are_pointed_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    for name, channels in {"001_a": "RGB", "002_b": ["rgb_to_0_1"] * 3, "003_c": ["T1"]}.items():
        (tmp_path / f"Dataset{name}").mkdir()
        content = {"channel_names": dict(enumerate(channels))}
        (tmp_path / f"Dataset{name}" / "dataset.json").write_text(json.dumps(content))
    (tmp_path / "Dataset004_d").mkdir()
    (tmp_path / "Dataset004_d" / "dataset.json").write_text("{")
    (found,) = _check_machine.colours()
    assert (found.status, found.subject) == ("WARN", "Dataset001_a") and "rgb_to_0_1" in found.remedy
