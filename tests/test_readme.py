"""README.md and tests/results/README.md: snippets run, links, names and commands are real, numbers are those kept."""

import ast
import functools
import importlib
import importlib.util
import itertools
import json
import math
import re
import runpy
import shlex
from pathlib import Path
from statistics import mean

import pytest
import scipy.stats
import torch
from torchvision.transforms.functional import to_pil_image

import common
import dha
import joint_darts_faa

ROOT = Path(__file__).parent.parent
PAGES = {name: (ROOT / name).read_text() for name in ("README.md", "tests/results/README.md")}
FRONT, RESULTS = PAGES.values()
SNIPPETS = re.findall(r"```python\n(.*?)```", FRONT, re.DOTALL)
NAMES = ["dha", "joint_darts_faa", "baseline_sequential", "common"]


def benchmark(name: str):
    """tests/benchmarks/<name>.py as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


table, figure2 = benchmark("table"), benchmark("figure2")


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
    _, rows = FRONT.split(f"| in the paper | in `{name}.py` |\n|---|---|\n")
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
    if "load_model" in snippet:
        tiny = "--preset quick --gpu -1 --limit-train 16 --limit-test 8 --batch-size 8 --channels 4 --search-epochs 1"
        dha.main([*tiny.split(), "--train-epochs", "1"])
        to_pil_image(common.shapes(1, seed=0)[0][0]).resize((90, 60)).save("photo.png")
        capsys.readouterr()
    exec(compile(snippet, "README.md", "exec"), {})
    said = capsys.readouterr().out
    assert bool(said) == ("print(" in snippet)
    if "hypergradient" in snippet:
        assert float(re.search(r"lr ([\d.]+)", said)[1]) > 0.001


# -------- The numbers ----------------------------------------------------------------------------------------


def accuracy(name: str, row: str) -> str:
    """A row's mean ± standard deviation, as the text has it."""
    return table.spread(list(table.kept_results(name, row).values()))


@pytest.mark.parametrize("name", table.TABLES)
def test_tables_are_those_of_the_kept_results(name):
    assert table.table(name) in RESULTS


@pytest.mark.parametrize("name", table.TABLES)
def test_kept_results_are_of_the_tables_own_commands(name):
    text = (table.RESULTS / f"{name}.jsonl").read_text()
    assert not re.search(r"[ \"]/\w", text), "a path of the machine that made them"
    count = 0
    for row, command in table.TABLES[name].items():
        results = table.kept_results(name, row)
        first = min(results)  # seeds that chose a setting are in no table of results
        assert first == (100 if name in ("beta", "length") else 0)
        assert sorted(results) == list(range(first, first + len(results)))
        for seed, result in results.items():
            given = command.replace("OUT", "runs/table").replace("SEED", str(seed))
            assert result["command"].startswith(f"python {given} --seed {seed} ")
            assert result["test_images"] == 10_000
        count += len(results)
    assert count == len(text.splitlines()), "results of no row"


def test_numbers_of_the_front_page():
    """The means that it shows."""
    rows = {
        "One-Stage ISTA": ("dha", "One-Stage ISTA"),
        "Sequential DHA": ("dha", "Sequential DHA"),
        "DHA": ("dha", "DHA"),
        "DARTS": ("joint", "DARTS"),
        "Faster AutoAugment, then DARTS": ("joint", "Faster AA, then DARTS"),
        "both at once": ("joint", "jointly"),
    }
    cells = re.findall(r"\| ([^|\n(]+?)(?: \([^|\n]*)? \| ([^|\n]+?) (?=\|)", FRONT)
    for name, (of, row) in rows.items():
        assert (name, accuracy(of, row)) in cells, name
    assert f"random, unlearned pairs of operations have {accuracy('dha', 'random pairs')}" in FRONT
    assert f"in DHA's batches {accuracy('dha', 'random pairs, batches of Eq. 3')}" in FRONT
    assert f"(`--no-hpo`: {accuracy('dha', 'DHA without HPO')})" in FRONT


def test_what_was_learned_is_in_the_kept_results():
    """Of DHA's table: what is said of the policies, of lr and of wd."""
    ratio = ["Sequential DHA", "DHA", "DHA without HPO", "DHA without NAS"]
    kept = {row: list(table.kept_results("dha", row).values()) for row in table.TABLES["dha"]}
    runs = [result for row in ratio for result in kept[row]]
    assert len(runs) == 20 and "In all 20 runs of four rows" in RESULTS
    for result in runs:
        most = sorted(result["draws"], key=result["draws"].get, reverse=True)
        assert most[:2] == ["Solarize", "Equalize"]

    def ends(results: list[dict], part: str, name: str, scale: float = 1.0, digits: int = 0) -> tuple[str, str]:
        values = [scale * (result[part][name] if name else result[part]) for result in results]
        return f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"

    assert "({} to {} %; 7 %".format(*ends(runs, "draws", "Solarize", 100)) in RESULTS
    assert "then Equalize ({} to {} %)".format(*ends(runs, "draws", "Equalize", 100)) in RESULTS
    assert {*ends(runs, "draws", "Identity", 100), *ends(runs, "draws", "Posterize", 100)} == {"4"}
    assert "ends between {} and {}, and still".format(*ends(runs, "last_epoch", "entropy", digits=2)) in RESULTS
    assert ends(kept["DHA, Eq. 2 as printed"], "last_epoch", "entropy", digits=3) == ("5.277", "5.277")

    with_DA = [*ratio[:2], "DHA, Eq. 2 as printed", "DHA without NAS"]
    lr = ends([result for row in with_DA for result in kept[row]], "last_epoch", "lr", digits=3)
    without = ends(kept["DHA without DA"], "last_epoch", "lr", digits=3)
    text = "lr goes from 0.05 to between {} and {} with DA, to between {} and {} without."
    assert text.format(*lr, *without) in RESULTS
    assert ends(kept["One-Stage ISTA"], "last_epoch", "lr", digits=3) == ("0.002", "0.002")
    middle = [f"{end(result['lr'][3] for result in kept['DHA']):.3f}" for end in (min, max)]
    cosine = kept["DHA without HPO"][0]["lr"][3]
    assert "lr is at {} to {} in DHA, where the cosine is at {:.3f}".format(*middle, cosine) in RESULTS
    searching = [result for row in ("DHA", "DHA, Eq. 2 as printed", "DHA without DA") for result in kept[row]]
    given = [result for row in ("Sequential DHA", "DHA without NAS") for result in kept[row]]
    low, high = [ends(results, "last_epoch", "wd", digits=4) for results in (searching, given)]
    assert len(searching) == 15 and len(given) == 10
    assert "wd goes from 0.0003 to between {}, its lower limit, and {} in the 15 runs".format(*low) in RESULTS
    assert "rises to between {} and {} in the 10".format(*high) in RESULTS

    baseline = table.kept_results("dha", "One-Stage ISTA")
    gains = {}
    for row in ("random pairs", "random pairs, batches of Eq. 3", *ratio, "DHA, Eq. 2 as printed"):
        gains[row] = [result["test_accuracy"] - baseline[result["seed"]]["test_accuracy"] for result in kept[row]]
    means = [mean(found) for found in gains.values()]
    assert min(min(found) for found in gains.values()) > 0
    assert f"every row with DA is ahead, by {min(means):.1f} to {max(means):.1f} points." in RESULTS
    assert max(gains, key=lambda row: mean(gains[row])) == "random pairs, batches of Eq. 3"
    assert f"by {min(gains['DHA']):.1f} to {max(gains['DHA']):.1f} points; the interval just reaches 0" in RESULTS
    clean = ends(list(baseline.values()), "clean_train_accuracy", "")
    assert "One-Stage ISTA and plain DARTS have {} to {} % there with every seed".format(*clean) in RESULTS


# Table, row, the row that it is compared with, and the words of a page; size is the mean without its sign
SAID = [
    ("dha", "DHA", "DHA without DA", "DHA minus DHA without DA {mean} {interval}; random"),
    ("dha", "DHA", "DHA without DA", "Augmentation: DHA minus DHA without DA {mean} {interval}"),
    ("dha", "random pairs", "One-Stage ISTA", "minus One-Stage ISTA, which has none, {mean} {interval}"),
    ("dha", "random pairs", "One-Stage ISTA", "random pairs minus One-Stage ISTA {mean} {interval}"),
    ("dha", "random pairs, batches of Eq. 3", "DHA", "with the batches of Eq. 3, minus DHA {mean} {interval}"),
    ("dha", "DHA without HPO", "random pairs", "random pairs, without Eq. 3: {mean} {interval}"),
    ("dha", "DHA without HPO", "random pairs", "DHA without HPO against random pairs {mean} {interval}"),
    ("dha", "DHA, Eq. 2 as printed", "DHA", "as printed against the ratio: {mean} {interval}"),
    ("dha", "DHA", "One-Stage ISTA", "of One-Stage ISTA with every seed ({mean} {interval}, 95 %)"),
    ("joint", "Faster AA, then DARTS", "DARTS", "policy helps DARTS ({mean} {interval})"),
    ("joint", "Faster AA, then DARTS", "DARTS", "a random one, minus DARTS {mean} {interval}"),
    ("joint", "random policy", "DARTS", "+2.8] and {mean} {interval}."),
    ("dha", "DHA", "One-Stage ISTA", "ahead of One-Stage ISTA with every seed, {mean} {interval}."),
    ("dha", "random pairs, batches of Eq. 3", "DHA", "went through random pairs: minus DHA {mean} {interval}"),
    ("joint", "random policy", "DARTS", "a random one too ({mean} {interval})"),
    ("dha", "DHA", "DHA without NAS", "DHA against DHA without NAS: {mean} {interval}"),
    ("dha", "DHA", "DHA without HPO", "DHA against DHA without HPO: {mean} {interval}"),
    ("dha", "DHA without DA", "One-Stage ISTA", "DHA without DA against One-Stage ISTA {mean} {interval}"),
    ("dha", "random pairs, batches of Eq. 3", "random pairs", "Its batches alone, on random pairs: {mean} {interval}"),
    (
        "dha",
        "DHA, Eq. 2 as printed",
        "random pairs, batches of Eq. 3",
        "of random pairs with these batches: {mean} {interval}",
    ),
    ("dha", "Sequential DHA", "DHA", "Sequential DHA against DHA {mean} {interval}"),
    ("dha", "random genotype", "One-Stage ISTA", "a random genotype against One-Stage ISTA {mean} {interval}"),
    ("joint", "random genotype", "DARTS", "against DARTS {mean} {interval}"),
    ("joint", "random genotype", "DARTS", "With random genotype against DARTS at {mean} {interval}"),
    ("joint", "Faster AA, then DARTS", "random policy", "policy against a random one {mean} {interval}"),
    ("joint", "Faster AA, then DARTS", "random policy", "better than the random one does not show: {mean} {interval}"),
    ("joint", "Faster AA, then DARTS", "DARTS", "for Faster AutoAugment's: {mean} {interval} against DARTS"),
    ("joint", "random policy", "DARTS", "and for a random one: {mean} {interval}"),
    ("joint", "jointly", "Faster AA, then DARTS", "minus Faster AutoAugment, then DARTS has {mean} {interval}"),
    ("joint", "jointly", "DARTS", "Minus DARTS without a policy it has {mean} {interval}"),
    ("joint", "jointly", "DARTS' cells, joint policy", "of the joint search minus DARTS' have {mean} {interval}"),
    ("joint", "joint cells, no policy", "DARTS", "without a policy {mean} {interval}."),
    ("joint", "DARTS' cells, joint policy", "DARTS", "the joint policies give {mean} against no policy {interval}"),
    ("joint", "DARTS' cells, joint policy", "random policy", "{size} less than random policies {interval}"),
    (
        "joint",
        "DARTS' cells, joint policy",
        "Faster AA, then DARTS",
        "{size} less than Faster AutoAugment's {interval}",
    ),
]


@pytest.mark.parametrize("name, row, reference, words", SAID, ids=[words for *_, words in SAID])
def test_differences_of_the_text(name, row, reference, words):
    found, interval = table.difference(name, row, reference).split(" ", 1)
    assert words.format(mean=found, size=found[1:], interval=interval) in RESULTS + FRONT


def test_what_is_said_of_the_table_one_size_up_is_in_the_kept_results():
    kept = {row: table.kept_results("reduced", row) for row in table.TABLES["reduced"]}
    for row, reference, words in (
        ("random pairs", "One-Stage ISTA", "Random pairs minus One-Stage ISTA: {:+.1f} and {:+.1f}."),
        ("random pairs", "One-Stage ISTA", "random pairs minus One-Stage ISTA {:+.1f} and {:+.1f},"),
        ("random pairs", "One-Stage ISTA", "two seeds: random pairs {:+.1f} and {:+.1f},"),
        ("DHA", "random pairs", "DHA minus random pairs: {:+.1f} and {:+.1f};"),
        ("DHA", "random pairs", "DHA minus random pairs {:+.1f} and {:+.1f}."),
        ("Sequential DHA", "random pairs", "Sequential DHA minus random pairs: {:+.1f} and {:+.1f};"),
        ("Sequential DHA", "DHA", "Sequential DHA minus DHA: {:+.1f} and {:+.1f}."),
        ("DHA", "One-Stage ISTA", "DHA minus One-Stage ISTA: {:+.1f} and {:+.1f}."),
        ("DHA", "One-Stage ISTA", "7.7, DHA {:+.1f} and {:+.1f}."),
    ):
        found = [kept[row][seed]["test_accuracy"] - kept[reference][seed]["test_accuracy"] for seed in (0, 1)]
        assert words.format(*found) in RESULTS + FRONT
    rows = [table.kept_results("dha", row).values() for row in ("random pairs", "One-Stage ISTA")]
    pairs, without = [mean(result["test_accuracy"] for result in results) for results in rows]
    assert f"With 500 images that was {pairs - without:+.1f} in the mean of five seeds" in RESULTS
    clean = [kept["One-Stage ISTA"][seed]["clean_train_accuracy"] for seed in (0, 1)]
    assert "One-Stage ISTA ends with {:.1f} and {:.1f} % of its training images".format(*clean) in RESULTS

    def ends(rows: tuple[str, ...], key: str, digits: int) -> str:
        values = [result["last_epoch"][key] for row in rows for result in kept[row].values()]
        return f"{min(values):.{digits}f} to {max(values):.{digits}f}"

    learned = ("DHA", "Sequential DHA")
    assert f"the entropy of p(tau) ends at {ends(learned, 'entropy', 2)}" in RESULTS
    assert f"have {ends(learned, 'train_accuracy', 0)} % of their harder augmented images right" in RESULTS
    assert f"with random pairs {ends(('random pairs',), 'train_accuracy', 0)} %, and" in RESULTS
    assert f"lr ends at {ends(learned, 'lr', 3)}, not" in RESULTS


def test_what_is_said_of_the_pace_of_eq_3_is_in_the_kept_results():
    short, middle, long = (table.kept_results("length", row)[100]["lr"] for row in table.TABLES["length"])
    most = max(max(a, b) / min(a, b) for a, b in zip(middle, long))
    assert f"lr differs by at most a factor of {most:.1f}." in RESULTS and most < 1.5
    shares = [long[at] / 0.05 for at in (2, 4, 9)]
    assert "has {:.2f}, {:.2f} and {:.2f} of its first lr".format(*shares) in RESULTS
    predicted = [0.025 * share for share in shares]
    text = "lr would be {:.3f} after 216 epochs, {:.3f} after 360 and {:.3f} at the end"
    assert text.format(*predicted) in RESULTS
    ratios = [a / b for a, b in zip(short, middle)]
    assert f"it is {min(ratios):.1f} to {max(ratios):.1f} times as high as with 2,400" in RESULTS
    for beta, text in (
        (5, "0.021 to 0.026 with beta 5"),
        (10, "0.011 to 0.013 with 10"),
        (20, "0.008 to 0.011 with 20"),
    ):
        ends = [result["lr"][-1] for result in table.kept_results("beta", f"beta {beta}").values()]
        assert text.startswith(f"{min(ends):.3f} to {max(ends):.3f} with") and text in RESULTS


WAYS = ("Eq. 3", "cosine")


def test_what_is_said_of_the_starts_of_lr_is_in_the_kept_results():
    rows = {row: list(table.kept_results("lr", row).values()) for row in table.TABLES["lr"]}
    *_, last = table.table("lr").splitlines()
    costs = [float(cell) for cell in last.split("|")[2:5:2]]
    assert f"costs {-costs[0]:.1f} points with Eq. 3, {-costs[1]:.1f} with the cosine" in RESULTS
    means = [
        [mean(result["test_accuracy"] for result in rows[f"{way} from {lr}"]) for lr in table.STARTS] for way in WAYS
    ]
    low, high = [min(column) for column in means], [max(column) for column in means]
    assert "end alike ({:.1f} and {:.1f} %)".format(*low) in RESULTS
    assert "with Eq. 3 ({:.1f} and {:.1f} %)".format(*reversed(high)) in RESULTS
    right = [mean(result["clean_train_accuracy"] for result in rows[f"{way} from 0.0025"]) for way in WAYS]
    text = "from 0.0025 a network ends with {:.0f} % of them right, with the cosine {:.0f} %."
    assert text.format(*right) in RESULTS
    seeds = [{result["seed"]: result["clean_train_accuracy"] for result in rows[f"{way} from 0.0025"]} for way in WAYS]
    more = [seeds[0][seed] - seeds[1][seed] for seed in seeds[0]]
    assert f"It is ahead with each seed, by {min(more):.0f} to {max(more):.0f} points." in RESULTS
    rates = [result["lr"] for result in rows["Eq. 3 from 0.0025"]]
    first = [rate[0] for rate in rates]
    assert f"raises this lr to {min(first):.3f} to {max(first):.3f} in the first tenth" in RESULTS
    assert all(rate[0] == max(rate) for rate in rates)
    for start in table.STARTS:
        ends = [f"{result['lr'][-1]:.3f}" for result in rows[f"Eq. 3 from {start}"]]
        assert re.search(rf"\bat {' to '.join(sorted({min(ends), max(ends)}))} from {start}\b", RESULTS)


def test_what_is_said_of_the_joint_search_is_in_the_kept_results(tmp_path):
    kept = {row: table.kept_results("joint", row) for row in table.TABLES["joint"]}
    assert table.table_of_policies() in RESULTS
    strength = {row: [result["change"] for result in kept[row].values()] for row in ("jointly", "random policy")}
    assert max(strength["jointly"]) < min(strength["random policy"])  # "the strongest", "the weakest"
    for result in kept["jointly"].values():
        assert max(result["draws"], key=result["draws"].get) in ("HorizontalFlip", "Posterize")
    start, end = {}, {seed: sum(result["draws"].values()) for seed, result in kept["jointly"].items()}
    for seed in end:
        policy = figure2.first_policy(table.TABLES["joint"]["jointly"], seed)
        (tmp_path / "policy.json").write_text(json.dumps(policy.as_dict()))
        start[seed] = sum(table.draws(tmp_path / "policy.json").values())
        assert end[seed] < start[seed]
    text = "in {:.0f} to {:.0f} % of the stages, those that it ends with in {:.0f} to {:.0f} %"
    ranges = [100 * limit(rates.values()) for rates in (start, end) for limit in (min, max)]
    assert text.format(*ranges) in RESULTS
    weakest, strongest = [100 * limit(strength["jointly"]) for limit in (min, max)]
    assert f" % and {weakest:.1f} to {strongest:.1f} %. Even the strongest" in RESULTS
    right = {}
    for row in ("jointly", "random policy", "Faster AA, then DARTS"):
        train = [result["last_epoch"]["train_accuracy"] for result in kept[row].values()]
        right[row] = f"{min(train):.0f} to {max(train):.0f} %"
    text = "{jointly} of the augmented training images right at the end, with a random policy {random policy}, with"
    assert text.format(**right) + f" Faster AutoAugment's {right['Faster AA, then DARTS']}" in RESULTS
    for seed, result in kept["DARTS"].items():
        assert 98 <= result["clean_train_accuracy"] <= 100
        for row in ("random policy", "Faster AA, then DARTS", "DARTS' cells, joint policy"):
            assert kept[row][seed]["genotype"] == result["genotype"]
        assert kept["joint cells, no policy"][seed]["genotype"] == kept["jointly"][seed]["genotype"]
    accuracies = {row: {seed: result["test_accuracy"] for seed, result in kept[row].items()} for row in kept}
    less = [accuracies["jointly"][seed] < accuracies["Faster AA, then DARTS"][seed] for seed in kept["jointly"]]
    assert (sum(less), len(less)) == (4, 5) and "less with four of five seeds" in RESULTS


def test_what_is_said_of_figure_2_is_in_the_kept_searches():
    assert figure2.table() in RESULTS
    searches = figure2.kept_searches()
    assert [kept["seed"] for kept in searches] == [0, 1]
    starts = [kept["start"] for kept in searches]
    ends = [kept["epochs"][-1]["selection"] for kept in searches]
    assert starts == [figure2.start(0), figure2.start(1)]
    for kept in searches:
        assert kept["command"] == f"python {figure2.COMMAND} --seed {kept['seed']}"
        assert len(kept["epochs"]) == 25

    def share(selection: dict, names: list[str]) -> float:
        return sum(selection[name] for name in names)

    def said(value, digits: int = 1) -> list[str]:
        return [" and ".join(f"{value(selection):.{digits}f}" for selection in both) for both in (ends, starts)]

    end, start = said(lambda one: 5 / 9 * share(one, figure2.COLOUR) / share(one, figure2.GEOMETRIC))
    assert f"{end} times as often per operation; before the first step it was {start} times." in RESULTS
    end, start = said(lambda one: one["Color"] / one["Rotate"])
    assert f"Color gains on Rotate with both, from {start} times as often to {end} times." in RESULTS
    end, start = said(lambda one: one["AutoContrast"] / one["Rotate"])
    assert f"AutoContrast goes from {start} to {end} times, while its own share falls with both" in RESULTS
    end, start = said(lambda one: 100 * one["Invert"], digits=0)
    assert f"Invert loses with both, from {start} % to {end} %" in RESULTS
    gains = {
        names: [share(end, names.split()) > share(start, names.split()) for start, end in zip(starts, ends)]
        for names in (" ".join(figure2.GEOMETRIC), " ".join(figure2.COLOUR), "AutoContrast", "Posterize", "Invert")
    }
    assert list(gains.values()) == [[False, False], [True, False], [False, False], [True, True], [False, False]]

    rest = [100 * (share(one, figure2.COLOUR) - one["Posterize"]) for one in (starts[0], ends[0])]
    assert "the other eight fall from {:.1f} to {:.1f} %".format(*rest) in RESULTS
    others = [100 * share(one, ["HorizontalFlip", "SamplePairing"]) for one in (starts[1], ends[1])]
    assert "HorizontalFlip and SamplePairing gain, from {:.1f} to {:.1f} %".format(*others) in RESULTS
    first, last = (share(searches[1]["epochs"][at]["selection"], figure2.GEOMETRIC) for at in (0, -1))
    assert "with seed 1 all of it in the first epoch" in RESULTS and first <= last

    pairs = 24
    t = scipy.stats.t.ppf(0.975, pairs - 3)
    told = t / math.sqrt(pairs - 3 + t**2)
    assert f"With {pairs} pairs such a correlation would have to reach {told:.2f} to differ from none" in RESULTS
    found = [figure2.together(kept["epochs"])[1] for kept in searches]
    assert "{:+.2f} and {:+.2f} do not".format(*found) in RESULTS and all(0 < one < told for one in found)
    moves = [
        [figure2.policy_step(*pair) for pair in zip([{"selection": kept["start"]}, *kept["epochs"]], kept["epochs"])]
        for kept in searches
    ]
    most = max(max(steps[5:]) for steps in moves)
    first = " and ".join(f"{steps[0]:.2f}" for steps in moves)
    assert f"by {first} in the first epoch, and in none after the fifth by more than {most:.2f}" in RESULTS


def test_known_answers_are_those_of_their_output():
    output = (table.RESULTS / "known_answers.txt").read_text()
    section = RESULTS.split("## Known answers")[1].split("\n## ")[0]
    numbers = re.findall(r"\b0\.\d{3,4}\b|\b\d\d\.\d\b|\b\d,\d{3}\b", section)
    assert len(numbers) > 30
    known = {"0.0005", "0.199"}  # a setting, and 39 / 196
    assert set(numbers) - known <= set(re.findall(r"[\d.,]*\d", output))


# -------- tests/benchmarks/table.py --------------------------------------------------------------------------


def test_table_arithmetic(tmp_path, monkeypatch):
    """Mean, deviation and the t-interval of the differences, by hand."""
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    monkeypatch.setattr(table, "TABLES", {"two": {"one row": "", "another": ""}})
    monkeypatch.setattr(table, "REFERENCES", {"two": ["one row"]})
    assert len(table.table("two").splitlines()) == 2  # no result is no error
    with open(tmp_path / "two.jsonl", "w") as file:
        for row, accuracies in (("one row", (50.0, 52.0, 54.0)), ("another", (49.0, 52.0, 52.0))):
            for seed, number in enumerate(accuracies):
                result = {"row": row, "seed": seed, "test_accuracy": number, "params": 2000}
                result |= {"last_epoch": {"train_accuracy": 70.0}, "clean_train_accuracy": 99.0}
                file.write(json.dumps(result) + "\n")
    first, second = table.table("two").splitlines()[2:]
    assert first == "| one row | 3 | 52.0 ± 2.0 |  | 70 | 99.0 | 2.0 k |"
    # differences -1, 0, -2: 4.303 x 1 / sqrt(3)
    assert second == "| another | 3 | 51.0 ± 1.7 | -1.0 [-3.5, +1.5] | 70 | 99.0 | 2.0 k |"


def test_draws_are_shares_of_all_draws(tmp_path):
    assert table.draws(tmp_path / "none.json") is None
    pairs = {"operations": ["a", "b"], "probability": [[0.5, 0.1], [0.2, 0.2]]}
    odds = [[[math.log(3), 0.0]]]  # 3 to 1
    stages = {"operations": ["a", "b"], "z": odds, "eta": 1.0, "p": [[[0.4, 1.0]]]}
    for policy, shares in ((pairs, {"a": 0.65, "b": 0.35}), (stages, {"a": 0.3, "b": 0.25})):
        (tmp_path / "policy.json").write_text(json.dumps(policy))
        assert table.draws(tmp_path / "policy.json") == pytest.approx(shares)


def test_change_is_the_mean_over_pixels(tmp_path):
    """A policy that only inverts, or does nothing: black becomes white, middle gray stays almost as it is."""
    names = list(joint_darts_faa.AUGMENTATIONS)
    z = [[[10.0 * (name == "Invert") for name in names]]]
    black, gray = torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.full((2, 3, 8, 8), 128, dtype=torch.uint8)
    assert table.change(tmp_path / "policy.json", black) is None
    for p in (1.0, 0.0):
        policy = {"operations": names, "eta": 0.05, "z": z, "p": [[[p] * 16]], "mu": [[[0.5] * 16]]}
        (tmp_path / "policy.json").write_text(json.dumps(policy))
        assert table.change(tmp_path / "policy.json", black) == p
        assert table.change(tmp_path / "policy.json", gray) == pytest.approx(p / 255, abs=1e-4)
    (tmp_path / "policy.json").write_text('{"probability": []}')
    assert table.change(tmp_path / "policy.json", black) is None


def test_table_of_policies(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    assert len(table.table_of_policies().splitlines()) == 2  # no result is no error
    with open(tmp_path / "joint.jsonl", "w") as file:
        for seed in (0, 1):
            result = {"row": "jointly", "seed": seed, "draws": {"Color": 0.2, "Rotate": 0.1 * seed}, "change": 0.05}
            file.write(json.dumps(result) + "\n")
    assert table.table_of_policies().splitlines()[2] == "| jointly | 25.0 ± 7.1 | 5.0 ± 0.0 |"


def test_random_genotypes_and_policies_are_valid_and_their_seeds(tmp_path):
    texts = []
    for seed in (0, 0, 1):
        table.prepare(tmp_path, seed)
        files = [tmp_path / f"{kind}-{seed}.json" for kind in ("genotype", "policy")]
        texts.append([file.read_text() for file in files])
        joint_darts_faa.load_policy(tmp_path / f"policy-{seed}.json")
        genotype = common.load_genotype(tmp_path / f"genotype-{seed}.json")
        common.Network(genotype, 10, 4, 3)
        dha.SparseSupernet(4, 10, 3, support=dha.to_support(genotype))
    first, again, other = texts
    assert first == again and first[0] != other[0] and first[1] != other[1]


ROWS = [command for rows in table.TABLES.values() for command in rows.values()]


@pytest.mark.parametrize("command", [*ROWS, figure2.COMMAND])
def test_rows_can_be_run(command, tmp_path, monkeypatch):
    """Their flags are those of the scripts."""
    monkeypatch.chdir(tmp_path)
    script, *flags = command.split()
    assert (ROOT / script).exists()
    name = Path(script).stem
    importlib.import_module("dha" if name == "independent" else name).parse_args(flags)


def test_rows_wait_for_what_they_are_given():
    assert table.needed("joint", "DARTS' cells, joint policy") == ["DARTS", "jointly"]
    assert table.needed("joint", "joint cells, no policy") == ["jointly"]
    assert not any(table.needed(name, row) for name in ("dha", "lr") for row in table.TABLES[name])
    for name, rows in table.TABLES.items():
        order = list(rows)
        assert all(order.index(other) < order.index(row) for row in rows for other in table.needed(name, row))


def test_no_run_starts_after_one_that_failed(tmp_path, monkeypatch):
    started = []

    def run(name, row, seed, mine, before):
        started.append((row, seed))
        if row == "fails":
            raise SystemExit("it failed")

    monkeypatch.setattr(table, "ROOT", tmp_path)
    monkeypatch.setattr(table, "TABLES", {"two": {"works": "", "fails": ""}})
    monkeypatch.setattr(table, "run", run)
    monkeypatch.setattr("sys.argv", ["table.py", "two", "--jobs", "1", "--data-dir", str(tmp_path)])
    with pytest.raises(SystemExit, match="it failed"):
        table.main()
    assert started == [("works", 0), ("fails", 0)]


def test_batches_of_the_independent_row_are_those_of_eq_3(tmp_path, monkeypatch):
    """Every epoch of a run without Eq. 3 has them."""
    drawn = []

    def batch_indices(count, batch_size, seed, rank=0, world=1, independent=False):
        given = (count, batch_size, seed, rank, world)
        order = common_batch_indices(*given, independent=independent)
        drawn.append((order, common_batch_indices(*given, independent=True)))
        return order

    common_batch_indices = common.batch_indices
    monkeypatch.setattr(common, "batch_indices", batch_indices)
    tiny = "--preset quick --gpu -1 --limit-train 40 --limit-test 8 --batch-size 8 --channels 4 --search-epochs 1"
    flags = [*tiny.split(), "--no-hpo", "--train-epochs", "1", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["independent.py", *flags])
    runpy.run_path(str(ROOT / "tests" / "benchmarks" / "independent.py"), run_name="__main__")
    assert len(drawn) >= 2 and all(order.equal(fresh) for order, fresh in drawn)
    assert len(drawn[-1][0].unique()) < 40  # an image comes twice


def test_table_of_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    assert "worst" not in table.table("lr")  # no result is no error
    with open(tmp_path / "lr.jsonl", "w") as file:
        for lr in table.STARTS:
            for seed in (0, 1):
                for way, number in (("Eq. 3", 30 + 2 * seed), ("cosine", 10 + 100 * lr)):
                    result = {"row": f"{way} from {lr}", "seed": seed, "test_accuracy": number}
                    result["clean_train_accuracy"] = 90.0 + seed
                    file.write(json.dumps(result) + "\n")
    first, *_, last = table.table("lr").splitlines()[2:]
    assert first == "| 0.0025 | 31.0 ± 1.4 | 90.5 | 10.2 ± 0.0 | 90.5 |"
    assert last == "| worst minus best | 0.0 | | -9.8 | |"


# -------- tests/benchmarks/figure2.py ------------------------------------------------------------------------


def test_colour_and_geometric_operations_are_operations():
    assert (len(figure2.COLOUR), len(figure2.GEOMETRIC)) == (9, 5)
    others = set(joint_darts_faa.AUGMENTATIONS) - {*figure2.COLOUR, *figure2.GEOMETRIC}
    assert others == {"HorizontalFlip", "SamplePairing"}


def test_start_is_that_of_the_search(tmp_path):
    """A search that never moves its policy ends with it."""
    for label, part, i in itertools.product(range(10), ("train", "test"), range(2)):
        path = tmp_path / "data" / part / f"class{label}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        to_pil_image(torch.full((3, 16, 16), 20 * label, dtype=torch.uint8)).save(path)
    flags = "--data-dir data --out run --seed 3 --search-epochs 1 --search-batch-size 10 --policy-lr 0"
    joint_darts_faa.main([*figure2.COMMAND.split()[1:], *flags.split()])
    (record,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert figure2.start(3) == {name: round(share, 4) for name, share in record["selection"].items()}
    assert figure2.start(3) != figure2.start(4)


def test_steps_of_policy_and_cells():
    """Half of the draws move to another operation; one operation, then one edge, then one of each cell changes."""
    cell = [("skip_connect", 0), ("sep_conv_3x3", 1)] * 4
    record = {"selection": {"Color": 1.0, "Rotate": 0.0}, "genotype": str(common.Genotype(cell, [2], cell, [2]))}
    other = {"selection": {"Color": 0.5, "Rotate": 0.5}, "genotype": record["genotype"]}
    assert figure2.policy_step(record, other) == 0.5 and figure2.cell_step(record, other) == 0
    operation, edge = [*cell], [*cell]
    operation[3] = ("max_pool_3x3", 1)
    edge[2] = ("skip_connect", 1)
    for normal, reduce, count in ((operation, cell, 1), (edge, cell, 1), (operation, edge, 2)):
        changed = {**record, "genotype": str(common.Genotype(normal, [2], reduce, [2]))}
        assert figure2.cell_step(record, changed) == count


def test_a_search_that_ended_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(figure2, "RESULTS", tmp_path)
    cell = [("skip_connect", 0), ("sep_conv_3x3", 1)] * 4
    names = joint_darts_faa.AUGMENTATIONS
    with open(tmp_path / "metrics.jsonl", "w") as file:
        for epoch in range(4):  # the selection moves from Rotate to Color, in steps as the cells
            share = [0.0, 0.3, 0.4, 0.6][epoch]
            selection = {**dict.fromkeys(names, 0.0), "Color": share, "Rotate": 1 - share}
            moved = [0, 3, 4, 6][epoch]
            normal = [("max_pool_3x3", 0), ("max_pool_3x3", 1)] * 3
            normal = normal[:moved] + cell[moved:]
            record = {"genotype": str(common.Genotype(normal, [2], cell, [2])), "selection": selection}
            file.write(json.dumps({**record, "loss": 2.0, "val_loss": 2.0, "val_accuracy": 20.0}) + "\n")
    (tmp_path / "config.json").write_text('{"torch": "2"}')
    (tmp_path / "selection.png").write_bytes(b"")
    monkeypatch.setattr(figure2, "start", lambda seed: {**dict.fromkeys(names, 0.0), "Rotate": seed / 10})
    figure2.keep(tmp_path, seed=7)
    assert (tmp_path / "figure2-seed7.png").exists()
    row = figure2.table().splitlines()[-1]
    shares = "0.0 to 60.0 | 70.0 to 40.0 | 0.0 to 60.0 | 0.0 to 0.0 | 0.0 to 0.0 | 70.0 to 40.0"
    assert row == f"| 7 | {shares} | +1.00 | +1.00 |"
