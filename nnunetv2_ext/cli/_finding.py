"""One line of what ``nnUNetv2_ext doctor`` found."""

from typing import NamedTuple

OK, WARN, FAIL = "OK", "WARN", "FAIL"


class Finding(NamedTuple):
    """``status`` is OK, WARN (works, not as well as it could) or FAIL (a command will fail).

    ``remedy`` is what to type or change; empty if nothing is wrong.
    """

    status: str
    subject: str
    detail: str
    remedy: str = ""


def judged(subject: str, detail: str, lack: str, remedy: str) -> Finding:
    """A warning with its remedy if there is a ``lack``, else all is well."""
    return Finding(WARN, subject, f"{detail}; {lack}", remedy) if lack else Finding(OK, subject, detail)
