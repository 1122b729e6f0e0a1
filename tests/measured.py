"""Runs that measure their noise."""

ADAPTIVE = {
    "batch.reference_size": 8, "batch.size": 8, "batch.max_size": 64, "batch.growth": "adaptive",
    "batch.critical_share": 2.0, "noise.average_samples": 400, "warmup.name": "none", "warmup.epochs": 0,
    "optimizer.lr": 0.005, "schedule.name": "constant", "schedule.epochs": 1.5,
}  # fmt: skip
