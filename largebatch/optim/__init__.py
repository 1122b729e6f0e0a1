"""Optimizers: what torch.optim lacks, on its interface. None of them knows of torch.distributed."""

from largebatch.optim.adaptive import Adagrad, Adam, AdamW, RMSProp
from largebatch.optim.groups import is_shadow_group, param_groups, set_hyperparameters
from largebatch.optim.sgd import SGD

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "RMSProp", "is_shadow_group", "param_groups", "set_hyperparameters"]
