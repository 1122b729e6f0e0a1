"""Models whose buffers move, trained and resumed."""

import random
import shutil

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from largebatch.checkpoint.folder import CheckpointFolder
from largebatch.distributed import Ranks
from largebatch.training.run import build_model, train

# Weights and buffers ------------------------------------------------------------------------------------------------


class Drawn(nn.Module):
    """Has a weight and a buffer that no seed fixes, a buffer that no file holds, and buffers that move with what is seen."""

    def __init__(self, num_outputs, moves, draw):
        super().__init__()
        self.register_buffer("noise", torch.from_numpy(draw(64)))
        self.register_buffer("flags", torch.from_numpy(draw(3)) > 0)
        self.register_buffer("seen", torch.zeros(1, dtype=torch.float64))
        self.register_buffer("row", torch.zeros(1).expand(1, 5))
        self.linear = nn.Linear(64, 16)
        self.frozen = nn.Parameter(torch.from_numpy(draw(16)), requires_grad=False)
        self.head = nn.Linear(16, num_outputs)
        with torch.no_grad():
            self.head.weight.copy_(torch.from_numpy(draw(16 * num_outputs)).view(num_outputs, 16) * 0.1)
        self.moves = moves

    def forward(self, inputs):
        if self.training and self.moves:
            self.seen.data.mul_(0.9).add_(0.1 * inputs.detach().mean())  # unseen by version counters
        hidden = torch.relu(self.linear(inputs.flatten(1) + 0.3 * self.noise)) + self.frozen
        return self.head(hidden) * (1 + self.seen)


def drawn(task, moves=False, seeded=False):
    """Draw from NumPy and Python's generators, as they are seeded, or from a generator of its own that is not."""
    own = np.random.default_rng()

    def draw(num):
        if seeded:
            return np.random.normal(size=num) + random.random()
        return own.normal(size=num)

    return Drawn(task.num_outputs, moves, draw)


def normed(task):
    """Batch norms of torch, left as they are: their statistics are of what a rank has seen."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))


MODELS = {
    "drawn": {"model.name": "buffers:drawn"},
    "moving": {"model.name": "buffers:drawn", "model.options": {"moves": True}},
    "batch norm": {"model.name": "buffers:normed", "model.norm_group_size": None},
}
LENGTH = {"schedule.epochs": 1.0, "warmup.name": "none", "warmup.epochs": 0.0, "evaluate.every_epochs": 0.5,
          "checkpoint.every_minutes": None, "checkpoint.every_epochs": 0.5, "optimizer.name": "adamw",
          "optimizer.lr": 1e-3, "scaling.rule": "linear", "optimizer.second_moment": "micro_batch", "seed": 3}  # fmt: skip


def train_and_again(rank, world_size, run, folder, prepare=lambda: None):
    """Train, and train again from the middle; return the last validation losses."""
    prepare()
    ranks = Ranks(rank, rank, world_size)
    whole = train(run, folder / "whole", ranks=ranks).summary
    if rank == 0:
        first, *later = CheckpointFolder(folder / "whole" / "checkpoints").saved()
        assert later
        shutil.copytree(first, folder / "again" / "checkpoints" / first.name)
    if world_size > 1:
        dist.barrier()
    prepare()
    again = train(run, folder / "again", ranks=ranks, resume="auto").summary
    return whole.val_loss, again.val_loss


def check_same_buffers(run, results, folder, tolerance):
    """See that what is reported is of the model that is exported, and that a run from the middle ended as the whole one."""
    assert len({whole for whole, _ in results}) == 1
    reported = results[0][0]
    source = run.data.load(run.seed)
    model = build_model(run, source.task).double()
    model.load_state_dict(load_file(folder / "whole" / "model.safetensors"))
    with torch.no_grad():
        loss = nn.functional.cross_entropy(model.eval()(source.val.inputs.double()), source.val.targets)
    assert abs(float(loss) - reported) < max(tolerance, 1e-12)
    assert abs(results[0][1] - reported) <= tolerance
    whole, again = (load_file(folder / name / "model.safetensors") for name in ("whole", "again"))
    for name, tensor in whole.items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=tolerance)
