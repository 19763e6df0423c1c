"""Which scans or images a file or folder holds, for prediction: no lists, no labels."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

from dataloaders.cases import Case
from dataloaders.volumes import DICOM_SUFFIXES, SUFFIXES, DataError, dicom_series, has_suffix, stem

HELP = (
    "expected .nii.gz, .nii, .nrrd, .nhdr, .mha or .mhd files, a DICOM series, or folders of these"
)


def find_scans(
    path: Path, in_channels: int, channel_of: Callable[[str], tuple[str, int] | None]
) -> tuple[list[Case], list[str]]:
    """Scans at `path`, sorted by name, and what is wrong with those that cannot be predicted.

    A file is a scan; so is the set of channel files that `channel_of` names alike (one of them
    stands for all), and a folder with a DICOM series. In a folder the files count, or where there
    are none those of each folder right in it.
    """
    path = path.absolute()
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; {HELP}")
    if path.is_file():
        named = channel_of(stem(path)) if has_suffix(path) else None
        if named is not None:
            beside = [
                file
                for file in _files(path.parent)
                if (channel_of(stem(file)) or ("",))[0] == named[0]
            ]
            return _grouped(beside, in_channels, channel_of)
        if has_suffix(path, DICOM_SUFFIXES):
            return [Case(path.parent.name, (path,))], []
        return [Case(stem(path), (path,))], []
    files = _files(path)
    if files:
        return _grouped(files, in_channels, channel_of)
    folders = (
        [path]
        if dicom_series(path)
        else sorted(entry for entry in path.iterdir() if entry.is_dir())
    )
    cases: list[Case] = []
    problems: list[str] = []
    for folder in folders:
        files = _files(folder)
        if files:
            found, wrong = _grouped(files, in_channels, channel_of)
            cases += found
            problems += wrong
        elif dicom_series(folder):
            cases.append(Case(folder.name, (folder,)))
    if not cases and not problems:
        raise DataError(f"{path}: nothing to predict; {HELP}")
    return _unique(cases), problems


def find_images(path: Path, suffixes: Sequence[str]) -> list[Case]:
    """The image file at `path`, or those right in the folder, sorted by name; names without suffix
    must differ.
    """
    path = path.absolute()
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; expected {', '.join(suffixes)} files")
    files = (
        [path]
        if path.is_file()
        else sorted(file for file in path.iterdir() if has_suffix(file, tuple(suffixes)))
    )
    if not files:
        raise DataError(f"{path}: nothing to predict; expected {', '.join(suffixes)} files")
    return _unique([Case(file.stem, (file,)) for file in files])


def _files(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.iterdir()
        if file.is_file() and has_suffix(file, SUFFIXES) and file.name[0] != "."
    )


def _grouped(
    files: Sequence[Path], in_channels: int, channel_of: Callable
) -> tuple[list[Case], list[str]]:
    """Cases of channel files that belong together, and of files that hold a whole scan each."""
    scans: dict[str, dict[int, Path]] = {}
    cases: list[Case] = []
    problems: list[str] = []
    for file in files:
        named = channel_of(stem(file))
        if named is None:
            cases.append(Case(stem(file), (file,)))
        elif named[1] >= 0:
            channels = scans.setdefault(named[0], {})
            if named[1] in channels:
                problems.append(
                    f"{file}: channel {named[1]} of '{named[0]}' twice, also "
                    f"{channels[named[1]].name}"
                )
            channels[named[1]] = file
    for name, channels in scans.items():
        if sorted(channels) == list(range(in_channels)):
            cases.append(Case(name, tuple(channels[k] for k in range(in_channels))))
        else:
            problems.append(
                f"{next(iter(channels.values()))}: '{name}' has the channels {sorted(channels)} "
                "(as its file names "
                f"say), the network takes {in_channels}, counted from 0; add the missing files"
            )
    return _unique(cases), problems


def _unique(cases: Sequence[Case]) -> list[Case]:
    """The cases sorted by name; DataError if two would write the same result."""
    ordered = sorted(cases, key=lambda case: case.name)
    for first, second in itertools.pairwise(ordered):
        if first.name == second.name:
            raise DataError(
                f"{first.images[0]} and {second.images[0]} would write the same result "
                f"'{first.name}'; rename one"
            )
    return ordered
