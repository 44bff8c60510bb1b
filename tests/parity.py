"""The public code of DARTS and of ISTA-NAS beside ours: the same weights and images, in float64 on a CPU.

    git clone https://github.com/quark0/darts
    git clone https://github.com/iboing/ISTA-NAS
    python tests/parity.py --darts darts --ista ISTA-NAS      # or one of the two; a minute

Their files are run as they are, and nothing of them is contained here. Each line gives the largest difference between
our numbers and theirs, relative to the largest number. Rounding makes 1e-15, and every step of a training multiplies
it. A line above 1e-9 ends in DIFFERS, and the exit code is 1. Drop-path is off, because it is random.
"""

import argparse
import contextlib
import hashlib
import importlib
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
import common
import dha
import joint_darts_faa as joint

LIMIT = 1e-9
SIZE = (4, 10, 5)  # channels, classes, cells
STEPS = 20  # of SGD
Line = tuple[str, list[Tensor], list[Tensor]]  # of the table: what it is, our numbers, theirs


def import_from(folder: Path, *names: str) -> list[types.ModuleType]:
    """Import modules from `folder`. Their names are free afterwards: both projects have "operations"."""
    sys.dont_write_bytecode = True  # nothing is written there
    solver = types.ModuleType("cvxpy")  # ISTA-NAS decodes with it; here alpha is given
    with mock.patch.object(sys, "path", [str(folder), *sys.path]), mock.patch.dict(sys.modules, cvxpy=solver):
        return [importlib.import_module(name) for name in names]


@contextlib.contextmanager
def float64_on_cpu() -> Iterator[None]:
    """In this context "cuda" means the CPU, and float means float64."""
    randn = torch.randn
    with (
        mock.patch.object(Tensor, "cuda", lambda self: self),
        mock.patch.object(nn.Module, "cuda", lambda self: self),
        mock.patch.object(Tensor, "float", Tensor.double),
        mock.patch.object(torch, "randn", lambda *size, device=None: randn(*size)),
    ):
        torch.set_default_dtype(torch.float64)
        yield
    torch.set_default_dtype(torch.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Two networks with the same weights
# ---------------------------------------------------------------------------------------------------------------------


def layers(*modules: nn.Module) -> list[nn.Module]:
    """The convolutions, batch norms and linear layers in `modules`, in order."""
    kinds = (nn.Conv2d, nn.BatchNorm2d, nn.Linear)
    return [layer for layer in nn.ModuleList(modules).modules() if isinstance(layer, kinds)]


def has_weights(layer: nn.Module) -> bool:
    return isinstance(layer.weight, nn.Parameter)


def copy_weights(ours: list[nn.Module], theirs: list[nn.Module]) -> None:
    """Give their layers our weights."""
    if [layer.weight.shape for layer in ours] != [layer.weight.shape for layer in theirs]:
        sys.exit("DIFFERS: the next network of the table has other layers than theirs, or in another order")
    for our_layer, their_layer in zip(ours, theirs):
        # All batch norms begin with weight 1 and bias 0: a wrong pair could go unnoticed
        if isinstance(our_layer, nn.BatchNorm2d) and has_weights(our_layer):
            nn.init.uniform_(our_layer.weight, 0.5, 1.5)
            nn.init.normal_(our_layer.bias, std=0.1)
        their_layer.load_state_dict(our_layer.state_dict())


def weights(layers: list[nn.Module]) -> list[Tensor]:
    """Weights and biases."""
    both = [layer.weight for layer in layers] + [layer.bias for layer in layers]
    return [tensor for tensor in both if tensor is not None]


def gradients(tensors: list[Tensor]) -> list[Tensor]:
    """Their gradients; 0 for what did not run."""
    found = []
    for tensor in tensors:
        found.append(torch.zeros_like(tensor) if tensor.grad is None else tensor.grad)
    return found


def batch(pixels: int = 32) -> tuple[Tensor, Tensor]:
    """Eight random images, and labels."""
    return torch.randn(8, 3, pixels, pixels), torch.randint(SIZE[1], (8,))


def backward(labels: Tensor, logits: Tensor, auxiliary_logits: Tensor | None = None) -> Tensor:
    """The loss, whose gradients it computes."""
    loss = F.cross_entropy(logits, labels)
    if auxiliary_logits is not None:
        loss = loss + 0.4 * F.cross_entropy(auxiliary_logits, labels)
    loss.backward()
    return loss


@torch.no_grad()
def in_eval_mode(ours: nn.Module, theirs: nn.Module, *inputs) -> tuple[list[Tensor], list[Tensor]]:
    """Logits, with the means and variances that training left. inputs: of theirs; the first, the images, is ours."""
    their_logits, _ = theirs.eval()(*inputs)
    return [ours.eval()(inputs[0])], [their_logits]


# ---------------------------------------------------------------------------------------------------------------------
# The comparisons
# ---------------------------------------------------------------------------------------------------------------------


def compare_search(their_class: type) -> Iterator[Line]:
    """The search network of DARTS. Batch norms without weights are left out: ours are fewer (shared pools)."""
    channels, classes, cells = SIZE
    ours = joint.DartsSupernet(channels, classes, cells)
    theirs = their_class(channels, classes, cells, F.cross_entropy)
    our_layers = list(filter(has_weights, layers(ours)))
    their_layers = list(filter(has_weights, layers(theirs)))
    copy_weights(our_layers, their_layers)
    for our_alpha, their_alpha in zip(ours.alphas(), theirs.arch_parameters()):
        nn.init.normal_(our_alpha)
        their_alpha.data.copy_(our_alpha)

    images, labels = batch()
    our_logits = ours(images)
    their_logits = theirs(images)
    our_loss = backward(labels, our_logits)
    their_loss = backward(labels, their_logits)
    yield "logits", [our_logits], [their_logits]
    yield "loss", [our_loss], [their_loss]
    yield "gradients of alpha", gradients(ours.alphas()), gradients(theirs.arch_parameters())
    yield "gradients of the weights", gradients(weights(our_layers)), gradients(weights(their_layers))


def compare_training(
    their_class: type, stem: str, pixels: int, published: tuple[int, int, int], their_v2: tuple
) -> Iterator[Line]:
    """The network of a genotype. published: channels, classes and cells with which DARTS trains DARTS_V2."""
    # A small one, whose cells have every operation, in the reduction cell with stride 2
    names = [*common.PRIMITIVES[1:], "skip_connect"]
    normal = [(name, i % (i // 2 + 2)) for i, name in enumerate(names)]
    reduce = [(name, i % 2) for i, name in enumerate(names)]
    every_operation = common.Genotype(normal, [2, 3, 4, 5], reduce, [2, 3, 4, 5])
    channels, classes, cells = SIZE
    ours = common.Network(every_operation, classes, channels, cells, auxiliary=True, stem=stem)
    with contextlib.redirect_stdout(None):  # it prints its channels
        theirs = their_class(channels, classes, cells, True, every_operation)
    theirs.drop_path_prob = 0.0
    copy_weights(layers(ours), layers(theirs))

    images, labels = batch(pixels)
    our_output = ours(images)
    their_output = theirs(images)
    backward(labels, *our_output)
    backward(labels, *their_output)
    yield "logits", [our_output[0]], [their_output[0]]
    yield "auxiliary logits", [our_output[1]], [their_output[1]]
    yield "gradients of the weights", gradients(weights(layers(ours))), gradients(weights(layers(theirs)))
    yield "logits in eval mode", *in_eval_mode(ours, theirs, images)

    # The published one is only counted, without the auxiliary head
    channels, classes, cells = published
    with torch.device("meta"), contextlib.redirect_stdout(None):
        ours = common.Network(common.GENOTYPES["DARTS_V2"], classes, channels, cells, stem=stem)
        theirs = their_class(channels, classes, cells, False, their_v2)
    count = common.count_parameters(ours)
    their_count = common.count_parameters(theirs)
    name = f"parameters of DARTS_V2, C={channels} L={cells}: {count:,}"
    yield name, [torch.tensor(float(count))], [torch.tensor(float(their_count))]


def compare_sparse(their_class: type, prepare) -> Iterator[Line]:
    """The one-stage supernet of ISTA-NAS: a step of the search, and the training after all nodes froze.

    prepare: what their trainer does with A and alpha before an epoch.
    """
    channels, classes, cells = SIZE
    ours = dha.SparseSupernet(channels, classes, cells, auxiliary=True)
    theirs = their_class(channels, classes, cells, proj_dims=dha.CODE, auxiliary=True)
    theirs.drop_path_prob = 0.0
    our_layers = layers(ours)
    their_layers = layers(theirs.stem, theirs.cells, theirs.auxiliary_head, theirs.classifier)
    copy_weights(our_layers, their_layers)

    # They keep a node's two largest |alpha|, we those of two different states. Draw b until that is the same
    for k, b in enumerate(ours.b):
        states = torch.zeros(0)
        while len(states) < ours.kept:
            nn.init.normal_(b, std=0.1)
            alpha = dha.ista(ours.A[k], b, dha.LASSO)
            states = torch.unique(alpha.abs().topk(ours.kept).indices // len(ours.ops))
        theirs.arch_parameters()[k].data.copy_(b)
    ours.set_alpha(ours.decode())

    # A and alpha for each kind of cell, without the columns of candidates that a node does not have
    settings = types.SimpleNamespace(steps=dha.NODES, sparseness=ours.kept, num_ops=len(ours.ops))
    prepared = []
    for first in (0, dha.NODES):
        nodes = range(first, first + dha.NODES)
        columns = [len(ours.ops) * ours.states[k] for k in nodes]
        A = [ours.A[k, :, :n] for k, n in zip(nodes, columns)]
        alpha = [ours.alpha[k, :n].numpy() for k, n in zip(nodes, columns)]
        prepared.append(prepare(settings, A, alpha))
    (A_normal, bias_normal), (A_reduce, bias_reduce) = prepared
    theirs.init_proj_mat(A_normal, A_reduce)
    theirs.init_bias(bias_normal, bias_reduce)

    # The search
    images, labels = batch()
    our_loss = backward(labels, *ours(images))
    their_loss = backward(labels, *theirs(images, all_freeze=False))
    strengths = torch.cat([theirs.alphas_normal, theirs.alphas_reduce])
    yield "strengths", [ours.strength(k) for k in range(len(ours.b))], [strengths[strengths != 0]]
    yield "loss", [our_loss], [their_loss]
    yield "gradients of b", gradients(ours.b), gradients(theirs.arch_parameters())
    yield "gradients of the weights", gradients(weights(our_layers)), gradients(weights(their_layers))

    # All nodes freeze
    for k in range(len(ours.b)):
        ours.freeze(k)
    ours.prune()
    every_node = [True] * dha.NODES
    theirs.freeze_alpha(every_node, every_node)

    # SGD, each step on a new batch
    theta = list(ours.parameters())
    velocity = [torch.zeros_like(weight) for weight in theta]
    lr = torch.tensor(0.025)
    wd = torch.tensor(3e-4)
    optimizer = torch.optim.SGD(theirs.parameters(), float(lr), momentum=0.9, weight_decay=float(wd))
    our_losses = []
    their_losses = []
    for step in range(STEPS):
        images, labels = batch()
        ours.zero_grad()
        theirs.zero_grad()
        our_losses.append(backward(labels, *ours(images)))
        their_losses.append(backward(labels, *theirs(images, all_freeze=step > 0)))
        for net in (ours, theirs):
            nn.utils.clip_grad_norm_(net.parameters(), dha.GRAD_CLIP)
        dha.sgd_step(theta, gradients(theta), velocity, lr, wd)
        optimizer.step()
    yield f"losses of {STEPS} steps, all frozen", our_losses, their_losses
    yield f"weights after {STEPS} steps", weights(our_layers), weights(their_layers)
    yield f"logits after {STEPS} steps, in eval mode", *in_eval_mode(ours, theirs, images, True)


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------


def darts_folder(path: str) -> Path:
    for folder in (Path(path), Path(path, "cnn")):
        if (folder / "model_search.py").exists() and (folder / "operations.py").exists():
            return folder.resolve()
    raise argparse.ArgumentTypeError(f"{path} is neither a checkout of quark0/darts nor its folder cnn")


def ista_folder(path: str) -> Path:
    if not Path(path, "ista_nas_single", "trainer.py").exists():
        raise argparse.ArgumentTypeError(f"{path} is no checkout of iboing/ISTA-NAS: it has no ista_nas_single")
    return Path(path).resolve()


def version(folder: Path) -> str:
    """The commit of a checkout; without git, a hash of the Python files."""
    root = folder.parent if folder.name == "cnn" else folder
    if (root / ".git").exists():
        with contextlib.suppress(OSError):
            git = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True)
            if git.returncode == 0:
                return f"commit {git.stdout.strip()}"

    content = b"".join(path.read_bytes() for path in sorted(folder.rglob("*.py")))
    return f"SHA-256 of the .py files {hashlib.sha256(content).hexdigest()[:12]}"


def largest_difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Relative to the largest number; NaN where a number is NaN."""
    a = torch.cat([tensor.detach().flatten() for tensor in ours])
    b = torch.cat([tensor.detach().flatten() for tensor in theirs])
    return float((a - b).abs().max() / b.abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--darts", type=darts_folder, metavar="PATH", help="checkout of quark0/darts, or its cnn")
    parser.add_argument("--ista", type=ista_folder, metavar="PATH", help="checkout of iboing/ISTA-NAS")
    args = parser.parse_args()
    if not (args.darts or args.ista):
        parser.error("give --darts or --ista, or both")

    print("torch", torch.__version__)
    tables = {}
    if args.darts:
        print("quark0/darts", version(args.darts))
        search, model, genotypes = import_from(args.darts, "model_search", "model", "genotypes")
        v2 = genotypes.DARTS_V2
        tables["search network"] = compare_search(search.Network)
        tables["CIFAR network"] = compare_training(model.NetworkCIFAR, "cifar", 32, (36, 10, 20), v2)
        tables["ImageNet network"] = compare_training(model.NetworkImageNet, "imagenet", 224, (48, 1000, 14), v2)
    if args.ista:
        print("iboing/ISTA-NAS", version(args.ista))
        names = ("ista_nas_single.search.models.model_search", "ista_nas_single.trainer")
        search, trainer = import_from(args.ista, *names)
        tables["ISTA-NAS"] = compare_sparse(search.NetWork, trainer.Trainer.sample_and_proj)

    differs = False
    with float64_on_cpu():
        for title, lines in tables.items():
            torch.manual_seed(0)
            for name, ours, theirs in lines:
                difference = largest_difference(ours, theirs)
                mark = ""
                if not difference <= LIMIT:  # NaN is not
                    mark = "  DIFFERS"
                    differs = True
                print(f"{title}: {name}".ljust(68) + f"{difference:.1e}{mark}")
    sys.exit(int(differs))


if __name__ == "__main__":
    main()
