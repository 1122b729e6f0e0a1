"""Runs of every engine beside those of one process."""

import torch
from runs import digits
from torch import nn
from torch.utils.checkpoint import checkpoint

from largebatch.distributed import Ranks, create_backend
from largebatch.models.gpt import GPT
from largebatch.planner.resolve import resolve
from largebatch.training.run import build_model
from largebatch.training.trainer import Trainer

ENGINES = {
    "ddp": {"backend.name": "ddp"},
    "fsdp": {"backend.name": "fsdp"},
}
# 20 updates of AdamW on per-sample squares, on widths that no number of ranks divides.
BASE = {"optimizer.name": "adamw", "optimizer.lr": 1e-3, "optimizer.second_moment": "sample", "optimizer.weight_decay": 0.01,
        "model.hidden": [33, 17], "batch.size": 144, "schedule.epochs": 2.2, "evaluate.every_epochs": 1.1}  # fmt: skip
CASES = {
    "accumulation": {"batch.micro_size": 20},
    "growing batch": {"schedule.name": "step", "schedule.milestones_epochs": [0.6, 1.2], "schedule.factor": 0.5,
                      "schedule.epochs": 3.0, "schedule.realize": "batch", "batch.size": 100},
    "clipping": {"optimizer.max_grad_norm": 0.3},
}  # fmt: skip
CASES["all of it"] = {**CASES["accumulation"], **CASES["growing batch"], **CASES["clipping"]}
# 1 to 4 ranks cut each of 20 updates into the same 12 micro-batches.
CASES["micro-batches"] = {"optimizer.second_moment": "micro_batch", "batch.size": 192, "batch.micro_size": 16,
                          "schedule.epochs": 20 * 192 / 1438, "optimizer.max_grad_norm": 0.3}  # fmt: skip
OTHERS = {  # what else a run may have: at two ranks, in float64
    "carried averages": {"optimizer.betas": [0.9, 0.95]},
    "cnn with batch norm": {"model.name": "cnn", "model.channels": [8, 6], "model.norm": "batch", "model.norm_group_size": 16, "model.hidden": None,
                            "batch.size": 192, "batch.micro_size": 16},
    "tied transformer": {"model.hidden": None, "model.name": "engine_runs:transformer", "schedule.epochs": 0.4, "batch.micro_size": 32},
    "checkpointed transformer": {"model.hidden": None, "model.name": "engine_runs:checkpointed", "schedule.epochs": 0.3},
    "idle ranks": {"batch.size": 205, "schedule.epochs": 1.0},  # 1438 = 7 * 205 + 3
    "fewer rows than ranks": {"model.hidden": [3, 2], "schedule.epochs": 0.6},
    "plain second moments": {"optimizer.second_moment": "batch"},
    "centered rmsprop": {"optimizer.name": "rmsprop", "optimizer.lr": 1e-3, "optimizer.centered": True, "optimizer.momentum": 0.5},
    "adagrad": {"optimizer.name": "adagrad", "optimizer.lr": 1e-3},
    "sgd": {"optimizer.name": "sgd", "optimizer.second_moment": None, "optimizer.lr": 0.01, "optimizer.momentum": 0.9, "optimizer.nesterov": True},
    "sgd, average form": {"optimizer.name": "sgd", "optimizer.second_moment": None, "optimizer.lr": 0.01, "optimizer.momentum": 0.9, "optimizer.form": "average"},
    "squares of all samples": {"optimizer.squares_samples": "all"},
    "squares of few samples": {"optimizer.squares_samples": 5, "batch.micro_size": 30},
    "quench": {"optimizer.name": "quench", "optimizer.second_moment": None, "optimizer.lr": 0.02, "optimizer.K": 300},
    "quench, exact": {"optimizer.name": "quench", "optimizer.second_moment": None, "optimizer.lr": 0.02, "optimizer.K": 300, "optimizer.sigma2": "sample"},
}  # fmt: skip


class _Checkpointed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, features):
        return checkpoint(self.inner, features, use_reentrant=False)


class _Transformer(nn.Module):
    """Reads an image of 8 x 8 as 64 tokens; the class is told at the last one."""

    def __init__(self, is_checkpointed):
        super().__init__()
        self.gpt = GPT(17, 64, n_layer=2, n_head=2, d_model=8)
        if is_checkpointed:
            for block in self.gpt.blocks:
                block.mlp = _Checkpointed(block.mlp)

    def forward(self, images):
        return self.gpt(images.flatten(1).mul(16).round().long().clamp(0, 16))[:, -1, :10].clone()


def transformer(task):
    return _Transformer(False)


def checkpointed(task):
    return _Transformer(True)


class Rows(list):
    """Keeps the rows it is shown."""

    def log(self, row):
        self.append(row)

    def rewind(self, samples):
        pass

    def close(self):
        pass


def trajectory(rank, world_size, run):
    """Return the rows of a run, its last weights and second moments {name: tensor}, and the weights it began with."""
    torch.manual_seed(run.seed)
    source = run.data.load(run.seed)
    model = build_model(run, source.task)
    start = {f"model.{name}": value.clone() for name, value in model.state_dict().items()}
    resolved = resolve(run, len(source.train), world_size)
    backend = create_backend(run.backend, run.precision, Ranks(rank, rank, world_size))
    trainer = Trainer(resolved, source, model, backend, logger=Rows())
    rows = trainer.logger
    summary = trainer.train()
    assert summary.status == "finished", summary.message
    state = backend.state(trainer.bare_model, trainer.optimizer)
    state = {name: whole(value).detach().clone() for name, value in state.items()}
    del trainer
    backend.close()
    return list(rows), state, start


def whole(value):
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def gathered(results):
    """Return (rows, state, start) of all ranks' trajectories: an engine may leave a name on one rank alone."""
    state = {name: value for _, part, _ in results for name, value in part.items()}
    return results[0][0], state, results[0][2]


def config(engine, precision, case, extra=()):
    """Return a run; a flag of None takes one of BASE away."""
    flags = {**BASE, **{**CASES, **OTHERS, "": {}}[case], **ENGINES[engine], **dict(extra), "precision": precision}
    # Another name empties its section, so names come first.
    named = sorted(flags.items(), key=lambda item: not item[0].endswith(".name"))
    return digits(**{name: value for name, value in named if value is not None})


def distances(ours, theirs):
    """Return {name: relative distance} of losses, weights and second moments."""
    (rows, state, _), (rows0, state0, _) = ours, theirs
    found = {}
    for name in ("loss", "val_loss", "grad_norm"):
        a, b = (torch.tensor([row[name] for row in r if name in row], dtype=torch.float64) for r in (rows, rows0))
        assert len(a) == len(b) > 0
        found[name] = float((a - b).norm() / b.norm())
    assert state.keys() == state0.keys()
    for name, value in state0.items():
        gap = (state[name].double() - value.double()) * counted(name, value)
        found[name] = float(gap.norm() / value.double().norm()) if gap.any() else 0.0
    return found


def counted(name, value):
    """Return 1 where a tensor's elements are compared, 0 where they are the rounding of zero.

    A key's bias adds the same to all of a query's scores, which softmax takes away again: its true gradient is 0. In
    float32 what is computed is rounding (1e-13 beside 1e-4), which Adam divides by its own size, so that the bias does
    a walk of its own on every engine. In float64 the epsilon is above it, and all elements are compared.
    """
    mask = torch.ones_like(value, dtype=torch.float64)
    if "attn.qkv.bias" in name and value.ndim == 1 and value.dtype != torch.float64:
        mask.chunk(3)[1].zero_()
    return mask
