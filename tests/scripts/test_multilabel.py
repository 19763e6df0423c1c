"""Overlapping regions (the BraTS format) through the training and test scripts, with every method
that has a form.
"""

import json

import nibabel as nib
import numpy as np
import pytest

from losses import KD_METHODS
from tests.dataloaders.test_brats import write_case
from tests.scripts.conftest import run, train
from utils.checkpoint import digest, load_checkpoint

CONFIG = """
dataset: tiny
format: brats
data_root: data
datalist: dataset_0.json
class_names: [tumour core, whole tumour, enhancing tumour]
in_channels: 4
patch_size: [16, 16, 16]
crop: uniform
rot90_prob: 0.0
cases_per_batch: 2
crops_per_case: 1
workers: 0
max_steps: 2
val_interval: 2
log_interval: 1
network_args:
  resunet: {channels: [4, 4, 8, 8]}
  unet: {channels: [2, 4, 4, 8]}
method_args:
  cirkd: {region_queue: 20, pixel_queue: 40, region_contrast: 4, pixel_contrast: 4}
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Four tiny cases, one of them for validation and one for the test, and a two-step teacher."""
    folder = tmp_path_factory.mktemp("brats")
    rng = np.random.default_rng(0)
    entries = [write_case(folder / "data", f"case{k}", rng) for k in range(4)]
    lists = {"training": entries[:2], "validation": entries[2:3], "test": entries[3:]}
    (folder / "data/dataset_0.json").write_text(json.dumps(lists))
    (folder / "tiny.yaml").write_text(CONFIG)
    train("--method", "supervised", "--student", "resunet", cwd=folder)
    return folder


@pytest.mark.parametrize("method", KD_METHODS)
def test_two_steps(workspace, method):
    train("--method", method, cwd=workspace)
    folder = workspace / f"runs/tiny/{method}/resunet-unet/seed0"
    assert load_checkpoint(folder / "last.pt")["step"] == 2


@pytest.mark.parametrize("method", ["acf_bckd", "nkd"])
def test_a_scan_without_labels(workspace, method):
    """Each region is labelled by the teacher, and ignored where it is not sure, by itself."""
    flags = ("--method", method, "--labelled", "1", "--opts", "tag=u", "teacher_views=flips")
    train(*flags, "pseudo_confidence=0.52", cwd=workspace)
    folder = workspace / f"runs/tiny/{method}/resunet-unet-1-unlabelled/seed0-u"
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["kind"] == "train"]
    assert len(trained) == 2 and all(0 < line["mask_ratio"] < 1 for line in trained)
    assert all(0 < line["pseudo_accuracy"] < 1 and line["true_foreground"] > 0 for line in trained)
    (agreed,) = [line for line in lines if line["kind"] == "agreement"]
    assert {"dice", "tumour core", "enhancing tumour"} <= agreed.keys()
    path = workspace / "data/dataset_0.json"
    lists = json.loads(path.read_text())
    without = [lists["training"][0], {"image": lists["training"][1]["image"]}]
    path.write_text(json.dumps(lists | {"training": without}))
    train(*flags, "pseudo_confidence=0.52", "tag=w", cwd=workspace)
    path.write_text(json.dumps(lists))
    digests = [
        digest(load_checkpoint(folder.with_name(f"seed0-{tag}") / "last.pt")["weights"])
        for tag in "uw"
    ]
    assert digests[0] == digests[1]


def test_regions_are_scored_and_written_as_ids(workspace):
    folder = workspace / "runs/tiny/supervised/resunet/seed0"
    run("test_3d.py", "--ckpt", str(folder / "best.pt"), "--overlays", cwd=workspace)
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary["native"]["classes"]) == {"tumour core", "whole tumour", "enhancing tumour"}
    ids = np.unique(np.asarray(nib.load(folder / "predictions/case3.nii.gz").dataobj))
    assert set(ids.tolist()) <= {0, 1, 2, 3}
    run("tools/figure.py", str(folder), "--out", "figure.png", cwd=workspace)
    run("tools/report.py", str(folder), cwd=workspace)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "enhancing tumour" in page and page.count('src="data:image/jpeg') == 3


def test_a_key_that_the_format_ignores_is_an_error(workspace):
    result = train("--method", "supervised", "--opts", "intensity=zscore", cwd=workspace, ok=False)
    assert "the data format 'brats' does not use this key" in result.stderr
