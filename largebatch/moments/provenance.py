"""Which rows of a tensor belong to which sample, followed through a forward pass from the batch itself.

Every tensor computed from the batch carries a mark: `Rows`, the dimension along which its samples lie, or `Lost`, where a row
can no longer be given to one sample. Only the functions listed here hand `Rows` on; whatever any other makes of the batch is
`Lost`, and no parameter may meet it. So a dimension is never taken for the samples' because its size happens to be theirs.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from largebatch.moments.private import identity_edge, metadata_of


class Batch:
    """The samples of one forward pass.

    Args:
        num_samples: n.
        chosen: the samples to square, ascending; None for all.
        weight: of each of their squares in the sum that stands for all n.
    """

    def __init__(self, num_samples: int, chosen: list[int] | None = None, weight: float = 1.0):
        self.num_samples = num_samples
        self.chosen = chosen
        self.weight = weight
        self.parameters: set[int] = set()  # ids of the tracked ones, which hold no samples
        self.written: list[torch.UntypedStorage] = []  # of constants into which the batch was written
        self._indices: dict[tuple[int, int, torch.device], Tensor | slice] = {}

    def samples_of(self, rows: Rows) -> list[int]:
        """Return the chosen samples among those of a tensor."""
        run = range(rows.first, rows.first + rows.length)
        return list(run) if self.chosen is None else [sample for sample in self.chosen if sample in run]

    def take(self, tensor: Tensor, rows: Rows) -> Tensor:
        """Return the rows of the chosen samples, [samples, rows of each, *other dimensions]."""
        front = by_sample(tensor, rows)
        if self.chosen is None or rows.dim == WHOLE:
            return front
        key = (rows.first, rows.length, tensor.device)
        if key not in self._indices:
            places = [sample - rows.first for sample in self.samples_of(rows)]
            steps = {b - a for a, b in itertools.pairwise(places)} or {1}
            if places and len(steps) == 1:  # without a copy
                self._indices[key] = slice(places[0], places[-1] + 1, steps.pop())
            else:
                self._indices[key] = torch.tensor(places, dtype=torch.long, device=tensor.device)
        return front[self._indices[key]]


class Rows(NamedTuple):
    """Samples `first` to `first + length` along `dim`, whose size is outer * length * (rows of a sample).

    `outer` is 1 but where (time, batch) were flattened into one dimension; `dim` is WHOLE where the batch is a single sample.
    """

    dim: int
    outer: int
    first: int
    length: int


class Lost(NamedTuple):
    """No dimension of samples; `by` names the function that mixed or moved them, `is_sum` whether it summed over them."""

    by: str
    is_sum: bool = False


WHOLE = -1


def mark(batch: Batch, tensor: Tensor, found: Rows | Lost) -> None:
    """Note where the samples of a tensor lie."""
    tensor._largebatch_mark = (batch, found, tensor.requires_grad)  # type: ignore[attr-defined]
    if tensor.grad_fn is not None:  # an engine may pass it through an identity of its own
        metadata_of(tensor.grad_fn)["largebatch", tensor.output_nr] = (batch, found)


def mark_of(batch: Batch, tensor: Tensor) -> Rows | Lost | None:
    """Return where the samples of a tensor lie, None for a constant, a parameter and what is computed from these."""
    owner, found, had_grad = getattr(tensor, "_largebatch_mark", (None, None, False))
    if owner is batch and had_grad == tensor.requires_grad:
        return found
    if id(tensor) in batch.parameters or getattr(tensor, "_largebatch_operand", (None,))[0] is batch:
        return None
    if not tensor.requires_grad:
        if batch.written and any(tensor.untyped_storage().data_ptr() == s.data_ptr() for s in batch.written):
            return Lost("a write in place into a tensor that it looks at")
        return None
    owner, found = passed_on(tensor)
    return found if owner is batch else _unseen(tensor)


def passed_on(tensor: Tensor) -> tuple[Batch, Rows | Lost] | tuple[None, None]:
    """Return the batch and the mark of a tensor that an engine passed on as it is."""
    owner, found, had_grad = getattr(tensor, "_largebatch_mark", (None, None, False))
    if owner is not None and had_grad == tensor.requires_grad:
        return owner, found
    edge = identity_edge(tensor)
    return (None, None) if edge is None else metadata_of(edge[0]).get(("largebatch", edge[1]), (None, None))


def _unseen(tensor: Tensor) -> Lost:
    """Return what is said of a tensor with a gradient that no operation in sight has made."""
    if tensor.grad_fn is None:
        return Lost(
            "a parameter that was added or unfrozen since track() (call it again), or a tensor that requires a gradient"
        )
    name = type(tensor.grad_fn).__name__
    if name == "CheckpointFunctionBackward":
        return Lost("re-entrant activation checkpointing (call it with use_reentrant=False)")
    return Lost(f"{name}, a function that PyTorch does not show")


def by_sample(tensor: Tensor, rows: Rows) -> Tensor:
    """Return [samples, rows of each, *other dimensions]."""
    if rows.dim == WHOLE:
        return tensor[None, None]
    front = tensor.movedim(rows.dim, 0)
    if rows.outer * rows.length != len(front) or rows.outer > 1:
        front = front.unflatten(0, (rows.outer, rows.length, -1)).movedim(1, 0).flatten(1, 2)
    else:
        front = front.unsqueeze(1)
    return front


def tensors_in(args: Any, kwargs: Any) -> list[Tensor]:
    """Return the tensors among arguments, and in lists of them."""
    found = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found.extend([item for item in value if isinstance(item, Tensor)])
    return found


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
_RESIZING: set[Any] = set()


def follow(batch: Batch, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], output: Any) -> None:
    """Mark the results of a function that was called on tensors of the batch; `tensors` are its arguments'."""
    pieces = output if isinstance(output, (list, tuple)) else (output,)
    marks = [(t, m) for t in tensors if (m := mark_of(batch, t)) is not None]
    if not marks or not any(isinstance(piece, Tensor) for piece in pieces):
        return
    if func in CREATING:
        return
    if len(tensors) == 1 and args and tensors[0] is args[0] and len(pieces) == 1:
        rest = repr(args[1:]), repr(kwargs) if kwargs else ""
        key = (
            func,
            tensors[0].shape,
            tensors[0].dtype,
            marks[0][1],
            rest,
            pieces[0].shape,
            pieces[0].dtype,
            batch.num_samples,
        )
        if (known := _known.get(key)) is None:
            if len(_known) > 10_000:
                _known.clear()
            (known,) = verdicts(batch, func, args, kwargs, marks, pieces)
            _known[key] = known
        mark(batch, pieces[0], known)
        return
    for piece, found in zip(pieces, verdicts(batch, func, args, kwargs, marks, pieces), strict=True):
        if isinstance(piece, Tensor):
            mark(batch, piece, found)


# What was found for one tensor of such a shape and marks in such a call: the same every time.
_known: dict[Any, Rows | Lost] = {}


def verdicts(
    batch: Batch, func: Any, args: Any, kwargs: Any, marks: Sequence[tuple[Tensor, Rows | Lost]], pieces: Any
) -> list[Rows | Lost]:
    """Return where the samples lie in each result of a function; `marks` are its tensors that have any."""
    if func in LIKE:
        marks = [(t, m) for t, m in marks if args and t is args[0]]
    # Whole numbers that were mixed, such as masks, choose what is computed, and take no sample's gradient to another.
    live = [(t, m) for t, m in marks if isinstance(m, Rows) or t.is_floating_point() or t.is_complex()] or list(marks)
    name = getattr(func, "__name__", str(func))
    lost = [m for _, m in live if isinstance(m, Lost)]
    if not live:
        return [Lost(name)] * len(pieces)
    if lost:
        is_sum = len(lost) == len(live) and all(m.is_sum for m in lost)
        is_sum = is_sum and (func in _ADDING or (func in _SCALING and len(live) == 1))
        mixed = lost[0] if is_sum or not lost[0].is_sum else Lost(name)
        return [mixed] * len(pieces)
    if batch.num_samples == 1:
        return [Rows(WHOLE, 1, 0, 1)] * len(pieces)
    if func not in FOLLOW:
        return [Lost(name)] * len(pieces)
    call = Call(func, args, kwargs, live)  # type: ignore[arg-type]
    return [_one(call, name, piece, number) for number, piece in enumerate(pieces)]


def _one(call: Call, name: str, piece: Any, number: int) -> Rows | Lost:
    found: Rows | None = None
    for tensor, rows in call.live if isinstance(piece, Tensor) else ():
        new = FOLLOW[call.func](call, piece, number, tensor, rows)
        is_other = found is not None and new != found
        if not isinstance(new, Rows) or is_other or not 0 <= new.dim < piece.ndim or not new.length:
            return Lost(name, new is True)
        size = piece.shape[new.dim]
        if size % (new.outer * new.length) or (call.func not in _RESIZING and size != tensor.shape[rows.dim]):
            return Lost(name)
        found = new
    return found or Lost(name)


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
            _RESIZING.update(functions)
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
_ADDING = _named("add sub __add__ __radd__ __sub__ __rsub__ neg __neg__ clone contiguous to float double")
_SCALING = _named("mul div __mul__ __rmul__ __truediv__ multiply divide true_divide")
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


def assign(batch: Batch, func: Any, args: Any, kwargs: Any) -> Rows | Lost | None:
    """Return where the samples of a tensor lie once an operation in place has written the batch into it, None for a constant.

    Raises:
        ValueError: if the rows of one sample are written over those of another: other views of the tensor would go on under
            marks that are no longer true.
    """
    target, values = args[0], args[1:] if func is not Tensor.__setitem__ else args[2:]
    marks = [(t, m) for t in tensors_in(values, kwargs) if (m := mark_of(batch, t)) is not None]
    before = mark_of(batch, target)
    if func in FILLING:
        return before if target.requires_grad or target._is_view() else None
    if not marks and (before is None or func in POINTWISE or func is Tensor.__setitem__):
        return before
    if func not in POINTWISE and func is not Tensor.__setitem__:
        raise ValueError(f"{func.__name__} changes a tensor of the batch in place")
    if before is None and not target.requires_grad:
        batch.written.append(target.untyped_storage())  # whatever else looks at it holds the batch now
    if batch.num_samples == 1:
        return Rows(WHOLE, 1, 0, 1)
    part = target
    where = before
    if func is Tensor.__setitem__:
        part = target.detach()[args[1]]
        if isinstance(before, Rows):
            (where,) = verdicts(batch, Tensor.__getitem__, args[:2], {}, [(target, before)], [part])
    (after,) = verdicts(batch, torch.add, values, {}, marks, [part])
    if before is None:
        index = (args[1] if isinstance(args[1], tuple) else (args[1],)) if func is Tensor.__setitem__ else ()
        is_sliced = all(item is Ellipsis or isinstance(item, slice) for item in index) and part.ndim == target.ndim
        if isinstance(after, Rows) and is_sliced and part.shape[after.dim] == target.shape[after.dim]:
            return after
        return Lost(func.__name__)
    if isinstance(where, Lost) or after != where:
        raise ValueError(f"{func.__name__} writes rows of other samples into a tensor of the batch")
    return before
