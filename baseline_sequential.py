# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "torchvision", "numpy", "pillow", "matplotlib", "tqdm", "scipy"]
# ///
"""The baselines of both papers: the same parts one after the other, as stages that hand files to each other.

Every stage but one is a call of `joint_darts_faa.py` or `dha.py`, so both sides of a comparison run the same code:

    faa-darts   1. Faster AutoAugment (here): policy.json    2. joint_darts_faa.py --policy policy.json
    darts       1. joint_darts_faa.py --policy none
    dha         1. dha.py --no-da --no-hpo, search only: genotype.json    2. dha.py --genotype genotype.json

faa-darts and darts are the baselines of Kashima et al. (arXiv 2012.09407), dha is "Sequential DHA" of Zhou et al.
(arXiv 2109.05765). Faster AutoAugment is Hataya et al., ECCV 2020 (arXiv 1911.06987).

    python baseline_sequential.py --method faa-darts --dataset shapes --preset quick    # minutes on a laptop
    python baseline_sequential.py --method faa-darts --dataset cifar10 --gpu 0          # the papers' settings
    python baseline_sequential.py --method dha --dataset cifar10 --repeats 3            # three seeds, mean and std
    python baseline_sequential.py --method darts --processes 4 ...                      # stages under torchrun, 4 GPUs
    python baseline_sequential.py --resume --method dha --out runs/baseline_sequential-cifar10-seed0
    python baseline_sequential.py --evaluate runs/baseline_sequential-cifar10-seed0
    python baseline_sequential.py --compare runs/*                                      # a table of any finished runs

Faster AutoAugment (function `search_policy`): a critic and a classifier share a WideResNet-40-2. The critic learns to
tell real images from augmented ones, the classifier learns the real ones, and the policy learns to make images that the
critic takes for real and the classifier puts where they belong. The policy, and Eq. (1) to (3) in it, is Kashima et
al.'s. Augmentations, policy, run directories and their figures are joint_darts_faa.py's, to the letter.
"""

from __future__ import annotations

import argparse
import ctypes
import difflib
import json
import math
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torch import Tensor

import common
from common import Data, InputError

# ---------------------------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------------------------

BASELINE_QUICK = {  # --preset quick; the stages have their own
    "dataset": "shapes",
    "faa_epochs": 8,
    "faa_batch_size": 64,
    "depth": 10,
    "width": 1,
    "policy_lr": 1e-2,
}
# Which flags every stage understands; those given on the command line are handed on.
BOTH = "batch_size channels layers lr weight_decay grad_clip auxiliary_weight drop_path cutout".split()
JOINT = [
    "search_epochs",
    "arch_lr",
    "search_batch_size",
    "search_images",
    "search_channels",
    "search_layers",
    "train_epochs",
    *BOTH,
]
DHA_SEARCH = [*"search_epochs arch_lr b_scale lasso freeze_distance max_params max_flops".split(), *BOTH]
DHA_TRAIN = ["tau_lr", "beta_lr", "beta_wd", "train_epochs", *BOTH]
FAA = "faa_epochs faa_images faa_batch_size faa_lr policy_lr sub_policies stages depth width".split()
FAA += ["class_weight", "critic_weight", "penalty"]
STAGE_FLAGS = {"faa-darts": {*FAA, *JOINT}, "darts": {*JOINT}, "dha": {*DHA_SEARCH, *DHA_TRAIN}}


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
    g.add_argument("--method", choices=list(STAGE_FLAGS), help="which baseline (needed, but to go on with --resume)")
    g.add_argument("--preset", choices=["paper", "quick"], default="paper", help="settings; explicit flags win over it")
    g.add_argument("--seed", type=number(int, 0), default=0, help="seed of everything random")
    g.add_argument("--repeats", type=number(int, 1), default=1, help="run seeds S..S+R-1 and report mean and std")
    g.add_argument("--out", help="run directory (default: runs/<script>-<dataset>-seed<seed>)")
    g.add_argument("--resume", action="store_true", help="continue the run in --out, or start it if there is none")
    g.add_argument("--evaluate", metavar="DIR", help="print the test accuracy of the finished run in DIR and stop")
    g.add_argument(
        "--compare", metavar="DIR", nargs="+", help="print a table of finished runs, of any script, and stop"
    )
    g = parser.add_argument_group("data")
    g.add_argument("--dataset", choices=common.DATASETS, default="cifar10", help="data set")
    g.add_argument("--data-dir", default="data", help="where data sets are, or are downloaded to")
    g.add_argument("--image-size", type=number(int, 8), help="scale images to this side (default: as they are)")
    g.add_argument("--limit-train", type=number(int, 2), help="use only so many training images")
    g.add_argument("--limit-test", type=number(int, 1), help="use only so many test images")
    g.add_argument("--workers", type=number(int, 1, 256), default=4, help="threads that read image files")
    g = parser.add_argument_group("machine")
    g.add_argument("--gpu", type=number(int, -1), help="GPU number, -1 for the CPU (default: 0 if there is one)")
    g.add_argument("--amp", action="store_true", help="bfloat16 autocast in the called stages (GPU only)")
    g.add_argument(
        "--processes", type=number(int, 1), default=1, help="run the stages under torchrun, so many processes"
    )
    g = parser.add_argument_group("Faster AutoAugment (stage 1 of faa-darts)")
    g.add_argument("--faa-epochs", type=number(int, 1), default=20, help="epochs of policy search")
    g.add_argument("--faa-images", type=number(int, 4), default=4000, help="training images that it sees")
    g.add_argument("--faa-batch-size", type=number(int, 4), default=128, help="images a step, half of them augmented")
    g.add_argument(
        "--faa-lr", type=number(float, 0), default=1e-3, help="Adam's learning rate of critic and classifier"
    )
    g.add_argument("--policy-lr", type=number(float, 0), default=1e-3, help="Adam's learning rate for z, p and mu")
    g.add_argument("--sub-policies", type=number(int, 1), default=10, help="L, sub-policies of a policy")
    g.add_argument("--stages", type=number(int, 1), default=2, help="K, operations one after the other in a sub-policy")
    g.add_argument("--class-weight", type=number(float, 0), default=0.1, help="weight of the classification losses")
    g.add_argument("--critic-weight", type=number(float, 0), default=1.0, help="weight of the critic's losses")
    g.add_argument("--penalty", type=number(float, 0), default=10.0, help="weight of the gradient penalty")
    g.add_argument("--depth", type=number(int, 10), default=40, help="layers of the WideResNet, 6 n + 4")
    g.add_argument("--width", type=number(int, 1), default=2, help="its width")
    g = parser.add_argument_group("handed to the later stages; each has its own default (see its --help)")
    g.add_argument("--search-epochs", type=number(int, 1), help="epochs of the architecture search")
    g.add_argument("--arch-lr", type=number(float, 0), help="Adam's learning rate for alpha (dha: b)")
    g.add_argument("--train-epochs", type=number(int, 1), help="epochs of training")
    g.add_argument("--batch-size", type=number(int, 2), help="images a step, over all GPUs")
    g.add_argument("--channels", type=number(int, 2), help="channels of the first cells (even)")
    g.add_argument("--layers", type=number(int, 3), help="cells; reductions at 1/3 and 2/3")
    g.add_argument("--lr", type=number(float, 0), help="learning rate at the start")
    g.add_argument("--weight-decay", type=number(float, 0), help="weight decay at the start")
    g.add_argument("--grad-clip", type=number(float, 1e-6), help="largest norm of the weights' gradient")
    g.add_argument("--auxiliary-weight", type=number(float, 0), help="loss weight of the auxiliary head")
    g.add_argument("--drop-path", type=number(float, 0, 0.99), help="drop-path at the end of training")
    g.add_argument("--cutout", type=number(int, 0), help="side of the cutout square in pixels")
    g = parser.add_argument_group("handed on by --method faa-darts and darts")
    g.add_argument("--search-batch-size", type=number(int, 2), help="images a batch in the search")
    g.add_argument(
        "--search-images", type=number(int, 4), help="use only so many of the training images (default: all)"
    )
    g.add_argument("--search-channels", type=number(int, 2), help="channels of the supernet (even)")
    g.add_argument("--search-layers", type=number(int, 3), help="cells of the supernet")
    g = parser.add_argument_group("handed on by --method dha")
    g.add_argument("--b-scale", type=number(float, 1e-9), help="standard deviation of b's first values")
    g.add_argument("--lasso", type=number(float, 1e-12), help="lambda of DHA's Eq. 4")
    g.add_argument("--freeze-distance", type=number(float, 0), help="a node freezes if alpha moved no more")
    g.add_argument(
        "--max-params", type=number(int, 1), help="reject supports whose network has more parameters (DHA's Eq. 1)"
    )
    g.add_argument("--max-flops", type=number(int, 1), help="reject supports with more multiply-adds (DHA's Eq. 1)")
    g.add_argument("--tau-lr", type=number(float, 0), help="learning rate of the policy (DHA's Eq. 2)")
    g.add_argument("--beta-lr", type=number(float, 0), help="beta of DHA's Eq. 3 for the learning rate")
    g.add_argument("--beta-wd", type=number(float, 0), help="beta of DHA's Eq. 3 for the weight decay")

    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    if first.parse_known_args(argv)[0].preset == "quick":
        parser.set_defaults(**BASELINE_QUICK)
    args = parser.parse_args(argv)
    words = {word.split("=")[0] for word in argv}
    explicit = {action.dest for action in parser._actions if words & set(action.option_strings)}
    if not (args.method or args.evaluate or args.compare or args.resume):
        parser.error("--method is missing: faa-darts, darts or dha")
    if (args.depth - 4) % 6:
        parser.error(f"--depth {args.depth}: a WideResNet has 6 n + 4 layers (10, 16, ..., 40)")
    if args.faa_batch_size % 2:
        parser.error("--faa-batch-size must be even: one half is augmented")
    for name in ("channels", "search_channels"):
        if (getattr(args, name) or 0) % 2:
            parser.error("--channels and --search-channels must be even: a factorized reduction splits them in two")
    if args.method == "dha":  # its second stage would say so after its first
        for name, low, high in (("lr", 1e-4, 0.1), ("weight_decay", 0.0, 1e-2)):
            if getattr(args, name) is not None and not low <= getattr(args, name) <= high:
                parser.error(f"--{name.replace('_', '-')} must lie in [{low:g}, {high:g}] where DHA learns it")
    everything = set.union(*STAGE_FLAGS.values())
    args.given = sorted(explicit & everything)  # for the stages of a resumed run
    return args, explicit


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
# WideResNet (Zagoruyko & Komodakis) with two heads
# ---------------------------------------------------------------------------------------------------------------


class WideBlock(nn.Module):
    """Batch norm, ReLU and a 3x3 convolution, twice; and around them the identity, or a 1x1 convolution."""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(c_in), nn.BatchNorm2d(c_out)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(c_in, c_out, 1, stride, bias=False) if c_in != c_out or stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        relu = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(relu))))
        return out + (self.shortcut(relu) if self.shortcut else x)


class WideResNet(nn.Module):
    """WRN-depth-width with a classifier and a critic on the same features.

    Input: normalised images (B, 3, H, W). Output: logits (B, num_classes) and the critic's value (B,), high for real
    images. WRN-40-2 with 10 classes has 2,243,546 parameters, and the critic's head 16,641 more.
    """

    def __init__(self, num_classes: int, depth: int = 40, width: int = 2):
        super().__init__()
        c_in, layers = 16, [nn.Conv2d(3, 16, 3, padding=1, bias=False)]
        for stage in range(3):
            c_out = 16 * width * 2**stage
            for k in range((depth - 4) // 6):
                layers.append(WideBlock(c_in, c_out, 2 if stage and k == 0 else 1))
                c_in = c_out
        self.features = nn.Sequential(*layers, nn.BatchNorm2d(c_in), nn.ReLU())
        self.classifier = nn.Linear(c_in, num_classes)
        self.critic = nn.Sequential(nn.Linear(c_in, c_in), nn.ReLU(), nn.Linear(c_in, 1))
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(x).mean((2, 3))
        return self.classifier(features), self.critic(features).squeeze(1)


# ---------------------------------------------------------------------------------------------------------------
# Faster AutoAugment: one step of the critic and classifier, one of the policy
# ---------------------------------------------------------------------------------------------------------------


def gradient_penalty(critic: Callable[[Tensor], Tensor], real: Tensor, augmented: Tensor, share: Tensor) -> Tensor:
    """mean((|d critic / d x| - 1)^2) at x = share real + (1 - share) augmented, an image each (Gulrajani et al.).

    real, augmented: (B, 3, H, W), constants; share: (B,) in [0, 1]; critic: images to values (B,). The gradient's norm
    is over all of an image. Differentiable in the critic's parameters, which takes the critic's second derivatives.
    """
    share = share.view(-1, 1, 1, 1)
    x = (share * real + (1 - share) * augmented).detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return ((gradient.flatten(1).norm(dim=1) - 1) ** 2).mean()


class PolicySearch:
    """What Faster AutoAugment learns: the network with its two heads, and the policy; and their optimizers."""

    def __init__(self, args: argparse.Namespace, data: Data, device: torch.device):
        self.net = WideResNet(len(data.classes), args.depth, args.width)
        self.net.to(device, memory_format=torch.channels_last)
        self.policy = Policy(args.sub_policies, args.stages).to(device)
        self.start = [p.detach().clone() for p in self.policy.parameters()]
        self.net_optimizer = torch.optim.Adam(self.net.parameters(), args.faa_lr, (0.0, 0.999))
        self.policy_optimizer = torch.optim.Adam(self.policy.parameters(), args.policy_lr, (0.0, 0.999))
        self.mean, self.std = common.mean_std(data.train_images)

    def augmented(self, images: Tensor) -> Tensor:
        """Images float in [0, 1] through the soft policy, normalised."""
        return common.normalize(self.policy(images), self.mean, self.std)

    def drift(self) -> list[float]:
        """How far z, p and mu are from where they started, mean absolute difference."""
        pairs = zip(self.policy.parameters(), self.start)
        return [float((now.detach() - then).abs().mean()) for now, then in pairs]

    def state_dict(self) -> dict:
        names = ("net", "policy", "net_optimizer", "policy_optimizer")
        return {name: getattr(self, name).state_dict() for name in names} | {"start": self.start}

    def load_state_dict(self, state: dict) -> None:
        for name in ("net", "policy", "net_optimizer", "policy_optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.start = [start.to(p.device) for start, p in zip(state["start"], self.policy.parameters())]


def critic_step(s: PolicySearch, real: Tensor, labels: Tensor, other: Tensor, args: argparse.Namespace) -> Tensor:
    """Move critic and classifier: tell `real` from the augmented `other`, put `real` where its labels say.

    real, other: float (B, 3, H, W) in [0, 1]. Returns (Wasserstein distance as the critic sees it, penalty, the
    classifier's loss, its accuracy in %), detached: (4,).
    """
    s.net.requires_grad_(True)
    real = common.normalize(real, s.mean, s.std)
    with torch.no_grad():
        augmented = s.augmented(other)
    logits, value = s.net(real)
    distance = value.mean() - s.net(augmented)[1].mean()
    share = torch.rand(len(real), device=real.device)
    penalty = gradient_penalty(lambda x: s.net(x)[1], real, augmented, share)
    class_loss = F.cross_entropy(logits, labels)
    s.net_optimizer.zero_grad()
    critic_loss = args.penalty * penalty - distance  # Gulrajani et al., Eq. (3): E[D(fake)] - E[D(real)] + penalty
    (args.critic_weight * critic_loss + args.class_weight * class_loss).backward()
    s.net_optimizer.step()
    accuracy = 100 * (logits.argmax(1) == labels).float().mean()
    return torch.stack([distance, penalty, class_loss, accuracy]).detach()


def policy_step(s: PolicySearch, images: Tensor, labels: Tensor, args: argparse.Namespace) -> Tensor:
    """Move z, p and mu: augmented `images` should look real to the critic and keep their labels.

    images: float (B, 3, H, W) in [0, 1]. Returns (the policy's critic loss, its classification loss, the accuracy on
    augmented images in %), detached: (3,).
    """
    s.net.requires_grad_(False)
    logits, value = s.net(s.augmented(images))
    critic_loss, class_loss = -value.mean(), F.cross_entropy(logits, labels)  # a generator's: -E[D(fake)]
    s.policy_optimizer.zero_grad()
    (args.critic_weight * critic_loss + args.class_weight * class_loss).backward()
    s.policy_optimizer.step()
    with torch.no_grad():
        for parameter in (s.policy.p, s.policy.mu):
            parameter.clamp_(0, 1)
    accuracy = 100 * (logits.argmax(1) == labels).float().mean()
    return torch.stack([critic_loss, class_loss, accuracy]).detach()


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


def keep_epoch(out: Path, state: dict, record: dict, seconds: float) -> None:
    """Write the checkpoint and metrics.jsonl after an epoch."""
    state["history"].append(record)
    state["seconds"] += seconds
    if not dist.is_initialized() or dist.get_rank() == 0:
        save_checkpoint(out, state)
        write(out / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in state["history"]))


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


# ---------------------------------------------------------------------------------------------------------------
# The search for a policy: the loop
# ---------------------------------------------------------------------------------------------------------------


def load_data(args: argparse.Namespace, device: torch.device) -> Data:
    """The data set of the flags, on the device; under torchrun one process downloads while the others wait."""
    settings = (args.dataset, args.data_dir, args.image_size, args.limit_train, args.limit_test, args.workers)
    if dist.is_initialized() and dist.get_rank() > 0:
        dist.barrier()
    data = common.load_data(*settings)
    if dist.is_initialized() and dist.get_rank() == 0:
        dist.barrier()
    return data.to(device)


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


MEASURED = ["distance", "penalty", "class_loss", "accuracy", "policy_critic_loss", "policy_class_loss"]
MEASURED += ["augmented_accuracy"]


def search_policy(args: argparse.Namespace, data: Data, out: Path, device: torch.device) -> None:
    """Faster AutoAugment into the directory `out`: policy.json, and what a run leaves."""
    torch.manual_seed(args.seed)
    s = PolicySearch(args, data, device)
    state = {"epoch": 0, "history": [], "seconds": 0.0}
    state["selection"] = s.policy.selection().mean((0, 1)).cpu()[None]
    if saved := load_checkpoint(out):
        state = saved
        s.load_state_dict(state["search"])
        say(f"going on with {out} after epoch {state['epoch']}")
    write(out / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in state["history"]))
    few = torch.randperm(len(data.train_images), generator=torch.Generator().manual_seed(args.seed)).to(device)
    few = few[: args.faa_images]
    half = min(args.faa_batch_size, len(few) // 2 * 2) // 2
    steps = len(few) // (2 * half)
    for epoch in range(state["epoch"], args.faa_epochs):
        start = time.time()
        order = few[torch.randperm(len(few), generator=seed_epoch(args.seed, epoch, 0)).to(device)]
        sums, broken = torch.zeros(len(MEASURED), device=device), torch.full((), -1, device=device)
        progress = Progress(f"policy epoch {epoch + 1}/{args.faa_epochs}", steps)
        s.net.train()
        try:
            for step in range(steps):
                batch = order[step * 2 * half : (step + 1) * 2 * half]
                images = common.random_crop_flip(data.train_images[batch]).float() / 255
                labels = data.train_labels[batch]
                real, other = images.split(half)
                moved = critic_step(s, real, labels[:half], other, args), policy_step(s, other, labels[half:], args)
                measured = torch.cat(moved)
                sums += measured
                broken = torch.where((broken < 0) & ~measured.isfinite().all(), step, broken)
                if epoch + step == 0 and args.preset == "paper" and device.type == "cpu":
                    warn_of_days(time.time() - start, steps * args.faa_epochs)
                if step % 5 == 4:
                    means = dict(zip(MEASURED, (sums / (step + 1)).tolist()))
                    left = (time.time() - start) / (step + 1) * ((args.faa_epochs - epoch) * steps - step - 1)
                    text = "distance {distance:.2f}  real {accuracy:.1f}%  augmented {augmented_accuracy:.1f}%"
                    progress.show(step + 1, f"{text.format(**means)}  left {duration(left)}")
        finally:
            progress.close()
        learned = [list(s.net.parameters()), list(s.policy.parameters())]
        stop_if_broken(broken, learned, epoch, steps, "--faa-lr or --policy-lr")
        record = {"epoch": epoch + 1, "phase": "policy"} | dict(zip(MEASURED, (sums / steps).tolist()))
        record |= dict(zip(("drift_z", "drift_p", "drift_mu"), s.drift()))
        selection = s.policy.selection().mean((0, 1)).cpu()
        record["selection"] = {name: round(v, 6) for name, v in zip(AUGMENTATIONS, selection.tolist())}
        state |= {"epoch": epoch + 1, "search": s.state_dict()}
        state["selection"] = torch.cat([state["selection"], selection[None]])
        keep_epoch(out, state, record, time.time() - start)
        top = ", ".join(f"{name} {v:.0%}" for name, v in sorted(record["selection"].items(), key=lambda x: -x[1])[:3])
        said = "distance {distance:.3f}  penalty {penalty:.3f}  real {class_loss:.3f} {accuracy:5.1f} %  augmented "
        said += "{policy_class_loss:.3f} {augmented_accuracy:5.1f} %"
        done = f"policy {epoch + 1:3d}/{args.faa_epochs}  {said.format(**record)}"
        say(f"{done}  {top}  {duration(time.time() - start)}")
    s.policy.save(out / "policy.json")
    try:
        draw_policy_search(out, state, data)
    except Exception as e:  # whatever matplotlib raises: a policy is not lost for a picture
        say(f"warning: not all figures could be drawn: {type(e).__name__}: {e}")
    seconds = round(state["seconds"], 1)
    result = {"epochs": args.faa_epochs, "seconds": seconds, "search_seconds": seconds}
    write(out / "result.json", json.dumps(result, indent=1) + "\n")


# ---------------------------------------------------------------------------------------------------------------
# Stages
# ---------------------------------------------------------------------------------------------------------------


class StageFailed(Exception):
    """A stage ended with an exit code other than 0; it has said why."""

    def __init__(self, name: str, code: int):
        super().__init__(f"stage {name} ended with exit code {code}")
        self.code = code


def die_with_parent() -> None:
    """In a stage's process: leave the terminal's Ctrl-C to the parent, and (Linux) end when the parent is killed.

    A stage that outlived its parent would write into the directory that `--resume` goes on with. With --processes this
    ends torchrun, and not the processes that it started.
    """
    os.setpgid(0, 0)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def run_stage(name: str, script: str, out: Path, flags: list[str], args: argparse.Namespace) -> dict:
    """Run `script` into `out` with the terminal of this program; returns its result.json. Done already: not again.

    Raises StageFailed, and Stopped after handing the signal on.
    """
    if (out / "result.json").exists():
        say(f"stage {name} is finished already: {out}")
        return read_json(out / "result.json")
    program = [str(Path(__file__).with_name(script))]
    if args.processes > 1:
        program = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.processes}", *program]
    machine = ["--data-dir", args.data_dir, "--workers", str(args.workers)]
    machine += ["--gpu", str(args.gpu)] if args.gpu is not None else []
    started = (out / "config.json").exists()  # then it has its settings already
    command = [sys.executable, *program, *machine, *(["--resume"] if started else flags), "--out", str(out)]
    say(f"\nstage {name}: {shlex.join(['python', *command[1:]])}")
    stage = subprocess.Popen(command, preexec_fn=die_with_parent)
    try:
        code = stage.wait()
    except Stopped as e:
        stage.send_signal(e.code - 128)
        stage.wait()
        raise
    if code:
        raise StageFailed(name, code if code > 0 else 128 - code)
    return read_json(out / "result.json")


def stage_flags(args: argparse.Namespace, names: list[str]) -> list[str]:
    """The settings that every stage is told, and those of `names` that were given."""
    flags = ["--preset", args.preset, "--seed", str(args.seed), "--dataset", args.dataset]
    flags += ["--amp"] if args.amp else []
    always = ("image_size", "limit_train", "limit_test")
    for name in [*always, *(name for name in names if name in args.given)]:
        if getattr(args, name) is not None:
            flags += ["--" + name.replace("_", "-"), str(getattr(args, name))]
    return flags


def check_processes(args: argparse.Namespace, images: int, device: torch.device) -> None:
    """Raise InputError now where a later stage would refuse --processes."""
    n, usual = args.processes, 96 if args.preset == "paper" else 64
    if n > 1 and device.type == "cuda" and n > torch.cuda.device_count():
        raise InputError(f"--processes {n}: this machine has {torch.cuda.device_count()} GPUs")
    batches = {"batch_size": min(args.batch_size or usual, images)}
    if args.method != "dha":
        half = min(images, args.search_images or images) // 2
        batches["search_batch_size"] = min(args.search_batch_size or 64, half)
    for name, size in batches.items():
        if size % n:
            raise InputError(f"--{name.replace('_', '-')}: {size} images cannot be shared by {n} processes")


def run_baseline(args: argparse.Namespace, out: Path, device: torch.device) -> dict:
    """All stages of one seed into the run directory `out`; returns what result.json holds."""
    if (out / "result.json").exists():
        say(f"{out} is finished already")
        return read_json(out / "result.json")
    data = load_data(args, device if args.method == "faa-darts" else torch.device("cpu"))  # wrong data: an error now
    auxiliary = args.auxiliary_weight if "auxiliary_weight" in args.given else 0.4 * (args.preset == "paper")
    check_data(argparse.Namespace(auxiliary_weight=auxiliary), data)
    if args.method != "dha" and len(data.train_images) < 4:
        raise InputError("a search splits its images in two: it needs at least 4 for training")
    check_processes(args, len(data.train_images), device)
    if not (out / "config.json").exists():
        create_run(args, out)

    results = {}
    if args.method == "faa-darts":
        policy = out / "policy"
        if not (policy / "result.json").exists():
            say(f"stage policy: Faster AutoAugment into {policy}")
            policy.mkdir(exist_ok=True)
            search_policy(args, data, policy, device)
        results["policy"] = read_json(policy / "result.json")
    del data  # the stages want the memory
    torch.cuda.empty_cache()

    if args.method == "dha":
        flags = ["--no-da", "--no-hpo", *stage_flags(args, DHA_SEARCH), "--train-epochs", "0"]
        results["search"] = run_stage("search", "dha.py", out / "search", flags, args)
        flags = ["--genotype", str(out / "search" / "genotype.json"), *stage_flags(args, DHA_TRAIN)]
        results["train"] = run_stage("train", "dha.py", out / "train", flags, args)
    else:
        given = str(out / "policy" / "policy.json") if args.method == "faa-darts" else "none"
        flags = ["--policy", given, *stage_flags(args, JOINT)]
        results["darts"] = run_stage("darts", "joint_darts_faa.py", out / "darts", flags, args)

    last = out / list(results)[-1]
    lines = []
    for name in results:
        rows = map(json.loads, (out / name / "metrics.jsonl").read_text().splitlines())
        lines += [json.dumps({"stage": name} | row) + "\n" for row in rows]
    write(out / "metrics.jsonl", "".join(lines))
    for name in ("genotype.json", "policy.json", "model.pt"):
        if (last / name).exists():
            shutil.copyfile(last / name, out / name)
    final = results[last.name]
    result = {"test_accuracy": final["test_accuracy"], "train_loss": final["train_loss"], "method": args.method}
    result |= {name: final[name] for name in ("params", "flops", "genotype", "dataset", "seed")}
    result["seconds"] = round(sum(r["seconds"] for r in results.values()), 1)
    result["search_seconds"] = round(sum(r["search_seconds"] for r in results.values()), 1)
    result["stage_seconds"] = {name: r["seconds"] for name, r in results.items()}
    write(out / "result.json", json.dumps(result, indent=1) + "\n")
    return result


# ---------------------------------------------------------------------------------------------------------------
# Comparison
# ---------------------------------------------------------------------------------------------------------------

# Accuracy in % as the papers' tables have it: method, then data set; the joint paper's by epochs of search too.
PAPERS = {
    ("DARTS", "50"): {"cifar10": "97.33 ± 0.12", "cifar100": "76.21 ± 3.76", "svhn": "97.85 ± 0.08"},
    ("Faster AA, then DARTS", "50"): {"cifar10": "97.55 ± 0.30", "cifar100": "77.96 ± 3.12", "svhn": "98.02 ± 0.03"},
    ("DARTS + Faster AA jointly", "50"): {
        "cifar10": "97.40 ± 0.03",
        "cifar100": "79.02 ± 2.14",
        "svhn": "97.92 ± 0.12",
    },
    ("DARTS", "25"): {"cifar10": "97.14 ± 0.04", "cifar100": "82.91 ± 0.30", "svhn": "97.94 ± 0.06"},
    ("Faster AA, then DARTS", "25"): {"cifar10": "97.29 ± 0.03", "cifar100": "84.17 ± 0.29", "svhn": "98.03 ± 0.05"},
    ("DARTS + Faster AA jointly", "25"): {
        "cifar10": "97.46 ± 0.09",
        "cifar100": "83.81 ± 0.49",
        "svhn": "97.82 ± 0.08",
    },
    ("One-Stage ISTA", ""): {"cifar10": "97.64 ± 0.20", "cifar100": "83.10 ± 0.11"},
    ("Sequential DHA", ""): {"cifar10": "97.77 ± 0.14", "cifar100": "83.51 ± 0.12"},
    ("DHA", ""): {"cifar10": "98.11 ± 0.26", "cifar100": "83.93 ± 0.23"},
}
# Flags that say where a run is, or how fast; runs that differ in these alone are compared as one.
WHERE = "seed repeats out resume workers gpu evaluate compare".split()
# Flags that say what is run, and not how; a run with no others has the paper's settings.
HARMLESS = [*WHERE, *"method dataset data_dir preset amp processes no_da no_hpo".split()]


def method_of(script: str, settings: dict) -> str:
    """The name of what a run's config.json says was run."""
    if script == "baseline_sequential.py":
        return {"faa-darts": "Faster AA, then DARTS", "darts": "DARTS", "dha": "Sequential DHA"}[settings["method"]]
    if script == "joint_darts_faa.py":
        searched = [] if settings["genotype"] else ["DARTS"]
        if settings["policy"] not in (None, "none"):
            searched.append("given policy")
        if not settings["policy"]:
            searched.append("Faster AA jointly" if searched else "Faster AA")
        return " + ".join(searched + (["given genotype"] if settings["genotype"] else []))
    if settings["genotype"]:
        name = "DHA, given genotype"
    else:
        name = "One-Stage ISTA" if settings["no_da"] and settings["no_hpo"] else "DHA"
    off = [part for part in ("DA", "HPO") if settings[f"no_{part.lower()}"] and name != "One-Stage ISTA"]
    return name + "".join(f", no {part}" for part in off)


def changed_settings(config: dict) -> list[str]:
    """The flags that a run's command gave and that change what comes out. config: the run's config.json."""
    words = [word.split("=")[0] for word in shlex.split(config["command"])[1:] if word.startswith("--")]
    given = {word[2:].replace("-", "_") for word in words} - {*HARMLESS}
    return sorted(given - ({"policy"} if config["args"].get("policy") == "none" else set()))


def paper_accuracy(method: str, config: dict) -> str:
    """The paper's accuracy where a run had the paper's settings, else "-". config: the run's config.json."""
    settings, changed = config["args"], set(changed_settings(config))
    epochs = "" if "DHA" in method or "ISTA" in method else str(settings["search_epochs"] or 50)
    if epochs in ("25", "50"):
        changed -= {"search_epochs"}
    if settings["preset"] != "paper" or changed:
        return "-"
    return PAPERS.get((method, epochs), {}).get(settings["dataset"], "-")


def read_runs(folders: list[str]) -> list[tuple[dict, dict]]:
    """(config, result) of every finished run in `folders`, or one level below; a folder named twice counts once.

    Raises InputError if one does not exist, if none is finished, and for files that no run has written.
    """
    runs: dict[Path, tuple[dict, dict]] = {}
    for folder in map(Path, folders):
        if not folder.exists():
            raise InputError(f"there is no folder {folder}")
        found = [folder] if (folder / "config.json").exists() else [p.parent for p in folder.glob("*/config.json")]
        if not found:
            say(f"note: there is no run in {folder} (no config.json)")
        for path in sorted(found):
            if not (path / "result.json").exists():
                say(f"note: {path} is not finished (no result.json)")
                continue
            config, result = read_json(path / "config.json"), read_json(path / "result.json")
            if "test_accuracy" not in result:
                say(f"note: {path} was a search only, it has no test accuracy")
                continue
            try:
                check_run(config, result)
            except (AttributeError, KeyError, TypeError, ValueError) as e:
                raise InputError(f"{path} is not a run of these scripts: {type(e).__name__}: {e}") from e
            runs[path.resolve()] = config, result
    if not runs:
        raise InputError("there is no finished run with a test accuracy")
    return list(runs.values())


def check_run(config: dict, result: dict) -> None:
    """Raises an AttributeError, KeyError, TypeError or ValueError where `compare` would."""
    method_of(config["script"], config["args"])
    changed_settings(config)
    if not {"dataset", "data_dir", "preset", "seed"} <= config["args"].keys() or "dataset" not in result:
        raise KeyError("config.json or result.json lacks a setting")
    for name in ("test_accuracy", "params", "search_seconds", "seconds"):
        if not math.isfinite(result[name]):
            raise ValueError(f"{name} is {result[name]}")


def compare(runs: list[tuple[dict, dict]]) -> str:
    """A table of runs (config, result), as text and in Markdown: seeds of the same settings are one row."""
    groups: dict[tuple, list] = {}
    for config, result in runs:
        elsewhere = [] if result["dataset"] == "folder" else ["data_dir"]
        settings = {k: v for k, v in config["args"].items() if k not in (*WHERE, *elsewhere, "given")}
        key = (result["dataset"], method_of(config["script"], config["args"]), config["script"])
        groups.setdefault((*key, json.dumps(settings, sort_keys=True)), []).append((config, result))
    spread = lambda values: f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")
    rows = ["method, data set, settings, seeds, accuracy (%), paper (%), parameters, search, total".split(", ")]
    for (dataset, method, _, _), group in sorted(groups.items()):
        config, results = group[0][0], [result for _, result in group]
        shown = [config["args"]["preset"]] if config["args"]["preset"] != "paper" else []
        for name in changed_settings(config):
            value = config["args"].get(name)
            given = "" if value is True or name in ("policy", "genotype") else f" {value}"
            shown.append(f"--{name.replace('_', '-')}{given}")
        folder = f" {config['args']['data_dir']}" if dataset == "folder" else ""
        seeds = len({c["args"]["seed"] for c, _ in group})
        if seeds < len(group):
            say(f"note: {method} on {dataset}: {len(group)} runs of {seeds} different seeds")
        row = [method, dataset + folder, " ".join(shown) or "paper", str(seeds)]
        row += [spread([r["test_accuracy"] for r in results]), paper_accuracy(method, config)]
        row.append(f"{mean(r['params'] for r in results) / 1e6:.3g} M")
        row += [duration(mean(r[key] for r in results)) for key in ("search_seconds", "seconds")]
        rows.append(row)
    width = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, width)).rstrip() for row in rows]
    markdown = ["| " + " | ".join(row) + " |" for row in rows]
    markdown.insert(1, "|" + " --- |" * len(width))
    return "\n".join([*lines, "", *markdown])


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


def draw_policy_search(out: Path, state: dict, data: Data) -> None:
    """Write the figures of Faster AutoAugment: its losses and drift, the selection over epochs, the policy, images."""
    try:
        import matplotlib
    except ImportError:
        say("no figures: matplotlib is missing (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 150})
    blue, orange, green = "#0072B2", "#D55E00", "#009E73"
    panels = {
        "Critic": ("value", [("distance", "real minus augmented"), ("policy_critic_loss", "loss of the policy")]),
        "Gradient penalty": ("(|gradient| - 1)^2", [("penalty", "penalty, without its weight")]),
        "Classification": (
            "cross-entropy (nats)",
            [("class_loss", "real (moves the network)"), ("policy_class_loss", "augmented (moves the policy)")],
        ),
        "Drift of the policy": (
            "mean distance from the start",
            [("drift_z", "z (logits)"), ("drift_p", "p (probabilities)"), ("drift_mu", "mu (magnitudes)")],
        ),
    }
    figure, axes = plt.subplots(1, 4, figsize=(17, 3.6), layout="constrained")
    for axis, (title, (label, curves)) in zip(axes, panels.items()):
        for (key, name), color, style in zip(curves, (blue, orange, green), (".-", ".-.", ".:")):
            epochs = [r["epoch"] for r in state["history"]]
            axis.plot(epochs, [r[key] for r in state["history"]], style, color=color, label=name)
        axis.set(xlabel="epoch", ylabel=label, title=title)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(frameon=False)

    policy = Policy.load(out / "policy.json")
    images = data.test_images[:8].cpu().float() / 255
    figures = {
        "losses.png": figure,
        "selection.png": draw_selection(state["selection"], plt),
        "policy.png": draw_policy_table(policy, plt),
        "images.png": draw_policy_images(policy, images, plt),
    }
    for name, figure in figures.items():
        figure.savefig(out / name, bbox_inches="tight")
        plt.close(figure)


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
    out = None
    again = shlex.join(["python", sys.argv[0], *argv, *([] if args.resume else ["--resume"])])
    try:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise InputError("start this program without torchrun: --processes N runs its stages under torchrun")
        if args.compare:
            say(compare(read_runs(args.compare)))
            return 0
        if args.evaluate:
            return evaluate_last_stage(args, explicit)
        for name in sorted(set(args.given) - STAGE_FLAGS.get(args.method, set(args.given))):
            say(f"note: --{name.replace('_', '-')} does nothing with --method {args.method}")
        runs = []
        for seed in range(args.seed, args.seed + args.repeats):
            out = Path(args.out or f"runs/baseline_sequential-{args.dataset}-seed{seed}")
            out = out / f"seed{seed}" if args.out and args.repeats > 1 else out
            if not args.method and not (out / "config.json").exists():
                raise InputError(f"--method is missing, and there is no run in {out} to go on with")
            mine = settings_of(argparse.Namespace(**vars(args) | {"seed": seed}), explicit, out)
            device = choose_device(mine.gpu)
            if mine.amp and device.type == "cpu":
                raise InputError("--amp needs a GPU")
            result = run_baseline(mine, out, device)
            summarize(result, out)
            runs.append((read_json(out / "config.json"), result))
        if args.repeats > 1:
            accuracies = [result["test_accuracy"] for _, result in runs]
            say(f"{len(runs)} seeds: test accuracy {mean(accuracies):.2f} ± {stdev(accuracies):.2f} %\n")
            say(compare(runs))
        return 0
    except (InputError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except FloatingPointError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except StageFailed as e:
        print(f"error: {e}; its own message is above. Go on with: {again}", file=sys.stderr)
        return e.code
    except Stopped as e:
        print(f"\nstopped{f'; go on with: {again}' if out and out.exists() else ''}", file=sys.stderr)
        return e.code


def evaluate_last_stage(args: argparse.Namespace, explicit: set[str]) -> int:
    """--evaluate: by the program that trained the network, in the directory of the last stage."""
    run_dir = Path(args.evaluate)
    if not (run_dir / "result.json").exists():
        raise InputError(f"there is no finished run in {run_dir}")
    last = run_dir / list(read_json(run_dir / "result.json").get("stage_seconds", {"": 0}))[-1]
    script = read_json(last / "config.json").get("script")
    if script not in ("dha.py", "joint_darts_faa.py"):
        raise InputError(f"{last} is not a finished run of these scripts")
    names = explicit & {"dataset", "data_dir", "image_size", "limit_train", "limit_test", "workers", "gpu"}
    flags = [word for name in sorted(names) for word in ("--" + name.replace("_", "-"), str(getattr(args, name)))]
    return subprocess.call([sys.executable, str(Path(__file__).with_name(script)), "--evaluate", str(last), *flags])


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
