"""What a step costs on a GPU, in which layout, with which precision, compiled or not; and what the GPU waits for.

    python tests/benchmarks/gpu.py --out gpu.jsonl --darts darts      # a checkout of quark0/darts; nine minutes at most
    python tests/benchmarks/gpu.py --gpu -1 --tiny                    # the same with tiny networks on a CPU, as a trial

Every side runs in a process of its own, one after the other. It adds a line of JSON to --out as soon as it has its
figures: seconds a step (the median), the first step apart, GiB, kernels a step, the share of a profiled step in which
no kernel ran (the GPU waits), and the ten operations with most time. A side that is out of time or fails says so.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]
import common
import dha
import joint_darts_faa as joint
import parity
import timing

LAYOUTS = {"usual": torch.contiguous_format, "channels_last": torch.channels_last}
SIDES = [  # (name, layout, amp, mode of torch.compile); what matters most is first
    ("dha training", "usual", False, None),
    ("dha training", "channels_last", False, None),
    ("joint search", "usual", False, None),
    ("quark0/darts search", "usual", False, None),
    ("joint search, no policy", "usual", False, None),
    ("joint search", "channels_last", False, None),
    ("dha training", "usual", True, None),
    ("dha training", "usual", False, "default"),
    ("dha training", "usual", True, "default"),
    ("dha training", "usual", False, "reduce-overhead"),
    ("dha search", "usual", False, None),
    ("dha search", "usual", True, None),
    ("joint search", "usual", True, None),
    ("dha training", "channels_last", True, None),
    ("joint search", "channels_last", True, None),
]


def data_of(count: int, device: torch.device) -> common.Data:
    batch = common.shapes(count, 0)
    return common.Data(*batch, *batch, list(common.SHAPE_CLASSES)).to(device)


def dha_step(mine, device):
    """A step of dha.py: of the search, or of the training, where DARTS_V2 stands for what was found."""
    size = ["--channels", "4", "--layers", "3", "--batch-size", "8", "--auxiliary-weight", "0"] if mine.tiny else []
    given = ["--genotype", "DARTS_V2"] if mine.side == "dha training" else []
    args = dha.parse_args([*size, *given, *timing.NOT_MADE])
    args.amp = mine.amp
    data = data_of(args.batch_size, device)
    support = dha.to_support(common.GENOTYPES["DARTS_V2"]) if given else None
    s = dha.Learned(args, data, device, support)
    if given:
        s.net.drop_path_prob = torch.tensor(0.1, device=device)
    if mine.compile:
        s.model = torch.compile(s.net, mode=mine.compile)
    return lambda: dha.train_step(s, data.train_images, data.train_labels, args)


def joint_step(mine, device):
    """A step of the joint search."""
    batch = 4 if mine.tiny else 64
    size = ["--search-channels", "4", "--search-layers", "3"] if mine.tiny else []
    policy = ["--policy", "none"] if mine.side.endswith("no policy") else []
    s = joint.JointSearch(joint.parse_args([*size, *policy, *timing.NOT_MADE]), data_of(20, device), device)
    data = data_of(2 * batch, device)
    val = (data.train_images[:batch], data.train_labels[:batch])
    train = (data.train_images[batch:], data.train_labels[batch:])
    return lambda: joint.search_step(s, val, train, mine.amp)


def darts_step(mine, device):
    """A first-order step of quark0/darts' own search: its network and its architect, its optimizers' settings."""
    channels, layers, batch = (4, 3, 4) if mine.tiny else (16, 8, 64)
    model_search, architect = parity.import_from(Path(mine.darts) / "cnn", "model_search", "architect")
    if device.type == "cpu":
        torch.Tensor.cuda = nn.Module.cuda = lambda self: self
    net = model_search.Network(channels, 10, layers, nn.CrossEntropyLoss()).to(device)
    flags = argparse.Namespace(momentum=0.9, weight_decay=3e-4, arch_learning_rate=3e-4, arch_weight_decay=1e-3)
    upper = architect.Architect(net, flags)
    w = torch.optim.SGD(net.parameters(), 0.025, 0.9, weight_decay=3e-4)
    data = data_of(2 * batch, device)
    x = common.normalize(data.train_images, *[part.to(device) for part in common.mean_std(data.train_images)])
    y = data.train_labels

    def step():
        upper.step(None, None, x[:batch], y[:batch], 0.025, w, unrolled=False)
        w.zero_grad()
        F.cross_entropy(net(x[batch:]), y[batch:]).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 5)
        w.step()

    return step


def waiting(seen: profile) -> tuple[float, int]:
    """The share of the profiled time in which no kernel ran, and the number of kernels."""
    kernels = [event.time_range for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    if not kernels:
        return float("nan"), 0
    busy = 0
    end = min(kernel.start for kernel in kernels)
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        busy += max(0, kernel.end - max(end, kernel.start))
        end = max(end, kernel.end)
    started = min(event.time_range.start for event in seen.events())
    return 1 - busy / (end - started), len(kernels)


def one_side(mine) -> dict:
    device = dha.device_of(mine.gpu)
    common.layout = lambda device: LAYOUTS[mine.layout]  # in place of the choice by device
    torch.manual_seed(0)
    build = {"dha": dha_step, "joi": joint_step, "qua": darts_step}[mine.side[:3]]
    step = build(mine, device)

    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    first = time.perf_counter() - started  # with torch.compile: the time that it takes
    seconds = timing.time_step(step, device)
    memory = timing.peak_memory(device)

    activities = [ProfilerActivity.CPU]
    own = "self_cpu_time_total"
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        own = "self_device_time_total"
    with profile(activities=activities) as seen:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    waits, kernels = waiting(seen)
    largest = sorted(seen.key_averages(), key=lambda event: getattr(event, own), reverse=True)[:10]
    total = sum(getattr(event, own) for event in seen.key_averages())
    return {
        "seconds": round(seconds, 4),
        "first_step": round(first, 1),
        "GiB": round(memory, 2),
        "waits": round(waits, 3),
        "kernels": kernels,
        "largest": [f"{100 * getattr(event, own) / total:.0f} % {event.key[:60]} x {event.count}" for event in largest],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu.jsonl"))
    parser.add_argument("--darts", help="a checkout of quark0/darts; None: leave that side out")
    parser.add_argument("--gpu", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="tiny networks")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--side", help="one side, in this process")
    parser.add_argument("--layout", choices=LAYOUTS)
    parser.add_argument("--amp", action="store_true")
    parser.add_argument("--compile")
    mine = parser.parse_args()
    if mine.side:
        print(json.dumps(one_side(mine)))
        return

    ends = time.monotonic() + 60 * mine.minutes
    for side, layout, amp, compiled in SIDES:
        flags = ["--side", side, "--layout", layout]
        flags += ["--amp"] * amp + ["--compile", str(compiled)] * bool(compiled)
        record = {"side": side, "layout": layout, "amp": amp, "compile": compiled, "on": timing.machine(mine.gpu)}
        left = ends - time.monotonic()
        if left < 20 or (side.startswith("quark0") and not mine.darts):
            record["left_out"] = "no time is left" if left < 20 else "no --darts"
        else:
            try:
                command = [sys.executable, __file__, *sys.argv[1:], *flags]
                output = subprocess.run(command, capture_output=True, text=True, timeout=left, check=True).stdout
                record |= json.loads(output.splitlines()[-1])
            except subprocess.TimeoutExpired:
                record["left_out"] = "it was stopped: no time is left"
            except subprocess.CalledProcessError as error:
                record["failed"] = error.stderr.strip().splitlines()[-1]
        print(json.dumps(record), flush=True)
        with open(mine.out, "a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
