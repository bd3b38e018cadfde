"""Drawing the bank's content from the preprocessed training cases."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor

from nnunetv2_ext.data.patches import corner_around, corner_range, cut_patch
from nnunetv2_ext.jras.bank import IGNORED


class BankContent(NamedTuple):
    """N guides, ordered by case.

    Attributes:
        images, labels: ``(N, C, *P)`` fp32, normalised; ``(N, *P)`` uint8, 255 = not annotated.
        cases: of the guides.
    """

    images: Tensor
    labels: Tensor
    cases: tuple[str, ...]


class _Case(NamedTuple):
    """What a case offers: shape, classes (or regions), and with an ignore label the key of its annotated voxels."""

    name: str
    shape: tuple[int, ...]
    classes: tuple[Any, ...]
    annotated: Any = None


def group_ids(cases: Sequence[str], key: bytes, subjects: Mapping[str, str] | None = None) -> Tensor:
    """The number of each case's subject, int64 ``(len(cases),)`` on the CPU: 8 bytes of keyed BLAKE2b.

    Without the key, 16 random bytes that stay out of the weights, a published model does not tell whether a given case
    was in it. Cases of one subject never guide each other; without ``subjects`` each case is its own.
    """
    names = ((subjects or {}).get(case, case).encode() for case in cases)
    digests = b"".join(hashlib.blake2b(name, digest_size=8, key=key).digest() for name in names)
    return torch.from_numpy(np.frombuffer(digests, "<i8").astype(np.int64))


def draw_bank(
    dataset: Any,
    cases: Sequence[str],
    patch_size: Sequence[int],
    bank_size: int,
    fg_share: float,
    label_manager: LabelManager,
    seed: int,
) -> BankContent:
    """Draw the guides: the same for the same arguments, in every process; no global random state is touched.

    ``bank_size`` patches are spread evenly over the cases (more cases than that: one each of a random part of them);
    of equal ones one is kept. A
    share ``fg_share`` is centred on a foreground voxel, all classes equally often as far as the cases have them; the
    others lie anywhere, or with an ignore label around an annotated voxel. Patches are moved inwards at the image's
    border, and reach outside only where the image is smaller.

    Args:
        cases: no other case is read.
        patch_size: P; 2d configurations draw slices along the first axis.

    Raises:
        ValueError: nothing is annotated, or an image is not finite.
    """
    names = sorted(set(cases))
    rng = np.random.default_rng(seed)
    offers = [_inspect(dataset, name, label_manager) for name in names]
    offers = [offer for offer in offers if offer.annotated is not None or not label_manager.has_ignore_label]
    if not offers:
        raise ValueError(
            f"none of the {len(names)} case(s) for the guide bank has an annotated voxel; check the labels"
        )
    each, rest = divmod(bank_size, len(offers))
    one_more = set(rng.permutation(len(offers))[:rest].tolist())
    entries = [offer for i, offer in enumerate(offers) for _ in range(each + (i in one_more))]  # one per guide
    wanted = _assign_classes(entries, fg_share, rng)
    images, labels, kept, taken = [], [], [], set()
    opened: tuple[str, Any] = ("", None)  # a case is opened once
    for entry, chosen in zip(entries, wanted):
        if opened[0] != entry.name:
            opened = (entry.name, dataset.load_case(entry.name))
        data, seg, _, properties = opened[1]
        if (key := entry.annotated if chosen is None else chosen) is None:
            corner = tuple(int(rng.integers(low, high + 1)) for low, high in corner_range(entry.shape, patch_size))
        else:
            voxels = properties["class_locations"][key]
            channel_and_voxel = voxels[rng.integers(len(voxels))]
            corner = corner_around(channel_and_voxel[1:], entry.shape, patch_size)
        if (entry.name, corner) in taken:  # a second one would only take another guide's place
            continue
        taken.add((entry.name, corner))
        kept.append(entry.name)
        image, label = cut_patch(data, seg, corner, patch_size)
        images.append(image)
        if not torch.isfinite(images[-1]).all():
            raise ValueError(
                f"the preprocessed image of case {entry.name} holds values that are not finite; check the raw image "
                "and preprocess again"
            )
        if label_manager.has_ignore_label:
            label[label == label_manager.ignore_label] = IGNORED
        labels.append(label.clamp(min=0).to(torch.uint8))
    return BankContent(torch.stack(images), torch.stack(labels), tuple(kept))


def _inspect(dataset: Any, name: str, label_manager: LabelManager) -> _Case:
    data, _, _, properties = dataset.load_case(name)
    locations = properties["class_locations"]
    found = [key for key in locations if len(locations[key])]
    # the key that starts with -1 stands for every annotated voxel, background included; written with an ignore label
    annotated = next((key for key in found if isinstance(key, tuple) and key[0] == -1), None)
    classes = tuple(key for key in found if key != annotated)
    return _Case(name, tuple(data.shape[1:]), classes, annotated if label_manager.has_ignore_label else None)


def _assign_classes(entries: list[_Case], fg_share: float, rng: np.random.Generator) -> list[Any]:
    """Per entry the class (or region) to centre on, or None."""
    # how many entries of the same case come before
    turn = [n for _, same in groupby(entries, attrgetter("name")) for n, _ in enumerate(same)]
    shuffled = rng.permutation(len(entries)).tolist()
    # round robin over the cases that have foreground, so that no case is all foreground while another has none
    eligible = sorted((i for i in shuffled if entries[i].classes), key=lambda i: turn[i])
    chosen = eligible[: round(fg_share * len(entries))]
    counts = Counter[Any]()
    result: list[Any] = [None] * len(entries)
    # cases with little choice first, the others then make up for what is missing
    for i in sorted(chosen, key=lambda i: len(entries[i].classes)):
        fewest = min(counts[key] for key in entries[i].classes)
        rarest = [key for key in entries[i].classes if counts[key] == fewest]
        result[i] = rarest[rng.integers(len(rarest))]
        counts[result[i]] += 1
    return result
