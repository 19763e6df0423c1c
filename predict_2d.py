r"""Segment new images, or scans slice by slice, with a trained 2D network; no labels are needed.

    python predict_2d.py --ckpt runs/kvasir/crkd/unet2d-5%/seed0/best.pt --input photos/ \
        --output segmented --overlays
    python predict_2d.py --ckpt runs/isic2018/crkd/unet2d-5%/seed0/best.pt --input lesion.jpg \
        --output segmented
    python predict_2d.py --ckpt runs/acdc/crkd/unet2d-3/seed0/best.pt --input scans/ \
        --output segmented --threads 4

Networks of photographs (ISIC, Kvasir) take images (.jpg .png .bmp .tif, 8 bits): --output gets
NAME.png, a mask of the image's own size with 255 for the structure, and areas.csv with the pixels
of each structure and their percentage. Networks of ACDC take short-axis stacks as predict_3d.py
takes scans, with the slices along the third axis; intensities are scaled to 0..1 over the scan.
--output gets NAME.nii.gz, label ids on the scan's own grid, and volumes.csv in ml.

Beside each result NAME.json names its values and says how it was made. --overlays writes the image
beside a copy with the borders and a legend (of a scan: its fullest slice). Results that are there
already are kept, unless --overwrite is given. An image that cannot be segmented does not stop the
others: faults are listed at the end, and the exit status is 1.
"""

import argparse
import functools
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from dataloaders import DATASETS, DataError, Dataset, Report, build_dataset
from dataloaders.images2d import SUFFIXES
from dataloaders.lists import find_images, find_scans
from dataloaders.volumes import read_volume
from inference import AMP_MODES, predict_slices
from networks import NETWORKS, described_network
from utils import figures, plugins
from utils.checkpoint import CheckpointError, DiskError, describing, digest, load_checkpoint
from utils.config import ConfigError, Flags, add_plugin_flags, escaped, run_checkpoint
from utils.exported import TRUST_HELP, ExportedModel
from utils.predictions import (
    SizeTable,
    failure,
    millilitres,
    save_mask,
    save_result,
    save_volume,
    settings_of,
    structure_sizes,
)
from utils.run import resolve_device
from utils.scripts import run_tool


def parse_args() -> argparse.Namespace:
    parser = Flags(description=__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--ckpt", type=run_checkpoint, help="best.pt or last.pt of a run of train_2d_crkd.py"
    )
    which.add_argument(
        "--model",
        type=Path,
        help="exported model (.onnx .xml .ts .pt2) of tools/export.py, on the CPU",
    )
    parser.add_argument("--trust-model", action="store_true", help=TRUST_HELP)
    parser.add_argument(
        "--input", required=True, type=Path, help="an image or scan, or a folder of them"
    )
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        help="folder for masks, JSON files and a table of sizes",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="segment again what has a result already"
    )
    parser.add_argument("--overlays", action="store_true", help="also write overlays/NAME.png")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--amp", choices=tuple(AMP_MODES), default="off", help="mixed precision")
    parser.add_argument(
        "--threads", type=int, help="processor threads; default: as many as PyTorch takes"
    )
    parser.add_argument("--batch", type=int, help="slices at a time; default: that of the run")
    add_plugin_flags(parser)
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    for flag in ("threads", "batch"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise ConfigError(f"--{flag}: must be at least 1, got {getattr(args, flag)}")
    if args.threads:
        torch.set_num_threads(args.threads)
    network, checkpoint = load_predictor(args)
    with describing(args.model or args.ckpt):
        dataset, described = build_dataset(**checkpoint["dataset"]), checkpoint["network"]
        own_batch, name = checkpoint["config"]["eval_batch"], described["name"]
    photographs, problems = checkpoint["dataset"]["format"] == "images2d", []
    if photographs:
        cases = find_images(args.input, SUFFIXES, problems)
    else:
        cases, problems = find_scans(args.input, described["in_channels"], dataset.channel_of)
    if args.output.resolve() in {path.parent.resolve() for case in cases for path in case.images}:
        raise ConfigError(
            f"--output {args.output}: holds the input, results could replace it; name another "
            "folder"
        )
    for folder in [args.output] + [args.output / "overlays"] * args.overlays:
        folder.mkdir(parents=True, exist_ok=True)
    table = "areas.csv" if photographs else "volumes.csv"
    sizes = SizeTable(
        args.output / table, *(("pixels", "percent") if photographs else ("voxels", "volume_ml"))
    )
    weights = checkpoint["exported"]["weights"] if args.model else digest(checkpoint["weights"])
    settings = {"model": (args.model or args.ckpt).name, "weights": weights, "amp": args.amp}
    batch, structures = args.batch or own_batch, dataset.structures()
    value = 255 // (dataset.num_classes - 1) if photographs else 1  # of class 1 in the file
    done, kept, differing, notes = 0, 0, [], Report()
    try:
        for case in tqdm(
            cases, desc=f"segmenting with {name}", unit="image" if photographs else "scan"
        ):
            target = args.output / f"{case.name}.{'png' if photographs else 'nii.gz'}"
            try:
                if target.exists() and not args.overwrite:
                    kept += 1
                    if settings_of(target) != settings:
                        differing.append(target.name)
                    if not sizes.has(case.name, structures):
                        sizes[case.name] = measured(*stored(target, photographs, value), structures)
                    continue
                volume = dataset.read_file(case)
                notes.take(volume.pop("findings", ()))
                slices = torch.from_numpy(np.ascontiguousarray(dataset.slices(volume)))
                ids = predict_slices(network, slices, batch=batch, amp=args.amp).numpy()
                ids = dataset.unslice(ids, volume)
                shown = volume["image"], None, ids, dataset.class_names[1:], case.name
                ids = ids if photographs else dataset.native(ids, volume)
                found = measured(ids, volume.get("native_affine"), structures)
                about = {
                    "labels": {str(k * value): name for k, name in dataset.id_names().items()},
                    sizes.header[3]: {name: size for name, (_, size) in found.items()},
                    "input": [path.name for path in case.images],
                    "settings": settings,
                }
                if args.overlays:
                    save_mask(
                        args.output / "overlays" / f"{case.name}.png",
                        figures.compared(*shown, side=figures.SIDE),
                    )
                if photographs:
                    write = functools.partial(save_mask, pixels=(ids * value).astype(np.uint8))
                else:
                    affine = volume["native_affine"]
                    write = functools.partial(save_volume, ids=ids, affine=affine)
                save_result(target, about, write)
                sizes[case.name] = found
                done += 1
            except DiskError:  # nor would the others be written
                raise
            except Exception as error:  # whatever is wrong with one image must not lose the others
                problems.append(
                    str(error) if isinstance(error, DataError) else failure(case.images[0], error)
                )
    finally:
        sizes.write()
    print(
        f"segmented {done}, there already {kept}, failed {len(problems)}; results in "
        f"{args.output}: {table}"
    )
    if differing:
        print(
            f"warning: {len(differing)} results that were there come from other weights or "
            "settings, for example "
            f"{differing[0]}; --overwrite replaces them",
            file=sys.stderr,
        )
    for warning in notes.spoken_warnings(of_training=False):
        print(warning, file=sys.stderr)
    for problem in problems:
        print(escaped(f"error: {problem}"), file=sys.stderr)
    return int(bool(problems))


def load_predictor(args: argparse.Namespace) -> tuple[torch.nn.Module, dict]:
    """What maps slices (B, C, h, w) to logits, and the checkpoint or the description of an exported
    model.
    """
    path = args.model or args.ckpt
    if args.model and args.amp != "off":
        raise ConfigError(f"--amp: {path.name} has the precision of its export; leave it out")
    model = None
    if args.model:
        model = ExportedModel(path, args.threads or 0, trusted=args.trust_model)
    checkpoint = model.description if args.model else load_checkpoint(path)
    if checkpoint.get("kind") != "2d-semi":
        raise CheckpointError(
            f"{path}: not a network of train_2d_crkd.py; for 3D ones use predict_3d.py"
        )
    contracts = (plugins.network(NETWORKS), plugins.data_format(DATASETS, Dataset))
    plugins.plug_in_for(checkpoint, path, args.plugin, contracts, args.allow_changed_plugin)
    if args.model:
        return model, checkpoint
    with describing(path):
        network = described_network(checkpoint["network"], checkpoint["weights"], str(path))
    return network.to(resolve_device(args.device)).eval(), checkpoint


def measured(
    ids: np.ndarray, affine: np.ndarray | None, structures: dict
) -> dict[str, tuple[int, float]]:
    """Structure -> pixels and percent of an image or, with an affine, voxels and ml of a scan."""
    return structure_sizes(
        ids, structures, 100 / ids.size if affine is None else millilitres(affine)
    )


def stored(path: Path, photographs: bool, value: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Ids and affine (None: of an image) of a result."""
    if not photographs:
        return read_volume(path)
    with Image.open(path, formats=("PNG",)) as image:
        return np.asarray(image) // value, None


if __name__ == "__main__":
    sys.exit(run_tool(main, DataError))
