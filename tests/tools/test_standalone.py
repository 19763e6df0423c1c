"""run_model.py, which export writes beside a model, against predict_3d.py: the same label in every
voxel, by a process that has neither torch nor this repository.
"""

import hashlib
import json
import subprocess
import sys

import nibabel as nib
import numpy as np
from onnx import TensorProto, helper, numpy_helper
from scipy import ndimage

from dataloaders import build_dataset
from tests.scripts.conftest import run
from tools import standalone

# Runs run_model.py in each of the folders that it is given.
DRIVER = """
import importlib.abc
import runpy
import sys
from pathlib import Path

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent}:
            raise ModuleNotFoundError(f"No module named {{name!r}}")

sys.meta_path.insert(0, Absent())
for folder in map(Path, sys.argv[1:]):
    scans = sorted(map(str, (folder / "in").iterdir()))
    sys.argv = ["run_model.py", *scans, str(folder / "labels.nii.gz")]
    runpy.run_path(str(folder / "run_model.py"), run_name="__main__")
"""
ABSENT = ("torch", "monai", "dataloaders", "inference", "utils", "tools", "networks", "tests")
TURNED = [[0, -1.5, 0, 40], [-1.5, 0, 0, 30], [0, 0, 3, -20], [0, 0, 0, 1]]
CT = {"percentile_00_5": -60.0, "percentile_99_5": 140.0, "mean": 30.0, "std": 45.0}
SCHEMES = {
    "ct": {"scheme": "CTNormalization", **CT},
    "masked": {"scheme": "ZScoreNormalization", "mask": True},
    "whole": {"scheme": "ZScoreNormalization", "mask": False},
    "rescaled": {"scheme": "RescaleTo01Normalization"},
    "rgb": {"scheme": "RGBTo01Normalization"},
    "none": {"scheme": "NoNormalization"},
}


def oblique():
    """Turned about two axes and rounded, as headers are: the axes are not quite at right angles."""
    a, b = 0.3, -0.2
    about = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about = about @ np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = (about @ np.diag([1.1, 0.9, 2.5])).astype(np.float32)
    affine[:3, 3] = -30, 12.5, 7
    return affine


def nnunet(*schemes):
    channels = [SCHEMES[name] for name in schemes]
    return {"format": "nnunet", "intensity": "nnunet", "intensity_channels": channels}


REGIONS = {
    "class_names": ["whole", "core", "rim"],
    "regions": {"whole": [1, 2, 3], "core": [2, 3], "rim": [3]},
    "regions_class_order": [1, 2, 3],
}
# name -> arguments of the data set, affine of the scan, its shape, and what else differs
CASES = {
    "window, turned, coarser along two axes": (
        {"spacing": [2.0, 2.0, 2.0], "window": [-50, 150]},
        TURNED,
        (21, 18, 11),
        {},
    ),
    "z-score of two channels, finer": (
        {"orientation": "", "intensity": "zscore", "spacing": [0.8, 1.0, 2.0], "in_channels": 2},
        np.diag([-1.6, 2.0, 3.0, 1.0]),
        (12, 10, 9),
        {},
    ),
    "smaller than the patch, as it is": (
        {"intensity": "none", "crop_foreground": False},
        np.diag([1.0, 1.0, 1.0, 1.0]),
        (9, 24, 7),
        {},
    ),
    "twice as coarse: places halfway between voxels": (
        {"spacing": [2.0, 2.0, 2.0], "crop_foreground": False, "window": [-50, 150]},
        np.diag([1.0, 1.0, 1.0, 1.0]),
        (24, 23, 20),
        {},
    ),
    "oblique": ({"spacing": [1.5, 1.5, 2.0], "orientation": "LPS"}, oblique(), (17, 22, 10), {}),
    "sheared": (
        {"spacing": [1.0, 1.0, 2.0], "orientation": "LAS"},
        [[1, 0, 0, 5], [0, 1, 0.6, 3], [0, 0, 2, 1], [0, 0, 0, 1]],
        (16, 17, 9),
        {},
    ),
    "spacing that is almost the wanted one": (
        {"spacing": [1.0, 1.0, 3.0], "intensity": "zscore"},
        np.diag([1.0005, 1.0, 3.002, 1.0]),
        (16, 17, 9),
        {},
    ),
    "few labels": (
        {"spacing": [1.5, 1.5, 1.5], "window": [-50, 150]},
        TURNED,
        (21, 18, 9),
        {"kind": "3d-semi", "stride": [5, 8, 3]},
    ),
    "left atrium": (
        {"format": "la", "class_names": ["background", "atrium"]},
        np.diag([-0.9, 0.7, 1.0, 1.0]),
        (14, 12, 10),
        {"kind": "3d-semi", "stride": [4, 6, 8]},
    ),
    "brats": (
        {"format": "brats", "in_channels": 4, "class_names": ["core", "whole", "enhancing"]},
        np.diag([-1.0, -1.0, 1.0, 1.0]),
        (18, 17, 12),
        {"shift": 0.0},
    ),
    "nnunet: one axis apart": (
        {**nnunet("ct"), "orientation": "", "spacing": [1.4, 1.5, 3.0]},
        np.diag([1.0, 1.1, 5.0, 1.0]),
        (22, 21, 7),
        {},
    ),
    "nnunet: mask, regions": (
        {**nnunet("masked", "rescaled"), "spacing": [1.0, 1.2, 1.3], "in_channels": 2, **REGIONS},
        TURNED,
        (15, 18, 11),
        {"shift": 0.0},
    ),
    "nnunet: other schemes, stored grid": (
        {**nnunet("whole", "rgb", "none"), "in_channels": 3, "crop_foreground": False},
        np.diag([1.0, 1.0, 4.0, 1.0]),
        (18, 17, 9),
        {"shift": 0.0},
    ),
}
PATCH = [10, 12, 8]


def write_model(path, inputs, outputs, rng):
    """Two convolutions, of random weights, in ONNX."""
    shapes = {"a": (4, inputs, 3, 3, 3), "b": (outputs, 4, 3, 3, 3)}
    weights = {k: rng.normal(0, 0.3, shape).astype(np.float32) for k, shape in shapes.items()}
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    pads = {"pads": [1] * 6}
    nodes = [
        helper.make_node("Conv", ["image", "a"], ["inner"], **pads),
        helper.make_node("Relu", ["inner"], ["positive"]),
        helper.make_node("Conv", ["positive", "b"], ["logits"], **pads),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", channels, *PATCH])
        for name, channels in (("image", inputs), ("logits", outputs))
    ]
    graph = helper.make_graph(nodes, "model", ends[:1], ends[1:], tensors)
    opset = [helper.make_opsetid("", 18)]
    path.write_bytes(
        helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()
    )


def write_export(folder, arguments, affine, shape, extra, seed):
    """A folder as tools/export.py leaves it, and in/ with a scan."""
    rng = np.random.default_rng(seed)
    names = ["background", "ball", "box"]
    given = {"format": "msd", "root": "nowhere", "datalist": "dataset.json", "class_names": names}
    given |= arguments
    if given["format"] == "la":
        del given["datalist"]
    dataset = build_dataset(**given)
    inputs, outputs = dataset.in_channels, len(given["class_names"])
    (folder / "in").mkdir(parents=True)
    write_model(folder / "model.onnx", inputs, outputs, rng)
    config = {"dataset": "x", "method": "kd", "preset": "clean", "seed": 0, "overlap": 0.5}
    described = {
        "kind": extra.get("kind", "3d"),
        "network": {"name": "unet", "in_channels": inputs, "num_classes": outputs},
        "class_names": given["class_names"],
        "config": config | {"patch_size": PATCH, "window_batch": 2} | extra,
        "dataset": given,
        "step": 1,
    }
    digest = hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
    described["exported"] = {"files": {"model.onnx": digest}, "weights": "none"}
    told = described["standalone"] = standalone.steps(described, dataset)
    (folder / "model.onnx.json").write_text(json.dumps(described))
    (folder / "run_model.py").write_text(standalone.script(told, "model.onnx"))
    voxels = ndimage.gaussian_filter(rng.normal(0, 1, (inputs, *shape)), (0, 1.5, 1.5, 1))
    voxels = (voxels / voxels.std() * 60 + extra.get("shift", 40.0)).clip(-100, 200)
    if "shift" in extra:  # air around a body
        body = np.linalg.norm(np.indices(shape).T / np.array(shape) - 0.5, axis=-1).T < 0.45
        voxels = np.where(body, np.rint(abs(voxels)) + 1, 0)
    files = [f"scan_{k:04d}" for k in range(inputs)]
    if given["format"] == "msd":
        files, voxels = ["scan"], [voxels[0] if inputs == 1 else np.moveaxis(voxels, 0, -1)]
    elif given["format"] == "la":
        files = ["scan"]
    for name, values in zip(files, voxels):
        image = nib.Nifti1Image(values.astype(np.float32), np.array(affine, float))
        nib.save(image, folder / "in" / f"{name}.nii.gz")


def run_alone(folders, tmp_path):
    """run_model.py of each folder, without what a hospital does not have."""
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER.format(absent=set(ABSENT)))
    command = [sys.executable, "-I", str(driver), *map(str, folders)]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)


def test_the_same_label_in_every_voxel(tmp_path):
    for seed, (name, case) in enumerate(CASES.items()):
        write_export(tmp_path / name, *case, seed)
    result = run_alone([tmp_path / name for name in CASES], tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    for name in CASES:
        paths = (
            "--model",
            f"{name}/model.onnx",
            "--input",
            f"{name}/in",
            "--output",
            f"{name}/out",
        )
        run("predict_3d.py", *paths, "--threads", "1", cwd=tmp_path)
        (path,) = (tmp_path / name / "out").glob("*.nii.gz")
        expected, found = nib.load(path), nib.load(tmp_path / name / "labels.nii.gz")
        ids, others = (np.asarray(image.dataobj) for image in (expected, found))
        assert len(np.unique(ids)) >= 2, name
        lines = (tmp_path / name / "run_model.py").read_text().splitlines()
        assert len(lines) <= 120 and max(map(len, lines)) <= 100
        assert found.get_data_dtype() == np.uint8
        differ = int((ids != others).sum())
        assert differ == 0, f"{name}: {differ} of {ids.size} labels differ"
        for form in ("sform_code", "qform_code", "srow_x", "srow_z", "quatern_b", "qoffset_x"):
            assert np.array_equal(found.header[form], expected.header[form]), (name, form)
