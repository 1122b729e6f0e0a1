"""Variables of a launcher, of which a shell may hold some that another job has left behind."""

from __future__ import annotations

import pytest
from jobs import free_port
from runs import digits

from largebatch.cli import main
from largebatch.distributed import arrival, launched_ranks, meeting
from largebatch.errors import UserError
from largebatch.process.launched import NAMES, Place, hand_over, is_under_torchrun, launched_place, tell_begun


@pytest.fixture
def leave(monkeypatch):
    """Set the variables of "NAME=VALUE ..." and no others of a launcher."""

    def leave(words):
        for name in (*NAMES, "TORCHELASTIC_RUN_ID", "PET_NNODES", "GROUP_WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for word in words.split():
            monkeypatch.setenv(*word.split("="))

    return leave


MEETING = "MASTER_ADDR=127.0.0.1 MASTER_PORT=29500"


@pytest.mark.parametrize(
    ("words", "place"),
    [
        ("", Place()),
        ("LOCAL_RANK=1", Place()),
        ("RANK=3", Place()),
        ("RANK=3 LOCAL_RANK=3 MASTER_PORT=x", Place()),
        ("WORLD_SIZE= RANK= LOCAL_RANK=", Place()),
        ("WORLD_SIZE= RANK=1", Place()),
        ("WORLD_SIZE=1", Place()),
        ("WORLD_SIZE=1 RANK=0", Place()),
        ("WORLD_SIZE=1 RANK=0 LOCAL_RANK=0", Place()),
        ("WORLD_SIZE=1 RANK=0 LOCAL_RANK=2", Place(0, 2, 1)),  # a GPU chosen by hand
        (f"WORLD_SIZE=4 RANK=3 LOCAL_RANK=1 {MEETING}", Place(3, 1, 4)),
        (f"WORLD_SIZE=2 RANK=0 LOCAL_RANK=0 {MEETING}", Place(0, 0, 2)),
    ],
)
def test_a_place_is_read(words, place, leave):
    leave(words)
    assert launched_place() == place


@pytest.mark.parametrize(
    "words",
    [
        "WORLD_SIZE=1 RANK=3",
        "WORLD_SIZE=1 RANK=3 LOCAL_RANK=3",
        "WORLD_SIZE=0",
        "WORLD_SIZE=0 RANK=0 LOCAL_RANK=0",
        "WORLD_SIZE=-1 RANK=0 LOCAL_RANK=0",
        "WORLD_SIZE=two RANK=0 LOCAL_RANK=0",
        f"WORLD_SIZE=2 {MEETING}",
        f"WORLD_SIZE=2 RANK=1 {MEETING}",
        f"WORLD_SIZE=2 RANK=2 LOCAL_RANK=0 {MEETING}",
        f"WORLD_SIZE=2 RANK=-1 LOCAL_RANK=0 {MEETING}",
        f"WORLD_SIZE=2 RANK=1 LOCAL_RANK=-1 {MEETING}",
        "WORLD_SIZE=2 RANK=1 LOCAL_RANK=1",
        "WORLD_SIZE=2 RANK=1 LOCAL_RANK=1 MASTER_ADDR=127.0.0.1",
        "WORLD_SIZE=2 RANK=1 LOCAL_RANK=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=http",
        "WORLD_SIZE=2 RANK=1 LOCAL_RANK=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=70000",
    ],
)
def test_what_is_no_place_is_one_line_and_writes_nothing(words, leave, tmp_path, capsys):
    leave(words)
    with pytest.raises(UserError, match=r"WORLD_SIZE is .*; start with torchrun, .* unset WORLD_SIZE RANK"):
        launched_ranks()
    (tmp_path / "run.yaml").write_text(digits().to_yaml())
    assert main(["train", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("largebatch: error: environment: ") and said.count("\n") == 1, said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["train", "plan", "inspect", "study", "bench"])
@pytest.mark.parametrize(
    "words",
    ["LOCAL_RANK=1", "RANK=1 LOCAL_RANK=1", "WORLD_SIZE=1 RANK=3 LOCAL_RANK=3", "WORLD_SIZE=2 RANK=1 LOCAL_RANK=1"],
)
def test_a_mistake_is_always_told(words, command, leave, capsys):
    leave(words)
    assert main([command, "missing.yaml"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("largebatch: error: ") and "missing.yaml" in said and said.count("\n") == 1, said


@pytest.mark.parametrize("command", ["plan", "inspect", "study"])
def test_a_command_that_runs_alone_tells_its_mistakes_whatever_is_set(command, leave, capsys):
    leave(f"WORLD_SIZE=2 RANK=1 LOCAL_RANK=1 {MEETING}")
    assert main([command, "missing.yaml"]) == 2
    assert "missing.yaml" in capsys.readouterr().err


def test_of_the_ranks_of_a_node_one_tells(leave, capsys, monkeypatch):
    monkeypatch.setattr(meeting, "PATIENCE_SECONDS", 0.1)  # for the others, who do not come
    monkeypatch.setattr(arrival, "GRACE_SECONDS", 0.1)
    told = []
    for rank, local_rank in ((0, 0), (1, 1), (2, 0), (3, 1)):
        leave(f"WORLD_SIZE=4 RANK={rank} LOCAL_RANK={local_rank} MASTER_ADDR=127.0.0.1 MASTER_PORT={free_port()}")
        assert main(["train", "missing.yaml"]) == 2
        told.append(capsys.readouterr().err.count("\n"))
    assert told == [1, 0, 1, 0]


def test_torchruns_id_alone_is_left_of_another_job(leave):
    leave("TORCHELASTIC_RUN_ID=none")
    assert not is_under_torchrun()
    leave("TORCHELASTIC_RUN_ID=none WORLD_SIZE=1")
    assert is_under_torchrun()


UNDER = f"TORCHELASTIC_RUN_ID=x WORLD_SIZE=2 RANK=0 LOCAL_RANK=0 {MEETING}"


@pytest.mark.parametrize("asked", ["2", "2:2", "2:4", "3"])
def test_fewer_nodes_than_were_asked_for_are_refused(asked, leave, capsys):
    """Torchrun goes on without a node whose clock is behind, however many it was to wait for."""
    leave(f"{UNDER} PET_NNODES={asked} GROUP_WORLD_SIZE=1")
    with pytest.raises(UserError, match=rf"{asked[0]} nodes were asked for, 1 came \(.*set the clocks of all nodes"):
        launched_place()
    assert main(["train", "missing.yaml"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "words", ["PET_NNODES=1:2", "PET_NNODES=1", "", "PET_NNODES=two", "PET_NNODES=2 GROUP_WORLD_SIZE=2"]
)
def test_as_many_nodes_as_were_asked_for_are_taken(words, leave):
    leave(f"GROUP_WORLD_SIZE=1 {UNDER} {words}")
    assert launched_place() == Place(0, 0, 2)


def test_nodes_of_another_job_in_the_shell_say_nothing(leave):
    leave("PET_NNODES=2 GROUP_WORLD_SIZE=1")
    assert launched_place() == Place()


def test_exit_codes_are_handed_over_to_torchrun_sh(leave, tmp_path, monkeypatch):
    """To torchrun 2 and 3 are 0, as it would start them again."""
    told = tmp_path / "codes"
    leave(UNDER)
    assert [hand_over(code) for code in (0, 2, 3, 5)] == [0, 2, 3, 5], "bare torchrun sees them as they are"
    monkeypatch.setenv("LARGEBATCH_EXIT_CODES", str(told))
    tell_begun()
    assert [hand_over(code) for code in (0, 2, 3, 4, 5, 6, 75, 130)] == [0, 0, 0, 4, 5, 6, 75, 130]
    assert hand_over(75, is_final=True) == 0
    assert told.read_text().split() == ["begun", "0", "2", "3", "4", "5", "6", "75", "130", "75"]
    leave("")
    assert hand_over(2) == 2, "no process of torchrun's"
    leave(UNDER)
    monkeypatch.setenv("LARGEBATCH_EXIT_CODES", str(tmp_path / "missing" / "codes"))
    assert hand_over(2) == 2
