"""Of run_model.py: resampling as MONAI's Spacing does it, then intensities, then the crop."""

import itertools
import sys

import nibabel as nib
import numpy as np
from run_model import normalized
from scipy import ndimage


def resampled(image, affine, spacing):
    """Image (C, H, W, D) on axes of `spacing` mm, linearly between voxels, and its affine."""
    axes, shape, new = affine[:3, :3], np.array(image.shape[1:]), np.eye(4)
    own = np.sqrt((axes * axes).sum(0))
    spacing = np.where(abs(own - spacing) <= 1e-3, own, spacing)
    new[:3, :3] = axes @ np.linalg.inv(np.linalg.cholesky(axes.T @ axes).T) @ np.diag(spacing)
    corners = np.array([*itertools.product(*zip((0, 0, 0), shape - 1), [1])]).T
    places = (np.linalg.solve(new, affine) @ corners)[:3].T
    size = np.round(np.ptp(places, axis=0) + 1).astype(int)
    new[:3, 3] = axes @ (shape / 2) + affine[:3, 3] - new[:3, :3] @ (size / 2)
    lowest = [np.allclose((places - one).min(0), 0, rtol=1e-3) for one in places]
    if any(lowest):  # else, of oblique axes that are rounded, the middles meet
        new[:3, 3] = (affine @ corners)[:3, lowest.index(True)]
    to = np.linalg.solve(affine, new)
    same = np.allclose(affine, new, atol=1e-3) or np.allclose(to, np.eye(4), atol=1e-3)
    if same and (size == shape).all():
        return image, affine
    grid = {"offset": to[:3, 3], "output_shape": tuple(size), "order": 1, "mode": "nearest"}
    image = [ndimage.affine_transform(c.astype(float), to[:3, :3], **grid) for c in image]
    return np.stack(image).astype(np.float32), affine @ to


def prepared(image, affine, steps):
    """Image and affine as the network was trained on them."""
    if steps["spacing"]:
        image, affine = resampled(image, affine, steps["spacing"])
    image = np.stack([normalized(*one) for one in zip(image, steps["channels"])])
    inside = (image > 0).any(0) | (not steps["crop"])
    box = ndimage.find_objects(inside.astype(int)) or sys.exit("error: no voxel above 0 is left")
    start = nib.affines.from_matvec(np.eye(3), [side.start for side in box[0]])
    return image[:, *box[0]], affine @ start
