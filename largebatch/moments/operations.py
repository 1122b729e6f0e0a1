"""The functions through which the samples of a batch are followed, and where they lie in what each returns.

Whatever is not listed here mixes the samples, as far as anybody knows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from largebatch.moments.marks import Rows


class Call:
    """A call of a function on tensors of the batch.

    Args:
        func, args, kwargs: as they were given.
        live: the tensors that carry gradients, or all of the batch where none does, with their rows. What carries none cannot
            take a sample's gradient to another.
    """

    def __init__(self, func: Any, args: Any, kwargs: Any, live: list[tuple[Tensor, Rows]]):
        self.func, self.args, self.kwargs, self.live = func, args, kwargs, live
        self.views: dict[int, list[Rows | None]] = {}

    def option(self, position: int, *names: str, default: Any = None) -> Any:
        """Return an argument by position or name."""
        for name in names:
            if name in self.kwargs:
                return self.kwargs[name]
        return self.args[position] if len(self.args) > position else default


# Takes (call, result, number of the result, tensor of the batch, its rows) and returns the rows of the result, None where they
# are lost, or True where the samples were summed.
Follow = Callable[[Call, Tensor, int, Tensor, Rows], "Rows | bool | None"]

FOLLOW: dict[Any, Follow] = {}
POINTWISE: set[Any] = set()
RESIZING: set[Any] = set()


def aligned(rows: Rows, tensor: Tensor, piece: Tensor) -> Rows:
    """Return the rows of what a tensor is broadcast to."""
    return rows._replace(dim=rows.dim + piece.ndim - tensor.ndim)


def _named(*names: str) -> set[Any]:
    """Return the functions of these names, of one or several a string."""
    homes = (torch, Tensor, F, torch._C._nn, torch.special, torch.linalg, torch.fft)
    return {getattr(home, name) for text in names for name in text.split() for home in homes if hasattr(home, name)}


def _follows(functions: set[Any], resizes: bool = False) -> Callable[[Follow], Follow]:
    def register(handler: Follow) -> Follow:
        FOLLOW.update(dict.fromkeys(functions, handler))
        if resizes:
            RESIZING.update(functions)
        return handler

    return register


_NAMES = """
    add sub rsub mul div true_divide divide multiply subtract floor_divide remainder fmod pow addcmul addcdiv lerp eq
    ne lt le gt ge maximum minimum logical_and logical_or logical_not logical_xor bitwise_and bitwise_or bitwise_not
    isnan isfinite isinf abs neg negative positive exp expm1 log log2 log10 log1p sqrt rsqrt square reciprocal sin cos
    tan atan atan2 sinh cosh tanh asinh erf erfc expit sigmoid logit sign sgn floor ceil round trunc frac relu relu6
    gelu silu mish elu selu celu leaky_relu hardtanh hardswish hardsigmoid softplus softsign logsigmoid log_sigmoid
    tanhshrink hardshrink softshrink threshold prelu rrelu clamp clip clamp_min clamp_max nan_to_num where masked_fill
    dropout native_dropout alpha_dropout clone contiguous detach to type float half double bfloat16 long int bool
    type_as xlogy hypot sinc i0 __add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ __mul__ __rmul__ __imul__
    __truediv__ __rtruediv__ __itruediv__ __div__ __rdiv__ __pow__ __rpow__ __neg__ __eq__ __ne__ __lt__ __le__ __gt__
    __ge__ __floordiv__ __mod__ __and__ __or__ __invert__ __xor__ copy_ fill_ zero_ real imag
"""
POINTWISE |= _named(_NAMES, *(name + "_" for name in _NAMES.split()), "requires_grad_")
POINTWISE |= {Tensor.data.__get__}  # type: ignore[attr-defined]
# What a sum over samples may go through and stay one.
ADDING = _named("add sub __add__ __radd__ __sub__ __rsub__ neg __neg__ clone contiguous to float double")
SCALING = _named("mul div __mul__ __rmul__ __truediv__ multiply divide true_divide")
# New tensors of a tensor's shape and type, and random or constant values in the place of what was there.
CREATING = _named("""
    zeros_like ones_like full_like empty_like rand_like randn_like randint_like new_zeros new_ones new_full new_empty new_tensor
""")
FILLING = _named("bernoulli_ normal_ uniform_ random_ exponential_ fill_ zero_ log_normal_ cauchy_ geometric_")
# By these the values of a tensor leave for where they are not followed.
LEAVING = _named("numpy tolist __array__ __dlpack__ untyped_storage storage")


WITHOUT_TENSORS = _named("""
    dim size stride numel nelement ndimension is_floating_point is_complex is_contiguous storage_offset data_ptr element_size
    get_device __len__ item is_signed is_inference
""")
_PROPERTIES = "shape dtype device layout ndim requires_grad is_leaf grad_fn is_cuda is_cpu is_meta is_sparse is_nested"
WITHOUT_TENSORS |= {getattr(Tensor, name).__get__ for name in _PROPERTIES.split()}


@_follows(POINTWISE)
def _broadcast(call: Call, piece: Tensor, number: int, tensor: Tensor, rows: Rows) -> Rows:
    return aligned(rows, tensor, piece)


def _dims(value: Any, ndim: int) -> set[int]:
    values = value if isinstance(value, (list, tuple)) else (value,)
    return {dim % ndim for dim in values if type(dim) is int}


def _along(position: int, default: Any) -> Follow:
    """Follow a function along dimensions, which the argument at a position names; it leaves the others alone."""

    def handler(call: Call, piece: Tensor, number: int, tensor: Tensor, rows: Rows) -> Rows | None:
        value = call.option(position, "dim", "dims", "axis", default=default)
        if position == 1 and type(value) is int:
            value = [item for item in call.args[1:] if type(item) is int] or value  # flip(0, 1)
        dims = _dims(value, tensor.ndim)
        return rows if dims and rows.dim not in dims else None

    return handler


for _functions, _position, _default in (
    ("softmax log_softmax cumsum cumprod logcumsumexp flip", 1, None),
    ("sort argsort glu", 1, -1),
    ("roll", 2, None),
    ("topk fft ifft rfft irfft", 2, -1),
    ("fft2 ifft2 rfft2 irfft2", 2, (-2, -1)),
):
    _follows(_named(_functions))(_along(_position, _default))

_LINEAR_SUMS = _named("sum mean nansum")
_WITH_ORDER = _named("norm", "vector_norm")  # whose second argument is not the dimension


@_follows(
    _WITH_ORDER
    | _named("sum mean prod amax amin max min argmax argmin std var logsumexp any all nansum std_mean var_mean")
)
def _sum(call: Call, piece: Tensor, number: int, tensor: Tensor, rows: Rows) -> Rows | bool:
    if len(call.args) > 1 and isinstance(call.args[1], Tensor):  # the larger of two tensors
        return aligned(rows, tensor, piece)
    dims = _dims(call.option(2 if call.func in _WITH_ORDER else 1, "dim", "axis"), tensor.ndim)
    if not dims or rows.dim in dims:
        return call.func in _LINEAR_SUMS
    return rows if piece.ndim == tensor.ndim else rows._replace(dim=rows.dim - sum(dim < rows.dim for dim in dims))


# Functions that take no more than a type or a shape from a second tensor.
CASTS = {Tensor.to, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double, Tensor.type, Tensor.type_as}
LIKE = {*CASTS, Tensor.expand_as, Tensor.view_as, Tensor.reshape_as}

_STEP = 7  # no stride that a view makes up for a new dimension
_VIEWS = """
    t transpose swapaxes swapdims permute movedim moveaxis unsqueeze squeeze select narrow chunk split tensor_split unbind
    expand expand_as broadcast_to diagonal __iter__
"""


@_follows(_named(_VIEWS) | {Tensor.T.__get__, Tensor.mT.__get__}, resizes=True)  # type: ignore[attr-defined]
def _view(call: Call, piece: Tensor, number: int, tensor: Tensor, rows: Rows) -> Rows | None:
    """Do it again on a tensor without data in which the samples' dimension alone has a stride."""
    if id(tensor) not in call.views:
        shape, strides = list(tensor.shape), [0] * tensor.ndim
        shape[rows.dim], strides[rows.dim] = max(2, shape[rows.dim]), _STEP
        probe = torch.empty_strided(shape, strides, device="meta")
        try:
            again = call.func(*[probe if a is tensor else a for a in call.args], **call.kwargs)
        except (RuntimeError, IndexError):
            return None
        call.views[id(tensor)] = [
            _seen(view, shape[rows.dim], rows) for view in ([again] if isinstance(again, Tensor) else again)
        ]
    return call.views[id(tensor)][number]


def _seen(view: Tensor, size: int, rows: Rows) -> Rows | None:
    found = [dim for dim, stride in enumerate(view.stride()) if stride == _STEP]
    if len(found) != 1:
        return None
    start, length = view.storage_offset() // _STEP, view.shape[found[0]]
    each = size // (rows.outer * rows.length)
    if length == size:
        return rows._replace(dim=found[0])
    if rows.outer > 1 or not each or not length or start % each or length % each:
        return None
    return Rows(found[0], 1, rows.first + start // each, length // each)


@_follows({Tensor.__getitem__}, resizes=True)
def _item(call: Call, piece: Tensor, number: int, tensor: Tensor, rows: Rows) -> Rows | bool | None:
    index = call.args[1] if isinstance(call.args[1], tuple) else (call.args[1],)
    if all(item is None or item is Ellipsis or isinstance(item, (int, slice)) for item in index):
        return _view(call, piece, number, tensor, rows)
    # One list of numbers, behind the samples' dimension: those before it stay as they are.
    before = index[: rows.dim + 1]
    is_behind = len(before) == rows.dim + 1 and all(isinstance(item, slice) and item == slice(None) for item in before)
    listed = [item for item in index if not (isinstance(item, (slice, int)) or item is None)]
    return rows if is_behind and len(listed) == 1 and tensor is call.args[0] else None


@_follows(_named("view", "reshape", "flatten", "unflatten", "view_as", "reshape_as"), resizes=True)
def _reshape(call: Call, piece: Tensor, number: int, tensor: Tensor, rows: Rows) -> Rows | None:
    if piece.dtype != tensor.dtype or tensor is not call.args[0]:
        return None
    blocks, before = tensor.shape[: rows.dim].numel() * rows.outer, 1
    for dim, size in enumerate(piece.shape):
        if blocks % before == 0 and size % (blocks // before * rows.length) == 0:
            return rows._replace(dim=dim, outer=blocks // before)
        before *= size
    return None


@_follows(_named("matmul bmm baddbmm addmm linear __matmul__ mm"))
def _matmul(call: Call, piece: Tensor, number: int, tensor: Tensor, rows: Rows) -> Rows | None:
    factors = [a for a in call.args if isinstance(a, Tensor)]
    if call.func in _SUMMED and tensor is factors[0]:
        return aligned(rows, tensor, piece) if all(tensor is not factor for factor in factors[1:]) else None
    left, right = (factors + list(call.kwargs.values()))[1 if call.func in _SUMMED else 0 :][:2]
    if rows.dim < tensor.ndim - 2:
        return aligned(rows, tensor, piece)
    if tensor is left and tensor is not right and rows.dim == tensor.ndim - 2:
        return rows._replace(dim=piece.ndim - (2 if right.ndim > 1 else 1))
    is_column = tensor is right and tensor is not left and rows.dim == tensor.ndim - 1 and tensor.ndim > 1
    return rows._replace(dim=piece.ndim - 1) if is_column and call.func not in _LINEAR else None


_SUMMED, _LINEAR = _named("baddbmm", "addmm"), _named("linear")


@_follows(_named("scaled_dot_product_attention"))
def _attention(call: Call, piece: Tensor, number: int, tensor: Tensor, rows: Rows) -> Rows | None:
    return aligned(rows, tensor, piece) if rows.dim < tensor.ndim - 2 else None


@_follows(_named("einsum"))
def _einsum(call: Call, piece: Tensor, number: int, tensor: Tensor, rows: Rows) -> Rows | None:
    equation = call.args[0].replace(" ", "") if isinstance(call.args[0], str) else "."
    if "." in equation or "->" not in equation:
        return None
    factors, result = equation.split("->")
    given = call.args[1] if isinstance(call.args[1], (list, tuple)) else call.args[1:]
    letters = {names[rows.dim] for names, factor in zip(factors.split(","), given, strict=True) if factor is tensor}
    (letter,) = letters if len(letters) == 1 else ("",)
    return rows._replace(dim=result.index(letter)) if letter and result.count(letter) == 1 else None


_SIZED = [
    "max_pool",
    "avg_pool",
    "adaptive_avg_pool",
    "adaptive_max_pool",
    "lp_pool",
    "conv",
    "conv_transpose",
    "dropout",
]
_IMAGES = """
    interpolate upsample pixel_shuffle pixel_unshuffle channel_shuffle im2col col2im grid_sample affine_grid batch_norm
    instance_norm group_norm native_batch_norm feature_dropout upsample_nearest1d upsample_nearest2d upsample_nearest3d
    upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d max_pool2d_with_indices
    max_pool3d_with_indices
"""


@_follows(_named(_IMAGES, *(f"{name}{n}d" for name in _SIZED for n in (1, 2, 3))))
def _image(call: Call, piece: Tensor, number: int, tensor: Tensor, rows: Rows) -> Rows | None:
    name = call.func.__name__
    size = next((int(c) + 2 for c in name if c.isdigit()), _DIMENSIONS.get(name, tensor.ndim))
    is_input = tensor is call.option(0, "input") and tensor is not call.option(1, "weight", "grid")
    if name.startswith(("pixel", "channel")) and rows.dim >= tensor.ndim - 3:
        return None
    return rows if is_input and rows.dim == 0 and tensor.ndim == size else None


_DIMENSIONS = {"im2col": 4, "col2im": 3}


@_follows(_named("layer_norm", "rms_norm"))
def _last_norm(call: Call, piece: Tensor, number: int, tensor: Tensor, rows: Rows) -> Rows | None:
    return rows if rows.dim < tensor.ndim - len(call.option(1, "normalized_shape")) else None


@_follows(_named("pad"))
def _pad(call: Call, piece: Tensor, number: int, tensor: Tensor, rows: Rows) -> Rows | None:
    return rows if rows.dim < tensor.ndim - len(call.option(1, "pad")) // 2 else None


@_follows(
    _named(
        "cross_entropy_loss nll_loss nll_loss_nd mse_loss l1_loss smooth_l1_loss huber_loss kl_div",
        "binary_cross_entropy binary_cross_entropy_with_logits",
    )
)
def _loss(call: Call, piece: Tensor, number: int, tensor: Tensor, rows: Rows) -> Rows | bool | None:
    if piece.ndim == 0:
        return True
    return rows if rows.dim == 0 else None


@_follows(_named("one_hot", "embedding", "view_as_real", "view_as_complex"))
def _in_place(call: Call, piece: Tensor, number: int, tensor: Tensor, rows: Rows) -> Rows | None:
    is_table = call.func is torch.embedding and tensor is call.option(0, "weight")
    return None if is_table else rows


@_follows(_named("cat", "concat", "concatenate"), resizes=True)
def _cat(call: Call, piece: Tensor, number: int, tensor: Tensor, rows: Rows) -> Rows | None:
    dim = call.option(1, "dim", "axis", default=0) % piece.ndim
    if dim != rows.dim:
        return rows
    joined = call.option(0, "tensors")
    parts = dict(zip(map(id, (t for t, _ in call.live)), (r for _, r in call.live), strict=True))
    if len(parts) != len(joined) or any(id(t) not in parts for t in joined) or rows.outer > 1:
        return None
    each, end = tensor.shape[dim] // rows.length, parts[id(joined[0])].first
    for part in joined:  # consecutive runs of samples, as in a batch norm over groups of them
        first, length = parts[id(part)][2:]
        if first != end or part.shape[dim] != length * each or parts[id(part)].dim != dim:
            return None
        end = first + length
    start = parts[id(joined[0])].first
    return Rows(dim, 1, start, end - start)


@_follows(_named("stack"))
def _stack(call: Call, piece: Tensor, number: int, tensor: Tensor, rows: Rows) -> Rows:
    return rows._replace(dim=rows.dim + (call.option(1, "dim", default=0) % piece.ndim <= rows.dim))


@_follows(_named("repeat", "tile", "repeat_interleave"), resizes=True)
def _repeat(call: Call, piece: Tensor, number: int, tensor: Tensor, rows: Rows) -> Rows | None:
    if call.func in _INTERLEAVE:
        dim, times = call.option(2, "dim"), call.option(1, "repeats")
        return rows if type(dim) is int and (type(times) is int or dim % tensor.ndim != rows.dim) else None
    if len(call.args) < 2:
        return None
    new = aligned(rows, tensor, piece)
    sizes = call.args[1] if isinstance(call.args[1], (list, tuple)) else call.args[1:]
    return new if len(sizes) < piece.ndim - new.dim or sizes[new.dim - piece.ndim] == 1 else None


_INTERLEAVE = _named("repeat_interleave")


@_follows(
    _named(
        "gather",
        "take_along_dim",
        "index_select",
        "scatter",
        "scatter_add",
        "index_add",
    )
)
def _gather(call: Call, piece: Tensor, number: int, tensor: Tensor, rows: Rows) -> Rows | None:
    dim = call.option(2 if call.func in _BY_LAST else 1, "dim")
    return rows if type(dim) is int and dim % tensor.ndim != rows.dim else None


_BY_LAST = _named("take_along_dim")


_IN_PLACE = ("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__")


@functools.cache
def is_in_place(func: Any) -> bool:
    """Whether a function changes its first argument."""
    name = getattr(func, "__name__", "")
    return name in _IN_PLACE or (name.endswith("_") and not name.endswith("__") and name != "requires_grad_")


@functools.cache
def is_unseen(func: Any) -> bool:
    """Whether a function takes values to where they are not followed: off the graph, or into tensors it was given."""
    name = getattr(func, "__name__", "")
    return func in LEAVING or name == "__set__" or name.startswith("_foreach")
