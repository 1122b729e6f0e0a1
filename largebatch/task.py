"""What a data set asks of a model: the shape of a sample, the loss of a sample, and what counts as right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from largebatch.section import UserError

TaskKind = Literal["classification", "language_modeling", "regression"]


@dataclass(frozen=True)
class Task:
    """The contract between a data set and a model.

    Args:
        kind: ``classification`` (targets (n,) of class indices), ``language_modeling`` (inputs and targets (n, t) of
            tokens) or ``regression`` (targets of the outputs' shape).
        sample_shape: shape of one input without the batch dimension, e.g. (1, 28, 28); (t,) for tokens.
        num_outputs: classes, vocabulary size, or regression outputs.
    """

    kind: TaskKind
    sample_shape: tuple[int, ...]
    num_outputs: int

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return each sample's own loss, shape (n,).

        A sequence is one sample: its loss is the mean over its tokens. Whoever sums these divides by the true global
        count, so that no rank and no micro-batch weighs more than its samples (Goyal et al. 2017, remark 3).

        Args:
            outputs: (n, num_outputs) of a classifier, (n, t, num_outputs) of a language model, (n, ...) of a regression.
            targets: (n,), (n, t), or of the outputs' shape; a regression's (n,) goes with outputs (n, 1) and the other way.

        Raises:
            UserError: for other shapes, which would broadcast to another loss, or a class that is none.
        """
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
        places = 1 if self.kind == "classification" else 2
        if outputs.ndim != places + 1 or targets.shape != outputs.shape[:places] or targets.is_floating_point():
            what = (
                "outputs (n, classes) and targets (n,)" if places == 1 else "outputs (n, t, tokens) and targets (n, t)"
            )
            raise self._mismatch(outputs, targets, f"{what} of whole numbers")
        try:
            losses = F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction="none")
        except IndexError as error:
            wrong = targets.flatten()[(targets.flatten() < 0) | (targets.flatten() >= outputs.shape[-1])]
            raise UserError(
                f"data: a target is {int(wrong[0])}, where the model has {outputs.shape[-1]} outputs: expected 0 to "
                f"{outputs.shape[-1] - 1}"
            ) from error
        return losses if places == 1 else losses.view_as(targets).mean(dim=1)

    def _mismatch(self, outputs: Tensor, targets: Tensor, expected: str) -> UserError:
        return UserError(
            f"data: a task of {self.kind} takes {expected}; the model's outputs are {list(outputs.shape)}, the targets "
            f"{list(targets.shape)} of {str(targets.dtype).removeprefix('torch.')}"
        )

    def num_correct(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """Return how many samples are right (sum over samples of a sequence's share of right tokens), or None."""
        if self.kind == "regression":
            return None
        right = (outputs.argmax(dim=-1) == targets).to(torch.float64)
        return right.flatten(1).mean(dim=1).sum() if right.dim() > 1 else right.sum()
