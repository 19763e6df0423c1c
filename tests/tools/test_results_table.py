"""Tables: explicit runs, and the published layout with means over seeds, presets apart and
published figures.
"""

import csv
import json
import sys

import pytest
import yaml

from losses import KD_METHODS
from networks import NETWORKS
from tools import results_table, tables


def summary(
    dice=0.7, hd95=10.0, seed=0, method="supervised", teacher=None, student="unet", **values
):
    mean = {"dice": dice, "jaccard": dice / 2, "hd95": hd95, "asd": 1.0}
    space = {"mean": mean, "cases": 6, "counts": {"missed": 1, "spurious": 0, "pairs": 78}}
    space["penalised"] = {"mean": {"hd95": 15.0, "asd": 4.0}}
    return {
        "dataset": "btcv",
        "method": method,
        "teacher": teacher,
        "student": student,
        "seed": seed,
        "preset": "clean",
        "tag": "",
        "checkpoint": "best.pt",
        "step": 90,
        "max_steps": 100,
        "split": "val",
        "selected_on_reported": True,
        "hd95_definition": "pooled",
        "resampled": space,
        "native": space,
        "parameters": 1961012,
        "gmacs": 8.1219,
        "patch_size": [96, 96, 96],
        "ms_per_volume": 12.0,
        "device": "CPU",
        "threads": 1,
        **values,
    }


def write(folder, **values):
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary(**values)), encoding="utf-8")
    return folder


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["results_table.py", *map(str, arguments)])
    assert results_table.main() == 0
    return capsys.readouterr().out


def row(output, title, start):
    """Cells of the line that begins with `start` in the table under the heading `title`."""
    table = output.split(f"### {title}\n")[1].split("###")[0]
    return [
        [part.strip() for part in line.strip("|").split("|")]
        for line in table.splitlines()
        if start in line
    ]


def test_explicit_runs(tmp_path, monkeypatch, capsys):
    first = write(tmp_path / "a")
    second = write(tmp_path / "b", method="kd", teacher="resunet", dice=0.75, preset="as_released")
    output = run(monkeypatch, capsys, first, second / "summary.json", "--csv", tmp_path / "x.csv")
    lines = output.splitlines()
    assert lines[2].split("|")[1].strip() == "unet, supervised"
    assert lines[3].split("|")[1].strip() == "unet <- resunet, kd, as_released"
    values = [cell.strip() for cell in lines[3].split("|")[2:8]]
    assert values == ["75.00", "37.50", "10.00 / 15.00*", "1.00 / 4.00*", "1/78", "1,961,012"]
    assert "* with missed and false positive classes as the diagonal" in output
    assert "left out:" not in output
    assert (tmp_path / "x.csv").read_text().count("\n") == 3
    with pytest.raises(SystemExit, match="none of these runs is tested"):
        run(monkeypatch, capsys, tmp_path / "missing")
    with pytest.raises(SystemExit):
        run(monkeypatch, capsys)


def test_seeds_are_told_apart_and_averaged(tmp_path, monkeypatch, capsys):
    runs = [write(tmp_path / f"{k}", seed=k, dice=0.6 + 0.1 * k, hd95=9.0 + k) for k in (0, 1)]
    taught = {"method": "kd", "teacher": "resunet"}
    runs.append(write(tmp_path / "kd", dice=0.9, **taught))
    runs.append(write(tmp_path / "last", dice=0.8, checkpoint="last.pt", **taught))
    table = run(monkeypatch, capsys, *runs).splitlines()[2:7]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    names = ("unet, supervised, best.pt", "unet <- resunet, kd, best.pt")
    seeds = [", seed 0", ", seed 1", ", 2 seeds"]
    assert [line[0] for line in lines[:3]] == [names[0] + seed for seed in seeds]
    assert [line[1] for line in lines] == ["60.00", "70.00", "65.00 ± 5.00", "90.00", "80.00"]
    assert lines[2][3] == "9.50 ± 0.50 / 15.00*" and lines[2][5] == "2/156"
    assert [line[0] for line in lines[3:]] == [names[1], names[1].replace("best", "last")]


def test_runs_that_cannot_stand_beside_the_others_are_left_out(tmp_path, monkeypatch, capsys):
    good = [write(tmp_path / "a"), write(tmp_path / "b", seed=1), write(tmp_path / "c", seed=2)]
    for folder, case in zip(good, ("case1", "case1", "case2")):
        (folder / "metrics.csv").write_text(f"case,class,dice\n{case},liver,0.7\n")
    fewer = write(tmp_path / "d", seed=3)  # says as many cases as the others
    (fewer / "metrics.csv").write_text("case,class,dice\ncase0,liver,0.7\n")
    for folder in good[:2]:
        with (folder / "metrics.csv").open("a") as file:
            file.write("case0,liver,0.7\n")
    other = write(tmp_path / "other list", split="test")
    foreign = write(tmp_path / "word", dataset="word")
    config = {"student": "unet", "patch_size": [8] * 3, "max_steps": 100}
    for name, steps in (("running", 40), ("untested", 100)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        (folder / "log.jsonl").write_text(json.dumps({"step": steps - 1, "kind": "train"}) + "\n")
    named = [
        tmp_path / "untested",
        *good,
        fewer,
        other,
        foreign,
        tmp_path / "running",
        tmp_path / "none",
    ]
    output = run(monkeypatch, capsys, *named)
    table, _, left = output.partition("7 left out:\n")
    assert table.count("unet, supervised, seed") == 2 and "word" not in table
    found = dict(line[2:].split(": ", 1) for line in left.splitlines())
    test = "run: python test_3d.py --ckpt"
    assert found == {
        f"{tmp_path}/untested": f"not tested; {test} {tmp_path}/untested/best.pt",
        f"{tmp_path}/running": "still training, or stopped: step 40 of 100; "
        f"run: python train_3d_distill.py --resume {tmp_path}/running",
        f"{tmp_path}/none": "no run there: neither config.yaml nor best.pt",
        f"{tmp_path}/c": "scored on other val cases, such as case2; "
        f"{test} {tmp_path}/c/best.pt --split val",
        f"{tmp_path}/other list": "scored on the list test, the others on val; "
        f"{test} '{tmp_path}/other list/best.pt' --split val",
        f"{tmp_path}/d": "scored on other val cases, such as case1; "
        f"{test} {tmp_path}/d/best.pt --split val",
        f"{tmp_path}/word": "of the data set word, the others of btcv; "
        f"run: python tools/results_table.py {tmp_path}/word/summary.json",
    }


def test_published_layout(tmp_path, monkeypatch, capsys):
    runs = tmp_path / "runs"
    for seed, dice in enumerate((0.64, 0.66)):
        write(runs / f"btcv/supervised/unet/seed{seed}", dice=dice, seed=seed)
    taught = {"method": "acf_bckd", "teacher": "resunet"}
    write(
        runs / "btcv/acf_bckd/resunet-unet/seed0",
        dice=0.762,
        hd95=20.0,
        published_protocol={"dice": 76.0, "hd95_voxels": 11.25, "hd95_voxels_penalised": 13.5},
        **taught,
    )
    write(
        runs / "btcv/acf_bckd-as_released/resunet-unet/seed0",
        dice=0.75,
        preset="as_released",
        **taught,
    )
    write(runs / "btcv/acf_bckd/resunet-unet/seed0-wide", dice=0.1, tag="wide", **taught)
    write(runs / "btcv/cwd/segresnet-unet/seed0", method="cwd", teacher="segresnet", hd95=None)
    write(runs / "word/supervised/unet/seed0", dataset="word", dice=0.5)
    layout = ("--layout", "kd", "--runs-dir", runs, "--dataset", "btcv")
    output = run(monkeypatch, capsys, *layout, "--csv", tmp_path / "x")
    assert row(output, "btcv: trained alone", "| U-Net") == [
        [
            "U-Net",
            "1,961,012",
            "8.12",
            "65.00 ± 1.00 / 10.00 ± 0.00 / 15.00*, missed 2/156",
            "2",
            "65.08 ± 0.87 / 31.55 vox",
        ]
    ]
    assert row(output, "btcv: trained alone", "LCOV-Net")[0][3] == "not run"
    assert row(output, "btcv: ACF-BCKD", "| U-Net") == [
        [
            "U-Net",
            "1,961,012",
            "8.12",
            "clean",
            "76.20 / 20.00 / 15.00* (11.25 / 13.50* vox), missed 1/78",
            "1",
            "76.28",
            "not run",
            "-",
            "76.33",
        ],
        [
            "U-Net",
            "1,961,012",
            "8.12",
            "as_released",
            "75.00 / 10.00 / 15.00*, missed 1/78",
            "1",
            "76.28",
            "not run",
            "-",
            "76.33",
        ],
    ]
    assert row(output, "btcv: methods, student U-Net", "CWD") == [
        [
            "CWD",
            "1,961,012",
            "8.12",
            "clean",
            "not run",
            "-",
            "75.84",
            "70.00 / - / 15.00*, missed 1/78",
            "1",
            "75.76",
        ]
    ]
    assert "voxels of the resampled grid" in output
    assert "1 tagged run(s) left out" in output
    assert "word" not in output
    with (tmp_path / "x").open(encoding="utf-8") as file:
        cells = list(csv.DictReader(file))
    assert len(cells) == 6 + 2 * (4 + 1) + 2 * 9
    alone = next(
        cell for cell in cells if cell["method"] == "supervised" and cell["student"] == "unet"
    )
    assert (alone["dice"], alone["dice_std"], alone["seeds"]) == ("65.00", "1.00", "0 1")
    assert (alone["published_dice"], alone["published_hd95_voxels"]) == ("65.08", "31.55")


def test_a_dataset_without_published_figures(tmp_path, monkeypatch, capsys):
    write(
        tmp_path / "runs/own/kd/resunet-unet/seed0", dataset="own", method="kd", teacher="resunet"
    )
    output = run(
        monkeypatch, capsys, "--layout", "kd", "--runs-dir", tmp_path / "runs", "--dataset", "own"
    )
    assert row(output, "own: methods, student U-Net", "KD")[0][4:7] == [
        "70.00 / 10.00 / 15.00*, missed 1/78",
        "1",
        "-",
    ]


def test_no_run_is_left_out(tmp_path, monkeypatch, capsys):
    """Methods, students, teachers and data sets that the paper does not have are in the tables."""
    runs = tmp_path / "runs"
    write(runs / "own/0", dataset="own", method="mskd_cakd", teacher="resunet")
    write(runs / "brats21/0", dataset="brats21", method="dkd", teacher="segresnet")
    write(runs / "btcv/0", method="emkd", teacher="resunet", student="espnetv2")
    write(runs / "btcv/1", method="Mine", teacher="vnet", student="Tiny", dice=0.6)
    write(runs / "btcv/2", student="Tiny")
    write(runs / "own/4", dataset="own", method="acf_bckd+dist", teacher="resunet", dice=0.8)
    write(runs / "btcv/3", method="acf_bckd", teacher="vnet", student="unet", dice=0.5)
    layout = ("--layout", "kd", "--runs-dir", runs)
    output = run(monkeypatch, capsys, *layout, "--csv", tmp_path / "cells.csv")
    assert row(output, "own: methods, student U-Net", "MSKD_CAKD")[0][4].startswith("70.00")
    assert row(output, "own: methods, student U-Net", "ACF-BCKD + DIST")[0][4].startswith("80.00")
    assert row(output, "brats21: methods, student U-Net", "DKD")[0][7].startswith("70.00")
    assert row(output, "btcv: methods, student ESPNetV2", "EMKD")[0][4].startswith("70.00")
    assert row(output, "btcv: methods, student Tiny", "MINE")[0][10].startswith("60.00")
    assert row(output, "btcv: trained alone", "Tiny")[0][3].startswith("70.00")
    assert row(output, "btcv: ACF-BCKD", "| U-Net")[0][10].startswith("50.00")
    assert "vnet: Dice % / HD95" in output
    with (tmp_path / "cells.csv").open(encoding="utf-8") as file:
        assert sum(cell["runs"] == "1" for cell in csv.DictReader(file)) == 7


def test_the_few_label_layout_has_every_method_that_was_run(tmp_path, monkeypatch, capsys):
    few = {"student": "unet2d", "labelled": 3, "dataset": "acdc"}
    for method in ("crkd", "Mine"):
        write(tmp_path / method, method=method, **few)
    layout = ("--layout", "ssl", "--protocol", "clean", "--runs-dir", tmp_path)
    output = run(monkeypatch, capsys, *layout)
    for method in ("crkd", "Mine"):
        (line,) = row(output, "acdc, 3 labelled", f"| {method}")
        assert line[2] == "70.00" and line[7] == "1"


def test_a_run_without_the_penalised_figure_is_marked(tmp_path, monkeypatch, capsys):
    old = summary()
    for space in ("resampled", "native"):
        old[space].pop("penalised", None)
    (tmp_path / "btcv").mkdir()
    (tmp_path / "btcv/summary.json").write_text(json.dumps(old), encoding="utf-8")
    lines = run(monkeypatch, capsys, tmp_path / "btcv").splitlines()
    assert (
        lines[2].split("|")[4].strip() == "10.00 / nan*"
        and "nan: not known" in lines[-1] + lines[-2]
    )
    output = run(monkeypatch, capsys, "--layout", "kd", "--runs-dir", tmp_path, "--dataset", "btcv")
    assert (
        row(output, "btcv: trained alone", "| U-Net")[0][3]
        == "70.00 / 10.00 / unknown*, missed 1/78"
    )
    old["resampled"]["counts"] = {"missed": 0, "spurious": 0, "pairs": 78}
    (tmp_path / "btcv/summary.json").write_text(json.dumps(old), encoding="utf-8")
    output = run(monkeypatch, capsys, "--layout", "kd", "--runs-dir", tmp_path, "--dataset", "btcv")
    assert row(output, "btcv: trained alone", "| U-Net")[0][3] == "70.00 / 10.00, missed 0/78"


def test_two_runs_of_one_cell_and_seed_are_an_error(tmp_path, monkeypatch, capsys):
    write(tmp_path / "a")
    write(tmp_path / "b")
    with pytest.raises(SystemExit, match="a second run"):
        run(monkeypatch, capsys, "--layout", "kd", "--runs-dir", tmp_path)


def test_published_figures_are_complete():
    published = yaml.safe_load(tables.PUBLISHED_KD.read_text(encoding="utf-8"))
    assert list(published) == ["btcv", "word", "brats21"]
    assert {*tables.TEACHERS, *tables.STUDENTS} <= set(NETWORKS)
    assert set(tables.RIVALS) <= set(KD_METHODS)
    for name, figures in published.items():
        assert list(figures["alone"]) == [*tables.TEACHERS, *tables.STUDENTS]
        assert list(figures["distilled"]["acf_bckd"]) == list(tables.STUDENTS)
        rivals = [method for method in figures["distilled"] if method != "acf_bckd"]
        # EMKD and MSKD + CAKD are of other papers
        assert rivals == list(tables.RIVALS[: 2 if name == "brats21" else 9])
        for students in figures["distilled"].values():
            for taught in students.values():
                assert list(taught) == list(tables.TEACHERS)
                assert all(50 < figure[0] < 100 for figure in taught.values())
