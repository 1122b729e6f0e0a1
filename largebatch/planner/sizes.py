"""The largest batch that a run may come to."""

from __future__ import annotations

import math

from largebatch.config.schema import Run
from largebatch.scaling.plan import Plan


def largest_batch(run: Run, plan: Plan) -> int:
    """Return the largest batch size that a run may come to.

    An adaptive batch doubles up to batch.max_size, and never past a tenth of the training set (Smith et al. 2018).
    """
    if run.batch.growth != "adaptive":
        return plan.largest_batch()
    limit = max(run.batch.size, min(run.batch.max_size or math.inf, plan.samples_per_epoch // 10))
    return run.batch.size * 2 ** int(math.log2(limit / run.batch.size))
