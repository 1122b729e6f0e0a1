"""What was found wrong with `batch_size_invariant` by trying to break it, each kind once."""

from __future__ import annotations

import copy
import gc
import io
import math

import numpy
import pytest
import torch
from invariant_oracle import carried
from loops import EXACT, MAKERS, build, data, equal, mean_loss, pieces, trained, weights
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from largebatch import batch_size_invariant
from largebatch.errors import UserError

SMALL = {"reference_batch_size": 2, "micro_batch_size": 6}


def line(params, make=MAKERS["adamw"], **options):
    return batch_size_invariant(make(params), **{**SMALL, **options})


# torch's fused update on a CPU walks the memory and not the elements


@pytest.mark.parametrize("case", ["converted later", "gradient by hand", "expanded gradient", "every other column"])
def test_the_fused_update_is_not_used_where_layouts_differ(case):
    results = []
    for wrapped in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 4)).double()
        if case == "every other column":
            model[2].weight = nn.Parameter(torch.randn(4, 128, dtype=torch.float64)[:, ::2])
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        if wrapped:
            optimizer = batch_size_invariant(optimizer, reference_batch_size=2, micro_batch_size=2)
        for step in range(5):
            if case == "converted later" and step == 2:
                model.to(memory_format=torch.channels_last)
            images = torch.randn(2, 3, 6, 6, dtype=torch.float64).to(memory_format=torch.channels_last)
            loss = model(images).square().mean()
            if case == "gradient by hand":
                for p, g in zip(model.parameters(), torch.autograd.grad(loss, [*model.parameters()]), strict=True):
                    p.grad = g
            elif case == "expanded gradient":
                params = [*model.parameters()]
                for p, g in zip(params, torch.autograd.grad(sum(p.sum() for p in params), params), strict=True):
                    p.grad = g
            else:
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(weights(model))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)


# Loss scales


def one_unit(scales, amsgrad=False):
    """Train with one unit an update under these loss scales, divided out; infinite losses are skipped as GradScaler does."""
    model, (inputs, targets) = build(), data()
    optimizer = line(model.parameters(), lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, amsgrad=amsgrad))
    for step, scale in enumerate(scales):
        (mean_loss(model, inputs[step : step + 6], targets[step : step + 6]) * scale).backward()
        for p in model.parameters():
            p.grad.div_(scale)
        optimizer.step()
        optimizer.zero_grad()
    return weights(model), optimizer


@pytest.mark.filterwarnings("ignore:the batch of")
def test_a_changing_loss_scale_does_not_look_like_noise():
    changing = [2.0**16] * 5 + [2.0**11] * 5 + [2.0**12, 2.0**13] * 15
    (found, scaled), (expected, plain) = one_unit(changing), one_unit([1.0] * len(changing))
    torch.testing.assert_close(found, expected, **EXACT)
    assert scaled.critical_batch_size.trace == pytest.approx(plain.critical_batch_size.trace, rel=1e-9)


def test_clipping_is_told_from_a_loss_scale():
    from largebatch.optim.progress import Progress

    progress = Progress(1)
    assert progress.clip_of(2.0**-16)[0] == 1.0 and progress.loss_scale == 2.0**16
    assert progress.clip_of(0.3 * 2.0**-16)[0] == pytest.approx(0.3)
    assert (
        progress.clip_of(0.3 * 2.0**-11)[0] <= 1.0 and progress.loss_scale == 2.0**12
    )  # fallen, so far as can be told
    assert progress.clip_of(1.0)[0] == 1.0 and progress.loss_scale == 1.0


@pytest.mark.filterwarnings("ignore:the batch of")
def test_sums_of_a_growing_batch_do_not_look_like_noise():
    p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    direction = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    optimizer = batch_size_invariant(
        torch.optim.RMSprop([p], 0.0, alpha=0.5), reference_batch_size=2, micro_batch_size=8, loss="sum"
    )
    for step in range(40):
        size = 16 if step % 2 else 8
        with optimizer.micro_batch(size):
            (size * (p * direction).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(optimizer.state[p]["square_avg"], (2 * direction) ** 2, rtol=0.2, atol=0)


# Rounding


@pytest.mark.parametrize(
    ("dtype", "units", "kappa"), [(torch.bfloat16, 8, 1024), (torch.float16, 6, 6000), (torch.float32, 4, 10**6)]
)
def test_rounding_without_noise_makes_no_second_moment_negative(dtype, units, kappa):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8)).to(dtype)
    optimizer = batch_size_invariant(
        torch.optim.AdamW(model.parameters(), 1e-6), reference_batch_size=1, micro_batch_size=1
    )
    base = torch.randn(4, 16)
    for _ in range(3):
        for _ in range(units):
            (model((base + 0.01 * torch.randn(4, 16)).to(dtype)).square().mean() / units).backward()
        optimizer.set_batch(kappa)
        optimizer.step()
        optimizer.zero_grad()
    assert weights(model).isfinite().all()
    assert all(float(optimizer.state[p]["exp_avg_sq"].min()) >= 0 for p in model.parameters())


def test_gradients_made_finite_after_the_fact_are_an_error():
    model, (inputs, targets) = build(), data()
    optimizer = line(model.parameters())
    for factor in (math.nan, 1.0):
        (mean_loss(model, inputs[:6], targets[:6]) * factor).backward()
    for p in model.parameters():
        p.grad.nan_to_num_(0.0, 0.0, 0.0)
    with pytest.raises(UserError, match="numbers that are not finite"):
        optimizer.step()


def test_a_gradient_that_is_all_rounding_may_be_lost():
    """Of a bias before batch norm, say, which a half-precision all-reduce makes zero."""
    model, (inputs, targets) = build(), data()
    optimizer = line(model.parameters())
    tiny = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer.add_param_group({"params": [tiny]})
    (mean_loss(model, inputs[:6], targets[:6]) + 1e-9 * tiny.sum()).backward()
    tiny.grad.zero_()
    optimizer.step()


# One parameter alone


@pytest.mark.parametrize(
    "spoil", [lambda p: nn.utils.clip_grad_value_([p], 0.01), lambda p: p.grad.add_(torch.randn_like(p.grad))]
)
def test_one_parameter_is_enough_to_tell_a_changed_gradient(spoil):
    torch.manual_seed(0)
    model = nn.Linear(5, 3, bias=False)
    optimizer = line(model.parameters())
    model(torch.randn(6, 5)).square().mean().backward()
    spoil(model.weight)
    with pytest.raises(UserError, match="is not what the backward passes left"):
        optimizer.step()


# Hosts


def test_a_hosts_copy_of_the_attributes_says_the_same():
    """Lightning's optimizers take over the attributes of the one they wrap, and call its methods on themselves."""
    model, (inputs, targets) = build(), data()
    optimizer = line(model.parameters())
    host = type("Host", (type(optimizer),), {"__init__": lambda self: None})()
    host.__dict__.update(optimizer.__dict__)
    host.set_batch(40)
    mean_loss(model, inputs[:6], targets[:6]).backward()
    optimizer.step()
    assert host.batch_size == optimizer.batch_size == 40 and host.samples_seen == 40


def test_a_loader_that_is_split_over_processes():
    loader = DataLoader(TensorDataset(torch.zeros(48, 5)), 12, drop_last=True)
    loader.batch_sampler.split_batches, loader.batch_sampler.num_processes = True, 2
    assert line(build().parameters(), micro_batch_size=loader).micro_batch_size == 6


def test_sizes_may_be_numpys_and_a_checkpoint_stays_plain():
    model, (inputs, targets) = build(), data()
    optimizer = line(model.parameters(), reference_batch_size=numpy.int64(2), micro_batch_size=numpy.int64(6))
    optimizer.set_batch(numpy.int64(12))
    mean_loss(model, inputs[:6], targets[:6]).backward()
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["param_groups"][0]["batch_size_invariant"]["samples_seen"] == 12
    optimizer.set_batch(torch.tensor(12))
    for wrong in (1.5, "6", torch.tensor([1, 2])):
        with pytest.raises(UserError, match="set_batch: expected a whole number of samples"):
            optimizer.set_batch(wrong)


def test_the_hooks_go_with_the_optimizer():
    model = build()
    for _ in range(3):
        optimizer = line(model.parameters())
    assert optimizer is not None
    del optimizer
    gc.collect()
    assert all(not p._backward_hooks for p in model.parameters())


def test_hooks_of_state_dicts_are_called():
    called = []
    optimizer = line(build().parameters())
    optimizer.register_state_dict_post_hook(lambda *_: called.append("saved"))
    optimizer.register_load_state_dict_post_hook(lambda *_: called.append("loaded"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert called == ["saved", "loaded"]


# State


def test_a_plain_state_makes_a_used_optimizer_a_fresh_one():
    plain_model, (inputs, targets) = build(), data()
    plain = MAKERS["adamw"](plain_model.parameters())
    mean_loss(plain_model, inputs[:6], targets[:6]).backward()
    plain.step()
    results = []
    for used in (True, False):
        model = build(seed=4)
        optimizer = line(model.parameters())
        if used:
            trained(5, optimizer, model, count=1)
        model.load_state_dict(plain_model.state_dict())
        optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
        assert optimizer.samples_seen == 0
        trained(5, optimizer, model, count=1)
        results.append(weights(model))
    assert torch.equal(*results)


def test_an_announced_batch_is_copied():
    model, optimizer = trained(2)
    optimizer.set_batch(40)
    copied_model, copied = copy.deepcopy((model, optimizer))
    inputs, targets = data()
    mean_loss(copied_model, inputs[:6], targets[:6]).backward()
    copied.step()
    assert copied.batch_size == 40


def test_amsgrad_through_a_growing_batch():
    """Its largest second moment, by hand."""
    updates = [*equal(2, 6, 3), *equal(4, 6, 3), *equal(2, 6, 3)]
    model, (inputs, targets) = build(), data()
    optimizer = line(model.parameters(), lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, amsgrad=True))
    twin = build()
    params = [*twin.parameters()]
    m, s, largest = ([torch.zeros_like(p) for p in params] for _ in range(3))
    decay = 1.0
    for t, units in enumerate(updates, start=1):
        kappa, n = 3 * len(units), len(units)
        beta2 = 0.999**kappa
        before, decay = decay, decay * beta2
        rows = [torch.autograd.grad(mean_loss(twin, inputs[u], targets[u]), params) for u in units]
        for u in units:
            (mean_loss(model, inputs[u], targets[u]) / n).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for i, p in enumerate(params):
                g = torch.stack([row[i] for row in rows])
                mean = g.mean(0)
                variance = (g.square().mean(0) - mean**2) / (n - 1)
                p.mul_(1 - 0.01 * kappa * 0.1)
                older = (largest[i] / (1 - before)).sqrt() + 1e-8 if t > 1 else None
                s[i].lerp_(mean**2 + (kappa - 1) * variance, 1 - beta2)
                largest[i] = torch.maximum(largest[i], s[i])
                newer = (largest[i] / (1 - decay)).sqrt() + 1e-8
                if t > 1 and beta2 < 0.98:
                    m[i].mul_(carried(newer / older, kappa, beta2))
                m[i].lerp_(mean, 0.1)
                p.sub_(0.01 * kappa * m[i] / (1 - 0.9**t) / newer)
    torch.testing.assert_close(weights(model), weights(twin), **EXACT)


# Loops


def test_parameters_that_are_replaced_in_the_groups():
    """As densification does in Gaussian splatting: another tensor takes a parameter's place and state."""
    inputs = data()[0]
    p = nn.Parameter(torch.ones(5, dtype=torch.float64))
    optimizer = line([p])
    for step in range(4):
        if step == 2:
            new = nn.Parameter(torch.cat([p.detach(), p.detach()[:1]])[:5].clone())
            state = optimizer.state.pop(p)
            optimizer.param_groups[0]["params"] = [new]
            optimizer.state[new] = state
            optimizer.zero_grad()
            p = new
        (inputs[:6] @ p).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.batch_size == 6 and optimizer.samples_seen == 6 * (step + 1)
    assert len(optimizer._squares.slots) == 1


def test_sharpness_aware_minimization_within_a_micro_batch():
    """The first backward pass is only for the perturbation: its gradients are cleared, and only the second counts."""

    def train(joined):
        model, (inputs, targets) = build(), data()
        optimizer = line(model.parameters())
        for u in pieces([6] * 5):
            context = optimizer.micro_batch() if joined else torch.enable_grad()
            with context:
                mean_loss(model, inputs[u], targets[u]).backward()
                moves = [0.05 * p.grad / p.grad.norm() for p in model.parameters()]
                model.zero_grad()
                with torch.no_grad():
                    torch._foreach_add_([*model.parameters()], moves)
                mean_loss(model, inputs[u], targets[u]).backward()
                with torch.no_grad():
                    torch._foreach_sub_([*model.parameters()], moves)
            optimizer.step()
            optimizer.zero_grad()
            assert optimizer.batch_size == 6
        return weights(model)

    torch.testing.assert_close(train(True), train(False), **EXACT)


def test_a_bad_sample_that_is_skipped_within_a_micro_batch():
    model, (inputs, targets) = build(), data()
    optimizer = line(model.parameters())
    mean_loss(model, inputs[:6], targets[:6]).backward()
    with pytest.raises(ZeroDivisionError), optimizer.micro_batch():
        raise ZeroDivisionError
    optimizer.step()
    assert optimizer.batch_size == 6


def test_a_step_without_a_gradient_moves_by_momentum_at_the_scaled_rate():
    model, (inputs, targets) = build(), data()
    optimizer = line(model.parameters(), lambda p: torch.optim.SGD(p, 0.01, momentum=0.9))
    mean_loss(model, inputs[:6], targets[:6]).backward()
    before = weights(model)
    optimizer.step()
    after = weights(model)
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    torch.testing.assert_close(weights(model) - after, 0.9 * (after - before), **EXACT)
