# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "torchvision", "numpy", "pillow", "matplotlib", "tqdm", "scipy"]
# ///
"""Joint search of augmentation policy and architecture: DARTS + Faster AutoAugment in one gradient descent.

Paper: Kashima, Yamada, Saito, "Joint Search of Data Augmentation Policies and Network Architectures" (arXiv
2012.09407); equation numbers are that paper's. The parts are DARTS (Liu et al., ICLR 2019, first order) and
Faster AutoAugment (Hataya et al., ECCV 2020, without its critic).

    python joint_darts_faa.py --dataset shapes --preset quick      # minutes on a laptop, nothing to download
    python joint_darts_faa.py --dataset cifar10 --gpu 0            # 50 epochs of search, 600 of training
    python joint_darts_faa.py --policy none ...                    # plain DARTS, the first row of the table
    python joint_darts_faa.py --policy policy.json ...             # its baseline: a policy found before
    python joint_darts_faa.py --genotype DARTS_V2 --policy none .. # train a known architecture
    python joint_darts_faa.py --search-only ...                    # stop with genotype.json and policy.json
    torchrun --nproc-per-node 4 joint_darts_faa.py ...             # a process a GPU, batch sizes are the sums
    python joint_darts_faa.py --resume --out runs/joint_darts_faa-cifar10-seed0
    python joint_darts_faa.py --evaluate runs/joint_darts_faa-cifar10-seed0

After the search the strongest operations become a network that is trained from scratch with the policy found.
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
from common import PRIMITIVES, Data, FactorizedReduce, Genotype, InputError, Network, Photos

# -------- Augmentations: batched, differentiable, one magnitude an image ------------------------------------
#
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

def horizontal_flip(images: Tensor, magnitude: Tensor) -> Tensor:
    """Mirror left and right."""
    return images.flip(3)

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

def invert(images: Tensor, magnitude: Tensor) -> Tensor:
    """The negative."""
    return 1 - images

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

def sample_pairing(images: Tensor, magnitude: Tensor) -> Tensor:
    """Mix in up to 0.4 of another image, the batch's next one: its order is random anyway."""
    return torch.lerp(images, images.roll(-1, 0), 0.4 * per_image(magnitude))

AUGMENTATIONS = dict(
    ShearX=shear_x, ShearY=shear_y, TranslateX=translate_x, TranslateY=translate_y, Rotate=rotate,
    HorizontalFlip=horizontal_flip, Invert=invert, Solarize=solarize, Posterize=posterize, Contrast=contrast,
    Color=color, Brightness=brightness, Sharpness=sharpness, AutoContrast=auto_contrast, Equalize=equalize,
    SamplePairing=sample_pairing,
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

# -------- Policy: L sub-policies of K stages, each a weighted choice among the 16 operations (Eqs. 1 to 3) --

def relaxed_bernoulli(p: Tensor, temperature: float = 0.1) -> Tensor:
    """A differentiable coin for every entry of p, in [0, 1]: near 1 with probability p, else near 0.
    The Gumbel trick for two outcomes (Maddison et al.; Jang et al.). The gradient is 0 at p = 0 and p = 1."""
    logit = lambda x: x.clamp(1e-6, 1 - 1e-6).logit()
    return ((logit(p) + logit(torch.rand_like(p))) / temperature).sigmoid()

class Policy(nn.Module):
    """An augmentation policy, differentiable: images float (B, 3, H, W) in [0, 1] to the same.
    z, p, mu: (L, K, 16) each, so 3 * 16 * K * L parameters: for every sub-policy, stage and operation the
    logit of its selection, the probability that it is applied, and its magnitude in [0, 1]. Every image draws
    one sub-policy, and a sign for the magnitude of each operation in SIGNED (AutoAugment negates at random).
    eta: temperature of the selection."""
    def __init__(self, sub_policies: int = 10, stages: int = 2, eta: float = 0.05):
        super().__init__()
        shape = (sub_policies, stages, len(AUGMENTATIONS))
        self.z, self.p, self.mu = (nn.Parameter(torch.rand(shape)) for _ in range(3))
        self.eta = eta

    def forward(self, images: Tensor) -> Tensor:
        L, K, N = self.z.shape
        which = torch.randint(L, (len(images),), device=images.device)
        for k in range(K):
            weight = (self.z[which, k] / self.eta).softmax(1)  # Eq. (3), (B, 16)
            mask = relaxed_bernoulli(self.p[which, k])  # of Eq. (1), (B, 16)
            mu, sign = self.mu[which, k], 1 - 2 * torch.randint(2, (len(images), N), device=images.device)
            mixed = 0
            for n, (name, operation) in enumerate(AUGMENTATIONS.items()):
                magnitude = mu[:, n] * sign[:, n] if name in SIGNED else mu[:, n]
                maybe = torch.lerp(images, operation(images, magnitude), per_image(mask[:, n]))  # Eq. (1)
                mixed = mixed + per_image(weight[:, n]) * maybe  # Eq. (2)
            images = limit(mixed)  # only rounding leaves [0, 1]
        return images

    @torch.no_grad()
    def clamp(self) -> None:
        """p and mu back into [0, 1], after an optimizer's step."""
        for parameter in (self.p, self.mu):
            parameter.clamp_(0, 1)

    def selection(self) -> Tensor:
        """softmax(z / eta), the probability that an operation is selected: (L, K, 16)."""
        return (self.z.detach() / self.eta).softmax(2)

    def table(self) -> dict:
        """The policy as policy.json has it: the names of the operations, and lists of (L, K, 16) numbers."""
        numbers = {"z": self.z, "p": self.p, "mu": self.mu, "selection": self.selection()}
        head = {"operations": list(AUGMENTATIONS), "eta": self.eta}
        return head | {name: values.tolist() for name, values in numbers.items()}

@torch.no_grad()
def augment(images: Tensor, policy: Policy) -> Tensor:
    """The policy after the search, which draws operations: images (B, 3, H, W) in [0, 1], to the same."""
    B, (L, K, _) = len(images), policy.z.shape
    which = torch.randint(L, (B,), device=images.device)
    for k in range(K):
        selection = policy.selection()[which, k]  # softmax(z / eta), (B, 16)
        choice = (selection / torch.empty_like(selection).exponential_()).argmax(1)  # a draw from Cat
        p, mu = policy.p[which, k, choice], policy.mu[which, k, choice]
        sign = 1 - 2 * torch.randint(2, (B,), device=images.device)
        choice = torch.where(torch.rand(B, device=images.device) < p, choice, -1)  # Eq. (1)
        images = apply_each(images, choice, sign * mu)
    return images

# -------- The supernet of DARTS: every operation on every edge, weighted (Eq. 5) ----------------------------

NODES = 4  # intermediate nodes of a cell; node j reads the states 0..j+1: 14 edges

class Outgoing(nn.Module):
    """What all edges that leave a state have in common: its two normalised pools and its ReLU.
    State (B, C, H, W) -> what each of PRIMITIVES[1:] reads, in that order."""
    def __init__(self, channels: int, stride: int):
        super().__init__()
        pools = [common.operation(name, channels, stride) for name in PRIMITIVES[1:3]]
        norms = [nn.BatchNorm2d(channels, affine=False) for _ in pools]
        self.max_pool, self.avg_pool = (nn.Sequential(pool, norm) for pool, norm in zip(pools, norms))

    def forward(self, x: Tensor) -> list[Tensor]:
        relu = F.relu(x)
        return [self.max_pool(x), self.avg_pool(x), x, relu, relu, relu, relu]

class MixedOp(nn.Module):
    """The mixed operation of Eq. (5) on one edge, fed by `Outgoing`; it adds nothing for "none"."""
    def __init__(self, channels: int, stride: int):
        super().__init__()
        build = lambda name: common.operation(name, channels, stride, affine=False)
        convolutions = [build(name)[1:] for name in PRIMITIVES[4:]]  # without the first ReLU, which is shared
        self.ops = nn.ModuleList([nn.Identity(), nn.Identity(), build("skip_connect"), *convolutions])

    def forward(self, inputs: list[Tensor], weights: Tensor, node: Tensor) -> Tensor:
        """node + sum_f weights_f f(x), (B, C, H, W). inputs: what `Outgoing` makes of x; weights (8,): the
        softmax of the edge's alpha; node: the sum of the edges before, torch.zeros(()) for the first."""
        for weight, f, x in zip(weights[1:], self.ops, inputs, strict=True):
            node = torch.addcmul(node, weight, f(x))  # Eq. (5)
        return node

class DartsCell(nn.Module):
    """A cell whose 14 edges all carry the mixed operation. s0 (B, c_before, H, W), of twice that size if
    `halved`, and s1 (B, c_in, H, W): the outputs of the two cells before."""
    def __init__(self, c_before: int, c_in: int, channels: int, reduction: bool, halved: bool):
        super().__init__()
        build = FactorizedReduce if halved else common.relu_conv_bn
        self.preprocess0 = build(c_before, channels, affine=False)
        self.preprocess1 = common.relu_conv_bn(c_in, channels, affine=False)
        strides = [1 + (reduction and i < 2) for i in range(NODES + 1)]  # of the edges that leave state i
        self.outgoing = nn.ModuleList(Outgoing(channels, stride) for stride in strides)
        self.edges = nn.ModuleList(MixedOp(channels, strides[i]) for j in range(NODES) for i in range(j + 2))

    def forward(self, s0: Tensor, s1: Tensor, weights: Tensor) -> Tensor:
        """weights: softmax of alpha, (14, 8), a row an edge, node by node."""
        states, inputs, edges = [self.preprocess0(s0), self.preprocess1(s1)], [], zip(self.edges, weights)
        for j in range(NODES):
            inputs += [self.outgoing[i](states[i]) for i in range(len(inputs), j + 2)]
            node = s0.new_zeros((), dtype=weights.dtype)
            for x in inputs:
                edge, weight = next(edges)
                node = edge(x, weight, node)
            states.append(node)
        return torch.cat(states[2:], 1)  # (B, 4 C, H, W)

class DartsSupernet(nn.Module):
    """The search network of DARTS: all operations on all edges, weighted by the softmax of alpha (Eq. 5).
    Input: normalised images (B, 3, H, W). Output: logits (B, num_classes). alphas_normal, alphas_reduce:
    (14, 8), a row an edge, node by node, a column one of PRIMITIVES, as in quark0/darts. 16 channels and 8
    layers have 1,930,618 weights. stem: "cifar" or "imagenet"."""
    def __init__(self, channels: int, num_classes: int, layers: int, stem: str = "cifar"):
        super().__init__()
        C = channels
        self.stem, self.stem1, c_in, halved = common.stems(stem, C)
        c_before, self.cells = c_in, nn.ModuleList()
        self.reductions = (layers // 3, 2 * layers // 3)
        for i in range(layers):
            reduction = i in self.reductions
            C = 2 * C if reduction else C
            self.cells.append(DartsCell(c_before, c_in, C, reduction, halved))
            c_before, c_in, halved = c_in, NODES * C, reduction
        self.classifier = nn.Linear(c_in, num_classes)
        self.alphas_normal = nn.Parameter(1e-3 * torch.randn(14, len(PRIMITIVES)))
        self.alphas_reduce = nn.Parameter(1e-3 * torch.randn(14, len(PRIMITIVES)))

    def forward(self, x: Tensor) -> Tensor:
        s0 = self.stem(x)
        s1 = self.stem1(s0)
        normal, reduce = (alpha.softmax(1).to(s0.dtype) for alpha in self.alphas())  # of Eq. (5)
        for i, cell in enumerate(self.cells):
            s0, s1 = s1, cell(s0, s1, reduce if i in self.reductions else normal)
        return self.classifier(s1.mean((2, 3)))

    def alphas(self) -> list[nn.Parameter]:
        return [self.alphas_normal, self.alphas_reduce]

    def genotype(self) -> Genotype:
        """Per node the two edges whose strongest operation but none is strongest, with that operation."""
        cells = []
        for alphas in self.alphas():
            strength, op = alphas.detach().softmax(1)[:, 1:].cpu().max(1)  # (14,), (14,)
            cell, row = [], 0
            for j in range(NODES):
                kept = strength[row : row + j + 2].topk(2).indices.sort().values.tolist()
                cell += [(PRIMITIVES[1 + int(op[row + state])], state) for state in kept]
                row += j + 2
            cells.append(cell)
        return Genotype(cells[0], [2, 3, 4, 5], cells[1], [2, 3, 4, 5])

# -------- The search step (Alg. 1) --------------------------------------------------------------------------

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

class JointSearch:
    """What the search learns: the network's weights w and alpha, the policy's z, p, mu; and their optimizers.
    With --genotype the network is that genotype's and there is no alpha; with --policy there is no policy."""
    def __init__(self, args: argparse.Namespace, data: Data, device: torch.device):
        C, L, classes = args.search_channels, args.search_layers, len(data.classes)
        stem = common.stem_for(data.train_images)
        self.genotype = common.parse_genotype(args.genotype) if args.genotype else None
        if self.genotype:
            self.net = Network(self.genotype, classes, C, L, stem=stem)
        else:
            self.net = DartsSupernet(C, classes, L, stem)
        self.net.to(device, memory_format=torch.channels_last)
        self.alphas = [] if self.genotype else self.net.alphas()
        self.weights = [p for name, p in self.net.named_parameters() if not name.startswith("alphas")]
        self.policy = None if args.policy else Policy(args.sub_policies, args.stages).to(device)
        self.upper = self.alphas + (list(self.policy.parameters()) if self.policy else [])  # moved by Eq. (9)
        w_optimizer = torch.optim.SGD(self.weights, args.lr, momentum=0.9, weight_decay=args.weight_decay)
        self.parts = {"net": self.net, "w": w_optimizer}  # all that a checkpoint holds; w, alpha: optimizers
        if self.alphas:
            self.parts["alpha"] = torch.optim.Adam(self.alphas, args.arch_lr, (0.5, 0.999), weight_decay=1e-3)
        if self.policy:
            adam = torch.optim.Adam(self.policy.parameters(), args.policy_lr, (0.0, 0.999))
            self.parts |= {"policy": self.policy, "z, p, mu": adam}
        self.mean, self.std = common.mean_std(data.train_images)

    def loss(self, images: Tensor, labels: Tensor, amp: bool) -> tuple[Tensor, Tensor]:
        """L(w, alpha, z, p, mu) of uint8 images (B, 3, H, W), cross-entropy; and the accuracy in %."""
        x = images / 255
        x = self.policy(x) if self.policy else x
        with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
            logits = self.net(common.normalize(x, self.mean, self.std)).float()
        return F.cross_entropy(logits, labels), 100 * (logits.argmax(1) == labels).float().mean()

def learn(some: list[Tensor], others: list[Tensor]) -> None:
    """The next backward pass computes the gradients of `some` and none of `others`."""
    for params, on in ((some, True), (others, False)):
        for p in params:
            p.grad = None
            p.requires_grad_(on)

def search_step(s: JointSearch, val: tuple, train: tuple, grad_clip: float, amp: bool) -> Tensor:
    """One iteration of Alg. 1 on two batches of (images, labels), from D_val and from D_train; the images
    uint8 (B, 3, H, W), cropped and flipped at random. Returns (L_val, its accuracy in %, L_train, its
    accuracy in %), detached: (4,)."""
    learn(s.upper, others=s.weights)
    loss_val, accuracy_val = s.loss(*val, amp)  # lines 3 to 5
    loss_val.backward()  # line 6: of z, p, mu and alpha at once, with xi = 0 in Eq. (8)
    loss_val = loss_val.detach()  # at C=16 its graph would hold 0.5 GiB through the second half
    average_gradients(s.upper)
    if s.policy:
        s.parts["z, p, mu"].step()  # line 7, Eq. (9)
        s.policy.clamp()
    if s.alphas:
        s.parts["alpha"].step()  # line 8, Eq. (9)

    learn(s.weights, others=s.upper)
    loss_train, accuracy_train = s.loss(*train, amp)  # lines 10 to 12
    loss_train.backward()  # line 13: of w alone
    average_gradients(s.weights)
    nn.utils.clip_grad_norm_(s.weights, grad_clip)
    s.parts["w"].step()  # line 14, Eq. (10)
    return torch.stack([loss_val, accuracy_val, loss_train.detach(), accuracy_train])

# -------- The search, and the training of what it found -----------------------------------------------------

JOINT_PRESETS = {  # where they differ from the flags' defaults, the paper's settings; "imagenet": DARTS'
    "quick": dict(dataset="shapes", search_epochs=4, search_images=768, search_channels=8, search_layers=3,
                  arch_lr=3e-3, policy_lr=1e-2, train_epochs=4, batch_size=64, channels=8, layers=3, lr=0.1,
                  auxiliary_weight=0.0, drop_path=0.0, cutout=0),
    "imagenet": dict(dataset="imagenet", channels=48, layers=14, batch_size=128, train_epochs=250, lr=0.1,
                     weight_decay=3e-5, warmup_epochs=5, label_smoothing=0.1, drop_path=0.0, cutout=0),
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

def cosine(start: float, end: float, share: float) -> float:
    """From start to end along half a cosine, as share goes from 0 to 1."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2

def search(args: argparse.Namespace, data: Data, run: argparse.Namespace) -> JointSearch:
    """Alg. 1 for --search-epochs epochs, on two halves of the training images, D_train and D_val."""
    torch.manual_seed(args.seed)
    device = data.train_images.device
    s = JointSearch(args, data, device)
    images, labels = data.train_images, data.train_labels
    for name, state in run.state.get("search", {}).items():
        s.parts[name].load_state_dict(state)
    shuffled = torch.randperm(len(data.train_images), generator=torch.Generator().manual_seed(args.seed))
    D_train, D_val = shuffled[: args.search_images].to(device).chunk(2)
    for epoch in range(len(run.history), args.search_epochs):
        start, seed = time.time(), args.seed * 100_003 + epoch
        torch.manual_seed(seed * 1_009 + RANK)  # every epoch: a resumed run needs no generator's state
        lr = cosine(args.lr, args.lr / 25, epoch / args.search_epochs)  # DARTS: 0.025 to 0.001
        s.parts["w"].param_groups[0]["lr"] = lr
        s.net.train()
        draw = lambda k: common.batches(len(D_val), args.search_batch_size, 2 * seed + k, RANK, WORLD)
        orders = D_val[draw(0).to(device)], D_train[draw(1).to(device)]  # (steps, B) each
        pairs = zip(*(common.loader(images, labels, order, True) for order in orders))
        meters = torch.zeros(len(orders[0]), 4, device=device)
        bar = progress(pairs, f"search {epoch + 1}/{args.search_epochs}", len(meters))
        for step, (val, train) in enumerate(bar):
            meters[step] = search_step(s, val, train, args.grad_clip, args.amp)
            if step % 20 == 19:
                means = meters[: step + 1].mean(0).tolist()
                bar.set_postfix_str("val {:.3f} {:.1f}% train {:.3f} {:.1f}%".format(*means), refresh=False)
        flags = "--lr, --arch-lr or --policy-lr"
        val_loss, val_accuracy, loss, accuracy = epoch_means(meters, s.weights + s.upper, epoch, flags)
        genotype = s.genotype or s.net.genotype()
        record = {"epoch": epoch + 1, "phase": "search", "loss": loss, "train_accuracy": accuracy}
        record |= {"val_loss": val_loss, "val_accuracy": val_accuracy, "lr": lr, "genotype": str(genotype)}
        for name, cell in (("skip_connects", genotype.normal), ("skip_connects_reduce", genotype.reduce)):
            record[name] = sum(op == "skip_connect" for op, _ in cell)
        if s.policy:
            record["selection"] = dict(zip(AUGMENTATIONS, s.policy.selection().mean((0, 1)).tolist()))
        end_epoch(run, record, start, search={name: part.state_dict() for name, part in s.parts.items()})
        if s.alphas and record["skip_connects"] > 4:
            print("warning: most operations of the normal cell are skip-connections, the search collapses;",
                  "metrics.jsonl has every epoch's genotype, and fewer --search-epochs end before it")
    return s

def train(args: argparse.Namespace, data: Data, run: argparse.Namespace) -> Network:
    """Train the genotype from scratch with the policy, as DARTS does; both are in the run directory."""
    torch.manual_seed(args.seed)
    device = data.train_images.device
    genotype = common.load_genotype(run.out / "genotype.json")
    size = len(data.classes), args.channels, args.layers
    net = Network(genotype, *size, args.auxiliary_weight > 0, common.stem_for(data.train_images))
    net.to(device, memory_format=torch.channels_last)
    policy = load_policy(run.out / "policy.json").to(device) if args.policy != "none" else None
    weights, (mean, std) = list(net.parameters()), common.mean_std(data.train_images)
    parts = {"net": net, "w": torch.optim.SGD(weights, args.lr, 0.9, weight_decay=args.weight_decay)}
    for name, state in run.state.get("train", {}).items():
        parts[name].load_state_dict(state)
    searched = sum(record["phase"] == "search" for record in run.history)
    for epoch in range(len(run.history) - searched, args.train_epochs):
        start, seed = time.time(), args.seed * 100_003 + searched + epoch
        torch.manual_seed(seed * 1_009 + RANK)
        warm = min((epoch + 1) / args.warmup_epochs, 1) if args.warmup_epochs else 1
        lr = parts["w"].param_groups[0]["lr"] = warm * cosine(args.lr, 0.0, epoch / args.train_epochs)
        net.drop_path_prob = args.drop_path * epoch / args.train_epochs
        net.train()
        order = common.batches(len(data.train_images), args.batch_size, seed, RANK, WORLD).to(device)
        meters = torch.zeros(len(order), 2, device=device)
        batches = common.loader(data.train_images, data.train_labels, order, True)
        bar = progress(batches, f"train {epoch + 1}/{args.train_epochs}", len(order))
        for step, (x, labels) in enumerate(bar):
            x = augment(x / 255, policy) if policy else x
            x = common.cutout(common.normalize(x, mean, std), args.cutout)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                out = net(x)
            logits, *auxiliary = out if isinstance(out, tuple) else (out,)
            L = partial(F.cross_entropy, target=labels, label_smoothing=args.label_smoothing)
            loss, extra = L(logits.float()), sum(L(head.float()) for head in auxiliary)
            parts["w"].zero_grad()
            (loss + args.auxiliary_weight * extra).backward()
            average_gradients(weights)
            nn.utils.clip_grad_norm_(weights, args.grad_clip)
            parts["w"].step()
            accuracy = 100 * (logits.argmax(1) == labels).float().mean()
            meters[step] = torch.stack([loss.detach(), accuracy])
            if step % 20 == 19:
                means = meters[: step + 1].mean(0).tolist()
                bar.set_postfix_str("loss {:.3f} {:.1f}%".format(*means), refresh=False)
        loss, accuracy = epoch_means(meters, weights, searched + epoch, "--lr")
        test = evaluate(net, data.test_images, data.test_labels, mean, std, RANK, WORLD)
        record = {"epoch": searched + epoch + 1, "phase": "train", "loss": loss, "train_accuracy": accuracy}
        record |= {"test_accuracy": test, "lr": lr, "drop_path": net.drop_path_prob}
        end_epoch(run, record, start, train={name: part.state_dict() for name, part in parts.items()})
    return net

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

# -------- What a run leaves, for other people's code --------------------------------------------------------

def load_policy(path: str | Path) -> Policy:
    """The policy in a policy.json, for `augment`. Raises InputError where the file holds none."""
    try:
        content = json.loads(Path(path).read_text())
        numbers = {name: torch.tensor(content[name], dtype=torch.float32) for name in ("z", "p", "mu")}
        policy = Policy(*numbers["z"].shape[:2], eta=float(content["eta"]))
        policy.load_state_dict(numbers)
        both = torch.stack([policy.p, policy.mu])
        in_range = policy.eta > 0 and policy.z.isfinite().all() and 0 <= both.min() <= both.max() <= 1
        if content["operations"] != list(AUGMENTATIONS) or not in_range:
            raise ValueError("numbers out of range, or other operations")
    except (OSError, ValueError, TypeError, LookupError, RuntimeError, OverflowError) as e:
        raise InputError(f"cannot use the policy in {path}: {type(e).__name__}: {e}".splitlines()[0]) from e
    return policy.requires_grad_(False)

def load_network(path: str | Path, device: torch.device | str = "cpu") -> tuple[Network, dict]:
    """The network in a model.pt, in eval mode, and what else the file holds (classes, mean, std, image_size).

    It takes images normalised with that mean and std: common.normalize(images, info["mean"], info["std"]).
    """
    try:
        info = torch.load(path, map_location=device, weights_only=True)
        genotype = common.parse_genotype(info["genotype"])
        net = Network(genotype, len(info["classes"]), info["channels"], info["layers"], stem=info["stem"])
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

def run_joint(args: argparse.Namespace, device: torch.device) -> dict:
    """Search and train one network into the run directory --out; returns what its result.json holds."""
    out = Path(args.out)
    if (out / "result.json").exists():
        print(f"{out} is finished already")
        return read_json(out / "result.json")
    policy, genotype = None, args.genotype and common.parse_genotype(args.genotype)
    if args.policy not in (None, "none") and not (out / "policy.json").exists():
        policy = load_policy(args.policy)
    data, searching = load_data(args, device), not (args.genotype and args.policy)
    N, size = len(data.train_images), data.train_images.shape[-1]
    if searching and N < 4:
        raise InputError("the search splits the training images in two: it needs at least 4")
    half = min(args.search_images or N, N) // 2
    for count, batch_size in ((half, args.search_batch_size), (N, args.batch_size)):
        common.batches(count, batch_size, 0, RANK, WORLD)  # an error now where processes cannot share a batch
    if args.check:
        return {"check": "passed"}
    run = open_run(args, device)
    if "train" not in run.state:
        if searching:
            s = search(args, data, run)
            genotype, policy = s.genotype or s.net.genotype(), s.policy or policy
        if RANK == 0:
            common.save_genotype(genotype, out / "genotype.json")
            if policy:
                save(out / "policy.json", policy.table())
        if WORLD > 1:
            dist.barrier()  # the files are there
    net = None if args.search_only else train(args, data, run)
    if RANK:
        return {}
    genotype = common.load_genotype(out / "genotype.json")
    shape, stem = (len(data.classes), args.channels, args.layers), common.stem_for(data.train_images)
    plain = Network(genotype, *shape, stem=stem).to(device)  # no auxiliary head
    parts = {None: " + Faster AA", "none": ""}.get(args.policy, " + given policy")
    result = {
        "method": ("given genotype" if args.genotype else "DARTS") + parts, "dataset": args.dataset,
        "seed": args.seed, "params": common.count_parameters(plain), "flops": common.count_flops(plain, size),
        "epochs": len(run.history), "search_epochs": sum(r["phase"] == "search" for r in run.history),
        "seconds": run.seconds.get("search", 0.0) + run.seconds.get("train", 0.0), "genotype": str(genotype),
        "search_seconds": run.seconds.get("search", 0.0), "gpu_hours": run.seconds["processes"] / 3600,
    }
    if net is not None:
        plain.load_state_dict(net.state_dict(), strict=False)
        mean, std = common.mean_std(data.train_images)
        accuracy = evaluate(plain, data.test_images, data.test_labels, mean, std)
        result = {"test_accuracy": accuracy, "train_loss": run.history[-1]["loss"]} | result
        model = {"genotype": str(genotype), "channels": args.channels, "layers": args.layers, "stem": stem}
        model |= {"classes": data.classes, "image_size": size, "mean": mean.cpu(), "std": std.cpu()}
        save(out / "model.pt", model | {"state_dict": plain.cpu().state_dict()})
    try:
        first = torch.arange(min(8, len(data.test_labels)), device=device)[None]
        images, _ = next(common.loader(data.test_images, data.test_labels, first, train=False))
        draw_joint(out, run.history, genotype, images.cpu() / 255)
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

def draw_joint(out: Path, history: list[dict], genotype: Genotype, images: Tensor) -> None:
    """Write the figures of a run; images (B, 3, H, W), float in [0, 1], show what the policy does."""
    if (out / "policy.json").exists():
        torch.manual_seed(0)
        policy = load_policy(out / "policy.json")
        rows = torch.cat([images] + [augment(images, policy) for _ in range(4)])
        rows = rows.repeat_interleave(3, 2).repeat_interleave(3, 3)
        torchvision.utils.save_image(rows, out / "images.png", nrow=len(images), padding=6, pad_value=1.0)
    panels = {"loss (nats)": ["loss", "val_loss"], "accuracy (%)": ["train_accuracy", "val_accuracy"]}
    panels["accuracy (%)"].append("test_accuracy")
    panels["skip-connections, of 8 operations"] = ["skip_connects", "skip_connects_reduce"]
    plt = draw_run(out, history, genotype, panels)
    search = [r for r in history if "selection" in r]
    if plt and search:  # Figure 2, and below it what the paper says of its part c
        shape = {"height_ratios": (3, 1), "figsize": (9, 6.4), "layout": "constrained"}
        figure, axes = plt.subplots(2, 1, sharex=True, **shape)
        epochs, shares = [r["epoch"] for r in search], [r["selection"].values() for r in search]
        axes[0].stackplot(epochs, *zip(*shares), labels=list(AUGMENTATIONS), colors=plt.cm.tab20.colors)
        axes[0].set(ylim=(0, 1), title="Selection of each operation, mean over the policy")
        axes[0].legend(loc="center left", bbox_to_anchor=(1, 0.5), reverse=True)
        cells = [common.parse_genotype(r["genotype"]) for r in search]
        edges = [{(cell, i // 2, e) for cell in (0, 2) for i, e in enumerate(g[cell])} for g in cells]
        axes[1].bar(epochs[1:], [len(now - before) for before, now in zip(edges, edges[1:])])
        axes[1].set(xlabel="epoch", title="Edges of the derived cells, of 16, that are new in this epoch")
        axes[1].locator_params(axis="both", integer=True)
        figure.savefig(out / "selection.png", dpi=150)
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
    add = parser.add_argument_group("search").add_argument
    add("--search-epochs", type=int, default=50, help="epochs of search (the paper: 50 and 25)")
    add("--search-batch-size", type=int, default=64, help="images a step of the search, over all GPUs")
    add("--search-images", type=int, help="search on so many of the training images; None: on all")
    add("--search-channels", type=int, default=16, help="channels of the supernet (even)")
    add("--search-layers", type=int, default=8, help="cells of the supernet")
    add("--search-only", action="store_true", help="stop after the search: genotype.json and policy.json")
    add("--genotype", metavar="NAME|FILE", help=f"no search: {', '.join(common.GENOTYPES)} or a file")
    add("--arch-lr", type=float, default=3e-4, help="Adam's learning rate for alpha")
    add("--policy", metavar="FILE|none", help="no policy search: train with this policy.json, or with none")
    add("--policy-lr", type=float, default=1e-3, help="Adam's learning rate for z, p and mu")
    add("--sub-policies", type=int, default=10, help="L, sub-policies of a policy")
    add("--stages", type=int, default=2, help="K, operations one after the other in a sub-policy")
    add = parser.add_argument_group("training (lr to grad-clip: of the search's w too)").add_argument
    add("--train-epochs", type=int, default=600, help="epochs of training")
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
    args, rest = parser.settings(argv, JOINT_PRESETS, saved)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if args.channels % 2 or args.search_channels % 2:
        parser.error("channels must be even: a factorized reduction splits them in two")
    if not args.train_epochs or (args.search_only and args.genotype and args.policy):
        parser.error("nothing to do: --train-epochs 0 wants --search-only, and that something to search")
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
            net, info = load_network(Path(args.evaluate) / "model.pt", device)
            return evaluate_run(argv, Path(args.evaluate), net, info, device)
        runs = [settings_of_run(args, argv, args.seed + i) for i in range(args.repeats)]
        if WORLD > 1:
            dist.barrier()  # all have looked before one writes
        results = [run_joint(run, device) for run in runs]
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
