"""LARS and LAMB against trust ratios by hand in float64, AdamW, timm, and on sharded parameters."""

import copy
import importlib
import math

import pytest
import torch
from torch import nn

import largebatch
from largebatch import optim
from largebatch.errors import UserError


def tensors(seed=0):
    """Return a matrix, a bias, a convolution and a scale, float64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(4, 3), (4,), (2, 3, 3, 3), (2,)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def train(make, steps=12, start=None):
    """Return the parameters after every step; gradients depend on step and parameter, and must be left alone."""
    params = [nn.Parameter(t.clone()) for t in (start or tensors())]
    groups = [
        {"params": [p for p in params if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in params if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = make(groups)
    path = []
    for step in range(steps):
        for p, g in zip(params, tensors(100 + step), strict=True):
            p.grad = 0.3 * p.detach() + g
        kept = [p.grad.clone() for p in params]
        optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(params, kept, strict=True)), "p.grad was changed"
        path.append([p.detach().clone() for p in params])
    return path


def norm(tensor):
    return math.sqrt(sum(value * value for value in tensor.flatten().tolist()))


def lars_by_hand(lr, mu, trust, adapt_all, steps=12):
    params = tensors()
    buffers = [torch.zeros_like(p) for p in params]
    path = []
    for step in range(steps):
        for index, g in enumerate(tensors(100 + step)):
            p = params[index]
            g = 0.3 * p + g
            decay = 0.1 if p.dim() > 1 else 0.0
            ratio = trust * norm(p) / (norm(g) + decay * norm(p)) if p.dim() > 1 or adapt_all else 1.0
            buffers[index] = mu * buffers[index] + lr * ratio * (g + decay * p)
            params[index] = p - buffers[index]
        path.append(list(params))
    return path


def lamb_by_hand(lr, beta1, beta2, eps, adapt_all, steps=12):
    params = tensors()
    m, s = ([torch.zeros_like(p) for p in params] for _ in range(2))
    path = []
    for step in range(steps):
        for index, g in enumerate(tensors(100 + step)):
            p = params[index]
            g = 0.3 * p + g
            m[index] = beta1 * m[index] + (1 - beta1) * g
            s[index] = beta2 * s[index] + (1 - beta2) * g**2
            corrected = m[index] / (1 - beta1 ** (step + 1)), s[index] / (1 - beta2 ** (step + 1))
            u = corrected[0] / (corrected[1] ** 0.5 + eps) + (0.1 if p.dim() > 1 else 0.0) * p
            ratio = norm(p) / norm(u) if p.dim() > 1 or adapt_all else 1.0
            params[index] = p - lr * ratio * u
        path.append(list(params))
    return path


def assert_same(found, expected, rtol=1e-11):
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-13)


@pytest.mark.parametrize("adapt_all", [False, True])
def test_lars_by_hand(adapt_all):
    ours = train(lambda g: optim.LARS(g, 2.0, 0.9, trust_coefficient=0.02, adapt_norm_and_bias=adapt_all))
    assert_same(ours, lars_by_hand(2.0, 0.9, 0.02, adapt_all))


@pytest.mark.parametrize("adapt_all", [False, True])
def test_lamb_by_hand(adapt_all):
    ours = train(lambda g: optim.LAMB(g, 0.05, (0.8, 0.95), 1e-3, adapt_norm_and_bias=adapt_all))
    assert_same(ours, lamb_by_hand(0.05, 0.8, 0.95, 1e-3, adapt_all))


def test_the_first_step_of_a_layer_has_the_length_it_should():
    """LAMB moves a layer by lr*|p|; LARS without weight decay by lr*trust_coefficient*|p|."""
    for make, length in (
        (lambda p: optim.LAMB(p, 0.05), 0.05),
        (lambda p: optim.LARS(p, 3.0, trust_coefficient=0.01), 0.03),
    ):
        p = nn.Parameter(tensors()[0])
        before, p.grad = p.detach().clone(), 1e-4 * torch.ones_like(p)
        make([p]).step()
        assert norm(p.detach() - before) == pytest.approx(length * norm(before), rel=1e-12)


def test_what_is_not_adapted_follows_adamw_and_sgd():
    """Norms and biases: LAMB is torch's AdamW, LARS torch's SGD; a group may say otherwise."""
    for ours, theirs in (
        (lambda g: optim.LAMB(g, 0.01, eps=1e-8), lambda g: torch.optim.AdamW(g, 0.01, eps=1e-8)),
        (lambda g: optim.LARS(g, 0.01), lambda g: torch.optim.SGD(g, 0.01, 0.9)),
    ):
        for index in (1, 3):
            found, expected = ([step[index] for step in train(make)] for make in (ours, theirs))
            assert_same([found], [expected])
    params = [nn.Parameter(t) for t in tensors()[:2]]
    optimizer = optim.LAMB([{"params": params[:1]}, {"params": params[1:], "adapt_norm_and_bias": True}])
    assert [group["adapt_norm_and_bias"] for group in optimizer.param_groups] == [False, True]


def test_layers_of_zeros_and_zero_gradients_have_a_ratio_of_one():
    """A layer that starts at zero moves as under AdamW or SGD at the same rate; a zero gradient moves nothing."""
    for make, length in ((lambda p: optim.LAMB(p, 0.1, weight_decay=0.0), 0.1), (lambda p: optim.LARS(p, 0.1), 0.1)):
        p, still = (nn.Parameter(torch.full((2, 2), value, dtype=torch.float64)) for value in (0.0, 1.0))
        p.grad, still.grad = torch.ones_like(p), torch.zeros_like(still)
        make([p, still]).step()
        torch.testing.assert_close(p.detach(), torch.full_like(p, -length), rtol=1e-5, atol=0.0)
        assert torch.equal(still.detach(), torch.ones_like(still))


def test_a_learning_rate_of_zero_stands_still():
    for make in (lambda g: optim.LAMB(g, 0.0), lambda g: optim.LARS(g, 0.0)):
        assert_same(train(make, steps=2)[-1:], [tensors()])


def timm_module(name):
    """Return a module of timm, or skip: it needs torchvision, whose import may fail with more than ImportError."""
    try:
        return importlib.import_module(f"timm.optim.{name}")
    except (ImportError, RuntimeError, AttributeError) as error:
        pytest.skip(f"timm cannot be imported: {error}")


def test_lars_is_timms():
    lars = timm_module("lars").Lars
    ours = train(lambda g: optim.LARS(g, 2.0, 0.9, trust_coefficient=0.02))
    assert_same(ours, train(lambda g: lars(g, 2.0, 0.9, trust_coeff=0.02, eps=0.0)))


def test_lamb_is_timms():
    lamb = timm_module("lamb").Lamb
    ours = train(lambda g: optim.LAMB(g, 0.05, (0.8, 0.95), 1e-3))
    assert_same(ours, train(lambda g: lamb(g, 0.05, betas=(0.8, 0.95), eps=1e-3, max_grad_norm=None)))


def tracked_training(make, per, steps=6):
    """Train a tracked model on 12 samples in micro-batches of 4; return its weights after every step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    inputs, targets = torch.randn(12, 5).double(), torch.randn(12, 3).double()
    if per:
        largebatch.track(model, per=per)
    optimizer = make(optim.param_groups(model, weight_decay=0.1))
    path = []
    for _ in range(steps):
        for start in range(0, 12, 4):
            piece = slice(start, start + 4)
            ((model(inputs[piece]) - targets[piece]).square().sum() / 12).backward()
        if per and hasattr(optimizer, "set_batch"):
            optimizer.set_batch(12, 12 if per == "sample" else 3)
        optimizer.step()
        optimizer.zero_grad()
        path.append([value.clone() for value in model.state_dict().values()])
    return path


@pytest.mark.parametrize("per", ["sample", "micro_batch"])
def test_lamb_reads_tracked_squares(per):
    """At its own batch size the tracked second moment is the plain one; at another it is not."""
    plain = tracked_training(lambda g: optim.LAMB(g, 0.02), None)
    same = tracked_training(lambda g: optim.LAMB(g, 0.02, reference_batch_size=12), per)
    for ours, theirs in zip(same, plain, strict=True):
        assert_same([ours], [theirs], rtol=1e-10)
    smaller = tracked_training(lambda g: optim.LAMB(g, 0.02, reference_batch_size=4), per)
    assert not torch.allclose(smaller[-1][0], plain[-1][0], rtol=1e-3)


def test_lars_passes_shadows_over():
    plain = tracked_training(lambda g: optim.LARS(g, 1.0), None)
    for ours, theirs in zip(tracked_training(lambda g: optim.LARS(g, 1.0), "sample"), plain, strict=True):
        assert_same([ours], [theirs])


def test_state_dict_continues_the_trajectory():
    for make in (lambda g: optim.LARS(g, 2.0), lambda g: optim.LAMB(g, 0.05, bias_correction="running_mean")):
        params = [nn.Parameter(t) for t in tensors()]
        optimizer = make(params)
        for step in range(5):
            for p, g in zip(params, tensors(step), strict=True):
                p.grad = g
            optimizer.step()
        twins = [nn.Parameter(p.detach().clone()) for p in params]
        resumed = make(twins)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for p, twin, g in zip(params, twins, tensors(9), strict=True):
            p.grad, twin.grad = g.clone(), g.clone()
        optimizer.step()
        resumed.step()
        assert all(torch.equal(p, twin) for p, twin in zip(params, twins, strict=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: optim.LARS(p, -1.0), "lr: expected a value >= 0, got -1.0"),
        (lambda p: optim.LARS(p, 1.0, 1.0), "momentum: expected"),
        (lambda p: optim.LARS(p, 1.0, weight_decay=-1.0), "weight_decay: expected"),
        (lambda p: optim.LARS(p, 1.0, trust_coefficient=0.0), "trust_coefficient: expected"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(UserError, match=message):
        call([nn.Parameter(torch.zeros(1))])


def test_closure():
    p = nn.Parameter(torch.ones(2, 2))

    def closure():
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optim.LARS([p], 0.1).step(closure) == 4.0


def sharded_training(rank, world_size, name):
    """Train under FSDP2 and alone on the same samples; return both models' weights."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def make(model):
        groups = optim.param_groups(model, weight_decay=0.1)
        if name == "lars":
            return optim.LARS(groups, 1.0)
        if name == "lamb":
            return optim.LAMB(groups, 0.02, reference_batch_size=4)
        return optim.Quench(groups, lambda_eta=1e-2, K=24, sigma2="sample", eps=1e-6)

    weights = []
    for ranks, index in ((1, 0), (world_size, rank)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)).double()
        inputs, targets = torch.randn(12, 5).double(), torch.randn(12, 2).double()
        largebatch.track(model)
        if ranks > 1:
            fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
        optimizer = make(model)
        mine = slice(index * 12 // ranks, (index + 1) * 12 // ranks)
        for _ in range(5):
            ((model(inputs[mine]) - targets[mine]).square().sum() * ranks / 12).backward()
            if hasattr(optimizer, "set_batch"):
                optimizer.set_batch(12, 12, ranks)
            optimizer.step()
            optimizer.zero_grad()
        values = model.state_dict().values()
        weights.append([value.full_tensor() if ranks > 1 else value for value in values])
    return weights


@pytest.mark.parametrize("name", ["lars", "lamb", "quench"])
def test_sharded_parameters_follow_whole_ones(rank_pool, name):
    """Three ranks, layers of 7 and 2 rows: uneven shards, one of them empty."""
    for whole, sharded in rank_pool(3, sharded_training, name):
        assert_same([sharded], [whole], rtol=1e-9)


class Roles(nn.Module):
    """Weights, and what has several dimensions and is none."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4, bias=False), nn.LayerNorm([2, 4])
        self.layer_scale, self.cls_token = nn.Parameter(torch.full((4, 1, 1), 0.5)), nn.Parameter(torch.ones(1, 2, 4))


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_what_is_adapted_goes_by_role_and_not_by_dimension(name, decay):
    """Of a matrix as by hand, of all else SGD's and AdamW's step without decay, whatever its shape."""
    torch.manual_seed(0)
    model = Roles().double()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.3)
    groups = optim.param_groups(model, decay, by_role=True)
    assert [group["adapted"] for group in groups] == [True, False]
    kind = optim.LARS(groups, 0.1, trust_coefficient=0.02) if name == "lars" else optim.LAMB(groups, 0.1, eps=0.0)
    kind.step()
    for n, p in model.named_parameters():
        rate = 0.1 * (0.3 if name == "lars" else 1.0)
        expected = before[n] - rate
        if n == "linear.weight" and name == "lars":
            ratio = 0.02 * norm(before[n]) / (0.3 * 4 + decay * norm(before[n]))
            expected = before[n] - 0.1 * ratio * (0.3 + decay * before[n])
        elif n == "linear.weight":
            u = 1.0 + decay * before[n]
            expected = before[n] - 0.1 * norm(before[n]) / norm(u) * u
        torch.testing.assert_close(p.detach(), expected, rtol=1e-11, atol=1e-13)


def test_a_group_that_was_one_is_continued_as_two():
    """A run of LARS without weight decay, saved when it had one group of parameters."""
    from largebatch.distributed.state import group_state, load_group_state

    model = Roles()
    saved = group_state(optim.LARS(optim.param_groups(model), 0.5))
    saved[0]["batch_size"] = 96
    optimizer = optim.LARS(optim.param_groups(model, by_role=True), 0.1)
    load_group_state(optimizer, saved)
    assert [(g["lr"], g["batch_size"], g["adapted"]) for g in optimizer.param_groups] == [
        (0.1, 96, True),
        (0.1, 96, False),
    ]
