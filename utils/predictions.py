"""Files of predictions: label maps that are complete or not there, what they mean, a table of
sizes.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from PIL import Image

from utils.checkpoint import read_table, unused_name, write_table, write_text, writing
from utils.config import ConfigError
from utils.exported import optional

SEGMENTATION = "--dicom-seg"
SERIES = "SeriesInstanceUID"  # DICOM's name of what tells a series from all others


def save_volume(path: Path, ids: np.ndarray, affine: np.ndarray) -> None:
    """Write ids (H, W, D) as NIfTI of 8 bits; affine: voxel to RAS+ in mm."""
    image = volume_image(ids.astype(np.uint8), affine)
    save_whole(path, lambda temporary: nib.save(image, temporary))


def volume_image(ids: np.ndarray, affine: np.ndarray) -> nib.Nifti1Image:
    """Ids (H, W, D) on the grid of a scan, as NIfTI. Where the scan's own NIfTI header is known
    (dataloaders.volumes.NiftiAffine), both of its forms are written with their codes, so that the
    ids lie on the scan in every program, whichever form it reads.
    """
    placed = getattr(affine, "placed", None)
    if placed is not None:
        image = nib.Nifti1Image(ids, None, placed)
        image.set_data_dtype(ids.dtype)
        return image
    image = nib.Nifti1Image(ids, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code=1)
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    # the quaternion form holds an affine of orthogonal axes only
    if np.allclose(axes.T @ axes, np.eye(3), atol=1e-5):
        image.set_qform(affine, code=1)
    return image


def save_segmentation(
    path: Path,
    ids: np.ndarray,
    structures: dict[str, tuple[int, ...]],
    files: Sequence[Path],
    model: str,
    weights: str,
) -> None:
    """Write ids (H, W, D) of a DICOM series as DICOM SEG, a binary segment for each structure.

    files: of the D slices, in their order. model, weights: what is told of the algorithm. Of
    overlapping structures each segment is whole. What the structures are called is known, their
    place in a terminology is not: each is a body structure of SNOMED CT, with its number as a code
    of a scheme of our own.
    """
    hd = optional("highdicom", SEGMENTATION)
    pydicom = optional("pydicom", SEGMENTATION)
    planes = np.stack([np.isin(ids, which).T for which in structures.values()], -1)
    coded = hd.sr.CodedConcept
    algorithm = hd.AlgorithmIdentificationSequence(
        name=model, family=coded("123110", "DCM", "Artificial Intelligence"), version=weights[:16]
    )
    segments = [
        hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=name[:64],
            segmented_property_category=coded("123037004", "SCT", "Body structure"),
            segmented_property_type=coded(str(number), "99STRUCTURES", name[:64]),
            algorithm_type="AUTOMATIC",
            algorithm_identification=algorithm,
        )
        for number, name in enumerate(structures, 1)
    ]
    written = hd.seg.Segmentation(
        source_images=[pydicom.dcmread(file) for file in files],
        pixel_array=planes,
        segmentation_type="BINARY",
        segment_descriptions=segments,
        series_instance_uid=hd.UID(),
        series_number=1,
        sop_instance_uid=hd.UID(),
        instance_number=1,
        manufacturer="research software",
        manufacturer_model_name=model,
        software_versions=weights[:16],
        device_serial_number="none",
        series_description="Segmentation by a network, for research only",
    )
    save_whole(path, written.save_as)


def save_mask(path: Path, pixels: np.ndarray) -> None:
    """Write pixels (H, W) or (H, W, 3) uint8 as PNG."""
    save_whole(path, Image.fromarray(pixels).save)


def save_about(path: Path, about: dict) -> None:
    """Write the JSON beside the result `path`: the same name with .json."""
    write_text(beside(path), json.dumps(about, indent=1, ensure_ascii=False) + "\n")


def settings_of(path: Path) -> dict | None:
    """How the result `path` was made, as its JSON says; None if that is missing or says nothing."""
    try:
        return json.loads(beside(path).read_text(encoding="utf-8")).get("settings")
    except (OSError, ValueError, AttributeError):
        return None


def save_result(path: Path, about: dict, write: Callable[[Path], object]) -> None:
    """Write the JSON beside the result `path`, then call `write` with the path. The result comes
    last, so that one that is there is complete; if it fails, no JSON stays that speaks of it.
    """
    try:
        save_about(path, about)
        write(path)
    except BaseException:
        beside(path).unlink(missing_ok=True)
        raise


def beside(path: Path) -> Path:
    """Where the JSON of a result is: x.nii.gz, x.png -> x.json."""
    return path.with_name(path.name.removesuffix(".gz").rpartition(".")[0] + ".json")


def save_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write by way of a temporary file of the same kind, which `write` gets the path of, so that a
    file that is there is complete; DiskError if the disk does not take it.
    """
    temporary = unused_name(path.parent, ".", f".{path.name}")
    with writing(path):
        try:
            write(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def structure_sizes(
    ids: np.ndarray, structures: dict[str, tuple[int, ...]], unit: float
) -> dict[str, tuple[int, float]]:
    """Structure, a set of ids -> its voxels, and the same times `unit`, to four decimals."""
    counts = np.bincount(np.asarray(ids).ravel(), minlength=256)
    totals = {name: int(sum(counts[k] for k in which)) for name, which in structures.items()}
    return {name: (voxels, round(voxels * unit, 4)) for name, voxels in totals.items()}


def millilitres(affine: np.ndarray) -> float:
    """Volume of a voxel."""
    return abs(float(np.linalg.det(affine[:3, :3]))) / 1000


class SizeTable(dict):
    """Case -> structure -> (count, size); begins with what its CSV file holds, `write` puts all of
    it there. Lines that cannot be read are left out, with a warning: the results themselves are
    measured again.

    series: case -> SeriesInstanceUID of those that are DICOM series; where there are any, the file
    has a column for it.
    """

    def __init__(self, path: Path, count: str, size: str) -> None:
        super().__init__()
        self.path, self.header = path, ("case", "structure", count, size)
        self.series: dict[str, str] = {}
        if not path.is_file() or not path.stat().st_size:
            return
        rows = read_table(path, whole=False)
        if not rows or tuple(rows[0]) not in (self.header, (*self.header, SERIES)):
            raise ConfigError(
                f"{path}: no table of {', '.join(self.header)}; move it or choose another folder"
            )
        damaged = 0
        for line in rows[1:]:
            try:
                case, structure, number, value, *series = line
                if len(line) != len(rows[0]):
                    raise ValueError("too few or too many cells")
                self.setdefault(case, {})[structure] = int(number), float(value)
                if any(series):
                    self.series[case] = series[0]
            except ValueError:
                damaged += 1
        if damaged:
            print(
                f"warning: {path}: {damaged} line(s) cannot be read and are left out; results "
                "that are there are measured again",
                file=sys.stderr,
            )

    def has(self, case: str, structures: Iterable[str]) -> bool:
        """Whether it has all structures of a case: the file may have been cut between two."""
        return set(structures) <= self.get(case, {}).keys()

    def write(self) -> None:
        rows = [
            [case, name, *values] for case in sorted(self) for name, values in self[case].items()
        ]
        header = self.header
        if self.series:
            header = (*header, SERIES)
            rows = [[*row, self.series.get(row[0], "")] for row in rows]
        write_table(self.path, [header, *rows])


def failure(source: Path, error: Exception) -> str:
    """One line about an error that no check of ours foresaw."""
    memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    hint = "; not enough memory: try --window-batch 1, or --device cpu" if memory else ""
    return f"{source}: {type(error).__name__}: {' '.join(str(error).split())[:300]}{hint}"
