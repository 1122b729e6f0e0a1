"""The noise command and the benchmark, and what measuring and following the noise refuses or warns of."""

import itertools
import json

import matplotlib.pyplot as plt
import pytest
from measured import ADAPTIVE
from resumed import part_of_run
from runs import digits, rows_of

from largebatch.cli import main
from largebatch.distributed import Ranks
from largebatch.errors import UserError
from largebatch.planner.derive import tracked
from largebatch.planner.resolve import resolve
from largebatch.reporting.loggers import read_metrics
from largebatch.reporting.plots import _set_log
from largebatch.studies.bench import variants
from largebatch.training.run import train


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


def test_a_noise_command_that_is_not_to_measure_is_refused(capsys):
    assert main(["noise", "configs/digits.yaml", "--noise.measure", "false"]) == 2
    assert "--noise.measure: noise is there to measure: leave the flag out" in capsys.readouterr().err
