"""What can be wrong with a data set: findings, gathered so that none hides another, and the errors
made of them.

Training and tools/check_data.py go through the same functions, so they say the same of a file. A
finding of level 'error' keeps a run from starting; a 'warning' is printed and the run goes on.
"""

import contextlib
import dataclasses
import functools
import hashlib
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ERROR, WARNING = "error", "warning"
SHOWN = 20  # faults of a list that an error message spells out

FAULTS = {
    "list": "the data list or a split list is missing or malformed",
    "empty list": "the training or the validation list names no case",
    "listed twice": "a name, or one name for two files, occurs more than once in a list",
    "unknown case": "a list names a case that the data do not have",
    "outside": "a path leads out of the data root, or a name is no plain file name",
    "two lists": "one case, by name or by file, is in two of the lists",
    "same patient": "scans of one patient are in two of the lists",
    "duplicate": "one image under two names",
    "missing file": "a listed file does not exist",
    "unreadable": "a file is truncated, damaged or of another kind",
    "no label": "a case has no label or mask",
    "stray file": "a label or mask belongs to no image",
    "keys": "an HDF5 file lacks the array 'image'",
    "type": "values are stored in a type that cannot hold what is expected",
    "shape": "sizes of image and label, or of channels, differ, or the number of axes is wrong",
    "channels": "the number or the order of channels is wrong",
    "affine": "the grid in space is impossible, or differs between image and label",
    "spacing": "voxel sizes are implausible, or differ between image and label",
    "orientation": "axes of image and label point elsewhere, or a case is stored unlike the others",
    "header": "the header places the scan nowhere, or in two places, or its file has an odd end",
    "too large": "its header asks for more memory than there is, or it unpacks without an end",
    "not finite": "NaN or infinite intensities",
    "constant": "every voxel has one value",
    "range": "intensities lie outside of what the format has, or are not in Hounsfield units",
    "no foreground": "nothing is left of the scan after cropping to the body or brain",
    "label ids": "a label holds ids of no class, or of another release of the data",
    "lost labels": "cropping or resampling takes labelled voxels away",
    "mask values": "a mask holds values between background and foreground",
    "empty label": "a label without foreground",
    "absent class": "no case of the training list has a class",
    "small": "a scan is smaller than the patch",
}


@dataclass(frozen=True)
class Finding:
    """One fault of one file. split and case: where it was met, as far as that is known."""

    fault: str  # a key of FAULTS
    file: str
    found: str
    expected: str = ""
    fix: str = ""
    level: str = ERROR
    split: str = ""
    case: str = ""

    def __post_init__(self) -> None:
        if self.fault not in FAULTS or self.level not in (ERROR, WARNING):
            raise ValueError(f"no such fault or level: '{self.fault}', '{self.level}'")

    def __str__(self) -> str:
        parts = (
            f"{self.file}: {self.found}",
            self.expected and f"expected {self.expected}",
            self.fix,
        )
        return "; ".join(part for part in parts if part)


class DataError(ValueError):
    """Data that cannot be used; the message names the file, what was found, what was expected and
    the fix.

    findings: what the message is made of, with warnings that were met on the way; () for wrong
    arguments.
    """

    def __init__(self, message: "str | Finding", findings: Sequence[Finding] = ()) -> None:
        super().__init__(str(message))
        self.findings = tuple(findings) or ((message,) if isinstance(message, Finding) else ())


class Report:
    """Findings in the order in which they were met. totals: how many cases or files there are of
    each title. contents: list -> case -> digest of its image and label.
    """

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self._known: set[Finding] = set()
        self.totals: dict[str, int] = {}
        self.contents: dict[str, dict[str, str]] = {}
        self.titles: dict[str, str] = {}  # split -> title
        self.unknown: dict[
            str, list[float]
        ] = {}  # split -> of each label the share without a class

    def error(
        self, fault: str, file: object, found: str, expected: str = "", fix: str = "", **where: str
    ) -> None:
        self.take([Finding(fault, str(file), found, expected, fix, **where)])

    def warning(
        self, fault: str, file: object, found: str, expected: str = "", fix: str = "", **where: str
    ) -> None:
        self.take([Finding(fault, str(file), found, expected, fix, WARNING, **where)])

    def take(self, findings: Iterable[Finding]) -> None:
        """Add findings; one that is there already, met again on another way, is not repeated."""
        for finding in findings:
            if finding not in self._known:
                self._known.add(finding)
                self.findings.append(finding)

    @contextlib.contextmanager
    def catching(self, split: str = "", case: str = "") -> Iterator[None]:
        """Note what a DataError says and go on; a DataError about arguments, not files, passes
        through.
        """
        try:
            yield
        except DataError as error:
            if not error.findings:
                raise
            self.take(placed(error.findings, split, case))

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == ERROR]

    @property
    def warnings(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == WARNING]

    def spoken_warnings(self, of_training: bool = True) -> list[str]:
        """A line for each kind of warning, with its first file, and with the names of the others
        where these are no cases of a training, which tools/check_data.py could list.
        """
        lines = []
        for first, *others in grouped(self.warnings):
            more = ""
            if others and of_training:
                more = f" (and {len(others)} more like it; tools/check_data.py lists them)"
            elif others:
                names = ", ".join(Path(finding.file).name for finding in others[:SHOWN])
                rest = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
                more = f" (the same of {names}{rest})"
            lines.append(f"warning: {first}{more}")
        return lines

    def count(self, split: str, total: int, title: str) -> None:
        """`split` has `total` cases, which belong to `title` in messages, such as 'train cases'."""
        self.titles[split] = title
        self.totals[title] = self.totals.get(title, 0) + total

    def see_unknown(self, split: str, share: float) -> None:
        """Note which share of a label nobody labelled."""
        self.unknown.setdefault(split, []).append(share)

    def stop(self) -> None:
        """DataError if there is an error; its message has all of them, under the list that they are
        in.
        """
        if not self.errors:
            return
        groups: dict[str, list[Finding]] = {}
        for finding in self.errors:
            groups.setdefault(
                self.titles.get(finding.split, "") if finding.case else "", []
            ).append(finding)
        parts = []
        for title, found in groups.items():
            lines = [str(finding) for finding in found[:SHOWN]]
            if len(found) > SHOWN:
                lines.append(
                    f"... and {len(found) - SHOWN} more; tools/check_data.py lists them all"
                )
            cases = len({(finding.split, finding.case) for finding in found})
            head = (
                f"{cases} of {self.totals[title]} {title} cannot be used:"
                if title
                else "faults in the data:"
            )
            parts.append(
                lines[0]
                if not title and len(groups) == len(lines) == 1
                else "\n  ".join([head, *lines])
            )
        raise DataError("\n".join(parts), self.findings)


@contextlib.contextmanager
def gathering(report: Report | None) -> Iterator[Report]:
    """`report`, or where there is none a new one, whose errors are raised together at the end."""
    own = report if report is not None else Report()
    yield own
    if report is None:
        own.stop()


class CaseNotes(Report):
    """What is noted while one case is read: warnings, digests of its images and labels, the label
    ids that occur.

    grid: shape and affine of the image, known even if its voxels are faulty.
    """

    def __init__(self) -> None:
        super().__init__()
        self.content: list[str] = []
        self.labels: list[str] = []
        self.ids: set[int] = set()
        self.grid: tuple[Sequence[int], np.ndarray | None] = (), None

    def see(self, image: np.ndarray, label: np.ndarray | None) -> None:
        """Note content and ids. image: any array; label: non-negative ids, if there are any."""
        self.content.append(content_digest(image))
        if label is not None:
            self.labels.append(content_digest(label))
            self.ids |= set(np.flatnonzero(np.bincount(label.ravel())).tolist())


def grouped(findings: Iterable[Finding]) -> list[list[Finding]]:
    """Findings with equal fault, level, expectation and fix together: hundreds of scans may share
    one weakness.
    """
    groups: dict[tuple, list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.fault, finding.level, finding.expected, finding.fix), []).append(
            finding
        )
    return list(groups.values())


def placed(findings: Iterable[Finding], split: str, case: str) -> list[Finding]:
    """The findings with split and case filled in where they are not known."""
    return [dataclasses.replace(f, split=f.split or split, case=f.case or case) for f in findings]


def no_file(path: Path) -> Finding:
    return Finding(
        "missing file",
        str(path),
        "no such file",
        "",
        "restore it or take the case out of the lists",
    )


def unreadable(path: Path, error: Exception | str) -> Finding:
    """A file that no reader takes: what it is, where its first bytes tell, else what was raised."""
    if "unable to lock file" in str(error):
        return Finding(
            "unreadable",
            str(path),
            f"another program has it open for writing, or its folder has no locks ({error})",
            "",
            "close it there; on a network folder without locks set HDF5_USE_FILE_LOCKING=FALSE",
        )
    kind = what_it_is(path)
    if kind:
        return Finding("unreadable", str(path), kind[0], "", kind[1])
    cause = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    reason = f"unreadable or truncated ({' '.join(cause.split())[-200:]})"
    return Finding("unreadable", str(path), reason, "", "copy the file again")


# First bytes of files that are often met in the place of a scan or an image: offset, bytes, what
# they are, endings of names that may have them, what to do.
_AGAIN = "download the file again, as the provider says (log in, accept the terms)"
_KINDS = (
    (0, b"version https://git-lfs", "a Git LFS pointer, not the file itself", (), "git lfs pull"),
    (0, b"/annex/objects/", "a git-annex pointer, not the file itself", (), "git annex get"),
    (0, b"../.git/annex/", "a git-annex pointer, not the file itself", (), "git annex get"),
    (0, b"\0\5\x16\7", "macOS metadata (AppleDouble), no data", (), "take it out of the lists"),
    (0, b"<!doctype html", "a web page", (), _AGAIN),
    (0, b"<html", "a web page", (), _AGAIN),
    (0, b"<head", "a web page", (), _AGAIN),
    (0, b"<?xml", "an XML text, perhaps the answer of a server", (), _AGAIN),
    (0, b"pk\3\4", "a zip archive", (".zip",), "unpack it"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", (".7z",), "unpack it"),
    (0, b"rar!\x1a\7", "a rar archive", (".rar",), "unpack it"),
    (257, b"ustar", "a tar archive", (".tar",), "unpack it"),
    (0, b"bzh", "compressed by bzip2", (".bz2",), "unpack it"),
    (0, b"\xfd7zxz", "compressed by xz", (".xz",), "unpack it"),
    (0, b"\x28\xb5\x2f\xfd", "compressed by zstd", (".zst",), "unpack it"),
    (0, b"%pdf", "a PDF document", (".pdf",), "export the image"),
    (0, b"%!ps", "a PostScript text", (".eps", ".ps"), "export the image"),
    (0, b"\xc5\xd0\xd3\xc6", "a PostScript text", (".eps", ".ps"), "export the image"),
    (0, b"\x89hdf", "an HDF5 file", (".h5", ".hdf5"), "name it .h5, or convert it"),
    (0, b"nrrd000", "an NRRD file", (".nrrd", ".nhdr"), "name it .nrrd"),
    (0, b"\x89png", "a PNG image", (".png",), "name it .png"),
    (0, b"\xff\xd8\xff", "a JPEG image", (".jpg", ".jpeg"), "name it .jpg"),
    (
        128,
        b"dicm",
        "a DICOM file",
        (".dcm", ".ima"),
        "name it .dcm, or name the folder of its series",
    ),
)


def what_it_is(path: Path) -> tuple[str, str] | None:
    """What a file is if not what its name says, and what to do; None where its bytes do not tell.

    Files are opened by their content where that is safe, so this is asked of those alone that
    could not be read.
    """
    try:
        with path.open("rb") as file:
            begin = file.read(512)
    except OSError:
        return None
    name, packed = path.name.lower(), begin.startswith(b"\x1f\x8b")
    if packed and not name.endswith(".gz"):
        return (
            "compressed by gzip, although its name does not end in .gz",
            "add .gz to the name, or unpack it (gunzip)",
        )
    if name.endswith(".gz") and begin[344:347] in (b"n+1", b"ni1"):
        return "not compressed, although its name ends in .gz", "take .gz from the name"
    text = begin.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for offset, mark, what, endings, fix in _KINDS:
        found = begin[offset:].lower() if offset else text
        if found.startswith(mark) and not name.endswith(endings):
            return what, fix
    return None


# Memory

MOST = 0.5  # of the memory that one file's voxels may take, as stored and as float32


def check_room(path: Path, shape: Sequence[int], itemsize: int) -> None:
    """DataError where an array of `shape`, which a header tells, does not fit the memory.

    Asked before anything of that size is made. itemsize: bytes of a value as the reader gives it.
    """
    count = math.prod(int(side) for side in shape)
    needed, there = count * (itemsize + 4), memory()
    if needed > MOST * there:
        raise DataError(
            Finding(
                "too large",
                str(path),
                f"its header speaks of {' x '.join(map(str, shape))} values, "
                f"{needed / 1e9:.3g} GB in memory",
                f"at most {MOST * there / 1e9:.3g} GB, half of this machine's memory",
                "repair the header, or resample or crop the scan",
            )
        )


@functools.cache
def memory() -> int:
    """Bytes of memory that this process may take: the machine's, or the limit of its container."""
    total = sys.maxsize  # where the system does not tell (Windows)
    with contextlib.suppress(AttributeError, OSError, ValueError):
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            total = min(total, int(Path("/sys/fs/cgroup", name).read_text()))
    return total


def content_digest(image: np.ndarray) -> str:
    """SHA-256 of shape, type and values: the same for one image in two files, however they are
    compressed.
    """
    result = hashlib.sha256(f"{image.shape} {image.dtype}".encode())
    result.update(np.ascontiguousarray(image).data)
    return result.hexdigest()
