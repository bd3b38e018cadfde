"""MethodTrainer: what a method subclasses."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from torch import nn

from nnunetv2_ext.core.checkpoint import unwrap
from nnunetv2_ext.core.trainer import ExtTrainer
from nnunetv2_ext.parts.settings import HouseSettings
from nnunetv2_ext.parts.start import start_from


class MethodTrainer(ExtTrainer):
    """ExtTrainer with everything the house offers to every trainer above core."""

    common_settings: ClassVar = HouseSettings

    _takes_weights_of_checkpoint = False
    _started: list[int] | None = None  # versions of the weights after init_from was read

    @property
    def start_file(self) -> str | None:
        """What ``init_from`` names."""
        return self.settings.init_from  # type: ignore[attr-defined]  # common_settings

    def initialize(self) -> None:
        """nnU-Net's, then the weights of ``init_from``: before a method copies them, on every rank.

        Raises:
            ValueError: the file cannot be used (see `parts.start.start_from`).
        """
        super().initialize()
        if self.start_file is None or self._takes_weights_of_checkpoint:
            return
        path = Path(self.start_file).expanduser()
        if path.resolve().parent == Path(self.output_folder).resolve():
            raise ValueError(
                f"init_from={path} is a checkpoint of the very training that starts here, which will move it away: "
                "copy it to another folder, or continue the training with --c and without init_from"
            )
        table = start_from(self.network, path)
        self.print_to_log_file(f"init_from={path}: {table}", add_timestamp=False)
        self._started = _versions(self.network)

    def on_train_start(self) -> None:
        """nnU-Net's.

        Raises:
            ValueError: weights of ``-pretrained_weights`` were put over those of ``init_from``.
        """
        if self._started is not None and self._started != _versions(self.network):
            raise ValueError(
                "init_from and -pretrained_weights both say which weights to start from; give one of the two"
            )
        self._started = None
        super().on_train_start()

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """nnU-Net's; the file that ``init_from`` names is not read, and may be gone by now."""
        self._takes_weights_of_checkpoint = True
        super().load_checkpoint(filename_or_checkpoint)


def _versions(network: nn.Module) -> list[int]:
    """Each write to a parameter raises its number."""
    return [parameter._version for parameter in unwrap(network).parameters()]
