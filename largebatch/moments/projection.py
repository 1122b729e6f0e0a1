"""The factor by which gradients were multiplied between the backward passes and the update, from two projections of each.

For fixed random numbers r, the sum of <c_u, r> over the backward passes is the projection of the gradient that they accumulate.
At the update the same projection of `p.grad` is this sum, times the factor by which the gradients were multiplied since: by
clipping, or by dividing out a loss scale. If gradients were changed in another way, no single factor fits all projections.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from largebatch.errors import UserError

# Largest number of elements of a parameter that its projections read, evenly spaced.
PROJECTED = 4_096
# Change of a parameter's gradient, relative to its norm, that counts as rounding.
TOLERANCE = 0.01
FOREIGN = (
    "batch_size_invariant: the gradient of parameter {} is not what the backward passes left, times one factor for all "
    "parameters as clipping by the global norm gives: {}. Clip by the norm over all parameters of the optimizer, once before "
    "step(); zero all gradients together (optimizer.zero_grad(), or model.zero_grad() with set_to_none=True); build the "
    "optimizer before the first backward pass and after hooks that change gradients; average gradients over the ranks of "
    "process_group; leave sharded engines (FSDP, DeepSpeed) to the trainer"
)
NO_PASS = "no backward pass since the last update left it"


@dataclass(eq=False)
class Slot:
    """The memory and counts kept for one parameter.

    Args:
        parameter: a leaf tensor.
        name: the parameter's name, for messages.
        update: number of the last update in which the parameter took part.
        count: number of that update's units on this rank in which it took part.
        first: index of the first of these units.
        holds: content of `region`: ``squares`` of this update, the ``previous`` update's gradient, or nothing.
        partial: sum of the gradients of one micro-batch's passes, where it has several.
    """

    parameter: Tensor
    name: str
    update: int = -1
    count: int = 0
    first: int = 0
    holds: str = ""
    partial: Tensor | None = None

    def place(self, memory: Tensor, projection: Tensor) -> None:
        """Assign the slot its memory.

        Args:
            memory: one-dimensional, of the parameter's number of elements; `region` is a view of it in the parameter's order.
            projection: (2,), in which the projections of an update's passes are summed.
        """
        parameter = self.parameter
        strides: tuple[int, ...] = parameter.stride()
        self.order = tuple(sorted(range(parameter.ndim), key=lambda dim: (-strides[dim], dim)))
        back = [self.order.index(dim) for dim in range(parameter.ndim)]
        self.region = memory.view([parameter.shape[dim] for dim in self.order]).permute(back)
        self.projection = projection
        self.strides, self.is_dense = strides, parameter.permute(self.order).is_contiguous()
        # An odd stride, so that the elements read from a matrix do not all lie in one column.
        self.stride = -(-parameter.numel() // PROJECTED) | 1
        self.num_sampled = -(-parameter.numel() // self.stride)

    @property
    def is_placed(self) -> bool:
        """Whether the slot has its memory."""
        return hasattr(self, "region")

    def gradient(self) -> Tensor:
        """Return the parameter's gradient, in the type of its region."""
        assert self.parameter.grad is not None
        return self.parameter.grad.detach().to(self.region.dtype)

    def keep_gradient(self, clip: float) -> None:
        """Keep the gradient for the next update's estimate, as it was before clipping."""
        torch.div(self.gradient(), clip or 1.0, out=self.region)
        self.holds = "previous"

    def sample(self, gradient: Tensor) -> Tensor:
        """Return at most `PROJECTED` elements of a gradient, always the same ones, in the type of the region."""
        if self.is_dense and gradient.stride() == self.strides:
            values = gradient.as_strided((self.num_sampled,), (self.stride,))
        else:
            values = gradient.permute(self.order).reshape(-1)[:: self.stride]
        return values.to(self.region.dtype)


class Projector:
    """The random numbers r, the same on every rank and in every run."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def __call__(self, values: Tensor, out: Tensor | None = None) -> Tensor:
        """Return <values, r> for two vectors r, (2,), of values that `Slot.sample` returned."""
        numbers = self._numbers.get((values.device, values.dtype))
        if numbers is None:
            generator = torch.Generator("cpu").manual_seed(0)
            numbers = torch.randn(2, PROJECTED, generator=generator, dtype=torch.float64, device="cpu")
            numbers = self._numbers[values.device, values.dtype] = numbers.to(values.device, values.dtype)
        return torch.mv(numbers[:, : values.numel()], values, out=out)

    def factor(self, slots: Sequence[Slot], num_units: float, world_size: int) -> tuple[float, float]:
        """Return the factor by which gradients were multiplied since the backward passes, and their relative rounding error.

        Args:
            slots: slots of the parameters with a gradient, their projections summed over passes and ranks.
            num_units: number of units over all ranks.
            world_size: number of ranks over which the gradients were averaged.

        Raises:
            UserError: if no single factor fits all gradients.
        """
        samples = [slot.sample(slot.gradient()) for slot in slots]
        both = [self(sample) for sample in samples] + [slot.projection for slot in slots]
        if len({(value.device, value.dtype) for value in both}) > 1:
            both = [value.double().cpu() for value in both]
        found, left = torch.stack(both).double().cpu().view(2, len(slots), 2)
        left = left / world_size
        if not bool(found.isfinite().all()):
            return 1.0, 0.0  # as in torch, gradients that are not finite reach the optimizer
        if not bool(left.isfinite().all()):
            index = int((~left.isfinite()).any(1).nonzero()[0])
            raise UserError(
                FOREIGN.format(slots[index].name, "they left numbers that are not finite, and it is finite now")
            )
        total = float(left.square().sum())
        factor = float((left * found).sum()) / total if total > 0 else 1.0
        residual = float((found - factor * left).norm()) / (float(found.norm()) or 1.0)
        types = [torch.finfo(dtype) for dtype in {slot.parameter.dtype for slot in slots}]
        rounding = max(of_type.eps for of_type in types)
        # A sum over n units may be much smaller than the single units.
        tolerance = TOLERANCE + 4.0 * rounding * max(1.0, num_units) ** 0.5
        wrong = (found - factor * left).abs() > tolerance * abs(factor) * left.abs()
        if bool(wrong.any()):  # or a gradient is nearly orthogonal to the random numbers
            norms = torch.stack([torch.linalg.vector_norm(sample).double().cpu() for sample in samples])[:, None]
            # Subnormal numbers have few digits, and a gradient that is all rounding error (of a bias before a norm) may vanish.
            lost = max(of_type.tiny * of_type.eps for of_type in types) * PROJECTED
            lost += torch.finfo(torch.float32).eps * float(torch.maximum(norms, left.abs()).max())
            wrong = (found - factor * left).abs() > tolerance * torch.maximum(norms, abs(factor) * left.abs()) + lost
        if bool(wrong.any()):
            index, direction = (int(i) for i in wrong.nonzero()[0])
            why = NO_PASS
            if float(left[index, direction]) != 0.0:
                ratio = float(found[index, direction] / left[index, direction])
                why = f"it is {ratio:.4g} times that along one direction, all of them {factor:.4g} times"
            raise UserError(FOREIGN.format(slots[index].name, why))
        return (1.0 if abs(factor - 1.0) < 64.0 * rounding else factor), max(rounding, residual)
