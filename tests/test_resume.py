"""Stops and resumes. The oracle is `done`, the same run undisturbed: all must end like it, bit for bit.

Also what a resume refuses (finished, foreign, damaged, contradicting runs, changed data), locks, and faults on the way.
"""

import errno
import fcntl
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import baseline_sequential as baseline
import common
import dha
import joint_darts_faa as joint
from conftest import assert_same, call, contents, history, lines, only, result, stop_after_an_epoch

METHODS = only("joint", "dha")
pytestmark = pytest.mark.usefixtures("no_figures")


# -------- Stops -----------------------------------------------------------------------------------------------------


def test_stopped_after_every_epoch_it_ends_the_same(script, done, tmp_path, monkeypatch):
    """The command starts the run, then goes on with it; later --out is enough. All in one process, as in a notebook."""
    out = tmp_path / "run"
    folders = [out, *(out / name for name in script.folders)]
    stops = []
    for number in range(len(script.phases)):
        case = script if number < 2 else script._replace(short=[])
        stops.append(stop_after_an_epoch(monkeypatch, case, "--out", out, "--resume"))
        begun = [folder for folder in folders if (folder / "checkpoint.pt").exists()]
        assert sum(len(history(folder)) for folder in begun) == number + 1
        assert lines(begun[-1]) == history(begun[-1])
        for name in script.folders:  # before the first stage begins
            assert (out / name / "config.json").exists()
    assert call(script.module, "--out", out, "--resume") == 0
    assert_same(out, done)


@pytest.mark.slow
def test_a_killed_process_goes_on(script, done, tmp_path):
    """Its lines come at once, also through a pipe. It ends like a run of this process."""
    process = script.process("--out", tmp_path / "run")
    assert any(" more, until " in line for line in iter(process.stdout.readline, ""))  # the first epoch is saved
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "run" / "result.json").exists()
    process.stdout.close()
    assert script.run("--out", tmp_path / "run", "--resume") == 0
    assert_same(tmp_path / "run", done)


def test_a_moved_run_resumes_with_other_places(script, done, copy, data, tmp_path):
    """It was made on a GPU, with --amp; its data lie elsewhere now. A baseline's first stages are finished."""
    shutil.copytree(data, tmp_path / "data")
    for path in copy.rglob("config.json"):
        text = path.read_text().replace('"amp": false', '"amp": true').replace('"gpu": -1', '"gpu": 3')
        path.write_text(text.replace(str(data), str(tmp_path / "gone")))
    places = ["--data-dir", tmp_path / "data", "--workers", "0", "--gpu", "-1"]
    assert call(script.module, "--resume", "--out", copy, *places) == 0
    assert_same(copy, done)


@METHODS
def test_a_run_with_given_files_keeps_copies_of_them(script, done, tmp_path, monkeypatch):
    flags = ["--train-epochs", "2"]
    for name in ("genotype", "policy") if script.name == "joint" else ("genotype",):
        shutil.copy(done / f"{name}.json", tmp_path)
        flags += [f"--{name}", tmp_path / f"{name}.json"]
    assert script.run(*flags, "--out", tmp_path / "whole") == 0
    stop_after_an_epoch(monkeypatch, script, *flags, "--out", tmp_path / "cut")
    for path in tmp_path.glob("*.json"):
        path.unlink()
    assert script.run(*flags, "--out", tmp_path / "cut", "--resume") == 0
    assert_same(tmp_path / "cut", tmp_path / "whole")
    assert result(tmp_path / "cut")["search_epochs"] == 0


@METHODS
def test_metrics_are_those_of_the_checkpoint(script, done, copy):
    """Killed between the two, a run has a line too few; a crash of the machine may leave anything."""
    good = (copy / "metrics.jsonl").read_text()
    for text in ("\0" * 99, good.splitlines()[0]):
        (copy / "metrics.jsonl").write_text(text)
        assert script.run("--resume", "--out", copy) == 0
        assert_same(copy, done)
        (copy / "result.json").unlink()


# -------- What is refused, and stays as it is -----------------------------------------------------------------------


@pytest.fixture
def refused(script, one_line):
    """A function: --resume of the run in `out` ends in a line with `says`, and leaves the directory as it is."""

    def check(out: Path, says: str, *flags, module=script.module) -> None:
        before = contents(out)
        assert call(module, "--resume", "--out", out, *flags) == 2
        assert says in one_line() and contents(out) == before

    return check


def test_a_finished_run_stays_as_it_is(script, done, refused, capsys, one_line):
    before = contents(done)
    assert call(script.module, "--resume", "--out", done) == script.run("--out", done, "--resume") == 0
    assert capsys.readouterr().out.count("finished already") == 2
    assert script.run("--out", done) == 2
    assert "--resume" in one_line() and contents(done) == before
    refused(done, "--data-dir", "--data-dir", "other")  # somebody meant another run
    for other in {joint, dha, baseline} - {script.module}:
        refused(done, f"holds a run of {Path(script.module.__file__).name}", module=other)


@pytest.mark.parametrize("flags", ["--limit-test 9", "--seed 1", "--preset paper", "--layers 4", "--search-epochs 3"])
def test_a_flag_that_contradicts_the_run_is_refused(copy, flags, refused):
    refused(copy, flags.split()[0], *flags.split())


@pytest.mark.parametrize("name", joint.RUN_FILES)
@only("dha", "faa-darts")
def test_a_directory_where_a_run_lies_is_refused(script, name, tmp_path, one_line):
    """Somebody's file with the name of a run's, in --out or in a stage's folder."""
    for folder in ["", *script.folders]:
        path = tmp_path / folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
        for flags in ([], ["--resume"]):
            assert script.run("--out", tmp_path, *flags) == 2
            assert name in one_line() and contents(tmp_path) == {path: b"mine"}
        path.unlink()


def gray(data: Path) -> None:
    """All images, of other sizes."""
    for path in data.rglob("*.png"):
        Image.new("RGB", (36, 36)).save(path)


PARTS = ("train", "test")
HARMS = {
    "an image less": lambda data: next(data.glob("train/class1/*")).unlink(),
    "an image more": lambda data: shutil.copy(next(data.glob("test/class0/*")), data / "test" / "class0" / "new.png"),
    "a class more": lambda data: [shutil.copytree(data / part / "class0", data / part / "new") for part in PARTS],
    "a class renamed": lambda data: [(data / part / "class1").rename(data / part / "new") for part in PARTS],
    "other pixels": gray,
    "no data": shutil.rmtree,
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_run_on_other_data_is_refused(copy, data, harm, tmp_path, refused):
    """Changed between the stop and the resume."""
    shutil.copytree(data, tmp_path / "data")
    HARMS[harm](tmp_path / "data")
    for path in copy.rglob("config.json"):
        path.write_text(path.read_text().replace(str(data), str(tmp_path / "data")))
    refused(copy, "--data-dir" if harm == "no data" else "started on other data")


@pytest.mark.parametrize("harm", [b"\xff\0garbage", b"", b"[]", "half", "another file"])
@pytest.mark.parametrize("name, other", [("config.json", "policy.json"), ("checkpoint.pt", "model.pt")])
@only("joint", "dha", "faa-darts")
def test_a_damaged_run_is_one_line(copy, name, other, harm, refused):
    for path in copy.rglob(name):
        texts = {"half": path.read_bytes()[: path.stat().st_size // 2], "another file": (copy / other).read_bytes()}
        path.write_bytes(texts.get(harm, harm))
    refused(copy, name)


# -------- Locks -----------------------------------------------------------------------------------------------------


@only("joint", "dha", "faa-darts")
def test_a_directory_in_use_is_one_line(script, copy, tmp_path, refused):
    for held in (tmp_path / "new", copy, *(copy / name for name in script.folders[-1:])):
        with joint.locked(held):
            if held.name == "new":
                refused(held, f"another process is writing {held}", *script.short)
            else:
                refused(copy, f"another process is writing {held}")


@pytest.mark.parametrize("lacking", ["locks", "fcntl"])
def test_a_system_without_locks_is_a_warning(lacking, tmp_path, capsys, monkeypatch):
    def flock(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    if lacking == "fcntl":  # as on Windows
        monkeypatch.setitem(sys.modules, "fcntl", None)
    with dha.locked(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()
    assert f"warning: {tmp_path / 'run'} cannot be locked" in capsys.readouterr().out


# -------- Faults: the last good checkpoint is kept ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.pt", "x.json", "x.jsonl"])
def test_a_file_is_written_whole_or_not_at_all(name, tmp_path, monkeypatch):
    path, part = tmp_path / name, tmp_path / f"{name}.part"
    for size in (1, 100_000):  # less than a buffer, and more
        dha.save(path, [{"numbers": list(map(float, range(size)))}])
        good = path.read_bytes()
        part.symlink_to("/dev/full")
        with pytest.raises(OSError, match="No space left"):
            dha.save(path, [{"other": 1}])
        part.unlink()
        with monkeypatch.context() as patch, pytest.raises(OSError):
            patch.setattr(os, "fsync", lambda file: os.write(-1, b""))
            dha.save(path, [{"other": 1}])
        assert path.read_bytes() == good


@only("dha", "sequential dha")
def test_a_full_disk_is_one_line_and_costs_nothing(script, done, tmp_path, one_line):
    """Whichever file it is that finds no space."""
    out = tmp_path / "run"
    folder = out / script.folders[-1] if script.folders else out
    folder.mkdir(parents=True)
    for name in ("config.json", "checkpoint.pt", "metrics.jsonl", "model.pt", "result.json"):
        part = folder / f"{name}.part"
        part.symlink_to("/dev/full")
        assert script.run("--resume", "--out", out) == 2
        assert "No space left" in one_line() and not (folder / name).exists()
        part.unlink()
    assert call(script.module, "--resume", "--out", out) == 0
    assert_same(out, done)


def failing_after_a_checkpoint(out: Path, monkeypatch, error: Exception | None) -> None:
    """From then on a batch raises the error, or its images are not numbers."""
    real = common.loader

    def loader(*args, **kwargs):
        failing = any(out.rglob("checkpoint.pt"))
        for images, labels in real(*args, **kwargs):
            if failing and error:
                raise error
            yield images * (torch.nan if failing else 1), labels

    monkeypatch.setattr(common, "loader", loader)


@only("joint", "dha", "faa-darts")
def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(script, tmp_path, one_line, monkeypatch):
    failing_after_a_checkpoint(tmp_path, monkeypatch, None)
    assert script.run("--out", tmp_path / "run") == 1
    said = one_line()
    assert "not finite in epoch 2" in said and "with a lower --" in said
    for flag in re.findall(r"--[a-z-]+", said):
        assert hasattr(script.module.parse_args(script.short), flag[2:].replace("-", "_"))
    folder = tmp_path / "run" / "".join(script.folders[:1])
    assert len(history(folder)) == 1 and not (folder / "result.json").exists()
    saved = torch.load(folder / "checkpoint.pt")
    net = saved["learned" if script.name == "dha" else "search"]["net"]
    assert all(value.isfinite().all() for value in net.values() if value is not None)


@only("dha")
def test_too_little_gpu_memory_is_one_line_and_other_errors_keep_their_traceback(
    script, tmp_path, one_line, monkeypatch
):
    with monkeypatch.context() as patch:
        failing_after_a_checkpoint(tmp_path, patch, torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to"))
        assert script.run("--out", tmp_path / "run") == 2
    assert one_line() == "error: CUDA out of memory." and len(history(tmp_path / "run")) == 1
    failing_after_a_checkpoint(tmp_path, monkeypatch, RuntimeError("device-side assert triggered"))
    with pytest.raises(RuntimeError, match="device-side"):
        script.run("--resume", "--out", tmp_path / "run")
