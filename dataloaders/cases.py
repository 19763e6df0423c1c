"""What a data set is made of: cases, decathlon-style lists, and files read with checks."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataloaders.volumes import DataError, read_volume, stem


@dataclass(frozen=True)
class Case:
    """One scan: its name, the image files (one per channel, or one file) and the label file, if there is one."""

    name: str
    images: tuple[Path, ...]
    label: Path | None = None


def read_datalist(root: Path, datalist: str) -> dict[str, list[Case]]:
    """The lists of a decathlon JSON (`training`, `validation`, `test`, ...), paths resolved against its folder.

    Entries are {"image": file or [files], "label": file}; the public downloads also list unlabelled test images as
    plain names. A case is called after its image file, or after the folder of its channel files.
    """
    path = root / datalist
    content = read_decathlon(path)
    sections: dict[str, list[Case]] = {}
    for section, entries in content.items():
        if section not in ("training", "validation", "test", "testing") or not isinstance(entries, list):
            continue
        name = "test" if section == "testing" else section
        sections[name] = [_entry(path, section, index, entry) for index, entry in enumerate(entries)]
    if not sections.get("training"):
        raise DataError(f"{path}: the list 'training' is missing or empty; expected entries with 'image' and 'label'")
    for section, cases in sections.items():
        names = [case.name for case in cases]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise DataError(
                f"{path}: '{section}' has {len(repeated)} case names more than once, for example '{repeated[0]}'; "
                f"every scan needs a file name (with several channel files: a folder) of its own"
            )
    return sections


def read_json(path: Path, kind: type = dict, expected: str = "an object with a list 'training'"):
    """The object (or what `kind` says) in a data set's JSON file; DataError if it is missing or malformed."""
    if not path.is_file():
        raise DataError(
            f"{path}: no such data list; put the data set there (docs/data.md) or name its folder with "
            f"--opts data_root=FOLDER"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, kind):
        raise DataError(f"{path}: expected {expected}, got {type(content).__name__}")
    return content


def read_decathlon(path: Path) -> dict:
    """The object in a decathlon JSON; DataError if it is nnU-Net's."""
    content = read_json(path)
    if "channel_names" in content:
        raise DataError(f"{path}: in the style of nnU-Net v2 ('channel_names'); set format: nnunet")
    return content


def read_class_names(path: Path) -> tuple[str, ...]:
    """Class names by id, as a decathlon JSON says: "labels": {"0": "background", "1": "liver"}."""
    labels = read_decathlon(path).get("labels")
    if not isinstance(labels, dict) or sorted(labels) != sorted(map(str, range(max(len(labels), 2)))):
        raise DataError(
            f"{path}: 'labels' is {labels!r}, expected a name for each id, none left out: "
            f'{{"0": "background", "1": "liver"}}; mend it, or set class_names in the configuration'
        )
    return tuple(str(labels[str(k)]) for k in range(len(labels)))


def read_num_channels(path: Path) -> int:
    """How many channels the scans have, as a decathlon JSON says: "modality": {"0": "T1", "1": "T2"}; 1 without it."""
    modality = read_decathlon(path).get("modality", "unknown")
    modality = {"0": modality} if isinstance(modality, str) else modality
    if not isinstance(modality, (dict, list)) or not modality:
        raise DataError(
            f"{path}: 'modality' is {modality!r}, expected a name for each channel, such as "
            f'{{"0": "T1", "1": "T2"}}; mend it, or set in_channels in the configuration'
        )
    return len(modality)


def _entry(path: Path, section: str, index: int, entry: object) -> Case:
    if isinstance(entry, str):
        entry = {"image": entry}
    images = entry.get("image") if isinstance(entry, dict) else None
    images = [images] if isinstance(images, str) else images
    label = entry.get("label") if isinstance(entry, dict) else None
    well_formed = isinstance(images, list) and images and all(isinstance(image, str) for image in images)
    if not well_formed or not isinstance(label, (str, type(None))):
        raise DataError(
            f"{path}: entry {index} of '{section}' is {entry!r}; expected "
            f'{{"image": "imagesTr/x.nii.gz", "label": "labelsTr/x.nii.gz"}} (image may be a list of files)'
        )
    # Several channel files are named CASE-t1c, CASE-t1n, ...: the folder carries the case's name.
    name = Path(images[0]).parent.name if len(images) > 1 else stem(images[0])
    return Case(name, tuple(path.parent / image for image in images), path.parent / label if label else None)


def read_split(folder: Path, name: str) -> list[str] | None:
    """Case names in `folder/name.txt`, one per line, '#' starts a comment; None if there is no such file."""
    path = folder / f"{name}.txt"
    if not path.is_file():
        return None
    lines = (line.split("#", 1)[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    names = [line for line in lines if line]
    if not names:
        raise DataError(f"{path}: the list is empty; remove the file or name at least one case")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DataError(f"{path}: listed twice: {', '.join(repeated[:5])}; each case may stand once")
    return names


def select(cases: Iterable[Case], names: Sequence[str], source: str) -> list[Case]:
    """The cases called `names`, in that order; DataError naming those that do not exist."""
    by_name = {case.name: case for case in cases}
    unknown = [name for name in names if name not in by_name]
    if unknown:
        known = ", ".join(list(by_name)[:3])
        raise DataError(
            f"{source}: {len(unknown)} of {len(names)} cases are not in the data list, for example "
            f"'{unknown[0]}'; names look like {known}"
        )
    return [by_name[name] for name in names]


def check_disjoint(splits: dict[str, Sequence[Case]]) -> None:
    """DataError if a case, by name or by file, is in two of the lists."""
    owner: dict[str, str] = {}
    for split, cases in splits.items():
        for case in cases:
            for key in (case.name, *(str(path.resolve()) for path in case.images)):
                if owner.setdefault(key, split) != split:
                    raise DataError(
                        f"'{case.name}' is in both the {owner[key]} and the {split} list ({key}); "
                        f"every case may be in one list only"
                    )


def read_image(case: Case, in_channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Image (C, H, W, D) float32 and affine of a case; checks size, channels, finiteness and contrast."""
    volumes, affines = zip(*(read_volume(path) for path in case.images))
    for path, volume, affine in zip(case.images[1:], volumes[1:], affines[1:]):
        if volume.shape != volumes[0].shape or not np.allclose(affine, affines[0], atol=1e-3):
            raise DataError(
                f"{path}: shape {volume.shape} or affine differs from {case.images[0].name} {volumes[0].shape}; "
                f"all channels of a case must be on one grid"
            )
    image = np.stack(volumes) if len(volumes) > 1 else volumes[0]
    if len(volumes) == 1:
        image = np.moveaxis(image, -1, 0) if image.ndim == 4 else image[None]
    if image.ndim != 4 or image.shape[0] != in_channels:
        raise DataError(
            f"{case.images[0]}: {image.shape[0]} channel(s) and shape {volumes[0].shape}, expected {in_channels} "
            f"channel(s) of a 3D scan; set in_channels or mend the data list"
        )
    image = np.ascontiguousarray(image, dtype=np.float32)
    for path, channel in zip(case.images * in_channels, image):
        if not np.isfinite(channel).all():
            bad = int(np.size(channel) - np.isfinite(channel).sum())
            raise DataError(f"{path}: {bad} voxels are NaN or infinite; expected finite intensities, repair the scan")
        if channel.min() == channel.max():
            raise DataError(f"{path}: constant image (every voxel is {channel.min():g}); the scan is empty")
    return image, affines[0]


def read_label(case: Case, allowed: Sequence[int], image_shape: Sequence[int], affine: np.ndarray) -> np.ndarray:
    """Label ids (H, W, D) uint8 of a case; checks geometry against the image, and that ids are in `allowed`."""
    if case.label is None:
        raise DataError(f"case '{case.name}' has no label in the data list; only labelled cases can be used here")
    label, label_affine = read_volume(case.label)
    if label.ndim == 4 and label.shape[-1] == 1:
        label = label[..., 0]
    if tuple(label.shape) != tuple(image_shape):
        raise DataError(
            f"{case.label}: shape {label.shape}, but its image {case.images[0].name} has {tuple(image_shape)}; "
            f"image and label must be on one grid"
        )
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in image_shape])).reshape(3, -1)
    apart = np.abs((label_affine - affine)[:3, :3] @ corners + (label_affine - affine)[:3, 3:]).max()
    voxel = float(np.linalg.norm(affine[:3, :3], axis=0).min())
    if apart > 0.1 * voxel:
        raise DataError(
            f"{case.label}: its affine puts a corner {apart:.2f} mm away from the image's ({case.images[0].name}); "
            f"expected the same affine, copy the image's header to the label if the voxels do match"
        )
    ids = np.unique(label)
    wrong = [value for value in ids.tolist() if value not in allowed]
    if wrong:
        raise DataError(
            f"{case.label}: label ids {wrong[:6]}, expected only {_ranges(allowed)}; mend the label or class_names"
        )
    return label.astype(np.uint8)


def _ranges(values: Sequence[int]) -> str:
    values = sorted(values)
    if values == list(range(values[0], values[-1] + 1)) and len(values) > 2:
        return f"{values[0]}..{values[-1]}"
    return ", ".join(map(str, values))


def file_digest(path: Path, known: dict[str, list]) -> str:
    """SHA-256 of a file's content; `known` remembers it by path, size and modification time."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; restore it or take the case out of the lists")
    key, status = str(path.resolve()), path.stat()
    entry = known.get(key)
    if entry and entry[:2] == [status.st_size, status.st_mtime_ns]:
        return entry[2]
    with path.open("rb") as file:
        value = hashlib.file_digest(file, "sha256").hexdigest()
    known[key] = [status.st_size, status.st_mtime_ns, value]
    return value
