"""Scans of other formats than NIfTI: the same voxels at the same places, and series that are not
whole.
"""

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from dataloaders.volumes import DataError, channel_number, dicom_series, read_volume, stem
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
