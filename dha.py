# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "torchvision", "numpy", "pillow", "matplotlib", "tqdm", "scipy"]
# ///
"""DHA: data augmentation policy, hyper-parameters and architecture, searched and trained in one stage.

Paper: Zhou et al., "DHA: End-to-End Joint Optimization of Data Augmentation Policy, Hyper-parameter and
Architecture" (arXiv 2109.05765); equation numbers are that paper's. The architecture part is one-stage
ISTA-NAS (Yang et al., NeurIPS 2020). One network at its final size, one loss, no validation split, and
nothing is retrained: what the search leaves is a trained network.

    python dha.py --dataset shapes --preset quick               # minutes on a laptop, nothing to download
    python dha.py --dataset cifar10 --gpu 0                     # full size, 120 + 600 epochs
    torchrun --nproc-per-node 4 dha.py --dataset cifar10        # a process a GPU, --batch-size is the sum
    python dha.py --resume --out runs/dha-cifar10-seed0         # go on after a stop
    python dha.py --evaluate runs/dha-cifar10-seed0             # test accuracy of a finished run
    python dha.py --space mobilenet --dataset cifar10           # ProxylessNAS' layers for DARTS' cells
    python dha.py --preset imagenet --data-dir /data/imagenet   # photographs, 224 pixels
    python dha.py --genotype DARTS_V2 ...                       # a known architecture with learned DA and HPO
    python dha.py --no-da --no-hpo ...                          # the paper's "One-Stage ISTA"
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torch import Tensor
from tqdm import tqdm

import common
from common import PRIMITIVES, Data, FactorizedReduce, Genotype, InputError, Photos

# -------- Augmentations: batched, differentiable, one magnitude an image ------------------------------------
# DHA takes no gradient through them: what is said of gradients is for joint_darts_faa.py, whose copy this is.
# images (B, 3, H, W) float in [0, 1]; magnitude (B,) in [0, 1], in [-1, 1] for those in SIGNED. Where an
# operation has a magnitude, 0 is the identity. The input is never modified; the result lies in [0, 1].

def per_image(values: Tensor) -> Tensor:
    """(B,) to (B, 1, 1, 1)."""
    return values.view(-1, 1, 1, 1)

def straight_through(value: Tensor, source: Tensor) -> Tensor:
    """`value` forwards; the gradient skips it and goes to `source` unchanged (straight-through estimator)."""
    return value.detach() + (source - source.detach())

def warp(images: Tensor, row_x: tuple, row_y: tuple) -> Tensor:
    """Each image through its own affine map: pixel (x, y) shows the input at (a x + b y + c, d x + e y + f).
    row_x = (a, b, c), row_y = (d, e, f): numbers or (B,), in pixels from the top left corner, as PIL's
    Image.transform. Bilinear; outside is 0."""
    B, _, H, W = images.shape
    x = torch.arange(W, device=images.device, dtype=images.dtype) + 0.5
    y = torch.arange(H, device=images.device, dtype=images.dtype).view(H, 1) + 0.5
    source = []
    for row, side in ((row_x, W), (row_y, H)):
        a, b, c = (v.view(-1, 1, 1) if isinstance(v, Tensor) else v for v in row)
        source.append(((a * x + (b * y + c)) * (2 / side) - 1).expand(B, H, W))
    out = F.grid_sample(images, torch.stack(source, -1), padding_mode="zeros", align_corners=False)
    with torch.no_grad():  # only rounding leaves [0, 1]
        return out.clamp_(0, 1)

def shear_x(images: Tensor, magnitude: Tensor) -> Tensor:
    """Shear by up to 0.3 pixels a row; the top edge stays."""
    return warp(images, (1.0, 0.3 * magnitude, 0.0), (0.0, 1.0, 0.0))

def shear_y(images: Tensor, magnitude: Tensor) -> Tensor:
    """Shear by up to 0.3 pixels a column; the left edge stays."""
    return warp(images, (1.0, 0.0, 0.0), (0.3 * magnitude, 1.0, 0.0))

def translate_x(images: Tensor, magnitude: Tensor) -> Tensor:
    """Move right by up to 0.45 of the width."""
    return warp(images, (1.0, 0.0, -0.45 * images.shape[3] * magnitude), (0.0, 1.0, 0.0))

def translate_y(images: Tensor, magnitude: Tensor) -> Tensor:
    """Move down by up to 0.45 of the height."""
    return warp(images, (1.0, 0.0, 0.0), (0.0, 1.0, -0.45 * images.shape[2] * magnitude))

def rotate(images: Tensor, magnitude: Tensor) -> Tensor:
    """Turn counter-clockwise around the centre by up to 30 degrees."""
    H, W = images.shape[2:]
    cos, sin = (magnitude * math.pi / 6).cos(), (magnitude * math.pi / 6).sin()
    dx, dy = (1 - cos) * W / 2 + sin * H / 2, (1 - cos) * H / 2 - sin * W / 2
    return warp(images, (cos, -sin, dx), (sin, cos, dy))

def limit(images: Tensor) -> Tensor:
    """images.clamp(0, 1), which takes a CPU 890 us backwards for 128 images of 32 x 32; this takes 60."""
    out = F.hardtanh(images, -1e-6, 1 + 1e-6)  # wider, so that pixels that are 0 or 1 keep their gradient
    with torch.no_grad():
        return out.clamp_(0, 1)

def blend(ground: Tensor, images: Tensor, magnitude: Tensor) -> Tensor:
    """`images` moved away from `ground` (magnitude > 0) or towards it, by the factor 1 + 0.9 magnitude."""
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
    """Invert what is at least as bright as 1 - magnitude. Straight-through gradient for the magnitude: -1."""
    m = per_image(magnitude)  # Faster AutoAugment's rule is +1 for the threshold, which falls as m rises
    bright = ((images >= 1 - m - 1e-5) & (m > 0)).to(images.dtype)  # 1e-5: rounding, at the threshold itself
    return bright + (1 - 2 * bright) * images - (m - m.detach())

def posterize(images: Tensor, magnitude: Tensor) -> Tensor:
    """Keep the highest 8 - round(4 magnitude) of 8 bits. Straight-through gradients: 1, for magnitude -1."""
    m = per_image(magnitude)  # Faster AutoAugment's rule is +1 for the bits that are kept
    step = 2 ** (4 * m.detach()).round()
    kept = ((images.detach() * 255).round() / step).floor() * step / 255
    return straight_through(torch.where(step > 1, kept, images), images - m)

def auto_contrast(images: Tensor, magnitude: Tensor) -> Tensor:
    """Stretch every channel to the full range, as PIL at 8 bits. Straight-through gradient for the image."""
    levels = (images.detach() * 255).round().long().clamp(0, 255).flatten(2)  # (B, 3, H W)
    low, high = levels.amin(2, keepdim=True).double(), levels.amax(2, keepdim=True).double()
    scale = torch.full_like(low, 255.0) / (high - low).clamp(min=1)  # divides as PIL; 255 / tensor multiplies
    level = torch.arange(256, device=images.device, dtype=torch.float64)
    stretched = (level * scale - low * scale).floor().clamp(0, 255)
    table = torch.where(high > low, stretched, level) / 255  # (B, 3, 256)
    return straight_through(table.to(images.dtype).gather(2, levels).view(images.shape), images)

def equalize(images: Tensor, magnitude: Tensor) -> Tensor:
    """Flatten every channel's histogram, as PIL at 8 bits. Straight-through gradient for the image."""
    levels = (images.detach() * 255).round().long().clamp(0, 255).flatten(2)  # (B, 3, H W)
    histogram = levels.new_zeros(*levels.shape[:2], 256).scatter_add_(2, levels, torch.ones_like(levels))
    step = (levels.shape[2] - histogram.gather(2, levels.amax(2, keepdim=True))) // 255  # brightest aside
    below = histogram.cumsum(2) - histogram
    flat = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    table = torch.where(step > 0, flat, torch.arange(256, device=images.device)) / 255  # (B, 3, 256)
    return straight_through(table.to(images.dtype).gather(2, levels).view(images.shape), images)

def identity(images: Tensor, magnitude: Tensor) -> Tensor:
    """The images, copied."""
    return images.clone()

AUGMENTATIONS = dict(
    AutoContrast=auto_contrast, Equalize=equalize, Rotate=rotate, Posterize=posterize, Solarize=solarize,
    Color=color, Contrast=contrast, Brightness=brightness, Sharpness=sharpness, ShearX=shear_x,
    ShearY=shear_y, TranslateX=translate_x, TranslateY=translate_y, Identity=identity,
)
SIGNED = set("ShearX ShearY TranslateX TranslateY Rotate Color Contrast Brightness Sharpness".split())

def apply_each(images: Tensor, choice: Tensor, magnitude: Tensor) -> Tensor:
    """Each image through its own operation: choice (B,), an index into AUGMENTATIONS, or -1 for none.
    magnitude (B,) in [-1, 1]; only those in SIGNED see its sign. Every operation gets the whole batch, 13 ms
    for 96 images on 2 cores: picking takes 6, but on a GPU it waits for the host to count."""
    out = images.clone()
    for n, (name, operation) in enumerate(AUGMENTATIONS.items()):
        changed = operation(images, magnitude if name in SIGNED else magnitude.abs())
        out = torch.where(per_image(choice == n), changed, out)
    return out

# -------- Data augmentation (Eq. 2): tau has a logit for every ordered pair of operations, 14 x 14 ----------

def sample_pairs(tau: Tensor, count: int) -> Tensor:
    """Draw pairs from p(tau) = softmax over all 196: (count,) with values 14 * first + second."""
    noise = torch.empty(count, tau.numel(), device=tau.device).exponential_().log()  # minus a Gumbel variable
    return (tau.detach().flatten() - noise).argmax(1)

@torch.no_grad()
def apply_pairs(images: Tensor, pairs: Tensor) -> Tensor:
    """Each image through its pair of operations, first then second: magnitude U(0, 1) with a random sign."""
    for choice in (pairs // len(AUGMENTATIONS), pairs % len(AUGMENTATIONS)):
        images = apply_each(images, choice, 2 * torch.rand(len(images), device=images.device) - 1)
    return images

def policy_loss(tau: Tensor, pairs: Tensor, losses: Tensor) -> Tensor:
    """L^DA (Eq. 2): minus the sum over the batch of p_k(tau) L_k. The gradient goes to tau alone.
    tau (14, 14), pairs (B,) as drawn, losses (B,) of the same images. Its descent raises pairs whose summed
    loss exceeds the mean of these sums under p(tau): a pair drawn more often sums more, and gains."""
    p = tau.flatten().softmax(0)
    return -(p.gather(0, pairs) * losses.detach()).sum()  # Eq. (2)

# -------- Architecture (Eq. 4): b is learned, alpha is recovered from it, its support is the architecture ---
# Compressed sensing: a node's alpha, up to 35 numbers of which 2 matter, is coded as b = A alpha, 7 numbers;
# A is random and fixed. ista decodes: of the alphas whose code is b, nearly, that of least norm |alpha|_1.

def soft_threshold(x: Tensor, threshold: Tensor) -> Tensor:
    """The shrinkage operator of Eq. (4)."""
    return x.sign() * (x.abs() - threshold).clamp(min=0)

def momentum(G: Tensor, c: Tensor, L: Tensor, lam: Tensor, alpha: Tensor, iterations: int = 50) -> Tensor:
    """Eq. (4) with Beck & Teboulle's momentum, restarted where it points uphill (O'Donoghue & Candes).
    G = A^T A (..., n, n); c = A^T b and alpha (..., n); L = |G|_2 and lam (..., 1)."""
    y, t = alpha, torch.ones_like(L)
    for _ in range(iterations):
        gradient = (G @ y.unsqueeze(-1)).squeeze(-1) - c  # A^T (A y - b)
        new = soft_threshold(y - gradient / L, lam / L)  # Eq. (4)
        uphill = ((y - new) * (new - alpha)).sum(-1, keepdim=True) > 0
        t_new = torch.where(uphill, 1.0, (1 + (1 + 4 * t * t).sqrt()) / 2)
        y = new + torch.where(uphill, 0.0, (t - 1) / t_new) * (new - alpha)
        alpha, t = new, t_new
    return alpha

def polish(G: Tensor, c: Tensor, L: Tensor, lam: Tensor, alpha: Tensor) -> Tensor:
    """Towards the minimum with alpha's support and signs, as far as the signs hold (FPC-AS, Wen et al.)."""
    inside = alpha != 0
    block = torch.where(inside.unsqueeze(-1) & inside.unsqueeze(-2), G, 0.0)
    block = block + torch.diag_embed(torch.where(inside, 1e-12 * L, 1.0))
    slope = c - (G @ alpha.unsqueeze(-1)).squeeze(-1)  # A^T (b - A alpha)
    best = alpha + torch.linalg.solve_ex(block, torch.where(inside, slope - lam * alpha.sign(), 0.0)).result
    reach = torch.where(best * alpha < 0, alpha / (alpha - best), 1.0)  # until its sign would flip
    shortest = reach.amin(-1, keepdim=True)
    flips = (reach <= shortest) & (shortest < 1)
    return torch.where(flips, 0.0, alpha + shortest * (best - alpha))

@torch.no_grad()
def ista(A: Tensor, b: Tensor, lam: float, tolerance: float = 1e-9, rounds: int = 2000) -> Tensor:
    """argmin over alpha of 1/2 |A alpha - b|^2 + lam |alpha|_1 by iterative shrinkage (Eq. 4), all at once.
    A (..., m, n), b (..., m) -> alpha (..., n). Works in float64 and returns b's type. `tolerance` bounds the
    violation of the KKT conditions, relative to max |A^T b|. Raises ArithmeticError after `rounds`.

    Eq. (4) alone is hopeless: n > m makes the problem flat; at lam = 1e-5 the support is wrong after 1,000
    iterations. Known remedies: momentum; continuation (Hale et al.): lam starts at max |A^T b| / 2 and is
    halved every round; and the polish, which cuts 100,000 iterations for 100 problems of 7 x 40 to 1,150."""
    G = A.double().mT @ A.double()  # A^T A (..., n, n)
    c = (b.double().unsqueeze(-2) @ A.double()).squeeze(-2)  # A^T b (..., n)
    L = torch.linalg.matrix_norm(G, 2).unsqueeze(-1).clamp(min=1e-30)  # Lipschitz constant of the gradient
    largest, alpha = c.abs().amax(-1, keepdim=True), torch.zeros_like(c)
    lam_now = (largest / 2).clamp(min=lam)  # (..., 1)
    for _ in range(rounds):
        alpha = momentum(G, c, L, lam_now, alpha)
        for _ in range(3):
            alpha = polish(G, c, L, lam_now, alpha)
        slope = c - (G @ alpha.unsqueeze(-1)).squeeze(-1)  # A^T (b - A alpha)
        kkt = torch.where(alpha == 0, (slope.abs() - lam).clamp(min=0), (slope - lam * alpha.sign()).abs())
        if (lam_now <= lam).all() and (kkt <= tolerance * largest).all():
            return alpha.to(b.dtype)
        lam_now = (lam_now / 2).clamp(min=lam)  # continuation
    raise ArithmeticError(f"ISTA did not converge, KKT residual {float(kkt.max()):.1e}: try another --lasso")

NODES = 4  # intermediate nodes of a cell; node j reads the states 0..j+1: 14 edges
OPS, M = PRIMITIVES[1:], 7  # without "none"; M: numbers of a node's b, as many as operations by chance
SPACES = {"cells": OPS, "mobilenet": common.MOBILE_PRIMITIVES}  # 7 operations each

def select_support(alpha: Tensor, states: list[int], keep: int, ops: tuple[str, ...]) -> list:
    """alpha (K, n), entry 7 * state + operation, to what each of K nodes keeps: `keep` of (operation, state).
    The strongest operation of every edge by |alpha|, then the strongest edges (ISTA-NAS). Node k reads the
    states 0 .. states[k] - 1."""
    strength, op = alpha.abs().view(len(states), -1, len(ops)).max(2)  # of every edge, (K, n / 7)
    chosen = [strength[k, :count].topk(keep).indices.sort().values.tolist() for k, count in enumerate(states)]
    return [[(ops[op[k, state]], state) for state in chosen[k]] for k in range(len(states))]

def norms(op: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in op.modules() if isinstance(module, nn.BatchNorm2d)]

class SparseCell(nn.Module):
    """A DARTS cell with all candidates; two a node run. c_before, c_in: channels of s0, s1; halved: s0 has
    twice s1's size. A candidate ends in a batch norm, whose weight is 1 and bias 0 until the node freezes."""
    def __init__(self, c_before: int, c_in: int, channels: int, reduction: bool, halved: bool):
        super().__init__()
        build = FactorizedReduce if halved else common.relu_conv_bn
        self.preprocess0, self.preprocess1 = build(c_before, channels), common.relu_conv_bn(c_in, channels)
        self.first = NODES * reduction  # of the supernet's nodes those from here on are this cell's
        self.nodes = nn.ModuleList(nn.ModuleDict() for _ in range(NODES))
        for j, node in enumerate(self.nodes):
            for state, name in ((state, name) for state in range(j + 2) for name in OPS):
                op = common.operation(name, channels, 2 if reduction and state < 2 else 1)
                if not norms(op):
                    op.append(nn.BatchNorm2d(channels))
                node[f"{name}_{state}"] = op

    def forward(self, s0: Tensor, s1: Tensor, support: list, weights: list, drop_path_prob: float) -> Tensor:
        """support: per node two (operation, state); weights: per node two 0-dim tensors, or None twice."""
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        for j, node in enumerate(self.nodes):
            total = 0
            for (name, state), weight in zip(support[j], weights[j]):
                op = node[f"{name}_{state}"]
                h = op(states[state])
                if self.training and drop_path_prob > 0 and not isinstance(op[0], nn.Identity):
                    h = common.drop_path(h, drop_path_prob)
                total = total + (h if weight is None else weight * h)  # alpha_j^T o_j (section 2.3)
            states.append(total)
        return torch.cat(states[2:], 1)  # (B, 4 channels, H, W)

def conv_bn_relu6(c_in: int, c_out: int, k: int, stride: int = 1) -> list[nn.Module]:
    """MobileNetV2's layer."""
    return [*common.conv_bn(c_in, c_out, k, stride), nn.ReLU6()]

def mobile_operation(name: str, c_in: int, c_out: int, stride: int) -> nn.Sequential:
    """One of common.MOBILE_PRIMITIVES without its shortcut, or mbconv1_3x3 (MobileNetV2, ProxylessNAS): 1x1
    to `expansion` times the width, which 1 leaves out; depthwise k x k with the stride; 1x1, linear."""
    if name == "skip_connect":
        return nn.Sequential(nn.Identity())
    wide, k = int(name[6]) * c_in, int(name[-1])
    expand = conv_bn_relu6(c_in, wide, 1) if wide > c_in else []
    depthwise = nn.Conv2d(wide, wide, k, stride, k // 2, groups=wide, bias=False)
    middle = [depthwise, nn.BatchNorm2d(wide), nn.ReLU6()]
    return nn.Sequential(*expand, *middle, *common.conv_bn(wide, c_out, 1))

class MobileLayer(nn.Module):
    """A layer of ProxylessNAS' space with all candidates, one runs: node number `first`, which chooses one of
    x + MBConv(x), without the x where stride or width change, and x alone. (B, c_in, H, W) to H/stride."""
    def __init__(self, first: int, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.first, self.width, self.stride = first, c_out, stride
        self.shortcut = stride == 1 and c_in == c_out
        ops = SPACES["mobilenet"] if self.shortcut else SPACES["mobilenet"][:-1]  # without skip_connect
        build = {f"{name}_0": mobile_operation(name, c_in, c_out, stride) for name in ops}
        self.nodes = nn.ModuleList([nn.ModuleDict(build)])

    def forward(self, s0: Tensor, x: Tensor, support: list, weights: list, drop_path_prob: float) -> Tensor:
        """As SparseCell's; s0 is not read."""
        (name, state), weight = support[0][0], weights[0][0]
        if name == "skip_connect":  # no norm could absorb a weight: it is 1, with the weight's gradient
            return x if weight is None else x * (1 + (weight - weight.detach()))
        h = self.nodes[0][f"{name}_{state}"](x)
        if self.training and drop_path_prob > 0 and self.shortcut:
            h = common.drop_path(h, drop_path_prob)
        h = h if weight is None else weight * h
        return x + h if self.shortcut else h

class SparseSupernet(nn.Module):
    """ISTA-NAS' one-stage supernet: all candidates of every cell or layer exist, only the support's ever run.
    Input: normalised images (B, 3, H, W). Output: logits (B, num_classes); with `auxiliary`, in training, the
    pair (logits, auxiliary logits). space "cells": `layers` cells share 8 nodes, normal 0..3 and reduce 0..3,
    each keeps 2 of 7 operations on up to 5 states. space "mobilenet": `layers` (5 n + 1) nodes keep 1 of 7;
    `channels` is the stem's (paper: 32). stem: "cifar" or, for images from 64 pixels on, "imagenet".
    Node k of K has b[k] (7,), A[k] (7, n; zeros where it has fewer candidates), alpha[k] (n,), entry
    7 * state + operation, and support[k]; n is 35 or 7."""
    def __init__(self, channels: int, num_classes: int, layers: int, auxiliary: bool = False,
                 b_scale: float = 1e-3, space: str = "cells", stem: str = "cifar"):
        super().__init__()
        self.space, self.ops, self.drop_path_prob, self.auxiliary = space, SPACES[space], 0.0, None
        self.auxiliary_at = 2 * layers // 3 if auxiliary else -1
        build = {"cells": self.build_cells, "mobilenet": self.build_mobilenet}[space]
        build(channels, num_classes, layers, stem)
        K = len(self.states)
        for norm in (norm for cell in self.cells for op in cell.nodes for norm in norms(op)):
            norm.requires_grad_(False)
        A = torch.rand(K, M, len(self.ops) * max(self.states))
        for cell in self.cells:
            for k, node in enumerate(cell.nodes, cell.first):
                A[k, :, len(node) :] = 0
        self.register_buffer("A", A)
        self.register_buffer("alpha", torch.zeros(K, A.shape[2]))
        self.register_buffer("A_S", torch.zeros(K, M, self.kept))
        self.register_buffer("alpha_S", torch.zeros(K, self.kept))
        self.b = nn.ParameterList(b_scale * torch.randn(M) for _ in range(K))
        self.frozen, self.support = [False] * K, [[]] * K
        self.recover()

    def build_cells(self, C: int, num_classes: int, layers: int, stem: str) -> None:
        """DARTS' cells: reductions at layers//3 and 2 layers//3."""
        self.states, self.kept = [2, 3, 4, 5] * 2, 2
        self.stem, self.stem1, c_in, halved = common.stems(stem, C)
        c_before, self.cells = c_in, nn.ModuleList()
        for i in range(layers):
            reduction = i in (layers // 3, 2 * layers // 3)
            C = 2 * C if reduction else C
            self.cells.append(SparseCell(c_before, c_in, C, reduction, halved))
            c_before, c_in, halved = c_in, NODES * C, reduction
            if i == self.auxiliary_at:
                self.auxiliary = common.auxiliary_head(c_in, num_classes, stem)
        self.head, self.classifier = nn.Identity(), nn.Linear(c_in, num_classes)

    def build_mobilenet(self, C: int, num_classes: int, layers: int, stem: str) -> None:
        """ProxylessNAS' layers: a fixed MBConv, stages of (layers - 1) / 5 layers and a last one of 1."""
        self.states, self.kept = [1] * layers, 1
        width = lambda channels: max(round(channels * C / 32), 1)  # the paper's at C = 32
        first, n = 2 if stem == "imagenet" else 1, layers // 5
        self.stem = nn.Sequential(*conv_bn_relu6(3, C, 3, first))
        self.stem1 = mobile_operation("mbconv1_3x3", C, width(16), 1)
        c_in, self.cells = width(16), nn.ModuleList()
        stages = (24, first, n), (40, 2, n), (80, 2, n), (96, 1, n), (192, 2, n), (320, 1, 1)
        for c_out, stride, count in ((width(c), stride, count) for c, stride, count in stages):
            for i in range(count):
                self.cells.append(MobileLayer(len(self.cells), c_in, c_out, stride if i == 0 else 1))
                c_in = c_out
        self.head = nn.Sequential(*conv_bn_relu6(c_in, width(1280), 1))
        self.classifier = nn.Linear(width(1280), num_classes)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):  # strengths are float32 with --amp too
            none = (None,) * self.kept
            weights = [none if frozen else self.strength(k) for k, frozen in enumerate(self.frozen)]
        s0 = self.stem(x)
        s1, auxiliary = self.stem1(s0), None
        for i, cell in enumerate(self.cells):
            mine = slice(cell.first, cell.first + len(cell.nodes))
            s0, s1 = s1, cell(s0, s1, self.support[mine], weights[mine], self.drop_path_prob)
            if i == self.auxiliary_at and self.training and self.auxiliary is not None:
                auxiliary = self.auxiliary(s1)
        logits = self.classifier(self.head(s1).mean((2, 3)))
        return logits if auxiliary is None else (logits, auxiliary)

    def strength(self, k: int) -> Tensor:
        """Node k's weights, (kept,), a function of b. A_S (7, kept), alpha_S (kept,): on the support."""
        A_S, alpha_S = self.A_S[k], self.alpha_S[k]
        E_alpha = A_S.T @ (A_S @ alpha_S) - alpha_S  # E = A^T A - I
        return A_S.T @ self.b[k] - E_alpha  # b^T A - alpha^T E (section 2.3): alpha, where b = A alpha

    @torch.no_grad()
    def recover(self, lam: float = 1e-5, accept=lambda: True) -> list[float]:
        """Solve Eq. (4) for the nodes that are not frozen; their strongest operations become self.support.
        accept() then looks at it. Returns how far every alpha moved; [] if refused: then all is as before."""
        live = [k for k, frozen in enumerate(self.frozen) if not frozen]
        alpha, before = self.alpha.clone(), self.support
        alpha[live] = ista(self.A[live], torch.stack([self.b[k] for k in live]), lam)
        if dist.is_initialized():
            dist.broadcast(alpha, 0)  # one support in all processes
        found = select_support(alpha.cpu(), self.states, self.kept, self.ops)
        self.support = [before[k] if frozen else found[k] for k, frozen in enumerate(self.frozen)]
        if not accept():
            self.support = before
            return []
        moved = (alpha - self.alpha).norm(dim=1).tolist()
        self.alpha.copy_(alpha)
        for k in live:
            S = [len(self.ops) * state + self.ops.index(name) for name, state in self.support[k]]
            self.A_S[k], self.alpha_S[k] = self.A[k][:, S], alpha[k, S]
        return moved

    def operations(self, k: int) -> list[nn.Module]:
        """Node k's operations in each of its cells, cell by cell."""
        cells = [cell for cell in self.cells if cell.first <= k < cell.first + len(cell.nodes)]
        nodes = [cell.nodes[k - cell.first] for cell in cells]
        return [node[f"{name}_{state}"] for node in nodes for name, state in self.support[k]]

    @torch.no_grad()
    def freeze(self, k: int) -> None:
        """End the search of node k: its last norms absorb the strengths; all its norms learn from here on."""
        for i, op in enumerate(self.operations(k)):
            for norm in norms(op)[-1:]:
                norm.weight.mul_(self.strength(k)[i % self.kept])
            op.requires_grad_(True)
        self.frozen[k], self.b[k].grad = True, None  # without a gradient Adam leaves b alone

    def keep(self, genotype: Genotype | list[str]) -> SparseSupernet:
        """Prune: of the operations the genotype's stay, and nothing to search. Returns itself."""
        self.support = support_of(genotype)
        fits = [len(node) for node in self.support] == [self.kept] * len(self.states)
        for cell in self.cells:
            for k, node in enumerate(cell.nodes, cell.first):
                mine = {f"{name}_{state}" for name, state in self.support[k]} if fits else set()
                if len(mine & node.keys()) < self.kept:
                    raise InputError(f"the genotype does not fit --space {self.space} with its --layers")
                for key in node.keys() - mine:
                    del node[key]
                node.requires_grad_(True)
        self.frozen, self.b = [True] * len(self.states), nn.ParameterList()
        self.A = self.alpha = self.A_S = self.alpha_S = None
        return self

    def skip_connects(self) -> int:
        """How many of the normal cell's 8 operations, or of the layers, are skip-connections."""
        nodes = self.support[: len(self.support) // self.kept]
        return sum(name == "skip_connect" for node in nodes for name, _ in node)

    def genotype(self) -> Genotype | list[str]:
        """The support as a genotype: of cells, or the operation of every layer."""
        edges = [edge for node in self.support for edge in node]
        if self.kept == 1:
            return [name for name, _ in edges]
        return Genotype(edges[: 2 * NODES], [2, 3, 4, 5], edges[2 * NODES :], [2, 3, 4, 5])

def support_of(genotype: Genotype | list[str]) -> list[list[tuple[str, int]]]:
    """What every node of SparseSupernet keeps, (operation, state). InputError for cells of other shapes."""
    if isinstance(genotype, list):
        return [[(name, 0)] for name in genotype]
    edges = [tuple(edge) for edge in (*genotype.normal, *genotype.reduce)]
    support = list(zip(edges[::2], edges[1::2]))
    shape = [len(genotype.normal), genotype.normal_concat, len(genotype.reduce), genotype.reduce_concat]
    if shape != [8, [2, 3, 4, 5]] * 2 or any(first == second for first, second in support):
        raise InputError("dha's cells have 4 nodes, all concatenated, with two different edges each")
    return [list(pair) for pair in support]

# -------- Hyper-parameters (Eq. 3) --------------------------------------------------------------------------

LR_RANGE, WD_RANGE = (1e-4, 0.1), (0.0, 1e-2)  # where Eq. (3) may move them; the paper gives no range

@torch.no_grad()
def hypergradient(grads: list, velocities: list, params: list, lr: Tensor | float) -> tuple[Tensor, Tensor]:
    """The gradient of Eq. (3), (dL/dlr, dL/dwd), for theta+ = theta - lr v with v = mu v0 + g + wd theta.
    grads: dL/dtheta at theta+ (before clipping); velocities: that update's v; params: theta+; lr: its rate.
    theta and v0 count as constant (section 2.2). No second pass: the next batch computes g anyway."""
    g, v, theta = (torch.cat([t.flatten() for t in tensors]) for tensors in (grads, velocities, params))
    along = g @ v
    d_lr = -along  # dtheta+/dlr = -v
    d_wd = -lr * (g @ theta + lr * along)  # dtheta+/dwd = -lr theta, theta = theta+ + lr v
    return d_lr, d_wd

@torch.no_grad()
def sgd_step(params: list, grads: list, velocities: list, lr: Tensor, wd: Tensor, mu: float = 0.9) -> None:
    """v = mu v + g + wd theta; theta = theta - lr v, in place. lr, wd: 0-dim tensors, so no step waits."""
    torch._foreach_mul_(velocities, mu)
    torch._foreach_add_(velocities, grads)
    torch._foreach_add_(velocities, torch._foreach_mul(params, wd))
    torch._foreach_sub_(params, torch._foreach_mul(velocities, lr))

# -------- One step of everything (Fig. 1) -------------------------------------------------------------------

RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))  # of torchrun

@torch.no_grad()
def average_gradients(params: list[Tensor]) -> None:
    """Under torchrun: every gradient becomes its mean over the processes, in place."""
    if dist.is_initialized():
        grads = [p.grad for p in params if p.grad is not None]
        total = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(total)
        for g, mean in zip(grads, (total / dist.get_world_size()).split([g.numel() for g in grads])):
            g.copy_(mean.view_as(g))

class DHA:
    """What a run learns: theta and b (in net), tau, eta = (lr, wd); and what their optimizers remember."""
    def __init__(self, args: argparse.Namespace, data: Data, device: torch.device):
        auxiliary, count = args.auxiliary_weight > 0, len(AUGMENTATIONS)
        size, stem = (args.channels, len(data.classes), args.layers), common.stem_for(data.train_images)
        self.net = SparseSupernet(*size, auxiliary, args.b_scale, args.space, stem)
        self.net.to(device, memory_format=torch.channels_last)
        self.theta = [p for name, p in self.net.named_parameters() if not name.startswith("b.")]
        self.velocity: dict[Tensor, Tensor] = {}  # v of what the last step moved
        self.b_optimizer = torch.optim.Adam(self.net.b, args.arch_lr, (0.5, 0.999), weight_decay=1e-3)
        self.tau = torch.zeros(count, count, device=device, requires_grad=True)
        self.lr, self.wd = (torch.tensor(x, device=device) for x in (args.lr, args.weight_decay))
        self.mean, self.std = common.mean_std(data.train_images)

def train_step(s: DHA, images: Tensor, labels: Tensor, args: argparse.Namespace) -> Tensor:
    """One iteration on uint8 images (B, 3, H, W), cropped and flipped at random, and labels (B,).
    Returns (loss, accuracy in %), detached."""
    x = images / 255
    if not args.no_da:
        pairs = sample_pairs(s.tau, len(x))
        x = apply_pairs(x, pairs)
    x = common.cutout(common.normalize(x, s.mean, s.std), args.cutout)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=args.amp):
        out = s.net(x)
    logits, *auxiliary = out if isinstance(out, tuple) else (out,)
    L = partial(F.cross_entropy, target=labels, reduction="none", label_smoothing=args.label_smoothing)
    losses = L(logits.float())  # L_k, (B,)
    for head in auxiliary:
        losses = losses + args.auxiliary_weight * L(head.float())

    for p in [*s.velocity, *s.net.b, s.tau]:
        p.grad = None
    losses.mean().backward()  # gradients of theta and of b (section 2.3)
    if not args.no_da:
        policy_loss(s.tau, pairs, losses).backward()
    theta = [p for p in s.theta if p.grad is not None]  # of the operations that ran
    average_gradients([*theta, *s.net.b, s.tau])

    if not args.no_da:
        s.tau.data -= args.tau_lr * WORLD * s.tau.grad  # Eq. (2) is a sum, average_gradients took the mean
    s.b_optimizer.step()
    both = [p for p in s.velocity if p.grad is not None]  # theta+: moved in the last step, used in this
    if both and not args.no_hpo:
        d_lr, d_wd = hypergradient([p.grad for p in both], [s.velocity[p] for p in both], both, s.lr)
        lr_step, wd_step = args.max_lr_step * s.lr, args.max_wd_step
        s.lr.sub_((args.beta_lr * d_lr).clamp(-lr_step, lr_step)).clamp_(*LR_RANGE)  # Eq. (3)
        s.wd.sub_((args.beta_wd * d_wd).clamp(-wd_step, wd_step)).clamp_(*WD_RANGE)  # Eq. (3)

    nn.utils.clip_grad_norm_(theta, args.grad_clip)
    s.velocity = {p: s.velocity[p] if p in s.velocity else torch.zeros_like(p) for p in theta}
    sgd_step(theta, [p.grad for p in theta], list(s.velocity.values()), s.lr, s.wd)
    return torch.stack([losses.mean(), 100 * (logits.argmax(1) == labels).float().mean()]).detach()

# -------- The loop: search and training are one -------------------------------------------------------------

DHA_PRESETS = {  # where they differ from the flags' defaults, which are the CIFAR-10 settings
    "quick": dict(dataset="shapes", search_epochs=3, train_epochs=4, channels=8, layers=3, batch_size=64,
                  lr=0.05, beta_lr=3e-4, beta_wd=1e-3, tau_lr=0.25, arch_lr=3e-3, b_scale=0.1,
                  drop_path=0.0, auxiliary_weight=0.0, cutout=0),
    "imagenet": dict(dataset="imagenet", channels=48, layers=14, batch_size=128, train_epochs=250, lr=0.1,
                     weight_decay=3e-5, warmup_epochs=5, label_smoothing=0.1, drop_path=0.0, cutout=0),
    "mobilenet": dict(channels=32, layers=21, auxiliary_weight=0.0, drop_path=0.0),  # ProxylessNAS' size
    "mobilenet quick": dict(channels=8, layers=11, search_epochs=2, train_epochs=6, beta_lr=1e-4,
                            b_scale=0.5),
}

progress = partial(tqdm, leave=False, disable=RANK > 0, mininterval=0.1 if sys.stderr.isatty() else 30)

def epoch_means(meters: Tensor, learned: list[Tensor], epoch: int, flags: str) -> list[float]:
    """Means over an epoch's steps of what was measured, (steps, n) -> n. FloatingPointError if not finite."""
    if WORLD > 1:
        dist.all_reduce(meters.div_(WORLD))
    finite = meters.isfinite().all(1).tolist()
    if not (all(finite) and all(p.isfinite().all() for p in learned)):
        step = [*finite[:-1], False].index(False) + 1
        raise FloatingPointError(f"the loss is not finite at epoch {epoch + 1}, step {step}: start again "
                                 f"with a lower {flags}; the last good checkpoint is kept")
    return meters.mean(0).tolist()

def start_device(args: argparse.Namespace) -> torch.device:
    """The device of --gpu, and the process group of torchrun, whose processes take a GPU each."""
    gpus = torch.cuda.device_count()
    gpu = min(gpus, 1) - 1 if args.gpu is None else args.gpu  # 0, or -1 without a GPU
    if WORLD > 1:
        gpu = int(os.environ["LOCAL_RANK"]) if gpu >= 0 else gpu
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
    if gpu >= gpus or (gpu < 0 and args.amp):
        raise InputError(f"no such GPU, this machine has {gpus}: --gpu -1, without --amp, is the CPU")
    if gpu < 0:
        full = args.preset != "quick" and not (args.evaluate or args.resume)
        print("running on the CPU" + "; the paper's settings want a GPU" * full)
        return torch.device("cpu")
    print("running on", torch.cuda.get_device_name(gpu))
    torch.cuda.set_device(gpu)
    torch.backends.cudnn.benchmark = True
    return torch.device("cuda", gpu)

def load_data(args: argparse.Namespace, device: torch.device) -> Data:
    """The data set of the flags, on the device. Raises InputError where nothing can be trained on it."""
    if RANK:
        dist.barrier()  # one process downloads while the others wait
    names = "dataset data_dir image_size limit_train limit_test workers seed cache_gb skip_damaged".split()
    data = common.load_data(*(getattr(args, name) for name in names))
    if WORLD > 1 and RANK == 0:
        dist.barrier()
    H, W = data.train_images.shape[-2:]
    if H != W or len(data.classes) < 2 or len(data.train_images) < 2:
        raise InputError(f"images are {W}x{H}: --image-size makes them square; there must be 2, of 2 classes")
    if (H < 29 or 64 <= H < 193) and getattr(args, "auxiliary_weight", 0):  # the imagenet stem from 64 on
        raise InputError(f"{H} pixels are too few for the auxiliary head: give --auxiliary-weight 0")
    return data.to(device)

def overrun(net: SparseSupernet, args: argparse.Namespace, image_size: int) -> float:
    """Eq. (1): the largest c_i(alpha) / C_i, of parameters and multiply-adds of the support's network."""
    active = {p for k in range(len(net.frozen)) for op in net.operations(k) for p in op.parameters()}
    idle = {*net.b.parameters(), *(p for cell in net.cells for p in cell.nodes.parameters())} - active
    c = common.count_parameters(net) - sum(p.numel() for p in idle)
    shares = [c / args.max_params if args.max_params else 0.0]
    if args.max_flops:
        shares.append(common.count_flops(net, image_size) / args.max_flops)
    return max(shares)

def within_limits(net: SparseSupernet, args: argparse.Namespace, image_size: int) -> bool:
    return overrun(net, args, image_size) <= 1  # Eq. (1): c_i(alpha) <= C_i

def start(args: argparse.Namespace, data: Data, device: torch.device) -> DHA:
    """What a run begins with. While the support breaks the constraints, node after node gets a b that makes a
    random operation its strongest, and keeps it if that comes nearer. InputError after 300 draws."""
    torch.manual_seed(args.seed)
    s, size = DHA(args, data, device), data.train_images.shape[-1]
    if args.genotype:
        s.theta = list(s.net.keep(common.parse_genotype(args.genotype, args.space)).parameters())
    else:
        s.net.recover(args.lasso)
    nearest = overrun(s.net, args, size)
    for n in range(0 if args.genotype else 300):
        if nearest <= 1:
            break
        b, A = s.net.b[n % len(s.net.b)], s.net.A[n % len(s.net.b)]
        last, i = b.detach().clone(), int(torch.randint(int(A.any(0).sum()), ()))
        b.data.copy_(args.b_scale * (A[:, i] + 0.02 * torch.randn_like(b)))  # alpha: about one-hot
        s.net.recover(args.lasso)
        found = overrun(s.net, args, size)
        if found > nearest:
            b.data.copy_(last)
        nearest = min(nearest, found)
    if nearest > 1:
        raise InputError("no architecture to start with keeps --max-params and --max-flops: raise them")
    return s

def state_of(s: DHA) -> dict:
    state = {"tau": s.tau.detach(), "lr": s.lr, "wd": s.wd, "net": s.net.state_dict()}
    state |= {"support": s.net.support, "frozen": s.net.frozen}
    state |= {"velocity": [s.velocity.get(p) for p in s.theta]}
    return state | {"b_optimizer": s.b_optimizer.state_dict()}

def restore(s: DHA, state: dict) -> None:
    s.net.support = state["support"]
    for k, frozen in enumerate(state["frozen"]):
        if frozen and not s.net.frozen[k]:
            s.net.freeze(k)
    if all(s.net.frozen):
        s.theta = list(s.net.keep(s.net.genotype()).parameters())
    s.net.load_state_dict(state["net"])
    for mine, saved in ((s.tau.data, state["tau"]), (s.lr, state["lr"]), (s.wd, state["wd"])):
        mine.copy_(saved)
    pairs = [(p, v) for p, v in zip(s.theta, state["velocity"]) if v is not None]
    s.velocity = {p: torch.zeros_like(p).copy_(v) for p, v in pairs}
    s.b_optimizer.load_state_dict(state["b_optimizer"])

def search_and_train(s: DHA, args: argparse.Namespace, data: Data, run: argparse.Namespace) -> None:
    """At most --search-epochs until every node is frozen, then --train-epochs with the same weights."""
    images, labels, device = data.train_images, data.train_labels, data.train_images.device
    fits = partial(within_limits, s.net, args, images.shape[-1])
    if run.history:
        restore(s, run.state["dha"])
    searched = sum(record["phase"] == "search" for record in run.history)
    while not all(s.net.frozen) or len(run.history) < searched + args.train_epochs:
        begun, epoch, phase = time.time(), len(run.history), "train" if all(s.net.frozen) else "search"
        seed, share = args.seed * 100_003 + epoch, (epoch - searched) / max(args.train_epochs, 1)
        torch.manual_seed(seed * 1_009 + RANK)  # every epoch: a resumed run needs no generator's state
        s.net.train().drop_path_prob = args.drop_path * share
        if args.no_hpo:  # ISTA-NAS: constant while searching, then cosine to lr / 25
            s.lr.fill_(args.lr * (0.04 + 0.48 * (1 + math.cos(math.pi * share))))
        if epoch < args.warmup_epochs:  # Eq. (3) moves it from there on
            s.lr.fill_(args.lr * (epoch + 1) / args.warmup_epochs)
        order = common.batches(len(images), args.batch_size, seed, RANK, WORLD).to(device)
        meters = torch.zeros(len(order), 2, device=device)
        bar = progress(common.loader(images, labels, order, True), f"{phase}, epoch {epoch + 1}", len(order))
        for step, (x, y) in enumerate(bar):
            meters[step] = train_step(s, x, y, args)
            if step % 20 == 19:
                means = meters[: step + 1].mean(0).tolist() + [float(s.lr), float(s.wd)]
                bar.set_postfix_str("loss {:.3f} {:.1f}% lr {:.4f} wd {:.1e}".format(*means), refresh=False)
        learned = [*s.velocity, *s.net.b, s.tau, s.lr, s.wd]
        loss, accuracy = epoch_means(meters, learned, epoch, "--lr, --beta-lr or --tau-lr")
        test = evaluate(s.net, data.test_images, data.test_labels, s.mean, s.std, RANK, WORLD)
        record = {"epoch": epoch + 1, "phase": phase, "loss": loss, "train_accuracy": accuracy}
        record |= {"test_accuracy": test, "lr": float(s.lr), "wd": float(s.wd), "frozen": sum(s.net.frozen)}
        record["entropy"] = float(torch.special.entr(s.tau.detach().flatten().softmax(0)).sum())  # nats
        skips = s.net.skip_connects()
        record |= {"support": s.net.support, "skip_connects": skips}  # as trained; what follows changes it
        if phase == "search":
            if skips > len(s.net.frozen) // 2:
                print("warning: most operations of the normal cell, or layers, are skip-connections")
            fixed = [k for k, frozen in enumerate(s.net.frozen) if not frozen]  # as last trained
            if epoch + 1 < args.search_epochs:
                moved = record["moved"] = s.net.recover(args.lasso, fits)
                if not moved:
                    print("the new support breaks --max-params or --max-flops: the last one stays")
                near = [k for k, distance in enumerate(moved) if distance <= args.freeze_distance]
                fixed = [k for k in fixed if k in near and s.net.alpha_S[k].any()]
            for k in fixed:
                s.net.freeze(k)
            if all(s.net.frozen):
                s.theta = list(s.net.keep(s.net.genotype()).parameters())
            searched += 1
        end_epoch(run, record, begun, dha=state_of(s))

@torch.no_grad()
def evaluate(net: nn.Module, images: Tensor | Photos, labels: Tensor, mean: Tensor, std: Tensor,
             rank: int = 0, world: int = 1) -> float:
    """Accuracy in % on a data set's images, shared by the processes; leaves the network's mode as it was."""
    training, order = net.training, torch.arange(len(labels), device=labels.device)[rank::world]
    if world > 1:
        for buffer in net.buffers():  # the running statistics of batch norm are rank 0's
            dist.broadcast(buffer, 0)
    counts = torch.zeros(2, device=labels.device)  # correct, seen
    net.eval()
    for x, y in common.loader(images, labels, order.split(500 if images.shape[3] < 64 else 50), train=False):
        counts[0] += (net(common.normalize(x, mean, std)).argmax(1) == y).sum()
        counts[1] += len(y)
    net.train(training)
    if world > 1:
        dist.all_reduce(counts)
    correct, seen = counts.tolist()
    return 100 * correct / seen

def load_model(path: str | Path, device: torch.device | str = "cpu") -> tuple[SparseSupernet, dict]:
    """The network in a model.pt, in eval mode, and what else the file holds (classes, mean, std, image_size).

    It takes images normalised with that mean and std: common.normalize(images, info["mean"], info["std"]).
    """
    try:
        info = torch.load(path, map_location=device, weights_only=True)
        size, kind = (info["channels"], len(info["classes"]), info["layers"]), (info["space"], info["stem"])
        net = SparseSupernet(*size, False, 1e-3, *kind)
        net.keep(common.parse_genotype(info["genotype"], info["space"]))
        net.load_state_dict(info.pop("state_dict"))
    except Exception as e:  # a damaged file can make the unpickler raise anything
        raise InputError(f"cannot read the model {path}: {type(e).__name__}: {e}".splitlines()[0]) from e
    return net.to(device).eval(), info


# =============================================================================
# Nothing below this line is the method: run directory, figures, flags, main.
# =============================================================================

def save(path: Path, content: dict) -> None:
    """Write a .pt or .json file whole or not at all; keep the last checkpoint as checkpoint.previous.pt."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            if path.suffix == ".pt":
                torch.save(content, file)
            else:
                file.write(json.dumps(content, indent=1).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as e:
        part.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {e}") from e
    if path.name == "checkpoint.pt" and path.exists():
        os.replace(path, path.with_name("checkpoint.previous.pt"))
    os.replace(part, path)

def load_checkpoint(out: Path) -> dict:
    """The newest checkpoint in `out` that can be read, {} if there is none. InputError if all are damaged."""
    found = [out / name for name in ("checkpoint.pt", "checkpoint.previous.pt") if (out / name).exists()]
    for path in found:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            return state | {"history": state["history"]}  # a KeyError in another kind of file
        except Exception as e:  # a damaged file can make the unpickler raise anything
            print(f"warning: {path} cannot be read ({type(e).__name__})")
    if found:
        raise InputError(f"no checkpoint in {out} can be read: delete {out} and start the run again")
    return {}

def read_json(path: Path, *names: str) -> dict:
    """What a config.json or result.json holds, args included. InputError, also where one of `names` lacks."""
    try:
        content = json.loads(path.read_text())
        content = content.get("args", {}) | content
        return content | {name: content[name] for name in names}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
        raise InputError(f"cannot use {path}: {type(e).__name__}: {e}") from e

def settings_of_run(args: argparse.Namespace, argv: list[str], seed: int) -> argparse.Namespace:
    """The settings of one seed, `out` among them; those of its config.json where --resume goes on with it.
    Writes nothing. Raises InputError where `out` holds something else, or a flag in argv is not the run's."""
    script, free = Path(__file__), "out resume repeats check gpu workers cache_gb data_dir".split()
    out = Path(args.out or f"runs/{script.stem}-{args.dataset}-seed{seed}")
    out = out / f"seed{seed}" if args.out and args.repeats > 1 else out
    now = vars(args) | {"seed": seed, "out": str(out)}
    begun = {"metrics.jsonl", "config.json.part", script.name}  # what a run has before its config.json
    if args.resume and (out / "config.json").exists():
        about = read_json(out / "config.json", "args", "script", *now)
        if (about["script"], len(about["args"])) != (script.name, len(now)):
            raise InputError(f"{out} is by {about['script']}, or outdated")
        own = {"out": str(out)} if args.repeats == 1 else {"out": str(out), "seed": seed}
        now = vars(parse_args(argv, about["args"])) | own
        for name in sorted(now.keys() - free):
            if now[name] != about["args"][name]:
                raise InputError(f"{out} was started with {name} = {about['args'][name]}: leave it out")
    elif out.exists() and not (out.is_dir() and {path.name for path in out.iterdir()} <= begun):
        raise InputError(f"{out} exists: choose another --out, or give a run's own flags and --resume")
    return argparse.Namespace(**now)

def open_run(args: argparse.Namespace, device: torch.device) -> argparse.Namespace:
    """Make the run directory --out, or go on with it: metrics.jsonl and its lock, config.json, the script.
    Returns out, log (metrics.jsonl, locked while the process lives), state (checkpoint), history, seconds."""
    out, script = Path(args.out), Path(__file__)
    out.mkdir(parents=True, exist_ok=True)
    log = open(out / "metrics.jsonl", "a")
    try:
        if RANK == 0:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"another process is writing {out}: wait for it, or choose another --out") from None
    state = {"history": [], "seconds": {}} | load_checkpoint(out)
    if RANK == 0:
        log.truncate(0)
        log.writelines(json.dumps(record) + "\n" for record in state["history"])
        log.flush()
    if RANK == 0 and not (out / "config.json").exists():
        (out / script.name).write_bytes(script.read_bytes())
        git = f"git -C {shlex.quote(str(script.parent))} rev-parse HEAD 2> {os.devnull}"
        about = {"script": script.name, "args": vars(args), "processes": WORLD, "device": str(device)}
        about |= {"torch": torch.__version__, "torchvision": torchvision.__version__, "python": sys.version}
        save(out / "config.json", about | {"git_commit": subprocess.getoutput(git) or None})
    return argparse.Namespace(out=out, log=log, state=state, **{k: state[k] for k in ("history", "seconds")})

def end_epoch(run: argparse.Namespace, record: dict, start: float, **parts: dict) -> None:
    """Print an epoch's record, append it to metrics.jsonl, and save the checkpoint with `parts`."""
    run.history.append(record)
    for key, count in ((record["phase"], 1), ("processes", WORLD)):
        run.seconds[key] = run.seconds.get(key, 0.0) + count * (time.time() - start)
    if RANK == 0:
        save(run.out / "checkpoint.pt", {"history": run.history, "seconds": run.seconds} | parts)
        print(json.dumps(record), file=run.log, flush=True)
        numbers = [f"{name} {v:.4g}" for name, v in record.items() if isinstance(v, (int, float))]
        print(record["phase"], *numbers, f"{time.time() - start:.0f} s", sep="  ", flush=True)

def run_dha(args: argparse.Namespace, device: torch.device) -> dict:
    """Search and train one network into the run directory --out; returns what its result.json holds."""
    out = Path(args.out)
    if (out / "result.json").exists():
        print(f"{out} is finished already")
        return read_json(out / "result.json")
    data = load_data(args, device)
    common.batches(len(data.train_images), args.batch_size, 0, RANK, WORLD)  # an error now, if there is one
    s = start(args, data, device)
    if args.check:
        return {"check": "passed"}
    run = open_run(args, device)
    search_and_train(s, args, data, run)
    if RANK:
        return {}
    net, genotype, size = s.net, s.net.genotype(), data.train_images.shape[-1]
    net.auxiliary = None
    method = ("given genotype" if args.genotype else "DHA") + " without DA" * args.no_da
    method = (method + " without HPO" * args.no_hpo).replace("DHA without DA without HPO", "One-Stage ISTA")
    result = {
        "test_accuracy": evaluate(net, data.test_images, data.test_labels, s.mean, s.std), "method": method,
        "train_loss": run.history[-1]["loss"], "dataset": args.dataset, "seed": args.seed,
        "params": common.count_parameters(net), "flops": common.count_flops(net, size),
        "epochs": len(run.history), "search_epochs": sum(r["phase"] == "search" for r in run.history),
        "seconds": run.seconds.get("search", 0.0) + run.seconds.get("train", 0.0), "genotype": str(genotype),
        "search_seconds": run.seconds.get("search", 0.0), "gpu_hours": run.seconds["processes"] / 3600}
    common.save_genotype(genotype, out / "genotype.json")
    p = s.tau.detach().cpu().flatten().softmax(0).view(s.tau.shape)
    if not args.no_da:
        save(out / "policy.json", {"operations": list(AUGMENTATIONS), "probability": p.tolist()})
    info = {"stem": common.stem_for(data.train_images), "classes": data.classes, "image_size": size}
    info |= {name: getattr(args, name) for name in ("channels", "layers", "space")}
    info |= {"genotype": str(genotype), "mean": s.mean.cpu(), "std": s.std.cpu()}
    save(out / "model.pt", info | {"state_dict": net.cpu().state_dict()})
    try:
        draw_dha(out, run.history, net, None if args.no_da else p)
    except Exception as e:  # whatever matplotlib raises: a trained network is not lost for a picture
        print(f"warning: not all figures could be drawn: {type(e).__name__}: {e}")
    save(out / "result.json", result)
    return result

def evaluate_run(argv: list[str], folder: Path, net: nn.Module, info: dict, device: torch.device) -> int:
    """--evaluate: the test accuracy of a finished run's network, on the run's data set if argv names none."""
    names = "dataset data_dir image_size limit_test seed".split()
    saved = read_json(folder / "config.json", *names)
    own = {name: saved[name] for name in names} | {"auxiliary_weight": 0.0, "limit_train": 2}
    data = load_data(parse_args(argv, own), device)
    if data.classes != info["classes"]:
        raise InputError(f"the data set has other classes than the model: {info['classes'][:3]} ...")
    accuracy = evaluate(net, data.test_images, data.test_labels, info["mean"], info["std"])
    print(f"test accuracy: {accuracy:.2f} % of {len(data.test_images)} images")
    return 0

def draw_run(out: Path, history: list[dict], genotype: Genotype | None, panels: dict[str, list[str]]):
    """Draw the cells, and curves from metrics.jsonl (panels: title -> names). Returns pyplot or None."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return print("no figures: matplotlib is missing (pip install matplotlib)")
    plt.switch_backend("agg")
    if genotype:
        figure, axes = plt.subplots(2, 1, figsize=(10, 6.4))
        common.draw_cell(genotype.normal, genotype.normal_concat, axes[0], "Normal cell")
        common.draw_cell(genotype.reduce, genotype.reduce_concat, axes[1], "Reduction cell")
        figure.savefig(out / "cells.png", bbox_inches="tight", dpi=150)
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.4), layout="constrained")
    for axis, (title, names) in zip(axes, panels.items()):
        for name in names:
            records = [r for r in history if name in r]
            axis.plot([r["epoch"] for r in records], [r[name] for r in records], ".-", label=name)
        axis.set(title=title, xlabel="epoch (dashed: the search ends)")
        axis.locator_params(axis="x", integer=True)
        axis.axvline(0.5 + sum(r["phase"] != "train" for r in history), color="0.5", linestyle="--")
        axis.legend()
    figure.savefig(out / "curves.png", dpi=150)
    return plt

def draw_dha(out: Path, history: list[dict], net: SparseSupernet, p: Tensor | None) -> None:
    """Write the figures of a run; p (14, 14) is the policy at the end."""
    genotype, kept, acc = net.genotype(), net.kept, ["train_accuracy", "test_accuracy"]
    panels = {"loss (nats)": ["loss"], "accuracy (%)": acc, "learning rate": ["lr"], "weight decay": ["wd"]}
    plt = draw_run(out, history, genotype if kept == 2 else None, panels)
    if plt and kept == 1:
        figure, axis = plt.subplots(figsize=(max(0.5 * len(genotype), 5), 2.6), layout="constrained")
        for i, (layer, name) in enumerate(zip(net.cells, genotype)):
            axis.bar(i, {"3": 3, "5": 5, "7": 7}.get(name[-1], 0), color=("#56B4E9", "#0072B2")["6_" in name])
            axis.text(i, 0.2, f"{layer.width}{' /2' * (layer.stride == 2)}", ha="center", fontsize=8)
        axis.set(yticks=[3, 5, 7], ylim=(0, 7.5), ylabel="kernel", xlabel="layer (width /stride; dark: x 6)")
        figure.savefig(out / "layers.png", dpi=150)
    if plt and p is not None:
        figure, axis = plt.subplots(figsize=(7.5, 6.4), layout="constrained")
        figure.colorbar(axis.imshow(100 * p.numpy()), label="probability of the pair (%; uniform: 0.51)")
        axis.set_xticks(range(14), AUGMENTATIONS, rotation=90)
        axis.set_yticks(range(14), AUGMENTATIONS)
        axis.set(xlabel="second operation", ylabel="first operation", title="Policy at the end")
        figure.savefig(out / "policy.png", dpi=150)
    search = [r for r in history if r["phase"] == "search"]
    if plt and search:
        figure, axis = plt.subplots(figsize=(min(6 + 0.5 * len(search), 16), 7), layout="constrained")
        cells = dict(cmap=plt.matplotlib.colors.ListedColormap(common.OPERATION_COLORS[1:]), edgecolor="w")
        for r in search:
            edges = [edge for node in r["support"] for edge in node]  # of (operation, state)
            x, column = [r["epoch"] - 0.5, r["epoch"] + 0.5], [[net.ops.index(name)] for name, _ in edges]
            image = axis.pcolormesh(x, range(len(edges) + 1), column, vmin=-0.5, vmax=6.5, **cells)
            for y, (_, state) in enumerate(edges):
                axis.text(r["epoch"], y + 0.5, str(state) * (kept == 2), ha="center", va="center", fontsize=8)
        figure.colorbar(image, ticks=range(7)).ax.set_yticklabels(net.ops)
        axis.set_yticks([kept * (k + 0.5) for k in range(len(net.frozen))], range(len(net.frozen)))
        axis.locator_params(axis="x", integer=True)
        axis.set(xlabel="epoch", ylim=(y + 1, 0), ylabel="layer, or node (0-3: normal cell) and state read")
        figure.savefig(out / "support.png", dpi=150)
        plt.close("all")

LEAST = dict(  # the least value of flags, where it is not 1 for whole numbers and 0 for others
    gpu=-1, seed=0, train_epochs=0, warmup_epochs=0, cutout=0, batch_size=2, search_batch_size=2,
    limit_train=2, image_size=8, channels=2, search_channels=2, layers=3, search_layers=3, search_images=4,
    faa_images=4, faa_batch_size=4)

class Parser(argparse.ArgumentParser):
    """argparse with the flags that every script has, presets, and mistakes reported in one line."""
    def __init__(self, doc: str):
        layout = lambda prog: argparse.ArgumentDefaultsHelpFormatter(prog, max_help_position=34, width=110)
        super().__init__(description=doc.split("\n\n")[0], formatter_class=layout, allow_abbrev=False)
        add = self.add_argument_group("what to run, on what").add_argument
        add("--preset", choices=["paper", "quick", "imagenet"], default="paper", help="other flags win")
        add("--dataset", choices=common.DATASETS, default="cifar10", help="data set")
        add("--data-dir", default="data", help="where data sets are, or are downloaded to")
        add("--image-size", type=int, help="scale to this side; None: 224 for photographs, else as they are")
        add("--limit-train", type=int, help="use only so many training images")
        add("--limit-test", type=int, help="use only so many test images")
        add("--workers", type=int, default=4, help="threads or processes that read image files")
        add("--cache-gb", type=float, default=8.0, help="photographs that fit are kept in memory (a process)")
        add("--skip-damaged", action="store_true", help="leave out image files that cannot be read")
        add("--seed", type=int, default=0, help="seed of everything random")
        add("--repeats", type=int, default=1, help="run seeds S..S+R-1 and report mean and std")
        add("--out", help="run directory; None: runs/<script>-<dataset>-seed<seed>")
        add("--resume", action="store_true", help="go on with the run in --out, or start it if there is none")
        add("--evaluate", metavar="DIR", help="print the test accuracy of the finished run in DIR and stop")
        add("--check", action="store_true", help="check flags and data, start no run, and stop")
        add("--gpu", type=int, help="GPU number, -1 for the CPU; None: 0 if there is one")
        add("--amp", action="store_true", help="bfloat16 autocast (GPU only)")

    def settings(self, argv: list[str], presets: dict, saved: dict) -> tuple[argparse.Namespace, list[str]]:
        """What argv says, over `saved`, over the presets that it chose; and what in argv is not known."""
        first = self.parse_known_args(argv)[0]
        for words, values in presets.items():
            if set(words.split()) <= {first.preset, getattr(first, "space", None)}:
                self.set_defaults(**values)
        self.set_defaults(**saved)
        args, rest = self.parse_known_args(argv)
        for name, value in vars(args).items():
            least = LEAST.get(name, int(type(value) is int))
            end = 1 if name in ("drop_path", "label_smoothing") else 1e10
            if type(value) in (int, float) and not least <= value < end:
                self.error(f"--{name.replace('_', '-')} must be from {least} to below {end:g}, not {value}")
        genotype = getattr(args, "genotype", None)
        if genotype and genotype != saved.get("genotype"):  # itself: a run does not depend on the file
            args.genotype = str(common.load_genotype(genotype, getattr(args, "space", "cells")))
        return args, rest

    def error(self, message: str) -> None:
        raise InputError(f"{message} (see --help)")

def parse_args(argv: list[str], saved: dict = {}) -> argparse.Namespace:
    """The settings; what argv does not say is as in `saved`, then as in the preset."""
    parser = Parser(__doc__)
    add = parser.add_argument_group("network and training").add_argument
    add("--search-epochs", type=int, default=120, help="most epochs until the architecture is fixed")
    add("--train-epochs", type=int, default=600, help="epochs after it is fixed, same weights")
    add("--batch-size", type=int, default=96, help="images a step, over all GPUs")
    add("--channels", type=int, default=36, help="channels of the first cells (even)")
    add("--layers", type=int, default=20, help="cells; reductions at 1/3 and 2/3")
    add("--lr", type=float, default=0.025, help="learning rate at the start")
    add("--weight-decay", type=float, default=3e-4, help="weight decay at the start")
    add("--grad-clip", type=float, default=5.0, help="largest norm of the weights' gradient")
    add("--auxiliary-weight", type=float, default=0.4, help="loss weight of the auxiliary head")
    add("--label-smoothing", type=float, default=0.0, help="share of the label given to all classes alike")
    add("--warmup-epochs", type=int, default=0, help="epochs in which lr rises to --lr, linearly")
    add("--drop-path", type=float, default=0.2, help="drop-path probability at the end of training")
    add("--cutout", type=int, default=16, help="side of the cutout square in pixels")
    add = parser.add_argument_group("data augmentation (DA)").add_argument
    add("--no-da", action="store_true", help="no augmentation policy (crop, flip and cutout stay)")
    add("--tau-lr", type=float, default=5e-4, help="learning rate of tau in Eq. 2")
    add = parser.add_argument_group("hyper-parameters (HPO)").add_argument
    add("--no-hpo", action="store_true", help="keep lr and wd; lr falls by cosine once the search is over")
    add("--beta-lr", type=float, default=1e-5, help="beta of Eq. 3 for the learning rate")
    add("--beta-wd", type=float, default=1e-5, help="beta of Eq. 3 for the weight decay")
    add("--max-lr-step", type=float, default=0.1, help="most that a step of Eq. 3 moves lr, as a share of it")
    add("--max-wd-step", type=float, default=1e-5, help="most that a step of Eq. 3 moves the weight decay")
    add = parser.add_argument_group("architecture (NAS)").add_argument
    add("--space", choices=SPACES, default="cells", help="cells, or --layers 5 n + 1, --channels the stem's")
    add("--genotype", metavar="NAME|FILE", help=f"no search: {', '.join(common.GENOTYPES)} or a file")
    add("--arch-lr", type=float, default=3e-4, help="Adam's learning rate for b")
    add("--b-scale", type=float, default=1e-3, help="standard deviation of b's first values")
    add("--lasso", type=float, default=1e-5, help="lambda of Eq. 4")
    add("--freeze-distance", type=float, default=1e-3, help="a node freezes if its alpha moved no more")
    add("--max-params", type=int, help="Eq. 1: reject supports whose network has more parameters")
    add("--max-flops", type=int, help="Eq. 1: reject supports with more multiply-adds an image")
    args, rest = parser.settings(argv, DHA_PRESETS, saved)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if args.channels % 2:
        parser.error("channels must be even: a factorized reduction splits them in two")
    if args.space == "mobilenet" and (args.layers < 6 or args.layers % 5 != 1 or args.auxiliary_weight):
        parser.error("--space mobilenet has 6, 11, 16, 21, ... layers and no auxiliary head")
    if args.genotype and not args.train_epochs:
        parser.error("--genotype with --train-epochs 0 leaves nothing to do")
    for name, (low, high) in (("lr", LR_RANGE), ("weight_decay", WD_RANGE)):
        if not (args.no_hpo or low <= getattr(args, name) <= high):
            parser.error(f"{name} must lie in [{low}, {high}] where Eq. 3 learns it; or give --no-hpo")
    return args

def main(argv: list[str]) -> int:
    """Run a command line; exit code 0, 1 (training failed), 2 (wrong input), 130 or 143 (stopped)."""
    if RANK:
        sys.stdout = open(os.devnull, "w")

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt(128 + number)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        args = parse_args(argv)
        device = start_device(args)
        if args.evaluate:
            net, info = load_model(Path(args.evaluate) / "model.pt", device)
            return evaluate_run(argv, Path(args.evaluate), net, info, device)
        runs = [settings_of_run(args, argv, args.seed + i) for i in range(args.repeats)]
        if WORLD > 1:
            dist.barrier()  # all have looked before one writes
        results = [run_dha(run, device) for run in runs]
        print(json.dumps(results[-1], indent=1))
        if len(results) > 1 and "test_accuracy" in results[0]:
            accuracy = torch.tensor([result["test_accuracy"] for result in results])
            print(f"{len(results)} seeds: test accuracy {accuracy.mean():.2f} ± {accuracy.std():.2f} %")
        return 0
    except (InputError, OSError, ArithmeticError, RuntimeError) as e:
        if type(e) is RuntimeError and WORLD == 1:  # not GPU memory, nor a process that died
            raise
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which torchrun may send now: no trace of `stop`
        time.sleep(5 * (RANK > 0))  # it does, where rank 0 has failed too, and said so
        print("error:", str(e).splitlines()[0], file=sys.stderr)
        return 2 if isinstance(e, (InputError, OSError)) else 1
    except KeyboardInterrupt as e:
        if RANK == 0:
            print("\nstopped; go on with the same command and --resume", file=sys.stderr)
        return e.args[0]
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
