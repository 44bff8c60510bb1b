"""dha.py's policy (Eq. 2). Oracles: expected gradients over all draws and in closed form, chi-squared, torch's SGD."""

import math

import pytest
import torch

import common
import dha
from test_dha import step, tiny

CPU = torch.device("cpu")


def chi_squared(counts, expected):
    """Are these the frequencies, to five standard deviations?"""
    freedom = len(counts) - 1
    return ((counts - expected) ** 2 / expected).sum() < freedom + 5 * math.sqrt(2 * freedom)


def test_pairs_have_the_policys_frequencies():
    tau, n = torch.randn(14, 14), 50_000
    expected = n * tau.flatten().softmax(0).double()
    assert expected.min() > 5
    assert chi_squared(torch.bincount(dha.sample_pairs(tau, n), minlength=196), expected)


def test_pairs_are_drawn_even_where_tau_is_not_finite():
    """The end of the epoch says so in one line; until then a step must not raise (on a GPU: break the device)."""
    assert dha.sample_pairs(torch.full((14, 14), math.nan), 8).shape == (8,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_pairs_are_applied_one_after_the_other_with_magnitudes_of_their_own(dtype, monkeypatch):
    images, pairs = torch.rand(4000, 3, 1, 1, dtype=dtype), torch.randint(196, (4000,))
    kept, seen = images.clone(), {}
    for k, name in enumerate(dha.AUGMENTATIONS):

        def note(x, m, name=name, k=k):
            seen.setdefault(name, []).append(m)
            return x * 0.5 + k / 100

        monkeypatch.setitem(dha.AUGMENTATIONS, name, note)
    out = dha.apply_pairs(images, pairs)
    first, second = (k.view(-1, 1, 1, 1) / 100 for k in (pairs // 14, pairs % 14))
    torch.testing.assert_close(out, ((images * 0.5 + first) * 0.5 + second).to(dtype))
    assert torch.equal(images, kept)
    for name, (one, two) in seen.items():
        assert not torch.equal(one, two) and one.dtype == dtype
        for m in (one, two):  # U(0, 1), with a random sign where there is one
            assert chi_squared(torch.histc(m.abs(), 20, 0, 1), 200)
            signs = (m < 0).float().mean()
            assert signs == pytest.approx(0.5, abs=0.04) if name in dha.SIGNED else signs == 0


def gradient(tau, pairs, losses, *how):
    leaf = tau.clone().requires_grad_()
    dha.policy_loss(leaf, pairs, losses, *how).backward()
    return leaf.grad.flatten()


@pytest.mark.parametrize("how", [["printed"], ["scale-free"], ["scale-free", torch.tensor(0.4)]], ids=str)
def test_expected_gradient_of_the_loss(how):
    """Of two images, over all draws of two pairs from p, weighted by their probability."""
    tau = torch.randn(14, 14, dtype=torch.float64)
    tau[1:] = -40.0  # 14 pairs are left
    p, loss = tau.flatten().softmax(0), torch.rand(196, dtype=torch.float64)
    total = torch.zeros(196, dtype=torch.float64)
    for pairs in torch.cartesian_prod(torch.arange(14), torch.arange(14)):
        total -= p[pairs].prod() * gradient(tau, pairs, loss[pairs], *how)
    if how == ["printed"]:
        expected = p * (p * loss - (p**2 * loss).sum())
    else:
        images = 2 if len(how) == 2 else 1  # B with a mean that is given; the mean of two has half of each loss
        of_entropy = -p * (p.log() - (p * p.log()).sum())
        expected = images * p * (loss - (p * loss).sum()) + 2 * 0.3 * of_entropy
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-12)


def test_a_policy_that_ended_on_one_pair_has_a_finite_gradient():
    tau = torch.zeros(14, 14)
    tau[2, 3] = 200.0  # the other probabilities are 0 in float32
    assert gradient(tau, torch.full((8,), 31), torch.rand(8), "scale-free").isfinite().all()


def test_other_updates_are_refused():
    with pytest.raises(ValueError, match="'ratio'"):
        dha.policy_loss(torch.zeros(14, 14), torch.zeros(64, dtype=torch.long), torch.rand(64), "ratio")


def test_two_processes_have_the_gradient_of_one():
    """Each has half of the batch; scale-free is a sum over the images, printed a mean."""
    tau, pairs, losses = torch.randn(14, 14), torch.randint(196, (64,)), torch.rand(64)
    for updates, halves in (("scale-free", 1), ("printed", 2)):
        batch_mean = dha.mean_of_batch(losses)
        whole = gradient(tau, pairs, losses, updates)
        parts = [gradient(tau, pairs[i::2], losses[i::2], updates, batch_mean) for i in range(2)]
        torch.testing.assert_close((parts[0] + parts[1]) / halves, whole)
    own_mean = [gradient(tau, pairs[i::2], losses[i::2], "scale-free") for i in range(2)]
    assert not torch.allclose(own_mean[0] + own_mean[1], gradient(tau, pairs, losses, "scale-free"))


def after(steps, loss, *preset):
    """p(tau) after steps of Eq. (2) alone: every pair has its own mean loss, (196,), and noise as large as that."""
    args = dha.parse_args([*preset, "--channels", "4", "--layers", "3", "--auxiliary-weight", "0", "--out", "none"])
    data = common.Data(*common.shapes(args.batch_size, 1), *common.shapes(20, 2), list(common.SHAPE_CLASSES))
    s = dha.Learned(args, data, CPU)  # has tau and its optimizer
    s.tau_optimizer.param_groups[0]["lr"] = args.tau_lr[0]
    for _ in range(steps):
        pairs = dha.sample_pairs(s.tau, args.batch_size)
        losses = loss[pairs] * (1 + torch.randn(args.batch_size))
        s.tau.grad = None
        dha.policy_loss(s.tau, pairs, losses, args.updates).backward()
        s.tau_optimizer.step()
    return s.tau.detach().flatten().softmax(0)


HARD = torch.ones(196)
HARD[:39] = 1.2
SHARE = float((HARD / 0.3).softmax(0)[:39].sum())  # p ~ exp(l / 0.3): from 0.199 at the start to 0.326


def test_equal_losses_leave_the_policy_near_uniform():
    """For twice the 1,122 steps of quick, at its step."""
    p = after(2_244, torch.ones(196), "--preset", "quick")
    assert torch.special.entr(p).sum() > 5.2 and p.max() < 0.02


def test_harder_pairs_gain_as_the_closed_form_says_at_quicks_step():
    assert SHARE == pytest.approx(0.326, abs=1e-3)
    for steps in (1_122, 2_244):  # and it stays there
        p = after(steps, HARD, "--preset", "quick")
        assert float(p[:39].sum()) == pytest.approx(SHARE, abs=0.05) and p.max() < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("preset, share", [("scale-free", SHARE), ("imagenet", SHARE), ("paper", 0.2)])
def test_harder_pairs_gain_as_the_closed_form_says(preset, share):
    """The printed one, with its authors' settings, stays near uniform."""
    p = after(30_000, HARD, "--preset", preset)
    assert float(p[:39].sum()) == pytest.approx(share, abs=0.03) and p.max() < 0.02


@pytest.mark.parametrize("updates", ["printed", "scale-free"])
def test_a_step_moves_tau_by_the_losses_of_its_own_images(updates, monkeypatch):
    """By torch's SGD: with --tau-lr's first number while searching, with the second afterwards."""
    s, data, args = tiny("--updates", updates, "--tau-lr", "2", "0.5", "--auxiliary-weight", "0.4")
    seen = {}
    for name in ("policy_loss", "apply_pairs"):
        real = getattr(dha, name)
        monkeypatch.setattr(dha, name, lambda *given, name=name, real=real: seen.update({name: given}) or real(*given))
    tau = torch.zeros(14, 14, requires_grad=True)
    printed = {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
    sgd = torch.optim.SGD([tau], **printed if updates == "printed" else {})
    for i, tau_lr in enumerate((2.0, 2.0, 0.5)):
        if i == 2:
            s.net.frozen = [True] * 8  # as far as train_step knows
        measured = step(s, data, args, i)
        _, pairs, losses, *_ = seen["policy_loss"]
        assert torch.equal(pairs, seen["apply_pairs"][1]) and losses.shape == (8,)
        torch.testing.assert_close(losses.mean(), measured[0])
        tau.grad = gradient(tau.detach(), pairs, losses.detach(), updates).view(14, 14)
        sgd.param_groups[0]["lr"] = tau_lr
        sgd.step()
        torch.testing.assert_close(s.tau, tau)
