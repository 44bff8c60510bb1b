"""baseline_sequential.py: network, penalty, steps, stages, comparison; and what the three scripts share."""

import argparse
import inspect
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

import baseline_sequential as baseline
import common
import dha
import joint_darts_faa as joint

CPU = torch.device("cpu")
SCRIPTS = {"dha.py": dha, "joint_darts_faa.py": joint, "baseline_sequential.py": baseline}


@pytest.fixture(autouse=True)
def seeded_on_one_thread():  # networks are tiny, and two threads beside other programs take 40 times as long
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small(*flags):
    start = "--method faa-darts --preset quick --gpu -1 --out no-such-run".split()
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


def test_gradient_penalty_of_a_quadratic_critic():
    """critic(x) = x^T A x / 2 has the gradient (A + A^T) x / 2: everything can be written out."""
    real, augmented = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64)
    share = torch.rand(4, dtype=torch.float64)
    A = torch.randn(12, 12, dtype=torch.float64, requires_grad=True)
    critic = lambda x: 0.5 * ((x.flatten(1) @ A) * x.flatten(1)).sum(1)
    between = share[:, None] * real.flatten(1) + (1 - share)[:, None] * augmented.flatten(1)
    expected = (((between @ (A + A.T) / 2).square().sum(1).sqrt() - 1) ** 2).mean()
    mine = baseline.gradient_penalty(critic, real, augmented, share)
    assert torch.allclose(mine, expected, rtol=1e-12)
    assert torch.allclose(*(torch.autograd.grad(v, A)[0] for v in (mine, expected)), rtol=1e-10)


def test_second_derivative_of_the_penalty_by_finite_differences():
    """Through the whole network, along a random direction."""
    net = baseline.WideResNet(3, 10, 1).double()
    real, augmented = torch.rand(2, 4, 3, 8, 8, dtype=torch.float64)
    share = torch.rand(4, dtype=torch.float64)
    params = [p for name, p in net.named_parameters() if not name.startswith("classifier")]
    penalty = lambda: baseline.gradient_penalty(lambda x: net(x)[1], real, augmented, share)
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
    s, (first, second) = baseline.PolicySearch(small(), data, CPU), halves(data)
    copy = lambda module: [p.detach().clone() for p in module.parameters()]
    changed = lambda module, old: [not torch.equal(p, q) for p, q in zip(module.parameters(), old)]
    net, policy = copy(s.net), copy(s.policy)
    baseline.critic_step(s, *first, second[0], small())
    assert not any(changed(s.policy, policy)) and all(p.grad is None for p in s.policy.parameters())
    assert sum(changed(s.net, net)) >= len(net) - 1  # the critic's last bias has no gradient
    net, grads = copy(s.net), [None if p.grad is None else p.grad.clone() for p in s.net.parameters()]
    baseline.policy_step(s, *second, small())
    assert all(changed(s.policy, policy)) and not any(changed(s.net, net))
    assert all(g is p.grad or torch.equal(g, p.grad) for g, p in zip(grads, s.net.parameters()))
    assert all(0 <= v.min() and v.max() <= 1 for v in (s.policy.p, s.policy.mu))


def test_steps_follow_the_written_out_losses():
    data, args = few_images(), small("--class-weight", 0.3, "--critic-weight", 0.7, "--penalty", 5)
    args.faa_lr = args.policy_lr = 0.0  # so that the parameters stay where the gradients were
    s, ((real, labels), (other, others)) = baseline.PolicySearch(args, data, CPU), halves(data)
    for group in (*s.net_optimizer.param_groups, *s.policy_optimizer.param_groups):
        assert group["betas"] == (0.0, 0.999)
    normal = lambda x: (x - s.mean.view(1, 3, 1, 1)) / s.std.view(1, 3, 1, 1)

    torch.manual_seed(7)
    measured = baseline.critic_step(s, real, labels, other, args).tolist()
    mine = [p.grad.clone() for p in s.net.parameters()]
    torch.manual_seed(7)
    with torch.no_grad():
        augmented = normal(s.policy(other))
    logits, value = s.net(normal(real))
    fake, t = s.net(augmented)[1], torch.rand(8).view(-1, 1, 1, 1)
    x = (t * normal(real) + (1 - t) * augmented).requires_grad_(True)
    (slope,) = torch.autograd.grad(s.net(x)[1].sum(), x, create_graph=True)
    penalty = ((slope.square().sum((1, 2, 3)).sqrt() - 1) ** 2).mean()
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
    logits, value = s.net(normal(s.policy(other)))
    class_loss = F.cross_entropy(logits, others)
    loss = -0.7 * value.mean() + 0.3 * class_loss
    for p, q in zip(mine, torch.autograd.grad(loss, list(s.policy.parameters()))):
        assert torch.allclose(p, q, atol=1e-6, rtol=1e-4)
    wanted = [-value.mean(), class_loss, 100 * (logits.argmax(1) == others).float().mean()]
    assert measured == pytest.approx([v.item() for v in wanted], abs=1e-5, rel=1e-4)


def test_search_goes_on_bit_for_bit(tmp_path):
    data, tables = few_images(), {}
    for name, stops in (("whole", [3]), ("cut", [1, 2, 3])):
        for epochs in stops:
            flags = "--faa-images 32 --faa-batch-size 16 --sub-policies 2 --faa-epochs".split()
            args = small(*flags, epochs)
            args.out = str(tmp_path / name)
            directory = baseline.RunDirectory(args, CPU)
            tables[name] = baseline.search_policy(args, data, CPU, directory).table()
            directory.log.close()
    assert tables["whole"] == tables["cut"]
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in tables]
    assert logs[0] == logs[1] and logs[0].count("\n") == 3
    last = json.loads(logs[0].splitlines()[-1])
    assert sum(last["selection"].values()) == pytest.approx(1, abs=1e-4)
    assert last.keys() >= set(baseline.MEASURED)


# -------- The stages ----------------------------------------------------------------------------------------

GIVEN = "--channels 6 --layers 3 --batch-size 4 --lr 0.03 --train-epochs 7 --search-epochs 2".split()
OWN = "--seed 5 --limit-train 30 --limit-test 20 --image-size 30 --workers 2 --data-dir elsewhere".split()


@pytest.mark.parametrize("method", ["faa-darts", "darts", "dha"])
def test_stages_get_the_flags_that_they_are_handed(method, tmp_path):
    flags = ["--method", method, "--preset", "quick", "--gpu", "0", "--amp", "--out", str(tmp_path / "run")]
    args = baseline.parse_args([*flags, *OWN, *GIVEN])
    assert args.rest == GIVEN
    commands = baseline.commands(args)
    assert list(commands) == (["search", "train"] if method == "dha" else ["darts"])
    for name, (script, *rest) in commands.items():
        assert Path(script).parent == Path(baseline.__file__).parent
        stage = SCRIPTS[Path(script).name].parse_args(rest)
        for flag in "preset dataset gpu amp seed limit_train limit_test image_size workers data_dir".split():
            assert getattr(stage, flag) == getattr(args, flag), flag
        assert (stage.channels, stage.layers, stage.batch_size, stage.lr) == (6, 3, 4, 0.03)
        assert stage.search_epochs == 2 and stage.out == str(tmp_path / "run" / name)
        assert stage.resume and not stage.check
        if method == "dha":
            assert (stage.no_da, stage.no_hpo) == (name == "search",) * 2
            genotype = str(tmp_path / "run" / "search" / "genotype.json")
            assert stage.genotype == (genotype if name == "train" else None)
            assert stage.train_epochs == (0 if name == "search" else 7)
        else:
            policy = "none" if method == "darts" else str(tmp_path / "run" / "policy.json")
            assert stage.policy == policy and stage.genotype is None and stage.train_epochs == 7


class Stages:
    """`subprocess` for a baseline: notes the commands, of which the one with `failing` in it ends with 2."""

    def __init__(self, monkeypatch, failing="nothing"):
        self.commands, self.failing = [], failing
        self.CalledProcessError = subprocess.CalledProcessError
        monkeypatch.setattr(baseline, "subprocess", self)

    def run(self, command, capture_output=False, **kwargs):
        if command[0] == "git":
            return subprocess.CompletedProcess(command, 0, "", "")
        assert kwargs == {"check": True}
        self.commands.append(command)
        if self.failing in command:
            raise subprocess.CalledProcessError(2, command)
        if "--check" not in command:
            out = Path(command[command.index("--out") + 1])
            out.mkdir(parents=True)
            result = {"test_accuracy": 90.0, "method": out.name, "seed": 0, **COSTS}
            (out / "result.json").write_text(json.dumps(result))
            (out / "metrics.jsonl").write_text('{"epoch": 1}\n')
            (out / "genotype.json").write_text(out.name)


COSTS = {"epochs": 2, "search_epochs": 1, "seconds": 3.0, "search_seconds": 2.0, "gpu_hours": 0.5}


def sequential(tmp_path, *flags):
    """Sequential DHA: what its process would end with, None for a good end."""
    try:
        baseline.main(["--method", "dha", "--preset", "quick", "--gpu", "-1", "--out", str(tmp_path / "run"), *flags])
    except SystemExit as end:
        return end.code


def test_all_stages_check_their_flags_before_the_first_one_starts(tmp_path, monkeypatch):
    stages = Stages(monkeypatch, "--unknown")
    assert sequential(tmp_path, "--unknown", "3") == 2
    assert len(stages.commands) == 1 and "--check" in stages.commands[0]
    assert not (tmp_path / "run").exists()
    stages = Stages(monkeypatch)
    assert sequential(tmp_path, "--check") is None
    assert [command[-1] for command in stages.commands] == ["--check"] * 2 and not (tmp_path / "run").exists()


def test_stages_run_one_after_the_other_and_their_costs_add_up(tmp_path, monkeypatch):
    stages = Stages(monkeypatch)
    assert sequential(tmp_path, "--processes", "3") is None
    out = tmp_path / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    assert [command[:6] for command in stages.commands] == [[*launcher, dha.__file__]] * 4  # two of them are checks
    assert [command[-1] for command in stages.commands[:2]] == ["--check"] * 2
    result = json.loads((out / "result.json").read_text())
    assert result["method"] == "Sequential DHA" and result["test_accuracy"] == 90
    assert {name: result[name] for name in COSTS} == {name: 2 * value for name, value in COSTS.items()}
    assert (out / "genotype.json").read_text() == "train"
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"stage": "search", "epoch": 1}, {"stage": "train", "epoch": 1}]


BAD = ["--policy none", "--policy=none", "--search-only", "--faa-batch-size 5", "--depth 11"]


@pytest.mark.parametrize("flags", BAD)
def test_flags_that_no_baseline_can_have(flags, capsys):
    with pytest.raises(SystemExit) as end:
        small(*flags.split())
    assert end.value.code == 2 and "error: " in capsys.readouterr().err.splitlines()[-1]


# -------- --compare -----------------------------------------------------------------------------------------

def fake_run(folder: Path, script: str, command: str, accuracy: float, method: str = "DHA", **changes) -> str:
    args = vars(SCRIPTS[script].parse_args([*command.split(), "--out", str(folder)]))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"script": script, "args": args}))
    result = {"test_accuracy": accuracy, "params": 3_300_000, "gpu_hours": 8.0, "search_seconds": 1800.0}
    result |= {"dataset": args["dataset"], "seed": args["seed"], "method": method}
    (folder / "result.json").write_text(json.dumps(result | changes))
    return str(folder)


def rows_of(table: str) -> list[list[str]]:
    head, line, *rows = table.splitlines()
    assert head.count("|") == line.count("|") == 9 and set(line) == set("| -")
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_compare_prints_mean_and_std(tmp_path):
    runs = [fake_run(tmp_path / "d", "joint_darts_faa.py", "--policy none --dataset cifar100", 80.0, "DARTS")]
    for seed, accuracy in enumerate((97.0, 97.3, 97.9)):
        command = f"--method faa-darts --seed {seed}"
        runs.append(fake_run(tmp_path / f"b{seed}", "baseline_sequential.py", command, accuracy, "Sequential"))
    std = math.sqrt(sum((a - 97.4) ** 2 for a in (97.0, 97.3, 97.9)) / 2)
    assert rows_of(baseline.compare(runs)) == [
        ["Sequential", "cifar10", "3", f"97.40 ± {std:.2f}", "3.3 M", "0.50", "8.00", ""],
        ["DARTS", "cifar100", "1", "80.00", "3.3 M", "0.50", "8.00", ""],
    ]


def test_compare_keeps_different_settings_apart_and_names_them(tmp_path):
    runs = [
        fake_run(tmp_path / "a", "dha.py", "--seed 1", 90.0),
        fake_run(tmp_path / "b", "dha.py", "--seed 2 --gpu 0 --workers 2 --data-dir elsewhere", 92.0),
        fake_run(tmp_path / "c", "dha.py", "--seed 3 --channels 18 --lr 0.05", 80.0),
        fake_run(tmp_path / "d", "dha.py", "--dataset folder --data-dir cats", 70.0),
        fake_run(tmp_path / "e", "dha.py", "--dataset folder --data-dir dogs --seed 1", 50.0),
    ]
    rows = {(row[1], row[2], row[3]): row[7] for row in rows_of(baseline.compare(runs))}
    assert rows == {
        ("cifar10", "2", "91.00 ± 1.41"): "channels 36, lr 0.025",
        ("cifar10", "1", "80.00"): "channels 18, lr 0.05",
        ("folder", "1", "70.00"): "data_dir cats",
        ("folder", "1", "50.00"): "data_dir dogs",
    }


def test_compare_counts_a_run_once_and_passes_over_the_unfinished(tmp_path, capsys, monkeypatch):
    run = fake_run(tmp_path / "a", "dha.py", "--seed 1", 90.0)
    fake_run(tmp_path / "b", "dha.py", "--seed 1", 80.0)
    (Path(fake_run(tmp_path / "c", "dha.py", "--seed 3", 10.0)) / "result.json").unlink()
    search = Path(fake_run(tmp_path / "s", "dha.py", "--train-epochs 0", 0.0))
    result = json.loads((search / "result.json").read_text())
    del result["test_accuracy"]
    (search / "result.json").write_text(json.dumps(result))
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    several = [run, run, "a", str(tmp_path / "b" / ".." / "a"), "c", "empty", "s"]
    assert [row[2:4] for row in rows_of(baseline.compare(several))] == [["1", "90.00"]]
    said = capsys.readouterr().out
    assert "s was a search only" in said and "c is not a finished run" in said and "empty is not a finished run" in said
    assert [row[2:4] for row in rows_of(baseline.compare(["a", "b"]))] == [["2", "85.00 ± 7.07"]]


DAMAGE = {
    "no folder": lambda run: shutil.rmtree(run),
    "a file": lambda run: (shutil.rmtree(run), run.write_text("a file")),
    "no result": lambda run: (run / "result.json").unlink(),
    "cut off": lambda run: (run / "result.json").write_text("{"),
    "a list": lambda run: (run / "result.json").write_text("[]"),
    "a word": lambda run: (run / "result.json").write_text('{"test_accuracy": "high"}'),
    "not a number": lambda run: (run / "result.json").write_text(
        (run / "result.json").read_text().replace("8.0", '"long"')),
    "no args": lambda run: (run / "config.json").write_text("{}"),
    "list of args": lambda run: (run / "config.json").write_text('{"args": []}'),
    "config a list": lambda run: (run / "config.json").write_text("[]"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_compare_says_what_is_wrong(tmp_path, kind):
    run = fake_run(tmp_path / "a", "dha.py", "--seed 1", 90.0)
    DAMAGE[kind](Path(run))
    with pytest.raises(common.InputError) as error:
        baseline.compare([run])
    assert "\n" not in str(error.value)


# -------- What the scripts share ----------------------------------------------------------------------------

def test_policies_are_interchangeable(tmp_path):
    policy = baseline.Policy(4, 3)
    baseline.save(tmp_path / "policy.json", policy.table())
    again = joint.load_policy(tmp_path / "policy.json")
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), again.parameters(), strict=True))
    assert list(baseline.AUGMENTATIONS) == list(joint.AUGMENTATIONS)


def flags_of(script, monkeypatch):
    """The flags of a script: name -> argparse's action."""
    found, real = {}, argparse.ArgumentParser.parse_known_args

    def note(parser, *given):
        found.update({action.dest: action for action in parser._actions if action.option_strings})
        return real(parser, *given)

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", note)
        script.parse_args(["--out", "no-such-run"] + ["--method", "darts"] * (script is baseline))
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
    of = [flags_of(script, monkeypatch) for script in SCRIPTS.values()]
    everywhere = set(of[0]) & set(of[1]) & set(of[2])
    assert len(everywhere) == 14
    names = [name for name in sorted(set().union(*of)) if sum(name in flags for flags in of) > 1]
    assert len(names) > 30
    for name in names:
        first, *others = [flags[name] for flags in of if name in flags]
        for other in others:
            for what in ("option_strings", "nargs", "const", "choices", "metavar"):
                assert getattr(first, what) == getattr(other, what), (name, what)
            assert kind(first) == kind(other), name
            if name in everywhere:
                assert (first.default, first.help) == (other.default, other.help), name
    for flags in of:
        assert all(action.help for action in flags.values())


def test_the_first_flags_are_the_same_in_all_scripts_to_the_letter():
    groups = []
    for script in SCRIPTS.values():
        lines = inspect.getsource(script.parse_args).splitlines()
        first = next(i for i, line in enumerate(lines) if "what to run, on what" in line)
        groups.append(lines[first : lines.index("", first)])
    assert groups[0] == groups[1] == groups[2] and len(groups[0]) == 15


LIBRARIES = "import torch, math, torch.nn as nn, torch.nn.functional as F; from torch import Tensor"
PASTED = {  # what is taken, its own imports, and a use in a few lines
    "ista": (dha, "soft_threshold active_set_step ista", "", """
A, b = torch.rand(3, 7, 14), torch.randn(3, 7)
alpha = ista(A, b, 1e-3)
slope = ((b - (A @ alpha.unsqueeze(2)).squeeze(2)).unsqueeze(1) @ A).squeeze(1)
assert alpha.shape == (3, 14) and (alpha == 0).any() and slope.abs().max() < 1.01e-3
"""),
    "an augmentation": (joint, "into_range pixel_centers sample_at rotate", "", """
images = torch.rand(2, 3, 8, 8)
assert torch.allclose(rotate(images, torch.zeros(2)), images, atol=1e-5)
assert not torch.allclose(rotate(images, torch.ones(2)), images, atol=1e-1)
"""),
    "hypergradient": (dha, "hypergradient", "", """
theta, v = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.5])
d_lr, d_wd = hypergradient([2 * theta], [v], [theta], 0.1)  # of the loss |theta|^2
assert d_lr == -3.0 and abs(float(d_wd) + 0.1 * (10 + 0.1 * 3)) < 1e-6
"""),
    "the policy": (joint, "Policy relaxed_bernoulli augment apply_each", "AUGMENTATIONS", """
policy, images = Policy(2, 1), torch.rand(4, 3, 8, 8)
policy(images).sum().backward()
assert policy.z.grad.abs().sum() > 0 and augment(images, policy).shape == images.shape
"""),
    "the mixed operation": (joint, "State Shared candidate MixedOp", "common", """
x, alpha = torch.rand(2, 4, 8, 8), torch.zeros(8, requires_grad=True)
edge = MixedOp(4, 1)
out = edge(x, alpha.softmax(0))
out.square().sum().backward()
assert out.shape == x.shape and alpha.grad.abs().min() > 0
assert torch.allclose(edge(State(x), alpha.softmax(0)), out)
"""),
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
