"""Whole runs of the three scripts: what they leave, repeatability, stops and resumes, faults, bad input."""

import errno
import fcntl
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import baseline_sequential as baseline
import common
import dha
import joint_darts_faa as joint
from conftest import METHODS, SCRIPTS, TINY, call

TIMES = {"seconds", "search_seconds"}  # what no two runs share


def only(*names):
    return pytest.mark.parametrize("script", names, indirect=True)


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """They take longer than the runs (those in `done` have them)."""
    for module in (joint, dha):
        monkeypatch.setattr(module, "Figure", None)


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def result(out: Path) -> dict:
    return json.loads((out / "result.json").read_text())


def settings(out: Path) -> dict:
    return json.loads((out / "config.json").read_text())["args"]


def weights(out: Path) -> dict:
    return torch.load(out / "model.pt", weights_only=True)["state_dict"]


def history(out: Path) -> list[dict]:
    """The records in a run's checkpoint, as JSON has them."""
    return json.loads(json.dumps(torch.load(out / "checkpoint.pt", weights_only=True)["history"]))


def contents(folder: Path) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def untimed(records: list[dict]) -> list[dict]:
    return [{name: value for name, value in record.items() if name not in TIMES} for record in records]


def assert_same(a: Path, b: Path) -> None:
    """Two runs ended alike, bit for bit: result and metrics without their times, files, weights."""
    assert untimed([result(a)]) == untimed([result(b)])
    assert untimed(lines(a)) == untimed(lines(b))
    for name in ("genotype.json", "policy.json"):
        assert (a / name).exists() == (b / name).exists(), name
        assert not (a / name).exists() or (a / name).read_bytes() == (b / name).read_bytes(), name
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys() and all(torch.equal(v, second[k]) for k, v in first.items())


def after_every_epoch(monkeypatch, act) -> None:
    """act(directory) once the checkpoint of an epoch is saved."""
    for module in (joint, dha):

        def save_and_act(out, records, real=module.save_epoch, **learned):
            real(out, records, **learned)
            act(out)

        monkeypatch.setattr(module, "save_epoch", save_and_act)


def interrupt(out) -> None:
    raise KeyboardInterrupt


def stop_after_an_epoch(monkeypatch, script, *flags):
    """Run until the next epoch's end, and press Ctrl-C there. Returns the exception: its traceback keeps all alive."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="stopped: the same command") as stopped:
        after_every_epoch(patch, interrupt)
        script.module.main([*script.short, *map(str, flags)])
    return stopped


# -------- What a run leaves, and that nothing is overwritten ------------------------------------------------


def test_a_run_leaves_what_the_readme_says(script, done, data, monkeypatch):
    names = "config.json metrics.jsonl checkpoint.pt genotype.json policy.json model.pt result.json"
    for path in [*names.split(), *script.files, Path(*script.parts, "cells.png")]:
        assert (done / path).stat().st_size > 0, path
        if str(path).endswith(".png"):
            with Image.open(done / path) as picture:
                assert min(picture.size) > 300
    assert not list(done.rglob("*.part"))

    config, source = json.loads((done / "config.json").read_text()), Path(script.module.__file__)
    assert config.keys() == {"script", "args", "torch", "torchvision", "python", "device"}
    assert (done / source.name).read_bytes() == source.read_bytes() and config["script"] == source.name
    assert config["args"]["seed"] == 0 and config["device"] == "cpu"
    assert config["torch"] == torch.__version__ and config["python"] == sys.version

    records, said = lines(done), result(done)
    assert [record["phase"] for record in records] == script.phases
    own = [record for record in records if "stage" not in record]
    assert own == history(done) and [record["epoch"] for record in own] == list(range(1, len(own) + 1))
    assert all(record["seconds"] > 0 and record["gpus"] == 0 for record in records)
    search = [record for record in records if record["phase"] != "train"]
    assert (said["epochs"], said["search_epochs"]) == (len(records), len(search))
    assert said["seconds"] == pytest.approx(sum(record["seconds"] for record in records))
    assert said["search_seconds"] == pytest.approx(sum(record["seconds"] for record in search))
    assert said["gpu_hours"] == 0 and said["test_accuracy"] == records[-1]["test_accuracy"]

    monkeypatch.setattr(dha, "ista", None)  # who loads a network decodes nothing
    net, info = (dha.load_model if script.module is dha else joint.load_network)(done / "model.pt")
    methods = {joint: "DARTS + Faster AA", dha: "DHA", baseline: "Faster AA, then DARTS"}
    assert said["method"] == methods[script.module]
    assert (said["dataset"], said["seed"]) == ("folder", 0)
    assert not net.training and info["classes"] == sorted(info["classes"]) and len(info["classes"]) == 10
    assert said["params"] == sum(p.numel() for p in net.parameters()) == common.count_parameters(net)
    assert said["flops"] == common.count_flops(net, 32)
    assert said["genotype"] == str(common.load_genotype(done / "genotype.json"))

    test = common.load_data("folder", data)
    with torch.no_grad():
        answers = net(common.normalize(test.test_images, info["mean"], info["std"])).argmax(1)
    assert said["test_accuracy"] == 100 * (answers == test.test_labels).sum().item() / 20

    storages = [tensor.untyped_storage() for tensor in weights(done).values()]  # what safetensors asks for
    assert all(tensor.is_contiguous() for tensor in weights(done).values())
    assert len({storage.data_ptr() for storage in storages}) == len(storages)

    policy = json.loads((done / "policy.json").read_text())
    if script.module is dha:
        assert policy["operations"] == list(dha.AUGMENTATIONS)
        assert sum(map(sum, policy["probability"])) == pytest.approx(1)
    else:
        images = torch.rand(4, 3, 32, 32)
        assert joint.augment(images, joint.load_policy(done / "policy.json")).shape == images.shape
        assert policy.keys() == {"operations", "eta", "z", "p", "mu"}
        assert sum(own[0]["selection"].values()) == pytest.approx(1, abs=1e-4)


@only("faa-darts", "sequential dha")
def test_parts_of_a_baseline_hand_over_what_they_found(script, done):
    whole = [record for record in lines(done) if "stage" not in record]
    for part in script.parts:
        whole += [{"stage": part, **record} for record in lines(done / part)]
    assert lines(done) == whole and [record["phase"] for record in whole] == script.phases
    for name in ("genotype.json", "policy.json", "model.pt"):
        assert (done / name).read_bytes() == (done / script.parts[-1] / name).read_bytes()
    if script.name == "faa-darts":
        assert settings(done / "darts")["policy"] == str(done / "policy.json")
        assert whole[2]["selection"].keys() == set(joint.AUGMENTATIONS) and "selection" not in whole[3]
        return
    first, second = (settings(done / part) for part in script.parts)
    assert first["no_da"] and first["no_hpo"] and first["train_epochs"] == 0
    assert not second["no_da"] and not second["no_hpo"] and second["train_epochs"] == 1
    assert second["genotype"] == str(done / "search" / "genotype.json")
    assert result(done / "train")["genotype"] == result(done / "search")["genotype"] == result(done)["genotype"]
    said = result(done)
    assert (said["method"], said["epochs"], said["search_epochs"]) == ("Sequential DHA", 3, 2)


def test_a_finished_run_stays_as_it_is(script, done, capsys, one_line):
    before = contents(done)
    assert call(script.module, "--resume", "--out", done) == script.run("--out", done, "--resume") == 0
    assert capsys.readouterr().out.count("finished already") == 2
    assert script.run("--out", done) == 2
    assert "--resume" in one_line()
    for other in {joint, dha, baseline} - {script.module}:
        assert call(other, "--resume", "--out", done) == 2
        assert f"holds a run of {Path(script.module.__file__).name}" in one_line()
    assert contents(done) == before


CONTRADICTIONS = "--limit-test 9 | --seed 1 | --preset paper | --preset imagenet | --dataset shapes | --image-size 16"
CONTRADICTIONS += " | --layers 4 | --lr 0.01 | --search-epochs 3 | --no-such-flag"


@pytest.mark.parametrize("flags", CONTRADICTIONS.split(" | "))
def test_a_flag_that_contradicts_the_run_is_refused(script, copy, flags, one_line):
    before = contents(copy)
    assert call(script.module, "--resume", "--out", copy, *flags.split()) == 2
    assert flags.split()[0][2:].replace("-", "_") in one_line().replace("-", "_")
    assert contents(copy) == before


def test_a_directory_where_a_run_lies_is_refused(script, tmp_path, one_line):
    """Somebody's files, with the names of a run's."""
    for folder in ["", *script.parts]:
        for name in (*joint.RUN_FILES, Path(script.module.__file__).name):
            path = tmp_path / name / folder / name
            if folder and path.suffix == ".py":
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("mine")
            for flags in ([], ["--resume"]):
                assert script.run("--out", tmp_path / name, *flags) == 2
                assert name in one_line()
            assert contents(tmp_path) == {path: b"mine"}
            path.unlink()


def test_a_directory_with_other_files_is_as_good_as_a_new_one(script, tmp_path, capsys, monkeypatch):
    """Here with images of 16 pixels, another seed, --amp where there is no GPU, no matplotlib, and a clock set back."""
    monkeypatch.setattr(time, "time", itertools.count(1e9, -60).__next__)
    out = tmp_path / "run"
    (out / "lost+found").mkdir(parents=True)
    for name in ("notes.txt", "job.log", "config.json.part"):
        (out / name).write_text("mine")
    assert script.run(*script.least, "--image-size", 16, "--seed", 1, "--amp", "--out", out) == 0
    assert (out / "notes.txt").read_text() == (out / "job.log").read_text() == "mine"
    said = capsys.readouterr().out
    assert "--amp is for a GPU: it is switched off" in said and "matplotlib is missing" in said
    assert result(out)["seed"] == 1 and not list(out.rglob("c*.png"))
    assert all(0 < record["seconds"] < 1e6 for record in lines(out))
    assert torch.load(out / "model.pt", weights_only=True)["image_size"] == 16


# -------- Repeatability, stops, damage ----------------------------------------------------------------------


@only(*SCRIPTS)
def test_stopped_after_every_epoch_it_ends_the_same(script, done, tmp_path, monkeypatch, capsys):
    """The command starts the run, then goes on with it; later --out is enough. All in one process, as in a notebook."""
    out, stops = tmp_path / "run", []
    folders = [out, *(out / part for part in script.parts)]
    said_first = "16 images to train on, 20 to test on, 10 classes, 32 x 32 pixels\nepoch 1 "
    for number in range(len(script.phases)):
        case = script if number < 2 else script._replace(short=[])
        stops.append(stop_after_an_epoch(monkeypatch, case, "--out", out, "--resume"))
        assert said_first in capsys.readouterr().out or number
        begun = [folder for folder in folders if (folder / "checkpoint.pt").exists()]
        assert sum(len(history(folder)) for folder in begun) == number + 1
        assert lines(begun[-1]) == history(begun[-1])
    assert call(script.module, "--out", out, "--resume") == 0
    assert_same(out, done)


def test_metrics_are_those_of_the_checkpoint(script, done, copy):
    """Killed between the two, one has a line more; a crash of the machine may leave anything."""
    good = (copy / "metrics.jsonl").read_text()
    for text in ("\0" * 99, good + good.splitlines()[-1] + "\n"):
        (copy / "metrics.jsonl").write_text(text)
        assert script.run("--resume", "--out", copy) == 0
        assert_same(copy, done)
        (copy / "result.json").unlink()


@only(*SCRIPTS)
def test_a_moved_run_resumes_with_other_places(script, done, data, tmp_path, monkeypatch):
    """It was made on a GPU, with --amp. The parts of a baseline have something to hand over yet."""
    if script.module is baseline:
        stop_after_an_epoch(monkeypatch, script, "--out", tmp_path / "run")
        (tmp_path / "run").rename(tmp_path / "moved")
    else:
        shutil.copytree(done, tmp_path / "moved")
        (tmp_path / "moved" / "result.json").unlink()
    shutil.copytree(data, tmp_path / "data")
    for path in (tmp_path / "moved").rglob("config.json"):
        path.write_text(path.read_text().replace('"amp": false', '"amp": true').replace('"gpu": -1', '"gpu": 3'))
    places = ["--data-dir", tmp_path / "data", "--workers", "0", "--gpu", "-1"]
    assert call(script.module, "--resume", "--out", tmp_path / "moved", *places) == 0
    assert_same(tmp_path / "moved", done)


@only(*METHODS)
def test_a_run_with_given_files_keeps_copies_of_them(script, done, tmp_path, monkeypatch):
    flags = ["--train-epochs", "2"]
    for name in ("genotype", "policy") if script.module is joint else ("genotype",):
        shutil.copy(done / f"{name}.json", tmp_path / f"{name}.json")
        flags += [f"--{name}", tmp_path / f"{name}.json"]
    assert script.run(*flags, "--out", tmp_path / "whole") == 0
    stop_after_an_epoch(monkeypatch, script, *flags, "--out", tmp_path / "cut")
    for path in tmp_path.glob("*.json"):
        path.unlink()
    assert script.run(*flags, "--out", tmp_path / "cut", "--resume") == 0
    assert_same(tmp_path / "cut", tmp_path / "whole")
    assert result(tmp_path / "cut")["search_epochs"] == 0


HARMS = [("config.json", "no args"), ("config.json", "no script"), ("checkpoint.pt", "model.pt")]
HARMS += itertools.product(["config.json", "checkpoint.pt"], [b"garbage", b"[]", b"", b"\xff\0", None])


@pytest.mark.parametrize("name, harm", HARMS)
def test_a_damaged_run_is_one_line(script, copy, name, harm, one_line):
    """harm: what the file holds instead, None: its first half, or what config.json lacks, or the file in its place."""
    for path in copy.rglob(name):
        content = path.read_bytes()
        if harm == "model.pt":
            shutil.copy(copy / "model.pt", path)
        elif isinstance(harm, str):
            config = json.loads(content)
            del config[harm.split()[1]]
            path.write_text(json.dumps(config))
        else:
            path.write_bytes(content[: len(content) // 2] if harm is None else harm)
    before = contents(copy)
    assert call(script.module, "--resume", "--out", copy) == 2
    assert name in one_line() and contents(copy) == before


def until(condition, process) -> None:
    """Wait, as long as it takes."""
    while not condition():
        assert process.poll() is None, "the process ended before"
        time.sleep(0.05)


@only("dha", pytest.param("joint", marks=pytest.mark.slow))
def test_a_job_alone(script, tmp_path, monkeypatch, one_line):
    """A fresh process ends with the same bits as this one. Its log lies in --out, and has each line when it is printed.

    It starts no other program (PATH is empty). Ctrl-C says how to go on.
    """
    out, log = tmp_path / "run", tmp_path / "run" / "job.log"
    out.mkdir()
    with open(log, "w") as file:
        flags = ["--out", out, "--search-epochs", "2", "--train-epochs", "3000"]
        process = script.process(*flags, stdout=file, env={"PATH": ""})
    until(lambda: "epoch 1 " in log.read_text(), process)
    assert call(script.module, "--out", out, "--resume") == 2
    assert f"another process is writing {out}" in one_line()
    until(lambda: "epoch 3 " in log.read_text(), process)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 1
    said = log.read_text()
    assert "Traceback" not in said and said.count("epoch 1 ") == 1
    assert said.endswith("\nstopped: the same command with --resume goes on after the last epoch\n")
    stop_after_an_epoch(monkeypatch, script, "--out", tmp_path / "mine", *flags[2:])
    assert untimed(history(out)[:1]) == untimed(history(tmp_path / "mine"))


@pytest.mark.slow
@only(*SCRIPTS)
def test_killed_ten_times_and_resumed_ends_the_same(script, tmp_path):
    flags = ["--search-epochs", "4", "--train-epochs", "6"]
    flags += ["--faa-epochs", "6"] * (script.name == "faa-darts")
    begun, moment = time.perf_counter(), random.Random(0)
    assert script.process(*flags, "--out", tmp_path / "whole", stdout=None).wait() == 0
    whole = time.perf_counter() - begun
    for _ in range(10):
        process = script.process(*flags, "--out", tmp_path / "cut", "--resume", stdout=None)
        time.sleep(moment.uniform(0.2, 0.9) * whole)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert script.process(*flags, "--out", tmp_path / "cut", "--resume", stdout=None).wait() == 0
    assert_same(tmp_path / "cut", tmp_path / "whole")


# -------- Faults: one line, an exit code, the last checkpoint kept ------------------------------------------


@pytest.mark.parametrize("name", ["x.pt", "x.json", "x.jsonl"])
def test_a_file_is_written_whole_or_not_at_all(name, tmp_path, monkeypatch):
    path, part = tmp_path / name, tmp_path / f"{name}.part"
    for size in (1, 100_000):  # less than a buffer, and more
        content = [{"numbers": list(map(float, range(size)))}]
        dha.save(path, content)
        good = path.read_bytes()
        part.symlink_to("/dev/full")
        with pytest.raises(OSError, match="No space left"):
            dha.save(path, content)
        part.unlink()
        with monkeypatch.context() as patch, pytest.raises(OSError):
            patch.setattr(os, "fsync", lambda file: os.truncate(part, 1) or os.write(-1, b""))
            dha.save(path, [{"other": 1}])
        assert path.read_bytes() == good
        dha.save(path, [{"other": 1}])
        assert path.read_bytes() != good and not part.exists()


@only("dha", "faa-darts")
def test_a_full_disk_is_one_line_and_costs_nothing(script, done, tmp_path, one_line):
    """Whichever file it is that finds no space."""
    out = tmp_path / "run"
    found = out / "darts" if script.module is baseline else out
    found.mkdir(parents=True)
    epochs = {"config.json": 0, "checkpoint.pt": 0, "metrics.jsonl": 1, "genotype.json": 3, "result.json": 3}  # its own
    for name, kept in epochs.items():
        path = (found if name == "genotype.json" else out) / name
        part = path.with_name(f"{name}.part")
        part.symlink_to("/dev/full")
        assert script.run("--resume", "--out", out) == 2
        assert "No space left" in one_line() and not path.exists()
        assert kept == (len(history(out)) if (out / "checkpoint.pt").exists() else 0)
        part.unlink()
    assert script.run("--resume", "--out", out) == 0
    assert_same(out, done)


@only("faa-darts", "sequential dha")
def test_a_baseline_killed_before_its_parts_have_their_flags_goes_on(script, tmp_path, one_line, monkeypatch):
    """--out is enough, as at any other moment."""
    folder = tmp_path / "run" / script.parts[-1]
    folder.mkdir(parents=True)
    (folder / "config.json.part").symlink_to("/dev/full")
    assert script.run("--seed", "3", "--out", tmp_path / "run") == 2
    assert "No space left" in one_line() and not (folder / "config.json").exists()
    (folder / "config.json.part").unlink()
    stop_after_an_epoch(monkeypatch, script._replace(short=[]), "--resume", "--out", tmp_path / "run")
    assert settings(folder)["seed"] == 3 and settings(folder)["channels"] == 4


def failing_after_a_checkpoint(out: Path, monkeypatch, error: Exception | None) -> None:
    """From then on a batch raises the error, or its images are not numbers."""
    real = common.loader

    def loader(*args, **kwargs):
        failing = (out / "checkpoint.pt").exists()
        for images, labels in real(*args, **kwargs):
            if failing and error:
                raise error
            yield images * (torch.nan if failing else 1), labels

    monkeypatch.setattr(common, "loader", loader)


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(script, tmp_path, one_line, monkeypatch):
    failing_after_a_checkpoint(tmp_path / "run", monkeypatch, None)
    assert script.run("--out", tmp_path / "run") == 1
    said = one_line()
    assert "not finite in epoch 2: start again with a lower --" in said
    for flag in re.findall(r"--[a-z-]+", said):
        assert hasattr(script.module.parse_args(script.short), flag[2:].replace("-", "_"))
    assert len(history(tmp_path / "run")) == 1 and not (tmp_path / "run" / "result.json").exists()
    assert all(value.isfinite().all() for value in tensors(torch.load(tmp_path / "run" / "checkpoint.pt")))


def tensors(content) -> list[torch.Tensor]:
    """All in a checkpoint."""
    if isinstance(content, torch.Tensor):
        return [content]
    parts = content.values() if isinstance(content, dict) else content if isinstance(content, list) else []
    return [tensor for part in parts for tensor in tensors(part)]


def test_too_little_gpu_memory_is_one_line_and_other_errors_keep_their_traceback(
    script, tmp_path, one_line, monkeypatch
):
    out, flags = tmp_path / "run", ["--resume", "--out", tmp_path / "run"]
    with monkeypatch.context() as patch:
        failing_after_a_checkpoint(out, patch, torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate"))
        assert script.run(*flags) == 2
    assert one_line() == "error: CUDA out of memory." and len(history(out)) == 1
    error = getattr(torch, "AcceleratorError", RuntimeError)("device-side assert triggered")
    failing_after_a_checkpoint(out, monkeypatch, error)
    with pytest.raises(RuntimeError, match="device-side"):
        script.run(*flags)
    assert len(history(out)) == 1


def test_a_directory_in_use_is_one_line(script, copy, tmp_path, one_line):
    new = tmp_path / "new"
    with joint.locked(new):
        assert script.run("--out", new) == 2
        assert f"another process is writing {new}" in one_line() and not os.listdir(new)
    for held in (copy, *(copy / part for part in script.parts)):
        (held / "result.json").unlink(missing_ok=True)
        before = contents(held)
        with joint.locked(held):
            assert script.run("--resume", "--out", copy) == 2
            assert f"another process is writing {held}" in one_line()
            assert contents(held) == before
    assert script.run("--resume", "--out", copy) == 0


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_a_warning(script, copy, number, capsys, monkeypatch):
    def flock(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert script.run("--resume", "--out", copy) == 0
    assert f"warning: {copy} cannot be locked ({os.strerror(number)})" in capsys.readouterr().out


# -------- Bad input: one line that says what to do, exit 2, no traceback, nothing written -------------------

BAD = """--wrong-flag | word | --dataset cifar1000 | --preset fast | --seed one | --seed -1
--seed 99999999999999 | --gpu two | --gpu 77 | --gpu -2 | --workers -1 | --workers many
--search-epochs 0 | --evaluate x | --check
--train-epochs -3 | --batch-size 1 | --batch-size 1.5 | --channels 7 | --channels | --layers 2 | --lr nan
--lr -1 | --weight-decay -1 | --weight-decay inf | --drop-path 1 | --drop-path -1 | --limit-train 1
--limit-train many | --limit-test 0 | --image-size 4 | --cutout -1 | --cutout 99 | --train-epoch 2
--auxiliary-weight 0.4 --image-size 16 | --dataset cifar10 --data-dir {broken}/file | --data-dir {broken}/file
--data-dir {broken}/nothing | --data-dir {broken}/empty | --data-dir {broken}/damaged | --out {broken}/file
--data-dir {broken}/one_class | --data-dir {broken}/sizes | --data-dir {broken}/wide
--data-dir {broken}/more | --data-dir {broken}/hollow | --out {broken}/file/run
--genotype DARTS_V9 | --genotype {broken}/file | --genotype {broken}/damaged.json | --genotype {broken}"""
OWN = {
    "joint": """--search-batch-size 1 | --search-channels 3 | --search-layers 2 | --arch-lr -1 | --stages 0
--sub-policies 0 | --policy-lr nan | --limit-train 3 | --search-images 3 | --train-epochs 0 | --no-da
--policy {broken}/nothing | --policy {broken}/file | --policy {broken}/damaged.json | --policy {broken}/dha.json
--policy {broken}/policy.json | --method dha | --space mobilenet | --preset imagenet
--search-only --genotype DARTS_V2 --policy none""",
    "dha": """--lr 5 | --weight-decay 0.5 | --max-params 0 | --max-flops x | --beta -1
--label-smoothing 1 | --label-smoothing -0.1 | --warmup-epochs -1
--tau-lr inf | --b-scale -1 | --genotype {broken}/nodes3.json
--genotype {broken}/concat.json | --genotype DARTS_V2 --train-epochs 0 | --genotype DARTS_V2 --max-params 1
--genotype DARTS_V2 --max-flops 1 | --policy none | --search-only
--space cell | --space mobilenet --layers 20 | --space mobilenet --layers 6 --auxiliary-weight 0.4
--space mobilenet --layers 6 --genotype DARTS_V2""",
    "faa-darts": """--method autoaugment | --faa-epochs 0 | --faa-images 3 | --faa-batch-size 7
--faa-batch-size 2 | --faa-lr -1 | --policy-lr nan | --class-weight -1 | --critic-weight inf | --penalty -10
--penalty-norm l1 | --depth 39 | --depth 4 | --width 0 | --sub-policies 0 | --stages 0 | --search-channels 3
--tau-lr 0.1 | --no-da | --limit-train 3 | --train-epochs 0 | --policy none | --policy=none | --space mobilenet
--search-only | --processes 2 | --compare {broken}/nothing | --compare {broken} | --preset imagenet""",
    "sequential dha": """--lr 5 | --weight-decay 0.1 | --search-channels 4 | --train-epochs 0 | --genotype DARTS_V2
--genotype=DARTS_V2 | --policy none | --label-smoothing 1 | --space mobilenet --layers 20 | --data-dir {broken}/more
--auxiliary-weight 0.4 --image-size 16""",
}
CASES = [(name, f"{OWN[name]} | {BAD * (name != 'sequential dha')}") for name in OWN]
CASES = [(name, flags.strip()) for name, text in CASES for flags in re.split(r"[|\n]", text) if flags.strip()]


@pytest.mark.parametrize("script, flags", CASES, indirect=["script"])
def test_bad_input_is_one_line(script, flags, broken, tmp_path, one_line):
    """That of a later part too, before the first one starts."""
    before = contents(broken)
    assert script.run(*flags.format(broken=broken).split()) == 2
    said = one_line()
    assert "dha.json" not in flags or "policy of dha.py" in said
    assert contents(broken) == before and not list(tmp_path.iterdir())


def test_help_shows_the_preset_and_writes_nothing(script, tmp_path, capsys, one_line):
    of_quick = {joint: "768", dha: "0.04", baseline: "64"}[script.module]
    for flags, shown in (["--help"], False), (["--preset", "quick", "--help"], True):
        assert call(script.module, *flags) == 0
        said = re.sub(r"\s+", " ", capsys.readouterr().out)
        assert "--resume" in said and (f"(default: {of_quick})" in said) == shown
    if script.module is baseline:
        for flags in (["--preset", "quick"], ["--resume", "--out", "nothing"]):
            assert call(baseline, *flags) == 2 and "--method is missing" in one_line()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("world, size", [(3, 8), (8, 8), (2, 3)])
def test_batches_that_processes_cannot_share_are_refused(script, world, size, tmp_path, one_line, monkeypatch):
    for module in (joint, dha, baseline):
        monkeypatch.setattr(module, "WORLD", world)
    for name in ("init_process_group", "barrier"):
        monkeypatch.setattr(torch.distributed, name, lambda *args: None)
    assert script.run("--batch-size", size, "--out", tmp_path / "run") == 2
    assert "process" in one_line() and not (tmp_path / "run").exists()


def test_a_tilde_after_an_equals_sign_is_expanded(script, data, tmp_path, monkeypatch):
    """No shell does it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data").symlink_to(data)
    common.save_genotype(common.GENOTYPES["DARTS_V2"], tmp_path / "genotype.json")
    home = "--data-dir=~/data --genotype=~/genotype.json --out=~/run".split()
    stop_after_an_epoch(monkeypatch, script, *home)
    assert len(history(tmp_path / "run")) == 1
    if script.module is not baseline:
        assert common.load_genotype(tmp_path / "run" / "genotype.json") == common.GENOTYPES["DARTS_V2"]


def test_an_environment_of_others_does_no_harm(data, tmp_path):
    """No fcntl, as on Windows; WORLD_SIZE is not from torchrun; a notebook's MPLBACKEND is not in the way."""
    code = """if True:
        import runpy, sys
        sys.modules["fcntl"] = None
        sys.argv.pop(0)
        script = runpy.run_path(sys.argv[0], run_name="__main__")
        assert (script["RANK"], script["WORLD"]) == (0, 1)
        assert script["dha"] and sys.modules["fcntl"] is None
    """
    backend = "module://matplotlib_inline.backend_inline"
    others = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MPLBACKEND": backend, "OMP_NUM_THREADS": "1"}
    flags = f"{TINY} --method darts --dataset folder --data-dir {data} --genotype DARTS_V2 --train-epochs 1 --out run"
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, baseline.__file__, *flags.split()],
        env=os.environ | others | {"PYTHONPATH": str(Path(baseline.__file__).parent)}, capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "run" / "result.json").exists() and (tmp_path / "run" / "darts" / "cells.png").exists()


# -------- Parts that can be switched off, constraints -------------------------------------------------------


@only("dha")
def test_parts_of_dha_can_be_switched_off(script, tmp_path):
    plain, known = tmp_path / "plain", tmp_path / "known"
    assert script.run("--no-da", "--no-hpo", "--out", plain) == 0
    assert [record["lr"] for record in lines(plain)] == pytest.approx([0.05] * 3)
    assert [record["wd"] for record in lines(plain)] == pytest.approx([3e-4] * 3)
    assert [record["entropy"] for record in lines(plain)] == pytest.approx([5.278] * 3, abs=1e-3)  # log 196
    assert result(plain)["method"] == "One-Stage ISTA" and not (plain / "policy.json").exists()

    flags = "--no-hpo --genotype DARTS_V2 --train-epochs 2 --auxiliary-weight 0.4 --drop-path 0.2 --cutout 8"
    assert script.run(*flags.split(), "--out", known) == 0
    assert common.load_genotype(known / "genotype.json") == common.GENOTYPES["DARTS_V2"]
    assert dha.load_model(known / "model.pt")[0].genotype() == common.GENOTYPES["DARTS_V2"]
    assert lines(known)[1]["lr"] == pytest.approx(0.05 * (0.04 + 0.96 / 2))  # half the cosine
    assert result(known)["search_epochs"] == 0 and result(known)["method"] == "given genotype without HPO"


@only("dha")
def test_constraints_hold_and_metrics_name_what_was_trained(script, tmp_path, monkeypatch, capsys):
    real, trained, limits = dha.train_step, [], []

    def train_step(s, *args):
        trained.append(json.loads(json.dumps(s.net.support)))
        return real(s, *args)

    monkeypatch.setattr(dha, "train_step", train_step)
    for out in (tmp_path / "free", tmp_path / "limited"):
        trained.clear()
        flags = ["--seed", "1", "--arch-lr", "0.3", "--search-epochs", "4", *limits, "--out", out]
        assert script.run(*flags) == 0
        supports = [record["support"] for record in lines(out)]
        assert supports == trained[::2] == trained[1::2]  # two steps an epoch
        assert supports[3] == supports[4] and (limits or supports[0] != supports[1])
        net = dha.SparseSupernet(4, 10, 3, support=supports[0])
        first = {"params": common.count_parameters(net), "flops": common.count_flops(net, 32)}
        limits = ["--max-params", first["params"], "--max-flops", first["flops"]]
    assert all(result(out)[name] <= first[name] for name in first)
    decoded = lines(out)[:3]  # the fourth epoch decodes nothing
    rejected = [i for i, record in enumerate(decoded) if record["distances"] is None]
    assert rejected and capsys.readouterr().out.count("one stays") == len(rejected)
    assert all(supports[i] == supports[i + 1] for i in rejected)


@only("dha")
def test_limits_that_no_network_keeps_are_one_line(script, tmp_path, one_line, monkeypatch):
    """After 300 draws, which take no time here."""
    monkeypatch.setattr(dha, "cost_share", lambda *args: 2.0)
    monkeypatch.setattr(dha, "ista", lambda A, b, lam: (A.mT @ b.unsqueeze(-1)).squeeze(-1))
    assert script.run("--max-params", "1", "--out", tmp_path / "run") == 2
    assert "--max-params and --max-flops" in one_line() and not (tmp_path / "run").exists()


@only("dha")
def test_a_first_support_beyond_the_limits_is_replaced(script, tmp_path):
    assert script.run("--search-epochs", "1", "--train-epochs", "0", "--out", tmp_path / "free") == 0
    limit = result(tmp_path / "free")["params"] - 1
    flags = ["--search-epochs", "2", "--max-params", limit]
    assert script.run(*flags, "--out", tmp_path / "limited") == 0
    assert result(tmp_path / "limited")["params"] <= limit


@only("joint")
def test_search_only_policy_and_genotype_hand_over_files(script, tmp_path, one_line):
    first, second = tmp_path / "search", tmp_path / "train"
    assert script.run("--search-only", "--out", first) == 0
    assert "test_accuracy" not in result(first) and not (first / "model.pt").exists()
    assert result(first)["params"] > 0 and result(first)["epochs"] == 2
    given = ["--genotype", first / "genotype.json", "--policy", first / "policy.json"]
    assert script.run(*given, "--out", second) == 0
    for name in ("genotype.json", "policy.json"):
        assert json.loads((first / name).read_text()) == json.loads((second / name).read_text())
    said = result(second)
    assert said["search_epochs"] == 0 and said["method"] == "given genotype + given policy"
    assert said["params"] == result(first)["params"] and said["flops"] == result(first)["flops"]


@only("joint")
def test_plain_darts_has_no_policy_and_its_collapse_is_reported(script, tmp_path, monkeypatch, capsys):
    flags = "--policy none --search-epochs 1 --auxiliary-weight 0.4 --drop-path 0.2 --cutout 8".split()
    cell = [("skip_connect", i % 2) for i in range(8)]
    collapsed = common.Genotype(cell, [2, 3, 4, 5], cell, [2, 3, 4, 5])
    monkeypatch.setattr(joint.DartsSupernet, "genotype", lambda self: collapsed)
    assert script.run(*flags, "--out", tmp_path / "run") == 0
    assert not (tmp_path / "run" / "policy.json").exists() and result(tmp_path / "run")["method"] == "DARTS"
    record = lines(tmp_path / "run")[0]
    assert "selection" not in record and record["skip_connects"] == 8
    assert "warning: most operations of the normal cell are skip-connections" in capsys.readouterr().out


# -------- Several processes ---------------------------------------------------------------------------------

TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node 2"


@pytest.mark.slow
@only(*SCRIPTS)
def test_two_processes_train_one_network(script, tmp_path):
    process = script.process("--out", tmp_path / "run", launch=TORCHRUN)
    said = process.communicate()[0]
    assert process.returncode == 0, said
    assert len(re.findall(r"^epoch \d+  ", said, re.M)) == len(script.phases)
    assert [record["phase"] for record in lines(tmp_path / "run")] == script.phases
    assert all(value.isfinite().all() for value in weights(tmp_path / "run").values())


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--wrong-flag", "--lr nan", "--data-dir {broken}/more", "--batch-size 3"])
def test_a_mistake_of_several_processes_has_its_line(script, flags, broken, tmp_path):
    flags = [*flags.format(broken=broken).split(), "--out", tmp_path / "run"]
    process = script.process(*flags, launch=TORCHRUN)
    said = process.communicate()[0]
    assert process.returncode != 0 and not (tmp_path / "run").exists()
    assert re.search("^([a-z_]+[.]py: )?error: ", said, re.M), said
