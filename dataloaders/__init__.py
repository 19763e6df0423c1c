"""Data formats by name. To add one: a file with a class like `LADataset`, and a line below."""

from pathlib import Path
from typing import TYPE_CHECKING

from dataloaders.faults import DataError, Report
from utils.registry import Registry, lazily

if TYPE_CHECKING:
    from dataloaders.base import Dataset

DATASETS = Registry(
    {
        "msd": "dataloaders.msd:MSDDataset",
        "brats": "dataloaders.brats:BraTSDataset",
        "nnunet": "dataloaders.nnunet:NnUNetDataset",
        "acdc": "dataloaders.acdc:ACDCDataset",
        "images2d": "dataloaders.images2d:Images2DDataset",
        "la": "dataloaders.la:LADataset",
    }
)
# The benchmarks of few-label training: configurations of these are not for train_3d_distill.py
FEW_LABELS = ("acdc", "images2d", "la")

__all__ = [
    "DATASETS",
    "FEW_LABELS",
    "Case",
    "DataError",
    "Dataset",
    "MSDDataset",
    "Report",
    "build_dataset",
    "describe_dataset",
]
__getattr__ = lazily(
    __name__,
    {"Case": "dataloaders.cases", "Dataset": "dataloaders.base", "MSDDataset": "dataloaders.msd"},
)


def build_dataset(format: str, allow_outside: bool = False, **arguments) -> "Dataset":
    """The data set class of `format` ('msd': any decathlon-style list of NIfTI files) with its
    arguments.

    With a patch_size of two numbers, a volumetric data set is given slice by slice. allow_outside:
    lists may name files outside of the data root.
    """
    cls, sides = _class(format), tuple(arguments.get("patch_size", ()))
    sliced = cls.dims == 3 and len(sides) == 2
    dataset = cls(**arguments | ({"patch_size": ()} if sliced else {}))
    dataset.allow_outside = allow_outside
    if not sliced:
        return dataset
    from dataloaders.slices import Slices

    return Slices(dataset, sides)


def describe_dataset(format: str, root: str, datalist: str, given: dict) -> dict:
    """Values for those keys of `given` that are empty there and that the data set's own files tell,
    such as class_names, in_channels, and nnU-Net's regions.
    """
    cls = _class(format)
    empty = [key for key in cls.described_keys if not given.get(key)]
    if given.get("ignore_label") == 0:  # an id, where 0 channels are none
        empty = [key for key in empty if key != "ignore_label"]
    if not empty:
        return {}
    if empty == ["in_channels"] and not (Path(root) / datalist).is_file():
        # nothing can be trained without the list, so this is never more than shown
        return {"in_channels": 1}
    return cls.described(Path(root), datalist, empty)


def _class(format: str) -> type["Dataset"]:
    if format not in DATASETS:
        raise DataError(
            f"unknown data format '{format}'; choose from {', '.join(sorted(DATASETS))}"
        )
    return DATASETS[format]
