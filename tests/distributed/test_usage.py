"""A parameter that takes no part in an update is left alone: weights, averages, counts. One process is the reference."""

import functools
import gc
import json

import pytest
import torch
import torch.distributed as dist
from engine_runs import trajectory as train
from engine_runs import whole
from runs import digits
from torch import nn
from zero import _fresh_counters, needs_deepspeed

from largebatch import optim
from largebatch.distributed import BackendConfig, Ranks, create_backend
from largebatch.distributed.state import group_state, load_group_state, write_tensors
from largebatch.errors import UserError

UPDATES, PASSES, SAMPLES = 6, 4, 4  # micro-batches of an update over all ranks, samples of a micro-batch
BATCH, REFERENCE = PASSES * SAMPLES, 4
# By branch, whether a pass of an update takes it. Two ranks run passes 0 and 1, and 2 and 3.
BRANCHES = {
    "always": lambda update, step: True,
    "never": lambda update, step: False,
    "every_second_update": lambda update, step: update % 2 == 0,
    "from_the_fourth_on": lambda update, step: update >= 3,
    "in_the_first_update_alone": lambda update, step: update == 0,
    "first_pass": lambda update, step: step == 0 and update in (0, 1, 4),
    "second_pass": lambda update, step: step == 1 and update in (0, 3),
    "last_pass": lambda update, step: step == 3 and update in (1, 3, 4),
    "rank_0": lambda update, step: step < 2 and update != 2,
    "rank_1": lambda update, step: step >= 2 and update != 2,
}
ENGINES = {"ddp": {"name": "ddp"}, "fsdp": {"name": "fsdp"}, "fsdp, units": {"name": "fsdp", "shard": ["Linear"]}}
ENGINES |= {f"zero-{stage}": {"name": "deepspeed", "zero_stage": stage} for stage in range(4)}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
SOURCES = ["batch", "micro_batch", "sample"]
OPTIMIZERS = {
    "adamw": lambda groups: optim.AdamW(groups, 0.05, (0.8, 0.9), reference_batch_size=REFERENCE),
    "adam, running mean": lambda groups: optim.Adam(
        groups, 0.05, (0.8, 0.9), bias_correction="running_mean", reference_batch_size=REFERENCE
    ),
    "rmsprop": lambda groups: optim.RMSProp(
        groups, 0.02, 0.9, momentum=0.5, bias_correction="running_mean", reference_batch_size=REFERENCE
    ),
    "adagrad": lambda groups: optim.Adagrad(groups, 0.05, reference_batch_size=REFERENCE),
    "quench": lambda groups: optim.Quench(groups, 0.5, K=20),
    "sgd": lambda groups: optim.SGD(groups, 0.05, 0.9),
    "lamb": lambda groups: optim.LAMB(groups, 0.05, (0.8, 0.9), reference_batch_size=REFERENCE),
    "lars": lambda groups: optim.LARS(groups, 0.05, 0.9),
}
WITH_SQUARES = ("adam, running mean", "rmsprop", "adagrad", "lamb")


class Branches(nn.Module):
    """Adds up the branches that a pass takes."""

    def __init__(self):
        super().__init__()
        for name in BRANCHES:
            setattr(self, name, nn.Linear(3, 2))

    def forward(self, x, taken):
        return sum(getattr(self, name)(x) for name in taken)


def build(dtype):
    torch.manual_seed(0)
    return Branches().to(dtype)


def loss_of(model, update, step, dtype, period):
    """A pass's share of the mean loss over the batch; passes take the branches of the first so many."""
    generator = torch.Generator().manual_seed(100 * update + step)
    x = torch.randn(SAMPLES, 3, generator=generator, dtype=torch.float64).to(dtype)
    taken = [name for name, takes in BRANCHES.items() if takes(update, step % period)]
    return (model(x, taken) - 1).square().sum() / BATCH


class Training:
    """A loop of updates without a trainer."""

    def __init__(self, rank, world_size, keys, source, optimizer, precision, period):
        if keys["name"] == "deepspeed":
            _fresh_counters()
        self.rank, self.world_size, self.source, self.period = rank, world_size, source, period
        self.backend = create_backend(BackendConfig(device="cpu", **keys), precision, Ranks(rank, rank, world_size))
        self.model = build(self.backend.dtype)
        if source != "batch":
            self.backend.track(self.model, source)
        self.called, self.optimizer = self.backend.prepare(
            self.model, lambda m: OPTIMIZERS[optimizer](optim.param_groups(m, 0.1, squares=source != "batch"))
        )
        if source != "batch":
            self.backend.use_squares(self.optimizer)
        self.norms, self.sums = [], []

    def train(self, first, last):
        share, units = PASSES // self.world_size, PASSES if self.source == "micro_batch" else BATCH
        for update in range(first, last):
            self.backend.begin_update(BATCH, units, update)
            for step in range(self.rank * share, (self.rank + 1) * share):
                with self.backend.accumulate(sync=step == (self.rank + 1) * share - 1):
                    self.backend.backward(loss_of(self.called, update, step, self.backend.dtype, self.period))
            if hasattr(self.optimizer, "set_batch"):
                self.optimizer.set_batch(BATCH, units, self.world_size)
            if self.source != "batch":
                sums = self.backend.noise_sums(self.model).cpu()
                self.sums.append(sums / torch.tensor([[1.0], [self.world_size]]))  # squares are means over ranks
            self.norms.append(self.backend.step(self.optimizer, max_grad_norm=2.0))

    def state(self):
        state = self.backend.state(self.model, self.optimizer)
        return {name: whole(value).detach().clone() for name, value in state.items()}

    def close(self):
        self.backend.close()
        self.__dict__.clear()
        gc.collect()


def trajectory(rank, world_size, keys, source="batch", optimizer="adamw", precision="fp64", period=PASSES, saves=None):
    """Return weights and optimizer state by name, the gradients' norms, and the noise's sums, after the updates.

    Args:
        saves: (folder, whether as an earlier release wrote it): half way a checkpoint is written, which a new engine reads.
    """
    arguments = rank, world_size, keys, source, optimizer, precision, period
    run, half = Training(*arguments), UPDATES // 2
    run.train(0, half)
    if saves is not None:
        folder, is_old = saves
        groups, state = group_state(run.optimizer), run.backend.state(run.model, run.optimizer)
        if is_old:  # one count for all of a group, in the group
            state = {name: value for name, value in state.items() if not name.endswith("_count")}
            groups = [{**group, "first_moment_count": 0.8**half, "second_moment_count": 0.9**half} for group in groups]
        write_tensors(folder, state, dist.group.WORLD if world_size > 1 else None)
        run.close()
        run = Training(*arguments)
        run.backend.load_state(folder, run.model, run.optimizer)
        load_group_state(run.optimizer, groups)
    run.train(half, UPDATES)
    found = run.state(), run.norms, run.sums
    run.close()
    return found


@functools.cache
def one_process(*case):
    return trajectory(0, 1, ENGINES["ddp"], *case)


def compare(results, expected, tolerance):
    """Hold the ranks' states against one process's; what DeepSpeed cut up lies on one rank or another."""
    ours = {name: value for found, *_ in results for name, value in found.items()}
    assert sorted(ours) == sorted(expected)
    for name, value in expected.items():
        mine, value = ours[name].double(), value.double()
        torch.testing.assert_close(mine, value, rtol=tolerance, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")


def follow(rank_pool, engine, world_size, source, optimizer="adamw", keys=None, period=PASSES):
    """See that an engine ends where one process does."""
    if world_size > 1 and engine in ("zero-1", "zero-2", "zero-3", "fsdp, units"):  # whose ranks run the same modules
        period = min(period, 2)
    precision = "fp32" if "zero" in engine else "fp64"
    case = source, optimizer, precision, period
    results = rank_pool(world_size, trajectory, keys or ENGINES[engine], *case)
    state, norms, sums = one_process(*case)
    compare(results, state, 1e-11 if precision == "fp64" else 1e-5)
    for _, ours, ours_sums in results:
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(norms), rtol=1e-5, atol=0)
        if source != "batch":
            torch.testing.assert_close(torch.stack(ours_sums), torch.stack(sums), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("period", [1, 2, PASSES])
def test_one_process_is_torchs_own(period):
    """Against torch.optim.AdamW, on gradients that a loop adds up by hand."""
    model = build(torch.float64)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    plain = torch.optim.AdamW(groups, 0.05, (0.8, 0.9))
    for update in range(UPDATES):
        for step in range(PASSES):
            loss_of(model, update, step, torch.float64, period).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        plain.step()
        plain.zero_grad()
    state, _, _ = one_process("batch", "adamw", "fp64", period)
    for name, p in model.named_parameters():
        torch.testing.assert_close(state[f"model.{name}"], p.detach(), rtol=1e-12, atol=1e-12)
    assert not any(name.startswith("optimizer.never") for name in state)


slow = pytest.mark.slow
QUICK = {("ddp", 2, source) for source in SOURCES} | {("fsdp", 2, "batch"), ("fsdp", 2, "micro_batch")}
QUICK |= {("fsdp, units", 2, "micro_batch"), ("ddp", 1, "micro_batch")}
QUICK |= {("zero-0", 2, "batch"), ("zero-1", 2, "micro_batch"), ("zero-3", 2, "batch"), ("zero-3", 2, "micro_batch")}
MATRIX = [
    pytest.param(*case, marks=[*([needs_deepspeed] if "zero" in engine else []), *([] if case in QUICK else [slow])])
    for engine in ENGINES
    for world_size in (1, 2)
    for source in SOURCES
    for case in [(engine, world_size, source)]
]


@pytest.mark.parametrize(("engine", "world_size", "source"), MATRIX)
def test_what_no_pass_uses_is_left_alone(engine, world_size, source, rank_pool):
    follow(rank_pool, engine, world_size, source)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name != "adamw"])
@pytest.mark.parametrize(
    "engine", ["ddp", "fsdp", *(pytest.param(f"zero-{stage}", marks=needs_deepspeed) for stage in (0, 2, 3))]
)
def test_every_optimizer_leaves_it_alone(engine, optimizer, rank_pool):
    if engine in ("zero-2", "zero-3") and optimizer in ("lamb", "lars"):
        pytest.skip("needs whole layers")
    follow(rank_pool, engine, 2, "micro_batch" if optimizer in WITH_SQUARES else "batch", optimizer)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("source", ["batch", "micro_batch"])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_optimizer_that_deepspeed_offloads_leaves_it_alone(stage, world_size, source, rank_pool, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": OFFLOAD}))
    keys = {**ENGINES[f"zero-{stage}"], "ds_config": str(path)}
    follow(rank_pool, f"zero-{stage}", world_size, source, keys=keys, period=1)
    for said in rank_pool(world_size, refused, keys):
        assert "did not use parameter 'first_pass.weight', which one before it did" in said


def refused(rank, world_size, keys):
    """Return what is said where a pass before an update's last takes a branch alone."""
    run = Training(rank, world_size, keys, "batch", "adamw", "fp32", 2)
    try:
        run.train(0, UPDATES)
    except UserError as error:
        return str(error)
    finally:
        run.close()


def apart(rank, world_size, stage_or_shard):
    """Return what is said where rank 1 takes a branch of the same size as rank 0's."""
    keys = {"shard": stage_or_shard, "name": "fsdp"}
    if isinstance(stage_or_shard, int):
        _fresh_counters()
        keys = ENGINES[f"zero-{stage_or_shard}"]
    backend = create_backend(BackendConfig(device="cpu", **keys), "fp32", Ranks(rank, rank, world_size))
    called, _ = backend.prepare(build(backend.dtype), lambda m: OPTIMIZERS["sgd"](optim.param_groups(m)))
    try:
        with backend.accumulate(sync=True):
            backend.backward(called(torch.ones(2, 3, dtype=backend.dtype), ["always", f"rank_{rank}"]).sum())
        return "nothing"
    except UserError as error:
        return str(error)
    finally:
        backend.close()


@pytest.mark.parametrize(
    "where", [["Linear"], pytest.param(1, marks=[needs_deepspeed, slow]), pytest.param(3, marks=needs_deepspeed)]
)
def test_ranks_that_take_other_branches_are_refused_before_anything_is_mixed(where, rank_pool):
    """Of the same size, so that the collectives would go through."""
    for said in rank_pool(2, apart, where):
        assert "in one pass rank 0 ran module 'rank_0' where rank 1 ran 'rank_1'" in said


def waiting(rank, world_size):
    """Return the state where the variance is measured in every third update."""
    return trajectory(rank, world_size, {"name": "ddp", "squares_every": 3}, "micro_batch")


def test_a_variance_that_waits_is_kept_through_updates_without_the_parameter(rank_pool):
    state, _, _ = waiting(0, 1)
    compare(rank_pool(2, waiting), state, 1e-11)


def idle(rank, world_size, keys):
    """Return which parameters moved. Rank 1 has no sample; its stand-in takes a branch that no sample takes."""
    backend = create_backend(BackendConfig(device="cpu", **keys), "fp64", Ranks(rank, rank, world_size))
    model = build(torch.float64)
    called, stepped = backend.prepare(model, lambda m: OPTIMIZERS["adamw"](optim.param_groups(m, 0.1, squares=False)))
    start = {name: whole(p).detach().clone() for name, p in model.named_parameters()}
    for _ in range(3):
        with backend.accumulate(sync=True, idle=rank == 1):
            loss = called(torch.ones(2, 3).double(), ["always", "never"] if rank == 1 else ["always"]).sum()
            backend.backward(loss * (0.0 if rank == 1 else 1.0))
        backend.step(stepped)
    moved = {name: bool((whole(p) != start[name]).any()) for name, p in model.named_parameters()}
    backend.close()
    del called, model
    gc.collect()
    return moved


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_stand_in_for_samples_uses_nothing(engine, rank_pool):
    for moved in rank_pool(2, idle, ENGINES[engine]):
        assert [name for name, has in moved.items() if has] == ["always.weight", "always.bias"]


@pytest.mark.parametrize(
    ("engine", "world_size"),
    [
        ("ddp", 2),
        *(pytest.param(engine, n, marks=slow) for engine, n in (("ddp", 1), ("fsdp", 1), ("fsdp", 2))),
        *(pytest.param(f"zero-{stage}", 2, marks=[needs_deepspeed, slow]) for stage in (0, 1, 2)),
        pytest.param("zero-3", 2, marks=needs_deepspeed),
    ],
)
def test_counts_go_through_checkpoints_new_and_old(engine, world_size, rank_pool, tmp_path):
    """One process reads an old one as it is to be read (`test_step_counts.py`)."""
    case = "batch", "adamw", "fp32" if "zero" in engine else "fp64", 2
    tolerance = 1e-5 if "zero" in engine else 1e-11
    for is_old in (False, True):
        folders = [tmp_path / f"{is_old}-{number}" for number in range(2)]
        for folder in folders:
            folder.mkdir()
        expected, _, _ = trajectory(0, 1, ENGINES["ddp"], *case, (folders[0], True)) if is_old else one_process(*case)
        compare(rank_pool(world_size, trajectory, ENGINES[engine], *case, (folders[1], is_old)), expected, tolerance)


class WithSpareHead(nn.Module):
    """A classifier of 8 by 8 images, beside a head that nothing uses."""

    def __init__(self, num_outputs):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, num_outputs))
        self.spare = nn.Linear(16, 3)

    def forward(self, x):
        return self.layers(x)


def with_spare_head(task):
    return WithSpareHead(task.num_outputs)


@pytest.mark.parametrize(
    "engine",
    [
        "ddp",
        pytest.param("fsdp", marks=slow),
        *(pytest.param(f"zero-{stage}", marks=[needs_deepspeed, slow]) for stage in range(4)),
    ],
)
def test_a_head_that_is_not_used_stays_as_it_began(engine, rank_pool):
    """Under the trainer, with weight decay, noise and second moments from micro-batches."""
    flags = {"model.name": "test_usage:with_spare_head", "optimizer.name": "adamw", "optimizer.lr": 0.01}
    flags |= {"optimizer.weight_decay": 0.1, "noise.measure": True, "schedule.epochs": 1, "batch.size": 128}
    ours_flags = {f"backend.{key}": value for key, value in ENGINES[engine].items()}
    ours_flags |= {"precision": "fp32"} if engine.startswith("zero") else {}
    results = rank_pool(2, train, digits(**ours_flags, **flags))
    ours = {name: value for _, part, _ in results for name, value in part.items()}
    start = results[0][2]
    assert all(torch.equal(ours[name], start[name]) for name in ("model.spare.weight", "model.spare.bias"))
    assert not any(name.startswith("optimizer.spare") for name in ours)
    assert not torch.equal(ours["model.layers.1.weight"], start["model.layers.1.weight"])
