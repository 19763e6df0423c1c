"""The configuration that tools/new_config.py writes: what it chooses, that it trains, and what it
refuses.
"""

import itertools
import json
import re
import shlex
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml

import train_3d_crkd
import train_3d_distill
from dataloaders import build_dataset
from tests.scripts.conftest import run
from tools import make_demo_data, new_config, step_time
from utils.checkpoint import load_checkpoint
from utils.config import ConfigError

SMALL = (
    "max_steps=2",
    "val_interval=2",
    "workers=0",
    "log_interval=1",
    "bn_batches=1",
    "network_args={resunet: {channels: [2, 2, 4, 4]}, unet: {channels: [2, 2, 4, 4]}, "
    "vnet: {n_filters: 2}, unet2d: {channels: [2, 2, 4, 4, 4]}}",
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


def follow(printed, cwd):
    """Run the commands that the tool prints, with small networks and two steps; -> the scripts."""
    scripts = []
    for line in printed.splitlines():
        if line.startswith("  python "):
            script, *arguments = shlex.split(line, comments=True)[1:]
            if script.startswith("train"):
                arguments += SMALL if "--opts" in arguments else ("--opts", *SMALL)
            run(script, *arguments, cwd=cwd)
            scripts.append(script)
    return scripts


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
    scripts = follow(written.stdout, tmp_path)
    expected = [*["train_3d_distill.py"] * 3, *["test_3d.py"] * 3]
    assert scripts == ["tools/check_data.py", *expected, "tools/results_table.py"]
    folder = tmp_path / "runs/mine/acf_bckd/resunet-unet/seed0"
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


@pytest.mark.slow
def test_what_is_written_for_few_labels_trains_and_tests(tmp_path):
    make(tmp_path, "btcv", "decathlon")
    arguments = ("--data", "data", "--out", "configs/mine.yaml", "--max-voxels", "16384")
    written = run("tools/new_config.py", *arguments, "--labelled", "2", cwd=tmp_path)
    values = yaml.safe_load((tmp_path / "configs/mine.yaml").read_text())
    assert (values["format"], values["labelled"]) == ("msd", 2)
    assert all(side % 16 == 0 for side in values["patch_size"])
    assert values["labelled_batch"] == values["unlabelled_batch"] == 2
    assert "cases_per_batch" not in values
    assert "2 labelled, 1 unlabelled, 1 val, 1 test" in written.stdout
    scripts = follow(written.stdout, tmp_path)
    assert scripts[1:4] == [*["train_3d_crkd.py"] * 2, "train_2d_crkd.py"]
    assert scripts[4:] == [*["test_3d.py"] * 2, "test_2d.py", "tools/results_table.py"]
    cases = load_checkpoint(tmp_path / "runs/mine/crkd/vnet-2/seed0/best.pt")["cases"]
    assert (len(cases["labelled"]), len(cases["unlabelled"])) == (2, 1)


@pytest.mark.slow
def test_what_is_written_for_images_trains_and_tests(tmp_path):
    layout = ("--dataset", "kvasir", "--cases", "20", "--shape", "40", "44")
    make_demo_data.main([*layout, "--out", str(tmp_path / "demo")])
    for part in ("images", "masks"):  # one folder of each, without lists
        for split in ("train", "val"):
            shutil.copytree(
                tmp_path / f"demo/{split}/{part}", tmp_path / f"data/{part}", dirs_exist_ok=True
            )
    masks = sorted((tmp_path / "data/masks").iterdir())
    masks[0].unlink()
    arguments = ("--data", "data", "--out", "mine.yaml", "--labelled", "20%")
    written = run("tools/new_config.py", *arguments, cwd=tmp_path)
    values = yaml.safe_load((tmp_path / "mine.yaml").read_text())
    assert (values["format"], values["labelled"]) == ("images2d", 0.2)
    assert values["patch_size"] == [48, 48] and values["class_names"][0] == "background"
    # of 19 with a mask 2 and 4 are held back; the one without is trained on
    lists = [
        (tmp_path / f"splits/mine/{split}.txt").read_text().splitlines()[1:]
        for split in ("train", "val", "test")
    ]
    assert [len(names) for names in lists] == [14, 2, 4] and masks[0].stem in lists[0]
    assert "2 labelled, 12 unlabelled, 2 val, 4 test" in written.stdout
    scripts = follow(written.stdout, tmp_path)
    expected = [*["train_2d_crkd.py"] * 2, *["test_2d.py"] * 2, "tools/results_table.py"]
    assert scripts[1:] == expected


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
    monkeypatch.setattr(step_time, "seconds_of", lambda step, device: 0.5)
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
    assert "drawn with seed 0: 4 labelled, 1 val, 1 test" in text


def test_labelled_and_unlabelled_scans_are_counted_apart(tmp_path, monkeypatch, capsys):
    write(tmp_path / "data", count=7)
    path = tmp_path / "data/dataset.json"
    content = json.loads(path.read_text())
    for k in (1, 4):
        del content["training"][k]["label"]
    path.write_text(json.dumps(content))
    values = written(tmp_path, monkeypatch)
    assert "drawn with seed 0: 3 labelled, 2 unlabelled, 1 val, 1 test" in capsys.readouterr().out
    assert values["max_steps"] == new_config.FEWEST and "labelled" not in values
    (tmp_path / "mine.yaml").unlink()
    (tmp_path / "more").mkdir()
    shutil.copy(tmp_path / "data/images/c4.nii.gz", tmp_path / "more/d.nii.gz")
    few = ("--labelled", "2", "--unlabelled", "more", "--networks", "vnet")
    values = written(tmp_path, monkeypatch, *few)
    assert (values["labelled"], values["unlabelled"]) == (2, "more")
    assert "lists that are there: 2 labelled, 4 unlabelled, 1 val" in capsys.readouterr().out


def test_gas_in_soft_tissue_does_not_set_the_window(tmp_path, monkeypatch):
    write(tmp_path / "data", low=-1000, modality={"0": "CT"})
    path = tmp_path / "data/images/c0.nii.gz"
    image = nib.load(path)
    voxels = np.asarray(image.dataobj).copy()
    voxels[4:12, 4:12, 2] = -950
    nib.save(nib.Nifti1Image(voxels, image.affine), path)
    assert written(tmp_path, monkeypatch)["window"] == [-200.0, 60.0]


def test_a_small_bright_structure_makes_the_window_wider(tmp_path, monkeypatch, capsys):
    names = {"0": "background", "1": "left lung", "2": "stone"}
    write(tmp_path / "data", low=-1000, modality={"0": "CT"}, labels=names)
    for kind, value in (("images", 900.0), ("labels", 2)):
        path = tmp_path / f"data/{kind}/c0.nii.gz"
        image = nib.load(path)
        voxels = np.asarray(image.dataobj).copy()
        voxels[8, 8, 4] = value  # one of more than a thousand labelled voxels
        nib.save(nib.Nifti1Image(voxels, image.affine), path)
    assert written(tmp_path, monkeypatch)["window"] == [40.0, 900.0]
    assert "made wider for stone" in capsys.readouterr().out


def test_scans_are_not_cut_where_that_would_cut_labels(tmp_path, monkeypatch, capsys):
    write(tmp_path / "data", low=-1000, modality={"0": "CT"})
    path = tmp_path / "data/images/c2.nii.gz"
    image = nib.load(path)
    voxels = np.asarray(image.dataobj).copy()
    voxels[:6] = -900.0  # air over the first planes of the label
    nib.save(nib.Nifti1Image(voxels, image.affine), path)
    assert written(tmp_path, monkeypatch)["crop_foreground"] is False
    assert "would cut off labels of 1 scan(s)" in capsys.readouterr().out


def test_the_threshold_that_keeps_all_labels_is_the_highest():
    """Against the boxes of all thresholds."""
    rng = np.random.default_rng(0)
    for _ in range(5):
        image = rng.integers(0, 12, (5, 6, 4)).astype(float)
        labelled = rng.random(image.shape) < 0.05
        labelled[2, 3, 1] = True
        limit = new_config.kept_below(image, labelled)
        for threshold in range(-1, 12):
            inside = np.argwhere(image > threshold)
            keeps = False
            if len(inside):
                first, last = inside.min(0), inside.max(0)
                places = np.argwhere(labelled)
                keeps = bool((places >= first).all() and (places <= last).all())
            assert keeps == (threshold < limit)
    assert new_config.kept_below(image, np.zeros(image.shape, bool)) == np.inf


@pytest.mark.slow
def test_a_step_of_each_script_is_timed_and_scaled_to_the_whole_patch(tmp_path, monkeypatch):
    write(tmp_path / "data", shape=(64, 64, 32))
    small = ("--small", "--patch", "64", "64", "32")
    written(tmp_path, monkeypatch, *small, "--networks", "resunet", "unet")
    (tmp_path / "mine.yaml").rename(tmp_path / "distill.yaml")
    written(tmp_path, monkeypatch, *small, "--labelled", "2", "--networks", "vnet")
    taken = []

    def once(step, device):
        step()  # it runs
        taken.append(device)
        return 0.5

    monkeypatch.setattr(step_time, "seconds_of", once)
    flags = ["--config", "distill.yaml", "--opts", "device=cpu"]
    _, cfg = train_3d_distill.parse_args(flags)
    dataset = build_dataset(**cfg.dataset_arguments())
    seconds = step_time.distillation_step(cfg, dataset, new_config.NARROW["resunet"])
    timed, batch = step_time.timed_patch(cfg.patch_size, [8, 8, 8], cfg.batch, torch.device("cpu"))
    assert seconds == 0.5 * cfg.batch * 64 * 64 * 32 / (np.prod(timed) * batch)
    _, cfg = train_3d_crkd.parse_args(["--config", "mine.yaml", "--opts", "device=cpu"])
    seconds = step_time.few_labels_step(cfg, build_dataset(**cfg.dataset_arguments()))
    assert seconds > 0.5 and len(taken) == 2


def test_the_shortest_of_some_steps_counts(monkeypatch):
    def timed(*durations):
        steps, clock = [], []
        for k, taken in enumerate(durations):
            clock += [100.0 * k, 100.0 * k + taken]
        ticks = iter(clock)
        monkeypatch.setattr(step_time.time, "perf_counter", lambda: next(ticks))
        return step_time.seconds_of(lambda: steps.append(0), torch.device("cpu")), len(steps)

    assert timed(0.125, 0.0625, 0.25, 0.01) == (0.0625, 1 + step_time.REPEATS)
    assert timed(9.0, 0.1) == (9.0, 2)  # one took longer than there is time for


def test_small_trainings_and_what_they_take(tmp_path, monkeypatch, capsys):
    write(tmp_path / "data", shape=(80, 80, 24), low=-1000)
    values = written(tmp_path, monkeypatch, "--small", "--networks", "resunet", "unet")
    text = capsys.readouterr().out
    assert values["network_args"]["unet"] == {"channels": [12, 24, 48, 96]}
    assert np.prod(values["patch_size"]) <= new_config.SMALL_PATCH
    assert values["max_steps"] <= new_config.SMALL_STEPS[1] and values["workers"] <= 8
    for title in ("teacher", "student alone", "distilled student"):
        assert re.search(rf"{title} +about .* for {values['max_steps']:,} steps", text)


def test_the_steps_of_small_trainings_take_an_hour():
    chosen = new_config.choose_small_length([0.5, 0.2, 0.8])
    assert (chosen["max_steps"][0], chosen["val_interval"][0]) == (2400, 600)
    assert "about 1 h 0 min" in chosen["max_steps"][1]
    assert new_config.choose_small_length([1e3])["max_steps"][0] == 600


def test_what_is_timed_on_a_processor_is_small_enough_and_fits_the_networks():
    cpu = torch.device("cpu")
    assert step_time.timed_patch([96, 96, 64], [32, 32, 32], 4, cpu) == ([32, 32, 32], 2)
    patch, batch = step_time.timed_patch([96, 88, 40], [8, 8, 8], 4, cpu)
    assert not any(side % 8 for side in patch) and np.prod(patch) * batch <= 32**3
    gpu = torch.device("cuda")
    assert step_time.timed_patch([96, 88, 40], [8, 8, 8], 4, gpu) == ([96, 88, 40], 4)


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
    with pytest.raises(ConfigError, match=r"patch_size: .* leaves resunet one voxel"):
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
        (
            ("--labelled", "9", "--networks", "vnet"),
            "with a label, but labelled is 9; expected 1..1",
        ),
        (("--labelled", "all", "--networks", "vnet"), "expected some that do not; name how many"),
        (("--labelled", "1", "--networks", "unet2d"), "unet2d: msd is trained on in 3D"),
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
