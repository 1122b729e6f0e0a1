"""A run outlives its output: whoever reads what it prints may go away, be full, fall asleep, or lack letters."""

import fcntl
import io
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import yaml
from jobs import (
    ROOT,
    Job,
    checkpoints,
    environment,
    free_port,
    no_job_left,  # noqa: F401
    rows,
    summary,
    wait_until,
    write_config,
    write_torchrun,
)
from rich.console import Console

from largebatch.checkpoint.folder import find_problems
from largebatch.process import output
from largebatch.reporting.tables import ProgressBar, ProgressLines, create_progress

COMMAND = [sys.executable, "-m", "largebatch"]


def slow(*cases):
    return [pytest.param(case, marks=pytest.mark.slow) for case in cases]


@pytest.fixture
def start(tmp_path):
    """``start(stdout, preexec, seconds, words, **variables)`` begins a run of ``seconds`` an update; returns its process."""
    started = []

    def begin(stdout, preexec=None, seconds=0.0, words=(), command=COMMAND, out="run", stderr=subprocess.PIPE, **given):
        sections = {
            "schedule": {"epochs": 1},
            "checkpoint": {"every_epochs": None},
            "optimizer": {"second_moment": "batch"},
        }
        config = write_config(tmp_path, **sections)
        given = {"LARGEBATCH_TEST_SECONDS": seconds, **given}
        process = subprocess.Popen(
            [*command, "train", config, "--out", tmp_path / out, *words],
            cwd=ROOT,
            env=environment(**given),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            text=True,
            start_new_session=True,
            preexec_fn=preexec,
        )
        started.append(process)
        return process

    begin.out = tmp_path / "run"
    yield begin
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


def assert_whole(folder: Path) -> None:
    """See that a run's folder holds a finished run and all its files."""
    assert summary(folder)["status"] == "finished" and len(checkpoints(folder)) == 1
    assert find_problems(folder / "checkpoints" / checkpoints(folder)[0]) == []
    assert {"config.yaml", "metrics.jsonl", "curve.png", "model.safetensors"} <= {
        path.name for path in folder.iterdir()
    }
    assert [row["step"] for row in rows(folder) if "loss" in row] == [5, 10, 15, 20, 23]


def gone() -> int:
    """Return a pipe that nobody reads."""
    ours, theirs = os.pipe()
    os.close(ours)
    return theirs


def close(*descriptors):
    """Return what closes descriptors in the process that is started."""
    return lambda: [os.close(descriptor) for descriptor in descriptors]


@pytest.mark.parametrize("what", ["reader gone", "closed", *slow("both readers gone", "full", "all closed")])
def test_a_run_outlives_its_output(start, what):
    stdout = gone() if "gone" in what else os.open("/dev/full" if what == "full" else os.devnull, os.O_WRONLY)
    preexec = {"closed": close(1), "all closed": close(0, 1, 2)}.get(what)
    process = start(stdout, preexec, stderr=stdout if what == "both readers gone" else subprocess.PIPE)
    said = process.communicate(timeout=150)[1] or ""
    assert process.returncode == 0, said
    assert_whole(start.out)
    expected = (
        "largebatch: warning: standard output could not be written (No space left on device); the run's folder holds"
    )
    assert said.startswith(expected) if what == "full" else said == ""


def test_two_ranks_outlive_their_output(start):
    place = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = [start(gone(), stderr=subprocess.STDOUT, **place, RANK=rank, LOCAL_RANK=rank) for rank in range(2)]
    assert [rank.wait(150) for rank in ranks] == [0, 0]
    assert_whole(start.out)


@pytest.mark.slow
@pytest.mark.parametrize("redirect", ["| head -1", ">&-", ">&- 2>&-", ">/dev/full", "2>&1 | true"])
def test_a_job_of_torchrun_outlives_its_output(start, tmp_path, redirect):
    script = ["bash", "-c", f'set -o pipefail; launch/torchrun.sh "${{@:2}}" {redirect}', "bash"]
    process = start(subprocess.PIPE, command=script, NPROC_PER_NODE=2, TORCHRUN=write_torchrun(tmp_path))
    said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert_whole(start.out)


def in_a_terminal(descriptor: int):
    """Return what makes a terminal the controlling one of the process that is started: its end is a SIGHUP to it."""
    return lambda: fcntl.ioctl(descriptor, termios.TIOCSCTTY, 0)


@pytest.mark.parametrize("what", ["its own", *slow("shown elsewhere", "its own, under nohup")])
def test_a_terminal_that_closes(start, what):
    ours, theirs = pty.openpty()

    def preexec():
        if what != "shown elsewhere":
            in_a_terminal(theirs)()
        if "nohup" in what:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)

    process = start(theirs, preexec, seconds=0.05, stderr=theirs, words=["--loader.num_workers", "1"], TERM="xterm")
    os.close(theirs)
    while not rows(start.out):
        os.read(ours, 65536)
    os.close(ours)
    stops = what == "its own"
    assert process.wait(150) == (75 if stops else 0)
    if stops:
        assert summary(start.out)["status"] == "preempted" and len(checkpoints(start.out)) == 1
    else:
        assert_whole(start.out)


@pytest.mark.parametrize(("ignored", "code"), [pytest.param(True, 0, marks=pytest.mark.slow), (False, 75)])
def test_a_hangup_of_the_whole_group(start, ignored, code):
    """A shell that goes sends SIGHUP to its jobs' groups: the loader's workers must not end before the state is saved."""
    preexec = (lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) if ignored else None
    process = start(subprocess.DEVNULL, preexec, seconds=0.05, words=["--loader.num_workers", "2"])
    wait_until(lambda: rows(start.out), 150)
    os.killpg(process.pid, signal.SIGHUP)
    said = process.communicate(timeout=150)[1]
    assert process.returncode == code, said
    assert len(checkpoints(start.out)) == 1 and "Traceback" not in said
    assert summary(start.out)["status"] == ("finished" if ignored else "preempted")


@pytest.mark.slow
def test_a_job_in_a_scripts_background_does_not_hear_ctrl_c(start):
    process = start(subprocess.DEVNULL, lambda: signal.signal(signal.SIGINT, signal.SIG_IGN), seconds=0.05)
    wait_until(lambda: rows(start.out), 150)
    process.send_signal(signal.SIGINT)
    assert process.wait(150) == 0
    assert_whole(start.out)


@pytest.mark.slow
def test_a_study_that_is_killed_loses_nothing_of_its_runs(tmp_path):
    base = write_config(tmp_path, schedule={"epochs": 40}, checkpoint={"every_epochs": None})
    study = {"base": base.name, "seeds": [0], "variants": {"one": {}}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    words = [*COMMAND, "study", tmp_path / "study.yaml", "--out", tmp_path / "out"]
    job, run = Job(words, tmp_path / "printed", LARGEBATCH_TEST_SECONDS=0.05), tmp_path / "out/one/seed-0"
    wait_until(lambda: rows(run), 150)
    job.send(signal.SIGHUP)
    assert job.wait() == -signal.SIGHUP
    wait_until(lambda: not job.family(), 30, "no process left")
    assert summary(run)["status"] == "preempted" and len(checkpoints(run)) == 1


def test_output_that_is_lost_is_an_error_where_there_is_nothing_else():
    for words, stdout, code, said in (
        (
            ["plan", "configs/digits.yaml"],
            "/dev/full",
            2,
            "largebatch: error: standard output cannot be written (No space",
        ),
        (["--help"], "/dev/null", 0, ""),
    ):
        with open(stdout, "w") as file:
            done = subprocess.run([*COMMAND, *words], cwd=ROOT, stdout=file, stderr=subprocess.PIPE, text=True)
        assert done.returncode == code and done.stderr.startswith(said) and done.stderr.count("\n") == bool(said)
    piped = gone()
    done = subprocess.run([*COMMAND, "plan", "configs/digits.yaml"], cwd=ROOT, stdout=piped, stderr=subprocess.PIPE)
    os.close(piped)
    assert (done.returncode, done.stderr) == (0, b"")


def stream(descriptor: int, encoding: str = "utf-8") -> io.TextIOWrapper:
    raw = io.BufferedWriter(output.Outlived(descriptor))
    return io.TextIOWrapper(raw, encoding=encoding, errors="largebatch.plain", line_buffering=True)


@pytest.mark.parametrize("blocks", [True, False])
def test_a_reader_that_sleeps_is_not_waited_for(monkeypatch, blocks):
    """A stopped pager, a terminal under Ctrl-S: what it misses is left out, and it is told."""
    monkeypatch.setattr(output, "PATIENCE_SECONDS", 0.05)
    ours, theirs = os.pipe()
    fcntl.fcntl(theirs, fcntl.F_SETPIPE_SZ, 8192)  # of two pages
    os.set_blocking(theirs, blocks)
    text, started = stream(theirs), time.monotonic()
    for number in range(4000):
        print(f"line {number}", file=text)
    assert time.monotonic() - started < 2.0
    shown = os.read(ours, 65536)
    assert shown.startswith(b"line 0\nline 1\n") and len(shown) <= 8192
    print("awake", file=text)
    assert os.read(ours, 65536) == output.LEFT_OUT + b"awake\n"
    os.close(ours)
    print("gone", file=text)
    os.close(theirs)


def test_a_disk_that_has_room_again_is_written_again(tmp_path, monkeypatch):
    with (tmp_path / "log").open("wb") as file:
        text, write = stream(file.fileno()), os.write

        def fail(*_):
            raise OSError(28, "No space left on device")

        print("before", file=text)
        monkeypatch.setattr(os, "write", fail)
        print("lost", file=text)
        monkeypatch.setattr(os, "write", write)
        print("after", file=text)
    assert (tmp_path / "log").read_text() == "before\nafter\n"


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("utf-8", "0.1 → 0.2 ± ∞ 文 \\xe9"),
        ("ascii", "0.1 -> 0.2 +- inf \\u6587 \\xe9"),
        ("latin-1", "0.1 -> 0.2 ± inf \\u6587 \\xe9"),
    ],
)
def test_letters_that_an_encoding_lacks_are_written_out(tmp_path, encoding, expected):
    with (tmp_path / "log").open("wb") as file:
        print("0.1 → 0.2 ± ∞ 文 \udce9", file=stream(file.fileno(), encoding))
    assert (tmp_path / "log").read_bytes() == (expected + "\n").encode(encoding)


@pytest.mark.parametrize(
    ("terminal", "variables", "kind"),
    [
        (True, {"TERM": "xterm"}, ProgressBar),
        (True, {"TERM": "xterm", "NO_COLOR": "1"}, ProgressBar),
        (True, {"TERM": "dumb"}, ProgressLines),
        (False, {"TERM": "xterm"}, ProgressLines),
        (False, {"TERM": "xterm", "FORCE_COLOR": "1"}, ProgressLines),
        (False, {"TERM": "xterm", "TTY_COMPATIBLE": "1"}, ProgressLines),
    ],
)
def test_a_bar_is_drawn_on_terminals_alone(tmp_path, terminal, variables, kind):
    ours, theirs = pty.openpty() if terminal else (os.open(os.devnull, os.O_RDONLY), os.open(os.devnull, os.O_WRONLY))
    with open(ours, "rb"), open(theirs, "w") as file:
        progress = create_progress(Console(file=file, _environ=variables), 100)
        assert type(progress) is kind
        progress.close()


LEFT_OVER = {
    "a notebook": {
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "FORCE_COLOR": "1",
        "TERM": "xterm-color",
    },
    "no such backend": {"MPLBACKEND": "nonsense", "COLUMNS": "20", "TERM": "dumb"},
    "ascii": {"PYTHONIOENCODING": "ascii", "NO_COLOR": "1"},
    "C locale": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


@pytest.mark.parametrize("where", ["a notebook", *slow("C locale", "no such backend", "ascii")])
def test_a_run_bears_where_it_was_started(start, where):
    process = start(subprocess.PIPE, **LEFT_OVER[where])
    printed, said = process.communicate(timeout=150)
    assert (process.returncode, said) == (0, "")
    assert_whole(start.out)
    assert "100%  epoch 1" in re.sub(r"\x1b\[[0-9;]*m", "", printed)
    assert "\r" not in printed and not re.search(r"\x1b\[[0-9;]*[^0-9;m]", printed), "nothing moves a cursor"


@pytest.mark.slow
def test_a_run_needs_nothing_of_crons_environment(start, monkeypatch):
    for name in os.environ:
        if name != "PATH":
            monkeypatch.delenv(name)
    process = start(subprocess.PIPE)
    assert process.communicate(timeout=150)[1] == "" and process.returncode == 0
    assert_whole(start.out)
