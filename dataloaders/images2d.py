"""RGB images with binary masks: ISIC-2018 (skin lesions), Kvasir-SEG (polyps), or own data in the same form.

    <root>/train/images, <root>/train/masks, <root>/val/images, ...      lists made from the folders, or
    <root>/images, <root>/masks                                          lists drawn by tools/make_splits.py

Lists are train.txt, val.txt and, if there is one, test.txt. A line is an image's name without suffix or, as in the
released lists, `train/images/X.jpg train/masks/X.png`. Labelled images are those of labelled_5%.txt, labelled_44.txt
or ratio_5%/labeled.txt; where there is no such list they are drawn, always the same ones. Masks are cut at half: JPEG
masks hold every value between 0 and 255. Sizes are in pixels, so spacing is 1.
"""

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dataloaders import augment_ssl
from dataloaders.cases import Case, DataError, read_split
from dataloaders.semi import SemiDataset, labelled_count

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff")
FOLDERS = {  # images, masks; where the names alone tell the list, its name
    "train": ("train/images", "train/masks"),
    "val": ("val/images", "val/masks"),
    "test": ("test/images", "test/masks"),
    "": ("images", "masks"),
    "isic": ("ISIC2018_Task1-2_Training_Input", "ISIC2018_Task1_Training_GroundTruth"),
}
MASK_ENDING = "_segmentation"  # of the ISIC archive
SEED = 1337
AUGMENTATIONS = ("semi", "supervised")
RESIZES = ("bilinear", "nearest")


class Images2DDataset(SemiDataset):
    """RGB images and binary masks of any size, resized to patch_size.

    split_dir: folder of the lists, root if empty. augmentation: 'semi' resizes first and always turns and mirrors,
    labelled images too; 'supervised' is the pipeline of the fully supervised runs for `labelled_patch` (turn and mirror
    half the time, else small rotations, then resize), which reads images at their own size. eval_resize: of images to
    be predicted; 'bilinear' as in training, 'nearest' as the released testers do.
    """

    dims = 2
    unit = "image"
    in_channels = 3

    def __init__(
        self,
        root: str,
        split_dir: str = "",
        patch_size: Sequence[int] = (320, 320),
        class_names: Sequence[str] = ("background", "lesion"),
        memory_gb: float = 2.0,
        augmentation: str = "semi",
        eval_resize: str = "bilinear",
    ) -> None:
        super().__init__(root, split_dir or root, patch_size, class_names, memory_gb)
        if len(patch_size) != 2 or patch_size[0] != patch_size[1]:
            raise DataError(f"patch_size must be two equal numbers, since images are turned, got {list(patch_size)}")
        if len(class_names) != 2:
            raise DataError(f"masks are binary; class_names must be two, got {list(class_names)}")
        if augmentation not in AUGMENTATIONS:
            raise DataError(f"augmentation must be one of {', '.join(AUGMENTATIONS)}, got '{augmentation}'")
        if eval_resize not in RESIZES:
            raise DataError(f"eval_resize must be one of {', '.join(RESIZES)}, got '{eval_resize}'")
        self.augmentation, self.eval_resize = augmentation, eval_resize
        self._known: dict[str, Case] = {}

    def scan(self) -> dict[str, list[Case]]:
        """The images of each folder that exists, sorted by name; a mask has the name of its image."""
        found = {}
        for key, (images, masks) in FOLDERS.items():
            paths = _files(self.root / images)
            if paths:
                labels = {path.stem.removesuffix(MASK_ENDING): path for path in _files(self.root / masks)}
                found[key] = [Case(path.stem, (path,), labels.get(path.stem)) for path in paths]
        return found

    def find(self, names: Sequence[str]) -> list[Case]:
        """The images called `names`, from any list or folder."""
        found = self._known.keys() >= set(names) or self._by_name().keys() >= set(names)
        if not found and (self.split_dir / "train.txt").is_file():
            self._lists()  # of paths to other folders
        return self._cases(names)

    def read_volume(self, case: Case) -> dict:
        """An image at its own size: image (3, H, W) float32, label (1, H, W) uint8; spacing 1 pixel."""
        image, mask = _open_pair(case)
        return {
            "image": augment_ssl.from_pil(image), "label": np.asarray(mask)[None], "spacing": [1.0, 1.0],
            "name": case.name,
        }  # fmt: skip

    def read_unlabelled(self, case: Case) -> dict:
        """An image file: image (3, H, W) float32 in 0..1 at its own size."""
        return {"image": augment_ssl.from_pil(_open(case.images[0], "RGB")), "name": case.name}

    def network_slices(self, volume: dict) -> np.ndarray:
        """The image as the network takes it: (1, 3, *patch_size) float32."""
        if self.eval_resize == "nearest":
            return augment_ssl.resize_nearest(volume["image"], self.patch_size)[None]
        return augment_ssl.resize_image(volume["image"], self.patch_size)[None]

    def native_prediction(self, prediction: np.ndarray, volume: dict) -> np.ndarray:
        """Label maps (1, *patch_size) -> (H, W), nearest neighbour."""
        return augment_ssl.resize_nearest(prediction, volume["image"].shape[1:])[0]

    def labelled_patch(self, sample: dict, rng: np.random.Generator) -> dict:
        """The weak view, or with augmentation 'supervised' the pipeline of fully supervised runs."""
        if self.augmentation == "semi":
            return self.weak(sample, rng)
        if rng.random() > 0.5:
            sample = augment_ssl.rot_flip(sample, rng)
        elif rng.random() > 0.5:
            sample = augment_ssl.rotate_small_rgb(sample, rng)
        return augment_ssl.resize_rgb(sample, self.patch_size)

    def weak(self, sample: dict, rng: np.random.Generator) -> dict:
        """Resized, then always quarter turns and a mirror."""
        return augment_ssl.rot_flip(augment_ssl.resize_rgb(sample, self.patch_size), rng)

    def strong(self, sample: dict, rng: np.random.Generator) -> dict:
        """Colour jitter, grayscale and blur of a weak view."""
        return augment_ssl.strong_rgb(sample, rng)

    def _load(self, case: Case) -> dict[str, np.ndarray]:
        image, mask = _open_pair(case)
        if self.augmentation == "semi":  # the first step of the pipeline, without a random choice: done once
            size = (self.patch_size[1], self.patch_size[0])
            image, mask = image.resize(size, Image.Resampling.BILINEAR), mask.resize(size, Image.Resampling.NEAREST)
        return {"image": np.ascontiguousarray(np.moveaxis(np.asarray(image), -1, 0)), "label": np.array(mask)[None]}

    def _sample(self, stored: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"image": stored["image"].astype(np.float32) / np.float32(255), "label": stored["label"]}

    def _lists(self) -> dict[str, list[str]]:
        lists = {split: self._read_list(split) for split in ("train", "val", "test")}
        if lists["train"] is None:
            lists |= self._ratio_lists()
        folders = self.scan() if lists["train"] is None or lists["val"] is None else {}
        for split in ("train", "val") if lists["train"] else ("train", "val", "test"):
            if lists[split] is None:
                lists[split] = [self._add(case) for case in folders.get(split, [])]
        for split in ("train", "val"):
            if not lists[split]:
                raise DataError(
                    f"{self.split_dir / split}.txt: no such list, and {self.root} has "
                    f"{', '.join(FOLDERS[key][0] for key in folders) or 'no folder of images'}; expected "
                    f"{' and '.join(FOLDERS[split])}, or draw lists with tools/make_splits.py images"
                )
        return {split: names or [] for split, names in lists.items()}

    def _read_list(self, name: str) -> list[str] | None:
        """Image names of a list; None if there is none."""
        lines = read_split(self.split_dir, name)
        if lines is None:
            return None
        source, by_name, names = self.split_dir / f"{name}.txt", None, []
        for line in lines:
            words = line.split()
            if len(words) == 2:
                names.append(self._add(Case(Path(words[0]).stem, (self.root / words[0],), self.root / words[1])))
            elif len(words) == 1:
                by_name = by_name or self._by_name()
                if line not in by_name:
                    example = next(iter(by_name), "none")
                    raise DataError(f"{source}: there is no image '{line}' in {self.root}; names look like {example}")
                names.append(self._add(by_name[line]))
            else:
                raise DataError(
                    f"{source}: line '{line}' has {len(words)} words; expected an image's name, or the paths of image "
                    f"and mask without blanks"
                )
        repeated = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
        if repeated:
            raise DataError(f"{source}: listed twice: {', '.join(repeated[:5])}; each image may stand once")
        return names

    def _ratio_lists(self) -> dict[str, list[str]]:
        """Train and val of the first ratio_N% folder, if there is one: train is labelled and unlabelled together."""
        for folder in sorted(self.split_dir.glob("ratio_*%")):
            parts = [self._read_list(f"{folder.name}/{part}") for part in ("labeled", "unlabeled")]
            if all(parts):
                lists = {"train": sorted({name for part in parts for name in part})}
                val = None if (self.split_dir / "val.txt").is_file() else self._read_list(f"{folder.name}/val")
                return lists | ({"val": val} if val else {})
        return {}

    def _choose(self, train: Sequence[str], labelled: int | float | None) -> list[str]:
        count = labelled_count(labelled, len(train), f"{self.split_dir}/train.txt", self.unit)
        if count == len(train):
            return list(train)
        stored = [f"labelled_{count}"]
        if labelled < 1 and abs(labelled * 100 - round(labelled * 100)) < 1e-6:
            percent = round(labelled * 100)
            stored = [f"labelled_{percent}%", f"ratio_{percent}%/labeled"]
        for name in stored:
            chosen = self._read_list(name)
            if chosen is not None:
                foreign = sorted(set(chosen) - set(train))
                if foreign:
                    raise DataError(
                        f"{self.split_dir / name}.txt: {len(foreign)} of {len(chosen)} images are not in the train "
                        f"list, for example '{foreign[0]}'; labelled images are training images, draw the list again"
                    )
                return chosen
        return draw(train, count)

    def _add(self, case: Case) -> str:
        other = self._known.setdefault(case.name, case)
        if other.images != case.images:
            raise DataError(
                f"{case.images[0]} and {other.images[0]} have the same name; every image needs a name of its own"
            )
        return case.name

    def _by_name(self) -> dict[str, Case]:
        """Every image of the folders."""
        for cases in self.scan().values():
            for case in cases:
                self._add(case)
        return self._known

    def _cases(self, names: Sequence[str]) -> list[Case]:
        if not all(name in self._known for name in names):
            self._by_name()
        unknown = [name for name in names if name not in self._known]
        if unknown:
            raise DataError(f"{self.root}: {len(unknown)} of {len(names)} images not found, for example '{unknown[0]}'")
        cases = [self._known[name] for name in names]
        for case in cases:
            if case.label is None:
                raise DataError(f"{case.images[0]}: has no mask of the same name; expected one beside the image folder")
            for path in (*case.images, case.label):
                if not path.is_file():
                    raise DataError(f"{path}: no such file; restore it or take the image out of the lists")
        return cases

    _training_cases = _evaluation_cases = _cases


def draw(names: Sequence[str], count: int, seed: int = SEED) -> list[str]:
    """`count` of the names, drawn with a seed from their sorted order."""
    return random.Random(seed).sample(sorted(names), count)


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def _open(path: Path, mode: str) -> Image.Image:
    if not path.is_file():
        raise DataError(f"{path}: no such file; restore it or take the image out of the lists")
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":
                raise DataError(f"{path}: pixels of mode {image.mode}, expected 8 bits per channel; convert the image")
            return image.convert(mode)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path}: unreadable or truncated ({type(error).__name__}: {error}); copy the file again"
        ) from error


def _open_pair(case: Case) -> tuple[Image.Image, Image.Image]:
    """Image in mode RGB and mask in mode L with values 0 and 1."""
    image, mask = _open(case.images[0], "RGB"), _open(case.label, "L")
    if image.size != mask.size:
        raise DataError(
            f"{case.label}: {mask.size[0]} x {mask.size[1]} pixels, but its image {case.images[0].name} has "
            f"{image.size[0]} x {image.size[1]}; image and mask must have one size"
        )
    if all(low == high for low, high in image.getextrema()):
        raise DataError(f"{case.images[0]}: constant image (every pixel is {image.getpixel((0, 0))}); it is empty")
    high = mask.getextrema()[1]
    if 0 < high <= 127:
        raise DataError(
            f"{case.label}: its largest value is {high}, expected 0 and 255 (cut at half); multiply ids by 255"
        )
    return image, mask.point([int(value > 127) for value in range(256)])
