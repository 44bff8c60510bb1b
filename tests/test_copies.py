"""Copies in the two methods are the same to the letter, the baseline copies nothing, and parts can be taken out.

The oracle is the text of the scripts, and of a part of them alone.
"""

import ast
import inspect
import sys
from pathlib import Path
from types import ModuleType

import pytest

import dha
import joint_darts_faa as joint

ROOT = Path(__file__).parent.parent
METHODS = [ROOT / name for name in ("joint_darts_faa.py", "dha.py")]
BASELINE = ROOT / "baseline_sequential.py"
OWN = {"main", "parse_args", "PRESETS", "AUGMENTATIONS"}  # each script's own; AUGMENTATIONS is the list of its method
LIBRARIES = {"common", "torch", "torchvision", "numpy", "tqdm", "matplotlib"}


def definitions(path: Path) -> dict[str, str]:
    """Every top-level function, class and constant, decorators included: its text."""
    lines = path.read_text().splitlines()
    found = {}
    for node in ast.parse(path.read_text()).body:
        first, names = node.lineno, []
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            names = [node.name]
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]
        for name in names:
            found[name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


def test_copies_are_the_same():
    """Make a definition of one name the same in both, or give one another name."""
    first, second = map(definitions, METHODS)
    both = first.keys() & second.keys() - OWN
    assert len(both) > 30
    assert [name for name in sorted(both) if first[name] != second[name]] == []


def test_the_baseline_copies_nothing():
    methods = definitions(METHODS[0]).keys() | definitions(METHODS[1]).keys()
    assert definitions(BASELINE).keys() & methods <= OWN


@pytest.mark.parametrize("path", [*METHODS, BASELINE], ids=lambda path: path.name)
def test_scripts_import_common_and_a_few_libraries(path):
    allowed = LIBRARIES | sys.stdlib_module_names
    if path == BASELINE:
        allowed |= {method.stem for method in METHODS}
    for node in ast.walk(ast.parse(path.read_text())):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = ["." * node.level + (node.module or "")]
        assert {module.split(".")[0] for module in modules} <= allowed, node.lineno


IMPORTS = "import torch, math, torch.nn as nn, torch.nn.functional as F; from torch import Tensor\n"
COMMON = "import common; from common import PRIMITIVES\n"
PARTS = {  # the script, what is taken, and a use of it
    "ista": (dha, "soft_threshold active_set_step ista", """
A, b = torch.rand(3, 7, 14), torch.randn(3, 7)
alpha = ista(A, b, 1e-3)
slope = ((b - (A @ alpha.unsqueeze(2)).squeeze(2)).unsqueeze(1) @ A).squeeze(1)
assert alpha.shape == (3, 14) and (alpha == 0).any() and slope.abs().max() < 1.01e-3
"""),
    "an augmentation": (joint, "into_range pixel_centers sample_at rotate", """
images = torch.rand(2, 3, 8, 8)
assert torch.allclose(rotate(images, torch.zeros(2)), images, atol=1e-5)
assert not torch.allclose(rotate(images, torch.ones(2)), images, atol=1e-1)
"""),
    "hypergradient": (dha, "hypergradient", """
theta, v = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.5])
d_lr, d_wd = hypergradient([2 * theta], [v], [theta], 0.1)  # of the loss |theta|^2
assert d_lr == -3.0 and abs(float(d_wd) + 0.1 * (10 + 0.1 * 3)) < 1e-6
"""),
    "the policy": (joint, "Policy relaxed_bernoulli augment apply_each", """
policy, images = Policy(2, 1), torch.rand(4, 3, 8, 8)
policy(images).sum().backward()
assert policy.z.grad.abs().sum() > 0 and augment(images, policy).shape == images.shape
"""),
    "the mixed operation": (joint, "Beginnings rest_of_operation MixedOp", """
x, alpha = torch.rand(2, 4, 8, 8), torch.zeros(8, requires_grad=True)
edge = MixedOp(4, 1)
edge(x, alpha).square().sum().backward()
assert alpha.grad.abs().min() > 0 and torch.allclose(edge(edge.begin(x), alpha), edge(x, alpha))
"""),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_a_part_can_be_taken_out(name):
    """Into a module of its own, with PyTorch; the policy with the augmentations, the mixed operation with common.py."""
    script, parts, use = PARTS[name]
    text = IMPORTS
    if name == "the mixed operation":
        text += COMMON
    if name == "the policy":
        whole = inspect.getsource(joint)
        text += whole[whole.index("def per_image") : whole.index("def apply_each")]
    for part in parts.split():
        text += inspect.getsource(getattr(script, part))
    exec(text + use, vars(ModuleType("taken_out")))
