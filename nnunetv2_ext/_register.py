"""Tell nnU-Net where our trainers are: put the shim folder into ``nnUNet_extTrainer``.

nnU-Net (>= 2.8) reads that variable each time it looks for a trainer that is not its own. The folder given there must
not be the one with our trainers: nnU-Net imports what it finds as top-level modules and forgets them afterwards, so
their classes could not be pickled. The shim folder therefore holds one small module that hands out classes of
importable modules.

Runs at interpreter start: at module level nothing but ``os`` may be imported.
"""

import os

EXT_VARIABLE = "nnUNet_extTrainer"
OPT_OUT_VARIABLE = "NNUNETV2_EXT_AUTOREGISTER"
TRAINERS_PACKAGE = "nnunetv2_ext.trainers"
SHIM_FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "shim")


def register() -> None:
    """Make our trainers visible to nnU-Net in this process and in the processes it starts.

    Our folder goes first, because nnU-Net tries the folders in order and an import error in an earlier one ends its
    search; what the user had set follows unchanged. Calling it again changes nothing. Call it by hand in a kernel that
    ran before the package was installed, or after other code overwrote the variable. Where automatic registration is
    switched off it is needed as well.
    """
    others = [p for p in os.environ.get(EXT_VARIABLE, "").split(os.pathsep) if p.strip() and not _is_shim(p)]
    os.environ[EXT_VARIABLE] = os.pathsep.join([SHIM_FOLDER, *others])


def auto_register() -> None:
    """:func:`register` unless ``NNUNETV2_EXT_AUTOREGISTER`` is 0, false, no or off. Runs at interpreter start."""
    if auto_register_enabled():
        register()


def auto_register_enabled() -> bool:
    """Whether the user left automatic registration on (the default)."""
    return os.environ.get(OPT_OUT_VARIABLE, "1").strip().lower() not in ("0", "false", "no", "off")


def installed_trainers() -> dict[str, str]:
    """Trainer names and the modules that define them, ``{"nnUNetTrainerX": "nnunetv2_ext.trainers.nnUNetTrainerX"}``.

    Every file of the trainers package holds the one class that it is named after, so a listing of files is enough. No
    trainer and no optional dependency of one is imported. Names that start with an underscore are helpers.
    """
    from importlib.util import find_spec
    from pkgutil import iter_modules

    spec = find_spec(TRAINERS_PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    names = sorted(m.name for m in iter_modules(folders) if not m.ispkg and not m.name.startswith("_"))
    return {name: f"{TRAINERS_PACKAGE}.{name}" for name in names}


def _is_shim(path: str) -> bool:
    return os.path.normcase(os.path.abspath(path.strip())) == os.path.normcase(SHIM_FOLDER)
