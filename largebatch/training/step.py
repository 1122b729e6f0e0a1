"""One update: forward and backward passes over the micro-batches of a global batch, and the optimizer's step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from largebatch.config.optimizers import LAMBConfig, LARSConfig
from largebatch.data import FactoryData, Source
from largebatch.data.loader import TrainLoader
from largebatch.data.sampler import PlanSampler, evenly_spaced
from largebatch.data.source import may_miss
from largebatch.data.workers import MicroBatch
from largebatch.distributed import Backend, NonFiniteError
from largebatch.distributed.presence import FirstUpdates
from largebatch.errors import UnreadableError, UserError
from largebatch.models import batch_norms, commit_batch_statistics, discard_batch_statistics, norm_group_size
from largebatch.moments import chosen_samples
from largebatch.noise import reference_norm_ratio
from largebatch.optim import param_groups, set_hyperparameters
from largebatch.optim.adaptive import AdaptiveOptimizer
from largebatch.planner.run import Run
from largebatch.reporting.progress import Progress, Row
from largebatch.scaling.plan import Plan
from largebatch.training.attendance import Attendance
from largebatch.training.metering import NoiseMeter


@dataclass(frozen=True)
class Update:
    """The values that an update used.

    Args:
        batch_size: B.
        values: the optimizer's arguments, with AdaScale's gain included in the learning rate.
        grad_norm: the gradient's norm before clipping; NaN for an update that was skipped.
    """

    batch_size: int
    values: Row
    grad_norm: float


class TrainStep:
    """Computes updates with the model and its optimizer, as prepared by the engine, and the loader of samples.

    Args:
        run: the resolved config.
        source: the training samples, and the task.
        model: the model, built on every rank from the same seed.
        backend: the engine.
        note_missing: called before an update's last pass with the samples that cannot be read; it may raise to stop the run.

    Attributes:
        losses: float64 scalar, the sum of the samples' losses on this rank since the last row of the log.
        meter: the meter of the gradient noise; None if the noise is not measured.
    """

    def __init__(
        self,
        run: Run,
        source: Source,
        model: nn.Module,
        backend: Backend,
        note_missing: Callable[[list[str], int], None],
    ) -> None:
        self.run, self.source, self.backend, self.note_missing = run, source, backend, note_missing
        self._check = FirstUpdates()
        if run.tracked is not None:
            backend.track(model, run.tracked, run.fallback)
        self.bare_model = model
        self.model, self.optimizer = backend.prepare(model, self._build_optimizer)
        if run.second_moment is not None:
            backend.use_squares(self.optimizer)
        self.batch_norms = batch_norms(model)
        self.meter = None
        if run.measures_noise:
            self.meter = NoiseMeter(run, backend.squared_names(model), backend.watch_limit(self.optimizer))
        if run.damps:
            backend.damp_steps(self.optimizer, run.config.batch.reference_size)
        self.losses = torch.zeros((), dtype=torch.float64, device=backend.device)
        device, dtype, timeout = backend.device, backend.dtype, backend.timeout_seconds
        # The library's own data sets give every sample a target.
        known = source.task.known if isinstance(run.config.data, FactoryData) and source.task.can_ignore else None
        self._counts_samples = known is not None or may_miss(source.train)
        self.loader = TrainLoader(source.train, run.config.loader, device, dtype, timeout, source.task.check, known)

    def _build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        config, squares = self.run.config.optimizer, self.run.second_moment is not None
        by_role = isinstance(config, LARSConfig | LAMBConfig) and not config.adapt_norm_and_bias
        groups = param_groups(model, config.weight_decay, config.decay_norm_and_bias, squares, by_role)
        return config.build(groups, self.run.config.batch.reference_size)

    def begin(self, plan: Plan, progress: Progress, micro_size: int | None) -> None:
        """Begin to load samples at the current progress of the run.

        Args:
            plan: the batch sizes from there on.
            progress: the progress of the run.
            micro_size: maximum number of samples in a forward pass; None for a rank's whole share of the batch.
        """
        seed = self.run.config.seed
        if progress.rollbacks:  # use other samples than those that led to the rollback
            seed = int(np.random.SeedSequence([seed, progress.rollbacks]).generate_state(1, np.uint64)[0] >> 1)
        self.sampler = PlanSampler(
            plan,
            len(self.source.train),
            seed,
            self.backend.rank,
            self.backend.world_size,
            micro_size,
            norm_group_size(self.bare_model),
            progress.samples_seen,
            plan.units,
        )
        self.loader.begin(self.sampler)

    def __call__(self, batch_size: int, values: Row, progress: Progress) -> Update:
        """Do one update of a global batch.

        Args:
            batch_size: B.
            values: the optimizer's arguments according to the plan.
            progress: the progress of the run; its count of samples with a loss is increased.

        Raises:
            NonFiniteError: if the gradient is not finite; no weight has changed.
            UnreadableError: if samples cannot be read and the run stops at them, or no sample is left; no weight has changed.
        """
        losses = self.losses.clone()
        try:
            return self._update(batch_size, values, progress)
        except (NonFiniteError, UnreadableError):
            self.losses = losses
            discard_batch_statistics(self.batch_norms)
            raise

    def _update(self, batch_size: int, values: Row, progress: Progress) -> Update:
        backend, run = self.backend, self.run
        announced = self.sampler.num_units(batch_size) if self.run.tracked == "micro_batch" else float(batch_size)
        attendance = Attendance(batch_size, announced, self.run.tracked != "micro_batch")
        squared = run.squared_samples(batch_size)
        backend.begin_update(batch_size, announced, progress.step)
        for micro_batch, is_last in self.loader.next(batch_size):
            attendance.add(micro_batch)
            if is_last and self._counts_samples:
                self.note_missing(attendance.call(backend), progress.samples_seen + batch_size)
            idle = micro_batch.num_samples == 0
            with backend.accumulate(sync=is_last, idle=idle), self._choice(micro_batch, batch_size, squared):
                backend.backward(self.loss_sum(micro_batch) / batch_size)
        num_samples, num_units = attendance.num_samples, attendance.num_units  # without missing samples
        self._announce(num_samples, num_units, all_squared=squared == batch_size)
        limit = run.config.optimizer.max_grad_norm
        of_reference = limit is not None and run.clips_reference
        if self.meter is not None or of_reference:
            sums = backend.noise_sums(self.bare_model)
            if self.meter is not None:
                gain = self.meter.update(sums, num_samples, num_units, backend.world_size)
                values = {**values, "lr": values["lr"] * gain}
            if limit is not None and of_reference:
                kappa = num_samples / run.config.batch.reference_size
                limit *= reference_norm_ratio(sums, num_units, num_units / backend.world_size, kappa)
        set_hyperparameters(self.optimizer, values)
        grad_norm = backend.step(self.optimizer, limit)
        commit_batch_statistics(self.batch_norms, backend.sum)
        progress.loss_samples += num_samples
        progress.skipped_in_a_row = 0
        return Update(batch_size, values, grad_norm)

    def _announce(self, num_samples: int, num_units: float, all_squared: bool) -> None:
        """Set the batch size of the coming step, and check the squares in the first updates that square all samples."""
        if hasattr(self.optimizer, "set_batch"):  # Quench needs it even without squares
            self.optimizer.set_batch(num_samples, num_units, self.backend.world_size)
        if isinstance(self.optimizer, AdaptiveOptimizer):
            self.optimizer.squares_all = all_squared
        if self.run.tracked is not None and all_squared:  # otherwise squares may be zero where the gradient is not
            self._check(partial(self.backend.check_statistics, self.bare_model, num_units))

    def _choice(self, micro_batch: MicroBatch, batch_size: int, count: int) -> AbstractContextManager[None]:
        """Choose the samples of a micro-batch to square; an update's choice does not depend on ranks or micro-batches."""
        if count == batch_size:
            return nullcontext()
        chosen = micro_batch.rows(evenly_spaced(batch_size, count, micro_batch.places))
        return chosen_samples(chosen, batch_size / count)

    def loss_sum(self, micro_batch: MicroBatch) -> Tensor:
        """Return the sum of the samples' losses for the backward pass, and add it to `losses` for the log."""
        if micro_batch.num_samples == 0:
            return self._idle_loss(micro_batch)
        with self.backend.autocast():
            outputs = self.model(micro_batch.inputs)
            losses = self.source.task.losses(outputs, micro_batch.targets)
            # Autocast may leave a user's loss in 16 bits, whose sum would keep three digits or overflow.
            loss = losses.sum(dtype=torch.promote_types(losses.dtype, torch.float32))
        if not loss.requires_grad:
            raise UserError(
                "model.name: the model's outputs have no gradient with respect to any parameter; it detaches them, or it or "
                "the data have switched gradients off (torch.no_grad, inference_mode, set_grad_enabled)"
            )
        self.losses += loss.detach()
        return loss

    def _idle_loss(self, micro_batch: MicroBatch) -> Tensor:
        """Return a loss of zero with a zero gradient, for a rank that has no sample but takes part in the reduction.

        The model runs in evaluation mode, so that the stand-in sample does not enter batch statistics.
        """
        self.model.eval()
        with self.backend.autocast():
            loss = self.source.task.losses(self.model(micro_batch.inputs), micro_batch.targets).sum() * 0.0
        self.model.train()
        return loss
