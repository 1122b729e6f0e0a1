"""Losses and gradients that are not finite: skipped, rolled back, or the end of the run."""

import itertools
import shutil

import pytest
import torch
from resumed import (
    ADAMW,
    OFTEN,
    SAMPLES,
    _no_pictures,  # noqa: F401
    assert_same_bits,
    rows,
    saved,
    tensors,
)
from runs import digits

from largebatch.checkpoint.folder import (
    find_problems,
    read_state,
)
from largebatch.distributed import Ranks
from largebatch.errors import UserError
from largebatch.training.run import train

# --- NaN and infinity ---------------------------------------------------------------------------------------------


class Poisoned(torch.nn.Module):
    """Its outputs are NaN in the training passes of these numbers, counted from 1; on rank 1 where there are ranks."""

    passes, bad = 0, frozenset()

    def __init__(self, num_outputs):
        super().__init__()
        self.linear = torch.nn.Linear(64, num_outputs)

    def forward(self, inputs):
        import torch.distributed as dist

        Poisoned.passes += self.training
        here = not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1
        outputs = self.linear(inputs.flatten(1))
        return outputs * torch.nan if self.training and here and Poisoned.passes in Poisoned.bad else outputs


def poisoned(task):
    return Poisoned(task.num_outputs)


def train_poisoned(rank, world_size, folder, bad, flags):
    Poisoned.passes, Poisoned.bad = 0, frozenset(bad)
    run = digits(
        **({"model.name": "test_non_finite:poisoned", "warmup.name": "none", "warmup.epochs": 0.0} | OFTEN | flags)
    )
    return train(run, folder, ranks=Ranks(rank, rank, world_size), resume="auto").summary


def train_by_its_own_clock(rank, world_size, folder):
    return train_poisoned(
        rank, world_size, folder / f"by-the-clock-of-{rank}", [8], {"optimizer.non_finite": "roll_back"}
    )


def test_rank_0_names_the_run_folder(rank_pool, tmp_path):
    """Each rank names runs/NAME-DATE-TIME by its own clock, and two of them may be a second apart."""
    summaries = rank_pool(2, train_by_its_own_clock, tmp_path)
    assert [(s.status, s.rollbacks) for s in summaries] == [("finished", 1)] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["by-the-clock-of-0"]


def test_a_skipped_update_is_left_out(rank_pool, tmp_path):
    """Against a plain torch loop that knows nothing of NaN: the third update is not there, its samples are used up."""
    import numpy as np

    summaries = rank_pool(2, train_poisoned, tmp_path / "run", [3], {"optimizer.non_finite": "skip"})
    assert [(s.status, s.skipped, s.updates) for s in summaries] == [("finished", 1, 11)] * 2

    run = digits(**{"model.name": "test_non_finite:poisoned"})
    source = run.data.load(0)
    torch.manual_seed(0)
    model = poisoned(source.task).double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    inputs, targets = source.train.inputs.double(), source.train.targets
    num, size, total = len(inputs), 200, 1.5 * len(inputs)
    order = np.concatenate([np.random.default_rng([0, epoch]).permutation(num) for epoch in range(2)])
    Poisoned.bad = frozenset()
    updates = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert len(updates) == 11
    for number, row in enumerate(updates):
        seen = number * size
        chosen = order[seen : min(seen + size, int(total))]
        assert row["samples"] == seen + len(chosen) and row.get("skipped", 0) == (number >= 2)
        if number == 2:
            assert row["loss"] is None and row["grad_norm"] is None
            continue
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * len(chosen) / 32 * 0.5 * (1 + np.cos(np.pi * seen / total))
        loss = torch.nn.functional.cross_entropy(model(inputs[chosen]), targets[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-10), number
    weights = tensors(saved(tmp_path / "run")[-1])
    torch.testing.assert_close(weights["model.linear.weight"], model.linear.weight.detach(), rtol=1e-10, atol=1e-12)
    events = [row for row in rows(tmp_path / "run") if "event" in row]
    assert len(events) == 1 and "update 3" in events[0]["event"] and "skipped, 1 in all" in events[0]["event"]
    assert events[0]["samples"] == 600 and "rank 1" in events[0]["event"]


QUICK_FP16 = {
    ("ddp", 1, "skip", "adamw"),
    ("ddp", 2, "roll_back", "adamw"),
    ("fsdp", 2, "skip", "adamw"),
    ("fsdp", 2, "roll_back", "sgd"),
}


@pytest.mark.parametrize(
    ("engine", "world_size", "choice", "optimizer"),
    [
        pytest.param(*case, marks=[] if case in QUICK_FP16 else [pytest.mark.slow])
        for case in itertools.product(("ddp", "fsdp"), (1, 2), ("skip", "roll_back"), ("sgd", "adamw"))
    ],
)
def test_fp16_goes_on_after_a_loss_that_is_not_finite(engine, world_size, choice, optimizer, rank_pool, tmp_path):
    flags = ADAMW if optimizer == "adamw" else {}
    """Its loss scaling has seen gradients that are gone."""
    flags = flags | {"precision": "fp16", "optimizer.non_finite": choice, "batch.size": 90, "backend.name": engine}
    passes = 2 if flags.get("optimizer.name") == "adamw" and world_size == 1 else 1
    bad = [12 * passes]
    if world_size == 1:
        summaries = [train_poisoned(0, 1, tmp_path / "run", bad, flags)]
    else:
        summaries = rank_pool(world_size, train_poisoned, tmp_path / "run", bad, flags)
    assert [s.status for s in summaries] == ["finished"] * world_size
    assert all((s.skipped, s.rollbacks) == ((1, 0) if choice == "skip" else (0, 1)) for s in summaries)
    losses = [row["loss"] for row in rows(tmp_path / "run") if row.get("loss") is not None]
    assert losses[-1] < losses[0]


class _Overflow(torch.autograd.Function):
    """The identity, whose gradients are beyond what float16 holds."""

    @staticmethod
    def forward(ctx, outputs):
        return outputs.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 1e30


class Overflowing(Poisoned):
    """Its losses are finite and its gradients overflow in the passes that are bad."""

    def forward(self, inputs):
        Poisoned.passes += self.training
        outputs = self.linear(inputs.flatten(1))
        return _Overflow.apply(outputs) if self.training and Poisoned.passes in Poisoned.bad else outputs


def overflowing(task):
    return Overflowing(task.num_outputs)


OVERFLOWS = {  # (passes, choice, updates, skipped)
    "one, stop": ([12], "stop", 48, 0),
    "all, stop": (range(4, 999), "stop", 34, 0),
    "all, skip": (range(4, 999), "skip", 54, 20),
}


@pytest.mark.parametrize(
    ("engine", "world_size"),
    [("ddp", 1), ("fsdp", 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("ddp", 2), ("fsdp", 1)))],
)
@pytest.mark.parametrize("case", OVERFLOWS)
def test_an_overflow_that_no_loss_scale_mends_is_none_of_the_scale(case, engine, world_size, rank_pool, tmp_path):
    """Its scale begins at 2^16 and is halved at each overflow; below 2^-14 the gradient is what is not finite."""
    bad, choice, updates, skipped = OVERFLOWS[case]
    flags = {"model.name": "test_non_finite:overflowing", "precision": "fp16", "optimizer.non_finite": choice,
             "batch.size": 90, "backend.name": engine, "schedule.epochs": 3 if "one" in case else 6}  # fmt: skip
    if world_size == 1:
        summaries = [train_poisoned(0, 1, tmp_path / "run", bad, flags)]
    else:
        summaries = rank_pool(world_size, train_poisoned, tmp_path / "run", bad, flags)
    for summary in summaries:
        assert (summary.status, summary.updates, summary.skipped) == (
            "finished" if "one" in case else "diverged", updates, skipped
        )  # fmt: skip
        assert "one" in case or "the gradient is NaN or infinite, every loss was finite" in summary.message
    norms = [row["grad_norm"] for row in rows(tmp_path / "run") if "loss" in row]
    assert norms.count(None) == (1 if "one" in case else updates - 3)


def test_a_skip_is_told_once_however_often_the_run_is_resumed(tmp_path):
    """Killed after the skipped update and resumed before it, it comes past it again."""
    flags = {"optimizer.non_finite": "skip", "batch.size": 90} | SAMPLES  # of one pass an update
    train_poisoned(0, 1, tmp_path / "whole", [9], flags)
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    for path in saved(tmp_path / "run")[2:]:
        shutil.rmtree(path)
    done = read_state(saved(tmp_path / "run")[-1])["progress"]["step"]
    assert done == 8
    train_poisoned(0, 1, tmp_path / "run", [9 - done], flags)
    assert_same_bits(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    ("flags", "passes"), [({}, 1), (ADAMW | {"backend.squares_every": 3}, 2)], ids=["sgd", "adamw, variance every 3"]
)
def test_a_run_that_rolls_back_goes_on_with_other_samples(flags, passes, tmp_path):
    flags = flags | {"optimizer.non_finite": "roll_back", "batch.size": 90}
    summaries = [
        train_poisoned(0, 1, tmp_path / name, bad, flags)
        for name, bad in (("whole", []), ("run", [12 * passes]), ("again", [12 * passes]))
    ]
    assert [s.status for s in summaries] == ["finished"] * 3 and [s.rollbacks for s in summaries] == [0, 1, 1]
    for name in ("run", "again"):  # the event names the folder
        path = tmp_path / name / "metrics.jsonl"
        path.write_text(path.read_text().replace(str(tmp_path / name), ""))
    assert_same_bits(tmp_path / "run", tmp_path / "again")
    whole, run = (rows(tmp_path / name) for name in ("whole", "run"))
    event = next(row for row in run if "event" in row)
    assert "update 12" in event["event"] and "back at" in event["event"] and "other samples" in event["event"]
    back = event["samples"]
    assert 0 < back < 12 * 90
    updates = [[row for row in each if "loss" in row] for each in (whole, run)]
    assert [row["samples"] for row in updates[0]] == [row["samples"] for row in updates[1]]  # none twice, none left out
    for ours, theirs in zip(*updates, strict=True):
        assert (ours["loss"] == theirs["loss"]) == (ours["samples"] <= back)
        assert ours["lr"] == theirs["lr"] and ours["loss"] < 20


LIMITS = {
    "stop": ([4], "stop", "update 4", 3, 0, 0),
    "skips in a row": (range(4, 99), "skip", "20 updates in a row were skipped", 23, 20, 0),
    "returns": (range(12, 999), "roll_back", "after 10 returns to a checkpoint", None, 0, 10),
    "nothing to return to": ([2], "roll_back", "no checkpoint yet", 1, 0, 0),
}


@pytest.mark.parametrize("case", LIMITS)
def test_a_run_that_cannot_go_on_stops_with_its_last_good_state(case, tmp_path):
    bad, choice, message, updates, skipped, rollbacks = LIMITS[case]
    flags = {"optimizer.non_finite": choice, "batch.size": 90, "schedule.epochs": 3}
    summary = train_poisoned(0, 1, tmp_path / "run", bad, flags)
    assert summary.status == "diverged" and message in summary.message
    assert (summary.skipped, summary.rollbacks) == (skipped, rollbacks) and updates in (None, summary.updates)
    path = saved(tmp_path / "run")[-1]
    assert str(path) in summary.message and not find_problems(path)
    assert all(
        value.isfinite().all() for name, value in tensors(path).items() if name.startswith(("model.", "optimizer."))
    )
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_skipping_does_not_go_with_a_variance_that_is_kept():
    from largebatch.planner.resolve import resolve

    with pytest.raises(UserError, match=r"squares_every.*skip"):
        resolve(digits(**ADAMW, **{"optimizer.non_finite": "skip", "backend.squares_every": 2}), 1438)
