"""Whole runs of baseline_sequential.py: stages, what they leave, kill and resume, failing stages, bad input."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import baseline_sequential as baseline
import common
import joint_darts_faa as joint
from test_runs import broken, one_line_error, same_weights, signals_as_before, weights  # noqa: F401

SCRIPT = Path(baseline.__file__)
TINY = "--preset quick --gpu -1 --limit-train 32 --limit-test 20 --batch-size 16 --channels 4 --layers 3".split()
TINY += ["--search-epochs", "1", "--train-epochs", "1"]
FAA = ["--method", "faa-darts", *TINY, "--faa-epochs", "2", "--faa-images", "16", "--faa-batch-size", "8"]
FAA += ["--search-channels", "2", "--search-batch-size", "8"]
DHA = ["--method", "dha", *TINY]


def process(*argv) -> subprocess.Popen:
    command = [sys.executable, "-u", str(SCRIPT), *map(str, argv)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(directory: Path) -> tuple[dict, str]:
    result = json.loads((directory / "result.json").read_text())
    return {k: v for k, v in result.items() if "seconds" not in k}, (directory / "metrics.jsonl").read_text()


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("baseline") / "run"
    assert baseline.main([*FAA, "--out", str(out)]) == 0
    return out


def test_a_run_leaves_what_the_readme_says(done):
    for name in "config.json metrics.jsonl genotype.json policy.json model.pt result.json".split():
        assert (done / name).stat().st_size > 0, name
    for name in "checkpoint.pt metrics.jsonl policy.json result.json losses.png selection.png policy.png".split():
        assert (done / "policy" / name).stat().st_size > 0, name
    lines = [json.loads(line) for line in (done / "metrics.jsonl").read_text().splitlines()]
    assert [(r["stage"], r["epoch"]) for r in lines] == [("policy", 1), ("policy", 2), ("darts", 1), ("darts", 2)]
    policy, darts = (json.loads((done / name / "result.json").read_text()) for name in ("policy", "darts"))
    result = json.loads((done / "result.json").read_text())
    assert result["test_accuracy"] == darts["test_accuracy"] and result["method"] == "faa-darts"
    assert result["seconds"] == pytest.approx(policy["seconds"] + darts["seconds"], abs=0.2)
    assert result["search_seconds"] == pytest.approx(policy["seconds"] + darts["search_seconds"], abs=0.2)
    given = json.loads((done / "darts" / "config.json").read_text())["args"]
    assert given["policy"] == str(done / "policy" / "policy.json") and given["search_channels"] == 2
    assert json.loads((done / "policy.json").read_text()) == json.loads((done / "policy" / "policy.json").read_text())
    net, _ = joint.load_network(done / "model.pt")
    assert common.count_parameters(net) == result["params"]


def test_evaluate_and_compare_and_resume_of_a_finished_run(done, capfd):
    before = {p: p.read_bytes() for p in done.rglob("*") if p.is_file()}
    assert baseline.main(["--evaluate", str(done), "--gpu", "-1"]) == 0
    accuracy = json.loads((done / "result.json").read_text())["test_accuracy"]
    assert f"test accuracy: {accuracy:.2f} % of 20 images" in capfd.readouterr().out
    assert baseline.main(["--compare", str(done), str(done / "darts")]) == 0
    said = capfd.readouterr().out
    assert "| Faster AA, then DARTS | shapes | quick | 1 |" in said and "| DARTS + given policy | shapes |" in said
    assert baseline.main(["--resume", "--out", str(done)]) == 0
    assert "finished already" in capfd.readouterr().out
    assert baseline.main([*FAA, "--out", str(done)]) == 2
    assert one_line_error(capfd)
    assert before == {p: p.read_bytes() for p in done.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "config, result",
    [
        ('{"script": "dha.py", "args": {}}', "[]"),
        ('{"script": "baseline_sequential.py", "args": {}}', "{}"),
        ('{"script": "../dha.py", "args": {}}', "{}"),
        ("{}", '{"stage_seconds": {"darts": 1}}'),
        ("[]", "{}"),
    ],
)
def test_evaluate_of_a_damaged_run_is_one_line(config, result, tmp_path, capfd):
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "result.json").write_text(result)
    assert baseline.main(["--evaluate", str(tmp_path)]) == 2
    assert one_line_error(capfd)


@pytest.mark.parametrize(
    "program, folder, flags, said",
    [
        (baseline, "darts", ["--method", "darts"], "is a run of joint_darts_faa.py"),
        (joint, "", [], "is a run of baseline_sequential.py"),
        (joint, "darts", ["--genotype", "DARTS_V2"], "was started without --genotype"),
        (joint, "darts", ["--lr", "0.7"], "was started with --lr"),
    ],
)
def test_resume_with_what_does_not_fit(program, folder, flags, said, done, capfd):
    assert program.main(["--resume", "--out", str(done / folder), *flags]) == 2
    error = capfd.readouterr().err
    assert said in error and error.startswith("error: ") and error.count("\n") == 1


def alive(word: str) -> list[str]:
    """Command lines of running processes with `word` in them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = path.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if word in text:
            found.append(text)
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="prctl and /proc")
def test_killed_in_a_stage_it_leaves_no_orphan_and_resumes_to_the_same(done, tmp_path):
    out = tmp_path / "run"
    p = process(*FAA, "--out", out)
    assert any(line.startswith("search   1/1") for line in iter(p.stdout.readline, ""))  # in the second stage
    p.kill()
    p.wait()
    time.sleep(0.5)
    assert not alive(str(out))
    again = process("--resume", "--out", out)
    said = again.stdout.read()
    assert again.wait(200) == 0, said
    assert "stage policy: Faster" not in said  # finished: not run again
    assert finished(out) == finished(done) and same_weights(weights(out), weights(done))


@pytest.mark.slow
@pytest.mark.parametrize("flags", [FAA, DHA], ids=["faa-darts", "dha"])
def test_killed_five_times_and_resumed_ends_the_same(flags, tmp_path):
    flags = [*flags, "--search-epochs", "3", "--train-epochs", "4"]
    start = time.time()
    assert process(*flags, "--out", tmp_path / "whole").wait(300) == 0
    whole, moment = time.time() - start, random.Random(0)
    for _ in range(5):
        p = process(*flags, "--out", tmp_path / "cut", "--resume")
        time.sleep(moment.uniform(0.3, 0.8) * whole)
        p.kill()
        p.wait()
    last = process(*flags, "--out", tmp_path / "cut", "--resume")
    assert last.wait(300) == 0, last.stdout.read()
    assert finished(tmp_path / "whole") == finished(tmp_path / "cut")
    assert same_weights(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


@pytest.mark.slow
def test_stages_run_under_torchrun(tmp_path):
    p = process(*DHA, "--processes", "2", "--out", tmp_path / "run")
    assert "torch.distributed.run" in p.stdout.read() and p.wait(300) == 0
    config = json.loads((tmp_path / "run" / "train" / "config.json").read_text())
    assert config["processes"] == 2


def test_sequential_dha_trains_what_its_first_stage_found(tmp_path, capfd):
    assert baseline.main([*DHA, "--out", str(tmp_path / "run")]) == 0
    said = capfd.readouterr().out
    first, second = (tmp_path / "run" / name for name in ("search", "train"))
    settings = [json.loads((stage / "config.json").read_text())["args"] for stage in (first, second)]
    assert settings[0]["no_da"] and settings[0]["no_hpo"] and settings[0]["train_epochs"] == 0
    assert not settings[1]["no_da"] and not settings[1]["no_hpo"] and settings[1]["train_epochs"] == 1
    assert common.load_genotype(first / "genotype.json") == common.load_genotype(second / "genotype.json")
    assert common.parse_genotype(settings[1]["genotype"]) == common.load_genotype(first / "genotype.json")
    assert "note:" not in said  # no stage is handed a flag that does nothing there
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert list(result["stage_seconds"]) == ["search", "train"]


@pytest.mark.slow
def test_a_signal_reaches_the_stage_and_says_how_to_go_on(tmp_path):
    p = process(*DHA, "--search-epochs", "500", "--out", tmp_path / "run")
    assert any(line.startswith("epoch   1/500") for line in iter(p.stdout.readline, ""))
    p.send_signal(signal.SIGINT)
    rest = p.stdout.read()
    assert p.wait(60) == 130
    assert "Traceback" not in rest
    assert rest.rstrip().splitlines()[-1].startswith("stopped; go on with: python")
    assert "baseline_sequential.py" in rest.rstrip().splitlines()[-1]


def test_a_stage_that_fails_stops_the_pipeline(tmp_path, capfd):
    assert baseline.main([*DHA, "--max-params", "1", "--out", str(tmp_path / "run")]) == 2
    said = capfd.readouterr().err
    first, last = said.strip().splitlines()
    assert first.startswith("error: 30 random architectures all broke")
    assert last.startswith("error: stage search ended with exit code 2") and "Go on with: python" in last
    assert not (tmp_path / "run" / "train").exists() and not (tmp_path / "run" / "result.json").exists()


def test_a_stage_that_is_killed_stops_the_pipeline(tmp_path, monkeypatch, capfd):
    script = tmp_path / "suicide.py"
    script.write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    monkeypatch.setattr(baseline, "__file__", str(tmp_path / "baseline_sequential.py"))
    args = baseline.parse_args(DHA)[0]
    with pytest.raises(baseline.StageFailed) as failure:
        baseline.run_stage("x", "suicide.py", tmp_path / "out", [], args)
    assert failure.value.code == 128 + 9


BAD_FLAGS = [
    ["--wrong-flag"],
    ["--method", "autoaugment"],
    ["--dataset", "cifar1000"],
    ["--preset", "fast"],
    ["--seed", "-1"],
    ["--repeats", "0"],
    ["--gpu", "77"],
    ["--amp"],
    ["--processes", "0"],
    ["--faa-epochs", "0"],
    ["--faa-images", "3"],
    ["--faa-batch-size", "7"],
    ["--faa-batch-size", "2"],
    ["--faa-lr", "-1"],
    ["--policy-lr", "nan"],
    ["--class-weight", "-1"],
    ["--critic-weight", "inf"],
    ["--penalty", "-10"],
    ["--depth", "39"],
    ["--depth", "4"],
    ["--width", "0"],
    ["--sub-policies", "0"],
    ["--search-epochs", "0"],
    ["--train-epochs", "0"],
    ["--channels", "7"],
    ["--search-channels", "3"],
    ["--batch-size", "1.5"],
    ["--lr", "fast"],
    ["--method", "dha", "--lr", "0.5"],
    ["--method", "dha", "--weight-decay", "0.1"],
    ["--limit-train", "1"],
    ["--limit-train", "3"],
    ["--image-size", "4"],
    ["--auxiliary-weight", "0.4", "--image-size", "16"],
    ["--processes", "3"],  # 64 images a batch
    ["--evaluate", "{dir}/nothing"],
    ["--evaluate", "{dir}"],
    ["--compare", "{dir}/nothing"],
    ["--dataset", "folder", "--data-dir", "{dir}/empty"],
    ["--dataset", "folder", "--data-dir", "{dir}/damaged"],
    ["--dataset", "folder", "--data-dir", "{dir}/one_class"],
    ["--dataset", "folder", "--data-dir", "{dir}/wide"],
    ["--dataset", "cifar10", "--data-dir", "{dir}/file"],
    ["--out", "{dir}/file/run"],
]


@pytest.mark.parametrize("flags", BAD_FLAGS, ids=" ".join)
def test_bad_input_is_one_line(flags, broken, tmp_path, capfd, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    before = sorted(p for p in broken.rglob("*"))
    try:
        code = baseline.main([*FAA, *(flag.replace("{dir}", str(broken)) for flag in flags)])
    except SystemExit as e:
        code = e.code
    assert code == 2
    assert one_line_error(capfd)
    assert sorted(p for p in broken.rglob("*")) == before and not list(tmp_path.rglob("config.json"))


def test_no_method_and_nothing_to_resume(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        baseline.main(["--preset", "quick"])
    assert e.value.code == 2 and one_line_error(capfd)
    assert baseline.main(["--resume", "--out", str(tmp_path / "nothing")]) == 2
    assert capfd.readouterr().err.count("\n") == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert baseline.main(FAA) == 2 and one_line_error(capfd)


def test_flags_without_effect_are_named(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(baseline, "run_baseline", lambda *a: (_ for _ in ()).throw(common.InputError("enough")))
    assert baseline.main([*DHA, "--faa-epochs", "3", "--search-channels", "4", "--out", str(tmp_path / "r")]) == 2
    said = capfd.readouterr().out
    assert "--faa-epochs does nothing with --method dha" in said and "--search-channels does nothing" in said


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capfd):
    assert baseline.main([*FAA, "--faa-lr", "1e30", "--out", str(tmp_path / "run")]) == 1
    said = capfd.readouterr().err
    assert said.startswith("error: the loss is not finite at epoch") and "--faa-lr" in said and os.linesep in said
