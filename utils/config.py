"""Flat, typed YAML configurations: `load_config` turns a file plus overrides into a dataclass or a clear error."""

import contextlib
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the file or flag, the key and the fix."""


def load_config(
    schema: type[T],
    path: str | Path,
    opts: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
    recipe: Mapping[str, Any] | None = None,
) -> T:
    """Read the YAML file `path` into the dataclass `schema`; `opts` are 'key=value' strings and win over the file.

    overrides: values that win over everything (command-line flags; None means not given). recipe: values that win over
    the file alone. Values are checked against the fields' types; an unknown key is an error that suggests the nearest.
    """
    values = {key: (value, str(path)) for key, value in read_yaml(path).items()}
    if recipe is not None and not isinstance(recipe, Mapping):
        raise ConfigError(f"{path}: an entry of 'recipe' must be a mapping of keys to values, got {recipe!r}")
    values |= {key: (value, f"{path}, recipe") for key, value in (recipe or {}).items()}
    for option in opts:
        key, separator, text = option.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"--opts {option!r}: expected key=value, for example --opts max_steps=1000")
        try:
            values[key.strip()] = (yaml.safe_load(text), f"--opts {option}")
        except yaml.YAMLError as error:
            raise ConfigError(f"--opts {option!r}: the value is not YAML ({_one_line(error)})") from error
    for key, value in (overrides or {}).items():
        if value is not None:
            values[key] = (value, f"--{key.replace('_', '-')}")
    return build(schema, values)


def check_names(source: str | Path, key: str, names: Iterable[str], known: Iterable[str]) -> None:
    """ConfigError for a name under `key` that is none of `known`: it would be ignored."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"choose from {', '.join(known)}"
            raise ConfigError(f"{source}: {key}: unknown name '{name}'; {hint}")


@contextlib.contextmanager
def constructing(source: str) -> Iterator[None]:
    """Around constructors that take arguments from the configuration: what they refuse becomes a ConfigError."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{source}: {error}") from error


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; ConfigError if it is missing, malformed, empty or has a key twice."""
    path = Path(path)
    if not path.is_file():
        nearby = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        found = f"; found {', '.join(nearby)}" if nearby else ""
        raise ConfigError(f"{path}: no such configuration file{found}")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML ({_one_line(error)})") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{path}: expected a mapping of keys to values, got {type(values).__name__}")
    return values


def build(schema: type[T], values: Mapping[str, tuple[Any, str]]) -> T:
    """`schema(**values)` with every value converted to its field's type. values: key -> (value, where it came from)."""
    fields = {field.name: field for field in dataclasses.fields(schema)}
    hints = typing.get_type_hints(schema)
    arguments = {}
    for key, (value, source) in values.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
            hint = f"; did you mean '{near[0]}'?" if near else f"; known keys: {', '.join(sorted(fields))}"
            raise ConfigError(f"{source}: unknown key '{key}'{hint}")
        arguments[key] = _convert(value, hints[key], key, source)
    missing = [
        name for name, field in fields.items()
        if name not in arguments and field.default is field.default_factory is dataclasses.MISSING
    ]  # fmt: skip
    if missing:
        sources = sorted({source for _, source in values.values()}) or ["configuration"]
        raise ConfigError(f"{sources[0]}: missing key{'s' * (len(missing) > 1)} {', '.join(missing)}")
    return schema(**arguments)


def _convert(value: Any, hint: Any, key: str, source: str) -> Any:
    """`value` as the type `hint`; integers widen to float, sequences become tuples, nothing else is coerced."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    wrong = ConfigError(f"{source}: '{key}' must be {_describe(hint)}, got {value!r} ({type(value).__name__})")
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        for option in args:
            try:
                return _convert(value, option, key, source)
            except ConfigError:
                continue
        raise wrong
    if hint is type(None):
        if value is not None:
            raise wrong
        return None
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise wrong
        kinds = [args[0]] * len(value) if len(args) == 2 and args[1] is Ellipsis else list(args)
        if len(kinds) != len(value):
            raise wrong
        return tuple(_convert(item, kind, key, source) for item, kind in zip(value, kinds))
    if origin is dict or hint is dict:
        if not isinstance(value, dict):
            raise wrong
        return value
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        # PyYAML reads 1e-6 as text: YAML 1.1 wants 1.0e-6.
        try:
            number = float(value)
        except (ValueError, OverflowError):
            raise wrong from None
        if number != number or abs(number) == float("inf"):
            raise wrong
        return number
    if hint is int and isinstance(value, bool):
        raise wrong
    if hint is str and type(value) is int:  # a tag or a folder may be a number
        return str(value)
    if hint is str and value is None:  # `tag=` on the command line, `tag:` in a file
        return ""
    if not isinstance(value, hint):
        raise wrong
    return value


def _describe(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        if len(args) == 2 and args[1] is Ellipsis:
            return f"a list of {_describe(args[0])}"
        return f"a list of {len(args)} values: {', '.join(_describe(a) for a in args)}"
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_describe(a) for a in args)
    names = {int: "an integer", float: "a finite number", str: "text", bool: "true or false", dict: "a mapping"}
    return "empty (null)" if hint is type(None) else names.get(origin or hint, str(hint))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe loader that refuses a key given twice: plain YAML would silently keep the last."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' given twice", key_node.start_mark)
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)
