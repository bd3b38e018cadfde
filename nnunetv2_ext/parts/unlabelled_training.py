"""UnlabelledTraining: patches of unlabelled cases beside the labelled ones, for methods whose teacher labels them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import distributed

from nnunetv2_ext.data.pool import open_pool
from nnunetv2_ext.data.subjects import subjects_of_dataset
from nnunetv2_ext.data.unlabelled import UnlabelledLoader, UnlabelledStream, with_unlabelled, write_found
from nnunetv2_ext.parts.ramps import gaussian_ramp
from nnunetv2_ext.parts.teacher_training import TeacherTraining
from nnunetv2_ext.parts.unlabelled_settings import UnlabelledSettings

_VOXELS = 500  # of the foreground of a case, to place patches on
_LOOKS = 10  # in a training, where no setting says how often
_STATE = "unlabelled"


class UnlabelledTraining(TeacherTraining):
    """Every batch carries ``batch.stream("unlabelled")``, as many patches as labelled ones (data/unlabelled.py).

    A continued training keeps the cases that it began with, also if the pool has grown. From time to time the teacher
    may say where the foreground of these cases is, and patches are then drawn there as they are from labelled cases.
    Without a source, with weight 0 or with start 1 there is no stream, and the loader is ``super()``'s.
    """

    unlabelled_block: ClassVar[str]  # of the settings: the method's, which is an UnlabelledSettings

    _unlabelled: list[str] | None = None  # -> make_train_loader, or the checkpoint
    _places: dict[str, npt.NDArray[Any]] | None = None  # foreground voxels, as last found
    _found_in: int | None = None  # the epoch of that
    _unlabelled_dataset: Any = None

    # ---- what a method asks ------------------------------------------------------------------------------------------
    @property
    def unlabelled_settings(self) -> UnlabelledSettings:
        """Of the method's block."""
        return getattr(self.settings, self.unlabelled_block)

    @property
    def has_unlabelled(self) -> bool:
        """Whether batches carry the stream."""
        s = self.unlabelled_settings
        return s.unlabelled is not None and s.unlabelled_weight > 0 and s.unlabelled_start < 1

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
            ValueError: a cascade; no unlabelled cases, fewer than a batch takes, or cases of this training are gone.
        """
        source = self.unlabelled_settings.unlabelled
        if self.is_cascaded and self.has_unlabelled:
            raise ValueError(
                f"{type(self).__name__} cannot train a cascade on unlabelled cases, of which nobody has predicted the "
                "previous stage: use 3d_fullres"
            )
        labelled = super().make_train_loader(dataset, **nnunet_arguments)
        if source is None or not self.has_unlabelled:
            return labelled
        found = self._found_file if self.unlabelled_refresh else None
        if self.local_rank == 0:
            self._found_file.unlink(missing_ok=True)  # of an earlier training in this folder
            if self._places is not None:
                write_found(self._found_file, self._places)
        if source == "labelled":
            cases, folder = list(dataset.identifiers), None
            stream = UnlabelledStream(labelled, UnlabelledLoader(dataset, found=found, **nnunet_arguments))
        else:
            cases, subjects, folder = self._unlabelled_cases(source)
            cases = self._as_begun(cases, source)
            if len(cases) < self.batch_size:
                raise ValueError(
                    f"there are {len(cases)} unlabelled cases, and a batch takes {self.batch_size}: add cases to the "
                    f"{source}, or set batch_size={max(1, len(cases))}"
                )
            others = cases, subjects, self.held_out, folder, found
            stream = with_unlabelled(labelled, dataset, *others, **nnunet_arguments)
        self._unlabelled, self._unlabelled_dataset = sorted(cases), stream.unlabelled.of_cases
        self.print_to_log_file(
            f"Unlabelled patches come from {len(cases)} cases ({source}), {self.batch_size} in a batch."
        )
        return stream

    def _unlabelled_cases(self, source: str) -> tuple[list[str], dict[str, str] | None, Path | None]:
        """Cases, subjects of these and of the validation cases, and the folder of a pool."""
        regex = self.settings.group_regex
        if source == "rest":
            if not self.left_out:
                raise ValueError(
                    f"no training case of fold {self.fold} is left as unlabelled: let train_cases choose some as "
                    "labelled"
                )
            cases, folder = list(self.left_out), None
            subjects = subjects_of_dataset(self.dataset_json, [*cases, *self.held_out], regex)
        else:
            base = Path(self.preprocessed_dataset_folder_base)
            pool = open_pool(base, self.plans_manager, self.configuration_manager, self.configuration_name)
            cases, folder = list(pool.cases), pool.data_folder
            known = pool.subjects if regex is None else None
            subjects = known or subjects_of_dataset(self.dataset_json, [*cases, *self.held_out], regex)
        if scored := _of_subjects_of(self.held_out, cases, subjects):
            self.print_to_log_file(
                f"{len(scored)} unlabelled cases are of subjects that validate in this fold, and are left out: "
                f"{', '.join(scored[:5])}"
            )
        return [case for case in cases if case not in set(scored)], subjects, folder

    def _as_begun(self, cases: list[str], source: str) -> list[str]:
        if self._unlabelled is None:
            return cases
        if gone := sorted(set(self._unlabelled) - set(cases)):
            raise ValueError(
                f"this training was started with {len(self._unlabelled)} unlabelled cases, of which {gone[0]} is gone: "
                f"put it back into the {source}, or start a new training without --c"
            )
        return self._unlabelled

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
            foreground = (logits > 0).any(0) if regions else logits.argmax(0) > 0
            voxels = np.argwhere(foreground.cpu().numpy())
            if len(voxels) > _VOXELS:
                voxels = voxels[random.choice(len(voxels), _VOXELS, replace=False)]
            mine[case] = voxels.astype(np.int32)
        return {case: voxels for part in self._gather(mine) for case, voxels in part.items()}

    # ---- checkpoint --------------------------------------------------------------------------------------------------
    def method_state(self) -> dict[str, Any]:
        """Adds the unlabelled cases, and where their foreground was found."""
        states = super().method_state()
        if self._unlabelled is not None:
            places = {case: torch.from_numpy(voxels) for case, voxels in (self._places or {}).items()}
            states[_STATE] = {"cases": self._unlabelled, "places": places, "found_in": self._found_in}
        return states

    def load_method_state(self, states: dict[str, Any]) -> None:
        """Counterpart of `method_state`."""
        super().load_method_state(states)
        if (state := states.get(_STATE)) is not None:
            self._unlabelled, self._found_in = list(state["cases"]), state["found_in"]
            self._places = {case: voxels.numpy().copy() for case, voxels in state["places"].items()} or None


def _of_subjects_of(held_out: Collection[str], cases: Collection[str], subjects: Mapping[str, str] | None) -> list[str]:
    """Those of ``cases`` that are of a subject of ``held_out``; without ``subjects`` each case is its own."""
    known = subjects or {}
    scored = {known.get(case, case) for case in held_out}
    return sorted(case for case in cases if known.get(case, case) in scored)
