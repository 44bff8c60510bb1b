# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "torchvision>=0.19", "numpy>=1.26", "pillow>=9.4", "tqdm", "matplotlib>=3.7", "scipy"]
# ///
"""The sequential baselines of both papers, the same parts one after the other; and plain DARTS.

    python baseline_sequential.py --method faa-darts --preset quick              # minutes on 2 CPU cores
    python baseline_sequential.py --method dha --dataset cifar10 --gpu 0         # the paper's size
    python baseline_sequential.py --resume --out runs/baseline_sequential-dha-cifar10-seed0
    python baseline_sequential.py --compare runs/*                               # a table of runs of any script

A baseline is one of three short functions: faa_then_darts (--method faa-darts), darts, nas_then_train (--method dha).
Each line of it is a stage: an ordinary run of a script, in a folder of its own in --out, whose file the next line takes
(policy.json, or genotype.json: the cells that a search found). So both sides of a comparison share their code. The
scripts get all flags but --method, --compare and those of Faster AutoAugment; see their --help.

faa-darts and darts are "Baseline" and "DARTS" of Kashima et al. (https://arxiv.org/abs/2012.09407), dha is the
"Sequential DHA" of Zhou et al. (https://arxiv.org/abs/2109.05765). The rest of this file is what no other script has,
Faster AutoAugment with its critic, and --compare.

Faster AutoAugment is Hataya et al., ECCV 2020, https://arxiv.org/abs/1911.06987. The policy is that of
joint_darts_faa.py, Eqs. (1) to (3) of Kashima et al.: z says which operations are selected, p how often a selected one
is applied, mu how strongly. A WideResNet-40-2 judges it. It has two heads: a critic, which tells real images from
augmented ones, and a classifier. One iteration, on the two halves of a batch, all images cropped and flipped:

    1. augment the second half: each stage of the policy is the weighted sum of 16 operations    Eqs. (1) to (3)
    2. move the network: its critic to score real images (the first half) high and augmented
       ones low, its classifier to classify the first half correctly                             WGAN-GP
    3. augment the second half anew, and move the policy: the critic should score it high, and
       the classifier classify it correctly

Marks: [P] Kashima et al. say so. [A] Faster AutoAugment's public code does, https://github.com/moskomule/dda, branch
fasteraa. [C] our choice, where neither says or we depart from both.
"""

import argparse
import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

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
from joint_darts_faa import AUGMENTATIONS, QUIET, RANK, WORLD, Policy, at_least, average_gradients

# ---------------------------------------------------------------------------------------------------------------------
# One after the other. stage(folder, script, flags ..., name=file) runs `script flags --name file` in a folder of --out,
# and returns the folder. (JOINT, DHA and Stages: below Faster AutoAugment. FASTER_AA: below the flags)
# ---------------------------------------------------------------------------------------------------------------------


def faa_then_darts(stage: "Stages") -> None:
    """A policy, learned with a WideResNet; cells, searched without the policy [P]; training of the cells with it."""
    policy = stage("policy", FASTER_AA) / "policy.json"
    genotype = stage("search", JOINT, "--policy", "none", "--search-only") / "genotype.json"
    stage("train", JOINT, genotype=genotype, policy=policy)


def darts(stage: "Stages") -> None:
    """Cells, then their training, without a policy."""
    genotype = stage("search", JOINT, "--policy", "none", "--search-only") / "genotype.json"
    stage("train", JOINT, "--policy", "none", genotype=genotype)


def nas_then_train(stage: "Stages") -> None:
    """Cells, searched without policy (DA) and without learning lr and wd (HPO); then a training that learns these."""
    genotype = stage("search", DHA, "--no-da", "--no-hpo", "--train-epochs", "0") / "genotype.json"
    stage("train", DHA, genotype=genotype)


BASELINES = {"faa-darts": faa_then_darts, "darts": darts, "dha": nas_then_train}


# ---------------------------------------------------------------------------------------------------------------------
# Faster AutoAugment. The network: a WideResNet with a classifier and a critic
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
# One iteration: a step of critic and classifier, then a step of the policy
# ---------------------------------------------------------------------------------------------------------------------


def gradient_penalty(critic: Callable, real: Tensor, augmented: Tensor, mix: Tensor, norm: str = "pixel") -> Tensor:
    """WGAN-GP's penalty: the mean of (|d critic / d x| - 1)^2, at x between real and augmented images.

    x is mix * real + (1 - mix) * augmented, (B, 3, H, W); mix: (B,) in [0, 1]; critic: images to values (B,).
    Differentiable in the critic's parameters. The gradient is that of the sum of all values (in training a batch norm
    lets the value of an image depend on the others, too).

    norm: "pixel", one norm per pixel, over its channels [A]. It pushes each of the H W pixel gradients to norm 1, and
    that of the whole image to sqrt(H W), 32 for CIFAR. "image": one per image, pushed to 1: WGAN-GP as Gulrajani et al.
    define it.
    """
    mix = mix.view(-1, 1, 1, 1)
    x = (mix * real + (1 - mix) * augmented).detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    if norm == "image":
        gradient = gradient.flatten(1)
    return ((gradient.norm(dim=1) - 1) ** 2).mean()


class PolicySearch:
    """What Faster AutoAugment learns: a network with two heads, and the policy; and their optimizers."""

    def __init__(self, args: argparse.Namespace, num_classes: int, device: torch.device):
        self.net = WideResNet(num_classes, args.depth, args.width)
        self.net.to(device, memory_format=common.layout(device))
        self.policy = Policy(args.sub_policies, args.stages).to(device)
        self.net_optimizer = torch.optim.Adam(self.net.parameters(), args.faa_lr, betas=(0.0, 0.999))
        self.policy_optimizer = torch.optim.Adam(self.policy.parameters(), args.policy_lr, betas=(0.0, 0.999))
        self.learned = {  # for the checkpoint
            "net": self.net,
            "policy": self.policy,
            "net_optimizer": self.net_optimizer,
            "policy_optimizer": self.policy_optimizer,
        }

    def state_dict(self) -> dict:
        return {name: module.state_dict() for name, module in self.learned.items()}

    def load_state_dict(self, saved: dict) -> None:
        for name, module in self.learned.items():
            module.load_state_dict(saved[name])

    def judge(self, x: Tensor, amp: bool) -> tuple[Tensor, Tensor]:
        """Logits and the critic's values, in float32, of images (B, 3, H, W) in [-1, 1]."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
            logits, value = self.net(x)
        return logits.float(), value.float()


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
    logits, real_value = s.judge(real, args.amp)
    _, augmented_value = s.judge(augmented, args.amp)
    distance = real_value.mean() - augmented_value.mean()
    mix = torch.rand(len(real), device=real.device)
    penalty = gradient_penalty(lambda x: s.judge(x, args.amp)[1], real, augmented, mix, args.penalty_norm)
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
    logits, value = s.judge(2 * s.policy(images) - 1, args.amp)
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


# ---------------------------------------------------------------------------------------------------------------------
# The policy search, a stage
# ---------------------------------------------------------------------------------------------------------------------


def faa_batch_size(args: argparse.Namespace, count: int) -> int:
    """At most --faa-batch-size of `count` images, rounded down so that every process gets two equal halves."""
    halves = 2 * WORLD
    return min(args.faa_batch_size, args.faa_images, count) // halves * halves


def check_faa(args: argparse.Namespace, data: common.Data) -> None:
    """Raise InputError where the data do not fit the flags of a policy search."""
    count = len(data.train_images)
    common.check_batch(count, faa_batch_size(args, count), WORLD)


def run_faa(args: argparse.Namespace, device: torch.device, data: common.Data) -> None:
    """Faster AutoAugment; the run directory --out holds all that comes out, policy.json above all."""
    out = Path(args.out)
    with joint_darts_faa.locked(out):
        history, checkpoint = joint_darts_faa.open_run(args, data, device, *FASTER_AA.files)
        print(f"{args.dataset}: {data.describe()}")
        policy = search_policy(args, data, device, history, checkpoint.get("search"))
        if RANK == 0:
            joint_darts_faa.save(out / "policy.json", policy.as_dict())
            draw_search(out, history)
            result = {"method": "Faster AA", "dataset": args.dataset, "seed": args.seed}
            joint_darts_faa.save(out / "result.json", {**result, **joint_darts_faa.costs(history)})


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
    steps = len(chosen) // batch_size
    joint_darts_faa.announce("policy search", device, s.net, steps * args.faa_epochs)
    epochs_before = len(history)
    for epoch in range(epochs_before, args.faa_epochs):
        started = time.perf_counter()
        s.net.train()

        seed = joint_darts_faa.seed_epoch(args.seed, epoch)
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
        if epoch == epochs_before:
            joint_darts_faa.say_end("the policy search", record["seconds"], args.faa_epochs - len(history))
    return s.policy


def draw_search(out: Path, history: list[dict]) -> None:
    """curves.png of the policy search."""
    if joint_darts_faa.Figure is None:
        return  # the other stages say so
    panels = {
        "critic": ["distance", "policy_critic_loss"],
        "penalty": ["penalty"],
        "class loss (nats)": ["class_loss", "policy_class_loss"],
        "accuracy (%)": ["accuracy", "policy_accuracy"],
    }
    try:
        joint_darts_faa.draw_curves(out / "curves.png", history, panels)
    except Exception as error:  # a fault in a figure must not lose the result
        print(f"warning: a figure could not be drawn: {type(error).__name__}: {error}")


# ---------------------------------------------------------------------------------------------------------------------
# Stages
# ---------------------------------------------------------------------------------------------------------------------


class Script(NamedTuple):
    """What a stage needs of a script."""

    files: tuple[str, ...]  # the script, and what it imports
    parse_args: Callable  # (argv) -> flags
    check: Callable  # (flags, data); raises InputError where they do not fit
    run: Callable  # (flags, device, data); goes on where it was stopped


JOINT = Script(
    (joint_darts_faa.__file__, common.__file__),
    joint_darts_faa.parse_args,
    joint_darts_faa.check_joint,
    joint_darts_faa.run_joint,
)
DHA = Script((dha.__file__, common.__file__), dha.parse_args, dha.check_dha, dha.run_dha)


class Stages:
    """Runs the stages of a baseline. The baseline is called twice: first to check its stages, then to run them.

    So a wrong flag of the last stage is found before the first one begins. argv: the baseline's command line. data:
    those of all stages.
    """

    def __init__(self, argv: list[str], args: argparse.Namespace, device: torch.device, data: common.Data):
        self.argv = argv
        self.args = args
        self.device = device
        self.data = data
        self.checked = {}  # {folder: (script, flags)}; flags: None if the stage is finished

    def __call__(self, folder: str, script: Script, *own_flags: str, **files: Path) -> Path:
        out = Path(self.args.out) / folder
        if folder not in self.checked:
            # The first call: nothing runs, and no file is there yet
            self.checked[folder] = (script, self.check(out, script, own_flags, files))
            return out

        _, flags = self.checked[folder]
        if flags:
            # A run reads the copy in its own folder
            for file in files.values():
                if RANK == 0:
                    shutil.copyfile(file, out / file.name)
            if WORLD > 1:
                dist.barrier()  # the others go on once process 0 has written the files
            print(f"\n{out}")
            script.run(flags, self.device, self.data)
        return out

    def check(self, out: Path, script: Script, own_flags: tuple, files: dict) -> argparse.Namespace | None:
        """The flags of a stage, or None if it is finished. Raises InputError where the data do not fit them."""
        begun = self.args.resume and (out / "config.json").exists()
        if begun and (out / "result.json").exists():
            return None
        if not begun and (out.parent / "config.json").exists():
            raise InputError(f"{out} is missing: begin the baseline anew in another --out")

        # --policy-lr, --sub-policies and --stages are for Faster AutoAugment, though the joint script has them, too
        argv = self.argv if script is FASTER_AA else without_own_flags(self.argv)
        argv = [*argv, *own_flags, "--out", str(out)]
        if not begun:  # else its config.json has these flags; and --out may have been moved since
            for name, file in files.items():
                argv += [f"--{name}", str(file)]
        with contextlib.redirect_stdout(None):  # no notes: a flag that one stage does not use is for another
            flags = script.parse_args(argv)
        script.check(flags, self.data)
        return flags


def run_baseline(argv: list[str], args: argparse.Namespace, device: torch.device) -> None:
    """All stages of a baseline, one after the other."""
    out = Path(args.out)
    if (out / "result.json").exists():
        print(f"{out} is finished already:", (out / "result.json").read_text())
        return

    data = joint_darts_faa.load_data(args, device)
    baseline = BASELINES[args.method]
    stage = Stages(argv, args, device, data)
    baseline(stage)  # checks flags and data, and writes nothing
    if WORLD > 1:
        dist.barrier()  # no process looks for a run in --out after process 0 has begun one
    with joint_darts_faa.locked(out):
        # Every stage gets its folder, with its flags: then to resume the baseline is to resume its stages
        for name, (script, flags) in stage.checked.items():
            if flags:
                with joint_darts_faa.locked(out / name):
                    joint_darts_faa.open_run(flags, data, device, *script.files)
        joint_darts_faa.open_run(args, data, device, *FASTER_AA.files)

        baseline(stage)  # runs what is not finished
        if RANK == 0:
            save_baseline(args, list(stage.checked))


def save_baseline(args: argparse.Namespace, folders: list[str]) -> None:
    """Copy what the stages found to --out; metrics.jsonl and the costs are those of all stages."""
    out = Path(args.out)
    total = joint_darts_faa.costs([])
    records = []
    for folder in folders:
        result = json.loads((out / folder / "result.json").read_text())
        for name in total:
            total[name] += result[name]
        for line in (out / folder / "metrics.jsonl").read_text().splitlines():
            records.append({"stage": folder, **json.loads(line)})
        for file in ("genotype.json", "policy.json", "model.pt"):
            if (out / folder / file).exists():
                shutil.copyfile(out / folder / file, out / file)
    joint_darts_faa.save(out / "metrics.jsonl", records)

    # The last result is that of the training
    names = {"faa-darts": "Faster AA, then DARTS", "darts": "DARTS", "dha": "Sequential DHA"}
    result = {**result, "method": names[args.method], **total}
    joint_darts_faa.save(out / "result.json", result)
    print(json.dumps(result, indent=1))


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

            # A baseline's settings are Faster AutoAugment's and its training's, but for the files that this was handed
            training = folder / "train" / "config.json"
            if training.exists():
                own = settings if settings["method"] == "faa-darts" else {}
                settings = {**json.loads(training.read_text())["args"], **own}
                del settings["genotype"]
                settings.pop("policy", None)

            # Places and the seed are no settings, nor is the preset, which only sets others. --amp changes results
            hidden = {*joint_darts_faa.FREE_ON_RESUME, "seed", "compare", "preset"} - {"amp"}
            if result["dataset"] == "folder":
                hidden.remove("data_dir")
            for given in ("genotype", "policy"):  # files by their name, because a path may contain the seed
                if settings.get(given):
                    settings[given] = Path(settings[given]).name
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

PRESETS = {  # the names of the scripts' presets; here only what they change in Faster AutoAugment
    "paper": {},  # the defaults of the flags
    "quick": dict(dataset="shapes", faa_epochs=6, faa_batch_size=64, depth=10, width=1, policy_lr=1e-2),  # [C]
    "scale-free": {},
    "imagenet": dict(dataset="imagenet"),
}


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The flags of a baseline, and of its policy search. Flags for the other scripts are ignored here."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s --method METHOD [flags, also of the scripts that it runs]",
        description=__doc__.split("\n")[0] + " Values are the paper's [P], public code's [A] or ours [C].",
        epilog="More flags: those of joint_darts_faa.py (faa-darts, darts) or dha.py (dha); see their --help.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add_own_flags(parser)
    joint_darts_faa.add_run_flags(parser, list(PRESETS))
    add = parser.add_argument_group("of the scripts that it runs, which have defaults").add_argument
    add("--search-epochs", default=argparse.SUPPRESS, help="epochs of the architecture search")
    add("--train-epochs", "--epochs", type=at_least(1), default=argparse.SUPPRESS, help="epochs of training")

    # The preset replaces defaults, which --help then shows; flags that are given win
    first_look = argparse.ArgumentParser(usage=parser.usage, add_help=False, allow_abbrev=False)
    first_look.add_argument("--preset", default="paper")
    preset = first_look.parse_known_args(argv)[0].preset
    joint_darts_faa.replace_defaults(parser, PRESETS.get(preset, {}), f"preset {preset}")
    args, _ = parser.parse_known_args(argv)
    if args.compare:
        return args

    if args.method and not args.out:
        args.out = joint_darts_faa.default_out(f"baseline_sequential-{args.method}", args)
    args = joint_darts_faa.resume_flags(parser, argv, args, __file__)
    if not args.method:
        parser.error("--method is missing: faa-darts, darts or dha")
    if args.preset in ("scale-free", "imagenet") and args.method != "dha":
        parser.error(f"--preset {args.preset} is for --method dha")
    if (args.depth - 4) % 6 or args.faa_batch_size % 2:
        parser.error("--depth must be 6 n + 4 (10, 16, ..., 40), --faa-batch-size even: half of it is augmented")
    for flag in argv:
        if flag.split("=")[0] in ("--genotype", "--policy", "--search-only", "--no-da", "--no-hpo"):
            parser.error(f"{flag} is not for a baseline, whose stages hand over what they found")
    if args.method != "faa-darts":
        own = argparse.ArgumentParser(add_help=False)
        add_own_flags(own)
        flags = [action.option_strings[0] for action in own._actions if action.dest not in ("method", "compare")]
        joint_darts_faa.note_unused(argv, flags, f"--method {args.method}")
    if args.amp and args.gpu < 0:
        print("note: --amp is for a GPU: it is switched off")
        args.amp = False
    return args


def add_own_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that no other script has, or that Faster AutoAugment has instead of it."""
    add = parser.add_argument_group("which baseline").add_argument
    add("--method", choices=list(BASELINES), help="which baseline")
    add("--compare", metavar="DIR", nargs="+", help="print a table of finished runs of any script, and stop")

    add = parser.add_argument_group("Faster AutoAugment (the first stage of faa-darts)").add_argument
    add("--faa-epochs", type=at_least(1), default=20, help="epochs of policy search [P]")
    add("--faa-images", type=at_least(4), default=4000, help="training images that it sees [A]")
    add("--faa-batch-size", type=at_least(4), default=128, help="images per step, half of them augmented [A]")
    add("--faa-lr", type=at_least(0.0), default=1e-3, help="Adam's learning rate for critic and classifier [A]")
    add("--policy-lr", type=at_least(0.0), default=1e-3, help="Adam's learning rate for z, p and mu [A]")
    add("--sub-policies", type=at_least(1), default=10, help="L, sub-policies of a policy [P]")
    add("--stages", type=at_least(1), default=2, help="K, stages of a sub-policy, an operation each [P]")
    add("--class-weight", type=at_least(0.0), default=0.1, help="weight of the classification losses [A]")
    add("--critic-weight", type=at_least(0.0), default=1.0, help="weight of the critic's losses, with penalty [A: 1]")
    add("--penalty", type=at_least(0.0), default=10.0, help="lambda of WGAN-GP, weight of the gradient penalty [A]")
    add("--penalty-norm", choices=["pixel", "image"], default="pixel", help="a norm per pixel [A], or per image")
    add("--depth", type=at_least(10), default=40, help="layers of the WideResNet, 6 n + 4 [P]")
    add("--width", type=at_least(1), default=2, help="its width [P]")


def without_own_flags(argv: list[str]) -> list[str]:
    """The command line for the other scripts."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_own_flags(own)
    return own.parse_known_args(argv)[1]


FASTER_AA = Script((__file__, common.__file__, dha.__file__, joint_darts_faa.__file__), parse_args, check_faa, run_faa)


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
        joint_darts_faa.join_processes(args)
        with common.workers_explained():
            run_baseline(argv, args, joint_darts_faa.device_of(args.gpu))
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
