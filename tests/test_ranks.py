"""Several processes: all hold the same, their step is one's on the joined batch; one dies; runs resume."""

import contextlib
import math
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

import common
import dha
import joint_darts_faa as joint
from conftest import SCRIPTS
from test_runs import TORCHRUN, history, lines, only, result, stop_after_an_epoch, untimed

CPU = torch.device("cpu")
START = "--out no-such-run --preset quick --gpu -1"
TINY = f"{START} --channels 4 --arch-lr 0.03 --b-scale 0.3 --weight-decay 5e-3 --beta 10"
KINDS = {
    "cells": (dha, f"{TINY} --layers 3"),
    "mobilenet": (dha, f"{TINY} --space mobilenet --layers 6"),
    "joint": (joint, f"{START} --search-channels 2 --sub-policies 2 --stages 1 --lr 0.05"),
}
RANDOM = {"cells": "--auxiliary-weight 0.4 --drop-path 0.3 --cutout 8 --label-smoothing 0.1",
          "mobilenet": "--drop-path 0.3 --cutout 8"}  # fmt: skip


@contextlib.contextmanager
def small():
    """One thread; the joint search, whose step takes long: 1 node a cell, 4 augmentations."""
    threads = torch.get_num_threads()
    some = ("Rotate", "Solarize", "Color", "Equalize")  # none mixes images
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joint, "NODES", 1)
        patch.setattr(joint, "AUGMENTATIONS", {name: joint.AUGMENTATIONS[name] for name in some})
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


# -------- What the processes compute; the oracle calls it too, as the only one ------------------------------


@cache
def few_images():
    return common.Data(*common.shapes(160, 1), *common.shapes(20, 2), list(common.SHAPE_CLASSES))


def build(kind, more=""):
    module, flags = KINDS[kind]
    args, data = module.parse_args([*flags.split(), *more.split()]), few_images()
    torch.manual_seed(0)
    return (dha.Learned if module is dha else joint.JointSearch)(args, data, CPU), data, args


def step(s, data, args, i, rank, world, dtype=torch.float32):
    """Step i on batches of 8, of which this process sees its share."""

    def share(i):
        images = data.train_images[8 * i + rank : 8 * i + 8 : world].to(dtype)
        return images, data.train_labels[8 * i + rank : 8 * i + 8 : world]

    if isinstance(s, dha.Learned):
        return dha.train_step(s, *share(i), args)
    return joint.search_step(s, share(i), share((i + 10) % 20))


def learned(s):
    """What a step moves: name -> tensors."""
    if isinstance(s, dha.Learned):
        found = {"w": s.theta, "b": list(s.net.b), "alpha": [s.net.alpha], "tau": [s.tau], "eta": [s.eta.logs]}
    else:
        found = {"w": s.w, "alpha": s.alphas, "z": [s.policy.z], "p": [s.policy.p], "mu": [s.policy.mu]}
    return {name: [t.detach().clone() for t in tensors] for name, tensors in found.items()}


def at_random(kind, rank, world):
    """Before and after 10 steps whose random numbers are this process's own; what its batch norm saw; its means."""
    s, data, args = build(kind, RANDOM.get(kind, ""))
    before = learned(s)
    torch.manual_seed(1 + rank)
    s.net.train().drop_path_prob = args.drop_path
    totals = sum(step(s, data, args, i, rank, world) for i in range(5))
    if kind != "joint":
        if rank > 0:  # rank 0's solution is everybody's
            real, dha.ista = dha.ista, lambda A, b, lam: torch.zeros(A.shape[0], A.shape[2])
        dha.decode_and_freeze(s, args, 32, final=False)
        if rank > 0:
            dha.ista = real
    totals += sum(step(s, data, args, i, rank, world) for i in range(5, 10))
    means = dha.finite_means(totals / 10, learned(s)["w"], 1, "--lr")
    support = s.net.support if kind != "joint" else s.net.genotype()
    seen = [b.clone() for name, b in s.net.named_buffers() if "running" in name]
    return {
        "before": before, "after": learned(s), "support": support, "seen": seen, "means": means, "own": totals / 10
    }  # fmt: skip


def apply_of_images(images, pairs):
    """dha.apply_pairs, with magnitudes that the images give."""
    for choice in (pairs // 14, pairs % 14):
        images = dha.apply_each(images, choice, 2 * images.mean((1, 2, 3)) - 1)
    return images


def exact(kind, rank, world):
    """Before, after one and after three steps in float64, where no image's part depends on other images."""
    s, data, args = build(kind, "" if kind == "joint" else "--da-weight p")  # ratio subtracts a process's own mean
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
            s.eta = dha.Eta(args.lr, args.weight_decay, 1.0, 20)
            s.eta.logs.data = s.eta.logs.data.double()

            def part():
                return data.train_images[8 * len(found) - 8 + rank : 8 * len(found) : world]

            patch.setattr(dha, "sample_pairs", lambda tau, count: part().sum((1, 2, 3)).long() % 196)
            patch.setattr(dha, "apply_pairs", apply_of_images)
        for i in range(3):
            found.append(learned(s))
            step(s, data, args, i, rank, world, torch.float64)
    return [found[0], found[1], learned(s)]


def work(folder):
    """A process of a group, as its environment says."""
    ranks = {"rank": dha.RANK, "world_size": dha.WORLD}
    dist.init_process_group("gloo", f"file://{folder}/meet", timedelta(hours=1), **ranks)
    with small():
        found = {}
        for kind in KINDS:
            found[kind] = at_random(kind, dha.RANK, dha.WORLD), exact(kind, dha.RANK, dha.WORLD)
    torch.save(found, f"{folder}/{dha.RANK}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def found(request, tmp_path_factory):
    """What every process of a group found."""
    folder, group = tmp_path_factory.mktemp("group"), []
    paths = os.pathsep.join([str(Path(dha.__file__).parent), str(Path(__file__).parent)])
    own = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(request.param), "TORCHELASTIC_RUN_ID": "test"}
    command = [sys.executable, "-c", "import sys, test_ranks; test_ranks.work(sys.argv[1])", str(folder)]
    for rank in range(request.param):
        env = os.environ | own | {"RANK": str(rank)}
        group.append(subprocess.Popen(command, cwd=folder, env=env, stderr=subprocess.PIPE, text=True))
    said = [process.communicate()[1] for process in group]
    assert not any(process.returncode for process in group), "\n".join(said)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(request.param)]


def same(a, b):
    return all(map(torch.equal, a, b))


@pytest.mark.parametrize("kind", KINDS)
def test_processes_hold_the_same_though_their_images_differ(found, kind):
    first, *others = [process[kind][0] for process in found]
    for name in first["before"]:  # weights that never ran stay, and alpha where ISTA finds none
        moved = [not torch.equal(*pair) for pair in zip(first["before"][name], first["after"][name])]
        assert any(moved) if name in ("w", "alpha") else all(moved), name
    for other in others:
        assert not same(first["seen"], other["seen"])
        assert other["support"] == first["support"]
        for name, tensors in first["after"].items():
            assert len(tensors) == len(other["after"][name]) and same(tensors, other["after"][name]), name
        assert other["means"] == first["means"] and not torch.equal(other["own"], first["own"])
    own = torch.stack([process[kind][0]["own"] for process in found])
    assert first["means"] == pytest.approx(own.mean(0).tolist(), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_one_process_s_on_the_joined_batch(found, kind):
    with small():
        wanted = exact(kind, 0, 1)
    for process in found:
        for steps, (mine, other) in zip((0, 1, 3), zip(process[kind][1], wanted, strict=True)):
            assert mine.keys() == other.keys()
            for name in other:
                for a, b in zip(mine[name], other[name], strict=True):
                    within = 1e-5 * a.abs().max() if name == "tau" else 1e-9 if steps else 0  # tau: of float32 losses
                    assert torch.allclose(a, b, rtol=0, atol=float(within)), (name, steps)
    before, _, after = wanted
    for name in before.keys() - ({"alpha"} if kind != "joint" else {}):  # which no step of DHA moves
        moved = torch.cat([(a - b).abs().flatten() for a, b in zip(before[name], after[name])])
        assert moved.max() > 1e-4, name
    if kind != "joint":
        for log, (low, high) in zip(after["eta"][0].tolist(), (dha.LR_RANGE, dha.WD_RANGE)):
            assert math.log(low) < log < math.log(high)


# -------- Deaths and resumes --------------------------------------------------------------------------------


def ranks_of(parent):
    """The processes that torchrun has started: RANK -> pid."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError, IndexError):
            rank = re.search(rb"(?:^|\0)RANK=(\d+)", path.read_bytes())
            if rank and int((path.parent / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                found[int(rank[1])] = int(path.parent.name)
    return found


@pytest.mark.slow
@only("joint", "dha", "faa-darts")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others_and_the_run_resumes(script, victim, tmp_path):
    out = tmp_path / "run"
    first = "--faa-epochs" if script.name == "faa-darts" else "--search-epochs"
    process = script.process(first, "30", "--out", out, launch=TORCHRUN)
    assert any(line.startswith("epoch 2  ") for line in iter(process.stdout.readline, ""))
    ranks = ranks_of(process.pid)
    assert sorted(ranks) == [0, 1]
    os.kill(ranks[victim], signal.SIGKILL)
    said = process.communicate()[0]  # torchrun's own report is in it
    assert process.returncode != 0 and not any(Path(f"/proc/{pid}").exists() for pid in ranks.values()), said
    kept = history(out)
    assert 1 <= len(kept) < 30 and not (out / "result.json").exists()
    process = script.process(first, "30", "--out", out, "--resume")
    said = process.communicate()[0]
    assert process.returncode == 0, said
    assert lines(out)[: len(kept)] == kept and len(lines(out)) == result(out)["epochs"]
    assert [record["phase"] for record in lines(out)].count(kept[0]["phase"]) == 30


@pytest.mark.slow
@only(*SCRIPTS)
def test_a_run_of_one_process_resumes_on_two(script, done, tmp_path, monkeypatch):
    """After its first epoch, whose record stays; those of the others come from other batches."""
    stop_after_an_epoch(monkeypatch, script, "--out", tmp_path / "run")
    process = script.process("--out", tmp_path / "run", "--resume", launch=TORCHRUN)
    said = process.communicate()[0]
    assert process.returncode == 0, said
    mine, wanted = untimed(lines(tmp_path / "run")), untimed(lines(done))
    assert mine[0] == wanted[0] and mine[1].keys() == wanted[1].keys() and mine[1] != wanted[1]
