"""Models: shapes, parameter counts, initialisation."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from largebatch.errors import UserError
from largebatch.models import (
    CNN,
    GPT,
    MODELS,
    CNNConfig,
    FactoryModel,
    GPTConfig,
    MLPConfig,
    ResNet18Config,
    ResNet50Config,
    batch_norms,
    norm_group_size,
    resnet18,
    resnet50,
)
from largebatch.task import Task

DIGITS = Task("classification", (1, 8, 8), 10)
CLOTHES = Task("classification", (1, 28, 28), 10)
CIFAR = Task("classification", (3, 32, 32), 10)
TEXT = Task("language_modeling", (16,), 256)


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# Reference models


@pytest.mark.parametrize(
    ("config", "task", "parameters"),
    [
        (MLPConfig(), DIGITS, 64 * 128 + 128 + 128 * 10 + 10),
        (MLPConfig(hidden=[], activation="tanh"), Task("regression", (5,), 3), 5 * 3 + 3),
        (CNNConfig(), CLOTHES, 320 + 18_496 + 36_928 + 64 * 4 * 4 * 10 + 10),
        (CNNConfig(norm="batch"), CIFAR, 3 * 9 * 32 + 9 * 32 * 64 + 9 * 64 * 64 + 2 * 160 + 64 * 4 * 4 * 10 + 10),
        (CNNConfig(norm="group", channels=[8, 12]), CLOTHES, 72 + 864 + 2 * 20 + 12 * 7 * 7 * 10 + 10),
        # The count everyone quotes for this network with ten classes.
        (ResNet18Config(), CIFAR, 11_173_962),
        (GPTConfig(), TEXT, None),
    ],
    ids=lambda value: value.name if hasattr(value, "name") else "",
)
def test_models_fit_their_task(config, task, parameters):
    model = config.build(task)
    num = 3
    if task.kind == "language_modeling":
        inputs = targets = torch.randint(256, (num, 16))
    else:
        inputs, targets = torch.randn(num, *task.sample_shape), torch.arange(num)
    if task.kind == "regression":
        targets = torch.randn(num, task.num_outputs)
    losses = task.losses(model(inputs), targets)
    assert losses.shape == (num,)
    losses.mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    if parameters is not None:
        assert num_parameters(model) == parameters


def test_initialisation_follows_the_global_seed():
    for config, task in ((MLPConfig(), DIGITS), (CNNConfig(), CLOTHES), (GPTConfig(), TEXT)):
        torch.manual_seed(1)
        one = config.build(task).state_dict()
        torch.manual_seed(1)
        other = config.build(task).state_dict()
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("norm", ["none", "group"])
def test_the_cnn_treats_each_sample_alone(norm):
    torch.manual_seed(0)
    model = CNN((1, 28, 28), [32, 64, 64], 10, norm).double()
    images = torch.randn(64, 1, 28, 28, dtype=torch.float64)
    whole = model(images)
    for size in (1, 8, 23):
        parts = torch.cat([model(part) for part in images.split(size)])
        # The kernels may order sums differently for another batch: float64 rounding of values near 1.
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-13)


def test_resnet50_has_torchvisions_parameters_and_names():
    model = resnet50(1000)
    assert num_parameters(model) == 25_557_032
    names = list(model.state_dict())
    assert len(names) == 320  # torchvision's: 161 parameters and 3 buffers for each of 53 norms
    for name in (
        "conv1.weight",
        "bn1.num_batches_tracked",
        "layer1.0.downsample.0.weight",
        "layer1.0.downsample.1.running_var",
        "layer3.5.bn3.bias",
        "layer4.2.conv3.weight",
        "fc.bias",
    ):
        assert name in names
    assert norm_group_size(model) == 32 and len(batch_norms(model)) == 53
    assert model.layer2[0].conv2.stride == (2, 2) and model.layer2[0].conv1.stride == (1, 1)


def test_resnet18_with_torchvisions_stem_has_its_parameters():
    assert num_parameters(resnet18(1000, stem="imagenet")) == 11_689_512


def test_goyals_initialisation():
    torch.manual_seed(0)
    model = ResNet50Config().build(Task("classification", (3, 64, 64), 100))
    blocks = [block for stage in (model.layer1, model.layer2, model.layer3, model.layer4) for block in stage]
    assert len(blocks) == 16
    for block in blocks:
        assert (block.bn3.weight == 0).all() and (block.bn1.weight == 1).all() and (block.bn2.weight == 1).all()
    conv = model.layer4[0].conv2.weight  # 2.4 million numbers
    assert conv.std().item() == pytest.approx(math.sqrt(2 / (512 * 9)), rel=0.01)
    assert model.fc.weight.std().item() == pytest.approx(0.01, rel=0.02) and (model.fc.bias == 0).all()
    # Each block without a projection begins as relu(identity).
    features = torch.rand(2, 256, 4, 4)
    assert torch.equal(model.layer1[1](features), features)


def test_resnets_with_group_norm_have_no_batch_statistics():
    model = ResNet18Config(norm="group").build(CIFAR)
    assert batch_norms(model) == [] and norm_group_size(model) == 1
    assert (model.layer1[0].bn2.weight == 0).all()
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_gpt_looks_only_back():
    torch.manual_seed(0)
    model = GPT(vocab_size=50, context=16, n_layer=2, n_head=2, d_model=16).double()
    tokens = torch.randint(50, (2, 16))
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 50
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert (before[:, 9:] != after[:, 9:]).any(-1).all()
    torch.testing.assert_close(model(tokens[:, :5]), before[:, :5], rtol=0, atol=1e-13)  # order of float64 sums
    with pytest.raises(ValueError, match="a sequence of 17 tokens is longer than the context of 16"):
        model(torch.zeros(1, 17, dtype=torch.long))


def test_gpt_against_torchs_own_encoder_layer():
    torch.manual_seed(0)
    model = GPT(vocab_size=30, context=12, n_layer=1, n_head=4, d_model=32).double()
    block = model.blocks[0]
    layer = nn.TransformerEncoderLayer(32, 4, 128, 0.0, "gelu", batch_first=True, norm_first=True).double()
    pairs = {
        layer.self_attn.in_proj_weight: block.attn.qkv.weight,
        layer.self_attn.in_proj_bias: block.attn.qkv.bias,
        layer.self_attn.out_proj.weight: block.attn.proj.weight,
        layer.self_attn.out_proj.bias: block.attn.proj.bias,
        layer.linear1.weight: block.mlp.fc.weight,
        layer.linear1.bias: block.mlp.fc.bias,
        layer.linear2.weight: block.mlp.proj.weight,
        layer.linear2.bias: block.mlp.proj.bias,
    }
    with torch.no_grad():
        for theirs, ours in pairs.items():
            theirs.copy_(ours)
    features = torch.randn(3, 12, 32, dtype=torch.float64)
    mask = nn.Transformer.generate_square_subsequent_mask(12, dtype=torch.float64)
    # float64, order of sums
    torch.testing.assert_close(block(features), layer(features, src_mask=mask, is_causal=True), rtol=0, atol=1e-12)


@pytest.mark.parametrize("tie", [True, False])
def test_gpts_parameters_and_initialisation(tie):
    torch.manual_seed(0)
    model = GPT(vocab_size=256, context=64, n_layer=8, n_head=4, d_model=128, tie_weights=tie)
    block = 4 * 128 * 128 + 4 * 128 + 8 * 128 * 128 + 5 * 128 + 4 * 128
    assert num_parameters(model) == 256 * 128 * (1 if tie else 2) + 64 * 128 + 8 * block + 2 * 128
    assert (model.head.weight is model.wte.weight) == tie
    assert model.blocks[3].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.blocks[3].mlp.proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.02)  # sqrt(2 * 8) = 4
    assert (model.blocks[3].mlp.fc.bias == 0).all()


@pytest.mark.parametrize(
    ("config", "task", "message"),
    [
        (MLPConfig(), TEXT, r"model\.name: mlp does not take sequences of tokens; gpt does"),
        (CNNConfig(), TEXT, r"model\.name: cnn takes images .*, the data has samples of shape \(16,\)"),
        (ResNet50Config(), Task("regression", (5,), 1), r"model\.name: resnet50 takes images"),
        (GPTConfig(), CLOTHES, r"model\.name: gpt takes sequences of tokens, the data poses a classification task"),
    ],
)
def test_a_model_that_does_not_fit_the_data_is_refused(config, task, message):
    with pytest.raises(UserError, match=message):
        config.build(task)


@pytest.mark.parametrize(
    ("section", "options"),
    [
        (GPTConfig, {"d_model": 100, "n_head": 3}),
        (GPTConfig, {"dropout": 1.0}),
        (MLPConfig, {"hidden": [0]}),
        (MLPConfig, {"activation": "sigmoid"}),
        (CNNConfig, {"channels": []}),
        (ResNet18Config, {"norm_group_size": 0}),
        (FactoryModel, {"name": "resnet"}),
    ],
)
def test_values_out_of_range_are_refused(section, options):
    with pytest.raises(ValidationError):
        section(**options)


def test_names_are_unique_and_documented():
    names = [section.model_fields["name"].default for section in MODELS if section is not FactoryModel]
    assert names == ["mlp", "cnn", "resnet18", "resnet50", "gpt"]
    for section in MODELS:
        assert all(field.description for field in section.model_fields.values()), section
        assert next(iter(section.model_fields)) == "name"
