"""Of run_model.py: preparation as nnU-Net does it: crop, intensities, then cubic splines."""

import nibabel as nib
import numpy as np
from run_model import normalized
from scipy import ndimage


def resampled(channel, shape, apart=None):
    """Channel (H, W, D) of `shape` voxels, by splines; along the axis `apart` the nearest slice."""
    if channel.shape == shape:
        return channel
    if apart is None:
        grid = {"order": 3, "mode": "nearest", "grid_mode": True}
        wide = ndimage.zoom(channel.astype(np.float64), np.divide(shape, channel.shape), **grid)
        return np.clip(wide, channel.min(), channel.max())
    plane = tuple(side for axis, side in enumerate(shape) if axis != apart)
    rows = np.stack([resampled(row, plane) for row in np.moveaxis(channel, apart, 0)])
    place = len(rows) / shape[apart] * (np.arange(shape[apart]) + 0.5) - 0.5
    nearest = np.clip(np.floor(place + 0.5).astype(int), 0, len(rows) - 1)
    return np.moveaxis(rows[nearest], 0, apart)


def prepared(image, affine, steps):
    """Image and affine as the network was trained on them."""
    mask = ndimage.binary_fill_holes((image != 0).any(0))
    if not mask.any():
        raise SystemExit("error: every voxel of the scan is 0")
    box = ndimage.find_objects(mask.astype(int) if steps["crop"] else np.ones(mask.shape, int))[0]
    image, mask = image[:, *box], mask[box]
    own = np.linalg.norm(affine[:3, :3], axis=0)
    target = np.array(steps["spacing"] or own)
    shape = tuple(max(1, round(float(a / b * n))) for a, b, n in zip(own, target, mask.shape))
    coarse = next((mm for mm in (own, target) if mm.max() / mm.min() > 3), np.zeros(3))
    apart = coarse.argmax() if (coarse == coarse.max()).sum() == 1 else None
    channels = [normalized(c, how, mask) for c, how in zip(image, steps["channels"])]
    image = np.stack([resampled(channel, shape, apart) for channel in channels])
    scale = np.array(mask.shape) / np.array(shape)
    place = [side.start for side in box] + (scale - 1) / 2
    return image.astype(np.float32), affine @ nib.affines.from_matvec(np.diag(scale), place)
