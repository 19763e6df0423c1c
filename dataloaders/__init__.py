"""Data formats by name. To add one: a file with a class like `MSDDataset` or `ACDCDataset`, and a line below."""

from dataloaders.acdc import ACDCDataset
from dataloaders.brats import BraTSDataset
from dataloaders.cases import Case, DataError
from dataloaders.images2d import Images2DDataset
from dataloaders.la import LADataset
from dataloaders.msd import MSDDataset
from dataloaders.semi import SemiDataset

# Of train_3d_distill.py
DATASETS: dict[str, type[MSDDataset]] = {
    "msd": MSDDataset,
    "brats": BraTSDataset,
}

# Of train_2d_crkd.py and train_3d_crkd.py: each makes labelled and unlabelled lists
SEMI_DATASETS: dict[str, type[SemiDataset]] = {
    "acdc": ACDCDataset,
    "images2d": Images2DDataset,
    "la": LADataset,
}

__all__ = [
    "DATASETS", "SEMI_DATASETS", "Case", "DataError", "MSDDataset", "SemiDataset", "build_dataset",
    "build_semi_dataset",
]  # fmt: skip


def build_dataset(format: str, **arguments) -> MSDDataset:
    """The data set class of `format` ('msd': any decathlon-style list of NIfTI files) with its arguments."""
    if format not in DATASETS:
        raise DataError(f"unknown data format '{format}'; choose from {', '.join(sorted(DATASETS))}")
    return DATASETS[format](**arguments)


def build_semi_dataset(format: str, **arguments) -> SemiDataset:
    """The semi-supervised data set class of `format` ('acdc', 'images2d', 'la') with its arguments."""
    if format not in SEMI_DATASETS:
        raise DataError(f"unknown data format '{format}'; choose from {', '.join(sorted(SEMI_DATASETS))}")
    return SEMI_DATASETS[format](**arguments)
