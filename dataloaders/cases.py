"""A case, and what its files hold: images and labels of scans and of HDF5 files, read with
checks.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np

from dataloaders import checks
from dataloaders.faults import (
    CaseNotes,
    DataError,
    Finding,
    Report,
    content_digest,
    no_file,
    unreadable,
)
from dataloaders.volumes import DICOM_SUFFIXES, composed, has_suffix, is_data, read_volume
from utils.config import plain_name

UNKNOWN = 255  # in labels that were read: nobody labelled the voxel, or there is no label


@dataclass(frozen=True)
class Case:
    """One scan: its name, the image files (one per channel, or one file) and the label file, if
    there is one.

    Files are named after cases, so a name with a path in it is refused: it could lead out of the
    output folder. classes: names or ids of those that the label tells; None: all, or what the key
    `labelled_classes` says.
    """

    name: str
    images: tuple[Path, ...]
    label: Path | None = None
    classes: tuple[str | int, ...] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        # names of a list and of the file system are the same, however their letters are composed
        object.__setattr__(self, "name", composed(self.name))
        if not plain_name(self.name):
            raise DataError(
                Finding(
                    "outside",
                    str(self.images[0] if self.images else self.name),
                    f"the case is called {self.name!r}",
                    "a plain file name, without slashes and control characters",
                    "rename the file or mend the list",
                )
            )

    @property
    def files(self) -> tuple[Path, ...]:
        """All files of the case; of HDF5 cases image and label are one."""
        return (*self.images, *([self.label] if self.label else []))


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
            read.append((path, *read_volume(path, notes)))
    if read and notes is not None:
        _, voxels, affine = read[0]
        shape = voxels.shape[:3] if len(case.images) == 1 else voxels.shape
        notes.grid = (shape, affine) if len(shape) == 3 else notes.grid
    checks.check_image(case, read, in_channels, faults)
    faults.stop()
    if len(read) > 1:
        image = np.stack([voxels for _, voxels, _ in read])
    else:
        image = read[0][1]
        image = np.moveaxis(image, -1, 0) if image.ndim == 4 else image[None]
    image = np.ascontiguousarray(image, dtype=np.float32)
    if notes is not None:
        for path, _, affine in read:
            checks.check_header(path, affine, notes)
        notes.content.append(content_digest(image))
    return image, read[0][2]


def read_label(
    case: Case,
    allowed: Sequence[int],
    image_shape: Sequence[int],
    affine: np.ndarray | None,
    notes: CaseNotes | None = None,
    ignore: int | None = None,
) -> np.ndarray:
    """Label ids (H, W, D) uint8 of a case; checks geometry against the image, and that ids are in
    `allowed` or `ignore`, which becomes UNKNOWN.

    affine: None where the image could not be read; the ids are then checked alone. DataError with
    all faults that were found; the ids go to `notes`.
    """
    if case.label is None:
        raise checks.without_label(case)
    faults = Report()
    label, label_affine = read_volume(case.label, notes)
    if notes is not None:
        checks.check_forms(case.label, label_affine, notes)
    if label.ndim == 4 and label.shape[-1] == 1:
        label = label[..., 0]
    if affine is not None:
        checks.check_geometry(case, label.shape, label_affine, tuple(image_shape), affine, faults)
    ids = checks.check_ids(case.label, label, allowed, faults, ignore)
    faults.stop()
    if notes is not None:
        notes.ids |= {int(value) for value in ids}
        notes.labels.append(content_digest(marked(label, ignore)))
    return marked(label, ignore)


def marked(label: np.ndarray, ignore: int | None) -> np.ndarray:
    """Ids as uint8, with UNKNOWN in place of `ignore`."""
    ids = label.astype(np.uint8)
    if ignore is not None:
        ids[label == ignore] = UNKNOWN
    return ids


def read_h5(
    path: Path,
    num_classes: int,
    ndim: int,
    index: int | None = None,
    notes: CaseNotes | None = None,
    limits: tuple[float, float] | None = None,
    ignore: int | None = None,
) -> dict[str, np.ndarray]:
    """`image` float32 and, where the file has one, `label` uint8 of an HDF5 file, or of its slice
    `index`; DataError with all that is wrong.

    Other keys are ignored. `ndim` is that of the stored arrays. limits: of the intensities. ignore:
    the id that becomes UNKNOWN. Warnings go to `notes`.
    """
    if not path.is_file():
        raise DataError(no_file(path))
    faults = Report()
    try:
        with h5py.File(path) as file:
            numeric = checks.check_h5(path, file, ndim, index, faults)
            part = () if index is None or faults.errors else index
            arrays = {key: np.asarray(file[key][part]) for key in numeric}
    except DataError:
        raise
    except Exception as error:  # h5py reports damage inside a file in many ways
        raise DataError(unreadable(path, error)) from error
    if "image" in arrays:
        checks.check_intensities(path, arrays["image"].astype(np.float32), limits, faults)
    if "label" in arrays:
        checks.check_ids(path, arrays["label"], range(num_classes), faults, ignore)
    faults.stop()
    if notes is not None:
        checks.check_h5_types(path, arrays, notes)
    if "label" in arrays:
        arrays["label"] = marked(arrays["label"], ignore)
    return arrays | {"image": np.asarray(arrays["image"], np.float32)}


def h5_lacks_label(path: Path) -> bool:
    """Whether an HDF5 file has the array `image` and no `label`; what is wrong with it otherwise is
    said where it is read.
    """
    try:
        with h5py.File(path) as file:
            there = [file.get(key, getlink=True) is not None for key in ("image", "label")]
            return there == [True, False]
    except Exception:  # h5py raises errors of any kind for damaged files
        return False


def file_digest(path: Path, known: dict[str, list]) -> str:
    """SHA-256 of a file's content; `known` remembers it by path, size and modification time.

    Of a folder: of the names and contents of its files. One DICOM file stands for its series, which
    may be all files beside it: of its name and of its folder.
    """
    if not path.exists():
        raise DataError(no_file(path))
    folder = path if path.is_dir() else path.parent
    if path.is_dir() or has_suffix(path, DICOM_SUFFIXES):
        files = sorted(file for file in folder.iterdir() if file.is_file() and is_data(file))
        lines = [f"{file.name} {_content_digest(file, known)}" for file in files]
        lines += [] if path.is_dir() else [path.name]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return _content_digest(path, known)


def _content_digest(path: Path, known: dict[str, list]) -> str:
    key, status = str(path.resolve()), path.stat()
    entry = known.get(key)
    if entry and entry[:2] == [status.st_size, status.st_mtime_ns]:
        return entry[2]
    with path.open("rb") as file:
        value = hashlib.file_digest(file, "sha256").hexdigest()
    known[key] = [status.st_size, status.st_mtime_ns, value]
    return value
