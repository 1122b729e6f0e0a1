"""Optimizers against torch.optim, and what torch.optim lacks against the formulas written out."""

import copy

import pytest
import torch
from torch import nn

from largebatch import optim

STEPS = 25


def trajectory(make, steps=STEPS, lr_at=None):
    """Return the parameters after every step, float64; the gradients are a fixed function of step and parameter."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(4, 3, generator=generator, dtype=torch.float64)) for _ in range(2)]
    optimizer = make([{"params": params[:1], "weight_decay": 0.1}, {"params": params[1:], "weight_decay": 0.0}])
    noise = torch.randn(steps, 2, 4, 3, generator=generator, dtype=torch.float64)
    seen = []
    for step in range(steps):
        if lr_at:
            optim.set_hyperparameters(optimizer, {"lr": lr_at(step)})
        for p, n in zip(params, noise[step], strict=True):
            p.grad = 0.3 * p.detach() + n
        kept = [p.grad.clone() for p in params]
        optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(params, kept, strict=True)), "p.grad was changed"
        seen.append(torch.cat([p.detach().flatten() for p in params]))
    return torch.stack(seen), noise


PAIRS = {
    "sgd": (lambda g: optim.SGD(g, 0.1), lambda g: torch.optim.SGD(g, 0.1)),
    "momentum": (lambda g: optim.SGD(g, 0.1, 0.9), lambda g: torch.optim.SGD(g, 0.1, 0.9)),
    "nesterov": (
        lambda g: optim.SGD(g, 0.1, 0.9, nesterov=True),
        lambda g: torch.optim.SGD(g, 0.1, 0.9, nesterov=True),
    ),
    "velocity": (lambda g: optim.SGD(g, 0.1, 0.9, form="velocity"), lambda g: torch.optim.SGD(g, 0.1, 0.9)),
    "average": (lambda g: optim.SGD(g, 0.1, 0.9, form="average"), lambda g: torch.optim.SGD(g, 0.1, 0.9)),
    "adagrad": (lambda g: optim.Adagrad(g, 0.1), lambda g: torch.optim.Adagrad(g, 0.1)),
    "rmsprop": (lambda g: optim.RMSProp(g, 0.1), lambda g: torch.optim.RMSprop(g, 0.1)),
    "rmsprop momentum": (
        lambda g: optim.RMSProp(g, 0.1, momentum=0.9),
        lambda g: torch.optim.RMSprop(g, 0.1, momentum=0.9),
    ),
    "rmsprop centered": (
        lambda g: optim.RMSProp(g, 0.1, centered=True),
        lambda g: torch.optim.RMSprop(g, 0.1, centered=True),
    ),
    "adam": (lambda g: optim.Adam(g, 0.1), lambda g: torch.optim.Adam(g, 0.1)),
    "adamw": (lambda g: optim.AdamW(g, 0.1, (0.8, 0.95)), lambda g: torch.optim.AdamW(g, 0.1, (0.8, 0.95))),
}


@pytest.mark.parametrize("name", PAIRS)
def test_reduces_to_torch(name):
    ours, theirs = (trajectory(make)[0] for make in PAIRS[name])
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_hooks_around_a_step_are_called_once():
    """Of SGD too, whose step torch gives hooks of its own as soon as one of torch's is made."""
    parameter = torch.nn.Parameter(torch.ones(2))
    torch.optim.SGD([parameter], 0.1)
    optimizer = optim.SGD([parameter], 0.1)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    parameter.grad = torch.ones(2)
    optimizer.step()
    assert calls == ["before", "after"]
    torch.testing.assert_close(parameter.detach(), torch.full((2,), 0.9))


def test_velocity_takes_the_learning_rate_in():
    """v = mu*v + eta*g; p -= v, written out, while eta changes; torch's form then needs Goyal's momentum correction."""
    rates = [0.1] * 10 + [0.01] * 15
    ours, noise = trajectory(lambda g: optim.SGD(g, 0.1, 0.9, form="velocity"), lr_at=rates.__getitem__)
    start = trajectory(lambda g: torch.optim.SGD(g, 0.0))[0][0]
    p, v, decay = start, torch.zeros_like(start), torch.tensor([0.1] * 12 + [0.0] * 12, dtype=torch.float64)
    for step, lr in enumerate(rates):
        v = 0.9 * v + lr * (0.3 * p + noise[step].flatten() + decay * p)
        p = p - v
        torch.testing.assert_close(ours[step], p, rtol=1e-12, atol=1e-13)
    # u = mu*(eta'/eta)*u + eta'*g in the velocity form is torch's form (Goyal et al. 2017, remark 2).
    sums, _ = trajectory(lambda g: torch.optim.SGD(g, 0.1, 0.9), lr_at=rates.__getitem__)
    p, v, previous = start, torch.zeros_like(start), rates[0]
    for step, lr in enumerate(rates):
        v = 0.9 * (lr / previous) * v + lr * (0.3 * p + noise[step].flatten() + decay * p)
        p, previous = p - v, lr
        torch.testing.assert_close(sums[step], p, rtol=1e-10, atol=1e-12)


def one(values):
    """Feed a scalar parameter the given gradients through an optimizer factory; yield (parameter, state) after each."""

    def run(make):
        p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = make([p])
        for g in values:
            p.grad = torch.full_like(p, g)
            optimizer.step()
            yield p.item(), {k: float(v) for k, v in optimizer.state[p].items()}

    return run


def test_running_mean_is_exactly_the_mean_up_to_its_length():
    gradients = [3.0, -1.0, 4.0, 1.0, -5.0, 9.0, 2.0, 6.0, 5.0, 3.0]
    length1, length2 = 4, 8
    betas = (1 - 1 / length1, 1 - 1 / length2)
    averages = []
    for t, (_, state) in enumerate(
        one(gradients)(lambda p: optim.Adam(p, 0.1, betas, bias_correction="running_mean")), 1
    ):
        averages.append(state)
        for key, length, power in (("exp_avg", length1, 1), ("exp_avg_sq", length2, 2)):
            if t <= length:
                assert state[key] == pytest.approx(sum(g**power for g in gradients[:t]) / t, rel=1e-12)
            else:
                expected = averages[-2][key] * (1 - 1 / length) + gradients[t - 1] ** power / length
                assert state[key] == pytest.approx(expected, rel=1e-12)


def test_published_correction_counts_on_when_beta_changes():
    """The divisor is one minus the product of the betas used, so a constant gradient has an average of itself."""
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = optim.Adam([p], 0.1, (0.9, 0.999), eps=0.0)
    for step in range(30):
        optim.set_hyperparameters(optimizer, {"betas": (0.9, 0.999) if step < 10 else (0.5, 0.9)})
        before = p.item()
        p.grad = torch.full_like(p, 2.5)
        optimizer.step()
        assert before - p.item() == pytest.approx(0.1, rel=1e-12)  # lr * g / sqrt(g^2)


@pytest.mark.parametrize("exponent", [0.5, 1.0])
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("bias_correction", ["none", "running_mean"])
def test_rmsprop_as_written(exponent, centered, bias_correction):
    gradients, alpha, eps, lr = [0.5, -1.0, 2.0, 0.25, 1.5, -3.0], 0.75, 1e-3, 0.1

    def make(params):
        return optim.RMSProp(
            params, lr, alpha, eps, centered=centered, exponent=exponent, bias_correction=bias_correction
        )

    p = s = m = 0.0
    for t, (g, (ours, _)) in enumerate(zip(gradients, one(gradients)(make), strict=True), 1):
        weight = 1 / min(t, 1 / (1 - alpha)) if bias_correction == "running_mean" else 1 - alpha
        s, m = s + weight * (g * g - s), m + weight * (g - m)
        p -= lr * g / (max(0.0, s - centered * m * m) ** exponent + eps)
        assert ours == pytest.approx(p, rel=1e-10)


def test_state_dict_continues_the_trajectory():
    for make in (
        lambda p: optim.Adam(p, 0.1, bias_correction="running_mean"),
        lambda p: optim.AdamW(p, 0.1),
        lambda p: optim.RMSProp(p, 0.1, centered=True, momentum=0.9, bias_correction="running_mean"),
        lambda p: optim.SGD(p, 0.1, 0.9, form="average"),
        lambda p: optim.Adagrad(p, 0.1),
    ):
        p = nn.Parameter(torch.ones(3, dtype=torch.float64))
        optimizer = make([p])
        gradients = torch.randn(10, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        for g in gradients[:5]:
            p.grad = g.clone()
            optimizer.step()
        q = nn.Parameter(p.detach().clone())
        resumed = make([q])
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for g in gradients[5:]:
            p.grad, q.grad = g.clone(), g.clone()
            optimizer.step()
            resumed.step()
        assert torch.equal(p, q)


def test_param_groups_exempt_norms_and_biases():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    model[0].bias.requires_grad_(False)
    decayed, exempt = optim.param_groups(model, 0.1)
    assert [p.dim() for p in decayed["params"]] == [4, 2] and decayed["weight_decay"] == 0.1
    assert [p.dim() for p in exempt["params"]] == [1, 1, 1] and exempt["weight_decay"] == 0.0
    assert len(optim.param_groups(model, 0.1, decay_norm_and_bias=True)) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: optim.Adam(p, -1.0), "lr: expected"),
        (lambda p: optim.Adam(p, betas=(0.9, 1.0)), "betas: expected"),
        (lambda p: optim.Adam(p, bias_correction="none"), "bias_correction: expected"),
        (lambda p: optim.RMSProp(p, alpha=1.0), "alpha: expected"),
        (lambda p: optim.RMSProp(p, exponent=0.7), "exponent: expected"),
        (lambda p: optim.RMSProp(p, bias_correction="published"), "bias_correction: expected"),
        (lambda p: optim.SGD(p, 0.1, 0.9, form="mean"), "form: expected"),
        (lambda p: optim.SGD(p, 0.1, 0.9, nesterov=True, form="average"), "form: 'average' takes neither nesterov"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call([nn.Parameter(torch.zeros(1))])


def test_unknown_hyperparameter():
    optimizer = optim.Adam([nn.Parameter(torch.zeros(1))])
    with pytest.raises(KeyError, match="Adam has no hyper-parameter 'momentum'"):
        optim.set_hyperparameters(optimizer, {"momentum": 0.9})
