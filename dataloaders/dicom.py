"""DICOM series, of files with one slice each or with many frames: found in a folder, checked slice
by slice, stacked.

SimpleITK decodes the pixels. It shows no sequences, where files with many frames keep the place and
the rescaling of each, and it takes orientation, pixel spacing and data type of a series from its
first file. So the headers are read here, and a series is refused unless the place, orientation,
pixel spacing and rescaling of every slice agree with the volume that is made of them.
"""

import locale
import mmap
import shutil
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataloaders.faults import DataError, Finding, Report, check_room, unreadable

# How far the slices of one series may differ, since headers are rounded
TURN = 2e-3  # between the direction cosines of two slices
SIZE = 1e-3  # between the pixel spacings of two slices, as a share
ROUNDED = 0.06  # mm between a slice and its place on the even grid, and beside it
UNEVEN = 0.01  # the same, as a share of the distance between slices
HALF = 0.5  # of a pixel, sideways: what lies further aside is a tilted gantry

_SOP, _SYNTAX, _SERIES = 0x00080016, 0x00020010, 0x0020000E
_POSITION, _ORIENTATION, _SPACING = 0x00200032, 0x00200037, 0x00280030
_THICKNESS, _BETWEEN = 0x00180050, 0x00180088
_SAMPLES, _PHOTOMETRIC, _FRAMES = 0x00280002, 0x00280004, 0x00280008
_ROWS, _COLUMNS, _BITS = 0x00280010, 0x00280011, 0x00280100
_INTERCEPT, _SLOPE, _LOOKUP = 0x00281052, 0x00281053, 0x00283000
_SHARED, _PER_FRAME, _PIXELS = 0x52009229, 0x52009230, 0x7FE00010
# sequence of a frame that holds an element -> element
_GROUP_OF = {
    _POSITION: 0x00209113,
    _ORIENTATION: 0x00209116,
    _SPACING: 0x00289110,
    _THICKNESS: 0x00289110,
    _BETWEEN: 0x00289110,
    _INTERCEPT: 0x00289145,
    _SLOPE: 0x00289145,
}
_SEQUENCES = {_SHARED, _PER_FRAME, _LOOKUP, *_GROUP_OF.values()}
_NUMBERS = {_SAMPLES, _ROWS, _COLUMNS, _BITS}
_TEXTS = {_SYNTAX, _SOP, _SERIES, _PHOTOMETRIC, _FRAMES, *_GROUP_OF}
_LONG = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"}
_ITEM, _ITEM_END, _SEQUENCE_END, _OPEN = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD, 0xFFFFFFFF
# Objects that lie beside scans and have rows and columns, or refer to those of scans: dose, plans,
# segmentations, presentation states, reports
_NO_SCANS = tuple(
    f"1.2.840.10008.5.1.4.1.1.{kind}." for kind in ("481", "66", "11", "88", "9", "104")
)


@dataclass(frozen=True)
class _Slice:
    """One frame of one file. position (3,), rows and columns (3,): where its first pixel lies and
    its axes point (LPS, mm); spacing: mm between rows, between columns.
    """

    path: Path
    index: int
    position: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    spacing: np.ndarray
    rescale: tuple[float, float]  # slope, intercept


def dicom_series(folder: Path) -> dict[str, list[Path]]:
    """Series identifier -> its files from the first slice to the last, of the DICOM images right in
    `folder`.

    Other DICOM objects (dose, plans, reports), hidden files and files of other kinds are left out.
    """
    return {key: [path for path, _ in files] for key, files in _series(folder).items()}


def read_series(path: Path, notes: Report | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (H, W, D), or (H, W, D, C), and affine to RAS+ of a DICOM series: that of a folder, or
    the one that the file `path` belongs to.

    Values are slope * stored + intercept of each slice, such as Hounsfield units. DataError where
    its slices are not one even stack. Warnings go to `notes`.
    """
    _, files, slices, affine = _series_of(path, notes)
    first = files[0][1]
    shape = (first[_COLUMNS], first[_ROWS], len(slices), first.get(_SAMPLES, 1))
    check_room(path, shape, 8)
    return _voxels(slices, dict(files)), affine


def series_frames(path: Path) -> tuple[str, list[tuple[Path, int]]]:
    """SeriesInstanceUID of the series that `read_series` reads at `path`, and of each slice along
    the third axis of its voxels the file and the number of its frame there.
    """
    identifier, _, slices, _ = _series_of(path, None)
    return identifier, [(part.path, part.index) for part in slices]


def _series_of(
    path: Path, notes: Report | None
) -> tuple[str, list[tuple[Path, dict]], list[_Slice], np.ndarray]:
    """Identifier of the series at `path`, its files with their headers, its slices in the order of
    the third axis, the affine of its grid.
    """
    folder = path if path.is_dir() else path.parent
    damaged: list[Path] = []
    found = _series(folder, damaged)
    if not path.is_dir():
        found = {
            key: files
            for key, files in found.items()
            if path.name in {file.name for file, _ in files}
        }
        if not found:
            what = "no DICOM image, but another object (dose, plan, report, ...), or damaged"
            raise DataError(_refused(path, what, "a slice of a scan", "name another file"))
    if len(found) != 1:
        names = "; ".join(
            f"{len(files)} files such as {files[0][0].name}" for files in found.values()
        )
        raise DataError(
            Finding(
                "unreadable",
                str(path),
                f"{len(found)} DICOM series in this folder{f' ({names})' if names else ''}",
                "one",
                "name one file of the wanted series instead of the folder"
                if names
                else "check the folder",
            )
        )
    ((identifier, files),) = found.items()
    if notes is not None:
        for file in damaged:
            notes.warning(
                "unreadable",
                path,
                f"{file.name} in its folder is a damaged DICOM file",
                "",
                "make sure that it is no slice of this scan",
            )
    _check_alike(path, files)
    slices = [part for file, header in files for part in _slices(file, header)]
    slices, affine = _stack(path, slices)
    return identifier, files, slices, affine


class contained:
    """SimpleITK writes to standard error by itself; what matters is checked here and raised. Some
    of its readers and writers reset the locale of the process, after which open() takes text for
    ASCII.
    """

    def __init__(self, sitk) -> None:
        self.object = sitk.ProcessObject

    def __enter__(self) -> None:
        self.locale = locale.setlocale(locale.LC_ALL)
        self.before = self.object.GetGlobalWarningDisplay()
        self.object.SetGlobalWarningDisplay(False)

    def __exit__(self, *error: object) -> None:
        self.object.SetGlobalWarningDisplay(self.before)
        locale.setlocale(locale.LC_ALL, self.locale)


# Series


def _series(folder: Path, damaged: list[Path] | None = None) -> dict[str, list[tuple[Path, dict]]]:
    """Series -> its files and their headers, in the order of the slices. damaged: takes DICOM files
    whose header has no end and tells no series.
    """
    found: dict[str, list[tuple[Path, dict]]] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.is_file():
            continue
        header = read_header(path)
        if header is None:
            continue
        scan = _ROWS in header and not header.get(_SOP, "").startswith(_NO_SCANS)
        if "damaged" not in header:
            header.setdefault(_SERIES, "")  # images without an identifier are one series
        if _SERIES in header and (scan or "damaged" in header):
            found.setdefault(header[_SERIES], []).append((path, header))
        elif "damaged" in header and damaged is not None:
            damaged.append(path)
    # a damaged file of a series makes it unreadable; alone it is none
    found = {
        key: files for key, files in found.items() if any(_ROWS in header for _, header in files)
    }
    return {key: sorted(found[key], key=_place) for key in sorted(found)}


def _place(file: tuple[Path, dict]) -> tuple[float, str]:
    """Where a file of one slice lies along its normal, then its name."""
    path, header = file
    try:
        axes = _numbers(header[_ORIENTATION], 6)
        normal = np.cross(axes[:3], axes[3:])
        return float(_numbers(header[_POSITION], 3) @ normal), path.name
    except (KeyError, ValueError):
        return 0.0, path.name


def _slices(path: Path, header: dict) -> Iterator[_Slice]:
    """The frames of a file, each with what its own header says of it."""
    if header.get(_LOOKUP):
        raise DataError(
            _refused(path, "its values have to be looked up in a table (Modality LUT)", "a slope")
        )
    count = int(header.get(_FRAMES) or 1)
    frames = header.get(_PER_FRAME, [])
    if count > 1 and len(frames) != count:
        raise DataError(
            _refused(
                path,
                f"{count} frames in one file without a place of each: a time series, or views of "
                "a projection?",
                "the position of each frame",
            )
        )
    shared = (header.get(_SHARED) or [{}])[0]
    for index in range(count):
        own = frames[index] if frames else {}

        def told(tag: int, own: dict = own) -> str:
            for groups in (own, shared):
                for item in groups.get(_GROUP_OF[tag], ()):
                    if item.get(tag):
                        return item[tag]
            return header.get(tag, "")

        try:
            position = _numbers(told(_POSITION), 3)
            axes = _numbers(told(_ORIENTATION), 6)
            spacing = _numbers(told(_SPACING), 2)
            rescale = float(told(_SLOPE) or 1), float(told(_INTERCEPT) or 0)
        except ValueError as error:
            raise DataError(
                _refused(
                    path,
                    f"position, orientation or pixel spacing of frame {index + 1} are missing or "
                    "no numbers",
                    "all three, of each slice",
                )
            ) from error
        lengths = np.linalg.norm(axes.reshape(2, 3), axis=1)
        if np.abs(lengths - 1).max() > 0.02 or abs(axes[:3] @ axes[3:]) > 0.02:
            raise DataError(
                _refused(path, f"axes {axes.tolist()}", "two of length 1, at a right angle")
            )
        if spacing.min() <= 0 or rescale[0] == 0:
            raise DataError(
                _refused(
                    path,
                    f"pixel spacing {spacing.tolist()}, slope {rescale[0]:g}",
                    "positive sizes, a slope that is not 0",
                )
            )
        axes = axes.reshape(2, 3) / lengths[:, None]
        yield _Slice(path, index, position, axes[0], axes[1], spacing, rescale)


def _numbers(text: str, count: int) -> np.ndarray:
    values = np.array([float(value) for value in text.split("\\")])
    if len(values) != count or not np.isfinite(values).all():
        raise ValueError(f"{count} numbers expected")
    return values


def _refused(path: Path, found: str, expected: str, fix: str = "") -> Finding:
    advice = "convert the series with a tool that resamples, or export it again"
    return Finding("unreadable", str(path), found, expected, fix or advice)


def _check_alike(path: Path, files: list[tuple[Path, dict]]) -> None:
    """DataError where a file of a series is damaged, or their sizes or colours differ."""
    for file, header in files:
        if "damaged" in header or not header.get(_ROWS) or not header.get(_COLUMNS):
            raise DataError(unreadable(file, "its header or its pixels end early"))
    sizes = {(h[_ROWS], h[_COLUMNS], h.get(_SAMPLES, 1)) for _, h in files}
    if len(sizes) > 1:
        shown = ", ".join(f"{rows} x {columns} x {n}" for rows, columns, n in sorted(sizes))
        raise DataError(_refused(path, f"slices of {shown} values in one DICOM series", "one size"))


def _stack(path: Path, slices: list[_Slice]) -> tuple[list[_Slice], np.ndarray]:
    """The slices in order, and the affine (to RAS+) of the grid on which all of them lie."""
    first = slices[0]
    title = f"the {len(slices)} slices of this DICOM series"
    turned = max(
        max(np.abs(s.rows - first.rows).max(), np.abs(s.columns - first.columns).max())
        for s in slices
    )
    if turned > TURN:
        raise DataError(
            _refused(
                path,
                f"{title} point in different directions (cosines differ by {turned:.3g}): turned "
                "about an axis, or a localizer?",
                "one orientation",
            )
        )
    differs = max(np.abs(s.spacing / first.spacing - 1).max() for s in slices)
    if differs > SIZE:
        low = np.min([s.spacing for s in slices], axis=0)
        high = np.max([s.spacing for s in slices], axis=0)
        raise DataError(
            _refused(
                path,
                f"{title} have pixels of {low[0]:g} x {low[1]:g} to {high[0]:g} x {high[1]:g} mm",
                "one pixel spacing",
            )
        )
    normal = np.cross(first.rows, first.columns)
    normal /= np.linalg.norm(normal)
    slices = sorted(slices, key=lambda s: float(s.position @ normal))
    step = _even_step(path, title, np.array([s.position @ normal for s in slices]), slices)
    aside = np.array([s.position - (s.position @ normal) * normal for s in slices])
    shift = float(np.linalg.norm(aside - aside[0], axis=1).max())
    if shift > max(HALF * first.spacing.min(), ROUNDED):
        raise DataError(
            _refused(
                path,
                f"{title} shift sideways by {shift:.3g} mm: a tilted gantry?",
                "slices right above each other",
                "correct the tilt with a tool that resamples (such as dcm2niix)",
            )
        )
    affine = np.eye(4)
    affine[:3, 0] = first.rows * first.spacing[1]
    affine[:3, 1] = first.columns * first.spacing[0]
    affine[:3, 2] = normal * step
    affine[:3, 3] = slices[0].position
    return slices, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def _even_step(path: Path, title: str, places: np.ndarray, slices: list[_Slice]) -> float:
    """mm from slice to slice, of sorted `places` (mm along the normal); DataError where they are
    not even.

    Each place is compared with the even grid that fits all of them best: gaps between neighbours
    differ where places are rounded, and hide a drift where they hardly differ.
    """
    if len(places) == 1:
        return _thickness(slices[0])
    numbers = np.arange(len(places))
    gaps = np.diff(places)
    same = gaps < max(1e-3, 0.05 * float(np.median(gaps)))
    if same.any():
        raise DataError(
            _refused(
                path,
                f"{title} lie at {len(places) - int(same.sum())} places: a time series, several "
                "phases or echoes, or copies of a slice?",
                "one slice at each place",
                "give each volume a folder of its own",
            )
        )
    step, begin = np.polyfit(numbers, places, 1)
    away = float(np.abs(places - (begin + step * numbers)).max())
    if away > min(ROUNDED + UNEVEN * step, 0.2 * step):
        raise DataError(
            _refused(
                path,
                f"{title} are {gaps.min():.3f} to {gaps.max():.3f} mm apart, up to {away:.2g} mm "
                "off an even grid",
                "one distance",
                "a slice is missing or doubled, copy the series again or convert it with a tool "
                "that resamples",
            )
        )
    return float(step)


def _thickness(single: _Slice) -> float:
    """mm of a volume of one slice: what its header says, else 1."""
    header = read_header(single.path) or {}
    shared = (header.get(_SHARED) or [{}])[0]
    own = (header.get(_PER_FRAME) or [{}])[0]
    for tag in (_BETWEEN, _THICKNESS):
        for item in (*own.get(_GROUP_OF[tag], ()), *shared.get(_GROUP_OF[tag], ()), header):
            try:
                if float(item.get(tag, "")) > 0:
                    return float(item[tag])
            except ValueError:
                continue
    return 1.0


# Pixels


def _voxels(slices: list[_Slice], headers: dict[Path, dict]) -> np.ndarray:
    """(H, W, D[, C]), each slice rescaled as it says, in a type that holds the values of all."""
    planes = []
    frames, of = np.empty(0), None  # the file that was decoded last, and all of its frames
    for part in slices:
        header = headers[part.path]
        if of != part.path:
            frames, of = _decoded(part.path, header), part.path
        plane, used = frames[part.index], _applied(header)
        if part.rescale != used:
            # SimpleITK rescales all frames of a file alike
            stored = np.rint((plane.astype(np.float64) - used[1]) / used[0])
            plane = stored * part.rescale[0] + part.rescale[1]
        planes.append(plane)
    kind = np.result_type(*{plane.dtype for plane in planes})
    voxels = np.stack([plane.astype(kind, copy=False) for plane in planes])
    return np.swapaxes(voxels, 0, 2)  # (D, W, H[, C]) -> (H, W, D[, C])


def _applied(header: dict) -> tuple[float, float]:
    """Slope and intercept by which SimpleITK rescales every frame of a file: the shared ones, else
    those of the first frame.
    """
    groups = (header.get(_SHARED), header.get(_PER_FRAME))
    for items in groups:
        for item in (items or [{}])[0].get(_GROUP_OF[_SLOPE], ()):
            return float(item.get(_SLOPE) or 1), float(item.get(_INTERCEPT) or 0)
    return float(header.get(_SLOPE) or 1), float(header.get(_INTERCEPT) or 0)


def _decoded(path: Path, header: dict) -> np.ndarray:
    """Frames (N, W, H[, C]) of a file as SimpleITK gives them."""
    if header.get(_PHOTOMETRIC) != "MONOCHROME1":
        return _decode(path)
    # It concerns how values are displayed, but SimpleITK would invert them; both names have the
    # same length.
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy.dcm"
        shutil.copyfile(path, copy)
        with copy.open("r+b") as file:
            file.seek(header["photometric at"])
            file.write(b"MONOCHROME2")
        return _decode(copy)


def _decode(path: Path) -> np.ndarray:
    import SimpleITK as sitk

    with contained(sitk):
        image = sitk.ReadImage(str(path))
    array = sitk.GetArrayFromImage(image)
    return array[None] if image.GetDimension() == 2 else array


# Headers


def read_header(path: Path) -> dict | None:
    """The elements of a DICOM file that are of use here, by tag: text, whole number, or for a
    sequence its items, each a dict of the same kind. None for a file that is no DICOM.

    "photometric at": byte at which that element's value begins. "damaged": there, and True, where
    the file ends before the header or the pixels do.
    """
    with path.open("rb") as file:
        begin = file.read(132)
        if begin[128:] == b"DICM":
            start = 132
        elif len(begin) > 8 and begin[:2] == b"\x08\x00" and begin[2:4] < b"\x20\x00":
            start = 0  # files of before 1993 have no preamble
        else:
            return None
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Header(data).read(start)


class _Header:
    """One pass over the elements of a file. data: its bytes."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.order, self.explicit = "<", True
        self.photometric = 0

    def read(self, start: int) -> dict:
        found: dict = {}
        try:
            if start == 0:
                self.explicit = self.data[4:6].isalpha() and self.data[4:6].isupper()
            else:
                start = self._elements(start, len(self.data), found, meta=True)
                self._take_syntax(found.get(_SYNTAX, ""))
                # some files are written without kinds, whatever their syntax says
                kind = self.data[start + 4 : start + 6]
                self.explicit = self.explicit and kind.isalpha() and kind.isupper()
            self._elements(start, len(self.data), found)
        except (struct.error, IndexError, ValueError, RecursionError):
            found["damaged"] = True
        if _PHOTOMETRIC in found:
            found["photometric at"] = self.photometric
        return found

    def _take_syntax(self, syntax: str) -> None:
        if syntax == "1.2.840.10008.1.2.1.99":
            raise ValueError("deflated")
        self.explicit = syntax != "1.2.840.10008.1.2"
        self.order = ">" if syntax == "1.2.840.10008.1.2.2" else "<"

    def _unpack(self, form: str, at: int) -> tuple:
        size = struct.calcsize(form)
        return struct.unpack(self.order + form, self.data[at : at + size])

    def _elements(
        self, at: int, end: int, found: dict, meta: bool = False, inner: bool = False
    ) -> int:
        """Note the elements from byte `at` in `found` -> the byte after the last. meta: those of
        the file's own group alone. inner: of an item, where pixels are those of an icon.
        """
        while at < end:
            group, element = self._unpack("HH", at)
            tag = group << 16 | element
            if meta and group != 2:
                return at
            if tag in (_ITEM_END, _SEQUENCE_END):
                return at + 8
            kind, length, at = self._length(at + 4)
            if tag == _PIXELS and not inner:
                if length != _OPEN and at + length > len(self.data):
                    raise ValueError("pixels end early")
                return len(self.data)
            if tag == _PIXELS and length == _OPEN:  # compressed, in pieces
                at = self._after_pieces(at)
                continue
            if kind == b"SQ" or length == _OPEN or (not self.explicit and tag in _SEQUENCES):
                items, at = self._items(at, length, kind)
                if tag in _SEQUENCES:
                    found[tag] = items
                continue
            if at + length > len(self.data):
                raise ValueError("an element ends after the file")
            if tag in _NUMBERS:
                found[tag] = self._unpack("H", at)[0]
            elif tag in _TEXTS:
                found[tag] = self.data[at : at + length].decode("ascii", "replace").strip("\0 ")
                if tag == _PHOTOMETRIC and not inner:
                    self.photometric = at
            at += length
        return at

    def _length(self, at: int) -> tuple[bytes, int, int]:
        """Kind of an element (empty: not told), length of its value, the value's first byte."""
        if not self.explicit:
            return b"", self._unpack("I", at)[0], at + 4
        kind = self.data[at : at + 2]
        if kind in _LONG:
            return kind, self._unpack("I", at + 4)[0], at + 8
        return kind, self._unpack("H", at + 2)[0], at + 4

    def _after_pieces(self, at: int) -> int:
        """The byte after compressed pixels that begin at `at`."""
        while True:
            group, element = self._unpack("HH", at)
            size = self._unpack("I", at + 4)[0]
            at += 8
            if group << 16 | element == _SEQUENCE_END:
                return at
            at += size

    def _items(self, at: int, length: int, kind: bytes) -> tuple[list[dict], int]:
        """Items of a sequence whose value begins at `at` -> these, and the byte after it."""
        end = len(self.data) if length == _OPEN else at + length
        if end > len(self.data):
            raise ValueError("a sequence ends after the file")
        before = self.explicit
        if kind == b"UN":  # what an unknown element holds is written without kinds
            self.explicit = False
        items: list[dict] = []
        while at < end:
            group, element = self._unpack("HH", at)
            size = self._unpack("I", at + 4)[0]
            at += 8
            tag = group << 16 | element
            if tag == _SEQUENCE_END:
                break
            if tag != _ITEM:
                raise ValueError("no item where one was expected")
            item: dict = {}
            stop = len(self.data) if size == _OPEN else at + size
            at = self._elements(at, min(stop, end), item, inner=True)
            items.append(item)
        self.explicit = before
        return items, at
