"""What people get wrong: one line that says what to do, exit code 2, nothing written. The oracle is the user's eye.

Wrong data and genotypes have their own tests (test_data.py, test_photos.py, test_genotypes.py); here are the ones that
every script must pass on, and its flags. What a resume refuses is in test_resume.py.
"""

import pytest
import torch
from PIL import Image

import baseline_sequential as baseline
import common
import dha
import joint_darts_faa as joint
from conftest import call, contents, only


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A folder with things that can be wrong with a user's files."""
    root = tmp_path_factory.mktemp("broken")
    (root / "file").touch()
    (root / "damaged.json").write_text('{"normal": [["sep_conv_9x9", 0]]}')
    joint.save(root / "dha.json", {"operations": [], "probability": [[1.0]]})
    cell = [("sep_conv_3x3", i % 2) for i in range(6)]
    common.save_genotype(common.Genotype(cell, [2, 3, 4], cell, [2, 3, 4]), root / "nodes3.json")
    for part in ("train", "test"):
        for name in ("damaged", "one_class"):
            for label in range(2 if name == "damaged" else 1):
                path = root / name / part / f"class{label}" / "0.png"
                path.parent.mkdir(parents=True)
                Image.new("RGB", (32, 32)).save(path)
    (root / "damaged" / "train" / "class1" / "0.png").write_bytes(b"not an image")
    return root


WRONG = {  # for every script; flags: what the line says
    "--wrong-flag": "--wrong-flag", "--train-epoch 2": "--train-epoch",  # no abbreviations
    "--dataset cifar1000": "cifar1000", "--seed one": "--seed", "--lr nan": "not in", "--batch-size 1": "not in",
    "--channels 7": "even", "--gpu 77": "no GPU 77", "--cutout 99": "--cutout",
    "--auxiliary-weight 0.4 --image-size 16": "auxiliary", "--data-dir {broken}/nothing": "--data-dir",
    "--data-dir {broken}/damaged": "0.png", "--data-dir {broken}/one_class": "class",
    "--out {broken}/file": "file", "--out {broken}/file/run": "file",
}  # fmt: skip
OWN = {
    "joint": {
        "--search-channels 3": "even", "--limit-train 3": "batch", "--train-epochs 0": "nothing to do",
        "--search-only --genotype DARTS_V2 --policy none": "nothing to do", "--no-da": "--no-da",
        "--genotype DARTS_V9": "DARTS_V9", "--genotype {broken}/damaged.json": "damaged.json",
        "--policy {broken}/nothing": "nothing", "--policy {broken}/dha.json": "policy of dha.py",
    },
    "dha": {
        "--lr 5": "--lr-range", "--weight-decay 0.5": "--wd-range", "--beta 1 2 3": "two",
        "--updates printed --weight-decay 1e-3": "--wd-range", "--tau-lr 1 2 3": "two", "--updates ratio": "--updates",
        "--genotype {broken}/nodes3.json": "", "--genotype DARTS_V2 --train-epochs 0": "nothing to do",
        "--space mobilenet --layers 20": "--layers", "--policy none": "--policy",
    },
    "faa-darts": {
        "--method autoaugment": "--method", "--faa-batch-size 7": "even", "--depth 39": "--depth",
        "--penalty -10": "not in", "--limit-train 3": "batch", "--tau-lr 0.1": "--tau-lr",
        "--search-channels 3": "even", "--train-epochs 0": "--train-epochs", "--genotype=DARTS_V2": "stages hand over",
        "--policy none": "stages hand over", "--search-only": "stages hand over", "--compare {broken}": "finished run",
    },
    "sequential dha": {"--lr 5": "--lr-range", "--label-smoothing 1": "not in", "--no-da": "stages hand over"},
}  # fmt: skip
SHARED = [(name, flags, says) for name in ("joint", "dha", "faa-darts") for flags, says in WRONG.items()]
CASES = SHARED + [(name, *case) for name, cases in OWN.items() for case in cases.items()]


@pytest.mark.parametrize("script, flags, says", CASES, indirect=["script"])
def test_bad_input_is_one_line(script, flags, says, broken, tmp_path, one_line):
    """That of a baseline's last stage too, before the first one starts."""
    before = contents(broken)
    out = [] if "--out" in flags else ["--out", tmp_path / "run"]
    assert script.run(*out, *flags.format(broken=broken).split()) == 2
    assert says in one_line()
    assert contents(broken) == before and not list(tmp_path.iterdir())


@only("joint", "dha", "faa-darts")
def test_help_shows_the_presets_defaults(script, capsys, one_line):
    of_quick = {joint: "768", dha: "[0.04]", baseline: "64"}[script.module]
    for flags, shown in (["--help"], False), (["--preset", "quick", "--help"], True):
        assert call(script.module, *flags) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert "--resume" in said and (f"(default: {of_quick})" in said) == shown
    if script.module is baseline:
        assert call(baseline, "--resume", "--out", "nothing") == 2 and "--method is missing" in one_line()


@pytest.mark.parametrize("world, size", [(3, 8), (2, 3)])
@only("joint", "dha", "faa-darts")
def test_batches_that_processes_cannot_share_are_refused(script, world, size, tmp_path, one_line, monkeypatch):
    for module in (joint, dha, baseline):
        monkeypatch.setattr(module, "WORLD", world)
    for name in ("init_process_group", "barrier"):
        monkeypatch.setattr(torch.distributed, name, lambda *args: None)
    assert script.run("--batch-size", size, "--out", tmp_path / "run") == 2
    assert "process" in one_line() and not (tmp_path / "run").exists()


NOTES = [  # flags that do nothing: which, and because of which
    ("joint", "--policy none --policy-lr 1", "--policy-lr does nothing with --policy none"),
    ("joint", "--genotype DARTS_V2 --arch-lr=1", "--arch-lr does nothing with --genotype"),
    ("joint", "--genotype DARTS_V2 --policy none --search-layers 4", "--search-layers does nothing with a given"),
    ("dha", "--no-da --tau-lr 5", "--tau-lr does nothing with --no-da"),
    ("dha", "--no-hpo --beta=5 --lr 9", "--beta does nothing with --no-hpo"),
    ("dha", "--genotype DARTS_V2 --b-scale 1", "--b-scale does nothing with --genotype"),
    ("sequential dha", "--critic-weight 9", "--critic-weight does nothing with --method dha"),
    ("joint", "--amp", "--amp is for a GPU"),
    ("dha", "--amp", "--amp is for a GPU"),
    ("faa-darts", "--amp", "--amp is for a GPU"),
]


@pytest.mark.parametrize("script, flags, note", NOTES, indirect=["script"])
def test_a_flag_in_vain_is_a_note(script, flags, note, capsys):
    args = script.module.parse_args([*script.short, *flags.split()])
    assert f"note: {note}" in capsys.readouterr().out and not args.amp


@only("joint", "dha", "faa-darts")
def test_a_run_is_named_by_its_script_data_and_seed(script, monkeypatch, tmp_path):
    """A baseline also by its method; a folder of images by its name. A tilde after = is home, as in no shell."""
    monkeypatch.setenv("HOME", str(tmp_path))
    name = script.module.__name__ + ("-faa-darts" if script.module is baseline else "")
    args = script.module.parse_args([*script.short, "--data-dir=~/birds/", "--seed", "3", "--epochs", "7"])
    assert args.out == f"runs/{name}-birds-seed3"
    assert args.data_dir == f"{tmp_path}/birds/" and args.train_epochs in (7, "7")
    args = script.module.parse_args([*script.short, "--dataset", "shapes"])
    assert args.out == f"runs/{name}-shapes-seed0"
