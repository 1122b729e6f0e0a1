"""Evaluation over ranks."""

from __future__ import annotations

from contextlib import closing

import torch
from torch import nn

from largebatch.data import Source
from largebatch.data.loader import evaluation_batches
from largebatch.data.workers import LoaderConfig
from largebatch.distributed import Backend
from largebatch.errors import UnreadableError, UserError, first_few
from largebatch.training.attendance import everyones


def evaluate(
    model: nn.Module, source: Source, backend: Backend, batch_size: int, loader: LoaderConfig, dtype: torch.dtype
) -> tuple[dict[str, float], list[str]]:
    """Return the exact mean loss and accuracy over the whole validation set, and the samples that could not be read.

    Every rank takes part. Sums and counts are reduced rather than means, so the result does not depend on which rank evaluates
    which sample.

    Args:
        model: the module that the engine prepared, not the engine's wrapper; it is in training mode before and after.
        source: the validation set, and the task.
        backend: the engine.
        batch_size: number of samples in one forward pass on one rank.
        loader: the workers and the prefetch.
        dtype: dtype of floating-point inputs, and of the outputs from which the loss is computed.

    Returns:
        ``val_loss``, and ``val_accuracy`` in [0, 1] if the task has one: means over the samples with a target that is not
        ignored. Then one line for each sample that could not be read, with the reason.

    Raises:
        UnreadableError: if no sample with a target that is not ignored is left because samples could not be read.
        UserError: if no sample has a target that is not ignored.
    """
    task = source.task
    totals = torch.zeros(
        4, dtype=torch.float64, device=backend.device
    )  # loss, correct, samples with a target, missing samples
    missing: list[str] = []
    batches = evaluation_batches(
        source.val,
        batch_size,
        backend.rank,
        backend.world_size,
        loader,
        backend.device,
        dtype,
        backend.timeout_seconds,
        task.check,
    )
    model.eval()
    with torch.no_grad(), closing(batches):
        for batch in batches:
            missing += batch.missing.values()
            with backend.autocast():
                outputs = model(batch.inputs)
            if batch.num_samples == 0:
                continue
            totals[0] += task.losses(outputs.to(dtype), batch.targets).sum(dtype=torch.float64)
            correct = task.num_correct(outputs, batch.targets)
            if correct is not None:
                totals[1] += correct
            totals[2] += task.known(batch.targets).sum()
    model.train()
    totals[3] = len(missing)
    loss, correct_sum, count, num_missing = backend.sum(totals).tolist()
    missing = everyones(missing, backend) if num_missing else []
    if not count and missing:
        raise UnreadableError(f"data.path: nothing is left to evaluate on: {first_few(missing)}")
    if not count:
        raise UserError("data: every target of the validation set is ignored (-100); there is nothing to score")
    return {"val_loss": loss / count} | ({"val_accuracy": correct_sum / count} if task.has_accuracy else {}), missing
