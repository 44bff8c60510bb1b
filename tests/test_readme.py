"""The pages: links resolve, commands and snippets run, tables are those of the kept results; how tables are made."""

import functools
import importlib
import json
import math
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from torchvision.transforms.functional import to_pil_image

import common
import dha
import joint_darts_faa

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tests" / "benchmarks"))
figure2 = importlib.import_module("figure2")
table = importlib.import_module("table")

RESULTS = ROOT / "tests" / "results"
PAGES = [ROOT / "README.md", RESULTS / "README.md", RESULTS / "choices.md", RESULTS / "using.md"]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
ROWS = [command for rows in table.TABLES.values() for command in rows.values()]
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGES[0].read_text(), re.DOTALL)


# -------- The pages --------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_resolve(page):
    """Files, and headings in this page or another."""
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        file, _, anchor = link.partition("#")
        if not link.startswith("http"):
            there = page.parent / file if file else page
            assert there.exists(), link
            assert not anchor or anchor in anchors(there), link


def commands() -> list[str]:
    """Every line of the pages' code blocks that starts a script, without its comment."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```\n(.*?)```", page.read_text(), re.DOTALL):
            found += re.findall(r"^(?:python|torchrun .*?) \w+\.py.*", block, re.MULTILINE)
    return sorted({command.split(" #")[0].strip() for command in found})


@pytest.mark.parametrize("command", [*commands(), figure2.COMMAND, *ROWS])
def test_commands_parse(command):
    words = shlex.split(command)
    at = [word.endswith(".py") for word in words].index(True)
    importlib.import_module(words[at].removesuffix(".py")).parse_args(words[at + 1 :])


@pytest.mark.parametrize("snippet", SNIPPETS, ids=[text.split("\n")[0] for text in SNIPPETS])
def test_snippets_run_alone(snippet, monkeypatch):
    monkeypatch.setattr(common, "shapes", functools.cache(common.shapes))
    if "load_model" in snippet:
        tiny = "--preset quick --gpu -1 --limit-train 16 --limit-test 8 --batch-size 8 --channels 4 --search-epochs 1"
        dha.main([*tiny.split(), "--train-epochs", "1"])
        to_pil_image(common.shapes(1, seed=0)[0][0]).resize((90, 60)).save("photo.png")
    exec(compile(snippet, "README.md", "exec"), {})


# -------- The numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", table.PAGES, ids=NAMES[:2])
def test_tables_are_those_of_the_kept_results(page):
    """To write them: python tests/benchmarks/table.py pages."""
    assert table.with_tables(page.read_text()) == page.read_text()


@pytest.mark.parametrize("name", table.TABLES)
def test_kept_results_are_of_the_table(name):
    for result in table.kept_lines(name):
        assert result["row"] in table.TABLES[name]
        assert result["test_images"] == 10_000
        assert not re.search(r" /\w", result["command"]), "a path of the machine that made it"


def test_known_answers_are_those_of_their_output():
    """The numbers of their table."""
    output = set(re.findall(r"[\d.,]*\d", (RESULTS / "known_answers.txt").read_text()))
    section = PAGES[1].read_text().split("## Known answers")[1].split("\n## ")[0]
    for row in re.findall(r"^\|.*", section, re.MULTILINE):
        answer = row.split("|")[2]
        assert set(re.findall(r"\b0\.\d{4}\b|\b\d{3}\.\d\b|\b\d,\d{3}\b", answer)) <= output


def test_table_arithmetic(tmp_path, monkeypatch):
    """Mean, deviation and the t-interval of the differences, by hand; what a page shows of them."""
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    monkeypatch.setattr(table, "TABLES", {"two": {"one row": "", "another": ""}})
    monkeypatch.setattr(table, "REFERENCES", {"two": ["one row"]})
    monkeypatch.setattr(table, "FRONT", {"two": ("Paper", "one row", ["another", "none"])})
    page = "before\n<!-- two -->\nold\n<!-- end -->\nafter"
    assert table.with_tables(page) == page.replace("old", "(no line is kept)")
    with open(tmp_path / "two.jsonl", "w") as file:
        for row, accuracies in (("one row", (50.0, 52.0, 54.0)), ("another", (49.0, 52.0, 52.0))):
            for seed, number in enumerate(accuracies):
                result = {"row": row, "seed": seed, "test_accuracy": number, "params": 2000}
                result.update(last_epoch={"train_accuracy": 70.0}, clean_train_accuracy=99.0)
                file.write(json.dumps(result) + "\n")
    first, second = table.table("two").splitlines()[2:]
    assert first == "| one row | 3 | 52.0 ± 2.0 |  | 70 | 99.0 | 2.0 k |"
    # differences -1, 0, -2: 4.303 x 1 / sqrt(3)
    assert second == "| another | 3 | 51.0 ± 1.7 | -1.0 [-3.5, +1.5] | 70 | 99.0 | 2.0 k |"
    assert table.front().splitlines()[2:] == ["| another | 3 | 51.0 ± 1.7 | -1.0 [-3.5, +1.5] |"]
    assert table.with_tables(page) == page.replace("old", table.table("two"))


def test_draws_are_shares_of_all_draws(tmp_path):
    assert table.draws(tmp_path / "none.json") is None
    pairs = {"operations": ["a", "b"], "probability": [[0.5, 0.1], [0.2, 0.2]]}
    odds = [[[math.log(3), 0.0]]]  # 3 to 1
    stages = {"operations": ["a", "b"], "z": odds, "eta": 1.0, "p": [[[0.4, 1.0]]]}
    for policy, shares in ((pairs, {"a": 0.65, "b": 0.35}), (stages, {"a": 0.3, "b": 0.25})):
        (tmp_path / "policy.json").write_text(json.dumps(policy))
        assert table.draws(tmp_path / "policy.json") == pytest.approx(shares)


def test_change_is_the_mean_over_pixels(tmp_path):
    """A policy that only inverts, or does nothing: black becomes white."""
    names = list(joint_darts_faa.AUGMENTATIONS)
    z = [[[10.0 * (name == "Invert") for name in names]]]
    black = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    assert table.change(tmp_path / "policy.json", black) is None
    for p in (1.0, 0.0):
        policy = {"operations": names, "eta": 0.05, "z": z, "p": [[[p] * 16]], "mu": [[[0.5] * 16]]}
        (tmp_path / "policy.json").write_text(json.dumps(policy))
        assert table.change(tmp_path / "policy.json", black) == p


def test_random_genotypes_and_policies_are_those_of_their_seed(tmp_path):
    texts = []
    for seed in (0, 0, 1):
        table.prepare(tmp_path, seed)
        joint_darts_faa.load_policy(tmp_path / f"policy-{seed}.json")
        genotype = common.load_genotype(tmp_path / f"genotype-{seed}.json")
        assert len(dha.to_support(genotype)) == 8
        texts.append([(tmp_path / f"{kind}-{seed}.json").read_text() for kind in ("genotype", "policy")])
    first, again, other = texts
    assert first == again and first[0] != other[0] and first[1] != other[1]


def test_rows_wait_for_what_they_are_given():
    assert table.needed("joint", "DARTS' cells, joint policy") == ["DARTS", "jointly"]
    assert not any(table.needed("dha", row) for row in table.TABLES["dha"])


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


def test_steps_of_policy_and_cells():
    """Of Figure 2: half of the draws move to another operation; one operation, then one edge of the cells changes."""
    cell = [("skip_connect", 0), ("sep_conv_3x3", 1)] * 4
    record = {"selection": {"Color": 1.0, "Rotate": 0.0}, "genotype": str(common.Genotype(cell, [2], cell, [2]))}
    other = {"selection": {"Color": 0.5, "Rotate": 0.5}, "genotype": record["genotype"]}
    assert figure2.policy_step(record, other) == 0.5 and figure2.cell_step(record, other) == 0
    for at, changed in ((3, ("max_pool_3x3", 1)), (2, ("skip_connect", 1))):
        normal = [*cell[:at], changed, *cell[at + 1 :]]
        genotype = common.Genotype(normal, [2], cell, [2])
        assert figure2.cell_step(record, {**record, "genotype": str(genotype)}) == 1
