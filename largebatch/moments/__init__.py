"""Squares of gradients, of micro-batches and of single samples: the statistic behind batch-invariant second moments.

One linear layer, y = F.linear(x, w) with x [n, i], w [o, i] and y [n, o], from the call to its squares:

1. `track` puts a shadow of w's shape, `weight_grad_sq`, beside w, and sees every operation of the forward pass (`tracking`,
   `interception`). The model's argument x is marked: sample s is row s of dimension 0 (`samples`).
2. F.linear runs as it was called, w attached. Its rule (`rules.linear`) puts a *tap* on y, an identity.
3. In the backward pass the tap sees d = dL/dy [n, o], hands it on, and leaves (d, x) with w: sample s owes d_s^T x_s (`uses`).
4. After all taps of w its *collector* squares: sum_s (d_s^T x_s)^2 = (d^2)^T (x^2) [o, i], the gradient of the shadow.
5. F.linear marks y, sample s in row s (`operations`). If x had been sorted along its rows, the samples of the rows would not be
   known, and step 2 would be an error that names the parameter.

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
