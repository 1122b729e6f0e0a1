"""Optimizers written out by hand, in float64, with the second moment of the reference batch in place of the squared gradient."""

from __future__ import annotations

import math

import torch


def coefficient(beta, kappa):
    """The averaging coefficient of a second moment at kappa times the reference batch, as the README states it."""
    return beta**kappa


def carried(ratio, kappa, beta2):
    """By what an average of gradients is multiplied where its denominator changes by a ratio.

    Linear in it: 1 where it is 1, and where the gradients are zero what lets a step grow as one update of the reference does.
    """
    lowest, of_reference = beta2**0.5, beta2 ** (1 / kappa)
    at_lowest = lowest * of_reference**-0.5
    return 1 + (ratio - 1) * (1 - at_lowest) / (1 - lowest)


class ByHand:
    """Takes, at every update, the mean gradient of each unit by itself: a list by parameter of tensors (n, *shape)."""

    def __init__(
        self, params, name, reference, lr, wd=0.0, betas=(0.9, 0.999), alpha=0.99, momentum=0.0, eps=1e-8, **options
    ):
        self.params, self.name, self.reference, self.lr, self.wd = list(params), name, reference, lr, wd
        self.betas, self.alpha, self.momentum, self.eps, self.options = betas, alpha, momentum, eps, options
        self.m = [torch.zeros_like(p) for p in self.params]
        self.s = [torch.zeros_like(p) for p in self.params]
        self.v = [torch.zeros_like(p) for p in self.params]
        self.previous, self.previous_size = None, math.inf
        self.updates, self.decay2 = 0, 1.0

    @torch.no_grad()
    def step(self, units, sizes, factor=1.0):
        """``sizes``: samples of each unit; gradients weigh as much. ``factor``: of clipping, on the mean gradient."""
        total = sum(sizes)
        weights = torch.tensor([size / total for size in sizes], dtype=torch.float64)
        kappa, n = total / self.reference, 1.0 / float(weights.square().sum())
        means, variances = [], []
        for index, g in enumerate(units):
            w = weights.view(-1, *[1] * (g.ndim - 1))
            mean = (w * g).sum(0)
            if len(sizes) > 1:
                variance = (n * (w * g).square().sum(0) - mean**2) / (n - 1)
            elif self.previous is not None:
                variance = (mean - self.previous[index]).square() / (1.0 + total / self.previous_size)
            else:
                variance = mean.square()
            means.append(mean * factor)
            variances.append(variance * factor**2)
        self.previous = [m / factor for m in means] if len(sizes) == 1 else None
        self.previous_size = total
        self.updates += 1
        getattr(self, self.name)(means, variances, kappa)

    def adam(self, means, variances, kappa):
        self._adam(means, variances, kappa, False)

    def adamw(self, means, variances, kappa):
        self._adam(means, variances, kappa, True)

    def _adam(self, means, variances, kappa, decoupled):
        beta1, beta2 = self.betas[0], coefficient(self.betas[1], kappa)
        before, self.decay2 = self.decay2, self.decay2 * beta2
        lr = self.lr * kappa
        for p, g, variance, m, s in zip(self.params, means, variances, self.m, self.s, strict=True):
            if decoupled:
                p.mul_(1 - lr * self.wd)
            else:
                g = g + self.wd * p
            older = (s / (1 - before)).sqrt() + self.eps if before < 1 else None
            s.mul_(beta2).add_((1 - beta2) * (g**2 + (kappa - 1) * variance))
            newer = (s / (1 - self.decay2)).sqrt() + self.eps
            if kappa > 1 and older is not None and beta2 < 0.98:
                m.mul_(carried(newer / older, kappa, beta2))
            m.mul_(beta1).add_((1 - beta1) * g)
            p.sub_(lr * (m / (1 - beta1**self.updates)) / newer)

    def rmsprop(self, means, variances, kappa):
        alpha = coefficient(self.alpha, kappa)
        for p, g, variance, m, s, v in zip(self.params, means, variances, self.m, self.s, self.v, strict=True):
            g = g + self.wd * p
            s.mul_(alpha).add_((1 - alpha) * (g**2 + (kappa - 1) * variance))
            denominator = s
            if self.options.get("centered"):
                m.mul_(alpha).add_((1 - alpha) * g)
                denominator = s - m**2
            v.mul_(self.momentum).add_(g / (denominator.sqrt() + self.eps))
            p.sub_(self.lr * kappa * v)

    def adagrad(self, means, variances, kappa):
        for p, g, variance, s in zip(self.params, means, variances, self.s, strict=True):
            g = g + self.wd * p
            s.add_(kappa * (g**2 + (kappa - 1) * variance))
            p.sub_(self.lr * kappa * g / (s.sqrt() + 1e-10))

    def sgd(self, means, variances, kappa):
        for p, g, v in zip(self.params, means, self.v, strict=True):
            g = g + self.wd * p
            v.mul_(self.momentum).add_(g)
            step = g + self.momentum * v if self.options.get("nesterov") else v
            p.sub_(self.lr * kappa * step)
