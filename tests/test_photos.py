"""common.py's photographs. Oracles: Pillow and NumPy for pixels, torchvision for views, files made here for layouts."""

import gc
import multiprocessing
import os
import signal
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torchvision.transforms import v2

import common
from common import InputError, Photos, batch_indices, load_data, load_image, loader, mean_std, stem_for
from test_data import noise, put

torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.1  # else torch waits 5 s for every worker that failed


def fail(kind, *arguments):
    raise kind(*arguments)


def put_number(path, k):
    """An image of one colour, which neither a crop nor JPEG hides: its number k < 256."""
    put(path, Image.new("RGB", (12, 9), (k // 16 * 16 + 5, k % 16 * 16 + 5, 99)))


def shown(images, labels, train=False):
    """What `loader` shows of put_number's images: [(number, label)]."""
    pairs = []
    for x, y in loader(images, labels, torch.arange(len(images)).split(4), train):
        assert x.shape == (len(y), *images.shape[1:]) and x.dtype == torch.uint8
        red, green = x[:, :2].float().mean((2, 3)).div(16).int().unbind(1)
        pairs += zip((red * 16 + green).tolist(), y.tolist())
    return pairs


def views(images, order, train=False, workers=None):
    """All batches of `order` as one uint8 tensor."""
    labels = torch.zeros(len(images), dtype=torch.int64)
    return torch.cat([x for x, _ in loader(images, labels, order, train, workers)])


def sports(root, counts):
    for name, count in zip(["RockClimbing", "badminton", "polo"], counts):
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"{i:03}.jpg").touch()


@pytest.mark.parametrize("inside", ["", "event_img"])
def test_sport8(inside, tmp_path):
    """70 images of every class to train on and 60 others to test, drawn by the seed alone."""
    sports(tmp_path / inside, (130, 131, 133))
    (tmp_path / inside / "polo" / "._001.jpg").touch()
    data = load_data("sport8", tmp_path)
    paths = data.train_images.paths + data.test_images.paths
    assert len(set(paths)) == 390 and data.train_images.shape == (210, 3, 224, 224)
    assert data.classes == ["RockClimbing", "badminton", "polo"]
    labels = torch.cat([data.train_labels, data.test_labels]).tolist()
    assert [data.classes[label] for label in labels] == [Path(path).parent.name for path in paths]
    assert data.train_labels.bincount().tolist() == [70] * 3 and data.test_labels.bincount().tolist() == [60] * 3
    names = [Path(path).name for path in paths]
    assert names[:70] != names[70:140]  # every class has its own draw

    torch.manual_seed(9)
    again, other = load_data("sport8", tmp_path, seed=0), load_data("sport8", tmp_path, seed=1)
    assert again.train_images.paths == paths[:210] and set(other.train_images.paths) != set(paths[:210])


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


UNUSABLE = {  # data set, what happens to MIT67's layout, and what the message says
    "no list": ("mit67", lambda root: (root / "TestImages.txt").unlink(), "TestImages.txt"),
    "listed file": ("mit67", lambda root: (root / "Images/bar/1.jpg").unlink(), "bar/1.jpg"),
    "empty list": ("mit67", lambda root: (root / "TestImages.txt").write_text("\n"), "empty"),
    "class only in test": ("mit67", lambda root: (root / "TrainImages.txt").write_text("bar/0.jpg"), "cellar/7.jpg"),
    "no val": ("imagenet", lambda root: (root / "Images").rename(root / "train"), "(or val/)"),
    "few images": ("sport8", lambda root: sports(root / "event_img", (130, 129, 131)), "badminton has 129 images"),
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


@pytest.mark.parametrize("dataset, size", [("imagenet", None), ("imagenet", 96), ("folder", 64), ("folder", 63)])
def test_folders_of_photographs(dataset, size, tmp_path):
    """From 64 pixels on images are files; the labels of the images to test on are those of train/."""
    names = ["train/a/x", "train/b/x", "train/c/deep/x", "val/c/deep/x", "val/a/x", "val/.b/x", "val/b/._x"]
    for k, name in enumerate(names):
        put_number(tmp_path / f"{name}.png", k)
    data = load_data(dataset, tmp_path, size, workers=1)
    assert data.classes == ["a", "b", "c"] and isinstance(data.train_images, torch.Tensor) == (size == 63)
    assert data.train_images.shape == (3, 3, size or 224, size or 224) and len(data.test_images) == 2
    assert stem_for(data.train_images) == ("cifar" if size == 63 else "imagenet")
    assert shown(*data[:2]) == [(0, 0), (1, 1), (2, 2)] and shown(*data[2:4]) == [(4, 0), (3, 2)]


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


def test_16_bits_of_gray_are_scaled_to_8(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 65536, (40, 30), dtype=np.uint16)
    pixels[0, :5] = 65535, 32896, 0, 257, 128
    want = np.rint(pixels / 65535 * 255).astype(np.uint8)
    assert want[0, :5].tolist() == [255, 128, 0, 1, 0]
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "a.pgm").write_bytes(b"P5 30 40 65535\n" + pixels.astype(">u2").tobytes())
    for name in ("a.png", "a.pgm"):
        assert np.array_equal(levels(tmp_path / name), gray3(want)), name


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


@pytest.mark.parametrize("orientation", TURNS)
def test_images_stand_upright(orientation, tmp_path):
    """EXIF's orientation, in every format that has one, as NumPy turns arrays and as Pillow's viewers do."""
    pixels, exif = noise(5, 8, 3), Image.Exif()
    exif[0x0112] = orientation
    for name in ("a.png", "a.tif", "a.webp"):
        Image.fromarray(pixels).save(tmp_path / name, exif=exif, **{"lossless": True} if name == "a.webp" else {})
        assert np.array_equal(levels(tmp_path / name), TURNS[orientation](pixels)), name
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif)
    assert np.array_equal(levels(tmp_path / "a.jpg"), ImageOps.exif_transpose(Image.open(tmp_path / "a.jpg")))
    sixteen = noise(5, 8).astype(np.uint16) * 257
    for order in "<>":
        put_tiff(tmp_path / "a.tif", sixteen, order, orientation)
        assert np.array_equal(levels(tmp_path / "a.tif"), gray3(TURNS[orientation](sixteen // 257)))


def test_kinds_of_images(tmp_path):
    """Every mode becomes three channels: colours of a palette, gray three times, alpha left out."""
    rgba = noise(9, 7, 4, seed=2)
    palette = Image.fromarray(rgba[..., :3].copy()).quantize(16)
    ink = rgba * [1, 1, 1, 0]  # no black: red is what cyan leaves
    kinds = {
        "la.png": (rgba[..., :2].copy(), gray3(rgba[..., 0])),
        "rgba.png": (rgba, rgba[..., :3]),
        "p.gif": (palette, np.array(palette.getpalette()).reshape(-1, 3)[np.asarray(palette)]),
        "cmyk.tif": (Image.fromarray(ink.astype(np.uint8), "CMYK"), 255 - ink[..., :3]),
    }
    for name, (image, want) in kinds.items():
        put(tmp_path / name, image)
        assert np.array_equal(levels(tmp_path / name), want), name


TURNED = (0x0112, 3, 1, b"\0\6")  # orientation 6


def exif(*tags):
    """EXIF by its specification: tags (number, type, count, value)."""
    entries = [struct.pack(">HHI", *tag) + value.ljust(4, b"\0") for *tag, value in tags]
    return struct.pack(">2sHIH", b"MM", 42, 8, len(entries)) + b"".join(entries) + bytes(4)


ODD_EXIF = {  # content, and whether its orientation can be read: other tags that cannot do not matter
    "no TIFF": (b"garbage!", False),
    "orientation in words": (exif((0x0112, 2, 2, b"6\0")), False),
    "orientation 99": (exif((0x0112, 3, 1, b"\0\x63")), False),
    "a width that is a text": (exif((0x0100, 2, 3, b"72\0"), TURNED), True),
    "a number that is a text": (exif(TURNED, (0x011A, 2, 3, b"72\0")), True),
}


@pytest.mark.filterwarnings("ignore")  # Pillow warns of some
@pytest.mark.parametrize("content, readable", ODD_EXIF.values(), ids=list(ODD_EXIF))
def test_damaged_exif_means_as_stored(content, readable, tmp_path):
    pixels = noise(8, 12, 3)
    for name in ("a.webp", "a.png"):
        Image.fromarray(pixels).save(tmp_path / name, lossless=True, exif=content)
        assert np.array_equal(levels(tmp_path / name), TURNS[6 if readable else 1](pixels)), name


def test_a_text_named_exif_is_no_exif(tmp_path):
    text = PngInfo()
    text.add_itxt("exif", "made in spring")
    Image.new("RGB", (4, 3)).save(tmp_path / "a.png", pnginfo=text)
    assert levels(tmp_path / "a.png").shape == (3, 4, 3)


def cut_jpeg(path):
    Image.fromarray(noise(80, 80, 3)).save(path, exif=b"Exif\0\0garbage")  # odd EXIF hides no damage
    path.write_bytes(path.read_bytes()[:2000])


DAMAGE = {  # what makes the file, and what the message says
    "cut.jpg": (cut_jpeg, "truncated"),
    "float.tif": (lambda path: put_tiff(path, np.zeros((16, 16), np.float32)), "it is in floating point"),
    "deep.tif": (lambda path: put_tiff(path, np.full((16, 16), 70_000, np.int32)), "more than 16 bits"),
    "negative.tif": (lambda path: put_tiff(path, np.full((16, 16), -5, np.int32)), "more than 16 bits"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_images(name, tmp_path):
    """The same single line, with the file's name, from this process and from a worker."""
    make, says = DAMAGE[name]
    make(tmp_path / name)
    photos = Photos([str(tmp_path / name)], 64)
    order = [torch.tensor([0])]
    messages = set()
    for read in (
        lambda: load_image(tmp_path / name),
        lambda: views(photos, order, False, workers=0),
        lambda: views(photos, order, True, workers=1),
    ):
        with pytest.raises(InputError, match=says) as e:
            read()
        messages.add(str(e.value))
    (message,) = messages
    assert str(tmp_path / name) in message and "\n" not in message and "Traceback" not in message


@pytest.mark.parametrize("kind", [KeyError, struct.error, MemoryError, SyntaxError])
@pytest.mark.parametrize("function", ["open", "Image.load", "Image.convert"])
def test_whatever_pillow_raises_names_the_file(kind, function, tmp_path, monkeypatch):
    put_number(tmp_path / "a.png", 1)
    monkeypatch.setattr(f"PIL.Image.{function}", lambda *args, **kwargs: fail(kind, "first line\nsecond line"))
    with pytest.raises(InputError, match=rf"^cannot use the image .*a.png: {kind.__name__}: .*$"):
        load_image(tmp_path / "a.png")


SIZES = [(90, 131), (300, 201), (74, 73), (73, 200), (21, 30), (64, 64), (147, 220), (146, 74), (3, 40)]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    for i, size in enumerate(SIZES):
        put(root / f"{i}.png", noise(*size, 3, seed=i))
    return sorted(map(str, root.iterdir()))


def as_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def middle(path, size):
    """What evaluation shows of an image, by Pillow: the shorter side 256/224 of the size, of that the middle."""
    image = Image.open(path)
    scale = {64: 73, 224: 256}[size] / min(image.size)
    image = image.resize([int(scale * side + 1e-9) for side in image.size], Image.Resampling.BILINEAR)
    left, top = (round((side - size) / 2) for side in image.size)
    return as_tensor(image.crop((left, top, left + size, top + size)))


def drawn(path, seed, size):
    """What training shows of an image: a box that torchvision draws, cut out, scaled and mirrored by Pillow."""
    image = Image.open(path)
    torch.manual_seed(seed)
    crop = v2.RandomResizedCrop(size, scale=(0.08, 1), ratio=(3 / 4, 4 / 3))
    draw = getattr(crop, "make_params", None) or crop._get_params  # its name in torchvision 0.19
    box = draw([image])
    left, top = box["left"], box["top"]
    image = image.crop((left, top, left + box["width"], top + box["height"]))
    image = image.resize((size, size), Image.Resampling.BILINEAR)
    if torch.rand(1) < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return as_tensor(image)


@pytest.mark.parametrize("size", [64, 224])
def test_views_are_those_of_pillow_and_torchvision(size, pictures):
    photos = Photos(pictures, size)
    for i, path in enumerate(pictures):
        assert torch.equal(photos[i, None], middle(path, size)), path
        for seed in (i, 2**62 + i):
            assert torch.equal(photos[i, seed], drawn(path, seed, size)), path


def test_views_depend_on_seed_epoch_and_position_alone(pictures):
    """Not on the number of workers, on the batches' size, or on what else draws random numbers."""
    photos, order = Photos(pictures, 64), torch.tensor([3, 3, 5, 0, 8, 1, 2, 7])
    found = []
    for workers in (0, 1, 2):
        torch.manual_seed(3)
        epochs = [views(photos, order.split(4), True, workers) for _ in range(2)]
        found.append((*epochs, torch.rand(5)))
    for part in zip(*found):
        assert all(torch.equal(x, part[0]) for x in part)
    first, second, _ = found[0]
    assert not any(torch.equal(a, b) for a, b in zip(first, second))
    assert not torch.equal(first[0], first[1])  # an image that an epoch draws twice has two views

    torch.manual_seed(4)
    assert not torch.equal(views(photos, order.split(4), True, 0), first)

    torch.manual_seed(3)
    for i, (x, _) in enumerate(loader(photos, torch.arange(9), order.view(4, 2), True, workers=0)):
        assert torch.equal(x, first[2 * i : 2 * i + 2])
        torch.rand(7)


def test_reading_leaves_the_generators_as_they_are(pictures, monkeypatch):
    """A view draws from a generator of its own: not from the process's, and no GPU is seeded."""
    for function in ("manual_seed", "manual_seed_all"):
        monkeypatch.setattr(torch.cuda, function, None)
    photos, state = Photos(pictures, 64, workers=0), torch.get_rng_state()
    views(photos, [torch.tensor([0, 1])])  # evaluation draws nothing
    with pytest.raises(InputError):
        Photos([f"{pictures[0]}.gone"], 64)[0, 5]
    assert torch.equal(torch.get_rng_state(), state)
    batch = loader(photos, torch.arange(9), torch.arange(8).split(2), True)
    next(batch)
    state = torch.get_rng_state()  # one seed for the epoch, when it starts
    assert len(list(batch)) == 3 and torch.equal(torch.get_rng_state(), state)


def test_batches_go_where_the_labels_are(pictures):
    photos, labels, order = Photos(pictures, 64, workers=1), torch.arange(10, 19), batch_indices(9, 4, seed=1)
    for (x, y), batch in zip(loader(photos, labels, order, False), order, strict=True):
        assert torch.equal(x, torch.stack([photos[i, None] for i in batch])) and torch.equal(y, labels[batch])
    x, y = next(loader(photos, labels.to("meta"), order, False))
    assert x.device.type == y.device.type == "meta" and x.shape == (4, 3, 64, 64)


def test_mean_std_of_photographs_is_imagenets():
    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.transforms()
    mean, std = mean_std(Photos(["nowhere.jpg"], 224))
    assert mean.tolist() == torch.tensor(weights.mean).tolist() and std.tolist() == torch.tensor(weights.std).tolist()


def workers_of(photos, **options):
    """How many processes a loader starts; they end with it."""
    others = set(multiprocessing.active_children())
    batch = loader(photos, torch.arange(9), torch.arange(8).split(2), True, **options)
    next(batch)
    started = set(multiprocessing.active_children()) - others
    batch.close()  # an epoch that is not read to its end
    for process in started:
        process.join(10)
    assert not any(process.is_alive() for process in started)
    return len(started)


def test_a_loader_starts_as_many_workers_as_are_asked_for_and_there_are_cores(pictures, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5}, raising=False)
    assert workers_of(Photos(pictures, 64, 0)) == 0
    assert workers_of(Photos(pictures, 64, 16)) == 2
    assert workers_of(Photos(pictures, 64, 2), workers=1) == 1  # two loaders share them
    assert workers_of(Photos(pictures, 64, 1), workers=0) == 0
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    assert workers_of(Photos(pictures, 64, 16)) == 1


def explained(error, says):
    """The one line that names likely causes and what to do."""
    message = str(error.value)
    assert "\n" not in message and "Traceback" not in message
    assert all(part in message for part in (says, "/dev/shm", "memory", "TMPDIR", "suspended", "--workers 0"))


FAULTS = {  # what happens in a worker, and what the message says
    "hangs": (lambda: time.sleep(60), "timed out after 2"),
    "ends": (lambda: os._exit(1), "exited unexpectedly"),
    "disk full": (lambda: fail(RuntimeError, "unable to write: No space left on device"), "No space left on device"),
}


@pytest.mark.parametrize("happens, says", FAULTS.values(), ids=list(FAULTS))
def test_a_worker_that_fails(happens, says, pictures, monkeypatch):
    gc.collect()  # what an earlier DataLoader leaves would swallow this one's error
    assert common.WORKER_TIMEOUT == 3600  # jobs are suspended
    monkeypatch.setattr(common, "WORKER_TIMEOUT", 2)
    monkeypatch.setattr(common, "load_image", lambda path: happens())
    with pytest.raises(InputError) as e:
        views(Photos(pictures, 64), [torch.tensor([0])], True, workers=1)
    explained(e, says)


def test_a_worker_that_cannot_be_started(pictures, monkeypatch):
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", lambda self: fail(OSError, "no more processes"))
    with pytest.raises(InputError) as e:
        views(Photos(pictures, 64), [torch.tensor([0])], True, workers=1)
    explained(e, "no more processes")


def test_a_fault_in_this_process_keeps_its_traceback(pictures, monkeypatch):
    monkeypatch.setattr(common, "load_image", lambda path: fail(RuntimeError, "mine"))
    with pytest.raises(RuntimeError, match="^mine$"):
        views(Photos(pictures, 64), [torch.tensor([0])], True, workers=0)


def test_a_worker_that_is_killed_while_the_network_computes(pictures):
    """torch raises wherever this process is: here in a line that has nothing to do with images."""
    gc.collect()
    with pytest.raises(InputError) as e, common.workers_explained():
        others = set(multiprocessing.active_children())
        batch = loader(Photos(pictures, 64), torch.arange(9), torch.arange(8).split(2), True, workers=1)
        next(batch)
        (worker,) = set(multiprocessing.active_children()) - others
        os.kill(worker.pid, signal.SIGKILL)
        for _ in range(1000):
            time.sleep(0.01)
    explained(e, "killed by signal: Killed")


def test_errors_of_the_training_code_pass(pictures):
    with pytest.raises(RuntimeError, match="^mine$"), common.workers_explained():
        for _ in loader(Photos(pictures, 64), torch.arange(8), torch.arange(8).split(2), True, 1):
            raise RuntimeError("mine")


def test_workers_need_no_shared_memory_and_no_sockets(pictures, monkeypatch, tmp_path):
    """Neither a full /dev/shm nor a TMPDIR with a path too long for a socket keeps a batch from arriving."""
    photos, order = Photos(pictures, 64), torch.arange(8).split(4)
    want = views(photos, order, workers=0)
    deep = tmp_path / ("x" * 120)
    deep.mkdir()
    monkeypatch.setattr(multiprocessing.util, "get_temp_dir", lambda: str(deep))
    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", None)  # what takes place in /dev/shm
    assert torch.equal(views(photos, order, workers=1), want)
