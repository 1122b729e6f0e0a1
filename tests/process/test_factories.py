"""Code that a config names: what exits, is none, or gives what a run cannot take, is one line, and nothing is written."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from runs import digits
from torch import nn
from torch.utils.data import TensorDataset

from largebatch.cli import main
from largebatch.errors import UserError
from largebatch.planner.resolve import resolve
from largebatch.scaling.plan import Plan
from largebatch.scaling.rules import Reference
from largebatch.task import Task
from largebatch.training.run import train

INPUTS = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))


def data(kind="classification", targets="classes", outputs=5):
    values = {
        "classes": torch.arange(64) % outputs,
        "soft": torch.rand(64, outputs),
        "map": torch.zeros(64, 4, 4, dtype=torch.int64),
    }
    half = TensorDataset(INPUTS, values[targets])
    return half, half, Task(kind, (8,), outputs)


def words():
    half = [(INPUTS[i], "cat") for i in range(64)]
    return half, half, Task("classification", (8,), 5)


def ragged():
    half = [(torch.zeros(8 + i % 2), 1) for i in range(64)]
    return half, half, Task("classification", (8,), 5)


def drawn():
    half = [(object(), 1)] * 64
    return half, half, Task("classification", (8,), 5)


def far(sample):
    half = [(INPUTS[i], 7 if i == sample else 1) for i in range(64)]
    return half, half, Task("classification", (8,), 5)


def exits():
    sys.exit(0)


def exits_at(sample):
    class Exiting:
        def __len__(self):
            return 64

        def __getitem__(self, index):
            return (INPUTS[index], 1) if index != sample else sys.exit(0)

    return Exiting(), Exiting(), Task("classification", (8,), 5)


class Exiting(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 5)

    def forward(self, inputs):
        return self.layer(inputs) if not self.training else sys.exit(0)


def without_values(sparse):
    inputs = torch.eye(64, 8).to_sparse() if sparse else torch.empty(64, 8, device="meta")
    half = TensorDataset(inputs, torch.arange(64) % 5)
    return half, half, Task("classification", (8,), 5)


def tokens(token, stacked=True):
    inputs = torch.ones(64, 8, dtype=torch.int64)
    inputs[5, 3] = token
    half = TensorDataset(inputs, inputs * 0) if stacked else [(row, row * 0) for row in inputs]
    return half, half, Task("language_modeling", (8,), 5)


LEFT_BEHIND = {
    "standard output closed": lambda: sys.stdout.close(),
    "standard output detached": lambda: sys.stdout.detach(),
    "standard output in another wrapper": lambda: setattr(sys, "stdout", io.TextIOWrapper(sys.stdout.detach())),
    "standard output gone": lambda: setattr(sys, "stdout", None),
    "standard output elsewhere": lambda: setattr(sys, "stdout", io.StringIO()),
    "standard error closed": lambda: sys.stderr.close(),
    "descriptors closed": lambda: (os.close(1), os.close(2)),
    "another folder": lambda: os.chdir("/"),
    "a default device without values": lambda: torch.set_default_device("meta"),
}


def data_leaving(what):
    made = data()
    LEFT_BEHIND[what]()
    return made


def model_leaving(what):
    layer = nn.Linear(8, 5)
    LEFT_BEHIND[what]()
    return layer


MODULES = {
    "quits": "import sys; sys.exit(0)",
    "wrong": "def f(:",
    "fails": "raise KeyError(3)",
    "number": "factory = 5",
}
EXITS = "exits .code 0. where it should return"
CASES = {
    "model quits:f": r"model.name: cannot import 'quits': it exits \(code 0\)",
    "data quits:f": r"data.name: cannot import 'quits': it exits",
    "model wrong:f": r"model.name: cannot import 'wrong': SyntaxError: invalid syntax \(wrong.py, line 1\)",
    "model fails:f": r"model.name: cannot import 'fails': KeyError: 3 \(.*fails.py, line 1\)",
    "model number:factory": r"module 'number' has no callable 'factory'$",
    "model .foo:bar": r"model.name: '.foo' is no name of a module; expected package.module:factory",
    "data ..:x": r"data.name: '..' is no name of a module",
    "model builtins:type": r"'builtins:type' does not say what arguments it takes; name a function written in Python",
    "data builtins:dict": r"data.name: 'builtins:dict' does not say",
    "model builtins:print": r"should return a torch.nn.Module, it returned a NoneType",
    "model test_factories:exits": EXITS,
    "data test_factories:exits": EXITS,
    "data test_factories:exits_at {sample: 0}": r"data: the data set's own code called sys.exit\(0\) for a sample",
    "data test_factories:words": r"data: the targets of 2 samples should be a tensor \(2, ...\), they are a tuple",
    "data test_factories:drawn": r"data.name: samples of list cannot be stacked to a batch: .*found <class 'object'>",
    "data test_factories:without_values {sparse: false}": "the inputs of 64 samples are a meta tensor; expected one that",
    "data test_factories:without_values {sparse: true}": "the inputs of 64 samples are a sparse_coo tensor",
    "data test_factories:tokens {token: 5}": r"the input of sample 5 holds the token 5, where the task has 5 tokens",
    "data test_factories:far {sample: 63}": r"data: the target of sample 63 is 7, where the task has 5 classes: expected",
    "data test_factories:data {targets: soft}": r"takes targets \(n,\).*those of 64 are \[64, 5\] of float32",
    "data test_factories:data {targets: map}": r"takes targets \(n,\).*those of 64 are \[64, 4, 4\] of int64",
    "data test_factories:data {outputs: 1}": r"has 2 classes or more, got 1",
}


def command(tmp_path, monkeypatch, capsys, *flags):
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    config = tmp_path / "run.yaml"
    config.write_text(digits().to_yaml())
    code = main(["train", str(config), "--out", str(tmp_path / "out"), *flags])
    said = capsys.readouterr().err.strip()
    assert said.startswith("largebatch: error: ") and "\n" not in said, said
    return code, said


@pytest.mark.parametrize("case", CASES)
def test_what_is_no_factory_is_one_line(case, tmp_path, monkeypatch, capsys):
    section, path, *options = case.split(" ", 2)
    value = f"{{name: {path}, options: {options[0] if options else {}}}}"
    code, said = command(tmp_path, monkeypatch, capsys, f"--{section}", value, "--batch.size", "32")
    assert code == 2 and re.search(CASES[case], said), said
    assert not (tmp_path / "out").exists()


IN_MID_RUN = {
    "data that exit": ("{name: test_factories:exits_at, options: {sample: 5}}", "mlp", r"called sys\.exit\(0\) for a sample"),
    "a model that exits": ("{name: test_factories:data}", "test_factories:Exiting", r"exits \(code 0\) where it should"),
    "inputs of other sizes": ("{name: test_factories:ragged}", "mlp", "cannot be stacked to a batch: stack expects each"),
    "a token that is none": (
        "{name: test_factories:tokens, options: {token: 99, stacked: false}}",
        "gpt",
        r"input of sample 5 holds the token 99, where the task has 5 tokens: expected 0 to 4",
    ),
    "a class that is none": ("{name: test_factories:far, options: {sample: 5}}", "mlp", "target of sample 5 is 7, .* 5 classes"),
}  # fmt: skip


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("case", IN_MID_RUN)
def test_code_that_fails_in_mid_run_is_one_line(case, workers, tmp_path, monkeypatch, capsys):
    data, model, line = IN_MID_RUN[case]
    flags = ["--data", data, "--model.name", model, "--loader.num_workers", str(workers), "--batch.size", "32"]
    code, said = command(tmp_path, monkeypatch, capsys, *flags)
    assert code == 2 and re.search(line, said), said


class Returning(nn.Module):
    """A model whose outputs are made of a layer's by a function of it and them."""

    def __init__(self, of):
        super().__init__()
        self.layer, self.of = nn.Linear(64, 10), of

    def forward(self, x):
        return self.of(self, self.layer(x.flatten(1)))


def replaced(model, outputs):
    model.layer = nn.Linear(64, 10).to(outputs)
    return model.layer(outputs.new_zeros(len(outputs), 64))


RETURNED = {
    "a tuple": (
        lambda _, outputs: (outputs,),
        r"one tensor of floating-point outputs, the model returned tuple; let it",
    ),
    "a dict": (lambda _, outputs: {"logits": outputs}, "the model returned dict"),
    "nothing": (lambda *_: None, "the model returned NoneType"),
    "complex numbers": (lambda _, outputs: outputs * 1j, "the model returned complex128"),
    "whole numbers": (lambda _, outputs: outputs.long(), "the model returned int64"),
    "detached outputs": (lambda _, outputs: outputs.detach(), "no gradient with respect to any parameter"),
    "outputs of another layer": (replaced, "no parameter that the optimizer trains has a gradient"),
}


def returning(what):
    return Returning(RETURNED[what][0])


def switched_off():
    torch.set_grad_enabled(False)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def of_inference():
    with torch.inference_mode():
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


@pytest.mark.parametrize("what", RETURNED)
def test_outputs_that_are_none_are_one_line(what, tmp_path, monkeypatch, capsys):
    model = f"{{name: test_factories:returning, options: {{what: {what}}}}}"
    code, said = command(tmp_path, monkeypatch, capsys, "--model", model)
    assert code == 2 and re.search(RETURNED[what][1], said), said


@pytest.mark.parametrize(
    ("model", "line"), [("switched_off", "set_grad_enabled"), ("of_inference", "under torch.inference_mode")]
)
def test_a_model_that_cannot_learn_is_one_line(model, line, tmp_path, monkeypatch, capsys):
    with torch.enable_grad():  # what the factory switches off is on again behind it
        code, said = command(tmp_path, monkeypatch, capsys, "--model", f"{{name: test_factories:{model}}}")
    assert code == 2 and line in said, said


# --- batch norms left as they are -----------------------------------------------------------------------------------


def flat(task):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, task.num_outputs))


def wide(task):
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, task.num_outputs))


ONE = {"batch.size": 479, "schedule.epochs": 1}  # 1,438 samples: the last update has 1
SINGLE = {
    "the last update of the run": (ONE, 1, 1),
    "a micro-batch": ({"batch.micro_size": 199}, 1, 200),
    "a rank's part": ({"batch.size": 287, "schedule.epochs": 1}, 2, 3),
    "every update": ({"batch.size": 2, "schedule.epochs": 1}, 2, 2),
    "the last update of an epoch": (ONE | {"batch.at_epoch_end": "cut", "schedule.epochs": 3}, 1, 1),
}


@pytest.mark.parametrize("case", SINGLE)
def test_a_batch_norm_that_would_meet_one_sample_is_refused_before_the_run(case):
    from largebatch.planner.checks import check_single_samples

    flags, world_size, size = SINGLE[case]
    task = Task("classification", (1, 8, 8), 10)
    for name, group, refused in (("flat", None, True), ("wide", None, False), ("flat", 32, False)):
        model = {"model.name": f"test_factories:{name}", "model.norm_group_size": group}
        run = digits(**model, **flags)
        if group is not None and case != "every update":
            run = run.model_copy(update={"batch": run.batch.model_copy(update={"size": 192, "micro_size": None})})
        if group is not None and case == "every update":
            continue
        resolved = resolve(run, 1438, world_size, group or 1)
        if not refused:
            check_single_samples(resolved, task)
            continue
        with pytest.raises(
            UserError, match=rf"model.norm_group_size: null .* an update of {size} samples has one of a single"
        ):
            check_single_samples(resolved, task)


def test_it_is_refused_by_the_run_and_would_have_failed(tmp_path, monkeypatch):
    from largebatch.training import run as run_module

    run = digits(**{"model.name": "test_factories:flat", "model.norm_group_size": None}, **ONE)
    with pytest.raises(UserError, match="norm_group_size: null"):
        train(run, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(run_module, "check_single_samples", lambda *_: None)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        train(run, tmp_path / "run")


@pytest.mark.parametrize("at_epoch_end", ["carry", "cut"])
@pytest.mark.parametrize(
    ("num_train", "size", "epochs"), [(100, 7, 3), (100, 10, 2.5), (101, 50, 1), (64, 64, 1.3), (9, 4, 2)]
)
def test_the_batch_sizes_of_a_plan_are_those_of_its_updates(at_epoch_end, num_train, size, epochs):
    plan = Plan(Reference(size, 0.1), size, round(epochs * num_train), num_train, at_epoch_end=at_epoch_end)
    assert plan.batch_sizes() == {size for _, size in plan.updates()}


# --- what code of one's own leaves behind ---------------------------------------------------------------------------


def in_a_process_of_its_own(code, folder):
    """Run code whose streams are those of a process; return what it printed, a line each."""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    variables = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=variables, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done
    return done.stdout.splitlines()


LEAVING = """
import os, sys, torch
from largebatch.process.output import outlive_output
from largebatch.process.own_code import process_kept
from test_factories import LEFT_BEHIND
outlive_output()
folder = os.getcwd()
for what, leave in LEFT_BEHIND.items():
    with process_kept():
        leave()
    print(what, os.getcwd() == folder, torch.empty(1).device)
    print(what, file=sys.stderr)
"""


def test_what_code_of_ones_own_leaves_behind_is_put_back(tmp_path):
    assert in_a_process_of_its_own(LEAVING, tmp_path) == [f"{what} True cpu" for what in LEFT_BEHIND]


def test_a_run_goes_on_behind_a_factory_that_leaves_things_behind(tmp_path):
    config = {
        "data": {"name": "test_factories:data_leaving", "options": {"what": "standard output detached"}},
        "model": {
            "name": "test_factories:model_leaving",
            "options": {"what": "a default device without values"},
        },
        "batch": {"reference_size": 8, "size": 32},
        "optimizer": {"name": "adamw", "lr": 0.01},
        "schedule": {"name": "constant", "epochs": 1},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    code = "from largebatch.cli import main; assert main(['train', 'run.yaml', '--out', 'run']) == 0"
    assert any("finished" in line for line in in_a_process_of_its_own(code, tmp_path))
