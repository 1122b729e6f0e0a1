"""What a task takes, what would broadcast to another loss, ignored targets, and losses of one's own."""

import math
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file
from torch import nn

from largebatch.config.file import parse_config
from largebatch.data.sampler import global_batch
from largebatch.distributed import Ranks
from largebatch.errors import UserError
from largebatch.reporting.loggers import read_metrics
from largebatch.task import Task
from largebatch.training.run import build_model, train

N = 4
REGRESSION, CLASSES, TOKENS = (
    Task("regression", (3,), 1),
    Task("classification", (3,), 5),
    Task("language_modeling", (6,), 5),
)


@pytest.mark.parametrize(
    ("outputs", "targets"), [((N, 1), (N,)), ((N,), (N, 1)), ((N,), (N,)), ((N, 2), (N, 2)), ((N, 2, 3), (N, 2, 3))]
)
def test_a_regression(outputs, targets):
    y, t = torch.randn(outputs), torch.randn(targets)
    losses = REGRESSION.losses(y, t)
    expected = (y.reshape(N, -1) - t.reshape(N, -1)).square().mean(1)
    assert losses.shape == (N,)
    torch.testing.assert_close(losses, expected)


REFUSED = [
    (REGRESSION, (N, N), (N,), torch.float32),
    (REGRESSION, (N, 2), (N,), torch.float32),
    (REGRESSION, (N, 2), (N, 1), torch.float32),
    (REGRESSION, (N, 1), (N, 3), torch.float32),
    (REGRESSION, (N, 2, 3), (N, 3), torch.float32),
    (CLASSES, (N, 5, 8, 8), (N, 8, 8), torch.int64),
    (CLASSES, (N, 5), (N, 5), torch.float32),
    (CLASSES, (N, 5), (N, 1), torch.int64),
    (CLASSES, (N,), (N,), torch.int64),
    (CLASSES, (N, 5), (N,), torch.float32),
    (TOKENS, (N, 6), (N, 6), torch.int64),
    (TOKENS, (N, 6, 5), (N,), torch.int64),
    (TOKENS, (N, 5, 6), (N, 6), torch.int64),
]


@pytest.mark.parametrize(("task", "outputs", "targets", "dtype"), REFUSED)
def test_shapes_that_would_broadcast_are_refused(task, outputs, targets, dtype):
    with pytest.raises(UserError, match=rf"a task of {task.kind} takes .* outputs are \[4.*targets \[4"):
        task.losses(torch.randn(outputs), torch.zeros(targets, dtype=dtype))


@pytest.mark.parametrize("wrong", [5, 99, -1])
def test_a_class_that_is_none_is_named(wrong):
    with pytest.raises(UserError, match=f"a target is {wrong}, where the model has 5 outputs: expected 0 to 4"):
        CLASSES.losses(torch.randn(N, 5), torch.tensor([0, 1, wrong, 2]))


def test_ignored_tokens_are_neither_learnt_nor_wrong():
    """Two valid tokens of six: their mean, not a sixth of their sum."""
    outputs, targets = torch.randn(N, 6, 5, dtype=torch.float64), torch.randint(0, 5, (N, 6))
    targets[0, 2:], targets[1, ::2], targets[3] = -100, -100, -100
    losses, right = TOKENS.losses(outputs, targets), 0.0
    for sample in range(N):
        known = targets[sample] != -100
        if not known.any():
            assert losses[sample] == 0
            continue
        torch.testing.assert_close(losses[sample], F.cross_entropy(outputs[sample], targets[sample], ignore_index=-100))
        right += float((outputs[sample].argmax(-1) == targets[sample])[known].double().mean())
    assert TOKENS.num_correct(outputs, targets).item() == pytest.approx(right, rel=1e-14)
    assert TOKENS.known(targets).tolist() == [True, True, True, False]


def test_a_perfect_model_is_perfect_where_labels_are_ignored():
    targets = torch.tensor([0, -100, 3, -100])
    outputs = 1e3 * F.one_hot(targets.clamp(min=0), 5).double()
    assert CLASSES.num_correct(outputs, targets) / CLASSES.known(targets).sum() == 1.0
    assert torch.equal(CLASSES.losses(outputs, targets), torch.zeros(N, dtype=torch.float64))


@pytest.mark.parametrize("targets", [torch.rand(N, 5).softmax(1), torch.zeros(N, 1, dtype=torch.int64)])
def test_soft_labels_are_refused_by_the_accuracy_too(targets):
    with pytest.raises(UserError, match="a task of classification takes"):
        CLASSES.num_correct(torch.randn(N, 5), targets)


@pytest.mark.parametrize(
    "returned", [lambda n: torch.zeros(()), lambda n: torch.zeros(n, 1), lambda n: torch.zeros(n, 8, 8), lambda n: 1.0]
)
def test_an_own_loss_is_one_number_a_sample(returned):
    own = Task("classification", (3,), 5, loss=lambda o, t: returned(len(t)), correct=lambda o, t: returned(len(t)))
    for function in (own.losses, own.num_correct):
        with pytest.raises(UserError, match=r"has to return a tensor of shape \[4\], one number a sample; it returned"):
            function(torch.randn(N, 5), torch.zeros(N, dtype=torch.int64))
    assert not Task("classification", (3,), 5, loss=own.loss).has_accuracy


def test_the_segmentation_of_the_documents_trains_to_its_own_loss(tmp_path, monkeypatch):
    """One epoch of two updates, and the validation set, against the same by hand."""
    text = (Path(__file__).parent.parent / "docs" / "data.md").read_text()
    code, config = re.search(r"```python\n(.*?)```", text, re.S)[1], re.search(r"```yaml\n(.*?)```", text, re.S)[1]
    (tmp_path / "segmentation.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    values = yaml.safe_load(config) | {
        "precision": "fp64",
        "optimizer": {"name": "sgd", "lr": 0.1},
        "log": {"every_updates": 1},
    }
    run = parse_config(values | {"schedule": {"name": "constant", "epochs": 1}})
    result = train(run, tmp_path / "run")

    train_set, val_set, task = sys.modules["segmentation"].data()
    torch.manual_seed(run.seed)
    model = sys.modules["segmentation"].model(task).double()
    for number in range(2):
        rows = torch.from_numpy(global_batch(run.seed, len(train_set), 32 * number, 32).indices)
        images, classes = (part[rows] for part in train_set.tensors)
        loss = F.cross_entropy(model(images.double()), classes)
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * 32 / 8 * parameter.grad
    for name, tensor in load_file(result.folder / "model.safetensors").items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=1e-12, atol=1e-14)
    images, classes = val_set.tensors
    outputs = model(images.double()).detach()
    assert result.summary.val_loss == pytest.approx(float(F.cross_entropy(outputs, classes)), rel=1e-12)
    assert result.summary.val_accuracy == pytest.approx(
        float((outputs.argmax(1) == classes).double().mean()), rel=1e-12
    )


def test_a_kind_that_there_is_not_is_named():
    with pytest.raises(UserError, match=r"kind is 'clasification' .did you mean 'classification'"):
        Task("clasification", (3,), 5)


@pytest.mark.parametrize("value", [7.0, -0.1, math.nan])
def test_an_own_score_lies_between_0_and_1(value):
    own = Task("classification", (3,), 5, loss=lambda o, t: o.sum(1), correct=lambda o, t: torch.full((len(t),), value))
    with pytest.raises(UserError, match="correct has to return numbers from 0 to 1"):
        own.num_correct(torch.randn(N, 5), torch.zeros(N))


@pytest.mark.parametrize("loss", [lambda o, t: o.sum(1).detach(), lambda o, t: o.argmax(1)])
def test_an_own_loss_has_a_gradient(loss):
    with pytest.raises(UserError, match="differentiable"):
        Task("classification", (3,), 5, loss=loss).losses(torch.randn(N, 5, requires_grad=True), torch.zeros(N))


DATA = """
import torch
from torch.utils.data import TensorDataset
from largebatch.task import Task

def data(ignored="half"):
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(96, 6, generator=draw), torch.randint(0, 5, (96,), generator=draw)
    if ignored == "half":
        y[:64:2] = -100
    elif ignored == "all":
        y[:64] = -100
    return TensorDataset(x[:64], y[:64]), TensorDataset(x[64:], y[64:]), Task("classification", (6,), 5)

def likelihoods(outputs, targets):
    return -outputs.gather(1, targets[:, None]).squeeze(1)

def own():
    train, val, _ = data("none")
    return train, val, Task("classification", (6,), 5, loss=likelihoods)

class Ways(torch.nn.Module):
    # A second way makes something else of the samples without a target.
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(6, 5), torch.nn.Linear(6, 5)
    def forward(self, x):
        far = x[:, 0] > 1
        out = self.first(x)
        return torch.where(far[:, None], self.second(x), out) if bool(far.any()) else out

def ways():
    return Ways()

def far_ignored():
    train, val, task = data("none")
    x, y = train.tensors
    y[x[:, 0] > 1] = -100
    return train, val, task

class Exits(torch.utils.data.Dataset):
    def __len__(self):
        return 64
    def __getitem__(self, index):
        if index == 50:
            raise SystemExit(0)
        return torch.zeros(6), 0

def exits():
    return Exits(), data()[1], data()[2]
"""


def _ignoring(rank, world_size, folder, place, **options):
    """Train one epoch of two updates of 32 by SGD; return the weights."""
    sys.path.insert(0, str(folder))
    values = {
        "data": {"name": "ignoring:data", "options": options}, "model": {"name": "mlp", "hidden": []}, "precision": "fp64",
        "batch": {"reference_size": 32, "size": 32, "micro_size": 8}, "optimizer": {"name": "sgd", "lr": 0.1},
        "schedule": {"name": "constant", "epochs": 1}, "log": {"every_updates": 1},
    }  # fmt: skip
    train(parse_config(values), place, ranks=Ranks(rank, rank, world_size))
    return load_file(place / "model.safetensors") if rank == 0 else None


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_update_is_the_mean_over_what_has_a_target(world_size, tmp_path, rank_pool, monkeypatch):
    (tmp_path / "ignoring.py").write_text(DATA)
    monkeypatch.syspath_prepend(tmp_path)
    found = rank_pool(world_size, _ignoring, tmp_path, tmp_path / "run")[0]
    namespace = {}
    exec(DATA, namespace)
    (inputs, labels), model = namespace["data"]()[0].tensors, nn.Linear(6, 5)
    model.double()
    first = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    names = sorted(found)
    torch.manual_seed(0)
    model.load_state_dict(dict(zip(("bias", "weight"), _initial(tmp_path, names), strict=True)))
    for number in range(2):
        rows = torch.from_numpy(global_batch(0, 64, 32 * number, 32).indices)
        loss = F.cross_entropy(model(inputs[rows].double()), labels[rows], ignore_index=-100)
        assert first[number]["loss"] == pytest.approx(loss.item(), rel=1e-12)
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
    for name, parameter in zip(names, (model.bias, model.weight), strict=True):
        torch.testing.assert_close(found[name], parameter.detach(), rtol=1e-12, atol=1e-14)


def _initial(folder, names):
    values = {"data": {"name": "ignoring:data"}, "model": {"name": "mlp", "hidden": []}, "batch": {"reference_size": 32, "size": 32},
              "optimizer": {"name": "sgd", "lr": 0.1}, "schedule": {"epochs": 1}}  # fmt: skip
    state = build_model(parse_config(values), Task("classification", (6,), 5)).state_dict()
    return [state[name] for name in names]


def test_an_update_without_a_target_stops_the_run(tmp_path, monkeypatch):
    (tmp_path / "ignoring.py").write_text(DATA)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="every target of an update is ignored"):
        _ignoring(0, 1, tmp_path, tmp_path / "run", ignored="all")


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
@pytest.mark.parametrize("size", [8, 16])
def test_what_samples_without_a_target_would_have_used_is_left_alone(engine, size, tmp_path, monkeypatch):
    """Each is a micro-batch of its own here, and none of a second way's other samples has a target."""
    (tmp_path / "ignoring.py").write_text(DATA)
    monkeypatch.syspath_prepend(tmp_path)
    values = {
        "data": {"name": "ignoring:far_ignored"}, "model": {"name": "ignoring:ways"}, "precision": "fp64",
        "batch": {"reference_size": 8, "size": size, "micro_size": 1}, "backend": {"name": engine, "device": "cpu"},
        "optimizer": {"name": "adamw", "lr": 0.1, "weight_decay": 0.5}, "schedule": {"name": "constant", "epochs": 1},
    }  # fmt: skip
    run = parse_config(values)
    train(run, tmp_path / "run")
    found = load_file(tmp_path / "run" / "model.safetensors")
    initial = build_model(run, Task("classification", (6,), 5)).double().state_dict()
    assert all(torch.equal(found[name], initial[name]) == name.startswith("second") for name in initial)


def test_the_loss_of_half_precision_is_the_mean_of_the_samples(tmp_path, monkeypatch):
    (tmp_path / "ignoring.py").write_text(DATA)
    monkeypatch.syspath_prepend(tmp_path)
    values = {
        "data": {"name": "ignoring:own"}, "model": {"name": "mlp", "hidden": []}, "precision": "bf16", "log": {"every_updates": 1},
        "batch": {"reference_size": 64, "size": 64}, "optimizer": {"name": "sgd", "lr": 0.1}, "schedule": {"epochs": 1},
    }  # fmt: skip
    run = parse_config(values)
    train(run, tmp_path / "run")
    source = run.data.load(run.seed)
    model = build_model(run, source.task)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        losses = source.task.losses(model(source.train.inputs), source.train.targets)
    assert losses.dtype == torch.bfloat16
    row = read_metrics(tmp_path / "run" / "metrics.jsonl")[0][0]
    assert row["loss"] == pytest.approx(float(losses.double().mean()), rel=1e-6)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_data_set_that_exits_is_a_mistake(num_workers, tmp_path, monkeypatch):
    (tmp_path / "ignoring.py").write_text(DATA)
    monkeypatch.syspath_prepend(tmp_path)
    values = {"data": {"name": "ignoring:exits"}, "model": {"name": "mlp", "hidden": []}, "batch": {"reference_size": 8, "size": 8},
              "optimizer": {"name": "sgd", "lr": 0.1}, "schedule": {"epochs": 1}, "loader": {"num_workers": num_workers}}  # fmt: skip
    with pytest.raises(UserError, match=r"called sys\.exit\(0\) for a sample"):
        train(parse_config(values))


def test_a_task_of_one_class_is_none():
    with pytest.raises(UserError, match="2 classes or more, got 1: there is nothing to learn"):
        Task("classification", (3,), 1)


WRONG = {
    "soft labels": (CLASSES, torch.rand(N, 5), "takes targets"),
    "a label map": (CLASSES, torch.zeros(N, 8, 8, dtype=torch.int64), "takes targets"),
    "a column": (CLASSES, torch.zeros(N, 1, dtype=torch.int64), "takes targets"),
    "fractions": (CLASSES, torch.zeros(N), "takes targets"),
    "complex numbers": (CLASSES, torch.zeros(N, dtype=torch.complex64), "takes targets"),
    "no class": (CLASSES, torch.tensor([0, 1, 5, 2]), "the target of sample 12 is 5, where the task has 5 classes"),
    "a negative class": (CLASSES, torch.tensor([0, -1, 4, 2]), "the target of sample 11 is -1"),
    "words for tokens": (TOKENS, torch.zeros(N, dtype=torch.int64), "takes targets"),
    "soft tokens": (TOKENS, torch.rand(N, 6, 5), "takes targets"),
    "no token": (TOKENS, torch.tensor([[0, -100, 4]] * 3 + [[0, 1, 7]]), "sample 13 is 7, where the task has 5 tokens"),
}


@pytest.mark.parametrize("name", WRONG)
def test_targets_are_refused_before_there_are_outputs(name):
    task, targets, said = WRONG[name]
    with pytest.raises(UserError, match=f"data: .*{said}"):
        task.check(targets, range(10, 10 + N))


@pytest.mark.parametrize("task", [REGRESSION, Task("classification", (3,), 5, loss=lambda o, t: o.sum(1))])
def test_targets_of_a_regression_and_of_an_own_loss_are_anything(task):
    task.check(torch.rand(N, 8, 8), range(N))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_whole_numbers_of_any_width_are_classes(dtype):
    targets = torch.tensor([0, 4, 2, 1])
    CLASSES.check(targets.to(dtype), range(N))
    outputs = torch.randn(N, 5)
    expected = -outputs.log_softmax(1)[torch.arange(N), targets]
    torch.testing.assert_close(CLASSES.losses(outputs, targets.to(dtype)), expected)


def test_class_156_in_8_bits_is_not_ignored():
    """-100 is 156 there."""
    many, outputs, targets = Task("classification", (3,), 200), torch.randn(N, 200), torch.tensor([156, 3, 199, 0])
    many.check(targets.byte(), range(N))
    assert many.known(targets.byte()).all()
    torch.testing.assert_close(
        many.losses(outputs, targets.byte()), F.cross_entropy(outputs, targets, reduction="none")
    )
    assert many.num_correct(1e3 * F.one_hot(targets, 200).double(), targets.byte()) == N


def test_of_two_classes_true_is_the_second():
    two, outputs, targets = Task("classification", (3,), 2), torch.randn(N, 2), torch.tensor([True, False, True, False])
    two.check(targets, range(N))
    assert torch.equal(two.losses(outputs, targets), two.losses(outputs, targets.long()))


@pytest.mark.parametrize(
    ("task", "token", "said"),
    [
        (TOKENS, 5, "the input of sample 12 holds the token 5, where the task has 5 tokens: expected 0 to 4"),
        (TOKENS, -100, "holds the token -100"),
        (Task("language_modeling", (6,), 5, num_tokens=7), 7, "where the task has 7 tokens"),
        (Task("classification", (6,), 5, num_tokens=7), 7, "holds the token 7"),
        (Task("language_modeling", (6,), 5, num_tokens=7), 6, None),
        (CLASSES, 300, None),
    ],
)
def test_a_token_that_is_none_names_its_sample(task, token, said):
    inputs, targets = (
        torch.ones(N, 6, dtype=torch.int64),
        torch.ones((N,) if task.kind == "classification" else (N, 6)).long(),
    )
    task.check(targets, range(10, 10 + N), inputs)
    inputs[2, 3] = token
    if said is None:
        task.check(targets, range(10, 10 + N), inputs)
        return
    with pytest.raises(UserError, match=re.escape(said)):
        task.check(targets, range(10, 10 + N), inputs)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.float32, torch.bool])
def test_tokens_of_any_whole_numbers_are_looked_at(dtype):
    TOKENS.check(torch.ones(N, 6).long(), range(N), torch.ones(N, 6, dtype=dtype))
    if dtype in (torch.float32, torch.bool):
        return
    with pytest.raises(UserError, match="sample 0 holds the token 9"):
        TOKENS.check(torch.ones(N, 6).long(), range(N), torch.full((N, 6), 9, dtype=dtype))
