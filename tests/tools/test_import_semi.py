"""Released checkpoints of CRKD: both layouts, both namings of the V-Net, scored by the test scripts
afterwards.
"""

import re

import h5py
import numpy as np
import pytest
import torch

from networks import build_network
from tests.scripts.conftest import run
from utils.checkpoint import load_checkpoint

ACDC = """
dataset: acdc
format: acdc
data_root: data
split_dir: splits
class_names: [background, rv, myo, lv]
patch_size: [32, 32]
max_steps: 10
labelled: 1
network_args:
  unet2d: {channels: [2, 4, 4, 8, 8]}
"""
LA = """
dataset: la
format: la
data_root: data
split_dir: splits
class_names: [background, atrium]
patch_size: [16, 16, 16]
stride: [8, 8, 8]
val_stride: [16, 16, 16]
max_steps: 10
labelled: 1
network_args:
  vnet: {n_filters: 2}
"""


def workspace(folder, config, files, lists, classes, shape):
    rng = np.random.default_rng(0)
    for file in files:
        path = folder / "data" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(path, "w") as h5:
            h5["image"] = rng.random(shape)
            h5["label"] = rng.integers(0, classes, shape).astype(np.uint8)
    (folder / "splits").mkdir()
    for split, names in lists.items():
        (folder / "splits" / f"{split}.txt").write_text("\n".join(names))
    (folder / "tiny.yaml").write_text(config)
    return folder


@pytest.fixture
def acdc(tmp_path):
    patients = [f"patient00{k}" for k in range(1, 5)]
    files = [f"data/{name}_frame01.h5" for name in patients]
    lists = {"train": patients[:2], "val": patients[2:3], "test": patients[3:]}
    return workspace(tmp_path, ACDC, files, lists, 4, (2, 40, 36))


@pytest.fixture
def la(tmp_path):
    lists = {"train": ["A", "B"], "test": ["C"]}
    return workspace(
        tmp_path, LA, [f"{name}/mri_norm2.h5" for name in "ABC"], lists, 2, (20, 18, 17)
    )


def test_the_layout_of_the_2d_scripts(acdc):
    network = build_network("unet2d", 1, 4, channels=[2, 4, 4, 8, 8], released_layout=True)
    assert any("feats_conv_16" in key for key in network.state_dict())
    content = {"model": network.state_dict(), "epoch": 7, "previous_best_mdice": np.float64(0.8)}
    torch.save(content, acdc / "best.pth")
    out = run(
        "tools/import_checkpoint.py",
        "--ckpt",
        "best.pth",
        "--config",
        "tiny.yaml",
        "--network",
        "unet2d",
        "--method",
        "crkd",
        "--labelled",
        "1",
        cwd=acdc,
    ).stdout
    assert "left out: 2 that no forward pass uses" in out
    best = acdc / "runs/acdc/crkd/unet2d-1/seed0/best.pt"
    stored = load_checkpoint(best)
    assert torch.equal(
        stored["weights"]["encoder.in_conv.conv_conv.0.weight"],
        network.state_dict()["encoder.in_conv.conv_conv.0.weight"],
    )
    tested = run("test_2d.py", "--ckpt", str(best), cwd=acdc).stdout
    assert "results in" in tested and "selected on cases that are reported" in tested
    again = run("train_2d_crkd.py", "--config", "tiny.yaml", cwd=acdc).stdout
    assert "imported weights" in again


@pytest.mark.parametrize("naming", ["VNet_CRKD", "VNet"])
def test_the_layout_of_the_3d_scripts_in_both_namings(la, naming):
    network = build_network("vnet", 1, 2, n_filters=2)
    weights = network.state_dict()
    if naming == "VNet":
        weights = {
            re.sub(r"^(encoder|decoder)\.", "", key): value for key, value in weights.items()
        }
    content = {"model_state_dict": weights, "iter_num": 9000, "pervious_bset_dice": np.float32(0.5)}
    torch.save(content, la / "iter_9000.pth")
    run(
        "tools/import_checkpoint.py",
        "--ckpt",
        "iter_9000.pth",
        "--config",
        "tiny.yaml",
        "--network",
        "vnet",
        "--method",
        "crkd",
        cwd=la,
    )
    best = la / "runs/la/crkd/vnet-1/seed0/best.pt"
    stored = load_checkpoint(best)
    assert stored["step"] == 9000 and stored["weights"].keys() == network.state_dict().keys()
    run("test_3d.py", "--ckpt", str(best), "--protocol", "published", cwd=la)


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_code_is_refused_and_wrong_networks_are_named(acdc, capsys):
    arguments = ("--config", "tiny.yaml", "--network", "unet2d", "--method", "crkd")
    torch.save({"model": {"w": torch.zeros(1)}, "extra": Evil()}, acdc / "evil.pth")
    refused = run(
        "tools/import_checkpoint.py", "--ckpt", "evil.pth", *arguments, cwd=acdc, ok=False
    )
    assert (
        "refused" in refused.stderr and "executed" not in refused.stdout + capsys.readouterr().out
    )
    torch.save({"model": build_network("vnet", 1, 4, n_filters=2).state_dict()}, acdc / "other.pth")
    wrong = run("tools/import_checkpoint.py", "--ckpt", "other.pth", *arguments, cwd=acdc, ok=False)
    assert "use --network vnet" in wrong.stderr
