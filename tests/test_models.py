"""Models: shapes, parameter counts, initialisation; batch norm over groups of samples against torch's."""

from __future__ import annotations

import copy
import math
import sys
import types

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.utils.checkpoint import checkpoint

from largebatch.errors import UserError
from largebatch.models import (
    CNN,
    GPT,
    MLP,
    MODELS,
    CNNConfig,
    FactoryModel,
    GhostBatchNorm1d,
    GhostBatchNorm2d,
    GhostBatchNorm3d,
    GPTConfig,
    MLPConfig,
    ResNet18Config,
    ResNet50Config,
    batch_norms,
    commit_batch_statistics,
    convert_batch_norm,
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


def alone(flat: torch.Tensor) -> torch.Tensor:
    """The sum over the ranks of a run on one rank."""
    return flat


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


# Batch norm over groups of samples

SHAPES = {"1d": (6,), "1d long": (6, 5), "2d": (6, 4, 3), "3d": (6, 2, 4, 3)}


def make_pair(shape, group_size):
    """A grouped norm and torch's, with the same random parameters, float64."""
    torch.manual_seed(0)
    kinds = {3: (nn.BatchNorm2d, GhostBatchNorm2d), 4: (nn.BatchNorm3d, GhostBatchNorm3d)}
    plain, grouped = kinds.get(len(shape), (nn.BatchNorm1d, GhostBatchNorm1d))
    reference = plain(6).double()
    with torch.no_grad():
        reference.weight.normal_()
        reference.bias.normal_()
        reference.running_mean.normal_()
        reference.running_var.uniform_(0.5, 2)
    ghost = grouped(6, group_size).double()
    ghost.load_state_dict(reference.state_dict())  # the names are torch's
    return ghost, reference


@pytest.mark.parametrize("num", [8, 24, 29, 5])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_group_by_group_it_is_torchs_batch_norm(shape, num):
    ghost, reference = make_pair(shape, 8)
    ours = (torch.randn(num, *shape, dtype=torch.float64) * 3 + 1).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    upstream = torch.randn_like(ours)
    got = ghost(ours)
    expected = torch.cat([reference(theirs[start : start + 8]) for start in range(0, num, 8)])
    got.backward(upstream)
    expected.backward(upstream)
    # The same kernel on the same groups; gradients of the parameters are summed over groups in another order.
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(ghost.weight.grad, reference.weight.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(ghost.bias.grad, reference.bias.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_evaluation_is_torchs(shape):
    ghost, reference = make_pair(shape, 8)
    inputs = torch.randn(11, *shape, dtype=torch.float64)
    assert torch.equal(ghost.eval()(inputs), reference.eval()(inputs))


def test_one_group_an_update_moves_the_running_statistics_as_torch_does():
    ghost, reference = make_pair((6, 4, 3), 8)
    for _ in range(3):
        inputs = torch.randn(8, 6, 4, 3, dtype=torch.float64) * 2 + 1
        ghost(inputs)
        reference(inputs)
        commit_batch_statistics([ghost], alone)
    torch.testing.assert_close(ghost.running_mean, reference.running_mean, rtol=0, atol=1e-14)
    torch.testing.assert_close(ghost.running_var, reference.running_var, rtol=0, atol=1e-14)
    assert ghost.num_batches_tracked == reference.num_batches_tracked == 3


def test_running_statistics_average_the_groups_by_their_samples():
    ghost, _ = make_pair((6, 4, 3), 8)
    old_mean, old_var = ghost.running_mean.clone(), ghost.running_var.clone()
    inputs = torch.randn(21, 6, 4, 3, dtype=torch.float64)
    ghost(inputs)
    assert torch.equal(ghost.running_mean, old_mean)  # nothing moves before the commit
    commit_batch_statistics([ghost], alone)
    groups = inputs.split(8)
    mean = sum(len(group) * group.mean((0, 2, 3)) for group in groups) / 21
    var = sum(len(group) * group.var((0, 2, 3), correction=1) for group in groups) / 21
    torch.testing.assert_close(ghost.running_mean, 0.9 * old_mean + 0.1 * mean, rtol=0, atol=1e-14)
    torch.testing.assert_close(ghost.running_var, 0.9 * old_var + 0.1 * var, rtol=0, atol=1e-14)
    assert ghost.num_batches_tracked == 1


def two_norms() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), GhostBatchNorm2d(6, 4), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5), GhostBatchNorm1d(5, 4)
    ).double()


def all_reduce(ranks: list[nn.Module]) -> torch.Tensor:
    """Return the sum of what the ranks would hand to the reduction, leaving them as they are."""
    flats: list[torch.Tensor] = []
    for model in ranks:
        commit_batch_statistics(batch_norms(copy.deepcopy(model)), lambda flat: flats.append(flat) or flat)
    assert all(flat.dtype == torch.float64 and flat.shape == (2 * 6 + 1 + 2 * 5 + 1,) for flat in flats)
    return sum(flats)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("micro_batch_size", [4, 8, 100])
def test_running_statistics_do_not_depend_on_ranks_and_micro_batches(world_size, micro_batch_size):
    from largebatch.data.sampler import micro_batches, rank_share

    batches = torch.randn(2, 14, 3, 4, 4, dtype=torch.float64)
    reference = two_norms()
    ranks = [copy.deepcopy(reference) for _ in range(world_size)]
    for batch in batches:
        reference(batch)
        commit_batch_statistics(batch_norms(reference), alone)
        shares = [rank_share(14, rank, world_size, norm_group_size(reference)) for rank in range(world_size)]
        idle = [share.stop == share.start for share in shares]
        for rank, model in enumerate(ranks):
            for piece in micro_batches(shares[rank], micro_batch_size):
                if idle[rank]:
                    model.eval()(batch[:1])  # an idle rank runs a stand-in, out of training mode
                else:
                    model.train()(batch[piece])
        total = all_reduce(ranks)
        for model in ranks:
            commit_batch_statistics(batch_norms(model), lambda flat, total=total: total)
    for model in ranks:
        for name, value in reference.state_dict().items():
            torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=1e-13)  # order of float64 sums


def test_an_update_without_a_sample_anywhere_moves_nothing():
    ghost, _ = make_pair((6, 4, 3), 8)
    before = ghost.running_mean.clone()
    commit_batch_statistics([ghost], alone)
    assert torch.equal(ghost.running_mean, before)


def test_a_single_value_comes_out_as_the_bias_and_does_not_count():
    ghost, _ = make_pair((6,), 4)
    inputs = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    outputs = ghost(inputs)
    assert torch.equal(outputs[4], ghost.bias)
    outputs.square().sum().backward()
    assert torch.isfinite(inputs.grad).all() and (inputs.grad[4] == 0).all()
    old = ghost.running_mean.clone()
    commit_batch_statistics([ghost], alone)
    expected = 0.9 * old + 0.1 * inputs[:4].mean(0)
    torch.testing.assert_close(ghost.running_mean, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("num", [32, 96])
def test_bfloat16_autocast_keeps_float32_statistics(num):
    torch.manual_seed(0)
    ghost = GhostBatchNorm2d(16, 32)
    inputs = (torch.randn(num, 16, 6, 6) + 3).to(torch.bfloat16).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = ghost(inputs)
    outputs.float().square().sum().backward()
    assert outputs.dtype == torch.bfloat16 and inputs.grad is not None
    commit_batch_statistics([ghost], alone)
    assert ghost.running_mean.dtype == torch.float32
    groups = inputs.detach().double().split(32)
    mean = 0.1 * torch.stack([group.mean((0, 2, 3)) for group in groups]).mean(0)
    # float32 sums: bfloat16 ones would be off by 2**-9 of 0.3.
    torch.testing.assert_close(ghost.running_mean.double(), mean, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("num", [32, 72])
def test_channels_last_stays_and_agrees(num):
    torch.manual_seed(0)
    inputs = torch.randn(num, 8, 5, 5, dtype=torch.float64)
    ghost = GhostBatchNorm2d(8, 32).double()
    outputs = ghost(inputs.to(memory_format=torch.channels_last))
    assert outputs.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(outputs, ghost(inputs), rtol=0, atol=1e-12)  # order of float64 sums


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("followed", [False, True], ids=["last", "followed"])
def test_activation_checkpointing_does_not_move_the_average(followed, use_reentrant):
    ghost, _ = make_pair((6, 4, 3), 8)
    plain = copy.deepcopy(ghost)
    inputs = torch.randn(2, 16, 6, 4, 3, dtype=torch.float64, requires_grad=True)
    region = nn.Sequential(ghost, nn.GELU()) if followed else ghost
    for micro_batch in inputs:
        checkpoint(region, micro_batch, use_reentrant=use_reentrant).square().sum().backward()
        plain(micro_batch)
    for norm in (ghost, plain):
        commit_batch_statistics([norm], alone)
    torch.testing.assert_close(ghost.running_var, plain.running_var, rtol=0, atol=1e-14)


def test_several_forwards_before_one_backward():
    ghost, _ = make_pair((6, 4, 3), 8)
    parts = torch.randn(3, 16, 6, 4, 3, dtype=torch.float64, requires_grad=True)
    sum(ghost(part).square().sum() for part in parts).backward()
    assert torch.isfinite(parts.grad).all()


def test_the_input_must_have_the_right_dimensions():
    with pytest.raises(ValueError, match="GhostBatchNorm2d expects an input of 4 dimensions, got 2"):
        GhostBatchNorm2d(6)(torch.randn(4, 6))
    with pytest.raises(ValueError, match="group_size must be at least 1"):
        GhostBatchNorm1d(6, 0)


def test_the_group_sizes_of_a_model_have_one_multiple():
    assert norm_group_size(nn.Linear(2, 2)) == 1
    assert norm_group_size(nn.Sequential(GhostBatchNorm1d(3, 6), GhostBatchNorm1d(3, 4))) == 12


# Conversion


def test_conversion_keeps_the_model():
    torch.manual_seed(0)
    shared = nn.BatchNorm2d(4, eps=1e-3, momentum=0.2)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), shared, nn.Sequential(shared), nn.Flatten(), nn.Linear(16, 6))
    model.append(nn.BatchNorm1d(6))
    model(torch.randn(20, 3, 4, 4))
    weights = dict(model.named_parameters())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    plain = copy.deepcopy(model)
    assert convert_batch_norm(model, 16) is model
    assert type(model[1]) is GhostBatchNorm2d and type(model[5]) is GhostBatchNorm1d
    assert model[1] is model[2][0] and (model[1].eps, model[1].momentum) == (1e-3, 0.2)
    assert all(parameter is weights[name] for name, parameter in model.named_parameters())
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    inputs = torch.randn(5, 3, 4, 4)
    assert torch.equal(model.eval()(inputs), plain.eval()(inputs))
    assert isinstance(convert_batch_norm(nn.BatchNorm1d(3), 2), GhostBatchNorm1d)
    assert isinstance(convert_batch_norm(nn.BatchNorm3d(3), 2), GhostBatchNorm3d)


class ActivatedNorm(nn.BatchNorm2d):
    def forward(self, inputs):
        return super().forward(inputs).relu()


@pytest.mark.parametrize(
    "norm",
    [
        nn.SyncBatchNorm(3),
        nn.BatchNorm2d(3, affine=False),
        nn.BatchNorm2d(3, track_running_stats=False),
        ActivatedNorm(3),
    ],
    ids=["3d", "no affine", "no statistics", "subclass"],
)
def test_a_batch_norm_that_cannot_be_converted_is_named(norm):
    model = nn.Sequential(nn.Identity(), nn.Sequential(norm))
    with pytest.raises(UserError, match=r"model\.norm_group_size: module '1\.0', \w+\(3.*; null leaves"):
        convert_batch_norm(model, 32)


# Models from elsewhere


@pytest.fixture
def my_models(monkeypatch):
    module = types.ModuleType("my_models")
    module.with_task = lambda task, width=7: nn.Sequential(
        nn.Linear(task.sample_shape[0], width), nn.BatchNorm1d(width), nn.Linear(width, task.num_outputs)
    )
    module.without_task = lambda width: nn.Linear(width, 1)
    module.nothing = lambda: 3
    module.Net = MLP
    monkeypatch.setitem(sys.modules, "my_models", module)


def test_factories(my_models):
    task = Task("regression", (5,), 2)
    model = FactoryModel(name="my_models:with_task").build(task)
    assert model(torch.randn(4, 5)).shape == (4, 2) and norm_group_size(model) == 32
    plain = FactoryModel(name="my_models:with_task", norm_group_size=None).build(task)
    assert type(plain[1]) is nn.BatchNorm1d
    assert FactoryModel(name="my_models:without_task", options={"width": 3}).build(task).in_features == 3
    options = {"num_inputs": 5, "hidden": [4], "num_outputs": 2}
    assert isinstance(FactoryModel(name="my_models:Net", options=options).build(task), MLP)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("no_such_module:f", {}, r"model\.name: cannot import 'no_such_module'"),
        ("my_models:with_tusk", {}, r"has no callable 'with_tusk' \(did you mean 'with_task'\?\)"),
        ("my_models:without_task", {}, r"model\.options: missing a required argument: 'width'; the factory takes"),
        ("my_models:nothing", {}, r"model\.name: 'my_models:nothing' should return a torch\.nn\.Module, .* an? int"),
    ],
)
def test_wrong_factories(my_models, name, options, message):
    with pytest.raises(UserError, match=message):
        FactoryModel(name=name, options=options).build(DIGITS)


class FakeNet(nn.Module):
    def __init__(self, num_classes, weights=None, in_chans=3, depth=1):
        super().__init__()
        self.arguments = (num_classes, weights, in_chans, depth)


@pytest.fixture
def fake_libraries(monkeypatch):
    """Modules with the few functions of torchvision and timm that are called."""
    names = ["resnet34", "vit_b_16"]
    models = types.ModuleType("torchvision.models")
    models.list_models = lambda module=None: names
    models.get_model = lambda name, **options: FakeNet(**options)
    torchvision = types.ModuleType("torchvision")
    torchvision.models = models
    timm = types.ModuleType("timm")
    timm.list_models = lambda: names
    timm.create_model = lambda name, **options: FakeNet(**options)
    for module in (torchvision, models, timm):
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.usefixtures("fake_libraries")
def test_library_models_get_the_number_of_classes():
    assert FactoryModel(name="torchvision:resnet34").build(CIFAR).arguments == (10, None, 3, 1)
    assert FactoryModel(name="timm:resnet34.a1_in1k", options={"depth": 2}).build(CLOTHES).arguments == (10, None, 1, 2)
    with pytest.raises(UserError, match=r"torchvision has no model 'resnet43' \(did you mean 'resnet34'\?\)"):
        FactoryModel(name="torchvision:resnet43").build(CIFAR)
    with pytest.raises(UserError, match=r"timm has no model 'vit' ?$|timm has no model 'vit'"):
        FactoryModel(name="timm:vit").build(CIFAR)
    with pytest.raises(UserError, match=r"model\.options: .*unexpected keyword argument 'colour'"):
        FactoryModel(name="timm:vit_b_16", options={"colour": 1}).build(CIFAR)


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_a_missing_library_names_the_command(monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)  # Python's way to make an import fail
    with pytest.raises(UserError, match=f"model.name: {library} cannot be imported .*pip install {library}$"):
        FactoryModel(name=f"{library}:resnet50").build(CIFAR)


def test_a_broken_library_names_the_command(monkeypatch, tmp_path):
    # What a torchvision for another torch says.
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        'raise RuntimeError("operator torchvision::nms does not exist\\nmore")'
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UserError, match=r"\(operator torchvision::nms does not exist\); .*pip install torchvision$"):
        FactoryModel(name="torchvision:resnet50").build(CIFAR)
