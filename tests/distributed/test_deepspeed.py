"""DeepSpeed, ZeRO 0 to 3: the trajectory of one process, and its own options."""

import json

import pytest
import torch
from buffers import LENGTH, MODELS, check_same_buffers, train_and_again
from engine_runs import CASES, OTHERS, config, distances, gathered, trajectory
from jobs import no_job_left  # noqa: F401
from runs import digits
from zero import _fresh_counters, needs_deepspeed

from largebatch.distributed import Ranks
from largebatch.reporting.loggers import read_metrics
from largebatch.training.run import train

# Only the order of sums differs; float32 over some twenty updates.
TOLERANCE = 1e-5


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
    """As on every engine (tests/training/test_agreement.py), in float32."""
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
