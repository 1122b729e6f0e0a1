"""The state of a ZeRO run in whole tensors: it goes on under any stage, number of ranks and engine."""

import math

import pytest
import torch
from jobs import no_job_left  # noqa: F401
from zero import _Updates, needs_deepspeed, zero

from largebatch.distributed import NonFiniteError


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
