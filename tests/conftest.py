"""Paths, markers, and what test_runs.py needs: the three scripts with flags for runs of seconds."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torchvision
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(2)

import baseline_sequential
import common
import dha
import joint_darts_faa


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; run with -m slow")
    if not config.option.markexpr:
        config.option.markexpr = "not slow"


class Script(NamedTuple):
    """A script, the flags of a short run of it, the flags of a shorter one after these, what a run leaves."""

    module: ModuleType
    short: list[str]
    least: list[str]
    phases: list[str]  # of the epochs that its own checkpoint has
    files: list[str]

    def run(self, *flags) -> int:
        return self.module.main([*self.short, *map(str, flags)])

    def process(self, *flags, before: tuple = (sys.executable, "-u"), **kwargs) -> subprocess.Popen:
        command = [*before, self.module.__file__, *self.short, *map(str, flags)]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, env=env, **pipe | kwargs)


TINY = "--preset quick --gpu -1 --limit-train 16 --batch-size 8 --channels 4 --layers 3 --search-epochs 2".split()
SEARCH = "--search-channels 2 --search-batch-size 4 --sub-policies 2 --train-epochs 2".split()
FAA = "--method faa-darts --faa-epochs 3 --faa-images 8 --faa-batch-size 4".split()
FILES = "config.json metrics.jsonl checkpoint.pt genotype.json policy.json model.pt result.json curves.png".split()
SCRIPTS = {
    "joint": Script(
        joint_darts_faa, [*TINY, *SEARCH], "--genotype DARTS_V2 --policy none --train-epochs 1".split(),
        ["search", "search", "train", "train"], "cells.png selection.png images.png".split(),
    ),
    "dha": Script(
        dha, [*TINY, "--train-epochs", "1"], "--search-epochs 1 --train-epochs 0".split(),
        ["search", "search", "train"], "cells.png policy.png support.png".split(),
    ),
    "baseline": Script(
        baseline_sequential, [*TINY, *SEARCH, *FAA], "--faa-epochs 1 --genotype DARTS_V2 --train-epochs 1".split(),
        ["policy"] * 3, ["darts/cells.png", "darts/curves.png", "darts/images.png"],
    ),
    "sequential dha": Script(
        baseline_sequential, [*TINY, "--method", "dha", "--train-epochs", "1"], ["--search-epochs", "1"], [], [],
    ),
}  # fmt: skip


class StagesInProcess:
    """`subprocess` for baseline_sequential: the stages are calls, because a start of Python takes 4 s."""

    getoutput = staticmethod(subprocess.getoutput)

    def call(self, command: list[str]) -> int:
        module = {"dha.py": dha, "joint_darts_faa.py": joint_darts_faa}[Path(command[1]).name]
        return module.main(command[2:])

    def run(self, command: list[str], **kwargs) -> subprocess.CompletedProcess:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            code = self.call(command)
        return subprocess.CompletedProcess(command, code, "", said.getvalue())

    def Popen(self, command: list[str], **kwargs) -> SimpleNamespace:
        return SimpleNamespace(wait=lambda: self.call(command))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder data set of 40 and 20 images, which takes no time to read."""
    root = tmp_path_factory.mktemp("data")
    for part, count in (("train", 40), ("test", 20)):
        for i, (image, label) in enumerate(zip(*common.shapes(count, seed=count))):
            path = root / part / f"class{label}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            torchvision.transforms.functional.to_pil_image(image).save(path)
    return root


@pytest.fixture(scope="module", params=["joint", "dha", "baseline"])
def script(request, data):
    """One script after the other, in this process, its stages too, on one thread: the networks are tiny."""
    case = SCRIPTS[request.param]
    threads, real = torch.get_num_threads(), baseline_sequential.subprocess
    torch.set_num_threads(1)
    baseline_sequential.subprocess = StagesInProcess()
    yield case._replace(short=[*case.short, "--dataset", "folder", "--data-dir", str(data)])
    torch.set_num_threads(threads)
    baseline_sequential.subprocess = real


@pytest.fixture(scope="module")
def done(script, tmp_path_factory) -> Path:
    """The directory of a finished short run; nothing may change it."""
    out = tmp_path_factory.mktemp("done") / "run"
    assert script.run("--out", out) == 0
    return out


@pytest.fixture
def copy(done, tmp_path) -> Path:
    """A copy of the finished run, as if it had been made there, that has yet to write its result."""
    out = tmp_path / "copy"
    shutil.copytree(done, out)
    for path in out.rglob("config.json"):
        path.write_text(path.read_text().replace(str(done), str(out)))
    (out / "result.json").unlink()
    return out


@pytest.fixture
def one_line(capsys):
    """A function: the only line on the terminal's error output, progress bars aside, which is an error."""

    def read() -> str:
        said = capsys.readouterr().err
        lines = [line for line in re.split(r"[\r\n]+", said) if line.strip() and not re.search(r"%\|.*\]$", line)]
        assert len(lines) == 1 and lines[0].startswith("error: "), said
        return lines[0]

    return read


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> Path:
    """A folder with most things that can be wrong with a user's files."""
    root = tmp_path_factory.mktemp("broken")
    (root / "file").write_text("a file")
    (root / "damaged.json").write_text('{"normal": [["sep_conv_9x9", 0]]}')
    cell = [("sep_conv_3x3", i % 2) for i in range(8)]
    common.save_genotype(common.Genotype(cell[:6], [2, 3, 4], cell[:6], [2, 3, 4]), root / "nodes3.json")
    common.save_genotype(common.Genotype(cell, [3, 4, 5], cell, [2, 3, 4, 5]), root / "concat.json")
    policy = joint_darts_faa.Policy(2, 2).table()
    (root / "policy.json").write_text(json.dumps(policy | {"p": [[[2.0] * 16] * 2] * 2}))
    for part in ("train", "test"):
        (root / "empty" / part).mkdir(parents=True)
        sets = {"damaged": 2, "one_class": 1, "sizes": 2, "wide": 2, "more": 2 + (part == "test")}
        for name, classes in sets.items():
            for path in (root / name / part / f"class{c}" / f"{i}.png" for c in range(classes) for i in range(9)):
                path.parent.mkdir(parents=True, exist_ok=True)
                size = {"sizes": (32 + path.stem.count("1"), 32), "wide": (40, 32)}.get(name, (32, 32))
                Image.new("RGB", size).save(path)
    (root / "damaged" / "train" / "class1" / "2.png").write_bytes(b"not an image")
    return root
