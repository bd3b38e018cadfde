"""Plain nnU-Net with random convolutions of its training samples."""

from pathlib import Path
from typing import Any, ClassVar

from nnunetv2_ext.gin.panel import draw_panel
from nnunetv2_ext.parts.trainer import MethodTrainer


class GINTraining(MethodTrainer):
    """The common setting ``gin`` switched on, and a picture of what it does."""

    default_settings: ClassVar[dict[str, Any]] = {"gin": 0.5}

    def draw_panel(self, path: Path) -> None:
        """Patches of the last batch before and after a random convolution of their own."""
        if self.last_batch is None or self._gin is None:
            return
        s: Any = self.settings
        title = f"{self.picture_title}, epoch {self.current_epoch - 1}"
        draw_panel(self.last_batch, path, title, s.gin_layers, s.gin_hidden)
