"""Faster AutoAugment, baseline_sequential.py's own part, and --compare. (Its stages are in test_runs.py.)

Oracles: published sizes, losses and penalties written out with autograd, finite differences, tables by hand.
"""

import math
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

import baseline_sequential as baseline
import common
import dha
import joint_darts_faa as joint
from conftest import call

CPU = torch.device("cpu")


def small(*flags):
    """The flags of a small policy search, and its parts."""
    args = baseline.parse_args(["--method", "faa-darts", "--preset", "quick", "--gpu", "-1", *flags])
    return args, baseline.PolicySearch(args, 10, CPU)


def halves():
    """Two batches of 8: images in [0, 1], labels."""
    images, labels = common.shapes(16, 1)
    return zip((images / 255).chunk(2), labels.chunk(2))


# -------- The network and the penalty -------------------------------------------------------------------------------


def test_wide_resnet_has_the_published_size_and_two_heads():
    net = baseline.WideResNet(10, 40, 2)
    head = common.count_parameters(net.critic)
    assert common.count_parameters(net) - head == 2_243_546  # "2.2 M"
    assert head == 16_641
    for size in (32, 17, 8):
        logits, value = baseline.WideResNet(7, 10, 1)(torch.rand(3, 3, size, size))
        assert logits.shape == (3, 7) and value.shape == (3,)


# -------- The two steps ---------------------------------------------------------------------------------------------


def test_a_step_moves_only_its_own():
    args, s = small()
    first, second = halves()

    def moved(step, *batch):
        before = [[p.detach().clone() for p in module.parameters()] for module in (s.net, s.policy)]
        s.net.zero_grad()
        step(s, *batch, args)
        pairs = zip((s.net, s.policy), before)
        return [sum(not torch.equal(p, q) for p, q in zip(module.parameters(), old)) for module, old in pairs]

    count = len(list(s.net.parameters()))
    assert moved(baseline.critic_step, *first, second[0]) == [count - 1, 0]  # the critic's last bias has no gradient
    assert all(p.grad is None for p in s.policy.parameters())
    assert moved(baseline.policy_step, *second) == [0, 3]
    assert all(p.grad is None for p in s.net.parameters())
    assert all(0 <= v.min() and v.max() <= 1 for v in (s.policy.p, s.policy.mu))


@pytest.mark.parametrize("norm", ["pixel", "image"])
def test_steps_follow_the_written_out_losses(norm):
    flags = f"--class-weight 0.3 --critic-weight 0.7 --penalty 5 --penalty-norm {norm} --faa-lr 0 --policy-lr 0"
    args, s = small(*flags.split())  # the parameters stay where the gradients were
    (real, labels), (other, others) = halves()
    for group in (*s.net_optimizer.param_groups, *s.policy_optimizer.param_groups):
        assert group["betas"] == (0.0, 0.999)

    def stretched(x):  # the network sees [-1, 1]
        return (x - 0.5) / 0.5

    torch.manual_seed(7)
    measured = baseline.critic_step(s, real, labels, other, args).tolist()
    mine = [p.grad.clone() for p in s.net.parameters()]
    torch.manual_seed(7)
    with torch.no_grad():
        augmented = stretched(s.policy(other))
    logits, value = s.net(stretched(real))
    fake, t = s.net(augmented)[1], torch.rand(8).view(-1, 1, 1, 1)
    x = (t * stretched(real) + (1 - t) * augmented).requires_grad_(True)
    (slope,) = torch.autograd.grad(s.net(x)[1].sum(), x, create_graph=True)
    penalty = ((slope.square().sum(1 if norm == "pixel" else (1, 2, 3)).sqrt() - 1) ** 2).mean()
    class_loss = F.cross_entropy(logits, labels)
    loss = 0.7 * (fake.mean() - value.mean() + 5.0 * penalty) + 0.3 * class_loss
    expected = torch.autograd.grad(loss, list(s.net.parameters()), allow_unused=True)
    for p, q in zip(mine, expected):
        assert torch.allclose(p, torch.zeros_like(p) if q is None else q, atol=1e-5, rtol=1e-4)
    accuracy = 100 * (logits.argmax(1) == labels).float().mean()
    wanted = [value.mean() - fake.mean(), penalty, class_loss, accuracy]
    assert measured == pytest.approx([v.item() for v in wanted], abs=1e-5, rel=1e-4)

    torch.manual_seed(8)
    measured = baseline.policy_step(s, other, others, args).tolist()
    mine = [p.grad.clone() for p in s.policy.parameters()]
    torch.manual_seed(8)
    logits, value = s.net(stretched(s.policy(other)))
    class_loss = F.cross_entropy(logits, others)
    loss = -0.7 * value.mean() + 0.3 * class_loss
    for p, q in zip(mine, torch.autograd.grad(loss, list(s.policy.parameters()))):
        assert torch.allclose(p, q, atol=1e-6, rtol=1e-4)
    wanted = [-value.mean(), class_loss, 100 * (logits.argmax(1) == others).float().mean()]
    assert measured == pytest.approx([v.item() for v in wanted], abs=1e-5, rel=1e-4)


def test_amp_reaches_the_network_of_both_steps(monkeypatch):
    args, s = small()
    first, second = halves()
    kinds, real = [], F.linear
    monkeypatch.setattr(F, "linear", lambda x, *rest: kinds.append(real(x, *rest).dtype) or real(x, *rest))
    for args.amp, kind in ((False, torch.float32), (True, torch.bfloat16)):
        kinds.clear()
        measured = baseline.critic_step(s, *first, second[0], args)
        baseline.policy_step(s, *second, args)
        assert set(kinds) == {kind} and measured.dtype == torch.float32


# -------- --compare -------------------------------------------------------------------------------------------------


def fake_run(folder: Path, script: ModuleType, command: str, accuracy: float, method: str = "DHA") -> str:
    """What --compare reads of a run with this command line."""
    args = script.parse_args([*command.split(), "--out", str(folder)])
    runs = {folder: args}
    if script is baseline:
        argv = baseline.without_own_flags(command.split())
        handed = ["--genotype", str(folder / "search" / "genotype.json")]
        runs[folder / "train"] = (dha if args.method == "dha" else joint).parse_args([*argv, *handed])
    for path, flags in runs.items():
        path.mkdir(parents=True)
        joint.save(path / "config.json", {"args": vars(flags)})
    result = {"test_accuracy": accuracy, "params": 3_300_000, "gpu_hours": 8.0, "search_seconds": 1800.0}
    joint.save(folder / "result.json", {**result, "dataset": args.dataset, "seed": args.seed, "method": method})
    return str(folder)


def rows_of(table: str) -> list[list[str]]:
    head, line, *rows = table.splitlines()
    assert head.count("|") == line.count("|") == 9 and set(line) == set("| -")
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_compare_prints_mean_and_std(tmp_path):
    runs = [fake_run(tmp_path / "d", joint, "--policy none --dataset cifar100", 80.0, "DARTS")]
    for seed, accuracy in enumerate((97.0, 97.3, 97.9)):
        command = f"--method faa-darts --seed {seed}"
        runs.append(fake_run(tmp_path / f"b{seed}", baseline, command, accuracy, "Sequential"))
    std = math.sqrt(sum((a - 97.4) ** 2 for a in (97.0, 97.3, 97.9)) / 2)
    assert rows_of(baseline.compare(runs)) == [
        ["Sequential", "cifar10", "3", f"97.40 ± {std:.2f}", "3.3 M", "0.50", "8.00", ""],
        ["DARTS", "cifar100", "1", "80.00", "3.3 M", "0.50", "8.00", ""],
    ]


QUICK, FOLDER = "--preset quick", "--dataset folder"
SPLITS = [  # flags of two runs of one row, then of another row; the settings that are named
    (dha, f"{QUICK} --gpu 0", f"{QUICK} --lr 5e-2 --workers 2", f"{QUICK} --lr 0.01", "lr 0.05", "lr 0.01"),
    (dha, FOLDER, f"{FOLDER} --workers 1", f"{FOLDER} --data-dir dogs", "data_dir data", "data_dir dogs"),
    (dha, QUICK, f"{QUICK} --data-dir x", f"{QUICK} --amp --gpu 0", "amp False", "amp True"),
    (joint, QUICK, f"{QUICK} --compile", f"{QUICK} --policy none", "policy search", "policy none"),
    (baseline, "--method dha --gpu 0 --lr 0.01", "--method dha --gpu 1 --lr=1e-2", "--method dha",
     "lr 0.01", "lr 0.0255"),
    (baseline, "--method faa-darts", "--method faa-darts --workers 0", "--method faa-darts --penalty 1",
     "penalty 10.0", "penalty 1.0"),
]  # fmt: skip


@pytest.mark.parametrize("script, one, same, other, first, second", SPLITS)
def test_compare_keeps_different_settings_apart_and_names_them(script, one, same, other, first, second, tmp_path):
    runs = [fake_run(tmp_path / "0", script, one, 90.0)]
    runs.append(fake_run(tmp_path / "1", script, f"{same} --seed 1", 92.0))
    runs.append(fake_run(tmp_path / "2", script, f"{other} --seed 2", 80.0))
    assert {row[3]: row[7] for row in rows_of(baseline.compare(runs))} == {"91.00 ± 1.41": first, "80.00": second}


def test_compare_counts_a_run_once(tmp_path, capsys):
    run, copy = (fake_run(tmp_path / name, dha, "--seed 1", accuracy) for name, accuracy in (("a", 90.0), ("b", 80.0)))
    several = [run, run, "a", str(tmp_path / "b" / ".." / "a")]
    assert [row[2:4] for row in rows_of(baseline.compare(several))] == [["1", "90.00"]]
    assert [row[2:4] for row in rows_of(baseline.compare([run, copy]))] == [["1", "85.00 ± 7.07"]]
    assert "has a seed more than once" in capsys.readouterr().out


DAMAGE = {
    "no folder": shutil.rmtree,
    "no config": lambda run: (run / "config.json").unlink(),
    "cut off": lambda run: (run / "result.json").write_text("{"),
    "a list": lambda run: (run / "result.json").write_text("[]"),
    "a search only": lambda run: joint.save(run / "result.json", {"method": "DARTS", "seed": 0}),
    "not text": lambda run: (run / "result.json").write_bytes(b"\xff\0"),
    "no args": lambda run: (run / "config.json").write_text("{}"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_compare_leaves_out_what_is_no_finished_run(tmp_path, kind, capsys, one_line):
    """With a note. If nothing is left, that is an error."""
    run, other = (fake_run(tmp_path / name, dha, "", 90.0) for name in "ab")
    DAMAGE[kind](Path(run))
    assert call(baseline, "--compare", run, other) == 0
    note, *table = capsys.readouterr().out.splitlines()
    assert note.startswith(f"note: {run} is left out") and len(rows_of("\n".join(table))) == 1
    assert call(baseline, "--compare", run) == 2
    assert "no finished run" in one_line()
