"""The training loop."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from largebatch.config import Run
from largebatch.data import Source
from largebatch.data.loader import MicroBatch, TrainLoader, evaluation_batches
from largebatch.data.sampler import PlanSampler, effective_micro_batches
from largebatch.distributed import Backend, NonFiniteError
from largebatch.models import batch_norms, commit_batch_statistics, norm_group_size
from largebatch.moments import check_statistics, track
from largebatch.optim import param_groups, set_hyperparameters
from largebatch.plan import Plan
from largebatch.scaling import temperature

Row = dict[str, Any]


class Observer(Protocol):
    """Whoever wants to see the rows of a run: metrics.jsonl, a progress bar, a tracker."""

    def log(self, row: Row) -> None:
        """Take a row: an update's (it has a loss) or an evaluation's (it has a val_loss)."""
        ...

    def close(self) -> None:
        """Finish."""
        ...


@dataclass
class Summary:
    """What a run came to.

    Args:
        status: ``finished``, ``interrupted``, or ``diverged`` at a non-finite gradient.
        updates: optimizer steps.
        samples: samples seen.
        epochs: the same in epochs.
        seconds: wall time, evaluation included.
        samples_per_second: training throughput over all ranks, evaluation left out.
        world_size: number of ranks.
        loss: training loss of the last logged updates.
        val_loss: of the last evaluation.
        val_accuracy: of the last evaluation, in [0, 1]; None where there is no such thing.
        best_val_accuracy: of all evaluations.
        message: why it did not finish.
    """

    status: str = "finished"
    updates: int = 0
    samples: int = 0
    epochs: float = 0.0
    seconds: float = 0.0
    samples_per_second: float = 0.0
    world_size: int = 1
    loss: float | None = None
    val_loss: float | None = None
    val_accuracy: float | None = None
    best_val_accuracy: float | None = None
    message: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields; numbers that JSON has no word for become None."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}


class Trainer:
    """Trains a model along a plan on whatever backend it is given.

    Args:
        run: the config.
        source: training and validation samples, and the task.
        model: the model, built on every rank from the same seed.
        plan: batch size and hyper-parameters as functions of samples seen.
        backend: the engine.
        observer: takes the rows; on every rank, which may ignore them.
        folder: run folder, for checkpoints; None writes none.
    """

    def __init__(
        self,
        run: Run,
        source: Source,
        model: nn.Module,
        plan: Plan,
        backend: Backend,
        observer: Observer,
        folder: Path | None,
    ) -> None:
        self.run, self.source, self.plan, self.backend, self.observer, self.folder = (
            run,
            source,
            plan,
            backend,
            observer,
            folder,
        )
        self.dtype = torch.float64 if run.precision == "fp64" else torch.float32
        self.tracked = run.tracked()
        if self.tracked:
            track(model, per=self.tracked)
        self.model = backend.prepare(model)
        self.bare_model = model
        groups = param_groups(model, run.optimizer.weight_decay, run.optimizer.decay_norm_and_bias)
        self.optimizer = run.optimizer.build(groups, run.batch.reference_size)
        self.batch_norms = batch_norms(model)
        self.sampler = PlanSampler(
            plan,
            len(source.train),
            run.seed,
            backend.rank,
            backend.world_size,
            run.batch.micro_size,
            norm_group_size(model),
        )
        self.loader = TrainLoader(source.train, self.sampler, run.loader, backend.device, self.dtype)
        self.samples_seen = 0
        self.step = 0
        self.summary = Summary(world_size=backend.world_size)
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=backend.device)
        self._logged_samples = 0
        self._train_seconds = 0.0

    def train(self) -> Summary:
        """Run the whole plan; return what it came to."""
        started = time.perf_counter()
        try:
            self._train()
        except NonFiniteError as error:
            self._stop_at_non_finite(error)
        except KeyboardInterrupt:
            self.summary.status, self.summary.message = "interrupted", f"interrupted after update {self.step}"
        self.summary.updates, self.summary.samples = self.step, self.samples_seen
        self.summary.epochs = self.samples_seen / self.plan.samples_per_epoch
        self.summary.seconds = time.perf_counter() - started
        if self._train_seconds > 0:
            self.summary.samples_per_second = self.samples_seen / self._train_seconds
        if self.folder is not None and self.summary.status == "finished":
            self.backend.save(
                self.folder / "checkpoints" / "final.pt", self.bare_model, self.optimizer, self.position()
            )
        return self.summary

    def _train(self) -> None:
        plan, backend = self.plan, self.backend
        self.model.train()
        clock = time.perf_counter()
        while self.samples_seen < plan.total_samples:
            batch_size = plan.batch_size(self.samples_seen)
            values = plan.at(self.samples_seen)
            set_hyperparameters(self.optimizer, values)
            due = self.step % self.run.backend.squares_every == 0
            backend.set_squares_due(due)
            for micro_batch, is_last in self.loader.next(batch_size):
                with backend.accumulate(sync=is_last):
                    backend.backward(self.loss_sum(micro_batch) / batch_size)
            if self.tracked:
                self._announce_squares(batch_size, due)
            grad_norm = backend.step(self.optimizer, self.run.optimizer.max_grad_norm)
            commit_batch_statistics(self.batch_norms, backend.sum)
            self.samples_seen += batch_size
            self.step += 1

            done = self.samples_seen >= plan.total_samples
            if done or self.step % self.run.log.every_updates == 0:
                clock = self._log(values, batch_size, grad_norm, clock)
            if done or self._crossed(self.run.evaluate.every_epochs, batch_size):
                paused = time.perf_counter()
                self._evaluate_and_log()
                clock += time.perf_counter() - paused

    def _announce_squares(self, batch_size: int, due: bool) -> None:
        """Tell the optimizer what the tracked squares are squares of; at the first update, see that none is missing."""
        sampler, num_units = self.sampler, float(batch_size)
        if self.tracked == "micro_batch":
            num_units = effective_micro_batches(
                batch_size, sampler.world_size, sampler.micro_batch_size, sampler.group_size
            )
        self.optimizer.set_batch(batch_size, num_units, sampler.world_size, due)  # type: ignore[attr-defined]
        if self.step == 0:
            check_statistics(self.bare_model)

    def loss_sum(self, micro_batch: MicroBatch) -> Tensor:
        """Return the sum of the samples' losses, for the backward pass, and count it for the log."""
        if micro_batch.num_samples == 0:
            return self._idle_loss(micro_batch)
        with self.backend.autocast():
            outputs = self.model(micro_batch.inputs)
            loss = self.source.task.losses(outputs, micro_batch.targets).sum()
        self._loss_sum += loss.detach()
        return loss

    def _idle_loss(self, micro_batch: MicroBatch) -> Tensor:
        """Return a loss of zero with a gradient of zero: the rank has no sample, but takes part in the reduction.

        In evaluation mode, so that the stand-in sample enters no batch statistics.
        """
        self.model.eval()
        with self.backend.autocast():
            loss = self.source.task.losses(self.model(micro_batch.inputs), micro_batch.targets).sum() * 0.0
        self.model.train()
        return loss

    def evaluate(self) -> Row:
        """Return the exact mean loss, and accuracy, over the whole validation set.

        Sums and counts are reduced, not means, so that it does not matter how samples fall on ranks.
        """
        task, backend = self.source.task, self.backend
        totals = torch.zeros(3, dtype=torch.float64, device=backend.device)  # loss, correct, samples
        batches = evaluation_batches(
            self.source.val,
            self.run.evaluate.batch_size,
            backend.rank,
            backend.world_size,
            self.run.loader,
            backend.device,
            self.dtype,
        )
        has_accuracy = task.kind != "regression"
        self.bare_model.eval()
        with torch.no_grad():
            for batch in batches:
                with backend.autocast():
                    outputs = self.bare_model(batch.inputs)
                totals[0] += task.losses(outputs.to(self.dtype), batch.targets).sum(dtype=torch.float64)
                correct = task.num_correct(outputs, batch.targets)
                if correct is not None:
                    totals[1] += correct
                totals[2] += batch.num_samples
        self.bare_model.train()
        loss, correct_sum, count = backend.sum(totals).tolist()
        return {"val_loss": loss / count} | ({"val_accuracy": correct_sum / count} if has_accuracy else {})

    def position(self) -> dict[str, Any]:
        """Return where the run stands, for a checkpoint."""
        return {"step": self.step, "samples_seen": self.samples_seen, "seed": self.run.seed}

    def _crossed(self, every_epochs: float, batch_size: int) -> bool:
        """Return whether the last update passed a multiple of so many epochs."""
        every = every_epochs * self.plan.samples_per_epoch
        return self.samples_seen // every > (self.samples_seen - batch_size) // every

    def _clock_row(self) -> Row:
        epoch = self.samples_seen / self.plan.samples_per_epoch
        return {"step": self.step, "samples": self.samples_seen, "epoch": round(epoch, 6)}

    def _log(self, values: Row, batch_size: int, grad_norm: float, clock: float) -> float:
        """Hand a row about the updates since the last one to the observer; return the time from which the next one counts."""
        samples = self.samples_seen - self._logged_samples
        loss = float(self.backend.sum(self._loss_sum)) / samples
        now = time.perf_counter()
        self._train_seconds += now - clock
        row = {
            **self._clock_row(),
            "loss": loss,
            **{name: list(value) if isinstance(value, tuple) else value for name, value in values.items()},
            "batch_size": batch_size,
            "temperature": temperature(values["lr"], batch_size, values.get("momentum", 0.0)),
            "grad_norm": grad_norm,
            "samples_per_second": samples / (now - clock),
        }
        self.summary.loss = loss
        self._loss_sum.zero_()
        self._logged_samples = self.samples_seen
        self.observer.log(row)
        return now

    def _evaluate_and_log(self) -> None:
        scores = self.evaluate()
        self.summary.val_loss, self.summary.val_accuracy = scores["val_loss"], scores.get("val_accuracy")
        if self.summary.val_accuracy is not None:
            self.summary.best_val_accuracy = max(self.summary.best_val_accuracy or 0.0, self.summary.val_accuracy)
        self.observer.log({**self._clock_row(), **scores})

    def _stop_at_non_finite(self, error: NonFiniteError) -> None:
        """Keep the state before the update that went wrong."""
        whose = (
            f"the loss was not finite on rank {', '.join(map(str, error.ranks))}"
            if error.ranks
            else "every loss was finite"
        )
        kept = ""
        if self.folder is not None:
            path = self.folder / "checkpoints" / "last_good.pt"
            self.backend.save(path, self.bare_model, self.optimizer, self.position())
            kept = f"; the state before it is in {path}"
        self.summary.status = "diverged"
        self.summary.message = (
            f"update {self.step + 1} (after {self.samples_seen} samples): the gradient is NaN or infinite, {whose}{kept}; "
            "lower optimizer.lr, lengthen the warm-up, or set optimizer.max_grad_norm"
        )
