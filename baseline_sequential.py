# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "torchvision", "numpy", "pillow", "matplotlib", "tqdm", "scipy"]
# ///
"""The baselines of both papers: the same parts one after the other, as stages that hand files to each other.

Every stage but one is a call of joint_darts_faa.py or dha.py: both sides of a comparison run the same code.

    faa-darts   1. Faster AutoAugment (here): policy.json    2. joint_darts_faa.py --policy policy.json
    darts       1. joint_darts_faa.py --policy none
    dha         1. dha.py --no-da --no-hpo, search only: genotype.json    2. dha.py --genotype genotype.json

faa-darts and darts are the baselines of Kashima et al. (arXiv 2012.09407), dha is "Sequential DHA" of Zhou et
al. (arXiv 2109.05765). Faster AutoAugment is Hataya et al., ECCV 2020 (arXiv 1911.06987).

    python baseline_sequential.py --method faa-darts --dataset shapes --preset quick    # minutes on a laptop
    python baseline_sequential.py --method faa-darts --dataset cifar10 --gpu 0          # the papers' settings
    python baseline_sequential.py --method dha --repeats 3 --channels 16 ...            # a flag of the stages
    python baseline_sequential.py --method darts --processes 4 ...                      # with torchrun
    python baseline_sequential.py --resume --method dha --out runs/baseline_sequential-cifar10-seed0
    python baseline_sequential.py --evaluate runs/baseline_sequential-cifar10-seed0
    python baseline_sequential.py --compare runs/*                                      # a table of runs

Flags that --help does not list go to the called stages as they are. In Faster AutoAugment a critic and a
classifier share a WideResNet-40-2: the critic learns to tell real images from augmented ones, the classifier
learns the real ones, and the policy learns to make images that the critic takes for real and the classifier
puts where they belong. The policy, and Eqs. (1) to (3) in it, is Kashima et al.'s.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torch import Tensor
from tqdm import tqdm

import common
from common import Data, Genotype, InputError

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

# -------- The network: WideResNet with a classifier and a critic --------------------------------------------

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
    Input: normalised images (B, 3, H, W). Output: logits (B, num_classes) and the critic's value (B,), high
    for real images. WRN-40-2 with 10 classes has 2,243,546 parameters, and the critic's head 16,641 more."""
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

# -------- Faster AutoAugment: a step of critic and classifier, a step of the policy -------------------------

def gradient_penalty(critic: Callable, real: Tensor, augmented: Tensor, share: Tensor) -> Tensor:
    """mean((|d critic / d x| - 1)^2) at x = share real + (1 - share) augmented (Gulrajani et al., WGAN-GP).
    real, augmented: (B, 3, H, W), constants; share: (B,) in [0, 1]; critic: images to values (B,). The norm
    is over an image's whole gradient. Differentiable in the critic's parameters: second derivatives."""
    share = share.view(-1, 1, 1, 1)
    x = (share * real + (1 - share) * augmented).detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return ((gradient.flatten(1).norm(dim=1) - 1) ** 2).mean()

class PolicySearch:
    """What Faster AutoAugment learns: a network with two heads, and the policy; and their optimizers."""
    def __init__(self, args: argparse.Namespace, data: Data, device: torch.device):
        self.net = WideResNet(len(data.classes), args.depth, args.width)
        self.net.to(device, memory_format=torch.channels_last)
        self.policy = Policy(args.sub_policies, args.stages).to(device)
        self.net_optimizer = torch.optim.Adam(self.net.parameters(), args.faa_lr, (0.0, 0.999))
        self.policy_optimizer = torch.optim.Adam(self.policy.parameters(), args.policy_lr, (0.0, 0.999))
        self.mean, self.std = common.mean_std(data.train_images)

    def augmented(self, images: Tensor) -> Tensor:
        """Images float in [0, 1] through the policy, normalised."""
        return common.normalize(self.policy(images), self.mean, self.std)

def critic_step(s: PolicySearch, real: Tensor, labels: Tensor, other: Tensor, args) -> Tensor:
    """Move critic and classifier: tell `real` from the augmented `other`, put `real` where its labels say.
    real, other: float (B, 3, H, W) in [0, 1]. Returns (Wasserstein distance as the critic sees it, penalty,
    the classifier's loss, its accuracy in %), detached: (4,)."""
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
    critic_loss = args.penalty * penalty - distance  # Gulrajani et al.: E[D(fake)] - E[D(real)] + penalty
    (args.critic_weight * critic_loss + args.class_weight * class_loss).backward()
    s.net_optimizer.step()
    accuracy = 100 * (logits.argmax(1) == labels).float().mean()
    return torch.stack([distance, penalty, class_loss, accuracy]).detach()

def policy_step(s: PolicySearch, images: Tensor, labels: Tensor, args) -> Tensor:
    """Move z, p and mu: augmented `images` should look real to the critic and keep their labels.
    images: float (B, 3, H, W) in [0, 1]. Returns (the policy's critic loss, its classification loss, the
    accuracy on augmented images in %), detached: (3,)."""
    s.net.requires_grad_(False)
    logits, value = s.net(s.augmented(images))
    critic_loss, class_loss = -value.mean(), F.cross_entropy(logits, labels)  # a generator's: -E[D(fake)]
    s.policy_optimizer.zero_grad()
    (args.critic_weight * critic_loss + args.class_weight * class_loss).backward()
    s.policy_optimizer.step()
    s.policy.clamp()
    return torch.stack([critic_loss, class_loss, 100 * (logits.argmax(1) == labels).float().mean()]).detach()

# -------- The loop ------------------------------------------------------------------------------------------

MEASURED = "distance penalty class_loss accuracy policy_critic_loss policy_class_loss policy_accuracy".split()

RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))  # of torchrun
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

def search_policy(args: argparse.Namespace, data: Data, run: argparse.Namespace) -> Policy:
    """Faster AutoAugment for --faa-epochs epochs on --faa-images images; half of a batch is augmented."""
    torch.manual_seed(args.seed)
    images, labels, device = data.train_images, data.train_labels, data.train_images.device
    s = PolicySearch(args, data, device)
    parts = {name: getattr(s, name) for name in ("net", "policy", "net_optimizer", "policy_optimizer")}
    for name, state in run.state.get("policy", {}).items():
        parts[name].load_state_dict(state)
    few = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed)).to(device)
    few = few[: min(args.faa_images, len(images)) // 2 * 2]
    for epoch in range(len(run.history), args.faa_epochs):
        begun, seed = time.time(), args.seed * 100_003 + epoch
        torch.manual_seed(seed * 1_009)  # every epoch: a resumed run needs no generator's state
        s.net.train()
        order = few[common.batches(len(few), args.faa_batch_size, seed).to(device)]
        meters = torch.zeros(len(order), len(MEASURED), device=device)
        batches = common.loader(images, labels, order, True)
        bar = progress(batches, f"policy {epoch + 1}/{args.faa_epochs}", len(order))
        for step, (x, y) in enumerate(bar):
            x, half = x / 255, len(x) // 2  # an odd one, where an image is damaged, is left out
            real, other, own, others = x[:half], x[half : 2 * half], y[:half], y[half : 2 * half]
            moved = critic_step(s, real, own, other, args), policy_step(s, other, others, args)
            meters[step] = torch.cat(moved)
            if step % 20 == 19:
                text = "distance {:.2f} penalty {:.2f} real {:.2f} {:.1f}%"
                bar.set_postfix_str(text.format(*meters[: step + 1, :4].mean(0).tolist()), refresh=False)
        learned = [*s.net.parameters(), *s.policy.parameters()]
        record = {"epoch": epoch + 1, "phase": "policy"}
        record |= zip(MEASURED, epoch_means(meters, learned, epoch, "--faa-lr or --policy-lr"))
        record["selection"] = dict(zip(AUGMENTATIONS, s.policy.selection().mean((0, 1)).tolist()))
        end_epoch(run, record, begun, policy={name: part.state_dict() for name, part in parts.items()})
    return s.policy

# -------- The other stages: calls of the two scripts --------------------------------------------------------

def die_with_parent() -> None:
    """In a stage's process: leave Ctrl-C to the parent, and (on Linux) end when the parent is killed."""
    os.setpgid(0, 0)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG; torchrun passes it on

class StageFailed(Exception):
    """What to say, and the exit code."""

def stages(args: argparse.Namespace, checking: bool = False) -> dict[str, list[str]]:
    """The called stages: folder -> command. checking: commands that check their flags and need no files."""
    out, script = Path(args.out), "dha.py" if args.method == "dha" else "joint_darts_faa.py"
    command = [sys.executable]
    if args.processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.processes}"]
    command += [str(Path(__file__).with_name(script)), *args.rest]
    names = "preset dataset data_dir image_size limit_train limit_test workers cache_gb seed gpu"
    for name in names.split():
        if getattr(args, name) is not None:
            command += ["--" + name.replace("_", "-"), str(getattr(args, name))]
    command += ["--amp"] * args.amp + ["--skip-damaged"] * args.skip_damaged
    command += ["--check" if checking else "--resume"]
    if args.method == "dha":
        search = [*command, "--no-da", "--no-hpo", "--train-epochs", "0", "--out", str(out / "search")]
        limited = any(word.startswith(("--max-params", "--max-flops", "--space")) for word in args.rest)
        known = [] if limited else ["--genotype", "DARTS_V2"]  # which need not fit
        given = known if checking else ["--genotype", str(out / "search" / "genotype.json")]
        return {"search": search, "train": [*command, *given, "--out", str(out / "train")]}
    policy = "none" if checking or args.method == "darts" else str(out / "policy.json")
    return {"darts": [*command, "--policy", policy, "--out", str(out / "darts")]}

def run_stage(name: str, command: list[str], out: Path) -> dict:
    """Run a stage into `out`, with this program's terminal; returns its result.json. Raises StageFailed."""
    print(f"\nstage {name}: {shlex.join(command[1:])}", flush=True)
    stage = subprocess.Popen(command, preexec_fn=die_with_parent)
    try:
        code = stage.wait()
    except KeyboardInterrupt as e:
        stage.send_signal(e.args[0] - 128)
        stage.wait()
        raise
    if code:
        code = code if code > 0 else 128 - code  # killed by a signal
        raise StageFailed(f"stage {name} ended with exit code {code}, its own message is above", code)
    return read_json(out / "result.json", "seconds", "search_seconds", "gpu_hours", "epochs", "search_epochs")


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

def run_baseline(args: argparse.Namespace, device: torch.device) -> dict:
    """All stages of one seed into the run directory --out; returns what its result.json holds."""
    out = Path(args.out)
    if (out / "result.json").exists():
        print(f"{out} is finished already")
        return read_json(out / "result.json")
    data = load_data(args, device)
    if not (out / "config.json").exists():
        for name, command in stages(args, checking=True).items():
            check = subprocess.run(command, capture_output=True, text=True)
            if check.returncode:
                said = [line for line in check.stderr.splitlines() if line.startswith("error: ")]
                raise InputError(f"stage {name}: {''.join(said).removeprefix('error: ') or check.stderr}")
    if args.check:
        return {"check": "passed"}
    run = open_run(args, device)
    if args.method == "faa-darts" and not (out / "policy.json").exists():
        save(out / "policy.json", search_policy(args, data, run).table())
        panels = {"critic": ["distance", "policy_critic_loss"], "penalty": ["penalty"]}
        panels |= {"class loss (nats)": ["class_loss", "policy_class_loss"]}
        try:
            draw_run(out, run.history, None, panels | {"accuracy (%)": ["accuracy", "policy_accuracy"]})
        except Exception as e:  # whatever matplotlib raises
            print(f"warning: the figure could not be drawn: {type(e).__name__}: {e}")
    del data  # the stages want the memory
    torch.cuda.empty_cache()

    results = {name: run_stage(name, command, out / name) for name, command in stages(args).items()}
    for name in results:
        for line in (out / name / "metrics.jsonl").read_text().splitlines():
            print(json.dumps({"stage": name} | json.loads(line)), file=run.log, flush=True)
        for file in ("genotype.json", "policy.json", "model.pt"):
            if (out / name / file).exists():
                shutil.copyfile(out / name / file, out / file)
    methods = {"faa-darts": "Faster AA, then DARTS", "darts": "DARTS", "dha": "Sequential DHA"}
    spent = run.seconds.get("policy", 0.0)
    own = [spent, spent, spent / 3600, len(run.history), len(run.history)]
    result = list(results.values())[-1] | {"method": methods[args.method]}
    for key, policy in zip(("seconds", "search_seconds", "gpu_hours", "epochs", "search_epochs"), own):
        result[key] = policy + sum(stage[key] for stage in results.values())
    save(out / "result.json", result)
    return result

def compare(folders: list[str]) -> str:
    """A Markdown table of finished runs, in `folders` or one level below: a row a method and data set.
    Runs whose settings differ in value, seed aside, make rows of their own, which name these settings."""
    runs = [path for path in map(Path, folders) if (path / "config.json").exists()]
    runs += [path for name in folders if Path(name) not in runs for path in sorted(Path(name).glob("*"))]
    rows: dict[tuple, list] = {}
    for path in {path.resolve(): path for path in runs if (path / "result.json").exists()}.values():
        result = read_json(path / "result.json", "method", "dataset", "params", "search_seconds", "gpu_hours")
        if "test_accuracy" not in result:
            print(f"note: {path} was a search only")
            continue
        settings = read_json(path / "config.json", "args")["args"]
        for name, handed in (("darts", "policy"), ("train", "genotype")):  # a last stage: what `rest` came to
            if (path / name / "config.json").exists():
                settings = read_json(path / name / "config.json", "args")["args"] | {handed: None} | settings
        own = "preset rest seed repeats out resume check workers cache_gb gpu evaluate compare".split()
        own += ["data_dir"] * (result["dataset"] != "folder")
        kept = {name: str(value) for name, value in sorted(settings.items()) if name not in own}
        numbers = (result[name] for name in ("test_accuracy", "params", "search_seconds", "gpu_hours"))
        try:
            row = rows.setdefault((result["dataset"], result["method"], *kept.items()), [])
            row.append([float(number) for number in numbers])
        except (TypeError, ValueError) as e:
            raise InputError(f"cannot use {path / 'result.json'}: {e}") from e
    if not rows:
        raise InputError("there is no finished run with a test accuracy")
    lines = ["| method | data set | seeds | accuracy (%) | parameters | search (h) | GPU hours | settings |"]
    lines.append("|" + " --- |" * 8)
    for (dataset, method, *settings), group in sorted(rows.items()):
        accuracy, params, search, total = zip(*group)
        others = [set(row[2:]) for row in rows if row[:2] == (dataset, method)]
        differs = [" ".join(pair) for pair in settings if not all(pair in other for other in others)]
        score = f"{mean(accuracy):.2f}" + (f" ± {stdev(accuracy):.2f}" if len(group) > 1 else "")
        size = f"{mean(params) / 1e6:.3g} M | {mean(search) / 3600:.2f} | {mean(total):.2f}"
        lines.append(f"| {method} | {dataset} | {len(group)} | {score} | {size} | {', '.join(differs)} |")
    return "\n".join(lines)

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
    """The settings; what argv does not say is as in `saved`, then as in the preset. rest: what stages get."""
    parser = Parser(__doc__)
    add = parser.add_argument_group("stages, whose own flags can be given too").add_argument
    add("--method", choices=["faa-darts", "darts", "dha"], help="which baseline")
    add("--compare", metavar="DIR", nargs="+", help="print a table of finished runs, of any script, and stop")
    add("--processes", type=int, default=1, help="run the called stages under torchrun, so many processes")
    add = parser.add_argument_group("Faster AutoAugment (stage 1 of faa-darts)").add_argument
    add("--faa-epochs", type=int, default=20, help="epochs of policy search")
    add("--faa-images", type=int, default=4000, help="training images that it sees")
    add("--faa-batch-size", type=int, default=128, help="images a step, half of them augmented")
    add("--faa-lr", type=float, default=1e-3, help="Adam's learning rate of critic and classifier")
    add("--policy-lr", type=float, default=1e-3, help="Adam's learning rate for z, p and mu")
    add("--sub-policies", type=int, default=10, help="L, sub-policies of a policy")
    add("--stages", type=int, default=2, help="K, operations one after the other in a sub-policy")
    add("--class-weight", type=float, default=0.1, help="weight of the classification losses")
    add("--critic-weight", type=float, default=1.0, help="weight of the critic's losses")
    add("--penalty", type=float, default=10.0, help="weight of the gradient penalty")
    add("--depth", type=int, default=40, help="layers of the WideResNet, 6 n + 4")
    add("--width", type=int, default=2, help="its width")
    quick = dict(dataset="shapes", faa_epochs=6, faa_batch_size=64, depth=10, width=1, policy_lr=1e-2)
    presets = {"quick": quick, "imagenet": dict(dataset="imagenet")}
    args, rest = parser.settings(argv, presets, saved)
    args.rest = rest or saved.get("rest", [])
    if any(word.partition("=")[0] == "--policy" for word in rest):
        parser.error("a baseline's policy is that of its first stage: --policy is joint_darts_faa.py's")
    if not (args.method or args.evaluate or args.compare or args.resume):
        parser.error("--method is missing: faa-darts, darts or dha")
    if (args.depth - 4) % 6 or args.depth < 10 or args.faa_batch_size % 2:
        parser.error("--depth must be 6 n + 4 (10, 16, ..., 40), --faa-batch-size even: half is augmented")
    return args

def main(argv: list[str]) -> int:
    """Run a command line; exit code 0, 1 (training failed), 2 (wrong input), 130 or 143 (stopped)."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        args = parse_args(argv)
        if WORLD > 1:
            raise InputError("start this without torchrun: --processes N runs its stages under torchrun")
        if args.compare:
            print(compare(args.compare))
            return 0
        if args.evaluate:  # by the program that trained the network, in the folder of the last stage
            script = {"darts": "joint_darts_faa.py", "train": "dha.py"}
            for name in [name for name in script if (Path(args.evaluate) / name / "model.pt").exists()]:
                command = [sys.executable, str(Path(__file__).with_name(script[name])), *argv]
                return subprocess.call([*command, "--evaluate", str(Path(args.evaluate) / name)])
            raise InputError(f"there is no finished run in {args.evaluate}")
        runs = [settings_of_run(args, argv, args.seed + i) for i in range(args.repeats)]
        if not all(run.method for run in runs):
            raise InputError("--method is missing, and there is no run to go on with")
        device = start_device(args)
        results = [run_baseline(run, device) for run in runs]
        print(json.dumps(results[-1], indent=1))
        if len(results) > 1 and not args.check:
            print(compare([run.out for run in runs]))
        return 0
    except (InputError, OSError, ArithmeticError, torch.cuda.OutOfMemoryError) as e:
        print("error:", str(e).splitlines()[0], file=sys.stderr)
        return 2 if isinstance(e, (InputError, OSError)) else 1
    except StageFailed as e:
        print(f"error: {e.args[0]}; go on with the same command and --resume", file=sys.stderr)
        return e.args[1]
    except KeyboardInterrupt as e:
        print("\nstopped; go on with the same command and --resume", file=sys.stderr)
        return e.args[0]

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
