"""Whole runs: what they say and leave, seeds, that they learn, a baseline's stages, parts switched off.

Oracles: the same commands one by one, the numbers recomputed from the files, chance (10 %) where a run must learn.
"""

import json
import re
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import baseline_sequential as baseline
import common
import dha
import joint_darts_faa as joint
from conftest import assert_same, call, history, lines, only, result, untimed, weights

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
    counts = {"train_images": [8, 8], "test_images": [5, 5]}
    assert config["data"] == {"classes": ["class0", "class1"], "image_size": 32, **counts}
    assert config["args"]["seed"] == 0 and config["torch"] == torch.__version__
    ran = {script.module, common} | ({joint, dha} if script.module is baseline else set())
    for path in (Path(module.__file__) for module in ran):
        assert (done / path.name).read_bytes() == path.read_bytes()


def test_metrics_and_result_are_those_of_the_epochs(script, done):
    records, said = lines(done), result(done)
    assert [record["phase"] for record in records] == script.phases
    whole = [{"stage": name, **record} for name in script.folders for record in lines(done / name)]
    assert records == (whole or history(done))
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
def test_a_run_says_first_what_it_is(script, done, tmp_path, capsys, monkeypatch):
    """Here in a folder with other files, without matplotlib, and with --compile, which changes nothing but the time."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda net: compiled.append(net) or net)
    (tmp_path / "run" / "lost+found").mkdir(parents=True)
    (tmp_path / "run" / "job.log").write_text("mine")
    assert script.run("--compile", "--out", tmp_path / "run") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "folder: 16 images to train on, 10 to test on, 2 classes, 32 x 32 pixels"
    assert re.fullmatch(r"search.* on cpu: [\d,]+ parameters, \d steps", said[1])
    assert said[2].startswith("epoch 1  search") and " more, until " in said[3]
    assert "no figures: matplotlib is missing (pip install matplotlib)" in said
    assert (tmp_path / "run" / "job.log").read_text() == "mine" and len(compiled) == 1
    assert_same(tmp_path / "run", done)


@METHODS
def test_another_seed_is_another_run(script, done, tmp_path):
    """(That the same one is the same run is what most tests here and in test_resume.py show.)"""
    assert script.run("--seed", "1", "--out", tmp_path / "run") == 0
    for mine, theirs in zip(lines(tmp_path / "run"), lines(done)):
        assert mine["loss"] != theirs["loss"]
    assert result(tmp_path / "run")["seed"] == 1


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


def test_curves_have_the_panels_and_names_that_were_recorded(tmp_path, monkeypatch):
    """And a dashed line between search and training, where there are both."""
    figures = []
    monkeypatch.setattr(joint, "Figure", lambda **size: figures.append(Figure(**size)) or figures[-1])
    panels = {"loss": ["loss", "val_loss"], "accuracy": ["test_accuracy"], "skips": ["skip_connects"]}
    search = {"epoch": 1, "phase": "search", "loss": 2.0, "val_loss": 2.1, "skip_connects": 3}
    train = {"epoch": 2, "phase": "train", "loss": 1.0, "test_accuracy": 50.0}
    for records in ([search], [train], [search, train]):
        joint.draw_curves(tmp_path / "curves.png", records, panels)
    names = [{axis.get_title(): len(axis.get_legend().get_texts()) for axis in figure.axes} for figure in figures]
    assert names == [{"loss": 2, "skips": 1}, {"loss": 1, "accuracy": 1}, {"loss": 2, "accuracy": 1, "skips": 1}]
    dashed = [[line.get_linestyle() for line in figure.axes[0].lines].count("--") for figure in figures]
    assert dashed == [0, 0, 1]


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
    assert (done / "model.pt").read_bytes() == (done / "train" / "model.pt").read_bytes()


def test_plain_darts_is_the_baseline_without_a_policy(data, tmp_path, monkeypatch):
    """Here the stages only note how they are called, and leave files. The data are loaded once.

    Other processes wait where process 0 writes: before its first file, and for what a stage is given.
    """
    called, loaded = [], []
    monkeypatch.setattr(baseline, "WORLD", 2)
    given = tmp_path / "run" / "train" / "genotype.json"
    monkeypatch.setattr(torch.distributed, "barrier", lambda: called.append(("wait", given.exists())))
    monkeypatch.setattr(common, "load_data", lambda *given, real=common.load_data: loaded.append(1) or real(*given))

    def run(args, device, data):
        called.append((Path(args.out).name, args.policy, args.search_only, args.genotype))
        joint.save(Path(args.out) / "result.json", {"test_accuracy": 90.0, "seed": 0, **joint.costs([])})
        joint.save(Path(args.out) / "metrics.jsonl", [])
        (Path(args.out) / "genotype.json").touch()

    monkeypatch.setattr(baseline, "JOINT", baseline.JOINT._replace(run=run))
    flags = "--method darts --preset quick --dataset folder --gpu -1 --out run --data-dir"
    assert call(baseline, *flags.split(), data) == 0
    search, train = ("search", "none", True, None), ("train", "none", False, "run/search/genotype.json")
    assert called == [("wait", False), ("wait", False), search, ("wait", True), train]
    assert loaded == [1]
    assert result(tmp_path / "run")["method"] == "DARTS" and not (tmp_path / "run" / "policy.json").exists()


# -------- Learning --------------------------------------------------------------------------------------------------


SHORT = "--preset quick --gpu -1 --limit-test 500 --search-epochs 1"
LEARNING = {
    "joint": (joint, f"{SHORT} --limit-train 2000 --search-images 128 --train-epochs 3"),
    "dha": (dha, f"{SHORT} --image-size 16 --limit-train 4000 --train-epochs 5"),
    "sequential dha": (baseline, f"{SHORT} --method dha --image-size 16 --limit-train 4000 --train-epochs 5"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNING)
def test_training_learns(name, tmp_path):
    """Chance is 10 %."""
    module, flags = LEARNING[name]
    assert call(module, *flags.split(), "--out", tmp_path / "run") == 0
    records = lines(tmp_path / "run")
    assert records[-1]["loss"] < records[-2]["loss"] and result(tmp_path / "run")["test_accuracy"] > 30


# -------- Parts that can be switched off ----------------------------------------------------------------------------


@only("dha")
def test_parts_of_dha_can_be_switched_off(script, tmp_path):
    plain, known = tmp_path / "plain", tmp_path / "known"
    assert script.run("--no-da", "--no-hpo", "--weight-decay", "0", "--out", plain) == 0
    for record in lines(plain):
        assert record["lr"] == pytest.approx(0.05) and record["wd"] == 0
        assert record["entropy"] == pytest.approx(5.278, abs=1e-3)  # log 196
    assert result(plain)["method"] == "One-Stage ISTA" and not (plain / "policy.json").exists()

    flags = "--no-hpo --genotype DARTS_V2 --train-epochs 2 --auxiliary-weight 0.4 --drop-path 0.2 --cutout 8"
    assert script.run(*flags.split(), "--out", known) == 0
    assert common.load_genotype(known / "genotype.json") == common.GENOTYPES["DARTS_V2"]
    assert dha.load_model(known / "model.pt")[0].genotype() == common.GENOTYPES["DARTS_V2"]
    assert lines(known)[1]["lr"] == pytest.approx(0.05 * (0.04 + 0.96 / 2))  # half the cosine
    assert result(known)["search_epochs"] == 0 and result(known)["method"] == "given genotype without HPO"


@only("joint")
def test_plain_darts_has_no_policy_and_its_collapse_is_reported(script, tmp_path, monkeypatch, capsys):
    cell = [("skip_connect", i % 2) for i in range(8)]
    collapsed = common.Genotype(cell, [2, 3, 4, 5], cell, [2, 3, 4, 5])
    monkeypatch.setattr(joint.DartsSupernet, "genotype", lambda self: collapsed)
    flags = "--policy none --search-epochs 1 --auxiliary-weight 0.4 --drop-path 0.2 --cutout 8"
    assert script.run(*flags.split(), "--out", tmp_path / "run") == 0
    assert not (tmp_path / "run" / "policy.json").exists() and result(tmp_path / "run")["method"] == "DARTS"
    record = lines(tmp_path / "run")[0]
    assert "selection" not in record and record["skip_connects"] == 8
    assert "warning: most operations of the normal cell are skip-connections" in capsys.readouterr().out
