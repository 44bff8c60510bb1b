"""Second derivatives of the networks, which second-order methods take. Oracle: differences of the gradient, float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from common import GENOTYPES, Network
from dha import SparseSupernet
from joint_darts_faa import DartsSupernet

STEP = 1e-8  # so small that no ReLU and no maximum changes sides


class Problem:
    """A network in float64 and training: its loss on a batch, as a function of its parameters."""

    def __init__(self, kind):
        if kind == "darts":
            self.net = DartsSupernet(4, 5, 3)
        elif kind in GENOTYPES:
            self.net = Network(GENOTYPES[kind], 5, channels=4, layers=3)
        else:
            self.net = SparseSupernet(4, 5, 3, b_scale=0.3)
            self.net.freeze(2)  # its strengths are constant, its batch norms learn
        self.net.double()
        self.x = torch.randn(4, 3, 8, 8, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
        self.y = torch.tensor([0, 1, 2, 3])
        self.buffers = {name: buffer.clone() for name, buffer in self.net.named_buffers()}

        # What a gradient can be taken of: candidates that do not run have none
        named = dict(self.net.named_parameters())
        grads = torch.autograd.grad(self.loss(named), named.values(), allow_unused=True)
        self.parameters = {name: p.detach() for (name, p), g in zip(named.items(), grads) if g is not None}
        self.upper = [name for name in self.parameters if name.startswith(("alphas", "b."))]
        self.lower = [name for name in self.parameters if name not in self.upper]

    def loss(self, parameters):
        buffers = {name: buffer.clone() for name, buffer in self.buffers.items()}  # running statistics move
        return F.cross_entropy(functional_call(self.net, (parameters, buffers), self.x), self.y)

    def leaves(self, direction=None, step=0.0):
        """Leaves at parameters + step * direction."""
        direction = direction or {}
        return {name: (p + step * direction.get(name, 0.0)).requires_grad_() for name, p in self.parameters.items()}


@pytest.fixture
def problem(request):
    return Problem(request.param)


def distance(a, b):
    """|a - b| / |b|, of lists of tensors."""
    a, b = (torch.cat([tensor.flatten() for tensor in tensors]) for tensors in (a, b))
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("problem", ["darts", "sparse", "DARTS_V2", "PC_DARTS_cifar"], indirect=True)
def test_gradients_and_hessian_vector_products(problem):
    """Along the architecture's parameters, and along the weights; the gradient is torch.func's, too."""
    leaves = problem.leaves()
    first = torch.autograd.grad(problem.loss(leaves), leaves.values(), create_graph=True)
    func = torch.func.grad(problem.loss)(problem.parameters)
    torch.testing.assert_close(tuple(func.values()), first, rtol=1e-12, atol=1e-12)
    for names in filter(None, (problem.upper, problem.lower)):
        v = {name: torch.randn_like(leaves[name]) for name in names}
        along = sum((g * v[name]).sum() for name, g in zip(leaves, first) if name in v)
        product = torch.autograd.grad(along, leaves.values(), retain_graph=True)
        ends = []
        for step in (STEP, -STEP):
            moved = problem.leaves(v, step)
            ends.append(torch.autograd.grad(problem.loss(moved), moved.values()))
        differences = [(ahead - behind) / (2 * STEP) for ahead, behind in zip(*ends)]
        assert distance(product, differences) < 1e-5
