"""Ranks on their way to each other: who does not come is named, and no rank waits in silence."""

from __future__ import annotations

import os
import socket
import threading
import time

import pytest
from jobs import free_port

from largebatch.cli import main
from largebatch.distributed import Meeting, Ranks, arrival, before_the_meeting, meeting
from largebatch.distributed.arrival import check_interface, open_store, settle_interface
from largebatch.errors import LostRankError, SharedError, UserError


@pytest.fixture(autouse=True)
def port(monkeypatch):
    """A meeting place on this machine; its port."""
    number = free_port()
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(number)}.items():
        monkeypatch.setenv(name, value)
    for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(arrival, "GRACE_SECONDS", 0.5)
    monkeypatch.setattr(arrival, "SAY_SECONDS", 0.2)
    return number


def together(*functions):
    """Call functions in a thread each; return what they returned or raised."""
    found = [None] * len(functions)

    def call(number, function):
        try:
            found[number] = function()
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=call, args=entry, daemon=True) for entry in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return found


def come(rank, world_size=2, seconds=20.0, local_rank=0):
    return lambda: open_store(Ranks(rank, local_rank, world_size), seconds)


def test_ranks_meet(capsys, monkeypatch):
    monkeypatch.setattr(arrival, "SAY_SECONDS", 10.0)
    stores = together(come(1, 3), come(0, 3), come(2, 3))
    stores[0].set("word", "heard")
    assert [store.get("word") for store in stores] == [b"heard"] * 3
    assert capsys.readouterr().err == ""


def test_a_rank_that_does_not_come_is_said_soon_and_named_at_the_end(port, capsys):
    """As where WORLD_SIZE is left over of another job, and nobody starts the other process."""
    (error,) = together(come(0, seconds=0.6))
    assert isinstance(error, LostRankError)
    assert str(error).startswith(f"rank 1 did not come to 127.0.0.1:{port} within 1 s; see that every node was started")
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(
        f"largebatch: rank 0 waits for rank 1 at 127.0.0.1:{port}; WORLD_SIZE is 2: start the other "
    )
    assert "unset WORLD_SIZE RANK LOCAL_RANK MASTER_ADDR MASTER_PORT" in said


def test_who_has_come_hears_who_has_not(port, capsys):
    errors = together(come(0, 4, 1.5), come(2, 4, 1.5))
    assert [str(error).split(" did")[0] for error in errors] == ["ranks 1, 3"] * 2
    assert all(isinstance(error, LostRankError) for error in errors)


def test_rank_0_that_does_not_come_is_said_too(port, capsys):
    (error,) = together(come(1, seconds=0.6))
    assert isinstance(error, LostRankError)
    assert f"rank 0 did not come to 127.0.0.1:{port} within 1 s (Connection refused)" in str(error)
    assert (
        f"rank 1 waits for rank 0 at 127.0.0.1:{port} (Connection refused); WORLD_SIZE is 2" in capsys.readouterr().err
    )


def test_one_rank_of_a_node_speaks(capsys):
    together(come(1, seconds=0.5, local_rank=1))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["no-such-host.invalid", "a..b", "x" * 70])
def test_a_name_that_is_not_known_is_a_mistake(name, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", name)
    (error,) = together(come(1, seconds=0.3))
    assert isinstance(error, UserError) and f"MASTER_ADDR: this node does not know the name '{name}'" in str(error)


def test_two_processes_of_rank_0(port):
    with socket.create_server(("0.0.0.0", port)):  # the other one
        (error,) = together(come(0))
    assert isinstance(error, UserError)
    assert f"MASTER_PORT: port {port} is in use here, by another run or by a process that is rank 0 too" in str(error)


def test_two_processes_of_another_rank():
    found = together(come(0), come(1), come(1))
    assert [error for error in found[1:] if isinstance(error, UserError) and "RANK is 1 in two processes" in str(error)]


def test_a_mistake_of_one_rank_before_they_meet_is_told_to_all(monkeypatch):
    """A config file that one node lacks, say."""

    def mistaken():
        with before_the_meeting(Ranks(1, 0, 2)):
            raise UserError("run.yaml: no such config file")

    def other():
        with Meeting(Ranks(0, 0, 2), 10.0).agree("config", lambda shown: None) as shown:
            shown["config"] = {}

    errors = together(mistaken, other)
    assert [type(error) for error in errors] == [SharedError] * 2
    assert {str(error) for error in errors} == {"rank 1: run.yaml: no such config file"}


def test_another_error_before_they_meet_is_told_too():
    def broken():
        with before_the_meeting(Ranks(0, 0, 2)):
            raise ModuleNotFoundError("No module named 'pydantic'")

    def other():
        with Meeting(Ranks(1, 0, 2), 10.0).agree("config", lambda shown: None):
            pass

    first, second = together(broken, other)
    assert isinstance(first, ModuleNotFoundError)
    assert (
        isinstance(second, LostRankError) and str(second) == "rank 0: ModuleNotFoundError: No module named 'pydantic'"
    )


@pytest.mark.parametrize("how", ["killed", "killed later", "no way"])
def test_a_rank_that_is_killed_before_it_gives_account_is_named_at_once(how, monkeypatch):
    """For want of memory while it loads its data, say: the kernel closes its connection, and nobody waits for its time-out."""
    if how == "no way":  # a firewall: it counts as living until its time is over
        monkeypatch.setattr(meeting, "hold", lambda *_: None)
    heard = threading.Event()
    seconds = 1.0 if how == "no way" else 10.0

    def dies():
        own = Meeting(Ranks(1, 0, 3), 10.0)
        if how == "killed later":
            heard.wait(5)
        if own._lines is not None:
            own._lines.close()

    def lives(rank):
        met = Meeting(Ranks(rank, 0, 3), 10.0)
        met.seconds = seconds
        with met.agree("data", lambda shown: None):
            heard.set()

    started = time.monotonic()
    first, _, other = together(lambda: lives(0), dies, lambda: lives(2))
    assert isinstance(first, LostRankError) and str(first) == str(other)
    if how == "no way":
        assert str(first).startswith("no word from rank 1 (") and time.monotonic() - started >= seconds
    else:
        assert "ended on the data without a word: killed, perhaps for want of memory" in str(first)
        assert str(first).startswith(f"rank 1 ({os.uname().nodename}, process ") and time.monotonic() - started < 9.0


def test_a_mistake_where_nobody_else_comes_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(meeting, "PATIENCE_SECONDS", 0.5)
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "missing.yaml"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("largebatch: error: missing.yaml: no such config file")


def test_the_hosts_of_ranks_are_named_where_there_are_several():
    accounts = [{"host": host} for host in ("a", "a", "b", "c")]
    assert meeting._on_hosts(accounts, [1, 2]) == " (a, b)" and meeting._on_hosts(accounts[:2], [1]) == ""


def _own_interface():
    found = [entry for entry in arrival._interfaces() if "." in entry[1] and not entry[1].startswith("127.")]
    if not found:
        pytest.skip("this machine has no network interface with an address of its own")
    return found[0]


@pytest.mark.parametrize("known_as", ["127.0.1.1", "127.0.0.1", None, "itself"])
def test_gloo_gives_out_an_address_that_leads_here(known_as, monkeypatch):
    """Debian's hosts file has the host's own name on 127.0.1.1; a name that leads elsewhere is the administrator's choice."""
    name, address = _own_interface()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # for monkeypatch to take away what is set here

    def resolve(*_, **__):
        if known_as is None:
            raise socket.gaierror(-2, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address if known_as == "itself" else known_as, 0))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    settle_interface("")
    settle_interface("127.0.0.1")
    assert not os.environ["GLOO_SOCKET_IFNAME"], "all ranks are on this host"
    settle_interface(address)
    assert os.environ["GLOO_SOCKET_IFNAME"] == ("" if known_as == "itself" else name)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    settle_interface(address)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7", "what the user has set stays"


def test_an_interface_that_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth77")
    with pytest.raises(
        UserError, match=r"GLOO_SOCKET_IFNAME: 'eth77' is no network interface .* this node has .*lo \(127"
    ):
        check_interface()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    check_interface()
