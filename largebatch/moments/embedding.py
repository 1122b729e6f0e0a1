"""Embedding tables: a sample's gradient for row v is the sum of d over the positions where the sample looks v up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from largebatch.moments import fallback
from largebatch.moments.derived import derive
from largebatch.moments.scope import Scope, rule
from largebatch.moments.tap import Operation, statistic_dtype
from largebatch.section import UserError


class Lookup(Operation):
    """Rows of a table [v, features]; saved tensors: rows looked up [n, t] and their gradients' factors [n, t] or none.

    Attributes:
        batch_dim: dimension of the samples in indices and output.
        num_rows: v.
        padding_idx: row without gradient, -1 for none.
    """

    def __init__(self, num_samples: int, batch_dim: int, num_rows: int, padding_idx: int, by_frequency: bool):
        super().__init__(num_samples)
        self.batch_dim = batch_dim
        self.num_rows = num_rows
        self.padding_idx = padding_idx
        self.by_frequency = by_frequency

    def prepare(self, grad: Tensor, saved: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return d [n, t, features] and indices [n, t]; d is zero where padding was looked up."""
        (indices,) = saved
        if self.batch_dim:
            grad, indices = grad.movedim(self.batch_dim, 0), indices.movedim(self.batch_dim, 0)
        d = grad.reshape(self.num_samples, -1, grad.shape[-1]).to(statistic_dtype(grad.dtype))
        indices = indices.reshape(self.num_samples, -1)
        if self.padding_idx >= 0:
            d = d.masked_fill((indices == self.padding_idx).unsqueeze(-1), 0)
        if self.by_frequency:
            counts = torch.zeros(self.num_rows, dtype=d.dtype, device=d.device)
            counts.index_add_(0, indices.reshape(-1), torch.ones_like(d[..., 0]).reshape(-1))
            d = d / counts[indices].unsqueeze(-1)
        return d, indices

    def moments(self, role: str, ready: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Add up the positions of a sample that share a row, then scatter the sums and their squares."""
        d, indices = ready
        return scatter_moments(d, indices, self.num_rows)

    def per_sample(self, role: str, ready: tuple[Tensor, ...], lo: int, hi: int) -> Tensor:
        """Return the dense tables [hi - lo, v, features]."""
        d = ready[0]
        out = torch.zeros(hi - lo, self.num_rows, d.shape[2], dtype=d.dtype, device=d.device)
        self.add_per_sample(role, ready, lo, hi, out)
        return out

    def add_per_sample(self, role: str, ready: tuple[Tensor, ...], lo: int, hi: int, out: Tensor) -> None:
        """Add to the rows that were looked up, and to no others."""
        for table, d, rows in zip(out, ready[0][lo:hi], ready[1][lo:hi], strict=True):
            table.index_add_(0, rows, d.to(table.dtype))


def scatter_moments(d: Tensor, indices: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Return tables [num_rows, features] of sum_b g_b and sum_b g_b^2.

    Args:
        d: [n, t, features], gradients of the looked-up rows.
        indices: [n, t].
        num_rows: rows of the table.
    """
    n, t, features = d.shape
    rows, order = indices.sort(dim=1)
    is_first = torch.ones_like(rows)
    is_first[:, 1:] = (rows[:, 1:] != rows[:, :-1]).to(rows.dtype)
    # Positions of one sample and row form a group; groups are numbered within [n * t], so that shapes stay static.
    group = is_first.cumsum(1) - 1 + t * torch.arange(n, device=d.device).unsqueeze(1)
    group_of_position = torch.empty_like(group).scatter_(1, order, group)
    flat = d.reshape(n * t, features)
    grads = torch.zeros_like(flat).index_add_(0, group_of_position.reshape(-1), flat)
    row_of_group = torch.zeros_like(rows).reshape(-1).scatter_(0, group.reshape(-1), rows.reshape(-1))
    total = torch.zeros(num_rows, features, dtype=d.dtype, device=d.device)
    squares = torch.zeros_like(total).index_add_(0, row_of_group, grads.square())
    return total.index_add_(0, row_of_group, grads), squares


@rule(torch.embedding)
def embedding(
    scope: Scope,
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Look up rows; the gradient is dense whatever `sparse` says."""
    operand = scope.operand(weight)
    assert operand is not None
    output = torch.embedding(weight.detach(), indices, padding_idx)
    num_samples = scope.samples_in(indices.shape[scope.batch_dim], "embedding")
    operation = Lookup(num_samples, scope.batch_dim, len(weight), padding_idx, scale_grad_by_freq)
    return scope.tap(operation, output, (indices,), (operand,))


@rule(Tensor.__getitem__)
def rows_of(scope: Scope, weight: Tensor, index: Any) -> Tensor:
    """weight[index]: with one tensor of row numbers a lookup."""
    operand = scope.operand(weight)
    if operand is None or not isinstance(index, Tensor) or index.dtype == torch.bool or index.ndim <= scope.batch_dim:
        return fallback.run(scope, Tensor.__getitem__, (weight, index), {})
    table = derive(scope, Tensor.reshape, (weight, len(weight), -1), {}, [operand])
    return embedding(scope, table, index % len(weight)).view(*index.shape, *weight.shape[1:])


class Bags(Operation):
    """Sums or means of rows over bags, a bag a sample (or k bags each)."""

    def __init__(self, num_samples: int, num_rows: int, padding_idx: int, mode: int):
        super().__init__(num_samples)
        self.num_rows = num_rows
        self.padding_idx = padding_idx
        self.mode = mode

    def prepare(self, grad: Tensor, saved: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the gradient of every looked-up row [m, features], its row [m] and its sample [m]."""
        indices, bag, *weights = saved
        keep = (indices != self.padding_idx).to(statistic_dtype(grad.dtype))
        factor = keep
        if self.mode == 1:
            sizes = torch.zeros(len(grad), dtype=factor.dtype, device=grad.device).index_add_(0, bag, keep)
            factor = factor / sizes.clamp(min=1)[bag]
        if weights:
            factor = factor * weights[0]
        d = grad.to(factor.dtype)[bag] * factor.unsqueeze(1)
        return d, indices, bag // (len(grad) // self.num_samples)

    def moments(self, role: str, ready: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Sum the entries that share sample and row, then scatter."""
        d, rows, sample = ready
        pairs, inverse = torch.unique(sample * self.num_rows + rows, return_inverse=True)
        grads = torch.zeros(len(pairs), d.shape[1], dtype=d.dtype, device=d.device).index_add_(0, inverse, d)
        total = torch.zeros(self.num_rows, d.shape[1], dtype=d.dtype, device=d.device)
        squares = torch.zeros_like(total).index_add_(0, pairs % self.num_rows, grads.square())
        return total.index_add_(0, pairs % self.num_rows, grads), squares

    def per_sample(self, role: str, ready: tuple[Tensor, ...], lo: int, hi: int) -> Tensor:
        """Return the dense tables [hi - lo, v, features]."""
        d, rows, sample = ready
        mine = (sample >= lo) & (sample < hi)
        out = torch.zeros((hi - lo) * self.num_rows, d.shape[1], dtype=d.dtype, device=d.device)
        out.index_add_(0, (sample[mine] - lo) * self.num_rows + rows[mine], d[mine])
        return out.view(hi - lo, self.num_rows, d.shape[1])


@rule(torch.embedding_bag)
def embedding_bag(
    scope: Scope,
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> tuple[Tensor, ...]:
    """Sum (mode 0) or average (1) rows over the bags that `offsets` cuts from `indices`."""
    operand = scope.operand(weight)
    if operand is None or mode == 2 or scale_grad_by_freq:
        raise UserError(
            "track: embedding_bag is supported with mode 'sum' or 'mean', without scale_grad_by_freq and with constant "
            "per_sample_weights; use per='micro_batch'"
        )
    output, *rest = torch.embedding_bag(
        weight.detach(), indices, offsets, False, mode, False, per_sample_weights, include_last_offset, padding_idx
    )
    starts = offsets[:-1] if include_last_offset else offsets
    positions = torch.arange(len(indices), device=indices.device, dtype=starts.dtype)
    bag = torch.searchsorted(starts.contiguous(), positions, right=True) - 1
    if len(output) != scope.num_samples and not scope.is_used:
        # The first tensor of the model's input holds all bags in a row: it is the bags that are samples.
        scope.num_samples = len(output)
    num_samples = scope.samples_in(len(output), "embedding_bag")
    padding = -1 if padding_idx is None else padding_idx % len(weight)
    saved = (indices, bag) if per_sample_weights is None else (indices, bag, per_sample_weights.detach())
    output = scope.tap(Bags(num_samples, len(weight), padding, mode), output, saved, (operand,))
    return (output, *rest)
