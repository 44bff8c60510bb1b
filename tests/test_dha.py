"""DHA's parts against oracles: KKT conditions, autograd through the update, the written-out sums, the pruned network."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import common
import dha


def tiny_args(*flags: str):
    small = ["--preset", "quick", "--gpu", "-1", "--channels", "4", "--layers", "3", "--batch-size", "8"]
    return dha.parse_args([*small, *flags])[0]


def tiny_search(*flags: str, count: int = 64):
    args = tiny_args(*flags)
    train, test = common.shapes(count, 1), common.shapes(20, 2)
    data = common.Data(*train, *test, list(common.SHAPE_CLASSES))
    torch.manual_seed(0)
    return dha.Search(args, data, torch.device("cpu")), data, args


# ISTA (Eq. 4)


@pytest.mark.parametrize("scale", [1e-3, 1e-2, 0.1, 1.0])
@pytest.mark.parametrize("states", [2, 3, 4, 5])
def test_ista_solves_the_lasso(states, scale):
    g = torch.Generator().manual_seed(states)
    A = torch.rand(100, 7, 8 * states, generator=g, dtype=torch.float64)
    b = scale * torch.randn(100, 7, generator=g, dtype=torch.float64)
    alpha = dha.ista(A, b, 1e-5)
    # The KKT conditions, written out: A_i^T (b - A alpha) = lam sign(alpha_i) on the support, within +-lam off it.
    slope = torch.einsum("pmn,pm->pn", A, b - torch.einsum("pmn,pn->pm", A, alpha))
    on = alpha != 0
    error = torch.where(on, (slope - 1e-5 * alpha.sign()).abs(), (slope.abs() - 1e-5).clamp(min=0))
    largest = torch.einsum("pmn,pm->pn", A, b).abs().amax(1)
    assert (error.amax(1) <= 1e-8 * largest).all()
    assert on.any(1).all()


def test_ista_known_answers():
    b = torch.tensor([3.0, -0.5, 0.2], dtype=torch.float64)
    soft = torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64)  # for A = I the solution is the shrinkage operator
    assert torch.allclose(dha.ista(torch.eye(3, dtype=torch.float64), b, 1.0), soft, atol=1e-8)
    A = torch.rand(7, 16)
    assert torch.equal(dha.ista(A, torch.zeros(7), 1e-5), torch.zeros(16))
    assert torch.equal(dha.ista(A, torch.randn(7), 1e3), torch.zeros(16))  # lam above max |A^T b|


def test_ista_padding_and_batch_dimensions():
    A, b = torch.rand(2, 3, 7, 16, dtype=torch.float64), torch.randn(2, 3, 7, dtype=torch.float64)
    padded = torch.cat([A, torch.zeros(2, 3, 7, 24, dtype=torch.float64)], -1)
    alpha = dha.ista(padded, b, 1e-5)
    assert alpha.shape == (2, 3, 40) and (alpha[..., 16:] == 0).all()
    assert torch.allclose(alpha[..., :16], dha.ista(A, b, 1e-5), atol=1e-6)
    assert dha.ista(A.float(), b.float(), 1e-5).dtype == torch.float32


# Hyper-gradients (Eq. 3)


def test_hypergradient_equals_autograd_through_the_update():
    torch.manual_seed(0)
    shapes = [(5, 4), (5,), (3, 5), (3,)]
    theta = [torch.randn(s, dtype=torch.float64) for s in shapes]
    v0 = [torch.randn(s, dtype=torch.float64) for s in shapes]
    x, y = torch.randn(2, 6, 4, dtype=torch.float64), torch.randint(3, (2, 6))
    loss = lambda p, i: F.cross_entropy(torch.tanh(x[i] @ p[0].T + p[1]) @ p[2].T + p[3], y[i])
    mu, clip = 0.9, 0.1

    leaves = [t.clone().requires_grad_() for t in theta]
    g = torch.autograd.grad(loss(leaves, 0), leaves)
    norm = torch.cat([t.flatten() for t in g]).norm()
    assert norm > clip  # so that clipping takes part
    g = [t * (clip / norm) for t in g]

    def updated(lr, wd):
        v = [mu * m + d + wd * t for m, d, t in zip(v0, g, theta)]
        return [t - lr * m for t, m in zip(theta, v)], v

    lr = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    wd = torch.tensor(0.01, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(loss(updated(lr, wd)[0], 1), [lr, wd])

    plus, v = updated(lr.detach(), wd.detach())
    leaves = [t.clone().requires_grad_() for t in plus]
    grads = torch.autograd.grad(loss(leaves, 1), leaves)
    mine = dha.hypergradient(grads, v, plus, lr.detach())
    for a, b in zip(mine, expected):
        assert abs(float(a - b)) <= 1e-12 * max(1, abs(float(b)))

    for i, value in enumerate(mine):  # and finite differences
        h = [(1e-5, 0), (0, 1e-5)][i]
        up, down = (loss(updated(0.05 + s * h[0], 0.01 + s * h[1])[0], 1) for s in (1, -1))
        assert abs(float((up - down) / 2e-5 - value)) < 1e-7


def test_sgd_step_is_torch_sgd():
    torch.manual_seed(0)
    mine, theirs = ([torch.ones(3, 2), torch.linspace(0, 1, 4)] for _ in range(2))
    velocity = [torch.zeros_like(p) for p in mine]
    optimizer = torch.optim.SGD(theirs, lr=0.1, momentum=0.9, weight_decay=0.01)
    for _ in range(5):
        grads = [torch.randn_like(p) for p in mine]
        for p, g in zip(theirs, grads):
            p.grad = g.clone()
        optimizer.step()
        dha.sgd_step(mine, grads, velocity, torch.tensor(0.1), torch.tensor(0.01))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(mine, theirs))


def test_training_uses_the_gradient_of_the_next_batch_and_moves_lr_against_it(monkeypatch):
    s, data, args = tiny_search("--beta-lr", "1e-3")
    seen = []
    real = dha.hypergradient

    def spy(grads, velocities, params, lr):
        seen.append((float(lr), real(grads, velocities, params, lr)))
        return seen[-1][1]

    monkeypatch.setattr(dha, "hypergradient", spy)
    for i in range(4):
        before = [p.detach().clone() for p in s.theta]
        dha.train_step(s, data.train_images[8 * i : 8 * i + 8], data.train_labels[8 * i : 8 * i + 8], args)
        step = torch.cat([(p.detach() - q).flatten() for p, q in zip(s.theta, before)])
        v = torch.cat(
            [(-s.lr * v if v is not None else torch.zeros_like(p)).flatten() for p, v in zip(s.theta, s.velocity)]
        )
        assert torch.allclose(step, v, atol=1e-6)  # the weights moved by -lr v
    assert len(seen) == 3  # the first step has no update before it
    for (lr, (d_lr, _)), after in zip(seen, [x[0] for x in seen[1:]] + [float(s.lr)]):
        change = min(max(-1e-3 * float(d_lr), -dha.HPO_STEP * lr), dha.HPO_STEP * lr)
        assert after == pytest.approx(lr + change, rel=1e-4)


# Data augmentation (Eq. 2)


def test_policy_gradient_is_that_of_the_written_out_sum():
    torch.manual_seed(0)
    tau = (0.3 * torch.randn(14, 14, dtype=torch.float64)).requires_grad_()
    pairs, losses = torch.randint(196, (64,)), torch.rand(64, dtype=torch.float64) * 3
    dha.policy_loss(tau, pairs, losses).backward()

    p = tau.detach().flatten().softmax(0)
    summed = torch.zeros(196, dtype=torch.float64).index_add(0, pairs, losses)  # each pair's losses
    expected = -(p * (summed - (p * summed).sum()))  # the softmax's derivative, by hand
    assert torch.allclose(tau.grad.flatten(), expected, atol=1e-12)

    out = torch.zeros((), dtype=torch.float64)
    leaf = tau.detach().clone().requires_grad_()
    q = leaf.exp() / leaf.exp().sum()
    for pair, loss in zip(pairs.tolist(), losses.tolist()):
        out = out - q[pair // 14, pair % 14] * loss
    assert torch.allclose(torch.autograd.grad(out, leaf)[0], tau.grad, atol=1e-12)


def test_one_step_raises_what_lost_more_than_its_probability_explains():
    torch.manual_seed(0)
    tau = torch.zeros(14, 14, dtype=torch.float64, requires_grad=True)
    pairs, losses = torch.randint(196, (96,)), torch.rand(96, dtype=torch.float64) * 3
    before = tau.detach().flatten().softmax(0)
    dha.policy_loss(tau, pairs, losses).backward()
    after = (tau.detach() - 0.1 * tau.grad).flatten().softmax(0)
    summed = torch.zeros(196, dtype=torch.float64).index_add(0, pairs, losses)
    high = summed > (before * summed).sum()  # from the uniform policy: above the mean over all pairs
    assert torch.equal(after > before, high) and 0 < int(high.sum()) < 196


def test_policy_step_in_training_touches_tau_as_eq_2_says():
    s, data, args = tiny_search("--tau-lr", "2")
    torch.manual_seed(5)
    drawn = {}
    real = dha.sample_pairs
    dha.sample_pairs = lambda tau, n: drawn.setdefault("pairs", real(tau, n))
    try:
        losses, _ = dha.train_step(s, data.train_images[:8], data.train_labels[:8], args)
    finally:
        dha.sample_pairs = real
    leaf = torch.zeros(14, 14, requires_grad=True)
    dha.policy_loss(leaf, drawn["pairs"], losses).backward()
    assert torch.allclose(s.tau.detach(), -2 * leaf.grad, atol=1e-7)


def test_pairs_have_the_policys_frequencies():
    torch.manual_seed(0)
    tau = torch.randn(14, 14)
    p = tau.flatten().softmax(0).double()
    n = 200_000
    counts = torch.bincount(dha.sample_pairs(tau, n), minlength=196).double()
    chi = ((counts - n * p) ** 2 / (n * p)).sum()
    assert chi < 195 + 5 * math.sqrt(2 * 195)  # five standard deviations of chi-square with 195 degrees of freedom


def test_apply_pairs_order_sign_and_purity(monkeypatch):
    images = torch.rand(400, 3, 4, 4)
    kept, seen = images.clone(), {}
    for k, name in enumerate(dha.AUGMENTATIONS):

        def record(x, magnitude, name=name, k=k):
            seen.setdefault(name, []).append(magnitude)
            return x * 0.5 + k / 100

        monkeypatch.setitem(dha.AUGMENTATIONS, name, record)
    pairs = torch.randint(196, (400,))
    out = dha.apply_pairs(images, pairs)
    expected = (images * 0.5 + (pairs // 14).view(-1, 1, 1, 1) / 100) * 0.5 + (pairs % 14).view(-1, 1, 1, 1) / 100
    assert torch.allclose(out, expected, atol=1e-6) and torch.equal(images, kept)
    for name, values in seen.items():
        m = torch.cat(values)
        assert m.abs().max() <= 1 and m.abs().min() >= 0 and len(m) > 10
        assert bool((m < 0).any()) == (name in dha.SIGNED)


# The supernet


def test_supernet_support_follows_the_design():
    torch.manual_seed(3)
    net = dha.SparseSupernet(4, 10, 3, b_scale=0.3)
    alpha = dha.ista(net.A, net.b.detach(), 1e-5).view(8, 5, 8)
    cells = net.genotype()
    for k in range(8):
        edges = [(float(alpha[k, s, 1:].abs().max()), s) for s in range(k % 4 + 2)]
        states = sorted(s for _, s in sorted(edges)[-2:])
        picked = (list(cells.normal) + list(cells.reduce))[2 * k : 2 * k + 2]
        assert [s for _, s in picked] == states
        for op, s in picked:
            assert op == common.PRIMITIVES[1 + int(alpha[k, s, 1:].abs().argmax())]


def test_supernet_weights_are_the_papers_expression():
    torch.manual_seed(1)
    net = dha.SparseSupernet(4, 10, 3, b_scale=0.3)
    with torch.no_grad():
        net.b += 0.01 * torch.randn_like(net.b)  # between recoveries b moves, alpha does not
    for k in range(8):
        A, alpha = net.A[k], net.alpha[k].clone()
        index = [8 * s + common.PRIMITIVES.index(op) for op, s in net.edges[k]]
        kept = torch.zeros(40)
        kept[index] = alpha[index]
        full = net.b[k] @ A - kept @ (A.T @ A - torch.eye(40))  # b^T A - alpha^T E, alpha cut to the support
        assert torch.allclose(net.strength()[k], full[index], atol=1e-5)
    net.strength().sum().backward()
    assert net.b.grad.abs().sum() > 0


def test_where_alpha_has_no_usable_entry_the_support_is_still_two_edges():
    net = dha.SparseSupernet(4, 10, 3)
    net.recover(lam=1e3)  # everything shrinks to 0
    assert net.alpha.abs().sum() == 0
    assert all(len({s for _, s in edges}) == 2 and all(op != "none" for op, _ in edges) for edges in net.edges)


@pytest.mark.parametrize("frozen", [(), (0, 5), tuple(range(8))])
def test_pruned_network_has_the_supernets_logits(frozen):
    s, data, args = tiny_search()
    for i in range(3):
        dha.train_step(s, data.train_images[8 * i : 8 * i + 8], data.train_labels[8 * i : 8 * i + 8], args)
    for k in frozen:
        s.net.freeze(k)
    dha.train_step(s, data.train_images[:8], data.train_labels[:8], args)
    x = common.normalize(data.test_images, s.mean, s.std)
    pruned = s.net.prune()
    with torch.no_grad():
        s.net.eval()
        assert torch.allclose(pruned(x), s.net(x), atol=1e-5)
    assert len(pruned.state_dict()) < len(s.net.state_dict()) / 4
    assert sum("ops" in name and name.endswith("bn.weight") for name in pruned.state_dict()) == 3 * 8


def test_freezing_changes_nothing_and_makes_the_norms_learn():
    s, data, _ = tiny_search()
    x = common.normalize(data.test_images, s.mean, s.std)
    s.net.eval()
    with torch.no_grad():
        before = s.net(x)
        for k in range(8):
            assert not any(norm.weight.requires_grad for c in s.net.candidates(k) for norm in c.norms())
            s.net.freeze(k)
            assert all(norm.weight.requires_grad for c in s.net.candidates(k) for norm in c.norms())
            assert torch.allclose(s.net(x), before, atol=1e-5)
    before = s.net.genotype()
    s.net.b.data.normal_()
    s.net.recover()
    assert s.net.genotype() == before  # a frozen node ignores b


def test_search_network_norms_have_no_parameters_of_their_own_until_frozen():
    s, data, args = tiny_search()
    dha.train_step(s, data.train_images[:8], data.train_labels[:8], args)
    for candidate in s.net.candidates():
        for norm in candidate.norms():
            assert (norm.weight == 1).all() and (norm.bias == 0).all() and norm.weight.grad is None


def saved_bytes(net, x):
    """Bytes that autograd keeps of a forward pass, parameters aside; every storage once."""
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    alive = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: alive.append(t) or keep(t), lambda t: t):
        out = net(x)
    owned = {t.untyped_storage().data_ptr() for t in itertools.chain(net.parameters(), net.buffers())}
    return sum(size for pointer, size in storages.items() if pointer not in owned), out


def test_inactive_operations_allocate_nothing():
    s, data, _ = tiny_search(count=200)
    x = common.normalize(data.train_images, s.mean, s.std)
    called = []
    active = set(map(id, s.net.candidates()))
    for module in s.net.modules():
        if isinstance(module, dha.Candidate):
            module.register_forward_hook(lambda m, i, o: called.append(id(m)))
    pruned = s.net.prune().train()
    mine, out = saved_bytes(s.net.train(), x)
    theirs, _ = saved_bytes(pruned, x)
    assert set(called) == active and len(called) == 3 * 8
    assert mine <= theirs + 100_000  # the scales that come from b, and nothing of the size of an activation
    out.sum().backward()
    with_gradient = {
        name.split(".ops.")[1].split(".")[0]
        for name, p in s.net.named_parameters()
        if ".ops." in name and p.grad is not None
    }
    keys = {
        cell.key(k % 4, op, st)
        for cell in s.net.cells
        for k in range(8)
        if cell.reduction == (k >= 4)
        for op, st in s.net.edges[k]
    }
    assert with_gradient <= keys


def test_gradient_of_b_by_finite_differences():
    s, data, _ = tiny_search()
    net = s.net.double()
    x, y = common.normalize(data.train_images[:8], s.mean, s.std).double(), data.train_labels[:8]
    loss = lambda: F.cross_entropy(net(x), y)
    loss().backward()
    for k, m in [(0, 0), (3, 6), (4, 2), (7, 1)]:
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                net.b[k, m] += sign * 1e-7
                values.append(float(loss()))
                net.b[k, m] -= sign * 1e-7
        assert float(net.b.grad[k, m]) == pytest.approx((values[0] - values[1]) / 2e-7, rel=1e-3, abs=1e-7)


def test_constraints_reject_and_the_last_support_stays():
    s, data, args = tiny_search()
    before = s.net.genotype(), s.net.alpha.clone()
    s.net.b.data.normal_()
    moved, accepted = s.net.recover(1e-5, lambda genotype: False)
    assert not accepted and s.net.genotype() == before[0] and torch.equal(s.net.alpha, before[1])
    assert s.net.recover(1e-5)[1] and s.net.genotype() != before[0]

    params = common.count_parameters(dha.SparseSupernet(4, 10, 3, genotype=s.net.genotype()))
    flops = common.count_flops(s.net.prune(), 32)
    for flag, value in (("--max-params", params), ("--max-flops", flops)):
        assert dha.within_limits(tiny_args(flag, str(value)), data, s.net.genotype())
        assert not dha.within_limits(tiny_args(flag, str(value - 1)), data, s.net.genotype())


def test_supernet_state_survives_a_round_trip():
    s, data, args = tiny_search()
    s.net.freeze(2)
    other = dha.SparseSupernet(4, 10, 3)
    other.load_state_dict(s.net.state_dict())
    assert other.genotype() == s.net.genotype() and other.frozen == s.net.frozen
    x = common.normalize(data.test_images, s.mean, s.std)
    assert torch.equal(other.eval()(x), s.net.eval()(x))
    assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in s.net.parameters()]


@pytest.mark.parametrize("size", [31, 32, 8])
def test_supernet_takes_odd_and_small_images(size):
    net = dha.SparseSupernet(4, 3, 3, b_scale=0.3)
    assert net(torch.rand(2, 3, size, size)).shape == (2, 3)


def test_auxiliary_head_only_in_training():
    net = dha.SparseSupernet(4, 3, 3, auxiliary=True)
    assert [tuple(o.shape) for o in net(torch.rand(2, 3, 32, 32))] == [(2, 3), (2, 3)]
    assert net.eval()(torch.rand(2, 3, 32, 32)).shape == (2, 3)
    assert not any("auxiliary" in name for name in net.prune().state_dict())


# No waiting: a step on pretended CUDA tensors, which have no values; whatever needs one on the host raises


class CrossDeviceCopies(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        devices = {t.device.type for t in [*args, out] if isinstance(t, torch.Tensor) and t.dim() > 0}
        if len(devices) > 1:
            self.seen.append(str(func))
        return out


def test_a_step_on_cuda_never_waits_for_the_host(monkeypatch):
    s, _, args = tiny_search("--cutout", "16", "--auxiliary-weight", "0.4", "--drop-path", "0.2")
    s.net.drop_path_prob = 0.1
    calls = []

    def backward(loss):  # autograd's own engine wants a real device
        calls.append(loss.device.type)
        for p in [*s.theta, s.net.b, s.tau]:
            p.grad = torch.empty_like(p)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in s.net.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    module._parameters[name] = torch.nn.Parameter(torch.empty(p.shape, device="cuda"), p.requires_grad)
            for name, b in module._buffers.items():
                module._buffers[name] = torch.empty(b.shape, dtype=b.dtype, device="cuda")
        s.theta = s.net.weights()
        s.b_optimizer = torch.optim.Adam([s.net.b])
        s.tau = torch.empty(14, 14, device="cuda", requires_grad=True)
        s.lr, s.wd, s.mean, s.std = (torch.empty(n, device="cuda") for n in ((), (), 3, 3))
        images = torch.empty(8, 3, 32, 32, dtype=torch.uint8, device="cuda")
        labels = torch.empty(8, dtype=torch.long, device="cuda")
        with CrossDeviceCopies() as copies:
            for _ in range(2):
                losses, _ = dha.train_step(s, images, labels, args)
        assert losses.device.type == "cuda" and calls == ["cuda"] * 4 and copies.seen == []
        with pytest.raises(Exception, match="local_scalar"):
            float(losses.sum())  # the pretended device does notice
