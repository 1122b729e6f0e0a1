"""Standard output and standard error that cannot end a run if their reader disappears, runs out of space or stops reading."""

from __future__ import annotations

import codecs
import errno
import io
import os
import select
import sys
from typing import Any, TextIO

# How long to wait for a reader that reads nothing (a stopped pager, a terminal after Ctrl-S).
PATIENCE_SECONDS = 30.0
LEFT_OUT = b"\n[output was left out here: nobody was reading]\n"
# Replacements for characters that an encoding may lack; bytes of file names that are not text are escaped.
PLAIN = {"→": "->", "–": "-", "±": "+-", "·": "-", "∞": "inf", "…": "..."}


def _in_plain_letters(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end]
    return "".join(PLAIN.get(letter) or _escaped(letter) for letter in text), error.end


def _escaped(letter: str) -> str:
    if "\udc80" <= letter <= "\udcff":  # a byte of a file name that is not text
        return f"\\x{ord(letter) - 0xDC00:02x}"
    return letter.encode("ascii", "backslashreplace").decode()


codecs.register_error("largebatch.plain", _in_plain_letters)


class Outlived(io.RawIOBase):
    """A file descriptor whose write errors are recorded, never raised.

    Each write tries again after a failure, because a disk that was full may have space later.

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
        """Return whether the descriptor is a terminal that still exists."""
        return os.isatty(self.descriptor)

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, data: Any) -> int:
        """Write bytes, or drop them if this fails; return their number in both cases."""
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
            return os.write(self.descriptor, data[: select.PIPE_BUF])  # a pipe takes this much without blocking
        except BlockingIOError:
            return 0  # another process has filled it meanwhile

    def _has_room(self) -> bool:
        """Wait until the descriptor is writable, and return whether it is; after a gap, first write that output is missing."""
        if not select.select([], [self.descriptor], [], 0.0 if self.is_asleep else PATIENCE_SECONDS)[1]:
            self.is_asleep = True
            return False
        if self.is_asleep:
            self.is_asleep = False
            self._put(LEFT_OUT)
        return True


class Stream(io.TextIOWrapper):
    """A text stream over `Outlived` that cannot be closed, because code that does not own it may try to."""

    def close(self) -> None:
        """Flush the stream, without closing it."""
        self.flush()


def outlive_output() -> None:
    """Prevent errors of standard output and standard error from ending this process or changing its exit code.

    A closed standard descriptor is opened on the null device; otherwise a file of the run could get its number, and the output
    of libraries would be written into that file. Streams that have been replaced by other code are kept.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(null, True)  # open() returned the lowest free number, which is this descriptor
    sys.stdout = _outlived(sys.stdout, sys.__stdout__)
    sys.stderr = _outlived(sys.stderr, sys.__stderr__)


def _outlived(stream: TextIO | None, original: TextIO | None) -> TextIO:
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")  # stays open until the process ends
    if stream is not original:
        return stream
    return _stream(stream.fileno(), stream.encoding)


def _stream(descriptor: int, encoding: str) -> Stream:
    raw = io.BufferedWriter(Outlived(descriptor))
    return Stream(raw, encoding=encoding, errors="largebatch.plain", line_buffering=True)


def to_be_spoilt(stream: TextIO | None) -> TextIO | None:
    """Return a separate stream for code that may close or detach it, in place of one of `outlive_output`; others unchanged."""
    return _stream(stream.fileno(), stream.encoding) if isinstance(stream, Stream) else stream


def output_failure() -> str | None:
    """Return why standard output could not be written; None without an error, or if its reader closed it."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    failure = raw.failure if isinstance(raw, Outlived) else None
    return None if failure is None or failure.errno in (errno.EPIPE, errno.EIO) else failure.strerror
