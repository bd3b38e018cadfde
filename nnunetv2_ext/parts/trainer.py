"""MethodTrainer: what a method subclasses."""

from __future__ import annotations

from typing import ClassVar

from nnunetv2_ext.core.trainer import ExtTrainer
from nnunetv2_ext.parts.settings import HouseSettings


class MethodTrainer(ExtTrainer):
    """ExtTrainer with everything the house offers to every trainer above core."""

    common_settings: ClassVar = HouseSettings
