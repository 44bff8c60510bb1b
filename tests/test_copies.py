"""Copies in the two methods are the same to the letter, the baseline copies nothing, and parts can be taken out.

The oracle is the text of the scripts, and of a part of them alone.
"""

import ast
import inspect
import sys
from pathlib import Path
from types import ModuleType

import pytest

import baseline_sequential as baseline
import dha
import joint_darts_faa as joint

OWN = {"main", "parse_args", "PRESETS", "AUGMENTATIONS"}  # each script's own; AUGMENTATIONS is the list of its method
LIBRARIES = {"common", "torch", "torchvision", "numpy", "tqdm", "matplotlib"}


def definitions(script: ModuleType) -> dict[str, str]:
    """Every top-level function, class and constant: its text."""
    lines, found = Path(script.__file__).read_text().splitlines(), {}
    for node in ast.parse("\n".join(lines)).body:
        names, first = [], node.lineno
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names = [node.name]
            first = min([first, *(decorator.lineno for decorator in node.decorator_list)])
        elif isinstance(node, ast.Assign):
            names = [n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)]
        for name in names:
            found[name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


def test_copies_are_the_same():
    """Make a definition of one name the same in both, or give one another name."""
    first, second = definitions(joint), definitions(dha)
    both = first.keys() & second.keys() - OWN
    assert len(both) > 30 and [name for name in sorted(both) if first[name] != second[name]] == []


def test_the_baseline_copies_nothing():
    methods = definitions(joint).keys() | definitions(dha).keys()
    assert definitions(baseline).keys() & methods <= OWN


@pytest.mark.parametrize("script, more", [(joint, set()), (dha, set()), (baseline, {"joint_darts_faa", "dha"})])
def test_scripts_import_common_and_a_few_libraries(script, more):
    for node in ast.walk(ast.parse(inspect.getsource(script))):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            modules = ["." * node.level + (node.module or "")]
        assert {module.split(".")[0] for module in modules} <= LIBRARIES | more | sys.stdlib_module_names, node.lineno


PARTS = [  # the script, what is taken, and a use of it
    (dha, "hypergradient", "assert hypergradient([torch.ones(2)], [torch.ones(2)], [torch.ones(2)], 0.1)[0] == -2"),
    (dha, "soft_threshold active_set_step ista", "assert ista(torch.rand(3, 7, 14), torch.rand(3, 7), 1e-3).any()"),
    (joint, "into_range pixel_centers sample_at rotate", "assert rotate(torch.ones(2, 3, 8, 8), torch.ones(2)).any()"),
    (joint, "Policy relaxed_bernoulli augment apply_each", """
policy, images = Policy(2, 1), torch.rand(4, 3, 8, 8)
policy(images).sum().backward()
assert policy.z.grad.any() and augment(images, policy).shape == images.shape"""),
    (joint, "Beginnings rest_of_operation MixedOp", """
alpha = torch.zeros(8, requires_grad=True)
MixedOp(4, 1)(torch.rand(2, 4, 8, 8), alpha).square().sum().backward()
assert alpha.grad.any()"""),
]  # fmt: skip


@pytest.mark.parametrize("script, parts, use", PARTS, ids=[parts.split()[-1] for _, parts, _ in PARTS])
def test_a_part_can_be_taken_out(script, parts, use):
    """Into a module of its own, with PyTorch; the policy with the augmentations, the mixed operation with common.py."""
    text = "import torch, math, torch.nn as nn, torch.nn.functional as F; from torch import Tensor\n"
    if "MixedOp" in parts:
        text += "import common; from common import PRIMITIVES\n"
    if "Policy" in parts:
        whole = inspect.getsource(joint)
        text += whole[whole.index("def per_image") : whole.index("def apply_each")]
    for part in parts.split():
        text += inspect.getsource(getattr(script, part))
    exec(text + use, vars(ModuleType("taken_out")))
