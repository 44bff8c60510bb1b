"""Whole runs of the three scripts: what they leave, repeatability, stops and resumes, faults, bad input."""

import errno
import fcntl
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
from conftest import call
from PIL import Image

import baseline_sequential as baseline
import common
import dha
import joint_darts_faa as joint

TIMES = {"seconds", "search_seconds", "gpu_hours"}  # of result.json
ALL = (joint, dha, baseline)
only = lambda *names: pytest.mark.parametrize("script", names, indirect=True)


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """They take longer than the runs (those in `done` have them)."""
    for module in ALL:
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


def assert_same(a: Path, b: Path) -> None:
    """Two runs ended alike, bit for bit: result without its times, metrics, files, weights."""
    first, second = ({k: v for k, v in result(out).items() if k not in TIMES} for out in (a, b))
    assert first == second
    for name in ("metrics.jsonl", "genotype.json", "policy.json"):
        assert (a / name).exists() == (b / name).exists(), name
        assert not (a / name).exists() or (a / name).read_bytes() == (b / name).read_bytes(), name
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys() and all(torch.equal(v, second[k]) for k, v in first.items())


def after_every_epoch(monkeypatch, act) -> None:
    """act(directory) once the checkpoint of an epoch is saved."""
    for module in ALL:

        def end_and_act(self, *args, real=module.RunDirectory.end_epoch, **state):
            real(self, *args, **state)
            act(self)

        monkeypatch.setattr(module.RunDirectory, "end_epoch", end_and_act)


def interrupt(directory) -> None:
    raise KeyboardInterrupt


def stop_after_an_epoch(monkeypatch, script, *flags) -> None:
    """Run until the next epoch's end, and press Ctrl-C there."""
    with monkeypatch.context() as patch:
        after_every_epoch(patch, interrupt)
        assert script.run(*flags) == 1


# -------- What a run leaves, and that nothing is overwritten ------------------------------------------------


def test_a_run_leaves_what_the_readme_says(script, done):
    names = "config.json metrics.jsonl checkpoint.pt genotype.json policy.json model.pt result.json"
    for name in [*names.split(), "curves.png", *script.files]:
        assert (done / name).stat().st_size > 0, name
        if name.endswith(".png"):
            with Image.open(done / name) as picture:
                assert min(picture.size) > 300
    assert not list(done.rglob("*.part"))

    config, source = json.loads((done / "config.json").read_text()), Path(script.module.__file__)
    assert (done / source.name).read_bytes() == source.read_bytes() and config["script"] == source.name
    assert config["args"]["seed"] == 0 and config["processes"] == 1 and config["device"] == "cpu"
    assert config["torch"] == torch.__version__ and config["python"] == sys.version
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=source.parent, capture_output=True, text=True)
    assert config["git_commit"] == (git.stdout.strip() or None)

    own = [record for record in lines(done) if "stage" not in record]
    assert own == history(done) and [record["epoch"] for record in own] == list(range(1, len(own) + 1))
    assert [record["phase"] for record in own] == script.phases

    net, info = (dha.load_model if script.module is dha else joint.load_network)(done / "model.pt")
    said, policy = result(done), json.loads((done / "policy.json").read_text())
    methods = {joint: "DARTS + Faster AA", dha: "DHA", baseline: "Faster AA, then DARTS"}
    assert said["method"] == methods[script.module]
    assert (said["dataset"], said["seed"]) == ("folder", 0)
    assert not net.training and info["classes"] == sorted(info["classes"]) and len(info["classes"]) == 10
    assert said["params"] == sum(p.numel() for p in net.parameters()) == common.count_parameters(net)
    assert said["flops"] == common.count_flops(net, 32) and said["seconds"] > said["search_seconds"] > 0
    assert said["gpu_hours"] == pytest.approx(said["seconds"] / 3600)  # one process
    assert said["genotype"] == str(common.load_genotype(done / "genotype.json"))
    assert said["test_accuracy"] == lines(done)[-1]["test_accuracy"]

    test = common.load_data("folder", settings(done)["data_dir"])
    with torch.no_grad():
        answers = net(common.normalize(test.test_images, info["mean"], info["std"])).argmax(1)
    assert said["test_accuracy"] == 100 * (answers == test.test_labels).sum().item() / 20

    if script.module is dha:
        assert policy["operations"] == list(dha.AUGMENTATIONS)
        assert sum(map(sum, policy["probability"])) == pytest.approx(1)
    else:
        images = torch.rand(4, 3, 32, 32)
        assert joint.augment(images, joint.load_policy(done / "policy.json")).shape == images.shape
        assert sum(own[0]["selection"].values()) == pytest.approx(1, abs=1e-4)


@only("baseline")
def test_stages_hand_over_files_and_their_epochs_follow_one_another(script, done):
    assert [record["epoch"] for record in lines(done) if record.get("stage") == "darts"] == [1, 2, 3, 4]
    assert lines(done)[3:] == [{"stage": "darts", **record} for record in lines(done / "darts")]
    assert settings(done / "darts")["policy"] == str(done / "policy.json")
    assert (done / "policy.json").read_bytes() == (done / "darts" / "policy.json").read_bytes()
    own, darts = torch.load(done / "checkpoint.pt")["seconds"]["all"], result(done / "darts")
    for key in TIMES:  # Faster AutoAugment's time is search
        mine = own / 3600 if key == "gpu_hours" else own
        assert result(done)[key] == pytest.approx(mine + darts[key])
    assert (result(done)["epochs"], result(done)["search_epochs"]) == (3 + 4, 3 + 2)


@only("sequential dha")
def test_sequential_dha_trains_what_its_first_stage_found(script, tmp_path):
    flags = ["--processes", "2", "--out", tmp_path / "run"]
    assert script.run(*flags) == script.run(*flags, "--resume") == 0
    first, second = (settings(tmp_path / "run" / name) for name in ("search", "train"))
    assert first["no_da"] and first["no_hpo"] and first["train_epochs"] == 0
    assert not second["no_da"] and not second["no_hpo"] and second["train_epochs"] == 1
    found = common.load_genotype(tmp_path / "run" / "search" / "genotype.json")
    assert result(tmp_path / "run" / "train")["genotype"] == str(found)
    assert found == common.load_genotype(tmp_path / "run" / "genotype.json")
    assert [record["stage"] for record in lines(tmp_path / "run")] == ["search", "search", "train"]
    said = result(tmp_path / "run")
    assert (said["method"], said["epochs"], said["search_epochs"]) == ("Sequential DHA", 3, 2)


def test_a_finished_run_is_evaluated_and_stays_as_it_is(script, done, capsys, one_line):
    before = contents(done)
    assert call(script.module, "--evaluate", done, "--gpu", -1) == 0
    assert f"test accuracy: {result(done)['test_accuracy']:.2f} % of 20 images" in capsys.readouterr().out
    assert call(script.module, "--evaluate", done, "--dataset", "shapes") == 2
    assert "other classes" in one_line()
    assert call(script.module, "--resume", "--out", done) == script.run("--out", done, "--resume") == 0
    assert capsys.readouterr().out.count("finished already") == 2
    assert script.run("--out", done) == 2
    assert "--resume" in one_line()
    for other in set(ALL) - {script.module}:
        assert call(other, "--resume", "--out", done) == 2
        assert f"holds a run of {Path(script.module.__file__).name}" in one_line()
    assert contents(done) == before


CONTRADICTIONS = "--limit-test 9 | --seed 1 | --preset paper | --preset imagenet | --dataset shapes | --image-size 16"
CONTRADICTIONS += " | --layers 4 | --lr 0.01 | --search-epochs 3 | --no-such-flag"


@pytest.mark.parametrize("flags", CONTRADICTIONS.split(" | "))
def test_a_flag_that_contradicts_the_run_is_refused(script, copy, flags, one_line):
    before = contents(copy)
    assert call(script.module, "--resume", "--out", copy, *flags.split()) == 2
    said = one_line().replace("-", "_")  # a baseline has flags of its stages in `rest`
    assert flags.split()[0][2:].replace("-", "_") in said or (script.module is baseline and "rest = " in said)
    assert contents(copy) == before


def test_a_foreign_directory_is_not_touched_and_an_unused_one_is_none(script, tmp_path, one_line, monkeypatch):
    notes = tmp_path / "notes" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    for flags in ([], ["--resume"]):
        for out in (notes.parent, notes):
            assert script.run("--out", out, *flags) == 2
            one_line()
    assert contents(tmp_path) == {notes: b"mine"}
    notes.unlink()
    notes.parent.rmdir()

    # Empty, or with what a start may leave that is killed before it has saved config.json
    source = Path(script.module.__file__).name
    left = ["metrics.jsonl", source, "config.json.part"]
    for i in range(4):
        names, out = left[:i], tmp_path / str(i)
        out.mkdir()
        for name in names:
            (out / name).write_text("{")
        stop_after_an_epoch(monkeypatch, script, "--out", out, *["--resume"] * (i % 2))
        assert len(lines(out)) == 1 and settings(out)["seed"] == 0, names


def test_a_run_of_small_images_and_another_seed_needs_its_directory_alone(script, tmp_path, capsys):
    out = tmp_path / "run"
    assert script.run(*script.least, "--image-size", "16", "--seed", "1", "--out", out) == 0
    assert call(script.module, "--evaluate", out) == 0
    said = capsys.readouterr().out
    assert f"test accuracy: {result(out)['test_accuracy']:.2f} % " in said and "matplotlib is missing" in said
    assert result(out)["seed"] == 1 and not list(out.rglob("c*.png"))


# -------- Repeatability, stops, damage ----------------------------------------------------------------------


def test_stopped_after_every_epoch_it_ends_the_same(script, done, tmp_path, monkeypatch, capsys):
    """The command starts the run, then goes on with it; later --out is enough."""
    out = tmp_path / "run"
    for number, flags in enumerate([script.short, []] * len(lines(done)), 1):
        if number > len(lines(done)):
            break
        stop_after_an_epoch(monkeypatch, script._replace(short=flags), "--out", out, "--resume")
        assert "\nstopped: the same command with --resume goes on" in capsys.readouterr().err
        folders = [folder for folder in (out, out / "darts") if (folder / "checkpoint.pt").exists()]
        assert sum(len(history(folder)) for folder in folders) == number
        assert [record for record in lines(folders[-1]) if "stage" not in record] == history(folders[-1])
    assert call(script.module, "--out", out, "--resume") == 0
    assert_same(out, done)


def test_metrics_are_those_of_the_checkpoint(script, done, copy):
    """Killed between the two, one has a line more; a crash of the machine may leave anything."""
    good = (copy / "metrics.jsonl").read_text()
    for text in ("", good[:-5], good + good.splitlines()[-1] + "\n", good + '{"epoch": 9', "\0" * 99):
        (copy / "metrics.jsonl").write_text(text)
        assert script.run("--resume", "--out", copy) == 0
        assert_same(copy, done)
        (copy / "result.json").unlink()


def test_a_moved_run_resumes_with_other_places(script, done, data, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(done, moved)
    for folder in (moved, moved / "darts"):
        (folder / "result.json").unlink(missing_ok=True)
    shutil.copytree(data, tmp_path / "data")
    places = ["--data-dir", tmp_path / "data", "--workers", "0", "--gpu", "-1"]
    assert call(script.module, "--resume", "--out", moved, *places) == 0
    assert_same(moved, done)


@only("joint", "dha")
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


HARMS = [("config.json", "no args"), ("config.json", "no script")]
HARMS += [(name, content) for name in ("config.json", "the other") for content in (b"garbage", b"[]", b"", b"\xff\0", None)]


@pytest.mark.parametrize("mode", ["--resume --out", "--evaluate"])
@pytest.mark.parametrize("name, harm", HARMS)
def test_a_damaged_run_is_one_line(script, copy, mode, name, harm, one_line):
    """harm: what the file holds instead, None: its first half, or what config.json lacks."""
    if name == "the other":
        name = "model.pt" if mode == "--evaluate" else "checkpoint.pt"
    for path in copy.rglob(name):
        content = path.read_bytes()
        if isinstance(harm, str):
            config = json.loads(content)
            del config[harm.split()[1]]
            path.write_text(json.dumps(config))
        else:
            path.write_bytes(content[: len(content) // 2] if harm is None else harm)
    assert call(script.module, *mode.split(), copy) == 2
    assert name in one_line()


def test_another_file_for_a_checkpoint_is_one_line(script, copy, one_line):
    shutil.copy(copy / "model.pt", copy / "checkpoint.pt")
    assert script.run("--resume", "--out", copy) == 2
    assert "checkpoint.pt" in one_line()


@only("joint", "dha")
def test_a_process_alone_ends_with_the_same_bits_and_ctrl_c_says_how_to_go_on(script, done, tmp_path):
    """A fresh process, and this one after it."""
    out = tmp_path / "run"
    process = script.process("--out", out, "--search-epochs", "2", "--train-epochs", "300")
    assert any("epoch 3" in line for line in iter(process.stdout.readline, ""))
    assert call(script.module, "--out", out, "--resume") == 2  # it is locked
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and "Traceback" not in said, said
    assert said.endswith("\nstopped: the same command with --resume goes on after the last epoch\n")
    assert lines(out) == history(out) and lines(out)[:2] == lines(done)[:2]


def session(script, *flags) -> subprocess.Popen:
    """A run in a process group of its own, stages included."""
    return script.process(*flags, start_new_session=True, stdout=None, stderr=None)


@pytest.mark.slow
@only("joint", "dha", "baseline", "sequential dha")
def test_killed_ten_times_and_resumed_ends_the_same(script, tmp_path):
    flags = ["--search-epochs", "4", "--train-epochs", "6"]
    flags += ["--faa-epochs", "6"] * (script.module is baseline)
    begun, moment = time.time(), random.Random(0)
    assert session(script, *flags, "--out", tmp_path / "whole").wait() == 0
    whole = time.time() - begun
    for _ in range(10):
        process = session(script, *flags, "--out", tmp_path / "cut", "--resume")
        time.sleep(moment.uniform(0.2, 0.9) * whole)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert session(script, *flags, "--out", tmp_path / "cut", "--resume").wait() == 0
    assert_same(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.slow
@only("sequential dha")
def test_a_stage_that_outlives_its_baseline_keeps_its_directory(script, tmp_path, capsys):
    flags = ["--search-epochs", "60", "--out", tmp_path / "run"]
    process = session(script, *flags)
    while not (tmp_path / "run" / "search" / "checkpoint.pt").exists():
        time.sleep(0.1)
    process.kill()
    process.wait()
    assert script.run(*flags, "--resume") == 2
    assert f"another process is writing {tmp_path / 'run' / 'search'}" in capsys.readouterr().err
    while not (tmp_path / "run" / "search" / "result.json").exists():  # it ends by itself
        time.sleep(0.1)
    time.sleep(3)
    assert script.run(*flags, "--resume") == 0
    assert len(lines(tmp_path / "run")) == 61


# -------- Faults: one line, an exit code, the last checkpoint kept ------------------------------------------


@pytest.mark.parametrize("name", ["x.pt", "x.json"])
def test_a_file_is_written_whole_or_not_at_all(name, tmp_path, monkeypatch):
    path, part = tmp_path / name, tmp_path / f"{name}.part"
    for size in (1, 100_000):  # less than a buffer, and more
        content = {"numbers": list(map(float, range(size))), "tensor" * (name == "x.pt"): None}
        dha.save(path, content)
        good = path.read_bytes()
        part.symlink_to("/dev/full")
        with pytest.raises(OSError, match="No space left"):
            dha.save(path, content)
        part.unlink()
        with monkeypatch.context() as patch, pytest.raises(OSError):
            patch.setattr(os, "fsync", lambda file: os.truncate(part, 1) or os.write(-1, b""))
            dha.save(path, {"other": 1})
        assert path.read_bytes() == good
        dha.save(path, {"other": 1})
        assert path.read_bytes() != good and not part.exists()


def test_a_full_disk_is_one_line_and_costs_nothing(script, done, tmp_path, one_line, capsys, monkeypatch):
    out = tmp_path / "run"
    stop_after_an_epoch(monkeypatch, script, "--out", out)
    capsys.readouterr()
    for name in ("checkpoint.pt", "metrics.jsonl", "result.json"):
        with monkeypatch.context() as patch:
            if name == "metrics.jsonl":
                real = script.module.RunDirectory.end_epoch

                def end_epoch(self, *args, **state):
                    self.log = open("/dev/full", "a")
                    real(self, *args, **state)

                patch.setattr(script.module.RunDirectory, "end_epoch", end_epoch)
            else:
                (out / f"{name}.part").symlink_to("/dev/full")
            assert script.run("--resume", "--out", out) == 2
        assert "No space left" in one_line()
        (out / f"{name}.part").unlink(missing_ok=True)
        assert not (out / "result.json").exists()
        assert len(history(out)) == {"checkpoint.pt": 1, "metrics.jsonl": 2}.get(name, len(script.phases))
    assert script.run("--resume", "--out", out) == 0
    assert_same(out, done)


@only("joint", "dha")
def test_a_genotype_that_a_full_disk_cut_is_not_read_again(script, tmp_path, monkeypatch, one_line):
    def full(path, text):
        path.write_bytes(b"{")
        raise OSError(errno.ENOSPC, "No space left on device")

    flags = ["--genotype", "DARTS_V2", "--out", tmp_path / "run"]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        assert script.run(*flags) == 2
    assert "No space left" in one_line()
    assert script.run(*flags, "--resume") == 0
    assert common.load_genotype(tmp_path / "run" / "genotype.json") == common.GENOTYPES["DARTS_V2"]


def failing_after_a_checkpoint(out: Path, monkeypatch, error: Exception | None) -> None:
    """From then on a step raises the error, or its loss is not a number."""
    real = common.normalize

    def normalize(*args):
        failing = (out / "checkpoint.pt").exists()
        if failing and error:
            raise error
        return real(*args) * (torch.nan if failing else 1)

    monkeypatch.setattr(common, "normalize", normalize)


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


def test_too_little_gpu_memory_is_one_line(script, tmp_path, one_line, monkeypatch):
    error = torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
    failing_after_a_checkpoint(tmp_path / "run", monkeypatch, error)
    assert script.run("--out", tmp_path / "run") == 2
    assert one_line() == "error: CUDA out of memory." and len(history(tmp_path / "run")) == 1


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, getattr(torch, "AcceleratorError", ArithmeticError)])
def test_other_errors_keep_their_traceback(script, kind, tmp_path, monkeypatch):
    failing_after_a_checkpoint(tmp_path / "run", monkeypatch, kind("device-side assert triggered"))
    with pytest.raises(kind, match="device-side"):
        script.run("--out", tmp_path / "run")
    assert len(history(tmp_path / "run")) == 1


@only("sequential dha")
def test_a_stage_that_fails_ends_the_baseline_with_its_code(script, tmp_path, capsys, monkeypatch):
    for code in (1, 2, 9):
        monkeypatch.setattr(dha, "run_dha", lambda *args: sys.exit(code))
        assert script.run("--out", tmp_path / "run", "--resume") == code
        assert capsys.readouterr().err == ""
    assert not (tmp_path / "run" / "train").exists() and not (tmp_path / "run" / "result.json").exists()


def test_a_directory_in_use_is_one_line(script, copy, tmp_path, one_line):
    (tmp_path / "new").mkdir()  # another process has just made it
    with open(tmp_path / "new" / "metrics.jsonl", "w") as new, open(copy / "metrics.jsonl") as old:
        fcntl.flock(new, fcntl.LOCK_EX)
        assert script.run("--out", tmp_path / "new") == 2
        assert f"another process is writing {tmp_path / 'new'}" in one_line()
        assert os.listdir(tmp_path / "new") == ["metrics.jsonl"]

        before, held = contents(copy), copy
        if script.module is baseline:  # its stage lives on
            held = copy / "darts"
            (held / "result.json").unlink()
            old = open(held / "metrics.jsonl")
        fcntl.flock(old, fcntl.LOCK_EX)
        assert script.run("--resume", "--out", copy) == 2
        assert f"another process is writing {held}" in one_line()
        assert contents(held).items() <= before.items()
        old.close()
    assert script.run("--resume", "--out", copy) == 0


# -------- Bad input: one line that says what to do, exit 2, no traceback, nothing written -------------------

BAD = """--wrong-flag | word | --dataset cifar1000 | --preset fast | --seed one | --seed -1
--seed 99999999999999 | --gpu two | --gpu 77 | --gpu -2 | --amp | --workers -1 | --workers many
--search-epochs 0
--train-epochs -3 | --batch-size 1 | --batch-size 1.5 | --channels 7 | --channels | --layers 2 | --lr nan
--lr -1 | --weight-decay -1 | --weight-decay inf | --drop-path 1 | --drop-path -1 | --limit-train 1
--limit-train many | --limit-test 0 | --image-size 4 | --cutout -1
--label-smoothing 1 | --label-smoothing -0.1 | --warmup-epochs -1
--auxiliary-weight 0.4 --image-size 16 | --dataset cifar10 --data-dir {broken}/file | --data-dir {broken}/file
--data-dir {broken}/nothing | --data-dir {broken}/empty | --data-dir {broken}/damaged | --out {broken}/file
--data-dir {broken}/one_class | --data-dir {broken}/sizes | --data-dir {broken}/wide
--data-dir {broken}/more | --data-dir {broken}/hollow
--out {broken}/file/run | --genotype DARTS_V9 | --genotype {broken}/file
--genotype {broken}/damaged.json
--genotype {broken} | --evaluate {broken}/nothing | --evaluate {broken}"""
OWN = {
    "joint": """--search-batch-size 1 | --search-channels 3 | --search-layers 2 | --arch-lr -1 | --stages 0
--sub-policies 0 | --policy-lr nan | --limit-train 3 | --search-images 3 | --train-epochs 0 | --no-da
--policy {broken}/nothing | --policy {broken}/file | --policy {broken}/damaged.json
--policy {broken}/policy.json | --method dha | --space mobilenet
--search-only --genotype DARTS_V2 --policy none""",
    "dha": """--lr 5 | --weight-decay 0.5 | --max-params 0 | --max-flops x | --beta-lr -1
--tau-lr inf | --b-scale -1 | --genotype {broken}/nodes3.json
--genotype {broken}/concat.json | --genotype DARTS_V2 --train-epochs 0 | --genotype DARTS_V2 --max-params 1
--genotype DARTS_V2 --max-flops 1 | --policy none | --search-only
--space cell | --space mobilenet --layers 20 | --space mobilenet --layers 6 --auxiliary-weight 0.4
--space mobilenet --layers 6 --genotype DARTS_V2""",
    "baseline": """--method autoaugment | --processes 0 | --faa-epochs 0 | --faa-images 3 | --faa-batch-size 7
--faa-batch-size 2 | --faa-lr -1 | --policy-lr nan | --class-weight -1 | --critic-weight inf | --penalty -10
--depth 39 | --depth 4 | --width 0 | --sub-policies 0 | --stages 0 | --search-channels 3 | --tau-lr 0.1
--no-da | --limit-train 3 | --train-epochs 0 | --policy none | --policy=none | --space mobilenet
--search-only | --compare {broken}/nothing | --compare {broken}""",
    "sequential dha": """--lr 5 | --weight-decay 0.1 | --search-channels 4 | --train-epochs 0
--label-smoothing 1 | --space mobilenet --layers 20""",
}
CASES = [(name, f"{OWN[name]} | {BAD * (name != 'sequential dha')}") for name in OWN]
CASES = [(name, flags.strip()) for name, text in CASES for flags in re.split(r"[|\n]", text) if flags.strip()]


@pytest.mark.parametrize("script, flags", CASES, indirect=["script"])
def test_bad_input_is_one_line(script, flags, broken, tmp_path, one_line, monkeypatch):
    """That of a later stage too, before the first one starts."""
    monkeypatch.chdir(tmp_path)
    before = contents(broken)
    assert script.run(*flags.format(broken=broken).split()) == 2
    one_line()
    assert contents(broken) == before and not list(tmp_path.iterdir())


def test_help_and_check_write_nothing(script, tmp_path, monkeypatch, capsys, one_line):
    monkeypatch.chdir(tmp_path)
    assert call(script.module, "--help") == 0
    said = capsys.readouterr().out
    assert "--resume" in said and "(default: 4)" in said
    assert script.run("--check") == script.run("--check", "--out", tmp_path / "run") == 0
    if script.module is baseline:
        for flags in (["--preset", "quick"], ["--resume", "--out", "nothing"]):
            assert call(baseline, *flags) == 2 and "--method is missing" in one_line()
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
        assert script.run() == 2 and "torchrun" in one_line()
    assert not list(tmp_path.iterdir())


@only("joint", "dha")
def test_batches_that_processes_cannot_share_are_refused(script, tmp_path, one_line, monkeypatch):
    for world, flags in (2, []), (3, ["--batch-size", "8"]), (8, ["--batch-size", "8"]), (2, ["--batch-size", "3"]):
        with monkeypatch.context() as patch:
            patch.setattr(script.module, "WORLD", world)
            patch.setattr(torch.distributed, "init_process_group", lambda *args: None)
            patch.setattr(torch.distributed, "barrier", lambda: None)
            if flags:
                assert script.run(*flags, "--out", tmp_path / "run") == 2
                assert "process" in one_line()
            else:
                assert script.run("--check", "--out", tmp_path / "run") == 0
    assert not (tmp_path / "run").exists()


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
    """WORLD_SIZE without torchrun's other variables is not torchrun; a notebook's MPLBACKEND is not in the way."""
    code = """if True:
        import pathlib, runpy, sys
        folder, data = sys.argv[1:]
        for name in ("dha", "joint_darts_faa"):
            sys.argv[1:] = ["--check", "--gpu", "-1", "--dataset", "folder", "--data-dir", data, "--auxiliary-weight", "0"]
            script = runpy.run_path(name + ".py", run_name="__main__")
            assert (script["RANK"], script["WORLD"]) == (0, 1)
            script["draw_curves"](pathlib.Path(folder, name + ".png"), [], {"a": [], "b": []})
    """
    others = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path), str(data)],
        cwd=Path(dha.__file__).parent, env=os.environ | others, capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0 and len(list(tmp_path.glob("*.png"))) == 2, process.stderr


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
        edges = [tuple(edge) for node in supports[0] for edge in node]
        net = dha.SparseSupernet(4, 10, 3)
        net.prune(common.Genotype(edges[:8], [2, 3, 4, 5], edges[8:], [2, 3, 4, 5]))
        first = {"params": common.count_parameters(net), "flops": common.count_flops(net, 32)}
        limits = ["--max-params", first["params"], "--max-flops", first["flops"]]
    assert all(result(out)[name] <= first[name] for name in first)
    rejected = [i for i, record in enumerate(lines(out)[:3]) if record["moved"] is None]  # the fourth epoch decodes nothing
    assert rejected and capsys.readouterr().out.count("one stays") == len(rejected)
    assert all(supports[i] == supports[i + 1] for i in rejected)


@only("dha")
def test_limits_that_no_network_keeps_are_one_line(script, tmp_path, one_line, monkeypatch):
    """After 300 draws, which take 20 seconds with the true ista."""
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


# -------- The table of runs ---------------------------------------------------------------------------------


def table(capsys, *folders: Path) -> list[list[str]]:
    """The rows that --compare prints: their cells."""
    assert call(baseline, "--compare", *folders) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def pretend(out: Path, module, argv: str, **numbers) -> Path:
    """What --compare reads of a run with this command line."""
    args = vars(module.parse_args(argv.split()))
    said = {"method": module.__name__, "dataset": args["dataset"], "test_accuracy": 90.0, "params": 1.5e6}
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps({"args": args}))
    said |= {"seconds": 7200.0, "search_seconds": 3600.0, "gpu_hours": 8.0} | numbers
    (out / "result.json").write_text(json.dumps(said))
    return out


def test_compare_has_a_row_for_every_method_and_data_set(tmp_path, capsys):
    quick = "--preset quick"
    for seed, flags in enumerate((quick, f"{quick} --lr 0.05 --workers 2", f"--lr 5e-2 {quick}")):
        pretend(tmp_path / "runs" / str(seed), dha, f"{flags} --seed {seed}", test_accuracy=80.0 + seed)
    others = pretend(tmp_path / "a", joint, quick), pretend(tmp_path / "b", joint, "--dataset cifar10")
    rows = table(capsys, *(tmp_path / "runs").iterdir(), *others, tmp_path / "runs" / "1")
    assert [row[:4] for row in sorted(rows)] == [
        ["dha", "shapes", "3", "81.00 ± 1.00"],
        ["joint_darts_faa", "cifar10", "1", "90.00"],
        ["joint_darts_faa", "shapes", "1", "90.00"],
    ]
    assert sorted(rows)[0][4:] == ["1.5 M", "1.00", "8.00", ""]


@pytest.mark.parametrize("module, base, flags, rows", [
    (dha, "--preset quick", ["", "--lr 0.01", "--lr 1e-2 --seed 3"], {"lr 0.05": "1", "lr 0.01": "2"}),
    (dha, "--dataset folder", ["", "--data-dir x"], {"data_dir data": "1", "data_dir x": "1"}),
    (dha, "--dataset shapes --seed 1", ["", "--preset paper", "--lr 0.025"], {"": "3"}),
    (joint, "--preset quick", ["", "--policy none", "--policy none --seed 1"], {"policy None": "1", "policy none": "2"}),
    (baseline, "--method dha --preset quick", ["--lr 0.01", "--lr 0.01 --seed 2", ""],
     {"rest []": "1", "rest ['--lr', '0.01']": "2"}),
    (baseline, "--method darts", ["--dataset imagenet", "--dataset imagenet --seed 1", "--preset imagenet"],
     {"preset paper": "2", "preset imagenet": "1"}),  # whose stages have other settings
])  # fmt: skip
def test_compare_splits_rows_by_values_that_differ(module, base, flags, rows, tmp_path, capsys):
    for number, more in enumerate(flags):
        pretend(tmp_path / str(number), module, f"{base} {more}")
    assert {row[7]: row[2] for row in table(capsys, *tmp_path.iterdir())} == rows


def test_compare_passes_over_searches_and_reports_damage(tmp_path, capsys, one_line):
    whole, search = (pretend(tmp_path / name, joint, "") for name in ("whole", "search"))
    (search / "result.json").write_text((search / "result.json").read_text().replace("test_acc", ""))
    (tmp_path / "unfinished").mkdir()
    assert len(table(capsys, *tmp_path.iterdir())) == 1
    assert call(baseline, "--compare", search) == 2 and one_line()
    good = contents(whole)
    for path in good:
        for content in ("", "garbage", "[]", '{"test_accuracy": 1}', '{"args": 3}', '{"args": []}'):
            path.write_text(content)
            assert call(baseline, "--compare", whole) == 2 and str(whole) in one_line()
        path.write_bytes(good[path])
    (whole / "result.json").write_text((whole / "result.json").read_text().replace("90.0", '"high"'))
    assert call(baseline, "--compare", whole) == 2 and str(whole) in one_line()


# -------- Several processes ---------------------------------------------------------------------------------

TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node 2"


@pytest.mark.slow
@only("joint", "dha")
def test_two_processes_train_one_network(script, tmp_path):
    process = script.process("--out", tmp_path / "run", launch=TORCHRUN)
    said = process.communicate()[0]
    assert process.returncode == 0, said
    assert all(len(re.findall(rf"^epoch {n}  ", said, re.M)) == 1 for n in range(1, len(script.phases) + 1))
    assert [record["phase"] for record in lines(tmp_path / "run")] == script.phases
    assert json.loads((tmp_path / "run" / "config.json").read_text())["processes"] == 2
    assert all(value.isfinite().all() for value in weights(tmp_path / "run").values())
    said = result(tmp_path / "run")
    assert said["gpu_hours"] == pytest.approx(2 * said["seconds"] / 3600)


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--wrong-flag", "--lr nan", "--data-dir {broken}/more", "--batch-size 3"])
def test_a_mistake_of_several_processes_has_its_line(script, flags, broken, tmp_path):
    flags = [*flags.format(broken=broken).split(), "--out", tmp_path / "run"]
    if script.module is baseline:
        process = script.process(*flags, "--processes", "2")
    else:
        process = script.process(*flags, launch=TORCHRUN)
    said = process.communicate(timeout=120)[0]
    assert process.returncode != 0 and not (tmp_path / "run").exists()
    assert re.search("^([a-z_]+[.]py: )?error: ", said, re.M), said


@pytest.mark.slow
@only("sequential dha")
def test_stages_under_torchrun_are_killed_with_the_baseline_and_go_on(script, tmp_path):
    flags = ["--processes", "2", "--search-epochs", "10", "--out", tmp_path / "run"]
    process = session(script, *flags)
    while not (tmp_path / "run" / "search" / "checkpoint.pt").exists():
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(10)  # torchrun's processes have groups of their own; they end once their partner is gone
    process = script.process(*flags, "--resume")
    said = process.communicate()[0]
    assert process.returncode == 0, said
    assert json.loads((tmp_path / "run" / "train" / "config.json").read_text())["processes"] == 2
