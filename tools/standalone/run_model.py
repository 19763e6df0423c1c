"""Segment a NIfTI scan: python run_model.py SCAN.nii.gz [CHANNEL_2.nii.gz ...] LABELS.nii.gz

Needs numpy, scipy, nibabel, and onnxruntime for .onnx or openvino for .xml, and <model>.json.
"""

import itertools
import json
import sys
from importlib import import_module
from pathlib import Path

import nibabel as nib
import numpy as np
from linear import prepared  # what tools/export.py writes has the function itself here
from nibabel.orientations import axcodes2ornt, ornt_transform
from scipy import ndimage, special

MODEL = Path(__file__).with_name("model.onnx")


def load_model():
    """Function of windows (1, C, *patch_size) that gives logits (1, K, *patch_size)."""
    if MODEL.suffix == ".onnx":
        session = import_module("onnxruntime").InferenceSession(MODEL)
        return lambda windows: session.run(None, {"image": windows})[0]
    exact = {"INFERENCE_PRECISION_HINT": "f32"}  # some processors would take bfloat16
    compiled = import_module("openvino").compile_model(MODEL, "CPU", exact)
    return lambda windows: np.array(compiled(windows)[0])


def normalized(channel, how, mask=None):
    """A channel (H, W, D), less a number and over another, given or of the voxels that count."""
    inside = {"all": channel == channel, "nonzero": channel != 0, "mask": mask}[how["voxels"]]
    channel = np.clip(channel, *how["clip"]) if how["clip"] else channel
    own = channel[inside].astype(np.float64)
    known = {"mean": own.mean(), "min": own.min(), "std": own.std() or 1, "ptp": np.ptp(own) or 1}
    less, over = (np.float32(known.get(how[key], how[key])) for key in ("less", "over"))
    return np.where(inside, (channel - less) / over, channel)


def averaged(model, image, steps):
    """Logits (K, H, W, D), or probabilities, of overlapping windows of equal weight."""
    size, patch = np.array(image.shape[1:]), np.array(steps["patch_size"])
    before, lack = np.maximum(patch - size, 0) // 2, np.maximum(patch - size, 0)
    image = np.pad(image, [(0, 0), *zip(before, lack - before)])
    ends = zip(np.array(image.shape[1:]) - patch, steps["stride"])
    starts = itertools.product(*(np.minimum(range(0, n + s, s), n) for n, s in ends))
    order = np.array(sorted(starts, key=lambda start: start[np.argmin(patch / size)]))
    windows = [(slice(None), *map(slice, start, start + patch)) for start in order]
    count, total = (np.zeros((n, *image.shape[1:]), np.float32) for n in (1, steps["outputs"]))
    for window in windows:
        count[window] += 1
    for window in windows:
        scores = model(np.ascontiguousarray(image[window])[None])[0]
        scores = special.softmax(scores, axis=0) if steps["probabilities"] else scores
        total[window] += scores * (1 / count[window])
    return total[(slice(None), *map(slice, before, before + size))]


def native(labels, affine, scan_affine, shape):
    """Labels on the grid of the scan: those of the nearest voxel, 0 beyond the grid of `affine`."""
    to = np.linalg.inv(affine) @ scan_affine
    grid = {"offset": to[:3, 3] + 1, "output_shape": shape, "order": 0}
    found = ndimage.affine_transform(np.pad(labels, 1, mode="edge"), to[:3, :3], **grid)
    x, y, z = np.ogrid[tuple(map(slice, shape))]
    for (a, b, c, d), side in zip(to, labels.shape):
        found *= abs(a * x + b * y + c * z + d - (side - 1) / 2) <= side / 2 + 1e-6
    return found


def segmented(files, steps):
    """Label ids of a scan on its own grid, as an image."""
    scans = [nib.load(file) for file in files]
    affine, shape = scans[0].affine, scans[0].shape[:3]
    axes = axcodes2ornt(steps["orientation"] or nib.aff2axcodes(affine))
    turned = [one.as_reoriented(ornt_transform(nib.io_orientation(affine), axes)) for one in scans]
    read = [np.asanyarray(one.dataobj).reshape(*one.shape[:3], -1) for one in turned]
    image = np.moveaxis(np.concatenate(read, -1), -1, 0).astype(np.float32)
    alike = all(np.allclose(scan.affine, affine, atol=1e-3) for scan in scans)
    if len(image) != len(steps["channels"]) or not alike or not np.isfinite(image).all():
        raise SystemExit(f"error: expected finite {len(steps['channels'])} channel(s) on one grid")
    unit = {1: 1e3, 3: 1e-3}.get(int(scans[0].header["xyzt_units"]) & 7, 1.0)  # m, microns to mm
    to_mm = np.diag([unit, unit, unit, 1.0])
    image, grid = prepared(image, to_mm @ turned[0].affine, steps)
    scores = averaged(load_model(), image, steps)
    parts = scores >= 0 if steps["regions"] else scores.argmax(0)[None]
    parts = [native(p.astype(np.uint8), grid, to_mm @ affine, shape) for p in parts]
    ids = np.zeros_like(parts[0]) if steps["regions"] else parts[0]
    for k, number in steps["regions"]:  # later ones over earlier ones
        ids[parts[k] > 0] = number
    return nib.Nifti1Image(ids, affine, scans[0].header, dtype=np.uint8)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    about = json.loads(MODEL.with_name(f"{MODEL.name}.json").read_text(encoding="utf-8"))
    nib.save(segmented(sys.argv[1:-1], about["standalone"]), sys.argv[-1])
