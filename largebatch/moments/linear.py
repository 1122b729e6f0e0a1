"""Linear maps: F.linear, matrix products of every kind, einsum, bilinear.

For one sample with positions t, y[t, o] = sum_i x[t, i] w[o, i], so that g[o, i] = sum_t d[t, o] x[t, i], where d is
the gradient of y. Its square is the square of the whole sum, (sum_t d[t, o] x[t, i])^2.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from largebatch.moments.derived import derive
from largebatch.moments.scope import WAY_OUT, Scope, rule
from largebatch.moments.tap import CHUNK_ELEMENTS, Operand, Operation, statistic_dtype, sums
from largebatch.section import UserError


def to_samples(tensor: Tensor, num_samples: int, batch_dim: int) -> Tensor:
    """Return activations [.., features] as [n, t, features]: n samples of t positions.

    With batch_dim 1 a matrix holds flattened (time, batch) rows, as `nn.MultiheadAttention` makes them.
    """
    features = tensor.shape[-1]
    if batch_dim == 0:
        return tensor.reshape(num_samples, -1, features)
    if tensor.ndim == 2:
        return tensor.reshape(-1, num_samples, features).transpose(0, 1)
    return tensor.movedim(batch_dim, 0).reshape(num_samples, -1, features)


# oneDNN's matrix product, out[m, n] = sum_k a[m, k] b[n, k]. On a processor without Intel's name it runs at twice the
# speed of the library behind torch.mm (430 against 200 GFLOP/s on two cores of an EPYC); on the others it does no harm.
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def outer(a: Tensor, b: Tensor) -> Tensor:
    """Return a [m, k] times the transpose of b [n, k]."""
    if _ONEDNN is not None and a.dtype == torch.float32 and a.device.type == "cpu":
        (rows, columns), (down, across) = b.shape, b.stride()
        if not ((across == 1 and down >= columns) or (down == 1 and across >= rows)):
            b = b.contiguous()  # every second element, or windows that overlap: oneDNN refuses such strides in b
        return _ONEDNN(a, b, None, "none", [], "")
    return torch.mm(a, b.t())


# The running sums are taken in blocks that stay in the processor's cache with the product being added.
BLOCK_ELEMENTS = 5 << 17
# Of small products several at a time: a call for each costs more than its arithmetic (30 us against 1.5 for 32 x 32).
SMALL_ELEMENTS, BATCH_ELEMENTS = 1 << 15, 1 << 18


def product_moments(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum over samples of P_s = a_s^T b_s, and of P_s^2 elementwise.

    Args:
        a: [n, t, p].
        b: [n, t, q].

    Returns:
        Two matrices [p, q], the second at least in float32.
    """
    _, positions, p = a.shape
    q = b.shape[2]
    wide = statistic_dtype(a.dtype)
    if positions == 1:
        # One position: P^2 = (a^2)^T (b^2), one more matrix product.
        a, b = a.squeeze(1).to(wide), b.squeeze(1).to(wide)
        if torch.compiler.is_compiling():
            return a.t() @ b, a.square().t() @ b.square()
        return outer(a.t(), b.t()), outer(a.square().t(), b.square().t())
    if torch.compiler.is_compiling() or a.device.type != "cpu":
        return _batched_product_moments(a, b, 16 * CHUNK_ELEMENTS)
    if p * q <= SMALL_ELEMENTS:
        return _batched_product_moments(a, b, BATCH_ELEMENTS)
    if p > q and q > 1:
        # The product is fastest with its short side first.
        total, squares = product_moments(b, a)
        return total.t(), squares.t()
    total = torch.zeros(p, q, dtype=wide)
    squares = torch.zeros(p, q, dtype=wide)
    step = max(1, BLOCK_ELEMENTS // q)
    pairs = list(zip(a.mT.unbind(0), b.mT.unbind(0), strict=True))
    for lo in range(0, p, step):
        sum_rows, square_rows = total[lo : lo + step], squares[lo : lo + step]
        for a_s, b_s in pairs:
            product = outer(a_s[lo : lo + step], b_s).to(wide)
            sum_rows.add_(product)
            square_rows.addcmul_(product, product)
            del product  # or the next one would push the sums out of the cache
    return total, squares


def _batched_product_moments(a: Tensor, b: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """`product_moments` in batched products of at most so many elements: for the compiler, a GPU, and small products."""
    step = max(1, most // (a.shape[2] * b.shape[2]))
    parts = [sums(torch.bmm(x.mT, y)) for x, y in zip(a.split(step), b.split(step), strict=True)]
    totals, squares = zip(*parts, strict=True)
    return sum(totals[1:], totals[0]), sum(squares[1:], squares[0])


class Linear(Operation):
    """y = x w^T + b; roles "weight" [o, i], "matrix" [i, o] (a transposed weight), "bias" [o]."""

    def __init__(self, num_samples: int, roles: tuple[str, ...], batch_dim: int):
        super().__init__(num_samples, roles)
        self.batch_dim = batch_dim

    def prepare(self, grad: Tensor, saved: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return d [n, t, o] and, if the weight is tracked, x [n, t, i]; under autocast both have d's type."""
        return tuple(to_samples(t.to(grad.dtype), self.num_samples, self.batch_dim) for t in (grad, *saved))

    def moments(self, role: str, ready: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Form each sample's product once, for the sum and for the squares."""
        if role == "bias":
            return sums(self.per_sample(role, ready, 0, self.num_samples))
        d, x = ready
        return product_moments(d, x) if role == "weight" else product_moments(x, d)

    def per_sample(self, role: str, ready: tuple[Tensor, ...], lo: int, hi: int) -> Tensor:
        """Return d^T x, x^T d or the sum of d over positions."""
        d = ready[0][lo:hi]
        if role == "bias":
            return d.sum(1, dtype=statistic_dtype(d.dtype))
        x = ready[1][lo:hi]
        return torch.bmm(d.mT, x) if role == "weight" else torch.bmm(x.mT, d)

    def add_per_sample(self, role: str, ready: tuple[Tensor, ...], lo: int, hi: int, out: Tensor) -> None:
        """Add the products without a temporary."""
        if role == "weight":
            out.baddbmm_(ready[0][lo:hi].to(out.dtype).mT, ready[1][lo:hi].to(out.dtype))
        else:
            super().add_per_sample(role, ready, lo, hi, out)


def plain(value: Any, operand: Operand | None) -> Any:
    """Return an argument for PyTorch to differentiate, or not to, if it is an operand."""
    return value if operand is None else value.detach()


@rule(F.linear)
def linear(scope: Scope, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Y = x w^T + b over any leading positions."""
    return _linear(scope, input, weight, bias, "weight")


def _linear(scope: Scope, input: Tensor, weight: Tensor, bias: Tensor | None, role: str) -> Tensor:
    if scope.operand(input) is not None:
        raise UserError(
            f"track: parameter '{scope.operand(input).bases[0].name}' is the input of a linear map whose weight is "  # type: ignore[union-attr]
            f"data; {WAY_OUT}"
        )
    if input.ndim < 2:
        raise UserError(f"track: a linear map of a vector has no dimension for the samples; {WAY_OUT}")
    found = {role: scope.operand(weight), "bias": scope.operand(bias)}
    operands = {name: operand for name, operand in found.items() if operand is not None}
    output = F.linear(input, plain(weight if role == "weight" else weight.t(), found[role]), plain(bias, found["bias"]))
    batch_dim = scope.batch_dim
    if batch_dim and input.ndim == 2:
        # Rows are either samples or flattened (time, batch).
        if hasattr(input, "_largebatch_dim") and scope.width is None:
            raise UserError(f"track: a linear map over a dimension of the samples mixes them; {WAY_OUT}")
        rows = scope.width or scope.num_samples or input.shape[0]
        num_samples = scope.samples_in(rows, "linear")
    else:
        num_samples = scope.samples_in(input.shape[batch_dim], "linear")
    operation = Linear(num_samples, tuple(operands), batch_dim)
    return scope.tap(operation, output, (input,) if role in operands else (), tuple(operands.values()))


@rule(torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__, Tensor.__rmatmul__)
def matmul(scope: Scope, input: Tensor, other: Tensor) -> Tensor:
    """Matrix products with a parameter on either side."""
    left, right = scope.operand(input), scope.operand(other)
    if right is not None and other.ndim == 2:
        return _linear(scope, input, other, None, "matrix")
    if right is not None and other.ndim == 1:
        column = derive(scope, torch.unsqueeze, (other, 1), {}, [right])
        return _linear(scope, input, column, None, "matrix").squeeze(-1)
    letters = "abcdefghijklm"
    if right is not None:
        lead = letters[: input.ndim - 2]
        return einsum(scope, f"{lead}xy,{lead[len(lead) + 2 - other.ndim :]}yz->{lead}xz", input, other)
    assert left is not None
    lead = letters[: other.ndim - 2]
    if input.ndim == 1:
        return einsum(scope, f"y,{lead}yz->{lead}z", input, other)
    return einsum(scope, f"{lead[len(lead) + 2 - input.ndim :]}xy,{lead}yz->{lead}xz", input, other)


@rule(torch.addmm, torch.baddbmm, Tensor.addmm, Tensor.baddbmm)
def addmm(
    scope: Scope, input: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1, **renamed: Tensor
) -> Tensor:
    """Y = beta * input + alpha * left @ right."""
    from largebatch.moments.elementwise import run

    product = torch.matmul(left, right)
    if scope.operand(left) is not None or scope.operand(right) is not None:
        product = matmul(scope, left, right)
    else:
        product._largebatch_batched = True  # type: ignore[attr-defined]
    product = product if alpha == 1 else product * alpha
    operand = scope.operand(input)
    if operand is None:
        return product + beta * input
    if beta != 1:
        input = derive(scope, torch.mul, (input, beta), {}, [operand])
    return run(scope, torch.add, (product, input), {})


class Einsum(Operation):
    """One operand among the factors of an einsum; its per-sample gradient is an einsum of the others with d."""

    def __init__(self, num_samples: int, rows_equation: str, batch_letter: str):
        super().__init__(num_samples)
        self.equation = rows_equation
        self.batch_letter = batch_letter

    def prepare(self, grad: Tensor, saved: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return d and the other factors in one type."""
        return tuple(t.to(grad.dtype) for t in (grad, *saved))

    def per_sample(self, role: str, ready: tuple[Tensor, ...], lo: int, hi: int) -> Tensor:
        """Return the einsum for samples lo to hi."""
        inputs, letter, parts = self.equation.split("->")[0].split(","), self.batch_letter, []
        for letters, tensor in zip(inputs, ready, strict=True):
            parts.append(tensor.narrow(letters.index(letter), lo, hi - lo) if letter in letters else tensor)
        return torch.einsum(self.equation, *parts)

    def moments(self, role: str, ready: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Use `product_moments` for an equation that is a matrix product over positions."""
        inputs, target = self.equation.split("->")
        letters = inputs.split(",")
        n = self.batch_letter
        if len(letters) != 2 or n not in letters[0] or n not in letters[1]:
            return super().moments(role, ready)
        from_d = [c for c in target if c in letters[0] and c not in letters[1]]
        from_x = [c for c in target if c in letters[1] and c not in letters[0]]
        positions = [c for c in letters[0] if c != n and c not in target]
        if len(from_d) + len(from_x) + 1 != len(target) or sorted(positions) != sorted(
            c for c in letters[1] if c != n and c not in target
        ):
            return super().moments(role, ready)
        d, x = (
            tensor.permute([own.index(c) for c in (n, *positions, *mine)]).reshape(
                self.num_samples, -1, *([_size(tensor, own, mine)])
            )
            for tensor, own, mine in zip(ready, letters, (from_d, from_x), strict=True)
        )
        sizes = [
            dict(zip(letters[0], ready[0].shape, strict=True)) | dict(zip(letters[1], ready[1].shape, strict=True))
        ]
        order = [*from_d, *from_x]
        back = [order.index(c) for c in target[1:]]
        total, squares = product_moments(d, x)
        shape = [sizes[0][c] for c in order]
        return total.reshape(shape).permute(back), squares.reshape(shape).permute(back)


def _size(tensor: Tensor, letters: str, mine: list[str]) -> int:
    size = 1
    for letter in mine:
        size *= tensor.shape[letters.index(letter)]
    return size


@rule(torch.einsum)
def einsum(scope: Scope, equation: str, *factors: Any) -> Tensor:
    """Products of one parameter with any number of batched tensors."""
    if len(factors) == 1 and isinstance(factors[0], (list, tuple)):
        factors = tuple(factors[0])
    inputs, output = _letters(equation, factors)
    where = [index for index, factor in enumerate(factors) if scope.operand(factor) is not None]
    if len(where) > 1:
        raise UserError(
            "track: einsum of two parameters with data; multiply the parameters first, in an einsum of their own"
        )
    index = where[0]
    operand = scope.operand(factors[index])
    assert operand is not None
    others = [i for i in range(len(factors)) if i != index]
    batched = next(i for i in others if scope.is_batched(factors[i]))
    letter = inputs[batched][scope.batch_dim]
    num_samples = scope.samples_in(factors[batched].shape[scope.batch_dim], "einsum")
    if letter not in output or letter in inputs[index] or factors[batched].shape[scope.batch_dim] != num_samples:
        raise UserError(f"track: cannot tell the samples apart in einsum '{equation}'; {WAY_OUT}")
    known = {letter, *output, *(c for i in others for c in inputs[i])}
    if not set(inputs[index]) <= known:
        raise UserError(f"track: einsum '{equation}' sums a parameter over an index of its own; sum it before")
    rows = ",".join([output, *(inputs[i] for i in others)]) + f"->{letter}{inputs[index]}"
    detached = [factor.detach() if i == index else factor for i, factor in enumerate(factors)]
    result = torch.einsum(",".join(inputs) + "->" + output, *detached)
    operation = Einsum(num_samples, rows, letter)
    return scope.tap(operation, result, tuple(factors[i] for i in others), (operand,))


def _letters(equation: str, factors: tuple[Tensor, ...]) -> tuple[list[str], str]:
    """Return the index letters of each factor and of the output, with '...' spelled out in capitals."""
    equation = equation.replace(" ", "")
    left, arrow, output = equation.partition("->")
    inputs = left.split(",")
    spare = [c for c in "ZYXWVUTSRQPONMLKJIHGFEDCBA" if c not in equation]
    width = max((f.ndim - len(c) + 3 for c, f in zip(inputs, factors, strict=True) if "..." in c), default=0)
    dots = "".join(spare[:width])
    if not arrow:
        flat = left.replace("...", "").replace(",", "")
        output = ("..." if "..." in left else "") + "".join(sorted(c for c in set(flat) if flat.count(c) == 1))
    named = [
        c.replace("...", dots[width - (f.ndim - len(c) + 3) :]) if "..." in c else c
        for c, f in zip(inputs, factors, strict=True)
    ]
    return named, output.replace("...", dots)


@rule(torch.bilinear)
def bilinear(scope: Scope, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y[o] = sum_ij x1[i] w[o, i, j] x2[j] + b[o]."""
    from largebatch.moments.elementwise import run

    if scope.operand(weight) is not None:
        product = einsum(scope, "...i,oij,...j->...o", input1, weight, input2)
    else:
        product = torch.bilinear(input1, input2, weight)
        product._largebatch_batched = True  # type: ignore[attr-defined]
    if bias is None:
        return product
    if scope.operand(bias) is None:
        return product + bias
    return run(scope, torch.add, (product, bias), {})
