"""Models from elsewhere: one's own, torchvision's and timm's."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import nn

from largebatch.errors import UserError
from largebatch.models import (
    MLP,
    FactoryModel,
    norm_group_size,
)
from largebatch.task import Task

DIGITS = Task("classification", (1, 8, 8), 10)
CLOTHES = Task("classification", (1, 28, 28), 10)
CIFAR = Task("classification", (3, 32, 32), 10)


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
