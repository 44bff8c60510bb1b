"""What all tests share: paths, markers, and runs of seconds of the three scripts, with what they leave."""

import json
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
from torchvision.transforms.functional import to_pil_image

sys.path.insert(0, str(Path(__file__).parent.parent))

import baseline_sequential  # noqa: E402, after the path
import common  # noqa: E402
import dha  # noqa: E402
import joint_darts_faa  # noqa: E402

needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# 2.4 was tried, and asks for a driver
pretends_cuda = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14), reason="needs newer FakeTensors"
)


def pytest_configure(config):
    # A shell's background job ignores Ctrl-C, and the scripts that tests start would inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "slow: takes minutes; run with -m slow")
    if not config.option.markexpr:
        config.option.markexpr = "not slow"


@pytest.fixture(autouse=True)
def alike(tmp_path, monkeypatch):
    """Every test has one seed, one thread and a folder of its own. (For tiny networks two threads beside other programs
    take 40 times as long.)"""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def float64(monkeypatch):
    """Is what torch computes with, also where a script asks for float()."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def exact(monkeypatch, float64):
    """Everything in float64, and whatever torch draws comes from the CPU's generator: so only rounding can be different
    on a GPU. (In float32 that is enough to turn Adam's first steps around.) Gives assert_close's tolerances."""
    rand, randint, multinomial = torch.rand, torch.randint, torch.multinomial
    monkeypatch.setattr(torch, "rand", lambda *size, device=None, **more: rand(*size, **more).to(device))
    monkeypatch.setattr(torch, "rand_like", lambda x: rand(x.shape).to(x))
    monkeypatch.setattr(torch, "randint", lambda *which, device=None, **more: randint(*which, **more).to(device))
    monkeypatch.setattr(torch, "multinomial", lambda p, *how, **more: multinomial(p.cpu(), *how, **more).to(p.device))
    return {"rtol": 1e-6, "atol": 1e-9}


# -------- Short runs ------------------------------------------------------------------------------------------------


def call(module: ModuleType, *flags) -> int:
    """Run a script in this process; its exit code."""
    try:
        module.main([str(flag) for flag in flags])
    except SystemExit as stop:
        if not isinstance(stop.code, str):
            return stop.code or 0
        print(stop.code, file=sys.stderr)  # as Python does, which exits with 1
        return 1
    return 0


class Script(NamedTuple):
    name: str
    module: ModuleType
    short: list[str]  # flags of a short run
    folders: list[str]  # of a baseline's stages
    phases: list[str]  # of all epochs

    def run(self, *flags) -> int:
        return call(self.module, *self.short, *flags)

    def process(self, *flags, launch: str = "") -> subprocess.Popen:
        """The run in a process and a process group of its own, on one thread."""
        command = [sys.executable, *launch.split(), self.module.__file__, *self.short, *map(str, flags)]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        out = subprocess.PIPE
        return subprocess.Popen(
            command, env=env, start_new_session=True, stdout=out, stderr=subprocess.STDOUT, text=True
        )


TINY = "--preset quick --gpu -1 --dataset folder --batch-size 8 --channels 2 --search-epochs 2 --train-epochs 1"
TINY_JOINT = f"{TINY} --search-images 8 --search-channels 2 --search-batch-size 4 --sub-policies 2 --stages 1"
TINY_FAA = f"{TINY_JOINT} --method faa-darts --search-epochs 1 --faa-epochs 2 --faa-images 8 --faa-batch-size 4"
CASES = {  # name: (module, flags, folders of its stages, phases of its epochs)
    "joint": (joint_darts_faa, TINY_JOINT, "", "search search train"),
    "dha": (dha, TINY, "", "search search train"),
    "faa-darts": (baseline_sequential, TINY_FAA, "policy search train", "policy policy search train"),
    "sequential dha": (baseline_sequential, f"{TINY} --method dha --search-epochs 1", "search train", "search train"),
}


def only(*names: str):
    """The test is for these of CASES. Without it: for all."""
    return pytest.mark.parametrize("script", names, indirect=True)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A folder data set of two classes, 16 images to train on and 10 to test on."""
    root = tmp_path_factory.mktemp("data")
    for part, count in (("train", 16), ("test", 10)):
        for i, image in enumerate(common.shapes(count, seed=count)[0]):
            path = root / part / f"class{i % 2}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            to_pil_image(image).save(path)
    return root


@pytest.fixture(params=list(CASES))
def script(request, data) -> Script:
    module, flags, folders, phases = CASES[request.param]
    short = [*flags.split(), "--data-dir", str(data)]
    return Script(request.param, module, short, folders.split(), phases.split())


@pytest.fixture
def no_figures(monkeypatch):
    """They take longer than the runs."""
    for module in (joint_darts_faa, dha):
        monkeypatch.setattr(module, "Figure", None)


@pytest.fixture
def done(script, tmp_path_factory) -> Path:
    """The directory of a finished short run, with figures; nothing may change it."""
    out = tmp_path_factory.getbasetemp() / "done" / script.name
    if not out.exists():
        with pytest.MonkeyPatch.context() as patch:
            for module in (dha, joint_darts_faa):
                patch.setattr(module, "Figure", matplotlib.figure.Figure)
            assert script.run("--out", out) == 0
    return out


@pytest.fixture
def copy(script, done, tmp_path) -> Path:
    """A copy of the finished run, which its last stage has not finished: --resume goes on with it."""
    out = tmp_path / "copy"
    shutil.copytree(done, out)
    for folder in ["", *script.folders[-1:]]:
        (out / folder / "result.json").unlink()
    return out


@pytest.fixture
def one_line(capsys):
    """A function: the only line of the error output, argparse's usage aside; it must be an error."""

    def read() -> str:
        said = capsys.readouterr().err
        lines = [line for line in said.splitlines() if line.strip()]
        if len(lines) == 2 and lines[0].startswith("usage: "):
            del lines[0]
        assert len(lines) == 1 and re.match(r"(\S+: )?error: ", lines[0]), said
        return lines[0]

    return read


# -------- What a run leaves -----------------------------------------------------------------------------------------


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def result(out: Path) -> dict:
    return json.loads((out / "result.json").read_text())


def weights(out: Path) -> dict:
    return torch.load(out / "model.pt", weights_only=True)["state_dict"]


def history(out: Path) -> list[dict]:
    """The records in a run's checkpoint, as JSON has them."""
    return json.loads(json.dumps(torch.load(out / "checkpoint.pt", weights_only=True)["history"]))


def contents(folder: Path) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def untimed(records: list[dict]) -> list[dict]:
    """Without what no two runs share."""
    return [{k: v for k, v in record.items() if k not in ("seconds", "search_seconds")} for record in records]


def assert_same(a: Path, b: Path) -> None:
    """Two runs ended alike, bit for bit: result and metrics without their times, files, weights."""
    assert untimed([result(a)]) == untimed([result(b)])
    assert untimed(lines(a)) == untimed(lines(b))
    for name in ("genotype.json", "policy.json"):
        first, second = ((out / name).read_bytes() if (out / name).exists() else None for out in (a, b))
        assert first == second, name
    for (name, first), (other, second) in zip(weights(a).items(), weights(b).items(), strict=True):
        assert name == other and torch.equal(first, second), name


def stop_after_an_epoch(monkeypatch, script: Script, *flags) -> pytest.ExceptionInfo:
    """Run until the next epoch's end, and press Ctrl-C there. Returns the exception: its traceback keeps all alive."""

    def save_and_stop(out, records, real=dha.save_epoch, **learned):
        real(out, records, **learned)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="stopped: the same command") as stopped:
        for module in (joint_darts_faa, dha):
            patch.setattr(module, "save_epoch", save_and_stop)
        script.module.main([*script.short, *map(str, flags)])
    return stopped
