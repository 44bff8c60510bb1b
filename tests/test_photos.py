"""Photograph data sets of common.py: layouts made here, pixels of Pillow and torchvision, damaged files."""

import io
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision import transforms

import common
from common import InputError, Photos, load_data, loader, mean_std, random_box, stem_for
from test_data import noise, put

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

def levels(images, order, train=False):
    """All batches of `order` as one uint8 tensor."""
    found = loader(images, torch.zeros(len(images), dtype=torch.int64), order, train)
    return torch.cat([x for x, _ in found])

def names(data):
    """[(class, file)] to train on and to test on, whose labels must be those of their folders."""
    pairs = []
    for images, labels in (data[:2], data[2:4]):
        pairs.append([Path(file).parts[-2:] for file in images.files])
        assert [data.classes[k] for k in labels] == [name for name, _ in pairs[-1]]
    return pairs

def far(a, b):
    return (a.int() - b.int()).abs().max()

# -------- Layouts -------------------------------------------------------------------------------------------

def sports(root, counts):
    for name, count in zip(["RockClimbing", "badminton", "polo"], counts):
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"{i:03}.jpg").touch()

@pytest.mark.parametrize("inside", ["", "event_img"])
def test_sport8(inside, tmp_path):
    """70 images of every class to train on and 60 others to test, drawn by the seed alone."""
    sports(tmp_path / inside, (130, 131, 133))
    train, test = names(data := load_data("sport8", tmp_path, cache_gb=0))
    assert data.classes == ["RockClimbing", "badminton", "polo"] and data.test_images.shape[2:] == (224, 224)
    for part, count in ((train, 70), (test, 60)):
        files = [{file for other, file in part if other == name} for name in data.classes]
        assert [len(found) for found in files] == [count] * 3 and len(part) == 3 * count
        assert all(max(found) >= "120" and min(found) < "010" for found in files)
        assert files[0] != files[1] != files[2] != files[0]  # every class has its own draw
    assert len({*train, *test}) == 3 * 130
    torch.manual_seed(9)
    assert names(load_data("sport8", tmp_path, seed=0, cache_gb=0)) == [train, test]
    assert {*names(load_data("sport8", tmp_path, seed=1, cache_gb=0))[0]} != {*train}

def test_sport8_needs_130_images_a_class(tmp_path):
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
    data = load_data("mit67", indoor, workers=1, image_size=64)
    assert data.classes == ["bar", "inside_bus", "wine cellar"]
    assert shown(*data[:2]) == [(5, 2), (0, 0), (4, 1), (2, 0), (8, 2)]
    assert shown(*data[2:4]) == [(7, 2), (1, 0), (3, 1)]

def flat_val(root):
    put_number(root / "val" / "1.jpg", 1)
    (root / "Images").rename(root / "train")

LISTS = ("TrainImages.txt", "TestImages.txt")
UNUSABLE = {  # data set, what happens to MIT67's layout or an empty folder, and what the message must say
    "no list": ("mit67", lambda root: (root / LISTS[1]).unlink(), LISTS[1]),
    "empty list": ("mit67", lambda root: (root / LISTS[1]).write_text("\n"), "no images to train or test on"),
    "listed file": ("mit67", lambda root: (root / "Images/bar/1.jpg").unlink(), "bar/1.jpg"),
    "other class": ("mit67", lambda root: (root / LISTS[1]).write_text("Bar/1.jpg\n"), "Bar/1.jpg"),
    "not text": ("mit67", lambda root: (root / LISTS[0]).write_bytes(b"\xff\xfe\x00"), "check --data-dir"),
    "flat val": ("imagenet", flat_val, "imagenet has a folder a class"),
    "no val": ("imagenet", lambda root: (root / "Images").rename(root / "train"), "(or val/)"),
    "empty class": ("sport8", lambda root: (root / "event_img/polo").mkdir(parents=True), "polo"),
    "empty root": ("sport8", lambda root: (root / "event_img").mkdir(), "no images"),
    "no root": ("sport8", lambda root: root.rename(root.with_name("gone")), "check --data-dir"),
}

@pytest.mark.parametrize("dataset, change, says", UNUSABLE.values(), ids=list(UNUSABLE))
def test_layouts_that_cannot_be_used(dataset, change, says, indoor):
    change(indoor)
    with pytest.raises(InputError) as e:
        load_data(dataset, indoor)
    assert says in str(e.value) and str(indoor) in str(e.value) and "\n" not in str(e.value)

def test_flowers102(tmp_path, monkeypatch):
    savemat, root = pytest.importorskip("scipy.io").savemat, tmp_path / "flowers-102"
    monkeypatch.setattr(torchvision.datasets.flowers102, "check_integrity", lambda *args, **kwargs: True)
    flowers = np.array([77, 1, 102, 50, 50, 3, 9, 1])  # of images 1 to 8
    parts = {"trnid": [3, 1], "valid": [8, 4], "tstid": [2, 7, 5, 6]}
    for k in range(1, 9):
        put_number(root / "jpg" / f"image_{k:05}.jpg", k)
    savemat(root / "imagelabels.mat", {"labels": flowers[None]})
    savemat(root / "setid.mat", {name: np.array([part]) for name, part in parts.items()})
    data = load_data("flowers102", tmp_path, workers=1, image_size=64)
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
    assert shown(*data[:2]) == [(0, 0), (2, 0), (4, 0), (1, 1), (3, 1), (5, 1)]
    assert shown(*data[2:4]) == [(6, 0), (8, 0), (10, 0), (7, 1), (9, 1), (11, 1)]

def test_small_folder_images_are_tensors(tmp_path):
    two_classes(tmp_path)
    images = load_data("folder", tmp_path, 63).train_images
    assert images.shape == (6, 3, 63, 63) and images.dtype == torch.uint8 and stem_for(images) == "cifar"

def test_limits_keep_the_same_images_for_every_seed(tmp_path):
    for split, k in ((split, k) for split in ("train", "val") for k in range(60)):
        put_number(tmp_path / split / "ab"[k % 2] / f"{k}.png", k)
    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        found.append(names(load_data("imagenet", tmp_path, None, 20, 10, seed=seed, cache_gb=0)))
    assert found[0] == found[1] and [len(part) for part in found[0]] == [20, 10]
    assert all({name for name, _ in part} == {"a", "b"} for part in found[0])
    assert {*found[0][0]} < {*names(load_data("imagenet", tmp_path, cache_gb=0))[0]}

# -------- Pixels --------------------------------------------------------------------------------------------

SIZES = [(90, 131), (300, 201), (74, 73), (73, 200), (21, 30), (64, 64), (147, 220), (146, 74)]

@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    for i, size in enumerate(SIZES):
        put(root / f"{i}.png", noise(*size, 3, seed=i))
    return sorted(map(str, root.iterdir()))

def cached(files, size, workers=1):
    photos = Photos(files, size, workers)
    assert photos.cache(1e9) > 0 and photos.pixels is not None
    return photos

def middle(path, size):
    """What evaluation shows of an image, by Pillow."""
    image = transforms.CenterCrop(size)(transforms.Resize({64: 73, 224: 256}[size])(Image.open(path)))
    return transforms.functional.pil_to_tensor(image)

@pytest.mark.parametrize("size", [64, 224])
def test_evaluation_is_the_middle_of_the_scaled_image(size, pictures):
    ours = levels(cached(pictures, size), torch.arange(len(pictures)).split(3))
    assert all(far(middle(path, size), image) <= 1 for path, image in zip(pictures, ours, strict=True))

def drawn(path, seed):
    """What training shows of an image, by Pillow."""
    image, draw = Image.open(path), random.Random(seed)
    top, left, h, w = random_box(image.height, image.width, draw)
    part = image.crop((left, top, left + w, top + h)).resize((64, 64), Image.Resampling.BILINEAR)
    part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw.random() < 0.5 else part
    return torch.from_numpy(np.array(part)).permute(2, 0, 1)

def test_training_is_a_scaled_box_of_the_image(pictures):
    photos, scaled = Photos(pictures, 64), [path for path, size in zip(pictures, SIZES) if min(size) == 73]
    for i, path in enumerate(pictures):
        assert all(far(photos.view(i, seed), drawn(path, seed + i)) <= 2 for seed in range(20))
    photos = cached(scaled, 64)
    torch.manual_seed(5)
    seed = int(torch.randint(2**62, ()))
    torch.manual_seed(5)
    from_memory = levels(photos, torch.arange(2).split(1), True)
    assert all(far(image, drawn(scaled[i], seed + i)) <= 2 for i, image in enumerate(from_memory))

def test_training_mirrors_half_and_moves(tmp_path):
    """Level = place: red from left to right, green from top to bottom."""
    y, x = np.mgrid[:256, :256].astype(np.uint8)
    put(tmp_path / "a.png", np.stack([x, y, 0 * x], -1))
    photos = Photos([str(tmp_path / "a.png")] * 600, 64)
    red, green, blue = torch.stack([photos.view(i, 7) for i in range(600)]).float().unbind(1)
    across, down = (red[:, 32, 48] - red[:, 32, 16]) * 2, (green[:, 48, 32] - green[:, 16, 32]) * 2
    assert (red[:, :1] - red).abs().max() <= 1 and (down > 0).all() and blue.max() == 0
    assert abs((across < 0).float().mean() - 0.5) < 0.05
    share = across.abs() * down / 256**2
    assert share.min() < 0.1 and share.max() > 0.8 and 0.4 < share.mean() < 0.55
    assert all(abs(x[:, 32, 32].mean() - 127.5) < 5 and x[:, 32, 32].std() > 20 for x in (red, green))

BOXES = [(300, 400), (128, 128), (500, 150), (60, 260), (1, 1), (1000, 1), (30, 2000)]

@pytest.mark.parametrize("height, width", BOXES)
def test_random_box_is_torchvisions(height, width):
    """In area, ratio and place, also where nothing fits and the middle is taken."""
    stats, get = pytest.importorskip("scipy.stats"), transforms.RandomResizedCrop.get_params
    given = torch.empty(3, height, width), [0.08, 1.0], [3 / 4, 4 / 3]
    theirs = np.array([get(*given) for _ in range(2000)], float).T
    ours = np.array([random_box(height, width, random.Random(seed)) for seed in range(2000)], float).T
    top, left, h, w = ours
    assert min(top.min(), left.min(), h.min() - 1, w.min() - 1) >= 0
    assert (top + h).max() <= height and (left + w).max() <= width
    measures = [(h * w, w / h, top + h / 2, left + w / 2) for top, left, h, w in (ours, theirs)]
    assert all(stats.ks_2samp(a, b).pvalue > 1e-3 for a, b in zip(*measures))

@pytest.mark.parametrize("train", [False, True])
def test_runs_repeat_whatever_the_number_of_workers(train, pictures):
    order, memory, found = torch.arange(len(pictures)).roll(3).split(3), cached(pictures, 64), []
    for photos, workers in ((Photos(pictures, 64), 1), (Photos(pictures, 64), 2), (memory, 1), (memory, 3)):
        torch.manual_seed(3)
        photos.workers = workers
        found.append(levels(photos, order, train))
    assert torch.equal(found[0], found[1]) and torch.equal(found[2], found[3])
    assert torch.equal(found[0], found[2]) == (not train)  # a box of the file, or of the scaled image
    assert torch.equal(levels(memory, order, train), found[3]) == (not train)  # the next epoch

def test_large_jpegs_are_decoded_smaller_and_look_the_same(tmp_path):
    y, x = np.mgrid[:600, :800] / 100
    waves = np.stack([np.sin(x + c) * np.cos(y - c) * 100 + 128 for c in range(3)], -1).astype(np.uint8)
    put(tmp_path / "a.jpg", waves)
    photos = Photos([tmp_path / "a.jpg"], 64)
    assert far(photos.view(0), middle(tmp_path / "a.jpg", 64)) <= 4
    assert photos.read(0, scaled=False).shape == (3, 150, 200)

def test_kinds_of_images(tmp_path):
    """Every mode becomes three channels. 73 x 73 needs no scaling: what is seen are its pixels 4 to 68."""
    gray, two, four = noise(73, 73), noise(73, 73, 2, seed=1), noise(73, 73, 4, seed=2)
    palette = Image.fromarray(noise(73, 73, 3, seed=3)).quantize(16)
    colours = np.array(palette.getpalette()).reshape(-1, 3)[np.asarray(palette)].astype(np.uint8)
    sixteen = Image.fromarray(gray.astype(np.uint16) * 257)
    images = {"a.PNG": gray, "b.png": two, "c.Png": four, "d.png": palette, "e.png": sixteen}
    for name, image in (images | {"f.JPG": Image.new("CMYK", (73, 73), (0, 200, 255, 0))}).items():
        put(tmp_path / "train" / "x" / name, image)
    put(tmp_path / "test" / "x" / "long.TIFF", Image.new("RGB", (1, 1000), (9, 90, 200)))  # one image
    data = load_data("folder", tmp_path, 64, workers=1)
    ours = levels(data.train_images, [torch.arange(6)])
    gray3, two3 = np.stack([gray] * 3, -1), np.stack([two[..., 0]] * 3, -1)
    for image, pixels in zip(ours, (gray3, two3, four[..., :3], colours, gray3)):
        assert np.array_equal(image.permute(1, 2, 0), pixels[4:68, 4:68])
    assert far(ours[5], torch.tensor([255, 55, 0]).view(3, 1, 1)) <= 4
    long = torch.cat([levels(data.test_images, [torch.arange(1)], train) for train in (False, True)])
    assert far(long, torch.tensor([9, 90, 200]).view(3, 1, 1)) <= 1

# -------- Damage --------------------------------------------------------------------------------------------

@pytest.fixture
def damaged(tmp_path):
    """two_classes and, among the images to train on, a cut JPEG, an empty file and a page of text."""
    two_classes(tmp_path)
    jpeg = io.BytesIO()
    Image.fromarray(noise(80, 80, 3)).save(jpeg, "JPEG")
    bad = {"a/000.JPG": jpeg.getvalue()[:2000], "b/01b.png": b"", "b/99.jpg": b"<html>404 Not Found</html>"}
    for name, content in bad.items():
        (tmp_path / "train" / name).write_bytes(content)
    return tmp_path, [str(tmp_path / "train" / name) for name in bad]

@pytest.mark.parametrize("cache_gb", [0, 8])
def test_damaged_images(cache_gb, damaged, capsys):
    root, bad = damaged
    with pytest.raises(InputError, match=rf"^cannot read the image ({'|'.join(bad)}) [^\n]*$"):
        shown(*load_data("folder", root, 64, workers=1, cache_gb=cache_gb)[:2])
    data = load_data("folder", root, 64, workers=1, cache_gb=cache_gb, skip_damaged=True)
    for train in (False, True):
        assert shown(*data[:2], train, size=5) == [(0, 0), (2, 0), (4, 0), (1, 1), (3, 1), (5, 1)]
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(said) == 3 and said[2].endswith("skipped, 3 so far")  # not again in the next epoch
    assert all(sum(path in line for line in said) == 1 for path in bad) and len(shown(*data[2:4])) == 6
    for path in (root / "test").glob("*/*"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match="cannot read the image"):  # none is left
        shown(*load_data("folder", root, 64, workers=1, cache_gb=cache_gb, skip_damaged=True)[2:4])

def test_code_named_like_an_image_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content in (b"cos\nmkdir\n(S'trap'\ntR.", b"import os\nos.mkdir('trap')\n"):  # a pickle, Python
        Path("1.jpg").write_bytes(content)
        for use in (lambda photos: photos.view(0), lambda photos: photos.cache(1e9)):
            with pytest.raises(InputError, match="1.jpg"):
                use(Photos(["1.jpg"], 64, 1))
    assert not Path("trap").exists()

USES = {"cached": lambda p: p.cache(1e9), "streamed": lambda p: list(p.batches([torch.arange(8)], True))}

@pytest.mark.parametrize("use", USES.values(), ids=list(USES))
def test_a_worker_that_dies(use, pictures, monkeypatch):
    here, rgb = os.getpid(), common._rgb
    monkeypatch.setattr(common, "_rgb", lambda *a, **k: rgb(*a, **k) if os.getpid() == here else os._exit(1))
    with pytest.raises(InputError, match=r"^reading images failed [^\n]*$"):
        use(Photos(pictures, 64, 1))

# -------- Batches -------------------------------------------------------------------------------------------

def test_photographs_on_a_device(tmp_path):
    two_classes(tmp_path)
    data = load_data("folder", tmp_path, 64, workers=1).to("meta")
    (x, y), = loader(*data[:2], [torch.tensor([4, 1])], True)
    assert x.device.type == y.device.type == "meta" and x.shape == (2, 3, 64, 64) and y.shape == (2,)
    assert mean_std(data.train_images)[0].device.type == "meta" and data.classes == ["a", "b"]
    assert shown(data.train_images.to("cpu"), torch.arange(6))[3:] == [(1, 3), (3, 4), (5, 5)]

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
