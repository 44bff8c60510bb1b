"""Where the time of one step goes: torch's profiler on a step of each script at the papers' sizes.

    python tests/benchmarks/step_costs.py joint       # C=16 L=8 batch 64, with policy
    python tests/benchmarks/step_costs.py dha         # C=36 L=20 batch 96
    python tests/benchmarks/step_costs.py faa         # WRN-40-2, batch 128, half of it augmented
    python tests/benchmarks/step_costs.py train       # DARTS_V2 at C=36 L=20 batch 96, as joint trains it
    python tests/benchmarks/step_costs.py imagenet    # dha --preset imagenet, batch 128; or mobilenet

One step warms up, the next is timed, the one after it profiled. Prints seconds, peak memory above the idle
process, and the operators that took most of the profiled step. On a GPU: --gpu 0.
"""

import argparse
import resource
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[2]))
import baseline_sequential as baseline
import common
import dha
import joint_darts_faa as joint


def steps_of(name: str, device: torch.device) -> tuple:
    """One step of a script at the paper's size, as a function; and how many of them a full run has."""
    torch.manual_seed(0)
    batch = common.shapes(128, 0)
    data = common.Data(*batch, *batch, list(common.SHAPE_CLASSES)).to(device)
    x, y = data.train_images, data.train_labels
    if name == "joint":
        s = joint.JointSearch(joint.parse_args([]), data, device)
        return lambda: joint.search_step(s, (x[:64], y[:64]), (x[64:], y[64:]), 5.0, False), 50 * 390
    if name == "dha":
        args = dha.parse_args([])
        s = dha.start(args, data, device)
        return lambda: dha.train_step(s, x[:96], y[:96], args), 720 * 520
    if name in ("imagenet", "mobilenet"):
        args = dha.parse_args(["--preset", "imagenet", *(["--space", name] if name == "mobilenet" else [])])
        x, y = torch.randint(256, (128, 3, 224, 224), dtype=torch.uint8), torch.randint(1000, (128,))
        data = common.Data(x, y, x[:2], y[:2], list(map(str, range(1000)))).to(device)
        s = dha.start(args, data, device)
        steps = (args.search_epochs + args.train_epochs) * 10_009
        return lambda: dha.train_step(s, data.train_images, data.train_labels, args), steps
    if name == "faa":
        args = baseline.parse_args(["--method", "faa-darts"])
        s = baseline.PolicySearch(args, data, device)
        real, other = x.float().div(255).chunk(2)

        def step():
            baseline.critic_step(s, real, y[:64], other, args)
            baseline.policy_step(s, other, y[64:], args)

        return step, 20 * 31
    net = common.Network(common.GENOTYPES["DARTS_V2"], 10, 36, 20, True)
    net.to(device, memory_format=torch.channels_last)
    optimizer, policy = torch.optim.SGD(net.parameters(), 0.025, 0.9), joint.Policy().to(device)
    mean, std = common.mean_std(x)
    net.drop_path_prob = 0.1

    def step():
        images = common.normalize(joint.augment(x[:96] / 255, policy), mean, std)
        logits, auxiliary = net(images)
        optimizer.zero_grad()
        (F.cross_entropy(logits, y[:96]) + 0.4 * F.cross_entropy(auxiliary, y[:96])).backward()
        optimizer.step()

    return step, 600 * 520


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("script", choices="joint dha faa train imagenet mobilenet".split())
    parser.add_argument("--gpu", type=int, default=-1)
    parser.add_argument("--rows", type=int, default=12)
    mine = parser.parse_args()
    device = torch.device("cuda", mine.gpu) if mine.gpu >= 0 else torch.device("cpu")
    idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step, count = steps_of(mine.script, device)

    def timed() -> float:
        start = time.perf_counter()
        step()
        if mine.gpu >= 0:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    timed()
    seconds = timed()
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - idle) / 2**20
    if mine.gpu >= 0:
        memory = torch.cuda.max_memory_allocated() / 2**30
    both = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if mine.gpu >= 0 else [])]
    with profile(activities=both) as seen:
        timed()
    own = "self_device_time_total" if mine.gpu >= 0 else "self_cpu_time_total"
    spent = [(getattr(event, own), event.count, event.key) for event in seen.key_averages()]
    total = sum(row[0] for row in spent)
    hours = seconds * count / 3600
    print(f"{mine.script}: {seconds:.2f} s a step, {memory:.2f} GiB; {count:,} steps, a full run: {hours:,.1f} h")
    for time_of, calls, key in sorted(spent, reverse=True)[: mine.rows]:
        print(f"{100 * time_of / total:5.1f} %  {calls:6d} calls  {key}")


if __name__ == "__main__":
    main()
