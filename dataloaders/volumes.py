"""Scans read from files: NIfTI by nibabel, NRRD, MetaImage and DICOM series (dataloaders/dicom.py)
by SimpleITK; and predictions back on their grid.
"""

import gzip
import math
import os
import re
import unicodedata
import zlib
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.ndimage import affine_transform

from dataloaders.dicom import contained, read_series
from dataloaders.faults import DataError, Finding, Report, check_room, no_file, unreadable

NIFTI_SUFFIXES = (".nii.gz", ".nii")
ITK_SUFFIXES = (".nrrd", ".nhdr", ".mha", ".mhd")
DICOM_SUFFIXES = (".dcm", ".ima")
SUFFIXES = NIFTI_SUFFIXES + ITK_SUFFIXES  # of files that hold a whole scan
LONGEST_HEADER = 1 << 26  # bytes before the voxels of a NIfTI file, or after them


def has_suffix(path: Path, suffixes: tuple[str, ...] = SUFFIXES) -> bool:
    """Whether the file's name ends in one of `suffixes`, in any case of letters."""
    return path.name.lower().endswith(suffixes)


def is_series(path: Path) -> bool:
    """Whether the path of a scan is that of a DICOM series: its folder, or one of its files."""
    return path.is_dir() or has_suffix(path, DICOM_SUFFIXES)


def composed(name: str) -> str:
    """The name with letters and their marks in one (NFC): macOS stores them apart, and both look
    the same.
    """
    return unicodedata.normalize("NFC", name)


def is_data(path: Path) -> bool:
    """Whether a file or folder that was found may be data: hidden ones, such as the `._x` that
    macOS leaves beside x, and its folder __MACOSX are not.
    """
    return path.name[:1] != "." and path.name != "__MACOSX"


def as_stored(path: Path) -> Path:
    """The path as the file system has it, where its letters are composed in another way."""
    if path.exists() or path.parent == path:
        return path
    folder = as_stored(path.parent)
    if folder.is_dir() and not path.name.isascii():
        wanted = composed(path.name)
        return next((each for each in folder.iterdir() if composed(each.name) == wanted), path)
    return folder / path.name


def stem(file: str | Path) -> str:
    """File name without folder and suffix, composed; `.nii.gz` counts as one."""
    name = composed(Path(file).name)
    suffix = next(
        (suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), Path(name).suffix
    )
    return name[: len(name) - len(suffix)]


class NiftiAffine(np.ndarray):
    """An affine (4, 4) in mm that remembers how its NIfTI file says it: `placed` is a header with
    both forms (sform and qform), their codes and the voxel sizes, in mm.

    Programs differ in which form they follow, so what is written for the scan has both. Whatever is
    computed from the affine remembers nothing.
    """

    placed: nib.Nifti1Header | None = None


# Fields of a NIfTI header that place its voxels; _LENGTHS are in the file's unit
_PLACING = ("sform_code", "qform_code", "quatern_b", "quatern_c", "quatern_d", "pixdim")
_LENGTHS = ("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z")
_MM = {1: 1000.0, 3: 0.001}  # codes of metre and micron; 2 is mm, 0 is not told


def read_volume(path: Path, notes: Report | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (H, W, D), or (H, W, D, C), and 4x4 affine (voxel to RAS+ in mm); DataError for
    whatever is unreadable.

    A folder is that of a DICOM series; where it holds several, one of the wanted series' files
    names it. The affine of a NIfTI file is a NiftiAffine. Warnings go to `notes`.
    """
    if not path.exists():
        raise DataError(no_file(path))
    try:
        if is_series(path):
            voxels, affine = read_series(path, notes)
        elif has_suffix(path, ITK_SUFFIXES):
            voxels, affine = _read_itk(path)
        else:
            voxels, affine = _read_nifti(path, notes)
    except DataError:
        raise
    # Readers raise errors of any kind where a header makes no sense.
    except Exception as error:
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


# NIfTI


def _read_nifti(path: Path, notes: Report | None) -> tuple[np.ndarray, np.ndarray]:
    begin = _first_voxel(path)
    image = nib.load(path)
    shape = image.shape
    if not isinstance(image, nib.Nifti1Pair) or 0 in shape:
        found = f"{type(image).__name__} of {' x '.join(map(str, shape))} values"
        raise DataError(Finding("unreadable", str(path), found, "a scan", "export it again"))
    check_room(path, shape, max(image.header.get_data_dtype().itemsize, 8))
    needed = begin + math.prod(shape) * image.header.get_data_dtype().itemsize
    size = _unpacked(path, needed, notes) if path.suffix.lower() == ".gz" else path.stat().st_size
    if size < needed:
        raise EOFError(f"its header needs {needed} bytes, the file holds {size}")
    voxels = np.asanyarray(image.dataobj)
    while voxels.ndim > 3 and voxels.shape[-1] == 1:
        voxels = voxels[..., 0]
    if voxels.ndim == 5 and voxels.shape[3] == 1:  # vectors are kept along the fifth axis
        voxels = voxels[..., 0, :]
    placed = nib.Nifti1Header()
    unit = _MM.get(int(image.header["xyzt_units"]) & 7, 1.0)
    for key in (*_PLACING, *_LENGTHS):
        placed[key] = image.header[key]
    placed["pixdim"][4:] = 1
    placed.set_xyzt_units("mm")
    if unit != 1:  # mm stay exactly as they are
        placed["pixdim"][1:4] *= unit
        for key in _LENGTHS:
            placed[key] = placed[key] * unit
    affine = np.array(image.affine, dtype=np.float64)
    affine[:3] *= unit
    affine = affine.view(NiftiAffine)
    affine.placed = placed
    return voxels, affine


def _first_voxel(path: Path) -> int:
    """Byte at which a NIfTI file says that its voxels begin; an error where that is impossible."""
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    with opened(path, "rb") as file:
        block = file.read(540)
    sizes = {int.from_bytes(block[:4], order) for order in ("little", "big")}
    kinds = {348: nib.Nifti1Header, 540: nib.Nifti2Header}
    kind = next((kinds[size] for size in sizes if size in kinds), None)
    if kind is None:
        raise ValueError("no NIfTI header")
    header = kind(block[: kind.sizeof_hdr], check=False)
    begin = float(header["vox_offset"])
    if not header.single_vox_offset <= begin <= LONGEST_HEADER:  # also of what is no number
        raise ValueError(
            f"vox_offset is {begin:g}, where the voxels of one file cannot begin; expected "
            f"{header.single_vox_offset} or more, repair the header"
        )
    return int(begin)


def _unpacked(path: Path, needed: int, notes: Report | None) -> int:
    """Bytes that a gzip file unpacks to. It is read to its end, where the sum of its content is
    checked (nibabel stops at the last voxel); a file that unpacks to far more than the `needed`
    bytes is refused.
    """
    total, unpack, left = 0, zlib.decompressobj(wbits=31), b""
    with path.open("rb") as file:
        while chunk := left or file.read(1 << 20):
            if unpack.eof:  # the next part of the file, or padding
                chunk = chunk.lstrip(b"\0") or file.read(1 << 20)
                if not chunk:
                    break
                if len(chunk) == 1:
                    chunk += file.read(1)
                if not chunk.startswith(b"\x1f\x8b"):
                    if chunk.strip(b"\0") and notes is not None:
                        found = "bytes after the end of the compressed data, which are ignored"
                        notes.warning("header", path, found, "", "compress the file again")
                    break
                unpack = zlib.decompressobj(wbits=31)
            total += len(unpack.decompress(chunk, 1 << 22))
            left = unpack.unused_data if unpack.eof else unpack.unconsumed_tail
            if total > 2 * needed + LONGEST_HEADER:
                raise DataError(
                    Finding(
                        "too large",
                        str(path),
                        f"it unpacks to more than {total / 1e6:.0f} MB",
                        f"the {needed / 1e6:.3g} MB of its header",
                        "compress the scan again",
                    )
                )
    if not unpack.eof:
        raise EOFError("the compressed data end early")
    return total


# NRRD and MetaImage


def _read_itk(path: Path) -> tuple[np.ndarray, np.ndarray]:
    import SimpleITK as sitk

    _check_data_files(path)
    with contained(sitk):
        reader = sitk.ImageFileReader()
        reader.SetFileName(str(path))
        reader.ReadImageInformation()
        shape = (*reader.GetSize(), reader.GetNumberOfComponents())
        check_room(path, shape, 8)
        return _from_itk(reader.Execute(), path)


def _check_data_files(path: Path) -> None:
    """DataError where a header of text names a file of voxels outside of its own folder."""
    with path.open("rb") as file:
        lines = file.read(1 << 20).split(b"\n")
    names = []
    for number, line in enumerate(lines):
        if not line.strip() and lines[0].startswith(b"NRRD"):
            break  # voxels follow
        key, separator, value = line.decode("latin-1").partition("=")
        if not separator or lines[0].startswith(b"NRRD"):
            key, separator, value = line.decode("latin-1").partition(":")
        key, value = key.strip().lower().replace(" ", ""), value.strip().lstrip("=").strip()
        if not separator or key not in ("elementdatafile", "datafile"):
            continue
        if value.upper().startswith("LIST"):
            names += [other.decode("latin-1").strip() for other in lines[number + 1 :]]
        elif value.upper() != "LOCAL":
            names.append(value)
        break
    for name in names:
        if name and not inside(path.parent / name, path.parent):
            raise DataError(
                Finding(
                    "outside",
                    str(path),
                    f"its voxels are in '{name}'",
                    "a file in the folder of the header",
                    "move the file there and name it without a path",
                )
            )


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
