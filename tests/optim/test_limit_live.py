"""The share of the largest stable step, measured while an optimizer trains."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from damping import LIMITS, quadratic
from loops import build, equal
from resumed import part_of_run
from runs import digits, rows_of
from test_damping import MAKERS, on_rank, train
from torch import nn

from largebatch import batch_size_invariant, optim
from largebatch.distributed import Ranks
from largebatch.reporting.loggers import read_metrics
from largebatch.reporting.plots import plot_run


def trained_on_a_quadratic(make, beta, kappa, updates, **options):
    """Return the optimizer after so many updates on directions whose largest stable kappa are `LIMITS`, a parameter each."""
    generator = torch.Generator().manual_seed(0)
    h = 2 * (1 + beta) / (1 - beta) / LIMITS[:2]
    ws = [nn.Parameter(torch.randn(1_500, generator=generator).double() / math.sqrt(2 * float(c))) for c in h]
    optimizer = batch_size_invariant(make(ws), reference_batch_size=1, micro_batch_size=kappa // 2, **options)
    optimizer._watch.every = 8
    for update in range(updates):
        if update == updates // 2:
            optimizer._watch.meter.count = 0  # the average begins anew, in the stationary state
        for _ in range(2):
            noises = [torch.randn(len(w), generator=generator).double() * (2 / kappa) ** 0.5 for w in ws]
            pairs = zip(h, ws, noises, strict=True)
            sum((c * w * w / 2 + e * w).sum() / 2 for c, w, e in pairs).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def shares_of(limit):
    return torch.tensor(list(limit.by_name.values()), dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:the batch of")
@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_share_of_each_layer_is_that_of_its_curvature(name, beta):
    """Half of the limit of the steep layer and a quarter of the other; the whole lies between."""
    kappa = 8
    limit = trained_on_a_quadratic(quadratic(name, beta), beta, kappa, 400).limit
    r = expected = kappa / LIMITS[:2]
    for _ in range(50 if name == "adamw" else 0):  # the second moment holds the motion of the weights too
        r = expected / (1 + (1 + beta) / (1 - beta) * r / (1 - r) / kappa).sqrt()
    torch.testing.assert_close(shares_of(limit), r, rtol=0.08, atol=0.0)
    assert float(r[1]) < limit.share < float(r[0])
    assert limit.batch_size == pytest.approx(kappa / limit.share)


@pytest.mark.filterwarnings("ignore:the batch of")
def test_nesterovs_share_is_of_its_own_limit():
    """Which is 1 + 2b times nearer than that of plain momentum: about a third and a sixth of it."""
    limit = trained_on_a_quadratic(lambda ws: torch.optim.SGD(ws, 0.1, momentum=0.9, nesterov=True), 0.9, 2, 800).limit
    torch.testing.assert_close(shares_of(limit), 2 * (1 + 2 * 0.9) / LIMITS[:2], rtol=0.08, atol=0.0)


@pytest.mark.filterwarnings("ignore:the batch of")
def test_the_share_of_damped_steps_is_that_of_what_is_left():
    """At twice the limit of the steep layer, x/(1 + (1 - 1/kappa) x)."""
    x = 32 / LIMITS[:2]
    limit = trained_on_a_quadratic(quadratic("sgd", 0.9), 0.9, 32, 260, damping=True).limit
    torch.testing.assert_close(shares_of(limit), x / (1 + (1 - 1 / 32) * x), rtol=0.1, atol=0.0)


@pytest.mark.parametrize("name", MAKERS)
def test_measuring_changes_no_update(name):
    """Also where it is saved and taken up in the middle of a measurement."""
    model = build()
    optimizer = batch_size_invariant(MAKERS[name](model.parameters()), reference_batch_size=2, micro_batch_size=4)
    assert math.isnan(optimizer.limit.share)
    train(model, optimizer, updates := equal(2, 4, 31))
    assert 0 <= optimizer.limit.share < math.inf and len(optimizer.limit.by_name) == 4
    resumed, other = copy.deepcopy((optimizer, model))
    assert resumed.limit == optimizer.limit
    train(model, optimizer, updates)
    train(other, resumed, updates)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def limit_on_rank(rank, world_size, name):
    found = {}
    on_rank(
        rank, world_size, name, updates=34, damping=False, tell=lambda optimizer: found.update(limit=optimizer.limit)
    )
    return found["limit"]


def test_two_ranks_measure_what_one_does(rank_pool):
    model = build()
    optimizer = batch_size_invariant(MAKERS["adamw"](model.parameters()), reference_batch_size=2, micro_batch_size=4)
    train(model, optimizer, equal(4, 4, 34))
    for limit in rank_pool(2, limit_on_rank, "adamw"):
        assert limit.share == pytest.approx(optimizer.limit.share, rel=1e-9)
        assert limit.by_name == pytest.approx(optimizer.limit.by_name, rel=1e-9)


def test_of_other_optimizers_nothing_is_said():
    """Nor where updates have one backward pass."""
    for make, count in ((lambda p: optim.LARS(p, 0.1), 2), (MAKERS["sgd"], 1)):
        model = build()
        optimizer = batch_size_invariant(make(model.parameters()), reference_batch_size=2, micro_batch_size=4)
        train(model, optimizer, equal(count, 4, 34))
        assert math.isnan(optimizer.limit.share) and not optimizer.limit.by_name


LIVE = {
    "optimizer.name": "adamw", "optimizer.lr": 1e-2, "optimizer.max_grad_norm": 1.0, "batch.reference_size": 25, "batch.size": 100,
    "schedule.epochs": 4.0, "noise.measure": True, "noise.per": "micro_batch", "batch.micro_size": 25, "log.every_updates": 1,
}  # fmt: skip


def run_on_rank(rank, world_size, run, folder):
    return rows_of(run, folder, Ranks(rank, rank, world_size))


def test_a_run_logs_it_beside_the_critical_batch_size(rank_pool, tmp_path):
    """Whole in rows of updates, by layer in those of evaluations; the same on two ranks, and where the run was resumed."""
    run = digits(**LIVE)
    rows, evaluations = rows_of(run, tmp_path / "one")
    assert "stability_share" not in rows[6] and 0 <= rows[7]["stability_share"] < 1
    assert 0 < rows[-1]["stability_share"] < 1
    assert rows[-2]["stable_batch_size"] == pytest.approx(100 / rows[-2]["stability_share"])
    assert set(evaluations[-1]["stability_share_by_layer"]) == {"1", "3"}
    other, _ = rank_pool(2, run_on_rank, run, tmp_path / "two")[0]
    for updates in (20, 10**9):
        part_of_run(0, 1, run, tmp_path / "parts", updates)
    resumed, _ = read_metrics(tmp_path / "parts" / "metrics.jsonl")
    shares = [row["stability_share"] for row in rows[7:]]
    assert [row["stability_share"] for row in resumed[7:]] == shares
    assert [row["stability_share"] for row in other[7:]] == pytest.approx(shares, rel=1e-8)


def test_steps_near_the_largest_stable_ones_are_said_once_and_drawn(tmp_path):
    """Also where the run is resumed after it was said."""
    sgd = {"optimizer.name": "sgd", "optimizer.lr": 0.3, "optimizer.momentum": 0.9, "optimizer.max_grad_norm": None}
    run = digits(**LIVE | sgd)
    for updates in (40, 10**9):
        part_of_run(0, 1, run, tmp_path, updates)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    said = [row for row in rows if "of the largest stable one" in row.get("event", "")]
    assert len(said) == 1
    measured = [row for row in rows if "stability_share" in row and row["samples"] <= said[0]["samples"]][-1]
    assert f"takes {measured['stability_share']:.2f} of the largest" in said[0]["event"]
    assert plot_run(tmp_path, "digits", 1438).stat().st_size > 10_000
