"""Holding the squares of a model against one backward pass a sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from largebatch.moments.presence import check_statistics
from largebatch.moments.scope import FALLBACK, notes, state
from largebatch.moments.tracking import shadows
from largebatch.section import UserError

# Rounding moves squares in float32 by 1e-5 of a parameter's largest; rows given to the wrong sample, by a tenth and more.
TOLERANCE = 0.01
# Below this share of the model's largest square a gradient is the rounding of zero, as that of a key's bias in attention.
NEGLIGIBLE = 1e-8


def verify(model: nn.Module, loss: Callable[[Any], Tensor], batch: Any, batch_dim: int = 0) -> str | None:
    """Compare the squares of a tracked model with those of one untracked backward pass for each sample.

    The rules of `track` follow the samples through a model by shapes and operations. What they cannot follow they refuse;
    this finds what they would take for something else, in any model, for the price of a few backward passes. The model is
    in evaluation mode meanwhile, and is left as it was: modes, gradients, buffers and random numbers.

    Args:
        model: tracked per sample, with whole parameters: before DDP, FSDP2 or DeepSpeed wraps it.
        loss: takes a batch, calls the model and returns the sum of the samples' losses.
        batch: a tensor, or lists, tuples and dicts of them; two samples or more, four are plenty.
        batch_dim: dimension of the samples in the tensors of `batch`.

    Returns:
        None where they agree; else the reason why that cannot be told: a model whose samples interact, or that draws
        random numbers in evaluation mode, or fails there.

    Raises:
        UserError: if they differ or one is missing, naming the parameters and the way out; or if the model is not tracked
            per sample.
    """
    pairs = shadows(model)
    if not pairs or notes(model).per != "sample":
        raise UserError("verify: expected a model after track(model), which takes the squares of samples")
    parameters = {n: p for n, p in model.named_parameters() if n in pairs}
    leaves = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim > batch_dim]
    num_samples = leaves[0].shape[batch_dim] if leaves else 0
    if num_samples < 2:
        raise UserError(f"verify: expected a batch of two samples or more, got {num_samples}")

    def sample(number: int) -> Any:
        def pick(leaf: Any) -> Any:
            holds = isinstance(leaf, Tensor) and leaf.ndim > batch_dim and leaf.shape[batch_dim] == num_samples
            return leaf.narrow(batch_dim, number, 1) if holds else leaf

        return tree_map(pick, batch)

    def gradients(part: Any) -> dict[str, Tensor]:
        for parameter in model.parameters():
            parameter.grad = None
        loss(part).backward()
        found = {n: p.grad for n, p in parameters.items()}
        return {n: torch.zeros_like(parameters[n]) if g is None else g.to_dense().clone() for n, g in found.items()}

    with _undisturbed(model):
        try:
            whole = gradients(batch)
            check_statistics(model)
            squares = {n: torch.zeros_like(whole[n]) if s.grad is None else s.grad.clone() for n, s in pairs.items()}
            singles = {name: torch.zeros_like(value) for name, value in whole.items()}
            expected = {name: torch.zeros_like(value) for name, value in squares.items()}
            with _untracked():
                for number in range(num_samples):
                    for name, gradient in gradients(sample(number)).items():
                        singles[name] += gradient
                        expected[name] += gradient.to(expected[name].dtype).square()
        except UserError:
            raise
        except Exception as error:  # a batch of one that the model does not take, memory: training may well do without
            return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    least = NEGLIGIBLE * max(float(value.max()) for value in expected.values() if value.numel())
    wrong: dict[str, float] = {}
    for name, value in expected.items():
        scale = max(float(value.max()), least) if value.numel() else 0.0
        if scale == 0:
            continue
        if float((whole[name] - singles[name]).abs().max()) > TOLERANCE * (num_samples * scale) ** 0.5:
            return f"the gradient of '{name}' over a batch is not the sum of its samples' own"
        difference = float((squares[name] - value).abs().max()) / scale
        if not difference <= TOLERANCE:
            wrong[name] = difference
    if wrong:
        listed = "', '".join(list(wrong)[:8]) + ("', ..." if len(wrong) > 8 else "'")
        raise UserError(
            f"track: the squares of '{listed} are not those of single samples (they differ by {max(wrong.values()):.2g} of the "
            "largest): the model moves or mixes rows of its samples in a way that was not seen; name the module that does so, "
            f"or one around it, in {FALLBACK}, or use per='micro_batch'"
        )
    return None


@contextmanager
def _untracked() -> Iterator[None]:
    before, state.is_replaying = state.is_replaying, True
    try:
        yield
    finally:
        state.is_replaying = before


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode, and afterwards put everything back."""
    modes = {module: module.training for module in model.modules()}
    grads = {parameter: parameter.grad for parameter in model.parameters()}
    buffers = {buffer: buffer.clone() for buffer in model.buffers()}
    cuda = {parameter.device for parameter in grads if parameter.is_cuda}
    model.eval()
    for module in modes:
        if isinstance(module, nn.RNNBase):  # cuDNN's have a backward pass in training mode alone
            module.training = True
    try:
        with torch.random.fork_rng(cuda), torch.enable_grad():
            yield
    finally:
        for module, is_training in modes.items():
            module.training = is_training
        for parameter, grad in grads.items():
            parameter.grad = grad
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)
