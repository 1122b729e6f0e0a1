"""Second moments of the reference batch: limits, unbiasedness, scale, state."""

import copy
import math

import pytest
import torch
from torch import nn

import largebatch
import largebatch.moments
from largebatch import optim
from largebatch.data.sampler import effective_micro_batches
from largebatch.errors import UserError

B = 12


def problem(seed=0):
    """Return a small model, inputs (B, 5) and targets (B, 3), float64."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    return model, torch.randn(B, 5).double(), torch.randn(B, 3).double()


def sample_losses(model, inputs, targets):
    return (model(inputs) - targets).square().sum(dim=1)


def gradients(model, inputs, targets):
    """Return each sample's own gradient, by a loop: one list of tensors (B, ...) in the parameters' order."""
    params = [p for p in model.parameters() if not largebatch.moments.is_shadow(p)]
    rows = [
        torch.autograd.grad(sample_losses(model, x[None], y[None]).sum(), params)
        for x, y in zip(inputs, targets, strict=True)
    ]
    return [torch.stack(tensors) for tensors in zip(*rows, strict=True)]


def train(make, per, pieces, steps=20, wrap=lambda groups: groups):
    """Train a tracked model on micro-batches ``pieces`` (slices); return its weights after every step."""
    model, inputs, targets = problem()
    if per:
        largebatch.track(model, per=per)
    optimizer = make(wrap(optim.param_groups(model, weight_decay=0.1)))
    seen = []
    for _ in range(steps):
        for piece in pieces:
            (sample_losses(model, inputs[piece], targets[piece]).sum() / B).backward()
        units = B if per == "sample" else B**2 / sum((p.stop - p.start) ** 2 for p in pieces)
        if per:
            optimizer.set_batch(B, units)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(torch.cat([v.flatten() for v in model.state_dict().values()]))
    return torch.stack(seen)


WHOLE = [slice(0, B)]
MAKERS = {
    "adam": (lambda g, r: optim.Adam(g, 0.01, reference_batch_size=r), lambda g: torch.optim.Adam(g, 0.01)),
    "adamw": (lambda g, r: optim.AdamW(g, 0.01, reference_batch_size=r), lambda g: torch.optim.AdamW(g, 0.01)),
    "rmsprop": (lambda g, r: optim.RMSProp(g, 0.01, centered=True, reference_batch_size=r), lambda g: torch.optim.RMSprop(g, 0.01, centered=True)),
    "adagrad": (lambda g, r: optim.Adagrad(g, 0.01, reference_batch_size=r), lambda g: torch.optim.Adagrad(g, 0.01)),
}  # fmt: skip


@pytest.mark.parametrize("per", ["sample", "micro_batch"])
@pytest.mark.parametrize("name", MAKERS)
def test_at_its_own_batch_size_it_is_torch(name, per):
    ours, theirs = MAKERS[name]
    pieces = WHOLE if per == "sample" else [slice(0, 4), slice(4, 8), slice(8, 12)]
    expected = train(theirs, None, WHOLE)
    torch.testing.assert_close(train(lambda g: ours(g, B), per, pieces), expected, rtol=1e-10, atol=1e-12)


def by_hand(second_moment, weight_decay=0.1, steps=20):
    """AdamW written out, with second_moment(per-sample gradients (B, ...)) in the place of the squared gradient."""
    model, inputs, targets = problem()
    params = list(model.parameters())
    m = [torch.zeros_like(p) for p in params]
    s = [torch.zeros_like(p) for p in params]
    seen = []
    for t in range(1, steps + 1):
        rows = gradients(model, inputs, targets)
        with torch.no_grad():
            for p, g, mi, si in zip(params, rows, m, s, strict=True):
                if p.dim() > 1:
                    p.mul_(1 - 0.01 * weight_decay)
                mi.mul_(0.9).add_(0.1 * g.mean(0))
                si.mul_(0.999).add_(0.001 * second_moment(g))
                p.sub_(0.01 * (mi / (1 - 0.9**t)) / ((si / (1 - 0.999**t)).sqrt() + 1e-8))
        seen.append(torch.cat([v.flatten() for v in model.state_dict().values()]))
    return torch.stack(seen)


def test_reference_of_one_sample_is_the_lectures_form():
    """B_ref = 1: the average of squared per-sample gradients (McAllester)."""
    ours = train(lambda g: optim.AdamW(g, 0.01, reference_batch_size=1), "sample", WHOLE)
    torch.testing.assert_close(ours, by_hand(lambda g: g.square().mean(0)), rtol=1e-9, atol=1e-11)


def test_micro_batches_of_the_reference_size_are_wang_and_aitchison():
    """B_ref = m: the average of squared micro-batch gradients, without any correction."""
    pieces = [slice(k, k + 3) for k in range(0, B, 3)]
    ours = train(lambda g: optim.AdamW(g, 0.01, reference_batch_size=3), "micro_batch", pieces)
    expected = by_hand(lambda g: torch.stack([g[p].mean(0).square() for p in pieces]).mean(0))
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("reference", [2, 5])
def test_the_formula_between(reference):
    def s_ref(g):
        mean, q = g.mean(0), g.square().mean(0)
        variance = B / (B - 1) * (q - mean**2)
        return mean**2 + variance * (1 / reference - 1 / B)

    ours = train(lambda g: optim.AdamW(g, 0.01, reference_batch_size=reference), "sample", [slice(0, 5), slice(5, B)])
    torch.testing.assert_close(ours, by_hand(s_ref), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("pieces", [None, [4, 4, 4], [6, 3, 2, 1]])
@pytest.mark.parametrize("reference", [1, 4, 12, 30])
def test_the_estimate_is_unbiased(pieces, reference):
    """Its mean over many batches is E[g]^2 + sigma^2/B_ref, also beyond B and for micro-batches of unequal size."""
    trials, mean, deviation = 40_000, 0.3, 1.7
    generator = torch.Generator().manual_seed(7)
    g = mean + deviation * torch.randn(trials, B, generator=generator, dtype=torch.float64)
    ghat = g.mean(1)
    if pieces is None:
        units, squares = float(B), (g / B).square().sum(1)
    else:
        units = B**2 / sum(size**2 for size in pieces)
        squares = sum(part.sum(1).div(B).square() for part in g.split(pieces, dim=1))
    optimizer = optim.Adam([nn.Parameter(torch.zeros(1))], reference_batch_size=reference)
    optimizer.set_batch(B, units)
    shadow = nn.Parameter(torch.zeros(trials, dtype=torch.float64))
    shadow.grad = squares
    average = [torch.zeros(trials, dtype=torch.float64)]
    moment = optimizer._moment(optimizer.param_groups[0], [shadow])
    torch._foreach_addcmul_(average, [ghat], [ghat], 1.0 - moment.share)
    torch._foreach_add_(average, moment.squares, alpha=moment.share * moment.scale)
    estimate = average[0]
    expected = mean**2 + deviation**2 / reference
    assert estimate.mean().item() == pytest.approx(expected, abs=5 * estimate.std().item() / math.sqrt(trials))
    if reference > B:
        assert (estimate < 0).any(), "single estimates may be negative; only their average is clamped"


def test_an_average_is_never_negative():
    """B below B_ref: the estimate subtracts, the running average stops at zero."""
    p, shadow = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    groups = [{"params": [shadow], "role": "shadow"}, {"params": [p]}]
    optimizer = optim.Adam(groups, 0.1, reference_batch_size=100)
    p.grad, shadow.grad = torch.zeros(3), torch.ones(3)
    optimizer.set_batch(4)
    optimizer.step()
    assert (optimizer.state[p]["exp_avg_sq"] == 0).all() and torch.isfinite(p).all()


@pytest.mark.parametrize("name", ["adam", "rmsprop", "adagrad"])
def test_below_the_reference_no_update_explodes(name):
    """Few samples far below the reference: estimates are often negative, the update stays in the size of a plain one."""
    torch.manual_seed(0)
    make = {
        "adam": lambda g: optim.Adam(g, 0.01, reference_batch_size=8),
        "rmsprop": lambda g: optim.RMSProp(g, 0.01, reference_batch_size=8),
        "adagrad": lambda g: optim.Adagrad(g, 0.01, reference_batch_size=8),
    }[name]
    p, shadow = nn.Parameter(torch.zeros(2000).double()), nn.Parameter(torch.zeros(2000).double())
    optimizer = make([{"params": [shadow], "role": "shadow"}, {"params": [p]}])
    # lr / sqrt(kappa * c): c = 0.001 * (1 - 0.9^2/0.999) / 0.1^2 for Adam, 0.01 for RMSProp, kappa for Adagrad's sum.
    kappa = 2 / 8
    largest = 0.01 / math.sqrt(kappa * {"adam": 0.01892, "rmsprop": 0.01, "adagrad": kappa}[name])
    for _ in range(30):
        before = p.detach().clone()
        samples = torch.randn(2, 2000).double()
        p.grad, shadow.grad = samples.mean(0), (samples / 2).square().sum(0)
        optimizer.set_batch(2)
        optimizer.step()
        assert (p - before).abs().max() <= largest


def test_below_the_reference_the_average_stays_unbiased():
    """The floor under the average is of the newest gradients alone, so that in the long run it plays no part."""
    torch.manual_seed(0)
    p, shadow = nn.Parameter(torch.zeros(500).double()), nn.Parameter(torch.zeros(500).double())
    groups = [{"params": [shadow], "role": "shadow"}, {"params": [p]}]
    optimizer = optim.Adam(groups, 0.0, betas=(0.9, 0.999), reference_batch_size=8)
    for _ in range(4000):
        samples = 0.1 + torch.randn(4, 500).double()
        p.grad, shadow.grad = samples.mean(0), (samples / 4).square().sum(0)
        optimizer.set_batch(4)
        optimizer.step()
    estimate = optimizer.state[p]["exp_avg_sq"].mean() / (1 - 0.999**4000)
    assert estimate.item() == pytest.approx(0.1**2 + 1 / 8, rel=0.02)


def test_a_skipped_update_leaves_no_trace():
    """As loss scaling skips one: gradients and squares are cleared without a step."""

    def run(skip):
        model, inputs, targets = problem()
        largebatch.track(model)
        optimizer = optim.AdamW(optim.param_groups(model), 0.01, reference_batch_size=2)
        for update in range(4):
            sample_losses(model, inputs, targets).mean().backward()
            optimizer.set_batch(B)
            if update != skip:
                optimizer.step()
            optimizer.zero_grad()
        return torch.cat([v.flatten() for v in model.state_dict().values()])

    model, inputs, targets = problem()
    largebatch.track(model)
    optimizer = optim.AdamW(optim.param_groups(model), 0.01, reference_batch_size=2)
    for _ in range(3):
        sample_losses(model, inputs, targets).mean().backward()
        optimizer.set_batch(B)
        optimizer.step()
        optimizer.zero_grad()
    expected = torch.cat([v.flatten() for v in model.state_dict().values()])
    assert torch.equal(run(skip=1), expected)


def test_one_sample_says_nothing_of_the_variance():
    optimizer = optim.Adam([nn.Parameter(torch.zeros(1))], reference_batch_size=8)
    optimizer.set_batch(1)
    shadow = nn.Parameter(torch.zeros(1))
    shadow.grad = torch.ones(1)
    assert optimizer._moment(optimizer.param_groups[0], [shadow]).share == 0.0


def test_the_average_lives_in_the_shadow():
    """No memory beyond the shadow's own, also after a state is loaded; training goes on exactly."""
    model, inputs, targets = problem()
    largebatch.track(model)
    optimizer = optim.AdamW(optim.param_groups(model), 0.01, reference_batch_size=2)

    def steps(model, optimizer, count):
        for _ in range(count):
            sample_losses(model, inputs, targets).mean().backward()
            optimizer.set_batch(B)
            optimizer.step()
            optimizer.zero_grad()

    steps(model, optimizer, 3)
    for name, shadow in largebatch.moments.shadows(model).items():
        assert optimizer.state[model.get_parameter(name)]["exp_avg_sq"] is shadow
    other, _, _ = problem(1)
    largebatch.track(other)
    resumed = optim.AdamW(optim.param_groups(other), 0.01, reference_batch_size=2)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(model, optimizer, 3)
    steps(other, resumed, 3)
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    for name, shadow in largebatch.moments.shadows(other).items():
        assert resumed.state[other.get_parameter(name)]["exp_avg_sq"] is shadow


def test_groups_pair_shadows_with_their_parameters():
    model, _, _ = problem()
    largebatch.track(model)
    groups = optim.param_groups(model, weight_decay=0.1)
    assert [optim.is_shadow_group(group) for group in groups] == [True, False, True, False]
    for shadow_group, group in zip(groups[::2], groups[1::2], strict=True):
        assert [s.shape for s in shadow_group["params"]] == [p.shape for p in group["params"]]
    assert groups[1]["weight_decay"] == 0.1 and groups[3]["weight_decay"] == 0.0


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda o, m: None, r"call set_batch\(batch_size, ...\) before step\(\)"),
        (lambda o, m: o.param_groups[1].update(reference_batch_size=None), "reference_batch_size: missing"),
        (
            lambda o, m: [setattr(s, "grad", None) for s in largebatch.moments.shadows(m).values()],
            "its shadow has none",
        ),
    ],
)
def test_what_is_left_out_is_named(spoil, message):
    model, inputs, targets = problem()
    largebatch.track(model)
    optimizer = optim.AdamW(optim.param_groups(model, decay_norm_and_bias=True), 0.01, reference_batch_size=2)
    sample_losses(model, inputs, targets).mean().backward()
    spoil(optimizer, model)
    with pytest.raises((RuntimeError, ValueError), match=message):
        optimizer.step()


def test_effective_micro_batches():
    assert effective_micro_batches(64, 2, 16) == 4
    assert effective_micro_batches(100, 1, 40) == pytest.approx(100**2 / (40**2 + 40**2 + 20**2))
    assert effective_micro_batches(3, 4, None) == 3  # an idle rank does not count


def test_natural_mistakes_of_own_loops_are_errors(monkeypatch):
    """Shadows trained, groups' own rates made one, a batch without its ranks, a wrapped model tracked."""
    model = largebatch.track(nn.Linear(3, 2))
    for make in (
        optim.AdamW,
        optim.Adam,
        optim.RMSProp,
        optim.Adagrad,
        optim.SGD,
        optim.LARS,
        optim.LAMB,
        optim.Quench,
    ):
        with pytest.raises(UserError, match="include its shadows"):
            make(model.parameters(), 0.1)
    optimizer = optim.AdamW([{"params": [nn.Parameter(torch.ones(1))], "lr": lr} for lr in (0.1, 0.2)])
    with pytest.raises(UserError, match=r"rates of their own \(0.1, 0.2\)"):
        optim.set_hyperparameters(optimizer, {"lr": 0.3})
    optim.set_hyperparameters(optimizer, {"betas": (0.8, 0.9)})
    monkeypatch.setattr("largebatch.optim.adaptive.num_ranks", lambda: 2)
    with pytest.raises(UserError, match=r"set_batch: expected world_size, .* as there are 2"):
        optimizer.set_batch(4)
    optimizer.set_batch(4, world_size=2)
    wrapped = torch.nn.parallel.DistributedDataParallel.__new__(torch.nn.parallel.DistributedDataParallel)
    with pytest.raises(UserError, match="track: the model is wrapped"):
        largebatch.track(wrapped)


def _followed_by_an_engine(every, announced, sizes, loss_scale=1.0, updates=7):
    """Return the weights, and the sums of the last update's noise, after updates in passes of so many samples each."""
    from largebatch.distributed import Ranks
    from largebatch.distributed.ddp import DataParallel

    model, inputs, targets = problem()
    engine = DataParallel(Ranks(), torch.device("cpu"), "fp64", squares_every=every)
    engine.scaler = torch.amp.GradScaler("cpu", init_scale=loss_scale, enabled=loss_scale != 1.0)
    engine.track(model, "micro_batch")
    model, optimizer = engine.prepare(
        model, lambda model: optim.AdamW(largebatch.param_groups(model), lr=0.01, reference_batch_size=2)
    )
    engine.use_squares(optimizer)
    left = sum(sizes)
    units = left**2 / sum(size**2 for size in sizes)
    sums = None
    for update in range(updates):
        engine.begin_update(announced, 4.0 if announced != left else units, update)
        inputs, targets, first = inputs.roll(1, 0), targets.roll(1, 0), 0
        for number, size in enumerate(sizes):
            is_last = number == len(sizes) - 1
            if is_last and announced != left:
                engine.shrink_update(left, units)
            with engine.accumulate(sync=is_last):
                rows = slice(first, first + size)
                engine.backward(sample_losses(model, inputs[rows], targets[rows]).sum() / announced)
            first += size
        optimizer.set_batch(left, units, 1)
        sums = engine.noise_sums(model)
        engine.step(optimizer, 0.1)
    return [p.detach().clone() for p in model.parameters()], sums


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("sizes", [(3, 3, 2, 3), (3, 0, 2), (0, 3)])
def test_samples_that_are_missing_leave_no_trace_in_an_engine(every, sizes):
    """Announced 12 and short of some: the same as if those that are left had been all, squares, noise and clipping too."""
    expected, noise = _followed_by_an_engine(every, sum(sizes), sizes)
    found, sums = _followed_by_an_engine(every, 12, sizes)
    known = 1 if len(sizes) == 2 else 2  # one unit alone has no squares to speak of
    torch.testing.assert_close(sums[:known], noise[:known], rtol=1e-12, atol=0)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("every", [1, 3])
def test_a_loss_scale_leaves_no_trace_in_an_engine(every):
    """The variance that is kept between updates, and the noise, are those of unscaled gradients."""
    expected, noise = _followed_by_an_engine(every, 12, (3, 3, 3, 3))
    found, sums = _followed_by_an_engine(every, 12, (3, 3, 3, 3), loss_scale=2.0**10)
    torch.testing.assert_close(sums, noise, rtol=1e-12, atol=0)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
