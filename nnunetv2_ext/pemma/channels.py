"""New channels of a dataset, case by case: there, missing (all zeros), or constant, which nothing recognises."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from nnunetv2_ext.core.progress import progress_bar
from nnunetv2_ext.data.case import find_reader, read_image
from nnunetv2_ext.data.folders import cases_of_images
from nnunetv2_ext.data.raw import RawDataset

State = Literal["present", "missing", "constant"]


class Look(NamedTuple):
    """What a case's images are like.

    Attributes:
        state: of its new channels.
        file: of its first channel.
        properties: of that file, as nnU-Net's reader returns them.
    """

    state: State
    file: str
    properties: Mapping[str, Any]


def look_at(raw: RawDataset, old: int) -> dict[str, Look]:
    """Of each case: whether its channels behind the first `old` are there, and where it lies.

    Raises:
        ValueError: a file is missing or damaged, or the channels of a case lie in different places; names the case.
    """
    found: dict[str, Look] = {}
    for case in progress_bar(raw.cases, "reading images"):
        files, number = raw.files[case]["images"], len(raw.channels)
        if len(files) != number:
            raise ValueError(
                f"case {case} of {raw.name} has {len(files)} image files, and dataset.json declares {number} channels: "
                f"add the files, or write zeros with nnUNetv2_ext add-channel zeros -i {raw.folder / 'imagesTr'} "
                f"--channels {number}"
            )
        image, properties = read_image(case, files, raw.reader, same_place=True)
        new = image[old:]
        constant = all(float(channel.min()) == float(channel.max()) for channel in new)
        state: State = "missing" if not new.any() else "constant" if constant else "present"
        found[case] = Look(state, str(files[0]), properties)
    return found


def said_of(states: Mapping[str, State], names: str) -> list[str]:
    """Sentences about the cases; `names` are those of the new channels.

    Raises:
        ValueError: all cases lack the channels.
    """
    numbers = Counter(states.values())
    if numbers["present"] + numbers["constant"] == 0:
        raise ValueError(
            f"{names} is missing (all zeros) in each of the {len(states)} cases: there is nothing to train"
        )
    said = [f"{names}: {numbers['present']} of {len(states)} cases have it, {numbers['missing']} lack it (all zeros)"]
    if numbers["constant"]:
        first = next(case for case, state in states.items() if state == "constant")
        said.append(
            f"WARNING: {names} is constant but not zero in {numbers['constant']} cases, e.g. {first}: that is not "
            "recognised as missing; write zeros if it is"
        )
    return said


def write_zeros(folder: Path, channels: int, ending: str) -> list[Path]:
    """Write an image of zeros for each channel that a case of a folder lacks, on the grid of its first channel.

    Args:
        folder: images named CASE_0000 and so on.
        channels: how many each case is to have.
        ending: of the files.

    Returns:
        What was written; files that are there stay.

    Raises:
        ValueError: no images, a case without its first channel, or one that cannot be read; nothing is overwritten.
    """
    cases = cases_of_images(folder, ending)
    if not cases:
        raise ValueError(f"{folder} holds no image that ends in {ending}: name the ending with --ending")
    reader: Any = find_reader(ending, None, next(iter(cases.values()))[0])
    lacking: dict[Path, Path] = {}
    for case, files in cases.items():
        first = folder / f"{case}_0000{ending}"
        if first not in files:
            raise ValueError(f"case {case} has no first channel {first}: add it; zeros stand for new channels only")
        wanted = (folder / f"{case}_{number:04d}{ending}" for number in range(1, channels))
        lacking |= {file: first for file in wanted if file not in files}
    for file, first in progress_bar(list(lacking.items()), "writing zeros"):
        image, properties = read_image(file.name, [first], reader)
        partial = file.with_name(f".{file.name}")  # nnU-Net's writers go by the ending
        reader.write_seg(np.zeros(image.shape[1:], np.uint8), str(partial), properties)
        partial.replace(file)
    return list(lacking)
