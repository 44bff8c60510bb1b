"""What the three scripts share: data sets as tensors, and DARTS genotypes (names, files, networks, pictures).

    data = load_data("shapes")                                       # uint8 tensors, nothing to download
    net = Network(GENOTYPES["DARTS_V2"], num_classes=10, channels=36, layers=20)
    logits = net(normalize(data.test_images[:8], *mean_std(data.train_images)))
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

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight
from torch.utils.flop_counter import FlopCounterMode

class InputError(ValueError):
    """Something the user gave cannot be used; the message is one line that says what to do."""


# -----------------------------------------------------------------------------
# Data sets. A data set is a handful of tensors: images stay uint8 on the training device and batches are
# drawn by index, so there are no worker processes and no per-image Python in the training loop.
# -----------------------------------------------------------------------------

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
    dataset: str, data_dir: str | Path = "data", image_size: int | None = None,
    limit_train: int | None = None, limit_test: int | None = None, workers: int = 4,
) -> Data:
    """Load (downloading where that is possible) one of `DATASETS` as uint8 tensors.

    image_size: side in pixels; None keeps the images' own size, which must then be one size.
    limit_train, limit_test: keep that many images, a random choice that is the same for every seed.
    workers: threads that read image files.
    Raises InputError where data are missing or damaged.
    """
    if dataset == "folder":
        return _folder(Path(data_dir), image_size, (limit_train, limit_test), workers)
    if dataset == "shapes":
        splits, classes = [shapes(6000, seed=1), shapes(1000, seed=2)], list(SHAPE_CLASSES)
    elif dataset in DATASETS:
        splits, classes = _from_torchvision(dataset, str(data_dir))
    else:
        raise InputError(f"unknown data set {dataset!r}: choose from {', '.join(DATASETS)}")
    tensors = []
    for (images, labels), limit in zip(splits, (limit_train, limit_test)):
        keep = _keep(len(images), limit)
        images = images[keep].contiguous()
        if image_size and images.shape[-2:] != (image_size, image_size):
            images = torch.cat([_resize(chunk, image_size) for chunk in images.split(1000)])
        tensors += [images, labels[keep]]
    return Data(*tensors, classes)

def _keep(count: int, limit: int | None) -> Tensor:
    """Which of `count` items a limit keeps: no seed enters, so that seeds compare on the same images."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order[: limit or count].sort().values

def _resize(images: Tensor, size: int) -> Tensor:
    return F.interpolate(images.float(), (size, size), mode="bilinear", antialias=True).round().byte()

def _from_torchvision(dataset: str, root: str) -> tuple[list[tuple[Tensor, Tensor]], list[str]]:
    """CIFAR-10, CIFAR-100 or SVHN: (images, labels) to train and to test on, and the names of the classes."""
    build = getattr(torchvision.datasets, dataset.upper())
    try:
        if dataset == "svhn":
            sets = [build(root, split, download=True) for split in ("train", "test")]
            splits = [(torch.from_numpy(s.data), torch.from_numpy(s.labels)) for s in sets]
            return splits, [str(digit) for digit in range(10)]
        sets = [build(root, train, download=True) for train in (True, False)]
        images = [torch.from_numpy(s.data).permute(0, 3, 1, 2) for s in sets]  # from (N, H, W, 3)
        labels = [torch.tensor(s.targets) for s in sets]
        return list(zip(images, labels)), sets[0].classes
    except ImportError as e:
        raise InputError(f"{dataset} needs the package {e.name} (pip install {e.name})") from e
    except (urllib.error.URLError, ConnectionError, TimeoutError) as e:
        raise InputError(f"cannot download {dataset} ({e}): put it in {root} or use --dataset shapes") from e
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as e:
        raise InputError(f"cannot read {dataset} in {root} ({e}): delete its files and start again") from e

def _folder(root: Path, image_size: int | None, limits: tuple[int | None, ...], workers: int) -> Data:
    """Images in `train/<class>/*` and `test/<class>/*` (or `val/`), in any format that Pillow reads."""
    train, test = root / "train", root / "test"
    if not test.is_dir():
        test = root / "val"
    if not (train.is_dir() and test.is_dir()):
        raise InputError(f"{root} must hold train/<class>/* and test/<class>/* (or val/): check --data-dir")
    endings = torchvision.datasets.folder.IMG_EXTENSIONS
    classes = _class_names(train)
    label_of = {name: label for label, name in enumerate(classes)}
    tensors: list[Tensor] = []
    for directory, limit in zip((train, test), limits):
        found = []
        for name in _class_names(directory):
            if name not in label_of:
                raise InputError(f"{directory} has a class that {train} lacks: {name}")
            paths = sorted((directory / name).iterdir())
            found += [(path, label_of[name]) for path in paths if path.suffix.lower() in endings]
        if not found:
            raise InputError(f"no images in {directory}: expected <class>/*{{{','.join(endings)}}} there")
        found = [found[i] for i in _keep(len(found), limit).tolist()]
        with ThreadPool(workers) as pool:
            images = pool.map(lambda item: _read_image(item[0], image_size), found, chunksize=64)
        _, H, W = tensors[0][0].shape if tensors else images[0].shape
        for (path, _), image in zip(found, images):
            _, h, w = image.shape
            if (h, w) != (H, W):
                raise InputError(f"{path} is {w}x{h}, others are {W}x{H}: give --image-size, such as 32")
        tensors += [torch.stack(images).contiguous(), torch.tensor([label for _, label in found])]
    return Data(*tensors, classes)

def _class_names(directory: Path) -> list[str]:
    return sorted(d.name for d in directory.iterdir() if d.is_dir() and not d.name.startswith("."))

def _read_image(path: Path, size: int | None) -> Tensor:
    """An image, uint8 (3, H, W); with `size`, the middle square of it, scaled to size x size."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):  # 16 bits of gray, which convert() would cut off at 255
                image = image.point(lambda value: value * (1 / 257) + 0).convert("L")
            image = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise InputError(f"cannot read the image {path} ({e}): mend it or delete it") from e
    if size:
        scale = size / min(image.size)
        w, h = (max(size, round(side * scale)) for side in image.size)
        left, top = (w - size) // 2, (h - size) // 2
        image = image.resize((w, h), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
    return torchvision.transforms.functional.pil_to_tensor(image)

def shapes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """A generated data set that takes a network to learn: one of 10 figures on a cluttered ground, 32x32.

    Colour, position, scale, rotation, background and noise all vary. Measured with 6,000 training images:
    a linear classifier on the pixels reaches 26 %, a small convolutional network passes 85 %.
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
    for k, name in enumerate(SHAPE_CLASSES):
        distance[k::10] = _edge_distance(name, xs[k::10], ys[k::10])
    mask = (0.5 - distance * scale * 16).clamp(0, 1).unsqueeze(1)  # one pixel of anti-aliasing
    ground = uniform(0, 1, 3, 1, 1)
    ground = ground + 0.15 * F.interpolate(uniform(-0.5, 0.5, 3, 4, 4), (32, 32), mode="bicubic")
    contrast = F.normalize(torch.randn(count, 3, 1, 1, generator=g)) * uniform(0.7, 1.1, 1, 1, 1)
    figure = ground.mean((2, 3), keepdim=True) + contrast
    figure = figure + 0.15 * F.interpolate(uniform(-0.5, 0.5, 3, 2, 2), (32, 32))
    images = ground * (1 - mask) + figure * mask
    # Into [0, 1] without flattening colours.
    images = images - images.amin((1, 2, 3), keepdim=True).clamp(max=0)
    images = images / images.amax((1, 2, 3), keepdim=True).clamp(min=1)
    images = images + torch.randn(images.shape, generator=g) * uniform(0, 0.02, 1, 1, 1)
    order = torch.randperm(count, generator=g)
    return (images[order] * 255).round().clamp(0, 255).to(torch.uint8), labels[order]

def _edge_distance(name: str, x: Tensor, y: Tensor) -> Tensor:
    """Distance of the points (x, y) from the edge of a figure of about unit radius, negative inside."""
    radius = (x**2 + y**2).sqrt()

    def box(cx: float, cy: float, w: float, h: float) -> Tensor:
        return torch.maximum((x - cx).abs() - w, (y - cy).abs() - h)

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

def mean_std(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation, (3,) each, of the channels of uint8 images (N, 3, H, W), in units of [0, 1]."""
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
    `world` gets its share. Raises InputError where a batch cannot be shared evenly.
    """
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


# -----------------------------------------------------------------------------
# Genotypes: quark0/darts' named tuple, its meaning and its text, so that cells paste both ways.
# -----------------------------------------------------------------------------

PRIMITIVES = ("none", "max_pool_3x3", "avg_pool_3x3", "skip_connect",
              "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5")

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
        raise InputError(f"no genotype {str(path)!r}: give a file or one of {', '.join(GENOTYPES)}") from None
    except (OSError, ValueError) as e:  # InputError is one
        raise InputError(f"cannot use the genotype in {path}: {e}") from e

def parse_genotype(text: str) -> Genotype:
    """A genotype from JSON or quark0/darts' text, also behind `NAME = `; InputError where it is not valid."""

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


# -----------------------------------------------------------------------------
# The network that a genotype stands for (DARTS, section 4 and its public code), and a picture of its cells.
# -----------------------------------------------------------------------------

class PointwiseConv(nn.Conv2d):
    """A 1 x 1 convolution as the matrix product that it is: (B, c_in, H, W) to (B, c_out, H, W).

    It keeps its input only where the weight learns, which a convolution always does: a search step at C=16
    takes 0.91 of the memory and 0.96 of the time. Fast on channels_last images.
    """

    def __init__(self, c_in: int, c_out: int):
        super().__init__(c_in, c_out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1)).permute(0, 3, 1, 2)

def _conv_bn(c_in: int, c_out: int, k: int, stride: int = 1, affine: bool = True) -> list[nn.Module]:
    if k == 1:
        conv = PointwiseConv(c_in, c_out)
    else:
        conv = nn.Conv2d(c_in, c_out, k, stride, padding=(k - 1) // 2, bias=False)
    return [conv, nn.BatchNorm2d(c_out, affine=affine)]

def relu_conv_bn(c_in: int, c_out: int, affine: bool = True) -> nn.Sequential:
    """ReLU, 1x1 convolution, batch norm: what brings a cell's input to the cell's width."""
    return nn.Sequential(nn.ReLU(), *_conv_bn(c_in, c_out, 1, affine=affine))

class FactorizedReduce(nn.Module):
    """Halve the resolution without losing pixels: two 1x1 stride-2 convolutions, one shifted by a pixel.

    (B, c_in, H, W) to (B, c_out, ceil(H/2), ceil(W/2)); c_out must be even.
    """

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
    7 ms against 1; a 5 x 5 kernel's, 7 against 4; a dilated kernel's, 12 to 31 against 2 to 6.
    """

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
        return [nn.ReLU(), depthwise, *_conv_bn(channels, channels, 1, affine=affine)]

    if name == "max_pool_3x3":
        layers = [nn.MaxPool2d(3, stride, padding=1)]
    elif name == "avg_pool_3x3":
        layers = [nn.AvgPool2d(3, stride, padding=1, count_include_pad=False)]
    elif name == "skip_connect" and stride == 1:
        layers = [nn.Identity()]
    elif name == "skip_connect":
        layers = [FactorizedReduce(channels, channels, affine)]
    elif name in ("sep_conv_3x3", "sep_conv_5x5"):
        layers = separable(stride, dilation=1) + separable(1, dilation=1)
    elif name in ("dil_conv_3x3", "dil_conv_5x5"):
        layers = separable(stride, dilation=2)
    else:
        raise InputError(f"unknown operation {name!r}: choose from {', '.join(PRIMITIVES[1:])}")
    return nn.Sequential(*layers)

def drop_path(x: Tensor, prob: float) -> Tensor:
    """Zero whole samples of x (B, ...) with probability `prob` and scale the others to keep the mean."""
    keep = 1 - prob
    return x * (torch.rand(x.shape[0], 1, 1, 1, device=x.device) < keep) / keep

def auxiliary_head(c_in: int, num_classes: int, stem: str = "cifar") -> nn.Sequential:
    """DARTS' auxiliary classifier on a map of at least 8x8 (cifar) or 7x7 (imagenet): (B, num_classes)."""
    return nn.Sequential(
        nn.ReLU(),
        nn.AvgPool2d(5, stride=3 if stem == "cifar" else 2),
        *_conv_bn(c_in, 128, 1),
        nn.ReLU(),
        *_conv_bn(128, 768, 2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),  # for images larger than the published 32 or 224 pixels
        nn.Flatten(),
        nn.Linear(768, num_classes),
    )

class Cell(nn.Module):
    """One cell of a genotype. s0, s1: the outputs of the two cells before, s0 twice the size if `halved`.

    (B, c_before, H, W), (B, c_in, H, W) to (B, channels * len(concat), H, W), or H/2 x W/2 if `reduction`.
    """

    def __init__(self, genotype: Genotype, c_before: int, c_in: int, channels: int,
                 reduction: bool, halved: bool):
        super().__init__()
        if reduction:
            edges, self.concat = genotype.reduce, genotype.reduce_concat
        else:
            edges, self.concat = genotype.normal, genotype.normal_concat
        preprocess = FactorizedReduce if halved else relu_conv_bn
        self.preprocess0 = preprocess(c_before, channels)
        self.preprocess1 = relu_conv_bn(c_in, channels)
        self.states = [state for _, state in edges]
        self.ops = nn.ModuleList()
        for name, state in edges:
            stride = 2 if reduction and state < 2 else 1
            self.ops.append(operation(name, channels, stride))

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

class Network(nn.Module):
    """The evaluation network of a genotype (DARTS): `layers` cells, reductions at layers//3 and 2*layers//3.

    Normalised images (B, 3, H, W) to logits (B, num_classes); in training with `auxiliary`, to the pair
    (logits, auxiliary logits). `drop_path_prob` in [0, 1) is an attribute that a training loop can raise.
    """

    def __init__(self, genotype: Genotype, num_classes: int, channels: int, layers: int,
                 auxiliary: bool = False, stem: str = "cifar"):
        super().__init__()
        self.drop_path_prob = 0.0
        if stem == "imagenet":  # three stride-2 convolutions: 224 to 28 pixels
            half = channels // 2
            self.stem0 = nn.Sequential(*_conv_bn(3, half, 3, 2), nn.ReLU(), *_conv_bn(half, channels, 3, 2))
            self.stem1 = nn.Sequential(nn.ReLU(), *_conv_bn(channels, channels, 3, 2))
            c_before, c_in, halved = channels, channels, True
        else:
            self.stem0, self.stem1 = nn.Sequential(*_conv_bn(3, 3 * channels, 3)), nn.Identity()
            c_before, c_in, halved = 3 * channels, 3 * channels, False
        self.cells = nn.ModuleList()
        self.auxiliary = None
        self.auxiliary_at = 2 * layers // 3
        for i in range(layers):
            reduction = i in (layers // 3, 2 * layers // 3)
            if reduction:
                channels *= 2
            cell = Cell(genotype, c_before, c_in, channels, reduction, halved)
            self.cells.append(cell)
            c_before, c_in, halved = c_in, channels * len(cell.concat), reduction
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

    Convolutions and matrix products; half of what torch.utils.flop_counter says, which counts each as two.
    """
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
