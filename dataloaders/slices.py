"""The slices of a volumetric data set, across the third axis: what a 2D network is trained on."""

from collections.abc import Sequence

import numpy as np

from dataloaders import augment
from dataloaders.base import Dataset
from dataloaders.faults import DataError


class Slices:
    """A volumetric data set seen slice by slice; whatever is not here is the data set's own.

    Cases stay whole scans: a patch is of a random slice, resized to patch_size (nearest
    neighbour), and a scan is scored as the stack of its slices.
    """

    dims = 2

    def __init__(self, volumes: Dataset, patch_size: Sequence[int]) -> None:
        self.volumes, self.patch_size = volumes, tuple(patch_size)
        if volumes.turns and patch_size[0] != patch_size[1]:
            raise DataError(
                f"patch_size: {list(patch_size)} must be two equal numbers, since slices are "
                "turned by 90 degrees; formats that have the key rot90_prob take others with 0"
            )

    def __getattr__(self, name: str):
        if name == "volumes":  # not there yet where a copy is made
            raise AttributeError(name)
        return getattr(self.volumes, name)

    def patch(self, sample: dict, rng: np.random.Generator) -> dict:
        """A labelled slice, augmented as patches of the volume are; where those are centred on
        foreground half of the time, half of the slices hold some.
        """
        positive = getattr(self.volumes, "crop", "") == "pos_neg" and rng.random() < 0.5
        plane = self.volumes.turn(self._plane(sample, rng, positive), rng)
        return self._resized(self.volumes.jitter(plane, rng))

    def weak(self, sample: dict, rng: np.random.Generator) -> dict:
        """Any slice, mirrored and turned."""
        return self._resized(self.volumes.turn(self._plane(sample, rng), rng))

    def strong(self, sample: dict, rng: np.random.Generator) -> dict:
        """Bias field, gamma and blur of a weak view, as of volumes."""
        volume = self.volumes.strong(sample | {"image": sample["image"][..., None]}, rng)
        return sample | {"image": volume["image"][..., 0]}

    views = Dataset.views

    def slices(self, sample: dict) -> np.ndarray:
        """The slices of a scan as the network takes them: (D, C, *patch_size) float32."""
        return augment.resize_nearest(np.moveaxis(sample["image"], -1, 0), self.patch_size)

    def unslice(self, prediction: np.ndarray, sample: dict) -> np.ndarray:
        """Label maps (D, *patch_size) -> (H, W, D), nearest neighbour."""
        return np.moveaxis(augment.resize_nearest(prediction, sample["image"].shape[1:3]), 0, -1)

    def _plane(self, sample: dict, rng: np.random.Generator, positive: bool = False) -> dict:
        """One slice as a volume of one; `positive`: with foreground, if the scan has any."""
        depth = sample["image"].shape[-1]
        places = sample.get("foreground", ()) if positive else ()
        voxel = places[rng.integers(len(places))] if len(places) else rng.integers(depth)
        k = int(voxel) % depth
        return {key: sample[key][..., k : k + 1] for key in ("image", "label")}

    def _resized(self, plane: dict) -> dict:
        return {
            key: augment.resize_nearest(array[..., 0], self.patch_size)
            for key, array in plane.items()
        }
