"""Ours beside nnU-Net v2 itself: its plans, its preprocessing, its predictor. Needs nnunetv2
(requirements-nnunet.txt), and is left out where that is not installed.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml

from dataloaders import build_dataset, describe_dataset
from networks.nnunet import NnUNet, NnUNetTeacher, own_weights
from tests.nnunet_folders import LABELS, REGIONS, write_raw
from tests.scripts.conftest import run
from utils import nnunet
from utils.checkpoint import load_network_weights
from utils.run import plain

pytestmark = pytest.mark.slow

# number of the data set -> what is special about it
KINDS = {
    # the coarse axis is not the one that nnU-Net reads first, so that it transposes
    801: {"channels": ("CT",), "shape": (16, 34, 38), "spacing": (4.0, 1.0, 1.0)},
    # two channels in a field of zeros: masked z-score, about the same voxels along all axes
    802: {"channels": ("T1", "T2"), "shape": (30, 34, 36), "spacing": (1.0, 1.1, 1.2)},
    803: {
        "channels": ("MRI",),
        "shape": (34, 36, 14),
        "spacing": (1.0, 1.0, 3.5),
        "labels": REGIONS,
    },
    804: {"channels": ("rescale_to_0_1",), "shape": (30, 34, 36), "spacing": (1.0, 1.0, 1.0)},
}
PLANNERS = {801: "ExperimentPlanner", 802: "nnUNetPlannerResEncM", 803: "ExperimentPlanner"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Kind -> raw folder and results folder, trained for one step by nnU-Net; two folds of 801."""
    pytest.importorskip("nnunetv2")
    root = tmp_path_factory.mktemp("nnunet")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            patch.setenv(name, str(root / name))
        patch.setenv("nnUNet_n_proc_DA", "1")
        patch.setenv("nnUNet_compile", "f")
        yield {number: train(root, number) for number in KINDS}


def train(root, number):
    from batchgenerators.utilities.file_and_folder_operations import load_json
    from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import (
        ExperimentPlanner,
    )
    from nnunetv2.experiment_planning.experiment_planners.residual_unets import (
        residual_encoder_unet_planners,
    )
    from nnunetv2.experiment_planning.plan_and_preprocess_api import (
        extract_fingerprint_dataset,
        plan_experiment_dataset,
        preprocess_dataset,
    )
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    name = f"Dataset{number}_Test"
    os.environ["nnUNet_n_proc_DA"] = "1"  # threads of the planner
    raw = write_raw(root / "nnUNet_raw" / name, **{"labels": LABELS} | KINDS[number])
    extract_fingerprint_dataset(number, num_processes=1)
    residual = PLANNERS.get(number) == "nnUNetPlannerResEncM"
    planner = residual_encoder_unet_planners.nnUNetPlannerResEncM if residual else ExperimentPlanner
    plans_name = plan_experiment_dataset(number, planner)[1]
    preprocess_dataset(number, plans_name, ("3d_fullres",), num_processes=(1,))
    folder = root / "nnUNet_preprocessed" / name
    plans = load_json(str(folder / f"{plans_name}.json"))
    os.environ["nnUNet_n_proc_DA"] = "0"  # processes of the trainer
    for fold in (0, 1) if number == 801 else (0,):
        trainer = nnUNetTrainer(
            plans | {"continue_training": False},
            "3d_fullres",
            fold,
            load_json(str(raw / "dataset.json")),
            torch.device("cpu"),
        )
        trainer.num_epochs = trainer.num_iterations_per_epoch = (
            trainer.num_val_iterations_per_epoch
        ) = 1
        trainer.run_training()
    (results,) = (root / "nnUNet_results" / name).iterdir()
    return raw, results


def predictor_of(results, folds):
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(
        use_gaussian=False,
        use_mirroring=False,
        perform_everything_on_device=False,
        device=torch.device("cpu"),
    )
    predictor.initialize_from_trained_model_folder(str(results), folds, "checkpoint_final.pth")
    return predictor


def teacher_of(results, folds):
    found = nnunet.read_results(results)
    outputs = found.outputs(list(found.classes), "test")
    networks = []
    for fold in folds:
        weights, mirrored = nnunet.load_fold(found, fold)
        network = NnUNet(found.in_channels, len(outputs), **found.network)
        load_network_weights(network, own_weights(weights, network), "test")
        networks.append(network)
    return NnUNetTeacher(networks, outputs, mirrored).eval(), found


@pytest.mark.parametrize("number", [801, 802, 803])
def test_logits_are_those_of_the_predictor(trained, number):
    _, results = trained[number]
    folds = ("0", "1") if number == 801 else ("0",)
    teacher, found = teacher_of(results, folds)
    predictor = predictor_of(results, tuple(map(int, folds)))
    image = torch.randn(found.in_channels, *found.patch_size)  # one window
    turned = image.permute(0, *(1 + axis for axis in found.network["axes"])).contiguous()
    network, total = predictor.network.eval(), 0
    with torch.no_grad():
        for weights in predictor.list_of_parameters:
            network.load_state_dict(weights)
            total = total + network(turned[None])[0]
        ours = teacher(image[None])[0].permute(0, *(1 + axis for axis in found.network["axes"]))
    theirs = total / len(folds)
    difference = (theirs - ours).abs().max().item()
    print(f"{number}: logits differ by at most {difference:.2e}")
    assert theirs.std() > 1e-3
    assert difference < 1e-5
    # its windows are kept in half precision
    windows = predictor.predict_logits_from_preprocessed_data(turned)
    assert torch.allclose(windows.float(), ours, rtol=2**-10, atol=2**-10)
    theirs = sum(parameter.numel() for parameter in predictor.network.parameters())
    lower = [
        parameter.numel()
        for name, parameter in predictor.network.named_parameters()
        if name.startswith("decoder.seg_layers")
        and not name.startswith(f"decoder.seg_layers.{len(teacher.folds[0].decoder.stages) - 1}.")
    ]
    ours = sum(parameter.numel() for parameter in teacher.folds[0].parameters())
    assert ours == theirs - sum(lower)


@pytest.mark.parametrize("number", KINDS)
def test_preprocessing_is_that_of_the_preprocessor(trained, number, tmp_path):
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

    raw, results = trained[number]
    predictor = predictor_of(results, (0,))
    found = nnunet.read_results(results)
    told = describe_dataset("nnunet", str(raw), "dataset.json", {})
    dataset = build_dataset(
        "nnunet",
        root=str(raw),
        datalist="dataset.json",
        cache_dir=str(tmp_path / "cache"),
        **told,
        **found.preprocessing,
    )
    back = [1 + found.network["axes"].index(axis) for axis in range(3)]
    assert (found.network["axes"] != [2, 1, 0]) >= (number == 801)  # transposed
    for case in dataset.cases():
        data, label, _ = DefaultPreprocessor(verbose=False).run_case(
            [str(path) for path in case.images],
            str(case.label),
            predictor.plans_manager,
            predictor.configuration_manager,
            predictor.dataset_json,
        )
        sample = dataset.preprocess(case)
        theirs = data.transpose(0, *back)
        assert sample["image"].shape == theirs.shape
        difference = np.abs(sample["image"] - theirs).max()
        print(f"{number} {case.name}: images differ by at most {difference:.2e}")
        assert difference < 1e-4
        ids = dataset.encode_label(np.maximum(label.transpose(0, *back), 0).astype(np.uint8))
        assert np.array_equal(ids, sample["label"])


def run_nnunet(command, *flags):
    """Run a command of nnU-Net on the CPU, with as few processes as it can."""
    program = Path(sys.executable).with_name(command)
    few = ("-device", "cpu", "-npp", "1", "-nps", "1", "-f", "0")
    result = subprocess.run([program, *map(str, flags), *few], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


def agreement(found, expected, pattern):
    """Smallest share of voxels with the same label, of the segmentations of a name."""
    shares = []
    for path in sorted(expected.glob(pattern)):
        ours = np.asarray(nib.load(path).dataobj)
        theirs = np.asarray(nib.load(found / path.name).dataobj)
        assert ours.shape == theirs.shape and len(np.unique(ours)) > 1
        shares.append((ours == theirs).mean())
    return min(shares)


def write_scans(found, raw, folder):
    """Two scans of `raw` as they are, and as `fit_0`, `fit_1` such that are predicted alike: they
    claim the voxels of the plans, so that they are not resampled, have no zeros around, and are no
    larger than a window. What a side lacks of it is even, so that mirrors leave it in the middle.
    """
    folder.mkdir()
    for path in sorted((raw / "imagesTr").glob("case_[01]_*.nii.gz")):
        shutil.copy(path, folder)
        image, place = nib.load(path).get_fdata(), []
        for axis, side in enumerate(found.patch_size):
            others = tuple(k for k in range(3) if k != axis)
            used = np.flatnonzero(image.any(others))
            length = min(len(used), side)
            length -= (side - length) % 2
            place.append(slice(used[0], used[0] + length))
        image = image[tuple(place)].astype(np.float32)
        name = path.name.replace("case", "fit")
        nib.save(nib.Nifti1Image(image, np.diag([*found.spacing, 1.0])), folder / name)
    return folder


@pytest.mark.parametrize("number", [801, 802, 803])
def test_students_predict_there_as_here(trained, number, tmp_path, monkeypatch):
    raw, results = trained[number]
    plan, mirrored = nnunet.read_results(results), number != 803
    narrow = [width // 8 for width in plan.network["features_per_stage"]]
    network = plan.network | {"features_per_stage": narrow}
    values = plan.preprocessing | {
        "dataset": "mine",
        "format": "nnunet",
        "data_root": str(raw),
        "patch_size": plan.patch_size,
        "teacher": "nnunet",
        "teacher_checkpoint": str(results),
        "network_args": {"nnunet": network},
        "crops_per_case": 1,
        "flip_prob": 0.2 if mirrored else 0.0,
        "rot90_prob": 0.0,
        "lr": 0.05,
        "max_steps": 8,
        "val_interval": 8,
        "workers": 0,
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(plain(values)))
    train = ("--config", "mine.yaml", "--method", "supervised", "--student", "nnunet")
    run("train_3d_distill.py", *train, cwd=tmp_path)
    best = ("--ckpt", "runs/mine/supervised/nnunet/seed0/best.pt")
    run("tools/export.py", *best, "--format", "nnunet", "--out", "students", cwd=tmp_path)
    (folder,) = (tmp_path / "students").glob("*/*__*")
    found = nnunet.read_results(folder)
    assert found.network["features_per_stage"] == narrow
    scans = write_scans(found, raw, tmp_path / "scans")

    # nnU-Net mirrors as the checkpoint says: along all axes, or none
    mirrors = ("--tta",) if mirrored else ()
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    where = ("--input", str(scans), "--output", str(ours))
    run("predict_3d.py", *best, *where, *mirrors, cwd=tmp_path)
    command = ("nnUNetv2_predict_from_modelfolder", "-m", folder)
    if number == 801:
        monkeypatch.setenv("nnUNet_results", str(tmp_path / "students"))
        command = ("nnUNetv2_predict", "-d", str(number), "-c", "3d_fullres")
    run_nnunet(*command, "-i", scans, "-o", theirs)
    fit, resampled = (agreement(theirs, ours, f"{name}_*.nii.gz") for name in ("fit", "case"))
    print(f"{number}: {fit:.6f} of voxels labelled alike, {resampled:.6f} where resampled")
    assert fit >= 0.999
