"""Verification of a model's squares against one backward pass per sample."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from largebatch.errors import UserError
from largebatch.moments.scope import FALLBACK, notes, state
from largebatch.moments.tracking import shadows

# Rounding changes float32 squares by 1e-5 of a parameter's largest; rows assigned to a wrong sample, by a tenth or more.
TOLERANCE = 0.01
# Below this share of the model's largest square a gradient may be pure rounding error, as for the keys' bias in attention.
NEGLIGIBLE = 1e-8


def verify(model: nn.Module, loss: Callable[[Any], Tensor], batch: Any, batch_dim: int = 0) -> str | None:
    """Compare the squares of a tracked model with those of one untracked backward pass for each sample, in evaluation mode.

    The model's modes, gradients, buffers and module attributes are restored, and so is the state of random numbers.

    Args:
        model: tracked per sample, with whole parameters: before DDP, FSDP2 or DeepSpeed wraps it.
        loss: takes a batch, calls the model and returns the sum of the samples' losses.
        batch: a tensor, or lists, tuples and dicts of tensors, with at least two samples; four are enough.
        batch_dim: dimension of the samples in the tensors of `batch`.

    Returns:
        None if all squares agree. Else the parameters for which agreement cannot be decided, with the reason, while all others
        agree; or the error of a pass that failed, after which nothing was compared.

    Raises:
        UserError: if squares differ (the message names the parameters and a remedy), or the model is not tracked per sample.
    """
    pairs = shadows(model)
    if not pairs or notes(model).per != "sample":
        raise UserError("verify: expected a model after track(model), which takes the squares of samples")
    leaves = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim > batch_dim]
    num_samples = leaves[0].shape[batch_dim] if leaves else 0
    if num_samples < 2:
        raise UserError(f"verify: expected a batch of two samples or more, got {num_samples}")

    def part(leaf: Any, number: int) -> Any:
        holds = isinstance(leaf, Tensor) and leaf.ndim > batch_dim and leaf.shape[batch_dim] == num_samples
        return leaf.narrow(batch_dim, number, 1) if holds else leaf

    try:
        with _undisturbed(model):
            whole, squares = _gradients(model, loss, batch), {name: shadow.grad for name, shadow in pairs.items()}
        singles = []
        for number in range(num_samples):
            with _undisturbed(model, is_tracked=False):
                singles.append(_gradients(model, loss, tree_map(functools.partial(part, number=number), batch)))
    except UserError:
        raise
    except Exception as error:  # a batch of one is refused, or memory runs out; neither need happen in training
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    owed = {name: torch.stack([grads[name] for grads in singles]) for name in pairs}
    top = {name: float(grads.square().sum(0).max()) if grads.numel() else 0.0 for name, grads in owed.items()}
    faint, mixed, wrong = list[str](), list[str](), list[str]()
    for name, grads in owed.items():
        found, scale = squares[name], top[name]
        if not scale > NEGLIGIBLE * max(top.values()):
            faint.append(name)
        elif not _near(whole[name], grads.sum(0), (num_samples * scale) ** 0.5):
            mixed.append(name)
        elif found is None or not _near(found, grads.square().sum(0), scale):
            wrong.append(name)
    if wrong and not mixed:  # mixing of samples may have changed the squares too
        raise UserError(
            f"track: the squares of {_listed(wrong)} are not those of single samples: the parameter is used outside of the "
            f"model, or the model mixes samples unseen; name the module that does so in {FALLBACK}, or use per='micro_batch'"
        )
    untold = faint + mixed + wrong
    why = "is zero, too small to be told from rounding, or not the sum of its samples' own: they interact, numbers are drawn "
    why += f"at random, or the loss is a mean ({len(untold)} of {len(owed)})"
    return f"the gradient of {_listed(untold)} over a batch {why}" if untold else None


def _near(a: Tensor, b: Tensor, scale: float) -> bool:
    return bool(((a - b).abs() <= TOLERANCE * scale).all())


def _listed(names: list[str]) -> str:
    return "'" + "', '".join(names[:8]) + ("', ..." if len(names) > 8 else "'")


def _gradients(model: nn.Module, loss: Callable[[Any], Tensor], batch: Any) -> dict[str, Tensor]:
    """Return {name: gradient} of a loss, zeros where there is none."""
    model.zero_grad()
    loss(batch).backward()
    named = model.named_parameters()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for name, p in named}


@contextmanager
def _undisturbed(model: nn.Module, is_tracked: bool = True) -> Iterator[None]:
    """Put the model into evaluation mode; afterwards restore its modules' attributes, their contents, and all gradients."""
    modules, tensors = list(model.modules()), [*model.parameters(), *model.buffers()]
    held = [dict(vars(module)) for module in modules]
    contents = [(v, v.copy()) for values in held for v in values.values() if type(v) in (dict, list, set)]
    grads, values = [tensor.grad for tensor in tensors], [buffer.clone() for buffer in model.buffers()]
    for module in modules:
        module.training = isinstance(module, nn.RNNBase)  # cuDNN differentiates only in training mode
    before, state.is_replaying = state.is_replaying, not is_tracked
    try:
        with torch.random.fork_rng({tensor.device for tensor in tensors if tensor.is_cuda}), torch.enable_grad():
            yield
    finally:
        state.is_replaying = before
        for module, own in zip(modules, held, strict=True):
            vars(module).clear()
            vars(module).update(own)
        for value, content in contents:
            value.clear()
            (value.extend if isinstance(value, list) else value.update)(content)
        for tensor, grad in zip(tensors, grads, strict=True):
            tensor.grad = grad
        with torch.no_grad():
            for buffer, value in zip(model.buffers(), values, strict=True):
                buffer.copy_(value)
