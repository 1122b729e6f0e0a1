"""Batch normalisation over a fixed number of samples, independent of the micro-batch size and the number of ranks.

Goyal et al. keep the number of samples in the batch statistics at 32 while the global batch grows: it is part of the model,
and changing it would change the loss. Therefore statistics are computed over consecutive groups of exactly this many samples,
and never synchronised between devices. The running statistics are synchronised once per update, because the model uses them
in evaluation, and a saved model must not depend on the rank that saved it.

References:
    Goyal et al., "Accurate, Large Minibatch SGD", 2017, arXiv:1706.02677, section 3, "Batch normalization".
    The name: Hoffer et al., "Train longer, generalize better", NeurIPS 2017, arXiv:1705.08741.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from largebatch.errors import UserError

NormKind = Literal["none", "batch", "group"]


class _GhostBatchNorm(nn.Module):
    """Affine batch normalisation over groups of samples; see the module's docstring.

    In training each group of ``group_size`` consecutive samples is normalised by its own mean and biased variance; so is a last
    group of n modulo group_size samples. Evaluation uses the running statistics, as in torch.nn. ``forward`` does not change
    them; it only accumulates the statistics of the groups, with which :func:`commit_batch_statistics` updates them once per
    update.

    A group with a single value per channel (one sample without spatial dimensions) has no variance: its output is the bias, and
    it does not enter the running statistics. torch.nn raises an error for it, but here the last sample of a run may be alone in
    its group.

    The pending sums are buffers. DistributedDataParallel needs ``broadcast_buffers=False``; otherwise rank 0's sums would
    replace those of the other ranks in every forward pass.

    Args:
        num_features: number of channels, the size of dimension 1 of the input.
        group_size: number of samples per group, >= 1.
        eps: value added to the variance.
        momentum: weight of one update in the running statistics, as in torch.nn (not the optimizer's momentum).
    """

    num_batches_tracked: Tensor
    running_mean: Tensor
    running_var: Tensor
    pending: Tensor
    pending_samples: Tensor

    _dimensions: tuple[int, ...]

    def __init__(self, num_features: int, group_size: int = 32, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        if group_size < 1:
            raise ValueError(f"group_size must be at least 1, got {group_size}")
        self.num_features = num_features
        self.group_size = group_size
        self.eps = eps
        self.momentum = momentum
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))
        # Sums over the samples since the last commit of their group's (mean, unbiased variance), and the number of samples.
        self.register_buffer("pending", torch.zeros(2, num_features), persistent=False)
        self.register_buffer("pending_samples", torch.tensor(0.0), persistent=False)

    def extra_repr(self) -> str:
        """Return the arguments that repr shows in parentheses."""
        return f"{self.num_features}, group_size={self.group_size}, eps={self.eps}, momentum={self.momentum}"

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the normalised inputs.

        Args:
            inputs: (n, c, ...).

        Returns:
            The normalised inputs, of the same shape.

        Raises:
            ValueError: if the number of dimensions of the input is not supported.
        """
        if inputs.dim() not in self._dimensions:
            expected = " or ".join(map(str, self._dimensions))
            raise ValueError(f"{type(self).__name__} expects an input of {expected} dimensions, got {inputs.dim()}")
        if not self.training:
            return F.batch_norm(
                inputs, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
            )
        # Call the library's fused kernel for each group. Folding the groups into the channels needs only a single call, but
        # transposed copies: it is 1.4 times slower if contiguous and 4 times if channels_last (CPU, 8 groups of 32).
        groups = inputs.split(self.group_size) if len(inputs) > self.group_size else (inputs,)
        outputs, statistics = zip(*map(self._normalized, groups), strict=True)
        self._add(
            [(len(g), statistic) for g, statistic in zip(groups, statistics, strict=True) if statistic is not None]
        )
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _normalized(self, group: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return a group normalised by its own statistics, and its mean and unbiased variance (2, c), or None if undefined."""
        if group.numel() <= self.num_features:
            shape = (-1,) + (1,) * (group.dim() - 2)
            return (group - group) * self.weight.view(shape) + self.bias.view(shape), None
        # With momentum 1 the kernel writes the batch's mean and unbiased variance to the buffers, without a second pass.
        statistic = torch.zeros_like(self.pending)
        mean, var = statistic.unbind()
        output = F.batch_norm(group, mean, var, self.weight, self.bias, training=True, momentum=1.0, eps=self.eps)
        return output, statistic

    @torch.no_grad()
    def _add(self, counted: list[tuple[int, Tensor]]) -> None:
        """Add the statistics of all groups to the pending sums at once, at the end of a forward pass.

        Activation checkpointing runs a forward pass a second time, and may stop it early. Because a pass adds all groups or
        none, either every micro-batch is counted twice or none is, and the average is unchanged.
        """
        if not counted:
            return
        last_size, last = counted[-1]
        self.pending.add_(last, alpha=last_size)
        if len(counted) > 1:  # all groups except the last have the full size
            self.pending.add_(
                torch.stack([statistic for _, statistic in counted[:-1]]).sum(dim=0), alpha=self.group_size
            )
        self.pending_samples.add_(sum(size for size, _ in counted))


class GhostBatchNorm1d(_GhostBatchNorm):
    """Batch normalisation of (n, c) or (n, c, l) over groups of samples, with the arguments of GhostBatchNorm2d."""

    _dimensions = (2, 3)


class GhostBatchNorm3d(_GhostBatchNorm):
    """Batch normalisation of (n, c, d, h, w) over groups of samples, with the arguments of GhostBatchNorm2d."""

    _dimensions = (5,)


class GhostBatchNorm2d(_GhostBatchNorm):
    """Batch normalisation of (n, c, h, w) over groups of samples.

    A drop-in replacement for nn.BatchNorm2d, with the same names in the state dict, if :func:`commit_batch_statistics` is
    called once per update.

    Args:
        num_features: c.
        group_size: number of samples per group, >= 1.
        eps: value added to the variance.
        momentum: weight of one update in the running statistics.
    """

    _dimensions = (4,)


def batch_norms(model: nn.Module) -> list[_GhostBatchNorm]:
    """Return the grouped batch norms of a model, in the order of ``model.modules()``."""
    return [module for module in model.modules() if isinstance(module, _GhostBatchNorm)]


def norm_group_size(model: nn.Module) -> int:
    """Return the number of samples that must stay in one micro-batch: the least common multiple of the group sizes, or 1."""
    return math.lcm(*(module.group_size for module in batch_norms(model)))


@torch.no_grad()
def commit_batch_statistics(modules: list[_GhostBatchNorm], all_reduce_sum: Callable[[Tensor], Tensor]) -> None:
    """Update the running statistics, and reset the pending sums.

        running <- (1 - momentum) * running + momentum * (sum over samples of their group's statistic) / samples

    The sums are over all ranks and micro-batches, so the result does not depend on their number. The sums of all modules are
    reduced in one flat float64 tensor. This is a collective, which every rank must call once per update.

    Args:
        modules: the modules that :func:`batch_norms` returned; an empty list has no effect.
        all_reduce_sum: returns a flat float64 tensor's sum over ranks, in place or not; the identity on one rank.
    """
    if not modules:
        return
    flat = torch.cat(
        [torch.cat([module.pending.flatten(), module.pending_samples.view(1)]).double() for module in modules]
    )
    flat = all_reduce_sum(flat)
    for module, sums in zip(modules, flat.split([2 * module.num_features + 1 for module in modules]), strict=True):
        # Keep the old statistics if no group had a variance (0/0). A mask avoids a synchronisation with the GPU.
        averages = sums[:-1].view(2, -1) / sums[-1]
        for running, average in zip((module.running_mean, module.running_var), averages, strict=True):
            moved = torch.lerp(running.double(), average, module.momentum)
            running.copy_(torch.where(sums[-1] > 0, moved, running))
        module.num_batches_tracked.add_(1)
        module.pending.zero_()
        module.pending_samples.zero_()


def discard_batch_statistics(modules: list[_GhostBatchNorm]) -> None:
    """Reset the sums since the last commit, after an update that was not applied."""
    for module in modules:
        module.pending.zero_()
        module.pending_samples.zero_()


def convert_batch_norm(model: nn.Module, group_size: int) -> nn.Module:
    """Replace every nn.BatchNorm1d, 2d and 3d of a model, in place, keeping parameters and buffers.

    In a training loop of your own, call :func:`commit_batch_statistics` once per update; otherwise the running statistics do
    not change.

    Args:
        model: the model, which is converted in place, unless it is itself a batch norm.
        group_size: number of samples per group, >= 1.

    Returns:
        The model; if ``model`` is itself a batch norm, its replacement.

    Raises:
        UserError: if a batch norm cannot be converted: a subclass (such as SyncBatchNorm), or one without affine parameters,
            running statistics or momentum.
    """
    converted: dict[nn.Module, nn.Module] = {}

    def convert(module: nn.Module, name: str) -> nn.Module:
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            for child_name, child in module.named_children():
                replacement = convert(child, f"{name}.{child_name}".lstrip("."))
                if replacement is not child:
                    setattr(module, child_name, replacement)
            return module
        if module not in converted:  # a module that occurs in two places must remain a single module
            converted[module] = _converted(module, group_size, name)
        return converted[module]

    return convert(model, "")


def _converted(norm: nn.modules.batchnorm._BatchNorm, group_size: int, name: str) -> nn.Module:
    kinds: dict[type, type[_GhostBatchNorm]] = {
        nn.BatchNorm1d: GhostBatchNorm1d,
        nn.BatchNorm2d: GhostBatchNorm2d,
        nn.BatchNorm3d: GhostBatchNorm3d,
    }
    kind = kinds.get(type(norm))
    if kind is None or not norm.affine or not norm.track_running_stats or norm.momentum is None:
        raise UserError(
            f"model.norm_group_size: module '{name}', {type(norm).__name__}({norm.extra_repr()}), cannot be given "
            "statistics over a fixed number of samples; null leaves the model's batch norms as they are"
        )
    ghost = kind(norm.num_features, group_size, norm.eps, norm.momentum)
    assert norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None
    ghost.to(device=norm.weight.device, dtype=norm.weight.dtype)
    ghost.weight, ghost.bias = norm.weight, norm.bias
    ghost.running_mean, ghost.running_var = norm.running_mean, norm.running_var
    ghost.num_batches_tracked = norm.num_batches_tracked
    return ghost.train(norm.training)


def make_norm(kind: NormKind, channels: int, group_size: int) -> nn.Module:
    """Return a normalisation layer for images (n, c, h, w).

    Args:
        kind: ``batch``, over groups of samples; ``group``, over groups of gcd(c, 16) channels of each sample (Wu & He 2018,
            arXiv:1803.08494, table 3: 16 channels); or ``none``.
        channels: c.
        group_size: number of samples per group of a batch norm.
    """
    if kind == "batch":
        return GhostBatchNorm2d(channels, group_size)
    if kind == "group":
        return nn.GroupNorm(channels // math.gcd(channels, 16), channels)
    return nn.Identity()
