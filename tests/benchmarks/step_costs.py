"""Where the time of one step goes: torch's profiler on a step of each script at the papers' sizes.

    python tests/benchmarks/step_costs.py joint       # C=16 L=8 batch 64, with policy
    python tests/benchmarks/step_costs.py dha         # C=36 L=20 batch 96
    python tests/benchmarks/step_costs.py faa         # WRN-40-2, batch 128, half of it augmented
    python tests/benchmarks/step_costs.py train       # DARTS_V2 at C=36 L=20 batch 96, as joint trains it
    python tests/benchmarks/step_costs.py imagenet    # dha --preset imagenet, batch 128; or mobilenet

On a CPU one step warms up and the next is timed; on a GPU (--gpu 0) five warm up, and the median of 20 is given. One
more is profiled. Prints seconds, peak memory above that of the idle process, and the operators that took most of the
profiled step.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[2]))
import baseline_sequential as baseline
import common
import dha
import joint_darts_faa as joint
import timing


def steps_of(name, device, amp):
    """One step of a script at the paper's size, as a function; and how many of them a full run has."""
    torch.manual_seed(0)
    if name in ("imagenet", "mobilenet"):
        space = ["--space", "mobilenet"] if name == "mobilenet" else []
        args = dha.parse_args(["--preset", "imagenet", *space, *timing.NOT_MADE])
        args.amp = amp
        x = torch.randint(256, (128, 3, 224, 224), dtype=torch.uint8)
        y = torch.randint(1000, (128,))
        data = common.Data(x, y, x[:2], y[:2], [str(k) for k in range(1000)]).to(device)
        s = dha.Learned(args, data, device)
        steps = (args.search_epochs + args.train_epochs) * 10_009
        return lambda: dha.train_step(s, data.train_images, data.train_labels, args), steps

    batch = common.shapes(128, 0)
    data = common.Data(*batch, *batch, list(common.SHAPE_CLASSES)).to(device)
    x, y = data.train_images, data.train_labels

    if name == "joint":
        s = joint.JointSearch(joint.parse_args(timing.NOT_MADE), data, device)
        return lambda: joint.search_step(s, (x[:64], y[:64]), (x[64:], y[64:]), amp), 50 * 390

    if name == "dha":
        args = dha.parse_args(timing.NOT_MADE)
        args.amp = amp
        s = dha.Learned(args, data, device)
        return lambda: dha.train_step(s, x[:96], y[:96], args), 720 * 520

    if name == "faa":
        args = baseline.parse_args(["--method", "faa-darts", *timing.NOT_MADE])
        s = baseline.PolicySearch(args, len(data.classes), device)
        real, other = (x / 255).chunk(2)

        def step():
            baseline.critic_step(s, real, y[:64], other, args)
            baseline.policy_step(s, other, y[64:], args)

        return step, 20 * 31

    net = common.Network(common.GENOTYPES["DARTS_V2"], 10, 36, 20, auxiliary=True)
    net.to(device, memory_format=torch.channels_last)
    net.drop_path_prob = 0.1
    optimizer = torch.optim.SGD(net.parameters(), 0.025, 0.9, weight_decay=3e-4)
    policy = joint.Policy().to(device)
    mean, std = common.mean_std(x)

    def step():
        images = common.cutout(common.normalize(joint.augment(x[:96] / 255, policy), mean, std), 16)
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            logits, auxiliary = net(images)
        optimizer.zero_grad()
        (F.cross_entropy(logits.float(), y[:96]) + 0.4 * F.cross_entropy(auxiliary.float(), y[:96])).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 5)
        optimizer.step()

    return step, 600 * 520


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", choices=["joint", "dha", "faa", "train", "imagenet", "mobilenet"])
    parser.add_argument("--gpu", type=int, default=-1)
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast (GPU only; not for faa)")
    parser.add_argument("--rows", type=int, default=12)
    mine = parser.parse_args()
    device = dha.device_of(mine.gpu)
    idle = timing.peak_memory(device)
    step, count = steps_of(mine.script, device, mine.amp)
    seconds = timing.time_step(step, device, steps=None if mine.gpu >= 0 else 1)
    memory = timing.peak_memory(device) - idle
    print(
        f"{mine.script}, {timing.machine(mine.gpu)}: {seconds:.3f} s per step, {memory:.2f} GiB; "
        f"a full run has {count:,} steps"
    )

    activities = [ProfilerActivity.CPU]
    own = "self_cpu_time_total"
    if mine.gpu >= 0:
        activities.append(ProfilerActivity.CUDA)
        own = "self_device_time_total"
    with profile(activities=activities) as seen:
        step()
        if mine.gpu >= 0:
            torch.cuda.synchronize()
    spent = [(getattr(event, own), event.count, event.key) for event in seen.key_averages()]
    total = sum(row[0] for row in spent)
    for time_of, calls, key in sorted(spent, reverse=True)[: mine.rows]:
        print(f"{100 * time_of / total:5.1f} %  {calls:6d} calls  {key}")


if __name__ == "__main__":
    main()
