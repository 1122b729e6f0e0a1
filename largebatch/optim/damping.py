"""Damping: division of steps by a measure of curvature, so that large batches are stable beyond the linear rule's limit.

At kappa times the reference batch an element's step, by any of the supported optimizers, is divided by

    1 + (1 - 1/kappa) x,   x = A h / (2 (1+b)),   between 0 and kappa

where A is the element's response, its immediate step per unit of gradient (lr for SGD, lr (1-b)/(c1 D) for Adam), b is the
momentum, and h the element's curvature: the secant `largebatch.noise.limit.curvature_of_steps` of averages over updates. x is
the undamped step as a share of the largest stable one. On a quadratic, damping keeps the stationary variance of kappa = 1 at
every kappa (docs/limit.md); x <= kappa, because the reference is stable. The averages are as long as a second moment's.

State of each element, beside the optimizer's own, in the parameter's type:

    previous_grad   g of the last update, before clipping
    grad_change     average of (g_t - g_{t-1})^2 / 2 - V
    step_sq         average of the squared step
    step_noise      average of A V: what this update's noise contributes, through its step, to the next change of the gradient
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from largebatch.moments.micro_batches import Units
from largebatch.noise.limit import curvature_of_steps
from largebatch.optim.around import is_decoupled
from largebatch.optim.response import lookahead_of, momentum_of, require_response, responses
from largebatch.optim.shift import variances_of
from largebatch.scaling.rules import second_moment_coefficient

PREVIOUS = "previous_grad"
AVERAGES = ("grad_change", "step_sq", "step_noise")
STATE = (PREVIOUS, *AVERAGES)
# Coefficient for an optimizer without a second moment: Adam's default beta2.
COEFFICIENT = 0.999
# An average of fewer than 20 updates is too noisy a measure of curvature, and of the denominator of the step.
SHORTEST = 0.95


def averages_coefficient(group: dict[str, Any], kappa: float, of_reference: bool) -> float:
    """Return the coefficient of damping's averages at kappa times the reference batch: that of a second moment.

    Args:
        group: the group, with the values of the reference or of the update.
        kappa: B / B_ref.
        of_reference: whether the values are those of the reference.
    """
    own = group["betas"][1] if "betas" in group else group.get("alpha")
    if own is not None and not of_reference:
        return float(own)
    return second_moment_coefficient(COEFFICIENT if own is None else float(own), kappa, SHORTEST)


@dataclass
class Damped:
    """The quantities that are kept for some parameters from before their step until after it.

    Args:
        params: the parameters.
        states: the optimizer's state of each parameter.
        before: values of the parameters before the step.
        grads: mean gradients before clipping.
        variances: V of the mean gradient before clipping.
        clip: factor by which the gradients were clipped since.
        kappa: B / B_ref.
        coefficient: coefficient of the averages.
    """

    params: list[Tensor]
    states: list[dict[str, Any]]
    before: list[Tensor]
    grads: list[Tensor]
    variances: list[Tensor]
    clip: float
    kappa: float
    coefficient: float


@torch.no_grad()
def begin_damped(
    params: list[Tensor],
    grads: Sequence[Tensor],
    variances: list[Tensor],
    states: list[dict[str, Any]],
    *,
    kappa: float,
    coefficient: float,
    spread: float = 0.5,
    clip: float = 1.0,
) -> Damped:
    """Measure how the gradients have changed, before the step.

    Args:
        params: the parameters that will be stepped.
        grads: mean gradients, over all ranks.
        variances: V of each gradient before clipping; kept until `end_damped`.
        states: the optimizer's state of each parameter, changed in place.
        kappa: B / B_ref, above 1.
        coefficient: coefficient of the averages.
        spread: 1 / (1 + B_t / B_{t-1}).
        clip: factor by which the gradients were clipped since the backward passes.
    """
    whole = [gradient / clip for gradient in grads] if clip not in (0.0, 1.0) else list(grads)
    for gradient, variance, state in zip(whole, variances, states, strict=True):
        previous = state.get(PREVIOUS)
        if previous is not None:
            change = (gradient - previous).square_().mul_(0.5).sub_(variance, alpha=0.5 / spread)
            state[AVERAGES[0]].lerp_(change.to(previous.dtype), 1.0 - coefficient)
    before = [p.detach().clone() for p in params]
    return Damped(params, states, before, whole, variances, clip, kappa, coefficient)


@torch.no_grad()
def end_damped(
    damped: Damped, responses: list[Any], beta: float, lookahead: float, shrink: float
) -> dict[Tensor, Tensor]:
    """Damp the step that was made, and average it; return the factor by which each parameter's step was multiplied.

    Args:
        damped: the return value of `begin_damped`.
        responses: A of each parameter at this update's learning rate; numbers or tensors.
        beta: b, the momentum.
        lookahead: factor by which the limit is smaller than with plain momentum (`response.lookahead_of`).
        shrink: factor by which decoupled weight decay multiplied the parameters, which is no part of the step.
    """
    factors: dict[Tensor, Tensor] = {}
    pieces = (damped.params, damped.states, damped.before, damped.grads, damped.variances, responses)
    for p, state, before, gradient, variance, response in zip(*pieces, strict=True):
        # In place where possible: for many elements new memory costs more than the arithmetic.
        effective = response if damped.clip == 1.0 else response * damped.clip
        if AVERAGES[0] in state:
            share = curvature_of_steps(*(state[name] for name in AVERAGES)).mul_(effective)
            share.mul_(lookahead / (2.0 * (1.0 + beta))).nan_to_num_(0.0, posinf=damped.kappa).clamp_(max=damped.kappa)
            factor = factors[p] = share.mul_(1.0 - 1.0 / damped.kappa).add_(1.0).reciprocal_()
            start = before if shrink == 1.0 else before * shrink
            p.sub_(start).mul_(factor).add_(start)
            effective = factor * effective
        else:
            state[PREVIOUS] = torch.empty_like(p)
            for name in AVERAGES:
                state[name] = torch.zeros_like(p)
        weight = 1.0 - damped.coefficient
        state[AVERAGES[1]].lerp_(before.sub_(p).square_(), weight)
        state[AVERAGES[2]].lerp_(variance.mul_(effective).to(p.dtype), weight)
        state[PREVIOUS].copy_(gradient)
    return factors


def forget_damping(states: Sequence[dict[str, Any]]) -> None:
    """Remove damping's tensors from the states, so that the next gradient has no predecessor to be compared with."""
    for state in states:
        for name in STATE:
            state.pop(name, None)


class Damping:
    """The damping of an optimizer's steps, for gradients whose micro-batches are squared by hooks.

    Args:
        optimizer: the optimizer whose steps are damped.
        of_reference: whether its groups have the values of the reference at `begin`, and not yet those of the update.

    Raises:
        UserError: if the optimizer's steps cannot be damped.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, of_reference: bool = True) -> None:
        require_response(optimizer)
        self.optimizer, self.of_reference = optimizer, of_reference
        self._templates: set[Tensor] = set()
        self._damped: list[tuple[dict[str, Any], Damped]] = []

    def make_templates(self) -> None:
        """Give each parameter with a state all of damping's tensors, zeros if it was not damped, for uniform checkpoints."""
        for p, state in self.optimizer.state.items():
            if PREVIOUS not in state:
                state.update({name: torch.zeros_like(p) for name in STATE})
                self._templates.add(p)

    def drop_templates(self) -> None:
        """Remove damping's tensors from the state of parameters that were not damped."""
        state = self.optimizer.state
        forget_damping([state[p] for p in self._templates if p in state])
        self._templates = set()

    def loaded(self) -> None:
        """Find the parameters of a loaded state that were not damped, and remove their tensors."""
        states = self.optimizer.state.items()
        self._templates = {p for p, state in states if AVERAGES[1] in state and not bool(state[AVERAGES[1]].any())}
        self.drop_templates()

    def begin(self, units: Units, spread: float, kappa: float) -> None:
        """Measure how the gradients have changed, before the step; with a single unit the change cannot be told from noise.

        Args:
            units: the units of the update.
            spread: 1 / (1 + B_t / B_{t-1}).
            kappa: B / B_ref; nothing is damped at the reference or below it.
        """
        state, slots = self.optimizer.state, {slot.parameter: slot for slot in units.slots}
        self._damped = []
        self.drop_templates()
        if kappa <= 1.0 or units.num_units <= 1:
            forget_damping([state[p] for p in slots if p in state])
            return
        for group in self.optimizer.param_groups:
            found = [slots[p] for p in group["params"] if p in slots]
            if not found:
                continue
            part = begin_damped(
                [slot.parameter for slot in found],
                [slot.gradient() for slot in found],
                variances_of(found, units),
                [state[slot.parameter] for slot in found],
                kappa=kappa,
                coefficient=averages_coefficient(group, kappa, self.of_reference),
                spread=spread,
                clip=units.clip,
            )
            self._damped.append((group, part))

    def end(self, updates_of: Callable[[Tensor], float]) -> dict[Tensor, Tensor]:
        """Damp the step that was made, while the groups have its values; return the factor on each parameter's step.

        Args:
            updates_of: returns the number of a parameter's updates, including this one, as torch's Adam counts them.
        """
        factors: dict[Tensor, Tensor] = {}
        for group, part in self._damped:
            shrink = 1.0 - group["lr"] * group["weight_decay"] if is_decoupled(self.optimizer, group) else 1.0
            found = responses(self.optimizer, group, part.states, [updates_of(p) for p in part.params])
            factors |= end_damped(part, found, momentum_of(group), lookahead_of(group), shrink)
        self._damped = []
        return factors
