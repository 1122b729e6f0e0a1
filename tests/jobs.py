"""Whole jobs for tests: launchers and ranks as real processes, watched, signalled and killed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import yaml
from safetensors.torch import load_file

from largebatch.errors import UserError
from largebatch.task import Task

ROOT = Path(__file__).parent.parent
MODELS = os.pathsep.join(map(str, (ROOT / "tests", *(ROOT / "tests").glob("[a-z]*/"))))  # and data, that configs name
CLOCKS = ("samples_per_second",)


def slow_mlp(task):
    """An MLP whose forward pass takes LARGEBATCH_TEST_SECONDS, so that a job lives long enough to be killed in its middle.

    LARGEBATCH_TEST_RAISES, ``RANK:CALLS``, makes it raise on one rank after so many.
    """
    return SlowMLP(task.num_outputs)


class SlowMLP(torch.nn.Module):
    def __init__(self, num_outputs):
        super().__init__()
        self.calls = 0
        self.layers = torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, num_outputs)
        )

    def forward(self, x):
        time.sleep(float(os.environ.get("LARGEBATCH_TEST_SECONDS", "0")))
        self.calls += 1
        if os.environ.get("LARGEBATCH_TEST_RAISES") == f"{os.environ.get('RANK', '0')}:{self.calls}":
            raise RuntimeError("broken on purpose")
        return self.layers(x)


def parting_mlp(task):
    """An MLP with two ways of unlike size, of which rank 1 takes the other in its third pass."""
    return PartingMLP(task.num_outputs)


class PartingMLP(torch.nn.Module):
    def __init__(self, num_outputs):
        super().__init__()
        self.calls = 0
        self.ways = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(64, width), torch.nn.Linear(width, num_outputs)) for width in (32, 48)
        )

    def forward(self, x):
        self.calls += self.training
        return self.ways[self.calls == 3 and os.environ.get("RANK") == "1"](x.flatten(1))


def mistaken_mlp(task):
    """An MLP of which rank 1 finds in its third pass that it is asked for what it cannot do."""
    return MistakenMLP(task.num_outputs)


class MistakenMLP(SlowMLP):
    def forward(self, x):
        if self.calls == 2 and os.environ.get("RANK") == "1":
            raise UserError("model.name: not for these samples")
        return super().forward(x)


def diverging_mlp(task):
    """An MLP whose outputs are NaN from its fifth pass on."""
    return DivergingMLP(task.num_outputs)


class DivergingMLP(SlowMLP):
    def forward(self, x):
        return super().forward(x) * (float("nan") if self.calls >= 5 else 1.0)


def rows_of_a_node():
    """Rows that are on nodes where LARGEBATCH_TEST_DATA is set."""
    if not os.environ.get("LARGEBATCH_TEST_DATA"):
        raise UserError("data.path: nothing lies at '/nowhere'")
    rows = torch.utils.data.TensorDataset(torch.randn(256, 64), torch.randint(10, (256,)))
    return rows, rows, Task("classification", (64,), 10)


CONFIG = {
    "data": {"name": "digits"},
    "model": {"name": "jobs:slow_mlp"},
    "batch": {"reference_size": 16, "size": 64},
    "optimizer": {"name": "adamw", "lr": 1e-3, "second_moment": "sample"},
    "schedule": {"name": "cosine", "epochs": 4},
    "evaluate": {"every_epochs": 1},
    "log": {"every_updates": 5},
    "checkpoint": {"every_minutes": None, "every_epochs": 0.4, "keep_last": 3},
    "backend": {"device": "cpu"},
}


def write_config(folder: Path, **sections) -> Path:
    """Write CONFIG with sections changed; return the file."""
    config = {
        name: {**CONFIG.get(name, {}), **value} if isinstance(value, dict) else value
        for name, value in sections.items()
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**CONFIG, **config}))
    return path


def small_gpt(folder: Path) -> list[str]:
    """Return flags that make configs/gpt_text.yaml small, on the beginning of the repository's own documents.

    After some forty updates differences of rounding grow tenfold in every few.
    """
    text = folder / "input.txt"
    documents = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
    text.write_text("".join(path.read_text() for path in documents)[:100_000])
    small = ["--data.path", str(text), "--model.n_layer", "2", "--model.d_model", "32", "--schedule.epochs", "4"]
    return [*small, "--optimizer.lr", "3e-4"]  # at which rounding does not grow, as it does on the edge of stability


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def write_torchrun(folder: Path) -> Path:
    """Return an executable that starts this environment's torchrun."""
    script = folder / "torchrun"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n')
    script.chmod(0o755)
    return script


def environment(**changes) -> dict[str, str]:
    """Return the environment of a job: one thread, this folder's models, no launcher's variables."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PET_", "SLURM_", "TORCHELASTIC_"))}
    kept |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": MODELS, "GLOO_SOCKET_IFNAME": "lo"}
    return kept | {name: str(value) for name, value in changes.items()}


class Job:
    """A process in a session of its own, with what it prints in a file; left behind by nobody.

    Args:
        command: words.
        log: file of both outputs.
        variables: of the environment.
    """

    started: ClassVar[list[Job]] = []

    def __init__(self, command, log: Path, **variables) -> None:
        self.log, self.name = log, uuid.uuid4().hex
        self.started.append(self)
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [str(word) for word in command],
                cwd=ROOT,
                env=environment(LARGEBATCH_TEST_JOB=self.name, **variables),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
                # A shell's background job ignores Ctrl-C, and so would what it starts.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )

    def printed(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, seconds: float = 150.0) -> int:
        """Return the exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds:g} s:\n{self.printed()[-3000:]}") from None

    def send(self, number: int) -> None:
        """Send a signal to the process alone."""
        self.process.send_signal(number)

    def family(self) -> dict[int, dict[bytes, bytes]]:
        """Return the environments of the process and all that it has started and that live, by process id."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                entries = (folder / "environ").read_bytes().split(b"\0")
                if f"LARGEBATCH_TEST_JOB={self.name}".encode() in entries:
                    found[int(folder.name)] = dict(entry.split(b"=", 1) for entry in entries if b"=" in entry)
        return found

    def ranks(self) -> list[int]:
        """Return the ids of the ranks among them, by rank."""
        found = {}
        for pid, variables in sorted(self.family().items()):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes()
                if b"RANK" in variables and b"torch.distributed.run" not in words:
                    found.setdefault(int(variables[b"RANK"]), pid)  # before the workers of its loader
        return [pid for _, pid in sorted(found.items())]

    def kill(self) -> None:
        """Kill all of them, as when a machine goes."""
        for pid in self.family():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(10)


@pytest.fixture(autouse=True)
def no_job_left():
    """Kill what a failed test has left behind; import it to have it."""
    yield
    while Job.started:
        Job.started.pop().kill()


@pytest.fixture
def hosts():
    """Two hosts with a link between them, as network namespaces; returns their names."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the ip command")
    names = [f"lbt{uuid.uuid4().hex[:5]}{i}" for i in (0, 1)]
    made = subprocess.run(["ip", "netns", "add", names[0]], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no network namespaces here: {made.stderr.strip()}")
    try:
        ip("netns", "add", names[1])
        ip("-n", names[0], "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for number, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"10.78.0.{number}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


def ip(*words):
    subprocess.run(["ip", *words], check=True)


def rows(folder: Path) -> list[dict]:
    """Return the rows of metrics.jsonl without the clocks; [] before there is one."""
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    except OSError:
        return []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{k: v for k, v in row.items() if k not in CLOCKS} for row in found]


def samples(folder: Path) -> int:
    return max((row["samples"] for row in rows(folder)), default=0)


def checkpoints(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "checkpoints").glob("samples-*") if p.name[-1].isdigit())


def wait_until(condition, seconds: float = 120.0, what: str = "") -> float:
    """Return after how many seconds a condition holds."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, f"not within {seconds:g} s: {what or condition}"
        time.sleep(0.05)
    return time.monotonic() - started


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_run(folder: Path, expected: Path, tolerance: float = 0.0) -> None:
    """See that a run has the weights and the rows of another: no row lost, none twice.

    Args:
        folder: the run.
        expected: the one nobody touched.
        tolerance: relative; 0 for bit by bit.
    """
    assert summary(folder)["status"] == "finished"
    ours, theirs = ([row for row in rows(f) if "event" not in row] for f in (folder, expected))
    assert [(r["samples"], "loss" in r) for r in ours] == [(r["samples"], "loss" in r) for r in theirs]
    mine, other = weights(folder), weights(expected)
    assert mine.keys() == other.keys()
    if tolerance == 0.0:
        assert ours == theirs
        assert all(torch.equal(mine[name], other[name]) for name in mine)
        return
    for ours_row, theirs_row in zip(ours, theirs, strict=True):
        for name in ("loss", "grad_norm", "val_loss"):
            if name in theirs_row:
                assert abs(ours_row[name] - theirs_row[name]) <= tolerance * abs(theirs_row[name])
    for name, tensor in other.items():
        assert float((mine[name] - tensor).abs().max()) <= tolerance * float(tensor.abs().max())
