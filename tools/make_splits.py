r"""Write train, val and test lists of a data set's labelled cases: drawn with a seed, or every
fifth case.

    python tools/make_splits.py --data-root data/Task04_Hippocampus --out splits/hippocampus \
        --counts 128 30 50 --seed 0
    python tools/make_splits.py --data-root data/brats21 --datalist dataset_0.json \
        --rule every_fifth --out splits/brats21
    python tools/make_splits.py --data-root data/Dataset101_Liver --format nnunet \
        --out splits/liver --counts 80 20
    python tools/make_splits.py images --data-root data/Kvasir-SEG --out splits/kvasir --val 120

every_fifth: of the sorted names every fifth one (the fifth, tenth, ...) goes to val, the rest to
train, and there is no test list. It gives the 1001 and 250 cases of BraTS 2021 that the ACF-BCKD
tables use. images: RGB images with masks, lists of labelled shares among them; its options are
those of tools/make_splits_2d.py.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataloaders import DATASETS, build_dataset, describe_dataset
from dataloaders.faults import DataError
from dataloaders.lists import read_datalist
from tools import make_splits_2d
from utils.checkpoint import write_text
from utils.scripts import run_tool


def main() -> int:
    if sys.argv[1:2] == ["images"]:
        return make_splits_2d.main(sys.argv[2:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-root", required=True, type=Path)
    parser.add_argument("--format", choices=tuple(DATASETS), default="msd", help="of the data set")
    parser.add_argument("--datalist", default="dataset.json")
    parser.add_argument(
        "--out", required=True, type=Path, help="folder for train.txt, val.txt, test.txt"
    )
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument(
        "--counts",
        nargs="+",
        type=int,
        metavar="N",
        help="train val [test] cases, drawn with --seed",
    )
    how.add_argument("--rule", choices=("every_fifth",), help="a fixed rule instead of a draw")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    names = labelled_names(args.format, args.data_root, args.datalist)
    if args.rule:
        lists, how = every_fifth(names), f"--rule {args.rule}"
        if not lists["val"]:
            raise DataError(
                f"--rule {args.rule}: {args.data_root} has {len(names)} labelled cases, expected 5 "
                "or more"
            )
    else:
        lists = drawn(names, args.counts, args.seed)
        how = f"--counts {' '.join(map(str, args.counts))} --seed {args.seed}"
    write_lists(args.out, lists, f"tools/make_splits.py {how}")
    print(
        f"lists of {', '.join(str(len(chosen)) for chosen in lists.values())} cases in {args.out}"
    )
    return 0


def labelled_names(format: str, root: Path, datalist: str) -> list[str]:
    """Names of all labelled cases of a data set, sorted."""
    if format != "nnunet":  # these list their cases without saying what the labels mean
        sections = read_datalist(root, datalist, allow_outside=True)  # no file is read
        return sorted(
            {case.name for cases in sections.values() for case in cases if case.label is not None}
        )
    told = describe_dataset(format, str(root), datalist, {})
    return sorted(
        case.name
        for case in build_dataset(format, root=str(root), datalist=datalist, **told).cases()
    )


def write_lists(folder: Path, lists: dict[str, Sequence[str]], how: str) -> None:
    """Write `folder`/train.txt and so on, with a line that says how they were drawn; DataError if
    one is there.
    """
    existing = [
        path
        for path in (folder / f"{name}.txt" for name in ("train", "val", "test"))
        if path.exists()
    ]
    if existing:
        raise DataError(f"{existing[0]}: exists already; remove the lists or choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    for split, chosen in lists.items():
        header = f"# {len(chosen)} cases drawn by {how}"
        write_text(folder / f"{split}.txt", "\n".join([header, *chosen]) + "\n")


def drawn(names: Sequence[str], counts: Sequence[int], seed: int) -> dict[str, list[str]]:
    """Train, val and, for three counts, test lists of `counts` names, drawn without repetition."""
    if not 2 <= len(counts) <= 3 or min(counts) < 1:
        raise DataError(
            f"--counts: two or three positive numbers (train val [test]), got {list(counts)}"
        )
    if sum(counts) > len(names):
        raise DataError(
            f"--counts: {sum(counts)} cases asked for, the data list has {len(names)} labelled ones"
        )
    shuffled, lists = list(names), {}
    random.Random(seed).shuffle(shuffled)
    for split, count in zip(("train", "val", "test"), counts):
        lists[split], shuffled = sorted(shuffled[:count]), shuffled[count:]
    return lists


def every_fifth(names: Sequence[str]) -> dict[str, list[str]]:
    """Val: indices 4, 9, 14, ... of the sorted names; train: the others."""
    ordered = sorted(names)
    return {"train": [name for k, name in enumerate(ordered) if k % 5 != 4], "val": ordered[4::5]}


if __name__ == "__main__":
    sys.exit(run_tool(main, DataError))
