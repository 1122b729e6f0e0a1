"""Connections that the kernel closes when a process ends, so that rank 0 sees at once that a rank was killed."""

from __future__ import annotations

import socket
from contextlib import suppress

CONNECT_SECONDS = 5.0


class Lifelines:
    """Rank 0's connections to the others. A rank that could not connect (firewall, too many open files) counts as alive."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("", 0), backlog=4096)
        self.listener.setblocking(False)
        self.port: int = self.listener.getsockname()[1]
        self._waiting: list[socket.socket] = []  # connections whose rank has not been received yet
        self._ends: dict[int, socket.socket] = {}
        self._gone: set[int] = set()

    def gone(self) -> set[int]:
        """Return the ranks whose processes have ended."""
        with suppress(OSError):
            while True:
                end, _ = self.listener.accept()
                end.setblocking(False)
                self._waiting.append(end)
        for end in list(self._waiting):
            with suppress(OSError):
                word = end.recv(16)
                self._waiting.remove(end)
                if word.isdigit():
                    self._ends[int(word)] = end
        for rank, end in self._ends.items():
            with suppress(BlockingIOError, InterruptedError):
                if not _is_open(end):
                    self._gone.add(rank)
        return self._gone


def _is_open(end: socket.socket) -> bool:
    try:
        return bool(end.recv(1))
    except ConnectionError:
        return False


def hold(host: str, port: int, rank: int) -> socket.socket | None:
    """Connect this rank to rank 0, and return the socket, which must stay open; None if rank 0 cannot be reached."""
    try:
        end = socket.create_connection((host, port), CONNECT_SECONDS)
        end.sendall(str(rank).encode())
    except (OSError, UnicodeError):
        return None
    return end
