"""Copies in the two methods must stay the same to the letter. The baseline imports both, and copies nothing."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
METHODS = [ROOT / name for name in ("joint_darts_faa.py", "dha.py")]
BASELINE = ROOT / "baseline_sequential.py"
OWN = {"main", "parse_args", "PRESETS", "AUGMENTATIONS"}  # each script's own; AUGMENTATIONS is the list of its method
LIBRARIES = {"common", "torch", "torchvision", "numpy", "tqdm", "matplotlib"}


def definitions(path: Path) -> dict[str, tuple[int, str]]:
    """Every top-level function, class and constant: its line and its text, decorators included."""
    text = path.read_text()
    lines, found = text.splitlines(), {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names, first = [node.name], min([node.lineno, *(d.lineno for d in node.decorator_list)])
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
            first = node.lineno
        else:
            continue
        for name in names:
            found[name] = first, "\n".join(lines[first - 1 : node.end_lineno])
    return found


def differences(paths: list[Path]) -> list[str]:
    """One message for every name that two files define differently."""
    said, first = [], {}
    for path in paths:
        for name, (line, text) in definitions(path).items():
            if name in OWN:
                continue
            where, original = first.setdefault(name, (f"{path.name}:{line}", text))
            if text != original:
                said.append(
                    f"{name} differs: {where} and {path.name}:{line}; make them the same, or give one another name"
                )
    return said


def test_copies_are_the_same():
    assert not differences(METHODS), "\n".join(differences(METHODS))


def test_the_baseline_copies_nothing():
    methods = {name for path in METHODS for name in definitions(path)}
    assert set(definitions(BASELINE)) & methods <= OWN


def test_scripts_import_common_and_a_few_libraries():
    for path in (*METHODS, BASELINE):
        allowed = LIBRARIES | {method.stem for method in METHODS if path == BASELINE}
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += ["." * node.level + (node.module or "")] if isinstance(node, ast.ImportFrom) else []
            named = {module.split(".")[0] for module in modules}
            others = named - allowed - sys.stdlib_module_names
            assert not others, f"{path.name}:{node.lineno} imports {', '.join(others)}"


@pytest.mark.parametrize("name", ["rotate", "SIGNED", "save", "locked", "evaluate"])
def test_one_changed_character_is_found(name, tmp_path):
    original, copy = METHODS[0], tmp_path / "copy.py"
    line, text = definitions(original)[name]
    position = len(text) // 2
    changed = text[:position] + ("#" if text[position] != "#" else "%") + text[position + 1 :]
    for broken in (changed, text.replace('"""', '""" ', 1) if '"""' in text else text + "  # differs"):
        copy.write_text(original.read_text().replace(text, broken))
        try:
            said = differences([original, copy])
        except SyntaxError:
            continue  # the change did not leave a program
        assert len(said) == 1 and f"{name} differs" in said[0]
        assert f"{original.name}:{line}" in said[0] and f"copy.py:{line}" in said[0]
