"""`batch_size_invariant` in loops of one's own, against optimizers written out by hand in float64."""

from __future__ import annotations

import pytest
import torch
from invariant_oracle import ByHand
from loops import EXACT, MAKERS, build, by_hand, data, equal, mean_loss, ours, pieces, weights
from torch import nn

from largebatch import batch_size_invariant


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
