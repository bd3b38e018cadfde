"""CPUs of this process, and nnU-Net's two variables that say how many processes it starts on them."""

import os

# by variable, the smallest number that nnU-Net can work with: 0 loads data in the main process; a pool needs one
NUMBERS = {"nnUNet_n_proc_DA": 0, "nnUNet_def_n_proc": 1}


def usable_cpus() -> int:
    """CPUs that this process may use: a scheduler such as SLURM gives fewer than ``os.cpu_count()`` says."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def unusable(variable: str) -> str:
    """What is wrong with the value of one of `NUMBERS`; empty if nothing is, or if it is not set."""
    value, smallest = os.environ.get(variable), NUMBERS[variable]
    if value is None or (value.strip().isdecimal() and int(value) >= smallest):
        return ""
    return f"is {value!r}; it must be a whole number >= {smallest}"


def require_numbers() -> None:
    """Raise ValueError if one of `NUMBERS` has a value on which nnU-Net's import, or its first pool, fails."""
    for variable in NUMBERS:
        if wrong := unusable(variable):
            raise ValueError(f"{variable} {wrong}: export {variable}={usable_cpus()}, or unset it")
