"""Normalisation: layer, RMS, group, instance and batch norm.

All end in y = w * xhat + b. A sample's gradient for w is the sum over its positions of d * xhat, for b the sum of d.
In batch norm xhat itself depends on the other samples of the batch; the per-sample gradient of its weight and bias is
the sample's summand of the batch gradient, which is what a loop of vector-Jacobian products over the rows gives.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from largebatch.moments.linear import plain
from largebatch.moments.scope import Scope, rule
from largebatch.moments.tap import Operation, Part, pad_samples, statistic_dtype


class Affine(Operation):
    """The affine end of a normalisation; roles "weight" and "bias" of shape `shape`.

    Attributes:
        kind: key of `NORMALIZE`, which computes xhat anew in the backward pass: one pass over the input, no memory;
            or "centered", with saved tensors input, mean [c], factor [c] and xhat = (input - mean) * factor.
        options: what `NORMALIZE` takes after the saved tensors.
        shape: of weight and bias.
        batch_dim: dimension of the samples.
        part: the samples in the call, where it has not all of them.
    """

    def __init__(
        self,
        num_samples: int,
        roles: tuple[str, ...],
        kind: str,
        options: tuple[Any, ...],
        shape: Any,
        batch_dim: int,
        part: Part | None,
    ):
        super().__init__(num_samples, roles)
        self.kind = kind
        self.options = options
        self.shape = tuple(shape)
        self.batch_dim = batch_dim
        self.part = part

    def prepare(self, grad: Tensor, saved: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the per-sample gradients [n, *shape] of every role: they are small."""
        wide = statistic_dtype(grad.dtype)
        parts = []
        for role in self.roles:
            if role == "bias":
                parts.append(self._reduce(grad, wide))
            elif self.kind == "centered":
                input, mean, factor = saved
                mean = mean.view(-1, *[1] * (input.ndim - 2)).to(input.dtype)
                parts.append(self._reduce((input - mean).to(grad.dtype).mul_(grad), wide) * factor)
            else:
                hat = NORMALIZE[self.kind](*saved, *self.options)
                parts.append(self._reduce(hat.to(grad.dtype) * grad, wide))
        return tuple(pad_samples(part, self.part, self.num_samples) for part in parts)

    def _reduce(self, product: Tensor, wide: torch.dtype) -> Tensor:
        """Sum [.., rows, .., features] over everything but samples and features."""
        num_samples = self.num_samples if self.part is None else self.part[1] - self.part[0]
        if self.kind in ("layer", "rms"):
            rows = product.movedim(self.batch_dim, 0) if self.batch_dim else product
            return rows.reshape(num_samples, -1, *self.shape).sum(1, dtype=wide)
        rows = product.flatten(2).sum(2, dtype=wide) if product.ndim > 2 else product.to(wide)
        return rows if len(rows) == num_samples else rows.view(num_samples, -1, *self.shape).sum(1)

    def per_sample(self, role: str, ready: tuple[Tensor, ...], lo: int, hi: int) -> Tensor:
        """Return rows lo to hi."""
        return ready[self.roles.index(role)][lo:hi]


def _batch_hat(input: Tensor, eps: float) -> Tensor:
    return torch.batch_norm(input, None, None, None, None, True, 0.0, eps, torch.backends.cudnn.enabled)


def _instance_hat(input: Tensor, eps: float) -> Tensor:
    return F.instance_norm(input, eps=eps)


NORMALIZE: dict[str, Any] = {
    "layer": lambda input, shape, eps: F.layer_norm(input, shape, None, None, eps),
    "rms": lambda input, shape, eps: F.rms_norm(input, shape, None, eps),
    "group": lambda input, groups, eps: F.group_norm(input, groups, None, None, eps),
    "instance": _instance_hat,
    "batch": _batch_hat,
}


def _finish(
    scope: Scope,
    output: Tensor,
    saved: tuple[Tensor, ...],
    params: tuple[Any, Any],
    kind: str,
    options: tuple[Any, ...],
) -> Tensor:
    found = {"weight": scope.operand(params[0]), "bias": scope.operand(params[1])}
    operands = {role: operand for role, operand in found.items() if operand is not None}
    shape = next(iter(operands.values())).tensor.shape
    batch_dim = scope.batch_dim if kind in ("layer", "rms") else 0
    part = scope.part(saved[0])
    num_samples = scope.samples_in(saved[0].shape[batch_dim], f"{kind} norm", part)
    operation = Affine(num_samples, tuple(operands), kind, options, shape, batch_dim, part)
    return scope.tap(operation, output, saved if "weight" in operands else (), tuple(operands.values()))


def _plain(scope: Scope, value: Any) -> Any:
    return plain(value, scope.operand(value))


@rule(torch.layer_norm)
def layer_norm(
    scope: Scope,
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """Layer norm."""
    output = F.layer_norm(input, normalized_shape, _plain(scope, weight), _plain(scope, bias), eps)
    return _finish(scope, output, (input,), (weight, bias), "layer", (tuple(normalized_shape), eps))


@rule(torch.rms_norm)
def rms_norm(
    scope: Scope, input: Tensor, normalized_shape: list[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """RMS norm."""
    output = F.rms_norm(input, normalized_shape, _plain(scope, weight), eps)
    return _finish(scope, output, (input,), (weight, None), "rms", (tuple(normalized_shape), eps))


@rule(torch.group_norm)
def group_norm(
    scope: Scope,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """Group norm."""
    output = F.group_norm(input, num_groups, _plain(scope, weight), _plain(scope, bias), eps)
    return _finish(scope, output, (input,), (weight, bias), "group", (num_groups, eps))


@rule(torch.instance_norm)
def instance_norm(
    scope: Scope,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    """Instance norm."""
    params = _plain(scope, weight), _plain(scope, bias)
    output = torch.instance_norm(
        input, *params, running_mean, running_var, use_input_stats, momentum, eps, cudnn_enabled
    )
    if use_input_stats:
        return _finish(scope, output, (input,), (weight, bias), "instance", (eps,))
    return _finish_running(scope, output, input, running_mean, running_var, (weight, bias), eps)


def _finish_running(
    scope: Scope, output: Tensor, input: Tensor, mean: Tensor | None, var: Tensor | None, params: Any, eps: float
) -> Tensor:
    """Put a tap behind a normalisation by running statistics, as they are now."""
    assert mean is not None and var is not None
    return _finish(scope, output, (input, mean.clone(), (var + eps).rsqrt()), params, "centered", ())


@rule(torch.batch_norm)
def batch_norm(
    scope: Scope,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    """Batch norm, with the batch's statistics or the running ones."""
    params = _plain(scope, weight), _plain(scope, bias)
    if training and input.device.type == "cpu":
        # The processor's kernel, called by its own name, gives away the mean and 1 / sd it found.
        output, mean, factor = torch.native_batch_norm(input, *params, running_mean, running_var, True, momentum, eps)
        return _finish(scope, output, (input, mean.detach(), factor.detach()), (weight, bias), "centered", ())
    output = torch.batch_norm(input, *params, running_mean, running_var, training, momentum, eps, cudnn_enabled)
    if training:
        return _finish(scope, output, (input,), (weight, bias), "batch", (eps,))
    return _finish_running(scope, output, input, running_mean, running_var, (weight, bias), eps)
