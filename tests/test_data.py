"""common.py's small images and batches. Oracles: torchvision's ImageFolder, PIL, NumPy, every outcome written out."""

import json
import pickle
import sys
import urllib.request
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torchvision.datasets import ImageFolder

import common
from common import InputError, batch_indices, cutout, layout, load_data, mean_std, normalize, random_crop_flip, shapes


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def put(path, image):
    """Save an image of NumPy or PIL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image)
    image.save(path)


def as_arrays(images):
    """uint8 (N, 3, H, W) as NumPy (N, H, W, 3)."""
    return images.permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def generated():
    """2,000 images to train on and 500 others."""
    return shapes(2000, seed=1), shapes(500, seed=2)


def test_shapes_are_balanced_and_depend_on_the_seed_alone(generated):
    images, labels = generated[1]
    assert images.shape == (500, 3, 32, 32) and images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert images.min() == 0 and images.max() == 255 and len(torch.unique(images.flatten(1), dim=0)) == 500
    assert labels.bincount().tolist() == [50] * 10
    state = torch.get_rng_state()
    again, other = shapes(500, seed=2), shapes(500, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(images, again[0]) and torch.equal(labels, again[1])
    assert not torch.equal(images, other[0]) and not torch.equal(labels, other[1])


def linear_accuracy(x, y, x_test, y_test, strength):
    """Of ridge regression from (N, D) to one-hot labels, in the dual form, on the test data."""
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, x_test = (x - mean) / std, (x_test - mean) / std
    gram = (x @ x.T).double() + strength * torch.eye(len(x))
    weights = torch.linalg.solve(gram, F.one_hot(y, 10).double() - 0.1)
    return (((x_test @ x.T).double() @ weights).argmax(1) == y_test).double().mean()


def figure_form(images):
    """How far the pixels are from the colour of the rim, seen through 20 random filters: (N, 80)."""
    x = images.float() / 255
    rim = torch.cat([x[:, :, 0], x[:, :, -1], x[:, :, :, 0], x[:, :, :, -1]], 2).median(2).values
    figure = F.instance_norm((x - rim[:, :, None, None]).norm(dim=1, keepdim=True))  # alike in any contrast
    filters = F.normalize(torch.randn(20, 49)).view(20, 1, 7, 7)
    return F.adaptive_avg_pool2d(F.relu(F.conv2d(figure, filters, padding=3) - 1), 2).flatten(1)


def test_shapes_defeat_a_linear_classifier_and_carry_their_labels(generated):
    (train, y), (test, y_test) = generated
    for strength in (100, 3000, 100_000):
        accuracy = linear_accuracy(train.flatten(1) / 255, y, test.flatten(1) / 255, y_test, strength)
        assert 0.05 < accuracy < 0.40
    forms = figure_form(torch.cat([train, test]))
    assert linear_accuracy(forms[:2000], y, forms[2000:], y_test, 10) > 0.95


@pytest.fixture
def fewer(monkeypatch):
    """`load_data("shapes")` with a twentieth of the images; what it asked for."""
    asked = []
    monkeypatch.setattr(common, "shapes", lambda count, seed: asked.append((count, seed)) or shapes(count // 20, seed))
    return asked


def test_load_shapes(fewer):
    data = load_data("shapes")
    (train, train_seed), (test, test_seed) = fewer
    assert (train, test) == (6000, 1000) and train_seed != test_seed
    assert data.describe() == "300 images to train on, 50 to test on, 10 classes, 32 x 32 pixels"
    assert data.classes == list(common.SHAPE_CLASSES)
    moved = data.to("meta")
    assert [x.device.type for x in moved[:4]] == ["meta"] * 4 and moved.classes == data.classes


def test_limits_choose_the_same_random_images_and_sizes_are_those_of_pil(fewer):
    whole, few = load_data("shapes"), load_data("shapes", limit_train=50, limit_test=7000)
    chosen = [(whole.train_images == image).flatten(1).all(1).nonzero().item() for image in few.train_images]
    assert len(set(chosen)) == 50 and set(chosen) != set(range(50))
    assert torch.equal(whole.train_labels[chosen], few.train_labels) and len(few.train_labels.unique()) > 5
    assert len(few.test_images) == 50
    torch.manual_seed(123)
    small = load_data("shapes", image_size=16, limit_train=50, seed=4)
    assert torch.equal(small.train_labels, few.train_labels) and small.test_images.shape == (50, 3, 16, 16)
    for image, ours in zip(as_arrays(few.train_images), as_arrays(small.train_images), strict=True):
        pil = np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.BILINEAR))
        assert np.abs(pil.astype(int) - ours).max() <= 1


def test_unknown_data_sets_are_refused():
    with pytest.raises(InputError, match="shapes"):
        load_data("cifar1000")


def make_folder(root, test="test", size=(8, 8)):
    """Three images of three classes, to train and to test on, some in deeper folders."""
    for k, split in enumerate(("train", test)):
        for i, name in enumerate(("ant", "bee", "cat")):
            for j, file in enumerate(("0.png", "1.PNG", "deep/er/2.png")):
                put(root / split / name / file, noise(*size, 3, seed=9 * k + 3 * i + j))


def reference(root):
    """torchvision's ImageFolder: images uint8 (N, 3, H, W), labels, classes."""
    folder = ImageFolder(root)
    images = np.stack([np.asarray(image) for image, _ in folder])
    return torch.from_numpy(images).permute(0, 3, 1, 2), torch.tensor(folder.targets), folder.classes


def test_folders_are_what_imagefolder_finds(tmp_path):
    """Hidden files and folders are ignored, whatever they hold, but not in what the user names himself."""
    root = tmp_path / ".data"
    make_folder(root)
    train, tested = reference(root / "train"), reference(root / "test")
    for split in ("train", "test"):
        for name in (".hidden/a.png", "ant/.hidden/a.png", "lonely.png"):
            put(root / split / name, noise(8, 8, 3, seed=99))
        for name in ("._x.jpg", "bee/._0.png", "bee/Thumbs.db"):
            (root / split / name).write_bytes(b"not an image")
    data = load_data("folder", root)
    assert data.classes == train[2] == ["ant", "bee", "cat"]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(data[:4], (*train[:2], *tested[:2])))
    assert data.train_images.is_contiguous() and data.train_labels.dtype == torch.int64
    few = load_data("folder", root, limit_train=6, limit_test=1)
    chosen = [(data.train_images == image).flatten(1).all(1).nonzero().item() for image in few.train_images]
    assert torch.equal(few.train_labels, data.train_labels[chosen]) and len(few.test_images) == 1


COMPOSED, DECOMPOSED = "caf\xe9", "cafe\u0301"


@pytest.mark.parametrize("train, test", [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED), (DECOMPOSED, DECOMPOSED)])
def test_classes_that_look_the_same_are_the_same(train, test, tmp_path):
    for split, name in (("train", train), ("test", test)):
        put(tmp_path / split / name / "0.png", noise(8, 8, 3))
        put(tmp_path / split / "cafg" / "0.png", noise(8, 8, 3, seed=1))
    data = load_data("folder", tmp_path)
    assert data.classes == ["cafg", COMPOSED]
    for images, labels in (data[:2], data[2:4]):
        assert np.array_equal(as_arrays(images[labels.argsort()]), [noise(8, 8, 3, seed=1), noise(8, 8, 3)])

    (tmp_path / "train" / COMPOSED).mkdir(exist_ok=True)
    (tmp_path / "train" / DECOMPOSED).mkdir(exist_ok=True)
    if len(list((tmp_path / "train").iterdir())) == 3:  # a Mac's disk has one folder for both
        with pytest.raises(InputError, match=r"alike: 'cafe\\u0301' and 'caf\\xe9'$"):
            load_data("folder", tmp_path)


def test_a_test_folder_without_classes_beside_val_is_imagenets(tmp_path):
    """As ImageNet is unpacked: val/ sorted into classes, test/ without labels."""
    make_folder(tmp_path, "val")
    (tmp_path / "test" / ".cache").mkdir(parents=True)
    put(tmp_path / "test" / "1.png", noise(8, 8, 3))
    assert torch.equal(load_data("folder", tmp_path).test_images, reference(tmp_path / "val")[0])

    put(tmp_path / "test" / "bee" / "1.png", noise(8, 8, 3))  # with classes test/ is meant
    assert load_data("folder", tmp_path).test_labels.tolist() == [1]


def test_image_size_takes_the_middle_square(tmp_path):
    wide, high, square = noise(8, 14, 3), noise(20, 8, 3, seed=1), noise(16, 16, 3, seed=2)
    for split in ("train", "test"):
        for name, image in {"x/a": wide, "x/b": high, "y/c": square}.items():
            put(tmp_path / split / f"{name}.png", image)
    got = as_arrays(load_data("folder", tmp_path, image_size=8).train_images)
    halved = np.asarray(Image.fromarray(square).resize((8, 8), Image.Resampling.BILINEAR))
    assert np.array_equal(got, [wide[:, 3:11], high[6:14], halved])
    assert load_data("folder", tmp_path, image_size=19).test_images.shape == (3, 3, 19, 19)


def no_classes(folder):
    folder.rename(folder.with_name("old"))
    (folder / ".hidden").mkdir(parents=True)


def enlarge(folder):
    for path in folder.rglob("*.*"):
        put(path, noise(9, 9, 3))


ONE = "train/bee/0.png"
UNUSABLE = {  # what happens to the folder, and what the message says
    "cut off": (lambda root: (root / ONE).write_bytes((root / ONE).read_bytes()[:100]), "bee/0.png"),
    "another size": (lambda root: put(root / ONE, noise(9, 8, 3)), "0.png is 8x9, others are 8x8: give --image-size"),
    "test of another size": (lambda root: enlarge(root / "test"), "differ in size"),
    "class folder only in test": (lambda root: (root / "test" / "dog").mkdir(), "dog"),
    "class without images": (lambda root: (root / "train" / "dog").mkdir(), "dog"),
    "not square": (lambda root: make_folder(root, size=(8, 6)), "images are 6x8: --image-size makes them square"),
    "no classes in test": (lambda root: no_classes(root / "test"), "no images in"),
}


@pytest.mark.parametrize("change, says", UNUSABLE.values(), ids=list(UNUSABLE))
def test_folders_that_cannot_be_used(change, says, tmp_path):
    make_folder(tmp_path / "data")
    change(tmp_path / "data")
    with pytest.raises(InputError) as e:
        load_data("folder", tmp_path / "data")
    assert says in str(e.value) and "\n" not in str(e.value)


def test_a_fingerprint_changes_with_the_data(tmp_path):
    make_folder(tmp_path)
    first = load_data("folder", tmp_path).fingerprint()
    numbers = {"train_images": [3, 3, 3], "test_images": [3, 3, 3], "image_size": 8}
    assert json.loads(json.dumps(first)) == {"classes": ["ant", "bee", "cat"], **numbers}
    assert load_data("folder", tmp_path, 64).fingerprint() == {**first, "image_size": 64}  # photographs
    (tmp_path / "train" / "cat" / "0.png").rename(tmp_path / "train" / "ant" / "a.png")
    assert load_data("folder", tmp_path).fingerprint() == {**first, "train_images": [4, 3, 2]}
    for split in ("train", "test"):
        (tmp_path / split / "cat").rename(tmp_path / split / "dog")
    assert load_data("folder", tmp_path).fingerprint()["classes"] == ["ant", "bee", "dog"]


@pytest.fixture
def unchecked(monkeypatch):
    """Small files of the real format do not have the real files' checksums."""
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *args, **kwargs: True)
    monkeypatch.setattr(torchvision.datasets.svhn, "check_integrity", lambda *args, **kwargs: True)
    monkeypatch.setattr(torchvision.datasets.SVHN, "download", lambda self: None)


CIFAR = {  # folder, files, key of the labels, file of the names
    "cifar10": (
        "cifar-10-batches-py",
        [f"data_batch_{k}" for k in range(1, 6)],
        "test_batch",
        "labels",
        "batches.meta",
    ),
    "cifar100": ("cifar-100-python", ["train"], "test", "fine_labels", "meta"),
}


@pytest.mark.parametrize("dataset", CIFAR)
def test_cifar(dataset, tmp_path, unchecked):
    """Rows of 3,072 bytes: red, then green, then blue, each row by row."""
    folder, train, test, key, meta = CIFAR[dataset]
    rows, labels, names = noise(6, 4, 3072), noise(6, 4, seed=1) % 10, [f"class {k}" for k in range(10)]
    (tmp_path / folder).mkdir()
    for file, pixels, numbers in zip([test, *train], rows, labels):
        content = {"data": pixels, key: numbers.tolist(), "coarse_labels": [0] * 4}
        (tmp_path / folder / file).write_bytes(pickle.dumps(content))
    content = {key.replace("labels", "label_names"): names, "coarse_label_names": ["coarse"]}
    (tmp_path / folder / meta).write_bytes(pickle.dumps(content))

    data, count = load_data(dataset, tmp_path), len(train) + 1
    assert data.classes == names and data.train_images.is_contiguous()
    assert np.array_equal(data.train_images, rows[1:count].reshape(-1, 3, 32, 32))
    assert np.array_equal(data.test_images, rows[0].reshape(-1, 3, 32, 32))
    assert np.array_equal(data.train_labels, labels[1:count].flatten()) and np.array_equal(data.test_labels, labels[0])
    assert load_data(dataset, tmp_path, 16, 3, 2).train_images.shape == (3, 3, 16, 16)

    (tmp_path / folder / test).write_bytes(pickle.dumps([1, 2]))  # any exception of an unpickler is one line
    with pytest.raises(InputError, match=r"^[^\n]*CIFAR[^\n]*--data-dir[^\n]*$"):
        load_data(dataset, tmp_path)


def test_svhn(tmp_path, unchecked, monkeypatch):
    savemat = pytest.importorskip("scipy.io").savemat
    digits = {"train": np.array([1, 10, 9, 10, 3]), "test": np.array([2, 10, 5, 7, 1])}  # 0 is called 10
    pixels = {split: noise(32, 32, 3, 5, seed=k) for k, split in enumerate(digits)}  # (H, W, 3, N)
    for split, y in digits.items():
        savemat(tmp_path / f"{split}_32x32.mat", {"X": pixels[split], "y": y.astype(np.uint8)[:, None]})
    data = load_data("svhn", tmp_path)
    assert data.classes == [str(k) for k in range(10)]
    for images, labels, split in ((*data[:2], "train"), (*data[2:4], "test")):
        assert labels.tolist() == (digits[split] % 10).tolist()
        assert np.array_equal(as_arrays(images), pixels[split].transpose(3, 0, 1, 2))

    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(InputError, match="pip install scipy"):
        load_data("svhn", tmp_path)


@pytest.mark.parametrize("dataset", ["cifar10", "svhn", "flowers102"])
def test_a_failing_download_is_one_line(dataset, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionResetError("no way\nto host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(
        InputError, match=rf"(?i){dataset} from {tmp_path} .*no way to host.*: check --data-dir, or use"
    ):
        load_data(dataset, tmp_path)


def test_mean_std():
    images = noise(600, 3, 9, 7) // np.array([1, 2, 90], np.uint8).reshape(1, 3, 1, 1)
    levels = images.astype(np.float64) / 255
    mean, std = mean_std(torch.from_numpy(images))
    assert mean.dtype == std.dtype == torch.float32
    np.testing.assert_allclose(mean, levels.mean((0, 2, 3)), rtol=0, atol=1e-7)
    np.testing.assert_allclose(std, levels.std((0, 2, 3)), rtol=0, atol=1e-7)
    mean, std = mean_std(torch.full((1, 3, 4, 4), 51, dtype=torch.uint8))  # one image of one colour
    assert torch.allclose(mean, torch.tensor(0.2)) and (std > 0).all()  # nothing is divided by 0


def test_normalize():
    """channels_last on a CPU, the usual layout elsewhere."""
    images, mean, std = torch.from_numpy(noise(20, 3, 8, 6)), torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 1, 2])
    want = torch.stack([(images[:, c] / 255 - mean[c]) / std[c] for c in range(3)], 1)
    for given in (images, images / 255):
        out = normalize(given, mean, std)
        torch.testing.assert_close(out, want)
        assert out.dtype == torch.float32 and out.is_contiguous(memory_format=torch.channels_last)
        assert normalize(out.to("meta"), mean.to("meta"), std.to("meta")).is_contiguous()
    assert np.array_equal(images, noise(20, 3, 8, 6))
    assert layout("cpu") is torch.channels_last and layout(torch.device("cuda", 1)) is torch.contiguous_format


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


@pytest.mark.parametrize("independent", [False, True])
def test_batches_of_other_seeds_are_others_and_reach_every_image(independent):
    first, second = (batch_indices(100, 10, seed, independent=independent) for seed in (1, 2))
    assert not torch.equal(first.sort().values, second.sort().values)
    assert all(len(set(batch)) == 10 for batch in first.tolist())
    assert (len(first.unique()) == 100) is not independent
    drawn = [batch_indices(11, 4, seed, independent=independent).flatten() for seed in range(40)]
    assert set(torch.cat(drawn).tolist()) == set(range(11))


@pytest.mark.parametrize("count, size, world", [(50, 8, 3), (8, 4, 4), (50, 1, 1), (1, 8, 1), (0, 8, 1)])
def test_a_share_that_is_uneven_or_a_single_image_is_refused(count, size, world):
    """Batch norm has no statistics of one image."""
    with pytest.raises(InputError, match=rf"^[^\n]*{min(count, size)} images[^\n]*{world} process[^\n]*$"):
        batch_indices(count, size, 0, 0, world)


@pytest.mark.parametrize("H, W, dtype", [(5, 7, torch.uint8), (8, 8, torch.float32), (3, 3, torch.uint8)], ids=str)
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
    seen = Counter(x.numpy().tobytes() for x in out)
    assert seen.keys() == possible.keys()
    seen.pop(bytes(image.numpy().nbytes), 0)  # nothing of the image left: its own mirror image
    mirrored = sum(n for outcome, n in seen.items() if possible[outcome])
    assert abs(mirrored / seen.total() - 0.5) < 0.05


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


def test_loader_of_tensors():
    """To test on: the images themselves. To train on: each one's own view, its channels moved alike."""
    images, labels = torch.from_numpy(noise(40, 1, 8, 8)).expand(40, 3, 8, 8), torch.arange(40)
    order = torch.randperm(40).split(16)
    for (x, y), batch in zip(common.loader(images, labels, order, False), order, strict=True):
        assert torch.equal(x, images[batch]) and torch.equal(y, batch)
    for (x, _), batch in zip(common.loader(images, labels, order, True), order, strict=True):
        assert torch.equal(x[:, 0], x[:, 1]) and torch.equal(x[:, 0], x[:, 2])
        assert all({*a.flatten().tolist()} <= {0, *b.flatten().tolist()} for a, b in zip(x, images[batch]))
        assert not torch.equal(x, images[batch])
