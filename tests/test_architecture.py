"""The direction of imports, and calls that the source tree does without. Read with ast: nothing is
imported.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Which of ours a library may import beside its own folder, the lower layers first; scripts, tools,
# benchmarks and tests may import everything.
ALLOWED = {
    "utils": set(),
    "networks": {"utils"},
    "dataloaders": {"utils"},
    "metrics": {"utils"},
    "inference": {"utils"},
    "losses": {"utils"},
    "methods": {"losses", "utils"},
    "reporting": {"dataloaders", "inference", "metrics", "networks", "utils"},
}
# What training scripts need beside their loops: keys, a trial of them, data, teacher. Libraries do
# not import these files.
BESIDE_LOOPS = {
    "utils/distillation.py": {"dataloaders", "losses", "methods", "networks"},
    "utils/few_labels.py": {"dataloaders", "losses", "methods", "networks"},
    "utils/disagreement.py": {"dataloaders", "metrics", "networks"},
}
SCRIPT_FOLDERS = ("scripts", "tools", "benchmarks")


def library_files():
    for name in ALLOWED:
        path = ROOT / name
        yield from ((name, file) for file in sorted(path.rglob("*.py")) if path.is_dir())
        if path.with_suffix(".py").is_file():
            yield name, path.with_suffix(".py")


def source_files():
    folders = [ROOT / name for name in (*ALLOWED, *SCRIPT_FOLDERS)]
    return [
        *sorted(ROOT.glob("*.py")),
        *(file for folder in folders for file in sorted(folder.rglob("*.py"))),
    ]


def parsed(file):
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def imported_in_full(tree):
    """All modules imported anywhere in a file, also inside functions, and what is taken of them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported(tree):
    """Their top-level names."""
    for name in imported_in_full(tree):
        yield name.split(".")[0]


def calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = node.func
            name = (
                function.attr
                if isinstance(function, ast.Attribute)
                else getattr(function, "id", "")
            )
            yield node, name, {keyword.arg: keyword.value for keyword in node.keywords}


def ids(value):
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else str(value)


def test_the_checks_see_the_tree():
    names = {name for name, _ in library_files()}
    assert {"losses", "networks", "dataloaders", "metrics", "inference", "utils"} <= names
    assert (
        ROOT / "train_3d_distill.py" in source_files()
        and ROOT / "losses" / "acf_bckd.py" in source_files()
    )


@pytest.mark.parametrize("library, file", list(library_files()), ids=ids)
def test_libraries_import_nothing_else_of_ours(library, file):
    ours = (
        {path.stem for path in ROOT.glob("*.py")} | set(ALLOWED) | set(SCRIPT_FOLDERS) | {"tests"}
    )
    name = file.relative_to(ROOT).as_posix()
    allowed = {library} | ALLOWED[library] | BESIDE_LOOPS.get(name, set())
    foreign = set(imported(parsed(file))) & ours - allowed
    assert not foreign, f"{name} imports {foreign}"


@pytest.mark.parametrize("library, file", list(library_files()), ids=ids)
def test_libraries_do_not_import_what_stands_beside_the_loops(library, file):
    above = {name.removesuffix(".py").replace("/", ".") for name in BESIDE_LOOPS}
    found = set(imported_in_full(parsed(file))) & above
    assert not found, f"{file.relative_to(ROOT)} imports {found}"


@pytest.mark.parametrize("library, file", list(library_files()), ids=ids)
def test_libraries_do_not_parse_arguments(library, file):
    """But for the one place that does it for the three training scripts."""
    parses = "argparse" in set(imported(parsed(file)))
    assert parses == (file == ROOT / "utils/config.py")


@pytest.mark.parametrize("file", source_files(), ids=ids)
def test_avoided_calls(file):
    tree = parsed(file)
    safe = {"SafeLoader", "CSafeLoader"} | {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and any(
            getattr(base, "attr", getattr(base, "id", "")) in ("SafeLoader", "CSafeLoader")
            for base in node.bases
        )
    }
    for node in ast.walk(tree):
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), (
            f"line {node.lineno}: a bare except"
        )
    for node, name, keywords in calls(tree):
        assert name != "cuda", f"line {node.lineno}: .cuda() instead of .to(device)"
        off = {
            key
            for key, value in keywords.items()
            if isinstance(value, ast.Constant) and value.value is False
        }
        if name in ("load", "load_state_dict"):
            assert not off & {"strict", "weights_only"}, (
                f"line {node.lineno}: {name} with a check switched off"
            )
        module = getattr(getattr(node.func, "value", None), "id", "")
        if (module, name) == ("torch", "load"):
            assert "weights_only" in keywords, (
                f"line {node.lineno}: torch.load without weights_only=True"
            )
        if module == "yaml":
            assert name not in ("unsafe_load", "full_load", "unsafe_load_all", "full_load_all")
            if name in ("load", "load_all"):
                loader = keywords.get("Loader", node.args[1] if len(node.args) > 1 else None)
                assert getattr(loader, "attr", getattr(loader, "id", "")) in safe, (
                    f"line {node.lineno}: unsafe yaml"
                )
