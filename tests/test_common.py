"""Data sets, genotypes, networks and pictures of common.py against published numbers and written-out versions."""

import json
import math
import pickle
import sys
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image

import common
from common import (
    DATASETS,
    GENOTYPES,
    PRIMITIVES,
    SHAPE_CLASSES,
    Cell,
    DepthwiseConv,
    FactorizedReduce,
    Genotype,
    InputError,
    Network,
    count_flops,
    count_parameters,
    cutout,
    draw_cell,
    drop_path,
    load_data,
    load_genotype,
    mean_std,
    normalize,
    operation,
    parse_genotype,
    random_crop_flip,
    save_genotype,
    shapes,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---------------------------------------------------------------------------------------------------------------
# Genotypes
# ---------------------------------------------------------------------------------------------------------------

# As they stand in quark0/darts' and yuhuixu1993/PC-DARTS' genotypes.py.
KNOWN = {
    "DARTS_V1": """
DARTS_V1 = Genotype(normal=[('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('skip_connect', 0), ('sep_conv_3x3', 1),
('skip_connect', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('skip_connect', 2)], normal_concat=[2, 3, 4, 5],
reduce=[('max_pool_3x3', 0), ('max_pool_3x3', 1), ('skip_connect', 2), ('max_pool_3x3', 0), ('max_pool_3x3', 0),
('skip_connect', 2), ('skip_connect', 2), ('avg_pool_3x3', 0)], reduce_concat=[2, 3, 4, 5])
""",
    "DARTS_V2": """
DARTS_V2 = Genotype(normal=[('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('sep_conv_3x3', 1),
('sep_conv_3x3', 1), ('skip_connect', 0), ('skip_connect', 0), ('dil_conv_3x3', 2)], normal_concat=[2, 3, 4, 5],
reduce=[('max_pool_3x3', 0), ('max_pool_3x3', 1), ('skip_connect', 2), ('max_pool_3x3', 1), ('max_pool_3x3', 0),
('skip_connect', 2), ('skip_connect', 2), ('max_pool_3x3', 1)], reduce_concat=[2, 3, 4, 5])
""",
    "PC_DARTS_cifar": """
PC_DARTS_cifar = Genotype(normal=[('sep_conv_3x3', 1), ('skip_connect', 0), ('sep_conv_3x3', 0), ('dil_conv_3x3', 1),
('sep_conv_5x5', 0), ('sep_conv_3x3', 1), ('avg_pool_3x3', 0), ('dil_conv_3x3', 1)], normal_concat=range(2, 6),
reduce=[('sep_conv_5x5', 1), ('max_pool_3x3', 0), ('sep_conv_5x5', 1), ('sep_conv_5x5', 2), ('sep_conv_3x3', 0),
('sep_conv_3x3', 3), ('sep_conv_3x3', 1), ('sep_conv_3x3', 2)], reduce_concat=range(2, 6))
""",
}
SKIPS = Genotype([("skip_connect", i % 2) for i in range(8)], [2, 3, 4, 5], [("skip_connect", 0)] * 8, [2, 3, 4, 5])
CONVS = Genotype([("sep_conv_3x3", i % 2) for i in range(8)], [2, 3, 4, 5], [("dil_conv_5x5", 0)] * 8, [2, 3, 4, 5])


@pytest.mark.parametrize("name", KNOWN)
def test_known_genotypes_equal_the_published_text(name):
    assert parse_genotype(KNOWN[name]) == GENOTYPES[name] == load_genotype(name)


@pytest.mark.parametrize("name", GENOTYPES)
def test_genotype_round_trips(name, tmp_path):
    genotype = GENOTYPES[name]
    assert parse_genotype(str(genotype)) == genotype
    save_genotype(genotype, tmp_path / "cell.json")
    assert load_genotype(tmp_path / "cell.json") == genotype
    assert set(json.loads((tmp_path / "cell.json").read_text())) == set(Genotype._fields)
    (tmp_path / "cell.txt").write_text(f"# found in epoch 50\n\n{name} = {genotype}\n")
    assert load_genotype(str(tmp_path / "cell.txt")) == genotype


def test_genotype_without_field_names_and_of_another_size():
    normal, reduce = [("sep_conv_3x3", 1), ("skip_connect", 0)], [("max_pool_3x3", 0), ("avg_pool_3x3", 1)]
    assert parse_genotype(f"Genotype({normal}, range(2, 3), {reduce}, [1, 2])") == Genotype(normal, [2], reduce, [1, 2])


GOOD = str(GENOTYPES["DARTS_V1"])
GOOD_JSON = json.dumps(GENOTYPES["DARTS_V1"]._asdict())
BAD_GENOTYPES = {
    "empty": "",
    "prose": "the best cell",
    "cut off": GOOD[:-20],
    "a statement": "import os",
    "a number": "NAME = 3",
    "code": GOOD.replace("[2, 3, 4, 5]", "__import__('os').listdir('.')", 1),
    "a name": GOOD.replace("'skip_connect'", "skip_connect", 1),
    "unknown operation": GOOD.replace("skip_connect", "conv_7x1_1x7", 1),
    "operation none": GOOD.replace("skip_connect", "none", 1),
    "state of a later node": GOOD.replace("('sep_conv_3x3', 1)", "('sep_conv_3x3', 2)", 1),
    "negative state": GOOD.replace("('sep_conv_3x3', 1)", "('sep_conv_3x3', -1)", 1),
    "state in words": GOOD.replace("('sep_conv_3x3', 1)", "('sep_conv_3x3', 'one')", 1),
    "infinite state": GOOD.replace("('sep_conv_3x3', 1)", "('sep_conv_3x3', 1e999)", 1),
    "edge of three": GOOD.replace("('sep_conv_3x3', 1)", "('sep_conv_3x3', 1, 1)", 1),
    "odd number of edges": f"Genotype({[('skip_connect', 0)] * 3}, [2], {[('skip_connect', 0)] * 2}, [2])",
    "no edges": "Genotype(normal=[], normal_concat=[0], reduce=[], reduce_concat=[0])",
    "field missing": GOOD.replace("reduce_concat", "concat"),
    "field twice": GOOD.replace("reduce_concat", "normal_concat"),
    "empty concat": GOOD.replace("[2, 3, 4, 5]", "[]", 1),
    "concat past the end": GOOD.replace("[2, 3, 4, 5]", "range(2, 7)", 1),
    "endless concat": GOOD.replace("[2, 3, 4, 5]", "range(2, 1000000000000000000)", 1),
    "concat a number": GOOD.replace("[2, 3, 4, 5]", "5", 1),
    "JSON cut off": GOOD_JSON[:-20],
    "JSON list": "[1, 2]",
    "JSON without reduce": '{"normal": [["skip_connect", 0], ["skip_connect", 1]], "normal_concat": [2]}',
    "JSON null": GOOD_JSON.replace("[2, 3, 4, 5]", "null", 1),
    "JSON infinity": GOOD_JSON.replace('["sep_conv_3x3", 1]', '["sep_conv_3x3", Infinity]', 1),
    "state between two": GOOD_JSON.replace('["sep_conv_3x3", 1]', '["sep_conv_3x3", 0.5]', 1),
    "deeply nested": '{"normal": ' + "[" * 100_000,
}


@pytest.mark.parametrize("text", BAD_GENOTYPES.values(), ids=list(BAD_GENOTYPES))
def test_bad_genotypes_are_refused(text, tmp_path):
    assert text not in (GOOD, GOOD_JSON)
    with pytest.raises(InputError):
        parse_genotype(text)
    (tmp_path / "cell.txt").write_text(text)
    with pytest.raises(InputError, match="cell.txt"):
        load_genotype(tmp_path / "cell.txt")


@pytest.mark.parametrize("kind", ["no such file", "a directory", "binary", "its text", "no path"])
def test_genotype_files_that_cannot_be_used(kind, tmp_path):
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    path = {"a directory": tmp_path, "binary": tmp_path / "binary", "its text": GOOD, "no path": "a\0b"}.get(
        kind, tmp_path / "missing"
    )
    with pytest.raises(InputError):
        load_genotype(path)


# ---------------------------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------------------------


def meta_network(*args, **kwargs):
    """Shapes only: neither memory nor arithmetic."""
    with torch.device("meta"):
        return Network(*args, **kwargs)


def test_published_parameter_counts():
    for name, count in (("DARTS_V1", 3_169_414), ("DARTS_V2", 3_349_342)):
        assert count_parameters(meta_network(GENOTYPES[name], 10, 36, 20)) == count
        net = meta_network(GENOTYPES[name], 10, 36, 20, auxiliary=True)
        assert count_parameters(net) == count
        assert sum(p.numel() for p in net.parameters()) == count + 476_426


@pytest.mark.parametrize(
    "name, classes, channels, layers, stem, millions",
    [
        ("PDARTS", 10, 36, 20, "cifar", 3.4),
        ("PC_DARTS_cifar", 10, 36, 20, "cifar", 3.6),
        ("DARTS_V2", 1000, 48, 14, "imagenet", 4.7),
        ("PDARTS", 1000, 48, 14, "imagenet", 4.9),
        ("PC_DARTS_image", 1000, 48, 14, "imagenet", 5.3),
    ],
)
def test_published_parameters_in_millions(name, classes, channels, layers, stem, millions):
    net = meta_network(GENOTYPES[name], classes, channels, layers, stem=stem)
    assert round(count_parameters(net) / 1e6, 1) == millions


def test_published_multiply_adds():
    count = count_flops(meta_network(GENOTYPES["DARTS_V2"], 10, 36, 20), 32)
    assert count == 528_359_040
    assert round(count / 1e6) == 528


def test_count_flops_equals_a_count_by_hand():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),  # 8*8 pixels, 4 outputs, 27 products each
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4),  # 4*4 pixels, 4 outputs, 9 products each
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    statistics = net[1].running_mean.clone()
    assert count_flops(net, 8) == 8 * 8 * 4 * 27 + 4 * 4 * 4 * 9 + 64 * 10
    assert net.training and torch.equal(net[1].running_mean, statistics)
    assert count_flops(net.eval(), 8) and not net.training


@pytest.mark.parametrize("name, size", [*((name, 31) for name in GENOTYPES), ("DARTS_V2", 32), ("DARTS_V2", 45)])
def test_network_outputs(name, size):
    net = Network(GENOTYPES[name], num_classes=7, channels=4, layers=3, auxiliary=True)
    x = torch.randn(2, 3, size, size - 1 if size == 45 else size)
    logits, auxiliary = net(x)
    assert logits.shape == auxiliary.shape == (2, 7)
    (logits.sum() + auxiliary.sum()).backward()
    assert all(p.grad is not None for p in net.parameters())
    assert net.eval()(x).shape == (2, 7)
    assert Network(GENOTYPES[name], num_classes=7, channels=4, layers=3)(x).shape == (2, 7)


@pytest.mark.parametrize("size, auxiliary", [(64, False), (95, False), (224, True)])
def test_imagenet_stem(size, auxiliary):
    net = Network(GENOTYPES["DARTS_V2"], 5, channels=4, layers=3, auxiliary=auxiliary, stem="imagenet")
    sizes = {}
    net.stem0.register_forward_hook(lambda _, x, y: sizes.update(stem0=y.shape[1:]))
    net.stem1.register_forward_hook(lambda _, x, y: sizes.update(stem1=y.shape[1:]))
    x = torch.randn(2, 3, size, size)
    out = net(x)
    assert [y.shape for y in out] == [(2, 5)] * 2 if auxiliary else out.shape == (2, 5)
    assert net.eval()(x).shape == (2, 5)
    assert sizes == {"stem0": (4, math.ceil(size / 4), math.ceil(size / 4)), "stem1": (4, *[math.ceil(size / 8)] * 2)}


def test_reductions_stand_at_a_third_and_two_thirds():
    net = Network(GENOTYPES["DARTS_V1"], 10, channels=4, layers=8)
    shapes_seen = []
    for cell in net.cells:
        cell.register_forward_hook(lambda _, x, y: shapes_seen.append(y.shape[1:]))
    net.eval()(torch.randn(1, 3, 16, 16))
    assert shapes_seen == [(16, 16, 16)] * 2 + [(32, 8, 8)] * 3 + [(64, 4, 4)] * 3


def test_a_cell_is_its_genotype_written_out():
    """DARTS_V2's normal cell: every node the sum of its two operations, the output all four nodes."""
    cell = Cell(GENOTYPES["DARTS_V2"], 6, 10, 4, reduction=False, halved=False).eval()
    x0, x1 = torch.randn(2, 6, 8, 8), torch.randn(2, 10, 8, 8)
    s0, s1 = cell.preprocess0(x0), cell.preprocess1(x1)
    op = cell.ops
    s2 = op[0](s0) + op[1](s1)
    s3 = op[2](s0) + op[3](s1)
    s4 = op[4](s1) + s0
    s5 = s0 + op[7](s2)
    torch.testing.assert_close(cell(x0, x1), torch.cat([s2, s3, s4, s5], 1))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", PRIMITIVES[1:])
def test_operations_equal_their_definition(name, stride):
    """DARTS' operations, layer by layer, in evaluation mode with batch norm statistics that are not 0 and 1."""
    op = operation(name, 6, stride)
    for module in op.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
    op.eval()
    x = torch.randn(2, 6, 10, 10)
    weights = [m.weight for m in op.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in op.modules() if isinstance(m, nn.BatchNorm2d)]
    if name == "max_pool_3x3":
        want = F.max_pool2d(x, 3, stride, 1)
    elif name == "avg_pool_3x3":
        ones = torch.ones(1, 1, 10, 10)
        kernel = torch.ones(1, 1, 3, 3)
        share = F.conv2d(ones, kernel, stride=stride, padding=1)
        want = F.conv2d(x, kernel.expand(6, 1, 3, 3), stride=stride, padding=1, groups=6) / share
    elif name == "skip_connect" and stride == 1:
        want = x
    elif name == "skip_connect":
        r = F.relu(x)
        halves = [F.conv2d(r, weights[0], stride=2), F.conv2d(r[:, :, 1:, 1:], weights[1], stride=2)]
        want = norms[0](torch.cat(halves, 1))
    else:
        k, dilation = int(name[-1]), 2 if name.startswith("dil") else 1
        want = x
        for i in range(1 if dilation == 2 else 2):
            depthwise, pointwise = weights[2 * i], weights[2 * i + 1]
            assert depthwise.shape == (6, 1, k, k) and pointwise.shape == (6, 6, 1, 1)
            step, pad = stride if i == 0 else 1, dilation * (k // 2)
            want = F.conv2d(F.relu(want), depthwise, stride=step, padding=pad, dilation=dilation, groups=6)
            want = norms[i](F.conv2d(want, pointwise))
        assert len(weights) == 2 * len(norms) == (2 if dilation == 2 else 4)
    torch.testing.assert_close(op(x), want, rtol=1e-4, atol=1e-5)


def test_unknown_operations_are_refused():
    for name in ("none", "conv_7x7"):
        with pytest.raises(InputError):
            operation(name, 4, 1)


@pytest.mark.parametrize("size", [(8, 8), (6, 10), (2, 2)], ids=str)
def test_factorized_reduce_equals_two_strided_convolutions(size):
    reduce = FactorizedReduce(5, 8).double()
    x = torch.randn(3, 5, *size, dtype=torch.float64)
    r = F.relu(x)
    first = F.conv2d(r, reduce.conv1.weight, stride=2)
    second = F.conv2d(r[:, :, 1:, 1:], reduce.conv2.weight, stride=2)
    joined = torch.cat([first, second], 1)
    variance, mean = torch.var_mean(joined, (0, 2, 3), correction=0, keepdim=True)
    want = (joined - mean) / (variance + 1e-5).sqrt()
    torch.testing.assert_close(reduce(x), want)


@pytest.mark.parametrize("size", [(7, 7), (5, 8), (1, 1)], ids=str)
def test_factorized_reduce_pads_odd_sizes_with_zeros(size):
    reduce = FactorizedReduce(5, 8).eval()
    x = torch.randn(3, 5, *size)
    H, W = (math.ceil(side / 2) for side in size)
    padded = torch.zeros(3, 5, 2 * H, 2 * W)
    padded[:, :, : size[0], : size[1]] = x
    assert reduce(x).shape == (3, 8, H, W)
    torch.testing.assert_close(reduce(x), reduce(padded))


@pytest.mark.parametrize("size", [(8, 8), (9, 9), (7, 12), (5, 5), (1, 1)], ids=str)
@pytest.mark.parametrize("k", [3, 5])
def test_strided_dilated_convolution_equals_the_plain_one(k, size):
    op = operation(f"dil_conv_{k}x{k}", 6, 2).double()
    ours = op[1]
    plain = nn.Conv2d(6, 6, k, stride=2, padding=k - 1, dilation=2, groups=6, bias=False).double()
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(2, 6, *size, dtype=torch.float64, requires_grad=True)
    outs = ours(x), plain(x)
    torch.testing.assert_close(*outs)
    upstream = torch.randn_like(outs[1])
    mine = torch.autograd.grad(outs[0], (x, ours.weight), upstream)
    torch.testing.assert_close(mine, torch.autograd.grad(outs[1], (x, plain.weight), upstream))


@pytest.mark.parametrize("size", [(8, 8), (9, 9), (7, 12), (5, 6), (1, 1)], ids=str)
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("k", [3, 5])
def test_depthwise_gradients_equal_those_of_the_plain_convolution(k, dilation, size):
    ours = DepthwiseConv(6, k, 1, dilation).double()
    x = torch.randn(2, 6, *size, dtype=torch.float64, requires_grad=True)
    outs = ours(x), F.conv2d(x, ours.weight, None, 1, k // 2 * dilation, dilation, 6)
    torch.testing.assert_close(*outs)
    upstream = torch.randn_like(outs[1])
    mine, plain = (torch.autograd.grad(out, (x, ours.weight), upstream) for out in outs)
    torch.testing.assert_close(mine, plain)
    ours.weight.requires_grad_(False)  # nothing is computed that nobody asked for
    torch.testing.assert_close(torch.autograd.grad(ours(x), x, upstream)[0], plain[0])


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    x = torch.rand(20_000, 2, 3, 1) + 0.5
    for prob in (0.2, 0.75):
        out = drop_path(x, prob)
        kept = (out != 0).flatten(1)
        assert (kept.all(1) | ~kept.any(1)).all()
        torch.testing.assert_close(out[kept[:, 0]], x[kept[:, 0]] / (1 - prob))
        share = kept[:, 0].float().mean().item()
        assert abs(share - (1 - prob)) < 5 * math.sqrt(prob * (1 - prob) / len(x))


def cell_outputs(genotype, reduction, probs):
    torch.manual_seed(0)
    cell = Cell(genotype, 4, 4, 4, reduction, halved=False)
    x0, x1 = torch.randn(2, 8, 4, 8, 8)
    return [cell(x0, x1, prob) for prob in probs]


def test_drop_path_spares_identity_edges_and_hits_all_others():
    almost_one = 1 - 1e-7
    kept, dropped = cell_outputs(SKIPS, False, (0.0, almost_one))
    assert kept.abs().sum() > 0 and torch.equal(kept, dropped)
    for genotype, reduction in ((CONVS, False), (CONVS, True), (SKIPS, True)):  # skips at stride 2 are no identities
        kept, dropped = cell_outputs(genotype, reduction, (0.0, almost_one))
        assert kept.abs().sum() > 0 and not dropped.any()
    mixed = Genotype([("skip_connect", 0), ("sep_conv_3x3", 1)] * 4, [2, 3, 4, 5], *SKIPS[2:])
    cell = Cell(mixed, 4, 4, 4, reduction=False, halved=False)
    x0, x1 = torch.randn(2, 8, 4, 8, 8)
    torch.testing.assert_close(cell(x0, x1, almost_one), cell.preprocess0(x0).repeat(1, 4, 1, 1))


def test_network_drops_paths_in_training_only():
    net = Network(CONVS, 10, channels=4, layers=3)
    x = torch.randn(4, 3, 16, 16)
    net.drop_path_prob = 1 - 1e-7
    torch.testing.assert_close(net(x), net.classifier.bias.expand(4, 10))
    net.eval()
    dropping = net(x)
    net.drop_path_prob = 0.0
    assert torch.equal(net(x), dropping) and not torch.allclose(dropping, net.classifier.bias.expand(4, 10))


# ---------------------------------------------------------------------------------------------------------------
# Generated images
# ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def generated():
    """3,000 images to train on and 1,000 others."""
    return shapes(3000, seed=1), shapes(1000, seed=2)


def test_shapes_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = shapes(200, seed=5)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again, other = shapes(200, seed=5), shapes(200, seed=6)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first[0], other[0]) and not torch.equal(first[1], other[1])


def test_shapes_are_balanced_images(generated):
    images, labels = generated[0]
    assert images.shape == (3000, 3, 32, 32) and images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert Counter(labels.tolist()) == {k: 300 for k in range(10)}
    assert images.min() == 0 and images.max() == 255
    assert len(torch.unique(images.flatten(1), dim=0)) == 3000
    assert not torch.equal(labels, labels.sort().values)
    assert shapes(7, seed=0)[0].shape == (7, 3, 32, 32)


def best_linear_accuracy(x, y, x_test, y_test, strengths):
    """Of ridge regressions from (N, D) to one-hot labels, the best on the test data. Solved by the normal equations."""
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, x_test = (x - mean) / std, (x_test - mean) / std
    targets = F.one_hot(y, 10).double() - 0.1
    wide = x.shape[1] > x.shape[0]
    gram = (x @ x.T if wide else x.T @ x).double()
    kernel = (x_test @ x.T if wide else x_test).double()
    accuracies = []
    for strength in strengths:
        system = torch.linalg.cholesky(gram + strength * torch.eye(len(gram)))
        weights = torch.cholesky_solve(targets if wide else x.double().T @ targets, system)
        accuracies.append(((kernel @ weights).argmax(1) == y_test).double().mean().item())
    return max(accuracies)


def test_shapes_defeat_a_linear_classifier(generated):
    (images, y), (images_test, y_test) = generated
    pixels, pixels_test = images.flatten(1).float() / 255, images_test.flatten(1).float() / 255
    assert 0.05 < best_linear_accuracy(pixels, y, pixels_test, y_test, (100, 3000, 100_000)) < 0.40


def figure_features(images):
    """What differs from the image's rim, as ring by ring shares and angular harmonics about its centre of mass.

    The same however a figure is placed, turned, scaled and coloured: (N, 30).
    """
    x = images.double() / 255
    rim = torch.cat([x[:, :, 0], x[:, :, -1], x[:, :, :, 0], x[:, :, :, -1]], 2).median(2).values
    difference = (x - rim[:, :, None, None]).norm(dim=1)
    mask = (difference > 0.5 * difference.flatten(1).quantile(0.97, dim=1)[:, None, None]).double()
    mass = mask.sum((1, 2), keepdim=True)
    side = torch.arange(32, dtype=torch.float64)
    dx = side - (mask * side).sum((1, 2), keepdim=True) / mass
    dy = side[:, None] - (mask * side[:, None]).sum((1, 2), keepdim=True) / mass
    radius = (dx**2 + dy**2).sqrt()
    angle = torch.atan2(dy.expand_as(radius), dx.expand_as(radius))
    unit = ((mask * radius**2).sum((1, 2), keepdim=True) / mass).sqrt()
    features = [mass / unit**2]
    for outer in (0.4, 0.8, 1.2, 1.6, 2.0):
        ring = mask * (radius > (outer - 0.4) * unit) * (radius <= outer * unit)
        features.append(ring.sum((1, 2), keepdim=True) / mass)
        if outer > 0.4:
            features += [torch.polar(ring, k * angle).sum((1, 2), keepdim=True).abs() / mass for k in range(1, 7)]
    return torch.cat(features, 1).squeeze(2)


def test_shapes_carry_their_labels(generated):
    """Not linear in the pixels, but as good as certain from the figure's form: labels are true, figures are 10."""
    (images, y), (images_test, y_test) = generated
    form, form_test = figure_features(images), figure_features(images_test)
    form, form_test = torch.cat([form, form**2], 1), torch.cat([form_test, form_test**2], 1)
    assert best_linear_accuracy(form, y, form_test, y_test, (1.0,)) > 0.9


def test_load_shapes_limits_and_image_size(monkeypatch):
    asked = []

    def fewer(count, seed):  # a tenth of the images takes a tenth of the time
        asked.append((count, seed))
        return shapes(count // 10, seed)

    monkeypatch.setattr(common, "shapes", fewer)
    whole = load_data("shapes")
    assert [count for count, _ in asked] == [6000, 1000] and asked[0][1] != asked[1][1]
    assert [len(x) for x in whole[:4]] == [600, 600, 100, 100]
    assert whole.classes == list(SHAPE_CLASSES) and len(set(SHAPE_CLASSES)) == 10
    few = load_data("shapes", limit_train=50, limit_test=20)
    assert [len(x) for x in few[:4]] == [50, 50, 20, 20]
    for part, all_images, all_labels in ((few[:2], *whole[:2]), (few[2:4], *whole[2:4])):
        for image, label in zip(*part):  # an image of the whole set, with its own label
            at = (all_images == image).flatten(1).all(1).nonzero().flatten().tolist()
            assert len(at) == 1 and all_labels[at[0]] == label
    torch.manual_seed(123)
    again = load_data("shapes", limit_train=50, limit_test=20)
    assert torch.equal(few.train_images, again.train_images) and torch.equal(few.test_labels, again.test_labels)
    assert len(set(few.train_labels.tolist())) > 5  # not the first class only
    assert len(load_data("shapes", limit_train=7000).train_images) == 600
    small = load_data("shapes", image_size=16, limit_train=20, limit_test=20)
    assert small.train_images.shape == (20, 3, 16, 16) and small.train_images.dtype == torch.uint8
    for image, resized in zip(load_data("shapes", limit_train=20).train_images, small.train_images):
        pil = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((16, 16), Image.Resampling.BILINEAR)
        assert np.abs(np.asarray(pil).astype(int) - resized.permute(1, 2, 0).numpy()).max() <= 1


def test_unknown_data_sets_are_refused():
    with pytest.raises(InputError, match="shapes"):
        load_data("cifar1000")
    assert "shapes" in DATASETS


# ---------------------------------------------------------------------------------------------------------------
# Folders
# ---------------------------------------------------------------------------------------------------------------


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def put(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path)


def make_folder(root, test="test", size=(8, 8), classes=("ant", "bee", "cat"), count=3):
    """A small data set; returns {(split, class, number): array}."""
    arrays = {}
    for split in ("train", test):
        for name in classes:
            for i in range(count):
                arrays[split, name, i] = noise(*size, 3, seed=len(arrays))
                put(root / split / name / f"{i}.png", arrays[split, name, i])
    return arrays


@pytest.mark.parametrize("test", ["test", "val"])
def test_folder(test, tmp_path):
    arrays = make_folder(tmp_path, test, size=(8, 6))
    (tmp_path / "train" / "ant" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / "list.csv").write_text("no class either")
    data = load_data("folder", tmp_path)
    assert data.classes == ["ant", "bee", "cat"]
    for split, images, labels in (("train", *data[:2]), (test, *data[2:4])):
        assert images.shape == (9, 3, 8, 6) and images.dtype == torch.uint8 and labels.dtype == torch.int64
        want = {(k, arrays[split, name, i].tobytes()) for k, name in enumerate(data.classes) for i in range(3)}
        got = {(int(k), image.permute(1, 2, 0).numpy().tobytes()) for k, image in zip(labels, images)}
        assert got == want


def test_folder_image_kinds(tmp_path):
    """Gray, palette, transparent and 1-bit images become three channels; JPEG is read; endings may be in capitals."""
    gray, rgb, alpha = noise(8, 8), noise(8, 8, 3, seed=1), noise(8, 8, 4, seed=2)
    palette = Image.fromarray(rgb).quantize(16)
    bits = noise(8, 8, seed=3) > 127
    smooth = np.broadcast_to(np.array([200, 40, 90], np.uint8), (8, 8, 3)).copy()
    for split in ("train", "test"):
        put(tmp_path / split / "x" / "a.png", gray)
        put(tmp_path / split / "x" / "b.PNG", palette)
        put(tmp_path / split / "x" / "c.png", alpha)
        put(tmp_path / split / "x" / "d.png", Image.fromarray(bits))
        put(tmp_path / split / "x" / "e.jpg", smooth)
        put(tmp_path / split / "x" / "f.JPEG", gray)
        put(tmp_path / split / "x" / "g.png", Image.fromarray(gray.astype(np.uint16) * 257))
    data = load_data("folder", tmp_path)
    got = data.train_images.permute(0, 2, 3, 1).numpy()
    assert got.shape == (7, 8, 8, 3)
    colours = np.array(palette.getpalette()).reshape(-1, 3)
    for image, want in zip(got, (np.stack([gray] * 3, -1), colours[np.asarray(palette)], alpha[..., :3])):
        assert np.array_equal(image, want)
    assert np.array_equal(got[3], np.stack([bits * 255] * 3, -1))
    assert np.abs(got[4].astype(int) - smooth).max() <= 3
    assert np.array_equal(got[6], np.stack([gray] * 3, -1))
    assert (got[5][..., 0] == got[5][..., 1]).all() and np.corrcoef(got[5][..., 0].flat, gray.flat)[0, 1] > 0.8


def test_folder_image_size(tmp_path):
    wide, high, square = noise(8, 14, 3), noise(20, 8, 3, seed=1), noise(8, 8, 3, seed=2)
    gradient = np.broadcast_to(np.linspace(0, 240, 32).astype(np.uint8)[None, :, None], (16, 32, 3)).copy()
    for split in ("train", "test"):
        for name, image in (("a", wide), ("b", high), ("c", square), ("d", gradient)):
            put(tmp_path / split / "x" / f"{name}.png", image)
    with pytest.raises(InputError, match="--image-size"):
        load_data("folder", tmp_path)
    got = load_data("folder", tmp_path, image_size=8).train_images.permute(0, 2, 3, 1).numpy()
    assert np.array_equal(got[0], wide[:, 3:11])  # the shorter side is 8 already: the middle is cut out
    assert np.array_equal(got[1], high[6:14])
    assert np.array_equal(got[2], square)
    want = gradient.astype(float).reshape(8, 2, 16, 2, 3).mean((1, 3))[:, 4:12]  # half the size: about means of 2x2
    assert np.abs(got[3] - want).max() <= 2
    assert load_data("folder", tmp_path, image_size=19).test_images.shape == (4, 3, 19, 19)


def test_folder_limits(tmp_path):
    arrays = make_folder(tmp_path, count=10)
    data = [load_data("folder", tmp_path, limit_train=limit, limit_test=4) for limit in (6, 6)]
    assert data[0].train_images.shape[0] == 6 and data[0].test_images.shape[0] == 4
    assert all(torch.equal(a, b) for a, b in zip(data[0][:4], data[1][:4]))
    by_bytes = {array.tobytes(): key for key, array in arrays.items()}
    for images, labels in (data[0][:2], data[0][2:4]):
        keys = [by_bytes[image.permute(1, 2, 0).numpy().tobytes()] for image in images]
        assert [data[0].classes[k] for k in labels] == [name for _, name, _ in keys]
        assert len(set(keys)) == len(keys) and len({name for _, name, _ in keys}) > 1


def test_folder_of_one_image(tmp_path):
    for split in ("train", "test"):
        put(tmp_path / split / "only" / "a.png", noise(5, 7, 3))
    data = load_data("folder", tmp_path, workers=1)
    assert data.train_images.shape == data.test_images.shape == (1, 3, 5, 7)
    assert data.train_labels.tolist() == data.test_labels.tolist() == [0] and data.classes == ["only"]


def test_folder_with_a_class_without_images(tmp_path):
    """It keeps its place among the labels, so that a class that is only tested or only trained on stays right."""
    make_folder(tmp_path)
    for path in (tmp_path / "train" / "bee").iterdir():
        path.unlink()
    (tmp_path / "test" / "cat").rename(tmp_path / "put aside")
    data = load_data("folder", tmp_path)
    assert data.classes == ["ant", "bee", "cat"]
    assert data.train_labels.tolist() == [0] * 3 + [2] * 3 and data.test_labels.tolist() == [0] * 3 + [1] * 3


def damage(root, kind):
    image = root / "train" / "bee" / "1.png"
    if kind == "cut off":
        image.write_bytes(image.read_bytes()[:100])
    elif kind == "empty file":
        image.write_bytes(b"")
    elif kind == "text":
        image.write_text("<html>404 Not Found</html>")
    elif kind == "broken bytes":
        content = bytearray(image.read_bytes())
        content[60:90] = bytes(30)
        image.write_bytes(content)
    elif kind == "link to nowhere":
        image.unlink()
        image.symlink_to(root / "nothing")
    elif kind == "another size":
        put(image, noise(9, 8, 3))
    elif kind == "test of another size":
        for path in (root / "test").glob("*/*"):
            put(path, noise(9, 8, 3))
    elif kind == "class only in test":
        put(root / "test" / "dog" / "a.png", noise(8, 8, 3))
    elif kind == "no images in train":
        for path in (root / "train").glob("*/*"):
            path.unlink()
    elif kind == "no images in test":
        for path in (root / "test").glob("*/*"):
            path.rename(path.with_suffix(".txt"))
    elif kind == "no test":
        (root / "test").rename(root / "tests")
    elif kind == "no train":
        (root / "train").rename(root / "training")


@pytest.mark.parametrize(
    "kind, says",
    [
        ("cut off", "bee/1.png"),
        ("empty file", "bee/1.png"),
        ("text", "bee/1.png"),
        ("broken bytes", "bee/1.png"),
        ("link to nowhere", "bee/1.png"),
        ("another size", "--image-size"),
        ("test of another size", "--image-size"),
        ("class only in test", "dog"),
        ("no images in train", "no images"),
        ("no images in test", "no images"),
        ("no test", "train/<class>"),
        ("no train", "train/<class>"),
    ],
)
def test_folders_that_cannot_be_used(kind, says, tmp_path):
    make_folder(tmp_path)
    damage(tmp_path, kind)
    with pytest.raises(InputError) as e:
        load_data("folder", tmp_path)
    assert says in str(e.value) and "\n" not in str(e.value)


def test_folders_that_are_not_there(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError, match="train/<class>"):
            load_data("folder", path)
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
    with pytest.raises(InputError, match="no images"):
        load_data("folder", tmp_path)


# ---------------------------------------------------------------------------------------------------------------
# CIFAR and SVHN
# ---------------------------------------------------------------------------------------------------------------


def unchecked(monkeypatch):
    """Small files of the real format do not have the real files' checksums."""
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *args, **kwargs: True)
    monkeypatch.setattr(torchvision.datasets.svhn, "check_integrity", lambda *args, **kwargs: True)
    monkeypatch.setattr(torchvision.datasets.SVHN, "download", lambda self: None)


def test_cifar10(tmp_path, monkeypatch):
    unchecked(monkeypatch)
    root = tmp_path / "cifar-10-batches-py"
    root.mkdir()
    rows = noise(6 * 4, 3072).reshape(6, 4, 3072)  # red, then green, then blue; row by row
    labels = np.random.default_rng(1).integers(0, 10, (6, 4))
    for i, name in enumerate([f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]):
        (root / name).write_bytes(pickle.dumps({"data": rows[i], "labels": labels[i].tolist()}))
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (root / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    data = load_data("cifar10", tmp_path)
    check_batches(data, rows[:5].reshape(20, 3072), labels[:5].flatten(), rows[5], labels[5], names)
    few = load_data("cifar10", tmp_path, image_size=16, limit_train=7, limit_test=2)
    assert few.train_images.shape == (7, 3, 16, 16) and few.test_images.shape == (2, 3, 16, 16)


def check_batches(data, train, train_labels, test, test_labels, names):
    assert data.classes == names
    for images, labels, rows, want in ((*data[:2], train, train_labels), (*data[2:4], test, test_labels)):
        assert images.dtype == torch.uint8 and labels.dtype == torch.int64
        assert labels.tolist() == want.tolist()
        assert images.shape == (len(rows), 3, 32, 32)
        for colour, y, x in ((0, 0, 0), (0, 0, 31), (1, 5, 2), (2, 31, 31)):
            assert images[:, colour, y, x].tolist() == rows[:, colour * 1024 + y * 32 + x].tolist()


def test_cifar100(tmp_path, monkeypatch):
    unchecked(monkeypatch)
    root = tmp_path / "cifar-100-python"
    root.mkdir()
    train, test = noise(6, 3072), noise(3, 3072, seed=1)
    labels = [np.array([5, 99, 0, 1, 2, 50]), np.array([7, 98, 3])]
    for name, rows, fine in (("train", train, labels[0]), ("test", test, labels[1])):
        entry = {"data": rows, "fine_labels": fine.tolist(), "coarse_labels": [0] * len(rows)}
        (root / name).write_bytes(pickle.dumps(entry))
    names = [f"class {k}" for k in range(100)]
    (root / "meta").write_bytes(pickle.dumps({"fine_label_names": names, "coarse_label_names": ["coarse"]}))
    check_batches(load_data("cifar100", tmp_path), train, labels[0], test, labels[1], names)


def test_svhn(tmp_path, monkeypatch):
    savemat = pytest.importorskip("scipy.io").savemat
    unchecked(monkeypatch)
    X = {split: noise(32, 32, 3, 5, seed=k) for k, split in enumerate(("train", "test"))}  # (H, W, 3, N)
    y = {"train": np.array([1, 10, 9, 10, 3]), "test": np.array([2, 10, 5, 7, 1])}  # the digit 0 is called 10
    for split in X:
        savemat(tmp_path / f"{split}_32x32.mat", {"X": X[split], "y": y[split].astype(np.uint8)[:, None]})
    data = load_data("svhn", tmp_path)
    assert data.classes == [str(k) for k in range(10)]
    for split, images, labels in (("train", *data[:2]), ("test", *data[2:4])):
        assert images.dtype == torch.uint8 and labels.dtype == torch.int64
        assert labels.tolist() == [k % 10 for k in y[split].tolist()]
        assert np.array_equal(images.numpy(), X[split].transpose(3, 2, 0, 1))


def test_svhn_without_scipy_says_so(tmp_path, monkeypatch):
    unchecked(monkeypatch)
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(InputError, match="pip install scipy"):
        load_data("svhn", tmp_path)


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "svhn"])
@pytest.mark.parametrize("kind", [urllib.error.URLError, ConnectionResetError, TimeoutError])
def test_failing_download(dataset, kind, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise kind("no way to host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(InputError) as e:
        load_data(dataset, tmp_path)
    assert all(part in str(e.value) for part in (dataset, str(tmp_path), "shapes", "no way to host"))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("dataset", ["cifar10", "svhn"])
def test_damaged_download(dataset, tmp_path, monkeypatch):
    """What arrives is not the file: torchvision's checksum finds it."""

    def page(url, filename, *args, **kwargs):
        Path(filename).write_bytes(b"<html>quota exceeded</html>")

    monkeypatch.setattr(torchvision.datasets.utils, "_urlretrieve", page)
    with pytest.raises(InputError, match=dataset):
        load_data(dataset, tmp_path)


# ---------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------


def test_mean_std():
    images = torch.from_numpy(noise(50, 3, 9, 7)) // torch.tensor([1, 2, 5], dtype=torch.uint8).view(3, 1, 1)
    x = images.double() / 255
    mean, std = mean_std(images)
    assert mean.dtype == std.dtype == torch.float32
    torch.testing.assert_close(mean.double(), x.mean((0, 2, 3)), rtol=0, atol=1e-7)
    torch.testing.assert_close(std.double(), x.std((0, 2, 3), correction=0), rtol=0, atol=1e-7)
    flat = mean_std(torch.full((2, 3, 4, 4), 51, dtype=torch.uint8))
    torch.testing.assert_close(flat[0], torch.full((3,), 0.2))
    assert (flat[1] > 0).all()  # nothing is divided by 0


def test_normalize():
    images = torch.from_numpy(noise(20, 3, 8, 6))
    before = images.clone()
    out = normalize(images, *mean_std(images))
    assert torch.equal(images, before)
    assert out.dtype == torch.float32 and out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(out.std((0, 2, 3), correction=0), torch.ones(3), rtol=0, atol=1e-5)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 1.0, 2.0])
    want = torch.stack([(images[:, c] / 255 - mean[c]) / std[c] for c in range(3)], 1)
    torch.testing.assert_close(normalize(images, mean, std), want)
    torch.testing.assert_close(normalize(images / 255, mean, std), want)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("size, padding", [((5, 7), 2), ((8, 8), 1), ((3, 3), 4)], ids=str)
def test_random_crop_flip_is_every_shift_and_mirror_image(size, padding, dtype):
    H, W = size
    image = torch.arange(1, 3 * H * W + 1).view(3, H, W).to(dtype)
    padded = torch.zeros(3, H + 2 * padding, W + 2 * padding, dtype=dtype)
    padded[:, padding : padding + H, padding : padding + W] = image
    possible = {}  # every outcome, as bytes: where it comes from
    for dy in range(2 * padding + 1):
        for dx in range(2 * padding + 1):
            crop = padded[:, dy : dy + H, dx : dx + W].numpy()
            possible.setdefault(crop.tobytes(), (dy, dx, "as it is"))
            possible.setdefault(crop[:, :, ::-1].tobytes(), (dy, dx, "mirrored"))
    images = image.expand(4000, -1, -1, -1)
    out = random_crop_flip(images, padding)
    assert out.shape == images.shape and out.dtype == dtype
    seen = Counter(possible[x.numpy().tobytes()] for x in out)  # a KeyError: none of the possible ones
    assert len(seen) == len(possible)
    blank = seen.pop(possible.get(bytes(image.numpy().nbytes)), 0)  # its own mirror image
    mirrored = sum(n for (_, _, how), n in seen.items() if how == "mirrored")
    assert abs(mirrored / (4000 - blank) - 0.5) < 0.05
    assert torch.equal(images, image.expand(4000, -1, -1, -1))


def test_random_crop_flip_treats_images_apart_and_channels_alike():
    images = torch.rand(64, 1, 6, 6).expand(64, 3, 6, 6).contiguous()
    out = random_crop_flip(images)
    assert torch.equal(out[:, 0], out[:, 1]) and torch.equal(out[:, 0], out[:, 2])
    assert all(set(b.flatten().tolist()) <= {0.0, *a.flatten().tolist()} for a, b in zip(images, out))


@pytest.mark.parametrize("size, length", [((32, 32), 16), ((11, 8), 4), ((9, 10), 3), ((6, 6), 1), ((5, 5), 20)])
def test_cutout(size, length):
    H, W = size
    images = torch.rand(3000, 3, H, W) + 0.5
    before = images.clone()
    out = cutout(images, length)
    assert torch.equal(images, before)
    hole = out == 0
    assert torch.equal(out, images.masked_fill(hole, 0))
    assert (hole == hole[:, :1]).all()  # all channels
    hole = hole[:, 0]
    rows, cols = hole.any(2), hole.any(1)
    assert torch.equal(hole, rows[:, :, None] & cols[:, None, :])  # a rectangle
    areas = hole.sum((1, 2))
    assert areas.min() >= 1 and areas.max() <= length**2

    def expected(side):
        """Every hole a point of the side can give: those pixels of [point - length//2, + length) that exist."""
        starts = [point - length // 2 for point in range(side)]
        return {tuple(range(max(start, 0), min(start + length, side))) for start in starts}

    for spans, side in ((rows, H), (cols, W)):
        assert {tuple(span.nonzero().flatten().tolist()) for span in spans} == expected(side)
    whole = (rows.sum(1) == length) & (cols.sum(1) == length)
    inner = ~(hole[:, 0].any(1) | hole[:, -1].any(1) | hole[:, :, 0].any(1) | hole[:, :, -1].any(1))
    assert whole[inner].all() and (inner.any() or length >= min(size) - 1)


# ---------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", ["normal", "reduce"])
@pytest.mark.parametrize("name", GENOTYPES)
def test_draw_cell(name, cell, tmp_path):
    figure = pytest.importorskip("matplotlib.figure").Figure(figsize=(8, 4))
    axis = figure.add_subplot()
    edges, concat = getattr(GENOTYPES[name], cell), getattr(GENOTYPES[name], f"{cell}_concat")
    draw_cell(edges, concat, axis, f"{name}, {cell}")
    texts = [text.get_text() for text in axis.texts]
    assert Counter(text for text in texts if text in PRIMITIVES) == Counter(op for op, _ in edges)
    assert {"0", "1", "2", "3"} <= set(texts) and axis.get_title() == f"{name}, {cell}"
    arrows = [text for text in axis.texts if getattr(text, "arrow_patch", None) is not None]
    assert len(arrows) == len(edges) + len(concat)
    figure.savefig(tmp_path / "cell.png", dpi=100)  # Agg: a figure without pyplot needs no display
    assert Image.open(tmp_path / "cell.png").size == (800, 400)
