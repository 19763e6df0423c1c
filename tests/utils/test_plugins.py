"""Classes of the user's own: what is loaded, what is refused and why, and that no checkpoint makes
a file run.
"""

import hashlib

import pytest
import torch
from torch import nn

from dataloaders import DATASETS, Dataset
from losses import KD_METHODS, build_kd
from methods import SSL_METHODS, Method, build_method
from networks import NETWORKS, check_network
from tests.scripts.conftest import make_workspace, run, train
from utils import plugins
from utils.checkpoint import CheckpointError, load_checkpoint
from utils.config import ConfigError, Flag, gather

STUDENT = """
from torch import nn
from networks import SegOutput

class OneConvolution(nn.Module):
    dims = 3
    stride = 1

    def __init__(self, in_channels, num_classes, kernel: int = 3):
        super().__init__()
        self.num_classes = num_classes
        self.feature_channels = {"decoder": in_channels}
        self.conv = nn.Conv3d(in_channels, num_classes, kernel, padding=kernel // 2)

    def forward(self, image, return_features=False):
        logits = self.conv(image)
        return SegOutput(logits, {"decoder": image}) if return_features else logits
"""


@pytest.fixture(autouse=True)
def registries(monkeypatch, tmp_path):
    """An empty folder to work in; afterwards, registries as they were."""
    monkeypatch.chdir(tmp_path)
    yield
    for registry in (NETWORKS, KD_METHODS, SSL_METHODS, DATASETS):
        for name in [name for name, cls in registry.items() if plugins.is_plugged_in(cls)]:
            del registry[name]


def given(source="--opts", **values):
    """As the command line gives it, or a file of another name."""
    source = Flag(source) if source.startswith("--") else source
    return {key: (value, source) for key, value in values.items()}


CONTRACTS = {"student": plugins.network(NETWORKS), "teacher": plugins.network(NETWORKS)}


def test_a_reference_becomes_a_name(tmp_path):
    (tmp_path / "my net.py").write_text(STUDENT)
    reference = "my net.py:OneConvolution"
    values = given(
        student=reference,
        teacher="resunet",
        network_args={reference: {"kernel": 1}, "other.py:X": {}, "unet": {}},
    )
    used = plugins.plug_in(values, CONTRACTS)
    assert values["student"] == ("OneConvolution", "--opts") and values["teacher"] == (
        "resunet",
        "--opts",
    )
    assert values["network_args"] == ({"OneConvolution": {"kernel": 1}, "unet": {}}, "--opts")
    digest = hashlib.sha256(STUDENT.encode()).hexdigest()
    assert used == {"OneConvolution": {"file": "my net.py", "sha256": digest, "roles": ["student"]}}
    assert issubclass(NETWORKS["OneConvolution"], nn.Module) and plugins.is_plugged_in(
        NETWORKS["OneConvolution"]
    )
    how = plugins.trial(NETWORKS["OneConvolution"], (16, 16, 16), 4)
    assert how == ((8, 8, 8), 2)
    assert check_network("OneConvolution", 2, 3, *how) == {"decoder": 2}
    assert plugins.trial(NETWORKS["unet"], (16, 16, 16), 4) == ((), 1)
    assert plugins.trial(NETWORKS["unet"], (8, 8, 8), 4) == ((8, 8, 8), 4)


@pytest.mark.parametrize("name", ["mine.yaml", "./--opts.yaml"])
def test_a_configuration_makes_no_file_run(tmp_path, name):
    (tmp_path / name).write_text("student: net.py:OneConvolution\n")
    (tmp_path / "net.py").write_text("open('it ran', 'w')\n" + STUDENT)
    with pytest.raises(
        ConfigError, match=r"\.yaml: student: .*only the command line can name: --opts student=net"
    ):
        plugins.plug_in(gather(name.removeprefix("./")), CONTRACTS)
    assert not (tmp_path / "it ran").exists()


def test_names_of_registries_are_left_alone():
    values = given(student="unet", network_args={"unet": {}})
    assert plugins.plug_in(values, CONTRACTS) == {} and values == given(
        student="unet", network_args={"unet": {}}
    )


@pytest.mark.parametrize(
    "reference, source, expected",
    [
        ("none.py:A", None, "none.py: no such file to take A from"),
        ("net.py", STUDENT, "'net.py': expected path/to/file.py:ClassName"),
        ("net.py:", STUDENT, "expected path/to/file.py:ClassName"),
        ("net.py:OneConvolutoin", STUDENT, "no class OneConvolutoin; did you mean OneConvolution?"),
        ("net.py:X", "import torch\n", "no class X; it has no class"),
        ("net.py:nn", STUDENT, "no class nn"),
        ("net.py:A", "x = 1\nclass A(:\n", "net.py: line 2: SyntaxError"),
        (
            "net.py:A",
            "\nimport no_such_module\n",
            "net.py: line 2: ModuleNotFoundError: No module named 'no_such_module'",
        ),
        ("net.py:A", "def f():\n    return 1 / 0\nf()\n", "net.py: line 2: ZeroDivisionError"),
        (
            "net.py:A",
            "class A:\n    pass\n",
            "must derive from torch.nn.modules.module.Module; networks/unet.py is an example",
        ),
        (
            "net.py:OneConvolution",
            STUDENT.replace("stride = 1", ""),
            "lacks the class attribute 'stride' (int)",
        ),
        (
            "net.py:OneConvolution",
            STUDENT.replace("in_channels, num_classes, k", "c, k"),
            "add in_channels, num_classes",
        ),
        ("net.py:UNet", STUDENT.replace("OneConvolution", "UNet"), None),
        (
            "net.py:unet",
            STUDENT.replace("OneConvolution", "unet"),
            "'unet' is the name of a built-in one; rename the class",
        ),
    ],
)
def test_what_is_wrong_is_said(tmp_path, reference, source, expected):
    if source is not None:
        (tmp_path / "net.py").write_text(source)
    if expected is None:
        assert plugins.plug_in(given(student=reference), CONTRACTS)
        return
    with pytest.raises(ConfigError) as caught:
        plugins.plug_in(given(student=reference), CONTRACTS)
    assert str(caught.value).startswith("--opts: student: ") and expected in str(caught.value)


@pytest.mark.parametrize(
    "contract, source, expected",
    [
        (
            plugins.distillation(KD_METHODS),
            "from torch import nn\nclass A(nn.Module):\n  def __init__(self, tau): ...\n",
            "add student_channels, teacher_channels, num_classes, multilabel, preset; losses/kd.py "
            "is an example",
        ),
        (
            plugins.semi_supervised(SSL_METHODS, Method),
            "from torch import nn\nclass A(nn.Module): ...\n",
            "must derive from methods.base.Method",
        ),
        (
            plugins.data_format(DATASETS, Dataset),
            "class A: ...\n",
            "must derive from dataloaders.base.Dataset",
        ),
    ],
)
def test_each_kind_has_a_contract(tmp_path, contract, source, expected):
    (tmp_path / "a.py").write_text(source)
    with pytest.raises(ConfigError) as caught:
        plugins.plug_in(given(method="a.py:A"), {"method": contract})
    assert expected in str(caught.value)


def test_two_classes_of_one_name_are_refused(tmp_path):
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text(f"# {name}\n{STUDENT}")
    same = plugins.plug_in(
        given(student="a.py:OneConvolution", teacher="a.py:OneConvolution"), CONTRACTS
    )
    assert same["OneConvolution"]["roles"] == ["student", "teacher"]
    with pytest.raises(
        ConfigError, match=r"a\.py and b\.py both have a class OneConvolution; rename one"
    ):
        plugins.plug_in(
            given(student="a.py:OneConvolution", teacher="b.py:OneConvolution"), CONTRACTS
        )


@pytest.mark.parametrize(
    "change, expected",
    [
        ((", return_features=False", ""), "unexpected keyword argument"),
        (
            ('SegOutput(logits, {"decoder": image}) if return_features else logits', "logits"),
            "must return networks.SegOutput",
        ),
        (
            ("nn.Conv3d(in_channels, num_classes", "nn.Conv3d(in_channels, 7"),
            r"have the shape \(1, 7, 8, 8, 8\)",
        ),
        (("padding=kernel // 2", "padding=0"), r"have the shape \(1, 3, 6, 6, 6\)"),
        (("self.feature_channels = ", "self.channels = "), "lacks `feature_channels`"),
        (
            ('{"decoder": in_channels}', '{"stage1": 4}'),
            r"\{'decoder': 2\}, but feature_channels says \{'stage1': 4\}",
        ),
    ],
)
def test_a_network_must_keep_its_promises(tmp_path, change, expected):
    assert change[0] in STUDENT
    (tmp_path / "net.py").write_text(STUDENT.replace(*change))
    plugins.plug_in(given(student="net.py:OneConvolution"), CONTRACTS)
    with pytest.raises((ValueError, TypeError), match=expected):
        check_network("OneConvolution", 2, 3, (8, 8, 8))


def test_arguments_may_have_any_name(tmp_path):
    """Also those that the functions of the registries have for themselves."""
    own = "name: str = 'x', size: int = 3, batch: int = 0, arguments: int = 0"
    (tmp_path / "net.py").write_text(STUDENT.replace("kernel: int = 3", f"kernel: int = 3, {own}"))
    given_here = given(student="net.py:OneConvolution")
    plugins.plug_in(given_here, CONTRACTS)
    arguments = {"name": "y", "size": 1, "batch": 2, "arguments": 3}
    how = plugins.trial(NETWORKS["OneConvolution"], (16, 16, 16), 4)
    assert check_network("OneConvolution", 2, 3, *how, **arguments) == {"decoder": 2}

    class Loss(nn.Module):
        def __init__(self, name, **others):
            super().__init__()
            self.name = name

    KD_METHODS["Loss"] = SSL_METHODS["Loss"] = Loss
    try:
        assert build_kd("Loss", {}, {}, 2, name="mine").name == "mine"
        SSL_METHODS["Loss"] = lambda make_network, max_steps, preset, name: name
        assert build_method("Loss", None, max_steps=1, name="mine") == "mine"
    finally:
        del KD_METHODS["Loss"], SSL_METHODS["Loss"]


def test_no_loss_is_called_as_the_training_without_one(tmp_path):
    (tmp_path / "loss.py").write_text("from torch import nn\nclass supervised(nn.Module): pass\n")
    contract = {"method": plugins.distillation(KD_METHODS)}
    with pytest.raises(ConfigError, match="'supervised' is the name of a built-in one"):
        plugins.plug_in(given(method="loss.py:supervised"), contract)


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_ours_keep_theirs(name):
    size = (32,) * getattr(NETWORKS[name], "dims", 3)
    assert check_network(name, 1, 3) == check_network(name, 1, 3, size, 2)


# Checkpoints


def stored(sha256, roles=("student",)):
    return {
        "plugins": {"OneConvolution": {"file": "net.py", "sha256": sha256, "roles": list(roles)}}
    }


PAIR = (plugins.network(NETWORKS), plugins.data_format(DATASETS, Dataset))
DIGEST = hashlib.sha256(STUDENT.encode()).hexdigest()


def test_a_test_needs_the_class_named_and_unchanged(tmp_path):
    (tmp_path / "net.py").write_text(STUDENT)
    named = ["net.py:OneConvolution"]
    with pytest.raises(CheckpointError, match=r"say so: --plugin net\.py:OneConvolution"):
        plugins.plug_in_for(stored(DIGEST), "best.pt", [], PAIR, False)
    assert "OneConvolution" not in NETWORKS
    plugins.plug_in_for(stored(DIGEST), "best.pt", named, PAIR, False)
    assert "OneConvolution" in NETWORKS
    with pytest.raises(
        CheckpointError, match=r"has changed since it was trained .*--allow-changed-plugin"
    ):
        plugins.plug_in_for(stored("0" * 64), "best.pt", named, PAIR, False)
    plugins.plug_in_for(stored("0" * 64), "best.pt", named, PAIR, True)
    for checkpoint in ({}, stored(DIGEST, ["teacher"]), stored(DIGEST, ["method"])):
        plugins.plug_in_for(checkpoint, "best.pt", [], PAIR, False)  # the student alone is tested
        with pytest.raises(ConfigError, match=r"nothing that best.pt needs"):
            plugins.plug_in_for(checkpoint, "best.pt", named, PAIR, False)


def test_same_sources():
    mine, other = stored("1" * 64)["plugins"], stored("2" * 64)["plugins"]
    plugins.check_same(mine, mine, "run")
    plugins.check_same({}, {}, "run")
    plugins.check_same(mine, other, "run", names=["resunet"])
    with pytest.raises(
        CheckpointError,
        match=r"source of OneConvolution has changed since .sha256 1{12} then, 2{12}",
    ):
        plugins.check_same(mine, other, "run")
    for before, after in ((mine, {}), ({}, mine)):
        with pytest.raises(CheckpointError, match="'OneConvolution' was"):
            plugins.check_same(before, after, "run")


def test_training_resuming_and_testing(tmp_path):
    workspace = make_workspace(tmp_path)
    flags = ("--method", "supervised", "--student", "net.py:OneConvolution")
    opts = ("--opts", "network_args={OneConvolution: {kernel: 1}}")
    (workspace / "net.py").write_text(STUDENT)
    train(*flags, *opts, "max_steps=2", cwd=workspace)
    folder = workspace / "runs/tiny/supervised/OneConvolution/seed0"
    state = load_checkpoint(folder / "last.pt")
    assert state["plugins"]["OneConvolution"]["sha256"] == DIGEST
    assert state["network"]["name"] == "OneConvolution" and state["network"]["arguments"] == {
        "kernel": 1
    }
    assert torch.isfinite(state["weights"]["conv.weight"]).all()

    train(*flags, "--resume", *opts, cwd=workspace)
    assert load_checkpoint(folder / "last.pt")["step"] == 4
    test = ("test_3d.py", "--ckpt", str(folder / "best.pt"), "--no-predictions")
    marker = workspace / "it ran"
    refused = run(*test, cwd=workspace, ok=False)
    assert refused.returncode == 1 and "--plugin net.py:OneConvolution" in refused.stderr
    run(*test, "--plugin", "net.py:OneConvolution", cwd=workspace)
    assert (folder / "summary.json").is_file()

    (workspace / "net.py").write_text(f"open({str(marker)!r}, 'w')\n{STUDENT}")
    assert run(*test, cwd=workspace, ok=False).returncode == 1
    assert not marker.exists()  # nobody named it
    changed = run(*test, "--plugin", "net.py:OneConvolution", cwd=workspace, ok=False)
    assert changed.returncode == 1 and "--allow-changed-plugin" in changed.stderr
    again = train(*flags, "--resume", *opts, "max_steps=6", cwd=workspace, ok=False)
    assert (
        again.returncode == 1 and "the source of OneConvolution has changed since" in again.stderr
    )
