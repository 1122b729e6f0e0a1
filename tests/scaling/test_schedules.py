"""Schedules and the plan of a run, against closed forms and the counts that papers publish."""

import bisect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from largebatch.scaling import schedules
from largebatch.scaling.plan import Plan
from largebatch.scaling.rules import Reference
from largebatch.scaling.schedules import Constant, Cosine, Polynomial, Step, Warmup, realized_batch_size

CIFAR, IMAGENET = 50_000, 1_281_167
SMITH_STEPS = schedules.Step(tuple(e * CIFAR for e in (60, 120, 160)), 0.2)
GOYAL_STEPS = schedules.Step(tuple(e * IMAGENET for e in (30, 60, 80)), 0.1)


def smith(batch_size: int, momentum: float = 0.9, **kwargs) -> Plan:
    reference = Reference(128, 0.1, momentum=0.9, momentum_rule=momentum)
    return Plan(reference, batch_size, 200 * CIFAR, CIFAR, SMITH_STEPS, **kwargs)


@pytest.mark.parametrize(
    ("plan", "published", "batch_sizes"),
    [
        (smith(128), "78.1k", [128] * 4),
        (smith(128, realize="batch_then_lr", max_batch_size=5120), "29.1k", [128, 640, 3200, 5120]),
        (smith(640, realize="batch_then_lr", max_batch_size=5120), "6.4k", [640, 3200, 5120, 5120]),
        (smith(3200, 0.98, realize="batch_then_lr", max_batch_size=5120), "2.3k", [3200, 5120, 5120, 5120]),
    ],
    ids=["decaying lr", "increasing batch", "initial lr 0.5", "momentum 0.98"],
)
def test_smith_update_counts(plan, published, batch_sizes):
    """Smith et al. 2018, CIFAR-10, 200 epochs: the published numbers of parameter updates."""
    stages = plan.stages()
    assert [stage.batch_size for stage in stages] == batch_sizes
    assert f"{sum(stage.updates for stage in stages) / 1000:.1f}k" == published
    assert sum(stage.samples for stage in stages) == 200 * CIFAR
    assert plan.num_updates() == sum(stage.updates for stage in stages)
    # All four follow one temperature.
    for stage in stages:
        expected = 0.1 / (0.1 * 128) * SMITH_STEPS(stage.first_sample)
        assert plan.temperature(stage.first_sample) == pytest.approx(expected, rel=1e-12)


def test_smith_rates_stay_while_the_batch_grows():
    stages = smith(128, realize="batch_then_lr", max_batch_size=5120).stages()
    assert [stage.lr_first for stage in stages] == pytest.approx([0.1, 0.1, 0.1, 0.1 * 0.2 * 1.6])


def test_goyal_8k():
    plan = Plan(
        Reference(256, 0.1, momentum=0.9),
        8192,
        90 * IMAGENET,
        IMAGENET,
        GOYAL_STEPS,
        Warmup("gradual", 5 * IMAGENET, 1 / 32),
    )
    assert plan.at(0) == pytest.approx({"lr": 0.1, "momentum": 0.9})
    stages = plan.stages()
    # Each stage begins with the first update at or after its boundary: at most one update late.
    assert [round(stage.first_sample / IMAGENET, 2) for stage in stages] == pytest.approx(
        [0, 5, 30, 60, 80], abs=0.0064
    )
    assert [stage.lr_last for stage in stages[1:]] == pytest.approx([3.2, 0.32, 0.032, 0.0032])
    assert stages[0].lr_last == pytest.approx(3.2, rel=1 / 700)
    assert plan.num_updates() == math.ceil(90 * IMAGENET / 8192) == 14_076
    # Linear per update (Goyal section 2.2): equal increments.
    lrs = [plan.at(k * 8192)["lr"] for k in range(700)]
    assert torch.tensor(lrs, dtype=torch.float64).diff().std() < 1e-12


TOTAL = 1000
SHAPES = {
    "constant": (schedules.Constant(), lambda s: 1.0),
    "step": (schedules.Step((300, 600), 0.5), lambda s: 1.0 if s < 300 else 0.5 if s < 600 else 0.25),
    "linear": (schedules.Polynomial(TOTAL, final=0.1), lambda s: 1 - 0.9 * s / TOTAL),
    "polynomial": (schedules.Polynomial(TOTAL, 2.0), lambda s: (1 - s / TOTAL) ** 2),
    "cosine": (schedules.Cosine(TOTAL, 0.2), lambda s: 0.2 + 0.8 * math.cos(math.pi * s / TOTAL / 2) ** 2),
    "inverse sqrt": (schedules.InverseSqrt(100), lambda s: 1.0 if s <= 100 else 10 / math.sqrt(s)),
    "robbins-monro": (schedules.RobbinsMonro(100, 0.75), lambda s: (1 + s / 100) ** -0.75),
    "trapezoid": (schedules.Trapezoid(TOTAL, 250), lambda s: min(1.0, (TOTAL - s) / 250)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name):
    schedule, expected = SHAPES[name]
    for samples in range(0, TOTAL + 1, 7):
        assert schedule(samples) == pytest.approx(expected(samples), abs=1e-12)
    assert schedule(0) == 1.0


def test_library_schedules_agree():
    """The same curves from torch.optim.lr_scheduler, one step a sample."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    pairs = [
        (torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, TOTAL, eta_min=0.2), schedules.Cosine(TOTAL, 0.2)),
        (torch.optim.lr_scheduler.PolynomialLR(optimizer, TOTAL, power=2.0), schedules.Polynomial(TOTAL, 2.0)),
        (torch.optim.lr_scheduler.MultiStepLR(optimizer, [300, 600], 0.5), schedules.Step((300, 600), 0.5)),
        (torch.optim.lr_scheduler.LinearLR(optimizer, 0.25, 1.0, 500), Warmup("gradual", 500, 0.25)),
    ]
    for theirs, ours in pairs:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] = 1.0
        theirs.base_lrs = [1.0]
        theirs.last_epoch = -1
        theirs._initial_step()
        for samples in range(600):
            assert ours(samples) == pytest.approx(theirs.get_last_lr()[0], abs=1e-9)  # theirs accumulates rounding
            optimizer.step()
            theirs.step()


@pytest.mark.parametrize("name", SHAPES)
def test_classical_conditions(name):
    """Only the Robbins-Monro schedule satisfies them; sums over 4 decades show why."""
    schedule, _ = SHAPES[name]
    at = [10**k for k in range(3, 8)]
    values = [schedule(s) for s in at]
    vanishes = values[-1] < 0.01
    # sum of f ~ integral: s*f(s) must not vanish; sum of f^2: s*f(s)^2 must vanish.
    diverges = at[-1] * values[-1] > 10 * at[0] * values[0] > 0
    squares_converge = at[-1] * values[-1] ** 2 < 0.5 * at[0] * values[0] ** 2
    assert schedule.robbins_monro == (vanishes and diverges and squares_converge)
    assert schedule.why


def test_robbins_monro_refuses_powers_outside_its_range():
    for power in (0.5, 1.01):
        with pytest.raises(ValueError, match="1/2 < p <= 1"):
            schedules.RobbinsMonro(10, power)


def test_warmups():
    gradual, constant = Warmup("gradual", 100, 0.25), Warmup("constant", 100, 0.25)
    assert [gradual(s) for s in (0, 50, 100, 500)] == [0.25, 0.625, 1.0, 1.0]
    assert [constant(s) for s in (0, 50, 99, 100)] == [0.25, 0.25, 0.25, 1.0]
    assert Warmup()(0) == 1.0


@given(
    st.floats(1e-4, 1.0),
    st.sampled_from(["lr", "batch", "batch_then_lr"]),
    st.integers(1, 64),
    st.integers(1, 100),
    st.integers(1, 32),
)
def test_a_realized_batch_size_holds_its_bounds(factor, realize, groups, growth, multiple_of):
    start, limit = groups * multiple_of, groups * multiple_of * growth
    size = realized_batch_size(factor, realize, start, limit, multiple_of)
    assert size % multiple_of == 0 and start <= size <= limit
    if realize == "lr":
        assert size == start
    else:
        assert abs(size - min(start / factor, limit)) <= multiple_of / 2 + 1e-9


@given(
    st.sampled_from(["lr", "batch", "batch_then_lr"]),
    st.sampled_from(list(SHAPES)),
    st.integers(1, 50),
    st.floats(0, 0.95),
)
def test_every_realization_has_the_schedules_temperature(realize, shape, size, momentum):
    schedule = SHAPES[shape][0]
    reference = Reference(4, 0.1, momentum=momentum)
    plan = Plan(reference, size, TOTAL, 250, schedule, realize=realize, max_batch_size=400)
    eta0 = 0.1 / ((1 - momentum) * 4)
    seen = 0
    for samples_seen, batch_size in plan.updates():
        assert samples_seen == seen
        assert plan.temperature(samples_seen) == pytest.approx(eta0 * schedule(samples_seen), rel=1e-9)
        seen += batch_size
    assert seen == TOTAL
    assert sum(s.samples for s in plan.stages()) == TOTAL
    assert sum(s.updates for s in plan.stages()) == plan.num_updates() == sum(1 for _ in plan.updates())


def test_seesaw_is_the_square_root_rule_realized_by_the_batch():
    """Where the temperature would fall by a, plain Adam's lr falls by sqrt(a) and the batch grows by a (arXiv:2510.14717)."""
    schedule = schedules.Step((500,), 0.25)
    plan = Plan(Reference(8, 1e-3, betas=(0.9, 0.999), rule="sqrt"), 8, 2000, 1000, schedule, realize="batch")
    assert plan.batch_size(1000) == 32
    assert plan.at(1000)["lr"] == pytest.approx(1e-3 / 2)


def test_an_epoch_that_is_cut_ends_with_its_own_rate():
    plan = Plan(Reference(10, 0.1), 40, 200, 100, at_epoch_end="cut")
    assert list(plan.updates()) == [(0, 40), (40, 40), (80, 20), (100, 40), (140, 40), (180, 20)]
    assert plan.at(80)["lr"] == pytest.approx(0.2)
    assert plan.num_updates() == 6
    carried = Plan(Reference(10, 0.1), 40, 210, 100)
    assert [size for _, size in carried.updates()] == [40, 40, 40, 40, 40, 10]


def test_a_temperature_of_zero_needs_an_infinite_batch():
    with pytest.raises(ValueError, match="set max_batch_size"):
        realized_batch_size(0.0, "batch", 8)


def walked(plan):
    """The stages of a plan, update by update: (first sample, samples, updates, batch size, start of the last full update)."""
    breaks = sorted({*plan.schedule.breakpoints(), *plan.warmup.breakpoints()})
    rows = []
    for samples_seen, size in plan.updates():
        full, segment = plan.full_batch_size(samples_seen), bisect.bisect_right(breaks, samples_seen)
        if not rows or rows[-1][3] != full or rows[-1][5] != segment:
            rows.append([samples_seen, 0, 0, full, samples_seen, segment])
        rows[-1][1] += size
        rows[-1][2] += 1
        if size == full:
            rows[-1][4] = samples_seen
    return [tuple(row[:5]) for row in rows]


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_stages_are_those_of_a_walk_over_all_updates(data):
    draw = data.draw
    num_train, total = draw(st.integers(5, 300)), draw(st.integers(1, 1500))
    milestones = tuple(sorted(draw(st.sets(st.integers(1, 1600), min_size=1, max_size=3))))
    schedule = draw(
        st.sampled_from(
            [Constant(), Step(milestones, 0.2), Cosine(total, 0.1), Cosine(total), Polynomial(total, 2, 0.05)]
        )
    )
    realize = draw(st.sampled_from(["lr", "batch"]))
    length, start = draw(st.integers(1, total)), draw(st.floats(0.05, 0.9))
    warmup = draw(
        st.sampled_from([Warmup(), Warmup("gradual", length, start, realize), Warmup("constant", length, start)])
    )
    growth = tuple(sorted(draw(st.lists(st.tuples(st.integers(0, 1600), st.integers(1, 90)), max_size=3))))
    size = draw(st.integers(8, 60))
    plan = Plan(
        Reference(8, 0.1, momentum=0.9),
        size,
        total,
        num_train,
        schedule,
        warmup,
        realize,
        draw(st.sampled_from([None, 200])),
        draw(st.sampled_from([1, 4, 8])),
        draw(st.sampled_from(["carry", "cut"])),
        growth,
    )
    expected = walked(plan)
    stages = [(s.first_sample, s.samples, s.updates, s.batch_size) for s in plan.stages()]
    assert stages == [row[:4] for row in expected]
    assert plan.num_updates() == sum(row[2] for row in expected)
    assert [s.lr_last for s in plan.stages()] == [plan.at(row[4])["lr"] for row in expected]


@pytest.mark.parametrize("at_epoch_end", ["carry", "cut"])
def test_a_plan_of_any_length_is_known_at_once(at_epoch_end):
    num_train = 10**13
    schedule, warmup = Step((30 * num_train, 60 * num_train), 0.1), Warmup("gradual", 5 * num_train, 1 / 32)
    plan = Plan(Reference(256, 0.1), 8192, 90 * num_train, num_train, schedule, warmup, at_epoch_end=at_epoch_end)
    assert plan.num_updates() == (90 * -(-num_train // 8192) if at_epoch_end == "cut" else -(-90 * num_train // 8192))
    assert [stage.first_sample // num_train for stage in plan.stages()] == [0, 5, 30, 60]
