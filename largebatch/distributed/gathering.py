"""Smaller all-gathers for FSDP2: no shadow is communicated, and weights only in the precision that autocast uses.

FSDP2 looks up two functions on the local shard of a parameter, `fsdp_pre_all_gather` and `fsdp_post_all_gather`: they
return the tensors to gather, and build the parameter from the gathered ones. Bytes that a rank receives in one all-gather of
P tracked parameters: 8*P by default, 4*P here, 2*P for the weights of linear layers and convolutions under autocast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class _Zeros(Tensor):
    """A placeholder for a tensor of zeros of any shape, which takes no memory."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Return zeros of the requested shape when FSDP2 calls as_strided to form the parameter."""
        if func is torch.as_strided:
            with torch._C.DisableTorchFunctionSubclass():
                return torch.zeros((), dtype=args[0].dtype, device=args[0].device).expand(args[1])
        return super().__torch_function__(func, types, args, kwargs or {})


def _say(parameter: nn.Parameter, before: Callable[[Tensor], Tensor], after: Callable[..., Any]) -> None:
    assert isinstance(parameter, DTensor)
    mine: Any = parameter._local_tensor  # the object on which FSDP2 looks them up; to_local() would return a view
    # With the mesh as the only argument, this is the older of two signatures: the newer one requires whole shards.
    mine.fsdp_pre_all_gather = lambda mesh: ((before(mine),), None)
    mine.fsdp_post_all_gather = after


def gather_nothing(shadow: nn.Parameter) -> None:
    """Replace a shadow by zeros in forward and backward passes, which do not use its value.

    Its gradient is reduced as usual. One element per rank is gathered, because FSDP2 requires a tensor.

    Args:
        shadow: a shadow, after `fully_shard` and before the first forward pass.
    """

    def after(gathered: tuple[Tensor], _: Any, dtype: torch.dtype, *, out: Tensor | None = None) -> Any:
        if out is None:
            return torch.zeros(1, dtype=dtype, device=gathered[0].device).as_subclass(_Zeros), ()
        return None

    _say(shadow, lambda mine: mine.new_zeros(1), after)


def gather_in(parameter: nn.Parameter, dtype: torch.dtype) -> None:
    """Gather a parameter in a narrower data type, and convert it back to its own type afterwards.

    The result is unchanged if the parameter is rounded to that type before it is used. The gradient keeps its own type.

    Args:
        parameter: a parameter, after `fully_shard` and before the first forward pass.
        dtype: floating-point type for the all-gather.
    """

    def before(mine: Tensor) -> Tensor:
        # If the number of ranks does not divide the rows, a shard is padded; its whole storage is gathered.
        length = mine.untyped_storage().nbytes() // mine.element_size()
        return mine.as_strided((length,), (1,), 0).to(dtype)

    whole: list[Tensor] = []  # one tensor, whose memory FSDP2 frees and reallocates

    def after(gathered: tuple[Tensor], _: Any, own: torch.dtype, *, out: Tensor | None = None) -> Any:
        if out is None:
            whole.append(gathered[0].to(own))
            return whole[0], (whole[0],)
        # As FSDP2 does for its own copies: autograd must not treat saved tensors as modified.
        with torch.autograd._unsafe_preserve_version_counter(whole[0]):
            whole[0].copy_(gathered[0])
        return None

    _say(parameter, before, after)
