# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "torchvision>=0.19", "numpy", "pillow", "tqdm", "matplotlib", "scipy"]
# ///
"""DHA: learn weights, augmentation policy, learning rate, weight decay and architecture of a network in one run.

    python dha.py --preset quick                               # 2 minutes on 2 CPU cores, nothing to download
    python dha.py --dataset cifar10 --gpu 0                    # the paper's size
    torchrun --nproc-per-node 4 dha.py --dataset cifar10       # one process per GPU
    python dha.py --resume --out runs/dha-cifar10-seed0        # go on where it stopped

Paper: Zhou et al., "DHA: End-to-End Joint Optimization of Data Augmentation Policy, Hyper-parameter and
Architecture", TMLR 2022, https://arxiv.org/abs/2109.05765; equation numbers are the paper's. Its architecture part is
the one-stage search of ISTA-NAS (Yang et al., NeurIPS 2020). There is one network at its final size, one loss and no
validation split, and nothing is retrained.

    theta    weights
    tau      14 x 14 logits: which pair of image operations to apply
    lr, wd   learning rate and weight decay; together the paper's eta. beta: the sizes of their steps
    alpha    strengths of a node's candidates: of each operation on each state (a cell's inputs, earlier nodes)
    b        what Adam trains in place of alpha: 7 numbers per node
    A        random and fixed; alpha is decoded from b = A alpha

A node's support is what it keeps and runs: the strongest candidate of each state, and of these the two strongest.
It is the child network of Figure 1, and changes once per epoch [A: ISTA-NAS].
One iteration (Figure 1; its last arrow, to eta, is step 3 of the iteration after):

    1. draw a pair of image operations for every image from softmax(tau) and apply it
    2. compute the loss of every image, and the gradients
    3. move lr and wd: which values would have made the last step of the weights better?    Eq. (3)
    4. move tau towards pairs with a large loss                                             Eq. (2)
    5. move b and theta to lower the mean loss

Before the search, and after each of its epochs but the last, ISTA decodes alpha from b (Eq. 4), which may change the
support. A node whose alpha hardly moves is frozen: its support is final, batch norms take its strengths over, and the
weights of what it keeps go on learning. After --search-epochs all nodes are frozen. Then the other candidates are
deleted, and training goes on with the same weights.
"""

import argparse
import fcntl
import json
import math
import os
import subprocess
import sys
import time
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

if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"  # a notebook's backend may be missing here
try:
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
except (ImportError, ValueError):
    Figure = None  # no figures

# ---------------------------------------------------------------------------------------------------------------------
# Settings. [P]: the paper. [A]: public code, the authors' unless named. [C]: our choice, because neither says.
# ---------------------------------------------------------------------------------------------------------------------

LR_RANGE = (1e-4, 0.1)  # where Eq. (3) may move lr [C]
WD_RANGE = (0.0, 1e-2)  # and wd [C]
MAX_LR_CHANGE = 0.1  # in one step, relative [C]
MAX_WD_CHANGE = 1e-5  # in one step [C]
GRAD_CLIP = 5.0  # largest norm of the weights' gradient [A: DARTS]
LASSO = 1e-5  # lambda of Eq. (4) [A: ISTA-NAS]
FREEZE_DISTANCE = 1e-3  # a node whose alpha moved no more than this in an epoch is frozen [A: ISTA-NAS]

PRESETS = {
    "paper": {},  # the defaults of the flags: CIFAR-10
    "quick": dict(  # [C]
        dataset="shapes", search_epochs=3, train_epochs=4, batch_size=64, channels=8, layers=3, lr=0.05, beta_lr=3e-4,
        beta_wd=1e-3, tau_lr=0.04, arch_lr=3e-3, b_scale=0.1, drop_path=0.0, auxiliary_weight=0.0, cutout=0,
    ),
    "imagenet": dict(  # [A: DARTS; its warm-up ISTA-NAS]
        dataset="imagenet", train_epochs=250, batch_size=128, channels=48, layers=14, lr=0.1, weight_decay=3e-5,
        warmup_epochs=5, label_smoothing=0.1, drop_path=0.0, cutout=0,
    ),
}  # fmt: skip
MOBILENET = dict(channels=32, layers=21, auxiliary_weight=0.0, drop_path=0.0)  # ProxylessNAS' size
MOBILENET_QUICK = dict(channels=8, layers=11, search_epochs=2, train_epochs=6, beta_lr=1e-4, b_scale=0.5)


def parse_args(argv: list[str]) -> argparse.Namespace:
    summary = __doc__.split("\n")[0] + " [P] paper, [A] public code, [C] our choice."
    parser = argparse.ArgumentParser(
        usage="%(prog)s [flags]", description=summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )

    add = parser.add_argument_group("what to run, on what").add_argument
    add("--preset", choices=["paper", "quick", "imagenet"], default="paper", help="sets the flags that are not given")
    add("--dataset", choices=common.DATASETS, default="cifar10", help="data set")
    add("--data-dir", type=os.path.expanduser, default="data", help="where data sets are, or are downloaded to")
    add("--image-size", type=at_least(8), help="scale to this side; None: 224 for photographs, else as they are")
    add("--limit-train", type=at_least(2), help="use only so many training images")
    add("--limit-test", type=at_least(1), help="use only so many test images")
    add("--workers", type=at_least(0), default=4, help="processes that read photographs")
    add("--seed", type=at_least(0, 2**31), default=0, help="seed of everything random")
    add("--gpu", type=at_least(-1), default=0 if torch.cuda.is_available() else -1, help="GPU number; -1 is the CPU")
    add("--amp", action="store_true", help="bfloat16 autocast (GPU only)")
    add("--out", type=os.path.expanduser, help="run directory; None is runs/<script>-<dataset>-seed<seed>")
    add("--resume", action="store_true", help="go on with the run in --out, if there is one")
    add("--evaluate", type=os.path.expanduser, metavar="DIR", help="print a finished run's test accuracy, and stop")
    add("--check", action="store_true", help="check flags and data, and stop")

    add = parser.add_argument_group("network and training").add_argument
    add("--search-epochs", type=at_least(1), default=120, help="maximum length of the search [A: ISTA-NAS]")
    add("--train-epochs", type=at_least(0), default=600, help="epochs after the search, same weights [P]")
    add("--batch-size", type=at_least(2), default=96, help="images per step, over all processes [P]")
    add("--channels", type=at_least(2), default=36, help="channels of the first cells, even [P]")
    add("--layers", type=at_least(3), default=20, help="cells; reductions at 1/3 and 2/3 [P]")
    add("--lr", type=at_least(0.0), default=0.025, help="learning rate of theta at the start [A: DARTS]")
    add("--weight-decay", type=at_least(0.0), default=3e-4, help="weight decay at the start [A: DARTS]")
    add("--auxiliary-weight", type=at_least(0.0), default=0.4, help="weight of the auxiliary head's loss [A: DARTS]")
    add("--label-smoothing", type=at_least(0.0, 1.0), default=0.0, help="share of a label that all classes get alike")
    add("--warmup-epochs", type=at_least(0), default=0, help="epochs in which lr rises to --lr, linearly")
    add("--drop-path", type=at_least(0.0, 1.0), default=0.2, help="probability at the end of training [A: DARTS]")
    add("--cutout", type=at_least(0), default=16, help="side of the square, in pixels [A: DARTS]")

    add = parser.add_argument_group("policy (Eq. 2), lr and wd (Eq. 3), architecture (Eqs. 1, 4)").add_argument
    add("--no-da", action="store_true", help="no policy: crop, flip and cutout only")
    add("--da-weight", choices=["p", "ratio"], default="ratio", help="p: Eq. (2) as printed [P]; ratio: ours [C]")
    add("--da-entropy", type=at_least(0.0), default=0.3, help="lambda_H, weight of the entropy, with ratio [C]")
    add("--tau-lr", type=at_least(0.0), default=1e-3, help="step size of tau, for 15,000 steps and more [C]")
    add("--no-hpo", action="store_true", help="wd stays, lr falls by a cosine once the search is over [A: ISTA-NAS]")
    add("--beta-lr", type=at_least(0.0), default=1e-5, help="beta of Eq. (3), for lr [C]")
    add("--beta-wd", type=at_least(0.0), default=1e-5, help="beta of Eq. (3), for wd [C]")
    add("--genotype", type=os.path.expanduser, help=f"no search: {', '.join(common.GENOTYPES)}, or a file")
    add("--arch-lr", type=at_least(0.0), default=3e-4, help="Adam's learning rate for b [A: ISTA-NAS]")
    add("--b-scale", type=at_least(0.0), default=1e-3, help="standard deviation of b at the start [A: ISTA-NAS]")
    add("--space", choices=["cells", "mobilenet"], default="cells", help="DARTS' cells, or ProxylessNAS' layers")
    add("--max-params", type=at_least(1), help="Eq. (1): reject supports whose network has more parameters")
    add("--max-flops", type=at_least(1), help="Eq. (1): reject supports with more multiply-adds per image")

    # The preset replaces defaults; flags that are given win
    given = parser.parse_known_args(argv)[0]
    parser.set_defaults(**PRESETS[given.preset])
    if given.space == "mobilenet":
        parser.set_defaults(**MOBILENET)
        if given.preset == "quick":
            parser.set_defaults(**MOBILENET_QUICK)
    args = settings_of_run(parser, argv)

    if args.channels % 2:
        parser.error("--channels must be even: a factorized reduction splits them in two")
    if args.space == "mobilenet" and (args.layers < 6 or args.layers % 5 != 1 or args.auxiliary_weight):
        parser.error("--space mobilenet has 6, 11, 16, 21, ... --layers and no auxiliary head")
    if args.genotype and not args.train_epochs:
        parser.error("--genotype with --train-epochs 0 leaves nothing to do")
    if not (args.no_hpo or LR_RANGE[0] <= args.lr <= LR_RANGE[1]):
        parser.error(f"--lr must lie in {LR_RANGE}, where Eq. (3) moves it, or give --no-hpo")
    if not (args.no_hpo or WD_RANGE[0] <= args.weight_decay <= WD_RANGE[1]):
        parser.error(f"--weight-decay must lie in {WD_RANGE}, where Eq. (3) moves it, or give --no-hpo")
    if args.amp and args.gpu < 0:
        parser.error("--amp is for a GPU")
    return args


def at_least(low: float, below: float = math.inf):
    """A `type` for argparse: numbers of low's own type, in [low, below)."""

    def number(text: str) -> float:
        value = type(low)(text)
        if not low <= value < below:
            raise argparse.ArgumentTypeError(f"{text} is not in [{low}, {below})")
        return value

    return number


# ---------------------------------------------------------------------------------------------------------------------
# The augmentation policy (section 2.1). tau has a logit for every ordered pair [A] of the 14 operations [P],
# which are AUGMENTATIONS, at the end of the file.
# ---------------------------------------------------------------------------------------------------------------------


def sample_pairs(tau: Tensor, count: int) -> Tensor:
    """Draw pairs of operations from p(tau), the softmax over all 196: (count,), with values 14 * first + second."""
    p = tau.detach().flatten().softmax(0).nan_to_num(1.0)  # NaN would crash multinomial; the epoch's end reports it
    return torch.multinomial(p, count, replacement=True)


@torch.no_grad()
def apply_pairs(images: Tensor, pairs: Tensor) -> Tensor:
    """T_k(x_k): each image through its pair, first, then second; magnitudes from U(-1, 1) [P, A].

    images (B, 3, H, W) in [0, 1], pairs (B,).
    """
    for choice in (pairs // len(AUGMENTATIONS), pairs % len(AUGMENTATIONS)):
        magnitude = 2 * torch.rand(len(images), device=images.device) - 1
        images = apply_each(images, choice, magnitude)
    return images


def policy_loss(tau: Tensor, pairs: Tensor, losses: Tensor, weight: str, entropy_weight: float = 0.0) -> Tensor:
    """L^DA of Eq. (2). Its gradient goes to tau alone.

    tau (14, 14); pairs (B,), drawn from p(tau), and losses (B,) of the same images. The paper calls p_k(tau) "an
    importance weight". `weight` is one of two readings; p_j and l_j are the probability and the mean loss of pair j:

    "p", as printed [P, A]. The pairs are drawn from p already, so that p counts twice: in the mean tau_j climbs
    B p_j (p_j l_j - sum_i p_i^2 l_i). What is drawn more often gains: p stays uniform while the steps are small, and
    ends on one pair where they are not. It is here to reproduce the paper.

    "ratio", the default of this script [C]. The importance weight of a draw from p is p_k(tau) / p_k(tau held fixed),
    whose value is 1 and whose gradient is that of log p_k. In the mean tau_j climbs B p_j (l_j - sum_i p_i l_i): pairs
    that are harder than the mean gain. The batch's mean loss is subtracted, which takes noise away and in the mean
    changes B to B - 1. entropy_weight, lambda_H in nats, adds the entropy H of p: the maximum of
    sum_i p_i l_i + lambda_H H is at p_i ~ exp(l_i / lambda_H), where no pair has all.
    """
    p = tau.flatten().softmax(0)
    drawn = p.gather(0, pairs)  # p_k(tau), (B,)
    losses = losses.detach()
    if weight == "p":
        return -(drawn * losses).sum()  # Eq. (2)

    ratio = drawn / drawn.detach()
    entropy = torch.special.entr(p).sum()
    return -(ratio * (losses - losses.mean())).sum() - entropy_weight * len(pairs) * entropy


# ---------------------------------------------------------------------------------------------------------------------
# Hyper-parameters (section 2.2)
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sgd_step(
    theta: list[Tensor], grads: list[Tensor], velocity: list[Tensor], lr: Tensor, wd: Tensor, momentum: float = 0.9
) -> None:
    """OP of section 2.2, in place: v = momentum v + g + wd theta, and theta = theta - lr v. momentum 0.9 [A].

    lr, wd: 0-dim tensors, so that no step waits for the GPU.
    """
    torch._foreach_mul_(velocity, momentum)
    torch._foreach_add_(velocity, grads)
    torch._foreach_add_(velocity, torch._foreach_mul(theta, wd))
    torch._foreach_sub_(theta, torch._foreach_mul(velocity, lr))


@torch.no_grad()
def hypergradient(
    grads: list[Tensor], velocity: list[Tensor], theta_plus: list[Tensor], lr: Tensor | float
) -> tuple[Tensor, Tensor]:
    """The gradient of Eq. (3), (dL/dlr, dL/dwd), through the last sgd_step.

    theta_plus: theta^(t+1), the weights after the step. grads: dL/dtheta there, before clipping. velocity: the
    step's v. lr: its rate. The weights and the v before the step count as constant (end of section 2.2).

    The paper takes L on "a mini-batch". Here that is the batch of the next step [C], with the support, b and tau of
    then: its gradient is computed anyway, so that Eq. (3) costs no second pass (the authors' code pays one).
    """
    g = torch.cat([tensor.flatten() for tensor in grads])
    v = torch.cat([tensor.flatten() for tensor in velocity])
    after = torch.cat([tensor.flatten() for tensor in theta_plus])
    before = after + lr * v

    d_lr = -(g @ v)  # dtheta+/dlr = -v
    d_wd = -lr * (g @ before)  # dtheta+/dwd = -lr theta
    return d_lr, d_wd


# ---------------------------------------------------------------------------------------------------------------------
# Architecture (section 2.3). A node of a cell adds up two operations, each of which reads a state: an input of the cell
# or an earlier node. A candidate is an operation on a state: 7 operations on up to 5 states are up to 35 entries of
# alpha, of which two will be kept. b has CODE = 7 numbers. Sparse coding: of all alphas with A alpha = b, the one with
# the smallest sum of absolute values nearly always has no more non-zeros than b has numbers.
# ---------------------------------------------------------------------------------------------------------------------


def soft_threshold(x: Tensor, threshold: Tensor) -> Tensor:
    """The shrinkage operator of Eq. (4), there called eta: entries move towards 0 by `threshold`, and stop at 0."""
    return x.sign() * (x.abs() - threshold).clamp(min=0)


@torch.no_grad()
def ista(A: Tensor, b: Tensor, lam: float, tolerance: float = 1e-9, rounds: int = 2000) -> Tensor:
    """Decode: alpha = argmin 1/2 |A alpha - b|^2 + lam |alpha|_1, by iterative shrinkage, Eq. (4).

    A (..., m, n) and b (..., m) to alpha (..., n), of b's type and device. Eq. (4) alone is hopeless here: with n >
    m and lam = 1e-5 its non-zeros are still wrong after 1,000 iterations. Three known remedies:

    - momentum (FISTA, Beck & Teboulle), given up where it leads uphill (O'Donoghue & Candes);
    - continuation (Hale et al.): lam starts large and is halved every round;
    - after every round, jumps to the solution that the present signs of alpha allow: active_set_step.

    It ends when no optimality condition (KKT) is violated by more than `tolerance`, as a share of max |A^T b|, and
    raises ArithmeticError after `rounds` rounds. Float64 on the CPU: on a GPU it would be 15,000 small kernels.
    """
    A_cpu = A.double().cpu()
    G = A_cpu.mT @ A_cpu  # A^T A (..., n, n)
    c = (A_cpu.mT @ b.double().cpu().unsqueeze(-1)).squeeze(-1)  # A^T b (..., n)

    # L of Eq. (4), by which it divides, is the Lipschitz constant of the gradient (..., 1). (The text has L for LASSO)
    lipschitz = torch.linalg.matrix_norm(G, 2).unsqueeze(-1).clamp(min=1e-30)
    largest = c.abs().amax(-1, keepdim=True)
    lam_now = (largest / 2).clamp(min=lam)  # continuation: from here down to lam
    alpha = torch.zeros_like(c)

    for _ in range(rounds):
        # Momentum: a step starts ahead of alpha, unless that leads uphill
        ahead = alpha
        t = torch.ones_like(lipschitz)
        for _ in range(50):
            gradient = (G @ ahead.unsqueeze(-1)).squeeze(-1) - c  # A^T (A alpha - b)
            new = soft_threshold(ahead - gradient / lipschitz, lam_now / lipschitz)  # Eq. (4)

            uphill = ((ahead - new) * (new - alpha)).sum(-1, keepdim=True) > 0
            t_new = torch.where(uphill, 1.0, (1 + (1 + 4 * t**2).sqrt()) / 2)
            ahead = new + torch.where(uphill, 0.0, (t - 1) / t_new) * (new - alpha)
            alpha, t = new, t_new

        # Jumps, each of which may set entries to 0
        for _ in range(3):
            alpha = active_set_step(G, c, lipschitz, lam_now, alpha)

        # KKT: A^T (b - A alpha) is lam sign(alpha) where alpha is not 0, and within [-lam, lam] elsewhere
        slope = c - (G @ alpha.unsqueeze(-1)).squeeze(-1)
        where_nonzero = (slope - lam * alpha.sign()).abs()
        where_zero = (slope.abs() - lam).clamp(min=0)
        violation = torch.where(alpha != 0, where_nonzero, where_zero)
        if (lam_now <= lam).all() and (violation <= tolerance * largest).all():
            return alpha.to(b)
        lam_now = (lam_now / 2).clamp(min=lam)
    raise ArithmeticError(f"ISTA did not converge: KKT violation {float(violation.max()):.1e}")


def active_set_step(G: Tensor, c: Tensor, lipschitz: Tensor, lam: Tensor, alpha: Tensor) -> Tensor:
    """Move alpha (..., n) to the minimum for its present signs, or until one would flip (FPC-AS, Wen et al.).

    With the signs given, the problem is quadratic: one linear system. G = A^T A (..., n, n), c = A^T b (..., n).
    """
    on = alpha != 0
    block = torch.where(on.unsqueeze(-1) & on.unsqueeze(-2), G, 0.0)
    block = block + torch.diag_embed(torch.where(on, 1e-12 * lipschitz, 1.0))  # 1e-12: columns may be dependent
    slope = c - (G @ alpha.unsqueeze(-1)).squeeze(-1)  # A^T (b - A alpha)
    right_side = torch.where(on, slope - lam * alpha.sign(), 0.0)
    best = alpha + torch.linalg.solve_ex(block, right_side).result

    # The share of the way at which the first entry becomes 0; that entry stays 0
    share = torch.where(best * alpha < 0, alpha / (alpha - best), 1.0)
    first = share.amin(-1, keepdim=True)
    leaves = (share <= first) & (first < 1)
    return torch.where(leaves, 0.0, alpha + first * (best - alpha))


def select_support(alpha: Tensor, counts: list[int], kept: int, ops: tuple[str, ...]) -> list[list[tuple[str, int]]]:
    """What each of K nodes keeps: the strongest operation on each state, by |alpha|, and of these the `kept` strongest.

    alpha (K, n), entry len(ops) * state + operation; node k reads the states 0 .. counts[k] - 1. Returns for every node
    pairs (operation, state). DHA's code compares signed values [A]; |alpha| is ours [C]. ISTA-NAS' one-stage code takes
    the two largest |alpha| of all, which may be on one state.
    """
    edges = alpha.abs().view(len(counts), -1, len(ops))  # (K, states, operations)
    largest, operation = edges.max(2)  # (K, states) each
    support = []
    for k, count in enumerate(counts):
        chosen = largest[k, :count].topk(kept).indices.sort().values
        support.append([(ops[operation[k, state]], state) for state in chosen.tolist()])
    return support


# ---------------------------------------------------------------------------------------------------------------------
# The supernet: every candidate exists, those of the support run. (ProxylessNAS' space stands before the
# augmentations.)
# ---------------------------------------------------------------------------------------------------------------------

NODES = 4  # of a cell; node j reads the states 0 .. j + 1, of which 0 and 1 are the cell's inputs
OPS = common.PRIMITIVES[1:]  # without "none", as both public one-stage codes [A]
CODE = 7  # length of a node's b


def batch_norms(op: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in op.modules() if isinstance(module, nn.BatchNorm2d)]


class SparseCell(nn.Module):
    """A DARTS cell with all candidates, each of which ends in a batch norm.

    c_before, c_in: channels of the inputs s0 and s1; halved: s1 has half the height and width of s0. first_node: the
    number, in the supernet, of the cell's first node.
    """

    def __init__(self, c_before: int, c_in: int, channels: int, reduction: bool, halved: bool, first_node: int):
        super().__init__()
        self.first_node = first_node
        self.preprocess0 = FactorizedReduce(c_before, channels) if halved else common.relu_conv_bn(c_before, channels)
        self.preprocess1 = common.relu_conv_bn(c_in, channels)

        self.nodes = nn.ModuleList()
        for j in range(NODES):
            candidates = nn.ModuleDict()
            for state in range(j + 2):
                for name in OPS:
                    op = common.operation(name, channels, stride=2 if reduction and state < 2 else 1)
                    if not batch_norms(op):
                        op.append(nn.BatchNorm2d(channels))
                    candidates[f"{name}_{state}"] = op
            self.nodes.append(candidates)

    def forward(self, s0: Tensor, s1: Tensor, support: list, strengths: list, drop_path_prob: float) -> Tensor:
        """support: for each node, the pairs (operation, state) to run. strengths: their weights; None once frozen."""
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        for j, candidates in enumerate(self.nodes):
            node = None
            for i, (name, state) in enumerate(support[j]):
                op = candidates[f"{name}_{state}"]
                o = op(states[state])
                if self.training and drop_path_prob > 0 and not isinstance(op[0], nn.Identity):
                    o = common.drop_path(o, drop_path_prob)
                if strengths[j] is not None:
                    o = strengths[j][i] * o
                node = o if node is None else node + o  # alpha_j^T o_j, section 2.3
            states.append(node)
        return torch.cat(states[2:], 1)  # (B, 4 channels, H, W)


class SparseSupernet(nn.Module):
    """Normalised images (B, 3, H, W) to logits (B, num_classes).

    With `auxiliary`, in training, to (logits, auxiliary logits). `layers` cells share 8 nodes: 4 of the normal
    cell, 4 of the reduction cell. Node k has b[k] (7,), A[k] (7, 35; zeros where it has fewer candidates), alpha[k]
    (35,), support[k] and frozen[k]; A_S and alpha_S are A and alpha on the support S. b_scale: standard deviation of
    b at the start.
    """

    ops = OPS
    kept = 2  # operations that a node keeps

    def __init__(
        self,
        channels: int,
        num_classes: int,
        layers: int,
        auxiliary: bool = False,
        b_scale: float = 1e-3,
        stem: str = "cifar",
    ):
        super().__init__()
        self.drop_path_prob = 0.0
        self.auxiliary = None
        self.auxiliary_at = 2 * layers // 3
        self.build(channels, num_classes, layers, auxiliary, stem)

        # Until a node freezes all batch norms of its candidates keep weight 1 and bias 0 [A]: a scale that learns could
        # undo the strength that follows it
        for cell in self.cells:
            for norm in batch_norms(cell.nodes):
                norm.requires_grad_(False)

        # A is random and fixed; nodes with fewer candidates than others have zeros
        nodes = len(self.states)
        A = torch.rand(nodes, CODE, len(self.ops) * max(self.states))  # U(0, 1) [A]
        for cell in self.cells:
            for k, candidates in enumerate(cell.nodes, cell.first_node):
                A[k, :, len(candidates) :] = 0
        self.register_buffer("A", A)
        self.register_buffer("alpha", torch.zeros(nodes, A.shape[2]))

        # What `strength` needs of A and alpha; and what the search moves: b, and with it the support
        self.register_buffer("A_S", torch.zeros(nodes, CODE, self.kept))
        self.register_buffer("alpha_S", torch.zeros(nodes, self.kept))
        self.b = nn.ParameterList(b_scale * torch.randn(CODE) for _ in range(nodes))
        self.frozen = [False] * nodes
        self.adopt(self.decode())

    def build(self, channels: int, num_classes: int, layers: int, auxiliary: bool, stem: str) -> None:
        """The stem, the cells, reductions at layers//3 and 2*layers//3 as in DARTS, and the classifier."""
        self.states = [2, 3, 4, 5, 2, 3, 4, 5]  # how many states each node can read: normal cell, reduction cell
        self.stem, self.stem1, c_in, halved = common.stems(stem, channels)
        self.cells = nn.ModuleList()
        c_before = c_in
        for i in range(layers):
            reduction = i in (layers // 3, 2 * layers // 3)
            if reduction:
                channels *= 2
            first_node = NODES if reduction else 0
            self.cells.append(SparseCell(c_before, c_in, channels, reduction, halved, first_node))
            c_before = c_in
            c_in = NODES * channels
            halved = reduction
            if auxiliary and i == self.auxiliary_at:
                self.auxiliary = common.auxiliary_head(c_in, num_classes, stem)
        self.head = nn.Identity()
        self.classifier = nn.Linear(c_in, num_classes)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):  # strengths are float32 with --amp, too
            strengths = [None if frozen else self.strength(k) for k, frozen in enumerate(self.frozen)]

        # Cell by cell, each with the support and the strengths of its own nodes
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

    def strength(self, k: int) -> Tensor:
        """What multiplies the outputs of node k's support, (kept,): section 2.3's b^T A - alpha^T E, cut to it [A].

        alpha is constant here, so that the gradient goes to b. Where alpha has no other non-zeros and b = A alpha,
        these are the entries of alpha.
        """
        A, alpha = self.A_S[k], self.alpha_S[k]
        alpha_E = A.T @ (A @ alpha) - alpha  # E = A^T A - I, which is symmetric
        return A.T @ self.b[k] - alpha_E

    @torch.no_grad()
    def decode(self, lam: float = LASSO) -> Tensor:
        """Solve Eq. (4) for the nodes that are not frozen: alpha (nodes, 35)."""
        searched = [k for k, frozen in enumerate(self.frozen) if not frozen]
        alpha = self.alpha.clone()
        alpha[searched] = ista(self.A[searched], torch.stack([self.b[k] for k in searched]), lam)
        if dist.is_initialized():
            dist.broadcast(alpha, 0)  # one support for all processes
        return alpha

    def support_of(self, alpha: Tensor) -> list[list[tuple[str, int]]]:
        """The support of an alpha (nodes, 35): for every node [(operation, state), ...]. That of frozen nodes stays."""
        support = select_support(alpha.cpu(), self.states, self.kept, self.ops)
        for k, frozen in enumerate(self.frozen):
            if frozen:
                support[k] = self.support[k]
        return support

    def adopt(self, alpha: Tensor) -> list[float]:
        """Make alpha (nodes, 35) and its support the network's. Returns how far each node's alpha moved."""
        distances = (alpha - self.alpha).norm(dim=1).tolist()
        self.support = self.support_of(alpha)
        self.alpha.copy_(alpha)

        # A and alpha on the new support
        for k, frozen in enumerate(self.frozen):
            if not frozen:
                entries = [len(self.ops) * state + self.ops.index(name) for name, state in self.support[k]]
                self.A_S[k] = self.A[k][:, entries]
                self.alpha_S[k] = alpha[k, entries]
        return distances

    def running(self, k: int, support: list) -> list[nn.Module]:
        """Node k's operations under a support: what it keeps, in each of the cells that have the node, cell by cell."""
        found = []
        for cell in self.cells:
            if cell.first_node <= k < cell.first_node + len(cell.nodes):
                candidates = cell.nodes[k - cell.first_node]
                found += [candidates[f"{name}_{state}"] for name, state in support[k]]
        return found

    @torch.no_grad()
    def freeze(self, k: int) -> None:
        """End the search of node k.

        In every cell the last batch norm of each kept operation is multiplied by the operation's strength; all batch
        norms of these operations learn from now on.
        """
        strength = self.strength(k)
        for i, op in enumerate(self.running(k, self.support)):
            for norm in batch_norms(op)[-1:]:
                norm.weight.mul_(strength[i % self.kept])
            op.requires_grad_(True)
        self.frozen[k] = True
        self.b[k].grad = None  # without one Adam leaves b alone

    def prune(self, genotype: Genotype | list[str]) -> None:
        """Delete all candidates but the genotype's; nothing is left to search. Raises InputError if it does not fit."""
        self.support = support_of_genotype(genotype)
        if [len(pairs) for pairs in self.support] != [self.kept] * len(self.states):
            raise InputError("the genotype is not of this --space with so many --layers")

        # In every cell a node keeps what it has chosen
        for cell in self.cells:
            for k, candidates in enumerate(cell.nodes, cell.first_node):
                chosen = {f"{name}_{state}" for name, state in self.support[k]}
                if not chosen <= candidates.keys():
                    raise InputError(f"the genotype chooses {min(chosen)}, which node {k} does not have")
                for name in candidates.keys() - chosen:
                    del candidates[name]
                candidates.requires_grad_(True)
        self.frozen = [True] * len(self.states)
        self.b = nn.ParameterList()
        self.A = self.alpha = self.A_S = self.alpha_S = None

    def genotype(self) -> Genotype | list[str]:
        normal = sum(self.support[:NODES], [])
        reduce = sum(self.support[NODES:], [])
        return Genotype(normal, [2, 3, 4, 5], reduce, [2, 3, 4, 5])

    def skip_connects(self) -> tuple[int, int]:
        """How many operations of the normal cell are skip-connections, and of how many."""
        names = [name for name, _ in sum(self.support[:NODES], [])]
        return names.count("skip_connect"), len(names)


def support_of_genotype(genotype: Genotype | list[str]) -> list[list[tuple[str, int]]]:
    """What every node of a supernet keeps, for a genotype. Raises InputError for cells of another shape."""
    if isinstance(genotype, list):
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

    # Parameters: all, without b and the candidates that do not run
    if args.max_params:
        running = set()
        for k in range(len(support)):
            for op in net.running(k, support):
                running.update(op.parameters())
        idle = set(net.b.parameters())
        for cell in net.cells:
            idle.update(p for p in cell.nodes.parameters() if p not in running)
        params = common.count_parameters(net) - sum(p.numel() for p in idle)
        shares.append(params / args.max_params)

    # Multiply-adds: with this support running
    if args.max_flops:
        present = net.support
        net.support = support
        shares.append(common.count_flops(net, image_size) / args.max_flops)
        net.support = present
    return max(shares)


@torch.no_grad()
def start_within_limits(net: SparseSupernet, args: argparse.Namespace, image_size: int) -> None:
    """Bring the first, random support under the limits of Eq. (1), node by node.

    Each draw gives one node a b that makes a random operation its strongest; the draw is undone if it leads further
    from the limits. Raises InputError after 300 draws.
    """
    nearest = cost_share(net, net.support, args, image_size)
    for n in range(300):
        if nearest <= 1:
            break
        # A column of A is the code of an alpha that is 1 there and 0 elsewhere
        k = n % len(net.b)
        candidates = int(net.A[k].any(0).sum())
        chosen = int(torch.randint(candidates, ()))
        before = net.b[k].clone()
        code = net.A[k][:, chosen] + 0.02 * torch.randn_like(before)
        net.b[k].copy_(args.b_scale * code)

        alpha = net.decode()
        found = cost_share(net, net.support_of(alpha), args, image_size)
        if found > nearest:
            net.b[k].copy_(before)
        else:
            nearest = found
            net.adopt(alpha)
    if nearest > 1:
        raise InputError("found no architecture within --max-params and --max-flops to start with: raise them")


# ---------------------------------------------------------------------------------------------------------------------
# One iteration (Figure 1)
# ---------------------------------------------------------------------------------------------------------------------

# Under torchrun: this process's number, and how many there are
TORCHRUN = dist.is_torchelastic_launched()
RANK = int(os.environ["RANK"]) if TORCHRUN else 0
WORLD = int(os.environ["WORLD_SIZE"]) if TORCHRUN else 1
QUIET = True if RANK > 0 else None  # tqdm's disable; None: no bar where there is no terminal


class DHA:
    """Everything that is learned, and the state of its optimizers."""

    def __init__(self, args: argparse.Namespace, data: common.Data, device: torch.device):
        build = MobileSupernet if args.space == "mobilenet" else SparseSupernet
        stem = common.stem_for(data.train_images)
        auxiliary = args.auxiliary_weight > 0
        self.net = build(args.channels, len(data.classes), args.layers, auxiliary, args.b_scale, stem)
        self.net.to(device, memory_format=torch.channels_last)
        self.theta = [p for name, p in self.net.named_parameters() if not name.startswith("b.")]
        self.velocity = {}  # weight: its v, of all that the last step moved

        self.b_optimizer = torch.optim.Adam(self.net.b, args.arch_lr, betas=(0.5, 0.999), weight_decay=1e-3)  # [A]
        self.tau = torch.zeros(len(AUGMENTATIONS), len(AUGMENTATIONS), device=device, requires_grad=True)  # all alike
        self.lr = torch.tensor(args.lr, device=device)  # tensors, so that no step waits for the GPU
        self.last_lr = self.lr.clone()  # of the last step: warm-up may set lr before Eq. (3) looks back at that step
        self.wd = torch.tensor(args.weight_decay, device=device)
        mean, std = common.mean_std(data.train_images)
        self.mean = mean.to(device)
        self.std = std.to(device)

    def prune(self, genotype: Genotype | list[str]) -> None:
        """The search is over: delete the other candidates, and their velocities."""
        self.net.prune(genotype)
        self.theta = list(self.net.parameters())
        self.velocity = {p: self.velocity[p] for p in self.theta if p in self.velocity}

    def state_dict(self) -> dict:
        return {
            "net": self.net.state_dict(),
            "support": self.net.support,
            "frozen": self.net.frozen,
            "velocity": [self.velocity.get(p) for p in self.theta],
            "b_optimizer": self.b_optimizer.state_dict(),
            "tau": self.tau.detach(),
            "lr": self.lr,
            "last_lr": self.last_lr,
            "wd": self.wd,
        }

    def load_state_dict(self, state: dict) -> None:
        """Into a DHA that was just built."""
        # The network's form first: freezing and pruning change which parameters it has (and values, which come next)
        self.net.support = state["support"]
        for k, frozen in enumerate(state["frozen"]):
            if frozen and not self.net.frozen[k]:
                self.net.freeze(k)
        if all(self.net.frozen):
            self.prune(self.net.genotype())

        self.net.load_state_dict(state["net"])
        self.velocity = {p: v.to(p) for p, v in zip(self.theta, state["velocity"]) if v is not None}
        self.b_optimizer.load_state_dict(state["b_optimizer"])
        self.tau.data.copy_(state["tau"])
        self.lr.copy_(state["lr"])
        self.last_lr.copy_(state["last_lr"])
        self.wd.copy_(state["wd"])


@torch.no_grad()
def average_gradients(params: list[Tensor]) -> None:
    """Under torchrun: every gradient becomes its mean over the processes, in place."""
    if dist.is_initialized():
        grads = [p.grad for p in params if p.grad is not None]
        total = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(total)
        means = (total / dist.get_world_size()).split([g.numel() for g in grads])
        for g, mean in zip(grads, means):
            g.copy_(mean.view_as(g))


def train_step(s: DHA, images: Tensor, labels: Tensor, args: argparse.Namespace) -> Tensor:
    """One iteration on uint8 images (B, 3, H, W), cropped and flipped at random, and labels (B,).

    Returns the mean loss and the accuracy in %, (2,), of the augmented images.
    """
    # 1. A pair of operations for every image
    x = images / 255  # (B, 3, H, W) in [0, 1]
    if not args.no_da:
        pairs = sample_pairs(s.tau, len(x))  # (B,)
        x = apply_pairs(x, pairs)
    x = common.cutout(common.normalize(x, s.mean, s.std), args.cutout)

    # 2. The loss of every image, and all gradients
    with torch.autocast(x.device.type, torch.bfloat16, enabled=args.amp):
        out = s.net(x)
    logits, auxiliary_logits = out if isinstance(out, tuple) else (out, None)  # (B, classes)
    smooth = args.label_smoothing
    losses = F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=smooth)  # (B,)
    if auxiliary_logits is not None:
        auxiliary_losses = F.cross_entropy(auxiliary_logits.float(), labels, reduction="none", label_smoothing=smooth)
        losses = losses + args.auxiliary_weight * auxiliary_losses

    for p in [*s.theta, *s.net.b, s.tau]:
        p.grad = None  # so it stays where a weight does not run
    losses.mean().backward()
    if not args.no_da:
        policy_loss(s.tau, pairs, losses, args.da_weight, args.da_entropy).backward()  # Eq. (2)
    ran = [p for p in s.theta if p.grad is not None]
    average_gradients([*ran, *s.net.b, s.tau])

    # 3. Eq. (3), before theta moves again: this gradient was taken at the weights that the last step left, and tells
    #    how that step's lr and wd should have differed. Only weights that moved then and ran now have a say
    moved = [p for p in ran if p in s.velocity]
    if moved and not args.no_hpo:
        d_lr, d_wd = hypergradient([p.grad for p in moved], [s.velocity[p] for p in moved], moved, s.last_lr)
        lr_change = (args.beta_lr * d_lr).clamp(-MAX_LR_CHANGE * s.lr, MAX_LR_CHANGE * s.lr)
        wd_change = (args.beta_wd * d_wd).clamp(-MAX_WD_CHANGE, MAX_WD_CHANGE)
        s.lr.sub_(lr_change).clamp_(*LR_RANGE)  # Eq. (3)
        s.wd.sub_(wd_change).clamp_(*WD_RANGE)  # Eq. (3)

    # 4. The policy. Eq. (2) is a sum over the batch; average_gradients made it the mean of WORLD processes' sums
    if not args.no_da:
        with torch.no_grad():
            s.tau -= args.tau_lr * WORLD * s.tau.grad

    # 5. b, and the weights. A weight that did not run in the last step starts with v = 0 [C]
    s.b_optimizer.step()
    nn.utils.clip_grad_norm_(ran, GRAD_CLIP)
    s.velocity = {p: s.velocity[p] if p in s.velocity else torch.zeros_like(p) for p in ran}
    sgd_step(ran, [p.grad for p in ran], list(s.velocity.values()), s.lr, s.wd)
    s.last_lr.copy_(s.lr)

    accuracy = 100 * (logits.argmax(1) == labels).float().mean()
    return torch.stack([losses.mean(), accuracy]).detach()


def decode_and_freeze(s: DHA, args: argparse.Namespace, image_size: int, last: bool) -> list[float] | None:
    """End an epoch of search: decode alpha (Eq. 4), which may change the support, and freeze what has settled.

    After the `last` epoch nothing is decoded any more, and all nodes freeze. When all are frozen, the network is
    pruned. Returns how far each node's alpha moved; None where nothing was decoded, or the new support breaks a
    limit of Eq. (1): then the old one stays.
    """
    searched = [k for k, frozen in enumerate(s.net.frozen) if not frozen]
    distances = None
    if last:
        settled = searched
    else:
        alpha = s.net.decode()
        if cost_share(s.net, s.net.support_of(alpha), args, image_size) > 1:
            print("the new support breaks --max-params or --max-flops: the old one stays")
            return None
        distances = s.net.adopt(alpha)
        chosen = s.net.alpha_S.any(1).tolist()  # where alpha is 0 on the support nothing is chosen yet
        settled = [k for k in searched if distances[k] <= FREEZE_DISTANCE and chosen[k]]

    for k in settled:
        s.net.freeze(k)
    if all(s.net.frozen):
        s.prune(s.net.genotype())
    return distances


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


def run_dha(args: argparse.Namespace, device: torch.device) -> None:
    """Search and train one network; the run directory --out holds all that comes out."""
    out = Path(args.out)
    if (out / "result.json").exists():
        print(f"{out} is finished already:", (out / "result.json").read_text())
        return
    data = load_data(args, device)
    steps = len(common.batches(len(data.train_images), args.batch_size, 0, RANK, WORLD))
    image_size = data.train_images.shape[-1]

    # The architecture: given, or searched from a random start. A resumed run reads its own copy
    torch.manual_seed(args.seed)
    s = DHA(args, data, device)
    if args.genotype:
        copy = out / "genotype.json"
        s.prune(common.load_genotype(copy if copy.exists() else args.genotype, args.space))
    resumed = (out / "checkpoint.pt").exists()
    if not resumed and cost_share(s.net, s.net.support, args, image_size) > 1:
        if args.genotype:
            raise InputError("the genotype breaks --max-params or --max-flops")
        start_within_limits(s.net, args, image_size)

    directory = RunDirectory(args, device, RANK, WORLD)
    history = directory.history  # a record per epoch
    if history:
        s.load_state_dict(directory.state["dha"])
    elif args.genotype and RANK == 0:
        common.save_genotype(s.net.genotype(), out / "genotype.json")

    # Search until every node is frozen, then train
    epochs_searched = sum(record["phase"] == "search" for record in history)
    while not all(s.net.frozen) or len(history) < epochs_searched + args.train_epochs:
        begun = time.time()
        epoch = len(history)
        searching = not all(s.net.frozen)
        progress = 0.0 if searching else (epoch - epochs_searched) / args.train_epochs
        s.net.train()
        s.net.drop_path_prob = args.drop_path * progress
        if args.no_hpo:  # constant while searching, then from lr to lr / 25 along half a cosine [A: ISTA-NAS]
            s.lr.fill_(args.lr * (0.04 + 0.96 * (1 + math.cos(math.pi * progress)) / 2))
        if epoch < args.warmup_epochs:  # each of these epochs starts at its own lr; within it Eq. (3) moves lr
            s.lr.fill_(args.lr * (epoch + 1) / args.warmup_epochs)

        # One seed per epoch: a resumed run goes on as if it had never stopped
        seed = 100_003 * args.seed + epoch
        torch.manual_seed(1_009 * seed + RANK)

        # With Eq. (3) each batch is drawn from all images, so that an epoch may see an image twice [C]: the next batch
        # must be independent of those in v. Batches of one permutation share no image, which biases dL/dlr upwards
        independent = not args.no_hpo
        order = common.batches(len(data.train_images), args.batch_size, seed, RANK, WORLD, independent).to(device)
        batches = common.loader(data.train_images, data.train_labels, order, train=True)
        totals = torch.zeros(2, device=device)
        for images, labels in tqdm(batches, f"epoch {epoch + 1}", steps, leave=False, disable=QUIET):
            totals += train_step(s, images, labels, args)

        learned = [*s.velocity.keys(), *s.net.b, s.tau, s.lr, s.wd]
        loss, accuracy = finite_means(totals / steps, learned, epoch + 1, "--lr, --beta-lr or --tau-lr")

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
            "lr": float(s.lr),
            "wd": float(s.wd),
            "entropy": entropy,  # of p(tau), in nats; 5.278 when all pairs are alike
            "frozen": sum(s.net.frozen),  # as it was in this epoch, before decode_and_freeze; so is the support
            "skip_connects": skips,
            "support": s.net.support,
        }
        last_entropy = history[-1]["entropy"] if history else math.log(s.tau.numel())
        if entropy < last_entropy / 2:
            print("warning: the entropy of the policy halved in this epoch, it may end on one pair: lower --tau-lr")
        if searching and skips > operations // 2:
            print(f"warning: {skips} of {operations} operations are skip-connections: the search may be collapsing")

        if searching:
            epochs_searched += 1
            record["moved"] = decode_and_freeze(s, args, image_size, last=epochs_searched == args.search_epochs)
        print(
            f"epoch {epoch + 1}  {record['phase']}  loss {loss:.3f}  train {accuracy:.1f} %  "
            f"test {test_accuracy:.1f} %  lr {s.lr:.4f}  wd {s.wd:.1e}  "
            f"entropy {entropy:.2f}  frozen {record['frozen']}"
        )
        directory.end_epoch(record, time.time() - begun, dha=s.state_dict())

    if RANK == 0:
        save_dha(s, args, data, directory)


def save_dha(s: DHA, args: argparse.Namespace, data: common.Data, directory: "RunDirectory") -> None:
    """Write genotype.json, policy.json, model.pt, the figures; and last result.json, which says that all is there."""
    out = directory.out
    net = s.net
    net.auxiliary = None  # only training needs it
    genotype = net.genotype()
    common.save_genotype(genotype, out / "genotype.json")
    p = s.tau.detach().cpu().flatten().softmax(0).view(s.tau.shape)
    if not args.no_da:
        save(out / "policy.json", {"operations": list(AUGMENTATIONS), "probability": p.tolist()})

    # The network, with all that its user needs
    image_size = data.train_images.shape[-1]
    model = {
        "state_dict": {name: value.cpu() for name, value in net.state_dict().items()},
        "genotype": str(genotype),
        "space": args.space,
        "channels": args.channels,
        "layers": args.layers,
        "stem": common.stem_for(data.train_images),
        "classes": data.classes,
        "image_size": image_size,
        "mean": s.mean.cpu(),
        "std": s.std.cpu(),
    }
    save(out / "model.pt", model)
    draw_dha(directory, net, None if args.no_da else p)

    # A name for the run. Table 1 has One-Stage ISTA and DHA
    method = "given genotype" if args.genotype else "DHA"
    if args.no_da:
        method += " without DA"
    if args.no_hpo:
        method += " without HPO"
    if method == "DHA without DA without HPO":
        method = "One-Stage ISTA"
    result = {
        "test_accuracy": directory.history[-1]["test_accuracy"],
        "method": method,
        "dataset": args.dataset,
        "seed": args.seed,
        "params": common.count_parameters(net),
        "flops": common.count_flops(net, image_size),
        "genotype": str(genotype),
        **directory.costs(),
    }
    save(out / "result.json", result)
    print(json.dumps(result, indent=1))


def load_model(path: str | Path, device: torch.device | str = "cpu") -> tuple[SparseSupernet, dict]:
    """The network in a model.pt, in eval mode, and what else the file holds (classes, mean, std, image_size, ...).

    It takes images normalised with that mean and std: common.normalize(images, info["mean"], info["std"]).
    """
    try:
        info = torch.load(path, map_location=device, weights_only=True)
        build = MobileSupernet if info["space"] == "mobilenet" else SparseSupernet
        net = build(info["channels"], len(info["classes"]), info["layers"], stem=info["stem"])
        net.prune(common.parse_genotype(info["genotype"], info["space"]))
        net.load_state_dict(info.pop("state_dict"))
    except Exception as error:  # a damaged file can make the unpickler raise anything
        raise InputError(f"cannot read the model {path}: {type(error).__name__}") from error
    return net.to(device).eval(), info


def draw_dha(directory: "RunDirectory", net: SparseSupernet, p: Tensor | None) -> None:
    """curves.png, support.png, policy.png of p (14, 14), and cells.png or layers.png."""
    if Figure is None:
        print("no figures: matplotlib is missing (pip install matplotlib)")
        return
    out, history = directory.out, directory.history
    curves = {
        "loss (nats)": ["loss"],
        "accuracy (%)": ["train_accuracy", "test_accuracy"],
        "learning rate": ["lr"],
        "weight decay": ["wd"],
    }
    draw_curves(out / "curves.png", history, curves)
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

    # What every node kept, epoch by epoch: the operation is the colour, the state that it reads the number
    search = [record for record in history if record["phase"] == "search"]
    if search:
        columns = [sum(record["support"], []) for record in search]  # of (operation, state)
        image = torch.zeros(len(columns[0]), len(search))
        figure = Figure(figsize=(min(6 + 0.5 * len(search), 16), 7), layout="constrained")
        axis = figure.subplots()
        for x, column in enumerate(columns):
            for y, (name, state) in enumerate(column):
                image[y, x] = net.ops.index(name)
                if net.kept > 1:
                    axis.text(x, y, str(state), ha="center", va="center", fontsize=8)
        colors = common.OPERATION_COLORS[1:]
        mesh = axis.imshow(image.numpy(), cmap=ListedColormap(colors), vmin=-0.5, vmax=len(colors) - 0.5, aspect="auto")
        figure.colorbar(mesh, ticks=range(len(colors))).ax.set_yticklabels(net.ops)
        nodes = range(len(net.states))
        axis.set_xticks(range(len(search)), [record["epoch"] for record in search])
        axis.set_yticks([net.kept * k + (net.kept - 1) / 2 for k in nodes], nodes)
        what = "layer" if net.kept == 1 else "node (0-3: normal cell); numbers: the state that is read"
        axis.set(xlabel="epoch", ylabel=what)
        figure.savefig(out / "support.png", dpi=150)


def draw_curves(path: Path, history: list[dict], panels: dict[str, list[str]]) -> None:
    """A panel for each title, with the named numbers of the records over the epochs; dashed: the search ends."""
    figure = Figure(figsize=(4 * len(panels), 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels))
    search_ends = 0.5 + sum(record["phase"] != "train" for record in history)
    for axis, (title, names) in zip(axes, panels.items()):
        for name in names:
            records = [record for record in history if name in record]
            axis.plot([record["epoch"] for record in records], [record[name] for record in records], ".-", label=name)
        axis.axvline(search_ends, color="0.5", linestyle="--")
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
# Around a run: device, data, evaluation, files
# ---------------------------------------------------------------------------------------------------------------------


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


def load_data(args: argparse.Namespace, device: torch.device) -> common.Data:
    """The data set of the flags, on the device. Raises InputError where a network cannot be trained on it."""
    if RANK > 0:
        dist.barrier()  # process 0 may have to download it
    data = common.load_data(
        args.dataset, args.data_dir, args.image_size, args.limit_train, args.limit_test, args.workers, args.seed
    )
    if WORLD > 1 and RANK == 0:
        dist.barrier()

    H, W = data.train_images.shape[-2:]
    if H != W:
        raise InputError(f"images are {W}x{H}: --image-size makes them square")
    if len(data.classes) < 2:
        raise InputError("there is one class only")
    if args.auxiliary_weight and (H < 29 or 64 <= H < 193):  # from 64 on with the ImageNet stem
        raise InputError(f"{H} pixels are too few for the auxiliary head: give --auxiliary-weight 0")
    return data.to(device)


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


def evaluate_run(args: argparse.Namespace, device: torch.device, net: nn.Module, info: dict) -> None:
    """--evaluate: the test accuracy of a finished run's network, on its own data set unless flags name another."""
    args.limit_train = 2  # training images are not needed
    args.auxiliary_weight = 0.0
    data = load_data(args, device)
    if data.classes != info["classes"]:
        raise InputError(f"the data set has other classes than the model, {', '.join(info['classes'][:3])}, ...")
    mean, std = info["mean"].to(device), info["std"].to(device)
    accuracy = evaluate(net, data.test_images, data.test_labels, mean, std)
    print(f"test accuracy: {accuracy:.2f} % of {len(data.test_labels)} images")


def finite_means(means: Tensor, learned: list[Tensor], epoch: int, flags: str) -> list[float]:
    """An epoch's means, over all processes. Ends the program if one of them or of what is learned is not finite."""
    if dist.is_initialized():
        dist.all_reduce(means)
        means = means / dist.get_world_size()
    if not (means.isfinite().all() and all(p.isfinite().all() for p in learned)):
        sys.exit(
            f"error: the loss is not finite in epoch {epoch}: start again with a lower {flags}; "
            "the last good checkpoint is kept"
        )
    return means.tolist()


# Flags that say where a run lies and computes: --resume may change them
PLACES = ("out", "resume", "check", "gpu", "processes", "workers", "data_dir")


def settings_of_run(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Parse argv. With --resume or --evaluate, what argv does not name comes from the run in that directory.

    Writes nothing. Ends the program where --out holds something else, or a flag contradicts the run that
    --resume goes on with.
    """
    script = Path(__file__)
    args = parser.parse_args(argv)
    folder = Path(args.evaluate or args.out or f"runs/{script.stem}-{args.dataset}-seed{args.seed}")
    args.out = str(folder)

    # A new run: its directory must not hold anything else
    if not args.evaluate and not (args.resume and (folder / "config.json").exists()):
        begun = {"metrics.jsonl", script.name, "config.json.part"}  # what a start that was killed may have left
        if folder.exists() and not (folder.is_dir() and {path.name for path in folder.iterdir()} <= begun):
            parser.error(f"{folder} exists: choose another --out, or go on with its run by --resume")
        return args

    try:
        config = json.loads((folder / "config.json").read_text())
        saved = dict(config["args"])
        if config["script"] != script.name:
            parser.error(f"{folder} holds a run of {config['script']}")
    except (OSError, ValueError, TypeError, LookupError) as error:
        parser.error(f"cannot read {folder / 'config.json'}: {type(error).__name__}")

    # argparse fills a given namespace, and leaves what argv does not name
    evaluated = args.evaluate
    args = parser.parse_args(argv, argparse.Namespace(**saved))
    args.out = str(folder)
    args.evaluate = evaluated
    for name, value in saved.items():
        if not evaluated and name not in PLACES and getattr(args, name) != value:
            parser.error(f"{folder} was started with {name} = {value}: leave flags that differ out")
    return args


class RunDirectory:
    """The directory --out, made or gone on with, and locked while the process lives.

    config.json: settings and versions. metrics.jsonl: `history`, one record per epoch. checkpoint.pt: `state`, what
    --resume needs. rank, world: the number of this process and how many there are; only process 0 writes.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device, rank: int = 0, world: int = 1):
        self.out = Path(args.out)
        self.rank = rank
        self.world = world
        self.state = {}
        self.history = []
        self.seconds = {"all": 0.0, "search": 0.0, "gpu": 0.0}
        script = Path(__file__)
        if self.rank == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            self.log = open(self.out / "metrics.jsonl", "a")
            try:
                fcntl.flock(self.log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"another process is writing {self.out}") from None

        # Load the checkpoint
        if (self.out / "checkpoint.pt").exists():
            try:
                self.state = torch.load(self.out / "checkpoint.pt", map_location="cpu", weights_only=True)
                self.history = self.state["history"]
                self.seconds = self.state["seconds"]
            except Exception as error:  # a damaged file can make the unpickler raise anything
                raise InputError(f"cannot read {self.out}/checkpoint.pt: delete {self.out}, start again") from error

        # What the run is, for its reader and for --resume
        if self.rank == 0 and not (self.out / "config.json").exists():
            git = ["git", "-C", str(script.parent), "rev-parse", "HEAD"]
            commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
            config = {
                "script": script.name,
                "args": vars(args),
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
                "python": sys.version,
                "device": str(device),
                "processes": world,
                "git_commit": commit or None,
            }
            (self.out / script.name).write_bytes(script.read_bytes())
            save(self.out / "config.json", config)
        # A killed run's log may lack a line that its checkpoint has
        if self.rank == 0:
            self.log.truncate(0)
            for record in self.history:
                print(json.dumps(record), file=self.log, flush=True)

    def end_epoch(self, record: dict, seconds: float, **state) -> None:
        """Keep an epoch's record, and all that is needed to go on after it."""
        self.history.append(record)
        self.seconds["all"] += seconds
        self.seconds["gpu"] += seconds * self.world
        if record["phase"] != "train":
            self.seconds["search"] += seconds
        if self.rank == 0:
            save(self.out / "checkpoint.pt", {"history": self.history, "seconds": self.seconds, **state})
            print(json.dumps(record), file=self.log, flush=True)

    def costs(self) -> dict:
        """Epochs, seconds and GPU hours so far, for result.json."""
        return {
            "epochs": len(self.history),
            "search_epochs": sum(record["phase"] != "train" for record in self.history),
            "seconds": self.seconds["all"],
            "search_seconds": self.seconds["search"],
            "gpu_hours": self.seconds["gpu"] / 3600,
        }


def save(path: Path, content: dict) -> None:
    """Write a .pt or .json file, whole or not at all: a file that is there is complete."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        if path.suffix == ".pt":
            torch.save(content, file)
        else:
            file.write(json.dumps(content, indent=1).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def main(argv: list[str]) -> None:
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    args = parse_args(argv)
    try:
        join_processes(args)
        device = device_of(args.gpu)
        if args.check:
            data = load_data(args, device)
            common.batches(len(data.train_images), args.batch_size, 0, RANK, WORLD)
            if args.genotype and args.genotype not in common.GENOTYPES:  # a file
                common.load_genotype(args.genotype, args.space)
        elif args.evaluate:
            evaluate_run(args, device, *load_model(Path(args.evaluate) / "model.pt", device))
        else:
            run_dha(args, device)
    except (InputError, OSError, torch.cuda.OutOfMemoryError) as error:  # all else keeps its traceback
        print("error:", *str(error).splitlines()[:1], file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("\nstopped: the same command with --resume goes on after the last epoch")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# ProxylessNAS' space (--space mobilenet), which the paper names and no more
# ---------------------------------------------------------------------------------------------------------------------


def conv_bn_relu6(c_in: int, c_out: int, k: int, stride: int = 1) -> list[nn.Module]:
    return [*common.conv_bn(c_in, c_out, k, stride), nn.ReLU6()]


def mobile_operation(name: str, c_in: int, c_out: int, stride: int) -> nn.Sequential:
    """mbconv<expansion>_<k>x<k> of MobileNetV2 without its shortcut, or skip_connect."""
    if name == "skip_connect":
        return nn.Sequential(nn.Identity())
    expansion, k = int(name[6]), int(name[-1])
    wide = expansion * c_in
    expand = conv_bn_relu6(c_in, wide, 1) if expansion > 1 else []
    depthwise = nn.Conv2d(wide, wide, k, stride, k // 2, groups=wide, bias=False)
    return nn.Sequential(*expand, depthwise, nn.BatchNorm2d(wide), nn.ReLU6(), *common.conv_bn(wide, c_out, 1))


class MobileLayer(nn.Module):
    """A layer with all candidates, of which one runs: x + MBConv(x), or x alone.

    Where stride or width change there is no x. In the supernet it is a cell of one node, number first_node.
    (B, c_in, H, W) to (B, c_out, H/stride, W/stride).
    """

    def __init__(self, first_node: int, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.first_node = first_node
        self.width = c_out
        self.stride = stride
        self.shortcut = stride == 1 and c_in == c_out
        candidates = nn.ModuleDict()
        for name in common.MOBILE_PRIMITIVES:
            if name != "skip_connect" or self.shortcut:
                candidates[f"{name}_0"] = mobile_operation(name, c_in, c_out, stride)
        self.nodes = nn.ModuleList([candidates])

    def forward(self, s0: Tensor, x: Tensor, support: list, strengths: list, drop_path_prob: float) -> Tensor:
        """As SparseCell's; s0 is not read."""
        name, state = support[0][0]
        strength = strengths[0]

        # No batch norm could absorb the strength of a skip-connection: it acts as 1, with the strength's gradient [C]
        if name == "skip_connect":
            return x if strength is None else x * (1 + (strength - strength.detach()))

        o = self.nodes[0][f"{name}_{state}"](x)
        if self.training and drop_path_prob > 0 and self.shortcut:
            o = common.drop_path(o, drop_path_prob)
        if strength is not None:
            o = strength * o
        return x + o if self.shortcut else o


class MobileSupernet(SparseSupernet):
    """SparseSupernet of 5 n + 1 layers, each a node that keeps one of 7 operations.

    channels: the stem's; ProxylessNAS has 32. Where a layer has no shortcut, the next batch norm cancels its strength,
    and its b gets almost no gradient: chance chooses there.
    """

    ops = common.MOBILE_PRIMITIVES
    kept = 1

    def build(self, channels: int, num_classes: int, layers: int, auxiliary: bool, stem: str) -> None:
        """A fixed MBConv, five stages of n layers, and one layer; the widths are ProxylessNAS' at 32 channels."""

        def width(at_32: int) -> int:
            return max(round(at_32 * channels / 32), 1)

        large = stem == "imagenet"
        n = layers // 5
        self.states = [1] * layers
        self.stem = nn.Sequential(*conv_bn_relu6(3, channels, 3, stride=2 if large else 1))
        self.stem1 = mobile_operation("mbconv1_3x3", channels, width(16), 1)
        self.cells = nn.ModuleList()
        c_in = width(16)
        first_stride = 2 if large else 1
        for at_32, stride, count in (
            (24, first_stride, n), (40, 2, n), (80, 2, n), (96, 1, n), (192, 2, n), (320, 1, 1)
        ):  # fmt: skip
            for i in range(count):
                self.cells.append(MobileLayer(len(self.cells), c_in, width(at_32), stride if i == 0 else 1))
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
# Where an operation has a magnitude, 0 is the identity. Ranges are AutoAugment's. The input is never changed;
# the result lies in [0, 1].
# ---------------------------------------------------------------------------------------------------------------------


def per_image(values: Tensor) -> Tensor:
    """(B,) to (B, 1, 1, 1)."""
    return values.view(-1, 1, 1, 1)


def into_range(images: Tensor) -> Tensor:
    """clamp(0, 1), but with gradient 1 at exactly 0 and 1 (torch.clamp: 0 since torch 2.14)."""
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
    """Each pixel shows the input at (x, y), of a shape that expands to (B, H, W). Bilinear; outside is 0."""
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
    """Luma, ITU-R 601-2: (B, 1, H, W)."""
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
    """Invert what is at least as bright as 1 - magnitude."""
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
    scale = torch.full_like(low, 255.0) / (high - low).clamp(min=1)  # 255.0 / x would be rounded otherwise
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

    choice (B,): a number in AUGMENTATIONS; any other leaves the image alone. magnitude (B,) in [-1, 1]; only the
    operations in SIGNED see its sign. Every operation gets the whole batch: to pick the images of one, a GPU would wait
    for the host.
    """
    out = images
    for n, (name, operation) in enumerate(AUGMENTATIONS.items()):
        changed = operation(images, magnitude if name in SIGNED else magnitude.abs())
        out = torch.where(per_image(choice == n), changed, out)
    return out


if __name__ == "__main__":
    main(sys.argv[1:])
