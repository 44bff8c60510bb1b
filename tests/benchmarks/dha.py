"""What the parts of DHA cost; the sides take turns, each in its own process. Prints ratios, asserts nothing.

    python tests/benchmarks/dha.py                                  # C=36 L=20 batch 96, 5 minutes on 2 cores
    python tests/benchmarks/dha.py --channels 16 --layers 8 --rounds 5

A process makes one step to warm up and times the next ones.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import common
import dha

SIDES = {
    "all": "DA + HPO + NAS",
    "nas": "NAS only",
    "policy": "draw pairs, two operations an image",
    "ista": "all nodes",
}


def one_side(mine):
    device = torch.device("cuda", mine.gpu) if mine.gpu >= 0 else torch.device("cpu")
    size = f"--channels {mine.channels} --layers {mine.layers} --batch-size {mine.batch_size}".split()
    args = dha.parse_args([*size, *(["--no-da", "--no-hpo"] if mine.side == "nas" else [])])
    args.amp = mine.amp
    torch.manual_seed(0)
    batch = common.shapes(mine.batch_size, 0)  # no more, whose making would be the peak
    data = common.Data(*batch, *batch, list(common.SHAPE_CLASSES)).to(device)
    s, x = dha.DHA(args, data, device), data.train_images.float() / 255
    step = {
        "policy": lambda: dha.apply_pairs(x, dha.sample_pairs(s.tau, len(x))),
        "ista": s.net.recover,
    }.get(mine.side, lambda: dha.train_step(s, data.train_images, data.train_labels, args))
    times = []
    for _ in range(mine.steps + 1):  # the first warms up
        start = time.perf_counter()
        step()
        if mine.gpu >= 0:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if mine.gpu >= 0:
        memory = torch.cuda.max_memory_allocated() / 2**30
    print(statistics.median(times[1:]), memory)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--channels", type=int, default=36)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a process")
    parser.add_argument("--gpu", type=int, default=0 if torch.cuda.is_available() else -1)
    parser.add_argument("--amp", action="store_true")
    parser.add_argument("--side", choices=SIDES, help="one side, in this process: seconds and peak GiB")
    mine = parser.parse_args()
    if mine.side:
        return one_side(mine)
    where = torch.cuda.get_device_name(mine.gpu) if mine.gpu >= 0 else f"{torch.get_num_threads()} threads"
    print(f"C={mine.channels} L={mine.layers} batch {mine.batch_size}, torch {torch.__version__}, {where}")
    found = {side: [] for side in SIDES}
    for _ in range(mine.rounds):
        for side in SIDES:
            command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
            run = subprocess.run(command, capture_output=True, text=True, check=True)
            found[side].append([float(word) for word in run.stdout.split()])
    median = lambda i: {side: statistics.median(row[i] for row in rows) for side, rows in found.items()}
    seconds, memory = median(0), median(1)
    for side, what in SIDES.items():
        print(f"{side:7s} {1000 * seconds[side]:9.1f} ms   peak memory {memory[side]:.2f} GiB   {what}")
    print(f"all over nas: {seconds['all'] / seconds['nas']:.3f}")
    print(f"policy over all: {seconds['policy'] / seconds['all']:.4f}")


if __name__ == "__main__":
    main()
