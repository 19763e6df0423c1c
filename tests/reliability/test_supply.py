"""What is installed: exact versions, archives with known hashes, free licences at run time, no
unsafe YAML loader.

Known vulnerabilities need a network that a test has not: docs/reliability.md names the command.
"""

import ast
import importlib.metadata
import json
import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tools import lock

ROOT = Path(__file__).resolve().parents[2]
# Of requirements.txt, what only tests and benchmarks import: MedPy (GPL) is an oracle of the
# metrics.
TEST_ONLY = {"medpy"}
FREE = re.compile(
    r"\b(MIT|BSD|Apache|PSF|Python Software Foundation|MPL|Mozilla|ISC|HPND|0BSD|Unlicense)\b"
)
GPL = re.compile(r"(?<!L)(?<!Lesser )\b(A?GPL|GNU (Affero )?General Public)", re.IGNORECASE)


def requirements(name):
    """The requirements that a file states itself or includes."""
    found = {}
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        line = line.partition("#")[0].strip()
        if line.startswith("-r"):
            found |= requirements(line[2:].strip())
        elif line:
            requirement = Requirement(line)
            found[lock.normalised(requirement.name)] = requirement
    return found


def closure(names):
    """Normalised names of installed distributions that `names` need, themselves included."""
    waiting, seen = list(names), set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for text in importlib.metadata.requires(name) or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(lock.normalised(requirement.name))
    return seen


def test_every_requirement_is_pinned_to_one_version():
    files = lock.requirement_files()
    assert ROOT / "requirements.txt" in files and ROOT / "requirements-dev.txt" in files
    for file in files:
        for name, requirement in requirements(file.name).items():
            assert re.fullmatch(r"==[\w.]+", str(requirement.specifier)), (
                f"{file.name}: {name} is not pinned"
            )


def test_the_lock_has_everything_that_the_requirements_bring_in():
    locked = lock.read_lock(lock.LOCK.read_text(encoding="utf-8"))
    for file in lock.requirement_files():
        for name, requirement in requirements(file.name).items():
            assert name in locked, f"{name} of {file.name} is not locked; run: python tools/lock.py"
            assert locked[name].version == str(requirement.specifier)[2:], (
                f"{name}; run: python tools/lock.py"
            )
    # CUDA libraries come with some builds of PyTorch only.
    installed = closure(requirements("requirements-dev.txt"))
    needed = {name for name in installed if not re.match("nvidia|cuda|triton", name)}
    assert needed <= set(locked), f"not locked: {needed - set(locked)}; run: python tools/lock.py"
    assert all(package.sha256 for name, package in locked.items() if name not in lock.BUILDS)


def test_installed_versions_are_those_of_the_lock():
    locked = lock.read_lock(lock.LOCK.read_text(encoding="utf-8"))
    for name in closure(requirements("requirements-dev.txt")) & set(locked):
        assert importlib.metadata.version(name).partition("+")[0] == locked[name].version, name


def report(*packages):
    def item(name, version, digest):
        source = {
            "url": f"https://host/x/{name}-{version}.whl",
            "archive_info": {"hashes": {"sha256": digest}},
        }
        return {"metadata": {"name": name, "version": version}, "download_info": source}

    return {"install": [item(*package) for package in packages]}


def test_another_archive_version_or_hash_is_found(tmp_path, monkeypatch, capsys):
    good, bad = "a" * 64, "b" * 64
    packages = lock.read_report(report(("Typing_Ext", "1.0", good), ("torch", "2.13.0+cpu", good)))
    text = lock.written(packages)
    assert lock.read_lock(text) == packages and packages["torch"] == ("2.13.0", "", "")
    assert packages["typing-ext"] == ("1.0", "Typing_Ext-1.0.whl", good)
    monkeypatch.setattr(lock, "LOCK", tmp_path / "lock.txt")
    lock.LOCK.write_text(text)

    def verify(*found):
        (tmp_path / "report.json").write_text(json.dumps(report(*found)))
        monkeypatch.setattr(sys, "argv", ["lock.py", "--verify", str(tmp_path / "report.json")])
        return lock.main(), capsys.readouterr()

    code, shown = verify(
        ("Typing_Ext", "1.0", good), ("torch", "2.13.0+cu130", bad), ("nvidia-x", "1", good)
    )
    assert (
        code == 0
        and "1 archives verified" in shown.out
        and "not in lock.txt: nvidia-x" in shown.out
    )
    code, shown = verify(("Typing_Ext", "1.0", bad))
    assert code == 1 and "Typing_Ext-1.0.whl: sha256 bbb" in shown.err
    code, shown = verify(("Typing_Ext", "1.1", good))
    assert code == 1 and "version 1.1, locked 1.0" in shown.err
    with pytest.raises(ValueError, match="cannot read the line"):
        lock.read_lock("numpy>=2\n")


def test_installing_uses_and_verifies_the_lock():
    text = (ROOT / "scripts/setup.sh").read_text(encoding="utf-8")
    assert "LOCK=${LOCK-requirements-lock.txt}" in text and '-c "$LOCK"' in text
    assert "tools/lock.py --verify" in text and "touch .venv/refused" in text


# Licences


def licences(name):
    """What a distribution's metadata say about its licence; long texts are cut to their head."""
    metadata = importlib.metadata.metadata(name)
    classifiers = [
        line for line in metadata.get_all("Classifier") or () if line.startswith("License")
    ]
    stated = [metadata.get("License-Expression") or "", (metadata.get("License") or "")[:200]]
    return " | ".join([*stated, *classifiers])


def test_what_runs_is_free_of_the_gpl():
    runtime = closure(set(requirements("requirements.txt")) - TEST_ONLY)
    assert {"torch", "monai", "numpy"} <= runtime
    unknown = {name: licences(name) for name in runtime if not FREE.search(licences(name))}
    assert not unknown, f"no known licence: {unknown}"
    copyleft = {name: licences(name) for name in runtime if GPL.search(licences(name))}
    assert not copyleft, f"GPL at run time: {copyleft}"


def test_the_search_for_the_gpl_finds_it():
    assert GPL.search(licences("medpy"))
    for text in ("GPL-3.0-or-later", "AGPLv3", "GNU General Public License v3 (GPLv3)"):
        assert GPL.search(text)
    for text in ("LGPL-2.1", "GNU Lesser General Public License"):
        assert not GPL.search(text)


def sources():
    """Every Python file but those of tests and benchmarks."""
    folders = ("tests", "benchmarks", ".venv", "data", "runs")
    return [
        path
        for path in sorted(ROOT.rglob("*.py"))
        if path.relative_to(ROOT).parts[0] not in folders
    ]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]


def test_no_module_outside_tests_and_benchmarks_imports_what_is_for_tests_only():
    files = sources()
    assert ROOT / "metrics.py" in files and ROOT / "tools/lock.py" in files
    for path in files:
        assert not {name.lower() for name in imported(path)} & TEST_ONLY, path.relative_to(ROOT)


def test_yaml_is_only_loaded_safely():
    """`yaml.load` at one place, with a subclass of SafeLoader; everywhere else `yaml.safe_load`."""
    found = []
    for path in (
        *sources(),
        *sorted((ROOT / "tests").rglob("*.py")),
        *sorted((ROOT / "benchmarks").rglob("*.py")),
    ):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "yaml":
                assert not {alias.name for alias in node.names} & {
                    "load",
                    "load_all",
                    "unsafe_load",
                    "full_load",
                }, path
            of_yaml = isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "yaml"
            if of_yaml and "load" in node.attr.lower():
                assert node.attr in ("safe_load", "safe_load_all", "load", "SafeLoader"), (
                    f"{path}: yaml.{node.attr}"
                )
                if node.attr == "load":
                    found.append(path.relative_to(ROOT).as_posix())
    assert found == ["utils/config.py"]
    from utils.config import _UniqueKeyLoader

    assert any(base.__name__ == "SafeLoader" for base in _UniqueKeyLoader.__mro__)
