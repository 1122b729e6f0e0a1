"""Everything around a model: accumulation, wrappers, copies, checkpoints, the compiler, other libraries."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from oracle import EXACT, assert_agrees, backward, distance, loop
from tiny import GPT, MODELS, ViT, cnn, images, mlp, resnet, text
from torch import nn
from torch.utils.checkpoint import checkpoint

from largebatch.distributed.presence import check_statistics
from largebatch.errors import UserError
from largebatch.moments import (
    chosen_samples,
    grad_sample_sq,
    is_shadow,
    shadows,
    statistic_scale,
    track,
    untrack,
)

N = 5

pytestmark = pytest.mark.filterwarnings("ignore:.*has no rule")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make(name):
    build, data = MODELS[name]
    return build().double(), data(N)


def assert_same(a, b, tolerance=EXACT):
    assert a.keys() == b.keys()
    for name in a:
        assert distance(a[name], b[name]) <= tolerance, name


@pytest.mark.parametrize("name", ["mlp", "cnn", "gpt, tied"])
def test_accumulation(name):
    model, inputs = make(name)
    target = torch.randn_like(model(inputs))
    track(model)
    backward(model, inputs, target)
    whole = grad_sample_sq(model, N)
    for parameter in model.parameters():
        parameter.grad = None
    for rows in (slice(0, 2), slice(2, 5)):
        output = model(inputs[rows])
        ((output * target[rows] + output.square() / 2).sum() / N).backward()
    assert_same(grad_sample_sq(model, N), whole)


@pytest.mark.parametrize("tied", [False, True])
def test_activation_checkpointing(tied):
    model, inputs = GPT(tied).double(), text(N)
    target = torch.randn_like(model(inputs))
    track(model)
    backward(model, inputs, target)
    whole = grad_sample_sq(model, N)
    model.use_reentrant = False
    backward(model, inputs, target)
    assert_same(grad_sample_sq(model, N), whole)


@pytest.mark.parametrize("samples", [None, 2])
def test_activation_checkpointing_of_moved_samples(samples):
    """A segment that begins on time-first activations, and is cut into modules whose inputs are rows of positions."""

    class Segments(nn.Module):
        def __init__(self, use_checkpoints):
            super().__init__()
            self.inner, self.outer = nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
            self.use_checkpoints = use_checkpoints

        def forward(self, x):
            h = self.inner(x).transpose(0, 1).reshape(-1, 3)
            h = checkpoint(self.outer, h, use_reentrant=False) if self.use_checkpoints else self.outer(h)
            return h.view(x.shape[1], x.shape[0], 3).transpose(0, 1)

    x = torch.randn(N, 4, 3, dtype=torch.float64)
    plain = Segments(False).double()
    twin = Segments(True).double()
    twin.load_state_dict(plain.state_dict())
    for model in (plain, twin):
        backward(track(model, samples=samples), x, torch.ones_like(x))
    assert_same(grad_sample_sq(twin, N), grad_sample_sq(plain, N))


def test_reentrant_checkpoints_are_refused():
    model = track(GPT(use_reentrant=True))
    with pytest.raises(
        UserError, match=r"'norm\.weight' meets the batch in layer_norm.*re-entrant.*use_reentrant=False"
    ):
        model(text(N))

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=True)

    with pytest.raises(UserError, match=r"re-entrant.*use_reentrant=False"):
        track(Last())(torch.randn(N, 3, requires_grad=True))


class TestSamples:
    """Squares of some samples of a pass, each weighted for those it stands for."""

    @pytest.mark.parametrize("name", ["mlp", "cnn", "gpt, tied", "vit"])
    def test_those_at_even_distances(self, name):
        build, data = MODELS[name]
        model, inputs = build().double(), data(9)
        target = torch.randn_like(model(inputs).double())
        chosen = [1, 4, 7]
        expected = loop(model, inputs[chosen], target[chosen])
        plain = copy.deepcopy(model)
        track(model, samples=3)
        for m in (model, plain):
            backward(m, inputs, target)
        assert_same(grad_sample_sq(model, 9), expected)
        for key, p in plain.named_parameters():
            assert torch.equal(dict(model.named_parameters())[key].grad, p.grad)

    def test_those_chosen(self):
        model, inputs = make("mlp")
        target = torch.randn_like(model(inputs))
        expected = loop(model, inputs[[0, 3]], target[[0, 3]])
        with chosen_samples([0, 3], 2.5):
            backward(track(model), inputs, target)
        assert_same(grad_sample_sq(model, N), expected)
        with chosen_samples([], 1.0):
            backward(model, inputs, target)
        assert all(not squares.any() for squares in grad_sample_sq(model, N).values())

    def test_as_many_as_there_are_is_all(self):
        model, inputs = make("cnn")
        target = torch.randn_like(model(inputs))
        whole = loop(model, inputs, target)
        backward(track(model, samples=50), inputs, target)
        assert_same(grad_sample_sq(model, N), whole)

    @pytest.mark.parametrize("samples", [0, -1])
    def test_none_is_refused(self, samples):
        with pytest.raises(UserError, match="samples must be at least 1"):
            track(mlp(), samples=samples)


@pytest.mark.filterwarnings("ignore")
def test_the_compiler_leaves_a_tracked_model_as_it_is():
    torch._dynamo.reset()
    model, inputs = make("cnn")
    target = torch.randn_like(model(inputs))
    track(model)
    backward(model, inputs, target)
    whole = grad_sample_sq(model, N)
    backward(model, inputs, target, torch.compile(model, backend="eager"))
    assert_same(grad_sample_sq(model, N), whole)


def test_state_dict_and_parameters():
    model, plain = track(resnet()), resnet()
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    assert str(model.load_state_dict(plain.state_dict())) == "<All keys matched successfully>"
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.weight"):
        model.load_state_dict({k: v for k, v in plain.state_dict().items() if k != "0.weight"})
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    named = dict(model.named_parameters())
    assert {name for name, p in named.items() if not is_shadow(p)} == set(dict(plain.named_parameters()))
    assert set(shadows(model)) == set(dict(plain.named_parameters()))
    assert all(shadows(model)[name].shape == p.shape for name, p in plain.named_parameters())


def test_tied_parameters_have_one_shadow():
    model = track(GPT(tied=True))
    assert "head.weight" not in shadows(model)
    assert model.head.weight_grad_sq is model.tokens.weight_grad_sq


def test_copies_are_independent_and_complete():
    model, inputs = make("cnn")
    target = torch.randn_like(model(inputs))
    track(model)
    twin = copy.deepcopy(model)
    backward(twin, inputs, target)
    assert all(p.grad is None for p in model.parameters())
    backward(model, inputs, target)
    assert_same(grad_sample_sq(twin, N), grad_sample_sq(model, N))


def test_a_pickled_model_is_tracked():
    model, inputs = make("gpt")
    target = torch.randn_like(model(inputs))
    twin = pickle.loads(pickle.dumps(track(model)))
    for m in (model, twin):
        backward(m, inputs, target)
    assert_same(grad_sample_sq(twin, N), grad_sample_sq(model, N))
    assert not shadows(untrack(twin))


def test_forward_shows_the_users_signature():
    """Hugging Face's Trainer reads off it what the model takes."""

    class Model(nn.Linear):
        def forward(self, pixels, labels: int = 3, *, scale=1.0):
            return super().forward(pixels) * scale

    model = Model(4, 3)
    plain = inspect.signature(model.forward)
    for tracked in (track(model), copy.deepcopy(model)):
        assert inspect.signature(tracked.forward) == plain and list(plain.parameters) == ["pixels", "labels", "scale"]
    model = nn.Linear(4, 3)
    model.forward = functools.partial(model.forward)  # replaced on the instance
    assert list(inspect.signature(track(model).forward).parameters) == ["input"]
    assert list(inspect.signature(untrack(model).forward).parameters) == ["input"]


def test_untrack_leaves_nothing_behind():
    model = mlp()
    before = {name: sorted(vars(m)) for name, m in model.named_modules()}
    hooks = {name: len(m._state_dict_hooks) for name, m in model.named_modules()}
    untrack(track(model))
    assert {name: sorted(vars(m)) for name, m in model.named_modules()} == before
    assert {name: len(m._state_dict_hooks) for name, m in model.named_modules()} == hooks
    assert not shadows(model)


def test_functional_call():
    model, inputs = make("cnn")
    target = torch.randn_like(model(inputs))
    track(model)
    backward(model, inputs, target)
    whole = grad_sample_sq(model, N)
    parameters = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters() if not is_shadow(p)}
    backward(model, inputs, target, lambda x: torch.func.functional_call(model, parameters, (x,)))
    assert_same(grad_sample_sq(model, N), whole)


def test_hooks_run_and_evaluation_is_free():
    model, inputs = make("mlp")
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append("forward"))
    model[2].register_full_backward_hook(lambda *_: calls.append("backward"))
    track(model)
    with torch.no_grad():
        output = model(inputs)
    assert output.grad_fn is None and calls == ["forward"]
    model.eval()
    model(inputs).sum().backward()
    assert sorted(calls) == ["backward", "forward", "forward"]
    model[2].weight.register_hook(lambda grad: 2 * grad)
    with pytest.raises(UserError, match=r"parameter '2\.weight' has a hook"):
        model(inputs)


def test_train_and_eval_between_forward_and_backward():
    model, inputs = make("cnn")
    target = torch.randn_like(model(inputs))
    track(model)
    output = model(inputs)
    model.eval()
    with torch.no_grad():
        model(inputs[:2])
    ((output * target + output.square() / 2).sum() / N).backward()
    assert_same(grad_sample_sq(model, N), loop(model, inputs, target))


def test_one_forward_pass_for_each_backward_pass():
    """What two passes owe to one sample would have to be added before squaring, and nothing tells whether it is one sample."""
    model, inputs = track(mlp().double()), torch.randn(N, 6, dtype=torch.float64)
    with pytest.raises(UserError, match="two forward passes of one backward pass"):
        (model(inputs).sum() + model(inputs.sin()).sum()).backward()
    model.zero_grad()
    output = model(inputs)
    output.sum().backward(retain_graph=True)
    with pytest.raises(UserError, match="two backward passes of one forward pass"):
        output.square().sum().backward()
    model.zero_grad()
    target = torch.randn_like(output)
    backward(model, inputs, target)  # neither leaves anything behind
    assert_same(grad_sample_sq(model, N), loop(model, inputs, target))


def test_a_gradient_taken_on_the_way_is_no_backward_pass():
    model, inputs = make("mlp")
    target = torch.randn_like(model(inputs))
    x = inputs.clone().requires_grad_()
    output = track(model)(x)
    torch.autograd.grad(output.sum(), x, retain_graph=True)
    ((output * target + output.square() / 2).sum() / N).backward()
    assert_same(grad_sample_sq(model, N), loop(model, inputs, target))


def test_inputs_by_keyword_and_in_containers():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 2)

        def forward(self, batch, scale=1.0):
            return self.inner(batch["x"] * scale)

    model, inputs = track(Model().double()), torch.randn(N, 4, 3, dtype=torch.float64)
    target = torch.randn(N, 4, 2, dtype=torch.float64)
    backward(model, inputs, target, lambda x: model(batch={"x": x}))
    statistic = grad_sample_sq(model, N)
    assert_same(statistic, {f"inner.{k}": v for k, v in loop(model.inner, inputs, target).items()})


class Pair(nn.Module):
    """Two arguments with a row for each sample, or one of them the same for all."""

    def __init__(self, join):
        super().__init__()
        self.inner, self.join = nn.Linear(3, 3), join

    def forward(self, x, y):
        return self.join(self.inner(x), y, self.inner)


@pytest.mark.parametrize(
    ("join", "shape", "is_shared"),
    [
        (lambda h, y, inner: h * y, (N, 3), False),
        (lambda h, y, inner: inner(y) + h, (N, 3), False),
        (lambda h, y, inner: h @ y, (3, N), True),
        (lambda h, y, inner: h @ y.t(), (N, 3), True),
        (lambda h, y, inner: h @ inner(y).t(), (N, 3), True),
    ],
    ids=["masked", "both through a layer", "shared", "shared, as many rows as samples", "shared, through the layer"],
)
def test_a_second_argument(join, shape, is_shared):
    model = Pair(join).double()
    x, y = torch.randn(N, 3, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    expected = {}
    for b in range(N):
        model.zero_grad()
        model(x[b : b + 1], y if is_shared else y[b : b + 1]).square().sum().backward()
        for name, p in model.named_parameters():
            expected[name] = expected.get(name, 0) + p.grad.square() / N
    model.zero_grad()
    (track(model, inputs="first" if is_shared else "all")(x, y).square().sum() / N).backward()
    assert_same(grad_sample_sq(model, N), expected)


def test_an_argument_of_other_rows_is_refused_where_all_hold_samples():
    model = track(Pair(lambda h, y, _: h @ y), inputs="all")
    with pytest.raises(UserError, match=r"an argument of the model has 3 rows.*5 samples"):
        model(torch.randn(N, 3), torch.randn(3, 3))


class TestMicroBatch:
    @pytest.mark.parametrize("name", MODELS)
    def test_square_of_each_backward_pass(self, name):
        model, inputs = make(name)
        plain = copy.deepcopy(model)
        track(model, per="micro_batch")
        expected = {}
        for rows in (slice(0, 2), slice(2, 5)):
            plain.zero_grad()
            for m in (model, plain):
                (m(inputs[rows]).square().sum() / 2).backward()
            for key, p in plain.named_parameters():
                expected[key] = expected.get(key, 0) + p.grad.square() * 2
        check_statistics(model)
        assert_same(grad_sample_sq(model, 2), expected)

    def test_custom_function_and_reparametrisation(self):
        class Double(torch.autograd.Function):
            @staticmethod
            def forward(ctx, w):
                return 2 * w

            @staticmethod
            def backward(ctx, grad):
                return 2 * grad

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))

            def forward(self, x):
                return x @ Double.apply(self.inner.weight) + self.inner.bias

        model = track(Model().double(), per="micro_batch")
        model(torch.randn(N, 3, dtype=torch.float64)).square().sum().backward()
        check_statistics(model)
        for name, statistic in grad_sample_sq(model, 1).items():
            grad = dict(model.named_parameters())[name].grad
            torch.testing.assert_close(statistic, grad.square())

    def test_a_weight_put_into_a_modules_place(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner, self.low = nn.Linear(3, 3), nn.Parameter(torch.randn(3, 3))

            def forward(self, x):
                adapted = {"weight": self.inner.weight + self.low}
                return torch.func.functional_call(self.inner, adapted, (x,)) + self.inner(x)

        plain, inputs = Model().double(), torch.randn(N, 3, dtype=torch.float64)
        model = track(copy.deepcopy(plain), per="micro_batch")
        for m in (model, plain):
            m(inputs).square().sum().backward()
        assert isinstance(model.inner._parameters["weight"], nn.Parameter)
        for name, parameter in plain.named_parameters():
            assert torch.equal(model.get_parameter(name).grad, parameter.grad)
            torch.testing.assert_close(grad_sample_sq(model, 1)[name], parameter.grad.square())

    def test_activation_checkpointing(self):
        model, inputs = GPT(tied=True, use_reentrant=False).double(), text(N)
        track(model, per="micro_batch")
        backward(model, inputs, torch.randn_like(model(inputs)))
        for name, statistic in grad_sample_sq(model, 1).items():
            torch.testing.assert_close(statistic, dict(model.named_parameters())[name].grad.square())

    def test_reentrant_checkpoints_are_refused(self):
        """Each would square its own part of the gradient of a weight that several of them use."""
        model, inputs = track(GPT(use_reentrant=True), per="micro_batch"), text(N)
        for _ in range(2):  # a refusal leaves nothing behind
            with pytest.raises(
                UserError, match=r"re-entrant activation checkpoint around 'blocks\.1'.*use_reentrant=False"
            ):
                model(inputs).square().sum().backward()

    @pytest.mark.parametrize(
        "name", ["mlp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cnn", "gpt, tied"))]
    )
    def test_the_compiler_leaves_a_tracked_model_as_it_is(self, name):
        torch._dynamo.reset()
        model, inputs = make(name)
        track(model, per="micro_batch")
        compiled = torch.compile(model, backend="aot_eager")
        backward(model, inputs, torch.randn_like(model(inputs)), compiled)
        for key, statistic in grad_sample_sq(model, 1).items():
            torch.testing.assert_close(statistic, dict(model.named_parameters())[key].grad.square())

    def test_what_is_iterated_over_and_kept_is_the_parameter(self):
        class Model(nn.Linear):
            def forward(self, x):
                assert isinstance(dict(self.named_parameters())["weight"], nn.Parameter)
                assert not isinstance(self.weight, nn.Parameter) and self.weight is self.weight
                with torch.no_grad():
                    assert isinstance(self.weight, nn.Parameter)
                self.bias = nn.Parameter(torch.zeros_like(self.bias))
                return super().forward(x)

        model = track(Model(3, 3), per="micro_batch")
        model(torch.randn(N, 3)).square().sum().backward()
        assert isinstance(model.bias, nn.Parameter) and not model.bias.any() and type(model._parameters) is dict
        for name, squares in grad_sample_sq(model, 1).items():
            torch.testing.assert_close(squares, model.get_parameter(name).grad.square())


class TakeThree(nn.Module):
    def forward(self, x):
        return x[:3]


class TestErrors:
    def test_missing_statistic(self):
        class Hidden(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, w):
                ctx.save_for_backward(x, w)
                return x @ w

            @staticmethod
            def backward(ctx, grad):
                x, w = ctx.saved_tensors
                return grad @ w.t(), x.t() @ grad

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.randn(3, 3))

            def forward(self, x):
                return Hidden.apply(x, self.weight)

        model = track(nn.Sequential(nn.Linear(3, 3), Model()))
        with pytest.raises(UserError, match="HiddenBackward, a function that PyTorch does not show"):
            model(torch.randn(N, 3))
        model = nn.Sequential(nn.Linear(3, 3), Model()).double()
        assert_agrees(model, torch.randn(N, 3, dtype=torch.float64), fallback=["1"])

    def test_a_parameter_unfrozen_after_track(self):
        model = mlp().double()
        model[0].weight.requires_grad_(False)
        track(model)
        model[0].weight.requires_grad_(True)
        with pytest.raises(
            UserError, match=r"'0\.bias' meets the batch in linear.*unfrozen since track\(\) \(call it again\)"
        ):
            model(torch.randn(N, 6, dtype=torch.float64))
        track(model)
        model(torch.randn(N, 6, dtype=torch.float64)).sum().backward()
        check_statistics(model)

    def test_what_is_tracked_again_keeps_its_shadows_unless_it_was_untied(self):
        model = track(GPT(tied=True))
        before = shadows(model)
        assert all(shadow is before[name] for name, shadow in shadows(track(model)).items())
        model.head.weight = nn.Parameter(model.head.weight.detach().clone())
        after = shadows(track(model))
        assert after["head.weight"] is not before["tokens.weight"] and len(after) == len(before) + 1
        assert all(after[name] is shadow for name, shadow in before.items())

    def test_arguments(self):
        with pytest.raises(UserError, match="per must be"):
            track(mlp(), per="batch")  # type: ignore[arg-type]
        with pytest.raises(UserError, match="no module 'encoder'"):
            track(mlp(), fallback=["encoder"])
        with pytest.raises(UserError, match="inputs must be"):
            track(mlp(), inputs="some")  # type: ignore[arg-type]

    def test_samples_that_cannot_be_told_apart(self):
        model = track(nn.Sequential(nn.Linear(3, 2), nn.Flatten(0), nn.Linear(N * 2, 1)))
        with pytest.raises(UserError, match=r"'2\.weight' meets the batch in linear"):
            model(torch.randn(N, 3))
        model = track(nn.Sequential(nn.Linear(3, 2), nn.Unflatten(1, (2, 1)), nn.Flatten(0, 1), nn.Linear(1, 1)))
        model(torch.randn(N, 3))  # two rows a sample
        with pytest.raises(UserError, match="without a tensor of samples along dimension 1"):
            track(mlp(), batch_dim=1)(torch.randn(N))


def pick_in_time(x):
    """Rows of (time, batch), by numbers of both."""
    return x.unsqueeze(0).expand(N, N, 3)[torch.arange(N), torch.arange(N).flip(0)]


@pytest.mark.parametrize(
    "mix",
    [lambda x: torch.cat([x, x.sin()]), lambda x: x[x[:, 0] > -9], pick_in_time],
    ids=["cat", "mask", "picked in time"],
)
def test_rows_that_stop_being_grouped_by_sample_meet_no_parameter(mix):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x, goes_on):
            mixed = mix(self.inner(x))
            return self.outer(mixed) if goes_on else mixed

    model = track(Model())
    with pytest.raises(UserError, match="output is not computed sample by sample"):
        model(torch.randn(N, 3), False)
    with pytest.raises(UserError, match=r"'outer\.weight' meets the batch in linear"):
        model(torch.randn(N, 3), True)


def test_gradients_of_gradients_are_refused():
    model = track(mlp())
    x = torch.randn(N, 6, requires_grad=True)
    with pytest.raises(UserError, match="create_graph=True"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)


def test_function_transforms_see_the_plain_model():
    model = track(mlp())
    x = torch.randn(N, 6)
    values = {name: p.detach() for name, p in model.named_parameters()}
    grads = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).square().sum())(values)
    model(x).square().sum().backward()
    torch.testing.assert_close(grads["0.weight"], model[0].weight.grad)
    torch.testing.assert_close(torch.vmap(model)(x), model(x))


def test_parameters_replaced_after_track():
    model = track(mlp())
    torch.nn.utils.parametrizations.weight_norm(model[0])
    model[4].weight = nn.Parameter(torch.randn(5, 8))
    model[4].bias = None
    with pytest.raises(UserError, match=r"'0\.bias' meets the batch in linear.*call it again"):
        model(torch.randn(N, 6))
    assert "0.weight" not in shadows(model)
    track(model)(torch.randn(N, 6)).sum().backward()
    check_statistics(model)
    assert len(list(untrack(model).parameters())) == 6


def test_complex_parameters_are_refused():
    with pytest.raises(UserError, match=r"'0\.weight' is complex"):
        track(nn.Sequential(nn.Linear(3, 3, dtype=torch.cfloat)))

    class Spectral(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 2, dtype=torch.float64))

        def forward(self, x):
            return torch.view_as_real(torch.fft.fft(x) * torch.view_as_complex(self.weight)).flatten(1)

    x = torch.randn(N, 3, dtype=torch.float64)
    with pytest.raises(UserError, match=r"'weight' meets the batch in mul.*complex numbers"):
        track(Spectral())(x)
    assert_agrees(nn.Sequential(Spectral()), x, fallback=["0"])


def test_an_empty_batch():
    with pytest.raises(UserError, match="a batch without samples"):
        track(mlp())(torch.randn(0, 6))


def test_scale():
    assert statistic_scale(12) == 12 and statistic_scale(12, world_size=4) == 3


def two_rank_statistic(rank, world_size):
    """Return the statistic of DDP ranks with uneven shares, accumulating under no_sync."""
    torch.manual_seed(0)
    model, inputs = GPT(tied=True).double(), text(8)
    target = torch.randn_like(model(inputs))
    ddp = nn.parallel.DistributedDataParallel(track(model))
    rows = [slice(0, 3), slice(3, 5)] if rank == 0 else [slice(5, 6), slice(6, 8)]
    for index, part in enumerate(rows):
        ddp.require_backward_grad_sync = index == 1
        output = ddp(inputs[part])
        # DDP averages: each rank's loss is its sum over 8 samples' share, times the number of ranks.
        ((output * target[part] + output.square() / 2).sum() * world_size / 8).backward()
    check_statistics(model)
    statistic = grad_sample_sq(model, 8, world_size)
    del ddp
    return statistic, loop(model, inputs, target)


def test_two_ranks(rank_pool):
    for statistic, expected in rank_pool(2, two_rank_statistic):
        assert_same(statistic, expected)


class TestOtherLibraries:
    def test_backpack(self):
        backpack = pytest.importorskip("backpack")
        from backpack.extensions import SumGradSquared

        inputs, labels = images(N).float(), torch.randint(0, 3, (N,))
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.ConvTranspose2d(4, 2, 3), nn.Flatten(), nn.Linear(50, 3)
        )
        other = backpack.extend(copy.deepcopy(model))
        loss = backpack.extend(nn.CrossEntropyLoss())(other(inputs), labels)
        with backpack.backpack(SumGradSquared()):
            loss.backward()
        track(model)
        F.cross_entropy(model(inputs), labels).backward()
        # Both in float32, with sums in another order; BackPACK's scale is the mean loss's, too.
        assert_same(
            {name: shadow.grad for name, shadow in shadows(model).items()},
            {name: p.sum_grad_squared for name, p in other.named_parameters()},
            1e-4,
        )

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("build", [cnn, mlp])
    def test_opacus(self, build):
        opacus = pytest.importorskip("opacus")
        model = build()
        inputs = images(N).float() if build is cnn else torch.randn(N, 6)
        labels = torch.randint(0, 3, (N,))
        for module in model:
            if isinstance(module, nn.ReLU):
                module.inplace = False
        other = opacus.GradSampleModule(copy.deepcopy(model))
        F.cross_entropy(other(inputs), labels).backward()
        track(model)
        F.cross_entropy(model(inputs), labels).backward()
        # Opacus undoes the mean, so that grad_sample is g_b itself.
        expected = {n.removeprefix("_module."): p.grad_sample.square().mean(0) for n, p in other.named_parameters()}
        assert_same(grad_sample_sq(model, N), expected, 1e-4)


def test_vit_parameters_without_a_module():
    assert {"token", "positions", "scale"} <= set(shadows(track(ViT())))


def test_a_checkpointed_function_of_several_operations_is_refused():
    """What stands between its modules is not seen when it runs again; a module that is checkpointed is followed."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.proj = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return checkpoint(lambda z: self.proj(self.fc(z).tanh()), x, use_reentrant=False)

    model = track(Block())
    with pytest.raises(UserError, match=r"'proj' runs again in activation checkpointing, on other tensors than before"):
        model(torch.randn(5, 3, requires_grad=True)).sum().backward()
