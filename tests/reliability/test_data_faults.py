"""Every known fault of a data set, in every format: the checker finds it, and training stops with
the same words.
"""

import importlib
import json
import os

import pytest

from dataloaders import DataError, build_dataset
from dataloaders.faults import FAULTS
from tests.scripts.conftest import run
from tools import make_demo_data
from tools.corrupt_data import SITES, write_site

# word and isic2018 are written by the same code
FORMATS = ("btcv", "brats21", "la", "acdc", "kvasir")
CELLS = [(dataset, name) for dataset in FORMATS for name in SITES[dataset][1]]


def check(root, *arguments):
    """The checker's exit status, its findings and what it printed."""
    path = root / "findings.json"
    result = run(
        "tools/check_data.py",
        "--config",
        str(root / "config.yaml"),
        "--json",
        str(path),
        *arguments,
        cwd=root,
        ok=False,
    )
    assert "Traceback" not in result.stderr, result.stderr[-3000:]
    return result.returncode, json.loads(path.read_text())["findings"], result.stdout


def steps_taken(root):
    return [
        path
        for path in (root / "runs").rglob("*")
        if path.name in ("last.pt", "best.pt", "log.jsonl")
    ]


@pytest.mark.parametrize("dataset, name", CELLS)
def test_the_checker_finds_the_fault_and_training_stops_with_the_same_words(
    dataset, name, tmp_path
):
    fault, level, _ = SITES[dataset][1][name]
    site = write_site(dataset, name, tmp_path / name)
    code, findings, printed = check(site.root)
    errors = {f["fault"] for f in findings if f["level"] == "error"}
    warnings = {f["fault"] for f in findings if f["level"] == "warning"}
    if level == "error":  # labels without a class may be empty
        assert errors == {fault} and warnings <= {"empty label"}, findings
    else:
        assert (errors, warnings) == (set(), {fault}), findings
    assert code == (1 if level == "error" else 0)
    assert fault in printed and level in printed
    trained = run(site.script, "--config", str(site.root / "config.yaml"), cwd=site.root, ok=False)
    assert "Traceback" not in trained.stderr
    if level == "error":
        assert trained.returncode == 1
        assert all(f["message"] in trained.stderr for f in findings if f["level"] == "error")
        assert not steps_taken(site.root)
    else:
        assert trained.returncode == 0, trained.stderr[-2000:]
        assert f"warning: {findings[0]['message']}" in trained.stderr
        assert steps_taken(site.root)


@pytest.mark.parametrize("dataset", FORMATS)
def test_nothing_is_found_in_sound_data(dataset, tmp_path):
    site = write_site(dataset, "sound", tmp_path / "sound")
    code, findings, printed = check(site.root, "--strict")
    assert (code, findings) == (0, [])
    assert "0 error(s), 0 warning(s)" in printed


def test_every_known_fault_has_a_data_set():
    shown = {fault for _, faults in SITES.values() for fault, _, _ in faults.values()}
    assert shown == set(FAULTS)


def test_one_fault_does_not_hide_another(tmp_path):
    """Lists, files and the whole at once; two faults of one file; image and label of one case;
    train, val and test.
    """
    site = write_site("btcv", "sound", tmp_path / "many")
    faults = SITES["btcv"][1]
    for name in ("nan", "label_id", "path_outside"):
        # the last takes the image of case_b out of the lists: nan and label_id go with it
        faults[name][2](site)
    site.lists["training"].append(site.lists["validation"][0])
    site.change("imagesTr/case_c.nii.gz", lambda v: 0 * v)
    site.change("labelsTr/case_c.nii.gz", lambda v: v[1:] + 5)
    (site.root / "imagesTr/case_v.nii.gz").unlink()
    (site.root / "labelsTr/case_v.nii.gz").write_text("text")
    site.change("labelsTr/case_t.nii.gz", lambda v: 0 * v + 9)
    site.finish()
    code, findings, _ = check(site.root)
    found = {(f["fault"], f["file"].rsplit("/", 1)[-1]) for f in findings}
    assert found >= {
        ("outside", "dataset.json"),
        ("two lists", "case_v"),
        ("constant", "case_c.nii.gz"),
        ("shape", "case_c.nii.gz"),
        ("label ids", "case_c.nii.gz"),
        ("missing file", "case_v.nii.gz"),
        ("unreadable", "case_v.nii.gz"),
        ("label ids", "case_t.nii.gz"),
    }
    assert code == 1


def test_all_faults_of_hdf5_files_and_photographs_are_listed(tmp_path):
    site = write_site("la", "sound", tmp_path / "la")
    site.change("S1/mri_norm2.h5", image=lambda v: v * float("nan"), label=lambda v: v + 7)
    site.lists["train"] += ["gone", "../away"]
    (site.root / "T1" / "mri_norm2.h5").write_text("text")
    site.finish()
    kinds = [f["fault"] for f in check(site.root)[1]]
    assert sorted(kinds) == ["label ids", "missing file", "not finite", "outside", "unreadable"]
    site = write_site("kvasir", "sound", tmp_path / "photos")
    site.change("train/images/photo1.png", lambda v: 0 * v)
    site.change("train/masks/photo1.png", lambda v: v[:-2] // 255)
    (site.root / "val/masks/seen0.png").unlink()
    kinds = [f["fault"] for f in check(site.root)[1]]
    assert sorted(kinds) == ["constant", "mask values", "no label", "shape"]


def test_strict_counts_warnings_and_many_alike_share_a_row(tmp_path, monkeypatch):
    # no cell is broken, however long the path of the test's folder is
    monkeypatch.setenv("COLUMNS", "2000")
    site = write_site("btcv", "sound", tmp_path / "data")
    site.config["patch_size"] = [32, 32, 32]
    site.finish()
    code, findings, printed = check(site.root)
    assert (code, [f["fault"] for f in findings]) == (0, ["small"] * 6)
    assert "and 5 more" in printed and printed.count("| warning") == 1
    code, _, printed = check(site.root, "--strict", "--all")
    assert code == 1 and printed.count("| warning") == 6


def test_what_the_cache_remembers_is_read_again(tmp_path):
    """A file that was damaged without a change of size or time is found."""
    site = write_site("btcv", "sound", tmp_path / "data")
    path = site.root / "imagesTr/case_b.nii.gz"
    assert check(site.root)[0] == 0
    before, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 40] = bytes(40)
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    code, findings, _ = check(site.root)
    assert code == 1 and findings[0]["fault"] in ("unreadable", "not finite")


def test_a_check_fills_the_cache_unless_it_is_told_not_to(tmp_path):
    site = write_site("btcv", "sound", tmp_path / "data")
    assert check(site.root, "--no-cache")[0] == 0
    assert not (site.root / "cache").exists()
    assert check(site.root)[0] == 0
    assert len([path for path in (site.root / "cache").iterdir() if path.is_dir()]) == 6


def test_warnings_are_remembered_by_the_cache_with_the_names_of_today(tmp_path):
    site = write_site("btcv", "identity_affine", tmp_path / "before")
    assert check(site.root)[1][0]["fault"] == "header"
    moved = tmp_path / "after"
    site.root.rename(moved)
    config = (moved / "config.yaml").read_text().replace("/before", "/after")
    (moved / "config.yaml").write_text(config)
    for _ in range(2):
        findings = check(moved)[1]
        assert {f["fault"] for f in findings} == {"header"} and "/after/" in findings[0]["file"]


def test_a_class_may_be_absent_where_the_user_says_so(tmp_path):
    site = write_site("btcv", "class_never_labelled", tmp_path / "data")
    assert check(site.root)[0] == 1
    assert check(site.root, "--opts", "absent_classes=[box]")[:2] == (0, [])
    wrong = run(
        "tools/check_data.py",
        "--config",
        str(site.root / "config.yaml"),
        "--opts",
        "absent_classes=[bix]",
        cwd=site.root,
        ok=False,
    )
    assert (
        wrong.returncode == 1 and "absent_classes: ['bix'] are none of the classes" in wrong.stderr
    )


@pytest.mark.parametrize("dataset", ["btcv", "la", "isic2018"])
def test_a_list_that_chooses_the_best_checkpoint_has_something_to_find(dataset, tmp_path):
    """Every score is undefined otherwise, and the first checkpoint would stay the best."""
    site = write_site(dataset, "sound", tmp_path / "data")
    script = importlib.import_module(site.script.removesuffix(".py"))
    _, cfg = script.parse_args(["--config", str(site.root / "config.yaml")])
    arguments = cfg.dataset_arguments()
    if "memory_gb" in arguments:
        arguments["memory_gb"] = 0.0  # each time files are read, and noted
    data = build_dataset(**arguments)
    splits = data.splits(None)
    facts = data.facts
    nothing = {"val": [0], "test": [0]}

    def emptied(case, split, store):
        return facts(case, split, store) | ({"ids": nothing[split]} if split in nothing else {})

    data.facts = emptied
    with pytest.raises(DataError, match=r"val list: no case has a voxel of \w+.*best"):
        data.prepare(splits, store=False, chosen="val")
    del nothing["val"]
    data.prepare(splits, store=False, chosen="val")  # of the test list a warning is enough
    if splits["test"]:
        with pytest.raises(DataError, match="test list: no case has a voxel"):
            data.prepare(splits, store=False, chosen="test")


@pytest.mark.parametrize("dataset", ["acdc", "btcv"])
def test_the_demo_data_tool_writes_all_of_them(dataset, tmp_path, capsys):
    make_demo_data.main(["--dataset", dataset, "--corrupt", "--out", str(tmp_path / "out")])
    described = json.loads((tmp_path / "out" / "faults.json").read_text())
    assert described.keys() == {"sound", *SITES[dataset][1]}
    assert all((tmp_path / "out" / name / "config.yaml").is_file() for name in described)
    make_demo_data.main(["--dataset", dataset, "--corrupt", "--out", str(tmp_path / "out")])
    assert "already there" in capsys.readouterr().out
