"""baseline_sequential.py: network, penalty, steps, its parts, comparison; and what the three scripts share."""

import argparse
import inspect
import json
import math
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

import baseline_sequential as baseline
import common
import dha
import joint_darts_faa as joint
from conftest import call

CPU = torch.device("cpu")
SCRIPTS = (dha, joint, baseline)


@pytest.fixture(autouse=True)
def seeded_on_one_thread():  # networks are tiny, and two threads beside other programs take 40 times as long
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small(*flags):
    start = "--method faa-darts --preset quick --gpu -1".split()
    return baseline.parse_args(start + [str(x) for x in flags])


def few_images():
    return common.Data(*common.shapes(40, 1), *common.shapes(10, 2), list(common.SHAPE_CLASSES))


def halves(data):
    """Two batches of 8: (images in [0, 1], labels)."""
    return [(data.train_images[k : k + 8].float() / 255, data.train_labels[k : k + 8]) for k in (0, 8)]


# -------- The network and the penalty -----------------------------------------------------------------------


def test_wide_resnet_has_the_published_size_and_two_heads():
    net = baseline.WideResNet(10, 40, 2)
    head = common.count_parameters(net.critic)
    widths, expected = (16, 32, 64, 128), 3 * 16 * 9
    for a, b in zip(widths, widths[1:]):
        expected += a * b * 9 + a * b + 2 * a + 2 * b + b * b * 9  # with a shortcut
        expected += 5 * (2 * b * b * 9 + 4 * b)
    expected += 2 * 128 + 128 * 10 + 10
    assert common.count_parameters(net) - head == expected == 2_243_546  # "2.2 M"
    assert head == 16_641
    for size in (32, 17, 8):
        logits, value = baseline.WideResNet(7, 10, 1)(torch.rand(3, 3, size, size))
        assert logits.shape == (3, 7) and value.shape == (3,)


@pytest.mark.parametrize("norm", ["pixel", "image"])
def test_gradient_penalty_of_a_quadratic_critic(norm):
    """critic(x) = x^T A x / 2 has the gradient (A + A^T) x / 2: everything can be written out."""
    real, augmented = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64)
    share = torch.rand(4, dtype=torch.float64)
    A = torch.randn(12, 12, dtype=torch.float64, requires_grad=True)

    def critic(x):
        return 0.5 * ((x.flatten(1) @ A) * x.flatten(1)).sum(1)

    terms = []
    for t, x, y in zip(share, real, augmented):
        gradient = (t * x + (1 - t) * y).flatten() @ (A + A.T) / 2  # channel by channel, 4 pixels each
        parts = [gradient] if norm == "image" else [gradient[pixel::4] for pixel in range(4)]
        terms += [(part.square().sum().sqrt() - 1) ** 2 for part in parts]
    expected = torch.stack(terms).mean()
    mine = baseline.gradient_penalty(critic, real, augmented, share, norm)
    assert torch.allclose(mine, expected, rtol=1e-12)
    assert torch.allclose(*(torch.autograd.grad(v, A)[0] for v in (mine, expected)), rtol=1e-10)


def test_second_derivative_of_the_penalty_by_finite_differences():
    """Through the whole network, along a random direction."""
    net = baseline.WideResNet(3, 10, 1).double()
    real, augmented = torch.rand(2, 4, 3, 8, 8, dtype=torch.float64)
    share = torch.rand(4, dtype=torch.float64)
    params = [p for name, p in net.named_parameters() if not name.startswith("classifier")]

    def penalty():
        return baseline.gradient_penalty(lambda x: net(x)[1], real, augmented, share)

    found = torch.autograd.grad(penalty(), params, allow_unused=True)
    gradient = [torch.zeros_like(p) if g is None else g for p, g in zip(params, found)]  # a last bias: None
    direction, values = [torch.randn_like(p) for p in params], []
    for step in (1e-7, -2e-7, 1e-7):
        values.append(float(penalty().detach()))
        for p, d in zip(params, direction):
            p.data.add_(d, alpha=step)
    slope = sum(float((g * d).sum()) for g, d in zip(gradient, direction))
    assert slope == pytest.approx((values[1] - values[2]) / 2e-7, rel=1e-5)


# -------- Faster AutoAugment --------------------------------------------------------------------------------


def test_a_step_moves_only_its_own():
    data = few_images()
    s, (first, second) = baseline.PolicySearch(small(), 10, CPU), halves(data)

    def copy(module):
        return [p.detach().clone() for p in module.parameters()]

    def changed(module, old):
        return [not torch.equal(p, q) for p, q in zip(module.parameters(), old)]

    net, policy = copy(s.net), copy(s.policy)
    baseline.critic_step(s, *first, second[0], small())
    assert not any(changed(s.policy, policy)) and all(p.grad is None for p in s.policy.parameters())
    assert sum(changed(s.net, net)) >= len(net) - 1  # the critic's last bias has no gradient
    net, grads = copy(s.net), [None if p.grad is None else p.grad.clone() for p in s.net.parameters()]
    baseline.policy_step(s, *second, small())
    assert all(changed(s.policy, policy)) and not any(changed(s.net, net))
    assert all(g is p.grad or torch.equal(g, p.grad) for g, p in zip(grads, s.net.parameters()))
    assert all(0 <= v.min() and v.max() <= 1 for v in (s.policy.p, s.policy.mu))


@pytest.mark.parametrize("norm", ["pixel", "image"])
def test_steps_follow_the_written_out_losses(norm):
    flags = f"--class-weight 0.3 --critic-weight 0.7 --penalty 5 --penalty-norm {norm}"
    data, args = few_images(), small(*flags.split())
    args.faa_lr = args.policy_lr = 0.0  # so that the parameters stay where the gradients were
    s, ((real, labels), (other, others)) = baseline.PolicySearch(args, 10, CPU), halves(data)
    for group in (*s.net_optimizer.param_groups, *s.policy_optimizer.param_groups):
        assert group["betas"] == (0.0, 0.999)

    def stretched(x):  # the network sees [-1, 1]
        return (x - 0.5) / 0.5

    torch.manual_seed(7)
    measured = baseline.critic_step(s, real, labels, other, args).tolist()
    mine = [p.grad.clone() for p in s.net.parameters()]
    torch.manual_seed(7)
    with torch.no_grad():
        augmented = stretched(s.policy(other))
    logits, value = s.net(stretched(real))
    fake, t = s.net(augmented)[1], torch.rand(8).view(-1, 1, 1, 1)
    x = (t * stretched(real) + (1 - t) * augmented).requires_grad_(True)
    (slope,) = torch.autograd.grad(s.net(x)[1].sum(), x, create_graph=True)
    penalty = ((slope.square().sum(1 if norm == "pixel" else (1, 2, 3)).sqrt() - 1) ** 2).mean()
    class_loss = F.cross_entropy(logits, labels)
    loss = 0.7 * (fake.mean() - value.mean() + 5.0 * penalty) + 0.3 * class_loss
    expected = torch.autograd.grad(loss, list(s.net.parameters()), allow_unused=True)
    for p, q in zip(mine, expected):
        assert torch.allclose(p, torch.zeros_like(p) if q is None else q, atol=1e-5, rtol=1e-4)
    accuracy = 100 * (logits.argmax(1) == labels).float().mean()
    wanted = [value.mean() - fake.mean(), penalty, class_loss, accuracy]
    assert measured == pytest.approx([v.item() for v in wanted], abs=1e-5, rel=1e-4)

    torch.manual_seed(8)
    measured = baseline.policy_step(s, other, others, args).tolist()
    mine = [p.grad.clone() for p in s.policy.parameters()]
    torch.manual_seed(8)
    logits, value = s.net(stretched(s.policy(other)))
    class_loss = F.cross_entropy(logits, others)
    loss = -0.7 * value.mean() + 0.3 * class_loss
    for p, q in zip(mine, torch.autograd.grad(loss, list(s.policy.parameters()))):
        assert torch.allclose(p, q, atol=1e-6, rtol=1e-4)
    wanted = [-value.mean(), class_loss, 100 * (logits.argmax(1) == others).float().mean()]
    assert measured == pytest.approx([v.item() for v in wanted], abs=1e-5, rel=1e-4)


# -------- The parts ------------------------------------------------------------------------------------------

GIVEN = "--channels 6 --layers 3 --batch-size 4 --lr 0.03 --train-epochs 7 --search-epochs 2 --limit-train 30"
GIVEN += " --limit-test 20 --image-size 30 --workers 2 --data-dir elsewhere"


@pytest.mark.parametrize("method", ["faa-darts", "darts", "dha"])
def test_parts_get_the_flags_that_they_are_handed(method, tmp_path):
    """Those of the command, and the baseline's own where they have them; else their defaults for the preset."""
    flags = ["--method", method, "--preset", "quick", "--seed", "5", "--out", str(tmp_path / "run"), *GIVEN.split()]
    args = baseline.parse_args(flags)
    assert args.rest == GIVEN.split()
    assert list(args.parts) == (["search", "train"] if method == "dha" else ["darts"])
    own = {  # beyond --out
        "search": {"no_da": True, "no_hpo": True, "train_epochs": 0},
        "train": {"genotype": str(tmp_path / "run" / "search" / "genotype.json")},
        "darts": {"policy": "none" if method == "darts" else str(tmp_path / "run" / "policy.json")},
    }
    script = dha if method == "dha" else joint
    alone = vars(script.parse_args(["--preset", "quick", "--seed", "5", *GIVEN.split()]))
    for name, part in args.parts.items():
        changed = {flag: value for flag, value in vars(part).items() if value != alone[flag]}
        assert changed == own[name] | {"out": str(tmp_path / "run" / name)}


@pytest.mark.parametrize("method", ["faa-darts", "darts", "dha"])
def test_parts_are_run_one_after_the_other_and_their_costs_add_up(method, tmp_path, monkeypatch):
    """What they share is theirs: here they only note that they were called, and leave files."""
    out, called = tmp_path / "run", []
    costs = {"epochs": 2, "search_epochs": 1, "seconds": 3.0, "search_seconds": 2.0, "gpu_hours": 0.5}

    def run(part, device):
        folder = Path(part.out)
        called.append(folder.name)
        handed = part.genotype if method == "dha" else part.policy
        assert handed in (None, "none") or Path(handed).exists()
        joint.save(folder / "result.json", {"test_accuracy": 90.0, "method": folder.name, **costs})
        joint.save(folder / "metrics.jsonl", [{"epoch": 1}])
        (folder / "genotype.json").write_text(folder.name)

    for module, name in ((dha, "dha"), (joint, "joint")):
        monkeypatch.setattr(module, f"run_{name}", run)
        monkeypatch.setattr(module, f"prepare_{name}", lambda args, device: (few_images(), None))
    monkeypatch.setattr(joint, "Figure", None)
    search = "--faa-epochs 1 --faa-images 8 --faa-batch-size 4".split() if method == "faa-darts" else []
    baseline.main(["--method", method, "--preset", "quick", "--gpu", "-1", "--out", str(out), *search])
    assert called == (["search", "train"] if method == "dha" else ["darts"])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    own = len(lines) - len(called)
    assert own == bool(search) == (out / "policy.json").exists()
    assert lines[own:] == [{"stage": name, "epoch": 1} for name in called]
    result = json.loads((out / "result.json").read_text())
    seconds = lines[0]["seconds"] if search else 0
    wanted = {name: len(called) * value for name, value in costs.items()}
    wanted |= {name: wanted[name] + own for name in ("epochs", "search_epochs")}
    wanted |= {name: wanted[name] + seconds for name in ("seconds", "search_seconds")}
    assert {name: result[name] for name in costs} == pytest.approx(wanted)
    assert result["test_accuracy"] == 90 and (out / "genotype.json").read_text() == called[-1]
    assert result["method"] == {"faa-darts": "Faster AA, then DARTS", "darts": "DARTS", "dha": "Sequential DHA"}[method]


# -------- --compare -----------------------------------------------------------------------------------------


def fake_run(folder: Path, script: ModuleType, command: str, accuracy: float, method: str = "DHA", **changes) -> str:
    """What --compare reads of a run with this command line."""
    args = script.parse_args([*command.split(), "--out", str(folder)])
    for part in (args, *vars(args).pop("parts", {}).values()):
        Path(part.out).mkdir(parents=True)
        joint.save(Path(part.out) / "config.json", {"args": vars(part)})
    result = {"test_accuracy": accuracy, "params": 3_300_000, "gpu_hours": 8.0, "search_seconds": 1800.0}
    result |= {"dataset": args.dataset, "seed": args.seed, "method": method}
    joint.save(folder / "result.json", result | changes)
    return str(folder)


def rows_of(table: str) -> list[list[str]]:
    head, line, *rows = table.splitlines()
    assert head.count("|") == line.count("|") == 9 and set(line) == set("| -")
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_compare_prints_mean_and_std(tmp_path):
    runs = [fake_run(tmp_path / "d", joint, "--policy none --dataset cifar100", 80.0, "DARTS")]
    for seed, accuracy in enumerate((97.0, 97.3, 97.9)):
        command = f"--method faa-darts --seed {seed}"
        runs.append(fake_run(tmp_path / f"b{seed}", baseline, command, accuracy, "Sequential"))
    std = math.sqrt(sum((a - 97.4) ** 2 for a in (97.0, 97.3, 97.9)) / 2)
    assert rows_of(baseline.compare(runs)) == [
        ["Sequential", "cifar10", "3", f"97.40 ± {std:.2f}", "3.3 M", "0.50", "8.00", ""],
        ["DARTS", "cifar100", "1", "80.00", "3.3 M", "0.50", "8.00", ""],
    ]


QUICK, FOLDER = "--preset quick", "--dataset folder"
SPLITS = [  # flags of two runs of one row, then of another row; the settings that are named
    (dha, f"{QUICK} --gpu 0", f"{QUICK} --lr 5e-2 --workers 2", f"{QUICK} --lr 0.01", "lr 0.05", "lr 0.01"),
    (dha, "--dataset shapes", "--dataset shapes --data-dir x", "--dataset shapes --lr 1e-2", "lr 0.025", "lr 0.01"),
    (dha, FOLDER, f"{FOLDER} --workers 1", f"{FOLDER} --data-dir dogs", "data_dir data", "data_dir dogs"),
    (joint, QUICK, f"{QUICK} --data-dir x", f"{QUICK} --policy none", "policy None", "policy none"),
    (baseline, "--method dha --gpu 0 --lr 0.01", "--method dha --gpu 1 --lr=1e-2", "--method dha",
     "lr 0.01", "lr 0.025"),
    (baseline, f"--method darts {FOLDER}", f"--method darts {FOLDER} --preset paper",
     f"--method darts {FOLDER} --data-dir dogs", "data_dir data", "data_dir dogs"),
    (baseline, "--method faa-darts", "--method faa-darts --workers 0", "--method faa-darts --penalty 1",
     "penalty 10.0", "penalty 1.0"),
    (baseline, "--method faa-darts", "--method faa-darts --gpu 1", "--method faa-darts --sub-policies 2",
     "sub_policies 10", "sub_policies 2"),
]  # fmt: skip


@pytest.mark.parametrize("script, one, same, other, first, second", SPLITS)
def test_compare_keeps_different_settings_apart_and_names_them(script, one, same, other, first, second, tmp_path):
    runs = [fake_run(tmp_path / "0", script, one, 90.0)]
    runs.append(fake_run(tmp_path / "1", script, f"{same} --seed 1", 92.0))
    runs.append(fake_run(tmp_path / "2", script, f"{other} --seed 2", 80.0))
    assert {row[3]: row[7] for row in rows_of(baseline.compare(runs))} == {"91.00 ± 1.41": first, "80.00": second}


def test_compare_counts_a_run_once(tmp_path, capsys):
    run, copy = (fake_run(tmp_path / name, dha, "--seed 1", accuracy) for name, accuracy in (("a", 90.0), ("b", 80.0)))
    several = [run, run, "a", str(tmp_path / "b" / ".." / "a")]
    assert [row[2:4] for row in rows_of(baseline.compare(several))] == [["1", "90.00"]]
    assert [row[2:4] for row in rows_of(baseline.compare([run, copy]))] == [["1", "85.00 ± 7.07"]]
    assert "has a seed more than once" in capsys.readouterr().out


def test_compare_keeps_amp_apart(tmp_path):
    runs = [fake_run(tmp_path / str(seed), dha, f"--seed {seed}", 90.0) for seed in (0, 1)]
    replace("config.json", '"amp": false', '"amp": true')(tmp_path / "1")
    assert [row[7] for row in rows_of(baseline.compare(runs))] == ["amp False", "amp True"]


def test_compare_takes_plain_darts_of_either_script_for_the_same(tmp_path):
    runs = [fake_run(tmp_path / "0", joint, f"{QUICK} --policy none", 90.0)]
    runs.append(fake_run(tmp_path / "1", baseline, f"{QUICK} --method darts --policy-lr 0.1 --seed 1", 92.0))
    assert [row[2:4] for row in rows_of(baseline.compare(runs))] == [["2", "91.00 ± 1.41"]]


def replace(name: str, old: str, new: str):
    return lambda run: (run / name).write_text((run / name).read_text().replace(old, new))


DAMAGE = {
    "no folder": shutil.rmtree,
    "a file": lambda run: (shutil.rmtree(run), run.write_text("a file")),
    "no result": lambda run: (run / "result.json").unlink(),
    "no config": lambda run: (run / "config.json").unlink(),
    "cut off": lambda run: (run / "result.json").write_text("{"),
    "a list": lambda run: (run / "result.json").write_text("[]"),
    "a search only": replace("result.json", "test_accuracy", "other"),
    "a word": replace("result.json", "90.0", '"high"'),
    "not a number": replace("result.json", "8.0", '"long"'),
    "not text": lambda run: (run / "result.json").write_bytes(b"\xff\0"),
    "no args": lambda run: (run / "config.json").write_text("{}"),
    "list of args": lambda run: (run / "config.json").write_text('{"args": []}'),
    "config a list": lambda run: (run / "config.json").write_text("[]"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_compare_leaves_out_what_is_no_finished_run(tmp_path, kind, capsys, one_line):
    """With a note. If nothing is left, that is an error."""
    run, other = (fake_run(tmp_path / name, dha, "", 90.0) for name in "ab")
    DAMAGE[kind](Path(run))
    assert call(baseline, "--compare", run, other) == 0
    note, *table = capsys.readouterr().out.splitlines()
    assert note.startswith(f"note: {run} is left out") and len(rows_of("\n".join(table))) == 1
    assert call(baseline, "--compare", run) == 2
    assert "no finished run" in one_line()


# -------- What the scripts share ----------------------------------------------------------------------------


def flags_of(script, monkeypatch):
    """The flags of a script: name -> argparse's action."""
    found, real = {}, argparse.ArgumentParser.parse_known_args

    def note(parser, *given):
        found.update({action.dest: action for action in parser._actions if action.option_strings})
        return real(parser, *given)

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", note)
        patch.setattr(baseline, "parts", lambda *args: {})  # which have flags of their own
        script.parse_args(["--method", "darts"] if script is baseline else [])
    del found["help"]
    return found


def kind(action):
    """What an action's `type` makes of some texts."""
    made = []
    for text in ("-1", "0", "1", "2", "7", "8", "0.5", "1e9", str(2**31), "nan", "~/x", "x"):
        try:
            made.append(repr(action.type(text)) if action.type else text)
        except (ValueError, argparse.ArgumentTypeError):
            made.append("error")
    return made


def test_a_flag_is_the_same_in_every_script_that_has_it(monkeypatch):
    of = [flags_of(script, monkeypatch) for script in SCRIPTS]
    names = [name for name in sorted(set().union(*of)) if sum(name in flags for flags in of) > 1]
    assert len(names) > 25
    for name in names:
        first, *others = [flags[name] for flags in of if name in flags]
        for other in others:
            for what in ("option_strings", "nargs", "const", "metavar", *(["choices"] if name != "preset" else [])):
                assert getattr(first, what) == getattr(other, what), (name, what)
            assert kind(first) == kind(other), name
    for flags in of:
        assert all(action.help for action in flags.values())


def test_the_first_flags_are_the_same_in_all_scripts_to_the_letter():
    groups = []
    for script in SCRIPTS:
        lines = inspect.getsource(script.parse_args).splitlines()
        first = next(i for i, line in enumerate(lines) if "what to run, on what" in line)
        groups.append(lines[first : lines.index("", first)])
    assert groups[0] == groups[1] and len(groups[0]) == 13
    assert len(set(groups[2]) & set(groups[0])) == len(groups[2]) - 2  # all but --method and --compare


LIBRARIES = "import torch, math, torch.nn as nn, torch.nn.functional as F; from torch import Tensor"
PASTED = {  # what is taken, its own imports, and a use in a few lines
    "ista": (
        dha,
        "soft_threshold active_set_step ista",
        "",
        """
A, b = torch.rand(3, 7, 14), torch.randn(3, 7)
alpha = ista(A, b, 1e-3)
slope = ((b - (A @ alpha.unsqueeze(2)).squeeze(2)).unsqueeze(1) @ A).squeeze(1)
assert alpha.shape == (3, 14) and (alpha == 0).any() and slope.abs().max() < 1.01e-3
""",
    ),
    "an augmentation": (
        joint,
        "into_range pixel_centers sample_at rotate",
        "",
        """
images = torch.rand(2, 3, 8, 8)
assert torch.allclose(rotate(images, torch.zeros(2)), images, atol=1e-5)
assert not torch.allclose(rotate(images, torch.ones(2)), images, atol=1e-1)
""",
    ),
    "hypergradient": (
        dha,
        "hypergradient",
        "",
        """
theta, v = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.5])
d_lr, d_wd = hypergradient([2 * theta], [v], [theta], 0.1)  # of the loss |theta|^2
assert d_lr == -3.0 and abs(float(d_wd) + 0.1 * (10 + 0.1 * 3)) < 1e-6
""",
    ),
    "the policy": (
        joint,
        "Policy relaxed_bernoulli augment apply_each",
        "AUGMENTATIONS",
        """
policy, images = Policy(2, 1), torch.rand(4, 3, 8, 8)
policy(images).sum().backward()
assert policy.z.grad.abs().sum() > 0 and augment(images, policy).shape == images.shape
""",
    ),
    "the mixed operation": (
        joint,
        "Beginnings rest_of_operation MixedOp",
        "common",
        """
x, alpha = torch.rand(2, 4, 8, 8), torch.zeros(8, requires_grad=True)
edge = MixedOp(4, 1)
out = edge(x, alpha)
out.square().sum().backward()
assert out.shape == x.shape and alpha.grad.abs().min() > 0
assert torch.allclose(edge(edge.begin(x), alpha), out)
""",
    ),
}


@pytest.mark.parametrize("name", PASTED)
def test_a_part_can_be_taken_out(name):
    """Into a module of its own, with nothing but PyTorch (MixedOp: and common.py)."""
    script, parts, more, use = PASTED[name]
    module, text = ModuleType("pasted"), [LIBRARIES]
    if more == "common":
        text.append("import common; from common import PRIMITIVES")
    if more == "AUGMENTATIONS":
        whole = inspect.getsource(joint)
        text.append(whole[whole.index("def per_image") : whole.index("def apply_each")])
    text += [inspect.getsource(getattr(script, part)) for part in parts.split()]
    exec("\n".join(text) + use, vars(module))
