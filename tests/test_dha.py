"""DHA's parts against oracles: KKT conditions, autograd through the update, written-out sums, pruned networks."""

import argparse
import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import common
import dha
from conftest import needs_a_gpu
from dha import OPS

TINY = "--preset quick --gpu -1 --channels 4 --layers 3 --batch-size 8 --out no-such-run".split()
CPU = torch.device("cpu")


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
    support = dha.to_support(common.load_genotype(args.genotype)) if args.genotype else None
    return dha.Learned(args, data, CPU, support), data, args


def steps(s, data, args, count, first=0):
    """The measured (loss, accuracy) of `count` steps on batches of 8, one after the other."""
    parts = [slice(8 * i, 8 * i + 8) for i in range(first, first + count)]
    batches = [(data.train_images[part], data.train_labels[part]) for part in parts]
    return [dha.train_step(s, *batch, args) for batch in batches]


def normalized(s, images):
    return common.normalize(images, s.mean, s.std)


def move_b(net, scale=0.3):
    """A b from elsewhere, whose alpha has another support."""
    with torch.no_grad():
        for b in net.b:
            b.normal_(0, scale)


def recover(net, lam=1e-5):
    """Alpha from b, and its support: how far each node's alpha moved."""
    return net.set_alpha(net.decode(lam))


def freeze_all(s):
    """What the end of the search does."""
    args = argparse.Namespace(max_params=None, max_flops=None)
    dha.decode_and_freeze(s, args, 32, final=True)
    return s.net


def running(net, k):
    """The operations of node k that run, cell by cell."""
    cells = [cell for cell in net.cells if cell.first_node <= k < cell.first_node + len(cell.nodes)]
    return [cell.nodes[k - cell.first_node][f"{name}_{state}"] for cell in cells for name, state in net.support[k]]


def norms(net, k):
    """The batch norms in them."""
    return [module for op in running(net, k) for module in op.modules() if isinstance(module, torch.nn.BatchNorm2d)]


def set_args(args, **values):
    return argparse.Namespace(**{**vars(args), **values})


# -------- ISTA (Eq. 4) --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("kind", ["random", "near a column", "columns repeat", "zero columns"])
def test_ista_solves_the_lasso(kind, scale):
    """A batch for each of 14 to 35 candidates, in a few hundred rounds, by the conditions of optimality (KKT)."""
    for n in (14, 21, 28, 35):
        A = torch.rand(8, 7, n, dtype=torch.float64)
        b = scale * torch.randn(8, 7, dtype=torch.float64)
        if kind == "near a column":
            b = scale * (A[..., n // 2] + 0.02 * torch.randn_like(b))
        elif kind == "columns repeat":
            A[..., 7:14] = A[..., :7]
        elif kind == "zero columns":
            A[..., 3] = A[..., n - 2 :] = 0
        alpha = dha.ista(A, b, 1e-5, rounds=300)

        # A_i^T (b - A alpha) = lam sign(alpha_i) where alpha_i is not 0, and within +-lam elsewhere
        slope = torch.einsum("pmn,pm->pn", A, b - torch.einsum("pmn,pn->pm", A, alpha))
        on = alpha != 0
        error = torch.where(on, (slope - 1e-5 * alpha.sign()).abs(), (slope.abs() - 1e-5).clamp(min=0))
        assert (error.amax(1) <= 1.01e-9 * torch.einsum("pmn,pm->pn", A, b).abs().amax(1)).all()
        assert on.any(1).all() and not (on & (A == 0).all(1)).any()


def test_ista_finds_what_trying_all_signs_finds():
    """With m < n: for each choice of signs the minimum is a linear system; the best that has these signs wins."""
    A, b, lam = torch.rand(3, 5, dtype=torch.float64), torch.randn(3, dtype=torch.float64), 1e-2

    def objective(alpha):
        return float(0.5 * (A @ alpha - b).square().sum() + lam * alpha.abs().sum())

    best = torch.zeros(5, dtype=torch.float64)
    for signs in itertools.product((-1.0, 0.0, 1.0), repeat=5):
        signs = torch.tensor(signs, dtype=torch.float64)
        on = signs != 0
        if 0 < int(on.sum()) <= 3:
            alpha = torch.zeros(5, dtype=torch.float64)
            alpha[on] = torch.linalg.solve(A[:, on].T @ A[:, on], A[:, on].T @ b - lam * signs[on])
            if torch.equal(alpha.sign(), signs) and objective(alpha) < objective(best):
                best = alpha
    assert best.any()
    torch.testing.assert_close(dha.ista(A, b, lam), best, rtol=1e-6, atol=1e-9)


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


@pytest.mark.parametrize("bad", ["integers", "NaN in b", "infinite b", "NaN in A", "lam", "NaN lam"])
def test_ista_refuses_numbers_without_a_solution_at_once(bad, monkeypatch):
    monkeypatch.setattr(dha, "soft_threshold", None)  # before its first step
    A, b, lam = torch.rand(7, 14), torch.randn(7), {"lam": -1e-5, "NaN lam": math.nan}.get(bad, 1e-5)
    if bad == "integers":
        b = torch.arange(7)
    elif "lam" not in bad:
        (A if "A" in bad.split() else b)[..., 3] = math.inf if "inf" in bad else math.nan
    with pytest.raises(ValueError, match="finite numbers"):
        dha.ista(A, b, lam)


def test_ista_computes_on_the_cpu_and_returns_to_the_device(monkeypatch):
    """On pretended CUDA tensors, which have no values: every condition counts as true, so that one round is enough."""
    seen = []
    for name in ("soft_threshold", "active_set_step"):
        real = getattr(dha, name)
        monkeypatch.setattr(dha, name, lambda *given, real=real: seen.append(given) or real(*given))
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda tensor: True)
    with FakeTensorMode():
        A, b = torch.empty(8, 7, 35, device="cuda"), torch.empty(8, 7, device="cuda")
        alpha = dha.ista(A, b, 1e-5)
    assert (alpha.device, alpha.dtype, alpha.shape) == (b.device, b.dtype, (8, 35))
    assert len(seen) == 50 + 3
    tensors = [t for given in seen for t in given if isinstance(t, torch.Tensor)]
    assert {(t.device.type, t.dtype) for t in tensors} == {("cpu", torch.float64)}


# -------- Hyper-parameters (Eq. 3) --------------------------------------------------------------------------


def test_hypergradient_equals_autograd_through_the_update():
    double = {"dtype": torch.float64}
    theta, v0 = ([torch.randn(s, **double) for s in ((5, 4), (5,), (3, 5), (3,))] for _ in range(2))
    x, y = torch.randn(2, 6, 4, **double), torch.randint(3, (2, 6))

    def loss(p, i):
        return F.cross_entropy(torch.tanh(x[i] @ p[0].T + p[1]) @ p[2].T + p[3], y[i])

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


@pytest.mark.parametrize("beta", [3.0, 1e6])  # so large that the ranges end the step
def test_a_step_moves_the_weights_by_v_and_eta_against_its_gradient(monkeypatch, beta):
    monkeypatch.setattr(dha, "GRAD_CLIP", 0.1)
    s, data, args = tiny("--beta", str(beta))
    T = 7 * (len(data.train_images) // args.batch_size)
    assert s.eta.optimizer.param_groups[0]["lr"] == pytest.approx(beta / T)
    seen, real, rates = [], dha.hypergradient, []
    squares = torch.zeros(2, dtype=torch.float64)  # Adam's running mean of the gradient's squares

    def norm():
        return torch.cat([p.grad.flatten() for p in s.theta if p.grad is not None]).norm()

    def spy(grads, velocity, theta, lr):
        held = [s.velocity[p] for p in theta]  # the last update's v, of what ran then and now
        assert all(g is p.grad and v is w for g, p, v, w in zip(grads, theta, velocity, held, strict=True))
        assert norm() > 0.2 and float(lr) == rates[-1]  # not yet clipped; the rate of the last step
        seen.append((theta, *real(grads, velocity, theta, lr)))
        return seen[-1][1:]

    monkeypatch.setattr(dha, "hypergradient", spy)
    for i in range(4):
        if i == 3:
            s.eta.set_lr(0.03)  # as a warm-up does between two epochs
        before = {p: p.detach().clone() for p in s.theta}
        lr, wd = s.eta.lr, s.eta.wd
        velocity = {p: v.clone() for p, v in s.velocity.items()}
        steps(s, data, args, 1, i)
        rates.append(float(s.eta.lr))
        assert norm() <= 0.1001
        for p, old in before.items():
            v = 0 if p.grad is None else 0.9 * velocity.get(p, 0) + p.grad + s.eta.wd * old
            assert torch.allclose(p.detach(), old - s.eta.lr * v, atol=1e-6 * max(1, float(old.abs().max())))
            assert (p in s.velocity) == (p.grad is not None)
        assert len(seen) == i  # the first step has no update before it
        if i:
            theta, d_lr, d_wd = seen[-1]
            assert set(theta) == velocity.keys() & {p for p in s.theta if p.grad is not None}
            gradient = torch.stack([lr * d_lr, wd * d_wd]).double()  # of (log lr, log wd)
            squares = 0.999 * squares + 0.001 * gradient**2
            step = s.eta.optimizer.param_groups[0]["lr"] * gradient / (squares / (1 - 0.999**i)).sqrt()
            for new, old, change, ends in zip((s.eta.lr, s.eta.wd), (lr, wd), step, (dha.LR_RANGE, dha.WD_RANGE)):
                want = min(max(math.log(old) - float(change), math.log(ends[0])), math.log(ends[1]))
                assert math.log(new) == pytest.approx(want, abs=1e-5)
        if i == 1 and beta > 100:  # Adam's first step is beta / T
            assert min(abs(math.log(s.eta.lr / end)) for end in dha.LR_RANGE) < 1e-5
            assert min(abs(math.log(s.eta.wd / end)) for end in dha.WD_RANGE) < 1e-5
        if i == 1:  # then another support runs
            move_b(s.net)
            recover(s.net)


def lr_of_a_tracker(lr: float, steps: int, best: float) -> torch.Tensor:
    """lr at the end of each tenth of a run: SGD follows a target that walks at random, and sees it with noise.

    The loss is |theta - target|^2 / 2 in 2,000 dimensions. Of all constant rates `best` has the smallest mean loss, by
    the stationary Kalman gain K: walk^2 = noise^2 K^2 / (1 - K).
    """
    torch.manual_seed(0)
    walk = best / math.sqrt(1 - best)  # of the target in a step; the noise of a gradient is 1
    theta, target, velocity = [torch.zeros(2000)], torch.zeros(2000), [torch.zeros(2000)]
    eta = dha.Eta(lr, 1e-3, beta=10.0, steps=steps)
    seen = []
    for i in range(steps):
        grads = [theta[0] - target + torch.randn(2000)]
        if i:
            eta.step(*dha.hypergradient(grads, velocity, theta, eta.lr))
        dha.sgd_step(theta, grads, velocity, eta.lr, torch.tensor(0.0), momentum=0.0)
        target = target + walk * torch.randn(2000)
        seen.append(eta.lr)
    return torch.stack(seen)[steps // 10 - 1 :: steps // 10]


def test_lr_finds_the_best_rate_whatever_it_starts_at_and_however_long_the_run_is():
    best = 0.02
    for start in (best / 20, 5 * best):
        short, long = (lr_of_a_tracker(start, T, best) for T in (2000, 4000))
        assert best / 1.5 < short[-1] < 1.5 * best and best / 1.5 < long[-1] < 1.5 * best
        assert ((short / long).log().abs() < math.log(1.5)).all()  # at the same share of the run
        assert short[0] > 1.5 * start if start < best else short[0] < start / 1.5


@pytest.mark.parametrize("wd", ["3e-4", "0"])
def test_without_hpo_eta_stays(wd):
    s, data, args = tiny("--no-hpo", "--weight-decay", wd)
    steps(s, data, args, 3)
    assert float(s.eta.lr) == pytest.approx(args.lr) and float(s.eta.wd) == pytest.approx(float(wd))


# -------- Data augmentation (Eq. 2) -------------------------------------------------------------------------


def test_policy_gradient_is_that_of_the_written_out_sum():
    tau = (0.3 * torch.randn(14, 14, dtype=torch.float64)).requires_grad_()
    pairs, losses = torch.randint(196, (64,)), torch.rand(64, dtype=torch.float64) * 3
    mine = dha.policy_loss(tau, pairs, losses.requires_grad_(), "p")
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
    s, data, args = tiny("--tau-lr", "2", "--da-weight", "p")
    seen = {}
    for name in ("policy_loss", "apply_pairs"):
        real = getattr(dha, name)
        monkeypatch.setattr(dha, name, lambda *given, name=name, real=real: seen.update({name: given}) or real(*given))
    before = s.tau.detach().flatten().softmax(0)
    (measured,) = steps(s, data, args, 1)
    _, pairs, losses, *_ = seen["policy_loss"]
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


def test_pairs_are_drawn_even_where_tau_is_not_finite():
    """The end of the epoch says so in one line; until then a step must not raise (on a GPU: break the device)."""
    for value in (math.nan, math.inf):
        pairs = dha.sample_pairs(torch.full((14, 14), value), 8)
        assert pairs.shape == (8,) and 0 <= pairs.min() and pairs.max() < 196


def test_apply_pairs_order_magnitudes_and_purity(monkeypatch):
    images, pairs = torch.rand(4000, 3, 1, 1), torch.randint(196, (4000,))
    kept, seen = images.clone(), {}
    for k, name in enumerate(dha.AUGMENTATIONS):

        def note(x, m, name=name, k=k):
            seen.setdefault(name, []).append(m)
            return x * 0.5 + k / 100

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
    for _ in range(2):
        move_b(net)
        recover(net)
        alpha = dha.ista(net.A, torch.stack(list(net.b)), 1e-5).view(8, 5, 7)
        for k in range(8):
            best = alpha[k].abs().amax(1).tolist()  # of each state
            states = sorted(sorted(range(k % 4 + 2), key=best.__getitem__)[-2:])
            want = [(OPS[int(alpha[k, state].abs().argmax())], state) for state in states]
            assert net.support[k] == want
        genotype = net.genotype()
        assert genotype.normal + genotype.reduce == [edge for node in net.support for edge in node]
        assert net.skip_connects() == ([name for name, _ in genotype.normal].count("skip_connect"), 8)


def test_strengths_are_the_papers_expression():
    net = dha.SparseSupernet(4, 10, 3, b_scale=0.3).double()
    for b in net.b:
        b.data += 0.01 * torch.randn_like(b)  # during an epoch b moves, alpha does not
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

    def spy(net, k):
        seen.append((k, net.b[k].detach().clone(), real(net, k)))
        return seen[-1][2]

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
    recover(net, lam=1e3)  # everything shrinks to 0
    assert net.alpha.abs().sum() == 0
    assert all(len({state for _, state in edges}) == 2 for edges in net.support)


def test_batch_norms_of_candidates_are_no_weights_until_their_node_freezes():
    """Nor do they move, whatever an optimizer has of the network's parameters. Frozen ones learn."""
    s, data, args = tiny()
    net = s.net
    candidates = {m for cell in net.cells for m in cell.nodes.modules() if isinstance(m, torch.nn.BatchNorm2d)}
    assert len(candidates) > 3 * 4 * 7 and not any(p.ndim == 1 for m in candidates for p in m.parameters())
    assert all(p.ndim > 1 for name, p in net.named_parameters() if ".nodes." in name)
    net.freeze(2), net.freeze(5)
    s.collect_theta()
    learning = [norm for k in (2, 5) for norm in norms(net, k)]
    assert {p for norm in learning for p in norm.parameters()} <= set(s.theta) and len(learning) >= 2 * 3
    assert set(s.theta) == set(net.parameters()) - set(net.b)
    steps(s, data, args, 2)
    for norm in candidates:
        still = (norm.weight == 1).all() and not norm.bias.any()
        assert still == (norm not in learning)


class WrittenOut(torch.nn.Module):
    """What a SparseSupernet runs: two operations a node, each with a batch norm, times a strength."""

    def __init__(self, net):
        super().__init__()
        self.stem, self.classifier = copy.deepcopy(net.stem), copy.deepcopy(net.classifier)
        self.preprocess, self.ops, self.edges = torch.nn.ModuleList(), torch.nn.ModuleList(), []
        for cell in net.cells:
            self.preprocess += [copy.deepcopy(cell.preprocess0), copy.deepcopy(cell.preprocess1)]
            for k in range(cell.first_node, cell.first_node + 4):
                for name, state in net.support[k]:
                    channels = cell.preprocess1[1].out_channels
                    op = common.operation(name, channels, 2 if k >= 4 and state < 2 else 1)
                    if isinstance(op[0], (torch.nn.Identity, torch.nn.MaxPool2d, torch.nn.AvgPool2d)):
                        op.append(torch.nn.BatchNorm2d(channels))
                    op.load_state_dict(cell.nodes[k % 4][f"{name}_{state}"].state_dict())
                    self.ops.append(op)
                    self.edges.append((k, state))

    def forward(self, x, strengths):
        s0 = s1 = self.stem(x)
        for i in range(len(self.preprocess) // 2):
            states = [self.preprocess[2 * i](s0), self.preprocess[2 * i + 1](s1)]
            for j in range(8 * i, 8 * i + 8, 2):
                first, second = (self.ops[n](states[self.edges[n][1]]) for n in (j, j + 1))
                k = self.edges[j][0]
                states.append(strengths[k][0] * first + strengths[k][1] * second)
            s0, s1 = s1, torch.cat(states[2:], 1)
        return self.classifier(s1.mean((2, 3)))

    def norms(self, k):
        ops = [op for op, (node, _) in zip(self.ops, self.edges) if node == k]
        return [module for op in ops for module in op.modules() if isinstance(module, torch.nn.BatchNorm2d)]

    def counterparts(self, net):
        """Pairs: a weight or a running statistic of this network, and the same in the SparseSupernet."""
        same = [(self.stem, net.stem), (self.classifier, net.classifier)]
        theirs = iter(self.ops)
        for i, cell in enumerate(net.cells):
            same += [(self.preprocess[2 * i], cell.preprocess0), (self.preprocess[2 * i + 1], cell.preprocess1)]
            for k in range(cell.first_node, cell.first_node + 4):
                for name, state in net.support[k]:
                    same.append((next(theirs), cell.nodes[k % 4][f"{name}_{state}"]))
        return [(value, b.state_dict()[name]) for a, b in same for name, value in a.state_dict().items()]


@pytest.fixture
def float64(monkeypatch):
    """Is what torch computes with, also where a script asks for float()."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_training_with_frozen_nodes_is_that_of_the_written_out_network(float64, monkeypatch):
    """None frozen, some, all: strengths that are constant factors, affine batch norms, torch's SGD and Adam."""
    monkeypatch.setattr(dha, "GRAD_CLIP", 1.0)
    s, data, args = tiny("--no-da", "--no-hpo", "--lr", "0.05", "--weight-decay", "1e-2", count=192)
    images, labels, net = data.train_images[:, :, ::2, ::2], data.train_labels, s.net
    oracle = WrittenOut(net)
    b = [p.detach().clone().requires_grad_() for p in net.b]
    columns = [torch.tensor([7 * state + OPS.index(name) for name, state in pairs]) for pairs in net.support]
    A, alpha, factors = net.A.clone(), net.alpha.clone(), {}
    assert alpha.dtype == torch.float64

    def strength(k):  # b^T A - alpha^T (A^T A - I) on the support
        if k in factors:
            return factors[k]
        A_S = A[k][:, columns[k]]
        return b[k] @ A_S - alpha[k][columns[k]] @ (A_S.T @ A_S - torch.eye(2))

    def freeze(k):
        factors[k] = strength(k).detach()
        new = [p for norm in oracle.norms(k) for p in norm.parameters()]
        for p in new:
            p.requires_grad_(True)
        sgd.add_param_group({"params": new})
        b[k].grad = None

    for k in range(8):
        for norm in oracle.norms(k):
            norm.requires_grad_(False)
    weights = [p for p in oracle.parameters() if p.requires_grad]
    sgd = torch.optim.SGD(weights, 0.05, momentum=0.9, weight_decay=1e-2)
    adam = torch.optim.Adam(b, args.arch_lr, betas=(0.5, 0.999), weight_decay=1e-3)
    for i in range(24):
        if i == 4:
            for k in (1, 6):
                net.freeze(k), freeze(k)
            s.collect_theta()
            assert all((net.factors[k] - factors[k]).abs().max() <= 1e-15 for k in (1, 6))
            held = [p.detach().clone() for p in net.b]
        if i == 13:
            moved = [not torch.equal(p, q) for p, q in zip(net.b, held)]
            assert moved == [k not in (1, 6) for k in range(8)]
            for k in set(range(8)) - {1, 6}:
                freeze(k)
            freeze_all(s)
            assert not list(net.b) and set(s.theta) == set(net.parameters())
        x, y = images[8 * i : 8 * i + 8], labels[8 * i : 8 * i + 8]
        mine = dha.train_step(s, x, y, args)

        logits = oracle(common.normalize(x / 255, s.mean, s.std), [strength(k) for k in range(8)])
        loss = F.cross_entropy(logits, y)
        sgd.zero_grad(), adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for group in sgd.param_groups for p in group["params"]], 1.0)
        sgd.step(), adam.step()
        assert float(mine[0]) == pytest.approx(float(loss.detach()), abs=1e-10)
        for p, q in oracle.counterparts(net):
            assert (p - q).abs().max() <= 1e-10
        assert all((p - q).abs().max() <= 1e-10 for p, q in zip(b, net.b))
    assert all((norm.weight != 1).any() for k in range(8) for norm in norms(net, k))


@pytest.mark.parametrize("training", [False, True])
def test_freezing_and_pruning_change_no_logits(training, tmp_path, monkeypatch):
    """Nor do model.pt and a resumed run: they hold the factors, which a given genotype has not."""
    s, data, args = tiny()
    steps(s, data, args, 2)
    x = normalized(s, data.test_images)

    def logits(net):
        with torch.no_grad():
            return net.train(training)(x)

    before = logits(s.net)
    kept = {k: running(s.net, k) for k in range(8)}
    size, genotype = len(s.net.state_dict()), s.net.genotype()
    for k in (0, 3, 6):
        s.net.freeze(k)
        torch.testing.assert_close(logits(s.net), before)
    s.collect_theta()
    other, pruned = tiny()[0], tiny()[0]
    other.load_state_dict(s.state_dict())  # where some are frozen
    assert torch.equal(logits(other.net), logits(s.net)) and other.net.frozen == s.net.frozen

    freeze_all(s)
    torch.testing.assert_close(logits(s.net), before)
    assert s.net.genotype() == genotype and {k: running(s.net, k) for k in range(8)} == kept
    assert len(s.net.state_dict()) < size / 3 and not list(s.net.b)
    assert s.velocity and s.velocity.keys() <= set(s.theta) == set(s.net.parameters())
    steps(s, data, args, 2)
    assert all(p.grad is not None for p in s.theta)

    monkeypatch.setattr(dha, "draw_dha", lambda *given: None)
    record = {"phase": "train", "seconds": 1.0, "gpus": 0, "test_accuracy": 50.0}
    dha.save_dha(s, set_args(args, out=str(tmp_path)), data, [record])
    loaded, _ = dha.load_model(tmp_path / "model.pt")
    pruned.load_state_dict(s.state_dict())
    assert torch.equal(logits(loaded), logits(s.net)) and torch.equal(logits(pruned.net), logits(s.net))
    assert loaded.frozen == [True] * 8 and (loaded.factors != 1).all()
    given = tiny("--genotype", str(tmp_path / "genotype.json"))[0].net
    assert given.genotype() == genotype and given.frozen == [True] * 8 and (given.factors == 1).all()
    assert [(name, p.shape) for name, p in given.named_parameters()] == [
        (name, p.shape) for name, p in loaded.named_parameters()
    ]


def test_a_state_holds_the_support_and_what_is_frozen():
    """For whoever takes SparseSupernet alone: torch.save(net.state_dict()), and back into another one."""
    torch.manual_seed(1)
    one, x = dha.SparseSupernet(4, 10, 3, b_scale=0.3), torch.randn(4, 3, 16, 16)
    one.freeze(1), one.freeze(6)
    one(x)  # running statistics
    other = dha.SparseSupernet(4, 10, 3, b_scale=0.3)
    assert other.support != one.support
    other.load_state_dict(one.state_dict())
    assert other.support == one.support and other.frozen == one.frozen == [k in (1, 6) for k in range(8)]
    assert other.genotype() == one.genotype()
    assert {name for name, _ in other.named_parameters()} == {name for name, _ in one.named_parameters()}
    for net in (one, other):
        net.eval()
    assert torch.equal(other(x), one(x)) and other.decode().equal(one.decode())

    fresh = dha.SparseSupernet(4, 10, 3, b_scale=0.3)
    fresh.freeze(2)
    with pytest.raises(ValueError, match="load it into a new one"):
        fresh.load_state_dict(one.state_dict())

    # A pruned network, and one that is built from its support alone
    for k in range(8):
        if not one.frozen[k]:
            one.freeze(k)
    one.prune()
    with pytest.raises(RuntimeError, match="Missing key"):
        dha.SparseSupernet(4, 10, 3).load_state_dict(one.state_dict())
    again = dha.SparseSupernet(4, 10, 3, support=dha.to_support(one.genotype())).eval()
    again.load_state_dict(one.state_dict())
    assert torch.equal(again(x), one(x)) and again.support == one.support and all(again.frozen)


def test_a_frozen_node_is_left_alone(monkeypatch):
    """Its b by Adam, which has momentum and weight decay; its alpha and support by the decoding."""
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
    moved = recover(s.net)
    live = [0, 1, 3, 4, 6, 7]
    ((A, b),) = problems
    assert torch.equal(A, s.net.A[live]) and torch.equal(b, torch.stack([s.net.b[k] for k in live]))
    for k in range(8):
        same = torch.equal(s.net.alpha[k], alpha[k])
        assert same == (k in (2, 5)) == (moved[k] == 0)
        assert moved[k] == pytest.approx(float((s.net.alpha[k] - alpha[k]).norm()), rel=1e-5)
    assert [s.net.support[k] for k in (2, 5)] == [support[k] for k in (2, 5)]
    assert s.net.support != support


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
    active = [op for k in range(8) for op in running(s.net, k)]
    assert set(called) == set(active) and len(active) == 3 * 8
    out.sum().backward()
    inactive = {p for cell in s.net.cells for p in cell.nodes.parameters()}
    inactive -= {p for op in active for p in op.parameters()}
    assert inactive and all(p.grad is None for p in inactive)
    strengthened = sum(called.values())  # outputs that a strength's gradient wants
    theirs, _ = saved_bytes(freeze_all(s), x)
    assert mine <= theirs + strengthened + 100_000


def test_limits_are_those_of_the_pruned_network():
    s, data, args = tiny("--auxiliary-weight", "0.4")
    for frozen in ((), (1, 6)):
        for k in frozen:
            s.net.freeze(k)
        move_b(s.net)
        alpha, before = s.net.decode(), s.net.support
        support = s.net.select_support(alpha)  # asked about before it is the network's
        other = copy.deepcopy(s)
        other.collect_theta()
        other.net.set_alpha(alpha)
        assert other.net.support == support != before
        pruned = freeze_all(other)
        costs = common.count_parameters(pruned), common.count_flops(pruned, 32)
        for flag, cost in zip(("max_params", "max_flops"), costs):
            for limit, share in ((cost, 1), (cost - 1, cost / (cost - 1))):
                assert dha.cost_share(s.net, support, set_args(args, **{flag: limit}), 32) == share
        both = set_args(args, max_params=2 * costs[0], max_flops=4 * costs[1])
        assert dha.cost_share(s.net, support, both, 32) == 0.5  # the largest
        assert dha.cost_share(s.net, support, args, 32) == 0
        assert s.net.support == before


def test_a_support_beyond_the_limits_is_rejected_and_the_last_one_stays():
    s, _, args = tiny("--max-params", "1")
    before = s.net.support, {name: value.clone() for name, value in s.net.state_dict().items()}
    move_b(s.net)
    b = [p.detach().clone() for p in s.net.b]
    assert dha.decode_and_freeze(s, args, 32, final=False) is None
    assert s.net.support == before[0] and not any(s.net.frozen)
    for name in ("alpha", "A_S", "alpha_S"):
        assert torch.equal(getattr(s.net, name), before[1][name])
    assert all(map(torch.equal, s.net.b, b))
    args.max_params = None
    moved = dha.decode_and_freeze(s, args, 32, final=False)
    assert len(moved) == 8 and min(moved) > dha.FREEZE_DISTANCE and not any(s.net.frozen)
    assert s.net.support != before[0]


def test_nodes_freeze_that_moved_no_further_than_the_bound(monkeypatch):
    s, _, args = tiny()
    net = s.net
    for step, k in ((1e-4, 1), (1e-2, 4)):  # the others stay where they are
        net.b[k].data += step * torch.randn(7)
    moved = copy.deepcopy(net).set_alpha(net.decode())
    monkeypatch.setattr(dha, "FREEZE_DISTANCE", (moved[1] + moved[4]) / 2)
    assert 0 < moved[1] < moved[4] and dha.decode_and_freeze(s, args, 32, final=False) == moved
    assert [k for k in range(8) if not net.frozen[k]] == [4] and len(net.b) == 8
    support = net.support
    move_b(net)
    assert dha.decode_and_freeze(s, args, 32, final=True) is None  # nothing is decoded at the end
    assert net.support == support and all(net.frozen) and len(net.b) == 0


def start(args, data):
    """What a run begins with."""
    torch.manual_seed(args.seed)
    s = dha.Learned(args, data, CPU)
    dha.start_within_limits(s.net, args, 32)
    return s


def test_a_run_starts_within_the_limits():
    data, args = settings()
    costs = []
    for args.seed in range(3):
        costs.append(common.count_parameters(freeze_all(start(args, data))))
    args.seed, args.max_params = costs.index(max(costs)), sorted(costs)[1]
    s = start(args, data)
    support = s.net.support
    recover(s.net)
    assert s.net.support == support  # that of its b
    assert common.count_parameters(freeze_all(s)) <= args.max_params < max(costs)


@pytest.mark.parametrize("enough", [0, 1, 300, 301])
def test_a_start_draws_300_times(enough, monkeypatch):
    """No draw makes it better; the last one that is looked at may bring it within the limits."""
    s, _, args = tiny()
    drawn, asked = [], []
    monkeypatch.setattr(dha.SparseSupernet, "decode", lambda net: drawn.append(net.b[0].tolist()) or net.alpha)
    monkeypatch.setattr(dha, "cost_share", lambda *given: asked.append(given) or (0.5 if len(asked) > enough else 2.0))
    if enough > 300:
        with pytest.raises(common.InputError, match="raise them"):
            dha.start_within_limits(s.net, args, 32)
        assert len({str(b) for b in drawn}) == 38  # node 0 is every eighth
    else:
        dha.start_within_limits(s.net, args, 32)
    assert len(drawn) == min(enough, 300)


@pytest.mark.parametrize("frozen", ["some", "all", "given"])
def test_state_goes_on_bit_for_bit(frozen, tmp_path):
    data, args = settings(*["--genotype", "DARTS_V2"] * (frozen == "given"))

    def build(seed):  # another A, b and theta
        torch.manual_seed(seed)
        support = dha.to_support(common.load_genotype(args.genotype)) if frozen == "given" else None
        return dha.Learned(args, data, CPU, support)

    def go_on(s):
        torch.manual_seed(9)
        measured = steps(s, data, args, 2)
        moved = recover(s.net) if not all(s.net.frozen) else []
        return measured + steps(s, data, args, 2), moved

    s = build(0)
    steps(s, data, args, 2)
    if frozen == "some":
        s.net.freeze(2), s.net.freeze(5)
        s.collect_theta()
        move_b(s.net)
        recover(s.net)
    if frozen == "all":
        freeze_all(s)
    steps(s, data, args, 2)
    torch.save(s.state_dict(), tmp_path / "state.pt")
    other = build(7)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    (mine, moved), (theirs, moved_too) = go_on(s), go_on(other)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs)) and moved == moved_too
    assert other.net.support == s.net.support and other.net.frozen == s.net.frozen
    assert len(other.theta) == len(s.theta) and set(other.theta) == set(other.net.parameters()) - set(other.net.b)
    for a, b in zip(s.net.state_dict().values(), other.net.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(s.tau, other.tau) and torch.equal(s.eta.logs, other.eta.logs)
    assert s.previous_lr == other.previous_lr


@pytest.mark.parametrize("size", [31, 32, 8])
def test_supernet_takes_odd_and_small_images(size):
    assert dha.SparseSupernet(4, 3, 3, b_scale=0.3)(torch.rand(2, 3, size, size)).shape == (2, 3)


def test_auxiliary_head_only_in_training():
    net, x = dha.SparseSupernet(4, 3, 3, auxiliary=True), torch.rand(2, 3, 32, 32)
    assert [tuple(o.shape) for o in net(x)] == [(2, 3), (2, 3)]
    assert net.eval()(x).shape == (2, 3)


# -------- The loop ------------------------------------------------------------------------------------------


def loop(tmp_path, monkeypatch, step, *flags, count=16):
    """A run with a step of one's own on every batch: its records, and what was learned."""
    data, args = settings("--out", str(tmp_path / "run"), *flags, count=count)
    ended = []
    monkeypatch.setattr(common, "load_data", lambda *given: data)
    monkeypatch.setattr(dha, "train_step", lambda s, images, *rest: step(s, images) or torch.zeros(2))
    monkeypatch.setattr(dha, "save_dha", lambda s, args, data, history: ended.extend([history, s]))
    dha.run_dha(args, CPU)
    return ended


def test_an_epochs_record_names_the_support_that_it_trained_with(tmp_path, monkeypatch):
    trained = []

    def step(s, images):
        trained.append(s.net.support)
        if len(trained) % 2 == 0 and not all(s.net.frozen):  # two steps an epoch
            move_b(s.net)

    history, s = loop(tmp_path, monkeypatch, step, "--search-epochs", "4", "--train-epochs", "2")
    supports = [record["support"] for record in history]
    assert supports == trained[::2] == trained[1::2]
    assert all(a != b for a, b in zip(supports[:3], supports[1:4]))  # the decoding changed it in between
    assert supports[3:] == [s.net.support] * 3  # fixed as it was last trained
    assert [record["phase"] for record in history] == ["search"] * 4 + ["train"] * 2


def test_a_node_without_alpha_freezes_only_when_the_search_ends(tmp_path, monkeypatch):
    def step(s, images):
        if not all(s.net.frozen):
            s.net.b[3].data.zero_()  # alpha is 0, and does not move; the others' does not either

    history, s = loop(tmp_path, monkeypatch, step, "--search-epochs", "5", "--train-epochs", "1")
    assert [record["frozen"] for record in history] == [0, 7, 7, 7, 7, 8]
    assert [record["phase"] for record in history] == ["search"] * 5 + ["train"]
    assert all(s.net.frozen)


def test_the_search_ends_early_when_all_nodes_are_frozen(tmp_path, monkeypatch):
    history, s = loop(tmp_path, monkeypatch, lambda s, images: None, "--search-epochs", "9", "--train-epochs", "2")
    assert [record["phase"] for record in history] == ["search", "train", "train"]
    assert [record["frozen"] for record in history] == [0, 8, 8]


# -------- No waiting ----------------------------------------------------------------------------------------


class Waits(TorchDispatchMode):
    """Notes what makes a GPU wait though pretended tensors do not show it: copies from device to device, and
    multinomial, which looks at its input on the host, except where it draws several numbers with replacement."""

    def __init__(self):
        super().__init__()
        self.seen = []
        self.unbound = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        devices = {t.device.type for t in [*args, out] if isinstance(t, torch.Tensor) and t.dim() > 0}
        checked = func is torch.ops.aten.multinomial.default and not (args[1] > 1 and args[2:3] == (True,))
        if len(devices) > 1 or checked:
            self.seen.append(str(func))
        self.unbound += func is torch.ops.aten.unbind.int
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
        s.collect_theta()
        s.b_optimizer = torch.optim.Adam(s.net.b)
        s.tau = torch.empty(14, 14, device="cuda", requires_grad=True)
        s.eta = dha.Eta(0.05, 3e-4, 1.0, 100, "cuda")
        s.previous_lr = s.eta.lr
        s.mean, s.std = torch.empty(3, device="cuda"), torch.empty(3, device="cuda")
        images = torch.empty(8, 3, 32, 32, dtype=torch.uint8, device="cuda")
        labels = torch.empty(8, dtype=torch.long, device="cuda")
        with Waits() as waits:
            for _ in range(2):
                measured = dha.train_step(s, images, labels, args)
        assert measured.device.type == "cuda" and calls == ["cuda"] * 4 and waits.seen == []
        assert waits.unbound == 2 * 8  # a node's strengths at once, not one index after another
        with pytest.raises(Exception, match="local_scalar"):
            float(measured.sum())  # the pretended device does notice


# -------- On a GPU ------------------------------------------------------------------------------------------


@needs_a_gpu
def test_steps_on_a_gpu_are_those_on_a_cpu(exact):
    s, data, args = tiny()
    there = dha.Learned(args, data, torch.device("cuda"))
    there.load_state_dict(copy.deepcopy(s.state_dict()))

    torch.manual_seed(1)
    here = torch.stack(steps(s, data, args, 3))
    torch.manual_seed(1)
    found = torch.stack(steps(there, data.to("cuda"), args, 3))
    torch.testing.assert_close(found.cpu(), here, **exact)
    moved = there.net.state_dict()
    for name, value in s.net.state_dict().items():
        torch.testing.assert_close(moved[name].cpu(), value, **exact, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(there.tau.detach().cpu(), s.tau.detach(), **exact)
    torch.testing.assert_close(there.eta.logs.detach().cpu(), s.eta.logs.detach(), **exact)
    torch.testing.assert_close(there.net.decode().cpu(), s.net.decode(), **exact)


# -------- Eq. (2) as a ratio, and Eq. (3) on independent batches --------------------------------------------


def test_ratio_has_the_expected_gradient_of_importance_weighting():
    """Over all draws of two pairs from p, weighted by their probability: p (l - sum p l), less a share of the mean."""
    tau = torch.randn(14, 14, dtype=torch.float64)
    tau[1:] = -40.0  # 14 pairs are left
    p, loss = tau.flatten().softmax(0), torch.rand(196, dtype=torch.float64)
    total = torch.zeros(14, 14, dtype=torch.float64)
    for i, j in itertools.product(range(14), repeat=2):
        leaf = tau.clone().requires_grad_()
        pairs = torch.tensor([i, j])
        dha.policy_loss(leaf, pairs, loss[pairs], "ratio").backward()
        total -= p[i] * p[j] * leaf.grad
    expected = 2 * (1 - 1 / 2) * p * (loss - (p * loss).sum())  # B = 2; the batch's mean has half of each loss
    assert torch.allclose(total.flatten(), expected, atol=1e-12)


def test_entropy_is_part_of_the_ratio_alone():
    tau = torch.randn(14, 14, dtype=torch.float64, requires_grad=True)
    pairs, losses = torch.randint(196, (8,)), torch.full((8,), 2.0, dtype=torch.float64)
    dha.policy_loss(tau, pairs, losses, "ratio", entropy_weight=0.3).backward()  # equal losses: entropy alone moves tau
    leaf = tau.detach().clone().requires_grad_()
    p = leaf.flatten().softmax(0)
    (8 * 0.3 * (p * p.log()).sum()).backward()
    assert torch.allclose(tau.grad, leaf.grad, atol=1e-12)
    first, second = (dha.policy_loss(tau, pairs, losses, "p", entropy_weight=w) for w in (0.0, 0.3))
    assert torch.equal(first, second)
    with pytest.raises(ValueError, match="'Ratio'"):
        dha.policy_loss(tau, pairs, losses, "Ratio")


def moved_by_steps(steps, batch_size, step, loss, seed, weight="ratio", entropy_weight=0.3):
    """p after so many steps of Eq. (2) alone: every pair has its own mean loss, (196,), and noise as large as that."""
    g = torch.Generator().manual_seed(seed)
    tau = torch.zeros(14, 14, requires_grad=True)
    for _ in range(steps):
        pairs = torch.multinomial(tau.detach().flatten().softmax(0), batch_size, replacement=True, generator=g)
        losses = loss[pairs] * (1 + torch.randn(batch_size, generator=g))
        (gradient,) = torch.autograd.grad(dha.policy_loss(tau, pairs, losses, weight, entropy_weight), tau)
        tau = (tau.detach() - step * gradient).requires_grad_()
    return tau.detach().flatten().softmax(0)


def preset(name):
    args = dha.parse_args(["--preset", name, "--out", "nothing"])
    return args.tau_lr, args.batch_size, args.da_weight, args.da_entropy


def entropy(p):
    return float(torch.special.entr(p).sum())


def test_equal_losses_leave_the_policy_near_uniform():
    """For 5 times the 651 steps of quick, at its step. (As printed one pair would have all of p by then.)"""
    step, batch_size, weight, lam = preset("quick")
    p = moved_by_steps(3_255, batch_size, step, torch.ones(196), 0, weight, lam)
    assert weight == "ratio" and entropy(p) > 5.2 and p.max() < 0.02


HARD = torch.ones(196)
HARD[:39] = 1.2
SHARE = float((HARD / 0.3).softmax(0)[:39].sum())  # p ~ exp(l / lambda_H): 0.326, from 0.199 at the start


def test_harder_pairs_gain_as_the_closed_form_says_at_quicks_step():
    step, batch_size, weight, lam = preset("quick")
    shares = [float(moved_by_steps(651, batch_size, step, HARD, seed, weight, lam)[:39].sum()) for seed in range(4)]
    assert SHARE == pytest.approx(0.326, abs=1e-3) and sum(shares) / 4 == pytest.approx(SHARE, abs=0.03)
    p = moved_by_steps(2_600, batch_size, step, HARD, 9, weight, lam)  # and it stays there
    assert float(p[:39].sum()) == pytest.approx(SHARE, abs=0.05) and p.max() < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("name", ["paper", "imagenet"])
def test_harder_pairs_gain_as_the_closed_form_says(name):
    step, batch_size, weight, lam = preset(name)
    for steps in (15_000, 60_000):
        p = moved_by_steps(steps, batch_size, step, HARD, 0, weight, lam)
        assert float(p[:39].sum()) == pytest.approx(SHARE, abs=0.03) and p.max() < 0.02


def test_hypergradient_wants_independent_batches():
    """The exact mean of dL/dlr, over all pairs of batches of a least-squares problem, at fixed weights and velocity.

    Batches that are drawn independently meet it; neighbours in one permutation share no image, and do not.
    """
    torch.manual_seed(0)
    N, B, lr = 6, 2, 0.1
    x, y = torch.randn(N, 3, dtype=torch.float64), torch.randn(N, dtype=torch.float64)
    theta, v0 = torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)

    def gradient(w, batch):
        return x[batch].T @ (x[batch] @ w - y[batch]) / B

    def d_lr(first, second):
        v = 0.9 * v0 + gradient(theta, first)
        after = theta - lr * v
        return float(dha.hypergradient([gradient(after, second)], [v], [after], lr)[0])

    subsets = [list(batch) for batch in itertools.combinations(range(N), B)]
    exact = sum(d_lr(a, b) for a in subsets for b in subsets) / len(subsets) ** 2
    for independent in (True, False):
        draws = []
        for seed in range(3000):
            order = common.batch_indices(N, B, seed, independent=independent).tolist()
            draws.append(d_lr(order[0], order[1]))
        draws = torch.tensor(draws)
        error = abs(float(draws.mean()) - exact) / float(draws.std() / len(draws) ** 0.5)
        assert error < 3 if independent else error > 6, (independent, error)


def test_batches_are_independent_where_eq_3_learns(tmp_path, monkeypatch):
    """In a run: with HPO images come twice in an epoch, without it none does."""
    monkeypatch.setattr(common, "random_crop_flip", lambda images: images)
    for flags, twice in (([], True), (["--no-hpo"], False)):
        seen = []
        short = ["--search-epochs", "1", "--train-epochs", "0", *flags]
        loop(tmp_path / str(twice), monkeypatch, lambda s, images, seen=seen: seen.append(images), *short, count=64)
        images = torch.cat(seen)
        assert len(images) == 64 and (len(torch.unique(images, dim=0)) < 64) == twice
