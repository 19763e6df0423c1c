"""Typed YAML: what is read, what is converted, and the message of each error."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Annotated

import pytest
import torch

from utils.config import (
    OF_FORMAT,
    PROJECT,
    ConfigError,
    Count,
    Flag,
    Positive,
    Share,
    build,
    check_values,
    class_tolerances,
    enough_voxels,
    load_config,
    read_yaml,
    run_checkpoint,
    training_flags,
)
from utils.distributed import smallest_share


@dataclasses.dataclass(frozen=True)
class Schema:
    name: str
    steps: int
    lr: float = 0.01
    flag: bool = False
    window: tuple[float, float] = (0.0, 1.0)
    names: tuple[str, ...] = ()
    limit: int | None = None
    args: dict = dataclasses.field(default_factory=dict)


@pytest.fixture
def file(tmp_path):
    def write(text="name: demo\nsteps: 10\n"):
        path = tmp_path / "demo.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_every_type(file):
    text = """
    name: demo
    steps: 10
    lr: 1e-3
    flag: true
    window: [-175, 2.5]
    names: [a, b, c]
    limit: null
    args: {unet: {channels: [8, 16]}}
    """
    cfg = load_config(Schema, file(text))
    assert cfg == Schema(
        "demo",
        10,
        0.001,
        True,
        (-175.0, 2.5),
        ("a", "b", "c"),
        None,
        {"unet": {"channels": [8, 16]}},
    )
    assert isinstance(cfg.lr, float) and isinstance(cfg.window[0], float)


def test_defaults_and_precedence(file):
    path = file("name: demo\nsteps: 10\nlr: 0.1\n")
    assert load_config(Schema, path) == Schema("demo", 10, 0.1)
    assert load_config(Schema, path, ["lr=0.2", "steps=5", "lr=0.3"]) == Schema("demo", 5, 0.3)
    assert load_config(Schema, path, ["lr=0.2"], {"lr": 0.4, "name": None, "steps": 7}) == Schema(
        "demo", 7, 0.4
    )


@pytest.mark.parametrize(
    "option, key, value",
    [
        ("names=[x, y]", "names", ("x", "y")),
        ("window=[0, 1e2]", "window", (0.0, 100.0)),
        ("flag=true", "flag", True),
        ("limit=3", "limit", 3),
        ("name=a=b", "name", "a=b"),
        ("lr=5e-4", "lr", 5e-4),
        ("args={a: {b: 1}}", "args", {"a": {"b": 1}}),
    ],
)
def test_options_are_yaml(file, option, key, value):
    assert getattr(load_config(Schema, file(), [option]), key) == value


@pytest.mark.parametrize(
    "text, expected",
    [
        ("stepz: 3", "unknown key 'stepz'; did you mean 'steps'?"),
        ("qqqqqq: 3", "unknown key 'qqqqqq'; known keys: args, flag, limit"),
        ("steps: 1.5", "'steps' must be an integer, got 1.5 (float)"),
        ("steps: true", "'steps' must be an integer, got True"),
        ("steps: '3'", "'steps' must be an integer, got '3' (str)"),
        ("lr: fast", "'lr' must be a finite number, got 'fast'"),
        ("lr: .nan", "'lr' must be a finite number"),
        ("lr: .inf", "'lr' must be a finite number"),
        ("lr: false", "'lr' must be a finite number, got False"),
        ("flag: 1", "'flag' must be true or false, got 1"),
        ("name: [5]", "'name' must be text, got [5]"),
        (
            "window: [1]",
            "'window' must be a list of 2 values: a finite number, a finite number, got [1]",
        ),
        ("window: 3", "'window' must be a list of 2 values"),
        ("window: [1, a]", "'window' must be a finite number, got 'a'"),
        ("names: abc", "'names' must be a list of text, got 'abc'"),
        ("limit: x", "'limit' must be an integer or empty (null), got 'x'"),
        ("args: [1]", "'args' must be a mapping, got [1]"),
    ],
)
def test_wrong_values_name_the_file_and_the_fix(file, text, expected):
    key = text.partition(":")[0]
    kept = [line for line in ("name: demo", "steps: 10") if not line.startswith(f"{key}:")]
    path = file("\n".join([*kept, text]))
    with pytest.raises(ConfigError, match=re.escape(f"{path}: {expected}")):
        load_config(Schema, path)


@pytest.mark.parametrize(
    "options, flags, expected",
    [
        (["steps=x"], {}, "--opts steps=x: 'steps' must be an integer"),
        (["stepz=1"], {}, "--opts stepz=1: unknown key 'stepz'; did you mean 'steps'?"),
        (["steps"], {}, "--opts 'steps': expected key=value"),
        (["=3"], {}, "--opts '=3': expected key=value"),
        (["names=[a"], {}, "--opts 'names=[a': the value is not valid YAML"),
        ([], {"steps": "many"}, "--steps: 'steps' must be an integer"),
    ],
)
def test_wrong_options_name_the_flag(file, options, flags, expected):
    with pytest.raises(ConfigError, match=re.escape(expected)):
        load_config(Schema, file(), options, flags)


def test_missing_keys(file):
    path = file("lr: 0.1\n")
    with pytest.raises(ConfigError, match=re.escape(f"{path}: missing keys name, steps")):
        load_config(Schema, path)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", "expected a mapping of keys to values, got NoneType"),
        ("- a\n- b\n", "expected a mapping of keys to values, got list"),
        ("1: a\n", "expected a mapping"),
        ("a: [1\n", "not valid YAML"),
        ("a: 1\nb: 2\na: 3\n", "key 'a' given twice"),
        ("a: {b: 1, b: 2}\n", "key 'b' given twice"),
        ("a: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
    ],
)
def test_bad_files(file, text, expected):
    path = file(text)
    with pytest.raises(ConfigError, match=re.escape(str(path)) + ".*" + re.escape(expected)):
        read_yaml(path)


def test_a_name_stands_for_a_configuration_of_the_project(tmp_path, monkeypatch, capsys):
    flags = training_flags("", ["kd"], {})
    monkeypatch.chdir(PROJECT)
    assert flags.parse_args(["--config", "btcv"]).config == Path("configs/btcv.yaml")
    monkeypatch.chdir(tmp_path)
    assert flags.parse_args(["--config", "btcv"]).config == PROJECT / "configs/btcv.yaml"
    Path("btcv").write_text("a: 1")  # a file of that name goes first
    assert flags.parse_args(["--config", "btcv"]).config == Path("btcv")
    with pytest.raises(ConfigError, match="did you mean 'btcv'"):
        read_yaml("btvc")
    with pytest.raises(ConfigError, match=f"it lies in {PROJECT}, start the script there"):
        read_yaml("configs/btcv.yaml")


def test_a_mistyped_flag_is_answered_by_the_nearest(capsys):
    with pytest.raises(SystemExit):
        training_flags("", ["kd"], {}).parse_args(["--config", "btcv", "--metod=kd", "--sed", "1"])
    told = capsys.readouterr().err
    assert "--metod: did you mean '--method'?; --sed: did you mean '--seed'?" in told


def test_a_key_that_is_given_as_a_flag_is_answered_by_opts(capsys):
    with pytest.raises(SystemExit):
        training_flags("", ["kd"], {"student": ""}).parse_args(["--max-steps", "20"])
    told = capsys.readouterr().err
    assert "--opts max_steps=VALUE" in told and "did you mean" not in told


def test_labeled_is_labelled():
    assert training_flags("", ["kd"], {}).parse_args(["--labeled", "2"]).labelled == 2


def test_a_run_folder_stands_for_its_best_checkpoint(tmp_path):
    assert run_checkpoint(str(tmp_path)) == tmp_path / "best.pt"
    assert run_checkpoint(str(tmp_path / "last.pt")) == tmp_path / "last.pt"


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "demo.yaml"
    path.write_bytes(b"name: \xff\xfe\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_yaml(path)


def test_a_missing_file_lists_its_neighbours(file, tmp_path):
    path = file()
    with pytest.raises(
        ConfigError, match=rf"demp\.yaml: no such configuration file; found {re.escape(str(path))}"
    ):
        read_yaml(tmp_path / "demp.yaml")
    with pytest.raises(ConfigError, match="no such configuration file"):
        read_yaml(tmp_path / "nowhere" / "demo.yaml")


@dataclasses.dataclass(frozen=True)
class Marked:
    lr: Positive = 0.1
    share: Share = 0.5
    sides: tuple[Count, Count] = (1, 2)
    overlap: Annotated[float, "[0, 1)"] = 0.0
    mode: Annotated[str, ("a", "b")] = "a"
    axes: Annotated[str, OF_FORMAT] = "anything"


@pytest.mark.parametrize("values", [{}, {"share": 1.0}, {"share": 0.0}, {"lr": 1e9}, {"mode": "b"}])
def test_values_in_their_ranges_pass(values):
    check_values(Marked(**values))


@pytest.mark.parametrize(
    "values, expected",
    [
        ({"lr": 0.0}, "lr: must lie in (0, inf), got 0.0"),
        ({"share": 1.5}, "share: must lie in [0, 1], got 1.5"),
        ({"sides": (1, 0)}, "sides: must lie in [1, inf), got (1, 0)"),
        ({"overlap": 1.0}, "overlap: must lie in [0, 1), got 1.0"),
        ({"mode": "c"}, "mode: unknown value 'c'; choose from a, b"),
    ],
)
def test_values_outside_of_their_ranges_name_key_and_range(values, expected):
    with pytest.raises(ConfigError, match=re.escape(expected)):
        check_values(Marked(**values))


def test_a_tolerance_for_all_classes_or_for_some():
    names = ("liver", "vein")
    assert class_tolerances(3, names) == [3.0, 3.0]
    assert class_tolerances({"vein": 1.5}, names) == [2.0, 1.5]
    for value, expected in (
        ({"livr": 1.0}, "nsd_tolerance: livr is none of the classes liver, vein"),
        (-1, "a distance of at least 0 .*got -1 for liver"),
        ({"vein": "wide"}, "got 'wide' for vein"),
        (math.inf, "got inf"),
    ):
        with pytest.raises(ConfigError, match=expected):
            class_tolerances(value, names)


def test_a_number_that_is_too_large_names_the_largest():
    with pytest.raises(ConfigError, match=r"--seed: 'seed' must lie within ±2147483647, got 9{20}"):
        build(Seeded, {"seed": (99999999999999999999, Flag("--seed"))})


@dataclasses.dataclass
class Seeded:
    seed: int = 0


def test_one_voxel_of_a_channel_names_patch_batch_and_processes(monkeypatch):
    norm = torch.nn.BatchNorm3d(2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    expected = "patch_size: [8, 8, 8] leaves net one voxel .* 1 patch.* 2 processes; .*more patches"
    with pytest.raises(ConfigError, match=expected.replace("[", r"\[")):
        with enough_voxels("net", (8, 8, 8), smallest_share(2, "cpu"), "crops_per_case"):
            norm(torch.zeros(1, 2, 1, 1, 1))
    with pytest.raises(ValueError, match="expected 5D"), enough_voxels("net", (8,), 1, ""):
        norm(torch.zeros(1))
