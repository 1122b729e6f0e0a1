"""Small runs in this process, and what is compared of them."""

import torch

from largebatch.config.file import parse_config
from largebatch.distributed import Ranks
from largebatch.reporting.loggers import read_metrics
from largebatch.training.run import train


def digits(**flags):
    """Return a short run on the digits, with flags as {"section.key": value}."""
    values = {
        "data": {"name": "digits"},
        "model": {"name": "mlp", "hidden": [32]},
        "batch": {"reference_size": 32, "size": 200},
        "optimizer": {"name": "sgd", "lr": 0.02, "momentum": 0.9},
        "schedule": {"name": "cosine", "epochs": 1.5},
        "warmup": {"name": "gradual", "epochs": 0.5},
        "evaluate": {"every_epochs": 0.5, "batch_size": 50},
        "log": {"every_updates": 1},
        "precision": "fp64",
    }
    for key, value in flags.items():
        section, _, name = key.rpartition(".")
        if section:
            if name == "name" and values.get(section, {}).get("name") != value:
                values[section] = {}
            values.setdefault(section, {})[name] = value
        else:
            values[name] = value
    return parse_config(values)


def rows_of(run, folder, ranks=None):
    result = train(run, folder, ranks=ranks or Ranks())
    updates, evaluations = read_metrics(folder / "metrics.jsonl") if result.folder else ([], [])
    return updates, evaluations


def assert_same_curve(ours, expected, tolerance):
    for mine, theirs in zip(ours, expected, strict=True):
        assert [row["samples"] for row in mine] == [row["samples"] for row in theirs]
        for name in ("loss", "val_loss", "val_accuracy", "lr", "grad_norm"):
            if name in theirs[0]:
                a, b = (torch.tensor([row[name] for row in rows], dtype=torch.float64) for rows in (mine, theirs))
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
