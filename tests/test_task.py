"""What a task takes, and what would broadcast to another loss."""

import pytest
import torch

from largebatch.section import UserError
from largebatch.task import Task

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
