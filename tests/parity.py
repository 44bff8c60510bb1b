"""The public code of DARTS, ISTA-NAS and DHA beside ours: the same weights and images, in float64 on a CPU.

    git clone https://github.com/quark0/darts
    git clone https://github.com/iboing/ISTA-NAS
    git clone https://github.com/gitkaichenzhou/DHA
    python tests/parity.py --darts darts --ista ISTA-NAS --dha DHA      # or some of them; a minute

Their files are run as they are, and nothing of them is contained here. Each line gives the largest difference between
our numbers and theirs, relative to the largest number. Rounding makes 1e-15, and every step of a training multiplies
it. A line above 1e-9 ends in DIFFERS, and the exit code is 1. Drop-path is off, because it is random.

Of DHA compared are the updates, not the network: with one class of network and the same batches and pairs, its code
moves the weights, tau, lr and wd with the step sizes of its configuration, and dha.train_step with its default ones.
"""

import argparse
import contextlib
import copy
import hashlib
import importlib
import json
import sys
import types
import warnings
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
CONFIGURATION = "cifar100_ista_single_doal.json"  # of DHA's code: the whole method in one stage
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
    theirs = their_class(channels, classes, cells, proj_dims=ours.code, auxiliary=True)
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
        columns = [len(ours.ops) * ours.state_counts[k] for k in nodes]
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
    yield "strengths", [ours.strengths(k) for k in range(len(ours.b))], [strengths[strengths != 0]]
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


class TheirUpdates:
    """Our network, weights, tau and data, moved by DHA's code as its trainer, searchmanager_darts.py, calls it.

    hpo_da: their module. settings: their configuration. tau_lr, beta: step sizes of tau, and of lr and wd.

    Two accidents of SGD_STEP concern the gradient of wd alone, and are kept out:
    - The first step makes v a constant, and wd has no gradient. Here v exists and is 0: the same step, with a gradient.
    - It writes theta+ over theta, of which autograd still needs the old value. Autograd notices nothing, as .data hides
      the writing, and the gradient of wd becomes -lr g theta+, not -lr g theta. Here autograd saves copies.
    """

    def __init__(self, hpo_da: types.ModuleType, settings: dict, tau_lr: float, beta: float, ours: dha.Learned):
        self.mean = ours.mean
        self.std = ours.std
        self.net = copy.deepcopy(ours.net)
        self.named_weights = [pair for pair in self.net.named_parameters() if not pair[0].startswith("b.")]
        self.weights = [weight for _, weight in self.named_weights]
        self.momentum = settings["train"]["w_momentum"]
        self.clip = settings["train"]["w_grad_clip"]

        # lr and wd start in the middle of their ranges: these are our defaults
        self.hpo = hpo_da.HPO_INIT(settings["hpo"], "cpu")
        self.da = hpo_da.DA_INIT(settings["da"], "cpu")
        self.lr = self.hpo.learning.module
        self.wd = self.hpo.weight_decay.module
        self.tau = self.da.policy_alpha.module
        self.tau.data.copy_(ours.tau)
        self.eta_optimizer = their_sgd([self.lr, self.wd], beta, settings["hpo"], "h")
        self.tau_optimizer = their_sgd([self.tau], tau_lr, settings["da"], "d")
        for weight in self.weights:
            self.hpo.state[weight]["momentum_buffer"] = torch.zeros_like(weight)

    def losses(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.net(x), labels, reduction="none")

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """The counterpart of dha.train_step. Returns the mean loss."""
        pairs = dha.sample_pairs(self.tau, len(images))
        x = common.normalize(dha.apply_pairs(images / 255, pairs), self.mean, self.std)

        # Eq. (3). The weights are a function of lr and wd, that of the previous step. (Before the first step they are
        # not: there is no gradient, and nothing moves.) Their trainer does this at the end of an iteration, with a
        # batch from a second loader; here it is the next batch, as in ours
        self.eta_optimizer.zero_grad()
        self.losses(x, labels).mean().backward()
        self.eta_optimizer.step()
        self.hpo.limited()
        self.hpo.reset_model(self.weights)

        # Eq. (2). Their trainer gives prob_loss minus the losses, as constants
        losses = self.losses(x, labels)
        operations = len(self.tau)
        choices = torch.stack([pairs // operations, pairs % operations], 1)  # (B, 2)
        one_hot = F.one_hot(choices, operations).mT  # (B, 14, 2)
        self.tau_optimizer.zero_grad()
        self.da.prob_loss(-losses.detach(), one_hot).backward()
        self.tau_optimizer.step()

        # The weights. Both sides clip the gradient here, and neither does in Eq. (3)
        self.hpo.zero_grad(self.weights)
        losses.mean().backward()
        nn.utils.clip_grad_norm_(self.weights, self.clip)
        saves_copies = torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda saved: saved)
        with saves_copies, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its add_(number, tensor) is deprecated
            self.hpo.SGD_STEP(self.named_weights, self.momentum)
        return losses.mean()


def their_sgd(tensors: list[Tensor], lr: float, settings: dict, prefix: str) -> torch.optim.SGD:
    """SGD as their trainer makes it, with <prefix>_momentum and so on."""
    return torch.optim.SGD(
        tensors,
        lr,
        momentum=settings[f"{prefix}_momentum"],
        nesterov=settings[f"{prefix}_nesterov"],
        weight_decay=settings[f"{prefix}_weight_decay"],
    )


def compare_updates(
    hpo_da: types.ModuleType, settings: dict, tau_lr: float, beta: float, searching: bool, *flags: str
) -> Iterator[Line]:
    """Steps of dha.train_step. flags: of ours, whose step sizes and ranges are the default ones otherwise.

    While searching, b stands still: their file does not contain its update.
    """
    channels, classes, cells = SIZE
    sizes = ["--channels", str(channels), "--layers", str(cells), "--auxiliary-weight", "0", "--cutout", "0"]
    of_b = ["--b-scale", "0.1", "--arch-lr", "0"]
    args = dha.parse_args(["--updates", "printed", "--out", "nothing", *sizes, *of_b, *flags])
    images = torch.randint(256, (STEPS, 8, 3, 16, 16), dtype=torch.uint8)
    labels = torch.randint(classes, (STEPS, 8))
    names = [str(n) for n in range(classes)]
    data = common.Data(images.flatten(0, 1), labels.flatten(), images[0], labels[0], names)
    support = None if searching else dha.to_support(common.GENOTYPES["DARTS_V2"])
    ours = dha.Learned(args, data, torch.device("cpu"), support)
    nn.init.normal_(ours.tau)
    theirs = TheirUpdates(hpo_da, settings, tau_lr, beta, ours)

    # One seed per step: from the same tau both sides draw the same pairs and magnitudes
    our_numbers = []
    their_numbers = []
    for step in range(STEPS):
        torch.manual_seed(step)
        our_loss, _ = dha.train_step(ours, images[step], labels[step], args)
        our_numbers.append(torch.stack([our_loss, ours.eta.lr, ours.eta.wd]))
        torch.manual_seed(step)
        their_loss = theirs.step(images[step], labels[step])
        their_numbers.append(torch.stack([their_loss, theirs.lr, theirs.wd]).detach())

    our_losses, our_lr, our_wd = torch.stack(our_numbers).T  # (STEPS,) each
    their_losses, their_lr, their_wd = torch.stack(their_numbers).T
    yield f"losses of {STEPS} steps", [our_losses], [their_losses]
    yield "weights after them", ours.theta, theirs.weights
    yield "tau after them", [ours.tau], [theirs.tau]
    yield f"lr, which moved by {spread(their_lr):.0e}", [our_lr], [their_lr]
    yield f"wd, which moved by {spread(their_wd):.0e}", [our_wd], [their_wd]


def spread(numbers: Tensor) -> float:
    return float(numbers.max() - numbers.min())


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------


def checkout(*files: str):
    """A `type` for argparse: a folder that holds these files somewhere."""

    def folder(path: str) -> Path:
        for file in files:
            if not list(Path(path).rglob(file)):
                raise argparse.ArgumentTypeError(f"{path} is no such checkout: it has no {file}")
        return Path(path).resolve()

    return folder


def version(folder: Path) -> str:
    """A hash of the Python files."""
    content = b"".join(path.read_bytes() for path in sorted(folder.rglob("*.py")))
    return f"SHA-256 of the .py files {hashlib.sha256(content).hexdigest()[:12]}"


def largest_difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Relative to the largest number; NaN where a number is NaN."""
    a = torch.cat([tensor.detach().flatten() for tensor in ours])
    b = torch.cat([tensor.detach().flatten() for tensor in theirs])
    return float((a - b).abs().max() / b.abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--darts", type=checkout("operations.py"), metavar="PATH", help="checkout of quark0/darts")
    parser.add_argument("--ista", type=checkout("ista_nas_single"), metavar="PATH", help="checkout of iboing/ISTA-NAS")
    parser.add_argument("--dha", type=checkout("hpo_da.py", CONFIGURATION), metavar="PATH", help="gitkaichenzhou/DHA")
    args = parser.parse_args()
    if not (args.darts or args.ista or args.dha):
        parser.error("give --darts, --ista or --dha, or several")

    print("torch", torch.__version__)
    tables = {}
    if args.darts:
        cnn = next(args.darts.rglob("operations.py")).parent
        print("quark0/darts", version(cnn))
        search, model, genotypes = import_from(cnn, "model_search", "model", "genotypes")
        v2 = genotypes.DARTS_V2
        tables["search network"] = compare_search(search.Network)
        tables["CIFAR network"] = compare_training(model.NetworkCIFAR, "cifar", 32, (36, 10, 20), v2)
        tables["ImageNet network"] = compare_training(model.NetworkImageNet, "imagenet", 224, (48, 1000, 14), v2)
    if args.ista:
        print("iboing/ISTA-NAS", version(args.ista))
        names = ("ista_nas_single.search.models.model_search", "ista_nas_single.trainer")
        search, trainer = import_from(args.ista, *names)
        tables["ISTA-NAS"] = compare_sparse(search.NetWork, trainer.Trainer.sample_and_proj)
    if args.dha:
        print("gitkaichenzhou/DHA", version(args.dha))
        print("    without its two accidents in the gradient of wd: see TheirUpdates in this file")
        (hpo_da,) = import_from(args.dha, "model.hpo_da")
        settings = json.loads(next(args.dha.rglob(CONFIGURATION)).read_text())
        da, hpo = settings["da"], settings["hpo"]
        afterwards = da["d_lr_tune"], hpo["h_lr_tune"]
        larger = "--tau-lr", "5", "--beta", "1e-3"
        tables["DHA, search"] = compare_updates(hpo_da, settings, da["d_lr"], hpo["h_lr"], True)
        tables["DHA, afterwards"] = compare_updates(hpo_da, settings, *afterwards, False)
        tables["DHA, larger steps"] = compare_updates(hpo_da, settings, 5.0, 1e-3, False, *larger)

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
