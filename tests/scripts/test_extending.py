"""docs/extending.md: its examples are complete, and its commands run, on tiny data."""

import re
import shlex

import pytest
import yaml

from tests.scripts.conftest import ROOT, make_workspace, run
from tests.scripts.test_train_crkd import COMMON, CONFIGS, KINDS, write_data
from utils.checkpoint import load_checkpoint

DOCUMENT = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
SECTIONS = {
    title: text for title, text in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", DOCUMENT, re.S | re.M)
}
WALKS = ("A student", "A distillation loss", "A data set", "A semi-supervised method")
TERMS = {
    "A student": '"afd"',  # by the default method
    "A distillation loss": '"sure"',
    "A data set": "seg",
    "A semi-supervised method": "consistency",
}


def blocks(title, language):
    return re.findall(rf"^```{language}\n(.*?)^```", SECTIONS[title], re.S | re.M)


def commands(title):
    """The commands of a section, as lists of words."""
    lines = "".join(blocks(title, "sh")).replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines]


TEACHER = commands("A student")[0]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with the configurations that the document names, each with tiny data of its
    format.
    """
    folder = tmp_path_factory.mktemp("extending")
    (folder / "configs").mkdir()
    tiny = yaml.safe_load((make_workspace(folder / "nifti") / "tiny.yaml").read_text())
    made = {"demo_btcv": tiny | {"data_root": "nifti/data", "dataset": "demo_btcv"}}
    for name, kind in (("demo_acdc", "acdc"), ("demo_la", "la")):
        write_data(folder / kind, KINDS[kind])
        settings = yaml.safe_load(CONFIGS[kind] + COMMON)
        made[name] = settings | {"dataset": name, "data_root": f"{kind}/data", "labelled": 1}
        made[name]["select_on"] = "val" if KINDS[kind].val else "test"
        if "split_dir" in settings:
            made[name]["split_dir"] = f"{kind}/splits"
    for name, settings in made.items():
        settings |= {"max_steps": 2}
        (folder / "configs" / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    run(*TEACHER, cwd=folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("title", WALKS)
def test_the_examples_run(workspace, title):
    (code,) = blocks(title, "python")
    name = re.match(r"# (\w+\.py)\n", code)[1]
    (workspace / name).write_text(code)
    for words in commands(title):
        if words != TEACHER:  # made once
            run(*words, cwd=workspace)
    (checkpoint,) = [
        words[words.index("--ckpt") + 1] for words in commands(title) if "--ckpt" in words
    ]
    state = load_checkpoint(workspace / checkpoint)
    assert state["step"] == 2
    (record,) = state["plugins"].values()
    assert record["file"] == name and len(record["sha256"]) == 64
    assert (workspace / checkpoint).with_name("summary.json").is_file()
    log = (workspace / checkpoint).with_name("log.jsonl").read_text()
    assert TERMS[title] in log


def test_every_kind_is_walked_through():
    assert set(WALKS) < set(SECTIONS)
    for title in WALKS:
        assert len(blocks(title, "python")) == 1 and len(commands(title)) >= 2
