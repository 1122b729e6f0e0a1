"""LARS and LAMB: the norm of a layer's step is proportional to the norm of its weights.

Norms, biases and other parameters that are exempt from weight decay keep a trust ratio of 1, as in both papers' experiments.
The key ``adapted`` says so in the groups of `param_groups`; in other groups it is every parameter of at most one dimension
that does. With the group key ``adapt_norm_and_bias`` they have a trust ratio too. A layer is one parameter tensor, so engines
that flatten parameters (DeepSpeed ZeRO) are not supported. Sharded DTensors are: their norms are those of the whole parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from largebatch.errors import UserError
from largebatch.optim.adaptive import AdamW, BiasCorrection
from largebatch.optim.averages import Moment
from largebatch.optim.groups import is_shadow_group, refuse_stray_shadows


def _norms(tensors: list[Tensor]) -> Tensor:
    """Return the 2-norms of whole tensors, (len(tensors),), the same on every rank where they are sharded."""
    norms = torch.stack(torch._foreach_norm(tensors))
    return norms.full_tensor() if hasattr(norms, "full_tensor") else norms


def _trust_ratios(numerators: Tensor, denominators: Tensor) -> list[Tensor]:
    """Return numerator / denominator of each layer, or 1 where either is 0: a layer of zeros could otherwise never change."""
    defined = (numerators > 0) & (denominators > 0)
    return list(torch.where(defined, numerators / denominators, 1.0).unbind())


def _adapted(group: dict[str, Any], params: list[Tensor]) -> list[int]:
    """Return the indices of the parameters that have a trust ratio of their own."""
    everything = group["adapt_norm_and_bias"] or group.get("adapted")
    return [index for index, p in enumerate(params) if everything or ("adapted" not in group and p.dim() > 1)]


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017, arXiv:1708.03888, algorithm 1).

        ratio = trust_coefficient * |p| / (|g| + wd*|p|)       of each layer
        v = mu*v + lr * ratio * (g + wd*p)
        p -= v

    Args:
        params: parameters or groups; groups of shadows are skipped.
        lr: global learning rate, >= 0; also the learning rate of parameters that are not adapted, whose ratio is 1.
        momentum: mu in [0, 1), in the form that includes the learning rate (``velocity`` of `SGD`).
        weight_decay: L2 coefficient, added to the gradient.
        trust_coefficient: length of a layer's step relative to the norm of its weights, at lr = 1; > 0.
        adapt_norm_and_bias: whether norms, biases and the like are adapted too.

    Raises:
        UserError: if an argument lies outside its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
        adapt_norm_and_bias: bool = False,
    ) -> None:
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise UserError(f"{name}: expected a value >= 0, got {value}")
        if not 0 <= momentum < 1:
            raise UserError(f"momentum: expected a value in [0, 1), got {momentum}")
        if not trust_coefficient > 0:
            raise UserError(f"trust_coefficient: expected a value > 0, got {trust_coefficient}")
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "trust_coefficient": trust_coefficient,
                "adapt_norm_and_bias": adapt_norm_and_bias,
            },
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch.optim; a group of shadows needs the key ``role: shadow``."""
        super().add_param_group(param_group)
        refuse_stray_shadows(self.param_groups[-1])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Do one update; ``closure`` as in torch.optim."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params: list[Tensor] = [p for p in group["params"] if p.grad is not None]
            if is_shadow_group(group) or not params:
                continue
            grads: list[Tensor] = [p.grad for p in params if p.grad is not None]
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            self.update(group, params, grads, [self.state[p]["momentum_buffer"] for p in params])
        return loss

    def update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], buffers: list[Tensor]) -> None:
        """Apply the rule above."""
        weight_decay = group["weight_decay"]
        steps = list(torch._foreach_add(grads, params, alpha=weight_decay))
        if layers := _adapted(group, params):
            lengths = _norms([params[index] for index in layers])
            pull = _norms([grads[index] for index in layers]) + weight_decay * lengths
            ratios = _trust_ratios(group["trust_coefficient"] * lengths, pull)
            torch._foreach_mul_([steps[index] for index in layers], ratios)
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, steps, alpha=group["lr"])
        torch._foreach_sub_(params, buffers)


class LAMB(AdamW):
    """LAMB (You et al. 2020, arXiv:1904.00962, algorithm 2, with phi(z) = z).

        m = beta1*m + (1-beta1)*g             far above the reference batch m is rescaled first (`largebatch.optim.carry`)
        s = beta2*s + (1-beta2)*s_ref         s_ref = g^2 where no squares are tracked
        u = (m/c1) / (sqrt(s/c2) + eps) + wd*p
        p -= lr * |p|/|u| * u                 of each layer

    Args:
        params: parameters or groups.
        lr: length of a layer's step relative to the norm of its weights, >= 0; Adam's rate for parameters not adapted.
        betas: coefficients of the two running averages, in [0, 1).
        eps: added to the root, >= 0.
        weight_decay: added to the direction, decoupled from the averages.
        bias_correction: ``published`` (c = 1 - beta^t) or ``running_mean`` (weights 1/min(t, N), c = 1).
        reference_batch_size: B_ref; required for the parameters of a tracked model (see `Moment`).
        adapt_norm_and_bias: whether norms, biases and the like are adapted too.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 1e-2,
        bias_correction: BiasCorrection = "published",
        reference_batch_size: int | None = None,
        adapt_norm_and_bias: bool = False,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, bias_correction, reference_batch_size)
        self.defaults["adapt_norm_and_bias"] = adapt_norm_and_bias
        for group in self.param_groups:
            group.setdefault("adapt_norm_and_bias", adapt_norm_and_bias)

    def update(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        state: dict[str, list[Tensor]],
        moment: Moment,
        counts: dict[str, float],
    ) -> None:
        """Apply the rule above."""
        lr = group["lr"]
        # AdamW's step at p = 0, where decoupled weight decay changes nothing: -lr * (m/c1) / (sqrt(s/c2) + eps).
        steps = [torch.zeros_like(p) for p in params]
        super().update(group, steps, grads, state, moment, counts)
        torch._foreach_add_(steps, params, alpha=-lr * group["weight_decay"])
        if layers := _adapted(group, params):
            lengths = _norms([params[index] for index in layers])
            moved = _norms([steps[index] for index in layers])
            torch._foreach_mul_([steps[index] for index in layers], _trust_ratios(lr * lengths, moved))
        torch._foreach_add_(params, steps)
