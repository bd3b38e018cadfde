"""Contrast-limited adaptive histogram equalisation (CLAHE) of photographs, and a blank surround.

CLAHE as in scikit-image, with the range of lightness kept: its own function stretches every image to its own minimum
and maximum first. The result is not identical to OpenCV's.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from skimage import color, exposure

Array = npt.NDArray[Any]
_DARK = 20 / 255  # no brighter: outside the field of view. Source: ours
_BINS = 256


@dataclass(frozen=True)
class Enhancement:
    """What is done to an image.

    Attributes:
        clahe: ``L`` of CIELAB of RGB images (arXiv 2504.17306), ``grey`` of one channel, ``off``.
        clip: contrast limit, in OpenCV's unit: times the height of a flat histogram.
        grid: tiles along each axis.
        blank_outside: set everything outside the field of view to 0, which nnU-Net then crops away and puts back.
    """

    clahe: Literal["L", "grey", "off"] = "L"
    clip: float = 2.0
    grid: int = 8
    blank_outside: bool = True

    def __post_init__(self) -> None:
        if self.clahe not in ("L", "grey", "off") or not 0 < self.clip <= _BINS or not 1 <= self.grid <= 64:
            raise ValueError(
                f"--clahe is L, grey or off, --clip above 0 and up to {_BINS}, --grid 1 to 64; got {asdict(self)}"
            )

    def apply(self, image: Array) -> Array:
        """The enhanced image, of the same shape and type; pixels outside the field of view are 0 or as they were.

        Args:
            image: ``(H, W, 3)`` uint8; with ``grey``, or with ``off``, also ``(H, W)`` uint8 or uint16.

        Raises:
            ValueError: another shape or type, or no pixel that is brighter than 20 of 255.
        """
        _require(image, self.clahe)
        inside = field_of_view(image)
        enhanced = image
        if self.clahe == "L":
            enhanced = _of_lightness(image, self)
        elif self.clahe == "grey":
            top = np.iinfo(image.dtype).max
            enhanced = np.round(top * self._clahe(image / top)).astype(image.dtype)
        shown = inside if image.ndim == 2 else inside[..., None]
        return np.where(shown, enhanced, 0 if self.blank_outside else image).astype(image.dtype)

    def _clahe(self, values: Array) -> Array:
        """Of ``(H, W)`` values, with their minimum and maximum kept."""
        low, high = float(values.min()), float(values.max())
        if high - low < 1e-6:
            return values
        tiles = [math.ceil(n / self.grid) for n in values.shape]
        flat = exposure.equalize_adapthist((values - low) / (high - low), tiles, self.clip / _BINS, _BINS)
        return low + (high - low) * np.asarray(flat)


def _of_lightness(image: Array, enhancement: Enhancement) -> Array:
    lab = color.rgb2lab(image)
    lab[..., 0] = 100 * enhancement._clahe(lab[..., 0] / 100)
    return np.round(255 * np.clip(color.lab2rgb(lab), 0, 1)).astype(np.uint8)


def field_of_view(image: Array) -> npt.NDArray[np.bool_]:
    """``(H, W)``: the largest connected part that is brighter than 20 of 255 in any channel, its holes filled.

    Raises:
        ValueError: no pixel is that bright.
    """
    bright = (image if image.ndim == 2 else image.max(2)) > _DARK * np.iinfo(image.dtype).max
    parts, number = ndimage.label(bright)
    if number == 0:
        raise ValueError("no pixel is brighter than 20 of 255; is this a photograph?")
    largest = 1 + int(np.argmax(np.bincount(parts.ravel())[1:]))
    return np.asarray(ndimage.binary_fill_holes(parts == largest))


def _require(image: Array, clahe: str) -> None:
    rgb = image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8
    grey = image.ndim == 2 and image.dtype in (np.uint8, np.uint16)
    if (clahe == "L" and not rgb) or (clahe == "grey" and not grey) or not (rgb or grey):
        wanted = {"L": "RGB of 8 bits", "grey": "one channel of 8 or 16 bits"}.get(
            clahe, "RGB of 8 bits or one channel"
        )
        raise ValueError(
            f"it has shape {image.shape} and type {image.dtype}, --clahe {clahe} needs {wanted}: convert the image "
            "(an alpha channel or CMYK has four channels)"
        )
