"""Files of predictions: geometry, completeness, and the table that grows."""

import itertools

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from dataloaders.volumes import read_volume
from tests.dataloaders.test_msd import AFFINES
from utils.config import ConfigError
from utils.predictions import (
    SizeTable,
    beside,
    failure,
    millilitres,
    save_result,
    save_volume,
    save_whole,
    settings_of,
    structure_sizes,
)


@pytest.mark.parametrize("name", AFFINES)
def test_volumes_keep_their_affine(tmp_path, name):
    ids = np.random.default_rng(0).integers(0, 5, (4, 5, 6))
    save_volume(tmp_path / "a.nii.gz", ids, AFFINES[name])
    image = nib.load(tmp_path / "a.nii.gz")
    assert np.array_equal(np.asarray(image.dataobj), ids)
    for affine, code in (image.get_sform(coded=True), image.get_qform(coded=True)):
        assert code == 1
        assert np.allclose(affine, AFFINES[name], atol=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["a.nii.gz"]


@pytest.mark.parametrize("sform, qform", itertools.product((0, 1, 2, 4), repeat=2))
@pytest.mark.parametrize("unit", ["mm", "micron"])
def test_label_maps_lie_on_the_scan_by_both_of_its_forms(tmp_path, sform, qform, unit):
    size = 1000 if unit == "micron" else 1
    scanner = np.diag([1.5 * size, 1.5 * size, 3 * size, 1])
    atlas = scanner.copy()
    atlas[2, 3] = 40 * size
    scan = nib.Nifti1Image(np.zeros((3, 4, 5), np.int16), None)
    scan.header.set_zooms(scanner.diagonal()[:3])
    scan.set_sform(atlas, sform)
    scan.set_qform(scanner, qform)
    scan.header.set_xyzt_units(unit)
    nib.save(scan, tmp_path / "scan.nii.gz")
    voxels, affine = read_volume(tmp_path / "scan.nii.gz")
    save_volume(tmp_path / "ids.nii.gz", voxels + 7, affine)
    ids = nib.load(tmp_path / "ids.nii.gz")
    assert (int(ids.header["sform_code"]), int(ids.header["qform_code"])) == (sform, qform)
    assert np.array_equal(np.asarray(ids.dataobj), np.full((3, 4, 5), 7, np.uint8))
    assert ids.get_data_dtype() == np.uint8
    expected = nib.load(tmp_path / "scan.nii.gz").affine
    assert np.allclose(ids.affine[:3] * size, expected[:3])
    origins = [
        sitk.ReadImage(str(tmp_path / f"{name}.nii.gz")).GetOrigin() for name in ("scan", "ids")
    ]
    assert np.allclose(*origins)  # in mm, of either unit


def test_a_sheared_affine_has_no_quaternion(tmp_path):
    affine = np.eye(4)
    affine[0, 1] = 0.5  # as of a tilted gantry
    save_volume(tmp_path / "a.nii.gz", np.zeros((3, 3, 3)), affine)
    image = nib.load(tmp_path / "a.nii.gz")
    assert np.allclose(image.affine, affine)
    assert image.get_qform(coded=True)[1] == 0


def test_sizes():
    ids = np.array([[0, 1, 1], [2, 3, 3]])
    affine = np.diag([-2.0, 3.0, 5.0, 1.0])
    assert millilitres(affine) == pytest.approx(0.03)
    sizes = structure_sizes(ids, {"a": (1,), "b": (1, 3), "none": (7,)}, 0.5)
    assert sizes == {"a": (2, 1.0), "b": (4, 2.0), "none": (0, 0.0)}


def test_the_table_keeps_what_it_has(tmp_path):
    path = tmp_path / "sizes.csv"
    table = SizeTable(path, "voxels", "volume_ml")
    table["b"] = {"liver, left": (3, 0.25)}
    table.write()
    table = SizeTable(path, "voxels", "volume_ml")
    table["a"] = {"liver, left": (1, 0.5)}
    table.write()
    assert path.read_text().splitlines() == [
        "case,structure,voxels,volume_ml",
        'a,"liver, left",1,0.5',
        'b,"liver, left",3,0.25',
    ]
    with pytest.raises(ConfigError, match="no table of case, structure, pixels, percent"):
        SizeTable(path, "pixels", "percent")


def test_settings_and_failures(tmp_path):
    assert beside(tmp_path / "a.b.nii.gz").name == "a.b.json"
    assert beside(tmp_path / "a.png").name == "a.json"
    for content in ("", "[]", "{}"):
        (tmp_path / "a.json").write_text(content)
        assert settings_of(tmp_path / "a.nii.gz") is None
    assert "try --window-batch 1" in failure(tmp_path, MemoryError("no"))
    assert failure(tmp_path, KeyError("k")) == f"{tmp_path}: KeyError: 'k'"


def test_a_damaged_table_is_made_again_line_by_line(tmp_path, capsys):
    """Cut within a case, so that one structure of it is gone and another has lost a digit."""
    path = tmp_path / "volumes.csv"
    table = SizeTable(path, "voxels", "volume_ml")
    table |= {
        "a": {"ball": (3, 0.25), "=box": (1, 0.5)},
        "b": {"ball": (7, 1.5), "=box": (2, 1.25)},
    }
    table.write()
    whole = path.read_text()
    path.write_text(whole[: whole.index("b,") + 9])
    again = SizeTable(path, "voxels", "volume_ml")
    assert again == {"a": table["a"]} and again.has("a", ["ball", "=box"])
    path.write_text(whole.replace("b,ball,7,1.5", "b,ball"))
    again = SizeTable(path, "voxels", "volume_ml")
    assert not again.has("b", ["ball", "=box"]) and again["b"] == {"=box": (2, 1.25)}
    assert "1 line(s) cannot be read and are left out" in capsys.readouterr().err
    path.write_text("")
    assert SizeTable(path, "voxels", "volume_ml") == {}


def test_a_result_that_fails_leaves_nothing_that_speaks_of_it(tmp_path):
    def fail(path):
        path.with_name("part").write_text("begun")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        save_result(tmp_path / "a.nii.gz", {"settings": {}}, lambda path: save_whole(path, fail))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("a")]
