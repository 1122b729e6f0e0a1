"""Rendezvous of the ranks: at the address that the launcher names, through one store, and then in a process group."""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from largebatch.distributed.watch import GRACE_SECONDS, cause_of, is_communication, name_ranks, wait_until
from largebatch.errors import LostRankError, UserError, first_few
from largebatch.process.launched import NAMES, is_under_torchrun

if TYPE_CHECKING:
    from largebatch.distributed.backend import Ranks

# Ranks may start at different times (imports from a slow disk), so the first rendezvous waits at least this long.
START_SECONDS = 300.0
# A rank that waits longer than this for others prints a message.
SAY_SECONDS = 15.0
# A name server may not know a node's name until some time after the node was started.
RESOLVE_SECONDS = 60.0
PROBE_SECONDS = 5.0
UNREACHABLE = "largebatch/unreachable"  # key in the store: the rank that cannot reach the others


def open_store(ranks: Ranks, seconds: float | None = None) -> dist.Store:
    """Wait until all ranks have connected, and return their common store, at the address in torchrun's environment variables.

    If gloo would give the other ranks a loopback address of this host, as with Debian's default hosts file,
    GLOO_SOCKET_IFNAME is set to the interface through which the other ranks can be reached.

    Args:
        ranks: this process's rank and the world size; a single rank needs no address.
        seconds: how long to wait; None for the ranks' timeout, but at least `START_SECONDS`.

    Raises:
        LostRankError: if not all ranks connect in time.
        UserError: if the address cannot be resolved, if its port is in use, or if another process has this rank.
    """
    if ranks.world_size == 1:
        return dist.HashStore()
    return _Arrival(ranks, max(ranks.timeout_seconds, START_SECONDS) if seconds is None else seconds).store


class _Arrival:
    """The rendezvous, as one rank takes part in it."""

    def __init__(self, ranks: Ranks, seconds: float) -> None:
        self.rank, self.world_size, self.speaks = ranks.rank, ranks.world_size, ranks.local_rank == 0
        self.host, self.port = os.environ["MASTER_ADDR"].strip(), int(os.environ["MASTER_PORT"])
        self.seconds, self.started = seconds, time.monotonic()
        self.is_served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun serves the store
        self.address = ""  # this host's address, as the others see it; empty if unknown
        if self.rank == 0 and not self.is_served:
            self.store = self._serve()
        else:
            self.address = self._reach()
            self.store = self._open(self.host, is_master=False)
        self.notes = dist.PrefixStore("largebatch/arrival", self.store)
        try:
            self._call_the_roll()
            if _is_loopback(self.address) and self.notes.check(["address"]):
                self.address = _source_address(self.notes.get("address").decode(), self.port)
        except dist.DistError as error:
            raise LostRankError(
                f"rank 0, which keeps the ranks' meeting place at {self.host}:{self.port}, is gone or cannot be reached: its "
                f"own log says why ({cause_of(error)})"
            ) from error
        settle_interface(self.address)
        self.store.set_timeout(timedelta(seconds=seconds))

    def _open(self, host: str, is_master: bool) -> dist.Store:
        return dist.TCPStore(
            host,
            self.port,
            self.world_size,
            is_master,
            timeout=timedelta(seconds=max(self.seconds, PROBE_SECONDS)),
            wait_for_workers=False,
            multi_tenant=True,
            use_libuv=os.environ.get("USE_LIBUV", "1") == "1",
        )

    def _serve(self) -> dist.Store:
        try:
            return self._open("127.0.0.1", is_master=True)
        except dist.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise LostRankError(f"port {self.port} cannot be listened at ({cause_of(error)})") from error
            text = f"MASTER_PORT: port {self.port} is in use here, by another run or by a process that is rank 0 too"
            if is_under_torchrun():  # torchrun found a free port, which another process has taken since
                raise LostRankError(text) from error
            raise UserError(f"{text}; give each process its own RANK, and each run its own MASTER_PORT") from error

    def _reach(self) -> str:
        """Wait until the store's host accepts a connection; return this host's address on that connection."""
        pause = 0.05
        while True:
            known = True
            try:
                with socket.create_connection((self.host, self.port), PROBE_SECONDS) as probe:
                    return str(probe.getsockname()[0])
            except (socket.gaierror, UnicodeError) as error:
                known, cause = False, getattr(error, "strerror", None) or str(error)
            except OSError as error:
                cause = error.strerror or "no answer"
            waited = time.monotonic() - self.started
            if not known and waited >= min(RESOLVE_SECONDS, self.seconds):
                raise UserError(
                    f"MASTER_ADDR: this node does not know the name '{self.host}' ({cause}); name the first node by an address "
                    "that all nodes know"
                )
            if waited >= self.seconds:
                raise LostRankError(
                    f"rank 0 did not come to {self.host}:{self.port} within {self.seconds:.0f} s ({cause}); see that it was "
                    "started, and that this address can be reached from every node"
                )
            self._say_once(f"rank {self.rank} waits for rank 0 at {self.host}:{self.port} ({cause})")
            time.sleep(pause)
            pause = min(1.0, 1.5 * pause)

    def _call_the_roll(self) -> None:
        """Wait until rank 0 has counted all ranks; store an address that can be reached from other hosts."""
        notes = self.notes
        # Under torchrun the store may outlive the processes; torchrun assigns the ranks, so none occurs twice.
        if not is_under_torchrun() and notes.add(f"number/{self.rank}", 1) > 1:
            raise UserError(
                f"environment: RANK is {self.rank} in two processes that meet at {self.host}:{self.port}; give each its own"
            )
        if not _is_loopback(self.address):
            notes.set("address", self.address)
        notes.set(f"came/{self.rank}", "1")
        notes.add("count", 1)
        if self.rank == 0:
            if self._wait(lambda: notes.add("count", 0) >= self.world_size, self._missing):
                notes.set("verdict", "")
                return
            text = (
                f"{self._missing()} did not come to {self.host}:{self.port} within {self.seconds:.0f} s; see that every node "
                "was started, and that this address can be reached from all of them"
            )
            notes.set("verdict", text)
            time.sleep(GRACE_SECONDS)  # the store ends with this process
            raise LostRankError(text)
        self.seconds += 2 * GRACE_SECONDS  # wait for the message of rank 0 after its timeout
        if not self._wait(lambda: notes.check(["verdict"]), lambda: "the others"):
            raise LostRankError(
                f"no word from rank 0 at {self.host}:{self.port} for {self.seconds:.0f} s: dead, hanging or cut off"
            )
        text = notes.get("verdict").decode()
        if text:
            raise LostRankError(text)

    def _missing(self) -> str:
        return name_ranks([rank for rank in range(self.world_size) if not self.notes.check([f"came/{rank}"])])

    def _wait(self, condition: Callable[[], bool], whom: Callable[[], str]) -> bool:
        deadline = self.started + self.seconds
        if wait_until(condition, min(self.started + SAY_SECONDS, deadline) - time.monotonic()):
            return True
        if time.monotonic() < deadline:
            self._say_once(f"rank {self.rank} waits for {whom()} at {self.host}:{self.port}")
        return wait_until(condition, deadline - time.monotonic())

    def _say_once(self, text: str) -> None:
        if not self.speaks or time.monotonic() - self.started < SAY_SECONDS:
            return
        self.speaks = False
        where = "the log of its node says why it does not come"
        if not is_under_torchrun():
            where = (
                f"WORLD_SIZE is {self.world_size}: start the other processes, or, where another job has left these variables "
                f"in this shell, unset {' '.join(NAMES)}"
            )
        print(f"largebatch: {text}; {where}", file=sys.stderr, flush=True)


def open_group(ranks: Ranks, device: torch.device) -> dist.Store:
    """Open the default process group, and return its store.

    Args:
        ranks: this process's rank and the world size. Without a store, `open_store` is called first. A collective fails if a
            rank does not take part in it within ``timeout_seconds``.
        device: device of this process; GPUs communicate through NCCL, CPUs through gloo.

    Raises:
        LostRankError: if not all ranks connect in time, or if they cannot reach each other.
    """
    store = ranks.store or open_store(ranks)
    backend = "nccl" if device.type == "cuda" else "gloo"
    advice = (
        f"set {backend.upper()}_SOCKET_IFNAME on every node to the network interface that leads to the others; this one has "
        f"{_interfaces_in_words()}"
    )

    def connect() -> None:
        dist.init_process_group(
            backend,
            store=store,
            rank=ranks.rank,
            world_size=ranks.world_size,
            timeout=timedelta(seconds=ranks.timeout_seconds),
            device_id=device if device.index is not None else None,
        )

    try:
        if backend == "gloo" and ranks.world_size > 1:
            _heeding_others(connect, store.clone(), advice)  # type: ignore[attr-defined]  # torch does not declare it
        else:
            connect()
    except RuntimeError as error:
        if not is_communication(error):
            raise
        with suppress(RuntimeError):
            store.set(UNREACHABLE, f"rank {ranks.rank} cannot reach the others ({cause_of(error)})")
        raise LostRankError(f"the ranks have met, but cannot reach each other ({cause_of(error)}); {advice}") from error
    return store


def _heeding_others(connect: Callable[[], None], store: dist.Store, advice: str) -> None:
    """Connect in a thread, and stop waiting if another rank reports a failure: gloo's own wait cannot be interrupted.

    Args:
        connect: makes the connections; its thread is abandoned if another rank cannot connect.
        store: a separate connection to the store, because `connect` may be waiting on the group's connection.
        advice: text on how to fix the failure, for the error message.

    Raises:
        LostRankError: if another rank cannot connect.
    """
    failures: list[Exception] = []

    def run() -> None:
        try:
            connect()
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(1.0)
        try:
            said = store.get(UNREACHABLE).decode() if thread.is_alive() and store.check([UNREACHABLE]) else ""
        except RuntimeError:
            said = "rank 0, which keeps the ranks' meeting place, is gone"
        if said and thread.is_alive():
            raise LostRankError(f"the ranks have met, but {said}; {advice}")
    if failures:
        raise failures[0]


def check_interface() -> None:
    """Check that gloo can use the interfaces that GLOO_SOCKET_IFNAME names on this node.

    Raises:
        UserError: if there is no such interface, or it has no address.
    """
    for name in filter(None, os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")):
        try:
            dist.ProcessGroupGloo.create_device(interface=name)
        except RuntimeError as error:
            raise UserError(
                f"GLOO_SOCKET_IFNAME: '{name}' is no network interface with an address here; this node has "
                f"{_interfaces_in_words()}"
            ) from error


def settle_interface(address: str) -> None:
    """Set GLOO_SOCKET_IFNAME to the interface with the given address, if gloo would use a loopback address otherwise.

    Args:
        address: address at which the other ranks reach this host; empty if all ranks are on this host.
    """
    if os.environ.get("GLOO_SOCKET_IFNAME") or _is_loopback(address):
        return
    with suppress(OSError, UnicodeError):  # gloo uses the loopback if the host cannot resolve its own name
        first = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)[0]
        if not _is_loopback(str(first[4][0])):
            return
    name = next((name for name, own in _interfaces() if own == address), None)
    if name is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = name


def _is_loopback(address: str) -> bool:
    return not address or ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _source_address(there: str, port: int) -> str:
    """Return this host's source address for packets to another address; an empty string without a route."""
    family = socket.AF_INET6 if ":" in there else socket.AF_INET
    with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((there, port))  # sends nothing
        return str(probe.getsockname()[0])
    return ""


def _interfaces() -> list[tuple[str, str]]:
    """Return (name, address) of the network interfaces that have an address, the loopback last."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):
                request = struct.pack("256s", name.encode()[:15])
                answer = fcntl.ioctl(probe.fileno(), 0x8915, request)  # SIOCGIFADDR of Linux
                found.append((name, socket.inet_ntoa(answer[20:24])))
    with suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            words = line.split()
            found.append((words[-1], str(ipaddress.IPv6Address(bytes.fromhex(words[0])))))
    return sorted(found, key=lambda entry: _is_loopback(entry[1]))


def _interfaces_in_words() -> str:
    return first_few([f"{name} ({address})" for name, address in _interfaces()], ", ") or "none"
