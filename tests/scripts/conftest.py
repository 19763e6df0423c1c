"""Running the repository's scripts as a user does, on tiny data in a temporary folder."""

import contextlib
import io
import json
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import pytest

from dataloaders import DATASETS
from losses import KD_METHODS
from methods import SSL_METHODS
from networks import NETWORKS
from utils.plugins import is_plugged_in

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
dataset: tiny
data_root: data
datalist: dataset_0.json
class_names: [background, ball, box]
orientation: RAS
spacing: [2.0, 2.0, 2.0]
intensity: window
window: [0.0, 100.0]
crop_foreground: false
patch_size: [16, 16, 16]
rot90_prob: 0.5
cases_per_batch: 1
crops_per_case: 2
workers: 0
max_steps: 4
val_interval: 2
log_interval: 2
save_interval: 2
network_args:
  resunet: {channels: [4, 4, 8, 8]}
  unet: {channels: [2, 4, 4, 8]}
"""


class Result(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run(script: str, *arguments: str, cwd: Path, ok: bool = True) -> Result:
    """Run a script of the repository as `__main__` in `cwd`, in this process: the imports then cost
    nothing.

    A script that should succeed and does not shows its standard error.
    """
    out, err = io.StringIO(), io.StringIO()
    handlers = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    }
    argv, before = sys.argv, Path.cwd()
    code: object = 0
    try:
        os.chdir(cwd)
        sys.argv = [script, *arguments]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as stop:
        code = stop.code
    finally:
        # nothing stays plugged in, as in a process of its own
        for registry in (NETWORKS, KD_METHODS, SSL_METHODS, DATASETS):
            for name in [name for name, cls in registry.items() if is_plugged_in(cls)]:
                del registry[name]
        os.chdir(before)
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if isinstance(code, str):  # what sys.exit(text) does: print it and fail
        err.write(code)
        code = 1
    result = Result(int(code or 0), out.getvalue(), err.getvalue())
    if ok:
        assert result.returncode == 0, result.stderr[-3000:]
    return result


def train(*arguments: str, cwd: Path, ok: bool = True) -> Result:
    return run("train_3d_distill.py", "--config", "tiny.yaml", *arguments, cwd=cwd, ok=ok)


def write_case(
    folder: Path, name: str, rng: np.random.Generator, affine: np.ndarray | None = None
) -> dict:
    """A noisy volume with a ball and a box of two intensities, and its label."""
    shape = (22, 20, 18)
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"))
    label = np.zeros(shape, np.uint8)
    label[((grid - rng.uniform(6, 9, 3).reshape(3, 1, 1, 1)) ** 2).sum(0) < 20] = 1
    x, y, z = rng.integers(11, 14, 3)
    label[x : x + 5, y : y + 5, z : z + 4] = 2
    image = np.choose(label, (20.0, 50.0, 80.0)) + rng.normal(0, 5, shape)
    affine = np.diag([2.0, 2.0, 2.0, 1.0]) if affine is None else affine
    for part, values in (("imagesTr", image.astype(np.float32)), ("labelsTr", label)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(values, affine), folder / part / f"{name}.nii.gz")
    return {"image": f"imagesTr/{name}.nii.gz", "label": f"labelsTr/{name}.nii.gz"}


def make_workspace(folder: Path) -> Path:
    """Fill `folder` with data/ (five training, one validation, one test case) and tiny.yaml."""
    rng = np.random.default_rng(0)
    flipped = np.diag([-2.0, -2.0, 2.0, 1.0])
    names = [f"case{k}" for k in range(7)]
    entries = [
        write_case(folder / "data", n, rng, flipped if n == "case6" else None) for n in names
    ]
    lists = {"training": entries[:5], "validation": entries[5:6], "test": entries[6:]}
    (folder / "data" / "dataset_0.json").write_text(json.dumps(lists))
    (folder / "tiny.yaml").write_text(CONFIG)
    return folder


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """What `make_workspace` makes, in a folder of the test's own."""
    return make_workspace(tmp_path)
