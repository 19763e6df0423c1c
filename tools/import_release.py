r"""Turn ACDC or LA, as their challenges hand them out, into the HDF5 layout of the few-label
literature.

    python tools/import_release.py acdc downloads/ACDC --out data/ACDC
    python tools/import_release.py la downloads/LA --out data/LA

acdc: training/ and testing/ (also under database/) with patientXXX/patientXXX_frameYY.nii.gz,
_frameYY_gt.nii.gz and Info.cfg; the 4D file is not read. la: `Training Set` and `Testing Set` (any
folders whose names end so) with ID/lgemri.nrrd and ID/laendo.nrrd. Test cases may come without
labels, then all of them.

ACDC, as SSL4MIS has it: Info.cfg's ED frame becomes frame01, its ES frame frame02; (x - min) /
(max - min) over the volume; axes (slice, row, column), which is (z, y, x) of the file; neither
resampled nor cropped. data/ has a file per frame, data/slices/ one per slice.

LA, as UA-MT has it: label 255 becomes 1; (x - mean) / standard deviation over the whole scan; axes
(x, y, z) of the file; then x and y, not z, are cropped to the label's box [low, high] enlarged to
low - 15 - p .. high + 15 + p (end excluded), p = max(112 - (high - low), 0) // 2, as far as the
scan reaches. The published files drew 10 to 19 on each side instead of 15. File: ID/mri_norm2.h5.

Cases without labels go to unlabelled/, for --unlabelled. An LA scan among them has no box: it is
cut to the smallest one that holds those of all labelled scans, measured from the scan's centre.

The result is whole or absent: it grows in OUT.partial, where an interrupted import goes on.
"""

import argparse
import dataclasses
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataloaders import checks
from dataloaders.cases import Case, read_image
from dataloaders.faults import WARNING, DataError, Report
from dataloaders.volumes import read_volume

ACDC_IDS = range(4)
ATRIUM = 255
MARGIN, SMALLEST = 15, 112  # voxels, of an LA scan's box in x and y
RECORD = "import.json"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("release", choices=tuple(RELEASES))
    parser.add_argument("source", type=Path, help="folder of the unpacked download")
    parser.add_argument("--out", required=True, type=Path, help="folder to make, such as data/ACDC")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    release = RELEASES[args.release]
    if not args.source.is_dir():
        raise DataError(f"{args.source}: no such folder; expected the unpacked download")
    report = Report()
    cases = release.find(args.source, report)
    report.stop()
    # labelled ones first: boxes of the others follow from theirs
    cases.sort(key=lambda case: case.label is None)
    out = args.out.resolve()  # of a link, what it leads to
    record = describe(args.release, args.source, cases)
    if out.exists() and any(out.iterdir()):
        if read_record(out) != record:
            raise DataError(
                f"{args.out}: is there already and was not made of these files; remove it or "
                "choose another --out"
            )
        print(f"already there: {args.out}")
    else:
        partial = out.with_name(f"{out.name}.partial")
        begin(partial, record)
        write_cases(release, cases, partial, report)
        if out.exists():
            out.rmdir()
        os.rename(partial, out)
    without = sum(case.label is None for case in cases)
    more = (
        f", {without} without a label (--unlabelled {args.out / 'unlabelled'})" if without else ""
    )
    root = shlex.quote(f"data_root={args.out}")
    print(
        f"{len(cases) - without} labelled {release.unit}{more} in {args.out}; next: python "
        f"tools/check_data.py --config configs/{args.release}.yaml --opts {root}"
    )
    return 0


# Files of the result


def describe(release: str, source: Path, cases: Sequence[Case]) -> dict:
    """What an import is made of: the files and their sizes."""
    files = {
        str(path.relative_to(source)): path.stat().st_size for case in cases for path in case.files
    }
    return {"release": release, "margin": MARGIN, "files": files}


def read_record(folder: Path) -> dict | None:
    """The record of an import; None if there is none."""
    try:
        return json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def begin(partial: Path, record: dict) -> None:
    """Make the folder, unless it is there with an unfinished import of the same files."""
    found = read_record(partial)
    if found == record:
        return
    if partial.exists():
        if found is None:
            raise DataError(f"{partial}: holds no unfinished import; remove it")
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    (partial / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def write_cases(release: "Release", cases: Sequence[Case], folder: Path, report: Report) -> None:
    """Convert every case that `folder` lacks; DataError with all faults at the end."""
    report.count("", len(cases), release.unit)
    for case in tqdm(cases, desc="converting", unit="case"):
        with report.catching("", case.name):
            if not (folder / release.file(case)).exists():
                release.convert(case, folder, report)
    for line in report.spoken_warnings():
        print(line, file=sys.stderr)
    if report.errors:
        shutil.rmtree(folder)  # boxes of unlabelled scans may lack some that they follow from
    report.stop()


def save_h5(path: Path, arrays: dict[str, np.ndarray], **attributes: object) -> None:
    """Write arrays and attributes; the file is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with h5py.File(temporary, "w") as file:
        for key, array in arrays.items():
            file.create_dataset(key, data=array, compression="gzip", track_times=False)
        file.attrs.update(attributes)
    os.replace(temporary, path)


# Files of a release


def paired(cases: Sequence[Case], may_lack: bool, report: Report) -> list[Case]:
    """The cases whose files exist, with a fault for each file that does not. may_lack: if none of
    the labels exists, the cases have none.
    """
    if may_lack and not any(case.label.is_file() for case in cases):
        cases = [dataclasses.replace(case, label=None) for case in cases]
    whole = []
    for case in cases:
        missing = [path for path in case.files if not path.is_file()]
        for path in missing:
            report.error("missing file", path, "no such file", "", "unpack the download again")
        if not missing:
            whole.append(case)
    return whole


def distinct(cases: Sequence[Case], source: Path, expected: str, report: Report) -> list[Case]:
    """The cases; DataError if there are none, and a fault for a name that occurs twice."""
    if not cases and not report.errors:
        raise DataError(f"{source}: no cases; expected {expected}")
    names = [case.name for case in cases]
    for name in sorted({name for name in names if names.count(name) > 1}):
        report.error("listed twice", source, f"'{name}' is there twice", "", "remove one of them")
    return list(cases)


def read_pair(
    case: Case, ids: Sequence[int], report: Report
) -> tuple[np.ndarray, np.ndarray | None]:
    """Image (x, y, z) float64 and label, if there is one, as their files hold them.

    Sizes must agree. Headers that do not are warned of: the published files were made without
    regard to them.
    """
    image, affine = read_image(case, 1)
    image = image[0].astype(np.float64)
    if case.label is None:
        return image, None
    label, label_affine = read_volume(case.label)
    grid, faults = Report(), Report()
    checks.check_geometry(case, label.shape, label_affine, image.shape, affine, grid)
    for finding in grid.findings:
        if finding.fault == "shape":
            faults.take([finding])
        else:
            report.take([dataclasses.replace(finding, level=WARNING)])
    checks.check_ids(case.label, label, ids, faults)
    if not label.any():
        expected, fix = "a labelled voxel", "unpack the download again"
        faults.error("empty label", case.label, "no foreground", expected, fix)
    faults.stop()
    return image, label


# ACDC


def find_acdc(source: Path, report: Report) -> list[Case]:
    """Both frames of every patient."""
    cases = []
    base = source / "database" if (source / "database").is_dir() else source
    for part in ("training", "testing"):
        patients = sorted(path for path in (base / part).glob("patient*") if path.is_dir())
        frames = [case for patient in patients for case in acdc_frames(patient, report)]
        cases += paired(frames, part == "testing", report)
    return distinct(cases, source, "training/patientXXX or testing/patientXXX", report)


def acdc_frames(patient: Path, report: Report) -> list[Case]:
    """The frames that Info.cfg names, end of diastole first."""
    info = patient / "Info.cfg"
    text = info.read_text(encoding="utf-8", errors="replace") if info.is_file() else None
    cases = []
    for number, phase in ((1, "ED"), (2, "ES")):
        match = re.search(rf"^\s*{phase}\s*:\s*(\d+)\s*$", text or "", re.M)
        if match is None:
            found = "no such file" if text is None else f"no line '{phase}: NUMBER'"
            fault = "missing file" if text is None else "list"
            report.error(fault, info, found, "the frames of ED and ES", "unpack the download again")
            continue
        stem = f"{patient.name}_frame{int(match[1]):02d}"
        image, label = (patient / f"{stem}{end}.nii.gz" for end in ("", "_gt"))
        cases.append(Case(f"{patient.name}_frame{number:02d}", (image,), label))
    return cases


def acdc_file(case: Case) -> str:
    return f"data/{case.name}.h5" if case.label else f"unlabelled/{case.name}.h5"


def convert_acdc(case: Case, folder: Path, report: Report) -> None:
    """Write the volume and, of a labelled one, its slices: first, so that a volume stands for
    them.
    """
    image, label = read_pair(case, ACDC_IDS, report)
    scaled = (image - image.min()) / (image.max() - image.min())
    arrays = {"image": np.float32(scaled).transpose(2, 1, 0)}
    if label is not None:
        arrays["label"] = label.astype(np.uint8).transpose(2, 1, 0)
        for index in range(len(arrays["image"])):
            path = folder / "data" / "slices" / f"{case.name}_slice_{index + 1}.h5"
            save_h5(path, {key: stack[index] for key, stack in arrays.items()})
    save_h5(folder / acdc_file(case), arrays, source=case.images[0].name)


# LA


def find_la(source: Path, report: Report) -> list[Case]:
    """Every scan."""
    cases = []
    for part in ("Training Set", "Testing Set"):
        folders = sorted(path for path in source.glob(f"*{part}/*") if path.is_dir())
        scans = [Case(path.name, (path / "lgemri.nrrd",), path / "laendo.nrrd") for path in folders]
        cases += paired(scans, part == "Testing Set", report)
    return distinct(cases, source, "'Training Set/ID' or 'Testing Set/ID'", report)


def la_file(case: Case) -> str:
    return f"{case.name}/mri_norm2.h5" if case.label else f"unlabelled/{case.name}.h5"


def convert_la(case: Case, folder: Path, report: Report) -> None:
    """Write the scan. The attributes `start` and `scan` (voxels) tell where it was cut from."""
    image, label = read_pair(case, (0, ATRIUM), report)
    arrays = {"image": np.float32((image - image.mean()) / image.std())}
    if label is None:
        box = common_box(folder, image.shape)
    else:
        arrays["label"] = np.uint8(label == ATRIUM)
        box = label_box(arrays["label"])
    start = [side.start for side in box] + [0]
    arrays = {key: array[box] for key, array in arrays.items()}
    save_h5(folder / la_file(case), arrays, start=start, scan=image.shape)


def label_box(label: np.ndarray) -> tuple[slice, slice]:
    """The part of x and y that is kept of a labelled scan, see above."""
    box = []
    for axis, size in enumerate(label.shape[:2]):
        inside = np.unique(np.nonzero(label)[axis])
        low, high = int(inside[0]), int(inside[-1])
        margin = MARGIN + max(SMALLEST - (high - low), 0) // 2
        box.append(slice(max(low - margin, 0), min(high + margin, size)))
    return tuple(box)


def common_box(folder: Path, shape: Sequence[int]) -> tuple[slice, slice]:
    """The part of x and y that holds the boxes of all labelled scans, which are in `folder`
    already; without one, all.
    """
    ends = []  # per scan: first and last corner (x, y) from the centre
    for path in folder.glob("*/mri_norm2.h5"):
        with h5py.File(path) as file:
            centre = file.attrs["scan"][:2] / 2
            low = file.attrs["start"][:2] - centre
            ends.append((low, low + file["image"].shape[:2]))
    if not ends:
        return tuple(slice(0, size) for size in shape[:2])
    corners = np.array(ends)
    lows = np.floor(corners[:, 0].min(0) + np.array(shape[:2]) / 2)
    highs = np.ceil(corners[:, 1].max(0) + np.array(shape[:2]) / 2)
    return tuple(
        slice(int(max(low, 0)), int(min(high, size))) for low, high, size in zip(lows, highs, shape)
    )


class Release(NamedTuple):
    """unit: what is counted. find: source -> cases. file: case -> its file in the result, written
    last. convert: write a case.
    """

    unit: str
    find: Callable[[Path, Report], list[Case]]
    file: Callable[[Case], str]
    convert: Callable[[Case, Path, Report], None]


RELEASES = {
    "acdc": Release("frames", find_acdc, acdc_file, convert_acdc),
    "la": Release("scans", find_la, la_file, convert_la),
}


if __name__ == "__main__":
    try:
        sys.exit(main())
    except DataError as problem:
        sys.exit(f"error: {problem}")
