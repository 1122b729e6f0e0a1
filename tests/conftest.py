"""Fixtures: a session-wide pool of gloo ranks, the data folder, small configs."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from ranks import RankPool

torch.set_num_threads(1)
# Under nohup, or in the background of a script, these are ignored, and a run leaves an ignored signal ignored.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def rank_pool():
    """Ranks that stay up for the whole session: ``rank_pool(world_size, function, *arguments)`` -> [result by rank]."""
    pool = RankPool(4)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder LARGEBATCH_DATA names; tests that need it skip without it."""
    folder = os.environ.get("LARGEBATCH_DATA")
    if not folder:
        pytest.skip("LARGEBATCH_DATA is not set: no Fashion-MNIST, text or photos to read")
    return Path(folder)


@pytest.fixture(autouse=True)
def _no_launcher_environment(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
