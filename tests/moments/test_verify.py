"""Finding squares that a rule got wrong: in models that hide from it where their samples are."""

from __future__ import annotations

import re
import sys
import types

import pytest
import torch
import yaml
from tiny import MODELS
from torch import nn

from largebatch.cli import main
from largebatch.errors import UserError
from largebatch.moments import track, untrack, verify

N, TIME, WIDTH = 4, 3, 5

pytestmark = pytest.mark.filterwarnings("ignore:.*has no rule")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Mixing(nn.Module):
    """Rows of time and sample go through `between`, and through a second layer."""

    def __init__(self, between, num_outputs=2):
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, num_outputs)
        self.between = between

    def forward(self, x):
        x = x.unflatten(1, (-1, WIDTH)) if x.ndim == 2 else x
        rows = self.second(self.between(torch.tanh(self.first(x))))
        # Back to one row a sample, whatever the order they came in: a sum over all would hide it.
        return rows if rows.ndim == 3 else rows.unflatten(0, (-1, len(x))).transpose(0, 1)


def time_first(h):
    """Return rows [time * samples, width] by two index tensors, which no rule follows."""
    samples, time = torch.arange(len(h)).repeat(h.shape[1]), torch.arange(h.shape[1]).repeat_interleave(len(h))
    return h[samples, time]


def selected(h):
    order = torch.arange(h.shape[0] * h.shape[1]).reshape(h.shape[:2]).t().flatten()
    return h.flatten(0, 1).index_select(0, order)


def squared_error(model):
    return lambda batch: (model(batch[0]) - batch[1]).square().sum()


def batch(n=N):
    return torch.randn(n, TIME, WIDTH), torch.randn(n, TIME, 2)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_right_squares_agree(name, dtype):
    build, data = MODELS[name]
    model, inputs = track(build().to(dtype)), data(N)
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    model = track(model, fallback=["lstm"]) if name == "lstm" else model
    assert verify(model, lambda x: (model(x) - 0.3).square().sum(), inputs) is None


@pytest.mark.parametrize("between", [time_first, selected])
def test_hidden_samples_are_refused_and_the_way_out_works(between):
    model = track(Mixing(between))
    whole = track(Mixing(between), fallback=[""])
    with pytest.raises(UserError, match=r"parameter 'second\.weight' meets the batch in linear.*fallback"):
        verify(model, squared_error(model), batch())
    assert verify(whole, squared_error(whole), batch()) is None


def test_wrong_squares_are_found():
    """A parameter that is used outside of the model as well, which no pass of the model shows."""
    model = track(Mixing(lambda h: h))

    def loss(parts):
        return squared_error(model)(parts) + (parts[0] @ model.first.weight).square().sum()

    with pytest.raises(UserError, match=r"the squares of 'first\.weight' are not those of single samples.*fallback"):
        verify(model, loss, batch())


def test_a_parameter_in_a_function_transform_is_refused():
    class Vectorized(nn.Linear):
        def forward(self, x):
            return torch.vmap(lambda row: row @ self.weight.t())(x)

    model = track(Vectorized(WIDTH, 2))
    with pytest.raises(UserError, match=r"values of the batch go through torch\.func"):
        verify(model, squared_error(model), batch())


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (
            lambda h: h * torch.rand_like(h),
            "'first.weight', 'first.bias', 'second.weight', 'second.bias' over a batch is",
        ),
        (lambda h: h / (len(h) > 2 or bool(torch.linalg.inv(torch.zeros(1, 1)))), "LinAlgError"),
    ],
    ids=["random numbers", "no batch of one or two"],
)
def test_what_cannot_be_told_is_said(between, reason):
    model = track(Mixing(between))
    assert reason in verify(model, squared_error(model), batch())


def used_outside(model):
    """A loss that uses the first layer's weight behind the model's back, so that its squares are wrong."""
    return lambda parts: squared_error(model)(parts) + (parts[0] @ model.first.weight).square().sum()


class Keeping(Mixing):
    """Keeps a matrix that it has computed from a parameter until it is trained again, as LeViT its biases of attention."""

    def __init__(self):
        super().__init__(lambda h: h)
        self.table, self.cache, self.calls = nn.Parameter(torch.randn(TIME, WIDTH)), {}, 0

    def forward(self, x):
        self.calls += 1
        if "bias" not in self.cache:
            self.cache["bias"] = self.table[torch.tensor([2, 0, 1])]
        return super().forward(x + self.cache["bias"])


def test_what_a_model_keeps_between_calls_is_put_back():
    model = track(Keeping())
    cache = model.cache
    assert verify(model, squared_error(model), batch()) is None
    assert model.cache is cache and not cache and model.calls == 0
    with pytest.raises(UserError, match=r"the squares of 'first\.weight'"):
        verify(model, used_outside(model), batch())


@pytest.mark.parametrize("size", [1e-15, 1.0, 1e10])
def test_a_loss_of_any_size_is_judged(size):
    model = track(Mixing(lambda h: h))
    assert verify(model, lambda parts: squared_error(model)(parts) * size, batch()) is None
    with pytest.raises(UserError, match=r"the squares of 'first\.weight'"):
        verify(model, lambda parts: used_outside(model)(parts) * size, batch())


def test_a_parameter_without_a_gradient_is_named_and_the_others_are_judged():
    model = Mixing(lambda h: h)
    model.spare, model.dead = nn.Linear(2, 2), nn.Parameter(torch.randn(5))
    model.between = lambda h: h + torch.relu(model.dead.abs() * -1.0)
    track(model)
    said = verify(model, squared_error(model), batch())
    assert said is not None and said.startswith(
        "the gradient of 'dead', 'spare.weight', 'spare.bias' over a batch is zero"
    )
    assert said.endswith("(3 of 7)")
    with pytest.raises(UserError, match=r"the squares of 'first\.weight'"):
        verify(model, used_outside(model), batch())


def test_what_is_random_is_named_and_the_rest_is_judged():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(WIDTH, 2), nn.Linear(WIDTH, 2)

        def forward(self, x):
            return torch.cat([self.left(x), self.right(x * (torch.rand_like(x) + 1.0))], -1)

    model = track(Branches())
    said = verify(model, lambda x: model(x).square().sum(), batch()[0])
    assert "'right.weight'" in said and "left" not in said and "(2 of 4)" in said


def test_a_loss_that_is_a_mean_is_not_judged():
    """Of a model whose own loss it is, as language models' are."""
    model = track(nn.Sequential(nn.Embedding(7, WIDTH), nn.Linear(WIDTH, 7)))
    tokens = torch.randint(7, (N, TIME))

    def loss(parts, reduction="mean"):
        return nn.functional.cross_entropy(model(parts).flatten(0, 1), parts.flatten(), reduction=reduction)

    assert "or the loss is a mean (3 of 3)" in verify(model, loss, tokens)
    assert verify(model, lambda parts: loss(parts, "sum"), tokens) is None


def test_a_model_is_left_as_it_was():
    model = track(nn.Sequential(nn.Linear(WIDTH, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)))
    model[2].eval()
    first = model[0].weight
    first.grad = torch.ones_like(first)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inputs = torch.randn(N, WIDTH)
    modes, random_state = [module.training for module in model.modules()], torch.get_rng_state()
    with torch.no_grad():
        assert verify(model, lambda x: model(x).square().sum(), inputs) is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(first.grad, torch.ones_like(first)) and model[3].weight.grad is None


def test_batches_of_any_make():
    model = track(Mixing(lambda h: h))
    inputs, targets = batch()

    def loss(parts):
        return (model(parts["x"][0]) - parts["y"]).square().sum() * parts["scale"]

    assert verify(model, loss, {"x": [inputs], "y": targets, "scale": 3.0}) is None
    time_major = track(nn.Linear(WIDTH, 2), batch_dim=1)
    assert verify(time_major, squared_error(time_major), tuple(x.transpose(0, 1) for x in batch()), batch_dim=1) is None


def test_what_cannot_be_verified_is_refused():
    model = nn.Linear(WIDTH, 2)
    with pytest.raises(UserError, match=r"expected a model after track\(model\)"):
        verify(model, squared_error(model), batch())
    with pytest.raises(UserError, match="squares of samples"):
        verify(track(model, per="micro_batch"), squared_error(model), batch())
    with pytest.raises(UserError, match="two samples or more, got 1"):
        verify(track(untrack(model)), squared_error(model), batch(1))


@pytest.fixture
def hidden_models(monkeypatch):
    module = types.ModuleType("hidden_models")

    class Classifier(Mixing):
        def forward(self, x):
            return super().forward(x.flatten(1)[:, : TIME * WIDTH]).mean(1)

    module.mixing = lambda: Classifier(time_first, 10)
    module.random = lambda: Classifier(lambda h: h * torch.rand_like(h), 10)
    monkeypatch.setitem(sys.modules, "hidden_models", module)


def run(folder, *flags):
    sections = {
        "data": {"name": "digits"},
        "model": {"name": "hidden_models:mixing"},
        "batch": {"reference_size": 16, "size": 64},
        "optimizer": {"name": "adamw", "lr": 0.001, "second_moment": "sample"},
        "schedule": {"name": "constant", "epochs": 0.1},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(sections))
    return main(["train", str(path), "--out", str(folder / "run"), *flags])


def test_a_run_does_not_begin_without_knowing_its_samples(hidden_models, tmp_path, capsys):
    assert run(tmp_path) == 2
    said = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert "parameter 'second.weight' meets the batch in linear" in said and "a config's model.fallback" in said
    assert not (tmp_path / "run").exists()


def test_a_run_with_the_fallback_does(hidden_models, tmp_path, capsys):
    assert run(tmp_path, "--model.fallback", "['']") == 0
    assert "not be verified" not in capsys.readouterr().out


def test_a_run_says_what_it_could_not_verify(hidden_models, tmp_path, capsys):
    assert run(tmp_path, "--model.name", "hidden_models:random") == 0
    said = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "the squares of hidden_models:random could not all be verified: the gradient of" in said


def test_a_fallback_that_is_not_used_is_a_warning(hidden_models, tmp_path, capsys):
    assert (
        run(tmp_path, "--model.fallback", "[first]", "--optimizer.second_moment", "batch", "--scaling.rule", "sqrt")
        == 0
    )
    assert "model.fallback is not used" in capsys.readouterr().out
