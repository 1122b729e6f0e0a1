"""What is used of PyTorch beyond its documented interface does what it is used for."""

from __future__ import annotations

import doctest

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import largebatch.moments
from largebatch.moments import private


class Ask(torch.autograd.Function):
    """The identity, which asks something in its backward."""

    @staticmethod
    def forward(ctx, x, ask):
        ctx.ask = ask
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.ask()
        return grad, None


def test_the_example_at_the_head_of_the_room():
    assert doctest.testmod(largebatch.moments).failed == 0


def test_a_backward_pass_has_a_number_of_its_own():
    numbers, x = [], torch.ones(2, requires_grad=True)
    for _ in range(2):
        Ask.apply(Ask.apply(x, lambda: numbers.append(private.backward_pass())), lambda: None).sum().backward()
    assert private.backward_pass() == -1 and len(set(numbers)) == 2 and min(numbers) >= 0


def test_function_transforms_and_their_stand_ins_are_known():
    seen = []

    def function(x):
        seen.append((private.inside_function_transform(), private.is_transformed(x), private.unwrapped(x)))
        return x * 2

    x = torch.ones(3)
    torch.vmap(function)(x)
    torch.func.grad(lambda x: function(x).sum())(x)
    assert [flags[:2] for flags in seen] == [(True, True)] * 2
    assert all(flags[2].data_ptr() == x.data_ptr() for flags in seen)
    assert not private.inside_function_transform() and not private.is_transformed(x)


def test_a_node_carries_a_dictionary_and_only_engines_identities_have_an_edge():
    x = torch.ones(2, requires_grad=True) * 2
    x.grad_fn.metadata["key"] = 3
    assert x.grad_fn.metadata["key"] == 3 and private.identity_edge(x) is None

    class PostBackwardFunctionForModule(Ask):
        pass

    PostBackwardFunctionForModule.__name__ = "PreBackwardFunctionForModule"
    passed = type("PreBackwardFunctionForModule", (Ask,), {}).apply(x, lambda: None)
    assert private.identity_edge(passed) == (x.grad_fn, 0)


@pytest.mark.parametrize("shape", [(8, 3), (8, 3, 4, 4)])
def test_batch_norm_tells_the_statistics_it_took(shape):
    x = torch.randn(shape)
    norm = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(3)
    mean, factor = private.batch_statistics(norm(x))
    dims = [0, *range(2, len(shape))]
    torch.testing.assert_close(mean, x.mean(dims))
    torch.testing.assert_close(factor, (x.var(dims, correction=0) + norm.eps).rsqrt())
    assert private.batch_statistics(x) is None


def test_a_module_computes_with_other_tensors():
    model, ones = nn.Linear(2, 2, bias=False), torch.ones(2, 2)
    with private.with_parameters(model, {"weight": ones}):
        assert torch.equal(model(torch.eye(2)), ones)
    assert isinstance(model.weight, nn.Parameter)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_where_a_part_of_a_model_runs_again(use_reentrant):
    found = []

    def part(x):
        found.append((private.inside_reentrant_checkpoint(), private.inside_custom_backward()))
        return x.sin()

    checkpoint(part, torch.ones(2, requires_grad=True), use_reentrant=use_reentrant).sum().backward()
    assert found == [(False, False), (use_reentrant, use_reentrant)]


def test_the_functions_written_in_python_show_their_operations():
    class Names(TorchFunctionMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.names.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    assert {F.layer_norm, F.multi_head_attention_forward, F.batch_norm, F.embedding} <= set(private.BODIES)
    x = torch.randn(2, 3)
    with Names() as mode:
        output = private.BODIES[F.layer_norm](x, (3,))
    assert "layer_norm" in mode.names and torch.equal(output, F.layer_norm(x, (3,)))
    for function, body in private.BODIES.items():
        assert body.__code__ is function.__code__ and body.__defaults__ == function.__defaults__
