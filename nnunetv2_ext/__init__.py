"""Research trainers that run on an unmodified nnU-Net v2.

Importing this package puts our shim folder into the variable ``nnUNet_extTrainer`` (see :func:`register`) and does
nothing else: it runs at every interpreter start, so it must not import torch, nnunetv2 or anything else that is slow.
"""

from nnunetv2_ext._register import auto_register, installed_trainers, register

__version__ = "0.1.0"  # the only place
__all__ = ["__version__", "installed_trainers", "register"]

auto_register()
