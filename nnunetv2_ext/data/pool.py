"""The pool of a dataset: unlabelled cases, preprocessed as its labelled ones, that every method may train on.

It lies in ``nnUNet_preprocessed/DATASET/nnunetv2_ext/unlabelled/DATA_IDENTIFIER``: ``cases/`` as nnU-Net preprocesses
them, without ``class_locations``, and a manifest. Nothing lies in the folder of the configuration, where an unknown
file would end every training.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunetv2_ext.core.files import atomic_write_text, read_json
from nnunetv2_ext.data.preprocessed import plans_key

FORMAT = 1


@dataclass(frozen=True)
class PoolCase:
    """Where a case of the pool comes from."""

    files: tuple[str, ...]  # its images, absolute paths
    sha256: tuple[str, ...]  # of their content, unpacked
    shape: tuple[int, ...]  # after preprocessing, (X, Y, Z)


@dataclass
class Pool:
    """A pool's manifest.

    Attributes:
        folder: of the data identifier.
        key: hash of what the preprocessed files depend on (`preprocessing_key`).
        configuration: that it was made for.
        cases: by id.
        subjects: of these cases and of the labelled ones, where they are known.
        wanted: number of cases that the last run was to make; more than there are after an interruption.
    """

    folder: Path
    key: str
    configuration: str
    cases: dict[str, PoolCase] = field(default_factory=dict)
    subjects: dict[str, str] | None = None
    wanted: int = 0

    @property
    def data_folder(self) -> Path:
        """Of the preprocessed cases."""
        return self.folder / "cases"

    @property
    def manifest(self) -> Path:
        return self.folder / "manifest.json"

    def write(self) -> None:
        """Write the manifest; ValueError on a full disk."""
        content = {
            "format": FORMAT,
            "key": self.key,
            "configuration": self.configuration,
            "wanted": self.wanted,
            "subjects": self.subjects,
            "cases": {name: vars(case) for name, case in sorted(self.cases.items())},
        }
        try:
            atomic_write_text(self.manifest, json.dumps(content, indent=1) + "\n")
        except OSError as error:
            raise ValueError(
                f"{self.manifest} cannot be written ({error.strerror}): look at the free space there, and run the same "
                "command again, which goes on"
            ) from error


def pools_folder(base: Path) -> Path:
    """Where the pools of a preprocessed dataset lie, one for each data identifier."""
    return base / "nnunetv2_ext" / "unlabelled"


def preprocessing_key(plans: PlansManager, configuration: ConfigurationManager) -> str:
    """Hash of all in the plans that decides how a case is preprocessed, CT's intensities included."""
    of_files = {**plans_key("", configuration.configuration), "transpose": list(plans.transpose_forward)}
    of_files["intensities"] = plans.foreground_intensity_properties_per_channel
    return hashlib.sha256(json.dumps(of_files, sort_keys=True).encode()).hexdigest()


def read_pool(folder: Path) -> Pool | None:
    """What a manifest says; None without one.

    Raises:
        ValueError: it is damaged.
    """
    file = folder / "manifest.json"
    if not file.is_file():
        return None
    content = read_json(file)
    try:
        cases = {name: PoolCase(*(tuple(case[k]) for k in PoolCase.__match_args__))
                 for name, case in content["cases"].items()}  # fmt: skip
        return Pool(folder, content["key"], content["configuration"], cases, content["subjects"], content["wanted"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged ({type(error).__name__}: {error}): remove {folder}, and run "
                         "nnUNetv2_ext unlabelled again") from error  # fmt: skip


def open_pool(base: Path, plans: PlansManager, configuration: ConfigurationManager, configuration_name: str) -> Pool:
    """The pool of a preprocessed dataset for these plans and configuration.

    Raises:
        ValueError: there is none, it is of other plans, is empty, lacks files, or was interrupted; says what to run.
    """
    folder = pools_folder(base) / configuration.data_identifier
    options = f"-d {base.name[7:10]} -c {configuration_name} -p {plans.plans_name}"
    command = f"nnUNetv2_ext unlabelled {options} -i FOLDER"
    pool = read_pool(folder)
    if pool is None or not pool.cases:
        raise ValueError(f"{base.name} has no unlabelled cases for {configuration_name}: run {command}")
    require_key(pool, plans, configuration)
    if pool.wanted > len(pool.cases):
        raise ValueError(
            f"the pool {folder} was interrupted after {len(pool.cases)} of {pool.wanted} cases: run {command} again"
        )
    if missing := [case for case in pool.cases if not (pool.data_folder / f"{case}.pkl").is_file()]:
        raise ValueError(f"the pool {folder} lacks files of case {missing[0]}: run {command} again")
    return pool


def require_key(pool: Pool, plans: PlansManager, configuration: ConfigurationManager) -> None:
    """Raise ValueError if a pool was made with plans under which its files would look different."""
    if pool.key != preprocessing_key(plans, configuration):
        raise ValueError(
            f"the pool {pool.folder} was preprocessed with other plans than {plans.plans_name} are now: remove that "
            "folder, and run nnUNetv2_ext unlabelled again"
        )
