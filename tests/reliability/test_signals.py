"""SIGINT, SIGTERM, SIGUSR1 and SIGHUP: the run saves, says how to go on, and ends with 128 + the
signal's number.
"""

import shlex
import signal

import pytest

from tests.reliability.conftest import CELLS
from tests.reliability.harness import SCRIPTS, run
from tests.reliability.test_kill import differences, state_of
from utils.checkpoint import load_checkpoint

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
ONE_OF_EACH_SCRIPT = ("supervised", "crkd", "lefed")
NEVER = ("val_interval=100000", "save_interval=100000", "log_interval=1")


def logged(place) -> int:
    path = place.folder / "log.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_OF_EACH_SCRIPT)
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_saves_and_says_how_to_resume(site, name, number):
    place = site(name)
    child = place.start("max_steps=100000", *NEVER)
    child.wait_for(lambda: logged(place) >= 2)
    child.signal(number)
    ended = child.wait()
    assert ended.code == 128 + number, ended.text
    step = load_checkpoint(place.folder / "last.pt")["step"]
    # nothing that was logged is lost, and nothing was logged after
    assert step == logged(place) >= 2
    said = ended.text.strip().splitlines()[-1]
    assert said.startswith(f"stopped after step {step}; go on with: python ")
    assert f"{place.cell.script} --config tiny.yaml" in said  # by the path that it was started with
    # The command is one: it is taken as printed, but for a length that ends.
    words = shlex.split(said.split("go on with: ")[1])[2:]
    assert words[-1] == "--resume"
    words[words.index("max_steps=100000")] = f"max_steps={step + 1}"
    again = run(place.cell.script, *words, cwd=place.path)
    assert again.code == 0, again.text
    assert load_checkpoint(place.folder / "last.pt")["step"] == step + 1


@pytest.mark.slow
def test_a_signal_to_the_whole_job_leaves_the_loader_processes_alone(site):
    """As a scheduler or a terminal sends it, to all processes of the group."""
    place = site("crkd")
    child = place.start("max_steps=100000", "workers=2", *NEVER)
    child.wait_for(lambda: logged(place) >= 2)
    child.signal(signal.SIGTERM, group=True)
    ended = child.wait()
    assert ended.code == 128 + signal.SIGTERM, ended.text
    assert load_checkpoint(place.folder / "last.pt")["step"] == logged(place)
    assert "DataLoader worker" not in ended.text and "Traceback" not in ended.text


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_OF_EACH_SCRIPT)
def test_stopped_and_resumed_equals_uninterrupted(site, name):
    """Stopped between two saves, so that the checkpoint carries half of an average of the log."""
    straight, broken = site(name, "straight"), site(name, "broken")
    assert straight.run("max_steps=9", "log_interval=3").code == 0
    child = broken.start("max_steps=9", "log_interval=3")
    child.wait_for(
        lambda: (
            '"step": 2' in (broken.folder / "log.jsonl").read_text()
            if (broken.folder / "log.jsonl").exists()
            else False
        )
    )
    child.signal(signal.SIGTERM)
    ended = child.wait()
    assert ended.code in (0, 128 + signal.SIGTERM), ended.text
    assert broken.run("--resume", "max_steps=9", "log_interval=3").code == 0
    first, second = state_of(straight.folder), state_of(broken.folder)
    for state in (first, second):  # that of the stop, in one of the two runs
        del state["last.previous.pt"]
    assert not differences(first, second)


def test_all_scripts_are_covered():
    assert {CELLS[name].script for name in ONE_OF_EACH_SCRIPT} == set(SCRIPTS)
