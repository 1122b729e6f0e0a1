"""What is known of a tracked module, and of one forward pass: its parameters, and what is computed from them alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from largebatch.errors import UserError
from largebatch.moments.operations import Lost
from largebatch.moments.samples import Batch, mark_of
from largebatch.moments.uses import Base, Operand

# Where messages send who needs squares of samples from an operation without a rule.
FALLBACK = "track(model, fallback=[...]) or a config's model.fallback"
WAY_OUT = f"per='micro_batch' (a config's optimizer.second_moment) takes any model; or name its module in {FALLBACK}"


class Refusal(Exception):
    """An operation under which a sample's part of the gradient is not known; the message says why, not where."""


@dataclass
class Tracked:
    """What `track` notes on a module, beside its own arguments.

    Attributes:
        names: this module's parameters, name -> name of the shadow.
        path: the module's name in the model, for messages.
        owners: the modules of the subtree that own tracked parameters.
        use_fallback: whether to differentiate the module as a whole, one sample at a time.
    """

    names: dict[str, str]
    path: str
    owners: list[nn.Module]
    per: str
    batch_dim: int
    inputs: str | None
    samples: int | None
    use_fallback: bool


def notes(module: nn.Module) -> Tracked:
    """Return what `track` noted on a module."""
    return module.__dict__["_largebatch"]


class Scope:
    """One forward pass, from the outermost module.

    Attributes:
        batch: its samples.
        operands: the parameters that the modules seen so far may use.
        allowed: ids of the parameters that a module may use whose inside is not looked at; None where none runs.
    """

    def __init__(self, batch: Batch, module: nn.Module):
        self.batch, self.operands = batch, list[tuple[Tensor, Operand]]()
        self.allowed: set[int] | None = None
        self.enter(module)

    def enter(self, module: nn.Module) -> None:
        """Take in the parameters of a module that is about to run, its children's too: it may use them itself.

        They are looked at with `get`: ZeRO-3 makes whole what is read with [], which is for `Base.check` to do.
        """
        is_outermost = not self.operands
        for owner in notes(module).owners:
            for name, shadow_name in notes(owner).names.items():
                parameter, shadow = owner._parameters.get(name), owner._parameters.get(shadow_name)
                if parameter is None or not parameter.requires_grad or parameter.grad_fn is not None:
                    continue  # frozen, or computed from others and put into its place
                if self.operand(parameter) is not None:
                    if not is_outermost:  # nobody has exchanged this module's parameters since its parent was entered
                        return
                    continue
                assert shadow is not None
                base = Base(f"{notes(owner).path}.{name}".lstrip("."), parameter, shadow, (owner, shadow_name))
                self.operands.append((parameter, self._note(parameter, (base,), True)))

    def leave(self) -> None:
        """Take the notes off the parameters."""
        for parameter, operand in self.operands:
            operand.bases[0].token = None  # which would keep its own graph alive
            del parameter._largebatch_operand  # type: ignore[attr-defined]

    def _note(self, tensor: Tensor, bases: tuple[Base, ...], is_parameter: bool) -> Operand:
        operand = Operand(tensor, bases, is_parameter)
        tensor._largebatch_operand = (self.batch, operand)  # type: ignore[attr-defined]
        return operand

    def operand(self, value: Any) -> Operand | None:
        """Return the bookkeeping of a parameter, or of what was computed from some alone; None for any other value."""
        if not isinstance(value, Tensor) or not value.requires_grad:
            return None
        batch, found = getattr(value, "_largebatch_operand", (None, None))
        return found if batch is self.batch else None

    def derive(self, func: Any, args: Any, kwargs: Any, operands: list[Operand]) -> Any:
        """Run a function of operands and constants, and note on its results that they come of operands."""
        output = func(*args, **kwargs)
        bases = tuple(dict.fromkeys(base for operand in operands for base in operand.bases))
        for piece in output if isinstance(output, (list, tuple)) else (output,):
            if isinstance(piece, Tensor) and piece.requires_grad and self.operand(piece) is None:
                self._note(piece, bases, False)  # contiguous(), float() and the like may return their argument
        return output

    def refuse(self, func: Any, operands: list[Operand], why: str) -> UserError:
        """Return the error for a parameter in an operation that is not understood."""
        name = getattr(func, "__name__", str(func))
        return UserError(
            f"track: parameter '{operands[0].bases[0].name}' meets the batch in {name}, where samples' gradients cannot be "
            f"told apart: {why}. {WAY_OUT}"
        )

    def check_outputs(self, tensors: list[Tensor]) -> None:
        """Raise, naming the function, if the outcome of the pass mixes samples otherwise than by a sum of them."""
        for tensor in tensors:
            found = mark_of(self.batch, tensor) if tensor.requires_grad else None
            if isinstance(found, Lost) and not found.is_sum:
                raise UserError(
                    f"track: the model's output is not computed sample by sample: {why_lost(found)}. {WAY_OUT}"
                )


def why_lost(lost: Lost) -> str:
    """Return what became of the samples, for a message."""
    return f"some of it comes through {lost.by}, which mixes or moves the rows of samples, or is not known not to"


class State:
    """What the interceptions of one process share.

    Attributes:
        scope: the forward pass that is running under per="sample".
        choice: (samples to square, weight of each) of the forward passes to come, where somebody chose.
        aliases: the pass under per="micro_batch": id of a parameter -> (the parameter, its alias).
        is_replaying: whether the fallback is running a module again, in which nothing is to be intercepted.
    """

    def __init__(self) -> None:
        self.scope: Scope | None = None
        self.choice: tuple[list[int], float] | None = None
        self.aliases: dict[int, tuple[Tensor, Tensor]] | None = None
        self.is_replaying = False


state = State()
