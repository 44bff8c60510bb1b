"""common.py's small images and batches, against files made here, PIL, and every outcome written out."""

import io
import pickle
import sys
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import common
from common import InputError, batch_indices, cutout, load_data, mean_std, normalize, random_crop_flip, shapes


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def halves(data):
    """(images, labels) to train on and to test on; their types are checked on the way."""
    for images, labels in (data[:2], data[2:4]):
        assert images.dtype == torch.uint8 and labels.dtype == torch.int64 and images.is_contiguous()
        assert images.shape[:2] == (len(labels), 3)
    return data[:2], data[2:4]


def as_arrays(images):
    """uint8 (N, 3, H, W) as NumPy (N, H, W, 3)."""
    return images.permute(0, 2, 3, 1).numpy()


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a[:4], b[:4], strict=True))


# -----------------------------------------------------------------------------
# Generated images
# -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def generated():
    """3,000 images to train on and 1,000 others."""
    return shapes(3000, seed=1), shapes(1000, seed=2)


def test_shapes_depend_on_the_seed_alone():
    first = shapes(200, seed=5)
    state = torch.get_rng_state()
    again, other = shapes(200, seed=5), shapes(200, seed=6)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(first, again) and not torch.equal(first[0], other[0]) and not torch.equal(first[1], other[1])


def test_shapes_are_balanced_images(generated):
    images, labels = generated[0]
    assert images.shape == (3000, 3, 32, 32) and images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert Counter(labels.tolist()) == {k: 300 for k in range(10)}
    assert images.min() == 0 and images.max() == 255
    assert len(torch.unique(images.flatten(1), dim=0)) == 3000
    assert not torch.equal(labels, labels.sort().values)
    assert shapes(7, seed=0)[0].shape == (7, 3, 32, 32)


def best_linear_accuracy(x, y, x_test, y_test, strengths):
    """Of ridge regressions from (N, D) to one-hot labels, in the dual form, the best on the test data."""
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, x_test = (x - mean) / std, (x_test - mean) / std
    gram, kernel, targets = (x @ x.T).double(), (x_test @ x.T).double(), F.one_hot(y, 10).double() - 0.1
    accuracies = []
    for strength in strengths:
        weights = torch.cholesky_solve(targets, torch.linalg.cholesky(gram + strength * torch.eye(len(x))))
        accuracies.append(((kernel @ weights).argmax(1) == y_test).double().mean().item())
    return max(accuracies)


def test_shapes_defeat_a_linear_classifier(generated):
    (images, y), (images_test, y_test) = generated
    pixels, pixels_test = images.flatten(1).float() / 255, images_test.flatten(1).float() / 255
    assert 0.05 < best_linear_accuracy(pixels, y, pixels_test, y_test, (100, 3000, 100_000)) < 0.40


def figure_form(images):
    """How far the pixels are from the colour of the rim, seen through 20 random filters: (N, 80)."""
    x = images.float() / 255
    rim = torch.cat([x[:, :, 0], x[:, :, -1], x[:, :, :, 0], x[:, :, :, -1]], 2).median(2).values
    figure = (x - rim[:, :, None, None]).norm(dim=1, keepdim=True)
    figure = F.instance_norm(figure)  # seen alike in any contrast
    filters = F.normalize(torch.randn(20, 49, generator=torch.Generator().manual_seed(0))).view(20, 1, 7, 7)
    return F.adaptive_avg_pool2d(F.relu(F.conv2d(figure, filters, padding=3) - 1), 2).flatten(1)


def test_shapes_carry_their_labels(generated):
    """Not linear in the pixels, but as good as certain from the figure's form."""
    (images, y), (images_test, y_test) = generated
    assert best_linear_accuracy(figure_form(images), y, figure_form(images_test), y_test, (10,)) > 0.95


@pytest.fixture
def fewer(monkeypatch):
    """`load_data("shapes")` with a tenth of the images; what it asked for."""
    asked = []

    def tenth(count, seed):
        asked.append((count, seed))
        return shapes(count // 10, seed)

    monkeypatch.setattr(common, "shapes", tenth)
    return asked


def test_load_shapes(fewer):
    data = load_data("shapes")
    (train, train_seed), (test, test_seed) = fewer
    assert (train, test) == (6000, 1000) and train_seed != test_seed
    assert [len(x) for x in data[:4]] == [600, 600, 100, 100]
    assert data.classes == list(common.SHAPE_CLASSES) and len(set(data.classes)) == 10
    assert data.describe() == "600 images to train on, 100 to test on, 10 classes, 32 x 32 pixels"
    assert data._replace(train_labels=torch.zeros(60_000)).describe().startswith("60,000 images to train on, 100 ")
    moved = data.to("meta")
    assert [x.device.type for x in moved[:4]] == ["meta"] * 4 and moved.classes == data.classes


def test_limits_keep_the_same_random_images_of_the_whole_set(fewer):
    whole, few = load_data("shapes"), load_data("shapes", limit_train=50, limit_test=20)
    for (images, labels), (all_images, all_labels), count in zip(halves(few), halves(whole), (50, 20)):
        found = [(all_images == image).flatten(1).all(1).nonzero().flatten().tolist() for image in images]
        kept = [at for (at,) in found]
        assert len(set(kept)) == count and set(kept) != set(range(count))
        assert torch.equal(all_labels[kept], labels)
        assert len(set(labels.tolist())) > 5  # not the first class only
    torch.manual_seed(123)
    assert same(few, load_data("shapes", limit_train=50, limit_test=20))
    assert len(load_data("shapes", limit_train=7000).train_images) == 600


def test_resized_images_are_those_of_pil(fewer):
    whole, small = (load_data("shapes", image_size=size, limit_train=20) for size in (None, 16))
    assert small.test_images.shape == (100, 3, 16, 16)
    for image, ours in zip(as_arrays(whole.train_images), as_arrays(halves(small)[0][0]), strict=True):
        pil = np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.BILINEAR))
        assert np.abs(pil.astype(int) - ours).max() <= 1


def test_unknown_data_sets_are_refused():
    with pytest.raises(InputError, match="shapes"):
        load_data("cifar1000")


# -----------------------------------------------------------------------------
# Folders
# -----------------------------------------------------------------------------


def put(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path)


def put_both(root, images):
    """The same images to train and to test on, in their order: the last in a class of its own."""
    *_, last = images
    for split in ("train", "test"):
        for name, image in images.items():
            put(root / split / ("y" if name == last else "x") / name, image)


def make_folder(root, test="test", size=(8, 8), count=3):
    """A small data set; returns {bytes of an image: (split, class)}."""
    origin = {}
    for split in ("train", test):
        for name in ("ant", "bee", "cat"):
            for i in range(count):
                image = noise(*size, 3, seed=len(origin))
                put(root / split / name / f"{i}.png", image)
                origin[image.tobytes()] = split, name
    return origin


@pytest.mark.parametrize("test", ["test", "val"])
@pytest.mark.parametrize("limits", [(None, None), (6, 4)], ids=str)
def test_folder(test, limits, tmp_path):
    origin = make_folder(tmp_path, test)
    data = load_data("folder", tmp_path, limit_train=limits[0], limit_test=limits[1], workers=1)
    assert data.classes == ["ant", "bee", "cat"]
    for (images, labels), split, limit in zip(halves(data), ("train", test), limits):
        assert images.shape == (limit or 9, 3, 8, 8)
        assert len(torch.unique(images, dim=0)) == len(images) and len(labels.unique()) > 1
        got = [origin[image.tobytes()] for image in as_arrays(images)]
        assert got == [(split, data.classes[k]) for k in labels]
    assert same(data, load_data("folder", tmp_path, None, *limits))


def test_folder_image_kinds(tmp_path):
    """Gray, palette, transparent, 1-bit, 16-bit images and JPEG become three channels; endings vary."""
    gray, alpha, bits = noise(8, 8), noise(8, 8, 4, seed=2), noise(8, 8, seed=3) > 127
    palette = Image.fromarray(noise(8, 8, 3, seed=1)).quantize(16)
    colours = np.array(palette.getpalette()).reshape(-1, 3)
    smooth = np.broadcast_to(np.array([200, 40, 90], np.uint8), (8, 8, 3)).copy()
    sixteen = Image.fromarray(gray.astype(np.uint16) * 257)
    images = gray, palette, alpha, Image.fromarray(bits), sixteen, smooth, gray
    put_both(tmp_path, dict(zip(["a.png", "b.PNG", "c.png", "d.png", "e.png", "f.jpg", "g.JPEG"], images)))
    *exact, jpeg, gray_jpeg = as_arrays(load_data("folder", tmp_path).train_images)
    gray3 = np.stack([gray] * 3, -1)
    want = [gray3, colours[np.asarray(palette)], alpha[..., :3], np.stack([bits * 255] * 3, -1), gray3]
    assert np.array_equal(exact, want)
    assert np.abs(jpeg.astype(int) - smooth).max() <= 3
    assert (gray_jpeg == gray_jpeg[..., :1]).all()
    assert np.corrcoef(gray_jpeg[..., 0].flat, gray.flat)[0, 1] > 0.8


def test_folder_image_size(tmp_path):
    wide, high, square = noise(8, 14, 3), noise(20, 8, 3, seed=1), noise(8, 8, 3, seed=2)
    gradient = np.broadcast_to(np.linspace(0, 240, 32).astype(np.uint8)[None, :, None], (16, 32, 3)).copy()
    put_both(tmp_path, {"a.png": wide, "b.png": high, "c.png": square, "d.png": gradient})
    with pytest.raises(InputError, match="--image-size"):
        load_data("folder", tmp_path)
    got = as_arrays(load_data("folder", tmp_path, image_size=8).train_images)
    assert np.array_equal(got[:3], [wide[:, 3:11], high[6:14], square])  # the shorter side is 8 already
    halved = gradient.astype(float).reshape(8, 2, 16, 2, 3).mean((1, 3))  # about what scaling gives
    assert np.abs(got[3] - halved[:, 4:12]).max() <= 2
    assert load_data("folder", tmp_path, image_size=19).test_images.shape == (4, 3, 19, 19)


def test_what_file_managers_leave_is_neither_image_nor_class(tmp_path):
    """Names that begin with a dot, whatever they hold, and files that are no images."""
    origin = make_folder(tmp_path / ".data")  # a dot in what the user names himself hides nothing
    image = noise(8, 8, 3, seed=99)
    for split in (tmp_path / ".data" / "train", tmp_path / ".data" / "test"):
        for name in (".hidden/a.png", "ant/.hidden/a.png", "ant/deep/.hidden/deeper/a.png"):
            put(split / name, image)
        for name in ("._x.jpg", "bee/._x.jpg", "bee/._0.png", "Thumbs.db", "bee/Thumbs.db", "list.csv"):
            (split / name).write_bytes(b"not an image")
        put(split / "lonely.png", image)  # in no class folder
    data = load_data("folder", tmp_path / ".data")
    assert data.classes == ["ant", "bee", "cat"]
    for (images, labels), split in zip(halves(data), ("train", "test")):
        assert [origin[image.tobytes()] for image in as_arrays(images)] == [
            (split, name) for name in data.classes for _ in range(3)
        ]
        assert labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3


def test_images_in_folders_below_a_class_count(tmp_path, monkeypatch):
    origin = make_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    for k, name in enumerate(["ant/deep/0.png", "cat/deep/er/1.png"]):
        put(tmp_path / "train" / name, noise(8, 8, 3, seed=50 + k))
        origin[noise(8, 8, 3, seed=50 + k).tobytes()] = "train", name.split("/")[0]
    data = load_data("folder", ".")
    assert data.classes == ["ant", "bee", "cat"] and len(data.train_images) == 11
    got = [origin[image.tobytes()] for image in as_arrays(data.train_images)]
    assert got == [("train", data.classes[k]) for k in data.train_labels]
    assert Counter(data.train_labels.tolist()) == {0: 4, 1: 3, 2: 4}


@pytest.mark.parametrize("kept", ["nothing", "the folder", "a hidden file"])
def test_folder_with_a_class_that_is_only_trained_on(kept, tmp_path):
    """The others keep their places among the labels."""
    make_folder(tmp_path)
    (tmp_path / "test" / "bee").rename(tmp_path / "put aside")
    if kept != "nothing":
        (tmp_path / "test" / "bee").mkdir()
    if kept == "a hidden file":
        (tmp_path / "test" / "bee" / "._0.png").write_bytes(b"not an image")
    data = load_data("folder", tmp_path)
    assert data.classes == ["ant", "bee", "cat"]
    assert data.train_labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert data.test_labels.tolist() == [0] * 3 + [2] * 3


@pytest.mark.parametrize("kind", ["files", "hidden folders", "nothing"])
def test_a_flat_test_folder_beside_val_is_imagenets(kind, tmp_path):
    """As unpacked: val/ sorted into classes, test/ without labels."""
    origin = make_folder(tmp_path, "val")
    (tmp_path / "test").mkdir()
    if kind == "files":
        put(tmp_path / "test" / "1.png", noise(8, 8, 3, seed=99))
    if kind == "hidden folders":
        (tmp_path / "test" / ".cache").mkdir()
    data = load_data("folder", tmp_path)
    assert {origin[image.tobytes()][0] for image in as_arrays(data.test_images)} == {"val"}
    assert len(data.test_images) == 9

    put(tmp_path / "test" / "bee" / "1.png", noise(8, 8, 3, seed=100))  # with classes test/ is meant
    assert load_data("folder", tmp_path).test_labels.tolist() == [1]


def test_images_that_are_not_square_are_refused(tmp_path):
    make_folder(tmp_path, size=(8, 6))
    with pytest.raises(InputError, match="^images are 6x8: --image-size makes them square$"):
        load_data("folder", tmp_path)
    assert load_data("folder", tmp_path, image_size=6).train_images.shape == (9, 3, 6, 6)


def test_one_class_is_refused(tmp_path):
    make_folder(tmp_path)
    for name in ("train/bee", "train/cat", "test/bee", "test/cat"):
        (tmp_path / name).rename(tmp_path / name.replace("/", " "))
    with pytest.raises(InputError, match="^there is one class only$"):
        load_data("folder", tmp_path)


def each(split, change):
    return lambda root: [change(path) for path in (root / split).glob("*/*")]


def bee(change):
    return lambda root: change(root / "train" / "bee" / "1.png")


def no_images(split, name):
    """A class folder that holds nothing but a hidden file."""

    def change(root):
        for path in (root / split / name).iterdir():
            path.unlink()
        (root / split / name / "._0.png").write_bytes(b"not an image")

    return change


def no_classes(*splits):
    def change(root):
        for split in splits:
            (root / split).rename(root / f"old {split}")
            (root / split / ".hidden").mkdir(parents=True)

    return change


def nowhere(path):
    path.unlink()
    path.symlink_to("nothing")


def zeros_inside(path):
    path.write_bytes(path.read_bytes()[:60] + bytes(30) + path.read_bytes()[90:])


def larger(path):
    put(path, noise(9, 8, 3))


DAMAGE = {  # what happens to the folder, and what the message must say
    "cut off": (bee(lambda path: path.write_bytes(path.read_bytes()[:100])), "bee/1.png"),
    "empty file": (bee(lambda path: path.write_bytes(b"")), "bee/1.png"),
    "text": (bee(lambda path: path.write_text("<html>404 Not Found</html>")), "bee/1.png"),
    "broken bytes": (bee(zeros_inside), "bee/1.png"),
    "link to nowhere": (bee(nowhere), "bee/1.png"),
    "another size": (bee(larger), "bee/1.png is 8x9, others are 8x8: give --image-size"),
    "test of another size": (each("test", larger), "give --image-size"),
    "class only in test": (lambda root: put(root / "test" / "dog" / "a.png", noise(8, 8, 3)), "dog"),
    "class folder only in test": (lambda root: (root / "test" / "dot").mkdir(), "dot"),
    "class without images in train": (no_images("train", "cat"), "cat"),
    "no images in train": (each("train", Path.unlink), "cat"),
    "no images in test": (each("test", lambda path: path.rename(path.with_suffix(".txt"))), "no images"),
    "no classes": (no_classes("train", "test"), "data/train"),
    "no classes in train": (no_classes("train"), "ant"),
    "no classes in test": (no_classes("test"), "no images"),
    "no test": (lambda root: (root / "test").rename(root / "tests"), "train/<class>"),
    "no train": (lambda root: (root / "train").rename(root / "training"), "train/<class>"),
    "no folder": (lambda root: root.rename(root.with_name("gone")), "train/<class>"),
}


@pytest.mark.parametrize("change, says", DAMAGE.values(), ids=list(DAMAGE))
def test_folders_that_cannot_be_used(change, says, tmp_path):
    make_folder(tmp_path / "data")
    change(tmp_path / "data")
    with pytest.raises((InputError, OSError)) as e:  # both are one line to the scripts
        load_data("folder", tmp_path / "data")
    assert says in str(e.value) and "\n" not in str(e.value)


# -----------------------------------------------------------------------------
# CIFAR and SVHN
# -----------------------------------------------------------------------------


@pytest.fixture
def unchecked(monkeypatch):
    """Small files of the real format do not have the real files' checksums."""
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *args, **kwargs: True)
    monkeypatch.setattr(torchvision.datasets.svhn, "check_integrity", lambda *args, **kwargs: True)
    monkeypatch.setattr(torchvision.datasets.SVHN, "download", lambda self: None)


def pickled(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps(content))


def check_cifar(data, train, train_labels, test, test_labels):
    """Rows of 3,072 bytes: red, then green, then blue, each row by row."""
    for (images, labels), rows, want in zip(halves(data), (train, test), (train_labels, test_labels)):
        assert labels.tolist() == want.tolist() and images.shape == (len(rows), 3, 32, 32)
        for colour, y, x in ((0, 0, 0), (0, 0, 31), (1, 5, 2), (2, 31, 31)):
            assert images[:, colour, y, x].tolist() == rows[:, colour * 1024 + y * 32 + x].tolist()


def test_cifar10(tmp_path, unchecked):
    root = tmp_path / "cifar-10-batches-py"
    rows, labels = noise(6 * 4, 3072).reshape(6, 4, 3072), noise(6, 4, seed=1) % 10
    for i, name in enumerate([f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]):
        pickled(root / name, {"data": rows[i], "labels": labels[i].tolist()})
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    pickled(root / "batches.meta", {"label_names": names})
    data = load_data("cifar10", tmp_path)
    assert data.classes == names
    check_cifar(data, rows[:5].reshape(20, 3072), labels[:5].flatten(), rows[5], labels[5])
    few = load_data("cifar10", tmp_path, image_size=16, limit_train=7, limit_test=2)
    assert few.train_images.shape == (7, 3, 16, 16) and few.test_images.shape == (2, 3, 16, 16)


def test_cifar100(tmp_path, unchecked):
    labels = np.array([5, 99, 0, 1, 2, 50]), np.array([7, 98, 3])
    parts = {"train": (noise(6, 3072), labels[0]), "test": (noise(3, 3072, seed=1), labels[1])}
    root = tmp_path / "cifar-100-python"
    for name, (rows, fine) in parts.items():
        pickled(root / name, {"data": rows, "fine_labels": fine.tolist(), "coarse_labels": [0] * len(rows)})
    names = [f"class {k}" for k in range(100)]
    pickled(root / "meta", {"fine_label_names": names, "coarse_label_names": ["coarse"]})
    data = load_data("cifar100", tmp_path)
    assert data.classes == names
    check_cifar(data, *parts["train"], *parts["test"])


def test_svhn(tmp_path, unchecked):
    savemat = pytest.importorskip("scipy.io").savemat
    digits = {"train": np.array([1, 10, 9, 10, 3]), "test": np.array([2, 10, 5, 7, 1])}  # 0 is called 10
    pixels = {split: noise(32, 32, 3, 5, seed=k) for k, split in enumerate(digits)}  # (H, W, 3, N)
    for split, y in digits.items():
        savemat(tmp_path / f"{split}_32x32.mat", {"X": pixels[split], "y": y.astype(np.uint8)[:, None]})
    data = load_data("svhn", tmp_path)
    assert data.classes == [str(k) for k in range(10)]
    for (images, labels), split in zip(halves(data), digits):
        assert labels.tolist() == (digits[split] % 10).tolist()
        assert np.array_equal(as_arrays(images), pixels[split].transpose(3, 0, 1, 2))


def test_svhn_without_scipy_says_so(tmp_path, unchecked, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(InputError, match="pip install scipy"):
        load_data("svhn", tmp_path)


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "svhn", "flowers102"])
@pytest.mark.parametrize("kind", [urllib.error.URLError, ConnectionResetError, TimeoutError])
def test_failing_download(dataset, kind, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise kind("no way to host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(InputError) as e:
        load_data(dataset, tmp_path)
    message = str(e.value)
    assert all(part in message for part in (str(tmp_path), "--data-dir", "shapes", "no way to host"))
    assert dataset in message.lower() and "\n" not in message


@pytest.mark.parametrize("dataset", ["cifar10", "svhn"])
def test_damaged_download(dataset, tmp_path, monkeypatch):
    """What arrives is not the file: torchvision's check of it finds that."""

    class Page(io.BytesIO):
        url, length = None, 27

    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: Page(b"<html>quota exceeded</html>"))
    with pytest.raises(InputError, match=f"(?i)^[^\\n]*{dataset}[^\\n]*corrupted[^\\n]*$"):
        load_data(dataset, tmp_path)


def test_damaged_files_of_a_download(tmp_path, unchecked):
    """Any exception of an unpickler is one line."""
    for content in (b"", b"not a pickle", pickle.dumps([1, 2]), pickle.dumps({"data": 3})):
        for name in [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch", "batches.meta"]:
            (tmp_path / "cifar-10-batches-py").mkdir(exist_ok=True)
            (tmp_path / "cifar-10-batches-py" / name).write_bytes(content)
        with pytest.raises(InputError, match=r"^[^\n]*CIFAR10[^\n]*--data-dir[^\n]*$"):
            load_data("cifar10", tmp_path)


# -----------------------------------------------------------------------------
# Batches
# -----------------------------------------------------------------------------


def test_mean_std():
    images = torch.from_numpy(noise(50, 3, 9, 7)) // torch.tensor([1, 2, 5], dtype=torch.uint8).view(3, 1, 1)
    x = images.double() / 255
    mean, std = mean_std(images)
    assert mean.dtype == std.dtype == torch.float32
    torch.testing.assert_close(mean.double(), x.mean((0, 2, 3)), rtol=0, atol=1e-7)
    torch.testing.assert_close(std.double(), x.std((0, 2, 3), correction=0), rtol=0, atol=1e-7)
    mean, std = mean_std(torch.full((2, 3, 4, 4), 51, dtype=torch.uint8))
    torch.testing.assert_close(mean, torch.full((3,), 0.2))
    assert (std > 0).all()  # nothing is divided by 0


def test_mean_std_of_many_images():
    images = noise(3001, 3, 32, 32) // np.array([1, 2, 90], np.uint8).reshape(1, 3, 1, 1)
    mean, std = mean_std(torch.from_numpy(images))
    for c in range(3):
        levels = images[:, c].astype(np.float64) / 255
        assert abs(mean[c] - levels.mean()) < 1e-6 and abs(std[c] - levels.std()) < 1e-6


class Largest(TorchDispatchMode):
    """The most bytes of a tensor that is made and is no view of `given`."""

    def __init__(self, given):
        super().__init__()
        self.place, self.bytes = given.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for part in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(part, torch.Tensor) and part.untyped_storage().data_ptr() != self.place:
                self.bytes = max(self.bytes, part.untyped_storage().nbytes())
        return out


def test_mean_std_takes_no_more_memory_for_more_images():
    taken = []
    for count in (1000, 8000):
        images = torch.zeros(count, 3, 32, 32, dtype=torch.uint8)
        with Largest(images) as largest:
            mean_std(images)
        taken.append(largest.bytes)
    assert 0 < taken[0] == taken[1] < images.nbytes


def test_normalize():
    images = torch.from_numpy(noise(20, 3, 8, 6))
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 1, 2])
    before = images.clone()
    want = torch.stack([(images[:, c] / 255 - mean[c]) / std[c] for c in range(3)], 1)
    for given in (images, images / 255):
        out = normalize(given, mean, std)
        torch.testing.assert_close(out, want)
        assert out.dtype == torch.float32 and out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, before)


@pytest.mark.parametrize("count, size, world", [(12, 4, 1), (50, 8, 2), (31, 6, 3), (10, 10, 5), (3, 8, 1)])
def test_batches(count, size, world):
    state = torch.get_rng_state()
    whole, size = batch_indices(count, size, seed=1), min(size, count)  # a batch holds at most all images
    assert whole.shape == (count // size, size) and whole.dtype == torch.int64
    drawn = whole.flatten().tolist()
    assert len(set(drawn)) == len(drawn) and set(drawn) <= set(range(count))
    shares = [batch_indices(count, size, 1, rank, world) for rank in range(world)]
    assert all(share.shape == (count // size, size // world) for share in shares)
    assert torch.equal(torch.cat(shares, 1).sort().values, whole.sort().values)
    assert torch.equal(batch_indices(count, size, seed=1), whole) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("count, size, world", [(50, 8, 3), (5, 8, 2), (8, 4, 4), (50, 1, 1), (1, 8, 1), (0, 8, 1)])
def test_a_share_that_is_uneven_or_a_single_image_is_refused(count, size, world):
    """Batch norm has no statistics of one image."""
    with pytest.raises(InputError, match=rf"^[^\n]*{min(count, size)} images[^\n]*{world} process[^\n]*$"):
        batch_indices(count, size, 0, 0, world)


def test_batches_of_other_seeds_are_others_and_reach_every_image():
    first, second = batch_indices(100, 10, seed=1), batch_indices(100, 10, seed=2)
    assert not torch.equal(first, second) and not torch.equal(first[0].sort().values, second[0].sort().values)
    assert {int(i) for seed in range(40) for i in batch_indices(11, 4, seed).flatten()} == set(range(11))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("H, W", [(5, 7), (8, 8), (3, 3)])
def test_random_crop_flip_is_every_shift_and_mirror_image(H, W, dtype):
    image = torch.arange(1, 3 * H * W + 1).view(3, H, W).to(dtype)
    padded = F.pad(image, [4] * 4)
    possible = {}  # every outcome, as bytes: is it mirrored
    for dy in range(9):
        for dx in range(9):
            crop = padded[:, dy : dy + H, dx : dx + W].numpy()
            possible.setdefault(crop.tobytes(), False)
            possible.setdefault(crop[:, :, ::-1].tobytes(), True)
    images = image.expand(4000, -1, -1, -1)
    out = random_crop_flip(images)
    assert out.shape == images.shape and out.dtype == dtype
    assert torch.equal(images, image.expand(4000, -1, -1, -1))
    seen = Counter(x.numpy().tobytes() for x in out)
    assert seen.keys() == possible.keys()
    seen.pop(bytes(image.numpy().nbytes), 0)  # nothing of the image left: its own mirror image
    mirrored = sum(n for outcome, n in seen.items() if possible[outcome])
    assert abs(mirrored / seen.total() - 0.5) < 0.05


def test_random_crop_flip_treats_images_apart_and_channels_alike():
    images = torch.rand(64, 1, 6, 6).expand(64, 3, 6, 6).contiguous()
    out = random_crop_flip(images)
    assert torch.equal(out[:, 0], out[:, 1]) and torch.equal(out[:, 0], out[:, 2])
    assert all(set(b.flatten().tolist()) <= {0.0, *a.flatten().tolist()} for a, b in zip(images, out))


@pytest.mark.parametrize("H, W, length", [(11, 8, 4), (9, 10, 3), (6, 6, 1), (5, 5, 20)])
def test_cutout_is_every_square_around_a_pixel(H, W, length):
    possible = set()
    for y in range(H):
        for x in range(W):
            hole, top, left = torch.zeros(H, W, dtype=torch.bool), y - length // 2, x - length // 2
            hole[max(top, 0) : top + length, max(left, 0) : left + length] = True
            possible.add(hole.numpy().tobytes())
    images = torch.rand(3000, 3, H, W) + 0.5
    before = images.clone()
    out = cutout(images, length)
    hole = out == 0
    assert torch.equal(images, before) and torch.equal(out, images.masked_fill(hole, 0))
    assert (hole == hole[:, :1]).all()  # all channels
    assert {x.numpy().tobytes() for x in hole[:, 0]} == possible
