"""The bookkeeping of one forward pass: its parameters, its samples, and the taps put on its operations.

Three kinds of tensors are told apart: *operands* (tracked parameters and what is computed from them alone), *batched*
tensors (the inputs of the outermost tracked forward, whatever is computed from them, and anything else that requires a
gradient), and constants, such as `torch.arange(positions)`.

The samples lie along dimension 0 (or the `batch_dim` given to `track`). A dimension of k times as many rows is read as
k rows for each sample, sample by sample, which is what `x.view(batch * tokens, width)` makes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from largebatch.moments.tap import Base, Collect, Expand, Expanded, Operand, Operation, Part, Spread, Tap
from largebatch.section import UserError

Rule = Callable[..., Any]

# Where messages send who needs the exact, slow way.
FALLBACK = "track(model, fallback=[...]) or a config's model.fallback"
WAY_OUT = f"name its module in {FALLBACK}, or use per='micro_batch'"

# Filled by `rule`: a rule takes (scope, *args, **kwargs of the operation).
RULES: dict[Any, Rule] = {}


def rule(*functions: Any) -> Callable[[Rule], Rule]:
    """Register the decorated function as the rule of `functions`."""

    def register(handler: Rule) -> Rule:
        for function in functions:
            RULES[function] = handler
        return handler

    return register


@dataclass
class Tracked:
    """What `track` notes on a module.

    Attributes:
        names: this module's parameters, name -> name of the shadow.
        path: the module's name in the model, for messages.
        owners: the modules of the subtree that own tracked parameters.
        per: "sample" or "micro_batch".
        batch_dim: dimension of the samples in this module's activations.
        distinct: this module's integer buffers in which no value occurs twice, such as position indices.
        shared: the names of those known to be used more than once in a forward pass.
        use_fallback: whether to differentiate the module as a whole, one sample at a time.
    """

    names: dict[str, str]
    path: str
    owners: list[nn.Module]
    per: str
    batch_dim: int
    distinct: set[str]
    shared: set[str]
    use_fallback: bool


def notes(module: nn.Module) -> Tracked:
    """Return what `track` noted on a module."""
    return module.__dict__["_largebatch"]


class Scope:
    """One forward pass of the outermost tracked module.

    Attributes:
        num_samples: n, samples in the pass; None if no input tells.
        batch_dim: dimension of the samples in the module that is running.
        width: rows along `batch_dim` where it is not 0, needed to undo a flattening of (time, batch).
        operands: id of a parameter -> its bookkeeping.
        inputs: the tensors the outermost module was called with; compared by identity, not by id(), which torch.compile
            would guard and so compile anew for every batch.
        distinct: ids of the integer buffers in which no value occurs twice.
        segments: for each re-entrant checkpoint, the ids of its parameters.
        is_used: whether a tap was put anywhere yet.
        has_moved: whether any tensor has its samples elsewhere than along `batch_dim` (`layout`).
        parts: the pieces of the last split of the batch and what came of them, each with its run of samples; compared by
            identity, as the inputs.
    """

    def __init__(self, num_samples: int | None, batch_dim: int):
        self.num_samples = num_samples
        self.batch_dim = batch_dim
        self.width: int | None = None
        self.operands: dict[int, Operand] = {}
        self.inputs: list[Tensor] = []
        self.distinct: set[int] = set()
        self.segments: dict[int, set[int]] = {}
        self.is_used = False
        self.has_moved = False
        self.parts: list[tuple[Tensor, Part]] = []

    def enter(self, module: nn.Module) -> None:
        """Take in the parameters of a module that is about to run, its children's too: it may use them itself.

        They are looked at with `get`: ZeRO-3 makes whole what is read with [], which is for `Base.gather` to do, at their use.
        """
        for owner in notes(module).owners:
            tracked = notes(owner)
            self.distinct.update([id(owner._buffers[name]) for name in tracked.distinct])
            for name, shadow_name in tracked.names.items():
                parameter = owner._parameters.get(name)
                if parameter is None or not parameter.requires_grad or id(parameter) in self.operands:
                    continue
                shadow = owner._parameters.get(shadow_name)
                assert shadow is not None
                label = f"{tracked.path}.{name}".lstrip(".")
                base = Base(label, parameter, shadow, name in tracked.shared, (owner, shadow_name))
                counts = (base.count,)
                self.operands[id(parameter)] = Operand(parameter, shadow, (base,), counts, counts)

    def operand(self, value: Any) -> Operand | None:
        """Return the bookkeeping of an operand, None for any other value."""
        if not isinstance(value, Tensor) or self.is_input(value):
            return None
        found = self.operands.get(id(value))
        if found is None:
            found = getattr(value, "_largebatch_operand", None)
        return found

    def is_batched(self, value: Any) -> bool:
        """Whether a tensor that is no operand depends on the samples."""
        return isinstance(value, Tensor) and (
            value.requires_grad or hasattr(value, "_largebatch_batched") or self.is_input(value)
        )

    def is_input(self, value: Tensor) -> bool:
        """Whether the outermost module was called with this very tensor."""
        return any(value is tensor for tensor in self.inputs)

    def part(self, value: Tensor) -> Part | None:
        """Return the run of samples in a tensor that `note_split` or `hand_on_part` saw, None for any other tensor."""
        for tensor, part in self.parts:
            if tensor is value:
                return part
        return None

    def note_split(self, source: Tensor, dim: int, pieces: tuple[Tensor, ...]) -> None:
        """Note which samples each piece of the batch holds, as in a batch norm over groups of samples."""
        if dim % source.ndim != self.batch_dim or source.shape[dim] != self.num_samples:
            return
        self.parts = []  # the last split's are enough, and let go of the tensors before
        first = 0
        for piece in pieces:
            self.parts.append((piece, (first, first + piece.shape[dim])))
            first += piece.shape[dim]

    def hand_on_part(self, arguments: Iterable[Any], output: Any) -> None:
        """Note the run of samples in what was computed from it row by row."""
        if not isinstance(output, Tensor) or output.ndim <= self.batch_dim:
            return
        found: Part | None = None
        for value in arguments:  # as plain as can be: torch.compile traces it
            part = self.part(value) if isinstance(value, Tensor) else None
            if part is not None and found is not None and part != found:
                return
            found = found if part is None else part
        if found is not None and output.shape[self.batch_dim] == found[1] - found[0]:
            self.parts.append((output, found))

    def samples_in(self, rows: int, function: str, part: Part | None = None) -> int:
        """Return the number of samples in the pass, given the rows along the batch dimension of an argument of `function`.

        Args:
            rows: as many for each sample, unless there is a `part`.
            function: its name, for messages.
            part: the run of samples that the argument holds, where its rule can do with one.
        """
        if part is not None and self.num_samples is not None:
            return self.num_samples
        if self.num_samples is None:
            self.num_samples = rows
        if self.num_samples == 0:
            raise UserError(f"track: {function} was given a batch without samples; skip an empty batch")
        if rows % self.num_samples or rows == 0:
            raise UserError(
                f"track: an argument of {function} has {rows} rows along dimension {self.batch_dim}, where the model's "
                f"input has {self.num_samples} samples; give track() the batch_dim of this module, name it in "
                f"{FALLBACK}, or use per='micro_batch'"
            )
        return self.num_samples

    def leave(self, module: nn.Module) -> None:
        """Note which parameters were used more than once, for a later torch.compile.

        Raises:
            UserError: if one of them was also used in a re-entrant checkpoint.
        """
        for operand in self.operands.values() if self.segments else ():
            base = operand.bases[0]
            times = sum(id(base.parameter) in used for used in self.segments.values())
            if times and times + base.count.uses > 1:
                raise UserError(
                    f"track: parameter '{base.name}' is used in a re-entrant checkpoint and elsewhere, so its gradients "
                    "cannot be added per sample; use checkpoint(..., use_reentrant=False) or per='micro_batch'"
                )
        for owner in notes(module).owners:
            tracked = notes(owner)
            for name in tracked.names:
                found = self.operands.get(id(owner._parameters.get(name)))
                if found is not None and found.bases[0].count.uses > 1:
                    tracked.shared.add(name)

    def token(self, operands: tuple[Operand, ...]) -> Tensor | None:
        """Count a use of the operands and return a token of a collector behind all of them."""
        self.is_used = True
        if torch.compiler.is_compiling():
            for operand in operands:
                operand.use()
                is_spread = operand.bases[0].is_shared and operand.tensor is operand.bases[0].parameter
                if not operand.is_alone and not is_spread:
                    names = ", ".join([base.name for base in operand.bases])
                    raise UserError(
                        f"track: parameter '{names}' is used more than once, or through a function, in one forward pass. "
                        "Under torch.compile that needs one forward pass before compiling, and a direct use each time; "
                        "or leave its module uncompiled, or use per='micro_batch'"
                    )
            return None
        fresh: list[Base] = []
        tokens: list[Tensor] = []
        for operand in operands:
            operand.use()
            for base in operand.bases:
                base.gather()
                if base.token is None and base not in fresh:
                    fresh.append(base)
                elif base.token is not None and all(base.token is not token for token in tokens):
                    tokens.append(base.token)
        if fresh:
            token = Collect.apply(tuple(fresh), *[t for base in fresh for t in (base.parameter, base.shadow)])
            for base in fresh:
                base.token = token
            tokens.append(token)
        return tokens[0] if len(tokens) == 1 else torch.cat(tokens)

    def tap(self, operation: Operation, output: Tensor, saved: tuple[Tensor, ...], operands: tuple[Any, ...]) -> Tensor:
        """Put a tap for `operands` (one for each of the operation's roles) on `output`."""
        token = self.token(operands)
        if token is not None:
            operation.operands = operands
        pairs = [t for operand in operands for t in operand.targets()]
        if token is None:
            operation.spread, pairs = self._spread(operation, operands, pairs)
        return Tap.apply(operation, len(saved), output, token, *saved, *pairs)

    def _spread(
        self, operation: Operation, operands: tuple[Operand, ...], pairs: list[Tensor]
    ) -> tuple[tuple[str, ...], list[Tensor]]:
        """Under torch.compile, send the per-sample gradients of shared parameters to their `Spread`."""
        roles = []
        for index, (role, operand) in enumerate(zip(operation.roles, operands, strict=True)):
            base = operand.bases[0]
            if base.is_shared and operand.tensor is base.parameter:
                if base.spread is None:
                    base.spread = Spread.apply(base.parameter, base.shadow, operation.num_samples)
                assert base.spread is not None
                pairs[2 * index] = base.spread
                roles.append(role)
        return tuple(roles), pairs

    def expand(
        self, operand: Operand, dim: int, rows: int, ndim: int, function: str, part: Part | None = None
    ) -> Tensor:
        """Return `operand` as [.., rows at `dim`, ..] of `ndim` dimensions, with a tap that tells the samples apart."""
        operation = Expanded(self.samples_in(rows, function, part), part)
        token = self.token((operand,))
        if token is not None:
            operation.operands = (operand,)
        shape = (1,) * (ndim - operand.tensor.ndim) + tuple(operand.tensor.shape)
        if shape[dim] != 1:
            raise UserError(
                f"track: {function} meets a parameter of shape {list(operand.tensor.shape)} whose own dimension lies "
                f"along the samples ({rows} rows); {WAY_OUT}"
            )
        tensor, shadow = operand.targets()
        expanded = Expand.apply(operation, dim, rows, token, tensor.reshape(shape), shadow.reshape(shape))
        return expanded


class State:
    """What the interceptions of one process share.

    Attributes:
        scope: the forward pass that is running under per="sample".
        aliases: the same under per="micro_batch": id of a parameter -> (the parameter, its alias).
        segments: there, by id of a parameter, the re-entrant checkpoint that uses it; 0 for none.
        is_aliasing: whether `Aliasing` is at work there instead.
        is_replaying: whether the fallback is running a module again, in which nothing is to be intercepted.
    """

    scope: Scope | None = None
    aliases: dict[int, tuple[Tensor, Tensor]] | None = None
    segments: ClassVar[dict[int, int]] = {}
    is_aliasing = False
    is_replaying = False


state = State()
