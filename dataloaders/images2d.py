"""RGB images with binary masks: ISIC-2018 (skin lesions), Kvasir-SEG (polyps), or own data in the
same form.

    <root>/train/images, <root>/train/masks, <root>/val/images, ...  lists made from the folders, or
    <root>/images, <root>/masks                                      lists drawn by
                                                                     tools/make_splits.py
    <root>/ISIC2018_Task1-2_Training_Input and so on                 the download of ISIC-2018

Lists are train.txt, val.txt and, if there is one, test.txt. A line is an image's name without
suffix or, as in the released lists, `train/images/X.jpg train/masks/X.png`; paths with blanks are
parted by a tab. Labelled images are those of labelled_5%.txt, labelled_44.txt or
ratio_5%/labeled.txt; where there is no such list they are drawn, always the same ones. Masks are
cut at half: JPEG masks hold every value between 0 and 255. Other masks whose few intermediate
values look like ids of further classes are refused, blurred ones are warned of. `ignore_label` is
the grey value of pixels that nobody labelled. Sizes are in pixels, so spacing is 1.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from dataloaders import augment
from dataloaders.base import InMemory
from dataloaders.cases import UNKNOWN, Case
from dataloaders.checks import (
    check_depth,
    check_inside,
    check_mask,
    check_pages,
    check_transparency,
    grey_mask,
)
from dataloaders.faults import (
    WARNING,
    CaseNotes,
    DataError,
    Finding,
    Report,
    check_room,
    no_file,
    unreadable,
)
from dataloaders.lists import draw, find_images, labelled_count, listed_file, read_split
from dataloaders.volumes import is_data, stem

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff")
# Readers of PIL that are asked, whatever the name's ending says; all of them are plain decoders
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "GIF", "WEBP")
FOLDERS = {  # images, masks; where the names alone tell the list, its name
    "train": ("train/images", "train/masks"),
    "val": ("val/images", "val/masks"),
    "test": ("test/images", "test/masks"),
    "": ("images", "masks"),
    "isic": ("ISIC2018_Task1-2_Training_Input", "ISIC2018_Task1_Training_GroundTruth"),
    "isic_val": ("ISIC2018_Task1-2_Validation_Input", "ISIC2018_Task1_Validation_GroundTruth"),
    "isic_test": ("ISIC2018_Task1-2_Test_Input", "ISIC2018_Task1_Test_GroundTruth"),
}
MASK_ENDING = "_segmentation"  # of the ISIC archive
AUGMENTATIONS = ("semi", "supervised")
RESIZES = ("bilinear", "nearest")


class Images2DDataset(InMemory):
    """RGB images and binary masks of any size, resized to patch_size.

    split_dir: folder of the lists, root if empty. augmentation: 'semi' resizes first and always
    turns and mirrors, labelled images too; 'supervised' is the pipeline of the fully supervised
    runs for `patch` (turn and mirror half the time, else small rotations, then resize),
    which reads images at their own size. eval_resize: of images to be predicted; 'bilinear' as in
    training, 'nearest' as the released testers do.
    """

    dims = 2
    unit = "image"
    distance_unit = "pixels"
    in_channels = 3
    repeats = WARNING  # collections of photographs have some

    def __init__(
        self,
        root: str,
        split_dir: str = "",
        patch_size: Sequence[int] = (320, 320),
        class_names: Sequence[str] = ("background", "lesion"),
        memory_gb: float = 2.0,
        augmentation: str = "semi",
        eval_resize: str = "bilinear",
        patient_pattern: str = "",
        absent_classes: Sequence[str] = (),
        unlabelled: str = "",
        **labels,
    ) -> None:
        others = patient_pattern, absent_classes, unlabelled
        super().__init__(
            root, split_dir or root, class_names, patch_size, memory_gb, *others, **labels
        )
        if self.ignore_label is not None and not 0 < self.ignore_label < 255:
            raise DataError(
                f"ignore_label: {self.ignore_label} is no grey value between those of background "
                "(0) and foreground (255)"
            )
        if patch_size[0] != patch_size[1]:
            raise DataError(
                "patch_size must be two equal numbers, since images are turned, got "
                f"{list(patch_size)}"
            )
        if len(class_names) != 2:
            raise DataError(f"masks are binary; class_names must be two, got {list(class_names)}")
        if augmentation not in AUGMENTATIONS:
            raise DataError(
                f"augmentation must be one of {', '.join(AUGMENTATIONS)}, got '{augmentation}'"
            )
        if eval_resize not in RESIZES:
            raise DataError(f"eval_resize must be one of {', '.join(RESIZES)}, got '{eval_resize}'")
        self.augmentation, self.eval_resize = augmentation, eval_resize
        self._known: dict[str, Case] = {}

    @property
    def allowed_ids(self) -> tuple[int, ...]:
        """Grey values of a mask."""
        return (0, 255)

    def scan(self) -> dict[str, list[Case]]:
        """The images of each folder that exists, sorted by name; a mask has the name of its
        image.
        """
        found = {}
        for key, (images, masks) in FOLDERS.items():
            paths = _files(self.root / images)
            if paths:
                labels = {
                    stem(path).removesuffix(MASK_ENDING): path for path in _files(self.root / masks)
                }
                found[key] = [Case(stem(path), (path,), labels.get(stem(path))) for path in paths]
        return found

    def skipped(self) -> list[Path]:
        """Files of these folders that are no images, such as licence texts."""
        folders = [self.root / folder for pair in FOLDERS.values() for folder in pair]
        entries = [path for folder in folders if folder.is_dir() for path in folder.iterdir()]
        return sorted(path for path in entries if path.is_file() and not _is_image(path))

    def find(self, names: Sequence[str]) -> list[Case]:
        """The images called `names`, from any list or folder."""
        found = self._known.keys() >= set(names) or self._by_name(Report()).keys() >= set(names)
        if not found and (self.split_dir / "train.txt").is_file():
            self.lists(Report())  # of paths to other folders
        return super().find(names)

    def read(self, case: Case, notes: CaseNotes | None = None) -> dict:
        """An image at its own size: image (3, H, W) float32, label (1, H, W) uint8; spacing 1
        pixel.
        """
        image, mask = _open_pair(case, notes, self.ignore_label)
        label = {} if mask is None else {"label": np.asarray(mask)[None]}
        return {"image": augment.from_pil(image), **label, "spacing": [1.0, 1.0], "name": case.name}

    def read_file(self, case: Case) -> dict:
        """An image file: image (3, H, W) float32 in 0..1 at its own size."""
        notes = Report()
        image = augment.from_pil(_open_image(case.images[0], notes))
        return {"image": image, "name": case.name, "findings": notes.warnings}

    def slices(self, volume: dict) -> np.ndarray:
        """The image as the network takes it: (1, 3, *patch_size) float32."""
        if self.eval_resize == "nearest":
            return augment.resize_nearest(volume["image"], self.patch_size)[None]
        return augment.resize_image(volume["image"], self.patch_size)[None]

    def unslice(self, prediction: np.ndarray, volume: dict) -> np.ndarray:
        """Label maps (1, *patch_size) -> (H, W), nearest neighbour."""
        return augment.resize_nearest(prediction, volume["image"].shape[1:])[0]

    def patch(self, sample: dict, rng: np.random.Generator) -> dict:
        """The weak view, or with augmentation 'supervised' the pipeline of fully supervised
        runs.
        """
        if self.augmentation == "semi":
            return self.weak(sample, rng)
        if rng.random() > 0.5:
            sample = augment.rot_flip(sample, rng)
        elif rng.random() > 0.5:
            sample = augment.rotate_small_rgb(sample, rng)
        return augment.resize_rgb(sample, self.patch_size)

    def weak(self, sample: dict, rng: np.random.Generator) -> dict:
        """Resized, then always quarter turns and a mirror."""
        return augment.rot_flip(augment.resize_rgb(sample, self.patch_size), rng)

    def strong(self, sample: dict, rng: np.random.Generator) -> dict:
        """Colour jitter, grayscale and blur of a weak view."""
        return augment.strong_rgb(sample, rng)

    def load(self, case: Case, notes: CaseNotes | None) -> dict[str, np.ndarray]:
        image, mask = _open_pair(case, notes, self.ignore_label)
        # the first step of the pipeline, without a random choice: done once
        if self.augmentation == "semi":
            size = (self.patch_size[1], self.patch_size[0])
            image = image.resize(size, Image.Resampling.BILINEAR)
            mask = mask and mask.resize(size, Image.Resampling.NEAREST)
        label = {} if mask is None else {"label": np.array(mask)[None]}
        return {"image": np.ascontiguousarray(np.moveaxis(np.asarray(image), -1, 0)), **label}

    def unpacked(self, stored: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return stored | {"image": stored["image"].astype(np.float32) / np.float32(255)}

    def has_label(self, name: str) -> bool:
        return name not in self._known or self._known[name].label is not None

    def folder_cases(self, folder: Path, report: Report) -> list[Case]:
        return find_images(folder, SUFFIXES)

    def lists(self, report: Report) -> dict[str, list[str]]:
        names = ("train", "unlabelled", "val", "test")
        lists = {split: self._read_list(split, report) for split in names}
        if lists["train"] is None:
            lists |= self._ratio_lists(report)
        folders = self.scan() if lists["train"] is None or lists["val"] is None else {}
        for split in ("train", "val") if lists["train"] else ("train", "val", "test"):
            if lists[split] is None:
                lists[split] = [
                    case.name for case in folders.get(split, []) if self._add(case, report)
                ]
        for split in ("train", "val"):
            if not lists[split] and not (self.split_dir / f"{split}.txt").is_file():
                report.error(
                    "list",
                    f"{self.split_dir / split}.txt",
                    f"no such list, and {self.root} has "
                    f"{', '.join(FOLDERS[key][0] for key in folders) or 'no folder of images'}",
                    " and ".join(FOLDERS[split]),
                    "or draw lists with tools/make_splits.py images",
                )
        self._check_strays(report)
        return {split: names or [] for split, names in lists.items()}

    def _read_list(self, name: str, report: Report) -> list[str] | None:
        """Image names of a list; None if there is none."""
        lines = read_split(self.split_dir, name, report)
        if lines is None:
            return None
        source, by_name, names = self.split_dir / f"{name}.txt", None, []
        for line in lines:
            paths = line.split("\t") if "\t" in line else line.split()
            if len(paths) == 2 and all(Path(path).suffix.lower() in SUFFIXES for path in paths):
                image, mask = (
                    listed_file(source, self.root, path.strip(), report) for path in paths
                )
                if all(
                    [
                        check_inside(p, self.root, source, report, self.allow_outside)
                        for p in (image, mask)
                    ]
                ):
                    with report.catching():
                        if self._add(Case(stem(image), (image,), mask), report):
                            names.append(stem(image))
                continue
            by_name = by_name or self._by_name(report)
            if line in by_name:
                names.append(line)
            else:
                example = next(iter(by_name), "none")
                report.error(
                    "unknown case",
                    source,
                    f"there is no image '{line}' in {self.root}",
                    "an image's name, or the paths of image and mask, parted by a tab if they have "
                    "blanks",
                    f"names look like {example}",
                )
        repeated = (
            sorted({name for name in names if names.count(name) > 1})
            if len(set(names)) < len(names)
            else []
        )
        if repeated:
            report.error(
                "listed twice",
                source,
                f"listed twice: {', '.join(repeated[:5])}",
                "",
                "each image may stand once",
            )
        return list(dict.fromkeys(names))

    def _ratio_lists(self, report: Report) -> dict[str, list[str]]:
        """Train and val of the first ratio_N% folder, if there is one: train is labelled and
        unlabelled together.
        """
        for folder in sorted(self.split_dir.glob("ratio_*%")):
            parts = [
                self._read_list(f"{folder.name}/{part}", report)
                for part in ("labeled", "unlabeled")
            ]
            if all(parts):
                lists = {"train": sorted({name for part in parts for name in part})}
                val = (
                    None
                    if (self.split_dir / "val.txt").is_file()
                    else self._read_list(f"{folder.name}/val", report)
                )
                return lists | ({"val": val} if val else {})
        return {}

    def choose(
        self, train: Sequence[str], labelled: int | float | None, report: Report
    ) -> list[str]:
        count = labelled_count(labelled, len(train), f"{self.split_dir}/train.txt", self.unit)
        if count == len(train):
            return list(train)
        stored = [f"labelled_{count}"]
        if labelled < 1 and abs(labelled * 100 - round(labelled * 100)) < 1e-6:
            percent = round(labelled * 100)
            stored = [f"labelled_{percent}%", f"ratio_{percent}%/labeled"]
        for name in stored:
            chosen = self._read_list(name, report)
            if chosen is not None:
                known = set(train)
                foreign = sorted(set(chosen) - known)
                unmasked = [image for image in foreign if not self.has_label(image)]
                for case in (self._known[image] for image in unmasked):
                    report.error(
                        "no label",
                        case.images[0],
                        f"{self.split_dir / name}.txt lists it as labelled, but it has no mask",
                        "a mask of its name",
                        "restore the mask or take the image out of the list",
                    )
                foreign = [image for image in foreign if image not in unmasked]
                if foreign:
                    report.error(
                        "unknown case",
                        f"{self.split_dir / name}.txt",
                        f"{len(foreign)} of {len(chosen)} images are not in the train list, for "
                        "example "
                        f"'{foreign[0]}'",
                        "labelled images are training images",
                        "draw the list again",
                    )
                return [image for image in chosen if image in known]
        return draw(train, count)

    def _add(self, case: Case, report: Report) -> bool:
        """Make an image known; False, and a fault, where another one has its name."""
        other = self._known.setdefault(case.name, case)
        if other.images != case.images:
            report.error(
                "listed twice",
                case.images[0],
                f"called '{case.name}' as {other.images[0]} is",
                "a name of its own for every image, without its suffix",
                "rename one of them",
            )
        return other.images == case.images

    def _by_name(self, report: Report) -> dict[str, Case]:
        """Every image of the folders."""
        for cases in self.scan().values():
            for case in cases:
                self._add(case, report)
        return self._known

    def _check_strays(self, report: Report) -> None:
        """A warning for each mask of the folders without an image: its image may have been lost."""
        for images, masks in FOLDERS.values():
            named = {stem(path) for path in _files(self.root / images)}
            for path in _files(self.root / masks) if named else []:
                if stem(path).removesuffix(MASK_ENDING) not in named:
                    report.warning(
                        "stray file",
                        path,
                        "a mask without an image",
                        f"an image of its name in {images}",
                        "restore the image or remove the mask",
                    )

    def evaluation_cases(self, names: Sequence[str], report: Report) -> list[Case]:
        if not all(name in self._known for name in names):
            self._by_name(report)
        unknown = [name for name in names if name not in self._known]
        if unknown:
            report.error(
                "unknown case",
                self.root,
                f"{len(unknown)} of {len(names)} images not found, for example '{unknown[0]}'",
                "",
                "complete the data or set data_root and split_dir to where they are",
            )
        cases = []
        for case in (self._known[name] for name in names if name in self._known):
            missing = [path for path in case.files if not path.is_file()]
            report.take(no_file(path) for path in missing)
            if not missing:
                cases.append(case)
        return cases


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _is_image(path))


def _is_image(path: Path) -> bool:
    """Whether the name is an image's, and no hidden file's."""
    return path.suffix.lower() in SUFFIXES and is_data(path)


def _open(path: Path) -> Image.Image:
    """The image of a file, turned as its EXIF tag says, which is how viewers and annotation tools
    show it. Readers of other formats are not asked, since some of them start programs.
    """
    if not path.is_file():
        raise DataError(no_file(path))
    try:
        with Image.open(path, formats=FORMATS) as image:
            check_room(path, (*image.size, len(image.getbands())), 1)
            check_pages(path, image)
            check_depth(path, image)
            image.load()
            format, image = image.format, ImageOps.exif_transpose(image)
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        found = Finding("too large", str(path), str(error), "", "crop or shrink the image")
        raise DataError(found) from error
    except Exception as error:  # readers raise errors of any kind where a header makes no sense
        raise DataError(unreadable(path, error)) from error
    image.format = format  # a turned image has forgotten it
    return image


def _open_image(path: Path, notes: Report) -> Image.Image:
    """An image in mode RGB; warnings go to `notes`."""
    image = _open(path)
    check_transparency(path, image, notes)
    return image.convert("RGB")


def _open_pair(
    case: Case, notes: CaseNotes | None = None, ignore: int | None = None
) -> tuple[Image.Image, Image.Image | None]:
    """Image in mode RGB and mask, if there is one, in mode L with values 0 and 1, and UNKNOWN in
    place of `ignore`; DataError with all faults of the two.
    """
    faults, image, mask = Report(), None, None
    with faults.catching():
        image = _open_image(case.images[0], faults)
        if all(low == high for low, high in image.getextrema()):
            faults.error(
                "constant",
                case.images[0],
                f"constant image (every pixel is {image.getpixel((0, 0))})",
                "",
                "it is empty",
            )
    with faults.catching():
        if case.label is not None:
            mask = _open(case.label)
            lossy = mask.format in ("JPEG", "MPO")
            lossy = lossy or case.label.suffix.lower() in (".jpg", ".jpeg")
            mask = grey_mask(case.label, mask)
            check_mask(case.label, mask, lossy, faults, ignore)
    if image is not None and mask is not None and image.size != mask.size:
        faults.error(
            "shape",
            case.label,
            f"{mask.size[0]} x {mask.size[1]} pixels, but its image {case.images[0].name} has "
            f"{image.size[0]} x {image.size[1]}",
            "",
            "image and mask must have one size",
        )
    faults.stop()
    values = [int(value > 127) for value in range(256)]
    if ignore is not None:
        values[ignore] = UNKNOWN
    cut = mask and mask.point(values)
    if notes is not None:
        notes.take(faults.warnings)
        notes.see(np.asarray(image), None if cut is None else np.asarray(cut))
    return image, cut
