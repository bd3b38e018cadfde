"""Common settings that need more than core: every trainer offers them, whatever its method."""

from __future__ import annotations

from nnunetv2_ext.core.settings import CommonSettings


class HouseSettings(CommonSettings):
    """Settings every trainer of this package understands: core's, and those of the parts."""
