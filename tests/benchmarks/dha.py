"""What the parts of DHA cost; the sides take turns, each in its own process. Prints ratios, asserts nothing.

python tests/benchmarks/dha.py                                  # C=36 L=20 batch 96; on a GPU if there is one
python tests/benchmarks/dha.py --channels 16 --layers 8 --rounds 5
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import common
import dha
import timing

SIDES = {
    "all": "a step of DA + HPO + NAS",
    "nas": "a step of NAS only",
    "policy": "of a step with DA: draw pairs, apply two operations to each image",
    "ista": "once an epoch: Eq. 4 for all nodes",
}


def one_side(mine):
    device = dha.device_of(mine.gpu)
    idle = timing.peak_memory(device)
    size = ["--channels", str(mine.channels), "--layers", str(mine.layers), "--batch-size", str(mine.batch_size)]
    off = ["--no-da", "--no-hpo"] if mine.side == "nas" else []
    args = dha.parse_args([*size, *off, *timing.NOT_MADE])
    args.amp = mine.amp

    torch.manual_seed(0)
    batch = common.shapes(mine.batch_size, 0)
    data = common.Data(*batch, *batch, list(common.SHAPE_CLASSES)).to(device)
    s = dha.Learned(args, data, device)
    x = data.train_images / 255
    steps = {
        "all": lambda: dha.train_step(s, data.train_images, data.train_labels, args),
        "nas": lambda: dha.train_step(s, data.train_images, data.train_labels, args),
        "policy": lambda: dha.apply_pairs(x, dha.sample_pairs(s.tau, len(x))),
        "ista": lambda: s.net.set_alpha(s.net.decode()),
    }
    seconds = timing.time_step(steps[mine.side], device, mine.steps)
    print(seconds, timing.peak_memory(device) - idle)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=36)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=96)
    timing.add_flags(parser)
    parser.add_argument("--side", choices=SIDES, help="one side, in this process: seconds and GiB")
    mine = parser.parse_args()
    if mine.side:
        return one_side(mine)

    print(
        f"C={mine.channels} L={mine.layers} batch {mine.batch_size}, {timing.machine(mine.gpu)}, {mine.rounds} rounds"
    )
    seconds, memory = timing.take_turns(__file__, SIDES, mine.rounds)
    for side, what in SIDES.items():
        print(f"{side:7s} {1000 * seconds[side]:9.1f} ms   {memory[side]:5.2f} GiB above idle   {what}")
    print(f"all over nas: {seconds['all'] / seconds['nas']:.3f}")
    print(f"policy over all: {seconds['policy'] / seconds['all']:.4f}")


if __name__ == "__main__":
    main()
