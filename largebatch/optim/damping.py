"""Steps damped by the curvature that they meet: a large batch follows its reference beyond the limit of the linear rule.

At kappa times the reference batch an element's step, whatever optimizer makes it, is divided by

    1 + (1 - 1/kappa) x,   x = A h / (2 (1+b)),   between 0 and kappa

with A what a gradient moves at once (lr for SGD, lr (1-b)/(c1 D) for Adam), b the momentum and h the curvature that the element
has met: the secant of `largebatch.noise.limit.curvature_of_steps`, of averages over updates. x is the share of the largest
stable step that the undamped one would take. On a quadratic this keeps the stationary variance of kappa = 1 at every kappa
(docs/limit.md); x <= kappa, as the reference is stable. The averages span the updates of a second moment.

State of each element, beside the optimizer's own, in the parameter's type:

    previous_grad   g of the last update, before clipping
    grad_change     average of (g_t - g_{t-1})^2 / 2 - V
    step_sq         average of the squared step
    step_noise      average of A V: the step's own share of the noise in the next change of the gradient
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
# Of an optimizer without a second moment: the average is that of Adam's default.
COEFFICIENT = 0.999
# An average of fewer than 20 updates says too little of a curvature, and of what the step is divided by.
SHORTEST = 0.95


def averages_coefficient(group: dict[str, Any], kappa: float, of_reference: bool) -> float:
    """Return the coefficient of the averages at kappa times the reference batch: a second moment's.

    Args:
        group: with the values of the reference, or of the update.
        kappa: B / B_ref.
        of_reference: which of the two.
    """
    own = group["betas"][1] if "betas" in group else group.get("alpha")
    if own is not None and not of_reference:
        return float(own)
    return second_moment_coefficient(COEFFICIENT if own is None else float(own), kappa, SHORTEST)


@dataclass
class Damped:
    """What is kept of some parameters from before their step until after it.

    Args:
        params: the parameters.
        states: of the optimizer, for each.
        before: their values.
        grads: mean gradients before clipping.
        variances: V of the mean gradient before clipping.
        clip: by which the gradients were multiplied since.
        kappa: B / B_ref.
        coefficient: of the averages.
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
        params: to be stepped.
        grads: mean gradients, over all ranks.
        variances: V of each, before clipping; kept until `end_damped`.
        states: of the optimizer, changed in place.
        kappa: B / B_ref, above 1.
        coefficient: of the averages.
        spread: 1 / (1 + B_t / B_{t-1}).
        clip: by which the gradients were multiplied since the backward passes.
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
    """Damp the step that was made, and note it; return what the steps of parameters were multiplied by.

    Args:
        damped: what `begin_damped` returned.
        responses: A of each parameter: by how much a gradient moves it at once, at this update's rate; numbers or tensors.
        beta: b, the momentum.
        lookahead: how many times nearer than that of plain momentum the limit is (`response.lookahead_of`).
        shrink: what decoupled weight decay multiplied the parameters by: no part of the step.
    """
    factors: dict[Tensor, Tensor] = {}
    pieces = (damped.params, damped.states, damped.before, damped.grads, damped.variances, responses)
    for p, state, before, gradient, variance, response in zip(*pieces, strict=True):
        # In place where it can be: of many elements, fresh memory costs more than arithmetic.
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
    """Let go of what damping keeps, where the next gradient has no change to be measured by."""
    for state in states:
        for name in STATE:
            state.pop(name, None)


class Damping:
    """The damping of an optimizer's steps, for gradients whose micro-batches are squared by hooks.

    Args:
        optimizer: the one that steps.
        of_reference: whether its groups have the values of the reference at `begin`, and not yet those of the update.

    Raises:
        UserError: if its steps cannot be damped.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, of_reference: bool = True) -> None:
        require_response(optimizer)
        self.optimizer, self.of_reference = optimizer, of_reference
        self._templates: set[Tensor] = set()
        self._damped: list[tuple[dict[str, Any], Damped]] = []

    def make_templates(self) -> None:
        """Give each parameter with a state all tensors of it, zeros until it is damped, so that checkpoints are alike."""
        for p, state in self.optimizer.state.items():
            if PREVIOUS not in state:
                state.update({name: torch.zeros_like(p) for name in STATE})
                self._templates.add(p)

    def drop_templates(self) -> None:
        """Let go of what is in the state of parameters that were not damped."""
        state = self.optimizer.state
        forget_damping([state[p] for p in self._templates if p in state])
        self._templates = set()

    def loaded(self) -> None:
        """Tell which of the tensors that were loaded are of parameters that were not damped."""
        states = self.optimizer.state.items()
        self._templates = {p for p, state in states if AVERAGES[1] in state and not bool(state[AVERAGES[1]].any())}
        self.drop_templates()

    def begin(self, units: Units, spread: float, kappa: float) -> None:
        """Measure how the gradients have changed, before the step; of one unit alone that cannot be told from noise.

        Args:
            units: of the update.
            spread: 1 / (1 + B_t / B_{t-1}).
            kappa: B / B_ref; at the reference and below it nothing is damped.
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
        """Damp the step that was made, while the groups have its values; return what it was multiplied by, by parameter.

        Args:
            updates_of: the updates of a parameter so far, this one included, where torch's Adam counts them.
        """
        factors: dict[Tensor, Tensor] = {}
        for group, part in self._damped:
            shrink = 1.0 - group["lr"] * group["weight_decay"] if is_decoupled(self.optimizer, group) else 1.0
            found = responses(self.optimizer, group, part.states, [updates_of(p) for p in part.params])
            factors |= end_damped(part, found, momentum_of(group), lookahead_of(group), shrink)
        self._damped = []
        return factors
