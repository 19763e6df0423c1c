"""The distance transforms against SciPy, value for value: squared distances are integers, so
nothing may differ.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt

from losses import distance
from losses.distance import boundary_distance_squared, separable_boundary_distance_squared

ROOT = Path(__file__).resolve().parents[2]
PATHS = [boundary_distance_squared, separable_boundary_distance_squared]
SHAPES = [(7, 7), (1, 9), (23, 4), (6, 6, 6), (3, 17, 5), (19, 1, 2), (2, 3, 24)]


def masks(shape):
    """Masks that are hard in one way each, and noise at four densities."""
    rng = np.random.default_rng(sum(shape))

    def made(*places):
        mask = np.zeros(shape, dtype=bool)
        for place in places:
            mask[place] = True
        return mask

    corner, last = (0,) * len(shape), (-1,) * len(shape)
    middle = tuple(size // 2 for size in shape)
    border = (slice(None),) * (len(shape) - 1) + (0,)
    chosen = [
        made(),
        ~made(),
        made(corner),
        made(last),
        made(middle),
        ~made(middle),
        made(corner, last),
        made(border),
    ]
    return np.stack(chosen + [rng.random(shape) < density for density in (0.02, 0.3, 0.7, 0.98)])


def scipy_field(mask):
    if mask.all() or not mask.any():
        return np.zeros(mask.shape)
    return distance_transform_edt(mask) ** 2 + distance_transform_edt(~mask) ** 2


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("path", PATHS)
def test_equals_scipy(path, shape):
    stack = masks(shape)
    field = path(torch.from_numpy(stack))
    assert field.dtype == torch.float32 and field.shape == stack.shape
    # SciPy takes a root: rounding to the integer below undoes it.
    expected = np.stack([np.rint(scipy_field(mask)) for mask in stack])
    np.testing.assert_array_equal(field.numpy(), expected)


@pytest.mark.parametrize("shape", [(40, 31), (20, 24, 17)])
def test_paths_are_bit_equal_on_blobs(shape):
    rng = torch.Generator().manual_seed(1)
    noise = torch.rand(3, 1, *shape, generator=rng)
    pool = torch.nn.functional.avg_pool2d if len(shape) == 2 else torch.nn.functional.avg_pool3d
    mask = pool(noise, 5, 1, 2)[:, 0] > 0.4
    first, second = (path(mask) for path in PATHS)
    assert first.max() > 4  # the masks are not trivial
    assert torch.equal(first, second)


@pytest.mark.parametrize("path", PATHS)
def test_far_specks_and_large_objects_equal_scipy(path):
    # Few candidate lines and planes, far from most voxels; and an object that leaves few voxels
    # outside.
    shape = (17, 40, 33)
    specks = np.zeros(shape, dtype=bool)
    specks[0, 0, 32] = specks[16, 39, 0] = specks[8, 1, 1] = True
    slabs = np.zeros(shape, dtype=bool)
    slabs[:, 5:9], slabs[3], slabs[:, :, 30] = True, True, True
    places = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"))
    # cut by the border
    ball = ((places - np.array([9, 12, 30]).reshape(3, 1, 1, 1)) ** 2).sum(0) < 81
    stack = np.stack([specks, ~specks, slabs, ~slabs, ball, ball ^ specks, ~ball])
    expected = np.stack([np.rint(scipy_field(mask)) for mask in stack])
    np.testing.assert_array_equal(path(torch.from_numpy(stack)).numpy(), expected)


@pytest.mark.parametrize("spatial", [(6, 5, 4), (7, 8)])
def test_fields_of_several_stacks_are_summed(spatial):
    stacks = [torch.from_numpy(masks(spatial)), torch.from_numpy(masks(spatial)[::-1].copy())]
    expected = sum(separable_boundary_distance_squared(stack) for stack in stacks)
    assert torch.equal(boundary_distance_squared(*stacks), expected)


@pytest.mark.parametrize("path", PATHS)
def test_hand_value(path):
    mask = torch.tensor([[[False, False, False, True, True]]])
    assert path(mask).flatten().tolist() == [9.0, 4.0, 1.0, 1.0, 4.0]


@pytest.mark.parametrize("path", PATHS)
def test_one_kind_only_is_zero_and_samples_do_not_mix(path):
    mask = torch.zeros(3, 4, 4, 4, dtype=torch.bool)
    mask[1] = True
    mask[2, 0, 0, 0] = True
    field = path(mask)
    assert (field[:2] == 0).all()
    assert field[2, 3, 3, 3] == 27 and field[2, 0, 0, 0] == 1


@pytest.mark.parametrize("path", PATHS)
def test_no_gradient_and_the_mask_is_left_alone(path):
    probs = torch.rand(2, 5, 6, requires_grad=True)
    mask = probs > 0.5
    before = mask.clone()
    assert not path(mask).requires_grad
    assert torch.equal(mask, before)


@pytest.mark.parametrize("path", PATHS)
def test_masks_need_not_be_contiguous(path):
    mask = torch.from_numpy(masks((5, 6, 7))).permute(0, 3, 1, 2)
    assert torch.equal(path(mask), path(mask.contiguous()))


def test_without_a_working_kernel_plain_torch_is_taken_and_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with pytest.warns(
        UserWarning, match="plain torch, .* it needs the package triton and a C compiler"
    ):
        assert distance._gpu_transform.__wrapped__() is distance.separable_boundary_distance_squared


def test_the_kernel_in_triton_s_interpreter():
    """Where Triton is installed; without a GPU too."""
    pytest.importorskip("triton")
    code = (
        "import torch; from losses.distance import boundary_distance_squared as expected\n"
        "from losses.distance_gpu import triton_boundary_distance_squared as found\n"
        "for spatial in ((17, 12), (13, 9, 11), (40, 5, 70), (1, 4, 3)):\n"
        "    mask = torch.rand(4, *spatial, generator=torch.Generator().manual_seed(0)) > 0.8\n"
        "    mask[0], mask[1] = True, False\n"
        "    assert torch.equal(found(mask), expected(mask)), spatial\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-2000:]
