"""Copies in the two methods are the same to the letter, the baseline copies nothing. The oracle: the scripts' text."""

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
