"""Whole runs of the three scripts: what they leave, repeatability, stops and resumes, faults, bad input."""

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

import matplotlib.pyplot
import pytest
import torch
from conftest import StagesInProcess
from PIL import Image

import baseline_sequential as baseline
import common
import dha
import joint_darts_faa as joint

SIGNALS = (signal.SIGTERM, signal.SIGINT)
TIMES = {"seconds", "search_seconds", "gpu_hours"}  # of result.json
only = lambda *names: pytest.mark.parametrize("script", names, indirect=True)

@pytest.fixture(autouse=True)
def as_before():
    """Signal handlers as before; no figures, which take longer than the runs (those in `done` have them)."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.pyplot", None)
        yield
    for number, handler in handlers.items():
        signal.signal(number, handler)

def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]

def result(out: Path) -> dict:
    return json.loads((out / "result.json").read_text())

def settings(out: Path) -> dict:
    return json.loads((out / "config.json").read_text())["args"]

def weights(out: Path) -> dict:
    return torch.load(out / "model.pt", weights_only=True)["state_dict"]

def history(out: Path) -> list[dict]:
    return json.loads(json.dumps(dha.load_checkpoint(out)["history"]))

def contents(folder: Path) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

def assert_same(a: Path, b: Path) -> None:
    """Two runs ended alike, bit for bit: result without its times, metrics, files, weights."""
    first, second = ({k: v for k, v in result(out).items() if k not in TIMES} for out in (a, b))
    assert first == second
    for name in ("metrics.jsonl", "genotype.json", "policy.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys() and all(torch.equal(v, second[k]) for k, v in first.items())

def processes(word: str) -> list[int]:
    """The processes that have `word` in their command lines."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [int(path.parent.name)] * (word.encode() in path.read_bytes())
        except OSError:
            pass
    return found

def end(process: subprocess.Popen, out: Path) -> None:
    """Kill a process; the stages that it called, whose command lines name `out`, must end by themselves."""
    process.kill()
    process.wait()
    for _ in range(100):
        if not processes(str(out)):
            return
        time.sleep(0.1)
    left = processes(str(out))
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, "processes live on"

# -------- What a run leaves, and that nothing is overwritten ------------------------------------------------

def test_a_run_leaves_what_the_readme_says(script, done):
    names = "config.json metrics.jsonl checkpoint.pt genotype.json policy.json model.pt result.json"
    for name in [*names.split(), "curves.png", *script.files]:
        assert (done / name).stat().st_size > 0, name
        if name.endswith(".png"):
            with Image.open(done / name) as picture:
                assert min(picture.size) > 300
    config, source = json.loads((done / "config.json").read_text()), Path(script.module.__file__)
    assert (done / source.name).read_bytes() == source.read_bytes() and config["script"] == source.name
    assert config["args"]["seed"] == 0 and config["processes"] == 1 and config["torch"] == torch.__version__
    own = [record for record in lines(done) if "stage" not in record]
    assert own == history(done) and [record["epoch"] for record in own] == list(range(1, len(own) + 1))
    assert [record["phase"] for record in own] == script.phases
    net = (dha.load_model if script.module is dha else joint.load_network)(done / "model.pt")[0]
    said, policy = result(done), json.loads((done / "policy.json").read_text())
    methods = {joint: "DARTS + Faster AA", dha: "DHA", baseline: "Faster AA, then DARTS"}
    assert said["method"] == methods[script.module] and said["dataset"] == "folder"
    assert said["params"] == sum(p.numel() for p in net.parameters()) == common.count_parameters(net)
    assert said["flops"] == common.count_flops(net, 32) and said["seconds"] > said["search_seconds"] > 0
    assert said["gpu_hours"] == pytest.approx(said["seconds"] / 3600, rel=1e-3)  # one process
    assert said["genotype"] == str(common.load_genotype(done / "genotype.json"))
    assert said["test_accuracy"] == lines(done)[-1]["test_accuracy"]
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
    assert settings(done / "darts")["policy"] == str(done / "policy.json")
    assert (done / "policy.json").read_bytes() == (done / "darts" / "policy.json").read_bytes()
    own, darts = dha.load_checkpoint(done)["seconds"]["policy"], result(done / "darts")
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
    assert found == common.parse_genotype(second["genotype"])
    assert found == common.load_genotype(tmp_path / "run" / "genotype.json")
    assert [record["stage"] for record in lines(tmp_path / "run")] == ["search", "search", "train"]
    said = result(tmp_path / "run")
    assert (said["method"], said["epochs"], said["search_epochs"]) == ("Sequential DHA", 3, 2)

def test_a_finished_run_is_evaluated_and_stays_as_it_is(script, done, tmp_path, capsys, one_line):
    before = contents(done)
    assert script.module.main(["--evaluate", str(done), "--gpu", "-1"]) == 0
    assert f"test accuracy: {result(done)['test_accuracy']:.2f} % of 20 images" in capsys.readouterr().out
    assert script.module.main(["--resume", "--out", str(done)]) == script.run("--out", done, "--resume") == 0
    assert capsys.readouterr().out.count("finished already") == 2
    for flags in ([], ["--resume", "--limit-test", "9"], ["--resume", "--seed", "1"]):
        assert script.run("--out", done, *flags) == 2
        one_line()
    for other in {joint, dha, baseline} - {script.module}:
        assert other.main(["--resume", "--out", str(done)]) == 2
        one_line()
    assert contents(done) == before
    notes = tmp_path / "notes" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    for flags in ([], ["--resume"]):
        assert script.run("--out", notes.parent, *flags) == 2
        one_line()
    assert contents(tmp_path) == {notes: b"mine"}

def test_repeats_give_mean_and_deviation(script, tmp_path, capsys, one_line):
    flags = [*script.least, "--image-size", "16", "--repeats", "2", "--out", tmp_path / "runs"]
    first, second = (tmp_path / "runs" / f"seed{seed}" for seed in (0, 1))
    second.mkdir(parents=True)
    (second / "notes.txt").write_text("mine")
    assert script.run(*flags) == 2  # before the first run starts
    one_line()
    assert contents(tmp_path) == {second / "notes.txt": b"mine"} and not first.exists()
    (second / "notes.txt").unlink()
    assert script.run(*flags) == 0
    a, b = result(first)["test_accuracy"], result(second)["test_accuracy"]
    score = f"{(a + b) / 2:.2f} ± {abs(a - b) / 2**0.5:.2f}"
    assert score in capsys.readouterr().out
    assert not torch.equal(weights(first)["classifier.weight"], weights(second)["classifier.weight"])
    shutil.rmtree(first)
    assert script.run(*flags, "--resume") == 0
    assert score in capsys.readouterr().out

def test_a_run_of_small_images_and_another_seed_needs_its_directory_alone(script, tmp_path, capsys):
    out = str(tmp_path / "run")
    assert script.run(*script.least, "--image-size", "16", "--seed", "1", "--out", out) == 0
    assert script.module.main(["--evaluate", out, "--gpu", "-1"]) == 0
    assert f"test accuracy: {result(tmp_path / 'run')['test_accuracy']:.2f} % " in capsys.readouterr().out
    (tmp_path / "run" / "result.json").unlink()
    assert script.module.main(["--resume", "--out", out]) == 0
    assert result(tmp_path / "run")["seed"] == 1

# -------- Repeatability, stops, damage ----------------------------------------------------------------------

def stop_after_every_epoch(monkeypatch, *modules) -> None:
    """Once a module's `end_epoch` has saved the checkpoint, a signal comes: SIGTERM, SIGINT, SIGTERM, ..."""
    count = []

    def stopping(end_epoch):
        def end_and_stop(*args, **kwargs):
            end_epoch(*args, **kwargs)
            count.append(1)
            signal.raise_signal(SIGNALS[len(count) % 2 - 1])

        return end_and_stop

    for module in modules:
        monkeypatch.setattr(module, "end_epoch", stopping(module.end_epoch))

def test_stopped_after_every_checkpoint_it_ends_the_same(script, done, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    stop_after_every_epoch(monkeypatch, *{script.module, joint})
    for number in range(len(lines(done))):
        assert script.run("--out", out, "--resume") == 128 + SIGNALS[number % 2]
        said = capsys.readouterr().err
        assert "; go on with the same command and --resume\n" in said
    monkeypatch.undo()
    assert script.run("--out", out, "--resume") == 0
    assert_same(out, done)

@only("dha", *(pytest.param(name, marks=pytest.mark.slow) for name in ("joint", "baseline")))
def test_a_process_holds_its_directory_and_goes_on_after_a_signal(script, done, tmp_path, one_line):
    """A fresh process, and this one after it, end with the bits of a run in this process."""
    out, number = tmp_path / "run", SIGNALS[script.module is not joint]
    process = script.process("--out", out)
    assert any("search  epoch 1  " in line for line in iter(process.stdout.readline, ""))
    for pid in processes(str(out)):  # the stage is one
        os.kill(pid, signal.SIGSTOP)
    assert script.run("--out", out) == 2 and one_line()
    assert script.run("--out", out, "--resume") == 2 and "another process" in one_line()
    process.send_signal(number)
    for pid in processes(str(out)):
        os.kill(pid, signal.SIGCONT)
    said = process.stdout.read()
    assert process.wait(60) == 128 + number and "Traceback" not in said and "error" not in said
    assert said.endswith("\nstopped; go on with the same command and --resume\n")
    assert not processes(str(out))
    assert script.run("--out", out, "--resume") == 0
    assert_same(out, done)

@only("joint", "dha")  # the baseline's stage was started with the policy of the old folder
def test_a_moved_run_resumes(script, done, tmp_path):
    shutil.copytree(done, tmp_path / "moved")
    (tmp_path / "moved" / "result.json").unlink()
    assert script.module.main(["--resume", "--out", str(tmp_path / "moved")]) == 0
    assert_same(tmp_path / "moved", done)

DAMAGES = [("dha", damage) for damage in ("truncated", "garbage", "empty", "another file")]
DAMAGES += [("joint", "empty"), ("baseline", "truncated")]

@pytest.mark.parametrize("script, damage", DAMAGES, indirect=["script"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(script, done, copy, damage, capsys, one_line):
    good = (copy / "checkpoint.pt").read_bytes()
    bad = {"truncated": good[: len(good) // 2], "garbage": os.urandom(5000), "empty": b""}
    (copy / "checkpoint.pt").write_bytes(bad.get(damage, (copy / "model.pt").read_bytes()))
    again = shutil.copytree(copy, copy.with_name("again"))
    assert script.run("--resume", "--out", copy) == 0
    assert re.search("warning: .*checkpoint.pt cannot be read", capsys.readouterr().out)
    assert_same(copy, done)
    (again / "checkpoint.previous.pt").write_bytes((again / "checkpoint.pt").read_bytes())
    assert script.module.main(["--resume", "--out", str(again)]) == 2
    assert "no checkpoint" in one_line()

@pytest.mark.slow
@only("joint", "dha", "baseline", "sequential dha")
def test_killed_ten_times_and_resumed_ends_the_same(script, tmp_path):
    flags = ["--search-epochs", "4", "--train-epochs", "6"]
    flags += ["--faa-epochs", "6"] * (script.module is baseline)
    begun, moment = time.time(), random.Random(0)
    assert script.process(*flags, "--out", tmp_path / "whole", stdout=None).wait() == 0
    whole = time.time() - begun
    for _ in range(10):
        process = script.process(*flags, "--out", tmp_path / "cut", "--resume", stdout=None)
        time.sleep(moment.uniform(0.2, 0.9) * whole)
        end(process, tmp_path / "cut")
    assert script.process(*flags, "--out", tmp_path / "cut", "--resume", stdout=None).wait() == 0
    assert_same(tmp_path / "cut", tmp_path / "whole")

# -------- Faults: one line, an exit code, the last checkpoint kept ------------------------------------------

def test_a_full_disk_is_one_line_and_costs_nothing(script, done, copy, tmp_path, one_line, monkeypatch):
    real, count = (torch.save, os.fsync), []

    def full(*args):
        count.append(1)
        if len(count) == 2:
            raise OSError(28, "No space left on device")
        return real[0](*args)

    monkeypatch.setattr(torch, "save", full)
    assert script.run("--out", tmp_path / "run") == 2
    assert "No space left" in one_line() and len(history(tmp_path / "run")) == 1
    monkeypatch.setattr(os, "fsync", lambda file: full() if list(copy.glob("*.json.part")) else real[1](file))
    count[1:] = []
    assert script.run("--resume", "--out", copy) == 2
    assert "No space left" in one_line() and not list(tmp_path.rglob("*.part"))
    monkeypatch.undo()
    assert script.run("--resume", "--out", copy) == 0
    assert_same(copy, done)

FAULTS = {
    "nan": (common, "normalize", None, "the loss is not finite at epoch 2, step 1:"),
    "memory": (common, "normalize", torch.cuda.OutOfMemoryError("out of memory\nTried"), "out of memory"),
    "ista": (dha, "ista", ArithmeticError("ISTA did not converge"), "ISTA did not converge"),
}
FAILING = [(name, fault) for name in ("joint", "dha", "baseline") for fault in ("nan", "memory")]

@pytest.mark.parametrize("script, fault", [*FAILING, ("dha", "ista")], indirect=["script"])
def test_a_failing_step_is_one_line_and_keeps_the_checkpoint(script, fault, tmp_path, one_line, monkeypatch):
    module, name, error, message = FAULTS[fault]
    out, real = tmp_path / "run", getattr(module, name)

    def fails_once_there_is_a_checkpoint(*args):
        if error and (out / "checkpoint.pt").exists():
            raise error
        return real(*args) * (torch.nan if (out / "checkpoint.pt").exists() else 1)

    monkeypatch.setattr(module, name, fails_once_there_is_a_checkpoint)
    assert script.run(*["--search-epochs", "3"] * (fault == "ista"), "--out", out) == 1
    assert message in one_line() and len(history(out)) == 1 and not (out / "result.json").exists()

@only("sequential dha")
def test_a_stage_that_fails_or_is_killed_stops_the_pipeline(script, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(dha, "end_epoch", lambda *args, **kwargs: 1 / 0)
    assert script.run("--out", tmp_path / "run") == 1
    *_, first, last = capsys.readouterr().err.splitlines()
    assert first.endswith("error: division by zero")
    assert last.startswith("error: stage search ended with exit code 1") and "and --resume" in last
    assert not (tmp_path / "run" / "train").exists() and not (tmp_path / "run" / "result.json").exists()
    monkeypatch.setattr(StagesInProcess, "call", lambda *args: -signal.SIGKILL)
    assert script.run("--out", tmp_path / "run", "--resume") == 137
    assert "stage search ended with exit code 137" in capsys.readouterr().err

def test_a_directory_in_use_is_one_line(script, done, copy, tmp_path, capsys):
    (tmp_path / "new").mkdir()  # another process has just made it
    with open(tmp_path / "new" / "metrics.jsonl", "w") as new, open(copy / "metrics.jsonl") as old:
        fcntl.flock(new, fcntl.LOCK_EX)
        assert script.run("--out", tmp_path / "new") == 2
        assert os.listdir(tmp_path / "new") == ["metrics.jsonl"]
        if script.module is baseline:  # its stage lives on
            (copy / "darts" / "result.json").unlink()
            old = open(copy / "darts" / "metrics.jsonl")
        fcntl.flock(old, fcntl.LOCK_EX)
        assert script.run("--resume", "--out", copy) == 2
        old.close()
    said = capsys.readouterr().err
    assert said.count("another process is writing") == 2 and "Traceback" not in said

HARMS = [("config.json", lost) for lost in ("args", "dataset", "limit_test", "data_dir")]
HARMS += [(name, content) for name in ("config.json", "the other") for content in (b"garbage", b"[]", b"")]

MODES = [("--resume --out", "result.json"), ("--gpu -1 --evaluate", "model.pt")]

@pytest.mark.parametrize("mode, other", MODES)
@pytest.mark.parametrize("name, harm", HARMS)
def test_a_damaged_run_is_one_line(script, copy, mode, other, name, harm, one_line):
    name = other if name == "the other" else name
    for folder in filter(Path.exists, (copy, copy / "darts")):
        if isinstance(harm, bytes):
            (folder / name).write_bytes(harm)
        else:
            config = json.loads((folder / name).read_text())
            del (config if harm == "args" else config["args"])[harm]
            (folder / name).write_text(json.dumps(config))
    assert script.module.main([*mode.split(), str(copy)]) == 2
    assert name in one_line()

# -------- Bad input: one line that says what to do, exit 2, no traceback, nothing written -------------------

BAD = """--wrong-flag | --search-epoch 3 | word | --dataset cifar1000 | --preset fast | --seed one | --seed -1
--seed 99999999999999 | --repeats 0 | --gpu two | --gpu 77 | --gpu -2 | --amp | --workers 0
--search-epochs 0
--train-epochs -3 | --batch-size 1 | --batch-size 1.5 | --channels 7 | --channels | --layers 2 | --lr nan
--lr -1 | --weight-decay -1 | --weight-decay inf | --drop-path 1 | --drop-path -1 | --limit-train 1
--limit-train many | --limit-test 0 | --image-size 4 | --grad-clip -1 | --cutout -1
--label-smoothing 1 | --label-smoothing -0.1 | --warmup-epochs -1 | --cache-gb -1 | --cache-gb nan
--auxiliary-weight 0.4 --image-size 16 | --dataset cifar10 --data-dir {broken}/file | --data-dir {broken}/file
--data-dir {broken}/nothing | --data-dir {broken}/empty | --data-dir {broken}/damaged | --out {broken}/file
--data-dir {broken}/one_class | --data-dir {broken}/sizes | --data-dir {broken}/wide
--data-dir {broken}/more | --data-dir {broken}/hollow | --data-dir {broken}/hollow --skip-damaged
--out {broken}/file/run | --genotype DARTS_V9 | --genotype {broken}/file
--genotype {broken}/damaged.json
--genotype {broken} | --evaluate {broken}/nothing | --evaluate {broken}"""
OWN = {
    "joint": """--search-batch-size 1 | --search-channels 3 | --search-layers 2 | --arch-lr -1 | --stages 0
--sub-policies 0 | --policy-lr nan | --limit-train 3 | --search-images 3 | --train-epochs 0 | --no-da
--policy {broken}/nothing | --policy {broken}/file | --policy {broken}/damaged.json
--policy {broken}/policy.json | --method dha | --space mobilenet
--search-only --genotype DARTS_V2 --policy none""",
    "dha": """--lr 5 | --weight-decay 0.5 | --max-params 1 --lasso 9 | --max-lr-step nan | --beta-lr -1
--lasso -1 | --tau-lr inf | --b-scale -1 | --freeze-distance nan | --genotype {broken}/nodes3.json
--genotype {broken}/concat.json | --genotype DARTS_V2 --train-epochs 0 | --genotype DARTS_V2 --max-params 1
--genotype DARTS_V2 --max-flops 1 | --policy none | --search-only
--space cell | --space mobilenet --layers 20 | --space mobilenet --layers 6 --auxiliary-weight 0.4
--space mobilenet --layers 6 --genotype DARTS_V2""",
    "baseline": """--method autoaugment | --processes 0 | --faa-epochs 0 | --faa-images 3 | --faa-batch-size 7
--faa-batch-size 2 | --faa-lr -1 | --policy-lr nan | --class-weight -1 | --critic-weight inf | --penalty -10
--depth 39 | --depth 4 | --width 0 | --sub-policies 0 | --stages 0 | --search-channels 3 | --tau-lr 0.1
--no-da | --limit-train 3 | --train-epochs 0 | --policy none | --policy=none | --space mobilenet
--compare {broken}/nothing | --compare {broken}""",
    "sequential dha": """--lr 5 | --weight-decay 0.1 | --search-channels 4 | --train-epochs 0
--label-smoothing 1 | --space mobilenet --layers 20""",
}
CASES = [(name, f"{OWN[name]} | {BAD * (name != 'sequential dha')}") for name in OWN]
CASES = [(name, flags.strip()) for name, text in CASES for flags in re.split(r"[|\n]", text) if flags.strip()]

@pytest.mark.parametrize("script, flags", CASES, indirect=["script"])
def test_bad_input_is_one_line(script, flags, broken, tmp_path, one_line, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = contents(broken)
    assert script.run(*flags.format(broken=broken).split()) == 2
    one_line()
    assert contents(broken) == before and not list(tmp_path.iterdir())

def test_help_and_check_write_nothing(script, tmp_path, monkeypatch, capsys, one_line):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        script.module.main(["--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and "--repeats" in said and "(default: 4)" in said
    assert script.run("--check") == script.run("--check", "--out", tmp_path / "run", "--repeats", "2") == 0
    if script.module is baseline:
        for flags in (["--preset", "quick"], ["--resume", "--out", "nothing"]):
            assert baseline.main(flags) == 2 and "--method is missing" in one_line()
        monkeypatch.setattr(baseline, "WORLD", 2)
        assert script.run() == 2 and "torchrun" in one_line()
    assert not list(tmp_path.iterdir())

def test_flags_of_one_name_have_one_meaning():
    own = {"--search-epochs", "--train-epochs", "--arch-lr"}  # named alike, explained by each method
    own |= {"--channels", "--layers"}  # dha explains them for two spaces
    known = {}
    for script in (joint, dha, baseline):
        for name, rest in re.findall(r'\badd\("(--[a-z-]+)", (.*)\)\n', Path(script.__file__).read_text()):
            assert name in own or known.setdefault(name, rest) == rest, name
    assert len(known) > 40

# -------- Parts that can be switched off, constraints, figures ----------------------------------------------

@only("dha")
def test_parts_of_dha_can_be_switched_off(script, tmp_path):
    plain, known = tmp_path / "plain", tmp_path / "known"
    assert script.run("--no-da", "--no-hpo", "--out", plain) == 0
    assert [record["lr"] for record in lines(plain)] == pytest.approx([0.05] * 3)
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
        genotype = common.Genotype(edges[:8], [2, 3, 4, 5], edges[8:], [2, 3, 4, 5])
        net = dha.SparseSupernet(4, 10, 3).keep(genotype)
        first = {"params": common.count_parameters(net), "flops": common.count_flops(net, 32)}
        limits = ["--max-params", first["params"], "--max-flops", first["flops"]]
    assert all(result(out)[name] <= first[name] for name in first)
    rejected = [i for i, record in enumerate(lines(out)) if record.get("moved") == []]
    assert rejected and capsys.readouterr().out.count("the last one stays") == len(rejected)
    assert all(supports[i] == supports[i + 1] for i in rejected)

@only("joint")
def test_search_only_policy_and_genotype_hand_over_files(script, tmp_path):
    first, second = tmp_path / "search", tmp_path / "train"
    assert script.run("--search-only", "--out", first) == 0
    assert "test_accuracy" not in result(first) and not (first / "model.pt").exists()
    given = ["--genotype", first / "genotype.json", "--policy", first / "policy.json"]
    assert script.run(*given, "--out", second) == 0
    for name in ("genotype.json", "policy.json"):
        assert json.loads((first / name).read_text()) == json.loads((second / name).read_text())
    said = result(second)
    assert said["search_epochs"] == 0 and said["method"] == "given genotype + given policy"

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

@pytest.mark.parametrize("figures", ["without matplotlib", "not drawn"])
def test_figures_that_fail_cost_no_result(script, figures, tmp_path, monkeypatch, capsys):
    if figures == "not drawn":
        monkeypatch.setitem(sys.modules, "matplotlib.pyplot", matplotlib.pyplot)
        monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda *args, **kwargs: 1 / 0)
    assert script.run(*script.least, "--out", tmp_path / "run") == 0
    said, programs = capsys.readouterr().out, 1 + (script.module is baseline)
    assert said.count("matplotlib is missing") == programs * (figures == "without matplotlib")
    assert len(re.findall("warning: .* could.* be drawn", said)) == programs * (figures == "not drawn")
    assert (tmp_path / "run" / "result.json").exists()

# -------- The table of runs ---------------------------------------------------------------------------------

def table(capsys, *folders: Path) -> list[list[str]]:
    """The rows that --compare prints: their cells."""
    assert baseline.main(["--compare", *map(str, folders)]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]

def pretend(out: Path, script, argv: str, **numbers) -> Path:
    """What --compare reads of a run with this command line."""
    args = vars(script.parse_args(argv.split()))
    said = {"method": script.__name__, "dataset": args["dataset"], "test_accuracy": 90.0, "params": 1.5e6}
    for name, module in {"darts": joint, "train": dha}.items() if script is baseline else ():
        if (name == "train") == (args["method"] == "dha"):
            (out / name).mkdir(parents=True)
            flags = ["--preset", args["preset"], *args["rest"], "--out", str(out / name)]
            (out / name / "config.json").write_text(json.dumps({"args": vars(module.parse_args(flags))}))
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps({"args": args}))
    said |= {"seconds": 7200.0, "search_seconds": 3600.0, "gpu_hours": 8.0} | numbers
    (out / "result.json").write_text(json.dumps(said))
    return out

def test_compare_has_a_row_for_every_method_and_data_set(tmp_path, capsys):
    quick = "--preset quick"
    for seed, flags in enumerate((quick, f"{quick} --lr 0.05 --workers 2", f"--lr 5e-2 {quick}")):
        pretend(tmp_path / "runs" / str(seed), dha, f"{flags} --seed {seed}", test_accuracy=80.0 + seed)
    others = pretend(tmp_path / "a", joint, quick), pretend(tmp_path / "b", joint, "--dataset cifar10")
    rows = table(capsys, tmp_path / "runs", *others, tmp_path / "runs" / "1")
    assert [row[:4] for row in rows] == [
        ["joint_darts_faa", "cifar10", "1", "90.00"],
        ["dha", "shapes", "3", "81.00 ± 1.00"],
        ["joint_darts_faa", "shapes", "1", "90.00"],
    ]
    assert rows[1][4:] == ["1.5 M", "1.00", "8.00", ""]

@pytest.mark.parametrize("script, base, flags, rows", [
    (dha, "--preset quick", ["", "--lr 0.01", "--lr 1e-2 --seed 3"], {"lr 0.05": "1", "lr 0.01": "2"}),
    (dha, "--dataset folder", ["", "--data-dir x"], {"data_dir data": "1", "data_dir x": "1"}),
    (dha, "--dataset shapes --seed 1", ["", "--preset paper", "--lr 0.025"], {"": "3"}),
    (baseline, "--method dha --preset quick", ["--lr 0.01 --lasso 1e-5", "--lr=1e-2", "--seed 2", "--lr 0.05"],
     {"lr 0.05": "2", "lr 0.01": "2"}),
    (baseline, "--method darts", ["", "--genotype DARTS_V2", "--genotype DARTS_V2 --train-epochs 600"],
     {"genotype None": "1", f"genotype {common.GENOTYPES['DARTS_V2']}": "2"}),
])  # fmt: skip
def test_compare_splits_rows_by_values_that_differ(script, base, flags, rows, tmp_path, capsys):
    for number, more in enumerate(flags):
        pretend(tmp_path / str(number), script, f"{base} {more}")
    assert {row[7]: row[2] for row in table(capsys, tmp_path)} == rows

def test_compare_passes_over_searches_and_reports_damage(tmp_path, capsys, one_line):
    whole, search = (pretend(tmp_path / "runs" / name, joint, "") for name in ("whole", "search"))
    (search / "result.json").write_text((search / "result.json").read_text().replace("test_acc", ""))
    assert len(table(capsys, whole, whole.parent)) == 1
    assert baseline.main(["--compare", str(search)]) == 2 and one_line()
    good = contents(whole)
    for path in good:
        for content in ("", "garbage", "[]", '{"test_accuracy": 1}', '{"args": 3}', '{"args": []}'):
            path.write_text(content)
            assert baseline.main(["--compare", str(whole)]) == 2 and path.name in one_line()
        path.write_bytes(good[path])
    (whole / "result.json").write_text((whole / "result.json").read_text().replace("90.0", '"high"'))
    assert baseline.main(["--compare", str(whole)]) == 2 and "result.json" in one_line()

# -------- Several processes ---------------------------------------------------------------------------------

TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node 2"

@only("joint", "dha")
def test_an_error_of_another_rank_alone_is_one_line(script, tmp_path, one_line, monkeypatch):
    waits = []
    monkeypatch.setattr(script.module, "RANK", 1)
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    assert script.run("--data-dir", tmp_path / "nothing") == 2
    assert "nothing" in one_line() and waits == [5]

@pytest.mark.slow
@only("joint", "dha")
def test_two_processes_train_one_network(script, tmp_path):
    process = script.process("--out", tmp_path / "run", launch=TORCHRUN)
    said = process.stdout.read()
    assert process.wait() == 0, said
    assert all(said.count(f"  epoch {n}  ") == 1 for n in range(1, len(script.phases) + 1))
    assert [record["phase"] for record in lines(tmp_path / "run")] == script.phases
    assert json.loads((tmp_path / "run" / "config.json").read_text())["processes"] == 2
    assert weights(tmp_path / "run")
    said = result(tmp_path / "run")
    assert said["gpu_hours"] == pytest.approx(2 * said["seconds"] / 3600, rel=1e-3)

@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--wrong-flag", "--lr nan", "--data-dir {broken}/more", "--batch-size 3"])
def test_a_mistake_is_one_line_of_all_processes(script, flags, broken, tmp_path):
    flags = [*flags.format(broken=broken).split(), "--out", tmp_path / "run"]
    if script.module is baseline:
        process = script.process(*flags, "--processes", "2")
    else:
        process = script.process(*flags, launch=TORCHRUN)
    said = process.stdout.read()
    assert process.wait() != 0 and not (tmp_path / "run").exists()
    assert sum(line.startswith("error: ") for line in said.splitlines()) == 1, said

@pytest.mark.slow
@only("sequential dha")
def test_stages_under_torchrun_end_with_a_killed_baseline_and_go_on(script, tmp_path):
    flags = ["--processes", "2", "--search-epochs", "40", "--out", tmp_path / "run"]
    process = script.process(*flags)
    assert any("search  epoch 1  " in line for line in iter(process.stdout.readline, ""))
    end(process, tmp_path / "run")
    process = script.process(*flags, "--resume")
    said = process.stdout.read()
    assert process.wait() == 0, said
    assert json.loads((tmp_path / "run" / "train" / "config.json").read_text())["processes"] == 2

@pytest.mark.slow
@only("baseline")
def test_the_baseline_refuses_torchrun(script, tmp_path):
    process = script.process("--out", tmp_path / "run", launch=TORCHRUN)
    said = process.stdout.read()
    assert process.wait() != 0 and "--processes" in said and not (tmp_path / "run").exists()
