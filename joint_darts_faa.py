# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "torchvision", "numpy", "pillow", "matplotlib", "tqdm", "scipy"]
# ///
"""Joint search of an augmentation policy and an architecture: DARTS + Faster AutoAugment, one differentiable search.

Paper: Kashima, Yamada, Saito, "Joint Search of Data Augmentation Policies and Network Architectures" (arXiv
2012.09407). Equation numbers below are that paper's. The parts are DARTS (Liu et al., ICLR 2019, first order) and
Faster AutoAugment (Hataya et al., ECCV 2020, without its critic).

    python joint_darts_faa.py --dataset shapes --preset quick      # minutes on a laptop, nothing to download
    python joint_darts_faa.py --dataset cifar10 --gpu 0            # 50 epochs of search, 600 of training
    python joint_darts_faa.py --policy none ...                    # plain DARTS, the first row of the paper's table
    python joint_darts_faa.py --policy policy.json ...             # its baseline: a policy that was found before
    python joint_darts_faa.py --genotype DARTS_V2 --policy none .. # train a known architecture
    python joint_darts_faa.py --search-only ...                    # stop with genotype.json and policy.json
    torchrun --nproc-per-node 4 joint_darts_faa.py ...             # one process a GPU, batch sizes are the sums
    python joint_darts_faa.py --resume --out runs/joint_darts_faa-cifar10-seed0
    python joint_darts_faa.py --evaluate runs/joint_darts_faa-cifar10-seed0

One step of the search (function `search_step`, the paper's Alg. 1), with w the weights, alpha the architecture and
z, p, mu the policy:
    1. a batch of D_val goes through the policy (Eq. 2) and the supernet (Eq. 5); one backward pass gives the gradients
       of alpha, z, p and mu, and none of w; all four take an Adam step (Eq. 9)
    2. a batch of D_train goes the same way; w takes an SGD step (Eq. 10)
Then the strongest operations become a network that is trained from scratch with the policy found.

To read: `search_step`, then what it calls, `Policy.soft` and `DartsCell.forward`; `search` and `train` are the loops.
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

JOINT_QUICK = {  # --preset quick; everything else stays as in the paper
    "dataset": "shapes",
    "search_epochs": 4,
    "search_images": 1600,
    "search_channels": 4,
    "search_layers": 3,
    "arch_lr": 3e-3,
    "policy_lr": 1e-2,
    "train_epochs": 5,
    "batch_size": 64,
    "channels": 8,
    "layers": 3,
    "lr": 0.1,
    "auxiliary_weight": 0.0,
    "drop_path": 0.0,
    "cutout": 0,
}


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
    g.add_argument("--search-only", action="store_true", help="stop after the search: genotype.json and policy.json")
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
    g = parser.add_argument_group("search")
    g.add_argument("--search-epochs", type=number(int, 1), default=50, help="epochs of search (the paper: 50 and 25)")
    g.add_argument("--search-batch-size", type=number(int, 2), default=64, help="images a batch in the search")
    g.add_argument(
        "--search-images", type=number(int, 4), help="use only so many of the training images (default: all)"
    )
    g.add_argument("--search-channels", type=number(int, 2), default=16, help="channels of the supernet (even)")
    g.add_argument("--search-layers", type=number(int, 3), default=8, help="cells of the supernet")
    g.add_argument(
        "--genotype", metavar="NAME|FILE", help=f"no architecture search, this: {', '.join(common.GENOTYPES)} or a file"
    )
    g.add_argument("--arch-lr", type=number(float, 0), default=3e-4, help="Adam's learning rate for alpha")
    g.add_argument("--policy", metavar="FILE|none", help="no policy search: train with this policy.json, or with none")
    g.add_argument("--policy-lr", type=number(float, 0), default=1e-3, help="Adam's learning rate for z, p and mu")
    g.add_argument("--sub-policies", type=number(int, 1), default=10, help="L, sub-policies of a policy")
    g.add_argument("--stages", type=number(int, 1), default=2, help="K, operations one after the other in a sub-policy")
    g = parser.add_argument_group("training from scratch (lr, weight decay and clipping: of the search's w too)")
    g.add_argument("--train-epochs", type=number(int, 1), default=600, help="epochs of training")
    g.add_argument("--batch-size", type=number(int, 2), default=96, help="images a step, over all GPUs")
    g.add_argument("--channels", type=number(int, 2), default=36, help="channels of the first cells (even)")
    g.add_argument("--layers", type=number(int, 3), default=20, help="cells; reductions at 1/3 and 2/3")
    g.add_argument("--lr", type=number(float, 0), default=0.025, help="learning rate at the start")
    g.add_argument("--weight-decay", type=number(float, 0), default=3e-4, help="weight decay at the start")
    g.add_argument("--grad-clip", type=number(float, 1e-6), default=5.0, help="largest norm of the weights' gradient")
    g.add_argument("--auxiliary-weight", type=number(float, 0), default=0.4, help="loss weight of the auxiliary head")
    g.add_argument("--drop-path", type=number(float, 0, 0.99), default=0.2, help="drop-path at the end of training")
    g.add_argument("--cutout", type=number(int, 0), default=16, help="side of the cutout square in pixels")

    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    if first.parse_known_args(argv)[0].preset == "quick":
        parser.set_defaults(**JOINT_QUICK)
    args = parser.parse_args(argv)
    words = {word.split("=")[0] for word in argv}
    explicit = {action.dest for action in parser._actions if words & set(action.option_strings)}
    if args.channels % 2 or args.search_channels % 2:
        parser.error("--channels and --search-channels must be even: a factorized reduction splits them in two")
    if args.search_only and args.genotype and args.policy:
        parser.error("--search-only with --genotype and --policy leaves nothing to do")
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


def horizontal_flip(images: Tensor, magnitude: Tensor) -> Tensor:
    """Mirror left and right."""
    return images.flip(3)


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


def invert(images: Tensor, magnitude: Tensor) -> Tensor:
    """The negative."""
    return 1 - images


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


def sample_pairing(images: Tensor, magnitude: Tensor) -> Tensor:
    """Mix in up to 0.4 of another image: the batch's next one, so that the result depends on the arguments alone."""
    weight = 0.4 * per_image(magnitude)
    return (1 - weight) * images + weight * images.roll(-1, 0)


AUGMENTATIONS = {
    "ShearX": shear_x,
    "ShearY": shear_y,
    "TranslateX": translate_x,
    "TranslateY": translate_y,
    "Rotate": rotate,
    "HorizontalFlip": horizontal_flip,
    "Invert": invert,
    "Solarize": solarize,
    "Posterize": posterize,
    "Contrast": contrast,
    "Color": color,
    "Brightness": brightness,
    "Sharpness": sharpness,
    "AutoContrast": auto_contrast,
    "Equalize": equalize,
    "SamplePairing": sample_pairing,
}
WITHOUT_MAGNITUDE = {"HorizontalFlip", "Invert", "AutoContrast", "Equalize"}  # theirs is never used
SIGNED = {"Rotate", "Color", "Contrast", "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY"}


# ---------------------------------------------------------------------------------------------------------------
# Policy: L sub-policies of K stages, each a choice among the 16 operations (Eq. 1 to 3)
# ---------------------------------------------------------------------------------------------------------------


def relaxed_bernoulli(p: Tensor, temperature: float = 0.1) -> Tensor:
    """A differentiable coin for every entry of p, probabilities in [0, 1]: near 1 with probability p, else near 0.

    The Gumbel trick for two outcomes (Maddison et al.; Jang et al.). At p = 0 and 1 it is 0 and 1, gradient 0.
    """
    edge = 1e-6
    noise = torch.rand_like(p).clamp(edge, 1 - edge).logit()
    return ((p.clamp(edge, 1 - edge).logit() + noise) / temperature).sigmoid()


class Mixture(torch.autograd.Function):
    """mix_augmentations without the operations' outputs in memory: the backward pass runs each operation again.

    Autograd would keep 41 MB of a stage at 128 images of 32 x 32 until then, this keeps 1.5 MB.
    """

    @staticmethod
    def forward(ctx, images: Tensor, share: Tensor, magnitude: Tensor) -> Tensor:
        ctx.save_for_backward(images, share, magnitude)
        out = per_image(1 - share.sum(1)) * images
        for n, augment in enumerate(AUGMENTATIONS.values()):
            out.addcmul_(per_image(share[:, n]), augment(images, magnitude[:, n]))
        return out.clamp_(0, 1)  # only rounding leaves [0, 1]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        images, share, magnitude = ctx.saved_tensors
        through_images = ctx.needs_input_grad[0]
        d_images = per_image(1 - share.sum(1)) * d_out if through_images else None
        d_share, d_magnitude = torch.empty_like(share), torch.zeros_like(magnitude)
        unchanged = (d_out * images).sum((1, 2, 3))
        for n, augment in enumerate(AUGMENTATIONS.values()):
            x, m = images.detach().requires_grad_(through_images), magnitude[:, n].detach().requires_grad_(True)
            with torch.enable_grad():
                out = augment(x, m)
            d_share[:, n] = (d_out * out.detach()).sum((1, 2, 3)) - unchanged
            if out.requires_grad:
                inputs = [m, x] if through_images else [m]
                d_m, *d_x = torch.autograd.grad(out, inputs, per_image(share[:, n]) * d_out, allow_unused=True)
                if d_m is not None:
                    d_magnitude[:, n] = d_m
                if through_images:
                    d_images += d_x[0]
        return d_images, d_share, d_magnitude


def mix_augmentations(images: Tensor, share: Tensor, magnitude: Tensor) -> Tensor:
    """sum_n share_n O_n(images; magnitude_n) + (1 - sum_n share_n) images: Eq. (2) with Eq. (1) put in.

    images (B, 3, H, W) in [0, 1]; share (B, 16), at least 0 and at most 1 in sum; magnitude (B, 16).
    """
    return Mixture.apply(images, share, magnitude)


def apply_choice(images: Tensor, choice: Tensor, magnitude: Tensor) -> Tensor:
    """Each image through its own operation: choice (B,), an index into AUGMENTATIONS or -1 for none; magnitude (B,)."""
    out = images.clone()
    for n, augment in enumerate(AUGMENTATIONS.values()):
        if images.is_cuda or augment is sample_pairing:  # pairing needs the others; picking waits for the GPU
            out = torch.where(per_image(choice == n), augment(images, magnitude), out)
        else:
            chosen = (choice == n).nonzero().flatten()
            if len(chosen):
                out[chosen] = augment(images[chosen], magnitude[chosen])
    return out


class Policy(nn.Module):
    """An augmentation policy (Faster AutoAugment): images float (B, 3, H, W) in [0, 1] to the same.

    z, p, mu: (L, K, 16) each, so 3 * 16 * K * L parameters: for every sub-policy, stage and operation the logit of its
    selection (eta is the temperature), the probability that it is applied, and its magnitude in [0, 1]. Every image
    draws one sub-policy. While `searching`, stages are Eq. (1) to (3), differentiable in z, p, mu and the images;
    otherwise operations are drawn: `Policy.load("policy.json")(images)` belongs in anybody's training loop.
    """

    def __init__(self, sub_policies: int = 10, stages: int = 2, eta: float = 0.05):
        super().__init__()
        self.z, self.p, self.mu = (nn.Parameter(torch.rand(sub_policies, stages, len(AUGMENTATIONS))) for _ in range(3))
        self.register_buffer("signed", torch.tensor([name in SIGNED for name in AUGMENTATIONS]), persistent=False)
        self.eta = eta
        self.searching = True

    def forward(self, images: Tensor) -> Tensor:
        B, (L, K, _) = len(images), self.z.shape
        which = torch.randint(L, (B,), device=images.device)
        sign = 1 - 2 * torch.randint(2, (K, B, 1), device=images.device)
        for k in range(K):
            magnitude = torch.where(self.signed, sign[k], 1) * self.mu[which, k]  # (B, 16)
            images = (self.soft if self.searching else self.sampled)(images, which, k, magnitude)
        return images

    def soft(self, images: Tensor, which: Tensor, k: int, magnitude: Tensor) -> Tensor:
        """Stage k as a weighted sum over all operations, of sub-policies `which` (B,)."""
        weight = (self.z[which, k] / self.eta).softmax(1)  # Eq. (3), (B, 16)
        mask = relaxed_bernoulli(self.p[which, k])  # Eq. (1), (B, 16)
        return mix_augmentations(images, weight * mask, magnitude)  # Eq. (2)

    @torch.no_grad()
    def sampled(self, images: Tensor, which: Tensor, k: int, magnitude: Tensor) -> Tensor:
        """Stage k as one operation an image, drawn from Cat(softmax(z / eta)), applied with probability p."""
        logits = self.z[which, k] / self.eta
        choice = (logits - torch.empty_like(logits).exponential_().log()).argmax(1, keepdim=True)  # Gumbel-max
        apply = torch.rand(len(images), 1, device=images.device) < self.p[which, k].gather(1, choice)
        return apply_choice(images, torch.where(apply, choice, -1).squeeze(1), magnitude.gather(1, choice).squeeze(1))

    def selection(self) -> Tensor:
        """softmax(z / eta), the probability of selection: (L, K, 16)."""
        return (self.z.detach() / self.eta).softmax(2)

    def save(self, path: str | Path) -> None:
        """Write JSON: for every sub-policy and stage {operation: weight, probability, magnitude, logit}.

        weight is the probability of selection, for readers; logit is z, what `load` reads.
        """
        names, weight = list(AUGMENTATIONS), self.selection()
        sub_policies, summary = [], []
        for l in range(len(self.z)):
            stages, words = [], []
            for k in range(self.z.shape[1]):
                parts = (x.detach()[l, k].tolist() for x in (weight, self.p, self.mu, self.z))
                keys = ("weight", "probability", "magnitude", "logit")
                stage = {name: dict(zip(keys, values)) for name, values in zip(names, zip(*parts))}
                best = max(names, key=lambda name: stage[name]["weight"])
                stages.append(stage)
                magnitude = "" if best in WITHOUT_MAGNITUDE else ", magnitude {magnitude:.2f}"
                said = "{} {weight:.0%} (probability {probability:.2f}" + magnitude + ")"
                words.append(said.format(best, **stage[best]))
            sub_policies.append(stages)
            summary.append(", then ".join(words))
        content = {"method": "faster-autoaugment", "eta": self.eta, "summary": summary, "sub_policies": sub_policies}
        write(Path(path), json.dumps(content, indent=1) + "\n")

    @staticmethod
    def load(path: str | Path) -> Policy:
        """A policy from `save`'s file, ready to draw operations. Raises InputError where the file holds none."""
        try:
            content = json.loads(Path(path).read_text())
            stages = content["sub_policies"]
            values = [
                [[[float(stage[name][key]) for name in AUGMENTATIONS] for stage in sub] for sub in stages]
                for key in ("logit", "probability", "magnitude")
            ]
            policy = Policy(len(stages), len(stages[0]), float(content["eta"]))
            tensors = [torch.tensor(v) for v in values]
            if any(len(stage) != len(AUGMENTATIONS) for sub in stages for stage in sub):
                raise ValueError("it names operations that are not known here")
            if not (policy.eta > 0 and all(bool(t.isfinite().all()) for t in tensors)):
                raise ValueError("eta and logits must be finite, eta above 0")
            if not all(0 <= float(t.min()) and float(t.max()) <= 1 for t in tensors[1:]):
                raise ValueError("probabilities and magnitudes must lie in [0, 1]")
            with torch.no_grad():
                for parameter, tensor in zip((policy.z, policy.p, policy.mu), tensors):
                    parameter.copy_(tensor.view_as(parameter))
        except FileNotFoundError:
            raise InputError(f"there is no policy file {path}") from None
        except (OSError, ValueError, TypeError, LookupError, RuntimeError, AttributeError, RecursionError) as e:
            raise InputError(f"cannot use the policy in {path}: {type(e).__name__}: {e}") from e
        policy.searching = False
        return policy.requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------
# The supernet of DARTS (Eq. 5), with shared inputs
# ---------------------------------------------------------------------------------------------------------------

NODES = 4  # intermediate nodes of a cell; node j reads states 0..j+1
EDGE = [[j * (j + 3) // 2 + state for state in range(j + 2)] for j in range(NODES)]  # an edge's row in alpha
READERS = [range(max(0, state - 1), NODES) for state in range(NODES + 1)]  # the nodes that read a state
MAX_POOL, SKIP = PRIMITIVES.index("max_pool_3x3"), PRIMITIVES.index("skip_connect")  # avg_pool_3x3 lies between
CONVOLUTIONS = PRIMITIVES[SKIP + 1 :]  # separable 3x3 and 5x5, dilated 3x3 and 5x5


class Moments(torch.autograd.Function):
    """Mean (C,) and covariance (C, C) of rows (N, C), with one matrix product backwards instead of autograd's two."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> tuple[Tensor, Tensor]:
        mean = rows.mean(0)
        ctx.save_for_backward(rows, mean)
        return mean, rows.T @ rows / len(rows) - torch.outer(mean, mean)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_mean: Tensor, d_cov: Tensor) -> Tensor:
        rows, mean = ctx.saved_tensors
        d_cov = d_cov + d_cov.T
        return torch.addmm((d_mean - d_cov @ mean) / len(rows), rows, d_cov / len(rows))


class NormalizeRows(torch.autograd.Function):
    """gain * (rows - mean) / sqrt(variance + eps) of rows (N, C), gain (C,); and mean and variance, both (C,).

    Reads and writes the rows fewer times than autograd would. PyTorch's own kernel for channels_last images on the CPU
    adds up in a single float a channel, with ten times the rounding error.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        mean = rows.mean(0)
        centred = rows - mean
        variance = (centred * centred).mean(0)
        factor = (variance + eps).rsqrt()
        ctx.save_for_backward(centred, gain, factor)
        ctx.mark_non_differentiable(mean, variance)
        return centred * (gain * factor), mean, variance

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor, *_) -> tuple[Tensor | None, Tensor, None]:
        centred, gain, factor = ctx.saved_tensors
        product = grad * centred
        slope = product.mean(0) * factor  # of the normalised rows: mean(grad * normalised)
        if not ctx.needs_input_grad[0]:
            return None, slope * len(grad), None
        scale = gain * factor  # below: scale * (grad - mean(grad) - slope * normalised), in the memory of product
        torch.addcmul(-scale * grad.mean(0), grad, scale, out=product)
        return product.addcmul_(centred, -scale * slope * factor), slope * len(grad), None


def scaled_batch_norm(x: Tensor, bn: nn.BatchNorm2d, gain: Tensor | None = None, part: slice = slice(None)) -> Tensor:
    """The channels `part` of bn, on x (B, C, H, W). gain (C,): takes the place of bn's own weight, if given."""
    gain = bn.weight if gain is None else gain
    statistics = bn.running_mean[part], bn.running_var[part]
    if x.is_cuda or not bn.training:
        return F.batch_norm(x, *statistics, gain, bn.bias, bn.training, bn.momentum, bn.eps)
    C = x.shape[1]
    rows = x.permute(0, 2, 3, 1).reshape(-1, C)  # the order that channels_last has in memory
    out, mean, variance = NormalizeRows.apply(rows, x.new_ones(C) if gain is None else gain, bn.eps)
    update_statistics(*statistics, bn.momentum, mean, variance, len(rows))
    out = out.view(len(x), *x.shape[2:], C).permute(0, 3, 1, 2)
    return out if bn.bias is None else out + bn.bias.view(1, C, 1, 1)


def pointwise_bn(
    x: Tensor, conv: nn.Conv2d, bn: nn.BatchNorm2d, gain: Tensor | None = None, part: slice = slice(None)
) -> Tensor:
    """scaled_batch_norm of a grouped 1x1 convolution of x, of its output channels `part`.

    On the CPU in training the convolution's output is never normalised, it comes out normalised: its mean is W mean(x)
    and its variances are diag(W Cov(x) W^T), so batch norm becomes a scale and a shift of the convolution. That reads
    x twice and writes once, where a convolution and a batch norm pass over the image seven times. With more than 32
    channels the covariance costs more than the passes. In float32 x should not lie further than some 100 standard
    deviations from 0: Cov(x) is E[x x^T] - E[x] E[x]^T.
    """
    W, C = conv.weight[part].flatten(1), x.shape[1]  # W: (C_out, C / groups)
    groups = C // W.shape[1]
    if x.is_cuda or not bn.training or bn.affine or C > 32:
        return scaled_batch_norm(F.conv2d(x, W[:, :, None, None], groups=groups), bn, gain, part)
    whole = torch.block_diag(*W.split(len(W) // groups)) if groups > 1 else W  # (C_out, C)
    N = x.numel() // C
    mean, covariance = Moments.apply(x.permute(0, 2, 3, 1).reshape(N, C))
    mean, variance = whole @ mean, ((whole @ covariance) * whole).sum(1)
    update_statistics(bn.running_mean[part], bn.running_var[part], bn.momentum, mean, variance, N)
    factor = (variance.clamp(min=0) + bn.eps).rsqrt() * (1 if gain is None else gain)
    return F.conv2d(x, (factor[:, None] * W)[:, :, None, None], -factor * mean, groups=groups)


@torch.no_grad()
def update_statistics(
    running_mean: Tensor, running_var: Tensor, momentum: float, mean: Tensor, variance: Tensor, count: int
) -> None:
    """What a batch norm does to its running statistics in training."""
    running_mean.lerp_(mean, momentum)
    running_var.lerp_(variance * (count / (count - 1)), momentum)


class CandidateOnAllEdges(nn.Module):
    """One candidate operation with parameters on all E edges that leave a state, side by side in the channels.

    Takes relu(x), because all these candidates begin with it. They end in a batch norm, and their weight in the mixture
    is its scale: one pass over the image less, and the gradient of the weight comes for nothing.
    """

    def __init__(self, name: str, channels: int, stride: int, edges: int):
        super().__init__()
        C, k, dilation = channels, int(name[-1]), 2 if name.startswith("dil") else 1
        self.channels, self.layers = C, nn.ModuleList()
        strides = (stride, 1) if dilation == 1 else (stride,)  # a separable convolution is two such blocks
        for s in strides:
            self.layers.append(common.DepthwiseConv(edges * C, k, s, dilation))
            self.layers.append(nn.Conv2d(edges * C, edges * C, 1, groups=edges, bias=False))
            self.layers.append(nn.BatchNorm2d(edges * C, affine=False))

    def forward(self, relu: Tensor, weight: Tensor, first: int) -> Tensor:
        """relu: (B, n C, H, W), n copies of (B, C, H, W); weight (n,): those of n edges from the `first` on."""
        x, part = relu, slice(first * self.channels, first * self.channels + relu.shape[1])
        gain = weight.repeat_interleave(self.channels)
        for k in range(0, len(self.layers), 3):
            depthwise, pointwise, bn = self.layers[k : k + 3]
            x = depthwise(F.relu_(x) if k else x, part)
            x = pointwise_bn(x, pointwise, bn, gain if k + 3 == len(self.layers) else None, part)
        return x  # (B, n C, H / stride, W / stride)


class DartsCell(nn.Module):
    """A cell whose 14 edges all carry the mixed operation of Eq. (5).

    Node j is the sum over its states i < j + 2 and the operations o of weight[EDGE[j][i], o] * o(state i), as
    tests/written_out.py has it in a plain loop. Here the outer loop is over i, because all edges that leave a state
    share its ReLU and its pools; "none" adds nothing; and an operation that ends in a batch norm has its weight as that
    one's scale, here `gain`.
    """

    def __init__(self, c_before: int, c_in: int, channels: int, reduction: bool, halved: bool):
        super().__init__()
        build = FactorizedReduce if halved else common.relu_conv_bn
        self.preprocess0 = build(c_before, channels, affine=False)
        self.preprocess1 = common.relu_conv_bn(c_in, channels, affine=False)
        self.strides = [2 if reduction and i < 2 else 1 for i in range(NODES + 1)]
        self.pool_norms, self.skips, self.convs = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()  # by state
        for readers, stride in zip(READERS, self.strides):
            E = len(readers)
            self.pool_norms.append(nn.ModuleList(nn.BatchNorm2d(channels, affine=False) for _ in range(2)))
            skips = E if stride == 2 else 0  # of stride 1 they have no parameters
            self.skips.append(nn.ModuleList(FactorizedReduce(channels, channels, affine=False) for _ in range(skips)))
            self.convs.append(nn.ModuleList(CandidateOnAllEdges(o, channels, stride, E) for o in CONVOLUTIONS))

    def forward(self, s0: Tensor, s1: Tensor, weight: Tensor) -> Tensor:
        """weight: softmax of alpha, (14, 8)."""
        states = [preprocess(self.preprocess0, s0), preprocess(self.preprocess1, s1)]
        nodes: list[Tensor | float] = [0.0] * NODES
        for i, readers in enumerate(READERS):
            x, C, stride = states[i], states[i].shape[1], self.strides[i]
            weights = weight[[EDGE[j][i] for j in readers]]  # (E, 8)
            mixed = self.without_parameters(i, x, weights)  # by edge: (B, C, H / stride, W / stride)
            for e, skip in enumerate(self.skips[i]):  # skip-connections of stride 2
                gain = weights[e, SKIP].repeat(C)
                mixed[e] = mixed[e] + scaled_batch_norm(skip.halves(x), skip.bn, gain)
            relu = F.relu(x)
            n = edges_at_once(x, len(readers))
            for first in range(0, len(readers), n):
                few = weights[first : first + n]
                copies = torch.cat([relu] * len(few), 1) if len(few) > 1 else relu  # (B, n C, H, W)
                sep3, sep5, dil3, dil5 = (
                    op(copies, few[:, PRIMITIVES.index(o)], first) for o, op in zip(CONVOLUTIONS, self.convs[i])
                )
                for e, conv in enumerate((sep3 + sep5 + dil3 + dil5).split(C, 1), first):
                    mixed[e] = mixed[e] + conv
            for j, edge in zip(readers, mixed):
                nodes[j] = nodes[j] + edge  # Eq. (5), summed over i
            if i:
                states.append(nodes[i - 1])  # complete: i was the last state that it reads
        return torch.cat(states[2:], 1)  # (B, 4 C, H, W)

    def without_parameters(self, i: int, x: Tensor, weights: Tensor) -> list[Tensor]:
        """The pools of state i, and the skip-connection of stride 1, of every edge: the first terms of Eq. (5)."""
        stride = self.strides[i]
        pools = F.max_pool2d(x, 3, stride, 1), F.avg_pool2d(x, 3, stride, 1, count_include_pad=False)
        outputs = [scaled_batch_norm(pool, bn) for bn, pool in zip(self.pool_norms[i], pools)]
        outputs += [x] if stride == 1 else []
        return mix(outputs, weights[:, MAX_POOL : MAX_POOL + len(outputs)])


def edges_at_once(x: Tensor, edges: int) -> int:
    """How many edges that carry x (B, C, H, W) to compute side by side: on a GPU all, on a CPU 4 MB, for its cache."""
    return edges if x.is_cuda else max(1, min(edges, 2**20 // x.numel()))


def preprocess(layers: nn.Module, x: Tensor) -> Tensor:
    """A FactorizedReduce, or ReLU, 1x1 convolution and batch norm."""
    if isinstance(layers, FactorizedReduce):
        return scaled_batch_norm(layers.halves(x), layers.bn)
    return pointwise_bn(F.relu(x), layers[1], layers[2])


def mix(tensors: list[Tensor], weight: Tensor) -> list[Tensor]:
    """For every row of weight (E, n) the weighted sum of the n tensors (B, C, H, W)."""
    rows = torch.stack([t.permute(0, 2, 3, 1) for t in tensors])  # the order that channels_last has in memory
    sums = weight @ rows.flatten(1)  # (E, B H W C)
    return [row.view(rows.shape[1:]).permute(0, 3, 1, 2) for row in sums]


class DartsSupernet(nn.Module):
    """The search network of DARTS: all operations on all edges, weighted by the softmax of alpha (Eq. 5).

    Input: normalised images (B, 3, H, W). Output: logits (B, num_classes). alphas_normal, alphas_reduce: (14, 8), a row
    an edge, node by node, a column one of PRIMITIVES, as in quark0/darts. It computes what the loop over edges and
    operations would, batch norm for batch norm; 16 channels and 8 layers have 1,930,618 weights.
    """

    def __init__(self, channels: int, num_classes: int, layers: int):
        super().__init__()
        C = channels
        self.stem = nn.Sequential(nn.Conv2d(3, 3 * C, 3, padding=1, bias=False), nn.BatchNorm2d(3 * C))
        c_before, c_in, halved = 3 * C, 3 * C, False
        self.cells = nn.ModuleList()
        self.reductions = (layers // 3, 2 * layers // 3)
        for i in range(layers):
            reduction = i in self.reductions
            C = 2 * C if reduction else C
            self.cells.append(DartsCell(c_before, c_in, C, reduction, halved))
            c_before, c_in, halved = c_in, NODES * C, reduction
        self.classifier = nn.Linear(c_in, num_classes)
        edges = sum(len(row) for row in EDGE)
        self.alphas_normal = nn.Parameter(1e-3 * torch.randn(edges, len(PRIMITIVES)))
        self.alphas_reduce = nn.Parameter(1e-3 * torch.randn(edges, len(PRIMITIVES)))

    def forward(self, x: Tensor) -> Tensor:
        normal, reduce = self.alphas_normal.softmax(1), self.alphas_reduce.softmax(1)
        s0 = s1 = scaled_batch_norm(self.stem[0](x), self.stem[1])
        for i, cell in enumerate(self.cells):
            s0, s1 = s1, cell(s0, s1, reduce if i in self.reductions else normal)
        return self.classifier(s1.mean((2, 3)))

    def alphas(self) -> list[nn.Parameter]:
        return [self.alphas_normal, self.alphas_reduce]

    def weights(self) -> list[nn.Parameter]:
        """w: every parameter but alpha."""
        return [p for name, p in self.named_parameters() if not name.startswith("alphas")]

    def genotype(self) -> Genotype:
        """Per node the two edges whose strongest operation but none is strongest, with that operation."""
        cells = []
        for alphas in (self.alphas_normal, self.alphas_reduce):
            best = alphas.detach().softmax(1)[:, 1:].max(1)
            values, ops = best.values.tolist(), best.indices.tolist()
            cells.append([])
            for row in EDGE:
                strongest = sorted(range(len(row)), key=lambda state: -values[row[state]])[:2]
                cells[-1] += [(PRIMITIVES[ops[row[state]] + 1], state) for state in sorted(strongest)]
        concat = list(range(2, NODES + 2))
        return Genotype(cells[0], concat, cells[1], list(concat))


# ---------------------------------------------------------------------------------------------------------------
# The search step
# ---------------------------------------------------------------------------------------------------------------


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


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


class JointSearch:
    """What the search learns: the network's weights w and alpha, the policy's z, p, mu; and their optimizers.

    With a given genotype the network is that genotype's and there is no alpha; with a given policy, or none, no policy.
    """

    def __init__(self, args: argparse.Namespace, data: Data, device: torch.device):
        size = {"num_classes": len(data.classes), "channels": args.search_channels, "layers": args.search_layers}
        self.net = Network(common.parse_genotype(args.genotype), **size) if args.genotype else DartsSupernet(**size)
        self.net.to(device, memory_format=torch.channels_last)
        self.policy = None if args.policy else Policy(args.sub_policies, args.stages).to(device)
        self.alphas = [] if args.genotype else self.net.alphas()
        self.weights = list(self.net.parameters()) if args.genotype else self.net.weights()
        self.upper = self.alphas + (list(self.policy.parameters()) if self.policy else [])
        self.optimizers = {"w": torch.optim.SGD(self.weights, args.lr, momentum=0.9, weight_decay=args.weight_decay)}
        if self.alphas:
            self.optimizers["alpha"] = torch.optim.Adam(self.alphas, args.arch_lr, (0.5, 0.999), weight_decay=1e-3)
        if self.policy:
            self.optimizers["policy"] = torch.optim.Adam(self.policy.parameters(), args.policy_lr, (0.0, 0.999))
        self.mean, self.std = common.mean_std(data.train_images)

    def loss(self, images: Tensor, labels: Tensor, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
        """Cross-entropy of uint8 images (B, 3, H, W) that went through the policy and the network; accuracy in %."""
        x = common.random_crop_flip(images).float() / 255
        x = self.policy(x) if self.policy else x
        with torch.autocast(x.device.type, torch.bfloat16, enabled=args.amp):
            logits = self.net(common.normalize(x, self.mean, self.std))
        accuracy = 100 * (logits.detach().argmax(1) == labels).float().mean()
        return F.cross_entropy(logits.float(), labels), accuracy

    def state_dict(self) -> dict:
        state = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        return {"net": self.net.state_dict(), "policy": self.policy and self.policy.state_dict(), "optimizers": state}

    def load_state_dict(self, state: dict) -> None:
        self.net.load_state_dict(state["net"])
        if self.policy:
            self.policy.load_state_dict(state["policy"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])


def set_learning(params: list[Tensor], on: bool) -> None:
    for p in params:
        p.requires_grad_(on)
        p.grad = None


def search_step(s: JointSearch, val: tuple[Tensor, Tensor], train: tuple[Tensor, Tensor], args) -> Tensor:
    """One iteration of Alg. 1 on two batches of (uint8 images, labels).

    Returns (L_val, its accuracy in %, L_train, its accuracy in %), detached: (4,).
    """
    set_learning(s.weights, False)  # Eq. (9), lines 2 to 8; no gradient of w is computed
    set_learning(s.upper, True)
    loss_val, accuracy_val = s.loss(*val, args)
    loss_val.backward()
    average_gradients(s.upper)
    if s.policy:
        s.optimizers["policy"].step()
        for parameter in (s.policy.p, s.policy.mu):
            parameter.data.clamp_(0, 1)
    if s.alphas:
        s.optimizers["alpha"].step()

    set_learning(s.weights, True)  # Eq. (10), lines 9 to 14
    set_learning(s.upper, False)
    loss_train, accuracy_train = s.loss(*train, args)
    loss_train.backward()
    average_gradients(s.weights)
    nn.utils.clip_grad_norm_(s.weights, args.grad_clip)
    s.optimizers["w"].step()
    return torch.stack([loss_val.detach(), accuracy_val, loss_train.detach(), accuracy_train])


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
# Search, then training
# ---------------------------------------------------------------------------------------------------------------


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


def search_space(slots: int = 10, architectures: float = 1.3e11) -> float:
    """Pairs of a policy and an architecture: (16 operations x 10 magnitudes x 11 probabilities)^slots x architectures.

    The defaults are the paper's introduction, AutoAugment's 5 sub-policies of 2 and ENAS' count: 3.7e43 (3.8e43 in
    the paper, which multiplies rounded factors).
    """
    return float(16 * 10 * 11) ** slots * architectures


def seed_epoch(seed: int, epoch: int, rank: int) -> torch.Generator:
    """Seed everything random of one epoch, so that a resumed run needs no generator's state; returns the one that
    orders the images, which is the same in every process."""
    torch.manual_seed((seed * 100_003 + epoch) * 1_009 + rank)
    return torch.Generator().manual_seed(seed * 100_003 + epoch)


def cosine(start: float, end: float, share: float) -> float:
    """From start to end along half a cosine, as share goes from 0 to 1."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def search(args: argparse.Namespace, data: Data, out: Path, device: torch.device, state: dict) -> None:
    """Alg. 1. Leaves genotype.json and, if one was searched, policy.json in `out`; `state` is the checkpoint."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.manual_seed(args.seed)
    s = JointSearch(args, data, device)
    if "search" in state:
        s.load_state_dict(state["search"])
    else:
        trace(s, state)
    halves = torch.randperm(len(data.train_images), generator=torch.Generator().manual_seed(args.seed)).to(device)
    halves = halves[: args.search_images]
    N = len(halves)
    D_train, D_val = halves[: N // 2], halves[N // 2 :]
    B = min(args.search_batch_size, N // 2)
    if B < 2 or B % world:
        raise InputError(f"a search batch of {B} images must be a multiple of the {world} processes, and at least 2")
    steps = N // 2 // B
    for epoch in range(state["epoch"], args.search_epochs):
        start = time.time()
        lr = cosine(args.lr, args.lr / 25, epoch / args.search_epochs)  # DARTS: 0.025 to 0.001
        s.optimizers["w"].param_groups[0]["lr"] = lr
        order = seed_epoch(args.seed, epoch, rank)
        train_order = D_train[torch.randperm(len(D_train), generator=order).to(device)]
        val_order = D_val[torch.randperm(len(D_val), generator=order).to(device)]
        sums, broken = torch.zeros(4, device=device), torch.full((), -1, device=device)
        progress = Progress(f"search epoch {epoch + 1}/{args.search_epochs}", steps)
        s.net.train()
        try:
            for step in range(steps):
                batch = slice(step * B, (step + 1) * B)
                val, train = val_order[batch][rank::world], train_order[batch][rank::world]
                measured = search_step(
                    s,
                    (data.train_images[val], data.train_labels[val]),
                    (data.train_images[train], data.train_labels[train]),
                    args,
                )
                sums += measured
                broken = torch.where((broken < 0) & ~measured.isfinite().all(), step, broken)
                if step % 5 == 4:
                    means = (sums / (step + 1)).tolist()
                    left = (time.time() - start) / (step + 1) * ((args.search_epochs - epoch) * steps - step - 1)
                    text = "val {:.3f} {:.1f}%  train {:.3f} {:.1f}%".format(*means)
                    progress.show(step + 1, f"{text}  search ends in {duration(left)}")
        finally:
            progress.close()
        stop_if_broken(broken, [s.weights, s.upper], epoch, steps, "--lr, --arch-lr or --policy-lr")
        genotype = common.parse_genotype(args.genotype) if args.genotype else s.net.genotype()
        if world > 1:
            dist.all_reduce(sums.div_(world))
        means = (sums / steps).tolist()
        record = {"epoch": epoch + 1, "phase": "search", "loss": means[2], "train_accuracy": means[3]}
        record |= {"val_loss": means[0], "val_accuracy": means[1], "lr": lr, "genotype": str(genotype)}
        cells = {"skip_connects": genotype.normal, "skip_connects_reduce": genotype.reduce}
        record |= {name: sum(op == "skip_connect" for op, _ in cell) for name, cell in cells.items()}
        if s.policy:
            selection = s.policy.selection().mean((0, 1)).tolist()
            record["selection"] = {name: round(v, 6) for name, v in zip(AUGMENTATIONS, selection)}
        trace(s, state)
        state |= {"epoch": epoch + 1, "search": s.state_dict()}
        state["search_seconds"] += time.time() - start
        keep_epoch(out, state, record, time.time() - start)
        say(
            f"search {epoch + 1:3d}/{args.search_epochs}  L_val {means[0]:.3f} {means[1]:5.1f} %"
            f"  L_train {means[2]:.3f} {means[3]:5.1f} %  skips {record['skip_connects']}/8 normal"
            f" {record['skip_connects_reduce']}/8 reduce{best_operations(s)}  {duration(time.time() - start)}"
        )
        if s.alphas and record["skip_connects"] > 4:
            say(
                f"warning: {record['skip_connects']} of the normal cell's 8 operations are skip-connections: the "
                f"search is collapsing. metrics.jsonl has every epoch's genotype; fewer --search-epochs end before it"
            )
    if rank == 0:
        common.save_genotype(
            common.parse_genotype(args.genotype) if args.genotype else s.net.genotype(), out / "genotype.json"
        )
        if s.policy:
            s.policy.save(out / "policy.json")


def best_operations(s: JointSearch) -> str:
    """The three augmentations that the policy selects most, for an epoch's line."""
    if not s.policy:
        return ""
    top = s.policy.selection().mean((0, 1)).topk(3)
    return "  " + ", ".join(f"{list(AUGMENTATIONS)[i]} {v:.0%}" for v, i in zip(*(t.tolist() for t in top)))


def trace(s: JointSearch, state: dict) -> None:
    """Append what the figures show to the checkpoint: alpha (2, 14, 8) and the policy's selection (16,), if there."""
    if s.alphas:
        now = torch.stack([a.detach().cpu().clone() for a in s.alphas])
        state["alphas"] = torch.cat([state["alphas"], now[None]]) if "alphas" in state else now[None]
    if s.policy:
        now = s.policy.selection().mean((0, 1)).cpu()
        state["selection"] = torch.cat([state["selection"], now[None]]) if "selection" in state else now[None]


def stop_if_broken(broken: Tensor, groups: list[list[Tensor]], epoch: int, steps: int, flags: str) -> None:
    """Raise FloatingPointError if a loss (`broken`: the first such step, or -1) or a parameter is not finite."""
    if dist.is_initialized():
        dist.all_reduce(broken, dist.ReduceOp.MAX)
    finite = torch.stack([p.detach().isfinite().all() for params in groups for p in params]).all()
    if int(broken) >= 0 or not bool(finite):
        kept = f"; the checkpoint of epoch {epoch} is kept" if epoch else ""
        raise FloatingPointError(
            f"the loss is not finite at epoch {epoch + 1}, step {int(broken) + 1 or steps}: "
            f"start again with a lower {flags}{kept}"
        )


def keep_epoch(out: Path, state: dict, record: dict, seconds: float) -> None:
    """Write the checkpoint and metrics.jsonl after an epoch."""
    state["history"].append(record)
    state["seconds"] += seconds
    if not dist.is_initialized() or dist.get_rank() == 0:
        save_checkpoint(out, state)
        write(out / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in state["history"]))


def train(args: argparse.Namespace, data: Data, out: Path, device: torch.device, state: dict) -> Network:
    """Train the network of `out`'s genotype.json from scratch with its policy.json, if there is one (DARTS' recipe)."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    genotype = common.load_genotype(out / "genotype.json")
    policy = Policy.load(out / "policy.json").to(device) if args.policy != "none" else None
    torch.manual_seed(args.seed)
    net = Network(genotype, len(data.classes), args.channels, args.layers, args.auxiliary_weight > 0)
    net.to(device, memory_format=torch.channels_last)
    weights = list(net.parameters())
    optimizer = torch.optim.SGD(weights, args.lr, momentum=0.9, weight_decay=args.weight_decay)
    if "train" in state:
        net.load_state_dict(state["train"]["net"])
        optimizer.load_state_dict(state["train"]["optimizer"])
    mean, std = common.mean_std(data.train_images)
    N, B = len(data.train_images), min(args.batch_size, len(data.train_images))
    if B % world:
        raise InputError(f"--batch-size {B} must be a multiple of the {world} processes")
    steps, before = N // B, sum(r["phase"] == "search" for r in state["history"])
    for epoch in range(state["epoch"] - before, args.train_epochs):
        start = time.time()
        lr = cosine(args.lr, 0.0, epoch / args.train_epochs)
        optimizer.param_groups[0]["lr"] = lr
        net.drop_path_prob = args.drop_path * epoch / args.train_epochs
        order = torch.randperm(N, generator=seed_epoch(args.seed, before + epoch, rank)).to(device)
        sums, broken = torch.zeros(2, device=device), torch.full((), -1, device=device)
        progress = Progress(f"train epoch {epoch + 1}/{args.train_epochs}", steps)
        net.train()
        try:
            for step in range(steps):
                batch = order[step * B : (step + 1) * B][rank::world]
                labels = data.train_labels[batch]
                x = common.random_crop_flip(data.train_images[batch]).float() / 255
                x = policy(x) if policy else x
                x = common.normalize(x, mean, std)
                x = common.cutout(x, args.cutout) if args.cutout else x
                with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                    logits = net(x)
                    logits, auxiliary = logits if isinstance(logits, tuple) else (logits, None)
                loss = F.cross_entropy(logits.float(), labels)
                accuracy = 100 * (logits.argmax(1) == labels).float().mean()
                sums += torch.stack([loss.detach(), accuracy])
                if auxiliary is not None:
                    loss = loss + args.auxiliary_weight * F.cross_entropy(auxiliary.float(), labels)
                optimizer.zero_grad()
                loss.backward()
                average_gradients(weights)
                nn.utils.clip_grad_norm_(weights, args.grad_clip)
                optimizer.step()
                broken = torch.where((broken < 0) & ~loss.detach().isfinite(), step, broken)
                if step % 5 == 4:
                    means = (sums / (step + 1)).tolist()
                    left = (time.time() - start) / (step + 1) * ((args.train_epochs - epoch) * steps - step - 1)
                    progress.show(
                        step + 1, "loss {:.3f} acc {:.1f}% lr {:.4f} left {}".format(*means, lr, duration(left))
                    )
        finally:
            progress.close()
        stop_if_broken(broken, [weights], before + epoch, steps, "--lr")
        if world > 1:
            dist.all_reduce(sums.div_(world))
        loss, accuracy = (sums / steps).tolist()
        test = evaluate(net, data.test_images, data.test_labels, mean, std) if rank == 0 else 0.0
        record = {"epoch": before + epoch + 1, "phase": "train", "loss": loss, "train_accuracy": accuracy}
        record |= {"test_accuracy": test, "lr": lr, "drop_path": net.drop_path_prob}
        state.pop("search", None)  # its job is done
        state |= {"epoch": before + epoch + 1, "train": {"net": net.state_dict(), "optimizer": optimizer.state_dict()}}
        keep_epoch(out, state, record, time.time() - start)
        say(
            f"train {epoch + 1:3d}/{args.train_epochs}  loss {loss:.3f}  train {accuracy:5.1f} %  test {test:5.1f} %"
            f"  lr {lr:.5f}  {duration(time.time() - start)}"
        )
    return net


def run_joint(args: argparse.Namespace, out: Path, device: torch.device) -> dict:
    """Search and train one network into the run directory `out`; returns what result.json holds."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    if (out / "result.json").exists():
        say(f"{out} is finished already")
        return read_json(out / "result.json")
    policy = (
        Policy.load(args.policy) if args.policy not in (None, "none") and not (out / "policy.json").exists() else None
    )
    data = load_data(args, device)
    check_data(args, data)
    searching = not (args.genotype and args.policy)
    if searching and len(data.train_images) < 4:
        raise InputError("the search splits the training images in two: it needs at least 4")
    state = {"epoch": 0, "history": [], "seconds": 0.0, "search_seconds": 0.0}
    if saved := load_checkpoint(out):
        state = saved
        say(f"going on with {out} after epoch {state['epoch']}")
    elif args.preset == "paper" and device.type == "cpu":
        measure_days(args, data, device, searching)
    if rank == 0:
        if not (out / "config.json").exists():
            create_run(args, out)
        write(out / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in state["history"]))
        if policy:
            policy.save(out / "policy.json")
    if not searching:
        if rank == 0:
            common.save_genotype(common.parse_genotype(args.genotype), out / "genotype.json")
    elif "train" not in state:
        say(
            f"search space: {search_space():.1e} as the paper counts it; with {args.sub_policies} x {args.stages} "
            f"operations and DARTS' cells {search_space(args.sub_policies * args.stages, (180 * 7**8) ** 2):.0e}"
        )
        search(args, data, out, device, state)
    if dist.is_initialized():
        dist.barrier()  # the files are there
    net = None if args.search_only else train(args, data, out, device, state)
    return finish_joint(args, net, data, out, state) if rank == 0 else {}


def measure_days(args: argparse.Namespace, data: Data, device: torch.device, searching: bool) -> None:
    """On a CPU with the paper's settings: measure a step of the search and of the training and say what is ahead."""
    N = len(data.train_images)
    if searching:
        half = min(N, args.search_images or N) // 2
        B = min(args.search_batch_size, half)
        say(f"measuring a search step of {B} images on this CPU ...")
        batch = data.train_images[:B], data.train_labels[:B]
        s, start = JointSearch(args, data, device), time.time()
        search_step(s, batch, batch, args)
        warn_of_days(time.time() - start, half // B * args.search_epochs)
    if not args.search_only:
        B = min(args.batch_size, N)
        say(f"measuring a training step of {B} images on this CPU ...")
        genotype = common.parse_genotype(args.genotype) if args.genotype else common.GENOTYPES["DARTS_V2"]
        net, start = Network(genotype, len(data.classes), args.channels, args.layers), time.time()
        F.cross_entropy(net(data.train_images[:B].float() / 255), data.train_labels[:B]).backward()
        warn_of_days(time.time() - start, N // B * args.train_epochs)


def finish_joint(args: argparse.Namespace, net: Network | None, data: Data, out: Path, state: dict) -> dict:
    """Write model.pt, the figures and result.json."""
    genotype, size = common.load_genotype(out / "genotype.json"), data.train_images.shape[-1]
    plain = Network(genotype, len(data.classes), args.channels, args.layers).to(data.train_images.device).eval()
    result = {
        "params": common.count_parameters(plain),
        "flops": common.count_flops(plain, size),
        "genotype": str(genotype),
        "dataset": args.dataset,
        "seed": args.seed,
        "epochs": len(state["history"]),
        "search_epochs": sum(r["phase"] == "search" for r in state["history"]),
        "seconds": round(state["seconds"], 1),
        "search_seconds": round(state["search_seconds"], 1),
    }
    mean, std = common.mean_std(data.train_images)
    if net is not None:
        plain.load_state_dict(net.state_dict(), strict=False)  # without the auxiliary head
        model = {
            "genotype": json.loads((out / "genotype.json").read_text()),
            "channels": args.channels,
            "layers": args.layers,
            "classes": data.classes,
            "image_size": size,
            "mean": mean.cpu(),
            "std": std.cpu(),
            "state_dict": {name: v.cpu() for name, v in plain.state_dict().items()},
        }
        write(out / "model.pt", model)
        accuracy = evaluate(plain, data.test_images, data.test_labels, mean, std)
        result = {"test_accuracy": accuracy, "train_loss": state["history"][-1]["loss"]} | result
    try:
        draw_joint(out, state, genotype, data)
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


def load_network(path: str | Path, device: torch.device | str = "cpu") -> tuple[Network, dict]:
    """The network of a run's model.pt, in eval mode, and what else the file holds (classes, mean, std, image_size).

    The network takes images normalised with that mean and std: common.normalize(images, info["mean"], info["std"]).
    """
    try:
        info = torch.load(path, map_location=device, weights_only=True)
        genotype = common.parse_genotype(json.dumps(info["genotype"]))
        net = Network(genotype, len(info["classes"]), info["channels"], info["layers"])
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

# Blue for geometric operations, orange to red for colour, gray for mixing; neighbours differ in lightness.
AUGMENTATION_COLORS = dict(
    zip(
        AUGMENTATIONS,
        "#08306b #4292c6 #08519c #9ecae1 #2171b5 #c6dbef #7f2704 #fdae6b #a63603 #fdd0a2 #d94801 #fee6ce #8c510a "
        "#fd8d3c #bf812d #737373".split(),
    )
)


def draw_joint(out: Path, state: dict, genotype: Genotype, data: Data) -> None:
    """Write the figures of a run: cells, alpha, policy, selection, images, and the curves of search and training."""
    try:
        import matplotlib
    except ImportError:
        say("no figures: matplotlib is missing (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 150})
    blue, orange = "#0072B2", "#D55E00"
    searched = [r for r in state["history"] if r["phase"] == "search"]
    trained = [r for r in state["history"] if r["phase"] == "train"]

    def save(figure, name: str) -> None:
        figure.savefig(out / name, bbox_inches="tight")
        plt.close(figure)

    figure, axes = plt.subplots(2, 1, figsize=(10, 6.4))
    common.draw_cell(genotype.normal, genotype.normal_concat, axes[0], "Normal cell")
    common.draw_cell(genotype.reduce, genotype.reduce_concat, axes[1], "Reduction cell")
    save(figure, "cells.png")

    if searched:
        epochs = [r["epoch"] for r in searched]
        figure, axes = plt.subplots(1, 3, figsize=(14, 3.8), layout="constrained")
        panels = [
            ("loss", "D_train (moves w)", "val_loss", "D_val (moves alpha, policy)", "loss (nats)"),
            ("train_accuracy", "D_train (moves w)", "val_accuracy", "D_val (moves alpha, policy)", "accuracy (%)"),
            ("skip_connects", "normal cell", "skip_connects_reduce", "reduction cell", "skip-connections of 8"),
        ]
        for axis, (first, first_label, second, second_label, label) in zip(axes, panels):
            axis.plot(epochs, [r[first] for r in searched], ".-", color=blue, label=first_label)
            axis.plot(epochs, [r[second] for r in searched], ".-.", color=orange, label=second_label)
            axis.set(xlabel="epoch", ylabel=label, title="Search: " + label.split(" (")[0])
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.legend(frameon=False)
        axes[2].axhspan(4.5, 8, color="0.9", label="collapse (normal cell)")
        axes[2].set_ylim(-0.2, 8)
        axes[2].legend(facecolor="white", framealpha=1)
        save(figure, "search.png")

    if "alphas" in state:
        weight = state["alphas"].softmax(-1)  # (epochs + 1, 2, 14, 8)
        figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained", sharey=True)
        for axis, values, cell in zip(axes, weight.unbind(1), ("Normal cell", "Reduction cell")):
            for o, name in enumerate(PRIMITIVES):
                curve, style = values[:, :, o], "--" if o < 4 else "-"
                axis.plot(curve.mean(1).tolist(), style, color=common.OPERATION_COLORS[o], linewidth=2, label=name)
                span = curve.amin(1).tolist(), curve.amax(1).tolist()
                axis.fill_between(range(len(curve)), *span, color=common.OPERATION_COLORS[o], alpha=0.08)
            axis.set(xlabel="epoch", title=cell)
            axis.xaxis.get_major_locator().set_params(integer=True)
        axes[0].set_ylabel("softmax(alpha): mean over edges, range shaded")
        axes[1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        save(figure, "alpha.png")

    if "selection" in state:
        save(draw_selection(state["selection"], plt), "selection.png")
    if (out / "policy.json").exists():
        policy = Policy.load(out / "policy.json")
        save(draw_policy_table(policy, plt), "policy.png")
        save(draw_policy_images(policy, data.test_images[:8].cpu().float() / 255, plt), "images.png")

    if trained:
        epochs = list(range(1, len(trained) + 1))
        figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
        axes[0].plot(epochs, [r["loss"] for r in trained], color=blue, label="training")
        axes[0].set(xlabel="epoch of training", ylabel="loss (cross-entropy, nats)", title="Training loss")
        axes[1].plot(epochs, [r["train_accuracy"] for r in trained], color=blue, label="training (augmented)")
        axes[1].plot(epochs, [r["test_accuracy"] for r in trained], "-.", color=orange, label="test")
        axes[1].set(xlabel="epoch of training", ylabel="accuracy (%)", title="Accuracy")
        for axis in axes:
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.legend(frameon=False)
        save(figure, "curves.png")


def draw_selection(selection: Tensor, plt):
    """A matplotlib figure: selection (epochs + 1, 16), the probability of every operation over the epochs, stacked."""
    figure, axis = plt.subplots(figsize=(9, 4.6))
    parts, colors = selection.T.tolist(), list(AUGMENTATION_COLORS.values())
    style = {"colors": colors, "edgecolor": "white", "linewidth": 0.4}
    axis.stackplot(range(len(selection)), parts, labels=list(AUGMENTATIONS), **style)
    axis.set(xlim=(0, len(selection) - 1), ylim=(0, 1), xlabel="epoch", ylabel="probability of selection")
    axis.set_title("Selection of each operation, mean over sub-policies and stages")
    axis.xaxis.get_major_locator().set_params(integer=True)
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles[::-1], labels[::-1], frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)
    return figure


def draw_policy_images(policy: Policy, images: Tensor, plt):
    """A matplotlib figure: images, float (B, 3, H, W) in [0, 1], and below each four draws of what becomes of it."""
    generator = torch.random.get_rng_state()
    torch.manual_seed(0)
    rows = [images, *(policy(images) for _ in range(4))]
    torch.random.set_rng_state(generator)
    size = {"figsize": (len(images), len(rows) + 0.4), "squeeze": False, "layout": "constrained"}
    figure, axes = plt.subplots(len(rows), len(images), **size)
    for axis, image in zip(axes.flat, torch.cat(rows)):
        axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for axis, label in zip(axes[:, 0], ["original", *(f"draw {k}" for k in range(1, 5))]):
        axis.set_ylabel(label)
    figure.suptitle("Test images before and after the learned policy")
    return figure


def draw_policy_table(policy: Policy, plt):
    """A matplotlib figure: for every sub-policy and stage the operation selected most, and its three numbers."""
    names, weight = list(AUGMENTATIONS), policy.selection()
    L, K, _ = weight.shape
    head = ["sub-policy"] + ["operation", "selected", "applied", "magnitude"] * K
    cells, colors = [], []
    for l in range(L):
        cells.append([str(l + 1)])
        colors.append(["white"])
        for k in range(K):
            n = int(weight[l, k].argmax())
            numbers = (
                f"{weight[l, k, n]:.0%}",
                f"{policy.p[l, k, n]:.0%}",
                "-" if names[n] in WITHOUT_MAGNITUDE else f"{policy.mu[l, k, n]:.2f}",
            )
            cells[-1] += [names[n], *numbers]
            geometric = n < list(AUGMENTATIONS).index("Invert")
            tint = "#deebf7" if geometric else "#f0f0f0" if names[n] == "SamplePairing" else "#fdebd9"
            colors[-1] += [tint] + ["white"] * 3
    figure, axis = plt.subplots(figsize=(2.2 + 4.2 * K, 0.7 + 0.32 * L))
    axis.axis("off")
    table = axis.table(cells, cellColours=colors, colLabels=head, loc="center", cellLoc="center")
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    table.scale(1, 1.3)
    table.auto_set_column_width(range(len(head)))
    for cell in table.get_celld().values():
        cell.set_edgecolor("0.8")
    axis.set_title("Learned policy: the operation each stage selects most (blue geometric, orange colour)")
    return figure


# ---------------------------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args, explicit = parse_args(argv)
    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    training = "train_epochs batch_size channels layers auxiliary_weight drop_path cutout"
    out = None
    try:
        note_unused(args, explicit, {"policy": "policy_lr sub_policies stages", "genotype": "arch_lr"})
        note_unused(args, explicit, {"search_only": training})
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, timeout=timedelta(hours=2))  # long enough for a download
        if args.evaluate:
            evaluate_run(args, explicit, choose_device(args.gpu), load_network)
            return 0
        if args.genotype:  # the genotype itself, so that a run does not depend on the file
            args.genotype = str(common.load_genotype(args.genotype))
        results = []
        for seed in range(args.seed, args.seed + args.repeats):
            out = Path(args.out or f"runs/joint_darts_faa-{args.dataset}-seed{seed}")
            out = out / f"seed{seed}" if args.out and args.repeats > 1 else out
            mine = settings_of(argparse.Namespace(**vars(args) | {"seed": seed}), explicit, out)
            if dist.is_initialized():
                dist.barrier()  # all have looked before one writes
            device = choose_device(mine.gpu)
            if mine.amp and device.type == "cpu":
                raise InputError("--amp needs a GPU")
            results.append(run_joint(mine, out, device))
            if dist.is_initialized():
                dist.barrier()
            if results[-1]:
                summarize(results[-1], out)
        if args.repeats > 1 and all("test_accuracy" in r for r in results):
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
