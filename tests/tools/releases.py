"""Files as the challenges of ACDC and LA hand them out."""

from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk

SUMMARY = "Group: DCM\nHeight: 184.0\nNbFrame: 30\nWeight: 95.0\n"  # the rest of Info.cfg


def write_patient(
    folder: Path, diastole: int, systole: int, frames: dict[int, tuple[np.ndarray, ...]]
) -> None:
    """A patient's folder. frames: number -> image (S, H, W) and, if there is one, label."""
    folder.mkdir(parents=True)
    (folder / "Info.cfg").write_text(f"ED: {diastole}\nES: {systole}\n{SUMMARY}")
    affine = np.diag([-1.5, -1.5, 10.0, 1.0])
    for number, arrays in frames.items():
        for array, end in zip(arrays, ("", "_gt")):
            path = folder / f"{folder.name}_frame{number:02d}{end}.nii.gz"
            nib.save(nib.Nifti1Image(array.transpose(2, 1, 0), affine), path)
    (folder / f"{folder.name}_4d.nii.gz").write_bytes(b"not to be read")


def write_scan(folder: Path, image: np.ndarray, label: np.ndarray | None) -> None:
    """A scan's folder. image: (x, y, z) uint8; label: the same, 0 and 1."""
    folder.mkdir(parents=True)
    arrays = {"lgemri": image}
    if label is not None:
        arrays["laendo"] = np.uint8(255 * (label > 0))
    for name, array in arrays.items():
        picture = sitk.GetImageFromArray(array.transpose(2, 1, 0))
        picture.SetSpacing((0.625, 0.625, 0.625))
        sitk.WriteImage(picture, str(folder / f"{name}.nrrd"), useCompression=True)
