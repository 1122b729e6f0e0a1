"""Stochastic gradient descent with momentum, in the three forms that are common in papers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from largebatch.optim.groups import is_shadow_group, refuse_stray_shadows

MomentumForm = Literal["sum", "velocity", "average"]


def _torchs_step() -> Callable[..., Any]:
    """Return torch's step without the hooks that torch adds with the first torch.optim.SGD: this class calls them itself."""
    step: Any = torch.optim.SGD.step
    inner: Callable[..., Any] = step.__wrapped__ if getattr(step, "hooked", False) else step
    return inner


class SGD(torch.optim.SGD):
    """torch.optim.SGD, with two further forms of momentum.

        sum        v = mu*v + g;                 p -= eta*v        torch.optim.SGD
        velocity   v = mu*v + eta*g;             p -= v            the lectures and most papers
        average    v = (1-1/N)*v + g/N;          p -= N*eta*v      N = 1/(1-mu), a running average of gradients

    With constant eta and mu all three have the same trajectory; they differ when eta or mu changes during a run. In
    ``velocity`` a gradient's total effect, eta/(1-mu), is fixed when it is added to the buffer; in ``sum`` a later learning
    rate multiplies the gradients that are already in the buffer (Goyal et al.'s momentum correction is the difference between
    these two); in ``average`` the buffer has the gradient's unit for any momentum.

    Args:
        params: parameters or groups; groups of shadows are skipped.
        lr: eta, >= 0.
        momentum: mu in [0, 1).
        weight_decay: L2 coefficient, added to the gradient.
        nesterov: look-ahead momentum, in the form ``sum`` only.
        form: ``sum``, ``velocity`` or ``average``.
        **kwargs: further arguments of torch.optim.SGD (foreach, fused, ...), in the form ``sum`` only.

    References:
        McAllester, TTIC 31230 (2020), "SGD with Momentum"; Goyal et al. 2017, arXiv:1706.02677, section 3.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        form: MomentumForm = "sum",
        **kwargs: Any,
    ) -> None:
        if form not in ("sum", "velocity", "average"):
            raise ValueError(f"form: expected sum, velocity or average, got {form!r}")
        if form != "sum" and (nesterov or kwargs):
            raise ValueError(f"form: {form!r} takes neither nesterov nor {sorted(kwargs) or 'further arguments'}")
        self.form = form
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Return torch.optim's state for copies and pickles, and the form."""
        return super().__getstate__() | {"form": self.form}

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
        groups = self.param_groups
        trained = [group for group in groups if not is_shadow_group(group)]
        if self.form == "sum":
            self.param_groups = trained  # the groups that torch's step iterates over
            try:
                _torchs_step()(self)
            finally:
                self.param_groups = groups
            return loss
        for group in trained:
            params: list[Tensor] = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads: list[Tensor] = [p.grad for p in params if p.grad is not None]
            if group["weight_decay"]:
                grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            lr, mu = group["lr"], group["momentum"]
            gain = lr if self.form == "velocity" else 1.0 - mu
            torch._foreach_mul_(buffers, mu)
            torch._foreach_add_(buffers, grads, alpha=gain)
            torch._foreach_add_(params, buffers, alpha=-1.0 if self.form == "velocity" else -lr / (1.0 - mu))
        return loss
