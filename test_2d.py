"""Score a 2D network that was trained with few labels: per-case, per-class Dice, Jaccard, HD95 and
ASD, predictions.

Needs nothing but the checkpoint and the data. ACDC is scored per volume, photographs per image, at
their own size. Protocols and the policy for empty masks: reporting.py, metrics.py. Where the
checkpoint was chosen on the cases that are reported, because the data set has no third list,
last.pt is scored beside it.

    python test_2d.py --ckpt runs/acdc/crkd/unet2d-3/seed0/best.pt
    # validation and test patients
    python test_2d.py --ckpt runs/acdc/crkd/unet2d-3/seed0/best.pt --protocol published
    python test_2d.py --ckpt runs/isic2018/crkd/unet2d-5%/seed0/best.pt --overlays
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import matplotlib.image
import nibabel as nib
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import reporting
from dataloaders import SEMI_DATASETS, DataError, SemiDataset, build_semi_dataset
from inference import AMP_MODES, predict_slices
from metrics import EMPTY_POLICIES, HD95_DEFINITIONS
from networks import NETWORKS, build_network
from utils import figures, plugins
from utils.checkpoint import (
    CheckpointError,
    dataset_arguments,
    load_checkpoint,
    load_network_weights,
)
from utils.complexity import count_macs, count_parameters
from utils.config import ConfigError
from utils.distributed import World, join_world
from utils.run import resolve_device

SPLITS = ("test", "val", "val+test")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ckpt", required=True, type=Path, help="best.pt or last.pt of a run")
    parser.add_argument(
        "--protocol", choices=reporting.PROTOCOLS, default="clean", help="see reporting.py"
    )
    parser.add_argument(
        "--split",
        choices=SPLITS,
        help=(
            "default: test, or val where there is no test list; published protocol of volumes: both"
        ),
    )
    parser.add_argument(
        "--data-root", help="folder of the data set, if it is not where the run found it"
    )
    parser.add_argument(
        "--allow-outside", action="store_true", help="lists may name files outside of the data root"
    )
    parser.add_argument("--out", type=Path, help="output folder; default: the checkpoint's")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--amp", choices=tuple(AMP_MODES), default="off")
    parser.add_argument(
        "--hd95", choices=HD95_DEFINITIONS, help="clean protocol: see metrics.py; default: pooled"
    )
    parser.add_argument(
        "--empty", choices=EMPTY_POLICIES, help="clean protocol: see metrics.py; default: agree"
    )
    parser.add_argument("--no-predictions", action="store_true", help="do not write label maps")
    parser.add_argument(
        "--overlays", action="store_true", help="write a PNG per case: image, label, prediction"
    )
    plugins.add_plugin_flags(parser)
    args = parser.parse_args()
    if args.out and args.out.exists() and not args.out.is_dir():
        parser.error(f"--out {args.out}: is a file, expected a folder")
    return args


def main() -> int:
    args = parse_args()
    world, name = join_world(args.device)
    selected_on_reported = score(args, args.ckpt, world, resolve_device(name))
    last = args.ckpt.with_name("last.pt")
    if selected_on_reported and args.ckpt.name == "best.pt" and last.is_file():
        score(args, last, world, resolve_device(name))
    world.leave()
    return 0


def score(args: argparse.Namespace, path: Path, world: World, device: torch.device) -> bool:
    """Score one checkpoint, write its files, print its table; -> whether it was selected on the
    reported cases.

    The cases are shared by the processes of torchrun, of which the first one reports.
    """
    checkpoint = load_checkpoint(path)
    if checkpoint.get("kind") != "2d-semi":
        raise CheckpointError(
            f"{path}: not a checkpoint of train_2d_crkd.py; 3D ones are scored by test_3d.py"
        )
    published = args.protocol == "published"
    for flag, value in (("--hd95", args.hd95), ("--empty", args.empty)):
        if published and value is not None:
            raise ConfigError(
                f"{flag} {value}: the published protocol has its own definition; leave it out"
            )
    empty, definition = args.empty or "agree", args.hd95 or "pooled"
    contracts = (plugins.network(NETWORKS), plugins.data_format(SEMI_DATASETS, SemiDataset))
    plugins.plug_in_for(checkpoint, path, args.plugin, contracts, args.allow_changed_plugin)
    config, described = checkpoint["config"], checkpoint["network"]
    arguments = dataset_arguments(
        checkpoint, path, args.data_root, allow_outside=args.allow_outside
    )
    if published and arguments["format"] == "images2d":
        arguments["eval_resize"] = "nearest"
    dataset = build_semi_dataset(**arguments)
    usual = "test" if checkpoint["cases"]["test"] else "val"
    default = "val+test" if published and usual == "test" and checkpoint["cases"]["val"] else usual
    split = args.split or default
    cases = dataset.find([name for part in split.split("+") for name in checkpoint["cases"][part]])
    if not cases:
        raise DataError(f"{path}: the run had no {split} list; choose another --split")
    network = build_network(
        described["name"],
        described["in_channels"],
        described["num_classes"],
        **described["arguments"],
    )
    load_network_weights(network, checkpoint["weights"], str(path))
    network = network.to(device).eval()

    out = args.out or path.parent
    suffix = "" if path.stem == "best" else f"_{path.stem}"
    suffix += ("_published" if published else "") + ("" if split == default else f"_{split}")
    predictions, overlays = out / f"predictions{suffix}", out / f"overlays{suffix}"
    for folder in [out] + [predictions] * (not args.no_predictions) + [overlays] * args.overlays:
        folder.mkdir(parents=True, exist_ok=True)
    results = []  # of each case: rows, seconds
    for case in tqdm(
        world.part(cases),
        desc=f"testing {described['name']} on {split}",
        unit="case",
        disable=not world.main,
    ):
        volume = dataset.read_volume(case)
        slices = torch.from_numpy(np.ascontiguousarray(dataset.network_slices(volume)))
        begin = time.perf_counter()
        ids = predict_slices(network, slices, batch=config["eval_batch"], amp=args.amp)
        seconds = time.perf_counter() - begin
        prediction, label = dataset.native_prediction(ids.numpy(), volume), volume["label"][0]
        rows = reporting.case_rows(
            case.name,
            prediction,
            label,
            dataset.class_names,
            protocol=args.protocol,
            hd95=definition,
            empty=empty,
        )
        results.append((rows, seconds))
        if not args.no_predictions:
            if prediction.ndim == 3:
                nib.save(
                    nib.Nifti1Image(prediction, volume["affine"]),
                    predictions / f"{case.name}.nii.gz",
                )
            else:
                Image.fromarray(255 * prediction).save(predictions / f"{case.name}.png")
        if args.overlays:
            shown = [
                (volume["image"], None),
                (volume["image"], label),
                (volume["image"], prediction),
            ]
            matplotlib.image.imsave(
                overlays / f"{case.name}.png", figures.views(shown, dataset.num_classes)
            )

    results = world.merged(results)
    described_run = reporting.describe(checkpoint, path.name, split)
    if not world.main:
        return described_run["selected_on_reported"]
    rows, seconds = (
        [row for of_case, _ in results for row in of_case],
        [value for _, value in results],
    )
    unit = "pixels" if arguments["format"] == "images2d" else "voxels"
    hd95 = definition if not published else "directed" if unit == "pixels" else "pooled"
    reporting.write_csv(out / f"metrics{suffix}.csv", rows, args.protocol, hd95, unit)
    summary = {
        **described_run,
        "protocol": args.protocol,
        "unit": unit,
        "hd95_definition": hd95,
        "empty_policy": "zero" if published else empty,
        "amp": args.amp,
        "native": reporting.summary_of(rows, args.protocol),
        "parameters": count_parameters(network),
        "gmacs": count_macs(network, (1, described["in_channels"], *config["patch_size"])) / 1e9,
        "ms_per_volume": 1000 * statistics.median(seconds),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
    }
    reporting.write_summary(out / f"summary{suffix}.json", summary)
    reporting.report(summary)
    print(f"results in {out}: metrics{suffix}.csv, summary{suffix}.json")
    return described_run["selected_on_reported"]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ConfigError, DataError, CheckpointError) as problem:
        sys.exit(f"error: {problem}")
