"""The largest curvature of a loss: the largest eigenvalue of its Hessian, by Hessian-vector products and Lanczos.

A product H v costs about two gradients, and the Hessian itself is never formed. Lanczos builds an orthonormal basis of the
Krylov space of a random vector, on which H becomes a small matrix. The largest eigenvalue is the algebraically largest: power
iteration would find the one of largest magnitude, which may be negative early in training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from largebatch.errors import UserError
from largebatch.noise.estimator import Noise, ratio_band, student_quantile


def hessian_product(loss: Tensor, params: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Tensor]:
    """Return H v of a loss with respect to some parameters, by differentiating its gradient (Pearlmutter 1994).

    Args:
        loss: a scalar with its graph, which is freed.
        params: leaf tensors, whose ``.grad`` is None afterwards; the product is zero where the loss does not depend on one.
        vectors: v, one tensor of each parameter's shape.

    Raises:
        UserError: if an operation has no second derivative.
    """
    for p in params:
        p.grad = None
    try:
        grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True, materialize_grads=True)
        pairs = [(g, v) for g, v in zip(grads, vectors, strict=True) if g.requires_grad]
        if not pairs:
            return [torch.zeros_like(p) for p in params]
        found, along = zip(*pairs, strict=True)
        # `grad` would skip branches that do not lead to the parameters, and so miss operations without a second derivative.
        torch.autograd.backward(found, along)
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    except RuntimeError as error:
        if not any(word in str(error) for word in ("derivative", "differentiate twice", "double backward")):
            raise
        raise UserError(
            f"curvature: an operation of the model has no second derivative ({str(error).splitlines()[0]}); build the model "
            "of operations of torch, without fused kernels of its own"
        ) from error
    finally:
        for p in params:
            p.grad = None


@dataclass(frozen=True)
class Eigenpair:
    """An approximate eigenvalue and its eigenvector.

    Args:
        value: theta.
        vector: x, (P,), of length 1.
        residual: |H x - theta x|; some eigenvalue is within this distance of theta.
        products: number of matrix-vector products.
    """

    value: float
    vector: Tensor
    residual: float
    products: int


@torch.no_grad()
def largest_eigenvalue(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    tolerance: float = 0.01,
    most_products: int = 100,
    most_vectors: int = 24,
) -> Eigenpair:
    """Return the algebraically largest eigenvalue of a symmetric matrix, by Lanczos with thick restarts.

    Each new vector is orthogonalised twice against the whole basis, so that float32 is precise enough. When the basis is full,
    the iteration restarts from a third as many Ritz vectors, those of the largest Ritz values (Wu and Simon 2000).

    Args:
        product: returns H v for v (P,).
        start: a random vector, (P,), not zero.
        tolerance: the iteration ends when the residual is at most this fraction of the eigenvalue's magnitude.
        most_products: largest number of matrix-vector products.
        most_vectors: largest number of basis vectors held in memory, >= 4.

    Example:
        >>> diagonal = torch.tensor([-9.0, 1.0, 4.0], dtype=torch.float64)
        >>> round(largest_eigenvalue(lambda v: diagonal * v, torch.ones(3, dtype=torch.float64)).value, 6)
        4.0
    """
    most_vectors = min(most_vectors, start.numel())
    vectors = start.new_empty(most_vectors, start.numel())
    vectors[0] = start / start.norm()
    projected = torch.zeros(most_vectors, most_vectors, dtype=torch.float64)
    size = 1
    for count in range(1, most_products + 1):
        image = product(vectors[size - 1])
        column = torch.zeros(size, dtype=torch.float64)
        for _ in range(2):
            parts = vectors[:size] @ image
            image = image - parts @ vectors[:size]
            column += parts.double().cpu()
        projected[:size, size - 1] = projected[size - 1, :size] = column
        values, rotations = torch.linalg.eigh(projected[:size, :size])
        rest, value = float(image.norm()), float(values[-1])
        residual = rest * abs(float(rotations[-1, -1]))
        if not math.isfinite(residual):
            raise UserError("curvature: the loss or its derivatives are not finite here")
        is_last = count == most_products or rest <= torch.finfo(start.dtype).tiny or size == start.numel()
        if residual <= tolerance * abs(value) or is_last:
            break
        if size == most_vectors:
            size = most_vectors // 3
            vectors[:size] = rotations[:, -size:].T.to(vectors) @ vectors
            projected = torch.zeros_like(projected)
            projected[:size, :size] = torch.diag(values[-size:])
        vectors[size] = image / rest
        size += 1
    return Eigenpair(value, rotations[:, -1].to(vectors) @ vectors[: len(values)], residual, count)


def noise_of_units(squares: Tensor, products: Tensor, unit_size: float, level: float = 0.99) -> Noise:
    """Return the noise scale and its band at one point of training, from the gradients of independent units of samples.

        |G|^2     = (|S|^2 - sum_u |g_u|^2) / (n (n-1))      S = sum_u g_u
        tr(Sigma) = m (mean_u |g_u|^2 - |G|^2)

    Both estimates are unbiased and use all pairs of units. Their variances are the jackknife's, from the estimates that leave
    out one unit each (Efron and Stein 1981).

    Args:
        squares: |g_u|^2 of each unit's mean gradient, (n,), n >= 8.
        products: <g_u, S>, (n,).
        unit_size: m, number of samples in a unit.
        level: confidence level of the band, in (0, 1).
    """
    squares, products = squares.double().cpu(), products.double().cpu()
    n, square, total = len(squares), squares.sum(), products.sum()

    def estimates(total: Tensor, square: Tensor, count: int) -> Tensor:
        signal = (total - square) / (count * (count - 1))
        return torch.stack([unit_size * (square / count - signal), signal])

    trace, signal = estimates(total, square, n).tolist()
    others = estimates(total - 2.0 * products + squares, square - squares, n - 1)
    of_trace, joint, _, of_signal = ((n - 1) ** 2 / n * torch.cov(others)).flatten().tolist()
    quantile = student_quantile(0.5 + 0.5 * level, n - 1.0)
    low, high = ratio_band(trace, signal, (of_trace, of_signal, joint), quantile)
    return Noise(trace, signal, max(trace, 0.0) / signal if signal > 0 else math.inf, low, high)
