"""Whole runs of joint_darts_faa.py: what they leave, repeatability, kill and resume, bad input."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import common
import joint_darts_faa as joint
from test_runs import broken, finished, one_line_error, same_weights, signals_as_before, weights  # noqa: F401

SCRIPT = Path(joint.__file__)
SMALL = "--limit-train 32 --limit-test 20 --search-batch-size 8 --batch-size 16 --channels 4 --layers 3".split()
TINY = ["--preset", "quick", "--gpu", "-1", "--search-channels", "2", *SMALL]
SHORT = [*TINY, "--search-epochs", "2", "--train-epochs", "2"]
NO_SEARCH = [*TINY, "--genotype", "DARTS_V2", "--policy", "none", "--train-epochs", "2"]


def process(*argv, **kwargs) -> subprocess.Popen:
    command = [sys.executable, str(SCRIPT), *map(str, argv)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("joint") / "run"
    small = common.shapes
    common.shapes = lambda count, seed: small(min(count, 200), seed)
    try:
        assert joint.main([*SHORT, "--out", str(out)]) == 0
    finally:
        common.shapes = small
    return out


def test_a_run_leaves_what_the_readme_says(done):
    names = "config.json metrics.jsonl checkpoint.pt genotype.json policy.json model.pt result.json".split()
    figures = "cells.png search.png alpha.png selection.png policy.png images.png curves.png".split()
    for name in names + figures:
        assert (done / name).stat().st_size > 0, name
    for name in figures:
        with Image.open(done / name) as picture:
            assert min(picture.size) > 300
    lines = [json.loads(line) for line in (done / "metrics.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in lines] == [1, 2, 3, 4]
    assert [r["phase"] for r in lines] == ["search", "search", "train", "train"]
    assert sum(lines[1]["selection"].values()) == pytest.approx(1, abs=1e-4)
    genotype = common.load_genotype(done / "genotype.json")
    assert str(genotype) == lines[1]["genotype"]
    assert lines[1]["skip_connects"] == sum(op == "skip_connect" for op, _ in genotype.normal)
    result = json.loads((done / "result.json").read_text())
    net, info = joint.load_network(done / "model.pt")
    assert (
        result["params"] == common.count_parameters(net) == common.count_parameters(common.Network(genotype, 10, 4, 3))
    )
    assert result["test_accuracy"] == lines[-1]["test_accuracy"] and len(info["classes"]) == 10
    state = joint.load_checkpoint(done)
    assert state["alphas"].shape == (3, 2, 14, 8) and state["selection"].shape == (3, 16)
    assert joint.Policy.load(done / "policy.json")(torch.rand(4, 3, 32, 32)).shape == (4, 3, 32, 32)


def test_evaluate_prints_the_runs_accuracy(done, capsys):
    assert joint.main(["--evaluate", str(done), "--gpu", "-1"]) == 0
    accuracy = json.loads((done / "result.json").read_text())["test_accuracy"]
    assert f"test accuracy: {accuracy:.2f} % of 20 images" in capsys.readouterr().out


def test_two_fresh_processes_give_the_same_bits_and_another_seed_others(tmp_path):
    both = [process(*SHORT, "--out", tmp_path / name, env=os.environ | {"OMP_NUM_THREADS": "1"}) for name in "ab"]
    assert [p.wait(200) for p in both] == [0, 0]
    assert finished(tmp_path / "a") == finished(tmp_path / "b")
    assert same_weights(weights(tmp_path / "a"), weights(tmp_path / "b"))
    for name in ("policy.json", "genotype.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    other = [*TINY, "--search-epochs", "1", "--search-only", "--seed", "1", "--out", str(tmp_path / "c")]
    assert joint.main(other) == 0
    assert (tmp_path / "a" / "policy.json").read_bytes() != (tmp_path / "c" / "policy.json").read_bytes()


def kill_and_resume(tmp_path: Path, kills: int) -> None:
    flags = [*TINY, "--search-epochs", "4", "--train-epochs", "6"]
    start = time.time()
    assert process(*flags, "--out", tmp_path / "whole").wait(300) == 0
    whole = time.time() - start
    moment = random.Random(0)
    for _ in range(kills):
        p = process(*flags, "--out", tmp_path / "cut", "--resume")
        time.sleep(moment.uniform(0.3, 0.9) * whole)
        p.kill()
        p.wait()
    last = process(*flags, "--out", tmp_path / "cut", "--resume")
    assert last.wait(300) == 0, last.stdout.read()
    assert finished(tmp_path / "whole") == finished(tmp_path / "cut")
    assert same_weights(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


@pytest.mark.slow
def test_killed_ten_times_and_resumed_ends_the_same(tmp_path):
    kill_and_resume(tmp_path, 10)


def test_stopped_between_any_two_epochs_and_resumed_ends_the_same(done, tmp_path, monkeypatch):
    out, real = tmp_path / "run", joint.save_checkpoint
    for _ in range(4):

        def save_and_stop(*a):
            real(*a)
            raise joint.Stopped(signal.SIGTERM)

        monkeypatch.setattr(joint, "save_checkpoint", save_and_stop)
        assert joint.main([*SHORT, "--out", str(out), "--resume"]) == 143
    monkeypatch.setattr(joint, "save_checkpoint", real)
    assert joint.main([*SHORT, "--out", str(out), "--resume"]) == 0
    assert finished(out) == finished(done) and same_weights(weights(out), weights(done))
    for name in ("policy.json", "genotype.json"):
        assert (out / name).read_bytes() == (done / name).read_bytes()
    again = joint.load_checkpoint(out), joint.load_checkpoint(done)
    assert torch.equal(again[0]["alphas"], again[1]["alphas"]) and torch.equal(*(s["selection"] for s in again))


@pytest.mark.parametrize("damage", ["truncated", "garbage"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(done, tmp_path, damage, capsys):
    out = tmp_path / "run"
    shutil.copytree(done, out)
    (out / "result.json").unlink()
    good = (out / "checkpoint.pt").read_bytes()
    (out / "checkpoint.pt").write_bytes(good[: len(good) // 2] if damage == "truncated" else os.urandom(5000))
    assert joint.main(["--resume", "--out", str(out)]) == 0
    assert "checkpoint.previous.pt" in capsys.readouterr().out
    assert finished(out) == finished(done) and same_weights(weights(out), weights(done))


@pytest.mark.slow
def test_a_signal_in_the_search_stops_cleanly_and_says_how_to_go_on(tmp_path):
    p = process(*TINY, "--search-epochs", "500", "--out", tmp_path / "run")
    assert any(line.startswith("search   1/500") for line in iter(p.stdout.readline, ""))
    p.send_signal(signal.SIGTERM)
    rest = p.stdout.read()
    assert p.wait(60) == 143
    assert "go on with: python" in rest and "--resume" in rest and "Traceback" not in rest


def test_search_only_policy_and_genotype_hand_over_files(done, tmp_path, capsys):
    """The two halves of the method apart: search only, then training from its files alone."""
    flags = [*TINY, "--search-epochs", "1", "--search-only", "--out", str(tmp_path / "search")]
    assert joint.main(flags) == 0
    result = json.loads((tmp_path / "search" / "result.json").read_text())
    assert "test_accuracy" not in result and result["epochs"] == 1
    assert not (tmp_path / "search" / "model.pt").exists()
    given = [
        "--genotype",
        str(tmp_path / "search" / "genotype.json"),
        "--policy",
        str(tmp_path / "search" / "policy.json"),
    ]
    assert (
        joint.main([*TINY, *given, "--policy-lr", "0.1", "--train-epochs", "1", "--out", str(tmp_path / "train")]) == 0
    )
    assert "--policy-lr does nothing with --policy" in capsys.readouterr().out
    for name in ("genotype.json", "policy.json"):
        assert json.loads((tmp_path / "train" / name).read_text()) == json.loads(
            (tmp_path / "search" / name).read_text()
        )
    assert json.loads((tmp_path / "train" / "result.json").read_text())["search_epochs"] == 0


def test_plain_darts_has_no_policy(tmp_path):
    flags = [*TINY, "--policy", "none", "--search-epochs", "1", "--train-epochs", "1", "--auxiliary-weight", "0.4"]
    assert joint.main([*flags, "--drop-path", "0.2", "--cutout", "8", "--out", str(tmp_path / "run")]) == 0
    assert not (tmp_path / "run" / "policy.json").exists()
    assert "selection" not in json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])


def test_collapse_is_reported(tmp_path, monkeypatch, capsys):
    skips = common.Genotype(
        [("skip_connect", i % 2) for i in range(8)], [2, 3, 4, 5], [("skip_connect", 0)] * 8, [2, 3, 4, 5]
    )
    monkeypatch.setattr(joint.DartsSupernet, "genotype", lambda self: skips)
    assert joint.main([*TINY, "--search-epochs", "1", "--search-only", "--out", str(tmp_path / "run")]) == 0
    assert "8 of the normal cell's 8 operations are skip-connections" in capsys.readouterr().out


def test_repeats_give_mean_and_deviation(tmp_path, capsys):
    assert joint.main([*NO_SEARCH, "--repeats", "2", "--out", str(tmp_path / "run")]) == 0
    accuracies = [
        json.loads((tmp_path / "run" / f"seed{s}" / "result.json").read_text())["test_accuracy"] for s in (0, 1)
    ]
    assert f"2 seeds: test accuracy {sum(accuracies) / 2:.2f} ± " in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_search_and_train_one_network(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    flags = [*TINY, "--search-epochs", "1", "--train-epochs", "1", "--out", str(tmp_path / "run")]
    run = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=250)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count("search   1/1") == 1 and run.stdout.count("train   1/1") == 1
    assert json.loads((tmp_path / "run" / "result.json").read_text())["epochs"] == 2


def test_runs_without_matplotlib_and_tqdm(tmp_path, monkeypatch, capsys):
    for name in ("matplotlib", "matplotlib.pyplot", "tqdm"):
        monkeypatch.setitem(sys.modules, name, None)
    assert joint.main([*NO_SEARCH, "--out", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.count("matplotlib is missing") == 1


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys):
    assert joint.main([*NO_SEARCH, "--lr", "1e30", "--grad-clip", "1e30", "--out", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: the loss is not finite at epoch") and "--lr" in said


BAD_FLAGS = [
    ["--wrong-flag"],
    ["--dataset", "cifar1000"],
    ["--preset", "fast"],
    ["--seed", "-1"],
    ["--repeats", "0"],
    ["--gpu", "77"],
    ["--amp"],
    ["--search-epochs", "0"],
    ["--train-epochs", "0"],
    ["--search-batch-size", "1"],
    ["--batch-size", "1.5"],
    ["--channels", "7"],
    ["--search-channels", "3"],
    ["--search-layers", "2"],
    ["--lr", "nan"],
    ["--arch-lr", "-1"],
    ["--policy-lr", "-0.1"],
    ["--sub-policies", "0"],
    ["--stages", "0"],
    ["--weight-decay", "-1"],
    ["--drop-path", "1"],
    ["--limit-train", "1"],
    ["--limit-train", "3"],
    ["--image-size", "4"],
    ["--genotype", "DARTS_V9"],
    ["--genotype", "{dir}/genotype.json"],
    ["--policy", "{dir}/nothing.json"],
    ["--policy", "{dir}/genotype.json"],
    ["--policy", "{dir}/file"],
    ["--search-only", "--genotype", "DARTS_V2", "--policy", "none"],
    ["--evaluate", "{dir}/nothing"],
    ["--evaluate", "{dir}"],
    ["--dataset", "folder", "--data-dir", "{dir}/empty"],
    ["--dataset", "folder", "--data-dir", "{dir}/damaged"],
    ["--dataset", "folder", "--data-dir", "{dir}/one_class"],
    ["--dataset", "folder", "--data-dir", "{dir}/wide"],
    ["--dataset", "cifar10", "--data-dir", "{dir}/file"],
    ["--auxiliary-weight", "0.4", "--image-size", "16"],
    ["--out", "{dir}/file/run"],
]


@pytest.mark.parametrize("flags", BAD_FLAGS, ids=" ".join)
def test_bad_input_is_one_line(flags, broken, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    before = sorted(p for p in broken.rglob("*"))
    try:
        code = joint.main([*SHORT, *(flag.replace("{dir}", str(broken)) for flag in flags)])
    except SystemExit as e:
        code = e.code
    assert code == 2
    assert one_line_error(capsys)
    assert sorted(p for p in broken.rglob("*")) == before and not list(tmp_path.rglob("config.json"))


def test_nothing_is_overwritten(done, capsys):
    before = {p.name: p.read_bytes() for p in done.iterdir()}
    assert joint.main([*SHORT, "--out", str(done)]) == 2
    assert one_line_error(capsys)
    assert joint.main([*SHORT, "--out", str(done), "--resume", "--lr", "0.01"]) == 2
    assert one_line_error(capsys)
    assert joint.main([*SHORT, "--out", str(done), "--resume"]) == 0  # finished already
    assert before == {p.name: p.read_bytes() for p in done.iterdir()}


def test_a_full_disk_is_one_line_and_keeps_the_last_checkpoint(tmp_path, capsys, monkeypatch):
    real, count = joint.torch.save, []

    def full(*args, **kwargs):
        count.append(1)
        if len(count) == 2:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(joint.torch, "save", full)
    assert joint.main([*NO_SEARCH, "--out", str(tmp_path / "run")]) == 2
    assert one_line_error(capsys)
    assert joint.load_checkpoint(tmp_path / "run")["epoch"] == 1 and not list((tmp_path / "run").glob("*.part"))


def test_shared_flags_are_the_same_in_every_script():
    import re

    import dha

    def flags(module):
        text = Path(module.__file__).read_text()
        found = re.findall(r'g\.add_argument\("(--[a-z-]+)", (.*)\)\n', text)
        return {name: re.sub(r"default=[^,]*, ", "", rest) for name, rest in found}

    mine, theirs = flags(joint), flags(dha)
    own = {"--search-epochs", "--train-epochs", "--arch-lr", "--dataset"}  # named alike, explained by each method
    shared = (mine.keys() & theirs.keys()) - own
    assert len(shared) > 20
    assert {name: mine[name] for name in shared} == {name: theirs[name] for name in shared}
