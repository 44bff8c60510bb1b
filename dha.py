# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "torchvision>=0.19", "numpy>=1.26", "pillow>=9.4", "tqdm", "matplotlib>=3.7", "scipy"]
# ///
"""DHA: learn weights, augmentation policy, learning rate, weight decay and architecture of a network in one run.

    python dha.py --preset quick                               # minutes on 2 CPU cores; our scale-free updates, below
    python dha.py --dataset cifar10 --gpu 0                    # the paper's method with its authors' numbers
    torchrun --nproc-per-node 4 dha.py --dataset cifar10       # one process per GPU
    python dha.py --resume --out runs/dha-cifar10-seed0        # go on where it stopped

Paper: Zhou et al., "DHA: End-to-End Joint Optimization of Data Augmentation Policy, Hyper-parameter and Architecture",
TMLR 2022, https://arxiv.org/abs/2109.05765; equation numbers are the paper's. There is one network at its final size,
one loss and no validation split, and nothing is retrained.

    theta    weights
    tau      14 x 14 logits: which pair of image operations to apply
    lr, wd   learning rate and weight decay: the paper's eta
    beta     step size with which eta moves
    alpha    a coefficient for each candidate of a node: each operation on each state (the two inputs of the cell, and
             its earlier nodes). The paper calls it a probability; as decoded, some are negative
    b        a short code of alpha, which Adam trains in its place: 7 numbers per node
    A        random and fixed; alpha is decoded from b, which is close to A alpha

Only a node's support runs. For each state take the operation with the largest |alpha|, then keep the two strongest of
these: that is the child network of Figure 1. The paper samples it in every iteration; ISTA-NAS' code fixes it for an
epoch, and so do we.

One iteration:

    1. draw a pair of image operations for every image from softmax(tau) and apply it
    2. compute the loss of every image, and the gradients
    3. move lr and wd: which values would have made the previous step of theta better?          Eq. (3)
    4. move tau towards pairs with a large loss                                                 Eq. (2)
    5. move b and theta to lower the mean loss

Before the search, and after each of its epochs but the final one, alpha is decoded from b (Eq. 4), which may change the
support. A node whose alpha hardly moves is frozen: its support is final, and its weights go on learning. After
--search-epochs all nodes are frozen, if they were not earlier. Then the other candidates are deleted, and the same
weights train on.

Eqs. (2) and (3) can be run in two ways, --updates: "printed", the paper's, moved by the optimizers and step sizes of
its authors' code; and "scale-free", ours, for runs of any length. policy_loss and Eta say what the two compute, and why
there are two.

Marks: [P] the paper says so. [A] public code does: DHA's, https://github.com/gitkaichenzhou/DHA (numbers from its first
commit's conf/ista/cifar100_ista_single_doal.json), or that of the method named, https://github.com/quark0/darts or
https://github.com/iboing/ISTA-NAS. [C] our choice, where neither says or we depart from both.
"""

import argparse
import contextlib
import itertools
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
from common import FactorizedReduce, Genotype, InputError

# Under torchrun: this process's number, and how many there are
TORCHRUN = dist.is_torchelastic_launched()
RANK = int(os.environ["RANK"]) if TORCHRUN else 0
WORLD = int(os.environ["WORLD_SIZE"]) if TORCHRUN else 1
QUIET = True if RANK > 0 else None  # for tqdm's `disable`; None: no bar where there is no terminal

GRAD_CLIP = 5.0  # largest norm of the weights' gradient [A: DARTS]
LASSO = 1e-5  # lambda of Eq. (4) [A: ISTA-NAS]
ENTROPY_WEIGHT = 0.3  # of p(tau)'s entropy in the scale-free Eq. (2) [C]
FREEZE_DISTANCE = 1e-3  # a node whose alpha moved no further (2-norm) in an epoch is frozen [A: ISTA-NAS]

# ---------------------------------------------------------------------------------------------------------------------
# The augmentation policy (section 2.1): 14 operations [P], listed in AUGMENTATIONS at the end of the file [A]; tau has
# a logit for each pair of them [A]
# ---------------------------------------------------------------------------------------------------------------------


def sample_pairs(tau: Tensor, count: int) -> Tensor:
    """Draw pairs of operations from p(tau), the softmax over all 196: (count,), with values 14 * first + second."""
    p = tau.detach().flatten().softmax(0).nan_to_num(1.0)  # NaN would crash multinomial; the epoch's end reports it
    return torch.multinomial(p, count, replacement=True)


@torch.no_grad()
def apply_pairs(images: Tensor, pairs: Tensor) -> Tensor:
    """T_k(x_k): each image through its pair, first, then second; magnitudes from U(-1, 1) [P: uniform].

    images (B, 3, H, W) in [0, 1], pairs (B,).
    """
    for choice in (pairs // len(AUGMENTATIONS), pairs % len(AUGMENTATIONS)):
        magnitude = 2 * torch.rand(len(images), device=images.device).to(images.dtype) - 1
        images = apply_each(images, choice, magnitude)
    return images


def policy_loss(
    tau: Tensor, pairs: Tensor, losses: Tensor, updates: str = "printed", batch_mean: Tensor | None = None
) -> Tensor:
    """L^DA of Eq. (2); tau is moved to lower it. Its gradient goes to tau alone.

    tau (14, 14); pairs (B,), drawn from p(tau), and losses (B,), L_k, of the same images. Two readings of the paper's
    "importance weight"; l_j is the mean loss of images with pair j:

    "printed" [P]: p_k(tau) itself, and the mean over the images [A], where the paper has the sum. But the pairs are
    drawn from p already. In expectation tau_j moves in the direction of p_j (p_j l_j - sum_i p_i^2 l_i): near uniform,
    of two pairs with the same loss the more probable one gains on the other. Small steps and weight decay keep p near
    uniform, large steps end on one pair.

    "scale-free" [C]: what statistics calls the importance weight of a draw, p_k(tau) over p_k(tau held fixed), and the
    sum over the images. In expectation tau_j moves in the direction of B p_j (l_j - sum_i p_i l_i): pairs that are
    harder than the mean gain. The entropy H of p is added, weighted by 0.3. The maximum of sum_i p_i l_i + 0.3 H is at
    p_i proportional to exp(l_i / 0.3): how far p concentrates depends on the losses, not on the length of the run.

    batch_mean: the mean loss of the whole batch, if these images are one process's share of it; None: of `losses`.
    Raises ValueError for other updates.
    """
    losses = losses.detach()
    p = tau.flatten().softmax(0)  # (196,)
    drawn = p.gather(0, pairs)  # p_k(tau), (B,)
    if updates == "printed":
        return -(drawn * losses).mean()  # Eq. (2); the mean over the images [A]
    if updates != "scale-free":
        raise ValueError(f'updates are "printed" or "scale-free", not {updates!r}')

    # The ratio is 1, its gradient that of log p_k. Subtracting the mean takes noise away, and changes the docstring's B
    # to B - 1. The entropy is weighted by B
    if batch_mean is None:
        batch_mean = losses.mean()
    ratio = drawn / drawn.detach()
    entropy = -(p * tau.flatten().log_softmax(0)).sum()  # (the gradient of p.log() is NaN where p rounds to 0)
    return -(ratio * (losses - batch_mean)).sum() - ENTROPY_WEIGHT * len(pairs) * entropy  # Eq. (2), scale-free


# ---------------------------------------------------------------------------------------------------------------------
# Hyper-parameters (section 2.2)
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sgd_step(
    theta: list[Tensor], grads: list[Tensor], velocity: list[Tensor], lr: Tensor, wd: Tensor, momentum: float = 0.9
) -> None:
    """OP of section 2.2, in place: v = momentum v + g + wd theta, and theta = theta - lr v. momentum 0.9 [A].

    theta, grads, velocity: one tensor per weight; the caller leaves out the weights that have no gradient. lr, wd:
    0-dim tensors, so that no step waits for the GPU.
    """
    torch._foreach_mul_(velocity, momentum)
    torch._foreach_add_(velocity, grads)
    torch._foreach_add_(velocity, torch._foreach_mul(theta, wd))
    torch._foreach_sub_(theta, torch._foreach_mul(velocity, lr))


@torch.no_grad()
def hypergradient(
    grads: list[Tensor], velocity: list[Tensor], theta_plus: list[Tensor], lr: Tensor | float
) -> tuple[Tensor, Tensor]:
    """The gradient of Eq. (3), (dL/dlr, dL/dwd), through the sgd_step that led to theta_plus.

    theta_plus: theta^(t+1), the weights after that step. grads: dL/dtheta there, before clipping (Eq. 3 has the loss's
    own gradient; only the step of theta is clipped). velocity: the step's v. lr: its learning rate. The lists hold the
    weights that moved in the step and have a gradient at theta_plus; the others contribute nothing and must be left
    out. The weights before the step count as constant (end of section 2.2), and so does their v [A].
    """
    # Each as one vector, with a number for every weight
    g = torch.cat([tensor.flatten() for tensor in grads])
    v = torch.cat([tensor.flatten() for tensor in velocity])
    after = torch.cat([tensor.flatten() for tensor in theta_plus])
    before = after + lr * v

    # The chain rule through theta+ = theta - lr v, v = momentum v + g + wd theta
    d_lr = -(g @ v)  # dtheta+/dlr = -v
    d_wd = -lr * (g @ before)  # dtheta+/dwd = -lr theta
    return d_lr, d_wd


class Eta:
    """lr and wd, and the two ways in which Eq. (3) moves them.

    "printed" [P]: eta = (lr, wd) by SGD, with the authors' momentum, weight decay and limits [A]. Once the loss falls
    slowly, the mean of dL/dlr hardly depends on lr, so that lr moves by about as much in every step. A run of a tenth
    of the steps needs a beta ten times as large if lr is to move as far.

    "scale-free" [C], for runs of any length: between our runs of 2,500 and of 40,000 steps one thing hardly changed,
    the mean of dL/dlog lr over its root mean square. So eta is (log lr, log wd), and Adam without momentum, which
    divides by that root, moves it by about beta / T in a step. If the gradient never changed, lr would change by beta
    factors of e in a run of T steps.

    lr, wd: at the start. steps: T, needed for "scale-free". lr_range, wd_range: each step clamps lr and wd to these;
    the defaults are the authors', for "printed". Raises ValueError for other updates, or where T is missing.
    """

    def __init__(
        self,
        lr: float,
        wd: float,
        updates: str = "printed",
        steps: int | None = None,
        lr_range: tuple[float, float] = (0.001, 0.05),
        wd_range: tuple[float, float] = (1e-4, 5e-4),
        device: torch.device | str = "cpu",
    ):
        if updates != "printed" and (updates != "scale-free" or not steps):
            raise ValueError('updates are "printed", or "scale-free" with the number of steps')
        self.printed = updates == "printed"
        self.steps = steps
        self.ranges = torch.tensor([lr_range, wd_range], device=device)
        self.values = torch.tensor([lr, wd], device=device)  # or their logarithms. A tensor: no step waits for the GPU
        if self.printed:
            self.optimizer = torch.optim.SGD([self.values], momentum=0.9, nesterov=True, weight_decay=5e-4)  # [A]
        else:
            self.values.log_()
            self.ranges.log_()
            self.optimizer = torch.optim.Adam([self.values], betas=(0.0, 0.999), eps=1e-12)

    @property
    def lr(self) -> Tensor:
        return self.values[0].clone() if self.printed else self.values[0].exp()

    @property
    def wd(self) -> Tensor:
        return self.values[1].clone() if self.printed else self.values[1].exp()

    def set_lr(self, lr: float) -> None:
        value = torch.tensor(lr)
        self.values[0] = value if self.printed else value.log()

    def step(self, d_lr: Tensor, d_wd: Tensor, beta: float) -> None:
        """A step of Eq. (3) by the gradients dL/dlr and dL/dwd, then back into the ranges."""
        gradient = torch.stack([d_lr, d_wd])
        if not self.printed:
            gradient = gradient * self.values.exp()  # dL/dlog lr = lr dL/dlr
            beta = beta / self.steps
        self.values.grad = gradient
        self.optimizer.param_groups[0]["lr"] = beta
        self.optimizer.step()  # Eq. (3)
        self.values.clamp_(self.ranges[:, 0], self.ranges[:, 1])

    def state_dict(self) -> dict:
        return {"values": self.values, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, saved: dict) -> None:
        self.values.copy_(saved["values"])
        self.optimizer.load_state_dict(saved["optimizer"])


# ---------------------------------------------------------------------------------------------------------------------
# Architecture (section 2.3). A node of a cell adds up two operations, each of which reads a state: an input of the cell
# or an earlier node. A candidate is an operation on a state: 7 operations on up to 5 states are up to 35 entries of
# alpha, of which two will be kept. b has 7 numbers. Sparse coding: of all alphas with A alpha = b, the one with the
# smallest sum of absolute values nearly always has no more non-zeros than b has numbers; select_support keeps two.
# ---------------------------------------------------------------------------------------------------------------------


def soft_threshold(x: Tensor, threshold: Tensor) -> Tensor:
    """The shrinkage operator of Eq. (4), there called eta: entries move towards 0 by `threshold`, and stop at 0."""
    return x.sign() * (x.abs() - threshold).clamp(min=0)


@torch.no_grad()
def ista(A: Tensor, b: Tensor, lam: float, tolerance: float = 1e-9, rounds: int = 2000) -> Tensor:
    """Decode: alpha = argmin 1/2 |A alpha - b|^2 + lam |alpha|_1, by iterative shrinkage, Eq. (4).

    A (..., m, n) and b (..., m) to alpha (..., n), of b's type and device. Steps of Eq. (4) alone take too long: with
    n > m and lam = 1e-5 the non-zeros are still wrong after 1,000. So after every 50 steps there are jumps to the
    solution that the present signs of alpha allow: active_set_step.

    It ends when no optimality condition (KKT) is violated by more than `tolerance`, as a share of max |A^T b|, and
    raises ArithmeticError after `rounds` rounds. Raises ValueError for numbers that have no solution. Float64 on the
    CPU: on a GPU it would be thousands of small kernels.
    """
    if not (b.is_floating_point() and A.isfinite().all() and b.isfinite().all() and lam >= 0):
        raise ValueError("ista needs finite numbers, a b of floating-point type, and lam >= 0")
    A_cpu = A.double().cpu()
    b_cpu = b.double().cpu().unsqueeze(-1)  # a column, as alpha is below
    G = A_cpu.mT @ A_cpu  # A^T A (..., n, n)
    c = A_cpu.mT @ b_cpu  # A^T b (..., n, 1)

    # L of Eq. (4), by which it divides, is the Lipschitz constant of the gradient (..., 1, 1). (The paper's text says
    # that L is the LASSO formulation, that is, what alpha minimizes)
    L = torch.linalg.matrix_norm(G, 2, keepdim=True).clamp(min=1e-30)
    alpha = torch.zeros_like(c)

    for _ in range(rounds):
        for _ in range(50):
            alpha = soft_threshold(alpha - (G @ alpha - c) / L, lam / L)  # Eq. (4)

        # Jumps, each of which may set entries to 0
        for _ in range(3):
            alpha = active_set_step(G, c, L, lam, alpha)

        # KKT: the gradient A^T (A alpha - b) is -lam sign(alpha) where alpha is not 0, and within [-lam, lam] elsewhere
        gradient = G @ alpha - c
        where_nonzero = (gradient + lam * alpha.sign()).abs()
        where_zero = (gradient.abs() - lam).clamp(min=0)
        violation = torch.where(alpha != 0, where_nonzero, where_zero)
        if (violation <= tolerance * c.abs().amax(-2, keepdim=True)).all():
            return alpha.squeeze(-1).to(b)
    raise ArithmeticError(f"ISTA did not converge: KKT violation {float(violation.max()):.1e}")


def active_set_step(G: Tensor, c: Tensor, L: Tensor, lam: float, alpha: Tensor) -> Tensor:
    """Move alpha (..., n, 1) to the minimum for its present signs, or until one would flip (FPC-AS, Wen et al.).

    With the signs given, |alpha|_1 is linear, and the minimum solves one linear system in the entries that are not 0.
    G = A^T A (..., n, n), c = A^T b (..., n, 1), L (..., 1, 1) the largest eigenvalue of G.
    """
    on = alpha != 0
    diagonal = torch.where(on, 1e-12 * L, 1.0)  # 1e-12: columns of A may be dependent
    block = torch.where(on & on.mT, G, 0.0) + torch.diag_embed(diagonal.squeeze(-1))
    right_side = torch.where(on, c - G @ alpha - lam * alpha.sign(), 0.0)
    best = alpha + torch.linalg.solve_ex(block, right_side).result

    # Go there, but only to where the first entry becomes 0; that entry stays 0
    reached = torch.where(best * alpha < 0, alpha / (alpha - best), 1.0)  # the fraction of the way at which it is 0
    first = reached.amin(-2, keepdim=True)
    stops = (reached <= first) & (first < 1)
    return torch.where(stops, 0.0, alpha + first * (best - alpha))


def select_support(alpha: Tensor, counts: list[int], kept: int, ops: tuple[str, ...]) -> list[list[tuple[str, int]]]:
    """The support of K nodes: of each state the operation with the largest |alpha|, and of these the `kept` strongest.

    alpha (K, n), entry len(ops) * state + operation; node k reads the states 0 .. counts[k] - 1. Returns for every node
    its pairs (operation, state). DHA's code compares signed values; |alpha| is ours [C]. ISTA-NAS' one-stage code takes
    the two largest |alpha| of all, which may be on one state.
    """
    edges = alpha.abs().cpu().view(len(counts), -1, len(ops))  # (K, states, operations)
    largest, operation = edges.max(2)  # (K, states) each
    support = []
    for k, count in enumerate(counts):
        strongest = largest[k, :count].topk(kept).indices.sort().values
        support.append([(ops[operation[k, state]], state) for state in strongest.tolist()])
    return support


# ---------------------------------------------------------------------------------------------------------------------
# The supernet: every candidate exists, those of the support run. (ProxylessNAS' space is near the end of this file.)
# ---------------------------------------------------------------------------------------------------------------------

NODES = 4  # of a cell; node j reads the states 0 .. j + 1, of which 0 and 1 are the cell's inputs
OPS = common.PRIMITIVES[1:]  # without "none", as both public one-stage codes [A]


class SparseCell(nn.Module):
    """A DARTS cell with all candidates, each of which ends in a batch norm; or with a given support alone.

    c_before, c_in: channels of the inputs s0 and s1. halved: whether s1 has half the height and width of s0.
    first_node: the number, in the supernet, of the cell's first node. given: pairs (operation, state) for each of its
    nodes; None: all candidates.
    """

    def __init__(
        self,
        c_before: int,
        c_in: int,
        channels: int,
        reduction: bool,
        halved: bool,
        first_node: int,
        given: list | None = None,
    ):
        super().__init__()
        self.first_node = first_node
        self.preprocess0 = FactorizedReduce(c_before, channels) if halved else common.relu_conv_bn(c_before, channels)
        self.preprocess1 = common.relu_conv_bn(c_in, channels)

        self.nodes = nn.ModuleList()
        for j in range(NODES):
            # In the order of alpha's entries: state by state
            wanted = [(name, state) for state, name in itertools.product(range(j + 2), OPS)]
            if given:
                wanted = given[j]
            candidates = nn.ModuleDict()
            for name, state in wanted:
                op = common.operation(name, channels, stride=2 if reduction and state < 2 else 1)
                if not any(isinstance(module, nn.BatchNorm2d) for module in op.modules()):
                    op.append(nn.BatchNorm2d(channels))
                candidates[f"{name}_{state}"] = op
            self.nodes.append(candidates)

    def forward(self, s0: Tensor, s1: Tensor, support: list, strengths: list, drop_path_prob: float | Tensor) -> Tensor:
        """support: for each node, the pairs (operation, state) to run. strengths: what multiplies their outputs."""
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        for candidates, pairs, pair_strengths in zip(self.nodes, support, strengths):
            node = None
            for (name, state), strength in zip(pairs, pair_strengths):
                op = candidates[f"{name}_{state}"]
                o = op(states[state])
                if not isinstance(op[0], nn.Identity):  # identities are never dropped [A: DARTS]
                    o = common.drop_path(o, drop_path_prob, self.training)
                o = strength * o
                node = o if node is None else node + o  # alpha_j^T o_j, section 2.3
            states.append(node)
        return torch.cat(states[2:], 1)  # (B, 4 * channels, H, W); H and W are halved in a reduction cell


class SparseSupernet(nn.Module):
    """Normalised images (B, 3, H, W) to logits (B, num_classes).

    With `auxiliary`, in training, to (logits, auxiliary logits). There are `layers` cells of two kinds, normal and
    reduction. Cells of a kind have one architecture, 4 nodes, and weights of their own. Of node k of these 8:

        b[k] (7,), A[k] (7, 35), alpha[k] (35,)    A has zeros where the node has fewer candidates
        support[k]                                 pairs (operation, state) that run, called S below
        A_S[k] (7, 2), alpha_S[k] (2,)             A and alpha on the support
        frozen[k], frozen_strengths[k] (2,)        is its search over? Then these multiply its operations' outputs

    b_scale: standard deviation of b at the start. given: the architecture, if it is not searched (see to_support); then
    all strengths are 1. Raises InputError if it does not fit.

    Another space (MobileSupernet, near the end of the file) sets `ops`, `kept` and `code` otherwise, and has its own
    count_states, build, genotype and skip_connects; to it a "cell" is one layer, with one node. All else is the same.
    """

    ops = OPS
    kept = 2  # how many operations a node keeps
    code = 7  # length of a node's b [A]. (That there are 7 operations, too, has nothing to do with it)

    def __init__(
        self,
        channels: int,
        num_classes: int,
        layers: int,
        auxiliary: bool = False,
        b_scale: float = 1e-3,
        stem: str = "cifar",
        given: list | None = None,
    ):
        super().__init__()

        # The architecture: given, or still to be searched
        self.state_counts = self.count_states(layers)
        nodes = len(self.state_counts)
        if given and [len(pairs) for pairs in given] != [self.kept] * nodes:
            raise InputError("the genotype is not of this --space with so many --layers")
        self.size = {"channels": channels, "num_classes": num_classes, "layers": layers, "stem": stem}
        self.support = list(given) if given else None  # a list of its own: set_extra_state changes it
        self.frozen = [given is not None] * nodes

        # The network
        self.drop_path_prob = 0.0
        self.auxiliary = None
        self.auxiliary_at = 2 * layers // 3
        self.build(channels, num_classes, layers, auxiliary, stem)
        self.register_buffer("frozen_strengths", torch.ones(nodes, self.kept))
        self.b = nn.ParameterList()
        if not given:
            self.begin_search(b_scale)

    def count_states(self, layers: int) -> list[int]:
        """How many states each node can read: those of the normal cell, then those of the reduction cell."""
        return [2, 3, 4, 5, 2, 3, 4, 5]

    def build(self, channels: int, num_classes: int, layers: int, auxiliary: bool, stem: str) -> None:
        """The stem, the cells, reductions at layers//3 and 2*layers//3 as in DARTS, and the classifier."""
        self.stem, self.stem1, c_in, halved = common.stems(stem, channels)
        self.cells = nn.ModuleList()
        c_before = c_in
        for i in range(layers):
            reduction = i in (layers // 3, 2 * layers // 3)
            if reduction:
                channels *= 2
            first_node = NODES if reduction else 0
            given = self.support[first_node : first_node + NODES] if self.support else None
            self.cells.append(SparseCell(c_before, c_in, channels, reduction, halved, first_node, given))
            c_before = c_in
            c_in = NODES * channels
            halved = reduction
            if auxiliary and i == self.auxiliary_at:
                self.auxiliary = common.auxiliary_head(c_in, num_classes, stem)
        self.head = nn.Identity()
        self.classifier = nn.Linear(c_in, num_classes)

    def begin_search(self, b_scale: float) -> None:
        """A, b, and the first support."""
        # Until a node freezes, the batch norms of its candidates keep weight 1 and bias 0 [A: ISTA-NAS]: a scale that
        # learns could undo the strength that follows it
        for cell in self.cells:
            common.fix_batch_norms(cell.nodes)

        # A is random and fixed. alpha has one length for all nodes; where a node has fewer candidates, the columns of A
        # beyond them are 0
        nodes = len(self.state_counts)
        A = torch.rand(nodes, self.code, len(self.ops) * max(self.state_counts))  # U(0, 1) [A]
        for cell in self.cells:
            for k, candidates in enumerate(cell.nodes, cell.first_node):
                A[k, :, len(candidates) :] = 0
        self.register_buffer("A", A)
        self.register_buffer("alpha", torch.zeros(nodes, A.shape[2]))
        self.register_buffer("A_S", torch.zeros(nodes, self.code, self.kept))
        self.register_buffer("alpha_S", torch.zeros(nodes, self.kept))

        # b, which the search moves, and with it the support
        self.b.extend(nn.Parameter(b_scale * torch.randn(self.code)) for _ in range(nodes))
        self.set_alpha(self.decode())

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        # Cell by cell, each with the support and the strengths of its own nodes
        strengths = [self.strengths(k).unbind() for k in range(len(self.frozen))]
        with_auxiliary = self.training and self.auxiliary is not None
        s0 = self.stem(x)
        s1 = self.stem1(s0)
        for i, cell in enumerate(self.cells):
            own = slice(cell.first_node, cell.first_node + len(cell.nodes))
            s0, s1 = s1, cell(s0, s1, self.support[own], strengths[own], self.drop_path_prob)
            if with_auxiliary and i == self.auxiliary_at:
                auxiliary_logits = self.auxiliary(s1)
        logits = self.classifier(self.head(s1).mean((2, 3)))
        return (logits, auxiliary_logits) if with_auxiliary else logits

    def strengths(self, k: int) -> Tensor:
        """What multiplies the outputs of node k's support, (kept,): section 2.3's b^T A - alpha^T E, E = A^T A - I.

        That equals alpha + A^T (b - A alpha): alpha, plus A^T times the part of b that alpha does not explain. In it
        alpha counts as 0 off the support, and as constant, so that the gradient goes to b [A: ISTA-NAS]. For a frozen
        node all is constant.
        """
        if self.frozen[k]:
            return self.frozen_strengths[k]
        A, alpha = self.A_S[k], self.alpha_S[k]
        with torch.autocast(A.device.type, enabled=False):  # in float32, also with --amp
            return alpha + A.T @ (self.b[k] - A @ alpha)

    @torch.no_grad()
    def decode(self, lam: float = LASSO) -> Tensor:
        """Solve Eq. (4) for the nodes that are not frozen: alpha (nodes, 35). Changes nothing; see set_alpha."""
        searched = [k for k, frozen in enumerate(self.frozen) if not frozen]
        alpha = self.alpha.clone()
        alpha[searched] = ista(self.A[searched], torch.stack([self.b[k] for k in searched]), lam)
        return alpha

    def support_of(self, alpha: Tensor) -> list[list[tuple[str, int]]]:
        return select_support(alpha, self.state_counts, self.kept, self.ops)

    def set_alpha(self, alpha: Tensor) -> list[float]:
        """Make alpha (nodes, 35) and its support the network's. Returns how far each node's alpha moved."""
        distances = (alpha - self.alpha).norm(dim=1).tolist()
        self.support = self.support_of(alpha)  # of frozen nodes the same: decode leaves their alpha as it is
        self.alpha.copy_(alpha)
        for k, pairs in enumerate(self.support):
            entries = [len(self.ops) * state + self.ops.index(name) for name, state in pairs]
            self.A_S[k] = self.A[k][:, entries]
            self.alpha_S[k] = alpha[k, entries]
        return distances

    @torch.no_grad()
    def freeze(self, k: int) -> None:
        """End the search of node k [A: ISTA-NAS]: its strengths become constant, the batch norms of its support learn.

        b no longer gets a gradient.
        """
        self.frozen_strengths[k] = self.strengths(k)
        self.frozen[k] = True
        for cell in self.cells:
            if cell.first_node <= k < cell.first_node + len(cell.nodes):
                for name, state in self.support[k]:
                    common.learn_batch_norms(cell.nodes[k - cell.first_node][f"{name}_{state}"])

    def prune(self) -> None:
        """All nodes are frozen: delete the candidates that are not in the support, and what only the search needs."""
        for b in self.b:
            b.grad = None  # Adam still holds b, and leaves one without a gradient alone
        for cell in self.cells:
            for k, candidates in enumerate(cell.nodes, cell.first_node):
                support = {f"{name}_{state}" for name, state in self.support[k]}
                for name in candidates.keys() - support:
                    del candidates[name]
        self.b = nn.ParameterList()
        self.A = self.alpha = self.A_S = self.alpha_S = None

    # Support and frozen nodes belong to the weights: state_dict has them, too

    def get_extra_state(self) -> Tensor:
        """A row per node: is it frozen? Then the numbers of operation and state of each pair of its support."""
        rows = []
        for pairs, frozen in zip(self.support, self.frozen):
            row = [int(frozen)]
            for name, state in pairs:
                row += [self.ops.index(name), state]
            rows.append(row)
        return torch.tensor(rows)

    def set_extra_state(self, rows: Tensor) -> None:
        """Called by load_state_dict after this module's own buffers, before b and the cells' weights."""
        for k, row in zip(range(len(self.frozen)), rows.tolist()):
            self.support[k] = [(self.ops[op], state) for op, state in zip(row[1::2], row[2::2])]
            if row[0]:
                self.frozen[k] = True  # first, so that freeze keeps the strengths, which are loaded already
                self.freeze(k)
            elif self.frozen[k]:
                raise ValueError("nodes of this network are frozen that are not in the state: load it into a new one")

    def genotype(self) -> Genotype | list[str]:
        normal = sum(self.support[:NODES], [])
        reduce = sum(self.support[NODES:], [])
        return Genotype(normal, [2, 3, 4, 5], reduce, [2, 3, 4, 5])

    def skip_connects(self) -> tuple[int, int]:
        """Of the normal cell: the number of skip-connections, and that of all operations."""
        names = [name for name, _ in sum(self.support[:NODES], [])]
        return names.count("skip_connect"), len(names)


def to_support(genotype: Genotype | list[str]) -> list[list[tuple[str, int]]]:
    """Pairs (operation, state) for every node of a supernet. Raises InputError for cells of another shape."""
    if isinstance(genotype, list):  # of the MobileNet space
        return [[(name, 0)] for name in genotype]

    support = []
    for edges, concat in ((genotype.normal, genotype.normal_concat), (genotype.reduce, genotype.reduce_concat)):
        pairs = [[tuple(edges[2 * j]), tuple(edges[2 * j + 1])] for j in range(len(edges) // 2)]
        if len(edges) != 2 * NODES or list(concat) != [2, 3, 4, 5] or any(first == second for first, second in pairs):
            raise InputError("dha's cells have 4 nodes, all concatenated, with two different edges each")
        support += pairs
    return support


# ---------------------------------------------------------------------------------------------------------------------
# Limits (Eq. 1)
# ---------------------------------------------------------------------------------------------------------------------


def cost_share(net: SparseSupernet, support: list, args: argparse.Namespace, image_size: int) -> float:
    """Eq. (1): the largest c_i(alpha) / C_i of a support. Above 1 a limit is broken; without limits it is 0."""
    shares = [0.0]
    if args.max_params or args.max_flops:
        with torch.device("meta"):  # shapes without numbers
            pruned = type(net)(**net.size, given=support)
        if args.max_params:
            shares.append(common.count_parameters(pruned) / args.max_params)
        if args.max_flops:
            shares.append(common.count_flops(pruned, image_size) / args.max_flops)
    return max(shares)


@torch.no_grad()
def start_within_limits(net: SparseSupernet, args: argparse.Namespace, image_size: int) -> None:
    """Bring the first, random support under the limits of Eq. (1), node by node.

    Each draw gives one node, as its b, the code of a random candidate, with some noise and times b_scale: mostly that
    candidate is then its strongest. The draw is undone if it raises cost_share. Raises InputError after 300 draws.
    """
    lowest = cost_share(net, net.support, args, image_size)
    for draw in range(300):
        if lowest <= 1:
            break

        # A column of A is the code of an alpha that is 1 there and 0 elsewhere
        k = draw % len(net.b)
        count = int(net.A[k].any(0).sum())  # of the node's candidates
        candidate = int(torch.randint(count, ()))
        before = net.b[k].clone()
        code = net.A[k][:, candidate] + 0.02 * torch.randn_like(before)
        net.b[k].copy_(args.b_scale * code)

        alpha = net.decode()
        share = cost_share(net, net.support_of(alpha), args, image_size)
        if share > lowest:
            net.b[k].copy_(before)
        else:
            lowest = share
            net.set_alpha(alpha)
    if lowest > 1:
        raise InputError("found no architecture within --max-params and --max-flops to start with: raise them")


# ---------------------------------------------------------------------------------------------------------------------
# One iteration (Figure 1)
# ---------------------------------------------------------------------------------------------------------------------


class Learned:
    """Everything that is learned, and the state of its optimizers. given: the architecture, if it is not learned."""

    def __init__(self, args: argparse.Namespace, data: common.Data, device: torch.device, given: list | None = None):
        Supernet = MobileSupernet if args.space == "mobilenet" else SparseSupernet
        stem = common.stem_for(data.train_images)
        auxiliary = args.auxiliary_weight > 0
        self.net = Supernet(args.channels, len(data.classes), args.layers, auxiliary, args.b_scale, stem, given)
        self.net.to(device, memory_format=common.layout(device))
        self.model = self.net  # what a step calls: the network, or what torch.compile made of it
        self.velocity = {}  # {weight: its v}, for the weights that the previous step moved
        self.collect_theta()

        b = {"params": self.net.b}  # as a group, because it is empty where the architecture is given
        self.b_optimizer = torch.optim.Adam([b], args.arch_lr, betas=(0.5, 0.999), weight_decay=1e-3)  # [A: ISTA-NAS]
        self.tau = torch.zeros(len(AUGMENTATIONS), len(AUGMENTATIONS), device=device, requires_grad=True)  # uniform
        if args.updates == "printed":
            self.tau_optimizer = torch.optim.SGD([self.tau], momentum=0.9, nesterov=True, weight_decay=5e-4)  # [A]
        else:
            self.tau_optimizer = torch.optim.SGD([self.tau])  # plain gradient steps [C]
        count = len(data.train_images)
        epochs = args.train_epochs + (0 if given else args.search_epochs)
        self.steps = epochs * (count // common.check_batch(count, args.batch_size, WORLD))
        self.eta = Eta(args.lr, args.weight_decay, args.updates, self.steps, args.lr_range, args.wd_range, device)
        self.previous_lr = self.eta.lr  # with which theta moved last; since then warm-up may have set another lr
        mean, std = common.mean_std(data.train_images)
        self.mean = mean.to(device)
        self.std = std.to(device)

    def collect_theta(self) -> None:
        """Make theta the weights that there are now: freezing adds those of batch norms, pruning deletes candidates."""
        self.theta = [weight for name, weight in self.net.named_parameters() if not name.startswith("b.")]
        self.velocity = {weight: self.velocity[weight] for weight in self.theta if weight in self.velocity}

    def state_dict(self) -> dict:
        return {
            "net": self.net.state_dict(),
            "velocity": [self.velocity.get(weight) for weight in self.theta],
            "b_optimizer": self.b_optimizer.state_dict(),
            "tau": self.tau.detach(),
            "tau_optimizer": self.tau_optimizer.state_dict(),
            "eta": self.eta.state_dict(),
            "previous_lr": self.previous_lr,
        }

    def load_state_dict(self, saved: dict) -> None:
        """Into a Learned that was just made."""
        if "A" not in saved["net"]:  # it was pruned
            self.net.set_extra_state(saved["net"]["_extra_state"])
            self.net.prune()
        self.net.load_state_dict(saved["net"])
        self.collect_theta()
        self.velocity = {weight: v.to(weight) for weight, v in zip(self.theta, saved["velocity"]) if v is not None}
        self.b_optimizer.load_state_dict(saved["b_optimizer"])
        self.tau.data.copy_(saved["tau"])
        self.tau_optimizer.load_state_dict(saved["tau_optimizer"])
        self.eta.load_state_dict(saved["eta"])
        self.previous_lr.copy_(saved["previous_lr"])


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


def mean_of_batch(losses: Tensor) -> Tensor:
    """The mean loss of the whole batch; under torchrun `losses` are this process's share of it."""
    mean = losses.detach().mean()
    if dist.is_initialized():
        dist.all_reduce(mean)
        mean = mean / dist.get_world_size()
    return mean


def train_step(s: Learned, images: Tensor, labels: Tensor, args: argparse.Namespace) -> Tensor:
    """One iteration on uint8 images (B, 3, H, W), cropped and flipped at random, and labels (B,).

    Returns the mean loss and the accuracy in %, (2,), of the augmented images.
    """
    # --tau-lr and --beta: the first number is for the search, the last for the time after it
    searching = not all(s.net.frozen)
    tau_lr = args.tau_lr[0] if searching else args.tau_lr[-1]
    beta = args.beta[0] if searching else args.beta[-1]

    # 1. A pair of operations for every image
    x = images / 255  # (B, 3, H, W) in [0, 1]
    if not args.no_da:
        pairs = sample_pairs(s.tau, len(x))  # (B,)
        x = apply_pairs(x, pairs)
    x = common.cutout(common.normalize(x, s.mean, s.std), args.cutout)

    # 2. The loss of every image, and all gradients. Weights that do not run in this iteration have none
    with torch.autocast(x.device.type, torch.bfloat16, enabled=args.amp):
        output = s.model(x)
    logits, auxiliary_logits = output if isinstance(output, tuple) else (output, None)  # (B, classes)
    smooth = args.label_smoothing
    losses = F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=smooth)  # (B,)
    if auxiliary_logits is not None:  # L_k contains the auxiliary head's loss, for the policy, too [A]
        auxiliary_losses = F.cross_entropy(auxiliary_logits.float(), labels, reduction="none", label_smoothing=smooth)
        losses = losses + args.auxiliary_weight * auxiliary_losses

    for parameter in [*s.theta, *s.net.b, s.tau]:
        parameter.grad = None
    losses.mean().backward()
    if not args.no_da:
        if args.updates == "printed":
            loss_DA = policy_loss(s.tau, pairs, losses)
        else:  # a sum over the batch: times WORLD, because average_gradients divides by it
            loss_DA = WORLD * policy_loss(s.tau, pairs, losses, args.updates, mean_of_batch(losses))
        loss_DA.backward()
    ran = [weight for weight in s.theta if weight.grad is not None]
    average_gradients([*ran, *s.net.b, s.tau])

    # 3. Eq. (3), for the previous step. The paper moves eta at the end of an iteration, by a second pass at the new
    #    theta on "a mini-batch of training data B^tr". (So it also calls the batch that moved theta; its code takes
    #    another one.) We take the next batch [C]: its gradient at this theta is there already, with the new tau and b.
    #    (The code's second pass is on images without pairs, without auxiliary head and label smoothing.) Only weights
    #    that moved then and have a gradient now count
    moved = [weight for weight in ran if weight in s.velocity]
    if moved and not args.no_hpo:
        grads = [weight.grad for weight in moved]
        d_lr, d_wd = hypergradient(grads, [s.velocity[weight] for weight in moved], moved, s.previous_lr)
        s.eta.step(d_lr, d_wd, beta)  # Eq. (3)

    # 4. The policy
    if not args.no_da:
        s.tau_optimizer.param_groups[0]["lr"] = tau_lr
        s.tau_optimizer.step()

    # 5. b, and the weights. A weight that did not run in the previous step starts with v = 0 [C]
    s.b_optimizer.step()
    nn.utils.clip_grad_norm_(ran, GRAD_CLIP)
    velocity = [s.velocity[weight] if weight in s.velocity else torch.zeros_like(weight) for weight in ran]
    sgd_step(ran, [weight.grad for weight in ran], velocity, s.eta.lr, s.eta.wd)
    s.velocity = dict(zip(ran, velocity))
    s.previous_lr = s.eta.lr

    accuracy = 100 * (logits.argmax(1) == labels).float().mean()
    return torch.stack([losses.mean(), accuracy]).detach()


def decode_and_freeze(s: Learned, args: argparse.Namespace, image_size: int, final: bool) -> list[float] | None:
    """End an epoch of search: decode alpha (Eq. 4), which may change the support, and freeze what has settled.

    After the `final` epoch nothing is decoded any more, and all nodes freeze. When all are frozen, the network is
    pruned. Returns how far each node's alpha moved; None where nothing was decoded, or the new support breaks a
    limit of Eq. (1): then the old alpha and support stay, and no node freezes.
    """
    # The new alpha, unless its support breaks a limit; and which nodes have settled
    searched = [k for k, frozen in enumerate(s.net.frozen) if not frozen]
    distances = None
    if final:
        settled = searched
    else:
        alpha = from_process_0(s.net.decode())
        if cost_share(s.net, s.net.support_of(alpha), args, image_size) > 1:
            print("the new support breaks --max-params or --max-flops: the old one stays")
            return None
        distances = s.net.set_alpha(alpha)
        decided = s.net.alpha_S.any(1).tolist()  # where alpha is 0 on the whole support, nothing is decided yet
        settled = [k for k in searched if distances[k] <= FREEZE_DISTANCE and decided[k]]

    # When no node is left to search, the candidates off the supports are deleted
    for k in settled:
        s.net.freeze(k)
    if all(s.net.frozen):
        s.net.prune()
    s.collect_theta()
    return distances


def from_process_0(alpha: Tensor) -> Tensor:
    """Under torchrun all processes go on with the alpha of process 0, and so with one support."""
    if dist.is_initialized():
        dist.broadcast(alpha, 0)
    return alpha


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


def run_dha(args: argparse.Namespace, device: torch.device, data: common.Data | None = None) -> None:
    """Search and train one network; the run directory --out holds all that comes out. data: None loads them."""
    out = Path(args.out)
    if (out / "result.json").exists():
        print(f"{out} is finished already:", (out / "result.json").read_text())
        return

    # Errors of flags and data come first, before anything is written
    if data is None:
        data = load_data(args, device)
    check_dha(args, data)
    s = begin(args, data, device)
    with locked(out):
        history, checkpoint = open_run(args, data, device, __file__, common.__file__)
        if history:
            s.load_state_dict(checkpoint["learned"])
        elif args.genotype and RANK == 0:
            common.save_genotype(s.net.genotype(), out / "genotype.json")
        print(f"{args.dataset}: {data.describe()}")
        announce("search and training", device, s.net, s.steps)
        search_and_train(s, args, data, history)


def check_dha(args: argparse.Namespace, data: common.Data) -> None:
    """Raise InputError where the data do not fit the flags of a run."""
    common.check_batch(len(data.train_images), args.batch_size, WORLD)
    if args.cutout >= 2 * data.train_images.shape[3]:
        raise InputError(f"--cutout {args.cutout} always hides the whole image: give less")
    if args.auxiliary_weight:
        common.check_auxiliary(data.train_images.shape[3])


def begin(args: argparse.Namespace, data: common.Data, device: torch.device) -> Learned:
    """The untrained network of a run, with an architecture that is given or a random one to start the search with."""
    # A resumed run reads its own copy of what was given
    given = None
    if args.genotype:
        copy = Path(args.out) / "genotype.json"
        given = to_support(common.load_genotype(copy if copy.exists() else args.genotype, args.space))
    torch.manual_seed(args.seed)
    s = Learned(args, data, device, given)

    # The limits of Eq. (1), for what is searched. A resumed run has met them
    if not given and not (Path(args.out) / "checkpoint.pt").exists():
        start_within_limits(s.net, args, data.train_images.shape[3])
        s.net.set_alpha(from_process_0(s.net.alpha))
    return s


def search_and_train(s: Learned, args: argparse.Namespace, data: common.Data, history: list[dict]) -> None:
    """Search until every node is frozen, then train. history: a record per epoch, of those that are done."""
    out = Path(args.out)
    device = s.tau.device
    count = len(data.train_images)
    image_size = data.train_images.shape[3]
    epochs_searched = sum(record["phase"] == "search" for record in history)
    epochs_before = len(history)
    while not all(s.net.frozen) or len(history) < epochs_searched + args.train_epochs:
        started = time.perf_counter()
        epoch = len(history)
        searching = not all(s.net.frozen)
        progress = 0.0 if searching else (epoch - epochs_searched) / args.train_epochs
        s.net.train()
        if args.drop_path and not searching:
            s.net.drop_path_prob = torch.tensor(args.drop_path * progress, device=device)
        if args.compile and not searching and s.model is s.net:  # from now on its graph stays the same
            s.model = torch.compile(s.net)
        if args.no_hpo:  # constant while searching, then from lr towards lr / 25 along half a cosine [A: ISTA-NAS]
            s.eta.set_lr(args.lr * (0.04 + 0.96 * (1 + math.cos(math.pi * progress)) / 2))
        if epoch < args.warmup_epochs:  # each of these epochs starts at its own lr; within it Eq. (3) moves lr
            s.eta.set_lr(args.lr * (epoch + 1) / args.warmup_epochs)

        # Each batch is drawn from all images [C], so that an epoch may show an image twice: for Eq. (3) a batch must be
        # independent of those before it. Batches of one permutation share no image: what one has too much of, the
        # others have too little of. So dL/dlr would be too large, and lr would fall too early
        seed = seed_epoch(args.seed, epoch)
        order = common.batch_indices(count, args.batch_size, seed, RANK, WORLD, independent=True).to(device)
        batches = common.loader(data.train_images, data.train_labels, order, train=True)
        totals = torch.zeros(2, device=device)
        for images, labels in tqdm(batches, f"epoch {epoch + 1}", len(order), leave=False, disable=QUIET):
            totals += train_step(s, images, labels, args)

        learned = [*s.velocity.keys(), *s.net.b, s.tau, s.eta.lr, s.eta.wd]
        loss, accuracy = finite_means(totals / len(order), learned, epoch + 1, "--lr, --beta or --tau-lr")

        # The epoch's record. The test set decides nothing; it is only watched
        test_accuracy = 0.0
        if RANK == 0:
            test_accuracy = evaluate(s.net, data.test_images, data.test_labels, s.mean, s.std)
        skips, operations = s.net.skip_connects()
        p = s.tau.detach().flatten().softmax(0)
        entropy = float(torch.special.entr(p).sum())
        record = {
            "epoch": epoch + 1,
            "phase": "search" if searching else "train",
            "loss": loss,
            "train_accuracy": accuracy,
            "test_accuracy": test_accuracy,
            "lr": float(s.eta.lr),
            "wd": float(s.eta.wd),
            "entropy": entropy,  # of p(tau), in nats; 5.278 where all pairs have the same probability
            "frozen": sum(s.net.frozen),  # as it was in this epoch, before decode_and_freeze; so is the support
            "skip_connects": skips,
            "support": list(s.net.support),
        }
        previous_entropy = history[-1]["entropy"] if history else math.log(s.tau.numel())
        if entropy < previous_entropy / 2:
            print("warning: the entropy of the policy halved in this epoch, it may end on one pair: lower --tau-lr")
        if searching and skips > operations // 2:
            print(f"warning: {skips} of {operations} operations are skip-connections: the search may be collapsing")
        print(
            f"epoch {epoch + 1}  {record['phase']}  loss {loss:.3f}  train {accuracy:.1f} %  "
            f"test {test_accuracy:.1f} %  lr {s.eta.lr:.4f}  wd {s.eta.wd:.1e}  "
            f"entropy {entropy:.2f}  frozen {record['frozen']}"
        )

        if searching:
            epochs_searched += 1
            record["distances"] = decode_and_freeze(s, args, image_size, final=epochs_searched == args.search_epochs)
        record["seconds"] = time.perf_counter() - started
        record["gpus"] = WORLD if device.type == "cuda" else 0
        history.append(record)
        save_epoch(out, history, learned=s.state_dict())
        if epoch == epochs_before:
            search_epochs = args.search_epochs if searching else epochs_searched
            say_end("the run", record["seconds"], search_epochs + args.train_epochs - len(history))

    if RANK == 0:
        save_dha(s, args, data, history)


# ---------------------------------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------------------------------

STEP_SIZES = {  # of the two --updates
    "printed": dict(tau_lr=[0.02, 0.05], beta=[1e-8, 1e-6], lr_range=[0.001, 0.05], wd_range=[1e-4, 5e-4]),  # [A]
    "scale-free": dict(tau_lr=[0.001], beta=[10.0], lr_range=[1e-4, 0.1], wd_range=[1e-4, 1e-2]),  # [C]
}
PRESETS = {
    "paper": {},  # the defaults of the flags: CIFAR-10
    "scale-free": dict(updates="scale-free"),  # all else as in paper
    "quick": dict(  # [C]
        dataset="shapes", search_epochs=2, train_epochs=4, batch_size=32, channels=8, layers=3, lr=0.05,
        arch_lr=3e-3, b_scale=0.1, drop_path=0.0, auxiliary_weight=0.0, cutout=0, updates="scale-free", tau_lr=[0.04],
    ),
    "imagenet": dict(  # [A: DARTS; its warm-up ISTA-NAS; the updates and wd_range C]
        dataset="imagenet", train_epochs=250, batch_size=128, channels=48, layers=14, lr=0.1, weight_decay=3e-5,
        warmup_epochs=5, label_smoothing=0.1, drop_path=0.0, cutout=0, max_params=0, max_flops=600_000_000,
        updates="scale-free", wd_range=[1e-5, 1e-2],
    ),
}  # fmt: skip
MOBILENET = dict(channels=32, layers=21, auxiliary_weight=0.0, drop_path=0.0, max_params=0)  # ProxylessNAS' size
MOBILENET_QUICK = dict(channels=8, layers=11, search_epochs=2, train_epochs=6, batch_size=64, b_scale=0.5)


def parse_args(argv: list[str]) -> argparse.Namespace:
    summary = __doc__.split("\n")[0] + " Values are the paper's [P], public code's [A] or ours [C]."
    parser = argparse.ArgumentParser(
        usage="%(prog)s [flags]",
        description=summary,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )

    add_run_flags(parser, list(PRESETS))

    add = parser.add_argument_group("network and training").add_argument
    add("--search-epochs", type=at_least(1), default=120, help="maximum length of the search [A: ISTA-NAS' README]")
    add("--train-epochs", "--epochs", type=at_least(0), default=600, help="epochs after the search, same weights [A]")
    add("--batch-size", type=at_least(2), default=96, help="images per step, of all processes together [A: DARTS]")
    add("--channels", type=at_least(2), default=36, help="channels of the first cells, even [A: DARTS]")
    add("--layers", type=at_least(3), default=20, help="cells; reductions at 1/3 and 2/3 [A: DARTS]")
    add("--lr", type=at_least(0.0), default=0.0255, help="learning rate of theta at the start [A]")
    add("--weight-decay", type=at_least(0.0), default=3e-4, help="weight decay at the start [A]")
    add("--auxiliary-weight", type=at_least(0.0), default=0.4, help="weight of the auxiliary head's loss [A: DARTS]")
    add(
        "--label-smoothing",
        type=at_least(0.0, 1.0),
        default=0.0,
        help="share of a label that all classes get alike [A: DARTS]",
    )
    add("--warmup-epochs", type=at_least(0), default=0, help="epochs in which lr rises to --lr [A: ISTA-NAS]")
    add("--drop-path", type=at_least(0.0, 1.0), default=0.2, help="probability towards which it rises [A: DARTS]")
    add("--cutout", type=at_least(0), default=16, help="side of the square, in pixels [A: DARTS]")

    add = parser.add_argument_group("policy (Eq. 2), lr and wd (Eq. 3), architecture (Eqs. 1, 4)").add_argument
    add("--no-da", action="store_true", help="no policy: crop, flip and cutout only")
    add("--updates", choices=list(STEP_SIZES), default="printed", help="Eqs. (2), (3): the paper's [P], or ours")
    add("--tau-lr", type=at_least(0.0), nargs="+", help="step size of tau; two: in the search, afterwards [A]")
    add("--no-hpo", action="store_true", help="wd stays, lr falls by a cosine once the search is over [A: ISTA-NAS]")
    add("--beta", type=at_least(0.0), nargs="+", help="step size of Eq. (3); two: in the search, afterwards [A]")
    add("--lr-range", type=at_least(0.0), nargs=2, help="where Eq. (3) may move lr [A]")
    add("--wd-range", type=at_least(0.0), nargs=2, help="where Eq. (3) may move wd [A]")
    add("--genotype", type=os.path.expanduser, help=f"no search: {', '.join(common.GENOTYPES)}, or a file")
    add("--arch-lr", type=at_least(0.0), default=3e-4, help="Adam's learning rate for b [A: ISTA-NAS]")
    add("--b-scale", type=at_least(0.0), default=1e-3, help="standard deviation of b at the start [A: ISTA-NAS]")
    add("--space", choices=["cells", "mobilenet"], default="cells", help="DARTS' cells, or ProxylessNAS' layers [P]")
    add("--max-params", type=at_least(0), default=3_700_000, help="Eq. (1): most parameters; 0: any [A]")
    add("--max-flops", type=at_least(0), default=0, help="Eq. (1): most multiply-adds per image; 0: any [C]")

    # The preset replaces defaults, which --help then shows; flags that are given win
    first_look = argparse.ArgumentParser(usage=parser.usage, add_help=False, allow_abbrev=False)
    first_look.add_argument("--preset", default="paper")
    first_look.add_argument("--space", default="cells")
    first_look.add_argument("--updates")
    given = first_look.parse_known_args(argv)[0]
    preset = PRESETS.get(given.preset, {})
    updates = given.updates or preset.get("updates", "printed")
    step_sizes = STEP_SIZES.get(updates, {})
    if updates != preset.get("updates"):  # a preset's own step sizes are for its own updates
        preset = {name: value for name, value in preset.items() if name not in step_sizes}
    replace_defaults(parser, step_sizes, "A" if updates == "printed" else "C")
    replace_defaults(parser, preset, f"preset {given.preset}")
    if given.space == "mobilenet":
        replace_defaults(parser, MOBILENET, "A: ProxylessNAS")
        if given.preset == "quick":
            replace_defaults(parser, MOBILENET_QUICK, "preset quick")

    args = resume_flags(parser, argv, parser.parse_args(argv), __file__)

    if args.channels % 2:
        parser.error("--channels must be even: a factorized reduction splits them in two")
    if args.space == "mobilenet" and (args.layers < 6 or args.layers % 5 != 1 or args.auxiliary_weight):
        parser.error("--space mobilenet has 6, 11, 16, 21, ... --layers and no auxiliary head")
    if args.genotype and not args.train_epochs:
        parser.error("--genotype with --train-epochs 0 leaves nothing to do")
    if len(args.tau_lr) > 2 or len(args.beta) > 2:
        parser.error("--tau-lr and --beta take one number, or two: in the search, afterwards")
    first_lr = args.lr / max(args.warmup_epochs, 1)
    if not args.no_hpo and not args.lr_range[0] <= first_lr <= args.lr <= args.lr_range[1]:
        parser.error(f"--lr {args.lr}, or its warm-up, is not in --lr-range, where Eq. (3) moves it; or give --no-hpo")
    if not args.no_hpo and not args.wd_range[0] <= args.weight_decay <= args.wd_range[1]:
        parser.error(f"--weight-decay {args.weight_decay} is not in --wd-range, where Eq. (3) moves it; or --no-hpo")
    if args.no_da:
        note_unused(argv, ["--tau-lr"], "--no-da")
    if args.no_hpo:
        note_unused(argv, ["--beta", "--lr-range", "--wd-range"], "--no-hpo")
    if args.genotype:
        searched = ["--search-epochs", "--arch-lr", "--b-scale", "--max-params", "--max-flops"]
        note_unused(argv, searched, "--genotype")
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


def save_dha(s: Learned, args: argparse.Namespace, data: common.Data, history: list[dict]) -> None:
    """Write metrics.jsonl, genotype.json, policy.json, model.pt, the figures; and at the end result.json."""
    out = Path(args.out)
    net = s.net
    net.auxiliary = None  # only training needs it
    genotype = net.genotype()
    save(out / "metrics.jsonl", history)  # a killed run may have saved its checkpoint alone
    common.save_genotype(genotype, out / "genotype.json")
    p = s.tau.detach().cpu().flatten().softmax(0).view(s.tau.shape)
    if not args.no_da:
        save(out / "policy.json", {"operations": list(AUGMENTATIONS), "probability": p.tolist()})

    # The network, with all that its user needs
    image_size = data.train_images.shape[3]
    model = {
        "state_dict": {name: value.cpu().contiguous() for name, value in net.state_dict().items()},
        "genotype": str(genotype),
        "space": args.space,
        **net.size,
        "classes": data.classes,
        "image_size": image_size,
        "mean": s.mean.cpu(),
        "std": s.std.cpu(),
    }
    save(out / "model.pt", model)
    try:
        draw_dha(out, history, net, None if args.no_da else p)
    except Exception as error:  # a fault in a figure must not lose the result
        print(f"warning: a figure could not be drawn: {type(error).__name__}: {error}")

    # A name for the run: those of Table 1 where they fit; --updates is not part of it
    method = "given genotype" if args.genotype else "DHA"
    if args.no_da:
        method += " without DA"
    if args.no_hpo:
        method += " without HPO"
    if method == "DHA without DA without HPO":
        method = "One-Stage ISTA"
    result = {
        "test_accuracy": history[-1]["test_accuracy"],
        "method": method,
        "dataset": args.dataset,
        "seed": args.seed,
        "params": common.count_parameters(net),
        "flops": common.count_flops(net, image_size),
        "genotype": str(genotype),
        **costs(history),
    }
    save(out / "result.json", result)
    print(json.dumps(result, indent=1))


def load_model(path: str | Path, device: torch.device | str = "cpu") -> tuple[SparseSupernet, dict]:
    """The network in a model.pt, in eval mode, and what else the file holds (classes, mean, std, image_size, ...).

    It takes images normalised with that mean and std: common.normalize(images, info["mean"], info["std"]).
    """
    try:
        info = torch.load(path, map_location=device, weights_only=True)
        support = to_support(common.parse_genotype(info["genotype"], info["space"]))
        Supernet = MobileSupernet if info["space"] == "mobilenet" else SparseSupernet
        net = Supernet(info["channels"], info["num_classes"], info["layers"], stem=info["stem"], given=support)
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
    from matplotlib.figure import Figure
except (ImportError, ValueError):  # ValueError: MPLBACKEND names no backend
    Figure = None  # no figures


def draw_dha(out: Path, history: list[dict], net: SparseSupernet, p: Tensor | None) -> None:
    """curves.png, policy.png of p (14, 14), and cells.png or layers.png."""
    if Figure is None:
        print("no figures: matplotlib is missing (pip install matplotlib)")
        return
    panels = {
        "loss (nats)": ["loss"],
        "accuracy (%)": ["train_accuracy", "test_accuracy"],
        "learning rate": ["lr"],
        "weight decay": ["wd"],
    }
    draw_curves(out / "curves.png", history, panels)
    if isinstance(net, MobileSupernet):
        draw_layers(out / "layers.png", net)
    else:
        draw_cells(out / "cells.png", net.genotype())

    # The policy
    if p is not None:
        figure = Figure(figsize=(7.5, 6.4), layout="constrained")
        axis = figure.subplots()
        figure.colorbar(axis.imshow(100 * p.numpy()), label="probability of the pair (%; uniform: 0.51)")
        axis.set_xticks(range(len(p)), AUGMENTATIONS, rotation=90)
        axis.set_yticks(range(len(p)), AUGMENTATIONS)
        axis.set(xlabel="second operation", ylabel="first operation", title="Policy at the end")
        figure.savefig(out / "policy.png", dpi=150)


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
            run_dha(args, device_of(args.gpu))
    except (InputError, OSError, torch.cuda.OutOfMemoryError) as error:  # all else keeps its traceback
        print("error:", *str(error).splitlines()[:1], file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("\nstopped: the same command with --resume goes on after the last epoch")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# ProxylessNAS' space (--space mobilenet). The paper names it, but describes none of it
# ---------------------------------------------------------------------------------------------------------------------


def conv_bn_relu6(c_in: int, c_out: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    return [*common.conv_bn(c_in, c_out, kernel, stride), nn.ReLU6()]


def mobile_operation(name: str, c_in: int, c_out: int, stride: int) -> nn.Sequential:
    """mbconv<expansion>_<kernel>x<kernel> of MobileNetV2 without its shortcut, or skip_connect."""
    if name == "skip_connect":
        return nn.Sequential(nn.Identity())
    expansion, kernel = int(name[6]), int(name[-1])
    wide = expansion * c_in
    expand = conv_bn_relu6(c_in, wide, 1) if expansion > 1 else []
    depthwise = nn.Conv2d(wide, wide, kernel, stride, kernel // 2, groups=wide, bias=False)
    return nn.Sequential(*expand, depthwise, nn.BatchNorm2d(wide), nn.ReLU6(), *common.conv_bn(wide, c_out, 1))


class MobileLayer(nn.Module):
    """A layer with all candidates, of which one runs: x + strength MBConv(x), or x alone. given: only that candidate.

    Where stride or width change there is no shortcut x. In the supernet it is a cell of one node, number first_node.
    (B, c_in, H, W) to (B, c_out, H/stride, W/stride).
    """

    def __init__(self, first_node: int, c_in: int, c_out: int, stride: int, given: list | None = None):
        super().__init__()
        self.first_node = first_node
        self.width = c_out
        self.stride = stride
        self.shortcut = stride == 1 and c_in == c_out
        names = [name for name in common.MOBILE_PRIMITIVES if name != "skip_connect" or self.shortcut]
        if given:
            name = given[0][0][0]
            if name not in names:
                raise InputError(f"the genotype has {name} where the width or the stride changes")
            names = [name]

        candidates = nn.ModuleDict()
        for name in names:
            candidates[f"{name}_0"] = mobile_operation(name, c_in, c_out, stride)
        self.nodes = nn.ModuleList([candidates])

    def forward(self, s0: Tensor, x: Tensor, support: list, strengths: list, drop_path_prob: float | Tensor) -> Tensor:
        """As SparseCell's; s0 is not read."""
        name, state = support[0][0]
        strength = strengths[0][0]

        # Strengths are far below 1, and layer after layer would leave nothing of x. So a skip-connection is x itself;
        # its strength gets the gradient that it would have as a factor of x [C]
        if name == "skip_connect":
            return x * (1 + (strength - strength.detach()))

        o = self.nodes[0][f"{name}_{state}"](x)
        if self.shortcut:
            o = common.drop_path(o, drop_path_prob, self.training)
            return x + strength * o
        return strength * o


class MobileSupernet(SparseSupernet):
    """SparseSupernet of 5 n + 1 layers, each a node that keeps one of 6 operations, of 7 where it has a shortcut.

    channels: the stem's; ProxylessNAS has 32. Where a layer has no shortcut, the next batch norm cancels its strength,
    and its b gets almost no gradient: there the choice is random.
    """

    ops = common.MOBILE_PRIMITIVES
    kept = 1
    code = 3  # shorter than alpha, which has 7 entries [C]

    def count_states(self, layers: int) -> list[int]:
        return [1] * layers

    def build(self, channels: int, num_classes: int, layers: int, auxiliary: bool, stem: str) -> None:
        """A fixed MBConv, five stages of n layers, and one layer; the widths are ProxylessNAS' at 32 channels."""

        def width(at_32: int) -> int:
            return max(round(at_32 * channels / 32), 1)

        large = stem == "imagenet"
        n = layers // 5
        self.stem = nn.Sequential(*conv_bn_relu6(3, channels, 3, stride=2 if large else 1))
        self.stem1 = mobile_operation("mbconv1_3x3", channels, width(16), 1)
        self.cells = nn.ModuleList()
        c_in = width(16)
        first_stride = 2 if large else 1
        for at_32, stride, count in (
            (24, first_stride, n), (40, 2, n), (80, 2, n), (96, 1, n), (192, 2, n), (320, 1, 1)
        ):  # fmt: skip
            for i in range(count):
                k = len(self.cells)
                given = self.support[k : k + 1] if self.support else None
                self.cells.append(MobileLayer(k, c_in, width(at_32), stride if i == 0 else 1, given))
                c_in = width(at_32)
        self.head = nn.Sequential(*conv_bn_relu6(c_in, width(1280), 1))
        self.classifier = nn.Linear(width(1280), num_classes)

    def genotype(self) -> list[str]:
        return [name for name, _ in sum(self.support, [])]

    def skip_connects(self) -> tuple[int, int]:
        return self.genotype().count("skip_connect"), len(self.support)


def draw_layers(path: Path, net: MobileSupernet) -> None:
    """The kernel of every layer as a bar, dark where it widens 6 times."""
    genotype = net.genotype()
    figure = Figure(figsize=(max(0.5 * len(genotype), 5), 2.6), layout="constrained")
    axis = figure.subplots()
    for i, (layer, name) in enumerate(zip(net.cells, genotype)):
        kernel = 0 if name == "skip_connect" else int(name[-1])
        axis.bar(i, kernel, color="#0072B2" if name.startswith("mbconv6") else "#56B4E9")
        axis.text(i, 0.2, f"{layer.width} /2" if layer.stride == 2 else str(layer.width), ha="center", fontsize=8)
    axis.set(yticks=[3, 5, 7], ylim=(0, 7.5), ylabel="kernel", xlabel="layer (its width, /stride; dark: x 6)")
    figure.savefig(path, dpi=150)


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


def identity(images: Tensor, magnitude: Tensor) -> Tensor:
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
