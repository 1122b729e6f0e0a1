"""Kill a training at random moments, resume it each time, and see whether anything shows.

    python tests/kill_drill.py --kills 100 --seed 0

A run on 2 ranks is killed with SIGKILL (one rank, all ranks, or torchrun with all it started), continued with
``--resume auto`` and killed again, some ten times before it may finish. Then its weights, every tensor of its last
checkpoint and its metrics must be those of a run that nobody touched, bit for bit. Prints a tally; the exit code is 1 where
anything differs, a run cannot be continued, or a process is left behind.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml

from largebatch.checkpoint.folder import CheckpointFolder, find_problems, read_state
from largebatch.cli import main as run_command
from largebatch.distributed.state import read_tensors, tensor_metadata

WORLD_SIZE = 2
KILLS_PER_RUN = 10
# Real torchrun takes seconds to start, so that only some of the kills fall on it; the others fork this process.
TORCHRUN_EVERY = 12
# A rank whose peer was killed must notice and leave; the issue is a hang, not a slow machine.
LEAVE_SECONDS, RUN_SECONDS = 30.0, 180.0


def dropout_mlp(task):
    """A model whose gradient depends on the state of each rank's random numbers."""
    return torch.nn.Sequential(
        torch.nn.Flatten(),
        torch.nn.Linear(64, 48),
        torch.nn.ReLU(),
        torch.nn.Dropout(0.3),
        torch.nn.Linear(48, task.num_outputs),
    )


BASE = {
    "data": {"name": "digits"},
    "model": {"name": "mlp", "hidden": [32]},
    "batch": {"reference_size": 16, "size": 40},
    "optimizer": {"name": "adamw", "lr": 1e-3},
    "schedule": {"name": "cosine", "epochs": 3},
    "evaluate": {"every_epochs": 0.4},
    "log": {"every_updates": 3},
    "checkpoint": {"every_minutes": None, "every_epochs": 0.15, "asynchronous": True},
    "backend": {"device": "cpu"},
}
GROWING = {"name": "step", "milestones_epochs": [0.9, 2.1], "factor": 0.5, "epochs": 3.5, "realize": "batch"}
SYNCHRONOUS = BASE["checkpoint"] | {"asynchronous": False, "keep_best": True, "keep_last": 1}
CASES = {
    "adamw, squares of samples, growing batch, asynchronous": {"schedule": GROWING},
    "adamw, squares of samples, dropout, synchronous": {
        "model": {"name": "kill_drill:dropout_mlp"},
        "checkpoint": SYNCHRONOUS,
    },
    "sgd, dropout, a loader's worker, growing batch, asynchronous": {
        "model": {"name": "kill_drill:dropout_mlp"},
        "optimizer": {"name": "sgd", "lr": 0.02, "momentum": 0.9},
        "schedule": GROWING,
        "loader": {"num_workers": 1},
    },
    "rmsprop, squares of samples reduced every 3 updates, synchronous": {
        "optimizer": {"name": "rmsprop", "lr": 1e-3, "momentum": 0.9},
        "backend": {"device": "cpu", "squares_every": 3},
        "checkpoint": SYNCHRONOUS,
    },
    "cnn with batch norm over 10 samples, asynchronous": {
        "model": {"name": "cnn", "channels": [4, 4], "norm": "batch", "norm_group_size": 10},
        "optimizer": {"name": "sgd", "lr": 0.02, "momentum": 0.9},
        "schedule": {"name": "cosine", "epochs": 2},
    },
}


@dataclass
class Tally:
    """What came of the drill."""

    kills: Counter = field(default_factory=Counter)  # by what was killed
    moments: Counter = field(default_factory=Counter)  # by where it fell
    resumed: int = 0
    finished: int = 0
    problems: list[str] = field(default_factory=list)
    left_alone: int = 0
    slowest_leave: float = 0.0

    def __str__(self) -> str:
        counts = [", ".join(f"{n} {name}" for name, n in sorted(c.items())) for c in (self.kills, self.moments)]
        return (
            f"{sum(self.kills.values())} kills: {counts[0]}\n"
            f"they fell: {counts[1]}\n"
            f"{self.resumed} continued from a checkpoint, {self.finished} runs finished, {len(self.problems)} problems; "
            f"{self.left_alone} ranks whose peer was killed left by themselves, within {self.slowest_leave:.1f} s"
        )


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_rank(rank: int, port: int, arguments: list[str], log: Path) -> int:
    """Fork this process, which has imported everything, into one rank; return its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        with log.open("ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(WORLD_SIZE),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        code = run_command(arguments)
        sys.stdout.flush()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)


def start(arguments: list[str], log: Path, torchrun: bool) -> list[int]:
    """Start a run; return the ids of its ranks, or of torchrun."""
    if not torchrun:
        port = free_port()
        return [start_rank(rank, port, arguments, log) for rank in range(WORLD_SIZE)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD_SIZE}"]
    with log.open("ab") as file:
        process = subprocess.Popen(
            [*command, "-m", "largebatch", *arguments], stdout=file, stderr=file, start_new_session=True
        )
    return [process.pid]


def descendants(pid: int) -> list[int]:
    """Return the processes below one, as /proc has them."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:
            continue
        children.setdefault(int(text.rpartition(")")[2].split()[1]), []).append(int(stat.parent.name))
    found, todo = [], [pid]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def reap(pids: list[int], seconds: float) -> dict[int, int]:
    """Wait for processes to end; return the exit code of each that did, negative for a signal."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + seconds
    while len(codes) < len(pids) and time.monotonic() < deadline:
        for pid in set(pids) - codes.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    return codes


def being_written(folder: Path) -> list[Path]:
    return [path for path in (folder / "checkpoints").glob("samples-*.part") if path.is_dir()]


def kill(pids: list[int], whom: str, chooser: random.Random) -> list[int]:
    """Send SIGKILL; return the ids of the processes that have to leave by themselves."""
    if whom == "torchrun":
        doomed = [*pids, *descendants(pids[0])]
    elif whom == "all ranks":
        doomed = pids
    else:
        doomed = [chooser.choice(pids)]
    for pid in doomed:
        os.kill(pid, signal.SIGKILL)
    return [pid for pid in pids if pid not in doomed]


class Drill:
    def __init__(self, folder: Path, seed: int, verbose: bool) -> None:
        self.folder, self.chooser, self.verbose = folder, random.Random(seed), verbose
        self.tally = Tally()
        self.references: dict[str, tuple[Path, float]] = {}

    def say(self, text: str) -> None:
        if self.verbose:
            print(text, flush=True)

    def arguments(self, case: str, folder: Path) -> list[str]:
        config = self.folder / f"{list(CASES).index(case)}.yaml"
        config.write_text(yaml.safe_dump(BASE | CASES[case]), encoding="utf-8")
        return ["train", str(config), "--out", str(folder), "--resume", "auto"]

    def reference(self, case: str) -> tuple[Path, float]:
        """Return the folder of a case's run that nobody touches, and its seconds."""
        if case not in self.references:
            folder = self.folder / f"reference-{len(self.references)}"
            began = time.monotonic()
            self.finish(case, folder)
            self.references[case] = folder, time.monotonic() - began
            self.say(f"{case}: {self.references[case][1]:.1f} s untouched")
        return self.references[case]

    def warm_up(self) -> None:
        """Train a little in this process, so that the ranks forked from it find all that is imported late."""
        arguments = self.arguments(next(iter(CASES)), self.folder / "warm-up")
        with contextlib.redirect_stdout(io.StringIO()):
            run_command([*arguments, "--schedule.epochs", "0.2", "--schedule.milestones_epochs", "[0.1]"])

    def finish(self, case: str, folder: Path) -> bool:
        """Let a run come to its end."""
        log = folder.with_suffix(".log")
        pids = start(self.arguments(case, folder), log, False)
        codes = reap(pids, RUN_SECONDS)
        for pid in set(pids) - codes.keys():
            os.kill(pid, signal.SIGKILL)
            reap([pid], LEAVE_SECONDS)
        if list(codes.values()) != [0] * WORLD_SIZE:
            self.problem(case, f"lost: exit codes {codes}", log)
            return False
        return True

    def problem(self, case: str, what: str, log: Path) -> None:
        self.tally.problems.append(f"{case}: {what}")
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:]) if log.exists() else ""
        print(f"PROBLEM {case}: {what}\n{tail}", flush=True)

    def kill_once(self, case: str, folder: Path) -> bool:
        """Start or continue a run and kill it; return whether it ended before that."""
        chooser, log = self.chooser, folder.with_suffix(".log")
        number = sum(self.tally.kills.values())
        torchrun = number % TORCHRUN_EVERY == TORCHRUN_EVERY - 1
        whom = "torchrun" if torchrun else chooser.choice(["one rank", "all ranks"])
        delay = chooser.uniform(0.0, 0.4 * self.reference(case)[1]) + (4.0 if torchrun else 0.0)
        in_save, late = chooser.random() < 0.35, chooser.uniform(0.0, 0.03)
        said_before = log.stat().st_size if log.exists() else 0
        pids = start(self.arguments(case, folder), log, torchrun)
        due = time.monotonic() + delay
        codes: dict[int, int] = {}
        while len(codes) < len(pids) and (time.monotonic() < due or (in_save and not being_written(folder))):
            codes |= reap([pid for pid in pids if pid not in codes], 0.002)
            if any(codes.values()) or time.monotonic() > due + RUN_SECONDS:
                break
        if len(codes) == len(pids) and not any(codes.values()):
            return True
        if any(codes.values()) or time.monotonic() > due + RUN_SECONDS:
            kill([pid for pid in pids if pid not in codes], "all ranks", chooser)
            reap([pid for pid in pids if pid not in codes], LEAVE_SECONDS)
            self.problem(case, f"lost: exit codes {codes}, before it was killed", log)
            return True
        if in_save:
            time.sleep(late)
        alive = [pid for pid in pids if pid not in codes]
        staying = kill(alive, whom, chooser)
        killed_at = time.monotonic()
        left = reap([pid for pid in alive if pid not in staying], LEAVE_SECONDS)
        # A rank whose peer is gone leaves by itself; before they have met it waits, for minutes, for one that starts late.
        have_met = b"DistributedDataParallel, " in log.read_bytes()[said_before:] if log.exists() else False
        if staying and have_met and chooser.random() < 0.2:
            left |= reap(staying, LEAVE_SECONDS)
            self.tally.left_alone += 1
            self.tally.slowest_leave = max(self.tally.slowest_leave, time.monotonic() - killed_at)
        elif staying:  # or a launcher sees to it
            left |= reap(staying, chooser.uniform(0.0, 0.5))
            late = [pid for pid in staying if pid not in left]
            kill(late, "all ranks", chooser)
            left |= reap(late, LEAVE_SECONDS)
        if len(left) < len(alive):
            self.problem(case, "a rank did not leave after its peer was killed", log)
            kill([pid for pid in alive if pid not in left], "all ranks", chooser)
            reap([pid for pid in alive if pid not in left], LEAVE_SECONDS)
        saved = CheckpointFolder(folder / "checkpoints").saved()
        moment = "in a save" if being_written(folder) else "between saves" if saved else "before the first checkpoint"
        self.tally.kills[whom] += 1
        self.tally.moments[moment] += 1
        self.tally.resumed += bool(saved)
        damaged = [str(path) for path in saved if find_problems(path)]
        if damaged:
            self.problem(case, f"half a checkpoint under its last name: {damaged}", log)
        return False

    def run(self, kills: int) -> None:
        for number in range(10**6):
            left = kills - sum(self.tally.kills.values())
            if left <= 0 or len(self.tally.problems) > 5:
                return
            case = list(CASES)[number % len(CASES)]
            folder = self.folder / f"run-{number}"
            before = sum(self.tally.kills.values())
            for _ in range(min(left, KILLS_PER_RUN)):
                if self.kill_once(case, folder):
                    break
            if self.finish(case, folder):  # it may be finished: then this finds nothing to do
                self.tally.finished += 1
                for line in differences(folder, self.reference(case)[0]):
                    self.problem(case, line, folder.with_suffix(".log"))
            self.say(
                f"{case}: {sum(self.tally.kills.values()) - before} kills, {len(self.tally.problems)} problems so far"
            )

    def left_behind(self) -> list[str]:
        """Return what still runs; a loader's worker needs 5 seconds to see that its rank is gone."""
        deadline = time.monotonic() + 15.0
        while True:
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return []
            if pid == 0 and time.monotonic() > deadline:
                return [f"process {pid} is left behind" for pid in descendants(os.getpid())]
            time.sleep(0.01)


def rows(folder: Path) -> list[dict]:
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [{k: v for k, v in json.loads(line).items() if k != "samples_per_second"} for line in text.splitlines()]


def differences(folder: Path, reference: Path) -> list[str]:
    """Return what a run has other than the untouched one."""
    found = []
    if (folder / "model.safetensors").read_bytes() != (reference / "model.safetensors").read_bytes():
        found.append("model.safetensors differs")
    ours, theirs = (CheckpointFolder(path / "checkpoints").saved()[-1] for path in (folder, reference))
    if ours.name != theirs.name or (folder / "checkpoints" / "latest").read_text().strip() != ours.name:
        found.append(f"the last checkpoint is {ours.name}, not {theirs.name}")
    tensors = [read_tensors(path, tensor_metadata(path)) for path in (ours, theirs)]
    if tensors[0].keys() != tensors[1].keys():
        found.append(f"tensors {sorted(tensors[0].keys() ^ tensors[1].keys())} are in one of them only")
    # By bytes, as a NaN is not equal to itself.
    found += [
        f"{name} differs"
        for name, value in tensors[0].items()
        if name in tensors[1] and value.numpy().tobytes() != tensors[1][name].numpy().tobytes()
    ]
    states = [read_state(path) for path in (ours, theirs)]
    for state in states:
        state["progress"] = {k: v for k, v in state["progress"].items() if not k.endswith("seconds")}
    found += [
        f"state.json: {key} differs" for key in ("progress", "groups", "config") if states[0][key] != states[1][key]
    ]
    if rows(folder) != rows(reference):
        found.append("metrics.jsonl differs")
    if leftover := [path.name for path in folder.rglob("*.part")]:
        found.append(f"{leftover} left behind")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep the runs here (default: a temporary folder)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    # Orphans become this process's children, so that none can hide.
    pr_set_child_subreaper = 36
    ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        drill = Drill(options.folder or Path(temporary), options.seed, verbose=True)
        drill.folder.mkdir(parents=True, exist_ok=True)
        drill.warm_up()
        drill.run(options.kills)
        drill.tally.problems += drill.left_behind()
    print(f"{drill.tally}\n{time.monotonic() - began:.0f} s")
    return 1 if drill.tally.problems else 0


if __name__ == "__main__":
    sys.exit(main())
