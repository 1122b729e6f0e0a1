"""Holding the squares of a model against one backward pass a sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from largebatch.errors import UserError
from largebatch.moments.presence import check_statistics
from largebatch.moments.scope import FALLBACK, notes, state
from largebatch.moments.tracking import is_shadow, shadows

# Rounding moves squares in float32 by 1e-5 of a parameter's largest; rows given to the wrong sample, by a tenth and more.
TOLERANCE = 0.01
# Below this share of the model's largest square a gradient may be the rounding of zero, as that of a key's bias in attention.
NEGLIGIBLE = 1e-8
# Where squares would vanish, the loss is multiplied by a power of two that makes the largest gradient as large as this.
LARGEST = 2.0**30
# Weights are moved by so much where a gradient is zero, as behind a layer that begins at zero.
MOVED = 0.02
# Elements of a parameter's gradient by which it is found how a loss weighs its samples.
WEIGHED = 64


def verify(model: nn.Module, loss: Callable[[Any], Tensor], batch: Any, batch_dim: int = 0) -> str | None:
    """Compare the squares of a tracked model with those of one untracked backward pass for each sample.

    The rules of `track` follow the samples through a model by shapes and operations. What they cannot follow they refuse;
    this finds what they would take for something else, in any model, for the price of a few backward passes. The model is
    in evaluation mode meanwhile, and is left as it was: weights, modes, gradients, buffers, what its modules keep, and
    random numbers. Parameters that have no gradient are tried again with all weights moved a little.

    Args:
        model: tracked per sample, with whole parameters: before DDP, FSDP2 or DeepSpeed wraps it.
        loss: takes a batch, calls the model and returns the sum of the samples' losses.
        batch: a tensor, or lists, tuples and dicts of them; two samples or more, four are plenty.
        batch_dim: dimension of the samples in the tensors of `batch`.

    Returns:
        None where they agree; else of which parameters that cannot be told, and why: samples that interact, random numbers in
        evaluation mode, no gradient, a loss that is no sum, a model that fails there. The other parameters' agree.

    Raises:
        UserError: if they differ or one is missing, naming the parameters and the way out; or if the model is not tracked
            per sample.
    """
    pairs = shadows(model)
    if not pairs or notes(model).per != "sample":
        raise UserError("verify: expected a model after track(model), which takes the squares of samples")
    leaves = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim > batch_dim]
    num_samples = leaves[0].shape[batch_dim] if leaves else 0
    if num_samples < 2:
        raise UserError(f"verify: expected a batch of two samples or more, got {num_samples}")
    parameters = {n: p for n, p in model.named_parameters() if n in pairs}
    with _undisturbed(model) as keeps:
        passes = _Passes(model, parameters, pairs, loss, batch, batch_dim, num_samples, keeps)
        try:
            found = passes.compare()
        except UserError:
            raise
        except (
            Exception
        ) as error:  # a batch of one or two that the model does not take, memory: training may well do without
            return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if found.weights:
            return found.weights
        if found.zero:
            with _moved(model):
                try:
                    again = passes.compare()
                except UserError:
                    raise
                except Exception:  # the model does not bear other weights: these parameters are named as not checked
                    again = _Found(zero=found.zero)
            found.take(again)
    if found.wrong:
        listed = _listed(list(found.wrong))
        raise UserError(
            f"track: the squares of {listed} are not those of single samples (they differ by "
            f"{max(found.wrong.values()):.2g} of the largest): the model moves or mixes rows of its samples in a way that was "
            f"not seen; name the module that does so, or one around it, in {FALLBACK}, or use per='micro_batch'"
        )
    return found.unjudged(len(parameters))


def _listed(names: list[str]) -> str:
    return "'" + "', '".join(names[:8]) + ("', ..." if len(names) > 8 else "'")


@dataclass
class _Found:
    """What a comparison has come to: names of parameters, those left out agree.

    Args:
        wrong: {name: difference}, relative to the largest square.
        mixed: the gradient of a batch is not the sum of its samples' own.
        zero: no gradient.
        faint: a gradient that may be rounding alone.
        infinite: a gradient that is not finite.
        weights: how the loss weighs its samples, where it is no sum of their losses; then nothing else is told.
    """

    wrong: dict[str, float] = field(default_factory=dict)
    mixed: list[str] = field(default_factory=list)
    zero: list[str] = field(default_factory=list)
    faint: list[str] = field(default_factory=list)
    infinite: list[str] = field(default_factory=list)
    weights: str = ""

    def take(self, other: _Found) -> None:
        """Take what another comparison says of the parameters that had no gradient in this one."""
        asked, self.zero = set(self.zero), []
        if other.weights:
            self.zero = sorted(asked)
            return
        self.wrong |= {name: value for name, value in other.wrong.items() if name in asked}
        for own, others in (
            (self.mixed, other.mixed),
            (self.zero, other.zero),
            (self.faint, other.faint),
            (self.infinite, other.infinite),
        ):
            own += [name for name in others if name in asked]

    def unjudged(self, count: int) -> str | None:
        """Say which of `count` parameters could not be judged, and why; None where all were."""
        reasons = {
            "over a batch is not the sum of its samples' own: samples interact, or numbers are drawn at random": self.mixed,
            "is zero in these samples": self.zero,
            "is too small beside the others' to be told from rounding": self.faint,
            "is not finite": self.infinite,
        }
        said = [
            f"the gradient of {_listed(names)} {why} ({len(names)} of {count})"
            for why, names in reasons.items()
            if names
        ]
        return "; ".join(said) or None


@dataclass
class _Passes:
    """Backward passes of a batch and of its samples.

    Args:
        model: tracked, in evaluation mode.
        parameters: {name: parameter} of those whose squares are taken.
        pairs: {name: shadow} of the same.
        loss: of some samples, summed.
        batch: as `verify` was given it, as is `batch_dim`.
        num_samples: n of the batch.
        keeps: what to put back after each pass.
        factor: by which losses are multiplied.
        value: loss of the whole batch, times the factor.
    """

    model: nn.Module
    parameters: dict[str, nn.Parameter]
    pairs: dict[str, nn.Parameter]
    loss: Callable[[Any], Tensor]
    batch: Any
    batch_dim: int
    num_samples: int
    keeps: list[_Kept]
    factor: float = 1.0
    value: float = 0.0

    def compare(self) -> _Found:
        """Hold the squares of a pass of the whole batch against those of its samples."""
        whole, squares = self._whole()
        try:
            found = self._compare(whole, squares, copies=1)
        except UserError:
            raise
        except Exception:  # a model that takes no batch of one
            return self._compare(whole, squares, copies=2)
        if found.weights or not found.mixed:
            return found
        # PyTorch's own gradient of a batch of one may be wrong (of batch norm on a processor, with channels last).
        again = self._compare(whole, squares, copies=2)
        return again if len(again.mixed) < len(found.mixed) and not again.weights else found

    def _whole(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the gradients and the squares of the batch; the loss is scaled up where squares would vanish."""
        self.factor = 1.0
        whole, squares, left = self._tracked()
        largest = max((float(g.abs().max()) for g in whole.values() if g.numel()), default=0.0)
        if 0.0 < largest < math.inf and any(bool(whole[name].any()) for name in left if name in whole):
            value = self.value
            self.factor = 2.0 ** min(100, math.floor(math.log2(LARGEST / largest)))
            scaled = self._tracked()[:2]
            if all(bool(g.isfinite().all()) for part in scaled for g in part.values()):
                return scaled
            self.factor, self.value = 1.0, value
        return whole, squares

    def _tracked(self) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
        self.value, whole = self._pass(self.batch)
        left = check_statistics(self.model, self.num_samples)
        squares = {n: torch.zeros_like(whole[n]) if s.grad is None else s.grad.clone() for n, s in self.pairs.items()}
        return whole, squares, left

    def _pass(self, part: Any) -> tuple[float, dict[str, Tensor]]:
        """Return the loss of some samples and its gradients, times the factor."""
        for parameter in self.model.parameters():
            parameter.grad = None
        loss = self.loss(part) * self.factor
        loss.backward()
        found = {n: p.grad for n, p in self.parameters.items()}
        for kept in self.keeps:
            kept.restore()
        grads = {
            n: torch.zeros_like(self.parameters[n]) if g is None else g.to_dense().clone() for n, g in found.items()
        }
        return float(loss.detach()), grads

    def _sample(self, number: int, copies: int) -> Any:
        def pick(leaf: Any) -> Any:
            if not (isinstance(leaf, Tensor) and leaf.ndim > self.batch_dim):
                return leaf
            if leaf.shape[self.batch_dim] != self.num_samples:
                return leaf
            return torch.cat([leaf.narrow(self.batch_dim, number, 1)] * copies, self.batch_dim)

        return tree_map(pick, self.batch)

    def _compare(self, whole: dict[str, Tensor], squares: dict[str, Tensor], copies: int) -> _Found:
        """Compare with passes of one sample each, `copies` times in its batch."""
        singles = {name: torch.zeros_like(value) for name, value in whole.items()}
        expected = {name: torch.zeros_like(value) for name, value in squares.items()}
        values, rows = [], []
        with _untracked():
            for number in range(self.num_samples):
                value, grads = self._pass(self._sample(number, copies))
                for name, gradient in grads.items():
                    gradient /= copies
                    singles[name] += gradient
                    expected[name] += gradient.to(expected[name].dtype).square()
                values.append(value / copies)
                rows.append(_some(grads))
        weights = _weights(_some(whole), torch.stack(rows), self.value, torch.tensor(values, dtype=torch.float64))
        if weights is not None:
            listed = ", ".join(f"{weight:.3g}" for weight in weights.tolist())
            return _Found(
                weights=f"the loss of the batch weighs its samples' own by {listed}, as a mean over samples or tokens does; "
                "give the sum of the samples' losses, as cross_entropy(..., reduction='sum') over all their tokens"
            )
        return self._judge(whole, squares, singles, expected)

    def _judge(self, whole: Any, squares: Any, singles: Any, expected: Any) -> _Found:
        found = _Found()
        is_finite = {n: bool(torch.isfinite(whole[n]).all() & torch.isfinite(singles[n]).all()) for n in whole}
        top = {n: float(v.max()) if v.numel() and is_finite[n] else 0.0 for n, v in expected.items()}
        least = NEGLIGIBLE * max(top.values())
        for name, value in expected.items():
            if not is_finite[name]:
                found.infinite.append(name)
                continue
            if not value.numel():
                continue
            own, scale = top[name], max(top[name], least)
            difference = float((squares[name] - value).abs().max())
            if own == 0.0 and difference <= TOLERANCE * scale:
                (found.faint if bool(whole[name].any()) else found.zero).append(name)
            elif float((whole[name] - singles[name]).abs().max()) > TOLERANCE * (self.num_samples * scale) ** 0.5:
                found.mixed.append(name)
            elif not difference <= TOLERANCE * scale:
                found.wrong[name] = difference / scale
            elif not difference <= TOLERANCE * own:
                found.faint.append(name)
        if found.mixed:  # whatever it is, it may have moved squares too
            found.mixed += found.wrong
            found.wrong = {}
        return found


def _some(grads: dict[str, Tensor]) -> Tensor:
    """Return a few elements of every gradient, in float64."""
    parts = [g.reshape(-1)[:: max(1, g.numel() // WEIGHED)][:WEIGHED].double().cpu() for g in grads.values()]
    return torch.cat(parts)


def _weights(whole: Tensor, rows: Tensor, value: float, values: Tensor) -> Tensor | None:
    """Return w with whole = sum_b w_b * rows_b and value = sum_b w_b * values_b; None where there is none but 1 for all.

    Args:
        whole: elements of the gradient of a batch.
        rows: those of its n samples' gradients, [n, elements].
        value: loss of the batch.
        values: losses of its samples, [n].
    """
    total = float(values.sum())
    if (
        not (rows.isfinite().all() and whole.isfinite().all())
        or rows.shape[1] < 4 * len(rows)
        or not float(rows.norm())
    ):
        return None
    if abs(value - total) <= TOLERANCE * float(values.abs().sum()):
        return None
    weights = torch.linalg.lstsq(rows.t(), whole[:, None], driver="gelsd").solution[:, 0]
    is_fit = float((rows.t() @ weights - whole).norm()) <= TOLERANCE * float(whole.norm())
    return weights if is_fit and abs(float(weights @ values) - value) <= TOLERANCE * abs(value) else None


@contextmanager
def _untracked() -> Iterator[None]:
    before, state.is_replaying = state.is_replaying, True
    try:
        yield
    finally:
        state.is_replaying = before


class _Kept:
    """What a module holds besides parameters and buffers, which some keep between calls: an activation, a count, a cache."""

    def __init__(self, module: nn.Module) -> None:
        self.attributes = module.__dict__
        self.before = dict(self.attributes)
        self.contents = [(value, value.copy()) for value in self.before.values() if type(value) in (dict, list, set)]

    def restore(self) -> None:
        """Put it back."""
        self.attributes.clear()
        self.attributes.update(self.before)
        for value, content in self.contents:
            value.clear()
            (value.extend if isinstance(value, list) else value.update)(content)


@contextmanager
def _moved(model: nn.Module) -> Iterator[None]:
    """Add noise to all weights, and take it off again."""
    parameters = [p for p in model.parameters() if p.is_floating_point() and not is_shadow(p)]
    before = [p.detach().clone() for p in parameters]
    try:
        with torch.no_grad():
            for p in parameters:
                p.add_(torch.randn_like(p), alpha=MOVED)
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(parameters, before, strict=True):
                p.copy_(value)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[list[_Kept]]:
    """Put the model into evaluation mode, and afterwards put everything back; return what to restore between passes."""
    kept = [_Kept(module) for module in model.modules()]
    modes = {module: module.training for module in model.modules()}
    grads = {parameter: parameter.grad for parameter in model.parameters()}
    buffers = {buffer: buffer.clone() for buffer in model.buffers()}
    cuda = {parameter.device for parameter in grads if parameter.is_cuda}
    model.eval()
    for module in modes:
        if isinstance(module, nn.RNNBase):  # cuDNN's have a backward pass in training mode alone
            module.training = True
    try:
        with torch.random.fork_rng(cuda), torch.enable_grad():
            yield [_Kept(module) for module in modes]
    finally:
        for one in kept:
            one.restore()
        for module, is_training in modes.items():
            module.training = is_training
        for parameter, grad in grads.items():
            parameter.grad = grad
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)
