"""A question whose answer is known: does Faster AutoAugment drop operations that make images look unreal?

    python tests/benchmarks/known_answer_baseline.py --data-dir cifar10_jpeg     # train/<class>, test/<class>

The policy starts with strong Invert and Solarize: together they are selected 60 % of the time, applied with
probability 0.9, Solarize at magnitude 0.9. Prints, before and after the search with the critic and without it
(--critic-weight 0), how often an image meets one of them: selection times probability, mean over sub-policies
and stages. And how many times as large the critic's part of the policy's gradient is as the classifier's, the median
over every tenth step. Asserts nothing.
"""

import argparse
import contextlib
import io
import itertools
import math
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))
import baseline_sequential as baseline
import common

STRONG = [list(baseline.AUGMENTATIONS).index(name) for name in ("Invert", "Solarize")]


class StrongStart(baseline.Policy):
    """Policy, but with a start that has too much of two operations."""

    def __init__(self, *args):
        super().__init__(*args)
        with torch.no_grad():
            others = self.z.clone()
            others[..., STRONG] = -math.inf
            total = (others / self.eta).logsumexp(2, keepdim=True)  # of all but the two
            self.z[..., STRONG] = self.eta * (total + math.log(0.6 / 0.4 / len(STRONG)))
            self.p[..., STRONG] = 0.9
            self.mu[..., STRONG] = 0.9


def met(policy: baseline.Policy) -> float:
    return float((policy.selection() * policy.p).detach()[..., STRONG].sum(2).mean())


def watch_gradients(ratios: list[float]) -> None:
    """Let policy_step note, every tenth time, the ratio of the two parts of the policy's gradient."""
    real = baseline.policy_step
    steps = itertools.count()

    def policy_step(s, images, labels, args):
        if next(steps) % 10 == 0 and args.critic_weight:
            with torch.random.fork_rng(devices=[]):
                logits, value = s.net(2 * s.policy(images) - 1)
            params = list(s.policy.parameters())
            critic = torch.autograd.grad(-args.critic_weight * value.mean(), params, retain_graph=True)
            classifier = torch.autograd.grad(args.class_weight * F.cross_entropy(logits, labels), params)
            norms = [torch.cat([g.flatten() for g in gradients]).norm() for gradients in (critic, classifier)]
            ratios.append(float(norms[0] / norms[1]))
        return real(s, images, labels, args)

    baseline.policy_step = policy_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--critic-only", action="store_true", help="leave out the runs without the critic")
    mine, flags = parser.parse_known_args()
    baseline.Policy = StrongStart
    ratios = []
    watch_gradients(ratios)
    data = common.load_data("folder", mine.data_dir, None, 4000, 100)
    for seed in range(mine.seeds):
        for weight in ("1",) if mine.critic_only else ("1", "0"):
            ratios.clear()
            with tempfile.TemporaryDirectory() as folder:
                given = ["--method", "faa-darts", "--preset", "quick", "--seed", str(seed), "--out", f"{folder}/run"]
                args = baseline.parse_args([*given, "--critic-weight", weight, *flags])
                Path(args.out).mkdir()
                torch.manual_seed(seed)
                start = StrongStart(args.sub_policies, args.stages)
                cpu = torch.device("cpu")
                with contextlib.redirect_stdout(io.StringIO()):
                    end = baseline.search_policy(args, data, cpu, [], None)
            said = f"seed {seed}, critic weight {weight}: met {met(start):.3f} -> {met(end):.3f}"
            if ratios:
                said += f", critic over classifier {median(ratios):.1f}"
            print(said, flush=True)


if __name__ == "__main__":
    main()
