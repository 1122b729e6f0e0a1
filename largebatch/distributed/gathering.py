"""What travels when FSDP2 gathers a parameter: nothing of a shadow, and of a weight what autocast leaves of it.

FSDP2 lets the local part of a parameter say what is gathered of it and what is made of that, by two functions it looks up
on that tensor (`fsdp_pre_all_gather`, `fsdp_post_all_gather`). Bytes that one gathering brings a rank, for P tracked
parameters: 8*P as FSDP2 would have it, 4*P here, 2*P for the weights of linear layers and convolutions under autocast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class _Zeros(Tensor):
    """Stands for a tensor of zeros of any shape, without its memory."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Give FSDP2, which cuts the parameter out of what it is handed, zeros of that shape."""
        if func is torch.as_strided:
            with torch._C.DisableTorchFunctionSubclass():
                return torch.zeros((), dtype=args[0].dtype, device=args[0].device).expand(args[1])
        return super().__torch_function__(func, types, args, kwargs or {})


def _say(parameter: nn.Parameter, before: Callable[[Tensor], Tensor], after: Callable[..., Any]) -> None:
    assert isinstance(parameter, DTensor)
    mine: Any = parameter._local_tensor  # the very object that FSDP2 asks; to_local() returns a view of a parameter's
    # The one argument, the mesh, is the older of two signatures: the newer one checks that whole shards are gathered.
    mine.fsdp_pre_all_gather = lambda mesh: ((before(mine),), None)
    mine.fsdp_post_all_gather = after


def gather_nothing(shadow: nn.Parameter) -> None:
    """Let a shadow be zeros wherever a forward or backward pass sees it, whose value means nothing there.

    Its gradient is reduced as ever. One element a rank is gathered, because FSDP2 wants something.

    Args:
        shadow: after `fully_shard`, before the first forward pass.
    """

    def after(gathered: tuple[Tensor], _: Any, dtype: torch.dtype, *, out: Tensor | None = None) -> Any:
        if out is None:
            return torch.zeros(1, dtype=dtype, device=gathered[0].device).as_subclass(_Zeros), ()
        return None

    _say(shadow, lambda mine: mine.new_zeros(1), after)


def gather_in(parameter: nn.Parameter, dtype: torch.dtype) -> None:
    """Let a parameter travel in a narrower type, and be of its own type where it arrives.

    The result is the same where the parameter is rounded to that type before it is used. The gradient is not narrowed.

    Args:
        parameter: after `fully_shard`, before the first forward pass.
        dtype: floating type to travel in.
    """

    def before(mine: Tensor) -> Tensor:
        # Where the ranks do not divide the rows, a part is shorter than its memory, which is what travels.
        length = mine.untyped_storage().nbytes() // mine.element_size()
        return mine.as_strided((length,), (1,), 0).to(dtype)

    whole: list[Tensor] = []  # one tensor, whose memory FSDP2 frees and takes again

    def after(gathered: tuple[Tensor], _: Any, own: torch.dtype, *, out: Tensor | None = None) -> Any:
        if out is None:
            whole.append(gathered[0].to(own))
            return whole[0], (whole[0],)
        # As FSDP2 does it for its own copies: to autograd, what it saved has not changed.
        with torch.autograd._unsafe_preserve_version_counter(whole[0]):
            whole[0].copy_(gathered[0])
        return None

    _say(parameter, before, after)
