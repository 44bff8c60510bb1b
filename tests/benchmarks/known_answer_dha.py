"""Four questions whose answers are known, for dha.py; minutes on 2 cores. Asserts nothing.

    python tests/benchmarks/known_answer_dha.py lr         # does Eq. 3 raise a learning rate that is too small?
    python tests/benchmarks/known_answer_dha.py planted    # does Eq. 4 find the operation that has the answer?
    python tests/benchmarks/known_answer_dha.py alike      # does Eq. 2 leave pairs that lose alike uniform?
    python tests/benchmarks/known_answer_dha.py authors    # how far does Eq. 2 move p(tau) with the authors' settings?

lr: three epochs of quick's network on `shapes`, without DA, at a twentieth of its learning rate, with Eq. 3 and
without. Prints lr after every epoch and the test accuracy.

planted: images are noise, and one candidate of the third node of normal cells, sep_conv_3x3 on state 1, is
replaced by one that shows the label: nothing else can lower the loss. Prints in how many seeds the support
has it at the start and after each epoch; of a node's 28 candidates chance would have it in 1 of 14 supports.
With --given the node's b starts with its code, so that the support has it: is it kept?

alike: Eq. 2 alone, no network; every image has the same loss, whatever its pair. Prints the step at which one
pair has half of p(tau), or the largest p at the end. What moves tau, its step and the batch are the preset's, or what
--updates, --tau-lr and --batch-size say; with --plain by plain gradient steps, without momentum and weight decay.

authors: Eq. 2 alone again, but 39 of the 196 pairs cost 20 % more, and a loss scatters as widely as it is large.
Printed, with the settings of DHA's public code for CIFAR-100 (conf/ista/cifar100_ista_single_doal.json of
gitkaichenzhou/DHA, ae6ae8d): the default. Pairs are drawn as there, from a distribution that noise perturbs anew in
every epoch. Prints the share of the 39 pairs in p(tau), the entropy and the largest p after 100 epochs of search and
after 100 more with the larger step.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).parents[2]))
import common
import dha
import timing

NODE, PLANTED = 2, ("sep_conv_3x3", 1)


def small_lr(seed: int, flags: list[str]) -> None:
    dha.Figure = None
    for hpo in ([], ["--no-hpo"]):
        with tempfile.TemporaryDirectory() as folder:
            out = f"{folder}/run"
            given = "--preset quick --batch-size 64 --no-da --lr 0.0025 --search-epochs 1 --train-epochs 2".split()
            args = dha.parse_args([*given, "--seed", str(seed), "--out", out, *hpo, *flags])
            with contextlib.redirect_stdout(io.StringIO()):
                dha.run_dha(args, torch.device("cpu"))
            history = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
        rates = " ".join(f"{record['lr']:.4f}" for record in history)
        print(f"seed {seed}, {'without' if hpo else 'with'} Eq. 3: lr {rates},", end=" ")
        print(f"test accuracy {history[-1]['test_accuracy']:.1f} %", flush=True)


class ShowsLabel(nn.Module):
    """An operation that answers with the batch's labels, a pattern of channels each."""

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("pattern", torch.randn(10, channels))
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.labels = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shown = self.pattern[self.labels][:, :, None, None]
        return self.norm(shown.expand(-1, -1, *x.shape[2:]))


def planted(seed: int, epochs: int, steps: int, given: bool, flags: list[str]) -> list[bool]:
    """Is the planted operation in the support: at the start, and after each epoch's recovery."""
    args = dha.parse_args(["--preset", "quick", "--no-da", "--no-hpo", "--batch-size", "32", *timing.NOT_MADE, *flags])
    torch.manual_seed(seed)
    noise = torch.randint(256, (32 * steps, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(10, (32 * steps,))
    data = common.Data(noise, labels, noise, labels, [str(k) for k in range(10)])
    s = dha.Learned(args, data, torch.device("cpu"))
    name = f"{PLANTED[0]}_{PLANTED[1]}"
    shows = []
    for cell in s.net.cells:
        if cell.first_node == 0:  # a normal one
            candidates = cell.nodes[NODE]
            candidates[name] = ShowsLabel(candidates[name][-1].num_features)
            shows.append(candidates[name])
    if given:
        column = len(dha.OPS) * PLANTED[1] + dha.OPS.index(PLANTED[0])
        s.net.b[NODE].data.copy_(args.b_scale * s.net.A[NODE][:, column])
    s.net.train()
    s.net.set_alpha(s.net.decode())
    found = [PLANTED in s.net.support[NODE]]
    for _ in range(epochs):
        for images, y in zip(noise.split(32), labels.split(32)):
            for op in shows:
                op.labels = y
            dha.train_step(s, images, y, args)
        s.net.set_alpha(s.net.decode())
        found.append(PLANTED in s.net.support[NODE])
    return found


def policy(flags: list[str], plain: bool = False) -> tuple[argparse.Namespace, torch.Tensor, torch.optim.SGD]:
    """The settings, tau, and what moves it: as dha.Learned has it, or plain gradient steps."""
    args = dha.parse_args([*timing.NOT_MADE, *flags])
    tau = torch.zeros(len(dha.AUGMENTATIONS), len(dha.AUGMENTATIONS), requires_grad=True)
    printed = {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
    how = printed if args.updates == "printed" and not plain else {}
    return args, tau, torch.optim.SGD([tau], args.tau_lr[0], **how)


def move(args: argparse.Namespace, tau: torch.Tensor, optimizer: torch.optim.SGD, pairs, losses) -> torch.Tensor:
    """One step of Eq. (2); p(tau) after it."""
    optimizer.zero_grad()
    dha.policy_loss(tau, pairs, losses, args.updates).backward()
    optimizer.step()
    return tau.detach().flatten().softmax(0)


def alike(seed: int, loss: float, steps: int, flags: list[str], plain: bool) -> str:
    """What becomes of pairs none of which is better than another."""
    torch.manual_seed(seed)
    args, tau, optimizer = policy(["--preset", "quick", "--batch-size", "64", *flags], plain)
    losses = torch.full((args.batch_size,), loss)
    for step in range(1, steps + 1):
        p = move(args, tau, optimizer, dha.sample_pairs(tau, len(losses)), losses)
        if p.max() > 0.5:
            return f"one pair has half of p(tau) after {step:,} steps"
    return f"the largest p is {p.max():.4f} after {steps:,} steps"


def authors(seed: int, epochs: int, flags: list[str]) -> None:
    torch.manual_seed(seed)
    args, tau, optimizer = policy(flags)
    count = tau.numel()
    mean_loss = torch.ones(count)
    mean_loss[:39] = 1.2
    for phase, step_size in (("search", args.tau_lr[0]), ("training", args.tau_lr[-1])):
        optimizer.param_groups[0]["lr"] = step_size
        for epoch in range(epochs):
            noise = -torch.empty(count).exponential_().log()  # Gumbel; the temperature is 2
            drawn_from = ((noise + tau.detach().flatten().log_softmax(0)) / 2).softmax(0)
            if epoch == 0:
                drawn_from = torch.ones(count)  # all alike
            for _ in range(50_000 // args.batch_size):
                pairs = torch.multinomial(drawn_from, args.batch_size, replacement=True)
                losses = mean_loss[pairs] * torch.empty(len(pairs)).exponential_()  # whose deviation is its mean
                p = move(args, tau, optimizer, pairs, losses)
        entropy = torch.special.entr(p).sum()
        print(f"seed {seed}, {phase}: 39 of 196 pairs have {p[:39].sum():.4f} of p(tau)", end=", ")
        print(f"entropy {entropy:.4f}, largest p {p.max():.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=["lr", "planted", "alike", "authors"])
    parser.add_argument("--seeds", type=int, help="lr, alike, authors: 3, planted: 10")
    parser.add_argument("--epochs", type=int, help="planted: recoveries (3); authors: of each phase (100)")
    parser.add_argument("--steps", type=int, help="planted: between them (94); alike: at most (25,000)")
    parser.add_argument("--loss", type=float, default=1.9, help="alike: of every image")
    parser.add_argument("--plain", action="store_true", help="alike: plain gradient steps")
    parser.add_argument("--given", action="store_true", help="planted: start with it in the support")
    mine, flags = parser.parse_known_args()
    if mine.question == "lr":
        for seed in range(mine.seeds or 3):
            small_lr(seed, flags)
        return
    if mine.question == "authors":
        for seed in range(mine.seeds or 3):
            authors(seed, mine.epochs or 100, flags)
        return
    if mine.question == "alike":
        for seed in range(mine.seeds or 3):
            print(f"seed {seed}:", alike(seed, mine.loss, mine.steps or 25_000, flags, mine.plain), flush=True)
        return
    seeds = mine.seeds or 10
    found = [planted(seed, mine.epochs or 3, mine.steps or 94, mine.given, flags) for seed in range(seeds)]
    for seed, row in enumerate(found):
        print(f"seed {seed}:", " ".join("yes" if yes else "no" for yes in row))
    print(f"start and epochs, of {seeds}:", [sum(column) for column in zip(*found)])


if __name__ == "__main__":
    main()
