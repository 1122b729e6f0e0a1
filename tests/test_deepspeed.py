"""DeepSpeed, ZeRO 0 to 3: the trajectory of one process, its state in whole tensors, and what is refused."""

import functools
import json
import math
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from jobs import Job, assert_same_run, checkpoints, no_job_left, small_gpt, wait_until, write_config, write_torchrun  # noqa: F401
from test_agreement import LENGTH, MODELS, check_same_buffers, train_and_again
from test_engines import CASES, OTHERS, config, distances, gathered, trajectory, whole
from test_trainer import digits
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from largebatch import track
from largebatch.distributed import BackendConfig, NonFiniteError, Ranks, create_backend
from largebatch.distributed.ds_config import load_ds_config
from largebatch.distributed.state import group_state, load_group_state, write_tensors
from largebatch.errors import UserError
from largebatch.optim import LAMB, AdamW, param_groups
from largebatch.reporting.loggers import read_metrics
from largebatch.training.run import train

needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")

# Only the order of sums differs; float32 over some twenty updates.
TOLERANCE = 1e-5


def _fresh_counters():
    """DeepSpeed numbers the modules of a process; ranks of the pool have had different numbers of them."""
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init

    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][:] = [0]
    Init.param_id = 0


def _trajectory(rank, world_size, run):
    _fresh_counters()
    return trajectory(rank, world_size, run)


def follow(rank_pool, world_size, case, stage, precision="fp32", reference="fp32", **keys):
    """Return the distances of a run under DeepSpeed from the same run on one process, or from DDP's on as many ranks."""
    flags = {"backend.name": "deepspeed", "backend.zero_stage": stage} | {f"backend.{k}": v for k, v in keys.items()}
    ours = gathered(rank_pool(world_size, _trajectory, config("ddp", precision, case, flags)))
    if reference == "ddp":
        theirs = gathered(rank_pool(world_size, trajectory, config("ddp", precision, case)))
    else:
        theirs = trajectory(0, 1, config("ddp", reference, case))
    found = distances(ours, theirs)
    worst = max(found, key=found.get)
    print(f"\nZeRO-{stage}, {precision}, {world_size} ranks, {case}: {found[worst]:.1e} at {worst}")
    return found


def _noise(rank, world_size, run, folder):
    _fresh_counters()
    train(run, folder, ranks=Ranks(rank, rank, world_size))
    return read_metrics(folder / "metrics.jsonl")[0] if rank == 0 else None


@needs_deepspeed
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_noise_is_measured_from_partitions(stage, rank_pool, tmp_path):
    flags = {"noise.measure": True, "schedule.epochs": 0.5, "batch.micro_size": 20}
    run = config("ddp", "fp32", "accumulation", flags)
    expected = train(run, tmp_path / "one", ranks=Ranks()) and read_metrics(tmp_path / "one" / "metrics.jsonl")[0]
    flags |= {"backend.name": "deepspeed", "backend.zero_stage": stage}
    ours = rank_pool(2, _noise, config("ddp", "fp32", "accumulation", flags), tmp_path / "two")[0]
    for name in ("gradient_variance", "gradient_signal", "noise_scale"):
        theirs, mine = (torch.tensor([row[name] for row in rows]) for rows in (expected, ours))
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=0, msg=lambda text, n=name: f"{n}: {text}")


def _train_and_again(rank, world_size, run, folder):
    return train_and_again(rank, world_size, run, folder, _fresh_counters)


@needs_deepspeed
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("stage", [0, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2)), 3])
def test_buffers_are_the_same_on_every_rank(stage, model, rank_pool, tmp_path):
    """As on every engine (tests/test_agreement.py), in float32."""
    engine = {"backend.name": "deepspeed", "backend.zero_stage": stage, "precision": "fp32"}
    run = digits(**{**LENGTH, **MODELS[model], **engine})
    check_same_buffers(run, rank_pool(2, _train_and_again, run, tmp_path), tmp_path, 1e-6)


@needs_deepspeed
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_stage_follows_one_process(stage, rank_pool):
    assert max(follow(rank_pool, 2, "all of it", stage).values()) < TOLERANCE


@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 3])
def test_squares_of_micro_batches_follow_one_process(stage, rank_pool):
    assert max(follow(rank_pool, 2, "micro-batches", stage).values()) < TOLERANCE


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("case", [*CASES, ""])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_on_any_number_of_ranks(stage, world_size, case, rank_pool):
    assert max(follow(rank_pool, world_size, case, stage).values()) < TOLERANCE


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_other_models_and_optimizers(stage, case, rank_pool):
    assert max(follow(rank_pool, 4 if "ranks" in case else 2, case, stage).values()) < TOLERANCE


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_autocast_does_what_it_does_under_ddp(stage, precision, rank_pool):
    """The same products in the same precision; a rounding of a sum may tip a 16-bit number to its neighbour."""
    assert (
        max(follow(rank_pool, 2, "all of it", stage, precision, "ddp").values())
        < {"bf16": 2**-8, "fp16": 2**-11}[precision]
    )


OPTIONS = {
    "small buckets": (2, {"reduce_bucket_size": 500, "allgather_bucket_size": 500}),
    "round robin": (1, {"round_robin_gradients": True}),
    "overlap": (2, {"round_robin_gradients": True, "overlap_comm": True, "contiguous_gradients": False}),
    "sub-groups, nothing kept whole": (3, {"sub_group_size": 300, "stage3_param_persistence_threshold": 0}),
    "offload 1": (1, {"offload_optimizer": {"device": "cpu"}}),
    "offload 2": (2, {"offload_optimizer": {"device": "cpu"}}),
    "offload 3": (3, {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}, "sub_group_size": 300}),
}  # fmt: skip


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
def test_deepspeeds_own_options(option, rank_pool, tmp_path):
    stage, zero = OPTIONS[option]
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": zero, "train_batch_size": "auto"}))
    assert max(follow(rank_pool, 2, "all of it", stage, ds_config=str(path)).values()) < TOLERANCE


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


def _continue(rank, world_size, keys, count, start, end, precision="fp32"):
    """Load, make some updates, save; return the norms, the groups' scalars, and the state as loaded and at the end."""
    updates = _Updates(rank, world_size, keys, precision=precision)
    if start is not None:
        updates.load(*start)
    loaded = updates.full_state()
    norms = [updates.update() for _ in range(count)]
    groups = updates.save(end)
    final = updates.full_state()
    weights = {name: value.clone() for name, value in updates.model.state_dict().items()}
    updates.backend.close()
    return norms, groups, loaded, final, weights


SCALE = ("engine.scaler.scale", "engine.scaler.growth_tracker")


def zero(stage):
    return {"name": "deepspeed", "zero_stage": stage}


@needs_deepspeed
@pytest.mark.parametrize(
    "route",
    [
        [(2, zero(2)), (3, zero(3)), (1, {"name": "ddp"})],
        pytest.param([(2, zero(3)), (2, zero(1)), (3, zero(0))], marks=pytest.mark.slow),
        pytest.param([(1, {"name": "ddp"}), (3, zero(1)), (2, zero(3))], marks=pytest.mark.slow),
        pytest.param([(2, {"name": "fsdp"}), (3, zero(2)), (2, {"name": "fsdp"})], marks=pytest.mark.slow),
    ],
)
def test_a_state_goes_on_under_any_stage_and_number_of_ranks(route, rank_pool, tmp_path):
    """Loading gives back every bit, and nine updates in three places are nine updates of one process."""

    def run(world_size, *arguments):
        return (rank_pool(world_size, _continue, *arguments) if world_size > 1 else [_continue(0, 1, *arguments)])[0]

    norms0, _, _, final0, _ = run(1, {"name": "ddp"}, 9, None, tmp_path / "whole")
    start, before, norms = None, None, []
    for number, (world_size, keys) in enumerate(route):
        end = tmp_path / str(number)
        some, groups, loaded, final, weights = run(world_size, keys, 3, start, end)
        if before is not None:
            assert loaded.keys() == before.keys()
            assert all(torch.equal(loaded[name], value) for name, value in before.items())
        norms += some
        if keys.get("zero_stage") != 3 and keys["name"] != "fsdp":  # the weights it computes with are the masters
            assert all(torch.equal(final[f"model.{name}"], value) for name, value in weights.items())
        start, before = (end, groups), final
    assert norms == pytest.approx(norms0, rel=1e-5)
    assert final.keys() == final0.keys()
    for name, value in final0.items():
        torch.testing.assert_close(final[name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "route",
    [
        pytest.param([(1, {"name": "ddp"}), (2, {"name": "fsdp"}), (2, {"name": "ddp"})], id="ddp, fsdp, ddp"),
        pytest.param([(2, zero(2)), (2, zero(3)), (2, zero(0))], marks=needs_deepspeed, id="ZeRO 2, 3, 0"),
        pytest.param([(2, {"name": "fsdp"}), (2, zero(1)), (1, {"name": "ddp"})], marks=[needs_deepspeed, pytest.mark.slow]),
    ],
)  # fmt: skip
def test_fp16s_loss_scale_goes_on_under_any_engine(route, rank_pool, tmp_path):
    """It has grown and overflowed on the way; each engine begins where the last one was."""

    def run(world_size, *arguments):
        arguments = (*arguments, "fp16")
        return (rank_pool(world_size, _continue, *arguments) if world_size > 1 else [_continue(0, 1, *arguments)])[0]

    norms0, _, _, final0, _ = run(1, {"name": "ddp"}, 9, None, tmp_path / "whole")
    assert 0 < sum(map(math.isfinite, norms0)) < 9
    start, before = None, {}
    for number, (world_size, keys) in enumerate(route):
        end = tmp_path / str(number)
        _, groups, loaded, final, _ = run(world_size, keys, 3, start, end)
        assert all(torch.equal(loaded[name], value) for name, value in before.items())
        start, before = (end, groups), {name: final[name] for name in SCALE}
    assert before == {name: final0[name] for name in SCALE}


def _round_trip(rank, world_size, stage):
    """Write a state back from whole tensors into partitions that have gone on; return what is read then."""
    updates = _Updates(rank, world_size, zero(stage))
    for _ in range(2):
        updates.update()
    saved = dict(updates.backend.full_state())
    updates.update()
    moved = dict(updates.backend.full_state())
    updates.backend.load_full_state(saved.items())
    again = dict(updates.backend.full_state())
    updates.backend.close()
    return saved, moved, again


@needs_deepspeed
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_whole_tensors_go_back_into_partitions(stage, rank_pool):
    for saved, moved, again in rank_pool(3, _round_trip, stage):
        assert set(saved) == {"0.weight", "0.bias", "2.weight", "2.bias", "3.weight", "3.bias"}
        for name, tensors in saved.items():
            assert set(tensors) == {"parameter", "exp_avg", "exp_avg_sq", "first_moment_count", "second_moment_count"}
            assert all(torch.equal(again[name][slot], value) for slot, value in tensors.items())
            assert not torch.equal(moved[name]["parameter"], tensors["parameter"])


def _poisoned(rank, world_size, stage):
    updates = _Updates(rank, world_size, zero(stage))
    updates.update()
    before = updates.full_state()
    with pytest.raises(NonFiniteError) as error:
        updates.update(scale=math.nan if rank == 1 else 1.0)
    kept = updates.full_state()
    norm = updates.update()
    updates.backend.close()
    return error.value.ranks, all(torch.equal(kept[name], value) for name, value in before.items()), norm


@needs_deepspeed
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_nan_on_one_rank_is_no_update(stage, rank_pool):
    whole = _Updates(0, 1, {"name": "ddp"})
    norms = [whole.update() for _ in range(2)]
    for ranks, is_kept, norm in rank_pool(2, _poisoned, stage):
        assert ranks == [1] and is_kept
        assert norm == pytest.approx(norms[1], rel=1e-5)


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


CHECKPOINTED = [(stage, False, per) for per in ("sample", "micro_batch") for stage in (1, 2, 3)]
CHECKPOINTED += [(1, True, "micro_batch"), (2, True, "micro_batch")]  # the others are refused


@needs_deepspeed
@pytest.mark.parametrize(
    ("stage", "use_reentrant", "per"),
    [pytest.param(*case, marks=[] if case[0] == 3 and case[2] == "sample" else [pytest.mark.slow]) for case in CHECKPOINTED],
)  # fmt: skip
def test_checkpointed_blocks(stage, use_reentrant, per, rank_pool):
    keys = _checkpointed_by(stage)
    (norms, state), _ = rank_pool(2, _checkpointed_updates, keys, per, use_reentrant)
    (norms0, state0), _ = rank_pool(2, _checkpointed_updates, {"name": "ddp"}, per, False)
    assert norms == pytest.approx(norms0, rel=1e-5)
    for name, value in state0.items():
        torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-7)


def _refused_checkpoint(rank, world_size):
    updates = _Updates(rank, world_size, _checkpointed_by(3), model=track(_Checkpointed(True), "micro_batch"))
    with pytest.raises(UserError, match=r"'blocks\.0'; call torch.utils.checkpoint with use_reentrant=False"):
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


def _lamb(rank, world_size):
    with pytest.raises(UserError, match=r"lamb needs whole layers.*zero_stage 0"):
        _Updates(rank, world_size, zero(2), LAMB)


@needs_deepspeed
def test_layerwise_optimizers_need_whole_layers(rank_pool):
    rank_pool(2, _lamb)


@pytest.mark.parametrize(
    ("options", "stage", "message"),
    [
        ({"train_batch_size": 64}, None, "'train_batch_size'.*batch.size"),
        ({"gradient_accumulation_steps": 2}, None, "'gradient_accumulation_steps'.*batch.micro_size"),
        ({"gradient_clipping": 1.0}, None, "'gradient_clipping'.*optimizer.max_grad_norm"),
        ({"optimizer": {"type": "Adam"}}, None, "'optimizer'.*optimizer.name"),
        ({"scheduler": {"type": "WarmupLR"}}, None, "'scheduler'.*schedule.name"),
        ({"bf16": {"enabled": True}}, None, "'bf16'.*precision"),
        ({"zero_optimization": {"stage": 3}}, 2, "stage' is 3, but backend.zero_stage is 2"),
        ({"zero_optimization": {"stage": 4}}, None, "must be 0, 1, 2 or 3, got 4"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, 3, "offload_optimizer.device.*nvme"),
        ({"zero_optimization": {"memory_efficient_linear": True}}, 3, "memory_efficient_linear.*squares"),
        ({"zero_optimization": 2}, None, "expected a JSON object"),
        ([], None, "expected a JSON object"),
    ],
)
def test_what_the_run_decides_is_refused_in_the_file(options, stage, message, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(options))
    with pytest.raises(UserError, match=message) as error:
        load_ds_config(path, stage)
    assert "ds.json" in str(error.value) and "\n" not in str(error.value)


def test_options_may_stand_in_the_config_itself():
    assert load_ds_config({"zero_optimization": {"stage": 1}}, None)["zero_optimization"]["stage"] == 1
    with pytest.raises(UserError, match=r"^backend\.ds_config: 'optimizer' is decided by the run"):
        load_ds_config({"optimizer": {"type": "Adam"}}, None)


def test_what_the_run_does_not_decide_passes_through(tmp_path):
    path = tmp_path / "ds.json"
    zero_options = {"stage": 1, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": "auto"}
    path.write_text(
        json.dumps(
            {
                "fp16": {"enabled": False},
                "train_batch_size": "auto",
                "zero_optimization": zero_options,
                "steps_per_print": 7,
            }
        )
    )
    options = load_ds_config(path, None)
    assert options["steps_per_print"] == 7 and options["gradient_clipping"] == 0.0 and "train_batch_size" not in options
    assert options["zero_optimization"] == {
        "stage": 1,
        "offload_optimizer": {"device": "cpu"},
        "memory_efficient_linear": False,
    }
    assert load_ds_config(None, None)["zero_optimization"]["stage"] == 2
    with pytest.raises(UserError, match="cannot read"):
        load_ds_config(tmp_path / "none.json", None)


def test_missing_packages_are_one_line(monkeypatch):
    from largebatch.distributed import deepspeed

    monkeypatch.setattr(deepspeed, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'largebatch\[deepspeed\]'"):
        create_backend(BackendConfig(name="deepspeed", device="cpu"), "fp32", Ranks())


@needs_deepspeed
def test_nothing_is_compiled(tmp_path):
    """Neither ninja nor a compiler is needed, and a lock that a killed build has left is not waited for."""
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "largebatch", "train", str(root / "configs" / "digits.yaml"), "--out", str(tmp_path / "run"),
               "--schedule.epochs", "0.4", "--backend.name", "deepspeed", "--backend.device", "cpu"]  # fmt: skip
    variables = {**os.environ, "PATH": "/nowhere", "TORCH_EXTENSIONS_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, cwd=root)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [path.name for path in lock.parent.iterdir()] == ["lock"]


@pytest.mark.parametrize(
    ("keys", "precision", "message"),
    [
        ({"squares_every": 2}, "fp32", "squares_every"),
        ({"squares_dtype": "bfloat16"}, "fp32", "squares_dtype"),
        ({"compile": True}, "fp32", "backend.compile"),
        ({"shard": ["Block"]}, "fp32", "only fsdp"),
        ({}, "fp64", "float64"),
    ],
)
def test_what_deepspeed_cannot_do_is_refused(keys, precision, message):
    with pytest.raises(UserError, match=message):
        create_backend(BackendConfig(name="deepspeed", device="cpu", **keys), precision, Ranks())


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_the_command_runs_under_torchrun(stage, tmp_path):
    """In an environment that is not activated."""
    root = Path(__file__).parents[1]
    variables = {name: value for name, value in os.environ.items() if name != "PATH"} | {
        "PATH": "/usr/bin:/bin",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "largebatch", "train",
               str(root / "configs" / "digits.yaml"), "--out", str(tmp_path / "run"), "--schedule.epochs", "4", "--warmup.epochs", "1",
               "--backend.name", "deepspeed", "--backend.zero_stage", str(stage), "--backend.device", "cpu"]  # fmt: skip
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["val_accuracy"] > 0.8


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("example", ["digits", "gpt_text"])
def test_the_command_runs_under_deepspeeds_launcher(example, tmp_path):
    """Its --local_rank argument is left out: the processes are told by the environment, as torchrun's are."""
    root = Path(__file__).parents[1]
    flags = small_gpt(tmp_path) if example == "gpt_text" else ["--schedule.epochs", "4", "--warmup.epochs", "1"]
    launcher = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--num_gpus",
        "2",
        "--no_local_rank",
        "--module",
        "largebatch",
    ]
    words = ["train", root / "configs" / f"{example}.yaml", "--out", tmp_path / "run", *flags,
             "--backend.name", "deepspeed", "--backend.device", "cpu"]  # fmt: skip
    variables = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *map(str, words)], env=variables, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["world_size"] == 2


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "terminated"])
def test_a_stopped_run_goes_on_under_other_engines(signal_number, tmp_path):
    """Every engine is stopped in its turn, on one rank or two, and the next goes on: the rows and weights of one DDP run."""
    config = write_config(tmp_path)
    torchrun = write_torchrun(tmp_path)
    zero = [("deepspeed", "--backend.zero_stage", stage) for stage in range(4)]
    stages = [(2, ("ddp",)), (1, zero[2]), (2, ("fsdp",)), (2, zero[3]), (1, zero[0]), (2, zero[1]), (2, ("accelerate",)), (1, ("ddp",))]  # fmt: skip

    def start(folder, world_size, engine, name, seconds):
        log = folder.with_name(f"{folder.name}-{name}.log")
        words = [torchrun, "--standalone", "--nproc-per-node", world_size, "-m", "largebatch", "train", config, "--out", folder,
                 "--resume", "auto", "--backend.name", *engine]  # fmt: skip
        return Job(words, log, LARGEBATCH_TEST_SECONDS=seconds)

    whole_run = start(tmp_path / "whole", 2, ("ddp",), "whole", 0)
    assert whole_run.wait() == 0, whole_run.printed()[-3000:]
    folder = tmp_path / "run"
    for number, (world_size, engine) in enumerate(stages):
        is_last = number == len(stages) - 1
        job = start(folder, world_size, engine, number, 0 if is_last else 0.1)
        if is_last:
            assert job.wait() == 0, job.printed()[-3000:]
        else:
            before = samples_saved(folder)
            wait_until(lambda b=before, j=job: samples_saved(folder) > b or j.process.poll() is not None, 120)
            assert job.process.poll() is None, job.printed()[-3000:]
            if signal_number == signal.SIGKILL:
                job.kill()
            else:
                for pid in job.ranks():
                    os.kill(pid, signal_number)
                job.wait()
        assert number == 0 or "resumed from" in job.printed(), job.printed()[-3000:]
    assert_same_run(folder, tmp_path / "whole", 1e-5)


def samples_saved(folder):
    return max((int(name.split("-")[1]) for name in checkpoints(folder)), default=0)
