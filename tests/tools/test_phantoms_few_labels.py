"""Generated hearts, atria, lesions and polyps: anatomy, intensities, determinism; the files of the
demo data sets.
"""

import numpy as np
import pytest
from scipy import ndimage

from dataloaders.acdc import ACDCDataset
from dataloaders.images2d import Images2DDataset
from dataloaders.la import LADataset
from dataloaders.lists import draw
from tools.make_demo_data import main
from tools.phantoms.few_labels import acdc_phantom, isic_phantom, kvasir_phantom, la_phantom

RV, MYO, LV = 1, 2, 3
PHOTOGRAPHS = [(isic_phantom, (80, 104)), (kvasir_phantom, (80, 96))]


@pytest.fixture(scope="module")
def hearts():
    return [acdc_phantom([0, case], (8, 96, 80)) for case in range(4)]


@pytest.fixture(scope="module")
def atria():
    return [la_phantom([0, case], (60, 50, 36)) for case in range(3)]


def test_same_seed_same_image_and_cases_differ(hearts, atria):
    again = acdc_phantom([0, 1], (8, 96, 80))
    for frame, (image, label) in again.items():
        assert np.array_equal(image, hearts[1][frame][0]) and np.array_equal(
            label, hearts[1][frame][1]
        )
        assert not np.array_equal(label, hearts[2][frame][1])
    assert np.array_equal(la_phantom([0, 1], (60, 50, 36))[0], atria[1][0])
    assert not np.array_equal(atria[0][1], atria[1][1])
    for phantom, shape in PHOTOGRAPHS:
        assert all(
            np.array_equal(a, b) for a, b in zip(phantom([0, 3], shape), phantom([0, 3], shape))
        )
        assert not np.array_equal(phantom([0, 3], shape)[1], phantom([1, 3], shape)[1])


def test_hearts_have_the_ring_anatomy(hearts):
    for heart in hearts:
        for image, label in heart.values():
            assert image.dtype == np.float32 and label.dtype == np.uint8
            assert image.shape == label.shape == (8, 96, 80)
            assert (image.min(), image.max()) == (0, 1)
            shares = np.bincount(label.ravel(), minlength=4) / label.size
            assert (shares[1:] > 0.002).all() and shares[1:].sum() < 0.15
            for plane in label[2:6]:
                # The cavity lies inside its muscle, apart from the right ventricle, which touches
                # that muscle.
                around_cavity = ndimage.binary_dilation(plane == LV) & (plane != LV)
                assert (plane[around_cavity] == MYO).all()
                assert (ndimage.binary_dilation(plane == RV) & (plane == MYO)).any()
                assert ndimage.label(plane == MYO)[1] == 1
                assert ndimage.label(plane == LV)[1] == 1
            blood, muscle = np.median(image[label == LV]), np.median(image[label == MYO])
            assert blood > 1.5 * muscle
            # Intensity alone does not tell the class: much of the rest is as bright as blood or as
            # dark as muscle.
            rest = image[label == 0]
            assert (np.abs(rest - muscle) < 0.03).mean() > 0.03
            assert (rest > blood).mean() > 0.01


def test_hearts_beat_and_taper(hearts):
    for heart in hearts:
        diastole, systole = (heart[frame][1] for frame in ("frame01", "frame02"))
        for cavity in (RV, LV):
            assert (systole == cavity).sum() < 0.85 * (diastole == cavity).sum()
        middle = slice(2, 6)
        thickness = [
            (f[middle] == MYO).sum() / np.sqrt((f[middle] >= MYO).sum())
            for f in (diastole, systole)
        ]
        assert thickness[1] > thickness[0]
        assert (diastole[-1] > 0).sum() < 0.6 * (diastole[2] > 0).sum()
        background = (diastole == 0) & (systole == 0)
        change = np.abs(heart["frame01"][0] - heart["frame02"][0])
        assert np.median(change[background]) < 0.04  # the chest around it is the same


def test_atria(atria):
    for image, label in atria:
        assert image.dtype == np.float32 and label.dtype == np.uint8
        assert image.shape == label.shape == (60, 50, 36)
        assert abs(image.mean()) < 1e-4 and abs(image.std() - 1) < 1e-3
        assert 0.02 < label.mean() < 0.2
        assert set(np.unique(label)) == {0, 1}
        assert ndimage.label(label)[1] == 1
        inside, outside = image[label == 1], image[label == 0]
        assert inside.mean() > outside.mean() + 1
        # Other chambers and vessels are as bright: at least half as many voxels as the atrium has.
        assert (outside > np.quantile(inside, 0.25)).sum() > 0.5 * label.sum()


@pytest.mark.parametrize("phantom,shape", PHOTOGRAPHS)
def test_photographs(phantom, shape):
    shares, contrasts = [], []
    for case in range(12):
        image, mask = phantom([0, case], shape)
        assert image.dtype == mask.dtype == np.uint8
        assert image.shape == (*shape, 3) and mask.shape == shape
        assert ndimage.label(mask)[1] == 1
        assert np.array_equal(ndimage.binary_fill_holes(mask), mask)
        shares.append(mask.mean())
        ring = ndimage.binary_dilation(mask, iterations=6) & ~ndimage.binary_dilation(
            mask, iterations=2
        )
        contrasts.append(np.abs(np.median(image[mask > 0], 0) - np.median(image[ring], 0)).max())
        assert image[..., 0].mean() > image[..., 2].mean()  # skin and mucosa are reddish
    assert min(shares) > 0.005 and max(shares) < 0.6
    assert np.ptp(shares) > 0.05
    assert np.median(contrasts) > 15


def demo(tmp_path, dataset, *arguments):
    out = tmp_path / dataset
    main(["--dataset", dataset, "--out", str(out), *arguments])
    return out


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


DEMOS = {
    "acdc": ("--cases", "4", "--shape", "40", "36"),
    "la": ("--cases", "4", "--shape", "24", "24", "20"),
    "isic2018": ("--cases", "6", "--shape", "32", "40"),
    "kvasir": ("--cases", "13", "--shape", "32", "40"),
}


@pytest.mark.parametrize("dataset", DEMOS)
def test_demo_data_are_the_same_bytes_and_never_overwritten(tmp_path, dataset, capsys):
    first, second = (demo(tmp_path / place, dataset, *DEMOS[dataset]) for place in ("a", "b"))
    assert contents(first) == contents(second)
    assert contents(first) != contents(
        demo(tmp_path / "c", dataset, *DEMOS[dataset], "--seed", "1")
    )
    capsys.readouterr()
    demo(tmp_path / "a", dataset, *DEMOS[dataset])
    assert "already there" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="remove it or choose another --out"):
        demo(tmp_path / "a", dataset, *DEMOS[dataset], "--seed", "1")
    with pytest.raises(SystemExit):
        demo(tmp_path / "d", dataset, "--shape", "32")


def test_the_acdc_demo_loads(tmp_path):
    out = demo(tmp_path, "acdc", *DEMOS["acdc"])
    data = ACDCDataset(str(out), str(out / "splits"), (32, 32))
    splits = data.splits(1)
    assert [case.name for case in splits["val"]] == ["patient003_frame01", "patient003_frame02"]
    assert 12 <= len(splits["labelled"]) <= 24
    data.prepare(splits)
    volume = data.read(splits["test"][0])
    assert 6 <= volume["image"].shape[-1] <= 12
    assert data.slices(volume).shape[1:] == (1, 32, 32)


def test_the_la_demo_loads(tmp_path):
    out = demo(tmp_path, "la", *DEMOS["la"])
    data = LADataset(str(out), str(out / "splits"), (16, 16, 12))
    splits = data.splits(1)
    assert {key: len(cases) for key, cases in splits.items()} == {
        "labelled": 1,
        "unlabelled": 1,
        "val": 1,
        "test": 1,
    }
    data.prepare(splits)
    assert data.weak(data.sample(splits["labelled"][0]), np.random.default_rng(0))[
        "image"
    ].shape == (1, 16, 16, 12)


@pytest.mark.parametrize("dataset,percent", [("isic2018", 20), ("kvasir", 10)])
def test_the_photograph_demos_load(tmp_path, dataset, percent):
    out = demo(tmp_path, dataset, *DEMOS[dataset])
    data = Images2DDataset(str(out), patch_size=(24, 24))
    splits = data.splits(percent / 100)
    data.prepare(splits)
    labelled = [case.name for case in splits["labelled"]]
    stored = (out / f"ratio_{percent}%" / "labeled.txt").read_text().split()
    assert [f"train/images/{name}.jpg" for name in labelled] == stored[::2]
    train = labelled + [case.name for case in splits["unlabelled"]]
    assert set(labelled) == set(draw(train, len(labelled)))
    assert all(case.label.suffix == ".png" for case in splits["val"])
    assert data.read(splits["val"][0])["label"].any()


@pytest.mark.slow
def test_demo_sizes_keep_the_anatomy():
    for case in range(3):
        for frame in acdc_phantom([0, case]).values():
            assert set(np.unique(frame[1])) == {0, RV, MYO, LV}
        assert la_phantom([0, case])[1].mean() > 0.03
        for phantom in (isic_phantom, kvasir_phantom):
            assert phantom([0, case])[1].mean() > 0.005
