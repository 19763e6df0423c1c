"""The keys of a configuration that say what the data are and how they become patches, the same in
all training scripts.
"""

import dataclasses
from typing import Annotated, Self

from dataloaders import DATASETS, describe_dataset
from utils.config import OF_FORMAT, check_unused, marks
from utils.run import Settings

Chance = Annotated[float, "[0, 1]", OF_FORMAT]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings(Settings):
    """Each format takes some of these keys; one that is set although the format does not take it is
    an error.
    """

    format: Annotated[str, DATASETS] = "msd"
    datalist: Annotated[str, OF_FORMAT] = "dataset.json"  # the data set's JSON in data_root
    class_names: tuple[str, ...] = ()  # by label id, background first; []: as the JSON says
    # 0: as the JSON or the format says
    in_channels: Annotated[int, "[0, inf)", OF_FORMAT] = 0
    # nnunet: {name: [ids]} that overlap; {}: as the JSON says
    regions: Annotated[dict, OF_FORMAT] = dataclasses.field(default_factory=dict)
    # nnunet: id of each region in predictions; []: as the JSON says
    regions_class_order: Annotated[tuple[int, ...], OF_FORMAT] = ()
    # nnunet: entry of splits_final.json, where split_dir is empty
    fold: Annotated[int, OF_FORMAT] = 0
    # folder of further cases without labels; test: those of the data set's own test list
    unlabelled: Annotated[str, OF_FORMAT] = ""
    # id of voxels that nobody labelled, of masks their grey value; null: there are none, or the id
    # that nnU-Net's JSON says
    ignore_label: Annotated[int | None, OF_FORMAT] = None
    # {pattern of case names: [names or ids of the classes that their labels tell]}
    labelled_classes: Annotated[dict, OF_FORMAT] = dataclasses.field(default_factory=dict)
    # Scans
    cache_dir: Annotated[str, OF_FORMAT] = "cache"  # preprocessed cases
    orientation: Annotated[str, OF_FORMAT] = "RAS"
    spacing: Annotated[tuple[float, ...], OF_FORMAT] = ()  # mm; []: as stored
    intensity: Annotated[str, OF_FORMAT] = "window"  # window | zscore | none | nnunet
    # HU, for intensity: window
    window: Annotated[tuple[float, float], OF_FORMAT] = (-175.0, 250.0)
    # for intensity: nnunet, of each channel: {scheme: CTNormalization, mean: ..., ...}
    intensity_channels: Annotated[tuple[dict, ...], OF_FORMAT] = ()
    crop_foreground: Annotated[bool, OF_FORMAT] = True
    # BraTS: crop | volume, the voxels whose statistics normalise a patch
    normalize: Annotated[str, OF_FORMAT] = "crop"
    # BraTS: patches come from the brain's box enlarged to multiples of this; 0: the patch size
    k_divisible: Annotated[int, OF_FORMAT] = 0
    # pos_neg: half of the labelled patches are centred on foreground; uniform
    crop: Annotated[str, OF_FORMAT] = "pos_neg"
    flip_prob: Chance = 0.2  # each axis
    rot90_prob: Chance = 0.2
    scale_prob: Chance = 0.1  # intensity x U(0.9, 1.1)
    shift_prob: Chance = 0.1  # intensity + U(-0.1, 0.1)
    # HDF5 files and RGB images: of training cases kept in memory
    memory_gb: Annotated[float, "[0, inf)", OF_FORMAT] = 2.0
    # LA: crops may start at the last admissible voxel; the released code never draws it
    last_start: Annotated[bool, OF_FORMAT] = True
    augmentation: Annotated[str, OF_FORMAT] = "semi"  # RGB images: semi | supervised
    eval_resize: Annotated[str, OF_FORMAT] = "bilinear"  # RGB images: bilinear | nearest

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return self.in_channels or self.pluggable["format"].registry[self.format].in_channels

    def dataset_arguments(self) -> dict:
        """What the class of the format takes of these keys; ConfigError for a key that departs from
        its default although the class has no use for it.
        """
        accepted = self.pluggable["format"].registry[self.format].accepted()
        of_format = [key for key, mark in marks(type(self)) if mark is OF_FORMAT]
        idle = [key for key in of_format if key not in accepted]
        check_unused(self, idle, f"the data format '{self.format}'")
        keys = [field.name for field in dataclasses.fields(self) if field.name in accepted]
        given = {key: getattr(self, key) for key in keys}
        return {"root": self.data_root, "format": self.format} | given

    def _completed(self) -> Self:
        if self.format not in DATASETS:
            return self
        given = dataclasses.asdict(self)
        told = describe_dataset(self.format, self.data_root, self.datalist, given)
        return dataclasses.replace(self, **told)

    def _check(self) -> None:
        super()._check()
        if self.intensity != "window":
            check_unused(self, ("window",), f"intensity '{self.intensity}'")
