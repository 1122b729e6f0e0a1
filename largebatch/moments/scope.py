"""The records of a tracked module and of one forward pass: its parameters, and tensors computed only from parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from largebatch.errors import UserError
from largebatch.moments.operations import Lost
from largebatch.moments.samples import Batch, mark_of
from largebatch.moments.uses import Base, Operand

# The remedy that messages name where an operation does not let samples be followed.
FALLBACK = "track(model, fallback=[...]) or a config's model.fallback"
WAY_OUT = (
    f"per='micro_batch' (a config's optimizer.second_moment) works with any model; or name its module in {FALLBACK}"
)


class Refusal(Exception):
    """Raised where a sample's part of the gradient cannot be determined; the message gives the reason, not the place."""


@dataclass
class Tracked:
    """The record that `track` keeps on a module, beside the arguments of `track` itself.

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
    """Return the record that `track` keeps on a module."""
    return module.__dict__["_largebatch"]


class Scope:
    """One forward pass of the outermost tracked module.

    Attributes:
        batch: the samples of the pass.
        operands: the parameters that the modules entered so far may use.
        allowed: ids of the parameters that the running fallback module may use; None where no fallback module runs.
    """

    def __init__(self, batch: Batch, module: nn.Module):
        self.batch, self.operands = batch, list[tuple[Tensor, Operand]]()
        self.allowed: set[int] | None = None
        self.enter(module)

    def enter(self, module: nn.Module) -> None:
        """Add the parameters of a module that is about to run, and its children's, which the module may use itself.

        They are read with `get`, because ZeRO-3 gathers a parameter that is read with [], which is left to `Base.check`.
        """
        is_outermost = not self.operands
        for owner in notes(module).owners:
            for name, shadow_name in notes(owner).names.items():
                parameter, shadow = owner._parameters.get(name), owner._parameters.get(shadow_name)
                if parameter is None or not parameter.requires_grad or parameter.grad_fn is not None:
                    continue  # frozen, or computed from others and put in its place
                if self.operand(parameter) is not None:
                    if not is_outermost:  # its parameters were not replaced since its parent was entered
                        return
                    continue
                assert shadow is not None
                base = Base(f"{notes(owner).path}.{name}".lstrip("."), parameter, shadow, (owner, shadow_name))
                self.operands.append((parameter, self._note(parameter, (base,), True)))

    def leave(self) -> None:
        """Remove the records from the parameters."""
        for parameter, operand in self.operands:
            operand.bases[0].token = None  # the token would keep its own graph alive
            del parameter._largebatch_operand  # type: ignore[attr-defined]

    def _note(self, tensor: Tensor, bases: tuple[Base, ...], is_parameter: bool) -> Operand:
        operand = Operand(tensor, bases, is_parameter)
        tensor._largebatch_operand = (self.batch, operand)  # type: ignore[attr-defined]
        return operand

    def operand(self, value: Any) -> Operand | None:
        """Return the record of a parameter, or of a tensor computed only from parameters; None for any other value."""
        if not isinstance(value, Tensor) or not value.requires_grad:
            return None
        batch, found = getattr(value, "_largebatch_operand", (None, None))
        return found if batch is self.batch else None

    def derive(self, func: Any, args: Any, kwargs: Any, operands: list[Operand]) -> Any:
        """Run a function of operands and constants, and record its results as operands."""
        output = func(*args, **kwargs)
        bases = tuple(dict.fromkeys(base for operand in operands for base in operand.bases))
        for piece in output if isinstance(output, (list, tuple)) else (output,):
            if isinstance(piece, Tensor) and piece.requires_grad and self.operand(piece) is None:
                self._note(piece, bases, False)  # contiguous(), float() and the like may return their argument
        return output

    def refuse(self, func: Any, operands: list[Operand], why: str) -> UserError:
        """Return the error for a parameter in an operation through which samples cannot be followed."""
        name = getattr(func, "__name__", str(func))
        return UserError(
            f"track: parameter '{operands[0].bases[0].name}' meets the batch in {name}, where samples' gradients cannot be "
            f"told apart: {why}. {WAY_OUT}"
        )

    def check_outputs(self, tensors: list[Tensor]) -> None:
        """Raise an error that names the function if an output mixes samples in another way than by a sum over them."""
        for tensor in tensors:
            found = mark_of(self.batch, tensor) if tensor.requires_grad else None
            if isinstance(found, Lost) and not found.is_sum:
                raise UserError(
                    f"track: the model's output is not computed sample by sample: {why_lost(found)}. {WAY_OUT}"
                )


def why_lost(lost: Lost) -> str:
    """Return why samples can no longer be told apart, for a message."""
    return f"some of it comes through {lost.by}, which mixes or moves the rows of samples, or is not known not to"


class State:
    """The state that all interceptions of one process share.

    Attributes:
        scope: the forward pass that is running under per="sample".
        choice: (samples to square, weight of each) for the coming forward passes, set by `chosen_samples`; else None.
        aliases: the pass that is running under per="micro_batch": id of a parameter -> (the parameter, its alias).
        is_replaying: whether interception is off, while a fallback module or an untracked pass of `verify` runs.
    """

    def __init__(self) -> None:
        self.scope: Scope | None = None
        self.choice: tuple[list[int], float] | None = None
        self.aliases: dict[int, tuple[Tensor, Tensor]] | None = None
        self.is_replaying = False


state = State()
