"""Paths: lists and checkpoints cannot lead out of the data root and the run folder; odd but honest
names work.
"""

from pathlib import Path

import pytest

from dataloaders import DataError, build_dataset
from dataloaders.cases import Case
from dataloaders.volumes import inside
from tests.scripts.conftest import run
from tools.corrupt_data import Atrium, Decathlon, Photographs, write_site
from utils.checkpoint import CheckpointError, atomic_save, dataset_arguments, load_checkpoint
from utils.config import ConfigError
from utils.run import run_folder

ODD = [
    "two words",
    "-rf",
    'O\'Brien "the" case',
    "größe β 患者",
    "semi;colon & $HOME",
    "50%#1",
    "a,b=c: [d] {e}",
]


def train(site, *arguments, ok=True):
    config = str(site.root / "config.yaml")
    return run(site.script, "--config", config, *arguments, cwd=site.root.parent, ok=ok)


def best(site):
    return next((site.root / "runs").rglob("best.pt"))


def rename(site, section, names):
    """Give a list of a decathlon data set cases of other names."""
    site.lists[section] = []
    for name in names:
        site.add(section, name)


def odd_decathlon(root):
    site = Decathlon(root)
    rename(site, "training", ODD[:5])
    rename(site, "test", ODD[5:])
    return site


def odd_atrium(root):
    site = Atrium(root)
    site.lists = {"train": ODD[:4], "val": ODD[4:5], "test": ODD[5:]}
    for name in ODD:
        site.add(name)
    return site


def odd_photographs(root):
    site = Photographs(root)
    site.lists = {"train": ODD[:5], "val": ODD[5:]}
    for split, names in site.lists.items():
        for name in names:
            site.add(split, name)
    # One image is listed by its paths, which hold blanks.
    site.lists["train"][0] = "train/images/two words.png\ttrain/masks/two words.png"
    return site


@pytest.mark.parametrize("make", [odd_decathlon, odd_atrium, odd_photographs])
def test_odd_names_go_the_whole_way(make, tmp_path):
    site = make(tmp_path / 'it\'s "my" data, größer [1]')
    site.config["max_steps"] = 2
    site.finish()
    root, moved = site.root, site.root.parent / "other place"
    checked = run(
        "tools/check_data.py",
        "--config",
        str(root / "config.yaml"),
        "--strict",
        cwd=tmp_path,
        ok=False,
    )
    assert checked.returncode == 0, checked.stdout
    train(site, *("--opts", f"cache_dir='{tmp_path / 'a cache'}'") * (make is odd_decathlon))
    tester = "test_2d.py" if "images2d" in str(site.config.get("format")) else "test_3d.py"
    cache = ("--cache-dir", str(tmp_path / "a cache")) * (make is odd_decathlon)
    run(tester, "--ckpt", str(best(site)), "--overlays", *cache, cwd=tmp_path)
    folder = best(site).parent
    kind = ".png" if tester == "test_2d.py" else ".nii.gz"
    assert {path.name for path in (folder / "predictions").iterdir()} == {
        f"{name}{kind}" for name in ODD[5:]
    }
    assert {path.name for path in (folder / "overlays").iterdir()} == {
        f"{name}.png" for name in ODD[5:]
    }
    rows = (folder / "metrics.csv").read_text(encoding="utf-8")
    assert "50%#1" in rows
    if make is odd_decathlon:
        made = [path.name for path in (tmp_path / "a cache").iterdir() if path.is_dir()]
        assert len(made) == 8 and all(
            any(entry.startswith(f"{name}-") for entry in made) for name in ODD
        )
    # Moved, and named on the command line, with blanks and without quoting for the shell
    root.rename(moved)
    run(
        tester,
        "--ckpt",
        str(moved / folder.relative_to(root) / "best.pt"),
        "--data-root",
        str(moved),
        *cache,
        "--out",
        str(tmp_path / "scores of it"),
        cwd=tmp_path,
    )
    assert (tmp_path / "scores of it" / "summary.json").is_file()


def test_a_data_root_with_blanks_by_option(tmp_path):
    site = write_site("btcv", "sound", tmp_path / "plain")
    site.root.rename(tmp_path / "two words")
    config = str(tmp_path / "two words" / "config.yaml")
    run(
        "train_3d_distill.py",
        "--config",
        config,
        "--opts",
        f"data_root={tmp_path / 'two words'}",
        f"runs_dir={tmp_path / 'all runs'}",
        f"cache_dir={tmp_path / 'the cache'}",
        cwd=tmp_path,
    )
    assert next((tmp_path / "all runs").rglob("best.pt")).is_file()


@pytest.mark.parametrize(
    "dataset, name",
    [
        ("btcv", "path_outside"),
        ("btcv", "absolute_path_outside"),
        ("brats21", "path_outside"),
        ("kvasir", "path_outside"),
    ],
)
def test_lists_lead_outside_only_where_the_user_allows_it(dataset, name, tmp_path):
    site = write_site(dataset, name, tmp_path / "data")
    refused = train(site, ok=False)
    assert (
        refused.returncode == 1
        and "--allow-outside" in refused.stderr
        and "Traceback" not in refused.stderr
    )
    train(site, "--allow-outside")
    config = str(site.root / "config.yaml")
    assert run("tools/check_data.py", "--config", config, cwd=tmp_path, ok=False).returncode == 1
    assert (
        run("tools/check_data.py", "--config", config, "--allow-outside", cwd=tmp_path).returncode
        == 0
    )


def test_allowing_it_once_is_not_stored(tmp_path):
    site = write_site("btcv", "sound", tmp_path / "data")
    folder = site.outside()
    for kind in ("image", "label"):
        file = site.root / site.lists["test"][0][kind]
        file.rename(folder / f"{kind}_{file.name}")
        site.lists["test"][0][kind] = f"../{folder.name}/{kind}_{file.name}"
    site.finish()
    train(site, "--allow-outside", "--opts", "cache_dir=cache")
    checkpoint = load_checkpoint(best(site))
    assert "allow_outside" not in checkpoint["dataset"]
    checkpoint["dataset"]["allow_outside"] = True  # as a checkpoint of others may say
    atomic_save(checkpoint, best(site))
    refused = run("test_3d.py", "--ckpt", str(best(site)), cwd=tmp_path, ok=False)
    assert refused.returncode == 1 and "--allow-outside" in refused.stderr
    run("test_3d.py", "--ckpt", str(best(site)), "--allow-outside", cwd=tmp_path)


def test_links_in_the_data_root_are_followed(tmp_path):
    """They are how one copy of a data set serves several projects: the user made them, not a
    list.
    """
    site = write_site("btcv", "sound", tmp_path / "data")
    (site.root / "imagesTr").rename(tmp_path / "archive")
    (site.root / "imagesTr").symlink_to(tmp_path / "archive")
    train(site)


def test_a_checkpoint_writes_no_cache_where_it_likes(tmp_path):
    site = write_site("btcv", "sound", tmp_path / "data")
    train(site, "--opts", "cache_dir=cache")
    checkpoint = load_checkpoint(best(site))
    for target in (str(tmp_path / "elsewhere"), "../elsewhere", "a/../../elsewhere"):
        checkpoint["dataset"]["cache_dir"] = target
        atomic_save(checkpoint, best(site))
        refused = run("test_3d.py", "--ckpt", str(best(site)), cwd=tmp_path, ok=False)
        assert refused.returncode == 1
        assert "--cache-dir" in refused.stderr and "--allow-outside" in refused.stderr
        assert (
            not (tmp_path / "elsewhere").exists() and not (tmp_path.parent / "elsewhere").exists()
        )
    run(
        "test_3d.py", "--ckpt", str(best(site)), "--cache-dir", str(tmp_path / "mine"), cwd=tmp_path
    )


def test_case_names_of_a_checkpoint_stay_in_the_output_folder(tmp_path):
    site = write_site("la", "sound", tmp_path / "data")
    train(site)
    checkpoint = load_checkpoint(best(site))
    outside = site.outside()
    site.add("evil")
    (site.root / "evil").rename(outside / "evil")
    for name in (f"../{outside.name}/evil", str(outside / "evil"), "..", "S1/../S1"):
        checkpoint["cases"]["test"] = [name]
        atomic_save(checkpoint, best(site))
        before = sorted(tmp_path.rglob("*.nii.gz"))
        refused = run("test_3d.py", "--ckpt", str(best(site)), cwd=tmp_path, ok=False)
        assert (
            refused.returncode == 1
            and "plain file name" in refused.stderr
            and "Traceback" not in refused.stderr
        )
        assert sorted(tmp_path.rglob("*.nii.gz")) == before


@pytest.mark.parametrize(
    "key, value",
    [
        ("dataset", "../up"),
        ("dataset", "/abs"),
        ("dataset", ""),
        ("dataset", ".."),
        ("tag", "../../x"),
        ("tag", "a/b"),
        ("tag", "a\\b"),
        ("dataset", "new\nline"),
    ],
)
def test_a_run_folder_lies_in_runs_dir(key, value, tmp_path):
    names = {"dataset": "d", "method": "m", "networks": "n", "tag": ""} | {key: value}
    with pytest.raises(ConfigError, match=f"^{key}: "):
        run_folder(
            str(tmp_path),
            names["dataset"],
            names["method"],
            names["networks"],
            0,
            "clean",
            names["tag"],
        )


@pytest.mark.parametrize("tag", ["", "with blanks", "größe", "-x", "v1.2", "..."])
def test_honest_names_of_runs_are_taken(tag, tmp_path):
    folder = run_folder(str(tmp_path), "my data", "kd", "a-b", 3, "clean", tag)
    assert folder.parent.parent.parent == tmp_path / "my data" and inside(folder, tmp_path)


@pytest.mark.parametrize("dataset", ["btcv", "la", "acdc"])
@pytest.mark.parametrize("option", ["dataset=../x", "tag=../x"])
def test_a_config_cannot_name_a_run_folder_elsewhere(dataset, option, tmp_path):
    site = write_site(dataset, "sound", tmp_path / "data")
    refused = train(site, "--opts", option, ok=False)
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert not list(tmp_path.rglob("last.pt"))


@pytest.mark.parametrize(
    "path, expected",
    [
        ("root/a", True),
        ("root", True),
        ("root/../root/a", True),
        ("root/a/../../b", False),
        ("rootless/a", False),
        ("/etc/passwd", False),
        ("root/..", False),
        ("root/...", True),
    ],
)
def test_inside_is_decided_by_the_words_of_a_path(path, expected):
    assert inside(path, "root") is expected
    assert inside("/a", "/")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "../a", "/a", "a\\b", "a\0b", "a\nb", "\x7f"]
)
def test_a_case_has_a_plain_name(name):
    with pytest.raises(DataError, match="plain file name"):
        Case(name, (Path("x"),))


def test_arguments_of_a_checkpoint():
    stored = {
        "dataset": {
            "format": "msd",
            "root": "/data",
            "cache_dir": "cache",
            "split_dir": "/data/lists",
            "allow_outside": True,
        }
    }
    found = dataset_arguments(stored, "c.pt")
    assert found == stored["dataset"] | {"allow_outside": False}
    assert stored["dataset"]["allow_outside"] is True  # a copy was changed
    stored["dataset"]["split_dir"] = "/etc"
    assert dataset_arguments(stored, "c.pt")["split_dir"] == ""
    assert dataset_arguments(stored, "c.pt", allow_outside=True)["split_dir"] == "/etc"
    assert dataset_arguments(stored, "c.pt", root="/mine")["root"] == "/mine"
    stored["dataset"]["cache_dir"] = "/tmp/x"
    with pytest.raises(CheckpointError, match="--cache-dir"):
        dataset_arguments(stored, "c.pt")
    assert dataset_arguments(stored, "c.pt", cache_dir="/y")["cache_dir"] == "/y"


def test_split_lists_with_marks_of_other_editors(tmp_path):
    """A byte order mark, Windows line ends, a comment after a name that holds a '#'."""
    site = Atrium(tmp_path / "data")
    site.add("S#5")
    site.finish()
    lists = site.root / "splits"
    (lists / "train.txt").write_bytes("\ufeffS1\r\nS2 # the second\r\n#S3\r\nS#5\r\n".encode())
    dataset = build_dataset(
        "la",
        root=str(site.root),
        split_dir=str(lists),
        patch_size=(16, 16, 16),
        class_names=["a", "b"],
    )
    assert [case.name for case in dataset.splits()["labelled"]] == ["S1", "S2", "S#5"]
    (lists / "train.txt").write_bytes("Größe".encode("latin-1"))
    with pytest.raises(DataError, match="save the list as UTF-8"):
        dataset.splits()
