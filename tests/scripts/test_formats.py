"""Each data format in each training script, against scans read and scored by hand."""

import contextlib
import csv
import shutil

import h5py
import nibabel as nib
import numpy as np
import pytest
import torch
from medpy.metric import binary as medpy
from scipy import ndimage

from dataloaders import build_dataset
from inference import predict_labels
from networks import build_network
from tests.scripts.conftest import run, train
from tools.figure import views_of
from utils.checkpoint import load_checkpoint

QUICK = ("diagnose_interval=0", "bn_batches=0", "max_steps=2")
SMALL = (
    "network_args={vnet: {n_filters: 2}, unet2d: {channels: [2, 2, 4, 4, 4]}, "
    "unet: {channels: [2, 4, 4, 8]}}"
)


def few_labels(dims, *options, cwd, ok=True, flags=("--labelled", "2")):
    opts = ("--opts", *QUICK, SMALL, *options)
    script = f"train_{dims}d_crkd.py"
    return run(script, "--config", "tiny.yaml", *flags, *opts, cwd=cwd, ok=ok)


def best(workspace, dims, labelled=2):
    name = {2: "unet2d", 3: "vnet"}[dims]
    return load_checkpoint(workspace / f"runs/tiny/crkd/{name}-{labelled}/seed0/best.pt")


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


def dice(prediction, label):
    scores = []
    for k in (1, 2):
        a, b = prediction == k, label == k
        scores.append(2 * (a & b).sum() / (a.sum() + b.sum()))
    return np.mean(scores)


def scan(workspace, image="imagesTr/case5.nii.gz", label="labelsTr/case5.nii.gz"):
    """The validation case, windowed from 0..100 to 0..1, on its own grid of 2 mm."""
    values = [nib.load(workspace / "data" / file).get_fdata() for file in (image, label)]
    return np.clip(values[0] / 100, 0, 1).astype(np.float32), values[1]


def scored_volume(checkpoint, image, label):
    prediction = predict_labels(
        network_of(checkpoint),
        torch.from_numpy(image[None]),
        patch_size=(16, 16, 16),
        stride=(8, 8, 8),
        window_batch=1,
        probabilities=True,
    )
    return dice(prediction.numpy(), label)


def scored_slices(checkpoint, image, label):
    network, planes = network_of(checkpoint), []
    for z in range(image.shape[2]):
        plane = image[..., z]
        zoom = [16 / side for side in plane.shape]
        seen = ndimage.zoom(plane, zoom, order=0, mode="nearest")
        with torch.no_grad():
            ids = network(torch.from_numpy(seen[None, None])).argmax(1)[0].numpy()
        back = [side / 16 for side in plane.shape]
        planes.append(ndimage.zoom(ids, back, order=0, mode="nearest"))
    return dice(np.stack(planes, -1), label)


def as_nnunet(workspace):
    """The same scans as an nnU-Net raw data set."""
    data, raw = workspace / "data", workspace / "raw"
    for part in ("imagesTr", "labelsTr"):
        (raw / part).mkdir(parents=True)
        for path in sorted((data / part).iterdir()):
            suffix = "_0000" if part == "imagesTr" else ""
            shutil.copy(path, raw / part / f"{path.name[:5]}{suffix}.nii.gz")
    (raw / "dataset.json").write_text(
        '{"channel_names": {"0": "CT"}, "labels": {"background": 0, "ball": 1, "box": 2}, '
        '"file_ending": ".nii.gz"}'
    )
    (raw / "splits_final.json").write_text(
        '[{"train": ["case0", "case1", "case2", "case3", "case4"], "val": ["case5"]}]'
    )
    return ("format=nnunet", "data_root=raw", "datalist=dataset.json")


def test_lists_of_scans_train_with_few_labels(workspace):
    printed = few_labels(3, cwd=workspace).stderr
    assert "cases_per_batch, crops_per_case: for other training scripts, not used here" in printed
    checkpoint = best(workspace, 3)
    assert checkpoint["cases"]["labelled"] == ["case0", "case1"]
    assert checkpoint["cases"]["unlabelled"] == ["case2", "case3", "case4"]
    expected = scored_volume(checkpoint, *scan(workspace))
    assert checkpoint["val"]["dice"] == pytest.approx(expected, abs=1e-6)


def test_slices_of_scans_train_with_few_labels(workspace):
    printed = few_labels(2, cwd=workspace).stderr
    assert "patch_size [16, 16, 16]: slices of [16, 16] across the third axis" in printed
    checkpoint = best(workspace, 2)
    assert checkpoint["cases"]["unlabelled"] == ["case2", "case3", "case4"]
    expected = scored_slices(checkpoint, *scan(workspace))
    assert checkpoint["val"]["dice"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("dims", [2, 3])
def test_nnunet_folders_train_as_the_list_of_the_same_scans_does(workspace, dims):
    few_labels(dims, cwd=workspace)
    first = best(workspace, dims)["weights"]
    few_labels(dims, *as_nnunet(workspace), "tag=raw", cwd=workspace)
    name = {2: "unet2d", 3: "vnet"}[dims]
    second = load_checkpoint(workspace / f"runs/tiny/crkd/{name}-2/seed0-raw/best.pt")["weights"]
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("script", ["distill", "2d"])
def test_hdf5_scans_train_in_every_script(workspace, script):
    """LA's layout of the same scans, with their window as normalisation."""
    for k in range(6):
        names = f"imagesTr/case{k}.nii.gz", f"labelsTr/case{k}.nii.gz"
        image, label = scan(workspace, *names)
        (workspace / f"la/case{k}").mkdir(parents=True)
        with h5py.File(workspace / f"la/case{k}/mri_norm2.h5", "w") as file:
            file["image"], file["label"] = image, label.astype(np.uint8)
    (workspace / "la/train.txt").write_text("case0\ncase1\ncase2\n")
    (workspace / "la/val.txt").write_text("case5\n")
    config = (
        "dataset: tiny\nformat: la\ndata_root: la\nsplit_dir: la\npatch_size: [16, 16, 16]\n"
        "class_names: [background, ball, box]\nworkers: 0\nmax_steps: 2\nlabelled: 2\n"
    )
    (workspace / "tiny.yaml").write_text(config)
    if script == "2d":
        few_labels(2, cwd=workspace)
        checkpoint = best(workspace, 2)
        expected = scored_slices(checkpoint, *scan(workspace))
    else:
        quick = ("--opts", *QUICK, SMALL, "overlap=0.5")
        printed = train("--method", "supervised", "--student", "unet", *quick, cwd=workspace).stderr
        assert "labelled: for other training scripts" in printed
        checkpoint = load_checkpoint(workspace / "runs/tiny/supervised/unet/seed0/best.pt")
        assert checkpoint["cases"]["labelled"] == ["case0", "case1", "case2"]
        image, label = scan(workspace)
        logits = predict_labels(
            network_of(checkpoint),
            torch.from_numpy(image[None]),
            patch_size=(16, 16, 16),
            overlap=0.5,
            window_batch=1,
        )
        expected = dice(logits.numpy(), label)
        ckpt = "runs/tiny/supervised/unet/seed0/best.pt"
        printed = run("test_3d.py", "--ckpt", ckpt, cwd=workspace).stdout
        assert "(voxels)" in printed and " mm" not in printed  # the files know no size
    assert checkpoint["val"]["dice"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("protocol", ["clean", "published"])
@pytest.mark.parametrize("dims", [2, 3])
def test_scans_are_predicted_and_scored_on_the_grid_of_the_file_in_mm(workspace, dims, protocol):
    few_labels(dims, "spacing=[3.0,2.5,2.5]", "max_steps=6", "lr=0.05", cwd=workspace)
    name = {2: "unet2d", 3: "vnet"}[dims]
    folder = workspace / f"runs/tiny/crkd/{name}-2/seed0"
    ckpt = str(folder / "best.pt")
    arguments = ("--ckpt", ckpt, "--input", "data/imagesTr/case6.nii.gz", "--output", "out")
    run(f"predict_{dims}d.py", *arguments, cwd=workspace)
    stored = nib.load(workspace / "data/imagesTr/case6.nii.gz")  # LPS, 2 mm
    found = nib.load(workspace / "out/case6.nii.gz")
    np.testing.assert_allclose(found.affine, stored.affine)
    printed = run(f"test_{dims}d.py", "--ckpt", ckpt, "--protocol", protocol, cwd=workspace).stdout
    assert "(mm)" in printed and "voxels of" not in printed
    suffix = "_published" if protocol == "published" else ""
    scored = nib.load(folder / f"predictions{suffix}/case6.nii.gz")
    np.testing.assert_allclose(scored.affine, stored.affine)
    assert np.array_equal(scored.get_fdata(), found.get_fdata())

    label = nib.load(workspace / "data/labelsTr/case6.nii.gz").get_fdata()
    with (folder / f"metrics{suffix}.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["case"] == "case6"]
    assert [row["class"] for row in rows] == ["ball", "box"]
    measured = 0
    for k, row in enumerate(rows, 1):
        pair = scored.get_fdata() == k, label == k
        both = 2 * (pair[0] & pair[1]).sum() / (pair[0].sum() + pair[1].sum())
        assert float(row[f"dice_{protocol}"]) == pytest.approx(both, rel=1e-5)
        if pair[0].any():
            measured += 1
            for key, function in (("hd95_pooled", medpy.hd95), ("asd_one_sided", medpy.asd)):
                distance = function(*pair, voxelspacing=(2.0, 2.0, 2.0))
                assert float(row[f"{key}_mm_{protocol}"]) == pytest.approx(distance, rel=1e-5)
        longest = 2 * np.linalg.norm(label.shape)
        assert float(row["diagonal_mm"]) == pytest.approx(longest, rel=1e-5)
    assert measured
    if protocol == "clean":  # a picture of that grid, not of the network's
        run("tools/figure.py", str(folder), "--case", "case6", "--out", "f.png", cwd=workspace)
        with contextlib.chdir(workspace):
            views = views_of(load_checkpoint(folder / "best.pt"), [folder / "predictions"], "case6")
        shape = label.shape[1::-1]
        factor = views.pictures[0].shape[0] // shape[0]  # enlarged by a whole number
        enlarged = (factor * shape[0], factor * shape[1], 3)
        assert factor > 1 and [picture.shape for picture in views.pictures] == [enlarged] * 3
        scores = [float(row["dice_clean"]) for row in rows]
        assert views.dice == [pytest.approx(np.mean(scores), rel=1e-5)]


@pytest.mark.parametrize("dims", [2, 3])
def test_views_of_an_unlabelled_scan_do_not_depend_on_its_label(workspace, dims):
    dataset = build_dataset(
        "msd",
        root=str(workspace / "data"),
        datalist="dataset_0.json",
        class_names=("background", "ball", "box"),
        cache_dir=str(workspace / "cache"),
        patch_size=(8, 8, 8)[:dims],
        flip_prob=0.5,
        rot90_prob=0.5,
    )
    sample = dict(dataset.sample(dataset.splits(2)["unlabelled"][0]))
    other = sample | {"label": 1 - np.minimum(sample["label"], 1), "foreground": np.zeros(0, int)}
    for seed in range(10):
        first, second = (dataset.views(s, np.random.default_rng(seed), 2) for s in (sample, other))
        assert all(np.array_equal(first[k], second[k]) for k in ("weak", "strong0", "strong1"))
        # a mirror or a turn moves the label with the image: where the ball is, it is bright
        assert first["weak"].shape == first["label"].shape == (1, *(8, 8, 8)[:dims])


@pytest.mark.parametrize("dims", [2, 3])
def test_regions_are_refused_with_a_reason(workspace, dims):
    options = ("format=brats", "class_names=[a, b, c]", "in_channels=4", "crop=uniform")
    config = "dataset: tiny\ndata_root: data\npatch_size: [16, 16, 16]\nmax_steps: 2\n"
    (workspace / "tiny.yaml").write_text(config)
    stderr = few_labels(dims, *options, cwd=workspace, ok=False).stderr
    assert "format: brats has regions that overlap" in stderr and "train_3d_distill.py" in stderr
    assert "Traceback" not in stderr and not (workspace / "runs").exists()
