"""MethodTrainer: what a method subclasses."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from torch import distributed, nn

from nnunetv2_ext.core.checkpoint import unwrap
from nnunetv2_ext.core.compat import pretrained_weights_file
from nnunetv2_ext.core.trainer import ExtTrainer
from nnunetv2_ext.data.split import write_split_if_absent
from nnunetv2_ext.data.store import CaseStore
from nnunetv2_ext.data.subjects import divided, pairs_suggested, subjects_of_dataset
from nnunetv2_ext.parts.settings import HouseSettings
from nnunetv2_ext.parts.start import require_all_of, start_from


class MethodTrainer(ExtTrainer):
    """ExtTrainer with everything the house offers to every trainer above core.

    Attributes:
        case_store: state per case; a method that has some sets it in ``initialize`` by `new_case_store`. It is saved
            with every checkpoint, and ``--c`` takes what belongs to the checkpoint.
    """

    common_settings: ClassVar = HouseSettings

    case_store: CaseStore | None = None

    _takes_weights_of_checkpoint = False
    _started: list[int] | None = None  # versions of the weights after init_from was read

    def initialize(self) -> None:
        """nnU-Net's, then the weights of ``init_from``: before a method copies them, on every rank.

        Raises:
            ValueError: the file cannot be used (see `parts.start.start_from`), or that of ``-pretrained_weights``.
        """
        super().initialize()
        if given := pretrained_weights_file():
            require_all_of(self.network, Path(given))
        file: str | None = self.settings.init_from  # type: ignore[attr-defined]  # common_settings
        if file is None or self._takes_weights_of_checkpoint:
            return
        path = Path(file).expanduser()
        if path.resolve().parent == Path(self.output_folder).resolve():
            raise ValueError(
                f"init_from={path} is a checkpoint of the very training that starts here, which will move it away: "
                "copy it to another folder, or continue the training with --c and without init_from"
            )
        table = start_from(self.network, path)
        self.print_to_log_file(f"init_from={path}: {table}", add_timestamp=False)
        self._started = _versions(self.network)

    def new_case_store(self, channels: Sequence[int] = (), fill: float = 0) -> CaseStore | None:
        """A store of arrays ``(*channels, X, Y, Z)`` of the preprocessed cases, beside the fold; first rank only.

        Boxes of ``batch.extra("boxes")`` fit it as ``box.cpu().numpy()``.

        Args:
            channels: leading axes.
            fill: value of what nobody has written yet.
        """
        if self.local_rank != 0:
            return None
        folder = self.preprocessed_dataset_folder

        @cache
        def shape(case: str) -> tuple[int, ...]:
            dataset = infer_dataset_class(folder)(folder, [case])
            return (*channels, *dataset.load_case(case)[0].shape[1:])

        return CaseStore(Path(self.output_folder) / "case_state", shape, fill)

    def do_split(self) -> tuple[list[str], list[str]]:
        """nnU-Net's; where subjects are known and no split was written, it is written with every subject whole."""
        if self.fold == "all":
            return super().do_split()
        folder = self.preprocessed_dataset_folder
        cases = infer_dataset_class(folder).get_identifiers(folder)
        subjects = subjects_of_dataset(self.dataset_json, cases, self.settings.group_regex)
        file = Path(self.preprocessed_dataset_folder_base) / "splits_final.json"
        if subjects is not None and self.local_rank == 0 and write_split_if_absent(file, cases, (), subjects):
            self.print_to_log_file(f"Wrote {file}: no subject is in training and validation.")
        if self.is_ddp:
            distributed.barrier()
        train, validation = super().do_split()
        if subjects is None and (pairs := pairs_suggested(cases)) and divided(train, validation, pairs.subjects):
            self.print_to_log_file(f"WARNING: {pairs}. This fold divides them: give the expression as group_regex.")
        if both := divided(train, validation, subjects):
            self.print_to_log_file(
                f"WARNING: {len(both)} subjects, e.g. {both[0]}, have cases in training and validation: delete {file}, "
                "and a split that keeps subjects together is written"
            )
        return train, validation

    def on_train_start(self) -> None:
        """nnU-Net's, with the state of the cases as the checkpoint knew it, or none.

        Raises:
            ValueError: weights of ``-pretrained_weights`` were put over those of ``init_from``; or the state of a case
                does not go back as far as the checkpoint.
        """
        if self._started is not None and self._started != _versions(self.network):
            raise ValueError(
                "init_from and -pretrained_weights both say which weights to start from; give one of the two"
            )
        self._started = None
        if self.case_store is not None and self._is_resumed:
            self.case_store.rewind(self.global_step)
        super().on_train_start()
        if self.case_store is not None and not self._is_resumed:
            self.case_store.set_aside()

    def on_train_epoch_start(self) -> None:
        """nnU-Net's; the state of the cases is kept, to which checkpoint_before_nan.pth goes back."""
        super().on_train_epoch_start()
        if self.case_store is not None and not self.disable_checkpointing:
            self.case_store.flush(self.global_step)

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """nnU-Net's; the file that ``init_from`` names is not read, and may be gone by now."""
        self._takes_weights_of_checkpoint = True
        super().load_checkpoint(filename_or_checkpoint)

    def _save(self, path: Path, *arguments: Any, **named: Any) -> None:
        store = None if self.disable_checkpointing else self.case_store
        if store is not None:
            store.flush(self.global_step)
        super()._save(path, *arguments, **named)
        # nnU-Net's --c takes one of these, and the best one only if there is no other
        names = ("checkpoint_final.pth", "checkpoint_latest.pth")
        is_continued = path.name in names or not any(path.with_name(name).is_file() for name in names)
        if store is not None and is_continued:
            # within an epoch its start is still needed, of which checkpoint_before_nan.pth is
            store.saved(self.global_step if self._partial_epoch is None else self.first_step_of_epoch)


def _versions(network: nn.Module) -> list[int]:
    """Each write to a parameter raises its number."""
    return [parameter._version for parameter in unwrap(network).parameters()]
