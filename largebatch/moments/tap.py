"""The autograd functions by which a backward pass carries the squares of per-sample gradients.

A *tap* stands on the output of an operation whose parameters were detached: it hands the output's gradient on to the
operation's other inputs, whose gradients stay PyTorch's own business, and turns the same gradient into the two things
a parameter is owed, sum_b g_b for the parameter and sum_b g_b^2 for its shadow. A parameter met once in a forward pass
gets both straight from its tap. The gradients of one met more often must be added per sample before they are squared,
so its taps leave their parts with the parameter's *collector*, the graph node that autograd runs after all of them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from largebatch.section import UserError

# Elements of per-sample gradients held at a time: 16 MiB of float32, about a processor's last-level cache.
CHUNK_ELEMENTS = 1 << 22


def statistic_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type squares are summed in: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# The samples of a tensor that holds a run of them only: (first, end).
Part = tuple[int, int]


def pad_samples(grads: Tensor, part: Part | None, num_samples: int) -> Tensor:
    """Return the per-sample gradients [end - first, ..] of a part as [n, ..], zero for the other samples."""
    if part is None:
        return grads
    first, end = part
    return F.pad(grads, [*[0, 0] * (grads.ndim - 1), first, num_samples - end])


class Operation:
    """One call of an operation: what its backward must know besides tensors.

    A subclass gives `per_sample`; `moments` may be overridden where the two sums come cheaper than through it.

    Attributes:
        num_samples: n, samples in the call.
        roles: one name for each tracked operand of the call, such as ("weight", "bias").
        operands: the tracked operands, in the order of `roles`; empty while torch.compile traces.
        spread: while torch.compile traces, the roles whose per-sample gradients go to a `Spread`.
    """

    def __init__(self, num_samples: int, roles: tuple[str, ...] = ("weight",)):
        self.num_samples = num_samples
        self.roles = roles
        self.operands: tuple[Operand, ...] = ()
        self.spread: tuple[str, ...] = ()

    def prepare(self, grad: Tensor, saved: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return what `per_sample` and `moments` read: here the output's gradient, then the saved tensors."""
        return (grad, *saved)

    def per_sample(self, role: str, ready: tuple[Tensor, ...], lo: int, hi: int) -> Tensor:
        """Return the gradients of samples lo to hi, [hi - lo, *operand.shape]."""
        raise NotImplementedError

    def add_per_sample(self, role: str, ready: tuple[Tensor, ...], lo: int, hi: int, out: Tensor) -> None:
        """Add the gradients of samples lo to hi to `out` [hi - lo, *operand.shape], in place."""
        out.add_(self.per_sample(role, ready, lo, hi).reshape(out.shape))

    def moments(self, role: str, ready: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Return (sum_b g_b, sum_b g_b^2), each of the operand's shape."""
        first = self.per_sample(role, ready, 0, 1)
        limit = CHUNK_ELEMENTS * (64 if torch.compiler.is_compiling() else 1)  # a trace unrolls the loop
        step = max(1, limit // max(1, first.numel()))
        if step >= self.num_samples:
            return sums(self.per_sample(role, ready, 0, self.num_samples))
        total, squares = sums(first)
        for lo in range(1, self.num_samples, step):
            part, part_squares = sums(self.per_sample(role, ready, lo, min(lo + step, self.num_samples)))
            total, squares = total + part, squares + part_squares
        return total, squares

    def all_moments(self, roles: list[str], ready: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor]]:
        """Return `moments` of each of the roles."""
        return [self.moments(role, ready) for role in roles]


def sums(grads: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of `grads` [n, *shape] over n and the sum of their squares, the latter at least in float32."""
    wide = grads.to(statistic_dtype(grads.dtype))
    return wide.sum(0), wide.square().sum(0)


# Plain classes, since torch.compile does not trace a dataclass with default factories.


class Count:
    """How often a tensor was handed to an operation in this forward pass."""

    def __init__(self) -> None:
        self.uses = 0


class Base:
    """A tracked parameter in one forward pass.

    Attributes:
        name: for messages.
        parameter: the tensor the module computes with (under FSDP2 the gathered one).
        shadow: the parameter whose gradient is to be the sum of squares.
        home: the module that owns the shadow, and its name there.
        is_shared: whether it is known to be used more than once in a forward pass; read by torch.compile alone.
        spread: under torch.compile, the output of `Spread` that stands in for a shared parameter.
        count: its uses.
        token: an empty tensor from the graph node that runs after every tap of the parameter; None before the first.
        pending: what the taps left for that node.
    """

    def __init__(self, name: str, parameter: Tensor, shadow: Tensor, is_shared: bool, home: tuple[nn.Module, str]):
        self.name = name
        self.is_shared = is_shared
        self.spread: Tensor | None = None
        self.parameter = parameter
        self.shadow = shadow
        self.home = home
        self.count = Count()
        self.token: Tensor | None = None
        self.pending: list[tuple[Operation, str, tuple[Tensor, ...], Tensor]] = []

    def gather(self) -> None:
        """Make the shadow whole where the parameter is: under ZeRO-3 the weight of a child, which its parent has read."""
        if self.shadow.shape != self.parameter.shape:
            owner, name = self.home
            self.shadow = owner._parameters[name]  # type: ignore[assignment]
        if self.shadow.shape != self.parameter.shape and self.shadow.numel() and self.parameter.numel():
            raise UserError(
                f"track: parameter '{self.name}' has another shape than when track() was called; call it again"
            )


class Operand:
    """A tracked parameter, or a tensor computed from tracked parameters alone.

    Attributes:
        tensor: the tensor itself.
        shadow: where its squares go, if every element of it is one element of one parameter and none appears twice;
            None otherwise: its per-sample gradients must then be pulled back to the parameters before squaring.
        bases: the parameters it was computed from.
        counts: the counts that a use of it raises.
        guards: the counts that must stand at one for its squares to be complete in themselves.
    """

    def __init__(
        self,
        tensor: Tensor,
        shadow: Tensor | None,
        bases: tuple[Base, ...],
        counts: tuple[Count, ...],
        guards: tuple[Count, ...],
    ):
        self.tensor = tensor
        self.shadow = shadow
        self.bases = bases
        self.counts = counts
        self.guards = guards

    def use(self) -> None:
        """Count one more use."""
        for count in self.counts:
            count.uses += 1

    def targets(self) -> tuple[Tensor, Tensor]:
        """Return where a tap sends the gradient and the squares.

        Without a shadow of its own both come from the collector. The tap then gets no way to the tensor's own graph,
        through which autograd would go first, freeing what the collector is to differentiate.
        """
        if self.shadow is None:
            return self.tensor.detach(), self.tensor.detach()
        return self.tensor, self.shadow

    @property
    def is_alone(self) -> bool:
        """Whether the sum of squares of this one use is the parameter's whole statistic."""
        return self.shadow is not None and all(guard.uses == 1 for guard in self.guards)


def _deliver(operation: Operation, grad: Tensor, saved: tuple[Tensor, ...]) -> list[Tensor | None]:
    """Return, for each operand in turn, its gradient and its shadow's, None for what is left to the collector."""
    ready = operation.prepare(grad, saved)
    results: list[Tensor | None] = []
    if operation.spread:
        for role in operation.roles:
            if role in operation.spread:
                results.extend((operation.per_sample(role, ready, 0, operation.num_samples), None))
            else:
                results.extend(operation.moments(role, ready))
        return results
    alone = [not operation.operands or operand.is_alone for operand in _operands(operation)]
    direct = [role for role, is_alone in zip(operation.roles, alone, strict=True) if is_alone]
    moments = iter(operation.all_moments(direct, ready) if direct else [])
    for role, is_alone, operand in zip(operation.roles, alone, _operands(operation), strict=True):
        if is_alone:
            results.extend(next(moments))
            continue
        results.extend((None, None))
        assert operand is not None
        for base in operand.bases:
            base.pending.append((operation, role, ready, operand.tensor))
    return results


def _operands(operation: Operation) -> tuple[Any, ...]:
    return operation.operands or (None,) * len(operation.roles)


def refuse_double_backward() -> None:
    """Raise under create_graph=True: the parameters were detached, so the gradients of gradients would lack them.

    Raises:
        UserError: with the ways out.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise UserError(
            "track: backward with create_graph=True through a model tracked per sample has no gradients of gradients for its "
            "parameters; use track(model, per='micro_batch'), or an untracked copy for a gradient penalty"
        )


class Tap(torch.autograd.Function):
    """Identity on an operation's output; its backward is described at the head of this module."""

    @staticmethod
    def forward(
        ctx: Any, operation: Operation, num_saved: int, output: Tensor, token: Tensor | None, *tensors: Tensor
    ) -> Tensor:
        """Return `output`; `tensors` are the saved tensors, then (operand, shadow) for each role."""
        ctx.operation = operation
        ctx.num_saved = num_saved
        ctx.save_for_backward(*tensors[:num_saved])
        # detach() shares memory without being a view to autograd, so that an in-place ReLU may follow; the compiler
        # wants no aliases from a Function and removes the copy by itself.
        return output.clone() if torch.compiler.is_compiling() else output.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Hand `grad` on and add the operands' gradients and squares."""
        refuse_double_backward()
        if not torch.compiler.is_compiling() and torch.is_autocast_enabled(grad.device.type):
            with torch.autocast(grad.device.type, enabled=False):
                delivered = _deliver(ctx.operation, grad, ctx.saved_tensors)
        else:
            delivered = _deliver(ctx.operation, grad, ctx.saved_tensors)
        return (None, None, grad, None, *([None] * ctx.num_saved), *delivered)


class Expand(torch.autograd.Function):
    """Lay an operand out once per sample, so that an elementwise operation's own backward tells the samples apart.

    [1, *shape] -> [n, *shape] at dimension `dim`; the gradient that comes back is the per-sample gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, operation: Operation, dim: int, rows: int, token: Tensor | None, operand: Tensor, shadow: Tensor
    ) -> Tensor:
        """Return `operand`, whose size at `dim` is one, expanded to `rows` there."""
        ctx.operation = operation
        ctx.dim = dim
        sizes = list(operand.shape)
        sizes[dim] = rows
        expanded = operand.detach().expand(sizes)
        return expanded.clone() if torch.compiler.is_compiling() else expanded.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Sum the samples' gradients, and their squares."""
        refuse_double_backward()
        grad = pad_samples(grad.movedim(ctx.dim, 0), ctx.operation.part, ctx.operation.num_samples)
        if len(grad) != ctx.operation.num_samples:  # several rows a sample
            grad = grad.reshape(ctx.operation.num_samples, -1, *grad.shape[1:]).sum(1)
        grad = grad.unsqueeze(ctx.dim + 1)
        delivered = _deliver(ctx.operation, grad, ())
        return (None, None, None, None, *delivered)


class Expanded(Operation):
    """The operation of `Expand`: its output's gradient is the per-sample gradient, of all samples or of a part."""

    def __init__(self, num_samples: int, part: Part | None = None):
        super().__init__(num_samples)
        self.part = part

    def per_sample(self, role: str, ready: tuple[Tensor, ...], lo: int, hi: int) -> Tensor:
        """Return rows lo to hi of the gradient."""
        return ready[0][lo:hi]


class Spread(torch.autograd.Function):
    """Under torch.compile, the place where the per-sample gradients of a parameter used several times are added.

    A graph cannot leave parts with a collector, so that they are held for all samples at once: [n, *shape].
    """

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, shadow: Tensor, num_samples: int) -> Tensor:
        """Return a tensor [n, *shape] of no meaning."""
        return torch.zeros((num_samples, *parameter.shape), dtype=shadow.dtype, device=parameter.device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """Sum the samples' gradients, and their squares."""
        return *sums(grad), None


class Square(torch.autograd.Function):
    """Identity on a parameter; backward returns (g, g^2): the statistic of whole micro-batches."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, shadow: Tensor) -> Tensor:
        """Return `parameter`."""
        ctx.dtype = shadow.dtype
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient and its square."""
        return grad, grad.to(ctx.dtype).square()


class Collect(torch.autograd.Function):
    """The node behind all taps of the given parameters: squares the sums over their uses."""

    @staticmethod
    def forward(ctx: Any, bases: tuple[Base, ...], *parameters_and_shadows: Tensor) -> Tensor:
        """Return the token that every tap of these parameters takes."""
        ctx.bases = bases
        ctx.set_materialize_grads(False)
        return torch.empty(0, device=parameters_and_shadows[0].device)

    @staticmethod
    def backward(ctx: Any, _: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return gradient and squares of the parameters whose taps left anything here."""
        results: list[Tensor | None] = [None]
        for base in ctx.bases:
            pending, base.pending = base.pending, []
            results.extend(_join(base, pending) if pending else (None, None))
        return tuple(results)


def _join(base: Base, pending: list[tuple[Operation, str, tuple[Tensor, ...], Tensor]]) -> tuple[Tensor, Tensor]:
    """Return sum_b (sum over uses g_b) and the sum of its squares."""
    parameter = base.parameter
    num_samples = pending[0][0].num_samples
    if any(operation.num_samples != num_samples for operation, *_ in pending):
        sizes = sorted({operation.num_samples for operation, *_ in pending})
        raise UserError(
            f"track: parameter '{base.name}' is used with batches of {sizes} samples in one forward pass, so its "
            "gradients cannot be added per sample; use track(model, per='micro_batch')"
        )
    dtype = statistic_dtype(parameter.dtype)
    step = max(1, min(num_samples, CHUNK_ELEMENTS // max(1, parameter.numel())))
    total = torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
    squares = torch.zeros_like(total)
    for lo in range(0, num_samples, step):
        hi = min(lo + step, num_samples)
        grads = torch.zeros(hi - lo, *parameter.shape, dtype=dtype, device=parameter.device)
        for operation, role, ready, tensor in pending:
            if tensor is parameter:
                operation.add_per_sample(role, ready, lo, hi, grads)
                continue
            parts = operation.per_sample(role, ready, lo, hi).reshape(hi - lo, *tensor.shape).to(tensor.dtype)
            for grad, part in zip(grads, parts, strict=True):
                (pulled,) = torch.autograd.grad(tensor, parameter, part, retain_graph=True)
                grad.add_(pulled)
        total.add_(grads.sum(0))
        squares.add_(grads.square_().sum(0))
    return total, squares
