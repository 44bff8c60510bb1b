"""Several processes (torchrun). The oracle is one process on the joined batches, in float64."""

import contextlib
import os
import re
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
from conftest import lines, only, stop_after_an_epoch, untimed, weights

START = "--out no-such-run --preset quick --gpu -1 --lr 0.03"
DHA = f"{START} --channels 4 --layers 3 --arch-lr 0.03 --b-scale 0.3"
KINDS = {
    "printed": (dha, f"{DHA} --updates printed --beta 1e-4"),
    "scale-free": (dha, f"{DHA} --updates scale-free --beta 10"),
    "joint": (joint, f"{START} --search-channels 2 --sub-policies 2 --stages 1"),
}


@pytest.mark.parametrize("module", [joint, dha])
def test_gradients_and_means_are_averaged_and_draws_differ(module, monkeypatch):
    """Two processes: the other one's numbers are added by a pretended all_reduce."""
    here, there = torch.randn(2, 7)
    params = [torch.zeros(2, 2, requires_grad=True), torch.zeros(1), torch.zeros(3, requires_grad=True)]
    params[0].grad, params[2].grad = here[:4].clone().view(2, 2), here[4:].clone()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda total: total.add_(there))
    module.average_gradients(params)
    found = torch.cat([params[0].grad.flatten(), params[2].grad])
    assert torch.allclose(found, (here + there) / 2) and params[1].grad is None
    assert module.finite_means(here.clone(), [here], 1, "") == pytest.approx(((here + there) / 2).tolist())

    def seeds(*of):
        return module.seed_epoch(*of), torch.initial_seed()

    first = seeds(3, 4)
    assert first == seeds(3, 4) and not {*first} & {*seeds(3, 5), *seeds(4, 4)}
    monkeypatch.setattr(module, "RANK", 1)
    assert seeds(3, 4)[0] == first[0] and seeds(3, 4)[1] != first[1]


# -------- What a process computes; the oracle calls it too, as the only one -----------------------------------------


@contextlib.contextmanager
def in_float64(kind):
    """The joint search, whose step takes long, has 1 node in a cell and 4 augmentations, of which none mixes images."""
    some = ("Rotate", "Solarize", "Color", "Equalize")
    torch.set_default_dtype(torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        if kind == "joint":
            patch.setattr(joint, "NODES", 1)
            patch.setattr(joint, "AUGMENTATIONS", {name: joint.AUGMENTATIONS[name] for name in some})
        yield patch
    torch.set_default_dtype(torch.float32)


def compute(kind, rank, world):
    """What is learned before, and after 1 and 3 steps on batches of 8, where no image's part depends on other images.

    After the third step of dha process 0 decodes alpha; the others find another one.
    """
    module, flags = KINDS[kind]
    with in_float64(kind) as patch:
        args = module.parse_args(flags.split())
        images, labels = common.shapes(160, 1)
        data = common.Data(images, labels, *common.shapes(20, 2), list(common.SHAPE_CLASSES))
        torch.manual_seed(0)
        s = (dha.Learned if module is dha else joint.JointSearch)(args, data, torch.device("cpu"))
        s.net.eval()  # batch norm by its running statistics

        def share(i):
            part = slice(8 * i + rank, 8 * i + 8, world)
            return images[part], labels[part]

        def learned():
            if module is joint:
                found = {"w": s.w, "alpha": s.alphas, "z": [s.policy.z], "p": [s.policy.p], "mu": [s.policy.mu]}
            else:
                found = {"w": s.theta, "b": [*s.net.b], "alpha": [s.net.alpha], "tau": [s.tau], "eta": [s.eta.values]}
            return {name: [t.detach().clone() for t in tensors] for name, tensors in found.items()}

        def apply_pairs(images, pairs):  # magnitudes that the images give
            for choice in (pairs // 14, pairs % 14):
                images = dha.apply_each(images, choice, 2 * images.mean((1, 2, 3)) - 1)
            return images

        found = [learned()]
        if module is joint:
            patch.setattr(torch, "randint", lambda high, size, device: torch.zeros(size, dtype=torch.long))
            patch.setattr(joint, "relaxed_bernoulli", lambda p: p)
        else:
            pairs = lambda tau, count: share(len(found) - 1)[0].sum((1, 2, 3)).long() % 196  # noqa: E731
            patch.setattr(dha, "sample_pairs", pairs)
            patch.setattr(dha, "apply_pairs", apply_pairs)
        for i in range(3):
            if module is joint:
                joint.search_step(s, share(i), share(i + 10))
            else:
                dha.train_step(s, *share(i), args)
            if i == 2 and module is dha:
                if rank > 0:
                    patch.setattr(dha, "ista", lambda A, b, lam: torch.zeros(A.shape[0], A.shape[2]))
                dha.decode_and_freeze(s, args, 32, final=False)
            found.append(learned())
    return [found[0], found[1], found[3]]


def work(folder):
    """A process of a group, as its environment says."""
    torch.set_num_threads(1)
    ranks = {"rank": dha.RANK, "world_size": dha.WORLD}
    dist.init_process_group("gloo", f"file://{folder}/meet", timedelta(hours=1), **ranks)
    torch.save({kind: compute(kind, dha.RANK, dha.WORLD) for kind in KINDS}, f"{folder}/{dha.RANK}.pt")
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
def test_steps_are_one_processs_on_the_joined_batches(found, kind):
    wanted = compute(kind, 0, 1)
    for process in found:
        for mine, other in zip(process[kind], wanted, strict=True):
            for name in other:
                for a, b in zip(mine[name], other[name], strict=True):
                    assert (a - b).abs().max() <= 1e-9, name
    for name, before in wanted[0].items():
        moved = torch.cat([(a - b).abs().flatten() for a, b in zip(before, wanted[-1][name])])
        assert moved.max() > 1e-6, name


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
def test_a_mistake_has_its_line(script, tmp_path):
    process = script.process("--data-dir", "nothing", "--out", tmp_path / "run", launch=TORCHRUN)
    said = process.communicate()[0]
    assert process.returncode != 0 and not (tmp_path / "run").exists()
    assert re.search("^error: .*--data-dir", said, re.M), said
