"""Several processes: all hold the same, their step is one's on the joined batch; one dies; runs resume."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from datetime import timedelta
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_runs import TORCHRUN, history, lines, only, processes, result

import common
import dha
import joint_darts_faa as joint

CPU = torch.device("cpu")
TINY = "--preset quick --gpu -1 --channels 4 --arch-lr 0.03 --b-scale 0.3 --weight-decay 5e-3"
MOVING = "--max-lr-step 1 --max-wd-step 1 --beta-wd 1 --beta-lr"  # freely, within the ranges
KINDS = {
    "cells": (dha, f"{TINY} --layers 3 {MOVING} 0.3"),
    "mobilenet": (dha, f"{TINY} --space mobilenet --layers 11 {MOVING} 0.03"),
    "joint": (joint, "--preset quick --gpu -1 --search-channels 2 --sub-policies 2 --stages 1 --lr 0.05"),
}
RANDOM = {"cells": "--auxiliary-weight 0.4 --drop-path 0.3 --cutout 8 --label-smoothing 0.1",
          "mobilenet": "--drop-path 0.3 --cutout 8"}


@contextlib.contextmanager
def small():
    """One thread; 1 node a cell and 4 augmentations in the joint search, whose step takes a second else."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joint, "NODES", 1)
        some = ("Rotate", "Solarize", "Color", "Equalize")  # none mixes images
        patch.setattr(joint, "AUGMENTATIONS", {name: joint.AUGMENTATIONS[name] for name in some})
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


@pytest.fixture
def alone():
    """This process, as the only one, computes as the group does."""
    with small():
        yield


# -------- What the processes compute; the oracles call it too, as the only one ------------------------------

@cache
def few_images():
    return common.Data(*common.shapes(160, 1), *common.shapes(103, 2), list(common.SHAPE_CLASSES))


def build(kind, more=""):
    module, flags = KINDS[kind]
    args, data = module.parse_args([*flags.split(), *more.split()]), few_images()
    torch.manual_seed(0)
    return (dha.start if module is dha else joint.JointSearch)(args, data, CPU), data, args


def step(s, data, args, i, rank, world, dtype=torch.float32):
    """Step i on batches of 8, of which this process sees its share."""
    def share(i):
        images = data.train_images[8 * i + rank : 8 * i + 8 : world].to(dtype)
        return images, data.train_labels[8 * i + rank : 8 * i + 8 : world]

    if isinstance(s, dha.DHA):
        dha.train_step(s, *share(i), args)
    else:
        joint.search_step(s, share(i), share((i + 10) % 20), args.grad_clip, args.amp)


def learned(s):
    """What a step moves: name -> tensors."""
    if isinstance(s, dha.DHA):
        found = {"w": s.theta, "b": s.net.b, "alpha": [s.net.alpha]}
        found |= {"tau": [s.tau], "lr": [s.lr], "wd": [s.wd]}
    else:
        found = {"w": s.weights, "alpha": s.alphas, "z": [s.policy.z], "p": [s.policy.p], "mu": [s.policy.mu]}
    return {name: [t.detach().clone() for t in tensors] for name, tensors in found.items()}


def at_random(kind, rank, world):
    """Before and after 20 steps whose random numbers are this process's own; what its batch norm saw."""
    s, data, args = build(kind, RANDOM.get(kind, ""))
    before = learned(s)
    torch.manual_seed(1 + rank)
    s.net.train().drop_path_prob = args.drop_path
    for i in range(20):
        step(s, data, args, i, rank, world)
        if i == 9 and kind != "joint":
            s.net.recover(args.lasso)
    support = s.net.support if kind != "joint" else s.net.genotype()
    seen = [b.clone() for name, b in s.net.named_buffers() if "running" in name]
    return {"before": before, "after": learned(s), "support": support, "seen": seen}


def apply_of_images(images, pairs):
    """dha.apply_pairs, with magnitudes that the images give."""
    for choice in (pairs // 14, pairs % 14):
        images = dha.apply_each(images, choice, 2 * images.mean((1, 2, 3)) - 1)
    return images


def exact(kind, rank, world):
    """Before, after one and after three steps in float64, where no image's part depends on other images."""
    s, data, args = build(kind)
    s.net.double().eval()  # batch norm by its running statistics
    s.mean, s.std = s.mean.double(), s.std.double()
    found = []
    with pytest.MonkeyPatch.context() as patch:
        if kind == "joint":
            s.policy.double()
            patch.setattr(torch, "randint", lambda high, size, device: torch.zeros(size, dtype=torch.long))
            patch.setattr(joint, "relaxed_bernoulli", lambda p: p)
        else:
            s.tau = s.tau.detach().double().requires_grad_()
            s.lr, s.wd = s.lr.double(), s.wd.double()
            part = lambda: data.train_images[8 * len(found) + rank : 8 * len(found) + 8 : world]
            patch.setattr(dha, "sample_pairs", lambda tau, count: part().sum((1, 2, 3)).long() % 196)
            patch.setattr(dha, "apply_pairs", apply_of_images)
        for i in range(3):
            found.append(learned(s))
            step(s, data, args, i, rank, world, torch.float64)
    return [found[0], found[1], learned(s)]


def evaluated(rank, world):
    """The accuracy on so many images by a network that has other batch statistics in every process, of labels
    that two thirds of rank 0's answers equal; and the network's mode after it."""
    s, data, _ = build("cells")
    images, count = data.test_images, len(data.test_images)
    for seed in (0, rank):
        torch.manual_seed(seed)
        for module in s.net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.2, 1)
        if seed == 0:
            with torch.no_grad():
                answers = s.net.eval()(common.normalize(images, s.mean, s.std)).argmax(1)
            labels = (answers + (torch.arange(count) % 3 == 0)) % 10
    s.net.train()
    some = [(n, (images[:n], labels[:n], s.mean, s.std)) for n in (count, 20, 5, 1)]
    return {n: dha.evaluate(s.net, *given, rank, world) for n, given in some} | {"training": s.net.training}


def work(folder):
    """A process of a group, as its environment says."""
    ranks = {"rank": dha.RANK, "world_size": dha.WORLD}
    dist.init_process_group("gloo", f"file://{folder}/meet", timedelta(seconds=60), **ranks)
    with small():
        found = {"evaluated": evaluated(dha.RANK, dha.WORLD)}
        for kind in KINDS:
            found[kind] = at_random(kind, dha.RANK, dha.WORLD), exact(kind, dha.RANK, dha.WORLD)
    torch.save(found, f"{folder}/{dha.RANK}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def found(request, tmp_path_factory):
    """What every process of a group found."""
    folder, group = tmp_path_factory.mktemp("group"), []
    paths = os.pathsep.join([str(Path(dha.__file__).parent), str(Path(__file__).parent)])
    own = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(request.param)}
    command = [sys.executable, "-c", "import sys, test_ranks; test_ranks.work(sys.argv[1])", str(folder)]
    for rank in range(request.param):
        env = os.environ | own | {"RANK": str(rank)}
        group.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=300)[1] for process in group]
    assert not any(process.returncode for process in group), "\n".join(said)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(request.param)]


same = lambda a, b: all(map(torch.equal, a, b))


@pytest.mark.parametrize("kind", KINDS)
def test_processes_hold_the_same_though_their_images_differ(found, kind):
    first, *others = [process[kind][0] for process in found]
    assert not any(same([old], [new]) for name in first["before"].keys() - {"w", "alpha"}
                   for old, new in zip(first["before"][name], first["after"][name]))
    for name in ("w", "alpha"):  # weights that never ran stay, and alpha where ISTA finds none
        assert not same(first["before"][name], first["after"][name])
    for other in others:
        assert not same(first["seen"], other["seen"])
        assert other["support"] == first["support"]
        for name, tensors in first["after"].items():
            assert len(tensors) == len(other["after"][name]) and same(tensors, other["after"][name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_one_process_s_on_the_joined_batch(found, kind, alone):
    wanted = exact(kind, 0, 1)
    for process in found:
        for steps, (mine, other) in zip((0, 1, 3), zip(process[kind][1], wanted, strict=True)):
            assert mine.keys() == other.keys()
            for name in other:
                for a, b in zip(mine[name], other[name], strict=True):
                    assert torch.allclose(a, b, rtol=0, atol=1e-9 if steps else 0), (name, steps)
    before, _, after = wanted
    for name in before.keys() - ({"alpha"} if kind != "joint" else {}):  # which no step of DHA moves
        moved = torch.cat([(a - b).abs().flatten() for a, b in zip(before[name], after[name])])
        assert moved.max() > 1e-4, name
    for name, (low, high) in {"lr": dha.LR_RANGE, "wd": dha.WD_RANGE}.items():
        assert kind == "joint" or low < after[name][0] < high


def test_evaluation_is_shared_and_goes_by_rank_0(found, alone):
    wanted = evaluated(0, 1)
    assert [process["evaluated"] for process in found] == [wanted] * len(found)
    assert wanted["training"] and wanted[20] == 65 and wanted[5] == 60 and wanted[1] == 0


# -------- Deaths and resumes --------------------------------------------------------------------------------

def rank_of(pid):
    """RANK in a process's environment, None if it has none."""
    found = re.search(rb"(?:^|\0)RANK=(\d+)", Path(f"/proc/{pid}/environ").read_bytes())
    return int(found[1]) if found else None


@pytest.mark.slow
@only("joint", "dha")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others_and_the_run_resumes(script, victim, tmp_path):
    out, flags = tmp_path / "run", ["--search-epochs", "30", "--out", tmp_path / "run"]
    process = script.process(*flags, launch=TORCHRUN)
    assert any("search  epoch 1  " in line for line in iter(process.stdout.readline, ""))
    ranks = {rank_of(pid): pid for pid in processes(str(out)) if rank_of(pid) is not None}
    assert sorted(ranks) == [0, 1]
    os.kill(ranks[victim], signal.SIGKILL)
    said = process.communicate(timeout=30)[0]  # torchrun's own report is in it
    assert process.returncode != 0 and not processes(str(out))
    assert f'File "{script.module.__file__}"' not in said and "KeyboardInterrupt" not in said, said
    last = [x for x in re.split(r"[\r\n]+", said) if x.startswith(("error: ", "stopped; go on"))]
    assert 1 - (victim == 0) <= len(last) <= 1, said  # torchrun's signal can come before gloo's error
    kept = history(out)
    assert 1 <= len(kept) < 30 and not (out / "result.json").exists()
    process = script.process(*flags, "--resume")
    said = process.communicate()[0]
    assert process.returncode == 0, said
    assert lines(out)[: len(kept)] == kept and result(out)["search_epochs"] == 30
    one, two = result(out)["seconds"] / 3600, result(out)["gpu_hours"]
    assert one < two < 2 * one  # some epochs on two processes


@pytest.mark.slow
@only("joint", "dha")
def test_a_run_of_one_process_resumes_on_two(script, done, copy):
    """Before its last epoch: the others' records stay, and that of the last comes from other batches."""
    os.replace(copy / "checkpoint.previous.pt", copy / "checkpoint.pt")
    process = script.process("--out", copy, "--resume", launch=TORCHRUN)
    said = process.communicate()[0]
    assert process.returncode == 0, said
    mine, wanted = lines(copy), lines(done)
    assert mine[:-1] == wanted[:-1] and mine[-1].keys() == wanted[-1].keys() and mine[-1] != wanted[-1]
    one, two = result(copy)["seconds"] / 3600, result(copy)["gpu_hours"]
    assert one < two < 2 * one
