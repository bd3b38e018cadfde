"""What a user gets from ``pip install``: wheel, sdist, plain and editable, in fresh environments and without a network.

A copy of the project with extra trainer files is installed into virtual environments that borrow the dependencies of
the environment in which the tests run.
"""

import base64
import csv
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.metadata import Metadata
from packaging.requirements import Requirement

from nnunetv2_ext import __version__
from nnunetv2_ext.core.outside import methods

CHECKOUT = Path(__file__).resolve().parents[1]
STARTUP_FILES = {"nnunetv2_ext.pth", "nnunetv2_ext.start"}
EXTRA_TRAINERS = {
    "nnUNetTrainerProbe.py": """
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

class nnUNetTrainerProbe(nnUNetTrainer):
    pass
""",
    "nnUNetTrainerLacksModule.py": "import a_module_that_nobody_has\n",
    "_helper.py": "",
}

EXTRA_METHOD = """
from nnunetv2_ext.core.outside import Method

METHOD = Method(
    name="toy",
    summary="a toy",
    requires=("toy-dep>=2; sys_platform != 'nowhere'",),
    extras={"toy": ("more",), "tensorboard": ("tb",)},
)
"""

# run in a fresh interpreter, as a file: spawned workers import it again
PROBE = """
import json, multiprocessing, os, sys

at_start = {
    "variable": os.environ.get("nnUNet_extTrainer"),
    "heavy": sorted({"torch", "nnunetv2", "pydantic", "numpy"} & set(sys.modules)),
}

def received(cls, instance):
    from nnunetv2_ext.trainers.nnUNetTrainerProbe import nnUNetTrainerProbe
    return cls is nnUNetTrainerProbe and type(instance) is cls and instance.mark == 7

if __name__ == "__main__":
    import nnunetv2, nnunetv2_ext
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find

    cls = find("nnUNetTrainerProbe")
    instance = cls.__new__(cls)  # a trainer is a plain object; its constructor wants plans
    instance.mark = 7
    workers = {}
    for method in sys.argv[1:]:
        with multiprocessing.get_context(method).Pool(1) as pool:
            workers[method] = pool.apply(received, (cls, instance))
    try:
        find("nnUNetTrainerLacksModule")
        error = "none"
    except ImportError as e:
        error = str(e)
    print(json.dumps({
        "at_start": at_start, "module": cls.__module__, "again": find("nnUNetTrainerProbe") is cls, "workers": workers,
        "error": error, "names": sorted(nnunetv2_ext.installed_trainers()), "package": nnunetv2_ext.__path__[0],
        "nnunetv2": nnunetv2.__path__[0],
    }))
"""


class Environment:
    """A virtual environment that sees the dependencies of the running one but not what is registered there."""

    def __init__(self, folder: Path, search_first: Path | None = None) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        self.python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        self.site = Path(self.run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        borrowed = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *_folders_of("nnunetv2", "torch")]
        # a folder named in a .pth is searched, its own .pth files are not run
        (self.site / "zz_borrowed.pth").write_text("\n".join(dict.fromkeys(borrowed)) + "\n")
        if search_first is not None:
            (self.site / "__editable__.nnunetv2.pth").write_text(f"{search_first}\n")

    def run(self, *arguments: str | Path, cwd: Path | None = None, **variables: str) -> str:
        ours = ("nnunet", "python", "pip_", "virtual_env", "cov_")
        clean = {name: value for name, value in os.environ.items() if not name.lower().startswith(ours)}
        process = subprocess.run(
            [self.python, *arguments],
            cwd=cwd or self.python.parent,
            env={**clean, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **variables},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert process.returncode == 0, process.stdout + process.stderr
        return process.stdout

    def install(self, *what: str | Path) -> None:
        self.run("-m", "pip", "install", "--no-deps", "--no-build-isolation", "--ignore-installed", "--quiet", *what)

    def uninstall(self) -> None:
        self.run("-m", "pip", "uninstall", "--yes", "--quiet", "nnunetv2-ext")

    def record(self) -> dict[str, str]:
        [record] = self.site.glob("nnunetv2_ext-*.dist-info/RECORD")
        return _rows(record.read_text())

    def probe(self, folder: Path, *start_methods: str) -> dict:
        """Look the probe trainer up from ``folder`` and send it to a worker process of each start method."""
        folder.mkdir(exist_ok=True)
        (folder / "probe.py").write_text(PROBE)
        return json.loads(self.run(folder / "probe.py", *start_methods, cwd=folder).splitlines()[-1])


def _build(hook: str, source: Path, target: Path) -> None:
    """Run a hook of the build back end in this environment, as pip does with --no-build-isolation."""
    code = f"import sys, setuptools.build_meta as backend; backend.{hook}(sys.argv[1])"
    process = subprocess.run([sys.executable, "-c", code, target], cwd=source, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr


def _folders_of(*packages: str) -> list[str]:
    return [str(Path(find_spec(package).origin).parents[1]) for package in packages]


def _rows(record: str) -> dict[str, str]:
    return {name: digest for name, digest, _ in csv.reader(io.StringIO(record))}


def _read(wheel: Path, ending: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        [name] = [n for n in archive.namelist() if n.endswith(ending)]
        return archive.read(name).decode()


def _files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.suffix != ".pyc"}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    junk = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for entry in ("nnunetv2_ext", "trainers", "startup", "docs"):
        shutil.copytree(CHECKOUT / entry, folder / entry, ignore=junk)
    for file in (
        *(CHECKOUT / n for n in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "CITATION.cff")),
        *CHECKOUT.glob("*.md"),
    ):
        shutil.copy(file, folder)
    for name, text in EXTRA_TRAINERS.items():
        (folder / "trainers" / name).write_text(text)
    (folder / "nnunetv2_ext" / "toy").mkdir()
    (folder / "nnunetv2_ext" / "toy" / "__init__.py").touch()
    (folder / "nnunetv2_ext" / "toy" / "outside.py").write_text(EXTRA_METHOD)
    left_by_an_earlier_build = folder / "build" / "lib" / "nnunetv2_ext" / "trainers" / "nnUNetTrainerDeleted.py"
    left_by_an_earlier_build.parent.mkdir(parents=True)
    left_by_an_earlier_build.write_text("")
    return folder


@pytest.fixture(scope="module")
def built(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the wheel and the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    _build("build_sdist", project, folder)
    _build("build_wheel", project, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    [path] = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel_environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("wheel") / "env")
    environment.install(wheel)
    return environment


def test_wheel_holds_our_package_and_the_startup_files_only(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {n.split("/")[0] for n in names} == {"nnunetv2_ext", f"nnunetv2_ext-{__version__}.dist-info", *STARTUP_FILES}
    assert "nnunetv2_ext/trainers/nnUNetTrainerProbe.py" in names
    assert "nnunetv2_ext/py.typed" in names
    assert len(names) == len(set(names))
    assert not any("nnUNetTrainerDeleted" in n for n in names), "left over from an earlier build"


def test_wheel_holds_every_source_file(project: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    sources = {p.relative_to(project).as_posix() for p in (project / "nnunetv2_ext").rglob("*.py")}
    sources |= {f"nnunetv2_ext/{p.relative_to(project).as_posix()}" for p in (project / "trainers").rglob("*.py")}
    assert sources <= names, sources - names


def test_record_of_the_wheel_lists_each_file_with_its_hash(wheel: Path) -> None:
    rows = _rows(_read(wheel, ".dist-info/RECORD"))
    with zipfile.ZipFile(wheel) as archive:
        assert set(rows) == set(archive.namelist())
        for name, stated in rows.items():
            if not name.endswith("/RECORD"):
                digest = base64.urlsafe_b64encode(hashlib.sha256(archive.read(name)).digest()).rstrip(b"=").decode()
                assert stated == f"sha256={digest}", name


def test_metadata_states_version_python_and_licence(wheel: Path) -> None:
    metadata = Metadata.from_email(_read(wheel, ".dist-info/METADATA"), validate=False)
    assert metadata.name == "nnunetv2-ext"
    assert str(metadata.version) == __version__
    assert "3.10" in metadata.requires_python and "3.9" not in metadata.requires_python
    assert metadata.license == "Apache-2.0"
    of_methods = {extra for method in methods().values() for extra in method.extras}
    assert set(metadata.provides_extra) == {"test", "tensorboard", "toy", *of_methods}


def test_needs_and_extras_of_a_method_are_those_of_its_outside(wheel: Path) -> None:
    """Of the sources that are built, not of the version that is installed beside and imported at start."""
    metadata = Metadata.from_email(_read(wheel, ".dist-info/METADATA"), validate=False)
    by_name = {requirement.name: requirement for requirement in metadata.requires_dist}
    assert str(by_name["toy-dep"].specifier) == ">=2" and "nowhere" in str(by_name["toy-dep"].marker)
    markers = {(requirement.name, str(requirement.marker)) for requirement in metadata.requires_dist}
    assert ("more", 'extra == "toy"') in markers and ("tb", 'extra == "tensorboard"') in markers
    assert ("more", 'extra == "test"') in markers  # whoever tests has what methods need
    ours = {Requirement(text).name for method in methods().values() for text in method.requires}
    assert len(ours) > 2 and ours <= set(by_name)


@pytest.mark.parametrize(
    ("system", "machine", "expected"),
    [
        ("linux", "x86_64", "faiss-gpu"),
        ("linux", "aarch64", "faiss-cpu"),
        ("darwin", "arm64", "faiss-cpu"),
        ("darwin", "x86_64", "faiss-cpu"),
        ("win32", "AMD64", "faiss-cpu"),
    ],
)
def test_each_platform_gets_exactly_one_faiss(wheel: Path, system: str, machine: str, expected: str) -> None:
    text = _read(wheel, ".dist-info/METADATA")
    requirements = [Requirement(x.split(": ", 1)[1]) for x in text.splitlines() if x.startswith("Requires-Dist: ")]
    platform = {"sys_platform": system, "platform_machine": machine, "extra": ""}
    chosen = [r.name for r in requirements if r.marker is None or r.marker.evaluate(platform)]
    assert [name for name in chosen if name.startswith("faiss")] == [expected]
    assert "nnunetv2" in chosen and "pytest" not in chosen


def test_metadata_hold_the_readme_and_known_addresses(wheel: Path) -> None:
    metadata = Metadata.from_email(_read(wheel, ".dist-info/METADATA"), validate=False)
    assert metadata.description.strip() == (CHECKOUT / "README.md").read_text(encoding="utf-8").strip()
    assert metadata.description_content_type.startswith("text/markdown")
    papers = {f"https://arxiv.org/abs/{number}" for number in ("2402.17725", "2604.11164")}
    assert papers | {"https://github.com/MIC-DKFZ/nnUNet"} <= set(metadata.project_urls.values())


def test_sdist_gives_the_same_wheel(built: Path, wheel: Path, tmp_path: Path) -> None:
    [sdist] = built.glob("*.tar.gz")
    shutil.unpack_archive(sdist, tmp_path)
    [source] = tmp_path.iterdir()
    _build("build_wheel", source, tmp_path)
    [again] = tmp_path.glob("*.whl")
    assert _rows(_read(again, ".dist-info/RECORD")) == _rows(_read(wheel, ".dist-info/RECORD"))


def test_sdist_holds_the_documents_and_their_picture(built: Path, tmp_path: Path) -> None:
    [sdist] = built.glob("*.tar.gz")
    shutil.unpack_archive(sdist, tmp_path)
    [source] = tmp_path.iterdir()
    documents = {"README.md", "CITATION.cff", *(f"docs/{name}" for name in _files(CHECKOUT / "docs"))}
    assert documents <= _files(source)


def test_plain_install_of_the_folder_puts_the_same_files_in_place(project: Path, wheel: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "env")
    before = _files(environment.site)
    environment.install(project)
    stated = _rows(_read(wheel, ".dist-info/RECORD"))
    installed = environment.record()
    assert {n: h for n, h in installed.items() if n in stated and not n.endswith("RECORD")} == {
        n: h for n, h in stated.items() if not n.endswith("RECORD")
    }
    environment.uninstall()
    assert _files(environment.site) == before


@pytest.mark.slow
def test_trainer_of_an_installed_wheel_reaches_nnunet_and_its_workers(
    wheel_environment: Environment, tmp_path: Path
) -> None:
    start_methods = multiprocessing.get_all_start_methods()
    result = wheel_environment.probe(tmp_path / "elsewhere", *start_methods)
    assert result["at_start"]["heavy"] == []
    assert Path(result["at_start"]["variable"]) == wheel_environment.site / "nnunetv2_ext" / "shim"
    assert result["module"] == "nnunetv2_ext.trainers.nnUNetTrainerProbe"
    assert result["again"], "a second lookup must give the same class"
    assert result["workers"] == dict.fromkeys(start_methods, True)
    assert "a_module_that_nobody_has" in result["error"]
    assert "nnUNetTrainerProbe" in result["names"] and "_helper" not in result["names"]


@pytest.mark.slow
def test_editable_install_works_beside_an_editable_nnunet_and_leaves_no_trace(project: Path, tmp_path: Path) -> None:
    source = tmp_path / "nnunet"
    shutil.copytree(find_spec("nnunetv2").submodule_search_locations[0], source / "nnunetv2")
    nnunet_before = _files(source)
    environment = Environment(tmp_path / "env", search_first=source)
    before = _files(environment.site)
    environment.install("--editable", project)
    assert set(environment.record()) >= STARTUP_FILES

    result = environment.probe(tmp_path / "elsewhere", "spawn")
    assert Path(result["nnunetv2"]) == source / "nnunetv2"
    assert Path(result["package"]) == project / "nnunetv2_ext"
    assert result["module"] == "nnunetv2_ext.trainers.nnUNetTrainerProbe"
    assert result["again"] and result["workers"] == {"spawn": True}

    environment.uninstall()
    assert _files(environment.site) == before
    assert _files(source) == nnunet_before


def test_opt_out_leaves_the_variable_alone(wheel_environment: Environment) -> None:
    code = "import os; print(os.environ.get('nnUNet_extTrainer'))"
    assert wheel_environment.run("-c", code, NNUNETV2_EXT_AUTOREGISTER="0").strip() == "None"
    assert wheel_environment.run("-c", code, NNUNETV2_EXT_AUTOREGISTER="0", nnUNet_extTrainer="/x").strip() == "/x"


def test_a_folder_of_the_user_is_kept_after_ours_and_child_processes_do_not_add_to_it(
    wheel_environment: Environment,
) -> None:
    code = (
        "import os, subprocess, sys; show = 'import os; print(os.environ[\"nnUNet_extTrainer\"])';"
        "exec(show); sys.stdout.flush(); subprocess.run([sys.executable, '-c', show])"
    )
    own, child = wheel_environment.run("-c", code, nnUNet_extTrainer=os.pathsep.join(["/a b", "/c"])).splitlines()
    shim = str(wheel_environment.site / "nnunetv2_ext" / "shim")
    assert own == os.pathsep.join([shim, "/a b", "/c"])
    assert child == own


def test_command_is_installed(wheel_environment: Environment) -> None:
    command = wheel_environment.python.parent / ("nnUNetv2_ext.exe" if os.name == "nt" else "nnUNetv2_ext")
    output = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout
    assert output.strip() == f"nnunetv2-ext {__version__}"


def test_a_left_over_pth_is_silent(wheel: Path) -> None:
    line = _read(wheel, "nnunetv2_ext.pth")
    assert line.startswith("import ") and line.count("\n") == 1, "site.py executes only lines that start with import"
    # -S: no site-packages, hence no nnunetv2_ext
    process = subprocess.run([sys.executable, "-I", "-S", "-c", line], capture_output=True, text=True, cwd="/")
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")


def test_start_file_names_a_function_that_exists(wheel: Path) -> None:
    from importlib.metadata import EntryPoint

    line = _read(wheel, "nnunetv2_ext.start").strip()
    function = EntryPoint(name="", value=line, group="").load()
    assert callable(function)
    assert function.__module__ == "nnunetv2_ext._register"
