"""Which way up: against volumes whose voxels say where in the patient they lie."""

import itertools

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunetv2_ext.core.orientation import directions_of, view_across

# what a radiologist expects: left, right, top, bottom
PAGES = {"axial": ("R", "L", "A", "P"), "coronal": ("R", "L", "S", "I"), "sagittal": ("A", "P", "S", "I")}
# every order and sign of the patient's axes
ORIENTATIONS = [
    "".join(letters[sign] for letters, sign in zip(order, signs, strict=True))
    for order in itertools.permutations(("RL", "AP", "SI"))
    for signs in itertools.product((0, 1), repeat=3)
]


def places(lps: np.ndarray) -> dict[str, np.ndarray]:
    """How far voxels at these positions, (..., 3) in LPS, lie towards each letter."""
    left, back, head = np.moveaxis(lps, -1, 0)
    return {"L": left, "R": -left, "P": back, "A": -back, "S": head, "I": -head}


def positions(image: sitk.Image) -> np.ndarray:
    """Of each voxel in LPS, (Z, Y, X, 3), asked of SimpleITK one by one."""
    shape = image.GetSize()[::-1]
    found = np.empty((*shape, 3))
    for index in np.ndindex(*shape):
        found[index] = image.TransformIndexToPhysicalPoint(tuple(int(i) for i in index[::-1]))
    return found


@pytest.fixture
def scan():
    """A function: a small scan of an orientation ("LPS": x grows to the left, ...), or of a direction matrix."""

    def make(orientation):
        image = sitk.GetImageFromArray(np.zeros((3, 4, 5), dtype=np.float32))
        if isinstance(orientation, str):
            image.SetDirection(sitk.DICOMOrientImageFilter.GetDirectionCosinesFromOrientation(orientation))
        else:
            image.SetDirection(np.asarray(orientation, dtype=float).ravel().tolist())
        image.SetSpacing((0.5, 1.0, 3.0))
        return image

    return make


@pytest.mark.parametrize(
    ("orientation", "reader"),
    [(o, SimpleITKIO) for o in ORIENTATIONS]
    + [(o, reader) for o in ORIENTATIONS[::7] for reader in (NibabelIO, NibabelIOWithReorient)],
)
def test_each_slice_stands_as_a_radiologist_expects(scan, tmp_path, orientation, reader):
    """Read from the file by nnU-Net's readers; the intensity of each of three images is a coordinate of the voxel."""
    image = scan(orientation)
    coordinates = []
    for part in range(3):
        shown = sitk.GetImageFromArray(positions(image)[..., part].astype(np.float32))
        shown.CopyInformation(image)
        sitk.WriteImage(shown, str(tmp_path / f"{part}.nii.gz"))
        volume, properties = reader().read_images([str(tmp_path / f"{part}.nii.gz")])
        coordinates.append(volume[0])
    lps = np.stack(coordinates, -1)
    names = set()
    for axis in range(3):
        view = view_across(axis, directions_of(properties))
        assert view.letters == PAGES[view.name]
        names.add(view.name)
        # (rows, columns, 3)
        page = np.stack([view.cut(lps[..., part], 1) for part in range(3)], -1)
        left, right, top, bottom = view.letters
        assert (np.diff(places(page)[right], axis=1) > 0).all() and (np.diff(places(page)[left], axis=1) < 0).all()
        assert (np.diff(places(page)[bottom], axis=0) > 0).all() and (np.diff(places(page)[top], axis=0) < 0).all()
        rows, columns = view.spacing(properties["spacing"])
        assert np.allclose(np.linalg.norm(np.diff(page, axis=0), axis=-1), rows)
        assert np.allclose(np.linalg.norm(np.diff(page, axis=1), axis=-1), columns)
    assert names == set(PAGES)


@pytest.mark.parametrize("transpose", list(itertools.permutations(range(3))))
def test_a_preprocessed_array_is_drawn_as_the_file(scan, transpose):
    image = scan("LAS")
    properties = {"sitk_stuff": {"direction": image.GetDirection()}}
    volume = np.arange(60).reshape(3, 4, 5)
    here = view_across(0, directions_of(properties))
    there = view_across(transpose.index(0), directions_of(properties, transpose))
    assert here.letters == there.letters and here.name == there.name == "axial"
    assert np.array_equal(here.cut(volume, 1), there.cut(volume.transpose(transpose), 1))
    mm = (3.0, 1.0, 0.5)
    assert here.spacing(mm) == there.spacing([mm[a] for a in transpose]) == (1.0, 0.5)


def test_an_oblique_scan_is_called_so_and_its_letters_name_every_large_part(scan):
    half = np.sqrt(0.5)
    # x grows to the left, y to back and head alike, z to head and front alike
    oblique = np.array([[1, 0, 0], [0, half, -half], [0, half, half]])
    view = view_across(0, directions_of({"sitk_stuff": {"direction": oblique.ravel()}}))
    assert view.name.startswith("oblique")
    assert view.letters[:2] == ("R", "L") and {frozenset(letters) for letters in view.letters[2:]} == {
        frozenset("AI"),
        frozenset("PS"),
    }
    for degrees, letters in ((20, ("R", "L", "A", "P")), (30, ("R", "L", "AI", "PS"))):
        c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        tilted = np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
        view = view_across(0, directions_of({"sitk_stuff": {"direction": tilted.ravel()}}))
        assert view.letters == letters and (view.name == "axial") == (degrees == 20)


def test_an_augmented_patch_has_no_letters_and_says_so(scan):
    directions = directions_of({"sitk_stuff": {"direction": scan("RAS").GetDirection()}})
    known, patch = view_across(0, directions), view_across(0, directions, augmented=True)
    assert patch.letters is None and patch.caption(2) == "augmented patch, axis 0, slice 2"
    assert patch.flipped == known.flipped == (1, 2)
    assert view_across(None, directions, augmented=True).caption(None) == "augmented patch"


def test_without_directions_a_photograph_is_drawn_as_it_is_and_a_volume_with_the_last_slices_on_top():
    picture, volume = np.arange(6).reshape(2, 3), np.arange(24).reshape(2, 3, 4)
    assert np.array_equal(view_across(None).cut(picture), picture)
    assert view_across(None).spacing((2.0, 1.0)) == (2.0, 1.0)
    assert np.array_equal(view_across(0).cut(volume, 1), volume[1])
    assert np.array_equal(view_across(1).cut(volume, 2), volume[::-1, 2])
    view = view_across(2)
    assert np.array_equal(view.cut(volume, 3), volume[::-1, :, 3])
    assert view.letters is None and view.caption(3) == "axis 2, slice 3"


@pytest.mark.parametrize("orientation", ["LPS", "RAS", "PSR"])
def test_a_2d_patch_is_a_slice_across_axis_0(scan, orientation):
    directions = directions_of({"sitk_stuff": {"direction": scan(orientation).GetDirection()}})
    volume = np.arange(60).reshape(3, 4, 5)
    whole, patch = view_across(0, directions), view_across(None, directions)
    assert np.array_equal(whole.cut(volume, 2), patch.cut(volume[2]))
    assert patch.letters == whole.letters and patch.spacing((1.0, 0.5)) == whole.spacing((3.0, 1.0, 0.5))


@pytest.mark.parametrize("orientation", ORIENTATIONS[::5])
def test_the_place_of_a_slice_on_the_page(scan, orientation):
    directions = directions_of({"sitk_stuff": {"direction": scan(orientation).GetDirection()}})
    for axis in range(3):
        view = view_across(axis, directions)
        for other in {0, 1, 2} - {axis}:
            volume = np.zeros((3, 4, 5))
            np.moveaxis(volume, other, 0)[1] = 1
            page = view.cut(volume, 1)
            drawn = page.all(1) if other == view.rows else page.all(0)
            assert np.flatnonzero(drawn).tolist() == [view.position(other, 1, volume.shape[other])]


@pytest.mark.parametrize(
    "properties",
    [
        {"spacing": (1, 1, 1)},
        {"sitk_stuff": {"direction": (1.0, 0.0, 0.0, 1.0)}},
        {"sitk_stuff": {"direction": (0.0,) * 9}},
        {"sitk_stuff": {"direction": (1.0, 0, 0, 1.0, 0, 0, 0, 0, 1.0)}},
        {"nibabel_stuff": {"original_affine": np.full((4, 4), np.nan)}},
    ],
    ids=["none", "2-D", "zero", "singular", "nan"],
)
def test_directions_that_are_missing_or_senseless_are_not_known(properties):
    assert directions_of(properties) is None


def test_channels_in_one_4d_file(scan, tmp_path):
    one = scan("LAS")
    sitk.WriteImage(sitk.JoinSeries([one, one]), str(tmp_path / "four.nii.gz"))
    volume, properties = SimpleITKIO().read_images([str(tmp_path / "four.nii.gz")])
    assert volume.shape == (2, 3, 4, 5)
    expected = directions_of({"sitk_stuff": {"direction": one.GetDirection()}})
    assert np.allclose(directions_of(properties), expected)
    assert nibabel.load(tmp_path / "four.nii.gz").ndim == 4
