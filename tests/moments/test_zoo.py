"""Squares of samples on models of other libraries: against a loop over samples, and gradients bit for bit the plain model's.

What is refused is listed with its reason, so that a model which comes to be followed, or to be refused, changes a test.
"""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
from oracle import distance

from largebatch.errors import UserError
from largebatch.moments import chosen_samples, grad_sample_sq, track

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def installed(name):
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")


def first(output):
    for name in ("logits", "last_hidden_state"):
        if hasattr(output, name):
            return getattr(output, name)
    return output if isinstance(output, torch.Tensor) else first(output[0])


def assert_exact(build, batch, call=lambda model, x: first(model(x)), tolerance=1e-9, **options):
    torch.manual_seed(0)
    model = build().double().eval()
    with torch.no_grad():
        for p in model.parameters():  # heads and scales begin at zero in some
            p.add_(torch.randn_like(p), alpha=0.02)
    plain = copy.deepcopy(model)
    track(model, **options)
    (call(plain, batch).square().sum() / len(batch)).backward()
    for chosen in (range(len(batch)), [1]):  # all samples, and one that stands for all
        weight = len(batch) / len(chosen)
        model.zero_grad()
        with chosen_samples(list(chosen), weight):
            (call(model, batch).square().sum() / len(batch)).backward()
        for name, p in plain.named_parameters() if len(chosen) > 1 else ():
            own = model.get_parameter(name).grad
            assert (own is None) == (p.grad is None) and (own is None or torch.equal(own, p.grad)), name
        squares, expected = grad_sample_sq(model, len(batch)), {}
        for b in chosen:
            plain.zero_grad()
            call(plain, batch[b : b + 1]).square().sum().backward()
            for name, p in plain.named_parameters():
                if p.grad is not None:
                    expected[name] = expected.get(name, 0) + p.grad.square() * weight / len(batch)
        largest = max(float(value.max()) for value in expected.values())
        for name, value in expected.items():
            # A key's bias has a gradient of zero but for rounding.
            assert value.max() < 1e-20 * largest or distance(squares[name], value) <= tolerance, name


TORCHVISION = (
    "alexnet convnext_tiny densenet121 efficientnet_b0 googlenet inception_v3 mnasnet0_5 mobilenet_v2 mobilenet_v3_small "
    "regnet_y_400mf resnet18 shufflenet_v2_x0_5 squeezenet1_0 swin_t vgg11 vit_b_16"
)


@installed("torchvision")
@pytest.mark.parametrize("name", TORCHVISION.split())
def test_torchvision(name):
    models = pytest.importorskip("torchvision.models")
    options = {"init_weights": True, "aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    size = {"vit_b_16": 224, "inception_v3": 96}.get(name, 64)
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    assert_exact(lambda: models.get_model(name, weights=None, num_classes=10, **options), images)


@installed("torchvision")
def test_torchvision_refused():
    """A ReLU in place on what was computed from parameters alone."""
    models = pytest.importorskip("torchvision.models")
    model = track(models.swin_v2_t(weights=None))
    with pytest.raises(UserError, match=r"cpb_mlp.*relu_.*in place"):
        model(torch.randn(2, 3, 64, 64))


TIMM = (
    "beit_base_patch16_224 cait_xxs24_224 coat_lite_tiny convnextv2_atto deit_tiny_patch16_224 eva02_tiny_patch14_224 "
    "mixer_s32_224 mobilevit_xxs nfnet_f0 poolformer_s12 resmlp_12_224 resnetv2_50 vit_tiny_patch16_224"
)


@installed("timm")
@pytest.mark.parametrize("name", TIMM.split())
def test_timm(name):
    timm = pytest.importorskip("timm")
    size = 224 if name.endswith("224") or name == "coat_lite_tiny" else 64
    assert_exact(lambda: timm.create_model(name, num_classes=10), torch.randn(2, 3, size, size, dtype=torch.float64))


SIZES = {"vocab_size": 90, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TRANSFORMERS = {
    "gpt2": lambda t: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=90, n_embd=24, n_layer=2, n_head=2, n_positions=16)),
    "llama": lambda t: t.LlamaForCausalLM(t.LlamaConfig(**SIZES, num_key_value_heads=1)),
    "bert": lambda t: t.BertForMaskedLM(t.BertConfig(**SIZES)),
    "t5": lambda t: t.T5ForConditionalGeneration(
        t.T5Config(vocab_size=90, d_model=24, d_ff=32, d_kv=12, num_layers=2, num_heads=2)
    ),
}


@installed("transformers")
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name):
    transformers = pytest.importorskip("transformers")
    text = torch.randint(0, 90, (3, 9))

    def call(model, x):
        further = {"decoder_input_ids": x} if name == "t5" else {}
        return model(input_ids=x, **further).logits

    # Their norms compute in float32, whatever the model's type, and round a sample alone in another way than among others.
    tolerance = 1e-5 if name in ("llama", "t5") else 1e-9
    assert_exact(lambda: TRANSFORMERS[name](transformers), text, call, tolerance, inputs="all")


@installed("transformers")
def test_a_mixture_of_experts_is_refused():
    """Rows of the batch are routed by their values."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(**SIZES, num_key_value_heads=1, num_local_experts=2)
    model = track(transformers.MixtralForCausalLM(config))
    with pytest.raises(UserError, match="micro_batch"):
        model(input_ids=torch.randint(0, 90, (3, 9)))
