"""Figure 2 of the joint paper: which operations the policy selects, epoch by epoch, and do the cells change with it?

    python tests/benchmarks/figure2.py --data-dir cifar10_jpeg    # two seeds, a core each; goes on where it stopped
    python tests/benchmarks/figure2.py                            # prints the table from tests/results/figure2.jsonl

The search has the paper's settings and number of steps (25 epochs of 390), but images of 16 x 16 pixels and a small
supernet. A search that ends adds its line to figure2.jsonl and its figure, figure2-seed<seed>.png.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import scipy.stats
import torch

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "tests" / "results"
sys.path.insert(0, str(ROOT))
import common
import joint_darts_faa

COMMAND = (
    "joint_darts_faa.py --dataset folder --image-size 16 --search-epochs 25 --search-channels 4 --search-layers 3 "
    "--search-only"
)
COLOUR = "Invert AutoContrast Equalize Solarize Posterize Contrast Color Brightness Sharpness".split()
GEOMETRIC = "ShearX ShearY TranslateX TranslateY Rotate".split()
COLUMNS = {  # of the table: the operations whose shares are added
    "9 colour operations": COLOUR,
    "5 geometric": GEOMETRIC,
    **{name: [name] for name in ("Color", "AutoContrast", "Posterize", "Rotate")},
}


def first_policy(command: str, seed: int) -> joint_darts_faa.Policy:
    """The policy that a joint search starts with. It does not depend on the images: two black ones do."""
    images, labels = torch.zeros(2, 3, 16, 16, dtype=torch.uint8), torch.arange(2)
    data = common.Data(images, labels, images, labels, list("0123456789"))
    args = joint_darts_faa.parse_args(command.split()[1:])
    torch.manual_seed(seed)
    return joint_darts_faa.JointSearch(args, data, torch.device("cpu"), None).policy


def start(seed: int) -> dict[str, float]:
    """The selection of each operation before the first step, the mean over the policy as in metrics.jsonl."""
    shares = first_policy(COMMAND, seed).selection().mean((0, 1)).tolist()
    return {name: round(share, 4) for name, share in zip(joint_darts_faa.AUGMENTATIONS, shares)}


def keep(out: Path, seed: int) -> None:
    """Of a search that ended: its line and its figure."""
    epochs = []
    for line in (out / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        record["selection"] = {name: round(share, 4) for name, share in record["selection"].items()}
        epochs.append({name: record[name] for name in ("loss", "val_loss", "val_accuracy", "genotype", "selection")})
    about = json.loads((out / "config.json").read_text())
    kept = {
        "seed": seed,
        "command": f"python {COMMAND} --seed {seed}",
        "torch": about["torch"],
        "start": start(seed),
        "epochs": epochs,
    }
    with open(RESULTS / "figure2.jsonl", "a") as file:
        file.write(json.dumps(kept) + "\n")
    shutil.copy(out / "selection.png", RESULTS / f"figure2-seed{seed}.png")


def kept_searches() -> list[dict]:
    path = RESULTS / "figure2.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def policy_step(before: dict, after: dict) -> float:
    """How far the selection moved, 0 to 1: half the sum of the changes (total variation)."""
    return sum(abs(after["selection"][name] - share) for name, share in before["selection"].items()) / 2


def cell_step(before: dict, after: dict) -> int:
    """How many of the 16 operations and edges that would be derived changed."""
    genotypes = [common.parse_genotype(record["genotype"]) for record in (before, after)]
    old, new = [
        {
            (cell, k // 2, name, state)
            for cell in ("normal", "reduce")
            for k, (name, state) in enumerate(getattr(genotype, cell))
        }
        for genotype in genotypes
    ]
    return len(new - old)


def together(epochs: list[dict]) -> tuple[float, float]:
    """Spearman's correlation of both steps over the epochs; and with the epoch held fixed, because both may shrink."""
    pairs = list(zip(epochs, epochs[1:]))
    policy = [policy_step(*pair) for pair in pairs]
    cells = [cell_step(*pair) for pair in pairs]
    time = list(range(len(pairs)))
    both, policy_time, cells_time = [
        float(scipy.stats.spearmanr(one, other).statistic)
        for one, other in ((policy, cells), (policy, time), (cells, time))
    ]
    fixed = (both - policy_time * cells_time) / math.sqrt((1 - policy_time**2) * (1 - cells_time**2))
    return both, fixed


def table() -> str:
    """As Markdown: shares of the selection in % at the start and at the end, and how the steps correlate."""
    lines = [
        f"| seed | {' | '.join(COLUMNS)} | policy and cells | at a fixed epoch |",
        "|" + " --- |" * (len(COLUMNS) + 3),
    ]
    for kept in kept_searches():
        cells = [str(kept["seed"])]
        for names in COLUMNS.values():
            both = (kept["start"], kept["epochs"][-1]["selection"])
            first, last = [100 * sum(selection[name] for name in names) for selection in both]
            cells.append(f"{first:.1f} to {last:.1f}")
        cells += [f"{correlation:+.2f}" for correlation in together(kept["epochs"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="CIFAR-10 as train/<class>/*, test/<class>/*; None: start nothing")
    parser.add_argument("--out", type=Path, default=Path("runs/figure2"), help="run directories")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    mine = parser.parse_args()
    if mine.data_dir:
        env = {**os.environ, "OMP_NUM_THREADS": str(max(os.cpu_count() // len(mine.seeds), 1))}
        given = ["--data-dir", str(Path(mine.data_dir).absolute()), "--resume"]
        searches = {}
        for seed in sorted(set(mine.seeds) - {kept["seed"] for kept in kept_searches()}):
            words = [sys.executable, *COMMAND.split(), "--seed", str(seed), "--out", f"{mine.out}/{seed}", *given]
            searches[seed] = subprocess.Popen(words, cwd=ROOT, env=env)
        for seed, search in searches.items():
            if search.wait() == 0:
                keep(ROOT / mine.out / str(seed), seed)
        for seed, search in searches.items():
            if search.returncode:
                raise SystemExit(f"the search of seed {seed} ended with {search.returncode}")
    print(table())


if __name__ == "__main__":
    main()
