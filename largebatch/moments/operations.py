"""The functions through which the samples of a batch are followed, and where the samples lie in the results of each.

A function that is not listed here is assumed to mix the samples.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import EllipsisType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Rows(NamedTuple):
    """Samples `first` to `first + length` along `dim`, whose size is outer * length * (rows of a sample).

    `outer` is 1 except where (time, batch) were flattened into one dimension; `dim` is WHOLE where the batch is a single
    sample, to which every element belongs.
    """

    dim: int
    outer: int
    first: int
    length: int


WHOLE = -1


class Lost(NamedTuple):
    """The samples can no longer be told apart: function `by` mixed or moved them; `is_sum` says whether it summed over them."""

    by: str
    is_sum: bool = False


class Step(NamedTuple):
    """A call of a function, considered for one of its tensors of the batch and one of its results.

    Attributes:
        func, args, kwargs: the call.
        live: its tensors of the batch with their rows, without tensors of integers whose samples are mixed, such as masks,
            which carry no sample's gradient to another.
        piece, number: the result, and its index among several.
        tensor, rows: one of `live`.
    """

    func: Any
    args: Any
    kwargs: Any
    live: Sequence[tuple[Tensor, Rows]]
    piece: Tensor
    number: int
    tensor: Tensor
    rows: Rows

    def option(self, position: int, *names: str, default: Any = None) -> Any:
        """Return an argument by position or name."""
        given = [self.kwargs[name] for name in names if name in self.kwargs] or self.args[position : position + 1]
        return given[0] if given else default

    def aligned(self) -> Rows:
        """Return the rows of the tensor after it is broadcast to the shape of the result."""
        return self.rows._replace(dim=self.rows.dim + self.piece.ndim - self.tensor.ndim)

    def before(self, num_dims: int) -> Rows | None:
        """Return the rows if the samples lie before the last ``num_dims`` dimensions, which the function mixes; else None."""
        return self.rows if self.rows.dim < self.tensor.ndim - num_dims else None


# Returns the rows of the result, None where they are lost, or True where the samples were summed.
Follow = Callable[[Step], "Rows | bool | None"]

FOLLOW: dict[Any, Follow] = {}
RESIZING: set[Any] = set()


def lies(
    func: Any, args: Any, kwargs: Any, live: Sequence[tuple[Tensor, Rows]], piece: Any, number: int
) -> Rows | Lost:
    """Return where the samples lie in one result of a function, or `Lost` unless all of its tensors of the batch agree."""
    found: Rows | None = None
    name = getattr(func, "__name__", str(func))
    for tensor, rows in live if isinstance(piece, Tensor) else ():
        new = FOLLOW[func](Step(func, args, kwargs, live, piece, number, tensor, rows))
        is_other = found is not None and new != found
        if not isinstance(new, Rows) or is_other or not 0 <= new.dim < piece.ndim or not new.length:
            return Lost(name, new is True)
        size = piece.shape[new.dim]
        if size % (new.outer * new.length) or (func not in RESIZING and size != tensor.shape[rows.dim]):
            return Lost(name)
        found = new
    return found or Lost(name)


def _named(*names: str) -> set[Any]:
    """Return the functions of these names; a string may hold several names."""
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
# Elementwise functions, whose arguments are broadcast.
POINTWISE = _named(_ELEMENTWISE, *(name + "_" for name in _ELEMENTWISE.split()), "requires_grad_")
POINTWISE.add(Tensor.data.__get__)  # type: ignore[attr-defined]
# Functions of a sum over samples whose result is a sum over samples too.
ADDING = _named("add sub __add__ __radd__ __sub__ __rsub__ neg __neg__ clone contiguous to float double")
SCALING = _named("mul div __mul__ __rmul__ __truediv__ multiply divide true_divide")
# Functions that return new tensors of a tensor's shape or type.
CREATING = _named("zeros_like ones_like full_like empty_like rand_like randn_like randint_like")
CREATING |= _named("new_zeros new_ones new_full new_empty new_tensor")
# Functions that take the values of a tensor where they cannot be followed.
LEAVING = _named("numpy tolist __array__ __dlpack__ untyped_storage storage")
WITHOUT_TENSORS = _named("dim size stride numel nelement ndimension is_floating_point is_complex is_contiguous")
WITHOUT_TENSORS |= _named("storage_offset data_ptr element_size get_device __len__ item is_signed is_inference")
_PROPERTIES = "shape dtype device layout ndim requires_grad is_leaf grad_fn is_cuda is_cpu is_meta is_sparse is_nested"
WITHOUT_TENSORS |= {getattr(Tensor, name).__get__ for name in _PROPERTIES.split()}
# Functions that use only the type or the shape of a second tensor.
LIKE = {Tensor.to, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double, Tensor.type, Tensor.type_as}
LIKE |= {Tensor.expand_as, Tensor.view_as, Tensor.reshape_as}


_follows(POINTWISE)(Step.aligned)
_follows(_named("scaled_dot_product_attention"))(lambda step: step.aligned() if step.before(2) else None)
_follows(_named("layer_norm rms_norm"))(
    lambda step: (
        step.before(len(step.option(1, "normalized_shape"))) if step.tensor is step.option(0, "input") else None
    )
)
_follows(_named("pad"))(lambda step: step.before(len(step.option(1, "pad")) // 2))
_follows(_named("one_hot view_as_real view_as_complex"))(lambda step: step.rows)
_follows({torch.embedding})(lambda step: step.rows if step.tensor is not step.option(0, "weight") else None)


def _dims(value: Any, ndim: int) -> set[int]:
    values = value if isinstance(value, (list, tuple)) else (value,)
    return {dim % ndim for dim in values if type(dim) is int}


def _along(position: int, default: Any) -> Follow:
    """Follow a function that works along the dimensions given by the argument at ``position``, and leaves the others as is."""

    def handler(step: Step) -> Rows | None:
        value = step.option(position, "dim", "dims", "axis", default=default)
        if position == 1 and type(value) is int:
            value = [item for item in step.args[1:] if type(item) is int] or value  # flip(0, 1)
        dims = _dims(value, step.tensor.ndim)
        return step.rows if dims and step.rows.dim not in dims else None

    return handler


_follows(_named("softmax log_softmax cumsum cumprod logcumsumexp flip"))(_along(1, None))
_follows(_named("sort argsort glu"))(_along(1, -1))
_follows(_named("roll"))(_along(2, None))
_follows(_named("topk fft ifft rfft irfft"))(_along(2, -1))

_LINEAR_SUMS = _named("sum mean nansum")
_WITH_ORDER = _named("norm vector_norm")  # whose second argument is not the dimension
_SUMS = "prod amax amin max min argmax argmin std var logsumexp any all std_mean var_mean"


@_follows(_LINEAR_SUMS | _WITH_ORDER | _named(_SUMS))
def _sum(step: Step) -> Rows | bool:
    dims = _dims(step.option(2 if step.func in _WITH_ORDER else 1, "dim", "axis"), step.tensor.ndim)
    if not dims or step.rows.dim in dims:
        return step.func in _LINEAR_SUMS
    gone = 0 if step.piece.ndim == step.tensor.ndim else sum(dim < step.rows.dim for dim in dims)
    return step.rows._replace(dim=step.rows.dim - gone)


_LOSSES = """
    cross_entropy_loss nll_loss nll_loss_nd mse_loss l1_loss smooth_l1_loss huber_loss kl_div binary_cross_entropy
    binary_cross_entropy_with_logits
"""


@_follows(_named(_LOSSES))
def _loss(step: Step) -> Rows | bool | None:
    return True if step.piece.ndim == 0 else step.rows if step.rows.dim == 0 else None


_STEP = 7  # a stride that no view gives to a new dimension
_VIEWS = """
    t transpose swapaxes swapdims permute movedim moveaxis unsqueeze squeeze select narrow chunk split tensor_split unbind
    expand expand_as broadcast_to diagonal __iter__
"""


@_follows(_named(_VIEWS) | {Tensor.T.__get__, Tensor.mT.__get__}, resizes=True)  # type: ignore[attr-defined]
def _view(step: Step) -> Rows | None:
    """Repeat the view on a meta tensor in which only the dimension of the samples has a nonzero stride."""
    tensor, rows = step.tensor, step.rows
    shape, strides = list(tensor.shape), [0] * tensor.ndim
    shape[rows.dim], strides[rows.dim] = max(2, shape[rows.dim]), _STEP
    probe = torch.empty_strided(shape, strides, device="meta")
    try:
        again = step.func(*[probe if a is tensor else a for a in step.args], **step.kwargs)
    except (RuntimeError, IndexError):
        return None
    view = again if isinstance(again, Tensor) else again[step.number]
    found = [dim for dim, stride in enumerate(view.stride()) if stride == _STEP]
    if len(found) != 1:
        return None
    start, length = view.storage_offset() // _STEP, view.shape[found[0]]
    each = shape[rows.dim] // (rows.outer * rows.length)
    if length == shape[rows.dim]:
        return rows._replace(dim=found[0])
    if rows.outer > 1 or not each or not length or start % each or length % each:
        return None
    return Rows(found[0], 1, rows.first + start // each, length // each)


@_follows({Tensor.__getitem__}, resizes=True)
def _item(step: Step) -> Rows | bool | None:
    index = step.args[1] if isinstance(step.args[1], tuple) else (step.args[1],)
    return _view(step) if all(item is None or isinstance(item, (int, slice, EllipsisType)) for item in index) else None


@_follows(_named("view reshape flatten unflatten view_as reshape_as"), resizes=True)
def _reshape(step: Step) -> Rows | None:
    piece, tensor, rows = step.piece, step.tensor, step.rows
    if piece.dtype != tensor.dtype or tensor is not step.args[0]:
        return None
    blocks, before = tensor.shape[: rows.dim].numel() * rows.outer, 1
    for dim, size in enumerate(piece.shape):
        if blocks % before == 0 and size % (blocks // before * rows.length) == 0:
            return rows._replace(dim=dim, outer=blocks // before)
        before *= size
    return None


_SUMMED = _named("baddbmm addmm")


@_follows(_SUMMED | _named("linear matmul bmm __matmul__ mm"))
def _matmul(step: Step) -> Rows | bool | None:
    tensor, rows = step.tensor, step.rows
    factors = [a for a in (*step.args, *step.kwargs.values()) if isinstance(a, Tensor)]
    if step.func in _SUMMED and tensor is factors.pop(0):
        return None if any(tensor is factor for factor in factors) else step.aligned()
    left, right = factors[:2]
    if right.ndim == 1 and tensor is left:
        return step.before(1)
    if step.before(2):
        return step.aligned()
    if left is right:
        return None
    if tensor is left and rows.dim == tensor.ndim - 2:
        return rows._replace(dim=step.piece.ndim - 2)
    is_column = tensor is right and tensor.ndim > 1 and rows.dim == tensor.ndim - 1 and step.func is not F.linear
    return rows._replace(dim=step.piece.ndim - 1) if is_column else None


@_follows(_named("einsum"))
def _einsum(step: Step) -> Rows | None:
    equation = step.args[0].replace(" ", "") if isinstance(step.args[0], str) else "."
    if "." in equation or "->" not in equation:
        return None
    factors, result = equation.split("->")
    given = step.args[1] if isinstance(step.args[1], (list, tuple)) else step.args[1:]
    names = {
        names[step.rows.dim] for names, factor in zip(factors.split(","), given, strict=True) if factor is step.tensor
    }
    (name,) = names if len(names) == 1 else ("",)
    return step.rows._replace(dim=result.index(name)) if name and result.count(name) == 1 else None


_SIZED = "max_pool avg_pool adaptive_avg_pool adaptive_max_pool conv conv_transpose dropout"
_IMAGES = """
    interpolate upsample im2col col2im grid_sample batch_norm instance_norm group_norm native_batch_norm feature_dropout
    upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_trilinear3d
    upsample_bicubic2d max_pool2d_with_indices max_pool3d_with_indices
"""


@_follows(_named(_IMAGES, *(f"{name}{n}d" for name in _SIZED.split() for n in (1, 2, 3))))
def _image(step: Step) -> Rows | None:
    name, ndim = step.func.__name__, step.tensor.ndim
    size = 3 if name == "col2im" else next((int(c) + 2 for c in name if c.isdigit()), ndim)
    is_input = step.tensor is step.option(0, "input") and step.tensor is not step.option(1, "weight", "grid")
    return step.rows if is_input and step.rows.dim == 0 and ndim == size else None


@_follows(_named("cat concat concatenate"), resizes=True)
def _cat(step: Step) -> Rows | None:
    dim = step.option(1, "dim", "axis", default=0) % step.piece.ndim
    if dim != step.rows.dim:
        return step.rows
    # Join consecutive runs of samples, as a batch norm over groups of samples does.
    each, of = step.tensor.shape[dim] // step.rows.length, {id(tensor): rows for tensor, rows in step.live}
    parts = [of.get(id(part)) for part in step.option(0, "tensors")]
    end = first = step.rows.first if parts[0] is None else parts[0].first
    for part, tensor in zip(parts, step.option(0, "tensors"), strict=True):
        if part is None or part[:3] != (dim, 1, end) or tensor.shape[dim] != each * part.length:
            return None
        end += part.length
    return Rows(dim, 1, first, end - first)


@_follows(_named("stack"))
def _stack(step: Step) -> Rows:
    return step.rows._replace(dim=step.rows.dim + (step.option(1, "dim", default=0) % step.piece.ndim <= step.rows.dim))


_IN_PLACE = ("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__")


@functools.cache
def is_in_place(func: Any) -> bool:
    """Whether a function changes its first argument."""
    name = getattr(func, "__name__", "")
    return name in _IN_PLACE or (name.endswith("_") and not name.endswith("__") and name != "requires_grad_")


@functools.cache
def is_unseen(func: Any) -> bool:
    """Whether a function takes values where they cannot be followed: out of the graph, or into tensors that it was given."""
    name = getattr(func, "__name__", "")
    return func in LEAVING or name == "__set__" or name.startswith("_foreach")
