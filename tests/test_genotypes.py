"""common.py's genotypes. Oracle: the text that quark0/darts and PC-DARTS published, as Python reads it."""

import json
import re

import pytest

from common import GENOTYPES, MOBILE_PRIMITIVES, Genotype, InputError, load_genotype, parse_genotype, save_genotype

# As they stand in the genotypes.py of quark0/darts, chenxin061/pdarts and yuhuixu1993/PC-DARTS.
KNOWN = """
DARTS_V1 = Genotype(normal=[('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('skip_connect', 0),
('sep_conv_3x3', 1), ('skip_connect', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('skip_connect', 2)],
normal_concat=[2, 3, 4, 5], reduce=[('max_pool_3x3', 0), ('max_pool_3x3', 1), ('skip_connect', 2),
('max_pool_3x3', 0), ('max_pool_3x3', 0), ('skip_connect', 2), ('skip_connect', 2), ('avg_pool_3x3', 0)],
reduce_concat=[2, 3, 4, 5])

DARTS_V2 = Genotype(normal=[('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0),
('sep_conv_3x3', 1), ('sep_conv_3x3', 1), ('skip_connect', 0), ('skip_connect', 0), ('dil_conv_3x3', 2)],
normal_concat=[2, 3, 4, 5], reduce=[('max_pool_3x3', 0), ('max_pool_3x3', 1), ('skip_connect', 2),
('max_pool_3x3', 1), ('max_pool_3x3', 0), ('skip_connect', 2), ('skip_connect', 2), ('max_pool_3x3', 1)],
reduce_concat=[2, 3, 4, 5])

PDARTS = Genotype(normal=[('skip_connect', 0), ('dil_conv_3x3', 1), ('skip_connect', 0),('sep_conv_3x3', 1),
('sep_conv_3x3', 1), ('sep_conv_3x3', 3), ('sep_conv_3x3',0), ('dil_conv_5x5', 4)],
normal_concat=range(2, 6), reduce=[('avg_pool_3x3', 0), ('sep_conv_5x5', 1), ('sep_conv_3x3', 0),
('dil_conv_5x5', 2), ('max_pool_3x3', 0), ('dil_conv_3x3', 1), ('dil_conv_3x3', 1), ('dil_conv_5x5', 3)],
reduce_concat=range(2, 6))

PC_DARTS_cifar = Genotype(normal=[('sep_conv_3x3', 1), ('skip_connect', 0), ('sep_conv_3x3', 0),
('dil_conv_3x3', 1), ('sep_conv_5x5', 0), ('sep_conv_3x3', 1), ('avg_pool_3x3', 0), ('dil_conv_3x3', 1)],
normal_concat=range(2, 6), reduce=[('sep_conv_5x5', 1), ('max_pool_3x3', 0), ('sep_conv_5x5', 1),
('sep_conv_5x5', 2), ('sep_conv_3x3', 0), ('sep_conv_3x3', 3), ('sep_conv_3x3', 1), ('sep_conv_3x3', 2)],
reduce_concat=range(2, 6))

PC_DARTS_image = Genotype(normal=[('skip_connect', 1), ('sep_conv_3x3', 0), ('sep_conv_3x3', 0),
('skip_connect', 1), ('sep_conv_3x3', 1), ('sep_conv_3x3', 3), ('sep_conv_3x3', 1), ('dil_conv_5x5', 4)],
normal_concat=range(2, 6), reduce=[('sep_conv_3x3', 0), ('skip_connect', 1), ('dil_conv_5x5', 2),
('max_pool_3x3', 1), ('sep_conv_3x3', 2), ('sep_conv_3x3', 1), ('sep_conv_5x5', 0), ('sep_conv_3x3', 3)],
reduce_concat=range(2, 6))

PCDARTS = PC_DARTS_cifar
"""

V1, V2, PC = (GENOTYPES[name] for name in ("DARTS_V1", "DARTS_V2", "PC_DARTS_cifar"))


def test_known_genotypes_equal_the_published_text():
    published = {}
    exec("from collections import namedtuple\nGenotype = namedtuple('Genotype', %r)" % (Genotype._fields,), published)
    exec(KNOWN, published)
    for name, genotype in GENOTYPES.items():
        assert genotype == Genotype(*(list(field) for field in published[name]))
        assert load_genotype(name) is genotype
    assert parse_genotype(KNOWN) == Genotype(*(list(field) for field in published["PCDARTS"]))


def test_genotypes_round_trip(tmp_path):
    for genotype in GENOTYPES.values():
        assert parse_genotype(str(genotype)) == genotype
        save_genotype(genotype._replace(normal_concat=range(2, 6)), tmp_path / "cell.json")
        assert load_genotype(tmp_path / "cell.json") == genotype
    assert set(json.loads((tmp_path / "cell.json").read_text())) == set(Genotype._fields)

    edges = [("sep_conv_3x3", 1), ("skip_connect", 0)]  # of one node
    assert parse_genotype(f"Genotype({edges}, [0, 1], {edges}, range(2, 3))") == Genotype(edges, [0, 1], edges, [2])


# As above DARTS_V1 in quark0's genotypes.py: a name that is no genotype, and NASNet's operations
HEAD = """from collections import namedtuple

Genotype = namedtuple('Genotype', 'normal normal_concat reduce reduce_concat')

PRIMITIVES = ['none', 'max_pool_3x3']

NASNet = Genotype(
  normal = [
    ('conv_7x1_1x7', 0), ('sep_conv_5x5', 1),
  ],
  normal_concat = [2, 3, 4, 5, 6],
  reduce = [
    ('conv_7x1_1x7', 0), ('sep_conv_5x5', 1),
  ],
  reduce_concat = [4, 5, 6],
)
"""


def by_node(edges):
    """The operations as khanrc/pt.darts nests them: a list for each node."""
    return [edges[i : i + 2] for i in range(0, len(edges), 2)]


NESTED = str(V2._replace(normal=by_node(V2.normal), reduce=by_node(V2.reduce)))
TUPLES = NESTED.replace("[", "(").replace("]", ")")
DICT = str(V2._asdict()).replace("[2, 3, 4, 5]", "range(2, 6)")
STATES = re.compile(r"(?<=, )\d(?=\))")  # of the edges
AS_PEOPLE_HAVE_THEM = {  # all of them mean DARTS_V2
    "an alias below": f"DARTS_V2 = {V2}\n\nDARTS = DARTS_V2\n",
    "a log": f"10:00 param size = 1.93MB\n10:01 genotype = {V2}\n10:01 train 000 2.31e+00 (best) 12.5\n",
    "a cut log": f"genotype = {V2}\ngenotype = {str(V1)[:200]}",
    "broken into lines": str(V2).replace(", ", ",\n    "),
    "JSON in JSON": json.dumps({"epoch": 3, "loss": None, "genotype": V2._asdict()}),
    "JSON of a script's text": json.dumps({"epoch": 3, "genotype": str(V2)}),
    "tuples in a log": f"==>> (best) : {TUPLES[:-1]}, connects=None)\n[12.5%] (13.1)",
    "NumPy's numbers": STATES.sub(r"np.int64(\g<0>)", str(V2)),
    "NumPy's arrays": NESTED.replace("[2, 3, 4, 5]", "np.array([np.int64(2), 3, 4, 5], dtype=int64)"),
    "a dictionary in a log": f"10:01 {{}} best = {DICT} (3 seeds)\n10:02 {{'loss': 2.5}}",
    "a genotype and then a dictionary": f"{V2}\n{{'normal': [[0.1, 0.2]], 'reduce': [[0.3, 0.4]]}}",
}


@pytest.mark.parametrize("text", AS_PEOPLE_HAVE_THEM.values(), ids=list(AS_PEOPLE_HAVE_THEM))
def test_genotypes_as_people_have_them(text, tmp_path, capsys):
    for encoding in ("utf-8", "utf-8-sig"):  # with a byte order mark, as Windows saves it
        (tmp_path / "cell.txt").write_text(text, encoding=encoding)
        found = load_genotype(tmp_path / "cell.txt")
        assert found == V2 and type(found) is Genotype
        assert all(type(edge) is tuple for edge in found.normal + found.reduce)
    assert capsys.readouterr().out == ""


SEVERAL = {  # text, what is meant, and how the note calls it
    "a log": (f"10:00 genotype = {V1}\n11:00 genotype = {V2}\n", V2, "the last one"),
    "dictionaries": (f"{V1._asdict()}\n{DICT}", V2, "the last one"),
    "genotypes.py": (f"{HEAD}DARTS_V1 = {V1}\nDARTS_V2 = {V2}\n", V2, "DARTS_V2"),
    "its last line names the last": (f"{HEAD}A = {V1}\nB = {V2}\nC = B\n", V2, "C"),
    "its last line names another": (f"{HEAD}A = {V1}\nB = {V2}\nC = A  # the best\n", V1, "C"),
    "a name of a name of a name": (f"A = {V1}\nB = A\nC = {V2}\nD = B\n", V1, "D"),
    "a name that is given again": (f"A = {PC}\nB = {V1}\nA = {V2}\n", V2, "A"),
    "a name that means none": (f"A = {V1}\nB = {V2}\nC = PRIMITIVES\n", V2, "B"),
    "PC-DARTS'": (KNOWN, PC, "PCDARTS"),
}


@pytest.mark.parametrize("text, meant, called", SEVERAL.values(), ids=list(SEVERAL))
def test_of_several_genotypes_the_last_is_meant_and_that_is_said(text, meant, called, capsys):
    assert parse_genotype(text) == meant
    assert re.fullmatch(rf"note: the text holds \d different genotypes; {called} is meant\n", capsys.readouterr().out)


def test_a_genotype_of_a_file_by_its_name(tmp_path, capsys):
    path = tmp_path / "genotypes.py"
    path.write_text(HEAD + KNOWN)
    for name, genotype in {**GENOTYPES, "PCDARTS": PC}.items():
        assert load_genotype(f"{path}:{name}") == genotype
    assert capsys.readouterr().out == ""
    for name, says in (("AmoebaNet", "called AmoebaNet"), ("NASNet", "conv_7x1_1x7"), ("Genotype", "called Genotype")):
        with pytest.raises(InputError, match=rf"genotypes.py:{name}' .*{says}"):
            load_genotype(f"{path}:{name}")

    (tmp_path / "run:best").write_text(str(V1))  # a file of this very name
    assert load_genotype(tmp_path / "run:best") == V1
    with pytest.raises(InputError, match="No such file or directory: 'C:"):
        load_genotype(r"C:\cells\best")


@pytest.mark.parametrize("code", ["__import__('os').mkdir('trap')", "range(open('trap', 'w'))"])
def test_code_in_a_genotype_is_not_run(code, tmp_path):
    """It would leave something in the test's folder."""
    assert parse_genotype(f"import os\n{code}\ny = {code}\nx = {V2}\nz = x\n") == V2  # beside it code is text
    for text in (
        f"Genotype({code})",
        str(V2).replace("[2, 3, 4, 5]", code, 1),
        str(V2).replace("('max_pool_3x3', 0)", f"('max_pool_3x3', np.int64({code}))", 1),
        DICT.replace("'normal'", f"**{code}, 'normal'", 1),
    ):
        for space in ("cells", "mobilenet"):
            with pytest.raises(InputError):
                parse_genotype(text, space)
    assert not list(tmp_path.iterdir())


def edge(new):
    return str(V1).replace("('sep_conv_3x3', 1)", new, 1)


BAD = {
    "empty": "",
    "cut off": str(V1)[:-20],
    "operation none": edge("('none', 1)"),
    "state of a later node": edge("('sep_conv_3x3', 2)"),
    "negative state": edge("('sep_conv_3x3', -1)"),
    "state between two": edge("('sep_conv_3x3', np.float64(0.5))"),
    "odd number of edges": str(V1._replace(normal=V1.normal[:7], normal_concat=[2])),
    "no edges": str(V1._replace(normal=[], normal_concat=[0, 1])),
    "field missing": str(V1).replace("reduce_concat", "concat"),
    "empty concat": str(V1._replace(normal_concat=[])),
    "an input in reduce_concat": str(V1._replace(reduce_concat=[1, 2, 3])),
    "endless concat": str(V1).replace("[2, 3, 4, 5]", "range(2, 1000000000000000000)"),
    "JSON list": "[1, 2]",
    "JSON null": json.dumps(V1._replace(normal_concat=None)._asdict()),
    "deeply nested": "Genotype(" + "(" * 100_000 + ")" * 100_001,
    "a bad one after a good one": f"{V2}\n{V1._replace(normal=[])}",
}


@pytest.mark.parametrize("text", BAD.values(), ids=list(BAD))
def test_bad_genotypes_are_refused(text, tmp_path):
    (tmp_path / "cell.txt").write_text(text)
    with pytest.raises(InputError, match=r"^[^\n]*cell.txt[^\n]*$"):
        load_genotype(tmp_path / "cell.txt")


@pytest.mark.parametrize("name", ["missing", "binary", "", str(V1), "a\0b"], ids=range(5))
def test_genotype_files_that_cannot_be_used(name, tmp_path):
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    with pytest.raises(InputError):
        load_genotype(f"{tmp_path}/{name}")  # "": the directory


def test_layers_of_the_mobile_space(tmp_path):
    layers = [*MOBILE_PRIMITIVES, "skip_connect"]
    save_genotype(layers, tmp_path / "layers.json")
    assert load_genotype(tmp_path / "layers.json", "mobilenet") == layers
    assert parse_genotype(f" {layers}\n", "mobilenet") == layers
    for text in ("", "[]", "skip_connect", "['skip_connect', 'sep_conv_3x3']", "[['skip_connect']]", "[" * 100_000):
        with pytest.raises(InputError, match="mbconv3_3x3"):
            parse_genotype(text, "mobilenet")
    with pytest.raises(InputError):
        load_genotype("DARTS_V2", "mobilenet")  # a genotype of cells, and no file
