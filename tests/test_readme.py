"""README.md and tests/results/README.md: snippets run, links, names and commands are real, numbers are the kept results'."""

import ast
import functools
import importlib
import importlib.util
import json
import re
import shlex
import shutil
from pathlib import Path
from statistics import mean, stdev

import pytest

import common
import dha
import joint_darts_faa

ROOT = Path(__file__).parent.parent
PAGES = {name: (ROOT / name).read_text() for name in ("README.md", "tests/results/README.md")}
FRONT, RESULTS = PAGES.values()
SNIPPETS = re.findall(r"```python\n(.*?)```", FRONT, re.DOTALL)
NAMES = ["dha", "joint_darts_faa", "baseline_sequential", "common"]

spec = importlib.util.spec_from_file_location("table", Path(__file__).parent / "benchmarks" / "table.py")
table = importlib.util.module_from_spec(spec)
spec.loader.exec_module(table)


# -------- The pages ------------------------------------------------------------------------------------------


def test_the_front_page_is_short():
    assert len(FRONT.splitlines()) <= 150
    assert len(SNIPPETS) == FRONT.count("```python") >= 2


@pytest.mark.parametrize("page", PAGES)
def test_links_exist(page):
    """Files, and headings of the page itself."""
    heads = re.findall(r"^#+ (.*)", PAGES[page], re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
    links = re.findall(r"\]\(([^)]+)\)", PAGES[page])
    missing = []
    for link in links:
        file, _, anchor = link.partition("#")
        if not link.startswith("http"):
            there = (ROOT / page).parent.joinpath(file).exists() if file else anchor in anchors
            missing += [] if there else [link]
    assert links and not missing


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page):
    named = set(re.findall(r"python (\S+\.py)", PAGES[page])) | set(re.findall(r"`(tests/[\w/]+\.\w+)`", PAGES[page]))
    assert named and not [name for name in named if not (ROOT / name).exists()]


def commands() -> list[str]:
    """Every command of the two pages that starts a script, without comments."""
    found = []
    for text in PAGES.values():
        found += re.findall(r"^((?:python|torchrun [^\n]*?) (?:\w+)\.py[^\n]*)", text, re.MULTILINE)
        found += re.findall(r"`(python \w+\.py[^`\n]*)`", text)
    return sorted({command.split(" #")[0].strip() for command in found})


@pytest.mark.parametrize("command", commands())
def test_commands_parse(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no --out exists
    words = shlex.split(command)
    at = [word.endswith(".py") for word in words].index(True)
    importlib.import_module(words[at].removesuffix(".py")).parse_args(words[at + 1 :])


def definitions(name: str) -> set[str]:
    """What a script defines: functions, classes, and methods as Class.method."""
    found = set()
    for node in ast.parse((ROOT / f"{name}.py").read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return found


@pytest.mark.parametrize("name", ["dha", "joint_darts_faa"])
def test_functions_of_the_tables_exist(name):
    _, rows = FRONT.split(f"| in the paper | in `{name}.py` |\n| --- | --- |\n")
    rows = rows.split("\n\n")[0].splitlines()
    named = [word for row in rows for word in re.findall(r"`([^`]+)`", row.split("|")[2])]
    assert len(named) >= len(rows) and set(named) <= definitions(name)


@pytest.mark.parametrize("page", PAGES)
def test_dotted_names_exist(page):
    """`dha.ista(A, b, lam)` and the like."""
    for name, attribute in re.findall(rf"`({'|'.join(NAMES)})\.(\w+)[`(]", PAGES[page]):
        assert attribute == "py" or hasattr(importlib.import_module(name), attribute), f"{name}.{attribute}"


@pytest.mark.parametrize("snippet", SNIPPETS, ids=[text.split("\n")[0] for text in SNIPPETS])
def test_snippets_run_alone(snippet, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "shapes", functools.cache(common.shapes))
    exec(compile(snippet, "README.md", "exec"), {})
    said = capsys.readouterr().out
    assert bool(said) == ("print(" in snippet)
    if "hypergradient" in snippet:
        assert float(re.search(r"lr ([\d.]+)", said)[1]) > 0.001


# -------- The numbers ----------------------------------------------------------------------------------------


def accuracy(row: str) -> str:
    """A row's mean ± standard deviation, as the text has it."""
    found = [result["test_accuracy"] for result in table.kept_results(row).values()]
    assert len(found) == 3
    return f"{mean(found):.1f} ± {stdev(found):.1f}"


@pytest.mark.parametrize("name", ["joint", "dha", "ablation"])
def test_tables_are_those_of_the_kept_results(name):
    assert table.table(name) in RESULTS


@pytest.mark.parametrize("row", [row for name in table.SENSITIVITY for row in table.TABLES[name][1:]])
def test_sensitivity_is_that_of_the_kept_results(row):
    assert f"{row}: {accuracy(row)}" in RESULTS


@pytest.mark.parametrize("row", table.TABLES["longer"])
def test_longer_runs_are_those_of_the_kept_results(row):
    assert f"{row} {accuracy(row)}" in RESULTS


def test_numbers_of_the_front_page():
    """The six means in small; and the papers' numbers are those of the other page."""
    cells = {cell.split(" (`")[0].strip(): after.strip() for cell, after in re.findall(r"\| ([^|\n]+)(?=\|([^|\n]+)\|)", FRONT)}
    rows = {"plain DARTS": "DARTS", "Faster AutoAugment, then DARTS": "Faster AA, then DARTS", "jointly": "DARTS + Faster AA jointly"}
    for row in ("One-Stage ISTA", "Sequential DHA", "DHA", *rows):
        assert f"| {accuracy(rows.get(row, row))} |" in FRONT, row
    papers = re.findall(r"\d\d\.\d\d ± \d\.\d\d", FRONT)
    assert len(papers) >= 6 and all(number in RESULTS for number in papers)


def test_causes_are_those_of_the_last_epochs():
    """What the page says of DHA's last epoch: accuracy on training images, and lr."""

    def last(row: str, name: str) -> list[float]:
        return [result["last_epoch"][name] for result in table.kept_results(row).values()]

    with_da, without_da, lr = last("DHA", "train_accuracy"), last("without DA", "train_accuracy"), last("DHA", "lr")
    assert f"{min(with_da):.0f} to {max(with_da):.0f} % of the augmented training images" in RESULTS
    assert f"without DA {min(without_da):.0f} to {max(without_da):.0f} %" in RESULTS
    assert f"lr ended between {min(lr):.3f} and {max(lr):.3f}" in RESULTS
    assert f"where the cosine ends at {last('without HPO', 'lr')[0]:.3f}" in RESULTS
    assert {f"{entropy:.3f}" for entropy in last("DHA", "entropy")} == {"5.276"} and "5.276 of 5.278 nats" in RESULTS


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
    assert f"after 36 epochs DHA has {min(at_36):.0f} to {max(at_36):.0f} %" in RESULTS
    assert f"between epochs {min(uniform):.0f} and {max(one_pair):.0f} p(tau)" in RESULTS
    assert max(b - a for a, b in zip(uniform, one_pair)) <= 2 and "within two epochs" in RESULTS


def test_known_answers_are_those_of_their_output():
    output = (table.RESULTS / "known_answers.txt").read_text()
    section = RESULTS.split("## Known answers")[1].split("\n## ")[0]
    numbers = re.findall(r"\b0\.\d{3,4}\b|\b\d\d\.\d\b|\b\d,\d{3}\b", section)
    assert len(numbers) > 30
    known = {"0.0005", "1,860"}  # a setting, and a count of steps
    assert set(numbers) - known <= set(re.findall(r"[\d.,]*\d", output))


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


# -------- tests/benchmarks/table.py --------------------------------------------------------------------------


def test_table_arithmetic(tmp_path, monkeypatch):
    """Mean, deviation and the t-interval of the differences, by hand."""
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    monkeypatch.setattr(table, "TABLES", {"two": ["DHA", "without DA"]})
    for row, accuracies in (("DHA", (50.0, 52.0, 54.0)), ("without DA", (49.0, 52.0, 52.0))):
        for seed, number in enumerate(accuracies):
            about = {"test_accuracy": number, "seconds": 60.0, "search_seconds": 30.0, "params": 2000}
            (tmp_path / f"{table.slug(row, seed)}.json").write_text(json.dumps(about))
    first, second = table.table("two").splitlines()[2:]
    assert "52.00 ± 2.00" in first and "| 2.0 k | 1.0 | 0.5 |" in first
    assert "51.00 ± 1.73" in second
    assert "-1.00 [-3.48, +1.48]" in second  # differences -1, 0, -2: 4.303 x 1 / sqrt(3)
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
        dha.SparseSupernet(4, 10, 3).prune(genotype)
    first, again, other = texts
    assert first == again and first[0] != other[0] and first[1] != other[1]


@pytest.mark.parametrize("name", ["ablation", "sensitivity-joint", "sensitivity-dha"])
def test_figures_are_drawn_where_results_are_missing_too(name, tmp_path, monkeypatch):
    (tmp_path / ".github").mkdir()
    monkeypatch.setattr(table, "ROOT", tmp_path)
    table.draw(name)
    assert (tmp_path / ".github" / f"{name}.png").stat().st_size > 5000


def test_sweeps_differ_from_what_they_are_read_against():
    for setting, values in table.SWEEPS.items():
        assert values[0] < float(table.QUICK[setting]) < values[1]


@pytest.mark.parametrize("row", table.ROWS)
def test_rows_can_be_run(row, tmp_path, monkeypatch):
    """Their flags are those of the scripts, but for lambda's, which is no flag any more."""
    monkeypatch.chdir(tmp_path)
    words = table.ROWS[row].split()
    if row.startswith("lasso"):
        assert dha.LASSO == float(table.QUICK["lasso"])
        return
    own = ["--eta", "0.2", "--eta", "1", "--even"]  # of policy_start.py
    script = "joint_darts_faa" if words[0] == table.START else words[0].removesuffix(".py")
    flags = words[1:] if words[0] != table.START else [word for word in words[1:] if word not in own]
    importlib.import_module(script).parse_args(flags)
