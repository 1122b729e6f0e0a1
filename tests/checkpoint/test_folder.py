"""The folder of checkpoints: whole or not there, pruned, and nothing of anybody else's touched."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from resumed import (
    _no_pictures,  # noqa: F401
    commit,
    flip,
)

from largebatch.checkpoint.folder import (
    MANIFEST,
    STATE,
    CheckpointFolder,
    find_problems,
    read_state,
    samples_of,
)


def test_a_committed_checkpoint_is_whole_and_the_latest(tmp_path):
    folder = CheckpointFolder(tmp_path / "run" / "checkpoints")
    assert folder.newest_whole() == (None, []) and folder.saved() == []
    first, second = commit(folder, 40), commit(folder, 100)
    assert folder.saved() == [first, second] and [samples_of(path) for path in folder.saved()] == [40, 100]
    assert folder.newest_whole() == (second, []) and (folder.path / "latest").read_text() == second.name + "\n"
    assert read_state(second) == {"format": 1, "samples": 100}
    folder.mark_best(first)
    assert folder.best() == first
    assert sorted(path.name for path in second.iterdir()) == ["__0_0.distcp", MANIFEST, STATE]
    assert list(folder.path.glob("*.part")) == []


DAMAGES = {
    "a flipped byte": lambda path: flip(path / "__0_0.distcp"),
    "a file cut short": lambda path: os.truncate(path / "__0_0.distcp", 3),
    "a file gone": lambda path: (path / "__0_0.distcp").unlink(),
    "no manifest": lambda path: (path / MANIFEST).unlink(),
    "an empty manifest": lambda path: (path / MANIFEST).write_text("{}"),
    "a list for a manifest": lambda path: (path / MANIFEST).write_text('{"files": [1]}'),
    "a manifest of nothing": lambda path: (path / MANIFEST).write_text('{"files": {}}'),
    "no state": lambda path: (path / STATE).unlink(),
    "another state": lambda path: flip(path / STATE),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found(damage, tmp_path):
    folder = CheckpointFolder(tmp_path)
    first, second = commit(folder, 40), commit(folder, 100)
    DAMAGES[damage](second)
    newest, lines = folder.newest_whole()
    assert newest == first and len(lines) == 1 and f"{second} is damaged: " in lines[0]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_flipped_byte_anywhere_is_found(data, tmp_path_factory):
    """In the manifest, too: it cannot say that another file is whole."""
    folder = CheckpointFolder(tmp_path_factory.mktemp("run"))
    path = commit(folder, 40, b"some tensors")
    chosen = path / data.draw(st.sampled_from(["__0_0.distcp", MANIFEST, STATE]))
    content = bytearray(chosen.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= 1 << data.draw(st.integers(0, 7))
    before = json.loads((path / MANIFEST).read_text())
    chosen.write_bytes(content)
    try:
        same = json.loads((path / MANIFEST).read_bytes()) == before and chosen.name == MANIFEST
    except ValueError:
        same = False
    assert same or find_problems(path)  # only blanks between words may differ


@settings(max_examples=25, deadline=None)
@given(
    steps=st.lists(st.integers(1, 50), min_size=1, max_size=8),
    keep_last=st.integers(1, 4),
    keep_every=st.none() | st.integers(20, 120),
    best=st.none() | st.integers(0, 7),
)
def test_pruning_keeps_the_last_the_best_and_one_in_so_many(steps, keep_last, keep_every, best, tmp_path_factory):
    """Pruned after each checkpoint or only at the end, the same ones are left."""
    folder, late = (CheckpointFolder(tmp_path_factory.mktemp("run")) for _ in range(2))
    samples = [sum(steps[: n + 1]) for n in range(len(steps))]
    for number, count in enumerate(samples):
        for each in (folder, late):
            place = commit(each, count)
            if number == best:
                each.mark_best(place)
        folder.prune(folder.place(count), keep_last, keep_every)
    late.prune(late.place(samples[-1]), keep_last, keep_every)
    expected = set(samples[-keep_last:]) | ({samples[best]} if best is not None and best < len(samples) else set())
    if keep_every is not None:
        for multiple in range(keep_every, samples[-1] + 1, keep_every):
            expected.add(next(count for count in samples if count >= multiple))
    assert {samples_of(path) for path in late.saved()} == expected
    assert {samples_of(path) for path in folder.saved()} == expected
    assert list(folder.path.glob("*.part")) == []


def test_pruning_does_not_count_what_the_run_came_back_from(tmp_path):
    """The newest one was damaged, the run went on from the one before it: the next must not be thrown away for it."""
    folder = CheckpointFolder(tmp_path)
    commit(folder, 40)
    flip(commit(folder, 100) / STATE)
    folder.prune(commit(folder, 60), keep_last=1)
    assert [samples_of(path) for path in folder.saved()] == [60]


def test_nothing_that_is_not_a_checkpoint_is_touched(tmp_path):
    folder = CheckpointFolder(tmp_path)
    commit(folder, 40)
    for name in ("samples-000000000050.part", "samples-mine", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "latest.part").write_text("samples")
    folder.prune(commit(folder, 100), keep_last=1)
    folder.clean()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "latest",
        "notes",
        "samples-000000000100",
        "samples-mine",
    ]


class Crash(BaseException):
    """The process dies here."""


def crash_at(monkeypatch, number):
    """Die before the file operation of that number; return the list of those that were reached."""
    reached = []

    def dying(function, name):
        def call(*arguments, **options):
            reached.append(name)
            if len(reached) == number:
                raise Crash
            return function(*arguments, **options)

        return call

    for owner, names in (
        (Path, ("rename", "replace", "mkdir", "open", "write_bytes", "unlink")),
        (os, ("fsync", "unlink", "rmdir")),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, dying(getattr(owner, name), name))
    return reached


@pytest.mark.parametrize("again", [False, True], ids=["a new one", "over a damaged one"])
def test_a_crash_between_any_two_file_operations_leaves_a_whole_checkpoint(again, tmp_path):
    number, operations = 1, []
    while True:
        path = tmp_path / str(number)
        folder = CheckpointFolder(path)
        commit(folder, 20)
        first = commit(folder, 40)
        if again:
            flip(commit(folder, 100) / STATE)
        with pytest.MonkeyPatch.context() as monkeypatch:
            operations = crash_at(monkeypatch, number)
            try:
                folder.prune(commit(folder, 100), keep_last=1)
                crashed = False
            except Crash:
                crashed = True
        newest, _ = folder.newest_whole()
        assert newest in (first, folder.place(100)), f"after {operations}"
        assert read_state(newest)["samples"] == samples_of(newest)
        # Whatever was left, the next attempt finds its way.
        folder.clean()
        assert folder.newest_whole()[0] == newest
        folder.prune(commit(folder, 120), keep_last=1)
        assert folder.saved() == [folder.place(120)] and (path / "latest").read_text() == folder.place(120).name + "\n"
        assert sorted(p.name for p in path.iterdir()) == ["latest", folder.place(120).name]
        if not crashed:
            break
        number += 1
    assert number > 10
