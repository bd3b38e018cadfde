"""UnlabelledTraining: patches of unlabelled cases beside the labelled ones, for methods whose teacher labels them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import distributed

from nnunetv2_ext.data.unlabelled import write_found
from nnunetv2_ext.parts.ramps import gaussian_ramp
from nnunetv2_ext.parts.teacher_training import TeacherTraining
from nnunetv2_ext.parts.unlabelled_cases import STATE, UnlabelledCases
from nnunetv2_ext.parts.unlabelled_settings import UnlabelledSettings

_VOXELS = 500  # of the foreground of a case, to place patches on
_LOOKS = 10  # in a training, where no setting says how often


class UnlabelledTraining(UnlabelledCases, TeacherTraining):
    """Every batch carries ``batch.stream("unlabelled")``, as many patches as labelled ones (parts/unlabelled_cases.py).

    From time to time the teacher may say where the foreground of these cases is, and patches are then drawn there as
    they are from labelled cases. Without a source, with weight 0 or with start 1 there is no stream, and the loader is
    ``super()``'s.
    """

    _places: dict[str, npt.NDArray[Any]] | None = None  # foreground voxels, as last found
    _found_in: int | None = None  # the epoch of that

    # ---- what a method asks ------------------------------------------------------------------------------------------
    @property
    def unlabelled_settings(self) -> UnlabelledSettings:
        """Of the method's block."""
        return getattr(self.settings, self.unlabelled_block)

    @property
    def has_unlabelled(self) -> bool:
        """Whether batches carry the stream."""
        s = self.unlabelled_settings
        return super().has_unlabelled and s.unlabelled_weight > 0 and s.unlabelled_start < 1

    def unlabelled_weight(self, step: int) -> float:
        """Weight of the loss on unlabelled voxels at global step ``step``: 0 up to the start, then the ramp."""
        s, start = self.unlabelled_settings, self.unlabelled_settings.unlabelled_start * self.total_steps
        if not self.has_unlabelled or step < start:
            return 0.0
        length = s.unlabelled_ramp * self.total_steps
        return s.unlabelled_weight * (gaussian_ramp(min(1.0, (step - start) / length)) if length else 1.0)

    @property
    def unlabelled_refresh(self) -> int:
        """Epochs between two looks for foreground; 0: never."""
        if (given := self.unlabelled_settings.unlabelled_refresh) is not None:
            return given
        patch = np.prod(self.configuration_manager.patch_size, dtype=float)
        whole = np.prod(self.configuration_manager.median_image_size_in_voxels, dtype=float)
        return 0 if patch > whole / 2 else max(1, self.num_epochs // _LOOKS)

    # ---- the stream --------------------------------------------------------------------------------------------------
    @property
    def _found_file(self) -> Path:
        return Path(self.output_folder) / "unlabelled_foreground.npz"

    def make_train_loader(self, dataset: Any, **nnunet_arguments: Any) -> Any:
        """``super()``'s, with the stream.

        Raises:
            ValueError: a cascade, or what `add_unlabelled` refuses.
        """
        if self.is_cascaded and self.has_unlabelled:
            raise ValueError(
                f"{type(self).__name__} cannot train a cascade on unlabelled cases, of which nobody has predicted the "
                "previous stage: use 3d_fullres"
            )
        labelled = super().make_train_loader(dataset, **nnunet_arguments)
        if not self.has_unlabelled:
            return labelled
        if self.local_rank == 0:
            self._found_file.unlink(missing_ok=True)  # of an earlier training in this folder
            if self._places is not None:
                write_found(self._found_file, self._places)
        found = self._found_file if self.unlabelled_refresh else None
        return self.add_unlabelled(labelled, dataset, found=found, **nnunet_arguments)

    # ---- where their foreground is -----------------------------------------------------------------------------------
    def on_train_epoch_start(self) -> None:
        """nnU-Net's; the foreground of the unlabelled cases is looked for when it is time."""
        super().on_train_epoch_start()
        epoch, every = self.current_epoch, self.unlabelled_refresh
        if not every or self._unlabelled_dataset is None or self.unlabelled_weight(self._last_step_of(epoch)) == 0:
            return
        if self._found_in is not None and self._found_in <= epoch < self._found_in + every:
            return
        self._found_in, self._places = epoch, self._find()
        if self.local_rank == 0:
            write_found(self._found_file, self._places)
            with_any = sum(bool(len(voxels)) for voxels in self._places.values())
            self.print_to_log_file(f"Foreground was found in {with_any} of {len(self._places)} unlabelled cases.")

    def _last_step_of(self, epoch: int) -> int:
        return (epoch + 1) * self.num_iterations_per_epoch - 1

    def _find(self) -> dict[str, npt.NDArray[Any]]:
        """Some foreground voxels (n, 3) of each unlabelled case, from one sliding window of the teacher.

        Nothing is mirrored; DDP's ranks share the cases.
        """
        assert self.teacher is not None and self._unlabelled is not None
        predictor = nnUNetPredictor(tile_step_size=1.0, use_mirroring=False, device=self.device, allow_tqdm=False)
        names = self.dataset_json, type(self).__name__, None
        predictor.manual_initialization(
            self.teacher.module, self.plans_manager, self.configuration_manager, None, *names
        )
        mine: dict[str, npt.NDArray[Any]] = {}
        random = np.random.RandomState(0)  # the training's own random numbers stay as they are
        for case in self._unlabelled[self.local_rank :: distributed.get_world_size() if self.is_ddp else 1]:
            data = torch.from_numpy(np.asarray(self._unlabelled_dataset.load_case(case)[0][:]))
            logits = predictor.predict_sliding_window_return_logits(data)
            regions = self.label_manager.has_regions
            foreground = (logits > 0).any(0) if regions else logits.max(0).indices > 0
            voxels = np.argwhere(foreground.cpu().numpy())
            if len(voxels) > _VOXELS:
                voxels = voxels[random.choice(len(voxels), _VOXELS, replace=False)]
            mine[case] = voxels.astype(np.int32)
        return {case: voxels for part in self._gather(mine) for case, voxels in part.items()}

    # ---- checkpoint --------------------------------------------------------------------------------------------------
    def method_state(self) -> dict[str, Any]:
        """Adds where the foreground of the unlabelled cases was found."""
        states = super().method_state()
        if STATE in states:
            places = {case: torch.from_numpy(voxels) for case, voxels in (self._places or {}).items()}
            states[STATE] |= {"places": places, "found_in": self._found_in}
        return states

    def load_method_state(self, states: dict[str, Any]) -> None:
        """Counterpart of `method_state`."""
        super().load_method_state(states)
        if (state := states.get(STATE)) is not None:
            self._found_in = state["found_in"]
            self._places = {case: voxels.numpy().copy() for case, voxels in state["places"].items()} or None
