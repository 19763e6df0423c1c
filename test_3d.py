"""Score a trained 3D network: per-case, per-class Dice, Jaccard, HD95 and ASD, predictions,
overlays.

Needs nothing but the checkpoint and the data. Scores of distillation runs are given on the
preprocessed grid (the papers' protocol) and on the grid of the original files; those of runs of
train_3d_crkd.py on the files' grid, with windows at the stride of the published protocol.
Definitions and the policy for empty masks: metrics.py, reporting.py.

    python test_3d.py --ckpt runs/btcv/acf_bckd/resunet-unet/seed0/best.pt
    python test_3d.py --ckpt runs/btcv/acf_bckd/resunet-unet/seed0/last.pt --overlays --tta
    python test_3d.py --ckpt best.pt --data-root /data/btcv --split val --hd95 directed --published
    python test_3d.py --ckpt runs/la/crkd/vnet-4/seed0/best.pt --protocol published
"""

import argparse
import csv
import json
import math
import statistics
import sys
import time
from pathlib import Path

import matplotlib.image
import nibabel as nib
import numpy as np
import torch
from tqdm import tqdm

import reporting
from dataloaders import (
    DATASETS,
    SEMI_DATASETS,
    DataError,
    MSDDataset,
    SemiDataset,
    build_dataset,
    build_semi_dataset,
)
from dataloaders.native import to_native
from inference import AMP_MODES, fast_copy, fast_dtype, largest_component, predict_labels
from metrics import EMPTY_POLICIES, HD95_DEFINITIONS, case_metrics, diagonal, summarise
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

SPACES = ("resampled", "native")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ckpt", required=True, type=Path, help="best.pt or last.pt of a run")
    parser.add_argument(
        "--split", choices=("test", "val"), help="default: test, or val where there is no test list"
    )
    parser.add_argument(
        "--data-root", help="folder of the data set, if it is not where the run found it"
    )
    parser.add_argument("--cache-dir", help="folder of preprocessed cases")
    parser.add_argument(
        "--allow-outside",
        action="store_true",
        help="read and cache where the checkpoint says, wherever that is",
    )
    parser.add_argument("--out", type=Path, help="output folder; default: the checkpoint's")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--amp", choices=tuple(AMP_MODES), default="off")
    parser.add_argument(
        "--fast", action="store_true", help="predict by a bfloat16 copy, if the processor can"
    )
    parser.add_argument("--tta", action="store_true", help="average over the eight mirrored copies")
    parser.add_argument(
        "--hd95", choices=HD95_DEFINITIONS, help="definition, see metrics.py; default: pooled"
    )
    parser.add_argument(
        "--empty",
        choices=EMPTY_POLICIES,
        help="scores of empty masks; default: nan, semi-supervised runs: agree",
    )
    parser.add_argument(
        "--published",
        action="store_true",
        help="add the ACF-BCKD code's own figures (HD95 in voxels)",
    )
    parser.add_argument(
        "--protocol",
        choices=reporting.PROTOCOLS,
        default="clean",
        help=(
            "published: semi-supervised runs are scored as in published tables; distillation runs "
            "as with --published"
        ),
    )
    parser.add_argument(
        "--stride", type=int, nargs=3, help="semi-supervised runs: voxels between windows"
    )
    parser.add_argument(
        "--largest-component",
        action="store_true",
        help="semi-supervised runs: keep the largest component alone",
    )
    parser.add_argument("--no-predictions", action="store_true", help="do not write NIfTI files")
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
    score(args, world, resolve_device(name))
    world.leave()
    return 0


def score(args: argparse.Namespace, world: World, device: torch.device) -> None:
    """Score the checkpoint; the cases are shared by the processes of torchrun, of which the first
    one reports.
    """
    checkpoint = load_checkpoint(args.ckpt)
    if checkpoint.get("kind") == "3d-semi":
        selected_on_reported = score_semi(args, args.ckpt, checkpoint, world, device)
        last = args.ckpt.with_name("last.pt")
        if selected_on_reported and args.ckpt.name == "best.pt" and last.is_file():
            score_semi(args, last, load_checkpoint(last), world, device)
        return
    if args.stride or args.largest_component:
        raise ConfigError("--stride and --largest-component are for runs of train_3d_crkd.py")
    args.published = args.published or args.protocol == "published"
    args.empty, args.hd95 = args.empty or "nan", args.hd95 or "pooled"
    if checkpoint.get("kind") != "3d" or "dataset" not in checkpoint:
        raise CheckpointError(
            f"{args.ckpt}: not a checkpoint of train_3d_distill.py or tools/import_checkpoint.py"
        )
    plug_in(args, args.ckpt, checkpoint, plugins.data_format(DATASETS, MSDDataset))
    config, described = checkpoint["config"], checkpoint["network"]
    dataset = build_dataset(
        **dataset_arguments(
            checkpoint, args.ckpt, args.data_root, args.cache_dir, args.allow_outside
        )
    )
    split = args.split or ("test" if checkpoint["cases"]["test"] else "val")
    cases = dataset.find(checkpoint["cases"][split])
    if not cases:
        raise DataError(f"{args.ckpt}: the run had no {split} list; choose --split val")
    with world.main_first():
        dataset.prepare({split: cases})
    network = build_network(
        described["name"],
        described["in_channels"],
        described["num_classes"],
        **described["arguments"],
    )
    load_network_weights(network, checkpoint["weights"], str(args.ckpt))
    network = network.to(device).eval()
    predictor = fast_copy(network, fast_dtype(device)) if args.fast else network

    out = args.out or args.ckpt.parent
    suffix = "" if args.ckpt.stem == "best" else f"_{args.ckpt.stem}"
    suffix += "" if split == ("test" if checkpoint["cases"]["test"] else "val") else f"_{split}"
    predictions = out / f"predictions{suffix}"
    overlays = out / f"overlays{suffix}"
    for folder in [out] + [predictions] * (not args.no_predictions) + [overlays] * args.overlays:
        folder.mkdir(parents=True, exist_ok=True)
    names = dataset.class_names if dataset.multilabel else dataset.class_names[1:]
    options = {"multilabel": dataset.multilabel, "empty": args.empty}
    results = []  # of each case: rows by space, figures of the published protocol, seconds

    for case in tqdm(
        world.part(cases),
        desc=f"testing {described['name']} on {split}",
        unit="case",
        disable=not world.main,
    ):
        sample = dataset.read(case)
        image = torch.from_numpy(np.array(sample["image"])).to(device)
        begin = time.perf_counter()
        prediction = (
            predict_labels(
                predictor,
                image,
                patch_size=config["patch_size"],
                overlap=config["overlap"],
                window_batch=config["window_batch"],
                amp=args.amp,
                tta=args.tta,
                multilabel=dataset.multilabel,
            )
            .cpu()
            .numpy()
        )
        seconds = time.perf_counter() - begin
        label = np.array(sample["label"]) if dataset.multilabel else np.array(sample["label"][0])
        native_label, native_affine = dataset.native_label(case)
        restored = [
            to_native(volume, sample["affine"], native_affine, sample["native_shape"])
            for volume in (prediction if dataset.multilabel else prediction[None])
        ]
        native = np.stack(restored) if dataset.multilabel else restored[0]
        native_spacing = np.linalg.norm(native_affine[:3, :3], axis=0)
        rows = {}
        for space, pair, spacing in (
            ("resampled", (prediction, label), sample["spacing"]),
            ("native", (native, native_label), native_spacing),
        ):
            scores = case_metrics(
                *pair, dataset.num_classes, spacing=spacing, hd95=args.hd95, **options
            )
            shape = pair[1].shape[-3:]
            shared = {"case": case.name, "diagonal": diagonal(shape, spacing)}
            rows[space] = [{"class": name, **shared, **row} for name, row in zip(names, scores)]
        figures_published = None
        if args.published:
            figures_published = published_case(
                prediction, label, dataset.num_classes, dataset.multilabel
            )
        results.append((rows, figures_published, seconds))
        if not args.no_predictions:
            ids = dataset.decode_prediction(native).astype(np.uint8)
            nib.save(nib.Nifti1Image(ids, native_affine), predictions / f"{case.name}.nii.gz")
        if args.overlays:
            picture = figures.panel(np.array(sample["image"][0]), label, prediction, len(names) + 1)
            matplotlib.image.imsave(overlays / f"{case.name}.png", picture)

    results = world.merged(results)
    if not world.main:
        return
    rows = {space: [row for of_case, _, _ in results for row in of_case[space]] for space in SPACES}
    seconds = [value for _, _, value in results]
    write_csv(out / f"metrics{suffix}.csv", rows, args.hd95)
    # The best checkpoint was chosen on a list: scores on it are then the highest of many, not an
    # estimate.
    selected_on = checkpoint.get("selected_on", "val")
    selected_on_reported = split == selected_on and args.ckpt.stem == "best"
    summary = {
        "dataset": config["dataset"],
        "method": config["method"],
        "preset": config["preset"],
        "teacher": None if config["method"] == "supervised" else config["teacher"],
        "student": described["name"],
        "seed": config["seed"],
        "tag": config["tag"],
        "checkpoint": args.ckpt.name,
        "step": checkpoint["step"],
        "max_steps": config["max_steps"],
        "split": split,
        "selected_on": selected_on,
        "selected_on_reported": selected_on_reported,
        "hd95_definition": args.hd95,
        "empty_policy": args.empty,
        "tta": args.tta,
        "amp": args.amp,
        "fast": args.fast,
        **{space: summarise(rows[space]) for space in SPACES},
        "parameters": count_parameters(network),
        "gmacs": count_macs(network, (1, described["in_channels"], *config["patch_size"])) / 1e9,
        "patch_size": list(config["patch_size"]),
        "ms_per_volume": 1000 * statistics.median(seconds),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "code": checkpoint["code"],
    }
    if args.published:
        summary["published_protocol"] = {
            key: none_if_nan(nan_mean([case[key] for _, case, _ in results]))
            for key in ("dice", "hd95_voxels", "hd95_voxels_penalised")
        }
    (out / f"summary{suffix}.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    report(summary, names, selected_on_reported)
    print(f"results in {out}: metrics{suffix}.csv, summary{suffix}.json")


def score_semi(
    args: argparse.Namespace, path: Path, checkpoint: dict, world: World, device: torch.device
) -> bool:
    """Score one checkpoint of train_3d_crkd.py, write its files, print its table; -> whether it was
    selected on the cases that are reported.
    """
    plug_in(args, path, checkpoint, plugins.data_format(SEMI_DATASETS, SemiDataset))
    published = args.protocol == "published" or args.published
    for flag, value in (("--hd95", args.hd95), ("--empty", args.empty)):
        if published and value is not None:
            raise ConfigError(
                f"{flag} {value}: the published protocol has its own definition; leave it out"
            )
    if args.cache_dir:
        raise ConfigError("--cache-dir is for runs of train_3d_distill.py")
    config, described = checkpoint["config"], checkpoint["network"]
    dataset = build_semi_dataset(
        **dataset_arguments(checkpoint, path, args.data_root, allow_outside=args.allow_outside)
    )
    usual = "test" if checkpoint["cases"]["test"] else "val"
    split = args.split or usual
    cases = dataset.find(checkpoint["cases"][split])
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
    predictor = fast_copy(network, fast_dtype(device)) if args.fast else network

    stride, empty, definition = (
        args.stride or config["stride"],
        args.empty or "agree",
        args.hd95 or "pooled",
    )
    if any(not 0 < step <= side for step, side in zip(stride, config["patch_size"])):
        raise ConfigError(
            f"--stride {list(stride)}: each must lie in 1 .. the window {config['patch_size']}"
        )
    protocol = "published" if published else "clean"
    out = args.out or path.parent
    suffix = "" if path.stem == "best" else f"_{path.stem}"
    suffix += ("_published" if published else "") + ("" if split == usual else f"_{split}")
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
        begin = time.perf_counter()
        prediction = (
            predict_labels(
                predictor,
                torch.from_numpy(volume["image"]).to(device),
                patch_size=config["patch_size"],
                stride=stride,
                window_batch=config["window_batch"],
                amp=args.amp,
                tta=args.tta,
                probabilities=True,
            )
            .cpu()
            .numpy()
        )
        label = volume["label"][0]
        seconds = time.perf_counter() - begin
        if args.largest_component:
            prediction = largest_component(prediction)
        rows = reporting.case_rows(
            case.name,
            prediction,
            label,
            dataset.class_names,
            protocol=protocol,
            hd95=definition,
            empty=empty,
        )
        results.append((rows, seconds))
        if not args.no_predictions:
            nib.save(
                nib.Nifti1Image(prediction, volume["affine"]), predictions / f"{case.name}.nii.gz"
            )
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
    hd95 = "pooled" if published else definition
    reporting.write_csv(out / f"metrics{suffix}.csv", rows, protocol, hd95, "voxels")
    summary = {
        **described_run,
        "protocol": protocol,
        "unit": "voxels",
        "hd95_definition": hd95,
        "empty_policy": "zero" if published else empty,
        "tta": args.tta,
        "amp": args.amp,
        "fast": args.fast,
        "stride": list(stride),
        "largest_component": args.largest_component,
        "native": reporting.summary_of(rows, protocol),
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


def plug_in(
    args: argparse.Namespace, path: Path, checkpoint: dict, formats: plugins.Contract
) -> None:
    """Load the classes of the user's own that the checkpoint needs and --plugin names."""
    contracts = (plugins.network(NETWORKS), formats)
    plugins.plug_in_for(checkpoint, path, args.plugin, contracts, args.allow_changed_plugin)


def published_case(
    prediction: np.ndarray, label: np.ndarray, num_classes: int, multilabel: bool
) -> dict[str, float]:
    """One case by the ACF-BCKD code's own protocol: percent, HD95 'directed' in voxels, classes
    absent from the label left out even where they were predicted, undefined distances dropped,
    rounded to two decimals. Beside its HD95 the one that counts a missed organ as the diagonal.
    """
    unit = [1.0] * (label.ndim - multilabel)
    scores = case_metrics(
        prediction, label, num_classes, spacing=unit, multilabel=multilabel, hd95="directed"
    )
    kept = [row for row in scores if not row["absent"] and not row["spurious"]]
    longest = diagonal(label.shape[int(multilabel) :], unit)
    return {
        "dice": round(100 * nan_mean([row["dice"] for row in kept]), 2),
        "hd95_voxels": round(nan_mean([row["hd95"] for row in kept]), 2),
        "hd95_voxels_penalised": round(
            nan_mean([longest if row["missed"] else row["hd95"] for row in kept]), 2
        ),
    }


def nan_mean(values: list[float]) -> float:
    """Mean of the values that are not NaN; NaN if there is none."""
    known = [value for value in values if not math.isnan(value)]
    return statistics.fmean(known) if known else math.nan


def none_if_nan(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value


def write_csv(path: Path, rows: dict[str, list[dict]], hd95: str) -> None:
    """One line per space, case and class; undefined values are empty, distances in mm.

    `diagonal_mm` is that of the volume: what a failed distance counts as in penalised means.
    """
    header = ["space", "case", "class", "dice", "jaccard", f"hd95_{hd95}_mm", "asd_mm", "assd_mm"]
    flags = ["absent", "missed", "spurious"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*header, *flags, "diagonal_mm"])
        for space, entries in rows.items():
            for row in entries:
                values = [row[key] for key in ("dice", "jaccard", "hd95", "asd", "assd")]
                shown = ["" if math.isnan(value) else f"{value:.6g}" for value in values]
                last = [*(row[flag] for flag in flags), f"{row['diagonal']:.6g}"]
                writer.writerow([space, row["case"], row["class"], *shown, *last])


def report(summary: dict, names: tuple[str, ...], selected_on_reported: bool) -> None:
    """Print the table of classes, both spaces, and what a reader must know about it."""
    counts = summary["resampled"]["counts"]
    failed = any(reporting.failures(summary[space]["counts"]) for space in SPACES)
    width = max(len(name) for name in (*names, "mean of cases"))
    titles = "   Dice  Jaccard  HD95 mm   ASD mm" + "    HD95*     ASD*" * failed
    print(f"{'':{width}}  {'resampled grid':{len(titles)}}    native grid")
    print(f"{'':{width}}  " + "    ".join([titles] * 2))
    for name in (*names, "mean of cases"):
        shown = []
        for space in SPACES:
            scores, penalised = summary[space], summary[space]["penalised"]
            mean = name == "mean of cases"
            entry, also = (s["mean"] if mean else s["classes"][name] for s in (scores, penalised))
            shown.append(reporting.score_cells(entry, also if failed else None))
        print(f"{name:{width}}  " + "    ".join(shown))
    print(
        f"of {counts['pairs']} organs in {summary['resampled']['cases']} cases: {counts['missed']} "
        "missed, "
        f"{counts['spurious']} predicted where there is none, {counts['absent']} absent; the "
        "distances leave these out"
        + (
            " (missed and spurious count as the diagonal)"
            if summary["empty_policy"] == "diag"
            else ""
        )
    )
    if failed:
        print(
            "* with missed and wrongly predicted organs as the diagonal of the volume: compare "
            "runs by these"
        )
    if "published_protocol" in summary:
        values = summary["published_protocol"]
        shown = {
            key: "undefined" if value is None else f"{value:.2f}" for key, value in values.items()
        }
        print(
            f"by the published code's protocol: Dice {shown['dice']} %, HD95 "
            f"{shown['hd95_voxels']} voxels "
            f"({shown['hd95_voxels_penalised']} with missed organs as the diagonal)"
        )
    print(reporting.selection(summary))
    if selected_on_reported:
        print(
            "note: this checkpoint was selected on the cases reported here; report last.pt beside "
            "it"
        )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ConfigError, DataError, CheckpointError) as problem:
        sys.exit(f"error: {problem}")
