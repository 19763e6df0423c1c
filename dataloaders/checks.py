"""Checks of content: lists against each other, images, labels, masks, and the data set as a whole.

Training and tools/check_data.py read through them alike, so they say the same of a file. A check
notes what it finds in a report; none stops at its first fault.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import h5py
import nibabel as nib
import numpy as np
from PIL import Image

from dataloaders.faults import ERROR, DataError, Finding, Report, check_room, gathering
from dataloaders.volumes import inside

if TYPE_CHECKING:
    from dataloaders.cases import Case

# mm per voxel, and between the axes, beyond which a header is doubted
SMALLEST, LARGEST, RATIO = 0.1, 12.0, 15.0
# degrees between an axis of the scan and of the body beyond which its name is a guess
OBLIQUE = 35.0
HOUNSFIELD = (-200.0, 300.0)  # below lies the air of every CT scan, above its bone or contrast
MOST_HU = 3100.0  # what most voxels of a CT scan stay below; air has -1000, padding up to -3024
# difference of the share of voxels in, below or above the window from the usual one
UNLIKE = 0.5


# Lists that are trained on
TRAINED = {"train", "labelled", "unlabelled"}


# Lists


def check_labelled(
    names: Sequence[str], having: Sequence[str], source: str, unit: str, report: Report
) -> None:
    """A warning where some of the names that are trained on have no label, an error where all of
    them have none.
    """
    without = sorted(set(names) - set(having))
    if without:
        note = report.warning if having else report.error
        note(
            "no label",
            source,
            f"{len(without)} of {len(names)} {unit}s have no label, for example '{without[0]}'",
            "" if having else f"at least one labelled {unit}",
            "they count as unlabelled" if having else "complete the data",
        )


def check_folder(root: Path) -> None:
    """DataError where the folder of the data set is not there."""
    if not root.is_dir():
        raise DataError(
            Finding(
                "list",
                str(root),
                "no such folder",
                "",
                "put the data set there (docs/data.md) or name its folder with --opts "
                "data_root=FOLDER",
            )
        )


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


def check_disjoint(
    splits: dict[str, Sequence["Case"]],
    report: Report | None = None,
    patient: Callable[[str], str] | None = None,
    named: Callable[["Case"], str] | None = None,
) -> None:
    """A fault for each case that is, by name or by file, in two of the lists, and for each patient
    who is. named: what of a case tells the patient, if it is not its name.
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
                    who = patient(named(case) if named else case.name)
                    other_split, other = patients.setdefault(who, (split, case.name))
                    # of one patient, some scans may have labels and others not
                    if other_split != split and {other_split, split} - TRAINED:
                        report.error(
                            "same patient",
                            case.name,
                            f"patient '{who}' is in both the {other_split} list ('{other}') and "
                            f"the {split} list",
                            "",
                            "keep all scans of a patient in one list, or set patient_pattern if "
                            "these are two patients",
                        )


# The data set as a whole


def check_duplicates(
    seen: Iterable[tuple[str, str, Path, Sequence[str]]], report: Report, same_list: str
) -> None:
    """Note images that occur under two names. seen: (split, name, file, digests) of each case;
    several digests: any.

    Between two lists that is an error, also of one name unless the report has it already; within
    one of level `same_list`, of two names. What is trained on is one list, whether labelled or not.
    A pair of names is reported once.
    """
    reported = {finding.file for finding in report.errors}
    owners: dict[str, tuple[str, str, Path]] = {}
    pairs = set()
    for split, name, path, digests in seen:
        for digest in digests:
            other_split, other, file = owners.setdefault(digest, (split, name, path))
            same = split == other_split or {split, other_split} <= TRAINED
            known = other == name and (same or name in reported)
            if known or (other, name) in pairs:
                continue
            pairs.add((other, name))
            lists = split, other_split
            if split == other_split or not same:
                lists = ["train" if part in TRAINED else part for part in lists]
            note = report.error if not same or same_list == ERROR else report.warning
            note(
                "duplicate",
                path,
                f"the same image as {file} ({lists[1]} list), here in the {lists[0]} list",
                "",
                "every scan may be listed once, not under two names",
                split="train" if split in TRAINED else split,
            )


def check_classes(
    ids: Iterable[int],
    classes: Mapping[int, str],
    absent: Sequence[str],
    source: str,
    report: Report,
):
    """Note classes (id -> name) that no label of the training list has, unless they are named in
    `absent`.

    An error: a network learns nothing about such a class, misses it in every case, and the printed
    mean falls by it with nothing to show why. The usual causes are another order of class_names and
    lists that are too short.
    """
    unknown = [name for name in absent if name not in classes.values()]
    if unknown:
        raise DataError(
            f"absent_classes: {unknown} are none of the classes {', '.join(classes.values())}"
        )
    ids = set(ids)
    for number, name in classes.items():
        if number not in ids and name not in absent:
            report.error(
                "absent class",
                source,
                f"no training case has class {number}, '{name}'",
                "each class at least once",
                "mend class_names or the list, or say so with "
                f"--opts \"absent_classes=['{name}']\"",
            )


def check_choice(
    ids: Iterable[int],
    classes: Mapping[int, str],
    absent: Sequence[str],
    split: str,
    report: Report,
) -> None:
    """Note classes (id -> name) that no case has of the list which chooses the best checkpoint.

    An error if it has none: every score is then undefined, and the first checkpoint would stay the
    best. A warning for one that is not named in `absent`: it has no say.
    """
    ids = set(ids)
    missing = [name for number, name in classes.items() if number not in ids]
    if len(missing) == len(classes):
        report.error(
            "absent class",
            f"{split} list",
            f"no case has a voxel of {', '.join(missing)}, so nothing tells which checkpoint is "
            "the best",
            "a labelled voxel",
            "put other cases into this list",
        )
        return
    for name in missing:
        if name not in absent:
            report.warning(
                "absent class",
                f"{split} list",
                f"no case has class '{name}'",
                "each class at least once",
                "it has no say in the choice of the best checkpoint",
            )


def check_ignore_label(ignore: int | None, ids: Mapping[int, str]) -> None:
    """DataError for an id of voxels that nobody labelled which is also that of a class; ids: id of
    label files -> its name.
    """
    if ignore in ids:
        raise DataError(
            f"ignore_label: {ignore} is also the id of {ids[ignore]}; expected an id that no class "
            f"has (these have {_ranges(list(ids))}); store voxels that nobody labelled with another"
        )


def check_annotated(
    case: "Case", split: str, foreign: Sequence[str], told: Sequence[str], report: Report
) -> None:
    """An error for a label that has classes (`foreign`) which its case is said to be without: it
    has those that are `told`.
    """
    if foreign:
        report.error(
            "label ids",
            case.label or case.images[0],
            f"it has '{foreign[0]}', which labelled_classes of this case does not name",
            f"only {', '.join(told)}",
            "name it there, or mend the label",
            split=split,
            case=case.name,
        )


def check_orientations(facts: Mapping[tuple, Mapping], report: Report) -> None:
    """A warning for each case that is stored in another axis order than most: a flipped header
    looks like that. facts: (split, case) -> `native_affine`, where its file has one.
    """
    codes = {}
    for key, found in facts.items():
        if "native_affine" in found:
            codes[key] = "".join(nib.aff2axcodes(np.asarray(found["native_affine"])))
    counts = Counter(codes.values()).most_common()
    if len(counts) < 2 or counts[0][1] == counts[1][1]:
        return
    for (split, case), code in codes.items():
        if code != counts[0][0]:
            report.warning(
                "orientation",
                case.images[0],
                f"stored as {code}",
                f"{counts[0][0]}, as {counts[0][1]} of {len(codes)} cases are",
                "check that the header is right",
                split=split,
                case=case.name,
            )


def check_spacings(facts: Mapping[tuple, Mapping], report: Report) -> None:
    """An error for each case without a label whose voxels are more than twice as large or as small
    as those of all cases with one: the network would see its organs at another size. facts:
    (split, case) -> `ids` of its label, None without one, and `spacing` in mm as it is trained on,
    where that is known.
    """
    known = [found for found in facts.values() if "spacing" in found]
    sizes = [found["spacing"] for found in known if found["ids"] is not None]
    if not sizes:
        return
    low, high = np.min(sizes, axis=0), np.max(sizes, axis=0)
    expected = " to ".join(dict.fromkeys((_millimetres(low), _millimetres(high))))
    for (split, case), found in facts.items():
        if found["ids"] is not None or "spacing" not in found:
            continue
        sides = np.array(found["spacing"])
        if ((sides < low / 2) | (sides > 2 * high)).any():
            report.error(
                "spacing",
                case.images[0],
                f"voxels of {_millimetres(sides)} mm",
                f"about those of the labelled cases, {expected} mm",
                "set spacing, to which all scans are resampled, or take it out",
                split=split,
                case=case.name,
            )


def _millimetres(sides: Iterable[float]) -> str:
    return " x ".join(f"{side:.4g}" for side in sides)


def check_size(
    case: "Case", split: str, shape: Sequence[int], patch_size: Sequence[int], report: Report
) -> None:
    """A warning for a case that is smaller than the patch."""
    advice = "patches are padded with zeros"
    if not split:  # of no list: a scan to be segmented
        advice = (
            "it is padded with zeros; check its voxel size, and that it shows as much of the body "
            "as the scans of the training do"
        )
    if any(side < want for side, want in zip(shape, patch_size)):
        report.warning(
            "small",
            case.images[0],
            f"{' x '.join(map(str, shape))} voxels",
            f"at least the patch, {' x '.join(map(str, patch_size))}",
            advice,
            split=split,
            case=case.name,
        )


def check_foreground(case: "Case", split: str, ids: Iterable[int], report: Report) -> None:
    """A warning for a label that holds nothing but background."""
    if not set(ids) - {0}:
        report.warning(
            "empty label",
            case.label or case.images[0],
            "no foreground",
            "a labelled voxel",
            "check that it is meant so",
            split=split,
            case=case.name,
        )


# Volumes


def check_header(path: Path, affine: np.ndarray, notes: Report) -> None:
    """Warnings about a grid that can hardly be right: it would mislead every distance in mm and
    every reorientation.
    """
    header = getattr(affine, "placed", None)
    check_forms(path, affine, notes)
    affine = np.asarray(affine)
    if header is not None and not header["sform_code"] and not header["qform_code"]:
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
    shown = _millimetres(spacing)
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


def check_forms(path: Path, affine: np.ndarray, notes: Report) -> None:
    """A warning where the two forms of a NIfTI header put the scan at different places."""
    header = getattr(affine, "placed", None)
    if header is None or not header["sform_code"] or not header["qform_code"]:
        return
    try:
        other = header.get_qform()
    except Exception:  # a quaternion of no rotation, which programs that read it refuse
        found = "the quaternion of its header (qform) is no rotation"
        notes.warning("header", path, found, "one", "set it anew, or its code to 0")
        return
    corners = np.array(np.meshgrid(*[(0.0, 1.0)] * 3)).reshape(3, -1) * 100
    difference = header.get_sform() - other
    apart = float(np.abs(difference[:3, :3] @ corners + difference[:3, 3:]).max())
    if not apart <= 0.1 * float(np.linalg.norm(np.asarray(affine)[:3, :3], axis=0).min()):
        notes.warning(
            "header",
            path,
            f"its two forms, sform (code {int(header['sform_code'])}) and qform (code "
            f"{int(header['qform_code'])}), differ by up to {apart:.3g} mm",
            "one place in space",
            "the sform is used here, other programs use the qform; results keep both",
        )


def check_hounsfield(path: Path, image: np.ndarray, window: Sequence[float], notes: Report) -> None:
    """A warning about a scan that can hardly be in Hounsfield units, where a window of those is
    set (it begins below 0).

    image: any shape. An offset, a scale of 0..1 or 0..255, and masked scans have nothing as dark
    as air; twice the offset leaves nothing bright.
    """
    if window[0] >= 0:
        return
    low, high = float(image.min()), float(image.max())
    found = ""
    if low > HOUNSFIELD[0]:
        found = f"nothing is below {HOUNSFIELD[0]:g} (values {low:.4g}..{high:.4g})"
    elif high < HOUNSFIELD[1]:
        found = f"nothing is above {HOUNSFIELD[1]:g} (values {low:.4g}..{high:.4g})"
    elif np.median(np.abs(image.ravel()[:: max(1, image.size // 10**5)])) > MOST_HU:
        found = f"most values are beyond those of a CT scan (values {low:.4g}..{high:.4g})"
    if found:
        notes.warning(
            "range",
            path,
            found,
            f"Hounsfield units, as the window {window[0]:g}..{window[1]:g} is",
            "is the scan stored with an offset, scaled, masked, or no CT? convert it to HU, or set "
            "intensity and window",
        )


def check_brightness(facts: Mapping[tuple, Mapping], report: Report) -> None:
    """A warning for each scan of which the window shows quite another part than of most others.
    facts: (split, case) -> `shares` below, within and above the window, where there is one.
    """
    shares = {key: found["shares"] for key, found in facts.items() if found.get("shares")}
    if len(shares) < 3:
        return
    usual = np.median(list(shares.values()), axis=0)
    for (split, case), own in shares.items():
        if np.abs(np.array(own) - usual).max() > UNLIKE:
            shown, others = (
                ", ".join(f"{100 * share:.0f} %" for share in each) for each in (own, usual)
            )
            report.warning(
                "range",
                case.images[0],
                f"{shown} of its values lie below, in and above the window",
                f"about {others}, as of most scans",
                "check that it is in the unit of the others",
                split=split,
                case=case.name,
            )


def check_kept(
    path: Path,
    before: Mapping[int, float],
    after: Mapping[int, float],
    names: Mapping[int, str],
    cause: str,
    fix: str,
    notes: Report,
    least: float = 1.0,
) -> None:
    """A warning for labelled voxels that preprocessing takes away.

    before, after: of each id, how many of its voxels there were, and are left. least: share of them
    that has to be left.
    """
    lost = {
        k: 1 - after[k] / before[k]
        for k in names
        if before.get(k) and after[k] < least * before[k] - 1e-6
    }
    if lost:
        shown = ", ".join(f"{100 * share:.3g} % of '{names[k]}'" for k, share in lost.items())
        notes.warning(
            "lost labels", path, f"{cause}, of its labelled voxels: {shown}", "all are kept", fix
        )


def check_image(
    case: "Case",
    read: Sequence[tuple[Path, np.ndarray, np.ndarray]],
    in_channels: int,
    faults: Report,
) -> None:
    """Sizes, channels, types and intensities. read: (file, voxels, affine) of those files of the
    case that could be read.
    """
    first = read[0] if read else None
    for path, voxels, affine in read[1:]:
        if voxels.shape != first[1].shape or not np.allclose(affine, first[2], atol=1e-3):
            faults.error(
                "shape",
                path,
                f"shape {voxels.shape} or affine differs from {first[0].name} {first[1].shape}",
                "",
                "all channels of a case must be on one grid",
            )
    for path, voxels, _ in read:
        check_voxels(path, voxels, len(case.images) == 1, faults)
    if len(read) < len(case.images):
        return
    shape = first[1].shape
    if len(read) > 1:
        channels, whole = len(read), len(shape) == 3
    else:
        channels, whole = (shape[3] if len(shape) == 4 else 1), len(shape) in (3, 4)
    if not whole or channels != in_channels or 0 in shape:
        faults.error(
            "channels",
            case.images[0],
            f"{channels} channel(s) and shape {shape}"
            if len(shape) in (3, 4)
            else f"{len(shape)} axes, shape {shape}",
            f"{in_channels} channel(s) of a 3D scan",
            "set in_channels or mend the data list",
        )


def check_voxels(path: Path, voxels: np.ndarray, stacked: bool, faults: Report) -> None:
    """The values of a file. stacked: a fourth axis is that of channels."""
    if voxels.dtype.kind not in "fiub":
        found = f"voxels of type {voxels.dtype}"
        faults.error("type", path, found, "real numbers", "convert the scan")
        return
    if voxels.dtype.kind == "f" and not np.isfinite(voxels).all():
        _report_nonfinite(path, voxels, faults)
        return
    channels = np.moveaxis(voxels, -1, 0) if stacked and voxels.ndim == 4 else (voxels,)
    for channel in channels:
        if channel.size and channel.min() == channel.max():
            found = f"constant image (every voxel is {channel.min():g})"
            faults.error("constant", path, found, "", "the scan is empty")


def _report_nonfinite(path: Path, voxels: np.ndarray, faults: Report) -> None:
    bad = int(voxels.size - np.isfinite(voxels).sum())
    found = f"{bad} voxels are NaN or infinite"
    faults.error("not finite", path, found, "finite intensities", "repair the scan")


def without_label(case: "Case") -> DataError:
    """The error of a case that must have a label and has none."""
    return DataError(
        Finding(
            "no label",
            str(case.images[0]),
            f"case '{case.name}' has no label",
            "one: it is to be trained on as labelled, or scored",
            "restore it, or take the case out of the list",
        )
    )


def nothing_labelled(case: "Case") -> DataError:
    """The error of a scored case whose label has a class nowhere."""
    return DataError(
        Finding(
            "no label",
            str(case.label),
            "every voxel is marked as not labelled",
            "some that are: the case is scored",
            "take the case out of the list",
        )
    )


def check_ids(
    path: Path, label: np.ndarray, allowed: Sequence[int], faults: Report, ignore: int | None = None
) -> np.ndarray:
    """-> the ids that occur, of which each must be one of `allowed`, or `ignore`."""
    if label.dtype.kind not in "fiub":
        found = f"voxels of type {label.dtype}"
        faults.error("type", path, found, "whole numbers", "convert the label")
        return np.empty(0, int)
    ids = np.unique(label)
    wrong = [value for value in ids.tolist() if value not in allowed and value != ignore]
    if wrong:
        ignored = "" if ignore is None else f", or {ignore} for voxels that nobody labelled"
        faults.error(
            "label ids",
            path,
            f"label ids {wrong[:6]}",
            f"only {_ranges(allowed)}{ignored}",
            "mend the label or class_names",
        )
    return ids


def check_geometry(
    case: "Case",
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
        shown = [_millimetres(size) for size in sizes]
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


# HDF5 files


def check_h5(path: Path, file, ndim: int, index: int | None, faults: Report) -> list[str]:
    """Keys, shapes and types of an open HDF5 file -> those of `image` and `label` that hold
    numbers.
    """
    keys = [key for key in ("image", "label") if is_array(path, file, key)]
    if "image" not in keys:
        raise DataError(
            Finding(
                "keys",
                str(path),
                f"no array 'image', found {sorted(file)}",
                "the keys 'image' and 'label', or 'image' alone without a label",
                "convert the case again",
            )
        )
    shapes = [file[key].shape for key in keys]
    if len(set(shapes)) > 1 or len(shapes[0]) != ndim:
        found = ", ".join(f"{key} has shape {shape}" for key, shape in zip(keys, shapes))
        expected = f"the same {ndim} axes for both"
        faults.error("shape", path, found, expected, "convert the case again")
    elif index is not None and index >= shapes[0][0]:
        found = f"{shapes[0][0]} slices"
        faults.error("shape", path, found, f"at least {index + 1}", "copy the file again")
    numeric = [key for key in keys if file[key].dtype.kind in "fiub"]
    for key in set(keys) - set(numeric):
        found = f"'{key}' is of type {file[key].dtype}"
        faults.error("type", path, found, "numbers", "convert the case again")
    return numeric


def is_array(path: Path, file: h5py.File, key: str) -> bool:
    """Whether `key` of an open HDF5 file is an array that the file itself holds; DataError where it
    would be read from elsewhere, whatever is there, or needs more memory than there is.
    """
    link = file.get(key, getlink=True)
    if link is None:
        return False
    elsewhere = "" if isinstance(link, h5py.HardLink) else "a link"
    array = None if elsewhere else file[key]
    if isinstance(array, h5py.Dataset):
        if array.external:
            elsewhere = f"stored in '{array.external[0][0]}'"
        elif array.is_virtual:
            elsewhere = "made of other arrays"
        else:
            check_room(path, array.shape or (), array.dtype.itemsize)
    if elsewhere:
        raise DataError(
            Finding(
                "outside",
                str(path),
                f"'{key}' is {elsewhere}",
                "an array in the file itself",
                "copy the array into the file",
            )
        )
    return isinstance(array, h5py.Dataset)


def check_h5_types(path: Path, arrays: Mapping[str, np.ndarray], notes: Report) -> None:
    """Warnings about types that hold the values, but are not those of the released files."""
    if arrays["image"].dtype.kind != "f":
        notes.warning(
            "type",
            path,
            f"'image' is of type {arrays['image'].dtype}",
            "floating point, normalised",
            "check that intensities are normalised as the data set's are",
        )
    if "label" in arrays and arrays["label"].dtype.kind == "f":
        notes.warning(
            "type",
            path,
            f"'label' is of type {arrays['label'].dtype}",
            "whole numbers",
            "store ids as 8-bit integers",
        )


def check_intensities(
    path: Path, image: np.ndarray, limits: tuple[float, float] | None, faults: Report
) -> None:
    """Finite values with some contrast, within `limits`."""
    if not np.isfinite(image).all():
        _report_nonfinite(path, image, faults)
    elif image.size == 0 or image.min() == image.max():
        faults.error(
            "constant",
            path,
            f"constant image, shape {image.shape}",
            "",
            "the scan is empty, take it out of the lists",
        )
    elif limits and not limits[0] - 1e-6 <= image.min() <= image.max() <= limits[1] + 1e-6:
        faults.error(
            "range",
            path,
            f"intensities {image.min():.4g}..{image.max():.4g}",
            f"{limits[0]:g}..{limits[1]:g}",
            "scale each volume with (x - min) / (max - min)",
        )


# Photographs and masks


def check_pages(path: Path, image: Image.Image) -> None:
    """DataError for a file of several pages, of which one alone would be seen."""
    # a JPEG of a phone may hold previews or a second view after the picture itself
    pages = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if pages > 1:
        found, fix = f"{pages} pages or frames", "store each in a file of its own"
        raise DataError(Finding("shape", str(path), found, "one image", fix))


def check_depth(path: Path, image: Image.Image) -> None:
    """DataError for pixels of more than 8 bits, asked before they are decoded: some readers cut
    them to their upper half.
    """
    # of a BMP file ;16 counts the bits of all channels
    raw = " ".join(str(part[3]) for part in image.tile if image.format != "BMP")
    if image.mode[0] in "IF" or ";16" in raw or ";12" in raw or ";32" in raw:
        deep = image.mode if image.mode[0] in "IF" else f"{image.mode}, more than 8 bits"
        raise DataError(
            Finding(
                "type",
                str(path),
                f"pixels of mode {deep}",
                "8 bits per channel",
                "convert the image",
            )
        )


def check_transparency(path: Path, image: Image.Image, notes: Report) -> None:
    """A warning about an image of which viewers do not show all that a network sees."""
    if image.has_transparency_data:
        share = np.mean(np.asarray(image.convert("RGBA"))[..., 3] < 255)
        if share:
            notes.warning(
                "type",
                path,
                f"{100 * share:.3g} % of the pixels are transparent, their hidden colours are used",
                "opaque pixels",
                "store the image without transparency",
            )


def grey_mask(path: Path, mask: Image.Image) -> Image.Image:
    """The mask in mode L. Where it is drawn as transparency, in one colour, alpha is the mask;
    DataError where colours and alpha say different things.
    """
    if not mask.has_transparency_data:
        return mask.convert("L")
    coloured = mask.convert("RGBA")
    alpha, grey = coloured.getchannel("A"), coloured.convert("RGB").convert("L")
    low, high = alpha.getextrema()
    if low == high == 255:
        return grey
    shades = np.asarray(grey)
    shown = shades[np.asarray(alpha) > 127]
    one_colour = shown.size > 0 and shown.min() == shown.max()
    # dark on transparent is the mask too, unless what is hidden is bright: either could be meant
    if low < high and one_colour and (shown[0] > 127 or shades.max() <= 127):
        return alpha
    raise DataError(
        Finding(
            "mask values",
            str(path),
            "its transparency and its colours show different masks",
            "0 and 255 without transparency, or one colour on transparent",
            "export the mask as a grey image",
        )
    )


def check_mask(
    path: Path, mask: Image.Image, lossy: bool, faults: Report, ignore: int | None = None
) -> None:
    """What the grey values of a mask tell. lossy: JPEG, where values beside 0 and 255 are to be
    expected. ignore: the value of pixels that nobody labelled.
    """
    counts = np.asarray(mask.histogram())
    if ignore is not None and lossy:
        faults.error(
            "mask values",
            path,
            f"a JPEG, whose values are not exact, with ignore_label {ignore}",
            "masks without loss, such as PNG",
            "store the masks again from their source, or leave ignore_label out",
        )
        return
    if ignore is not None:
        counts[ignore] = 0
    if not counts.any():  # nobody labelled a pixel
        return
    high = int(np.flatnonzero(counts)[-1])
    if 0 < high <= 127:
        faults.error(
            "mask values",
            path,
            f"its largest value is {high}",
            "0 and 255 (cut at half)",
            "multiply ids by 255",
        )
        return
    inside = np.asarray(mask) > 127
    if ignore is not None:
        inside &= np.asarray(mask) != ignore
    border = np.concatenate([inside[0], inside[-1], inside[:, 0], inside[:, -1]])
    if border.all():
        faults.warning(
            "mask values",
            path,
            "the whole image is foreground"
            if inside.all()
            else f"the whole border and {100 * inside.mean():.3g} % of the pixels are foreground",
            "a background",
            "check that the mask is whole, and not inverted",
        )
    # compression moves a value by less than 32
    between = counts[32:224] if lossy else counts[1:255]
    share = between.sum() / counts.sum()
    levels = np.flatnonzero(between) + 1
    if not lossy and share > 0.005 and len(levels) <= 8:  # a blurred border has many
        faults.error(
            "mask values",
            path,
            f"values {levels.tolist()} in {100 * share:.1f} % of the pixels",
            "0 and 255 alone",
            "masks are binary: map the ids of several classes to 0 and 255",
        )
    elif share > (0.02 if lossy else 0.0):
        faults.warning(
            "mask values",
            path,
            f"{100 * share:.1f} % of the pixels lie between background and foreground",
            "0 and 255",
            "masks are cut at half, 128 and above is foreground",
        )
