"""Many cases, many steps, and loader processes that die."""

import functools
import json
import statistics

import nibabel as nib
import numpy as np
import pytest

from tests.reliability.faults import die_in_loader, watch_memory
from tests.reliability.harness import FULL, run
from utils.checkpoint import load_checkpoint


def growth(path) -> float:
    """Resident memory at the end relative to that after the first tenth, medians of a tenth each,
    minus one.
    """
    noted = [json.loads(line) for line in path.read_text().splitlines()]
    tenth = len(noted) // 10
    assert tenth >= 10
    return statistics.median(noted[-tenth:]) / statistics.median(noted[tenth : 2 * tenth]) - 1


def test_the_measure_sees_growth(tmp_path):
    path = tmp_path / "memory.jsonl"
    flat = [500e6 + 1e6 * (k % 3) for k in range(200)]
    path.write_text("\n".join(json.dumps(value) for value in flat))
    assert abs(growth(path)) < 0.005
    path.write_text("\n".join(json.dumps(value + 0.25e6 * k) for k, value in enumerate(flat)))
    assert growth(path) > 0.05


@pytest.mark.slow
def test_200_cases_in_a_row_with_flat_memory(site):
    """Of 48^3 voxels: to keep one image or prediction of each would take more than the 5 % that are
    allowed.
    """
    place = site("supervised")
    folder, rng, names = (
        place.path / "data",
        np.random.default_rng(0),
        [f"long{k}" for k in range(200)],
    )
    grid = np.indices((48, 48, 48))
    for name in names:
        centre = rng.uniform(20, 34, (3, 1, 1, 1))
        label = (((grid - centre) ** 2).sum(0) < 100).astype(np.uint8)
        label[2:8, 2:8, 2:8] = 2
        image = (40 * label + rng.integers(0, 20, label.shape)).astype(np.float32)
        for part, values in (("imagesTr", image), ("labelsTr", label)):
            nib.save(
                nib.Nifti1Image(values, np.diag([2.0, 2.0, 2.0, 1.0])),
                folder / part / f"{name}.nii",
            )
    entries = [{"image": f"imagesTr/{name}.nii", "label": f"labelsTr/{name}.nii"} for name in names]
    lists = json.loads((folder / "dataset_0.json").read_text())
    (folder / "dataset_0.json").write_text(json.dumps(lists | {"test": entries}))
    ended = place.run("max_steps=1", "patch_size=[48,48,48]")
    assert ended.code == 0, ended.text

    noted = place.path / "memory.jsonl"
    ended = run(
        "test_3d.py",
        "--ckpt",
        f"{place.cell.folder}/best.pt",
        cwd=place.path,
        timeout=300,
        prepare=functools.partial(watch_memory, "inference", "predict_labels", noted),
    )
    assert ended.code == 0, ended.text
    assert len(noted.read_text().splitlines()) == 200
    assert growth(noted) < 0.05


STEPS = 2000 if FULL else 300


@pytest.mark.slow
@pytest.mark.parametrize("name", ["supervised", "cirkd", "crkd", "lefed"] if FULL else ["crkd"])
def test_many_steps_with_flat_memory(site, name):
    """Ten times validated and saved on the way."""
    place = site(name)
    noted = place.path / "memory.jsonl"
    ended = place.run(
        f"max_steps={STEPS}",
        f"val_interval={STEPS // 10}",
        f"save_interval={STEPS // 10}",
        timeout=3600,
        prepare=functools.partial(watch_memory, "utils.numerics", "StepWatch.before", noted),
    )
    assert ended.code == 0, ended.text
    assert len(noted.read_text().splitlines()) >= STEPS
    assert growth(noted) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, how", [("supervised", "SIGKILL"), ("crkd", "exit"), ("lefed", "SIGBUS")]
)
def test_a_loader_process_that_dies_is_an_error_that_names_the_likely_cause(site, name, how):
    """And not a hang: the limit is a small part of torch's own waiting times added up."""
    place = site(name)
    draw = 4 * (1 if name == "supervised" else 2)
    ended = place.run(
        "workers=2", "max_steps=40", prepare=functools.partial(die_in_loader, draw, how), timeout=60
    )
    assert ended.code == 1, ended.text
    said = ended.text.strip().splitlines()[-1]
    assert (
        said.startswith("error: a loader process died (DataLoader worker (pid")
        and "Traceback" not in said
    )
    assert {"SIGKILL": "Killed", "exit": "exit", "SIGBUS": "Bus error"}[how] in said
    for word in (
        "ran out of memory",
        "shared memory",
        "/dev/shm has",
        "--shm-size",
        "workers=0",
        "--resume",
    ):
        assert word in said
    again = place.run("--resume", "workers=0", "max_steps=40", "val_interval=40")
    assert again.code == 0 and load_checkpoint(place.folder / "last.pt")["step"] == 40
