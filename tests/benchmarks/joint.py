"""What a step of the joint search costs beside the step as it is commonly written.

    python tests/benchmarks/joint.py                                 # C=16 L=8 batch 64; on a GPU if there is one
    python tests/benchmarks/joint.py --channels 8 --layers 5 --batch-size 32

The sides take turns, each time in a fresh process. Prints medians, ratios and the peak memory above that of the idle
process; asserts nothing.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]
import common
import joint_darts_faa as joint
import timing
from written_out import WrittenOut

SIDES = {
    "written out": "the loop over edges and operations, NCHW, whole backward passes in both halves",
    "ours": "search_step without policy",
    "with policy": "search_step with policy",
}


def usual_step(mine, device):
    """DARTS' search step as it is commonly written."""
    net = WrittenOut(mine.channels, 10, mine.layers).to(device)
    alphas = [net.alphas_normal, net.alphas_reduce]
    weights = [p for name, p in net.named_parameters() if not name.startswith("alphas")]
    alpha = torch.optim.Adam(alphas, 3e-4, (0.5, 0.999), weight_decay=1e-3)
    w = torch.optim.SGD(weights, 0.025, 0.9, weight_decay=3e-4)
    mean = torch.rand(3, 1, 1, device=device)
    std = torch.rand(3, 1, 1, device=device) + 0.5

    def step(images, labels):
        for optimizer in (alpha, w):
            x = (common.random_crop_flip(images) / 255 - mean) / std
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=mine.amp):
                logits = net(x)
            F.cross_entropy(logits.float(), labels).backward()
            if optimizer is w:
                torch.nn.utils.clip_grad_norm_(weights, 5)
            optimizer.step()

    return step


def our_step(mine, device):
    size = ["--search-channels", str(mine.channels), "--search-layers", str(mine.layers)]
    policy = [] if mine.side == "with policy" else ["--policy", "none"]
    args = joint.parse_args([*size, *policy, *timing.NOT_MADE])
    data = common.Data(*common.shapes(20, 0), *common.shapes(20, 1), list(common.SHAPE_CLASSES)).to(device)
    s = joint.JointSearch(args, data, device)

    def step(images, labels):
        halves = [(common.random_crop_flip(images), labels) for _ in range(2)]
        joint.search_step(s, *halves, mine.amp)

    return step


def one_side(mine):
    device = joint.device_of(mine.gpu)
    torch.manual_seed(0)
    idle = timing.peak_memory(device)
    images = torch.randint(256, (mine.batch_size, 3, 32, 32), dtype=torch.uint8).to(device)
    labels = torch.randint(10, (mine.batch_size,)).to(device)
    build = usual_step if mine.side == "written out" else our_step
    step = build(mine, device)
    seconds = timing.time_step(lambda: step(images, labels), device, mine.steps)
    print(seconds, timing.peak_memory(device) - idle)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=64)
    timing.add_flags(parser)
    parser.add_argument("--side", choices=SIDES, help="one side, in this process: seconds and GiB")
    mine = parser.parse_args()
    if mine.side:
        return one_side(mine)

    size = f"C={mine.channels} L={mine.layers} batch {mine.batch_size}"
    print(f"{size}, {timing.machine(mine.gpu)}, {mine.rounds} rounds")
    seconds, memory = timing.take_turns(__file__, SIDES, mine.rounds)
    for side, what in SIDES.items():
        print(f"{side:12s} {seconds[side]:8.3f} s  {memory[side]:5.2f} GiB   {what}")
    for side in ("ours", "with policy"):
        faster = seconds["written out"] / seconds[side]
        share = memory[side] / memory["written out"]
        print(f"written out over {side}: {faster:.2f}; memory of {side} over written out: {share:.2f}")


if __name__ == "__main__":
    main()
