"""A question whose answer is known: does Faster AutoAugment drop operations that make images look unreal?

    python tests/benchmarks/known_answer_baseline.py --data-dir cifar10_jpeg     # train/<class>, test/<class>

The policy starts with strong Invert and Solarize: together they are selected 60 % of the time, applied with
probability 0.9, Solarize at magnitude 0.9. Prints, before and after the search with the critic and without it
(--critic-weight 0), how often an image meets one of them: selection times probability, mean over sub-policies
and stages. Asserts nothing.
"""

import argparse
import contextlib
import io
import math
import sys
import tempfile
from pathlib import Path

import torch

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
    return float((policy.selection() * policy.p.detach())[..., STRONG].sum(2).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    mine, flags = parser.parse_known_args()
    baseline.Policy = StrongStart
    data = common.load_data("folder", mine.data_dir, None, 4000, 100)
    for seed in range(mine.seeds):
        for weight in ("1", "0"):
            with tempfile.TemporaryDirectory() as folder:
                given = ["--method", "faa-darts", "--preset", "quick", "--seed", str(seed), "--out", f"{folder}/run"]
                args = baseline.parse_args([*given, "--critic-weight", weight, *flags])
                Path(args.out).mkdir()
                torch.manual_seed(seed)
                start = StrongStart(args.sub_policies, args.stages)
                cpu = torch.device("cpu")
                with contextlib.redirect_stdout(io.StringIO()):
                    end = baseline.search_policy(args, data, cpu, [], None)
            print(f"seed {seed}, critic weight {weight}: met {met(start):.3f} -> {met(end):.3f}", flush=True)


if __name__ == "__main__":
    main()
