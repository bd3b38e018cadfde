"""Every hook of a method, with its contract: what ExtTrainer asks, and what it does where a method says nothing.

A method overrides the few it needs in one class, always calling ``super()``; two methods combine by inheriting from
both. CONTRIBUTING's table names the same hooks (a test compares them). nnU-Net's own hooks (``initialize``,
``build_network_architecture``, ``get_training_transforms``, ...) are overridden as in any nnU-Net trainer.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from pydantic import BaseModel
from torch import Tensor, nn

from nnunetv2_ext.core.step import Batch, LossPass, Passes, Term


class MethodHooks:
    """The hooks and their defaults, which are plain nnU-Net.

    Attributes:
        method_settings: block name to pydantic model, merged over all base classes; the keys users set.
        default_settings: dotted keys whose default differs for this trainer, merged over all base classes.
        needs_foreground: whether a training set without any foreground voxel is refused. False for methods that learn
            without labels; they also override nnU-Net's ``perform_actual_validation``, which scores against labels.
    """

    method_settings: ClassVar[dict[str, type[BaseModel]]] = {}
    default_settings: ClassVar[dict[str, Any]] = {}
    needs_foreground: ClassVar[bool] = True

    # what the hooks find on the trainer, besides nnU-Net's attributes
    settings: Any  # common keys, and a block per method
    generator: torch.Generator  # the methods' own random stream, on the device
    global_step: int  # optimiser steps done, over all epochs
    network: nn.Module  # maybe wrapped, see core.checkpoint.unwrap
    loss: nn.Module
    logger: Any  # nnU-Net's
    dataset_class: Any
    _best_ema: Any
    device: torch.device
    training_modules: dict[str, nn.Module]

    # ---- what is built -----------------------------------------------------------------------------------------------
    def build_training_modules(self) -> dict[str, nn.Module]:
        """Modules that are trained beside the network and not needed to predict (heads, second networks), by name.

        Called once, when ``self.network`` exists; torch's random state is put back after it.
        The modules end in ``self.training_modules``: on the device, in the
        optimiser and its zeroing, in the gradient clipping, averaged over DDP's ranks, compiled in place where nnU-Net
        compiles, switched between train and eval mode, saved and taken up again by ``--c``. They are never part of
        ``network_weights``, so prediction and export do not see them.

        Raises (by the caller):
            ValueError: a module shares a parameter with the network or with another module, or has a name twice.
        """
        return {}

    def make_train_loader(self, dataset: Any, **nnunet_arguments: Any) -> Any:
        """The loader of training batches: an iterator of dictionaries with ``data``, ``target`` and ``keys``.

        Args:
            dataset: the first of ``get_tr_and_val_datasets``.
            nnunet_arguments: those nnU-Net gives to its ``nnUNetDataLoader``, by name, transforms included.

        Further keys of a batch reach ``loss_passes`` in ``Batch.extras``. The loader is pickled to worker processes.
        A loader of another class replaces what ``super()`` returns, so only one of two combined methods can bring one;
        a stream beside it (data/unlabelled.py) wraps what ``super()`` returns.
        """
        return nnUNetDataLoader(dataset, **nnunet_arguments)

    # ---- one step ----------------------------------------------------------------------------------------------------
    def forward(self, batch: Batch, network: Callable[[Tensor], Any] | None = None) -> Any:
        """Logits of ``batch.data``; a network that needs to know the cases gets them here.

        Args:
            batch: data, and the case ids they belong to.
            network: the trained network, or another one of the same kind (a teacher).

        Returns:
            ``(B, heads, *S)``, or the list over deep-supervision resolutions.
        """
        return (self.network if network is None else network)(batch.data)

    def loss_passes(self, batch: Batch) -> Passes:
        """What a step learns from: passes in order, each back-propagated before the next one's forward.

        Place yours by name: ``super().loss_passes(batch).before("supervised", mine)``. nnU-Net's own pass is called
        ``supervised`` and stays last, because under DDP the last pass must use every parameter of the network.
        """
        supervised = LossPass("supervised", lambda: {"supervised": Term(self.loss(self.forward(batch), batch.target))})
        return Passes([supervised], type(self).__name__)

    def clip_gradients(self) -> Tensor:
        """Clip after unscaling, one norm over network and training modules. Returns the norm before, 0-dim.

        The highest norm is the setting ``clip_norm``; unset, the base trainer's own (nnU-Net: 12).
        """
        return nn.utils.clip_grad_norm_(self.trained_parameters(), self.clip_norm)

    def after_step(self) -> None:
        """Called after the optimiser step, also when the scaler skipped it; ``global_step`` is still this step's."""

    # ---- one epoch ---------------------------------------------------------------------------------------------------
    def validation_score(self, outputs: Sequence[dict[str, Any]]) -> float | None:
        """What best checkpoint, early stop and log go by; higher is better. Under DDP the same on every rank.

        Called after nnU-Net logged its own figures of the epoch.

        Args:
            outputs: what ``validation_step`` returned for each batch of this rank; nnU-Net's need not be among it.

        Returns:
            nnU-Net's pseudo Dice, the mean over foreground classes or regions; NaN if the batches say nothing (no
            foreground), and the epoch is passed over. None: this training has no score, so there is no best checkpoint.
        """
        return self.logger.get_value("mean_fg_dice", step=-1)

    def epoch_figures(self) -> dict[str, float]:
        """Figures of the finished epoch for the log, named ``method/figure``; on every rank, the first one's are kept.

        Called with the training part done. A figure that fails is warned of and never ends a training. The class
        attribute ``healthy_figures``, figure to (lowest, highest), draws ranges into ``progress_ext.png``.
        """
        return {}

    def draw_panel(self, path: Path) -> None:
        """Draw what the method does with ``last_batch`` to ``path`` (PNG), on the first rank only.

        All random states are put back after it. A picture that fails is warned of and never ends a training.
        """

    # ---- checkpoints -------------------------------------------------------------------------------------------------
    def method_state(self) -> dict[str, Any]:
        """What the method needs to continue, by method name; tensors and plain values. The first rank's is saved."""
        return {}

    def load_method_state(self, states: dict[str, Any]) -> None:
        """Counterpart of ``method_state``; the own name may be missing (plain nnU-Net's checkpoint).

        Called after ``initialize`` and before ``on_train_start``, and only if a checkpoint is loaded.
        """

    @classmethod
    def export_weights(cls, checkpoint: dict[str, Any], weights: str) -> dict[str, Tensor]:
        """Weights from this trainer's checkpoint that plain nnU-Net's network of the same plans loads.

        Args:
            checkpoint: as read from the file.
            weights: which network; ``student`` is the one that was trained.

        Raises:
            ValueError: no such network.
        """
        if weights != "student":
            raise ValueError(f"{cls.__name__} has no {weights!r} weights to export; it has: student")
        return checkpoint["network_weights"]

    # ---- what the defaults above use, of the trainer -----------------------------------------------------------------
    clip_norm: float

    def trained_parameters(self) -> list[nn.Parameter]:
        """Of the network and of the training modules."""
        raise NotImplementedError  # core/trainer.py


HOOKS = tuple(name for name in vars(MethodHooks) if name[0] != "_" and name != "trained_parameters")
