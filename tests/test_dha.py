"""DHA's parts against oracles: KKT conditions, autograd through the update, written-out sums, pruned nets."""

import copy
import itertools
import math
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import common
import dha
from dha import OPS

TINY = "--preset quick --gpu -1 --channels 4 --layers 3 --batch-size 8".split()


@pytest.fixture(autouse=True)
def seeded_on_one_thread():  # networks are tiny, and two threads beside other programs take 40 times as long
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def settings(*flags, count=64):
    args = dha.parse_args([*TINY, *flags])
    return common.Data(*common.shapes(count, 1), *common.shapes(20, 2), list(common.SHAPE_CLASSES)), args


def tiny(*flags, count=64):
    data, args = settings(*flags, count=count)
    return dha.DHA(args, data, torch.device("cpu")), data, args


def steps(s, data, args, count, first=0):
    """The measured (loss, accuracy) of `count` steps on batches of 8, one after the other."""
    parts = [slice(8 * i, 8 * i + 8) for i in range(first, first + count)]
    batches = [(data.train_images[part], data.train_labels[part]) for part in parts]
    return [dha.train_step(s, *batch, args) for batch in batches]


def normalized(s, images):
    return common.normalize(images, s.mean, s.std)


def move_b(net, scale=0.3):
    """A b from elsewhere: the next recovery finds other supports."""
    with torch.no_grad():
        for b in net.b:
            b.normal_(0, scale)


def freeze_all(s):
    """What the end of the search does."""
    for k, frozen in enumerate(s.net.frozen):
        frozen or s.net.freeze(k)
    s.theta = list(s.net.keep(s.net.genotype()).parameters())
    return s.net


# -------- ISTA (Eq. 4) --------------------------------------------------------------------------------------

@pytest.mark.parametrize("scale", [1e-3, 1e-2, 0.1, 1.0])
@pytest.mark.parametrize("entries", [6, 7, 14, 21, 28, 35])
def test_ista_solves_the_lasso(entries, scale):
    A = torch.rand(100, 7, entries, dtype=torch.float64)
    b = scale * torch.randn(100, 7, dtype=torch.float64)
    alpha = dha.ista(A, b, 1e-5)
    # KKT: A_i^T (b - A alpha) = lam sign(alpha_i) on the support, within +-lam off it
    slope = torch.einsum("pmn,pm->pn", A, b - torch.einsum("pmn,pn->pm", A, alpha))
    on = alpha != 0
    error = torch.where(on, (slope - 1e-5 * alpha.sign()).abs(), (slope.abs() - 1e-5).clamp(min=0))
    assert (error.amax(1) <= 1e-8 * torch.einsum("pmn,pm->pn", A, b).abs().amax(1)).all()
    assert on.any(1).all()


def test_ista_known_answers():
    b = torch.tensor([3.0, -0.5, 0.2], dtype=torch.float64)
    soft = torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64)  # for A = I: the shrinkage operator
    assert torch.allclose(dha.ista(torch.eye(3, dtype=torch.float64), b, 1.0), soft, atol=1e-8)
    assert torch.equal(dha.soft_threshold(b, torch.tensor(0.25)), torch.tensor([2.75, -0.25, 0.0]).double())
    A = torch.rand(7, 14)
    assert torch.equal(dha.ista(A, torch.zeros(7), 1e-5), torch.zeros(14))
    assert torch.equal(dha.ista(A, torch.randn(7), 1e3), torch.zeros(14))  # lam above max |A^T b|


def test_ista_padding_batch_dimensions_and_failure():
    A, b = torch.rand(2, 3, 7, 14, dtype=torch.float64), torch.randn(2, 3, 7, dtype=torch.float64)
    alpha = dha.ista(torch.cat([A, torch.zeros(2, 3, 7, 21)], -1), b, 1e-5)
    assert alpha.shape == (2, 3, 35) and (alpha[..., 14:] == 0).all()
    assert torch.allclose(alpha[..., :14], dha.ista(A, b, 1e-5), atol=1e-6)
    assert dha.ista(A.float(), b.float(), 1e-5).dtype == torch.float32
    with pytest.raises(ArithmeticError, match="did not converge"):
        dha.ista(A, b, 1e-5, rounds=1)


# -------- Hyper-parameters (Eq. 3) --------------------------------------------------------------------------

def test_hypergradient_equals_autograd_through_the_update():
    double = {"dtype": torch.float64}
    theta, v0 = ([torch.randn(s, **double) for s in ((5, 4), (5,), (3, 5), (3,))] for _ in range(2))
    x, y = torch.randn(2, 6, 4, **double), torch.randint(3, (2, 6))
    loss = lambda p, i: F.cross_entropy(torch.tanh(x[i] @ p[0].T + p[1]) @ p[2].T + p[3], y[i])

    def gradient(params, i):
        leaves = [t.clone().requires_grad_() for t in params]
        return torch.autograd.grad(loss(leaves, i), leaves)

    g = gradient(theta, 0)
    norm = torch.cat([t.flatten() for t in g]).norm()
    g = [t * (0.1 / norm) for t in g]  # clipped
    assert norm > 0.1

    def updated(lr, wd):
        v = [0.9 * m + d + wd * t for m, d, t in zip(v0, g, theta)]
        return [t - lr * m for t, m in zip(theta, v)], v

    eta = [torch.tensor(value, **double, requires_grad=True) for value in (0.05, 0.01)]
    expected = torch.autograd.grad(loss(updated(*eta)[0], 1), eta)
    plus, v = updated(*(value.detach() for value in eta))
    mine = dha.hypergradient(gradient(plus, 1), v, plus, eta[0].detach())
    for i in range(2):
        assert abs(float(mine[i] - expected[i])) <= 1e-12 * max(1, abs(float(expected[i])))
        h = [(1e-5, 0), (0, 1e-5)][i]  # and finite differences
        up, down = (loss(updated(0.05 + s * h[0], 0.01 + s * h[1])[0], 1) for s in (1, -1))
        assert abs(float((up - down) / 2e-5 - mine[i])) < 1e-7


def test_sgd_step_is_torch_sgd():
    mine, theirs = ([torch.ones(3, 2), torch.linspace(0, 1, 4)] for _ in range(2))
    velocity = [torch.zeros_like(p) for p in mine]
    optimizer = torch.optim.SGD(theirs, lr=0.1, momentum=0.9, weight_decay=0.01)
    for _ in range(5):
        for p in theirs:
            p.grad = torch.randn_like(p)
        optimizer.step()
        dha.sgd_step(mine, [p.grad for p in theirs], velocity, torch.tensor(0.1), torch.tensor(0.01))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(mine, theirs))


# the betas make the gradient decide, then the bounds of a step, then the ranges
@pytest.mark.parametrize("flags", [
    "--beta-lr 1e-3 --beta-wd 1e-4", "--beta-lr 1e6 --beta-wd 1e6 --max-lr-step 0.02 --max-wd-step 3e-6",
    "--beta-lr 1e9 --beta-wd 1e9 --max-lr-step 1e6 --max-wd-step 1e6"])
def test_a_step_moves_the_weights_by_v_and_eta_against_its_gradient(monkeypatch, flags):
    s, data, args = tiny(*flags.split(), "--grad-clip", "0.1")
    seen, real = [], dha.hypergradient
    norm = lambda: torch.cat([p.grad.flatten() for p in s.theta if p.grad is not None]).norm()

    def spy(grads, velocities, params, lr):
        held = [s.velocity[p] for p in params]  # the last update's v, of what ran then and now
        assert all(g is p.grad and v is w for g, p, v, w in zip(grads, params, velocities, held, strict=True))
        assert norm() > 0.2  # not yet clipped
        seen.append((params, *real(grads, velocities, params, lr)))
        return seen[-1][1:]

    monkeypatch.setattr(dha, "hypergradient", spy)
    for i in range(4):
        before, lr, wd = {p: p.detach().clone() for p in s.theta}, float(s.lr), float(s.wd)
        velocity = {p: v.clone() for p, v in s.velocity.items()}
        steps(s, data, args, 1, i)
        assert norm() <= 0.1001
        for p, old in before.items():
            v = 0 if p.grad is None else 0.9 * velocity.get(p, 0) + p.grad + s.wd * old
            assert torch.allclose(p.detach(), old - s.lr * v, atol=1e-6 * max(1, float(old.abs().max())))
            assert (p in s.velocity) == (p.grad is not None)
        assert len(seen) == i  # the first step has no update before it
        if i:
            params, d_lr, d_wd = seen[-1]
            assert set(params) == velocity.keys() & {p for p in s.theta if p.grad is not None}
            for eta, old, d, most, ends in (
                    (s.lr, lr, args.beta_lr * d_lr, args.max_lr_step * lr, dha.LR_RANGE),
                    (s.wd, wd, args.beta_wd * d_wd, args.max_wd_step, dha.WD_RANGE)):
                want = min(max(old - min(max(float(d), -most), most), ends[0]), ends[1])
                assert float(eta) == pytest.approx(want, rel=1e-5, abs=1e-12)
        if i == 1:  # then another support runs
            move_b(s.net)
            s.net.recover()
    if "1e6" in flags:
        assert s.lr != args.lr and s.wd != args.weight_decay


def test_without_hpo_eta_stays():
    s, data, args = tiny("--no-hpo")
    steps(s, data, args, 3)
    assert float(s.lr) == pytest.approx(args.lr) and float(s.wd) == pytest.approx(args.weight_decay)


# -------- Data augmentation (Eq. 2) -------------------------------------------------------------------------

def test_policy_gradient_is_that_of_the_written_out_sum():
    tau = (0.3 * torch.randn(14, 14, dtype=torch.float64)).requires_grad_()
    pairs, losses = torch.randint(196, (64,)), torch.rand(64, dtype=torch.float64) * 3
    mine = dha.policy_loss(tau, pairs, losses.requires_grad_())
    mine.backward()
    assert losses.grad is None  # L_k is a constant
    leaf = tau.detach().clone().requires_grad_()
    q, total = leaf.exp() / leaf.exp().sum(), 0
    for pair, loss in zip(pairs.tolist(), losses.tolist()):
        total = total - q[pair // 14, pair % 14] * loss
    assert float(mine.detach()) == pytest.approx(float(total.detach()), rel=1e-12)
    assert torch.allclose(torch.autograd.grad(total, leaf)[0], tau.grad, atol=1e-12)
    p = tau.detach().flatten().softmax(0)
    summed = torch.zeros(196, dtype=torch.float64).index_add(0, pairs, losses.detach())
    expected = -(p * (summed - (p * summed).sum()))  # the softmax's derivative, by hand
    assert torch.allclose(tau.grad.flatten(), expected, atol=1e-12)


def test_a_step_on_tau_raises_what_lost_more_than_its_probability_explains(monkeypatch):
    s, data, args = tiny("--tau-lr", "2")
    seen = {}
    for name in ("policy_loss", "apply_pairs"):
        real = getattr(dha, name)
        spy = lambda *given, name=name, real=real: seen.update({name: given}) or real(*given)
        monkeypatch.setattr(dha, name, spy)
    before = s.tau.detach().flatten().softmax(0)
    (measured,) = steps(s, data, args, 1)
    _, pairs, losses = seen["policy_loss"]
    assert torch.equal(pairs, seen["apply_pairs"][1]) and losses.shape == (8,)
    assert float(losses.mean().detach()) == pytest.approx(float(measured[0]))
    summed = torch.zeros(196).index_add(0, pairs, losses.detach())
    expected = 2 * before * (summed - (before * summed).sum())  # Eq. (2), at a rate of 2
    assert torch.allclose(s.tau.detach().flatten(), expected, atol=1e-6)
    high = summed > (before * summed).sum()  # from the uniform policy: above the mean over all pairs
    assert torch.equal(s.tau.detach().flatten().softmax(0) > before, high) and 0 < int(high.sum()) < 196


def test_pairs_have_the_policys_frequencies():
    tau, n = torch.randn(14, 14), 50_000
    p = tau.flatten().softmax(0).double()
    counts = torch.bincount(dha.sample_pairs(tau, n), minlength=196).double()
    chi = ((counts - n * p) ** 2 / (n * p)).sum()
    assert (n * p).min() > 5
    assert chi < 195 + 5 * math.sqrt(2 * 195)  # five standard deviations, 195 degrees of freedom


def test_apply_pairs_order_magnitudes_and_purity(monkeypatch):
    images, pairs = torch.rand(4000, 3, 1, 1), torch.randint(196, (4000,))
    kept, seen = images.clone(), {}
    for k, name in enumerate(dha.AUGMENTATIONS):
        note = lambda x, m, name=name, k=k: seen.setdefault(name, []).append(m) or x * 0.5 + k / 100
        monkeypatch.setitem(dha.AUGMENTATIONS, name, note)
    out = dha.apply_pairs(images, pairs)
    first, second = (k.view(-1, 1, 1, 1) / 100 for k in (pairs // 14, pairs % 14))
    assert torch.allclose(out, (images * 0.5 + first) * 0.5 + second, atol=1e-6) and torch.equal(images, kept)
    for name, (one, two) in seen.items():
        assert not torch.equal(one, two)
        for m in (one, two):  # U(0, 1), with a random sign where there is one
            counts = torch.histc(m.abs(), 20, 0, 1)
            assert ((counts - 200) ** 2 / 200).sum() < 19 + 5 * math.sqrt(2 * 19)
            signs = (m < 0).float().mean()
            assert signs == pytest.approx(0.5, abs=0.04) if name in dha.SIGNED else signs == 0


def test_without_da_nothing_is_drawn(monkeypatch):
    s, data, args = tiny("--no-da")
    monkeypatch.setattr(dha, "apply_pairs", None)
    steps(s, data, args, 2)
    assert not s.tau.any()


# -------- The supernet --------------------------------------------------------------------------------------

def test_there_is_no_none():
    net = dha.SparseSupernet(4, 10, 3, b_scale=0.3)
    assert OPS == common.PRIMITIVES[1:] and len(OPS) == 7 and "none" not in OPS
    assert net.A.shape == (8, 7, 35) and net.alpha.shape == (8, 35)
    assert [tuple(b.shape) for b in net.b] == [(7,)] * 8
    for k in range(8):
        own = net.A[k, :, : 7 * (k % 4 + 2)]
        assert (net.A[k, :, own.shape[1] :] == 0).all()  # zeros pad, the rest is U(0, 1)
        assert 0 <= own.min() and own.max() <= 1 and own.std() > 0.2
    for cell in net.cells:
        assert [len(node) for node in cell.nodes] == [7 * (j + 2) for j in range(4)]
        assert not any("none" in key for node in cell.nodes for key in node)


def test_support_is_the_best_operation_of_the_two_best_edges():
    net = dha.SparseSupernet(4, 10, 3)
    for _ in range(5):
        move_b(net)
        net.recover()
        alpha = dha.ista(net.A, torch.stack(list(net.b)), 1e-5).view(8, 5, 7)
        for k in range(8):
            best = lambda state: float(alpha[k, state].abs().max())
            states = sorted(sorted(range(k % 4 + 2), key=best)[-2:])
            want = [(OPS[int(alpha[k, state].abs().argmax())], state) for state in states]
            assert net.support[k] == want
        genotype = net.genotype()
        assert genotype.normal + genotype.reduce == [edge for node in net.support for edge in node]


def test_strengths_are_the_papers_expression():
    net = dha.SparseSupernet(4, 10, 3, b_scale=0.3).double()
    for b in net.b:
        b.data += 0.01 * torch.randn_like(b)  # between recoveries b moves, alpha does not
    for k in range(8):
        A, S = net.A[k], [7 * state + OPS.index(name) for name, state in net.support[k]]
        kept = torch.zeros(35, dtype=torch.float64).index_put((torch.tensor(S),), net.alpha[k, S])
        E = A.T @ A - torch.eye(35, dtype=torch.float64)
        full = net.b[k] @ A - kept @ E  # b^T A - alpha^T E, with alpha cut to the support
        assert torch.allclose(net.strength(k), full[S], atol=1e-12)
        (mine,), (want,) = (torch.autograd.grad(v.sum(), net.b[k]) for v in (net.strength(k), full[S]))
        assert torch.allclose(mine, want, atol=1e-12)


def test_strengths_are_float32_under_autocast(monkeypatch):
    s, data, _ = tiny()
    seen, real = [], dha.SparseSupernet.strength
    spy = lambda net, k: seen.append((k, net.b[k].detach().clone(), real(net, k))) or seen[-1][2]
    monkeypatch.setattr(dha.SparseSupernet, "strength", spy)
    s.net.stem.register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        s.net(normalized(s, data.train_images[:8]))
    assert seen.pop() == torch.bfloat16 and len(seen) == 8  # the stem does run in bfloat16
    for k, b, strength in seen:
        A_S, alpha_S = s.net.A_S[k].double(), s.net.alpha_S[k].double()
        want = A_S.T @ b.double() - (A_S.T @ A_S - torch.eye(2)) @ alpha_S
        assert strength.dtype == torch.float32
        assert torch.allclose(strength.double(), want, rtol=1e-5, atol=1e-6)


def test_where_alpha_is_zero_the_support_is_still_two_edges():
    net = dha.SparseSupernet(4, 10, 3)
    net.recover(lam=1e3)  # everything shrinks to 0
    assert net.alpha.abs().sum() == 0
    assert all(len({state for _, state in edges}) == 2 for edges in net.support)


@pytest.mark.parametrize("training", [False, True])
def test_freezing_and_keeping_change_no_logits(training):
    s, data, args = tiny()
    steps(s, data, args, 2)
    x = normalized(s, data.test_images)
    operations = lambda: {k: s.net.operations(k) for k in range(8)}
    norms = lambda k: [norm for op in s.net.operations(k) for norm in dha.norms(op)]
    learns = lambda k: {p.requires_grad for norm in norms(k) for p in norm.parameters()}
    with torch.no_grad():
        logits = lambda: s.net.train(training)(x)
        before = logits()
        for k in range(8):
            assert learns(k) == {False}
            assert all((n.weight == 1).all() and not n.bias.any() and n.weight.grad is None for n in norms(k))
            s.net.freeze(k)
            assert learns(k) == {True}
            assert torch.allclose(logits(), before, atol=1e-5)
        size, genotype, kept = len(s.net.state_dict()), s.net.genotype(), operations()
        freeze_all(s)
        assert torch.allclose(logits(), before, atol=1e-5)
    assert s.net.genotype() == genotype and operations() == kept
    assert len(s.net.state_dict()) < size / 3 and not list(s.net.b)
    assert all(p.requires_grad for p in s.theta) and set(s.theta) == set(s.net.parameters())
    steps(s, data, args, 2)
    assert all(p.grad is not None for p in s.theta)


def test_a_frozen_node_is_left_alone(monkeypatch):
    """Its b by Adam, which has momentum and weight decay; its alpha and support by recovery."""
    s, data, args = tiny()
    steps(s, data, args, 3)
    for k in (2, 5):
        s.net.freeze(k)
    before = [b.detach().clone() for b in s.net.b]
    steps(s, data, args, 3)
    assert [k for k in range(8) if torch.equal(s.net.b[k], before[k])] == [2, 5]
    alpha, support, problems, real = s.net.alpha.clone(), s.net.support, [], dha.ista
    move_b(s.net)
    monkeypatch.setattr(dha, "ista", lambda A, b, *more: problems.append((A, b)) or real(A, b, *more))
    moved = s.net.recover()
    live = [0, 1, 3, 4, 6, 7]
    ((A, b),) = problems
    assert torch.equal(A, s.net.A[live]) and torch.equal(b, torch.stack([s.net.b[k] for k in live]))
    for k in range(8):
        same = torch.equal(s.net.alpha[k], alpha[k])
        assert same == (k in (2, 5)) == (moved[k] == 0)
        assert moved[k] == pytest.approx(float((s.net.alpha[k] - alpha[k]).norm()), rel=1e-5)
    assert [s.net.support[k] for k in (2, 5)] == [support[k] for k in (2, 5)]
    assert s.net.support != support
    steps(s, data, args, 1)
    for k in live:
        s.net.freeze(k)
    b = [p.detach().clone() for p in s.net.b]
    s.theta = list(s.net.keep(s.net.genotype()).parameters())
    steps(s, data, args, 2)
    assert all(map(torch.equal, s.b_optimizer.param_groups[0]["params"], b))


def saved_bytes(net, x):
    """Bytes that autograd keeps of a forward pass, parameters aside, every storage once; and the output."""
    storages, alive = {}, []

    def keep(tensor):
        alive.append(tensor)
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = net.train()(x)
    owned = {t.untyped_storage().data_ptr() for t in itertools.chain(net.parameters(), net.buffers())}
    return sum(size for pointer, size in storages.items() if pointer not in owned), out


def test_inactive_operations_allocate_nothing():
    s, data, args = tiny(count=200)
    x, called = normalized(s, data.train_images), {}
    for op in (op for cell in s.net.cells for node in cell.nodes for op in node.values()):
        op.register_forward_hook(lambda module, given, out: called.update({module: out.nbytes}))
    mine, out = saved_bytes(s.net, x)
    active = [op for k in range(8) for op in s.net.operations(k)]
    assert set(called) == set(active) and len(active) == 3 * 8
    out.sum().backward()
    inactive = {p for cell in s.net.cells for p in cell.nodes.parameters()}
    inactive -= {p for op in active for p in op.parameters()}
    assert inactive and all(p.grad is None for p in inactive)
    strengthened = sum(called.values())  # outputs that a strength's gradient wants
    theirs, _ = saved_bytes(freeze_all(s), x)
    assert mine <= theirs + strengthened + 100_000


def test_gradient_of_b_by_finite_differences():
    s, data, _ = tiny()
    net, labels = s.net.double(), data.train_labels[:8]
    x = normalized(s, data.train_images[:8]).double()
    loss = lambda: F.cross_entropy(net(x), labels)
    loss().backward()
    for k, m in ((0, 0), (3, 6), (4, 2), (7, 1)):
        values = []
        for step in (1e-7, -2e-7, 1e-7):
            values.append(float(loss().detach()))
            net.b[k].data[m] += step
        assert float(net.b[k].grad[m]) == pytest.approx((values[1] - values[2]) / 2e-7, rel=1e-3, abs=1e-7)


def test_constraints_are_those_of_the_kept_network():
    s, data, args = tiny("--auxiliary-weight", "0.4")
    for frozen in ((), (1, 6)):
        move_b(s.net)
        s.net.recover()
        for k in frozen:
            s.net.freeze(k)
        kept = freeze_all(copy.deepcopy(s))
        for flag, cost in (("--max-params", common.count_parameters(kept)),
                           ("--max-flops", common.count_flops(kept, 32))):
            limits = [dha.parse_args([*TINY, flag, str(cost - less)]) for less in (0, 1)]
            assert [dha.within_limits(s.net, args, 32) for args in limits] == [True, False]
        assert dha.within_limits(s.net, args, 32)


def test_constraints_reject_and_the_last_support_stays():
    s, *_ = tiny()
    before = s.net.support, {name: value.clone() for name, value in s.net.state_dict().items()}
    move_b(s.net)
    asked = []
    assert s.net.recover(1e-5, lambda: asked.append(s.net.support)) == []
    assert s.net.support == before[0] != asked[0]  # what was asked about is the new one
    for name in ("alpha", "A_S", "alpha_S"):
        assert torch.equal(getattr(s.net, name), before[1][name])
    assert len(s.net.recover(1e-5)) == 8 and s.net.support == asked[0]


def test_a_run_starts_within_the_constraints(monkeypatch):
    data, args = settings()
    costs = []
    for args.seed in range(3):
        costs.append(common.count_parameters(freeze_all(dha.start(args, data, torch.device("cpu")))))
    args.seed, args.max_params = costs.index(max(costs)), sorted(costs)[1]
    s = dha.start(args, data, torch.device("cpu"))
    assert common.count_parameters(freeze_all(s)) <= args.max_params < max(costs)
    args.max_params, drawn = 1, []
    monkeypatch.setattr(dha.SparseSupernet, "recover", lambda net, lam=0: drawn.append(net.b[0].tolist()))
    monkeypatch.setattr(dha, "overrun", lambda *given: 2.0)
    with pytest.raises(common.InputError, match="raise them"):
        dha.start(args, data, torch.device("cpu"))
    assert len(drawn) == 302 and len({str(b) for b in drawn}) == 39  # the first two are one; node 0 is every eighth


@pytest.mark.parametrize("frozen", ["some", "all", "given"])
def test_state_goes_on_bit_for_bit(frozen, tmp_path):
    data, args = settings(*["--genotype", "DARTS_V2"] * (frozen == "given"))

    def build(seed):  # another A, b and theta
        torch.manual_seed(seed)
        args.seed = seed
        return (dha.start if frozen == "given" else dha.DHA)(args, data, torch.device("cpu"))

    def go_on(s):
        torch.manual_seed(9)
        measured = steps(s, data, args, 2)
        moved = s.net.recover(args.lasso) if not all(s.net.frozen) else []
        return measured + steps(s, data, args, 2), moved

    s = build(0)
    steps(s, data, args, 2)
    if frozen == "some":
        s.net.freeze(2), s.net.freeze(5)
        move_b(s.net)
        s.net.recover()
    if frozen == "all":
        freeze_all(s)
    steps(s, data, args, 2)
    torch.save(dha.state_of(s), tmp_path / "state.pt")
    other = build(7)
    dha.restore(other, torch.load(tmp_path / "state.pt", weights_only=True))
    (mine, moved), (theirs, moved_too) = go_on(s), go_on(other)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs)) and moved == moved_too
    assert other.net.support == s.net.support and other.net.frozen == s.net.frozen
    assert [p.requires_grad for p in other.theta] == [p.requires_grad for p in s.theta]
    for a, b in zip(s.net.state_dict().values(), other.net.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(s.tau, other.tau) and s.lr == other.lr and s.wd == other.wd


@pytest.mark.parametrize("size", [31, 32, 8])
def test_supernet_takes_odd_and_small_images(size):
    assert dha.SparseSupernet(4, 3, 3, b_scale=0.3)(torch.rand(2, 3, size, size)).shape == (2, 3)


def test_auxiliary_head_only_in_training():
    net, x = dha.SparseSupernet(4, 3, 3, auxiliary=True), torch.rand(2, 3, 32, 32)
    assert [tuple(o.shape) for o in net(x)] == [(2, 3), (2, 3)]
    assert net.eval()(x).shape == (2, 3)


# -------- The loop ------------------------------------------------------------------------------------------

def loop(tmp_path, monkeypatch, step, *flags):
    """search_and_train with a step of one's own on every batch: the run and what was learned."""
    s, data, args = tiny("--out", str(tmp_path / "run"), *flags, count=16)
    monkeypatch.setattr(dha, "train_step", lambda *given: step(s) or torch.zeros(2))
    run = dha.open_run(args, torch.device("cpu"))
    dha.search_and_train(s, args, data, run)
    return run, s


def test_an_epochs_record_names_the_support_that_it_trained_with(tmp_path, monkeypatch):
    trained = []

    def step(s):
        trained.append(s.net.support)
        len(trained) % 2 or all(s.net.frozen) or move_b(s.net)  # two steps an epoch

    run, s = loop(tmp_path, monkeypatch, step, "--search-epochs", "4", "--train-epochs", "2")
    supports = [record["support"] for record in run.history]
    assert supports == trained[::2] == trained[1::2]
    assert all(a != b for a, b in zip(supports[:3], supports[1:4]))  # recovery changed it in between
    assert supports[3:] == [s.net.support] * 3  # fixed as it was last trained
    assert [record["phase"] for record in run.history] == ["search"] * 4 + ["train"] * 2


def test_a_node_without_alpha_freezes_only_when_the_search_ends(tmp_path, monkeypatch):
    def step(s):
        if not all(s.net.frozen):
            s.net.b[3].data.zero_()  # alpha is 0, and does not move; the others' does not either

    run, s = loop(tmp_path, monkeypatch, step, "--search-epochs", "5", "--train-epochs", "1")
    assert [record["frozen"] for record in run.history] == [0, 7, 7, 7, 7, 8]
    assert [record["phase"] for record in run.history] == ["search"] * 5 + ["train"]
    assert all(s.net.frozen)


def test_the_search_ends_early_when_all_nodes_are_frozen(tmp_path, monkeypatch):
    run, s = loop(tmp_path, monkeypatch, lambda s: None, "--search-epochs", "9", "--train-epochs", "2")
    assert [record["phase"] for record in run.history] == ["search", "train", "train"]
    assert [record["frozen"] for record in run.history] == [0, 8, 8]


# -------- Several processes ---------------------------------------------------------------------------------

def meet(rank, folder):
    """What this process finds where every process has another b: its part in a group of two."""
    meeting = {"init_method": f"file://{folder}/meet", "rank": rank, "world_size": 2}
    dist.init_process_group("gloo", **meeting, timeout=timedelta(seconds=60))
    try:
        torch.manual_seed(0)
        net = dha.SparseSupernet(4, 10, 3, b_scale=0.3)
        net.freeze(6)
        torch.manual_seed(rank)
        move_b(net)
        moved = net.recover()
        params = [torch.zeros(2, 3), torch.zeros(4), torch.zeros(1)]
        for p in params[:2]:
            p.grad = torch.full_like(p, rank + 1.0)
        dha.average_gradients(params)
    finally:
        dist.destroy_process_group()
    found = {name: getattr(net, name) for name in ("support", "alpha", "A_S", "alpha_S")}
    return found | {"moved": moved, "grads": [p.grad for p in params]}


def test_processes_share_the_support_of_rank_0_and_the_gradients(tmp_path):
    code = "import sys, torch, test_dha; torch.save(test_dha.meet(1, sys.argv[1]), sys.argv[1] + '/1.pt')"
    paths = [str(Path(dha.__file__).parent), str(Path(__file__).parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(tmp_path)]
    other = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    mine = meet(0, tmp_path)
    said = other.communicate(timeout=60)[1]
    assert other.returncode == 0, said
    theirs = torch.load(tmp_path / "1.pt")
    torch.manual_seed(0)
    net = dha.SparseSupernet(4, 10, 3, b_scale=0.3)  # what rank 0 finds, alone
    net.freeze(6)
    torch.manual_seed(0)
    move_b(net)
    alone = {"moved": net.recover(), "support": net.support, "alpha": net.alpha}
    for found in (mine, theirs):
        assert found["support"] == alone["support"] and found["moved"] == pytest.approx(alone["moved"])
        assert torch.allclose(found["alpha"], alone["alpha"], atol=1e-6)
        for k in range(8):
            S = [7 * state + OPS.index(name) for name, state in found["support"][k]]
            assert torch.equal(found["alpha_S"][k], found["alpha"][k, S])
            assert torch.equal(found["A_S"][k], net.A[k][:, S])
        assert [g.unique().tolist() for g in found["grads"][:2]] == [[1.5], [1.5]]  # the mean of 1 and 2
        assert found["grads"][2] is None


# -------- No waiting ----------------------------------------------------------------------------------------

class Waits(TorchDispatchMode):
    """Notes what makes a GPU wait though pretended tensors do not show it: copies from device to device, and
    multinomial, which checks its input."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        devices = {t.device.type for t in [*args, out] if isinstance(t, torch.Tensor) and t.dim() > 0}
        if len(devices) > 1 or "multinomial" in str(func):
            self.seen.append(str(func))
        return out


def test_a_step_on_cuda_never_waits_for_the_host(monkeypatch):
    """On pretended CUDA tensors, which have no values: whatever needs one on the host raises."""
    s, _, args = tiny("--cutout", "16", "--auxiliary-weight", "0.4", "--drop-path", "0.2")
    s.net.drop_path_prob, calls = 0.1, []
    s.net.freeze(2)

    def backward(loss):  # autograd's own engine wants a real device
        calls.append(loss.device.type)
        for p in [*s.theta, *s.net.b, s.tau]:
            p.grad = torch.empty_like(p) if p.requires_grad else None

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in s.net.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    there = torch.empty(p.shape, device="cuda")
                    module._parameters[name] = torch.nn.Parameter(there, p.requires_grad)
            for name, b in module._buffers.items():
                module._buffers[name] = torch.empty(b.shape, dtype=b.dtype, device="cuda")
        s.theta = [p for name, p in s.net.named_parameters() if not name.startswith("b.")]
        s.b_optimizer = torch.optim.Adam(s.net.b)
        s.tau = torch.empty(14, 14, device="cuda", requires_grad=True)
        s.lr, s.wd, s.mean, s.std = (torch.empty(n, device="cuda") for n in ((), (), 3, 3))
        images = torch.empty(8, 3, 32, 32, dtype=torch.uint8, device="cuda")
        labels = torch.empty(8, dtype=torch.long, device="cuda")
        with Waits() as waits:
            for _ in range(2):
                measured = dha.train_step(s, images, labels, args)
        assert measured.device.type == "cuda" and calls == ["cuda"] * 4 and waits.seen == []
        with pytest.raises(Exception, match="local_scalar"):
            float(measured.sum())  # the pretended device does notice
