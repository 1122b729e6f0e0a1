"""The training loop."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from largebatch.checkpoint.manager import Checkpoint, CheckpointManager
from largebatch.data import ImageFolder, Source
from largebatch.distributed import Backend, NonFiniteError, is_communication
from largebatch.distributed.stopping import StopRequest
from largebatch.errors import UnreadableError
from largebatch.planner.run import Run
from largebatch.reporting.progress import Logger, Progress, Row, RunMetrics, Summary
from largebatch.training.attendance import note
from largebatch.training.divergence import Diverged, choose, describe, last_words
from largebatch.training.evaluation import evaluate
from largebatch.training.log import RunLog
from largebatch.training.metering import NoiseMeter
from largebatch.training.step import TrainStep, Update


class Trainer:
    """Trains a model along a plan on any backend.

    Args:
        run: the config and its plan.
        source: the training and validation samples, and the task.
        model: the model, built on every rank from the same seed.
        backend: the engine.
        logger: receives the rows; given on every rank, where it may ignore them.
        folder: the run folder for checkpoints; None to write none.
        found: the checkpoint to continue from; None to begin anew.
        data: the digest of the source, saved in checkpoints; None to save none.
    """

    def __init__(
        self,
        run: Run,
        source: Source,
        model: nn.Module,
        backend: Backend,
        *,
        logger: Logger,
        folder: Path | None = None,
        found: Checkpoint | None = None,
        data: dict[str, Any] | None = None,
    ) -> None:
        self.run, self.config, self.source, self.backend, self.data = run, run.config, source, backend, data
        self.plan, self.folder = run.plan, folder
        self.logger, self.bare_model = logger, model
        self.step = TrainStep(run, source, model, backend, self._note_missing)
        self.model, self.optimizer, self.meter = self.step.model, self.step.optimizer, self.step.meter
        self.log = RunLog(logger, self.meter, run.plan.samples_per_epoch)
        self.micro_size = run.config.batch.micro_size
        self.progress = Progress()
        self.message: str | None = None
        self._stops_at_missing = isinstance(run.config.data, ImageFolder) and run.config.data.corrupt == "stop"
        self._unaligned = True
        self._started = time.perf_counter()
        self.checkpoints = CheckpointManager(
            run.config.checkpoint,
            backend,
            model,
            self.optimizer,
            snapshot=self._snapshot,
            samples_per_epoch=run.plan.samples_per_epoch,
            folder=folder,
        )
        if found is None:
            self.step.begin(self.plan, self.progress, self.micro_size)
        else:
            self.restore(found)

    def train(self) -> Summary:
        """Run the plan until it ends or is stopped; return a summary of the run."""
        status, checkpoints = "finished", self.checkpoints
        with StopRequest(self.config.checkpoint.time_limit_minutes) as self.stop:
            try:
                self._train()
            except Diverged as error:
                status, self.message = "diverged", str(error)
            except UnreadableError as error:
                raise UnreadableError(f"{error}; {self._saved_at_a_stop()}") from None
            except KeyboardInterrupt:
                if self.backend.world_size > 1:  # the other ranks are no longer in step
                    raise
                checkpoints.interrupt()
            except Exception as error:
                if not is_communication(error):
                    checkpoints.wait()  # a checkpoint that is being written is still useful
                raise
            if checkpoints.stopped_by is not None:
                status = "interrupted" if checkpoints.stopped_by == "interrupted" else "preempted"
            if status == "finished":
                checkpoints.save(self.progress.samples_seen)
            failure, is_saved = checkpoints.close(self.progress.samples_seen)
            if checkpoints.stopped_by is not None:
                self.message = self._stop_message(is_saved)
            if failure is not None:
                status = "unsaved" if status == "finished" and not is_saved else status
                if is_saved:  # an earlier checkpoint failed, or `latest` or `best` could not be written
                    self.log.event(self.progress, failure)
                else:
                    self.message = f"{self.message or 'the last state is lost'}: {failure}"
        return self._summary(status)

    def _train(self) -> None:
        progress, log = self.progress, self.log
        if progress.owes_evaluation:
            self._evaluate()
        self.model.train()
        log.stopwatch.lap()
        while not self._is_done() and self.checkpoints.stopped_by is None:
            batch_size = self.plan.batch_size(progress.samples_seen)
            values = self.plan.at(progress.samples_seen, self.clock)
            try:
                update = self.step(batch_size, values, progress)
            except NonFiniteError as error:
                if not self._skips(error, batch_size):
                    progress = self.progress  # that of the checkpoint to which the run returned
                    log.stopwatch.lap()
                    continue
                update = Update(batch_size, values, math.nan)
            self.backend.align_buffers(self.bare_model, search=self._unaligned)
            self._unaligned = False
            progress.samples_seen += batch_size
            progress.step += 1
            done = self._is_done()
            if not done and self.meter is not None:
                self._follow_noise(self.meter, batch_size)
            if done or progress.step % self.config.log.every_updates == 0:
                log.update(progress, self._take_losses(), update)
            with log.stopwatch.paused():
                if done or self._crossed(self.config.evaluate.every_epochs, batch_size):
                    self._evaluate()
                self._note_troubles()
                if not done:
                    every = self.config.checkpoint.every_epochs
                    at_epoch = every is not None and self._crossed(every, batch_size)
                    self.checkpoints.maybe_save(progress.step, progress.samples_seen, self.stop.reason(), at_epoch)

    def _take_losses(self) -> float:
        """Return the sum of the losses of all ranks since the last row, and reset it. This is a collective."""
        total = float(self.backend.sum(self.step.losses))
        self.step.losses.zero_()
        return total

    def _note_troubles(self) -> None:
        """Write rows about problems that do not stop the training."""
        if (failure := self.checkpoints.failure()) is not None:
            self.log.event(self.progress, f"{failure}; training goes on")
        if (shortage := self.step.loader.shortage()) is not None:
            self.log.event(self.progress, shortage)

    @property
    def clock(self) -> float:
        """Number of samples that counts towards the end of the run: the samples seen, or AdaScale's count if it is used."""
        clock = None if self.meter is None else self.meter.clock
        return self.progress.samples_seen if clock is None else clock

    def _is_done(self) -> bool:
        return self.clock >= self.plan.total_samples

    def _note_missing(self, missing: list[str], samples: int) -> None:
        """Log the samples that are left out in the update or evaluation at ``samples``; raise if the run stops at them."""
        event = note(missing, self.progress.unreadable, self._stops_at_missing)
        if event is not None:
            self.log.event(self.progress, event, samples)

    def _follow_noise(self, meter: NoiseMeter, batch_size: int) -> None:
        """Change the batch size if the measured noise calls for it; the result is the same on every rank."""
        progress = self.progress
        full = self.plan.full_batch_size(progress.samples_seen - batch_size)
        size = meter.next_batch_size(full, progress.samples_seen, progress.samples_seen - batch_size)
        if size != full:
            whole = meter.noise.whole
            self._change_batch(size)
            self.step.begin(self.plan, self.progress, self.micro_size)
            self.log.event(
                self.progress,
                f"batch size {full:,} → {size:,}: the critical batch size is {whole.noise_scale:,.0f} samples "
                f"(99 % band {whole.low:,.0f} to {whole.high:,.0f})",
            )
        for warning in meter.warnings(full, progress.samples_seen):
            self.log.event(self.progress, warning)

    def _change_batch(self, size: int) -> None:
        self.plan = replace(self.plan, growth=(*self.plan.growth, (self.progress.samples_seen, size)))

    def evaluate(self) -> tuple[Row, list[str]]:
        """Return the exact mean loss and accuracy over the whole validation set, and the samples that could not be read."""
        size, loader, backend = self.config.evaluate.batch_size, self.config.loader, self.backend
        backend.align_buffers(self.bare_model, search=True)
        return evaluate(self.bare_model, self.source, backend, size, loader, backend.dtype)

    def _snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what a checkpoint stores besides the weights and the optimizer's state."""
        now = time.perf_counter()
        self.progress.seconds += now - self._started
        self._started = now
        self.logger.sync()  # a checkpoint must not outlive the rows before it
        return {f"loss_sum.{self.backend.rank}": self.step.losses}, {
            "progress": asdict(self.progress),
            "config": self.config.model_dump(mode="json"),
            "num_train": len(self.source.train),
            **({} if self.data is None else {"data": self.data}),
            "micro_size": max(
                piece.stop - piece.start for piece in self.step.sampler.pieces(self.plan.batch_size_at_start)
            ),
            "growth": self.plan.growth,
            "noise": None if self.meter is None else self.meter.state_dict(),
        }

    def restore(self, found: Checkpoint, rollbacks: int | None = None) -> None:
        """Continue from a checkpoint written by any number of ranks. This is a collective.

        Args:
            found: the checkpoint.
            rollbacks: number of rollbacks in this run, including this one; None for a resumed run.
        """
        state = found.state
        known = {field.name for field in fields(Progress)}
        self.progress = Progress(**{name: value for name, value in state["progress"].items() if name in known})
        if rollbacks is not None:
            self.progress.rollbacks = rollbacks
        self.step.losses.copy_(self.checkpoints.load(found, self.progress.step, self.progress.samples_seen))
        if self.meter is not None:
            self.meter.start_at(self.progress.samples_seen)
            if state.get("noise"):
                self.meter.load_state_dict(state["noise"])
        if self.meter is not None and self.config.batch.growth == "adaptive":
            self.plan = replace(self.plan, growth=tuple((samples, size) for samples, size in state.get("growth", ())))
            size = self.plan.full_batch_size(self.progress.samples_seen)
            within = min(max(size, self.meter.smallest), self.meter.largest)
            if size != within:  # a branch may have other limits
                self._change_batch(within)
        if self.config.batch.micro_size is None and self.backend.world_size < state["world_size"]:
            self.micro_size = state["micro_size"]  # a size known to fit on a rank
        self.step.begin(self.plan, self.progress, self.micro_size)
        self.checkpoints.load_random_state(found)  # after the loader, which draws a seed for its workers

    def _skips(self, error: NonFiniteError, batch_size: int) -> bool:
        """Apply the config's choice for a non-finite gradient; return True to skip the update, False after a rollback.

        Raises:
            Diverged: if the run cannot go on.
        """
        progress, configured = self.progress, self.config.optimizer.non_finite
        what, choice = describe(error, progress), choose(configured, progress)
        if choice == "skip":
            progress.skipped += 1
            progress.skipped_in_a_row += 1
            # Log it with the samples of the skipped update: a run that resumes before them removes the row.
            samples = progress.samples_seen + batch_size
            self.log.event(progress, f"{what}; skipped, {progress.skipped} in all", samples)
            return True
        if choice == "roll_back" and self._roll_back(what):
            return False
        place = self.checkpoints.save(progress.samples_seen)
        raise Diverged(last_words(what, configured, progress, place)) from error

    def _roll_back(self, what: str) -> bool:
        """Continue from the newest checkpoint with other samples; return whether there is such a checkpoint."""
        found = self.checkpoints.latest()
        if found is None:
            return False
        seconds = self.progress.seconds
        self.restore(found, self.progress.rollbacks + 1)
        self.progress.seconds = seconds
        self.optimizer.zero_grad()  # discard accumulated squares, which may be NaN
        self.logger.rewind(self.progress.samples_seen)
        self.log.event(
            self.progress,
            f"{what}; back at {self.progress.samples_seen} samples ({found.path}), with other samples from here",
        )
        return True

    def _crossed(self, every_epochs: float, batch_size: int) -> bool:
        """Return whether the last update passed a multiple of ``every_epochs`` epochs."""
        every = every_epochs * self.plan.samples_per_epoch
        return self.progress.samples_seen // every > (self.progress.samples_seen - batch_size) // every

    def _evaluate(self) -> None:
        progress = self.progress
        progress.owes_evaluation = True
        scores, missing = self.evaluate()
        self._note_missing(missing, progress.samples_seen)
        progress.owes_evaluation = False
        progress.val_loss, progress.val_accuracy = scores["val_loss"], scores.get("val_accuracy")
        if progress.val_accuracy is not None:
            progress.best_val_accuracy = max(progress.best_val_accuracy or 0.0, progress.val_accuracy)
        val_loss = scores["val_loss"]
        if math.isfinite(val_loss) and (progress.best_val_loss is None or val_loss < progress.best_val_loss):
            progress.best_val_loss = val_loss
            self.checkpoints.note_best()
        self.log.evaluation(progress, scores)

    def _saved_at_a_stop(self) -> str:
        """Save the state, and return advice on how to continue after samples that cannot be read. This is a collective."""
        advice = (
            "put whole files in their places (and add --checkpoint.same_data false), or leave them out "
            "with --data.corrupt skip"
        )
        if self.folder is None:
            return advice
        self.checkpoints.save(self.progress.samples_seen)
        failure, is_saved = self.checkpoints.close(self.progress.samples_seen)
        kept = f"everything up to update {self.progress.step} is in {self.folder}" if is_saved else f"{failure}"
        return f"{kept}; {advice}, then continue with --resume auto --out {self.folder}"

    def _stop_message(self, is_saved: bool) -> str:
        why = {"interrupted": "interrupted", "signal": "stopped by a signal", "time_limit": "time limit reached"}
        message = f"{why[self.checkpoints.stopped_by or 'interrupted']} after update {self.progress.step}"
        if is_saved:
            message += f"; everything is in {self.folder}: continue with --resume auto --out {self.folder}"
        return message

    def _summary(self, status: str) -> Summary:
        progress = self.progress
        progress.seconds += time.perf_counter() - self._started
        shared = {field.name: getattr(progress, field.name) for field in fields(RunMetrics)}
        return Summary(
            **shared,
            status=status,
            updates=progress.step,
            samples=progress.samples_seen,
            epochs=progress.samples_seen / self.plan.samples_per_epoch,
            samples_per_second=progress.row_samples / progress.train_seconds if progress.train_seconds > 0 else 0.0,
            world_size=self.backend.world_size,
            message=self.message,
            stopped_by=self.checkpoints.stopped_by,
        )
