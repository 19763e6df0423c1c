"""What a data set is made of: cases, decathlon-style lists, and files read with checks."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from dataloaders.faults import (
    CaseNotes,
    DataError,
    Finding,
    Report,
    content_digest,
    gathering,
    no_file,
)
from dataloaders.volumes import NIFTI_SUFFIXES, has_suffix, read_volume, stem

SECTIONS = ("training", "validation", "test", "testing")
# mm per voxel, and between the axes, beyond which a header is doubted
SMALLEST, LARGEST, RATIO = 0.1, 12.0, 15.0
# degrees between an axis of the scan and of the body beyond which its name is a guess
OBLIQUE = 35.0
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


@dataclass(frozen=True)
class Case:
    """One scan: its name, the image files (one per channel, or one file) and the label file, if
    there is one.

    Files are named after cases, so a name with a path in it is refused: it could lead out of the
    output folder.
    """

    name: str
    images: tuple[Path, ...]
    label: Path | None = None

    def __post_init__(self) -> None:
        if self.name in ("", ".", "..") or any(
            c in "/\\" or ord(c) < 32 or ord(c) == 127 for c in self.name
        ):
            raise DataError(
                Finding(
                    "outside",
                    str(self.images[0] if self.images else self.name),
                    f"the case is called {self.name!r}",
                    "a plain file name, without slashes and control characters",
                    "rename the file or mend the list",
                )
            )


def inside(path: str | Path, root: str | Path) -> bool:
    """Whether a path, as it is written, stays in `root`. Links are not followed: they are how a
    user keeps data.
    """
    path, root = os.path.abspath(path), os.path.abspath(root)
    return path == root or path.startswith(root.rstrip(os.sep) + os.sep)


def check_inside(
    path: Path, root: Path, source: str | Path, report: Report, allow_outside: bool
) -> bool:
    """Whether `path`, listed in `source`, may be read: it lies in `root`, or the user allows
    others.
    """
    if allow_outside or inside(path, root):
        return True
    report.error(
        "outside",
        source,
        f"lists '{path}', which is not in the data root",
        f"a file in {root}",
        "move or link the file there, or allow it with --allow-outside",
    )
    return False


def read_datalist(
    root: Path, datalist: str, report: Report | None = None, allow_outside: bool = False
) -> dict[str, list[Case]]:
    """The lists of a decathlon JSON (`training`, `validation`, `test`, ...), paths resolved against
    its folder.

    Entries are {"image": file or [files], "label": file}; the public downloads also list unlabelled
    test images as plain names. A case is called after its image file, or after the folder of its
    channel files. report: takes the faults, and entries without one are returned; where it is None,
    they are raised together.
    """
    path = root / datalist
    sections: dict[str, list[Case]] = {}
    with gathering(report) as report:
        content = None
        if check_inside(path, root, f"datalist {path.name}", report, allow_outside):
            with report.catching():
                content = read_decathlon(path)
        for section, entries in (content or {}).items():
            if section not in SECTIONS or not isinstance(entries, list):
                continue
            cases = []
            for index, entry in enumerate(entries):
                with report.catching():
                    case = _entry(path, section, index, entry)
                    files = [*case.images, case.label] if case.label else case.images
                    if all(
                        [check_inside(file, root, path, report, allow_outside) for file in files]
                    ):
                        cases.append(case)
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
                "data_root=FOLDER",
            )
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
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


def _entry(path: Path, section: str, index: int, entry: object) -> Case:
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
    # Several channel files are named CASE-t1c, CASE-t1n, ...: the folder carries the case's name.
    name = Path(images[0]).parent.name if len(images) > 1 else stem(images[0])
    return Case(
        name, tuple(path.parent / image for image in images), path.parent / label if label else None
    )


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
            re.split(r"(?:^|(?<=\s))#", line)[0].strip() for line in (content or "").splitlines()
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


def patient_function(pattern: str) -> Callable[[str], str]:
    """Case name -> patient. pattern: a regular expression whose group 1 is the patient; '': the
    usual conventions.

    A name that does not match is a patient of its own.
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

    def patient(name: str) -> str:
        return next(
            (match[1] for match in (p.fullmatch(name) for p in patterns) if match and match[1]),
            name,
        )

    return patient


def check_disjoint(
    splits: dict[str, Sequence[Case]],
    report: Report | None = None,
    patient: Callable[[str], str] | None = None,
) -> None:
    """A fault for each case that is, by name or by file, in two of the lists, and for each patient
    who is.
    """
    owner: dict[str, str] = {}
    patients: dict[str, tuple[str, str]] = {}
    with gathering(report) as report:
        for split, cases in splits.items():
            for case in cases:
                keys = [case.name, *(str(path.resolve()) for path in case.images)]
                twice = next((key for key in keys if owner.setdefault(key, split) != split), None)
                if twice:
                    report.error(
                        "two lists",
                        twice,
                        f"'{case.name}' is in both the {owner[twice]} and the {split} list "
                        f"({twice})",
                        "every case in one list only",
                        "take it out of one of them",
                    )
                elif patient:
                    who = patient(case.name)
                    other_split, other = patients.setdefault(who, (split, case.name))
                    if other_split != split:
                        report.error(
                            "same patient",
                            case.name,
                            f"patient '{who}' is in both the {other_split} list ('{other}') and "
                            f"the {split} list",
                            "",
                            "keep all scans of a patient in one list, or set patient_pattern if "
                            "these are two patients",
                        )


def check_header(path: Path, affine: np.ndarray, notes: Report) -> None:
    """Warnings about a grid that can hardly be right: it would mislead every distance in mm and
    every reorientation.
    """
    header = nib.load(path).header if has_suffix(path, NIFTI_SUFFIXES) else {}
    if "sform_code" in header and not header["sform_code"] and not header["qform_code"]:
        notes.warning(
            "header",
            path,
            "the header gives no place in space (sform and qform codes are 0)",
            "a coded affine",
            "convert the scan again from its source, or make sure that all cases are stored in one "
            "axis order",
        )
    elif np.allclose(affine, np.eye(4), atol=1e-6):
        notes.warning(
            "header",
            path,
            "the affine is the identity",
            "voxel sizes and a place in mm",
            "check that a conversion has not lost the header",
        )
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    shown = " x ".join(f"{side:.4g}" for side in spacing)
    if spacing.min() < SMALLEST or spacing.max() > LARGEST or spacing.max() > RATIO * spacing.min():
        notes.warning(
            "spacing",
            path,
            f"voxels of {shown} mm",
            f"{SMALLEST} to {LARGEST} mm, sides that differ less than {RATIO:g} times",
            "check the header's unit, which must be mm",
        )
    aligned = np.abs(affine[:3, :3] / spacing).max(0)  # cosine to the nearest axis of the body
    angle = float(np.degrees(np.arccos(np.clip(aligned.min(), 0, 1))))
    if angle > OBLIQUE:
        notes.warning(
            "orientation",
            path,
            f"an axis lies {angle:.0f} degrees off the body's",
            f"at most {OBLIQUE:g}",
            "reorientation can only take the nearest axis; resample the scan",
        )


def read_image(
    case: Case, in_channels: int, notes: CaseNotes | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Image (C, H, W, D) float32 and affine of a case; checks size, channels, finiteness and
    contrast.

    DataError with all faults that were found; warnings, grid and digest of the image go to `notes`.
    """
    faults, read = Report(), []
    for path in case.images:
        with faults.catching():
            read.append((path, *read_volume(path)))
    first, *others = read or [None]
    if first is not None and notes is not None:
        shape = first[1].shape
        shape = shape[:3] if len(case.images) == 1 else shape
        notes.grid = (shape, first[2]) if len(shape) == 3 else notes.grid
    for path, volume, affine in others:
        if volume.shape != first[1].shape or not np.allclose(affine, first[2], atol=1e-3):
            faults.error(
                "shape",
                path,
                f"shape {volume.shape} or affine differs from {first[0].name} {first[1].shape}",
                "",
                "all channels of a case must be on one grid",
            )
    for path, volume, _ in read:
        if volume.dtype.kind not in "fiub":
            faults.error(
                "type", path, f"voxels of type {volume.dtype}", "real numbers", "convert the scan"
            )
            continue
        if volume.dtype.kind == "f" and not np.isfinite(volume).all():
            bad = int(volume.size - np.isfinite(volume).sum())
            faults.error(
                "not finite",
                path,
                f"{bad} voxels are NaN or infinite",
                "finite intensities",
                "repair the scan",
            )
            continue
        # a single file of four axes has its channels along the fourth
        whole = volume.ndim != 4 or len(case.images) > 1
        for channel in (volume,) if whole else np.moveaxis(volume, -1, 0):
            if channel.size and channel.min() == channel.max():
                faults.error(
                    "constant",
                    path,
                    f"constant image (every voxel is {channel.min():g})",
                    "",
                    "the scan is empty",
                )
    if len(read) == len(case.images):
        shape = first[1].shape
        channels, axes = (
            (len(read), len(shape) + 1)
            if len(read) > 1
            else (shape[3] if len(shape) == 4 else 1, 4)
        )
        if (
            (len(read) == 1 and len(shape) not in (3, 4))
            or axes != 4
            or channels != in_channels
            or 0 in shape
        ):
            faults.error(
                "channels",
                case.images[0],
                f"{channels} channel(s) and shape {shape}",
                f"{in_channels} channel(s) of a 3D scan",
                "set in_channels or mend the data list",
            )
    faults.stop()
    image = np.stack([volume for _, volume, _ in read]) if others else first[1]
    if not others:
        image = np.moveaxis(image, -1, 0) if image.ndim == 4 else image[None]
    image = np.ascontiguousarray(image, dtype=np.float32)
    if notes is not None:
        for path, _, affine in read:
            check_header(path, affine, notes)
        notes.content.append(content_digest(image))
    return image, first[2]


def read_label(
    case: Case,
    allowed: Sequence[int],
    image_shape: Sequence[int],
    affine: np.ndarray | None,
    notes: CaseNotes | None = None,
) -> np.ndarray:
    """Label ids (H, W, D) uint8 of a case; checks geometry against the image, and that ids are in
    `allowed`.

    affine: None where the image could not be read; the ids are then checked alone. DataError with
    all faults that were found; warnings go to `notes`.
    """
    if case.label is None:
        raise DataError(
            Finding(
                "no label",
                str(case.images[0]),
                f"case '{case.name}' has no label in the data list",
                "",
                "only labelled cases can be used here",
            )
        )
    faults = Report()
    label, label_affine = read_volume(case.label)
    if label.ndim == 4 and label.shape[-1] == 1:
        label = label[..., 0]
    if affine is not None:
        _check_geometry(case, label.shape, label_affine, tuple(image_shape), affine, faults)
    if label.dtype.kind not in "fiub":
        faults.error(
            "type",
            case.label,
            f"voxels of type {label.dtype}",
            "whole numbers",
            "convert the label",
        )
    else:
        ids = np.unique(label)
        wrong = [value for value in ids.tolist() if value not in allowed]
        if wrong:
            faults.error(
                "label ids",
                case.label,
                f"label ids {wrong[:6]}",
                f"only {_ranges(allowed)}",
                "mend the label or class_names",
            )
    faults.stop()
    if notes is not None:
        if not ids.any():
            notes.warning(
                "empty label",
                case.label,
                "no foreground",
                "a labelled voxel",
                "check that it is meant so",
            )
        notes.ids |= {int(value) for value in ids}
    return label.astype(np.uint8)


def _check_geometry(
    case: Case,
    shape: tuple[int, ...],
    label_affine: np.ndarray,
    image_shape: tuple[int, ...],
    affine: np.ndarray,
    faults: Report,
) -> None:
    """The label's grid against the image's. The most telling of the differences is reported, not
    their consequences.
    """
    name = case.images[0].name
    if tuple(shape) != image_shape:
        faults.error(
            "shape",
            case.label,
            f"shape {tuple(shape)}, but its image {name} has {image_shape}",
            "",
            "image and label must be on one grid",
        )
        return
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in image_shape])).reshape(3, -1)
    apart = np.abs(
        (label_affine - affine)[:3, :3] @ corners + (label_affine - affine)[:3, 3:]
    ).max()
    sizes = [np.linalg.norm(grid[:3, :3], axis=0) for grid in (label_affine, affine)]
    if apart <= 0.1 * float(sizes[1].min()):
        return
    codes = ["".join(nib.aff2axcodes(grid)) for grid in (label_affine, affine)]
    place = f"its affine puts a corner {apart:.2f} mm away from the image's ({name})"
    fix = "copy the image's header to the label if the voxels do match"
    if codes[0] != codes[1]:
        found = f"its axes are {codes[0]}; {place}"
        faults.error("orientation", case.label, found, f"{codes[1]}, the same affine", fix)
    elif not np.allclose(*sizes, rtol=1e-3):
        shown = [" x ".join(f"{side:.4g}" for side in size) for size in sizes]
        faults.error(
            "spacing",
            case.label,
            f"voxels of {shown[0]} mm; {place}",
            f"{shown[1]}, the same affine",
            fix,
        )
    else:
        faults.error("affine", case.label, place, "the same affine", fix)


def _ranges(values: Sequence[int]) -> str:
    values = sorted(values)
    if values == list(range(values[0], values[-1] + 1)) and len(values) > 2:
        return f"{values[0]}..{values[-1]}"
    return ", ".join(map(str, values))


def file_digest(path: Path, known: dict[str, list]) -> str:
    """SHA-256 of a file's content; `known` remembers it by path, size and modification time."""
    if not path.is_file():
        raise DataError(no_file(path))
    key, status = str(path.resolve()), path.stat()
    entry = known.get(key)
    if entry and entry[:2] == [status.st_size, status.st_mtime_ns]:
        return entry[2]
    with path.open("rb") as file:
        value = hashlib.file_digest(file, "sha256").hexdigest()
    known[key] = [status.st_size, status.st_mtime_ns, value]
    return value
