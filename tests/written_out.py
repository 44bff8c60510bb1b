"""DARTS' search network as it is commonly written: a loop over edges and operations.

The oracle of `DartsSupernet`, and the other side of its benchmark.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import PRIMITIVES

NODES = 4


def relu_conv_bn(c_in, c_out):
    conv = nn.Conv2d(c_in, c_out, 1, bias=False)
    return nn.Sequential(nn.ReLU(), conv, nn.BatchNorm2d(c_out, affine=False))


class Zero(nn.Module):
    def __init__(self, stride):
        super().__init__()
        self.stride = stride

    def forward(self, x):
        return x[:, :, :: self.stride, :: self.stride] * 0.0


class Reduce(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out // 2, 1, stride=2, bias=False)
        self.conv2 = nn.Conv2d(c_in, c_out // 2, 1, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(c_out, affine=False)

    def forward(self, x):
        x = F.relu(x)
        return self.bn(torch.cat([self.conv1(x), self.conv2(x[:, :, 1:, 1:])], 1))


def operation(name, C, stride):
    if name == "none":
        return Zero(stride)
    if name == "skip_connect":
        return nn.Identity() if stride == 1 else Reduce(C, C)
    if name.endswith("pool_3x3"):
        average = nn.AvgPool2d(3, stride, 1, count_include_pad=False)
        pool = nn.MaxPool2d(3, stride, 1) if name[0] == "m" else average
        return nn.Sequential(pool, nn.BatchNorm2d(C, affine=False))
    k, d = int(name[-1]), 2 if name.startswith("dil") else 1

    def block(stride):
        depthwise = nn.Conv2d(C, C, k, stride, (k - 1) // 2 * d, d, C, bias=False)
        return [nn.ReLU(), depthwise, nn.Conv2d(C, C, 1, bias=False), nn.BatchNorm2d(C, affine=False)]

    return nn.Sequential(*block(stride), *(block(1) if d == 1 else []))


def mixed_operation(C, stride):
    """The operations of an edge, in the order of PRIMITIVES."""
    return nn.ModuleList(operation(name, C, stride) for name in PRIMITIVES)


class Cell(nn.Module):
    def __init__(self, c_before, c_in, C, reduction, halved):
        super().__init__()
        self.preprocess0 = Reduce(c_before, C) if halved else relu_conv_bn(c_before, C)
        self.preprocess1 = relu_conv_bn(c_in, C)
        self.edges = nn.ModuleList()
        for j in range(NODES):
            for i in range(j + 2):
                self.edges.append(mixed_operation(C, stride=2 if reduction and i < 2 else 1))

    def forward(self, s0, s1, weights):
        states, offset = [self.preprocess0(s0), self.preprocess1(s1)], 0
        for _ in range(NODES):
            node = 0
            for state in states:
                node = node + sum(w * op(state) for w, op in zip(weights[offset], self.edges[offset]))
                offset += 1
            states.append(node)
        return torch.cat(states[2:], 1)


class WrittenOut(nn.Module):
    def __init__(self, C, classes, layers):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 3 * C, 3, padding=1, bias=False), nn.BatchNorm2d(3 * C))
        c_before, c_in, halved = 3 * C, 3 * C, False
        self.cells, self.reductions = nn.ModuleList(), (layers // 3, 2 * layers // 3)
        for i in range(layers):
            C = C * 2 if i in self.reductions else C
            self.cells.append(Cell(c_before, c_in, C, i in self.reductions, halved))
            c_before, c_in, halved = c_in, NODES * C, i in self.reductions
        self.classifier = nn.Linear(c_in, classes)
        self.alphas_normal = nn.Parameter(1e-3 * torch.randn(14, len(PRIMITIVES)))
        self.alphas_reduce = nn.Parameter(1e-3 * torch.randn(14, len(PRIMITIVES)))

    def forward(self, x):
        s0 = s1 = self.stem(x)
        for i, cell in enumerate(self.cells):
            alphas = self.alphas_reduce if i in self.reductions else self.alphas_normal
            s0, s1 = s1, cell(s0, s1, F.softmax(alphas, 1))
        return self.classifier(F.adaptive_avg_pool2d(s1, 1).flatten(1))


def pairs(net, fast):
    """Matching parameters of the two networks, alpha first: (this one's, DartsSupernet's)."""
    same = [(net.stem, fast.stem), (net.classifier, fast.classifier)]
    for mine, theirs in zip(net.cells, fast.cells, strict=True):
        same += [(mine.preprocess0, theirs.preprocess0), (mine.preprocess1, theirs.preprocess1)]
        for ops, edge in zip(mine.edges, theirs.edges, strict=True):
            same += zip(ops[1:], edge.ops.values(), strict=True)  # ops: of PRIMITIVES, edge.ops: of PRIMITIVES[1:]
    found = [(net.alphas_normal, fast.alphas_normal), (net.alphas_reduce, fast.alphas_reduce)]
    for a, b in same:
        found += zip(a.parameters(), b.parameters(), strict=True)
    return found
