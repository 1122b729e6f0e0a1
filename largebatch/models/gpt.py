"""A decoder-only transformer with the architecture of GPT-2.

References:
    Radford et al., "Language Models are Unsupervised Multitask Learners", 2019: pre-norm blocks, learned position embeddings,
    normal initialisation with standard deviation 0.02, and projections into the residual stream initialised with a standard
    deviation scaled by 1/sqrt(2 L), because 2 L of them are summed.
"""

from __future__ import annotations

import math
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from largebatch.errors import UserError
from largebatch.section import Depth, Section, Width
from largebatch.task import Task


class PositionEmbedding(nn.Module):
    """Adds a learned vector for each position.

    Args:
        context: number of positions.
        d_model: width.
    """

    def __init__(self, context: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(context, d_model))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, features: Tensor) -> Tensor:
        """Return features (n, t, d) with the vectors of the first t positions added.

        Raises:
            ValueError: if t exceeds the context.
        """
        context, num_positions = len(self.weight), features.shape[1]
        if num_positions > context:
            raise ValueError(f"a sequence of {num_positions} tokens is longer than the context of {context}")
        return features + (self.weight if num_positions == context else self.weight[:num_positions])


class Attention(nn.Module):
    """Causal self-attention.

    Args:
        d_model: width, a multiple of n_head.
        n_head: number of heads.
        dropout: dropout probability of the attention weights and of the output, in [0, 1).
    """

    def __init__(self, d_model: int, n_head: int, dropout: float) -> None:
        super().__init__()
        self.n_head = n_head
        self.dropout = dropout
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.proj = nn.Linear(d_model, d_model)

    def forward(self, features: Tensor) -> Tensor:
        """Return (n, t, d) for features (n, t, d); each position attends to itself and to earlier ones."""
        num, length, width = features.shape
        heads = self.qkv(features).view(num, length, 3, self.n_head, width // self.n_head)
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # (n, heads, t, d / heads) each
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        return F.dropout(self.proj(mixed.transpose(1, 2).reshape(num, length, width)), self.dropout, self.training)


class FeedForward(nn.Module):
    """Two linear layers with a GELU between them and a hidden width of 4 * d_model.

    Args:
        d_model: width.
        dropout: dropout probability of the output, in [0, 1).
    """

    def __init__(self, d_model: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.fc = nn.Linear(d_model, 4 * d_model)
        self.proj = nn.Linear(4 * d_model, d_model)

    def forward(self, features: Tensor) -> Tensor:
        """Return (n, t, d) for features (n, t, d)."""
        return F.dropout(self.proj(F.gelu(self.fc(features))), self.dropout, self.training)


class Block(nn.Module):
    """Attention and feed-forward layers, each applied to the normalised residual stream and added to it.

    Args:
        d_model: width, a multiple of n_head.
        n_head: number of heads.
        dropout: dropout probability, in [0, 1).
    """

    def __init__(self, d_model: int, n_head: int, dropout: float) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(d_model)
        self.attn = Attention(d_model, n_head, dropout)
        self.ln2 = nn.LayerNorm(d_model)
        self.mlp = FeedForward(d_model, dropout)

    def forward(self, features: Tensor) -> Tensor:
        """Return (n, t, d) for features (n, t, d)."""
        features = features + self.attn(self.ln1(features))
        return features + self.mlp(self.ln2(features))


class GPT(nn.Module):
    """Token and position embeddings, blocks, a final layer norm and a linear layer to the vocabulary.

    Args:
        vocab_size: number of tokens in the vocabulary.
        context: largest number of positions.
        n_layer: L, number of blocks.
        n_head: number of attention heads in each block.
        d_model: width, a multiple of n_head.
        dropout: dropout probability, in [0, 1).
        tie_weights: whether the last layer shares its weight with the token embedding, as in GPT-2.
    """

    def __init__(
        self,
        vocab_size: int,
        context: int,
        n_layer: int = 4,
        n_head: int = 4,
        d_model: int = 128,
        dropout: float = 0.0,
        tie_weights: bool = True,
    ) -> None:
        super().__init__()
        if d_model % n_head:
            raise ValueError(f"d_model {d_model} is not a multiple of n_head {n_head}")
        self.dropout = dropout
        self.wte = nn.Embedding(vocab_size, d_model)
        self.wpe = PositionEmbedding(context, d_model)
        self.blocks = nn.ModuleList(Block(d_model, n_head, dropout) for _ in range(n_layer))
        self.ln_f = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, vocab_size, bias=False)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                into_residual = name.endswith(".proj")
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * n_layer) if into_residual else 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        if tie_weights:
            self.head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (n, t, vocab_size) for tokens int64 (n, t).

        Raises:
            ValueError: if t exceeds the context.
        """
        features = F.dropout(self.wpe(self.wte(tokens)), self.dropout, self.training)
        for block in self.blocks:
            features = block(features)
        return self.head(self.ln_f(features))


class GPTConfig(Section):
    """A decoder-only transformer with the architecture of GPT-2; its context length is that of the data."""

    name: Literal["gpt"] = "gpt"
    """The model."""

    n_layer: Depth = 4
    """Number of blocks."""

    n_head: Width = 4
    """Number of attention heads in each block."""

    d_model: Width = 128
    """Width; a multiple of n_head."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout probability in training."""

    tie_weights: bool = True
    """Whether the last layer shares its weight with the token embedding."""

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.d_model % self.n_head:
            multiple = max(1, round(self.d_model / self.n_head)) * self.n_head
            raise ValueError(f"d_model {self.d_model} is not a multiple of n_head {self.n_head}; {multiple} is")
        return self

    def build(self, task: Task) -> GPT:
        """Return a newly initialised model.

        Raises:
            UserError: if the samples are not sequences of tokens.
        """
        if task.kind != "language_modeling" or len(task.sample_shape) != 1:
            raise UserError(
                f"model.name: gpt takes sequences of tokens, the data poses a {task.kind} task on samples of shape "
                f"{task.sample_shape}"
            )
        return GPT(
            task.num_outputs,
            task.sample_shape[0],
            self.n_layer,
            self.n_head,
            self.d_model,
            self.dropout,
            self.tie_weights,
        )
