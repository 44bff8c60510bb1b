# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "torchvision", "numpy", "pillow", "matplotlib", "tqdm", "scipy"]
# ///
"""DHA: data augmentation policy, hyper-parameters and architecture, searched and trained in one stage.

Paper: Zhou et al., "DHA: End-to-End Joint Optimization of Data Augmentation Policy, Hyper-parameter and
Architecture" (arXiv 2109.05765). Equation numbers below are that paper's. The architecture part is ISTA-NAS
(Yang et al., NeurIPS 2020), one-stage. One network at its final size, one training loss, no validation split;
nothing is retrained: what the search leaves is a trained network.

    python dha.py --dataset shapes --preset quick               # minutes on a laptop, nothing to download
    python dha.py --dataset cifar10 --gpu 0                     # full size, 120 + 600 epochs
    python dha.py --dataset folder --data-dir my/images --image-size 32 --preset quick
    torchrun --nproc-per-node 4 dha.py --dataset cifar10        # one process a GPU, --batch-size is the sum
    python dha.py --resume --out runs/dha-cifar10-seed0         # go on after a stop
    python dha.py --evaluate runs/dha-cifar10-seed0             # test accuracy of a finished run
    python dha.py --genotype DARTS_V2 ...                       # a known architecture with learned DA and HPO
    python dha.py --no-da --no-hpo ...                          # the paper's "One-Stage ISTA"

One step (function `train_step`), with theta the weights, tau the augmentation logits, eta = (lr, wd):
    1. every image draws a pair of operations from p(tau), goes through the sparse supernet, and gives a loss
    2. Eq. (2) moves tau; b, which alpha is recovered from (Eq. 4, once an epoch), moves by the same loss
    3. Eq. (3) moves lr and wd: the gradient of this batch is also that of the last update's outcome
    4. theta takes an SGD step
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torch import Tensor

import common
from common import PRIMITIVES, Data, FactorizedReduce, Genotype, InputError, Network

# ---------------------------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------------------------

DHA_QUICK = {  # --preset quick; everything else stays as in the paper
    "dataset": "shapes",
    "search_epochs": 3,
    "train_epochs": 5,
    "channels": 8,
    "layers": 3,
    "batch_size": 64,
    "lr": 0.05,
    "beta_lr": 3e-4,
    "beta_wd": 1e-3,
    "tau_lr": 0.25,
    "arch_lr": 3e-3,
    "b_scale": 0.1,  # a few hundred steps do not bring b up from 1e-3, and till then the signal drowns
    "auxiliary_weight": 0.0,
    "drop_path": 0.0,
    "cutout": 0,
}

LR_RANGE = (1e-4, 0.1)  # where Eq. (3) may move the learning rate and the weight decay; the paper gives no range
WD_RANGE = (0.0, 1e-2)


class Parser(argparse.ArgumentParser):
    """argparse that reports a mistake in one line and guesses what was meant."""

    def error(self, message: str) -> None:
        unknown = message.removeprefix("unrecognized arguments: ").split(" ")[0]
        near = difflib.get_close_matches(unknown.split("=")[0], self._option_string_actions, 1)
        hint = f" (did you mean {near[0]}?)" if near and message.startswith("unrecognized") else " (see --help)"
        self.exit(2, f"error: {message}{hint}\n")


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help with defaults, where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        plain = action.default is None or action.default is False or action.default is argparse.SUPPRESS
        return action.help if plain else super()._get_help_string(action)


def number(kind: type, low: float, high: float = math.inf):
    """An argparse type: an int or a float from `low` to `high`, both included."""

    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole' if kind is int else 'a'} number") from None
        if not low <= value <= high or not math.isfinite(value):
            span = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {span}")
        return value

    return convert


def parse_args(argv: list[str]) -> tuple[argparse.Namespace, set[str]]:
    """The settings, and the names of those that the command line gave itself."""
    formatter = lambda prog: Formatter(prog, max_help_position=34, width=110)
    parser = Parser(description=__doc__.split("\n\n")[0], formatter_class=formatter, allow_abbrev=False)
    g = parser.add_argument_group("what to run")
    g.add_argument("--preset", choices=["paper", "quick"], default="paper", help="settings; explicit flags win over it")
    g.add_argument("--seed", type=number(int, 0), default=0, help="seed of everything random")
    g.add_argument("--repeats", type=number(int, 1), default=1, help="run seeds S..S+R-1 and report mean and std")
    g.add_argument("--out", help="run directory (default: runs/<script>-<dataset>-seed<seed>)")
    g.add_argument("--resume", action="store_true", help="continue the run in --out, or start it if there is none")
    g.add_argument("--evaluate", metavar="DIR", help="print the test accuracy of the finished run in DIR and stop")
    g = parser.add_argument_group("data")
    g.add_argument("--dataset", choices=common.DATASETS, default="cifar10", help="data set")
    g.add_argument("--data-dir", default="data", help="where data sets are, or are downloaded to")
    g.add_argument("--image-size", type=number(int, 8), help="scale images to this side (default: as they are)")
    g.add_argument("--limit-train", type=number(int, 2), help="use only so many training images")
    g.add_argument("--limit-test", type=number(int, 1), help="use only so many test images")
    g.add_argument("--workers", type=number(int, 1, 256), default=4, help="threads that read image files")
    g = parser.add_argument_group("machine")
    g.add_argument("--gpu", type=number(int, -1), help="GPU number, -1 for the CPU (default: 0 if there is one)")
    g.add_argument("--amp", action="store_true", help="bfloat16 autocast (GPU only)")
    g = parser.add_argument_group("network and training")
    g.add_argument(
        "--search-epochs", type=number(int, 1), default=120, help="most epochs until the architecture is fixed"
    )
    g.add_argument("--train-epochs", type=number(int, 0), default=600, help="epochs after it is fixed, same weights")
    g.add_argument("--batch-size", type=number(int, 2), default=96, help="images a step, over all GPUs")
    g.add_argument("--channels", type=number(int, 2), default=36, help="channels of the first cells (even)")
    g.add_argument("--layers", type=number(int, 3), default=20, help="cells; reductions at 1/3 and 2/3")
    g.add_argument("--lr", type=number(float, 0), default=0.025, help="learning rate at the start")
    g.add_argument("--weight-decay", type=number(float, 0), default=3e-4, help="weight decay at the start")
    g.add_argument("--grad-clip", type=number(float, 1e-6), default=5.0, help="largest norm of the weights' gradient")
    g.add_argument("--auxiliary-weight", type=number(float, 0), default=0.4, help="loss weight of the auxiliary head")
    g.add_argument("--drop-path", type=number(float, 0, 0.99), default=0.2, help="drop-path at the end of training")
    g.add_argument("--cutout", type=number(int, 0), default=16, help="side of the cutout square in pixels")
    g = parser.add_argument_group("data augmentation (DA)")
    g.add_argument("--no-da", action="store_true", help="no augmentation policy (crop, flip and cutout stay)")
    g.add_argument("--tau-lr", type=number(float, 0), default=5e-4, help="learning rate of tau in Eq. 2")
    g = parser.add_argument_group("hyper-parameters (HPO)")
    g.add_argument("--no-hpo", action="store_true", help="keep lr and wd; lr falls by cosine once the search is over")
    g.add_argument("--beta-lr", type=number(float, 0), default=1e-5, help="beta of Eq. 3 for the learning rate")
    g.add_argument("--beta-wd", type=number(float, 0), default=1e-5, help="beta of Eq. 3 for the weight decay")
    g = parser.add_argument_group("architecture (NAS)")
    g.add_argument(
        "--genotype", metavar="NAME|FILE", help=f"no search, train this: {', '.join(common.GENOTYPES)} or a file"
    )
    g.add_argument("--arch-lr", type=number(float, 0), default=3e-4, help="Adam's learning rate for b")
    g.add_argument("--b-scale", type=number(float, 1e-9), default=1e-3, help="standard deviation of b's first values")
    g.add_argument("--lasso", type=number(float, 1e-12), default=1e-5, help="lambda of Eq. 4")
    g.add_argument(
        "--freeze-distance", type=number(float, 0), default=1e-3, help="a node freezes if alpha moved no more"
    )
    g.add_argument(
        "--max-params", type=number(int, 1), help="reject supports whose network has more parameters (Eq. 1)"
    )
    g.add_argument("--max-flops", type=number(int, 1), help="reject supports with more multiply-adds an image (Eq. 1)")

    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    if first.parse_known_args(argv)[0].preset == "quick":
        parser.set_defaults(**DHA_QUICK)
    args = parser.parse_args(argv)
    words = {word.split("=")[0] for word in argv}
    explicit = {action.dest for action in parser._actions if words & set(action.option_strings)}
    if args.channels % 2:
        parser.error("--channels must be even: a factorized reduction splits them in two")
    if args.genotype and (args.max_params or args.max_flops):
        parser.error("--max-params and --max-flops constrain the search; with --genotype there is none")
    if args.genotype and not args.train_epochs:
        parser.error("--genotype with --train-epochs 0 leaves nothing to do")
    if not args.no_hpo and not LR_RANGE[0] <= args.lr <= LR_RANGE[1]:
        parser.error(f"--lr must lie in {list(LR_RANGE)} where Eq. 3 learns it; or give --no-hpo")
    if not args.no_hpo and args.weight_decay > WD_RANGE[1]:
        parser.error(f"--weight-decay must lie in {list(WD_RANGE)} where Eq. 3 learns it; or give --no-hpo")
    return args, explicit


def note_unused(args: argparse.Namespace, explicit: set[str], unused: dict[str, str]) -> None:
    """Say which flags were given in vain. unused: a switch, and the names that mean nothing once it is on."""
    flag = lambda name: "--" + name.replace("_", "-")
    for switch, names in unused.items():
        for name in names.split():
            if getattr(args, switch) and name in explicit:
                say(f"note: {flag(name)} does nothing with {flag(switch)}")


# ---------------------------------------------------------------------------------------------------------------
# Augmentations: batched, one magnitude an image, differentiable. images (B, 3, H, W) float in [0, 1]; magnitude (B,)
# in [0, 1], in [-1, 1] for those in SIGNED; magnitude 0 is the identity wherever an operation has a magnitude.
# Ranges are AutoAugment's. Inputs are never modified; outputs lie in [0, 1].
# ---------------------------------------------------------------------------------------------------------------


def per_image(magnitude: Tensor) -> Tensor:
    return magnitude.view(-1, 1, 1, 1)


def straight_through(value: Tensor, source: Tensor) -> Tensor:
    """`value` forwards; backwards the gradient goes to `source` as if it had been added (Faster AutoAugment)."""
    return value.detach() + (source - source.detach())


def warp(images: Tensor, matrix: Tensor) -> Tensor:
    """Each image seen through its own affine map: output pixel (x, y) shows the input at matrix @ (x, y, 1).

    matrix: (B, 2, 3), in pixels from the top left corner, as PIL's Image.transform. Bilinear; outside is 0.
    """
    H, W = images.shape[2:]
    x = torch.arange(W, device=images.device, dtype=images.dtype) + 0.5
    y = torch.arange(H, device=images.device, dtype=images.dtype)[:, None] + 0.5
    along_x, along_y, shift = matrix[..., None, None].unbind(2)  # (B, 2, 1, 1)
    source_x, source_y = (along_x * x + (along_y * y + shift)).unbind(1)  # (B, H, W)
    grid = torch.stack([source_x * (2 / W) - 1, source_y * (2 / H) - 1], -1)
    out = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    with torch.no_grad():  # only rounding leaves [0, 1]
        return out.clamp_(0, 1)


def affine(a: Tensor | float, b: Tensor | float, c: Tensor | float, d: Tensor | float, e, f, like: Tensor) -> Tensor:
    """(B, 2, 3) matrices [[a, b, c], [d, e, f]] from numbers and (B,) tensors."""
    rows = [v if isinstance(v, Tensor) else torch.full_like(like, v) for v in (a, b, c, d, e, f)]
    return torch.stack(rows, 1).view(-1, 2, 3)


def shear_x(images: Tensor, magnitude: Tensor) -> Tensor:
    """Shear by up to 0.3 pixels a row; the top row stays."""
    return warp(images, affine(1.0, 0.3 * magnitude, 0.0, 0.0, 1.0, 0.0, magnitude))


def shear_y(images: Tensor, magnitude: Tensor) -> Tensor:
    """Shear by up to 0.3 pixels a column; the left column stays."""
    return warp(images, affine(1.0, 0.0, 0.0, 0.3 * magnitude, 1.0, 0.0, magnitude))


def translate_x(images: Tensor, magnitude: Tensor) -> Tensor:
    """Move right by up to 0.45 of the width."""
    return warp(images, affine(1.0, 0.0, -0.45 * images.shape[3] * magnitude, 0.0, 1.0, 0.0, magnitude))


def translate_y(images: Tensor, magnitude: Tensor) -> Tensor:
    """Move down by up to 0.45 of the height."""
    return warp(images, affine(1.0, 0.0, 0.0, 0.0, 1.0, -0.45 * images.shape[2] * magnitude, magnitude))


def rotate(images: Tensor, magnitude: Tensor) -> Tensor:
    """Turn counter-clockwise around the centre by up to 30 degrees."""
    H, W = images.shape[2:]
    cos, sin = (magnitude * math.pi / 6).cos(), (magnitude * math.pi / 6).sin()
    dx, dy = (1 - cos) * W / 2 + sin * H / 2, (1 - cos) * H / 2 - sin * W / 2
    return warp(images, affine(cos, -sin, dx, sin, cos, dy, magnitude))


def limit(images: Tensor) -> Tensor:
    """images.clamp(0, 1). A CPU's backward pass takes 60 instead of 890 us for 128 images of 32 x 32: no torch.where.

    The bounds are a little wider so that pixels that are 0 or 1 keep their gradient.
    """
    out = F.hardtanh(images, -1e-6, 1 + 1e-6)
    with torch.no_grad():
        return out.clamp_(0, 1)


def blend(ground: Tensor, images: Tensor, magnitude: Tensor) -> Tensor:
    """`images` moved away from (magnitude > 0) or towards (< 0) `ground`, by a factor of 1 + 0.9 magnitude."""
    return limit(torch.lerp(ground, images, 1 + 0.9 * per_image(magnitude)))


def gray(images: Tensor) -> Tensor:
    """Luma, ITU-R 601-2: (B, 1, H, W)."""
    red, green, blue = images.split(1, dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def brightness(images: Tensor, magnitude: Tensor) -> Tensor:
    """Blend with black."""
    return limit(images * (1 + 0.9 * per_image(magnitude)))


def color(images: Tensor, magnitude: Tensor) -> Tensor:
    """Blend with the gray image."""
    return blend(gray(images), images, magnitude)


def contrast(images: Tensor, magnitude: Tensor) -> Tensor:
    """Blend with the image's mean gray."""
    return blend(gray(images).mean((2, 3), keepdim=True), images, magnitude)


def sharpness(images: Tensor, magnitude: Tensor) -> Tensor:
    """Blend with the smoothed image (3x3, centre 5/13, others 1/13; the outermost pixels as they are)."""
    if min(images.shape[2:]) < 3:
        return images.clone()
    inside = images[:, :, 1:-1, 1:-1]
    rows = images[:, :, :-2] + images[:, :, 1:-1] + images[:, :, 2:]
    smooth = (rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * inside) / 13
    return blend(images + F.pad(smooth - inside, (1, 1, 1, 1)), images, magnitude)


def solarize(images: Tensor, magnitude: Tensor) -> Tensor:
    """Invert what is at least as bright as 1 - magnitude. Straight-through gradient for the magnitude."""
    m = per_image(magnitude)
    bright = ((images >= 1 - m - 1e-5) & (m > 0)).to(images.dtype)  # 1e-5: rounding, where a pixel is at the threshold
    return bright + (1 - 2 * bright) * images + (m - m.detach())


def posterize(images: Tensor, magnitude: Tensor) -> Tensor:
    """Keep the highest 8 - round(4 magnitude) of 8 bits. Straight-through gradients for image and magnitude."""
    m = per_image(magnitude)
    step = 2 ** (4 * m.detach()).round()
    kept = ((images.detach() * 255).round() / step).floor() * step / 255
    return straight_through(torch.lerp(images.detach(), kept, (step > 1).to(images.dtype)), images + m)


def eight_bits(images: Tensor) -> Tensor:
    """round(255 images) as int32, from 0 to 255 even where an image is not a number: it becomes an index."""
    return (images.detach() * 255).round().int().clamp_(0, 255)


def look_up(levels: Tensor, table: Tensor) -> Tensor:
    """table[b, c, levels[b, c, y, x]]: levels (B, C, H, W), integers from 0 to 255; table (B, C, 256)."""
    row = 256 * torch.arange(table.shape[0] * table.shape[1], device=levels.device, dtype=levels.dtype)
    return table.flatten().index_select(0, (levels + row.view(*table.shape[:2], 1, 1)).flatten()).view(levels.shape)


def auto_contrast(images: Tensor, magnitude: Tensor) -> Tensor:
    """Stretch every channel to the full range, as PIL at 8 bits. Straight-through gradient for the image."""
    levels = eight_bits(images)
    low, high = levels.amin((2, 3)).double()[..., None], levels.amax((2, 3)).double()[..., None]
    level = torch.arange(256, device=images.device, dtype=torch.float64)
    scale = 255 / (high - low).clamp(min=1)
    stretched = (level * scale - low * scale).floor().clamp(0, 255)  # (B, 3, 256)
    table = torch.where(high > low, stretched, level) / 255
    return straight_through(look_up(levels, table.to(images.dtype)), images)


def equalize(images: Tensor, magnitude: Tensor) -> Tensor:
    """Flatten every channel's histogram, as PIL at 8 bits. Straight-through gradient for the image."""
    B, C, H, W = images.shape
    levels = eight_bits(images)
    one = torch.ones((), dtype=torch.long, device=images.device).expand(B, C, H * W)
    histogram = one.new_zeros(B, C, 256).scatter_add_(2, levels.long().view(B, C, H * W), one)
    brightest = histogram.gather(2, levels.amax((2, 3)).long()[..., None])
    step = (H * W - brightest) // 255
    below = histogram.cumsum(2) - histogram
    flat = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)  # (B, 3, 256)
    table = torch.where(step > 0, flat, torch.arange(256, device=images.device)).to(images.dtype) / 255
    return straight_through(look_up(levels, table), images)


def identity(images: Tensor, magnitude: Tensor) -> Tensor:
    """The images, copied."""
    return images.clone()


AUGMENTATIONS = {
    "AutoContrast": auto_contrast,
    "Equalize": equalize,
    "Rotate": rotate,
    "Posterize": posterize,
    "Solarize": solarize,
    "Color": color,
    "Contrast": contrast,
    "Brightness": brightness,
    "Sharpness": sharpness,
    "ShearX": shear_x,
    "ShearY": shear_y,
    "TranslateX": translate_x,
    "TranslateY": translate_y,
    "Identity": identity,
}
SIGNED = {"Rotate", "Color", "Contrast", "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY"}


def apply_each(images: Tensor, choice: Tensor, magnitude: Tensor) -> Tensor:
    """Each image through its own operation: choice (B,) in 0..13, an index into AUGMENTATIONS; magnitude (B,)."""
    out = images.clone()
    for k, augment in enumerate(AUGMENTATIONS.values()):
        if images.is_cuda:  # picking images needs their number on the host; doing all of them waits for nothing
            out = torch.where(per_image(choice == k), augment(images, magnitude), out)
        else:
            chosen = (choice == k).nonzero().flatten()
            if len(chosen):
                out[chosen] = augment(images[chosen], magnitude[chosen])
    return out


# ---------------------------------------------------------------------------------------------------------------
# Data augmentation (Eq. 2): tau holds a logit for every ordered pair of operations, 14 x 14
# ---------------------------------------------------------------------------------------------------------------


def sample_pairs(tau: Tensor, count: int) -> Tensor:
    """Draw pairs from p(tau) = softmax over all 196 (Gumbel-max): (count,) with values 14 * first + second."""
    noise = torch.empty(count, tau.numel(), device=tau.device).exponential_().log_()  # minus a Gumbel variable
    return (tau.detach().flatten() - noise).argmax(1)


@torch.no_grad()
def apply_pairs(images: Tensor, pairs: Tensor) -> Tensor:
    """Each image through its pair of operations, with magnitude U(0, 1) and, a random sign where it has one."""
    names = list(AUGMENTATIONS)
    for choice in (pairs // len(names), pairs % len(names)):
        signed = sum(choice == k for k, name in enumerate(names) if name in SIGNED) > 0
        magnitude, coin = torch.rand(2, len(images), device=images.device)
        images = apply_each(images, choice, torch.where(signed & (coin < 0.5), -magnitude, magnitude))
    return images


def policy_loss(tau: Tensor, pairs: Tensor, losses: Tensor) -> Tensor:
    """L^DA (Eq. 2): minus the sum over the batch of p_k(tau) L_k. The gradient goes to tau alone.

    tau (14, 14), pairs (B,) as drawn, losses (B,) of the same images. Descending it raises the probability of pairs
    whose summed loss exceeds what their probability makes one expect.
    """
    p = tau.flatten().softmax(0)
    return -(p.gather(0, pairs) * losses.detach()).sum()  # Eq. (2)


def entropy(tau: Tensor) -> float:
    """Entropy of p(tau) in nats; at most log 196 = 5.28."""
    p = tau.detach().flatten().double().softmax(0)
    return float(-(p * p.clamp(min=1e-300).log()).sum())


# ---------------------------------------------------------------------------------------------------------------
# Architecture (Eq. 4): b is learned, alpha is recovered from it, its support is the architecture
# ---------------------------------------------------------------------------------------------------------------


def soft_threshold(x: Tensor, threshold: Tensor) -> Tensor:
    """The shrinkage operator of Eq. (4)."""
    return x.sign() * (x.abs() - threshold).clamp(min=0)


def kkt_residual(A: Tensor, b: Tensor, alpha: Tensor, lam: float) -> Tensor:
    """How far alpha (..., n) is from minimising 1/2 |A alpha - b|^2 + lam |alpha|_1, relative to max |A^T b|: (...).

    At the solution A_i^T (b - A alpha) is lam sign(alpha_i) where alpha_i is not 0, and at most lam in size elsewhere.
    """
    slope = ((b.unsqueeze(-1) - A @ alpha.unsqueeze(-1)).mT @ A).squeeze(-2)  # (..., n)
    wrong = torch.where(alpha == 0, (slope.abs() - lam).clamp(min=0), (slope - lam * alpha.sign()).abs())
    scale = (b.unsqueeze(-2) @ A).squeeze(-2).abs().amax(-1)
    return wrong.amax(-1) / scale.clamp(min=torch.finfo(A.dtype).tiny)


@torch.no_grad()
def ista(A: Tensor, b: Tensor, lam: float, tolerance: float = 1e-9, max_iterations: int = 100_000) -> Tensor:
    """argmin over alpha of 1/2 |A alpha - b|^2 + lam |alpha|_1 by iterative shrinkage (Eq. 4), all problems at once.

    A (..., m, n), b (..., m) -> alpha (..., n). Works in float64 and returns b's type. `tolerance` bounds
    `kkt_residual`; columns of zeros (padding) get 0. Raises RuntimeError if max_iterations do not reach it.

    Plain ISTA is hopeless here: with n > m the problem is flat, and at lam = 1e-5 its support is wrong after 1,000
    iterations. Three known remedies: Beck & Teboulle's momentum, restarted where it points uphill (O'Donoghue &
    Candes); continuation (Hale et al.): lam starts at half of max |A^T b| and is halved every 50 iterations; then the
    minimum within the present support and signs, as far as the signs hold (FPC-AS, Wen et al.), which alone saves
    99 % of the iterations: 100 random problems of 7 x 40 took 1,150 instead of more than 100,000.
    """
    A64, b64 = A.double(), b.double()
    G = A64.mT @ A64  # (..., n, n)
    c = (b64.unsqueeze(-2) @ A64).squeeze(-2)  # (..., n), A^T b
    L = torch.linalg.matrix_norm(G, 2).unsqueeze(-1).clamp(min=1e-30)  # Lipschitz constant of the gradient
    unit = torch.eye(c.shape[-1], dtype=c.dtype, device=c.device)
    lam_now = (c.abs().amax(-1, keepdim=True) / 2).clamp(min=lam)  # (..., 1)
    alpha = y = torch.zeros_like(c)
    t = one = torch.ones_like(lam_now)
    for i in range(1, max_iterations + 1):
        gradient = (G @ y.unsqueeze(-1)).squeeze(-1) - c  # A^T (A y - b)
        new = soft_threshold(y - gradient / L, lam_now / L)  # Eq. (4)
        uphill = ((y - new) * (new - alpha)).sum(-1, keepdim=True) > 0
        t_new = torch.where(uphill, one, (1 + (1 + 4 * t * t).sqrt()) / 2)
        y = new + torch.where(uphill, 0 * t, (t - 1) / t_new) * (new - alpha)
        alpha, t = new, t_new
        if i % 50:
            continue
        for _ in range(3):
            inside = alpha != 0
            block = torch.where(inside.unsqueeze(-1) & inside.unsqueeze(-2), G, 0 * G)
            block = block + unit * torch.where(inside, 1e-12 * L, one).unsqueeze(-1)
            best = torch.linalg.solve_ex(block, torch.where(inside, c - lam_now * alpha.sign(), 0 * c)).result
            reach = torch.where(best * alpha < 0, alpha / (alpha - best), 1 + 0 * alpha)  # until its sign would flip
            shortest = reach.amin(-1, keepdim=True)
            flips = (reach <= shortest) & (shortest < 1)
            alpha = torch.where(flips, 0 * alpha, alpha + shortest * (best - alpha))
        if (lam_now <= lam).all() and kkt_residual(A64, b64, alpha, lam).max() <= tolerance:
            return alpha.to(b.dtype)
        y, t = alpha, one
        lam_now = (lam_now / 2).clamp(min=lam)
    worst = float(kkt_residual(A64, b64, alpha, lam).max())
    raise RuntimeError(f"ISTA: KKT residual {worst:.1e} after {max_iterations} iterations, wanted {tolerance:.0e}")


NODES = 4  # intermediate nodes of a cell; node j reads states 0..j+1
OPS = len(PRIMITIVES)


class Candidate(nn.Module):
    """One operation of the supernet, ending in a batch norm whose scale is the operation's weight in its node.

    While its node is searched the weight comes from b and no norm has parameters of its own; so absorbing alpha into
    the frozen node (`freeze`) is writing a number into a scale, and changes nothing that the network computes.
    """

    def __init__(self, name: str, channels: int, stride: int):
        super().__init__()
        layers = list(common.operation(name, channels, stride))
        if isinstance(layers[-1], FactorizedReduce):
            self.bn, layers[-1].bn = layers[-1].bn, nn.Identity()
        else:  # pools and the identity have no batch norm in DARTS; here every candidate gets one [A]
            self.bn = layers.pop() if isinstance(layers[-1], nn.BatchNorm2d) else nn.BatchNorm2d(channels)
        self.body = nn.Sequential(*layers)
        self.is_identity = name == "skip_connect" and stride == 1
        for norm in self.norms():
            norm.requires_grad_(False)

    def norms(self) -> list[nn.BatchNorm2d]:
        return [m for m in self.modules() if isinstance(m, nn.BatchNorm2d)]

    def forward(self, x: Tensor, weight: Tensor | None) -> Tensor:
        """weight: 0-dim tensor while searched, None once the scale is the norm's own."""
        norm, x = self.bn, self.body(x)
        scale = norm.weight if weight is None else weight.repeat(len(norm.weight))  # batch_norm wants it contiguous
        return F.batch_norm(
            x, norm.running_mean, norm.running_var, scale, norm.bias, self.training, norm.momentum, norm.eps
        )

    @torch.no_grad()
    def freeze(self, weight: Tensor | None) -> None:
        """Absorb `weight` into the last norm's scale (None: leave it) and let all norms learn from here on."""
        if weight is not None:
            self.bn.weight.copy_(weight.expand_as(self.bn.weight))
        for norm in self.norms():
            norm.requires_grad_(True)


class SparseCell(nn.Module):
    """A DARTS cell with all candidate operations, of which a forward pass touches two a node."""

    def __init__(self, c_before: int, c_in: int, channels: int, reduction: bool, halved: bool, edges: list | None):
        super().__init__()
        self.reduction = reduction
        self.preprocess0 = FactorizedReduce(c_before, channels) if halved else common.relu_conv_bn(c_before, channels)
        self.preprocess1 = common.relu_conv_bn(c_in, channels)
        self.ops = nn.ModuleDict()
        for j in range(NODES):
            for state in range(j + 2):
                for name in PRIMITIVES[1:]:
                    if edges is None or (name, state) in edges[j]:
                        stride = 2 if reduction and state < 2 else 1
                        self.ops[self.key(j, name, state)] = Candidate(name, channels, stride)

    @staticmethod
    def key(node: int, name: str, state: int) -> str:
        return f"node{node}_state{state}_{name}"

    def forward(self, s0: Tensor, s1: Tensor, edges: list, weights: list, drop_path_prob: float) -> Tensor:
        """edges: per node two (operation, state); weights: per node two 0-dim tensors or None."""
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        for j in range(NODES):
            node = []
            for (name, state), weight in zip(edges[j], weights[j]):
                op = self.ops[self.key(j, name, state)]
                h = op(states[state], weight)
                drop = self.training and drop_path_prob > 0 and not op.is_identity
                node.append(common.drop_path(h, drop_path_prob) if drop else h)
            states.append(node[0] + node[1])
        return torch.cat(states[2:], 1)  # (B, 4 channels, H, W)


class SparseSupernet(nn.Module):
    """ISTA-NAS' one-stage supernet: all 14 edges x 7 operations of every cell exist, only the support's ever run.

    Input: normalised images (B, 3, H, W). Output: logits (B, num_classes); with `auxiliary`, in training, the pair
    (logits, auxiliary logits). With `genotype` it holds that architecture's operations alone: the pruned network.

    Node k of 0..7 (normal 0..3, then reduce 0..3) has b[k] (7,), A[k] (7, 40; zero columns pad the smaller nodes) and
    alpha[k] (40,), entry 8 * state + operation. `recover` solves Eq. (4) and picks the support, `freeze` ends a node.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        layers: int,
        auxiliary: bool = False,
        genotype: Genotype | None = None,
        b_scale: float = 1e-3,
    ):
        super().__init__()
        self.size = {"channels": channels, "num_classes": num_classes, "layers": layers}
        self.drop_path_prob = 0.0
        self.auxiliary_at = 2 * layers // 3
        self.edges: list[list[tuple[str, int]]] = [[]] * (2 * NODES)  # two (operation, state) for every node
        if genotype is not None:
            cells = list(genotype.normal) + list(genotype.reduce)
            self.edges = [[tuple(e) for e in cells[2 * k : 2 * k + 2]] for k in range(2 * NODES)]
        self.frozen = [genotype is not None] * (2 * NODES)
        C = channels
        self.stem = nn.Sequential(nn.Conv2d(3, 3 * C, 3, padding=1, bias=False), nn.BatchNorm2d(3 * C))
        c_before, c_in, halved = 3 * C, 3 * C, False
        self.cells = nn.ModuleList()
        for i in range(layers):
            reduction = i in (layers // 3, 2 * layers // 3)
            C = 2 * C if reduction else C
            mine = None if genotype is None else self.edges[NODES:] if reduction else self.edges[:NODES]
            self.cells.append(SparseCell(c_before, c_in, C, reduction, halved, mine))
            c_before, c_in, halved = c_in, NODES * C, reduction
            if i == self.auxiliary_at and auxiliary:
                self.auxiliary = common.auxiliary_head(c_in, num_classes)
        self.classifier = nn.Linear(c_in, num_classes)
        if genotype is None:
            A = torch.rand(2 * NODES, 7, OPS * (NODES + 1))
            for k in range(2 * NODES):
                A[k, :, OPS * (k % NODES + 2) :] = 0
            self.register_buffer("A", A)
            self.register_buffer("alpha", torch.zeros(2 * NODES, OPS * (NODES + 1)))
            self.register_buffer("A_S", torch.zeros(2 * NODES, 7, 2))
            self.register_buffer("offset", torch.zeros(2 * NODES, 2))
            self.b = nn.Parameter(b_scale * torch.randn(2 * NODES, 7))
            self.recover()
        else:
            for candidate in self.candidates():
                candidate.freeze(None)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        weights: list[list[Tensor | None]] = [[None, None]] * (2 * NODES)
        if not all(self.frozen):
            strength = self.strength()
            weights = [[None, None] if self.frozen[k] else list(strength[k]) for k in range(2 * NODES)]
        s0 = s1 = self.stem(x)
        auxiliary = None
        for i, cell in enumerate(self.cells):
            kind = slice(NODES, None) if cell.reduction else slice(NODES)
            s0, s1 = s1, cell(s0, s1, self.edges[kind], weights[kind], self.drop_path_prob)
            if i == self.auxiliary_at and self.training and hasattr(self, "auxiliary"):
                auxiliary = self.auxiliary(s1)
        logits = self.classifier(s1.mean((2, 3)))
        return logits if auxiliary is None else (logits, auxiliary)

    def strength(self) -> Tensor:
        """The weights of the support's operations, (8, 2): b^T A_S - alpha_S^T E_S (section 2.3), gradient to b."""
        return torch.einsum("km,kms->ks", self.b, self.A_S) - self.offset

    def weights(self) -> list[nn.Parameter]:
        """theta: every parameter but b."""
        return [p for name, p in self.named_parameters() if name != "b"]

    def genotype(self) -> Genotype:
        """The support as a genotype."""
        cells = [[tuple(e) for node in part for e in node] for part in (self.edges[:NODES], self.edges[NODES:])]
        concat = list(range(2, NODES + 2))
        return Genotype(cells[0], concat, cells[1], list(concat))

    def candidates(self, node: int | None = None) -> list[Candidate]:
        """The selected operations of all cells, or of one node 0..7, in the order of `edges`."""
        found = []
        for k in range(2 * NODES) if node is None else [node]:
            for cell in self.cells:
                if cell.reduction == (k >= NODES):
                    found += [cell.ops[cell.key(k % NODES, name, state)] for name, state in self.edges[k]]
        return found

    @torch.no_grad()
    def recover(self, lam: float = 1e-5, accept=lambda genotype: True) -> tuple[Tensor, bool]:
        """Solve Eq. (4) for the nodes not frozen, and make the strongest operations the support.

        accept: a function of the new genotype; where it says no, everything stays as it was (Eq. 1's constraints).
        Returns how far every alpha moved (8,), on the CPU, and whether the support was accepted.
        """
        frozen = torch.tensor(self.frozen, device=self.b.device).unsqueeze(1)
        alpha = torch.where(frozen, self.alpha, ista(self.A, self.b, lam))
        moved = (alpha - self.alpha).norm(dim=1).cpu()
        # Where alpha has fewer than two usable entries, the next in line are those most correlated with what is left.
        left = self.b - torch.einsum("kmn,kn->km", self.A, alpha)
        score = torch.where(alpha != 0, alpha.abs(), 1e-9 * torch.einsum("kmn,km->kn", self.A, left).abs())
        score = score.view(2 * NODES, NODES + 1, OPS)[:, :, 1:]  # never "none"
        best = score.max(2)  # the strongest operation of every edge, (8, 5)
        edges, index = [], torch.zeros(2 * NODES, 2, dtype=torch.long)
        for k in range(2 * NODES):
            states = best.values[k, : k % NODES + 2].topk(2).indices.sort().values.tolist()
            ops = [int(best.indices[k, s]) + 1 for s in states]
            edges.append([(PRIMITIVES[op], s) for op, s in zip(ops, states)])
            index[k] = torch.tensor([OPS * s + op for op, s in zip(ops, states)])
        before, self.edges = self.edges, [old if f else new for old, new, f in zip(self.edges, edges, self.frozen)]
        if not accept(self.genotype()):
            self.edges = before
            return moved, False
        index = index.to(self.b.device)
        self.alpha.copy_(alpha)
        self.A_S.copy_(self.A.gather(2, index.unsqueeze(1).expand(-1, 7, -1)))
        alpha_S = alpha.gather(1, index)  # (8, 2)
        E_S = self.A_S.mT @ self.A_S - torch.eye(2, device=index.device)  # (8, 2, 2)
        self.offset.copy_((alpha_S.unsqueeze(1) @ E_S).squeeze(1))
        return moved, True

    @torch.no_grad()
    def freeze(self, node: int) -> None:
        """Fix a node's operations and absorb their weights; its batch norms learn from here on."""
        strength = self.strength()[node]
        for i, candidate in enumerate(self.candidates(node)):
            candidate.freeze(strength[i % 2])
        self.frozen[node] = True

    def prune(self) -> SparseSupernet:
        """The network of the selected operations alone, in eval mode, with the same logits; no auxiliary head."""
        pruned = SparseSupernet(**self.size, genotype=self.genotype()).to(self.classifier.weight.device)
        mine, skip = self.state_dict(), "_extra_state"  # what is frozen here says nothing of the pruned network
        pruned.load_state_dict({name: mine[name] for name in pruned.state_dict() if name != skip}, strict=False)
        for k in range(2 * NODES):
            if not self.frozen[k]:
                strength = self.strength()[k]
                for i, candidate in enumerate(pruned.candidates(k)):
                    candidate.freeze(strength[i % 2])
        return pruned.eval()

    def get_extra_state(self) -> dict:
        return {"edges": [[list(e) for e in node] for node in self.edges], "frozen": list(self.frozen)}

    def set_extra_state(self, state: dict) -> None:
        self.edges = [[tuple(e) for e in node] for node in state["edges"]]
        self.frozen = list(state["frozen"])
        for k in range(2 * NODES):
            if self.frozen[k]:
                for candidate in self.candidates(k):
                    candidate.freeze(None)


# ---------------------------------------------------------------------------------------------------------------
# Hyper-parameters (Eq. 3)
# ---------------------------------------------------------------------------------------------------------------


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


@torch.no_grad()
def hypergradient(
    grads: list[Tensor], velocities: list[Tensor], params: list[Tensor], lr: Tensor | float
) -> tuple[Tensor, Tensor]:
    """The gradient of Eq. (3), (dL/dlr, dL/dwd), for theta+ = theta - lr v with v = mu v0 + g + wd theta.

    grads: dL/dtheta at theta+ (before clipping), velocities: the v of that update, params: theta+; lr: its rate.
    theta and v0 count as constant (section 2.2). No second pass: the next batch needs its gradient at theta+ anyway.
    """
    g, v, theta = flat(grads), flat(velocities), flat(params)
    along = g @ v
    d_lr = -along  # dtheta+/dlr = -v
    d_wd = -lr * (g @ theta + lr * along)  # dtheta+/dwd = -lr theta, theta = theta+ + lr v
    return d_lr, d_wd


@torch.no_grad()
def sgd_step(
    params: list[Tensor], grads: list[Tensor], velocities: list[Tensor], lr: Tensor, wd: Tensor, mu: float = 0.9
) -> None:
    """v = mu v + g + wd theta; theta = theta - lr v, in place. lr, wd: 0-dim tensors, so nothing waits for them."""
    torch._foreach_mul_(velocities, mu)
    torch._foreach_add_(velocities, grads)
    torch._foreach_add_(velocities, torch._foreach_mul(params, wd))
    torch._foreach_sub_(params, torch._foreach_mul(velocities, lr))


# ---------------------------------------------------------------------------------------------------------------
# The search step
# ---------------------------------------------------------------------------------------------------------------

# One beta fits no whole run: the gradient of Eq. (3) is noisy (on shapes at lr 0.00125 its deviation was 1.5 to 4
# times its mean), and one large step could throw lr to an end of its range. So a step moves lr by at most this share
# of it. Tighter bounds turn the mean into a vote of signs: with 1 % lr rose half as far.
HPO_STEP = 0.1
WD_STEP = 1e-5  # the same for the weight decay, absolute because 0 is within its range


class Search:
    """What a run learns: net and its weights theta, b (in net), tau, eta = (lr, wd); and their optimizers' memory."""

    def __init__(self, args: argparse.Namespace, data: Data, device: torch.device):
        auxiliary = args.auxiliary_weight > 0
        classes, genotype = len(data.classes), args.genotype and common.parse_genotype(args.genotype)
        if genotype:
            self.net = Network(genotype, classes, args.channels, args.layers, auxiliary)
            self.theta = list(self.net.parameters())
        else:
            self.net = SparseSupernet(args.channels, classes, args.layers, auxiliary, b_scale=args.b_scale)
            self.theta = self.net.weights()
        self.net.to(device, memory_format=torch.channels_last)
        self.b_optimizer = None
        if not genotype:
            self.b_optimizer = torch.optim.Adam([self.net.b], args.arch_lr, (0.5, 0.999), weight_decay=1e-3)
        self.tau = torch.zeros(len(AUGMENTATIONS), len(AUGMENTATIONS), device=device, requires_grad=True)
        self.lr = torch.tensor(args.lr, device=device)
        self.wd = torch.tensor(args.weight_decay, device=device)
        self.velocity: list[Tensor | None] = [None] * len(self.theta)
        self.updated: list[int] = []  # which of theta the last step moved; their velocities are its v
        self.mean, self.std = common.mean_std(data.train_images)

    @property
    def searching(self) -> bool:
        return isinstance(self.net, SparseSupernet) and not all(self.net.frozen)

    def state_dict(self) -> dict:
        return {
            "net": self.net.state_dict(),
            "b_optimizer": self.b_optimizer and self.b_optimizer.state_dict(),
            "tau": self.tau.detach(),
            "lr": self.lr,
            "wd": self.wd,
            "velocity": self.velocity,
            "updated": self.updated,
        }

    def load_state_dict(self, state: dict) -> None:
        self.net.load_state_dict(state["net"])
        if self.b_optimizer:
            self.b_optimizer.load_state_dict(state["b_optimizer"])
        with torch.no_grad():
            for name in ("tau", "lr", "wd"):
                getattr(self, name).copy_(state[name])
        device = self.lr.device
        self.velocity = [
            None if v is None else v.to(device).clone(memory_format=torch.preserve_format) for v in state["velocity"]
        ]
        self.updated = state["updated"]


def train_step(s: Search, images: Tensor, labels: Tensor, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """One step of DHA on uint8 images (B, 3, H, W) and labels (B,). Returns losses (B,) and logits, both detached."""
    x = common.random_crop_flip(images).float() / 255
    if not args.no_da:
        pairs = sample_pairs(s.tau, len(x))
        x = apply_pairs(x, pairs)
    x = common.normalize(x, s.mean, s.std)
    if args.cutout:
        x = common.cutout(x, args.cutout)

    with torch.autocast(x.device.type, torch.bfloat16, enabled=args.amp):
        logits = s.net(x)
        logits, auxiliary = logits if isinstance(logits, tuple) else (logits, None)
    losses = F.cross_entropy(logits.float(), labels, reduction="none")  # L_k, (B,)
    if auxiliary is not None:
        losses = losses + args.auxiliary_weight * F.cross_entropy(auxiliary.float(), labels, reduction="none")

    for i in s.updated:
        s.theta[i].grad = None
    s.tau.grad = None
    if s.b_optimizer:
        s.b_optimizer.zero_grad()
    losses.mean().backward()  # gradients of theta and of b (section 2.3)
    if not args.no_da:
        policy_loss(s.tau, pairs, losses).backward()  # Eq. (2)
    active = [i for i, p in enumerate(s.theta) if p.grad is not None]
    tau = [] if args.no_da else [s.tau]
    average_gradients([s.theta[i] for i in active] + ([s.net.b] if s.searching else []) + tau)

    if not args.no_da:
        with torch.no_grad():
            s.tau -= args.tau_lr * processes() * s.tau.grad  # Eq. (2) sums over the batch, whoever computed it
    if s.searching:
        s.b_optimizer.step()
    if not args.no_hpo and s.updated:
        both = [i for i in s.updated if s.theta[i].grad is not None]  # what left the support has no gradient here
        theta = [s.theta[i] for i in both]
        d_lr, d_wd = hypergradient([p.grad for p in theta], [s.velocity[i] for i in both], theta, s.lr)
        bound = HPO_STEP * s.lr
        s.lr.sub_((args.beta_lr * d_lr).clamp(-bound, bound)).clamp_(*LR_RANGE)  # Eq. (3)
        s.wd.sub_((args.beta_wd * d_wd).clamp(-WD_STEP, WD_STEP)).clamp_(*WD_RANGE)  # Eq. (3)

    theta = [s.theta[i] for i in active]
    for i in active:
        if s.velocity[i] is None:
            s.velocity[i] = torch.zeros_like(s.theta[i])
    nn.utils.clip_grad_norm_(theta, args.grad_clip)
    sgd_step(theta, [p.grad for p in theta], [s.velocity[i] for i in active], s.lr, s.wd)
    s.updated = active
    return losses.detach(), logits.detach()


@torch.no_grad()
def average_gradients(params: list[Tensor]) -> None:
    """Under torchrun: every gradient becomes the mean over the processes, in place."""
    if not dist.is_initialized():
        return
    for p in params:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # of a node that a genotype leaves out
    gradient = flat([p.grad for p in params])
    dist.all_reduce(gradient)
    for p, g in zip(params, gradient.div_(dist.get_world_size()).split([p.numel() for p in params])):
        p.grad.copy_(g.view_as(p))


@torch.no_grad()
def evaluate(net: nn.Module, images: Tensor, labels: Tensor, mean: Tensor, std: Tensor, batch: int = 500) -> float:
    """Accuracy in % on uint8 images (N, 3, H, W); leaves the network's mode as it was."""
    training, correct = net.training, torch.zeros((), device=images.device)
    net.eval()
    for x, y in zip(images.split(batch), labels.split(batch)):
        correct += (net(common.normalize(x, mean, std)).argmax(1) == y).sum()
    net.train(training)
    return 100 * float(correct) / len(labels)


# ---------------------------------------------------------------------------------------------------------------
# Run directories, checkpoints, progress
# ---------------------------------------------------------------------------------------------------------------


def write(path: Path, content: str | dict) -> None:
    """Write a text file or a torch file so that it is there whole or not at all."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            if isinstance(content, str):
                file.write(content.encode())
            else:
                torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as e:
        part.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {e}") from e


def save_checkpoint(out: Path, state: dict) -> None:
    """checkpoint.pt, with the one before kept as checkpoint.previous.pt."""
    write(out / "checkpoint.new.pt", state)
    if (out / "checkpoint.pt").exists():
        os.replace(out / "checkpoint.pt", out / "checkpoint.previous.pt")
    os.replace(out / "checkpoint.new.pt", out / "checkpoint.pt")


def load_checkpoint(out: Path) -> dict | None:
    """The newest checkpoint that can be read; None where there is none. Raises InputError where all are damaged."""
    damaged = []
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        try:
            state = torch.load(out / name, map_location="cpu", weights_only=True)
            state["epoch"], state["history"]
            if damaged:
                say(f"warning: {damaged[0]} cannot be read; going on from {out / name}, epoch {state['epoch']}")
            return state
        except FileNotFoundError:
            continue
        except Exception as e:  # a damaged file can make the unpickler raise anything
            damaged.append(f"{out / name} ({type(e).__name__})")
    if damaged:
        raise InputError(f"{' and '.join(damaged)} cannot be read: delete {out} and start the run again")
    return None


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise InputError(f"cannot read {path}: {e}") from e
    if not isinstance(content, dict):
        raise InputError(f"cannot read {path}: it holds no {{...}}")
    return content


def say(text: str) -> None:
    """Print once, whatever the number of processes."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(text, flush=True)


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"


class Progress:
    """A tqdm bar over the steps of an epoch; without tqdm or a terminal, a plain line every 30 seconds."""

    def __init__(self, label: str, steps: int):
        self.label, self.steps, self.bar, self.last = label, steps, None, time.time()
        if dist.is_initialized() and dist.get_rank() > 0:
            self.last = math.inf
        elif sys.stderr.isatty():
            try:
                from tqdm import tqdm

                self.bar = tqdm(total=steps, desc=label, leave=False, dynamic_ncols=True)
            except ImportError:
                pass

    def show(self, step: int, text: str) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(step - self.bar.n)
        elif time.time() - self.last > 30:
            print(f"{self.label}  step {step}/{self.steps}  {text}", flush=True)
            self.last = time.time()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM."""

    def __init__(self, number: int):
        self.code = 128 + number


def on_signal(number: int, frame) -> None:
    raise Stopped(number)


def choose_device(gpu: int | None) -> torch.device:
    """The device for --gpu; under torchrun every process takes its own. Raises InputError if there is no such GPU."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpu is None:
        gpu = 0 if count else -1
        if not dist.is_initialized():
            say(f"running on {'GPU 0, ' + torch.cuda.get_device_name(0) if count else 'the CPU'} (--gpu chooses)")
    if gpu < 0:
        return torch.device("cpu")
    gpu = int(os.environ["LOCAL_RANK"]) if dist.is_initialized() else gpu
    if gpu >= count:
        raise InputError(f"there is no GPU {gpu}, this machine has {count}: use --gpu -1 for the CPU")
    torch.cuda.set_device(gpu)
    torch.backends.cudnn.benchmark = True
    return torch.device("cuda", gpu)


def git_commit() -> str | None:
    run = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(run, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def settings_of(args: argparse.Namespace, explicit: set[str], out: Path) -> argparse.Namespace:
    """The settings of the run in `out`: its own where --resume continues it, else `args`. Writes nothing.

    Raises InputError where `out` holds anything else, or a flag given now is not the run's.
    """
    free = {"resume", "out", "gpu", "workers", "data_dir", "repeats", "evaluate"}  # may change from start to resume
    config = out / "config.json"
    if config.exists() and args.resume:
        about = read_json(config)
        saved, script = about.get("args", {}), about.get("script")
        if script != Path(__file__).name:
            raise InputError(f"{out} is a run of {script}: resume it with that, or choose a new --out")
        if saved.keys() != vars(args).keys():
            raise InputError(f"{config} is not of this version of {Path(__file__).name}: choose a new --out")
        for name in sorted(explicit - free):
            if getattr(args, name) != saved[name]:
                flag = "--" + name.replace("_", "-")
                how = f"without {flag}" if saved[name] in (None, False) else f"with {flag} {saved[name]}"
                raise InputError(f"{out} was started {how}: leave {flag} out, or choose a new --out")
        if about.get("processes") != processes():
            raise InputError(f"{out} was started with {about.get('processes')} processes: resume it with as many")
        return argparse.Namespace(**(saved | {name: getattr(args, name) for name in explicit & free}))
    holds_files = lambda: any(path.suffix != ".part" for path in out.iterdir())  # .part: killed while writing
    if out.exists() and (not out.is_dir() or holds_files()):
        advice = "choose another --out" if args.resume else "continue it with --resume, or choose another --out"
        raise InputError(f"{out} exists already{' but holds no run' if args.resume else ''}: {advice}")
    if args.resume:
        say(f"nothing to resume in {out}: starting from the beginning")
    return args


def create_run(args: argparse.Namespace, out: Path) -> None:
    """Make the run directory and its config.json."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"cannot make the run directory {out}: {e}") from e
    versions = {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__}
    about = {"script": Path(__file__).name, "command": shlex.join(sys.argv), "args": vars(args), "versions": versions}
    about |= {"git_commit": git_commit(), "machine": platform.platform(), "processes": processes()}
    write(out / "config.json", json.dumps(about, indent=1) + "\n")


# ---------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------


def within_limits(args: argparse.Namespace, data: Data, genotype: Genotype) -> bool:
    """The constraints of Eq. (1) on the network that a support stands for."""
    if not args.max_params and not args.max_flops:
        return True
    with torch.device("meta"):
        net = SparseSupernet(args.channels, len(data.classes), args.layers, genotype=genotype)
    if args.max_params and common.count_parameters(net) > args.max_params:
        return False
    return not args.max_flops or common.count_flops(net, data.train_images.shape[-1]) <= args.max_flops


def check_data(args: argparse.Namespace, data: Data) -> None:
    H, W = data.train_images.shape[-2:]
    if len(data.classes) < 2 or len(data.train_images) < 2:
        raise InputError("training needs at least 2 classes and 2 images")
    if H != W:
        raise InputError(f"images are {W}x{H}: give --image-size to make them square")
    if H < 29 and args.auxiliary_weight:
        raise InputError(f"images of {H} pixels are too small for the auxiliary head: give --auxiliary-weight 0")


def warn_of_days(seconds: float, steps: int) -> None:
    """Say what is ahead of somebody who trains on a CPU: `steps` steps of `seconds` each."""
    if seconds * steps > 3600:
        say(
            f"warning: a step takes {seconds:.1f} s, and {steps:,} of them {duration(seconds * steps)} on this CPU. "
            "--preset quick takes minutes; the paper's settings want a GPU (--gpu 0)."
        )


def seed_epoch(seed: int, epoch: int, rank: int) -> torch.Generator:
    """Seed everything random of one epoch, so that a resumed run needs no generator's state; returns the one that
    orders the images, which is the same in every process."""
    torch.manual_seed((seed * 100_003 + epoch) * 1_009 + rank)
    return torch.Generator().manual_seed(seed * 100_003 + epoch)


def cosine(start: float, end: float, share: float) -> float:
    """From start to end along half a cosine, as share goes from 0 to 1."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def run(args: argparse.Namespace, out: Path, device: torch.device) -> dict:
    """Search and train one network into the run directory `out`; returns what result.json holds."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if (out / "result.json").exists():
        say(f"{out} is finished already")
        return read_json(out / "result.json")
    data = load_data(args, device)
    check_data(args, data)
    N, B = len(data.train_images), min(args.batch_size, len(data.train_images))
    if B % world:
        raise InputError(f"--batch-size {B} must be a multiple of the {world} processes")
    steps = N // B
    if args.preset == "paper" and device.type == "cpu" and world == 1:
        say(f"measuring a step of {B} images on this CPU ...")
        trial, start = Search(args, data, device), time.time()
        train_step(trial, data.train_images[:B], data.train_labels[:B], args)
        warn_of_days(time.time() - start, steps * (args.search_epochs * trial.searching + args.train_epochs))
        del trial

    torch.manual_seed(args.seed)
    s = Search(args, data, device)
    fits = lambda genotype: within_limits(args, data, genotype)
    if s.searching:
        s.net.recover(args.lasso)
        for _ in range(30):
            if fits(s.net.genotype()):
                break
            nn.init.normal_(s.net.b, std=args.b_scale)  # nothing to fall back on yet: draw another start
            s.net.recover(args.lasso)
        else:
            raise InputError("30 random architectures all broke --max-params or --max-flops: raise them")
    epoch, search_end, history, seconds, search_seconds = 0, None if s.searching else 0, [], 0.0, 0.0
    trace = torch.zeros(0, 2)  # lr and wd after every step
    if state := load_checkpoint(out):
        s.load_state_dict(state["search"])
        epoch, search_end = state["epoch"], state["search_end"]
        seconds, search_seconds = state["seconds"], state["search_seconds"]
        history, trace = state["history"], state["trace"]
        say(f"going on with {out} after epoch {epoch}")
    if rank == 0:
        if not (out / "config.json").exists():
            create_run(args, out)
        write(out / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in history))

    while search_end is None or epoch < search_end + args.train_epochs:
        start = time.time()
        searching = search_end is None
        last = (args.search_epochs if searching else search_end) + args.train_epochs
        trained = 0 if searching else (epoch - search_end) / args.train_epochs  # share of the training phase, 0 to 1
        s.net.drop_path_prob = args.drop_path * trained
        if args.no_hpo:  # ISTA-NAS' schedule: constant while searching, then cosine to lr / 25
            s.lr.fill_(cosine(args.lr, args.lr / 25, trained))
        order = torch.randperm(N, generator=seed_epoch(args.seed, epoch, rank)).to(device)
        sums, rates = torch.zeros(2, device=device), torch.zeros(steps, 2, device=device)
        broken = torch.full((), -1, device=device)  # the first step whose loss was not finite
        progress = Progress(f"epoch {epoch + 1}/{last} {'search' if searching else 'train'}", steps)
        s.net.train()
        try:
            for step in range(steps):
                batch = order[step * B : (step + 1) * B][rank::world]
                labels = data.train_labels[batch]
                losses, logits = train_step(s, data.train_images[batch], labels, args)
                sums += torch.stack([losses.mean(), 100 * (logits.argmax(1) == labels).float().mean()])
                broken = torch.where((broken < 0) & ~losses.mean().isfinite(), step, broken)
                rates[step, 0], rates[step, 1] = s.lr, s.wd
                if step % 20 == 19:
                    loss, accuracy = (sums / (step + 1)).tolist()
                    left = (time.time() - start) / (step + 1) * ((last - epoch) * steps - step - 1)
                    lr, wd = rates[step].tolist()
                    text = f"loss {loss:.3f} acc {accuracy:.1f}% lr {lr:.4f} wd {wd:.1e} left {duration(left)}"
                    progress.show(step + 1, text)
        finally:
            progress.close()
        if world > 1:
            dist.all_reduce(sums.div_(world))
            dist.all_reduce(broken, dist.ReduceOp.MAX)
        loss, accuracy = (sums / steps).tolist()
        learned = flat([s.theta[i] for i in s.updated] + [s.lr, s.wd, s.tau] + ([s.net.b] if s.searching else []))
        if int(broken) >= 0 or not bool(learned.isfinite().all()):
            step = int(broken) + 1 or steps
            flag = f"--lr (now {args.lr:g})" if args.no_hpo else f"--lr ({args.lr:g}) or --beta-lr ({args.beta_lr:g})"
            kept = f"; the checkpoint of epoch {epoch} is kept" if epoch else ""
            raise FloatingPointError(
                f"the loss is not finite at epoch {epoch + 1}, step {step}: start again with a lower {flag}{kept}"
            )

        note, test = {}, 0.0
        if rank == 0:  # before the support changes: of the operations that were trained
            test = evaluate(s.net, data.test_images, data.test_labels, s.mean, s.std)
        if searching:
            stay = [False] * (2 * NODES)
            if epoch + 1 == args.search_epochs:  # fixed as trained: no last recovery that nothing would train [A]
                stay = [True] * (2 * NODES)
            else:
                moved, accepted = s.net.recover(args.lasso, fits)
                stay = [accepted and float(m) <= args.freeze_distance for m in moved]
                note = {"moved": [round(float(m), 6) for m in moved], "accepted": accepted}
            for k in range(2 * NODES):
                if stay[k] and not s.net.frozen[k]:
                    s.net.freeze(k)
            if not s.searching:
                search_end = epoch + 1
        if isinstance(s.net, SparseSupernet):
            note |= {"support": s.net.get_extra_state()["edges"], "frozen": list(s.net.frozen)}
        genotype = s.net.genotype() if isinstance(s.net, SparseSupernet) else common.parse_genotype(args.genotype)
        epoch += 1
        trace = torch.cat([trace, rates.cpu()])
        if rank == 0:
            record = {
                "epoch": epoch,
                "phase": "search" if searching else "train",
                "loss": loss,
                "train_accuracy": accuracy,
                "test_accuracy": test,
                "lr": float(s.lr),
                "wd": float(s.wd),
                "entropy": None if args.no_da else entropy(s.tau),
                "skip_connects": sum(op == "skip_connect" for op, _ in genotype.normal),
            } | note
            history.append(record)
            seconds += time.time() - start
            search_seconds += (time.time() - start) * searching
            checkpoint = {"search": s.state_dict(), "epoch": epoch, "search_end": search_end, "history": history}
            checkpoint |= {"trace": trace, "seconds": seconds, "search_seconds": search_seconds}
            save_checkpoint(out, checkpoint)
            write(out / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in history))
            report(record, last if searching else search_end + args.train_epochs, time.time() - start)
    return finish(args, s, data, out, history, trace, (seconds, search_seconds)) if rank == 0 else {}


def report(record: dict, last: int, seconds: float) -> None:
    """One line an epoch."""
    frozen = f"  frozen {sum(record['frozen'])}/8" if record["phase"] == "search" else ""
    policy = f"  entropy {record['entropy']:.3f}" if record["entropy"] is not None else ""
    say(
        f"epoch {record['epoch']:3d}/{last} {record['phase']:6s}  loss {record['loss']:.3f}"
        f"  train {record['train_accuracy']:5.1f} %  test {record['test_accuracy']:5.1f} %"
        f"  lr {record['lr']:.5f}  wd {record['wd']:.2e}{policy}{frozen}"
        f"  skips {record['skip_connects']}/8  {duration(seconds)}"
    )
    if record["phase"] == "search" and record["skip_connects"] > 4:
        say(f"warning: {record['skip_connects']} of the normal cell's 8 operations are skip-connections")
    if record.get("accepted") is False:
        say("the recovered support breaks --max-params or --max-flops: the last one stays")


def finish(
    args: argparse.Namespace,
    s: Search,
    data: Data,
    out: Path,
    history: list[dict],
    trace: Tensor,
    seconds: tuple[float, float],
) -> dict:
    """Prune; write genotype.json, policy.json, model.pt, result.json and figures. seconds: all, and of the search."""
    if isinstance(s.net, SparseSupernet):
        net, genotype, kind = s.net.prune(), s.net.genotype(), "sparse"
    else:
        genotype, kind = common.parse_genotype(args.genotype), "network"
        net = Network(genotype, len(data.classes), args.channels, args.layers).to(s.lr.device)
        net.load_state_dict(s.net.state_dict(), strict=False)  # without the auxiliary head
        net.eval()
    size = data.train_images.shape[-1]
    common.save_genotype(genotype, out / "genotype.json")
    p = s.tau.detach().cpu().double().flatten().softmax(0).view(s.tau.shape)
    if not args.no_da:
        names = list(AUGMENTATIONS)
        pairs = p.flatten().topk(10)
        top = [[names[i // 14], names[i % 14], round(v, 5)] for v, i in zip(*(x.tolist() for x in pairs))]
        policy = {"method": "dha", "operations": names, "magnitude": "uniform", "top": top, "probability": p.tolist()}
        write(out / "policy.json", json.dumps(policy, indent=1) + "\n")
    model = {
        "kind": kind,
        "genotype": json.loads((out / "genotype.json").read_text()),
        "channels": args.channels,
        "layers": args.layers,
        "classes": data.classes,
        "image_size": size,
        "mean": s.mean.cpu(),
        "std": s.std.cpu(),
        "state_dict": {name: v.cpu() if isinstance(v, Tensor) else v for name, v in net.state_dict().items()},
    }
    write(out / "model.pt", model)
    search = [r for r in history if r["phase"] == "search"]
    result = {
        "test_accuracy": evaluate(net, data.test_images, data.test_labels, s.mean, s.std),
        "train_loss": history[-1]["loss"],
        "params": common.count_parameters(net),
        "flops": common.count_flops(net, size),
        "genotype": str(genotype),
        "dataset": args.dataset,
        "seed": args.seed,
        "epochs": len(history),
        "search_epochs": len(search),
        "seconds": round(seconds[0], 1),
        "search_seconds": round(seconds[1], 1),
    }
    try:
        draw(out, history, trace, None if args.no_da else p, genotype)
    except Exception as e:  # whatever matplotlib raises: a trained network is not lost for a picture
        say(f"warning: not all figures could be drawn: {type(e).__name__}: {e}")
    write(out / "result.json", json.dumps(result, indent=1) + "\n")
    return result


def load_data(args: argparse.Namespace, device: torch.device) -> Data:
    """The data set of the flags, on the device; under torchrun one process downloads while the others wait."""
    settings = (args.dataset, args.data_dir, args.image_size, args.limit_train, args.limit_test, args.workers)
    if dist.is_initialized() and dist.get_rank() > 0:
        dist.barrier()
    data = common.load_data(*settings)
    if dist.is_initialized() and dist.get_rank() == 0:
        dist.barrier()
    return data.to(device)


def load_model(path: str | Path, device: torch.device | str = "cpu") -> tuple[nn.Module, dict]:
    """The network of a run's model.pt, in eval mode, and what else the file holds (classes, mean, std, image_size).

    The network takes images normalised with that mean and std: common.normalize(images, info["mean"], info["std"]).
    """
    try:
        info = torch.load(path, map_location=device, weights_only=True)
        genotype = common.parse_genotype(json.dumps(info["genotype"]))
        size = {"channels": info["channels"], "num_classes": len(info["classes"]), "layers": info["layers"]}
        build = Network if info["kind"] == "network" else SparseSupernet
        net = build(genotype=genotype, **size)
        net.load_state_dict(info.pop("state_dict"))
    except FileNotFoundError:
        raise InputError(f"there is no {path}: only a finished run has one") from None
    except Exception as e:  # a damaged file can make the unpickler raise anything
        raise InputError(f"cannot read the model {path}: {type(e).__name__}: {e}".split("\n")[0]) from e
    return net.to(device).eval(), info


def evaluate_run(args: argparse.Namespace, explicit: set[str], device: torch.device, load: Callable) -> None:
    """--evaluate: the test accuracy of a finished run, on its own data set or another with the same classes."""
    run_dir = Path(args.evaluate)
    if not run_dir.is_dir():
        raise InputError(f"there is no run directory {run_dir}")
    net, info = load(run_dir / "model.pt", device)
    saved = read_json(run_dir / "config.json")["args"]
    for name in {"dataset", "data_dir", "image_size", "limit_train", "limit_test"} - explicit:
        setattr(args, name, saved[name])
    args.image_size = args.image_size or info["image_size"]
    data = load_data(args, device)
    if data.classes != info["classes"]:
        raise InputError(f"{args.dataset} has other classes than the model: {data.classes[:3]}, {info['classes'][:3]}")
    accuracy = evaluate(net, data.test_images, data.test_labels, info["mean"], info["std"])
    say(f"test accuracy: {accuracy:.2f} % of {len(data.test_images)} images")


# ---------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------


def draw(out: Path, history: list[dict], trace: Tensor, p: Tensor | None, genotype: Genotype) -> None:
    """Write the figures of a run: cells, curves, hyper-parameters, policy and support."""
    try:
        import matplotlib
    except ImportError:
        say("no figures: matplotlib is missing (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 150})
    epochs = [r["epoch"] for r in history]
    search_end = sum(r["phase"] == "search" for r in history)
    blue, orange = "#0072B2", "#D55E00"

    def save(figure, name: str) -> None:
        figure.savefig(out / name, bbox_inches="tight")
        plt.close(figure)

    def mark_search_end(axis, at: float, label: bool = True) -> None:
        if 0 < search_end < len(history):
            axis.axvline(at, color="0.5", linestyle="--", linewidth=1, label="architecture fixed" if label else None)

    figure, axes = plt.subplots(2, 1, figsize=(10, 6.4))
    common.draw_cell(genotype.normal, genotype.normal_concat, axes[0], "Normal cell")
    common.draw_cell(genotype.reduce, genotype.reduce_concat, axes[1], "Reduction cell")
    save(figure, "cells.png")

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    axes[0].plot(epochs, [r["loss"] for r in history], color=blue, label="training")
    axes[0].set(xlabel="epoch", ylabel="loss (cross-entropy, nats)", title="Training loss")
    axes[1].plot(epochs, [r["train_accuracy"] for r in history], color=blue, label="training (augmented)")
    axes[1].plot(epochs, [r["test_accuracy"] for r in history], color=orange, linestyle="-.", label="test")
    axes[1].set(xlabel="epoch", ylabel="accuracy (%)", title="Accuracy")
    for axis in axes:
        mark_search_end(axis, search_end)
        axis.legend(frameon=False)
    save(figure, "curves.png")

    steps = torch.arange(1, len(trace) + 1)
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for axis, values, name in zip(axes, trace.T, ("learning rate", "weight decay")):
        axis.plot(steps, values, color=blue, linewidth=1)
        axis.set(xlabel="step", ylabel=name, title=name.capitalize(), ylim=(0, 1.1 * float(values.max()) or 1))
        mark_search_end(axis, search_end * len(trace) / len(history))
    axes[0].legend(frameon=False) if axes[0].get_legend_handles_labels()[0] else None
    save(figure, "hyperparameters.png")

    if p is not None:
        names = list(AUGMENTATIONS)
        figure, axes = plt.subplots(1, 2, figsize=(13, 5.4), width_ratios=[1.3, 1], layout="constrained")
        picture = axes[0].imshow(100 * p, cmap="cividis")
        axes[0].set_xticks(range(14), names, rotation=90)
        axes[0].set_yticks(range(14), names)
        axes[0].set(xlabel="second operation", ylabel="first operation", title="Policy at the end")
        figure.colorbar(picture, ax=axes[0], label="probability of the pair (%; uniform: 0.51)")
        axes[1].plot(epochs, [r["entropy"] for r in history], color=blue, label="policy")
        axes[1].axhline(math.log(196), color="0.5", linestyle=":", label="uniform, log 196")
        mark_search_end(axes[1], search_end)
        axes[1].set(xlabel="epoch", ylabel="entropy (nats)", title="Entropy of the policy")
        axes[1].legend(frameon=False, loc="lower left")
        save(figure, "policy.png")

    if search_end:
        figure, axis = plt.subplots(figsize=(min(4 + 0.5 * search_end, 16), 7.5))
        shown = history[:search_end]
        for k in range(2 * NODES):
            for row in range(2):  # one strip an operation, labelled with the state that it reads
                y = -(3 * k + row)
                for r in shown:
                    name, state = r["support"][k][row]
                    face = common.OPERATION_COLORS[PRIMITIVES.index(name)]
                    axis.add_patch(plt.Rectangle((r["epoch"] - 0.5, y - 0.45), 1, 0.9, color=face, linewidth=0))
                    if search_end <= 30:
                        ink = "white" if face in ("#0072B2", "#D55E00", "#009E73") else "black"
                        axis.text(r["epoch"], y, str(state), ha="center", va="center", fontsize=8, color=ink)
            frozen = next((r["epoch"] for r in shown if r["frozen"][k]), None)
            if frozen:
                axis.plot([frozen + 0.5] * 2, [-3 * k + 0.5, -3 * k - 1.5], color="black", linewidth=3)
        cells = [f"{cell} {j}" for cell in ("normal", "reduce") for j in range(NODES)]
        axis.set_yticks([-3 * k - 0.5 for k in range(2 * NODES)], cells)
        axis.set(xlim=(0.4, search_end + 0.7), ylim=(-3 * 2 * NODES + 0.5, 1), xlabel="epoch", ylabel="node")
        axis.set_title("Support of every node; number: the state it reads; bar: frozen")
        axis.xaxis.get_major_locator().set_params(integer=True)
        patches = [Patch(color=c, label=n) for n, c in list(zip(PRIMITIVES, common.OPERATION_COLORS))[1:]]
        axis.legend(handles=patches, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        save(figure, "support.png")


# ---------------------------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args, explicit = parse_args(argv)
    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    search_flags = "search_epochs arch_lr b_scale lasso freeze_distance"
    out = None
    try:
        note_unused(args, explicit, {"no_da": "tau_lr", "no_hpo": "beta_lr beta_wd", "genotype": search_flags})
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, timeout=timedelta(hours=2))  # long enough for a download
        if args.evaluate:
            evaluate_run(args, explicit, choose_device(args.gpu), load_model)
            return 0
        if args.genotype:  # the genotype itself, so that a run does not depend on the file
            args.genotype = str(common.load_genotype(args.genotype))
        results = []
        for seed in range(args.seed, args.seed + args.repeats):
            out = Path(args.out or f"runs/dha-{args.dataset}-seed{seed}")
            out = out / f"seed{seed}" if args.out and args.repeats > 1 else out
            mine = settings_of(argparse.Namespace(**vars(args) | {"seed": seed}), explicit, out)
            if dist.is_initialized():
                dist.barrier()  # all have looked before one writes
            device = choose_device(mine.gpu)
            if mine.amp and device.type == "cpu":
                raise InputError("--amp needs a GPU")
            results.append(run(mine, out, device))
            if dist.is_initialized():
                dist.barrier()
            if results[-1]:
                summarize(results[-1], out)
        if args.repeats > 1 and all(results):
            accuracies = [r["test_accuracy"] for r in results]
            say(f"{len(results)} seeds: test accuracy {mean(accuracies):.2f} ± {stdev(accuracies):.2f} %")
        return 0
    except (InputError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except FloatingPointError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except Stopped as e:
        if not dist.is_initialized() or dist.get_rank() == 0:
            start = ["torchrun", "--nproc-per-node", str(processes())] if processes() > 1 else ["python"]
            again = shlex.join([*start, sys.argv[0], *argv, *([] if args.resume else ["--resume"])])
            print(f"\nstopped{f'; go on with: {again}' if out and out.exists() else ''}", file=sys.stderr)
        return e.code
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def summarize(result: dict, out: Path) -> None:
    """The last words of a run."""
    lines = {"genotype": result["genotype"], "parameters": f"{result['params']:,}"}
    lines |= {"FLOPs": f"{result['flops']:,} multiply-adds an image"}
    lines |= {"time": f"{duration(result['seconds'])}, search {duration(result['search_seconds'])}", "files": f"{out}/"}
    if "test_accuracy" in result:
        lines = {"test accuracy": f"{result['test_accuracy']:.2f} %"} | lines
        lines |= {"evaluate with": f"python {sys.argv[0]} --evaluate {shlex.quote(str(out))}"}
    say("\n" + "\n".join(f"{name:14s} {value}" for name, value in lines.items()))


if __name__ == "__main__":
    sys.exit(main())
