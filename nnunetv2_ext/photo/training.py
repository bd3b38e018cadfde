"""Training with a pre-trained encoder of segmentation-models-pytorch."""

from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel

from nnunetv2_ext.core.checkpoint import unwrap
from nnunetv2_ext.parts.architecture import replace_architecture, require_2d
from nnunetv2_ext.parts.trainer import MethodTrainer
from nnunetv2_ext.photo.network import SMPNetwork
from nnunetv2_ext.photo.panel import draw_panel
from nnunetv2_ext.photo.plans import NETWORK, architecture
from nnunetv2_ext.photo.settings import PhotoSettings
from nnunetv2_ext.photo.weights import load_encoder


class PhotoTraining(MethodTrainer):
    """A network of SMP with AdamW; its encoder starts from a local file. Everything else is nnU-Net's."""

    method_settings: ClassVar[dict[str, type[BaseModel]]] = {"photo": PhotoSettings}
    default_settings: ClassVar[dict[str, Any]] = {"optimizer": "adamw", "initial_lr": 1e-3, "weight_decay": 1e-2}

    @property
    def photo(self) -> PhotoSettings:
        """This method's settings."""
        return self.settings.photo  # type: ignore[attr-defined]  # the block settings_model added

    def initialize(self) -> None:
        """nnU-Net's, with the network of the settings in the plans; then the encoder's weights.

        Raises:
            ValueError: a 3-D configuration, an unknown network, a weights file that does not fit, or batches of one
                sample a GPU with a network that cannot normalise them.
        """
        require_2d(self, "a network of segmentation-models-pytorch")
        self.enable_deep_supervision = False
        if self.configuration_manager.network_arch_class_name != NETWORK:
            wanted = f"{self.photo.architecture}:{self.photo.encoder}"
            replace_architecture(self, architecture(self.configuration_manager.configuration, wanted))
        super().initialize()
        network = self._network
        if network.has_pooled_norm and self.batch_size < 2:
            raise ValueError(
                f"{self.photo.architecture} normalises a map of one voxel over the batch, and a batch of this rank has "
                "one sample: use a batch_size of at least 2 a GPU, or photo.architecture=Unet"
            )
        if self.photo.weights is None:
            self.print_to_log_file(
                "WARNING: photo.weights is not set: the encoder starts from random weights, which lost all of the gain "
                "on colour photographs (docs/methods/photo.md)"
            )
        elif not self._takes_weights_of_checkpoint and self.settings.init_from is None:  # type: ignore[attr-defined]
            kwargs = self.configuration_manager.network_arch_init_kwargs
            said = load_encoder(network.encoder, kwargs["encoder"], Path(self.photo.weights).expanduser())
            self.print_to_log_file(f"photo.weights: {said}", add_timestamp=False)

    @property
    def _network(self) -> SMPNetwork:
        network = unwrap(self.network)
        assert isinstance(network, SMPNetwork)
        return network

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Nothing: these networks have one output."""

    def draw_panel(self, path: Path) -> None:
        """Patches of the last batch with truth and prediction."""
        if self.last_batch is not None:
            title = f"{self.picture_title}, epoch {self.current_epoch - 1}"
            draw_panel(self, self.on_device(self.last_batch), path, title)
