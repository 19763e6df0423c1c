"""The semi-supervised scripts as a user runs them: every method, scores, exact resume, labelled
sets, bad input.
"""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import h5py
import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from methods import SSL_METHODS
from tests.scripts.conftest import ROOT, Result, run
from utils.checkpoint import digest, load_checkpoint
from utils.runlog import RunLog

COMMON = """
labelled: 2
labelled_batch: 2
unlabelled_batch: 2
workers: 0
max_steps: 4
val_interval: 2
log_interval: 2
save_interval: 2
"""
CONFIGS = {
    "acdc": """
dataset: heart
format: acdc
data_root: data
split_dir: splits
class_names: [background, right, wall, left]
patch_size: [32, 32]
network_args: {unet2d: {channels: [2, 4, 4, 8, 8]}}
method_args: {crkd: {threshold: 0.25, csd_samples: 16, projection_channels: 8}}
""",
    "images2d": """
dataset: skin
format: images2d
data_root: data
class_names: [background, lesion]
patch_size: [32, 32]
network_args: {unet2d: {channels: [2, 4, 4, 8, 8]}}
method_args: {crkd: {threshold: 0.5, csd_samples: 16, projection_channels: 8}}
""",
    "la": """
dataset: atrium
format: la
data_root: data
split_dir: splits
class_names: [background, atrium]
patch_size: [16, 16, 16]
stride: [8, 8, 8]
val_stride: [16, 16, 16]
network_args: {vnet: {n_filters: 2}, vnet_dual: {n_filters: 2}, vnet_lefed: {n_filters: 2}}
recipe: {mlrpl: {network: vnet_dual}, lefed: {network: vnet_lefed}}
method_args: {crkd: {threshold: 0.5, csd_samples: 16, projection_channels: 8}}
""",
}
CRKD_TERMS = {"sup", "pseudo_s", "pseudo_fp", "lec", "csd", "ckd_pixel", "ckd_feature"}
FLAGS = ("absent", "missed", "false_positive")


class Kind(NamedTuple):
    """A kind of data: its configuration and scripts, and the names in its lists."""

    config: str
    dims: int
    network: str
    train: list[str]
    val: list[str]
    test: list[str]

    @property
    def reported(self) -> list[str]:
        return self.test or self.val

    @property
    def unit(self) -> str:
        return "pixels" if self.config == "images2d" else "voxels"

    @property
    def base(self) -> str:
        return f"runs/{yaml_value(self.config, 'dataset')}"


def yaml_value(config: str, key: str) -> str:
    return next(
        line.split(": ")[1] for line in CONFIGS[config].splitlines() if line.startswith(f"{key}:")
    )


PATIENTS = ["patient003", "patient001", "patient004", "patient002"]
PHOTOS = [f"photo{k}" for k in range(6)]
SCANS = ["D", "A", "C", "B"]
KINDS = {
    "acdc": Kind("acdc", 2, "unet2d", PATIENTS, ["patient005"], ["patient006"]),
    "images2d": Kind("images2d", 2, "unet2d", PHOTOS, ["seen0", "seen1"], []),
    "la": Kind("la", 3, "vnet", SCANS, [], ["T1", "T2"]),
    "la-val": Kind("la", 3, "vnet", SCANS, ["V"], ["T1", "T2"]),
}
# methods that need a network of their own, in 3D alone
TWO_DECODERS = {"mlrpl": "vnet_dual", "lefed": "vnet_lefed"}
CELLS = [
    (kind, method)
    for kind in ("acdc", "images2d", "la")
    for method in SSL_METHODS
    if KINDS[kind].dims == 3 or method not in TWO_DECODERS
]
SCORED = [*CELLS, ("la-val", "supervised"), ("la-val", "crkd")]


def blocks(shape: tuple[int, ...], num_classes: int, rng: np.random.Generator) -> np.ndarray:
    """Ids with a box of each foreground class, one inside the other."""
    label = np.zeros(shape, np.uint8)
    for k in range(1, num_classes):
        starts = [int(rng.integers(k, k + 3)) for _ in shape]
        label[
            tuple(slice(start, max(n - 2 * k - 1, start + 2)) for start, n in zip(starts, shape))
        ] = k
    return label


def save_h5(path: Path, **arrays: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for key, array in arrays.items():
            file.create_dataset(key, data=array)


def write_data(folder: Path, kind: Kind) -> None:
    rng = np.random.default_rng(0)
    names = kind.train + kind.val + kind.test
    for name in names:
        if kind.config == "acdc":
            for stem in (f"{name}_frame01", f"{name}_frame02"):
                label = np.stack([blocks((34, 30), 4, rng) for _ in range(3)])
                image = (label / 4 + rng.uniform(0, 0.2, label.shape)).clip(0, 1)
                save_h5(folder / f"data/data/{stem}.h5", image=image, label=label)
                for z in range(3):
                    save_h5(
                        folder / f"data/data/slices/{stem}_slice_{z + 1}.h5",
                        image=image[z],
                        label=label[z],
                    )
        elif kind.config == "images2d":
            label = blocks((30, 40), 2, rng)
            pixels = (100 * label[..., None] + rng.integers(0, 100, (30, 40, 3))).astype(np.uint8)
            for part in ("images", "masks"):
                (folder / "data" / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(
                folder / f"data/images/{name}.{'jpg' if name in PHOTOS[:3] else 'png'}"
            )
            Image.fromarray(255 * label).save(folder / f"data/masks/{name}.png")
        else:
            label = blocks((24, 20, 18), 2, rng)
            image = (2.0 * label + rng.normal(0, 1, label.shape)).astype(np.float32)
            save_h5(folder / f"data/{name}/mri_norm2.h5", image=image, label=label)
    for split, listed in (("train", kind.train), ("val", kind.val), ("test", kind.test)):
        if listed:
            write_list(folder, kind, split, listed)


def write_list(folder: Path, kind: Kind, split: str, names: list[str]) -> Path:
    path = folder / ("data" if kind.config == "images2d" else "splits") / f"{split}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(names) + "\n")
    return path


class Site(NamedTuple):
    """A folder with data and tiny.yaml, and the scripts run in it."""

    folder: Path
    kind: Kind

    def train(self, *arguments: str, ok: bool = True) -> Result:
        script = f"train_{self.kind.dims}d_crkd.py"
        return run(script, "--config", "tiny.yaml", *arguments, cwd=self.folder, ok=ok)

    def score(
        self, run_folder: Path, *arguments: str, checkpoint: str = "best.pt", ok: bool = True
    ) -> Result:
        script = f"test_{self.kind.dims}d.py"
        return run(
            script, "--ckpt", str(run_folder / checkpoint), *arguments, cwd=self.folder, ok=ok
        )

    def run_folder(self, method: str = "crkd", labelled: str = "2", seed: str = "seed0") -> Path:
        return self.folder / self.kind.base / method / f"{self.network(method)}-{labelled}" / seed

    def network(self, method: str) -> str:
        return TWO_DECODERS.get(method, self.kind.network)

    def replace(self, old: str, new: str) -> None:
        path = self.folder / "tiny.yaml"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    def training_file(self) -> Path:
        """One that is read as unlabelled."""
        return self.folder / (
            "data/data/slices/patient002_frame01_slice_2.h5"
            if self.kind.dims == 2
            else "data/B/mri_norm2.h5"
        )


def make_site(folder: Path, kind: str) -> Site:
    """Data of a kind and its tiny.yaml, in an existing folder."""
    write_data(folder, KINDS[kind])
    select_on = "val" if KINDS[kind].val else "test"
    (folder / "tiny.yaml").write_text(
        f"{CONFIGS[KINDS[kind].config]}{COMMON}select_on: {select_on}\n"
    )
    return Site(folder, KINDS[kind])


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """As in the processes that the tests start, so that equal runs are equal to the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Data of each kind, written once."""
    made: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in made:
            made[kind] = make_site(tmp_path_factory.mktemp(kind), kind).folder
        return made[kind]

    return of


@pytest.fixture
def site(data, tmp_path):
    """Copy of the data of a kind, in a folder of the test's own."""

    def of(kind: str) -> Site:
        shutil.copytree(data(kind), tmp_path, dirs_exist_ok=True)
        return Site(tmp_path, KINDS[kind])

    return of


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """(site, run folder) of each kind and method after two steps, trained once."""
    made: dict[tuple[str, str], tuple[Site, Path]] = {}

    def of(kind: str, method: str = "crkd") -> tuple[Site, Path]:
        if (kind, method) not in made:
            folder = tmp_path_factory.mktemp(f"{kind}-{method}")
            shutil.copytree(data(kind), folder, dirs_exist_ok=True)
            site = Site(folder, KINDS[kind])
            site.train("--method", method, "--opts", "max_steps=2")
            made[kind, method] = site, site.run_folder(method)
        return made[kind, method]

    return of


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def case_names(kind: Kind, names: list[str]) -> list[str]:
    return (
        [f"{name}_frame0{frame}" for name in names for frame in (1, 2)]
        if kind.config == "acdc"
        else names
    )


def stored_label(site: Site, name: str) -> np.ndarray:
    if site.kind.config == "images2d":
        return np.asarray(Image.open(site.folder / f"data/masks/{name}.png")) // 255
    acdc = site.kind.config == "acdc"
    with h5py.File(
        site.folder / (f"data/data/{name}.h5" if acdc else f"data/{name}/mri_norm2.h5")
    ) as file:
        return np.moveaxis(file["label"][()], 0, -1) if acdc else file["label"][()]


def stored_prediction(folder: Path, name: str) -> np.ndarray:
    if (folder / f"{name}.png").exists():
        return np.asarray(Image.open(folder / f"{name}.png")) // 255
    return np.asarray(nib.load(folder / f"{name}.nii.gz").dataobj)


# Training and scores


@pytest.mark.parametrize("kind, method", SCORED)
def test_every_method_trains_on_every_kind_of_data(trained, kind, method):
    site, folder = trained(kind, method)
    assert {p.name for p in folder.iterdir()} >= {"best.pt", "last.pt", "log.jsonl", "config.yaml"}
    assert any(p.name.startswith("events.out") for p in folder.iterdir())
    assert [(e["step"], e["kind"]) for e in log_of(folder)] == [(1, "train"), (1, "val")]
    assert {"dice", *load_checkpoint(folder / "best.pt")["class_names"][1:]} <= log_of(folder)[
        1
    ].keys()
    checkpoint = load_checkpoint(folder / "last.pt")
    assert (checkpoint["step"], checkpoint["kind"]) == (2, f"{site.kind.dims}d-semi")


@pytest.mark.parametrize("protocol", ["clean", "published"])
@pytest.mark.parametrize("kind, method", SCORED)
def test_every_run_is_scored_by_both_protocols(trained, kind, method, protocol):
    site, folder = trained(kind, method)
    result = site.score(folder, "--protocol", protocol, "--overlays")
    suffix = "_published" if protocol == "published" else ""
    both = kind == "acdc" and protocol == "published"
    names = case_names(site.kind, site.kind.val * both + site.kind.reported)
    assert f"results in {folder}: metrics{suffix}.csv, summary{suffix}.json" in result.stdout
    assert f"({site.kind.unit})" in result.stdout and f"{protocol} protocol" in result.stdout

    ending = ".png" if kind == "images2d" else ".nii.gz"
    assert sorted(p.name for p in (folder / f"predictions{suffix}").iterdir()) == sorted(
        n + ending for n in names
    )
    assert sorted(p.name for p in (folder / f"overlays{suffix}").iterdir()) == sorted(
        f"{n}.png" for n in names
    )
    classes = load_checkpoint(folder / "best.pt")["class_names"][1:]
    with (folder / f"metrics{suffix}.csv").open() as file:
        rows = list(csv.DictReader(file))
    unit, published = site.kind.unit, protocol == "published"
    hd95, sides = (
        ("directed", "mean_of_both") if published and unit == "pixels" else ("pooled", "one_sided")
    )
    titles = ["dice", "jaccard", f"hd95_{hd95}_{unit}", f"asd_{sides}_{unit}"]
    last = [*FLAGS, "accuracy", f"diagonal_{unit}"]
    if not published:
        titles += ["nsd", f"assd_{unit}"]
        last.append(f"tolerance_{unit}")
    assert list(rows[0]) == ["case", "class", *(f"{title}_{protocol}" for title in titles), *last]
    assert [(row["case"], row["class"]) for row in rows] == [
        (name, k) for name in names for k in classes
    ]
    for row in rows:
        k = 1 + classes.index(row["class"])
        label = stored_label(site, row["case"])
        prediction = stored_prediction(folder / f"predictions{suffix}", row["case"])
        assert prediction.shape == label.shape
        expected = (
            2
            * ((prediction == k) & (label == k)).sum()
            / ((prediction == k).sum() + (label == k).sum())
        )
        assert float(row[f"dice_{protocol}"]) == pytest.approx(expected, rel=1e-5)
        assert float(row["accuracy"]) == pytest.approx((prediction == label).mean(), rel=1e-5)

    summary = json.loads((folder / f"summary{suffix}.json").read_text())
    assert (
        summary["protocol"] == protocol
        and summary["unit"] == unit
        and summary["hd95_definition"] == hd95
    )
    assert summary["empty_policy"] == ("zero" if published else "agree")
    assert (summary["labelled"], summary["method"], summary["step"], summary["max_steps"]) == (
        2,
        method,
        2,
        2,
    )
    assert summary["split"] == ("val+test" if both else "test" if site.kind.test else "val")
    assert (
        summary["native"]["cases"] == len(names) and list(summary["native"]["classes"]) == classes
    )
    weights = load_checkpoint(folder / "best.pt")["weights"]
    counted = [
        value
        for key, value in weights.items()
        if "running_" not in key and "num_batches" not in key
    ]
    if method not in TWO_DECODERS:  # of which prediction uses one
        assert summary["parameters"] == sum(value.numel() for value in counted)
    means = [
        np.mean([float(r[f"dice_{protocol}"]) for r in rows if r["class"] == name])
        for name in classes
    ]
    assert summary["native"]["mean"]["dice"] == pytest.approx(np.mean(means), rel=1e-5)
    assert "published_protocol" not in summary

    table = run(
        "tools/results_table.py", str(folder / f"summary{suffix}.json"), cwd=site.folder
    ).stdout
    assert f"{site.network(method)}, 2 labelled, {method}" in table and f"HD95 {unit}" in table
    assert f"Protocol (reporting.py): {protocol}." in table


def test_a_run_is_scored_where_its_data_was_moved_to(trained, tmp_path):
    site, folder = trained("acdc")
    shutil.copytree(site.folder / "data", tmp_path / "elsewhere")
    out = tmp_path / "scores"
    site.score(
        folder, "--data-root", str(tmp_path / "elsewhere"), "--out", str(out), "--no-predictions"
    )
    assert sorted(p.name for p in out.iterdir()) == ["metrics.csv", "summary.json"]


@pytest.mark.parametrize("kind", ["acdc", "la-val"])
def test_other_splits_are_written_beside(trained, tmp_path, kind):
    site, folder = trained(kind)
    assert (
        "note: this checkpoint was selected"
        in site.score(folder, "--split", "val", "--out", str(tmp_path)).stdout
    )
    assert json.loads((tmp_path / "summary_val.json").read_text())["selected_on_reported"] is True
    site.score(folder, "--out", str(tmp_path))
    assert json.loads((tmp_path / "summary.json").read_text())["selected_on_reported"] is False


def test_published_scores_of_other_splits_do_not_replace_those_of_both(trained, tmp_path):
    site, folder = trained("acdc")
    site.score(folder, "--protocol", "published", "--out", str(tmp_path))
    site.score(folder, "--protocol", "published", "--split", "test", "--out", str(tmp_path))
    assert json.loads((tmp_path / "summary_published.json").read_text())["split"] == "val+test"


def test_stride_and_largest_component_are_options_of_volumes(trained, tmp_path):
    site, folder = trained("la-val")
    site.score(
        folder,
        "--stride",
        "16",
        "16",
        "16",
        "--largest-component",
        "--tta",
        "--fast",
        "--out",
        str(tmp_path),
    )
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["stride"] == [16, 16, 16]
    assert summary["largest_component"] is summary["tta"] is summary["fast"] is True
    site.score(folder, "--out", str(tmp_path))
    assert json.loads((tmp_path / "summary.json").read_text())["stride"] == [8, 8, 8]


@pytest.mark.parametrize("stride", [("17", "16", "16"), ("0", "8", "8")])
def test_a_stride_that_leaves_gaps_is_refused_by_the_tester(trained, tmp_path, stride):
    site, folder = trained("la-val")
    result = site.score(folder, "--stride", *stride, "--out", str(tmp_path), ok=False)
    assert result.returncode == 1 and "error: " in result.stderr and "stride" in result.stderr


@pytest.mark.parametrize("kind, notes", [("la", 1), ("images2d", 1), ("la-val", 0), ("acdc", 0)])
def test_last_is_scored_too_where_best_was_selected_on_the_reported_cases(
    trained, tmp_path, kind, notes
):
    site, folder = trained(kind)
    selected_on = "test" if kind == "la" else "val"
    for name in ("best.pt", "last.pt"):
        assert load_checkpoint(folder / name)["selected_on"] == selected_on
    result = site.score(folder, "--out", str(tmp_path))
    assert (
        result.stdout.count("note: this checkpoint was selected on cases that are reported here")
        == notes
    )
    assert (
        result.stdout.count("best.pt, step") == 1 and result.stdout.count("last.pt, step") == notes
    )
    for suffix in ("", "_last"):
        assert (tmp_path / f"summary{suffix}.json").exists() == (suffix == "" or bool(notes))
        assert (tmp_path / f"metrics{suffix}.csv").exists() == (suffix == "" or bool(notes))
        assert (tmp_path / f"predictions{suffix}").is_dir() == (suffix == "" or bool(notes))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["selected_on"], summary["selected_on_reported"]) == (selected_on, bool(notes))
    if notes:
        assert (
            json.loads((tmp_path / "summary_last.json").read_text())["selected_on_reported"]
            is False
        )
        only_last = site.score(
            folder, "--out", str(tmp_path / "again"), checkpoint="last.pt"
        ).stdout
        assert "best.pt" not in only_last and "note" not in only_last


def test_tables_of_distillation_leave_out_semi_supervised_runs(site):
    acdc = site("acdc")
    for labelled in ("1", "2"):
        acdc.train("--method", "supervised", "--labelled", labelled, "--opts", "max_steps=1")
        acdc.score(acdc.run_folder("supervised", labelled), "--no-predictions")
    arguments = ("--layout", "kd", "--runs-dir", "runs", "--dataset", "btcv")
    assert (
        "btcv: trained alone" in run("tools/results_table.py", *arguments, cwd=acdc.folder).stdout
    )


# The log


@pytest.mark.parametrize("kind", KINDS)
def test_the_log_has_every_term_and_the_quality_of_pseudo_labels(trained, kind):
    _, folder = trained(kind)
    entry = log_of(folder)[0]
    classes = range(1, len(load_checkpoint(folder / "last.pt")["class_names"]))
    quality = {"mask_ratio", "pseudo_accuracy", "pseudo_foreground", "true_foreground", "s_better"}
    quality |= {f"recall_{k}" for k in classes}
    assert entry.keys() == {"step", "kind", "loss", "lr"} | CRKD_TERMS | quality
    assert all(entry[name] is not None for name in CRKD_TERMS)
    assert all(0 <= entry[name] <= 1 for name in quality)
    assert entry["mask_ratio"] > 0 and entry["true_foreground"] > 0
    assert entry["loss"] == pytest.approx(sum(entry[name] for name in CRKD_TERMS), rel=1e-6)


def test_the_log_of_a_supervised_run_has_its_term_alone(trained):
    _, folder = trained("acdc", "supervised")
    entry = log_of(folder)[0]
    assert entry.keys() == {"step", "kind", "loss", "sup", "lr"} and entry["loss"] == entry["sup"]


# Determinism


def stop_in_process(monkeypatch, site: Site, *arguments: str) -> Result:
    """Train until SIGTERM arrives during the second step's validation."""
    scalars = RunLog.scalars

    def and_stop(self, step, kind, values):
        scalars(self, step, kind, values)
        if (step, kind) == (1, "val"):
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "scalars", and_stop)
        return site.train(*arguments, ok=False)


def stop_process(site: Site, *arguments: str, folder: Path) -> None:
    """Train in a process of its own and send SIGTERM as soon as it has validated after two
    steps.
    """
    command = [
        sys.executable,
        str(ROOT / f"train_{site.kind.dims}d_crkd.py"),
        "--config",
        "tiny.yaml",
        *arguments,
    ]
    process = subprocess.Popen(
        command,
        cwd=site.folder,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    log = folder / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and '"step": 1,' in log.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()[-2000:]
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, errors[-2000:]
    assert "--resume" in errors


def assert_equal_runs(first: Path, second: Path) -> None:
    one, two = (load_checkpoint(folder / "last.pt") for folder in (first, second))
    assert one["step"] == two["step"] == 4
    for part in ("weights", "method"):
        assert digest(one[part]) == digest(two[part])
    assert one["best"] == two["best"]
    bests = [load_checkpoint(folder / "best.pt") for folder in (first, second)]
    assert digest(bests[0]["weights"]) == digest(bests[1]["weights"])
    assert bests[0]["step"] == bests[1]["step"] and bests[0]["val"] == bests[1]["val"]
    assert (first / "log.jsonl").read_text() == (second / "log.jsonl").read_text()


# The log's interval leaves running means in the checkpoint.
RESUMED = {
    "acdc": (
        "log_interval=3",
        "method_args={crkd: {threshold: 0.25, ema_decay: 0.9, csd_samples: 16}}",
    ),
    "la": ("log_interval=3", "method_args={crkd: {threshold: 0.5, csd_samples: 16}}"),
}


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("kind", RESUMED)
def test_resuming_after_a_signal_to_the_process_is_bit_identical(site, kind, workers):
    tiny = site(kind)
    options = ("--opts", *RESUMED[kind], f"workers={workers}")
    tiny.train(*options, "tag=straight")
    straight, broken = (tiny.run_folder(seed=f"seed0-{tag}") for tag in ("straight", "broken"))
    stop_process(tiny, *options, "tag=broken", folder=broken)
    assert 0 < load_checkpoint(broken / "last.pt")["step"] < 4
    tiny.train("--resume", *options, "tag=broken")
    assert_equal_runs(straight, broken)


@pytest.mark.parametrize("kind, method", CELLS)
def test_every_method_resumes_bit_identically(site, monkeypatch, kind, method):
    tiny = site(kind)
    options = ("--method", method, "--opts", "log_interval=3")
    tiny.train(*options, "tag=straight")
    stopped = stop_in_process(monkeypatch, tiny, *options, "tag=broken")
    assert stopped.returncode == 128 + signal.SIGTERM
    assert (
        "stopped after step 2; go on with: python" in stopped.stderr
        and "--resume" in stopped.stderr
    )
    straight, broken = (
        tiny.run_folder(method, seed=f"seed0-{tag}") for tag in ("straight", "broken")
    )
    assert load_checkpoint(broken / "last.pt")["step"] == 2
    tiny.train("--resume", *options, "tag=broken")
    assert_equal_runs(straight, broken)


@pytest.mark.parametrize("kind", ["acdc", "la"])
def test_saved_weights_have_the_statistics_of_clean_images(trained, kind):
    """The running ones, after two steps, lag; the training goes on with them all the same."""
    _, folder = trained(kind)
    last, best = (load_checkpoint(folder / name) for name in ("last.pt", "best.pt"))
    own = {key.removeprefix("network."): value for key, value in last["method"].items()}
    differ = {key for key, value in last["weights"].items() if not torch.equal(own[key], value)}
    statistics = {key for key in last["weights"] if "running" in key or "num_batches" in key}
    assert differ == statistics
    assert {last["weights"][key].item() for key in statistics if "num_batches" in key} == {20}
    counts = {v.item() for key, v in best["weights"].items() if "num_batches" in key}
    assert counts == {20}


def test_running_statistics_are_saved_on_demand(site):
    tiny = site("acdc")
    tiny.train("--method", "supervised", "--opts", "max_steps=1", "bn_batches=0")
    last = load_checkpoint(tiny.run_folder("supervised") / "last.pt")
    own = {key.removeprefix("network."): value for key, value in last["method"].items()}
    assert digest(own) == digest(last["weights"])


def test_crkd_with_a_moving_average_resumes_bit_identically(site, monkeypatch):
    tiny = site("acdc")
    options = ("--opts", *RESUMED["acdc"])
    tiny.train(*options, "tag=straight")
    stop_in_process(monkeypatch, tiny, *options, "tag=broken")
    tiny.train("--resume", *options, "tag=broken")
    straight, broken = (tiny.run_folder(seed=f"seed0-{tag}") for tag in ("straight", "broken"))
    state = load_checkpoint(broken / "last.pt")["method"]
    assert any(key.startswith("average.") for key in state)
    assert_equal_runs(straight, broken)


@pytest.mark.parametrize("kind", ["acdc", "la"])
def test_workers_change_nothing(site, kind):
    tiny = site(kind)
    for workers in ("0", "2"):
        tiny.train("--opts", f"workers={workers}", f"tag=w{workers}")
    assert_equal_runs(*(tiny.run_folder(seed=f"seed0-w{workers}") for workers in ("0", "2")))


@pytest.mark.parametrize("kind", ["acdc", "images2d", "la"])
def test_same_seed_same_weights_another_seed_other_weights(site, kind):
    tiny = site(kind)
    for tag, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        tiny.train("--seed", seed, "--opts", f"tag={tag}", "max_steps=2")
    a, b, c = (
        digest(load_checkpoint(tiny.run_folder(seed=name) / "last.pt")["weights"])
        for name in ("seed0-a", "seed0-b", "seed1-c")
    )
    assert a == b != c


def test_memory_changes_nothing(site):
    tiny = site("acdc")
    for memory in ("0", "2"):
        tiny.train("--opts", f"memory_gb={memory}", f"tag=m{memory}")
    assert_equal_runs(tiny.run_folder(seed="seed0-m0"), tiny.run_folder(seed="seed0-m2"))


@pytest.mark.parametrize("kind", ["acdc", "la"])
def test_autocast(site, kind):
    tiny = site(kind)
    tiny.train("--opts", "amp=bf16", "max_steps=2", "tag=half")
    tiny.train("--opts", "max_steps=2")
    assert (
        log_of(tiny.run_folder(seed="seed0-half"))[0]["loss"]
        != log_of(tiny.run_folder())[0]["loss"]
    )
    tiny.score(tiny.run_folder(seed="seed0-half"), "--amp", "bf16")


@pytest.mark.parametrize("kind", ["acdc", "la"])
def test_the_released_arithmetic_has_a_run_folder_of_its_own(site, kind):
    tiny = site(kind)
    tiny.train("--opts", "preset=as_released", "max_steps=1")
    assert (tiny.run_folder("crkd-as_released") / "best.pt").is_file()


def test_a_recipe_holds_for_its_method_alone_and_yields_to_options(site):
    tiny = site("images2d")
    with (tiny.folder / "tiny.yaml").open("a") as file:
        file.write("recipe: {supervised: {augmentation: supervised, lr: 0.5}}\n")
    tiny.train("--method", "supervised", "--opts", "max_steps=1", "lr=0.25")
    tiny.train("--opts", "max_steps=1")
    supervised, crkd = (
        load_checkpoint(tiny.run_folder(m) / "last.pt")["config"] for m in ("supervised", "crkd")
    )
    assert (supervised["augmentation"], supervised["lr"]) == ("supervised", 0.25)
    assert (crkd["augmentation"], crkd["lr"]) == ("semi", 0.01)


# Labelled sets


@pytest.mark.parametrize("kind", ["acdc", "images2d", "la"])
@pytest.mark.parametrize(
    "flag, value, name, share",
    [
        ("--labelled", "2", "2", 2),
        ("--label_num", "2", "2", 2),
        ("--labeled_num", "2", "2", 2),
        ("--labeled-num", "2", "2", 2),
        ("--label_rat", "0.5", "50%", 0.5),
        ("--labelled", "50%", "50%", 0.5),
        ("--labelled", "all", "all", 1.0),
    ],
)
def test_every_spelling_of_the_labelled_set(site, kind, flag, value, name, share):
    tiny = site(kind)
    options = ("--method", "supervised", flag, value)
    folder = tiny.run_folder("supervised", name)
    shown = tiny.train(*options, "--show-run").stdout.strip()
    assert tiny.folder / shown == folder and not (tiny.folder / "runs").exists()
    tiny.train(*options, "--opts", "max_steps=1")
    checkpoint = load_checkpoint(folder / "last.pt")
    assert checkpoint["config"]["labelled"] == share
    count = share if isinstance(share, int) else int(share * len(tiny.kind.train))
    owners = {
        split: [case.split("_")[0] for case in checkpoint["cases"][split]]
        for split in checkpoint["cases"]
    }
    assert len(set(owners["labelled"])) == count
    assert set(owners["labelled"]) | set(owners["unlabelled"]) == set(tiny.kind.train)
    assert len(owners["labelled"]) + len(owners["unlabelled"]) == (
        24 if kind == "acdc" else len(tiny.kind.train)
    )
    assert (set(owners["val"]), set(owners["test"])) == (set(tiny.kind.val), set(tiny.kind.test))
    assert sum(len(set(names)) for names in owners.values()) == len(set().union(*owners.values()))
    if kind != "images2d":
        assert set(owners["labelled"]) == set(tiny.kind.train[:count])


def test_the_table_shows_shares_of_labels(site):
    tiny = site("images2d")
    tiny.train("--method", "supervised", "--label_rat", "0.5", "--opts", "max_steps=1", "tag=half")
    folder = tiny.run_folder("supervised", "50%", "seed0-half")
    tiny.score(folder)
    table = run("tools/results_table.py", str(folder), cwd=tiny.folder).stdout
    assert "unet2d, 50% labelled, supervised [half]" in table
    assert "best.pt was selected on the cases reported here" in table


# Runs that exist already


@pytest.mark.parametrize("kind", ["acdc", "la"])
def test_a_run_is_not_overwritten_and_not_resumed_with_other_settings(site, kind):
    tiny = site(kind)
    supervised = ("--method", "supervised", "--opts", "max_steps=2")
    tiny.train(*supervised)
    again = tiny.train(*supervised, ok=False)
    assert again.returncode == 1 and "--resume" in again.stderr and "tag=" in again.stderr
    changed = tiny.train("--resume", *supervised, "lr=0.5", ok=False)
    assert changed.returncode == 1 and "lr: 0.01 then, 0.5 now" in changed.stderr
    assert "nothing to do" in tiny.train("--resume", *supervised).stdout
    tiny.train("--resume", *supervised, "max_steps=4")
    assert load_checkpoint(tiny.run_folder("supervised") / "last.pt")["step"] == 4


def test_a_change_that_concerns_other_methods_does_not_keep_one_from_resuming(site):
    tiny = site("acdc")
    supervised = ("--method", "supervised", "--opts", "max_steps=1")
    tiny.train(*supervised)
    tiny.replace("threshold: 0.25", "threshold: 0.4")
    assert "nothing to do" in tiny.train("--resume", *supervised).stdout


@pytest.mark.parametrize("kind, wrong", [("la", "test_2d.py"), ("acdc", "test_3d.py")])
def test_a_checkpoint_of_other_dimensions_is_refused_by_the_tester(trained, kind, wrong):
    _, folder = trained(kind)
    result = run(wrong, "--ckpt", str(folder / "best.pt"), cwd=folder, ok=False)
    assert result.returncode == 1
    assert "best.pt: not a checkpoint of" in result.stderr and "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


# Bad input


def refused(site: Site, *arguments: str) -> str:
    """Its message; it must stop with one error and without a step."""
    result = site.train(*arguments, ok=False)
    assert result.returncode == 1
    assert result.stderr.count("error: ") == 1 and "Traceback" not in result.stderr
    assert not list(site.folder.glob("runs/**/log.jsonl")) and not list(
        site.folder.glob("runs/**/*.pt")
    )
    return result.stderr.split("error: ")[1]


@pytest.mark.parametrize(
    "option, expected",
    [
        ("max_step=4", "unknown key 'max_step'; did you mean 'max_steps'?"),
        ("max_steps=many", "must be an integer"),
        ("method=crdk", "method: unknown value 'crdk'; choose from supervised, crkd"),
        (
            "method_args={crkd: {treshold: 0.9}}",
            "method_args: crkd: unknown argument 'treshold'; did you mean 'threshold'?",
        ),
        ("method_args={crkd: {threshold: 1.5}}", "threshold must lie in [0, 1]"),
        ("method_args={crkd: {pseudo_mode: evil}}", "pseudo_mode"),
        ("preset=released", "preset: unknown value 'released'"),
        ("amp=half", "amp: unknown value 'half'"),
        ("labelled=9", "with a label, but labelled is 9; expected 1.."),
        ("labelled=0", "labelled: a whole number, or a share above 0"),
        ("labelled=0.01", "which is less than one"),
        ("labelled=1.0", "labelled: 1.0 leaves no unlabelled"),
        ("class_names=[background]", "class_names: 2 to 256 different names"),
        ("data_root=nowhere", "nowhere: no such folder"),
        ("lr=.nan", "finite"),
        ("momentum=-1", "momentum"),
        ("weight_decay=-1", "weight_decay"),
        ("device=cuda:7", "not usable"),
    ],
)
@pytest.mark.parametrize("kind", ["acdc", "images2d", "la"])
def test_bad_configurations(site, kind, option, expected):
    message = refused(site(kind), "--opts", option)
    assert expected in message and len(message.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "kind, option, expected",
    [
        ("acdc", "network=vnet", "network: unknown value 'vnet'; choose from unet2d"),
        ("la", "network=unet2d", "network: unknown value 'unet2d'; choose from"),
        ("la", "format=acdc", "format: unknown value 'acdc'; choose from msd, brats, nnunet, la"),
        ("acdc", "patch_size=[32,40]", "patch_size: [32, 40] must be multiples of 16 for unet2d"),
        (
            "la",
            "patch_size=[16,16,24]",
            "patch_size: [16, 16, 24] must be multiples of 16 for vnet",
        ),
        ("acdc", "patch_size=[32,32,32]", "list of 2 values, or one number for all sides"),
        ("acdc", "patch_size=40", "patch_size: [40, 40] must be multiples of 16 for unet2d"),
        ("la", "stride=[8,17,8]", "stride: [8, 17, 8] leaves gaps between windows of [16, 16, 16]"),
        ("la", "val_stride=[32,16,16]", "val_stride: [32, 16, 16] leaves gaps"),
        ("la", "stride=[8,0,8]", "stride: must lie in [1, inf)"),
        (
            "acdc",
            "network_args={unet2d: {chanels: [2]}}",
            "unet2d: unknown argument 'chanels'; did you mean 'channels'?",
        ),
        (
            "la",
            "network_args={vnet: {filters: 2}}",
            "vnet: unknown argument 'filters'; did you mean 'n_filters'?",
        ),
        ("acdc", "augmentation=supervised", "the data format 'acdc' does not use this key"),
        ("images2d", "class_names=[a, b, c]", "masks are binary"),
        ("la", "class_names=[]", "class_names"),
    ],
)
def test_bad_configurations_of_one_kind_of_data(site, kind, option, expected):
    message = refused(site(kind), "--opts", option)
    assert expected in message and len(message.strip().splitlines()) == 1


@pytest.mark.parametrize("kind", ["acdc", "images2d"])
@pytest.mark.parametrize("method", TWO_DECODERS)
def test_methods_of_two_decoders_are_refused_for_images(site, kind, method):
    message = refused(site(kind), "--method", method)
    assert (
        f"method: {method} is a method for 3D networks" in message
        and len(message.strip().splitlines()) == 1
    )


@pytest.mark.parametrize("kind", ["acdc", "images2d", "la"])
def test_an_unknown_key_in_the_file_suggests_the_right_one(site, kind):
    tiny = site(kind)
    tiny.replace("labelled_batch", "labeled_batch")
    message = refused(tiny)
    assert "tiny.yaml: unknown key 'labeled_batch'; did you mean 'labelled_batch'?" in message


def test_a_recipe_without_settings_is_an_error_or_nothing(site):
    tiny = site("acdc")
    with (tiny.folder / "tiny.yaml").open("a") as file:
        file.write("recipe: {crkd: }\n")
    result = tiny.train("--opts", "max_steps=1", ok=False)
    assert result.returncode == 0 or "recipe" in result.stderr


def test_text_that_is_no_number_of_labels_is_refused(site):
    result = site("acdc").train("--labelled", "few", ok=False)
    assert result.returncode == 2 and "--labelled" in result.stderr and "'few'" in result.stderr


def with_value(array: np.ndarray, value: float) -> np.ndarray:
    changed = array.astype(np.float64) if np.isnan(value) else array.copy()
    changed[(3,) * array.ndim] = value
    return changed


FAULTS = {
    "other key": (lambda image, label: {"scan": image, "label": label}, "no array 'image'"),
    "shapes": (lambda image, label: {"image": image, "label": label[:-1]}, "expected the same"),
    "axes": (
        lambda image, label: {"image": image[None], "label": label[None]},
        "expected the same",
    ),
    "ids": (
        lambda image, label: {"image": image, "label": with_value(label, 9)},
        "label ids [9]; expected only 0",
    ),
    "nan": (
        lambda image, label: {"image": with_value(image, np.nan), "label": label},
        "1 voxels are NaN or infinite",
    ),
    "constant": (
        lambda image, label: {"image": np.zeros_like(image), "label": label},
        "constant image",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", ["acdc", "la"])
def test_a_bad_file_stops_before_training_and_is_named(site, kind, fault):
    tiny = site(kind)
    change, expected = FAULTS[fault]
    path = tiny.training_file()
    with h5py.File(path) as file:
        image, label = file["image"][()], file["label"][()]
    save_h5(path, **change(image, label))
    message = refused(tiny)
    assert expected in message and str(path.relative_to(tiny.folder)) in message
    assert len(message.strip().splitlines()) == 2  # how many, then each of them


@pytest.mark.parametrize("kind", ["acdc", "la"])
def test_a_truncated_file_stops_before_training_and_is_named(site, kind):
    tiny = site(kind)
    path = tiny.training_file()
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    message = refused(tiny)
    assert "unreadable or truncated" in message and str(path.relative_to(tiny.folder)) in message


@pytest.mark.parametrize("kind", ["acdc", "images2d", "la"])
def test_a_missing_file_stops_before_training(site, kind):
    tiny = site(kind)
    name = tiny.kind.train[-1]
    for path in tiny.folder.glob(f"data/**/{name}*"):
        if path.is_dir():
            shutil.rmtree(path)
        elif path.exists():
            path.unlink()
    assert name in refused(tiny)


def test_every_bad_file_is_named_at_once(site):
    tiny = site("acdc")
    paths = sorted((tiny.folder / "data/data/slices").glob("patient00[14]_frame01_*.h5"))
    for path in paths:
        path.write_bytes(b"")
    message = refused(tiny)
    assert "6 of 28 files cannot be used" in message
    assert all(path.name in message for path in paths)


def test_intensities_of_slices_outside_0_to_1_are_refused(site):
    tiny = site("acdc")
    path = tiny.training_file()
    with h5py.File(path) as file:
        image, label = file["image"][()], file["label"][()]
    save_h5(path, image=255 * image, label=label)
    assert "expected 0..1" in refused(tiny)


@pytest.mark.parametrize(
    "suffix, expected",
    [
        ("size", "30 x 30 pixels, but its image"),
        ("cut", "truncated"),
        ("gone", "has no label"),
        ("ids", "its largest value is 1"),
    ],
)
def test_a_bad_image_stops_before_training_and_is_named(site, suffix, expected):
    tiny = site("images2d")
    name = "seen1" if suffix == "gone" else "photo4"  # seen1 is to be scored
    path = tiny.folder / f"data/masks/{name}.png"
    mask = np.asarray(Image.open(path))
    if suffix == "size":
        Image.fromarray(mask[:, :30]).save(path)
    elif suffix == "cut":
        path.write_bytes(path.read_bytes()[:60])
    elif suffix == "ids":
        Image.fromarray(mask // 255).save(path)
    else:
        path.unlink()
    message = refused(tiny)
    assert expected in message and name in message


@pytest.mark.parametrize("other", ["val", "test"])
@pytest.mark.parametrize("kind", ["acdc", "images2d", "la"])
def test_overlapping_lists_are_refused(site, kind, other):
    tiny = site(kind)
    shared = tiny.kind.train[1]
    write_list(tiny.folder, tiny.kind, other, [*getattr(tiny.kind, other), shared])
    assert f"'{shared}' is in both the train and the {other} list" in refused(tiny)


@pytest.mark.parametrize("kind, split", [("acdc", "train"), ("acdc", "val"), ("la", "train")])
def test_a_missing_list_is_named(site, kind, split):
    tiny = site(kind)
    (tiny.folder / "splits" / f"{split}.txt").unlink()
    assert f"splits/{split}.txt: no such list" in refused(tiny)


def test_lists_without_anything_to_validate_on_are_refused(site):
    tiny = site("la")
    (tiny.folder / "splits/test.txt").unlink()
    assert "splits has no test list" in refused(tiny)
    tiny.replace("select_on: test", "select_on: val")
    assert "splits has no validation list, and there is nothing to validate on" in refused(tiny)


@pytest.mark.parametrize("kind, method", [cell for cell in CELLS if cell[0] != "images2d"])
def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(site, kind, method):
    tiny = site(kind)
    options = (
        "lr=1e30",
        "weight_decay=0",
        "val_interval=4",
        "save_interval=4",
        "log_interval=1",
        "momentum=0",
    )
    result = tiny.train("--method", method, "--opts", *options, ok=False)
    assert result.returncode == 1 and "the loss is not finite" in result.stderr
    assert not list(tiny.folder.glob("runs/**/last.pt"))
