"""Subcommands of ``nnUNetv2_ext``, named in its ``outside.py``."""
