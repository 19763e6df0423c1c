"""Any configuration and any flags: a run, or an error of one screen that names the file or flag and
the key.

Each attempt is the script's own `main`, stopped where it would list its data. Whatever is not one
of the errors that the scripts print is a traceback to their user, and fails the test.
"""

import ast
import contextlib
import dataclasses
import inspect
import io
import json
import math
import re
import string
import subprocess
import sys
import types
import typing
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
import yaml
from hypothesis import given

import reporting
import test_2d
import test_3d
import train_2d_crkd
import train_3d_crkd
import train_3d_distill
from dataloaders import DATASETS, DataError, Dataset, MSDDataset
from dataloaders.settings import DataSettings
from losses import KD_METHODS
from methods import SSL_METHODS
from networks import NETWORKS
from tests.reliability import profiles  # noqa: F401
from utils import disagreement, distillation, few_labels, run
from utils.checkpoint import CheckpointError
from utils.config import OF_FORMAT, ConfigError, load_config, marks, read_yaml

ROOT = Path(__file__).resolve().parents[2]
# what the scripts turn into `error: ...`
PRINTED = (ConfigError, DataError, CheckpointError, FloatingPointError)
SCREEN = 20  # lines
BASE = {
    train_3d_distill: {
        "dataset": "tiny",
        "data_root": "nowhere",
        "datalist": "dataset_0.json",
        "class_names": ["background", "ball"],
        "patch_size": [16, 16, 16],
        "max_steps": 4,
        "student": "unet",
        "method": "supervised",
        "network_args": {"unet": {"channels": [2, 4, 4, 8]}, "resunet": {"channels": [4, 4, 8, 8]}},
    },
    train_3d_crkd: {
        "dataset": "tiny",
        "format": "la",
        "data_root": "nowhere",
        "class_names": ["background", "atrium"],
        "patch_size": [32, 32, 32],
        "max_steps": 4,
        "labelled": 2,
        "stride": [16, 16, 16],
        "val_stride": [16, 16, 16],
        "network_args": {"vnet": {"n_filters": 2}},
    },
    train_2d_crkd: {
        "dataset": "tiny",
        "format": "images2d",
        "data_root": "nowhere",
        "class_names": ["background", "lesion"],
        "patch_size": [32, 32],
        "max_steps": 4,
        "labelled": 0.5,
    },
}
SCRIPTS = tuple(BASE)
scripts = st.sampled_from(SCRIPTS)


class Reached(Exception):
    """The script got as far as its data."""


def stop(*_, **__):
    raise Reached


@pytest.fixture(autouse=True)
def stopped_before_the_data(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(MSDDataset, "splits", stop)
    monkeypatch.setattr(Dataset, "splits", stop)
    monkeypatch.chdir(tmp_path_factory.mktemp("empty"))


def attempt(script, config, *flags, main=None):
    """None if the script would have run, else what it prints."""
    path = Path("config.yaml")
    if isinstance(config, dict):
        config = yaml.safe_dump(config, allow_unicode=True)
    path.write_bytes(
        config if isinstance(config, bytes) else config.encode("utf-8", "surrogatepass")
    )
    return outcome(script.main, [script.__name__, "--config", str(path), *flags])


def outcome(main, argv):
    argv, before = list(argv), sys.argv
    out, err = io.StringIO(), io.StringIO()
    try:
        sys.argv = argv
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
        return None
    except Reached:
        return None
    except PRINTED as error:
        return f"error: {error}"
    except SystemExit as error:  # argparse, or --help
        return (
            None
            if not error.code
            else err.getvalue() + (error.code if isinstance(error.code, str) else "")
        )
    finally:
        sys.argv = before


def assert_helpful(message, *names):
    """One screen, and each of `names` or one of a tuple of them."""
    assert len(message.splitlines()) < SCREEN and len(message) < 4000, message
    for name in names:
        assert any(part in message for part in ((name,) if isinstance(name, str) else name)), (
            message
        )


def fields(script):
    return {field.name: field for field in dataclasses.fields(script.Config)}


# What a user may write

SPECIAL = (
    "",
    " ",
    "off",
    "nan",
    "-1",
    "1e400",
    "a/b",
    "../x",
    "a\0b",
    "\x1b[31m",
    "é✓漢",
    "null",
    "~",
    "9" * 5000,
    "x" * 3000,
    "'",
    '"',
    "{a: 1}",
    "5%",
    "-",
    "cuda:77",
    "meta",
    "unet",
    "vnet",
    "file.py:Name",
    ".py",
    "kd",
    "brats",
    "acdc",
)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.integers(),
    st.sampled_from([10**30, -(10**30), 2**31, 2**63]),
    st.floats(),
    st.floats(0, 1),
    st.sampled_from(SPECIAL),
    st.text(max_size=12),
    st.dates(),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(scalars, inner, max_size=3),
    max_leaves=8,
)
typos = st.text(string.ascii_lowercase + "_", min_size=1, max_size=12)


def close_to(hint):
    """Values of the type that a key has, right and wrong ones."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple and len(args) > 1 and args[1] is not Ellipsis:
        return st.tuples(*map(close_to, args)).map(list) | st.lists(close_to(args[0]), max_size=4)
    if origin is tuple or getattr(origin, "__name__", "") in ("Sequence", "Iterable"):
        return st.lists(
            close_to(args[0]) if args and args[0] is not Ellipsis else scalars, max_size=5
        )
    if origin in (typing.Union, types.UnionType):
        return st.one_of([close_to(part) for part in args])
    plain = {
        int: st.integers(-2, 40),
        float: st.floats(-1, 2),
        bool: st.booleans(),
        type(None): st.none(),
        str: st.text(max_size=8) | st.sampled_from(SPECIAL),
        dict: st.dictionaries(st.text(max_size=5), scalars, max_size=2),
    }
    return plain.get(origin or hint, scalars)


@st.composite
def settings_of_one_key(draw):
    script = draw(scripts)
    hints = typing.get_type_hints(script.Config)
    key = draw(st.sampled_from(list(hints)) | typos)
    return script, key, draw(values | close_to(hints.get(key)))


@given(settings_of_one_key(), st.booleans())
def test_any_value_of_any_key(drawn, as_option):
    script, key, value = drawn
    config = dict(BASE[script])
    if as_option:
        text = (
            yaml.safe_dump(value, default_flow_style=True, width=10**6)
            .removesuffix("\n...\n")
            .strip()
        )
        message = attempt(script, config, "--opts", f"{key}={text}")
    else:
        message = attempt(script, config | {key: value})
    if message is not None:
        known = (key, *fields(script))
        assert_helpful(message, ("config.yaml", "--opts", "--device"), known)
    elif key not in fields(script):
        pytest.fail(f"{key} was ignored")


@st.composite
def arguments_of_one_entry(draw):
    """network_args, method_args or recipe with one entry; names and arguments that exist, and some
    that do not.
    """
    script = draw(scripts)
    section = draw(st.sampled_from(["network_args", "method_args", "recipe"]))
    methods = KD_METHODS if script is train_3d_distill else SSL_METHODS
    registry = {"network_args": NETWORKS, "method_args": methods}.get(section, methods)
    if section == "recipe" and script is train_3d_distill:
        registry = NETWORKS
    name = draw(st.sampled_from(list(registry)) | typos)
    if draw(st.integers(0, 9)) == 0:
        return script, section, name, {name: draw(values)}
    if section == "recipe" or name not in registry:
        hints = typing.get_type_hints(script.Config)
    else:
        stated = typing.get_type_hints(registry[name].__init__)
        accepted = inspect.signature(registry[name]).parameters
        hints = {key: stated[key] for key in accepted if key in stated}
    key = draw(st.sampled_from(list(hints)) | typos)
    return script, section, name, {name: {key: draw(values | close_to(hints.get(key)))}}


@given(arguments_of_one_entry(), st.sampled_from(["unet", "lcovnet", "segresnet"]))
def test_any_argument_of_networks_and_methods(drawn, student):
    script, section, name, entry = drawn
    config = BASE[script] | {section: entry}
    # Where the entry's name can be that of the run, it is, so that the argument reaches a
    # constructor.
    key = {"network_args": "network", "method_args": "method", "recipe": "method"}[section]
    if script is train_3d_distill and key != "method":
        key = "student"
    if script is train_3d_distill and section == "recipe":
        key = "student"
    if name in (NETWORKS if key in ("network", "student") else {**KD_METHODS, **SSL_METHODS}):
        config[key] = name
    elif script is train_3d_distill:
        config["student"] = student
    if script is train_3d_distill and section == "method_args" and name in KD_METHODS:
        config["method"] = name
    message = attempt(script, config)
    if message is not None:
        assert_helpful(message, ("config.yaml", "--device"), (section, *fields(script)))


@st.composite
def documents(draw):
    """Text that is nearly YAML, or bytes that are not text."""
    lines = yaml.safe_dump(BASE[train_3d_distill], default_flow_style=None).splitlines()
    if draw(st.booleans()):
        index = draw(st.integers(0, len(lines) - 1))
        lines[index] = draw(st.text(st.characters(codec="utf-8"), max_size=30))
        return "\n".join(lines)
    return draw(st.binary(max_size=60) | st.text(max_size=60))


@given(documents())
def test_any_text(text):
    message = attempt(train_3d_distill, text)
    if message is not None:  # without class_names, the list in data_root is asked
        assert_helpful(message, ("config.yaml", "nowhere"))


def yaml_bomb(depth=12):
    """A few lines that stand for 9^depth values."""
    lines = ["x0: &x0 [a, a, a, a, a, a, a, a, a]"]
    lines += [f"x{k}: &x{k} [{', '.join([f'*x{k - 1}'] * 9)}]" for k in range(1, depth)]
    return "\n".join([*lines, f"network_args: {{unet: {{channels: *x{depth - 1}}}}}"])


@pytest.mark.parametrize(
    "text",
    [
        "network_args: &a {unet: *a}",
        "class_names: &a [x, *a]",
        yaml_bomb(),
        "method_args: " + "[" * 500 + "]" * 500,
        "lr: " + "{a: " * 60 + "1" + "}" * 60,
        "max_steps: 2001-99-99",
        "max_steps: " + "9" * 6000,
        "max_steps: 0x_",
        "lr: !!float x",
        "lr: !!int x",
        "compile: !!bool x",
        "dataset: !!timestamp x",
        "dataset: !!binary '*'",
        "dataset: !!python/object/apply:os.getcwd []",
        "dataset: !!python/name:os.system",
        "dataset: !own x",
        "seed: 1\nseed: 2",
        "network_args: {unet: {channels: [1, 2]}, unet: {}}",
        "network_args: {1: {}, 1: {}}",
        "? [a, b]\n: c",
        "? {a: b}\n: c",
        "seed: 1\n---\nseed: 2",
        "\tseed: 1",
        "seed: *unknown",
        "seed: &a 1\nlr: *b",
        'dataset: "\\ud800"',
        'dataset: "a\\0b"',
        "network_args: {<<: {unet: {}}, <<: {unet: {}}}",
        "network_args: {<<: 3}",
        "- a",
        "3",
        "",
        "null",
        "%YAML 9.9\n---\nseed: 1",
    ],
)
def test_hostile_yaml_is_refused(text):
    base = BASE[train_3d_distill]
    kept = {
        key: value
        for key, value in base.items()
        if not any(f"{key}:" in line for line in text.splitlines())
    }
    plain = not text or text[0] in "-3%" or text == "null" or "---" in text
    message = attempt(train_3d_distill, text if plain else f"{yaml.safe_dump(kept)}{text}\n")
    assert message is not None
    assert_helpful(message, "config.yaml")


def test_anchors_and_merge_keys_work(tmp_path):
    text = yaml.safe_dump(BASE[train_3d_distill] | {"network_args": None}).replace(
        "network_args: null\n", ""
    )
    path = Path("merged.yaml")
    path.write_text(
        f"{text}network_args:\n  unet: &w {{channels: [2, 4, 4, 8]}}\n  resunet: {{<<: *w}}\n"
    )
    found = read_yaml(path)["network_args"]
    assert found["unet"] == found["resunet"] == {"channels": [2, 4, 4, 8]}
    assert attempt(train_3d_distill, path.read_text()) is None
    # with a byte-order mark
    assert attempt(train_3d_distill, b"\xef\xbb\xbf" + path.read_bytes()) is None


def test_no_file():
    Path("folder").mkdir()
    for path, expected in (
        ("folder", "a folder"),
        ("none.yaml", "no such"),
        ("", "."),
        ("x" * 300, "no such"),
    ):
        message = outcome(train_3d_distill.main, ["x", "--config", path])
        assert_helpful(message, expected)


words = st.sampled_from(
    [
        "--config",
        "--teacher",
        "--student",
        "--network",
        "--method",
        "--seed",
        "--device",
        "--amp",
        "--compile",
        "--channels-last",
        "--resume",
        "--opts",
        "--labelled",
        "--label_rat",
        "--unknown",
        "--",
        "unet",
        "kd",
        "crkd",
        "supervised",
        "0",
        "-1",
        "cpu",
        "bf16",
        "5%",
        "lr=1",
        "lr=",
        "=1",
        "tag=x",
        "seed=[",
        "max_steps=1e9",
        "lr=1=2",
        "config.yaml",
        "network_args={unet: 3}",
        "a.py:B",
    ]
) | st.text(max_size=8)


@given(scripts, st.lists(words, max_size=5))
def test_any_flags_of_training(script, flags):
    message = attempt(script, BASE[script], *flags)
    if message is not None:
        assert_helpful(message, ("--", "config.yaml", "error: argument", "unrecognized", *flags))


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_bases_run_and_options_add_up(script):
    assert attempt(script, BASE[script]) is None
    message = attempt(script, BASE[script], "--opts", "lr=0", "--opts", "seed=3")
    assert_helpful(message, "--opts lr=0: lr: must lie in (0, inf), got 0")


# No key is ignored


# Functions that look at a key to refuse it or to say that it does nothing: no use of it.
CHECKS = re.compile("_check.*|_try_out|checked|note_idle|idle_keys")


def attribute_reads(script):
    """Attributes of a configuration that a script and what it shares with others read to use them:
    cfg.lr, run.cfg.lr, and self.lr of the configuration itself.
    """
    found = {"labelled_batch", "unlabelled_batch"}  # read as f"{split}_batch"

    def walk(node, owners):
        if isinstance(node, ast.FunctionDef) and CHECKS.fullmatch(node.name):
            return
        if isinstance(node, ast.ClassDef):
            own = getattr(module, node.name)
            owners = {"cfg", "self"} if issubclass(own, run.Settings) else {"cfg"}
        if isinstance(node, ast.Attribute):
            owner = getattr(node.value, "id", getattr(node.value, "attr", ""))
            found.update({node.attr} if owner in owners else ())
        for child in ast.iter_child_nodes(node):
            walk(child, owners)

    shared = (few_labels,) if script is not train_3d_distill else (distillation, disagreement)
    for module in (script, *shared, run):
        walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8")), {"cfg"})
    return found


def stored_reads(module):
    """Keys of a checkpoint's configuration that a test script reads."""
    nodes = ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8")))
    return {
        node.slice.value
        for node in nodes
        if isinstance(node, ast.Subscript)
        and getattr(node.value, "id", "") == "config"
        and isinstance(node.slice, ast.Constant)
    }


def formats(script):
    dims = 2 if script is train_2d_crkd else 3
    return {name: cls for name, cls in DATASETS.items() if dims == 2 or cls.dims == dims}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_key_is_read(script):
    read = attribute_reads(script) | stored_reads(test_2d if script is train_2d_crkd else test_3d)
    by_formats = set().union(*(cls.accepted() for cls in formats(script).values()))
    assert "no_such_key" not in read and "max_steps" in read
    # settled when the configuration is read; of the data, what no format takes is refused
    parsed_only = {"recipe"} | {field.name for field in dataclasses.fields(DataSettings)}
    ignored = set(fields(script)) - read - by_formats - parsed_only
    assert not ignored, f"nothing reads {ignored}"


def other_value(field):
    """A valid value that is not the field's default."""
    by_name = {
        "orientation": "LPS",
        "spacing": [1.0, 1.0, 1.0],
        "intensity": "zscore",
        "intensity_channels": [{"scheme": "NoNormalization"}],
        "window": [0.0, 1.0],
        "normalize": "volume",
        "augmentation": "supervised",
        "eval_resize": "nearest",
        "regions": {"whole": [1, 2], "core": [2]},
        "regions_class_order": [1, 2],
        "crop": "uniform",
        "datalist": "other.json",
        "cache_dir": "elsewhere",
    }
    if field.name in by_name:
        return by_name[field.name]
    if isinstance(field.default, bool):
        return not field.default
    return 0.5 if isinstance(field.default, float) else field.default + 1


def idle_keys():
    """(script, format, key) of keys that only other formats of the script take."""
    for script in SCRIPTS:
        read = attribute_reads(script)
        for name, cls in formats(script).items():
            if cls.multilabel and script is not train_3d_distill:
                continue
            for key in sorted(
                set().union(*(cls.accepted() for cls in formats(script).values()))
                & set(fields(script))
            ):
                if key not in cls.accepted() and key not in read:
                    yield pytest.param(script, name, key, id=f"{script.__name__}-{name}-{key}")


@pytest.mark.parametrize("script, name, key", list(idle_keys()))
def test_a_key_that_the_format_has_no_use_for_is_an_error(script, name, key, tmp_path):
    config = dict(BASE[script]) | {"format": name}
    of_format = {given for given, mark in marks(script.Config) if mark is OF_FORMAT}
    idle = of_format - DATASETS[name].accepted()
    config = {given: value for given, value in config.items() if given not in idle}
    if name == "brats":
        config |= {"class_names": ["a", "b", "c"], "in_channels": 4, "crop": "uniform"}
    if name == "nnunet":  # what a configuration leaves out is read from the data set
        content = {
            "channel_names": {"0": "CT"},
            "labels": {"background": 0, "a": 1, "b": 2},
            "numTraining": 1,
            "file_ending": ".nii.gz",
        }
        (tmp_path / "dataset.json").write_text(json.dumps(content))
        config |= {"data_root": str(tmp_path), "datalist": "dataset.json"}
    assert attempt(script, config) is None
    message = attempt(script, config | {key: other_value(fields(script)[key])})
    assert_helpful(message, f"config.yaml: {key}: ", "does not use this key")


@pytest.mark.parametrize(
    "script, settings, key",
    [
        (train_3d_distill, {"intensity": "zscore", "window": [0, 1]}, "window"),
        (train_3d_crkd, {"optimizer": "adamw", "momentum": 0.5}, "momentum"),
        (train_2d_crkd, {"optimizer": "adamw", "nesterov": True}, "nesterov"),
        (train_3d_crkd, {"schedule": "constant", "min_lr": 0.1}, "min_lr"),
        (train_3d_distill, {"schedule": "constant", "min_lr": 0.1}, "min_lr"),
        (train_2d_crkd, {"schedule": "constant", "schedule_steps": 5}, "schedule_steps"),
    ],
)
def test_a_key_that_another_setting_makes_idle_is_an_error(script, settings, key):
    assert_helpful(
        attempt(script, BASE[script] | settings), f"config.yaml: {key}: ", "does not use this key"
    )


@pytest.mark.parametrize("warmup, steps", [(0, 0), (0.5, 2), (1, 1), (3, 3), (9, 9)])
def test_a_warm_up_is_steps_or_a_share(warmup, steps):
    settings = BASE[train_3d_distill] | {"method": "kd", "distill_warmup": warmup}
    assert attempt(train_3d_distill, settings) is None
    cfg = load_config(train_3d_distill.Config, "config.yaml")
    assert cfg.warmup_steps == steps


@pytest.mark.parametrize("warmup", [1.0, 2.5, 300.0])
def test_a_warm_up_that_is_neither_steps_nor_a_share(warmup):
    settings = BASE[train_3d_distill] | {"method": "kd", "distill_warmup": warmup}
    message = attempt(train_3d_distill, settings)
    assert_helpful(message, "config.yaml: distill_warmup: a whole number of steps, or a share")


def test_options_that_the_method_has_no_use_for_are_named(capsys):
    argv = ["x", "--config", "config.yaml", "--teacher", "segresnet"]
    argv += ["--opts", "teacher_seed=3", "preset=as_released"]
    attempt(train_3d_distill, BASE[train_3d_distill])  # writes the file
    before = sys.argv
    try:
        sys.argv = argv
        with contextlib.suppress(Reached):
            train_3d_distill.main()
    finally:
        sys.argv = before
    note = "note: --method supervised does not use teacher, teacher_seed, preset\n"
    assert note in capsys.readouterr().err


@pytest.mark.parametrize("module", [test_2d, test_3d])
def test_every_flag_is_read(module):
    files = [Path(each.__file__) for each in (module, reporting)]
    nodes = [
        node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    ]
    flags = {action.dest for action in module.FLAGS._actions} - {"help"}
    read = {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute) and "args" in ast.unparse(node.value)
    }
    assert len(flags) > 5 and flags <= read, flags - read


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_flag_of_training_is_a_key_or_does_something_else(script):
    others = {"help", "config", "opts", "allow_outside", "resume", "show_run"}
    flags = {action.dest for action in script.FLAGS._actions}
    assert flags - others <= set(fields(script)) and others <= flags


# Particular mistakes, each of which was a traceback or passed unseen


@pytest.mark.parametrize(
    "script, settings, expected",
    [
        (
            train_3d_distill,
            {"method_args": {"kd": {"weight": "abc"}}},
            "method_args: kd: 'weight' must be a finite number",
        ),
        (train_3d_distill, {"method_args": {"kd": 3}}, "method_args: kd: must be a mapping"),
        (
            train_3d_distill,
            {"method_args": {"kd": {"wieght": 3}}},
            "unknown argument 'wieght'; did you mean 'weight'?",
        ),
        (
            train_3d_distill,
            {"method_args": {"kd": {"num_classes": 3}}},
            "unknown argument 'num_classes'",
        ),
        (
            train_3d_distill,
            {"method_args": {"kd@resnet": {}}},
            "unknown name 'resnet'; did you mean 'resunet'?",
        ),
        (
            train_3d_distill,
            {"method": "kd", "method_args": {"kd": {"weight": -1}}},
            "weight is a weight and must be at least",
        ),
        (
            train_3d_distill,
            {"method": "kd", "method_args": {"kd": {"weight": math.nan}}},
            "'weight' must be a finite number",
        ),
        (
            train_3d_distill,
            {"method": "kd", "method_args": {"kd": {"tau": 0}}},
            "method_args: kd: kd: tau must be above 0",
        ),
        (
            train_3d_distill,
            {"network_args": {"unet": {"channels": [0, 1, 2, 3]}}},
            "4 channel numbers of at least 1",
        ),
        (
            train_3d_distill,
            {"network_args": {"unet": {"channels": 7}}},
            "'channels' must be a list of an integer, got 7",
        ),
        (
            train_3d_distill,
            {"patch_size": [8, 8, 8]},
            "patch_size: [8, 8, 8] leaves unet one voxel of a channel",
        ),
        (train_3d_distill, {"class_names": ["background", "dice"]}, "'dice' cannot name a class"),
        (train_3d_distill, {"class_names": ["background", ""]}, "'' cannot name a class"),
        (train_3d_distill, {"amp": False}, "put it in quotes"),
        (train_3d_distill, {"tag": "../x"}, "tag: '../x' cannot name a folder"),
        (train_3d_distill, {"dataset": ""}, "dataset: '' cannot name a folder"),
        (train_3d_distill, {"device": "meta"}, "--device meta"),
        (
            train_3d_distill,
            {"recipe": {"resunet": {"student": "unet"}}},
            "'student' cannot be set by a recipe",
        ),
        (
            train_3d_distill,
            {"recipe": {"resunet": {"lr": "x"}}},
            "recipe: resunet: 'lr' must be a finite number",
        ),
        (train_3d_distill, {"seed": 10**30}, "'seed' must lie within ±2147483647"),
        (train_3d_crkd, {"labelled": 2.5}, "labelled: a whole number, or a share"),
        (
            train_3d_crkd,
            {"recipe": {"crkd": {"method": "unimatch"}}},
            "'method' cannot be set by a recipe",
        ),
        (
            train_3d_crkd,
            {"method_args": {"crkd": {"lec": -1.0}}},
            "lec is a weight and must be at least 0",
        ),
        (train_2d_crkd, {"patch_size": [32, 32, 32]}, "'patch_size' must be a list of 2 values"),
        (
            train_2d_crkd,
            {"network_args": {"unet2d": {"dropout": [1, 2, 3, 4, 5]}}},
            "network_args: unet2d: dropout",
        ),
    ],
)
def test_mistakes_name_their_key(script, settings, expected):
    assert_helpful(
        attempt(script, BASE[script] | settings),
        "config.yaml" if "device" not in settings else "",
        expected,
    )


def test_numbers_in_arguments_are_numbers():
    """YAML reads 1e-3 as text; a constructor must not get it so."""
    config = BASE[train_3d_distill] | {"method": "kd", "method_args": {"kd": {"weight": "1e-3"}}}
    attempt(train_3d_distill, config)
    before = sys.argv
    try:
        sys.argv = ["x", "--config", "config.yaml"]
        assert train_3d_distill.parse_args()[1].method_args == {"kd": {"weight": 0.001}}
    finally:
        sys.argv = before


# The test scripts, which have flags only


def checkpoint(module):
    """A checkpoint whose data are not there."""
    described = {"arguments": {}, "in_channels": 1, "num_classes": 2}
    shared = {
        "cases": {"val": ["a"], "test": []},
        "plugins": {},
        "step": 1,
        "code": "x",
        "weights": {},
    }
    if module is test_3d:
        network, kind = {"name": "unet", **described}, "3d"
        dataset = {
            "format": "msd",
            "root": "nowhere",
            "datalist": "x.json",
            "class_names": ["background", "ball"],
        }
    else:
        network, kind = {"name": "unet2d", **described}, "2d-semi"
        dataset = {
            "format": "acdc",
            "root": "nowhere",
            "split_dir": "",
            "class_names": ["background", "ball"],
        }
    config = {"patch_size": [16, 16, 16], "overlap": 0.5, "window_batch": 1, "eval_batch": 1}
    return {
        "kind": kind,
        "network": network,
        "dataset": dataset,
        "config": config,
        "selected_on": "val",
        **shared,
    }


test_words = st.sampled_from(
    [
        "--ckpt",
        "--split",
        "--data-root",
        "--cache-dir",
        "--out",
        "--device",
        "--amp",
        "--fast",
        "--tta",
        "--hd95",
        "--empty",
        "--nsd-tolerance",
        "--published",
        "--protocol",
        "--stride",
        "--largest-component",
        "--no-predictions",
        "--overlays",
        "--plugin",
        "--allow-changed-plugin",
        "--unknown",
        "best.pt",
        "none.pt",
        "text.pt",
        "folder",
        "cpu",
        "cuda:7",
        "meta",
        "val",
        "test",
        "pooled",
        "diag",
        "published",
        "clean",
        "3",
        "0",
        "-1",
        "bf16",
        "a.py:B",
        "",
    ]
) | st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), max_size=6)


@given(st.sampled_from([test_2d, test_3d]), st.lists(test_words, max_size=6))
def test_any_flags_of_testing(module, flags):
    torch.save(checkpoint(module), "best.pt")
    Path("text.pt").write_text("no checkpoint")
    Path("folder").mkdir(exist_ok=True)
    message = outcome(module.main, ["x", "--ckpt", "best.pt", *flags])
    if message is not None:  # else --help
        assert_helpful(
            message,
            ("--", "best.pt", "text.pt", "nowhere", "no such", *[flag for flag in flags if flag]),
        )


@pytest.mark.parametrize(
    "module, flags, expected",
    [
        (
            test_2d,
            ("--protocol", "published", "--hd95", "directed"),
            "--hd95 directed: the published protocol",
        ),
        (
            test_2d,
            ("--protocol", "published", "--empty", "diag"),
            "--empty diag: the published protocol",
        ),
        (
            test_2d,
            ("--protocol", "published", "--nsd-tolerance", "3"),
            "--nsd-tolerance: the published protocol has no NSD",
        ),
        (test_2d, ("--out", "best.pt"), "--out: best.pt: is a file"),
        (test_3d, ("--out", "best.pt"), "--out: best.pt: is a file"),
        (
            test_3d,
            ("--stride", "1", "1", "1"),
            "--stride and --largest-component are for runs of train_3d_crkd.py",
        ),
        (test_3d, ("--plugin", "a.py:B"), "--plugin a.py:B: nothing that best.pt needs"),
        (test_3d, ("--device", "meta"), "--device meta"),
    ],
)
def test_flags_that_would_do_nothing_or_fail_late(module, flags, expected):
    torch.save(checkpoint(module), "best.pt")
    assert_helpful(outcome(module.main, ["x", "--ckpt", "best.pt", *flags]), expected)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_3d_distill.py", "train_3d_crkd.py", "train_2d_crkd.py"])
def test_as_a_user_sees_it(script):
    Path("config.yaml").write_text("dataset: tiny\nmax_stepz: 3\n")
    command = [sys.executable, str(ROOT / script), "--config", "config.yaml"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr == "error: config.yaml: unknown key 'max_stepz'; did you mean 'max_steps'?\n"
