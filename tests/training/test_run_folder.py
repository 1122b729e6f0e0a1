"""Whose a folder is: a run writes into its own, and replaces nothing that no run wrote."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from runs import digits

from largebatch.checkpoint.folder import CheckpointFolder
from largebatch.cli import main
from largebatch.distributed import Ranks
from largebatch.errors import UserError
from largebatch.reporting.tables import create_console
from largebatch.section import user_path
from largebatch.studies.study import check_study_folder
from largebatch.training.resume import run_folder_of
from largebatch.training.run import train
from largebatch.training.run_folder import WRITTEN, check_folder, is_run

SHORT = {"schedule.epochs": 0.5, "checkpoint.every_minutes": None, "checkpoint.every_epochs": 0.25, "warmup.name": "none",
         "warmup.epochs": 0.0}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr("largebatch.reporting.plots.plot_run", lambda *_: None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(digits(**SHORT), folder, ranks=Ranks())
    return folder


@pytest.fixture
def run(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def newest(folder):
    return CheckpointFolder(folder / "checkpoints").saved()[-1]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def command(tmp_path, *words):
    (tmp_path / "mine.yaml").write_text(digits(**SHORT).to_yaml())
    return main(["train", str(tmp_path / "mine.yaml"), *map(str, words)])


def refused(tmp_path, capsys, *words):
    assert command(tmp_path, *words) == 2
    said = capsys.readouterr().err
    assert said.startswith("largebatch: error: ") and said.count("\n") == 1, said
    return said


FOREIGN = {
    "config.yaml": "name: somebody's\n",
    "metrics.jsonl": '{"loss": 1}\n',
    "summary.json": '{"accuracy": 1}\n',
    "curve.png": "a picture",
    "model.safetensors": "weights",
    "wandb_id": "abcdefgh\n",
    ".lock": "held by a package manager\n",
    "checkpoints/latest": "epoch-7\n",
    "checkpoints/best": "epoch-3\n",
}


@pytest.mark.parametrize("resume", [[], ["--resume", "auto"]])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_that_no_run_wrote_is_not_replaced(name, resume, tmp_path, capsys):
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text(FOREIGN[name])
    before = contents(out)
    assert f"{out} holds {name}, which no run wrote" in refused(tmp_path, capsys, "--out", out, *resume)
    assert contents(out) == before


@pytest.mark.parametrize("name", [*WRITTEN, ".lock", "metrics.jsonl.part"])
def test_a_pipe_under_a_name_of_a_run_is_not_waited_for(name, run, tmp_path, capsys):
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    said = refused(tmp_path, capsys, "--out", run, "--resume", "auto")
    assert f"{run} holds {name}, a pipe, socket or device where a run has a file" in said


def rename(place):
    place.rename(place.with_name("samples-000000009999"))


DAMAGE = {
    "a pipe for a manifest": (
        lambda p: ((p / "manifest.json").unlink(), os.mkfifo(p / "manifest.json")),
        "manifest.json cannot be",
    ),
    "a pipe for a state": (
        lambda p: ((p / "state.json").unlink(), os.mkfifo(p / "state.json")),
        "state.json: 0 bytes, the manif",
    ),
    "a manifest without end": (
        lambda p: (p / "manifest.json").write_text("[" * 100_000),
        "manifest.json cannot be read (Recurs",
    ),
    "the name of another": (rename, "samples-000000009999 is damaged: it was renamed: state.json is of 719 samples"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_checkpoint_that_is_not_what_it_seems_is_told_and_the_one_before_it_used(what, run, capsys):
    before = CheckpointFolder(run / "checkpoints").saved()
    DAMAGE[what][0](before[-1])
    train(digits(**SHORT), run, ranks=Ranks(), resume="auto", console=create_console())
    said = " ".join(capsys.readouterr().out.split())
    assert DAMAGE[what][1] in said and f"resumed from {before[-2]}" in said
    assert CheckpointFolder(run / "checkpoints").saved()[-1] == before[-1]


def test_a_number_that_is_no_decimal_names_no_checkpoint(run):
    before = CheckpointFolder(run / "checkpoints").saved()
    for name in ("samples-²", "samples-٠٠٠٠٠٠٠٠٠٩٩٩", "samples-999"):
        (run / "checkpoints" / name).mkdir()
    assert CheckpointFolder(run / "checkpoints").saved() == before


def test_a_name_of_the_best_that_is_no_text_names_none(run):
    checkpoints = CheckpointFolder(run / "checkpoints")
    (checkpoints.path / "best").write_bytes(b"\xff\xfe")
    assert checkpoints.best() is None


def test_a_run_of_another_trainer_is_not_taken_for_one(run, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.yaml").write_text("model: {dim: 512}\noptim: {lr: 3e-4}\n")
    (out / "metrics.jsonl").write_text('{"global_step": 1, "samples": 8}\n')
    before = contents(out)
    assert "holds config.yaml" in refused(tmp_path, capsys, "--out", out, "--resume", "auto")
    assert "holds config.yaml" in refused(tmp_path, capsys, "--out", out, "--resume", newest(run))
    assert contents(out) == before


def test_other_files_stay_beside_a_run(tmp_path):
    out = tmp_path / "out"
    (out / "checkpoints" / "lost+found").mkdir(parents=True)
    others = {"notes.md": "mine", "checkpoints/download.part": "half", "tensorboard": "x", ".gitignore": "*"}
    for name, text in others.items():
        (out / name).write_text(text)
    assert command(tmp_path, "--out", out, "--resume", "auto") == 0
    assert all((out / name).read_text() == text for name, text in others.items())
    assert is_run(out)


def test_a_checkpoint_that_was_copied_asks_for_a_folder(run, tmp_path, capsys):
    project = tmp_path / "project"
    (project / "best").mkdir(parents=True)
    (project / "config.yaml").write_text("name: somebody's\n")
    copy = project / "best" / newest(run).name
    shutil.copytree(newest(run), copy)
    before = contents(project)
    assert "does not lie in the folder of its run" in refused(tmp_path, capsys, "--resume", copy)
    assert "holds config.yaml" in refused(tmp_path, capsys, "--resume", copy, "--out", project)
    assert contents(project) == before
    assert run_folder_of(str(newest(run))) == run


def test_the_folder_of_a_checkpoint(run, tmp_path, monkeypatch):
    """As it was named, through links, relative, copied into a place of the right name: only the run's own is known."""
    disk = tmp_path / "disk" / "big"
    disk.parent.mkdir()
    (run / "checkpoints").rename(disk)
    (run / "checkpoints").symlink_to(disk)
    name = newest(run).name
    assert run_folder_of(str(run / "checkpoints" / name)) == run
    (tmp_path / "link").symlink_to(run)
    assert run_folder_of(str(tmp_path / "link" / "checkpoints" / name)) == tmp_path / "link"
    monkeypatch.chdir(run)
    assert run_folder_of(f"checkpoints/{name}") == run
    for place in (disk, tmp_path / "other" / "checkpoints", tmp_path / "best"):
        if place != disk:
            shutil.copytree(disk, place)
        with pytest.raises(UserError, match="does not lie in the folder of its run"):
            run_folder_of(str(place / name))
    (tmp_path / name).symlink_to(run / "checkpoints" / name)  # which leads to the disk, and the disk to nobody
    with pytest.raises(UserError, match="--out"):
        run_folder_of(str(tmp_path / name))
    (run / "checkpoints").unlink()
    disk.rename(run / "checkpoints")
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to(run / "checkpoints" / name)
    assert run_folder_of(str(tmp_path / name)) == run


def test_checkpoints_on_another_disk_go_on_in_their_run(run, tmp_path):
    (run / "summary.json").unlink()
    shutil.rmtree(newest(run))
    disk = tmp_path / "disk" / "checkpoints"
    disk.parent.mkdir()
    (run / "checkpoints").rename(disk)
    (run / "checkpoints").symlink_to(disk)
    assert command(tmp_path, "--resume", newest(run)) == 0
    assert json.loads((run / "summary.json").read_text())["status"] == "finished"
    assert [path.name for path in disk.parent.iterdir()] == ["checkpoints"]
    assert (run / "checkpoints").is_symlink() and newest(run).resolve().parent == disk


def test_a_disk_that_is_not_there_does_not_begin_the_run_again(run, tmp_path, capsys):
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").symlink_to(tmp_path / "unplugged")
    before = contents(run)
    assert "is a link to" in refused(tmp_path, capsys, "--resume", "auto", "--out", run)
    (run / "checkpoints").unlink()
    (run / "checkpoints").write_text("")
    assert "is a file" in refused(tmp_path, capsys, "--resume", "auto", "--out", run)
    (run / "checkpoints").unlink()
    assert contents(run) == before


def test_a_checkpoint_put_among_those_of_another_run_is_refused(run, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    (other / "config.yaml").write_text(digits(**SHORT, **{"optimizer.lr": 0.011}).to_yaml())
    before = contents(other)
    path = newest(other)
    assert "does not lie in the folder of its run" in refused(tmp_path, capsys, "--resume", path)
    assert "is of another run: optimizer.lr" in refused(tmp_path, capsys, "--resume", path, "--out", other)
    assert "is of another run: optimizer.lr" in refused(tmp_path, capsys, "--resume", "auto", "--out", other)
    assert contents(other) == before


def test_a_run_is_known_by_its_traces(run):
    check_folder(run, resume=True)
    (run / ".lock").unlink()  # as some copies leave hidden files out
    assert is_run(run)
    (run / "metrics.jsonl").unlink()
    assert not is_run(run)
    for name in WRITTEN:
        (run / name).unlink(missing_ok=True)
    assert is_run(run)  # checkpoints that were copied alone


def test_a_checkpoint_is_no_run_folder(run, tmp_path, capsys):
    assert "is a checkpoint" in refused(tmp_path, capsys, "--out", newest(run), "--resume", "auto")


def test_a_study_replaces_no_table_of_somebody(tmp_path):
    check_study_folder(tmp_path)
    for name in ("table.md", "table.json", "curves.png"):
        (tmp_path / name).write_text("[]")
        with pytest.raises(UserError, match=f"holds {name}, which no study wrote"):
            check_study_folder(tmp_path)
        (tmp_path / name).unlink()
    (tmp_path / "table.json").write_text('[{"variant": "reference"}]')
    (tmp_path / "table.md").write_text("| variant |")
    check_study_folder(tmp_path)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("~nobody-of-this-name/x", "home"),
        ("x" * 300, "File name too long"),
        ("/".join(["x" * 200] * 30), "File name too long"),
        ("a\0b", "null byte"),
        ("loop", "symbolic links"),
    ],
)
def test_a_path_that_cannot_be_looked_at_is_one_line(path, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.symlink("loop", "loop")
    with pytest.raises(UserError, match=f"^--out: '.*{said}"):
        user_path(path, "--out")
    if "\0" not in path:
        assert said in refused(tmp_path, capsys, "--out", path)
        assert said in refused(tmp_path, capsys, "--resume", path)
        assert said in refused(tmp_path, capsys, "--data.name", "text", "--data.path", path)
        for words in (["train", path], ["plan", path], ["study", path], ["inspect", path]):
            assert main(words) == 2
            assert said in capsys.readouterr().err


def test_a_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/run", "--out") == tmp_path / "run"
    assert command(tmp_path, "--out=~/run") == 0
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_finished_run_without_checkpoints_is_not_begun_again(run, tmp_path, capsys):
    shutil.rmtree(run / "checkpoints")
    before = contents(run)
    said = refused(tmp_path, capsys, "--out", run, "--resume", "auto")
    assert "holds the weights of a finished run (model.safetensors) and no checkpoint" in said
    assert contents(run) == before


def test_a_run_that_begins_again_says_so(run, tmp_path, capsys):
    shutil.rmtree(run / "checkpoints")
    (run / "model.safetensors").unlink()
    assert command(tmp_path, "--out", run, "--resume", "auto") == 0
    assert "has no checkpoint: the run begins again" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("kind", ["file", "link", "folder"])
def test_what_has_the_name_of_a_checkpoint_is_out_of_its_way(kind, run, tmp_path):
    checkpoints = CheckpointFolder(run / "checkpoints")
    last, keep = newest(run), tmp_path / "keep"
    shutil.rmtree(last)
    keep.mkdir()
    (keep / "file").write_text("precious")
    for place in (last, last.with_name(last.name + ".part")):
        if kind == "link":
            place.symlink_to(keep)
        elif kind == "file":
            place.write_text("x")
        else:
            place.mkdir()
    (run / "model.safetensors").unlink()
    train(digits(**SHORT), run, ranks=Ranks(), resume="auto")
    assert checkpoints.newest_whole() == (last, []) and not last.is_symlink()
    assert (keep / "file").read_text() == "precious"
    assert not list((run / "checkpoints").glob("*.part"))


def test_rows_that_cannot_be_read_are_told_of_or_left_out(run, capsys):
    metrics = run / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes() + b"[" * 100_000 + b"\n")
    train(digits(**SHORT), run, ranks=Ranks(), resume="auto")
    assert all(json.loads(line) for line in metrics.read_text().splitlines())
    metrics.unlink()
    metrics.mkdir()
    assert main(["inspect", str(run)]) == 2
    assert "metrics.jsonl: cannot be read (Is a directory)" in capsys.readouterr().err
