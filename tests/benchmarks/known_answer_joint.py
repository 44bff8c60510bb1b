"""A question whose answer is known: does the search find contrast operations where images lost contrast?

    python tests/benchmarks/known_answer_joint.py --seeds 3        # minutes per seed and data set

Searches on `shapes` as it is, and on `shapes` whose images have each lost a random part of their contrast
(blended with their mean gray, 15 to 60 % left). Prints the probability that AutoContrast, Equalize or
Contrast is selected, mean over sub-policies and stages, before and after the search. Asserts nothing.

The policy starts with all operations equally likely. The search's own start, z from U(0, 1) at temperature
0.05, gives some operations 1e-6 of a stage, and almost no gradient: --random-start shows what it makes of the
question. The search is quick's, but longer, to learn: 8 epochs of 3,200 images, with smaller policy steps.
"""

import argparse
import contextlib
import io
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import common
import joint_darts_faa as joint

WANTED = ("AutoContrast", "Equalize", "Contrast")


class EvenStart(joint.Policy):
    """A policy that starts with every operation as likely as any other."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        torch.nn.init.zeros_(self.z)


def without_contrast(images: torch.Tensor, seed: int) -> torch.Tensor:
    x = images.float()
    left = torch.rand(len(x), 1, 1, 1, generator=torch.Generator().manual_seed(seed)) * 0.45 + 0.15
    ground = joint.gray(x).mean((2, 3), keepdim=True)
    return (ground + left * (x - ground)).round().clamp(0, 255).to(torch.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--random-start", action="store_true", help="start z as the search does")
    mine, flags = parser.parse_known_args()
    if not mine.random_start:
        joint.Policy = EvenStart
    longer = ["--search-epochs", "8", "--search-images", "3200", "--policy-lr", "3e-3"]
    plain = common.load_data("shapes")
    dull = plain._replace(train_images=without_contrast(plain.train_images, 1))
    rows = [list(joint.AUGMENTATIONS).index(name) for name in WANTED]
    for seed in range(mine.seeds):
        for name, data in (("shapes", plain), ("shapes without contrast", dull)):
            with tempfile.TemporaryDirectory() as folder:
                given = ["--preset", "quick", *longer, "--seed", str(seed), "--out", f"{folder}/run", *flags]
                args = joint.parse_args(given)
                Path(args.out).mkdir()
                torch.manual_seed(seed)
                first = joint.Policy(args.sub_policies, args.stages).selection().mean((0, 1))
                cpu = torch.device("cpu")
                with contextlib.redirect_stdout(io.StringIO()):
                    s = joint.search(args, data, cpu, None, [], None)
            last = s.policy.selection().mean((0, 1))
            parts = ", ".join(f"{w} {first[r]:.3f} -> {last[r]:.3f}" for w, r in zip(WANTED, rows))
            print(f"seed {seed}, {name}: {first[rows].sum():.3f} -> {last[rows].sum():.3f}  ({parts})", flush=True)


if __name__ == "__main__":
    main()
