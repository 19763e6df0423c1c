"""Leakage: overlapping lists are refused in every format, and a choice on test cases is asked for,
stored, shown.
"""

import json

import pytest

from dataloaders.cases import Case
from dataloaders.checks import check_disjoint
from dataloaders.faults import DataError
from dataloaders.lists import patient_function
from tests.scripts.conftest import run
from tools.corrupt_data import SITES, write_site
from utils.checkpoint import load_checkpoint

SHOWN = "selected on the test list, by --select-on test"


def train(site, *arguments, ok=True):
    return run(
        site.script, "--config", str(site.root / "config.yaml"), *arguments, cwd=site.root, ok=ok
    )


@pytest.mark.parametrize("dataset", SITES)
def test_every_format_has_data_sets_with_each_kind_of_overlap(dataset):
    """tests/reliability/test_data_faults.py shows that the checker and training refuse each of
    them.
    """
    errors = {fault for fault, level, _ in SITES[dataset][1].values() if level == "error"}
    assert errors >= {"two lists", "same patient", "duplicate"}


@pytest.mark.parametrize(
    "name, patient",
    [
        ("sub-01_ses-2_T1w", "sub-01"),
        ("sub-AB12_run-1", "sub-AB12"),
        ("BraTS-GLI-00012-001", "BraTS-GLI-00012"),
        ("BraTS-MET-00012-100", "BraTS-MET-00012"),
        ("patient007_frame12", "patient007"),
        ("x_visit2", "x"),
        ("x-session-03", "x"),
        ("case_timepoint1", "case"),
        ("BraTS2021_00012", "BraTS2021_00012"),
        ("BraTS20_Training_001", "BraTS20_Training_001"),
        ("hippocampus_001", "hippocampus_001"),
        ("img0001", "img0001"),
        ("_frame1", "_frame1"),
    ],
)
def test_usual_names_tell_the_patient(name, patient):
    assert patient_function("")(name) == patient


def test_a_pattern_of_the_users_own():
    patient = patient_function(r"(\w+)-\d+")
    assert (patient("ann-1"), patient("ann-22"), patient("bob")) == ("ann", "ann", "bob")
    for wrong, message in (
        ("(", "no regular expression"),
        ("a+", "one group"),
        ("(a)(b)", "one group"),
    ):
        with pytest.raises(DataError, match=message):
            patient_function(wrong)


def test_the_pattern_of_a_configuration_is_used(tmp_path):
    site = write_site("btcv", "sound", tmp_path / "data")
    site.add("training", "ann-1")
    site.add("test", "ann-2")
    site.finish()
    train(site)  # by the usual conventions these are two patients
    refused = train(site, "--opts", r"patient_pattern=(\w+)-\d+", "tag=b", ok=False)
    assert refused.returncode == 1
    assert "patient 'ann' is in both the train list ('ann-1') and the test list" in refused.stderr
    site = write_site("btcv", "patient_in_two_lists", tmp_path / "other")
    train(site, "--opts", "patient_pattern=(.*)")  # each name is a patient of its own


def test_frames_of_a_patient_in_one_list_are_no_overlap():
    cases = {"train": ["p1_frame01", "p1_frame02"], "val": ["p2_frame01"]}
    splits = {split: [Case(name, ()) for name in names] for split, names in cases.items()}
    check_disjoint(splits, patient=patient_function(""))
    splits["val"].append(Case("p1_frame03", ()))
    with pytest.raises(DataError, match="patient 'p1' is in both the train list"):
        check_disjoint(splits, patient=patient_function(""))


@pytest.mark.parametrize("dataset, options", [("btcv", ()), ("la", ()), ("acdc", ())])
def test_a_choice_on_test_is_asked_for_stored_and_shown(dataset, options, tmp_path):
    site = write_site(dataset, "sound", tmp_path / "data")
    tester = "test_2d.py" if dataset == "acdc" else "test_3d.py"
    for tag, flags, expected in (("v", (), "val"), ("t", ("--select-on", "test"), "test")):
        train(site, *flags, "--opts", f"tag={tag}", *options)
        folder = next((site.root / "runs").rglob(f"seed0-{tag}"))
        for name in ("best.pt", "last.pt"):
            assert load_checkpoint(folder / name)["selected_on"] == expected
        tested = (
            run(
                tester,
                "--ckpt",
                str(folder / "best.pt"),
                "--cache-dir",
                str(site.root / "cache"),
                cwd=tmp_path,
            )
            if dataset == "btcv"
            else run(tester, "--ckpt", str(folder / "best.pt"), cwd=tmp_path)
        )
        summary = json.loads((folder / "summary.json").read_text())
        assert (summary["split"], summary["selected_on"]) == ("test", expected)
        assert summary["selected_on_reported"] is (expected == "test")
        assert (SHOWN in tested.stdout) is (expected == "test")
        assert ("note: this checkpoint was selected" in tested.stdout) is (expected == "test")
        table = run("tools/results_table.py", str(folder), cwd=tmp_path).stdout
        assert f"best.pt was selected on: {expected}" in table
        assert ("on test (--select-on test): " in table) is (expected == "test")
    both = run(
        "tools/results_table.py", *map(str, (site.root / "runs").rglob("seed0-?")), cwd=tmp_path
    ).stdout
    assert "best.pt was selected on: test, val; on test (--select-on test): " in both


@pytest.mark.parametrize("dataset, layout", [("btcv", "kd"), ("la", "ssl")])
def test_the_published_layouts_show_it_too(dataset, layout, tmp_path):
    site = write_site(dataset, "sound", tmp_path / "data")
    train(site, "--select-on", "test")
    best = next((site.root / "runs").rglob("best.pt"))
    cache = ("--cache-dir", str(site.root / "cache")) if dataset == "btcv" else ()
    run("test_3d.py", "--ckpt", str(best), *cache, cwd=tmp_path)
    table = run(
        "tools/results_table.py",
        "--layout",
        layout,
        "--runs-dir",
        str(site.root / "runs"),
        "--dataset",
        "corrupt",
        *("--protocol", "clean") * (layout == "ssl"),
        cwd=tmp_path,
    ).stdout
    assert "best.pt was selected on: test; on test (--select-on test): " in table


def test_without_a_validation_list_nothing_is_chosen_on_test_unasked(tmp_path):
    site = write_site("la", "sound", tmp_path / "data")
    (site.root / "splits" / "val.txt").unlink()
    refused = train(site, ok=False)
    assert (
        refused.returncode == 1 and "--select-on test" in refused.stderr and "val" in refused.stderr
    )
    assert not list((site.root / "runs").rglob("*.pt"))
    checked = run(
        "tools/check_data.py", "--config", str(site.root / "config.yaml"), cwd=site.root, ok=False
    )
    assert checked.returncode == 1 and "select-on" in checked.stdout
    train(site, "--opts", "select_on=test")
    best = next((site.root / "runs").rglob("best.pt"))
    assert load_checkpoint(best)["selected_on"] == "test"
    assert SHOWN in run("test_3d.py", "--ckpt", str(best), cwd=site.root).stdout


def test_a_list_that_is_not_there_cannot_be_chosen_on(tmp_path):
    site = write_site("btcv", "sound", tmp_path / "data")
    site.lists["test"] = []
    site.finish()
    refused = train(site, "--select-on", "test", ok=False)
    assert refused.returncode == 1 and "has no test list" in refused.stderr
    refused = train(site, "--opts", "select_on=both", ok=False)
    assert (
        refused.returncode == 1 and "select_on" in refused.stderr and "val, test" in refused.stderr
    )


def test_the_list_cannot_be_changed_when_a_run_is_resumed(tmp_path):
    site = write_site("btcv", "sound", tmp_path / "data")
    train(site)
    refused = train(site, "--resume", "--select-on", "test", "--opts", "max_steps=2", ok=False)
    assert refused.returncode == 1 and "select_on: 'val' then, 'test' now" in refused.stderr


def test_test_cases_are_compared_even_where_only_labels_are_trained_on(tmp_path):
    site = write_site("la", "copy_of_a_test_case", tmp_path / "data")
    refused = train(site, "--method", "supervised", ok=False)
    assert refused.returncode == 1 and "the same image as" in refused.stderr
