"""The command ``nnUNetv2_ext``."""

from nnunetv2_ext.cli.dispatch import main

__all__ = ["main"]
