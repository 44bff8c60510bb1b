"""Both papers' Table 1 in small, DHA's ablation, and what the results depend on: runs of the three scripts.

    python tests/benchmarks/table.py joint --data-dir cifar10_jpeg    # or another of TABLES
    python tests/benchmarks/table.py joint                            # print it from tests/results alone

Starts every run that tests/results/ does not hold, and goes on with those that were stopped. Keeps in tests/results/ the
result.json of each, with the command that made it and its last line of metrics.jsonl. Prints the table; draws the figures of
ablation and sensitivity into .github/. --jobs runs at once share the cores.
"""

import argparse
import json
import math
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

import scipy.stats
import torch

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "tests" / "results"
sys.path.insert(0, str(ROOT))
import common
import dha
import joint_darts_faa

DATA = "--preset quick --dataset folder --image-size 32 --limit-train 2000 --limit-test 500"
JOINT = f"{DATA} --search-images 2000 --search-batch-size 32 --search-epochs 5 --train-epochs 20"
DHA = f"{DATA} --search-epochs 7 --train-epochs 13"
FIXED = f"{DATA} --train-epochs 20"  # every network is trained for 20 epochs, whatever was searched before
RANDOM = "--genotype OUT/random-genotype-SEED.json"
START = "tests/benchmarks/policy_start.py"

ROWS = {  # SEED and OUT are filled in
    "random genotype": f"joint_darts_faa.py {JOINT} --policy none {RANDOM}",
    "random policy": f"joint_darts_faa.py {JOINT} --policy OUT/random-policy-SEED.json "
    "--genotype OUT/DARTS-SEED/genotype.json",
    "DARTS": f"joint_darts_faa.py {JOINT} --policy none",
    "Faster AA, then DARTS": f"baseline_sequential.py --method faa-darts --faa-epochs 20 {JOINT}",
    "DARTS + Faster AA jointly": f"joint_darts_faa.py {JOINT}",
    "policy-lr 0.001": f"joint_darts_faa.py {JOINT} --policy-lr 0.001",
    "policy-lr 0.1": f"joint_darts_faa.py {JOINT} --policy-lr 0.1",
    "eta 0.2": f"{START} --eta 0.2 {JOINT}",
    "eta 1": f"{START} --eta 1 {JOINT}",
    "z even": f"{START} --even {JOINT}",
    "random genotype, dha.py": f"dha.py {FIXED} --no-da --no-hpo {RANDOM}",
    "random policy, dha.py": f"dha.py {DHA} --tau-lr 0",
    "One-Stage ISTA": f"dha.py {DHA} --no-da --no-hpo",
    "Sequential DHA": f"baseline_sequential.py --method dha {FIXED} --search-epochs 7",
    "DHA": f"dha.py {DHA}",
    "One-Stage ISTA, 60 epochs": f"dha.py {DATA} --search-epochs 7 --train-epochs 53 --no-da --no-hpo",
    "DHA, 60 epochs": f"dha.py {DATA} --search-epochs 7 --train-epochs 53",
    "without DA": f"dha.py {DHA} --no-da",
    "without HPO": f"dha.py {DHA} --no-hpo",
    "without NAS": f"dha.py {FIXED} {RANDOM}",
}
# --lasso was a flag of the scripts that made the kept results; now it is dha.LASSO. Its rows can be read, not be run again
SWEEPS = {"beta-lr": (3e-5, 3e-3), "beta-wd": (1e-4, 1e-2), "tau-lr": (0.025, 2.5), "lasso": (1e-6, 1e-4)}
for flag, values in SWEEPS.items():
    for value in values:
        ROWS[f"{flag} {value:g}"] = f"dha.py {DHA} --{flag} {value:g}"

TABLES = {
    "joint": [
        "random genotype",
        "random policy",
        "DARTS",
        "Faster AA, then DARTS",
        "DARTS + Faster AA jointly",
    ],
    "dha": ["random genotype, dha.py", "random policy, dha.py", "One-Stage ISTA", "Sequential DHA", "DHA"],
    "longer": ["One-Stage ISTA, 60 epochs", "DHA, 60 epochs"],
    "ablation": ["DHA", "without DA", "without HPO", "without NAS"],
}
READ_AGAINST = {"joint": ["random genotype", "DARTS"], "dha": ["random genotype, dha.py", "One-Stage ISTA"]}
SENSITIVITY = {  # table: the row with quick's values, and what the others change
    "sensitivity-joint": ("DARTS + Faster AA jointly", ("policy-lr", "eta", "z")),
    "sensitivity-dha": ("DHA", tuple(SWEEPS)),
}
for name, (middle, settings) in SENSITIVITY.items():
    TABLES[name] = [middle, *(row for row in ROWS if row.split()[0] in settings)]


def slug(row: str, seed: int) -> str:
    return "".join(c if c.isalnum() or c in ".-" else "_" for c in row) + f"-{seed}"


def prepare(out: Path, seed: int) -> None:
    """Write what the rows of chance are given: a genotype and a policy, drawn by the seed."""
    torch.manual_seed(seed)
    cells = []
    for _ in range(2):
        states = []
        for j in range(4):
            states += torch.randperm(j + 2)[:2].sort().values.tolist()
        cells.append([(dha.OPS[int(torch.randint(7, ()))], state) for state in states])
    genotype = common.Genotype(cells[0], [2, 3, 4, 5], cells[1], [2, 3, 4, 5])
    common.save_genotype(genotype, out / f"random-genotype-{seed}.json")
    policy = joint_darts_faa.Policy().table()  # z, p, mu from U(0, 1), as a search starts
    (out / f"random-policy-{seed}.json").write_text(json.dumps(policy))


def run(row: str, seed: int, mine: argparse.Namespace) -> None:
    """Start or go on with a run; keep its result."""
    out, kept = mine.out / slug(row, seed), RESULTS / f"{slug(row, seed)}.json"
    if kept.exists():
        return
    command = ROWS[row].replace("OUT", str(mine.out)).replace("SEED", str(seed))
    command += f" --seed {seed} --out {out}"
    given = ["--data-dir", mine.data_dir]
    if mine.gpu is not None:
        given += ["--gpu", str(mine.gpu)]
    env = {**os.environ, "OMP_NUM_THREADS": str(max(os.cpu_count() // mine.jobs, 1))}

    print(f"python {command}", flush=True)
    with open(ROOT / f"{out}.log", "a") as log:
        words = [sys.executable, *shlex.split(command), *given, "--resume"]
        code = subprocess.call(words, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)
    if code:
        raise SystemExit(f"{row}, seed {seed} ended with {code}: see {out}.log")

    # While it trains a run looks at 500 test images; its network is judged by all 10,000
    script = shlex.split(command)[0]
    words = [sys.executable, script, "--evaluate", str(out), "--limit-test", "10000", *given]
    said = subprocess.run(words, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout
    accuracy, count = re.search(r"test accuracy: ([\d.]+) % of (\d+) images", said).groups()

    last = json.loads((ROOT / out / "metrics.jsonl").read_text().splitlines()[-1])
    last.pop("support", None)
    about = json.loads((ROOT / out / "config.json").read_text())
    result = {
        **json.loads((ROOT / out / "result.json").read_text()),
        "test_accuracy": float(accuracy),
        "test_images": int(count),
        "command": f"python {command}",
        "last_epoch": last,
        "torch": about["torch"],
        "device": about["device"],
    }
    kept.write_text(json.dumps(result, indent=1) + "\n")


def kept_results(row: str) -> dict[int, dict]:
    """The results of a row that are kept: seed -> result."""
    found = {}
    for seed in range(100):
        path = RESULTS / f"{slug(row, seed)}.json"
        if path.exists():
            found[seed] = json.loads(path.read_text())
    return found


def difference(row: str, reference: str) -> str:
    """Of the two rows' accuracies, seed by seed: mean and 95 % t-interval. Nothing where there are not two seeds."""
    ours, others = kept_results(row), kept_results(reference)
    found = [ours[seed]["test_accuracy"] - others[seed]["test_accuracy"] for seed in ours if seed in others]
    n = len(found)
    if row == reference or n < 2:
        return ""
    half = scipy.stats.t.ppf(0.975, n - 1) * stdev(found) / math.sqrt(n)
    return f"{mean(found):+.2f} [{mean(found) - half:+.2f}, {mean(found) + half:+.2f}]"


def table(name: str) -> str:
    """A table as Markdown: accuracies with their standard deviation over seeds, differences with their 95 % t-interval."""
    references = READ_AGAINST.get(name, TABLES[name][:1])
    head = ["", "seeds", "accuracy (%)"]
    head += [f"minus {row.removesuffix(', dha.py')}" for row in references]
    head += ["parameters", "minutes", "of search"]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for row in TABLES[name]:
        results = list(kept_results(row).values())
        accuracies = [result["test_accuracy"] for result in results]
        cells = [row.removesuffix(", dha.py"), str(len(results))]
        if len(results) < 2:
            cells += [" ".join(f"{x:.2f}" for x in accuracies)] + [""] * (len(head) - 3)
        else:
            cells.append(f"{mean(accuracies):.2f} ± {stdev(accuracies):.2f}")
            cells += [difference(row, reference) for reference in references]
            cells.append(f"{mean(result['params'] for result in results) / 1000:.1f} k")
            cells.append(f"{mean(result['seconds'] for result in results) / 60:.1f}")
            cells.append(f"{mean(result['search_seconds'] for result in results) / 60:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# What --preset quick had when the kept results were made: what a sweep of the setting is read against
QUICK = {
    "beta-lr": "0.0003", "beta-wd": "0.001", "tau-lr": "0.25", "lasso": "1e-05",
    "policy-lr": "0.01", "eta": "0.05", "z": "uniform",
}  # fmt: skip


def panels_of(name: str) -> dict[str, dict[str, str]]:
    """What a figure shows: for each panel's title the rows of the table, by the label below their dots."""
    if name == "ablation":
        return {"ablation of DHA": {row: row for row in TABLES[name]}}

    def number(label: str) -> float:
        return float(label.split()[0]) if label[0].isdigit() else 0.0

    middle, settings = SENSITIVITY[name]
    panels = {}
    for setting in settings:
        rows = {row.split()[1]: row for row in TABLES[name] if row.split()[0] == setting}
        rows[f"{QUICK[setting]}\n(quick)"] = middle
        panels[setting] = {label: rows[label] for label in sorted(rows, key=number)}
    return panels


def draw(name: str) -> None:
    """.github/<name>.png: every seed's accuracy is a dot, the mean a line; sensitivity: one panel per setting."""
    from matplotlib.figure import Figure

    panels = panels_of(name)
    figure = Figure(figsize=(max(3 * len(panels), 6), 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, rows) in zip(axes, panels.items()):
        for x, row in enumerate(rows.values()):
            accuracies = [result["test_accuracy"] for result in kept_results(row).values()]
            axis.plot([x] * len(accuracies), accuracies, "o", color="#0072B2", alpha=0.6)
            if accuracies:
                axis.hlines(mean(accuracies), x - 0.25, x + 0.25, color="#D55E00")
        axis.set_xticks(range(len(rows)), rows)
        axis.set(title=title, xlim=(-0.5, len(rows) - 0.5))
    axes[0].set_ylabel("test accuracy (%)")
    figure.savefig(ROOT / ".github" / f"{name}.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--data-dir", help="CIFAR-10 as train/<class>/*, test/<class>/*; None: start nothing")
    parser.add_argument("--out", type=Path, default=Path("runs/table"), help="run directories")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    parser.add_argument("--gpu", type=int)
    mine = parser.parse_args()
    if mine.data_dir:
        mine.data_dir = str(Path(mine.data_dir).absolute())
        (ROOT / mine.out).mkdir(parents=True, exist_ok=True)
        RESULTS.mkdir(exist_ok=True)
        for seed in range(mine.seeds):
            prepare(ROOT / mine.out, seed)
        # The genotype that "random policy" is given must be there first
        order = sorted(TABLES[mine.table], key=lambda row: "DARTS-SEED" in ROWS[row])
        runs = [(row, seed) for row in order for seed in range(mine.seeds)]
        pool = ThreadPoolExecutor(mine.jobs)
        try:
            for done in [pool.submit(run, row, seed, mine) for row, seed in runs]:
                done.result()
        finally:  # a run that fails, or Ctrl-C, starts no other
            pool.shutdown(cancel_futures=True)
    print(table(mine.table))
    if mine.table == "ablation" or mine.table in SENSITIVITY:
        draw(mine.table)


if __name__ == "__main__":
    main()
