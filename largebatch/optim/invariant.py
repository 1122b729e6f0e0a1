"""An optimizer that trains at whatever batch its loop makes as if at the batch size it was tuned at."""

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

# Updates at the reference that the averages of the noise scale span. It is measured at each of the first updates, then now and
# then: what hundreds of updates say is said by every eighth of them.
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

    with V the variance of the mean gradient, estimated from the differences between the micro-batches of the update, so that
    s_ref estimates without bias the square that the optimizer would have seen at the reference batch size. Where beta2 is below
    0.98, Adam's average of gradients is carried (`largebatch.optim.carry`). At B = B_ref it is the optimizer itself.

    Nothing of the model is touched: hooks on the parameters add up squared gradients in the backward pass, and under torch's
    DistributedDataParallel they are summed over the ranks in `step`. The groups keep the values of the reference: schedulers
    write them, and `step` scales what they wrote.

    Args:
        optimizer: torch.optim's Adam, AdamW, RMSprop, Adagrad or SGD, or one of `largebatch.optim` over untracked parameters;
            new or trained, before or after the model is wrapped by DistributedDataParallel.
        reference_batch_size: B_ref, the global batch size in samples that it was tuned at, >= 1.
        micro_batch_size: samples of one backward pass on one rank, or the DataLoader that says so. B is this times the backward
            passes since the last update, over all ranks; see `BatchSizeInvariant.micro_batch` and `set_batch` for what cannot
            be counted. A smaller last batch counts as a full one unless it is announced.
        loss: ``mean`` where the gradients at the update are the mean over all samples of the batch, so that losses of
            micro-batches are means and divided by their number; ``sum`` where losses are sums over samples, in the reference
            too. Then `step` first scales the gradients in place to the sum over a reference batch.
        process_group: the data-parallel ranks, whose mean the gradients are; None for all.
        damping: whether each element's step is divided by 1 + (1 - 1/kappa) x, with x the share of the largest stable step that
            it would take, measured from the change of the gradient beside its noise (`largebatch.optim.damping`): for Adam,
            AdamW, RMSprop and SGD, with two or more backward passes an update. The optimizer's state grows by four tensors of
            each parameter's size.

    Returns:
        An optimizer that shares groups and state with the one given, which is not to be stepped any more.

    Raises:
        UserError: for an optimizer it does not know, sharded or complex parameters, or sizes below 1.

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
    """What `batch_size_invariant` returns.

    Attributes:
        base: the optimizer that was given; it holds the groups and the state.
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
        own = self.param_groups[0].get(KEY)  # of a state dict of this class that the plain optimizer has loaded
        self.param_groups[0][KEY] = {}  # torch.distributed.checkpoint reads the keys that are there
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
        """Clear the gradients, and the squares with them."""
        self.base.zero_grad(set_to_none)
        self._progress.restart(self._squares.is_pending)
        self._squares.restart()
        self._hook_parameters()

    # What is said to it, and what it says

    @property
    def batch_size(self) -> int:
        """B of the last update, in samples over all ranks; of the reference before the first."""
        return self._progress.batch_size

    @property
    def lr_scale(self) -> float:
        """What the last update multiplied the groups' learning rates by: kappa; 1 for `Quench`, which needs no rule."""
        return 1.0 if isinstance(self.base, Quench) else self._progress.kappa

    @property
    def samples_seen(self) -> int:
        """Samples of all updates, over all ranks."""
        return self._progress.samples_seen

    def micro_batch(self, size: int | None = None) -> AbstractContextManager[None]:
        """Return a context whose backward passes are of one micro-batch, of another size than announced if one is given.

        For several losses of the same samples (of a GAN, say), and for a smaller last micro-batch. The gradient has to be the
        mean over the samples of the batch: each micro-batch weighs as much as its size.

        Args:
            size: samples of the micro-batch, >= 1; None for the announced size.
        """
        return self._squares.joined(1.0 if size is None else samples("micro_batch", size) / self.micro_batch_size)

    def set_batch(self, batch_size: int) -> None:
        """Announce B of the coming update, in samples over all ranks, in place of what is counted."""
        self._progress.announce(samples("set_batch", batch_size), self._squares.is_pending)

    @property
    def critical_batch_size(self) -> Noise:
        """The batch size at which an update makes half of a noiseless one's progress, with its band (`largebatch.noise.Noise`).

        Averaged over the samples of a thousand updates at the reference, and over 32 measurements at the least; infinite
        before the first one. Where updates have one backward pass alone, the change of the gradient from one to the next
        counts as noise, and the value is too large.
        """
        return self._noise.whole

    @property
    def limit(self) -> Limit:
        """How near the updates are to the largest stable ones (`largebatch.optim.Limit`), whole and by parameter.

        Measured on two successive updates in every 32, at first in every eight, on at most 4,096 elements of each parameter,
        and averaged over 16 measurements. It needs two backward passes an update, and Adam, AdamW, RMSprop or SGD.
        """
        return self._watch.meter.limit()

    # The update

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Do one update; ``closure`` as in torch.optim.

        Raises:
            UserError: if a gradient is not what the backward passes left, times one factor for all; within `micro_batch`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._hook_parameters()
        units = self._squares.collect()
        progress = self._progress
        if units is None:  # nothing but momentum and weight decay
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
        """Warn once where an average of squares is so short that it rests on the few micro-batches of one update."""
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
        """Multiply what is kept of gradients whose loss scale was not what it was taken for."""
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
        """Scale gradients, which the ranks' mean of sums is, to the sum over a reference batch."""
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
        if len(progress.counts) > len(self._squares.slots):  # parameters went
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
        """Take one update's |ghat|^2 and sum of V into the averages, and warn once of a batch above the band."""
        sums = torch.tensor([[signal], [signal + variance]], dtype=torch.float64)
        self._noise.update(sums, self.batch_size, num_units=2, scale=1.0)
        if self._progress.warned or self._progress.updates < NOISE_FIRST:
            return
        noise = self.critical_batch_size
        if self.batch_size > noise.high:
            self._progress.warned = True
            warnings.warn(
                f"the batch of {self.batch_size:,} samples is above the critical batch size, {noise.noise_scale:,.0f} with a "
                f"99 % band of {noise.low:,.0f} to {noise.high:,.0f}: a smaller batch would make more of each sample",
                stacklevel=6,
            )

    # Hooks

    def _parameters(self) -> Iterator[tuple[str, Tensor]]:
        named = described(self.param_groups)
        # Others never have a gradient: frozen weights that are integers, or made in inference mode.
        return ((name, p) for name, p in named if (p.is_floating_point() or p.is_complex()) and not p.is_inference())

    def _hook_parameters(self) -> None:
        named = list(self._parameters())
        check_groups(self.param_groups, has_moment=self._moment_name is not None)
        self._squares.add(named)
        self._squares.keep({parameter for _, parameter in named})

    def __repr__(self) -> str:
        return f"BatchSizeInvariant(reference_batch_size={self.reference_batch_size}, {self.base!r})"
