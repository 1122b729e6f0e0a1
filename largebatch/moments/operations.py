"""The functions through which the samples of a batch are followed, and where they lie in what each returns.

Whatever is not listed here mixes the samples, as far as anybody knows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Rows(NamedTuple):
    """Samples `first` to `first + length` along `dim`, whose size is outer * length * (rows of a sample).

    `outer` is 1 but where (time, batch) were flattened into one dimension; `dim` is WHOLE where the batch is a single sample,
    whose everything is.
    """

    dim: int
    outer: int
    first: int
    length: int


WHOLE = -1


class Lost(NamedTuple):
    """No dimension of samples; `by` names the function that mixed or moved them, `is_sum` whether it summed over them."""

    by: str
    is_sum: bool = False


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
        given = [self.kwargs[name] for name in names if name in self.kwargs] or self.args[position : position + 1]
        return given[0] if given else default

    def follow(self, name: str, piece: Any, number: int) -> Rows | Lost:
        """Return where the samples lie in one result: where all tensors agree on it."""
        found: Rows | None = None
        for tensor, rows in self.live if isinstance(piece, Tensor) else ():
            new = FOLLOW[self.func](self, piece, number, tensor, rows)
            is_other = found is not None and new != found
            if not isinstance(new, Rows) or is_other or not 0 <= new.dim < piece.ndim or not new.length:
                return Lost(name, new is True)
            size = piece.shape[new.dim]
            if size % (new.outer * new.length) or (self.func not in RESIZING and size != tensor.shape[rows.dim]):
                return Lost(name)
            found = new
        return found or Lost(name)


# Takes (call, result, number of the result, tensor of the batch, its rows) and returns the rows of the result, None where they
# are lost, or True where the samples were summed.
Follow = Callable[[Call, Tensor, int, Tensor, Rows], "Rows | bool | None"]

FOLLOW: dict[Any, Follow] = {}
RESIZING: set[Any] = set()


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


_ELEMENTWISE = """
    add sub rsub mul div true_divide divide multiply subtract floor_divide remainder fmod pow addcmul addcdiv lerp eq
    ne lt le gt ge maximum minimum logical_and logical_or logical_not logical_xor bitwise_and bitwise_or bitwise_not
    isnan isfinite isinf abs neg negative positive exp expm1 log log2 log10 log1p sqrt rsqrt square reciprocal sin cos
    tan atan atan2 sinh cosh tanh asinh erf erfc expit sigmoid logit sign sgn floor ceil round trunc frac relu relu6
    gelu silu mish elu selu celu leaky_relu hardtanh hardswish hardsigmoid softplus softsign logsigmoid log_sigmoid
    tanhshrink hardshrink softshrink threshold prelu rrelu clamp clip clamp_min clamp_max nan_to_num where masked_fill
    dropout native_dropout alpha_dropout clone contiguous detach to type float half double bfloat16 long int bool
    type_as xlogy hypot sinc i0 __add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ __mul__ __rmul__ __imul__
    __truediv__ __rtruediv__ __itruediv__ __div__ __rdiv__ __pow__ __rpow__ __neg__ __eq__ __ne__ __lt__ __le__ __gt__
    __ge__ __floordiv__ __mod__ __and__ __or__ __invert__ __xor__ copy_ real imag
"""
# Functions of single elements, whose arguments are broadcast.
POINTWISE = _named(_ELEMENTWISE, *(name + "_" for name in _ELEMENTWISE.split()), "requires_grad_")
POINTWISE.add(Tensor.data.__get__)  # type: ignore[attr-defined]
# What a sum over samples may go through and stay one.
ADDING = _named("add sub __add__ __radd__ __sub__ __rsub__ neg __neg__ clone contiguous to float double")
SCALING = _named("mul div __mul__ __rmul__ __truediv__ multiply divide true_divide")
# New tensors of a tensor's shape and type, and random or constant values in the place of what was there.
CREATING = _named("zeros_like ones_like full_like empty_like rand_like randn_like randint_like")
CREATING |= _named("new_zeros new_ones new_full new_empty new_tensor")
FILLING = _named("bernoulli_ normal_ uniform_ random_ exponential_ fill_ zero_ log_normal_ cauchy_ geometric_")
# By these the values of a tensor leave for where they are not followed.
LEAVING = _named("numpy tolist __array__ __dlpack__ untyped_storage storage")
WITHOUT_TENSORS = _named("dim size stride numel nelement ndimension is_floating_point is_complex is_contiguous")
WITHOUT_TENSORS |= _named("storage_offset data_ptr element_size get_device __len__ item is_signed is_inference")
_PROPERTIES = "shape dtype device layout ndim requires_grad is_leaf grad_fn is_cuda is_cpu is_meta is_sparse is_nested"
WITHOUT_TENSORS |= {getattr(Tensor, name).__get__ for name in _PROPERTIES.split()}
# Functions that take no more than a type or a shape from a second tensor.
LIKE = {Tensor.to, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double, Tensor.type, Tensor.type_as}
LIKE |= {Tensor.expand_as, Tensor.view_as, Tensor.reshape_as}


def aligned(rows: Rows, tensor: Tensor, piece: Tensor) -> Rows:
    """Return the rows of what a tensor is broadcast to."""
    return rows._replace(dim=rows.dim + piece.ndim - tensor.ndim)


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


_follows(_named("softmax log_softmax cumsum cumprod logcumsumexp flip"))(_along(1, None))
_follows(_named("sort argsort glu"))(_along(1, -1))
_follows(_named("roll"))(_along(2, None))
_follows(_named("topk fft ifft rfft irfft"))(_along(2, -1))

_LINEAR_SUMS = _named("sum mean nansum")
_WITH_ORDER = _named("norm vector_norm")  # whose second argument is not the dimension
_SUMS = "prod amax amin max min argmax argmin std var logsumexp any all std_mean var_mean"


@_follows(_LINEAR_SUMS | _WITH_ORDER | _named(_SUMS))
def _sum(call: Call, piece: Tensor, number: int, tensor: Tensor, rows: Rows) -> Rows | bool:
    if len(call.args) > 1 and isinstance(call.args[1], Tensor):  # the larger of two tensors
        return aligned(rows, tensor, piece)
    dims = _dims(call.option(2 if call.func in _WITH_ORDER else 1, "dim", "axis"), tensor.ndim)
    if not dims or rows.dim in dims:
        return call.func in _LINEAR_SUMS
    return rows if piece.ndim == tensor.ndim else rows._replace(dim=rows.dim - sum(dim < rows.dim for dim in dims))


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
        views = [again] if isinstance(again, Tensor) else again
        call.views[id(tensor)] = [_seen(view, shape[rows.dim], rows) for view in views]
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
    is_slice = all(item is None or item is Ellipsis or isinstance(item, (int, slice)) for item in index)
    return _view(call, piece, number, tensor, rows) if is_slice else None


@_follows(_named("view reshape flatten unflatten view_as reshape_as"), resizes=True)
def _reshape(call: Call, piece: Tensor, number: int, tensor: Tensor, rows: Rows) -> Rows | None:
    if piece.dtype != tensor.dtype or tensor is not call.args[0]:
        return None
    blocks, before = tensor.shape[: rows.dim].numel() * rows.outer, 1
    for dim, size in enumerate(piece.shape):
        if blocks % before == 0 and size % (blocks // before * rows.length) == 0:
            return rows._replace(dim=dim, outer=blocks // before)
        before *= size
    return None


_SUMMED, _LINEAR = _named("baddbmm addmm"), _named("linear")


@_follows(_SUMMED | _LINEAR | _named("matmul bmm __matmul__ mm"))
def _matmul(call: Call, piece: Tensor, number: int, tensor: Tensor, rows: Rows) -> Rows | None:
    factors = [a for a in (*call.args, *call.kwargs.values()) if isinstance(a, Tensor)]
    if call.func in _SUMMED:
        summand, *factors = factors
        if tensor is summand:
            is_factor = any(tensor is factor for factor in factors)
            return None if is_factor else aligned(rows, tensor, piece)
    left, right = factors[:2]
    if right.ndim == 1 and tensor is left:
        return rows if rows.dim < tensor.ndim - 1 else None
    if rows.dim < tensor.ndim - 2:
        return aligned(rows, tensor, piece)
    if tensor is left and tensor is not right and rows.dim == tensor.ndim - 2:
        return rows._replace(dim=piece.ndim - 2)
    is_column = tensor is right and tensor is not left and rows.dim == tensor.ndim - 1 and tensor.ndim > 1
    return rows._replace(dim=piece.ndim - 1) if is_column and call.func not in _LINEAR else None


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


_SIZED = "max_pool avg_pool adaptive_avg_pool adaptive_max_pool lp_pool conv conv_transpose dropout"
_IMAGES = """
    interpolate upsample pixel_shuffle pixel_unshuffle channel_shuffle im2col col2im grid_sample affine_grid batch_norm
    instance_norm group_norm native_batch_norm feature_dropout upsample_nearest1d upsample_nearest2d upsample_nearest3d
    upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d max_pool2d_with_indices
    max_pool3d_with_indices
"""


@_follows(_named(_IMAGES, *(f"{name}{n}d" for name in _SIZED.split() for n in (1, 2, 3))))
def _image(call: Call, piece: Tensor, number: int, tensor: Tensor, rows: Rows) -> Rows | None:
    name = call.func.__name__
    size = 3 if name == "col2im" else next((int(c) + 2 for c in name if c.isdigit()), tensor.ndim)
    is_input = tensor is call.option(0, "input") and tensor is not call.option(1, "weight", "grid")
    if name.startswith(("pixel", "channel")) and rows.dim >= tensor.ndim - 3:
        return None
    return rows if is_input and rows.dim == 0 and tensor.ndim == size else None


@_follows(_named("layer_norm rms_norm"))
def _last_norm(call: Call, piece: Tensor, number: int, tensor: Tensor, rows: Rows) -> Rows | None:
    is_before = rows.dim < tensor.ndim - len(call.option(1, "normalized_shape"))
    return rows if is_before and tensor is call.option(0, "input") else None


@_follows(_named("pad"))
def _pad(call: Call, piece: Tensor, number: int, tensor: Tensor, rows: Rows) -> Rows | None:
    return rows if rows.dim < tensor.ndim - len(call.option(1, "pad")) // 2 else None


_LOSSES = (
    "cross_entropy_loss nll_loss nll_loss_nd mse_loss l1_loss smooth_l1_loss huber_loss kl_div binary_cross_entropy"
)


@_follows(_named(_LOSSES, "binary_cross_entropy_with_logits"))
def _loss(call: Call, piece: Tensor, number: int, tensor: Tensor, rows: Rows) -> Rows | bool | None:
    if piece.ndim == 0:
        return True
    return rows if rows.dim == 0 else None


@_follows(_named("one_hot embedding view_as_real view_as_complex"))
def _in_place(call: Call, piece: Tensor, number: int, tensor: Tensor, rows: Rows) -> Rows | None:
    is_table = call.func is torch.embedding and tensor is call.option(0, "weight")
    return None if is_table else rows


@_follows(_named("cat concat concatenate"), resizes=True)
def _cat(call: Call, piece: Tensor, number: int, tensor: Tensor, rows: Rows) -> Rows | None:
    dim = call.option(1, "dim", "axis", default=0) % piece.ndim
    if dim != rows.dim:
        return rows
    parts, of = [], {id(t): r for t, r in call.live}
    for part in call.option(0, "tensors"):  # consecutive runs of samples, as in a batch norm over groups of them
        if id(part) not in of or part.shape[dim] * rows.length != tensor.shape[dim] * of[id(part)].length:
            return None
        parts.append(of[id(part)])
    ends = [part.first + part.length for part in parts]
    if any(part[:2] != (dim, 1) for part in parts) or [part.first for part in parts[1:]] != ends[:-1]:
        return None
    return Rows(dim, 1, parts[0].first, ends[-1] - parts[0].first)


@_follows(_named("stack"))
def _stack(call: Call, piece: Tensor, number: int, tensor: Tensor, rows: Rows) -> Rows:
    return rows._replace(dim=rows.dim + (call.option(1, "dim", default=0) % piece.ndim <= rows.dim))


@_follows(_named("repeat tile"), resizes=True)
def _repeat(call: Call, piece: Tensor, number: int, tensor: Tensor, rows: Rows) -> Rows | None:
    new, sizes = aligned(rows, tensor, piece), call.option(1, "repeats", "dims")
    sizes = sizes if isinstance(sizes, (list, tuple)) else call.args[1:]
    return new if len(sizes) < piece.ndim - new.dim or sizes[new.dim - piece.ndim] == 1 else None


@_follows(_named("gather index_select"))
def _gather(call: Call, piece: Tensor, number: int, tensor: Tensor, rows: Rows) -> Rows | None:
    dim = call.option(1, "dim")
    return rows if type(dim) is int and dim % tensor.ndim != rows.dim else None


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
