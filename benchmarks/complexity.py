r"""Size, multiply-adds, peak memory and latency of the six 3D networks, beside the published
figures.

    python benchmarks/complexity.py
    python benchmarks/complexity.py --networks unet espnetv2 --size 64 --threads 2 \
        --out complexity.md
    python benchmarks/complexity.py --repeats 0                # counts only, in seconds

Prints one Markdown table: networks x {btcv, word, brats21}. Memory and latency are those of one
evaluation pass on one patch on this computer's CPU; the memory counts neither the weights nor the
input.
"""

import argparse
import functools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from networks import NETWORKS, build_network
from utils.complexity import count_macs, count_parameters, measure_latency, peak_memory

# Dataset: input channels, channels of the logits (background included, except for BraTS's three
# overlapping regions).
DATASETS = {"btcv": (1, 14), "word": (1, 17), "brats21": (4, 3)}

# Network, dataset: parameters as released, convolution GMACs at 96 x 96 x 96 (ACF-BCKD).
PUBLISHED = {
    ("resunet", "btcv"): (18_992_149, 88.612),
    ("resunet", "word"): (19_005_034, 91.980),
    ("resunet", "brats21"): (18_959_430, 81.087),
    ("segresnet", "btcv"): (4_701_118, 61.450),
    ("segresnet", "word"): (4_701_169, 61.493),
    ("segresnet", "brats21"): (4_702_227, 62.441),
    ("unet", "btcv"): (1_961_012, 8.122),
    ("unet", "word"): (1_966_199, 8.695),
    ("unet", "brats21"): (1_944_585, 6.306),
    ("espnetv2", "btcv"): (284_438, 0.854),
    ("espnetv2", "word"): (286_187, 0.923),
    ("espnetv2", "brats21"): (279_262, 0.752),
    ("mobile_unet", "btcv"): (13_883_132, 2.348),
    ("mobile_unet", "word"): (13_883_183, 2.390),
    ("mobile_unet", "brats21"): (13_883_131, 2.212),
    ("lcovnet", "btcv"): (815_984, 10.978),
    ("lcovnet", "word"): (816_704, 11.021),
    ("lcovnet", "brats21"): (813_488, 10.950),
}
PUBLISHED_NETWORKS = list(dict.fromkeys(name for name, _ in PUBLISHED))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--networks", nargs="+", choices=PUBLISHED_NETWORKS, default=PUBLISHED_NETWORKS
    )
    parser.add_argument(
        "--size", type=int, default=96, help="side of the cubic input in voxels (default 96)"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument(
        "--repeats", type=int, default=3, help="timed passes; 0 leaves out memory and latency"
    )
    parser.add_argument("--out", type=Path, help="write the table to this file too")
    args = parser.parse_args()
    for name in args.networks:
        if args.size < 1 or args.size % NETWORKS[name].stride:
            parser.error(
                f"--size must be a multiple of {NETWORKS[name].stride} for {name}, got {args.size}"
            )
    if args.threads < 1 or args.repeats < 0:
        parser.error(
            f"--threads must be at least 1 and --repeats at least 0, got {args.threads} and "
            f"{args.repeats}"
        )
    return args


def make_rows(name: str, size: int, threads: int, repeats: int) -> list[list[str]]:
    """Table rows of the network `name`, one per dataset."""
    rows = []
    for dataset, (in_channels, num_classes) in DATASETS.items():
        net = build_network(name, in_channels, num_classes)
        complete = {"allocate_unused": True} if getattr(net, "unused_keys", ()) else {}
        released = build_network(name, in_channels, num_classes, **complete)
        shape = (1, in_channels, size, size, size)
        memory_cell = latency_cell = "-"
        if repeats:
            memory = peak_memory(
                functools.partial(build_network, name, in_channels, num_classes), shape, threads
            )
            memory_cell, latency_cell = (
                f"{memory:.0f}",
                f"{measure_latency(net, shape, repeats, threads):.0f}",
            )
        published_parameters, published_gmacs = PUBLISHED[name, dataset]
        rows.append(
            [
                name,
                dataset,
                f"{count_parameters(net):,}",
                f"{count_parameters(released):,}",
                f"{published_parameters:,}",
                f"{count_macs(net, shape) / 1e9:.3f}",
                f"{published_gmacs:.3f}",
                memory_cell,
                latency_cell,
            ]
        )
    return rows


def main() -> None:
    args = parse_args()
    header = [
        "network",
        "dataset",
        "parameters used",
        "with unused ones",
        "published",
        f"GMACs at {args.size}³",
        "published at 96³",
        "peak memory (MiB)",
        f"latency (ms, {args.threads} threads)",
    ]
    lines = [f"| {' | '.join(header)} |", "|---|---|" + "---:|" * (len(header) - 2)]
    print("\n".join(lines), flush=True)
    for name in args.networks:
        for row in make_rows(name, args.size, args.threads, args.repeats):
            lines.append(f"| {' | '.join(row)} |")
            print(lines[-1], flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
