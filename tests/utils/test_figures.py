import numpy as np
import pytest
import torch

from utils.figures import as_arrays, palette, views

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
