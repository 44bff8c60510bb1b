"""The space of ProxylessNAS' layers against written-out references: arithmetic, sums, pruned networks."""

import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common
import dha
from common import InputError
from conftest import call
from test_dha import freeze_all, normalized, norms, recover, running, settings, start, steps, tiny
from test_runs import after_every_epoch, assert_same, interrupt, lines, result

OPS = common.MOBILE_PRIMITIVES
SPACE = "--space mobilenet --layers 11".split()
MIXED = [
    "mbconv3_5x5",
    "skip_connect",
    "mbconv6_3x3",
    "mbconv6_7x7",
    "mbconv3_3x3",
    "skip_connect",
    "mbconv6_5x5",
    "mbconv3_7x7",
    "mbconv3_3x3",
    "mbconv6_3x3",
    "mbconv6_7x7",
]
STAGES = [(24, 4, 2), (40, 4, 2), (80, 4, 2), (96, 4, 1), (192, 4, 2), (320, 1, 1)]  # width, layers, stride
NO_SKIP = [0, 4, 8, 12, 16, 20]  # where they begin
FITTING = ["mbconv3_3x3"] * 6  # in 6 layers no skip fits
FLAGS = """--preset quick --gpu -1 --space mobilenet --channels 4 --layers 6 --limit-train 16 --batch-size 8
--search-epochs 2 --train-epochs 1 --dataset folder""".split()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def choose(net, names, noise=0.02):
    """These are the support: b = 0.3 A e_i, so that alpha is almost 0.3 e_i. Afterwards b moves, alpha not."""
    with torch.no_grad():
        for k, name in enumerate(names):
            net.b[k].copy_(0.3 * net.A[k, :, OPS.index(name)])
        recover(net)
        for b in net.b:
            b += noise * torch.randn_like(b)
    assert net.genotype() == names
    return net


def supernet(names):
    return choose(dha.MobileSupernet(4, 10, 11).double(), names)


def run(data, *flags):
    return call(dha, *FLAGS, "--data-dir", data, *flags)


# -------- ProxylessNAS' layers ------------------------------------------------------------------------------


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
    return params, sum(n * c * k * k * side**2 for n, c, k, side in convs) + 1280 * 1000, side


SMALLEST = ["mbconv3_3x3" if i in NO_SKIP else "skip_connect" for i in range(21)]


@pytest.mark.parametrize("stem, side, last", [("imagenet", 224, 7), ("cifar", 32, 4)])
@pytest.mark.parametrize("names", [["mbconv6_7x7"] * 21, SMALLEST], ids=["largest", "smallest"])
def test_the_pruned_network_has_proxylessnas_arithmetic(names, stem, side, last):
    with torch.device("meta"):  # as cost_share does
        net = dha.MobileSupernet(32, 1000, 21, stem=stem, support=dha.to_support(names))
    found = common.count_parameters(net), common.count_flops(net, side), last
    assert found == proxyless(names, stem, side)
    assert net.skip_connects() == (names.count("skip_connect"), 21)


def test_skip_is_a_candidate_only_where_nothing_changes():
    net = dha.MobileSupernet(4, 10, 21)
    assert [i for i, layer in enumerate(net.cells) if not layer.shortcut] == NO_SKIP
    for i, layer in enumerate(net.cells):
        assert list(layer.nodes[0]) == [f"{name}_0" for name in OPS[: 7 - (i in NO_SKIP)]]
        assert (net.A[i] == 0).all(0).tolist() == [False] * 6 + [i in NO_SKIP]
    assert net.A.shape == (21, 7, 7) and net.A.min() >= 0 and net.A.max() <= 1
    alphas = dha.ista(net.A.expand(60, 21, 7, 7), 0.3 * torch.randn(60, 21, 7), 1e-5)
    found = [dha.select_support(alpha, [1] * 21, 1, OPS) for alpha in [*alphas, torch.zeros(21, 7)]]
    skips = {i for support in found for i in range(21) if support[i] == [("skip_connect", 0)]}
    assert skips and not skips & set(NO_SKIP)
    assert found[0] == [[(OPS[int(a.abs().argmax())], 0)] for a in alphas[0]]  # the strongest


# -------- A layer is the sum over all operations (section 2.3) ----------------------------------------------


def written_out(op, x, stride):
    """A candidate's MBConv: (convolution, batch norm, ReLU6) twice, then without the ReLU6."""
    convolutions = [m for m in op if isinstance(m, torch.nn.Conv2d)]
    norms = [m for m in op if isinstance(m, torch.nn.BatchNorm2d)]
    for i, (w, norm) in enumerate(zip([m.weight for m in convolutions], norms, strict=True)):
        k, groups = w.shape[-1], 1 if w.shape[1] > 1 else len(w)
        x = F.conv2d(x, w, None, stride if k > 1 else 1, k // 2, 1, groups)
        x = F.batch_norm(x, None, None, norm.weight, norm.bias, training=True)
        x = x.clamp(0, 6) if i < 2 else x
    return x


@pytest.mark.parametrize("i, name", [(i, name) for i in (5, 4, 6) for name in OPS[: 6 + (i == 5)]])
def test_a_layer_is_the_sum_over_all_seven_operations(i, name):
    net = supernet([*MIXED[:i], name, *MIXED[i + 1 :]])  # 5 has a shortcut, 4 stride 2, 6 another width
    layer = net.cells[i]
    for norm in layer.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(norm.weight, std=6)  # beyond ReLU6's 6
    x = torch.randn(4, net.cells[i - 1].width, 7, 7, dtype=torch.float64, requires_grad=True)
    A, alpha = net.A[i], F.one_hot(torch.tensor(OPS.index(name)), 7) * net.alpha[i]
    E = A.T @ A - torch.eye(7, dtype=torch.float64)
    g = (net.b[i] @ A - alpha @ E) * (alpha != 0)  # b^T A - alpha^T E on the support, 0 elsewhere
    assert torch.allclose(net.strength(i), g[alpha != 0], atol=1e-12) and (alpha != 0).sum() == 1
    want = x if layer.shortcut and name != "skip_connect" else 0
    for n, other in enumerate(OPS):
        if other != "skip_connect":
            want = want + g[n] * written_out(layer.nodes[0][f"{other}_0"], x, layer.stride)
        elif name == other:
            want = want + (1 + (g[n] - g[n].detach())) * x
    ran = []
    for op in (op for cell in net.cells for op in cell.nodes[0].values()):
        op.register_forward_hook(lambda module, *_: ran.append(module))
    mine = layer(None, x, [net.support[i]], [net.strength(i)], 0.0)
    upstream = torch.randn_like(mine)
    grads = [torch.autograd.grad(out, (net.b[i], x), upstream, retain_graph=True) for out in (mine, want)]
    for a, b in ((mine, want), *zip(*grads)):
        assert (a - b).abs().max() <= 1e-10
    assert grads[0][0].abs().max() > 1e-3
    chosen = [] if name == "skip_connect" else running(net, i)
    assert ran == chosen
    mine.backward(upstream)
    learned = {p for op in chosen for p in op.parameters() if p.requires_grad}
    assert {p for p in net.parameters() if p.grad is not None} == learned | {net.b[i]}

    # Once frozen: the same with a constant strength, which does not touch a skip-connection
    net.freeze(i)
    frozen = layer(None, x, [net.support[i]], [net.strength(i)], 0.0)
    assert torch.equal(frozen, mine) and (name != "skip_connect" or torch.equal(frozen, x))
    torch.testing.assert_close(torch.autograd.grad(frozen, x, upstream)[0], grads[0][1], rtol=0, atol=1e-12)
    assert not net.strength(i).requires_grad


# -------- Freezing and pruning ------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_freezing_and_pruning_change_no_logits(training):
    s, data, args = tiny(*SPACE)
    steps(s, data, args, 1)
    net = choose(s.net.double(), MIXED)
    x = normalized(s, data.test_images)[:8, :, ::2, ::2].double()
    net(x)  # running statistics of what runs now

    def logits(net):
        with torch.no_grad():
            return net.train(training)(x)

    before = logits(net)
    for k in range(11):
        assert not any(list(norm.parameters()) for norm in norms(net, k))
        net.freeze(k)
        assert all(len(list(norm.parameters())) == 2 for norm in norms(net, k))
        assert (logits(net) - before).abs().max() <= 1e-10
    freeze_all(s)
    assert (logits(net) - before).abs().max() <= 1e-10
    pruned = dha.MobileSupernet(4, 10, 11, support=dha.to_support(MIXED)).double()
    assert (pruned.factors == 1).all()
    pruned.load_state_dict(net.state_dict())
    assert torch.equal(logits(pruned), logits(net))
    assert net.genotype() == pruned.genotype() == MIXED and not list(net.b)
    assert set(s.theta) == set(net.parameters())


# -------- Constraints (Eq. 1) -------------------------------------------------------------------------------


def test_a_start_comes_down_to_the_limits():
    """To two thirds of the first support's parameters, layer by layer."""
    data, args = settings(*SPACE, "--layers", "6")
    args.max_params = 2 * common.count_parameters(freeze_all(start(args, data))) // 3
    assert common.count_parameters(freeze_all(start(args, data))) <= args.max_params


# -------- genotype.json -------------------------------------------------------------------------------------


def test_a_genotype_comes_back(tmp_path):
    genotype = supernet(MIXED).genotype()
    common.save_genotype(genotype, tmp_path / "genotype.json")
    assert json.loads((tmp_path / "genotype.json").read_text()) == genotype == MIXED
    assert common.load_genotype(tmp_path / "genotype.json", space="mobilenet") == genotype
    assert common.parse_genotype(str(genotype), "mobilenet") == genotype


BAD = {
    "damaged": json.dumps(FITTING)[:-9], "empty": "", "nested": str([FITTING]), "a word": '"mbconv3_3x3"',
    "wrong name": str([*FITTING[1:], "mbconv4_3x3"]), "numbers": "[1, 2]", "null": "null",
    "cells": str(common.GENOTYPES["PDARTS"]), "JSON": json.dumps(common.GENOTYPES["PDARTS"]._asdict()),
    "short": str(FITTING[1:]), "long": str(MIXED), "no": "[]", "skip": str(["skip_connect", *FITTING[1:]]),
}  # fmt: skip


@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
def test_bad_genotypes_are_refused(content, data, tmp_path, one_line):
    (tmp_path / "file").write_text(content)
    with pytest.raises(InputError):
        genotype = common.load_genotype(tmp_path / "file", "mobilenet")
        dha.MobileSupernet(4, 10, 6, support=dha.to_support(genotype))
    assert run(data, "--genotype", tmp_path / "file", "--out", tmp_path / "run") == 2
    one_line()
    assert not (tmp_path / "run").exists()


def test_a_space_refuses_the_others_genotype(data, tmp_path, one_line):
    with pytest.raises(InputError):
        dha.SparseSupernet(4, 10, 3, support=dha.to_support(FITTING))
    with pytest.raises(InputError):
        dha.MobileSupernet(4, 10, 6, support=dha.to_support(common.GENOTYPES["DARTS_V2"]))
    common.save_genotype(FITTING, tmp_path / "file")
    cells = "--space cells --layers 3 --genotype".split()
    assert run(data, *cells, tmp_path / "file", "--out", tmp_path / "run") == 2
    one_line()
    assert not (tmp_path / "run").exists()


# -------- Whole runs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(data, tmp_path_factory):
    """A finished run, with figures."""
    out = tmp_path_factory.mktemp("mobilenet") / "run"
    assert run(data, "--out", out) == 0
    return out


def test_a_run_leaves_its_files(done):
    for name in ("layers.png", "curves.png", "policy.png"):
        with Image.open(done / name) as picture:
            assert min(picture.size) > 300
    assert not (done / "cells.png").exists()
    genotype, said = common.load_genotype(done / "genotype.json", "mobilenet"), result(done)
    assert [record["phase"] for record in lines(done)] == ["search", "search", "train"]
    assert [[name, 0] for name in genotype] == [node[0] for node in lines(done)[-1]["support"]]
    net, info = dha.load_model(done / "model.pt")
    assert net.genotype() == genotype and len(genotype) == 6 and str(genotype) == said["genotype"]
    assert said["params"] == sum(p.numel() for p in net.parameters()) and info["space"] == "mobilenet"
    assert said["flops"] == common.count_flops(net, 32)


def test_a_stopped_run_ends_the_same_and_its_genotype_can_be_given(data, done, tmp_path, monkeypatch):
    monkeypatch.setattr(dha, "Figure", None)
    with monkeypatch.context() as patch:
        after_every_epoch(patch, interrupt)
        for _ in range(3):
            assert run(data, "--out", tmp_path / "run", "--resume") == 1
    assert run(data, "--out", tmp_path / "run", "--resume") == 0
    assert_same(tmp_path / "run", done)
    assert run(data, "--genotype", done / "genotype.json", "--out", tmp_path / "given") == 0
    assert result(tmp_path / "given")["search_epochs"] == 0
    assert (tmp_path / "given" / "genotype.json").read_bytes() == (done / "genotype.json").read_bytes()


@pytest.mark.parametrize("flags", ["layers 7", "layers 1", "auxiliary-weight 0.4", "genotype DARTS_V2"])
def test_bad_flags_are_one_line(flags, data, tmp_path, one_line):
    assert run(data, *f"--{flags}".split(), "--out", tmp_path / "run") == 2
    one_line()
    assert not (tmp_path / "run").exists()
