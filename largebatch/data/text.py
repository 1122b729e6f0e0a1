"""Text as bytes, for language models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from largebatch.data.sampler import SampleKeys
from largebatch.data.source import Source, data_path, validation_size
from largebatch.section import Section, UserError
from largebatch.task import Task


@dataclass(frozen=True)
class TextSamples:
    """Windows of a text; the model reads all bytes but the last and predicts all but the first.

    Args:
        windows: uint8 (N, context + 1).
    """

    windows: Tensor

    def __len__(self) -> int:
        return len(self.windows)

    def __getitems__(self, keys: SampleKeys) -> tuple[Tensor, Tensor]:
        """Return (inputs int64 (n, t), targets int64 (n, t)), the targets one byte ahead."""
        windows = self.windows.index_select(0, torch.from_numpy(keys.indices))
        return windows[:, :-1].to(torch.int64), windows[:, 1:].to(torch.int64)


class Text(Section):
    """The bytes of a file, cut into windows that do not overlap; the last part of the file is for validation."""

    name: Literal["text"] = "text"
    """The data set."""

    path: str
    """The text file."""

    context: int = Field(default=128, ge=1)
    """Bytes that the model sees at once; a sample is one window of context + 1 bytes."""

    val_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of the windows, at the end of the file, kept for validation."""

    def load(self, seed: int) -> Source:
        """Return the windows, with the 256 bytes as vocabulary.

        Raises:
            UserError: if the file is missing or too short.
        """
        file = data_path(self.path)
        if not file.is_file():
            raise UserError(f"data.path: '{file}' should be a text file, it is a folder")
        try:
            contents = np.fromfile(file, dtype=np.uint8)
        except OSError as error:
            raise UserError(f"data.path: '{file}' cannot be read ({error})") from error
        length = self.context + 1
        num_windows = len(contents) // length
        if num_windows < 2:
            raise UserError(
                f"data.path: '{file}' has {len(contents)} bytes; a context of {self.context} needs {2 * length} or more"
            )
        windows = torch.from_numpy(contents[: num_windows * length]).view(num_windows, length)
        num_train = num_windows - validation_size(num_windows, self.val_fraction)
        task = Task("language_modeling", (self.context,), 256)
        return Source(TextSamples(windows[:num_train]), TextSamples(windows[num_train:]), task)
