"""Score a 2D network that was trained with few labels: per-case, per-class Dice, Jaccard, HD95,
ASD and NSD, predictions.

Needs nothing but the checkpoint and the data. ACDC is scored per volume, photographs per image, at
their own size. Protocols and the policy for empty masks: reporting.py, metrics.py. Where the
checkpoint was chosen on the cases that are reported, because the data set has no third list,
last.pt is scored beside it.

    python test_2d.py --ckpt runs/acdc/crkd/unet2d-3/seed0/best.pt
    # validation and test patients
    python test_2d.py --ckpt runs/acdc/crkd/unet2d-3/seed0/best.pt --protocol published
    python test_2d.py --ckpt runs/isic2018/crkd/unet2d-5%/seed0/best.pt --overlays
"""

import sys
import time

from metrics import EMPTY_POLICIES, HD95_DEFINITIONS
from utils.config import testing_flags

FLAGS = testing_flags(
    __doc__,
    splits=("test", "val", "val+test"),
    split_help=(
        "default: test, or val where there is no test list; published protocol of volumes: both"
    ),
    protocol_help="see reporting.py",
    hd95=HD95_DEFINITIONS,
    empty=EMPTY_POLICIES,
)
if __name__ == "__main__":
    FLAGS.parse_args()  # before torch is imported: --help and a mistyped flag answer at once

import numpy as np
import torch

import reporting
from dataloaders import DataError
from inference import predict_slices
from utils.checkpoint import CheckpointError, load_checkpoint
from utils.distributed import join_world
from utils.run import resolve_device
from utils.scripts import run_tool


def main() -> int:
    args = FLAGS.parse_args()
    world, name = join_world(args.device)
    checkpoint = load_checkpoint(args.ckpt)
    if checkpoint.get("kind") != "2d-semi":
        raise CheckpointError(
            f"{args.ckpt}: not a checkpoint of train_2d_crkd.py; 3D ones are scored by test_3d.py"
        )
    settings = {"amp": args.amp}
    reporting.score_few_labels(args, checkpoint, world, resolve_device(name), predict, settings)
    world.leave()
    return 0


def predict(scoring: reporting.Scoring, volume: dict) -> tuple[np.ndarray, float]:
    """Ids of a volume or photograph at its own size, and the seconds that the network took."""
    dataset = scoring.dataset
    slices = torch.from_numpy(np.ascontiguousarray(dataset.slices(volume)))
    begin = time.perf_counter()
    ids = predict_slices(
        scoring.network, slices, batch=scoring.config["eval_batch"], amp=scoring.args.amp
    )
    seconds = time.perf_counter() - begin
    return dataset.unslice(ids.numpy(), volume), seconds


if __name__ == "__main__":
    sys.exit(run_tool(main, DataError))
