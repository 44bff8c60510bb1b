"""What the parts of DHA cost: both sides of every comparison in turn, in one process; prints ratios, asserts nothing.

python tests/benchmark_dha.py                                    # C=36, L=20, batch 96: minutes on a GPU, an hour on 2 cores
python tests/benchmark_dha.py --channels 16 --layers 8 --rounds 5
"""

import argparse
import resource
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import dha


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=36)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gpu", type=int, default=0 if torch.cuda.is_available() else -1)
    parser.add_argument("--amp", action="store_true")
    mine = parser.parse_args()
    device = torch.device("cuda", mine.gpu) if mine.gpu >= 0 else torch.device("cpu")
    size = ["--channels", str(mine.channels), "--layers", str(mine.layers), "--batch-size", str(mine.batch_size)]
    data = common.load_data("shapes").to(device)
    images, labels = data.train_images[: mine.batch_size], data.train_labels[: mine.batch_size]

    def search(*flags: str):
        args = dha.parse_args([*size, *flags, *(["--amp"] if mine.amp else [])])[0]
        torch.manual_seed(0)
        return dha.Search(args, data, device), args

    def timed(function) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    full, bare = search(), search("--no-da", "--no-hpo")
    x = images.float() / 255
    sides = {
        "step, DA + HPO + NAS": lambda: dha.train_step(full[0], images, labels, full[1]),
        "step, NAS only": lambda: dha.train_step(bare[0], images, labels, bare[1]),
        "policy: draw pairs, two operations an image": lambda: dha.apply_pairs(
            x, dha.sample_pairs(full[0].tau, len(x))
        ),
        "ISTA, all nodes": lambda: full[0].net.recover(),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(mine.rounds + 1):  # the first round warms up
        for name, function in sides.items():
            seconds = timed(function)
            if i:
                times[name].append(seconds)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"C={mine.channels} L={mine.layers} batch {mine.batch_size}, torch {torch.__version__}, {where}")
    for name, values in times.items():
        print(f"{name:45s} median {1000 * statistics.median(values):9.1f} ms   min {1000 * min(values):9.1f} ms")
    with_all, without, policy, _ = (statistics.median(v) for v in times.values())
    print(f"DA + HPO + NAS over NAS only: {with_all / without:.3f}")
    print(f"policy over the step:         {policy / with_all:.3f}")
    if device.type == "cuda":
        print(f"peak memory: {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB")
    else:
        print(f"peak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
