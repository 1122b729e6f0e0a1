"""Backends: the only subpackage that uses torch.distributed."""

from largebatch.distributed.backend import Backend, BackendConfig, NonFiniteError, Precision, Ranks, launched_ranks
from largebatch.distributed.create import check_engine, choose_backend, create_backend, resolve
from largebatch.distributed.meeting import Meeting, before_the_meeting
from largebatch.distributed.watch import is_communication, name_ranks

__all__ = [
    "Backend",
    "BackendConfig",
    "Meeting",
    "NonFiniteError",
    "Precision",
    "Ranks",
    "before_the_meeting",
    "check_engine",
    "choose_backend",
    "create_backend",
    "is_communication",
    "launched_ranks",
    "name_ranks",
    "resolve",
]
