"""Scans of other formats than NIfTI: the same voxels at the same places, and series that are not
whole.
"""

import gzip
import struct

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from dataloaders.cases import Case, read_image, read_label
from dataloaders.dicom import dicom_series
from dataloaders.faults import CaseNotes, Report
from dataloaders.volumes import DataError, channel_number, read_volume, stem
from tests.dataloaders.test_msd import AFFINES

SHAPE = (7, 6, 5)


def write_dicom(folder, voxels, affine, number=1, leave_out=(), intercept=0):
    """A CT series of int16 voxels (H, W, D); file names do not follow the slices. -> series
    identifier

    SimpleITK stores voxels - intercept, so that readers which rescale get the voxels back.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    direction = lps[:3, :3] / spacing
    identifier = f"1.2.826.0.1.3680043.2.1125.{number}"
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for k in range(voxels.shape[2]):
        if k in leave_out:
            continue
        image = sitk.GetImageFromArray(np.ascontiguousarray(voxels[:, :, k].T.astype(np.int16)))
        image.SetSpacing(spacing[:2].tolist())
        place = lps[:3, 3] + direction[:, 2] * spacing[2] * k
        tags = {
            "0008|0060": "CT",
            "0020|000e": identifier,
            "0020|000d": "1.2.826.0.1.3680043.2.1125.99",
            "0020|0052": "1.2.826.0.1.3680043.2.1125.98",
            "0008|0018": f"{identifier}.{k + 1}",
            "0020|0013": str(k + 1),
            "0018|0050": str(spacing[2]),
            "0020|0032": "\\".join(f"{value:.6f}" for value in place),
            "0020|0037": "\\".join(
                f"{value:.9f}" for value in (*direction[:, 0], *direction[:, 1])
            ),
            "0028|1052": str(intercept),
            "0028|1053": "1",
        }
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{number}_{(k * 7) % 101}.dcm"))
        writer.Execute(image)
    return identifier


@pytest.fixture
def voxels():
    return np.random.default_rng(0).integers(-1000, 1000, SHAPE).astype(np.int16)


@pytest.mark.parametrize("suffix", [".nrrd", ".nhdr", ".mha", ".mhd"])
@pytest.mark.parametrize("name", ["SLP", "oblique LPS"])
def test_itk_formats_agree_with_nifti(tmp_path, voxels, name, suffix):
    image = nib.Nifti1Image(voxels, AFFINES[name])
    image.set_qform(AFFINES[name], code=1)
    nib.save(image, tmp_path / "a.nii.gz")
    sitk.WriteImage(sitk.ReadImage(str(tmp_path / "a.nii.gz")), str(tmp_path / f"a{suffix}"))
    found, affine = read_volume(tmp_path / f"a{suffix}")
    assert found.dtype == np.int16
    assert np.array_equal(found, voxels)
    assert np.allclose(affine, AFFINES[name], atol=1e-4)


def test_channels_of_one_file_come_last(tmp_path, voxels):
    channels = np.stack([voxels, voxels + 1], -1)
    image = sitk.GetImageFromArray(np.ascontiguousarray(channels.swapaxes(0, 2)), isVector=True)
    sitk.WriteImage(image, str(tmp_path / "a.mha"))
    found, _ = read_volume(tmp_path / "a.mha")
    assert np.array_equal(found, channels)


@pytest.mark.parametrize("name", ["LPS", "oblique LPS"])
def test_dicom_series(tmp_path, voxels, name):
    write_dicom(tmp_path / "s", voxels, AFFINES[name], intercept=-1024)
    found, affine = read_volume(tmp_path / "s")
    assert np.array_equal(found, voxels)  # in Hounsfield units
    assert np.allclose(affine, AFFINES[name], atol=1e-4)


def test_series_with_a_gap_is_refused(tmp_path, voxels):
    write_dicom(tmp_path / "s", voxels, AFFINES["LPS"], leave_out=(2,))
    with pytest.raises(
        DataError, match=r"slices of this DICOM series are 3\.000 to 6\.000 mm apart"
    ):
        read_volume(tmp_path / "s")


def test_one_of_several_series_is_named_by_a_file(tmp_path, voxels):
    first = write_dicom(tmp_path / "s", voxels, AFFINES["LPS"], number=1)
    write_dicom(tmp_path / "s", voxels + 1, AFFINES["LPS"], number=2)
    assert len(dicom_series(tmp_path / "s")) == 2
    with pytest.raises(DataError, match=r"2 DICOM series .*5 files such as .*name one file"):
        read_volume(tmp_path / "s")
    assert np.array_equal(read_volume(dicom_series(tmp_path / "s")[first][3])[0], voxels)


# DICOM files of any content, to the byte: SimpleITK writes no sequences, and slices as it likes

CT, ENHANCED, DOSE = (f"1.2.840.10008.5.1.4.1.1.{kind}" for kind in ("2", "2.1", "481.2"))


def element(tag, kind, value):
    """One element, explicit little endian. value: text, whole number, bytes, or for a sequence the
    elements of each item.
    """
    if kind == "SQ":
        items = [b"".join(item) for item in value]
        value = b"".join(b"\xfe\xff\x00\xe0" + struct.pack("<I", len(i)) + i for i in items)
    elif isinstance(value, int):
        value = struct.pack("<H", value)
    elif isinstance(value, str):
        value = value.encode()
        value += (b"\0" if kind == "UI" else b" ") * (len(value) % 2)
    wide = kind in ("OW", "SQ")
    size = struct.pack("<HI" if wide else "<H", *((0, len(value)) if wide else (len(value),)))
    return struct.pack("<HH", tag >> 16, tag & 0xFFFF) + kind.encode() + size + value


def number_text(values):
    return "\\".join(f"{value:.9g}" for value in values)


def place_elements(position, orientation, spacing, rescale):
    return {
        0x00200032: element(0x00200032, "DS", number_text(position)),
        0x00200037: element(0x00200037, "DS", number_text(orientation)),
        0x00280030: element(0x00280030, "DS", number_text(spacing)),
        0x00281052: element(0x00281052, "DS", f"{rescale[1]:g}"),
        0x00281053: element(0x00281053, "DS", f"{rescale[0]:g}"),
    }


def write_file(
    path, stored, places, *, sop=CT, series="1.2.3", uid="1", shown="2", signed=1, **top
):
    """Stored values (N, rows, columns) of 16 bits. places: what `place_elements` takes of each
    frame; of several frames, or an enhanced file, as groups of each frame.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = [place_elements(*place) for place in places]
    meta = element(0x00020002, "UI", sop) + element(0x00020003, "UI", f"{series}.{uid}")
    meta += element(0x00020010, "UI", "1.2.840.10008.1.2.1")
    body = {
        0x00080016: element(0x00080016, "UI", sop),
        0x00080018: element(0x00080018, "UI", f"{series}.{uid}"),
        0x0020000E: element(0x0020000E, "UI", series),
        0x00280002: element(0x00280002, "US", 1),
        0x00280004: element(0x00280004, "CS", f"MONOCHROME{shown}"),
        0x00280010: element(0x00280010, "US", stored.shape[1]),
        0x00280011: element(0x00280011, "US", stored.shape[2]),
        0x00280100: element(0x00280100, "US", 16),
        0x00280101: element(0x00280101, "US", 16),
        0x00280102: element(0x00280102, "US", 15),
        0x00280103: element(0x00280103, "US", signed),
        0x7FE00010: element(0x7FE00010, "OW", stored.astype("<i2" if signed else "<u2").tobytes()),
    }
    if sop == ENHANCED or len(frames) > 1:
        body[0x00280008] = element(0x00280008, "IS", str(len(frames)))
    if sop == ENHANCED:
        groups = [
            [
                element(0x00209113, "SQ", [[frame[0x00200032]]]),
                element(0x00209116, "SQ", [[frame[0x00200037]]]),
                element(0x00289110, "SQ", [[frame[0x00280030]]]),
                element(0x00289145, "SQ", [[frame[0x00281052], frame[0x00281053]]]),
            ]
            for frame in frames
        ]
        body[0x52009230] = element(0x52009230, "SQ", groups)
    elif len(frames) == 1:
        body |= frames[0]
    body |= top.get("more", {})
    content = b"".join(body[tag] for tag in sorted(body) if body[tag])
    head = element(0x00020000, "UL", struct.pack("<I", len(meta)))
    path.write_bytes(bytes(128) + b"DICM" + head + meta + content)


UPRIGHT = (1, 0, 0, 0, 1, 0)


def stack(count=6, step=2.0):
    """Places of an even series."""
    return [((-8, 5, step * k), UPRIGHT, (0.8, 0.7), (1, -1024)) for k in range(count)]


def write_stack(folder, places, stored=None, **arguments):
    stored = noise_of(len(places)) if stored is None else stored
    for k, place in enumerate(places):
        write_file(
            folder / f"{(7 * k) % 101:03d}.dcm", stored[k : k + 1], [place], uid=str(k), **arguments
        )
    return stored


def noise_of(count):
    return np.random.default_rng(count).integers(0, 2000, (count, 6, 5))


def rescaled(stored, places):
    """What the voxels must be, (columns, rows, slices), by the definition."""
    return np.stack([s * slope + b for s, (*_, (slope, b)) in zip(stored, places)]).swapaxes(0, 2)


def turn(k, degrees):
    a = np.radians(degrees * k)
    return (np.cos(a), np.sin(a), 0, 0, 0, -1)


def changed(change, count=8):
    """Places of which each is what `change` makes of it; None leaves one out."""
    places = [change(k, *place) for k, place in enumerate(stack(count))]
    return [place for place in places if place is not None]


NO_STACKS = {
    "cine": (changed(lambda k, p, *rest: ((p[0], p[1], 4), *rest)), "at 1 places: a time series"),
    "two phases": (changed(lambda k, p, *rest: ((*p[:2], p[2] // 4), *rest)), "at 4 places"),
    "copied slice": (stack() + stack()[2:3], "7 slices of this DICOM series lie at 6 places"),
    "radial": (
        changed(lambda k, p, o, *rest: ((0, 0, 0), turn(k, 15), *rest)),
        "point in different directions",
    ),
    "slowly turning": (
        changed(lambda k, p, o, *rest: (p, (np.cos(k / 200), np.sin(k / 200), 0, 0, 0, -1), *rest)),
        "point in different directions",
    ),
    "localizer": (
        changed(lambda k, p, o, *rest: (p, UPRIGHT if k < 6 else (0, 1, 0, 0, 0, -1), *rest)),
        "point in different directions",
    ),
    "tilted gantry": (
        changed(lambda k, p, *rest: ((p[0], p[1] + k, p[2]), *rest)),
        "shift sideways by 7 mm: a tilted gantry",
    ),
    "two pixel spacings": (
        changed(lambda k, p, o, s, r: (p, o, s if k < 4 else (0.4, 0.35), r)),
        r"pixels of 0\.4 x 0\.35 to 0\.8 x 0\.7 mm",
    ),
    "missing": (changed(lambda k, *place: None if k == 3 else place), r"2\.000 to 4\.000 mm apart"),
    "last but one missing": (changed(lambda k, *place: None if k == 6 else place), "mm apart"),
    "one of three missing": (changed(lambda k, *place: place if k in (0, 1, 3) else None), "mm"),
    "two distances": (
        changed(lambda k, p, *rest: ((*p[:2], k + max(0, 0.2 * (k - 4))), *rest)),
        "mm apart",
    ),
    # the gaps of neighbours differ by less than a percent
    "drift": (
        changed(lambda k, p, *rest: ((*p[:2], 2 * k * (1 + k / 3000)), *rest), 60),
        "off an even grid",
    ),
    "no axes": (changed(lambda k, p, o, *rest: (p, (0,) * 6, *rest)), "two of length 1"),
    "no slope": (changed(lambda k, p, o, s, r: (p, o, s, (0, 5))), "a slope that is not 0"),
}


@pytest.mark.parametrize("kind", NO_STACKS)
@pytest.mark.parametrize("frames", [False, True], ids=["files", "frames"])
def test_a_series_that_is_no_stack_is_refused(tmp_path, kind, frames):
    places, message = NO_STACKS[kind]
    if frames:
        write_file(tmp_path / "s/a.dcm", noise_of(len(places)), places, sop=ENHANCED)
    else:
        write_stack(tmp_path / "s", places)
    with pytest.raises(DataError, match=message):
        read_volume(tmp_path / "s")


@pytest.mark.parametrize("step, digits", [(0.625, 1), (1.25, 1), (0.6, 2), (3.3333, 2)])
def test_rounded_headers_are_a_stack(tmp_path, step, digits):
    axes = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    normal = np.cross(axes[0], axes[1])
    orientation = (*axes[0].round(4), *axes[1].round(4))
    places = [
        (np.round(normal * step * k, digits), orientation, (0.8, 0.7), (1, 0)) for k in range(40)
    ]
    stored = write_stack(tmp_path / "s", places)
    found, affine = read_volume(tmp_path / "s")
    assert np.array_equal(found, rescaled(stored, places))
    assert np.linalg.norm(affine[:3, 2]) == pytest.approx(step, rel=2e-3)
    assert np.linalg.norm(affine[:3, :2], axis=0) == pytest.approx([0.7, 0.8])


@pytest.mark.parametrize("frames", [False, True], ids=["files", "frames"])
@pytest.mark.parametrize(
    "slopes, intercepts",
    [
        ((1,) * 4, (-1024,) * 4),
        ((1, 0.0005, 0.0004, 0.0003), (0,) * 4),
        ((1, 2, 3, 4), (0, -5, 7, 40000)),
        ((0.5, 2, 3, 4), (0.25, 0, 0, 1)),
    ],
)
def test_each_slice_is_rescaled_as_it_says(tmp_path, frames, slopes, intercepts):
    order = (2, 0, 3, 1)  # of the slices in the file
    places = [
        ((0, 0, 2 * z), UPRIGHT, (1, 1), (slope, intercept))
        for z, slope, intercept in zip(order, slopes, intercepts)
    ]
    stored = np.random.default_rng(0).integers(0, 30000, (4, 6, 5))
    if frames:
        write_file(tmp_path / "s/a.dcm", stored, places, sop=ENHANCED)
    else:
        write_stack(tmp_path / "s", places, stored, signed=0)
    found, affine = read_volume(tmp_path / "s")
    expected = rescaled(stored, places)[:, :, np.argsort(order)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(affine, np.diag([-1, -1, 2, 1]), atol=1e-9)


@pytest.mark.parametrize("signed", [0, 1])
def test_what_is_shown_inverted_is_stored_as_it_is(tmp_path, signed):
    icon = [  # a small picture within the header, with a photometric interpretation of its own
        element(0x00280004, "CS", "MONOCHROME2"),
        element(0x00280010, "US", 2),
        element(0x00280011, "US", 2),
        element(0x7FE00010, "OW", bytes(4)),
    ]
    for more in ({}, {0x00880200: element(0x00880200, "SQ", [icon])}):
        folder = tmp_path / f"s{len(more)}"
        stored = write_stack(folder, stack(4), shown="1", signed=signed, more=more)
        assert np.array_equal(read_volume(folder)[0], rescaled(stored, stack(4)))


def test_types_of_all_slices_are_held(tmp_path):
    stored = np.array([-30000, 30000, 60000, 100]).reshape(4, 1, 1) + np.arange(12).reshape(3, 4)
    for k, place in enumerate(stack(4)):
        place = (*place[:3], (1, 0))
        signed = int(k != 2)
        write_file(tmp_path / f"s/{k}.dcm", stored[k : k + 1], [place], uid=str(k), signed=signed)
    assert np.array_equal(read_volume(tmp_path / "s")[0], stored.swapaxes(0, 2))


def test_what_lies_beside_a_series_does_not_hide_it(tmp_path):
    stored = write_stack(tmp_path / "s", stack())
    write_file(tmp_path / "s/dose.dcm", noise_of(3), stack(3), sop=DOSE, series="1.2.9")
    (tmp_path / "s/._000.dcm").write_bytes(b"\0\5\x16\7" + bytes(100))
    (tmp_path / "s/.DS_Store").write_bytes(bytes(100))
    (tmp_path / "s/notes.txt").write_text("of a nurse")
    (tmp_path / "s/short.dcm").write_bytes((tmp_path / "s/000.dcm").read_bytes()[:170])
    notes = Report()
    for path in (tmp_path / "s", tmp_path / "s/000.dcm"):
        assert np.array_equal(read_volume(path, notes)[0], rescaled(stored, stack()))
    assert {"short.dcm in its folder is a damaged DICOM file"} == {
        warning.found for warning in notes.warnings
    }
    with pytest.raises(DataError, match=r"dose\.dcm: no DICOM image"):
        read_volume(tmp_path / "s/dose.dcm")
    slices = tmp_path / "s/007.dcm"
    slices.write_bytes(slices.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"007\.dcm: unreadable .* end early"):
        read_volume(tmp_path / "s")


def test_images_without_an_identifier_are_one_series(tmp_path):
    """As some programs that anonymise leave them."""
    stored = write_stack(tmp_path / "s", stack(), more={0x0020000E: b""})
    assert np.array_equal(read_volume(tmp_path / "s")[0], rescaled(stored, stack()))


def test_files_that_say_too_little(tmp_path):
    """Several frames without a place of each, a slice without one, a table of values."""
    write_file(tmp_path / "a/a.dcm", noise_of(4), stack(4), sop="1.2.840.10008.5.1.4.1.1.3.1")
    with pytest.raises(DataError, match="4 frames in one file without a place of each"):
        read_volume(tmp_path / "a")
    more = {0x00200032: b""}
    write_file(tmp_path / "b/a.dcm", noise_of(1), stack(1), more=more)
    with pytest.raises(DataError, match="position, orientation or pixel spacing of frame 1"):
        read_volume(tmp_path / "b/a.dcm")
    more = {0x00283000: element(0x00283000, "SQ", [[element(0x00283003, "LO", "x")]])}
    write_file(tmp_path / "c/a.dcm", noise_of(1), stack(1), more=more)
    with pytest.raises(DataError, match="Modality LUT"):
        read_volume(tmp_path / "c/a.dcm")
    write_file(tmp_path / "d/a.dcm", noise_of(1), stack(1))
    write_file(tmp_path / "d/b.dcm", noise_of(1)[:, :4], stack(2)[1:], uid="2")
    with pytest.raises(DataError, match="slices of 4 x 5 x 1, 6 x 5 x 1 values"):
        read_volume(tmp_path / "d")


# NIfTI headers


def nifti(path, voxels, affine=AFFINES["LPS"], **fields):
    """A NIfTI file of which header fields are then set to whatever is wanted."""
    image = nib.Nifti1Image(voxels, affine)
    plain = path.with_name("plain.nii")
    nib.save(image, plain)
    content = bytearray(plain.read_bytes())
    plain.unlink()
    for name, value in fields.items():
        dtype, offset = nib.Nifti1Header.template_dtype.fields[name][:2]
        content[offset : offset + dtype.itemsize] = np.asarray(value, dtype.base).tobytes()
    content = bytes(content)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize(
    "fields, message",
    [
        ({"datatype": 1}, "unreadable"),
        ({"datatype": 999}, "unreadable"),
        ({"vox_offset": 0}, "vox_offset is 0, where the voxels of one file cannot begin"),
        ({"vox_offset": 350}, "vox_offset is 350"),
        ({"vox_offset": 1e30}, "vox_offset is 1e.30"),
        ({"vox_offset": np.nan}, "vox_offset is nan"),
        ({"dim": [3, 30000, 30000, 30000, 1, 1, 1, 1]}, "30000 x 30000 x 30000 values"),
        ({"dim": [3, 80, 70, 60, 1, 1, 1, 1]}, "its header needs 672352 bytes, the file holds"),
        ({"dim": [3, -7, 6, 5, 1, 1, 1, 1]}, "unreadable"),
        ({"dim": [9, 7, 6, 5, 1, 1, 1, 1]}, "unreadable"),
        ({"dim": [3, 7, 0, 5, 1, 1, 1, 1]}, "7 x 0 x 5 values"),
        ({"scl_slope": 2, "scl_inter": np.nan}, "unreadable"),
        ({"sizeof_hdr": 77}, "unreadable"),
        ({"magic": b"xyz"}, "unreadable"),
    ],
)
def test_headers_that_make_no_sense(tmp_path, voxels, fields, message, suffix):
    path = nifti(tmp_path / f"scan{suffix}", voxels, **fields)
    with pytest.raises(DataError, match=rf"scan\{suffix}: .*{message}"):
        read_volume(path)


@pytest.mark.parametrize("code, length", [(0, 1), (1, 1000), (2, 1), (3, 0.001)])
def test_units_are_read(tmp_path, voxels, code, length):
    affine = np.diag([*(AFFINES["LPS"].diagonal()[:3] / length), 1])
    path = nifti(tmp_path / "a.nii.gz", voxels, affine, xyzt_units=code + 8)
    assert np.allclose(read_volume(path)[1], np.diag(AFFINES["LPS"].diagonal()))


def test_axes_of_one_and_vectors(tmp_path, voxels):
    pair = np.stack([voxels, voxels + 1], -1)
    for given, expected in (
        (voxels[..., None, None], voxels),
        (voxels[..., None], voxels),
        (pair, pair),
        (pair[..., None], pair),
        (pair[:, :, :, None], pair),
        (voxels[:, :, :1, None], voxels[:, :, :1]),
    ):
        assert np.array_equal(read_volume(nifti(tmp_path / "a.nii.gz", given))[0], expected)
    image = sitk.Compose([sitk.GetImageFromArray(part.T) for part in (voxels, voxels + 1)])
    sitk.WriteImage(image, str(tmp_path / "b.nii.gz"))
    assert np.array_equal(read_volume(tmp_path / "b.nii.gz")[0], pair)
    film = np.stack([pair, pair], 3)
    with pytest.raises(DataError, match=r"5 axes, shape \(7, 6, 5, 2, 2\); expected 2 channel"):
        read_image(Case("a", (nifti(tmp_path / "a.nii.gz", film),)), 2)


def test_two_forms_that_differ_are_warned_of(tmp_path, voxels):
    image = nib.Nifti1Image(voxels, AFFINES["LPS"])
    for shift, found in ((0.0, []), (40.0, ["header"])):
        moved = AFFINES["LPS"].copy()
        moved[2, 3] += shift
        image.set_sform(moved, 2)
        image.set_qform(AFFINES["LPS"], 1)
        nib.save(image, tmp_path / "a.nii.gz")
        notes = CaseNotes()
        case = Case("a", (tmp_path / "a.nii.gz",), tmp_path / "a.nii.gz")
        _, affine = read_image(case, 1, notes)
        read_label(case, range(-1000, 1000), SHAPE, affine, notes)
        assert [warning.fault for warning in notes.warnings] == found
        assert np.allclose(affine, moved, atol=1e-4)


def test_a_file_is_called_what_it_is(tmp_path, voxels):
    raw = nifti(tmp_path / "sound.nii", voxels).read_bytes()
    for name, content, message in (
        ("a.nii.gz", raw, "not compressed, although its name ends in .gz"),
        ("a.nii", gzip.compress(raw), "compressed by gzip, although its name does not"),
        ("b.nii.gz", b"\n<!DOCTYPE html><html>log in</html>", "a web page; download"),
        (
            "c.nii.gz",
            b"version https://git-lfs.github.com/spec/v1\noid",
            "a Git LFS pointer.*git lfs pull",
        ),
        ("d.nii.gz", b"/annex/objects/SHA256E-s9--0.nii.gz", "a git-annex pointer.*git annex get"),
        ("e.nii.gz", b"\0\5\x16\7" + bytes(99), "macOS metadata"),
        ("f.nii.gz", b"PK\3\4" + bytes(99), "a zip archive; unpack"),
        ("g.nii", bytes(128) + b"DICM" + bytes(9), "a DICOM file"),
        ("h.nrrd", b"<html>", "a web page"),
        ("i.mha", gzip.compress(b"x"), "compressed by gzip"),
        ("j.nii.gz", b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name}: {message}"):
            read_volume(tmp_path / name)


def test_ends_of_compressed_files(tmp_path, voxels):
    voxels = np.tile(voxels, (1, 1, 4))
    path = nifti(tmp_path / "a.nii.gz", voxels)
    sound = path.read_bytes()
    content = gzip.decompress(sound)
    parts = gzip.compress(content[:1500]) + gzip.compress(content[1500:])
    for ending, warned in ((sound, 0), (sound + bytes(50), 0), (sound + b"tail", 1), (parts, 0)):
        path.write_bytes(ending)
        notes = Report()
        assert np.array_equal(read_volume(path, notes)[0], voxels)
        assert len(notes.warnings) == warned
    path.write_bytes(gzip.compress(content + bytes(1 << 27)))  # 130 MB of 130 kB
    with pytest.raises(DataError, match="unpacks to more than") as caught:
        read_volume(path)
    assert caught.value.findings[0].fault == "too large"


def test_headers_of_text_name_no_file_elsewhere(tmp_path, voxels):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("a.mhd", "b.nhdr"):
        sitk.WriteImage(sitk.GetImageFromArray(voxels), str(folder / name))
        text = (folder / name).read_text()
        for raw in folder.glob("*.[rz]aw"):
            (tmp_path / raw.name).write_bytes(raw.read_bytes())
        stored = next(line for line in text.splitlines() if "ata" in line and ".raw" in line)
        value = stored.split(" ")[-1]
        for other in (f"../{value}", str(tmp_path / value)):
            (folder / name).write_text(text.replace(stored, stored.replace(value, other)))
            with pytest.raises(DataError, match=f"{name}: its voxels are in .*{value}"):
                read_volume(folder / name)
        (folder / name).write_text(text.replace(stored, stored.replace(value, "LIST\n../x.raw")))
        with pytest.raises(DataError, match=r"its voxels are in '\.\./x\.raw'"):
            read_volume(folder / name)
    huge = "ObjectType = Image\nNDims = 3\nDimSize = 90000 90000 90000\n"
    (folder / "c.mha").write_text(huge + "ElementType = MET_SHORT\nElementDataFile = LOCAL\n")
    with pytest.raises(DataError, match=r"c\.mha: its header speaks of 90000 x 90000"):
        read_volume(folder / "c.mha")


def test_bad_files(tmp_path, voxels):
    for name, content in (("a.mha", b"no image"), ("b.nrrd", b""), ("c.dcm", b"x")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=name):
            read_volume(tmp_path / name)
    sitk.WriteImage(sitk.GetImageFromArray(voxels[0]), str(tmp_path / "flat.mha"))
    with pytest.raises(DataError, match="an image of 2 axes; expected a 3D scan"):
        read_volume(tmp_path / "flat.mha")
    with pytest.raises(DataError, match="no such file"):
        read_volume(tmp_path / "absent.nrrd")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="0 DICOM series"):
        read_volume(tmp_path / "empty")


def test_names():
    assert [stem(f"d/a.b{s}") for s in (".nii.gz", ".nii", ".NRRD", ".mha", ".png")] == ["a.b"] * 5
    assert channel_number("case_1_0002") == ("case_1", 2)
    assert channel_number("case_02") is None
