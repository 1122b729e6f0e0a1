"""Noise in a run: rows against a loop, ranks and resume alike, AdaScale's clock, batches that follow the noise."""

import itertools
import json

import matplotlib.pyplot as plt
import pytest
import torch
from rich.console import Console
from test_checkpoint import part_of_run
from test_trainer import digits, rows_of

from largebatch.cli import main
from largebatch.data.sampler import global_batch
from largebatch.distributed import Ranks
from largebatch.errors import UserError
from largebatch.noise.adascale import adascale_gain
from largebatch.planner.derive import tracked
from largebatch.planner.resolve import resolve
from largebatch.reporting.loggers import read_metrics
from largebatch.reporting.plots import _set_log
from largebatch.reporting.tables import ProgressLines
from largebatch.scaling.plan import Plan
from largebatch.scaling.rules import Reference
from largebatch.scaling.schedules import Constant, Warmup
from largebatch.studies.bench import variants
from largebatch.training.metering import NoiseMeter
from largebatch.training.run import build_model, train

MEASURED = ("noise_scale", "gradient_variance", "gradient_signal", "progress_per_update", "efficiency_per_sample")
ADAPTIVE = {
    "batch.reference_size": 8, "batch.size": 8, "batch.max_size": 64, "batch.growth": "adaptive",
    "batch.critical_share": 2.0, "noise.average_samples": 400, "warmup.name": "none", "warmup.epochs": 0,
    "optimizer.lr": 0.005, "schedule.name": "constant", "schedule.epochs": 1.5,
}  # fmt: skip
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


def test_the_noise_command_prints_and_draws_what_it_measured(tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(digits(**{"schedule.epochs": 1.0, "warmup.name": "none", "warmup.epochs": 0}).to_yaml())
    assert main(["noise", str(config), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert (
        "Gradient noise" in printed and "B_simple = tr(Sigma)/|G|^2" in printed and "efficiency per sample" in printed
    )
    last = next(line for line in printed.splitlines() if line.startswith("│ epoch 1 "))
    assert [part.strip() for part in last.split("│")][4] == "200"  # not the 38 samples of the last update
    assert (tmp_path / "out" / "curve.png").stat().st_size > 10_000
    updates, evaluations = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert updates[-1]["noise_scale"] > 0 and len(evaluations[-1]["noise_scale_by_layer"]) == 2


@pytest.mark.parametrize(("low", "high"), [(17.0, 900.0), (0.7, 1e5), (40.0, 70.0)])
def test_the_numbers_of_a_low_logarithmic_axis_stand_apart(low, high):
    figure, axis = plt.subplots(figsize=(8, 1.5))
    axis.set_ylim(low, high)
    _set_log(axis)
    figure.canvas.draw()
    ticks = [tick for which in ("major", "minor") for tick in axis.get_yticklabels(which=which) if tick.get_text()]
    boxes = [t.get_window_extent() for t in ticks if low <= t.get_position()[1] <= high]
    assert boxes and not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    plt.close(figure)


@pytest.mark.parametrize("growth", ["schedule", "adaptive"])
def test_a_batch_above_the_critical_one_is_said_once(growth, tmp_path):
    flags = {"noise.measure": True, "noise.average_samples": 2000, "batch.growth": growth}
    run = digits(**flags, **{"batch.size": 400, "schedule.epochs": 6.0})
    train(run, tmp_path / "run", ranks=Ranks())
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    said = [row["event"] for row in rows if "is above the critical batch size of" in row.get("event", "")]
    assert len(said) == 1 and said[0].startswith("batch size 400 ")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"batch.growth": "adaptive", "scaling.rule": "none"}, "batch.growth: adaptive needs a scaling.rule"),
        ({"batch.growth": "adaptive", "scaling.rule": "adascale"}, "batch.growth: adaptive needs a scaling.rule"),
        (
            {"noise.measure": True, "backend.squares_every": 2},
            "backend.squares_every: got 2, expected 1: the measured noise",
        ),
        (
            {"noise.measure": True, "noise.per": "sample", "batch.size": 1, "batch.reference_size": 1},
            "batch.size: noise.measure needs at least 2",
        ),
        (
            {"noise.measure": True, "batch.size": 1, "batch.reference_size": 1},
            "noise.per: micro_batch needs 2 micro-batches of an update or more over all ranks, got batch.size 1",
        ),
        (
            {"optimizer.name": "adamw", "optimizer.lr": 1e-3, "batch.size": 1},
            "optimizer.second_moment: micro_batch needs 2 micro-batches of an update or more over all ranks, got batch.size 1",
        ),
        (
            {"optimizer.name": "adamw", "optimizer.lr": 1e-3, "optimizer.second_moment": "sample", "batch.size": 1},
            "batch.size: optimizer.second_moment sample needs at least 2 samples an update, got 1",
        ),
        (
            {
                "optimizer.name": "quench",
                "optimizer.lr": 0.01,
                "optimizer.sigma2": "sample",
                "optimizer.K": 9,
                "batch.size": 1,
                "batch.reference_size": 1,
            },
            "batch.size: optimizer.sigma2 sample needs at least 2 samples an update, got 1",
        ),
        (
            {"warmup.name": "constant", "warmup.realize": "batch", "warmup.epochs": 0.5},
            "warmup.realize: batch needs warmup.name gradual",
        ),
        ({"warmup.realize": "batch", "warmup.start": 0.0}, "warmup.start: a batch cannot begin at 0 samples"),
        ({"scaling.rule": "adascale", "warmup.realize": "batch"}, "scaling.rule: adascale keeps the batch size"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(flags, message):
    with pytest.raises(UserError, match=message.replace(".", r"\.")) as error:
        resolve(digits(**flags), 1438)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "warning"),
    [
        ({"batch.critical_share": 2.0}, "batch.critical_share is not used"),
        ({"noise.average_samples": 100}, "noise.average_samples is not used"),
        ({"noise.per": "sample"}, "noise.per is not used"),
        ({"optimizer.max_grad_norm_of": "batch"}, "optimizer.max_grad_norm_of is not used"),
        ({"optimizer.max_grad_norm": 1.0}, "bounds the norm of the batch's own gradient"),
        (
            {
                "optimizer.name": "adamw",
                "optimizer.lr": 0.01,
                "optimizer.betas": [0.9, 0.8],
                "scaling.beta2": "half_life",
            },
            "kappa*(1-beta) = 1.25 > 1",
        ),
        ({"optimizer.name": "adamw", "optimizer.lr": 0.01}, "was measured up to 0.016"),
        ({"optimizer.name": "adamw", "optimizer.lr": 0.001}, "6.25 times the reference from the first update"),
    ],
)
def test_what_should_be_known_before_is_a_warning(flags, warning):
    warnings = resolve(digits(**flags), 1438).warnings
    assert any(warning in line for line in warnings), warnings


SGD, ADAMW = {}, {"optimizer.name": "adamw", "optimizer.lr": 1e-3}


@pytest.mark.parametrize("flags", [pytest.param(SGD, marks=pytest.mark.slow), ADAMW], ids=["sgd", "adamw"])
def test_bench_times_a_config_with_and_without_squares(flags, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(digits(**flags, **{"precision": "fp32", "batch.size": 20}).to_yaml())
    assert main(["bench", str(config), "--updates", "1", "--batch.size", "1"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("none") == 1 and "│ samples " not in printed and "micro-batches" not in printed
    assert main(["bench", str(config), "--updates", "1"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("none") == printed.count("│ samples ") == 2 and printed.count("micro-batches") == 1
    assert list(tmp_path.iterdir()) == [config]  # nothing is written


@pytest.mark.parametrize(
    "flags",
    [
        {"batch.size": 479, "schedule.epochs": 1.0},  # 1438 = 3 * 479 + 1
        {"batch.size": 479, "schedule.epochs": 1.0, "batch.at_epoch_end": "cut", "batch.reference_size": 479},
        {"noise.per": "micro_batch", "batch.micro_size": 50, "schedule.epochs": 1.0},  # 38 at the end: one micro-batch
        {"warmup.realize": "batch", "batch.micro_size": 32, "noise.per": "micro_batch", "batch.size": 256},
    ],
    ids=["carry", "cut", "one micro-batch", "warm-up"],
)
@pytest.mark.parametrize("rule", ["linear", "adascale"])
def test_an_update_of_one_unit_says_nothing_and_stops_nothing(rule, flags, tmp_path):
    if rule == "adascale" and "warmup.realize" in flags:
        pytest.skip("adascale keeps the batch size")
    updates, _ = rows_of(digits(**flags, **{"noise.measure": True, "scaling.rule": rule}), tmp_path / "run")
    assert updates[-1]["noise_scale"] is None or updates[-1]["noise_scale"] > 0


def branch(source, folder, flags):
    """Continue a run from its newest checkpoint in a folder of its own."""
    return train(digits(**flags), folder, ranks=Ranks(), resume=str(source)).summary


@pytest.fixture(scope="module")
def half_runs(tmp_path_factory):
    """Return a function from flags to the folder of a run that was stopped half way."""
    folders = {}

    def half(flags):
        key = json.dumps(flags)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("half") / "run"
            part_of_run(0, 1, digits(**flags, **{"checkpoint.every_minutes": None}), folders[key], 6)
        return folders[key]

    return half


BRANCHED = {"batch.reference_size": 16, "batch.size": 64, "optimizer.lr": 0.01, "warmup.name": "none", "warmup.epochs": 0,
            "schedule.epochs": 1.0}  # fmt: skip
ADAMW = {"optimizer.name": "adamw", **BRANCHED, "optimizer.lr": 1e-3}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (BRANCHED, {"noise.measure": True}),
        (BRANCHED | {"noise.measure": True}, {"noise.measure": False}),
        (BRANCHED, {"batch.growth": "adaptive"}),
        (BRANCHED | {"batch.growth": "adaptive"}, {"batch.growth": "schedule"}),
        (ADAMW | {"optimizer.second_moment": "batch"}, {"optimizer.second_moment": "batch", "noise.measure": True}),
        (ADAMW | {"optimizer.second_moment": "batch"}, {"optimizer.second_moment": "sample"}),
        (ADAMW | {"optimizer.second_moment": "sample"}, {"optimizer.second_moment": "batch"}),
    ],
)
def test_a_branch_may_begin_or_cease_to_track_squares(before, after, half_runs, tmp_path):
    summary = branch(half_runs(before), tmp_path / "new", before | after)
    assert summary.status == "finished" and summary.samples == 1438


@pytest.mark.parametrize("measured", [False, True])
def test_a_branch_into_adascale_finds_its_clock_where_the_run_stands(measured, half_runs, tmp_path):
    folder = half_runs(BRANCHED | {"noise.measure": measured})
    branch(folder, tmp_path / "new", BRANCHED | {"scaling.rule": "adascale"})
    updates, _ = read_metrics(tmp_path / "new" / "metrics.jsonl")
    begun = updates[0]["samples"] - 64
    assert begun > 0 and updates[0]["clock_samples"] == pytest.approx(begun + 16 * updates[0]["gain"])
    assert updates[-1]["clock_samples"] >= 1438


def test_a_branch_out_of_adascale_is_refused(half_runs, tmp_path):
    folder = half_runs(BRANCHED | {"scaling.rule": "adascale"})
    with pytest.raises(UserError, match="stands on AdaScale's clock"):
        branch(folder, tmp_path / "new", BRANCHED)


@pytest.mark.parametrize(("key", "value"), [("batch.max_size", 16), ("batch.size", 128)])
def test_a_branch_brings_an_adaptive_batch_within_its_limits(key, value, half_runs, tmp_path):
    folder = half_runs(ADAPTIVE | {"batch.critical_share": 100.0, "noise.average_samples": 80, "batch.max_size": 64})
    limits = {"batch.max_size": 256, key: value} if key == "batch.size" else {key: value}
    flags = ADAPTIVE | {"batch.critical_share": 100.0, "noise.average_samples": 80} | limits
    branch(folder, tmp_path / "new", flags)
    sizes = [row["batch_size"] for row in read_metrics(tmp_path / "new" / "metrics.jsonl")[0][:-1]]
    assert max(sizes) <= 16 if key == "batch.max_size" else min(sizes) >= 128


@pytest.mark.parametrize(
    ("flags", "warning"),
    [
        ({"noise.measure": True, "noise.average_samples": 900}, "is less than five updates of 200 samples"),
        ({"batch.growth": "adaptive", "batch.max_size": 300}, "the batch cannot double from 200"),
        (
            {"batch.growth": "adaptive", "batch.max_size": 300, "batch.size": 16},
            "stops at a tenth of the training set, 143",
        ),
        ({"scaling.rule": "adascale", "optimizer.name": "adamw", "optimizer.lr": 1e-3}, "is derived for SGD"),
        ({"scaling.rule": "adascale", "optimizer.name": "lars", "optimizer.lr": 1.0}, "is derived for SGD; with lars"),
    ],
)
def test_what_the_noise_cannot_do_is_a_warning(flags, warning):
    run = resolve(digits(**flags), 1438)
    assert any(warning in line for line in run.warnings), run.warnings
    assert run.largest_batch == run.config.batch.size or run.largest_batch <= 143


def test_a_coefficient_that_is_given_averages_whatever_the_batch():
    adamw = {"optimizer.name": "adamw", "optimizer.lr": 1e-3, "optimizer.betas": [0.9, 0.8]}  # 6.25 * (1 - 0.8) > 1
    warnings = resolve(digits(**adamw, **{"scaling.beta2": 0.95}), 1438).warnings
    assert not any("no longer averages" in line for line in warnings)


def test_samples_of_a_norm_group_are_not_independent():
    run = digits(**{"model.name": "cnn", "noise.measure": True, "noise.per": "sample", "batch.size": 256})
    assert any("are not independent" in line for line in resolve(run, 1438, group_size=32).warnings)
    assert not any("are not independent" in line for line in resolve(run, 1438).warnings)


@pytest.mark.parametrize(
    "flags",
    [
        {"schedule.name": "step", "schedule.epochs": 1.5, "schedule.milestones_epochs": [0.5], "schedule.factor": 0.5,
         "schedule.realize": "batch", "batch.at_epoch_end": "cut"},
        {"warmup.realize": "batch", "backend.squares_every": 2},
        {"optimizer.name": "quench", "optimizer.lr": 0.02, "optimizer.K": 500, "optimizer.sigma2": "sample"},
        {"batch.growth": "adaptive", "batch.max_size": 400},
        {"optimizer.name": "adamw", "optimizer.lr": 1e-3, "backend.squares_every": 8},
    ],
    ids=["growing", "warm-up", "quench", "adaptive", "variance of every eighth update"],
)  # fmt: skip
def test_bench_takes_any_config(flags):
    runs = variants(digits(**flags))
    assert [tracked(run) for run in runs.values()] == [None, "sample", "micro_batch"]
    for run in runs.values():
        batch = run.batch.model_copy(update={"micro_size": 50})
        plan = resolve(run.model_copy(update={"batch": batch}), 1438).plan
        assert {size for _, size in plan.updates()} <= {200, 38, 157}
