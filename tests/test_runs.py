"""Whole runs of dha.py: what they leave, repeatability, kill and resume, bad input."""

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
import dha

SCRIPT = Path(dha.__file__)
TINY = "--preset quick --gpu -1 --channels 4 --layers 3 --limit-train 64 --limit-test 40 --batch-size 16".split()
SHORT = [*TINY, "--search-epochs", "2", "--train-epochs", "1"]


@pytest.fixture(autouse=True)
def signals_as_before(monkeypatch):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    small = common.shapes  # a small pool: a run's data are the first thing that takes time
    monkeypatch.setattr(common, "shapes", lambda count, seed: small(min(count, 200), seed))
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def process(*argv: str, **kwargs) -> subprocess.Popen:
    command = [sys.executable, str(SCRIPT), *map(str, argv)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs)


def finished(directory: Path) -> tuple[dict, str]:
    """A run's result without its times, and its metrics."""
    result = json.loads((directory / "result.json").read_text())
    return {k: v for k, v in result.items() if "seconds" not in k}, (directory / "metrics.jsonl").read_text()


def weights(directory: Path) -> dict:
    return torch.load(directory / "model.pt", weights_only=True)["state_dict"]


def same_weights(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items() if isinstance(v, torch.Tensor))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    small = common.shapes
    common.shapes = lambda count, seed: small(min(count, 200), seed)
    try:
        assert dha.main([*SHORT, "--out", str(out)]) == 0
    finally:
        common.shapes = small
    return out


def test_a_run_leaves_what_the_readme_says(done):
    names = "config.json metrics.jsonl checkpoint.pt genotype.json policy.json model.pt result.json"
    figures = "cells.png curves.png hyperparameters.png policy.png support.png"
    for name in (names + " " + figures).split():
        assert (done / name).stat().st_size > 0, name
    for name in figures.split():
        with Image.open(done / name) as picture:
            assert min(picture.size) > 300
    lines = [json.loads(line) for line in (done / "metrics.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in lines] == [1, 2, 3]
    assert [r["phase"] for r in lines] == ["search", "search", "train"]
    assert all(lines[1]["frozen"]) and not all(lines[0]["frozen"])
    result = json.loads((done / "result.json").read_text())
    net, info = dha.load_model(done / "model.pt")
    assert result["params"] == sum(p.numel() for p in net.parameters()) == common.count_parameters(net)
    assert str(common.load_genotype(done / "genotype.json")) == result["genotype"]
    assert common.parse_genotype(result["genotype"]) == net.genotype()
    policy = json.loads((done / "policy.json").read_text())
    assert sum(map(sum, policy["probability"])) == pytest.approx(1) and policy["operations"] == list(dha.AUGMENTATIONS)
    config = json.loads((done / "config.json").read_text())
    assert config["args"]["seed"] == 0 and config["versions"]["torch"] == torch.__version__


def test_evaluate_prints_the_runs_accuracy(done, capsys):
    assert dha.main(["--evaluate", str(done), "--gpu", "-1"]) == 0
    accuracy = json.loads((done / "result.json").read_text())["test_accuracy"]
    assert f"test accuracy: {accuracy:.2f} %" in capsys.readouterr().out


def test_resuming_a_finished_run_changes_nothing(done, capsys):
    before = {p.name: p.read_bytes() for p in done.iterdir()}
    assert dha.main([*SHORT, "--out", str(done), "--resume"]) == 0
    assert "finished already" in capsys.readouterr().out
    assert before == {p.name: p.read_bytes() for p in done.iterdir()}


def test_two_fresh_processes_give_the_same_bits(tmp_path):
    both = [process(*SHORT, "--out", tmp_path / name, env=os.environ | {"OMP_NUM_THREADS": "1"}) for name in "ab"]
    assert [p.wait(120) for p in both] == [0, 0]
    assert finished(tmp_path / "a") == finished(tmp_path / "b")
    assert same_weights(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_another_seed_gives_another_run(done, tmp_path):
    assert dha.main([*SHORT, "--seed", "1", "--out", str(tmp_path / "other")]) == 0
    assert not same_weights(weights(done), weights(tmp_path / "other"))


def kill_and_resume(tmp_path: Path, kills: int) -> None:
    flags = [*TINY, "--search-epochs", "5", "--train-epochs", "5", "--arch-lr", "0.01"]
    start = time.time()
    assert process(*flags, "--out", tmp_path / "whole").wait(200) == 0
    whole = time.time() - start
    moment = random.Random(0)
    for _ in range(kills):
        p = process(*flags, "--out", tmp_path / "cut", "--resume")
        time.sleep(moment.uniform(0.3, 0.9) * whole)
        p.kill()
        p.wait()
    last = process(*flags, "--out", tmp_path / "cut", "--resume")
    assert last.wait(200) == 0, last.stdout.read()
    assert finished(tmp_path / "whole") == finished(tmp_path / "cut")
    assert same_weights(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


@pytest.mark.slow
def test_killed_ten_times_and_resumed_ends_the_same(tmp_path):
    kill_and_resume(tmp_path, 10)


def test_stopped_between_any_two_epochs_and_resumed_ends_the_same(done, tmp_path, monkeypatch):
    out = tmp_path / "run"
    real = dha.save_checkpoint
    for _ in range(3):

        def save_and_stop(*a):
            real(*a)
            raise dha.Stopped(signal.SIGTERM)

        monkeypatch.setattr(dha, "save_checkpoint", save_and_stop)
        assert dha.main([*SHORT, "--out", str(out), "--resume"]) == 143
    monkeypatch.setattr(dha, "save_checkpoint", real)
    assert dha.main([*SHORT, "--out", str(out), "--resume"]) == 0
    assert finished(out) == finished(done) and same_weights(weights(out), weights(done))


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "another file"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(done, tmp_path, damage, capsys):
    out = tmp_path / "run"
    shutil.copytree(done, out)
    (out / "result.json").unlink()
    good = (out / "checkpoint.pt").read_bytes()
    bad = {"truncated": good[: len(good) // 2], "garbage": os.urandom(5000), "empty": b""}
    (out / "checkpoint.pt").write_bytes(bad.get(damage, (out / "model.pt").read_bytes()))
    assert dha.main(["--resume", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "warning" in said and "checkpoint.previous.pt" in said
    assert finished(out) == finished(done) and same_weights(weights(out), weights(done))


def test_two_damaged_checkpoints_are_an_error(done, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(done, out)
    (out / "result.json").unlink()
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        (out / name).write_bytes(b"garbage")
    assert dha.main(["--resume", "--out", str(out)]) == 2
    assert one_line_error(capsys)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_stop_cleanly_and_say_how_to_go_on(tmp_path, number, code):
    p = process(*TINY, "--search-epochs", "500", "--out", tmp_path / "run")
    lines = iter(p.stdout.readline, "")
    assert any(line.startswith("epoch ") for line in lines)  # runs
    p.send_signal(number)
    rest = p.stdout.read()
    assert p.wait(60) == code
    assert "go on with: python" in rest and "--resume" in rest and "Traceback" not in rest
    state = dha.load_checkpoint(tmp_path / "run")
    assert state["epoch"] >= 1


def test_parts_can_be_switched_off(tmp_path, capsys):
    flags = [*SHORT, "--no-da", "--no-hpo", "--out", str(tmp_path / "a")]
    assert dha.main([*flags, "--tau-lr", "0.1"]) == 0
    assert "--tau-lr does nothing with --no-da" in capsys.readouterr().out
    lines = [json.loads(x) for x in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [x["lr"] for x in lines] == pytest.approx([dha.DHA_QUICK["lr"]] * 3) and lines[0]["entropy"] is None
    assert not (tmp_path / "a" / "policy.json").exists()

    known = [*TINY, "--genotype", "DARTS_V2", "--train-epochs", "2", "--auxiliary-weight", "0.4", "--drop-path", "0.2"]
    assert dha.main([*known, "--no-hpo", "--out", str(tmp_path / "b")]) == 0
    assert common.load_genotype(tmp_path / "b" / "genotype.json") == common.GENOTYPES["DARTS_V2"]
    lines = [json.loads(x) for x in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()]
    assert lines[1]["lr"] == pytest.approx(dha.DHA_QUICK["lr"] * (0.04 + 0.96 / 2))  # half the cosine
    result = json.loads((tmp_path / "b" / "result.json").read_text())
    net = common.Network(common.GENOTYPES["DARTS_V2"], 10, 4, 3)
    assert result["params"] == common.count_parameters(net) and result["search_epochs"] == 0
    assert dha.main(["--evaluate", str(tmp_path / "b"), "--gpu", "-1"]) == 0

    (tmp_path / "g.txt").write_text("mine = " + str(dha.load_model(tmp_path / "a" / "model.pt")[0].genotype()))
    flags = [*TINY, "--genotype", str(tmp_path / "g.txt"), "--train-epochs", "1", "--out", str(tmp_path / "c")]
    assert dha.main(flags) == 0


def test_repeats_give_mean_and_deviation_and_resume(tmp_path, capsys):
    flags = [*TINY, "--search-epochs", "1", "--train-epochs", "0", "--repeats", "2", "--out", str(tmp_path / "r")]
    assert dha.main(flags) == 0
    said = capsys.readouterr().out
    accuracies = [
        json.loads((tmp_path / "r" / f"seed{s}" / "result.json").read_text())["test_accuracy"] for s in (0, 1)
    ]
    mean = sum(accuracies) / 2
    deviation = sum((a - mean) ** 2 for a in accuracies) ** 0.5
    assert f"2 seeds: test accuracy {mean:.2f} ± {deviation:.2f} %" in said
    shutil.rmtree(tmp_path / "r" / "seed1")
    assert dha.main([*flags, "--resume"]) == 0
    assert f"{mean:.2f} ± {deviation:.2f} %" in capsys.readouterr().out


def test_constraints_hold_for_the_result(tmp_path):
    torch.manual_seed(0)
    nets = [dha.SparseSupernet(4, 10, 3).prune() for _ in range(9)]
    params, flops = (
        sorted(map(count, nets))[4] for count in (common.count_parameters, lambda n: common.count_flops(n, 32))
    )
    rejected = 0
    for seed in range(3):
        out = tmp_path / str(seed)
        flags = ["--max-params", str(params), "--max-flops", str(flops), "--seed", str(seed), "--arch-lr", "0.3"]
        assert dha.main([*TINY, "--search-epochs", "4", "--train-epochs", "0", *flags, "--out", str(out)]) == 0
        result = json.loads((out / "result.json").read_text())
        assert result["params"] <= params and result["flops"] <= flops
        rejected += sum(
            not json.loads(x).get("accepted", True) for x in (out / "metrics.jsonl").read_text().splitlines()
        )
    assert rejected > 0


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys):
    assert dha.main([*SHORT, "--no-hpo", "--lr", "1e25", "--out", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "epoch 1, step" in said and "--lr" in said


def test_runs_without_matplotlib_and_tqdm(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert dha.main([*SHORT, "--out", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.count("matplotlib is missing") == 1
    assert (tmp_path / "run" / "result.json").exists() and not list((tmp_path / "run").glob("*.png"))


def test_a_figure_that_cannot_be_drawn_costs_no_result(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "draw_cell", lambda *args: 1 / 0)
    assert dha.main([*SHORT, "--out", str(tmp_path / "run")]) == 0
    assert "ZeroDivisionError" in capsys.readouterr().out
    assert (tmp_path / "run" / "result.json").exists()


@pytest.mark.slow
def test_two_processes_train_one_network(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    run = subprocess.run(
        [*command, *SHORT, "--out", str(tmp_path / "run")], capture_output=True, text=True, timeout=200
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count("epoch   3/3") == 1  # one process talks
    assert json.loads((tmp_path / "run" / "result.json").read_text())["epochs"] == 3


# Bad input: one line that says what to do, exit 2, no traceback, nothing overwritten.


def one_line_error(capsys) -> bool:
    said = capsys.readouterr().err
    return said.startswith("error: ") and said.count("\n") == 1 and "Traceback" not in said


BAD_FLAGS = [
    ["--wrong-flag"],
    ["--serch-epochs", "3"],
    ["--dataset", "cifar1000"],
    ["--preset", "fast"],
    ["--seed", "one"],
    ["--seed", "-1"],
    ["--repeats", "0"],
    ["--gpu", "two"],
    ["--gpu", "77"],
    ["--amp"],
    ["--search-epochs", "0"],
    ["--train-epochs", "-3"],
    ["--batch-size", "1"],
    ["--batch-size", "1.5"],
    ["--channels", "7"],
    ["--layers", "2"],
    ["--lr", "nan"],
    ["--lr", "5"],
    ["--weight-decay", "0.5"],
    ["--weight-decay", "-1"],
    ["--drop-path", "1"],
    ["--limit-train", "1"],
    ["--limit-test", "0"],
    ["--image-size", "4"],
    ["--grad-clip", "0"],
    ["--genotype", "DARTS_V9"],
    ["--genotype", "{dir}/genotype.json"],
    ["--max-params", "1"],
    ["--evaluate", "{dir}/nothing"],
    ["--evaluate", "{dir}"],
    ["--dataset", "folder", "--data-dir", "{dir}/nothing"],
    ["--dataset", "folder", "--data-dir", "{dir}/empty"],
    ["--dataset", "folder", "--data-dir", "{dir}/damaged"],
    ["--dataset", "folder", "--data-dir", "{dir}/one_class"],
    ["--dataset", "folder", "--data-dir", "{dir}/sizes"],
    ["--dataset", "folder", "--data-dir", "{dir}/wide"],
    ["--dataset", "cifar10", "--data-dir", "{dir}/file"],
    ["--auxiliary-weight", "0.4", "--image-size", "16"],
    ["--out", "{dir}/file/run"],
]


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A folder with most things that can be wrong with a user's files."""
    root = tmp_path_factory.mktemp("broken")
    (root / "genotype.json").write_text('{"normal": [["sep_conv_9x9", 0]]}')
    (root / "file").write_text("a file")
    (root / "empty" / "train").mkdir(parents=True)
    (root / "empty" / "test").mkdir()

    def images(name: str, classes: int, sizes: list) -> None:
        for part in ("train", "test"):
            for c in range(classes):
                folder = root / name / part / f"class{c}"
                folder.mkdir(parents=True)
                for i, size in enumerate(sizes):
                    Image.new("RGB", size, (40 * c, 10 * i, 0)).save(folder / f"{i}.png")

    images("damaged", 2, [(32, 32)] * 3)
    (root / "damaged" / "train" / "class1" / "2.png").write_bytes(b"not an image")
    images("one_class", 1, [(32, 32)] * 3)
    images("sizes", 2, [(32, 32), (40, 40)])
    images("wide", 2, [(40, 32), (40, 32)])
    return root


@pytest.mark.parametrize("flags", BAD_FLAGS, ids=" ".join)
def test_bad_input_is_one_line(flags, broken, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(p for p in broken.rglob("*"))
    try:
        code = dha.main([*SHORT, *(flag.replace("{dir}", str(broken)) for flag in flags)])
    except SystemExit as e:
        code = e.code
    assert code == 2
    assert one_line_error(capsys)
    assert sorted(p for p in broken.rglob("*")) == before


def test_unknown_flag_is_guessed(capsys):
    with pytest.raises(SystemExit):
        dha.main(["--serch-epochs", "3"])
    assert "did you mean --search-epochs?" in capsys.readouterr().err


def test_nothing_is_overwritten(done, tmp_path, capsys):
    before = {p.name: p.read_bytes() for p in done.iterdir()}
    assert dha.main([*SHORT, "--out", str(done)]) == 2
    assert one_line_error(capsys)
    foreign = tmp_path / "notes"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    assert dha.main([*SHORT, "--out", str(foreign)]) == 2
    assert one_line_error(capsys) and [p.name for p in foreign.iterdir()] == ["notes.txt"]
    assert dha.main([*SHORT, "--out", str(done), "--resume", "--lr", "0.01"]) == 2
    assert one_line_error(capsys)
    assert before == {p.name: p.read_bytes() for p in done.iterdir()}


@pytest.mark.parametrize("name", ["config.json", "model.pt"])
def test_evaluating_a_damaged_run_is_one_line(done, tmp_path, name, capsys):
    out = tmp_path / "run"
    shutil.copytree(done, out)
    (out / name).write_bytes(b"garbage")
    assert dha.main(["--evaluate", str(out), "--gpu", "-1"]) == 2
    assert one_line_error(capsys)


def test_a_full_disk_is_one_line_and_keeps_the_last_checkpoint(tmp_path, capsys, monkeypatch):
    real, count = dha.torch.save, []

    def full(*args, **kwargs):
        count.append(1)
        if len(count) == 2:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(dha.torch, "save", full)
    assert dha.main([*SHORT, "--out", str(tmp_path / "run")]) == 2
    assert one_line_error(capsys)
    assert dha.load_checkpoint(tmp_path / "run")["epoch"] == 1 and not list((tmp_path / "run").glob("*.part"))


def test_help_groups_flags_and_shows_defaults(capsys):
    with pytest.raises(SystemExit) as e:
        dha.main(["--help"])
    said = capsys.readouterr().out
    assert e.value.code == 0
    for text in ("data augmentation (DA)", "hyper-parameters (HPO)", "architecture (NAS)", "(default: 600)"):
        assert text in said
