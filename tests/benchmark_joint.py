"""What a step of the joint search costs: both sides of every comparison in turn, in one process; asserts nothing.

python tests/benchmark_joint.py                                   # C=16 L=8 batch 64, about 10 minutes on 2 cores
python tests/benchmark_joint.py --channels 8 --layers 5 --batch-size 32
"""

import argparse
import contextlib
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
import common
import joint_darts_faa as joint
from written_out import WrittenOut


class Usual:
    """DARTS' search step as it is commonly written: the loop, NCHW, and a whole backward pass in both halves."""

    def __init__(self, args):
        self.net = WrittenOut(args.search_channels, 10, args.search_layers)
        alphas = [self.net.alphas_normal, self.net.alphas_reduce]
        self.weights = [p for name, p in self.net.named_parameters() if not name.startswith("alphas")]
        self.alpha = torch.optim.Adam(alphas, args.arch_lr, (0.5, 0.999), weight_decay=1e-3)
        self.w = torch.optim.SGD(self.weights, args.lr, 0.9, weight_decay=args.weight_decay)

    def step(self, x, y):
        for optimizer in (self.alpha, self.w):
            optimizer.zero_grad()
            F.cross_entropy(self.net(x), y).backward()
            if optimizer is self.w:
                torch.nn.utils.clip_grad_norm_(self.weights, 5)
            optimizer.step()


class Ours:
    """The same step on the same images by DartsSupernet: the scripts' search_step without data and policy."""

    def __init__(self, args):
        self.net = joint.DartsSupernet(args.search_channels, 10, args.search_layers)
        self.net.to(memory_format=torch.channels_last)
        self.alphas, self.weights = self.net.alphas(), self.net.weights()
        self.alpha = torch.optim.Adam(self.alphas, args.arch_lr, (0.5, 0.999), weight_decay=1e-3)
        self.w = torch.optim.SGD(self.weights, args.lr, 0.9, weight_decay=args.weight_decay)

    def step(self, x, y, selective=True):
        x = x.contiguous(memory_format=torch.channels_last)
        for optimizer, learns, rests in ((self.alpha, self.alphas, self.weights), (self.w, self.weights, self.alphas)):
            joint.set_learning(learns, True)
            joint.set_learning(rests, not selective)
            F.cross_entropy(self.net(x), y).backward()
            if optimizer is self.w:
                torch.nn.utils.clip_grad_norm_(self.weights, 5)
            optimizer.step()


@contextlib.contextmanager
def replaced(owner, name, value):
    real = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, real)


def plain_depthwise(x, weight, dilation):
    k = weight.shape[-1]
    return F.conv2d(x, weight, padding=k // 2 * dilation, dilation=dilation, groups=len(weight))


def unfolded(x, conv, bn, gain=None, part=slice(None)):
    weight = conv.weight[part]
    return joint.scaled_batch_norm(F.conv2d(x, weight, groups=x.shape[1] // weight.shape[1]), bn, gain, part)


def timed(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def in_turn(sides: dict, rounds: int) -> dict:
    """Median seconds of every side; they take turns, and the first round warms up."""
    times = {name: [] for name in sides}
    for i in range(rounds + 1):
        for name, function in sides.items():
            seconds = timed(function)
            if i:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", choices=["usual", "ours"], help="two steps of one side, then the process's peak")
    mine = parser.parse_args()
    size = ["--search-channels", str(mine.channels), "--search-layers", str(mine.layers)]
    args = joint.parse_args([*size, "--search-batch-size", str(mine.batch_size)])[0]
    torch.manual_seed(0)
    x, y = torch.randn(mine.batch_size, 3, 32, 32), torch.randint(10, (mine.batch_size,))
    if mine.memory:
        side = Usual(args) if mine.memory == "usual" else Ours(args)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        side.step(x, y), side.step(x, y)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)
        return

    print(
        f"C={mine.channels} L={mine.layers} batch {mine.batch_size}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    peak = {}
    for side in ("usual", "ours"):
        command = [sys.executable, __file__, *sys.argv[1:], "--memory", side]
        peak[side] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    print(f"peak memory above an idle process: usual {peak['usual']:.2f} GiB, ours {peak['ours']:.2f} GiB")
    print(f"ours over usual: {peak['ours'] / peak['usual']:.2f}")

    usual, ours = Usual(args), Ours(args)

    def without_fast_depthwise():
        with replaced(common._Depthwise, "apply", plain_depthwise):
            ours.step(x, y)

    def without_folding():
        with replaced(joint, "pointwise_bn", unfolded):
            ours.step(x, y)

    def one_by_one():
        with replaced(joint, "edges_at_once", lambda x, edges: 1):
            ours.step(x, y)

    median = in_turn(
        {
            "usual: the loop, NCHW, whole backward passes": lambda: usual.step(x, y),
            "ours": lambda: ours.step(x, y),
            "ours, all gradients in both halves": lambda: ours.step(x, y, selective=False),
            "ours, edges one by one": one_by_one,
            "ours, oneDNN's gradients of depthwise convolutions": without_fast_depthwise,
            "ours, 1x1 convolution and batch norm apart": without_folding,
        },
        mine.rounds,
    )
    first, second, *rest = median.items()
    for name, seconds in median.items():
        print(f"{name:52s} {seconds:7.2f} s   {seconds / second[1]:5.2f} x ours")
    print(f"usual over ours: {first[1] / second[1]:.2f}")

    policy, images = joint.Policy(), torch.rand(128, 3, 32, 32)

    def soft(batches):
        for batch in batches:
            policy(batch).sum().backward()

    median = in_turn({"whole": lambda: soft([images]), "8 chunks": lambda: soft(images.chunk(8))}, 10)
    print(
        f"policy at batch 128, forward and backward: whole {1000 * median['whole']:.0f} ms, 8 chunks {1000 * median['8 chunks']:.0f} ms"
    )
    print(f"chunks over whole: {median['8 chunks'] / median['whole']:.2f}")
    batch = torch.rand(mine.batch_size, 3, 32, 32)

    def in_a_step():
        policy(batch).sum().backward()
        with torch.no_grad():
            policy(batch)

    seconds = in_turn({"policy": in_a_step}, 10)["policy"]
    print(f"policy in a step: {1000 * seconds:.0f} ms, {seconds / (second[1] + seconds):.1%} of it")


if __name__ == "__main__":
    main()
