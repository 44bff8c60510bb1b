"""The README: its snippets run, its links lead somewhere, its tables are those of the kept results."""

import functools
import importlib.util
import json
import re
import shutil
from pathlib import Path
from statistics import mean, stdev

import pytest

import common
import dha
import joint_darts_faa
from conftest import SCRIPTS

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
spec = importlib.util.spec_from_file_location("table", Path(__file__).parent / "benchmarks" / "table.py")
table = importlib.util.module_from_spec(spec)
spec.loader.exec_module(table)


def test_it_is_a_page():
    assert len(TEXT.splitlines()) <= 300
    assert len(SNIPPETS) == TEXT.count("```python") >= 4


@pytest.mark.parametrize("name", ["joint_darts_faa.py", "dha.py", "baseline_sequential.py"])
def test_line_links_lead_to_the_definition(name):
    lines = (ROOT / name).read_text().splitlines()
    links = re.findall(rf"\[`(\w+)`\]\({re.escape(name)}#L(\d+)\)", TEXT)
    assert links
    heads = ((n, re.match(r"(?:def|class) (\w+)", line)) for n, line in enumerate(lines, 1))
    found = {head[1]: n for n, head in heads if head}
    assert [(word, int(line)) for word, line in links] == [(word, found.get(word)) for word, _ in links]


def test_relative_links_exist():
    links = re.findall(r"\]\(([^)]+)\)", TEXT)
    missing = [x for x in links if not x.startswith("http") and not (ROOT / x.partition("#")[0]).exists()]
    assert links and not missing


def test_files_in_commands_exist():
    named = set(re.findall(r"python (\S+\.py)", TEXT)) | set(re.findall(r"`(tests/[\w/]+\.\w+)`", TEXT))
    assert named and not [name for name in named if not (ROOT / name).exists()]


@pytest.fixture(scope="module")
def finished_runs(tmp_path_factory) -> Path:
    """A folder with what the snippets read, from the shortest runs."""
    folder = tmp_path_factory.mktemp("readme")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "shapes", functools.cache(common.shapes))
        for name in ("dha", "joint"):
            module, *texts = SCRIPTS[name]
            out = folder / "runs" / f"{module.__name__}-shapes-seed0"
            short = [*texts[0].split(), "--limit-test", "16", "--dataset", "shapes", "--out", str(out)]
            assert module.main(short) == 0
        yield folder


@pytest.mark.parametrize("snippet", SNIPPETS, ids=[text.split("\n")[-2][:30] for text in SNIPPETS])
def test_snippets_run_alone(snippet, finished_runs, monkeypatch, capsys):
    monkeypatch.chdir(finished_runs)
    exec(compile(snippet, "README.md", "exec"), {})
    said = capsys.readouterr().out
    assert bool(said) == ("print(" in snippet)
    if "ista" in snippet:
        assert set(re.findall(r"\d+", said.splitlines()[1])) == {"3", "20"}
        assert float(re.search(r"lr ([\d.]+)", said)[1]) > 0.001


@pytest.mark.parametrize("name", ["joint", "dha", "ablation"])
def test_tables_are_those_of_the_kept_results(name):
    assert table.table(name) in TEXT


SWEPT = [row for name in table.SENSITIVITY for row in table.TABLES[name][1:]]


@pytest.mark.parametrize("row", SWEPT + table.TABLES["longer"])
def test_means_in_the_text_are_those_of_the_kept_results(row):
    accuracy = [result["test_accuracy"] for result in table.kept_results(row).values()]
    assert len(accuracy) == 3
    assert f"{row} {mean(accuracy):.1f} ± {stdev(accuracy):.1f}" in TEXT


def test_longer_runs_do_what_the_text_says():
    """DHA's accuracy after 36 epochs, and the epochs between which p(tau) loses all pairs but one."""
    text = (table.RESULTS / "dha_60_epochs.txt").read_text()
    rows = [tuple(map(float, line.split())) for line in text.splitlines()[3:]]
    at_36, uniform, one_pair = [], [], []
    for seed, result in table.kept_results("DHA, 60 epochs").items():
        epochs = [row[1:] for row in rows if row[0] == seed]  # epoch, entropy, lr, train, test
        assert [row[0] for row in epochs] == list(range(1, 61))
        last = [result["last_epoch"][name] for name in ("entropy", "lr", "train_accuracy", "test_accuracy")]
        assert epochs[-1][1:] == pytest.approx(last, abs=0.051)
        at_36.append(epochs[35][4])
        uniform.append(max(row[0] for row in epochs if row[1] > 5))
        one_pair.append(min(row[0] for row in epochs if row[1] < 0.1))
    assert f"after 36 epochs DHA has {min(at_36):.0f} to {max(at_36):.0f} %" in TEXT
    assert f"between epochs {min(uniform):.0f} and {max(one_pair):.0f} p(tau)" in TEXT
    assert max(b - a for a, b in zip(uniform, one_pair)) <= 2 and "within two epochs" in TEXT


def test_kept_results_are_of_the_tables_own_commands():
    kept = {path.name: json.loads(path.read_text()) for path in table.RESULTS.glob("*.json")}
    assert kept
    for row in table.ROWS:
        for seed, result in table.kept_results(row).items():
            command = table.ROWS[row].replace("OUT", "runs/table").replace("SEED", str(seed))
            assert result["command"].startswith(f"python {command} --seed {seed} ")
            assert result["seed"] == seed and result["test_images"] == 10_000
            kept.pop(f"{table.slug(row, seed)}.json")
    assert not kept, "results of no row"
    assert not [path for path in table.RESULTS.glob("*.json") if re.search(r"[ \"]/\w", path.read_text())]


def test_table_arithmetic(tmp_path, monkeypatch):
    """Mean, deviation and the t-interval of the differences, by hand."""
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    monkeypatch.setattr(table, "TABLES", {"two": ["DHA", "without DA"]})
    for row, accuracies in (("DHA", (50.0, 52.0, 54.0)), ("without DA", (49.0, 52.0, 52.0))):
        for seed, accuracy in enumerate(accuracies):
            about = {"test_accuracy": accuracy, "seconds": 60.0, "search_seconds": 30.0, "params": 2000}
            (tmp_path / f"{table.slug(row, seed)}.json").write_text(json.dumps(about))
    first, second = table.table("two").splitlines()[2:]
    assert "52.00 ± 2.00" in first and "1.0 (0.5)" in first and "2.0 k" in first
    assert "51.00 ± 1.73" in second
    assert "-1.00 ± 2.48" in second  # differences -1, 0, -2: 4.303 x 1 / sqrt(3)
    shutil.rmtree(tmp_path)
    assert table.table("two").count("| 0 |") == 2  # no result is no error


def test_random_genotypes_and_policies_are_valid_and_their_seeds(tmp_path):
    texts = []
    for seed in (0, 0, 1):
        table.prepare(tmp_path, seed)
        files = [tmp_path / f"random-{kind}-{seed}.json" for kind in ("genotype", "policy")]
        texts.append([file.read_text() for file in files])
        joint_darts_faa.load_policy(tmp_path / f"random-policy-{seed}.json")
        genotype = common.load_genotype(tmp_path / f"random-genotype-{seed}.json")
        common.Network(genotype, 10, 4, 3)
        dha.SparseSupernet(4, 10, 3).keep(genotype)
    first, again, other = texts
    assert first == again and first[0] != other[0] and first[1] != other[1]


@pytest.mark.parametrize("name", ["ablation", "sensitivity-joint", "sensitivity-dha"])
def test_figures_are_drawn_where_results_are_missing_too(name, tmp_path, monkeypatch):
    (tmp_path / ".github").mkdir()
    monkeypatch.setattr(table, "ROOT", tmp_path)
    table.draw(name)
    assert (tmp_path / ".github" / f"{name}.png").stat().st_size > 5000


def test_sweeps_differ_from_what_they_are_read_against():
    for flag, values in table.SWEEPS.items():
        assert values[0] < float(table.quick_value(flag)) < values[1]
