"""ZeRO-3: what is gathered, checkpointed and hidden."""

import functools

import pytest
import torch
import torch.nn.functional as F
from engine_runs import whole
from jobs import no_job_left  # noqa: F401
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint
from zero import _fresh_counters, _Updates, needs_deepspeed

from largebatch import track
from largebatch.distributed import BackendConfig, Ranks, create_backend
from largebatch.distributed.ds_config import load_ds_config
from largebatch.errors import UserError
from largebatch.optim import AdamW, param_groups


class _Watched(nn.Module):
    """Layers that see how many parameters are whole while each runs, and whose storage they have read.

    The attention uses the weight of a child that never runs; the last layer is the first one's, transposed.
    """

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.attention = nn.MultiheadAttention(8, 2, bias=False, batch_first=True)
        self.live, self.weights = [], []
        for layer in (*self.layers, self.attention):
            layer.watched = functools.partial(_look, self)

    def forward(self, x):
        x = self.first(x).tanh()
        for layer in self.layers:
            x = x + layer(x).tanh()
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return F.linear(x, self.first.weight.t())


def _look(model, layer):
    model.live.append(sum(p.ds_status.name == "AVAILABLE" for p in model.parameters()))
    if isinstance(layer, nn.Linear):  # the attention's weight is cut into three views, which the graph holds
        model.weights += [StorageWeakRef(p.untyped_storage()) for p in layer.parameters()]


def _live_parameters(rank, world_size, per, keys):
    """Return how many parameters are whole at each layer, how many outlive the forward pass, and the last state."""
    if keys["name"] == "deepspeed":
        _fresh_counters()
    torch.manual_seed(0)
    model = track(_Watched(), per=per)
    backend = create_backend(BackendConfig(device="cpu", **keys), "fp32", Ranks(rank, rank, world_size))
    called, optimizer = backend.prepare(model, lambda m: AdamW(param_groups(m), lr=0.01, reference_batch_size=2))
    if keys["name"] == "deepspeed":
        for layer in (*model.layers, model.attention):
            # After DeepSpeed's own hooks, before forward.
            layer.register_forward_pre_hook(lambda layer, _: layer.watched(layer))
    inputs = torch.randn(12, 3, 6, generator=torch.Generator().manual_seed(1))[rank::world_size]
    found = []
    for _ in range(3):
        model.live, model.weights = [], []
        with backend.accumulate(sync=True):
            output = called(inputs)
            kept = sum(not weight.expired() for weight in model.weights)
            backend.backward(output.square().sum() / 12)
        optimizer.set_batch(12, 12, world_size)
        found.append((model.live, kept))
        backend.check_statistics(model)
        backend.step(optimizer, 1.0)
    state = {name: whole(value).clone() for name, value in backend.state(model, optimizer).items()}
    backend.close()
    return found, state


@needs_deepspeed
@pytest.mark.parametrize("per", ["sample", "micro_batch"])
def test_zero_3_gathers_what_a_layer_uses(per, rank_pool):
    """Weights and shadows of the layer that runs, of 20 in all; and none of them lives on in the graph."""
    zero_options = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 1,
                    "stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0}  # fmt: skip
    keys = {"name": "deepspeed", "ds_config": {"zero_optimization": zero_options}}
    results = rank_pool(2, _live_parameters, per, keys)
    expected = rank_pool(2, _live_parameters, per, {"name": "ddp"})
    print(per, results[0][0])
    state = {name: value for _, part in results for name, value in part.items()}
    assert state.keys() == expected[0][1].keys()
    for name, value in expected[0][1].items():
        torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-7)
    for live, kept in results[0][0]:
        # Weight, bias, their shadows; once it is known, the first layer's weight too, which the model itself uses.
        assert all(count <= 4 + 2 for count in live)
        assert len(live) == 4 and kept == 0


class _Checkpointed(nn.Module):
    """Blocks whose activations are computed again in the backward pass."""

    def __init__(self, use_reentrant):
        super().__init__()
        self.first, self.last, self.use_reentrant = nn.Linear(7, 5), nn.Linear(5, 3), use_reentrant
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.LayerNorm(5)) for _ in range(3))

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=self.use_reentrant)
        return self.last(x)


def _checkpointed_updates(rank, world_size, keys, per, use_reentrant):
    torch.manual_seed(0)
    updates = _Updates(rank, world_size, keys, model=track(_Checkpointed(use_reentrant), per))
    norms = [updates.update() for _ in range(3)]
    state = updates.full_state()
    updates.backend.close()
    return norms, state


def _checkpointed_by(stage):
    return {
        "name": "deepspeed",
        "ds_config": {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}},
    }


CHECKPOINTED = [(stage, per) for per in ("sample", "micro_batch") for stage in (1, 2, 3)]


@needs_deepspeed
@pytest.mark.parametrize(
    ("stage", "per"),
    [pytest.param(*case, marks=[] if case == (3, "sample") else [pytest.mark.slow]) for case in CHECKPOINTED],
)  # fmt: skip
def test_checkpointed_blocks(stage, per, rank_pool):
    keys = _checkpointed_by(stage)
    (norms, state), _ = rank_pool(2, _checkpointed_updates, keys, per, False)
    (norms0, state0), _ = rank_pool(2, _checkpointed_updates, {"name": "ddp"}, per, False)
    assert norms == pytest.approx(norms0, rel=1e-5)
    for name, value in state0.items():
        torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-7)


def _refused_checkpoint(rank, world_size):
    updates = _Updates(rank, world_size, _checkpointed_by(3), model=track(_Checkpointed(True), "micro_batch"))
    with pytest.raises(UserError, match=r"'blocks\.2'; call torch.utils.checkpoint with use_reentrant=False"):
        updates.update()
    updates.backend.close()


@needs_deepspeed
def test_squares_of_micro_batches_do_not_go_with_reentrant_checkpoints_under_zero_3(rank_pool):
    rank_pool(2, _refused_checkpoint)


def _hidden_linear(rank, world_size, stage):
    from largebatch.distributed.deepspeed import DeepSpeed

    _fresh_counters()
    options = load_ds_config(None, stage)
    options["zero_optimization"]["memory_efficient_linear"] = True
    linear = nn.functional.linear
    backend = DeepSpeed(Ranks(rank, rank, world_size), torch.device("cpu"), "fp32", options)
    model = track(nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)))
    called, _ = backend.prepare(model, lambda m: AdamW(param_groups(m), reference_batch_size=2))
    try:
        with backend.accumulate(sync=True):
            backend.backward(called(torch.randn(6, 4)).square()[:, 0].sum())
        backend.check_statistics(model)
        return None
    except UserError as error:
        return str(error)
    finally:
        nn.functional.linear = torch.nn.functional.linear = linear
        backend.close()


@needs_deepspeed
def test_a_hidden_operation_is_named(rank_pool):
    """ZeRO-3's own linear function is not seen by the tracking."""
    for message in rank_pool(2, _hidden_linear, 3):
        assert message is not None and "'1.weight' meets the batch in layer_norm" in message
        assert "a function that PyTorch does not show" in message
    for message in rank_pool(2, _hidden_linear, 2):
        assert message is None
