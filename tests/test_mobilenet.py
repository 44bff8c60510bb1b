"""--space mobilenet. Oracles: ProxylessNAS' arithmetic, a layer as the sum over all operations.

What it shares with the cells (freezing, pruning, limits, a state that goes on) is in test_supernet.py and test_dha.py.
"""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import common
import dha
from conftest import call, lines, result
from dha import MobileSupernet

OPS = common.MOBILE_PRIMITIVES
STAGES = [(24, 4, 2), (40, 4, 2), (80, 4, 2), (96, 4, 1), (192, 4, 2), (320, 1, 1)]  # width, layers, stride
NO_SKIP = [0, 4, 8, 12, 16, 20]  # where they begin
SMALLEST = ["mbconv3_3x3" if i in NO_SKIP else "skip_connect" for i in range(21)]


def proxyless(names, stem, side):
    """Parameters and multiply-adds, from all convolutions: (inputs of an output, outputs, kernel, side)."""
    wide = 1 + (stem == "imagenet")
    widths = [32, 16] + [c for c, n, _ in STAGES for _ in range(n)]
    strides = [1] + [s if i == 0 else 1 for _, n, s in STAGES for i in range(n)]
    strides[1], side = wide, side // wide
    convs = [(3, 32, 3, side)]
    for name, c_in, c_out, stride in zip(["mbconv1_3x3", *names], widths, widths[1:], strides):
        if name != "skip_connect":
            middle = int(name[6]) * c_in
            convs += [(c_in, middle, 1, side)] * (name[6] != "1")
            side //= stride
            convs += [(1, middle, int(name[-1]), side), (middle, c_out, 1, side)]
    convs.append((320, 1280, 1, side))
    params = sum(n * c * k * k + 2 * c for n, c, k, _ in convs) + 1281 * 1000
    return params, sum(n * c * k * k * side**2 for n, c, k, side in convs) + 1280 * 1000


@pytest.mark.parametrize("stem, side", [("imagenet", 224), ("cifar", 32)])
@pytest.mark.parametrize("names", [["mbconv6_7x7"] * 21, SMALLEST], ids=["largest", "smallest"])
def test_the_pruned_network_has_proxylessnas_arithmetic(names, stem, side):
    with torch.device("meta"):  # as cost_share does
        net = MobileSupernet(32, 1000, 21, stem=stem, given=dha.to_support(names))
    assert (common.count_parameters(net), common.count_flops(net, side)) == proxyless(names, stem, side)
    assert net.skip_connects() == (names.count("skip_connect"), 21) and net.genotype() == names


def test_skip_is_a_candidate_only_where_nothing_changes_and_the_code_is_shorter_than_alpha():
    net = MobileSupernet(4, 10, 21)
    assert net.A.shape == (21, 3, 7) and net.A.min() >= 0 and net.A.max() <= 1 and net.b[0].shape == (3,)
    for i, layer in enumerate(net.cells):
        assert list(layer.nodes[0]) == [f"{name}_0" for name in OPS[: 7 - (i in NO_SKIP)]]
        assert (net.A[i] == 0).all(0).tolist() == [False] * 6 + [i in NO_SKIP]
    alphas = dha.ista(net.A.expand(60, 21, 3, 7), 0.3 * torch.randn(60, 21, 3), 1e-5)
    found = [net.support_of(alpha) for alpha in [*alphas, torch.zeros(21, 7)]]
    skips = {i for support in found for i in range(21) if support[i] == [("skip_connect", 0)]}
    assert skips and not skips & set(NO_SKIP)
    assert found[0] == [[(OPS[int(a.abs().argmax())], 0)] for a in alphas[0]]  # the strongest


def written_out(op, x, stride):
    """A candidate's MBConv: (convolution, batch norm, ReLU6) twice, then without the ReLU6."""
    weights = [m.weight for m in op if isinstance(m, nn.Conv2d)]
    norms = [m for m in op if isinstance(m, nn.BatchNorm2d)]
    for i, (w, norm) in enumerate(zip(weights, norms, strict=True)):
        k, groups = w.shape[-1], 1 if w.shape[1] > 1 else len(w)
        x = F.conv2d(x, w, None, stride if k > 1 else 1, k // 2, 1, groups)
        x = F.batch_norm(x, None, None, norm.weight, norm.bias, training=True)
        x = x.clamp(0, 6) if i < 2 else x
    return x


@pytest.mark.parametrize("i, name", [(i, name) for i in (5, 4, 6) for name in OPS[: 6 + (i == 5)]])
def test_a_layer_is_the_sum_over_all_seven_operations(i, name):
    """Section 2.3: weighted by b^T A - alpha^T E on the support, by 0 elsewhere."""
    net = MobileSupernet(4, 10, 11).double()  # layer 5 has a shortcut, 4 stride 2, 6 another width
    layer, n = net.cells[i], OPS.index(name)
    alpha = torch.zeros(11, 7, dtype=torch.float64)
    alpha[i, n] = 0.3
    net.set_alpha(alpha)
    nn.init.normal_(net.b[i], std=0.3)
    for norm in layer.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.weight, std=6)  # beyond ReLU6's 6
    x = torch.randn(4, net.cells[i - 1].width, 7, 7, dtype=torch.float64, requires_grad=True)
    A = net.A[i]
    strength = (net.b[i] @ A - alpha[i] @ (A.T @ A - torch.eye(7, dtype=torch.float64)))[n]
    if name == "skip_connect":
        want = (1 + (strength - strength.detach())) * x
    else:
        want = strength * written_out(layer.nodes[0][f"{name}_0"], x, layer.stride)
        want = want + x if layer.shortcut else want
    mine = layer(None, x, [net.support[i]], [net.strengths(i)], 0.0)
    upstream = torch.randn_like(mine)
    grads = [torch.autograd.grad(out, (net.b[i], x), upstream, retain_graph=True) for out in (mine, want)]
    torch.testing.assert_close([mine, *grads[0]], [want, *grads[1]], rtol=0, atol=1e-10)
    assert grads[0][0].abs().max() > 1e-3

    # Once frozen: the same with a constant strength, which does not touch a skip-connection
    net.freeze(i)
    frozen = layer(None, x, [net.support[i]], [net.strengths(i)], 0.0)
    assert torch.equal(frozen, mine) and (name != "skip_connect" or torch.equal(frozen, x))
    torch.testing.assert_close(torch.autograd.grad(frozen, x, upstream)[0], grads[0][1], rtol=0, atol=1e-12)
    assert not net.strengths(i).requires_grad


def test_genotypes_that_fit_come_back_and_others_are_refused():
    """Those that no network of any size could have: test_genotypes.py."""
    fitting = ["mbconv3_3x3"] * 6  # in 6 layers no skip fits
    assert MobileSupernet(4, 10, 6, given=dha.to_support(fitting)).genotype() == fitting
    cells = common.GENOTYPES["DARTS_V2"]
    for bad in (fitting[1:], fitting * 2, ["skip_connect", *fitting[1:]], cells):
        with pytest.raises(common.InputError, match="genotype"):
            MobileSupernet(4, 10, 6, given=dha.to_support(bad))
    with pytest.raises(common.InputError, match="genotype"):
        dha.SparseSupernet(4, 10, 3, given=dha.to_support(fitting))


def test_a_run_leaves_its_files(data, tmp_path):
    flags = "--preset quick --gpu -1 --space mobilenet --channels 4 --layers 6 --search-epochs 1 --train-epochs 1"
    assert call(dha, *flags.split(), "--dataset", "folder", "--data-dir", data, "--out", tmp_path / "run") == 0
    with Image.open(tmp_path / "run" / "layers.png") as picture:
        assert min(picture.size) > 300 and not (tmp_path / "run" / "cells.png").exists()
    genotype, said = common.load_genotype(tmp_path / "run" / "genotype.json", "mobilenet"), result(tmp_path / "run")
    assert [[name, 0] for name in genotype] == [node[0] for node in lines(tmp_path / "run")[-1]["support"]]
    net, info = dha.load_model(tmp_path / "run" / "model.pt")
    assert net.genotype() == genotype and str(genotype) == said["genotype"] and info["space"] == "mobilenet"
    assert (said["params"], said["flops"]) == (common.count_parameters(net), common.count_flops(net, 32))
