"""Optimizers with torch.optim's interface that torch.optim lacks. Only `largebatch.reduce` sums over ranks for them."""

from largebatch.optim.adaptive import Adagrad, Adam, AdamW, RMSProp
from largebatch.optim.decay import undecayed
from largebatch.optim.groups import (
    clip_grad_norm_,
    gradients_and_squares,
    is_shadow_group,
    param_groups,
    scale_gradients,
    set_hyperparameters,
)
from largebatch.optim.invariant import BatchSizeInvariant, batch_size_invariant
from largebatch.optim.layerwise import LAMB, LARS
from largebatch.optim.limit import Limit
from largebatch.optim.quench import Quench
from largebatch.optim.scheduler import SampleScheduler
from largebatch.optim.sgd import SGD

__all__ = [
    "LAMB",
    "LARS",
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "BatchSizeInvariant",
    "Limit",
    "Quench",
    "RMSProp",
    "SampleScheduler",
    "batch_size_invariant",
    "clip_grad_norm_",
    "gradients_and_squares",
    "is_shadow_group",
    "param_groups",
    "scale_gradients",
    "set_hyperparameters",
    "undecayed",
]
