"""The script that prediction needs beside an exported model and nothing else of this repository:
run_model.py with the functions of linear.py or splines.py, and what it has to know of a run.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dataloaders import Dataset
from dataloaders.la import ORIENTATION as LA_ORIENTATION
from dataloaders.la import SPACING as LA_SPACING
from dataloaders.nnunet_preprocessing import TINY

FOLDER, NAME = Path(__file__).parent, "run_model.py"
PLACE = "from linear import"  # begins the line for which `script` puts the functions themselves
BY_ITSELF = {"voxels": "all", "clip": None, "less": "mean", "over": "std"}
AS_IT_IS = BY_ITSELF | {"less": 0.0, "over": 1.0}


def steps(described: Mapping[str, Any], dataset: Dataset) -> dict[str, Any] | None:
    """What run_model.py does with a scan, in plain values; None for what it cannot do: 2D networks
    and data formats of the user's own.

    channels: what becomes of each channel's intensities, cut to `clip`, less `less`, over `over`;
    these are numbers, or those of the `voxels` that count. regions: number and id of each region,
    in the order in which they are painted; none of classes.
    """
    form, config = described["dataset"]["format"], described["config"]
    if described["kind"] == "2d-semi" or form not in ("msd", "nnunet", "brats", "la"):
        return None
    patch = config["patch_size"]
    stride = config.get("stride") or [max(int(p * (1 - config["overlap"])), 1) for p in patch]
    common = {
        "patch_size": list(patch),
        "stride": list(stride),
        "probabilities": described["kind"] == "3d-semi",
        "outputs": described["network"]["num_classes"],
    }
    if form == "la":
        grid = {"orientation": LA_ORIENTATION, "spacing": [LA_SPACING] * 3, "crop": False}
        return common | grid | {"splines": False, "channels": [BY_ITSELF], "regions": []}
    regions = []
    if form == "brats":  # the core over the whole tumour, the enhancing part over both
        regions = [[1, 2], [0, 1], [2, 3]]
    elif dataset.multilabel:
        regions = [[k, number] for k, number in enumerate(dataset.regions_class_order)]
    return common | {
        "orientation": dataset.orientation,
        "spacing": list(dataset.spacing),
        "crop": dataset.crop_foreground,
        "splines": dataset.intensity == "nnunet",
        "channels": _channels(form, dataset),
        "regions": regions,
    }


def _channels(form: str, dataset: Dataset) -> list[dict]:
    """`channels` of `steps`."""
    if form == "brats":
        return [BY_ITSELF | {"voxels": "nonzero"}] * dataset.in_channels
    if dataset.intensity == "nnunet":
        return [_scheme(how) for how in dataset.intensity_channels]
    low, high = dataset.window
    window = {"voxels": "all", "clip": [low, high], "less": low, "over": high - low}
    kinds = {"window": window, "zscore": BY_ITSELF, "none": AS_IT_IS}
    return [kinds[dataset.intensity]] * dataset.in_channels


def _scheme(how: Mapping) -> dict:
    """What one of nnU-Net's schemes does with a channel."""
    scheme = how["scheme"]
    if scheme == "CTNormalization":
        clip = [how["percentile_00_5"], how["percentile_99_5"]]
        over = max(how["std"], TINY)
        return {"voxels": "all", "clip": clip, "less": how["mean"], "over": over}
    if scheme == "ZScoreNormalization":
        return BY_ITSELF | {"voxels": "mask" if how.get("mask", False) else "all"}
    if scheme == "RescaleTo01Normalization":
        return BY_ITSELF | {"less": "min", "over": "ptp"}
    if scheme == "RGBTo01Normalization":
        return AS_IT_IS | {"over": 255.0}
    return AS_IT_IS


def script(told: Mapping[str, Any], model: str) -> str:
    """run_model.py for the model file of this name. told: what `steps` gave."""
    name = "splines.py" if told["splines"] else "linear.py"
    functions = (FOLDER / name).read_text(encoding="utf-8").partition("\n\n\n")[2]
    lines = (FOLDER / NAME).read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.startswith(PLACE)) + "\n"
    before, first, after = text.replace("model.onnx", model).partition("def averaged")
    whole = re.sub(r"\n{2,}", "\n", f"{before}{functions}\n\n{first}{after}")
    # It is to be read before it is trusted, so it is kept short: few blank lines.
    return re.sub(r"\n(def |if __name__|import itertools)", r"\n\n\1", whole)
