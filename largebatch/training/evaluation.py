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
    """Return the exact mean loss, and accuracy, over the whole validation set, and what of it could not be read.

    Every rank takes part.

    Sums and counts are reduced, not means, so that it does not matter how samples fall on ranks.

    Args:
        model: the model that the engine prepared, not its wrapper; in training mode before and after.
        source: the validation set, and the task.
        backend: the engine.
        batch_size: samples of one forward pass on one rank.
        loader: workers and prefetch.
        dtype: of floating-point inputs, and of the outputs that the loss is taken of.

    Returns:
        ``val_loss``, and ``val_accuracy`` in [0, 1] where the task has one, means over the samples whose targets are not all
        ignored; why samples are missing from them, a line each.

    Raises:
        UnreadableError: if all of them are.
        UserError: if no sample has a target that is not ignored.
    """
    task = source.task
    totals = torch.zeros(
        4, dtype=torch.float64, device=backend.device
    )  # loss, correct, samples with a target, missing ones
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
