"""How a backward pass computes the squares of single samples' gradients.

A *tap* is an identity function on the output of an operation that uses a parameter, so that the operation and its gradients
remain PyTorch's own. In the backward pass the tap receives the gradient d of the output and stores a `Use` for the parameter,
from which each sample's gradient can be computed. The parameter's *collector*, a graph node that autograd runs after all taps
of the parameter, computes the sum of squares from the uses, and returns it as the gradient of the parameter's shadow.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from largebatch.errors import UserError
from largebatch.moments.private import backward_pass

# Number of elements of samples' gradients computed at a time: on a CPU 256 KiB of float32, which fit into a core's cache (32
# samples of 192 x 768: 7.2 ms one by one, 10 ms seven at a time); elsewhere 4 MiB, to outweigh the cost of a kernel launch.
CACHED_ELEMENTS, HELD_ELEMENTS = 1 << 16, 1 << 20


def statistic_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which squares are summed: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def runs(count: int, numel: int, device: torch.device) -> list[slice]:
    """Split ``count`` samples, whose gradients have ``numel`` elements each, into runs that are computed at a time."""
    step = max(1, (CACHED_ELEMENTS if device.type == "cpu" else HELD_ELEMENTS) // max(1, numel))
    return [slice(first, first + step) for first in range(0, count, step)]


def own_graph() -> AbstractContextManager[Any]:
    """Return a context whose saved tensors no outer hook on saved tensors receives, such as an activation checkpoint's."""
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


@dataclass
class Use:
    """The gradients of an operand, for each of some samples, through one use of the operand.

    Attributes:
        make: takes a run of the samples and returns their gradients, [samples of the run, *shape of the operand].
        runs: slices of the samples whose gradients are computed at a time.
        quick: returns the sum of the samples' squared gradients at less cost, or is None where there is no such way.
    """

    make: Callable[[slice], Tensor]
    runs: Sequence[slice] = ()
    quick: Callable[[], Tensor] | None = None

    def gradient(self, number: int) -> Tensor:
        """Return the gradient of sample `number` of those chosen."""
        return self.make(slice(number, number + 1))[0]

    def squares(self) -> Tensor:
        """Return the sum of the chosen samples' squared gradients."""
        if self.quick is not None:
            return self.quick()
        first, *others = self.runs
        total = self.make(first).square().sum(0)
        for run in others:
            grads = self.make(run)
            total = total.addcmul_(grads[0], grads[0]) if len(grads) == 1 else total.add_(grads.square().sum(0))
        return total


def given(grads: Tensor) -> Use:
    """Return a use with gradients that were computed already, [samples, *shape]."""
    return Use(lambda run: grads[run], [slice(0, len(grads))])


def product(a: Tensor, b: Tensor) -> Use:
    """Return the use with gradients a_s^T b_s, sums over a sample's positions t, of a [samples, t, p], b [samples, t, q]."""
    several = runs(len(a), a.shape[2] * b.shape[2], a.device)

    def at_once() -> Tensor:
        """(a b^T)^2 = a^2 (b^2)^T, one product for all samples."""
        return a[:, 0].square().t() @ b[:, 0].square()

    def one_by_one() -> Tensor:
        """Compute every product in the same memory: new memory for each takes a third more time (1024 x 256)."""
        total = torch.mm(a[0].t(), b[0]).square_()
        buffer = torch.empty_like(total)
        for x, y in zip(a[1:], b[1:], strict=True):
            torch.mm(x.t(), y, out=buffer)
            total.addcmul_(buffer, buffer)
        return total

    quick = at_once if a.shape[1] == 1 else one_by_one if len(several) == len(a) else None
    return Use(lambda run: torch.bmm(a[run].mT, b[run]), several, quick)


class Base:
    """A tracked parameter in one forward pass.

    Args:
        name: the parameter's name, for messages.
        parameter: the tensor that the module computes with (under FSDP2 the gathered one).
        shadow: the parameter whose gradient is to be the sum of squares.
        home: the module that owns the shadow, and the shadow's name there.
    """

    def __init__(self, name: str, parameter: Tensor, shadow: Tensor, home: tuple[nn.Module, str]):
        self.name, self.parameter, self.shadow, self.home = name, parameter, shadow, home
        self.token: Tensor | None = None
        self.reached = -1
        self.num_uses = 0
        self.pending: list[tuple[int, Use, list[int]]] = []
        self.is_done = False

    def check(self) -> None:
        """Raise an error if the shadow has another shape, or if a hook may change the parameter's gradient."""
        if self.shadow.shape != self.parameter.shape:  # under ZeRO-3 the weight of a child, which its parent has read
            owner, name = self.home
            self.shadow = owner._parameters[name]  # type: ignore[assignment]
        if self.shadow.shape != self.parameter.shape and self.shadow.numel() and self.parameter.numel():
            raise UserError(
                f"track: parameter '{self.name}' has another shape than when track() was called; call it again"
            )
        if not all(getattr(hook, "only_looks", False) for hook in (self.parameter._backward_hooks or {}).values()):
            raise UserError(
                f"track: parameter '{self.name}' has a hook (register_hook), which may change its gradient, unseen by "
                "squares of samples; remove it, or use per='micro_batch'"
            )

    def collect(self, now: int) -> Tensor | None:
        """Return the sum of squares of a backward pass, None if it reached no tap of the parameter."""
        if self.reached != now:
            return None
        pending = [(use, samples) for number, use, samples in self.pending if number == now]
        self.pending = []
        both = self.parameter, self.shadow  # a second tracked model or functional_call may share one of them
        if self.is_done or any(getattr(tensor, "_largebatch_pass", None) == now for tensor in both):
            raise UserError(
                f"track: parameter '{self.name}' takes part in two forward passes of one backward pass, or in two backward "
                "passes of one forward pass, so that a sample's gradients cannot be added before they are squared: call the "
                "tracked model once, and backward once, for each batch; or use per='micro_batch'"
            )
        self.is_done = True
        for tensor in both:
            tensor._largebatch_pass = now  # type: ignore[attr-defined]
        with _full_precision(self.parameter.device):
            return self._sum_of_squares(pending)

    def _sum_of_squares(self, pending: list[tuple[Use, list[int]]]) -> Tensor:
        """Square the gradients of each use if no two uses share a sample; else first add those of a sample's uses."""
        dtype = statistic_dtype(self.parameter.dtype)
        numbers = {sample for _, samples in pending for sample in samples}
        if pending and sum(len(samples) for _, samples in pending) == len(numbers):
            parts = (use.squares().reshape(self.parameter.shape) for use, _ in pending)
            return functools.reduce(torch.add, parts).to(dtype)
        total = torch.zeros(self.parameter.shape, dtype=dtype, device=self.parameter.device)
        for sample in sorted(numbers):
            owed = [use.gradient(samples.index(sample)) for use, samples in pending if sample in samples]
            grad = functools.reduce(torch.add, (value.reshape(total.shape).to(dtype) for value in owed))
            total.addcmul_(grad, grad)
        return total


class Operand:
    """A tracked parameter, or a tensor computed only from tracked parameters and constants.

    Args:
        tensor: the tensor itself.
        bases: the parameters it was computed from.
        is_parameter: whether it is a parameter itself.
    """

    def __init__(self, tensor: Tensor, bases: tuple[Base, ...], is_parameter: bool = True):
        self.bases, self.shape, self.dtype = bases, tensor.shape, tensor.dtype
        # Keep neither the tensor, which refers to this, nor a parameter's data, which the backward pass may gather again.
        self.edge = None if is_parameter else torch.autograd.graph.get_gradient_edge(tensor)
        self.data = None if is_parameter else tensor.detach()

    def value(self) -> Tensor:
        """Return the tensor that the operation computed with."""
        return self.bases[0].parameter.detach() if self.data is None else self.data

    def owes(self, use: Use, count: int) -> Iterable[tuple[Base, Use]]:
        """Return a use of each parameter from one of this tensor, now, while the graph between them holds its tensors."""
        if self.edge is None:
            return [(self.bases[0], use)]
        return [(base, self._pulled(base, use, count)) for base in self.bases]

    def pull(self, base: Base, grad: Tensor) -> Tensor:
        """Return the gradient of a parameter that a gradient of this tensor gives."""
        assert self.edge is not None
        grad = grad.reshape(self.shape).to(self.dtype)
        (pulled,) = torch.autograd.grad(self.edge, base.parameter, grad, retain_graph=True, allow_unused=True)
        found = base.parameter.new_zeros(base.parameter.shape) if pulled is None else pulled.to_dense()
        return found.to(statistic_dtype(found.dtype))

    def _pulled(self, base: Base, use: Use, count: int) -> Use:
        grads = (self.pull(base, use.gradient(number)) for number in range(count))
        if base.num_uses > 1:
            return given(torch.stack(list(grads)))
        total = functools.reduce(Tensor.add_, (grad.square() for grad in grads))
        return Use(lambda _: total, quick=lambda: total)  # used once: only squares are needed


Left = Callable[[Tensor, tuple[Tensor, ...]], "Sequence[tuple[Operand, Use]]"]


class Tap(torch.autograd.Function):
    """The identity on an operation's output that is described at the head of this module."""

    @staticmethod
    def forward(
        ctx: Any,
        leave: Left,
        samples: list[int],
        bases: Sequence[Base],
        output: Tensor,
        num_saved: int,
        *tensors: Tensor,
    ) -> Tensor:
        """Return `output`; `tensors` are those that `leave` takes beside the gradient, then the collectors' tokens."""
        ctx.leave, ctx.samples, ctx.bases = leave, samples, bases
        ctx.num_tensors = len(tensors)
        ctx.save_for_backward(*tensors[:num_saved])
        return output.detach()  # which shares memory and is no view to autograd, so that a ReLU in place may follow

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient unchanged, and store the uses of the parameters for their collectors."""
        if torch.is_grad_enabled():
            raise UserError(
                "track: backward with create_graph=True through a model tracked per sample would square gradients of "
                "gradients too; use per='micro_batch', or an untracked copy for a gradient penalty"
            )
        now = backward_pass()
        for base in ctx.bases:
            base.reached = now
        if ctx.samples:
            with _full_precision(grad.device):
                for operand, use in ctx.leave(grad, ctx.saved_tensors):
                    for base, owed in operand.owes(use, len(ctx.samples)):
                        base.pending.append((now, owed, ctx.samples))
        return (None, None, None, grad, None, *[None] * ctx.num_tensors)


class Collect(torch.autograd.Function):
    """The graph node behind all taps of some parameters: those that the same operation was the first to use."""

    @staticmethod
    def forward(ctx: Any, bases: Sequence[Base], *shadows: Tensor) -> Tensor:
        """Return the token that every tap of the parameters takes."""
        ctx.bases = bases
        ctx.set_materialize_grads(False)
        return shadows[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the sums of squares."""
        now = backward_pass()
        return (None, *[base.collect(now) for base in ctx.bases])


def collectors(bases: Sequence[Base]) -> list[Tensor]:
    """Return the tokens of these parameters: empty tensors whose graph nodes run after every tap of the parameters."""
    new = [base for base in bases if base.token is None]
    for base in new:
        base.check()
    if new:
        token = Collect.apply(new, *[base.shadow for base in new])
        for base in new:
            base.token = token
    return list({id(base.token): base.token for base in bases if base.token is not None}.values())


def _full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Switch autocast off, which a backward pass inherits from its caller."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()
