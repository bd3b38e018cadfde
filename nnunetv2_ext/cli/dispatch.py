"""Finds and runs the subcommands of ``nnUNetv2_ext``: those of the house and those of each method's ``outside.py``.

A subcommand is a module with ``add_arguments(parser) -> None``, ``run(args) -> int`` (the exit status) and, shown below
its help as it stands, ``EPILOG``. Only the module of the command that was typed is imported, so that the overview is
immediate.
"""

import argparse
import difflib
import importlib
import sys
import textwrap
from collections.abc import Mapping, Sequence

from nnunetv2_ext import __version__
from nnunetv2_ext.core.outside import STORIES, Command, methods
from nnunetv2_ext.core.processes import require_numbers

# in the order of the overview, by story
HOUSE = {
    name: Command(f"nnunetv2_ext.cli.{name.replace('-', '_')}", summary, story)
    for story, commands in {
        "prepare data": {
            "doctor": "check this installation and say how to fix what is wrong",
            "advise": "look at a dataset and say what to run on it, what not, and which control beside it",
            "unlabelled": "preprocess unlabelled scans into a pool beside a dataset, for methods that use them",
            "fix-fingerprint": "take CT intensities from annotated voxels only, in a dataset with an ignore label",
        },
        "train": {
            "settings": "list every setting of a trainer: type, default, meaning",
            "weights": "say what a file of weights holds, and what init_from would load of it for a dataset",
            "plan-like": "write plans on which all of a file's weights load: its network, patch and spacing",
            "plan-network": "write plans with another network, for any trainer; no new preprocessing",
            "bench": "measure what trainers cost against plain nnUNetTrainer: step, prediction, memory",
        },
        "judge": {
            "evaluate": "score predictions: Dice, HD95 and NSD in mm, per structure and case",
            "overlay": "draw segmentations over their images, a picture a case",
            "compare": "compare finished trainings: paired differences with intervals, plots, worst cases",
        },
        "hand on and look inside": {
            "export": "write a model folder that plain nnU-Net can predict with",
        },
    }.items()
    for name, summary in commands.items()
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``nnUNetv2_ext`` with ``argv`` (default: the command line) and return its exit status.

    0 is success, 2 a mistake of the user (one line on stderr), anything else is the command's own. Without a command
    the overview is printed.
    """
    typed, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    known = HOUSE | {name: command for method in methods().values() for name, command in method.commands.items()}
    if typed in ("-h", "--help"):
        print(_overview(known))
        return 0
    if typed == "--version":
        print(f"nnunetv2-ext {__version__}")
        return 0
    name = next((new for new, command in known.items() if typed == command.formerly), typed)
    if name not in known:
        near = difflib.get_close_matches(typed, [*known, "--help", "--version"], n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        print(f"nnUNetv2_ext: there is no command {typed!r}; {hint}nnUNetv2_ext --help lists them", file=sys.stderr)
        return 2
    if name != typed:
        print(f"nnUNetv2_ext {typed} is now called {name}; use the new name", file=sys.stderr)
    summary = known[name].summary
    module = importlib.import_module(known[name].module)
    parser = argparse.ArgumentParser(
        prog=f"nnUNetv2_ext {name}",
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=getattr(module, "EPILOG", None),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    args = parser.parse_args(rest)
    try:
        if name != "doctor":  # which says so among its findings
            require_numbers()
        return int(module.run(args))
    except BrokenPipeError:  # whoever read the output has ended, as `| head` does
        return 1
    except (ValueError, OSError) as error:  # OSError: a full disk, a missing right
        print(f"{parser.prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _overview(known: Mapping[str, Command]) -> str:
    lines = ["usage: nnUNetv2_ext COMMAND ...", "       nnUNetv2_ext COMMAND --help", "       nnUNetv2_ext --version"]
    for story in STORIES:
        lines += ["", story]
        for name, command in known.items():
            if command.story == story:
                row = f"  {name:<17} {command.summary}"
                lines.append(textwrap.fill(row, 110, subsequent_indent=" " * 20, break_on_hyphens=False))
    trainers = ", ".join(name for method in methods().values() for name in method.trainers)
    lines += ["", textwrap.fill(f"trainers: nnUNetTrainerExt, {trainers}", 110, subsequent_indent=" " * 10)]
    return "\n".join(lines)
