"""The report of run folders: what it holds, counts and compares. Real trainings and a browser:
test_report_browser.
"""

import html
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.scripts.conftest import run
from tests.tools.report_runs import CLASSES, scores_of, write_run, write_scores
from tools import report_charts, report_data
from tools.report_data import read_rows
from utils.statistics import average_seeds, case_means, paired_comparison


def report(*folders, cwd, ok=True, options=()):
    result = run(
        "tools/report.py", *map(str, folders), "--out", "page.html", *options, cwd=cwd, ok=ok
    )
    return (cwd / "page.html").read_text(encoding="utf-8") if ok else result.stderr


def section(page, name):
    """What is between the tags of a section, with plain spaces for line breaks."""
    found = re.search(rf'<section id="{name}">(.*?)</section>', page, re.DOTALL)
    return " ".join(found.group(1).split()) if found else None


def table_rows(text):
    """The rows of the tables in a piece of HTML, as lists of texts."""
    rows = re.findall(r"<tr>(.*?)</tr>", text, re.DOTALL)
    return [
        [re.sub(r"<[^>]*>", "", cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)]
        for row in rows
    ]


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A folder for runs, and no time spent on charts."""
    for name in ("line_chart", "share_chart", "box_chart", "interval_chart", "dot_chart"):
        monkeypatch.setattr(report_charts, name, lambda *rest, **options: "<svg></svg>")
    return tmp_path / "runs"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report of one distilled run."""
    folder = tmp_path_factory.mktemp("one")
    return report(write_run(folder / "runs"), cwd=folder)


def test_one_run(page):
    rows = table_rows(section(page, "summary"))
    assert rows[1][0] == "unet ← resunet, kd" and "1 of 36" in rows[1]
    assert rows[3][:2] == ["unet ← resunet, kd", "1,234,567"]
    # the distance with the miss as the diagonal
    assert any(cell.endswith(" / 30.50*") for cell in rows[1])
    assert "* with missed and false positive classes" in section(page, "summary")
    assert section(page, "comparison") is None
    for name in (
        "teacher",
        "classes",
        "cases",
        "pictures",
        "training",
        "validation",
        "terms",
        "settings",
    ):
        assert section(page, name), name


def test_the_page_needs_nothing_else(page):
    assert not re.findall(r"""(?:src|href|action)=["'](?!data:|#)""", page)
    assert not re.findall(r"url\((?!#)|@import|fetch\(|XMLHttp", page)


def test_equal_runs_give_equal_pages(tmp_path):
    folder = write_run(tmp_path / "runs")
    assert report(folder, cwd=tmp_path) == report(folder, cwd=tmp_path)


def test_missed_organs_count_as_zero_and_are_shown(page):
    rows = {row[0]: row for row in table_rows(section(page, "cases"))}
    assert rows["case01"][6] == "1" and rows["case01"][-1] == "missed"
    assert rows["case02"][6] == "0" and rows["case02"][-1] == "–"
    # The mean of the case with the miss holds the zero.
    found = [float(value) for value in rows["case01"][7:9]]
    assert float(rows["case01"][1]) == pytest.approx(sum(found) / 3, abs=0.09)
    (duct,) = [row for row in table_rows(section(page, "classes")) if row[0] == "duct"]
    assert duct[1] == "12" and duct[-3:] == ["1", "0", "1"]


def test_every_term_and_every_class_has_its_curve(page):
    for name in ("loss, all terms", "seg", "kd", "learning rate"):
        assert f"{name}: " in section(page, "training"), name
    for name in ("mean Dice", *CLASSES):
        assert f"{name}: Dice, % over steps" in section(page, "validation"), name
    assert "share of the gradient norm" in section(page, "terms")


def test_terms_are_explained(page):
    terms = section(page, "terms")
    assert (
        "The term 'kd' is negligible: at most 0.4 % of the gradient norm in 5 measurements"
        in html.unescape(terms)
    )
    assert "What to do:</b> Raise its weight, or leave it out and save its time." in terms
    row = next(row for row in table_rows(terms) if row[0] == "kd")
    assert row == ["kd", "60.0", "0.4", "0.4 to 0.4", "+0.20", "5"]


def test_a_teacher_that_is_no_better(runs, tmp_path):
    page = report(write_run(runs, teacher_dice=0.6), cwd=tmp_path)
    assert (
        "The teacher is not better than the student on the validation cases: Dice 0.6000"
        in section(page, "terms")
    )


def test_a_log_without_measurements_says_so(runs, tmp_path):
    page = report(write_run(runs, diagnosed=False), cwd=tmp_path)
    assert "Gradients of the terms were not measured" in section(page, "terms")


def test_teacher_and_student_alone_are_found_by_their_folders(runs, tmp_path):
    folder = write_run(runs)
    text = section(report(folder, cwd=tmp_path), "teacher")
    assert "student alone" not in text and "validation cases" in text
    write_run(runs, "supervised", student="resunet", gain=0.1)
    write_run(runs, "supervised", student="unet", gain=-0.1)
    text = section(report(folder, cwd=tmp_path), "teacher")
    assert "Dice on test cases" in text and "gap closed" in text
    first = table_rows(text)[1]
    assert first[0] == "liver" and first[1:4] == ["90.0", "64.8", "74.8"] and first[5] == "40 %"


def test_seeds_are_one_cell_in_a_comparison(runs, tmp_path):
    alone = [write_run(runs, "supervised", seed) for seed in (0, 1)]
    taught = [write_run(runs, "kd", seed, gain=0.05) for seed in (0, 1)]
    comparison = section(report(*alone, *taught, cwd=tmp_path), "comparison")
    row = next(row for row in table_rows(comparison) if "seeds) −" in row[0])
    assert row[0] == "unet ← resunet, kd (2 seeds) − unet, supervised (2 seeds)" and row[1] == "12"
    means = {
        folder: case_means({"": read_rows(folder / "metrics.csv", "resampled")}, "dice")[0][""]
        for folder in (*alone, *taught)
    }
    (expected,) = paired_comparison(
        {
            "alone": average_seeds([means[f] for f in alone]),
            "taught": average_seeds([means[f] for f in taught]),
        }
    )
    assert row[4] == f"+{100 * expected['difference']:.2f}"
    assert row[5] == f"+{100 * expected['low']:.2f} to +{100 * expected['high']:.2f}"
    assert row[8] == (f"{expected['p']:.4f}" if expected["p"] < 0.01 else f"{expected['p']:.3f}")
    assert "At least 6" not in comparison
    assert "Left out of every run: 2 organs" in comparison  # one missed, one absent


def test_cases_are_compared_by_means_over_seeds(runs, tmp_path):
    """Not the last run with the first: each cell is averaged, and differs from the first cell."""
    alone = [write_run(runs, "supervised", seed) for seed in (0, 1)]
    taught = [write_run(runs, "kd", seed, gain=0.05) for seed in (0, 1)]
    other = write_run(runs, "cwd", 7)
    text = section(report(*alone, *taught, other, cwd=tmp_path), "cases")
    header, row = table_rows(text)[:2]
    assert len(header) == 1 + 3 + 2 and "(2 seeds)" in header[1] and row[0] == "case00"
    means = [
        [case_means({"": read_rows(f / "metrics.csv", "resampled")}, "dice")[0][""]["case00"]]
        for f in (*alone, *taught, other)
    ]
    cells = [100 * np.mean(part) for part in (means[:2], means[2:4], means[4:])]
    assert row[1:4] == [f"{cell:.1f}" for cell in cells]
    expected = [f"{cell - cells[0]:+.1f}".replace("-", "−") for cell in cells[1:]]
    assert row[4:] == expected
    text = section(report(*alone, cwd=tmp_path), "cases")
    assert len(table_rows(text)[0]) == 3  # seeds of one cell stand beside each other


def test_a_long_log_is_read_once_and_drawn_by_few_points(tmp_path, monkeypatch):
    """A teacher's log is asked for by each of its students."""
    path = tmp_path / "log.jsonl"
    lines = [{"step": k, "kind": "train", "loss": float(k % 97)} for k in range(5000)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    parsed = []
    loads = json.loads
    monkeypatch.setattr(json, "loads", lambda line: parsed.append(1) or loads(line))
    first, second = report_data.log_of(path), report_data.log_of(path)
    assert first is second and len(parsed) == 5001  # and what follows the last line
    monkeypatch.undo()
    with path.open("a") as file:
        file.write(json.dumps(lines[0]) + "\n")
    assert len(report_data.log_of(path)) == 5001
    points = [(line["step"], line["loss"]) for line in first]
    thin = report_charts.thinned(points)
    assert thin[0] == points[0] and thin[-1] == points[-1]
    assert (
        len(thin) <= report_charts.POINTS + 2 and set(thin) <= set(points) and thin == sorted(thin)
    )
    assert {min(v for _, v in thin), max(v for _, v in thin)} == {0.0, 96.0}
    points[2345] = (2345, -500.0)  # a single spike is seen
    assert (2345, -500.0) in report_charts.thinned(points)
    assert report_charts.thinned(points[:50]) == points[:50]


def test_frames_are_paired_by_patient(runs, tmp_path):
    folders = [write_run(runs, "supervised"), write_run(runs, "kd", gain=0.03)]
    for folder in folders:  # cases 2k and 2k + 1 become the frames of patient k
        scores = folder / "metrics.csv"
        text = scores.read_text(encoding="utf-8")
        for case in range(12):
            text = text.replace(f"case{case:02d}", f"p{case // 2}_frame{case % 2}")
        scores.write_text(text, encoding="utf-8")
    comparison = table_rows(section(report(*folders, cwd=tmp_path), "comparison"))
    row = next(row for row in comparison if row[0].endswith("− unet, supervised"))
    assert row[1] == "6"  # of 12 frames


def test_three_runs_are_compared_in_pairs_or_with_the_first(runs, tmp_path):
    folders = [
        write_run(runs, "supervised"),
        write_run(runs, "kd"),
        write_run(runs, "cwd", gain=0.1),
    ]
    text = section(report(*folders, cwd=tmp_path), "comparison")
    # 3 pairs, 2 metrics
    assert sum("−" in row[0] and "first" not in row[0] for row in table_rows(text)) == 6
    text = section(report(*folders, cwd=tmp_path, options=["--against-first"]), "comparison")
    assert sum("−" in row[0] and "first" not in row[0] for row in table_rows(text)) == 4


def test_few_cases_are_pointed_out(runs, tmp_path):
    folders = [write_run(runs, "supervised", cases=4), write_run(runs, "kd", cases=4, gain=0.1)]
    assert "so few differing patients can give is 0.125" in section(
        report(*folders, cwd=tmp_path), "comparison"
    )


def test_runs_without_scores_say_how_to_make_them(runs, tmp_path):
    page = report(write_run(runs, tested=False), cwd=tmp_path)
    assert "has no test scores" in page and "python test_3d.py --ckpt" in page
    assert section(page, "cases") is None and section(page, "training")
    both = report(write_run(runs, "cwd"), runs / "tiny/kd/resunet-unet/seed0", cwd=tmp_path)
    assert "has no test scores" in both and section(both, "cases")


def test_runs_with_few_labels(runs, tmp_path):
    folders = [
        write_run(runs, "supervised", few_labels=True),
        write_run(runs, "crkd", few_labels=True, gain=0.1),
    ]
    page = report(*folders, cwd=tmp_path)
    assert "HD95, voxels" in section(page, "summary") and "unet2d, 3 labelled, crkd" in section(
        page, "comparison"
    )
    assert section(page, "teacher") is None
    assert "python test_2d.py" in section(page, "pictures")  # there is no data set here


def test_runs_scored_in_different_ways_are_pointed_out(runs, tmp_path):
    first, second = write_run(runs, "supervised"), write_run(runs, "kd")
    path = second / "summary.json"
    path.write_text(path.read_text().replace('"pooled"', '"directed"'))
    assert "scored in different ways" in section(report(first, second, cwd=tmp_path), "comparison")


def test_another_test_of_the_same_run(runs, tmp_path):
    folder = write_run(runs)
    error = report(folder, cwd=tmp_path, ok=False, options=["--suffix", "_last"])
    assert "metrics_last.csv: no such scores; there are: metrics.csv" in error
    for name in ("metrics", "summary"):
        source = next(folder.glob(f"{name}.*"))
        source.rename(folder / f"{name}_last{source.suffix}")
    assert section(report(folder, cwd=tmp_path, options=["--suffix", "_last"]), "cases")


class Elements(HTMLParser):
    """The scripts of a page and the names of all attributes, as a browser would see them."""

    def __init__(self, page):
        super().__init__()
        self.scripts, self.attributes = 0, set()
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.scripts += tag == "script"
        self.attributes |= {name for name, _ in attrs}


HOSTILE = "\"'><script>alert(1)</script><b onclick=x>&amp;{{ 7 * 7 }}$x_$ $y$"


def test_names_with_markup_are_text(tmp_path):
    """Of tags, settings, cases, classes, terms, checkpoints and code: whatever comes from files."""
    folder = write_run(tmp_path / "runs", tag=HOSTILE, note=HOSTILE)
    second = write_run(tmp_path / "runs", "cwd", note="plain")
    rows = scores_of(np.random.default_rng(0), 3, 0.0)
    for row in rows:
        row["case"] += HOSTILE
        row["class"] += HOSTILE
    write_scores(folder, yaml.safe_load((folder / "config.yaml").read_text()), rows)
    summary = json.loads((folder / "summary.json").read_text())
    for key in ("checkpoint", "code", "split", "hd95_definition", "unit", "device"):
        summary[key] = HOSTILE.replace("/", "")  # the checkpoint is a file
    (folder / "summary.json").write_text(json.dumps(summary))
    log = folder / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for line in lines:
        for key in [key for key in line if key not in ("step", "kind", "loss", "lr", "dice")]:
            line[key + HOSTILE] = line.pop(key)
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = report(folder, second, cwd=tmp_path, options=["--title", HOSTILE])
    harmless = Elements(report(second, cwd=tmp_path))
    found = Elements(page)
    assert found.scripts == harmless.scripts == 1
    assert "onclick" not in found.attributes
    assert "<b " not in page and "<script>alert" not in page
    shown = html.unescape(page)
    for name in ("comparison", "classes", "cases", "pictures", "training", "terms", "settings"):
        assert HOSTILE in section(shown, name), name


@pytest.mark.parametrize(
    "content", ["", '{"step": 9, "kind": "train", "loss": 1.0}\n{"step": 19, "ki']
)
def test_a_log_that_is_empty_or_cut_off(runs, tmp_path, content):
    folder = write_run(runs)
    (folder / "log.jsonl").write_text(content)
    assert section(report(folder, cwd=tmp_path), "training")


def test_runs_of_equal_names_are_told_apart(runs, tmp_path):
    folders = [write_run(runs, seed=seed) for seed in (0, 1)]
    page = report(*folders, cwd=tmp_path)
    assert "unet ← resunet, kd, seed 0" in page and "unet ← resunet, kd, seed 1" in page
    assert section(page, "comparison") is None  # seeds of one cell are not compared


@pytest.mark.parametrize(
    "name, expected", [("nowhere", "no such folder"), (".", "neither config.yaml nor best.pt")]
)
def test_what_is_no_run(tmp_path, name, expected):
    assert expected in report(tmp_path / name, cwd=tmp_path, ok=False)


def test_a_damaged_table_of_scores(runs, tmp_path):
    folder = write_run(runs)
    path = folder / "metrics.csv"
    path.write_text(path.read_text().replace("jaccard", "overlap"))
    assert "no column of jaccard" in report(folder, cwd=tmp_path, ok=False)


def test_a_hostile_run_folder_shows_no_file_of_others(runs, tmp_path):
    """Cases of metrics.csv and the checkpoint of summary.json are names in the folder, no paths."""
    folder = write_run(runs)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "secret.png")
    (folder / "overlays").mkdir()
    path = folder / "metrics.csv"
    steps = "../" * (len(folder.relative_to(tmp_path).parts) + 1)
    path.write_text(re.sub(r"case\d\d", f"{steps}secret", path.read_text()))
    assert (folder / "overlays" / f"{steps}secret.png").is_file()
    assert "data:image/" not in report(folder, cwd=tmp_path)
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"checkpoint": f"{steps}x.pt"}))
    assert "names '../" in html.unescape(report(folder, cwd=tmp_path))


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("summary.json", '{"native": ', "damaged or not a file of this project"),
        ("summary.json", "{}", "not a summary of the test scripts, or a damaged one"),
        ("metrics.csv", "case,class\ncase0,li", "ends within a line"),
        ("config.yaml", "dataset: [", "not valid YAML"),
        ("config.yaml", "dataset: tiny\n", "configuration is damaged"),
    ],
)
def test_a_damaged_file_of_a_run_is_named(runs, tmp_path, name, text, expected):
    folder = write_run(runs)
    (folder / name).write_text(text)
    message = report(folder, cwd=tmp_path, ok=False)
    assert message.startswith("error: ") and str(folder) in message and expected in message
    if name == "summary.json":
        for tool in (("results_table.py",), ("figure.py", "--out", "x.png")):
            result = run(f"tools/{tool[0]}", str(folder), *tool[1:], cwd=tmp_path, ok=False)
            assert result.stderr.startswith(f"error: {folder}/summary.json: ")
            assert expected in result.stderr
