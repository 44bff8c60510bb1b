"""Paths, markers, and what test_runs.py needs: the three scripts with flags for runs of seconds."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import matplotlib.figure
import pytest
import torch
import torchvision
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(2)

import baseline_sequential  # noqa: E402, after the path
import common  # noqa: E402
import dha  # noqa: E402
import joint_darts_faa  # noqa: E402


def pytest_configure(config):
    # A shell's background job ignores Ctrl-C, and the scripts that tests start would inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "slow: takes minutes; run with -m slow")
    if not config.option.markexpr:
        config.option.markexpr = "not slow"


needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def in_its_own_folder(tmp_path, monkeypatch):
    """No test reads what lies where pytest was started, or writes there."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def exact(monkeypatch):
    """Everything in float64, and whatever torch draws comes from the CPU's generator: so only rounding can be different
    on a GPU. (In float32 that is enough to turn Adam's first steps around.) Gives assert_close's tolerances."""
    rand, randint, multinomial = torch.rand, torch.randint, torch.multinomial
    monkeypatch.setattr(torch, "rand", lambda *size, device=None, **more: rand(*size, **more).to(device))
    monkeypatch.setattr(torch, "rand_like", lambda x: rand(x.shape).to(x))
    monkeypatch.setattr(torch, "randint", lambda *which, device=None, **more: randint(*which, **more).to(device))
    monkeypatch.setattr(torch, "multinomial", lambda p, *how, **more: multinomial(p.cpu(), *how, **more).to(p.device))
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield {"rtol": 1e-6, "atol": 1e-9}
    torch.set_default_dtype(torch.float32)


def call(module: ModuleType, *flags) -> int:
    """Run a script in this process; its exit code."""
    try:
        module.main([str(flag) for flag in flags])
    except SystemExit as stop:
        if isinstance(stop.code, str):  # Python prints the text and exits with 1
            print(stop.code, file=sys.stderr)
            return 1
        return stop.code or 0
    return 0


class Script(NamedTuple):
    name: str
    module: ModuleType
    short: list[str]  # flags of a short run
    least: list[str]  # after these: of the shortest
    parts: list[str]  # folders of a baseline's parts
    phases: list[str]  # of all epochs
    files: list[str]  # that a short run leaves, beside those that all leave

    def run(self, *flags) -> int:
        return call(self.module, *self.short, *flags)

    def process(self, *flags, launch: str = "", **options) -> subprocess.Popen:
        """The run in a process and a process group of its own, on one thread."""
        command = [sys.executable, *launch.split(), self.module.__file__, *self.short, *map(str, flags)]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, **options}
        env = os.environ | {"OMP_NUM_THREADS": "1"} | options.pop("env", {})
        return subprocess.Popen(command, env=env, start_new_session=True, **options)


TINY = "--preset quick --gpu -1 --limit-train 16 --batch-size 8 --channels 4 --layers 3 --search-epochs 2"
SEARCH = "--search-images 8 --search-channels 2 --search-batch-size 4 --sub-policies 2 --train-epochs 2"
FAA = "--method faa-darts --faa-epochs 3 --faa-images 8 --faa-batch-size 4"
SCRIPTS = {  # name: (module, flags, flags, parts, phases, files)
    "joint": (joint_darts_faa, f"{TINY} {SEARCH}", "--genotype DARTS_V2 --policy none --train-epochs 1",
              "", "search search train train", "curves.png selection.png images.png"),
    "dha": (dha, f"{TINY} --train-epochs 1", "--search-epochs 1 --train-epochs 0",
            "", "search search train", "curves.png policy.png"),
    "faa-darts": (baseline_sequential, f"{TINY} {SEARCH} {FAA}",
                  "--faa-epochs 1 --genotype DARTS_V2 --train-epochs 1",
                  "darts", "policy policy policy search search train train", "curves.png darts/images.png"),
    "sequential dha": (baseline_sequential, f"{TINY} --method dha --train-epochs 1", "--search-epochs 1",
                       "search train", "search search train", "train/policy.png"),
}  # fmt: skip
METHODS = ("joint", "dha")


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


@pytest.fixture(params=["joint", "dha", "faa-darts"])
def script(request, data):
    """A script, for runs in this process: on one thread, because the networks are tiny."""
    name, (module, *texts) = request.param, SCRIPTS[request.param]
    case, threads = Script(name, module, *(text.split() for text in texts)), torch.get_num_threads()
    torch.set_num_threads(1)
    yield case._replace(short=[*case.short, "--dataset", "folder", "--data-dir", str(data)])
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The folder of `done`."""
    return tmp_path_factory.mktemp("done")


@pytest.fixture
def done(script, runs) -> Path:
    """The directory of a finished short run, with figures; nothing may change it."""
    out = runs / script.name
    if not out.exists():
        with pytest.MonkeyPatch.context() as patch:
            for module in (dha, joint_darts_faa):
                patch.setattr(module, "Figure", matplotlib.figure.Figure)
            assert script.run("--out", out) == 0
    return out


@pytest.fixture
def copy(script, done, tmp_path) -> Path:
    """A copy of the finished run that lacks what the script writes last, and so has to be gone on with."""
    out = tmp_path / "copy"
    shutil.copytree(done, out)
    (out / "result.json").unlink()
    return out


@pytest.fixture
def one_line(capsys):
    """A function: the only line of the error output, argparse's usage aside; it must be an error."""

    def read() -> str:
        said = capsys.readouterr().err
        lines = [line for line in said.splitlines() if line.strip()]
        if len(lines) == 2 and lines[0].startswith("usage: "):
            assert re.match(r"\S.*: error: ", lines.pop()), said
            return said.splitlines()[-1]
        assert len(lines) == 1 and lines[0].startswith("error: "), said
        return lines[0]

    return read


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> Path:
    """A folder with most things that can be wrong with a user's files."""
    root = tmp_path_factory.mktemp("broken")
    cell = [("sep_conv_3x3", i % 2) for i in range(8)]
    common.save_genotype(common.Genotype(cell[:6], [2, 3, 4], cell[:6], [2, 3, 4]), root / "nodes3.json")
    common.save_genotype(common.Genotype(cell, [3, 4, 5], cell, [2, 3, 4, 5]), root / "concat.json")
    content = joint_darts_faa.Policy(2, 2).as_dict() | {"p": [[[2.0] * 16] * 2] * 2}
    joint_darts_faa.save(root / "policy.json", content)
    joint_darts_faa.save(root / "dha.json", {"operations": [], "probability": [[1.0]]})
    (root / "damaged.json").write_text('{"normal": [["sep_conv_9x9", 0]]}')
    (root / "file").write_text("a file")
    (root / "empty" / "train").mkdir(parents=True)
    (root / "empty" / "test").mkdir()
    for name, classes in {"damaged": 2, "one_class": 1, "sizes": 2, "wide": 2, "more": 3}.items():
        for part, i in ((part, i) for part in ("train", "test") for i in range(9)):
            label = i % (classes - (part == "train" and name == "more"))
            path = root / name / part / f"class{label}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", {"sizes": (32 + i % 3, 32), "wide": (40, 32)}.get(name, (32, 32))).save(path)
    for part, label in (("train", 0), ("test", 0), ("test", 1)):  # nothing to train class 1 with
        path = root / "hollow" / part / f"class{label}" / "0.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32)).save(path)
    (root / "hollow" / "train" / "class1").mkdir()
    (root / "damaged" / "train" / "class1" / "1.png").write_bytes(b"not an image")
    return root
