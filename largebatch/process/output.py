"""Standard output and standard error that a run outlives: whoever reads them may go away, be full, or fall asleep."""

from __future__ import annotations

import codecs
import errno
import io
import os
import select
import sys
from typing import Any, TextIO

# A reader that takes nothing for so long (a stopped pager, a terminal under Ctrl-S) is no longer waited for.
PATIENCE_SECONDS = 30.0
LEFT_OUT = b"\n[output was left out here: nobody was reading]\n"
# What an encoding may lack, in its letters; names of files appear with the bytes that they have.
PLAIN = {"→": "->", "–": "-", "±": "+-", "·": "-", "∞": "inf", "…": "..."}


def _in_plain_letters(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end]
    return "".join(PLAIN.get(letter) or _escaped(letter) for letter in text), error.end


def _escaped(letter: str) -> str:
    if "\udc80" <= letter <= "\udcff":  # a byte of a file name that is no text
        return f"\\x{ord(letter) - 0xDC00:02x}"
    return letter.encode("ascii", "backslashreplace").decode()


codecs.register_error("largebatch.plain", _in_plain_letters)


class Outlived(io.RawIOBase):
    """A file descriptor of which a failure to write is noted, never raised.

    It is tried again at every write: a disk that was full may have room later.

    Args:
        descriptor: an open file descriptor; it stays open.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.name, self.mode = f"<{descriptor}>", "wb"
        self.failure: OSError | None = None
        self.is_asleep = False

    def fileno(self) -> int:
        """Return the file descriptor."""
        return self.descriptor

    def isatty(self) -> bool:
        """Return whether it is a terminal that is still there."""
        return os.isatty(self.descriptor)

    def writable(self) -> bool:
        """Return that it is."""
        return True

    def write(self, data: Any) -> int:
        """Write bytes, or leave them out where that fails; return how many there were."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while rest and self._has_room():
                rest = rest[self._put(rest) :]
        except OSError as error:
            self.failure = error
        return size

    def _put(self, data: Any) -> int:
        try:
            return os.write(self.descriptor, data[: select.PIPE_BUF])  # so much goes in without waiting
        except BlockingIOError:
            return 0  # somebody else has filled it meanwhile

    def _has_room(self) -> bool:
        """Wait for room, and return whether there is any; a reader that slept is told at waking up what it has missed."""
        if not select.select([], [self.descriptor], [], 0.0 if self.is_asleep else PATIENCE_SECONDS)[1]:
            self.is_asleep = True
            return False
        if self.is_asleep:
            self.is_asleep = False
            self._put(LEFT_OUT)
        return True


class Stream(io.TextIOWrapper):
    """A text stream over `Outlived` that nobody closes: it is asked to by code that does not own it."""

    def close(self) -> None:
        """Hand on what is waiting."""
        self.flush()


def outlive_output() -> None:
    """Let nothing that happens to standard output and standard error end this process, or change its exit code.

    A descriptor that is closed is opened on the null device, so that no file of the run gets its number, and with it what
    libraries print. Streams that somebody else has put there stay.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(null, True)  # the lowest free number: this very descriptor
    sys.stdout = _outlived(sys.stdout, sys.__stdout__)
    sys.stderr = _outlived(sys.stderr, sys.__stderr__)


def _outlived(stream: TextIO | None, original: TextIO | None) -> TextIO:
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")  # for the life of the process
    if stream is not original:
        return stream
    return _stream(stream.fileno(), stream.encoding)


def _stream(descriptor: int, encoding: str) -> Stream:
    raw = io.BufferedWriter(Outlived(descriptor))
    return Stream(raw, encoding=encoding, errors="largebatch.plain", line_buffering=True)


def to_be_spoilt(stream: TextIO | None) -> TextIO | None:
    """Return a stream for code that may close it, detach it or wrap its buffer, like one of `outlive_output`; others as are."""
    return _stream(stream.fileno(), stream.encoding) if isinstance(stream, Stream) else stream


def output_failure() -> str | None:
    """Return why standard output could not be written; None where it was, or where its reader had seen enough."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    failure = raw.failure if isinstance(raw, Outlived) else None
    return None if failure is None or failure.errno in (errno.EPIPE, errno.EIO) else failure.strerror
