"""What nnU-Net imports when it searches our folder: ``hasattr(module, trainer_name)`` is true for our trainers only.

nnU-Net drops this module from ``sys.modules`` after each search. The classes it hands out live in
``nnunetv2_ext.trainers``, stay there, and can therefore be pickled for worker processes of every start method.
"""

from importlib import import_module


def __getattr__(name: str) -> type:
    module_name = _modules().get(name)
    if module_name is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(module_name), name)
    except AttributeError as error:
        # hasattr() would swallow this one and nnU-Net would report a trainer that does not exist
        raise ImportError(f"{module_name} could not provide {name}: {error}") from error


def _modules() -> dict[str, str]:
    try:
        from nnunetv2_ext import installed_trainers
    except ImportError:
        # nnUNet_extTrainer was inherited by another interpreter, which does not have this package: other trainers go on
        return {}
    return installed_trainers()
