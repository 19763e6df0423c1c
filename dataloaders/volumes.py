"""Scans read from files: NIfTI by nibabel, NRRD, MetaImage and DICOM series by SimpleITK; and
predictions back on their grid.
"""

import gzip
import locale
import os
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from scipy.ndimage import affine_transform

from dataloaders.faults import DataError, Finding, no_file, unreadable

NIFTI_SUFFIXES = (".nii.gz", ".nii")
ITK_SUFFIXES = (".nrrd", ".nhdr", ".mha", ".mhd")
DICOM_SUFFIXES = (".dcm", ".ima")
SUFFIXES = NIFTI_SUFFIXES + ITK_SUFFIXES  # of files that hold a whole scan
# largest deviation of the distance between two DICOM slices from the usual one, as a share of it
IRREGULAR = 0.01


def has_suffix(path: Path, suffixes: tuple[str, ...] = SUFFIXES) -> bool:
    """Whether the file's name ends in one of `suffixes`, in any case of letters."""
    return path.name.lower().endswith(suffixes)


def stem(file: str | Path) -> str:
    """File name without folder and suffix; `.nii.gz` counts as one."""
    name = Path(file).name
    suffix = next(
        (suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), Path(name).suffix
    )
    return name[: len(name) - len(suffix)]


def read_volume(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (H, W, D), or (H, W, D, C), and 4x4 affine (voxel to RAS+ in mm); DataError for
    whatever is unreadable.

    A folder is that of a DICOM series; where it holds several, one of the wanted series' files
    names it.
    """
    if not path.exists():
        raise DataError(no_file(path))
    try:
        if path.is_dir() or has_suffix(path, DICOM_SUFFIXES):
            voxels, affine = _read_series(path)
        elif has_suffix(path, ITK_SUFFIXES):
            voxels, affine = _read_itk(path)
        else:
            if path.suffix == ".gz":
                _check_sum(path)
            image = nib.load(path)
            voxels, affine = (
                np.asanyarray(image.dataobj),
                np.asarray(image.affine, dtype=np.float64),
            )
    except DataError:
        raise
    # SimpleITK reports everything as RuntimeError.
    except (ImageFileError, OSError, EOFError, ValueError, RuntimeError, zlib.error) as error:
        raise DataError(unreadable(path, error)) from error
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise DataError(
            Finding(
                "affine",
                str(path),
                f"its affine maps no volume ({affine[:3].tolist()})",
                "finite, independent axes in mm",
                "repair the header",
            )
        )
    return voxels, affine


def _check_sum(path: Path) -> None:
    """Read a gzip file to its end, where the sum of its content is checked: nibabel stops at the
    last voxel.
    """
    with gzip.open(path) as file:
        while file.read(1 << 22):
            pass


def dicom_series(folder: Path) -> dict[str, list[Path]]:
    """Series identifier -> its files from the first slice to the last, of the DICOM files right in
    `folder`.
    """
    import SimpleITK as sitk

    with _contained(sitk):
        return {
            identifier: [
                Path(file)
                for file in sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), identifier)
            ]
            for identifier in sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
        }


def _read_itk(path: Path) -> tuple[np.ndarray, np.ndarray]:
    import SimpleITK as sitk

    with _contained(sitk):
        return _from_itk(sitk.ReadImage(str(path)), path)


def _read_series(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A DICOM series in Hounsfield units where it has any (rescaled as its files say)."""
    import SimpleITK as sitk

    series = dicom_series(path if path.is_dir() else path.parent)
    if not path.is_dir():
        series = {
            key: files
            for key, files in series.items()
            if path.name in {file.name for file in files}
        }
    if len(series) != 1:
        found = "; ".join(
            f"{len(files)} files such as {files[0].name}" for files in series.values()
        )
        raise DataError(
            Finding(
                "unreadable",
                str(path),
                f"{len(series)} DICOM series in this folder{f' ({found})' if found else ''}",
                "one",
                "name one file of the wanted series instead of the folder"
                if found
                else "check the folder",
            )
        )
    ((_, files),) = series.items()
    with _contained(sitk):
        if len(files) == 1:  # several frames in one file
            return _from_itk(sitk.ReadImage(str(files[0])), path)
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames([str(file) for file in files])
        reader.MetaDataDictionaryArrayUpdateOn()
        image = reader.Execute()
    normal = np.array(image.GetDirection()).reshape(3, 3)[:, 2]
    places = [
        float(np.array(reader.GetMetaData(k, "0020|0032").split("\\"), float) @ normal)
        for k in range(len(files))
        if reader.HasMetaDataKey(k, "0020|0032")
    ]
    gaps = np.diff(places)
    if (
        len(places) != len(files)
        or np.abs(gaps - np.median(gaps)).max() > IRREGULAR * abs(np.median(gaps)) + 1e-3
    ):
        shown = (
            f"{np.abs(gaps).min():.3f} to {np.abs(gaps).max():.3f} mm apart"
            if len(gaps)
            else "without positions"
        )
        raise DataError(
            Finding(
                "unreadable",
                str(path),
                f"the {len(files)} slices of this DICOM series are {shown}",
                "one distance",
                "a slice is missing or doubled, copy the series again or convert it with a tool "
                "that resamples",
            )
        )
    return _from_itk(image, path)


def _from_itk(image, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """SimpleITK image -> voxels (H, W, D[, C]) and affine to RAS+; ITK's world is LPS."""
    import SimpleITK as sitk

    if image.GetDimension() != 3:
        raise DataError(
            Finding(
                "shape",
                str(path),
                f"an image of {image.GetDimension()} axes",
                "a 3D scan",
                "convert the scan",
            )
        )
    voxels = np.swapaxes(sitk.GetArrayFromImage(image), 0, 2)  # (D, W, H[, C]) -> (H, W, D[, C])
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return voxels, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


class _contained:
    """SimpleITK writes to standard error by itself; what matters is checked here and raised. Some
    of its readers and writers reset the locale of the process, after which open() takes text for
    ASCII.
    """

    def __init__(self, sitk) -> None:
        self.object = sitk.ProcessObject

    def __enter__(self) -> None:
        self.locale = locale.setlocale(locale.LC_ALL)
        self.before = self.object.GetGlobalWarningDisplay()
        self.object.SetGlobalWarningDisplay(False)

    def __exit__(self, *error: object) -> None:
        self.object.SetGlobalWarningDisplay(self.before)
        locale.setlocale(locale.LC_ALL, self.locale)


def channel_number(name: str) -> tuple[str, int] | None:
    """'case_0002' -> ('case', 2), nnU-Net's way to name the files of a scan's channels; None for
    other names.
    """
    match = re.fullmatch(r"(.+)_(\d{4})", name)
    return (match[1], int(match[2])) if match else None


def inside(path: str | Path, root: str | Path) -> bool:
    """Whether a path, as it is written, stays in `root`. Links are not followed: they are how a
    user keeps data.
    """
    path, root = os.path.abspath(path), os.path.abspath(root)
    return path == root or path.startswith(root.rstrip(os.sep) + os.sep)


def to_native(
    prediction: np.ndarray,
    affine: np.ndarray,
    native_affine: np.ndarray,
    native_shape: Sequence[int],
) -> np.ndarray:
    """Resample (H, W, D) ids by nearest neighbour from the grid of `affine` to the native grid; 0
    outside.

    Both grids are placed by their voxel-to-world affines, so reorientation, resampling and cropping
    are all undone.
    """
    to_source = np.linalg.inv(np.asarray(affine, float)) @ np.asarray(native_affine, float)
    # Half a voxel beyond the outermost centres still belongs to the grid: 'grid-constant' alone
    # would drop it.
    padded = np.pad(prediction, 1, mode="edge")
    result = affine_transform(
        padded,
        to_source[:3, :3],
        to_source[:3, 3] + 1,
        output_shape=tuple(native_shape),
        order=0,
        mode="constant",
    )
    # Whatever lies more than half a voxel outside the grid was cropped away: background. Plane by
    # plane, since the coordinates of a large scan's voxels would take many times the memory of its
    # ids.
    _, y, z = np.ogrid[:1, : native_shape[1], : native_shape[2]]
    for x, plane in enumerate(result):
        for axis, size in enumerate(prediction.shape):
            terms = to_source[axis]
            coordinate = terms[0] * x + terms[1] * y[0] + terms[2] * z[0] + terms[3]
            plane *= (coordinate >= -0.5 - 1e-6) & (coordinate <= size - 0.5 + 1e-6)
    return result
