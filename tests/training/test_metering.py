"""Noise in a run: rows against a loop, ranks and resume alike, AdaScale's clock, batches that follow the noise."""

import itertools
import json

import pytest
import torch
from measured import ADAPTIVE
from resumed import part_of_run
from rich.console import Console
from runs import digits, rows_of

from largebatch.cli import main
from largebatch.data.sampler import global_batch
from largebatch.distributed import Ranks
from largebatch.noise.adascale import adascale_gain
from largebatch.planner.resolve import resolve
from largebatch.reporting.loggers import read_metrics
from largebatch.reporting.tables import ProgressLines
from largebatch.scaling.plan import Plan
from largebatch.scaling.rules import Reference
from largebatch.scaling.schedules import Constant, Warmup
from largebatch.training.metering import NoiseMeter
from largebatch.training.run import build_model

MEASURED = ("noise_scale", "gradient_variance", "gradient_signal", "progress_per_update", "efficiency_per_sample")
ADASCALE = {
    "scaling.rule": "adascale", "batch.reference_size": 16, "batch.size": 128, "warmup.name": "none", "warmup.epochs": 0,
    "optimizer.lr": 0.01, "schedule.epochs": 1.0,
}  # fmt: skip


def run_on_rank(rank, world_size, run, folder):
    return rows_of(run, folder, Ranks(rank, rank, world_size))


def column(rows, name):
    return torch.tensor([row[name] if row[name] is not None else torch.inf for row in rows], dtype=torch.float64)


@pytest.mark.parametrize("per", ["sample", "micro_batch"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_first_row_is_what_a_loop_over_samples_says(optimizer, per, tmp_path):
    flags = {"optimizer.name": optimizer, "optimizer.lr": 1e-3, "noise.measure": True, "noise.per": per}
    if optimizer == "adamw":
        flags |= {"optimizer.second_moment": "batch", "scaling.rule": "sqrt"}
    if per == "sample":
        flags |= {"optimizer.squares_samples": "all"}
    run = digits(**flags, **{"batch.micro_size": 20})
    row = rows_of(run, tmp_path / "run")[0][0]

    source = run.data.load(run.seed)
    model = build_model(run, source.task).double()
    chosen = global_batch(run.seed, len(source.train), 0, 200).indices
    step = 1 if per == "sample" else 20
    grads = []
    for start in range(0, 200, step):
        part = chosen[start : start + step]
        inputs, targets = source.train.inputs[part].double(), source.train.targets[part]
        loss = torch.nn.functional.cross_entropy(model(inputs), targets)
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    stacked = torch.stack(grads)
    variance = stacked.var(dim=0).sum().item() * step
    signal = stacked.mean(dim=0).square().sum().item() - variance / 200
    assert row["gradient_variance"] == pytest.approx(variance, rel=1e-10)
    assert row["gradient_signal"] == pytest.approx(signal, rel=1e-9)
    assert row["noise_scale"] == pytest.approx(variance / signal, rel=1e-9)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_measuring_changes_nothing(optimizer, tmp_path):
    flags = {"optimizer.name": optimizer, "optimizer.lr": 1e-3, "scaling.rule": "none"}
    plain, _ = rows_of(digits(**flags), tmp_path / "plain")
    measured, evaluations = rows_of(digits(**flags, **{"noise.measure": True}), tmp_path / "measured")
    for name in ("loss", "grad_norm", "lr"):
        torch.testing.assert_close(column(measured, name), column(plain, name), rtol=1e-12, atol=0)
    assert set(evaluations[-1]["noise_scale_by_layer"]) == {"1", "3"}


SLOW_NOISE = {("fsdp", "measured"), ("fsdp", "adascale")}
WITH_NOISE = {"measured": {"noise.measure": True}, "adascale": ADASCALE, "adaptive": ADAPTIVE}


@pytest.mark.parametrize(
    ("engine", "flags"),
    [
        # fsdp's ranks come slowly into being: the adaptive batch, which measures too, speaks for all by default.
        pytest.param(engine, flags, id=f"{engine}-{name}", marks=[pytest.mark.slow] * ((engine, name) in SLOW_NOISE))
        for engine in ("ddp", "fsdp")
        for name, flags in WITH_NOISE.items()
    ],
)
def test_ranks_and_micro_batches_change_nothing(engine, flags, rank_pool, tmp_path):
    flags = flags | {"noise.per": "sample"}
    run = digits(**flags)
    expected, _ = rows_of(run, tmp_path / "one")
    for world_size, micro in ((2, 3), (3, None)):
        other = digits(**flags, **{"batch.micro_size": micro, "backend.name": engine})
        ours, _ = rank_pool(world_size, run_on_rank, other, tmp_path / f"of-{world_size}")[0]
        assert [row["batch_size"] for row in ours] == [row["batch_size"] for row in expected]
        for name in ("loss", "lr", *MEASURED):
            torch.testing.assert_close(column(ours, name), column(expected, name), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("flags", [ADASCALE, ADAPTIVE], ids=["adascale", "adaptive"])
def test_a_resumed_run_is_one_that_was_not_stopped(flags, tmp_path):
    run = digits(**flags, **{"checkpoint.every_minutes": None})
    expected, evaluations = rows_of(run, tmp_path / "whole")
    for updates in (9, 40, 10**9):
        part_of_run(0, 1, run, tmp_path / "parts", updates)
    ours, ours_evaluations = read_metrics(tmp_path / "parts" / "metrics.jsonl")
    timed = {"samples_per_second"}
    assert [{k: v for k, v in row.items() if k not in timed} for row in ours] == [
        {k: v for k, v in row.items() if k not in timed} for row in expected
    ]
    assert ours_evaluations == evaluations


def test_an_adaptive_batch_follows_the_noise_within_its_bounds(tmp_path):
    updates, _ = rows_of(digits(**ADAPTIVE), tmp_path / "run")
    sizes = [row["batch_size"] for row in updates[:-1]]
    assert sizes[0] == 8 and max(sizes) > 8 and set(sizes) <= {8, 16, 32, 64}
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    changes = [row["event"] for row in events if "event" in row]
    assert len(changes) == sum(a != b for a, b in itertools.pairwise(sizes))
    assert changes[0].startswith("batch size 8 → 16: the critical batch size is ")
    for row in updates[:-1]:  # the linear rule's
        assert row["lr"] == pytest.approx(0.005 * row["batch_size"] / 8)


@pytest.mark.parametrize("micro_size", [None, 8])
def test_the_plan_says_what_a_device_will_have_to_hold(micro_size, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(digits(**ADAPTIVE, **{"batch.micro_size": micro_size}).to_yaml())
    assert main(["plan", str(config), "--world-size", "3"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert ("forward pass with it up to 22 samples" in printed) == (micro_size is None)


def test_a_batch_is_changed_only_where_the_whole_band_speaks_for_it():
    run = digits(**ADAPTIVE)
    meter = NoiseMeter(resolve(run, 1438), ["weight"])
    one = torch.tensor([[1.0], [0.0]], dtype=torch.float64)

    def fill(noise_scale, updates=100):
        meter.noise = type(meter.noise)(["weight"], meter.length_samples)
        for number in range(updates):
            signal = 1.0 + 0.01 * (-1) ** number  # a narrow band
            trace, size = noise_scale * signal, 8
            mean_square = signal + trace / size
            meter.noise.update(
                torch.stack([one[0] * mean_square, one[0] * (trace * (size - 1) / size + mean_square) / size]), size
            )
        assert meter.noise.whole.noise_scale == pytest.approx(noise_scale, rel=1e-2)

    fill(100.0)
    assert meter.next_batch_size(8, 400, 392) == 16
    assert meter.next_batch_size(8, 399, 392) == 8  # not asked between two decisions
    assert meter.next_batch_size(64, 400, 336) == 64  # batch.max_size
    fill(7.0)  # times critical_share 2: between half and twice of 16
    assert meter.next_batch_size(16, 400, 384) == 16
    fill(2.0)
    assert meter.next_batch_size(16, 400, 384) == 8
    assert meter.next_batch_size(8, 400, 392) == 8  # batch.size is the smallest
    fill(100.0, updates=4)  # too few to have a band
    assert meter.next_batch_size(8, 400, 392) == 8


def test_a_last_batch_of_one_sample_is_left_out(tmp_path):
    flags = {
        "batch.reference_size": 8,
        "batch.size": 8,
        "optimizer.lr": 0.005,
        "warmup.name": "none",
        "warmup.epochs": 0,
    }
    run = digits(**flags, **{"noise.measure": True, "schedule.name": "constant", "schedule.epochs": 81 / 1438})
    updates, _ = rows_of(run, tmp_path / "run")
    assert [row["samples"] for row in updates[-2:]] == [80, 81]
    assert all(updates[-1][name] == updates[-2][name] for name in ("gradient_variance", "gradient_signal"))


def test_adascale_multiplies_the_rate_by_its_gain_and_ends_on_its_clock(tmp_path):
    step = {
        "schedule.name": "step",
        "schedule.milestones_epochs": [0.5],
        "schedule.factor": 0.1,
    }
    run = digits(**step | ADASCALE)
    updates, _ = rows_of(run, tmp_path / "run")
    clock = 0.0
    for row in updates:
        gain = row["gain"]
        assert 1.0 <= gain <= 8.0
        assert row["lr"] == pytest.approx(0.01 * gain * (0.1 if clock >= 719 else 1.0), rel=1e-12)
        clock += gain * 16
        assert row["clock_samples"] == pytest.approx(clock, rel=1e-12)
    assert updates[-2]["clock_samples"] < 1438 <= updates[-1]["clock_samples"]
    assert 1438 / 128 < len(updates) < 1438 / 16
    first = updates[0]
    assert first["gain"] == pytest.approx(adascale_gain(first["gradient_variance"], first["gradient_signal"], 16, 128))


def test_progress_ends_at_100_percent_where_the_clock_steps_past_the_end(capsys):
    lines = ProgressLines(Console(width=200), total_samples=1000)
    lines.log({"val_loss": 0.5, "epoch": 2.0, "samples": 2560, "clock_samples": 1011.0})
    assert capsys.readouterr().out.split() == ["100%", "epoch", "2", "val", "0.5000", "0.0", "s", "left"]


def test_adascale_at_the_reference_batch_is_the_plain_run(tmp_path):
    flags = ADASCALE | {"batch.size": 16, "schedule.epochs": 0.5}
    ours, _ = rows_of(digits(**flags), tmp_path / "ours")
    plain, _ = rows_of(digits(**flags | {"scaling.rule": "linear"}), tmp_path / "plain")
    full = len(plain) - 1  # the clock does not cut the last batch short
    torch.testing.assert_close(column(ours[:full], "loss"), column(plain[:full], "loss"), rtol=1e-12, atol=0)


def test_a_batch_that_warms_up_doubles_to_its_size_with_the_rate_behind_it():
    """Merrill et al. 2025; and Seesaw (arXiv:2510.14717): under the square root rule a batch grows by a, the rate by 1/sqrt(a)."""
    warmup = Warmup("gradual", samples=800, start=1 / 8, realize="batch")
    plan = Plan(Reference(16, 1e-3, betas=(0.9, 0.999)), 128, 4000, 1000, Constant(), warmup)
    sizes = {plan.batch_size(samples) for samples in range(800)}
    assert sizes == {16, 32, 64} and plan.batch_size(800) == 128
    for samples in range(0, 1000, 50):
        wanted = 128 * warmup(samples)
        assert wanted / 2 < plan.batch_size(samples) <= wanted
        assert plan.at(samples)["lr"] == pytest.approx(1e-3 * plan.batch_size(samples) / 16)
    assert plan.num_updates() == sum(1 for _ in plan.updates()) == sum(stage.updates for stage in plan.stages())


def test_seesaw_is_a_growing_batch_under_the_square_root_rule():
    run = digits(**{
        "optimizer.name": "adamw", "optimizer.lr": 1e-3, "scaling.rule": "sqrt", "scaling.beta1": "keep",
        "scaling.beta2": "keep", "batch.reference_size": 32, "batch.size": 32, "schedule.name": "step",
        "schedule.milestones_epochs": [0.5, 1.0], "schedule.factor": 0.5, "schedule.realize": "batch",
        "schedule.epochs": 1.5, "warmup.name": "none", "warmup.epochs": 0,
    })  # fmt: skip
    stages = resolve(run, 1438).plan.stages()
    assert [stage.batch_size for stage in stages] == [32, 64, 128]
    assert [stage.lr_first for stage in stages] == pytest.approx([1e-3, 1e-3 / 2**0.5, 1e-3 / 2])
    assert all(stage.averaging["betas"] == (0.9, 0.999) for stage in stages)
