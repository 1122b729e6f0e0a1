"""The all-reduce of gradients and of the statistic beside them, overlapped with the backward pass.

DistributedDataParallel fills buckets as gradients arrive and hands each to the hook below. Shadows' gradients (the sums
of squares) travel in the same buckets. The statistic may travel cheaper than the gradient: it is averaged over hundreds
of updates. Bytes a rank sends and receives for P parameters, in units of a plain update's 4*P:

    float32     2      squares beside gradients, one collective a bucket
    bfloat16    1.5    squares in half precision, gradients in float32
    every k     1 + 1/k    squares added up locally and reduced every k updates, in either precision
"""

# Annotations stay evaluated here: DistributedDataParallel compares the hook's with its own types.

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from largebatch.moments import is_shadow


@dataclass
class SquaresReduction:
    """State of the hook.

    Args:
        dtype: in which the squares travel.
        due: whether the squares are reduced in the coming backward pass, or stay where they are.
    """

    dtype: torch.dtype
    due: bool = True


def reduce_bucket(state: SquaresReduction, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Average a bucket's gradients over ranks, and its squares where they are due.

    The flat buffer is in the parameters' memory order, so pieces are cut by number of elements and not by shape.
    """
    buffer, world_size = bucket.buffer(), dist.get_world_size()
    pieces = buffer.split([p.numel() for p in bucket.parameters()])
    squares = [piece for piece, p in zip(pieces, bucket.parameters(), strict=True) if is_shadow(p)]
    plain = [piece for piece, p in zip(pieces, bucket.parameters(), strict=True) if not is_shadow(p)]
    if not squares or not plain:
        if squares and not state.due:
            done: Future[Tensor] = Future()
            done.set_result(buffer)
            return done
        flats, targets = [buffer.to(state.dtype) if squares else buffer], [[buffer]]
    else:
        flats, targets = [torch.cat(plain)], [plain]
        if state.due:
            flats.append(torch.cat(squares).to(state.dtype))
            targets.append(squares)
    for flat in flats:
        flat.div_(world_size)
    futures = [dist.all_reduce(flat, async_op=True).get_future() for flat in flats]

    def write_back(_: Future[list[Future[Tensor]]]) -> Tensor:
        for flat, target in zip(flats, targets, strict=True):
            for piece, part in zip(target, flat.split([t.numel() for t in target]), strict=True):
                if piece.data_ptr() != part.data_ptr():
                    piece.copy_(part)
        return buffer

    return torch.futures.collect_all(futures).then(write_back)
