"""RGB images with masks on tiny files: layouts, lists, mask decoding, views, the way back, bad
input, drawn lists.
"""

import random
import struct
import subprocess
import unicodedata
import zlib
from functools import partial

import numpy as np
import pytest
from PIL import Image

from dataloaders.augment import resize_rgb
from dataloaders.cases import Case
from dataloaders.faults import CaseNotes, DataError, Report
from dataloaders.images2d import Images2DDataset, _open_pair
from dataloaders.lists import draw
from tools.make_splits_2d import main as make_splits

SHAPE = (24, 30)


def pixels(seed, shape=SHAPE):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3)).astype(np.uint8)


def mask_of(seed, shape=SHAPE):
    mask = np.zeros(shape, np.uint8)
    mask[4 : 10 + seed % 5, 6:20] = 255
    return mask


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def add(root, folder, names, suffix=".jpg", mask_suffix=".png", first=0):
    """Images with masks in `folder`/images and `folder`/masks, of seeds from `first` on."""
    for seed, name in enumerate(names, first):
        save(root / folder / "images" / f"{name}{suffix}", pixels(seed))
        save(root / folder / "masks" / f"{name}{mask_suffix}", mask_of(seed))


def dataset(root, **arguments):
    return Images2DDataset(str(root), **{"patch_size": (16, 16)} | arguments)


def names(cases):
    return [case.name for case in cases]


TRAIN = [f"t{k:02d}" for k in range(20)]
VAL = ["v0", "v1"]


@pytest.fixture
def tree(tmp_path):
    """train/ and val/ folders, no lists."""
    add(tmp_path, "train", TRAIN)
    add(tmp_path, "val", VAL, first=50)
    return tmp_path


@pytest.fixture
def flat(tmp_path):
    """images/ and masks/ as Kvasir-SEG comes: both JPEG."""
    add(tmp_path, ".", TRAIN, mask_suffix=".jpg")
    return tmp_path


def line(name, folder="train"):
    return f"{folder}/images/{name}.jpg {folder}/masks/{name}.png"


# Lists


@pytest.mark.parametrize(
    "labelled,count", [(1, 1), (5, 5), (0.05, 1), (0.1, 2), (0.33, 6), (None, 20)]
)
def test_lists_from_folders(tree, labelled, count):
    splits = dataset(tree).splits(labelled)
    chosen = names(splits["labelled"])
    assert len(chosen) == count
    assert sorted(chosen + names(splits["unlabelled"])) == TRAIN
    assert names(splits["val"]) == VAL
    assert splits["test"] == []
    if labelled is not None:
        assert chosen == random.Random(1337).sample(TRAIN, count)
    assert names(dataset(tree).splits(labelled)["labelled"]) == chosen


def test_released_lists_of_pairs(tree):
    """ratio_10%/labeled.txt decides, its unlabeled.txt is computed, and train.txt can be absent."""
    folder = tree / "ratio_10%"
    folder.mkdir()
    (folder / "labeled.txt").write_text("\n".join(map(line, ("t07", "t03"))))
    (folder / "unlabeled.txt").write_text(
        "\n".join(line(name) for name in TRAIN[:10] if name not in ("t07", "t03"))
    )
    (folder / "val.txt").write_text(line("v1", "val"))
    splits = dataset(tree).splits(0.1)
    assert names(splits["labelled"]) == ["t07", "t03"]
    assert names(splits["unlabelled"]) == [
        name for name in TRAIN[:10] if name not in ("t07", "t03")
    ]
    assert names(splits["val"]) == ["v1"]
    (tree / "train.txt").write_text("\n".join(map(line, TRAIN)))
    (tree / "val.txt").write_text(line("v0", "val"))
    splits = dataset(tree).splits(0.1)
    assert names(splits["labelled"]) == ["t07", "t03"]
    assert len(splits["unlabelled"]) == 18
    assert names(splits["val"]) == ["v0"]
    # a count takes no list of a share
    assert names(dataset(tree).splits(2)["labelled"]) == draw(TRAIN, 2)


def test_lists_of_names_in_a_folder_of_their_own(flat, tmp_path):
    folder = tmp_path / "lists"
    folder.mkdir()
    for name, chosen in {
        "train": TRAIN[:15],
        "val": TRAIN[15:18],
        "test": TRAIN[18:],
        "labelled_3": TRAIN[:3],
    }.items():
        (folder / f"{name}.txt").write_text("\n".join(chosen))
    data = dataset(flat, split_dir=str(folder))
    splits = data.splits(3)
    assert names(splits["labelled"]) == TRAIN[:3]
    assert [len(splits[key]) for key in ("unlabelled", "val", "test")] == [12, 3, 2]
    assert names(dataset(flat, split_dir=str(folder)).find(["t19", "t00"])) == ["t19", "t00"]
    (folder / "labelled_3.txt").write_text("t00\nt01\nt17")
    with pytest.raises(
        DataError,
        match=r"labelled_3.txt: 1 of 3 images are not in the train list, for example 't17'",
    ):
        data.splits(3)
    (folder / "val.txt").write_text("t15\nt01")
    with pytest.raises(DataError, match=r"'t01' is in both the train and the val list"):
        data.splits(2)


ISIC = {"Training": ("ISIC_1", "ISIC_2", "ISIC_3"), "Validation": ("ISIC_4",), "Test": ("ISIC_5",)}


@pytest.fixture
def isic(tmp_path):
    """The folders of the download, with the texts that lie in them."""
    for part, members in ISIC.items():
        images = tmp_path / f"ISIC2018_Task1-2_{part}_Input"
        masks = tmp_path / f"ISIC2018_Task1_{part}_GroundTruth"
        for name in members:
            save(images / f"{name}.jpg", pixels(int(name[-1])))
            save(masks / f"{name}_segmentation.png", mask_of(int(name[-1])))
        for folder in (images, masks):
            (folder / "ATTRIBUTION.txt").write_text("not an image")
        (images / f"._{members[0]}.jpg").write_bytes(b"left by macOS")
    return tmp_path


def test_the_isic_archive_as_it_is(isic, capsys):
    lists = ["--data-root", str(isic), "--out", str(isic), "--ratios", "50"]
    assert make_splits([*lists, "--val", "1"]) == 0
    assert "skipped: ISIC2018_Task1-2_Test_Input/._ISIC_5.jpg, " in capsys.readouterr().out
    splits = dataset(isic).splits(0.5)
    assert [len(splits[key]) for key in ("labelled", "unlabelled", "val")] == [1, 1, 1]
    # as in published tables: of the training folder alone
    drawn = [case.name for cases in splits.values() for case in cases]
    assert sorted(drawn) == list(ISIC["Training"])
    assert splits["labelled"][0].label.name == f"{splits['labelled'][0].name}_segmentation.png"


def test_the_lists_of_the_isic_release(isic):
    lists = ["--data-root", str(isic), "--out", str(isic / "lists"), "--ratios", "50"]
    make_splits(lists)
    splits = dataset(isic, split_dir=str(isic / "lists")).splits()
    assert names(splits["labelled"]) == list(ISIC["Training"])
    assert names(splits["val"]) == list(ISIC["Validation"])
    assert names(splits["test"]) == list(ISIC["Test"])
    (isic / "ISIC2018_Task1_Training_GroundTruth/ISIC_2_segmentation.png").unlink()
    with pytest.raises(DataError, match=r"ISIC_2.jpg: has no mask of the same name"):
        make_splits([*lists, "--val", "1"])


@pytest.mark.parametrize(
    "content,message",
    [
        ("t00\nt99", r"train.txt: there is no image 't99' in .*; names look like t00"),
        ("t00\nt00", "listed twice: t00"),
        ("t00\ntrain/images/t00.jpg train/masks/t00.png", "listed twice: t00"),
        ("a b c", "there is no image 'a b c' in .*; expected an image's name, or the paths"),
        ("# nothing", "the list is empty"),
        ("train/images/t99.jpg train/masks/t99.png", r"train.images.t99.jpg: no such file"),
        ("train/images/t00.jpg train/masks/t99.png", r"train.masks.t99.png: no such file"),
    ],
)
def test_bad_lists(tree, content, message):
    (tree / "train.txt").write_text(content)
    with pytest.raises(DataError, match=message):
        dataset(tree).splits(1)


def test_missing_parts(flat, tmp_path):
    with pytest.raises(
        DataError, match=r"train.txt: no such list, and .* has images; .*make_splits.py images"
    ):
        dataset(flat).splits(1)
    with pytest.raises(DataError, match="no such folder"):
        dataset(tmp_path / "nowhere").splits(1)
    with pytest.raises(DataError, match=r"1 of 1 images not found, for example 'x'"):
        dataset(flat).find(["x"])
    (flat / "masks" / "t04.jpg").unlink()
    (flat / "train.txt").write_text("\n".join(TRAIN[:10]))
    (flat / "val.txt").write_text("\n".join(TRAIN[10:]))
    report = Report()
    splits = dataset(flat).splits(None, report)
    assert [case.name for case in splits["unlabelled"]] == ["t04"]
    assert [str(warning.fault) for warning in report.warnings] == ["no label"]
    (flat / "masks" / "t10.jpg").unlink()
    with pytest.raises(DataError, match=r"t10.jpg: case 't10' has no label; expected one"):
        dataset(flat).prepare(dataset(flat).splits(1))


def test_a_listed_labelled_image_without_a_mask(tree):
    (tree / "labelled_2.txt").write_text("t03\nt07\n")
    (tree / "train/masks/t07.png").unlink()
    with pytest.raises(DataError, match=r"t07.jpg: .*labelled_2.txt lists it as labelled, but it"):
        dataset(tree).splits(2)
    (tree / "labelled_2.txt").write_text("t03\nelsewhere\n")
    with pytest.raises(DataError, match=r"there is no image 'elsewhere'"):
        dataset(tree).splits(2)


def test_one_name_for_two_images(tree):
    add(tree, "val", ["t00"])
    with pytest.raises(
        DataError, match=r"t00.jpg: called 't00' as .*t00.jpg is; expected a name of its own"
    ):
        dataset(tree).splits(1)


@pytest.mark.parametrize("labelled", [0, 21, 0.04, 1.5])
def test_impossible_counts(tree, labelled):
    with pytest.raises(DataError, match="labelled is"):
        dataset(tree).splits(labelled)


# Reading and views


def test_read_resizes_once_and_volumes_keep_their_size(tree):
    data = dataset(tree)
    case = data.splits(1)["labelled"][0]
    sample, volume = data.sample(case), data.read(case)
    assert (sample["image"].shape, sample["label"].shape) == ((3, 16, 16), (1, 16, 16))
    assert (volume["image"].shape, volume["label"].shape) == ((3, *SHAPE), (1, *SHAPE))
    assert sample["image"].dtype == volume["image"].dtype == np.float32
    assert sample["label"].dtype == volume["label"].dtype == np.uint8
    with Image.open(case.images[0]) as stored:
        expected = np.asarray(stored.resize((16, 16), Image.Resampling.BILINEAR))
        assert np.array_equal(np.rint(sample["image"] * 255), np.moveaxis(expected, -1, 0))
        assert np.array_equal(
            np.rint(volume["image"] * 255), np.moveaxis(np.asarray(stored), -1, 0)
        )
    assert volume["spacing"] == [1.0, 1.0]
    assert np.array_equal(data.slices(volume)[0], sample["image"])
    nearest = dataset(tree, eval_resize="nearest").slices(volume)
    assert nearest.shape == (1, 3, 16, 16)
    assert nearest[0, :, 0, 0].tolist() == volume["image"][:, 0, 0].tolist()


def test_prediction_back_at_full_size(tree):
    data = dataset(tree, patch_size=(96, 96), eval_resize="nearest")
    volume = data.read(data.splits(1)["val"][0])
    prediction = data.slices(volume | {"image": volume["label"]})[:, 0]
    assert np.array_equal(data.unslice(prediction, volume), volume["label"][0])


def test_masks_are_cut_at_half(tree):
    ramp = np.tile(np.arange(256, dtype=np.uint8), (4, 1))
    save(tree / "val" / "images" / "v0.jpg", pixels(0, ramp.shape))
    save(tree / "val" / "masks" / "v0.png", ramp)
    data = dataset(tree)
    label = data.read(data.find(["v0"])[0])["label"]
    assert np.array_equal(label[0], (ramp > 127).astype(np.uint8))
    # Kvasir's masks have three equal channels
    save(tree / "val" / "masks" / "v0.png", np.stack([ramp] * 3, -1))
    assert np.array_equal(data.read(data.find(["v0"])[0])["label"], label)


def test_jpeg_masks_come_back_clean(flat):
    data = dataset(flat)
    with Image.open(flat / "masks" / "t01.jpg") as stored:
        assert len(np.unique(np.asarray(stored))) > 2
    label = data.read(data.find(["t01"])[0])["label"][0]
    assert (label != (mask_of(1) > 0)).mean() < 0.01


def test_empty_masks_are_kept(tree):
    save(tree / "val" / "masks" / "v0.png", np.zeros(SHAPE, np.uint8))
    data = dataset(tree)
    assert not data.read(data.find(["v0"])[0])["label"].any()


def test_views_are_functions_of_sample_and_rng(tree):
    data = dataset(tree)
    label = np.random.default_rng(0).integers(0, 2, (1, 16, 16)).astype(np.uint8)
    sample = {"image": np.repeat(label, 3, 0).astype(np.float32), "label": label}
    for seed in range(10):
        weak, again = (data.weak(sample, np.random.default_rng(seed)) for _ in range(2))
        assert np.array_equal(weak["image"], again["image"])
        assert all(np.array_equal(channel, weak["label"][0]) for channel in weak["image"])
        assert np.array_equal(
            data.patch(sample, np.random.default_rng(seed))["image"], weak["image"]
        )
        strong, repeated = (data.strong(weak, np.random.default_rng(seed)) for _ in range(2))
        assert np.array_equal(strong["image"], repeated["image"])
        assert np.array_equal(strong["label"], weak["label"])


def test_the_supervised_recipe_reads_whole_images_and_keeps_a_quarter_as_they_are(tree):
    data = dataset(tree, augmentation="supervised")
    sample = data.sample(data.splits(1)["labelled"][0])
    assert sample["image"].shape == (3, *SHAPE)
    assert data.patch(sample, np.random.default_rng(0))["image"].shape == (3, 16, 16)
    plain = resize_rgb(sample, (16, 16))["image"]
    generator = np.random.default_rng(0)
    same = sum(np.array_equal(data.patch(sample, generator)["image"], plain) for _ in range(400))
    assert 75 < same < 130
    assert data.weak(sample, generator)["image"].shape == (3, 16, 16)


def test_memory_holds_eight_bit_pixels(tree, monkeypatch):
    data = dataset(tree)
    splits = data.splits(2)
    data.prepare(splits)
    assert len(data._memory) == 20
    assert all(
        array.dtype == np.uint8 for stored in data._memory.values() for array in stored.values()
    )
    first = data.sample(splits["labelled"][0])
    monkeypatch.setattr(data, "load", None)
    assert np.array_equal(data.sample(splits["labelled"][0])["image"], first["image"])


# Bad input


@pytest.mark.parametrize(
    "which,array,message",
    [
        (
            "masks",
            mask_of(0, (24, 31)),
            r"v0.png: 31 x 24 pixels, but its image v0.jpg has 30 x 24",
        ),
        ("masks", mask_of(0) // 255, r"v0.png: its largest value is 1; expected 0 and 255"),
        ("images", np.full((*SHAPE, 3), 40, np.uint8), r"v0.jpg: constant image .*40, 40, 40"),
    ],
)
def test_bad_pairs(tree, which, array, message):
    save(next((tree / "val" / which).glob("v0.*")), array)
    data = dataset(tree)
    case = data.splits(1)["val"][0]
    for read in (data.sample, data.read):
        with pytest.raises(DataError, match=message):
            read(case)


@pytest.mark.parametrize("which", ["images", "masks"])
@pytest.mark.parametrize("size", [0, 20, 0.6])
def test_truncated_files(tree, which, size):
    path = next((tree / "train" / which).glob("t00.*"))
    content = path.read_bytes()
    path.write_bytes(content[: int(size * len(content)) if size < 1 else size])
    with pytest.raises(
        DataError, match=rf"1 of 22 files cannot be used:\n  .*{path.name}: unreadable"
    ):
        dataset(tree).prepare(dataset(tree).splits(1))


def test_sixteen_bit_images(tree):
    Image.fromarray(np.arange(720, dtype=np.uint16).reshape(SHAPE)).save(
        tree / "val" / "images" / "v0.png"
    )
    (tree / "val" / "images" / "v0.jpg").unlink()
    data = dataset(tree)
    with pytest.raises(DataError, match="expected 8 bits"):
        data.sample(data.find(["v0"])[0])


def read_pair(folder, image, mask, notes=None):
    """The pair of files of a folder as the data set opens it; image and mask: given to `save`."""
    for name, (array, options) in {"image": image, "mask": mask}.items():
        picture = array if isinstance(array, Image.Image) else Image.fromarray(array)
        picture.save(folder / f"{name}.png", **options)
    return _open_pair(Case("a", (folder / "image.png",), folder / "mask.png"), notes)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("tag", range(1, 9))
def test_photographs_are_turned_as_viewers_turn_them(tmp_path, tag, format):
    seen = np.full((24, 32, 3), 90, np.uint8)
    seen[2:10, 4:12] = 220
    # the tag says which turn of the stored pixels shows what was seen
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = Image.fromarray(seen)
    stored = stored.transpose(undo[tag]) if tag in undo else stored
    exif = Image.Exif()
    exif[0x0112] = tag
    mask = (seen[..., 0] > 150).astype(np.uint8) * 255
    image, cut = read_pair(
        tmp_path, (stored, {"exif": exif, "format": format}), (mask, {"format": "PNG"})
    )
    assert np.asarray(image)[np.asarray(cut) > 0].mean() > 200
    read = dataset(tmp_path).read_file(Case("a", (tmp_path / "image.png",)))["image"]
    assert read.shape == (3, 24, 32) and abs(255 * read - seen.transpose(2, 0, 1)).mean() < 10


def transparent(colour, alpha, mode):
    """A mask drawn as transparency, of one colour."""
    bands = [Image.new("L", (30, 24), colour)] * (3 if mode == "RGBA" else 1)
    return Image.merge(mode, [*bands, Image.fromarray(alpha)])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize("colour", [0, 60, 255])
def test_masks_of_transparency(tmp_path, mode, colour):
    alpha, options = mask_of(0), {}
    if mode == "P":
        mask = Image.fromarray((alpha > 0).astype(np.uint8)).convert("P")
        mask.putpalette([colour] * 6)
        options = {"transparency": 0}
    else:
        mask = transparent(colour, alpha, mode)
    cut = read_pair(tmp_path, (pixels(0), {}), (mask, options))[1]
    assert np.array_equal(np.asarray(cut), alpha > 0)
    # opaque throughout: the colours are the mask
    opaque = Image.fromarray(alpha).convert("RGBA")
    cut = read_pair(tmp_path, (pixels(0), {}), (opaque, {}))[1]
    assert np.array_equal(np.asarray(cut), alpha > 0)


def test_masks_of_which_colour_and_transparency_differ(tmp_path):
    alpha = mask_of(0)
    for colour, clear in (
        (255 - alpha, alpha),
        (alpha, np.full_like(alpha, 255 - 90)),
        (alpha, alpha.T),
    ):
        clear = np.resize(clear, alpha.shape)
        grey = Image.fromarray(colour)
        mask = Image.merge("RGBA", [grey, grey, grey, Image.fromarray(clear)])
        with pytest.raises(DataError, match="transparency and its colours show different masks"):
            read_pair(tmp_path, (pixels(0), {}), (mask, {}))


def test_what_pictures_hide_is_said(tmp_path):
    notes = CaseNotes()
    clear = Image.fromarray(np.dstack([pixels(0), mask_of(0)]))
    read_pair(tmp_path, (clear, {}), (np.full(SHAPE, 255, np.uint8), {}), notes)
    found = [warning.found for warning in notes.warnings]
    assert found == [
        "88.3 % of the pixels are transparent, their hidden colours are used",
        "the whole image is foreground",
    ]
    (warning,) = dataset(tmp_path).read_file(Case("a", (tmp_path / "image.png",)))["findings"]
    assert "transparent" in warning.found
    notes = CaseNotes()
    read_pair(tmp_path, (pixels(0), {}), (255 - mask_of(0), {}), notes)
    assert "the whole border and 88.3 % of the pixels are foreground" in notes.warnings[0].found
    notes = CaseNotes()
    read_pair(tmp_path, (Image.fromarray(pixels(0)).convert("RGBA"), {}), (mask_of(0), {}), notes)
    assert not notes.warnings


def deep_png(path, kind):
    """A PNG of 16 bits a channel, which PIL does not write: kind 2 is RGB, 6 RGBA, 4 grey with
    alpha.
    """
    rows = b"".join(b"\0" + bytes(8 * 2 * {2: 3, 6: 4, 4: 2}[kind]) for _ in range(8))

    def chunk(name, content):
        return (
            struct.pack(">I", len(content))
            + name
            + content
            + struct.pack(">I", zlib.crc32(name + content))
        )

    head = struct.pack(">IIBBBBB", 8, 8, 16, kind, 0, 0, 0)
    parts = (b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))


@pytest.mark.parametrize("which", ["image", "mask"])
def test_pages_depth_and_other_kinds_are_refused(tmp_path, which, monkeypatch):
    pages = [Image.fromarray(pixels(k)) for k in range(3)]
    path = tmp_path / f"{which}.png"

    def attempt(message):
        with pytest.raises(DataError, match=rf"{which}\.png: {message}"):
            _open_pair(Case("a", (tmp_path / "image.png",), tmp_path / "mask.png"))

    read_pair(tmp_path, (pixels(0), {}), (mask_of(0), {}))
    for format in ("TIFF", "GIF", "PNG", "WEBP"):
        pages[0].save(path, format=format, save_all=True, append_images=pages[1:])
        attempt("3 pages or frames; expected one image")
    for kind in (2, 4, 6):
        deep_png(path, kind)
        attempt("pixels of mode .*; expected 8 bits")
    Image.fromarray(np.zeros(SHAPE, np.float32)).save(path, format="TIFF")
    attempt("pixels of mode F; expected 8 bits")
    for content, message in (
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EOF\n", "a PostScript text"),
        (b"<html>log in</html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1", "a Git LFS pointer"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "unreadable"),
        (b"P6 100 100 255 x", "unreadable"),
    ):
        path.write_bytes(content)
        monkeypatch.setattr(subprocess, "check_call", None)  # no program may be started
        attempt(message)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.fromarray(pixels(0)).save(path)
    with pytest.raises(DataError, match=r"\.png: Image size .* exceeds") as caught:
        _open_pair(Case("a", (path,)))
    assert caught.value.findings[0].fault == "too large"


def test_a_jpeg_of_a_phone_with_a_preview_is_one_image(tmp_path):
    view, other = Image.fromarray(mask_of(0)), Image.new("L", (30, 24))
    view.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[other])
    image, _ = _open_pair(Case("a", (tmp_path / "a.jpg",)))
    assert abs(np.asarray(image)[..., 0].astype(float) - mask_of(0)).mean() < 10


def test_hidden_files_and_composed_names(tmp_path):
    whole, apart = (unicodedata.normalize(form, "Müller") for form in ("NFC", "NFD"))
    add(tmp_path, "train", [apart, "b"])
    add(tmp_path, "val", ["c"], first=50)
    for path in list(tmp_path.glob("*/*/*.*")):
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7")
    (tmp_path / "train.txt").write_text(f"{whole}\n", encoding="utf-8")
    splits = dataset(tmp_path).splits()
    assert names(splits["labelled"]) == [whole] and names(splits["val"]) == ["c"]
    assert splits["labelled"][0].label is not None
    (tmp_path / "train.txt").write_text(line(whole).replace("/", "\\") + "\n", encoding="utf-8")
    report = Report()
    (case,) = dataset(tmp_path).splits(report=report)["labelled"]
    assert case.images[0].is_file() and case.label.is_file()
    assert {warning.fault for warning in report.findings} == {"list"}


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"patch_size": (16, 20)}, "two equal numbers"),
        ({"class_names": ("a", "b", "c")}, "masks are binary"),
        ({"augmentation": "weak"}, "augmentation must be one of semi, supervised"),
        ({"eval_resize": "cubic"}, "eval_resize must be one of"),
    ],
)
def test_bad_arguments(tree, arguments, message):
    with pytest.raises(DataError, match=message):
        dataset(tree, **arguments)


# tools/make_splits_2d.py


def test_drawn_lists_are_read_back(flat, tmp_path, capsys):
    out = tmp_path / "lists"
    arguments = ["--data-root", str(flat), "--out", str(out), "--val", "4", "--ratios", "10", "25"]
    make_splits(arguments)
    assert "train 16, val 4, labelled_10% 1, labelled_25% 4" in capsys.readouterr().out
    data = dataset(flat, split_dir=str(out))
    splits = data.splits(0.25)
    train = sorted(names(splits["labelled"] + splits["unlabelled"]))
    # listed or drawn, they are the same
    assert sorted(names(splits["labelled"])) == sorted(draw(train, 4))
    assert not set(train) & set(names(splits["val"]))
    with pytest.raises(DataError, match="exists already"):
        make_splits(arguments)
    make_splits([*arguments[:3], str(tmp_path / "other"), *arguments[4:], "--seed", "5"])
    assert (tmp_path / "other" / "val.txt").read_text() != (out / "val.txt").read_text()


def test_folders_make_the_lists(tree, tmp_path):
    out = tmp_path / "lists"
    with pytest.raises(DataError, match="leave it out"):
        make_splits(["--data-root", str(tree), "--out", str(out), "--val", "4"])
    make_splits(["--data-root", str(tree), "--out", str(out)])
    splits = dataset(tree, split_dir=str(out)).splits(0.2)
    assert sorted(names(splits["labelled"])) == sorted(draw(TRAIN, 4))
    assert names(splits["val"]) == VAL


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--val", "20"], "expected 1..19"),
        ([], "--val is None"),
        (["--val", "4", "--ratios", "100"], "percentages of 1 to 99"),
        (["--val", "4", "--ratios", "5"], "16 images .* is less than one image"),
    ],
)
def test_lists_that_cannot_be_drawn(flat, tmp_path, arguments, message):
    with pytest.raises(DataError, match=message):
        make_splits(["--data-root", str(flat), "--out", str(tmp_path / "lists"), *arguments])


@pytest.mark.parametrize("strong_views", [0, 1, 2])
def test_views_have_one_geometry_and_strong_views_of_their_own(tree, strong_views):
    data = dataset(tree)
    sample = data.sample(data.splits(1)["unlabelled"][0])
    kept = {key: value.copy() for key, value in sample.items()}
    function = partial(data.views, strong_views=strong_views)
    keys = ["weak", *(f"strong{k}" for k in range(strong_views)), "label"]
    for seed in range(6):
        views, again = (function(sample, np.random.default_rng(seed)) for _ in range(2))
        assert list(views) == keys
        assert all(np.array_equal(views[key], again[key]) for key in keys)
        weak = data.weak(sample, np.random.default_rng(seed))
        assert np.array_equal(views["weak"], weak["image"]) and np.array_equal(
            views["label"], weak["label"]
        )
        for key in keys[:-1]:
            assert views[key].shape == (3, 16, 16) and views[key].dtype == np.float32
        assert views["label"].shape == (1, 16, 16) and views["label"].dtype == np.uint8
    assert all(np.array_equal(sample[key], kept[key]) for key in kept)


def test_strong_views_of_one_image_differ(tree):
    data = dataset(tree)
    sample = data.sample(data.splits(1)["unlabelled"][0])
    differ = 0
    for seed in range(10):
        views = data.views(sample, np.random.default_rng(seed), strong_views=2)
        differ += not np.array_equal(views["strong0"], views["strong1"])
        first = data.views(sample, np.random.default_rng(seed), strong_views=1)
        assert np.array_equal(views["weak"], first["weak"]) and np.array_equal(
            views["strong0"], first["strong0"]
        )
    assert differ >= 8  # a view is at times left as it is
