"""The probability of error of each voxel as a NIfTI file that lies on the image."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt
import SimpleITK as sitk

Array = npt.NDArray[Any]


def write_map(error: Array, properties: Mapping[str, Any], file: Path) -> None:
    """Write ``(X, Y, Z)`` in the array order of nnU-Net's reader, rounded to 0.001.

    Args:
        error: probabilities.
        properties: of the label, as the reader returns them; without directions (photographs) the file has none.
        file: ends in .nii.gz; replaced when it is complete.
    """
    content = np.round(error, 3).astype(np.float32)
    temporary = file.with_name(f".{file.name}")  # keeps its ending, by which both libraries choose the format
    if (stuff := properties.get("nibabel_stuff")) is not None:
        affine = np.asarray(stuff.get("reoriented_affine", stuff["original_affine"]))
        nibabel.save(nibabel.Nifti1Image(content.transpose(2, 1, 0), affine), temporary)
    else:
        stuff = properties.get("sitk_stuff")
        flat = stuff is not None and len(stuff["spacing"]) == 2
        image = sitk.GetImageFromArray(content[0] if flat else content)
        if stuff is not None:
            image.SetSpacing(stuff["spacing"])
            image.SetOrigin(stuff["origin"])
            image.SetDirection(stuff["direction"])
        sitk.WriteImage(image, str(temporary), useCompression=True)
    temporary.replace(file)


def read_map(file: Path) -> Array:
    """What `write_map` wrote, ``(X, Y, Z)`` in the reader's array order."""
    content = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
    return content[None] if content.ndim == 2 else content
