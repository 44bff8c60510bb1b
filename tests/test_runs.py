"""Whole runs: what they say and leave, seeds, that they learn, a baseline's stages, parts switched off, limits.

Oracles: the same commands one by one, the numbers recomputed from the files, chance (10 %) where a run must learn.
"""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import baseline_sequential as baseline
import common
import dha
import joint_darts_faa as joint
from conftest import assert_same, call, contents, history, lines, only, result, settings, untimed, weights

METHODS = only("joint", "dha")
BASELINES = only("faa-darts", "sequential dha")
pytestmark = pytest.mark.usefixtures("no_figures")

FIGURES = {
    "joint": "curves.png cells.png selection.png images.png",
    "dha": "curves.png cells.png policy.png",
    "faa-darts": "policy/curves.png search/cells.png train/curves.png train/images.png",
    "sequential dha": "search/curves.png train/cells.png train/policy.png",
}
METHOD = {
    "joint": "DARTS + Faster AA",
    "dha": "DHA",
    "faa-darts": "Faster AA, then DARTS",
    "sequential dha": "Sequential DHA",
}


# -------- What a run leaves and says --------------------------------------------------------------------------------


def test_a_run_leaves_its_files(script, done):
    for name in "config.json metrics.jsonl genotype.json policy.json model.pt result.json".split():
        assert (done / name).stat().st_size > 0, name
    for folder in script.folders or [""]:
        assert (done / folder / "checkpoint.pt").stat().st_size > 0
    for name in FIGURES[script.name].split():
        with Image.open(done / name) as picture:
            assert min(picture.size) > 300
    assert not list(done.rglob("*.part"))

    # What it was run with; copies of all scripts that ran, so that it can be run again
    config = json.loads((done / "config.json").read_text())
    assert config.keys() == {"script", "args", "data", "torch", "torchvision", "python", "device"}
    assert config["data"] == {
        "classes": ["class0", "class1"], "train_images": [8, 8], "test_images": [5, 5], "image_size": 32
    }  # fmt: skip
    assert config["args"]["seed"] == 0 and config["device"] == "cpu"
    assert config["torch"] == torch.__version__ and config["python"] == sys.version
    source = Path(script.module.__file__)
    assert config["script"] == source.name
    ran = [source, common.__file__]
    if script.module is baseline:
        ran += [dha.__file__, joint.__file__]
    for path in map(Path, ran):
        assert (done / path.name).read_bytes() == path.read_bytes()


def test_metrics_and_result_are_those_of_the_epochs(script, done):
    records, said = lines(done), result(done)
    assert [record["phase"] for record in records] == script.phases
    if script.folders:
        whole = [{"stage": name, **record} for name in script.folders for record in lines(done / name)]
        assert records == whole
    else:
        assert records == history(done) and [record["epoch"] for record in records] == [1, 2, 3]
    search = [record for record in records if record["phase"] != "train"]
    assert (said["epochs"], said["search_epochs"]) == (len(records), len(search))
    assert said["seconds"] == pytest.approx(sum(record["seconds"] for record in records))
    assert said["search_seconds"] == pytest.approx(sum(record["seconds"] for record in search))
    assert said["gpu_hours"] == 0 and said["test_accuracy"] == records[-1]["test_accuracy"]
    assert (said["method"], said["dataset"], said["seed"]) == (METHOD[script.name], "folder", 0)


def test_the_saved_network_is_the_one_that_was_tested(script, done, data, monkeypatch):
    monkeypatch.setattr(dha, "ista", None)  # who loads a network decodes nothing
    load = joint.load_network if script.name in ("joint", "faa-darts") else dha.load_model
    net, info = load(done / "model.pt")
    said, test = result(done), common.load_data("folder", data)
    assert not net.training and info["classes"] == ["class0", "class1"]
    assert said["params"] == sum(p.numel() for p in net.parameters()) == common.count_parameters(net)
    assert said["flops"] == common.count_flops(net, 32)
    assert said["genotype"] == str(common.load_genotype(done / "genotype.json"))
    with torch.no_grad():
        answers = net(common.normalize(test.test_images, info["mean"], info["std"])).argmax(1)
    assert said["test_accuracy"] == 100 * (answers == test.test_labels).sum().item() / 10

    storages = [tensor.untyped_storage() for tensor in weights(done).values()]  # what safetensors asks for
    assert all(tensor.is_contiguous() for tensor in weights(done).values())
    assert len({storage.data_ptr() for storage in storages}) == len(storages)

    (done.parent / "cut.pt").write_bytes((done / "model.pt").read_bytes()[:-100])
    with pytest.raises(common.InputError, match="cannot read the model"):
        load(done.parent / "cut.pt")


@METHODS
def test_another_seed_is_another_run_and_it_says_first_what_it_is(script, done, tmp_path, capsys, monkeypatch):
    """In a folder with other files, without matplotlib, with --compile, which must change nothing but the time."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda net: compiled.append(net) or net)
    (tmp_path / "run" / "lost+found").mkdir(parents=True)
    for name in ("job.log", "config.json.part"):
        (tmp_path / "run" / name).write_text("mine")
    for seed in (1, 0):
        assert script.run("--seed", seed, "--compile", "--out", tmp_path / "run") == 0
        said = capsys.readouterr().out
        first, second, *_, last = said.split("\nepoch 1 ")[0].splitlines() + ["", said]
        assert first == "folder: 16 images to train on, 10 to test on, 2 classes, 32 x 32 pixels"
        assert second.startswith("search") and " on cpu: " in second and "parameters, " in second
        assert said.split("\n")[3].count(" more, until ") == 1 and "matplotlib is missing" in last
        assert (tmp_path / "run" / "job.log").read_text() == "mine" and len(compiled) == 1
        if seed == 1:
            assert untimed(lines(tmp_path / "run"))[0] != untimed(lines(done))[0]
            shutil.rmtree(tmp_path / "run")
            (tmp_path / "run").mkdir()
            (tmp_path / "run" / "job.log").write_text("mine")
            compiled.clear()
    assert_same(tmp_path / "run", done)


def test_a_run_of_the_papers_size_on_a_cpu_is_warned_of(capsys):
    net = torch.nn.Linear(1000, 1000)
    for device, steps, warned in (("cpu", 200_000, True), ("cpu", 50_000, False), ("cuda", 200_000, False)):
        dha.announce("training", torch.device(device), net, steps)
        assert ("--preset quick" in capsys.readouterr().out) == warned


@only("joint", "dha", "faa-darts")
def test_a_fault_in_a_figure_loses_no_result(script, copy, done, monkeypatch, capsys):
    for module in (joint, dha):
        monkeypatch.setattr(module, "Figure", lambda **size: 1 / 0)
    assert script.run("--resume", "--out", copy) == 0
    assert "warning: a figure could not be drawn: ZeroDivisionError" in capsys.readouterr().out
    assert_same(copy, done)


def test_a_world_size_of_others_is_not_torchruns(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    for module in (joint, dha):
        script = runpy.run_path(module.__file__)
        assert (script["RANK"], script["WORLD"]) == (0, 1)


# -------- A baseline is its stages ----------------------------------------------------------------------------------

BY_HAND = {  # folder: the command
    "faa-darts": {
        "search": (joint, "--policy none --search-only"),
        "train": (joint, "--genotype search/genotype.json --policy policy/policy.json"),
    },
    "sequential dha": {
        "search": (dha, "--no-da --no-hpo --train-epochs 0"),
        "train": (dha, "--genotype search/genotype.json"),
    },
}


@BASELINES
def test_a_baseline_is_its_commands_one_after_the_other(script, done, tmp_path):
    """Bit for bit. Faster AutoAugment's policy is copied: no other command searches it."""
    if script.name == "faa-darts":
        shutil.copytree(done / "policy", tmp_path / "policy")
    flags = baseline.without_own_flags(script.short)
    for folder, (module, handed) in BY_HAND[script.name].items():
        assert call(module, *flags, *handed.split(), "--out", folder) == 0
        assert untimed(lines(tmp_path / folder)) == untimed(lines(done / folder))
        assert untimed([result(tmp_path / folder)]) == untimed([result(done / folder)])
    for name in ("genotype.json", "policy.json"):
        assert (tmp_path / "train" / name).read_bytes() == (done / name).read_bytes()
    assert_same(tmp_path / "train", done / "train")
    mine, theirs = weights(tmp_path / "train"), weights(done)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@BASELINES
def test_stages_get_the_flags_of_the_command(script, done):
    """And what is handed over; and nothing else."""
    for folder, (module, handed) in BY_HAND[script.name].items():
        given = vars(module.parse_args([*baseline.without_own_flags(script.short), *handed.split(), "--out", "new"]))
        found = settings(done / folder)
        for name, value in given.items():
            if name in ("genotype", "policy") and value not in (None, "none"):
                assert found[name] == str(done / value)
            elif name != "out":
                assert found[name] == value, name


def test_plain_darts_is_the_baseline_without_a_policy(data, tmp_path, monkeypatch):
    """Here the stages only note how they are called, and leave files."""
    called = []

    def run(args, device):
        called.append((Path(args.out).name, args.policy, args.search_only, args.genotype))
        joint.save(Path(args.out) / "result.json", {"test_accuracy": 90.0, "seed": 0, **joint.costs([])})
        joint.save(Path(args.out) / "metrics.jsonl", [])
        (Path(args.out) / "genotype.json").touch()

    monkeypatch.setattr(baseline, "JOINT", baseline.JOINT._replace(run=run))
    flags = "--method darts --preset quick --dataset folder --gpu -1 --out run --data-dir"
    assert call(baseline, *flags.split(), data) == 0
    assert called == [("search", "none", True, None), ("train", "none", False, "run/search/genotype.json")]
    assert result(tmp_path / "run")["method"] == "DARTS" and not (tmp_path / "run" / "policy.json").exists()


# -------- Learning --------------------------------------------------------------------------------------------------
