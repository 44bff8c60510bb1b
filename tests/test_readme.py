"""README.md and tests/results/README.md: snippets run, links, names and commands are real, numbers are those kept."""

import ast
import functools
import importlib
import importlib.util
import json
import math
import re
import shlex
from pathlib import Path
from statistics import mean, stdev

import pytest
from torchvision.transforms.functional import to_pil_image

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
    found = [result["test_accuracy"] for result in table.kept_results(name, row).values()]
    return f"{mean(found):.1f} ± {stdev(found):.1f}"


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
            kept = result["command"]
            if name in ("dha", "larger"):  # made when Eq. 3 had plain steps
                kept = re.sub(r" --beta-lr \S+", "", kept)
            assert kept.startswith(f"python {given} --seed {seed} ")
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
    assert f"without Eqs. 2 and 3, have {accuracy('dha', 'random pairs')}" in FRONT


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
        values = [scale * result[part][name] for result in results]
        return f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"

    assert "({} to {} %; 7 %".format(*ends(runs, "draws", "Solarize", 100)) in RESULTS
    assert "then Equalize ({} to {} %)".format(*ends(runs, "draws", "Equalize", 100)) in RESULTS
    assert {*ends(runs, "draws", "Identity", 100), *ends(runs, "draws", "Posterize", 100)} == {"4"}
    assert "ends between {} and {}, where".format(*ends(runs, "last_epoch", "entropy", digits=2)) in RESULTS
    assert ends(kept["DHA, Eq. 2 as printed"], "last_epoch", "entropy", digits=3) == ("5.277", "5.277")

    learned = [*ratio[:2], "DHA, Eq. 2 as printed", "DHA without DA", "DHA without NAS"]
    lr = ends([result for row in learned for result in kept[row]], "last_epoch", "lr", digits=4)
    assert f"lr ends between {lr[0]}, its lower limit, and 0.004." in RESULTS and float(lr[1]) < 0.004
    searching = [result for row in ("DHA", "DHA, Eq. 2 as printed", "DHA without DA") for result in kept[row]]
    assert ends(searching, "last_epoch", "wd", digits=4) == ("0.0000", "0.0000") and len(searching) == 15
    given = [result for row in ("Sequential DHA", "DHA without NAS") for result in kept[row]]
    assert "between {} and {} in the 10".format(*ends(given, "last_epoch", "wd", digits=4)) in RESULTS

    baseline = table.kept_results("dha", "One-Stage ISTA")
    for row in ("random pairs", *ratio, "DHA, Eq. 2 as printed"):
        gains = [result["test_accuracy"] - baseline[result["seed"]]["test_accuracy"] for result in kept[row]]
        assert min(gains) > 0 and 3.3 <= round(mean(gains), 1) <= 4.6
    assert "is every row with DA, by 3.3 to 4.6 points in the mean" in RESULTS


def test_what_is_said_of_the_pace_of_eq_3_is_in_the_kept_results():
    short, middle, long = (table.kept_results("length", row)[100]["lr"] for row in table.TABLES["length"])
    most = max(max(a, b) / min(a, b) for a, b in zip(middle, long))
    assert f"lr differs by at most a factor of {most:.1f}." in RESULTS and most < 1.5
    ratios = [a / b for a, b in zip(short, middle)]
    assert f"it is {min(ratios):.1f} to {max(ratios):.1f} times as high as with 2,400" in RESULTS
    for beta, text in (
        (5, "0.021 to 0.026 with beta 5"),
        (10, "0.011 to 0.013 with 10"),
        (20, "0.008 to 0.011 with 20"),
    ):
        ends = [result["lr"][-1] for result in table.kept_results("beta", f"beta {beta}").values()]
        assert text.startswith(f"{min(ends):.3f} to {max(ends):.3f} with") and text in RESULTS


def test_what_is_said_of_the_joint_search_is_in_the_kept_results():
    kept = {row: table.kept_results("joint", row) for row in table.TABLES["joint"]}
    shares, right = {}, {}
    for row in ("jointly", "random policy", "Faster AA, then DARTS"):
        applied = [100 * sum(result["draws"].values()) for result in kept[row].values()]
        shares[row] = f"{min(applied):.0f} to {max(applied):.0f} %"
        train = [result["last_epoch"]["train_accuracy"] for result in kept[row].values()]
        right[row] = f"{min(train):.0f} to {max(train):.0f} %"
    text = (
        "in {jointly} of the stages (random policies: {random policy}, Faster AutoAugment's: {Faster AA, then DARTS})"
    )
    assert text.format(**shares) in RESULTS
    text = "{jointly} of the augmented training images right at the end, with a random policy {random policy}, with"
    assert text.format(**right) + f" Faster AutoAugment's {right['Faster AA, then DARTS']}" in RESULTS
    for seed, result in kept["DARTS"].items():
        for row in ("random policy", "Faster AA, then DARTS"):
            assert kept[row][seed]["genotype"] == result["genotype"]
    skips = [common.parse_genotype(result["genotype"]).normal for result in kept["jointly"].values()]
    assert [[name for name, _ in normal].count("skip_connect") > 4 for normal in skips].count(True) == 1


def test_known_answers_are_those_of_their_output():
    output = (table.RESULTS / "known_answers.txt").read_text()
    section = RESULTS.split("## Known answers")[1].split("\n## ")[0]
    numbers = re.findall(r"\b0\.\d{3,4}\b|\b\d\d\.\d\b|\b\d,\d{3}\b", section)
    assert len(numbers) > 30
    known = {"0.0005"}  # a setting
    assert set(numbers) - known <= set(re.findall(r"[\d.,]*\d", output))


# -------- tests/benchmarks/table.py --------------------------------------------------------------------------


def test_table_arithmetic(tmp_path, monkeypatch):
    """Mean, deviation and the t-interval of the differences, by hand."""
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    monkeypatch.setattr(table, "TABLES", {"two": {"one row": "", "another": ""}})
    monkeypatch.setattr(table, "REFERENCES", {"two": ["one row"]})
    assert table.table("two").count("| 0 |") == 2  # no result is no error
    with open(tmp_path / "two.jsonl", "w") as file:
        for row, accuracies in (("one row", (50.0, 52.0, 54.0)), ("another", (49.0, 52.0, 52.0))):
            for seed, number in enumerate(accuracies):
                result = {"row": row, "seed": seed, "test_accuracy": number, "params": 2000}
                result["last_epoch"] = {"train_accuracy": 70.0}
                file.write(json.dumps(result) + "\n")
    first, second = table.table("two").splitlines()[2:]
    assert first == "| one row | 3 | 52.0 ± 2.0 |  | 70 | 2.0 k |"
    # differences -1, 0, -2: 4.303 x 1 / sqrt(3)
    assert second == "| another | 3 | 51.0 ± 1.7 | -1.0 [-3.5, +1.5] | 70 | 2.0 k |"


def test_draws_are_shares_of_all_draws(tmp_path):
    assert table.draws(tmp_path / "none.json") is None
    pairs = {"operations": ["a", "b"], "probability": [[0.5, 0.1], [0.2, 0.2]]}
    odds = [[[math.log(3), 0.0]]]  # 3 to 1
    stages = {"operations": ["a", "b"], "z": odds, "eta": 1.0, "p": [[[0.4, 1.0]]]}
    for policy, shares in ((pairs, {"a": 0.65, "b": 0.35}), (stages, {"a": 0.3, "b": 0.25})):
        (tmp_path / "policy.json").write_text(json.dumps(policy))
        assert table.draws(tmp_path / "policy.json") == pytest.approx(shares)


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


@pytest.mark.parametrize("command", [command for rows in table.TABLES.values() for command in rows.values()])
def test_rows_can_be_run(command, tmp_path, monkeypatch):
    """Their flags are those of the scripts."""
    monkeypatch.chdir(tmp_path)
    script, *flags = command.split()
    importlib.import_module(script.removesuffix(".py")).parse_args(flags)
