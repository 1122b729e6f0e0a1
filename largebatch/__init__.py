"""Distributed large-batch training: state hyper-parameters at a small batch, train at any batch size."""

from largebatch import scaling
from largebatch.scaling import Reference

__all__ = ["Reference", "scaling"]
