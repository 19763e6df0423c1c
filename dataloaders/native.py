"""Predictions back on the grid of the file they were made from."""

from collections.abc import Sequence

import numpy as np
from scipy.ndimage import affine_transform


def to_native(
    prediction: np.ndarray,
    affine: np.ndarray,
    native_affine: np.ndarray,
    native_shape: Sequence[int],
) -> np.ndarray:
    """Resample (H, W, D) ids by nearest neighbour from the grid of `affine` to the native grid; 0
    outside.

    Both grids are placed by their voxel-to-world affines, so reorientation, resampling and cropping
    are all undone.
    """
    to_source = np.linalg.inv(np.asarray(affine, float)) @ np.asarray(native_affine, float)
    # Half a voxel beyond the outermost centres still belongs to the grid: 'grid-constant' alone
    # would drop it.
    padded = np.pad(prediction, 1, mode="edge")
    result = affine_transform(
        padded,
        to_source[:3, :3],
        to_source[:3, 3] + 1,
        output_shape=tuple(native_shape),
        order=0,
        mode="constant",
    )
    # Whatever lies more than half a voxel outside the grid was cropped away: background. Plane by
    # plane, since the coordinates of a large scan's voxels would take many times the memory of its
    # ids.
    _, y, z = np.ogrid[:1, : native_shape[1], : native_shape[2]]
    for x, plane in enumerate(result):
        for axis, size in enumerate(prediction.shape):
            terms = to_source[axis]
            coordinate = terms[0] * x + terms[1] * y[0] + terms[2] * z[0] + terms[3]
            plane *= (coordinate >= -0.5 - 1e-6) & (coordinate <= size - 0.5 + 1e-6)
    return result
