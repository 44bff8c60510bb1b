"""common.py's photographs: layouts and image files made here, pixels of Pillow and NumPy, workers, damaged files."""

import functools
import gc
import io
import multiprocessing
import os
import struct
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageOps
from torchvision.transforms import v2

import common
from common import InputError, Photos, batch_indices, load_data, load_image, loader, mean_std, stem_for
from test_data import noise, put


@pytest.fixture(scope="module", autouse=True)
def no_long_farewell():
    """After an error torch waits 5 s for every worker; here it does not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
        yield
        gc.collect()


@pytest.fixture(autouse=True)
def seeded_on_one_thread():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def put_number(path, k):
    """An image of one colour, which neither a crop nor JPEG hides: its number k < 256."""
    put(path, Image.new("RGB", (12, 9), (k // 16 * 16 + 5, k % 16 * 16 + 5, 99)))


def shown(images, labels, train=False, size=4):
    """What `loader` shows of put_number's images: [(number, label)]."""
    pairs = []
    for x, y in loader(images, labels, torch.arange(len(images)).split(size), train):
        assert x.shape == (len(y), *images.shape[1:]) and x.dtype == torch.uint8
        red, green = (x[:, c].float().mean((1, 2)).div(16).int() for c in (0, 1))
        pairs += zip((red * 16 + green).tolist(), y.tolist())
    return pairs


def views(images, order, train=False):
    """All batches of `order` as one uint8 tensor."""
    found = loader(images, torch.zeros(len(images), dtype=torch.int64), order, train)
    return torch.cat([x for x, _ in found])


def names(data):
    """[(class, file)] to train on and to test on, whose labels must be those of their folders."""
    pairs = []
    for images, labels in (data[:2], data[2:4]):
        pairs.append([Path(path).parts[-2:] for path in images.paths])
        assert [data.classes[k] for k in labels] == [name for name, _ in pairs[-1]]
    return pairs


def as_tensor(image):
    """An image of Pillow as uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


# -----------------------------------------------------------------------------
# Layouts
# -----------------------------------------------------------------------------


def sports(root, counts):
    for name, count in zip(["RockClimbing", "badminton", "polo"], counts):
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"{i:03}.jpg").touch()


@pytest.mark.parametrize("inside", ["", "event_img"])
def test_sport8(inside, tmp_path):
    """70 images of every class to train on and 60 others to test, drawn by the seed alone."""
    sports(tmp_path / inside, (130, 131, 133))
    for name in ("polo/._001.jpg", "polo/Thumbs.db", "Thumbs.db"):
        (tmp_path / inside / name).write_bytes(b"not an image")
    (tmp_path / inside / ".hidden").mkdir()
    data = load_data("sport8", tmp_path)
    train, test = names(data)
    assert data.classes == ["RockClimbing", "badminton", "polo"]
    assert data.train_images.shape == (210, 3, 224, 224) and data.test_images.shape == (180, 3, 224, 224)
    for part, count in ((train, 70), (test, 60)):
        files = [{file for other, file in part if other == name} for name in data.classes]
        assert [len(found) for found in files] == [count] * 3 and len(part) == 3 * count
        assert all(max(found) >= "120" and min(found) < "010" for found in files)
        assert files[0] != files[1] != files[2] != files[0]  # every class has its own draw
    assert len({*train, *test}) == 3 * 130
    torch.manual_seed(9)
    assert names(load_data("sport8", tmp_path, seed=0)) == [train, test]
    assert {*names(load_data("sport8", tmp_path, seed=1))[0]} != {*train}


def test_sport8_needs_130_images_of_every_class(tmp_path):
    sports(tmp_path, (130, 129, 131))
    with pytest.raises(InputError, match="badminton has 129 images: sport8 takes 70"):
        load_data("sport8", tmp_path)


@pytest.fixture
def indoor(tmp_path):
    """MIT67's layout; image 9 is in no list."""
    for k, name in enumerate(["bar"] * 3 + ["inside_bus"] * 2 + ["wine cellar"] * 5):
        put_number(tmp_path / "Images" / name / f"{k}.jpg", k)
    train = b"wine cellar/5.jpg\r\nbar/0.jpg\r\n\r\ninside_bus/4.jpg\r\nbar/2.jpg\r\nwine cellar/8.jpg"
    (tmp_path / "TrainImages.txt").write_bytes(train)
    (tmp_path / "TestImages.txt").write_bytes(b"wine cellar/7.jpg\nbar/1.jpg\ninside_bus/3.jpg\n\n")
    return tmp_path


def test_mit67(indoor):
    data = load_data("mit67", indoor, workers=0, image_size=64)
    assert data.classes == ["bar", "inside_bus", "wine cellar"]
    assert shown(*data[:2]) == [(5, 2), (0, 0), (4, 1), (2, 0), (8, 2)]
    assert shown(*data[2:4]) == [(7, 2), (1, 0), (3, 1)]


def flat_val(root):
    put_number(root / "val" / "1.jpg", 1)
    (root / "Images").rename(root / "train")


TRAIN_LIST, TEST_LIST = "TrainImages.txt", "TestImages.txt"
UNUSABLE = {  # data set, what happens to MIT67's layout or an empty folder, and what the message must say
    "no list": ("mit67", lambda root: (root / TEST_LIST).unlink(), TEST_LIST),
    "empty list": ("mit67", lambda root: (root / TEST_LIST).write_text("\n"), "empty"),
    "listed file": ("mit67", lambda root: (root / "Images/bar/1.jpg").unlink(), "bar/1.jpg"),
    "other class": ("mit67", lambda root: (root / TEST_LIST).write_text("Bar/1.jpg\n"), "Bar/1.jpg"),
    "class only in test": ("mit67", lambda root: (root / TRAIN_LIST).write_text("bar/0.jpg\n"), "wine cellar/7.jpg"),
    "not text": ("mit67", lambda root: (root / TRAIN_LIST).write_bytes(b"\xff\xfe\x00"), ""),
    "flat val": ("imagenet", flat_val, "one folder per class"),
    "no val": ("imagenet", lambda root: (root / "Images").rename(root / "train"), "(or val/)"),
    "empty class": ("sport8", lambda root: (root / "event_img/polo").mkdir(parents=True), "polo"),
    "empty root": ("sport8", lambda root: (root / "event_img").mkdir(), "event_img"),
    "no root": ("sport8", lambda root: root.rename(root.with_name("gone")), "test_layouts"),
}


@pytest.mark.parametrize("dataset, change, says", UNUSABLE.values(), ids=list(UNUSABLE))
def test_layouts_that_cannot_be_used(dataset, change, says, indoor):
    change(indoor)
    with pytest.raises((InputError, OSError)) as e:  # both are one line to the scripts
        load_data(dataset, indoor)
    assert says in str(e.value) and "\n" not in str(e.value)


def test_flowers102(tmp_path, monkeypatch):
    savemat, root = pytest.importorskip("scipy.io").savemat, tmp_path / "flowers-102"
    monkeypatch.setattr(torchvision.datasets.flowers102, "check_integrity", lambda *args, **kwargs: True)
    flowers = np.array([77, 1, 102, 50, 50, 3, 9, 1])  # of images 1 to 8
    parts = {"trnid": [3, 1], "valid": [8, 4], "tstid": [2, 7, 5, 6]}
    for k in range(1, 9):
        put_number(root / "jpg" / f"image_{k:05}.jpg", k)
    savemat(root / "imagelabels.mat", {"labels": flowers[None]})
    savemat(root / "setid.mat", {name: np.array([part]) for name, part in parts.items()})
    data = load_data("flowers102", tmp_path, workers=0, image_size=64)
    assert shown(*data[:2]) == [(k, flowers[k - 1] - 1) for k in (3, 1, 8, 4)] and len(data.classes) == 102
    assert shown(*data[2:4]) == [(k, flowers[k - 1] - 1) for k in (2, 7, 5, 6)]


def two_classes(root, test="test"):
    """Images 0, 2, 4 to train on, 6, 8, 10 to test: class a; the odd ones: class b."""
    for k in range(12):
        put_number(root / ("train" if k < 6 else test) / "ab"[k % 2] / f"{k:02}.png", k)


@pytest.mark.parametrize("dataset, size", [("imagenet", None), ("folder", 64), ("folder", 224)])
def test_folders_of_photographs(dataset, size, tmp_path):
    two_classes(tmp_path, "val" if dataset == "imagenet" else "test")
    data, shape = load_data(dataset, tmp_path, size, workers=1), (6, 3, size or 224, size or 224)
    assert data.classes == ["a", "b"] and stem_for(data.train_images) == "imagenet"
    assert data.train_images.shape == data.test_images.shape == shape
    assert len(data.train_images) == 6 and data.train_images.workers == 1
    assert shown(*data[:2]) == [(0, 0), (2, 0), (4, 0), (1, 1), (3, 1), (5, 1)]
    assert shown(*data[2:4]) == [(6, 0), (8, 0), (10, 0), (7, 1), (9, 1), (11, 1)]


def test_photographs_of_a_class_that_is_only_trained_on(tmp_path):
    """The labels of the images to test on do not shift; deeper folders count and hidden ones do not."""
    for k, name in enumerate(["train/a/x", "train/b/x", "train/c/deep/x", "val/c/deep/x", "val/a/x", "val/.b/x"]):
        put_number(tmp_path / f"{name}.png", k)
    data = load_data("imagenet", tmp_path, workers=0)
    assert data.classes == ["a", "b", "c"]
    assert shown(*data[:2]) == [(0, 0), (1, 1), (2, 2)] and shown(*data[2:4]) == [(4, 0), (3, 2)]


def test_small_folder_images_are_tensors(tmp_path):
    two_classes(tmp_path)
    images = load_data("folder", tmp_path, 63).train_images
    assert images.shape == (6, 3, 63, 63) and images.dtype == torch.uint8 and stem_for(images) == "cifar"


def test_limits_keep_the_same_images_for_every_seed(tmp_path):
    for split in ("train", "val"):
        for k in range(60):
            put_number(tmp_path / split / "ab"[k % 2] / f"{k}.png", k)
    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        found.append(names(load_data("imagenet", tmp_path, None, 20, 10, seed=seed)))
    assert found[0] == found[1] and [len(part) for part in found[0]] == [20, 10]
    assert all({name for name, _ in part} == {"a", "b"} for part in found[0])
    assert {*found[0][0]} < {*names(load_data("imagenet", tmp_path))[0]}


# -----------------------------------------------------------------------------
# Image files
# -----------------------------------------------------------------------------


def levels(path):
    """An image as `load_image` reads it: uint8 (H, W, 3)."""
    image = load_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def gray3(pixels):
    return np.stack([pixels] * 3, -1)


def put_tiff(path, pixels, order="<", orientation=1):
    """A TIFF of one channel by its specification: (H, W) integers or floats, in either order of bytes."""
    H, W = pixels.shape
    strip = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    kind = {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]
    tags = {256: W, 257: H, 258: 8 * pixels.itemsize, 259: 1, 262: 1, 273: 8, 274: orientation,
            277: 1, 278: H, 279: len(strip), 339: kind}  # fmt: skip
    head = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8 + len(strip))
    entries = [struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags.items()]
    path.write_bytes(head + strip + struct.pack(f"{order}H", len(tags)) + b"".join(entries) + bytes(4))


TURNS = {  # EXIF's orientations: what a viewer does to the stored rows
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x),
}


def test_16_bits_of_gray_are_scaled_to_8(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 65536, (40, 30), dtype=np.uint16)
    pixels[0, :5] = 65535, 32896, 0, 257, 128
    want = np.rint(pixels / 65535 * 255).astype(np.uint8)
    assert want[0, :5].tolist() == [255, 128, 0, 1, 0]
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "a.pgm").write_bytes(b"P5 30 40 65535\n" + pixels.astype(">u2").tobytes())
    put_tiff(tmp_path / "little.tif", pixels, "<")
    put_tiff(tmp_path / "big.tif", pixels, ">")
    for name in ("a.png", "a.pgm", "little.tif", "big.tif"):
        assert np.array_equal(levels(tmp_path / name), gray3(want)), name


@pytest.mark.parametrize("orientation", TURNS)
def test_images_stand_upright(orientation, tmp_path):
    """EXIF's orientation, in every format that has one, as NumPy turns arrays and as Pillow's viewers do."""
    pixels, exif = noise(5, 8, 3), Image.Exif()
    exif[0x0112] = orientation
    for name in ("a.png", "a.tif", "a.webp"):
        Image.fromarray(pixels).save(tmp_path / name, exif=exif, **{"lossless": True} if name == "a.webp" else {})
        assert np.array_equal(levels(tmp_path / name), TURNS[orientation](pixels)), name
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif)
    with Image.open(tmp_path / "a.jpg") as stored:
        assert stored.size == (8, 5)
        assert np.array_equal(levels(tmp_path / "a.jpg"), ImageOps.exif_transpose(stored))
    sixteen = noise(5, 8).astype(np.uint16) * 257
    for order in "<>":
        put_tiff(tmp_path / "a.tif", sixteen, order, orientation)
        assert np.array_equal(levels(tmp_path / "a.tif"), gray3(TURNS[orientation](sixteen // 257)))


def test_views_are_of_the_upright_image(tmp_path):
    y, x = np.mgrid[:256, :256].astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # the stored rows are the columns that one sees, from right to left
    Image.fromarray(np.stack([x, y, 0 * x], -1)).save(tmp_path / "a.png", exif=exif)
    photos = Photos([str(tmp_path / "a.png")], 64, workers=0)
    for view in (photos[0, None], *(photos[0, seed] for seed in range(5))):
        red, green = view.int()[:2]
        assert (red[-1] - red[0]).min() > 10 and (red[:, 0] - red[:, -1]).abs().max() <= 1
        assert (green[:, 0] - green[:, -1]).abs().min() > 10


def test_small_folder_images_stand_upright(tmp_path):
    pixels, exif = noise(8, 8, 3), Image.Exif()
    exif[0x0112] = 8
    for split in ("train", "test"):
        put(tmp_path / split / "x" / "a.png", pixels)
        (tmp_path / split / "y").mkdir()
        Image.fromarray(np.rot90(pixels, -1).copy()).save(tmp_path / split / "y" / "b.png", exif=exif)
    first, second = load_data("folder", tmp_path).train_images
    assert torch.equal(first, second) and torch.equal(first, as_tensor(pixels))


def test_kinds_of_images(tmp_path):
    """Every mode becomes three channels: colours of a palette, gray three times, alpha left out."""
    gray, two, four, bits = noise(9, 7), noise(9, 7, 2, seed=1), noise(9, 7, 4, seed=2), noise(9, 7, seed=4) > 127
    palette = Image.fromarray(noise(9, 7, 3, seed=3)).quantize(16)
    colours = np.array(palette.getpalette()).reshape(-1, 3)[np.asarray(palette)]
    ink = noise(9, 7, 4, seed=5)
    ink[..., 3] = 0  # no black: red is what cyan leaves
    kinds = {
        "1.png": (Image.fromarray(bits), gray3(bits * 255)),
        "l.png": (gray, gray3(gray)),
        "la.png": (two, gray3(two[..., 0])),
        "rgba.png": (four, four[..., :3]),
        "p.gif": (palette, colours),
        "p.png": (palette, colours),
        "cmyk.tif": (Image.fromarray(ink, "CMYK"), 255 - ink[..., :3]),
        "rgb.bmp": (four[..., :3], four[..., :3]),
        "rgb.ppm": (four[..., :3], four[..., :3]),
    }
    for name, (image, want) in kinds.items():
        put(tmp_path / name, image)
        assert np.array_equal(levels(tmp_path / name), want), name
    palette.save(tmp_path / "transparent.png", transparency=int(np.asarray(palette)[0, 0]))
    assert np.array_equal(levels(tmp_path / "transparent.png"), colours)
    put(tmp_path / "cmyk.jpg", Image.new("CMYK", (9, 7), (0, 200, 255, 0)))
    assert np.abs(levels(tmp_path / "cmyk.jpg") - [255, 55, 0]).max() <= 4


# -----------------------------------------------------------------------------
# Sound images with odd EXIF
# -----------------------------------------------------------------------------


def put_png(path, *chunks, size=(16, 16), row=bytes(16 * 3), after=True):
    """A PNG of equal rows by its specification, with more chunks [(name, content)] after the pixels or before."""
    head = struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
    pixels = (b"IDAT", zlib.compress((b"\0" + row) * 16))
    body = [pixels, *chunks] if after else [*chunks, pixels]
    content = b"\x89PNG\r\n\x1a\n"
    for name, part in ((b"IHDR", head), *body, (b"IEND", b"")):
        content += struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part))
    path.write_bytes(content)


def exif(*tags, more=b"", first=8):
    """EXIF by its specification: tags (number, type, count, value), what follows them, and where they begin."""
    entries = [struct.pack(">HHI", *tag) + value.ljust(4, b"\0") for *tag, value in tags]
    head = struct.pack(">2sHIH", b"MM", 42, first, len(entries))
    return head + b"".join(entries) + bytes(4) + more


TURNED = (0x0112, 3, 1, b"\0\6")  # orientation 6
BEHIND = struct.pack(">I", 38)  # where `more` stands after two tags
PNG_EXIF = {  # chunks whose EXIF says nothing
    "no TIFF header": (b"eXIf", b"garbage!"),
    "four bytes": (b"eXIf", b"MM\0*"),
    "no bytes": (b"eXIf", b""),
    "first tags nowhere": (b"eXIf", exif(TURNED, first=2**32 - 16)),
    "a text named exif": (b"tEXt", b"exif\0made in spring"),
    "a text in UTF-8 named exif": (b"iTXt", b"exif\0\0\0\0\0made in spring"),
    "raw profile without hexadecimal": (b"tEXt", b"Raw profile type exif\0\nexif\n  10\nzzzz\n"),
    "raw profile cut off": (b"tEXt", b"Raw profile type exif\0\nexif\n   8\n4578\n"),
    "raw profile empty": (b"tEXt", b"Raw profile type exif\0"),
    "raw profile compressed garbage": (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"garbage")),
    "XMP": (b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0tiff:Orientation="x"'),
}
JPEG_EXIF = {  # EXIF whose orientation cannot be read
    "text orientation": exif((0x0112, 2, 2, b"6\0")),
    "orientation of bytes": exif((0x0112, 7, 1, b"\6")),
    "orientation 99": exif((0x0112, 3, 1, b"\0\x63")),
    "orientation 6/0": exif((0x0112, 5, 1, struct.pack(">I", 26)), more=struct.pack(">II", 6, 0)),
    "no TIFF header": b"garbage!",
    "cut in its header": exif(TURNED)[:4],
    "cut in its tag": exif(TURNED)[:14],
    "nothing": b"",
    "first tags nowhere": exif(TURNED, first=2**32 - 16),
}
JPEG_TURNED = {  # EXIF whose orientation can be read, and whose other tags cannot all
    "a text that holds a number": exif(TURNED, (0x0131, 12, 1, BEHIND), more=struct.pack(">d", 1.5)),
    "a whole number in a text": exif(TURNED, (0x013B, 3, 1, b"\0\7")),
    "a number that is a text": exif(TURNED, (0x011A, 2, 3, b"72\0")),
    "a width that is a text": exif((0x0100, 2, 3, b"72\0"), TURNED),
    "a resolution below 0": exif(TURNED, (0x011A, 10, 1, BEHIND), more=struct.pack(">ii", -7, 3)),
    "a resolution of 0/0": exif(TURNED, (0x011A, 5, 1, BEHIND), more=bytes(8)),
    "a value nowhere": exif(TURNED, (0x011A, 5, 1, b"\x7f\xff\xff\xff")),
    "a text without end": exif(TURNED, (0x010F, 2, 2**31 - 1, b"\0\0\0\x08")),
    "an unknown type": exif(TURNED, (0x010F, 77, 1, b"abc")),
    "GPS nowhere": exif(TURNED, (0x8825, 4, 1, b"\0\xff\xff\xff")),
    "GPS as text": exif(TURNED, (0x8825, 2, 2, b"8\0")),
    "more tags nowhere": exif(TURNED, (0x8769, 4, 1, b"\xff\xff\xff\xff")),
}


@pytest.mark.filterwarnings("ignore")  # Pillow warns of some
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("chunk", PNG_EXIF.values(), ids=list(PNG_EXIF))
def test_pngs_whose_exif_cannot_be_read_are_shown_as_stored(chunk, after, tmp_path):
    row = noise(16, 3)
    put_png(tmp_path / "a.png", chunk, row=row.tobytes(), after=after)
    assert np.array_equal(levels(tmp_path / "a.png"), np.broadcast_to(row, (16, 16, 3)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("content", [*JPEG_EXIF.values(), *JPEG_TURNED.values()], ids=[*JPEG_EXIF, *JPEG_TURNED])
def test_jpegs_with_odd_exif_are_upright_where_that_is_known(content, tmp_path):
    pixels = Image.fromarray(noise(8, 12, 3))
    pixels.save(tmp_path / "plain.jpg")
    pixels.save(tmp_path / "odd.jpg", exif=b"Exif\0\0" + content)
    want = levels(tmp_path / "plain.jpg")
    if content in JPEG_TURNED.values():
        want = np.rot90(want, -1)
    assert np.array_equal(levels(tmp_path / "odd.jpg"), want)


def test_a_webp_with_odd_exif_is_shown_as_stored(tmp_path):
    pixels = noise(8, 12, 3)
    Image.fromarray(pixels).save(tmp_path / "a.webp", lossless=True, exif=b"garbage!")
    assert np.array_equal(levels(tmp_path / "a.webp"), pixels)


# -----------------------------------------------------------------------------
# Damaged files
# -----------------------------------------------------------------------------


def cut_jpeg(path, **options):
    jpeg = io.BytesIO()
    Image.fromarray(noise(80, 80, 3)).save(jpeg, "JPEG", **options)
    path.write_bytes(jpeg.getvalue()[:2000])


def cut_png(path):
    put_png(path, row=noise(48).tobytes())
    path.write_bytes(path.read_bytes()[:100])


DAMAGE = {
    "profile.png": lambda path: put_png(path, (b"iCCP", b"")),  # IndexError in Pillow
    "exif.jpg": lambda path: cut_jpeg(path, exif=b"Exif\0\0garbage"),  # odd EXIF hides no damage
    "bomb.png": lambda path: put_png(path, size=(60_000, 60_000)),  # DecompressionBombError
    "cut.png": cut_png,
    "cut.jpg": cut_jpeg,
    "text.jpg": lambda path: path.write_text("<html>404\nNot Found</html>"),
    "empty.png": lambda path: path.write_bytes(b""),
    "float.tif": lambda path: put_tiff(path, np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)),
    "deep.tif": lambda path: put_tiff(path, np.full((16, 16), 70_000, np.int32)),
    "negative.tif": lambda path: put_tiff(path, np.full((16, 16), -5, np.int32)),
    "missing.png": lambda path: None,
    "folder.png": lambda path: path.mkdir(),
}


def refused(use, path):
    """The message of the InputError of `use()`, which must be one line that names the file."""
    with pytest.raises(InputError) as e:
        use()
    message = str(e.value)
    assert message.splitlines() == [message] and message.count(str(path)) >= 1 and "Traceback" not in message
    return message


def test_the_images_here_are_good_before_they_are_damaged(tmp_path):
    put_png(tmp_path / "a.png", (b"tEXt", b"Comment\0hello"))
    put_tiff(tmp_path / "a.tif", np.full((16, 16), 65535, np.int32))
    assert levels(tmp_path / "a.png").tolist() == np.zeros((16, 16, 3)).tolist()
    assert levels(tmp_path / "a.tif").tolist() == np.full((16, 16, 3), 255).tolist()


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_images(name, tmp_path):
    """The same single line from this process and from a worker."""
    bad = tmp_path / name
    DAMAGE[name](bad)
    put_number(tmp_path / "good.png", 1)
    said = {refused(lambda: load_image(bad), bad)}
    for workers, train in ((0, True), (0, False), (1, True)):
        photos = Photos([str(tmp_path / "good.png"), str(bad)], 64, workers)
        read = functools.partial(views, photos, [torch.tensor([0]), torch.tensor([1])], train)
        said.add(refused(read, bad))
    assert len(said) == 1


def test_images_in_floating_point_are_told_what_to_do(tmp_path):
    DAMAGE["float.tif"](tmp_path / "float.tif")
    assert "floating point" in refused(lambda: load_image(tmp_path / "float.tif"), tmp_path / "float.tif")


@pytest.mark.parametrize("kind", [IndexError, KeyError, struct.error, ZeroDivisionError, MemoryError, RecursionError,
                                  AssertionError, NotImplementedError, SyntaxError, OSError])  # fmt: skip
def test_whatever_pillow_raises_is_one_line(kind, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise kind("first line\nsecond line")

    path = tmp_path / "a.png"
    put_number(path, 1)
    for function in ("open", "Image.load", "Image.convert"):
        with monkeypatch.context() as patch:
            patch.setattr(f"PIL.Image.{function}", broken)
            here = refused(lambda: load_image(path), path)
            there = refused(lambda: views(Photos([str(path)], 64, 1), [torch.tensor([0])], True), path)
        assert here == there and kind.__name__ in here


def test_code_named_like_an_image_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content in (b"cos\nmkdir\n(S'trap'\ntR.", b"import os\nos.mkdir('trap')\n"):  # a pickle, Python
        Path("1.jpg").write_bytes(content)
        refused(lambda: load_image("1.jpg"), "1.jpg")
    assert not Path("trap").exists()


# -----------------------------------------------------------------------------
# Views
# -----------------------------------------------------------------------------

SIZES = [(90, 131), (300, 201), (74, 73), (73, 200), (21, 30), (64, 64), (147, 220), (146, 74), (3, 40)]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    for i, size in enumerate(SIZES):
        put(root / f"{i}.png", noise(*size, 3, seed=i))
    return sorted(map(str, root.iterdir()))


def middle(path, size):
    """What evaluation shows of an image, by Pillow: the shorter side 256/224 of the size, of that the middle."""
    image = Image.open(path)
    short, scaled = min(image.size), {64: 73, 224: 256}[size]
    image = image.resize([int(scaled * side / short) for side in image.size], Image.Resampling.BILINEAR)
    left, top = (round((side - size) / 2) for side in image.size)
    return as_tensor(image.crop((left, top, left + size, top + size)))


@pytest.mark.parametrize("size", [64, 224])
def test_evaluation_is_the_middle_of_the_scaled_image(size, pictures):
    ours = views(Photos(pictures, size, workers=0), torch.arange(len(pictures)).split(4))
    for path, image in zip(pictures, ours, strict=True):
        assert torch.equal(image, middle(path, size)), path


def drawn(path, seed, size):
    """What training shows of an image: a box that torchvision draws, cut out, scaled and mirrored by Pillow."""
    image = Image.open(path)
    torch.manual_seed(seed)
    box = v2.RandomResizedCrop(size, scale=(0.08, 1), ratio=(3 / 4, 4 / 3)).make_params([image])
    left, top = box["left"], box["top"]
    image = image.crop((left, top, left + box["width"], top + box["height"]))
    image = image.resize((size, size), Image.Resampling.BILINEAR)
    if torch.rand(1) < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return as_tensor(image)


@pytest.mark.parametrize("size", [64, 224])
def test_training_shows_torchvisions_boxes_of_the_file_itself(size, pictures):
    photos = Photos(pictures, size, workers=0)
    for i, path in enumerate(pictures):
        for seed in (i, 1000 + i, 2**62 + i):
            assert torch.equal(photos[i, seed], drawn(path, seed, size))
    assert len({photos[0, seed].numpy().tobytes() for seed in range(20)}) == 20


def test_training_mirrors_half_and_moves(tmp_path):
    """Level = place: red from left to right, green from top to bottom. Neighbours are drawn apart."""
    y, x = np.mgrid[:256, :256].astype(np.uint8)
    put(tmp_path / "a.png", np.stack([x, y, 0 * x], -1))
    photos = Photos([str(tmp_path / "a.png")] * 600, 64, workers=0)
    red, green, blue = views(photos, torch.arange(600).split(100), True).float().unbind(1)
    across, down = (red[:, 32, 48] - red[:, 32, 16]) * 2, (green[:, 48, 32] - green[:, 16, 32]) * 2
    assert (red[:, :1] - red).abs().max() <= 1 and (down > 0).all() and blue.max() == 0
    mirrored = across < 0
    assert abs(mirrored.float().mean() - 0.5) < 0.08
    assert abs((mirrored[1:] == mirrored[:-1]).float().mean() - 0.5) < 0.08
    share = across.abs() * down / 256**2
    assert share.min() < 0.1 and share.max() > 0.8 and 0.4 < share.mean() < 0.6
    assert all(abs(c[:, 32, 32].mean() - 127.5) < 6 and c[:, 32, 32].std() > 20 for c in (red, green))


@pytest.fixture
def cores(monkeypatch):
    """This process may use four."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)), raising=False)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # there may be fewer cores
def test_views_depend_on_seed_epoch_and_position_alone(pictures, cores):
    """Not on the number of workers, on the batches' size, or on what else draws random numbers."""
    order, labels = torch.arange(8).roll(3), torch.arange(len(pictures))
    found = []
    for workers in (0, 1, 3):
        photos = Photos(pictures, 64, workers)
        torch.manual_seed(3)
        epochs = [views(photos, order.split(4), True) for _ in range(2)]
        found.append((*epochs, torch.rand(5)))
    for part in zip(*found):
        assert all(torch.equal(x, part[0]) for x in part)
    first, second, _ = found[0]
    assert not any(torch.equal(a, b) for a, b in zip(first, second))

    torch.manual_seed(4)
    assert not torch.equal(views(photos, order.split(4), True), first)

    photos.workers = 0
    torch.manual_seed(3)
    for i, (x, y) in enumerate(loader(photos, labels, order.view(4, 2), True)):
        assert torch.equal(x, first[2 * i : 2 * i + 2]) and torch.equal(y, order[2 * i : 2 * i + 2])
        torch.rand(7)


@pytest.mark.parametrize("as_tuple", [False, True])
def test_an_image_that_is_drawn_twice_has_two_views(as_tuple, pictures, cores):
    order = torch.tensor([[0, 0], [1, 0]])
    found = []
    for workers in (0, 2):
        torch.manual_seed(5)
        found.append(views(Photos(pictures, 64, workers), tuple(order) if as_tuple else order, True))
    assert torch.equal(*found) and len({x.numpy().tobytes() for x in found[0]}) == 4
    shown_again = views(Photos(pictures, 64, 0), order)  # evaluation shows one
    assert torch.equal(shown_again[0], shown_again[1]) and torch.equal(shown_again[0], shown_again[3])


def test_reading_leaves_the_generators_as_they_are(pictures, monkeypatch):
    """A view draws from a generator of its own: not from the process's, and no GPU is seeded."""
    called = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", called.append)
    monkeypatch.setattr(torch.cuda, "manual_seed", called.append)
    photos, state = Photos(pictures, 64, workers=0), torch.get_rng_state()
    photos[0, 5], photos[0, None]
    assert torch.equal(torch.get_rng_state(), state)
    for workers in (0, 1):
        photos.workers = workers
        views(photos, [torch.tensor([0, 1])])  # evaluation draws nothing
        assert torch.equal(torch.get_rng_state(), state)
    batch = loader(photos, torch.arange(9), torch.arange(8).split(2), True)
    next(batch)
    state = torch.get_rng_state()  # one seed for the epoch, when it starts
    assert len(list(batch)) == 3 and torch.equal(torch.get_rng_state(), state)
    with pytest.raises(InputError):
        Photos([f"{pictures[0]}.gone"], 64, workers=0)[0, 5]
    assert torch.equal(torch.get_rng_state(), state) and not called


# -----------------------------------------------------------------------------
# Workers
# -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2])
def test_workers(workers, cores, monkeypatch):
    """Without workers no process is started; with them a DataLoader waits for an hour."""
    given, here = [], os.getpid()

    def spy(*args, **kwargs):
        given.append(kwargs)
        return torch.utils.data.DataLoader(*args, **kwargs)

    def read(path):
        return Image.new("L", (80, 80), 255 if os.getpid() == here else 0).convert("RGB")

    monkeypatch.setattr(common, "DataLoader", spy)
    monkeypatch.setattr(common, "load_image", read)
    others = set(multiprocessing.active_children())
    batch = loader(Photos(["a"] * 8, 64, workers), torch.arange(8), torch.arange(8).split(2), True)
    x, _ = next(batch)
    started = set(multiprocessing.active_children()) - others
    assert len(started) == workers and x.unique().tolist() == [0 if workers else 255]
    assert given[0]["num_workers"] == workers and given[0]["timeout"] == (3600 if workers else 0)
    batch.close()  # an epoch that is not read to its end
    for process in started:  # one that was told to end takes a moment
        process.join(10)
    assert not any(process.is_alive() for process in started)


@pytest.mark.parametrize("affinity", [True, False])
def test_no_more_workers_than_cores(affinity, pictures, monkeypatch):
    if affinity:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5}, raising=False)
    else:
        monkeypatch.delattr(os, "sched_getaffinity", raising=False)
        monkeypatch.setattr(os, "cpu_count", lambda: 1)
    others = set(multiprocessing.active_children())
    batch = loader(Photos(pictures, 64, 16), torch.arange(8), torch.arange(8).split(2), True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        next(batch)
    assert len(set(multiprocessing.active_children()) - others) == 1
    batch.close()


def broken(says, photos):
    """Reading fails with one line, which names likely causes and what to do."""
    with pytest.raises(InputError) as e:
        views(photos, torch.arange(8).split(2), True)
    message = str(e.value)
    assert message.splitlines() == [message] and "Traceback" not in message
    assert all(part in message for part in (says, "/dev/shm", "memory", "TMPDIR", "suspended", "--workers 0"))
    del e
    gc.collect()  # the last DataLoader's end would swallow the next one's error


def in_a_worker(monkeypatch, happens):
    here = os.getpid()
    monkeypatch.setattr(common, "load_image", lambda path: happens() if os.getpid() != here else Image.open(path))
    monkeypatch.setattr(common, "WORKER_TIMEOUT", 30)  # should a signal be lost


def test_a_worker_that_hangs(pictures, monkeypatch):
    in_a_worker(monkeypatch, lambda: time.sleep(60))
    monkeypatch.setattr(common, "WORKER_TIMEOUT", 2)
    broken("timed out after 2", Photos(pictures, 64, 1))


def test_a_worker_that_dies(pictures, monkeypatch):
    in_a_worker(monkeypatch, lambda: os._exit(1))
    broken("exited unexpectedly", Photos(pictures, 64, 1))


@pytest.mark.parametrize("kind, text", [(RuntimeError, "unable to write to file </torch_1_2>: No space left on device"),
                                        (OSError, "AF_UNIX path too long")])  # fmt: skip
def test_a_worker_that_fails(kind, text, pictures, monkeypatch):
    def fail():
        raise kind(text)

    in_a_worker(monkeypatch, fail)
    broken(text, Photos(pictures, 64, 1))


def test_workers_that_cannot_be_started(pictures, monkeypatch):
    def fail(*args):
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", fail)
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", fail)
    broken("Resource temporarily unavailable", Photos(pictures, 64, 1))


def test_workers_need_no_shared_memory_and_no_sockets(pictures, monkeypatch, tmp_path):
    """Neither a full /dev/shm nor a TMPDIR with a path too long for a socket keeps a batch from arriving."""
    order = torch.arange(8).split(4)
    want = views(Photos(pictures, 64, 0), order)
    deep = tmp_path / ("x" * 120)
    deep.mkdir()
    monkeypatch.setattr(multiprocessing.util, "get_temp_dir", lambda: str(deep))
    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", None)  # what takes place in /dev/shm
    assert torch.equal(views(Photos(pictures, 64, 1), order), want)


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_the_training_code_pass(workers, pictures):
    with pytest.raises(RuntimeError, match="^mine$"):
        for _ in loader(Photos(pictures, 64, workers), torch.arange(8), torch.arange(8).split(2), True):
            raise RuntimeError("mine")


def test_without_workers_errors_that_are_no_images_keep_their_traceback(pictures, monkeypatch):
    def fail(path):
        raise RuntimeError("mine")

    monkeypatch.setattr(common, "load_image", fail)
    with pytest.raises(RuntimeError, match="^mine$"):
        views(Photos(pictures, 64, 0), torch.arange(8).split(2), True)


# -----------------------------------------------------------------------------
# Batches
# -----------------------------------------------------------------------------


def test_photographs_on_a_device(tmp_path):
    two_classes(tmp_path)
    data = load_data("folder", tmp_path, 64, workers=1).to("meta")
    (x, y), = loader(*data[:2], [torch.tensor([4, 1])], True)  # fmt: skip
    assert x.device.type == y.device.type == "meta" and x.shape == (2, 3, 64, 64) and y.shape == (2,)
    assert data.classes == ["a", "b"]
    assert shown(data.train_images, torch.arange(6))[3:] == [(1, 3), (3, 4), (5, 5)]


def test_batches_of_photographs(tmp_path):
    for k in range(20):
        put_number(tmp_path / f"{k:02}.png", k)
    photos, order = Photos(sorted(map(str, tmp_path.iterdir())), 64, workers=1), batch_indices(20, 6, seed=1)
    labels = torch.arange(100, 120)
    for train in (False, True):
        for (x, y), batch in zip(loader(photos, labels, order, train), order, strict=True):
            red, green = x[:, :2].float().mean((2, 3)).div(16).int().unbind(1)
            assert torch.equal(red * 16 + green, batch) and torch.equal(y, labels[batch])


def test_mean_std_of_photographs_is_imagenets():
    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.transforms()
    mean, std = mean_std(Photos(["nowhere.jpg"], 224))
    assert torch.equal(mean, torch.tensor(weights.mean)) and torch.equal(std, torch.tensor(weights.std))


def test_loader_of_tensors():
    images, labels = torch.from_numpy(noise(40, 3, 8, 8)), torch.arange(40)
    order = torch.randperm(40).split(16)
    for (x, y), batch in zip(loader(images, labels, order, False), order, strict=True):
        assert torch.equal(x, images[batch]) and torch.equal(y, batch)
    seen = torch.cat([x for x, _ in loader(images, labels, order, True)])
    sources = images[torch.cat(order)]
    assert all({*a.flatten().tolist()} <= {0, *b.flatten().tolist()} for a, b in zip(seen, sources))
    assert (seen != sources).flatten(1).any(1).sum() > 35
