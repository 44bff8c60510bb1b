"""Several processes (torchrun). The oracle is one process on the joined batch, in float64; and that all hold the same."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import common
import dha
import joint_darts_faa as joint
from conftest import history, lines, only, result, stop_after_an_epoch, untimed, weights

START = "--out no-such-run --preset quick --gpu -1 --lr 0.03"
DHA = f"{START} --channels 4 --layers 3 --arch-lr 0.03 --b-scale 0.3"
KINDS = {
    "printed": (dha, f"{DHA} --updates printed --beta 1e-4"),
    "scale-free": (dha, f"{DHA} --updates scale-free --beta 10"),
    "joint": (joint, f"{START} --search-channels 2 --sub-policies 2 --stages 1"),
}
RANDOM = "--auxiliary-weight 0.4 --drop-path 0.3 --cutout 8 --label-smoothing 0.1".split()  # for dha


def test_gradients_become_their_mean(monkeypatch):
    """Of two processes: the other one's are added by a pretended all_reduce."""
    here, there = torch.randn(2, 7)
    params = [torch.zeros(2, 2, requires_grad=True), torch.zeros(1), torch.zeros(3, requires_grad=True)]
    params[0].grad, params[2].grad = here[:4].clone().view(2, 2), here[4:].clone()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda total: total.add_(there))
    dha.average_gradients(params)
    found = torch.cat([params[0].grad.flatten(), params[2].grad])
    assert torch.allclose(found, (here + there) / 2) and params[1].grad is None


# -------- What the processes compute; the oracle calls it too, as the only one --------------------------------------


@contextlib.contextmanager
def small():
    """The joint search, whose step takes long, has 1 node in a cell and 4 augmentations, of which none mixes images."""
    some = ("Rotate", "Solarize", "Color", "Equalize")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joint, "NODES", 1)
        patch.setattr(joint, "AUGMENTATIONS", {name: joint.AUGMENTATIONS[name] for name in some})
        yield patch


def build(kind, more=()):
    module, flags = KINDS[kind]
    args = module.parse_args([*flags.split(), *more])
    data = common.Data(*common.shapes(160, 1), *common.shapes(20, 2), list(common.SHAPE_CLASSES))
    torch.manual_seed(0)
    return (dha.Learned if module is dha else joint.JointSearch)(args, data, torch.device("cpu")), data, args


def share(data, i, rank, world):
    """This process's share of the i-th batch of 8."""
    part = slice(8 * i + rank, 8 * i + 8, world)
    return data.train_images[part], data.train_labels[part]


def step(s, data, args, i, rank, world):
    if isinstance(s, dha.Learned):
        return dha.train_step(s, *share(data, i, rank, world), args)
    return joint.search_step(s, share(data, i, rank, world), share(data, i + 10, rank, world))


def learned(s):
    """What a step moves: name -> tensors."""
    if isinstance(s, dha.Learned):
        found = {"w": s.theta, "b": list(s.net.b), "tau": [s.tau], "eta": [s.eta.values]}
    else:
        found = {"w": s.w, "alpha": s.alphas, "z": [s.policy.z], "p": [s.policy.p], "mu": [s.policy.mu]}
    return {name: [t.detach().clone() for t in tensors] for name, tensors in found.items()}


def at_random(kind, rank, world):
    """After 6 steps whose random numbers are this process's own: what it learned, what its batch norms saw, means."""
    s, data, args = build(kind, RANDOM if kind != "joint" else ())
    torch.manual_seed(1 + rank)
    s.net.train().drop_path_prob = args.drop_path
    totals = sum(step(s, data, args, i, rank, world) for i in range(3))
    if kind != "joint":
        with pytest.MonkeyPatch.context() as patch:
            if rank > 0:  # process 0's solution is everybody's
                patch.setattr(dha, "ista", lambda A, b, lam: torch.zeros(A.shape[0], A.shape[2]))
            dha.decode_and_freeze(s, args, 32, final=False)
    totals += sum(step(s, data, args, i, rank, world) for i in range(3, 6))
    found = learned(s)
    seen = [b.clone() for name, b in s.net.named_buffers() if "running" in name]
    support = s.net.support if kind != "joint" else s.net.genotype()
    means = dha.finite_means(totals / 6, found["w"], 1, "--lr")
    return {"learned": found, "seen": seen, "support": support, "means": means, "own": totals / 6}


def exact(kind, rank, world):
    """What is learned after 0, 1 and 3 steps in float64, where no image's part depends on other images."""
    with small() as patch:
        torch.set_default_dtype(torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        s, data, args = build(kind)
        s.net.eval()  # batch norm by its running statistics
        found = [learned(s)]
        if kind == "joint":
            patch.setattr(torch, "randint", lambda high, size, device: torch.zeros(size, dtype=torch.long))
            patch.setattr(joint, "relaxed_bernoulli", lambda p: p)
        else:  # pairs and magnitudes that the images give

            def sample_pairs(tau, count):
                return share(data, len(found) - 1, rank, world)[0].sum((1, 2, 3)).long() % 196

            def apply_pairs(images, pairs):
                for choice in (pairs // 14, pairs % 14):
                    images = dha.apply_each(images, choice, 2 * images.mean((1, 2, 3)) - 1)
                return images

            patch.setattr(dha, "sample_pairs", sample_pairs)
            patch.setattr(dha, "apply_pairs", apply_pairs)
        for i in range(3):
            step(s, data, args, i, rank, world)
            found.append(learned(s))
        torch.set_default_dtype(torch.float32)
    return [found[0], found[1], found[3]]


def work(folder):
    """A process of a group, as its environment says."""
    torch.set_num_threads(1)
    ranks = {"rank": dha.RANK, "world_size": dha.WORLD}
    dist.init_process_group("gloo", f"file://{folder}/meet", timedelta(hours=1), **ranks)
    found = {}
    for kind in KINDS:
        with small():
            found[kind] = at_random(kind, dha.RANK, dha.WORLD), exact(kind, dha.RANK, dha.WORLD)
    torch.save(found, f"{folder}/{dha.RANK}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What both processes of a group found."""
    folder, group = tmp_path_factory.mktemp("group"), []
    paths = os.pathsep.join([str(Path(dha.__file__).parent), str(Path(__file__).parent)])
    own = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "test"}
    command = [sys.executable, "-c", "import sys, test_ranks; test_ranks.work(sys.argv[1])", str(folder)]
    for rank in ("0", "1"):
        env = {**os.environ, **own, "RANK": rank}
        group.append(subprocess.Popen(command, cwd=folder, env=env, stderr=subprocess.PIPE, text=True))
    said = [process.communicate()[1] for process in group]
    assert not any(process.returncode for process in group), "\n".join(said)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_processes_hold_the_same_though_their_images_differ(found, kind):
    first, other = (process[kind][0] for process in found)
    for name, tensors in first["learned"].items():
        assert all(map(torch.equal, tensors, other["learned"][name])), name
    assert first["support"] == other["support"] and first["means"] == other["means"]
    assert not all(map(torch.equal, first["seen"], other["seen"])) and not torch.equal(first["own"], other["own"])
    assert first["means"] == pytest.approx(((first["own"] + other["own"]) / 2).tolist(), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_one_processs_on_the_joined_batch(found, kind, one_thread):
    wanted = exact(kind, 0, 1)
    for process in found:
        for mine, other in zip(process[kind][1], wanted, strict=True):
            for name in other:
                for a, b in zip(mine[name], other[name], strict=True):
                    assert (a - b).abs().max() <= 1e-9, name
    for name, before in wanted[0].items():
        moved = torch.cat([(a - b).abs().flatten() for a, b in zip(before, wanted[-1][name])])
        assert moved.max() > 1e-4, name


# -------- Whole runs ------------------------------------------------------------------------------------------------

TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node 2"


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_with_two(script, done, tmp_path, monkeypatch):
    """After its first epoch, whose record stays; those of the others come from other batches. One process talks."""
    stop_after_an_epoch(monkeypatch, script, "--out", tmp_path / "run")
    process = script.process("--out", tmp_path / "run", "--resume", launch=TORCHRUN)
    said = process.communicate()[0]
    assert process.returncode == 0, said
    assert len(re.findall(r"^epoch \d+  ", said, re.M)) == len(script.phases) - 1
    mine, wanted = untimed(lines(tmp_path / "run")), untimed(lines(done))
    assert [record["phase"] for record in mine] == script.phases
    assert mine[0] == wanted[0] and mine[1].keys() == wanted[1].keys() and mine[1] != wanted[1]
    assert all(value.isfinite().all() for value in weights(tmp_path / "run").values())


@pytest.mark.slow
@only("dha", "faa-darts")
@pytest.mark.parametrize("flags", ["--wrong-flag", "--data-dir nothing"])
def test_a_mistake_has_its_line(script, flags, tmp_path):
    process = script.process(*flags.split(), "--out", tmp_path / "run", launch=TORCHRUN)
    said = process.communicate()[0]
    assert process.returncode != 0 and not (tmp_path / "run").exists()
    assert re.search("^([a-z_]+[.]py: )?error: ", said, re.M), said


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
@only("dha")
def test_a_killed_process_ends_the_others_and_one_process_goes_on(script, tmp_path):
    out = tmp_path / "run"
    process = script.process("--search-epochs", "30", "--out", out, launch=TORCHRUN)
    assert any(line.startswith("epoch 2  ") for line in iter(process.stdout.readline, ""))
    ranks = ranks_of(process.pid)
    assert sorted(ranks) == [0, 1]
    os.kill(ranks[1], signal.SIGKILL)
    said = process.communicate()[0]  # torchrun's own report is in it
    assert process.returncode != 0 and not any(Path(f"/proc/{pid}").exists() for pid in ranks.values()), said
    kept = history(out)
    assert 1 <= len(kept) < 30 and not (out / "result.json").exists()
    assert script.run("--search-epochs", "30", "--out", out, "--resume") == 0
    assert lines(out)[: len(kept)] == kept and len(lines(out)) == result(out)["epochs"] == 31
