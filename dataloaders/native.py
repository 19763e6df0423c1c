"""Predictions back on the grid of the file they were made from."""

from collections.abc import Sequence

import numpy as np
from scipy.ndimage import affine_transform


def to_native(
    prediction: np.ndarray, affine: np.ndarray, native_affine: np.ndarray, native_shape: Sequence[int]
) -> np.ndarray:
    """Resample (H, W, D) ids by nearest neighbour from the grid of `affine` to the native grid; 0 outside.

    Both grids are placed by their voxel-to-world affines, so reorientation, resampling and cropping are all undone.
    """
    to_source = np.linalg.inv(np.asarray(affine, float)) @ np.asarray(native_affine, float)
    # Half a voxel beyond the outermost centres still belongs to the grid: 'grid-constant' alone would drop it.
    padded = np.pad(prediction, 1, mode="edge")
    result = affine_transform(
        padded, to_source[:3, :3], to_source[:3, 3] + 1, output_shape=tuple(native_shape), order=0, mode="constant"
    )
    # Whatever lies more than half a voxel outside the grid was cropped away: background.
    corners = [np.arange(n) for n in native_shape]
    for axis in range(3):
        coordinate = sum(
            to_source[axis, k] * corners[k].reshape([-1 if j == k else 1 for j in range(3)]) for k in range(3)
        ) + to_source[axis, 3]
        result *= (coordinate >= -0.5 - 1e-6) & (coordinate <= prediction.shape[axis] - 0.5 + 1e-6)
    return result
