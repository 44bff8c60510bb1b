"""Whole runs of the three scripts: what they leave, repeatability, stops and resumes, faults, bad input."""

import fcntl
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import matplotlib.pyplot
import pytest
import torch
from conftest import FILES, SCRIPTS, StagesInProcess
from PIL import Image

import baseline_sequential as baseline
import common
import dha
import joint_darts_faa as joint

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def only(*names):
    """Run a test for these scripts alone."""
    return pytest.mark.parametrize("script", names, indirect=True)


@pytest.fixture(autouse=True)
def no_traces(monkeypatch):
    """Signal handlers as before; no figures, which take longer than the runs (the runs in `done` have them)."""
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def result(out: Path) -> dict:
    return json.loads((out / "result.json").read_text())


def weights(out: Path) -> dict:
    return torch.load(out / "model.pt", weights_only=True)["state_dict"]


def settings(out: Path) -> dict:
    return json.loads((out / "config.json").read_text())["args"]


def assert_same(a: Path, b: Path) -> None:
    """Two runs ended alike, bit for bit: result without its times, metrics, files, weights."""
    results = [{k: v for k, v in result(out).items() if "seconds" not in k} for out in (a, b)]
    assert results[0] == results[1]
    for name in ("metrics.jsonl", "genotype.json", "policy.json"):
        assert (a / name).exists() == (b / name).exists()
        assert not (a / name).exists() or (a / name).read_bytes() == (b / name).read_bytes()
    assert weights(a).keys() == weights(b).keys()
    assert all(torch.equal(v, weights(b)[k]) for k, v in weights(a).items())


def contents(folder: Path) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def history(out: Path) -> list[dict]:
    return dha.load_checkpoint(out)["history"]


# What a run leaves, and that nothing is overwritten.


def test_a_run_leaves_what_the_readme_says(script, done):
    for name in FILES + script.files:
        assert (done / name).stat().st_size > 0, name
        if name.endswith(".png"):
            with Image.open(done / name) as picture:
                assert min(picture.size) > 300
    assert not list(done.rglob("*.part"))
    config = json.loads((done / "config.json").read_text())
    source = Path(script.module.__file__)
    assert (done / source.name).read_bytes() == source.read_bytes() and config["script"] == source.name
    assert config["args"]["seed"] == 0 and config["processes"] == 1 and config["torch"] == torch.__version__
    own = [record for record in lines(done) if "stage" not in record]
    assert own == json.loads(json.dumps(history(done)))
    assert [record["epoch"] for record in own] == list(range(1, len(script.phases) + 1))
    assert [record["phase"] for record in own] == script.phases
    said = result(done)
    net = (dha.load_model if script.module is dha else joint.load_network)(done / "model.pt")[0]
    assert said["params"] == sum(p.numel() for p in net.parameters()) == common.count_parameters(net)
    assert said["flops"] == common.count_flops(net, 32) and said["seconds"] > said["search_seconds"] > 0
    assert said["genotype"] == str(common.load_genotype(done / "genotype.json"))
    assert said["test_accuracy"] == lines(done)[-1]["test_accuracy"] and said["dataset"] == "folder"
    methods = {joint: "DARTS + Faster AA", dha: "DHA", baseline: "Faster AA, then DARTS"}
    assert said["method"] == methods[script.module]
    policy = json.loads((done / "policy.json").read_text())
    if script.module is dha:
        assert policy["operations"] == list(dha.AUGMENTATIONS)
        assert sum(map(sum, policy["probability"])) == pytest.approx(1)
    else:
        assert joint.load_policy(done / "policy.json")(torch.rand(4, 3, 32, 32)).shape == (4, 3, 32, 32)
        assert sum(own[0]["selection"].values()) == pytest.approx(1, abs=1e-4)


@only("baseline")
def test_stages_hand_over_files_and_their_epochs_follow_one_another(script, done):
    assert [r["epoch"] for r in lines(done) if r.get("stage") == "darts"] == [1, 2, 3, 4]
    darts, given = result(done / "darts"), settings(done / "darts")
    assert given["policy"] == str(done / "policy.json") and given["search_channels"] == 2
    assert (done / "policy.json").read_bytes() == (done / "darts" / "policy.json").read_bytes()
    assert result(done)["test_accuracy"] == darts["test_accuracy"]
    for key in ("seconds", "search_seconds"):  # Faster AutoAugment's time is search
        assert result(done)[key] == pytest.approx(dha.load_checkpoint(done)["seconds"]["policy"] + darts[key])


@only("sequential dha")
def test_sequential_dha_trains_what_its_first_stage_found(script, tmp_path):
    assert script.run("--out", tmp_path / "run") == 0
    first, second = (settings(tmp_path / "run" / name) for name in ("search", "train"))
    assert first["no_da"] and first["no_hpo"] and first["train_epochs"] == 0
    assert not second["no_da"] and not second["no_hpo"] and second["train_epochs"] == 1
    found = common.load_genotype(tmp_path / "run" / "search" / "genotype.json")
    assert common.parse_genotype(second["genotype"]) == found
    assert found == common.load_genotype(tmp_path / "run" / "genotype.json")
    assert [r["stage"] for r in lines(tmp_path / "run")] == ["search", "search", "train"]
    assert result(tmp_path / "run")["method"] == "Sequential DHA"


def test_a_finished_run_is_evaluated_and_stays_as_it_is(script, done, tmp_path, capsys, one_line):
    before = contents(done)
    assert script.module.main(["--evaluate", str(done), "--gpu", "-1"]) == 0
    assert f"test accuracy: {result(done)['test_accuracy']:.2f} % of 20 images" in capsys.readouterr().out
    assert script.module.main(["--resume", "--out", str(done)]) == script.run("--out", done, "--resume") == 0
    assert capsys.readouterr().out.count("finished already") == 2
    for flags in ([], ["--resume", "--limit-test", "9"], ["--resume", "--seed", "1"]):
        assert script.run("--out", done, *flags) == 2
        one_line()
    others = [other for other in (joint, dha, baseline) if other is not script.module]
    for other in others:  # run directories of other scripts
        assert other.main(["--resume", "--method", "dha"][: 3 if other is baseline else 1] + ["--out", str(done)]) == 2
        one_line()
    assert contents(done) == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("mine")
    for flags in ([], ["--resume"]):
        assert script.run("--out", tmp_path / "notes", *flags) == 2
        one_line()
    assert os.listdir(tmp_path / "notes") == ["notes.txt"]


def test_check_writes_nothing(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert script.run("--check") == script.run("--check", "--out", tmp_path / "run", "--repeats", "2") == 0
    assert not list(tmp_path.iterdir())


@only("joint", "dha")
def test_a_run_on_small_images_is_evaluated(script, tmp_path, capsys):
    flags = [*script.least, "--train-epochs", "1", "--image-size", "16"]
    assert script.run(*flags, "--out", tmp_path / "run") == 0
    capsys.readouterr()
    assert script.module.main(["--evaluate", str(tmp_path / "run"), "--gpu", "-1"]) == 0
    assert f"test accuracy: {result(tmp_path / 'run')['test_accuracy']:.2f} % " in capsys.readouterr().out


def test_repeats_give_mean_and_deviation_and_other_weights(script, tmp_path, capsys, one_line):
    flags = [*script.least, "--repeats", "2", "--out", tmp_path / "runs"]
    foreign = tmp_path / "runs" / "seed1" / "notes.txt"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("mine")
    assert script.run(*flags) == 2  # before the first run starts
    one_line()
    assert contents(tmp_path) == {foreign: b"mine"} and os.listdir(tmp_path / "runs") == ["seed1"]
    foreign.unlink()
    foreign.parent.rmdir()
    assert script.run(*flags) == 0
    first, second = (tmp_path / "runs" / f"seed{seed}" for seed in (0, 1))
    a, b = result(first)["test_accuracy"], result(second)["test_accuracy"]
    score = f"{(a + b) / 2:.2f} ± {abs(a - b) / 2**0.5:.2f}"
    assert score in capsys.readouterr().out
    if script.module is not dha:  # whose cells differ, and so the names of the weights
        assert weights(first).keys() == weights(second).keys()
    assert not torch.equal(weights(first)["classifier.weight"], weights(second)["classifier.weight"])
    shutil.rmtree(second)
    assert script.run(*flags, "--resume") == 0
    assert score in capsys.readouterr().out


# Repeatability, stops, damage.


def stop_after_every_epoch(monkeypatch, *modules):
    """Every module's `end_epoch`, once it has saved its checkpoint, gets a signal, the two kinds in turn."""
    count = []

    def stopping(end_epoch):
        def end_and_stop(*args, **kwargs):
            end_epoch(*args, **kwargs)
            count.append(1)
            signal.raise_signal(SIGNALS[len(count) % 2])

        return end_and_stop

    for module in modules:
        monkeypatch.setattr(module, "end_epoch", stopping(module.end_epoch))


def test_stopped_after_every_checkpoint_and_resumed_ends_the_same(script, done, tmp_path, monkeypatch, capsys):
    out, codes = tmp_path / "run", []
    stop_after_every_epoch(monkeypatch, *{script.module, joint})
    for number in range(len(lines(done))):
        assert script.run("--out", out, "--resume") == 128 + SIGNALS[(number + 1) % 2]
        said = capsys.readouterr()
        assert f"{'--out'} {out} --resume" in said.err and "Traceback" not in said.err + said.out
        assert re.search("go on with: (python )?", said.err)
    monkeypatch.undo()
    assert script.run("--out", out, "--resume") == 0
    assert_same(out, done)


def test_a_process_holds_its_directory_and_after_a_signal_goes_on_to_the_same_bits(
    script, done, tmp_path, one_line
):
    out = tmp_path / "run"
    process = script.process("--out", out)
    assert any("  epoch 1  " in line for line in iter(process.stdout.readline, ""))
    process.send_signal(signal.SIGSTOP)
    for flags in ([], ["--resume"]):
        assert script.run("--out", out, *flags) == 2
        error = one_line()
    assert "another process" in error
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    said = process.stdout.read()
    assert process.wait(60) == 143
    assert "go on with: python" in said and "--resume" in said and "Traceback" not in said and "error" not in said
    assert script.run("--out", out, "--resume") == 0
    assert_same(out, done)


def test_a_run_of_another_seed_resumes_by_its_directory_alone(script, done, tmp_path, monkeypatch):
    stop_after_every_epoch(monkeypatch, script.module)
    out = tmp_path / "run"
    assert script.run("--seed", "1", "--out", out) == 143
    monkeypatch.undo()
    assert script.module.main(["--resume", "--out", str(out)]) == 0
    assert settings(out)["seed"] == 1 and (out / "policy.json").read_bytes() != (done / "policy.json").read_bytes()


def test_a_moved_run_resumes(script, done, tmp_path):
    shutil.copytree(done, tmp_path / "moved")
    (tmp_path / "moved" / "result.json").unlink()
    assert script.module.main(["--resume", "--out", str(tmp_path / "moved")]) == 0
    assert_same(tmp_path / "moved", done)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "another file"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(script, done, copy, damage, capsys):
    if script.module is baseline:
        (copy / "policy.json").unlink()
    good = (copy / "checkpoint.pt").read_bytes()
    bad = {"truncated": good[: len(good) // 2], "garbage": os.urandom(5000), "empty": b""}
    (copy / "checkpoint.pt").write_bytes(bad.get(damage, (copy / "model.pt").read_bytes()))
    assert script.run("--resume", "--out", copy) == 0
    assert re.search("warning: .*checkpoint.pt cannot be read", capsys.readouterr().out)
    assert_same(copy, done)


def test_two_damaged_checkpoints_are_an_error(script, copy, one_line):
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        (copy / name).write_bytes(b"garbage")
    assert script.run("--resume", "--out", copy) == 2
    assert "no checkpoint" in one_line()


def alive(word: str) -> list[bytes]:
    """Command lines of running processes with `word` in them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes())
        except OSError:
            pass
    return [line for line in found if word.encode() in line]


@pytest.mark.slow
@only("joint", "dha", "baseline", "sequential dha")
def test_killed_ten_times_and_resumed_ends_the_same(script, tmp_path):
    flags = ["--search-epochs", "4", "--train-epochs", "6"]
    flags += ["--faa-epochs", "6"] * (script.module is baseline)
    start = time.time()
    assert script.process(*flags, "--out", tmp_path / "whole", stdout=None).wait() == 0
    whole, moment = time.time() - start, random.Random(0)
    for _ in range(10):
        process = script.process(*flags, "--out", tmp_path / "cut", "--resume", stdout=None)
        time.sleep(moment.uniform(0.2, 0.9) * whole)
        process.kill()
        process.wait()
        time.sleep(0.5)
        assert not alive(str(tmp_path / "cut"))
    assert script.process(*flags, "--out", tmp_path / "cut", "--resume", stdout=None).wait() == 0
    assert_same(tmp_path / "cut", tmp_path / "whole")


# Faults: one line, an exit code, the last checkpoint kept.


def test_a_full_disk_is_one_line_and_keeps_the_last_checkpoint(script, tmp_path, one_line, monkeypatch):
    real, count = torch.save, []

    def full(*args, **kwargs):
        count.append(1)
        if len(count) == 2:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    assert script.run("--out", tmp_path / "run") == 2
    assert "No space left" in one_line() and not list(tmp_path.rglob("*.part"))
    assert len(history(tmp_path / "run")) == 1


def test_a_json_file_that_cannot_be_written_is_one_line_and_costs_nothing(
    script, done, copy, one_line, monkeypatch
):
    if script.module is baseline:
        (copy / "policy.json").unlink()
    real = os.fsync

    def full(file):
        if list(copy.glob("*.json.part")):
            raise OSError(28, "No space left on device")
        return real(file)

    monkeypatch.setattr(os, "fsync", full)
    assert script.run("--resume", "--out", copy) == 2
    assert "No space left" in one_line() and not list(copy.rglob("*.part"))
    monkeypatch.undo()
    assert script.run("--resume", "--out", copy) == 0
    assert_same(copy, done)


@pytest.mark.parametrize("fault", ["nan", "memory"])
def test_a_step_that_fails_is_one_line_and_keeps_the_last_checkpoint(
    script, tmp_path, fault, one_line, monkeypatch
):
    out, real = tmp_path / "run", common.normalize

    def normalize(images, mean, std):  # fails once there is a checkpoint
        if (out / "checkpoint.pt").exists() and fault == "memory":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate\n3 GiB")
        return real(images, mean, std) * (torch.nan if (out / "checkpoint.pt").exists() else 1)

    monkeypatch.setattr(common, "normalize", normalize)
    assert script.run("--out", out) == 1
    said = one_line()
    assert "CUDA out of memory" in said if fault == "memory" else "epoch 2, step 1:" in said and "lr" in said
    assert len(history(out)) == 1 and not (out / "result.json").exists()


def test_a_learning_rate_that_is_far_too_high_stops_the_run(script, tmp_path, one_line):
    flags = {joint: "--lr 1e9 --grad-clip 1e9", dha: "--no-hpo --lr 1e9 --grad-clip 1e9", baseline: "--faa-lr 1e9"}
    assert script.run(*flags[script.module].split(), "--out", tmp_path / "run") == 1
    assert "the loss is not finite at epoch" in one_line()


@only("dha")
def test_ista_that_does_not_converge_is_one_line_and_keeps_the_last_checkpoint(
    script, tmp_path, one_line, monkeypatch
):
    real = dha.ista

    def ista(*args):
        if (tmp_path / "run" / "checkpoint.pt").exists():
            raise ArithmeticError("ISTA did not converge")
        return real(*args)

    monkeypatch.setattr(dha, "ista", ista)
    assert script.run("--search-epochs", "3", "--out", tmp_path / "run") == 1
    assert "ISTA did not converge" in one_line()
    assert len(history(tmp_path / "run")) == 1


@only("sequential dha")
def test_a_stage_that_fails_or_is_killed_stops_the_pipeline(script, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(dha, "end_epoch", lambda *args, **kwargs: 1 / 0)
    assert script.run("--out", tmp_path / "run") == 1
    *_, first, last = capsys.readouterr().err.splitlines()
    assert first.endswith("error: division by zero")
    assert last.startswith("error: stage search ended with exit code 1") and "go on with: " in last
    assert not (tmp_path / "run" / "train").exists() and not (tmp_path / "run" / "result.json").exists()
    monkeypatch.setattr(StagesInProcess, "call", lambda *args: -signal.SIGKILL)
    assert script.run("--out", tmp_path / "run", "--resume") == 137
    assert "stage search ended with exit code 137" in capsys.readouterr().err


@only("baseline")
def test_a_signal_reaches_the_stage(script, tmp_path):
    process = script.process("--method", "darts", "--search-epochs", "99", "--out", tmp_path / "run")
    assert any("search  epoch 1  " in line for line in iter(process.stdout.readline, ""))
    process.send_signal(signal.SIGINT)
    said = process.stdout.read()
    assert process.wait(60) == 130 and "Traceback" not in said
    last = said.rstrip().splitlines()[-1]
    assert re.search(r"^stopped; go on with: python \S*baseline_sequential.py .*--resume$", last)
    assert not alive(str(tmp_path / "run")) and len(history(tmp_path / "run" / "darts")) >= 1


@only("baseline")
def test_a_stage_whose_directory_is_in_use_is_one_line_about_it(script, copy, capsys):
    (copy / "darts" / "result.json").unlink()
    with open(copy / "darts" / "metrics.jsonl") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert script.run("--resume", "--out", copy) == 2
    said = capsys.readouterr().err
    assert said.count("another process is writing") == 1 and "Traceback" not in said


def test_a_directory_that_another_process_has_just_made_is_one_line(script, tmp_path, one_line):
    (tmp_path / "run").mkdir()
    with open(tmp_path / "run" / "metrics.jsonl", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert script.run("--out", tmp_path / "run") == 2
    assert "another process" in one_line() and os.listdir(tmp_path / "run") == ["metrics.jsonl"]


@pytest.mark.parametrize("mode", ["--resume --out", "--gpu -1 --evaluate"])
@pytest.mark.parametrize("name", ["args", "dataset", "limit_test", "data_dir"])
def test_a_config_that_lacks_something_is_one_line(script, copy, mode, name, one_line):
    for path in copy.rglob("config.json"):
        config = json.loads(path.read_text())
        del (config if name == "args" else config["args"])[name]
        path.write_text(json.dumps(config))
    assert script.module.main([*mode.split(), str(copy)]) == 2
    assert "config.json" in one_line()


DAMAGED = {"--resume --out": ["config.json", "result.json"], "--gpu -1 --evaluate": ["config.json", "model.pt"]}


@pytest.mark.parametrize("content", [b"garbage", b"[]", b"", b"\xff\xfe"])
@pytest.mark.parametrize("mode, name", [(mode, name) for mode in DAMAGED for name in DAMAGED[mode]])
def test_a_damaged_file_is_one_line(script, copy, mode, name, content, one_line):
    for path in (copy / name, copy / "darts" / name):
        if path.parent.exists():
            path.write_bytes(content)
    assert script.module.main([*mode.split(), str(copy)]) == 2
    assert name in one_line()


# Bad input: one line that says what to do, exit 2, no traceback, nothing written.

BAD = """--wrong-flag | --search-epoch 3 | word | --dataset cifar1000 | --preset fast | --seed one | --seed -1
--seed 99999999999999 | --repeats 0 | --gpu two | --gpu 77 | --gpu -2 | --amp | --workers 0 | --search-epochs 0
--train-epochs -3 | --batch-size 1 | --batch-size 1.5 | --channels 7 | --channels | --layers 2 | --lr nan | --lr -1
--weight-decay -1 | --weight-decay inf | --drop-path 1 | --drop-path -1 | --limit-train 1 | --limit-train many
--limit-test 0 | --image-size 4 | --grad-clip -1 | --cutout -1 | --auxiliary-weight 0.4 --image-size 16
--data-dir {broken}/nothing | --data-dir {broken}/empty | --data-dir {broken}/damaged | --data-dir {broken}/more
--data-dir {broken}/one_class | --data-dir {broken}/sizes | --data-dir {broken}/wide | --data-dir {broken}/file
--dataset cifar10 --data-dir {broken}/file | --out {broken}/file/run | --out {broken}/file
--genotype DARTS_V9 | --genotype {broken}/damaged.json | --genotype {broken}/file | --genotype {broken}
--evaluate {broken}/nothing | --evaluate {broken}"""
OWN = {
    "joint": """--search-batch-size 1 | --search-channels 3 | --search-layers 2 | --arch-lr -1 | --policy-lr nan
    --sub-policies 0 | --stages 0 | --limit-train 3 | --search-images 3 | --train-epochs 0 | --policy {broken}/file
    --policy {broken}/nothing | --policy {broken}/damaged.json | --policy {broken}/policy.json | --no-da | --method dha
    --search-only --genotype DARTS_V2 --policy none""",
    "dha": """--lr 5 | --weight-decay 0.5 | --max-params 1 | --max-flops 1 | --max-lr-step nan | --beta-lr -1
    --lasso -1 | --tau-lr inf | --b-scale -1 | --freeze-distance nan | --genotype {broken}/nodes3.json
    --genotype {broken}/concat.json | --genotype DARTS_V2 --train-epochs 0 | --policy none | --search-only
    --genotype DARTS_V2 --max-params 1 | --genotype DARTS_V2 --max-flops 1""",
    "baseline": """--method autoaugment | --processes 0 | --faa-epochs 0 | --faa-images 3 | --faa-batch-size 7
    --faa-batch-size 2 | --faa-lr -1 | --policy-lr nan | --class-weight -1 | --critic-weight inf | --penalty -10
    --depth 39 | --depth 4 | --width 0 | --sub-policies 0 | --stages 0 | --search-channels 3 | --tau-lr 0.1 | --no-da
    --limit-train 3 | --train-epochs 0 | --compare {broken}/nothing | --compare {broken}""",
    "sequential dha": "--lr 5 | --weight-decay 0.1 | --search-channels 4 | --max-params 1 | --train-epochs 0",
}
CASES = [(name, BAD * (name != "sequential dha") + " | " + OWN[name]) for name in OWN]
CASES = [(name, flags.strip()) for name, text in CASES for flags in re.split(r"[|\n]", text) if flags.strip()]


@pytest.mark.parametrize("script, flags", CASES, indirect=["script"])
def test_bad_input_is_one_line(script, flags, broken, tmp_path, one_line, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = contents(broken)
    assert script.run(*flags.format(broken=broken).split()) == 2
    one_line()
    assert contents(broken) == before and not list(tmp_path.rglob("*"))


def test_help_and_nothing_to_do(script, tmp_path, monkeypatch, capsys, one_line):
    with pytest.raises(SystemExit) as stop:
        script.module.main(["--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and "--repeats" in said and "(default: 4)" in said
    assert max(map(len, said.splitlines())) <= 110
    monkeypatch.chdir(tmp_path)
    if script.module is baseline:
        for flags in (["--preset", "quick"], ["--resume", "--out", "nothing"]):
            assert baseline.main(flags) == 2
            assert "--method is missing" in one_line()
        monkeypatch.setattr(baseline, "WORLD", 2)
        assert script.run() == 2
        assert "torchrun" in one_line()
    assert not list(tmp_path.iterdir())


def test_flags_of_one_name_have_one_meaning():
    own = {"--search-epochs", "--train-epochs", "--arch-lr"}  # named alike, explained by each method
    known = {}
    for script in (joint, dha, baseline):
        for name, rest in re.findall(r'\badd\("(--[a-z-]+)", (.*)\)\n', Path(script.__file__).read_text()):
            assert name in own or known.setdefault(name, rest) == rest, name
    assert len(known) > 40


# Parts that can be switched off, constraints, figures.


@only("dha")
def test_parts_of_dha_can_be_switched_off(script, tmp_path):
    plain, known = tmp_path / "plain", tmp_path / "known"
    assert script.run("--no-da", "--no-hpo", "--out", plain) == 0
    assert [record["lr"] for record in lines(plain)] == pytest.approx([0.05] * 3)
    assert result(plain)["method"] == "One-Stage ISTA" and not (plain / "policy.json").exists()
    flags = "--no-hpo --genotype DARTS_V2 --train-epochs 2 --auxiliary-weight 0.4 --drop-path 0.2 --cutout 8"
    assert script.run(*flags.split(), "--out", known) == 0
    assert common.load_genotype(known / "genotype.json") == common.GENOTYPES["DARTS_V2"]
    assert lines(known)[1]["lr"] == pytest.approx(0.05 * (0.04 + 0.96 / 2))  # half the cosine
    assert result(known)["search_epochs"] == 0 and result(known)["method"] == "given genotype without HPO"
    assert dha.load_model(known / "model.pt")[0].genotype() == common.GENOTYPES["DARTS_V2"]


@only("dha")
def test_constraints_hold_and_rejected_supports_are_marked(script, tmp_path, capsys):
    torch.manual_seed(0)
    nets = [dha.SparseSupernet(4, 10, 3) for _ in range(9)]
    nets = [net.keep(net.genotype()) for net in nets]
    params = sorted(common.count_parameters(net) for net in nets)[4]
    flops = sorted(common.count_flops(net, 32) for net in nets)[4]
    rejected = 0
    for seed in range(3):
        flags = ["--max-params", params, "--max-flops", flops, "--arch-lr", "0.3", "--search-epochs", "4"]
        assert script.run(*flags, "--train-epochs", "0", "--seed", seed, "--out", tmp_path / str(seed)) == 0
        assert result(tmp_path / str(seed))["params"] <= params and result(tmp_path / str(seed))["flops"] <= flops
        records = lines(tmp_path / str(seed))
        for before, after in zip(records, records[1:]):
            if before["moved"] == []:
                assert after["support"] == before["support"]
                rejected += 1
    assert rejected and capsys.readouterr().out.count("the last one stays") == rejected


@only("dha")
def test_metrics_name_the_support_that_an_epoch_trained_with(script, tmp_path, monkeypatch):
    trained, real = [], dha.train_step

    def train_step(s, *args):
        trained.append(json.loads(json.dumps(s.net.support)))
        return real(s, *args)

    monkeypatch.setattr(dha, "train_step", train_step)
    assert script.run("--search-epochs", "4", "--arch-lr", "0.3", "--out", tmp_path / "run") == 0
    supports = [record["support"] for record in lines(tmp_path / "run")]
    assert supports == trained[::2] == trained[1::2]  # two steps an epoch
    assert supports[0] != supports[1] and supports[-2] == supports[-1]


@only("joint")
def test_search_only_policy_and_genotype_hand_over_files(script, tmp_path):
    first, second = tmp_path / "search", tmp_path / "train"
    assert script.run("--search-only", "--out", first) == 0
    assert "test_accuracy" not in result(first) and result(first)["epochs"] == 2 and not (first / "model.pt").exists()
    given = ["--genotype", first / "genotype.json", "--policy", first / "policy.json"]
    assert script.run(*given, "--out", second) == 0
    for name in ("genotype.json", "policy.json"):
        assert json.loads((first / name).read_text()) == json.loads((second / name).read_text())
    assert result(second)["search_epochs"] == 0 and result(second)["method"] == "given genotype + given policy"


@only("joint")
def test_plain_darts_has_no_policy(script, tmp_path):
    flags = "--policy none --auxiliary-weight 0.4 --drop-path 0.2 --cutout 8 --search-images 12".split()
    assert script.run(*flags, "--out", tmp_path / "run") == 0
    assert not (tmp_path / "run" / "policy.json").exists() and "selection" not in lines(tmp_path / "run")[0]
    assert result(tmp_path / "run")["method"] == "DARTS"


@only("joint")
def test_collapse_is_reported(script, tmp_path, monkeypatch, capsys):
    cell = [("skip_connect", i % 2) for i in range(8)]
    collapsed = common.Genotype(cell, [2, 3, 4, 5], cell, [2, 3, 4, 5])
    monkeypatch.setattr(joint.DartsSupernet, "genotype", lambda self: collapsed)
    assert script.run("--search-only", "--search-epochs", "1", "--out", tmp_path / "run") == 0
    assert "skip-connections" in capsys.readouterr().out and lines(tmp_path / "run")[0]["skip_connects"] == 8


def test_without_matplotlib_a_run_says_so(script, tmp_path, capsys):
    assert script.run(*script.least, "--out", tmp_path / "run") == 0
    programs = 2 if script.module is baseline else 1
    assert capsys.readouterr().out.count("matplotlib is missing") == programs
    assert (tmp_path / "run" / "result.json").exists()


def test_a_figure_that_cannot_be_drawn_costs_no_result(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", matplotlib.pyplot)
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda *args, **kwargs: 1 / 0)
    assert script.run(*script.least, "--out", tmp_path / "run") == 0
    assert "warning: not all figures could be drawn" in capsys.readouterr().out
    assert (tmp_path / "run" / "result.json").exists()


# The table of runs.


def table(capsys, *folders: Path) -> list[list[str]]:
    """The rows that --compare prints: their cells."""
    assert baseline.main(["--compare", *map(str, folders)]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def pretend(out: Path, script, argv: str, **numbers) -> None:
    """What --compare reads of a run with this command line."""
    args = vars(script.parse_args(argv.split()))
    said = {"method": script.__name__, "dataset": args["dataset"], "test_accuracy": 90.0, "params": 1.5e6}
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps({"script": "", "args": args}))
    (out / "result.json").write_text(json.dumps(said | {"seconds": 7200.0, "search_seconds": 3600.0} | numbers))


def test_compare_has_a_row_for_every_method_and_data_set(tmp_path, capsys):
    a = "--preset quick"
    for seed, flags in enumerate((a, f"{a} --lr 0.05 --workers 2", f"--lr 5e-2 {a} --channels=8 --data-dir x")):
        pretend(tmp_path / "runs" / str(seed), dha, f"{flags} --seed {seed}", test_accuracy=80.0 + seed)
    pretend(tmp_path / "joint", joint, a)
    pretend(tmp_path / "cifar", joint, "--dataset cifar10")
    rows = table(capsys, tmp_path / "runs", tmp_path / "joint", tmp_path / "cifar", tmp_path / "runs" / "1")
    assert [row[:4] for row in rows] == [
        ["joint_darts_faa", "cifar10", "1", "90.00"],
        ["dha", "shapes", "3", "81.00 ± 1.00"],
        ["joint_darts_faa", "shapes", "1", "90.00"],
    ]
    assert rows[1][4:] == ["1.5 M", "1.00", "2.00", ""]


def test_compare_splits_rows_by_settings_that_differ_and_names_them(tmp_path, capsys):
    for name, flags in {"a": "", "b": "--lr 0.01", "c": "--lr 1e-2 --seed 3"}.items():
        pretend(tmp_path / "runs" / name, dha, f"--preset quick {flags}")
    rows = {row[7]: row[2] for row in table(capsys, tmp_path / "runs")}
    assert rows == {"lr 0.01": "2", "lr 0.05": "1"}
    for name in ("here", "there"):
        pretend(tmp_path / "folders" / name, dha, f"--dataset folder --data-dir {name}")
    assert {row[7] for row in table(capsys, tmp_path / "folders")} == {"data_dir here", "data_dir there"}


def test_compare_takes_flags_of_stages_by_their_values(tmp_path, capsys):
    flags = ("--channels 8 --layers 3", "--layers 3 --channels=8", "--layers 3 --channels 16")
    for seed, stage in enumerate(flags):
        pretend(tmp_path / str(seed), baseline, f"--method dha --preset quick --seed {seed} {stage}")
    rows = table(capsys, tmp_path)
    assert sorted(row[2] for row in rows) == ["1", "2"] and all("channels" in row[7] for row in rows)


def test_compare_passes_over_searches_and_reports_damage(tmp_path, capsys, one_line):
    pretend(tmp_path / "runs" / "whole", joint, "--preset quick")
    pretend(tmp_path / "runs" / "search", joint, "--preset quick --search-only")
    search = tmp_path / "runs" / "search" / "result.json"
    search.write_text(json.dumps({k: v for k, v in result(search.parent).items() if k != "test_accuracy"}))
    assert baseline.main(["--compare", str(tmp_path / "runs")]) == 0
    said = capsys.readouterr().out
    assert re.search("note: .*search was a search only", said) and said.count("| joint_darts_faa |") == 1
    assert baseline.main(["--compare", str(search.parent)]) == 2
    one_line()
    good = {name: (tmp_path / "runs" / "whole" / name).read_text() for name in ("result.json", "config.json")}
    for name in good:
        for content in ("", "garbage", "[]", "{}" if name == "config.json" else '{"test_accuracy": 1}', '{"args": 3}'):
            (tmp_path / "runs" / "whole" / name).write_text(content)
            assert baseline.main(["--compare", str(tmp_path / "runs" / "whole")]) == 2
            one_line()
        (tmp_path / "runs" / "whole" / name).write_text(good[name])
    (tmp_path / "runs" / "whole" / "result.json").write_text(good["result.json"].replace("90.0", '"high"'))
    assert baseline.main(["--compare", str(tmp_path / "runs" / "whole")]) == 2
    assert "result.json" in one_line()


# Several processes.

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.mark.slow
@only("joint", "dha")
def test_two_processes_train_one_network(script, done, tmp_path):
    process = script.process("--out", tmp_path / "run", before=TORCHRUN)
    said = process.stdout.read()
    assert process.wait() == 0, said
    assert all(said.count(f"  epoch {n}  ") == 1 for n in range(1, len(script.phases) + 1))
    assert [record["phase"] for record in lines(tmp_path / "run")] == script.phases
    assert json.loads((tmp_path / "run" / "config.json").read_text())["processes"] == 2
    assert result(tmp_path / "run")["params"] > 0 and weights(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--wrong-flag", "--lr nan", "--data-dir {broken}/damaged", "--batch-size 3"])
def test_a_mistake_is_one_line_of_all_processes(script, flags, broken, tmp_path):
    flags = flags.format(broken=broken).split()
    if script.module is baseline:
        process = script.process(*flags, "--processes", "2", "--out", tmp_path / "run")
    else:
        process = script.process(*flags, "--out", tmp_path / "run", before=TORCHRUN)
    said = process.stdout.read()
    assert process.wait() != 0 and not (tmp_path / "run").exists()
    assert sum(line.startswith("error: ") for line in said.splitlines()) == 1, said


@pytest.mark.slow
@only("sequential dha")
def test_stages_run_under_torchrun_are_stopped_and_go_on(script, tmp_path):
    flags = ["--processes", "2", "--out", tmp_path / "run"]
    process = script.process(*flags)
    assert any("search  epoch 1  " in line for line in iter(process.stdout.readline, ""))
    process.kill()
    process.wait()
    time.sleep(2)
    assert not alive(str(tmp_path / "run"))
    process = script.process(*flags, "--resume")
    said = process.stdout.read()
    assert process.wait() == 0, said
    assert json.loads((tmp_path / "run" / "train" / "config.json").read_text())["processes"] == 2


@pytest.mark.slow
@only("baseline")
def test_the_baseline_refuses_torchrun(script, tmp_path):
    process = script.process("--out", tmp_path / "run", before=TORCHRUN)
    said = process.stdout.read()
    assert process.wait() != 0 and "--processes" in said and not (tmp_path / "run").exists()
