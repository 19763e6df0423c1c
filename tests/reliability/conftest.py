"""Data and reference runs of the reliability tests, made once for each test process."""

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.reliability import harness
from tests.scripts.conftest import make_workspace
from tests.scripts.test_train_crkd import make_site


class Cell(NamedTuple):
    """A script with a method: the kind of its data, its flags, and where its run folder is."""

    script: str
    data: str
    flags: tuple[str, ...]
    folder: str


DISTILL = ("--teacher", "resunet", "--student", "unet", "--method")
CELLS = {
    "supervised": Cell(
        "train_3d_distill.py",
        "msd",
        ("--method", "supervised", "--student", "unet"),
        "runs/tiny/supervised/unet/seed0",
    ),
    "acf_bckd": Cell(
        "train_3d_distill.py",
        "msd",
        (*DISTILL, "acf_bckd"),
        "runs/tiny/acf_bckd/resunet-unet/seed0",
    ),
    "cirkd": Cell(
        "train_3d_distill.py", "msd", (*DISTILL, "cirkd"), "runs/tiny/cirkd/resunet-unet/seed0"
    ),
    "crkd": Cell(
        "train_2d_crkd.py", "acdc", ("--method", "crkd"), "runs/heart/crkd/unet2d-2/seed0"
    ),
    "acmt": Cell(
        "train_2d_crkd.py", "acdc", ("--method", "acmt"), "runs/heart/acmt/unet2d-2/seed0"
    ),
    "lefed": Cell(
        "train_3d_crkd.py", "la", ("--method", "lefed"), "runs/atrium/lefed/vnet_lefed-2/seed0"
    ),
}
OPTS = ("--opts", "max_steps=6")


class Site(NamedTuple):
    """A folder in which a cell's script is run, with data and tiny.yaml."""

    path: Path
    cell: Cell

    @property
    def folder(self) -> Path:
        return self.path / self.cell.folder

    def start(self, *more: str, prepare=None) -> harness.Child:
        """more: values of --opts (key=value), or flags and their arguments."""
        flags = [word for word in more if "=" not in word]
        values = [word for word in more if "=" in word]
        arguments = ("--config", "tiny.yaml", *self.cell.flags, *flags, *OPTS, *values)
        return harness.Child(self.cell.script, *arguments, cwd=self.path, prepare=prepare)

    def run(self, *more: str, prepare=None, timeout: float = 120) -> harness.Ended:
        return self.start(*more, prepare=prepare).wait(timeout)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """kind of data -> folder with that data, tiny.yaml and, for distillation, a teacher."""
    made: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            if kind == "msd":
                make_workspace(folder)
                teacher = (
                    "--config",
                    "tiny.yaml",
                    "--method",
                    "supervised",
                    "--student",
                    "resunet",
                )
                ended = harness.run(
                    "train_3d_distill.py", *teacher, "--opts", "max_steps=1", cwd=folder
                )
                assert ended.code == 0, ended.text
            else:
                make_site(folder, kind)
            made[kind] = folder
        return made[kind]

    return of


@pytest.fixture
def site(prepared, tmp_path):
    """A cell's name -> a site of the test's own; `part` tells several apart."""

    def of(name: str, part: str = "site") -> Site:
        path = tmp_path / part
        shutil.copytree(prepared(CELLS[name].data), path)
        return Site(path, CELLS[name])

    return of
