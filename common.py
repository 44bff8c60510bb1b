"""What the three scripts share: data sets, and DARTS' cells (their descriptions, "genotypes", networks, pictures).

    data = load_data("shapes")                                       # uint8 tensors, nothing to download
    net = Network(GENOTYPES["DARTS_V2"], num_classes=10, channels=36, layers=20)
    logits = net(normalize(data.test_images[:8], *mean_std(data.train_images)))

CIFAR, SVHN, shapes and image files that are scaled to less than 64 pixels, or not at all, are one uint8 tensor, from
which a batch is picked by indices. Other image files are read by a DataLoader, batch by batch: Photos. `loader` hides
the difference from a training loop.
"""

import ast
import contextlib
import itertools
import json
import math
import operator
import os
import re
import struct
import unicodedata
from collections import namedtuple
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2


class InputError(ValueError):
    """Something that the user gave cannot be used. The message is one line that says what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# Data sets
# ---------------------------------------------------------------------------------------------------------------------

PHOTOGRAPHS = ("flowers102", "sport8", "mit67", "imagenet")  # 224 pixels, unless --image-size says otherwise
DATASETS = ("cifar10", "cifar100", "svhn", *PHOTOGRAPHS, "folder", "shapes")
SMALL = 64  # side in pixels: image files that are scaled to less are read once, into a tensor
WORKER_TIMEOUT = 3600  # seconds; a process that reads images and is stuck for so long ends the run


class Data(NamedTuple):
    """A data set: images uint8 (N, 3, H, W) or Photos, labels int64 (N,), the names of the classes by label."""

    train_images: "Tensor | Photos"
    train_labels: Tensor
    test_images: "Tensor | Photos"
    test_labels: Tensor
    classes: list[str]

    def to(self, device: torch.device | str) -> "Data":
        """The same data set on a device. Photos stay files; their batches go to the labels' device."""
        parts = [part.to(device) if isinstance(part, Tensor) else part for part in self[:4]]
        return Data(*parts, self.classes)

    def describe(self) -> str:
        """One line: how many images, classes and pixels."""
        size = self.train_images.shape[3]
        counts = f"{len(self.train_labels):,} images to train on, {len(self.test_labels):,} to test on"
        return f"{counts}, {len(self.classes)} classes, {size} x {size} pixels"

    def fingerprint(self) -> dict:
        """What a resumed run must find again, for a JSON file: the classes, their numbers of images, the pixels."""
        classes = len(self.classes)
        return {
            "classes": self.classes,
            "train_images": torch.bincount(self.train_labels, minlength=classes).tolist(),
            "test_images": torch.bincount(self.test_labels, minlength=classes).tolist(),
            "image_size": self.train_images.shape[3],
        }


def load_data(
    dataset: str,
    data_dir: str | Path = "data",
    image_size: int | None = None,
    limit_train: int | None = None,
    limit_test: int | None = None,
    workers: int = 4,
    seed: int = 0,
) -> Data:
    """Load one of DATASETS: as tensors, or as Photos where image files are scaled to 64 pixels or more.

    image_size: side in pixels. None: 224 for photographs, the images' own size for all others.
    limit_train, limit_test: use a random subset of this size, which does not depend on seed (but sport8's split does).
    workers: processes that read photographs, 0 for none. seed: draws sport8's split, nothing else.
    CIFAR, SVHN and Flowers102 are downloaded where they are missing. Raises InputError or OSError where other data
    are missing, data are damaged, or no network can be trained on them.
    """
    root = Path(data_dir)
    if dataset == "shapes":
        train, test, classes = shapes(6000, seed=1), shapes(1000, seed=2), list(SHAPE_CLASSES)
    elif dataset in ("cifar10", "cifar100", "svhn"):
        train, test, classes = _small_images(dataset, root)
    elif dataset == "flowers102":
        train, test, classes = _flowers102(root)
    elif dataset == "sport8":
        train, test, classes = _sport8(root, seed)
    elif dataset == "mit67":
        train, test, classes = _mit67(root)
    elif dataset in ("folder", "imagenet"):
        train, test, classes = _train_and_test(root)
    else:
        raise InputError(f"unknown data set {dataset!r}: choose from {', '.join(DATASETS)}")

    if len(classes) < 2:
        raise InputError("there is one class only")
    if dataset in PHOTOGRAPHS:
        image_size = image_size or 224

    parts = []
    for (images, labels), limit in ((train, limit_train), (test, limit_test)):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        chosen = order[:limit].sort().values
        labels = torch.as_tensor(labels, dtype=torch.int64)[chosen]

        if isinstance(images, Tensor):
            images = images[chosen].contiguous()
            if image_size:
                images = v2.functional.resize(images, [image_size, image_size])
        else:
            paths = [images[i] for i in chosen.tolist()]
            if image_size and image_size >= SMALL:
                images = Photos(paths, image_size, workers)
            else:
                images = _read_all(paths, image_size)
        parts += [images, labels]

    if parts[0].shape[1:] != parts[2].shape[1:]:
        raise InputError(f"images to train and to test on differ in size in {root}: give --image-size")
    H, W = parts[0].shape[2:]
    if H != W:
        raise InputError(f"images are {W}x{H}: --image-size makes them square")
    return Data(*parts, classes)


def _small_images(dataset: str, root: Path) -> tuple[tuple, tuple, list[str]]:
    """CIFAR-10, CIFAR-100 or SVHN by torchvision: (images, labels) to train and to test on, and the classes."""
    if dataset == "svhn":
        train, test = [_torchvision("SVHN", root, split=split) for split in ("train", "test")]
        splits = [(torch.from_numpy(part.data), part.labels) for part in (train, test)]
        return *splits, [str(digit) for digit in range(10)]

    train, test = [_torchvision(dataset.upper(), root, train=training) for training in (True, False)]
    splits = [(torch.from_numpy(part.data).permute(0, 3, 1, 2), part.targets) for part in (train, test)]
    return *splits, train.classes


def _torchvision(name: str, root: Path, **part) -> Dataset:
    """One of torchvision.datasets, downloaded if it is not in `root`. All that it raises becomes an InputError."""
    try:
        return getattr(torchvision.datasets, name)(str(root), download=True, **part)
    except ImportError as error:
        raise InputError(f"{name} needs another package (pip install {error.name})") from error
    except Exception as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"cannot load {name} from {root} ({reason}): check --data-dir, or use --dataset shapes"
        ) from error


def _flowers102(root: Path) -> tuple[tuple, tuple, list[str]]:
    """Oxford's flowers; training and validation images together are trained on."""
    sets = [_torchvision("Flowers102", root, split=split) for split in ("train", "val", "test")]
    train, val, test = [(part._image_files, part._labels) for part in sets]
    return (train[0] + val[0], train[1] + val[1]), test, [str(k + 1) for k in range(102)]


def _train_and_test(root: Path) -> tuple[tuple, tuple, list[str]]:
    """`train/<class>/...` and `test/<class>/...`, or `val/` for `test/`, as ImageNet has it."""
    # ImageNet's archive has both, and no classes in test/, whose labels nobody knows
    test_root = root / "test"
    if not test_root.is_dir() or ((root / "val").is_dir() and not _class_folders(test_root)):
        test_root = root / "val"
    if not ((root / "train").is_dir() and test_root.is_dir()):
        raise InputError(f"{root} must hold train/<class>/* and test/<class>/* (or val/): check --data-dir")

    # The classes of train/ are those of the test images too: ImageFolder would shift labels where test/ lacks one
    classes = list(_class_folders(root / "train"))
    unknown = set(_class_folders(test_root)) - set(classes)
    if unknown:
        raise InputError(f"{test_root} has a class that {root / 'train'} lacks: {min(unknown)}")
    return _image_folder(root / "train", classes), _image_folder(test_root, classes, lacking=True), classes


def _class_folders(root: Path) -> dict[str, str]:
    """The classes in their order, and the name of each one's folder.

    A disk may store an accent as a letter of its own, a Mac's for example. Class names are composed (NFC), so
    that names that look the same are the same.
    """
    names = [folder.name for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith(".")]
    folders = {}
    for name in sorted(names):
        label = unicodedata.normalize("NFC", name)
        if label in folders:
            raise InputError(f"{root} has two folders that look alike: {ascii(folders[label])} and {ascii(name)}")
        folders[label] = name
    return dict(sorted(folders.items()))


def _image_folder(root: Path, classes: list[str], lacking: bool = False) -> tuple[list[str], list[int]]:
    """The image files below the classes' folders and their labels, as torchvision's ImageFolder finds them.

    Hidden files and folders are ignored. lacking: a class may have no images.
    """

    def is_image(path: str) -> bool:
        hidden = any(part.startswith(".") for part in Path(path).relative_to(root).parts)
        return not hidden and torchvision.datasets.folder.is_image_file(path)

    found = []
    numbers = {folder: classes.index(name) for name, folder in _class_folders(root).items()}
    try:
        if numbers:
            make_dataset = torchvision.datasets.folder.make_dataset
            found = make_dataset(root, numbers, is_valid_file=is_image, allow_empty=lacking)
    except FileNotFoundError as error:
        raise InputError(f"{root}: {error}") from error
    if not found:
        raise InputError(f"no images in {root}: expected folders of images, one folder per class")
    return [path for path, _ in found], [label for _, label in found]


def _sport8(root: Path, seed: int) -> tuple[tuple, tuple, list[str]]:
    """One folder per class, perhaps in `event_img/`: 70 images of each to train on, 60 to test on (Li & Fei-Fei)."""
    root = root / "event_img" if (root / "event_img").is_dir() else root
    classes = list(_class_folders(root))
    paths, labels = _image_folder(root, classes)

    generator = torch.Generator().manual_seed(seed)
    train, test = ([], []), ([], [])
    for label, name in enumerate(classes):
        own = [path for path, number in zip(paths, labels) if number == label]
        if len(own) < 130:
            raise InputError(f"{root / name} has {len(own)} images: sport8 takes 70 + 60 of every class")
        order = torch.randperm(len(own), generator=generator).tolist()
        for part, numbers in ((train, order[:70]), (test, order[70:130])):
            part[0].extend(own[i] for i in numbers)
            part[1].extend(label for _ in numbers)
    return train, test, classes


def _mit67(root: Path) -> tuple[tuple, tuple, list[str]]:
    """`Images/<class>/*`, listed in `TrainImages.txt` and `TestImages.txt`, one `<class>/<file>` per line."""
    lists = []
    for name in ("TrainImages.txt", "TestImages.txt"):
        lines = (root / name).read_text(encoding="utf-8-sig", errors="replace").splitlines()
        lists.append([line.strip() for line in lines if line.strip()])

    classes = sorted({line.split("/")[0] for line in lists[0]})
    splits = []
    for lines in lists:
        for line in lines:
            if line.split("/")[0] not in classes or not (root / "Images" / line).is_file():
                raise InputError(f"{root}: its lists name {line!r}, which is not in Images/: unpack all of it")
        if not lines:
            raise InputError(f"{root}: one of its two lists is empty")
        paths = [str(root / "Images" / line) for line in lines]
        labels = [classes.index(line.split("/")[0]) for line in lines]
        splits.append((paths, labels))
    return *splits, classes


# ---------------------------------------------------------------------------------------------------------------------
# Image files
# ---------------------------------------------------------------------------------------------------------------------


# How a stored image is turned so that it stands upright, by EXIF's orientation
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(path: str | Path) -> Image.Image:
    """An image file as RGB, upright as a viewer shows it (EXIF); 16 bits of gray are scaled to 8.

    Raises InputError with the file's name, whatever Pillow raises, and for images in floating point or of more than 16
    bits, whose scale nobody knows.
    """
    try:
        with open(path, "rb") as file, Image.open(file) as image:  # given a path, Pillow misreads some turned TIFFs
            image.load()

            # Pillow has turned a TIFF already. If EXIF is damaged, the image stays as it is stored.
            # (ImageOps.exif_transpose also fails where the damage is in another tag)
            turn = None
            if image.format != "TIFF":
                with contextlib.suppress(SyntaxError, TypeError, ValueError, struct.error):
                    turn = UPRIGHT.get(image.getexif().get(0x0112))

            if image.mode == "F":
                raise ValueError("it is in floating point: save it with 8 bits per channel")
            if image.mode.startswith("I"):
                levels = np.asarray(image).astype(np.float64)
                if levels.max() > 65535 or levels.min() < 0:
                    raise ValueError("it has more than 16 bits: save it with 8 bits per channel")
                image = Image.fromarray((levels / 257).round().astype(np.uint8))  # 65535 is 255 * 257

            image = image.convert("RGB")
            if turn is not None:
                image = image.transpose(turn)
            return image
    except Exception as error:
        raise InputError(f"cannot use the image {path}: {type(error).__name__}: {error}".splitlines()[0]) from error


def test_view(size: int) -> v2.Compose:
    """From a PIL image to what a network is tested on: the middle square, scaled to this side, uint8 (3, S, S).

    From 64 pixels on, as for ImageNet, a border of that square is left out: 7/8 of its side remain.
    """
    side = size if size < SMALL else round(size * 256 / 224)
    return v2.Compose([v2.Resize(side), v2.CenterCrop(size), v2.PILToTensor()])


class Photos(Dataset):
    """Photographs in files. In Data they stand in for a tensor (N, 3, S, S); `loader` reads them, batch by batch."""

    def __init__(self, paths: list[str], size: int, workers: int = 4):
        self.paths = paths
        self.workers = workers
        self.shape = (len(paths), 3, size, size)
        self.train_view = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.PILToTensor()])
        self.test_view = test_view(size)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: tuple[int, int | None]) -> Tensor:
        """key: (index, seed). With a seed, a random crop and flip; with None the middle. uint8 (3, S, S)."""
        index, seed = key
        image = load_image(self.paths[index])
        if seed is None:
            return self.test_view(image)

        # A seed for each view: it is the same with any number of workers. (torch.manual_seed seeds the GPU, too)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.train_view(image)


def _read_all(paths: list[str], size: int | None) -> Tensor:
    """All images as one uint8 tensor (N, 3, H, W).

    size: the middle squares, scaled to it; None: the images must be of one size.
    """
    view = test_view(size) if size else v2.PILToTensor()
    images = []
    for path in paths:
        image = view(load_image(path))
        if images and image.shape != images[0].shape:
            (_, H, W), (_, h, w) = images[0].shape, image.shape
            raise InputError(f"{path} is {w}x{h}, others are {W}x{H}: give --image-size")
        images.append(image)
    return torch.stack(images)


# ---------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------


def check_batch(count: int, batch_size: int, world: int = 1) -> int:
    """How many of `count` images a batch holds: batch_size, or all.

    Raises InputError where `world` processes cannot share it evenly, or a share is one image, which batch norm
    cannot use.
    """
    batch_size = min(batch_size, count)
    if batch_size % world or batch_size // world < 2:
        raise InputError(f"a batch of {batch_size} images: all {world} process(es) must get the same number, 2 or more")
    return batch_size


def batch_indices(
    count: int, batch_size: int, seed: int, rank: int = 0, world: int = 1, independent: bool = False
) -> Tensor:
    """One epoch of `count` images in random order: indices (steps, batch_size // world), int64, on the CPU.

    independent: every batch is drawn from all images, so that one may come twice in an epoch; else none does.

    A batch holds at most all images; an incomplete last one is left out. Process `rank` of `world` gets its
    share of every batch. Raises InputError as check_batch does.
    """
    batch_size = check_batch(count, batch_size, world)
    steps = count // batch_size
    if independent:
        generator = np.random.default_rng(seed)
        order = np.stack([generator.choice(count, batch_size, replace=False) for _ in range(steps)])
        return torch.from_numpy(order)[:, rank::world]

    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[: steps * batch_size].view(steps, batch_size)[:, rank::world]


def loader(
    images: Tensor | Photos, labels: Tensor, order: Sequence[Tensor], train: bool, workers: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of `order`: uint8 images (B, 3, H, W) and labels (B,).

    order: tensors of indices, on the labels' device. train: a random view of every image, for a tensor
    random_crop_flip, for Photos torchvision's RandomResizedCrop and flip. workers: processes that read Photos;
    None: images.workers. The batches are the same for any number.
    """
    if isinstance(images, Tensor):
        for batch in order:
            x = images[batch]
            if train:
                x = random_crop_flip(x)
            yield x, labels[batch]
        return

    # A seed for each position in the epoch: an image that is drawn twice has two views
    if train:
        seeds = itertools.count(int(torch.randint(2**62, ())))
    else:
        seeds = itertools.repeat(None)

    if workers is None:
        workers = images.workers
    keys = [list(zip(batch.tolist(), seeds)) for batch in order]
    for x, batch in zip(_read(images, keys, workers), order):
        if labels.is_cuda:
            x = x.pin_memory()
        yield x.to(labels.device, non_blocking=True), labels[batch]


def _read(photos: Photos, keys: list[list[tuple]], workers: int) -> Iterator[Tensor]:
    """Batches of photographs. Raises InputError where an image is damaged, or the processes that read them fail."""
    # At most as many processes as there are cores that this one may use
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count()
    workers = min(workers, cores)

    reader = DataLoader(
        photos,
        batch_sampler=keys,
        num_workers=workers,
        collate_fn=_as_array,
        timeout=WORKER_TIMEOUT if workers else 0,
        generator=torch.Generator(),  # else it draws from the global one
    )
    try:
        for batch in reader:
            yield torch.from_numpy(batch)

    # A worker's error comes with its traceback as text, whose last line is our message
    except InputError as error:
        raise InputError(str(error).splitlines()[-1].removeprefix("common.InputError: ")) from None

    # The processes cannot be started, die, or send nothing
    except (OSError, EOFError, RuntimeError) as error:
        if not workers:
            raise
        raise _workers_failed(error) from error


def _workers_failed(error: Exception) -> InputError:
    reason = f"{type(error).__name__}: {error}".strip().splitlines()[-1]
    causes = "a full /dev/shm, too little memory, a long path in TMPDIR, or a job that was suspended"
    message = f"the processes that read the images failed ({reason}). Likely causes: {causes}"
    return InputError(f"{message}. --workers 0 works everywhere")


@contextlib.contextmanager
def workers_explained() -> Iterator[None]:
    """For a whole run: raises InputError where a process that reads photographs was killed.

    torch raises a RuntimeError at once then, in whatever line the main process is.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise _workers_failed(error) from error


def _as_array(views: list[Tensor]) -> np.ndarray:
    """One batch. An array comes out of a worker through a pipe; a tensor would take a file in /dev/shm and a socket."""
    return torch.stack(views).numpy()


def random_crop_flip(images: Tensor) -> Tensor:
    """Shift every image (B, C, H, W) by up to 4 pixels each way, filled up with zeros; mirror it or not, by chance."""
    B, C, H, W = images.shape
    device = images.device
    rows = torch.randint(0, 9, (B, 1), device=device) + torch.arange(H, device=device)  # (B, H)
    columns = torch.randint(0, 9, (B, 1), device=device) + torch.arange(W, device=device)  # (B, W)
    columns = torch.where(torch.rand(B, 1, device=device) < 0.5, columns.flip(1), columns)

    batch = torch.arange(B, device=device).view(B, 1, 1, 1)
    channel = torch.arange(C, device=device).view(1, C, 1, 1)
    return F.pad(images, [4] * 4)[batch, channel, rows.view(B, 1, H, 1), columns.view(B, 1, 1, W)]


def cutout(images: Tensor, length: int) -> Tensor:
    """Cutout (DeVries & Taylor): a square of side `length` around a random pixel of each image becomes 0."""
    B, _, H, W = images.shape
    device = images.device
    y = torch.randint(0, H, (B, 1, 1, 1), device=device) - torch.arange(H, device=device).view(H, 1)
    x = torch.randint(0, W, (B, 1, 1, 1), device=device) - torch.arange(W, device=device)
    half = length // 2
    hole = (y <= half) & (y > half - length) & (x <= half) & (x > half - length)  # (B, 1, H, W)
    return images.masked_fill(hole, 0)


def mean_std(images: Tensor | Photos) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, (3,) each, of the channels of uint8 images (N, 3, H, W), scaled to [0, 1].

    Of Photos: those that everybody uses for ImageNet, on the CPU.
    """
    if isinstance(images, Photos):
        return torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

    # Piece by piece, as float64 takes eight times the images' memory. It holds both sums, whole numbers, exactly
    total = torch.zeros(3, dtype=torch.float64, device=images.device)
    squares = torch.zeros_like(total)
    for part in images.split(256):
        levels = part.double()
        total += levels.sum((0, 2, 3))
        squares += levels.square().sum((0, 2, 3))

    # Images of one colour have std 0, by which nothing can be divided
    pixels = images[:, 0].numel()
    mean = total / pixels
    std = (squares / pixels - mean.square()).clamp(min=0).sqrt()
    return (mean / 255).float(), (std / 255).clamp(min=1e-3).float()


def layout(device: torch.device | str) -> torch.memory_format:
    """How images and networks lie in memory on a device: channels_last makes a CPU faster and a GPU slower."""
    if torch.device(device).type == "cpu":
        return torch.channels_last
    return torch.contiguous_format


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Images (B, 3, H, W), uint8 or float in [0, 1], to zero mean and unit deviation, in their device's layout."""
    if images.dtype == torch.uint8:
        images = images.float() / 255
    images = (images - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    return images.contiguous(memory_format=layout(images.device))


# ---------------------------------------------------------------------------------------------------------------------
# `shapes`: a data set that needs no download
# ---------------------------------------------------------------------------------------------------------------------

SHAPE_CLASSES = ("disk", "ring", "square", "frame", "triangle", "star", "plus", "bar", "crescent", "corner")


def shapes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images of one of 10 figures each on a cluttered ground; colour, place, scale, angle and noise vary.

    Not too easy: a linear classifier reaches 26 %, a small convolutional network over 85 %.
    Returns images uint8 (count, 3, 32, 32) and labels int64 (count,), the same for the same count and seed.
    """
    g = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=g) * (high - low) + low

    # Every pixel's place in the coordinates of its figure, which is turned, scaled and moved
    labels = torch.arange(count) % 10
    side = (torch.arange(32) + 0.5) / 16 - 1
    angle = uniform(-0.5, 0.5, 1, 1)
    scale = uniform(0.65, 0.95, 1, 1)
    dx = side.view(1, 1, 32) - uniform(-0.15, 0.15, 1, 1)
    dy = side.view(1, 32, 1) - uniform(-0.15, 0.15, 1, 1)
    xs = (angle.cos() * dx + angle.sin() * dy) / scale  # (N, 32, 32)
    ys = (angle.cos() * dy - angle.sin() * dx) / scale

    distance = torch.empty(count, 32, 32)
    for k, name in enumerate(SHAPE_CLASSES):
        distance[k::10] = _edge_distance(name, xs[k::10], ys[k::10])
    mask = (0.5 - distance * scale * 16).clamp(0, 1).unsqueeze(1)  # the edge is one pixel wide

    # Figure and ground have colours of some contrast, both with soft spots
    ground = uniform(0, 1, 3, 1, 1)
    ground = ground + 0.15 * F.interpolate(uniform(-0.5, 0.5, 3, 4, 4), (32, 32), mode="bicubic")
    contrast = F.normalize(torch.randn(count, 3, 1, 1, generator=g)) * uniform(0.7, 1.1, 1, 1, 1)
    figure = ground.mean((2, 3), keepdim=True) + contrast
    figure = figure + 0.15 * F.interpolate(uniform(-0.5, 0.5, 3, 2, 2), (32, 32))
    images = ground * (1 - mask) + figure * mask

    # Into [0, 1] without flattening a colour; then noise
    images = images - images.amin((1, 2, 3), keepdim=True).clamp(max=0)
    images = images / images.amax((1, 2, 3), keepdim=True).clamp(min=1)
    images = images + torch.randn(images.shape, generator=g) * uniform(0, 0.02, 1, 1, 1)
    order = torch.randperm(count, generator=g)
    return (images[order] * 255).round().clamp(0, 255).to(torch.uint8), labels[order]


def _edge_distance(name: str, x: Tensor, y: Tensor) -> Tensor:
    """About the distance of (x, y) to the edge of a figure of about unit radius; negative inside."""
    radius = (x**2 + y**2).sqrt()

    def box(cx: float, cy: float, w: float, h: float) -> Tensor:
        return torch.maximum((x - cx).abs() - w, (y - cy).abs() - h)

    def along(n: int) -> Tensor:
        """How far the points lie in each of n directions, (n, ...)."""
        turns = [2 * math.pi * k / n for k in range(n)]
        return torch.stack([math.cos(turn) * x + math.sin(turn) * y for turn in turns])

    if name == "disk":
        return radius - 0.8
    if name == "ring":
        return (radius - 0.7).abs() - 0.17
    if name == "square":
        return box(0, 0, 0.72, 0.72)
    if name == "frame":
        return box(0, 0, 0.64, 0.64).abs() - 0.15
    if name == "triangle":
        return along(3).amax(0) - 0.45
    if name == "star":
        return along(5).sort(0).values[3] - 0.33  # inside four of five half-planes
    if name == "plus":
        return torch.minimum(box(0, 0, 0.9, 0.26), box(0, 0, 0.26, 0.9))
    if name == "bar":
        return box(0, 0, 0.95, 0.25)
    if name == "crescent":
        return torch.maximum(radius - 0.85, 0.72 - ((x - 0.5) ** 2 + y**2).sqrt())
    return torch.minimum(box(-0.5, 0, 0.25, 0.8), box(0, 0.55, 0.75, 0.25))  # corner


# ---------------------------------------------------------------------------------------------------------------------
# Genotypes: quark0/darts' named tuple, its meaning and its text
# ---------------------------------------------------------------------------------------------------------------------

PRIMITIVES = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)

# ProxylessNAS' operations, for dha.py --space mobilenet: how much a layer widens, and its kernel
MOBILE_PRIMITIVES = (
    "mbconv3_3x3",
    "mbconv6_3x3",
    "mbconv3_5x5",
    "mbconv6_5x5",
    "mbconv3_7x7",
    "mbconv6_7x7",
    "skip_connect",
)

# normal, reduce: [(operation, the state it reads), ...], two for each node. States 0 and 1 are the cell's
# inputs, node j is state j + 2. normal_concat, reduce_concat: the states that are the cell's output
Genotype = namedtuple("Genotype", "normal normal_concat reduce reduce_concat")

# fmt: off
GENOTYPES = {
    "DARTS_V1": Genotype(
        [("sep_conv_3x3", 1), ("sep_conv_3x3", 0), ("skip_connect", 0), ("sep_conv_3x3", 1),
         ("skip_connect", 0), ("sep_conv_3x3", 1), ("sep_conv_3x3", 0), ("skip_connect", 2)], [2, 3, 4, 5],
        [("max_pool_3x3", 0), ("max_pool_3x3", 1), ("skip_connect", 2), ("max_pool_3x3", 0),
         ("max_pool_3x3", 0), ("skip_connect", 2), ("skip_connect", 2), ("avg_pool_3x3", 0)], [2, 3, 4, 5]),
    "DARTS_V2": Genotype(
        [("sep_conv_3x3", 0), ("sep_conv_3x3", 1), ("sep_conv_3x3", 0), ("sep_conv_3x3", 1),
         ("sep_conv_3x3", 1), ("skip_connect", 0), ("skip_connect", 0), ("dil_conv_3x3", 2)], [2, 3, 4, 5],
        [("max_pool_3x3", 0), ("max_pool_3x3", 1), ("skip_connect", 2), ("max_pool_3x3", 1),
         ("max_pool_3x3", 0), ("skip_connect", 2), ("skip_connect", 2), ("max_pool_3x3", 1)], [2, 3, 4, 5]),
    "PDARTS": Genotype(
        [("skip_connect", 0), ("dil_conv_3x3", 1), ("skip_connect", 0), ("sep_conv_3x3", 1),
         ("sep_conv_3x3", 1), ("sep_conv_3x3", 3), ("sep_conv_3x3", 0), ("dil_conv_5x5", 4)], [2, 3, 4, 5],
        [("avg_pool_3x3", 0), ("sep_conv_5x5", 1), ("sep_conv_3x3", 0), ("dil_conv_5x5", 2),
         ("max_pool_3x3", 0), ("dil_conv_3x3", 1), ("dil_conv_3x3", 1), ("dil_conv_5x5", 3)], [2, 3, 4, 5]),
    "PC_DARTS_cifar": Genotype(
        [("sep_conv_3x3", 1), ("skip_connect", 0), ("sep_conv_3x3", 0), ("dil_conv_3x3", 1),
         ("sep_conv_5x5", 0), ("sep_conv_3x3", 1), ("avg_pool_3x3", 0), ("dil_conv_3x3", 1)], [2, 3, 4, 5],
        [("sep_conv_5x5", 1), ("max_pool_3x3", 0), ("sep_conv_5x5", 1), ("sep_conv_5x5", 2),
         ("sep_conv_3x3", 0), ("sep_conv_3x3", 3), ("sep_conv_3x3", 1), ("sep_conv_3x3", 2)], [2, 3, 4, 5]),
    "PC_DARTS_image": Genotype(
        [("skip_connect", 1), ("sep_conv_3x3", 0), ("sep_conv_3x3", 0), ("skip_connect", 1),
         ("sep_conv_3x3", 1), ("sep_conv_3x3", 3), ("sep_conv_3x3", 1), ("dil_conv_5x5", 4)], [2, 3, 4, 5],
        [("sep_conv_3x3", 0), ("skip_connect", 1), ("dil_conv_5x5", 2), ("max_pool_3x3", 1),
         ("sep_conv_3x3", 2), ("sep_conv_3x3", 1), ("sep_conv_5x5", 0), ("sep_conv_3x3", 3)], [2, 3, 4, 5]),
}
# fmt: on


def save_genotype(genotype: Genotype | list[str], path: str | Path) -> None:
    """Write a genotype as JSON: the named tuple's four fields by name, or a list of the layers' operations."""
    if not isinstance(genotype, list):
        genotype = {field: list(value) for field, value in genotype._asdict().items()}
    part = Path(f"{path}.part")
    part.write_text(json.dumps(genotype, indent=1) + "\n")
    part.replace(path)


def load_genotype(name_or_path: str | Path, space: str = "cells") -> Genotype | list[str]:
    """A genotype by its name in GENOTYPES, or from a file, whose text parse_genotype explains.

    "genotypes.py:PDARTS" is the one that the file gives this name. space: "cells" or "mobilenet". Raises InputError
    where there is no such name or file, or the file holds no genotype that a network can be built from.
    """
    if space == "cells" and str(name_or_path) in GENOTYPES:
        return GENOTYPES[str(name_or_path)]
    try:
        path, name = Path(name_or_path), None
        before, _, after = str(name_or_path).rpartition(":")
        if space == "cells" and before and after.isidentifier() and not path.exists():
            path, name = Path(before), after
        return parse_genotype(path.read_text(encoding="utf-8-sig"), space, name)
    except (OSError, ValueError) as error:
        message = f"cannot use the genotype {str(name_or_path)!r} ({error}); known cells: {', '.join(GENOTYPES)}"
        raise InputError(message) from error


def parse_genotype(text: str, space: str = "cells", name: str | None = None) -> Genotype | list[str]:
    """A genotype from what people have: `Genotype(...)`, or a dictionary such as our JSON, anywhere in a text.

    Operations may be nested node by node, as khanrc/pt.darts does. Of several the one with this name is meant; else
    the last one, or what a Python file assigns last, for example `PCDARTS = PC_DARTS_cifar`. In the space
    "mobilenet": a list of one of MOBILE_PRIMITIVES per layer. Raises InputError.
    """
    if space == "mobilenet":
        return _parse_layers(text)

    found = _bracketed(text, r"Genotype\(", "(", ")")
    if not found:
        found = _bracketed(text, r"\{(?=[^{}]*['\"]normal['\"]\s*:)", "{", "}")

    # A Python file gives them names
    named = _named_genotypes(text)
    meant = "the last one"
    if name and name not in named:
        raise InputError(f"no genotype in it is called {name}")
    if named:
        meant = name or list(named)[-1]
        found.append(named[meant])
    if not name and len(set(found)) > 1:
        print(f"note: the text holds {len(set(found))} different genotypes; {meant} is meant")

    try:
        if found:
            fields = _fields(found[-1])
        else:
            fields = json.loads(text)
        normal = _edges(fields["normal"])
        reduce = _edges(fields["reduce"])
        genotype = Genotype(normal, _states(fields["normal_concat"]), reduce, _states(fields["reduce_concat"]))
    except Exception as error:  # whatever the parsers raise
        wanted = f"Genotype(...) nor a dictionary with {', '.join(Genotype._fields)}"
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"neither {wanted} could be read: {reason}") from error

    # A reduction cell's output cannot hold its inputs, states 0 and 1: they have twice the size
    _check_cell("normal", genotype.normal, genotype.normal_concat, first_state=0)
    _check_cell("reduce", genotype.reduce, genotype.reduce_concat, first_state=2)
    return genotype


def _parse_layers(text: str) -> list[str]:
    """A genotype of the MobileNet space. Nothing in the text is run."""
    try:
        names = ast.literal_eval(text.strip())
        known = isinstance(names, list) and names != [] and set(names) <= set(MOBILE_PRIMITIVES)
    except Exception:  # whatever literal_eval raises
        known = False
    if not known:
        raise InputError(f"not a list of operations, one per layer, out of {', '.join(MOBILE_PRIMITIVES)}")
    return names


def _named_genotypes(text: str) -> dict[str, str]:
    """The genotypes that a Python file assigns to names, {name: text}, the last one last. The file is not run."""
    try:
        statements = ast.parse(text).body
    except Exception:  # it is no Python
        return {}

    named = {}
    for statement in statements:
        if isinstance(statement, ast.Assign):
            name = ast.unparse(statement.targets[0])
            value = ast.get_source_segment(text, statement.value)
            value = named.get(value, value)  # PCDARTS = PC_DARTS_cifar
            if value.startswith("Genotype("):
                named.pop(name, None)
                named[name] = value
    return named


def _bracketed(text: str, start: str, opening: str, closing: str) -> list[str]:
    """The parts of a text from each match of `start`, whose first bracket is an opening one, to where that one closes.

    A part that is cut off, by the text's end or by the next match, is left out.
    """
    found = []
    begins = [match.start() for match in re.finditer(start, text)]
    for begin, end in zip(begins, [*begins[1:], len(text)]):
        depth = 0
        for i in range(begin, end):
            if text[i] == opening:
                depth += 1
            elif text[i] == closing:
                depth -= 1
                if depth == 0:
                    found.append(text[begin : i + 1])
                    break
    return found


def _fields(text: str) -> dict[str, list]:
    """The four fields of Genotype(...) or of a dictionary. Nothing in the text is run."""

    def value(node: ast.expr):
        if isinstance(node, (ast.List, ast.Tuple)):
            return [value(item) for item in node.elts]
        if not isinstance(node, ast.Call):
            return ast.literal_eval(node)

        # range(2, 6), np.int64(3), array([2, 3]); a range is cut off, as a very long one would fill the memory
        name = ast.unparse(node.func).split(".")[-1]
        arguments = [value(argument) for argument in node.args]
        if name == "range":
            return list(range(*arguments)[:100])
        if name in ("int32", "int64", "str_", "array"):
            return arguments[0]
        raise ValueError(f"{name}(...) is not a number or a list")

    whole = ast.parse(text, mode="eval").body
    if isinstance(whole, ast.Dict):
        nodes = {key.value: node for key, node in zip(whole.keys, whole.values)}
    else:
        nodes = dict(zip(Genotype._fields, whole.args))
        for keyword in whole.keywords:
            nodes[keyword.arg] = keyword.value
    return {field: value(nodes[field]) for field in Genotype._fields}


def _edges(edges: list) -> list[tuple[str, int]]:
    """[(operation, state), ...], flattened if it is nested node by node."""
    if edges and not isinstance(edges[0][0], str):
        edges = itertools.chain(*edges)
    return [(str(name), operator.index(state)) for name, state in edges]


def _states(states: list) -> list[int]:
    """The states as int. Raises TypeError for 0.5."""
    return [operator.index(state) for state in states]


def _check_cell(cell: str, edges: list[tuple[str, int]], concat: list[int], first_state: int) -> None:
    """Raises InputError if no network can be built from the cell; its output may hold states from first_state on."""
    if not edges or len(edges) % 2 or not concat:
        raise InputError(f"{cell} needs two operations for each node and at least one state to concatenate")
    for i, (name, state) in enumerate(edges):
        node = i // 2
        if name not in PRIMITIVES[1:]:
            raise InputError(f"unknown operation {name!r}: choose from {', '.join(PRIMITIVES[1:])}")
        if not 0 <= state < node + 2:
            raise InputError(f"node {node} of {cell} reads state {state}, which does not exist yet")
    last_state = len(edges) // 2 + 1
    if min(concat) < first_state or max(concat) > last_state:
        raise InputError(f"{cell}_concat must name states from {first_state} to {last_state}, not {concat}")


# ---------------------------------------------------------------------------------------------------------------------
# The network of a genotype (DARTS, its section 4 and its public code)
# ---------------------------------------------------------------------------------------------------------------------


def conv_bn(c_in: int, c_out: int, k: int, stride: int = 1) -> list[nn.Module]:
    """A k x k convolution without bias, padded to keep the size at stride 1 if k is odd, and batch norm."""
    conv = nn.Conv2d(c_in, c_out, k, stride, padding=(k - 1) // 2, bias=False)
    return [conv, nn.BatchNorm2d(c_out)]


def fix_batch_norms(module: nn.Module) -> None:
    """Weight and bias of every batch norm in `module` stay as they are: 1 and 0 in a new network.

    They become buffers, which no optimizer and no counter of parameters sees. The keys of its state_dict stay.
    """
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for name in ("weight", "bias"):
                value = getattr(norm, name).detach()
                delattr(norm, name)
                norm.register_buffer(name, value)


def learn_batch_norms(module: nn.Module) -> None:
    """Undo fix_batch_norms: weight and bias of every batch norm in `module` are parameters, with the same values."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for name in ("weight", "bias"):
                value = getattr(norm, name)
                if not isinstance(value, nn.Parameter):
                    delattr(norm, name)
                    setattr(norm, name, nn.Parameter(value))


def relu_conv_bn(c_in: int, c_out: int) -> nn.Sequential:
    """ReLU, 1x1 convolution, batch norm: what brings a cell's input to the cell's width."""
    return nn.Sequential(nn.ReLU(), *conv_bn(c_in, c_out, 1))


class FactorizedReduce(nn.Module):
    """Halve the resolution: ReLU, two 1x1 convolutions on every second pixel, batch norm.

    One reads the even pixels of the even rows, the other the odd pixels of the odd rows; half of all are not read.
    (B, c_in, H, W) to (B, c_out, H/2, W/2), rounded up; c_out must be even.
    """

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out // 2, 1, bias=False)
        self.conv2 = nn.Conv2d(c_in, c_out // 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(c_out)

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[2:]
        if H % 2 or W % 2:  # so that both halves have one size
            x = F.pad(x, (0, W % 2, 0, H % 2))

        # Every second pixel is taken here and not by a stride: on a CPU the gradient of a 1x1 convolution with stride
        # 2 and fewer than 16 channels can overwrite foreign memory (uxlfoundation/oneDNN, issue 6035)
        even = F.relu(x[:, :, ::2, ::2])
        odd = F.relu(x[:, :, 1::2, 1::2])
        return self.bn(torch.cat([self.conv1(even), self.conv2(odd)], 1))


def operation(name: str, channels: int, stride: int) -> nn.Sequential:
    """One of PRIMITIVES[1:] as DARTS defines it: `channels` in and out, the resolution divided by `stride`."""

    def separable(stride: int, dilation: int) -> list[nn.Module]:
        begin = [nn.ReLU()]
        if stride == dilation == 2:
            # Such a filter reads every second pixel only. On these pixels alone it needs no gaps, and is faster
            begin.append(nn.AvgPool2d(1, stride))
            stride = dilation = 1

        k = int(name[-1])  # sep_conv_3x3: 3
        padding = (k - 1) // 2 * dilation
        depthwise = nn.Conv2d(channels, channels, k, stride, padding, dilation, groups=channels, bias=False)
        return [*begin, depthwise, *conv_bn(channels, channels, 1)]

    if name == "max_pool_3x3":
        return nn.Sequential(nn.MaxPool2d(3, stride, padding=1))
    if name == "avg_pool_3x3":
        return nn.Sequential(nn.AvgPool2d(3, stride, padding=1, count_include_pad=False))
    if name == "skip_connect" and stride == 1:
        return nn.Sequential(nn.Identity())
    if name == "skip_connect":
        return nn.Sequential(FactorizedReduce(channels, channels))
    if name in ("sep_conv_3x3", "sep_conv_5x5"):
        return nn.Sequential(*separable(stride, dilation=1), *separable(1, dilation=1))
    if name in ("dil_conv_3x3", "dil_conv_5x5"):
        return nn.Sequential(*separable(stride, dilation=2))
    raise InputError(f"unknown operation {name!r}: choose from {', '.join(PRIMITIVES[1:])}")


def stems(kind: str, channels: int) -> tuple[nn.Module, nn.Module, int, bool]:
    """The layers before the cells: (stem0, stem1, channels, halved).

    The first cell reads s0 = stem0(images) and s1 = stem1(s0), both with `channels` channels; halved: s1 has half of
    s0's height and width. kind: "cifar", or "imagenet" for images from 64 pixels on, three convolutions of stride 2.
    """
    if kind == "cifar":
        return nn.Sequential(*conv_bn(3, 3 * channels, 3)), nn.Identity(), 3 * channels, False
    half = channels // 2
    stem0 = nn.Sequential(*conv_bn(3, half, 3, 2), nn.ReLU(), *conv_bn(half, channels, 3, 2))
    stem1 = nn.Sequential(nn.ReLU(), *conv_bn(channels, channels, 3, 2))
    return stem0, stem1, channels, True


def stem_for(images: Tensor | Photos) -> str:
    """The kind of stem for these images: "imagenet" from 64 x 64 pixels on."""
    return "imagenet" if images.shape[3] >= SMALL else "cifar"


def auxiliary_head(c_in: int, num_classes: int, stem: str = "cifar") -> nn.Sequential:
    """DARTS' auxiliary classifier: (B, c_in, 8, 8), or 7 x 7 with the ImageNet stem, to logits (B, num_classes).

    With the ImageNet stem no batch norm follows the second convolution, as in DARTS' code.
    """
    cifar = stem == "cifar"
    norm = [nn.BatchNorm2d(768)] if cifar else []
    return nn.Sequential(
        nn.ReLU(),
        nn.AvgPool2d(5, stride=3 if cifar else 2),
        *conv_bn(c_in, 128, 1),
        nn.ReLU(),
        nn.Conv2d(128, 768, 2, bias=False),
        *norm,
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),  # for images that are larger than DARTS'
        nn.Flatten(),
        nn.Linear(768, num_classes),
    )


def check_auxiliary(image_size: int) -> None:
    """Raises InputError where images of this side are too small for a network with an auxiliary head."""
    if image_size < 29 or SMALL <= image_size < 193:  # from 64 on with the ImageNet stem
        advice = "give --auxiliary-weight 0, or another --image-size"
        raise InputError(f"{image_size} pixels are too few for the auxiliary head: {advice}")


def drop_path(x: Tensor, p: float | Tensor, training: bool) -> Tensor:
    """In training the whole x of an image becomes 0 with probability p, and the others are divided by 1 - p (DARTS).

    x (B, C, H, W); p in [0, 1). p may be a tensor: then torch.compile makes one graph for all its values, where
    torchvision.ops.stochastic_depth makes one for each.
    """
    if not training or (not isinstance(p, Tensor) and p == 0):
        return x
    kept = torch.rand(len(x), 1, 1, 1, device=x.device) >= p
    return x * (kept / (1 - p)).to(x.dtype)


class Cell(nn.Module):
    """One cell of a genotype.

    It takes s0 (B, c_before, H, W), the output of the cell before the previous one, and s1 (B, c_in, H, W), the
    previous one's, and returns (B, channels * len(concat), H, W). With `halved` s0 has twice s1's height and width;
    with `reduction` the output has half of it.
    """

    def __init__(self, genotype: Genotype, c_before: int, c_in: int, channels: int, reduction: bool, halved: bool):
        super().__init__()
        if reduction:
            edges, self.concat = genotype.reduce, genotype.reduce_concat
        else:
            edges, self.concat = genotype.normal, genotype.normal_concat

        self.preprocess0 = FactorizedReduce(c_before, channels) if halved else relu_conv_bn(c_before, channels)
        self.preprocess1 = relu_conv_bn(c_in, channels)
        self.sources = [state for _, state in edges]
        self.ops = nn.ModuleList()
        for name, state in edges:
            stride = 2 if reduction and state < 2 else 1
            self.ops.append(operation(name, channels, stride))

    def forward(self, s0: Tensor, s1: Tensor, drop_path_prob: float | Tensor = 0.0) -> Tensor:
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        for i in range(0, len(self.ops), 2):
            first = self.edge(i, states, drop_path_prob)
            second = self.edge(i + 1, states, drop_path_prob)
            states.append(first + second)
        return torch.cat([states[i] for i in self.concat], 1)

    def edge(self, i: int, states: list[Tensor], drop_path_prob: float | Tensor) -> Tensor:
        """What edge i makes of its state, with drop-path in training; identities are never dropped, as in DARTS."""
        h = self.ops[i](states[self.sources[i]])
        if not isinstance(self.ops[i][0], nn.Identity):
            h = drop_path(h, drop_path_prob, self.training)
        return h


class Network(nn.Module):
    """The final network of a genotype: `layers` cells, reductions at layers//3 and 2*layers//3 (DARTS).

    Normalised images (B, 3, H, W) to logits (B, num_classes); in training with `auxiliary`, to (logits,
    auxiliary logits). drop_path_prob, in [0, 1), is an attribute that a training loop can set.
    """

    def __init__(
        self,
        genotype: Genotype,
        num_classes: int,
        channels: int,
        layers: int,
        auxiliary: bool = False,
        stem: str = "cifar",
    ):
        super().__init__()
        self.drop_path_prob = 0.0
        self.stem0, self.stem1, c_in, halved = stems(stem, channels)
        self.cells = nn.ModuleList()
        self.auxiliary = None
        self.auxiliary_at = 2 * layers // 3

        c_before = c_in
        for i in range(layers):
            reduction = i in (layers // 3, self.auxiliary_at)
            if reduction:
                channels *= 2
            cell = Cell(genotype, c_before, c_in, channels, reduction, halved)
            self.cells.append(cell)
            c_before = c_in
            c_in = channels * len(cell.concat)
            halved = reduction
            if auxiliary and i == self.auxiliary_at:
                self.auxiliary = auxiliary_head(c_in, num_classes, stem)
        self.classifier = nn.Linear(c_in, num_classes)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        with_auxiliary = self.training and self.auxiliary is not None
        s0 = self.stem0(x)
        s1 = self.stem1(s0)
        for i, cell in enumerate(self.cells):
            s0, s1 = s1, cell(s0, s1, self.drop_path_prob)
            if with_auxiliary and i == self.auxiliary_at:
                auxiliary_logits = self.auxiliary(s1)
        logits = self.classifier(s1.mean((2, 3)))
        return (logits, auxiliary_logits) if with_auxiliary else logits


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, without the auxiliary head, as the papers count them."""
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith("auxiliary"))


def count_flops(model: nn.Module, image_size: int) -> int:
    """Multiply-adds of classifying one image of image_size x image_size pixels: the papers' "FLOPs".

    Convolutions and matrix products. (torch.utils.flop_counter counts each multiply-add as two.)
    """
    training = model.training
    image = next(model.parameters()).new_zeros(1, 3, image_size, image_size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(image)
    model.train(training)
    return counter.get_total_flops() // 2


# ---------------------------------------------------------------------------------------------------------------------
# A picture of a cell
# ---------------------------------------------------------------------------------------------------------------------

# Okabe and Ito's colours, which people with any colour vision tell apart; in the order of PRIMITIVES
OPERATION_COLORS = ("#999999", "#E69F00", "#F0E442", "#56B4E9", "#009E73", "#0072B2", "#CC79A7", "#D55E00")


def draw_cell(edges: list[tuple[str, int]], concat: list[int], axis, title: str) -> None:
    """Draw a cell, such as genotype.normal with genotype.normal_concat, on a matplotlib axis."""
    nodes = len(edges) // 2

    # Inputs stand on the left, the output on the right, every node in a row of its own, as far right as its depth
    depth = [0, 0]
    for j in range(nodes):
        depth.append(1 + max(depth[state] for _, state in edges[2 * j : 2 * j + 2]))
    width = 14.0
    height = max(nodes - 1, 1)
    places = [(0.0, 0.85 * height), (0.0, 0.15 * height)]
    for j in range(nodes):
        places.append((width * depth[j + 2] / (max(depth) + 1), nodes - 1 - j))
    output = (width, height / 2)

    def box(place: tuple[float, float], text: str, size: int, style: str, **colors) -> None:
        outline = {"boxstyle": style, **colors}
        axis.text(*place, text, ha="center", va="center", fontsize=size, zorder=3, bbox=outline)

    def arrow(start: tuple[float, float], end: tuple[float, float], **line) -> None:
        axis.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "-|>", "shrinkA": 13, **line}, zorder=1)

    # An edge: an arrow from the state that it reads to a box with the operation's name, and a line on to the node
    for j in range(nodes):
        x, y = places[j + 2]
        pair = sorted(edges[2 * j : 2 * j + 2], key=lambda edge: -places[edge[1]][1])  # the higher source on top
        for (name, state), y_box in zip(pair, (y + 0.21, y - 0.21)):
            color = OPERATION_COLORS[PRIMITIVES.index(name)]
            arrow(places[state], (x - 2.35, y_box), shrinkB=0, color=color, linewidth=1.3)
            box((x - 1.4, y_box), name, 8, "round,pad=0.25", facecolor="white", edgecolor=color, linewidth=1.6)
            axis.plot([x - 0.7, x - 0.2], [y_box, y], color=color, linewidth=1.3, zorder=1)
    for state in concat:
        arrow(places[state], output, shrinkB=15, color="0.6", linestyle=":")

    names = ["$c_{k-2}$", "$c_{k-1}$", *map(str, range(nodes))]
    fills = ["0.88"] * 2 + ["white"] * nodes
    for place, name, fill in zip(places, names, fills):
        box(place, name, 9, "circle,pad=0.32", facecolor=fill, edgecolor="0.2")
    box(output, "$c_k$\nconcat", 9, "round,pad=0.35", facecolor="0.88", edgecolor="0.2")
    axis.set(xlim=(-0.7, width + 0.8), ylim=(-0.6, nodes - 0.4), title=title)
    axis.axis("off")
