"""Classes of the user's own: `path/to/file.py:ClassName` wherever the command line names a network,
method or format.

`plug_in` loads the class and puts it into its registry under its own name, so that everything after
it sees a name like any other: run folders, `network_args`, `method_args`. The file is run when the
command line names it, and only then: a configuration from elsewhere cannot make it run, nor can a
checkpoint, which keeps the file's name and the SHA-256 of its source, never the code. To resume,
the source must be the same; to test, the user names the class again with --plugin (`plug_in_for`).
Only the named file is covered by the digest, not what it imports. Walk-throughs: docs/extending.md.
"""

import dataclasses
import difflib
import hashlib
import inspect
import re
import sys
import traceback
import types
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from utils.checkpoint import CheckpointError
from utils.config import ConfigError, Given, from_flag

PREFIX = "plugged_in_"  # of module names, by which a class of the user's own is known
KEYED_BY_NAME = ("network_args", "method_args", "recipe")
# roles that a test needs; the teacher and the method have done their work
TESTED = ("student", "network", "format")


@dataclasses.dataclass(frozen=True)
class Contract:
    """What a class must be to join a registry: its base, the keywords of its constructor, its class
    attributes.
    """

    registry: MutableMapping[str, type]
    base: type
    takes: tuple[str, ...]
    attributes: Mapping[str, type] = dataclasses.field(default_factory=dict)
    example: str = ""
    taken: tuple[str, ...] = ()  # names beside those of the registry that no class may have
    joined: bool = False  # whether a key can name several at once, as in kd+cwd


def network(registry: MutableMapping[str, type]) -> Contract:
    return Contract(
        registry, nn.Module, ("in_channels", "num_classes"), {"stride": int}, "networks/unet.py"
    )


def distillation(registry: MutableMapping[str, type]) -> Contract:
    takes = ("student_channels", "teacher_channels", "num_classes", "multilabel", "preset")
    example, taken = "losses/kd.py", ("supervised",)
    return Contract(registry, nn.Module, takes, example=example, taken=taken, joined=True)


def semi_supervised(registry: MutableMapping[str, type], base: type) -> Contract:
    takes = ("make_network", "max_steps", "preset")
    return Contract(registry, base, takes, {"dimensions": tuple}, "methods/unimatch.py")


def data_format(registry: MutableMapping[str, type], base: type) -> Contract:
    return Contract(
        registry, base, ("root", "split_dir", "class_names"), example="dataloaders/la.py"
    )


def is_reference(name: Any) -> bool:
    """Whether it is meant as a file's class rather than as a name of a registry."""
    return isinstance(name, str) and ".py" in name


def is_plugged_in(cls: type) -> bool:
    """Whether the class came from a file of the user's own."""
    return cls.__module__.startswith(PREFIX)


def trial(cls: type, patch_size: Sequence[int], batch: int) -> tuple[Sequence[int], int]:
    """Size and batch of the images on which `networks.check_network` tries a network: the user's
    own on small ones; ours only where a patch is so small that one voxel may be left of it, which
    norms refuse. No size: on none.
    """
    if is_plugged_in(cls):
        small = 2 * cls.stride * max(1, 4 // cls.stride)
        return tuple(min(side, small) for side in patch_size), min(batch, 2)
    return (tuple(patch_size), batch) if max(patch_size) == cls.stride else ((), 1)


def plug_in(given: Given, contracts: Mapping[str, Contract]) -> dict[str, dict]:
    """Load what the keys of `contracts` refer to and, in place, put the class's name where the
    reference was.

    The references that also head `network_args`, `method_args` or `recipe` become names; those of
    classes that this run has no use for go. Returns, for a checkpoint: class name -> file, sha256
    of the source, roles.
    """
    used: dict[str, dict] = {}
    names: dict[str, str] = {}
    for key, contract in contracts.items():
        reference, source = given.get(key, (None, ""))
        if not is_reference(reference):
            continue
        if not from_flag(given[key]):
            raise ConfigError(
                f"{source}: {key}: '{reference}' is a file to run, which only the command line can "
                "name: "
                f"--opts {key}={reference}"
            )
        parts = _parts(reference, contract)
        for part in filter(is_reference, parts):
            cls, record = load_class(part, contract, f"{source}: {key}")
            name = cls.__name__
            before = used.get(name, record)
            if (before["file"], before["sha256"]) != (record["file"], record["sha256"]):
                files = f"{before['file']} and {record['file']}"
                raise ConfigError(f"{source}: {key}: {files} both have a class {name}; rename one")
            contract.registry[name] = cls
            used[name] = record | {"roles": [*before.get("roles", []), key]}
            names[part] = name
        given[key] = ("+".join(names.get(part, part) for part in parts), source)
    for key in KEYED_BY_NAME:
        value, source = given.get(key, (None, ""))
        if isinstance(value, dict):
            kept = {names.get(name, name): entry for name, entry in value.items()}
            given[key] = (
                {name: entry for name, entry in kept.items() if not is_reference(name)},
                source,
            )
    return used


def _parts(reference: str, contract: Contract) -> list[str]:
    """What a value names: one class, or where the contract has `joined` several, 'kd+my.py:Loss'.
    One whose path has a '+' stays whole.
    """
    parts = reference.split("+")
    names = (*contract.registry, *contract.taken)
    whole = all(part in names or re.search(r"\.py:\w+$", part) for part in parts)
    return parts if contract.joined and whole else [reference]


def load_class(reference: str, contract: Contract, source: str) -> tuple[type, dict]:
    """The class of 'path/to/file.py:ClassName' and its record; ConfigError, beginning with
    `source`, for what is wrong.

    Runs the file.
    """
    file, separator, name = reference.rpartition(":")
    if not separator or not file.endswith(".py") or not name.isidentifier():
        raise ConfigError(f"{source}: '{reference}': expected path/to/file.py:ClassName")
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{source}: {file}: no such file to take {name} from ({error.strerror})"
        ) from error
    digest = hashlib.sha256(content).hexdigest()
    module = _run(file, content, digest, source)
    cls = getattr(module, name, None)
    if not inspect.isclass(cls):
        classes = {key: value for key, value in vars(module).items() if inspect.isclass(value)}
        found = [key for key, value in classes.items() if value.__module__ == module.__name__]
        near = difflib.get_close_matches(name, found, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(found) or 'no class'}"
        raise ConfigError(f"{source}: {file}: no class {name}; {hint}")
    _check_contract(cls, contract, f"{source}: {reference}")
    return cls, {"file": file, "sha256": digest}


def files_in(pickled: bytes) -> list[tuple[str, str]]:
    """(file, SHA-256 of its source) of the files of the user's own whose classes a pickle names:
    what another process of the same run needs first, for `load_files`.
    """
    names = [name for name in sys.modules if name.startswith(PREFIX) and name.encode() in pickled]
    return [(sys.modules[name].__file__, sys.modules[name].source_digest) for name in names]


def load_files(files: Iterable[tuple[str, str]]) -> None:
    """Run files of the user's own that the parent process has run; ConfigError for one that has
    changed since.
    """
    for file, before in files:
        content = Path(file).read_bytes()
        now = hashlib.sha256(content).hexdigest()
        if now != before:
            raise ConfigError(f"{file}: has changed since the run began; restore it or start anew")
        _run(file, content, now, file)


def _run(file: str, content: bytes, digest: str, source: str) -> types.ModuleType:
    name = f"{PREFIX}{Path(file).stem}_{digest[:16]}"
    if name in sys.modules and sys.modules[name].__file__ == file:
        return sys.modules[name]
    module = types.ModuleType(name)
    module.__file__, module.source_digest = file, digest
    sys.modules[name] = module  # dataclasses and pickle look there
    try:
        exec(compile(content, file, "exec"), module.__dict__)
    except BaseException as error:
        del sys.modules[name]
        if not isinstance(error, Exception):
            raise
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == file
        ]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        where = f"line {line}: " if line else ""
        reason = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())[:300]
        raise ConfigError(f"{source}: {file}: {where}{type(error).__name__}: {reason}") from error
    return module


def _check_contract(cls: type, contract: Contract, source: str) -> None:
    look = f"; {contract.example} is an example"
    if not issubclass(cls, contract.base):
        raise ConfigError(
            f"{source}: must derive from {contract.base.__module__}.{contract.base.__name__}{look}"
        )
    if inspect.isabstract(cls):
        raise ConfigError(
            f"{source}: lacks the methods {', '.join(sorted(cls.__abstractmethods__))}{look}"
        )
    built_in = cls.__name__ in contract.registry and not is_plugged_in(
        contract.registry[cls.__name__]
    )
    if built_in or cls.__name__ in contract.taken:
        raise ConfigError(
            f"{source}: '{cls.__name__}' is the name of a built-in one; rename the class"
        )
    parameters = inspect.signature(cls).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        missing = [name for name in contract.takes if name not in parameters]
        if missing:
            raise ConfigError(
                f"{source}: its constructor takes ({', '.join(parameters)}), but is given "
                f"{', '.join(contract.takes)}; "
                f"add {', '.join(missing)}{look}"
            )
    for name, kind in contract.attributes.items():
        if not isinstance(getattr(cls, name, None), kind):
            raise ConfigError(
                f"{source}: lacks the class attribute '{name}' ({kind.__name__}){look}"
            )


def check_same(
    stored: Mapping[str, dict],
    now: Mapping[str, dict],
    source: str,
    names: Iterable[str] | None = None,
) -> None:
    """CheckpointError unless each class of `names`, of all by default, has the source that a
    checkpoint stored.
    """
    for name in {**stored, **now} if names is None else names:
        before, after = stored.get(name), now.get(name)
        if before is None and after is None:
            continue
        if before is None or after is None:
            was = f"the class of {before['file']}" if before else "built in"
            raise CheckpointError(
                f"{source}: '{name}' was {was} when it was written, which it is not now"
            )
        if before["sha256"] != after["sha256"]:
            raise CheckpointError(
                f"{source}: the source of {name} has changed since (sha256 {before['sha256'][:12]} "
                "then, "
                f"{after['sha256'][:12]} of {after['file']} now); restore the file, or start "
                "another run with "
                f"--opts tag=NAME"
            )


def plug_in_for(
    checkpoint: Mapping,
    path: str | Path,
    references: Sequence[str],
    contracts: Sequence[Contract],
    allow_changed: bool,
) -> None:
    """Load the classes of the user's own that a test of `checkpoint` needs, each of which
    `references` must name.

    contracts: of networks and of data formats. A checkpoint only says what it needs; it never makes
    a file run.
    """
    stored = checkpoint.get("plugins", {})
    needed = {name: record for name, record in stored.items() if set(record["roles"]) & set(TESTED)}
    named = {reference.rpartition(":")[2]: reference for reference in references}
    for name in named:
        if name not in needed:
            raise ConfigError(
                f"--plugin {named[name]}: nothing that {path} needs for a test; leave it out"
            )
    for name, record in needed.items():
        if name not in named:
            raise CheckpointError(
                f"{path}: was trained with {name} of {record['file']}, which is not part of this "
                "repository; to run "
                f"that file, say so: --plugin {record['file']}:{name}"
            )
        networks, formats = contracts
        contract = formats if "format" in record["roles"] else networks
        cls, found = load_class(named[name], contract, "--plugin")
        if found["sha256"] != record["sha256"] and not allow_changed:
            raise CheckpointError(
                f"{path}: the source of {name} has changed since it was trained (sha256 "
                f"{record['sha256'][:12]} then, "
                f"{found['sha256'][:12]} now); restore {found['file']}, or add "
                "--allow-changed-plugin"
            )
        contract.registry[name] = cls
