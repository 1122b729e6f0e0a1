"""FSDP2's own: what travels, which modules are gathered as one, and what is refused. Its trajectories: tests/distributed/test_engines.py."""

import math

import pytest
import torch
from engine_runs import config, distances, gathered, trajectory
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from largebatch import track
from largebatch.config.file import parse_config
from largebatch.distributed import NonFiniteError, Ranks, create_backend
from largebatch.distributed.backend import BackendConfig
from largebatch.distributed.fsdp import blocks, chosen
from largebatch.errors import UserError
from largebatch.models.gpt import GPT
from largebatch.optim import AdamW, param_groups


class Traffic(TorchDispatchMode):
    """Counts the bytes that a rank hands to gathering and to reducing collectives."""

    def __init__(self):
        super().__init__()
        self.gathered = self.reduced = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if name.startswith("c10d._allgather_base_"):
            self.gathered += args[1].numel() * args[1].itemsize
        elif name.startswith("c10d._reduce_scatter_base_"):
            self.reduced += args[1].numel() * args[1].itemsize
        return func(*args, **(kwargs or {}))


def prepared(rank, world_size, model, precision="fp32", **keys):
    backend = create_backend(BackendConfig(name="fsdp", device="cpu", **keys), precision, Ranks(rank, rank, world_size))
    called, optimizer = backend.prepare(
        model, lambda bare: AdamW(param_groups(bare), reference_batch_size=2) if optimizes(bare) else None
    )
    return backend, called, optimizer


def optimizes(model):
    return any(p.requires_grad for p in model.parameters())


def _traffic(rank, world_size, precision, tracked):
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(4)])
    backend, called, _ = prepared(rank, world_size, track(model) if tracked else model, precision)
    for _ in range(2):  # not counting what the first pass sets up
        with Traffic() as traffic, backend.accumulate(sync=True):
            with backend.autocast():
                loss = called(torch.randn(8, 64)).square().sum() / 16
            backend.backward(loss)
    held = sum(p.to_local().nbytes for p in model.parameters())
    backend.close()
    return traffic.gathered, traffic.reduced, held


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_shadows_are_not_gathered_and_weights_travel_in_half(precision, rank_pool):
    num_bytes = 4 * 4 * 64 * 64
    plain, _ = rank_pool(2, _traffic, precision, False)
    squares, _ = rank_pool(2, _traffic, precision, True)
    share = 0.5 if precision == "bf16" else 1.0
    # Each rank hands out its half of the weights, before the forward and before the backward pass.
    assert plain[0] == share * num_bytes
    assert squares[0] - plain[0] == 2 * 4 * 4, "one element of each of 4 shadows, twice"
    # What is reduced is whole, and in float32: gradients, and squares beside them.
    assert plain[1] == num_bytes and squares[1] == 2 * num_bytes
    assert plain[2] == num_bytes / 2 and squares[2] == num_bytes


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def forward(self, inputs):
        return self.inner(inputs)


def test_what_is_gathered_as_one():
    gpt = GPT(10, 8, n_layer=3, n_head=2, d_model=4)
    assert blocks(gpt) == list(gpt.blocks)
    assert chosen(gpt, ["Block"]) == chosen(gpt, ["blocks.[0-9]"]) == list(gpt.blocks)[::-1]
    nested = nn.Sequential(nn.Sequential(Block(), nn.ReLU()), nn.ModuleList([nn.Linear(4, 4)]))
    assert blocks(nested) == [nested[0][0], nested[1][0]], "a block is not looked into"
    assert chosen(nested, ["Block", "0.0.inner"]) == [nested[0][0].inner, nested[0][0]], "inner ones first"
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    tied[2].weight = tied[0].weight
    assert blocks(tied) == [tied[1]], "a parameter that two blocks share belongs to what is around them"
    with pytest.raises(UserError, match=r"backend.shard: module '0' shares parameter 'weight' with another"):
        chosen(tied, ["0"])
    with pytest.raises(UserError, match=r"no module or class 'Blok' \(did you mean 'Block'\?\)"):
        chosen(gpt, ["Blok"])


REFUSED = {
    "squares in half": ({"squares_dtype": "bfloat16"}, r"backend.squares_dtype: got bfloat16, which engine 'fsdp' does not take"),
    "squares every k": ({"squares_every": 4}, r"backend.squares_every: got 4, which engine 'fsdp' does not take"),
    "offload without a GPU": ({"offload": True}, r"backend.offload: it spares a GPU's memory, but the run is on the cpu"),
    "shards of replicas": ({"name": "ddp", "shard": ["Block"]}, r"backend.shard: got \['Block'\], which engine 'ddp' does not take"),
    "offload of replicas": ({"offload": True, "name": "auto"}, r"backend.offload: got True, which engine 'ddp' does not take"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_keys_that_do_not_go_together(name):
    keys, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        create_backend(BackendConfig(**{"name": "fsdp", "device": "cpu", **keys}), "fp32", Ranks())


class Scalar(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))


def test_models_that_cannot_be_cut():
    with pytest.raises(UserError, match=r"backend.name: fsdp cuts parameters .*, 'gain' has no dimension"):
        prepared(0, 1, Scalar())
    turned = nn.Linear(4, 3)
    turned.weight = nn.Parameter(torch.randn(4, 3).T)
    with pytest.raises(UserError, match=r"'weight' is not contiguous in memory"):
        prepared(0, 1, turned)
    with pytest.raises(UserError, match=r"backend.compile: with tracked squares"):
        prepared(0, 1, track(nn.Linear(3, 3)), compile=True)
    torch.distributed.destroy_process_group()


class Hidden(torch.autograd.Function):
    """An operation that no one outside sees the inside of."""

    @staticmethod
    def forward(ctx, inputs, gain):
        ctx.save_for_backward(inputs, gain)
        return inputs * gain

    @staticmethod
    def backward(ctx, grad):
        inputs, gain = ctx.saved_tensors
        return grad * gain, (grad * inputs).sum(0)


class Secret(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 5)
        self.gain = nn.Parameter(torch.ones(5))

    def forward(self, inputs):
        return Hidden.apply(self.linear(inputs), self.gain)


def _missing_statistic(rank, world_size):
    backend, called, _ = prepared(rank, world_size, track(Secret()))
    try:
        called(torch.ones(3, 6))
    except UserError as error:
        return str(error)
    finally:
        backend.close()


def test_a_hidden_operation_is_refused_by_every_rank(rank_pool):
    for message in rank_pool(2, _missing_statistic):
        assert message is not None and "HiddenBackward, a function that PyTorch does not show" in message


def _nan_on_the_last_rank(rank, world_size):
    torch.manual_seed(0)
    model = track(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 1)))
    backend, called, optimizer = prepared(rank, world_size, model)
    before = [p.to_local().clone() for p in model.parameters()]
    with backend.accumulate(sync=True):
        backend.backward(called(torch.ones(3, 6)).sum() / 6 * (math.nan if rank == world_size - 1 else 1.0))
    optimizer.set_batch(6, world_size=world_size)
    try:
        backend.step(optimizer)
        return None
    except NonFiniteError as error:
        same = all(torch.equal(a, p.to_local()) for a, p in zip(before, model.parameters(), strict=True))
        return error.ranks, same, len(optimizer.state)
    finally:
        backend.close()


def test_a_nan_of_one_rank_stops_all_before_the_update(rank_pool):
    assert rank_pool(3, _nan_on_the_last_rank) == [([2], True, 0)] * 3


def _trajectory_in_fp16(rank, world_size, run):
    """The same with a loss scale at which the first update overflows."""
    scaler = torch.amp.GradScaler
    torch.amp.GradScaler = lambda device, enabled=True: scaler(
        device, init_scale=2.0**60, backoff_factor=2.0**-50, enabled=enabled
    )
    try:
        return trajectory(rank, world_size, run)
    finally:
        torch.amp.GradScaler = scaler


def test_an_overflow_is_skipped_by_every_rank_and_leaves_no_trace(rank_pool):
    flags = {"schedule.epochs": 0.5}
    ours = gathered(rank_pool(2, _trajectory_in_fp16, config("fsdp", "fp16", "", flags)))
    theirs = _trajectory_in_fp16(0, 1, config("ddp", "fp16", "", flags))
    for rows in (ours[0], theirs[0]):
        norms = [row["grad_norm"] for row in rows if "grad_norm" in row]
        assert not math.isfinite(norms[0]) and all(map(math.isfinite, norms[1:])) and len(norms) >= 4
    for part in (ours, theirs):
        part[0][:] = [row for row in part[0] if math.isfinite(row.get("grad_norm", 0.0))]
    # fp16 keeps 11 bits, of each product's factors and of the gradients, whose averages lose more where they cancel.
    found = distances(ours, theirs)
    assert all(value < (2**-5 if "optimizer" in name else 2**-8) for name, value in found.items()), found


@pytest.mark.slow
def test_blocks_are_compiled(rank_pool):
    """Without tracked squares."""
    flags = {"backend.compile": True, "schedule.epochs": 0.3}
    ours = gathered(rank_pool(2, trajectory, config("fsdp", "fp64", "sgd", flags)))
    theirs = trajectory(0, 1, config("ddp", "fp64", "sgd", {"schedule.epochs": 0.3}))
    assert max(distances(ours, theirs).values()) < 1e-10


def test_the_config_reads_its_keys():
    values = {"backend": {"name": "fsdp", "shard": ["Block", "head.*"]}}
    run = config("fsdp", "fp32", "").model_dump(mode="json") | values
    assert parse_config(run).backend.shard == ["Block", "head.*"]
