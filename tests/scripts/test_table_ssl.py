"""The list of semi-supervised cells: how many, and every command is one that its training script
takes.
"""

import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import train_2d_crkd
import train_3d_crkd

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {"train_2d_crkd.py": train_2d_crkd, "train_3d_crkd.py": train_3d_crkd}


def dry_run(*arguments):
    """Triples of a training command and its tests by both protocols, as the script prints them."""
    run = subprocess.run(
        ["sh", "scripts/table_ssl.sh", "--dry-run", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = run.stdout.splitlines()
    return list(zip(lines[0::3], lines[1::3], lines[2::3], strict=True))


def parse(command, monkeypatch):
    """The configuration that the training script makes of a command."""
    words = shlex.split(command)
    assert words[0] == "python"
    monkeypatch.setattr(sys, "argv", [*words[1:], "--show-run"])
    return SCRIPTS[words[1]].parse_args()


@pytest.mark.parametrize("preset", ["clean", "as_released"])
def test_cells(monkeypatch, preset):
    monkeypatch.chdir(ROOT)
    cells, commands = [], dry_run("--preset", preset)
    assert len(commands) == len(set(commands)) == 58
    for training, clean, published in commands:
        args, cfg = parse(training, monkeypatch)
        assert args.resume
        assert cfg.preset == ("clean" if cfg.method == "supervised" else preset)
        script = f"test_{len(cfg.patch_size)}d.py"
        assert clean == f'python {script} --ckpt "$({training} --show-run)/best.pt"'
        assert published == f"{clean} --protocol published"
        cells.append((cfg.dataset, cfg.labelled, cfg.method))
    assert len(set(cells)) == 58
    methods = Counter((dataset, method) for dataset, _, method in cells)
    for dataset, settings, rivals in (
        ("acdc", 2, ("unimatch", "crossmatch", "acmt")),
        ("isic2018", 3, ("unimatch", "crossmatch", "acmt")),
        ("kvasir", 3, ("unimatch", "crossmatch", "acmt")),
        ("la", 2, ("lefed", "acmt", "mlrpl", "unimatch")),
    ):
        assert methods[dataset, "supervised"] == settings + 1
        assert (dataset, 1.0, "supervised") in cells  # the upper bound
        assert {methods[dataset, rival] for rival in (*rivals, "crkd")} == {settings}


def test_left_atrium_networks_are_those_of_the_methods(monkeypatch):
    monkeypatch.chdir(ROOT)
    networks = {}
    for training, _, _ in dry_run("--only", "la.* --labelled 4"):
        cfg = parse(training, monkeypatch)[1]
        networks[cfg.method] = cfg.network
    assert networks.pop("lefed") == "vnet_lefed"
    assert networks.pop("mlrpl") == "vnet_dual"
    assert set(networks.values()) == {"vnet"}


def test_selection_seeds_and_settings(monkeypatch):
    monkeypatch.chdir(ROOT)
    commands = dry_run(
        "--only", "acdc.* 3 .*(crkd|unimatch) ", "--seeds", "0 1", "--", "workers=8", "tag=a b"
    )
    found = [parse(training, monkeypatch)[1] for training, _, _ in commands]
    assert [(cfg.method, cfg.seed) for cfg in found] == [
        ("unimatch", 0),
        ("unimatch", 1),
        ("crkd", 0),
        ("crkd", 1),
    ]
    assert {(cfg.workers, cfg.tag) for cfg in found} == {(8, "a b")}


@pytest.mark.parametrize(
    "arguments", [["--only", "nothing-like-it"], ["--preset", "old"], ["--sedes", "1"]]
)
def test_mistakes_are_errors(arguments):
    run = subprocess.run(
        ["sh", "scripts/table_ssl.sh", "--dry-run", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode
    assert run.stderr.startswith("error: ")
    assert not run.stdout
