"""Releases of nnU-Net to test beside the installed one: a line each, a name and what pip is to install for it.

The lowest that our metadata allow, with the lowest of the libraries by nnU-Net's authors; then every release, or
pre-release, that is newer than the installed one and allowed.
"""

import re
import subprocess
import sys
from importlib.metadata import requires, version

from packaging.requirements import Requirement
from packaging.version import Version

THEIRS = ("nnunetv2", "batchgenerators", "batchgeneratorsv2", "acvl-utils", "dynamic-network-architectures")

ours = {r.name: r.specifier for r in map(Requirement, requires("nnunetv2-ext") or []) if r.name in THEIRS}
lowest = {name: s.version for name, allowed in ours.items() for s in allowed if s.operator == ">="}
print("lowest", *(f"{name}=={number}" for name, number in lowest.items()))

command = [sys.executable, "-m", "pip", "index", "versions", "--pre", "nnunetv2"]
listed = subprocess.run(command, capture_output=True, text=True).stdout
numbers = re.findall(r"[^\s,]+", "".join(re.findall(r"Available versions: (.*)", listed)))
for number in sorted(map(Version, numbers)):
    if number > Version(version("nnunetv2")) and ours["nnunetv2"].contains(number, prereleases=True):
        print(number, f"nnunetv2=={number}")
