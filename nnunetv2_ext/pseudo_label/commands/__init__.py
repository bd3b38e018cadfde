"""The subcommand of ``nnUNetv2_ext`` that ``outside.py`` names."""
