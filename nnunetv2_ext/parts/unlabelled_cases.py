"""UnlabelledCases: patches of unlabelled cases beside the labelled ones, and whose they are."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

from nnunetv2_ext.data.pool import open_pool
from nnunetv2_ext.data.subjects import subjects_of_dataset
from nnunetv2_ext.data.unlabelled import UnlabelledLoader, UnlabelledStream, with_unlabelled
from nnunetv2_ext.parts.trainer import MethodTrainer
from nnunetv2_ext.parts.unlabelled_settings import UnlabelledSource

STATE = "unlabelled"  # in method_state


class UnlabelledCases(MethodTrainer):
    """Which cases the source that the settings name has; a continued training keeps those that it began with."""

    unlabelled_block: ClassVar[str]  # of the settings: the method's, which is an UnlabelledSource

    _unlabelled: list[str] | None = None  # -> add_unlabelled, or the checkpoint
    _unlabelled_dataset: Any = None

    @property
    def unlabelled_settings(self) -> UnlabelledSource:
        """Of the method's block."""
        return getattr(self.settings, self.unlabelled_block)

    @property
    def has_unlabelled(self) -> bool:
        """Whether batches have patches of a source."""
        return self.unlabelled_settings.unlabelled is not None

    def folder_of_case(self, case: str) -> Path:
        """Of the pool for its cases."""
        others = self._unlabelled_dataset
        if others is None or case not in others.identifiers:
            return super().folder_of_case(case)
        return Path(others.source_folder)

    def add_unlabelled(
        self, labelled: Any, dataset: Any, found: Path | None = None, **nnunet_arguments: Any
    ) -> UnlabelledStream:
        """A loader with a stream of as many patches (data/unlabelled.py).

        Args:
            labelled: the loader of the training cases.
            dataset: nnU-Net's, of these.
            found: where loaders read which foreground was found; None: patches lie anywhere.
            nnunet_arguments: as ``make_train_loader`` got them.

        Raises:
            ValueError: no unlabelled cases, fewer than a batch takes, or cases of this training are gone.
        """
        source = self.unlabelled_settings.unlabelled
        assert source is not None
        if source == "labelled":
            cases = list(dataset.identifiers)
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

    # ---- checkpoint --------------------------------------------------------------------------------------------------
    def method_state(self) -> dict[str, Any]:
        """Adds the unlabelled cases."""
        mine = {} if self._unlabelled is None else {STATE: {"cases": self._unlabelled}}
        return super().method_state() | mine

    def load_method_state(self, states: dict[str, Any]) -> None:
        """Counterpart of `method_state`."""
        super().load_method_state(states)
        if (state := states.get(STATE)) is not None:
            self._unlabelled = list(state["cases"])


def _of_subjects_of(held_out: Collection[str], cases: Collection[str], subjects: Mapping[str, str] | None) -> list[str]:
    """Those of ``cases`` that are of a subject of ``held_out``; without ``subjects`` each case is its own."""
    known = subjects or {}
    scored = {known.get(case, case) for case in held_out}
    return sorted(case for case in cases if known.get(case, case) in scored)
