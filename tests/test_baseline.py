"""baseline_sequential.py: the network, the critic's penalty, the two steps, the stages."""

import argparse
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import baseline_sequential as baseline
import common
import dha
import joint_darts_faa as joint

FAA = "--method faa-darts --preset quick --gpu -1".split()


def settings(*flags: str, **values) -> argparse.Namespace:
    return argparse.Namespace(**vars(baseline.parse_args([*FAA, *flags])) | values)


@pytest.fixture
def search():
    torch.manual_seed(0)
    data = common.load_data("shapes", limit_train=40, limit_test=10)
    return baseline.PolicySearch(settings(), data, torch.device("cpu")), data


def batch(data, first, count):
    part = slice(first, first + count)
    return data.train_images[part].float() / 255, data.train_labels[part]


def test_wide_resnet_has_the_published_size():
    net = baseline.WideResNet(10, 40, 2)
    head = common.count_parameters(net.critic)
    widths, expected = (16, 32, 64, 128), 3 * 16 * 9
    for before, after in zip(widths, widths[1:]):  # the first block has a shortcut
        expected += before * after * 9 + before * after + 2 * before + 2 * after + after * after * 9
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

    leaves = tuple(p.detach().clone().requires_grad_() for p in net.parameters())
    assert torch.autograd.gradcheck(penalty, leaves)


def test_penalty_through_the_wide_resnet_by_finite_differences():
    torch.manual_seed(1)
    net = baseline.WideResNet(3, 10, 1).double()
    real, augmented, share = torch.rand(2, 4, 3, 8, 8).double().unbind() + (torch.rand(4).double(),)
    params = [p for name, p in net.named_parameters() if not name.startswith("classifier")]
    penalty = lambda: baseline.gradient_penalty(lambda x: net(x)[1], real, augmented, share)
    gradient = torch.autograd.grad(penalty(), params, allow_unused=True)
    gradient = [torch.zeros_like(p) if g is None else g for p, g in zip(params, gradient)]  # of a last bias
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
    baseline.critic_step(s, *batch(data, 0, 8), batch(data, 8, 8)[0], settings())
    assert not any(changed(s.policy, policy))
    assert sum(changed(s.net, net)) >= len(net) - 1  # all but the critic's last bias
    net = copy(s.net)
    baseline.policy_step(s, *batch(data, 8, 8), settings())
    assert all(changed(s.policy, policy)) and not any(changed(s.net, net))
    assert all(0 <= float(v.min()) and float(v.max()) <= 1 for v in (s.policy.p, s.policy.mu))


def test_steps_follow_the_written_out_losses(search):
    s, data = search
    (real, labels), (other, other_labels) = batch(data, 0, 8), batch(data, 8, 8)
    args = settings(class_weight=0.3, critic_weight=0.7, penalty=5.0, faa_lr=0.0, policy_lr=0.0)
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
    policies = {}
    for name, epochs in (("whole", (3,)), ("cut", (1, 2, 3))):
        for count in epochs:
            few = {"faa_images": 32, "faa_batch_size": 16, "faa_epochs": count, "out": str(tmp_path / name)}
            args = settings(**few)
            run = baseline.open_run(args, torch.device("cpu"))
            policies[name] = baseline.search_policy(args, data, run).table()
            run.log.close()  # as the end of a process would
    assert policies["whole"] == policies["cut"]
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "cut")]
    assert lines[0] == lines[1] and len(lines[0].splitlines()) == 3
    last = json.loads(lines[0].splitlines()[-1])
    assert sum(last["selection"].values()) == pytest.approx(1, abs=1e-4)
    assert last.keys() >= set(baseline.MEASURED)


def test_policies_are_interchangeable(tmp_path):
    torch.manual_seed(3)
    policy = baseline.Policy(4, 2)
    baseline.save(tmp_path / "policy.json", policy.table())
    again = joint.load_policy(tmp_path / "policy.json")
    for a, b in zip(policy.parameters(), again.parameters()):
        assert torch.allclose(a, b, atol=1e-6)
    assert list(baseline.AUGMENTATIONS) == list(joint.AUGMENTATIONS)


@pytest.mark.parametrize("method", ["faa-darts", "darts", "dha"])
def test_stages_get_the_flags_that_were_given_and_know_them(method, tmp_path):
    (tmp_path / "search").mkdir()
    common.save_genotype(common.GENOTYPES["DARTS_V2"], tmp_path / "search" / "genotype.json")
    own = "--limit-train 50 --seed 3 --image-size 16".split()
    theirs = "--channels 6 --lr 0.07 --train-epochs 2 --auxiliary-weight 0".split()
    args = settings("--method", method, *own, *theirs, out=str(tmp_path))
    found = baseline.stages(args)
    assert list(found) == {"dha": ["search", "train"]}.get(method, ["darts"])
    for name, command in found.items():
        program = dha if method == "dha" else joint
        assert Path(command[1]).name == Path(program.__file__).name
        theirs = program.parse_args(command[2:])
        assert (theirs.limit_train, theirs.seed, theirs.image_size, theirs.channels) == (50, 3, 16, 6)
        assert (theirs.lr, theirs.preset, theirs.dataset, theirs.gpu) == (0.07, "quick", "shapes", -1)
        assert theirs.resume and theirs.out == str(tmp_path / name)
        assert theirs.train_epochs == (0 if name == "search" else 2)
        if name == "search":
            assert theirs.no_da and theirs.no_hpo and not theirs.genotype
        if name == "train":
            assert not theirs.no_da and not theirs.no_hpo
            assert common.parse_genotype(theirs.genotype) == common.GENOTYPES["DARTS_V2"]
        if name == "darts":
            policy = {"darts": "none", "faa-darts": str(tmp_path / "policy.json")}[method]
            assert theirs.policy == policy and not theirs.genotype
    for command in baseline.stages(args, checking=True).values():  # without any file, and nothing is written
        assert program.parse_args(command[2:]).check


def test_processes_put_stages_under_torchrun(tmp_path):
    command = baseline.stages(settings("--processes", "3", out=str(tmp_path)))["darts"]
    assert command[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
