"""What a step of the joint search costs beside the step as it is commonly written.

    python tests/benchmarks/joint.py                                 # C=16 L=8 batch 64, 10 minutes on 2 cores
    python tests/benchmarks/joint.py --channels 8 --layers 5 --batch-size 32

The sides take turns, a fresh process each time, which makes one step to warm up and times the next ones.
Prints medians, ratios and peak memory; asserts nothing.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
import common
import joint_darts_faa as joint
from written_out import WrittenOut

SIDES = {
    "written out": "the loop over edges and operations, NCHW, whole backward passes in both halves",
    "ours": "search_step without policy",
    "with policy": "search_step with policy",
}


def usual_step(channels, layers):
    """DARTS' search step as it is commonly written."""
    net = WrittenOut(channels, 10, layers)
    alphas = [net.alphas_normal, net.alphas_reduce]
    weights = [p for name, p in net.named_parameters() if not name.startswith("alphas")]
    alpha = torch.optim.Adam(alphas, 3e-4, (0.5, 0.999), weight_decay=1e-3)
    w = torch.optim.SGD(weights, 0.025, 0.9, weight_decay=3e-4)
    mean, std = torch.rand(3), torch.rand(3) + 0.5

    def step(images, labels):
        for optimizer in (alpha, w):
            x = common.random_crop_flip(images).float() / 255
            x = (x - mean.view(3, 1, 1)) / std.view(3, 1, 1)
            optimizer.zero_grad()
            F.cross_entropy(net(x), labels).backward()
            if optimizer is w:
                torch.nn.utils.clip_grad_norm_(weights, 5)
            optimizer.step()

    return step


def our_step(channels, layers, *flags):
    size = ["--search-channels", str(channels), "--search-layers", str(layers)]
    args = joint.parse_args([*size, *flags])
    data = common.Data(*common.shapes(20, 0), *common.shapes(20, 1), list(common.SHAPE_CLASSES))
    s = joint.JointSearch(args, data, torch.device("cpu"))
    return lambda images, labels: joint.search_step(s, (images, labels), (images, labels), 5.0, False)


def one_side(mine):
    torch.manual_seed(0)
    images = torch.randint(256, (mine.batch_size, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(10, (mine.batch_size,))
    flags = [] if mine.side == "with policy" else ["--policy", "none"]
    build = usual_step if mine.side == "written out" else our_step
    step = build(mine.channels, mine.layers, *([] if mine.side == "written out" else flags))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(images, labels)
    times = []
    for _ in range(mine.steps):
        start = time.perf_counter()
        step(images, labels)
        times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(statistics.median(times), (peak - before) / 2**20)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a process")
    parser.add_argument("--side", choices=SIDES, help="one side, in this process: seconds and GiB above idle")
    mine = parser.parse_args()
    if mine.side:
        return one_side(mine)
    size = f"C={mine.channels} L={mine.layers} batch {mine.batch_size}"
    print(f"{size}, torch {torch.__version__}, {torch.get_num_threads()} threads, {mine.rounds} rounds")
    found = {side: [] for side in SIDES}
    for _ in range(mine.rounds):
        for side in SIDES:
            command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
            run = subprocess.run(command, capture_output=True, text=True, check=True)
            found[side].append([float(word) for word in run.stdout.split()])
    median = lambda i: {side: statistics.median(row[i] for row in rows) for side, rows in found.items()}
    seconds, memory = median(0), median(1)
    for side, what in SIDES.items():
        print(f"{side:12s} {seconds[side]:7.3f} s  {memory[side]:5.2f} GiB   {what}")
    for side in ("ours", "with policy"):
        faster, share = seconds["written out"] / seconds[side], memory[side] / memory["written out"]
        print(f"written out over {side}: {faster:.2f}; memory of {side} over written out: {share:.2f}")


if __name__ == "__main__":
    main()
