"""Data formats by name. To add one: a file with a class like `MSDDataset`, and a line in DATASETS."""

from dataloaders.brats import BraTSDataset
from dataloaders.cases import Case, DataError
from dataloaders.msd import MSDDataset

DATASETS: dict[str, type[MSDDataset]] = {
    "msd": MSDDataset,
    "brats": BraTSDataset,
}

__all__ = ["DATASETS", "Case", "DataError", "build_dataset"]


def build_dataset(format: str, **arguments) -> MSDDataset:
    """The data set class of `format` ('msd': any decathlon-style list of NIfTI files) with its arguments."""
    if format not in DATASETS:
        raise DataError(f"unknown data format '{format}'; choose from {', '.join(sorted(DATASETS))}")
    return DATASETS[format](**arguments)
