"""Text as bytes, for language models."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from largebatch.data.sampler import SampleKeys
from largebatch.data.source import DataSection, Source, data_path, validation_size
from largebatch.errors import UserError
from largebatch.section import Count
from largebatch.task import Task


class MappedFile:
    """The bytes of a file, mapped into memory: the ranks of a node share the pages, and the kernel may drop unused ones.

    Args:
        file: the file, which must not be empty, nor be shortened while it is mapped.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        with file.open("rb") as opened:
            found = os.fstat(opened.fileno())
            self.identity = (found.st_dev, found.st_ino, found.st_size)
            # torch requires writable memory. Pages would be copied on a write, but nothing writes to them.
            self._mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        self.contents = torch.frombuffer(self._mapped, dtype=torch.uint8)

    def __reduce__(self) -> tuple[Callable[..., MappedFile], tuple[Any, ...]]:
        return _map_again, (self.file, self.identity)  # a worker that is not forked maps the file itself

    def check(self) -> None:
        """Check that the file has not been shortened: the kernel kills a process that reads a page beyond its end.

        Raises:
            UserError: if it is shorter.
        """
        if self._mapped.size() < len(self._mapped):
            raise UserError(
                f"data.path: '{self.file}' was shortened from {len(self._mapped):,} to {self._mapped.size():,} bytes while the "
                "run was reading it; put it back, then continue with --resume auto"
            )


def _map_again(file: Path, identity: tuple[int, int, int]) -> MappedFile:
    again = MappedFile(file)
    if again.identity != identity:
        raise UserError(
            f"data.path: '{file}' was replaced while the run was reading it; put it back, then continue with --resume auto"
        )
    return again


@dataclass(frozen=True)
class TextSamples:
    """Windows of a text: the inputs are all bytes except the last, the targets are all bytes except the first.

    Args:
        text: the file.
        first: index of the first window in the file.
        num_windows: N.
        length: context + 1, the number of bytes of a window.
    """

    text: MappedFile
    first: int
    num_windows: int
    length: int

    def __len__(self) -> int:
        return self.num_windows

    @property
    def windows(self) -> Tensor:
        """The windows, uint8 (N, context + 1), as a view of the mapped file."""
        start, stop = (number * self.length for number in (self.first, self.first + self.num_windows))
        return self.text.contents[start:stop].view(self.num_windows, self.length)

    def __getitems__(self, keys: SampleKeys) -> tuple[Tensor, Tensor]:
        """Return (inputs int64 (n, t), targets int64 (n, t)); the targets are shifted by one byte.

        Raises:
            UserError: if the file was shortened after it was mapped.
        """
        self.text.check()
        windows = self.windows.index_select(0, torch.from_numpy(keys.indices))
        return windows[:, :-1].to(torch.int64), windows[:, 1:].to(torch.int64)


class Text(DataSection):
    """The bytes of a file in windows that do not overlap; the last part of the file is the validation set."""

    name: Literal["text"] = "text"
    """The data set."""

    path: str
    """The text file."""

    context: Count = 128
    """Length of an input sequence in bytes; a sample is one window of context + 1 bytes."""

    val_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Fraction of the windows, at the end of the file, that are used for validation."""

    def load(self, seed: int) -> Source:
        """Return the windows, with the 256 byte values as vocabulary.

        Raises:
            UserError: if the file is missing or too short.
        """
        file = data_path(self.path)
        if not file.is_file():
            raise UserError(
                f"data.path: '{file}' should be a text file, it is a {'folder' if file.is_dir() else 'pipe or device'}"
            )
        try:
            num_bytes = file.stat().st_size
            text = MappedFile(file) if num_bytes else None
        except (OSError, ValueError) as error:
            raise UserError(f"data.path: '{file}' cannot be read ({error})") from error
        length = self.context + 1
        num_windows = num_bytes // length
        if text is None or num_windows < 2:
            raise UserError(
                f"data.path: '{file}' has {num_bytes} bytes; a context of {self.context} needs {2 * length} or more"
            )
        num_train = num_windows - validation_size(num_windows, self.val_fraction)
        task = Task("language_modeling", (self.context,), 256)
        train = TextSamples(text, 0, num_train, length)
        return Source(train, TextSamples(text, num_train, num_windows - num_train, length), task)
