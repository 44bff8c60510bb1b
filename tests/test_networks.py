"""common.py's networks. Oracles: published counts of parameters and multiply-adds, and every layer written out in F."""

import contextlib
import copy
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
from common import GENOTYPES, PRIMITIVES, Cell, Genotype, InputError, Network, count_flops, count_parameters, operation

CONVS = Genotype(*[[("sep_conv_3x3", i % 2) for i in range(8)], [2, 3, 4, 5]] * 2)
MIXED = Genotype(*[[("skip_connect", 0), ("dil_conv_5x5", 1)] * 4, [2, 3, 4, 5]] * 2)


def evaluating(module):
    """`module` in evaluation mode, with batch norm statistics that are not 0 and 1."""
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.running_mean, -0.5, 0.5)
            nn.init.uniform_(m.running_var, 0.5, 2)
    return module.eval()


def parts(module, kind):
    return [m for m in module.modules() if isinstance(m, kind)]


@pytest.mark.parametrize("size", [(10, 10), (7, 4), (1, 1)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", PRIMITIVES[1:])
def test_operations_equal_their_definition(name, stride, size):
    """DARTS' operations, layer by layer; sizes are rounded up."""
    op = evaluating(operation(name, 6, stride))
    weights, norms = [m.weight for m in parts(op, nn.Conv2d)], parts(op, nn.BatchNorm2d)
    want = x = torch.randn(2, 6, *size)
    if name == "max_pool_3x3":
        want = F.max_pool2d(x, 3, stride, 1)
    elif name == "avg_pool_3x3":
        kernel = torch.ones(1, 1, 3, 3)
        share = F.conv2d(torch.ones(1, 1, *size), kernel, stride=stride, padding=1)
        want = F.conv2d(x, kernel.expand(6, 1, 3, 3), stride=stride, padding=1, groups=6) / share
    elif name == "skip_connect" and stride == 2:
        even = F.pad(F.relu(x), (0, size[1] % 2, 0, size[0] % 2))
        pair = [F.conv2d(half, w, stride=2) for half, w in zip((even, even[:, :, 1:, 1:]), weights)]
        want = norms[0](torch.cat(pair, 1))
    elif name != "skip_connect":
        k, dilation = int(name[-1]), 2 if name.startswith("dil") else 1
        assert len(weights) == 2 * len(norms) == 4 // dilation and isinstance(op[0], nn.ReLU)
        for i, norm in enumerate(norms):
            depthwise, pointwise = weights[2 * i : 2 * i + 2]
            assert depthwise.shape == (6, 1, k, k) and pointwise.shape == (6, 6, 1, 1)
            step, pad = stride if i == 0 else 1, dilation * (k // 2)
            want = F.conv2d(F.relu(want), depthwise, None, step, pad, dilation, groups=6)
            want = norm(F.conv2d(want, pointwise))
    torch.testing.assert_close(op(x), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("halved", [False, True])
def test_a_cell_is_its_genotype_written_out(halved):
    """DARTS_V2's cells: every node the sum of its two operations, the output the nodes that concat names."""
    genotype = GENOTYPES["DARTS_V2"]._replace(reduce_concat=[5, 2, 3])
    x0, x1 = torch.randn(2, 6, 16, 16) if halved else torch.randn(2, 6, 8, 8), torch.randn(2, 10, 8, 8)
    cell = evaluating(Cell(genotype, 6, 10, 4, False, halved))
    s0, s1, op = cell.preprocess0(x0), cell.preprocess1(x1), cell.ops
    s2, s3 = op[0](s0) + op[1](s1), op[2](s0) + op[3](s1)
    s4, s5 = op[4](s1) + s0, s0 + op[7](s2)
    torch.testing.assert_close(cell(x0, x1), torch.cat([s2, s3, s4, s5], 1))

    cell = evaluating(Cell(genotype, 6, 10, 4, True, halved))
    s0, s1, op = cell.preprocess0(x0), cell.preprocess1(x1), cell.ops
    s2 = op[0](s0) + op[1](s1)
    s3, s5 = s2 + op[3](s1), s2 + op[7](s1)
    torch.testing.assert_close(cell(x0, x1), torch.cat([s5, s2, s3], 1))


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_drop_path_drops_whole_samples_and_keeps_the_mean(kind):
    x = torch.randn(5_000, 4, 2, 2)
    for p in (0.2, 0.75):
        out = common.drop_path(x, kind(p), training=True)
        kept = (out != 0).flatten(1).any(1)
        torch.testing.assert_close(out[kept], x[kept] / (1 - p))
        assert abs(kept.float().mean() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / 5_000)
    assert common.drop_path(x, kind(0.5), training=False) is x
    assert torch.equal(common.drop_path(x, kind(0.0), training=True), x)


@pytest.mark.parametrize("reduction", [False, True])
def test_identities_are_never_dropped_and_all_others_are(reduction):
    cell = Cell(MIXED, 4, 4, 4, reduction, halved=False)
    x0, x1 = torch.randn(2, 8, 4, 8, 8)
    left = torch.zeros(8, 16, 4, 4) if reduction else cell.preprocess0(x0).repeat(1, 4, 1, 1)
    torch.testing.assert_close(cell(x0, x1, 1 - 1e-7), left)
    with torch.autocast("cpu", torch.bfloat16):  # a mask of float32 would spread
        assert cell(x0.bfloat16(), x1.bfloat16(), 0.5).dtype == torch.bfloat16


def test_a_network_stacks_its_cells():
    """Reductions at a third and two thirds, the auxiliary head after the second; paths are dropped in training only."""
    net = Network(CONVS, 10, channels=4, layers=8, auxiliary=True)
    outputs, x = [], torch.randn(2, 3, 32, 32)
    for cell in net.cells:
        cell.register_forward_hook(lambda cell, inputs, output: outputs.append(output))
    _, auxiliary = net(x)
    assert [y.shape[1:] for y in outputs] == [(16, 32, 32)] * 2 + [(32, 16, 16)] * 3 + [(64, 8, 8)] * 3
    torch.testing.assert_close(auxiliary, net.auxiliary(outputs[5]))
    net.drop_path_prob = 1 - 1e-7
    torch.testing.assert_close(net(x)[0], net.classifier.bias.expand(2, 10))
    assert not torch.allclose(net.eval()(x), net.classifier.bias)


@pytest.mark.parametrize("name", GENOTYPES)
@pytest.mark.parametrize("stem, size, auxiliary", [("cifar", (45, 31), True), ("imagenet", (95, 64), False)])
def test_outputs_and_gradients(name, stem, size, auxiliary):
    """Also of odd sizes; one image is enough to classify."""
    net = Network(GENOTYPES[name], num_classes=7, channels=4, layers=3, auxiliary=auxiliary, stem=stem)
    x = torch.randn(2, 3, *size)
    made = net(x)
    if not auxiliary:
        made = (made,)
    assert all(logits.shape == (2, 7) for logits in made) and len(made) == 1 + auxiliary
    sum(logits.sum() for logits in made).backward()
    assert all(p.grad is not None for p in net.parameters())
    assert net.stem1(net.stem0(x)).shape[2:] == (size if stem == "cifar" else (12, 8))  # an eighth, rounded up
    assert net.eval()(torch.randn(1, 3, *size)).shape == (1, 7)


@pytest.mark.parametrize("stem, size, stride", [("cifar", 8, 3), ("cifar", 11, 3), ("imagenet", 7, 2)])
def test_auxiliary_head_equals_its_definition(stem, size, stride):
    head = evaluating(common.auxiliary_head(6, 10, stem))
    convs, norms, linear = parts(head, nn.Conv2d), parts(head, nn.BatchNorm2d), head[-1]
    x = torch.randn(2, 6, size, size)
    want = F.avg_pool2d(F.relu(x), 5, stride)
    want = F.relu(norms[0](F.conv2d(want, convs[0].weight)))
    want = F.conv2d(want, convs[1].weight)
    if stem == "cifar":  # DARTS' own code left it out for ImageNet
        want = norms[1](want)
    assert len(norms) == (2 if stem == "cifar" else 1)
    torch.testing.assert_close(head(x), F.linear(want.relu().mean((2, 3)), linear.weight, linear.bias))


@pytest.mark.parametrize("size, enough", [(28, False), (29, True), (63, True), (64, False), (192, False), (193, True)])
def test_images_too_small_for_the_auxiliary_head_are_refused(size, enough):
    """Exactly those that the network cannot take."""
    net = Network(CONVS, 2, channels=2, layers=3, auxiliary=True, stem="imagenet" if size >= 64 else "cifar")
    for use, error in ((lambda: net(torch.randn(2, 3, size, size)), RuntimeError),
                       (lambda: common.check_auxiliary(size), InputError)):  # fmt: skip
        with contextlib.nullcontext() if enough else pytest.raises(error):
            use()


def test_fixed_batch_norms_are_no_parameters_until_they_learn():
    """Their state_dict keeps its keys, so that each kind loads the other."""
    plain = Network(CONVS, 5, channels=4, layers=3)
    net = copy.deepcopy(plain)
    norms, x = parts(net, nn.BatchNorm2d), torch.randn(8, 3, 8, 8)

    def learning():
        """Does a step of SGD change every batch norm, or none?"""
        before = [norm.weight.clone() for norm in norms]
        net(x).square().sum().backward()
        torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.1).step()
        net.zero_grad()
        (changed,) = {not torch.equal(norm.weight, weight) for norm, weight in zip(norms, before)}
        return changed

    for _ in range(2):  # twice is once
        common.fix_batch_norms(net)
        torch.testing.assert_close(net(x), plain(x))
        assert len(list(net.parameters())) == len(list(plain.parameters())) - 2 * len(norms)
    assert not learning() and all((norm.weight == 1).all() and (norm.bias == 0).all() for norm in norms)
    net.load_state_dict(plain.state_dict())
    plain.load_state_dict(net.state_dict())
    assert net.double().state_dict()["stem0.1.weight"].dtype == torch.float64  # moves with the network
    net.float()

    kept = norms[0].weight = nn.Parameter(torch.full((12,), 2.0))  # one that learns already
    for _ in range(2):
        common.learn_batch_norms(net)
        assert norms[0].weight is kept and len(list(net.parameters())) == len(list(plain.parameters()))
    assert (norms[1].weight == 1).all() and learning()


def meta_network(*args, **kwargs):
    """Shapes only: neither memory nor arithmetic."""
    with torch.device("meta"):
        return Network(*args, **kwargs)


@pytest.mark.parametrize("name, count", [("DARTS_V1", 3_169_414), ("DARTS_V2", 3_349_342)])
def test_published_parameter_counts(name, count):
    net = meta_network(GENOTYPES[name], 10, 36, 20, auxiliary=True)
    assert count_parameters(net) == count
    assert sum(p.numel() for p in net.parameters()) == count + 476_426


MILLIONS = {"cifar": {"PDARTS": 3.4, "PC_DARTS_cifar": 3.6}, "imagenet": {"DARTS_V2": 4.7, "PC_DARTS_image": 5.3}}


@pytest.mark.parametrize("stem, size", [("cifar", (10, 36, 20)), ("imagenet", (1000, 48, 14))])
def test_published_parameters_in_millions(stem, size):
    for name, millions in MILLIONS[stem].items():
        assert round(count_parameters(meta_network(GENOTYPES[name], *size, stem=stem)) / 1e6, 1) == millions


def test_multiply_adds():
    """The published number of DARTS_V2's, and a count by hand."""
    assert round(count_flops(meta_network(GENOTYPES["DARTS_V2"], 10, 36, 20), 32) / 1e6) == 528
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),  # 8*8 pixels, 4 outputs, 27 products each
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4),  # 4*4 pixels, 4 outputs, 9 products each
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    assert count_flops(net, 8) == 8 * 8 * 4 * 27 + 4 * 4 * 4 * 9 + 64 * 10
    assert net.training and (net[1].running_mean == 0).all()
    assert count_flops(net.eval(), 8) and not net.training


@pytest.mark.parametrize("name", ["DARTS_V1", "PC_DARTS_cifar"])
def test_draw_cell(name, tmp_path):
    """A box per state and operation, none over another; an arrow per edge and output."""
    figure = pytest.importorskip("matplotlib.figure").Figure(figsize=(10, 3.2))
    axis = figure.add_subplot()
    edges, concat = GENOTYPES[name].reduce, GENOTYPES[name].reduce_concat
    common.draw_cell(edges, concat, axis, "a cell")
    boxes = [text for text in axis.texts if getattr(text, "arrow_patch", None) is None]
    words = [text.get_text() for text in boxes]
    assert axis.get_title() == "a cell" and len(axis.texts) - len(boxes) == len(edges) + len(concat)
    assert sorted(words[: len(edges)]) == sorted(name for name, _ in edges) and {*"0123"} < {*words}
    figure.savefig(tmp_path / "cell.png")  # a figure without pyplot needs no display
    extents = [text.get_bbox_patch().get_window_extent() for text in boxes]
    assert sum(a.overlaps(b) for a in extents for b in extents) == len(boxes)  # each box only itself
    assert len(set(common.OPERATION_COLORS)) == len(PRIMITIVES)
