"""The parts of joint_darts_faa.py against written-out references: supernet, policy, search step."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

import common
import joint_darts_faa as joint
from common import PRIMITIVES, InputError
from joint_darts_faa import AUGMENTATIONS, SIGNED, DartsSupernet, Policy
from written_out import WrittenOut, pairs

NAMES = list(AUGMENTATIONS)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---------------------------------------------------------------------------------------------------------------
# The supernet and the loop over edges and operations that it stands for (Eq. 5)
# ---------------------------------------------------------------------------------------------------------------


def both(dtype, channels=4, layers=3):
    """The written-out network and the fast one with the same weights, alpha far from uniform."""
    slow = WrittenOut(channels, 10, layers).to(dtype)
    fast = DartsSupernet(channels, 10, layers).to(dtype).to(memory_format=torch.channels_last)
    with torch.no_grad():
        for a, b, part in pairs(slow, fast):
            if a.shape == (14, 8):
                a.normal_()
            b[part] = a
    matched = pairs(slow, fast)
    assert {id(a) for a, _, _ in matched} == {id(p) for p in slow.parameters()}
    assert {id(b) for _, b, _ in matched} == {id(p) for p in fast.parameters()}
    assert common.count_parameters(slow) == common.count_parameters(fast) == sum(a.numel() for a, _, _ in matched)
    return slow, fast


@pytest.mark.parametrize("at_once", [1, 3, 4])  # edges computed side by side
@pytest.mark.parametrize("size", [32, 28])  # 28: the last cells see 7 x 7 pixels
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
def test_supernet_equals_the_written_out_mixed_operation(dtype, tolerance, size, at_once, monkeypatch):
    monkeypatch.setattr(joint, "edges_at_once", lambda x, edges: min(edges, at_once))
    torch.manual_seed(1)  # with some seeds a ReLU lies within rounding of its kink: a jump of 1e-4 in float32
    slow, fast = both(dtype)
    x, y = torch.randn(6, 3, size, size, dtype=dtype), torch.randint(10, (6,))
    a, b = slow(x), fast(x.to(memory_format=torch.channels_last))
    assert (a - b).abs().max() <= tolerance
    F.cross_entropy(a, y).backward()
    F.cross_entropy(b, y).backward()
    largest = max(float(p.grad.abs().max()) for p, _, _ in pairs(slow, fast))
    for p, q, part in pairs(slow, fast):
        assert p.grad.abs().max() > 0
        assert (p.grad - q.grad[part]).abs().max() <= tolerance * max(1.0, largest)


def test_supernet_equals_the_written_out_one_in_eval_mode():
    slow, fast = both(torch.float64)
    x = torch.randn(8, 3, 32, 32, dtype=torch.float64)
    for _ in range(3):
        slow(x), fast(x)  # running statistics
    assert (slow.eval()(x) - fast.eval()(x)).abs().max() <= 1e-10


def test_supernet_has_the_published_number_of_weights():
    net = DartsSupernet(16, 10, 8)
    assert sum(p.numel() for p in net.weights()) == 1_930_618
    assert [tuple(a.shape) for a in net.alphas()] == [(14, 8), (14, 8)]


def test_no_gradient_is_computed_for_weights_that_want_none():
    _, fast = both(torch.float64)
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    whole = torch.autograd.grad(fast(x).sum(), fast.alphas())
    joint.set_learning(fast.weights(), False)
    fast(x).sum().backward()
    assert all(w.grad is None for w in fast.weights())
    for a, g in zip(fast.alphas(), whole):
        torch.testing.assert_close(a.grad, g)


def test_genotype_keeps_the_two_strongest_edges_of_every_node():
    net = DartsSupernet(4, 10, 3)
    with torch.no_grad():
        for alphas in net.alphas():
            alphas.normal_()
            alphas[:, 0] = 9  # "none" is never kept, however strong
    for alphas, edges in zip(net.alphas(), (net.genotype().normal, net.genotype().reduce)):
        row = 0
        for j in range(4):
            weight = F.softmax(alphas[row : row + j + 2], 1)
            strength = {state: max(float(w) for w in weight[state, 1:].detach()) for state in range(j + 2)}
            kept = sorted(sorted(strength, key=strength.get)[-2:])
            want = [(PRIMITIVES[1 + int(weight[s, 1:].argmax())], s) for s in kept]
            assert edges[2 * j : 2 * j + 2] == want
            row += j + 2


def test_genotype_trains():
    net = common.Network(DartsSupernet(4, 10, 3).genotype(), 10, 4, 3)
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 10)


# ---------------------------------------------------------------------------------------------------------------
# The policy
# ---------------------------------------------------------------------------------------------------------------


def test_policy_has_three_numbers_for_every_operation():
    policy = Policy(10, 2)
    assert sum(p.numel() for p in policy.parameters()) == 3 * 16 * 2 * 10
    for p in policy.parameters():
        assert 0 <= p.min() and p.max() <= 1 and p.std() > 0.2


def written_out_policy(policy, images):
    """Eq. (1) to (3), one image and one operation after the other, with the policy's own random numbers."""
    B, (L, K, _) = len(images), policy.z.shape
    which, sign = torch.randint(L, (B,)), 1 - 2 * torch.randint(2, (K, B, 1))
    for k in range(K):
        noise = torch.rand(B, 16, dtype=images.dtype).clamp(1e-6, 1 - 1e-6)
        out = []
        for i in range(B):
            z, p, mu = (x[which[i], k] for x in (policy.z, policy.p, policy.mu))
            weight = torch.exp(z / policy.eta) / torch.exp(z / policy.eta).sum()
            total = 0
            for n, (name, augment) in enumerate(AUGMENTATIONS.items()):
                odds = torch.log(p[n] / (1 - p[n])) + torch.log(noise[i, n] / (1 - noise[i, n]))
                mask = torch.sigmoid(odds / 0.1)
                m = mu[n] * (sign[k, i] if name in SIGNED else 1)
                changed = augment(images, m.expand(B))[i]  # of the whole batch, for SamplePairing's sake
                total = total + weight[n] * (mask * changed + (1 - mask) * images[i])
            out.append(total)
        images = torch.stack(out)
    return images


def generic_policy(L, K, eta=0.3):
    policy = Policy(L, K, eta).double()
    with torch.no_grad():
        for p in policy.parameters():
            p.mul_(0.8).add_(0.1)
    return policy


def test_soft_policy_is_equations_1_to_3_written_out():
    policy, images = generic_policy(3, 2), torch.rand(5, 3, 9, 8, dtype=torch.float64)
    torch.manual_seed(1)
    ours = policy(images)
    torch.manual_seed(1)
    torch.testing.assert_close(ours, written_out_policy(policy, images), rtol=0, atol=1e-12)


def one_operation(name, mu=0.37):
    """A policy of one stage that is mostly `name`, and images whose gradients have no kinks nearby."""
    policy = Policy(1, 1, 0.5).double()
    n = NAMES.index(name)
    with torch.no_grad():
        policy.z.fill_(0.2)[0, 0, n] = 0.6
        policy.p.fill_(0.6)
        policy.mu.fill_(0.21)[0, 0, n] = mu
    images = torch.rand(3, 3, 6, 5, dtype=torch.float64) * 0.3 + 0.35
    upstream = torch.randn(3, 3, 6, 5, dtype=torch.float64)

    def loss():
        torch.manual_seed(3)  # the same noise in every evaluation
        return (policy(images) * upstream).sum()

    return policy, n, images, upstream, loss


def central_difference(loss, entry, index, eps=1e-6):
    with torch.no_grad():
        entry[index] += eps
        up = loss()
        entry[index] -= 2 * eps
        down = loss()
        entry[index] += eps
    return float(up - down) / (2 * eps)


EXACT = [name for name in NAMES if name in SIGNED or name == "SamplePairing"]


@pytest.mark.parametrize("name", NAMES)
def test_policy_gradients_equal_finite_differences(name):
    policy, n, images, upstream, loss = one_operation(name)
    loss().backward()
    for parameter in (policy.z, policy.p, policy.mu) if name in EXACT else (policy.z, policy.p):
        got, want = float(parameter.grad[0, 0, n]), central_difference(loss, parameter.data, (0, 0, n))
        assert got == pytest.approx(want, rel=1e-4, abs=1e-8)
        assert abs(want) > 1e-6 or name == "Equalize"  # which leaves so few pixels as they are


@pytest.mark.parametrize("name", ["Solarize", "Posterize"])
def test_straight_through_gradient_of_the_magnitude(name):
    policy, n, images, upstream, loss = one_operation(name)
    loss().backward()
    torch.manual_seed(3)
    torch.randint(1, (3,)), torch.randint(2, (1, 3, 1))
    share = (policy.z[0, 0] / 0.5).softmax(0)[n] * joint.relaxed_bernoulli(policy.p[0, 0].expand(3, 16))[:, n]
    assert float(policy.mu.grad[0, 0, n]) == pytest.approx(float((share * upstream.sum((1, 2, 3))).sum()))


@pytest.mark.parametrize("name", ["AutoContrast", "Equalize", "Invert", "HorizontalFlip"])
def test_no_gradient_for_the_magnitude_of_what_has_none(name):
    policy, n, *_, loss = one_operation(name)
    loss().backward()
    assert policy.mu.grad[0, 0, n] == 0


@pytest.mark.parametrize("edge", [0.0, 1.0])
def test_no_nan_at_the_ends_of_p_and_mu(edge):
    policy = Policy(4, 2)
    with torch.no_grad():
        policy.p.fill_(edge)
        policy.mu.fill_(edge)
    images = torch.cat([torch.rand(6, 3, 16, 16), torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16)])
    out = policy(images)
    out.square().sum().backward()
    assert out.isfinite().all() and 0 <= out.min() and out.max() <= 1
    assert all(p.grad.isfinite().all() for p in policy.parameters())


def test_policy_is_pure_and_keeps_range_and_size():
    for searching in (True, False):
        policy = Policy(3, 2)
        policy.searching = searching
        for size in ((1, 1), (7, 5), (32, 32)):
            images = torch.rand(1, 3, *size)
            before = images.clone()
            out = policy(images)
            assert out.shape == images.shape and torch.equal(images, before)
            assert 0 <= out.min() and out.max() <= 1


def test_sampled_operations_have_the_frequencies_that_the_parameters_say(monkeypatch):
    policy, count = Policy(2, 1, eta=0.4), 100_000
    policy.searching = False
    seen = []
    monkeypatch.setattr(joint, "apply_choice", lambda images, choice, magnitude: seen.append(choice) or images)
    policy(torch.rand(count, 3, 1, 1))
    weight, p = policy.selection()[:, 0], policy.p.detach()[:, 0]
    expected = torch.cat([(weight * p).mean(0), (weight * (1 - p)).sum(1).mean().view(1)]) * count
    counts = torch.bincount(torch.where(seen[0] < 0, 16, seen[0]), minlength=17)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert expected.min() > 5 and chi_square < 16 + 4 * math.sqrt(2 * 16)


def test_sub_policies_are_drawn_image_by_image(monkeypatch):
    policy = Policy(4, 1, eta=0.01)
    policy.searching = False
    with torch.no_grad():
        policy.p.fill_(1)
        policy.z.zero_()[torch.arange(4), 0, torch.arange(4)] = 1
    seen = []
    monkeypatch.setattr(joint, "apply_choice", lambda images, choice, magnitude: seen.append(choice) or images)
    policy(torch.rand(4000, 3, 1, 1))
    assert torch.bincount(seen[0], minlength=16)[:4].tolist() == pytest.approx([1000] * 4, abs=150)


def test_soft_policy_becomes_the_sampled_one_where_nothing_is_uncertain():
    policy = Policy(6, 3, eta=1e-4)
    with torch.no_grad():
        policy.p.round_()
        policy.z.zero_().scatter_(2, torch.randint(16, (6, 3, 1)), 1.0)
    images = (torch.rand(64, 3, 12, 12) * 255).round() / 255
    torch.manual_seed(5)
    soft = policy(images)
    policy.searching = False
    torch.manual_seed(5)
    sampled = policy(images)
    assert torch.allclose(soft, sampled, atol=3e-2) and (soft - sampled).abs().mean() < 1e-4
    assert not torch.allclose(images, sampled, atol=0.1)


def test_saved_policy_comes_back_and_can_be_read(tmp_path):
    policy = Policy(3, 2)
    policy.save(tmp_path / "policy.json")
    again = Policy.load(tmp_path / "policy.json")
    for a, b in zip(policy.parameters(), again.parameters()):
        assert torch.equal(a, b)
    assert not again.searching and not any(p.requires_grad for p in again.parameters())
    content = json.loads((tmp_path / "policy.json").read_text())
    stage = content["sub_policies"][2][1]
    assert list(stage) == NAMES and stage["Rotate"]["magnitude"] == pytest.approx(float(policy.mu[2, 1, 4]))
    assert sum(op["weight"] for op in stage.values()) == pytest.approx(1)
    assert len(content["summary"]) == 3 and "then" in content["summary"][0]


def damaged(content, kind):
    first = content["sub_policies"][0][0]
    if kind == "operation missing":
        del first["Rotate"]
    elif kind == "unknown operation":
        first["Blur"] = first["Rotate"]
    elif kind == "probability above 1":
        first["Rotate"]["probability"] = 1.5
    elif kind == "not a number":
        first["Rotate"]["logit"] = float("nan")
    elif kind == "stages differ":
        content["sub_policies"][0].pop()
    elif kind == "no sub-policy":
        content["sub_policies"] = []
    elif kind == "eta":
        content["eta"] = 0
    elif kind == "dha":
        content = {"method": "dha", "operations": NAMES, "probability": [[1.0]]}
    return json.dumps(content)


KINDS = (
    "operation missing,unknown operation,probability above 1,not a number,stages differ,no sub-policy,eta,dha".split(
        ","
    )
)


@pytest.mark.parametrize("kind", [*KINDS, "text", "list", "no such file", "a directory"])
def test_bad_policy_files_are_refused(kind, tmp_path):
    path = tmp_path / "policy.json"
    Policy(2, 2).save(path)
    path.write_text({"text": "policy", "list": "[1, 2]"}.get(kind) or damaged(json.loads(path.read_text()), kind))
    path = {"no such file": tmp_path / "nothing", "a directory": tmp_path}.get(kind, path)
    with pytest.raises(InputError):
        Policy.load(path)


# ---------------------------------------------------------------------------------------------------------------
# The search step (Alg. 1)
# ---------------------------------------------------------------------------------------------------------------

TINY = "--preset quick --search-channels 2 --search-layers 3 --search-batch-size 8".split()


def small_search(*flags):
    args = joint.parse_args([*TINY, *flags])[0]
    data = common.Data(*common.shapes(40, 0), *common.shapes(10, 1), list(common.SHAPE_CLASSES))
    s = joint.JointSearch(args, data, torch.device("cpu"))
    val = data.train_images[:8], data.train_labels[:8]
    train = data.train_images[8:16], data.train_labels[8:16]
    return s, val, train, args


def copies(params):
    return [p.detach().clone() for p in params]


def test_search_step_is_algorithm_1(monkeypatch):
    """Against the two gradients by autograd.grad and torch's own Adam and SGD, on a copy with the same noise."""
    s, val, train, args = small_search()
    before = {"upper": copies(s.upper), "weights": copies(s.weights)}
    state = torch.random.get_rng_state()
    joint.search_step(s, val, train, args)
    after = {"upper": copies(s.upper), "weights": copies(s.weights)}

    with torch.no_grad():
        for group in ("upper", "weights"):
            for p, old in zip(getattr(s, group), before[group]):
                p.copy_(old)
    joint.set_learning(s.upper, True)
    torch.random.set_rng_state(state)
    upper = torch.autograd.grad(s.loss(*val, args)[0], s.upper)  # at w, alpha
    adam = lambda params, lr, b1, wd: torch.optim.Adam(params, lr, (b1, 0.999), weight_decay=wd)
    for p, g in zip(s.upper, upper):
        p.grad = g
    adam(s.upper[:2], args.arch_lr, 0.5, 1e-3).step()
    adam(s.upper[2:], args.policy_lr, 0.0, 0.0).step()
    for parameter in (s.policy.p, s.policy.mu):
        parameter.data.clamp_(0, 1)
    for p, new in zip(s.upper, after["upper"]):
        torch.testing.assert_close(p.detach(), new)
    weights = torch.autograd.grad(s.loss(*train, args)[0], s.weights)  # at w, the new alpha and policy
    norm = torch.sqrt(sum((g**2).sum() for g in weights))
    for g, old, new in zip(weights, before["weights"], after["weights"]):
        v = g * min(1.0, args.grad_clip / float(norm)) + args.weight_decay * old
        torch.testing.assert_close(new, old - args.lr * v, rtol=1e-4, atol=1e-5)


def test_the_first_backward_pass_computes_no_gradient_of_w_and_the_second_no_other(monkeypatch):
    s, val, train, args = small_search()
    seen = []
    for name, optimizer in s.optimizers.items():

        def note(name=name, step=optimizer.step):
            grads = [[p.grad is not None for p in group] for group in (s.upper, s.weights)]
            seen.append((name, all(grads[0]), any(grads[1])) if name != "w" else (name, any(grads[0]), all(grads[1])))
            return step()

        monkeypatch.setattr(optimizer, "step", note)
    joint.search_step(s, val, train, args)
    assert seen == [("policy", True, False), ("alpha", True, False), ("w", False, True)]


def test_given_parts_are_not_searched(tmp_path):
    s, *batches = small_search("--policy", "none")
    assert s.policy is None and len(s.upper) == 2
    joint.search_step(s, *batches)
    s, *batches = small_search("--genotype", str(common.GENOTYPES["DARTS_V2"]))
    assert not s.alphas and len(s.upper) == 3 and isinstance(s.net, common.Network)
    before = copies(s.upper)
    joint.search_step(s, *batches)
    assert any(not torch.equal(a, b) for a, b in zip(before, copies(s.upper)))


def test_size_of_the_search_space_is_the_papers():
    assert joint.search_space() == pytest.approx(3.8e43, rel=0.03)
