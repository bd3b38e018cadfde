"""``nnUNetv2_ext doctor``: check this installation line by line and say how to fix what is wrong."""

import argparse
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterable

from nnunetv2_ext import __version__
from nnunetv2_ext.cli import _check_discovery as discovery
from nnunetv2_ext.cli import _check_machine as machine
from nnunetv2_ext.cli import _check_software as software
from nnunetv2_ext.cli._finding import FAIL, OK, WARN, Finding

Check = Callable[[], Iterable[Finding]]

EPILOG = "Exit status: 0 if nothing is marked FAIL, else 1."
SUBJECT_WIDTH = 28  # of the column with what was checked; the longest trainer names fit

SECTIONS: dict[str, tuple[Check, ...]] = {
    "Software": (
        software.python,
        software.nnunet,
        software.torch,
        software.planners,
        software.requirements,
        software.of_methods,
    ),
    "Trainers": (discovery.startup, discovery.folders, discovery.trainers, discovery.stale_copies),
    "Machine": (machine.devices, machine.memory, machine.shared_memory, machine.workers),
    "Folders": (machine.nnunet_folders, machine.colours),
    "Settings": (discovery.settings,),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(args: argparse.Namespace) -> int:
    """Print every finding; 1 if one of them is a FAIL, else 0."""
    say = (lambda *_: None) if args.json else print
    say(f"nnunetv2-ext {__version__}\n")
    found: list[dict[str, str]] = []
    for title, checks in SECTIONS.items():
        say(title)
        for check in checks:
            for finding in findings_of(check):
                found.append({"section": title, **finding._asdict()})
                say(render(finding))
        say()
    counts = Counter(finding["status"] for finding in found)
    say(", ".join(f"{counts[status]} {status}" for status in (OK, WARN, FAIL)))
    if args.json:
        print(json.dumps({"nnunetv2_ext": __version__, "findings": found}, indent=2))
    return 1 if counts[FAIL] else 0


def findings_of(check: Check) -> list[Finding]:
    """All findings of one check; a check that breaks is itself a finding, the others still run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the libraries imported for the check
            return list(check())
    except Exception as error:
        what = f"this check broke: {type(error).__name__}: {error}"
        return [Finding(FAIL, check.__name__, what, "report it with this line, please")]


def render(finding: Finding) -> str:
    """The finding as text: status, subject and detail in columns, the remedy on its own line."""
    remedy = "".join(f"\n{' ' * (10 + SUBJECT_WIDTH)}-> {line}" for line in finding.remedy.splitlines())
    return f"  {finding.status:<4}  {finding.subject:<{SUBJECT_WIDTH}}  {finding.detail}{remedy}"
