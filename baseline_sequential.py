# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "torchvision>=0.19", "numpy", "pillow", "tqdm", "matplotlib", "scipy"]
# ///
"""The baselines of both papers: the same parts one after the other, as runs that hand files to each other.

    python baseline_sequential.py --method faa-darts --preset quick              # 3 minutes on 2 CPU cores
    python baseline_sequential.py --method dha --dataset cifar10 --gpu 0         # the paper's size
    python baseline_sequential.py --resume --out runs/baseline_sequential-cifar10-seed0
    python baseline_sequential.py --compare runs/*                               # a table of runs of any script

Every part but one is a run of joint_darts_faa.py or dha.py, so that both sides of a comparison share their code
(Faster AutoAugment's policy and operations are copies of those in joint_darts_faa.py):

    faa-darts   1. Faster AutoAugment (here): policy.json      2. joint_darts_faa.py --policy policy.json: DARTS, then
                                                                  training with that policy
    darts       1. joint_darts_faa.py --policy none
    dha         1. dha.py --no-da --no-hpo --train-epochs 0: genotype.json      2. dha.py --genotype genotype.json

faa-darts and darts are "Baseline" and "DARTS" of Kashima et al. (https://arxiv.org/abs/2012.09407), dha is the
"Sequential DHA" of Zhou et al. (https://arxiv.org/abs/2109.05765). Flags that --help does not list are passed on to
these runs.

Faster AutoAugment is Hataya et al., ECCV 2020, https://arxiv.org/abs/1911.06987. A WideResNet-40-2 with two heads, a
critic and a classifier, judges the policy. z (logit of an operation's selection), p (probability that it is then
applied), mu (its magnitude) and Eqs. (1) to (3) are Kashima et al.'s. One iteration, on the two halves of a batch:

    1. augment the second half: each stage of the policy is the weighted sum of 16 operations    Eqs. (1) to (3)
    2. move the network: its critic to score real images (the first half) high and augmented
       ones low, its classifier to classify the first half correctly                             WGAN-GP
    3. augment the second half anew, and move the policy: the critic should score it high, and
       the classifier classify it correctly
"""

import argparse
import fcntl
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torch import Tensor
from tqdm import tqdm

import common
from common import InputError

if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"  # a notebook's backend may be missing here
try:
    from matplotlib.figure import Figure
except (ImportError, ValueError):
    Figure = None  # no figures

# ---------------------------------------------------------------------------------------------------------------------
# Settings. [P]: Kashima et al. [A]: Faster AutoAugment's public code. [C]: our choice, where neither says or we depart.
# ---------------------------------------------------------------------------------------------------------------------


PRESETS = {
    "paper": {},  # the defaults of the flags
    "quick": dict(dataset="shapes", faa_epochs=6, faa_batch_size=64, depth=10, width=1, policy_lr=1e-2),
    "imagenet": dict(dataset="imagenet"),
}


class RunParser(argparse.ArgumentParser):
    """Keeps flags that it does not know in `rest`, for the runs. If there are none, those of `namespace` stay."""

    def parse_args(
        self, args: list[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        namespace, rest = self.parse_known_args(args, namespace)
        namespace.rest = rest or getattr(namespace, "rest", [])
        return namespace


def parse_args(argv: list[str]) -> argparse.Namespace:
    summary = __doc__.split("\n")[0] + " [P] paper, [A] public code, [C] our choice."
    parser = RunParser(
        usage="%(prog)s --method METHOD [flags]",
        description=summary,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
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

    add = parser.add_argument_group("the baseline; flags of its runs can be given too").add_argument
    add("--method", choices=["faa-darts", "darts", "dha"], help="which baseline")
    add("--compare", metavar="DIR", nargs="+", help="print a table of finished runs of any script, and stop")
    add("--processes", type=at_least(1), default=1, help="start the runs under torchrun, with so many processes")

    add = parser.add_argument_group("Faster AutoAugment (the first part of faa-darts)").add_argument
    add("--faa-epochs", type=at_least(1), default=20, help="epochs of policy search [P]")
    add("--faa-images", type=at_least(4), default=4000, help="training images that it sees [A]")
    add("--faa-batch-size", type=at_least(4), default=128, help="images per step, half of them augmented [A]")
    add("--faa-lr", type=at_least(0.0), default=1e-3, help="Adam's learning rate for critic and classifier [A]")
    add("--policy-lr", type=at_least(0.0), default=1e-3, help="Adam's learning rate for z, p and mu [A]")
    add("--sub-policies", type=at_least(1), default=10, help="L, sub-policies of a policy [P]")
    add("--stages", type=at_least(1), default=2, help="K, operations of a sub-policy, one after the other [P]")
    add("--class-weight", type=at_least(0.0), default=0.1, help="weight of the classification losses [A]")
    add("--critic-weight", type=at_least(0.0), default=1.0, help="weight of the critic's losses, penalty included [C]")
    add("--penalty", type=at_least(0.0), default=10.0, help="lambda of WGAN-GP, weight of the gradient penalty [A]")
    add("--depth", type=at_least(10), default=40, help="layers of the WideResNet, 6 n + 4 [P]")
    add("--width", type=at_least(1), default=2, help="its width [P]")

    # --compare needs no settings; else the preset replaces defaults
    given = parser.parse_args(argv)
    if given.compare:
        return given
    parser.set_defaults(**PRESETS[given.preset])
    args = settings_of_run(parser, argv)

    if not args.method:
        parser.error("--method is missing: faa-darts, darts or dha")
    if (args.depth - 4) % 6 or args.faa_batch_size % 2:
        parser.error("--depth must be 6 n + 4 (10, 16, ..., 40), --faa-batch-size even: half of it is augmented")
    handed = ["--policy", "--search-only"]
    if args.method == "dha":
        handed.append("--genotype")
    if any(word.split("=")[0] in handed for word in args.rest):
        parser.error(f"not for this baseline, whose runs hand over what they found: {', '.join(handed)}")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        parser.error("start this without torchrun: --processes N starts its runs under it")
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
# The policy, as in joint_darts_faa.py. Its 16 operations (AUGMENTATIONS, SIGNED) and their helpers (per_image,
# into_range) are at the end.
# ---------------------------------------------------------------------------------------------------------------------


def relaxed_bernoulli(p: Tensor, temperature: float = 0.1) -> Tensor:
    """A differentiable coin for every entry of p, in [0, 1]: near 1 with probability p, else near 0.

    The Gumbel trick for two outcomes (Maddison et al.; Jang et al.). Its gradient is 0 at p = 0 and p = 1.
    """
    p = p.clamp(1e-6, 1 - 1e-6)
    u = torch.rand_like(p).clamp(1e-6, 1 - 1e-6)
    return ((p.logit() + u.logit()) / temperature).sigmoid()


class Policy(nn.Module):
    """An augmentation policy, differentiable. Takes and returns images (B, 3, H, W), float in [0, 1].

    z, p, mu: (L, K, 16) each, so 3 * 16 * K * L parameters: for every sub-policy, stage and operation the logit of
    its selection, the probability that it is applied and its magnitude in [0, 1]; all from U(0, 1) at the start [A].
    eta: temperature of the selection [A]. Every image draws its own sub-policy [C] (Faster AutoAugment: one for a
    chunk of the batch). It also draws the sign of mu for every operation in SIGNED [A].
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
        weights = (self.z[which] / self.eta).softmax(2)  # sigma_eta(z) of Eqs. (2) and (3), (B, K, 16)
        masks = relaxed_bernoulli(self.p[which])  # of Eq. (1), (B, K, 16)
        signs = 1 - 2 * self.signed * torch.randint(2, masks.shape, device=images.device)  # 1 or -1 for SIGNED, else 1
        magnitudes = self.mu[which] * signs  # (B, K, 16)

        # weights[k][n]: (B,), of stage k and operation n. Unbound at once: cheaper to differentiate than indexing
        weights = [stage.unbind(1) for stage in weights.unbind(1)]
        masks = [stage.unbind(1) for stage in masks.unbind(1)]
        magnitudes = [stage.unbind(1) for stage in magnitudes.unbind(1)]

        for k in range(K):
            mixed = torch.zeros_like(images)
            for n, operation in enumerate(AUGMENTATIONS.values()):
                changed = operation(images, magnitudes[k][n])
                maybe = torch.lerp(images, changed, per_image(masks[k][n]))  # Eq. (1)
                mixed = mixed + per_image(weights[k][n]) * maybe  # Eq. (2)
            images = into_range(mixed)  # a mean of images in [0, 1] leaves it by rounding at most
        return images

    @torch.no_grad()
    def clamp(self) -> None:
        """p and mu back into [0, 1], after a step [C].

        A p that reaches 0 or 1 stays there, because the coin of Eq. (1) has no gradient at these values.
        """
        self.p.clamp_(0, 1)
        self.mu.clamp_(0, 1)

    def selection(self) -> Tensor:
        """softmax(z / eta), the probability that an operation is selected: (L, K, 16)."""
        return (self.z.detach() / self.eta).softmax(2)

    def table(self) -> dict:
        """The policy as policy.json has it: the names of the operations, and lists of (L, K, 16) numbers."""
        return {
            "operations": list(AUGMENTATIONS),
            "eta": self.eta,
            "z": self.z.tolist(),
            "p": self.p.tolist(),
            "mu": self.mu.tolist(),
            "selection": self.selection().tolist(),
        }


# ---------------------------------------------------------------------------------------------------------------------
# The network: a WideResNet with a classifier and a critic
# ---------------------------------------------------------------------------------------------------------------------


class WideBlock(nn.Module):
    """Pre-activation residual block: batch norm, ReLU and a 3x3 convolution, twice, and the shortcut.

    The shortcut is the identity, or a 1x1 convolution where sizes change [C].
    """

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.stride = stride
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.shortcut = None
        if c_in != c_out or stride > 1:
            self.shortcut = nn.Conv2d(c_in, c_out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        relu = F.relu(self.bn1(x))
        out = self.conv1(relu)
        out = self.conv2(F.relu(self.bn2(out)))
        if self.shortcut is None:
            return out + x
        return out + self.shortcut(relu[:, :, :: self.stride, :: self.stride])  # see common.FactorizedReduce


class WideResNet(nn.Module):
    """WRN-depth-width with a classifier and a critic on the same features.

    Normalised images (B, 3, H, W) to logits (B, num_classes) and the critic's value (B,), large for real
    images. WRN-40-2 with 10 classes has 2,243,546 parameters, and the critic's head 16,641 more.
    """

    def __init__(self, num_classes: int, depth: int = 40, width: int = 2):
        super().__init__()
        blocks = (depth - 4) // 6  # in each of three groups
        layers = [nn.Conv2d(3, 16, 3, padding=1, bias=False)]
        c_in = 16
        for group in range(3):
            c_out = 16 * width * 2**group
            for k in range(blocks):
                layers.append(WideBlock(c_in, c_out, stride=2 if group > 0 and k == 0 else 1))
                c_in = c_out
        self.features = nn.Sequential(*layers, nn.BatchNorm2d(c_in), nn.ReLU())
        self.classifier = nn.Linear(c_in, num_classes)
        self.critic = nn.Sequential(nn.Linear(c_in, c_in), nn.ReLU(), nn.Linear(c_in, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(x).mean((2, 3))
        return self.classifier(features), self.critic(features).squeeze(1)


# ---------------------------------------------------------------------------------------------------------------------
# Faster AutoAugment: a step of critic and classifier, then a step of the policy
# ---------------------------------------------------------------------------------------------------------------------


def gradient_penalty(critic: Callable, real: Tensor, augmented: Tensor, share: Tensor) -> Tensor:
    """WGAN-GP's penalty (Gulrajani et al.): the mean of (|d critic / d x| - 1)^2, at x between real and augmented.

    x is share * real + (1 - share) * augmented, (B, 3, H, W); share: (B,) in [0, 1]; critic: images to values (B,).
    Differentiable in the critic's parameters. The norm is over a whole image, as Gulrajani et al. have it [C]; Faster
    AutoAugment's code takes one per pixel. Batch norm links the images: this is the gradient of the sum of all values,
    not of an image's own value alone.
    """
    share = share.view(-1, 1, 1, 1)
    x = (share * real + (1 - share) * augmented).detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return ((gradient.flatten(1).norm(dim=1) - 1) ** 2).mean()


class PolicySearch:
    """What Faster AutoAugment learns: a network with two heads, and the policy; and their optimizers."""

    def __init__(self, args: argparse.Namespace, data: common.Data, device: torch.device):
        self.net = WideResNet(len(data.classes), args.depth, args.width)
        self.net.to(device, memory_format=torch.channels_last)
        self.policy = Policy(args.sub_policies, args.stages).to(device)
        self.net_optimizer = torch.optim.Adam(self.net.parameters(), args.faa_lr, betas=(0.0, 0.999))
        self.policy_optimizer = torch.optim.Adam(self.policy.parameters(), args.policy_lr, betas=(0.0, 0.999))
        self.parts = {  # for the checkpoint
            "net": self.net,
            "policy": self.policy,
            "net_optimizer": self.net_optimizer,
            "policy_optimizer": self.policy_optimizer,
        }
        mean, std = common.mean_std(data.train_images)
        self.mean = mean.to(device)
        self.std = std.to(device)

    def augmented(self, images: Tensor) -> Tensor:
        """Images float in [0, 1] through the policy, normalised."""
        return common.normalize(self.policy(images), self.mean, self.std)

    def state_dict(self) -> dict:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


def critic_step(s: PolicySearch, real: Tensor, labels: Tensor, source: Tensor, args: argparse.Namespace) -> Tensor:
    """Move the network (features, critic, classifier): score `real` above the augmented `source`, and classify `real`.

    real, source: float (B, 3, H, W) in [0, 1]. Returns critic(real) - critic(augmented), the penalty, the
    classification loss and the accuracy in %: (4,).
    """
    s.net.requires_grad_(True)
    real = common.normalize(real, s.mean, s.std)
    with torch.no_grad():
        augmented = s.augmented(source)

    # The critic's loss, and the classifier's
    logits, real_value = s.net(real)
    _, augmented_value = s.net(augmented)
    distance = real_value.mean() - augmented_value.mean()
    share = torch.rand(len(real), device=real.device)
    penalty = gradient_penalty(lambda x: s.net(x)[1], real, augmented, share)
    critic_loss = args.penalty * penalty - distance  # Gulrajani et al.: E[D(fake)] - E[D(real)] + penalty
    class_loss = F.cross_entropy(logits, labels)

    s.net_optimizer.zero_grad()
    (args.critic_weight * critic_loss + args.class_weight * class_loss).backward()
    s.net_optimizer.step()
    accuracy = 100 * (logits.argmax(1) == labels).float().mean()
    return torch.stack([distance, penalty, class_loss, accuracy]).detach()


def policy_step(s: PolicySearch, images: Tensor, labels: Tensor, args: argparse.Namespace) -> Tensor:
    """Move z, p and mu: the critic should score augmented `images` high, and the classifier classify them.

    images: float (B, 3, H, W) in [0, 1]. Returns the policy's critic loss, its classification loss and the accuracy on
    augmented images in %: (3,).
    """
    s.net.requires_grad_(False)
    logits, value = s.net(s.augmented(images))
    critic_loss = -value.mean()  # a generator's: -E[D(fake)]
    class_loss = F.cross_entropy(logits, labels)

    s.policy_optimizer.zero_grad()
    (args.critic_weight * critic_loss + args.class_weight * class_loss).backward()
    s.policy_optimizer.step()
    s.policy.clamp()
    accuracy = 100 * (logits.argmax(1) == labels).float().mean()
    return torch.stack([critic_loss, class_loss, accuracy]).detach()


MEASURED = (  # what the two steps return
    "distance",
    "penalty",
    "class_loss",
    "accuracy",
    "policy_critic_loss",
    "policy_class_loss",
    "policy_accuracy",
)


def search_policy(
    args: argparse.Namespace, data: common.Data, device: torch.device, directory: "RunDirectory"
) -> Policy:
    """Faster AutoAugment for --faa-epochs epochs on --faa-images training images; goes on after the last checkpoint."""
    torch.manual_seed(args.seed)
    s = PolicySearch(args, data, device)
    history = directory.history  # a record per epoch
    if history:
        s.load_state_dict(directory.state["search"])

    shuffled = torch.randperm(len(data.train_images), generator=torch.Generator().manual_seed(args.seed)).to(device)
    chosen = shuffled[: args.faa_images]
    batch_size = min(args.faa_batch_size, len(chosen) // 2 * 2)  # even: half of a batch is augmented
    for epoch in range(len(history), args.faa_epochs):
        begun = time.time()
        s.net.train()

        # One seed per epoch: a resumed run goes on as if it had never stopped
        seed = 100_003 * args.seed + epoch
        torch.manual_seed(1_009 * seed)
        order = chosen[common.batches(len(chosen), batch_size, seed).to(device)]
        batches = common.loader(data.train_images, data.train_labels, order, train=True)
        totals = torch.zeros(len(MEASURED), device=device)
        for images, labels in tqdm(batches, f"policy {epoch + 1}", len(order), leave=False, disable=None):
            real, source = (images / 255).chunk(2)
            real_labels, source_labels = labels.chunk(2)
            measured = critic_step(s, real, real_labels, source, args)
            totals += torch.cat([measured, policy_step(s, source, source_labels, args)])

        means = totals / len(order)
        learned = [*s.net.parameters(), *s.policy.parameters()]
        if not (means.isfinite().all() and all(p.isfinite().all() for p in learned)):
            sys.exit(
                f"error: the loss is not finite in epoch {epoch + 1}: start again with a lower --faa-lr or "
                "--policy-lr; the last good checkpoint is kept"
            )
        record = {"epoch": epoch + 1, "phase": "policy", **dict(zip(MEASURED, means.tolist()))}
        record["selection"] = dict(zip(AUGMENTATIONS, s.policy.selection().mean((0, 1)).tolist()))
        print(
            f"epoch {epoch + 1}  policy  distance {record['distance']:.2f}  penalty {record['penalty']:.2f}  "
            f"real {record['accuracy']:.1f} %  augmented {record['policy_accuracy']:.1f} %"
        )
        directory.end_epoch(record, time.time() - begun, search=s.state_dict())
    return s.policy


# ---------------------------------------------------------------------------------------------------------------------
# The runs
# ---------------------------------------------------------------------------------------------------------------------


def commands(args: argparse.Namespace, handed_files: bool = True) -> dict[str, list[str]]:
    """The runs of the other scripts, {folder in --out: [script, flags, ...]}. (Faster AutoAugment runs in this one.)

    handed_files: False puts something in place of files that do not exist yet, to check flags.
    """
    here = Path(__file__).parent
    out = Path(args.out)
    flags = [*args.rest, "--resume"]  # a run that is finished returns at once
    if args.amp:
        flags.append("--amp")
    for name in ("preset", "dataset", "data_dir", "image_size", "limit_train", "limit_test", "workers", "seed", "gpu"):
        value = getattr(args, name)
        if value is not None:
            flags += ["--" + name.replace("_", "-"), str(value)]

    # What each run is told, and what an earlier part hands to it
    if args.method == "dha":
        script = "dha.py"
        own = {"search": ["--no-da", "--no-hpo", "--train-epochs", "0"], "train": []}
        genotype = str(out / "search" / "genotype.json") if handed_files else "DARTS_V2"
        handed = {"search": [], "train": ["--genotype", genotype]}
    else:
        script = "joint_darts_faa.py"
        own = {"darts": []}
        policy = str(out / "policy.json") if args.method == "faa-darts" and handed_files else "none"
        handed = {"darts": ["--policy", policy]}

    found = {}
    for name in own:
        command = [str(here / script), *flags, *own[name], "--out", str(out / name)]
        if not (out / name / "config.json").exists():  # a run that has begun has a copy, and may have been moved
            command += handed[name]
        found[name] = command
    return found


def run_baseline(args: argparse.Namespace, device: torch.device) -> None:
    """All parts, one after the other. --out has a folder for each run of a script, and copies of the last results."""
    out = Path(args.out)
    if (out / "result.json").exists():
        print(f"{out} is finished already:", (out / "result.json").read_text())
        return

    launch = [sys.executable]
    if args.processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.processes}"]

    # A wrong flag of a later run is found before the first part starts
    if not (out / "config.json").exists():
        for command in commands(args, handed_files=False).values():
            subprocess.run([*launch, *command, "--check"], check=True)
    if args.check:
        return

    directory = RunDirectory(args, device)
    if args.method == "faa-darts" and not (out / "policy.json").exists():
        data = common.load_data(
            args.dataset, args.data_dir, args.image_size, args.limit_train, args.limit_test, args.workers, args.seed
        )
        policy = search_policy(args, data.to(device), device, directory)
        draw_search(directory)
        save(out / "policy.json", policy.table())  # handed to joint_darts_faa.py
        del data, policy
        torch.cuda.empty_cache()  # the runs are other processes

    results = []
    for name, command in commands(args).items():
        print(f"\n{name}: {' '.join(command)}", flush=True)
        subprocess.run([*launch, *command], check=True)
        results.append(json.loads((out / name / "result.json").read_text()))

        for line in (out / name / "metrics.jsonl").read_text().splitlines():
            print(json.dumps({"stage": name, **json.loads(line)}), file=directory.log, flush=True)
        for file in ("genotype.json", "policy.json", "model.pt"):
            if (out / name / file).exists():
                shutil.copyfile(out / name / file, out / file)

    # What the last run found; costs of all
    methods = {"faa-darts": "Faster AA, then DARTS", "darts": "DARTS", "dha": "Sequential DHA"}
    costs = directory.costs()
    for name in costs:
        costs[name] += sum(result[name] for result in results)
    result = {**results[-1], "method": methods[args.method], **costs}
    save(out / "result.json", result)
    print(json.dumps(result, indent=1))


def draw_search(directory: "RunDirectory") -> None:
    """curves.png of the policy search."""
    if Figure is None:
        print("no figures: matplotlib is missing (pip install matplotlib)")
        return
    curves = {
        "critic": ["distance", "policy_critic_loss"],
        "penalty": ["penalty"],
        "class loss (nats)": ["class_loss", "policy_class_loss"],
        "accuracy (%)": ["accuracy", "policy_accuracy"],
    }
    draw_curves(directory.out / "curves.png", directory.history, curves)


# ---------------------------------------------------------------------------------------------------------------------
# --compare
# ---------------------------------------------------------------------------------------------------------------------


def compare(folders: list[str]) -> str:
    """A Markdown table of finished runs: mean ± standard deviation over seeds.

    One row per data set, method and settings; settings that differ between the rows of a method are named. Raises
    InputError where there is no finished run.
    """
    not_settings = {"seed", "out", "resume", "check", "evaluate", "compare", "gpu", "workers", "processes"}
    rows = {}  # (data set, method, settings): results
    for folder in sorted({Path(folder).resolve() for folder in folders}):
        if not (folder / "result.json").exists():
            print(f"note: {folder.name} is not a finished run")
            continue
        try:
            result = json.loads((folder / "result.json").read_text())
            args = json.loads((folder / "config.json").read_text())["args"]
            numbers = [float(result[name]) for name in ("params", "search_seconds", "gpu_hours")]
            accuracy = float(result["test_accuracy"]) if "test_accuracy" in result else None
            if result["dataset"] != "folder":
                args.pop("data_dir", None)  # its place does not matter
            if "rest" not in args:  # the other settings show the preset, but not that of a baseline's runs
                args.pop("preset", None)
            settings = tuple((name, str(value)) for name, value in sorted(args.items()) if name not in not_settings)
            key = (result["dataset"], result["method"], settings)
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise InputError(f"cannot use {folder}: {type(error).__name__}: {error}") from error
        if accuracy is None:
            print(f"note: {folder.name} was a search only")
            continue
        rows.setdefault(key, []).append([accuracy, *numbers])
    if not rows:
        raise InputError("there is no finished run with a test accuracy")

    lines = [
        "| method | data set | seeds | accuracy (%) | parameters | search (h) | GPU hours | settings |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (dataset, method, settings), results in sorted(rows.items()):
        others = [set(key[2]) for key in rows if key[:2] == (dataset, method)]
        shared = set.intersection(*others)  # these are not shown
        differing = [f"{name} {value}" for name, value in settings if (name, value) not in shared]
        accuracies, params, search, hours = zip(*results)
        score = f"{mean(accuracies):.2f}"
        if len(accuracies) > 1:
            score += f" ± {stdev(accuracies):.2f}"
        size = f"{mean(params) / 1e6:.3g} M"
        cost = f"{mean(search) / 3600:.2f} | {mean(hours):.2f}"
        lines.append(f"| {method} | {dataset} | {len(results)} | {score} | {size} | {cost} | {', '.join(differing)} |")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Around a run: device, files, figures
# ---------------------------------------------------------------------------------------------------------------------


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
    try:
        args = parse_args(argv)
        if args.compare:
            print(compare(args.compare))
        elif args.evaluate:  # by the program that trained the network, in the folder of the last run
            name, command = list(commands(args, handed_files=False).items())[-1]
            folder = str(Path(args.evaluate) / name)
            subprocess.run([sys.executable, *command, "--evaluate", folder], check=True)
        else:
            run_baseline(args, device_of(args.gpu))
    except (InputError, OSError, torch.cuda.OutOfMemoryError) as error:  # all else keeps its traceback
        print("error:", *str(error).splitlines()[:1], file=sys.stderr)
        sys.exit(2)
    except subprocess.CalledProcessError as error:  # the run has said why
        sys.exit(max(error.returncode, 1))
    except KeyboardInterrupt:
        sys.exit("\nstopped: the same command with --resume goes on after the last epoch")


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


def horizontal_flip(images: Tensor, magnitude: Tensor) -> Tensor:
    return images.flip(3)


def invert(images: Tensor, magnitude: Tensor) -> Tensor:
    return 1 - images


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


def sample_pairing(images: Tensor, magnitude: Tensor) -> Tensor:
    """Mix in up to 0.4 of the next image of the batch [C]; batches are in random order."""
    return torch.lerp(images, images.roll(-1, 0), 0.4 * per_image(magnitude))


# Gradients where there are none (straight-through estimators, Faster AutoAugment)


def identity_gradient(operation):
    """The operation, with the gradient of the identity for the images and none for the magnitude."""

    def with_gradient(images: Tensor, magnitude: Tensor) -> Tensor:
        return operation(images, magnitude).detach() + (images - images.detach())

    return with_gradient


def falling_gradient(operation):
    """The operation, with the gradient -1 for the magnitude.

    Faster AutoAugment's gradient is +1 for Solarize's threshold and Posterize's bits [A]. Both are larger where our
    magnitude is smaller: hence -1.
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
    "Solarize": falling_gradient(solarize),
    "Posterize": falling_gradient(identity_gradient(posterize)),
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


if __name__ == "__main__":
    main(sys.argv[1:])
