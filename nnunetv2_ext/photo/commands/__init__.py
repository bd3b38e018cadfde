"""Subcommands of ``nnUNetv2_ext`` for photographs, named in ``outside.py``."""
