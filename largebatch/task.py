"""The task that a data set defines for a model: the shape of a sample, the loss of a sample, and its accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from largebatch.errors import UserError, nearest

TaskKind = Literal["classification", "language_modeling", "regression"]

# The target that is ignored, as in torch.nn.functional.cross_entropy and the Hugging Face libraries.
IGNORED = -100


@dataclass(frozen=True)
class Task:
    """The contract between a data set and a model.

    Targets of -100 are ignored: such a token has no loss and is neither right nor wrong.

    Args:
        kind: ``classification`` (targets (n,) of class indices), ``language_modeling`` (inputs and targets (n, t) of
            tokens) or ``regression`` (targets of the outputs' shape).
        sample_shape: shape of one input without the batch dimension, e.g. (1, 28, 28); (t,) for tokens.
        num_outputs: number of classes, vocabulary size, or number of regression outputs.
        loss: a custom loss that replaces the kind's loss: takes outputs and targets of n samples and returns (n,), the loss of
            each sample.
        correct: with ``loss``, returns the accuracy of each sample, (n,) in [0, 1]; None reports no accuracy.
        num_tokens: number of tokens that integer inputs may contain, from 0 to num_tokens - 1. None stands for the vocabulary
            of a language model; in other tasks the inputs are then not checked.
    """

    kind: TaskKind
    sample_shape: tuple[int, ...]
    num_outputs: int
    loss: Callable[[Tensor, Tensor], Tensor] | None = None
    correct: Callable[[Tensor, Tensor], Tensor] | None = None
    num_tokens: int | None = None

    def __post_init__(self) -> None:
        """Refuse an unknown kind, and a number of outputs with which there is nothing to learn."""
        if self.kind not in get_args(TaskKind):
            known = get_args(TaskKind)
            raise UserError(f"Task: kind is '{self.kind}'{nearest(self.kind, known)}; expected {', '.join(known)}")
        least = 2 if self.can_ignore else 1
        if self.loss is None and self.num_outputs < least:
            what = {"classification": "classes", "language_modeling": "tokens", "regression": "outputs"}[self.kind]
            raise UserError(
                f"data: a task of {self.kind} has {least} {what} or more, got {self.num_outputs}: there is nothing to learn"
            )

    @property
    def has_accuracy(self) -> bool:
        """Whether an accuracy is reported."""
        return self.correct is not None if self.loss is not None else self.kind != "regression"

    def check(self, targets: Tensor, numbers: Sequence[int] | np.ndarray, inputs: Tensor | None = None) -> None:
        """Check the kind and range of targets, and the range of input tokens, before there are outputs.

        Args:
            targets: the targets of n samples, on the CPU, because on a GPU an invalid class would end the process.
            numbers: the indices of those samples in their data set, (n,).
            inputs: the inputs of those samples, on the CPU; None to check only the targets.

        Raises:
            UserError: for a tensor without dense values, label maps, soft labels, or a class or token out of range.
        """
        for what, part in (("inputs", inputs), ("targets", targets)):
            if part is not None and (part.is_meta or part.layout != torch.strided):
                kind = "meta" if part.is_meta else str(part.layout).removeprefix("torch.")
                raise UserError(
                    f"data: the {what} of {len(targets)} samples are a {kind} tensor; expected one that holds values"
                )
        if inputs is not None:
            self._check_tokens(inputs, numbers)
        if not self.can_ignore:
            return
        places = 1 if self.kind == "classification" else 2
        if targets.ndim != places or targets.is_floating_point() or targets.is_complex():
            what = "(n,), the number of each sample's class" if places == 1 else "(n, t), the number of each next token"
            raise UserError(
                f"data: a task of {self.kind} takes targets {what}; those of {len(targets)} are {list(targets.shape)} of "
                f"{str(targets.dtype).removeprefix('torch.')}; anything else is a loss of your own, Task(loss=)"
            )
        targets = targets.long()
        wrong = ((targets < 0) & (targets != IGNORED)) | (targets >= self.num_outputs)
        if bool(wrong.any()):
            row = int(wrong.reshape(len(targets), -1).any(dim=1).nonzero()[0])
            what = "classes" if places == 1 else "tokens"
            raise UserError(
                f"data: the target of sample {int(numbers[row])} is {int(targets[row][wrong[row]].flatten()[0])}, where the "
                f"task has {self.num_outputs} {what}: expected 0 to {self.num_outputs - 1}, or {IGNORED} for one that is "
                "ignored"
            )

    def _check_tokens(self, inputs: Tensor, numbers: Sequence[int] | np.ndarray) -> None:
        known = self.num_tokens
        if known is None and self.kind == "language_modeling":
            known = self.num_outputs
        if known is None or inputs.is_floating_point() or inputs.is_complex() or inputs.dtype == torch.bool:
            return
        inputs = inputs.long()
        wrong = (inputs < 0) | (inputs >= known)
        if bool(wrong.any()):
            row = int(wrong.reshape(len(inputs), -1).any(dim=1).nonzero()[0])
            raise UserError(
                f"data: the input of sample {int(numbers[row])} holds the token {int(inputs[row][wrong[row]].flatten()[0])}, "
                f"where the task has {known} tokens: expected 0 to {known - 1}; where the model knows more than it predicts, "
                "Task(num_tokens=) says so"
            )

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each sample, shape (n,).

        A sequence is one sample: its loss is the mean over its tokens that are not ignored, or 0 if all are. The caller divides
        the sum of these losses by the global number of samples, so that every sample has the same weight, whichever rank or
        micro-batch it is in (Goyal et al. 2017, remark 3).

        Args:
            outputs: (n, num_outputs) for classification, (n, t, num_outputs) for language modeling, (n, ...) for regression.
            targets: (n,), (n, t), or the shape of the outputs. In regression, (n,) and (n, 1) may be combined.

        Raises:
            UserError: for other shapes, which would broadcast to a different loss; for a class out of range; or for a custom
                loss that does not return (n,) or has no gradient.
        """
        if self.loss is not None:
            losses = _of_each_sample(self.loss(outputs, targets), len(targets), "loss")
            if torch.is_grad_enabled() and outputs.requires_grad and not losses.requires_grad:
                raise UserError("Task: loss has to be differentiable in the outputs; what it returned has no gradient")
            return losses
        self._check_outputs(outputs)
        if self.kind == "regression":
            if {tuple(outputs.shape), tuple(targets.shape)} == {(len(outputs),), (len(outputs), 1)}:
                outputs, targets = outputs.flatten(), targets.flatten()
            if outputs.shape != targets.shape:
                raise self._mismatch(outputs, targets, "targets of the outputs' shape")
            return (
                (outputs - targets).square().flatten(1).mean(dim=1)
                if outputs.ndim > 1
                else (outputs - targets).square()
            )
        self._check_targets(outputs, targets)
        try:
            losses = F.cross_entropy(
                outputs.flatten(0, -2), targets.flatten().long(), ignore_index=IGNORED, reduction="none"
            )
        except IndexError as error:
            flat = targets.flatten()
            wrong = flat[((flat < 0) & (flat != IGNORED)) | (flat >= outputs.shape[-1])]
            raise UserError(
                f"data: a target is {int(wrong[0])}, where the model has {outputs.shape[-1]} outputs: expected 0 to "
                f"{outputs.shape[-1] - 1}, or {IGNORED} for one that is ignored"
            ) from error
        return _mean_of_known(losses.view_as(targets), targets)

    def num_correct(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """Return the number of correct samples, or None without an accuracy. A sequence counts by its share of correct tokens.

        Raises:
            UserError: for shapes as in `losses`, or if a custom ``correct`` does not return (n,) in [0, 1].
        """
        if not self.has_accuracy:
            return None
        if self.correct is not None:
            right = _of_each_sample(self.correct(outputs, targets), len(targets), "correct")
            if not bool(((right >= 0) & (right <= 1)).all()):
                raise UserError("Task: correct has to return numbers from 0 to 1, how far each sample is right")
            return right.sum(dtype=torch.float64)
        self._check_outputs(outputs)
        self._check_targets(outputs, targets)
        return _mean_of_known((outputs.argmax(dim=-1) == targets).to(torch.float64), targets).sum()

    @property
    def can_ignore(self) -> bool:
        """Whether targets of -100 are ignored."""
        return self.loss is None and self.kind != "regression"

    def known(self, targets: Tensor) -> Tensor:
        """Return whether each sample has a target that is not ignored, bool (n,). Only these enter mean losses and scores."""
        if not self.can_ignore:
            return torch.ones(len(targets), dtype=torch.bool, device=targets.device)
        return _known(targets).reshape(len(targets), -1).any(dim=1)

    def _check_outputs(self, outputs: object) -> None:
        if isinstance(outputs, Tensor) and outputs.is_floating_point():
            return
        came = str(outputs.dtype).removeprefix("torch.") if isinstance(outputs, Tensor) else type(outputs).__name__
        raise UserError(
            f"model.name: a task of {self.kind} takes one tensor of floating-point outputs, the model returned {came}; let it "
            "return that tensor alone, or give the task a loss of your own, Task(loss=)"
        )

    def _check_targets(self, outputs: Tensor, targets: Tensor) -> None:
        places = 1 if self.kind == "classification" else 2
        if outputs.ndim == places + 1 and targets.shape == outputs.shape[:places] and not targets.is_floating_point():
            return
        what = "outputs (n, classes) and targets (n,)" if places == 1 else "outputs (n, t, tokens) and targets (n, t)"
        raise self._mismatch(outputs, targets, f"{what} of whole numbers")

    def _mismatch(self, outputs: Tensor, targets: Tensor, expected: str) -> UserError:
        return UserError(
            f"data: a task of {self.kind} takes {expected}; the model's outputs are {list(outputs.shape)}, the targets "
            f"{list(targets.shape)} of {str(targets.dtype).removeprefix('torch.')}"
        )


def _of_each_sample(values: Tensor, count: int, what: str) -> Tensor:
    """Return the result of a user's function after checking that it has one number for each sample."""
    if not isinstance(values, Tensor) or values.shape != (count,) or values.is_complex():
        came = f"{list(values.shape)} of {values.dtype}" if isinstance(values, Tensor) else type(values).__name__
        raise UserError(
            f"Task: {what} has to return a tensor of shape [{count}], one number a sample; it returned {came}"
        )
    return values


def _known(targets: Tensor) -> Tensor:
    return targets.long() != IGNORED  # in uint8, -100 would compare equal to the class 156


def _mean_of_known(values: Tensor, targets: Tensor) -> Tensor:
    """Return each sample's mean of values (n,) or (n, t) over the targets that are not ignored; 0 if all are ignored."""
    known = _known(targets)
    if values.ndim == 1:
        return values * known
    return (values * known).sum(dim=1) / known.sum(dim=1).clamp(min=1)
