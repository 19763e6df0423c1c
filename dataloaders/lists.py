"""Which cases there are: lists in text files and JSON, patients, and files in folders."""

import dataclasses
import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from dataloaders.cases import Case
from dataloaders.checks import check_inside
from dataloaders.dicom import dicom_series
from dataloaders.faults import DataError, Finding, Report, gathering
from dataloaders.volumes import (
    DICOM_SUFFIXES,
    SUFFIXES,
    as_stored,
    composed,
    has_suffix,
    is_data,
    stem,
)

HELP = (
    "expected .nii.gz, .nii, .nrrd, .nhdr, .mha or .mhd files, a DICOM series, or folders of these"
)
SEED = 1337  # of labelled images, where no list names them
SECTIONS = ("training", "validation", "test", "testing")
# Names of one patient's scans: BIDS, BraTS time points, cardiac frames, numbered visits. Group 1 is
# the patient.
_PATIENTS = tuple(
    map(
        re.compile,
        (
            r"(sub-[A-Za-z0-9]+)_.+",
            r"(BraTS-[A-Za-z]+-\d+)-\d{3}",
            r"(.+)_frame\d+",
            r"(.+?)[_-](?:ses|session|visit|timepoint|tp)[_-]?\d+",
        ),
    )
)


def read_datalist(
    root: Path, datalist: str, report: Report | None = None, allow_outside: bool = False
) -> dict[str, list[Case]]:
    """The lists of a decathlon JSON (`training`, `validation`, `test`, ...), paths resolved against
    its folder.

    Entries are {"image": file or [files], "label": file}, and "labelled_classes" where the label
    lacks some; the public downloads also list unlabelled test images as plain names. A case is
    called after its image file, or after the folder of its channel files; where image files of
    several cases have one name, after the folder that each has for itself. report: takes the
    faults, and entries without one are returned; where it is None, they are raised together.
    """
    path = root / datalist
    sections: dict[str, list[Case]] = {}
    with gathering(report) as report:
        content = None
        found: dict[str, list[Case]] = {}
        if check_inside(path, root, f"datalist {path.name}", report, allow_outside):
            with report.catching():
                content = read_decathlon(path)
        for section, entries in (content or {}).items():
            if section not in SECTIONS or not isinstance(entries, list):
                continue
            cases = found[section] = []
            for index, entry in enumerate(entries):
                with report.catching():
                    case = _entry(path, section, index, entry, report)
                    if all(
                        [
                            check_inside(file, root, path, report, allow_outside)
                            for file in case.files
                        ]
                    ):
                        cases.append(case)
        by_folder = _folder_names(case for cases in found.values() for case in cases)
        for section, cases in found.items():
            cases = [
                dataclasses.replace(case, name=by_folder.get(case.images[0], case.name))
                for case in cases
            ]
            names = [case.name for case in cases]
            repeated = sorted({name for name in names if names.count(name) > 1})
            if repeated:
                report.error(
                    "listed twice",
                    path,
                    f"'{section}' has {len(repeated)} case names more than once, for example "
                    f"'{repeated[0]}'",
                    "",
                    "every scan needs a file name (with several channel files: a folder) of its "
                    "own",
                )
            sections["test" if section == "testing" else section] = list(
                {case.name: case for case in cases}.values()
            )
        training = (content or {}).get("training")
        if content is not None and not (isinstance(training, list) and training):
            report.error(
                "empty list",
                path,
                "the list 'training' is missing or empty",
                "entries with 'image' and 'label'",
                "mend the data list",
            )
    return sections


def read_json(path: Path, kind: type = dict, expected: str = "an object with a list 'training'"):
    """The object (or what `kind` says) in a data set's JSON file; DataError if it is missing or
    malformed.
    """
    if not path.is_file():
        raise DataError(
            Finding(
                "list",
                str(path),
                "no such data list",
                "",
                "put the data set there (docs/data.md) or name its folder with --opts "
                "data_root=FOLDER (in test scripts --data-root FOLDER)",
            )
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise DataError(
            Finding("list", str(path), f"not valid JSON ({error})", "", "mend the data list")
        ) from error
    if not isinstance(content, kind):
        raise DataError(
            Finding(
                "list", str(path), f"holds {type(content).__name__}", expected, "mend the data list"
            )
        )
    return content


def _once(pairs: list[tuple[str, object]]) -> dict:
    """The object of these keys and values; ValueError for a key that is there twice."""
    for key, number in Counter(key for key, _ in pairs).items():
        if number > 1:
            raise ValueError(f"the key '{key}' is there {number} times")
    return dict(pairs)


def read_decathlon(path: Path) -> dict:
    """The object in a decathlon JSON; DataError if it is nnU-Net's."""
    content = read_json(path)
    if "channel_names" in content:
        style = "in the style of nnU-Net v2 ('channel_names')"
        raise DataError(Finding("list", str(path), style, "", "set format: nnunet"))
    return content


def read_class_names(path: Path) -> tuple[str, ...]:
    """Class names by id, as a decathlon JSON says: "labels": {"0": "background", "1": "liver"}."""
    labels = read_decathlon(path).get("labels")
    if not isinstance(labels, dict) or sorted(labels) != sorted(
        map(str, range(max(len(labels), 2)))
    ):
        raise DataError(
            Finding(
                "list",
                str(path),
                f"'labels' is {labels!r}",
                'a name for each id, none left out: {"0": "background", "1": "liver"}',
                "mend it, or set class_names in the configuration",
            )
        )
    return tuple(str(labels[str(k)]) for k in range(len(labels)))


def read_num_channels(path: Path) -> int:
    """How many channels the scans have, as a decathlon JSON says: "modality": {"0": "T1", "1":
    "T2"}; 1 without it.
    """
    modality = read_decathlon(path).get("modality", "unknown")
    modality = {"0": modality} if isinstance(modality, str) else modality
    if not isinstance(modality, (dict, list)) or not modality:
        raise DataError(
            Finding(
                "list",
                str(path),
                f"'modality' is {modality!r}",
                'a name for each channel, such as {"0": "T1", "1": "T2"}',
                "mend it, or set in_channels in the configuration",
            )
        )
    return len(modality)


def _entry(path: Path, section: str, index: int, entry: object, report: Report) -> Case:
    if isinstance(entry, str):
        entry = {"image": entry}
    images = entry.get("image") if isinstance(entry, dict) else None
    images = [images] if isinstance(images, str) else images
    label = entry.get("label") if isinstance(entry, dict) else None
    well_formed = (
        isinstance(images, list) and images and all(isinstance(image, str) for image in images)
    )
    if not well_formed or not isinstance(label, (str, type(None))):
        raise DataError(
            Finding(
                "list",
                str(path),
                f"entry {index} of '{section}' is {entry!r}",
                '{"image": "imagesTr/x.nii.gz", "label": "labelsTr/x.nii.gz"} (image may be a list '
                "of files)",
                "mend the data list",
            )
        )
    files = tuple(listed_file(path, path.parent, image, report) for image in images)
    # Several channel files are named CASE-t1c, CASE-t1n, ...: the folder carries the case's name.
    name = files[0].parent.name if len(images) > 1 else stem(files[0])
    own = listed_file(path, path.parent, label, report) if label else None
    return Case(name, files, own, classes=read_classes(entry, path, name))


def read_classes(entry: dict, path: Path, name: str) -> tuple[str | int, ...] | None:
    """The classes that the label of a list's entry tells; None where it does not say. Which there
    are only the data set knows.
    """
    classes = entry.get("labelled_classes")
    if classes is None or (isinstance(classes, list) and classes):
        return None if classes is None else tuple(classes)
    raise DataError(
        Finding(
            "list",
            str(path),
            f"'labelled_classes' of '{name}' is {classes!r}",
            "a list of names or ids of the annotated classes, such as [1, 2]",
            "mend the data list; a case without any is one without a label",
        )
    )


def listed_file(source: Path, root: Path, file: str, report: Report) -> Path:
    """A file below `root` that the list `source` names, as the file system has it. One that is
    parted by backslashes, as on Windows, is read as if it had slashes, with a warning.
    """
    if "\\" in file and not (root / file).exists():
        report.warning(
            "list",
            source,
            "paths with the separators of Windows, backslashes",
            "slashes",
            "they are read as slashes; replace them",
        )
        file = file.replace("\\", "/")
    return as_stored(root / file)


def _folder_names(cases: Iterable[Case]) -> dict[Path, str]:
    """First image of a case -> its folder's name, for cases whose image files have one name (as of
    KiTS, TotalSegmentator, LA: ID/imaging.nii.gz) and that have a folder each.
    """
    same: dict[str, set[Path]] = {}
    folders: Counter = Counter()
    for file, name in {case.images[0]: case.name for case in cases}.items():
        same.setdefault(name, set()).add(file)
        folders[file.parent] += 1
    names = {}
    for files in same.values():
        if len(files) > 1 and all(folders[file.parent] == 1 for file in files):
            names |= _distinct(files)
    return names


def _distinct(files: Iterable[Path]) -> dict[Path, str]:
    """Each file -> the name of the nearest folder above it that differs from those of the others;
    empty where there is none.
    """
    files = list(files)
    for level in range(min(len(file.parents) for file in files) - 1):
        names = [composed(file.parents[level].name) for file in files]
        if len(set(names)) == len(names):
            return dict(zip(files, names))
        if len(set(names)) > 1:
            break
    return {}


def read_split(folder: Path, name: str, report: Report | None = None) -> list[str] | None:
    """Case names in `folder/name.txt`, one per line; None if there is no such file.

    A '#' at the start of a line or after a blank starts a comment, so names may hold one. report:
    as in read_datalist.
    """
    path = folder / f"{name}.txt"
    if not path.is_file():
        return None
    with gathering(report) as report:
        try:
            content = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            report.error(
                "list",
                path,
                f"not UTF-8 text ({error})",
                "one case per line",
                "save the list as UTF-8",
            )
            content = None
        lines = (
            re.split(r"(?:^|(?<=\s))#", line)[0].strip()
            for line in composed(content or "").splitlines()
        )
        names = [line for line in lines if line]
        if content is not None and not names:
            report.error(
                "empty list",
                path,
                "the list is empty",
                "",
                "remove the file or name at least one case",
            )
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            report.error(
                "listed twice",
                path,
                f"listed twice: {', '.join(repeated[:5])}",
                "",
                "each case may stand once",
            )
    return list(dict.fromkeys(names))


def select(
    cases: Iterable[Case], names: Sequence[str], source: str, report: Report | None = None
) -> list[Case]:
    """The cases called `names`, in that order; a fault names those that do not exist."""
    by_name = {case.name: case for case in cases}
    names = [composed(name) for name in names]
    unknown = [name for name in names if name not in by_name]
    with gathering(report) as report:
        if unknown:
            known = ", ".join(list(by_name)[:3])
            report.error(
                "unknown case",
                source,
                f"{len(unknown)} of {len(names)} cases are not in the data list, for example "
                f"'{unknown[0]}'",
                "",
                f"names look like {known}",
            )
    return [by_name[name] for name in names if name in by_name]


class PatientFunction:
    """Case name -> patient, group 1 of the first of `patterns` that matches. A name that does not
    match is a patient of its own. An object, since loader processes cannot be sent a closure.
    """

    def __init__(self, patterns: Sequence[re.Pattern]) -> None:
        self.patterns = patterns

    def __call__(self, name: str) -> str:
        matches = (pattern.fullmatch(name) for pattern in self.patterns)
        return next((match[1] for match in matches if match and match[1]), name)


def patient_function(pattern: str) -> PatientFunction:
    """Case name -> patient. pattern: a regular expression whose group 1 is the patient; '': the
    usual conventions.
    """
    try:
        patterns = (re.compile(pattern),) if pattern else _PATIENTS
    except re.error as error:
        raise DataError(
            f"patient_pattern: '{pattern}' is no regular expression ({error})"
        ) from error
    if pattern and patterns[0].groups != 1:
        raise DataError(
            f"patient_pattern: '{pattern}' must have one group, the patient, such as '(.+)_scan'"
        )

    return PatientFunction(patterns)


def labelled_count(labelled: int | float | None, total: int, source: str, unit: str) -> int:
    """How many of `total` units are labelled: a count, a fraction rounded down, or None or 1.0 for
    all of them.
    """
    if labelled is None:
        return total
    found = f"{source}: {total} {unit}{'s' * (total != 1)} with a label, but labelled is {labelled}"
    expected = f"expected 1..{total} or a fraction of 1, such as 0.1"
    fix = f"ask for fewer or label more of its {unit}s"
    if isinstance(labelled, bool) or not isinstance(labelled, (int, float)) or not labelled > 0:
        raise DataError(f"labelled is {labelled!r}; {expected}")
    if isinstance(labelled, float) and labelled <= 1:
        count = int(labelled * total + 1e-9)  # 0.29 * 100 is 28.999...
        if count < 1:
            raise DataError(
                f"{found}, which is less than one {unit}; {expected}; ask for a larger share or "
                "name their number"
            )
        return count
    if labelled != int(labelled):
        raise DataError(f"labelled is {labelled}; {expected}")
    if labelled > total:
        raise DataError(f"{found}; {expected}; {fix}")
    return int(labelled)


def draw(names: Sequence[str], count: int, seed: int = SEED) -> list[str]:
    """`count` of the names, drawn with a seed from their sorted order."""
    return random.Random(seed).sample(sorted(names), count)


# Folders


def find_scans(
    path: Path, in_channels: int, channel_of: Callable[[str], tuple[str, int] | None]
) -> tuple[list[Case], list[Finding]]:
    """Scans at `path`, sorted by name, and a fault for each that cannot be used.

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
                for file in _scan_files(path.parent)
                if (channel_of(stem(file)) or ("",))[0] == named[0]
            ]
            return _grouped(beside, in_channels, channel_of)
        if has_suffix(path, DICOM_SUFFIXES):
            return [Case(path.parent.name, (path,))], []
        return [Case(stem(path), (path,))], []
    files = _scan_files(path)
    if files:
        return _grouped(files, in_channels, channel_of)
    folders = (
        [path]
        if dicom_series(path)
        else sorted(entry for entry in path.iterdir() if entry.is_dir() and is_data(entry))
    )
    found: list[tuple[Path, Case]] = []
    problems: list[Finding] = []
    for folder in folders:
        try:
            cases, wrong = _folder_scans(folder, in_channels, channel_of)
        except (DataError, OSError) as error:  # one folder must not hide the others
            cases, wrong = [], findings_of(folder, error)
        found += [(folder, case) for case in cases]
        problems += wrong
    if not found and not problems:
        raise DataError(f"{path}: no scan or image; {HELP}")
    return _unique(_called(found)), problems


def findings_of(path: Path, error: Exception) -> list[Finding]:
    """What an error that was met while files were looked for says of `path`."""
    told = list(error.findings) if isinstance(error, DataError) else []
    return told or [Finding("unreadable", str(path), " ".join(str(error).split()))]


def _folder_scans(
    folder: Path, in_channels: int, channel_of: Callable
) -> tuple[list[Case], list[Finding]]:
    """Scans of one of several folders; label files beside a scan are none."""
    files = _scan_files(folder)
    if not files:
        return ([Case(folder.name, (folder,))] if dicom_series(folder) else []), []
    scans = [file for file in files if not _LABELS.search(stem(file))]
    return _grouped(scans or files, in_channels, channel_of)


# Names that label files have beside a scan: KiTS, TotalSegmentator, LA, and what people write
_LABELS = re.compile(
    r"(?i)(?:^|[-_. ])(?:seg|segmentations?|labels?|labelmap|masks?|gt|ground_?truth|laendo|lawall|"
    r"annotations?)$|^aggregated_"
)


def _called(found: Sequence[tuple[Path, Case]]) -> list[Case]:
    """The cases of folders; those of one name are called after their folder, and after their file
    too where they share that as well.
    """
    counts = Counter(case.name for _, case in found)
    repeated = {name for name, number in counts.items() if number > 1}
    per_folder = Counter(folder for folder, case in found if case.name in repeated)
    cases = []
    for folder, case in found:
        name = case.name
        if name in repeated:
            name = folder.name if per_folder[folder] == 1 else f"{folder.name}_{name}"
        cases.append(dataclasses.replace(case, name=name))
    return cases


def find_images(path: Path, suffixes: Sequence[str], problems: list | None = None) -> list[Case]:
    """The image file at `path`, or those right in the folder, sorted by name; names without suffix
    must differ. problems: takes findings about single files; where it is None, that is raised.
    """
    path = path.absolute()
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; expected {', '.join(suffixes)} files")
    files = (
        [path]
        if path.is_file()
        else sorted(
            file for file in path.iterdir() if has_suffix(file, tuple(suffixes)) and is_data(file)
        )
    )
    if not files:
        raise DataError(f"{path}: no scan or image; expected {', '.join(suffixes)} files")
    cases = []
    for file in files:
        try:
            cases.append(Case(stem(file), (file,)))
        except DataError as error:
            if problems is None:
                raise
            problems += findings_of(file, error)
    return _unique(cases)


def _scan_files(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.iterdir()
        if file.is_file() and has_suffix(file, SUFFIXES) and is_data(file)
    )


def _grouped(
    files: Sequence[Path], in_channels: int, channel_of: Callable
) -> tuple[list[Case], list[Finding]]:
    """Cases of channel files that belong together, and of files that hold a whole scan each."""
    scans: dict[str, dict[int, Path]] = {}
    cases: list[Case] = []
    problems: list[Finding] = []
    for file in files:
        named = channel_of(stem(file))
        if named is None:
            try:
                cases.append(Case(stem(file), (file,)))
            except DataError as error:  # a name that is no plain one
                problems += findings_of(file, error)
        elif named[1] >= 0:
            channels = scans.setdefault(named[0], {})
            if named[1] in channels:
                problems.append(
                    Finding(
                        "channels",
                        str(file),
                        f"channel {named[1]} of '{named[0]}' twice, also in "
                        f"{channels[named[1]].name}",
                        "one file for each channel",
                        "remove one of them",
                        case=named[0],
                    )
                )
            channels[named[1]] = file
    for name, channels in scans.items():
        if sorted(channels) == list(range(in_channels)):
            cases.append(Case(name, tuple(channels[k] for k in range(in_channels))))
        else:
            problems.append(
                Finding(
                    "channels",
                    str(next(iter(channels.values()))),
                    f"'{name}' has the channels {sorted(channels)}, as its file names say",
                    f"{in_channels}, counted from 0: {list(range(in_channels))}",
                    "add the missing files or remove the scan",
                    case=name,
                )
            )
    return _unique(cases), problems


def _unique(cases: Sequence[Case]) -> list[Case]:
    """The cases sorted by name; DataError if two have one name."""
    ordered = sorted(cases, key=lambda case: case.name)
    for first, second in itertools.pairwise(ordered):
        if first.name == second.name:
            raise DataError(
                Finding(
                    "listed twice",
                    str(second.images[0]),
                    f"called '{second.name}' as {first.images[0]} is",
                    "a name of its own for every file, without its suffix",
                    "rename one of them",
                )
            )
    return ordered
