"""What the benchmarks share: a step is timed, and sides take turns, each in a process of its own."""

import resource
import statistics
import subprocess
import sys
import time

import torch

NOT_MADE = ["--out", "not-made"]  # for parse_args: a run directory that does not exist, and that nothing makes


def add_flags(parser):
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="timed steps of a process: 2, on a GPU 20")
    parser.add_argument("--gpu", type=int, default=0 if torch.cuda.is_available() else -1, help="-1 is the CPU")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast (GPU only)")


def time_step(step, device, steps=None):
    """The median time, in seconds, of calls of `step`, after others that warm up: one, or on a GPU five, in which cuDNN
    tries its algorithms. steps: how many are timed; None: 2, or 20 on a GPU."""
    on_gpu = device.type == "cuda"
    warm_up = 5 if on_gpu else 1
    times = []
    for _ in range(warm_up + (steps or (20 if on_gpu else 2))):
        start = time.perf_counter()
        step()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[warm_up:])


def peak_memory(device):
    """The most memory up to now, in GiB: of tensors on a GPU, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def take_turns(file, sides, rounds):
    """Run `file` with its own flags and --side SIDE for every side in turn, `rounds` times.

    Every process prints its seconds and its GiB. Returns two dictionaries, side: median.
    """
    seconds = {side: [] for side in sides}
    memory = {side: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            command = [sys.executable, file, *sys.argv[1:], "--side", side]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            one, other = run.stdout.split()[-2:]
            seconds[side].append(float(one))
            memory[side].append(float(other))
    return [{side: statistics.median(numbers) for side, numbers in found.items()} for found in (seconds, memory)]


def machine(gpu):
    """For a heading: versions, and what computes."""
    where = torch.cuda.get_device_name(gpu) if gpu >= 0 else f"CPU, {torch.get_num_threads()} threads"
    return f"torch {torch.__version__}, {where}"
