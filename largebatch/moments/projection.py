"""What happened to gradients between the backward passes and the update, told by two projections of each.

The sum over the backward passes of <c_u, r>, with r fixed random numbers, is the projection of the gradient that they leave. At
the update the same projection of `p.grad` is that times the factor by which the gradients were multiplied since: by clipping,
or by a loss scale that was divided out. Gradients that were changed in another way do not fit one factor for all projections.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from largebatch.errors import UserError

# Elements of a parameter that its projection reads, evenly spread.
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
    """What is kept of one parameter.

    Args:
        parameter: a leaf.
        name: for messages.
        update: the update that it last took part in.
        count: units of that update on this rank that it took part in.
        first: number of the first of them.
        holds: what `region` holds: ``squares`` of this update, the ``previous`` update's gradient, or nothing.
        partial: sum over the passes of one micro-batch, where it has several.
    """

    parameter: Tensor
    name: str
    update: int = -1
    count: int = 0
    first: int = 0
    holds: str = ""
    partial: Tensor | None = None

    def place(self, memory: Tensor, projection: Tensor) -> None:
        """Give the slot its memory.

        Args:
            memory: one dimension, as many elements as the parameter; `region` is a view of it in the parameter's memory order.
            projection: (2,), where the projections of an update's passes add up.
        """
        parameter = self.parameter
        strides: tuple[int, ...] = parameter.stride()
        self.order = tuple(sorted(range(parameter.ndim), key=lambda dim: (-strides[dim], dim)))
        back = [self.order.index(dim) for dim in range(parameter.ndim)]
        self.region = memory.view([parameter.shape[dim] for dim in self.order]).permute(back)
        self.projection = projection
        self.strides, self.is_dense = strides, parameter.permute(self.order).is_contiguous()
        # Odd, so that no column of a matrix is read alone.
        self.stride = -(-parameter.numel() // PROJECTED) | 1
        self.num_sampled = -(-parameter.numel() // self.stride)

    @property
    def is_placed(self) -> bool:
        """Whether it has its memory."""
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
        """Return <values, r> for two r, (2,); values are a sample of `Slot.sample`."""
        numbers = self._numbers.get((values.device, values.dtype))
        if numbers is None:
            generator = torch.Generator("cpu").manual_seed(0)
            numbers = torch.randn(2, PROJECTED, generator=generator, dtype=torch.float64, device="cpu")
            numbers = self._numbers[values.device, values.dtype] = numbers.to(values.device, values.dtype)
        return torch.mv(numbers[:, : values.numel()], values, out=out)

    def factor(self, slots: Sequence[Slot], num_units: float, world_size: int) -> tuple[float, float]:
        """Return what the gradients were multiplied by since the backward passes, and their relative rounding.

        Args:
            slots: of parameters with a gradient, their projections summed over passes and ranks.
            num_units: over all ranks.
            world_size: ranks whose mean the gradients are.

        Raises:
            UserError: if it is not one factor for all.
        """
        samples = [slot.sample(slot.gradient()) for slot in slots]
        both = [self(sample) for sample in samples] + [slot.projection for slot in slots]
        if len({(value.device, value.dtype) for value in both}) > 1:
            both = [value.double().cpu() for value in both]
        found, left = torch.stack(both).double().cpu().view(2, len(slots), 2)
        left = left / world_size
        if not bool(found.isfinite().all()):
            return 1.0, 0.0  # as torch: what is not finite is passed on
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
        # A sum over n units may be much smaller than they are.
        tolerance = TOLERANCE + 4.0 * rounding * max(1.0, num_units) ** 0.5
        wrong = (found - factor * left).abs() > tolerance * abs(factor) * left.abs()
        if bool(wrong.any()):  # or orthogonal to the random numbers
            norms = torch.stack([torch.linalg.vector_norm(sample).double().cpu() for sample in samples])[:, None]
            # The smallest numbers have few digits, and a gradient that is all rounding (of a bias before a norm) may be lost.
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
