"""Second moments of micro-batches in the trainer: how an update is cut, what is kept between updates, how gradients are clipped."""

from __future__ import annotations

import copy
import math
import shutil

import pytest
import torch
from rich.console import Console
from runs import digits, rows_of
from torch.utils.checkpoint import checkpoint

from largebatch.data.sampler import PlanSampler, effective_micro_batches, largest_micro_batch
from largebatch.distributed import Ranks
from largebatch.distributed.ddp import DataParallel
from largebatch.errors import UserError
from largebatch.noise.estimator import reference_norm_ratio
from largebatch.optim import AdamW, param_groups
from largebatch.optim.averages import Moment
from largebatch.planner.resolve import resolve
from largebatch.planner.show import print_plan
from largebatch.reporting.loggers import read_metrics
from largebatch.training.run import build_model, train

ADAMW = {"optimizer.name": "adamw", "optimizer.lr": 1e-3}


@pytest.mark.parametrize(
    ("batch_size", "world_size", "micro", "group", "least", "expected"),
    [
        (128, 1, None, 1, 2, 64),
        (7, 1, None, 1, 2, 4),
        (128, 1, 16, 1, 2, 16),
        (128, 1, 100, 1, 2, 64),
        (128, 2, None, 1, 2, 64),
        (128, 2, None, 1, 3, 32),
        (128, 8, None, 1, 4, 16),
        (128, 1, None, 32, 3, 64),  # four groups are cut into two and two
        (128, 1, None, 128, 2, 128),  # one group stays together
        (3, 4, None, 1, 2, 1),
        (1, 1, None, 1, 2, 1),
    ],
)
def test_an_update_has_enough_micro_batches(batch_size, world_size, micro, group, least, expected):
    assert largest_micro_batch(batch_size, world_size, micro, group, least) == expected


def test_all_ranks_have_as_many_micro_batches_and_each_sample_is_in_one():
    class Plan:
        most_samples = 10**6

        def batch_size(self, samples_seen):
            return 96

    for world_size in (1, 2, 3, 5):
        for least in (1, 2, 3, 6, 9, 15, 50):
            samplers = [
                PlanSampler(Plan(), 1000, 0, rank, world_size, units=lambda _, n=least: n) for rank in range(world_size)
            ]
            pieces = [[p for p in s.pieces(96) if p.stop > p.start] for s in samplers]
            assert len({len(s.pieces(96)) for s in samplers}) == 1
            assert sorted(i for of_rank in pieces for p in of_rank for i in range(p.start, p.stop)) == list(range(96))
            assert sum(map(len, pieces)) >= least
            units = effective_micro_batches(96, world_size, None, 1, least)
            assert samplers[0].num_units(96) == units and units >= 0.98 * least


def test_the_plan_says_how_passes_are_cut(capsys):
    config = digits(**ADAMW)
    run = resolve(config, 1438)
    assert run.second_moment == "micro_batch" and run.plan.least_units == 2
    print_plan(Console(width=300), run, build_model(config, config.data.load(0).task), "data")
    printed = capsys.readouterr().out
    assert "from the squared gradients of 2 micro-batches" in printed and "cut into 2 passes of 100" in printed
    assert "1 x 100 x 2" in printed
    assert f"{64 * 32 + 32 + 32 * 10 + 10:,} parameters" in printed
    far = {"batch.reference_size": 8}  # 25 times the reference: from the first update, or after a warm-up from 8
    assert resolve(digits(**ADAMW, **far), 1438).plan.least_units == 4
    assert resolve(digits(**ADAMW, **far, **{"warmup.realize": "batch"}), 1438).plan.least_units == 2
    rise = {"optimizer.betas": (0.9, 0.95), "warmup.realize": "batch"}
    short = resolve(digits(**ADAMW, **far, **rise), 1438).plan
    reference = short.reference.batch_size
    assert [short.units(kappa * reference) for kappa in (1, 2, 4, 16, 64)] == [2, 2, 3, 9, 16]
    assert resolve(digits(**ADAMW, **far), 1438).plan.units(64 * reference) == 4
    print_plan(
        Console(width=300),
        resolve(digits(**ADAMW, **far, **rise), 1438),
        build_model(config, config.data.load(0).task),
        "data",
    )
    assert (
        "of 2 micro-batches an update, 12 at a batch of 200; a rank's 200 samples are cut into 12 passes"
        in capsys.readouterr().out
    )
    assert resolve(digits(), 1438).plan.least_units == 1
    assert resolve(digits(**{"noise.measure": True}), 1438).plan.least_units == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"batch.size": 1}, "got batch.size 1, one sample; raise batch.size to 2"),
        ({"backend.squares_every": 2, "optimizer.second_moment": "sample"}, "squares_every: got 2, expected 1: squares of samples"),
        ({"backend.squares_every": 2, "precision": "fp16"}, "precision fp16"),
        ({"backend.squares_every": 2, "optimizer.non_finite": "skip"}, "non_finite skip"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(flags, message):
    with pytest.raises(UserError, match=message):
        resolve(digits(**(ADAMW | flags)), 1438)


def test_one_group_of_a_norm_cannot_be_cut():
    with pytest.raises(UserError, match=r"one group of 200 samples that a norm .*; raise batch\.size to 400"):
        resolve(digits(**ADAMW), 1438, 1, 200)


def engine(model, every=1, reference=16):
    """Return an engine with hooks on a model, and its optimizer."""
    torch.manual_seed(0)
    found = DataParallel(Ranks(), torch.device("cpu"), "fp64", squares_every=every)
    found.track(model, "micro_batch")
    _, optimizer = found.prepare(model, lambda m: AdamW(param_groups(m), 1e-3, reference_batch_size=reference))
    found.use_squares(optimizer)
    return found, optimizer


def passes(found, model, batches, update):
    """Do the backward passes of one update over equal micro-batches; return their gradients, (n, parameters)."""
    gradients = []
    size = sum(len(inputs) for inputs, _ in batches)
    twin = copy.deepcopy(model)  # whose gradients are no passes of the model's
    found.begin_update(size, len(batches), update)
    for index, (inputs, targets) in enumerate(batches):
        loss = torch.nn.functional.cross_entropy(twin(inputs), targets, reduction="sum") / size
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss * len(batches), twin.parameters())]))
        with found.accumulate(sync=index == len(batches) - 1):
            found.backward(torch.nn.functional.cross_entropy(model(inputs), targets, reduction="sum") / size)
    return torch.stack(gradients)


def data(n, size=8):
    return [(torch.randn(size, 6, dtype=torch.float64), torch.randint(4, (size,))) for _ in range(n)]


def second_moment(optimizer):
    return torch.cat([optimizer.state[p]["exp_avg_sq"].flatten() for g in optimizer.param_groups for p in g["params"]])


@pytest.mark.parametrize("n", [2, 3, 8])
def test_the_second_moment_is_that_of_the_reference_batch(n):
    model = torch.nn.Linear(6, 4).double()
    found, optimizer = engine(model)
    gradients = passes(found, model, data(n), 0)
    optimizer.set_batch(8 * n, n, 1)
    found.step(optimizer)
    mean, variance = gradients.mean(0), gradients.var(0) / n
    expected = 0.001 * (mean.square() + (8 * n / 16 - 1) * variance)
    torch.testing.assert_close(second_moment(optimizer), expected, rtol=1e-10, atol=0)


def test_a_variance_is_kept_per_sample_until_it_is_measured_again():
    """Every update has its own ghat^2; the variance follows the batch size, and is that of ghat itself where none was seen."""
    model = torch.nn.Linear(6, 4).double()
    found, optimizer = engine(model, every=3)
    expected, variance = torch.zeros(28, dtype=torch.float64), torch.zeros(28, dtype=torch.float64)
    for update, n in enumerate((4, 2, 2, 4, 4)):
        batches = data(n)
        if update == 0:
            batches = [(inputs * torch.tensor([1.0, 1, 1, 1, 1, 0]), targets) for inputs, targets in batches]
        gradients = passes(found, model, batches, update)
        mean = gradients.mean(0)
        if update % 3 == 0:
            variance = gradients.var(0) / n * 8 * n
        used = torch.where(variance == 0, mean.square() * 8 * n, variance)
        expected = 0.999 * expected + 0.001 * (mean.square() + (1 / 16 - 1 / (8 * n)) * used)
        optimizer.set_batch(8 * n, n, 1)
        found.step(optimizer)
        torch.testing.assert_close(second_moment(optimizer), expected, rtol=1e-9, atol=1e-18)
    assert set(found.state(model, optimizer)) >= {"engine.sample_variance.weight", "engine.sample_variance.bias"}


def test_the_ratio_of_norms_is_that_of_many_reference_batches():
    """A gradient of noise and signal, at 16 times the reference: the mean of 16 of its gradients."""
    torch.manual_seed(0)
    signal, kappa, n = 0.05 * torch.randn(20_000, dtype=torch.float64), 16, 4
    of_reference = signal + 0.3 * torch.randn(kappa, 20_000, dtype=torch.float64)
    units = of_reference.view(n, -1, 20_000).mean(1)
    mean = units.mean(0)
    sums = torch.stack([mean.square(), (units / n).square().sum(0)])
    found = reference_norm_ratio(sums, n, n, kappa)
    assert found == pytest.approx(float(mean.norm() / of_reference.square().sum(1).mean().sqrt()), rel=0.01)
    assert reference_norm_ratio(sums, n, n, 1.0) == 1.0
    assert reference_norm_ratio(sums, 1, 1, kappa) == 1.0
    assert reference_norm_ratio(sums * math.inf, n, n, kappa) == 1.0


@pytest.mark.parametrize("every", [1, 3])
def test_clipping_bounds_the_norm_of_a_reference_gradient(every, tmp_path):
    """At 6 times the reference the batch's own norm is far below it, and a threshold between the two clips."""
    flags = ADAMW | {"batch.micro_size": 25, "warmup.name": "none", "warmup.epochs": 0, "backend.squares_every": every}
    free, _ = rows_of(digits(**flags), tmp_path / "free")
    limit = 1.02 * max(row["grad_norm"] for row in free)
    runs = {
        of: rows_of(
            digits(**flags, **{"optimizer.max_grad_norm": limit, "optimizer.max_grad_norm_of": of}), tmp_path / of
        )[0]
        for of in ("batch", "reference")
    }
    assert [row["loss"] for row in runs["batch"]] == [row["loss"] for row in free]
    assert [row["loss"] for row in runs["reference"]] != [row["loss"] for row in free]


def test_a_closed_engine_leaves_the_parameters():
    model = torch.nn.Linear(6, 4).double()
    found, _ = engine(model)
    assert all(p._backward_hooks for p in model.parameters())
    found.close()
    assert not any(p._backward_hooks for p in model.parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_gradients_are_those_of_the_plain_model_bit_for_bit(precision):
    """In the same passes: nothing of the model is replaced."""
    gradients = []
    for tracked in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(6, 32), torch.nn.GELU(), torch.nn.LayerNorm(32), torch.nn.Linear(32, 4)
        )
        found = DataParallel(Ranks(), torch.device("cpu"), precision)
        if tracked:
            found.track(model, "micro_batch")
        found.prepare(model, lambda m: AdamW(m.parameters(), 1e-3))
        found.begin_update(24, 3, 0)
        for index, (inputs, targets) in enumerate(data(3)):
            with found.accumulate(sync=index == 2):
                with found.autocast():
                    loss = torch.nn.functional.cross_entropy(model(inputs.to(found.dtype)), targets)
                found.backward(loss)
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(ours, plain) for plain, ours in zip(*gradients, strict=True))


@pytest.mark.parametrize("every", [1, 3])
def test_channels_last_changes_the_layout_alone(every, tmp_path):
    """Weights, squares, moments and what is kept lie alike, whatever the memory order; a resume puts them back."""
    flags = ADAMW | {
        "model.name": "cnn",
        "model.channels": [4, 6],
        "schedule.epochs": 0.8,
        "backend.squares_every": every,
    }
    plain, _ = rows_of(digits(**flags), tmp_path / "plain")
    run = digits(**flags, **{"backend.channels_last": True, "checkpoint.every_minutes": None, "checkpoint.every_epochs": 0.3,
                             "checkpoint.keep_last": 9})  # fmt: skip
    ours, _ = rows_of(run, tmp_path / "last")
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in plain], rel=1e-10)
    shutil.rmtree(sorted((tmp_path / "last" / "checkpoints").glob("samples-*"))[-1])
    result = train(run, tmp_path / "last", ranks=Ranks(), resume="auto")
    resumed, _ = read_metrics(result.folder / "metrics.jsonl")
    assert [row["loss"] for row in resumed] == [row["loss"] for row in ours]


@pytest.mark.parametrize("rounded", [False, True])
def test_squares_without_noise_make_no_second_moment_negative(rounded):
    """Equal gradients at 1,000 times the reference: q is ghat^2 but for rounding, which (kappa-1)/(n-1) multiplies."""
    torch.manual_seed(0)
    gradient = torch.randn(10_000)
    squares = 2 * (gradient / 2).square()
    if rounded:
        squares = squares.bfloat16().float()
    average = torch.zeros(10_000)
    Moment([squares], 999.0, 2.0, 1000.0, equal=not rounded).add_to([average], [gradient], [gradient], 0.05)
    assert (average > 0).all()


class Tower(torch.nn.Module):
    """Every parameter is used twice, in re-entrant checkpoints or by a backward pass within forward."""

    def __init__(self, task, how):
        super().__init__()
        self.tower, self.how = torch.nn.Linear(64, task.num_outputs), how

    def forward(self, inputs):
        x = inputs.flatten(1).requires_grad_(self.training)
        if self.how == "checkpoints" and self.training:
            return checkpoint(self.tower, x, use_reentrant=True) + checkpoint(self.tower, x.flip(1), use_reentrant=True)
        if self.how == "backward" and self.training:
            (0.0 * self.tower(x).sum()).backward()
        return self.tower(x) + self.tower(x.flip(1))


@pytest.mark.parametrize("how", ["checkpoints", "backward"])
def test_backward_passes_that_are_no_micro_batches_are_refused(how, tmp_path):
    """Counted as further micro-batches, they gave another second moment without a word."""
    flags = {"model.name": "test_micro_batches:Tower", "model.options": {"how": how}, "batch.size": 32}
    with pytest.raises(UserError, match=r"4 backward passes reached the parameters in an update of 2 micro-batches"):
        rows_of(digits(**flags, **ADAMW, **{"batch.reference_size": 16}), tmp_path / "run")


def frozen(task):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, task.num_outputs)).requires_grad_(False)


def with_complex(task):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, task.num_outputs))
    model.register_buffer("rotation", torch.full((3,), 1j))
    return model


@pytest.mark.parametrize(
    ("name", "message"), [("frozen", "has no parameter to train"), ("with_complex", "'rotation' of .* is complex")]
)
def test_a_model_that_cannot_be_trained_is_refused_in_a_line(name, message, tmp_path):
    with pytest.raises(UserError, match=message):
        rows_of(digits(**{"model.name": f"test_micro_batches:{name}"}), tmp_path / "run")
