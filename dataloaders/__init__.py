"""Data formats by name. To add one: a file with a class like `MSDDataset` or `ACDCDataset`, and a
line below.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from dataloaders.faults import DataError, Report
from utils.registry import Registry, lazily

if TYPE_CHECKING:
    from dataloaders.msd import MSDDataset
    from dataloaders.semi import SemiDataset

# Of train_3d_distill.py
DATASETS = Registry(
    {
        "msd": "dataloaders.msd:MSDDataset",
        "brats": "dataloaders.brats:BraTSDataset",
        "nnunet": "dataloaders.nnunet:NnUNetDataset",
    }
)

# Of train_2d_crkd.py and train_3d_crkd.py: each makes labelled and unlabelled lists
SEMI_DATASETS = Registry(
    {
        "acdc": "dataloaders.acdc:ACDCDataset",
        "images2d": "dataloaders.images2d:Images2DDataset",
        "la": "dataloaders.la:LADataset",
    }
)

__all__ = [
    "DATASETS",
    "SEMI_DATASETS",
    "Case",
    "DataError",
    "MSDDataset",
    "Report",
    "SemiDataset",
    "build_dataset",
    "build_semi_dataset",
    "describe_dataset",
]
__getattr__ = lazily(
    __name__,
    {
        "Case": "dataloaders.cases",
        "MSDDataset": "dataloaders.msd",
        "SemiDataset": "dataloaders.semi",
    },
)


def build_dataset(format: str, allow_outside: bool = False, **arguments) -> "MSDDataset":
    """The data set class of `format` ('msd': any decathlon-style list of NIfTI files) with its
    arguments.

    allow_outside: lists may name files outside of the data root.
    """
    if format not in DATASETS:
        raise DataError(
            f"unknown data format '{format}'; choose from {', '.join(sorted(DATASETS))}"
        )
    dataset = DATASETS[format](**arguments)
    dataset.allow_outside = allow_outside
    return dataset


def describe_dataset(format: str, root: str, datalist: str, given: dict) -> dict:
    """Values for those keys of `given` that are empty there and that the data set's own files tell,
    such as class_names, in_channels, and nnU-Net's regions.
    """
    if format not in DATASETS:
        raise DataError(
            f"unknown data format '{format}'; choose from {', '.join(sorted(DATASETS))}"
        )
    cls = DATASETS[format]
    empty = [key for key in cls.described_keys if not given.get(key)]
    if not empty:
        return {}
    if empty == ["in_channels"] and not (Path(root) / datalist).is_file():
        # nothing can be trained without the list, so this is never more than shown
        return {"in_channels": 1}
    return cls.described(Path(root), datalist, empty)


def build_semi_dataset(format: str, allow_outside: bool = False, **arguments) -> "SemiDataset":
    """The semi-supervised data set class of `format` ('acdc', 'images2d', 'la') with its arguments.

    allow_outside: lists may name files outside of the data root.
    """
    if format not in SEMI_DATASETS:
        raise DataError(
            f"unknown data format '{format}'; choose from {', '.join(sorted(SEMI_DATASETS))}"
        )
    dataset = SEMI_DATASETS[format](**arguments)
    dataset.allow_outside = allow_outside
    return dataset
