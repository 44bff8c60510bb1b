"""DartsSupernet (Eq. 5) and its genotype. The oracle is written_out.py: a loop over edges and operations."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F

import common
import joint_darts_faa as joint
from common import PRIMITIVES
from joint_darts_faa import DartsSupernet, MixedOp
from written_out import WrittenOut, pairs


def both(dtype):
    """The written-out network and ours with the same weights, alpha far from uniform."""
    slow = WrittenOut(4, 10, 3).to(dtype)
    fast = DartsSupernet(4, 10, 3).to(dtype).to(memory_format=torch.channels_last)
    matched = pairs(slow, fast)
    for mine, net in zip(zip(*matched), (slow, fast)):
        assert set(mine) == set(net.parameters())
    with torch.no_grad():
        for a, b in matched:
            if a.shape == (14, 8):
                a.normal_()
            b.copy_(a)
    return slow, fast


# 12: the last cells see 3 x 3 pixels
@pytest.mark.parametrize("size, mode", [(16, "float64"), (12, "float32"), (12, "eval")])
def test_supernet_equals_the_written_out_mixed_operation(size, mode, monkeypatch):
    dtype, tolerance = (torch.float32, 1e-5) if mode == "float32" else (torch.float64, 1e-10)
    if mode == "float32":  # a value within rounding of ReLU's kink would make a jump of 1e-4: without a kink
        monkeypatch.setattr(F, "relu", lambda x, inplace=False: F.softplus(x))
    slow, fast = both(dtype)
    x, y = torch.randn(4, 3, size, size, dtype=dtype), torch.randint(10, (4,))
    if mode == "eval":
        for norm in (m for net in (slow, fast) for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)):
            norm.momentum = None  # running statistics: the mean over all batches
        slow(x), fast(x)
        slow.eval(), fast.eval()
    a, b = slow(x), fast(x.to(memory_format=torch.channels_last))
    assert (a - b).abs().max() <= tolerance
    F.cross_entropy(a, y).backward()
    F.cross_entropy(b, y).backward()
    largest = max(float(p.grad.abs().max()) for p, _ in pairs(slow, fast))
    for p, q in pairs(slow, fast):
        assert p.grad.abs().max() > 0
        assert (p.grad - q.grad).abs().max() <= tolerance * max(1.0, largest)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_mixed_operation_alone_makes_its_own_beginnings(stride):
    op, x, alpha = MixedOp(4, stride), torch.randn(3, 4, 8, 8), torch.randn(8)
    out = op(x, alpha)
    assert out.shape == (3, 4, 8 // stride, 8 // stride) and torch.equal(out, op(op.begin(x), alpha))


def test_what_the_edges_of_a_state_share_is_computed_once(monkeypatch):
    """In a cell: of each of the five states that edges read the ReLU and the two pools."""
    cell, ran, relu = joint.DartsCell(4, 4, 4, reduction=True, halved=False), Counter(), F.relu
    for module in cell.modules():
        if isinstance(module, (torch.nn.MaxPool2d, torch.nn.AvgPool2d)) and module.kernel_size == 3:
            module.register_forward_hook(lambda module, *_: ran.update([type(module).__name__]))
    monkeypatch.setattr(F, "relu", lambda *given, **named: ran.update(["relu"]) or relu(*given, **named))
    x = torch.randn(2, 4, 8, 8)
    assert cell(x, x, torch.zeros(14, 8)).shape == (2, 16, 4, 4)
    inside = 14 * 2 + 8 * 2  # the second ReLUs of the sep_convs, and two of each factorized reduction
    assert ran == {"MaxPool2d": 5, "AvgPool2d": 5, "relu": 2 + 5 + inside}


def test_supernet_has_the_published_size_and_takes_odd_images():
    net = DartsSupernet(16, 10, 8)
    assert [tuple(a.shape) for a in net.alphas()] == [(14, 8), (14, 8)]
    assert common.count_parameters(net) - sum(a.numel() for a in net.alphas()) == 1_930_618
    assert DartsSupernet(4, 10, 3)(torch.randn(2, 3, 31, 31)).shape == (2, 10)


def test_genotype_keeps_the_two_strongest_edges_of_every_node():
    net = DartsSupernet(4, 10, 3)
    with torch.no_grad():
        for alphas in net.alphas():
            alphas.normal_()
            alphas[::2, 0] = 3  # "none" is never kept, but has its share where edges are compared
    genotype = net.genotype()
    for alphas, edges in zip(net.alphas(), (genotype.normal, genotype.reduce)):
        rows = iter(alphas.detach().softmax(1))
        for j in range(4):
            weight = [next(rows)[1:] for _ in range(j + 2)]
            kept = sorted(sorted(range(j + 2), key=lambda state: float(weight[state].max()))[-2:])
            assert edges[2 * j : 2 * j + 2] == [(PRIMITIVES[1 + int(weight[s].argmax())], s) for s in kept]
    assert genotype.normal_concat == genotype.reduce_concat == [2, 3, 4, 5]
