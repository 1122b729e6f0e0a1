"""`batch_size_invariant` in loops of one's own, against optimizers written out by hand in float64."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from invariant_oracle import ByHand
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import largebatch
from largebatch import batch_size_invariant, optim
from largebatch.errors import UserError
from largebatch.scaling.schedules import Constant, Cosine, Step, Warmup

EXACT = {"rtol": 1e-10, "atol": 1e-12}
# Elements that a batch does not move at all differ by what eps = 1e-8 makes of rounding.
MAKERS = {
    "adamw": lambda params: torch.optim.AdamW(params, 0.01, weight_decay=0.1),
    "adam": lambda params: torch.optim.Adam(params, 0.01, betas=(0.8, 0.9), weight_decay=0.1),
    "rmsprop": lambda params: torch.optim.RMSprop(params, 0.01, alpha=0.9, weight_decay=0.1, momentum=0.5),
    "adagrad": lambda params: torch.optim.Adagrad(params, 0.05, weight_decay=0.1),
    "sgd": lambda params: torch.optim.SGD(params, 0.01, momentum=0.9, nesterov=True, weight_decay=0.1),
}
BY_HAND = {
    "adamw": {"lr": 0.01, "wd": 0.1},
    "adam": {"lr": 0.01, "wd": 0.1, "betas": (0.8, 0.9)},
    "rmsprop": {"lr": 0.01, "wd": 0.1, "alpha": 0.9, "momentum": 0.5},
    "adagrad": {"lr": 0.05, "wd": 0.1},
    "sgd": {"lr": 0.01, "wd": 0.1, "momentum": 0.9, "nesterov": True},
}


def build(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def data(samples=48, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 5, generator=generator).double(), torch.randn(samples, 3, generator=generator).double()


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def mean_loss(model, inputs, targets):
    return (model(inputs) - targets).square().sum(1).mean()


def pieces(sizes, start=0):
    """Return slices of these sizes, one after the other."""
    found = []
    for size in sizes:
        found.append(slice(start, start + size))
        start += size
    return found


def by_hand(name, updates, reference, clip=None, **options):
    """Train by hand; ``updates``: for each the slices of its units. Return the weights."""
    model, (inputs, targets) = build(), data()
    hand = ByHand(model.parameters(), name, reference, **{**BY_HAND[name], **options})
    for units in updates:
        rows = [torch.autograd.grad(mean_loss(model, inputs[u], targets[u]), hand.params) for u in units]
        stacked = [torch.stack(tensors) for tensors in zip(*rows, strict=True)]
        sizes = [u.stop - u.start for u in units]
        shares = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
        norm = torch.stack([torch.einsum("u...,u->...", g, shares).norm() for g in stacked]).norm()
        hand.step(stacked, sizes, 1.0 if clip is None else min(1.0, clip / (float(norm) + 1e-6)))
    return weights(model)


def ours(name, updates, reference, micro, clip=None, make=None, announce=False):
    """Train by the one line, and return the weights and the optimizer."""
    model, (inputs, targets) = build(), data()
    optimizer = batch_size_invariant(
        (make or MAKERS[name])(model.parameters()), reference_batch_size=reference, micro_batch_size=micro
    )
    for units in updates:
        total = sum(u.stop - u.start for u in units)
        for u in units:
            size = u.stop - u.start
            loss = mean_loss(model, inputs[u], targets[u]) * (size / total)
            if announce:
                with optimizer.micro_batch(size):
                    loss.backward()
            else:
                loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return weights(model), optimizer


def equal(count, size, updates=12):
    return [pieces([size] * count, start=(count * size * k) % 24) for k in range(updates)]


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("name", MAKERS)
def test_an_own_loop_is_the_loop_by_hand(name, count, clip):
    updates = equal(count, 6)
    found, optimizer = ours(name, updates, 2, 6, clip)
    torch.testing.assert_close(found, by_hand(name, updates, 2, clip), **EXACT)
    assert optimizer.batch_size == 6 * count and optimizer.lr_scale == 3 * count
    assert optimizer.samples_seen == 12 * 6 * count


@pytest.mark.parametrize(
    "make",
    [
        *MAKERS.values(),
        lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True, foreach=True),
        lambda p: torch.optim.AdamW(p, torch.tensor(0.01), maximize=True, foreach=False),
        lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1, decoupled_weight_decay=True),
        lambda p: torch.optim.RMSprop(p, 0.01, centered=True),
        lambda p: torch.optim.Adagrad(p, 0.05, initial_accumulator_value=0.1),
        lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, dampening=0.5, maximize=True),
    ],
)
def test_at_the_reference_it_is_torch(make):
    """Through a freeze of half of the parameters, which then count their steps by themselves."""

    def train(wrap):
        model, (inputs, targets) = build(), data()
        optimizer = wrap(make(model.parameters()))
        for step in range(12):
            model[2].requires_grad_(step > 4)
            for u in pieces([6, 6]):
                (mean_loss(model, inputs[u], targets[u]) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
        return weights(model)

    invariant = train(lambda o: batch_size_invariant(o, reference_batch_size=12, micro_batch_size=6))
    torch.testing.assert_close(invariant, train(lambda o: o), rtol=1e-12, atol=1e-14)


def test_amsgrad_and_maximize_away_from_the_reference():
    """The negative loss maximized is the loss minimized."""
    updates = equal(2, 6)

    def make(p):
        return torch.optim.AdamW(p, 0.01, weight_decay=0.1, maximize=True)

    model, (inputs, targets) = build(), data()
    optimizer = batch_size_invariant(make(model.parameters()), reference_batch_size=24, micro_batch_size=6)
    for units in updates:
        for u in units:
            (-mean_loss(model, inputs[u], targets[u]) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(weights(model), ours("adamw", updates, 24, 6)[0], **EXACT)
    assert ours("adamw", updates, 2, 6, make=lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True))[0].isfinite().all()


@pytest.mark.parametrize("name", MAKERS)
def test_below_the_reference_nothing_runs_away(name):
    """Single estimates are negative there; the running average is kept above what an average of squares can be."""
    found, optimizer = ours(name, equal(2, 2, updates=40), 32, 2)
    assert found.isfinite().all() and float(found.abs().max()) < 3.0
    assert optimizer.lr_scale == 1 / 8


@pytest.mark.parametrize("name", MAKERS)
def test_a_growing_batch(name):
    """Averages go on through the change: Adam divides by one minus the product of the coefficients that were used."""
    updates = [*equal(1, 4, 5), *equal(2, 4, 5), *equal(4, 4, 5), *equal(2, 4, 2)]
    found, optimizer = ours(name, updates, 4, 4)
    torch.testing.assert_close(found, by_hand(name, updates, 4), **EXACT)
    assert optimizer.samples_seen == 5 * 4 + 5 * 8 + 5 * 16 + 2 * 8


def test_announced_sizes_weigh_as_much():
    updates = [pieces([6, 5, 4]), pieces([4, 4]), pieces([5, 4], 10), pieces([5, 5, 5, 4])] * 3
    found, optimizer = ours("adamw", updates, 2, 4, announce=True)
    torch.testing.assert_close(found, by_hand("adamw", updates, 2), **EXACT)
    assert optimizer.batch_size == 19


def test_several_passes_of_one_micro_batch_are_one_unit():
    """Two losses of the same samples, as of a GAN's discriminator, in two backward passes."""

    def train(joined):
        model, (inputs, targets) = build(), data()
        optimizer = batch_size_invariant(
            MAKERS["adamw"](model.parameters()), reference_batch_size=2, micro_batch_size=6
        )
        for step in range(10):
            for u in pieces([6, 6], start=step):
                losses = [mean_loss(model, inputs[u], targets[u]) / 2, model(inputs[u]).square().mean() / 2]
                if joined:
                    with optimizer.micro_batch():
                        for loss in losses:
                            loss.backward()
                else:
                    sum(losses).backward()
            optimizer.step()
            optimizer.zero_grad()
            assert optimizer.batch_size == 12
        return weights(model)

    torch.testing.assert_close(train(True), train(False), **EXACT)


def test_a_micro_batch_in_two_passes_among_plain_ones():
    """The first unit, whose square is taken late, is not lost."""

    def train(order):
        model, (inputs, targets) = build(), data()
        optimizer = batch_size_invariant(
            MAKERS["adamw"](model.parameters()), reference_batch_size=2, micro_batch_size=6
        )
        for _ in range(6):
            for u, joined in zip(pieces([6, 6, 6]), order, strict=True):
                loss = mean_loss(model, inputs[u], targets[u]) / 3
                if joined:
                    with optimizer.micro_batch(6):
                        (loss / 4).backward(retain_graph=True)
                        (loss * 3 / 4).backward()
                else:
                    loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return weights(model)

    plain = train([False, False, False])
    for order in ([True, False, False], [False, True, False], [False, False, True], [True, True, True]):
        torch.testing.assert_close(train(order), plain, **EXACT)


def test_set_batch_is_for_one_update():
    model, (inputs, targets) = build(), data()
    optimizer = batch_size_invariant(MAKERS["adamw"](model.parameters()), reference_batch_size=2, micro_batch_size=6)
    for expected in (40, 6):
        if expected == 40:
            optimizer.set_batch(40)
        mean_loss(model, inputs[:6], targets[:6]).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.batch_size == expected


def test_summed_losses_are_those_of_the_reference():
    """Sums over samples: a sum over the reference's batch is what lr, eps and weight decay were tuned with."""
    model, (inputs, targets) = build(), data()
    optimizer = batch_size_invariant(
        torch.optim.Adam(model.parameters(), 0.01, eps=0.1, weight_decay=0.1),
        reference_batch_size=2,
        micro_batch_size=6,
        loss="sum",
    )
    hand_model = build()
    hand = ByHand(hand_model.parameters(), "adam", 2, 0.01, wd=0.1, eps=0.1)
    for units in equal(2, 6):
        rows = []
        for u in units:
            (model(inputs[u]) - targets[u]).square().sum().backward()
            rows.append(torch.autograd.grad(2 * mean_loss(hand_model, inputs[u], targets[u]), hand.params))
        optimizer.step()
        optimizer.zero_grad()
        hand.step([torch.stack(tensors) for tensors in zip(*rows, strict=True)], [6, 6])
    torch.testing.assert_close(weights(model), weights(hand_model), **EXACT)


# What happens to gradients between backward and step


@pytest.mark.parametrize("foreach", [False, True])
def test_a_loss_scale_divided_out_is_no_change(foreach):
    """As GradScaler does: 2**16 on the loss, divided out of the gradients before clipping."""
    updates = equal(2, 6)
    model, (inputs, targets) = build(), data()
    optimizer = batch_size_invariant(
        torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1, foreach=foreach),
        reference_batch_size=2,
        micro_batch_size=6,
    )
    for step, units in enumerate(updates):
        scale = 2.0 ** (16 - step // 4)
        for u in units:
            (mean_loss(model, inputs[u], targets[u]) / 2 * scale).backward()
        for p in model.parameters():
            p.grad.div_(scale)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(weights(model), by_hand("adamw", updates, 2, 0.5), **EXACT)


def test_gradscaler():
    """Its real class, on the CPU in float32: scale found, overflow skipped."""
    model, (inputs, targets) = build(), data()
    expected = copy.deepcopy(model)
    results = []
    for network, scaler in ((model, torch.amp.GradScaler("cpu", init_scale=2.0**10)), (expected, None)):
        optimizer = batch_size_invariant(
            MAKERS["adamw"](network.parameters()), reference_batch_size=2, micro_batch_size=6
        )
        for step in range(6):
            for u in pieces([6, 6]):
                loss = mean_loss(network, inputs[u], targets[u]) / 2
                if step == 3:
                    loss = loss * (math.inf if scaler else 0.0)
                (scaler.scale(loss) if scaler else loss).backward()
            if scaler:
                scaler.step(optimizer)
                scaler.update()
            elif step != 3:
                optimizer.step()
            optimizer.zero_grad()
        results.append(weights(network))
    torch.testing.assert_close(*results, **EXACT)


def spoil_value_clipping(model):
    nn.utils.clip_grad_value_(model.parameters(), 0.01)


def spoil_a_layer(model):
    model[0].weight.grad.mul_(0.5)


def spoil_noise(model):
    for p in model.parameters():
        p.grad.add_(torch.randn_like(p.grad), alpha=0.1)


def spoil_decay(model):
    for p in model.parameters():
        p.grad.add_(p.detach())


def spoil_centring(model):
    for p in model.parameters():
        if p.ndim > 1:
            p.grad.sub_(p.grad.mean(dim=1, keepdim=True))


def spoil_one_zeroed(model):
    model[2].bias.grad.zero_()


def spoil_one_written(model):
    model[2].bias.grad = torch.ones_like(model[2].bias)


@pytest.mark.parametrize(
    "spoil",
    [
        spoil_value_clipping,
        spoil_a_layer,
        spoil_noise,
        spoil_decay,
        spoil_centring,
        spoil_one_zeroed,
        spoil_one_written,
    ],
)
def test_gradients_changed_in_another_way_are_an_error(spoil):
    model, (inputs, targets) = build(), data()
    optimizer = batch_size_invariant(MAKERS["adamw"](model.parameters()), reference_batch_size=2, micro_batch_size=6)
    before = weights(model)
    mean_loss(model, inputs[:6], targets[:6]).backward()
    spoil(model)
    with pytest.raises(UserError, match=r"the gradient of parameter .* is not what the backward passes left"):
        optimizer.step()
    assert torch.equal(weights(model), before)


def test_non_finite_gradients_are_passed_on_as_torch_does():
    model, (inputs, targets) = build(), data()
    optimizer = batch_size_invariant(MAKERS["sgd"](model.parameters()), reference_batch_size=2, micro_batch_size=6)
    (mean_loss(model, inputs[:6], targets[:6]) * math.nan).backward()
    optimizer.step()
    assert weights(model).isnan().all()


# Loops as people write them


def test_closures():
    updates = equal(2, 6)
    model, (inputs, targets) = build(), data()
    optimizer = batch_size_invariant(MAKERS["adamw"](model.parameters()), reference_batch_size=2, micro_batch_size=6)
    for units in updates:

        def closure(units=units):
            optimizer.zero_grad()
            losses = [mean_loss(model, inputs[u], targets[u]) / 2 for u in units]
            for loss in losses:
                loss.backward()
            return sum(losses)

        assert optimizer.step(closure).item() > 0
    torch.testing.assert_close(weights(model), by_hand("adamw", updates, 2), **EXACT)


@pytest.mark.parametrize("way", ["model first", "model last", "optimizer first", "in place", "in place by the model"])
def test_zero_grad_in_any_order(way):
    updates = equal(2, 6)
    model, (inputs, targets) = build(), data()
    optimizer = batch_size_invariant(MAKERS["adamw"](model.parameters()), reference_batch_size=2, micro_batch_size=6)
    for units in updates:
        if way == "model first":
            model.zero_grad()
        elif way == "optimizer first":
            optimizer.zero_grad()
        for u in units:
            (mean_loss(model, inputs[u], targets[u]) / 2).backward()
        optimizer.step()
        if way == "model last":
            model.zero_grad()
        elif way == "in place":
            optimizer.zero_grad(set_to_none=False)
        elif way == "in place by the model":
            model.zero_grad(set_to_none=False)
    torch.testing.assert_close(weights(model), by_hand("adamw", updates, 2), **EXACT)


def test_gradients_that_were_not_cleared_are_an_error():
    model, (inputs, targets) = build(), data()
    optimizer = batch_size_invariant(MAKERS["adamw"](model.parameters()), reference_batch_size=2, micro_batch_size=6)
    mean_loss(model, inputs[:6], targets[:6]).backward()
    optimizer.step()
    mean_loss(model, inputs[6:12], targets[6:12]).backward()
    with pytest.raises(UserError, match="is not what the backward passes left"):
        optimizer.step()


def test_a_backward_pass_that_is_thrown_away_is_not_counted():
    """zero_grad between passes, by the model or the optimizer: only what is left counts."""
    updates = equal(2, 6)
    model, (inputs, targets) = build(), data()
    optimizer = batch_size_invariant(MAKERS["adamw"](model.parameters()), reference_batch_size=2, micro_batch_size=6)
    for step, units in enumerate(updates):
        mean_loss(model, inputs[30:40], targets[30:40]).backward()
        (model if step % 2 else optimizer).zero_grad()
        for u in units:
            (mean_loss(model, inputs[u], targets[u]) / 2).backward()
        optimizer.step()
        assert optimizer.batch_size == 12
        optimizer.zero_grad()
    torch.testing.assert_close(weights(model), by_hand("adamw", updates, 2), **EXACT)


def test_two_optimizers_of_a_gan():
    """The generator's backward pass goes through the discriminator, whose gradients of it are cleared and not counted."""
    torch.manual_seed(0)
    generator, critic = nn.Linear(3, 5).double(), nn.Linear(5, 1).double()
    alone = copy.deepcopy(critic)
    of_generator = batch_size_invariant(
        torch.optim.Adam(generator.parameters(), 0.01), reference_batch_size=2, micro_batch_size=4
    )
    of_critic = batch_size_invariant(
        torch.optim.Adam(critic.parameters(), 0.01), reference_batch_size=2, micro_batch_size=4
    )
    of_alone = batch_size_invariant(
        torch.optim.Adam(alone.parameters(), 0.01), reference_batch_size=2, micro_batch_size=4
    )
    for _ in range(6):
        noise, real = torch.randn(4, 3).double(), torch.randn(4, 5).double()
        critic(generator(noise)).mean().backward()
        of_generator.step()
        of_generator.zero_grad()
        of_critic.zero_grad()
        fake = generator(noise).detach()
        with of_critic.micro_batch():
            (-critic(real).mean()).backward()
            critic(fake).square().mean().backward()
        of_critic.step()
        (-alone(real).mean() + alone(fake).square().mean()).backward()
        of_alone.step()
        of_alone.zero_grad()
        assert of_generator.batch_size == of_critic.batch_size == 4
    torch.testing.assert_close(weights(critic), weights(alone), **EXACT)


def test_frozen_when_built_and_unfrozen_later():
    updates = equal(2, 6, 8)
    results = []
    for frozen in (True, False):
        model, (inputs, targets) = build(), data()
        model[0].requires_grad_(not frozen)
        optimizer = batch_size_invariant(
            torch.optim.AdamW([{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.02}], 0.01),
            reference_batch_size=2,
            micro_batch_size=6,
        )
        for step, units in enumerate(updates):
            model[0].requires_grad_(step > 3)
            for u in units:
                (mean_loss(model, inputs[u], targets[u]) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.02]
        results.append(weights(model))
    torch.testing.assert_close(*results, **EXACT)
    assert float((results[0] - weights(build())).abs()[:24].min()) > 0


def test_an_added_group_trains_as_one_that_was_there():
    updates = equal(2, 6, 8)
    results = []
    for added in (True, False):
        model, (inputs, targets) = build(), data()
        groups = [{"params": [*model[2].parameters()]}, {"params": [*model[0].parameters()], "lr": 0.003}]
        optimizer = batch_size_invariant(
            torch.optim.AdamW(groups[:1] if added else groups, 0.01), reference_batch_size=2, micro_batch_size=6
        )
        for step, units in enumerate(updates):
            model[0].requires_grad_(step >= 4)
            if step == 4 and added:
                optimizer.add_param_group(groups[1])
            for u in units:
                (mean_loss(model, inputs[u], targets[u]) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(weights(model))
    torch.testing.assert_close(*results, **EXACT)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_parameter_that_a_unit_does_not_use_has_a_zero_from_it(count):
    """Two experts, each used by some of the micro-batches only."""
    torch.manual_seed(0)
    first, second = nn.Linear(5, 3).double(), nn.Linear(5, 3).double()
    params = [*first.parameters(), *second.parameters()]
    twins = [p.detach().clone().requires_grad_() for p in params]
    optimizer = batch_size_invariant(torch.optim.AdamW(params, 0.01), reference_batch_size=2, micro_batch_size=4)
    hand = ByHand(twins, "adamw", 2, 0.01, wd=0.01)
    inputs, targets = data()
    for step in range(9):
        rows = []
        for unit, u in enumerate(pieces([4] * count)):
            expert = (step + unit) % 2 if count > 1 else 0
            (((first, second)[expert](inputs[u]) - targets[u]).square().sum(1).mean() / count).backward()
            mine = F.linear(inputs[u], twins[2 * expert], twins[2 * expert + 1])
            grads = torch.autograd.grad((mine - targets[u]).square().sum(1).mean(), twins, allow_unused=True)
            rows.append([torch.zeros_like(p) if g is None else g for p, g in zip(twins, grads, strict=True)])
        if count == 1:
            with torch.no_grad():  # never used: torch leaves it alone
                hand.params, hand.m, hand.s, rows = twins[:2], hand.m[:2], hand.s[:2], [rows[0][:2]]
        optimizer.step()
        optimizer.zero_grad()
        hand.step([torch.stack(tensors) for tensors in zip(*rows, strict=True)], [4] * count)
        assert optimizer.batch_size == 4 * count
    for p, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(p, twin, **EXACT)


def test_sparse_gradients_are_refused():
    model = nn.Embedding(5, 3, sparse=True)
    optimizer = batch_size_invariant(
        torch.optim.SGD(model.parameters(), 0.1), reference_batch_size=2, micro_batch_size=2
    )
    with pytest.raises(UserError, match=r"sparse gradient; expected dense ones: .*sparse=False"):
        model(torch.tensor([1, 2])).sum().backward()
    del optimizer


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpoints(reentrant):
    updates = equal(2, 6)
    model, (inputs, targets) = build(), data()
    optimizer = batch_size_invariant(MAKERS["adamw"](model.parameters()), reference_batch_size=2, micro_batch_size=6)
    for units in updates:
        for u in units:
            hidden = checkpoint(model[:2], inputs[u].requires_grad_(), use_reentrant=reentrant)
            output = checkpoint(model[2], hidden, use_reentrant=reentrant)
            ((output - targets[u]).square().sum(1).mean() / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(weights(model), by_hand("adamw", updates, 2), **EXACT)


@pytest.mark.parametrize("joined", [True, False])
def test_a_weight_in_two_reentrant_checkpoints(joined):
    """Its gradient comes in two parts, which is refused unless the passes of a micro-batch are joined."""
    torch.manual_seed(0)
    layer, head = nn.Linear(5, 5).double(), nn.Linear(5, 1).double()
    params = [*layer.parameters(), *head.parameters()]
    plain = copy.deepcopy(nn.Sequential(layer, head))
    optimizer = batch_size_invariant(torch.optim.AdamW(params, 0.01), reference_batch_size=1, micro_batch_size=4)
    of_plain = batch_size_invariant(
        torch.optim.AdamW(plain.parameters(), 0.01), reference_batch_size=1, micro_batch_size=4
    )
    for _ in range(4):
        for _ in range(2):
            x = torch.randn(4, 5).double().requires_grad_()
            (plain[1](plain[0](plain[0](x))).square().mean() / 2).backward()

            def loss(x=x):
                hidden = checkpoint(layer, checkpoint(layer, x, use_reentrant=True), use_reentrant=True)
                return head(hidden).square().mean() / 2

            if joined:
                with optimizer.micro_batch():
                    loss().backward()
            else:
                loss().backward()
        of_plain.step()
        of_plain.zero_grad()
        if not joined:
            with pytest.raises(UserError, match=r"re-entrant activation checkpoints.*use_reentrant=False"):
                optimizer.step()
            return
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(weights(nn.Sequential(layer, head)), weights(plain), **EXACT)


def test_per_group_rates_and_torchs_schedulers():
    """Schedulers read and write the reference's rates; the step scales what they wrote."""
    model, (inputs, targets) = build(), data()
    optimizer = batch_size_invariant(
        torch.optim.AdamW([{"params": model[0].parameters(), "lr": 0.01}, {"params": model[2].parameters()}], 0.001),
        reference_batch_size=2,
        micro_batch_size=6,
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    warm = torch.optim.lr_scheduler.OneCycleLR(
        batch_size_invariant(torch.optim.AdamW(model.parameters()), reference_batch_size=2, micro_batch_size=6), 0.1, 10
    )
    assert warm.get_last_lr()
    steps = []
    optimizer.base.register_step_pre_hook(lambda o, *_: steps.append([group["lr"] for group in o.param_groups]))
    for _ in range(3):
        mean_loss(model, inputs[:6], targets[:6]).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    factors = [1.0, *[0.5 * (1 + math.cos(math.pi * k / 10)) for k in (1, 2)]]
    assert steps == [[pytest.approx(0.03 * f), pytest.approx(0.003 * f)] for f in factors]
    assert [group["initial_lr"] for group in optimizer.param_groups] == [0.01, 0.001]


def test_a_tensor_as_learning_rate_stays_the_same_tensor():
    lr = torch.tensor(0.01, dtype=torch.float64)
    found, optimizer = ours("adamw", equal(2, 6), 2, 6, make=lambda p: torch.optim.AdamW(p, lr, weight_decay=0.1))
    assert optimizer.param_groups[0]["lr"] is lr
    torch.testing.assert_close(found, by_hand("adamw", equal(2, 6), 2), **EXACT)


def test_schedules_in_samples_with_a_warm_up_and_a_growing_batch():
    schedule, warmup = Step((48, 96), 0.5), Warmup("gradual", 24, 0.25)
    model, (inputs, targets) = build(), data(512)
    optimizer = batch_size_invariant(MAKERS["adamw"](model.parameters()), reference_batch_size=2, micro_batch_size=4)
    scheduler = optim.SampleScheduler(optimizer, schedule, warmup)
    sizes, rates, seen = [], [], 0
    for _ in range(12):
        size = scheduler.batch_size(8, realize="batch")
        for _ in range(size // 4):
            (mean_loss(model, inputs[:4], targets[:4]) / (size // 4)).backward()
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        scheduler.step()  # as Accelerate does on several processes
        sizes.append(optimizer.batch_size)
        assert rates[-1] == pytest.approx(0.01 * schedule(seen) * warmup.of_lr(seen))
        seen += size
        assert optimizer.samples_seen == seen
    assert sizes == [8] * 6 + [16] * 3 + [32] * 3
    assert optim.SampleScheduler(optimizer, Cosine(seen)).get_last_lr() == [0.0]
    with pytest.raises(UserError, match="expected what batch_size_invariant returned"):
        optim.SampleScheduler(torch.optim.SGD(model.parameters(), 0.1), Constant())


# State


def trained(steps, optimizer=None, model=None, count=2, start=0):
    model = model or build()
    inputs, targets = data()
    optimizer = optimizer or batch_size_invariant(
        MAKERS["adamw"](model.parameters()), reference_batch_size=2, micro_batch_size=6
    )
    for step in range(start, start + steps):
        for u in pieces([6] * count, start=step):
            (mean_loss(model, inputs[u], targets[u]) / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize("count", [1, 2])
def test_a_resume_is_exact(count):
    whole, _ = trained(20, count=count)
    model, optimizer = trained(9, count=count)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = build(seed=3)
    resumed.load_state_dict(saved["model"])
    other = batch_size_invariant(MAKERS["adamw"](resumed.parameters()), reference_batch_size=2, micro_batch_size=6)
    other.load_state_dict(saved["optimizer"])
    assert other.samples_seen == optimizer.samples_seen == 9 * 6 * count
    trained(11, other, resumed, count, start=9)
    assert torch.equal(weights(resumed), weights(whole))
    with pytest.raises(UserError, match="was saved with 2, this optimizer has 4"):
        batch_size_invariant(
            MAKERS["adamw"](build().parameters()), reference_batch_size=4, micro_batch_size=6
        ).load_state_dict(saved["optimizer"])


def test_a_trained_optimizer_keeps_its_state_and_goes_back_to_torch():
    """Trained by torch at the reference, wrapped, trained, and plain again: at one batch size all of it is torch."""

    def parts(wrap):
        model, (inputs, targets) = build(), data()
        optimizer = MAKERS["adamw"](model.parameters())
        for phase in range(3):
            if phase == 1 and wrap:
                optimizer = batch_size_invariant(optimizer, reference_batch_size=12, micro_batch_size=6)
            elif phase == 2 and wrap:
                optimizer = optimizer.to_torch()
                assert type(optimizer) is torch.optim.AdamW
            for _ in range(5):
                for u in pieces([6, 6]):
                    (mean_loss(model, inputs[u], targets[u]) / 2).backward()
                optimizer.step()
                optimizer.zero_grad()
        return weights(model), optimizer

    (found, optimizer), (expected, plain) = parts(True), parts(False)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert optimizer.state_dict()["state"].keys() == plain.state_dict()["state"].keys()
    model = build()
    wrapped = batch_size_invariant(MAKERS["adamw"](model.parameters()), reference_batch_size=2, micro_batch_size=6)
    wrapped.load_state_dict(plain.state_dict())  # a plain one's state
    assert float(wrapped.state[model[0].weight]["step"]) == 15


def test_to_torch_hands_over_the_average_and_not_its_bias():
    """After a batch that grew: what Adam divides by is the same before and after."""
    model, optimizer = trained(3, count=1)
    trained(3, optimizer, model, count=4)
    count = optimizer._progress.counts[model[0].weight]
    true = optimizer.state[model[0].weight]["exp_avg_sq"].clone() / count.stretch / (1 - math.exp(count.log_decay))
    plain = optimizer.to_torch()
    state = plain.state[model[0].weight]
    torch.testing.assert_close(state["exp_avg_sq"] / (1 - 0.999 ** float(state["step"])), true, **EXACT)


def test_copies_and_pickles():
    """An average of the weights, a deep copy of model and optimizer, a pickle of both: none warns, each trains alike."""
    model, optimizer = trained(5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copy.deepcopy(model)
        torch.optim.swa_utils.AveragedModel(model)
        torch.save(model, io.BytesIO())
        copied_model, copied = copy.deepcopy((model, optimizer))
        pickled_model, pickled = pickle.loads(pickle.dumps((model, optimizer)))
    for other_model, other in ((copied_model, copied), (pickled_model, pickled)):
        assert all(p in set(other_model.parameters()) for group in other.param_groups for p in group["params"])
        trained(5, other, other_model, start=5)
    trained(5, optimizer, model, start=5)
    assert torch.equal(weights(copied_model), weights(model)) and torch.equal(weights(pickled_model), weights(model))


# What is refused, and what is said


def test_what_is_not_known_is_refused_by_name():
    model = build()
    for optimizer, match in (
        (torch.optim.NAdam(model.parameters()), "expected Adam, AdamW, RMSprop, Adagrad, SGD of torch.optim.*got torch.optim.nadam.NAdam"),
        (torch.optim.Adam([nn.Parameter(torch.zeros(2, dtype=torch.complex64))]), "is complex"),
        (torch.optim.Adagrad(model.parameters(), lr_decay=0.1), "lr_decay: expected 0, got 0.1"),
        (torch.optim.Adam(model.parameters(), betas=(0.9, 0.0)), "beta2"),
        (torch.optim.AdamW(largebatch.track(build()).parameters()), "the model is tracked.*untrack"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=match):
            batch_size_invariant(optimizer, reference_batch_size=2, micro_batch_size=2)
    good = {"reference_batch_size": 2, "micro_batch_size": 2}
    for bad in ({"reference_batch_size": 0}, {"micro_batch_size": 0}, {"loss": "median"}):
        with pytest.raises(UserError, match=f"{next(iter(bad))}: expected"):
            batch_size_invariant(torch.optim.Adam(model.parameters()), **{**good, **bad})
    optimizer = batch_size_invariant(torch.optim.Adam(model.parameters()), **good)
    with pytest.raises(UserError, match="set_batch: expected"):
        optimizer.set_batch(0)
    with pytest.raises(UserError, match="micro_batch: expected"):
        optimizer.micro_batch(0)
    with pytest.raises(UserError, match="already within"), optimizer.micro_batch(), optimizer.micro_batch():
        pass


def test_gradients_from_before_the_line_are_an_error():
    model, (inputs, targets) = build(), data()
    mean_loss(model, inputs, targets).backward()
    optimizer = batch_size_invariant(torch.optim.Adam(model.parameters()), reference_batch_size=2, micro_batch_size=48)
    with pytest.raises(UserError, match="no backward pass since the last update left it"):
        optimizer.step()


def test_the_size_is_read_from_a_loader():
    dataset = TensorDataset(torch.zeros(50, 5))
    model = build()

    def line(loader):
        return batch_size_invariant(
            torch.optim.Adam(model.parameters()), reference_batch_size=2, micro_batch_size=loader
        )

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert line(DataLoader(dataset, 8, drop_last=True)).micro_batch_size == 8
        assert line(DataLoader(dataset, 10)).micro_batch_size == 10
    with pytest.warns(UserWarning, match="last batch of an epoch has 2 of 8 samples"):
        line(DataLoader(dataset, 8))
    with pytest.raises(UserError, match="expected a number of samples or a DataLoader"):
        line(DataLoader(dataset, None))


def test_the_critical_batch_size_and_its_one_warning():
    """A linear problem whose noise is known: B_simple = tr(Sigma)/|G|^2, inside the band, and a batch far above it is told of."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.zeros(20, dtype=torch.float64))
    mean = torch.full((20,), 0.5, dtype=torch.float64)

    def train(optimizer, size, steps=200):
        for _ in range(steps):
            for _ in range(4):
                target = mean + torch.randn(size // 4, 20, generator=generator, dtype=torch.float64)
                ((target * weight).sum(1).mean() / 4).backward()
            optimizer.step()
            optimizer.zero_grad()

    true = 20 / (20 * 0.25)  # = 4
    with pytest.warns(UserWarning, match=r"64 samples is above the critical batch size") as caught:
        optimizer = batch_size_invariant(torch.optim.SGD([weight], 0.0), reference_batch_size=4, micro_batch_size=16)
        train(optimizer, 64)
    assert len([w for w in caught if "critical" in str(w.message)]) == 1
    noise = optimizer.critical_batch_size
    assert noise.low < true < noise.high and noise.high < 2 * true
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(batch_size_invariant(torch.optim.SGD([weight], 0.0), reference_batch_size=4, micro_batch_size=1), 4, 60)


# Optimizers of this package


@pytest.mark.parametrize(
    "make",
    [
        lambda p, **r: optim.AdamW(p, 0.01, weight_decay=0.1, **r),
        lambda p, **r: optim.Adam(p, 0.01, bias_correction="running_mean", **r),
        lambda p, **r: optim.RMSProp(p, 0.01, centered=True, exponent=1.0, **r),
        lambda p, **r: optim.Adagrad(p, 0.01, **r),
        lambda p, **r: optim.LAMB(p, 0.01, **r),
    ],
)
def test_ours_are_what_a_tracked_model_makes_of_them(make):
    inputs, targets = data()
    model, tracked = build(), largebatch.track(build(), per="micro_batch")
    optimizer = batch_size_invariant(make(model.parameters()), reference_batch_size=4, micro_batch_size=6)
    groups = optim.param_groups(tracked, 0.1 if "AdamW" in repr(optimizer.base) else 0.0, decay_norm_and_bias=True)
    of_tracked = make(groups, reference_batch_size=4)
    for group in of_tracked.param_groups:
        group["weight_decay"] = optimizer.param_groups[0]["weight_decay"]
    coefficient = largebatch.scaling.rules.second_moment_coefficient
    values = {"lr": 0.03}
    if "betas" in optimizer.param_groups[0]:
        values["betas"] = (0.9, coefficient(0.999, 3.0))
    elif "alpha" in optimizer.param_groups[0]:
        values["alpha"] = coefficient(0.99, 3.0)
    optim.set_hyperparameters(of_tracked, values)
    for _ in range(8):
        for u in pieces([6, 6]):
            (mean_loss(model, inputs[u], targets[u]) / 2).backward()
            (mean_loss(tracked, inputs[u], targets[u]) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        of_tracked.set_batch(12, 2)
        of_tracked.step()
        of_tracked.zero_grad()
    expected = torch.cat([v.flatten() for v in tracked.state_dict().values()])
    torch.testing.assert_close(weights(model), expected, **EXACT)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    "make",
    [
        lambda p: optim.SGD(p, 0.01, momentum=0.9, form="velocity"),
        lambda p: optim.LARS(p, 0.01),
        lambda p: optim.Quench(p, K=16),
        lambda p: optim.AdamW(p, 0.01),
    ],
)
def test_ours_train_with_one_unit_and_two(make, count):
    model = build()
    before = weights(model)
    optimizer = batch_size_invariant(make(model.parameters()), reference_batch_size=2, micro_batch_size=6)
    trained(12, optimizer, model, count)
    assert float((weights(model) - before).abs().max()) > 1e-4 and weights(model).isfinite().all()
    assert optimizer.lr_scale == (1.0 if isinstance(optimizer.base, optim.Quench) else 3.0 * count)


# Types and layouts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("count", [1, 4])
def test_narrow_parameters(dtype, count):
    """Squares are float32 whatever the parameters are; the update is the float64 one to the parameters' rounding."""
    results = []
    for kind in (dtype, torch.float64):
        model, (inputs, targets) = build().to(dtype).to(kind), data()
        inputs, targets = inputs.to(dtype).to(kind), targets.to(dtype).to(kind)
        optimizer = batch_size_invariant(
            torch.optim.AdamW(model.parameters(), 0.01, eps=1e-4), reference_batch_size=2, micro_batch_size=6
        )
        for u in [pieces([6] * count)] * 3:
            for unit in u:
                (mean_loss(model, inputs[unit], targets[unit]) / count).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        results.append(weights(model).double())
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=20 * torch.finfo(dtype).eps)


def test_channels_last():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 2)).double()
    results = []
    for network in (plain, copy.deepcopy(plain).to(memory_format=torch.channels_last)):
        generator = torch.Generator().manual_seed(0)
        optimizer = batch_size_invariant(
            torch.optim.AdamW(network.parameters(), 0.01), reference_batch_size=1, micro_batch_size=4
        )
        for _ in range(5):
            for _ in range(2):
                images = torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64)
                (network(images).square().mean() / 2).backward()
            nn.utils.clip_grad_norm_(network.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
        results.append(torch.cat([p.detach().flatten() for p in network.parameters()]))
    torch.testing.assert_close(*results, **EXACT)


def test_memory_is_one_buffer_of_the_parameters():
    for count in (1, 2):
        _, optimizer = trained(3, count=count)
        (buffer, _, slots), *more = optimizer._squares._buffers
        numel = sum(p.numel() for p in build().parameters())
        assert not more and buffer.numel() == numel + 2 * len(slots) + 3
        assert all(slot.partial is None for slot in slots)


def test_through_torch_distributed_checkpoint(rank_pool, tmp_path):
    """Its state by name, written and read, goes on as if never stopped."""
    found, expected = rank_pool(1, stopped_by_checkpoint, str(tmp_path))[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def stopped_by_checkpoint(rank, world_size, folder):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    whole, optimizer = trained(3)
    model = copy.deepcopy(whole)
    dcp.save({"optimizer": get_optimizer_state_dict(whole, optimizer)}, checkpoint_id=folder)
    other = batch_size_invariant(MAKERS["adamw"](model.parameters()), reference_batch_size=2, micro_batch_size=6)
    state = {"optimizer": get_optimizer_state_dict(model, other)}
    dcp.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(model, other, state["optimizer"])
    assert other.samples_seen == optimizer.samples_seen == 36
    trained(5, optimizer, whole, start=3)
    trained(5, other, model, start=3)
    return weights(model), weights(whole)
