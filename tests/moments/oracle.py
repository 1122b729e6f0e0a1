"""The slow and obvious reference: one backward pass for each sample."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from largebatch.distributed.presence import check_statistics
from largebatch.moments import grad_sample_sq, track, untrack

# In float64 the rules and the loop differ by the order of sums alone; what is asked for is 1e-10.
EXACT = 1e-10


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest entry of b."""
    scale = b.abs().max().clamp(min=torch.finfo(b.dtype).tiny)
    return float((a.to(b.dtype) - b).abs().max() / scale)


def sample_loss(output: Tensor, target: Tensor) -> Tensor:
    """Sum over one sample's (or several samples') outputs of a loss with a gradient that differs everywhere."""
    return (output * target + output.square() / 2).sum()


def loop(model: nn.Module, inputs: Tensor, target: Tensor, batch_dim: int = 0) -> dict[str, Tensor]:
    """Return (1/B) sum_b g_b^2 from B backward passes of an untracked copy."""
    model = untrack(copy.deepcopy(model))
    batch_size = inputs.shape[batch_dim]
    squares: dict[str, Tensor] = {}
    for b in range(batch_size):
        model.zero_grad()
        sample_loss(model(inputs.narrow(batch_dim, b, 1)), target.narrow(batch_dim, b, 1)).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                squares[name] = squares.get(name, 0) + parameter.grad.to_dense().square() / batch_size
    return squares


def backward(
    model: nn.Module, inputs: Tensor, target: Tensor, call: Callable | None = None, batch_dim: int = 0
) -> None:
    """Backward of the mean loss."""
    for parameter in model.parameters():
        parameter.grad = None
    output = (model if call is None else call)(inputs)
    (sample_loss(output.double(), target) / inputs.shape[batch_dim]).backward()


def assert_agrees(
    model: nn.Module,
    inputs: Tensor,
    *,
    tolerance: float = EXACT,
    batch_dim: int = 0,
    reference_inputs: Tensor | None = None,
    expected: dict[str, Tensor] | None = None,
    **options,
) -> nn.Module:
    """Assert that a tracked model's gradients are the untracked ones and its statistic that of the loop."""
    plain = copy.deepcopy(model)
    track(model, batch_dim=batch_dim, **options)
    with torch.no_grad():
        target = torch.randn_like(plain(inputs).double())
    backward(model, inputs, target, batch_dim=batch_dim)
    backward(plain, inputs, target, batch_dim=batch_dim)
    check_statistics(model)
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in plain.named_parameters():
        if parameter.grad is None:
            assert grads[name] is None
        else:
            assert torch.equal(grads[name].to_dense(), parameter.grad.to_dense()), f"gradient of {name}"
    if expected is None:
        exact = copy.deepcopy(plain).double()
        expected = loop(exact, _double(inputs), target, batch_dim)
    statistic = grad_sample_sq(model, inputs.shape[batch_dim])
    assert statistic.keys() == expected.keys()
    for name, squares in expected.items():
        assert distance(statistic[name], squares) <= tolerance, f"statistic of {name}"
    return model


def _double(inputs: Tensor) -> Tensor:
    return inputs.double() if inputs.is_floating_point() else inputs
