"""baseline_sequential.py: the network, the critic's penalty, the two steps, the stages and the comparison."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import baseline_sequential as baseline
import common
import dha
import joint_darts_faa as joint
from test_runs import one_line_error, signals_as_before  # noqa: F401


def small(**kwargs):
    argv = ["--method", "faa-darts", "--preset", "quick", "--gpu", "-1"]
    args = baseline.parse_args(argv)[0]
    return type(args)(**vars(args) | kwargs)


@pytest.fixture
def search():
    torch.manual_seed(0)
    data = common.load_data("shapes", limit_train=40, limit_test=10)
    return baseline.PolicySearch(small(), data, torch.device("cpu")), data


def batch(data, first, count):
    part = slice(first, first + count)
    return data.train_images[part].float() / 255, data.train_labels[part]


def test_wide_resnet_has_the_published_size():
    net = baseline.WideResNet(10, 40, 2)
    head = common.count_parameters(net.critic)
    widths, expected = (16, 32, 64, 128), 3 * 16 * 9
    for before, after in zip(widths, widths[1:]):
        expected += before * after * 9 + before * after + 2 * before + 2 * after + after * after * 9  # with a shortcut
        expected += 5 * (2 * after * after * 9 + 4 * after)
    expected += 2 * 128 + 128 * 10 + 10
    assert common.count_parameters(net) - head == expected == 2_243_546  # "2.2 M"
    assert head == 16_641


@pytest.mark.parametrize("size", [32, 17, 8])
def test_wide_resnet_has_two_heads(size):
    logits, value = baseline.WideResNet(7, 10, 1)(torch.rand(3, 3, size, size))
    assert logits.shape == (3, 7) and value.shape == (3,)


def test_gradient_penalty_of_a_quadratic_critic():
    """critic(x) = x^T A x / 2 with symmetric A has the gradient A x: everything can be written out."""
    torch.manual_seed(0)
    real, augmented = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64)
    share = torch.rand(4, dtype=torch.float64)
    A = torch.randn(12, 12, dtype=torch.float64)
    A = (A + A.T).requires_grad_(True)
    critic = lambda x: 0.5 * ((x.flatten(1) @ A) * x.flatten(1)).sum(1)
    between = (share[:, None] * real.flatten(1) + (1 - share)[:, None] * augmented.flatten(1)).detach()
    B = (A + A.T) / 2
    expected = (((between @ B).square().sum(1).sqrt() - 1) ** 2).mean()
    mine = baseline.gradient_penalty(critic, real, augmented, share)
    assert torch.allclose(mine, expected, rtol=1e-12)
    assert torch.allclose(*(torch.autograd.grad(v, A)[0] for v in (mine, expected)), rtol=1e-10)


def test_second_derivative_of_the_penalty_by_finite_differences():
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3),
        torch.nn.BatchNorm2d(4),
        torch.nn.Softplus(),
        torch.nn.Flatten(),
        torch.nn.Linear(64, 1),
    ).double()
    real, augmented, share = torch.rand(2, 5, 3, 6, 6).double().unbind() + (torch.rand(5).double(),)

    def penalty(*params):
        named = dict(zip(dict(net.named_parameters()), params))
        critic = lambda x: torch.func.functional_call(net, named, (x,)).squeeze(1)
        return baseline.gradient_penalty(critic, real, augmented, share)

    assert torch.autograd.gradcheck(penalty, tuple(p.detach().clone().requires_grad_() for p in net.parameters()))


def test_penalty_through_the_wide_resnet_by_finite_differences():
    torch.manual_seed(1)
    net = baseline.WideResNet(3, 10, 1).double()
    real, augmented, share = torch.rand(2, 4, 3, 8, 8).double().unbind() + (torch.rand(4).double(),)
    params = [p for name, p in net.named_parameters() if not name.startswith("classifier")]
    penalty = lambda: baseline.gradient_penalty(lambda x: net(x)[1], real, augmented, share)
    gradient = torch.autograd.grad(penalty(), params, allow_unused=True)
    gradient = [torch.zeros_like(p) if g is None else g for p, g in zip(params, gradient)]  # a last bias has none
    direction = [torch.randn_like(p) for p in params]
    slope = sum(float((g * d).sum()) for g, d in zip(gradient, direction))
    values, eps = [], 1e-7
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(params, direction):
                p.add_(d, alpha=sign * eps)
        values.append(float(penalty()))
        with torch.no_grad():
            for p, d in zip(params, direction):
                p.sub_(d, alpha=sign * eps)
    assert slope == pytest.approx((values[0] - values[1]) / (2 * eps), rel=1e-5)


def test_a_step_moves_only_its_own(search):
    s, data = search
    copy = lambda module: [p.detach().clone() for p in module.parameters()]
    changed = lambda module, old: [not torch.equal(p, q) for p, q in zip(module.parameters(), old)]
    net, policy = copy(s.net), copy(s.policy)
    baseline.critic_step(s, *batch(data, 0, 8), batch(data, 8, 8)[0], small())
    assert not any(changed(s.policy, policy)) and sum(changed(s.net, net)) >= len(net) - 1  # the critic's last bias
    net = copy(s.net)
    baseline.policy_step(s, *batch(data, 8, 8), small())
    assert all(changed(s.policy, policy)) and not any(changed(s.net, net))
    assert all(0 <= float(v.min()) and float(v.max()) <= 1 for v in (s.policy.p, s.policy.mu))


def test_steps_follow_the_written_out_losses(search):
    s, data = search
    (real, labels), (other, other_labels) = batch(data, 0, 8), batch(data, 8, 8)
    args = small(class_weight=0.3, critic_weight=0.7, penalty=5.0, faa_lr=0.0, policy_lr=0.0)
    s = baseline.PolicySearch(args, data, torch.device("cpu"))
    for group in (*s.net_optimizer.param_groups, *s.policy_optimizer.param_groups):
        assert group["lr"] == 0 and group["betas"] == (0.0, 0.999)

    torch.manual_seed(7)
    measured = baseline.critic_step(s, real, labels, other, args)
    mine = [p.grad.clone() for p in s.net.parameters()]
    torch.manual_seed(7)
    normal = lambda x: (x - s.mean.view(1, 3, 1, 1)) / s.std.view(1, 3, 1, 1)
    with torch.no_grad():
        augmented = normal(s.policy(other))
    logits, value = s.net(normal(real))
    fake = s.net(augmented)[1]
    t = torch.rand(8).view(-1, 1, 1, 1)
    x = (t * normal(real) + (1 - t) * augmented).requires_grad_(True)
    slope = torch.autograd.grad(s.net(x)[1].sum(), x, create_graph=True)[0].square().sum((1, 2, 3)).sqrt()
    wasserstein = fake.mean() - value.mean() + 5.0 * ((slope - 1) ** 2).mean()
    loss = 0.7 * wasserstein + 0.3 * F.cross_entropy(logits, labels)
    expected = torch.autograd.grad(loss, list(s.net.parameters()), allow_unused=True)
    for p, q in zip(mine, expected):
        assert torch.allclose(p, torch.zeros_like(p) if q is None else q, atol=1e-5, rtol=1e-4)
    assert float(measured[0]) == pytest.approx(float(value.mean() - fake.mean()), abs=1e-5)

    torch.manual_seed(8)
    baseline.policy_step(s, other, other_labels, args)
    mine = [p.grad.clone() for p in s.policy.parameters()]
    torch.manual_seed(8)
    logits, value = s.net(normal(s.policy(other)))
    loss = -0.7 * value.mean() + 0.3 * F.cross_entropy(logits, other_labels)
    for p, q in zip(mine, torch.autograd.grad(loss, list(s.policy.parameters()))):
        assert torch.allclose(p, q, atol=1e-6, rtol=1e-4)


def test_search_goes_on_bit_for_bit(tmp_path):
    data = common.load_data("shapes", limit_train=40, limit_test=10)
    few = {"faa_images": 32, "faa_batch_size": 16}
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    baseline.search_policy(small(faa_epochs=3, **few), data, tmp_path / "whole", torch.device("cpu"))
    for epochs in (1, 2, 3):
        baseline.search_policy(small(faa_epochs=epochs, **few), data, tmp_path / "cut", torch.device("cpu"))
    for name in ("policy.json", "metrics.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    last = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[-1])
    assert sum(last["selection"].values()) == pytest.approx(1, abs=1e-4) and last["drift_z"] > 0
    for name in ("losses.png", "selection.png", "policy.png", "images.png"):
        assert (tmp_path / "whole" / name).stat().st_size > 0


def test_policies_are_interchangeable(tmp_path):
    for mine, theirs in ((baseline, joint), (joint, baseline)):
        torch.manual_seed(3)
        policy = mine.Policy(4, 2)
        policy.save(tmp_path / "policy.json")
        again = theirs.Policy.load(tmp_path / "policy.json")
        for a, b in zip(policy.parameters(), again.parameters()):
            assert torch.allclose(a, b, atol=1e-6)
    assert list(baseline.AUGMENTATIONS) == list(joint.AUGMENTATIONS)
    for name, augment in baseline.AUGMENTATIONS.items():
        x = torch.rand(2, 3, 9, 9)
        assert torch.equal(augment(x, torch.full((2,), 0.4)), joint.AUGMENTATIONS[name](x, torch.full((2,), 0.4)))


def test_stages_know_the_flags_that_they_are_handed():
    values = {"search_epochs": 1, "batch_size": 4, "channels": 4, "search_channels": 4, "layers": 3, "search_layers": 3}
    for names, program, more in (
        (baseline.JOINT, joint, ["--policy", "none"]),
        (baseline.DHA_SEARCH, dha, ["--no-da", "--no-hpo", "--train-epochs", "0"]),
        ([n for n in baseline.DHA_TRAIN if "max" not in n], dha, ["--genotype", "DARTS_V2"]),
    ):
        args = small(
            given=names, **{n: values.get(n, 4 if n in ("search_images", "search_batch_size") else 1) for n in names}
        )
        args.auxiliary_weight, args.drop_path, args.lr, args.weight_decay = 0.0, 0.5, 0.05, 0.001
        theirs = program.parse_args([*baseline.stage_flags(args, names), *more])[0]
        for name in [*names, "dataset", "seed", "preset", "amp"]:
            assert getattr(theirs, name) == getattr(args, name), name
    assert baseline.stage_flags(small(lr=0.5), baseline.JOINT).count("--lr") == 0  # not given: the stage's default


# ---------------------------------------------------------------------------------------------------------------
# --compare
# ---------------------------------------------------------------------------------------------------------------


def fake_run(folder: Path, script: str, command: str, accuracy: float, **settings) -> Path:
    program = {"dha.py": dha, "joint_darts_faa.py": joint, "baseline_sequential.py": baseline}[script]
    argv = command.split()
    args = vars(program.parse_args(argv)[0]) | settings
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"script": script, "command": f"{script} {command}", "args": args}))
    result = {"test_accuracy": accuracy, "params": 3_300_000, "seconds": 7200.0, "search_seconds": 30.0}
    (folder / "result.json").write_text(json.dumps(result | {"dataset": args["dataset"], "seed": args["seed"]}))
    return folder


def rows_of(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line[:2] == "| " and "---" not in line
    ]


def test_compare_prints_mean_std_and_the_papers_figures(tmp_path, capsys):
    for seed, accuracy in enumerate((97.0, 97.3, 97.9)):
        fake_run(
            tmp_path / "b" / f"seed{seed}", "baseline_sequential.py", f"--method faa-darts --seed {seed}", accuracy
        )
    fake_run(tmp_path / "d", "joint_darts_faa.py", "--policy none --search-epochs 25 --dataset cifar100", 80.0)
    fake_run(tmp_path / "j", "joint_darts_faa.py", "--gpu 0", 97.5)
    fake_run(tmp_path / "s", "baseline_sequential.py", "--method dha --repeats 3 --out x", 97.6)
    fake_run(tmp_path / "o", "dha.py", "--no-da --no-hpo", 97.1)
    fake_run(tmp_path / "q", "dha.py", "--preset quick", 85.0)
    fake_run(tmp_path / "l", "dha.py", "--lr 0.05", 96.0)
    folders = [str(tmp_path / name) for name in "bdjsoql"]
    assert baseline.main(["--compare", *folders]) == 0
    said = capsys.readouterr().out
    rows = {(r[0], r[1], r[4]): r for r in rows_of(said)[1:]}
    std = math.sqrt(sum((a - 97.4) ** 2 for a in (97.0, 97.3, 97.9)) / 2)
    expected = {
        ("Faster AA, then DARTS", "cifar10", f"97.40 ± {std:.2f}"): ("3", "97.55 ± 0.30"),
        ("DARTS", "cifar100", "80.00"): ("1", "82.91 ± 0.30"),
        ("DARTS + Faster AA jointly", "cifar10", "97.50"): ("1", "97.40 ± 0.03"),
        ("Sequential DHA", "cifar10", "97.60"): ("1", "97.77 ± 0.14"),
        ("One-Stage ISTA", "cifar10", "97.10"): ("1", "97.64 ± 0.20"),
        ("DHA", "shapes", "85.00"): ("1", "-"),
        ("DHA", "cifar10", "96.00"): ("1", "-"),  # another lr is not the paper's
    }
    assert rows.keys() == expected.keys()
    for key, (seeds, paper) in expected.items():
        assert (rows[key][3], rows[key][5], rows[key][6]) == (seeds, paper, "3.3 M")
        assert rows[key][7:] == ["30 s", "2.0 h"]
    assert said.count("Faster AA, then DARTS") == 2  # as text and as Markdown


def test_compare_keeps_different_settings_apart(tmp_path):
    runs = [
        fake_run(tmp_path / "a", "dha.py", "--seed 1", 90.0),
        fake_run(tmp_path / "b", "dha.py", "--seed 2 --gpu 0 --workers 2 --data-dir elsewhere", 92.0),
        fake_run(tmp_path / "c", "dha.py", "--seed 3 --channels 18", 80.0),
    ]
    rows = rows_of(baseline.compare(baseline.read_runs([str(r) for r in runs])))[1:]
    assert sorted((r[3], r[4]) for r in rows) == [("1", "80.00"), ("2", "91.00 ± 1.41")]


def test_compare_names_settings_and_keeps_folders_apart(tmp_path):
    runs = [
        fake_run(tmp_path / "a", "dha.py", "--dataset folder --data-dir cats", 90.0),
        fake_run(tmp_path / "b", "dha.py", "--dataset folder --data-dir dogs --seed 1", 50.0),
        fake_run(tmp_path / "c", "dha.py", "--preset quick --channels 18 --no-da", 80.0),
    ]
    rows = rows_of(baseline.compare(baseline.read_runs([str(r) for r in runs])))[1:]
    assert {(r[1], r[2], r[4]) for r in rows} == {
        ("folder cats", "paper", "90.00"),
        ("folder dogs", "paper", "50.00"),
        ("shapes", "quick --channels 18", "80.00"),
    }


def test_compare_counts_a_run_once_and_passes_over_the_unfinished(tmp_path, capsys):
    run = fake_run(tmp_path / "a", "dha.py", "--seed 1", 90.0)
    other = fake_run(tmp_path / "b", "dha.py", "--seed 1", 80.0)
    (fake_run(tmp_path / "c", "dha.py", "--seed 3", 10.0) / "result.json").unlink()
    (tmp_path / "d").mkdir()
    assert (
        baseline.main(
            ["--compare", str(run), str(run), str(tmp_path / "a" / "."), str(tmp_path / "c"), str(tmp_path / "d")]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert f"{tmp_path / 'c'} is not finished" in said and f"no run in {tmp_path / 'd'}" in said
    assert [(r[3], r[4]) for r in rows_of(said)[1:]] == [("1", "90.00")]
    assert baseline.main(["--compare", str(tmp_path)]) == 0  # the folder around them
    said = capsys.readouterr().out
    assert "2 runs of 1 different seeds" in said
    assert [(r[3], r[4]) for r in rows_of(said)[1:]] == [("1", "85.00 ± 7.07")]
    assert other.exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda run: shutil.rmtree(run),
        lambda run: (shutil.rmtree(run), run.write_text("a file")),
        lambda run: (run / "config.json").write_text("[]"),
        lambda run: (run / "result.json").write_text((run / "result.json").read_text().replace("90.0", "NaN")),
        lambda run: (run / "config.json").write_text(
            (run / "config.json").read_text().replace("cifar10", "7").replace("preset", "p")
        ),
        lambda run: (run / "result.json").unlink(),
        lambda run: (run / "result.json").write_text("{"),
        lambda run: (run / "result.json").write_text("[]"),
        lambda run: (run / "config.json").write_text("{}"),
        lambda run: (run / "result.json").write_text('{"test_accuracy": "high"}'),
    ],
)
def test_compare_says_what_is_wrong(tmp_path, damage, capsys):
    run = fake_run(tmp_path / "a", "dha.py", "--seed 1", 90.0)
    damage(run)
    assert baseline.main(["--compare", str(run)]) == 2
    assert one_line_error(capsys)


def test_repeats_end_with_a_table(tmp_path, monkeypatch, capsys):
    def run(args, out, device):
        accuracy = {4: 90.0, 5: 92.0}[args.seed]
        fake_run(out, "baseline_sequential.py", f"--method darts --preset quick --seed {args.seed}", accuracy)
        return json.loads((out / "result.json").read_text()) | {"genotype": "g", "flops": 5}

    monkeypatch.setattr(baseline, "run_baseline", run)
    flags = ["--method", "darts", "--preset", "quick", "--seed", "4", "--repeats", "2", "--gpu", "-1"]
    assert baseline.main([*flags, "--out", str(tmp_path / "r")]) == 0
    said = capsys.readouterr().out
    assert "2 seeds: test accuracy 91.00 ± 1.41 %" in said
    assert rows_of(said)[1][:5] == ["DARTS", "shapes", "quick", "2", "91.00 ± 1.41"]
