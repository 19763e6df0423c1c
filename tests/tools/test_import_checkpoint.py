"""Released checkpoints: roles, aliases, unused tensors, refusals; the result is a checkpoint of
ours.
"""

import json
import os
import re
import sys
import types
from collections import OrderedDict

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml

import train_3d_distill
from dataloaders import build_dataset
from networks import NETWORKS, build_network
from tools.import_checkpoint import diagnosis, main
from utils.checkpoint import CheckpointError, load_checkpoint
from utils.config import ConfigError
from utils.distillation import load_teacher

# Different widths, as in the released networks: where two are equal, a shortcut convolution falls
# away.
SMALL = {
    "resunet": {"channels": [4, 8, 16, 32]},
    "segresnet": {"init_filters": 4},
    "unet": {"channels": [4, 8, 16, 32]},
    "espnetv2": {"channels": [16, 32, 48, 64]},
    "mobile_unet": {"width": 0.5},
    "lcovnet": {"channels": [4, 8, 16, 32, 64]},
    "nnunet": {"features_per_stage": [4, 6, 8, 10]},
    "unet2d": {"channels": [4, 6, 8, 10, 12]},
    "vnet": {"n_filters": 4},
    "vnet_dual": {"n_filters": 4},
    "vnet_lefed": {"n_filters": 4},
}


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A configuration with three tiny scans, three classes and narrow networks; runs go to
    tmp_path/runs.
    """
    monkeypatch.chdir(tmp_path)
    entries = []
    for k in range(3):
        for kind, values in (
            ("image", np.arange(512).reshape(8, 8, 8) % 97),
            ("label", np.zeros((8, 8, 8))),
        ):
            nib.save(
                nib.Nifti1Image(values.astype(np.int16), np.eye(4)), tmp_path / f"{kind}{k}.nii.gz"
            )
        entries.append({"image": f"image{k}.nii.gz", "label": f"label{k}.nii.gz"})
    (tmp_path / "dataset.json").write_text(
        json.dumps({"training": entries[:2], "validation": entries[2:]})
    )
    values = {
        "dataset": "tiny",
        "data_root": str(tmp_path),
        "datalist": "dataset.json",
        "max_steps": 4,
        "class_names": ["background", "a", "b"],
        "patch_size": [32, 32, 32],
        "network_args": SMALL,
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values))
    return "tiny.yaml"


def released(name, classes=3):
    """A network as released files hold it: unused tensors allocated, LCOV-Net's convolutions under
    two names.
    """
    flag = "released_layout" if name == "unet2d" else "allocate_unused"
    extra = {flag: True} if getattr(NETWORKS[name], "unused_keys", ()) else {}
    state = build_network(name, 1, classes, **SMALL[name], **extra).state_dict()
    if name == "lcovnet":
        state |= {
            re.sub(r"\.conv\.", ".conv1.", k): v
            for k, v in state.items()
            if re.match(r"up[1-4]\.conv\.", k)
        }
    return state


def save(path, roles, **meta):
    """Write a file with the state dicts of `roles`: {prefix: state}."""
    state = OrderedDict(
        (prefix + key, value) for prefix, tensors in roles.items() for key, value in tensors.items()
    )
    torch.save({"meta": {"epoch": 800, "iter": 19200, **meta}, "state_dict": state}, path)


def test_teacher_of_a_supervised_run(config):
    state = released("resunet")
    save("released.pth", {"segmentor.backbone.": state})
    assert main(["--ckpt", "released.pth", "--config", config, "--network", "resunet"]) == 0
    checkpoint = load_checkpoint("runs/tiny/supervised/resunet/seed0/best.pt")
    assert checkpoint["step"] == 19200
    assert checkpoint["cases"] == {
        "labelled": ["image0", "image1"],
        "unlabelled": [],
        "val": ["image2"],
        "test": [],
    }
    assert all(torch.equal(checkpoint["weights"][key], value) for key, value in state.items())
    # The distillation script takes it as a teacher, and test_3d.py finds every key it reads.
    args, cfg = train_3d_distill.parse_args(["--config", config])
    dataset = build_dataset(**checkpoint["dataset"])
    teacher, scores = load_teacher(cfg, args, dataset, {"val": [], "test": []})
    assert scores is None  # imported weights bring none
    assert all(torch.equal(teacher.state_dict()[key], value) for key, value in state.items())
    assert checkpoint["kind"] == "3d"
    keys = {
        "dataset",
        "method",
        "preset",
        "teacher",
        "seed",
        "tag",
        "max_steps",
        "patch_size",
        "overlap",
    }
    assert keys <= checkpoint["config"].keys()
    with pytest.raises(CheckpointError, match="exists already"):
        main(["--ckpt", "released.pth", "--config", config, "--network", "resunet"])


def test_student_and_teacher_of_a_distillation_run(config):
    student, teacher = released("lcovnet"), released("resunet")
    save(
        "both.pth",
        {
            "architecture.segmentor.backbone.": student,
            "teacher.segmentor.backbone.": teacher,
            "distiller.distill_losses.loss_afd.": {"attn.weight": torch.zeros(2)},
        },
    )
    common = ["--ckpt", "both.pth", "--config", config]
    with pytest.raises(
        CheckpointError, match=r"several networks: student \(\d+ tensors\), teacher \(\d+ tensors\)"
    ):
        main([*common, "--network", "lcovnet"])
    with pytest.raises(CheckpointError, match="holds no teacher-run"):
        main([*common, "--network", "lcovnet", "--role", "teacher-run"])
    distilled = ["--method", "acf_bckd", "--teacher", "resunet", "--opts", "preset=as_released"]
    assert main([*common, "--network", "lcovnet", "--role", "student", *distilled]) == 0
    checkpoint = load_checkpoint("runs/tiny/acf_bckd-as_released/resunet-lcovnet/seed0/best.pt")
    assert checkpoint["config"]["preset"] == "as_released"
    own = build_network("lcovnet", 1, 3, **SMALL["lcovnet"]).state_dict()
    assert checkpoint["weights"].keys() == own.keys()
    assert all(torch.equal(checkpoint["weights"][key], student[key]) for key in own)
    assert main([*common, "--network", "resunet", "--role", "teacher", "--out", "teacher.pt"]) == 0
    assert load_checkpoint("teacher.pt")["imported"] == {"file": "both.pth", "role": "teacher"}


def test_bare_state_dict(config):
    torch.save(released("unet"), "bare.pth")
    assert (
        main(["--ckpt", "bare.pth", "--config", config, "--network", "unet", "--out", "unet.pt"])
        == 0
    )
    assert load_checkpoint("unet.pt")["step"] == 0


@pytest.mark.parametrize("name", ["espnetv2", "mobile_unet", "lcovnet"])
def test_unused_tensors_are_left_out(config, name):
    state = released(name)
    save("released.pth", {"segmentor.backbone.": state})
    assert (
        main(["--ckpt", "released.pth", "--config", config, "--network", name, "--out", "x.pt"])
        == 0
    )
    own = build_network(name, 1, 3, **SMALL[name]).state_dict()
    assert load_checkpoint("x.pt")["weights"].keys() == own.keys()
    assert len(own) < len(state)


def test_aliases_that_differ_are_refused(config):
    state = released("lcovnet")
    key = next(
        key for key in state if ".conv1." in key and "weight" in key and key.startswith("up1")
    )
    state[key] = state[key] + 1
    save("released.pth", {"segmentor.backbone.": state})
    with pytest.raises(CheckpointError, match="one tensor under two names, but differ"):
        main(["--ckpt", "released.pth", "--config", config, "--network", "lcovnet"])


def test_wrong_network_and_wrong_classes(config):
    save("unet.pth", {"segmentor.backbone.": released("unet")})
    with pytest.raises(CheckpointError, match="weights of unet: use --network unet"):
        main(["--ckpt", "unet.pth", "--config", config, "--network", "resunet"])
    save("more.pth", {"segmentor.backbone.": released("unet", classes=5)})
    with pytest.raises(CheckpointError, match=r"of other shape .*check class_names"):
        main(["--ckpt", "more.pth", "--config", config, "--network", "unet"])
    save("cut.pth", {"segmentor.backbone.": dict(list(released("unet").items())[:3])})
    with pytest.raises(CheckpointError, match="the names are of none of"):
        main(["--ckpt", "cut.pth", "--config", config, "--network", "unet"])
    with pytest.raises(ConfigError, match="unknown value 'unett'"):
        main(["--ckpt", "unet.pth", "--config", config, "--network", "unett"])
    assert not os.path.exists("runs")


def test_diagnosis_knows_every_network():
    for name in NETWORKS:
        weights = build_network(name, 1, 4, **SMALL[name]).state_dict()
        assert f"those of {name}" in diagnosis(weights, name)


class Malicious:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_malicious_file_is_refused_and_not_run(config):
    torch.save({"state_dict": {}, "meta": Malicious()}, "evil.pth")
    with pytest.raises(CheckpointError, match="refused, reading it would run"):
        main(["--ckpt", "evil.pth", "--config", config, "--network", "unet"])
    assert not os.path.exists("executed")


def test_damaged_missing_and_foreign_files(config):
    with open("damaged.pth", "wb") as file:
        file.write(b"PK\x03\x04 not a checkpoint")
    torch.save([1, 2], "list.pth")
    torch.save({"state_dict": {"epoch": 3}}, "empty.pth")
    for name, message in (
        ("damaged", "damaged or not"),
        ("missing", "no such checkpoint"),
        ("list", "got list"),
        ("empty", "no tensors"),
    ):
        with pytest.raises(CheckpointError, match=message):
            main(["--ckpt", f"{name}.pth", "--config", config, "--network", "unet"])


def test_log_buffers_and_numpy_scalars_become_placeholders(config, monkeypatch):
    # As MMEngine stores them: arrays, and references to methods of the buffer's class.
    module = types.ModuleType("mmengine.logging.history_buffer")

    class HistoryBuffer:
        def __init__(self):
            self.values, self.last = np.arange(3.0), np.float64(2)
            self.statistics_methods = {"mean": HistoryBuffer.mean}

        def mean(self):
            return self.values.mean()

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = module.__name__, "HistoryBuffer"
    HistoryBuffer.mean.__module__, HistoryBuffer.mean.__qualname__ = (
        module.__name__,
        "HistoryBuffer.mean",
    )
    module.HistoryBuffer = HistoryBuffer
    for name in ("mmengine", "mmengine.logging"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    save(
        "log.pth",
        {"segmentor.backbone.": released("unet")},
        best=np.float32(81.7),
        buffer=HistoryBuffer(),
    )
    assert (
        main(["--ckpt", "log.pth", "--config", config, "--network", "unet", "--out", "x.pt"]) == 0
    )
    assert load_checkpoint("x.pt")["step"] == 19200
