"""Adagrad, RMSProp, Adam and AdamW: gradients divided by a root of their running second moment.

Each update rule is a pure function on lists of tensors (foreach) under its formula; the classes walk the groups. State keys
are ``exp_avg`` and ``exp_avg_sq`` throughout, and ``p.grad`` is left as it was found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

BiasCorrection = Literal["published", "running_mean"]


def _denominators(second_moments: list[Tensor], exponent: float, eps: float) -> list[Tensor]:
    """Return s**exponent + eps."""
    roots = torch._foreach_sqrt(second_moments) if exponent == 0.5 else torch._foreach_mul(second_moments, 1.0)
    torch._foreach_add_(roots, eps)
    return list(roots)


class RunningWeight:
    """Weight of the newest value in a running average, and what the average is divided by.

    ``published``: weight 1 - beta, divided by 1 - prod(beta), which is Adam's 1 - beta^t while beta is constant.
    ``running_mean``: weight 1/min(t, N) with N = 1/(1 - beta), divided by 1; for t <= N exactly the mean of x_1..x_t
    (McAllester, TTIC 31230). Both count on through a change of beta, as a growing batch brings.

    The state is one float in the optimizer's group, so that it is saved and loaded with it.
    """

    @staticmethod
    def advance(group: dict[str, Any], key: str, beta: float, correction: BiasCorrection) -> tuple[float, float]:
        """Count one update; return (weight, divisor)."""
        if correction == "running_mean":
            length = 1.0 / (1.0 - beta)
            group[key] = min(group.get(key, 0.0) + 1.0, length)
            return 1.0 / group[key], 1.0
        group[key] = group.get(key, 1.0) * beta
        return 1.0 - beta, 1.0 - group[key]


class AdaptiveOptimizer(torch.optim.Optimizer):
    """Walks the groups, hands gradients and state to `update`, and leaves gradients untouched."""

    state_names: tuple[str, ...] = ("exp_avg_sq",)

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        for name in ("lr", "eps", "weight_decay"):
            if not defaults[name] >= 0:
                raise ValueError(f"{name}: expected a value >= 0, got {defaults[name]}")
        for name in ("alpha", "momentum"):
            if not 0 <= defaults.get(name, 0.0) < 1:
                raise ValueError(f"{name}: expected a value in [0, 1), got {defaults[name]}")
        if not all(0 <= beta < 1 for beta in defaults.get("betas", ())):
            raise ValueError(f"betas: expected two values in [0, 1), got {defaults['betas']}")
        if defaults.get("exponent", 0.5) not in (0.5, 1.0):
            raise ValueError(f"exponent: expected 0.5 or 1, got {defaults['exponent']}")
        if defaults.get("bias_correction", "published") not in ("published", "running_mean"):
            raise ValueError(
                f"bias_correction: expected published or running_mean, got {defaults['bias_correction']!r}"
            )
        super().__init__(params, defaults)

    def used_state(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Return the names of the state tensors that this group's options need."""
        return self.state_names

    def update(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], state: dict[str, list[Tensor]]
    ) -> None:
        """Update ``params`` and ``state`` in place."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Do one update; ``closure`` as in torch.optim."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params: list[Tensor] = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads: list[Tensor] = [p.grad for p in params if p.grad is not None]
            for p in params:
                for name in self.used_state(group):
                    if name not in self.state[p]:
                        self.state[p][name] = torch.zeros_like(p)
            state = {name: [self.state[p][name] for p in params] for name in self.used_state(group)}
            self.update(group, params, grads, state)
        return loss


class Adam(AdaptiveOptimizer):
    """Adam (Kingma and Ba 2015, arXiv:1412.6980).

        m = beta1*m + (1-beta1)*g
        s = beta2*s + (1-beta2)*g^2
        p -= lr * (m/c1) / (sqrt(s/c2) + eps)

    Args:
        params: parameters or groups.
        lr: learning rate, >= 0.
        betas: coefficients of the two running averages, in [0, 1).
        eps: added to the root, >= 0.
        weight_decay: L2 coefficient, added to the gradient.
        bias_correction: ``published`` (c = 1 - beta^t) or ``running_mean`` (weights 1/min(t, N), c = 1).
    """

    state_names = ("exp_avg", "exp_avg_sq")
    decoupled_weight_decay = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        bias_correction: BiasCorrection = "published",
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bias_correction": bias_correction},
        )

    def update(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], state: dict[str, list[Tensor]]
    ) -> None:
        """Apply the rule above."""
        lr, weight_decay, correction = group["lr"], group["weight_decay"], group["bias_correction"]
        weight1, divisor1 = RunningWeight.advance(group, "first_moment_count", group["betas"][0], correction)
        weight2, divisor2 = RunningWeight.advance(group, "second_moment_count", group["betas"][1], correction)
        if weight_decay and self.decoupled_weight_decay:
            torch._foreach_mul_(params, 1.0 - lr * weight_decay)
        elif weight_decay:
            grads = list(torch._foreach_add(grads, params, alpha=weight_decay))
        torch._foreach_lerp_(state["exp_avg"], grads, weight1)
        torch._foreach_mul_(state["exp_avg_sq"], 1.0 - weight2)
        torch._foreach_addcmul_(state["exp_avg_sq"], grads, grads, weight2)
        roots = torch._foreach_sqrt(state["exp_avg_sq"])
        torch._foreach_div_(roots, divisor2**0.5)
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_addcdiv_(params, state["exp_avg"], roots, value=-lr / divisor1)


class AdamW(Adam):
    """Adam with decoupled weight decay, p *= 1 - lr*wd before the update (Loshchilov and Hutter 2019, arXiv:1711.05101)."""

    decoupled_weight_decay = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        bias_correction: BiasCorrection = "published",
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, bias_correction)


class RMSProp(AdaptiveOptimizer):
    """RMSProp, plain or centered, with either exponent of the lectures, and heavy-ball momentum.

        s = alpha*s + (1-alpha)*g^2
        u = g / (s^q + eps),  q = 1/2 or 1;  centered: s - m^2 in place of s, with m = alpha*m + (1-alpha)*g
        v = mu*v + u;  p -= lr*v

    Args:
        params: parameters or groups.
        lr: learning rate, >= 0.
        alpha: coefficient of the running average of squares, in [0, 1).
        eps: added to the root, >= 0.
        weight_decay: L2 coefficient, added to the gradient.
        momentum: mu in [0, 1).
        centered: divide by the variance's root instead of the second moment's.
        exponent: q; 1/2 as published, 1 so that lr has the unit 1/loss (McAllester, TTIC 31230).
        bias_correction: ``none`` as published, or ``running_mean`` (weights 1/min(t, N)).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        exponent: float = 0.5,
        bias_correction: Literal["none", "running_mean"] = "none",
    ) -> None:
        if bias_correction not in ("none", "running_mean"):
            raise ValueError(f"bias_correction: expected none or running_mean, got {bias_correction!r}")
        self.bias_correction = bias_correction
        super().__init__(
            params,
            {
                "lr": lr,
                "alpha": alpha,
                "eps": eps,
                "weight_decay": weight_decay,
                "momentum": momentum,
                "centered": centered,
                "exponent": exponent,
            },
        )

    def used_state(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Return exp_avg_sq, with exp_avg where centered and momentum_buffer where there is momentum."""
        names = ("exp_avg_sq",)
        return names + ("exp_avg",) * group["centered"] + ("momentum_buffer",) * (group["momentum"] > 0)

    def update(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], state: dict[str, list[Tensor]]
    ) -> None:
        """Apply the rule above."""
        weight = 1.0 - group["alpha"]
        if self.bias_correction == "running_mean":
            weight, _ = RunningWeight.advance(group, "second_moment_count", group["alpha"], "running_mean")
        if group["weight_decay"]:
            grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
        torch._foreach_mul_(state["exp_avg_sq"], 1.0 - weight)
        torch._foreach_addcmul_(state["exp_avg_sq"], grads, grads, weight)
        second_moments = state["exp_avg_sq"]
        if group["centered"]:
            torch._foreach_lerp_(state["exp_avg"], grads, weight)
            second_moments = list(
                torch._foreach_addcmul(second_moments, state["exp_avg"], state["exp_avg"], value=-1.0)
            )
            # Rounding can leave a variance of -1e-20, whose root is NaN.
            torch._foreach_clamp_min_(second_moments, 0.0)
        denominators = _denominators(second_moments, group["exponent"], group["eps"])
        if group["momentum"] > 0:
            torch._foreach_mul_(state["momentum_buffer"], group["momentum"])
            torch._foreach_addcdiv_(state["momentum_buffer"], grads, denominators)
            torch._foreach_add_(params, state["momentum_buffer"], alpha=-group["lr"])
        else:
            torch._foreach_addcdiv_(params, grads, denominators, value=-group["lr"])


class Adagrad(AdaptiveOptimizer):
    """Adagrad (Duchi et al. 2011).

        s = s + g^2
        p -= lr * g / (sqrt(s) + eps)

    Args:
        params: parameters or groups.
        lr: learning rate, >= 0.
        eps: added to the root, >= 0.
        weight_decay: L2 coefficient, added to the gradient.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-2, eps: float = 1e-10, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay})

    def update(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], state: dict[str, list[Tensor]]
    ) -> None:
        """Apply the rule above."""
        if group["weight_decay"]:
            grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
        torch._foreach_addcmul_(state["exp_avg_sq"], grads, grads)
        torch._foreach_addcdiv_(
            params, grads, _denominators(state["exp_avg_sq"], 0.5, group["eps"]), value=-group["lr"]
        )
