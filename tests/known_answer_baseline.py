"""A question whose answer is known: does Faster AutoAugment drop operations that make images look unreal?

    python tests/known_answer_baseline.py --data-dir cifar10_jpeg        # folders train/<class>, test/<class>

The policy starts with strong Invert and Solarize: together they are selected 60 % of the time, applied with probability
0.9, Solarize at magnitude 0.9. Prints, before and after the search with the critic and without it (--critic-weight 0), how
often an image meets one of them: selection times probability, mean over sub-policies and stages. Asserts nothing.
"""

import argparse
import math
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import baseline_sequential as baseline
import common

STRONG = [list(baseline.AUGMENTATIONS).index(name) for name in ("Invert", "Solarize")]


def strong_start(real: type):
    """Policy, but with a start that has too much of two operations."""

    def build(*args, **kwargs):
        policy = real(*args, **kwargs)
        with torch.no_grad():
            others = policy.z.clone()
            others[..., STRONG] = -math.inf
            total = (others / policy.eta).logsumexp(2, keepdim=True)  # of all but the two
            policy.z[..., STRONG] = policy.eta * (total + math.log(0.6 / 0.4 / len(STRONG)))
            policy.p[..., STRONG] = 0.9
            policy.mu[..., STRONG] = 0.9
        return policy

    build.load = real.load
    return build


def met(weight: torch.Tensor, p: torch.Tensor) -> float:
    return float((weight * p)[..., STRONG].sum(2).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    mine, flags = parser.parse_known_args()
    real = baseline.Policy
    baseline.Policy = strong_start(real)
    data = common.load_data("folder", mine.data_dir, None, 4000, 100)
    for seed in range(mine.seeds):
        for weight in ("1", "0"):
            given = ["--method", "faa-darts", "--preset", "quick", "--gpu", "-1", "--faa-images", "4000"]
            args = baseline.parse_args([*given, "--seed", str(seed), "--critic-weight", weight, *flags])[0]
            torch.manual_seed(seed)
            start = baseline.Policy(args.sub_policies, args.stages)
            with tempfile.TemporaryDirectory() as folder:
                baseline.search_policy(args, data, Path(folder), torch.device("cpu"))
                end = real.load(Path(folder) / "policy.json")
            before, after = met(start.selection(), start.p.detach()), met(end.selection(), end.p)
            selected = [float(p.selection()[..., STRONG].sum(2).mean()) for p in (start, end)]
            print(
                f"seed {seed}, critic weight {weight}: met {before:.3f} -> {after:.3f}"
                f"  (selected {selected[0]:.3f} -> {selected[1]:.3f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
