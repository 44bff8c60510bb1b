"""common.py's genotypes, networks and pictures against published text, numbers and written-out versions."""

import copy
import json
import math
import re
from collections import Counter

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.func import functional_call

import common
from common import (
    GENOTYPES,
    MOBILE_PRIMITIVES,
    OPERATION_COLORS,
    PRIMITIVES,
    Cell,
    FactorizedReduce,
    Genotype,
    InputError,
    Network,
    auxiliary_head,
    check_auxiliary,
    count_flops,
    count_parameters,
    draw_cell,
    fix_batch_norms,
    learn_batch_norms,
    load_genotype,
    operation,
    parse_genotype,
    save_genotype,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# -----------------------------------------------------------------------------
# Genotypes
# -----------------------------------------------------------------------------

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
"""


def test_known_genotypes_equal_the_published_text():
    texts = {text.split(" = ")[0]: text for text in KNOWN.strip().split("\n\n")}
    assert {name: parse_genotype(text) for name, text in texts.items()} == GENOTYPES
    assert all(load_genotype(name) == genotype for name, genotype in GENOTYPES.items())


@pytest.mark.parametrize("name", GENOTYPES)
def test_genotype_round_trips(name, tmp_path):
    genotype = GENOTYPES[name]
    assert parse_genotype(str(genotype)) == genotype
    save_genotype(genotype._replace(normal_concat=range(2, 6)), tmp_path / "cell.json")
    assert load_genotype(tmp_path / "cell.json") == genotype
    assert set(json.loads((tmp_path / "cell.json").read_text())) == set(Genotype._fields)
    (tmp_path / "cell.txt").write_text(f"# found in epoch 50\n\n{name} = {genotype}\n")
    assert load_genotype(str(tmp_path / "cell.txt")) == genotype


def test_genotype_without_field_names_and_of_another_size():
    normal, reduce = [("sep_conv_3x3", 1), ("skip_connect", 0)], [("max_pool_3x3", 0), ("avg_pool_3x3", 1)]
    text = f"Genotype({normal}, [0, 1, 2], {reduce}, range(2, 3))"
    assert parse_genotype(text) == Genotype(normal, [0, 1, 2], reduce, [2])


V1, V2, P = (GENOTYPES[name] for name in ("DARTS_V1", "DARTS_V2", "PDARTS"))

# What stands before DARTS_V1 in quark0's genotypes.py: a name that is no genotype, and NASNet's operations
HEAD = """from collections import namedtuple

Genotype = namedtuple('Genotype', 'normal normal_concat reduce reduce_concat')

PRIMITIVES = [
    'none',
    'max_pool_3x3'
]

NASNet = Genotype(
  normal = [
    ('sep_conv_5x5', 1),
    ('conv_7x1_1x7', 0),
  ],
  normal_concat = [2, 3, 4, 5, 6],
  reduce = [
    ('sep_conv_5x5', 1),
    ('conv_7x1_1x7', 0),
  ],
  reduce_concat = [4, 5, 6],
)

"""


def by_node(edges):
    """The operations as khanrc/pt.darts nests them: a list for each node."""
    return [edges[i : i + 2] for i in range(0, len(edges), 2)]


NESTED = f"Genotype(normal={by_node(V2.normal)}, normal_concat=range(2, 6), " + (
    f"reduce={by_node(V2.reduce)}, reduce_concat=range(2, 6))"
)
JSON = json.dumps(V2._asdict(), indent=1)
PAIRS = f"Genotype(normal={tuple(by_node(V2.normal))}, normal_concat=(2, 3, 4, 5), " + (
    f"reduce={tuple(map(tuple, by_node(V2.reduce)))}, reduce_concat=[2, 3, 4, 5], connectN=None, connects=None)"
)
DICT = str(V2._asdict()).replace("[2, 3, 4, 5]", "range(2, 6)")
STATES = re.compile(r"(?<=, )\d(?=\))")  # of the edges
AS_PEOPLE_HAVE_THEM = {  # all of them mean DARTS_V2
    "the text alone": f"{V2}",
    "lines around it": f"\n\n{V2}\n",
    "a name": f"DARTS_V2 = {V2}",
    "an alias below": f"DARTS_V2 = {V2}\n\nDARTS = DARTS_V2\n",
    "a line of a log": f"2018-12-01 10:00:00,123 genotype = {V2}",
    "a log": f"10:00 param size = 1.93MB\n10:01 genotype = {V2}\n10:01 train 000 2.31e+00 (best) 12.5\n",
    "a sentence": f"The best cell (of 4 seeds) is {V2}, which has (2, 3) skips.",
    "a cut log": f"genotype = {V2}\ngenotype = {str(V1)[:200]}",
    "the same twice": f"a = {V2}\nb = {V2}\n",
    "broken into lines": str(V2).replace(", ", ",\n    "),
    "nested by node": NESTED,
    "nested by node in a log": f"06/30 07:31:16 PM | genotype = {NESTED}",
    "our JSON": JSON,
    "JSON in a line": json.dumps(V2._asdict()) + "\n\n",
    "JSON nested by node": json.dumps(V2._replace(normal=by_node(V2.normal))._asdict()),
    "pairs as tuples": PAIRS.replace("[", "(").replace("]", ")"),
    "pairs as tuples in a log": f"==>> (best) epoch=003 : {PAIRS}\nsearch [12.5%] (13.1)",
    "NumPy's numbers": STATES.sub(r"np.int64(\g<0>)", str(V2)),
    "NumPy's numbers by its full name": STATES.sub(r"numpy.int32(\g<0>)", str(V2)),
    "NumPy's texts": re.sub(r"'\w+'", r"np.str_(\g<0>)", str(V2)),
    "NumPy's arrays": str(V2).replace("[2, 3, 4, 5]", "array([2, 3, 4, 5])"),
    "NumPy's arrays of a kind": PAIRS.replace("[2, 3, 4, 5]", "np.array([np.int64(2), 3, 4, 5], dtype=int64)"),
    "a dictionary": DICT,
    "a dictionary in a log": f"10:01 {{}} best = {DICT} (3 seeds)\n10:02 {{'loss': 2.5}}",
    "a dictionary of more": f"{{'epoch': 3, {DICT[1:-1]}, 'note': None}}",
    "a dictionary in another": f"{{'epoch': 3, 'genotype': {DICT}}}",
    "a dictionary of pairs": DICT.replace(str(V2.normal), str(by_node(V2.normal))),
    "a cut dictionary": f"{DICT}\n{DICT[:200]}",
    "a genotype and then a dictionary": f"{V2}\n{{'normal': [[0.1, 0.2]], 'reduce': [[0.3, 0.4]]}}",
    "JSON in a log": f"10:01 {json.dumps(V2._asdict())} (best)",
    "JSON in JSON": json.dumps({"epoch": 3, "loss": None, "genotype": V2._asdict()}),
    "JSON of more": json.dumps({"run": {"epoch": 3}, **V2._asdict()}),
    "JSON of a script's text": json.dumps({"epoch": 3, "genotype": str(V2)}),
}


@pytest.mark.parametrize("text", AS_PEOPLE_HAVE_THEM.values(), ids=list(AS_PEOPLE_HAVE_THEM))
def test_genotypes_as_people_have_them(text, tmp_path, capsys):
    assert parse_genotype(text) == V2
    for encoding in ("utf-8", "utf-8-sig"):  # with a byte order mark, as Windows saves it
        (tmp_path / "cell.txt").write_text(text, encoding=encoding)
        found = load_genotype(tmp_path / "cell.txt")
        assert found == V2 and type(found) is Genotype
        assert all(type(edge) is tuple for edge in found.normal + found.reduce)
    assert capsys.readouterr().out == ""


SEVERAL = {
    "genotypes.py": HEAD + f"DARTS_V1 = {V1}\nDARTS_V2 = {V2}\n\nDARTS = DARTS_V2\n",
    "a log": "".join(f"2018-12-01 1{i}:00:00,123 genotype = {g}\n" for i, g in enumerate((V1, P, V1, V2))),
    "nested and not": f"{V1}\n{NESTED}",
    "dictionaries": f"{V1._asdict()}\n{DICT}",
}


@pytest.mark.parametrize("text", SEVERAL.values(), ids=list(SEVERAL))
def test_of_several_genotypes_the_last_is_meant_and_that_is_said(text, capsys):
    assert parse_genotype(text) == V2
    said = capsys.readouterr().out
    assert said.startswith("note: ") and "last" in said and said.count("\n") == 1


def test_only_the_last_of_several_must_be_good():
    assert parse_genotype(f"{V1._replace(normal=[])}\n{V2}") == V2
    with pytest.raises(InputError):
        parse_genotype(f"{V2}\n{V1._replace(normal=[])}")


def test_layers_of_the_mobile_space_round_trip(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layers = [*MOBILE_PRIMITIVES, "skip_connect"]
    save_genotype(layers, tmp_path / "layers.json")
    assert json.loads((tmp_path / "layers.json").read_text()) == layers
    assert load_genotype(tmp_path / "layers.json", "mobilenet") == layers
    assert parse_genotype(f" {layers}\n", "mobilenet") == layers
    bad = ["", "[]", "3", "skip_connect", "['skip_connect', 'sep_conv_3x3']", "[['skip_connect']]", str(V2)]
    for text in [*bad, "{'skip_connect': 1}", "[__import__('os')]", "[" * 100_000, "DARTS_V2"]:
        with pytest.raises(InputError, match="mbconv3_3x3"):
            parse_genotype(text, "mobilenet")
    with pytest.raises(InputError):
        load_genotype("DARTS_V2", "mobilenet")  # a genotype of cells, and no file


CODE = [  # would leave a folder behind
    "__import__('os').mkdir('trap')",
    "(lambda: __import__('os').mkdir('trap'))()",
    "range(__import__('os').mkdir('trap'))",
    "[x for x in [__import__('os').mkdir('trap')]]",
    "exec(\"import os; os.mkdir('trap')\")",
    "open('trap', 'w')",
]


@pytest.mark.parametrize("code", CODE)
def test_code_in_a_genotype_is_not_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = str(V2)
    texts = [
        f"import os\nos.mkdir('trap')\nx = {good}",
        f"{code}\nx = {good}",
        f"Genotype({code})",
        good.replace("[2, 3, 4, 5]", code, 1),
        good.replace("[2, 3, 4, 5]", f"[2, {code}]"),
        good.replace("('max_pool_3x3', 0)", f"('max_pool_3x3', {code})", 1),
        good.replace("[2, 3, 4, 5]", f"array({code})", 1),
        good.replace("('max_pool_3x3', 0)", f"('max_pool_3x3', np.int64({code}))", 1),
        DICT.replace("range(2, 6)", code, 1),
        DICT.replace("'normal'", f"{code}: 0, 'normal'", 1),
        DICT.replace("'normal'", f"**{code}, 'normal'", 1),
    ]
    for i, text in enumerate(texts):
        if i < 2:
            assert parse_genotype(text) == V2  # the code beside it is text
        else:
            with pytest.raises(InputError):
                parse_genotype(text)
        with pytest.raises(InputError):
            parse_genotype(text, "mobilenet")
    assert not list(tmp_path.iterdir())


GOOD = str(GENOTYPES["DARTS_V1"])
GOOD_JSON = json.dumps(GENOTYPES["DARTS_V1"]._asdict())


def edge(new):
    return GOOD.replace("('sep_conv_3x3', 1)", new, 1)


def concat(new):
    return GOOD.replace("[2, 3, 4, 5]", new, 1)


BAD_GENOTYPES = {
    "empty": "",
    "prose": "the best cell",
    "cut off": GOOD[:-20],
    "a statement": "import os",
    "a number": "NAME = 3",
    "code": concat("__import__('os').listdir('.')"),
    "a name": GOOD.replace("'skip_connect'", "skip_connect", 1),
    "unknown operation": edge("('conv_7x1_1x7', 1)"),
    "operation none": edge("('none', 1)"),
    "state of a later node": edge("('sep_conv_3x3', 2)"),
    "negative state": edge("('sep_conv_3x3', -1)"),
    "state in words": edge("('sep_conv_3x3', 'one')"),
    "infinite state": edge("('sep_conv_3x3', 1e999)"),
    "state between two": edge("('sep_conv_3x3', 0.5)"),
    "edge of three": edge("('sep_conv_3x3', 1, 1)"),
    "odd number of edges": f"Genotype({[('skip_connect', 0)] * 3}, [2], {[('skip_connect', 0)] * 2}, [2])",
    "no edges": "Genotype(normal=[], normal_concat=[0], reduce=[], reduce_concat=[0])",
    "field missing": GOOD.replace("reduce_concat", "concat"),
    "field twice": GOOD.replace("reduce_concat", "normal_concat"),
    "empty concat": concat("[]"),
    "an input in reduce_concat": str(V1._replace(reduce_concat=[1, 2, 3])),
    "the older input in reduce_concat": str(V1._replace(reduce_concat=[0, 5])),
    "negative concat": str(V1._replace(normal_concat=[-1])),
    "cut nested by node": NESTED[:300],
    "three edges of a node": f"Genotype({[[('skip_connect', 0)] * 3]}, [2], {[[('skip_connect', 0)] * 2]}, [2])",
    "concat past the end": concat("range(2, 7)"),
    "endless concat": concat("range(2, 1000000000000000000)"),
    "concat a number": concat("5"),
    "concat between two": concat("[2.5]"),
    "JSON cut off": GOOD_JSON[:-20],
    "JSON list": "[1, 2]",
    "JSON without reduce": '{"normal": [["skip_connect", 0], ["skip_connect", 1]], "normal_concat": [2]}',
    "JSON null": GOOD_JSON.replace("[2, 3, 4, 5]", "null", 1),
    "JSON infinity": GOOD_JSON.replace('["sep_conv_3x3", 1]', '["sep_conv_3x3", Infinity]', 1),
    "deeply nested JSON": '{"normal": ' + "[" * 100_000,
    "deeply nested text": "Genotype(" + "[" * 100_000,
    "deeply nested and closed": "Genotype(" + "(" * 100_000 + ")" * 100_001,
    "many begun": "Genotype(" * 20_000 + "{'normal':" * 20_000,
    "dictionary cut off": DICT[:-20],
    "dictionary without reduce_concat": DICT.replace("reduce_concat", "concat"),
    "dictionary of tensors": "{'normal': tensor([[0.1, 0.2]]), 'reduce': tensor([[0.3]])}",
    "NumPy's fraction": edge("('sep_conv_3x3', np.float64(0.5))"),
    "a call without arguments": concat("range()"),
}


@pytest.mark.parametrize("text", BAD_GENOTYPES.values(), ids=list(BAD_GENOTYPES))
def test_bad_genotypes_are_refused(text, tmp_path):
    assert text not in (GOOD, GOOD_JSON)
    (tmp_path / "cell.txt").write_text(text)
    for refuse in (lambda: parse_genotype(text), lambda: load_genotype(tmp_path / "cell.txt")):
        with pytest.raises(InputError) as e:
            refuse()
        assert "\n" not in str(e.value)
    assert "cell.txt" in str(e.value)


@pytest.mark.parametrize("text", ["", "prose", "{}", "[1, 2]", DICT[:-20], GOOD.replace("reduce_concat", "concat")])
def test_what_was_looked_for_is_named(text):
    with pytest.raises(InputError, match="^neither Genotype.* nor a dictionary with normal, normal_concat, reduce"):
        parse_genotype(text)


@pytest.mark.parametrize("name", ["missing", "binary", "", GOOD, "a\0b"], ids=range(5))
def test_genotype_files_that_cannot_be_used(name, tmp_path):
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    with pytest.raises(InputError):
        load_genotype(f"{tmp_path}/{name}")  # "": the directory


# -----------------------------------------------------------------------------
# Operations
# -----------------------------------------------------------------------------


def evaluating(module):
    """`module` in evaluation mode, with batch norm statistics that are not 0 and 1."""
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.running_mean, -0.5, 0.5)
            nn.init.uniform_(m.running_var, 0.5, 2)
    return module.eval()


def parts(module, kind):
    return [m for m in module.modules() if isinstance(m, kind)]


@pytest.mark.parametrize("size", [(10, 10), (7, 4), (1, 1)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", PRIMITIVES[1:])
def test_operations_equal_their_definition(name, stride, size):
    """DARTS' operations, layer by layer."""
    op = evaluating(operation(name, 6, stride))
    weights, norms = [m.weight for m in parts(op, nn.Conv2d)], parts(op, nn.BatchNorm2d)
    want = x = torch.randn(2, 6, *size)
    if name == "max_pool_3x3":
        want = F.max_pool2d(x, 3, stride, 1)
    elif name == "avg_pool_3x3":
        kernel = torch.ones(1, 1, 3, 3)
        share = F.conv2d(torch.ones(1, 1, *size), kernel, stride=stride, padding=1)
        want = F.conv2d(x, kernel.expand(6, 1, 3, 3), stride=stride, padding=1, groups=6) / share
    elif name == "skip_connect" and stride == 2:
        even = F.pad(F.relu(x), (0, size[1] % 2, 0, size[0] % 2))
        first, second = even, even[:, :, 1:, 1:]
        pair = [F.conv2d(half, weight, stride=2) for half, weight in zip((first, second), weights)]
        want = norms[0](torch.cat(pair, 1))
    elif name != "skip_connect":
        k, dilation = int(name[-1]), 2 if name.startswith("dil") else 1
        assert len(weights) == 2 * len(norms) == 4 // dilation and isinstance(op[0], nn.ReLU)
        for i, norm in enumerate(norms):
            depthwise, pointwise = weights[2 * i : 2 * i + 2]
            assert depthwise.shape == (6, 1, k, k) and pointwise.shape == (6, 6, 1, 1)
            step, pad = stride if i == 0 else 1, dilation * (k // 2)
            want = F.conv2d(F.relu(want), depthwise, None, step, pad, dilation, groups=6)
            want = norm(F.conv2d(want, pointwise))
    torch.testing.assert_close(op(x), want, rtol=1e-4, atol=1e-5)


def test_fixed_batch_norms_are_no_parameters_until_they_learn():
    """Their state_dict keeps its keys, so that each kind loads the other."""
    plain = Network(V2, 5, channels=4, layers=3)
    net = copy.deepcopy(plain)
    norms = parts(net, nn.BatchNorm2d)
    x, y = torch.randn(8, 3, 8, 8), torch.arange(8) % 5

    def step():
        before = [(norm.weight.clone(), norm.bias.clone()) for norm in norms]
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.1)
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        return [
            not torch.equal(norm.weight, w) and not torch.equal(norm.bias, b) for norm, (w, b) in zip(norms, before)
        ]

    torch.testing.assert_close(net(x), plain(x))
    for _ in range(2):  # twice is once
        fix_batch_norms(net)
        names = {name for name, _ in net.named_parameters()}
        assert names == {name for name, p in plain.named_parameters() if p.ndim > 1} | {"classifier.bias"}
        assert net.state_dict().keys() == plain.state_dict().keys()
        assert not any(step())
    assert all((norm.weight == 1).all() and (norm.bias == 0).all() and norm.affine for norm in norms)
    assert net.double().state_dict()["stem0.1.weight"].dtype == torch.float64  # moves with the network
    net.float().load_state_dict(plain.state_dict())
    copy.deepcopy(net).load_state_dict(net.state_dict())

    kept = norms[0].weight = nn.Parameter(torch.full((12,), 2.0))  # one that learns already
    for _ in range(2):
        learn_batch_norms(net)
        assert norms[0].weight is kept
        assert {name for name, _ in net.named_parameters()} == {name for name, _ in plain.named_parameters()}
        assert net.state_dict().keys() == plain.state_dict().keys()
    assert (norms[1].weight == 1).all() and all(step())


@pytest.mark.parametrize("name", ["none", "conv_7x7", "sep_conv_7x7"])
def test_unknown_operations_are_refused(name):
    with pytest.raises(InputError, match="sep_conv_3x3"):
        operation(name, 4, 1)


@pytest.mark.parametrize("size", [(8, 6), (7, 7), (5, 8), (8, 5), (1, 1)], ids=str)
def test_factorized_reduce_equals_its_definition(size, monkeypatch):
    """Two convolutions, of the pixels and of those one down and to the right; zeros make an odd size even."""
    pad, calls = F.pad, []
    monkeypatch.setattr(common.F, "pad", lambda *args: calls.append(args) or pad(*args))
    reduce = evaluating(FactorizedReduce(5, 8))
    x = torch.randn(3, 5, *size)
    before, ours = x.clone(), reduce(x)
    assert torch.equal(x, before)
    assert len(calls) == (1 if size[0] % 2 or size[1] % 2 else 0)  # to pad by nothing would copy

    H, W = (math.ceil(side / 2) for side in size)
    padded = torch.zeros(3, 5, 2 * H, 2 * W)
    padded[:, :, : size[0], : size[1]] = x.relu()
    pair = [padded[:, :, i::2, i::2] for i in (0, 1)]
    weights = [conv.weight[:, :, 0, 0] for conv in parts(reduce, nn.Conv2d)]
    want = torch.cat([torch.einsum("oc,bchw->bohw", w, half) for w, half in zip(weights, pair)], 1)
    torch.testing.assert_close(ours, parts(reduce, nn.BatchNorm2d)[0](want))
    assert ours.shape == (3, 8, H, W)


def test_a_cell_that_drops_paths_stays_in_bfloat16_under_autocast():
    cell = Cell(MIXED, 4, 4, 4, reduction=False, halved=False)
    x = torch.randn(2, 4, 8, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert cell(x, x, 0.5).dtype == cell(x, x).dtype == torch.bfloat16  # a mask of float32 would spread


# -----------------------------------------------------------------------------
# Cells and networks
# -----------------------------------------------------------------------------

CONVS = Genotype(*[[("sep_conv_3x3", i % 2) for i in range(8)], [2, 3, 4, 5]] * 2)
MIXED = Genotype(*[[("skip_connect", 0), ("dil_conv_5x5", 1)] * 4, [2, 3, 4, 5]] * 2)
ALMOST_ONE = 1 - 1e-7  # a drop path probability


@pytest.mark.parametrize("halved", [False, True])
def test_a_cell_is_its_genotype_written_out(halved):
    """DARTS_V2's cells: every node the sum of its two operations, the output the nodes that concat names."""
    genotype = GENOTYPES["DARTS_V2"]._replace(reduce_concat=[5, 2, 3])
    x0, x1 = torch.randn(2, 6, 16, 16) if halved else torch.randn(2, 6, 8, 8), torch.randn(2, 10, 8, 8)
    normal, reduction = (evaluating(Cell(genotype, 6, 10, 4, r, halved)) for r in (False, True))
    s0, s1, op = normal.preprocess0(x0), normal.preprocess1(x1), normal.ops
    s2, s3 = op[0](s0) + op[1](s1), op[2](s0) + op[3](s1)
    s4, s5 = op[4](s1) + s0, s0 + op[7](s2)
    torch.testing.assert_close(normal(x0, x1), torch.cat([s2, s3, s4, s5], 1))
    s0, s1, op = reduction.preprocess0(x0), reduction.preprocess1(x1), reduction.ops
    s2 = op[0](s0) + op[1](s1)
    s3, s5 = s2 + op[3](s1), s2 + op[7](s1)
    torch.testing.assert_close(reduction(x0, x1), torch.cat([s5, s2, s3], 1))


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    cell = Cell(CONVS, 4, 4, 4, reduction=False, halved=False)
    states = [torch.randn(5_000, 4, 2, 2)]
    made = outputs_of([cell.ops[0]])
    assert cell.edge(0, states, 0.0) is made[-1]  # nothing is drawn, nothing computed
    for prob in (0.2, 0.75):
        out = cell.edge(0, states, prob)
        kept = (out != 0).flatten(1).any(1)
        torch.testing.assert_close(out[kept], made[-1][kept] / (1 - prob))
        assert abs(kept.float().mean() - (1 - prob)) < 5 * math.sqrt(prob * (1 - prob) / 5_000)
    assert cell.eval().edge(0, states, 0.5) is made[-1]


@pytest.mark.parametrize("reduction", [False, True])
def test_identities_are_never_dropped_and_all_others_are(reduction):
    cell = Cell(MIXED, 4, 4, 4, reduction, halved=False)
    x0, x1 = torch.randn(2, 8, 4, 8, 8)
    assert all(node.any() for node in cell(x0, x1).split(4, 1))
    left = torch.zeros(8, 16, 4, 4) if reduction else cell.preprocess0(x0).repeat(1, 4, 1, 1)
    torch.testing.assert_close(cell(x0, x1, ALMOST_ONE), left)


def test_network_drops_paths_in_training_only():
    net = Network(CONVS, 10, channels=4, layers=3)
    x = torch.randn(4, 3, 16, 16)
    net.drop_path_prob = ALMOST_ONE
    torch.testing.assert_close(net(x), net.classifier.bias.expand(4, 10))
    dropping = net.eval()(x)
    net.drop_path_prob = 0.0
    assert torch.equal(net(x), dropping) and not torch.allclose(dropping, net.classifier.bias.expand(4, 10))


@pytest.mark.parametrize("size", [(31, 31), (45, 44)], ids=str)
@pytest.mark.parametrize("name", GENOTYPES)
def test_network_outputs(name, size):
    net = Network(GENOTYPES[name], num_classes=7, channels=4, layers=3, auxiliary=True)
    x = torch.randn(2, 3, *size)
    logits, auxiliary = net(x)
    assert logits.shape == auxiliary.shape == (2, 7)
    (logits.sum() + auxiliary.sum()).backward()
    assert all(p.grad is not None for p in net.parameters())
    assert net.eval()(x).shape == (2, 7)
    assert Network(GENOTYPES[name], num_classes=7, channels=4, layers=3)(x).shape == (2, 7)


@pytest.mark.filterwarnings("ignore")  # tracing has a successor, and sees a size as a constant
@pytest.mark.parametrize("stem, size", [("cifar", 32), ("cifar", 31), ("imagenet", 64)])
def test_networks_can_be_traced(stem, size):
    net = evaluating(Network(GENOTYPES["DARTS_V2"], 5, channels=4, layers=3, auxiliary=True, stem=stem))
    with torch.no_grad():
        traced = torch.jit.trace(net, torch.randn(2, 3, size, size))
        x = torch.randn(3, 3, size, size)
        torch.testing.assert_close(traced(x), net(x))


def outputs_of(modules):
    """A list that fills with what the modules return."""
    outputs = []
    for module in modules:
        module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    return outputs


def test_reductions_stand_at_a_third_and_two_thirds_and_the_auxiliary_head_after_the_second():
    net = Network(GENOTYPES["DARTS_V1"], 10, channels=4, layers=8, auxiliary=True)
    outputs = outputs_of(net.cells)
    _, auxiliary = net(torch.randn(2, 3, 32, 32))
    assert [y.shape[1:] for y in outputs] == [(16, 32, 32)] * 2 + [(32, 16, 16)] * 3 + [(64, 8, 8)] * 3
    torch.testing.assert_close(auxiliary, net.auxiliary(outputs[5]))


@pytest.mark.parametrize("size, auxiliary", [(64, False), (95, False), (224, True)])
def test_imagenet_stem(size, auxiliary):
    net = Network(GENOTYPES["DARTS_V2"], 5, channels=4, layers=3, auxiliary=auxiliary, stem="imagenet")
    outputs = outputs_of([net.stem0, net.stem1])
    y = net(torch.randn(2, 3, size, size))
    assert [y.shape for y in outputs] == [(2, 4, math.ceil(size / s), math.ceil(size / s)) for s in (4, 8)]
    assert [part.shape for part in (y if auxiliary else (y,))] == [(2, 5)] * (1 + auxiliary)


@pytest.mark.parametrize("stem, size, stride", [("cifar", 8, 3), ("cifar", 11, 3), ("imagenet", 7, 2)])
def test_auxiliary_head_equals_its_definition(stem, size, stride):
    head = evaluating(auxiliary_head(6, 10, stem))
    convs, norms, linear = parts(head, nn.Conv2d), parts(head, nn.BatchNorm2d), head[-1]
    x = torch.randn(2, 6, size, size)
    want = F.avg_pool2d(F.relu(x), 5, stride)
    want = F.relu(norms[0](F.conv2d(want, convs[0].weight)))
    want = F.conv2d(want, convs[1].weight)
    if stem == "cifar":  # DARTS' own code left it out for ImageNet
        want = norms[1](want)
    assert len(norms) == (2 if stem == "cifar" else 1)
    torch.testing.assert_close(head(x), F.linear(want.relu().mean((2, 3)), linear.weight, linear.bias))


@pytest.mark.parametrize("size", [8, 28, 29, 32, 63, 64, 128, 192, 193, 224])
def test_images_too_small_for_the_auxiliary_head_are_refused(size):
    """Exactly those that the network cannot take."""
    net = Network(CONVS, 2, channels=2, layers=3, auxiliary=True, stem="imagenet" if size >= 64 else "cifar")
    images = torch.randn(2, 3, size, size)
    try:
        net(images)
        check_auxiliary(size)
    except RuntimeError:
        with pytest.raises(InputError, match=f"^{size} pixels are too few .*: give --auxiliary-weight 0$"):
            check_auxiliary(size)


def derivatives(name):
    """The network of a genotype in float64 and training: its weights, and the loss as a function of them."""
    net = Network(GENOTYPES[name], 5, channels=4, layers=3, auxiliary=True).double()
    x, y = torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.arange(4)
    x = x.contiguous(memory_format=torch.channels_last)
    statistics = {name: buffer.clone() for name, buffer in net.named_buffers()}

    def loss(weights, buffers):
        logits, auxiliary = functional_call(net, (weights, buffers), x)
        return F.cross_entropy(logits, y) + 0.4 * F.cross_entropy(auxiliary, y)

    def gradient(weights):
        return torch.func.grad(loss)(weights, {name: buffer.clone() for name, buffer in statistics.items()})

    return dict(net.named_parameters()), lambda weights: loss(weights, statistics), gradient


@pytest.mark.parametrize("name", ["DARTS_V2", "PC_DARTS_cifar"])
def test_second_derivatives_of_networks(name):
    """The Hessian times a vector, against central differences of the gradient; torch.func gives the same gradient."""
    weights, loss, gradient = derivatives(name)
    first = torch.autograd.grad(loss(weights), weights.values(), create_graph=True)
    fixed = {key: weight.detach() for key, weight in weights.items()}
    torch.testing.assert_close(tuple(gradient(fixed).values()), first, rtol=1e-12, atol=1e-12)

    vector = {key: torch.randn_like(weight) for key, weight in fixed.items()}
    product = torch.autograd.grad(sum((g * v).sum() for g, v in zip(first, vector.values())), weights.values())
    step = 1e-7  # so small that no ReLU and no maximum changes sides
    ahead, behind = (gradient({k: w + s * vector[k] for k, w in fixed.items()}) for s in (step, -step))
    differences = torch.cat([((ahead[k] - behind[k]) / (2 * step)).flatten() for k in fixed])
    product = torch.cat([part.flatten() for part in product])
    assert (differences - product).norm() < 1e-5 * product.norm()


# -----------------------------------------------------------------------------
# Counts
# -----------------------------------------------------------------------------


def meta_network(*args, **kwargs):
    """Shapes only: neither memory nor arithmetic."""
    with torch.device("meta"):
        return Network(*args, **kwargs)


@pytest.mark.parametrize("name, count", [("DARTS_V1", 3_169_414), ("DARTS_V2", 3_349_342)])
def test_published_parameter_counts(name, count):
    net = meta_network(GENOTYPES[name], 10, 36, 20, auxiliary=True)
    assert count_parameters(net) == count
    assert sum(p.numel() for p in net.parameters()) == count + 476_426


SIZES = {"cifar": (10, 36, 20), "imagenet": (1000, 48, 14)}
MILLIONS = {
    "cifar": {"PDARTS": 3.4, "PC_DARTS_cifar": 3.6},
    "imagenet": {"DARTS_V2": 4.7, "PDARTS": 4.9, "PC_DARTS_image": 5.3},
}


@pytest.mark.parametrize("stem", SIZES)
def test_published_parameters_in_millions(stem):
    for name, millions in MILLIONS[stem].items():
        net = meta_network(GENOTYPES[name], *SIZES[stem], stem=stem)
        assert round(count_parameters(net) / 1e6, 1) == millions


def test_published_multiply_adds():
    assert round(count_flops(meta_network(GENOTYPES["DARTS_V2"], 10, 36, 20), 32) / 1e6) == 528


def test_count_flops_equals_a_count_by_hand():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),  # 8*8 pixels, 4 outputs, 27 products each
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4),  # 4*4 pixels, 4 outputs, 9 products each
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    statistics = net[1].running_mean.clone()
    assert count_flops(net, 8) == 8 * 8 * 4 * 27 + 4 * 4 * 4 * 9 + 64 * 10
    assert net.training and torch.equal(net[1].running_mean, statistics)
    assert count_flops(net.eval(), 8) and not net.training


# -----------------------------------------------------------------------------
# Pictures
# -----------------------------------------------------------------------------


@pytest.mark.parametrize("cell", ["normal", "reduce"])
@pytest.mark.parametrize("name", GENOTYPES)
def test_draw_cell(name, cell, tmp_path):
    figure = pytest.importorskip("matplotlib.figure").Figure(figsize=(10, 3.2))
    axis = figure.add_subplot()
    edges, concat = getattr(GENOTYPES[name], cell), getattr(GENOTYPES[name], f"{cell}_concat")
    draw_cell(edges, concat, axis, f"{name}, {cell}")
    assert axis.get_title() == f"{name}, {cell}"
    arrows = [text for text in axis.texts if getattr(text, "arrow_patch", None) is not None]
    boxes = [text for text in axis.texts if text not in arrows]
    assert len(arrows) == len(edges) + len(concat)
    assert {"0", "1", "2", "3"} <= {text.get_text() for text in boxes}
    operations = [text for text in boxes if text.get_text() in PRIMITIVES]
    assert Counter(text.get_text() for text in operations) == Counter(op for op, _ in edges)
    figure.savefig(tmp_path / "cell.png", dpi=100)  # Agg: a figure without pyplot needs no display
    assert Image.open(tmp_path / "cell.png").size == (1000, 320)
    extents = [text.get_bbox_patch().get_window_extent() for text in boxes]
    assert sum(a.overlaps(b) for a in extents for b in extents) == len(boxes)  # each box only itself
    assert len(set(OPERATION_COLORS)) == len(PRIMITIVES)
