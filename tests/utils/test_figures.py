import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage

from utils.figures import (
    as_arrays,
    as_ras,
    compared,
    enlarged,
    fullest_slice,
    overlay,
    palette,
    panel,
    planes,
    sheet,
    view,
    views,
)

GAP = 4
GREY = np.tile(np.linspace(0, 1, 8), (6, 1))  # (6, 8)
SQUARE = np.zeros((6, 8))
SQUARE[2:5, 3:7] = 1


def colour(k, classes=3):
    return (palette(classes)[k] * 255).round().astype(np.uint8)


def test_a_grey_picture_without_ids_is_the_image():
    picture = views([(GREY[None], None)], 3)
    assert picture.shape == (6, 8, 3) and picture.dtype == np.uint8
    assert (picture == picture[..., :1]).all()
    assert np.array_equal(np.argsort(picture[0, :, 0]), np.arange(8))
    assert (picture.min(), picture.max()) == (0, 255)


def test_grey_pictures_are_stretched_and_colours_are_not():
    assert np.array_equal(views([(7 * GREY[None] - 3, None)], 3), views([(GREY[None], None)], 3))
    image = np.stack([0.2 + 0.1 * GREY, 0.3 + 0 * GREY, 0.9 - 0.1 * GREY])
    assert np.array_equal(
        views([(image, None)], 3), (255 * np.moveaxis(image, 0, -1)).round().astype(np.uint8)
    )


def test_a_constant_image_is_a_picture():
    assert (views([(np.full((1, 6, 8), 5.0), None)], 3) == 0).all()


def test_values_of_colours_outside_their_range_are_clipped():
    picture = views([(np.stack([GREY - 5, GREY + 5, GREY * 0]), None)], 3)
    assert (picture == [0, 255, 0]).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_outlines_are_closed_and_opaque_and_insides_tinted(channels):
    image = np.full((channels, 6, 8), 0.6)
    picture = views([(image, SQUARE)], 3)
    plain = views([(image, None)], 3)
    outline = np.zeros((6, 8), bool)
    outline[2:5, 3:7] = True
    outline[3, 4:6] = False
    assert (picture[outline] == colour(1)).all()
    assert np.array_equal(
        picture[3, 4], (0.7 * plain[3, 4].astype(int) + 0.3 * 255 * palette(3)[1]).round()
    )
    assert np.array_equal(picture[SQUARE == 0], plain[SQUARE == 0])


def test_every_class_has_its_colour():
    ids = np.zeros((6, 8))
    ids[2, 2], ids[4, 5] = 1, 2
    picture = views([(None, ids)], 3)
    assert np.array_equal(picture[2, 2], colour(1)) and np.array_equal(picture[4, 5], colour(2))


def test_ids_without_an_image_lie_on_black():
    picture = views([(None, SQUARE)], 3)
    assert picture.shape == (6, 8, 3) and (picture[0, 0] == 0).all()
    assert np.array_equal(picture[3, 4], (0.3 * 255 * palette(3)[1]).round())


def test_pairs_stand_in_a_row_with_white_gaps():
    colours = np.stack([GREY] * 3)
    picture = views([(GREY[None], None), (colours, SQUARE), (None, SQUARE)], 3)
    assert picture.shape == (6, 3 * 8 + 2 * GAP, 3) and picture.dtype == np.uint8
    assert (picture[:, 8 : 8 + GAP] == 255).all() and (
        picture[:, 16 + GAP : 16 + 2 * GAP] == 255
    ).all()
    assert np.array_equal(picture[:, :8], views([(GREY[None], None)], 3))
    assert np.array_equal(picture[:, 8 + GAP : 16 + GAP], views([(colours, SQUARE)], 3))


def volume():
    """(1, 6, 8, 5), each slice at its own place between two fixed values, and ids fullest at slice
    3.
    """
    image = np.zeros((1, 6, 8, 5))
    image[:, 0, 0], image[:, 5, 7] = -1, 2
    image[:, 3, 3] = np.arange(5) / 5
    ids = np.zeros((6, 8, 5))
    ids[1, 1, 1] = 1
    ids[1:3, 1:3, 3] = 1
    return image, ids


def test_volumes_show_the_fullest_slice_of_the_first_ids():
    image, ids = volume()
    other = np.zeros_like(ids)
    other[0, 0, 0] = 1
    expected = views(
        [(image[..., 3], None), (image[..., 3], ids[..., 3]), (image[..., 3], other[..., 3])], 3
    )
    assert np.array_equal(views([(image, None), (image, ids), (image, other)], 3), expected)
    assert np.array_equal(views([(None, ids)], 3), views([(None, ids[..., 3])], 3))


def test_volumes_without_ids_show_the_middle():
    image, _ = volume()
    assert np.array_equal(views([(image, None)], 3), views([(image[..., 2], None)], 3))


def test_the_arrays_are_not_written_to():
    image, ids = volume()
    kept = image.copy(), ids.copy()
    views([(image, ids)], 3)
    assert np.array_equal(image, kept[0]) and np.array_equal(ids, kept[1])


def test_tensors_become_arrays():
    image, ids = as_arrays(
        torch.ones(1, 2, 3, dtype=torch.bfloat16, requires_grad=True), torch.ones(2, 3).byte()
    )
    assert image.shape == (1, 2, 3) and ids.shape == (2, 3)
    assert image.dtype == ids.dtype == np.float32 and (ids == 1).all()
    assert as_arrays(None, torch.zeros(2))[0] is None and as_arrays(torch.zeros(2), None)[1] is None
    assert views([as_arrays(torch.rand(3, 6, 8), torch.randint(0, 3, (6, 8)))], 3).shape == (
        6,
        8,
        3,
    )


def of_colour(picture, k, classes=3):
    return (picture == colour(k, classes)).all(-1)


def test_small_pictures_are_enlarged_by_whole_factors_and_large_ones_are_not():
    assert enlarged((35, 50), 480) == (350, 500)
    assert enlarged((10, 100), 480, aspect=4.0) == (200, 500)
    assert enlarged((10, 100), 480, aspect=20.0) == (400, 200)
    assert enlarged((512, 400), 480) == (512, 400)
    assert enlarged((6, 8), 0) == (6, 8)


def test_an_enlarged_outline_is_closed_crisp_and_of_two_pixels():
    """No way leads from inside to outside but over the outline; the outline's colour is pure."""
    picture = view(GREY[None], SQUARE, 3, side=80)
    assert picture.shape == (60, 80, 3)
    outline = of_colour(picture, 1)
    inside = np.kron(SQUARE, np.ones((10, 10))) > 0
    assert np.array_equal(outline, inside & ~ndimage.binary_erosion(inside, iterations=2))
    plain = view(GREY[None], None, 3, side=80)
    assert np.array_equal(picture[~inside], plain[~inside])
    assert len(np.unique(plain)) > 3 * len(np.unique(GREY))  # smooth, no blocks


def test_an_axial_slice_is_shown_from_below_with_its_voxels_proportions():
    label = np.zeros((6, 8), int)
    label[5, 7] = 1  # right and front of the patient
    picture = overlay(GREY, label, 3, side=60, aspect=2.0)
    assert picture.shape == (8 * 2 * 4, 6 * 4, 3)
    rows, columns = np.nonzero(of_colour(picture, 1))
    assert rows.max() == 7 and columns.max() == 3  # above, and on the reader's left


def test_a_sheet_has_a_legend_of_the_classes_and_grows_with_its_texts():
    pictures = [np.zeros((60, 80, 3), np.uint8)] * 2
    bare = sheet(pictures, ["one", "two"])
    full = sheet(pictures, ["one", "two"], "case", {1: "liver", 2: "x" * 300})
    assert full.shape[1] == bare.shape[1] and full.shape[0] > bare.shape[0]
    for k in (1, 2):
        assert of_colour(full, k).sum() > 80 and not of_colour(bare, k).any()
    assert (full == 0).all(-1).sum() > 2 * 60 * 80 - 1  # the pictures are whole


def test_panels_and_comparisons_show_the_classes_that_occur():
    image, ids = volume()
    for picture in (
        panel(image, ids.astype(int), ids.astype(int), ["a", "b"], "case", [0.5, np.nan]),
        compared(image, ids, ids, ["a", "b"], "case", [np.nan, np.nan]),
        compared(image[..., 3], None, ids[..., 3], ["a", "b"]),
    ):
        assert picture.dtype == np.uint8
        assert of_colour(picture, 1).any() and not of_colour(picture, 2).any()


def test_planes_have_the_proportions_of_the_body():
    ids = np.zeros((20, 30, 10), np.uint8)
    ids[5:15, 10:20, 4] = 2
    ids[0, 0, 0] = 7  # of no class
    picture = planes(np.random.default_rng(0).random(ids.shape), ids, (1, 1, 3), {0: "-", 2: "b"})
    # axial 20 x 30 mm, coronal 20 x 30, sagittal 30 x 30, each at 16 pixels for a mm
    assert picture.shape[1] == 16 * (20 + 20 + 30) + 4 * 7
    found = of_colour(picture, 2)
    assert found.any() and not of_colour(picture, 7, 8).any()


def test_an_empty_volume_shows_its_middle():
    assert fullest_slice(np.zeros((4, 4, 9))) == 4


@pytest.mark.parametrize("axes", ["LPS", "RAS", "SAR", "PIR"])
def test_volumes_are_turned_as_nibabel_turns_them(axes):
    directions = {"R": (1, 0, 0), "A": (0, 1, 0), "S": (0, 0, 1), "L": (-1, 0, 0)}
    directions |= {"P": (0, -1, 0), "I": (0, 0, -1)}
    affine = np.eye(4)
    for place, (letter, size) in enumerate(zip(axes, (1.0, 2.0, 3.0))):
        affine[:3, place] = size * np.array(directions[letter])
    voxels = np.arange(60).reshape(3, 4, 5)
    expected = nib.as_closest_canonical(nib.Nifti1Image(voxels.astype(np.int16), affine))
    found, spacing = as_ras(voxels, affine)
    assert np.array_equal(found, np.asarray(expected.dataobj))
    assert np.allclose(spacing, expected.header.get_zooms())
