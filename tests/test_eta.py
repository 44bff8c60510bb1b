"""dha.py's lr and wd (Eq. 3). Oracles: autograd through the update, torch's SGD and Adam."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

import common
import dha
from test_dha import move_b, step, tiny

DOUBLE = {"dtype": torch.float64}


def test_hypergradient_equals_autograd_through_the_update():
    """Of a network with several weights, with momentum and weight decay; the old gradient is constant."""
    theta, v0, g = ([torch.randn(s, **DOUBLE) for s in ((5, 4), (5,), (3, 5), (3,))] for _ in range(3))
    x, y = torch.randn(6, 4, **DOUBLE), torch.randint(3, (6,))

    def loss(p):
        return F.cross_entropy(torch.tanh(x @ p[0].T + p[1]) @ p[2].T + p[3], y)

    def updated(lr, wd):
        return [t - lr * (0.9 * v + d + wd * t) for t, v, d in zip(theta, v0, g)]

    eta = [torch.tensor(value, **DOUBLE, requires_grad=True) for value in (0.05, 0.01)]
    expected = torch.autograd.grad(loss(updated(*eta)), eta)
    lr, wd = (value.detach() for value in eta)
    plus, velocity = [t.clone() for t in theta], [v.clone() for v in v0]
    dha.sgd_step(plus, g, velocity, lr, wd)
    leaves = [t.clone().requires_grad_() for t in plus]
    mine = dha.hypergradient(torch.autograd.grad(loss(leaves), leaves), velocity, plus, lr)
    torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("updates", ["printed", "scale-free"])
def test_a_step_moves_eta_by_the_gradient_through_the_step_before_it(updates, float64, monkeypatch):
    """train_step against autograd through two steps: with momentum, clipping, an lr that a warm-up sets in between,
    a support that changes, and --beta's two numbers."""
    monkeypatch.setattr(dha, "GRAD_CLIP", 0.1)
    s, data, args = tiny("--no-da", "--updates", updates, "--beta", "0.3", "0.2", "--auxiliary-weight", "0")
    moves, expected = [], None
    monkeypatch.setattr(s.eta, "step", lambda *given, real=s.eta.step: (moves.append(given), real(*given)))

    def loss(weights, i):
        """Of the network as it is now, with these weights in place of some."""
        buffers = {name: buffer.clone() for name, buffer in s.net.named_buffers()}
        x = common.normalize(data.train_images[8 * i : 8 * i + 8, :, ::2, ::2] / 255, s.mean, s.std)
        return F.cross_entropy(functional_call(s.net, {**buffers, **weights}, x), data.train_labels[8 * i : 8 * i + 8])

    for i in range(4):
        names = {weight: name for name, weight in s.net.named_parameters()}
        theta = {weight: weight.detach().clone() for weight in s.theta}
        velocity = {weight: v.clone() for weight, v in s.velocity.items()}
        step(s, data, args, i, side=16)
        ran = {weight: weight.grad for weight in s.theta if weight.grad is not None}
        assert set(s.velocity) == set(ran) and len(moves) == i  # the first step has none before it
        assert torch.cat([g.flatten() for g in ran.values()]).norm() == pytest.approx(0.1, abs=1e-6)
        if i:
            torch.testing.assert_close(moves[-1][:2], expected, rtol=1e-9, atol=1e-12)
            assert all(float(g) for g in expected) and moves[-1][2] == (0.2 if i == 3 else 0.3)

        # The step as a function of lr and wd. A weight that did not run before starts with v = 0
        lr, wd = (value.clone().requires_grad_() for value in (s.eta.lr, s.eta.wd))
        stepped = {}
        for weight, g in ran.items():
            v = 0.9 * velocity.get(weight, torch.zeros_like(g)) + g + wd * theta[weight]
            stepped[names[weight]] = theta[weight] - lr * v
            torch.testing.assert_close(weight.detach(), stepped[names[weight]].detach(), rtol=0, atol=1e-12)
        if i == 1:
            s.eta.set_lr(0.03)
            move_b(s.net)
        if i == 2:
            s.net.frozen = [True] * 8  # the search is over
        expected = torch.autograd.grad(loss(stepped, i + 1), [lr, wd])


@pytest.mark.parametrize("updates", ["printed", "scale-free"])
def test_eta_moves_as_torchs_optimizers_move_it(updates):
    """printed: (lr, wd) by SGD. scale-free: their logarithms by Adam, by beta / T."""
    eta = dha.Eta(0.02, 3e-4, updates, steps=50, lr_range=(1e-6, 1.0), wd_range=(1e-6, 1.0))
    leaf = torch.tensor([0.02, 3e-4])
    if updates == "printed":
        leaf.requires_grad_()
        optimizer = torch.optim.SGD([leaf], 1.0, momentum=0.9, nesterov=True, weight_decay=5e-4)
    else:
        leaf = leaf.log().requires_grad_()
        optimizer = torch.optim.Adam([leaf], betas=(0.0, 0.999), eps=1e-12)
    for beta in (1e-6, 1e-6, 3e-6, 2e-6) if updates == "printed" else (10.0, 10.0, 5.0, 20.0):
        gradient = torch.randn(2) * torch.tensor([30.0, 1.0])
        values = leaf if updates == "printed" else leaf.exp()
        optimizer.zero_grad()
        (values * gradient).sum().backward()  # a loss with dL/dlr, dL/dwd = gradient
        optimizer.param_groups[0]["lr"] = beta if updates == "printed" else beta / 50
        before = torch.stack([eta.lr, eta.wd])
        eta.step(*gradient, beta)
        optimizer.step()
        moved = leaf.detach() if updates == "printed" else leaf.detach().exp()
        torch.testing.assert_close(torch.stack([eta.lr, eta.wd]), moved, rtol=1e-5, atol=0)
        assert not torch.equal(before, moved)


@pytest.mark.parametrize("updates", ["printed", "scale-free"])
def test_a_step_ends_at_the_ranges(updates):
    for sign, lr, wd in ((-1, 0.04, 4e-4), (1, 0.002, 2e-4)):
        eta = dha.Eta(0.01, 3e-4, updates, 1, lr_range=(0.002, 0.04), wd_range=(2e-4, 4e-4))
        eta.step(torch.tensor(sign * 1.0), torch.tensor(sign * 1.0), 100.0)
        assert (float(eta.lr), float(eta.wd)) == pytest.approx((lr, wd), rel=1e-6)
        eta.set_lr(0.5)  # a warm-up's, or the cosine's, need not lie there
        assert float(eta.lr) == pytest.approx(0.5)
    for wrong in (["ratio", 10], ["scale-free"]):  # the number of steps is missing
        with pytest.raises(ValueError, match="number of steps"):
            dha.Eta(0.01, 3e-4, *wrong)


def test_hypergradient_wants_independent_batches():
    """The exact mean of dL/dlr, over all pairs of batches of a least-squares problem, at fixed weights and velocity.

    Batches that are drawn independently meet it; neighbours in one permutation share no image, and do not.
    """
    N, B, lr = 6, 2, 0.1
    x, y, theta, v0 = (torch.randn(*shape, **DOUBLE) for shape in ((N, 3), (N,), (3,), (3,)))

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
        for seed in range(1500):
            order = common.batch_indices(N, B, seed, independent=independent).tolist()
            draws.append(d_lr(order[0], order[1]))
        draws = torch.tensor(draws)
        error = abs(float(draws.mean()) - exact) / float(draws.std() / len(draws) ** 0.5)
        assert error < 3 if independent else error > 5, (independent, error)
