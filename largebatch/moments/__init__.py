"""Squared gradients of micro-batches and of single samples: the statistic behind batch-invariant second moments.

The steps for one linear layer, y = F.linear(x, w) with x [n, i], w [o, i] and y [n, o], from the call to its squares:

1. `track` registers a shadow parameter `weight_grad_sq` of w's shape beside w (`tracking`). A forward pass intercepts every
   operation (`interception`), and marks the model's argument x: sample s is row s of dimension 0 (`samples`).
2. F.linear runs as it was called. Its rule (`rules.linear`) puts a *tap*, an identity function, on y.
3. In the backward pass the tap receives d = dL/dy [n, o], returns it unchanged, and stores (d, x) for w: the gradient of
   sample s is d_s^T x_s (`uses`).
4. After all taps of w its *collector* computes sum_s (d_s^T x_s)^2 = (d^2)^T (x^2) [o, i], the gradient of the shadow.
5. The rule also marks y: sample s is row s. If x had been sorted along its rows, the sample of each row would not be known
   (`operations`), and step 2 would raise an error that names the parameter.

    >>> import torch
    >>> model = track(torch.nn.Linear(2, 1, bias=False))
    >>> x = torch.tensor([[1.0, 2.0], [3.0, -4.0]])
    >>> model(x).sum().backward()  # d_s = 1: the samples' gradients are the rows of x
    >>> model.weight.grad, model.weight_grad_sq.grad
    (tensor([[ 4., -2.]]), tensor([[10., 20.]]))
"""

from largebatch.moments.tracking import (
    chosen_samples,
    grad_sample_sq,
    is_shadow,
    shadows,
    statistic_scale,
    track,
    tracked_parameters,
    untrack,
)
from largebatch.moments.verify import verify

__all__ = ["chosen_samples", "grad_sample_sq", "is_shadow", "shadows", "statistic_scale", "track", "tracked_parameters"]
__all__ += ["untrack", "verify"]
