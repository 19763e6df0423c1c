"""LA: the 2018 left-atrium challenge (late-enhancement MRI) in the HDF5 files of UA-MT.

One file per scan with `image` (H, W, D) float32, z-scored over the scan, and `label` 0 or 1, in one
of the layouts

    <root>/<ID>/mri_norm2.h5
    <root>/data/<ID>.h5
    <root>/2018LA_Seg_Training Set/<ID>/mri_norm2.h5

The files carry no voxel size; spacing is 1 along each axis (the scans are 0.625 mm isotropic), so
distances are in voxels, as in every published table. They were cropped around the atrium by means
of the labels, those of unlabelled and test scans too: all numbers on this data share that. There is
no validation list: published rows choose the best checkpoint on the 20 test scans. To keep the test
scans out of that choice, add a val.txt with ids taken from train.txt.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Orientation, Spacing

from dataloaders import augment
from dataloaders.base import InMemory
from dataloaders.cases import Case, h5_lacks_label, read_h5, read_image
from dataloaders.faults import CaseNotes, DataError, Finding, Report
from dataloaders.volumes import as_stored, is_data

ORIENTATION = "LPS"  # of the arrays in the files, as the challenge's own scans store them
SPACING = 0.625  # mm, along each axis
LAYOUTS = ("{}/mri_norm2.h5", "data/{}.h5", "2018LA_Seg_Training Set/{}/mri_norm2.h5")


class LADataset(InMemory):
    """LA volumes; splits/la has the 80 and 20 scans of UA-MT in their order, and no val.txt (then
    val is empty).

    The first 4, 8, 16 scans of train.txt are the published labelled sets. last_start: crops may
    start at the last admissible voxel, which the released code never draws (False).
    """

    unit = "scan"
    needs_val = False
    pads = True

    def __init__(
        self,
        root: str,
        split_dir: str = "splits/la",
        patch_size: Sequence[int] = (112, 112, 80),
        class_names: Sequence[str] = ("background", "left atrium"),
        memory_gb: float = 2.0,
        last_start: bool = True,
        patient_pattern: str = "",
        absent_classes: Sequence[str] = (),
        unlabelled: str = "",
        **labels,
    ) -> None:
        others = patient_pattern, absent_classes, unlabelled
        super().__init__(root, split_dir, class_names, patch_size, memory_gb, *others, **labels)
        self.last_start = last_start

    def read(self, case: Case, notes: CaseNotes | None = None) -> dict:
        """A scan: image (1, H, W, D) float32, label (1, H, W, D) uint8; spacing 1 and affine
        identity.
        """
        return self.load(case, notes) | {
            "spacing": [1.0, 1.0, 1.0],
            "affine": np.eye(4),
            "name": case.name,
        }

    def read_file(self, case: Case) -> dict:
        """A scan file (NIfTI, NRRD, ...) as the HDF5 files hold scans: image (1, H, W, D) float32
        in the axis order LPS and on a grid of 0.625 mm, z-scored over the whole scan; affine,
        native_affine and native_shape.

        The HDF5 files were z-scored over the challenge's whole scans, too, and then cropped around
        the atrium: a network trained on them has seen little of what lies further off.
        """
        notes = CaseNotes()
        image, native_affine = read_image(case, self.in_channels, notes)
        native = {"native_affine": native_affine, "native_shape": list(image.shape[1:])}
        scan = MetaTensor(torch.from_numpy(image), affine=torch.from_numpy(native_affine))
        axes = Orientation(axcodes=ORIENTATION, labels=(("L", "R"), ("P", "A"), ("I", "S")))
        scan = Compose([axes, Spacing(pixdim=[SPACING] * 3, mode="bilinear")])(scan)
        image = np.array(scan.numpy(), dtype=np.float32)
        image -= np.float32(image.mean(dtype=np.float64))
        image /= np.float32(image.std(dtype=np.float64))
        read = {"image": image, "affine": scan.affine.numpy(), **native}
        return read | {"findings": notes.warnings}

    def weak(self, sample: dict, rng: np.random.Generator) -> dict:
        """Quarter turns and a mirror in the axial plane, then a random crop."""
        return augment.crop_padded(self.turn(sample, rng), rng, self.patch_size, self.last_start)

    def load(self, case: Case, notes: CaseNotes | None) -> dict[str, np.ndarray]:
        """An HDF5 file, or a scan of the folder `unlabelled`."""
        if case.images[0].suffix != ".h5":
            scan = self.read_file(case)
            arrays = {"image": scan["image"][0]}
            if notes is not None:
                notes.take(scan["findings"])
        else:
            how = {"notes": notes, "ignore": self.ignore_label}
            arrays = read_h5(case.images[0], self.num_classes, 3, **how)
        if notes is not None:
            notes.see(arrays["image"], arrays.get("label"))
        return {key: array[None] for key, array in arrays.items()}

    def has_label(self, name: str) -> bool:
        paths = [as_stored(self.root / layout.format(name)) for layout in LAYOUTS]
        return not any(path.is_file() and h5_lacks_label(path) for path in paths)

    def folder_cases(self, folder: Path, report: Report) -> list[Case]:
        """HDF5 files (ID.h5 or ID/mri_norm2.h5) with the array `image`, else scan files."""
        files = {path.stem: path for path in sorted(folder.glob("*.h5")) if is_data(path)}
        files |= {path.parent.name: path for path in sorted(folder.glob("*/mri_norm2.h5"))}
        if not files:
            return super().folder_cases(folder, report)
        return [Case(name, (path,)) for name, path in files.items()]

    def evaluation_cases(self, names: Sequence[str], report: Report) -> list[Case]:
        cases = []
        for name in names:
            with report.catching():
                Case(name, ())  # a plain name, before it becomes part of a path
                paths = [as_stored(self.root / layout.format(name)) for layout in LAYOUTS]
                path = next((path for path in paths if path.is_file()), None)
                if path is None:
                    raise DataError(
                        Finding(
                            "missing file",
                            str(paths[0]),
                            f"no such file, nor {paths[1].relative_to(self.root)} or "
                            f"{paths[2].relative_to(self.root)}",
                            "",
                            "complete the data or set split_dir to lists of the scans that are "
                            "there",
                        )
                    )
                cases.append(Case(name, (path,), path))
        return cases
