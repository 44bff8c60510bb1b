"""What the three scripts share: data sets as tensors, and DARTS genotypes (names, files, networks, pictures).

    data = load_data("shapes")                                       # uint8 tensors, nothing to download
    net = Network(GENOTYPES["DARTS_V2"], num_classes=10, channels=36, layers=20)
    logits = net(normalize(data.test_images[:8], *mean_std(data.train_images)))
"""

from __future__ import annotations

import ast
import json
import math
import os
import random
import urllib.error
from collections import namedtuple
from collections.abc import Iterator, Sequence
from copy import copy
from functools import partial
from multiprocessing.pool import ThreadPool
from operator import index
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

class InputError(ValueError):
    """Something the user gave cannot be used; the message is one line that says what to do."""

# -------- Data sets -----------------------------------------------------------------------------------------
# Small images are one uint8 tensor on the training device: no worker processes, no per-image Python in the
# training loop. Photographs are files, read once or, where they do not fit into memory, again in every epoch.
# `loader` hides the difference.

PHOTOS = ("flowers102", "sport8", "mit67", "imagenet")  # and `folder` with an image_size of 64 or more
DATASETS = ("cifar10", "cifar100", "svhn", *PHOTOS, "folder", "shapes")
SHAPE_CLASSES = ("disk", "ring", "square", "frame", "triangle", "star", "plus", "bar", "crescent", "corner")

class Data(NamedTuple):
    """One data set: images uint8 (N, 3, H, W) or Photos, labels int64 (N,), class names in label order."""
    train_images: Tensor | Photos
    train_labels: Tensor
    test_images: Tensor | Photos
    test_labels: Tensor
    classes: list[str]

    def to(self, device: torch.device | str) -> Data:
        """The same data set, whose batches lie on `device`."""
        return Data(*(x.to(device) for x in self[:4]), self.classes)

def load_data(
    dataset: str, data_dir: str | Path = "data", image_size: int | None = None,
    limit_train: int | None = None, limit_test: int | None = None, workers: int = 4,
    seed: int = 0, cache_gb: float = 8.0, skip_damaged: bool = False,
) -> Data:
    """Load (downloading where that is possible) one of `DATASETS`.
    image_size: side in pixels; None: 224 for photographs, else the images' own size, which must be one size.
    limit_train, limit_test: keep that many images, a random choice that is the same for every seed.
    workers: threads or processes that read image files. seed: draws sport8's split and nothing else.
    cache_gb: photographs that fit in so many GB are kept in memory. skip_damaged: leave out image files
    that cannot be read, with a warning. Raises InputError where data are missing or damaged."""
    root, limits, tensors = Path(data_dir), (limit_train, limit_test), []
    if dataset in ("folder", *PHOTOS):
        find = {"sport8": partial(_sport8, seed=seed), "mit67": _mit67, "flowers102": _flowers102}
        try:
            *splits, classes = find.get(dataset, _train_and_test)(root)
        except (OSError, UnicodeDecodeError) as e:
            raise InputError(f"cannot read {dataset} in {root} ({e}): check --data-dir") from e
        size, left = image_size or 224 * (dataset in PHOTOS), cache_gb * 1e9
        for found, limit in zip(splits, limits):
            if not found:
                raise InputError(f"no images to train or test on in {root}: {dataset} has a folder a class")
            files, labels = zip(*(found[i] for i in _keep(len(found), limit).tolist()))
            images, labels = Photos(files, size, workers, skip_damaged), torch.tensor(labels)
            if dataset == "folder" and size < 64:
                images, labels = images.stacked(labels, tensors[0].shape[2:] if tensors else None)
            else:
                left -= images.cache(left)
            tensors += [images, labels]
        return Data(*tensors, classes)
    if dataset == "shapes":
        splits, classes = [shapes(6000, seed=1), shapes(1000, seed=2)], list(SHAPE_CLASSES)
    elif dataset in DATASETS:
        splits, classes = _from_torchvision(dataset, str(data_dir))
    else:
        raise InputError(f"unknown data set {dataset!r}: choose from {', '.join(DATASETS)}")
    for (images, labels), limit in zip(splits, limits):
        keep = _keep(len(images), limit)
        images = images[keep].contiguous()
        if image_size:
            images = torch.cat([_scale(part, (image_size, image_size)) for part in images.split(1000)])
        tensors += [images, labels[keep]]
    return Data(*tensors, classes)

def _keep(count: int, limit: int | None) -> Tensor:
    """Which of `count` items a limit keeps: no seed enters, so that seeds compare on the same images."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order[: limit or count].sort().values

def _torchvision_set(dataset: str, root: str, build) -> torchvision.datasets.VisionDataset:
    """What build() returns, which may download it. Raises InputError where that is not possible."""
    try:
        return build()
    except ImportError as e:
        raise InputError(f"{dataset} needs the package {e.name} (pip install {e.name})") from e
    except (urllib.error.URLError, ConnectionError, TimeoutError) as e:
        raise InputError(f"cannot download {dataset} ({e}): put it in {root} or use --dataset shapes") from e
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as e:
        raise InputError(f"cannot read {dataset} in {root} ({e}): delete its files and start again") from e

def _from_torchvision(dataset: str, root: str) -> tuple[list[tuple[Tensor, Tensor]], list[str]]:
    """CIFAR-10, CIFAR-100 or SVHN: (images, labels) to train and to test on, and the names of the classes."""
    parts = ("train", "test") if dataset == "svhn" else (True, False)
    build = partial(getattr(torchvision.datasets, dataset.upper()), root, download=True)
    sets = [_torchvision_set(dataset, root, partial(build, part)) for part in parts]
    if dataset == "svhn":
        splits = [(torch.from_numpy(s.data), torch.from_numpy(s.labels)) for s in sets]
        return splits, [str(digit) for digit in range(10)]
    images = [torch.from_numpy(s.data).permute(0, 3, 1, 2) for s in sets]  # from (N, H, W, 3)
    return list(zip(images, [torch.tensor(s.targets) for s in sets])), sets[0].classes

def _files(directory: Path, classes: list[str]) -> list[tuple[str, int]]:
    """The images in a folder a class, in any format that Pillow reads: (path, label)."""
    found, endings = [], torchvision.datasets.folder.IMG_EXTENSIONS
    for name in _class_names(directory):
        if name not in classes:
            raise InputError(f"{directory} has a class that the training images lack: {name}")
        paths = sorted(e.path for e in os.scandir(directory / name) if e.name.lower().endswith(endings))
        label = classes.index(name)
        found += [(path, label) for path in paths]
        if not paths:
            raise InputError(f"no images in {directory / name}: expected *{{{','.join(endings)}}} there")
    return found

def _class_names(directory: Path) -> list[str]:
    return sorted(d.name for d in directory.iterdir() if d.is_dir() and not d.name.startswith("."))

def _train_and_test(root: Path) -> tuple[list, list, list[str]]:
    """folder and imagenet: `train/<class>/*` and `test/<class>/*` (or `val/`)."""
    train, test = root / "train", root / "test"
    if not test.is_dir():
        test = root / "val"
    if not (train.is_dir() and test.is_dir()):
        raise InputError(f"{root} must hold train/<class>/* and test/<class>/* (or val/): check --data-dir")
    classes = _class_names(train)
    return _files(train, classes), _files(test, classes), classes

def _sport8(root: Path, seed: int) -> tuple[list, list, list[str]]:
    """A folder a class, perhaps in `event_img/`: 70 images a class to train on, 60 to test (Li & Fei-Fei)."""
    root = root / "event_img" if (root / "event_img").is_dir() else root
    classes, g, train, test = _class_names(root), torch.Generator().manual_seed(seed), [], []
    found = _files(root, classes)
    for label, name in enumerate(classes):
        mine = [item for item in found if item[1] == label]
        if len(mine) < 130:
            raise InputError(f"{root / name} has {len(mine)} images: sport8 takes 70 + 60 of every class")
        mine = [mine[i] for i in torch.randperm(len(mine), generator=g)]
        train, test = train + mine[:70], test + mine[70:130]
    return train, test, classes

def _mit67(root: Path) -> tuple[list, list, list[str]]:
    """`Images/<class>/*`; `TrainImages.txt` and `TestImages.txt` name them, as `<class>/<file>` a line."""
    lists = [(root / name).read_text().split("\n") for name in ("TrainImages.txt", "TestImages.txt")]
    train, test = ([line.strip() for line in lines if line.strip()] for lines in lists)
    classes = sorted({line.split("/")[0] for line in train})
    for line in train + test:
        if line.split("/")[0] not in classes or not (root / "Images" / line).is_file():
            raise InputError(f"{root}: its lists name {line!r}, which is not in Images/: unpack all of it")
    item = lambda line: (str(root / "Images" / line), classes.index(line.split("/")[0]))
    return [item(line) for line in train], [item(line) for line in test], classes

def _flowers102(root: Path) -> tuple[list, list, list[str]]:
    """Flowers102 through torchvision: train + val to train on."""
    build = partial(torchvision.datasets.Flowers102, str(root), download=True)
    sets = [_torchvision_set("flowers102", root, partial(build, name)) for name in ("train", "val", "test")]
    train, val, test = ([(str(file), label) for file, label in zip(s._image_files, s._labels)] for s in sets)
    return train + val, test, [str(k + 1) for k in range(102)]

def _rgb(path: str, least: int = 0, decode: bool = True) -> tuple[Image.Image | None, tuple[int, int]]:
    """An image as RGB (None without `decode`), and width and height in its file. InputError if it is damaged.
    least: a JPEG of twice that side and more comes smaller, not below it: 4000 x 3000 in 0.6 of the time."""
    try:
        with Image.open(path) as image:
            size = image.size
            if not decode:
                return None, size
            if least:
                image.draft(None, (least, least))
            if image.mode.startswith("I"):  # 16 bits of gray, which convert() would cut off at 255
                image = image.point(lambda value: value * (1 / 257) + 0).convert("L")
            return image.convert("RGB"), size
    except (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError) as e:
        raise InputError(f"cannot read the image {path} ({e}): mend it, delete it or --skip-damaged") from e

def random_box(height: int, width: int, draw: random.Random) -> tuple[int, int, int, int]:
    """Of random resized crop (Inception, torchvision): (top, left, height, width) of a part of an image.
    8 to 100 % of its area, 3/4 to 4/3 as wide as high; the middle where ten draws do not fit."""
    for _ in range(10):
        area = height * width * draw.uniform(0.08, 1)
        ratio = math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3)))
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            return draw.randint(0, height - h), draw.randint(0, width - w), h, w
    h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w

class Photos:
    """Photographs of any size in files: what `loader` takes in place of a tensor (N, 3, S, S). Training sees
    random resized crops, flipped in half the cases; evaluation the middle of the image, scaled to a shorter
    side of S * 256 / 224. The processes or threads that read do it, on uint8: 0.3 ms an image on 2 cores,
    where a grid_sample of the batch, on floats padded to one size, takes 1.5 to 2."""
    def __init__(self, files: Sequence[str], size: int, workers: int = 4, skip_damaged: bool = False):
        self.files, self.size, self.workers, self.skip = files, size, workers, skip_damaged
        self.side, self.shape = round(size * 256 / 224) if size >= 64 else size, (len(files), 3, size, size)
        self.device, self.pixels, self.damaged = torch.device("cpu"), None, set()

    def __len__(self) -> int:
        return len(self.files)

    def to(self, device: torch.device | str) -> Photos:
        moved = copy(self)
        moved.device = torch.device(device)
        return moved

    def scaled_size(self, w: int, h: int) -> tuple[int, int]:
        """Height and width of an image of this width and height once its shorter side is `self.side`."""
        side = self.side or min(w, h)
        return side * h // min(w, h), side * w // min(w, h)

    def read(self, i: int, scaled: bool = True) -> Tensor:
        """Image i, uint8 (3, h, w), from memory or from its file, where `scaled` matters; or InputError."""
        if self.pixels is not None:
            start, (h, w) = self.starts[i], self.sizes[i]
            if i in self.damaged:
                raise InputError(f"cannot read the image {self.files[i]}")
            return self.pixels[start : start + 3 * h * w].view(h, w, 3).permute(2, 0, 1)
        image, size = _rgb(self.files[i], 2 * self.side)
        image = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return _scale(image[None], self.scaled_size(*size))[0] if scaled else image

    def view(self, i: int, seed: int | None = None) -> Tensor:
        """What a batch shows of image i, (3, S, S): a random part, or without seed the middle."""
        image = self.read(i, scaled=seed is None)
        _, H, W = image.shape
        if seed is None:
            h, w = (self.size, self.size) if self.size else (H, W)
            top, left = round((H - h) / 2), round((W - w) / 2)
            return image[:, top : top + h, left : left + w]
        draw = random.Random(seed + i)
        top, left, h, w = random_box(H, W, draw)
        part = _scale(image[None, :, top : top + h, left : left + w], (self.size, self.size))[0]
        return part.flip(2) if draw.random() < 0.5 else part

    def some(self, indices: Sequence[int], view, run=map) -> tuple[dict, dict[int, str]]:
        """i -> view(i) for these indices; i -> what is wrong where an image is damaged."""
        found = dict(zip(indices, run(partial(_or_error, view), indices)))
        damaged = {i: x for i, x in found.items() if isinstance(x, str)}
        return {i: x for i, x in found.items() if i not in damaged}, damaged

    def batch(self, indices: list[int], seed: int | None, run=map) -> tuple[Tensor, list[int], dict]:
        """The views of some images, (n, 3, S, S); which they are; what is wrong with the others."""
        out = torch.empty(len(indices), *self.shape[1:], dtype=torch.uint8)
        put = lambda k: out[k].copy_(self.view(indices[k], seed))  # threads fill it: 1.2 x torch.stack
        good, damaged = self.some(range(len(indices)), put, run)
        damaged = {indices[k]: why for k, why in damaged.items()}
        return out[list(good)] if damaged else out, [indices[k] for k in good], damaged

    def report(self, damaged: dict[int, str]) -> None:
        """Damaged images, number -> what is wrong: raises InputError, or counts those that are skipped."""
        for i in sorted(damaged.keys() - self.damaged):
            self.damaged.add(i)
            if not self.skip or len(self.damaged) == len(self):
                raise InputError(damaged[i])
            print(f"warning: {damaged[i]}; skipped, {len(self.damaged)} so far")

    def in_processes(self, collate, **batches) -> Iterator:
        """collate(indices) for the batches of a DataLoader's arguments. InputError where a worker dies."""
        batches |= {"num_workers": min(self.workers, os.cpu_count()), "pin_memory": torch.cuda.is_available()}
        batches["generator"] = torch.Generator()  # else it draws from the global one
        try:
            yield from DataLoader(range(len(self)), collate_fn=collate, **batches)
        except RuntimeError as e:
            reason = str(e).splitlines()[0]
            raise InputError(f"reading images failed ({reason}): fewer --workers, or more memory") from e

    def cache(self, budget: float) -> int:
        """Decode all of them now, if scaled they take at most `budget` bytes. Returns the bytes they take."""
        if len(self) * 3 * self.side**2 > budget:  # the least they take: spares a look at millions of files
            return 0
        size_of = lambda i: self.scaled_size(*_rgb(self.files[i], decode=False)[1])
        with ThreadPool(self.workers) as pool:
            sizes, damaged = self.some(range(len(self)), size_of, pool.map)
        self.report(damaged)
        self.sizes = [sizes.get(i, (0, 0)) for i in range(len(self))]
        *self.starts, total = np.cumsum([0] + [3 * h * w for h, w in self.sizes]).tolist()
        if total > budget:
            return 0
        print(f"reading {len(self)} photographs into memory, {total / 1e9:.1f} GB", flush=True)
        pixels = torch.empty(total, dtype=torch.uint8)
        for images, damaged in self.in_processes(partial(self.some, view=self.read), batch_size=4):
            self.report(damaged)
            for i, image in images.items():
                place = pixels[self.starts[i] : self.starts[i] + image.numel()]
                place.view(*self.sizes[i], 3).copy_(image.permute(1, 2, 0))
        self.pixels, self.pool = pixels, ThreadPool(self.workers)
        return total

    def batches(self, order: Sequence[Tensor], train: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """uint8 images (B, 3, S, S) and their indices, batch by batch; fewer where images are damaged."""
        order, seed = [batch.tolist() for batch in order], int(torch.randint(2**62, ())) if train else None
        if self.pixels is None:
            found = self.in_processes(partial(self.batch, seed=seed), batch_sampler=order)
        else:
            found = map(partial(self.batch, seed=seed, run=self.pool.map), order)
        for images, good, damaged in found:
            self.report(damaged)
            if good:
                yield images, torch.tensor(good)

    def stacked(self, labels: Tensor, shape: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
        """The middles of all images as one tensor, and their labels. Where S is 0 they must be of one size,
        `shape` if given."""
        with ThreadPool(self.workers) as pool:
            images, damaged = self.some(range(len(self)), self.view, pool.map)
        self.report(damaged)
        H, W = shape or next(iter(images.values())).shape[1:]
        for i, (_, h, w) in zip(images, (image.shape for image in images.values())):
            if (h, w) != (H, W):
                raise InputError(f"{self.files[i]} is {w}x{h}, others are {W}x{H}: give --image-size")
        return torch.stack(list(images.values())), labels[list(images)]

def _or_error(f, i: int):
    """f(i), or the text of the InputError that it raises."""
    try:
        return f(i)
    except InputError as e:
        return str(e)

def _scale(images: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 (B, 3, H, W) to (B, 3, *size)."""
    if images.shape[2:] == size:
        return images
    return F.interpolate(images, size, mode="bilinear", antialias=True)

def loader(images: Tensor | Photos, labels: Tensor, order: Sequence[Tensor], train: bool
           ) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of `order`, tensors of indices: uint8 images (B, 3, H, W), labels (B,), on the device.
    train: cropped and flipped at random (random_crop_flip; Photos: random resized crop)."""
    if isinstance(images, Photos):
        for found in images.batches(order, train):
            if images.device.type == "cuda":  # from pageable memory a copy would wait for the steps before
                found = [tensor.pin_memory() for tensor in found]
            x, indices = (tensor.to(images.device, non_blocking=True) for tensor in found)
            yield x, labels[indices]
    else:
        for batch in order:
            yield random_crop_flip(images[batch]) if train else images[batch], labels[batch]

def shapes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """A generated data set that takes a network to learn: one of 10 figures on a cluttered ground, 32x32.
    Colour, position, scale, rotation, background and noise all vary. Measured with 6,000 training images:
    a linear classifier on the pixels reaches 26 %, a small convolutional network passes 85 %.
    Returns images uint8 (count, 3, 32, 32), labels int64 (count,), the same for the same count and seed."""
    g = torch.Generator().manual_seed(seed)
    uniform = lambda low, high, *shape: torch.rand(count, *shape, generator=g) * (high - low) + low
    labels = torch.arange(count) % 10
    side = (torch.arange(32) + 0.5) / 16 - 1
    angle, scale = uniform(-0.5, 0.5, 1, 1), uniform(0.65, 0.95, 1, 1)
    dx = side.view(1, 1, 32) - uniform(-0.15, 0.15, 1, 1)
    dy = side.view(1, 32, 1) - uniform(-0.15, 0.15, 1, 1)
    xs = (angle.cos() * dx + angle.sin() * dy) / scale  # (N, 32, 32), the figure's own coordinates
    ys = (angle.cos() * dy - angle.sin() * dx) / scale
    distance = torch.empty(count, 32, 32)
    for k, name in enumerate(SHAPE_CLASSES):
        distance[k::10] = _edge_distance(name, xs[k::10], ys[k::10])
    mask = (0.5 - distance * scale * 16).clamp(0, 1).unsqueeze(1)  # one pixel of anti-aliasing
    ground = uniform(0, 1, 3, 1, 1)
    ground = ground + 0.15 * F.interpolate(uniform(-0.5, 0.5, 3, 4, 4), (32, 32), mode="bicubic")
    contrast = F.normalize(torch.randn(count, 3, 1, 1, generator=g)) * uniform(0.7, 1.1, 1, 1, 1)
    figure = ground.mean((2, 3), keepdim=True) + contrast
    figure = figure + 0.15 * F.interpolate(uniform(-0.5, 0.5, 3, 2, 2), (32, 32))
    images = ground * (1 - mask) + figure * mask
    images = images - images.amin((1, 2, 3), keepdim=True).clamp(max=0)  # into [0, 1], no colour flattened
    images = images / images.amax((1, 2, 3), keepdim=True).clamp(min=1)
    images = images + torch.randn(images.shape, generator=g) * uniform(0, 0.02, 1, 1, 1)
    order = torch.randperm(count, generator=g)
    return (images[order] * 255).round().clamp(0, 255).to(torch.uint8), labels[order]

def _edge_distance(name: str, x: Tensor, y: Tensor) -> Tensor:
    """Distance of the points (x, y) from the edge of a figure of about unit radius, negative inside."""
    radius = (x**2 + y**2).sqrt()
    box = lambda cx, cy, w, h: torch.maximum((x - cx).abs() - w, (y - cy).abs() - h)

    def along(n: int) -> Tensor:  # (n, ...): how far the points lie in each of n directions
        turns = [2 * math.pi * k / n for k in range(n)]
        return torch.stack([math.cos(t) * x + math.sin(t) * y for t in turns])

    figures = {
        "disk": lambda: radius - 0.8,
        "ring": lambda: (radius - 0.7).abs() - 0.17,
        "square": lambda: box(0, 0, 0.72, 0.72),
        "frame": lambda: box(0, 0, 0.64, 0.64).abs() - 0.15,
        "triangle": lambda: along(3).amax(0) - 0.45,
        "star": lambda: along(5).sort(0).values[3] - 0.33,  # inside four of five half-planes
        "plus": lambda: torch.minimum(box(0, 0, 0.9, 0.26), box(0, 0, 0.26, 0.9)),
        "bar": lambda: box(0, 0, 0.95, 0.25),
        "crescent": lambda: torch.maximum(radius - 0.85, 0.72 - ((x - 0.5) ** 2 + y**2).sqrt()),
        "corner": lambda: torch.minimum(box(-0.5, 0, 0.25, 0.8), box(0, 0.55, 0.75, 0.25)),
    }
    return figures[name]()

def stem_for(images: Tensor | Photos) -> str:
    """What comes before the cells of a network for these images: "imagenet" from 64 pixels on, or "cifar"."""
    return "imagenet" if images.shape[3] >= 64 else "cifar"

def mean_std(images: Tensor | Photos) -> tuple[Tensor, Tensor]:
    """Mean and deviation, (3,) each, of the channels of uint8 images (N, 3, H, W), in units of [0, 1].
    Of Photos, which need not be read for it: those that everybody uses for ImageNet."""
    if isinstance(images, Photos):
        return tuple(torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], device=images.device))
    counts = [torch.bincount(channel.flatten().int(), minlength=256) for channel in images.unbind(1)]
    share = torch.stack(counts).double()
    share /= share.sum(1, keepdim=True)  # (3, 256)
    levels = torch.arange(256, dtype=torch.float64, device=images.device) / 255
    mean = (share * levels).sum(1)
    std = (share * (levels - mean[:, None]) ** 2).sum(1).sqrt()
    return mean.float(), std.clamp(min=1e-3).float()

def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Images (B, 3, H, W), uint8 or float in [0, 1], to zero mean and unit deviation, in channels_last."""
    if images.dtype == torch.uint8:
        images = images.float() / 255
    images = (images - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    return images.contiguous(memory_format=torch.channels_last)

def batches(count: int, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> Tensor:
    """One epoch of `count` images in random order: indices (steps, batch_size // world), int64, on the CPU.
    A batch holds at most all images; an incomplete last one is left out. Of every batch, process `rank` of
    `world` gets its share. Raises InputError where a batch cannot be shared evenly."""
    batch_size = min(batch_size, count)
    if batch_size % world:
        raise InputError(f"a batch of {batch_size} images cannot be shared by {world} processes")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[: count // batch_size * batch_size].view(-1, batch_size)[:, rank::world]

def random_crop_flip(images: Tensor, padding: int = 4) -> Tensor:
    """Every image shifted by up to `padding` pixels each way (zeros come in); mirrored in half the cases."""
    B, C, H, W = images.shape
    device = images.device
    rows = torch.randint(0, 2 * padding + 1, (B, 1), device=device) + torch.arange(H, device=device)  # (B, H)
    cols = torch.randint(0, 2 * padding + 1, (B, 1), device=device) + torch.arange(W, device=device)  # (B, W)
    cols = torch.where(torch.rand(B, 1, device=device) < 0.5, cols.flip(1), cols)
    batch = torch.arange(B, device=device).view(B, 1, 1, 1)
    channel = torch.arange(C, device=device).view(1, C, 1, 1)
    return F.pad(images, [padding] * 4)[batch, channel, rows.view(B, 1, H, 1), cols.view(B, 1, 1, W)]

def cutout(images: Tensor, length: int) -> Tensor:
    """Cutout (DeVries & Taylor): a square of side `length` around a random pixel of each image set to 0."""
    B, _, H, W = images.shape
    device = images.device
    y = torch.randint(0, H, (B, 1, 1, 1), device=device) - torch.arange(H, device=device).view(H, 1)
    x = torch.randint(0, W, (B, 1, 1, 1), device=device) - torch.arange(W, device=device)
    half = length // 2
    hole = (y <= half) & (y > half - length) & (x <= half) & (x > half - length)  # (B, 1, H, W)
    return images.masked_fill(hole, 0)

# -------- Genotypes -----------------------------------------------------------------------------------------
# Quark0/darts' named tuple, its meaning and its text, so that cells paste both ways.

PRIMITIVES = ("none", "max_pool_3x3", "avg_pool_3x3", "skip_connect",
              "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5")

# ProxylessNAS' operations: expansion of the width, kernel.
MOBILE_PRIMITIVES = ("mbconv3_3x3", "mbconv6_3x3", "mbconv3_5x5", "mbconv6_5x5", "mbconv3_7x7", "mbconv6_7x7",
                     "skip_connect")

# normal, reduce: [(operation, state it reads), ...], two for each node; states 0 and 1 are the cell's inputs.
Genotype = namedtuple("Genotype", "normal normal_concat reduce reduce_concat")

def _known(normal: str, reduce: str) -> Genotype:
    """A published cell in short: "sep31" is sep_conv_3x3 from state 1."""
    names = dict(zip(("max", "avg", "skip", "sep3", "sep5", "dil3", "dil5"), PRIMITIVES[1:]))
    cells = [[(names[word[:-1]], int(word[-1])) for word in text.split()] for text in (normal, reduce)]
    return Genotype(cells[0], [2, 3, 4, 5], cells[1], [2, 3, 4, 5])

GENOTYPES = {
    "DARTS_V1": _known("sep31 sep30 skip0 sep31 skip0 sep31 sep30 skip2",
                       "max0 max1 skip2 max0 max0 skip2 skip2 avg0"),
    "DARTS_V2": _known("sep30 sep31 sep30 sep31 sep31 skip0 skip0 dil32",
                       "max0 max1 skip2 max1 max0 skip2 skip2 max1"),
    "PDARTS": _known("skip0 dil31 skip0 sep31 sep31 sep33 sep30 dil54",
                     "avg0 sep51 sep30 dil52 max0 dil31 dil31 dil53"),
    "PC_DARTS_cifar": _known("sep31 skip0 sep30 dil31 sep50 sep31 avg0 dil31",
                             "sep51 max0 sep51 sep52 sep30 sep33 sep31 sep32"),
    "PC_DARTS_image": _known("skip1 sep30 sep30 skip1 sep31 sep33 sep31 dil54",
                             "sep30 skip1 dil52 max1 sep32 sep31 sep50 sep33"),
}

def save_genotype(genotype: Genotype | list[str], path: str | Path) -> None:
    """Write a genotype as JSON: the named tuple's four fields under their names, or the layers' names."""
    plain = genotype if isinstance(genotype, list) else {k: list(v) for k, v in genotype._asdict().items()}
    Path(path).write_text(json.dumps(plain, indent=1) + "\n")

def load_genotype(name_or_path: str | Path, space: str = "cells") -> Genotype | list[str]:
    """A genotype by its name in `GENOTYPES`, or from a file: JSON, or the text `Genotype(normal=[...], ...)`.
    In the space "mobilenet" it is a JSON list, one of MOBILE_PRIMITIVES a layer.
    Raises InputError where there is no such name or file, or the file holds no valid genotype."""
    if str(name_or_path) in GENOTYPES and space == "cells":
        return GENOTYPES[str(name_or_path)]
    path = Path(name_or_path)
    try:
        return parse_genotype(path.read_text(), space)
    except FileNotFoundError:
        raise InputError(f"no {space} genotype {str(path)!r}; known cells: {', '.join(GENOTYPES)}") from None
    except (OSError, ValueError) as e:  # InputError is one
        raise InputError(f"cannot use the genotype in {path}: {e}") from e

def parse_genotype(text: str, space: str = "cells") -> Genotype | list[str]:
    """A genotype from JSON or quark0/darts' text, also behind `NAME = `; InputError where it is not valid.
    In the space "mobilenet": from a list of names, as JSON or Python write it."""
    if space == "mobilenet":
        try:
            names = ast.literal_eval(text.strip())
            if isinstance(names, list) and names and set(names) <= set(MOBILE_PRIMITIVES):
                return names
        except Exception:  # literal_eval alone raises five kinds
            pass
        raise InputError(f"not a list of {', '.join(MOBILE_PRIMITIVES)}, one a layer")

    def value(node: ast.expr) -> list:
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "range":
            return list(range(*map(ast.literal_eval, node.args))[:100])  # no cell is larger
        return ast.literal_eval(node)

    try:
        if text.lstrip().startswith("{"):
            fields = json.loads(text)
        else:
            call = ast.parse(text.strip()).body[-1].value
            fields = dict(zip(Genotype._fields, map(value, call.args)))
            fields |= {keyword.arg: value(keyword.value) for keyword in call.keywords}
        cells = {c: [(str(op), index(state)) for op, state in fields[c]] for c in ("normal", "reduce")}
        concat = {c: [index(state) for state in fields[f"{c}_concat"]] for c in ("normal", "reduce")}
    except Exception as e:  # literal_eval alone raises five kinds
        raise InputError(f"not a genotype ({type(e).__name__}: {e}); use Genotype(normal=[...], ...)") from e
    for cell, edges in cells.items():
        states = len(edges) // 2 + 2
        if not edges or len(edges) % 2 or not concat[cell]:
            raise InputError(f"{cell} needs two operations a node and at least one state to concatenate")
        for i, (op, state) in enumerate(edges):
            if op not in PRIMITIVES[1:]:
                raise InputError(f"unknown operation {op!r}: choose from {', '.join(PRIMITIVES[1:])}")
            if not 0 <= state < i // 2 + 2:
                raise InputError(f"node {i // 2} of {cell} reads state {state}, which does not exist yet")
        if not all(0 <= state < states for state in concat[cell]):
            raise InputError(f"{cell}_concat names a state outside 0..{states - 1}")
    return Genotype(cells["normal"], concat["normal"], cells["reduce"], concat["reduce"])

# -------- The network of a genotype (DARTS, section 4 and its public code), and a picture of its cells ------

class PointwiseConv(nn.Conv2d):
    """A 1 x 1 convolution as the matrix product that it is: (B, c_in, H, W) to (B, c_out, H, W).
    It keeps its input only where the weight learns, which a convolution always does: a search step at C=16
    takes 0.91 of the memory and 0.96 of the time. Fast on channels_last images."""
    def __init__(self, c_in: int, c_out: int):
        super().__init__(c_in, c_out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1)).permute(0, 3, 1, 2)

def conv_bn(c_in: int, c_out: int, k: int, stride: int = 1, affine: bool = True) -> list[nn.Module]:
    """A k x k convolution without bias, padded to keep the size at stride 1, and batch norm."""
    if k == 1:
        conv = PointwiseConv(c_in, c_out)
    else:
        conv = nn.Conv2d(c_in, c_out, k, stride, padding=(k - 1) // 2, bias=False)
    return [conv, nn.BatchNorm2d(c_out, affine=affine)]

def relu_conv_bn(c_in: int, c_out: int, affine: bool = True) -> nn.Sequential:
    """ReLU, 1x1 convolution, batch norm: what brings a cell's input to the cell's width."""
    return nn.Sequential(nn.ReLU(), *conv_bn(c_in, c_out, 1, affine=affine))

class FactorizedReduce(nn.Module):
    """Halve the resolution without losing pixels: two 1x1 stride-2 convolutions, one shifted by a pixel.
    (B, c_in, H, W) to (B, c_out, ceil(H/2), ceil(W/2)); c_out must be even."""
    def __init__(self, c_in: int, c_out: int, affine: bool = True):
        super().__init__()
        self.conv1, self.conv2 = PointwiseConv(c_in, c_out // 2), PointwiseConv(c_in, c_out // 2)
        self.bn = nn.BatchNorm2d(c_out, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))  # so that both halves have one size
        even, odd = F.relu(x[:, :, ::2, ::2]), F.relu(x[:, :, 1::2, 1::2])  # the stride before all work
        return self.bn(torch.cat([self.conv1(even), self.conv2(odd)], 1))

class DepthwiseConv(nn.Conv2d):
    """A k x k depthwise convolution, k 3 or 5: (B, channels, H, W) to H/stride, W/stride, rounded up."""
    def __init__(self, channels: int, k: int, stride: int = 1, dilation: int = 1):
        super().__init__(channels, channels, k, stride, k // 2 * dilation, dilation, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == self.dilation == (2, 2):  # reads every second pixel: a plain one on those
            return F.conv2d(x[:, :, ::2, ::2], self.weight, padding=self.padding[0] // 2, groups=self.groups)
        if self.stride == (1, 1) and not (x.is_cuda or torch.is_autocast_enabled("cpu")):
            return _Depthwise.apply(x, self.weight, self.dilation[0])
        return super().forward(x)

class _Depthwise(torch.autograd.Function):
    """A depthwise convolution of stride 1 whose gradients are convolutions that oneDNN is fast at.
    Measured on one core at 64 x 16 x 32 x 32, oneDNN's own against these: the input's at dilation 2, 4 to
    7 ms against 1; a 5 x 5 kernel's, 7 against 4; a dilated kernel's, 12 to 31 against 2 to 6."""
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, dilation: int) -> Tensor:
        ctx.padding = weight.shape[-1] // 2 * dilation
        ctx.dilation = dilation
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return F.conv2d(x, weight, None, 1, ctx.padding, dilation, groups=len(weight))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = F.conv2d(grad, weight.flip(2, 3), None, 1, ctx.padding, ctx.dilation, len(weight))
        if ctx.needs_input_grad[1]:
            grad_weight = _depthwise_weight_gradient(x, grad, weight.shape[-1], ctx.dilation)
        return grad_x, grad_weight, None

def _depthwise_weight_gradient(x: Tensor, grad: Tensor, k: int, dilation: int) -> Tensor:
    """The gradient (C, 1, k, k) of a depthwise kernel, from undilated 3 x 3 ones: oneDNN is fast at those."""
    _, C, H, W = x.shape
    if dilation == 2:  # pixels of one parity never meet those of another: four images of a quarter the size
        if H % 2 or W % 2:
            x, grad = F.pad(x, (0, W % 2, 0, H % 2)), F.pad(grad, (0, W % 2, 0, H % 2))
        x, grad = (torch.cat([t[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]) for t in (x, grad))
    size = (C, 1, 3, 3)
    if k == 3:
        return conv2d_weight(x, size, grad, padding=1, groups=C)
    out = x.new_empty(C, 1, 5, 5)
    for i in (0, 2):  # 5 x 5 taps are four overlapping windows of 3 x 3
        for j in (0, 2):
            padding = (2 - j, j, 2 - i, i)
            out[:, :, i : i + 3, j : j + 3] = conv2d_weight(F.pad(x, padding), size, grad, groups=C)
    return out

def operation(name: str, channels: int, stride: int, affine: bool = True) -> nn.Sequential:
    """One of PRIMITIVES[1:] as DARTS defines it, `channels` in and out, resolution divided by `stride`."""
    def separable(stride: int, dilation: int) -> list[nn.Module]:
        depthwise = DepthwiseConv(channels, int(name[-1]), stride, dilation)
        return [nn.ReLU(), depthwise, *conv_bn(channels, channels, 1, affine=affine)]

    if name not in PRIMITIVES[1:]:
        raise InputError(f"unknown operation {name!r}: choose from {', '.join(PRIMITIVES[1:])}")
    if name == "max_pool_3x3":
        return nn.Sequential(nn.MaxPool2d(3, stride, padding=1))
    if name == "avg_pool_3x3":
        return nn.Sequential(nn.AvgPool2d(3, stride, padding=1, count_include_pad=False))
    if name == "skip_connect":
        return nn.Sequential(nn.Identity() if stride == 1 else FactorizedReduce(channels, channels, affine))
    if name.startswith("dil_conv"):
        return nn.Sequential(*separable(stride, dilation=2))
    return nn.Sequential(*separable(stride, dilation=1), *separable(1, dilation=1))

def drop_path(x: Tensor, prob: float) -> Tensor:
    """Zero whole samples of x (B, ...) with probability `prob` and scale the others to keep the mean."""
    keep = 1 - prob
    return x * ((torch.rand(x.shape[0], 1, 1, 1, device=x.device) < keep) / keep)

def auxiliary_head(c_in: int, num_classes: int, stem: str = "cifar") -> nn.Sequential:
    """DARTS' auxiliary classifier on a map of at least 8x8 (cifar) or 7x7 (imagenet): (B, num_classes)."""
    layers = [nn.ReLU(), nn.AvgPool2d(5, 3 if stem == "cifar" else 2), *conv_bn(c_in, 128, 1), nn.ReLU()]
    layers += [*conv_bn(128, 768, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]  # 1: for larger images
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(768, num_classes))

class Cell(nn.Module):
    """One cell of a genotype. s0, s1: the outputs of the two cells before, s0 twice the size if `halved`.
    (B, c_before, H, W), (B, c_in, H, W) to (B, channels * len(concat), H, W), or H/2 x W/2 if `reduction`."""
    def __init__(self, genotype: Genotype, c_before: int, c_in: int, channels: int,
                 reduction: bool, halved: bool):
        super().__init__()
        edges, self.concat = genotype[2:] if reduction else genotype[:2]
        preprocess = FactorizedReduce if halved else relu_conv_bn
        self.preprocess0, self.preprocess1 = preprocess(c_before, channels), relu_conv_bn(c_in, channels)
        self.states, self.ops = [state for _, state in edges], nn.ModuleList()
        for name, state in edges:
            self.ops.append(operation(name, channels, 2 if reduction and state < 2 else 1))

    def forward(self, s0: Tensor, s1: Tensor, drop_path_prob: float = 0.0) -> Tensor:
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        for i, (op, state) in enumerate(zip(self.ops, self.states)):
            h = op(states[state])
            if self.training and drop_path_prob and not isinstance(op[0], nn.Identity):
                h = drop_path(h, drop_path_prob)
            if i % 2 == 0:
                first = h
            else:
                states.append(first + h)
        return torch.cat([states[i] for i in self.concat], 1)

def stems(kind: str, channels: int) -> tuple[nn.Module, nn.Module, int, bool]:
    """What comes before the cells, "cifar" or "imagenet": (B, 3, H, W) to s0, s0 to s1; their channels; and
    whether s0 has twice the size of s1. "imagenet" is three stride-2 convolutions: 224 to 28 pixels."""
    if kind == "cifar":
        return nn.Sequential(*conv_bn(3, 3 * channels, 3)), nn.Identity(), 3 * channels, False
    half = channels // 2
    stem0 = nn.Sequential(*conv_bn(3, half, 3, 2), nn.ReLU(), *conv_bn(half, channels, 3, 2))
    return stem0, nn.Sequential(nn.ReLU(), *conv_bn(channels, channels, 3, 2)), channels, True

class Network(nn.Module):
    """The evaluation network of a genotype (DARTS): `layers` cells, reductions at layers//3 and 2*layers//3.
    Normalised images (B, 3, H, W) to logits (B, num_classes); in training with `auxiliary`, to the pair
    (logits, auxiliary logits). `drop_path_prob` in [0, 1) is an attribute that a training loop can raise."""
    def __init__(self, genotype: Genotype, num_classes: int, channels: int, layers: int,
                 auxiliary: bool = False, stem: str = "cifar"):
        super().__init__()
        self.drop_path_prob, self.auxiliary, self.auxiliary_at = 0.0, None, 2 * layers // 3
        self.stem0, self.stem1, c_in, halved = stems(stem, channels)
        c_before, self.cells = c_in, nn.ModuleList()
        for i in range(layers):
            reduction = i in (layers // 3, 2 * layers // 3)
            channels = 2 * channels if reduction else channels
            self.cells.append(Cell(genotype, c_before, c_in, channels, reduction, halved))
            c_before, c_in, halved = c_in, channels * len(self.cells[i].concat), reduction
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
    """Multiply-adds of classifying one image of image_size x image_size pixels, the papers' "FLOPs".

    Convolutions and matrix products; half of what torch.utils.flop_counter says, which counts each as two."""
    training = model.training
    image = next(model.parameters()).new_zeros(1, 3, image_size, image_size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(image)
    model.train(training)
    return counter.get_total_flops() // 2

# Okabe and Ito's colours, told apart with any colour vision; order of PRIMITIVES.
OPERATION_COLORS = ("#999999", "#E69F00", "#F0E442", "#56B4E9", "#009E73", "#0072B2", "#CC79A7", "#D55E00")

def draw_cell(edges: list[tuple[str, int]], concat: list[int], ax, title: str) -> None:
    """Draw a cell, such as `genotype.normal` with `genotype.normal_concat`, on a matplotlib axis."""
    pairs = list(zip(edges[::2], edges[1::2]))
    nodes = len(pairs)
    depth = [0, 0]
    for pair in pairs:
        depth.append(1 + max(depth[state] for _, state in pair))
    width, height = 14.0, max(nodes - 1, 1)
    step = width / (max(depth) + 1)
    places = [(0.0, height * 0.85), (0.0, height * 0.15)]
    places += [(step * depth[j + 2], nodes - 1 - j) for j in range(nodes)]  # a row a node: no two boxes meet
    out = (width, height / 2)

    def box(x: float, y: float, text: str, size: int, style: str, **colors) -> None:
        style = {"boxstyle": style, **colors}
        ax.text(x, y, text, ha="center", va="center", fontsize=size, zorder=3, bbox=style)

    for (x, y), pair in zip(places[2:], pairs):
        pair = sorted(pair, key=lambda edge: -places[edge[1]][1])  # the higher source on top
        for (op, state), y_box in zip(pair, (y + 0.21, y - 0.21)):
            color = OPERATION_COLORS[PRIMITIVES.index(op)]
            line = {"arrowstyle": "-|>", "shrinkA": 13, "shrinkB": 0, "linewidth": 1.3, "color": color}
            ax.annotate("", xy=(x - 2.35, y_box), xytext=places[state], arrowprops=line, zorder=1)
            box(x - 1.4, y_box, op, 8, "round,pad=0.25", facecolor="white", edgecolor=color, linewidth=1.6)
            ax.plot([x - 0.7, x - 0.2], [y_box, y], color=color, linewidth=1.3, zorder=1)
    for state in concat:
        line = {"arrowstyle": "-|>", "shrinkA": 13, "shrinkB": 15, "color": "0.6", "linestyle": ":"}
        ax.annotate("", xy=out, xytext=places[state], arrowprops=line, zorder=1)
    names = ["$c_{k-2}$", "$c_{k-1}$", *map(str, range(nodes))]
    for i, (name, (x, y)) in enumerate(zip(names, places)):
        box(x, y, name, 9, "circle,pad=0.32", facecolor="0.88" if i < 2 else "white", edgecolor="0.2")
    box(*out, "$c_k$\nconcat", 9, "round,pad=0.35", facecolor="0.88", edgecolor="0.2")
    ax.set(xlim=(-0.7, width + 0.8), ylim=(-0.6, nodes - 0.4), title=title)
    ax.axis("off")
