"""Finds and runs the subcommands of ``nnUNetv2_ext``.

A subcommand is a module of ``nnunetv2_ext.cli`` with ``add_arguments(parser) -> None`` and ``run(args) -> int`` (the
exit status), plus one row in :data:`COMMANDS`. Only the module of the command that was typed is imported, so that the
overview is immediate.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from nnunetv2_ext import __version__

# command -> (module, one line for the overview); in the order of the overview
COMMANDS: dict[str, tuple[str, str]] = {
    "doctor": ("nnunetv2_ext.cli.doctor", "check this installation and say how to mend what is wrong"),
    "settings": ("nnunetv2_ext.cli.settings", "list every setting of a trainer: type, default, meaning"),
    "export": ("nnunetv2_ext.cli.export", "write a model folder that plain nnU-Net can predict with"),
    "guides": ("nnunetv2_ext.cli.guides", "show what a J-RAS model retrieves for an image, and with which weights"),
    "sparsify": (
        "nnunetv2_ext.cli.sparsify",
        "make a dense dataset sparse for nnUNetTrainerRADA, or thicken own planes",
    ),
    "fix-fingerprint": (
        "nnunetv2_ext.cli.fix_fingerprint",
        "take CT intensities from annotated voxels only, in a dataset with an ignore label",
    ),
    "check": ("nnunetv2_ext.cli.check", "show which annotated planes a preprocessed sparse dataset has"),
    "bench": (
        "nnunetv2_ext.cli.bench",
        "measure what trainers cost against plain nnUNetTrainer: step, prediction, memory",
    ),
    "evaluate": ("nnunetv2_ext.cli.evaluate", "score predictions: Dice, HD95 and NSD in mm, per structure and case"),
    "compare": (
        "nnunetv2_ext.cli.compare",
        "compare finished trainings: paired differences with intervals, plots, worst cases",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``nnUNetv2_ext`` with ``argv`` (default: the command line) and return its exit status.

    0 is success, 2 a mistake of the user (one line on stderr), anything else is the command's own.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="nnUNetv2_ext", description="Tools for the nnunetv2-ext trainers.")
    parser.add_argument("--version", action="version", version=f"nnunetv2-ext {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    typed = next((a for a in arguments if not a.startswith("-")), None)
    for name, (module_name, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == typed:
            module = importlib.import_module(module_name)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    args = parser.parse_args(arguments)
    try:
        return int(args.run(args))
    except BrokenPipeError:  # whoever read the output has ended, as `| head` does
        return 1
    except (ValueError, OSError) as error:  # OSError: a full disk, a missing right
        print(f"nnUNetv2_ext {args.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
