"""The tables of the documents are those of results/*.jsonl, whose lines are of real runs: commands,
cases, means.
"""

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

import train_2d_crkd
import train_3d_crkd
import train_3d_distill
from tests.scripts.conftest import ROOT, make_workspace, run, train
from tools import evidence, tables
from utils.config import labelled_name
from utils.run import run_folder

FILES = sorted((ROOT / "results").glob("*.jsonl"))
DOCUMENTS = [ROOT / "RESULTS.md", ROOT / "results/NOTES.md"]
MODULES = {
    f"{module.__name__}.py": module for module in (train_3d_distill, train_2d_crkd, train_3d_crkd)
}
DOCUMENT = """# Results

<!-- evidence: tiny alone -->
<!-- end -->

Text.

<!-- evidence: tiny methods resunet -->
to be replaced
<!-- end -->
"""


def ids(path):
    return path.name


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["evidence.py", *map(str, arguments)])
    return evidence.main()


def row(method="kd", seed=0, dice=80.0, *, tag="s10", **values):
    """A line of a file of two cases."""
    own = {
        "run": f"{method}/{seed}{tag}",
        "method": method,
        "preset": "clean",
        "student": "unet",
        "seed": seed,
        "teacher": None if method == "supervised" else "resunet",
        "tag": tag,
        "max_steps": 10,
        "lr": 0.05,
        "parameters": 1000,
        "gmacs": 0.5,
        "missed": 0,
        "spurious": 0,
        "pairs": 4,
        "split": "test",
        "device": "CPU",
        "threads": 1,
        "seconds": 60,
        "code": "abc",
        "date": "2026-01-01",
        "selected_on_reported": False,
        "curve": [[5, 40.0], [10, dice]],
    }
    mean = {"dice": dice, "jaccard": dice - 10, "hd95": 2.0, "asd": 1.0}
    return (
        own
        | {"mean": mean, "cases": {key: [value - 1, value + 1] for key, value in mean.items()}}
        | values
    )


def results(*rows):
    return tables.Results(["a", "b"], rows)


def folder_of(cfg):
    """The run folder of a configuration, below runs/."""
    if hasattr(cfg, "network"):
        networks = f"{cfg.network}-{labelled_name(cfg.labelled)}"
    else:
        networks = cfg.student if cfg.method == "supervised" else f"{cfg.teacher}-{cfg.student}"
    folder = run_folder("runs", cfg.dataset, cfg.method, networks, cfg.seed, cfg.preset, cfg.tag)
    return "/".join(folder.parts[1:])


# --- what is committed ---


def test_files_are_there():
    assert FILES


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids)
def test_tables_of_the_documents_are_those_of_the_files(document):
    assert evidence.tables(document, ROOT / "results", check=True) == 0


def test_every_line_is_in_a_table():
    """What was measured is shown: no run is kept out of the documents."""
    text = "".join(document.read_text(encoding="utf-8") for document in DOCUMENTS)
    for file in FILES:
        found = tables.Results(*tables.read(file))
        named = re.findall(rf"<!-- evidence: {file.stem} (\w+)((?: \w+)*) -->", text)
        shown = {
            r["run"]
            for name, arguments in named
            for r in tables.TABLES[name](found, *arguments.split())[2]
        }
        assert {r["run"] for r in found.rows} == shown


@pytest.mark.parametrize("file", FILES, ids=ids)
def test_means_are_those_of_the_cases(file):
    cases, rows = tables.read(file)
    assert len(set(cases)) == len(cases) and len({r["run"] for r in rows}) == len(rows)
    for r in rows:
        assert {*tables.BRIEF, "jaccard"} <= r["mean"].keys() == r["cases"].keys()
        for metric in r["mean"]:
            values = r["cases"][metric]
            assert len(values) == len(cases)
            if metric in ("dice", "jaccard") or not r["missed"] + r["spurious"]:
                assert r["mean"][metric] == pytest.approx(sum(values) / len(values), abs=2e-3), (
                    r["run"],
                    metric,
                )
        assert ("penalised" in r) == (r["missed"] + r["spurious"] > 0)


@pytest.mark.parametrize("file", FILES, ids=ids)
def test_commands_lead_to_the_runs(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    for r in tables.read(file)[1]:
        _, script, *flags = shlex.split(r["command"])
        cfg = MODULES[script].parse_args(flags)[1]
        assert r["run"] == folder_of(cfg) and cfg.max_steps == r["max_steps"]
        assert re.fullmatch("[0-9a-f]{7,}", r["code"]), (
            f"{r['run']}: not trained by a committed state"
        )


# --- collecting ---


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workspace with a teacher, a student alone and a distilled one, trained and tested, and
    their file.
    """
    folder = make_workspace(tmp_path_factory.mktemp("evidence"))
    (folder / "configs").mkdir()
    shutil.copy(folder / "tiny.yaml", folder / "configs")
    train("--method", "supervised", "--student", "resunet", cwd=folder)
    train(
        "--method", "supervised", "--student", "unet", "--seed", "3", "--opts", "tag=s4", cwd=folder
    )
    train(
        "--method",
        "kd",
        "--teacher",
        "resunet",
        "--student",
        "unet",
        "--opts",
        "tag=s4",
        "lr=0.02",
        "method_args={kd: {weight: 3.0}}",
        cwd=folder,
    )
    for path in sorted((folder / "runs").rglob("best.pt")):
        run("test_3d.py", "--ckpt", str(path), "--no-predictions", cwd=folder)
    run("tools/evidence.py", "collect", "results/tiny.jsonl", "runs/tiny", cwd=folder)
    return folder


def test_collected_lines(trained):
    cases, rows = tables.read(trained / "results/tiny.jsonl")
    assert cases == ["case6"]
    assert [r["run"] for r in rows] == [
        "tiny/kd/resunet-unet/seed0-s4",
        "tiny/supervised/resunet/seed0",
        "tiny/supervised/unet/seed3-s4",
    ]
    summary = json.loads((trained / "runs" / rows[0]["run"] / "summary.json").read_text())
    assert rows[0]["mean"]["dice"] == pytest.approx(
        100 * summary["resampled"]["mean"]["dice"], abs=1e-3
    )
    assert rows[0]["cases"]["dice"] == [pytest.approx(rows[0]["mean"]["dice"], abs=2e-3)]
    assert [step for step, _ in rows[0]["curve"]] == [2, 4]
    assert all(r["seconds"] >= 0 and r["code"] == summary["code"] for r in rows)
    assert rows[0]["command"] == (
        "python train_3d_distill.py --config configs/tiny.yaml --method kd --teacher resunet "
        "--student unet --seed 0 "
        "--opts 'method_args={kd: {weight: 3.0}}' lr=0.02 tag=s4"
    )


def test_collecting_again_replaces(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(trained)
    before = (trained / "results/tiny.jsonl").read_text()
    assert call(monkeypatch, "collect", "results/tiny.jsonl", "runs/tiny/kd") == 0
    assert (trained / "results/tiny.jsonl").read_text() == before


def test_time_of_a_copy_without_tensorboard_files(tmp_path):
    for name, time in (("config.yaml", 1000), ("log.jsonl", 1090)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time, time))
    assert evidence.time_of(tmp_path)[0] == 90
    os.utime(tmp_path / "log.jsonl", (1000, 1000))
    with pytest.raises(ValueError, match="copy run folders with their times"):
        evidence.time_of(tmp_path)


def test_the_line_below_a_table_names_gpus():
    here, there = row(seed=0), row(seed=1, device="GPU X")
    assert "GPU" not in tables.footer([here], 2)[0]
    assert (
        "of 2 minutes together, 1 of them tested on GPU X, 2 test cases"
        in tables.footer([here, there], 2)[0]
    )
    assert "1 training of 1 minutes together, tested on GPU X, " in tables.footer([there], 2)[0]


def test_other_cases_are_refused(trained, monkeypatch):
    monkeypatch.chdir(trained)
    (trained / "results/other.jsonl").write_text('{"cases": ["case1"]}\n')
    with pytest.raises(
        SystemExit, match=r"summary\.json: scored on other cases than the runs of .*other\.jsonl"
    ):
        call(monkeypatch, "collect", "results/other.jsonl", "runs/tiny")
    (trained / "results/other.jsonl").write_text("no JSON\n")
    with pytest.raises(SystemExit, match=r"other\.jsonl: not a file of tools/evidence\.py collect"):
        call(monkeypatch, "collect", "results/other.jsonl", "runs/tiny")
    (trained / "results/other.jsonl").unlink()
    with pytest.raises(SystemExit, match=r"no summary\.json"):
        call(monkeypatch, "collect", "results/other.jsonl", "data")


def test_a_document_is_written_and_checked(trained, tmp_path, monkeypatch, capsys):
    document = tmp_path / "RESULTS.md"
    document.write_text(DOCUMENT)
    arguments = ("tables", "--document", document, "--results", trained / "results")
    assert call(monkeypatch, *arguments, "--check") == 1
    assert call(monkeypatch, *arguments) == 0
    text = document.read_text()
    assert "to be replaced" not in text and "Text." in text and text.count("<!-- end -->") == 2
    assert "| KD | 1 |" in text and "| AT | 0 | not run |" in text
    assert call(monkeypatch, *arguments, "--check") == 0
    number = re.search(r"\| KD \| 1 \| ([\d.]+) ", text)[1]
    document.write_text(text.replace(f"| {number} ", "| 99.99 ", 1))
    capsys.readouterr()
    assert call(monkeypatch, *arguments, "--check") == 1
    assert "not what results/ gives" in capsys.readouterr().out
    document.write_text("<!-- evidence: missing few_labels la 4 -->\n<!-- end -->\n")
    assert call(monkeypatch, *arguments) == 0
    text = document.read_text()
    assert "| MLRPL | 0 | not run |" in text and "No run yet." in text
    for broken in (
        "<!-- evidence: tiny alone -->\n",
        "<!-- evidence: tiny  alone -->\n<!-- end -->\n",
    ):
        document.write_text(broken)
        with pytest.raises(SystemExit, match="misspelt or has no end"):
            call(monkeypatch, *arguments)
    document.write_text(DOCUMENT.replace("methods", "nothing"))
    with pytest.raises(SystemExit, match="no table 'nothing'; choose from alone, methods"):
        call(monkeypatch, *arguments)


def test_figures(tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    rows = [
        row("supervised"),
        row("supervised", student="resunet", tag="", dice=90.0),
        row(),
        row(seed=1),
    ]
    lines = [{"cases": ["a", "b"]}, *rows]
    (tmp_path / "results/hippocampus.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert (
        call(monkeypatch, "figures", "--results", tmp_path / "results", "--out", tmp_path / "out")
        == 0
    )
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "results_gap.png",
        "results_curves.png",
    }


# --- tables ---


def test_gap_closed():
    # the paper's 69 % on BTCV
    assert tables.gap_closed(76.28, 65.08, 81.37) == pytest.approx(68.75, abs=0.01)
    assert tables.published_gap("word", "acf_bckd", "resunet") == pytest.approx(52.8, abs=0.1)
    assert tables.published_gap("brats21", "cwd", "resunet") is None
    assert tables.gap_closed(None, 1.0, 2.0) is None
    assert (
        tables.gap_closed(80.0, 79.0, 79.5) is None and tables.gap_closed(80.0, 79.0, 70.0) is None
    )


def test_shown():
    rows = [row(dice=80.0), row(dice=82.0, seed=1)]
    assert (
        tables.shown(rows, "dice") == "81.00 ± 1.00" and tables.shown(rows[:1], "dice") == "80.00"
    )
    assert tables.shown([], "dice") == "not run"
    failed = row(seed=1, penalised={"hd95": 6.0, "asd": 3.0}, missed=1)
    # a run in which nothing failed: its own
    assert tables.shown([row(), failed], "hd95") == "2.00 ± 0.00 (4.00*)"
    nothing = row(mean=dict.fromkeys(tables.SHOWN), penalised={"hd95": 60.0, "asd": 60.0}, missed=4)
    assert (
        tables.shown([nothing], "hd95") == "- (60.00*)" and tables.shown([nothing], "dice") == "-"
    )


CASES = [f"case{k}" for k in range(8)]


def spread(method, dice, seed=0, **values):
    """A line of eight cases around `dice`."""
    line = row(method, seed, dice, **values)
    return line | {
        "cases": {
            key: [value + 0.1 * k for k in range(-4, 4)] for key, value in line["mean"].items()
        }
    }


def test_methods_are_ranked_and_tested():
    alone, above = spread("supervised", 70.0), spread("supervised", 90.0, student="resunet", tag="")
    found = tables.Results(
        CASES,
        [
            alone,
            above,
            spread("kd", 75.0),
            spread("cwd", 80.0),
            spread("acf_bckd", 85.0),
            spread("kd", 10.0, preset="as_released"),
            spread("acf_bckd", 10.0, tag="s10-afd"),
        ],
    )
    header, body, used = tables.methods_table(found, "resunet")
    cells = {line[0]: dict(zip(header, line)) for line in body}
    assert [cells[name]["rank"] for name in ("KD", "CWD", "ACF-BCKD", "AT")] == ["3", "2", "1", "-"]
    assert [cells[name]["gap closed"] for name in ("KD", "ACF-BCKD", "DIST")] == [
        "25 %",
        "75 %",
        "-",
    ]
    assert cells["ACF-BCKD"]["Dice above the student alone"] == "+15.00 [+15.00, +15.00]"
    # 8 of 8 cases higher: p = 2 / 2^8, three times that by Holm, and twice that among two rivals.
    assert cells["ACF-BCKD"]["p"] == "0.023" and cells["ACF-BCKD"]["p against ACF-BCKD"] == "-"
    assert cells["KD"]["p against ACF-BCKD"] == "0.016" and cells["AT"]["p"] == "-"
    assert {r["run"] for r in used} == {r["run"] for r in found.rows[:5]}
    assert cells["none"]["Dice"] == "70.00" and len(body[0]) == len(header)
    found = tables.Results(CASES, [*found.rows, spread("acf_bckd+dist", 87.0)])
    shown = tables.methods_table(found, "resunet", "run")[1]
    assert [line[0] for line in shown] == ["none", "KD", "CWD", "ACF-BCKD + DIST", "ACF-BCKD"]


def test_methods_of_other_seeds_are_ranked_by_their_gain():
    """Seed 1 is 10 points better for all: KD, of seed 1 only, has the higher mean and the smaller
    gain.
    """
    found = tables.Results(
        CASES,
        [
            spread("supervised", 70.0),
            spread("supervised", 80.0, seed=1),
            spread("supervised", 90.0, student="resunet"),
            spread("cwd", 75.0),
            spread("kd", 81.0, seed=1),
        ],
    )
    header, body, _ = tables.methods_table(found, "resunet", "run")
    cells = {line[0]: dict(zip(header, line)) for line in body}
    assert [cells[name]["rank"] for name in ("CWD", "KD")] == ["1", "2"]
    assert [cells[name]["gap closed"] for name in ("CWD", "KD")] == ["25 %", "10 %"]


def test_curves_of_the_student_alone_have_the_seeds_of_the_methods_beside_it():
    """Seed 1, which only the first teacher's methods have, ends 10 points higher."""
    figure = evidence.curves_figure(
        tables.Results(
            CASES,
            [
                spread("supervised", 70.0),
                spread("supervised", 80.0, seed=1),
                spread("kd", 71.0),
                spread("kd", 81.0, seed=1),
                spread("kd", 72.0, teacher="segresnet"),
            ],
        )
    )
    ends = [
        {line.get_label(): line.get_ydata()[-1] for line in axes.get_lines()}
        for axes in figure.axes
    ]
    assert ends == [{"student alone": 75.0, "KD": 76.0}, {"student alone": 70.0, "KD": 72.0}]


def test_only_seeds_that_both_have_are_compared():
    own = [spread("acf_bckd", 80.0), spread("acf_bckd", 99.0, seed=1)]
    found = tables.Results(CASES, own)
    compared = found.compared(own, {"kd": [spread("kd", 70.0)], "at": [spread("at", 70.0, seed=2)]})
    assert compared.keys() == {"kd"} and compared["kd"]["difference"] == pytest.approx(-10.0)


def test_few_patients_give_no_p():
    """Of four patients no p below 0.125 can come: none is shown, and no interval."""
    lines = [row("crkd", dice=60.0), row("supervised", dice=40.0)]
    for line in lines:
        line["cases"] = {
            key: [value + k for k in (-2, -1, 1, 2)] for key, value in line["mean"].items()
        }
    compared = tables.Results(["a", "b", "c", "d"], lines).compared(
        lines[:1], {"supervised": lines[1:]}
    )
    assert (
        compared["supervised"]["p_holm"] is None
        and tables.change(compared["supervised"], -1) == "+20.00"
    )
    assert tables.change(None) == "-"


def test_two_volumes_of_a_patient_are_one_of_the_sample():
    found = tables.Results(["patient001_frame01", "patient001_frame12"], [row(labelled=3)])
    assert found.by_patient(found.rows, "dice") == {"patient001": 80.0}


def test_seeds_are_averaged_case_by_case():
    found = results(row(), row(seed=1, dice=90.0))
    assert found.by_patient(found.cell(method="kd"), "dice") == {"a": 84.0, "b": 86.0}
    undefined = row(seed=2)
    undefined["cases"]["hd95"][0] = None
    assert results(row(), undefined).by_patient([row(), undefined], "hd95") == {"a": None, "b": 3.0}


def test_runs_of_other_lengths_are_not_seeds():
    with pytest.raises(
        ValueError, match="different lengths, rates or recipes, or with one seed twice"
    ):
        results(row(), row(seed=1, max_steps=20, tag="s20")).cell(method="kd")
    with pytest.raises(ValueError, match="the same training twice"):
        results(row(), row(tag=""))
    with pytest.raises(
        ValueError, match="different lengths, rates or recipes, or with one seed twice"
    ):
        results(row(lr=0.1), row(seed=1)).cell(method="kd")
    for recipe in ("s10-w4", "s10-own", "s10-warmup"):
        with pytest.raises(
            ValueError, match="different lengths, rates or recipes, or with one seed twice"
        ):
            results(row(), row(seed=1, tag=recipe)).cell(method="kd")


def test_validation_chooses_the_rate():
    """Test Dice 70 at the rate that validates best, 90 at the other: the cell is the former, with
    its other seeds.
    """

    def at(rate, dice, validation, seed=0, **values):
        return row(
            seed=seed,
            dice=dice,
            lr=rate,
            tag=f"s10-lr{rate}",
            curve=[[5, validation], [10, 1.0]],
            **values,
        )

    found = results(
        at(0.05, 90.0, 40.0), at(0.1, 70.0, 50.0), at(0.1, 72.0, 10.0, seed=1), row("at")
    )
    assert [r["mean"]["dice"] for r in found.cell(method="kd")] == [70.0, 72.0]
    header, body, used = tables.rates_table(found)
    assert (
        header == ["method", "rate 0.05", "rate 0.1"]
        and body == [["KD", "40.00", "**50.00**"]]
        and len(used) == 2
    )
    tags = (
        "s600-w4-lr0.1-afd+cfd",
        "s600-w4-lr0.1-own-warmup",
        "s600-lr0.1-own-afd",
        "lr0.05-joint",
        "no_lec",
        "",
    )
    for tag, variant in zip(tags, ("afd+cfd", "", "afd", "joint", "no_lec", ""), strict=True):
        assert tables.variant_of({"tag": tag}) == variant
    with pytest.raises(ValueError, match="different lengths, rates or recipes"):
        results(at(0.05, 90.0, 40.0), at(0.1, 70.0, 50.0), at(0.05, 72.0, 10.0, seed=1)).cell(
            method="kd"
        )


def test_parts_and_presets():
    found = results(
        row("supervised", dice=70.0),
        row("acf_bckd", dice=80.0),
        row("acf_bckd", dice=74.0, tag="s10-afd"),
        row("acf_bckd", dice=71.0, preset="as_released"),
        row("acf_bckd", dice=1.0, seed=1),
    )
    _, body, _ = tables.parts_table(found, "resunet")
    assert len(body) == 13
    assert ["x", "", "", "", "74.00", "2.00", "1.00", "+4.00"] in body
    assert ["x", "x", "x", "x", "80.00", "2.00", "1.00", "+10.00"] in body and [
        "",
        "",
        "",
        "",
    ] == body[0][:4]
    other = results(
        *(
            row(method, dice=dice, student="espnetv2", tag=tag)
            for method, dice, tag in (
                ("supervised", 60.0, ""),
                ("acf_bckd", 50.0, ""),
                ("acf_bckd", 55.0, "s10-hbd"),
            )
        )
    )
    _, body, used = tables.parts_table(other, "resunet", "espnetv2")
    assert [line[4] for line in body] == [
        "60.00",
        *["not run"] * 2,
        "55.00",
        *["not run"] * 4,
        "50.00",
    ]
    assert len(used) == 3 and body[3][-1] == "-5.00"
    assert body[6][:4] == ["weaker", "weaker", "x", "x"] and body[7][:4] == [
        "x",
        "x",
        "x",
        "weaker",
    ]
    _, body, used = tables.presets_table(found)
    assert body == [["ACF-BCKD", "T1 ResU-Net", "80.00 / 2.00", "71.00 / 2.00"]] and len(used) == 2


def test_parts_and_presets_are_of_the_seeds_that_all_have():
    runs = [
        row(method, dice=dice, student="espnetv2", tag=tag, seed=seed)
        for method, tag, scores in (
            ("supervised", "", (60.0, 62.0, 99.0)),
            ("acf_bckd", "", (50.0, 54.0)),
            ("acf_bckd", "s10-sbd", (40.0, 41.0)),
        )
        for seed, dice in enumerate(scores)
    ]
    _, body, used = tables.parts_table(results(*runs), "resunet", "espnetv2")
    assert [body[k][4] for k in (0, 4, 8)] == ["61.00 ± 1.00", "40.50 ± 0.50", "52.00 ± 2.00"]
    assert (body[4][-1], body[8][-1], len(used)) == ("-20.50", "-9.00", 6)
    other = [row("acf_bckd", dice=1.0, student="espnetv2", tag="s10-hbd", seed=5)]
    with pytest.raises(ValueError, match="no seed that all were run with"):
        tables.parts_table(results(*runs, *other), "resunet", "espnetv2")
    released = [
        row("acf_bckd", dice=dice, preset="as_released", seed=seed)
        for seed, dice in ((0, 70.0), (1, 74.0))
    ]
    clean = [row("acf_bckd", dice=dice, seed=seed) for seed, dice in enumerate((80.0, 81.0, 99.0))]
    _, body, used = tables.presets_table(results(*released, *clean))
    assert [line[2:] for line in body] == [
        ["80.50 ± 0.50 / 2.00 ± 0.00", "72.00 ± 2.00 / 2.00 ± 0.00"]
    ]
    assert len(used) == 4


def test_one_setting_of_the_released_form():
    """A clean run with a variant stands below the two forms of its method; CRKD's have a table of
    trials.
    """
    few = {"teacher": None, "student": "vnet", "labelled": 4}
    forms = ((1.0, "clean", ""), (40.0, "as_released", ""), (30.0, "clean", "lr0.05-low"))
    runs = [
        row(method, dice=dice, preset=preset, tag=tag, **few)
        for method in ("crossmatch", "crkd")
        for dice, preset, tag in forms
    ]
    # a seed that the released form lacks
    runs.append(row("crossmatch", dice=35.0, tag="lr0.05-low", seed=1, **few))
    runs.append(row("crossmatch", dice=60.0, tag="lr0.05-more", **few | {"labelled": 8}))
    _, body, used = tables.presets_table(results(*runs))
    assert [line[0] for line in body] == ["CRKD", "CrossMatch", "CrossMatch, low"] and len(
        used
    ) == 5
    assert body[2][1:] == ["4 labelled", "30.00 / 2.00", "-"] and body[1][2:] == [
        "1.00 / 2.00",
        "40.00 / 2.00",
    ]


def test_the_gap_of_a_student_is_of_the_same_seeds():
    """A teacher of 80, the student alone 60 and 40, with KD 70 at seed 0: half of that seed's
    gap.
    """
    runs = [
        row("supervised", dice=80.0, student="resunet"),
        row("kd", dice=70.0, student="espnetv2"),
    ]
    runs += [
        row("supervised", dice=dice, student="espnetv2", seed=seed)
        for seed, dice in enumerate((60.0, 40.0))
    ]
    _, body, _ = tables.students_table(results(*runs))
    (line,) = (line for line in body if line[0] == "ESPNetV2" and line[2] == "KD")
    assert line[4] == "50 %"


def test_few_labels():
    runs = (("supervised", 40.0, ""), ("crkd", 60.0, ""), ("crkd", 50.0, "no_lec"))
    found = results(
        *(
            row(method, labelled=3, dice=dice, teacher=None, student="unet2d", tag=tag)
            for method, dice, tag in runs
        )
    )
    header, body, _ = tables.few_labels_table(found, "acdc", "3")
    cells = {line[0]: dict(zip(header, line)) for line in body}
    assert (
        cells["CRKD"]["Dice"] == "60.00"
        and cells["CRKD"]["rank"] == "1"
        and cells["UniMatch"]["Dice"] == "not run"
    )
    assert (
        cells["labels alone"]["Dice of CRKD above it"] == "+20.00"
        and cells["labels alone"]["p"] == "-"
    )
    assert (
        cells["UniMatch"]["published: Dice / Jaccard / HD95 / ASD"] == "84.72 / 74.53 / 4.87 / 1.37"
    )
    header, body, used = tables.trials_table(found, "3")
    assert (
        header[-1] == "Dice after 5 / 10 steps"
        and body[0][:2] == ["labels alone", "40.00"]
        and len(used) == 3
    )
    assert next(line for line in body if line[0].startswith("without LEC"))[1] == "50.00"


def test_rounding():
    assert evidence.rounded(tables.in_unit(0.83456, "dice")) == 83.456
    assert evidence.rounded(math.nan) is evidence.rounded(None) is None
    assert tables.in_unit(math.nan, "hd95") is None


def configs(monkeypatch, script, **environment):
    """Configurations of the cells of scripts/<script>."""
    monkeypatch.chdir(ROOT)
    for name in (
        "PARTS",
        "METHODS",
        "METHODS_OF_STUDENTS",
        "SEEDS",
        "SEEDED",
        "STEPS",
        "TEACHERS",
        "LR",
        "WIDTH",
        "WARMUP",
        "METHOD_LR",
        "TEACHER_STEPS",
    ):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    words = ["sh", str(ROOT / "scripts" / script), "--dry-run"]
    lines = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    # xargs would join a line that ends in a blank with the next one
    assert all(line == line.rstrip() for line in lines)
    commands = [shlex.split(line)[1:] for line in lines]
    return [MODULES[script].parse_args(flags)[1] for script, *flags in commands]


@pytest.mark.parametrize("script", ["table_hippocampus.sh", "table_small.sh"])
def test_documented_scripts_print_their_cells(script, monkeypatch):
    """Every command of the two scripts is one that the training scripts take, and their runs are
    all different.
    """
    found = configs(monkeypatch, script)
    if script == "table_small.sh":
        found += configs(monkeypatch, script, PARTS="la_medium")
        assert {
            cfg.method for cfg in configs(monkeypatch, script, PARTS="la_medium", METHODS="crkd")
        } == {"crkd"}
    assert len({folder_of(cfg) for cfg in found}) == len(found) > 40


@pytest.mark.parametrize(
    "name, script, parts",
    [
        ("hippocampus", "table_hippocampus.sh", "alone methods rates"),
        ("acdc", "table_small.sh", "acdc rates"),
    ],
)
def test_scripts_use_the_chosen_rates(name, script, parts, monkeypatch):
    """The scripts try the rates that the files show, and go on with those that validation chose."""
    found = tables.Results(*tables.read(ROOT / f"results/{name}.jsonl"))
    tried, chosen = {}, {}
    for rows in found.rates.values():
        one = next(iter(rows.values()))
        plain = one["seed"] == 0 and not tables.variant_of(one) and one["preset"] == "clean"
        usual = one["student"] in ("unet", "unet2d") and one["teacher"] in (None, "resunet")
        if plain and usual and one.get("labelled", 3) == 3:
            tried[one["method"]], chosen[one["method"]] = set(rows), found.rate(one)
    assert len(tried["supervised"]) > 1
    cells, rates = parts.rsplit(" ", 1)
    for cfg in configs(monkeypatch, script, PARTS=cells, TEACHERS="resunet"):
        if cfg.method in tried and getattr(cfg, "student", "unet") == "unet":
            assert cfg.lr == chosen[cfg.method], cfg.method
    others = {}
    for cfg in configs(monkeypatch, script, PARTS=rates, TEACHERS="resunet"):
        others.setdefault(cfg.method, set()).add(cfg.lr)
    for method, rows in tried.items():
        assert others.get(method, set()) == rows - {chosen[method]}, method
