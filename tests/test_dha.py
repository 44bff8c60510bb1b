"""dha.py's run: its flags, its loop, a state that goes on, waits. Oracles: runs that are known, an uninterrupted run.

The parts have files of their own: test_ista.py, test_policy.py, test_eta.py, test_supernet.py, test_mobilenet.py.
"""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import common
import dha
from conftest import needs_a_gpu, pretends_cuda

TINY = "--preset quick --gpu -1 --channels 4 --layers 3 --batch-size 8 --out no-such-run".split()
CPU = torch.device("cpu")


def tiny(*flags, count=64):
    """What a run learns before its first step; its data and flags."""
    args = dha.parse_args([*TINY, *flags])
    data = common.Data(*common.shapes(count, 1), *common.shapes(20, 2), list(common.SHAPE_CLASSES))
    return dha.begin(args, data, CPU), data, args


def step(s, data, args, i, side=32):
    """Step i, on its own 8 images, of which every pixel or every second is taken: mean loss and accuracy."""
    part = slice(8 * i, 8 * i + 8)
    return dha.train_step(s, data.train_images[part, :, :: 32 // side, :: 32 // side], data.train_labels[part], args)


def move_b(net, scale=0.3):
    """A b from elsewhere, and the support that it has."""
    with torch.no_grad():
        for b in net.b:
            b.normal_(0, scale)
    return net.set_alpha(net.decode())


def freeze_all(s):
    """What the end of the search does."""
    args = dha.parse_args([*TINY])
    dha.decode_and_freeze(s, args, 32, final=True)
    return s.net


# -------- Flags ------------------------------------------------------------------------------------------------------

PRINTED = ("printed", [0.02, 0.05], [1e-8, 1e-6], [0.001, 0.05], [1e-4, 5e-4])
SCALE_FREE = ("scale-free", [0.001], [10.0], [1e-4, 0.1], [1e-4, 1e-2])
UPDATES = {
    "": PRINTED, "--preset scale-free": SCALE_FREE, "--updates=scale-free": SCALE_FREE,
    "--preset quick": ("scale-free", [0.04], *SCALE_FREE[2:]), "--preset quick --updates printed": PRINTED,
    "--preset imagenet": (*SCALE_FREE[:4], [1e-5, 1e-2]),
    "--preset scale-free --updates printed --tau-lr 1 --beta 2 3": ("printed", [1.0], [2.0, 3.0], *PRINTED[3:]),
}  # fmt: skip


@pytest.mark.parametrize("flags", UPDATES)
def test_each_preset_has_its_updates_and_their_step_sizes(flags):
    args = dha.parse_args(flags.split())
    assert (args.updates, args.tau_lr, args.beta, args.lr_range, args.wd_range) == UPDATES[flags]


def test_cells_have_a_limit_unless_one_is_given_or_the_architecture_is():
    found = []
    for flags in ("", "--preset quick", "--preset imagenet", "--space mobilenet"):
        args = dha.parse_args(flags.split())
        found.append((args.max_params, args.max_flops))
    assert found == [(3_700_000, 0), (3_700_000, 0), (0, 600_000_000), (0, 0)]
    s, _, _ = tiny("--genotype", "DARTS_V2", "--max-params", "1")
    assert s.net.genotype() == common.GENOTYPES["DARTS_V2"] and common.count_parameters(s.net) > 1


# -------- The loop ---------------------------------------------------------------------------------------------------


def loop(tmp_path, monkeypatch, train_step, *flags, count=16):
    """A run with a step of one's own on every batch: its records, and what was learned."""
    ended = []
    data = common.Data(*common.shapes(count, 1), *common.shapes(20, 2), list(common.SHAPE_CLASSES))
    monkeypatch.setattr(common, "load_data", lambda *given: data)
    monkeypatch.setattr(dha, "train_step", lambda s, images, *rest: train_step(s, images) or torch.zeros(2))
    monkeypatch.setattr(dha, "save_dha", lambda s, args, data, history: ended.extend([history, s]))
    dha.run_dha(dha.parse_args([*TINY, "--out", str(tmp_path / "run"), *flags]), CPU)
    return ended


def phases(history):
    return [record["phase"] for record in history]


def test_an_epochs_record_names_the_support_that_it_trained_with(tmp_path, monkeypatch):
    trained = []

    def train_step(s, images):
        trained.append(s.net.support)
        if len(trained) % 2 == 0 and not all(s.net.frozen):  # two steps an epoch
            for b in s.net.b:
                b.data.normal_(0, 0.3)

    history, s = loop(tmp_path, monkeypatch, train_step, "--search-epochs", "3", "--train-epochs", "2")
    supports = [record["support"] for record in history]
    assert supports == trained[::2] == trained[1::2] and phases(history) == ["search"] * 3 + ["train"] * 2
    assert supports[0] != supports[1] != supports[2]  # the decoding changed it in between
    assert supports[2:] == [s.net.support] * 3  # fixed as it was last trained
    assert [len(record.get("distances") or []) for record in history] == [8, 8, 0, 0, 0]


@pytest.mark.parametrize("zero", [False, True])
def test_the_search_ends_when_all_nodes_are_frozen_but_one_without_alpha_is_not(zero, tmp_path, monkeypatch):
    def train_step(s, images):
        if zero and not all(s.net.frozen):
            s.net.b[3].data.zero_()  # alpha is 0, and does not move; the others' does not either

    history, s = loop(tmp_path, monkeypatch, train_step, "--search-epochs", "3", "--train-epochs", "1")
    assert [record["frozen"] for record in history] == ([0, 7, 7, 8] if zero else [0, 8])
    assert phases(history) == ["search"] * (3 if zero else 1) + ["train"] and all(s.net.frozen)


@pytest.mark.parametrize("flags", [[], ["--no-hpo"]], ids=["eq3", "cosine"])
def test_every_batch_is_drawn_from_all_images_and_no_image_twice_for_it(flags, tmp_path, monkeypatch):
    """With Eq. (3) and without it, so that --no-hpo changes one thing."""
    monkeypatch.setattr(common, "random_crop_flip", lambda images: images)
    seen = []
    short = ["--search-epochs", "1", "--train-epochs", "0", *flags]
    loop(tmp_path, monkeypatch, lambda s, images: seen.append(images), *short, count=64)
    assert [len(torch.unique(images, dim=0)) for images in seen] == [8] * 8
    assert len(torch.unique(torch.cat(seen), dim=0)) < 64


def test_a_data_set_that_is_smaller_than_a_batch_is_one_batch(tmp_path, monkeypatch):
    sizes = []
    flags = ["--batch-size", "64", "--search-epochs", "3", "--train-epochs", "2"]
    history, s = loop(tmp_path, monkeypatch, lambda s, images: sizes.append(len(images)), *flags, count=50)
    assert sizes == [50] * len(history) and s.steps == 5


def test_lr_with_warm_up_and_a_cosine_and_drop_path_that_rises(tmp_path, monkeypatch):
    seen = []
    flags = "--no-hpo --lr 0.8 --warmup-epochs 2 --drop-path 0.2 --genotype DARTS_V2 --train-epochs 4 --no-da".split()
    loop(tmp_path, monkeypatch, lambda s, x: seen.append((float(s.eta.lr), float(s.net.drop_path_prob))), *flags)
    assert [lr for lr, _ in seen[::2]] == pytest.approx([0.4, 0.8, 0.8 * 0.52, 0.8 * (0.04 + 0.96 * 0.1464466)])
    assert [p for _, p in seen[::2]] == pytest.approx([0, 0.05, 0.1, 0.15]) and seen[::2] == seen[1::2]


# -------- A state goes on bit for bit --------------------------------------------------------------------------------

KINDS = [("some frozen", "printed"), ("all frozen", "scale-free"), ("given", "printed"), ("mobilenet", "scale-free")]


@pytest.mark.parametrize("kind, updates", KINDS)
def test_state_goes_on_bit_for_bit(kind, updates, tmp_path):
    flags = {"given": ["--genotype", "DARTS_V2"], "mobilenet": ["--space", "mobilenet", "--layers", "6"]}.get(kind, [])

    def go_on(s):
        torch.manual_seed(9)
        measured = [step(s, data, args, i) for i in range(2)]
        moved = s.net.set_alpha(s.net.decode()) if not all(s.net.frozen) else []
        return measured + [step(s, data, args, i) for i in range(2)], moved

    s, data, args = tiny(*flags, "--updates", updates)
    for i in range(2):
        step(s, data, args, i)
    if kind == "all frozen":
        freeze_all(s)
    elif kind != "given":
        s.net.freeze(2), s.net.freeze(5)
        s.collect_theta()
        move_b(s.net)
    for i in range(2):
        step(s, data, args, i)
    torch.save(s.state_dict(), tmp_path / "state.pt")
    other, _, _ = tiny(*flags, "--updates", updates, "--seed", "7")  # another A, b and theta
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    (mine, moved), (theirs, moved_too) = go_on(s), go_on(other)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs)) and moved == moved_too
    assert other.net.support == s.net.support and other.net.frozen == s.net.frozen
    assert len(other.theta) == len(s.theta) and set(other.theta) == set(other.net.parameters()) - set(other.net.b)
    for a, b in zip(s.net.state_dict().values(), other.net.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(s.tau, other.tau) and torch.equal(s.eta.values, other.eta.values)
    assert s.previous_lr == other.previous_lr


# -------- One graph, no waiting, on a GPU ----------------------------------------------------------------------------


@pytest.fixture
def one_graph(monkeypatch):
    """torch.compile, without a C++ compiler, must make one graph in the whole test."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    yield
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


@pytest.mark.slow
def test_compile_makes_one_graph_of_the_pruned_network(one_graph, tmp_path, monkeypatch):
    """In a run, whose drop-path rises in five epochs; it is evaluated in between."""
    real, compiled = dha.train_step, []

    def train_step(s, images):
        compiled.append(s.model is not s.net)
        real(s, images, torch.arange(8), args)

    flags = "--compile --drop-path 0.3 --auxiliary-weight 0.4 --search-epochs 1 --train-epochs 5".split()
    args = dha.parse_args([*TINY, *flags])
    _, s = loop(tmp_path, monkeypatch, train_step, *flags)
    assert compiled == [False] * 2 + [True] * 10 and s.net.drop_path_prob.item() == pytest.approx(0.24)


@pytest.mark.slow
def test_compile_makes_one_graph_of_a_genotypes_network(one_graph):
    net = common.Network(common.GENOTYPES["DARTS_V2"], 10, channels=4, layers=3)
    compiled, x = torch.compile(net), torch.randn(8, 3, 16, 16)
    for epoch in range(5):
        net.drop_path_prob = torch.tensor(0.1 * epoch)
        found = []
        for model in (net, compiled):
            torch.manual_seed(epoch)
            net.zero_grad()
            loss = F.cross_entropy(model(x), torch.arange(8))
            loss.backward()
            found.append([loss.detach(), *[p.grad for p in net.parameters()]])
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


class Waits(TorchDispatchMode):
    """Notes what makes a GPU wait though pretended tensors do not show it: copies from device to device, and
    multinomial, which looks at its input on the host, except where it draws several numbers with replacement."""

    def __init__(self):
        super().__init__()
        self.seen = []
        self.unbound = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        devices = {t.device.type for t in [*args, out] if isinstance(t, torch.Tensor) and t.dim() > 0}
        checked = func is torch.ops.aten.multinomial.default and not (args[1] > 1 and args[2:3] == (True,))
        if len(devices) > 1 or checked:
            self.seen.append(str(func))
        self.unbound += func is torch.ops.aten.unbind.int
        return out


@pretends_cuda
@pytest.mark.parametrize("updates", ["printed", "scale-free"])
def test_a_step_on_cuda_never_waits_for_the_host(updates, monkeypatch):
    """On pretended CUDA tensors, which have no values: whatever needs one on the host raises."""
    args = dha.parse_args([*TINY, "--updates", updates, "--cutout", "16", "--auxiliary-weight", "0.4"])
    support = dha.to_support(common.GENOTYPES["DARTS_V2"])
    monkeypatch.setattr(dha.SparseSupernet, "decode", lambda net: None)
    monkeypatch.setattr(dha.SparseSupernet, "set_alpha", lambda net, alpha: setattr(net, "support", support))
    images, labels = torch.zeros(8, 3, 32, 32, dtype=torch.uint8), torch.zeros(8, dtype=torch.long)
    data, calls = common.Data(images, labels, images, labels, list(common.SHAPE_CLASSES)), []

    def backward(loss):  # autograd's own engine wants a real device
        calls.append(loss.device.type)
        for p in [*s.theta[:8], *s.net.b, s.tau]:
            p.grad = torch.empty_like(p)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(torch.nn.Module, "to", lambda net, *where, **how: net)  # pretended weights cannot move
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            s = dha.Learned(args, data, torch.device("cuda"))
        s.net.freeze(2)
        s.collect_theta()
        s.net.drop_path_prob = torch.empty((), device="cuda")
        s.velocity = {p: torch.empty_like(p) for p in s.theta[4:12]}  # what ran in the step before
        batch = images.cuda(), labels.cuda()
        with Waits() as waits:
            measured = dha.train_step(s, *batch, args)
        assert measured.device.type == "cuda" and calls == ["cuda"] * 2 and waits.seen == []
        assert waits.unbound == 8  # a node's strengths at once, not one index after another
        with pytest.raises(Exception, match="local_scalar"):
            float(measured.sum())  # the pretended device does notice


@needs_a_gpu
@pytest.mark.parametrize("updates", ["printed", "scale-free"])
def test_steps_on_a_gpu_are_those_on_a_cpu(updates, exact):
    s, data, args = tiny("--updates", updates)
    there = dha.Learned(args, data, torch.device("cuda"))
    there.load_state_dict(copy.deepcopy(s.state_dict()))
    found = []
    for learned, batches in ((s, data), (there, data.to("cuda"))):
        torch.manual_seed(1)
        found.append(torch.stack([step(learned, batches, args, i) for i in range(3)]).cpu())
    torch.testing.assert_close(*found, **exact)
    moved = there.net.state_dict()
    for name, value in s.net.state_dict().items():
        torch.testing.assert_close(moved[name].cpu(), value, **exact, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(there.tau.detach().cpu(), s.tau.detach(), **exact)
    torch.testing.assert_close(there.eta.values.cpu(), s.eta.values, **exact)
    torch.testing.assert_close(there.net.decode().cpu(), s.net.decode(), **exact)
