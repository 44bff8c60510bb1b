"""The policy (Eqs. 1 to 3), its file, and the search step (Alg. 1) of joint_darts_faa.py.

Oracles: the equations written out image by image, finite differences, frequencies of many draws, the two gradients of
Alg. 1 by autograd.grad with torch's own optimizers.
"""

import copy
import json
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import common
import joint_darts_faa as joint
from common import InputError
from conftest import needs_a_gpu, pretends_cuda
from joint_darts_faa import AUGMENTATIONS, SIGNED, Policy
from test_dha import Waits

NAMES = list(AUGMENTATIONS)


# -------- The policy ------------------------------------------------------------------------------------------------


def test_soft_policy_is_equations_1_to_3_written_out():
    """One image and one operation after the other, with the policy's own random numbers; and so are its gradients.

    (Those of the operations have their own tests.) Every image has its sub-policy, each of its operations its sign.
    """
    policy, images = Policy(3, 2, 0.3).double(), torch.rand(5, 3, 9, 8, dtype=torch.float64)
    before = images.clone()
    for p in policy.parameters():
        p.data.mul_(0.8).add_(0.1)
    torch.manual_seed(1)
    ours = policy(images)
    assert torch.equal(images, before)
    torch.manual_seed(1)
    which = torch.randint(3, (5,))
    noises, signs = torch.rand(5, 2, 16, dtype=torch.float64), 1 - 2 * torch.randint(2, (5, 2, 16))
    for k in range(2):
        noise, sign = noises[:, k], signs[:, k]
        out = []
        for i in range(5):
            z, p, mu = (x[which[i], k] for x in (policy.z, policy.p, policy.mu))
            weight = torch.exp(z / 0.3) / torch.exp(z / 0.3).sum()  # Eq. (3)
            total = 0
            for n, (name, operation) in enumerate(AUGMENTATIONS.items()):
                odds = p[n] / (1 - p[n]) * noise[i, n] / (1 - noise[i, n])
                mask = torch.sigmoid(torch.log(odds) / 0.1)
                m = mu[n] * sign[i, n] if name in SIGNED else mu[n]
                changed = operation(images, m.expand(5))[i]  # of the whole batch, for SamplePairing's sake
                total = total + weight[n] * (mask * changed + (1 - mask) * images[i])  # Eqs. (1), (2)
            out.append(total)
        images = torch.stack(out)
    torch.testing.assert_close(ours, images, rtol=0, atol=1e-12)
    upstream = torch.randn_like(images)
    gradients = [torch.autograd.grad(x, list(policy.parameters()), upstream) for x in (ours, images)]
    for mine, theirs in zip(*gradients):
        assert theirs.abs().max() > 1e-2
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("end", [0.0, 1.0])
def test_no_nan_at_the_ends_of_p_and_mu(end):
    policy = Policy(4, 2)
    with torch.no_grad():
        policy.p.fill_(end)
        policy.mu.fill_(end)
    images = torch.cat([torch.rand(6, 3, 16, 16), torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16)])
    out = policy(images)
    out.square().sum().backward()
    assert out.isfinite().all() and 0 <= out.min() and out.max() <= 1
    assert all(p.grad.isfinite().all() for p in policy.parameters())
    for p, step in ((policy.p, 3.0), (policy.mu, -3.0)):
        p.data += step
    policy.clamp()
    assert (policy.p == 1).all() and (policy.mu == 0).all()


def test_the_policys_gradient_is_the_same_bit_for_bit_on_two_threads():
    """Indexing by [which] adds in an order that differs from run to run where a batch is large."""
    torch.set_num_threads(2)
    policy, images, upstream = Policy(10, 2), torch.rand(4096, 3, 1, 1), torch.randn(4096, 3, 1, 1)
    found = []
    for _ in range(8):
        torch.manual_seed(0)
        policy.zero_grad()
        policy(images).backward(upstream)
        found.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    assert all(torch.equal(found[0], other) for other in found)


def test_drawn_operations_have_the_frequencies_that_the_parameters_say(monkeypatch):
    policy, count, seen = Policy(2, 1, eta=0.4), 100_000, []
    monkeypatch.setattr(joint, "apply_each", lambda images, *drawn: seen.append(drawn) or images)
    joint.augment(torch.rand(count, 3, 1, 1), policy)
    ((choice, magnitude),) = seen
    z, p, mu = (parameter.detach()[:, 0] for parameter in (policy.z, policy.p, policy.mu))
    weight = torch.exp(z / 0.4) / torch.exp(z / 0.4).sum(1, keepdim=True)
    expected = torch.cat([(weight * (1 - p)).sum(1).mean().view(1), (weight * p).mean(0)]) * count
    counts = torch.bincount((choice + 1) % 17, minlength=17)  # 16, which is no operation, comes first
    assert expected.min() > 5
    assert ((counts - expected) ** 2 / expected).sum() < 16 + 4 * math.sqrt(2 * 16)
    for n in range(16):
        mine = magnitude[choice == n]
        assert set(mine.abs().tolist()) == set(mu[:, n].tolist())  # a sub-policy's own
        assert abs(float(mine.sign().mean())) < 5 / math.sqrt(len(mine))


def test_soft_policy_becomes_the_drawn_one_where_nothing_is_uncertain(monkeypatch):
    policy = Policy(5, 3, eta=1e-4)
    with torch.no_grad():
        policy.p.round_()
        policy.z.zero_().scatter_(2, torch.randint(16, (5, 3, 1)), 1.0)
    images = (torch.rand(64, 3, 12, 12) * 255).round() / 255
    before = images.clone()

    def in_turn(high, shape, device=None):  # an image's sub-policy, and its sign in every operation
        return (torch.arange(shape[0]) % high).view(-1, *[1] * (len(shape) - 1)).expand(shape)

    monkeypatch.setattr(torch, "randint", in_turn)
    soft, drawn = policy(images).detach(), joint.augment(images, policy)
    assert torch.allclose(soft, drawn, atol=3e-2) and (soft - drawn).abs().mean() < 1e-4
    assert torch.equal(images, before) and not torch.allclose(images, drawn, atol=0.1)
    assert 0 <= drawn.min() and drawn.max() <= 1 and not drawn.requires_grad


# -------- policy.json -----------------------------------------------------------------------------------------------


def test_a_policys_numbers_are_saved_and_come_back(tmp_path):
    policy = Policy(10, 2)
    assert sum(p.numel() for p in policy.parameters()) == 3 * 16 * 2 * 10
    for p in policy.parameters():
        assert 0 <= p.min() and p.max() <= 1 and p.std() > 0.2  # U(0, 1)
    joint.save(tmp_path / "policy.json", policy.as_dict())
    again = joint.load_policy(tmp_path / "policy.json")
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), again.parameters(), strict=True))
    assert not any(p.requires_grad for p in again.parameters()) and again.eta == policy.eta
    content = json.loads((tmp_path / "policy.json").read_text())
    assert content["operations"] == NAMES and content.keys() == {"operations", "eta", "z", "p", "mu"}
    assert content["mu"][2][1][NAMES.index("Rotate")] == policy.mu[2, 1, NAMES.index("Rotate")].item()


DAMAGE = {  # changes in place
    "unknown operation": lambda c: c["operations"].__setitem__(3, "Blur"),
    "other order": lambda c: c["operations"].reverse(),
    "probability above 1": lambda c: c["p"][0][0].__setitem__(0, 1.5),
    "magnitude below 0": lambda c: c["mu"][1][1].__setitem__(0, -0.1),
    "not a number": lambda c: c["mu"][0][0].__setitem__(0, math.nan),
    "infinite": lambda c: c["z"][0][0].__setitem__(0, math.inf),
    "stages differ": lambda c: c["z"][0].pop(),
    "no sub-policy": lambda c: [c[name].clear() for name in ("z", "p", "mu")],
    "no mu": lambda c: c.pop("mu"),
    "eta": lambda c: c.update(eta=0),
    "dha": lambda c: (c.clear(), c.update(operations=NAMES, probability=[[1.0]])),
    "text": None,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_bad_policy_files_are_refused(kind, tmp_path):
    path, content = tmp_path / "policy.json", Policy(2, 2).as_dict()
    path.write_text("policy")
    if kind != "text":
        DAMAGE[kind](content)
        path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="cannot use the policy") as error:
        joint.load_policy(path)
    assert "\n" not in str(error.value) and ("dha.py" in str(error.value)) == (kind == "dha")


# -------- The search step (Alg. 1) ----------------------------------------------------------------------------------

TINY = "--preset quick --gpu -1 --search-channels 2 --search-layers 3 --search-batch-size 8 --out no-such-run".split()


@pytest.fixture
def one_node(monkeypatch):
    """Cells of one node: the step is what is tested."""
    monkeypatch.setattr(joint, "NODES", 1)


def small_search(*flags, device="cpu"):
    args = joint.parse_args([*TINY, *flags])
    data = common.Data(*common.shapes(40, 0), *common.shapes(10, 1), list(common.SHAPE_CLASSES))
    genotype = common.load_genotype(args.genotype) if args.genotype else None
    s = joint.JointSearch(args, data, torch.device(device), genotype)
    val, train = ((data.train_images[k : k + 8], data.train_labels[k : k + 8]) for k in (0, 8))
    return s, (val, train), args


def test_search_steps_are_algorithm_1(one_node, monkeypatch):
    """Against the two gradients by autograd.grad and torch's own Adam and SGD, on a copy, same noise."""
    monkeypatch.setattr(joint, "GRAD_CLIP", 0.5)
    s, (val, train), args = small_search("--stages", "1", "--sub-policies", "2")
    s.policy.mu.data.round_()  # at the ends, from where half of the steps lead out
    other = copy.deepcopy(s)
    alphas, policy = other.net.alphas(), list(other.policy.parameters())
    weights = [p for name, p in other.net.named_parameters() if not name.startswith("alphas")]
    upper = [
        torch.optim.Adam(alphas, args.arch_lr, (0.5, 0.999), weight_decay=1e-3),
        torch.optim.Adam(policy, args.policy_lr, (0.0, 0.999)),
    ]
    w = torch.optim.SGD(weights, args.lr, 0.9, weight_decay=args.weight_decay)

    def gradients(batch, params):
        loss, accuracy = other.loss_and_accuracy(*batch, False)
        for p, g in zip(params, torch.autograd.grad(loss, params)):
            p.grad = g
        return [float(loss.detach()), float(accuracy)]

    for _ in range(2):  # so that momentum takes part
        state = torch.random.get_rng_state()
        measured = joint.search_step(s, val, train, args.amp)
        torch.random.set_rng_state(state)
        wanted = gradients(val, alphas + policy)  # lines 3 to 6: at w, alpha
        for optimizer in upper:
            optimizer.step()
        assert other.policy.mu.max() > 1
        for p in (other.policy.p, other.policy.mu):
            p.data.clamp_(0, 1)
        wanted += gradients(train, weights)  # lines 10 to 13: at w, the new alpha and policy
        assert torch.cat([p.grad.flatten() for p in weights]).norm() > 0.5  # clipping takes part
        torch.nn.utils.clip_grad_norm_(weights, 0.5)
        w.step()
        assert measured.tolist() == pytest.approx(wanted, rel=1e-4)
        mine = [*s.net.alphas(), *s.policy.parameters(), *s.w]
        for p, q in zip(mine, alphas + policy + weights, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_each_half_computes_its_own_gradients_and_no_others(one_node, monkeypatch):
    s, batches, _ = small_search()
    seen = {}
    for name in ("policy", "alpha", "w"):
        optimizer = getattr(s, f"{name}_optimizer")

        def note(name=name, step=optimizer.step):
            seen[name] = [{(p.requires_grad, p.grad is not None) for p in group} for group in (s.upper, s.w)]
            return step()

        monkeypatch.setattr(optimizer, "step", note)
    joint.search_step(s, *batches)
    yes, no = {(True, True)}, {(False, False)}
    assert seen == {"policy": [yes, no], "alpha": [yes, no], "w": [no, yes]} and list(seen)[2] == "w"


def test_given_parts_are_not_searched(one_node):
    for policy in ("policy.json", "none"):
        s, batches, _ = small_search("--policy", policy)
        assert s.policy is None and len(s.upper) == 2
        assert s.state_dict().keys() == {"net", "w_optimizer", "alpha_optimizer"}
    joint.search_step(s, *batches)
    s, batches, _ = small_search("--genotype", "DARTS_V2")
    assert not s.alphas and len(s.upper) == 3 and isinstance(s.net, common.Network)
    assert s.state_dict().keys() == {"net", "w_optimizer", "policy", "policy_optimizer"}
    before = [p.detach().clone() for p in s.upper]
    joint.search_step(s, *batches)
    assert not any(torch.equal(a, b) for a, b in zip(before, s.upper))


@pretends_cuda
def test_a_search_step_on_cuda_never_waits_for_the_host(one_node, monkeypatch):
    """On pretended CUDA tensors, which have no values: whatever needs one on the host raises."""
    calls = []

    def backward(loss):  # autograd's own engine wants a real device
        calls.append(loss.device.type)
        for p in s.upper + s.w:
            p.grad = torch.empty_like(p) if p.requires_grad else None

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(common, "mean_std", lambda images: (torch.empty(3), torch.empty(3)))
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *where, **layout: module)  # it is there already
    with FakeTensorMode():
        with torch.device("cuda"):
            labels = torch.empty(8, dtype=torch.long)
            batch = torch.empty(8, 3, 32, 32, dtype=torch.uint8), labels
            data = common.Data(*batch, *batch, list(common.SHAPE_CLASSES))
            args = joint.parse_args([*TINY, "--stages", "1"])
            s = joint.JointSearch(args, data, torch.device("cuda"))
        with Waits() as waits:
            measured = joint.search_step(s, batch, batch)
            joint.augment(batch[0] / 255, s.policy)
        assert measured.device.type == "cuda" and calls == ["cuda"] * 2 and waits.seen == []
        with pytest.raises(Exception, match="local_scalar"):
            float(measured.sum())  # the pretended device does notice


@needs_a_gpu
def test_search_steps_on_a_gpu_are_those_on_a_cpu(exact):
    s, batches, args = small_search()
    there = small_search(device="cuda")[0]
    there.load_state_dict(copy.deepcopy(s.state_dict()))
    torch.manual_seed(1)
    here = torch.stack([joint.search_step(s, *batches) for _ in range(3)])
    torch.manual_seed(1)
    moved = [[part.cuda() for part in batch] for batch in batches]
    found = torch.stack([joint.search_step(there, *moved) for _ in range(3)])
    torch.testing.assert_close(found.cpu(), here, **exact)
    for ours, theirs in ((s.net, there.net), (s.policy, there.policy)):
        for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
            torch.testing.assert_close(b.cpu(), a, **exact)
