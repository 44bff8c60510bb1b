# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "torchvision>=0.19", "numpy", "pillow", "tqdm", "matplotlib", "scipy"]
# ///
"""The baselines of both papers: the same parts one after the other.

    python baseline_sequential.py --method faa-darts --preset quick              # minutes on 2 CPU cores
    python baseline_sequential.py --method dha --dataset cifar10 --gpu 0         # the paper's size
    python baseline_sequential.py --resume --out runs/baseline_sequential-cifar10-seed0
    python baseline_sequential.py --compare runs/*                               # a table of runs of any script

This file holds Faster AutoAugment alone. All else are ordinary runs of joint_darts_faa.py and dha.py, in folders of
--out, so that both sides of a comparison share their code:

    faa-darts   Faster AutoAugment finds policy.json. Then joint_darts_faa.py --policy policy.json: DARTS, without a
                policy, finds cells, and their network is trained from scratch with that policy
    darts       joint_darts_faa.py --policy none
    dha         dha.py --no-da --no-hpo --train-epochs 0 finds genotype.json, the architecture alone. Then dha.py
                --genotype genotype.json trains it from scratch, and learns policy, lr and wd meanwhile

faa-darts and darts are "Baseline" and "DARTS" of Kashima et al. (https://arxiv.org/abs/2012.09407), dha is the
"Sequential DHA" of Zhou et al. (https://arxiv.org/abs/2109.05765). Flags that --help does not list go to these runs.

Faster AutoAugment is Hataya et al., ECCV 2020, https://arxiv.org/abs/1911.06987. A WideResNet-40-2 with two heads, a
critic and a classifier, judges the policy, which is that of joint_darts_faa.py: z, p, mu and Eqs. (1) to (3) of
Kashima et al. One iteration, on the two halves of a batch, all images cropped and flipped:

    1. augment the second half: each stage of the policy is the weighted sum of 16 operations    Eqs. (1) to (3)
    2. move the network: its critic to score real images (the first half) high and augmented
       ones low, its classifier to classify the first half correctly                             WGAN-GP
    3. augment the second half anew, and move the policy: the critic should score it high, and
       the classifier classify it correctly

Marks: [P] Kashima et al. say so. [A] Faster AutoAugment's public code does, https://github.com/moskomule/dda, branch
fasteraa. [C] our choice, where neither says or we depart.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"  # the environment may name a backend that is not installed

import common
import dha
import joint_darts_faa
from common import InputError
from joint_darts_faa import AUGMENTATIONS, PLACES, QUIET, RANK, WORLD, Policy, at_least, average_gradients

# ---------------------------------------------------------------------------------------------------------------------
# The network: a WideResNet with a classifier and a critic
# ---------------------------------------------------------------------------------------------------------------------


class WideBlock(nn.Module):
    """Pre-activation residual block: batch norm, ReLU and a 3x3 convolution, twice, and the shortcut.

    The shortcut is the identity, or a 1x1 convolution where the number of channels changes.
    """

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.stride = stride
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.shortcut = None
        if c_in != c_out:
            self.shortcut = nn.Conv2d(c_in, c_out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        h = self.conv1(activated)
        h = self.conv2(F.relu(self.bn2(h)))
        if self.shortcut is None:
            return h + x
        # The stride by slicing, for the reason that common.FactorizedReduce gives
        return h + self.shortcut(activated[:, :, :: self.stride, :: self.stride])


class WideResNet(nn.Module):
    """WRN-depth-width with a classifier and a critic on the same features.

    Images (B, 3, H, W) in [-1, 1] to logits (B, num_classes) and the critic's value (B,), large for real images.
    WRN-40-2 with 10 classes has 2,243,546 parameters, and the critic's head 16,641 more.
    """

    def __init__(self, num_classes: int, depth: int = 40, width: int = 2):
        super().__init__()
        blocks = (depth - 4) // 6  # in each of three groups
        layers = [nn.Conv2d(3, 16, 3, padding=1, bias=False)]
        c_in = 16
        for group in range(3):
            c_out = 16 * width * 2**group
            for block in range(blocks):
                layers.append(WideBlock(c_in, c_out, stride=2 if group > 0 and block == 0 else 1))
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


def gradient_penalty(critic: Callable, real: Tensor, augmented: Tensor, share: Tensor, norm: str = "pixel") -> Tensor:
    """WGAN-GP's penalty (Gulrajani et al.): the mean of (|d critic / d x| - 1)^2, at x between real and augmented.

    x is share * real + (1 - share) * augmented, (B, 3, H, W); share: (B,) in [0, 1]; critic: images to values (B,).
    Differentiable in the critic's parameters. norm: "pixel", one norm per pixel, over its channels [A]; or "image", one
    per image, as Gulrajani et al. have it. In training a batch norm lets the value of an image depend on the other
    images of the batch; what is taken here is the gradient of the sum of all values.
    """
    share = share.view(-1, 1, 1, 1)
    x = (share * real + (1 - share) * augmented).detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    if norm == "image":
        gradient = gradient.flatten(1)
    return ((gradient.norm(dim=1) - 1) ** 2).mean()


class PolicySearch:
    """What Faster AutoAugment learns: a network with two heads, and the policy; and their optimizers."""

    def __init__(self, args: argparse.Namespace, num_classes: int, device: torch.device):
        self.net = WideResNet(num_classes, args.depth, args.width)
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

    def state_dict(self) -> dict:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, saved: dict) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])


def critic_step(s: PolicySearch, real: Tensor, labels: Tensor, source: Tensor, args: argparse.Namespace) -> Tensor:
    """Move the network (features, critic, classifier): score `real` above the augmented `source`, and classify `real`.

    real, source: float (B, 3, H, W) in [0, 1]. Returns critic(real) - critic(augmented), the penalty, the
    classification loss and the accuracy in %: (4,).
    """
    s.net.requires_grad_(True)
    with torch.no_grad():
        augmented = 2 * s.policy(source) - 1  # the network's images lie in [-1, 1] [A]
    real = 2 * real - 1

    # The critic's loss, and the classifier's
    logits, real_value = s.net(real)
    _, augmented_value = s.net(augmented)
    distance = real_value.mean() - augmented_value.mean()
    share = torch.rand(len(real), device=real.device)
    penalty = gradient_penalty(lambda x: s.net(x)[1], real, augmented, share, args.penalty_norm)
    critic_loss = args.penalty * penalty - distance  # Gulrajani et al.: E[D(fake)] - E[D(real)] + penalty
    class_loss = F.cross_entropy(logits, labels)

    s.net_optimizer.zero_grad()
    (args.critic_weight * critic_loss + args.class_weight * class_loss).backward()
    average_gradients(list(s.net.parameters()))
    s.net_optimizer.step()
    accuracy = 100 * (logits.argmax(1) == labels).float().mean()
    return torch.stack([distance, penalty, class_loss, accuracy]).detach()


def policy_step(s: PolicySearch, images: Tensor, labels: Tensor, args: argparse.Namespace) -> Tensor:
    """Move z, p and mu: the critic should score augmented `images` high, and the classifier classify them.

    images: float (B, 3, H, W) in [0, 1]. Returns the policy's critic loss, its classification loss and the accuracy on
    augmented images in %: (3,).
    """
    s.net.requires_grad_(False)
    logits, value = s.net(2 * s.policy(images) - 1)
    critic_loss = -value.mean()  # a generator's: -E[D(fake)]
    class_loss = F.cross_entropy(logits, labels)

    s.policy_optimizer.zero_grad()
    (args.critic_weight * critic_loss + args.class_weight * class_loss).backward()
    average_gradients(list(s.policy.parameters()))
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


def faa_batch_size(args: argparse.Namespace, count: int) -> int:
    """At most --faa-batch-size of `count` images, rounded down so that every process gets two equal halves."""
    halves = 2 * WORLD
    return min(args.faa_batch_size, args.faa_images, count) // halves * halves


def search_policy(
    args: argparse.Namespace, data: common.Data, device: torch.device, history: list[dict], saved: dict | None
) -> Policy:
    """Faster AutoAugment for --faa-epochs epochs, or the rest of them, on --faa-images training images.

    history: a record per finished epoch. saved: the state of the search after them.
    """
    torch.manual_seed(args.seed)
    s = PolicySearch(args, len(data.classes), device)
    if saved:
        s.load_state_dict(saved)

    shuffled = torch.randperm(len(data.train_images), generator=torch.Generator().manual_seed(args.seed)).to(device)
    chosen = shuffled[: args.faa_images]
    batch_size = faa_batch_size(args, len(chosen))
    for epoch in range(len(history), args.faa_epochs):
        started = time.perf_counter()
        s.net.train()

        # One seed per epoch, as in the other scripts
        seed = 100_003 * args.seed + epoch
        torch.manual_seed(1_009 * seed + RANK)
        order = chosen[common.batch_indices(len(chosen), batch_size, seed, RANK, WORLD).to(device)]
        batches = common.loader(data.train_images, data.train_labels, order, train=True)
        totals = torch.zeros(len(MEASURED), device=device)
        for images, labels in tqdm(batches, f"policy {epoch + 1}", len(order), leave=False, disable=QUIET):
            real, source = (images / 255).chunk(2)
            real_labels, source_labels = labels.chunk(2)
            measured = critic_step(s, real, real_labels, source, args)
            totals += torch.cat([measured, policy_step(s, source, source_labels, args)])

        learned = [*s.net.parameters(), *s.policy.parameters()]
        means = joint_darts_faa.finite_means(totals / len(order), learned, epoch + 1, "--faa-lr or --policy-lr")
        record = {
            "epoch": epoch + 1,
            "phase": "policy",
            **dict(zip(MEASURED, means)),
            "selection": dict(zip(AUGMENTATIONS, s.policy.selection().mean((0, 1)).tolist())),
            "seconds": time.perf_counter() - started,
            "gpus": WORLD if device.type == "cuda" else 0,
        }
        print(
            f"epoch {epoch + 1}  policy  distance {record['distance']:.2f}  penalty {record['penalty']:.2f}  "
            f"real {record['accuracy']:.1f} %  augmented {record['policy_accuracy']:.1f} %"
        )
        history.append(record)
        joint_darts_faa.save_epoch(Path(args.out), history, search=s.state_dict())
    return s.policy


# ---------------------------------------------------------------------------------------------------------------------
# One after the other
# ---------------------------------------------------------------------------------------------------------------------


def parts(args: argparse.Namespace, rest: list[str]) -> dict[str, argparse.Namespace]:
    """The flags of the runs of the methods, {folder in --out: flags}. The methods themselves refuse wrong ones.

    args.rest: the flags for them that the run was started with. rest: those of this command, which may only agree.
    """
    out = Path(args.out)
    flags = ["--preset", args.preset, "--dataset", args.dataset, "--seed", str(args.seed), *args.rest]
    if rest != args.rest:
        flags += rest
    if args.resume:
        flags.append("--resume")

    def parse(method, folder: str, own: list[str], handed: list[str]) -> argparse.Namespace:
        if args.resume and (out / folder / "config.json").exists():
            handed = []  # it knows; and --out may have been moved since
        return method.parse_args([*flags, *own, *handed, "--out", str(out / folder)])

    if args.method == "dha":
        genotype = str(out / "search" / "genotype.json")
        search = parse(dha, "search", ["--no-da", "--no-hpo", "--train-epochs", "0"], [])
        train = parse(dha, "train", [], ["--genotype", genotype])
        train.genotype = genotype
        return {"search": search, "train": train}
    policy = "none" if args.method == "darts" else str(out / "policy.json")
    darts = parse(joint_darts_faa, "darts", [], ["--policy", policy])
    darts.policy = policy
    return {"darts": darts}


def run_baseline(args: argparse.Namespace, device: torch.device) -> None:
    """All parts, one after the other. A part that is finished returns at once; one that was stopped goes on."""
    out = Path(args.out)
    if (out / "result.json").exists():
        print(f"{out} is finished already:", (out / "result.json").read_text())
        return

    # What is wrong with the data or with a file is found here, before anything is written
    if args.method == "dha":
        dha.prepare_dha(args.parts["search"], device)
    else:
        data, _ = joint_darts_faa.prepare_joint(args.parts["darts"], device)
    if args.method == "faa-darts":
        count = len(data.train_images)
        common.batch_indices(count, faa_batch_size(args, count), 0, RANK, WORLD)

    with joint_darts_faa.locked(out):
        history, checkpoint = keep_flags(args, device)
        if args.method == "faa-darts" and not (out / "policy.json").exists():
            print(f"\npolicy: {args.dataset}, {data.describe()}")
            policy = search_policy(args, data, device, history, checkpoint.get("search"))
            if RANK == 0:
                draw_search(out, history)
                joint_darts_faa.save(out / "policy.json", policy.as_dict())

        # A run begins with a barrier: by then process 0 has written what the one before it found
        for folder, part in args.parts.items():
            print(f"\n{folder}: {part.out}")
            if args.method == "dha":
                dha.run_dha(part, device)
            else:
                joint_darts_faa.run_joint(part, device)
        if RANK == 0:
            save_baseline(args, history)


def keep_flags(args: argparse.Namespace, device: torch.device) -> tuple[list[dict], dict]:
    """Make the run directories, each with its flags. Returns what open_run does for that of the whole."""
    own = {name: value for name, value in vars(args).items() if name != "parts"}
    opened = joint_darts_faa.open_run(argparse.Namespace(**own), device, __file__)
    method = dha if args.method == "dha" else joint_darts_faa
    for part in args.parts.values():
        if RANK == 0:
            Path(part.out).mkdir(exist_ok=True)
        method.open_run(part, device, method.__file__)
    return opened


def save_baseline(args: argparse.Namespace, history: list[dict]) -> None:
    """Copy what the parts found to --out; metrics.jsonl and the costs are those of all parts."""
    out = Path(args.out)
    total = joint_darts_faa.costs(history)
    records = list(history)
    for folder in args.parts:
        result = json.loads((out / folder / "result.json").read_text())
        for name in total:
            total[name] += result[name]
        for line in (out / folder / "metrics.jsonl").read_text().splitlines():
            records.append({"stage": folder, **json.loads(line)})
        for file in ("genotype.json", "policy.json", "model.pt"):
            if (out / folder / file).exists():
                shutil.copyfile(out / folder / file, out / file)
    joint_darts_faa.save(out / "metrics.jsonl", records)

    methods = {"faa-darts": "Faster AA, then DARTS", "darts": "DARTS", "dha": "Sequential DHA"}
    result.update(method=methods[args.method], **total)
    joint_darts_faa.save(out / "result.json", result)
    print(json.dumps(result, indent=1))


def draw_search(out: Path, history: list[dict]) -> None:
    """curves.png of the policy search."""
    if joint_darts_faa.Figure is None:
        return  # the parts will say so
    panels = {
        "critic": ["distance", "policy_critic_loss"],
        "penalty": ["penalty"],
        "class loss (nats)": ["class_loss", "policy_class_loss"],
        "accuracy (%)": ["accuracy", "policy_accuracy"],
    }
    joint_darts_faa.draw_curves(out / "curves.png", history, panels)


# ---------------------------------------------------------------------------------------------------------------------
# --compare
# ---------------------------------------------------------------------------------------------------------------------


def compare(folders: list[str]) -> str:
    """A Markdown table of finished runs, mean ± standard deviation over seeds: a row per data set, method and settings.

    Settings that differ between the rows of a method are named. Raises InputError where there is no finished run.
    """
    rows = {}  # (data set, method, settings): results
    for folder in sorted({Path(folder).resolve() for folder in folders}):
        try:
            result = json.loads((folder / "result.json").read_text())
            settings = json.loads((folder / "config.json").read_text())["args"]
            names = ("test_accuracy", "params", "search_seconds", "gpu_hours", "seed")
            numbers = [float(result[name]) for name in names]

            # A baseline's settings are those of its last part, but for what it was handed. Faster AA has its own, too
            own = settings if settings.get("method") == "faa-darts" else {}
            for part, handed in {"darts": "policy", "train": "genotype"}.items():
                file = folder / part / "config.json"
                if file.exists():
                    settings = {**json.loads(file.read_text())["args"], **own}
                    if settings[handed] != "none":
                        del settings[handed]

            # Places and the seed are no settings (but --amp is one: it changes results), and the preset and `rest` only
            # set other flags
            hidden = {*PLACES, "seed", "compare", "preset", "rest"} - {"amp"}
            if result["dataset"] == "folder":
                hidden.remove("data_dir")
            shown = [(name, str(value)) for name, value in settings.items() if name not in hidden]
            rows.setdefault((result["dataset"], result["method"], tuple(sorted(shown))), []).append(numbers)
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            print(f"note: {folder} is left out, it is no finished run with a network ({type(error).__name__}: {error})")
    if not rows:
        raise InputError("there is no finished run with a test accuracy")

    lines = [
        "| method | data set | seeds | accuracy (%) | parameters | search (h) | GPU hours | settings |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (dataset, method, settings), results in sorted(rows.items()):
        shared = set.intersection(*[set(key[2]) for key in rows if key[:2] == (dataset, method)])
        differing = [f"{name} {value}" for name, value in settings if (name, value) not in shared]
        accuracies, params, search, hours, seeds = zip(*results)
        if len(set(seeds)) < len(seeds):
            print(f"note: {method} on {dataset} has a seed more than once")
        score = f"{mean(accuracies):.2f}"
        if len(accuracies) > 1:
            score += f" ± {stdev(accuracies):.2f}"
        cost = f"{mean(params) / 1e6:.3g} M | {mean(search) / 3600:.2f} | {mean(hours):.2f}"
        lines.append(f"| {method} | {dataset} | {len(set(seeds))} | {score} | {cost} | {', '.join(differing)} |")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------------------------------

PRESETS = {
    "paper": {},  # the defaults of the flags
    "quick": dict(dataset="shapes", faa_epochs=6, faa_batch_size=64, depth=10, width=1, policy_lr=1e-2),
    "imagenet": dict(dataset="imagenet"),
}


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The flags, and in `parts` those of the runs of the methods, {folder in --out: flags}; `rest`: given for them."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s --method METHOD [flags, also of the scripts that it runs]",
        description=__doc__.split("\n")[0] + " [P] paper, [A] public code, [C] our choice.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )

    add = parser.add_argument_group("what to run, on what").add_argument
    add("--method", choices=["faa-darts", "darts", "dha"], help="which baseline")
    add("--compare", metavar="DIR", nargs="+", help="print a table of finished runs of any script, and stop")
    add("--preset", choices=list(PRESETS), default="paper", help="sets the flags that are not given")
    add("--dataset", choices=common.DATASETS, default="cifar10", help="data set")
    add("--seed", type=at_least(0, 2**31), default=0, help="seed of everything random")
    add("--out", type=os.path.expanduser, help="run directory; None is runs/<script>-<dataset>-seed<seed>")
    add("--resume", action="store_true", help="go on with the run in --out, if there is one")

    add = parser.add_argument_group("Faster AutoAugment (the first part of faa-darts)").add_argument
    add("--faa-epochs", type=at_least(1), default=20, help="epochs of policy search [P]")
    add("--faa-images", type=at_least(4), default=4000, help="training images that it sees [A]")
    add("--faa-batch-size", type=at_least(4), default=128, help="images per step, half of them augmented [A]")
    add("--faa-lr", type=at_least(0.0), default=1e-3, help="Adam's learning rate for critic and classifier [A]")
    add("--policy-lr", type=at_least(0.0), default=1e-3, help="Adam's learning rate for z, p and mu [A]")
    add("--sub-policies", type=at_least(1), default=10, help="L, sub-policies of a policy [P]")
    add("--stages", type=at_least(1), default=2, help="K, stages of a sub-policy, an operation each [P]")
    add("--class-weight", type=at_least(0.0), default=0.1, help="weight of the classification losses [A]")
    add("--critic-weight", type=at_least(0.0), default=1.0, help="weight of the critic's losses, penalty included [C]")
    add("--penalty", type=at_least(0.0), default=10.0, help="lambda of WGAN-GP, weight of the gradient penalty [A]")
    add("--penalty-norm", choices=["pixel", "image"], default="pixel", help="one norm per pixel [A] or per image")
    add("--depth", type=at_least(10), default=40, help="layers of the WideResNet, 6 n + 4 [P]")
    add("--width", type=at_least(1), default=2, help="its width [P]")

    # The preset replaces defaults, which --help then shows; flags that are given win
    first_look = argparse.ArgumentParser(usage=parser.usage, add_help=False, allow_abbrev=False)
    first_look.add_argument("--preset", default="paper")
    preset = first_look.parse_known_args(argv)[0].preset
    parser.set_defaults(**PRESETS.get(preset, {}))
    args, rest = parser.parse_known_args(argv)
    if args.compare:
        return args

    # A run that --resume goes on with has saved its flags, as in the other scripts
    args.out = args.out or f"runs/baseline_sequential-{args.dataset}-seed{args.seed}"
    saved = joint_darts_faa.saved_flags(parser, args, __file__)
    args, rest = parser.parse_known_args(argv, argparse.Namespace(**{"rest": rest, **saved, "out": args.out}))
    joint_darts_faa.refuse_changes(parser, args, saved)
    if not args.method:
        parser.error("--method is missing: faa-darts, darts or dha")
    if (args.depth - 4) % 6 or args.faa_batch_size % 2:
        parser.error("--depth must be 6 n + 4 (10, 16, ..., 40), --faa-batch-size even: half of it is augmented")

    if args.preset == "imagenet" and args.method != "dha":
        parser.error("--preset imagenet is for --method dha")

    handed = ("--policy", "--search-only")
    if args.method == "dha":
        handed = ("--genotype", "--no-da", "--no-hpo")
    for flag in rest:
        if flag.split("=")[0] in handed:
            parser.error(f"{flag} is not for this baseline, whose runs hand over what they found")
    args.parts = parts(args, rest)
    return args


def main(argv: list[str]) -> None:
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    elif hasattr(sys.stdout, "reconfigure"):  # a notebook's stdout has no such method
        sys.stdout.reconfigure(line_buffering=True)  # so that a job's log has every line at once

    try:
        args = parse_args(argv)
        if args.compare:
            print(compare(args.compare))
            return
        first = next(iter(args.parts.values()))
        joint_darts_faa.join_processes(first)
        run_baseline(args, joint_darts_faa.device_of(first.gpu))
    except (InputError, OSError, torch.cuda.OutOfMemoryError) as error:  # all else keeps its traceback
        print("error:", *str(error).splitlines()[:1], file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("\nstopped: the same command with --resume goes on after the last epoch")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
