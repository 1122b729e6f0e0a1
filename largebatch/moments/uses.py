"""How a backward pass carries the squares of single samples.

A *tap* stands on the output of an operation that uses a parameter. It is an identity: the operation runs as PyTorch runs it,
and its gradients are PyTorch's own. In the backward pass the tap sees the gradient d of the output and leaves with the
parameter what a sample's gradient is made of, a `Use`. The parameter's *collector*, the node that autograd runs after all its
taps, makes the sum of squares of them, and returns it as the gradient of the parameter's shadow.

For y = F.linear(x, w) with n samples of t positions, a sample's gradient is the product d[t, o]^T x[t, i]; the tap leaves
`Product(d, x)`. Used once, the square is taken product by product. Where w is used again, as the output layer of its own
embedding, the gradients of a sample have to be added before they are squared, so that the collector goes sample by sample.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from largebatch.errors import UserError
from largebatch.moments.marks import Batch
from largebatch.moments.operations import CASTS
from largebatch.moments.private import backward_pass

# Elements of samples' gradients made at a time: on a processor 256 KiB of float32, which a core's cache holds (32 samples of
# 192 x 768: 7.2 ms one by one, 10 ms by sevens); elsewhere 4 MiB, so that a launch is worth its while.
CACHED_ELEMENTS, HELD_ELEMENTS = 1 << 16, 1 << 20


def statistic_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type squares are summed in: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Use(ABC):
    """What one use of an operand owes to each of some samples: `gradient` of one, and `squares`, their sum."""

    @abstractmethod
    def gradient(self, number: int) -> Tensor:
        """Return the gradient of sample `number` of those chosen, of the operand's shape."""

    @abstractmethod
    def squares(self, weight: float) -> Tensor:
        """Return the sum of the chosen samples' squared gradients, times a weight."""


class Given(Use):
    """Gradients that are held: [samples, *shape]."""

    def __init__(self, grads: Tensor):
        self.grads = grads

    def gradient(self, number: int) -> Tensor:
        """Return a row."""
        return self.grads[number]

    def squares(self, weight: float) -> Tensor:
        """Sum the rows' squares."""
        return self.grads.square().sum(0).mul_(weight)


class Product(Use):
    """a_s^T b_s over the positions of a sample: a [samples, t, p], b [samples, t, q]."""

    def __init__(self, a: Tensor, b: Tensor):
        self.a, self.b = a, b

    def gradient(self, number: int) -> Tensor:
        """Return one product [p, q]."""
        return self.a[number].t() @ self.b[number]

    def squares(self, weight: float) -> Tensor:
        """With one position (a b^T)^2 = a^2 (b^2)^T, one product for all samples; else as many at a time as the cache holds."""
        a, b = self.a, self.b
        if a.shape[1] == 1:
            return torch.addmm(a.new_empty(()), a[:, 0].square().t(), b[:, 0].square(), beta=0, alpha=weight)
        a = a if weight == 1 else a * math.sqrt(weight)
        count, step = a.shape[0], (CACHED_ELEMENTS if a.is_cpu else HELD_ELEMENTS) // (a.shape[2] * b.shape[2] or 1)
        if count > 1 and step > 1:
            runs = (slice(first, first + step) for first in range(0, count, step))
            return functools.reduce(Tensor.add_, (torch.bmm(a[run].mT, b[run]).square_().sum(0) for run in runs))
        total = torch.mm(a[0].t(), b[0]).square_()
        buffer = torch.empty_like(total) if count > 1 else total
        for number in range(1, count):
            torch.mm(a[number].t(), b[number], out=buffer)
            total.addcmul_(buffer, buffer)
        return total


class Looped(Use):
    """Gradients made one sample at a time by a function of its number."""

    def __init__(self, make: Callable[[int], Tensor], count: int):
        self.make, self.count = make, count

    def gradient(self, number: int) -> Tensor:
        """Make one."""
        return self.make(number)

    def squares(self, weight: float) -> Tensor:
        """Make all, in turn."""
        total = self.make(0).square_().mul_(weight)
        for number in range(1, self.count):
            grad = self.make(number)
            total.addcmul_(grad, grad, value=weight)
        return total


class Base:
    """A tracked parameter in one forward pass.

    Args:
        name: for messages.
        parameter: the tensor that the module computes with (under FSDP2 the gathered one).
        shadow: the parameter whose gradient is to be the sum of squares.
        home: the module that owns the shadow, the shadow's name there, and a place to note its last backward pass.
        batch: the samples.
    """

    def __init__(
        self, name: str, parameter: Tensor, shadow: Tensor, home: tuple[nn.Module, str, dict[str, int]], batch: Batch
    ):
        self.name, self.parameter, self.shadow, self.home, self.batch = name, parameter, shadow, home, batch
        self.token: Tensor | None = None
        self.reached = -1
        self.pending: list[tuple[int, Operand, Use, list[int]]] = []
        self.is_done = False

    def check(self) -> None:
        """Raise where squares of the parameter would have no place, or not fit its gradient."""
        if self.shadow.shape != self.parameter.shape:  # under ZeRO-3 the weight of a child, which its parent has read
            owner, name, _ = self.home
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
        pending = [(operand, use, samples) for number, operand, use, samples in self.pending if number == now]
        self.pending = []
        name, passes = self.home[1:]
        if self.is_done or now in (passes.get(name), getattr(self.parameter, "_largebatch_pass", None)):
            raise UserError(
                f"track: parameter '{self.name}' takes part in two forward passes of one backward pass, or in two backward "
                "passes of one forward pass, so that what they owe to a sample cannot be added before it is squared: call the "
                "tracked model once, and backward once, for each batch; or use per='micro_batch'"
            )
        self.is_done, passes[name] = True, now
        self.parameter._largebatch_pass = now  # type: ignore[attr-defined]  # of another tracked model with the same weight
        with _full_precision(self.parameter.device):
            return _sum_of_squares(self, pending)


def collectors(bases: Sequence[Base]) -> list[Tensor]:
    """Return empty tensors from the nodes of the graph that run behind every tap of these parameters."""
    new = [base for base in bases if base.token is None]
    for base in new:
        base.check()
    if new:
        token = Collect.apply(new, *[base.shadow for base in new])
        for base in new:
            base.token = token
    return list({id(base.token): base.token for base in bases if base.token is not None}.values())


class Operand:
    """A tracked parameter, or a tensor computed from tracked parameters and constants alone.

    Args:
        tensor: the tensor itself.
        bases: the parameters it was computed from.
        recipe: (function, args, kwargs, number of the result or None), with operands in the places of their tensors; None for
            a parameter itself.
        is_rearranged: whether each of its elements is one of one parameter's, and none occurs twice: then squares go back to
            their places as gradients do.
    """

    def __init__(self, tensor: Tensor, bases: tuple[Base, ...], recipe: Any = None, is_rearranged: bool = True):
        self.tensor, self.bases, self.recipe, self.is_rearranged = tensor, bases, recipe, is_rearranged
        self.version = tensor._version

    def again(self, leaf_of: dict[int, Tensor], replace: Callable[[Any], Any] | None = None) -> Tensor:
        """Compute it anew from other tensors, by id of the base, in the places of the parameters.

        Args:
            leaf_of: those tensors.
            replace: a function in the place of one that must not run, such as a cast of squares.
        """
        if self.recipe is None:
            return leaf_of[id(self.bases[0])]
        func, args, kwargs, number = self.recipe

        def fill(value: Any) -> Any:
            if isinstance(value, Operand):
                return value.again(leaf_of, replace)
            return type(value)(map(fill, value)) if type(value) in (list, tuple) else value

        output = (replace(func) if replace else func)(
            *fill(args), **{key: fill(value) for key, value in kwargs.items()}
        )
        return output if number is None else output[number]

    def puller(self, base: Base) -> Callable[[Tensor], Tensor]:
        """Return the function from a gradient of this tensor to that of a parameter.

        Raises:
            UserError: if the tensor does not come out the same again.
        """
        if self.recipe is None:
            return lambda grad: grad
        leaves = {id(b): b.parameter.detach().requires_grad_() for b in self.bases}
        devices = {b.parameter.device for b in self.bases if b.parameter.is_cuda}
        with torch.enable_grad(), torch.random.fork_rng(devices):
            before = torch.get_rng_state()
            tensor = self.again(leaves)
            is_random = not torch.equal(torch.get_rng_state(), before)
        if is_random or self.version != self.tensor._version or not torch.equal(tensor.detach(), self.tensor.detach()):
            raise UserError(
                f"track: a tensor computed from parameter '{base.name}' was drawn at random, or changed in place, or its parts "
                "were; per='micro_batch' takes any model"
            )
        leaf = leaves[id(base)]

        def pull(grad: Tensor) -> Tensor:
            grad = grad.to(tensor.dtype).reshape(tensor.shape)
            (pulled,) = torch.autograd.grad(tensor, leaf, grad, retain_graph=True, allow_unused=True)
            return torch.zeros_like(leaf) if pulled is None else pulled

        return pull

    def place(self, base: Base, values: Tensor) -> Tensor:
        """Return values of the elements of a rearranged tensor at their places in the parameter, zero elsewhere."""
        if self.recipe is None:
            return values.reshape(base.parameter.shape)
        with torch.enable_grad():
            leaf = torch.zeros(base.parameter.shape, dtype=values.dtype, device=values.device, requires_grad=True)
            others = {id(b): b.parameter.detach().to(values.dtype) for b in self.bases}
            tensor = self.again({**others, id(base): leaf}, lambda func: _unchanged if func in CASTS else func)
        (placed,) = torch.autograd.grad(tensor, leaf, values.reshape(tensor.shape))
        return placed


def _unchanged(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
    return tensor


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
        """Return `output`; `tensors` are those that `leave` takes with the gradient, then the collectors'."""
        ctx.leave, ctx.samples, ctx.bases = leave, samples, bases
        ctx.num_tensors = len(tensors)
        ctx.save_for_backward(*tensors[:num_saved])
        return output.detach()  # which shares memory and is no view to autograd, so that a ReLU in place may follow

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Hand the gradient on, and leave what it says of each sample."""
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
                    for base in operand.bases:
                        base.pending.append((now, operand, use, ctx.samples))
        return (None, None, None, grad, None, *[None] * ctx.num_tensors)


class Collect(torch.autograd.Function):
    """The node behind all taps of some parameters, those that one operation was the first to use."""

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


def _full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Switch autocast off, which a backward pass inherits from its caller."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


def _sum_of_squares(base: Base, pending: list[tuple[Operand, Use, list[int]]]) -> Tensor:
    dtype = statistic_dtype(base.parameter.dtype)
    if not pending:
        return torch.zeros(base.parameter.shape, dtype=dtype, device=base.parameter.device)
    if not all(operand.is_rearranged for operand, *_ in pending) or not _are_disjoint(base, pending):
        return _together(base, pending)
    parts = (operand.place(base, use.squares(base.batch.weight)) for operand, use, _ in pending)
    return functools.reduce(torch.add, parts).to(dtype)


def _together(base: Base, pending: list[tuple[Operand, Use, list[int]]]) -> Tensor:
    """Add what the uses owe to a sample, and square that, sample by sample."""
    uses = [
        (operand.puller(base), use, {sample: number for number, sample in enumerate(samples)})
        for operand, use, samples in pending
    ]
    dtype = statistic_dtype(base.parameter.dtype)
    total = torch.zeros(base.parameter.shape, dtype=dtype, device=base.parameter.device)
    for sample in sorted({sample for *_, numbers in uses for sample in numbers}):
        grad: Tensor | None = None
        for pull, use, numbers in uses:
            if sample in numbers:
                pulled = pull(use.gradient(numbers[sample])).reshape(total.shape).to(dtype)
                grad = pulled if grad is None else grad + pulled
        assert grad is not None
        total.addcmul_(grad, grad, value=base.batch.weight)
    return total


def _are_disjoint(base: Base, pending: list[tuple[Operand, Use, list[int]]]) -> bool:
    """Whether no two uses of rearranged operands owe anything to the same element of the same sample."""
    runs = [set(samples) for *_, samples in pending]
    if sum(map(len, runs)) == len(set().union(*runs)):
        return True
    if not all(operand.recipe for operand, *_ in pending):
        return False
    taken = torch.zeros(base.parameter.shape, device=base.parameter.device)
    for operand, *_ in pending:
        taken += operand.place(base, torch.ones(operand.tensor.shape, device=taken.device))
    return float(taken.max()) <= 1.0
