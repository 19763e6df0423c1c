"""Two steps of every (teacher, student, method) on tiny data, through the training script."""

import itertools

import pytest

from losses import KD_METHODS
from tests.scripts.conftest import CONFIG, make_workspace, train
from utils.checkpoint import load_checkpoint

TEACHERS = ("resunet", "segresnet")
STUDENTS = ("unet", "espnetv2", "mobile_unet", "lcovnet")
NARROW = """
network_args:
  resunet: {channels: [4, 4, 8, 8]}
  segresnet: {init_filters: 4, blocks_down: [1, 1, 1, 1]}
  unet: {channels: [2, 4, 4, 8]}
  espnetv2: {channels: [16, 32, 48, 64]}
  mobile_unet: {width: 0.1}
  lcovnet: {channels: [2, 4, 4, 8, 8]}
method_args:
  cirkd: {region_queue: 20, pixel_queue: 40, region_contrast: 4, pixel_contrast: 4, pool: 4}
"""


@pytest.fixture(scope="module")
def trained_teachers(tmp_path_factory):
    """A workspace whose patches suit every stride, with one-step teachers."""
    folder = make_workspace(tmp_path_factory.mktemp("triples"))
    config = CONFIG.split("network_args")[0].replace("[16, 16, 16]", "[32, 32, 32]")
    config = config.replace("max_steps: 4", "max_steps: 2").replace(
        "log_interval: 2", "log_interval: 1"
    )
    (folder / "tiny.yaml").write_text(config + NARROW)
    for teacher in TEACHERS:
        train("--method", "supervised", "--student", teacher, "--opts", "max_steps=1", cwd=folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "teacher, student, method", itertools.product(TEACHERS, STUDENTS, KD_METHODS)
)
def test_two_steps(trained_teachers, teacher, student, method):
    flags = ("--teacher", teacher, "--student", student, "--method", method)
    folder = trained_teachers / train(*flags, "--show-run", cwd=trained_teachers).stdout.strip()
    train(*flags, cwd=trained_teachers)
    assert load_checkpoint(folder / "last.pt")["step"] == 2
