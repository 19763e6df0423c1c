"""ACDC: short-axis cardiac cine MRI as SSL4MIS distributes it; trained on slices, scored on
volumes.

    <root>/data/patientXXX_frameYY.h5                 volumes: image (S, H, W) in 0..1,
                                                      label (S, H, W) 0..3
    <root>/data/slices/patientXXX_frameYY_slice_Z.h5  the same slice by slice, Z from 1

Where there is no slices/ folder the slices are read from the volumes. Lists name patients, so that
no patient can be labelled and unlabelled, or trained and tested on, at once. The frames of a
patient are whatever its files say, because own conversions of patient090 start at another frame
number. The files carry no voxel size: spacing is 1 along each axis, although slices lie about 10 mm
apart, and distances are in voxels, as in every published table of this setting.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from dataloaders import augment, checks
from dataloaders.base import InMemory
from dataloaders.cases import Case, h5_lacks_label, read_h5, read_image
from dataloaders.faults import CaseNotes, DataError, Report
from dataloaders.lists import select
from dataloaders.volumes import composed, is_data

# range of intensities: eight-bit views are cut from them, and anything else would wrap around
LIMITS = (0.0, 1.0)
_VOLUME = re.compile(r"((.+)_frame\d+)\.h5")
_FRAME = re.compile(r"(.+)_frame\d+")
_SLICE = re.compile(r"((.+)_frame\d+)_slice_(\d+)\.h5")


@dataclass(frozen=True)
class SliceCase(Case):
    """One slice: of a file of its own, or number `index` (from 0) of a volume."""

    index: int | None = None


class ACDCDataset(InMemory):
    """ACDC slices and volumes; splits/acdc has the 70, 10 and 20 patients of SSL4MIS in their
    order.

    The first 1, 3, 7, 14 patients of train.txt are the published labelled sets (5 % = 3, 10 % = 7).
    patch_size: what every slice is resized to, nearest neighbour.
    """

    dims = 2
    unit = "patient"

    def __init__(
        self,
        root: str,
        split_dir: str = "splits/acdc",
        patch_size: Sequence[int] = (256, 256),
        class_names: Sequence[str] = (
            "background",
            "right ventricle",
            "myocardium",
            "left ventricle",
        ),
        memory_gb: float = 2.0,
        patient_pattern: str = "",
        absent_classes: Sequence[str] = (),
        unlabelled: str = "",
        **labels,
    ) -> None:
        others = patient_pattern, absent_classes, unlabelled
        super().__init__(root, split_dir, class_names, patch_size, memory_gb, *others, **labels)
        self._last: tuple[Path | None, np.ndarray] = None, np.empty(0)  # scan file that was read

    def find(self, names: Sequence[str]) -> list[Case]:
        """The volumes called `names`, such as patient028_frame01."""
        volumes = self._volumes()
        return select(
            [case for cases in volumes.values() for case in cases], names, str(self.root / "data")
        )

    def read(self, case: Case, notes: CaseNotes | None = None) -> dict:
        """A volume: image (1, H, W, D) float32, label (1, H, W, D) uint8, D slices; spacing 1 and
        affine identity.
        """
        how = {"notes": notes, "limits": LIMITS, "ignore": self.ignore_label}
        stacks = read_h5(case.images[0], self.num_classes, 3, **how)
        # slice by slice, so that a volume is recognised in slices and the other way round
        if notes is not None:
            for index, plane in enumerate(stacks["image"]):
                notes.see(plane, stacks["label"][index] if "label" in stacks else None)
        return {
            **{key: np.moveaxis(stack, 0, -1)[None] for key, stack in stacks.items()},
            "spacing": [1.0, 1.0, 1.0],
            "affine": np.eye(4),
            "name": case.name,
        }

    def read_file(self, case: Case) -> dict:
        """A scan file (NIfTI, NRRD, ...): image (1, H, W, D) scaled to 0..1 over the volume, rows
        and columns as the HDF5 files have them, D slices along the file's third axis; the file's
        own affine and native_shape.
        """
        notes = CaseNotes()
        image, affine = read_image(case, self.in_channels, notes)
        native_shape = list(image.shape[1:])
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        if spacing[2] < 0.99 * spacing.max():
            size = " x ".join(f"{mm:.3g}" for mm in spacing)
            raise DataError(
                f"{case.images[0]}: voxels of {size} mm, expected slices along the third axis, "
                "farther apart than the "
                f"pixels; store the scan as a stack of short-axis slices"
            )
        image -= image.min()
        image /= image.max()
        # The HDF5 files come from arrays (z, y, x), nibabel gives (x, y, z).
        return {
            "image": image.swapaxes(1, 2),
            "native_affine": affine,
            "native_shape": native_shape,
            "findings": notes.warnings,
        }

    def native(self, prediction: np.ndarray, sample: dict) -> np.ndarray:
        """Of a file of `read_file`: in its own order of axes."""
        return prediction.swapaxes(0, 1) if "native_affine" in sample else prediction

    def slices(self, volume: dict) -> np.ndarray:
        """The slices of a volume as the network takes them: (D, 1, *patch_size) float32."""
        return augment.resize_nearest(np.moveaxis(volume["image"], -1, 0), self.patch_size)

    def unslice(self, prediction: np.ndarray, volume: dict) -> np.ndarray:
        """Label maps (D, *patch_size) -> (H, W, D), nearest neighbour."""
        return np.moveaxis(augment.resize_nearest(prediction, volume["image"].shape[1:3]), 0, -1)

    def patch(self, sample: dict, rng: np.random.Generator) -> dict:
        """Half the time rot_flip, a quarter a turn of up to 20 degrees, a quarter nothing; then
        resized.
        """
        if rng.random() > 0.5:
            sample = augment.rot_flip(sample, rng)
        elif rng.random() > 0.5:
            sample = augment.rotate_small(sample, rng)
        return sample | {
            key: augment.resize_nearest(sample[key], self.patch_size) for key in ("image", "label")
        }

    def weak(self, sample: dict, rng: np.random.Generator) -> dict:
        """As `patch`, with the image cut to 8 bits, which the strong view starts from."""
        patch = self.patch(sample, rng)
        return patch | {"image": augment.quantise(patch["image"])}

    def strong(self, sample: dict, rng: np.random.Generator) -> dict:
        """Jitter of brightness and contrast, and blur, of a weak view."""
        return augment.strong_grey(sample, rng)

    def named(self, case: Case) -> str:
        """The patient."""
        match = _FRAME.match(case.name)
        return match[1] if match else case.name.rpartition("_slice_")[0]

    def load(self, case: Case, notes: CaseNotes | None) -> dict[str, np.ndarray]:
        index = case.index if isinstance(case, SliceCase) else None
        if case.images[0].suffix != ".h5":  # of the folder `unlabelled`
            if self._last[0] != case.images[0]:  # once for all of its slices
                scan = self.read_file(case)
                self._last = case.images[0], scan["image"][0]
                if notes is not None:
                    notes.take(scan["findings"])
            # a view would keep the whole scan in memory
            planes = {"image": self._last[1][..., index].copy()}
        else:
            ndim = 2 if index is None else 3
            how = notes, LIMITS, self.ignore_label
            planes = read_h5(case.images[0], self.num_classes, ndim, index, *how)
        if notes is not None:
            notes.see(planes["image"], planes.get("label"))
        return {key: plane[None] for key, plane in planes.items()}

    def has_label(self, name: str) -> bool:
        """Whether all files of the patient have one."""
        files = [*self.root.glob(f"data/{name}_*.h5"), *self.root.glob(f"data/slices/{name}_*.h5")]
        return not any(h5_lacks_label(path) for path in files)

    def folder_cases(self, folder: Path, report: Report) -> list[Case]:
        """Slices of HDF5 volumes with the array `image`, else of scan files."""
        files = sorted(filter(is_data, folder.glob("*.h5")))
        volumes = [Case(path.stem, (path,)) for path in files]
        cases = []
        for case in volumes or super().folder_cases(folder, report):
            with report.catching("unlabelled", case.name):
                depth = (
                    _num_slices(case.images[0], self.num_classes)
                    if files
                    else self.read_file(case)["image"].shape[-1]
                )
                for index in range(depth):
                    name = f"{case.name}_slice_{index + 1}"
                    cases.append(SliceCase(name, case.images, None, index))
        return cases

    def check_labels(self, facts: dict[tuple[str, Case], dict], report: Report) -> None:
        """Of a frame's slices together: those above and below the heart are empty."""
        frames: dict[str, tuple[str, Case, set[int]]] = {}
        for (split, case), found in facts.items():
            if found["ids"] is not None:
                frame = case.name.rpartition("_slice_")[0] or case.name
                first = frames.setdefault(frame, (split, case, set()))
                first[2].update(found["ids"])
        for split, case, ids in frames.values():
            checks.check_foreground(case, split, ids, report)

    def _volumes(self) -> dict[str, list[Case]]:
        """Patient -> its volumes, by frame."""
        volumes: dict[str, list[Case]] = {}
        for path in sorted(filter(is_data, (self.root / "data").glob("*.h5"))):
            if match := _VOLUME.fullmatch(composed(path.name)):
                volumes.setdefault(match[2], []).append(Case(match[1], (path,), path))
        return volumes

    def evaluation_cases(self, names: Sequence[str], report: Report) -> list[Case]:
        volumes = self._volumes() if names else {}
        found = self._found(names, volumes, self.root / "data", "patientXXX_frameYY.h5", report)
        return [case for name in found for case in volumes[name]]

    def training_cases(self, names: Sequence[str], report: Report) -> list[Case]:
        folder = self.root / "data" / "slices"
        if not folder.is_dir():
            cases = []
            for case in self.evaluation_cases(names, report):
                with report.catching("", case.name):
                    for index in range(_num_slices(case.images[0], self.num_classes)):
                        cases.append(
                            SliceCase(
                                f"{case.name}_slice_{index + 1}", case.images, case.label, index
                            )
                        )
            return cases
        slices: dict[str, list[tuple]] = {}
        for path in filter(is_data, folder.glob("*.h5")):
            if match := _SLICE.fullmatch(composed(path.name)):
                slices.setdefault(match[2], []).append((match[1], int(match[3]), path))
        found = self._found(names, slices, folder, "patientXXX_frameYY_slice_Z.h5", report)
        for name in found:
            self._check_slices(slices[name], folder, report)
        return [
            SliceCase(path.stem, (path,), path)
            for name in found
            for _, _, path in sorted(slices[name])
        ]

    def _check_slices(self, slices: list[tuple], folder: Path, report: Report) -> None:
        """A fault for each slice that is missing between others of its frame."""
        frames: dict[str, set[int]] = {}
        for frame, number, _ in slices:
            frames.setdefault(frame, set()).add(number)
        for frame, numbers in frames.items():
            for number in sorted(set(range(1, max(numbers))) - numbers):
                path = folder / f"{frame}_slice_{number}.h5"
                report.error(
                    "missing file",
                    path,
                    f"no such file, though there is slice {max(numbers)}",
                    "every slice from 1",
                    "complete the data",
                    case=frame,
                )

    def _found(
        self, names: Sequence[str], found: dict, folder: Path, pattern: str, report: Report
    ) -> list[str]:
        """The names that have files; a fault for the others."""
        missing = [name for name in names if name not in found]
        if missing:
            report.error(
                "missing file",
                folder,
                f"no files of {len(missing)} of {len(names)} patients, for example '{missing[0]}'",
                pattern,
                "complete the data or set split_dir to lists of the patients that are there",
            )
        return [name for name in names if name in found]


def _num_slices(path: Path, num_classes: int) -> int:
    try:
        with h5py.File(path) as file:
            if checks.is_array(path, file, "image"):
                return len(file["image"])
    except DataError:
        raise
    except Exception:  # h5py raises errors of any kind for damaged files; the reader names them
        pass
    return len(read_h5(path, num_classes, 3)["image"])  # says what is wrong with the file
