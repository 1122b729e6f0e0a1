"""Whole models against one backward pass for each sample: in float64, in lower precision, and where samples mix."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
import torch.nn.functional as F
from oracle import EXACT, assert_agrees, distance, loop
from torch import nn

from largebatch.distributed.presence import check_statistics
from largebatch.models import CNN, GPT, MLP, resnet18, resnet50
from largebatch.models.norm import _GhostBatchNorm
from largebatch.models.resnet import Bottleneck
from largebatch.moments import grad_sample_sq, track

pytestmark = pytest.mark.filterwarnings("ignore:.*has no rule")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def unsettled(model):
    """Return a model in which nothing is zero or one by initialisation: norms, running statistics, last layers."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.3)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return model


def photos(n, size=16):
    return torch.randn(n, 3, size, size, dtype=torch.float64)


def sentences(n):
    return torch.randint(0, 20, (n, 9))


def bottlenecks(norm="batch", group_size=32):
    """The blocks of a ResNet-50, three of them and narrow: with a projection, without, and with a stride."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False),
        nn.MaxPool2d(3, stride=2, padding=1),
        Bottleneck(8, 4, 1, norm, group_size),
        Bottleneck(16, 4, 1, norm, group_size),
        Bottleneck(16, 8, 2, norm, group_size),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 5),
    )


MODELS = {
    "mlp": (lambda: MLP(30, [16, 12], 5, "gelu"), lambda n: torch.randn(n, 3, 10, dtype=torch.float64)),
    "cnn": (lambda: CNN((3, 16, 16), [6, 8], 5), photos),
    "cnn, group norm": (lambda: CNN((3, 16, 16), [16, 32], 5, "group"), photos),
    "bottlenecks": (lambda: bottlenecks().eval(), lambda n: photos(n, 32)),
    "bottlenecks, group norm": (lambda: bottlenecks("group"), lambda n: photos(n, 32)),
    "resnet18": (lambda: resnet18(5).eval(), lambda n: photos(min(n, 2), 8)),
    "gpt": (lambda: GPT(20, 12, 2, 2, 8), sentences),  # with tied weights, as it comes
    "gpt, untied, full context": (lambda: GPT(20, 9, 2, 2, 8, tie_weights=False), sentences),
    **{f"tiny {name}": pair for name, pair in tiny.MODELS.items()},
}


def make(name, n=4):
    build, data = MODELS[name]
    return unsettled(build().double()), data(n)


@pytest.mark.parametrize("name", MODELS)
def test_against_a_loop_over_samples(name):
    assert_agrees(*make(name), fallback=["lstm"] if name == "tiny lstm" else [])


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_resnet50_in_full(training):
    """25.6 million parameters."""
    model, inputs = unsettled(resnet50(10).double()).train(training), photos(3, 64)
    if training:
        assert_summands(model, inputs)
    else:
        assert_agrees(model, inputs)


# Where batch norm mixes the samples there is no loss of a sample alone. The statistic is then that of a sample's summand
# in the batch's gradient: what comes through the sample's own use of the parameter, all activations being the batch's.
# The oracle gives every sample a copy of its own of every parameter and differentiates the batch's loss by the copies.


def with_copies(model, batch_size):
    """Return a copy of `model` that uses one copy of each parameter a sample, and {name: copies [n, *shape]}."""
    model = copy.deepcopy(model)
    copies = {}
    for path, module in model.named_modules():
        mine = {}
        for name, parameter in module.named_parameters(recurse=False):
            mine[name] = parameter.detach().expand(batch_size, *parameter.shape).clone().requires_grad_()
            copies[f"{path}.{name}".lstrip(".")] = mine[name]
        if mine:
            module.forward = COPIED[type(module)](module, mine)
    return model, copies


def copied_convolution(module, copies):
    bias = copies.get("bias", [None] * len(copies["weight"]))

    def forward(x):
        rows = zip(x.split(1), copies["weight"], bias, strict=True)
        return torch.cat([F.conv2d(row, w, b, module.stride, module.padding) for row, w, b in rows])

    return forward


def copied_linear(module, copies):
    return lambda x: torch.einsum("bi,boi->bo", x, copies["weight"]) + copies["bias"]


def copied_batch_norm(module, copies):
    size = getattr(module, "group_size", None)

    def forward(x):
        shape = (*x.shape[:2], *[1] * (x.ndim - 2))
        dims = [0, *range(2, x.ndim)]
        if module.training:
            groups = x.split(size or len(x))
            moments = [(g.mean(dims, keepdim=True), g.var(dims, unbiased=False, keepdim=True)) for g in groups]
            hat = torch.cat([(g - m) / (v + module.eps).sqrt() for g, (m, v) in zip(groups, moments, strict=True)])
        else:
            mean, var = (t.view(1, *shape[1:]) for t in (module.running_mean, module.running_var))
            hat = (x - mean) / (var + module.eps).sqrt()
        return hat * copies["weight"].view(shape) + copies["bias"].view(shape)

    return forward


COPIED = {
    nn.Conv2d: copied_convolution,
    nn.Linear: copied_linear,
    nn.BatchNorm1d: copied_batch_norm,
    nn.BatchNorm2d: copied_batch_norm,
    **dict.fromkeys(_GhostBatchNorm.__subclasses__(), copied_batch_norm),
}


def summands(model, inputs, target):
    """Return (gradients of the mean loss, (1/B) sum_b g_b^2) by way of the copies."""
    model, copies = with_copies(model, len(inputs))
    output = model(inputs)
    grads = torch.autograd.grad((output * target + output.square() / 2).sum(), list(copies.values()))
    named = dict(zip(copies, grads, strict=True))
    return {k: g.mean(0) for k, g in named.items()}, {k: g.square().mean(0) for k, g in named.items()}


def assert_summands(model, inputs):
    with torch.no_grad():
        target = torch.randn_like(model(inputs))
    gradients, expected = summands(model, inputs, target)
    track(model)
    output = model(inputs)
    ((output * target + output.square() / 2).sum() / len(inputs)).backward()
    check_statistics(model)
    statistic = grad_sample_sq(model, len(inputs))
    assert statistic.keys() == expected.keys()
    for name, squares in expected.items():
        # Where summands cancel, as a weight's do in front of a norm that undoes its scale, they are the yardstick.
        scale = squares.max().sqrt()
        assert (model.get_parameter(name).grad - gradients[name]).abs().max() <= EXACT * scale, f"gradient of {name}"
        assert distance(statistic[name], squares) <= EXACT, f"statistic of {name}"


TRAINED = {
    "one group": lambda: CNN((3, 16, 16), [4, 6], 5, "batch"),
    "groups of 4": lambda: CNN((3, 16, 16), [4, 6], 5, "batch", 4),
    "groups of 3, last of one": lambda: CNN((3, 16, 16), [4, 6], 5, "batch", 3),
    "groups of 1": lambda: CNN((3, 16, 16), [4, 6], 5, "batch", 1),
    "bottlenecks": bottlenecks,
    "bottlenecks, groups of 5": lambda: bottlenecks(group_size=5),
    "resnet18": lambda: resnet18(5),
    "resnet18, groups of 2": lambda: resnet18(5, norm_group_size=2),
    "tiny resnet": tiny.resnet,
    "batch norm of features": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(768, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)
    ),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if "resnet18" in n else n for n in TRAINED])
def test_batch_norm_in_training_gives_each_sample_its_summand(name):
    model = unsettled(TRAINED[name]().double())
    assert_summands(model, photos(3 if "resnet18" in name else 7))


def test_the_copies_agree_with_the_loop_where_samples_do_not_mix():
    """The oracle of batch norm, checked by the other one."""
    model, inputs = make("bottlenecks")
    assert_agrees(copy.deepcopy(model), inputs)
    assert_summands(model, inputs)


def test_a_group_of_a_single_value():
    """Seven samples in groups of three on maps of 1 x 1: the last sample comes out as the bias."""
    assert_summands(unsettled(CNN((3, 2, 2), [4], 3, "batch", 3).double()), photos(7, 2))


@pytest.mark.parametrize("name", ["tiny resnet", "groups of 4", "bottlenecks"])
def test_tracking_leaves_the_running_statistics_alone(name):
    model, inputs = TRAINED[name]().double(), photos(7)
    plain = copy.deepcopy(model)
    track(model)
    for m in (model, plain):
        m(inputs).square().sum().backward()
    assert dict(plain.named_buffers())
    for (name, buffer), other in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, rtol=EXACT, atol=1e-13, msg=name)


# The unit roundoff u, half the distance from 1 to the next number, bounds the relative error of one rounding. A model's
# backward pass rounds, in each of its L products and normalisations, input, weight, output, and the gradients of output and
# input; these 5 L errors are independent and spread evenly over [-u, u], so that together they come to sqrt(5 L / 3) u.
# Squaring doubles that, and a factor of 4 is left for nonlinearities and norms, which pass errors on unevenly.
UNIT_ROUNDOFF = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def allowed(model, dtype):
    depth = sum(name.endswith("weight") for name, _ in model.named_parameters())
    return 4 * 2 * (5 * depth / 3) ** 0.5 * UNIT_ROUNDOFF[dtype]


def relative_error(a, b):
    """In the Euclidean norm, since single entries may be small and their roundings not."""
    return float((a.double() - b).norm() / b.norm())


ROUGH = {
    "mlp": MODELS["mlp"],
    "cnn": MODELS["cnn"],
    "cnn, group norm": MODELS["cnn, group norm"],
    "cnn, batch norm in training": (TRAINED["groups of 4"], photos),
    "resnet18": MODELS["resnet18"],
    "gpt": MODELS["gpt"],
    "vit": MODELS["tiny vit"],
}


def rough(name):
    """Return a model in float32, inputs, the same in float64, and targets."""
    build, data = ROUGH[name]
    model, inputs = unsettled(build().float()), data(8)
    exact, exact_inputs = copy.deepcopy(model).double(), inputs
    if inputs.is_floating_point():
        inputs = inputs.float()
        exact_inputs = inputs.double()
    with torch.no_grad():
        target = torch.randn_like(exact(exact_inputs))
    return model, inputs, exact, exact_inputs, target


def rough_statistic(model, inputs, target, dtype):
    track(model)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        output = model(inputs).double()
    ((output * target + output.square() / 2).sum() / len(inputs)).backward()
    check_statistics(model)
    statistic = grad_sample_sq(model, len(inputs))
    assert all(squares.dtype == torch.float32 for squares in statistic.values())
    return statistic


@pytest.mark.parametrize("dtype", UNIT_ROUNDOFF, ids=str)
@pytest.mark.parametrize("name", ROUGH)
def test_lower_precision(name, dtype, monkeypatch):
    """float32, and autocast from float32 weights, against float64 from the same weights and data.

    With GELU in the place of ReLU: next to zero a rounding switches a ReLU, whose error then goes with the root of u.
    """
    monkeypatch.setattr(F, "relu", F.gelu)
    model, inputs, exact, exact_inputs, target = rough(name)
    expected = summands(exact, exact_inputs, target)[1] if "training" in name else loop(exact, exact_inputs, target)
    statistic = rough_statistic(model, inputs, target, dtype)
    assert statistic.keys() == expected.keys()
    for key, squares in statistic.items():
        error = relative_error(squares, expected[key])
        assert error <= allowed(model, dtype), f"{key}: {error}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["cnn", pytest.param("resnet18", marks=pytest.mark.slow)])
def test_lower_precision_is_autocasts_own_where_a_relu_may_switch(name, dtype):
    """The statistic is no farther from float64 than the squares of a loop over samples of the untracked model."""
    model, inputs, exact, exact_inputs, target = rough(name)
    expected = loop(exact, exact_inputs, target)
    with torch.autocast("cpu", dtype):
        own = loop(model, inputs, target)
    statistic = rough_statistic(model, inputs, target, dtype)
    for key, squares in expected.items():
        # They round the sums over samples and positions in another order; the switched units are the same.
        most = 1.25 * relative_error(own[key], squares) + UNIT_ROUNDOFF[dtype]
        assert relative_error(statistic[key], squares) <= most, key
