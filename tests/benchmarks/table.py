"""Both papers' Table 1 in small: runs of the three scripts on CIFAR-10, or any folder like it.

    python tests/benchmarks/table.py dha --data-dir cifar10_jpeg    # or another of TABLES; goes on where it stopped
    python tests/benchmarks/table.py dha                            # prints the table from tests/results/dha.jsonl
    python tests/benchmarks/table.py pages                          # writes all kept tables into the pages

Starts every run that tests/results/<table>.jsonl does not hold, and goes on with those that were stopped. A run that
ends adds its line. --jobs runs at once share the cores. --dataset folder is CIFAR-10 as train/<class>/* and
test/<class>/*; --dataset cifar10 are the original files, whose tables are others: tests/results/<table>-cifar10.jsonl.
"""

import argparse
import json
import math
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from threading import Event, Lock

import scipy.stats
import torch

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "tests" / "results"
sys.path.insert(0, str(ROOT))
import common
import dha
import figure2
import joint_darts_faa

# Small networks. While it trains a run looks at 100 test images; all of them judge its network at the end
ALIKE = "--limit-test 100 --batch-size 50 --layers 3 --arch-lr 3e-3 --auxiliary-weight 0 --drop-path 0 --cutout 0"
SMALL = f"{ALIKE} --image-size 16 --limit-train 500 --channels 8"
DHA = "--lr 0.05 --b-scale 0.1"
FREE = "--updates scale-free --tau-lr"

# DHA's table. Plain steps of Eq. (3) are not scale-free: beta is chosen on seeds 100 and 101 (see the table beta), and
# so is scale-free's step of tau, 0.02, with which the entropy of p(tau) ends at 5.0
GIVEN = f"{SMALL} {DHA} --train-epochs 240 --genotype OUT/genotype-SEED.json"
SEARCHED = f"{SMALL} {DHA} --search-epochs 40 --train-epochs 200"
BETA = "--beta 4e-7 4e-5"  # 40 times the authors'

# The reduced CIFAR-10 of AutoAugment, 4,000 images, but of 16 x 16 pixels. beta: as far in 6,400 steps as in 2,400
REDUCED = f"{ALIKE} {DHA} --image-size 16 --limit-train 4000 --channels 24 --search-epochs 20 --train-epochs 60"
REDUCED_BETA = "--beta 1.5e-7 1.5e-5"  # 15 times the authors'

JOINT = (
    "--preset quick --image-size 16 --limit-test 100 --batch-size 50 --limit-train 500 --search-epochs 40 "
    "--train-epochs 200 --search-images 500 --search-batch-size 50"
)
STARTS = (0.0025, 0.01, 0.05, 0.1)  # of lr

TABLES = {  # table: row: command. SEED and OUT are filled in
    "dha": {
        "random genotype": f"dha.py {GIVEN} --no-da --no-hpo",
        "One-Stage ISTA": f"dha.py {SEARCHED} --no-da --no-hpo",
        "random pairs": f"dha.py {SEARCHED} --no-hpo --tau-lr 0",
        "DHA, scale-free": f"dha.py {SEARCHED} {FREE} 0.02",
        "DHA, scale-free, tau's step x 2": f"dha.py {SEARCHED} {FREE} 0.04",
        "DHA, scale-free, tau's step x 4": f"dha.py {SEARCHED} {FREE} 0.08",
        "DHA without HPO": f"dha.py {SEARCHED} --no-hpo",
        "DHA without HPO, scale-free": f"dha.py {SEARCHED} {FREE} 0.02 --no-hpo",
        "DHA": f"dha.py {SEARCHED} {BETA}",
        "DHA without DA": f"dha.py {SEARCHED} {BETA} --no-da",
        "DHA without NAS": f"dha.py {GIVEN} {BETA}",
        "Sequential DHA": f"baseline_sequential.py --method dha {SEARCHED} {BETA} --train-epochs 240",
    },
    "reduced": {
        "DHA": f"dha.py {REDUCED} {REDUCED_BETA}",
        "random pairs": f"dha.py {REDUCED} --no-hpo --tau-lr 0",
        "One-Stage ISTA": f"dha.py {REDUCED} --no-da --no-hpo",
    },
    "beta-printed": {  # times the authors' 1e-8 and 1e-6. 156 is 374,400 steps over 2,400
        f"{times} times": f"dha.py {SEARCHED} --beta {times * 1e-8:g} {times * 1e-6:g}" for times in (156, 80, 40, 16)
    },
    "beta": {f"beta {beta}": f"dha.py {SEARCHED} {FREE} 0.02 --beta {beta}" for beta in (5, 10, 15, 20)},
    "length": {  # T, the steps of a run; the last has 2,000 images
        "650 steps": f"dha.py {SMALL} {DHA} --search-epochs 15 --train-epochs 50 {FREE} 0.02",
        "2,400 steps": f"dha.py {SEARCHED} {FREE} 0.02",
        "10,000 steps": f"dha.py {SMALL} --limit-train 2000 {DHA} --search-epochs 40 --train-epochs 210 {FREE} 0.02",
    },
    "lr": {
        f"{way} from {lr}": f"dha.py {SEARCHED} {FREE} 0.02 --no-da --lr {lr}{flag}"
        for lr in STARTS
        for way, flag in (("Eq. 3", ""), ("cosine", " --no-hpo"))
    },
    "joint": {
        "random genotype": f"joint_darts_faa.py {JOINT} --policy none --genotype OUT/genotype-SEED.json",
        "DARTS": f"joint_darts_faa.py {JOINT} --policy none",
        "jointly": f"joint_darts_faa.py {JOINT}",
        "random policy": f"joint_darts_faa.py {JOINT} --policy OUT/policy-SEED.json",
        "Faster AA, then DARTS": f"baseline_sequential.py --method faa-darts --faa-epochs 80 {JOINT}",
        "DARTS' cells, joint policy": f"joint_darts_faa.py {JOINT} --genotype OUT/joint/DARTS_SEED/genotype.json "
        "--policy OUT/joint/jointly_SEED/policy.json",
        "joint cells, no policy": f"joint_darts_faa.py {JOINT} --genotype OUT/joint/jointly_SEED/genotype.json "
        "--policy none",
    },
}
REFERENCES = {
    "dha": ["One-Stage ISTA", "random pairs", "DHA"],
    "reduced": ["One-Stage ISTA", "random pairs", "DHA"],
    "beta-printed": [],
    "beta": [],
    "length": [],
    "joint": ["DARTS", "Faster AA, then DARTS", "jointly"],
}
WRITING = Lock()

PAGES = [ROOT / "README.md", RESULTS / "README.md"]
MARKED = re.compile(r"(<!-- ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)  # a table's place on a page
FRONT = {  # table: whose it is, the reference and the rows that the front page shows
    "dha": (
        "Zhou et al.",
        "One-Stage ISTA",
        [
            "random pairs",
            "DHA without HPO",
            "DHA without HPO, scale-free",
            "DHA, scale-free",
            "Sequential DHA",
            "DHA",
            "One-Stage ISTA",
        ],
    ),
    "joint": ("Kashima et al.", "DARTS", ["DARTS", "Faster AA, then DARTS", "jointly"]),
}


def prepare(out: Path, seed: int) -> None:
    """Write the random genotype and the random policy that some rows are given, drawn by the seed."""
    torch.manual_seed(seed)
    cells = []
    for _ in range(2):
        states = []
        for j in range(4):
            states += torch.randperm(j + 2)[:2].sort().values.tolist()
        cells.append([(dha.OPS[int(torch.randint(len(dha.OPS), ()))], state) for state in states])
    genotype = common.Genotype(cells[0], [2, 3, 4, 5], cells[1], [2, 3, 4, 5])
    common.save_genotype(genotype, out / f"genotype-{seed}.json")
    policy = joint_darts_faa.Policy().as_dict()  # z, p, mu from U(0, 1), as a search starts
    (out / f"policy-{seed}.json").write_text(json.dumps(policy))


def kept_results(name: str, row: str) -> dict[int, dict]:
    """The results of a row that are kept: seed -> result."""
    return {result["seed"]: result for result in kept_lines(name) if result["row"] == row}


def commands(name: str) -> dict[str, str]:
    """The rows of a table, and their commands."""
    return TABLES[name.removesuffix("-cifar10")]


def kept_lines(name: str) -> list[dict]:
    path = RESULTS / f"{name}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def draws(path: Path) -> dict[str, float] | None:
    """By the policy.json of a run: the share of all draws in which an operation is applied. None without a policy."""
    if not path.exists():
        return None
    policy = json.loads(path.read_text())
    if "probability" in policy:  # of dha's pairs: as the first, and as the second of a pair
        p = torch.tensor(policy["probability"])
        shares = (p.sum(0) + p.sum(1)) / 2
    else:
        selection = (torch.tensor(policy["z"]) / policy["eta"]).softmax(2)
        shares = (selection * torch.tensor(policy["p"])).mean((0, 1))
    return {name: round(float(share), 4) for name, share in zip(policy["operations"], shares)}


def change(path: Path, images: torch.Tensor) -> float | None:
    """By the policy.json of a run of the joint search: how much it changes images (B, 3, H, W), uint8; the mean over
    all pixels, 0 to 1. None without a policy, or where it is one of dha's pairs."""
    if not path.exists() or "probability" in json.loads(path.read_text()):
        return None
    torch.manual_seed(0)
    images = images / 255
    augmented = joint_darts_faa.augment(images, joint_darts_faa.load_policy(path))
    return round(float((augmented - images).abs().mean()), 4)


def directory(row: str, seed: int | str) -> str:
    """The name of a run's directory."""
    return re.sub(r"\W+", "_", f"{row} {seed}")


def needed(name: str, row: str) -> list[str]:
    """The rows whose runs find what this row is given."""
    return [other for other in commands(name) if f"/{directory(other, 'SEED')}/" in commands(name)[row]]


def run(name: str, row: str, seed: int, mine: argparse.Namespace, before: list[Future]) -> None:
    """Start or go on with a run, after those `before` it; keep its result."""
    for other in before:
        other.result()
    if seed in kept_results(name, row):
        return
    out = mine.out / name / directory(row, seed)
    command = commands(name)[row].replace("OUT", str(mine.out)).replace("SEED", str(seed))
    command += f" --dataset {mine.dataset} --seed {seed} --out {out}"
    given = ["--data-dir", mine.data_dir]
    given += ["--gpu", str(mine.gpu)]
    env = {**os.environ, "OMP_NUM_THREADS": str(max(os.cpu_count() // mine.jobs, 1))}

    print(f"python {command}", flush=True)
    with open(ROOT / f"{out}.log", "a") as log:
        words = [sys.executable, *shlex.split(command), *given, "--resume"]
        code = subprocess.call(words, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)
    if code:
        raise SystemExit(f"{row}, seed {seed} ended with {code}: see {out}.log")

    # Its network judged on all test images, and on its training images as they are
    of_dha = command.startswith("dha.py") or "--method dha" in command
    load = dha.load_model if of_dha else joint_darts_faa.load_network
    net, info = load(ROOT / out / "model.pt")
    about = json.loads((ROOT / out / "config.json").read_text())
    limit = int(re.findall(r"--limit-train (\d+)", command)[-1])
    data = common.load_data(mine.dataset, mine.data_dir, info["image_size"], limit)
    accuracy = dha.evaluate(net, data.test_images, data.test_labels, info["mean"], info["std"])
    memorised = dha.evaluate(net, data.train_images, data.train_labels, info["mean"], info["std"])

    records = [json.loads(line) for line in (ROOT / out / "metrics.jsonl").read_text().splitlines()]
    rates = [records[len(records) * tenth // 10 - 1].get("lr") for tenth in range(1, 11)]
    last = records[-1]
    last = {key: value for key, value in last.items() if key not in ("support", "seconds", "gpus")}
    found = json.loads((ROOT / out / "result.json").read_text())
    result = {
        "row": row,
        "seed": seed,
        "test_accuracy": accuracy,
        "test_images": len(data.test_labels),
        "clean_train_accuracy": memorised,
        **{key: found[key] for key in ("params", "seconds", "search_seconds", "genotype")},
        "last_epoch": last,
        "lr": rates,  # at the end of each tenth of the run
        "draws": draws(ROOT / out / "policy.json"),
        "change": change(ROOT / out / "policy.json", data.test_images[:1000]),
        "command": f"python {command}",
        **{key: about[key] for key in ("torch", "torchvision", "device")},
    }
    with WRITING, open(RESULTS / f"{name}.jsonl", "a") as kept:
        kept.write(json.dumps(result) + "\n")


def one_machine(mine: argparse.Namespace) -> None:
    """A table is of one kind of device and one version of torch: end the program where kept lines are of others."""
    device = "cpu" if mine.gpu < 0 else "cuda"
    for line in kept_lines(mine.table):
        if line["torch"] != torch.__version__ or line["device"].split(":")[0] != device:
            raise SystemExit(f"{mine.table}.jsonl is of torch {line['torch']} on {line['device']}: move it away")


def difference(name: str, row: str, reference: str) -> str:
    """Of the two rows' accuracies, seed by seed: mean and 95 % t-interval. Nothing where there are not two seeds."""
    ours, others = kept_results(name, row), kept_results(name, reference)
    found = [ours[seed]["test_accuracy"] - others[seed]["test_accuracy"] for seed in ours if seed in others]
    n = len(found)
    if row == reference or n < 2:
        return ""
    half = scipy.stats.t.ppf(0.975, n - 1) * stdev(found) / math.sqrt(n)
    return f"{mean(found):+.1f} [{mean(found) - half:+.1f}, {mean(found) + half:+.1f}]"


def spread(results: list[dict]) -> str:
    """Test accuracies: mean ± standard deviation, or a single one."""
    accuracies = [result["test_accuracy"] for result in results]
    if len(accuracies) < 2:
        return " ".join(f"{accuracy:.1f}" for accuracy in accuracies)
    return f"{mean(accuracies):.1f} ± {stdev(accuracies):.1f}"


def table_of_starts() -> str:
    """Of the table lr: by what lr starts with, test accuracy and mean accuracy on the training images as they are,
    with Eq. (3) and with the cosine; and the worst start's mean minus the best one's."""
    lines = [
        "| lr starts at | Eq. 3: test (%) | training images (%) | cosine: test (%) | training images (%) |",
        "| --- | --- | --- | --- | --- |",
    ]
    means = []
    for lr in STARTS:
        rows = [list(kept_results("lr", f"{way} from {lr}").values()) for way in ("Eq. 3", "cosine")]
        if all(rows):
            train = [mean(result["clean_train_accuracy"] for result in results) for results in rows]
            means.append([mean(result["test_accuracy"] for result in results) for results in rows])
            cells = [f"{spread(results)} | {right:.1f}" for results, right in zip(rows, train)]
            lines.append(f"| {lr} | {' | '.join(cells)} |")
    if means:
        costs = [f"{min(column) - max(column):.1f}" for column in zip(*means)]
        lines.append(f"| worst minus best | {costs[0]} | | {costs[1]} | |")
    return "\n".join(lines)


def table(name: str) -> str:
    """A table as Markdown: test accuracies with their standard deviation over seeds, differences with their 95 %
    t-interval, mean accuracy in the last epoch on the training images as they were augmented, of the trained network
    on the same images as they are (where it is kept), mean parameters. A row without a result is left out."""
    if name == "lr":
        return table_of_starts()
    references = REFERENCES[name.removesuffix("-cifar10")]
    rows = {row: list(kept_results(name, row).values()) for row in commands(name)}
    rows = {row: results for row, results in rows.items() if results}
    clean = all("clean_train_accuracy" in result for results in rows.values() for result in results)
    head = ["", "seeds", "test (%)", *(f"minus {row}" for row in references), "train (%)"]
    head += ["as they are (%)"] * clean + ["parameters"]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for row, results in rows.items():
        cells = [row, str(len(results)), spread(results)]
        cells += [difference(name, row, reference) for reference in references]
        cells.append(f"{mean(result['last_epoch']['train_accuracy'] for result in results):.0f}")
        if clean:
            cells.append(f"{mean(result['clean_train_accuracy'] for result in results):.1f}")
        cells.append(f"{mean(result['params'] for result in results) / 1000:.1f} k")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def table_of_policies() -> str:
    """Of the joint search's table: the share of the stages in which a row's policies apply an operation, and the mean
    change of a pixel, 0 to 1; mean ± standard deviation."""
    lines = ["| policies of | stages with an operation (%) | change of a pixel (%) |", "| --- | --- | --- |"]
    for row in ("random policy", "Faster AA, then DARTS", "jointly"):
        results = kept_results("joint", row).values()
        rates = [100 * sum(result["draws"].values()) for result in results]
        changes = [100 * result["change"] for result in results]
        if len(rates) > 1:
            cells = [f"{mean(numbers):.1f} ± {stdev(numbers):.1f}" for numbers in (rates, changes)]
            lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def front() -> str:
    """The front page's tables, one below the other: a few rows of both papers' tables."""
    lines = []
    for name, (paper, reference, rows) in FRONT.items():
        lines += [f"| {paper} | seeds | test (%) | minus {reference} |", "| --- | --- | --- | --- |"]
        kept = [row for row in rows if kept_results(name, row)]
        for row in kept:
            results = list(kept_results(name, row).values())
            lines.append(f"| {row} | {len(results)} | {spread(results)} | {difference(name, row, reference)} |")
        lines += [] if kept else ["| (no line is kept) |  |  |  |"]
        lines.append("")
    return "\n".join(lines).rstrip()


def marked(name: str) -> str:
    """What stands on a page between <!-- name --> and <!-- end -->."""
    others = {"front": front, "policies": table_of_policies, "figure2": figure2.table}
    text = others[name]() if name in others else table(name)
    return text if len(text.splitlines()) > 2 else "(no line is kept)"


def with_tables(text: str) -> str:
    """A page with its tables written anew."""
    return MARKED.sub(lambda found: f"{found[1]}{marked(found[2])}\n{found[3]}", text)


def draw_rates(name: str) -> None:
    """tests/results/<name>.png: lr over the share of the run that is done, a curve per row, of its first seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for row in commands(name):
        results = kept_results(name, row)
        if results:
            axis.plot([tenth / 10 for tenth in range(1, 11)], results[min(results)]["lr"], ".-", label=row)
    axis.set(xlabel="share of the run", ylabel="lr", yscale="log")
    axis.legend()
    figure.savefig(RESULTS / f"{name}.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=[*TABLES, "pages"])
    parser.add_argument("--data-dir", help="where the data set is; None: start nothing, print what is kept")
    parser.add_argument("--dataset", default="folder", choices=["folder", "cifar10"])
    parser.add_argument("--out", type=Path, default=Path("runs/table"), help="run directories")
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds to run; the table has all that are kept")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, which share the cores")
    parser.add_argument("--gpu", type=int, default=0 if torch.cuda.is_available() else -1, help="-1 is the CPU")
    mine = parser.parse_args()
    if mine.table == "pages":
        for page in PAGES:
            page.write_text(with_tables(page.read_text()))
        return
    if mine.dataset == "cifar10":
        mine.table += "-cifar10"
    if mine.data_dir:
        one_machine(mine)
        mine.data_dir = str(Path(mine.data_dir).absolute())
        (ROOT / mine.out / mine.table).mkdir(parents=True, exist_ok=True)
        seeds = range(mine.first_seed, mine.first_seed + mine.seeds)
        for seed in seeds:
            prepare(ROOT / mine.out, seed)
        pool = ThreadPoolExecutor(mine.jobs)
        failed = Event()

        def attempt(*what) -> None:
            """A run, unless one has failed."""
            if not failed.is_set():
                try:
                    run(*what)
                except BaseException:
                    failed.set()
                    raise

        try:
            runs = {}
            for seed in seeds:
                for row in commands(mine.table):
                    before = [runs[other, seed] for other in needed(mine.table, row)]
                    runs[row, seed] = pool.submit(attempt, mine.table, row, seed, mine, before)
            for done in runs.values():
                done.result()
        finally:  # after Ctrl-C no run starts either
            pool.shutdown(cancel_futures=True)
        if mine.table == "length":
            draw_rates(mine.table)
    print(table(mine.table))
    if mine.table == "joint":
        print(table_of_policies())


if __name__ == "__main__":
    main()
