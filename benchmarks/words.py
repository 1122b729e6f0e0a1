"""Data and a model with rare tokens, for studies: the next of a text's commonest words from those before it.

PYTHONPATH=benchmarks largebatch train CONFIG --data.name words:data --data.options '{path: FILE}' --model.name words:model
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from largebatch.task import Task

CONTEXT = 4


class MLP(nn.Module):
    """The next token from `context` tokens; logits [n, vocabulary]."""

    def __init__(self, vocabulary: int, context: int, width: int, hidden: int):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.Sequential(
            nn.Linear(context * width, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, vocabulary),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Run the module."""
        return self.layers(self.embedding(tokens).flatten(1))


def numbered(text: str, vocabulary: int) -> Tensor:
    """Return the words of a text as numbers: the commonest ones from 1 on, 0 for all others."""
    words = text.split()
    kept = {word: index + 1 for index, (word, _) in enumerate(Counter(words).most_common(vocabulary - 1))}
    return torch.tensor([kept.get(word, 0) for word in words])


def data(path: str, vocabulary: int = 5_000) -> tuple[TensorDataset, TensorDataset, Task]:
    """Return training and validation samples, of the last tenth, and the task."""
    windows = numbered(Path(path).read_text(), vocabulary).unfold(0, CONTEXT + 1, 1)
    split = len(windows) * 9 // 10
    train, val = (TensorDataset(part[:, :-1], part[:, -1]) for part in (windows[:split], windows[split + CONTEXT :]))
    return train, val, Task("classification", (CONTEXT,), vocabulary)


def model(task: Task) -> nn.Module:
    """Return a network for them."""
    return MLP(task.num_outputs, CONTEXT, 32, 64)
