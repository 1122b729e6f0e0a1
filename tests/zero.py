"""What tests of DeepSpeed share."""

from importlib.util import find_spec

import pytest
import torch
import torch.distributed as dist
from engine_runs import whole
from torch import nn

from largebatch import track
from largebatch.distributed import BackendConfig, Ranks, create_backend
from largebatch.distributed.state import group_state, load_group_state, write_tensors
from largebatch.optim import AdamW, param_groups

needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


def _fresh_counters():
    """DeepSpeed numbers the modules of a process; ranks of the pool have had different numbers of them."""
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init

    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][:] = [0]
    Init.param_id = 0


class _Updates:
    """A loop of updates on one fixed batch, without a trainer."""

    def __init__(self, rank, world_size, keys, optimizer=AdamW, precision="fp32", model=None):
        if keys["name"] == "deepspeed":
            _fresh_counters()
        torch.manual_seed(0)
        self.model = model or track(nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3)))
        self.backend = create_backend(BackendConfig(device="cpu", **keys), precision, Ranks(rank, rank, world_size))
        self.backend.scaler.set_growth_interval(2)  # of fp16; 2000 otherwise
        self.called, self.optimizer = self.backend.prepare(
            self.model, lambda m: optimizer(param_groups(m, 0.1), lr=0.01, reference_batch_size=2)
        )
        generator = torch.Generator().manual_seed(1)
        self.inputs, self.targets = torch.randn(12, 7, generator=generator), torch.randn(12, 3, generator=generator)
        self.mine = slice(rank * 12 // world_size, (rank + 1) * 12 // world_size)
        self.rank, self.world_size = rank, world_size

    def backward(self, scale=1.0):
        with self.backend.accumulate(sync=True):
            with self.backend.autocast():
                outputs = self.called(self.inputs[self.mine])
            self.backend.backward((outputs - self.targets[self.mine]).square().sum() / 12 * scale)
        self.optimizer.set_batch(12, 12, self.world_size)

    def update(self, scale=1.0):
        self.backward(scale)
        return self.backend.step(self.optimizer, 1.0)

    def full_state(self):
        """Return every weight and second moment, whole, by name."""
        state = self.backend.state(self.model, self.optimizer)
        state = {name: whole(value) for name, value in state.items()}
        parts = [None] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(parts, state)
        else:
            parts = [state]
        return {name: value.clone() for part in parts for name, value in part.items()}

    def save(self, path):
        path.mkdir(exist_ok=True)
        group = dist.group.WORLD if self.world_size > 1 else None
        write_tensors(path, self.backend.state(self.model, self.optimizer), group)
        return group_state(self.optimizer)

    def load(self, path, groups):
        self.backend.load_state(path, self.model, self.optimizer)
        load_group_state(self.optimizer, groups)


def zero(stage):
    return {"name": "deepspeed", "zero_stage": stage}
