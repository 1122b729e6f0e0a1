"""Signals, Ctrl-C and a time limit: the run saves and stops."""

import json
import multiprocessing
import os
import signal
import time

import pytest
import torch
from resumed import (
    _no_pictures,  # noqa: F401
    assert_same_bits,
    command,
    saved,
)

from largebatch.checkpoint.folder import (
    find_problems,
    read_state,
    samples_of,
)
from largebatch.distributed import stopping
from largebatch.distributed.stopping import StopRequest

# --- stopped ------------------------------------------------------------------------------------------------------


class Signalled(torch.nn.Module):
    """Sends this process signals in its training passes, as a cluster or a person would: {pass: signal}."""

    passes, signals = 0, {}

    def __init__(self, num_outputs):
        super().__init__()
        self.linear = torch.nn.Linear(64, num_outputs)

    def forward(self, inputs):
        Signalled.passes += self.training
        if self.training and Signalled.passes in Signalled.signals:
            for pid in [
                worker.pid for worker in multiprocessing.active_children() if not worker.name.startswith("Spawn")
            ] + [os.getpid()]:
                os.kill(pid, Signalled.signals[Signalled.passes])
        return self.linear(inputs.flatten(1))


def signalled(task):
    return Signalled(task.num_outputs)


def train_signalled(tmp_path, folder, signals, **flags):
    Signalled.passes, Signalled.signals = 0, signals
    # So rarely that only the stop itself saves.
    flags = {"model.name": "test_stopping:signalled", "checkpoint.every_epochs": 50.0, "schedule.epochs": 4.0} | flags
    return command(tmp_path, flags, "--out", folder, "--resume", "auto")


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_saves_and_stops(number, code, tmp_path, capsys):
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    assert train_signalled(tmp_path, tmp_path / "whole", {}) == 0
    assert train_signalled(tmp_path, tmp_path / "run", {7: number}) == code
    message = capsys.readouterr().err
    assert f"continue with --resume auto --out {tmp_path / 'run'}" in message
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == handlers
    (path,) = saved(tmp_path / "run")
    assert not find_problems(path) and read_state(path)["progress"]["step"] >= 7
    status = json.loads((tmp_path / "run" / "summary.json").read_text())["status"]
    assert status == {75: "preempted", 130: "interrupted"}[code]
    assert train_signalled(tmp_path, tmp_path / "run", {}) == 0
    assert_same_bits(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_to_all_processes_leaves_the_loaders_workers_at_work(number, code, tmp_path):
    """As Slurm sends it to every process of a step, and a terminal to every process of a job."""
    workers = {"loader.num_workers": 1, "batch.micro_size": 50}
    assert train_signalled(tmp_path, tmp_path / "run", {9: number}, **workers) == code
    (path,) = saved(tmp_path / "run")
    assert read_state(path)["progress"]["step"] >= 3 and not find_problems(path)


def test_a_second_ctrl_c_stops_at_once_and_costs_the_last_updates_only(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(stopping, "IMPATIENCE_SECONDS", -1.0)
    monkeypatch.setattr(stopping.StopCoordinator, "ask", lambda *_: (None, False))  # the first one is not heard in time
    assert train_signalled(tmp_path, tmp_path / "whole", {}, **{"checkpoint.every_epochs": 0.5}) == 0
    assert (
        train_signalled(
            tmp_path, tmp_path / "run", {9: signal.SIGINT, 10: signal.SIGINT}, **{"checkpoint.every_epochs": 0.5}
        )
        == 130
    )
    assert "continue with" not in capsys.readouterr().err
    assert [samples_of(path) for path in saved(tmp_path / "run")] == [800, 1600]
    assert train_signalled(tmp_path, tmp_path / "run", {}, **{"checkpoint.every_epochs": 0.5}) == 0
    assert_same_bits(tmp_path / "run", tmp_path / "whole")


def test_a_time_limit_saves_and_stops(tmp_path, capsys):
    assert train_signalled(tmp_path, tmp_path / "whole", {}) == 0
    assert train_signalled(tmp_path, tmp_path / "run", {}, **{"checkpoint.time_limit_minutes": 1e-9}) == 75
    assert "time limit reached after update 1;" in capsys.readouterr().err
    assert train_signalled(tmp_path, tmp_path / "run", {}) == 0
    assert_same_bits(tmp_path / "run", tmp_path / "whole")


def test_first_things_first_when_several_ask():
    now = StopRequest(time_limit_minutes=1e-9)
    time.sleep(0.001)
    assert now.reason() == "time_limit"
    with now:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGINT)  # the first one counts
        assert now.reason() == "signal"
