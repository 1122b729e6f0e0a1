"""Any model: gradients are the plain model's bit for bit, and squares those of a loop over micro-batches.

The default tests take the miniature models of this suite and a hundred odd uses of a parameter. The slow ones take the smallest
model of every family of torchvision and timm, and transformers' architectures, where these are installed.
"""

from __future__ import annotations

import copy
import functools
import gc
import importlib.util
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from largebatch import batch_size_invariant
from largebatch.models import CNN, GPT, MLP, resnet18


def passes(model, loss, batches, seed=0):
    """Do one backward pass a batch, from the same random numbers each time the function is called."""
    torch.manual_seed(seed)
    for batch in batches:
        loss(model, batch).backward()


def assert_squares(model, loss, batches, exact=True):
    """Hold gradients and squares of a model with the line against those of a copy without it."""
    plain, alone = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = batch_size_invariant(
        torch.optim.SGD(model.parameters(), 0.0), reference_batch_size=1, micro_batch_size=1
    )
    passes(model, loss, batches)
    passes(plain, loss, batches)
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or torch.equal(p.grad, q.grad), f"the gradient of {name} is not the plain model's"
    squares = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in alone.named_parameters()}
    torch.manual_seed(0)
    for batch in batches:
        alone.zero_grad()
        loss(alone, batch).backward()
        for name, p in alone.named_parameters():
            if p.grad is not None:
                squares[name] += p.grad.float().square()
    units = optimizer._squares.collect()
    assert units.num_units == len(batches) and units.factor == 1.0
    assert units.slots
    found = {slot.parameter: slot.region for slot in units.slots}
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(
                found[p].to(squares[name].dtype),
                squares[name],
                rtol=1e-5,
                atol=0 if exact else 1e-30,
                msg=lambda m, n=name: f"{n}: {m}",
            )


MINIATURES = {
    "mlp": (lambda: MLP(10, [8, 8], 3), lambda: torch.randn(4, 10)),
    "cnn": (lambda: CNN((3, 16, 16), [4, 6], 5), lambda: torch.randn(4, 3, 16, 16)),
    "resnet18": (lambda: resnet18(5), lambda: torch.randn(4, 3, 32, 32)),
    "gpt": (lambda: GPT(20, 9, n_layer=2, n_head=2, d_model=16, dropout=0.1), lambda: torch.randint(0, 20, (4, 9))),
    "lstm": (lambda: nn.LSTM(6, 5, num_layers=2, batch_first=True, dropout=0.1), lambda: torch.randn(4, 7, 6)),
    "attention": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True),
        lambda: torch.randn(4, 6, 8),
    ),
    "spectral norm": (lambda: spectral_norm(nn.Linear(6, 5)), lambda: torch.randn(4, 6)),
    "weight norm": (lambda: weight_norm(nn.Linear(6, 5)), lambda: torch.randn(4, 6)),
    "batch norm": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2)),
        lambda: torch.randn(4, 3, 6, 6),
    ),
}


def first(output):
    return output[0] if isinstance(output, tuple) else output


def squared_output(model, batch):
    return first(model(batch)).square().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MINIATURES)
def test_miniatures(name, dtype):
    torch.manual_seed(0)
    build, make = MINIATURES[name]
    if dtype == torch.bfloat16 and name == "spectral norm":
        pytest.skip("torch's spectral_norm is not implemented in bfloat16 on the CPU")
    model, batches = build().to(dtype), [make() for _ in range(3)]
    batches = [batch.to(dtype) if batch.is_floating_point() else batch for batch in batches]
    assert_squares(model, squared_output, batches)


def test_the_table_of_a_line_is_left_as_it_was():
    """Nothing of the model is touched: no attribute, no parameter, no forward of ours."""
    model = MLP(10, [8], 3)
    before = {
        name: (set(vars(module)), [n for n, _ in module.named_parameters()]) for name, module in model.named_modules()
    }
    batch_size_invariant(torch.optim.SGD(model.parameters(), 0.1), reference_batch_size=1, micro_batch_size=1)
    squared_output(model, torch.randn(4, 10)).backward()
    assert before == {n: (set(vars(m)), [k for k, _ in m.named_parameters()]) for n, m in model.named_modules()}


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(6, 4)

    def forward(self, x):
        both = self.net(torch.cat([x, x.flip(0)]))
        return both[: len(x)] * both[len(x) :]


class Experts(nn.Module):
    """Routes each sample to one of three experts by a masked selection; one may have none."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(6, 3), nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        scores = self.gate(x).softmax(-1)
        weight, chosen = scores.max(-1)
        y = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).nonzero().squeeze(1)
            if len(rows):
                y = y.index_add(0, rows, weight[rows, None] * expert(x[rows]))
        return y


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w**3

    @staticmethod
    def backward(ctx, gradient):
        x, w = ctx.saved_tensors
        return gradient * w**3, (gradient * x * 3 * w**2).sum(0)


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(6))

    def forward(self, x):
        return Cube.apply(x, self.w)


@pytest.mark.parametrize("build", [Siamese, Experts, Custom])
def test_models_that_no_rule_for_samples_knows(build):
    torch.manual_seed(0)
    assert_squares(build(), squared_output, [torch.randn(4, 6) for _ in range(3)])


# A parameter p (6, 6) and samples x (4, 6)

HOW = {
    "as it is": lambda p: p,
    "cast": lambda p: p.to(torch.float64).float(),
    "type_as": lambda p: p.type_as(torch.zeros(1, dtype=torch.float64)).float(),
    "clone": lambda p: p.clone(),
    "transposed": lambda p: p.t().contiguous(),
    "two halves": lambda p: torch.cat([p[3:], p[:3]]),
    "stacked": lambda p: torch.stack([p, p.sin()]).sum(0),
    "changed in place": lambda p: p.clone().mul_(p).add_(1.0),
    "view changed in place": lambda p: (lambda c: (c[0].mul_(2.0), c)[1])(p.clone()),
    "normalised": lambda p: p / p.norm(dim=1, keepdim=True),
}
WHERE = {
    "F.linear": lambda p, x: F.linear(x, p),
    "matmul of an expansion": lambda p, x: torch.bmm(p.expand(4, 6, 6), x[:, :, None]).squeeze(-1),
    "einsum": lambda p, x: torch.einsum("ij,nj->ni", p, x),
    "added to the samples": lambda p, x: x + p.mean(0),
    "joined with the samples": lambda p, x: torch.cat([x, p]).cumsum(0),
    "no samples": lambda p, x: (p**2).sum() + x.sum(),
    "broadcast over samples": lambda p, x: p[None] * x[:, None, :],
    "embedding": lambda p, x: F.embedding(x.abs().mul(5).long().clamp(max=5), p),
    "index_select": lambda p, x: x * p.index_select(0, torch.tensor([0, 0, 3, 5])),
    "cdist": lambda p, x: torch.cdist(x, p),
    "tensordot": lambda p, x: torch.tensordot(x, p, dims=1),
    "sorted": lambda p, x: (x @ p).sort(dim=0).values,
}


@pytest.mark.parametrize(("how", "where"), list(itertools.product(HOW, WHERE)))
def test_odd_uses_of_a_parameter(how, where):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.p = nn.Parameter(torch.rand(6, 6) + 0.1)

        def forward(self, x):
            return WHERE[where](HOW[how](self.p), x)

    torch.manual_seed(0)
    assert_squares(Model(), squared_output, [torch.randn(4, 6) for _ in range(3)])


# Foreign models


def logits_of(model, batch):
    output = model(batch)
    output = getattr(output, "logits", output)
    while not isinstance(output, torch.Tensor):
        output = next(iter(output.values())) if isinstance(output, dict) else output[0]
    return output.float().square().mean()


def smallest(entries, size):
    """Return the entry with the fewest parameters: counted on the meta device, in which some fail."""
    found = []
    for entry in entries:
        try:
            with torch.device("meta"):
                found.append((size(entry), entry))
        except Exception:
            continue
    return min(found, key=lambda pair: pair[0])[1] if found else entries[0]


def torchvision_families():
    if importlib.util.find_spec("torchvision") is None:
        return []
    try:
        from torchvision.models import get_model_builder, list_models
    except Exception:
        return []
    families = {}
    for name in list_models():
        module = get_model_builder(name).__module__
        if module.startswith("torchvision.models.") and module.count(".") == 2:
            families.setdefault(module.rpartition(".")[2], []).append(name)
    return sorted(families.items())


def timm_families():
    try:
        import timm
    except Exception:
        return []
    return [(module, timm.list_models(module=module)) for module in timm.list_modules()]


@pytest.mark.slow
def test_torchvision():
    families = torchvision_families()
    if not families:
        pytest.skip("torchvision is not installed, or does not fit this torch")
    from torchvision.models import get_model

    failed = {}
    for _, names in families:
        name = smallest(names, lambda n: sum(p.numel() for p in get_model(n, weights=None).parameters()))
        torch.manual_seed(0)
        edge = 299 if "inception" in name else 224 if "vit" in name or "swin" in name or "maxvit" in name else 64
        check(failed, name, lambda n=name: get_model(n, weights=None), (2, 3, edge, edge))
    print(f"{len(families) - len(failed)} of {len(families)} families of torchvision")
    assert not failed, failed


def timm_model(name, edge):
    """Return a model for images of this size, which some must be told and others do not take."""
    import timm

    try:
        return timm.create_model(name, img_size=edge)
    except TypeError:
        return timm.create_model(name)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_timm():
    families = timm_families()
    if not families:
        pytest.skip("timm is not installed, or does not fit this torch")
    import timm

    failed, tried = {}, 0
    for _, names in families:
        if not names:
            continue
        name = smallest(names, lambda n: sum(p.numel() for p in timm.create_model(n).parameters()))
        channels, *size = timm.get_pretrained_cfg(name).input_size if timm.get_pretrained_cfg(name) else (3, 224, 224)
        if max(size) > 448:  # attention over a megapixel takes all memory
            size = [224, 224]
        check(failed, name, functools.partial(timm_model, name, size[0]), (2, channels, *size))
        tried += 1
    print(f"{tried - len(failed)} of {tried} families of timm {timm.__version__}")
    assert not failed, failed


def check(failed, name, build, shape):
    try:
        torch.manual_seed(0)
        assert_squares(build().train(), logits_of, [torch.randn(shape) for _ in range(2)], exact=False)
    except Exception as error:
        failed[name] = f"{type(error).__name__}: {str(error)[:300]}"
    gc.collect()  # three copies of a model, which point at themselves


def transformer(name):
    import transformers as t

    tiny = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 40,
    }
    return {
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=16)),
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**tiny, num_key_value_heads=1)),
        "bert": lambda: t.BertForMaskedLM(t.BertConfig(**tiny)),
        "t5": lambda: t.T5ForConditionalGeneration(t.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=40, decoder_start_token_id=0)),
        "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**tiny, num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=1)),
    }[name]()  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5", "mixtral"])
def test_transformers(name):
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    try:
        torch.manual_seed(0)
        model = transformer(name).train()
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"transformers does not fit this torch: {error}")

    def loss(model, tokens):
        return model(input_ids=tokens, labels=tokens).loss

    assert_squares(model, loss, [torch.randint(1, 40, (2, 9)) for _ in range(3)])
