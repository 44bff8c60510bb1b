# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "torchvision>=0.19", "numpy>=1.26", "pillow>=9.4", "tqdm", "matplotlib>=3.7", "scipy"]
# ///
"""Joint search of augmentation policy and architecture by gradients: DARTS and Faster AutoAugment in one search.

    python joint_darts_faa.py --preset quick                       # minutes on 2 CPU cores, nothing to download
    python joint_darts_faa.py --dataset cifar10 --gpu 0            # the paper's settings
    python joint_darts_faa.py --policy none --dataset cifar10      # plain DARTS, the first row of the paper's table
    python joint_darts_faa.py --resume --out runs/joint_darts_faa-cifar10-seed0    # go on where it stopped

Paper: Kashima, Yamada, Saito, "Joint Search of Data Augmentation Policies and Network Architectures", 2020,
https://arxiv.org/abs/2012.09407; equation numbers are the paper's. Its parts are DARTS (Liu et al., ICLR 2019, first
order) and Faster AutoAugment (Hataya et al., ECCV 2020, without its critic).

    w       weights of the network
    alpha   each edge of the network has 8 candidate operations; alpha has a logit for each
    L, K    number of sub-policies of the policy, and of stages of a sub-policy
    z       each stage selects one of 16 image operations; z has a logit for each
    eta     temperature of that selection, softmax(z / eta)
    p, mu   probability that an operation is applied once it is selected, and its magnitude

The training images are split in two, D_train and D_val. One iteration (Alg. 1):

    1. take a batch of D_val, cropped and flipped; every image draws one of the L sub-policies
    2. in each stage an image becomes the weighted sum of what all 16 operations make of it        Eqs. (1) to (3)
    3. in the network every edge is the weighted sum of its candidates                             Eq. (5)
    4. move z, p, mu and alpha to lower the loss: one backward pass, w fixed (xi = 0)              Eqs. (8), (9)
    5. take a batch of D_train, treat it as in 1 to 3, and move w to lower the loss                Eq. (10)

After the search the strongest candidates make a network. It is trained from scratch with the policy, which now draws
its operations instead of weighting them. Images are always cropped and flipped before the policy, and in the final
training cutout follows it: so the paper has it for its baseline [P], and we for the joint search, too [C]. In the
search there is no cutout [A: DARTS].

Marks: [P] the paper says so. [A] public code does: DARTS', https://github.com/quark0/darts, or that of Faster
AutoAugment (FAA), https://github.com/moskomule/dda, branch fasteraa. [C] our choice, where neither says or we depart
from both.
"""

import argparse
import contextlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torch import Tensor
from tqdm import tqdm

import common
from common import PRIMITIVES, FactorizedReduce, Genotype, InputError, Network

# Under torchrun: this process's number, and how many there are
TORCHRUN = dist.is_torchelastic_launched()
RANK = int(os.environ["RANK"]) if TORCHRUN else 0
WORLD = int(os.environ["WORLD_SIZE"]) if TORCHRUN else 1
QUIET = True if RANK > 0 else None  # for tqdm's `disable`; None: no bar where there is no terminal

GRAD_CLIP = 5.0  # largest norm of the weights' gradient [A: DARTS]

# ---------------------------------------------------------------------------------------------------------------------
# The policy. Its 16 operations (AUGMENTATIONS, SIGNED) and their helpers (per_image, into_range) are at the end:
# operation(images, magnitude) returns images; images (B, 3, H, W) lie in [0, 1], magnitude (B,) too, or in [-1, 1] for
# operations in SIGNED. Some have no derivative of use: a wrapper there gives them one (straight-through).
# ---------------------------------------------------------------------------------------------------------------------


def relaxed_bernoulli(p: Tensor) -> Tensor:
    """A differentiable coin for every entry of p, in [0, 1]: near 1 with probability p, else near 0.

    The Gumbel trick for two outcomes (Maddison et al.; Jang et al.), with a temperature of its own, 0.1 [A: FAA]. The
    clamp leaves no gradient at p = 0 and p = 1.
    """
    p = p.clamp(1e-6, 1 - 1e-6)
    u = torch.rand_like(p).clamp(1e-6, 1 - 1e-6)
    return ((p.logit() + u.logit()) / 0.1).sigmoid()


class Policy(nn.Module):
    """The soft policy of the search, which is differentiable. (After the search `augment` draws its operations.)

    Takes and returns images (B, 3, H, W), float in [0, 1].
    z, p, mu: (L, K, 16) each, so 3 * 16 * K * L parameters: for every sub-policy, stage and operation the logit of
    its selection, the probability that it is applied and its magnitude in [0, 1]; all from U(0, 1) at the start [A:
    FAA]. eta: temperature of the selection [A: FAA]. Every image draws its own sub-policy [C] (FAA: one for a chunk of
    the batch). It also draws the sign of mu for every operation in SIGNED [A: FAA].
    """

    def __init__(self, sub_policies: int = 10, stages: int = 2, eta: float = 0.05):
        super().__init__()
        shape = (sub_policies, stages, len(AUGMENTATIONS))
        self.z = nn.Parameter(torch.rand(shape))
        self.p = nn.Parameter(torch.rand(shape))
        self.mu = nn.Parameter(torch.rand(shape))
        self.eta = eta
        signed = torch.tensor([name in SIGNED for name in AUGMENTATIONS])
        self.register_buffer("signed", signed, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        L, K, _ = self.z.shape
        which = torch.randint(L, (len(images),), device=images.device)  # a sub-policy for every image

        # index_select, because the backward pass of [which] adds in an order that varies, even on a CPU
        weights = self.selection().index_select(0, which)  # sigma_eta(z) of Eqs. (2) and (3), (B, K, 16)
        masks = relaxed_bernoulli(self.p.index_select(0, which))  # of Eq. (1), (B, K, 16)
        signs = 1 - 2 * self.signed * torch.randint(2, masks.shape, device=images.device)  # 1 or -1 for SIGNED, else 1
        magnitudes = self.mu.index_select(0, which) * signs  # (B, K, 16)

        for k in range(K):
            # Of each operation (B,) numbers. unbind is cheaper to differentiate than one index after another
            stage = zip(weights[:, k].unbind(1), masks[:, k].unbind(1), magnitudes[:, k].unbind(1))
            mixed = torch.zeros_like(images)
            for operation, (weight, mask, magnitude) in zip(AUGMENTATIONS.values(), stage):
                changed = operation(images, magnitude)
                maybe = torch.lerp(images, changed, per_image(mask))  # Eq. (1)
                mixed = mixed + per_image(weight) * maybe  # Eq. (2)
            images = into_range(mixed)  # a weighted mean of images lies in [0, 1], but for rounding
        return images

    @torch.no_grad()
    def clamp(self) -> None:
        """p and mu back into [0, 1], after a step [C].

        A p that reaches 0 or 1 stays there: relaxed_bernoulli has no gradient at these values.
        """
        self.p.clamp_(0, 1)
        self.mu.clamp_(0, 1)

    def selection(self) -> Tensor:
        """softmax(z / eta), the probability that an operation is selected: (L, K, 16)."""
        return (self.z / self.eta).softmax(2)

    def as_dict(self) -> dict:
        """The policy as policy.json has it: the names of the operations, and lists of (L, K, 16) numbers."""
        return {
            "operations": list(AUGMENTATIONS),
            "eta": self.eta,
            "z": self.z.tolist(),
            "p": self.p.tolist(),
            "mu": self.mu.tolist(),
        }


@torch.no_grad()
def augment(images: Tensor, policy: Policy) -> Tensor:
    """The policy after the search, when operations are drawn. Takes and returns images (B, 3, H, W) in [0, 1]."""
    L, K, _ = policy.z.shape
    B = len(images)
    which = torch.randint(L, (B,), device=images.device)  # a sub-policy for every image
    selections = policy.selection()[which]  # (B, K, 16)
    for k in range(K):
        # A draw from Cat(selection) for every image: with e_n from Exp(1), selection_n / e_n is the largest with
        # probability selection_n. (torch.multinomial makes a GPU wait)
        selection = selections[:, k]
        drawn = (selection / torch.empty_like(selection).exponential_()).argmax(1)

        # Eq. (1): it is applied with probability p. The sign counts for operations in SIGNED alone (apply_each)
        applied = torch.rand(B, device=images.device) < policy.p[which, k, drawn]
        sign = 1 - 2 * torch.randint(2, (B,), device=images.device)
        magnitude = sign * policy.mu[which, k, drawn]
        images = apply_each(images, torch.where(applied, drawn, -1), magnitude)  # -1: no operation
    return images


# ---------------------------------------------------------------------------------------------------------------------
# The supernet of DARTS: every candidate operation on every edge, weighted by the softmax of the edge's alpha
# ---------------------------------------------------------------------------------------------------------------------

NODES = 4  # of a cell; node j reads the states 0 .. j + 1, of which 0 and 1 are the cell's inputs


class MixedOp(nn.Module):
    """The mixed operation of an edge, Eq. (5): x (B, C, H, W) to (B, C, H/stride, W/stride), rounded up.

    The operations are those of common.operation, and a batch norm after each pool. Their first layers are in `begin`
    (see Beginnings), because all edges that read the same state share them. begin: None makes one for this edge.
    """

    def __init__(self, channels: int, stride: int, begin: "Beginnings | None" = None):
        super().__init__()
        self.begin = begin or Beginnings(channels, stride)
        self.ops = nn.ModuleDict()
        for name in PRIMITIVES[1:]:
            self.ops[name] = rest_of_operation(name, channels, stride)

    def forward(self, x: Tensor | dict[str, Tensor], alpha: Tensor) -> Tensor:
        """x: the state, or self.begin(state). alpha (8,): the edge's logits, in the order of PRIMITIVES."""
        if isinstance(x, Tensor):
            x = self.begin(x)  # {operation: what its remaining layers take}
        weights = alpha.softmax(0)[1:]  # without "none", which adds 0
        weights = weights.to(x["skip_connect"].dtype)  # with --amp float32 weights would make all float32

        mixed = weights.new_zeros(())
        for weight, (name, op) in zip(weights, self.ops.items()):
            mixed = torch.addcmul(mixed, weight, op(x[name]))  # Eq. (5): mixed + weight * op(x), in less memory
        return mixed


class Beginnings(nn.Module):
    """The first layers of the operations on a state (B, C, H, W), by the operation's name. All its edges share them.

    That saves time. A convolution begins with a ReLU, a skip-connection with the state itself. A pool is here as a
    whole, with the batch norm that DARTS' search puts after it. One serves all edges, because nothing in it learns once
    DartsSupernet has called fix_batch_norms.
    """

    def __init__(self, channels: int, stride: int):
        super().__init__()
        self.max_pool = nn.Sequential(nn.MaxPool2d(3, stride, padding=1), nn.BatchNorm2d(channels))
        average = nn.AvgPool2d(3, stride, padding=1, count_include_pad=False)
        self.avg_pool = nn.Sequential(average, nn.BatchNorm2d(channels))

    def forward(self, state: Tensor) -> dict[str, Tensor]:
        x = dict.fromkeys(PRIMITIVES[1:], F.relu(state))
        x["max_pool_3x3"] = self.max_pool(state)
        x["avg_pool_3x3"] = self.avg_pool(state)
        x["skip_connect"] = state
        return x


def rest_of_operation(name: str, channels: int, stride: int) -> nn.Module:
    """common.operation without its first layers, which Beginnings has."""
    if name.endswith("pool_3x3"):
        return nn.Identity()
    layers = common.operation(name, channels, stride)
    return layers if name == "skip_connect" else layers[1:]  # without the ReLU


class DartsCell(nn.Module):
    """A cell whose 14 edges all carry the mixed operation.

    s0 and s1 are the outputs of the cell before last and of the previous cell, with c_before and c_in channels. They
    have one size, (B, ..., H, W), unless `halved`: then s0 has twice the height and width. The output is
    (B, 4 * channels, H, W); with `reduction` it has half of H and W.
    """

    def __init__(self, c_before: int, c_in: int, channels: int, reduction: bool, halved: bool):
        super().__init__()
        self.preprocess0 = FactorizedReduce(c_before, channels) if halved else common.relu_conv_bn(c_before, channels)
        self.preprocess1 = common.relu_conv_bn(c_in, channels)
        strides = [2 if reduction and i < 2 else 1 for i in range(NODES + 1)]  # of the edges from state i
        self.begin = nn.ModuleList(Beginnings(channels, stride) for stride in strides)
        self.edges = nn.ModuleList()
        for j in range(NODES):
            for i in range(j + 2):
                self.edges.append(MixedOp(channels, strides[i], self.begin[i]))

    def forward(self, s0: Tensor, s1: Tensor, alphas: Tensor) -> Tensor:
        """alphas (14, 8): a row per edge, node by node."""
        # A node is the sum of the mixed operations on all earlier states
        x = [self.begin[0](self.preprocess0(s0)), self.begin[1](self.preprocess1(s1))]
        edges = zip(self.edges, alphas.unbind(0))
        nodes = []
        for j in range(NODES):
            node = 0
            for i in range(j + 2):
                edge, alpha = next(edges)
                node = node + edge(x[i], alpha)
            nodes.append(node)
            if j + 1 < NODES:  # no edge reads the last node
                x.append(self.begin[j + 2](node))
        return torch.cat(nodes, 1)  # (B, 4 * channels, H, W); H and W are halved in a reduction cell


class DartsSupernet(nn.Module):
    """The search network of DARTS: normalised images (B, 3, H, W) to logits (B, num_classes).

    alphas_normal, alphas_reduce: (14, 8), one row per edge, node by node, one column for each of PRIMITIVES, as in
    quark0/darts. 16 channels and 8 layers have 1,930,618 weights, without alpha. stem: "cifar" or "imagenet".
    """

    def __init__(self, channels: int, num_classes: int, layers: int, stem: str = "cifar"):
        super().__init__()

        # The cells. Reduction cells, at 1/3 and 2/3, halve height and width and double the channels
        self.stem, self.stem1, c_in, halved = common.stems(stem, channels)
        self.reductions = (layers // 3, 2 * layers // 3)
        self.cells = nn.ModuleList()
        c_before = c_in
        for i in range(layers):
            reduction = i in self.reductions
            if reduction:
                channels *= 2
            self.cells.append(DartsCell(c_before, c_in, channels, reduction, halved))
            c_before = c_in
            c_in = NODES * channels
            halved = reduction
        common.fix_batch_norms(self.cells)  # a learned scale could undo an operation's weight [A: DARTS]
        self.classifier = nn.Linear(c_in, num_classes)

        # All normal cells share one alpha, all reduction cells another
        self.alphas_normal = nn.Parameter(1e-3 * torch.randn(14, len(PRIMITIVES)))
        self.alphas_reduce = nn.Parameter(1e-3 * torch.randn(14, len(PRIMITIVES)))

    def forward(self, x: Tensor) -> Tensor:
        s0 = self.stem(x)
        s1 = self.stem1(s0)
        for i, cell in enumerate(self.cells):
            alphas = self.alphas_reduce if i in self.reductions else self.alphas_normal
            s0, s1 = s1, cell(s0, s1, alphas)
        return self.classifier(s1.mean((2, 3)))

    def alphas(self) -> list[nn.Parameter]:
        return [self.alphas_normal, self.alphas_reduce]

    def genotype(self) -> Genotype:
        """Alg. 1, line 16: every edge takes its strongest operation [P], never "none" [A: DARTS].

        Every node keeps two edges, those whose operations are strongest [A: DARTS].
        """
        cells = []
        for alphas in self.alphas():
            strength, operation = alphas.detach().softmax(1)[:, 1:].cpu().max(1)  # of every edge, (14,)

            # Node by node, the two strongest of its edges
            cell = []
            first = 0  # the number of the node's first edge
            for j in range(NODES):
                count = j + 2
                strongest = strength[first : first + count].topk(2).indices.sort().values
                for state in strongest.tolist():
                    cell.append((PRIMITIVES[1 + operation[first + state]], state))
                first += count
            cells.append(cell)
        return Genotype(cells[0], [2, 3, 4, 5], cells[1], [2, 3, 4, 5])


# ---------------------------------------------------------------------------------------------------------------------
# One iteration (Alg. 1)
# ---------------------------------------------------------------------------------------------------------------------


class JointSearch:
    """Everything that the search learns, and its optimizers.

    given: a fixed architecture, for which there is no alpha; None: it is searched. z, p and mu exist where --policy is
    "search".
    """

    def __init__(
        self, args: argparse.Namespace, data: common.Data, device: torch.device, given: Genotype | None = None
    ):
        # What learns: w, alpha, and the policy's z, p and mu
        self.given = given
        stem = common.stem_for(data.train_images)
        if given:
            self.net = Network(given, len(data.classes), args.search_channels, args.search_layers, stem=stem)
            self.alphas = []
        else:
            self.net = DartsSupernet(args.search_channels, len(data.classes), args.search_layers, stem)
            self.alphas = self.net.alphas()
        self.net.to(device, memory_format=common.layout(device))
        self.w = [weight for name, weight in self.net.named_parameters() if not name.startswith("alphas")]
        self.policy = Policy(args.sub_policies, args.stages).to(device) if args.policy == "search" else None
        self.upper = list(self.alphas)  # what Eq. (9), the upper of the two levels, moves
        if self.policy:
            self.upper += self.policy.parameters()

        # DARTS' optimizers for w and alpha [A: DARTS], Faster AutoAugment's for the policy [A: FAA]
        self.w_optimizer = torch.optim.SGD(self.w, args.lr, momentum=0.9, weight_decay=args.weight_decay)
        self.learned = {"net": self.net, "w_optimizer": self.w_optimizer}  # for the checkpoint
        if self.alphas:
            self.alpha_optimizer = torch.optim.Adam(self.alphas, args.arch_lr, betas=(0.5, 0.999), weight_decay=1e-3)
            self.learned["alpha_optimizer"] = self.alpha_optimizer
        if self.policy:
            self.policy_optimizer = torch.optim.Adam(self.policy.parameters(), args.policy_lr, betas=(0.0, 0.999))
            self.learned["policy"] = self.policy
            self.learned["policy_optimizer"] = self.policy_optimizer
        mean, std = common.mean_std(data.train_images)
        self.mean = mean.to(device)
        self.std = std.to(device)

    def found(self) -> Genotype:
        """The architecture that would be derived now, or that is given."""
        return self.given or self.net.genotype()

    def state_dict(self) -> dict:
        return {name: module.state_dict() for name, module in self.learned.items()}

    def load_state_dict(self, saved: dict) -> None:
        for name, module in self.learned.items():
            module.load_state_dict(saved[name])

    def loss_and_accuracy(self, images: Tensor, labels: Tensor, amp: bool) -> tuple[Tensor, Tensor]:
        """L(w, alpha, z, p, mu), the cross-entropy, and the accuracy in %.

        images uint8 (B, 3, H, W), labels (B,).
        """
        x = images / 255
        if self.policy:
            x = self.policy(x)  # Eq. (2): Alg. 1, lines 4 and 11
        with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
            logits = self.net(common.normalize(x, self.mean, self.std)).float()
        accuracy = 100 * (logits.argmax(1) == labels).float().mean()
        return F.cross_entropy(logits, labels), accuracy  # Alg. 1, lines 5 and 12


@torch.no_grad()
def average_gradients(params: list[Tensor]) -> None:
    """Under torchrun: every gradient becomes its mean over the processes, in place."""
    if dist.is_initialized():
        grads = [parameter.grad for parameter in params if parameter.grad is not None]
        total = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(total)
        means = (total / dist.get_world_size()).split([g.numel() for g in grads])
        for g, mean in zip(grads, means):
            g.copy_(mean.view_as(g))


def only_differentiate(params: list[Tensor], frozen: list[Tensor]) -> None:
    """Let backward passes compute gradients of `params` and none of `frozen`; forget all gradients."""
    for parameter in params:
        parameter.grad = None
        parameter.requires_grad_(True)
    for parameter in frozen:
        parameter.grad = None
        parameter.requires_grad_(False)


def search_step(s: JointSearch, val: tuple[Tensor, Tensor], train: tuple[Tensor, Tensor], amp: bool = False) -> Tensor:
    """One iteration of Alg. 1, whose line numbers are in the comments.

    val, train: a batch of D_val and one of D_train (lines 3 and 10), (images, labels), the images uint8 (B, 3, H, W).
    Returns (4,): loss and accuracy in % on the batch of D_val, then on that of D_train.
    """
    # Eq. (9): the policy and alpha, at the present w (xi = 0 in Eq. 8)
    only_differentiate(s.upper, frozen=s.w)
    loss_val, accuracy_val = s.loss_and_accuracy(*val, amp)  # lines 4 and 5
    loss_val.backward()  # line 6: z, p, mu and alpha at once
    average_gradients(s.upper)
    if s.policy:
        s.policy_optimizer.step()  # line 7
        s.policy.clamp()
    if s.alphas:
        s.alpha_optimizer.step()  # line 8

    # Eq. (10): w, with the new policy and alpha
    only_differentiate(s.w, frozen=s.upper)
    loss_train, accuracy_train = s.loss_and_accuracy(*train, amp)  # lines 11 and 12
    loss_train.backward()  # line 13
    average_gradients(s.w)
    nn.utils.clip_grad_norm_(s.w, GRAD_CLIP)  # [A: DARTS], not in Alg. 1
    s.w_optimizer.step()  # line 14
    return torch.stack([loss_val.detach(), accuracy_val, loss_train.detach(), accuracy_train])


# ---------------------------------------------------------------------------------------------------------------------
# The run: the search, then the training of what it found
# ---------------------------------------------------------------------------------------------------------------------


def run_joint(args: argparse.Namespace, device: torch.device, data: common.Data | None = None) -> None:
    """Search, then train one network; the run directory --out holds all that comes out. data: None loads them."""
    out = Path(args.out)
    if (out / "result.json").exists():
        print(f"{out} is finished already:", (out / "result.json").read_text())
        return

    # Errors of flags, data and files come first, before anything is written
    if data is None:
        data = load_data(args, device)
    check_joint(args, data)
    genotype, policy = given_or_found(args)
    with locked(out):
        history, checkpoint = open_run(args, data, device, __file__, common.__file__)
        print(f"{args.dataset}: {data.describe()}")
        if RANK == 0:
            save_found(out, genotype, policy)

        # What is not given is searched: Alg. 1, line 16 returns the final policy and architecture
        if genotype is None or (policy is None and args.policy == "search"):
            s = search(args, data, device, genotype, history, checkpoint.get("search"))
            genotype = s.found()
            policy = s.policy or policy
            if RANK == 0:
                save_found(out, genotype, policy)

        net = None
        if not args.search_only:
            net = train(args, data, device, genotype, policy, history, checkpoint.get("train"))
        if RANK == 0:
            save_joint(args, data, device, genotype, net, history)


def check_joint(args: argparse.Namespace, data: common.Data) -> None:
    """Raise InputError where the data do not fit the flags of a run."""
    # Are there enough images for the batches of the search and of the training, and can the processes share them?
    count = len(data.train_images)
    if not (args.genotype and args.policy != "search"):
        searched = min(args.search_images or count, count)
        for half in (searched // 2, searched - searched // 2):
            common.check_batch(half, args.search_batch_size, WORLD)
    if not args.search_only:
        common.check_batch(count, args.batch_size, WORLD)
        if args.cutout >= 2 * data.train_images.shape[3]:
            raise InputError(f"--cutout {args.cutout} always hides the whole image: give less")
        if args.auxiliary_weight:
            common.check_auxiliary(data.train_images.shape[3])


def given_or_found(args: argparse.Namespace) -> tuple[Genotype | None, Policy | None]:
    """The architecture and the policy that the run was given, or has found before it was resumed; else None.

    The run directory has a copy of what was given, and what was found.
    """
    genotype = None
    policy = None
    genotype_file = Path(args.out) / "genotype.json"
    policy_file = Path(args.out) / "policy.json"
    if genotype_file.exists() or args.genotype:
        genotype = common.load_genotype(genotype_file if genotype_file.exists() else args.genotype)
    if policy_file.exists() or args.policy not in ("search", "none"):
        policy = load_policy(policy_file if policy_file.exists() else args.policy)
    return genotype, policy


def save_found(out: Path, genotype: Genotype | None, policy: Policy | None) -> None:
    """Write policy.json and genotype.json, those that are not None."""
    if policy:
        save(out / "policy.json", policy.as_dict())
    if genotype:
        common.save_genotype(genotype, out / "genotype.json")


def cosine(start: float, end: float, progress: float) -> float:
    """From start to end along half a cosine, as progress goes from 0 to 1."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def search(
    args: argparse.Namespace,
    data: common.Data,
    device: torch.device,
    given: Genotype | None,
    history: list[dict],
    saved: dict | None,
) -> JointSearch:
    """Alg. 1 for --search-epochs epochs, or the rest of them.

    given: the architecture, if only the policy is searched. history: a record per epoch, of those that are done.
    saved: the state of the search after them.
    """
    torch.manual_seed(args.seed)
    s = JointSearch(args, data, device, given)
    if saved:
        s.load_state_dict(saved)

    shuffled = torch.randperm(len(data.train_images), generator=torch.Generator().manual_seed(args.seed)).to(device)
    D_train, D_val = shuffled[: args.search_images].chunk(2)  # 50/50 [A: DARTS]
    epochs_before = len(history)
    steps = len(D_val) // common.check_batch(len(D_val), args.search_batch_size, WORLD)
    if epochs_before < args.search_epochs:
        announce("search", device, s.net, steps * args.search_epochs)

    for epoch in range(epochs_before, args.search_epochs):  # Alg. 1, line 1
        started = time.perf_counter()
        lr = cosine(args.lr, args.lr / 25, epoch / args.search_epochs)  # 0.025 to 0.001 [A: DARTS]
        s.w_optimizer.param_groups[0]["lr"] = lr
        s.net.train()

        # Each half is gone through once an epoch, in an order of its own [C]
        seed = seed_epoch(args.seed, epoch)
        val_order = common.batch_indices(len(D_val), args.search_batch_size, 2 * seed, RANK, WORLD).to(device)
        train_order = common.batch_indices(len(D_train), args.search_batch_size, 2 * seed + 1, RANK, WORLD).to(device)

        # A batch of D_val (line 3) and one of D_train (line 10). Each loader gets half of --workers
        images, labels = data.train_images, data.train_labels
        half = args.workers // 2
        val_batches = common.loader(images, labels, D_val[val_order], train=True, workers=half)
        train_batches = common.loader(images, labels, D_train[train_order], train=True, workers=args.workers - half)
        batches = zip(val_batches, train_batches)
        totals = torch.zeros(4, device=device)
        for val_batch, train_batch in tqdm(batches, f"search {epoch + 1}", steps, leave=False, disable=QUIET):
            totals += search_step(s, val_batch, train_batch, args.amp)

        flags = "--lr, --arch-lr or --policy-lr"
        val_loss, val_accuracy, loss, accuracy = finite_means(totals / steps, [*s.w, *s.upper], epoch + 1, flags)

        # The epoch's record, with the architecture that would be derived now. Loss and accuracy on D_val are those of
        # augmented images, in training mode, before the step of alpha and the policy
        found = s.found()
        skips = [name for name, _ in found.normal].count("skip_connect")
        record = {
            "epoch": epoch + 1,
            "phase": "search",
            "loss": loss,
            "train_accuracy": accuracy,
            "val_loss": val_loss,
            "val_accuracy": val_accuracy,
            "lr": lr,
            "genotype": str(found),
            "skip_connects": skips,
            "skip_connects_reduce": [name for name, _ in found.reduce].count("skip_connect"),
        }
        if s.policy:  # for Figure 2
            record["selection"] = dict(zip(AUGMENTATIONS, s.policy.selection().mean((0, 1)).tolist()))
        print(
            f"epoch {epoch + 1}  search  L_train {loss:.3f} {accuracy:.1f} %  "
            f"L_val {val_loss:.3f} {val_accuracy:.1f} %  lr {lr:.4f}  normal cell: {skips} of {len(found.normal)} skip"
        )
        if skips > 4 and not given:
            print("warning: most operations of the normal cell are skip-connections: the search may be collapsing.")
            print("metrics.jsonl has every epoch's genotype; in a file, --genotype FILE --policy none trains it")
        record["seconds"] = time.perf_counter() - started
        record["gpus"] = WORLD if device.type == "cuda" else 0
        history.append(record)
        save_epoch(Path(args.out), history, search=s.state_dict())
        if epoch == epochs_before:
            say_end("the search", record["seconds"], args.search_epochs - len(history))
    return s


def train(
    args: argparse.Namespace,
    data: common.Data,
    device: torch.device,
    genotype: Genotype,
    policy: Policy | None,
    history: list[dict],
    saved: dict | None,
) -> Network:
    """Train the network of a genotype from scratch as DARTS does, on images that go through the policy if there is one.

    history: a record per epoch, those of the search first. saved: the state of the training after them.
    """
    # The network, its optimizer, and the policy
    out = Path(args.out)
    torch.manual_seed(args.seed)
    stem = common.stem_for(data.train_images)
    net = Network(genotype, len(data.classes), args.channels, args.layers, args.auxiliary_weight > 0, stem)
    net.to(device, memory_format=common.layout(device))
    model = torch.compile(net) if args.compile else net  # what a step calls
    optimizer = torch.optim.SGD(net.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay)
    if policy:
        policy = policy.to(device)
    mean, std = common.mean_std(data.train_images)
    mean, std = mean.to(device), std.to(device)
    if saved:
        net.load_state_dict(saved["net"])
        optimizer.load_state_dict(saved["optimizer"])

    count = len(data.train_images)
    steps = count // common.check_batch(count, args.batch_size, WORLD)
    announce("training", device, net, steps * args.train_epochs)
    searched = sum(record["phase"] == "search" for record in history)
    epochs_before = len(history)
    for epoch in range(len(history) - searched, args.train_epochs):
        started = time.perf_counter()
        lr = cosine(args.lr, 0.0, epoch / args.train_epochs)
        optimizer.param_groups[0]["lr"] = lr
        drop_path_prob = args.drop_path * epoch / args.train_epochs
        if args.drop_path:
            net.drop_path_prob = torch.tensor(drop_path_prob, device=device)
        net.train()

        seed = seed_epoch(args.seed, len(history))
        order = common.batch_indices(count, args.batch_size, seed, RANK, WORLD).to(device)
        batches = common.loader(data.train_images, data.train_labels, order, train=True)
        totals = torch.zeros(2, device=device)
        for images, labels in tqdm(batches, f"train {epoch + 1}", len(order), leave=False, disable=QUIET):
            # The loader has cropped and flipped the images. Now the policy, then cutout
            x = images / 255
            if policy:
                x = augment(x, policy)
            x = common.cutout(common.normalize(x, mean, std), args.cutout)

            # The loss, and the auxiliary head's
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                output = model(x)
            logits, auxiliary_logits = output if isinstance(output, tuple) else (output, None)
            loss = F.cross_entropy(logits.float(), labels)
            objective = loss
            if auxiliary_logits is not None:
                objective = loss + args.auxiliary_weight * F.cross_entropy(auxiliary_logits.float(), labels)

            optimizer.zero_grad()
            objective.backward()
            average_gradients(list(net.parameters()))
            nn.utils.clip_grad_norm_(net.parameters(), GRAD_CLIP)
            optimizer.step()
            totals += torch.stack([loss.detach(), 100 * (logits.argmax(1) == labels).float().mean()])

        loss, accuracy = finite_means(totals / len(order), list(net.parameters()), len(history) + 1, "--lr")
        test_accuracy = 0.0
        if RANK == 0:
            test_accuracy = evaluate(net, data.test_images, data.test_labels, mean, std)
        record = {
            "epoch": len(history) + 1,
            "phase": "train",
            "loss": loss,
            "train_accuracy": accuracy,
            "test_accuracy": test_accuracy,
            "lr": lr,
            "drop_path": drop_path_prob,
        }
        print(
            f"epoch {record['epoch']}  train  loss {loss:.3f}  train {accuracy:.1f} %  "
            f"test {test_accuracy:.1f} %  lr {lr:.4f}"
        )
        record["seconds"] = time.perf_counter() - started
        record["gpus"] = WORLD if device.type == "cuda" else 0
        history.append(record)
        save_epoch(out, history, train={"net": net.state_dict(), "optimizer": optimizer.state_dict()})
        if len(history) == epochs_before + 1:
            say_end("the training", record["seconds"], args.train_epochs - epoch - 1)
    return net


# ---------------------------------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------------------------------

PRESETS = {
    "paper": {},  # the defaults of the flags: CIFAR-10
    "quick": dict(
        dataset="shapes", search_epochs=4, search_images=768, search_channels=8, search_layers=3, arch_lr=3e-3,
        policy_lr=1e-2, train_epochs=4, batch_size=64, channels=8, layers=3, lr=0.1, auxiliary_weight=0.0,
        drop_path=0.0, cutout=0,
    ),
}  # fmt: skip


def parse_args(argv: list[str]) -> argparse.Namespace:
    summary = __doc__.split("\n")[0] + " Values are the paper's [P], public code's [A] or ours [C]."
    parser = argparse.ArgumentParser(
        usage="%(prog)s [flags]",
        description=summary,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )

    add_run_flags(parser, list(PRESETS))

    add = parser.add_argument_group("search").add_argument
    add("--search-epochs", type=at_least(1), default=50, help="epochs of search; the paper has 50 and 25 [P]")
    add("--search-batch-size", type=at_least(2), default=64, help="images per batch of the search [A: DARTS]")
    add("--search-images", type=at_least(4), help="search on so many training images; None: all [A: DARTS]")
    add("--search-channels", type=at_least(2), default=16, help="channels of the supernet, even [A: DARTS]")
    add("--search-layers", type=at_least(3), default=8, help="cells of the supernet [A: DARTS]")
    add("--search-only", action="store_true", help="stop after the search, with what it found")
    add("--genotype", type=os.path.expanduser, help=f"search no cells: use {', '.join(common.GENOTYPES)}, or a file")
    add("--arch-lr", type=at_least(0.0), default=3e-4, help="Adam's learning rate for alpha [A: DARTS]")
    add("--policy", type=os.path.expanduser, default="search", help="search, none, or a policy.json to train with")
    add("--policy-lr", type=at_least(0.0), default=1e-3, help="Adam's learning rate for z, p and mu [A: FAA]")
    add("--sub-policies", type=at_least(1), default=10, help="L, sub-policies of a policy [P]")
    add("--stages", type=at_least(1), default=2, help="K, stages of a sub-policy, an operation each [P]")

    add = parser.add_argument_group("training (--lr and --weight-decay also hold in the search)").add_argument
    add("--train-epochs", "--epochs", type=at_least(0), default=600, help="epochs of training [P]")
    add("--batch-size", type=at_least(2), default=96, help="images per step, of all processes together [A: DARTS]")
    add("--channels", type=at_least(2), default=36, help="channels of the first cells, even [A: DARTS]")
    add("--layers", type=at_least(3), default=20, help="cells; reductions at 1/3 and 2/3 [A: DARTS]")
    add("--lr", type=at_least(0.0), default=0.025, help="learning rate at the start [A: DARTS]")
    add("--weight-decay", type=at_least(0.0), default=3e-4, help="weight decay [A: DARTS]")
    add("--auxiliary-weight", type=at_least(0.0), default=0.4, help="weight of the auxiliary head's loss [A: DARTS]")
    add("--drop-path", type=at_least(0.0, 1.0), default=0.2, help="probability towards which it rises [A: DARTS]")
    add("--cutout", type=at_least(0), default=16, help="side of the square, in pixels [A: DARTS]")

    # The preset replaces defaults, which --help then shows; flags that are given win
    first_look = argparse.ArgumentParser(usage=parser.usage, add_help=False, allow_abbrev=False)
    first_look.add_argument("--preset", default="paper")
    preset = first_look.parse_known_args(argv)[0].preset
    replace_defaults(parser, PRESETS.get(preset, {}), f"preset {preset}")

    args = resume_flags(parser, argv, parser.parse_args(argv), __file__)

    if args.channels % 2 or args.search_channels % 2:
        parser.error("--channels and --search-channels must be even: a factorized reduction splits them in two")
    searches = not args.genotype or args.policy == "search"
    if args.search_only and not searches:
        parser.error("nothing to do: --search-only, and both architecture and policy are given")
    if not (args.train_epochs or args.search_only):
        parser.error("nothing to do: --train-epochs 0 needs --search-only")
    if args.policy != "search":
        note_unused(argv, ["--policy-lr", "--sub-policies", "--stages"], f"--policy {args.policy}")
    if args.genotype:
        note_unused(argv, ["--arch-lr"], "--genotype")
    if not searches:
        search_flags = ["--search-epochs", "--search-batch-size", "--search-images", "--search-channels"]
        note_unused(argv, [*search_flags, "--search-layers"], "a given genotype and policy")
    if args.amp and args.gpu < 0:
        print("note: --amp is for a GPU: it is switched off")
        args.amp = False
    return args


def add_run_flags(parser: argparse.ArgumentParser, presets: list[str]) -> None:
    """The flags that say what to run, and on what."""
    add = parser.add_argument_group("what to run, on what (not the method: no marks)").add_argument
    add("--preset", choices=presets, default="paper", help="changes the defaults of other flags")
    add("--dataset", choices=common.DATASETS, default="cifar10", help="data set")
    add("--data-dir", type=os.path.expanduser, default="data", help="where data sets are, or are downloaded to")
    add("--image-size", type=at_least(8), help="scale to this side; None: photographs to 224, others not at all")
    add("--limit-train", type=at_least(2), help="use only so many training images; None: all")
    add("--limit-test", type=at_least(1), help="use only so many test images; None: all")
    add("--workers", type=at_least(0), default=4, help="processes that read photographs")
    add("--seed", type=at_least(0, 2**31), default=0, help="seed of everything random")
    add("--gpu", type=at_least(-1), default=0 if torch.cuda.is_available() else -1, help="GPU number; -1 is the CPU")
    add("--amp", action="store_true", help="bfloat16 autocast, to save memory (GPU only)")
    add("--compile", action="store_true", help="torch.compile the network that is trained; takes minutes to begin")
    add("--out", type=os.path.expanduser, help="run directory; None: one in runs/, named by what runs on which data")
    add("--resume", action="store_true", help="go on with the run in --out, if there is one")


def replace_defaults(parser: argparse.ArgumentParser, values: dict, mark: str) -> None:
    """Change the defaults of flags, and the marks at the end of their help."""
    parser.set_defaults(**values)
    for action in parser._actions:
        if action.dest in values:
            action.help = re.sub(r" \[[^]]*\]$", "", action.help) + f" [{mark}]"


def at_least(low: float, below: float = math.inf):
    """A `type` for argparse: numbers of low's own type, in [low, below)."""

    def number(text: str) -> float:
        value = type(low)(text)
        if not low <= value < below:
            raise argparse.ArgumentTypeError(f"{text} is not in [{low}, {below})")
        return value

    return number


def note_unused(argv: list[str], flags: list[str], chosen: str) -> None:
    """Say which of these flags do nothing, because of the chosen one."""
    given = [word.split("=")[0] for word in argv]
    for flag in flags:
        if flag in given:
            print(f"note: {flag} does nothing with {chosen}")


def default_out(name: str, args: argparse.Namespace) -> str:
    """The run directory where --out is not given. A folder of images goes by its own name."""
    dataset = Path(args.data_dir).resolve().name if args.dataset == "folder" else args.dataset
    return f"runs/{name}-{dataset}-seed{args.seed}"


RUN_FILES = ("config.json", "metrics.jsonl", "checkpoint.pt", "genotype.json", "policy.json", "model.pt", "result.json")
FREE_ON_RESUME = ("out", "resume", "gpu", "amp", "compile", "workers", "data_dir")  # flags that --resume may change


def resume_flags(
    parser: argparse.ArgumentParser, argv: list[str], args: argparse.Namespace, script: str
) -> argparse.Namespace:
    """The flags of the run in --out, if --resume goes on with one; else args, which begin a new run.

    script: its path. Ends the program where --out holds another run, or a flag contradicts the
    run's own.
    """
    name = Path(script).stem
    args.out = args.out or default_out(name, args)
    folder = Path(args.out)

    # A new run begins where there is none
    if not (args.resume and (folder / "config.json").exists()):
        advice = "choose another --out" if args.resume else "choose another --out, or --resume that run"
        for file in RUN_FILES:
            if (folder / file).exists():
                parser.error(f"{folder} holds the {file} of a run: {advice}")
        return args

    try:
        config = json.loads((folder / "config.json").read_text())
        saved = dict(config["args"])
        begun_by = config["script"]
    except (OSError, ValueError, TypeError, LookupError) as error:
        parser.error(f"cannot read {folder / 'config.json'}: {type(error).__name__}")
    if begun_by != f"{name}.py":
        parser.error(f"{folder} holds a run of {begun_by}")

    # argparse keeps what the namespace has, where argv does not say otherwise
    args, _ = parser.parse_known_args(argv, argparse.Namespace(**{**saved, "out": args.out}))
    finished = (folder / "result.json").exists()  # then its result is shown: not for other data
    for flag, value in saved.items():
        free = flag in FREE_ON_RESUME and not (finished and flag == "data_dir")
        if not free and getattr(args, flag) != value:
            name = "--" + flag.replace("_", "-")
            parser.error(f"{folder} was started with {name} {value}: leave out the flags that differ")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Around a run: processes, device, evaluation. (What both methods' scripts have is the same, word for word.)
# ---------------------------------------------------------------------------------------------------------------------


def seed_epoch(seed: int, epoch: int) -> int:
    """Seed all that an epoch draws, in every process differently. Returns a seed for its batches, the same in all.

    So a resumed run goes on as if it had never stopped. The factors keep runs, epochs and processes apart.
    """
    epoch_seed = 100_003 * seed + epoch
    torch.manual_seed(1_009 * epoch_seed + RANK)
    return epoch_seed


def load_data(args: argparse.Namespace, device: torch.device) -> common.Data:
    """The data set on the device. Under torchrun process 0 is first, because it may have to download it."""
    if RANK > 0:
        dist.barrier()
    data = common.load_data(
        args.dataset, args.data_dir, args.image_size, args.limit_train, args.limit_test, args.workers, args.seed
    )
    if WORLD > 1 and RANK == 0:
        dist.barrier()
    return data.to(device)


def announce(what: str, device: torch.device, net: nn.Module, steps: int) -> None:
    """Say what will be trained on which device, and warn where a CPU would need days."""
    parameters = common.count_parameters(net)
    print(f"{what} on {device}: {parameters:,} parameters, {steps:,} steps")
    if device.type == "cpu" and parameters * steps > 1e11:
        print("warning: on a CPU this takes days or weeks; --preset quick takes minutes, --gpu 0 is for a GPU")


def say_end(what: str, seconds: float, epochs: int) -> None:
    """Say when `what` ends: it has `epochs` more, each of which takes `seconds`."""
    left = timedelta(seconds=round(seconds * epochs))
    print(f"{what} takes about {left} more, until {datetime.now() + left:%d %b %H:%M}")


def join_processes(args: argparse.Namespace) -> None:
    """Under torchrun: join the process group, and give every process a GPU of its own."""
    if WORLD > 1:
        dist.init_process_group("gloo" if args.gpu < 0 else "cpu:gloo,cuda:nccl")
        if args.gpu >= 0:
            args.gpu = int(os.environ["LOCAL_RANK"])


def device_of(gpu: int) -> torch.device:
    """The CPU for -1, else that GPU, set up for speed. Raises InputError if there is no such GPU."""
    if gpu < 0:
        return torch.device("cpu")
    if gpu >= torch.cuda.device_count():
        raise InputError(f"no GPU {gpu}: this machine has {torch.cuda.device_count()}; --gpu -1 is the CPU")
    torch.cuda.set_device(gpu)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")  # TF32
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    return torch.device("cuda", gpu)


@torch.no_grad()
def evaluate(net: nn.Module, images: Tensor | common.Photos, labels: Tensor, mean: Tensor, std: Tensor) -> float:
    """Accuracy in % on the images of a data set; leaves the network's mode as it was."""
    training = net.training
    net.eval()
    order = torch.arange(len(labels), device=labels.device).split(500 if images.shape[3] < 64 else 50)
    correct = torch.zeros((), device=labels.device)
    for x, y in common.loader(images, labels, order, train=False):
        correct += (net(common.normalize(x, mean, std)).argmax(1) == y).sum()
    net.train(training)
    return 100 * float(correct) / len(labels)


def finite_means(means: Tensor, learned: list[Tensor], epoch: int, flags: str) -> list[float]:
    """An epoch's means, over all processes. Ends the program if a mean or a learned tensor is not finite."""
    if dist.is_initialized():
        dist.all_reduce(means)
        means = means / dist.get_world_size()
    norms = torch.stack(torch._foreach_norm(learned))
    if not (means.isfinite().all() and norms.isfinite().all()):
        message = f"error: a loss or a weight is not finite in epoch {epoch}; the last good checkpoint is kept"
        sys.exit(f"{message}. Start again in another --out, with a lower {flags}")
    return means.tolist()


# ---------------------------------------------------------------------------------------------------------------------
# The run directory
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder, and lock it against other processes.

    The lock ends with the block. If this process is killed, it ends with it and the processes that it started.
    """
    if RANK == 0:
        folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as at_the_end:
        try:
            if RANK == 0:
                import fcntl  # not on Windows

                descriptor = os.open(folder, os.O_RDONLY)
                at_the_end.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another process is writing {folder}") from None
        except (ImportError, OSError) as error:
            print(f"warning: {folder} cannot be locked ({error}): start no second run in it")
        yield


def open_run(
    args: argparse.Namespace, data: common.Data, device: torch.device, *scripts: str
) -> tuple[list[dict], dict]:
    """Begin the run in --out, or go on with it. Returns its history and its whole checkpoint.pt, empty at the start.

    scripts: the file that runs, and those it needs; copies of them, as they are at the start, are kept. Raises
    InputError where the run was started on other data, or its checkpoint is damaged.
    """
    out = Path(args.out)
    config = {
        "script": Path(scripts[0]).name,
        "args": vars(args),
        "data": data.fingerprint(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": sys.version,
        "device": str(device),
    }
    if RANK == 0 and (out / "config.json").exists():
        begun = json.loads((out / "config.json").read_text())
        if begun["data"] != config["data"]:
            raise InputError(f"{out} was started on other data than {args.data_dir} holds now: see its config.json")
    elif RANK == 0:
        for script in scripts:
            save(out / Path(script).name, Path(script).read_bytes())
        save(out / "config.json", config)

    # What the last finished epoch has left
    if not (out / "checkpoint.pt").exists():
        return [], {}
    try:
        checkpoint = torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True)
        return checkpoint["history"], checkpoint
    except Exception as error:  # a damaged file can make the unpickler raise anything
        raise InputError(f"cannot read {out}/checkpoint.pt: delete {out}, start again") from error


def save_epoch(out: Path, history: list[dict], **learned: dict) -> None:
    """checkpoint.pt, then metrics.jsonl, which is written whole from the history: a killed run loses no line."""
    if RANK == 0:
        save(out / "checkpoint.pt", {"history": history, **learned})
        save(out / "metrics.jsonl", history)


def save(path: Path, content: dict | list | bytes) -> None:
    """Write a .pt, .json or .jsonl file, or bytes, whole or not at all: a file that is there is complete."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        if isinstance(content, bytes):
            file.write(content)
        elif path.suffix == ".pt":
            torch.save(content, file)
        elif path.suffix == ".jsonl":
            file.writelines(json.dumps(record).encode() + b"\n" for record in content)
        else:
            file.write(json.dumps(content, indent=1).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def costs(history: list[dict]) -> dict:
    """Epochs, seconds and GPU hours of a run, for result.json."""
    search = [record for record in history if record["phase"] != "train"]
    return {
        "epochs": len(history),
        "search_epochs": len(search),
        "seconds": sum(record["seconds"] for record in history),
        "search_seconds": sum(record["seconds"] for record in search),
        "gpu_hours": sum(record["seconds"] * record["gpus"] for record in history) / 3600,
    }


def save_joint(
    args: argparse.Namespace,
    data: common.Data,
    device: torch.device,
    genotype: Genotype,
    net: Network | None,
    history: list[dict],
) -> None:
    """Write metrics.jsonl, model.pt, the figures, and at the end result.json. net: None after --search-only."""
    out = Path(args.out)
    save(out / "metrics.jsonl", history)  # the run may have been killed before it could
    image_size = data.train_images.shape[3]
    size = {
        "num_classes": len(data.classes),
        "channels": args.channels,
        "layers": args.layers,
        "stem": common.stem_for(data.train_images),
    }
    plain = Network(genotype, **size).to(device)  # no auxiliary head

    # A name for the run. "DARTS + Faster AA" is the joint search, Table 1's "Ours"
    method = "given genotype" if args.genotype else "DARTS"
    if args.policy == "search":
        method += " + Faster AA"
    elif args.policy != "none":
        method += " + given policy"
    result = {
        "method": method,
        "dataset": args.dataset,
        "seed": args.seed,
        "params": common.count_parameters(plain),
        "flops": common.count_flops(plain, image_size),
        "genotype": str(genotype),
        **costs(history),
    }

    # The trained network, with all that its user needs
    if net is not None:
        plain.load_state_dict(net.state_dict(), strict=False)  # without the auxiliary head
        mean, std = common.mean_std(data.train_images)
        result = {"test_accuracy": history[-1]["test_accuracy"], **result}
        model = {
            "state_dict": {name: value.cpu().contiguous() for name, value in plain.state_dict().items()},
            "genotype": str(genotype),
            **size,
            "classes": data.classes,
            "image_size": image_size,
            "mean": mean.cpu(),
            "std": std.cpu(),
        }
        save(out / "model.pt", model)

    first = torch.arange(min(8, len(data.test_labels)), device=device)[None]
    images, _ = next(common.loader(data.test_images, data.test_labels, first, train=False))
    try:
        draw_joint(out, history, genotype, images.cpu() / 255)
    except Exception as error:  # a fault in a figure must not lose the result
        print(f"warning: a figure could not be drawn: {type(error).__name__}: {error}")
    save(out / "result.json", result)
    print(json.dumps(result, indent=1))


def load_policy(path: str | Path) -> Policy:
    """The policy in a policy.json, for `augment`. Raises InputError where the file holds none."""
    try:
        content = json.loads(Path(path).read_text())
        if "probability" in content:
            raise ValueError("it is a policy of dha.py, of pairs of operations, which this script cannot use")
        if content["operations"] != list(AUGMENTATIONS):
            raise ValueError("its operations differ, or their order does")
        numbers = {name: torch.tensor(content[name], dtype=torch.float32) for name in ("z", "p", "mu")}
        policy = Policy(*numbers["z"].shape[:2], eta=float(content["eta"]))
        policy.load_state_dict(numbers)
        both = torch.stack([policy.p, policy.mu])
        if not (policy.eta > 0 and policy.z.isfinite().all() and both.min() >= 0 and both.max() <= 1):
            raise ValueError("a number is out of its range")
    except Exception as error:  # what other people's files raise
        message = f"cannot use the policy in {path}: {type(error).__name__}: {error}"
        raise InputError(message.splitlines()[0]) from error
    return policy.requires_grad_(False)


def load_network(path: str | Path, device: torch.device | str = "cpu") -> tuple[Network, dict]:
    """The network in a model.pt, in eval mode, and what else the file holds (classes, mean, std, image_size, ...).

    It takes images normalised with that mean and std: common.normalize(images, info["mean"], info["std"]).
    """
    try:
        info = torch.load(path, map_location=device, weights_only=True)
        genotype = common.parse_genotype(info["genotype"])
        net = Network(genotype, info["num_classes"], info["channels"], info["layers"], stem=info["stem"])
        net.load_state_dict(info.pop("state_dict"))
    except Exception as error:  # a damaged file can make the unpickler raise anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"cannot read the model {path}: {reason}") from error
    return net.to(device).eval(), info


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------

if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"  # the environment may name a backend that is not installed
try:
    from matplotlib import colormaps
    from matplotlib.figure import Figure
except (ImportError, ValueError):  # ValueError: MPLBACKEND names no backend
    Figure = None  # no figures


def draw_joint(out: Path, history: list[dict], genotype: Genotype, images: Tensor) -> None:
    """images.png, cells.png, curves.png, and selection.png, the paper's Figure 2.

    selection.png has softmax(z / eta), its mean over sub-policies and stages [C]. images: test images (B, 3, H, W) in
    [0, 1]; images.png shows what the policy does to them.
    """
    if (out / "policy.json").exists():
        torch.manual_seed(0)
        policy = load_policy(out / "policy.json")
        rows = torch.cat([images] + [augment(images, policy) for _ in range(4)])
        rows = rows.repeat_interleave(3, 2).repeat_interleave(3, 3)
        torchvision.utils.save_image(rows, out / "images.png", nrow=len(images), padding=6, pad_value=1.0)

    if Figure is None:
        print("no figures: matplotlib is missing (pip install matplotlib)")
        return
    draw_cells(out / "cells.png", genotype)
    panels = {
        "loss (nats)": ["loss", "val_loss"],
        "accuracy (%)": ["train_accuracy", "val_accuracy", "test_accuracy"],
        "skip-connections, of 8 operations": ["skip_connects", "skip_connects_reduce"],
    }
    draw_curves(out / "curves.png", history, panels)

    records = [record for record in history if "selection" in record]
    if len(records) > 1:  # one epoch makes no area
        figure = Figure(figsize=(9, 4.8), layout="constrained")
        axis = figure.subplots()
        epochs = [record["epoch"] for record in records]
        shares = torch.tensor([list(record["selection"].values()) for record in records]).T  # (16, epochs)
        axis.stackplot(epochs, shares.numpy(), labels=list(AUGMENTATIONS), colors=colormaps["tab20"].colors)
        axis.set(ylim=(0, 1), xlabel="epoch", title="Selection of each operation, mean over the policy")
        axis.locator_params(axis="x", integer=True)
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), reverse=True)
        figure.savefig(out / "selection.png", dpi=150)


def draw_curves(path: Path, history: list[dict], panels: dict[str, list[str]]) -> None:
    """A panel for each title, with the named numbers of the records over the epochs; dashed where the search ends."""
    # Leave out numbers that no record has: a run may be a search alone, or a training alone
    recorded = {name for record in history for name in record}
    panels = {title: [name for name in names if name in recorded] for title, names in panels.items()}
    panels = {title: names for title, names in panels.items() if names}

    figure = Figure(figsize=(4 * len(panels), 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels))
    searched = sum(record["phase"] != "train" for record in history)
    for axis, (title, names) in zip(axes, panels.items()):
        for name in names:
            records = [record for record in history if name in record]
            axis.plot([record["epoch"] for record in records], [record[name] for record in records], ".-", label=name)
        if 0 < searched < len(history):
            axis.axvline(0.5 + searched, color="0.5", linestyle="--")
        axis.set(title=title, xlabel="epoch")
        axis.locator_params(axis="x", integer=True)
        axis.legend()
    figure.savefig(path, dpi=150)


def draw_cells(path: Path, genotype: Genotype) -> None:
    """The normal cell above the reduction cell."""
    figure = Figure(figsize=(10, 6.4))
    upper, lower = figure.subplots(2, 1)
    common.draw_cell(genotype.normal, genotype.normal_concat, upper, "Normal cell")
    common.draw_cell(genotype.reduce, genotype.reduce_concat, lower, "Reduction cell")
    figure.savefig(path, bbox_inches="tight", dpi=150)


# ---------------------------------------------------------------------------------------------------------------------
# The program
# ---------------------------------------------------------------------------------------------------------------------


def main(argv: list[str]) -> None:
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    elif hasattr(sys.stdout, "reconfigure"):  # a notebook's stdout has no such method
        sys.stdout.reconfigure(line_buffering=True)  # so that a job's log has every line at once

    try:
        args = parse_args(argv)
        join_processes(args)
        with common.workers_explained():
            run_joint(args, device_of(args.gpu))
    except (InputError, OSError, torch.cuda.OutOfMemoryError) as error:  # all else keeps its traceback
        print("error:", *str(error).splitlines()[:1], file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("\nstopped: the same command with --resume goes on after the last epoch")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# Augmentations: images (B, 3, H, W) float in [0, 1], magnitude (B,) in [0, 1], in [-1, 1] for those in SIGNED.
# Where an operation has a magnitude, 0 is the identity. Ranges are AutoAugment's [C]. The input is never changed;
# the result lies in [0, 1]. A new one needs a name in AUGMENTATIONS, and perhaps in SIGNED.
# ---------------------------------------------------------------------------------------------------------------------


def per_image(values: Tensor) -> Tensor:
    """(B,) to (B, 1, 1, 1)."""
    return values.view(-1, 1, 1, 1)


def into_range(images: Tensor) -> Tensor:
    """Clamp to [0, 1]. (By hardtanh: since torch 2.14 torch.clamp passes no gradient on at exactly 0 and 1.)"""
    out = F.hardtanh(images, -1e-6, 1 + 1e-6)
    with torch.no_grad():
        return out.clamp_(0, 1)


def pixel_centers(images: Tensor) -> tuple[Tensor, Tensor]:
    """x (1, 1, W) and y (1, H, 1) of the pixels, from the top left corner: 0.5, 1.5, ..."""
    H, W = images.shape[2:]
    x = torch.arange(W, device=images.device, dtype=images.dtype) + 0.5
    y = torch.arange(H, device=images.device, dtype=images.dtype) + 0.5
    return x.view(1, 1, W), y.view(1, H, 1)


def sample_at(images: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Each pixel shows the input at (x, y); both expand to (B, H, W). Bilinear; outside is 0."""
    B, _, H, W = images.shape
    grid = torch.stack([(x * 2 / W - 1).expand(B, H, W), (y * 2 / H - 1).expand(B, H, W)], -1)
    return into_range(F.grid_sample(images, grid, padding_mode="zeros", align_corners=False))


def shear_x(images: Tensor, magnitude: Tensor) -> Tensor:
    """Shear by up to 0.3 pixels per row; the top edge stays."""
    x, y = pixel_centers(images)
    return sample_at(images, x + 0.3 * magnitude.view(-1, 1, 1) * y, y)


def shear_y(images: Tensor, magnitude: Tensor) -> Tensor:
    """Shear by up to 0.3 pixels per column; the left edge stays."""
    x, y = pixel_centers(images)
    return sample_at(images, x, y + 0.3 * magnitude.view(-1, 1, 1) * x)


def translate_x(images: Tensor, magnitude: Tensor) -> Tensor:
    """Move right by up to 0.45 of the width."""
    x, y = pixel_centers(images)
    return sample_at(images, x - 0.45 * images.shape[3] * magnitude.view(-1, 1, 1), y)


def translate_y(images: Tensor, magnitude: Tensor) -> Tensor:
    """Move down by up to 0.45 of the height."""
    x, y = pixel_centers(images)
    return sample_at(images, x, y - 0.45 * images.shape[2] * magnitude.view(-1, 1, 1))


def rotate(images: Tensor, magnitude: Tensor) -> Tensor:
    """Turn counter-clockwise around the centre by up to 30 degrees."""
    H, W = images.shape[2:]
    x, y = pixel_centers(images)
    dx = x - W / 2
    dy = y - H / 2
    angle = magnitude.view(-1, 1, 1) * math.pi / 6
    cos = angle.cos()
    sin = angle.sin()
    return sample_at(images, cos * dx - sin * dy + W / 2, sin * dx + cos * dy + H / 2)


def blend(ground: Tensor, images: Tensor, magnitude: Tensor) -> Tensor:
    """ground + (1 + 0.9 magnitude) (images - ground): away from `ground` for magnitude > 0, towards it below 0."""
    return into_range(torch.lerp(ground, images, 1 + 0.9 * per_image(magnitude)))


def gray(images: Tensor) -> Tensor:
    """Luma, ITU-R 601-2: (B, 1, H, W). An image of one channel is gray already."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.split(1, dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def brightness(images: Tensor, magnitude: Tensor) -> Tensor:
    """Blend with black."""
    return into_range(images * (1 + 0.9 * per_image(magnitude)))


def color(images: Tensor, magnitude: Tensor) -> Tensor:
    """Blend with the gray image."""
    return blend(gray(images), images, magnitude)


def contrast(images: Tensor, magnitude: Tensor) -> Tensor:
    """Blend with the image's mean gray."""
    return blend(gray(images).mean((2, 3), keepdim=True), images, magnitude)


def sharpness(images: Tensor, magnitude: Tensor) -> Tensor:
    """Blend with the smoothed image: 3x3, the centre weighs 5/13, its neighbours 1/13; the border stays as it is."""
    if min(images.shape[2:]) < 3:
        return images.clone()
    inside = images[:, :, 1:-1, 1:-1]
    rows = images[:, :, :-2] + images[:, :, 1:-1] + images[:, :, 2:]
    smooth = (rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * inside) / 13
    return blend(images + F.pad(smooth - inside, (1, 1, 1, 1)), images, magnitude)


def horizontal_flip(images: Tensor, magnitude: Tensor) -> Tensor:
    return images.flip(3)


def invert(images: Tensor, magnitude: Tensor) -> Tensor:
    return 1 - images


def solarize(images: Tensor, magnitude: Tensor) -> Tensor:
    """Invert what is at least as bright as 1 - magnitude; nothing where magnitude is 0."""
    m = per_image(magnitude)
    bright = (images >= 1 - m - 1e-5) & (m > 0)  # 1e-5: rounding, where a pixel is as bright as the threshold
    return torch.where(bright, 1 - images, images)


def posterize(images: Tensor, magnitude: Tensor) -> Tensor:
    """Keep the highest 8 - round(4 magnitude) of 8 bits."""
    lost_bits = (4 * per_image(magnitude)).round()
    step = 2**lost_bits
    kept = ((images * 255).round() / step).floor() * step / 255
    return torch.where(step > 1, kept, images)


def auto_contrast(images: Tensor, magnitude: Tensor) -> Tensor:
    """Stretch every channel to the full range; on 8-bit levels and with PIL's rounding."""
    levels = (images * 255).round().long().clamp(0, 255).flatten(2)  # (B, 3, H W)
    low = levels.amin(2, keepdim=True).double()
    high = levels.amax(2, keepdim=True).double()
    scale = torch.full_like(low, 255.0) / (high - low).clamp(min=1)  # 255.0 / x is 255.0 * (1 / x) in torch: not PIL's
    every_level = torch.arange(256, device=images.device, dtype=torch.float64)
    stretched = (every_level * scale - low * scale).floor().clamp(0, 255)
    table = torch.where(high > low, stretched, every_level) / 255  # (B, 3, 256): the new value of each level
    return table.to(images.dtype).gather(2, levels).view(images.shape)


def equalize(images: Tensor, magnitude: Tensor) -> Tensor:
    """Flatten every channel's histogram; on 8-bit levels and with PIL's rounding."""
    levels = (images * 255).round().long().clamp(0, 255).flatten(2)  # (B, 3, H W)
    histogram = levels.new_zeros(*levels.shape[:2], 256).scatter_add_(2, levels, torch.ones_like(levels))
    brightest = histogram.gather(2, levels.amax(2, keepdim=True))
    step = (levels.shape[2] - brightest) // 255
    below = histogram.cumsum(2) - histogram
    flat = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    table = torch.where(step > 0, flat, torch.arange(256, device=images.device)) / 255  # (B, 3, 256)
    return table.to(images.dtype).gather(2, levels).view(images.shape)


def sample_pairing(images: Tensor, magnitude: Tensor) -> Tensor:
    """Mix in up to 0.4 of the next image of the batch [C], whose order is random."""
    return torch.lerp(images, images.roll(-1, 0), 0.4 * per_image(magnitude))


# Gradients for operations that have none of use: straight through, as Faster AutoAugment [A: FAA] unless marked


def identity_gradient(operation):
    """The operation, with the gradient of the identity for the images and none for the magnitude."""

    def with_gradient(images: Tensor, magnitude: Tensor) -> Tensor:
        return operation(images, magnitude).detach() + (images - images.detach())

    return with_gradient


def falling_gradient(operation):
    """The operation, with the derivative -1 of every pixel in the magnitude.

    FAA's code has +1 in Solarize's threshold, which is 1 - our magnitude: so -1 [A: FAA]. It also has +1 in an eighth
    of the bits that Posterize keeps, which is 1 - magnitude / 2: that would be -1/2; we take -1 [C].
    """

    def with_gradient(images: Tensor, magnitude: Tensor) -> Tensor:
        m = per_image(magnitude)
        return operation(images, magnitude.detach()) - (m - m.detach())

    return with_gradient


AUGMENTATIONS = {
    "ShearX": shear_x,
    "ShearY": shear_y,
    "TranslateX": translate_x,
    "TranslateY": translate_y,
    "Rotate": rotate,
    "HorizontalFlip": horizontal_flip,
    "Invert": invert,
    "Solarize": falling_gradient(solarize),  # the image has its own gradient [C: FAA passes none on]
    "Posterize": falling_gradient(identity_gradient(posterize)),  # and here the identity's [C: FAA passes none on]
    "Contrast": contrast,
    "Color": color,
    "Brightness": brightness,
    "Sharpness": sharpness,
    "AutoContrast": identity_gradient(auto_contrast),
    "Equalize": identity_gradient(equalize),
    "SamplePairing": sample_pairing,
}
SIGNED = {
    "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Color", "Contrast", "Brightness", "Sharpness"
}  # fmt: skip


def apply_each(images: Tensor, choice: Tensor, magnitude: Tensor) -> Tensor:
    """Each image through its own operation.

    choice (B,): an index into AUGMENTATIONS; any other number leaves the image alone. magnitude (B,) in [-1, 1]; only
    the operations in SIGNED see its sign. Every operation gets the whole batch: to find out which images chose it, a
    GPU would wait for the host.
    """
    out = images
    for n, (name, operation) in enumerate(AUGMENTATIONS.items()):
        changed = operation(images, magnitude if name in SIGNED else magnitude.abs())
        out = torch.where(per_image(choice == n), changed, out)
    return out


if __name__ == "__main__":
    main(sys.argv[1:])
