"""LARS, LAMB and Quench chosen in a config, and optimizers over a tracked model of which no squares are asked."""

import copy

import pytest
import torch
from resumed import OFTEN, assert_same_bits, in_parts
from runs import assert_same_curve, digits
from torch import nn

import largebatch
from largebatch import optim
from largebatch.distributed import Ranks
from largebatch.planner.derive import reference, tracked
from largebatch.planner.resolve import resolve
from largebatch.training.run import build_model

SHORT = {"schedule.epochs": 0.9, "warmup.name": "none", "evaluate.every_epochs": 0.5}
QUENCH = SHORT | {"optimizer.name": "quench", "optimizer.lr": 0.01, "optimizer.K": 500, "optimizer.eps": 1e-6,
                  "optimizer.weight_decay": 1e-3}  # fmt: skip
RUNS = {
    "lars": SHORT | {"optimizer.name": "lars", "optimizer.lr": 1.0, "optimizer.trust_coefficient": 0.01,
                     "optimizer.momentum": 0.9, "optimizer.weight_decay": 1e-3},
    "lamb, plain, square root": SHORT | {"optimizer.name": "lamb", "optimizer.lr": 0.01, "scaling.rule": "sqrt"},
    "lamb, squares of samples": SHORT | {"optimizer.name": "lamb", "optimizer.lr": 2e-3, "optimizer.second_moment": "sample",
                                         "optimizer.weight_decay": 0.01},
    "quench, average": QUENCH,
    "quench, squares of samples": QUENCH | {"optimizer.sigma2": "sample"},
}  # fmt: skip


def _train_on_rank(rank, world_size, run):
    """Return the rows of the losses; no folder, so they come from the trainer itself."""
    from largebatch.distributed import create_backend
    from largebatch.training.trainer import Trainer

    source, rows = run.data.load(run.seed), []
    model = build_model(run, source.task)
    resolved = resolve(run, len(source.train), world_size)
    backend = create_backend(run.backend, run.precision, Ranks(rank, rank, world_size))
    logger = type("Rows", (), {"log": lambda self, row: rows.append(row)})()
    Trainer(resolved, source, model, backend, logger=logger).train()
    backend.close()
    return [row for row in rows if "loss" in row], [row for row in rows if "val_loss" in row]


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_are_one_and_the_loss_falls(name, rank_pool):
    run = digits(**RUNS[name])
    updates, _ = expected = _train_on_rank(0, 1, run)
    assert len(updates) == 7 and updates[-1]["loss"] < updates[0]["loss"]
    assert_same_curve(rank_pool(2, _train_on_rank, run)[0], expected, 1e-10)


def test_quench_moves_nothing_for_k_samples():
    ours, never = (_train_on_rank(0, 1, digits(**QUENCH | {"optimizer.K": K}))[0] for K in (1000, 1290))
    assert [a["loss"] == b["loss"] for a, b in zip(ours, never, strict=True)] == [True] * 6 + [False]


@pytest.mark.parametrize("name", ["quench, average", "quench, squares of samples"])
def test_quench_resumed_is_quench_that_was_not_stopped(name, rank_pool, tmp_path):
    run = digits(**(RUNS[name] | OFTEN | {"precision": "fp32"}))
    in_parts(rank_pool, run, tmp_path / "whole", [(1, None, None)])
    in_parts(rank_pool, run, tmp_path / "parts", [(1, 4, None), (1, None, None)])
    assert_same_bits(tmp_path / "parts", tmp_path / "whole")


def test_no_rule_scales_quench():
    """Nothing of it follows the batch size, and the resolved config says so and can be read again."""
    run = digits(**QUENCH)
    assert run.scaling.rule == "none" and reference(run).at(32) == reference(run).at(3200) == {"lr": 0.01}
    assert type(run).model_validate(run.model_dump(mode="json")) == run
    assert type(run)(**{name: getattr(run, name) for name in run.model_fields_set - {"scaling"}}).scaling.rule == "none"
    assert not any("scaling.rule" in line for line in resolve(run, 1438).warnings)


def test_an_adaptive_batch_needs_no_rule_for_quench():
    adaptive = {"schedule.name": "constant", "batch.size": 16, "batch.max_size": 64, "batch.growth": "adaptive",
                "batch.critical_share": 20.0, "noise.average_samples": 400}  # fmt: skip
    updates, _ = _train_on_rank(0, 1, digits(**adaptive | QUENCH))
    assert {row["batch_size"] for row in updates[:-1]} == {16, 32, 64} and {row["lr"] for row in updates} == {0.01}


def test_a_growing_batch_needs_no_rule_for_quench():
    """eta/B is per sample, so at K samples and beyond a growing batch lowers the temperature as a falling rate does."""
    growing = {
        "schedule.name": "step",
        "schedule.milestones_epochs": [1],
        "schedule.factor": 0.5,
        "schedule.realize": "batch",
    }
    run = digits(**growing | QUENCH | {"schedule.epochs": 2, "batch.size": 100})
    plan = resolve(run, 1438).plan
    assert [(stage.batch_size, stage.lr_first) for stage in plan.stages()][-1] == (200, 0.005)
    updates, _ = _train_on_rank(0, 1, run)
    assert updates[-1]["loss"] < updates[0]["loss"]


@pytest.mark.parametrize("name", RUNS)
def test_what_is_tracked(name):
    assert tracked(digits(**RUNS[name])) == ("sample" if "samples" in name else None)


def tracked_pair():
    """Return a model, the same one tracked, and samples."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    tracked = copy.deepcopy(plain)
    largebatch.track(tracked)
    return plain, tracked, torch.randn(12, 5, dtype=torch.float64), torch.randn(12, 3, dtype=torch.float64)


def steps(model, optimizer, inputs, targets, count=5, closure=False):
    def loss():
        optimizer.zero_grad()
        value = (model(inputs) - targets).square().sum(1).mean()
        value.backward()
        return value

    for _ in range(count):
        if closure:
            optimizer.step(loss)
        else:
            loss()
            optimizer.step()
    return [value.clone() for value in model.state_dict().values()]


@pytest.mark.parametrize("closure", [False, True], ids=["", "closure"])
@pytest.mark.parametrize(
    "options",
    [{}, {"nesterov": True}, {"foreach": True}, {"fused": True}, {"form": "velocity"}, {"form": "average"}],
    ids=str,
)
def test_sgd_passes_shadows_over(options, closure):
    plain, tracked, *batch = tracked_pair()
    theirs = {key: value for key, value in options.items() if key != "form"}
    expected = steps(plain, torch.optim.SGD(optim.param_groups(plain, 0.1), 0.05, 0.9, **theirs), *batch)
    before = {name: shadow.detach().clone() for name, shadow in largebatch.moments.shadows(tracked).items()}
    optimizer = optim.SGD(optim.param_groups(tracked, 0.1), 0.05, 0.9, **options)
    torch.testing.assert_close(steps(tracked, optimizer, *batch, closure=closure), expected, rtol=1e-12, atol=1e-13)
    for name, shadow in largebatch.moments.shadows(tracked).items():
        assert torch.equal(shadow, before[name]) and shadow not in optimizer.state and shadow.grad.any()
    optimizer.zero_grad()
    assert all(shadow.grad is None for shadow in largebatch.moments.shadows(tracked).values())
    assert [optim.is_shadow_group(group) for group in optimizer.param_groups] == [True, False, True, False]


def test_the_state_of_sgd_over_shadows_is_loaded_again():
    _, tracked, *batch = tracked_pair()
    twin = copy.deepcopy(tracked)
    make = lambda model: optim.SGD(optim.param_groups(model, 0.1), 0.05, 0.9)  # noqa: E731
    optimizer, resumed = make(tracked), make(twin)
    steps(tracked, optimizer, *batch, count=3)
    twin.load_state_dict(tracked.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for ours, theirs in zip(steps(twin, resumed, *batch), steps(tracked, optimizer, *batch), strict=True):
        assert torch.equal(ours, theirs)


PLAIN = {
    "adagrad": (lambda g: optim.Adagrad(g, 0.01, reference_batch_size=2), lambda g: torch.optim.Adagrad(g, 0.01)),
    "rmsprop": (lambda g: optim.RMSProp(g, 0.01, reference_batch_size=2), lambda g: torch.optim.RMSprop(g, 0.01)),
    "adam": (lambda g: optim.Adam(g, 0.01), lambda g: torch.optim.Adam(g, 0.01)),
    "adamw": (lambda g: optim.AdamW(g, 0.01, reference_batch_size=2), lambda g: torch.optim.AdamW(g, 0.01)),
    "lamb": (lambda g: optim.LAMB(g, 0.01, reference_batch_size=2), lambda g: optim.LAMB(g, 0.01)),
    "quench": (lambda g: optim.Quench(g, K=24), lambda g: optim.Quench(g, K=24)),
}


@pytest.mark.parametrize("name", PLAIN)
def test_squares_that_are_only_measured_enter_no_second_moment(name):
    plain, tracked, *batch = tracked_pair()
    mine, theirs = PLAIN[name]
    expected, ours = theirs(optim.param_groups(plain, 0.1)), mine(optim.param_groups(tracked, 0.1, squares=False))
    for optimizer in (expected, ours):
        if name == "quench":
            optimizer.set_batch(12)
    shadows = largebatch.moments.shadows(tracked)
    before = {key: shadow.detach().clone() for key, shadow in shadows.items()}
    weights = steps(tracked, ours, *batch)
    torch.testing.assert_close(weights, steps(plain, expected, *batch), rtol=1e-12, atol=1e-13)
    for key, shadow in shadows.items():
        assert torch.equal(shadow, before[key]) and shadow.grad.any()
