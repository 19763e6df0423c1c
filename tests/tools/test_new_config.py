"""The configuration that tools/new_config.py writes: what it chooses, that it trains, and what it
refuses.
"""

import itertools
import json

import nibabel as nib
import numpy as np
import pytest
import yaml

from tests.scripts.conftest import run
from tools import make_demo_data, new_config
from utils.checkpoint import load_checkpoint

SMALL = (
    "max_steps=2",
    "val_interval=2",
    "workers=0",
    "log_interval=1",
    "network_args={resunet: {channels: [2, 2, 4, 4]}, unet: {channels: [2, 2, 4, 4]}}",
)


def make(folder, dataset, layout):
    make_demo_data.main(
        [
            "--dataset",
            dataset,
            "--layout",
            layout,
            "--out",
            str(folder / "data"),
            "--cases",
            "5",
            "--shape",
            "36",
            "36",
            "24",
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "dataset, layout", [("btcv", "decathlon"), ("btcv", "nnunet"), ("brats21", "nnunet")]
)
def test_what_is_written_trains_and_tests(tmp_path, dataset, layout):
    make(tmp_path, dataset, layout)
    written = run(
        "tools/new_config.py",
        "--data",
        "data",
        "--out",
        "configs/mine.yaml",
        "--networks",
        "resunet",
        "unet",
        "--max-voxels",
        "16384",
        cwd=tmp_path,
    )
    values = yaml.safe_load((tmp_path / "configs/mine.yaml").read_text())
    assert "class_names" not in values
    assert all(side % 8 == 0 for side in values["patch_size"])
    assert np.prod(values["patch_size"]) <= 16384
    assert (values["format"], values["dataset"]) == (
        "nnunet" if layout == "nnunet" else "msd",
        "mine",
    )
    assert "patch_size" in written.stdout
    for flags in (("--method", "supervised", "--student", "resunet"), ("--teacher", "resunet")):
        run(
            "train_3d_distill.py",
            "--config",
            "configs/mine.yaml",
            *flags,
            "--opts",
            *SMALL,
            cwd=tmp_path,
        )
    folder = tmp_path / "runs/mine/acf_bckd/resunet-unet/seed0"
    run("test_3d.py", "--ckpt", str(folder / "best.pt"), cwd=tmp_path)
    # What the configuration leaves to the data set is stored, and prediction does without it.
    stored = yaml.safe_load((folder / "config.yaml").read_text())
    regions = ["whole tumour", "tumour core", "enhancing tumour"]
    assert stored["class_names"][:2] == (
        regions[:2] if dataset == "brats21" else ["background", "spleen"]
    )
    assert stored["in_channels"] == (4 if dataset == "brats21" else 1)
    assert load_checkpoint(folder / "best.pt")["class_names"] == stored["class_names"]
    data = tmp_path / "data"
    if layout == "nnunet":
        (data / "dataset.json").unlink()
        run(
            "predict_3d.py",
            "--ckpt",
            str(folder / "best.pt"),
            "--input",
            "data/imagesTs",
            "--output",
            "out",
            cwd=tmp_path,
        )
        (case,) = (tmp_path / "out").glob("*.nii.gz")
        expected = np.asarray(nib.load(folder / "predictions" / case.name).dataobj)
        assert np.array_equal(np.asarray(nib.load(case).dataobj), expected)


def write(
    folder,
    count=6,
    shape=(20, 24, 10),
    affine=(1.0, 1.0, 1.0),
    low=0,
    label=(40.0, 60.0),
    **content,
):
    """A decathlon data set of `count` cases; intensities from `low` on, those of a labelled block
    within `label`.
    """
    rng = np.random.default_rng(0)
    entries = []
    for k in range(count):
        mask = np.zeros(shape, np.uint8)
        mask[4:12, 4:12, 2:6] = 1
        image = np.where(mask, rng.uniform(*label, shape), rng.uniform(low, 100, shape)).astype(
            np.float32
        )
        image[0, 0, 0] = low
        for part, voxels in (("images", image), ("labels", mask)):
            (folder / part).mkdir(parents=True, exist_ok=True)
            nib.save(
                nib.Nifti1Image(voxels, np.diag([*affine, 1.0])), folder / part / f"c{k}.nii.gz"
            )
        entries.append({"image": f"images/c{k}.nii.gz", "label": f"labels/c{k}.nii.gz"})
    known = {"labels": {"0": "background", "1": "left lung"}, "training": entries}
    (folder / "dataset.json").write_text(json.dumps(known | content))


def written(tmp_path, monkeypatch, *arguments):
    monkeypatch.chdir(tmp_path)
    assert (
        new_config.main(["--data", "data", "--out", "mine.yaml", "--networks", "unet", *arguments])
        == 0
    )
    return yaml.safe_load((tmp_path / "mine.yaml").read_text())


def test_computed_tomography(tmp_path, monkeypatch, capsys):
    write(tmp_path / "data", low=-1000)  # no modality named, but air
    values = written(tmp_path, monkeypatch)
    assert values["intensity"] == "window"
    assert values["window"] == [40.0, 60.0]
    assert values["crop_foreground"] is True
    assert values["flip_prob"] == 0.0  # left
    assert (tmp_path / "splits/mine/train.txt").read_text().count("c") >= 4
    lists = [
        (tmp_path / f"splits/mine/{name}.txt").read_text().split("\n")[1:-1]
        for name in ("train", "val", "test")
    ]
    assert [len(names) for names in lists] == [4, 1, 1]
    assert sorted(itertools.chain(*lists)) == [f"c{k}" for k in range(6)]
    text = capsys.readouterr().out
    assert "CT (6 of 6 scans go below -200)" in text
    assert "drawn with seed 0: 4 train, 1 val, 1 test" in text


def test_gas_in_soft_tissue_does_not_set_the_window(tmp_path, monkeypatch):
    write(tmp_path / "data", low=-1000, modality={"0": "CT"})
    path = tmp_path / "data/images/c0.nii.gz"
    image = nib.load(path)
    voxels = np.asarray(image.dataobj).copy()
    voxels[4:12, 4:12, 2] = -950
    nib.save(nib.Nifti1Image(voxels, image.affine), path)
    assert written(tmp_path, monkeypatch)["window"] == [-200.0, 60.0]


@pytest.mark.parametrize("content", [{"modality": {"0": "MRI"}}, {"modality": "T2 FLAIR"}, {}])
def test_other_images_are_z_scored(tmp_path, monkeypatch, content):
    write(tmp_path / "data", **content)
    values = written(tmp_path, monkeypatch, "--seed", "3")
    assert (values["intensity"], values["crop_foreground"]) == ("zscore", False)
    assert "window" not in values


def test_spacing_patch_and_batch(tmp_path, monkeypatch):
    write(tmp_path / "data", shape=(80, 80, 12), affine=(1.0, 1.0, 5.0))
    values = written(tmp_path, monkeypatch, "--networks", "unet", "lcovnet")  # strides 8 and 16
    assert values["spacing"] == [1.0, 1.0, 5.0]
    assert values["patch_size"] == [80, 80, 16]
    assert (values["crop"], values["rot90_prob"]) == ("uniform", 0.2)
    (tmp_path / "mine.yaml").unlink()
    # lists that are there are used
    values = written(tmp_path, monkeypatch, "--max-voxels", "40000")
    assert values["patch_size"] == [64, 64, 8]
    assert (values["crop"], values["cases_per_batch"], values["crops_per_case"]) == (
        "pos_neg",
        1,
        4,
    )
    (tmp_path / "mine.yaml").unlink()
    small = written(tmp_path, monkeypatch, "--device-memory", "0.03")
    assert np.prod(small["patch_size"]) < 64 * 64 * 8
    (tmp_path / "mine.yaml").unlink()
    least = written(tmp_path, monkeypatch, "--device-memory", "0.001")["patch_size"]
    assert least == [16, 16, 8]  # one voxel in the deepest layer would be too few
    (tmp_path / "mine.yaml").unlink()
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        written(tmp_path, monkeypatch, "--patch", "8", "8", "8", "--networks", "resunet")
    assert not (tmp_path / "mine.yaml").exists()
    assert written(tmp_path, monkeypatch, "--patch", "32", "16", "8")["patch_size"] == [32, 16, 8]


def test_rule_for_coarse_axes():
    def scans(depths, shape):
        return [
            {"spacing": np.array([1.0, 1.0, depth]), "shape": np.array(shape)} for depth in depths
        ]

    depths = [5.0] * 2 + [8.0] * 8
    assert new_config.choose_spacing(scans(depths, (100, 100, 20)))[0] == [1.0, 1.0, 5.0]
    # enough slices
    assert new_config.choose_spacing(scans(depths, (100, 100, 60)))[0] == [1.0, 1.0, 8.0]
    # not so coarse
    assert new_config.choose_spacing(scans([2.0, 3.0, 4.0], (100, 100, 20)))[0] == [1.0, 1.0, 3.0]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--data", "absent"), "absent: no such folder"),
        (("--data", "empty"), "no dataset.json; expected one JSON"),
        (("--out", "there.yaml"), "there.yaml: exists already"),
        (("--patch", "30", "32", "32"), "unet take multiples of 8"),
        (("--format", "nnunet"), "style of nnU-Net v1 and the decathlon|'channel_names' is None"),
    ],
)
def test_refused(tmp_path, monkeypatch, arguments, message):
    write(tmp_path / "data", count=3)
    (tmp_path / "empty").mkdir()
    (tmp_path / "there.yaml").touch()
    with pytest.raises(ValueError, match=message):
        written(tmp_path, monkeypatch, *arguments)
    assert not (tmp_path / "splits").exists()


def test_faulty_scans_are_listed(tmp_path, monkeypatch):
    write(tmp_path / "data", count=4)
    for k in (1, 2):
        (tmp_path / f"data/labels/c{k}.nii.gz").write_bytes(b"x")
    with pytest.raises(
        ValueError, match=r"(?s)2 of 4 scans cannot be used:.*c1.nii.gz: unreadable.*c2.nii.gz"
    ):
        written(tmp_path, monkeypatch)
