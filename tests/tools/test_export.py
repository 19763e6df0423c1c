"""Exported models: equal to the network they come from, described, refused when they are not
good.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from networks import NETWORKS, build_network
from networks.espnetv2 import EESP
from networks.mobile_unet import InvertedResidual
from tests.dataloaders.test_brats import write_case
from tests.scripts.conftest import ROOT, make_workspace, run, train
from tests.tools.test_import_checkpoint import SMALL
from tests.tools.test_standalone import run_alone
from tools import deployed, export, monai_bundle
from utils import exported
from utils.checkpoint import CheckpointError, atomic_save, load_checkpoint
from utils.config import ConfigError
from utils.exported import FORMATS, ExportedModel

RUN = Path("runs/tiny/supervised/unet/seed0")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Tiny scans and a U-Net that knows a little about them."""
    folder = make_workspace(tmp_path_factory.mktemp("export"))
    options = ("--opts", "max_steps=60", "val_interval=60", "lr=0.1")
    train("--method", "supervised", "--student", "unet", *options, cwd=folder)
    return folder


@pytest.fixture
def ckpt(workspace, monkeypatch):
    """The checkpoint of `workspace`, which is the working folder."""
    monkeypatch.chdir(workspace)
    return RUN / "best.pt"


def network_of(checkpoint):
    described = checkpoint["network"]
    network = build_network(
        described["name"],
        described["in_channels"],
        described["num_classes"],
        **described["arguments"],
    )
    network.load_state_dict(checkpoint["weights"])
    return network.eval()


def enliven(network, seed=0):
    """Random statistics for batch norms, so that leaving them out shows."""
    torch.manual_seed(seed)
    for layer in network.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.running_mean.normal_(0, 0.2)
            layer.running_var.uniform_(0.5, 1.5)
    return network.eval()


def semi_checkpoint(path, form, network, classes, patch, **extra):
    """A checkpoint of a network of few labels, built without training."""
    arguments = SMALL[network]
    built = enliven(
        build_network(network, 3 if form == "images2d" else 1, len(classes), **arguments)
    )
    dims = len(patch)
    atomic_save(
        {
            "kind": f"{dims}d-semi",
            "class_names": classes,
            "code": "test",
            "step": 2,
            "selected_on": "val",
            "network": {
                "name": network,
                "in_channels": built.in_channels,
                "num_classes": len(classes),
                "arguments": arguments,
            },
            "config": {
                "dataset": form,
                "method": "crkd",
                "preset": "clean",
                "seed": 0,
                "max_steps": 2,
                "patch_size": patch,
                "tag": "",
                "labelled": 1,
                **extra,
            },
            "dataset": {
                "format": form,
                "root": "nowhere",
                "class_names": classes,
                "patch_size": patch,
            },
            "cases": {"labelled": ["a"], "unlabelled": [], "val": ["b"], "test": []},
            "weights": built.state_dict(),
        },
        path,
    )
    return built


@pytest.mark.parametrize("form", FORMATS)
def test_each_format(ckpt, workspace, form, tmp_path, capsys):
    whole = str(workspace / ckpt)
    assert export.main(["--ckpt", whole, "--format", form, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    path = tmp_path / f"model{FORMATS[form]}"
    alone = form in ("onnx", "openvino")
    assert (
        "largest difference" in printed
        and "the first case of the test list" in printed
        and "100.0000 %" in printed
    )
    left = {file.name for file in tmp_path.iterdir()}
    assert left == {file.name for file in exported.model_files(path)} | {
        f"{path.name}.json",
        "model_card.md",
        *(["run_model.py"] if alone else []),
    }

    checkpoint, model = load_checkpoint(ckpt), ExportedModel(path, trusted=True)
    for key in ("kind", "network", "class_names", "step", "code"):
        assert model.description[key] == json.loads(json.dumps(checkpoint[key]))
    assert model.description["config"]["patch_size"] == [16, 16, 16]
    assert model.description["dataset"]["spacing"] == [2.0, 2.0, 2.0]
    for file in (exported.sidecar(path), tmp_path / "model_card.md"):
        assert "case6" not in file.read_text()  # a patient's name
    for file in tmp_path.iterdir() if alone else (exported.sidecar(path),):  # nor whose disks
        for folder in (workspace, tmp_path.parent, ROOT):
            assert str(folder).encode() not in file.read_bytes(), file
    network = network_of(checkpoint)
    for batch in (1, 2, 5):
        windows = torch.randn(batch, 1, 16, 16, 16)
        with torch.inference_mode():
            torch.testing.assert_close(model(windows), network(windows), rtol=0, atol=1e-4)

    # In the place of the checkpoint where new scans are predicted
    scan = ("--input", "data/imagesTr/case6.nii.gz", "--threads", "1")
    trust = []
    if form in ("torchscript", "torch_export"):
        trust = ["--trust-model"]
        command = ("predict_3d.py", "--model", str(path), *scan, "--output", str(tmp_path / "none"))
        refused = run(*command, cwd=workspace, ok=False).stderr
        assert f"error: {path}: not loaded" in refused and "add --trust-model" in refused
    out = run(
        "predict_3d.py",
        "--model",
        str(path),
        *trust,
        *scan,
        "--output",
        str(tmp_path / "model"),
        cwd=workspace,
    )
    assert "segmented 1, there already 0, failed 0" in out.stdout
    run(
        "predict_3d.py",
        "--ckpt",
        str(ckpt),
        *scan,
        "--output",
        str(tmp_path / "ckpt"),
        cwd=workspace,
    )
    found, expected = (
        np.asarray(nib.load(tmp_path / k / "case6.nii.gz").dataobj) for k in ("model", "ckpt")
    )
    assert len(np.unique(expected)) == 3 and np.array_equal(found, expected)
    if alone:
        (tmp_path / "in").mkdir()
        shutil.copy("data/imagesTr/case6.nii.gz", tmp_path / "in")
        assert run_alone([tmp_path], tmp_path).returncode == 0
        assert np.array_equal(np.asarray(nib.load(tmp_path / "labels.nii.gz").dataobj), expected)
    about = [json.loads((tmp_path / k / "case6.json").read_text()) for k in ("model", "ckpt")]
    assert about[0]["settings"] == about[1]["settings"] | {"model": path.name}
    assert about[0]["labels"] == about[1]["labels"]


def test_model_card(ckpt, tmp_path):
    summary = {
        "split": "test",
        "selected_on_reported": False,
        "native": {
            "cases": 1,
            "counts": {"pairs": 2, "missed": 1, "spurious": 0, "absent": 0},
            "mean": {"dice": 0.4321, "jaccard": 0.3, "hd95": None, "asd": 1.0},
            "classes": {"ball": {"dice": 0.8, "jaccard": 0.6, "hd95": 3.25, "asd": 1.0}},
        },
    }
    common = ["--ckpt", str(ckpt), "--out", str(tmp_path)]
    export.main([*common, "--format", "torchscript"])
    assert "Not measured: there is no summary.json" in (tmp_path / "model_card.md").read_text()
    ckpt.with_name("summary.json").write_text(json.dumps(summary))
    try:
        export.main(
            [
                *common,
                "--format",
                "torch_export",
                "--licence",
                "CC-BY-SA 4.0",
                "--intended-use",
                "teaching",
            ]
        )
    finally:
        ckpt.with_name("summary.json").unlink()
    card = (tmp_path / "model_card.md").read_text()
    for part in (
        "# unet for tiny",
        "1. ball",
        "axes turned to RAS",
        "resampled to 2.0 x 2.0 x 2.0 mm",
        "intensities 0..100 mapped to 0..1",
        "windows of 16 x 16 x 16 that overlap by 0.5",
        "| ball | 80.00 | 60.00 | 3.25",
        "| mean of cases | 43.21 | 30.00 | - |",
        "CC-BY-SA 4.0",
        "teaching",
        "torch 2.",
        "--format torch_export",
        "`model.ts`",
        "`model.pt2`",
        "5 labelled, 1 val, 1 test",
    ):
        assert part in card, part


def one_of_each(network):
    """The network with one block of those that follow each other alike: exporting takes its time by
    their number.
    """
    for name, layers in list(network.named_modules()):
        if isinstance(layers, nn.Sequential) and all(
            isinstance(layer, EESP | InvertedResidual) for layer in layers
        ):
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, layers[:1])
    return network


# The U-Net is in the tests above; the V-Nets of two decoders run the V-Net's layers.
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["resunet", "segresnet", "espnetv2", "mobile_unet", "lcovnet", "vnet", "unet2d"]
)
def test_every_network_as_onnx_and_openvino(name, tmp_path):
    dims = NETWORKS[name].dims
    fewer = {"blocks_down": (1, 1, 1, 1)} if name == "segresnet" else {}
    network = enliven(build_network(name, 2, 3, **SMALL[name], **fewer))
    network = one_of_each(network) if name in ("espnetv2", "mobile_unet") else network
    size = (32,) * dims if name == "mobile_unet" else (32, 16, 48)[:dims]
    export.write_onnx(network, tmp_path / "model.onnx", torch.zeros(2, 2, *size))
    export.write_openvino(tmp_path / "model.onnx", tmp_path / "model.xml")
    runtimes = [
        exported._onnx(tmp_path / "model.onnx", 1),
        exported._openvino(tmp_path / "model.xml", 1),
    ]
    for batch in (1, 3):
        image = torch.randn(batch, 2, *size)
        with torch.inference_mode():
            expected = network(image)
        assert expected.std() > 1e-3
        for predict in runtimes:
            atol = 1e-4 * max(1.0, expected.abs().max().item())
            torch.testing.assert_close(predict(image), expected, rtol=0, atol=atol)


@pytest.mark.parametrize(
    "size, target", [((6, 5, 7), (5, 5, 5)), ((3, 8, 2), (5, 8, 1)), ((9, 4, 6), (1, 1, 1))]
)
def test_average_pool_is_the_adaptive_one(size, target):
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(
        export.average_pool(image, target), F.adaptive_avg_pool3d(image, target)
    )


@pytest.fixture(scope="module")
def model(workspace):
    """A TorchScript model of the workspace's network."""
    out = workspace / "deployed"
    export.main(
        [
            "--ckpt",
            str(workspace / RUN / "last.pt"),
            "--format",
            "torchscript",
            "--out",
            str(out),
            "--data-root",
            str(workspace / "data"),
            "--cache-dir",
            str(workspace / "cache"),
        ]
    )
    return out / "model.ts"


def moved(model, folder):
    """A copy of model and description to spoil."""
    for path in (model, exported.sidecar(model)):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder / model.name


def test_spoilt_files_are_refused(model, tmp_path):
    path = moved(model, tmp_path)
    assert ExportedModel(path, trusted=True).num_classes == 3
    described = exported.sidecar(path)
    content, sound = described.read_text(), path.read_bytes()
    with path.open("r+b") as file:
        file.seek(200)
        file.write(b"\0\1\2\3")
    with pytest.raises(
        CheckpointError, match=r"model.ts: damaged, or not the file that model.ts.json describes"
    ):
        ExportedModel(path)
    described.write_text(content[:100])
    with pytest.raises(CheckpointError, match=r"model.ts.json: not valid JSON"):
        ExportedModel(path)
    described.write_text("[]")
    with pytest.raises(CheckpointError, match="expected an object, got list"):
        ExportedModel(path)
    spoilt = {
        key: value for key, value in json.loads(content).items() if key not in ("config", "dataset")
    }
    described.write_text(json.dumps(spoilt))
    with pytest.raises(CheckpointError, match="lacks config, dataset"):
        ExportedModel(path)
    described.write_text(json.dumps(json.loads(content) | {"exported": {}}))
    with pytest.raises(CheckpointError, match=r"lacks exported\.files"):
        ExportedModel(path)
    described.write_text(json.dumps(json.loads(content) | {"code": "\x1b[2J"}))
    with pytest.raises(CheckpointError, match=r"not valid JSON .*control characters"):
        ExportedModel(path)
    path.write_bytes(sound)
    described.write_text(json.dumps(json.loads(content) | {"network": {"in_channels": "x"}}))
    with pytest.raises(CheckpointError, match=r"model.ts.json: does not describe a network"):
        ExportedModel(path, trusted=True)
    described.unlink()
    with pytest.raises(CheckpointError, match=r"model.ts.json: no such file.*copy it"):
        ExportedModel(path, trusted=True)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"model.ts: no such model file"):
        ExportedModel(path)
    with pytest.raises(CheckpointError, match=r"best.pt: not an exported model; expected .*\.onnx"):
        ExportedModel(tmp_path / "best.pt")


def test_a_model_that_its_runtime_cannot_load(model, tmp_path):
    path = moved(model, tmp_path)
    path.write_bytes(b"not a model")
    content = json.loads(exported.sidecar(path).read_text())
    content["exported"]["files"]["model.ts"] = exported.file_digest(path)
    exported.sidecar(path).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="its runtime cannot load it"):
        ExportedModel(path, trusted=True)


def test_a_program_is_not_loaded_without_the_users_word(model, monkeypatch):
    def load(*arguments, **keywords):
        raise AssertionError("loaded")

    monkeypatch.setattr(torch.jit, "load", load)
    with pytest.raises(
        CheckpointError, match=r"model\.ts: not loaded, .* add --trust-model; \.onnx"
    ):
        ExportedModel(model)


@pytest.mark.parametrize("inner", [False, True], ids=["of the graph", "of a branch"])
def test_onnx_weights_in_other_files_are_not_read(inner, tmp_path):
    from onnx import TensorProto, helper

    tensor = TensorProto(name="secret", data_type=TensorProto.FLOAT, dims=[1])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/shadow")
    output = helper.make_tensor_value_info("secret", TensorProto.FLOAT, [1])
    graph = helper.make_graph([], "weights", [], [output], [tensor])
    if inner:
        condition = helper.make_tensor("condition", TensorProto.BOOL, [], [True])
        node = helper.make_node("If", ["condition"], ["y"], then_branch=graph, else_branch=graph)
        graph = helper.make_graph([node], "outer", [], [], [condition])
    path = tmp_path / "model.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    with pytest.raises(
        CheckpointError, match=r"weights 'secret' from another file, '\.\./\.\./etc"
    ):
        exported.refuse_external_data(path)


def test_openvino_reads_no_other_format_under_its_name(tmp_path):
    path = tmp_path / "model.xml"
    path.write_bytes(b"\x08\x0a\x12\x04onnx")
    with pytest.raises(CheckpointError, match="not an OpenVINO model; expected XML that begins"):
        exported._openvino(path, 1)


def test_openvino_models_may_be_dropped_in_any_order(ckpt, tmp_path):
    """In a process of its own: what goes wrong kills the process at its next signal."""
    assert export.main(["--ckpt", str(ckpt), "--format", "openvino", "--out", str(tmp_path)]) == 0
    program = f"""
import os, signal
from utils.exported import ExportedModel
signal.signal(signal.SIGUSR1, lambda *_: print("handled", flush=True))
first, second = (ExportedModel({str(tmp_path / "model.xml")!r}, threads=1) for _ in range(2))
del first
del second
os.kill(os.getpid(), signal.SIGUSR1)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "handled" in done.stdout, done.stderr


def test_another_window_is_refused(model):
    with pytest.raises(
        ValueError, match=r"expected an input \(B, 1, 16, 16, 16\), got \(1, 1, 24, 16, 16\)"
    ):
        ExportedModel(model, trusted=True)(torch.zeros(1, 1, 24, 16, 16))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        ConfigError, match=r"--int8 needs the package onnxruntime .*requirements-export\.txt"
    ):
        exported.optional("onnxruntime", "--int8")


def test_a_model_that_differs_is_not_left_behind(ckpt, tmp_path, monkeypatch):
    common = ["--ckpt", str(ckpt), "--out", str(tmp_path / "out"), "--format", "torchscript"]
    write = export.write

    def wrong(network, *arguments):
        network.up_layer3.conv.weight.mul_(1.1)
        write(network, *arguments)
        network.up_layer3.conv.weight.div_(1.1)

    with monkeypatch.context() as changed:
        changed.setattr(export, "write", wrong)
        with pytest.raises(
            export.ExportError, match=r"differs from PyTorch by .* allowed .* the model was removed"
        ):
            export.main(common)
    assert not (tmp_path / "out").exists()
    export.main(common)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(export, "write", wrong)
    with pytest.raises(export.ExportError):
        export.main(common)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    # the bounds are what stops it
    export.main([*common, "--tolerance", "10", "--min-agreement", "0"])
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} != before


def test_labels_that_differ_are_noticed():
    logits = torch.tensor([[[2.0, 0.0], [1.0, 3.0]]])[..., None]  # (1, 2, 2, 1)
    other = logits.clone()
    other[0, 0, 1] = 4.0
    found = export.difference(logits, other, multilabel=False)
    assert found == {"max_abs_difference": 4.0, "largest": 3.0, "label_agreement": 0.5}
    assert export.difference(logits, -logits, multilabel=True)["label_agreement"] == 0.25


def test_without_the_data_a_generated_scan_serves(workspace, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # where there is no data/
    common = ["--ckpt", str(workspace / RUN / "best.pt"), "--format", "torchscript", "--out", "out"]
    export.main(common)
    printed = capsys.readouterr()
    assert (
        "model.ts, a generated scan" in printed.out
        and "checking on a generated scan" in printed.err
    )
    scan = workspace / "data/imagesTr/case2.nii.gz"
    export.main([*common, "--input", str(scan)])
    assert "model.ts, the scan of --input" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no such data list"):
        export.main([*common, "--data-root", "elsewhere"])
    with pytest.raises(ValueError, match=r"nothing.nii.gz: no such file"):
        export.main([*common, "--input", "nothing.nii.gz"])


OWN = """
from torch import nn
from networks import SegOutput


class Own(nn.Module):
    stride = 1

    def __init__(self, in_channels, num_classes):
        super().__init__()
        self.in_channels, self.num_classes, self.feature_channels = in_channels, num_classes, {}
        self.conv = nn.Conv3d(in_channels, num_classes, 3, padding=1)

    def forward(self, image, return_features=False):
        logits = self.conv(image)
        return SegOutput(logits, {}) if return_features else logits
"""


def test_a_network_of_ones_own(workspace, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(workspace)
    (workspace / "own.py").write_text(OWN)
    train(
        "--method", "supervised", "--student", "own.py:Own", "--opts", "max_steps=2", cwd=workspace
    )
    common = [
        "--ckpt",
        "runs/tiny/supervised/Own/seed0/best.pt",
        "--format",
        "torchscript",
        "--out",
        str(tmp_path),
    ]
    with pytest.raises(CheckpointError, match=r"--plugin .*own\.py:Own"):
        export.main(common)
    export.main([*common, "--plugin", "own.py:Own"])
    assert "100.0000 % of labels agree" in capsys.readouterr().out
    (workspace / "own.py").unlink()  # the model has it
    path = str(tmp_path / "model.ts")
    run(
        "predict_3d.py",
        "--model",
        path,
        "--trust-model",
        "--input",
        "data/imagesTr/case6.nii.gz",
        "--output",
        str(tmp_path / "out"),
        cwd=workspace,
    )
    assert (tmp_path / "out/case6.nii.gz").is_file()


def test_other_checkpoints_are_refused(tmp_path):
    atomic_save({"kind": "3d"}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint of the training scripts"):
        export.main(["--ckpt", str(tmp_path / "x.pt"), "--format", "onnx"])


@pytest.mark.parametrize(
    "form, network, classes, patch, extra",
    [
        ("acdc", "unet2d", ["background", "a", "b"], [32, 48], {"eval_batch": 4}),
        ("images2d", "unet2d", ["background", "lesion"], [32, 32], {"eval_batch": 4}),
        (
            "la",
            "vnet",
            ["background", "atrium"],
            [32, 32, 16],
            {"stride": [16, 24, 8], "window_batch": 2},
        ),
    ],
)
def test_networks_of_few_labels(form, network, classes, patch, extra, tmp_path, capsys):
    built = semi_checkpoint(tmp_path / "best.pt", form, network, classes, patch, **extra)
    export.main(["--ckpt", str(tmp_path / "best.pt"), "--format", "torchscript"])
    assert "model.ts, a generated scan" in capsys.readouterr().out
    model = ExportedModel(tmp_path / "export/model.ts", trusted=True)
    image = torch.randn(3, built.in_channels, *patch)
    with torch.inference_mode():
        torch.testing.assert_close(model(image), built(image), rtol=0, atol=1e-4)
    if form == "images2d":
        isic = deployed.phantom_files(model.description, tmp_path)[0]
        for which in ("--ckpt best.pt", "--model export/model.ts --trust-model"):
            flag, *file = which.split()
            run(
                "predict_2d.py",
                flag,
                *file,
                "--input",
                str(isic),
                "--output",
                flag[2:],
                cwd=tmp_path,
            )
        masks = [(tmp_path / flag / "phantom.png").read_bytes() for flag in ("ckpt", "model")]
        assert masks[0] == masks[1]
    card = (tmp_path / "export/model_card.md").read_text()
    assert "crkd" in card and f"predict_{len(patch)}d.py" in card


def test_prediction_refuses_what_a_model_cannot_do(model, workspace):
    common = (
        "predict_3d.py",
        "--model",
        str(model),
        "--trust-model",
        "--input",
        "data/imagesTr",
        "--output",
        "none",
    )
    for flags in (("--fast",), ("--amp", "bf16")):
        result = run(*common, *flags, cwd=workspace, ok=False)
        assert "error: --fast, --amp: model.ts has the precision of its export" in result.stderr
    result = run("predict_2d.py", *common[1:], cwd=workspace, ok=False)
    assert "not a network of train_2d_crkd.py; for 3D ones use predict_3d.py" in result.stderr


@pytest.mark.slow
def test_int8(ckpt, tmp_path, capsys):  # of OpenVINO: tests/benchmarks/test_deployment.py
    common = [
        "--ckpt",
        str(ckpt),
        "--format",
        "onnx",
        "--int8",
        "--calibration",
        "6",
        "--out",
        str(tmp_path),
    ]
    export.main([*common, "--max-dice-cost", "0.1"])
    printed = capsys.readouterr().out
    path = tmp_path / "model_int8.onnx"
    assert "1 test cases: mean Dice" in printed and "which costs" in printed
    model = ExportedModel(path)
    checks = model.description["exported"]["checks"]
    assert model.description["exported"]["precision"] == "int8"
    assert checks["dice"]["cost"] == pytest.approx(checks["dice"]["float"] - checks["dice"]["int8"])
    assert 0 < checks["windows"]["max_abs_difference"]  # it is another model
    assert checks["case"]["label_agreement"] > 0.97
    assert "int8 costs" in (tmp_path / "model_card.md").read_text()
    operators = {node.op_type for node in exported.optional("onnx", "test").load(path).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators
    bounds = export.parse_args([*common, "--max-dice-cost", "0.01"])
    export.enforce(bounds, "x", checks | {"dice": {"cost": 0.0099}})
    for cost in (0.0101, float("nan")):
        with pytest.raises(
            export.ExportError, match=r"more than --max-dice-cost 0\.01; the model was removed"
        ):
            export.enforce(bounds, "x", checks | {"dice": {"cost": cost}})


def monai(*arguments, cwd):
    command = [sys.executable, "-m", "monai.bundle", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_monai_bundle(ckpt, workspace, tmp_path, capsys):
    export.main(["--ckpt", str(ckpt), "--format", "monai_bundle", "--out", str(tmp_path)])
    assert "bundle, run by MONAI on the first case of the test list" in capsys.readouterr().out
    folder = tmp_path / "bundle"
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "configs/inference.json",
        "configs/metadata.json",
        "docs/README.md",
        "docs/metadata_schema.json",
        "models/model.ts",
        "models/model.ts.json",
    }

    verify = (
        "verify_metadata",
        "--meta_file",
        "configs/metadata.json",
        "--filepath",
        "docs/metadata_schema.json",
    )
    result = monai(*verify, cwd=folder)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "metadata is verified with no error" in result.stdout + result.stderr
    metadata = json.loads((folder / "configs/metadata.json").read_text())
    del metadata["network_data_format"]["inputs"]["image"]["dtype"]
    spoilt = tmp_path / "spoilt"
    shutil.copytree(folder, spoilt)
    (spoilt / "configs/metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match="'dtype' is a required property"):
        monai_bundle.verify_metadata(spoilt)

    # From inside the bundle, on scans in two orientations, with nothing of ours on the path
    result = monai(
        "run",
        "--config_file",
        "configs/inference.json",
        "--dataset_dir",
        workspace / "data/imagesTr",
        "--output_dir",
        tmp_path / "labels",
        cwd=folder,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    made = sorted(path.name for path in (tmp_path / "labels").iterdir())
    assert made == [f"case{k}.nii.gz" for k in range(7)]
    run("test_3d.py", "--ckpt", str(ckpt), "--out", str(tmp_path / "tested"), cwd=workspace)
    ours, theirs = (
        nib.load(tmp_path / part / "case6.nii.gz") for part in ("tested/predictions", "labels")
    )
    np.testing.assert_allclose(ours.affine, theirs.affine, atol=1e-5)
    ours, theirs = np.asarray(ours.dataobj), np.asarray(theirs.dataobj)
    assert len(np.unique(ours)) > 1
    assert (ours == theirs).mean() > 0.9999


@pytest.mark.slow
def test_bundle_of_regions(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    entries = [write_case(tmp_path / "data", f"case{k}", rng) for k in range(3)]
    lists = {"training": entries[:1], "validation": entries[1:2], "test": entries[2:]}
    (tmp_path / "data/dataset_0.json").write_text(json.dumps(lists))
    names = ["tumour core", "whole tumour", "enhancing tumour"]
    network = build_network("unet", 4, 3, channels=[2, 4, 4, 8])
    nn.init.constant_(network.up_layer3.conv.bias, 0.02)  # or hardly any voxel were in a region
    atomic_save(
        {
            "kind": "3d",
            "class_names": names,
            "code": "test",
            "step": 2,
            "network": {
                "name": "unet",
                "in_channels": 4,
                "num_classes": 3,
                "arguments": {"channels": [2, 4, 4, 8]},
            },
            "config": {
                "dataset": "tiny",
                "method": "supervised",
                "preset": "clean",
                "seed": 0,
                "max_steps": 2,
                "overlap": 0.5,
                "patch_size": [16, 16, 16],
                "tag": "",
                "window_batch": 2,
            },
            "dataset": {
                "format": "brats",
                "root": "data",
                "datalist": "dataset_0.json",
                "class_names": names,
            },
            "cases": {"train": ["case0"], "val": ["case1"], "test": ["case2"]},
            "weights": network.state_dict(),
        },
        tmp_path / "best.pt",
    )
    monkeypatch.chdir(tmp_path)
    export.main(["--ckpt", "best.pt", "--format", "monai_bundle", "--min-agreement", "1"])
    assert "100.0000 % of the file's voxels labelled as PyTorch does" in capsys.readouterr().out
    text = (tmp_path / "export/bundle/docs/README.md").read_text()
    assert "the regions may overlap" in text and "t1c, t1n, t2f, t2w" in text


@pytest.mark.slow
def test_bundle_of_few_labels(tmp_path, capsys):
    extra = {"stride": [16, 24, 8], "window_batch": 2}
    semi_checkpoint(
        tmp_path / "best.pt", "la", "vnet", ["background", "atrium"], [32, 32, 16], **extra
    )
    export.main(["--ckpt", str(tmp_path / "best.pt"), "--format", "monai_bundle"])
    assert "bundle, run by MONAI on a generated scan: " in capsys.readouterr().out


def test_bundles_are_for_volumes(tmp_path):
    with pytest.raises(ConfigError, match="bundles are for 3D networks"):
        monai_bundle.check_supported({"kind": "2d-semi", "config": {"patch_size": [32, 32]}})


def test_flags_of_some_formats(capsys):
    for flags, expected in (
        (["--int8"], "--int8 is for --format onnx and openvino"),
        (["--plans", "folder"], "--plans is for --format nnunet, not torchscript"),
    ):
        with pytest.raises(SystemExit):
            export.parse_args(["--ckpt", "x.pt", "--format", "torchscript", *flags])
        assert expected in capsys.readouterr().err


def test_the_command_line_reports_errors(tmp_path):
    result = run("tools/export.py", "--ckpt", "none.pt", "--format", "onnx", cwd=tmp_path, ok=False)
    assert result.returncode == 1 and "error: none.pt: no such checkpoint" in result.stderr
