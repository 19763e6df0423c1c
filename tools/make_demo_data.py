"""Write a demo data set of generated scans in the layout of a real one: BTCV, WORD or BraTS 2021/2023.

    python tools/make_demo_data.py --dataset btcv --out data/btcv_phantom --cases 16 --seed 0
    python tools/make_demo_data.py --dataset word --out data/word_phantom --cases 8
    python tools/make_demo_data.py --dataset brats21 --out data/brats21_phantom --cases 8 --shape 96 112 88

Files are NIfTI with a decathlon JSON; the same arguments give the same bytes. Voxel sizes vary between the CT cases,
and three training cases are awkward in ways that real ones are: an oblique affine, an axis order other than RAS, and a
missing gallbladder. One BraTS training case has no enhancing tumour.
"""

import argparse
import gzip
import json
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import axcodes2ornt, ornt_transform
from scipy import ndimage
from scipy.spatial.transform import Rotation
from tqdm import tqdm

# The repository is not installed, so its root goes on the path before its own modules are imported.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataloaders.phantoms import (
    BRATS_LABELS,
    BRATS_MODALITIES,
    BTCV_LABELS,
    WORD_LABELS,
    brats_phantom,
    btcv_phantom,
    word_phantom,
)

GENERATORS = {"btcv": btcv_phantom, "word": word_phantom, "brats21": brats_phantom}
LABELS = {"btcv": BTCV_LABELS, "word": WORD_LABELS, "brats21": BRATS_LABELS}
JSON_NAMES = {"btcv": "dataset_0.json", "word": "dataset.json", "brats21": "dataset_0.json"}
SHAPES = {"btcv": (128, 96, 56), "word": (128, 96, 96), "brats21": (96, 112, 88)}
FIELD_OF_VIEW = {"btcv": (358, 269, 224), "word": (358, 269, 432)}  # mm
ODD_CASES = ("oblique", "reordered", "no gallbladder")  # the second to fourth training case


def parse_args(argv=None):
    """Command line -> namespace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, choices=sorted(GENERATORS))
    parser.add_argument("--out", type=Path, help="folder to write (default: data/<dataset>_phantom)")
    parser.add_argument("--cases", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--shape", type=int, nargs=3, metavar=("H", "W", "D"), help="voxels in RAS order; the field of view stays"
    )
    args = parser.parse_args(argv)
    args.out = args.out or Path("data") / f"{args.dataset}_phantom"
    args.shape = tuple(args.shape or SHAPES[args.dataset])
    if args.cases < 1:
        parser.error(f"--cases is {args.cases}; expected at least 1")
    if args.seed < 0:
        parser.error(f"--seed is {args.seed}; expected 0 or more")
    if min(args.shape) < 16:
        parser.error(f"--shape is {args.shape}; expected at least 16 voxels along each axis")
    return args


def split_cases(count):
    """Case numbers 1..count -> {section: numbers}: the last quarter tests, the eighth before it validates."""
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
    """Write an array given in RAS order, stored in axis order `order`; bytes depend on the content only."""
    image = nib.Nifti1Image(array.astype(dtype), affine)
    image = image.as_reoriented(ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(order)))
    image.set_sform(image.affine, code=1)
    image.set_qform(image.affine, code=1)
    image.header.set_xyzt_units("mm")
    path.parent.mkdir(parents=True, exist_ok=True)
    # gzip would store the time of writing and the file's name.
    with open(path, "wb") as raw, gzip.GzipFile("", "wb", compresslevel=6, fileobj=raw, mtime=0) as file:
        file.write(image.to_bytes())


def tilt(image, label, affine, degrees):
    """Scan the same patient on a grid turned by `degrees` about x, y, z: resampled arrays and the oblique affine."""
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
        entry = {"image": f"imagesTr/img{number:04d}.nii.gz", "label": f"labelsTr/label{number:04d}.nii.gz"}
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
        save_nifti(args.out / f"{stem}-{modality}.nii.gz", np.rint(images[modality]), np.eye(4), np.int16, "LPS")
    save_nifti(args.out / f"{stem}-seg.nii.gz", label, np.eye(4), np.uint8, "LPS")
    return {"image": [f"{stem}-{m}.nii.gz" for m in BRATS_MODALITIES], "label": f"{stem}-seg.nii.gz"}


def main(argv=None):
    """Write the data set unless an identical one is there already."""
    args = parse_args(argv)
    arguments = {"dataset": args.dataset, "cases": args.cases, "seed": args.seed, "shape": list(args.shape)}
    record = args.out / "generator.json"
    if args.out.exists() and any(args.out.iterdir()):
        found = json.loads(record.read_text()) if record.exists() else None
        if found == arguments:
            print(f"already there: {args.out}")
            return
        reason = f"was made with {found}, not {arguments}" if found else "is not empty and holds no finished demo data"
        sys.exit(f"{args.out} {reason}; remove it or choose another --out")

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
    record.write_text(json.dumps(arguments) + "\n")  # last: an interrupted run is not taken for a finished one
    counts = ", ".join(f"{len(numbers)} {section}" for section, numbers in entries.items())
    print(f"wrote {counts} cases; datalist: {args.out / JSON_NAMES[args.dataset]}")


if __name__ == "__main__":
    main()
