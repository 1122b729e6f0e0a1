"""Every rule against the loop over samples."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_agrees
from torch import nn

from largebatch.errors import UserError
from largebatch.moments import track

N = 4


def normal(*shape: int, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Apply(nn.Module):
    """A function of the input and of named parameters."""

    def __init__(self, function, **parameters):
        super().__init__()
        self.function = function
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, x):
        return self.function(x, *self.parameters_by_name())

    def parameters_by_name(self):
        return [self._parameters[name] for name in self._parameters if not name.endswith("_grad_sq")]


@pytest.mark.parametrize("positions", [(), (1,), (5,), (2, 3)])
@pytest.mark.parametrize(("i", "o", "bias"), [(3, 7, True), (7, 3, False), (1, 4, True), (4, 1, True)])
def test_linear(positions, i, o, bias):
    assert_agrees(nn.Linear(i, o, bias).double(), normal(N, *positions, i))


@pytest.mark.parametrize("positions", [(), (6,)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_linear_in_low_precision(positions, dtype, tolerance):
    # float32: sums of some dozens of products, 2^-24 each. bfloat16: weights, inputs and products rounded to 2^-8.
    assert_agrees(nn.Linear(16, 8).to(dtype), normal(N, *positions, 16, dtype=dtype), tolerance=tolerance)


@pytest.mark.parametrize("width", [6, 200, 400], ids=["all at once", "some at a time", "one by one"])
@pytest.mark.parametrize("samples", [None, 4])
def test_squares_of_sequences_are_right_however_many_are_made_at_a_time(width, samples):
    model = track(nn.Linear(width, 200, bias=False).double(), samples=samples)
    x = normal(8, 3, width)
    y = model(x)
    d = torch.randn_like(y)
    y.backward(d)
    grads = torch.einsum("nto,nti->noi", d, x)
    expected = grads.square().sum(0) if samples is None else 2 * grads[1::2].square().sum(0)
    torch.testing.assert_close(model.weight_grad_sq.grad, expected, rtol=1e-12, atol=1e-12 * float(expected.max()))


def test_a_bias_that_the_backward_pass_does_not_reach_has_no_squares():
    def second_use(x, weight, bias):
        F.linear(x, weight, bias)
        return F.linear(x, weight)

    model = assert_agrees(Apply(second_use, weight=normal(2, 3), bias=normal(2)), normal(N, 3))
    assert model.bias.grad is None and model.bias_grad_sq.grad is None


def test_linear_keeps_its_statistic_in_float32():
    model = assert_agrees(nn.Linear(3, 2).bfloat16(), normal(N, 3, dtype=torch.bfloat16), tolerance=0.05)
    assert model.weight_grad_sq.grad.dtype == torch.float32


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_frozen_parameters_are_left_alone(frozen):
    model = nn.Linear(3, 2).double()
    getattr(model, frozen).requires_grad_(False)
    assert_agrees(model, normal(N, 5, 3))
    assert f"{frozen}_grad_sq" not in model._parameters


PRODUCTS = {
    "matmul": (lambda x, w: torch.matmul(x, w), {"w": (5, 3)}, (N, 2, 5)),
    "operator": (lambda x, w: x @ w, {"w": (5, 3)}, (N, 5)),
    "parameter on the left": (lambda x, w: w @ x, {"w": (3, 5)}, (N, 5, 2)),
    "vector": (lambda x, w: x @ w, {"w": (5,)}, (N, 2, 5)),
    "transposed": (lambda x, w: x @ w.t(), {"w": (3, 5)}, (N, 2, 5)),
    "T": (lambda x, w: x @ w.T, {"w": (3, 5)}, (N, 2, 5)),
    "heads": (lambda x, w: x @ w, {"w": (2, 5, 3)}, (N, 2, 4, 5)),
    "mm": (lambda x, w: torch.mm(x, w), {"w": (5, 3)}, (N, 5)),
    "addmm": (lambda x, w, b: torch.addmm(b, x, w, beta=0.5, alpha=2), {"w": (5, 3), "b": (3,)}, (N, 5)),
    "einsum": (lambda x, w: torch.einsum("bthd,hde->bte", x, w), {"w": (2, 3, 5)}, (N, 4, 2, 3)),
    "einsum of positions": (lambda x, w: torch.einsum("btd,od->bto", x, w), {"w": (2, 3)}, (N, 4, 3)),
    "einsum, permuted": (lambda x, w: torch.einsum("btd,dho->bhto", x, w), {"w": (3, 2, 5)}, (N, 4, 3)),
    "einsum over positions": (lambda x, w: torch.einsum("btd,ts->bsd", x, w), {"w": (4, 3)}, (N, 4, 2)),
    "einsum of three": (lambda x, w: torch.einsum("bi,oij,bj->bo", x, w, x.sin()), {"w": (2, 3, 3)}, (N, 3)),
    "linear with a vector": (lambda x, w: F.linear(x, w), {"w": (5,)}, (N, 2, 5)),
    "batches of matrices": (lambda x, w: torch.bmm(x, (x @ w).mT), {"w": (5, 5)}, (N, 2, 5)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_matrix_products(name):
    function, shapes, shape = PRODUCTS[name]
    assert_agrees(Apply(function, **{k: normal(*v) for k, v in shapes.items()}), normal(*shape))


CONVOLUTIONS = [
    (stride, padding, dilation, groups, bias)
    for stride, padding, dilation, groups, bias in itertools.product([1, 2], [0, 1], [1, 2], [1, 2, 4], [True])
]


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize(("stride", "padding", "dilation", "groups", "bias"), CONVOLUTIONS)
def test_convolution(ndim, stride, padding, dilation, groups, bias):
    layer = getattr(nn, f"Conv{ndim}d")(4, 8, 3, stride, padding, dilation, groups, bias).double()
    assert_agrees(layer, normal(N, 4, *[7, 6, 5][:ndim]))


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize(("stride", "output_padding", "groups"), [(1, 0, 1), (2, 1, 1), (2, 0, 2), (3, 1, 4)])
def test_transposed_convolution(ndim, stride, output_padding, groups):
    layer = getattr(nn, f"ConvTranspose{ndim}d")(4, 8, 3, stride, 1, output_padding, groups).double()
    assert_agrees(layer, normal(N, 4, *[4, 3, 3][:ndim]))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 4, (3, 5), (1, 2), (1, 2)),
        nn.Conv2d(3, 4, 1),
        nn.Conv2d(3, 4, 1, stride=2),
        nn.Conv2d(3, 4, 3, padding="same"),
        nn.Conv2d(3, 4, (2, 4), padding="same"),
        nn.Conv2d(3, 4, 3, padding="valid"),
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(3, 6, 3, groups=3),
        nn.Conv2d(3, 4, 3, bias=False),
    ],
    ids=repr,
)
def test_convolution_in_two_dimensions(layer):
    assert_agrees(layer.double(), normal(N, 3, 8, 9))


def test_convolution_with_many_positions_takes_the_native_kernel():
    assert_agrees(nn.Conv2d(2, 3, 3, padding=1).double(), normal(N, 2, 20, 20))


def test_convolution_channels_last():
    model = nn.Conv2d(4, 8, 3, padding=1).double().to(memory_format=torch.channels_last)
    assert_agrees(model, normal(N, 4, 6, 6).to(memory_format=torch.channels_last))


@pytest.mark.parametrize("size", [4, 20])
def test_convolution_in_float32(size):
    # Sums of up to 1600 products of 2^-24 relative error each, some of which cancel.
    assert_agrees(nn.Conv2d(4, 8, 3, padding=1), normal(N, 4, size, size, dtype=torch.float32), tolerance=1e-4)


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (nn.Conv1d(4, 8, 1, stride=2), lambda: normal(N, 4, 9, dtype=torch.float32)),
        (nn.Linear(4, 3), lambda: normal(N, 5, 8, dtype=torch.float32)[..., ::2]),
        (nn.Linear(4, 3), lambda: normal(N, 8, dtype=torch.float32).unfold(1, 4, 1)),
    ],
    ids=["every second position", "every second feature", "sliding windows"],
)
def test_float32_operands_of_any_strides(model, inputs):
    assert_agrees(model, inputs(), tolerance=1e-4)


def test_convolutions_between_unfold_and_fold():
    layers = nn.Unfold(2), nn.Conv1d(4, 4, 1), nn.Fold((4, 4), 2)
    assert_agrees(nn.Sequential(*layers).double(), normal(N, 1, 4, 4))


def test_several_rows_a_sample():
    """x.view(batch * frames, ...): the rows of a sample add before squaring."""

    class Frames(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 4, 3, padding=1)
            self.norm = nn.BatchNorm2d(4).eval()
            self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
            self.scale = nn.Parameter(torch.randn(4, 1, 1))
            self.linear = nn.Linear(4 * 2 * 3, 3)

        def forward(self, x):
            x = self.norm(self.conv(x.flatten(0, 1)))
            return self.linear((self.depthwise(x) * self.scale).flatten(1)).view(-1, 3 * 3)

    assert_agrees(Frames().double(), normal(N, 3, 2, 4, 5))


class Lookup(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.embedding = nn.Embedding(7, 3, **options)

    def forward(self, indices):
        return self.embedding(indices)


@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}, {"padding_idx": -1}, {"sparse": True}], ids=str)
def test_embedding_with_repeats(options):
    indices = torch.randint(0, 7, (N, 9))
    assert_agrees(Lookup(**options).double(), indices)
    assert_agrees(Lookup(**options).double(), indices[:, 0])


NORMS = [
    (nn.LayerNorm(6), (N, 6)),
    (nn.LayerNorm(6), (N, 5, 6)),
    (nn.LayerNorm((5, 6)), (N, 2, 5, 6)),
    (nn.LayerNorm(6, bias=False), (N, 5, 6)),
    (nn.RMSNorm(6), (N, 5, 6)),
    (nn.GroupNorm(3, 6), (N, 6)),
    (nn.GroupNorm(2, 6), (N, 6, 4, 3)),
    (nn.InstanceNorm1d(6, affine=True), (N, 6, 5)),
    (nn.InstanceNorm2d(6, affine=True), (N, 6, 4, 3)),
    (nn.InstanceNorm2d(6, affine=True, track_running_stats=True).eval(), (N, 6, 4, 3)),
    (nn.BatchNorm1d(6).eval(), (N, 6)),
    (nn.BatchNorm2d(6).eval(), (N, 6, 4, 3)),
    (nn.BatchNorm3d(6).eval(), (N, 6, 2, 3, 2)),
]


@pytest.mark.parametrize(("layer", "shape"), NORMS, ids=[f"{layer}{len(shape)}" for layer, shape in NORMS])
def test_norms(layer, shape):
    layer = layer.double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    assert_agrees(layer, normal(*shape) + 0.5)


@pytest.mark.parametrize(("layer", "shape"), [(nn.BatchNorm1d(6), (N, 6)), (nn.BatchNorm2d(6), (N, 6, 4, 3))])
def test_batch_norm_in_training_gives_each_sample_its_summand(layer, shape):
    layer, x = layer.double(), normal(*shape)
    target = torch.randn_like(x)

    class Fixed(nn.Module):
        """The target is part of the model, so that the loop below may differentiate one row of the batch's output."""

        def __init__(self):
            super().__init__()
            self.norm = layer

        def forward(self, x):
            return self.norm(x)

    model = Fixed()
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    output = model(x)
    for b in range(N):
        rows = torch.zeros_like(output)
        rows[b] = target[b]
        grads = torch.autograd.grad(output, list(model.parameters()), rows, retain_graph=True)
        for (name, _), grad in zip(model.named_parameters(), grads, strict=True):
            expected[name] += grad.square() / N
    from largebatch.moments import grad_sample_sq, track

    track(model)
    ((model(x) * target).sum() / N).backward()
    for name, squares in grad_sample_sq(model, N).items():
        torch.testing.assert_close(squares, expected[name], rtol=1e-10, atol=1e-12)


BROADCASTS = {
    "position embedding": (lambda x, p: x + p, {"p": (1, 5, 3)}, (N, 5, 3)),
    "as many positions as samples": (lambda x, p: x + p, {"p": (N, 3)}, (N, N, 3)),
    "in place": (lambda x, p: x.clone().add_(p), {"p": (5, 3)}, (N, 5, 3)),
    "augmented": (lambda x, p: _augmented(x.clone(), p), {"p": (5, 3)}, (N, 5, 3)),
    "LayerScale": (lambda x, p: p * x, {"p": (3,)}, (N, 5, 3)),
    "scalar": (lambda x, p: x * p, {"p": ()}, (N, 5, 3)),
    "division": (lambda x, p: x / (p.exp() + 1), {"p": (3,)}, (N, 5, 3)),
    "reversed subtraction": (lambda x, p: p - x, {"p": (5, 1)}, (N, 5, 3)),
    "where": (lambda x, p: torch.where(x > 0, x, p), {"p": (3,)}, (N, 5, 3)),
    "lerp": (lambda x, p: torch.lerp(x, x.sin(), p), {"p": (3,)}, (N, 5, 3)),
    "two parameters": (lambda x, p, q: torch.addcmul(q, x, p), {"p": (3,), "q": (5, 1)}, (N, 5, 3)),
    "class token": (lambda x, p: torch.cat([p.expand(len(x), -1, -1), x], 1), {"p": (1, 1, 3)}, (N, 5, 3)),
    "repeated token": (lambda x, p: torch.cat([p.repeat(len(x), 2, 1), x], 1), {"p": (1, 1, 3)}, (N, 5, 3)),
    "positions repeated and permuted": (
        lambda x, p: x + p.repeat(len(x), 1, 1).mT.reshape_as(x),
        {"p": (1, 3, 5)},
        (N, 5, 3),
    ),
    "a first state of zeros": (
        lambda x, p, q: torch.tanh(x[:, 0] + torch.zeros(len(x), 3, dtype=x.dtype) @ p + q) @ p,
        {"p": (3, 3), "q": (3,)},
        (N, 5, 3),
    ),
    "a token moved before it is joined": (
        lambda x, p: torch.cat([p.expand(len(x), -1, -1).tanh(), x], axis=1),
        {"p": (1, 1, 3)},
        (N, 5, 3),
    ),
    "table of relative positions": (
        lambda x, p: x + p[torch.tensor([0, 1, 1, 2, 0])],
        {"p": (3, 3)},
        (N, 5, 3),
    ),
    "positions laid out by sample": (
        lambda x, p: x + F.embedding(torch.arange(5).expand(len(x), -1), p),
        {"p": (5, 3)},
        (N, 5, 3),
    ),
    "one kind of token": (
        lambda x, p: x + F.embedding(torch.zeros(len(x), 5, dtype=torch.long), p),
        {"p": (2, 3)},
        (N, 5, 3),
    ),
    "of the type and the shape of others": (
        lambda x, p, q: x.to(q).type_as(p).view_as(x) * q.type_as(x).expand_as(x[:, :3].mT) + p.sum(),
        {"p": (7, 3), "q": (3,)},
        (N, 3, 3),
    ),
    "prelu": (lambda x, p: F.prelu(x, p), {"p": (5,)}, (N, 5, 3)),
    "prelu, one slope": (lambda x, p: F.prelu(x, p), {"p": (1,)}, (N, 5, 3)),
    "stacked": (lambda x, p, q: x + torch.stack([p, q], 0), {"p": (3,), "q": (3,)}, (N, 2, 3)),
    "split": (lambda x, p: x * p.chunk(2)[0] + p.chunk(2)[1], {"p": (6,)}, (N, 2, 3)),
    "split once": (lambda x, p: _scale_and_shift(x, p), {"p": (6,)}, (N, 2, 3)),
    "slices": (lambda x, p: x * p[:3] + p[3:], {"p": (6,)}, (N, 2, 3)),
    "attention bias": (lambda x, p: F.scaled_dot_product_attention(x, x, x, p), {"p": (5, 5)}, (N, 5, 3)),
    "attention bias of all heads": (
        lambda x, p: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], attn_mask=p.tanh())[:, 0],
        {"p": (1, 1, 5, 5)},
        (N, 5, 3),
    ),
    "learned queries": (lambda x, p: F.scaled_dot_product_attention(p, x, x), {"p": (1, 2, 3)}, (N, 5, 3)),
}


def _augmented(x, p):
    x += p
    return x


def _scale_and_shift(x, p):
    scale, shift = p.chunk(2)
    return x * scale + shift


@pytest.mark.parametrize("name", BROADCASTS)
def test_broadcasts(name):
    function, shapes, shape = BROADCASTS[name]
    assert_agrees(Apply(function, **{k: normal(*v) for k, v in shapes.items()}), normal(*shape))


@pytest.mark.parametrize("name", BROADCASTS)
def test_broadcasts_with_one_sample(name):
    function, shapes, shape = BROADCASTS[name]
    if shape[0] == shape[1]:
        pytest.skip("more positions than samples")
    assert_agrees(Apply(function, **{k: normal(*v) for k, v in shapes.items()}), normal(1, *shape[1:]))


class Attention(nn.Module):
    def __init__(self, need_weights, batch_first=True, cross=False, **options):
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=batch_first, **options)
        self.need_weights, self.batch_first, self.cross = need_weights, batch_first, cross

    def forward(self, x):
        x = x if self.batch_first else x.transpose(0, 1)
        other = x.sin() if self.cross else x
        y = self.inner(x, other, other, need_weights=self.need_weights)[0]
        return y if self.batch_first else y.transpose(0, 1)


@pytest.mark.parametrize("options", [{}, {"cross": True}, {"batch_first": False}], ids=str)
def test_multihead_attention_of_one_sample(options):
    assert_agrees(Attention(False, **options).double(), normal(1, 3, 8))


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("options", [{}, {"cross": True}, {"batch_first": False}, {"add_bias_kv": True}], ids=str)
@pytest.mark.parametrize("positions", [3, N])
def test_multihead_attention(need_weights, options, positions):
    assert_agrees(Attention(need_weights, **options).double(), normal(N, positions, 8))


def test_time_first():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0).double()
    assert_agrees(layer, normal(3, N, 8), batch_dim=1)


MOVED = {
    "linear": lambda x, w: F.linear(x.transpose(0, 1), w).transpose(0, 1),
    "einsum": lambda x, w: torch.einsum("tbi,io->bto", x.mT.movedim(2, 0), w),
    "on the right": lambda x, w: (w.t() @ x.sum(1).T).T,
    "time first, flattened": lambda x, w: (
        F.linear(x.transpose(0, 1).flatten(0, 1), w).unflatten(0, (N, -1)).transpose(0, 1)
    ),
    "scale": lambda x, w: (x.transpose(0, 1).tanh() * w[0] + w[1]).mean(0),
    "norm": lambda x, w: F.layer_norm(x.transpose(0, 1), (3,), w[0], w[1]).transpose(0, 1),
    "stacked": lambda x, w: (torch.stack([x.sin(), x.cos(), x, x.exp()]) @ w).sum(0),
    "a new dimension": lambda x, w: (x[None].expand(N, *x.shape) @ w).sum(0),
    "heads": lambda x, w: (x.transpose(0, 1).reshape(len(x[0]), -1, 1).transpose(0, 1) * w[0, 0]).reshape(len(x), -1),
}


@pytest.mark.parametrize("name", MOVED)
def test_samples_along_another_dimension(name):
    assert_agrees(Apply(MOVED[name], w=normal(3, 3)), normal(N, N, 3))


UNGROUPED = {
    "repeated": lambda x, w: F.linear(x.repeat(2, 1, 1), w),
    "picked": lambda x, w: F.linear((x * w[0])[torch.tensor([0, 1, 2, 3, 3, 2, 1, 0])], w),
    "channels": lambda x, w: F.conv1d(x.transpose(0, 1), w.unsqueeze(-1).expand(3, 3, 1)[:, :1].expand(3, N, 1)),
}


@pytest.mark.parametrize("name", UNGROUPED)
def test_rows_not_grouped_by_sample_are_refused(name):
    with pytest.raises(UserError, match=r"parameter 'w'"):
        track(Apply(UNGROUPED[name], w=normal(3, 3)))(normal(N, N, 3))


SHARED = {
    "twice": lambda x, w: (x @ w).tanh() @ w,
    "twice, once transposed": lambda x, w: F.linear((x @ w).tanh(), w),
    "through a function": lambda x, w: x @ (w / w.norm(dim=0)),
    "function and view": lambda x, w: (x @ w.softmax(0)) @ w.t(),
    "product and sum": lambda x, w: x @ w + w[0],
    "different positions": lambda x, w: (x @ w) + (x[:, :1] @ w),
}


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("positions", [(), (5,)])
def test_repeated_use_adds_before_squaring(name, positions):
    if not positions and name == "different positions":
        pytest.skip("needs positions")
    assert_agrees(Apply(SHARED[name], w=normal(3, 3)), normal(N, *positions, 3))


@pytest.mark.parametrize("n", [1, N])
def test_functions_with_several_results_are_refused(n):
    with pytest.raises(UserError, match=r"parameter 'weight_ih_l0' meets the batch in lstm.*there is no rule for it"):
        track(nn.LSTM(3, 4, batch_first=True))(torch.randn(n, 5, 3))


class TestFallback:
    @pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
    @pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
    def test_recurrent(self, kind, options):
        class Last(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = kind(3, 4, batch_first=True, **options)

            def forward(self, x):
                y, state = self.inner(x)
                return y[:, -1] + (state[0] if isinstance(state, tuple) else state)[0].sum(1, keepdim=True)

        assert_agrees(Last().double(), normal(N, 5, 3), fallback=["inner"])

    def test_cell_in_a_loop(self):
        class Unrolled(nn.Module):
            def __init__(self):
                super().__init__()
                self.cell = nn.GRUCell(3, 4)

            def forward(self, x):
                state = None
                for t in range(x.shape[1]):
                    state = self.cell(x[:, t], state)
                return state

        assert_agrees(Unrolled().double(), normal(N, 3, 3), fallback=["cell"])
        assert_agrees(Unrolled().double(), normal(1, 3, 3), fallback=["cell"])

    @pytest.mark.parametrize(
        "module",
        [nn.LSTM(3, 4, 2, batch_first=True, dropout=0.5), nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(5))],
        ids=["dropout", "batch norm"],
    )
    def test_what_a_sample_alone_does_not_reproduce_is_refused(self, module):
        class First(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = module

            def forward(self, x):
                y = self.inner(x)
                return y[0] if isinstance(y, tuple) else y

        model = track(First(), fallback=["inner"])
        with pytest.raises(UserError, match=r"its samples interact, or it draws random numbers|draws random numbers"):
            model(torch.randn(N, 5, 3)).sum().backward()

    def test_named_module(self):
        model = nn.Sequential(nn.Linear(3, 5), nn.Sequential(nn.Tanh(), nn.Linear(5, 5)), nn.Linear(5, 2)).double()
        assert_agrees(model, normal(N, 3), fallback=["1"])

    def test_operation_without_a_rule(self):
        model = nn.Sequential(Apply(lambda x, w: torch.cdist(x, w), w=normal(5, 3)))
        assert_agrees(model, normal(N, 2, 3), fallback=["0"])


# Uses of parameters that are not understood, or that cannot be: with parameters of these shapes, and an input.
REFUSED = {
    "bilinear": (lambda x, w: F.bilinear(x, x.cos(), w), {"w": (2, 3, 3)}, (N, 3)),
    "einsum with dots": (lambda x, w: torch.einsum("...d,do", x, w), {"w": (3, 2)}, (N, 4, 3)),
    "tensordot": (lambda x, w: torch.tensordot(x, w, 1), {"w": (3, 2)}, (N, 4, 3)),
    "cdist": (lambda x, w: torch.cdist(x, w), {"w": (5, 3)}, (N, 2, 3)),
    "mask token": (lambda x, w: _assigned(x.clone(), x[..., 0] > 0, w), {"w": (3,)}, (N, 5, 3)),
    "token put in front": (lambda x, w: _assigned(x.clone(), (slice(None), 0), w), {"w": (3,)}, (N, 5, 3)),
    "rows by sample": (lambda x, w: x + w[(x[..., 0] > 0).long() - 1], {"w": (3, 3)}, (N, 5, 3)),
    "index_put_": (lambda x, w: x.clone().index_put_((torch.tensor([0, 1]),), w), {"w": (3,)}, (N, 3)),
    "a clone changed": (lambda x, w: x @ w.clone().mul_(2), {"w": (3, 3)}, (N, 3)),
    "a view assigned to": (lambda x, w: x @ _assigned(w.clone(), 0, 0.0), {"w": (3, 3)}, (N, 3)),
    "a mask of parameters": (lambda x, w: x @ _masked(w), {"w": (3, 3)}, (N, 3)),
    "rows by sample, added": (lambda x, w: x + w, {"w": (N, 3)}, (N, 3)),
    "contracted over the samples": (lambda x, w: (w @ x).T @ x, {"w": (N, N)}, (N, 3)),
    "mean over the samples": (lambda x, w: (x - x.mean(0)) @ w, {"w": (3, 3)}, (N, 3)),
    "rolled": (lambda x, w: x.roll(1, 0) @ w, {"w": (3, 3)}, (N, 3)),
    "flipped": (lambda x, w: x.flip(0) @ w, {"w": (3, 3)}, (N, 3)),
    "sorted": (lambda x, w: x[x[:, 0].argsort()] @ w, {"w": (3, 3)}, (N, 3)),
    "index_select": (lambda x, w: x.index_select(0, torch.arange(N)) @ w, {"w": (3, 3)}, (N, 3)),
    "take_along_dim": (lambda x, w: x.take_along_dim(torch.zeros(1, 3).long(), 0) @ w, {"w": (3, 3)}, (N, 3)),
    "gather": (lambda x, w: x.gather(0, torch.zeros(N, 3).long()) @ w, {"w": (3, 3)}, (N, 3)),
    "masked_select": (lambda x, w: (x.masked_select(x > -9).view(N, 3)) @ w, {"w": (3, 3)}, (N, 3)),
    "siamese": (lambda x, w: (torch.cat([x, x.sin()]) @ w).view(2, len(x), 3).sum(0), {"w": (3, 3)}, (N, 3)),
    "written to another sample": (lambda x, w: _shuffled(x.clone()) @ w, {"w": (3, 3)}, (N, 3)),
    "mixed at the end": (lambda x, w: _rolled_sum(x @ w), {"w": (3, 3)}, (N, 3)),
    "a table used as rows": (lambda x, w: F.linear(w[: len(x)], w) + x, {"w": (6, 6)}, (N, 6)),
}


def _assigned(x, index, p):
    x[index] = p
    return x


def _masked(w):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return F.dropout(w, 0.5)


def _shuffled(x):
    x[0].copy_(x[1].clone())
    return x


def _rolled_sum(x):
    return x + x.roll(1, 0)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_refused_by_name_or_right(name):
    function, shapes, shape = REFUSED[name]
    model = Apply(function, **{k: normal(*v) for k, v in shapes.items()})
    try:
        assert_agrees(model, normal(*shape))
    except UserError as error:
        named = (
            "parameter 'w'",
            "output is not computed sample by sample",
            "rows of other samples",
            "in place",
            "go through",
        )
        assert any(word in str(error) for word in named), error
        assert "micro_batch" in str(error) or "out of place" in str(error)


def permuted(scatter, gather):
    """Samples change places, meet the parameter, change back, and meet it once more: right sums, and wrong squares if unseen."""

    def function(x, w):
        order = torch.tensor([2, 0, 3, 1]) if len(x) == 4 else torch.tensor([0])
        return F.linear(x, w) + gather(F.linear(scatter(x, order), w), order)

    return function


def _set(x, order):
    moved = torch.zeros(len(x), 3, dtype=x.dtype)
    moved[order] = x
    return moved


def _eye(x):
    return torch.eye(len(x), dtype=x.dtype)


def _into(name):
    def move(x, order):
        return getattr(torch.zeros(len(x), 3, dtype=x.dtype), name)(0, order, x)

    return move


def _data(x, order):
    moved = x.clone()
    moved.data = x[order]
    return moved


def _out(x, order):
    moved = x.clone()
    torch.index_select(x, 0, order, out=moved[:])
    return moved


def _copied(x):
    buffer = torch.zeros(x.shape, dtype=x.dtype)
    view = buffer.view(-1)
    buffer.copy_(x)
    return view.view(x.shape)


HIDDEN = {
    "set": permuted(_set, lambda y, order: _set(y, order.argsort())),
    "index_add_": permuted(_into("index_add_"), lambda y, order: _into("index_add_")(y, order.argsort())),
    "index_copy_": permuted(_into("index_copy_"), lambda y, order: _into("index_copy_")(y, order.argsort())),
    "addmm": permuted(
        lambda x, order: torch.addmm(x, _eye(x)[order] - _eye(x), x),
        lambda y, order: torch.addmm(y, _eye(y)[order].t() - _eye(y), y),
    ),
    "embedding": permuted(lambda x, order: F.embedding(order, x), lambda y, order: F.embedding(order.argsort(), y)),
    "conv1d": permuted(
        lambda x, order: F.conv1d(x, _eye(x)[order][:, :, None]),
        lambda y, order: F.conv1d(y, _eye(y)[order].t()[:, :, None]),
    ),
    "rmatmul": permuted(
        lambda x, order: x.__rmatmul__(_eye(x)[order]), lambda y, order: y.__rmatmul__(_eye(y)[order].t())
    ),
    "roll": lambda x, w: (x.roll(1) * w[0]).roll(-1),
    "data": permuted(_data, lambda y, order: _set(y, order)),
    "out": permuted(_out, lambda y, order: _set(y, order)),
    "an earlier view": lambda x, w: (F.linear(x, w), F.linear(_copied(x), w)),
    "numpy": lambda x, w: (F.linear(x, w), F.linear(torch.from_numpy(x.numpy().copy()), w)),
    "a list": lambda x, w: (F.linear(x, w), F.linear(torch.tensor(x.tolist(), dtype=x.dtype), w)),
    "vmap": lambda x, w: (F.linear(x, w), F.linear(torch.vmap(torch.sin)(x), w)),
    "a parameter filled in by a mask": lambda x, w: (x.clone().masked_fill_(x > 0, w[0, 0]), F.linear(x, w)),
    "a constant assigned": lambda x, w: F.linear(_assigned(x.clone(), (slice(None), 0), 0.0), w),
    "filled": lambda x, w: F.linear(x.clone().uniform_(), w),
    "a mask written by the batch": lambda x, w: F.linear(_assigned(torch.zeros_like(x), x > 0, 1.0), w),
    "repeated along features": lambda x, w: F.linear(x.repeat(1, 3)[:, ::3], w),
    "gathered along features": lambda x, w: F.linear(x.gather(1, torch.zeros(len(x), 3).long()), w),
    "selected along features": lambda x, w: F.linear(x.index_select(1, torch.arange(3)), w),
    "the larger of two": lambda x, w: F.linear(torch.max(x, x.sin()), w),
    "pixel_shuffle": lambda x, w: F.linear(
        F.pixel_shuffle(x[:, :, None, None].expand(-1, -1, 4, 4).repeat_interleave(4, 1), 2), w
    ),
    "a sum that is changed in place": lambda x, w: F.linear(x, w).sum(0).relu_(),
    "foreach": lambda x, w: F.linear(torch._foreach_add([x], [x.flip(0)])[0], w),
    "cumsum_": lambda x, w: F.linear(x.clone().cumsum_(0), w),
    "statistics without a gradient": lambda x, w: F.linear(x, w) - x.mean(0),
    "others without a gradient": lambda x, w: F.linear(x, w) @ x.t(),
    "a weight from the batch": lambda x, w: F.linear(x, x.sin(), w[0].new_zeros(len(x)) + w[0, 0]),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_samples_that_change_places_unseen_are_refused(name):
    with pytest.raises(UserError, match=r"micro_batch|out of place"):
        track(Apply(HIDDEN[name], w=normal(3, 3)))(normal(N, 3))


class TestWhereWeightsComeFrom:
    """The same parameter by other ways."""

    def test_a_weight_put_into_a_modules_place(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner, self.a, self.b = nn.Linear(3, 3), nn.Parameter(normal(1, 3)), nn.Parameter(normal(3, 1))

            def forward(self, x):
                adapted = {"weight": self.inner.weight + self.b @ self.a}
                return torch.func.functional_call(self.inner, adapted, (x,)) + F.linear(x, self.a)

        assert_agrees(Model().double(), normal(N, 3))

    def test_an_element_joined_twice(self):
        assert_agrees(
            Apply(lambda x, a, b: F.linear(x, torch.cat([torch.cat([a, b]), b[:1]])), a=normal(2, 3), b=normal(2, 3)),
            normal(N, 3),
        )

    def test_a_module_that_is_frozen_for_one_use(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.critic, self.actor = nn.Linear(3, 3), nn.Linear(3, 3)

            def forward(self, x):
                first = self.critic(x)
                self.critic.requires_grad_(False)
                second = self.critic(self.actor(x))
                self.critic.requires_grad_(True)
                return first + second

        assert_agrees(Model().double(), normal(N, 3))

    def test_tied_weights_in_a_fallback(self):
        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
                self.b.weight = self.a.weight

            def forward(self, x):
                return self.b(torch.tanh(self.a(x)))

        assert_agrees(nn.Sequential(Two()).double(), normal(N, 3), fallback=["0"])

    def test_a_weight_of_another_module_in_a_fallback(self):
        class Head(nn.Module):
            def __init__(self, other):
                super().__init__()
                self.other = [other]

            def forward(self, x):
                return F.linear(x, self.other[0].weight)

        first = nn.Linear(3, 3)
        model = track(nn.Sequential(first, nn.Tanh(), Head(first)), fallback=["2"])
        with pytest.raises(UserError, match=r"fallback module '2'.*parameter '0\.weight', which is not its own"):
            model(torch.randn(N, 3))

    @pytest.mark.parametrize("is_argument", [True, False])
    def test_what_was_computed_from_parameters_meets_a_fallback(self, is_argument):
        class Head(nn.Module):
            def __init__(self):
                super().__init__()
                self.scale, self.kept = nn.Parameter(torch.randn(3)), None

            def forward(self, x, w):
                return F.linear(x, self.kept if w is None else w) * self.scale

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.head = nn.Linear(3, 3), Head()

            def forward(self, x):
                w = self.first.weight.t()
                self.head.kept = None if is_argument else w
                return self.head(self.first(x), w if is_argument else None)

        with pytest.raises(
            UserError, match=r"fallback module 'head'.*(among its arguments|'first\.weight', which is not)"
        ):
            track(Model(), fallback=["head"])(torch.randn(N, 3))

    def test_an_argument_of_a_fallback_that_is_changed_in_place_is_refused(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = Apply(lambda x, w: x + w, w=normal(3))

            def forward(self, x):
                x = x * 2
                return self.inner(x) + x.mul_(2)

        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            track(Model(), fallback=["inner"])(normal(N, 3)).sum().backward()

    def test_an_operation_in_place_after_a_fallback_that_draws(self):
        module = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 3))
        model = track(nn.Sequential(module, nn.ReLU(inplace=True)), fallback=["0"])
        with pytest.raises(UserError, match="draws random numbers"):
            model(torch.randn(N, 3)).sum().backward()

    def test_two_tracked_models_that_share_a_weight(self):
        a, b = nn.Linear(3, 3), nn.Linear(3, 3)
        b.weight = a.weight
        track(a), track(b)
        with pytest.raises(UserError, match="two forward passes of one backward pass"):
            b(torch.tanh(a(torch.randn(N, 3)))).sum().backward()

    def test_a_method_other_than_forward(self):
        class Encoder(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = nn.Linear(3, 3)

            def encode(self, x):
                return self.inner(x.reshape(-1, 3)).view(x.shape)

        with pytest.raises(UserError, match="'inner' is called from outside of the model that was tracked"):
            track(Encoder()).encode(torch.randn(N, 5, 3))
