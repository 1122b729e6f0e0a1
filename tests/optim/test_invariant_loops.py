"""`batch_size_invariant` in the loops that people write: scalers, closures, frozen layers, two optimizers, checkpoints."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from invariant_oracle import ByHand
from loops import EXACT, MAKERS, build, by_hand, data, equal, mean_loss, pieces, weights
from torch import nn
from torch.utils.checkpoint import checkpoint

from largebatch import batch_size_invariant
from largebatch.errors import UserError


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
