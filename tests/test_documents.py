"""The documents keep their word: their commands run, their links lead somewhere, their tables are
those of the code.

The fenced `sh` blocks of every document are run by a shell in a workspace of phantoms. `python` is
there a small script that hands its arguments to this process, so that no interpreter is started;
what makes a command small enough is in the tables below, and nothing else is changed. What is not
run is in NOT_RUN, with the reason. A `python` block that begins with `# name.py` is a file that the
document asks its reader to save.
"""

import ast
import contextlib
import dataclasses
import functools
import importlib
import inspect
import io
import itertools
import json
import os
import re
import runpy
import select
import shlex
import shutil
import stat
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import nibabel as nib
import numpy as np
import pytest
import torch
import torch.distributed.run
import yaml

import train_2d_crkd
import train_3d_crkd
import train_3d_distill
from losses import KD_METHODS
from methods import SSL_METHODS
from networks import NETWORKS, build_network
from tests.networks.test_monai_bundle import UNET, write_bundle
from tests.nnunet_folders import make_plans, plan_arguments, write_results
from tests.scripts.conftest import Result, make_workspace
from tests.scripts.conftest import run as run_script
from tests.tools.releases import write_patient, write_scan
from utils.run import RESUMABLE

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(
    [
        ROOT / "README.md",
        ROOT / "RESULTS.md",
        ROOT / "results/NOTES.md",
        *(ROOT / "docs").glob("*.md"),
    ]
)
TRAINING = ("train_3d_distill.py", "train_2d_crkd.py", "train_3d_crkd.py")
TESTING = ("test_3d.py", "test_2d.py")

# --- what makes a command small ---

# KEY=VALUE settings that every training gets after its own.
SETTINGS = ["max_steps=1", "val_interval=1", "log_interval=1", "workers=0"]
# Sides of a patch, where a command asks for its own.
PATCH = {
    "train_3d_distill.py": "[16,16,16]",
    "train_2d_crkd.py": "[32,32]",
    "train_3d_crkd.py": "[16,16,16]",
}
# Flags whose values are replaced, by script (and, for generated data, by data set).
VALUES: dict[str, dict[str, list[str]]] = {
    "tools/make_splits.py": {"--counts": ["3", "1", "1"], "--val": ["3"]},
    "tools/new_config.py": {"--labelled": ["2"]},
    "tools/make_demo_data.py btcv": {"--cases": ["4"], "--shape": ["24", "20", "16"]},
    "tools/make_demo_data.py word": {"--cases": ["4"], "--shape": ["24", "20", "16"]},
    "tools/make_demo_data.py brats21": {"--cases": ["6"], "--shape": ["24", "24", "24"]},
    "tools/make_demo_data.py acdc": {"--cases": ["16"], "--shape": ["32", "32"]},
    "tools/make_demo_data.py la": {"--cases": ["12"], "--shape": ["24", "24", "20"]},
    "tools/make_demo_data.py kvasir": {"--cases": ["30"], "--shape": ["32", "32"]},
    "tools/make_demo_data.py isic2018": {"--cases": ["30"], "--shape": ["32", "32"]},
}
# Keys of the configurations, in the workspace's copies.
WIDTHS = {
    "resunet": {"channels": [4, 4, 8, 8]},
    "segresnet": {"init_filters": 4},
    "unet": {"channels": [2, 4, 4, 8]},
    "espnetv2": {"channels": [16, 32, 48, 64]},
    "mobile_unet": {"width": 0.25},
    "lcovnet": {"channels": [4, 6, 8, 12, 16]},
    "unet2d": {"channels": [4, 4, 8, 8, 8]},
    "vnet": {"n_filters": 4},
    "vnet_dual": {"n_filters": 4},
    "vnet_lefed": {"n_filters": 4},
}
NARROW = {"network_args": WIDTHS}
NIFTI = {
    "patch_size": [16, 16, 16],
    "spacing": [2.0, 2.0, 2.0],
    "crops_per_case": 2,
    "overlap": 0.0,
    **NARROW,
}
PHANTOM_CT = NIFTI | {"spacing": [12.0, 12.0, 14.0]}
SLICES = {"patch_size": [32, 32], "labelled_batch": 2, "unlabelled_batch": 2, **NARROW}
VOLUMES = {"patch_size": [16, 16, 16], "stride": [16, 16, 16], "val_stride": [16, 16, 16], **NARROW}
OWN_LISTS = {"split_dir": ""}  # of the JSON
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "btcv": NIFTI,
    "hippocampus": NIFTI,
    "mouse_brain": NIFTI,
    "word": NIFTI,
    "spleen": NIFTI | OWN_LISTS,
    "pancreas": NIFTI | OWN_LISTS,
    "brats21": {"patch_size": [16, 16, 16], **NARROW, **OWN_LISTS},
    "demo_btcv": PHANTOM_CT,
    "demo_word": PHANTOM_CT,
    "demo_brats21": {"patch_size": [16, 16, 16], **NARROW},
    "acdc": SLICES | {"split_dir": "data/ACDC/splits"},
    "demo_acdc": SLICES,
    "isic2018": SLICES | {"split_dir": "splits/isic2018_phantom"},
    "demo_isic2018": SLICES,
    "demo_kvasir": SLICES,
    "kvasir": SLICES | {"split_dir": "splits/kvasir_phantom"},
    "la": VOLUMES | {"split_dir": "data/LA/splits"},
    "demo_la": VOLUMES,
    "acdc_small": SLICES | {"split_dir": "data/ACDC/splits"},
    "la_small": VOLUMES | {"split_dir": "data/LA/splits"},
    "la_medium": VOLUMES | {"split_dir": "data/LA/splits"},
}
# What a block gets in its environment, by document: RESULTS.md trains every cell and every trial of
# the ablation.
ENVIRONMENT = {
    "RESULTS.md": {
        "ONLY": "default|joint",
        "PARTS": "teachers methods",
        "METHODS": "kd",
        "SEEDS": "0",
        "TEACHERS": "resunet",
    }
}
NOT_RUN = {
    "tools/evidence.py collect": (
        "refuses phantoms beside the real cases of results/; has a test of its own"
    ),
    "scripts/test.sh": "runs the tests, this one too",
    "scripts/test_reliability.sh": "runs tests",
    "scripts/bench.sh": "takes half an hour; every benchmark has a test of its own",
    "benchmarks/data_speed.py": "a measurement, with a test of its own",
    "-m venv": "makes an environment",
    "-m pip": "installs",
    "-m pytest": "runs tests",
    "tensorboard": "a server",
    "nnUNetv2_predict": "nnU-Net's; tests/test_nnunet.py runs both",
    "nnUNetv2_predict_from_modelfolder": "nnU-Net's",
}


# Files that documents name and programs write.
WRITTEN = {"config.yaml", "configs/mine.yaml", "configs/small_liver.yaml", "model_card.md"}
# Flags that documents name in prose and that are those of torchrun, pip and nnU-Net.
FOREIGN_FLAGS = {"--nproc_per_node", "--standalone", "--require-hashes", "--disable_tta"}


# --- reading ---


def blocks(document: Path, language: str) -> Iterator[tuple[int, str]]:
    """(line number, text) of the fenced code blocks of a language."""
    lines = document.read_text(encoding="utf-8").splitlines()
    start, kind, margin = None, "", 0
    for number, line in enumerate(lines):
        fence = re.match(r"( *)```(\S*)", line)
        if fence and start is None:
            start, kind, margin = number + 1, fence[2], len(fence[1])
        elif fence:
            if kind == language:
                yield start + 1, "\n".join(text[margin:] for text in lines[start:number]) + "\n"
            start = None
    assert start is None, f"{document.name}: a code block is not closed"


def saved_files(document: Path) -> dict[str, str]:
    """Name -> content of the files that a document has its reader save."""
    found = {}
    for _, text in blocks(document, "python"):
        if name := re.match(r"# (\w+\.py)\n", text):
            found[name[1]] = text
    return found


def prose(document: Path) -> str:
    """The text outside of code blocks."""
    return re.sub(r"^ *```.*?^ *```", "", document.read_text(encoding="utf-8"), flags=re.S | re.M)


def ids(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


COMMANDS = {
    f"{ids(document)}:{line}": text
    for document in DOCUMENTS
    for line, text in blocks(document, "sh")
}


@functools.cache
def tree() -> frozenset[str]:
    """The files of the repository, as a user sees them."""
    hidden = {"data", "runs", "cache", "__pycache__"}
    found = set()
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in hidden and name[0] != "."]
        found |= {(Path(folder) / name).relative_to(ROOT).as_posix() for name in files}
    return frozenset(found)


def slug(heading: str) -> str:
    """GitHub's anchor of a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", lambda m: m[1] or "", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(document: Path) -> set[str]:
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", prose(document), re.M)}


@functools.cache
def flags_of(script: Path) -> frozenset[str]:
    """The flags that a Python script's parser or a shell script's `case` knows, most of them read
    off its source.
    """
    if script.name in (*TRAINING, "test_2d.py", "test_3d.py"):
        options = importlib.import_module(script.stem).FLAGS._option_string_actions
        return frozenset(name for name in options if name.startswith("--"))
    text = script.read_text(encoding="utf-8")
    if script.suffix == ".sh":
        return frozenset(re.findall(r"^ *(--[a-z-]+)\)", text, re.M))
    found = {"--help"}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            names = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
            found |= {name for name in names if isinstance(name, str) and name.startswith("--")}
            optional = any(
                k.arg == "action" and "BooleanOptional" in ast.unparse(k.value)
                for k in node.keywords
            )
            found |= {f"--no-{name[2:]}" for name in names if optional}
    if script.name == "make_splits.py":
        found |= flags_of(script.with_name("make_splits_2d.py"))
    if script.name == "new_config.py":
        text_of_group = script.with_name("nnunet_config.py").read_text(encoding="utf-8")
        found |= set(re.findall(r'^    add\("(--[a-z-]+)"', text_of_group, re.M))
    if "add_plugin_flags(parser)" in text:
        found |= {"--plugin", "--allow-changed-plugin"}
    return frozenset(found)


def scripts() -> list[Path]:
    folders = [
        ROOT,
        ROOT / "tools",
        ROOT / "scripts",
        ROOT / "benchmarks",
        ROOT / "docs" / "figures",
    ]
    return [
        path
        for folder in folders
        for path in sorted(folder.iterdir())
        if path.suffix in (".py", ".sh")
    ]


# --- quick checks ---


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids)
def test_links_lead_somewhere(document):
    text = prose(document)
    for label, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (document.parent / path).resolve() if path else document
        assert found.exists(), f"[{label}]({target}): no such file"
        assert found.is_relative_to(ROOT), f"[{label}]({target}): outside of the repository"
        assert not anchor or anchor in anchors(found), f"[{label}]({target}): no such heading"


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids)
def test_files_of_the_tree_exist(document):
    folders = "|".join(
        path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "."
    )
    made = {"data", "runs", "cache"}  # by users
    names = re.findall(
        rf"`((?:(?:{folders})/)?[\w./-]+\.(?:py|md|yaml|sh|cff|toml))[`:]", prose(document)
    )
    for name in names:
        known = any(file == name or file.endswith(f"/{name}") for file in tree())
        mine = (
            name.split("/")[0] in made
            or name.startswith("path/to/")
            or name in saved_files(document)
        )
        assert known or mine or name in WRITTEN, f"{name}: no such file"


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids)
def test_flags_exist(document):
    everything = {flag for script in scripts() for flag in flags_of(script)} | FOREIGN_FLAGS
    for flag in re.findall(r"`(--[a-zA-Z][\w-]*)", prose(document)):
        assert flag in everything, f"{flag}: no script has it"


@pytest.mark.parametrize("place", COMMANDS)
def test_commands_are_shell_and_their_flags_those_of_the_script(place):
    text = COMMANDS[place]
    subprocess.run(["sh", "-n"], input=text, text=True, check=True)
    joined = re.sub(r"\\\n", " ", re.sub(r"<<'(\w+)'\n.*?^\1$", "", text, flags=re.S | re.M))
    for line in joined.splitlines():
        match = re.search(
            r"(?:python|torchrun|sh)[^#\n]*?\s((?:[\w.]+/)*[\w.]+\.(?:py|sh))\s?(.*)", line
        )
        if not match:
            continue
        script, rest = ROOT / match[1], match[2].split(" #")[0]
        assert script.is_file(), f"{place}: {match[1]}: no such script"
        words = itertools.takewhile(
            lambda word: word not in ("--", "|", "||", "&&", ";"), shlex.split(rest)
        )
        used = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert used <= flags_of(script), (
            f"{place}: {match[1]} has no {', '.join(sorted(used - flags_of(script)))}"
        )


@pytest.mark.parametrize(
    "script, document",
    [
        *((script, "docs/training.md") for script in TRAINING),
        ("test_2d.py", "docs/testing.md"),
        ("test_3d.py", "docs/testing.md"),
    ],
)
def test_every_flag_is_described(script, document):
    missing = (
        flags_of(ROOT / script) - {"--help"} - set(re.findall(r"--[\w-]+", prose(ROOT / document)))
    )
    assert not missing, f"{document} does not describe {', '.join(sorted(missing))} of {script}"


def test_every_key_is_described():
    text = prose(ROOT / "docs/training.md").partition("## Keys")[2].partition("## Run folder")[0]
    rows = [row.split("|")[1] for row in text.splitlines() if row.startswith("| `")]
    described = {key for row in rows for key in re.findall(r"`(\w+)`", row)}
    modules = (train_3d_distill, train_2d_crkd, train_3d_crkd)
    keys = {field.name for module in modules for field in dataclasses.fields(module.Config)}
    assert described == keys


def test_keys_that_may_differ_when_a_run_is_resumed():
    stated = re.search(r"These may differ: `([^`]*)`", prose(ROOT / "docs/training.md"))[1]
    assert set(stated.split()) == RESUMABLE


def test_arguments_and_defaults_of_methods():
    text = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    lines = re.findall(r"- Arguments \(`(\w+)`\): `(.*)`$", text, re.M)
    stated = {name: yaml.safe_load(arguments) for name, arguments in lines}
    assert stated.keys() == KD_METHODS.keys() | SSL_METHODS.keys()
    given = {"self", "preset", "student_channels", "teacher_channels", "num_classes", "multilabel"}
    given |= {"make_network", "max_steps"}
    for name, cls in (KD_METHODS | SSL_METHODS).items():
        parameters = inspect.signature(cls).parameters.values()
        actual = {p.name: p.default for p in parameters if p.name not in given}
        actual = {
            key: list(value) if isinstance(value, tuple) else value for key, value in actual.items()
        }
        assert stated[name] == actual, name
    for name, cls in (KD_METHODS | SSL_METHODS | NETWORKS).items():
        assert f"../{cls.__module__.replace('.', '/')}.py)" in text, (
            f"{name}: its file is not linked"
        )


def test_networks_are_described():
    text = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \|(.*)$", text.partition("## Networks")[2], re.M))
    assert rows.keys() == NETWORKS.keys()
    classes = {"unet2d": (1, 4), "vnet": (1, 2), "vnet_dual": (1, 2), "vnet_lefed": (1, 2)}
    for name, row in rows.items():
        with torch.device("meta"):  # sizes without weights
            network = build_network(name, *classes.get(name, (1, 14)))
        count, stride = sum(p.numel() for p in network.parameters()), NETWORKS[name].stride
        assert f"| {count:,}" in row and f"| {stride} |" in row, name


def test_documents_are_found_from_the_readme():
    linked = set(
        re.findall(r"\]\((docs/[\w.]+\.md)", (ROOT / "README.md").read_text(encoding="utf-8"))
    )
    assert linked == {ids(document) for document in DOCUMENTS if document.parent == ROOT / "docs"}


def test_citation():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {
        "cff-version",
        "title",
        "message",
        "type",
        "license",
        "authors",
        "references",
    } <= citation.keys()
    assert citation["license"] == "Apache-2.0" and citation["type"] == "software"
    for entry in [citation, *citation["references"]]:
        assert entry["title"] and all(
            author.get("name") or author.get("family-names") for author in entry["authors"]
        )
        assert entry is citation or entry["type"] in (
            "article",
            "conference-paper",
            "software",
            "dataset",
        )


# --- running the commands ---

PYTHON = r"""#!/bin/sh
# Hands its arguments to the test process and shows what comes back.
[ "$1" != - ] || cat > "$SERVER/stdin"
printf '%s\0' "$#" "$PWD" "$(basename "$0")" "$@" > "$SERVER/request"
read -r code < "$SERVER/reply"
cat "$SERVER/out"
cat "$SERVER/err" >&2
exit "$code"
"""
# scripts/setup.sh without the part that installs
SETUP = 'cd "$(dirname "$0")/.." || exit 1\npython=.venv/bin/python\n'
SLURM = {
    "scontrol": "#!/bin/sh\necho node0\n",
    "srun": '#!/bin/sh\nexec "$@"\n',
    "sbatch": "#!/bin/sh\necho 7\n",  # tests/scripts/test_table_kd.py runs the tasks
}


class Workspace:
    """A folder with small configurations and phantoms where the documents expect data, and a shell
    in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.document = folder, ""
        # run folder -> document and command that made it
        self.owner: dict[Path, tuple[str, tuple[str, ...]]] = {}
        self.server = folder / "server"
        for name in ("server", "bin", "configs", ".venv/bin"):
            (folder / name).mkdir(parents=True)
        for fifo in ("request", "reply"):
            os.mkfifo(self.server / fifo)
        for name, text in {
            "python": PYTHON,
            "torchrun": PYTHON,
            "tensorboard": PYTHON,
            "nnUNetv2_predict": PYTHON,
            "nnUNetv2_predict_from_modelfolder": PYTHON,
            **SLURM,
        }.items():
            _executable(folder / "bin" / name, text)
        _executable(folder / ".venv/bin/python", PYTHON)
        for path in ROOT.glob("requirements*.txt"):
            shutil.copy(path, folder)
        shutil.copytree(ROOT / "scripts", folder / "scripts")
        shutil.copytree(ROOT / "results", folder / "results")
        shutil.copy(ROOT / "RESULTS.md", folder)
        (folder / "scripts/setup.sh").write_text(SETUP)
        for name in NOT_RUN:
            if (folder / name).is_file():
                (folder / name).write_text("exit 0\n")
        for path in (ROOT / "configs").glob("*.yaml"):
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
            overlay = {
                key: value
                for key, value in CONFIGURATIONS[path.stem].items()
                if self._takes(content, key)
            }
            first = int(content.get("format") != "brats")
            overlay["absent_classes"] = content["class_names"][first:]  # tiny data lack most organs
            (folder / "configs" / path.name).write_text(
                _as_yaml(path.read_text(encoding="utf-8"), content | overlay)
            )
        self._make_data()

    @staticmethod
    def _takes(content: dict, key: str) -> bool:
        return not (key == "spacing" and content.get("format") == "brats")

    def _make_data(self) -> None:
        """Every data set at its place: balls and boxes in NIfTI, and what tools/make_demo_data.py
        generates.
        """
        data, tiny = self.folder / "data", make_workspace(self.folder / "tiny") / "data"
        for root, datalist in (
            ("WORD", "dataset.json"),
            ("Task04_Hippocampus", "dataset.json"),
            ("Task09_Spleen", "dataset.json"),
            ("Task07_Pancreas", "dataset.json"),
            ("mine", "dataset.json"),
        ):
            shutil.copytree(tiny, data / root)
            (data / root / "dataset_0.json").rename(data / root / datalist)
        mine = data / "mine/dataset.json"
        described = {
            "modality": {"0": "CT"},
            "labels": {"0": "background", "1": "liver", "2": "tumour"},
        }
        mine.write_text(json.dumps(described | json.loads(mine.read_text())))
        for path in (data / "Task09_Spleen/labelsTr").iterdir():  # of two classes
            label = nib.load(path)
            nib.save(
                nib.Nifti1Image((np.asarray(label.dataobj) > 0).astype(np.uint8), label.affine),
                path,
            )
        btcv = data / "synapse_raw"
        for part, name in (("imagesTr", "img"), ("labelsTr", "label")):
            (btcv / part).mkdir(parents=True)
            for number, path in enumerate(sorted((tiny / part).iterdir()), 1):
                shutil.copy(path, btcv / part / f"{name}{number:04d}.nii.gz")
        entries = [
            {"image": f"imagesTr/img{k:04d}.nii.gz", "label": f"labelsTr/label{k:04d}.nii.gz"}
            for k in range(1, 8)
        ]
        (btcv / "dataset_0.json").write_text(json.dumps({"training": entries}))
        lists = {"btcv": ("img{:04d}", "val"), "hippocampus": ("case{}", "test")}
        for name, (pattern, last) in lists.items():
            folder = self.folder / "splits" / name
            folder.mkdir(parents=True)
            for split, numbers in {"train": (1, 2, 3, 4), "val": (5,), last: (6,)}.items():
                (folder / f"{split}.txt").write_text(
                    "".join(pattern.format(k) + "\n" for k in numbers)
                )
        for name in ("acdc", "la", "kvasir", "isic2018"):
            words = ["--dataset", name, "--out", f"data/{name}_phantom"]
            self._run("tools/make_demo_data.py", *words)
        self._run("tools/make_demo_data.py", "--dataset", "brats21", "--out", "data/brats21")
        # The demonstration, made with the same arguments
        self._run("tools/make_demo_data.py", "--dataset", "btcv")
        self._make_releases()
        self._make_photographs()
        shutil.copytree(btcv / "imagesTr", self.folder / "scans")
        shutil.copytree(data / "Kvasir-SEG/images", self.folder / "photos")
        shutil.copytree(data / "Kvasir-SEG", data / "polyps")
        nnunet = data / "Dataset101_Liver"
        for part in ("images", "labels"):
            (nnunet / f"{part}Tr").mkdir(parents=True)
            for path in (tiny / f"{part}Tr").iterdir():
                channel = "_0000" if part == "images" else ""
                shutil.copy(
                    path, nnunet / f"{part}Tr" / path.name.replace(".nii", f"{channel}.nii")
                )
        (nnunet / "dataset.json").write_text(
            json.dumps(
                {
                    "channel_names": {"0": "CT"},
                    "labels": {"background": 0, "liver": 1, "tumour": 2},
                    "file_ending": ".nii.gz",
                    "numTraining": 7,
                }
            )
        )
        write_results(
            self.folder / "nnUNet_results/Dataset101_Liver",
            plan_arguments(),
            make_plans(patch_size=[16, 16, 16], spacing=[2.0, 2.0, 2.0])
            | {"dataset_name": "Dataset101_Liver"},
            folds=("0", "1"),
            labels={"background": 0, "liver": 1, "tumour": 2},
        )
        shutil.copytree(nnunet / "imagesTr", nnunet / "imagesTs")
        for path in sorted((nnunet / "imagesTs").iterdir())[3:]:
            path.unlink()
        for path in sorted((nnunet / "imagesTs").iterdir()):
            path.rename(path.with_name(f"new_{path.name}"))
        defined = UNET | {"out_channels": 2}
        write_bundle(self.folder / "bundles/spleen_ct_segmentation", defined)
        names = [path.name.partition(".")[0] for path in sorted((nnunet / "labelsTr").iterdir())]
        lists = self.folder / "nnUNet_preprocessed/Dataset101_Liver/splits_final.json"
        lists.parent.mkdir(parents=True)
        lists.write_text(json.dumps([{"train": names[1:], "val": names[:1]}] * 2))
        # The released checkpoint of docs/training.md
        network = build_network("resunet", 1, 14, **WIDTHS["resunet"])
        weights = {
            f"segmentor.backbone.{key}": value for key, value in network.state_dict().items()
        }
        torch.save({"state_dict": weights}, self.folder / "best_Dice_81-69_epoch_800.pth")

    def _run(self, script: str, *words: str) -> None:
        result = self.execute(["python", script, *words])
        assert result.returncode == 0, result.stderr

    def _make_releases(self) -> None:
        """ACDC and LA as their challenges hand them out in downloads/, imported into data/."""
        data, downloads = self.folder / "data", self.folder / "downloads"
        for path in sorted((data / "acdc_phantom/data").glob("*_frame01.h5")):
            patient = path.name.split("_")[0]
            frames = {}
            for number, name in ((1, path.name), (9, f"{patient}_frame02.h5")):
                with h5py.File(path.with_name(name)) as file:
                    frames[number] = np.int16(900 * file["image"][()]), file["label"][()]
            write_patient(downloads / "ACDC/training" / patient, 1, 9, frames)
        for path in sorted((data / "la_phantom").glob("*/mri_norm2.h5")):
            with h5py.File(path) as file:
                image = file["image"][()]
                image = np.uint8(255 * (image - image.min()) / (image.max() - image.min()))
                folder = downloads / "LA/Training Set" / path.parent.name
                write_scan(folder, image, file["label"][()])
        for name in ("ACDC", "LA"):
            words = [f"downloads/{name}", "--out", f"data/{name}"]
            self._run("tools/import_release.py", name.lower(), *words)
            shutil.copytree(data / f"{name.lower()}_phantom/splits", data / name / "splits")

    def _make_photographs(self) -> None:
        """ISIC-2018 and Kvasir-SEG as downloaded, with lists elsewhere."""
        data = self.folder / "data"
        isic = (
            "ISIC2018_Task1-2_Training_Input/{}.jpg",
            "ISIC2018_Task1_Training_GroundTruth/{}_segmentation.png",
        )
        for demo, root, (image, mask) in (
            ("kvasir", "Kvasir-SEG", ("images/{}.jpg", "masks/{}.png")),
            ("isic2018", "ISIC2018", isic),
        ):
            for part, name in (("images", image), ("masks", mask)):
                for path in sorted((data / f"{demo}_phantom").glob(f"*/{part}/*")):
                    target = data / root / name.format(path.stem)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(path, target)
            words = ["--data-root", f"data/{root}", "--out", f"splits/{demo}_phantom", "--val", "3"]
            self._run("tools/make_splits.py", "images", *words)
        tests = data / "ISIC2018/ISIC2018_Task1-2_Test_Input"
        tests.mkdir()
        for path in sorted((data / "isic2018_phantom/val/images").iterdir())[:2]:
            shutil.copy(path, tests / f"ISIC_9{path.name[6:]}")

    def shell(self, document: str, text: str) -> tuple[int, str]:
        """Exit status and output of a block run by `sh -e`, whose Python commands this process
        runs.
        """
        self.document = document
        environment = ENVIRONMENT.get(document, {}) | {
            "JOBS": "1",  # one command at a time reaches this process
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "SERVER": str(self.server),
            "SLURM_JOB_ID": "1",
            "SLURM_NNODES": "1",
            "SLURM_JOB_NODELIST": "node0",
        }
        script, log = self.server / "script.sh", self.server / "log"
        script.write_text(text, encoding="utf-8")
        # Open for reading and writing: neither side ever sees an end of file.
        request, reply = (
            os.open(self.server / name, os.O_RDWR | os.O_NONBLOCK) for name in ("request", "reply")
        )
        try:
            with log.open("wb") as output:
                process = subprocess.Popen(
                    ["sh", "-e", str(script)],
                    cwd=self.folder,
                    env=os.environ | environment,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
                received = b""
                while process.poll() is None:
                    if select.select([request], [], [], 0.02)[0]:
                        received += os.read(request, 65536)
                    words = received.decode().split("\0")
                    if len(words) < 4 or len(words) < int(words[0]) + 4:
                        continue
                    received = b""
                    result = self.execute(words[2:-1], Path(words[1]))
                    (self.server / "out").write_text(result.stdout, encoding="utf-8")
                    (self.server / "err").write_text(result.stderr, encoding="utf-8")
                    os.write(reply, f"{result.returncode}\n".encode())
        finally:
            os.close(request)
            os.close(reply)
        return process.returncode, log.read_text(encoding="utf-8")

    def execute(self, words: list[str], directory: Path | None = None) -> Result:
        """Run `python ...` or `torchrun ...` in this process; torchrun's script in one process,
        with its flags checked (tests/scripts/test_distributed.py runs several). directory: where;
        by default the workspace.
        """
        directory = directory or self.folder
        program, *words = words
        if program == "torchrun":
            parsed = torch.distributed.run.get_args_parser().parse_args(words)
            words = [parsed.training_script, *parsed.training_script_args]
        if {program, words[0], " ".join(words[:2])} & NOT_RUN.keys():
            return Result(0, "", "")
        if words[0] == "-m":
            return self._in_process(words[1:], directory)
        if words[0] == "-":
            shutil.copy(self.server / "stdin", self.folder / "stdin.py")
            return run_script(str(self.folder / "stdin.py"), *words[1:], cwd=directory, ok=False)
        script, *arguments = words
        arguments = self._small(script, arguments)
        if "--show-run" not in arguments and self._provide(script, arguments):
            return Result(0, "", "")
        path = next(
            (folder / script for folder in (self.folder, ROOT) if (folder / script).is_file()), None
        )
        if path is None:
            return Result(2, "", f"{script}: no such script\n")
        return run_script(str(path), *arguments, cwd=directory, ok=False)

    @staticmethod
    def _in_process(argv: list[str], directory: Path) -> Result:
        """What `python -m` does with argv, the module first."""
        out, err, code = io.StringIO(), io.StringIO(), 0
        argv_before, before = sys.argv, Path.cwd()
        try:
            os.chdir(directory)
            sys.argv = argv
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except Exception:
            err.write(traceback.format_exc())
            code = 1
        finally:
            os.chdir(before)
            sys.argv = argv_before
        return Result(code, out.getvalue(), err.getvalue())

    def _small(self, script: str, arguments: list[str]) -> list[str]:
        """The arguments with the tables at the head of this file, and on the CPU."""
        table = (
            f"{script} {value_of(arguments, '--dataset')}"
            if script.endswith("make_demo_data.py")
            else script
        )
        replaced = VALUES.get(table, {})
        # faulty data sets have one size
        if script.endswith("make_demo_data.py") and "--corrupt" not in arguments:
            arguments = [*arguments, *(flag for flag in replaced if flag not in arguments)]
        grouped: list[list[str]] = [[]]
        for word in arguments:
            grouped += [[word]] if word.startswith("--") else []
            if not word.startswith("--"):
                grouped[-1].append(word)
        for group in grouped:
            if group and group[0] in replaced and group[1:] != ["0"]:  # none stays none
                group[1:] = replaced[group[0]]
            if group and group[0] == "--device":
                group[1:] = ["cpu"]
        if script in TRAINING:
            options = next((group for group in grouped if group and group[0] == "--opts"), None)
            if options is None:
                grouped.append(options := ["--opts"])
            options[:] = [word for word in options if not word.startswith("device=")] + SETTINGS
            config = self.folder / (value_of(arguments, "--config") or "")
            # if it is there, a document wrote it
            if config.is_file() and "network_args" not in config.read_text(encoding="utf-8"):
                options.append(f"network_args={json.dumps(WIDTHS)}")
            options[:] = [
                f"patch_size={PATCH[script]}" if w.startswith("patch_size=") else w for w in options
            ]
        return [word for group in grouped for word in group]

    def _provide(self, script: str, arguments: Sequence[str]) -> bool:
        """Make what a command relies on; -> whether the command has been run for another document
        already.

        Every document starts without the runs of the others, and follows on its own: what it trains
        twice in one folder is as much of a mistake as it would be for a reader.
        """
        training = script in TRAINING
        if training:
            shown = run_script(script, *arguments, "--show-run", cwd=self.folder, ok=False)
            if shown.returncode:
                return False
            own = Path(shown.stdout.strip())
            document, command = self.owner.get(own, ("", ()))
            if document != self.document:
                if command == (script, *arguments) and (self.folder / own / "last.pt").is_file():
                    return True
                shutil.rmtree(self.folder / own, ignore_errors=True)
            self.owner[own] = self.document, (script, *arguments)
            teacher = value_of(arguments, "--teacher") or "resunet"
            seed = next((a.split("=")[1] for a in arguments if a.startswith("teacher_seed=")), "0")
            distils = value_of(arguments, "--method") != "supervised" and "/" not in teacher
            if script == "train_3d_distill.py" and distils:
                config = Path(value_of(arguments, "--config")).stem
                self._train(Path(f"runs/{config}/supervised/{teacher}/seed{seed}"), tested=False)
        for word in arguments:
            for found in re.findall(r"runs/[\w-]+/[\w-]+/[\w.%-]+/seed[\w.+-]+", word):
                self._train(Path(found), tested=not training and script not in TESTING)
        return False

    def _train(self, run: Path, tested: bool) -> None:
        """Make a run folder that is not there by the command that its name stands for."""
        best = self.folder / run / "best.pt"
        if not best.is_file():
            script, words = self._command_of(run)
            document, self.document = self.document, f"(needed by {self.document})"
            result = self.execute(["python", script, *words])
            self.document = document
            assert result.returncode == 0, result.stderr
            assert best.is_file(), f"{run}: {script} {' '.join(words)} makes another folder"
        if tested and not (self.folder / run / "summary.json").is_file():
            script = (
                "test_2d.py"
                if torch.load(best, weights_only=True)["kind"] == "2d-semi"
                else "test_3d.py"
            )
            result = self.execute(["python", script, "--ckpt", f"{run}/best.pt"])
            assert result.returncode == 0, result.stderr

    def _command_of(self, run: Path) -> tuple[str, list[str]]:
        """Training script and arguments whose run folder this is."""
        _, dataset, method, networks, seed = run.parts
        script = "train_3d_distill.py"
        config = yaml.safe_load(
            (self.folder / f"configs/{dataset}.yaml").read_text(encoding="utf-8")
        )
        words = [
            "--config",
            f"configs/{dataset}.yaml",
            "--method",
            method,
            "--seed",
            re.match(r"seed(\d+)", seed)[1],
        ]
        if "labelled" in config:
            script = "train_3d_crkd.py" if len(config["patch_size"]) == 3 else "train_2d_crkd.py"
            words += ["--labelled", networks.rpartition("-")[2]]
        elif method == "supervised":
            words += ["--student", networks]
        else:
            words += ["--teacher", networks.split("-")[0], "--student", networks.split("-")[1]]
        return script, words


def value_of(arguments: Sequence[str], flag: str) -> str | None:
    """The word after a flag."""
    return next((b for a, b in itertools.pairwise(arguments) if a == flag), None)


def _executable(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def _as_yaml(original: str, content: dict) -> str:
    """The comments at the head and the keys, one a line: shell scripts read some by line."""
    head = "".join(line for line in original.splitlines(True) if line.startswith("#"))
    return head + yaml.safe_dump(content, default_flow_style=None, sort_keys=False, width=10**6)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("documents"))


@pytest.mark.slow
@pytest.mark.parametrize("document", [d for d in DOCUMENTS if any(blocks(d, "sh"))], ids=ids)
def test_commands_run(document, workspace):
    failed = []
    for name, text in saved_files(document).items():
        (workspace.folder / name).write_text(text, encoding="utf-8")
    for line, text in blocks(document, "sh"):
        code, output = workspace.shell(document.name, text)
        if code:
            failed.append(
                f"{ids(document)}, line {line}, exit status {code}:\n{text}\n{output[-1500:]}"
            )
    assert not failed, "\n\n".join(failed)


@pytest.mark.slow
def test_figures_are_drawn_by_their_script(tmp_path):
    run_script("docs/figures/draw.py", "--out", str(tmp_path), cwd=ROOT)
    run_script("tools/evidence.py", "figures", "--out", str(tmp_path), cwd=ROOT)
    for committed in (ROOT / "docs/figures").glob("*.png"):
        assert (tmp_path / committed.name).is_file(), f"{committed.name} is drawn by neither script"
        assert committed.stat().st_size < 2**20
