"""Adagrad, RMSProp, Adam and AdamW: gradients divided by a root of their running second moment.

Each class documents its update rule as a formula, and its `update` applies the rule to lists of tensors in place (foreach). The
state keys are ``exp_avg`` and ``exp_avg_sq`` in all of them, and ``p.grad`` is not changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from largebatch.errors import UserError
from largebatch.optim.averages import Moment, advance_average, divisor_of, smallest_ratio
from largebatch.optim.carry import carry, is_carried, pieces, roots, roots_before, uncarried_share
from largebatch.optim.groups import is_shadow_group, refuse_stray_shadows
from largebatch.reduce import num_ranks

BiasCorrection = Literal["published", "running_mean"]


def _with_decay(grads: list[Tensor], params: list[Tensor], weight_decay: float) -> list[Tensor]:
    """Return gradients with L2 weight decay added, or the same list if weight_decay is 0."""
    return list(torch._foreach_add(grads, params, alpha=weight_decay)) if weight_decay else grads


class AdaptiveOptimizer(torch.optim.Optimizer):
    """Base class that walks the groups, passes gradients and state to `update`, and leaves gradients unchanged."""

    state_names: tuple[str, ...] = ("exp_avg_sq",)
    count_names: tuple[str, ...] = ()
    """Names of the counts in a parameter's state by which its averages are corrected for bias. Each parameter has its own
    counts, because it may lack a gradient in some updates."""
    moment_source: Callable[[dict[str, Any], list[Tensor]], Moment] | None = None
    """If set, called with a group and its parameters that have a gradient; returns the `Moment` to use instead of shadows."""
    squares_all = True
    """Whether the coming update's squares are of all its units, not only of some."""

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

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch.optim; a group of shadows needs the key ``role: shadow``."""
        super().add_param_group(param_group)
        refuse_stray_shadows(self.param_groups[-1])

    def used_state(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Return the names of the state tensors that this group's options need."""
        return self.state_names

    def set_batch(self, batch_size: int, num_units: float | None = None, world_size: int | None = None) -> None:
        """Set of how many samples and units the coming step's gradients are means; required where squares are tracked.

        Args:
            batch_size: B, number of samples in the update over all ranks.
            num_units: n, number of independent units in the mean whose squares were tracked: B for samples (the default);
                for micro-batches their number, or 1/sum(w^2) where their weights w in the mean differ.
            world_size: number of ranks over which the engine averaged gradients; optional on one process.
        """
        if world_size is None and (ranks := num_ranks()) > 1:
            raise UserError(f"set_batch: expected world_size, the ranks that average gradients, as there are {ranks}")
        for group in self.param_groups:
            group.update(batch_size=batch_size, num_units=num_units or batch_size, world_size=world_size or 1)

    def update(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        state: dict[str, list[Tensor]],
        moment: Moment,
        counts: dict[str, float],
    ) -> None:
        """Update ``params`` and ``state`` in place, and ``counts``, which are the same for all of these parameters."""
        raise NotImplementedError

    def _moment(self, group: dict[str, Any], shadows: list[Tensor]) -> Moment:
        """Return how this update's second moment is estimated from the shadows of a group."""
        if any(shadow.grad is None for shadow in shadows):
            raise RuntimeError(
                "a parameter has a gradient but its shadow has none: was the model tracked before wrapping?"
            )
        reference = group["reference_batch_size"]
        if reference is None:
            raise ValueError(
                "reference_batch_size: missing; the parameter groups come from a tracked model "
                "(for plain second moments: param_groups(model, squares=False))"
            )
        if "batch_size" not in group:
            raise RuntimeError("call set_batch(batch_size, ...) before step(): the squares' scale depends on it")
        kappa, num_units = group["batch_size"] / reference, group["num_units"]
        # A single unit does not show the variance between units.
        share = (kappa - 1.0) / (num_units - 1.0) if num_units > 1 else 0.0
        squares, scale = [s.grad for s in shadows if s.grad is not None], num_units / group["world_size"]
        return Moment(squares, share, scale, kappa, equal=self.squares_all and float(num_units).is_integer())

    def _begin_state(self, group: dict[str, Any], params: list[Tensor], paired: list[Tensor]) -> None:
        """Create the state that parameters lack; ``paired`` are their shadows, if they have any."""
        names = self.used_state(group)
        for index, p in enumerate(params):
            own = self.state[p]
            for name in self.count_names if own else ():
                if name not in own and name in group:  # from a state that an earlier release saved
                    own[name] = float(group[name])
            for name in names:
                if name not in own:
                    own[name] = torch.zeros_like(p)
            # A shadow's value is otherwise unused, so it stores the average without further memory.
            if paired and own["exp_avg_sq"] is not paired[index]:
                paired[index].copy_(own["exp_avg_sq"])
                own["exp_avg_sq"] = paired[index]

    def _alike(self, params: list[Tensor]) -> list[tuple[dict[str, float], list[int]]]:
        """Return the distinct counts, each with the indices of the parameters that have them; usually there is one entry."""
        found: dict[tuple[float | None, ...], list[int]] = {}
        for index, p in enumerate(params):
            own = self.state[p]
            found.setdefault(tuple([own.get(name) for name in self.count_names]), []).append(index)
        return [
            ({name: count for name, count in zip(self.count_names, key, strict=True) if count is not None}, indices)
            for key, indices in found.items()
        ]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Do one update; ``closure`` as in torch.optim."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        shadows: list[Tensor] = []
        for group in self.param_groups:
            if is_shadow_group(group):  # the shadows of the next group's parameters
                shadows = group["params"] if group.get("used", True) else []
                continue
            present = [index for index, p in enumerate(group["params"]) if p.grad is not None]
            params: list[Tensor] = [group["params"][index] for index in present]
            paired, shadows = [shadows[index] for index in present] if shadows else [], []
            if not params:
                continue
            self._begin_state(group, params, paired)
            for counts, indices in self._alike(params):
                chosen, squared = params, paired
                if len(indices) < len(params):
                    chosen, squared = [params[i] for i in indices], [paired[i] for i in indices] if paired else []
                grads: list[Tensor] = [p.grad for p in chosen if p.grad is not None]
                own = [self.state[p] for p in chosen]
                state = {name: [values[name] for values in own] for name in self.used_state(group)}
                moment = self._moment(group, squared) if squared else Moment()
                if self.moment_source is not None:
                    moment = self.moment_source(group, chosen)
                self.update(group, chosen, grads, state, moment, counts)
                for values in own:
                    values.update(counts)
        return loss


class Adam(AdaptiveOptimizer):
    """Adam (Kingma and Ba 2015, arXiv:1412.6980).

        s = beta2*s + (1-beta2)*s_ref         s_ref = g^2 where no squares are tracked
        m = beta1*m + (1-beta1)*g             far above the reference batch m is rescaled first (`largebatch.optim.carry`)
        p -= lr * (m/c1) / (sqrt(s/c2) + eps)

    Args:
        params: parameters or groups.
        lr: learning rate, >= 0.
        betas: coefficients of the two running averages, in [0, 1).
        eps: added to the root, >= 0.
        weight_decay: L2 coefficient, added to the gradient.
        bias_correction: ``published`` (c = 1 - beta^t) or ``running_mean`` (weights 1/min(t, N), c = 1).
        reference_batch_size: B_ref; required for the parameters of a tracked model (see `Moment`).
    """

    state_names = ("exp_avg", "exp_avg_sq")
    count_names = ("first_moment_count", "second_moment_count")
    decoupled_weight_decay = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        bias_correction: BiasCorrection = "published",
        reference_batch_size: int | None = None,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "bias_correction": bias_correction,
                "reference_batch_size": reference_batch_size,
            },
        )

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
        correction, eps = group["bias_correction"], group["eps"]
        carries = "second_moment_count" in counts and is_carried(moment.kappa, group["betas"][1])
        before = divisor_of(counts, "second_moment_count", correction)
        weight1, divisor1 = advance_average(counts, "first_moment_count", group["betas"][0], correction)
        weight2, divisor2 = advance_average(counts, "second_moment_count", group["betas"][1], correction)
        decay = group["lr"] * group["weight_decay"] if self.decoupled_weight_decay else 0.0
        l2 = 0.0 if self.decoupled_weight_decay else group["weight_decay"]
        # `roots` returns the denominators times sqrt(divisor2).
        step = -group["lr"] / divisor1 * math.sqrt(divisor2)
        lists = params, grads, state["exp_avg"], state["exp_avg_sq"], *([moment.squares] if moment.squares else [])
        for params, grads, means, squares, *tracked in pieces(*lists):
            part = replace(moment, squares=tracked[0]) if tracked else moment
            if decay:
                torch._foreach_mul_(params, 1.0 - decay)
            decayed = _with_decay(grads, params, l2)
            older = roots_before(squares, before, eps) if carries else []
            torch._foreach_mul_(squares, 1.0 - weight2)
            direction = bound = None  # a carried average is one of quotients, each of which is bounded
            if part.is_bounded and not is_carried(moment.kappa, group["betas"][1]):
                direction, bound = list(torch._foreach_lerp(means, decayed, weight1)), smallest_ratio(*group["betas"])
            part.add_to(squares, grads, decayed, weight2, direction, bound)
            newer = roots(squares, divisor2, eps)
            if carries:
                share = uncarried_share(moment.kappa, group["betas"][1])
                carry(means, older, newer, math.sqrt(before / divisor2), share)
            torch._foreach_lerp_(means, decayed, weight1)
            torch._foreach_addcdiv_(params, means, newer, value=step)


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
        reference_batch_size: int | None = None,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, bias_correction, reference_batch_size)


class RMSProp(AdaptiveOptimizer):
    """RMSProp, plain or centered, with either exponent of the lectures, and heavy-ball momentum.

        s = alpha*s + (1-alpha)*s_ref         s_ref = g^2 where no squares are tracked
        u = g / (s^q + eps),  q = 1/2 or 1;  centered: s - m^2 in place of s, with m = alpha*m + (1-alpha)*g
        v = mu*v + u;  p -= lr*v

    Args:
        params: parameters or groups.
        lr: learning rate, >= 0.
        alpha: coefficient of the running average of squares, in [0, 1).
        eps: added to the root, >= 0.
        weight_decay: L2 coefficient, added to the gradient.
        momentum: mu in [0, 1).
        centered: whether to divide by a power of the variance instead of the second moment.
        exponent: q; 1/2 as published, or 1, with which lr has the unit 1/loss (McAllester, TTIC 31230).
        bias_correction: ``none`` as published, or ``running_mean`` (weights 1/min(t, N)).
        reference_batch_size: B_ref; required for the parameters of a tracked model (see `Moment`).
    """

    count_names = ("first_moment_count", "second_moment_count")

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
        reference_batch_size: int | None = None,
    ) -> None:
        if bias_correction not in ("none", "running_mean"):
            raise ValueError(f"bias_correction: expected none or running_mean, got {bias_correction!r}")
        self.bias_correction = bias_correction
        own = {"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay, "momentum": momentum}
        more = {"centered": centered, "exponent": exponent, "reference_batch_size": reference_batch_size}
        super().__init__(params, own | more)

    def __getstate__(self) -> dict[str, Any]:
        """Return torch.optim's state for copies and pickles, and the bias correction."""
        return super().__getstate__() | {"bias_correction": self.bias_correction}

    def used_state(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Return exp_avg_sq, and exp_avg if centered, and momentum_buffer if there is momentum."""
        has = {"exp_avg_sq": True, "exp_avg": group["centered"], "momentum_buffer": group["momentum"] > 0}
        return tuple(name for name, is_used in has.items() if is_used)

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
        weight, _ = advance_average(counts, "second_moment_count", group["alpha"], self.bias_correction)
        decayed = _with_decay(grads, params, group["weight_decay"])
        torch._foreach_mul_(state["exp_avg_sq"], 1.0 - weight)
        moment.add_to(state["exp_avg_sq"], grads, decayed, weight, means=state.get("exp_avg"))
        second_moments = state["exp_avg_sq"]
        if group["centered"]:
            mean_weight, _ = advance_average(counts, "first_moment_count", group["alpha"], self.bias_correction)
            means = state["exp_avg"]
            torch._foreach_lerp_(means, decayed, mean_weight)
            second_moments = list(torch._foreach_addcmul(second_moments, means, means, value=-1.0))
            # A variance may round to a negative number such as -1e-20, whose root is NaN.
            torch._foreach_clamp_min_(second_moments, 0.0)
        powers = torch._foreach_sqrt(second_moments) if group["exponent"] == 0.5 else second_moments
        denominators = list(torch._foreach_add(powers, group["eps"]))
        if buffers := state.get("momentum_buffer"):
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_addcdiv_(buffers, decayed, denominators)
            torch._foreach_add_(params, buffers, alpha=-group["lr"])
        else:
            torch._foreach_addcdiv_(params, decayed, denominators, value=-group["lr"])


class Adagrad(AdaptiveOptimizer):
    """Adagrad (Duchi et al. 2011).

        s = s + g^2                   s = s + kappa * s_ref where squares are tracked: an update at batch size B
        p -= lr * g / (sqrt(s) + eps)                         stands for kappa = B/B_ref updates at the reference

    Args:
        params: parameters or groups.
        lr: learning rate, >= 0.
        eps: added to the root, >= 0.
        weight_decay: L2 coefficient, added to the gradient.
        reference_batch_size: B_ref; required for the parameters of a tracked model (see `Moment`).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        reference_batch_size: int | None = None,
    ) -> None:
        own = {"lr": lr, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, own | {"reference_batch_size": reference_batch_size})

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
        decayed = _with_decay(grads, params, group["weight_decay"])
        moment.add_to(state["exp_avg_sq"], grads, decayed, moment.kappa)
        denominators = roots(state["exp_avg_sq"], 1.0, group["eps"])
        torch._foreach_addcdiv_(params, decayed, denominators, value=-group["lr"])
