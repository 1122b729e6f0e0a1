"""What a task takes, what would broadcast to another loss, and losses of one's own."""

import math
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file
from tasks import CLASSES, REGRESSION, TOKENS, N

from largebatch.config.file import parse_config
from largebatch.data.sampler import global_batch
from largebatch.errors import UserError
from largebatch.task import Task
from largebatch.training.run import train


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
