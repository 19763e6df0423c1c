"""Data sets with one fault each, for `make_demo_data.py --corrupt`: tiny, generated, a folder for
every fault.

OUT/<name>/ holds the data, lists and config.yaml of one fault, OUT/sound/ the same without any, and
OUT/faults.json says of each folder which fault (dataloaders/faults.py) it shows, of which level,
and which training script it is for:

    python tools/make_demo_data.py --corrupt --dataset btcv --out data/corrupt_btcv
    python tools/check_data.py --config data/corrupt_btcv/truncated_image/config.yaml
"""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import yaml
from PIL import Image

AFFINE = np.array([[2.0, 0, 0, -19], [0, 2, 0, -17], [0, 0, 2, -15], [0, 0, 0, 1]])
SHAPE = (20, 18, 16)
MODALITIES = ("t1c", "t1n", "t2f", "t2w")
NETWORKS_3D = {"unet": {"channels": [2, 4, 4, 8]}, "resunet": {"channels": [2, 4, 4, 8]}}
COMMON = {"workers": 0, "max_steps": 1, "method": "supervised"}


def blocks(rng: np.random.Generator, shape: tuple[int, ...], num_classes: int) -> np.ndarray:
    """Ids (uint8) with a box of each foreground class, side by side along the first axis."""
    label = np.zeros(shape, np.uint8)
    wide = shape[0] // num_classes
    for k in range(1, num_classes):
        start = [int(rng.integers(1, 4)) for _ in shape]
        others = [slice(s, s + n // 2) for s, n in zip(start[1:], shape[1:])]
        label[slice((k - 1) * wide + start[0], k * wide), *others] = k
    return label


class Site:
    """One data set: `root` holds its files; `lists` and `config` are written by `finish`, after a
    fault was put in.
    """

    script = "train_3d_distill.py"

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True)
        self.rng = np.random.default_rng(0)
        self.lists: dict[str, list] = {}
        self.config: dict = {}

    def finish(self) -> None:
        """Write lists and config.yaml."""
        self.write_lists()
        (self.root / "config.yaml").write_text(
            yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True), encoding="utf-8"
        )

    def write_lists(self) -> None:
        for split, lines in self.lists.items():
            path = self.root / "splits" / f"{split}.txt"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def outside(self) -> Path:
        """A folder beside the data root."""
        folder = self.root.parent / f"{self.root.name}_elsewhere"
        folder.mkdir(exist_ok=True)
        return folder


class Decathlon(Site):
    """NIfTI with a decathlon JSON: four training cases, one to validate, one to test."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.lists = {"training": [], "validation": [], "test": []}
        for section, names in {"training": "abcd", "validation": "v", "test": "t"}.items():
            for name in names:
                self.add(section, f"case_{name}")
        self.config = {
            "dataset": "corrupt",
            "data_root": str(root),
            "datalist": "dataset.json",
            "cache_dir": str(root / "cache"),
            "class_names": ["background", "ball", "box"],
            "orientation": "RAS",
            "spacing": [2.0, 2.0, 2.0],
            "intensity": "window",
            "window": [0.0, 100.0],
            "crop_foreground": True,
            "patch_size": [16, 16, 16],
            "runs_dir": str(root / "runs"),
            "student": "unet",
            "network_args": NETWORKS_3D,
            **COMMON,
        }

    def add(self, section: str, name: str) -> None:
        label = blocks(self.rng, SHAPE, 3)
        image = 20 + 30 * label + self.rng.normal(0, 4, SHAPE)
        entry = {"image": f"imagesTr/{name}.nii.gz", "label": f"labelsTr/{name}.nii.gz"}
        self.save(entry["image"], image.astype(np.float32))
        self.save(entry["label"], label)
        self.lists[section].append(entry)

    def save(self, file: str, array: np.ndarray, affine: np.ndarray = AFFINE) -> None:
        path = self.root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(array, affine), path)

    def change(self, file: str, change: Callable, affine: Callable = lambda affine: affine) -> None:
        """Store `change(voxels)` with `affine(affine)` in the place of a file."""
        image = nib.load(self.root / file)
        voxels, where = np.array(image.dataobj), image.affine
        self.save(file, change(voxels), affine(where))

    def write_lists(self) -> None:
        if self.lists:
            (self.root / self.config["datalist"]).write_text(
                json.dumps(self.lists, indent=1), encoding="utf-8"
            )


IMAGE, LABEL = "imagesTr/case_b.nii.gz", "labelsTr/case_b.nii.gz"


def put(value: float) -> Callable:
    """A change that sets one voxel."""

    def change(voxels: np.ndarray) -> np.ndarray:
        voxels[3, 4, 5] = value
        return voxels

    return change


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.6)])


def moved(affine: np.ndarray) -> np.ndarray:
    return affine + np.pad(np.full((3, 1), 5.0), ((0, 1), (3, 0)))


def coarser(affine: np.ndarray) -> np.ndarray:
    return affine @ np.diag([2.0, 1, 1, 1])


def mirrored(affine: np.ndarray) -> np.ndarray:
    return np.diag([-1.0, 1, 1, 1]) @ affine


def uncoded(site: Decathlon) -> None:
    """Store all scans with a header that gives no place in space."""
    for entries in site.lists.values():
        for file in (file for entry in entries for file in entry.values()):
            image = nib.Nifti1Image(np.array(nib.load(site.root / file).dataobj), None)
            image.header.set_zooms((2.0, 2.0, 2.0))
            image.set_sform(None, code=0)
            image.set_qform(None, code=0)
            nib.save(image, site.root / file)


def identity(site: Decathlon) -> None:
    both(lambda affine: np.eye(4))(site)
    site.config["spacing"] = []  # as stored, or the scan would shrink below the patch


def both(change: Callable) -> Callable:
    """The same new affine for image and label of a case."""

    def spoil(site: Decathlon) -> None:
        for file in (IMAGE, LABEL):
            site.change(file, lambda voxels: voxels, change)

    return spoil


def with_lists(**names: list[str]) -> Callable:
    """Lists of names instead of those of the JSON."""

    def spoil(site: Decathlon) -> None:
        site.config["split_dir"] = str(site.root / "splits")
        folder = site.root / "splits"
        folder.mkdir()
        for split, lines in {"train": ["case_a", "case_b"], "val": ["case_v"], **names}.items():
            (folder / f"{split}.txt").write_text(
                "".join(f"{line}\n" for line in lines), encoding="utf-8"
            )

    return spoil


def set_header(**fields) -> Callable:
    """Set fields of the header of a case's image, whatever the voxels are."""

    def spoil(site: Decathlon) -> None:
        path = site.root / IMAGE
        content = bytearray(gzip.decompress(path.read_bytes()))
        for name, value in fields.items():
            dtype, offset = nib.Nifti1Header.template_dtype.fields[name][:2]
            content[offset : offset + dtype.itemsize] = np.asarray(value, dtype.base).tobytes()
        path.write_bytes(gzip.compress(bytes(content)))

    return spoil


def beyond_the_crop(site: Decathlon) -> None:
    """A labelled voxel where the scan is below the window."""

    def dark(voxels: np.ndarray) -> np.ndarray:
        voxels[:2] = -50
        return voxels

    def labelled(voxels: np.ndarray) -> np.ndarray:
        voxels[0, 4, 5] = 1
        return voxels

    site.change(IMAGE, dark)
    site.change(LABEL, labelled)


def two_forms(site: Decathlon) -> None:
    """sform and qform at different places."""
    image = nib.load(site.root / IMAGE)
    image.set_sform(image.affine, 2)
    image.set_qform(moved(image.affine), 1)
    nib.save(nib.Nifti1Image(np.array(image.dataobj), None, image.header), site.root / IMAGE)


def windows_paths(site: Decathlon) -> None:
    entry = site.lists["training"][1]
    entry |= {key: file.replace("/", "\\") for key, file in entry.items()}


def bad_json(site: Decathlon) -> None:
    (site.root / "dataset.json").write_text('{"training": [')
    site.lists = {}


def outside_entry(site: Decathlon, absolute: bool = False) -> None:
    folder = site.outside()
    for entry in site.lists["training"][1:2]:
        shutil.copy(site.root / entry["image"], folder / "case_b.nii.gz")
        entry["image"] = (
            str(folder.resolve() / "case_b.nii.gz")
            if absolute
            else f"../{folder.name}/case_b.nii.gz"
        )


def same_patient(site: Decathlon) -> None:
    site.add("training", "sub-01_ses-1")
    site.add("validation", "sub-01_ses-2")


def copied(site: Decathlon) -> None:
    """A training image under another name in the validation list, compressed anew."""
    entry = site.lists["validation"][0]
    site.save(entry["image"], np.array(nib.load(site.root / IMAGE).dataobj))


def listed_in(section: str) -> Callable:
    return lambda site: site.lists[section].append(site.lists["training"][0])


def without_class(site: Decathlon, number: int = 2) -> None:
    for entry in site.lists["training"]:
        site.change(
            entry["label"], lambda voxels: np.where(voxels == number, 0, voxels).astype(np.uint8)
        )


def small(site: Decathlon) -> None:
    for file in (IMAGE, LABEL):
        site.change(file, lambda voxels: voxels[:12, :12, :12])


def no_label(site: Decathlon) -> None:
    del site.lists["training"][1]["label"]


DECATHLON = {
    "malformed_list": ("list", "error", bad_json),
    "malformed_entry": (
        "list",
        "error",
        lambda site: site.lists["training"].append({"picture": "x"}),
    ),
    "no_training_case": ("empty list", "error", lambda site: site.lists.update(training=[])),
    "no_validation_case": ("empty list", "error", lambda site: site.lists.update(validation=[])),
    "empty_split_list": ("empty list", "error", with_lists(val=[])),
    "case_twice_in_a_list": ("listed twice", "error", listed_in("training")),
    "name_twice_in_a_split_list": (
        "listed twice",
        "error",
        with_lists(train=["case_a", "case_b", "case_a"]),
    ),
    "unknown_case": ("unknown case", "error", with_lists(train=["case_a", "nobody"])),
    "path_outside": ("outside", "error", outside_entry),
    "absolute_path_outside": ("outside", "error", lambda site: outside_entry(site, absolute=True)),
    "case_in_two_lists": ("two lists", "error", listed_in("validation")),
    "patient_in_two_lists": ("same patient", "error", same_patient),
    "copy_in_two_lists": ("duplicate", "error", copied),
    "missing_image": ("missing file", "error", lambda site: (site.root / IMAGE).unlink()),
    "missing_label": ("missing file", "error", lambda site: (site.root / LABEL).unlink()),
    "truncated_image": ("unreadable", "error", lambda site: truncate(site.root / IMAGE)),
    "text_for_label": (
        "unreadable",
        "error",
        lambda site: (site.root / LABEL).write_text("not a scan"),
    ),
    "web_page_for_image": (
        "unreadable",
        "error",
        lambda site: (site.root / IMAGE).write_text("<!DOCTYPE html><html>log in</html>"),
    ),
    "unknown_data_type": ("unreadable", "error", set_header(datatype=999)),
    "huge_header": ("too large", "error", set_header(dim=[3, *[30000] * 3, 1, 1, 1, 1])),
    "bytes_after_the_end": (
        "header",
        "warning",
        lambda site: (site.root / IMAGE).write_bytes((site.root / IMAGE).read_bytes() + b"tail"),
    ),
    "two_forms": ("header", "warning", two_forms),
    "windows_paths": ("list", "warning", windows_paths),
    "label_beyond_the_crop": ("lost labels", "warning", beyond_the_crop),
    "not_hounsfield": ("range", "warning", lambda site: site.config.update(window=[-175.0, 250.0])),
    "case_without_label": ("no label", "warning", no_label),
    "complex_voxels": (
        "type",
        "error",
        lambda site: site.change(IMAGE, lambda v: v.astype(np.complex64)),
    ),
    "label_shape": ("shape", "error", lambda site: site.change(LABEL, lambda v: v[:-1])),
    "two_channels": (
        "channels",
        "error",
        lambda site: site.change(IMAGE, lambda v: np.stack([v, v + 1], -1)),
    ),
    "one_slice": ("channels", "error", lambda site: site.change(IMAGE, lambda v: v[..., 0])),
    "label_moved": ("affine", "error", lambda site: site.change(LABEL, lambda v: v, moved)),
    "label_spacing": ("spacing", "error", lambda site: site.change(LABEL, lambda v: v, coarser)),
    "implausible_spacing": ("spacing", "warning", both(lambda a: a @ np.diag([1, 1, 16.0, 1]))),
    "label_mirrored": (
        "orientation",
        "error",
        lambda site: site.change(LABEL, lambda v: v, mirrored),
    ),
    "stored_unlike_others": ("orientation", "warning", both(mirrored)),
    "identity_affine": ("header", "warning", identity),
    "no_affine": ("header", "warning", uncoded),
    "nan": ("not finite", "error", lambda site: site.change(IMAGE, put(np.nan))),
    "infinite": ("not finite", "error", lambda site: site.change(IMAGE, put(np.inf))),
    "constant": ("constant", "error", lambda site: site.change(IMAGE, lambda v: 0 * v + 7)),
    "nothing_in_the_window": (
        "no foreground",
        "error",
        lambda site: site.change(IMAGE, lambda v: v - 900),
    ),
    "label_id": ("label ids", "error", lambda site: site.change(LABEL, put(7))),
    "fractional_label": (
        "label ids",
        "error",
        lambda site: site.change(LABEL, lambda v: v.astype(np.float32) / 2),
    ),
    "empty_label": ("empty label", "warning", lambda site: site.change(LABEL, lambda v: 0 * v)),
    "class_never_labelled": ("absent class", "error", without_class),
    "smaller_than_the_patch": ("small", "warning", small),
}


class Brats(Decathlon):
    """Four channel files per case."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        for key in ("orientation", "spacing", "intensity", "window", "crop_foreground"):
            del self.config[key]
        self.config |= {
            "format": "brats",
            "class_names": ["tumour core", "whole tumour", "enhancing tumour"],
            "in_channels": 4,
            "crop": "uniform",
        }

    def add(self, section: str, name: str) -> None:
        if name.startswith("case_"):
            name = f"BraTS-GLI-{10 + 'abcdvt'.index(name[-1]):05d}-000"
        label = blocks(self.rng, SHAPE, 4)
        entry = {
            "image": [f"{name}/{name}-{m}.nii.gz" for m in MODALITIES],
            "label": f"{name}/{name}-seg.nii.gz",
        }
        for k, file in enumerate(entry["image"]):
            self.save(
                file, (100 + 50 * k + 20 * label + self.rng.integers(0, 30, SHAPE)).astype(np.int16)
            )
        self.save(entry["label"], label)
        self.lists[section].append(entry)


CHANNEL, SEGMENTATION = (
    f"BraTS-GLI-00011-000/BraTS-GLI-00011-000-{part}.nii.gz" for part in ("t2f", "seg")
)


def swapped(site: Brats) -> None:
    images = site.lists["training"][1]["image"]
    images[0], images[1] = images[1], images[0]


def three_channels(site: Brats) -> None:
    del site.lists["training"][1]["image"][3]


def outside_channel(site: Brats) -> None:
    folder = site.outside()
    images = site.lists["training"][1]["image"]
    shutil.copy(site.root / images[2], folder / "x-t2f.nii.gz")
    images[2] = f"../{folder.name}/x-t2f.nii.gz"


def time_points(site: Brats) -> None:
    site.add("training", "BraTS-GLI-00099-000")
    site.add("test", "BraTS-GLI-00099-001")


def copied_case(site: Brats) -> None:
    for source, target in zip(site.lists["training"][1]["image"], site.lists["test"][0]["image"]):
        site.save(target, np.array(nib.load(site.root / source).dataobj))


def no_brain(site: Brats) -> None:
    for file in site.lists["training"][1]["image"]:
        site.change(file, lambda voxels: (voxels - 2000).astype(np.int16))


def resection_cavity(site: Brats) -> None:
    def cavity(voxels: np.ndarray) -> np.ndarray:
        voxels[voxels == 2] = 4
        return voxels

    site.change(SEGMENTATION, cavity)


def older_release(site: Brats) -> None:
    site.change(SEGMENTATION, lambda voxels: np.where(voxels == 3, 4, voxels).astype(np.uint8))


def never_enhancing(site: Brats) -> None:
    for entry in site.lists["training"]:
        site.change(
            entry["label"], lambda voxels: np.where(voxels == 3, 0, voxels).astype(np.uint8)
        )


BRATS = {
    "malformed_list": ("list", "error", bad_json),
    "no_training_case": ("empty list", "error", lambda site: site.lists.update(training=[])),
    "case_twice_in_a_list": ("listed twice", "error", listed_in("training")),
    "path_outside": ("outside", "error", outside_channel),
    "case_in_two_lists": ("two lists", "error", listed_in("test")),
    "time_points_in_two_lists": ("same patient", "error", time_points),
    "copy_in_two_lists": ("duplicate", "error", copied_case),
    "missing_channel_file": ("missing file", "error", lambda site: (site.root / CHANNEL).unlink()),
    "truncated_channel": ("unreadable", "error", lambda site: truncate(site.root / CHANNEL)),
    "channel_shape": ("shape", "error", lambda site: site.change(CHANNEL, lambda v: v[1:])),
    "channel_order": ("channels", "error", swapped),
    "three_channels": ("channels", "error", three_channels),
    "channels_of_the_decathlon": (
        "channels",
        "error",
        lambda site: site.lists.update(
            modality={"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}
        ),
    ),
    "ids_of_another_release": ("label ids", "error", resection_cavity),
    "cases_of_two_releases": ("label ids", "error", older_release),
    "label_moved": ("affine", "error", lambda site: site.change(SEGMENTATION, lambda v: v, moved)),
    "nan": (
        "not finite",
        "error",
        lambda site: site.change(CHANNEL, lambda v: put(np.nan)(v.astype(np.float32))),
    ),
    "constant_channel": ("constant", "error", lambda site: site.change(CHANNEL, lambda v: 0 * v)),
    "no_brain": ("no foreground", "error", no_brain),
    "label_id": ("label ids", "error", lambda site: site.change(SEGMENTATION, put(5))),
    "empty_label": (
        "empty label",
        "warning",
        lambda site: site.change(SEGMENTATION, lambda v: 0 * v),
    ),
    "never_enhancing": ("absent class", "error", never_enhancing),
    "smaller_than_the_patch": (
        "small",
        "warning",
        lambda site: site.config.update(patch_size=[32, 32, 32]),
    ),
}


def save_h5(path: Path, **arrays: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for key, array in arrays.items():
            file.create_dataset(
                key, data=array, compression=None if array.dtype.kind == "O" else "gzip"
            )


class H5Site(Site):
    """What faults of HDF5 files have in common. Lists are in splits/; two of four training units
    are labelled.
    """

    target: str  # a file that is read for training

    def link_elsewhere(self) -> None:
        """The image is a link into a file beside the data root."""
        path = self.outside() / "elsewhere.h5"
        shutil.copy(self.root / self.target, path)
        with h5py.File(self.root / self.target, "a") as file:
            del file["image"]
            file["image"] = h5py.ExternalLink(str(path), "image")

    def change(self, file: str, **changes: Callable) -> None:
        """Store `changes[key](array)` for the arrays of a file."""
        path = self.root / file
        with h5py.File(path) as stored:
            arrays = {key: stored[key][()] for key in stored}
        save_h5(path, **arrays | {key: change(arrays[key]) for key, change in changes.items()})


class Atrium(H5Site):
    """LA scans."""

    script = "train_3d_crkd.py"
    target = "S2/mri_norm2.h5"

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.lists = {"train": ["S1", "S2", "S3", "S4"], "val": ["V1"], "test": ["T1"]}
        for names in self.lists.values():
            for name in names:
                self.add(name)
        self.config = {
            "dataset": "corrupt",
            "format": "la",
            "data_root": str(root),
            "split_dir": str(root / "splits"),
            "class_names": ["background", "atrium"],
            "patch_size": [16, 16, 16],
            "labelled": 2,
            "stride": [16, 16, 16],
            "val_stride": [16, 16, 16],
            "runs_dir": str(root / "runs"),
            "network_args": {"vnet": {"n_filters": 2}},
            **COMMON,
            "method": "unimatch",
        }

    def add(self, name: str) -> None:
        label = blocks(self.rng, SHAPE, 2)
        save_h5(
            self.root / name / "mri_norm2.h5",
            image=(label + self.rng.normal(0, 0.4, SHAPE)).astype(np.float32),
            label=label,
        )

    def copy(self, source: str, target: str) -> None:
        """The arrays of one unit as those of another, in a new file."""
        self.change(f"{target}/mri_norm2.h5", image=lambda _: self.array(source, "image"))

    def array(self, name: str, key: str) -> np.ndarray:
        with h5py.File(self.root / name / "mri_norm2.h5") as file:
            return file[key][()]

    def unlabel(self) -> None:
        for name in self.lists["train"]:
            self.change(f"{name}/mri_norm2.h5", label=lambda label: 0 * label)

    def lose(self) -> None:
        shutil.rmtree(self.root / "S3")


class Heart(H5Site):
    """ACDC volumes and slices."""

    script = "train_2d_crkd.py"
    target = "data/slices/patient002_frame01_slice_2.h5"

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.lists = {
            "train": [f"patient{k:03d}" for k in (1, 2, 3, 4)],
            "val": ["patient005"],
            "test": ["patient006"],
        }
        for names in self.lists.values():
            for name in names:
                self.add(name)
        self.config = {
            "dataset": "corrupt",
            "format": "acdc",
            "data_root": str(root),
            "split_dir": str(root / "splits"),
            "class_names": ["background", "right", "wall", "left"],
            "patch_size": [32, 32],
            "labelled": 2,
            "runs_dir": str(root / "runs"),
            "network_args": {"unet2d": {"channels": [2, 4, 4, 8, 8]}},
            **COMMON,
            "method": "unimatch",
        }

    def add(self, name: str) -> None:
        for frame in ("frame01", "frame02"):
            label = np.stack([blocks(self.rng, (34, 30), 4) for _ in range(3)])
            image = np.clip(0.2 * label + self.rng.random(label.shape) * 0.3, 0, 1).astype(
                np.float32
            )
            self.write(f"{name}_{frame}", image, label)

    def write(self, stem: str, image: np.ndarray, label: np.ndarray) -> None:
        save_h5(self.root / "data" / f"{stem}.h5", image=image, label=label)
        for z in range(len(image)):
            save_h5(
                self.root / "data" / "slices" / f"{stem}_slice_{z + 1}.h5",
                image=image[z],
                label=label[z],
            )

    def array(self, stem: str, key: str) -> np.ndarray:
        with h5py.File(self.root / "data" / f"{stem}.h5") as file:
            return file[key][()]

    def copy(self, source: str, target: str) -> None:
        for frame in ("frame01", "frame02"):
            image, label = (self.array(f"{source}_{frame}", key) for key in ("image", "label"))
            self.write(f"{target}_{frame}", image, label)

    def unlabel(self) -> None:
        """Class 3 is in no training slice."""
        for path in sorted((self.root / "data" / "slices").glob("patient00[1234]*.h5")):
            self.change(
                str(path.relative_to(self.root)),
                label=lambda v: np.where(v == 3, 0, v).astype(np.uint8),
            )

    def empty_frame(self) -> None:
        for z in (1, 2, 3):
            self.change(
                f"data/slices/patient002_frame01_slice_{z}.h5", label=lambda label: 0 * label
            )

    def lose(self) -> None:
        for path in (self.root / "data" / "slices").glob("patient003_*.h5"):
            path.unlink()


def h5_faults(train: list[str], val: str, test: str) -> dict:
    """What the two formats of HDF5 files have in common; names of their units."""

    def patients(site: H5Site) -> None:
        for name, split in (("sub-01_ses-1", "train"), ("sub-01_ses-2", "val")):
            site.add(name)
            site.lists[split].append(name)

    def on(**changes: Callable) -> Callable:
        return lambda site: site.change(site.target, **changes)

    return {
        "no_training_list": ("list", "error", lambda site: site.lists.pop("train")),
        "empty_list": ("empty list", "error", lambda site: site.lists.update(val=[])),
        "name_twice_in_a_list": (
            "listed twice",
            "error",
            lambda site: site.lists["train"].append(train[0]),
        ),
        "name_outside": (
            "outside",
            "error",
            lambda site: site.lists["train"].append("../elsewhere"),
        ),
        "name_in_two_lists": (
            "two lists",
            "error",
            lambda site: site.lists["val"].append(train[0]),
        ),
        "patient_in_two_lists": ("same patient", "error", patients),
        "copy_in_two_lists": ("duplicate", "error", lambda site: site.copy(train[1], val)),
        "copy_of_a_test_case": ("duplicate", "error", lambda site: site.copy(test, train[1])),
        "missing_files": ("missing file", "error", lambda site: site.lose()),
        "truncated": ("unreadable", "error", lambda site: truncate(site.root / site.target)),
        "no_h5": (
            "unreadable",
            "error",
            lambda site: (site.root / site.target).write_text("not a scan"),
        ),
        "link_elsewhere": ("outside", "error", lambda site: site.link_elsewhere()),
        "other_keys": (
            "keys",
            "error",
            lambda site: save_h5(
                site.root / site.target, data=np.ones((4, 4)), mask=np.ones((4, 4))
            ),
        ),
        "text_for_image": ("type", "error", on(image=lambda v: np.full(v.shape, "a", object))),
        "real_label": ("type", "warning", on(label=lambda v: v.astype(np.float32))),
        "label_shape": ("shape", "error", on(label=lambda v: v[1:])),
        "more_axes": (
            "shape",
            "error",
            on(image=lambda v: v[..., None], label=lambda v: v[..., None]),
        ),
        "nan": ("not finite", "error", on(image=lambda v: np.where(v == v.max(), np.nan, v))),
        "constant": ("constant", "error", on(image=lambda v: 0 * v)),
        "label_id": (
            "label ids",
            "error",
            on(label=lambda v: np.where(v > 0, 9, 0).astype(np.uint8)),
        ),
        "class_never_labelled": ("absent class", "error", lambda site: site.unlabel()),
    }


ATRIUM = h5_faults(["S1", "S2"], "V1", "T1") | {
    "empty_label": (
        "empty label",
        "warning",
        lambda site: site.change(site.target, label=lambda v: 0 * v),
    ),
    "whole_numbers": (
        "type",
        "warning",
        lambda site: site.change(site.target, image=lambda v: (50 * v).astype(int)),
    ),
    "smaller_than_the_patch": (
        "small",
        "warning",
        lambda site: site.change(
            site.target, image=lambda v: v[:12], label=lambda v: np.roll(v, 5, 0)[:12]
        ),
    ),
}
HEART = h5_faults(["patient001", "patient002"], "patient005", "patient006") | {
    "missing_slice": ("missing file", "error", lambda site: (site.root / site.target).unlink()),
    "intensities_not_in_0_to_1": (
        "range",
        "error",
        lambda site: site.change(site.target, image=lambda v: 255 * v),
    ),
    "empty_label": ("empty label", "warning", lambda site: site.empty_frame()),
}


class Photographs(Site):
    """RGB images and masks in folders of train and val, and lists of names."""

    script = "train_2d_crkd.py"

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.lists = {"train": [f"photo{k}" for k in range(6)], "val": ["seen0", "seen1"]}
        for split, names in self.lists.items():
            for name in names:
                self.add(split, name)
        self.config = {
            "dataset": "corrupt",
            "format": "images2d",
            "data_root": str(root),
            "class_names": ["background", "lesion"],
            "patch_size": [32, 32],
            "labelled": 3,
            "runs_dir": str(root / "runs"),
            "network_args": {"unet2d": {"channels": [2, 4, 4, 8, 8]}},
            **COMMON,
            "method": "unimatch",
        }

    def add(self, split: str, name: str) -> None:
        mask = blocks(self.rng, (40, 36), 2)
        image = np.clip(90 + 60 * mask[..., None] + self.rng.normal(0, 12, (40, 36, 3)), 0, 255)
        self.save(f"{split}/images/{name}.png", image.astype(np.uint8))
        self.save(f"{split}/masks/{name}.png", 255 * mask)

    def save(self, file: str, pixels: np.ndarray) -> None:
        path = self.root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)

    def change(self, file: str, change: Callable) -> None:
        self.save(file, change(np.array(Image.open(self.root / file))))

    def write_lists(self) -> None:
        for split, lines in self.lists.items():
            (self.root / f"{split}.txt").write_text(
                "".join(f"{line}\n" for line in lines), encoding="utf-8"
            )


PHOTO, MASK = "train/images/photo1.png", "train/masks/photo1.png"


def patients_of_photos(site: Photographs) -> None:
    for name, split in (("sub-01_1", "train"), ("sub-01_2", "val")):
        site.add(split, name)
        site.lists[split].append(name)


def no_folder(site: Photographs) -> None:
    shutil.rmtree(site.root / "train")
    shutil.rmtree(site.root / "val")
    site.lists = {}


def outside_photo(site: Photographs) -> None:
    folder = site.outside()
    for part in ("images", "masks"):
        shutil.copy(site.root / f"train/{part}/photo1.png", folder / f"{part}.png")
    site.lists["train"][1] = f"../{folder.name}/images.png ../{folder.name}/masks.png"


def blurred(mask: np.ndarray) -> np.ndarray:
    ramp = np.linspace(0, 255, mask.shape[1]).astype(np.uint8)
    return np.broadcast_to(ramp, mask.shape).copy()


def thirds(mask: np.ndarray) -> np.ndarray:
    mask[:10], mask[10:20] = 85, 170
    return mask


def empty_masks(site: Photographs) -> None:
    for name in site.lists["train"]:
        site.change(f"train/masks/{name}.png", lambda mask: 0 * mask)


PHOTOGRAPHS = {
    "no_images": ("list", "error", no_folder),
    "empty_list": ("empty list", "error", lambda site: site.lists.update(val=[])),
    "name_twice_in_a_list": (
        "listed twice",
        "error",
        lambda site: site.lists["train"].append("photo0"),
    ),
    "unknown_image": ("unknown case", "error", lambda site: site.lists["train"].append("nothing")),
    "path_outside": ("outside", "error", outside_photo),
    "image_in_two_lists": ("two lists", "error", lambda site: site.lists["val"].append("photo0")),
    "patient_in_two_lists": ("same patient", "error", patients_of_photos),
    "copy_in_two_lists": (
        "duplicate",
        "error",
        lambda site: shutil.copy(site.root / PHOTO, site.root / "val/images/seen1.png"),
    ),
    "copy_in_one_list": (
        "duplicate",
        "warning",
        lambda site: shutil.copy(site.root / PHOTO, site.root / "train/images/photo4.png"),
    ),
    "missing_image": (
        "missing file",
        "error",
        lambda site: site.lists["train"].append("train/images/gone.png train/masks/gone.png"),
    ),
    "truncated": ("unreadable", "error", lambda site: truncate(site.root / PHOTO)),
    "no_mask": ("no label", "warning", lambda site: (site.root / MASK).unlink()),
    "mask_without_image": (
        "stray file",
        "warning",
        lambda site: shutil.copy(site.root / MASK, site.root / "train/masks/lost.png"),
    ),
    "deep_pixels": (
        "type",
        "error",
        lambda site: site.change(PHOTO, lambda v: v[..., 0].astype(np.uint16) * 200),
    ),
    "several_pages": (
        "shape",
        "error",
        lambda site: Image.new("L", (36, 40)).save(
            site.root / PHOTO,
            format="TIFF",
            save_all=True,
            append_images=[Image.new("L", (36, 40))],
        ),
    ),
    "transparent_photo": (
        "type",
        "warning",
        lambda site: site.change(PHOTO, lambda v: np.dstack([v, v[..., 0]])),
    ),
    "whole_image_mask": (
        "mask values",
        "warning",
        lambda site: site.change(MASK, lambda v: 0 * v + 255),
    ),
    "postscript": (
        "unreadable",
        "error",
        lambda site: (site.root / PHOTO).write_text("%!PS-Adobe-3.0 EPSF-3.0\n"),
    ),
    "mask_size": ("shape", "error", lambda site: site.change(MASK, lambda v: v[:-3])),
    "constant": ("constant", "error", lambda site: site.change(PHOTO, lambda v: 0 * v)),
    "mask_of_ids": ("mask values", "error", lambda site: site.change(MASK, lambda v: v // 255)),
    "mask_of_classes": ("mask values", "error", lambda site: site.change(MASK, thirds)),
    "blurred_mask": ("mask values", "warning", lambda site: site.change(MASK, blurred)),
    "empty_mask": ("empty label", "warning", lambda site: site.change(MASK, lambda v: 0 * v)),
    "nothing_labelled": ("absent class", "error", empty_masks),
}

SITES = {
    "btcv": (Decathlon, DECATHLON),
    "word": (Decathlon, DECATHLON),
    "brats21": (Brats, BRATS),
    "la": (Atrium, ATRIUM),
    "acdc": (Heart, HEART),
    "isic2018": (Photographs, PHOTOGRAPHS),
    "kvasir": (Photographs, PHOTOGRAPHS),
}


def write_site(dataset: str, name: str, root: Path) -> Site:
    """Write the data set of one fault, or the sound one, in a new folder."""
    site_class, faults = SITES[dataset]
    site = site_class(root)
    if name != "sound":
        faults[name][2](site)
    site.finish()
    return site


def write_corrupt(dataset: str, out: Path) -> str:
    """Write the sound data set and one for each fault -> what was written, in words."""
    faults = {name: (fault, level) for name, (fault, level, _) in SITES[dataset][1].items()}
    written = {}
    for name, (fault, level) in {"sound": (None, None), **faults}.items():
        site = write_site(dataset, name, out / name)
        written[name] = {"fault": fault, "level": level, "script": site.script}
    (out / "faults.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    return (
        f"{len(faults)} faults, a folder with a config.yaml for each, and a sound data set; list: "
        f"{out}/faults.json"
    )
