"""All uses of PyTorch beyond its documented interface, each with its reason; tested with PyTorch 2.11 to 2.14.

tests/moments/test_private.py checks that each behaves as expected here.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction


def backward_pass() -> int:
    """Return the number of the backward pass that is running, or -1 outside of any."""
    return torch._C._current_graph_task_id()


def inside_function_transform() -> bool:
    """Whether a torch.func transform is active: its gradients do not go to ``.grad``, so no squares can be kept."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_transformed(tensor: Tensor) -> bool:
    """Whether a tensor is a wrapper of torch.func.vmap or another transform."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def unwrapped(tensor: Tensor) -> Tensor:
    """Return the tensor inside a transform's wrappers."""
    while is_transformed(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


# Identity functions that FSDP2 and DeepSpeed apply to a module's inputs and outputs, to run code in the backward pass.
_IDENTITIES = {
    "RegisterPostBackwardFunctionBackward",
    "PreBackwardFunctionForModuleBackward",
    "PostBackwardFunctionModuleBackward",
}


def identity_edge(tensor: Tensor) -> tuple[Any, int] | None:
    """Return the graph node, and the number of its output, behind an engine's identity function; None for other tensors."""
    edge: tuple[Any, int] = tensor.grad_fn, tensor.output_nr
    if type(edge[0]).__name__ not in _IDENTITIES:
        return None
    while type(edge[0]).__name__ in _IDENTITIES:
        edges = [further for further in edge[0].next_functions if further[0] is not None]
        edge = edges[min(edge[1], len(edges) - 1)]
    return edge


def batch_statistics(output: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the mean and 1 / sd that a batch norm used in training, or None if its graph node does not hold them."""
    node = output.grad_fn
    mean, factor = getattr(node, "_saved_result1", None), getattr(node, "_saved_result2", None)
    if mean is None or factor is None or mean.numel() == 0 or mean.numel() != factor.numel():
        return None
    return mean.detach(), factor.detach()


def with_parameters(module: nn.Module, parameters: dict[str, Tensor]) -> AbstractContextManager[None]:
    """Let a module compute with other tensors: as torch.func.functional_call, but without calling the module's hooks."""
    return torch.nn.utils.stateless._reparametrize_module(module, parameters, tie_weights=True)


def _is_running(code: types.CodeType) -> bool:
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None


def inside_reentrant_checkpoint() -> bool:
    """Whether the backward pass of a re-entrant activation checkpoint runs a part of the model again."""
    return _is_running(CheckpointFunction.backward.__code__)


def inside_custom_backward() -> bool:
    """Whether a custom function's backward is running; it may run another backward pass, as re-entrant checkpoints do."""
    return _is_running(torch.autograd.function.BackwardCFunction.apply.__code__)


def _never(*_: Any) -> bool:
    return False


def _body(function: types.FunctionType) -> types.FunctionType:
    skip = dict.fromkeys(("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"), _never)
    names = {**function.__globals__, **skip}
    copy = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


# The functions of torch.nn.functional that are written in Python begin by passing themselves to the active mode; these copies
# run only their bodies, so that the mode receives the operations inside.
BODIES: dict[Any, Callable[..., Any]] = {
    function: _body(function)
    for function in vars(F).values()
    if isinstance(function, types.FunctionType) and "has_torch_function" in " ".join(function.__code__.co_names)
}
