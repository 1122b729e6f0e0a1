"""What a data set asks of a model: the shape of a sample, the loss of a sample, and what counts as right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

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
        """
        if self.kind == "classification":
            return F.cross_entropy(outputs, targets, reduction="none")
        if self.kind == "language_modeling":
            per_token = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none")
            return per_token.view_as(targets).mean(dim=1)
        return (outputs - targets).square().flatten(1).mean(dim=1)

    def num_correct(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """Return how many samples are right (sum over samples of a sequence's share of right tokens), or None."""
        if self.kind == "regression":
            return None
        right = (outputs.argmax(dim=-1) == targets).to(torch.float64)
        return right.flatten(1).mean(dim=1).sum() if right.dim() > 1 else right.sum()
