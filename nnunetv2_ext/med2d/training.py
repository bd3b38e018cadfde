"""Training of Med2DSegNet from nnU-Net's own 2d plans."""

from typing import Any, ClassVar

from pydantic import BaseModel

from nnunetv2_ext.med2d.plans import NETWORK, architecture
from nnunetv2_ext.med2d.settings import Med2DSettings
from nnunetv2_ext.parts.architecture import replace_architecture, require_2d
from nnunetv2_ext.parts.trainer import MethodTrainer


class Med2DTraining(MethodTrainer):
    """The network of ``plan-network -network med2d`` and AdamW; everything else is nnU-Net's."""

    method_settings: ClassVar[dict[str, type[BaseModel]]] = {"med2d": Med2DSettings}
    default_settings: ClassVar[dict[str, Any]] = {"optimizer": "adamw", "initial_lr": 2e-3, "weight_decay": 1e-2}

    def initialize(self) -> None:
        """nnU-Net's, with Med2DSegNet in the plans, unless they name it already.

        Raises:
            ValueError: a 3-D configuration, or a patch that does not fit.
        """
        require_2d(self, "Med2DSegNet")
        if self.configuration_manager.network_arch_class_name != NETWORK:
            s: Med2DSettings = self.settings.med2d  # type: ignore[attr-defined]  # the block settings_model added
            options = {"width": str(s.width), "gap": s.gap}
            replace_architecture(self, architecture(self.configuration_manager.configuration, "", options))
        super().initialize()
