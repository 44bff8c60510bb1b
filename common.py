"""What the three scripts share: data sets as tensors, and DARTS genotypes (names, files, networks, pictures).

    data = load_data("shapes")                                       # uint8 tensors, nothing to download
    net = Network(GENOTYPES["DARTS_V2"], num_classes=10, channels=36, layers=20)
    logits = net(normalize(data.test_images[:8], *mean_std(data.train_images)))

Everything here works alone: functions take what they need and keep no global state.
"""

from __future__ import annotations

import ast
import json
import math
import urllib.error
from collections import namedtuple
from multiprocessing.pool import ThreadPool
from operator import index
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what to do. The scripts print it in one line."""


# ---------------------------------------------------------------------------------------------------------------
# Data sets. A data set is a handful of tensors: images stay uint8 on the training device and batches are drawn by
# index, so there are no worker processes and no per-image Python in the training loop.
# ---------------------------------------------------------------------------------------------------------------

# The 224-pixel sets (flowers102, sport8, mit67, imagenet) belong here and in `load_data` once they stream from disk.
DATASETS = ("cifar10", "cifar100", "svhn", "folder", "shapes")

SHAPE_CLASSES = ("disk", "ring", "square", "frame", "triangle", "star", "plus", "bar", "crescent", "corner")


class Data(NamedTuple):
    """One data set in memory: images uint8 (N, 3, H, W), labels int64 (N,), class names in label order."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: list[str]

    def to(self, device: torch.device | str) -> Data:
        """The same data set with its four tensors on `device`."""
        return Data(*(x.to(device) for x in self[:4]), self.classes)


def load_data(
    dataset: str,
    data_dir: str | Path = "data",
    image_size: int | None = None,
    limit_train: int | None = None,
    limit_test: int | None = None,
    workers: int = 4,
) -> Data:
    """Load (downloading where that is possible) one of `DATASETS` as uint8 tensors.

    image_size: side in pixels; None keeps the images' own size, which must then be one size.
    workers: threads that read image files.
    limit_train, limit_test: keep that many images, a random choice that is the same in every run and for every seed.
    Raises InputError where data are missing or damaged.
    """
    if dataset == "shapes":
        train, test = shapes(6000, seed=1), shapes(1000, seed=2)
        classes = list(SHAPE_CLASSES)
    elif dataset in ("cifar10", "cifar100", "svhn"):
        train, test, classes = _from_torchvision(dataset, Path(data_dir))
    elif dataset == "folder":
        return _folder(Path(data_dir), image_size, limit_train, limit_test, workers)
    else:
        raise InputError(f"unknown data set {dataset!r}: choose from {', '.join(DATASETS)}")
    parts = []
    for (images, labels), limit in ((train, limit_train), (test, limit_test)):
        keep = _keep(len(images), limit)
        parts += [_resize(images[keep], image_size), labels[keep]]
    return Data(*parts, classes)


def _keep(count: int, limit: int | None) -> Tensor:
    """Which of `count` items a limit keeps: fixed by the numbers alone, so that seeds compare on the same images."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order[:limit].sort().values if limit else torch.arange(count)


def _resize(images: Tensor, size: int | None) -> Tensor:
    if size is None or images.shape[-2:] == (size, size):
        return images
    parts = [F.interpolate(x.float(), (size, size), mode="bilinear", antialias=True) for x in images.split(1000)]
    return torch.cat([x.round().clamp(0, 255).to(torch.uint8) for x in parts])


def _from_torchvision(dataset: str, root: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], list[str]]:
    """CIFAR-10, CIFAR-100 or SVHN through torchvision, which downloads and checks the files."""
    kind = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "svhn": "SVHN"}[dataset]
    build = getattr(torchvision.datasets, kind)
    flags = [{"split": "train"}, {"split": "test"}] if dataset == "svhn" else [{"train": True}, {"train": False}]
    try:
        train, test = (build(str(root), download=True, **flag) for flag in flags)
    except ImportError as e:
        raise InputError(f"{dataset} needs the package {e.name} (pip install {e.name})") from e
    except (urllib.error.URLError, ConnectionError, TimeoutError) as e:
        raise InputError(f"cannot download {dataset}: {e}; put its files into {root}, or try --dataset shapes") from e
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as e:
        raise InputError(f"cannot read {dataset} in {root}: {e}; delete its files there and start again") from e
    parts = []
    for split in (train, test):
        images = torch.as_tensor(split.data)  # CIFAR is (N, H, W, 3), SVHN (N, 3, H, W)
        images = images if dataset == "svhn" else images.permute(0, 3, 1, 2).contiguous()
        parts.append((images, torch.as_tensor(split.labels if dataset == "svhn" else split.targets).long()))
    return parts[0], parts[1], [str(c) for c in getattr(train, "classes", range(10))]


def _folder(root: Path, image_size: int | None, limit_train: int | None, limit_test: int | None, workers: int) -> Data:
    """Images in `train/<class>/*` and `test/<class>/*` (or `val/`), in any format that Pillow reads."""
    test_dir = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if not (root / "train").is_dir() or test_dir is None:
        raise InputError(f"{root} holds no data set: --data-dir must have train/<class>/* and test/<class>/* (or val/)")
    classes = sorted(d.name for d in (root / "train").iterdir() if d.is_dir() and not d.name.startswith("."))
    tensors: list[Tensor] = []
    size = (image_size, image_size) if image_size else None
    for directory, limit in ((root / "train", limit_train), (test_dir, limit_test)):
        unknown = sorted({d.name for d in directory.iterdir() if d.is_dir() and d.name[0] != "."} - set(classes))
        if unknown:
            raise InputError(f"{directory} has a class that {root / 'train'} lacks: {unknown[0]}")
        endings = torchvision.datasets.folder.IMG_EXTENSIONS
        found = [
            (path, label)
            for label, name in enumerate(classes)
            for path in (sorted((directory / name).iterdir()) if (directory / name).is_dir() else [])
            if path.suffix.lower() in endings
        ]
        if not found:
            raise InputError(f"no images in {directory}: expected {directory}/<class>/*{{{','.join(endings)}}}")
        found = [found[i] for i in _keep(len(found), limit).tolist()]
        with ThreadPool(workers) as pool:
            images = pool.map(lambda item: _read_image(item[0], image_size), found, chunksize=64)
        size = size or images[0].shape[:2]
        for (path, _), image in zip(found, images):
            if image.shape[:2] != size:
                (h, w), (H, W) = image.shape[:2], size
                raise InputError(f"{path} is {w}x{h}, others are {W}x{H}: give --image-size, such as 32")
        tensors.append(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous())
        tensors.append(torch.tensor([label for _, label in found]))
    return Data(*tensors, classes)


def _read_image(path: Path, size: int | None) -> np.ndarray:
    """An image as uint8 (H, W, 3); with `size`, its shorter side is scaled to it and the middle square cut out."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):  # 16 bits of gray, which convert() would cut off at 255
                image = image.point(lambda value: value * (1 / 257) + 0).convert("L")
            image = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise InputError(f"cannot read the image {path} ({e}): mend it or delete it") from e
    if size and image.size != (size, size):
        scale = size / min(image.size)
        w, h = (max(size, round(side * scale)) for side in image.size)
        left, top = (w - size) // 2, (h - size) // 2
        image = image.resize((w, h), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
    return np.asarray(image)


def shapes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """A generated data set that takes a network to learn: one of 10 figures on a cluttered ground, 32x32.

    Colour, position, scale, rotation, background and noise all vary. Measured with 6,000 training images: a linear
    classifier on the pixels reaches 26 %, a small convolutional network passes 85 %.
    Returns images uint8 (count, 3, 32, 32) and labels int64 (count,), the same for the same count and seed.
    """
    g = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=g) * (high - low) + low

    labels = torch.arange(count) % 10
    side = (torch.arange(32) + 0.5) / 16 - 1
    angle, scale = uniform(-0.5, 0.5, 1, 1), uniform(0.65, 0.95, 1, 1)
    dx = side.view(1, 1, 32) - uniform(-0.15, 0.15, 1, 1)
    dy = side.view(1, 32, 1) - uniform(-0.15, 0.15, 1, 1)
    xs = (angle.cos() * dx + angle.sin() * dy) / scale  # (N, 32, 32), the figure's own coordinates
    ys = (angle.cos() * dy - angle.sin() * dx) / scale
    distance = torch.empty(count, 32, 32)
    for k in range(10):
        distance[k::10] = _edge_distance(SHAPE_CLASSES[k], xs[k::10], ys[k::10])
    mask = (0.5 - distance * scale * 16).clamp(0, 1).unsqueeze(1)  # one pixel of anti-aliasing
    ground = uniform(0, 1, 3, 1, 1) + 0.15 * F.interpolate(uniform(-0.5, 0.5, 3, 4, 4), (32, 32), mode="bicubic")
    contrast = torch.randn(count, 3, 1, 1, generator=g)
    contrast = contrast / contrast.norm(dim=1, keepdim=True) * uniform(0.7, 1.1, 1, 1, 1)
    figure = ground.mean((2, 3), keepdim=True) + contrast + 0.15 * F.interpolate(uniform(-0.5, 0.5, 3, 2, 2), (32, 32))
    images = ground * (1 - mask) + figure * mask
    images = images - images.amin((1, 2, 3), keepdim=True).clamp(max=0)  # into range without flattening colours
    images = images / images.amax((1, 2, 3), keepdim=True).clamp(min=1)
    images = images + torch.randn(images.shape, generator=g) * uniform(0, 0.02, 1, 1, 1)
    order = torch.randperm(count, generator=g)
    return (images[order] * 255).round().clamp(0, 255).to(torch.uint8), labels[order]


def _edge_distance(name: str, x: Tensor, y: Tensor) -> Tensor:
    """Distance of the points (x, y) from the edge of a figure of about unit radius, negative inside."""

    def box(cx: float, cy: float, w: float, h: float) -> Tensor:
        return torch.maximum((x - cx).abs() - w, (y - cy).abs() - h)

    def along(n: int) -> Tensor:  # (n, ...): how far the points lie in each of n directions
        turns = [2 * math.pi * k / n for k in range(n)]
        return torch.stack([math.cos(t) * x + math.sin(t) * y for t in turns])

    radius = (x**2 + y**2).sqrt()
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
    if name == "star":  # inside four of five half-planes
        return along(5).sort(0).values[3] - 0.33
    if name == "plus":
        return torch.minimum(box(0, 0, 0.9, 0.26), box(0, 0, 0.26, 0.9))
    if name == "bar":
        return box(0, 0, 0.95, 0.25)
    if name == "crescent":
        return torch.maximum(radius - 0.85, 0.72 - ((x - 0.5) ** 2 + y**2).sqrt())
    return torch.minimum(box(-0.5, 0, 0.25, 0.8), box(0, 0.55, 0.75, 0.25))  # corner


def mean_std(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of uint8 images (N, 3, H, W), in units of [0, 1]: (3,) and (3,)."""
    counts = torch.stack([torch.bincount(images[:, c].flatten().int(), minlength=256) for c in range(3)]).double()
    levels = torch.arange(256, dtype=torch.float64, device=images.device) / 255
    share = counts / counts.sum(1, keepdim=True)
    mean = (share * levels).sum(1)
    std = (share * (levels - mean[:, None]) ** 2).sum(1).sqrt()
    return mean.float(), std.clamp(min=1e-3).float()


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Images (B, 3, H, W), uint8 or float in [0, 1], to zero mean and unit deviation, in channels_last memory."""
    x = images.float() / 255 if images.dtype == torch.uint8 else images
    x = (x - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    return x.contiguous(memory_format=torch.channels_last)


def random_crop_flip(images: Tensor, padding: int = 4) -> Tensor:
    """Every image shifted by up to `padding` pixels each way (zeros come in) and mirrored with probability 1/2."""
    B, C, H, W = images.shape
    device = images.device
    rows = torch.randint(0, 2 * padding + 1, (B, 1), device=device) + torch.arange(H, device=device)  # (B, H)
    cols = torch.randint(0, 2 * padding + 1, (B, 1), device=device) + torch.arange(W, device=device)  # (B, W)
    cols = torch.where(torch.rand(B, 1, device=device) < 0.5, cols.flip(1), cols)
    padded = F.pad(images, [padding] * 4)
    batch = torch.arange(B, device=device).view(B, 1, 1, 1)
    channel = torch.arange(C, device=device).view(1, C, 1, 1)
    return padded[batch, channel, rows.view(B, 1, H, 1), cols.view(B, 1, 1, W)]


def cutout(images: Tensor, length: int) -> Tensor:
    """A square of `length` pixels around a random point set to 0 in every image (DeVries & Taylor; after normalize)."""
    B, _, H, W = images.shape
    y = torch.randint(0, H, (B, 1, 1, 1), device=images.device) - torch.arange(H, device=images.device).view(H, 1)
    x = torch.randint(0, W, (B, 1, 1, 1), device=images.device) - torch.arange(W, device=images.device)
    half = length // 2
    hole = (y <= half) & (y > half - length) & (x <= half) & (x > half - length)  # (B, 1, H, W)
    return images.masked_fill(hole, 0)


# ---------------------------------------------------------------------------------------------------------------
# Genotypes: quark0/darts' named tuple, its meaning and its text, so that cells paste both ways.
# ---------------------------------------------------------------------------------------------------------------

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

# normal, reduce: [(operation, state it reads), ...], two for every node; states 0 and 1 are the cell's inputs.
Genotype = namedtuple("Genotype", "normal normal_concat reduce reduce_concat")


def _known(normal: str, reduce: str) -> Genotype:
    short = {"max": 1, "avg": 2, "skip": 3, "sep3": 4, "sep5": 5, "dil3": 6, "dil5": 7}
    cells = [[(PRIMITIVES[short[e[:-1]]], int(e[-1])) for e in text.split()] for text in (normal, reduce)]
    return Genotype(cells[0], [2, 3, 4, 5], cells[1], [2, 3, 4, 5])


GENOTYPES = {  # "sep31" is sep_conv_3x3 from state 1
    "DARTS_V1": _known("sep31 sep30 skip0 sep31 skip0 sep31 sep30 skip2", "max0 max1 skip2 max0 max0 skip2 skip2 avg0"),
    "DARTS_V2": _known("sep30 sep31 sep30 sep31 sep31 skip0 skip0 dil32", "max0 max1 skip2 max1 max0 skip2 skip2 max1"),
    "PDARTS": _known(
        "skip0 dil31 skip0 sep31 sep31 sep33 sep30 dil54", "avg0 sep51 sep30 dil52 max0 dil31 dil31 dil53"
    ),
    "PC_DARTS_cifar": _known(
        "sep31 skip0 sep30 dil31 sep50 sep31 avg0 dil31", "sep51 max0 sep51 sep52 sep30 sep33 sep31 sep32"
    ),
    "PC_DARTS_image": _known(
        "skip1 sep30 sep30 skip1 sep31 sep33 sep31 dil54", "sep30 skip1 dil52 max1 sep32 sep31 sep50 sep33"
    ),
}


def save_genotype(genotype: Genotype, path: str | Path) -> None:
    """Write a genotype as JSON: the four fields of the named tuple under their names."""
    Path(path).write_text(json.dumps({k: list(v) for k, v in genotype._asdict().items()}, indent=1) + "\n")


def load_genotype(name_or_path: str | Path) -> Genotype:
    """A genotype by its name in `GENOTYPES`, or from a file: JSON, or the text `Genotype(normal=[...], ...)`.

    Raises InputError where there is no such name or file, or the file holds no valid genotype.
    """
    if str(name_or_path) in GENOTYPES:
        return GENOTYPES[str(name_or_path)]
    path = Path(name_or_path)
    try:
        return parse_genotype(path.read_text())
    except FileNotFoundError:
        raise InputError(f"no genotype {str(path)!r}: give a file, or one of {', '.join(GENOTYPES)}") from None
    except (OSError, ValueError) as e:  # InputError is one
        raise InputError(f"cannot use the genotype in {path}: {e}") from e


def parse_genotype(text: str) -> Genotype:
    """A genotype from JSON or from quark0/darts' text, which may stand behind `NAME = `. Raises InputError."""

    def value(node: ast.expr) -> list:
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "range":
            return list(range(*map(ast.literal_eval, node.args))[:100])  # no cell is larger
        return ast.literal_eval(node)

    try:
        if text.lstrip().startswith("{"):
            fields = json.loads(text)
        else:
            call = ast.parse(text.strip()).body[-1].value
            fields = dict(zip(Genotype._fields, map(value, call.args))) | {k.arg: value(k.value) for k in call.keywords}
        cells = {c: [(str(op), index(state)) for op, state in fields[c]] for c in ("normal", "reduce")}
        concat = {c: [index(state) for state in fields[f"{c}_concat"]] for c in ("normal", "reduce")}
    except (SyntaxError, ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as e:
        raise InputError(f"not a genotype ({type(e).__name__}: {e}); expected Genotype(normal=[...], ...)") from e
    for cell, edges in cells.items():
        states = len(edges) // 2 + 2
        if not edges or len(edges) % 2 or not concat[cell]:
            raise InputError(f"{cell} needs two operations a node and at least one state to concatenate")
        for i, (op, state) in enumerate(edges):
            if op not in PRIMITIVES[1:]:
                raise InputError(f"{cell} names an unknown operation {op!r}: choose from {', '.join(PRIMITIVES[1:])}")
            if not 0 <= state < i // 2 + 2:
                raise InputError(f"node {i // 2} of {cell} reads state {state}, which does not exist yet")
        if not all(0 <= s < states for s in concat[cell]):
            raise InputError(f"{cell}_concat names a state outside 0..{states - 1}")
    return Genotype(cells["normal"], concat["normal"], cells["reduce"], concat["reduce"])


# ---------------------------------------------------------------------------------------------------------------
# The network that a genotype stands for (DARTS, section 4 and its public code).
# ---------------------------------------------------------------------------------------------------------------


def relu_conv_bn(c_in: int, c_out: int, affine: bool = True) -> nn.Sequential:
    """ReLU, 1x1 convolution, batch norm: what brings a cell's input to the cell's width."""
    return nn.Sequential(nn.ReLU(), nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out, affine=affine))


class FactorizedReduce(nn.Module):
    """Halve the resolution without losing pixels: two 1x1 stride-2 convolutions, the second shifted by one pixel.

    (B, c_in, H, W) to (B, c_out, ceil(H/2), ceil(W/2)); c_out must be even.
    """

    def __init__(self, c_in: int, c_out: int, affine: bool = True):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out // 2, 1, bias=False)
        self.conv2 = nn.Conv2d(c_in, c_out // 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(c_out, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.halves(x))

    def halves(self, x: Tensor) -> Tensor:
        """All but the batch norm."""
        x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))  # so that both halves have one size at odd sides
        even, odd = F.relu(x[:, :, ::2, ::2]), F.relu(x[:, :, 1::2, 1::2])  # the stride before all work, not in it
        return torch.cat([self.conv1(even), self.conv2(odd)], 1)


class DepthwiseConv(nn.Conv2d):
    """A k x k depthwise convolution, k 3 or 5, padded to keep (stride 1) or halve (stride 2) the resolution."""

    def __init__(self, channels: int, k: int, stride: int = 1, dilation: int = 1):
        super().__init__(channels, channels, k, stride, k // 2 * dilation, dilation, channels, bias=False)

    def forward(self, x: Tensor, part: slice = slice(None)) -> Tensor:
        """x: (B, channels, H, W), or the channels `part` alone."""
        weight, C = self.weight[part], x.shape[1]
        if self.stride == self.dilation == (2, 2):  # reads every second pixel only, so it is a plain one on those
            return F.conv2d(x[:, :, ::2, ::2], weight, padding=self.padding[0] // 2, groups=C)
        if self.stride == (1, 1) and not x.is_cuda:
            return _Depthwise.apply(x, weight, self.dilation[0])
        return F.conv2d(x, weight, None, self.stride, self.padding, self.dilation, C)


class _Depthwise(torch.autograd.Function):
    """A depthwise convolution of stride 1 whose gradients are forward convolutions where oneDNN's own are slow.

    Measured on one core at 64 x 16 x 32 x 32: gradient of the input at dilation 2, 6 to 9 ms by oneDNN, 1 ms as a
    convolution with the turned kernel; gradient of a 5 x 5 kernel, 9 to 12 against 6 to 8 ms (32 channels: 4 to 1).
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, dilation: int) -> Tensor:
        ctx.dilation = dilation
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2 * dilation, dilation=dilation, groups=len(weight))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        k, d = weight.shape[-1], ctx.dilation
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = F.conv2d(grad, weight.flip(2, 3), padding=k // 2 * d, dilation=d, groups=len(weight))
        if ctx.needs_input_grad[1]:
            grad_weight = _depthwise_weight_gradient(x, grad, k, d)
        return grad_x, grad_weight, None


def _depthwise_weight_gradient(x: Tensor, grad: Tensor, k: int, dilation: int) -> Tensor:
    """The gradient (C, 1, k, k) of a depthwise kernel, from plain 3 x 3 ones: those are what oneDNN is fast at."""
    B, C, H, W = x.shape

    def plain(x: Tensor, k: int, padding: int, dilation: int = 1) -> Tensor:
        sizes = [1, 1], [padding] * 2, [dilation] * 2, False, [0, 0], C, [False, True, False]
        return torch.ops.aten.convolution_backward(grad, x, x.new_empty(C, 1, k, k), None, *sizes)[1]

    if dilation == 2 and (H % 2 or W % 2):
        return plain(x, k, k // 2 * 2, 2)
    if dilation == 2:  # pixels of one parity never meet those of the other: four images of a quarter the size

        def quarters(t: Tensor) -> Tensor:
            t = t.permute(0, 2, 3, 1).reshape(B, H // 2, 2, W // 2, 2, C)
            return t.permute(2, 4, 0, 1, 3, 5).reshape(4 * B, H // 2, W // 2, C).permute(0, 3, 1, 2)

        x, grad = quarters(x), quarters(grad)
    if k == 3:
        return plain(x, 3, 1)
    out = x.new_empty(C, 1, 5, 5)
    for i in (0, 2):  # 5 x 5 taps are four overlapping windows of 3 x 3
        for j in (0, 2):
            out[:, :, i : i + 3, j : j + 3] = plain(F.pad(x, (2 - j, j, 2 - i, i)), 3, 0)
    return out


def operation(name: str, channels: int, stride: int, affine: bool = True) -> nn.Sequential:
    """One of PRIMITIVES[1:] as DARTS defines it, `channels` in and out, resolution divided by `stride`."""
    C, k = channels, int(name[-1]) if name[-1].isdigit() else 0
    if name == "max_pool_3x3":
        return nn.Sequential(nn.MaxPool2d(3, stride, padding=1))
    if name == "avg_pool_3x3":
        return nn.Sequential(nn.AvgPool2d(3, stride, padding=1, count_include_pad=False))
    if name == "skip_connect":
        return nn.Sequential(nn.Identity() if stride == 1 else FactorizedReduce(C, C, affine))

    def depthwise_separable(stride: int, dilation: int) -> list[nn.Module]:
        return [
            nn.ReLU(),
            DepthwiseConv(C, k, stride, dilation),
            nn.Conv2d(C, C, 1, bias=False),
            nn.BatchNorm2d(C, affine=affine),
        ]

    if name.startswith("sep_conv"):
        return nn.Sequential(*depthwise_separable(stride, 1), *depthwise_separable(1, 1))
    if name.startswith("dil_conv"):
        return nn.Sequential(*depthwise_separable(stride, 2))
    raise InputError(f"unknown operation {name!r}: choose from {', '.join(PRIMITIVES[1:])}")


def drop_path(x: Tensor, prob: float) -> Tensor:
    """Zero whole samples of x (B, ...) with probability `prob` and scale the others to keep the mean."""
    keep = 1 - prob
    return x * (torch.rand(x.shape[0], 1, 1, 1, device=x.device, dtype=x.dtype) < keep) / keep


def auxiliary_head(c_in: int, num_classes: int, stem: str = "cifar") -> nn.Sequential:
    """DARTS' auxiliary classifier on a map of at least 8x8 (cifar) or 7x7 (imagenet): logits (B, num_classes)."""
    return nn.Sequential(
        nn.ReLU(),
        nn.AvgPool2d(5, stride=3 if stem == "cifar" else 2, count_include_pad=False),
        nn.Conv2d(c_in, 128, 1, bias=False),
        nn.BatchNorm2d(128),
        nn.ReLU(),
        nn.Conv2d(128, 768, 2, bias=False),
        nn.BatchNorm2d(768),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),  # nothing to do at the published 32 and 224 pixels; lets larger images through
        nn.Flatten(),
        nn.Linear(768, num_classes),
    )


class Cell(nn.Module):
    """One cell of a genotype. Inputs s0, s1: the outputs of the two cells before; output: some states, concatenated."""

    def __init__(self, genotype: Genotype, c_before: int, c_in: int, channels: int, reduction: bool, halved: bool):
        super().__init__()
        edges, self.concat = (genotype.reduce, genotype.reduce_concat) if reduction else genotype[:2]
        self.preprocess0 = FactorizedReduce(c_before, channels) if halved else relu_conv_bn(c_before, channels)
        self.preprocess1 = relu_conv_bn(c_in, channels)
        self.states = [state for _, state in edges]
        strides = [2 if reduction and state < 2 else 1 for state in self.states]
        self.identity = [op == "skip_connect" and s == 1 for (op, _), s in zip(edges, strides)]
        self.ops = nn.ModuleList(operation(op, channels, s) for (op, _), s in zip(edges, strides))

    def forward(self, s0: Tensor, s1: Tensor, drop_path_prob: float = 0.0) -> Tensor:
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        for i in range(0, len(self.ops), 2):
            pair = []
            for op, state, identity in zip(self.ops[i : i + 2], self.states[i : i + 2], self.identity[i : i + 2]):
                h = op(states[state])
                pair.append(drop_path(h, drop_path_prob) if self.training and drop_path_prob and not identity else h)
            states.append(pair[0] + pair[1])
        return torch.cat([states[i] for i in self.concat], 1)


class Network(nn.Module):
    """The evaluation network of a genotype (DARTS): `layers` cells, reductions at layers//3 and 2*layers//3.

    Input: normalised images (B, 3, H, W). Output: logits (B, num_classes); in training with `auxiliary`, the pair
    (logits, auxiliary logits). `drop_path_prob` in [0, 1) is an attribute, so that a training loop can raise it.
    Published sizes: DARTS_V1, 10 classes, 36 channels, 20 layers: 3,169,414 parameters.
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
        self.auxiliary_at = 2 * layers // 3
        C = channels
        if stem == "imagenet":  # three stride-2 convolutions: 224 to 28 pixels
            self.stem0 = nn.Sequential(*_conv_bn(3, C // 2, 2), nn.ReLU(), *_conv_bn(C // 2, C, 2))
            self.stem1 = nn.Sequential(nn.ReLU(), *_conv_bn(C, C, 2))
            c_before, c_in, halved = C, C, True
        else:
            self.stem0, self.stem1 = nn.Sequential(*_conv_bn(3, 3 * C, 1)), nn.Identity()
            c_before, c_in, halved = 3 * C, 3 * C, False
        self.cells = nn.ModuleList()
        for i in range(layers):
            reduction = i in (layers // 3, 2 * layers // 3)
            C = 2 * C if reduction else C
            self.cells.append(Cell(genotype, c_before, c_in, C, reduction, halved))
            c_before, c_in, halved = c_in, C * len(self.cells[-1].concat), reduction
            if i == self.auxiliary_at and auxiliary:
                self.auxiliary = auxiliary_head(c_in, num_classes, stem)
        self.classifier = nn.Linear(c_in, num_classes)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        s0 = self.stem0(x)
        s1 = self.stem1(s0)
        auxiliary = None
        for i, cell in enumerate(self.cells):
            s0, s1 = s1, cell(s0, s1, self.drop_path_prob)
            if i == self.auxiliary_at and self.training and hasattr(self, "auxiliary"):
                auxiliary = self.auxiliary(s1)
        logits = self.classifier(s1.mean((2, 3)))
        return logits if auxiliary is None else (logits, auxiliary)


def _conv_bn(c_in: int, c_out: int, stride: int) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(c_out)


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, without the auxiliary head, as the papers count them."""
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith("auxiliary"))


def count_flops(model: nn.Module, image_size: int) -> int:
    """Multiply-adds of classifying one image of image_size x image_size pixels, the papers' "FLOPs".

    Counts convolutions and matrix products (torch.utils.flop_counter, whose count of 2 an operation is halved).
    """
    training, parameter = model.training, next(model.parameters())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, 3, image_size, image_size, device=parameter.device, dtype=parameter.dtype))
    model.train(training)
    return counter.get_total_flops() // 2


# ---------------------------------------------------------------------------------------------------------------
# A picture of a cell
# ---------------------------------------------------------------------------------------------------------------

# Okabe and Ito's colours, told apart with any colour vision; order of PRIMITIVES.
OPERATION_COLORS = ("#999999", "#E69F00", "#F0E442", "#56B4E9", "#009E73", "#0072B2", "#CC79A7", "#D55E00")


def draw_cell(edges: list[tuple[str, int]], concat: list[int], ax, title: str) -> None:
    """Draw one cell on a matplotlib axis: states as circles from left to right, operations as boxes before their node.

    edges: the `normal` or `reduce` field of a genotype; concat: its `_concat` field.
    """
    nodes = len(edges) // 2
    depth = [0, 0]
    for j in range(nodes):
        depth.append(1 + max(depth[state] for _, state in edges[2 * j : 2 * j + 2]))
    width, height = 14.0, max(nodes - 1, 1)
    step = width / (max(depth) + 1)
    at = {0: (0.0, height * 0.85), 1: (0.0, height * 0.15)}
    for j in range(nodes):  # one row a node, so that no two boxes meet
        at[j + 2] = (step * depth[j + 2], float(nodes - 1 - j))
    out = (width, height / 2)
    names = {0: "$c_{k-2}$", 1: "$c_{k-1}$"} | {j + 2: str(j) for j in range(nodes)}
    for j in range(nodes):
        x, y = at[j + 2]
        pair = sorted(edges[2 * j : 2 * j + 2], key=lambda edge: -at[edge[1]][1])  # the higher source on top
        for (op, state), y_box in zip(pair, (y + 0.21, y - 0.21)):
            color = OPERATION_COLORS[PRIMITIVES.index(op)]
            line = {"arrowstyle": "-|>", "shrinkA": 13, "shrinkB": 0, "linewidth": 1.3, "color": color}
            ax.annotate("", xy=(x - 2.35, y_box), xytext=at[state], arrowprops=line, zorder=1)
            box = {"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": color, "linewidth": 1.6}
            ax.text(x - 1.4, y_box, op, ha="center", va="center", fontsize=8, zorder=3, bbox=box)
            ax.plot([x - 0.7, x - 0.2], [y_box, y], color=color, linewidth=1.3, zorder=1)
    for state in concat:
        line = {"arrowstyle": "-|>", "shrinkA": 13, "shrinkB": 15, "color": "0.6", "linestyle": ":"}
        ax.annotate("", xy=out, xytext=at[state], arrowprops=line, zorder=1)
    for state, (x, y) in at.items():
        face = "0.88" if state < 2 else "white"
        circle = {"boxstyle": "circle,pad=0.32", "facecolor": face, "edgecolor": "0.2"}
        ax.text(x, y, names[state], ha="center", va="center", fontsize=9, zorder=4, bbox=circle)
    box = {"boxstyle": "round,pad=0.35", "facecolor": "0.88", "edgecolor": "0.2"}
    ax.text(*out, "$c_k$\nconcat", ha="center", va="center", fontsize=9, zorder=4, bbox=box)
    ax.set(xlim=(-0.7, width + 0.8), ylim=(-0.6, nodes - 0.4), title=title)
    ax.axis("off")
