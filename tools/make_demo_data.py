r"""Write a demo data set of generated scans in the layout of a real one; the same arguments give
the same bytes.

    python tools/make_demo_data.py --dataset btcv --out data/btcv_phantom --cases 16 --seed 0
    python tools/make_demo_data.py --dataset word --out data/word_phantom --cases 8
    python tools/make_demo_data.py --dataset brats21 --out data/brats21_phantom --cases 8 \
        --shape 96 112 88
    python tools/make_demo_data.py --dataset acdc --out data/acdc_phantom --cases 20
    python tools/make_demo_data.py --dataset kvasir --cases 100 --shape 128 150
    python tools/make_demo_data.py --dataset btcv --layout nnunet --cases 8 --shape 48 48 32
    python tools/make_demo_data.py --dataset acdc --corrupt --out data/acdc_corrupt

btcv, word, brats21: NIfTI with a decathlon JSON. Voxel sizes vary between the CT cases, and three
training cases are awkward in ways that real ones are: an oblique affine, an axis order other than
RAS, and a missing gallbladder. One BraTS training case has no enhancing tumour. With --layout
nnunet the same scans as an nnU-Net v2 raw data set with one fold in splits_final.json; the labels
of brats21 are then region-based.
acdc: HDF5 volumes of two frames per patient in data/, their slices in data/slices/, lists of
patients in splits/.
la: <ID>/mri_norm2.h5, lists in splits/. isic2018, kvasir: train/ and val/ with images/ (JPEG) and
masks/ (PNG), and lists per share of labelled images.
"""

import argparse
import gzip
import json
import sys
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
from nibabel.orientations import axcodes2ornt, ornt_transform
from PIL import Image
from scipy import ndimage
from scipy.spatial.transform import Rotation
from tqdm import tqdm

# The repository is not installed, so its root goes on the path before its own modules are imported.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataloaders.lists import draw, labelled_count
from tools.corrupt_data import write_corrupt
from tools.phantoms.few_labels import acdc_phantom, isic_phantom, kvasir_phantom, la_phantom
from tools.phantoms.scans import (
    BRATS_LABELS,
    BRATS_MODALITIES,
    BTCV_LABELS,
    WORD_LABELS,
    brats_phantom,
    btcv_phantom,
    word_phantom,
)

GENERATORS = {"btcv": btcv_phantom, "word": word_phantom, "brats21": brats_phantom}
PHOTOGRAPHS = {"isic2018": isic_phantom, "kvasir": kvasir_phantom}
LABELS = {"btcv": BTCV_LABELS, "word": WORD_LABELS, "brats21": BRATS_LABELS}
JSON_NAMES = {"btcv": "dataset_0.json", "word": "dataset.json", "brats21": "dataset_0.json"}
SHAPES = {
    "btcv": (128, 96, 56),
    "word": (128, 96, 96),
    "brats21": (96, 112, 88),
    "acdc": (144, 120),
    "la": (96, 80, 56),
    "isic2018": (240, 320),
    "kvasir": (256, 300),
}
CASES = {"acdc": 20, "la": 16, "isic2018": 100, "kvasir": 100}
FIELD_OF_VIEW = {"btcv": (358, 269, 224), "word": (358, 269, 432)}  # mm
ODD_CASES = ("oblique", "reordered", "no gallbladder")  # the second to fourth training case


def parse_args(argv=None):
    """Command line -> namespace."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", required=True, choices=sorted(SHAPES))
    parser.add_argument(
        "--out", type=Path, help="folder to write (default: data/<dataset>[_nnunet]_phantom)"
    )
    parser.add_argument(
        "--layout",
        choices=("decathlon", "nnunet"),
        default="decathlon",
        help="of btcv, word and brats21",
    )
    parser.add_argument(
        "--cases",
        type=int,
        help="scans, patients (acdc) or images (default: 16; 20 acdc, 100 images)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--corrupt",
        action="store_true",
        help="write a tiny data set for every fault that tools/check_data.py knows of the "
        "format, see "
        "tools/corrupt_data.py; --cases, --seed and --shape do not apply",
    )
    parser.add_argument(
        "--shape",
        type=int,
        nargs="+",
        metavar="N",
        help=(
            "three numbers, voxels in RAS order, or two, rows and columns (acdc, images); the "
            "field of view stays"
        ),
    )
    args = parser.parse_args(argv)
    if args.corrupt and (args.cases is not None or args.shape is not None):
        parser.error("--corrupt takes neither --cases nor --shape")
    nnunet = args.layout == "nnunet"
    if nnunet and (args.corrupt or args.dataset not in GENERATORS):
        parser.error(
            f"--layout nnunet: for {', '.join(GENERATORS)} without --corrupt, not for "
            f"{args.dataset}"
        )
    kind = "corrupt" if args.corrupt else "phantom"
    args.out = args.out or Path("data") / f"{args.dataset}{'_nnunet' * nnunet}_{kind}"
    args.shape = tuple(args.shape or SHAPES[args.dataset])
    args.cases = CASES.get(args.dataset, 16) if args.cases is None else args.cases
    if len(args.shape) != len(SHAPES[args.dataset]):
        parser.error(
            f"--shape is {args.shape}; {args.dataset} takes {len(SHAPES[args.dataset])} numbers"
        )
    if args.cases < 1:
        parser.error(f"--cases is {args.cases}; expected at least 1")
    if args.seed < 0:
        parser.error(f"--seed is {args.seed}; expected 0 or more")
    if min(args.shape) < 16:
        parser.error(f"--shape is {args.shape}; expected at least 16 voxels along each axis")
    return args


def split_cases(count):
    """Case numbers 1..count -> {section: numbers}: the last quarter tests, the eighth before it
    validates.
    """
    test = max(count // 4, int(count >= 3))
    validation = max(count // 8, int(count >= 3))
    numbers = list(range(1, count + 1))
    training = count - test - validation
    return {
        "training": numbers[:training],
        "validation": numbers[training : training + validation],
        "test": numbers[training + validation :],
    }


def save_nifti(path, array, affine, dtype, order="RAS"):
    """Write an array given in RAS order, stored in axis order `order`; bytes depend on the content
    only.
    """
    image = nib.Nifti1Image(array.astype(dtype), affine)
    image = image.as_reoriented(ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(order)))
    image.set_sform(image.affine, code=1)
    image.set_qform(image.affine, code=1)
    image.header.set_xyzt_units("mm")
    path.parent.mkdir(parents=True, exist_ok=True)
    # gzip would store the time of writing and the file's name.
    with (
        open(path, "wb") as raw,
        gzip.GzipFile("", "wb", compresslevel=6, fileobj=raw, mtime=0) as file,
    ):
        file.write(image.to_bytes())


def tilt(image, label, affine, degrees):
    """Scan the same patient on a grid turned by `degrees` about x, y, z: resampled arrays and the
    oblique affine.
    """
    centre = np.append((np.array(image.shape) - 1) / 2, 1)
    turned = affine.copy()
    turned[:3, :3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix() @ affine[:3, :3]
    turned[:3, 3] += (affine @ centre - turned @ centre)[:3]
    to_source = np.linalg.inv(affine) @ turned
    image = ndimage.affine_transform(image, to_source, order=1, mode="nearest")
    label = ndimage.affine_transform(label, to_source, order=0, mode="constant")
    return image, label, turned


def write_ct(args, number, section, oddity):
    """Generate and write one CT case -> its entry of the JSON."""
    rng = np.random.default_rng([args.seed, number, 1])
    fit = [extent / n for extent, n in zip(FIELD_OF_VIEW[args.dataset], args.shape)]
    in_plane = max(fit[:2]) * rng.uniform(0.93, 1.07)
    spacing = np.round((in_plane, in_plane, fit[2] * rng.uniform(0.9, 1.1)), 3)
    missing = ("gallbladder",) if oddity == "no gallbladder" else ()
    image, label = GENERATORS[args.dataset]([args.seed, number], args.shape, spacing, missing)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -spacing * (np.array(args.shape) - 1) / 2
    if oddity == "oblique":
        image, label, affine = tilt(image, label, affine, (6.0, -3.0, 5.0))
    order = "PIR" if oddity == "reordered" else "RAS"
    if args.dataset == "btcv":
        entry = {
            "image": f"imagesTr/img{number:04d}.nii.gz",
            "label": f"labelsTr/label{number:04d}.nii.gz",
        }
    else:
        suffix = {"training": "Tr", "validation": "Val", "test": "Ts"}[section]
        entry = {kind: f"{kind}s{suffix}/word_{number:04d}.nii.gz" for kind in ("image", "label")}
    save_nifti(args.out / entry["image"], np.rint(image), affine, np.int16, order)
    save_nifti(args.out / entry["label"], label, affine, np.uint8, order)
    return entry


def write_brats(args, number, no_enhancing):
    """Generate and write one BraTS case -> its entry of the JSON."""
    images, label = brats_phantom([args.seed, number], args.shape, no_enhancing)
    name = f"BraTS-GLI-{number:05d}-000"
    stem = f"TrainingData/{name}/{name}"
    for modality in BRATS_MODALITIES:  # the release stores its volumes in LPS order
        save_nifti(
            args.out / f"{stem}-{modality}.nii.gz",
            np.rint(images[modality]),
            np.eye(4),
            np.int16,
            "LPS",
        )
    save_nifti(args.out / f"{stem}-seg.nii.gz", label, np.eye(4), np.uint8, "LPS")
    return {
        "image": [f"{stem}-{m}.nii.gz" for m in BRATS_MODALITIES],
        "label": f"{stem}-seg.nii.gz",
    }


def write_decathlon(args):
    """Write NIfTI cases and their JSON -> what was written, in words."""
    sections = split_cases(args.cases)
    odd = dict(zip(sections["training"][1:], ODD_CASES))
    entries = {section: [] for section in sections}
    jobs = [(section, number) for section, numbers in sections.items() for number in numbers]
    for section, number in tqdm(jobs, desc=args.dataset, unit="case"):
        if args.dataset == "brats21":
            entry = write_brats(args, number, no_enhancing=number in sections["training"][1:2])
        else:
            entry = write_ct(args, number, section, odd.get(number))
        entries[section].append(entry)

    channels = BRATS_MODALITIES if args.dataset == "brats21" else ("CT",)
    names = {"background": 0, **LABELS[args.dataset]}
    datalist = {
        "name": f"{args.dataset}_phantom",
        "description": "generated scans, no patient data",
        "modality": {str(i): name for i, name in enumerate(channels)},
        "labels": {str(i): name for name, i in names.items()},
        "numTraining": len(entries["training"]),
        "numTest": len(entries["test"]),
        **entries,
    }
    (args.out / JSON_NAMES[args.dataset]).write_text(json.dumps(datalist, indent=2) + "\n")
    counts = ", ".join(f"{len(numbers)} {section}" for section, numbers in entries.items())
    return f"{counts} cases; datalist: {args.out / JSON_NAMES[args.dataset]}"


def write_nnunet(args):
    """Write NIfTI cases as an nnU-Net v2 raw data set -> what was written, in words."""
    write_decathlon(args)
    datalist = args.out / JSON_NAMES[args.dataset]
    content = json.loads(datalist.read_text())
    datalist.unlink()
    names = {"training": [], "validation": [], "test": []}
    for section, found in names.items():
        part = "Ts" if section == "test" else "Tr"
        for number, entry in enumerate(content[section], 1 + sum(map(len, names.values()))):
            found.append(f"{args.dataset}_{number:04d}")
            images = entry["image"] if isinstance(entry["image"], list) else [entry["image"]]
            moves = {f"images{part}/{found[-1]}_{k:04d}": file for k, file in enumerate(images)}
            for target, file in {**moves, f"labels{part}/{found[-1]}": entry["label"]}.items():
                target = args.out / f"{target}.nii.gz"
                target.parent.mkdir(parents=True, exist_ok=True)
                (args.out / file).rename(target)
    for folder in sorted((path for path in args.out.rglob("*") if path.is_dir()), reverse=True):
        if not any(folder.iterdir()):
            folder.rmdir()
    labels = {name: int(k) for k, name in content["labels"].items()}
    regions = {}
    if args.dataset == "brats21":
        labels = {
            "background": 0,
            "whole tumour": [1, 2, 3],
            "tumour core": [1, 3],
            "enhancing tumour": [3],
        }
        regions = {"regions_class_order": [2, 1, 3]}
    described = {
        "channel_names": content["modality"],
        "labels": labels,
        **regions,
        "file_ending": ".nii.gz",
        "numTraining": len(names["training"]) + len(names["validation"]),
        "name": content["name"],
        "description": content["description"],
    }
    (args.out / "dataset.json").write_text(json.dumps(described, indent=2) + "\n")
    folds = [{"train": names["training"], "val": names["validation"]}]
    (args.out / "splits_final.json").write_text(json.dumps(folds, indent=2) + "\n")
    counts = ", ".join(f"{len(found)} {section}" for section, found in names.items())
    return f"{counts} cases in nnU-Net's layout; {args.out / 'dataset.json'}"


def save_h5(path, image, label):
    """Write image and label as the public HDF5 files have them; no time of writing is stored."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for key, array in (("image", image), ("label", label)):
            file.create_dataset(key, data=array, compression="gzip", track_times=False)


def write_list(path, lines):
    """One item per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_case_lists(args, name):
    """splits/{train,val,test}.txt of the cases that `name` formats -> their number and place, in
    words.
    """
    sections = split_cases(args.cases)
    for split, section in (("train", "training"), ("val", "validation"), ("test", "test")):
        if sections[section]:
            write_list(
                args.out / "splits" / f"{split}.txt",
                [name.format(number) for number in sections[section]],
            )
    counts = ", ".join(f"{len(numbers)} {section}" for section, numbers in sections.items())
    return f"{counts} cases; lists: {args.out / 'splits'}"


def write_acdc(args):
    """Write both frames of each patient, as volumes and as slices -> what was written, in words."""
    for number in tqdm(range(1, args.cases + 1), desc=args.dataset, unit="patient"):
        rng = np.random.default_rng([args.seed, number, 1])
        in_plane = [int(n * scale) for n, scale in zip(args.shape, rng.uniform(0.93, 1.07, 2))]
        frames = acdc_phantom([args.seed, number], (int(rng.integers(6, 13)), *in_plane))
        for frame, (image, label) in frames.items():
            stem = f"patient{number:03d}_{frame}"
            save_h5(args.out / "data" / f"{stem}.h5", image, label)
            for z in range(len(image)):
                save_h5(
                    args.out / "data" / "slices" / f"{stem}_slice_{z + 1}.h5", image[z], label[z]
                )
    return write_case_lists(args, "patient{:03d}")


def write_la(args):
    """Write one folder per scan -> what was written, in words."""
    name = "PHANTOM{:04d}"
    for number in tqdm(range(1, args.cases + 1), desc=args.dataset, unit="scan"):
        shape = np.array(args.shape)
        # the third is the same for all
        shape[:2] += np.random.default_rng([args.seed, number, 1]).integers(-4, 9, 2)
        image, label = la_phantom([args.seed, number], tuple(shape.tolist()))
        save_h5(args.out / name.format(number) / "mri_norm2.h5", image, label)
    return write_case_lists(args, name)


def write_photographs(args):
    """Write images, masks and the lists of 5, 10 and 20 % labelled images -> what was written, in
    words.
    """
    stem = {"isic2018": "ISIC_{:07d}", "kvasir": "polyp{:04d}"}[args.dataset]
    held_out = max(args.cases // 5, int(args.cases >= 2))
    lines = {"train": [], "val": []}
    for number in tqdm(range(1, args.cases + 1), desc=args.dataset, unit="image"):
        split = "train" if number <= args.cases - held_out else "val"
        scale = np.random.default_rng([args.seed, number, 1]).uniform(0.85, 1.15, 2)
        shape = tuple(int(n * factor) for n, factor in zip(args.shape, scale))
        image, mask = PHOTOGRAPHS[args.dataset]([args.seed, number], shape)
        files = [
            f"{split}/images/{stem.format(number)}.jpg",
            f"{split}/masks/{stem.format(number)}.png",
        ]
        for file, pixels in zip(files, (image, 255 * mask)):
            path = args.out / file
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path, **({"quality": 92} if path.suffix == ".jpg" else {}))
        lines[split].append(" ".join(files))
    for split in lines:
        write_list(args.out / f"{split}.txt", lines[split])
    for percent in (5, 10, 20):
        if percent * len(lines["train"]) < 100:
            continue
        labelled = set(
            draw(
                lines["train"],
                labelled_count(percent / 100, len(lines["train"]), "train.txt", "image"),
            )
        )
        folder = args.out / f"ratio_{percent}%"
        write_list(folder / "labeled.txt", [line for line in lines["train"] if line in labelled])
        write_list(
            folder / "unlabeled.txt", [line for line in lines["train"] if line not in labelled]
        )
        write_list(folder / "val.txt", lines["val"])
    return f"{len(lines['train'])} train, {len(lines['val'])} val images; lists: {args.out}"


WRITERS = {
    "acdc": write_acdc,
    "la": write_la,
    "isic2018": write_photographs,
    "kvasir": write_photographs,
}


def main(argv=None):
    """Write the data set unless an identical one is there already."""
    args = parse_args(argv)
    arguments = {
        "dataset": args.dataset,
        "cases": args.cases,
        "seed": args.seed,
        "shape": list(args.shape),
    }
    if args.layout != "decathlon":
        arguments["layout"] = args.layout
    if args.corrupt:
        arguments = {"dataset": args.dataset, "corrupt": True}
    record = args.out / "generator.json"
    if args.out.exists() and any(args.out.iterdir()):
        found = json.loads(record.read_text()) if record.exists() else None
        if found == arguments:
            print(f"already there: {args.out}")
            return
        reason = (
            f"was made with {found}, not {arguments}"
            if found
            else "is not empty and holds no finished demo data"
        )
        sys.exit(f"{args.out} {reason}; remove it or choose another --out")

    if args.corrupt:
        summary = write_corrupt(args.dataset, args.out)
    else:
        usual = write_nnunet if args.layout == "nnunet" else write_decathlon
        summary = WRITERS.get(args.dataset, usual)(args)
    # last: an interrupted run is not taken for a finished one
    record.write_text(json.dumps(arguments) + "\n")
    print(f"wrote {summary}")


if __name__ == "__main__":
    main()
