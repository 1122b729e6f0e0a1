"""Targets and tokens that no model takes are named before they reach it."""

import re

import pytest
import torch
import torch.nn.functional as F
from tasks import CLASSES, REGRESSION, TOKENS, N

from largebatch.errors import UserError
from largebatch.task import Task


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
