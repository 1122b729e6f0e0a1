"""An optimizer that trains at any batch size as if at the batch size that it was tuned at."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.data import DataLoader

from largebatch.errors import UserError
from largebatch.moments.micro_batches import MicroBatchSquares, Units
from largebatch.noise.estimator import Noise, NoiseScale
from largebatch.optim.adaptive import AdaptiveOptimizer
from largebatch.optim.around import second_moment_name
from largebatch.optim.at_batch import moment_of, moved_rows, values_at
from largebatch.optim.damping import PREVIOUS, SHORTEST, Damping, forget_damping
from largebatch.optim.groups import check_groups, described
from largebatch.optim.host import loader_size, samples, warn_of_short_batches
from largebatch.optim.limit import Limit, LimitMeter, LimitWatch
from largebatch.optim.progress import Progress, counts_of
from largebatch.optim.quench import Quench
from largebatch.optim.resumable import KEY, Resumable
from largebatch.optim.shift import Count, coefficient_at, move_second_moments, noise_sums
from largebatch.scaling.rules import enough_units

# Number of updates at the reference that the averages of the noise scale span. The scale is measured at each of the first
# updates, and later at every eighth, which is enough for an average over hundreds of updates.
NOISE_UPDATES, NOISE_FIRST, NOISE_EVERY = 1000, 32, 8


def batch_size_invariant(
    optimizer: torch.optim.Optimizer,
    *,
    reference_batch_size: int,
    micro_batch_size: int | DataLoader[Any],
    loss: Literal["mean", "sum"] = "mean",
    process_group: ProcessGroup | None = None,
    damping: bool = False,
) -> BatchSizeInvariant:
    """Let an optimizer train at any batch size as if at the one that its hyper-parameters were tuned at.

        kappa = B / B_ref
        lr    = kappa * lr_ref                              momentum and beta1 are kept
        beta2 = beta2_ref**kappa                            of Adam and AdamW, and alpha of RMSprop
        s     = beta2*s + (1-beta2)*s_ref,   s_ref = ghat^2 + (kappa-1)*V;   s = s + kappa*s_ref of Adagrad

    where V is the variance of the mean gradient, estimated from the differences between the micro-batches of the update. So
    s_ref is an unbiased estimate of the square that the optimizer would have averaged at the reference batch size. Where beta2
    is below 0.98, Adam's average of gradients is rescaled (`largebatch.optim.carry`). At B = B_ref the optimizer runs as given.

    The model is not changed: hooks on the parameters add up squared gradients in the backward pass, and under torch's
    DistributedDataParallel `step` sums them over the ranks. The groups keep the values of the reference: schedulers write them,
    and `step` scales them.

    Args:
        optimizer: torch.optim's Adam, AdamW, RMSprop, Adagrad or SGD, or one of `largebatch.optim` over untracked parameters;
            new or trained, before or after the model is wrapped by DistributedDataParallel.
        reference_batch_size: B_ref, the global batch size in samples at which the optimizer was tuned, >= 1.
        micro_batch_size: number of samples in one backward pass on one rank, or the DataLoader that yields them. B is this
            number times the backward passes since the last update, over all ranks; for batches that cannot be counted in this
            way see `BatchSizeInvariant.micro_batch` and `set_batch`. A smaller last batch counts as full unless announced.
        loss: ``mean`` if the gradients at the update are the mean over all samples of the batch, so that each micro-batch's
            loss is a mean, divided by the number of micro-batches; ``sum`` if losses are sums over samples, and were when
            the optimizer was tuned. With ``sum``, `step` first scales the gradients in place to the sum over a reference batch.
        process_group: process group of the ranks over which gradients are averaged; None for all ranks.
        damping: whether to divide each element's step by 1 + (1 - 1/kappa) x, where x is the undamped step as a share of the
            largest stable one, measured from the change of the gradient (`largebatch.optim.damping`). It needs Adam, AdamW,
            RMSprop or SGD, two or more backward passes per update, and four more state tensors of each parameter's size.

    Returns:
        An optimizer that shares groups and state with the given one; do not call the given optimizer's `step` any more.

    Raises:
        UserError: for an unsupported optimizer, sharded or complex parameters, or sizes below 1.

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = batch_size_invariant(
        ...     torch.optim.AdamW(model.parameters(), lr=3e-4), reference_batch_size=32, micro_batch_size=64
        ... )
        >>> for micro_batch in torch.randn(2, 64, 4):
        ...     (model(micro_batch).square().mean() / 2).backward()
        >>> optimizer.step()
        >>> optimizer.batch_size, optimizer.lr_scale
        (128, 4.0)
    """
    return BatchSizeInvariant(
        optimizer,
        reference_batch_size=reference_batch_size,
        micro_batch_size=micro_batch_size,
        loss=loss,
        process_group=process_group,
        damping=damping,
    )


class BatchSizeInvariant(Resumable):
    """The optimizer that `batch_size_invariant` returns.

    Attributes:
        base: the wrapped optimizer, which holds the groups and the state.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        reference_batch_size: int,
        micro_batch_size: int | DataLoader[Any],
        loss: Literal["mean", "sum"] = "mean",
        process_group: ProcessGroup | None = None,
        damping: bool = False,
    ) -> None:
        self._moment_name = second_moment_name(optimizer)
        self._damping, self._watch = Damping(optimizer) if damping else None, LimitWatch(optimizer)
        self._shortest = SHORTEST if damping else 0.0
        micro = micro_batch_size if hasattr(micro_batch_size, "__index__") else loader_size(micro_batch_size)
        reference, micro = samples("reference_batch_size", reference_batch_size), samples("micro_batch_size", micro)
        if loss not in ("mean", "sum"):
            raise UserError(f"loss: expected 'mean' or 'sum', got {loss!r}")
        self.reference_batch_size, self.micro_batch_size, self.loss = reference, micro, loss
        self._progress = Progress(reference)
        self._noise = self._new_noise()
        self._squares = MicroBatchSquares([], process_group)
        self._squares.settings = {"reference_batch_size": reference, "micro_batch_size": micro}
        super().__init__(optimizer)
        self._hook_parameters()
        self._progress.counts = counts_of(self.base, self._moment_name)
        own = self.param_groups[0].get(KEY)  # from a state dict of this class that the plain optimizer loaded
        self.param_groups[0][KEY] = {}  # torch.distributed.checkpoint reads only existing keys
        if own:
            self._require_reference(own)
            self._load_own_state(own)

    def _new_noise(self) -> NoiseScale:
        length = NOISE_UPDATES * self.reference_batch_size / NOISE_EVERY
        return NoiseScale(["all"], length, least_updates=NOISE_FIRST)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch.optim."""
        self.base.add_param_group(param_group)
        try:
            self._hook_parameters()
        except UserError:
            self.param_groups.pop()
            raise

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients and their squares."""
        self.base.zero_grad(set_to_none)
        self._progress.restart(self._squares.is_pending)
        self._squares.restart()
        self._hook_parameters()

    # Settings and measurements

    @property
    def batch_size(self) -> int:
        """B of the last update, in samples over all ranks; B_ref before the first update."""
        return self._progress.batch_size

    @property
    def lr_scale(self) -> float:
        """The factor on the groups' learning rates in the last update: kappa, or 1 for `Quench`, which needs no rule."""
        return 1.0 if isinstance(self.base, Quench) else self._progress.kappa

    @property
    def samples_seen(self) -> int:
        """The number of samples in all updates so far, over all ranks."""
        return self._progress.samples_seen

    def micro_batch(self, size: int | None = None) -> AbstractContextManager[None]:
        """Return a context whose backward passes belong to one micro-batch, optionally of another size than announced.

        It is for several losses of the same samples (in a GAN, for example), and for a smaller last micro-batch. The gradient
        has to be the mean over the samples of the batch, in which each micro-batch is weighted by its size.

        Args:
            size: number of samples in the micro-batch, >= 1; None for the announced size.
        """
        return self._squares.joined(1.0 if size is None else samples("micro_batch", size) / self.micro_batch_size)

    def set_batch(self, batch_size: int) -> None:
        """Announce B of the coming update, in samples over all ranks, in place of the counted number."""
        self._progress.announce(samples("set_batch", batch_size), self._squares.is_pending)

    @property
    def critical_batch_size(self) -> Noise:
        """The batch size at which an update makes half the progress of one without noise, with its confidence band.

        The `largebatch.noise.Noise` is averaged over the samples of a thousand updates at the reference, and over at least 32
        measurements; its noise scale is infinite before the first measurement. If updates have a single backward pass, any
        change of the gradient between two updates counts as noise, and the value is too large.
        """
        return self._noise.whole

    @property
    def limit(self) -> Limit:
        """How near the updates are to the largest stable ones (`largebatch.optim.Limit`), for the model and by parameter.

        It is measured on two successive updates in every 32, at first in every eight, on at most 4,096 elements of each
        parameter, and averaged over 16 measurements. It needs two backward passes per update, and Adam, AdamW, RMSprop or SGD.
        """
        return self._watch.meter.limit()

    # The update

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Do one update; ``closure`` as in torch.optim.

        Raises:
            UserError: if gradients are not those of the backward passes times one common factor; within `micro_batch`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._hook_parameters()
        units = self._squares.collect()
        progress = self._progress
        if units is None:  # only momentum and weight decay act
            progress.advance(self.base, self._moment_name, self._shortest)
            with values_at(self.base, progress.kappa, progress.batch_size, 1.0, self._shortest):
                self.base.step()
            if self._damping is not None:
                self._damping.make_templates()
            return loss
        if progress.announced is None:
            warn_of_short_batches()
        size = self.micro_batch_size * units.size if progress.announced is None else progress.announced
        progress.batch_size, progress.announced = round(size), None
        progress.kappa = size / self.reference_batch_size
        units.clip, kept = progress.clip_of(units.factor)
        if kept != 1.0:
            self._correct_kept(kept)
        progress.knows_scale = progress.knows_scale or progress.is_told
        if self.loss == "sum":
            self._to_reference_sum(units, units.world_size / progress.kappa)
        self._warn_of_few_units(units.num_units, progress.kappa)
        self._update(units, size, progress.kappa)
        progress.samples_seen += progress.batch_size
        progress.previous_batch_size = size
        return loss

    def _warn_of_few_units(self, num_units: float, kappa: float) -> None:
        """Warn once if the second moment's average is so short that an update needs more micro-batches than it has."""
        groups = [group for group in self.param_groups if "betas" in group or "alpha" in group]
        if kappa <= 1.0 or self._progress.warned_of_units or not groups:
            return
        beta2 = min(coefficient_at(group, kappa, self._shortest) for group in groups)
        enough = enough_units(beta2, kappa)
        if num_units < enough / 2:
            self._progress.warned_of_units = True
            passes = "pass" if num_units == 1 else "passes"
            warnings.warn(
                f"an update of {self.batch_size:,} samples has {num_units:.3g} backward {passes} over all ranks; its second "
                f"moment keeps {beta2:.3g} of the one before, and so short an average needs {enough} of them or more",
                stacklevel=5,  # of whoever calls step(), which torch wraps
            )

    def _correct_kept(self, factor: float) -> None:
        """Correct the kept gradients by the factor between the assumed loss scale and the true one."""
        for slot in self._squares.slots.values():
            if slot.holds == "previous":
                slot.region.mul_(factor)
        self._watch.meter.drop()
        for state in self.state.values():
            if PREVIOUS in state:
                state[PREVIOUS].mul_(factor)
        if not self._progress.knows_scale:  # averages since the first update
            self._noise.load_state_dict(self._new_noise().state_dict())
            forget_damping(list(self.state.values()))
            self._watch.meter = LimitMeter(self._watch.meter.names)

    def _to_reference_sum(self, units: Units, factor: float) -> None:
        """Scale gradients, which are means over the ranks of sums over samples, to the sum over a reference batch."""
        torch._foreach_mul_([slot.parameter.grad for slot in units.slots], factor)  # type: ignore[misc]
        units.factor *= factor

    def _update(self, units: Units, size: float, kappa: float) -> None:
        # The variance between two successive gradients is sigma^2/B_t + sigma^2/B_{t-1}, and V = sigma^2/B_t.
        progress = self._progress
        spread = 1.0 / (1.0 + size / progress.previous_batch_size) if progress.previous_batch_size else 1.0
        if self._measures(progress.updates):
            signal, variance = noise_sums(units.slots, units, spread)
            self._measured(signal, variance)
        self._watch.before(self._parameters, units, size, progress.updates)
        if self._damping is not None:
            self._damping.begin(units, spread, kappa)
        if self._moment_name is not None:
            rows = moved_rows(
                self.base, self._moment_name, units, kappa=kappa, counts=progress.counts, shortest=self._shortest
            )
            move_second_moments(rows, units, spread, kappa)
        with values_at(self.base, kappa, progress.batch_size, units.num_units, self._shortest):
            if isinstance(self.base, AdaptiveOptimizer):
                slots = self._squares.slots
                self.base.moment_source = lambda _, params: moment_of([slots[p] for p in params], units, spread, kappa)
            self.base.step()
            factors = {} if self._damping is None else self._damping.end(self._updates_of)
            self._watch.after(self._updates_of, factors)
        progress.updates += 1
        if len(progress.counts) > len(self._squares.slots):  # parameters were removed
            progress.counts = {p: count for p, count in progress.counts.items() if p in self._squares.slots}
        if units.num_units <= 1:
            for slot in units.slots:
                if kappa != 1.0 or self._measures(progress.updates):
                    slot.keep_gradient(units.clip)
                else:
                    slot.holds = ""

    def _updates_of(self, parameter: Tensor) -> float:
        return self._progress.counts.setdefault(parameter, Count()).updates

    @staticmethod
    def _measures(update: int) -> bool:
        return update < NOISE_FIRST or update % NOISE_EVERY == 0

    def _measured(self, signal: float, variance: float) -> None:
        """Add one update's |ghat|^2 and sum of V to the averages, and warn once if the batch size is above the band."""
        sums = torch.tensor([[signal], [signal + variance]], dtype=torch.float64)
        self._noise.update(sums, self.batch_size, num_units=2, scale=1.0)
        if self._progress.warned or self._progress.updates < NOISE_FIRST:
            return
        noise = self.critical_batch_size
        if self.batch_size > noise.high:
            self._progress.warned = True
            warnings.warn(
                f"the batch of {self.batch_size:,} samples is above the critical batch size, {noise.noise_scale:,.0f} with a "
                f"99 % band of {noise.low:,.0f} to {noise.high:,.0f}: each sample would contribute more in a smaller batch",
                stacklevel=6,
            )

    # Hooks

    def _parameters(self) -> Iterator[tuple[str, Tensor]]:
        named = described(self.param_groups)
        # Other parameters never have a gradient: frozen weights of integers, or made in inference mode.
        return ((name, p) for name, p in named if (p.is_floating_point() or p.is_complex()) and not p.is_inference())

    def _hook_parameters(self) -> None:
        named = list(self._parameters())
        check_groups(self.param_groups, has_moment=self._moment_name is not None)
        self._squares.add(named)
        self._squares.keep({parameter for _, parameter in named})

    def __repr__(self) -> str:
        return f"BatchSizeInvariant(reference_batch_size={self.reference_batch_size}, {self.base!r})"
