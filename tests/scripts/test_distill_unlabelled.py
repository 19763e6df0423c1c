"""Distillation with scans that have no labels: what they are trained on, logged, shown, and what is
refused.
"""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from dataloaders import build_dataset
from losses import KD_METHODS
from losses.nkd import normalised_kd
from losses.segmentation import SegmentationLoss
from networks import build_network, init_weights
from tests.scripts.conftest import make_workspace, run, train
from tests.scripts.test_unlabelled import write_list
from train_3d_distill import parse_args
from utils.checkpoint import digest, load_checkpoint
from utils.distillation import Batches
from utils.distributed import World
from utils.modes import seed_everything

KD = ("--method", "kd", "--student", "unet")


@pytest.fixture
def taught(workspace):
    """A workspace with three training scans, two others in `more`, and a teacher of two steps."""
    write_list(workspace)
    (workspace / "more").mkdir()
    for name in ("case3", "case4"):
        shutil.move(workspace / f"data/imagesTr/{name}.nii.gz", workspace / "more")
    train("--method", "supervised", "--student", "resunet", "--opts", "max_steps=2", cwd=workspace)
    return workspace


def folder_of(workspace, labels, tag="", method="kd"):
    return workspace / f"runs/tiny/{method}/resunet-unet-{labels}/seed0{tag and '-'}{tag}"


def log_of(folder, kind):
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def test_labelled_and_unlabelled_scans_to_the_table_and_the_report(taught):
    flags = ("--labelled", "2", "--unlabelled", "more")
    train("--method", "supervised", "--student", "unet", "--labelled", "2", cwd=taught)
    train(*KD, "--labelled", "2", "--opts", "unlabelled_batch=0", cwd=taught)
    out = train(*KD, *flags, cwd=taught)
    assert "runs/tiny/kd/resunet-unet-2-unlabelled/seed0" in out.stdout
    folder = folder_of(taught, "2-unlabelled")
    best = load_checkpoint(folder / "best.pt")
    assert best["cases"]["labelled"] == ["case0", "case1"]
    assert best["cases"]["unlabelled"] == ["case2", "case3", "case4"]
    assert load_checkpoint(folder_of(taught, "2") / "best.pt")["cases"]["unlabelled"] == []

    agreed, scored = log_of(folder, "agreement"), log_of(folder, "val")
    assert [line["step"] for line in agreed] == [line["step"] for line in scored] == [1, 3]
    assert {"dice", "ball", "box"} <= agreed[0].keys() and agreed[0] != scored[0]
    # the validation with the higher score, whichever agrees more
    chosen = max(range(2), key=lambda k: scored[k]["dice"])
    assert best["step"] == scored[chosen]["step"] + 1
    assert best["agreement"]["dice"] == agreed[chosen]["dice"]
    assert load_checkpoint(folder / "last.pt")["agreement"]["dice"] == agreed[-1]["dice"]
    for line in log_of(folder, "train"):
        assert line["mask_ratio"] == 1 and {"pseudo_foreground", "recall_1"} <= line.keys()
        assert line["loss"] == pytest.approx(line["seg"] + line["kd"], rel=1e-6)

    names = ("supervised/resunet", "supervised/unet-2", "kd/resunet-unet-2")
    runs = [taught / f"runs/tiny/{name}/seed0" for name in names] + [folder]
    for each in runs:
        run("test_3d.py", "--ckpt", str(each / "best.pt"), "--no-predictions", cwd=taught)
    table = run("tools/results_table.py", *map(str, runs), cwd=taught).stdout
    cells = [[cell.strip() for cell in row.split("|")] for row in table.splitlines()]
    place = next(row.index("agreement") for row in cells if "agreement" in row)
    shown = {row[1]: row[place] for row in cells if len(row) > place}
    assert shown["unet <- resunet, kd, 2 labelled + unlabelled"] == (
        f"{100 * best['agreement']['dice']:.2f}"
    )
    for name in ("resunet, supervised", "unet, supervised, 2 labelled"):
        assert shown[name] == "-"
    assert shown["unet <- resunet, kd, 2 labelled"] == "-"
    # the tables of the papers are of runs on all labels
    layout = run("tools/results_table.py", "--layout", "kd", "--dataset", "tiny", cwd=taught).stdout
    (teacher,) = [row for row in layout.splitlines() if row.startswith("| T1 ResU-Net")]
    assert "missed" in teacher
    students = [row for row in layout.splitlines() if row.startswith(("| U-Net", "| KD"))]
    assert students and not any("missed" in row for row in students)

    run("tools/report.py", str(folder), cwd=taught)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert f"Dice {100 * best['agreement']['dice']:.1f} %. It is no score" in page
    for title in ("student alone, %", "distilled on the labels alone, %", "distilled student, %"):
        assert title in page
    assert "agreement with the teacher on unlabelled scans" in page


def test_labels_of_unlabelled_scans_are_never_trained_on(taught):
    train(*KD, "--labelled", "1", "--opts", "tag=there", cwd=taught)
    write_list(taught, without=["case1", "case2"])
    train(*KD, "--labelled", "1", "--opts", "tag=gone", cwd=taught)
    there, gone = (folder_of(taught, "1-unlabelled", tag) for tag in ("there", "gone"))
    first, second = (load_checkpoint(folder / "last.pt") for folder in (there, gone))
    assert first["cases"]["unlabelled"] == second["cases"]["unlabelled"] == ["case1", "case2"]
    assert digest(first["weights"]) == digest(second["weights"])
    assert log_of(there, "agreement") == log_of(gone, "agreement")
    for known, unknown in zip(log_of(there, "train"), log_of(gone, "train"), strict=True):
        assert 0 < known.pop("pseudo_accuracy") < 1 and unknown.pop("pseudo_accuracy") is None
        assert known.pop("true_foreground") > 0 and unknown.pop("true_foreground") is None
        differ = {key for key in known if known[key] != unknown[key]}
        assert differ == {"recall_1", "recall_2"}


def test_no_labels_at_all(taught):
    """Nor any to validate on: the last weights are the result, and nothing is called the best."""
    kept = taught / "teacher.pt"
    shutil.copy(taught / "runs/tiny/supervised/resunet/seed0/best.pt", kept)
    options = ("--opts", f"teacher_checkpoint={kept}", "teacher_views=flips")
    train(*KD, "--labelled", "0", *options, cwd=taught)
    validated = folder_of(taught, "0-unlabelled")
    assert log_of(validated, "teacher") and log_of(validated, "val")
    assert (validated / "best.pt").exists()
    path = taught / "data/dataset_0.json"
    lists = json.loads(path.read_text())
    unlabelled = [{"image": entry["image"]} for entry in lists["training"]]
    path.write_text(json.dumps({"training": unlabelled, "test": lists["test"]}))
    out = train(*KD, "--labelled", "0", *options, "tag=none", cwd=taught)
    assert "note: no val cases with labels, so nothing is validated" in out.stderr
    folder = folder_of(taught, "0-unlabelled", "none")
    assert (
        f"nothing was validated; the result is {folder.relative_to(taught)}/last.pt" in out.stdout
    )
    assert not (folder / "best.pt").exists()
    assert not log_of(folder, "val") and not log_of(folder, "teacher")
    assert len(log_of(folder, "agreement")) == 2
    # the same weights: no label has a part in them
    last = load_checkpoint(folder / "last.pt")
    assert digest(last["weights"]) == digest(load_checkpoint(validated / "last.pt")["weights"])
    run("test_3d.py", "--ckpt", str(folder / "last.pt"), "--no-predictions", cwd=taught)
    summary = json.loads((folder / "summary_last.json").read_text())
    assert summary["trained_on"] == {"labelled": "0", "unlabelled": 3}
    assert summary["agreement"] == last["agreement"]["dice"]


@pytest.mark.parametrize("workers", ["0", "1"])
def test_resume_is_bit_identical(taught, workers):
    flags = ("--method", "acf_bckd", "--labelled", "2", "--unlabelled", "more")
    options = (f"workers={workers}", "teacher_views=flips", "tag=r")
    train(*flags, "--opts", *options, cwd=taught)
    folder = folder_of(taught, "2-unlabelled", "r", "acf_bckd")
    straight, log = load_checkpoint(folder / "last.pt"), (folder / "log.jsonl").read_text()
    (folder / "last.previous.pt").replace(folder / "last.pt")
    assert load_checkpoint(folder / "last.pt")["step"] == 2
    run("train_3d_distill.py", "--resume", str(folder.relative_to(taught)), cwd=taught)
    again = load_checkpoint(folder / "last.pt")
    for part in ("weights", "method"):
        assert digest(again[part]) == digest(straight[part])
    assert (folder / "log.jsonl").read_text() == log


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A workspace with a teacher of two steps, for runs that share it."""
    folder = make_workspace(tmp_path_factory.mktemp("teacher"))
    train("--method", "supervised", "--student", "resunet", "--opts", "max_steps=2", cwd=folder)
    return folder


@pytest.mark.parametrize("method", KD_METHODS)
def test_every_method_leaves_out_where_the_teacher_is_unsure(teacher, method):
    options = ("pseudo_confidence=0.42", "max_steps=2")
    train("--method", method, "--labelled", "2", "--opts", *options, cwd=teacher)
    folder = folder_of(teacher, "2-unlabelled", method=method)
    (line,) = log_of(folder, "train")
    assert 0.05 < line["mask_ratio"] < 0.95
    assert all(value is not None for value in line.values())
    assert load_checkpoint(folder / "last.pt")["step"] == 2


def test_voxels_that_are_left_out_count_in_no_term(teacher):
    """With all of them left out, those of the labelled patch alone are left."""
    terms = {}
    for confidence in ("0", "1"):
        options = (f"pseudo_confidence={confidence}", "log_interval=1", f"tag=c{confidence}")
        train("--method", "nkd", "--labelled", "2", "--opts", *options, cwd=teacher)
        folder = folder_of(teacher, "2-unlabelled", f"c{confidence}", "nkd")
        terms[confidence] = log_of(folder, "train")[0]
    assert (terms["0"]["mask_ratio"], terms["1"]["mask_ratio"]) == (1, 0)
    cfg = parse_args(["--config", str(teacher / "tiny.yaml"), "--labelled", "2"])[1]
    cfg = dataclasses.replace(
        cfg, data_root=str(teacher / "data"), cache_dir=str(teacher / "cache")
    )
    dataset = build_dataset(**cfg.dataset_arguments())
    run = SimpleNamespace(world=World(), device=torch.device("cpu"), start=0)
    batch = next(Batches(cfg, run, dataset, dataset.splits(2)).training())
    seed_everything(0)
    student = init_weights(build_network("unet", 1, 3, **cfg.network_arguments("unet"))).train()
    logits = student(batch["image"])[:1]
    assert terms["1"]["seg"] == pytest.approx(SegmentationLoss()(logits, batch["label"]).item())
    assert terms["1"]["seg"] != pytest.approx(terms["0"]["seg"], rel=1e-3)
    best = load_checkpoint(teacher / "runs/tiny/supervised/resunet/seed0/best.pt")
    network = build_network("resunet", 1, 3, **best["network"]["arguments"]).eval()
    network.load_state_dict(best["weights"])
    target, rest = normalised_kd(logits, network(batch["image"][:1]), batch["label"])
    assert terms["1"]["nkd_target"] == pytest.approx(target.item(), rel=1e-5)
    assert terms["1"]["nkd_nontarget"] == pytest.approx(1.5 * rest.item(), rel=1e-5)


def test_a_folder_in_the_file_is_for_students_with_a_teacher(taught):
    config = taught / "tiny.yaml"
    config.write_text(config.read_text() + "unlabelled: more\nlabelled: 1\nunlabelled_batch: 9\n")
    alone = train("--method", "supervised", "--student", "unet", cwd=taught)
    assert "runs/tiny/supervised/unet/seed0" in alone.stdout
    out = train(*KD, cwd=taught)
    assert "note: labelled, unlabelled_batch: for other training scripts" in out.stderr
    cases = load_checkpoint(folder_of(taught, "all-unlabelled") / "last.pt")["cases"]
    assert cases["labelled"] == ["case0", "case1", "case2"]
    assert cases["unlabelled"] == ["case3", "case4"]


def test_unlabelled_scans_of_the_list_that_nobody_asks_for(taught):
    write_list(taught, without=["case1"])
    out = train(*KD, cwd=taught)
    assert "note: 1 unlabelled scans are not used; unlabelled_batch=N takes N patches" in out.stderr
    folder = taught / "runs/tiny/kd/resunet-unet/seed0"
    assert load_checkpoint(folder / "last.pt")["cases"]["unlabelled"] == []
    assert not log_of(folder, "agreement")
    idle = train(*KD, "--opts", "teacher_views=flips", "tag=idle", cwd=taught)
    assert "pseudo_confidence and teacher_views do nothing" in idle.stderr


BAD = {
    "no teacher": (("--method", "supervised", "--unlabelled", "more"), "no teacher whose"),
    "no teacher, batch": (
        ("--method", "supervised", "--opts", "unlabelled_batch=1"),
        "--opts unlabelled_batch=1: unlabelled_batch: a network that is trained alone",
    ),
    "nothing to learn": (
        ("--method", "supervised", "--labelled", "0"),
        "labelled: 0 leaves a network that is trained alone nothing to learn from",
    ),
    "large": (
        ("--labelled", "2", "--opts", "unlabelled_batch=3"),
        "unlabelled_batch: 0 to 2, of the 2 patches of a batch",
    ),
    "negative": (("--labelled", "2", "--opts", "unlabelled_batch=-1"), "unlabelled_batch: 0 to 2"),
    "no labelled patch": (
        ("--labelled", "2", "--opts", "unlabelled_batch=2"),
        "2 of 2 patches leave no labelled one",
    ),
    "one patch": (("--labelled", "2", "--opts", "crops_per_case=1"), "1 of 1 patches leave no"),
    "some labelled": (
        ("--labelled", "0", "--opts", "unlabelled_batch=1"),
        "with labelled 0 all 2 patches of a batch come from unlabelled scans, not 1",
    ),
    "folder without patches": (
        ("--unlabelled", "more", "--opts", "unlabelled_batch=0"),
        "nothing is drawn from more with unlabelled_batch 0",
    ),
    "none left": (("--labelled", "3"), "but there are none; label fewer with --labelled"),
    "none": (("--opts", "unlabelled_batch=1"), "are to come from unlabelled scans, but there are"),
    "too many": (("--labelled", "4"), "but labelled is 4"),
    "no number": (("--opts", "labelled=2.5"), "labelled: a whole number, 0 for none, or a share"),
    "views": (("--opts", "teacher_views=turns"), "choose from one, flips"),
    "confidence": (("--opts", "pseudo_confidence=1.5"), "pseudo_confidence: must lie in [0, 1]"),
    "no folder": (("--unlabelled", "nowhere"), "nowhere: no such file or folder"),
    "overlap": (("--unlabelled", "data/imagesTr"), "'case0' is in both the"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_input_stops_before_the_first_step(workspace, fault):
    flags, expected = BAD[fault]
    write_list(workspace)
    (workspace / "more").mkdir()
    shutil.copy(workspace / "data/imagesTr/case4.nii.gz", workspace / "more")
    result = train(*flags, cwd=workspace, ok=False)
    assert result.returncode == 1 and expected in result.stderr
    assert "Traceback" not in result.stderr and not list(workspace.glob("runs/**/last.pt"))
