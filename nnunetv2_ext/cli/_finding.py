"""What ``nnUNetv2_ext doctor`` found, as `core.outside.Finding`."""

from nnunetv2_ext.core.outside import FAIL, OK, WARN, Finding

__all__ = ["FAIL", "OK", "WARN", "Finding", "judged"]


def judged(subject: str, detail: str, lack: str, remedy: str) -> Finding:
    """A warning with its remedy if there is a ``lack``, else all is well."""
    return Finding(WARN, subject, f"{detail}; {lack}", remedy) if lack else Finding(OK, subject, detail)
