"""dha.SparseSupernet. Oracles: common.Network with strengths, trained by torch's optimizers; pruned networks; loops.

What the MobileNet space has of its own is in test_mobilenet.py.
"""

import argparse
import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import dha
from dha import OPS, SparseSupernet
from test_dha import freeze_all, move_b, step, tiny

SPACES = {"cells": [], "mobilenet": ["--space", "mobilenet", "--layers", "6"]}


@pytest.fixture(params=SPACES)
def space(request):
    return SPACES[request.param]


def running(net, k):
    """The operations of node k that run, cell by cell."""
    cells = [cell for cell in net.cells if cell.first_node <= k < cell.first_node + len(cell.nodes)]
    return [cell.nodes[k - cell.first_node][f"{name}_{state}"] for cell in cells for name, state in net.support[k]]


def norms(ops):
    return [module for op in ops for module in op.modules() if isinstance(module, nn.BatchNorm2d)]


# -------- Candidates, support, strengths ----------------------------------------------------------------------------


def test_a_node_has_every_operation_but_none_on_every_state():
    net = SparseSupernet(4, 10, 3, b_scale=0.3)
    assert OPS == common.PRIMITIVES[1:] and [tuple(b.shape) for b in net.b] == [(7,)] * 8
    for cell in net.cells:
        for k, candidates in enumerate(cell.nodes, cell.first_node):
            assert list(candidates) == [f"{name}_{state}" for state in range(k % 4 + 2) for name in OPS]
            own, rest = net.A[k].split([len(candidates), 35 - len(candidates)], 1)
            assert not rest.any() and 0 <= own.min() and own.max() <= 1 and own.std() > 0.2  # U(0, 1), padded


def test_support_is_the_best_operation_of_the_two_best_states():
    net = SparseSupernet(4, 10, 3, b_scale=0.3)
    alpha = dha.ista(net.A, torch.stack(list(net.b)), 1e-5).view(8, 5, 7)
    for k in range(8):
        best = alpha[k].abs().amax(1).tolist()  # of each state
        states = sorted(sorted(range(k % 4 + 2), key=best.__getitem__)[-2:])
        assert net.support[k] == [(OPS[int(alpha[k, state].abs().argmax())], state) for state in states]
    genotype = net.genotype()
    assert genotype.normal + genotype.reduce == sum(net.support, [])
    assert net.skip_connects() == ([name for name, _ in genotype.normal].count("skip_connect"), 8)
    net.set_alpha(net.decode(lam=1e3))  # all shrinks to 0
    assert not net.alpha.any() and all(len({state for _, state in pairs}) == 2 for pairs in net.support)


def test_strengths_are_float32_also_under_autocast():
    net = SparseSupernet(4, 10, 3, b_scale=0.3)
    with torch.autocast("cpu", torch.bfloat16):
        inside = net.strengths(0)
    assert inside.dtype == torch.float32 and torch.equal(inside, net.strengths(0))


@pytest.mark.parametrize("size", [31, 8])
def test_odd_and_small_images_and_an_auxiliary_head_in_training_only(size):
    net, x = SparseSupernet(4, 3, 3, auxiliary=size > 28, b_scale=0.3), torch.rand(2, 3, size, size)
    assert [part.shape for part in (net(x) if size > 28 else [net(x)])] == [(2, 3)] * (1 + (size > 28))
    assert net.eval()(x).shape == (2, 3)


def test_only_the_support_runs_and_has_gradients(space):
    s, data, args = tiny(*space)
    candidates = [op for cell in s.net.cells for node in cell.nodes for op in node.values()]
    ran = []
    for op in candidates:
        op.register_forward_hook(lambda module, given, out: ran.append(module))
    step(s, data, args, 0)
    support = [op for k in range(len(s.net.frozen)) for op in running(s.net, k)]
    assert len(ran) == len(set(ran)) > 4 and set(ran) == {op for op in support if space == [] or norms([op])}
    for op in candidates:
        assert all((p.grad is not None) == (op in ran) for p in op.parameters())


def test_drop_path_drops_all_paths_but_identities_and_only_in_training():
    convs = SparseSupernet(4, 10, 3, given=[[("sep_conv_3x3", 0), ("sep_conv_3x3", 1)]] * 8)
    convs.drop_path_prob, x = torch.tensor(1 - 1e-7), torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(convs(x), convs.classifier.bias.expand(2, 10))
    assert not torch.allclose(convs.eval()(x), convs.classifier.bias)

    net = SparseSupernet(4, 10, 3, given=dha.to_support(common.GENOTYPES["DARTS_V1"]))
    cell, state, ones = net.cells[0], torch.randn(8, 12, 8, 8), [(1.0, 1.0)] * 4
    s0 = cell.preprocess0(state)  # what is left is nodes 1 and 2 with their skip-connection, and its batch norm
    left = cell(state, state, net.support[:4], ones, torch.tensor(1 - 1e-7))
    torch.testing.assert_close(left, torch.cat([0 * s0, s0, s0, 0 * s0], 1), rtol=0, atol=1e-3)


# -------- Training --------------------------------------------------------------------------------------------------


def written_out(net, strengths):
    """A common.Network of the support, each operation with a batch norm, times a strength; its parts beside net's."""
    oracle = common.Network(net.genotype(), 10, 4, 3)
    same = [(oracle.stem0, net.stem), (oracle.classifier, net.classifier)]
    for mine, their in zip(oracle.cells, net.cells):
        same += [(mine.preprocess0, their.preprocess0), (mine.preprocess1, their.preprocess1)]
        for n, op in enumerate(mine.ops):
            k = their.first_node + n // 2
            name, state = net.support[k][n % 2]
            if not norms([op]):
                op.append(nn.BatchNorm2d(their.preprocess1[1].out_channels))
            op.register_forward_hook(lambda module, given, out, k=k, i=n % 2: strengths(k)[i] * out)
            same.append((op, their.nodes[n // 2][f"{name}_{state}"]))
    for mine, their in same:
        mine.load_state_dict(their.state_dict())
    return oracle, same


def test_training_with_frozen_nodes_is_that_of_the_written_out_network(float64, monkeypatch):
    """None frozen, some, all: strengths that are constant factors, affine batch norms, torch's SGD and Adam."""
    monkeypatch.setattr(dha, "GRAD_CLIP", 1.0)
    s, data, args = tiny("--no-da", "--no-hpo", "--weight-decay", "1e-2", count=80)
    net, factors = s.net, {}
    b = [p.detach().clone().requires_grad_() for p in net.b]
    columns = [[7 * state + OPS.index(name) for name, state in pairs] for pairs in net.support]
    A, alpha = net.A.clone(), net.alpha.clone()

    def strengths(k):  # b^T A - alpha^T (A^T A - I) on the support
        if k in factors:
            return factors[k]
        A_S = A[k][:, columns[k]]
        return b[k] @ A_S - alpha[k][columns[k]] @ (A_S.T @ A_S - torch.eye(2))

    oracle, same = written_out(net, strengths)
    mine_of = {their: mine for mine, their in same}
    learning = {k: [norm for op in running(net, k) for norm in norms([mine_of[op]])] for k in range(8)}
    for norm in sum(learning.values(), []):
        norm.requires_grad_(False)
    sgd = torch.optim.SGD([p for p in oracle.parameters() if p.requires_grad], args.lr, 0.9, weight_decay=1e-2)
    adam = torch.optim.Adam(b, args.arch_lr, betas=(0.5, 0.999), weight_decay=1e-3)
    for i in range(10):
        freezes, theta = {2: {1, 6}, 6: set(range(8)) - {1, 6}}.get(i, set()), set(s.theta)
        for k in freezes:
            net.freeze(k)
            factors[k] = strengths(k).detach()
            sgd.add_param_group({"params": [p.requires_grad_() for n in learning[k] for p in n.parameters()]})
            b[k].grad = None  # Adam leaves it alone
        s.collect_theta()
        assert len(set(s.theta) - theta) == sum(2 * len(learning[k]) for k in freezes)  # no other candidate's
        if i == 8:
            freeze_all(s)
            assert not list(net.b) and set(s.theta) == set(net.parameters())
            b = []
        mine = step(s, data, args, i, side=16)

        x, y = data.train_images[8 * i : 8 * i + 8, :, ::2, ::2], data.train_labels[8 * i : 8 * i + 8]
        loss = F.cross_entropy(oracle(common.normalize(x / 255, s.mean, s.std)), y)
        sgd.zero_grad(), adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for group in sgd.param_groups for p in group["params"]], 1.0)
        sgd.step(), adam.step()
        assert float(mine[0]) == pytest.approx(float(loss.detach()), abs=1e-10)
        for mine, their in same:
            torch.testing.assert_close(mine.state_dict(), their.state_dict(), rtol=0, atol=1e-10)
        torch.testing.assert_close(b, list(net.b), rtol=0, atol=1e-10)
    assert all((norm.weight != 1).any() for norm in sum(learning.values(), []))


# -------- Freezing and pruning --------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_freezing_pruning_saving_and_loading_change_no_logits(training, space, tmp_path, monkeypatch):
    """model.pt and a state hold the strengths, which a given genotype has not."""
    s, data, args = tiny(*space)
    move_b(s.net)
    step(s, data, args, 0)
    x, nodes = common.normalize(data.test_images, s.mean, s.std), range(len(s.net.frozen))

    def logits(net):
        with torch.no_grad():
            return net.train(training)(x)

    before, genotype = logits(s.net), s.net.genotype()
    kept = [running(s.net, k) for k in nodes]
    for k in (0, 3):
        s.net.freeze(k)
        torch.testing.assert_close(logits(s.net), before)
    other = tiny(*space, "--seed", "7")[0]
    fresh = copy.deepcopy(other.net.state_dict())
    other.net.load_state_dict(s.net.state_dict())  # where some are frozen
    assert torch.equal(logits(other.net), logits(s.net)) and other.net.frozen == s.net.frozen
    assert other.net.support == s.net.support and other.net.decode().equal(s.net.decode())
    with pytest.raises(ValueError, match="load it into a new one"):
        other.net.load_state_dict(fresh)

    s.collect_theta()
    freeze_all(s)
    torch.testing.assert_close(logits(s.net), before)
    assert s.net.genotype() == genotype and [running(s.net, k) for k in nodes] == kept
    assert {op for cell in s.net.cells for node in cell.nodes for op in node.values()} == set(sum(kept, []))
    assert not list(s.net.b) and s.velocity and s.velocity.keys() <= set(s.theta) == set(s.net.parameters())
    monkeypatch.setattr(dha, "draw_dha", lambda *given: None)
    args.out = str(tmp_path)
    dha.save_dha(s, args, data, [{"phase": "train", "seconds": 1.0, "gpus": 0, "test_accuracy": 50.0}])
    loaded, _ = dha.load_model(tmp_path / "model.pt")
    assert torch.equal(logits(loaded), logits(s.net))
    given = tiny(*space, "--genotype", str(tmp_path / "genotype.json"))[0].net
    assert given.genotype() == genotype and all(given.frozen) and (given.frozen_strengths == 1).all()
    assert [(n, p.shape) for n, p in given.named_parameters()] == [(n, p.shape) for n, p in loaded.named_parameters()]


def test_nodes_freeze_that_moved_no_further_than_the_bound(monkeypatch):
    s, _, args = tiny()
    net = s.net
    for distance, k in ((1e-4, 1), (1e-2, 4)):  # the others stay where they are
        net.b[k].data += distance * torch.randn(7)
    moved = copy.deepcopy(net).set_alpha(net.decode())
    monkeypatch.setattr(dha, "FREEZE_DISTANCE", (moved[1] + moved[4]) / 2)
    assert 0 < moved[1] < moved[4] and dha.decode_and_freeze(s, args, 32, final=False) == moved
    assert [k for k in range(8) if not net.frozen[k]] == [4] and len(net.b) == 8

    # The frozen ones are left alone by the decoding, and all at the end
    alpha, support = net.alpha.clone(), net.support
    moved = move_b(net)
    assert moved == pytest.approx((net.alpha - alpha).norm(dim=1).tolist(), rel=1e-5)
    assert [k for k in range(8) if moved[k]] == [4] and net.support[:4] + net.support[5:] == support[:4] + support[5:]
    support = net.support
    assert dha.decode_and_freeze(s, args, 32, final=True) is None
    assert net.support == support and all(net.frozen) and len(net.b) == 0


# -------- Limits (Eq. 1) --------------------------------------------------------------------------------------------


def limits(max_params=0, max_flops=0):
    return argparse.Namespace(max_params=max_params, max_flops=max_flops, b_scale=0.3)


def test_limits_are_those_of_the_pruned_network(space):
    s, _, _ = tiny(*space)
    before, other = s.net.support, copy.deepcopy(s)
    other.collect_theta()
    move_b(other.net)
    support = other.net.support
    pruned = freeze_all(other)
    costs = common.count_parameters(pruned), common.count_flops(pruned, 32)
    for flag, cost in zip(("max_params", "max_flops"), costs):
        assert dha.cost_share(s.net, support, limits(**{flag: cost}), 32) == 1
        assert dha.cost_share(s.net, support, limits(**{flag: cost - 1}), 32) == cost / (cost - 1)
    assert dha.cost_share(s.net, support, limits(2 * costs[0], 4 * costs[1]), 32) == 0.5  # the largest
    assert dha.cost_share(s.net, support, limits(), 32) == 0 and s.net.support == before


def test_a_support_beyond_the_limits_is_rejected_and_the_last_one_stays():
    s, _, args = tiny()
    support, state = s.net.support, copy.deepcopy(s.net.state_dict())
    for b in s.net.b:
        b.data.normal_(0, 0.3)
    assert dha.decode_and_freeze(s, limits(1), 32, final=False) is None
    assert s.net.support == support and not any(s.net.frozen)
    assert all(torch.equal(s.net.state_dict()[name], state[name]) for name in ("alpha", "A_S", "alpha_S"))
    assert min(dha.decode_and_freeze(s, args, 32, final=False)) > dha.FREEZE_DISTANCE
    assert s.net.support != support


def test_a_run_starts_within_the_limits(space):
    """To nine tenths of what a run without them starts with."""
    limit = common.count_parameters(freeze_all(tiny(*space)[0])) * 9 // 10
    s, _, _ = tiny(*space, "--max-params", str(limit))
    support = s.net.support
    s.net.set_alpha(s.net.decode())
    assert s.net.support == support  # that of its b
    assert common.count_parameters(freeze_all(s)) <= limit


def test_a_start_draws_300_times(monkeypatch):
    """No draw makes it better; the last one may bring it within the limits."""
    net, drawn = SparseSupernet(4, 10, 3), []
    monkeypatch.setattr(SparseSupernet, "decode", lambda net: drawn.append(net.b[0].tolist()) or net.alpha)
    monkeypatch.setattr(dha, "cost_share", lambda *given: 0.5 if len(drawn) == 300 else 2.0)
    dha.start_within_limits(net, limits(), 32)
    assert len(drawn) == 300 and len({str(b) for b in drawn}) == 38  # node 0 is every eighth
    monkeypatch.setattr(dha, "cost_share", lambda *given: 2.0)
    with pytest.raises(common.InputError, match="raise them"):
        dha.start_within_limits(net, limits(), 32)
