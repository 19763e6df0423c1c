"""Flat, typed YAML configurations: `load_config` turns a file plus overrides into a dataclass or a
clear error, `parse` the command line of a training script.

The range or the choices of a key stand beside it, as annotations:

    lr: Positive = 0.01
    amp: Annotated[str, AMP] = "off"
"""

import argparse
import collections.abc
import contextlib
import dataclasses
import difflib
import inspect
import math
import os
import re
import reprlib
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import yaml

PROJECT = Path(__file__).resolve().parent.parent
T = TypeVar("T")
Given = dict[str, tuple[Any, str]]  # key -> value, and the file or flag that it comes from

# Ranges of numbers; of a list each item lies in it
Positive = Annotated[float, "(0, inf)"]
NotNegative = Annotated[float, "[0, inf)"]
Share = Annotated[float, "[0, 1]"]
Count = Annotated[int, "[1, inf)"]
Natural = Annotated[int, "[0, inf)"]
OF_FORMAT = object()  # marks a key that only some data formats have a use for

AMP = ("off", "bf16", "fp16")
PROTOCOLS = ("clean", "published")  # of scores: reporting.py
NSD_TOLERANCE = 2.0  # of NSD in the unit of distances, where nothing else is said
SELECTIONS = ("val", "test")  # lists that may choose the best checkpoint

# beyond this a number is a slip, and PyTorch's sizes and seeds fail somewhere deep
LARGEST_INT = 2**31
# scalars of a file, aliases expanded: a few lines of aliases can stand for billions
LARGEST_VALUE = 100_000
DEEPEST_VALUE = 40
# of classes: the means in tables, and what each line of the log begins with
TAKEN = ("dice", "mean", "step", "kind")
LONGEST_NAME = 255  # bytes of a file's or folder's name
# Control characters, which begin a terminal's commands; ends of lines; marks that change the
# direction of writing, by which a name can look like another; halves of characters.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class Flag(str):
    """The source of a value that the command line gives. A type of its own, since a file may have
    any name, also one like a flag's, and only the command line may name code to run.
    """


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the file or flag, the key and the
    fix.
    """


class Flags(argparse.ArgumentParser):
    """Command-line flags under a description that keeps its lines; a mistyped flag is answered by
    the nearest one.
    """

    def __init__(self, description: str) -> None:
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    def error(self, message: str) -> NoReturn:
        known = [flag for flag in self._option_string_actions if flag.startswith("--")]
        for word in re.findall(r"(?<!\S)--[^\s=]+", message):
            if message.startswith("unrecognized arguments") and word not in known:
                near = difflib.get_close_matches(word, known, n=1, cutoff=0.7)
                if near or "--opts" not in known:
                    message += f"; {word}: {_nearest(word, known)}"
                else:  # a key of the file is what else people write so
                    key = word.removeprefix("--").replace("-", "_")
                    message += f"; keys of the configuration go behind --opts: --opts {key}=VALUE"
        super().error(message)


def config_path(name: str) -> Path:
    """The YAML file that `--config` names: a path, or the name of one of the project's own such as
    btcv.
    """
    own = PROJECT / "configs" / f"{name}.yaml"
    if re.fullmatch(r"[\w-]{1,100}", name) and not Path(name).exists() and own.exists():
        return Path("configs", own.name) if Path("configs", own.name).exists() else own
    return Path(name)


def run_checkpoint(name: str) -> Path:
    """The checkpoint that `--ckpt` names: a file, or best.pt of a run folder."""
    return Path(name, "best.pt") if Path(name).is_dir() else Path(name)


def load_config(
    schema: type[T],
    path: str | Path,
    opts: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
    recipe: Mapping[str, Any] | None = None,
) -> T:
    """Read the YAML file `path` into the dataclass `schema`: `build` of what `gather` finds."""
    return build(schema, gather(path, opts, overrides, recipe))


def training_flags(
    description: str,
    methods: Iterable[str],
    networks: Mapping[str, str],
    labelled: str = "units",
    zero: bool = False,
) -> argparse.ArgumentParser:
    """The flags of a training script. A flag with the name of a key is that key.

    networks: flag -> help. labelled: what is counted, as some images have labels and others do not;
    zero: it may be that none has. Needs no torch, so that --help and a mistyped flag are answered
    at once.
    """
    parser = Flags(description=description)
    add = parser.add_argument
    add(
        "--config",
        type=config_path,
        help="YAML file of the data set, such as configs/btcv.yaml, or just btcv",
    )
    add("--method", help=", ".join(methods))
    for name, text in networks.items():
        add(f"--{name}", help=text)
    if "teacher" in networks:
        folds = "folds of an nnU-Net whose logits are averaged; default: those that are there"
        add("--teacher-folds", nargs="+", metavar="FOLD", help=folds)
    add(
        *("--labelled", "--labeled", "--label_num", "--labeled_num", "--labeled-num"),
        type=parse_labelled_or_zero if zero else parse_labelled,
        help=f"{labelled} that count as labelled (3), or their share (0.05, 5%%)"
        + ("; 0: the teacher's prediction is the only label" if zero else ""),
    )
    add(
        "--label_rat",
        dest="labelled",
        type=parse_ratio,
        metavar="SHARE",
        help="their share, as --labelled 0.05; 1 is all of them",
    )
    add(
        "--unlabelled",
        metavar="FOLDER",
        help="folder of further scans or images without labels; test: the data set's own",
    )
    add("--seed", type=int)
    add("--device", help="auto, cpu, cuda, cuda:1, ...")
    add("--amp", help=", ".join(AMP))
    switch = {"action": "store_true", "default": None}
    add("--deterministic", **switch, help="deterministic algorithms")
    add("--compile", **switch, help="compile the networks (torch.compile)")
    add("--channels-last", action=argparse.BooleanOptionalAction, help="channels-last memory order")
    add("--logger", help="also log to wandb, if installed")
    add(
        "--select-on", choices=SELECTIONS, help="list that chooses best.pt; test is shown in tables"
    )
    add("--allow-outside", action="store_true", help="lists may name files outside of data_root")
    add(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        metavar="RUNFOLDER",
        help="go on from last.pt of the same run, if there is one; with a run folder in place of "
        "--config, from the settings in it",
    )
    add("--show-run", action="store_true", help="print the run folder and stop")
    add(
        "--opts",
        nargs="*",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="override keys of the YAML file",
    )
    return parser


def testing_flags(
    description: str,
    splits: Sequence[str],
    split_help: str,
    protocol_help: str,
    hd95: Sequence[str],
    empty: Sequence[str],
) -> argparse.ArgumentParser:
    """The flags of both test scripts. hd95, empty: definitions and policies of metrics.py.

    Needs no torch, as `training_flags`.
    """
    parser = Flags(description=description)
    parser.add_argument(
        "--ckpt",
        required=True,
        type=run_checkpoint,
        help="best.pt or last.pt of a run, or its folder",
    )
    parser.add_argument("--split", choices=splits, help=split_help)
    parser.add_argument(
        "--data-root", help="folder of the data set, if it is not where the run found it"
    )
    parser.add_argument(
        "--allow-outside",
        action="store_true",
        help="read and cache where the checkpoint says, wherever that is",
    )
    parser.add_argument("--out", type=_folder, help="output folder; default: the checkpoint's")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--amp", choices=AMP, default="off")
    parser.add_argument("--hd95", choices=hd95, help="definition, see metrics.py; default: pooled")
    parser.add_argument(
        "--empty",
        choices=empty,
        help="scores of empty masks, see metrics.py; default: agree, distillation runs: nan",
    )
    parser.add_argument(
        "--nsd-tolerance",
        type=_tolerance,
        metavar="MM",
        help="of the surface Dice, such as 3 or '{liver: 3, vein: 1}'; default: the run's "
        f"nsd_tolerance, {NSD_TOLERANCE:g} if it has none",
    )
    parser.add_argument("--protocol", choices=PROTOCOLS, default="clean", help=protocol_help)
    parser.add_argument("--no-predictions", action="store_true", help="do not write label maps")
    parser.add_argument(
        "--overlays", action="store_true", help="write a PNG per case: image, label, prediction"
    )
    add_plugin_flags(parser)
    return parser


def _tolerance(text: str) -> Any:
    try:
        return parse_yaml(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(f"{_short(text)}: {error}") from error


def _folder(name: str) -> Path:
    """ArgumentTypeError for something that is there and no folder."""
    if (path := Path(name)).exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{name}: is a file, expected a folder")
    return path


def add_plugin_flags(parser: argparse.ArgumentParser) -> None:
    """--plugin and --allow-changed-plugin, for `utils.plugins.plug_in_for`."""
    parser.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="FILE.py:CLASS",
        help=(
            "run this class of your own, which the checkpoint was trained with (docs/extending.md)"
        ),
    )
    parser.add_argument(
        "--allow-changed-plugin",
        action="store_true",
        help="even if its source is not what it was in training",
    )


def parse(
    schema: type[T], flags: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> tuple[argparse.Namespace, T]:
    """The command line, and the YAML file that it names as a checked configuration; ConfigError.

    schema: a dataclass of `utils.run.Settings`. The flags also get `plugins`, what `plug_in` says
    of classes of the user's own.
    """
    from utils.plugins import plug_in  # which builds on this module

    args = flags.parse_args(argv)
    in_folder = isinstance(args.resume, str)
    if in_folder == (args.config is not None):
        flags.error("give one of --config FILE and --resume RUNFOLDER")
    if in_folder:
        args.config = Path(args.resume, "config.yaml")
    keys = {field.name for field in dataclasses.fields(schema)}
    chosen = {key: value for key, value in vars(args).items() if key in keys}

    def read(recipe: Mapping[str, Any] | None) -> tuple[Given, T]:
        given = gather(args.config, args.opts, chosen, recipe)
        notes[:] = schema.adapted(given)
        args.plugins = plug_in(given, schema.pluggable)
        return given, build(schema, given)

    notes: list[str] = []
    given, cfg = read(None)
    with located(given, args.config):
        check_recipes(schema, cfg.recipe, schema.recipes, schema.not_in_recipes)
    if cfg.recipe_name in cfg.recipe:
        given, cfg = read(cfg.recipe[cfg.recipe_name])
    note_unused(given, cfg.idle_keys, f"--method {cfg.method}")
    for note in notes:
        print(note, file=sys.stderr)
    with located(given, args.config):
        return args, cfg.checked()


def gather(
    path: str | Path,
    opts: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
    recipe: Mapping[str, Any] | None = None,
) -> Given:
    """What the YAML file `path` and the command line say: key -> (value, where it came from).

    opts: 'key=value' strings, which win over the file. overrides: values that win over everything
    (command-line flags; None means not given). recipe: values that win over the file alone.
    """
    values = {key: (value, str(path)) for key, value in read_yaml(path).items()}
    if recipe is not None and not isinstance(recipe, Mapping):
        raise ConfigError(
            f"{path}: an entry of 'recipe' must be a mapping of keys to values, got "
            f"{_short(recipe)}"
        )
    values |= {key: (value, f"{path}, recipe") for key, value in (recipe or {}).items()}
    for option in opts:
        key, separator, text = option.partition("=")
        if not separator or not key.strip():
            raise ConfigError(
                f"--opts {_short(option)}: expected key=value, for example --opts max_steps=1000"
            )
        try:
            values[key.strip()] = (parse_yaml(text), Flag(f"--opts {_short_text(option)}"))
        except ConfigError as error:
            raise ConfigError(f"--opts {_short(option)}: the value is {error}") from error
    for key, value in (overrides or {}).items():
        if value is not None:
            values[key] = (value, Flag(f"--{key.replace('_', '-')}"))
    return values


@contextlib.contextmanager
def located(given: Given, path: str | Path) -> Iterator[None]:
    """Around checks of a configuration: in front of a ConfigError 'key: ...', the file or flag that
    gave the key.
    """
    try:
        yield
    except ConfigError as error:
        key = re.match(r"\w*", str(error)).group()
        source = given[key][1] if key in given else str(path)
        raise ConfigError(f"{source}: {error}") from error


def check_names(key: str, names: Iterable[Any], known: Iterable[str]) -> None:
    """ConfigError for a name under `key` that is none of `known`: it would be ignored."""
    for name in names:
        if name not in known:
            raise ConfigError(
                f"{key}: unknown name '{_short_text(name)}'; {_nearest(name, list(known))}"
            )


def marks(schema: type) -> Iterator[tuple[str, Any]]:
    """(key, mark) for each annotation that stands beside the type of a key."""
    for key, hint in typing.get_type_hints(schema, include_extras=True).items():
        for part in (hint, *typing.get_args(hint)):
            for mark in getattr(part, "__metadata__", ()):
                yield key, mark


def check_values(cfg: Any) -> None:
    """ConfigError for a key of `cfg` with none of its choices, or outside of its range.

    Choices come first: what a wrong one leaves open, such as the channels of an unknown format,
    would be called out of range.
    """
    ranges = [(key, mark) for key, mark in marks(type(cfg)) if isinstance(mark, str)]
    for key, mark in marks(type(cfg)):
        value = getattr(cfg, key)
        if (key, mark) not in ranges and mark is not OF_FORMAT and value not in mark:
            raise ConfigError(
                f"{key}: unknown value '{_short_text(value)}'; choose from {', '.join(mark)}"
            )
    for key, interval in ranges:
        _check_range(key, getattr(cfg, key), interval)


def _check_range(key: str, value: Any, interval: str) -> None:
    low, high = map(float, interval[1:-1].split(","))
    for item in value if isinstance(value, tuple) else (value,):
        above = item > low or (item == low and interval[0] == "[")
        below = item < high or (item == high and interval[-1] == "]")
        if not (above and below):
            raise ConfigError(f"{key}: must lie in {interval}, got {_short(value)}")


def check_run_names(cfg: Any) -> None:
    """ConfigError unless `dataset` and `tag` can name folders, and `class_names` the rows and
    columns of results.
    """
    for key, optional in (("dataset", False), ("tag", True)):
        name = getattr(cfg, key)
        plain = (
            name.strip(" .") == name
            and not any(mark in name for mark in "/\\:")
            and len(name.encode()) <= 100
        )
        if not plain or not (name or optional):
            raise ConfigError(
                f"{key}: {_short(name)} cannot name a folder; expected up to 100 bytes without / "
                "\\ : and without dots "
                f"or spaces at the ends"
            )
    names = cfg.class_names
    fewest = 1 if getattr(cfg, "regions", None) else 2  # regions come without a background
    if not fewest <= len(names) <= 256 or len(set(names)) != len(names):
        raise ConfigError(
            f"class_names: 2 to 256 different names, background first; got {_short(list(names))}"
        )
    for name in names:
        if not name or name != name.strip() or name in TAKEN:
            raise ConfigError(
                f"class_names: {_short(name)} cannot name a class: empty, with spaces around it, "
                f"or a name that logs and tables have for something else ({', '.join(TAKEN)})"
            )


def class_tolerances(value: float | Mapping[str, float], names: Sequence[str]) -> list[float]:
    """The tolerance of NSD of each of the classes `names`. value: `nsd_tolerance`, one for
    all, or {class: tolerance} with NSD_TOLERANCE for the others. ConfigError for a name that is
    none of the classes, or what is no distance.
    """
    known = value if isinstance(value, Mapping) else dict.fromkeys(names, value)
    if unknown := [name for name in known if name not in names]:
        raise ConfigError(
            f"nsd_tolerance: {_short_text(unknown[0])} is none of the classes {', '.join(names)}"
        )
    for name, tolerance in known.items():
        number = isinstance(tolerance, (int, float)) and not isinstance(tolerance, bool)
        if not number or not 0 <= tolerance < math.inf:
            raise ConfigError(
                f"nsd_tolerance: expected a distance of at least 0 in mm (pixels or voxels where "
                f"there is no voxel size), got {_short(tolerance)} for {name}"
            )
    return [float(known.get(name, NSD_TOLERANCE)) for name in names]


def check_unused(cfg: Any, keys: Iterable[str], reason: str) -> None:
    """ConfigError for one of `keys` of `cfg` that departs from its default although nothing would
    read it.
    """
    fields = dataclasses.fields(cfg)
    defaults = {f.name: f.default for f in fields}
    defaults |= {
        f.name: f.default_factory() for f in fields if f.default_factory is not dataclasses.MISSING
    }
    for key in keys:
        if getattr(cfg, key) != defaults[key]:
            raise ConfigError(f"{key}: {reason} does not use this key; remove it")


def check_recipes(
    schema: type, recipes: Mapping[str, Any], known: Iterable[str], fixed: Iterable[str]
) -> None:
    """ConfigError for an entry of `recipe` that is not a mapping of keys of `schema` to values of
    their types.

    known: the names that have a recipe. fixed: keys that a recipe cannot set, since they say which
    recipe it is.
    """
    check_names("recipe", recipes, known)
    hints = typing.get_type_hints(schema)
    for name, recipe in recipes.items():
        if not isinstance(recipe, Mapping):
            raise ConfigError(
                f"recipe: {name}: must be a mapping of keys to values, got {_short(recipe)}"
            )
        for key, value in recipe.items():
            if key in ("recipe", *fixed):
                raise ConfigError(
                    f"recipe: {name}: '{key}' cannot be set by a recipe; set it outside"
                )
            if key not in hints:
                raise ConfigError(
                    f"recipe: {name}: unknown key '{_short_text(key)}'; "
                    f"{_nearest(key, list(hints))}"
                )
            _convert(value, hints[key], key, f"recipe: {name}")


def check_arguments(
    source: str, function: Callable, arguments: Any, reserved: Iterable[str] = ()
) -> dict[str, Any]:
    """`arguments` for `function` (a class: its constructor), each converted to the type that its
    signature states.

    ConfigError, beginning with `source`, unless they are a mapping of its parameters' names, other
    than `reserved` (those that the caller gives), to values of their types. None is an empty
    mapping.
    """
    if arguments is None:
        return {}
    if not isinstance(arguments, Mapping):
        raise ConfigError(
            f"{source}: must be a mapping of arguments to values, got {_short(arguments)}"
        )
    parameters = inspect.signature(function).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    known = [
        name
        for name, parameter in parameters.items()
        if parameter.kind in kinds and name not in reserved
    ]
    try:
        hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
    # annotations of a user's own class may name what only a type checker imports
    except (NameError, TypeError):
        hints = {}
    converted = {}
    for name, value in arguments.items():
        if name not in known and not (
            open_ended and isinstance(name, str) and name not in reserved
        ):
            choose = _nearest(name, known) if known else "it takes none"
            raise ConfigError(f"{source}: unknown argument '{_short_text(name)}'; {choose}")
        converted[name] = _convert(value, hints.get(name, Any), name, source)
    return converted


def check_nested(
    key: str,
    values: Mapping[str, Any],
    registry: Mapping[str, type],
    reserved: Iterable[str],
    pairs: Iterable[str] | None = None,
) -> dict[str, dict]:
    """`network_args` or `method_args`: the arguments of each entry, checked and converted by
    `check_arguments`.

    reserved: arguments that the scripts give. pairs: names that may follow the entry's as in
    name@first-second.
    """
    checked = {}
    for name, arguments in values.items():
        entry, at, pair = str(name).partition("@") if pairs is not None else (name, "", "")
        check_names(key, [entry], registry)
        if at:
            check_names(f"{key}: {name}", pair.split("-", 1), pairs)
        checked[name] = check_arguments(f"{key}: {name}", registry[entry], arguments, reserved)
    return checked


def parse_labelled(text: str) -> int | float:
    """'3' -> 3 units; '0.05' and '5%' -> 0.05, a share; 'all' -> 1.0. ValueError for anything
    else.
    """
    if text == "all":
        return 1.0
    value = float(text.removesuffix("%"))
    if text.endswith("%"):
        if not 0 < value <= 100:
            raise ValueError(f"a share of labels lies above 0 % and at most at 100 %, got {text}")
        return value / 100
    if not 0 < value < math.inf or (value > 1 and not value.is_integer()):
        raise ValueError(f"labels are a number of units or a share above 0 and up to 1, got {text}")
    return int(value) if value > 1 or text.isdecimal() else value


def parse_ratio(text: str) -> float:
    """As `parse_labelled`, for a share alone: '1' -> 1.0, all of them. ArgumentTypeError for
    a number above 1.
    """
    share = float(parse_labelled(text))
    if share > 1:
        raise argparse.ArgumentTypeError(
            f"a ratio of labels lies above 0 and at most at 1, got {text}; a number of them is "
            "--labelled"
        )
    return share


def parse_labelled_or_zero(text: str) -> int | float:
    """`parse_labelled`, and '0' -> 0."""
    return 0 if text == "0" else parse_labelled(text)


def labelled_name(labelled: int | float | None) -> str:
    """How a number or share of labelled units shows in the name of a run folder: '3', '5%',
    'all'.
    """
    if labelled is None or (isinstance(labelled, float) and labelled == 1):
        return "all"
    if labelled == 0:
        return "0"
    return f"{labelled:g}" if labelled >= 1 else f"{100 * labelled:g}%"


def from_flag(entry: tuple[Any, str]) -> bool:
    """Whether an entry of `Given` comes from the command line."""
    return isinstance(entry[1], Flag)


def note_unused(given: Given, keys: Iterable[str], reason: str) -> None:
    """Print which of `keys` the command line gives although `reason` has no use for them; a file
    serves other runs.
    """
    idle = [key for key in keys if key in given and from_flag(given[key])]
    if idle:
        print(f"note: {reason} does not use {', '.join(idle)}", file=sys.stderr)


@contextlib.contextmanager
def constructing(source: str) -> Iterator[None]:
    """Around constructors that take arguments from the configuration: what they refuse becomes a
    ConfigError.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{source}: {error}") from error


@contextlib.contextmanager
def trying(source: str) -> Iterator[None]:
    """Around a trial of something that the configuration describes: whatever fails becomes a short
    ConfigError.
    """
    try:
        yield
    except ConfigError:
        raise
    # a constructor may raise anything, and a traceback would hide the key that is wrong
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ConfigError(f"{source}: {kind}{_one_line(error)[:500]}") from error


@contextlib.contextmanager
def enough_voxels(name: str, size: Sequence[int], batch: int, keys: str) -> Iterator[None]:
    """Around a trial of a network on a batch of `batch` patches of this size: where norms find one
    voxel of a channel, ConfigError that names the patch and `keys`, those of the batch.
    """
    try:
        yield
    except ValueError as error:
        if not str(error).startswith("Expected more than 1 "):
            raise
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        each = f" in each of {processes} processes" if processes > 1 else ""
        raise ConfigError(
            f"patch_size: {list(size)} leaves {name} one voxel of a channel, of which no norm can "
            f"be taken, in a batch of {batch} patch(es){each}; take a larger patch_size, or more "
            f"patches ({keys})"
        ) from error


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; ConfigError if it is missing, malformed, empty or has a key
    twice.
    """
    path = Path(path)
    if max(
        len(part.encode(errors="replace")) for part in (*path.parts, "")
    ) > LONGEST_NAME or "\0" in str(path):
        raise ConfigError(
            f"{_short_text(path)}: no such configuration file, the name is not one of a file"
        )
    if not path.is_file():
        nearby = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        if path.is_dir():
            nearby = sorted(str(p) for p in path.glob("*.yaml"))
        shown = ", ".join(nearby[:20]) + (
            f" and {len(nearby) - 20} more" if len(nearby) > 20 else ""
        )
        kind = (
            "a folder, not a configuration file" if path.is_dir() else "no such configuration file"
        )
        hint = f"; found {shown}" if nearby else ""
        if (PROJECT / path).is_file():
            hint = f"; it lies in {PROJECT}, start the script there"
        elif re.fullmatch(r"[\w-]+", str(path)):
            hint = (
                f"; {_nearest(str(path), sorted(p.stem for p in PROJECT.glob('configs/*.yaml')))}"
            )
        raise ConfigError(f"{path}: {kind}{hint}")
    try:
        values = parse_yaml(path.read_text(encoding="utf-8-sig"))
    except (ConfigError, UnicodeDecodeError, OSError) as error:
        reason = (
            str(error) if isinstance(error, ConfigError) else f"not valid YAML ({_one_line(error)})"
        )
        raise ConfigError(f"{path}: {reason}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(
            f"{path}: expected a mapping of keys to values, got {_short_type(values)}"
        )
    return values


def parse_yaml(text: str) -> Any:
    """The value of YAML `text`: plain values only, no key twice, no value that holds itself;
    ConfigError else.
    """
    try:
        value = yaml.load(text, Loader=_UniqueKeyLoader)
        _check_size(value)
    except (
        yaml.YAMLError,
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
        OverflowError,
    ) as error:
        # PyYAML's constructors of dates, numbers and tagged values raise what they come across.
        raise ConfigError(f"not valid YAML ({_one_line(error)[:300]})") from error
    except RecursionError:
        raise ConfigError("not valid YAML (nested too deeply)") from None
    return value


def _check_size(
    value: Any, depth: int = 0, sizes: dict[int, int] | None = None, inside: tuple = ()
) -> int:
    """Scalars in `value`, each alias counted as often as it is used; ValueError if there are too
    many, or a cycle.
    """
    sizes = {} if sizes is None else sizes
    if not isinstance(value, (dict, list, tuple, set)):
        return 1
    if id(value) in inside:
        raise ValueError("a value that contains itself")
    if depth > DEEPEST_VALUE:
        raise ValueError("nested too deeply")
    if id(value) not in sizes:
        items = [*value, *value.values()] if isinstance(value, dict) else value
        sizes[id(value)] = 1 + sum(
            _check_size(item, depth + 1, sizes, (*inside, id(value))) for item in items
        )
    if sizes[id(value)] > LARGEST_VALUE:
        raise ValueError(f"more than {LARGEST_VALUE} values")
    return sizes[id(value)]


def build(schema: type[T], values: Given) -> T:
    """`schema(**values)` with every value converted to its field's type. values: key -> (value,
    where it came from).
    """
    fields = {field.name: field for field in dataclasses.fields(schema)}
    hints = typing.get_type_hints(schema)
    arguments = {}
    for key, (value, source) in values.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
            hint = (
                f"; did you mean '{near[0]}'?"
                if near
                else f"; known keys: {', '.join(sorted(fields))}"
            )
            raise ConfigError(f"{source}: unknown key '{_short_text(key)}'{hint}")
        arguments[key] = _convert(value, hints[key], key, source)
    missing = [
        name
        for name, field in fields.items()
        if name not in arguments and field.default is field.default_factory is dataclasses.MISSING
    ]
    if missing:
        sources = sorted({source for _, source in values.values()}) or ["configuration"]
        raise ConfigError(
            f"{sources[0]}: missing key{'s' * (len(missing) > 1)} {', '.join(missing)}"
        )
    return schema(**arguments)


def _convert(value: Any, hint: Any, key: str, source: str) -> Any:
    """`value` as the type `hint`; integers widen to float, sequences become tuples, nothing else is
    coerced.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    wrong = ConfigError(
        f"{source}: '{key}' must be {_describe(hint)}, got {_short(value)} ({_short_type(value)})"
    )
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
    if origin in (collections.abc.Sequence, collections.abc.Iterable):
        return _convert(value, tuple[args[0], ...] if args else tuple[Any, ...], key, source)
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
    if hint is int and (isinstance(value, bool) or not isinstance(value, int)):
        raise wrong
    if hint is int and abs(value) >= LARGEST_INT:
        raise ConfigError(
            f"{source}: '{key}' must lie within ±{LARGEST_INT - 1}, got {_short(value)}"
        )
    if hint is str:
        if type(value) is int and abs(value) < LARGEST_INT:  # a tag or a folder may be a number
            return str(value)
        if value is None:  # `tag=` on the command line, `tag:` in a file
            return ""
        if isinstance(value, bool):
            raise ConfigError(f"{wrong} (YAML reads off, no, on and yes so: put it in quotes)")
        if isinstance(value, str) and not printable(value):
            raise ConfigError(
                f"{source}: '{key}' has characters that cannot be printed: {_short(value)}"
            )
        if (
            isinstance(value, str)
            and max(len(part.encode()) for part in re.split(r"[/\\]", value)) > LONGEST_NAME
        ):
            raise ConfigError(
                f"{source}: '{key}' has a part of more than {LONGEST_NAME} bytes: {_short(value)}"
            )
        if not isinstance(value, str):
            raise wrong
        return value
    if not isinstance(hint, type):  # a callable or a type variable: left to the constructor
        return value
    if not isinstance(value, hint):
        raise wrong
    return value


def printable(text: str) -> bool:
    """Whether it can be written to a file, and shown without doing anything to a terminal or to the
    order of what stands around it.
    """
    return not UNPRINTABLE.search(text)


def plain_name(name: str) -> bool:
    """Whether it can name a file or folder in another one: `printable`, and without a path."""
    return name not in ("", ".", "..") and not re.search(r"[/\\]", name) and printable(name)


def escaped(text: object) -> str:
    """Text for a terminal: what is not `printable` as \\x1b or \\u202e; line ends and tabs stay."""

    def written(match: re.Match) -> str:
        if match[0] in "\n\t":
            return match[0]
        return match[0].encode("unicode_escape").decode("ascii")

    return UNPRINTABLE.sub(written, str(text))


def _describe(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        if len(args) == 2 and args[1] is Ellipsis:
            return f"a list of {_describe(args[0])}"
        return f"a list of {len(args)} values: {', '.join(_describe(a) for a in args)}"
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_describe(a) for a in args)
    if origin in (collections.abc.Sequence, collections.abc.Iterable):
        return f"a list of {_describe(args[0])}" if args else "a list"
    names = {
        int: "an integer",
        float: "a finite number",
        str: "text",
        bool: "true or false",
        dict: "a mapping",
    }
    return "empty (null)" if hint is type(None) else names.get(origin or hint, str(hint))


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 80
_repr.maxlong, _repr.maxlevel, _repr.maxlist, _repr.maxtuple, _repr.maxdict = 30, 4, 8, 8, 6


def _short(value: Any) -> str:
    """repr of a value on one line, cut where it is long."""
    return _one_line(_repr.repr(value))


def _short_text(value: Any) -> str:
    """A name or a flag as it was given, on one line, cut where it is long."""
    text = _one_line(value) if printable(str(value)) else repr(str(value))
    return text if len(text) <= 200 else f"{text[:190]}..."


def _short_type(value: Any) -> str:
    return type(value).__name__


def _nearest(name: Any, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(name)[:100], list(known), n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else f"choose from {', '.join(known)}"


def _one_line(error: Any) -> str:
    return " ".join(str(error).split())


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe loader that refuses a key given twice: plain YAML would silently keep the last."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            # `<<: *base`, which keys beside it override
            merge = key_node.tag == "tag:yaml.org,2002:merge"
            key = "<<" if merge else self.construct_object(key_node, deep=True)
            if isinstance(key, collections.abc.Hashable):
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key '{key}' given twice", key_node.start_mark
                    )
                seen.add(key)
        return super().construct_mapping(node, deep)
