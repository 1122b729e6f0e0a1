"""Optimizers: what torch.optim lacks, on its interface. None of them knows of torch.distributed."""

from largebatch.optim.adaptive import Adagrad, Adam, AdamW, RMSProp
from largebatch.optim.groups import param_groups, set_hyperparameters
from largebatch.optim.sgd import SGD

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "RMSProp", "param_groups", "set_hyperparameters"]
