"""Checks of ``nnUNetv2_ext doctor``: does nnU-Net find our trainers, nothing in their place, and with what settings?"""

import contextlib
import io
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from nnunetv2_ext import installed_trainers
from nnunetv2_ext._register import EXT_VARIABLE, OPT_OUT_VARIABLE, SHIM_FOLDER, auto_register_enabled
from nnunetv2_ext.cli._check_software import child_error, nnunet_folder
from nnunetv2_ext.cli._finding import FAIL, OK, WARN, Finding
from nnunetv2_ext.core.outside import load_trainer
from nnunetv2_ext.core.processes import NUMBERS, unusable

BY_HAND = f"export {EXT_VARIABLE}={SHIM_FOLDER}   (or, in Python: import nnunetv2_ext; nnunetv2_ext.register())"
REINSTALL = "reinstall nnunetv2-ext: pip install --force-reinstall --no-deps ."
# imports all modules of a folder, as nnU-Net's search does
_SEARCH = """\
import sys
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class as find
find(sys.argv[1], "no such class", None, sys.argv[1], cleanup_imports_from_base_folder=True)
"""


def startup() -> Iterator[Finding]:
    """Whether a new interpreter registers our trainers by itself, as ``nnUNetv2_train`` needs it."""
    if not auto_register_enabled():
        value = os.environ[OPT_OUT_VARIABLE]
        yield Finding(WARN, "registration", f"switched off by {OPT_OUT_VARIABLE}={value}", f"unset it, or {BY_HAND}")
        return
    clean = {k: v for k, v in os.environ.items() if k != EXT_VARIABLE}
    code = f"import os; print(os.environ.get({EXT_VARIABLE!r}, ''))"
    child = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, timeout=60)
    if any(_same(p, SHIM_FOLDER) for p in child.stdout.strip().split(os.pathsep)):
        # the start-up file that this Python reads: .start from 3.15 on (PEP 829), else .pth
        name = "nnunetv2_ext.start" if sys.version_info >= (3, 15) else "nnunetv2_ext.pth"
        file = next((Path(p) / name for p in sys.path if p and (Path(p) / name).is_file()), None)
        yield Finding(OK, "registration", f"automatic, by {file or 'PYTHONPATH or sitecustomize'}")
    else:
        what = "Python does not run our start-up file (pip install --target, or an incomplete installation)"
        yield Finding(WARN, "registration", what, f"install with a plain 'pip install', or {BY_HAND}")


def folders() -> Iterator[Finding]:
    """Each folder of ``nnUNet_extTrainer`` in the order in which nnU-Net searches them."""
    entries = _entries()
    ours = [_same(p, SHIM_FOLDER) for p in entries]
    if not any(ours):
        yield Finding(FAIL, EXT_VARIABLE, f"our folder is not in it (it is {entries})", BY_HAND)
    for position, entry in enumerate(entries, start=1):
        subject = f"{EXT_VARIABLE} {position}"
        if ours[position - 1]:
            yield Finding(OK, subject, f"{entry} (ours)")
        elif not os.path.isdir(entry):
            yield Finding(WARN, subject, f"{entry} does not exist; nnU-Net skips it", f"correct {EXT_VARIABLE}")
        elif error := child_error(_SEARCH, entry):
            detail = f"{entry} cannot be searched ({error}); nnU-Net stops there and reads no later folder"
            remedy = f"repair that file, or take the folder out of {EXT_VARIABLE}"
            yield Finding(FAIL if any(ours[position:]) else WARN, subject, detail, remedy)
        else:
            yield Finding(OK, subject, f"{entry} (yours)")


def trainers() -> Iterator[Finding]:
    """Look up each of our trainers with nnU-Net's own function, as train and predict do, and pickle it."""
    names = installed_trainers()
    if not names:
        yield Finding(FAIL, "trainers", "none is installed", REINSTALL)
    if wrong := [name for name in NUMBERS if unusable(name)]:
        yield Finding(FAIL, "trainers", f"not looked for, because of {' and '.join(wrong)}", "see Machine, below")
        return
    for name, module in names.items():
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

                found = recursive_find_trainer_class_by_name(name)
        except Exception as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            there = any(_same(p, SHIM_FOLDER) for p in _entries())
            remedy = "repair what this line or one above names" if there else BY_HAND
            yield Finding(FAIL, name, f"nnU-Net cannot use it: {type(error).__name__}: {reason[0]}", remedy)
            continue
        if found.__module__ != module:
            # its file cannot be asked for: nnU-Net has already dropped that module; stale_copies() names it
            detail = f"nnU-Net uses another class of this name, of module {found.__module__}"
            yield Finding(FAIL, name, detail, "remove the copy that is named below")
        elif pickle.loads(pickle.dumps(found)) is not found:
            yield Finding(FAIL, name, "does not pickle: worker processes cannot receive it", REINSTALL)
        else:
            yield Finding(OK, name, "found by nnU-Net, pickles")


def stale_copies() -> Iterator[Finding]:
    """Files elsewhere that define a class of one of our names and may run in its place."""
    places = [Path(p) for p in _entries() if not _same(p, SHIM_FOLDER)]
    folder = nnunet_folder()
    if folder is not None:
        places.insert(0, folder / "training" / "nnUNetTrainer")
    # (?!) matches nothing
    definition = re.compile(rf"^class ({'|'.join(map(re.escape, installed_trainers())) or '(?!)'})\b", re.MULTILINE)
    for file in (file for place in places for file in sorted(place.rglob("*.py"))):
        for name in definition.findall(file.read_text(encoding="utf-8", errors="replace")):
            yield Finding(WARN, "copy", f"{file} also defines {name}", "remove it: ours is used by name as it is")


def settings() -> Iterator[Finding]:
    """What the variable would do to the next training; often it is still exported from an earlier experiment."""
    # here, so that a broken installation of theirs is a finding and not the end of the report
    from nnunetv2_ext.core.resolve import resolve
    from nnunetv2_ext.core.sources import ENVIRONMENT_VARIABLE, from_environment

    text = os.environ.get(ENVIRONMENT_VARIABLE, "").strip()
    if not text:
        yield Finding(OK, ENVIRONMENT_VARIABLE, "not set: trainings take their defaults")
        return
    if any(map(unusable, NUMBERS)):  # a finding of the section on the machine; no trainer can be imported
        return
    remedy = f"unset {ENVIRONMENT_VARIABLE}   (if it belongs to an earlier experiment)"
    try:
        from_environment(text)
    except ValueError as error:
        yield Finding(FAIL, ENVIRONMENT_VARIABLE, str(error), remedy)
        return
    takers, refusals = [], []
    for name in installed_trainers():
        with contextlib.suppress(ImportError):  # a finding of the section on trainers
            try:
                resolve(load_trainer(name).settings_model(), environment=text)
                takers.append(name)
            except ValueError as error:
                refusals.append(str(error))
    if takers:
        detail = f"{text!r} is what every training of {', '.join(takers)} will take"
        yield Finding(WARN, ENVIRONMENT_VARIABLE, detail, remedy)
    else:
        # a trainer that knows all keys says what is wrong with their values
        says = sorted(refusals, key=lambda text: text.startswith("unknown setting"))[0]
        yield Finding(FAIL, ENVIRONMENT_VARIABLE, says, remedy)


def _entries() -> list[str]:
    return [p for p in os.environ.get(EXT_VARIABLE, "").split(os.pathsep) if p.strip()]


def _same(first: str, second: str) -> bool:
    return os.path.normcase(os.path.abspath(first.strip())) == os.path.normcase(os.path.abspath(second))
