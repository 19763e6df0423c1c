r"""Write train, val and labelled lists of RGB images with masks (ISIC-2018, Kvasir-SEG, own data),
drawn with a seed.

    python tools/make_splits_2d.py --data-root data/kvasir --out splits/kvasir --val 120
    python tools/make_splits_2d.py --data-root data/isic2018 --out splits/isic2018 --val 519 \
        --ratios 5 10 20

Where the data have train/images and val/images the folders make those two lists and --val is not
given; otherwise val is drawn from all images. Of the download of ISIC-2018 the training folder is
all that is drawn from, as in published tables; without --val the lists are those of its training,
validation and test folders. Each labelled list is a draw of its own from train,
as in the released ones, so they are not nested. Read with split_dir: <out>; unlabelled images are
train less labelled and have no list.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataloaders.cases import Case
from dataloaders.faults import DataError
from dataloaders.images2d import Images2DDataset
from dataloaders.lists import SEED, draw, labelled_count
from utils.checkpoint import write_text
from utils.scripts import run_tool


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-root", required=True, type=Path)
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        help="folder for train.txt, val.txt, labelled_5%%.txt, ...",
    )
    parser.add_argument(
        "--val",
        type=int,
        metavar="N",
        help="validation images to draw, for data without a val folder",
    )
    parser.add_argument(
        "--ratios",
        nargs="+",
        type=int,
        default=(5, 10, 20),
        metavar="PERCENT",
        help="labelled share",
    )
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args(argv)
    lists = train_val(args.data_root, args.val, args.seed)
    for percent in args.ratios:
        if not 1 <= percent <= 99:
            raise DataError(f"--ratios: {percent}; expected percentages of 1 to 99")
        count = labelled_count(percent / 100, len(lists["train"]), str(args.data_root), "image")
        lists[f"labelled_{percent}%"] = sorted(draw(lists["train"], count, args.seed))
    existing = [path for path in (args.out / f"{name}.txt" for name in lists) if path.exists()]
    if existing:
        raise DataError(f"{existing[0]}: exists already; remove the lists or choose another --out")
    args.out.mkdir(parents=True, exist_ok=True)
    for name, chosen in lists.items():
        header = f"# {len(chosen)} images, tools/make_splits_2d.py --seed {args.seed}"
        write_text(args.out / f"{name}.txt", "\n".join([header, *chosen]) + "\n")
    print(
        ", ".join(f"{name} {len(chosen)}" for name, chosen in lists.items()),
        f"images in {args.out}",
    )
    return 0


def train_val(root: Path, val: int | None, seed: int) -> dict[str, list[str]]:
    """Image names of train and val, and of test where ISIC-2018 has it: by folder, or `val` of
    them drawn.
    """
    dataset = Images2DDataset(str(root))
    skipped = dataset.skipped()
    if skipped:
        print("no images, skipped:", ", ".join(str(path.relative_to(root)) for path in skipped))
    folders = dataset.scan()
    released = {"train": folders.get("isic", [])}
    for split, key in (("val", "isic_val"), ("test", "isic_test")):
        cases = folders.pop(key, [])
        # without ground truth a folder may serve as --unlabelled
        if any(case.label is not None for case in cases):
            released[split] = cases
    if val is None and released["train"] and "val" in released:
        return names_of(released)
    names = names_of(folders)
    if folders.keys() >= {"train", "val"}:
        if val is not None:
            raise DataError(f"--val is {val}, but {root} has train and val folders; leave it out")
        return {split: names[split] for split in ("train", "val")}
    together = sorted(set().union(*names.values()))
    if val is None or not 1 <= val < len(together):
        raise DataError(
            f"--val is {val}; expected 1..{len(together) - 1}, {root} has {len(together)} images"
        )
    chosen = sorted(draw(together, val, seed))
    return {"train": sorted(set(together) - set(chosen)), "val": chosen}


def names_of(folders: dict[str, list[Case]]) -> dict[str, list[str]]:
    """Names of the images; DataError for one without a mask."""
    for cases in folders.values():
        for case in cases:
            if case.label is None:
                raise DataError(
                    f"{case.images[0]}: has no mask of the same name; expected one beside the "
                    "image folder"
                )
    return {key: [case.name for case in cases] for key, cases in folders.items()}


if __name__ == "__main__":
    sys.exit(run_tool(main, DataError))
