"""J-RAS' subcommands of ``nnUNetv2_ext``, named in its ``outside.py``."""
