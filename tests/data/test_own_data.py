"""Data sets of one's own."""

from __future__ import annotations

import random
import sys
import types

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from samples import (
    batch,
    everything,
    keys,
    mnist_folder,  # noqa: F401
)
from torch.utils.data import DataLoader, TensorDataset

from largebatch.data import (
    SOURCES,
    Cifar10,
    Digits,
    FactoryData,
    FashionMnist,
    Mnist,
    Source,
    SyntheticImages,
    TensorSamples,
    Text,
)
from largebatch.errors import UserError
from largebatch.task import Task

# factories


class Squares:
    """A map-style data set whose samples carry numbers from all three global random states."""

    def __init__(self, num: int = 10):
        self.num = num

    def __len__(self):
        return self.num

    def __getitem__(self, index: int):
        assert isinstance(index, int)
        return torch.tensor([index**2, random.random(), np.random.rand(), torch.rand(()).item()]), index % 2


@pytest.fixture
def factories(monkeypatch):
    module = types.ModuleType("my_data")
    task = Task("classification", (4,), 2)
    module.pair = lambda num=10, seed=0: (Squares(num), Squares(3), task)
    module.fast = lambda: (TensorDataset(torch.randn(5, 4), torch.arange(5) % 2), Squares(3), task)
    samples = TensorSamples(torch.randn(5, 4), torch.zeros(5, dtype=torch.int64))
    module.source = lambda: Source(samples, samples, task)
    module.nothing = lambda: None
    module.empty = lambda: (Squares(0), Squares(3), task)
    module.iterable = lambda: ((x for x in ()), Squares(3), task)
    module.unfit = lambda: Source(Squares(), samples, task)
    module.single = lambda: ([1, 2, 3], Squares(3), task)
    monkeypatch.setitem(sys.modules, "my_data", module)


def test_an_ordinary_data_set_is_adapted(factories):
    source = FactoryData(name="my_data:pair", options={"num": 8}).load(seed=3)
    assert (len(source.train), len(source.val)) == (8, 3)
    inputs, targets = everything(source.train)
    assert inputs[:, 0].tolist() == [i**2 for i in range(8)] and targets.tolist() == [i % 2 for i in range(8)]
    assert targets.dtype == torch.int64


def test_its_random_numbers_depend_on_seed_epoch_and_index_alone(factories):
    train = FactoryData(name="my_data:pair").load(seed=3).train
    inputs = everything(train)[0][:, 1:]
    assert torch.equal(batch(train, [7])[0][0, 1:], inputs[7])
    assert len(inputs.flatten().unique()) == inputs.numel()
    for other in (
        batch(train, range(10), epoch=1)[0],
        everything(FactoryData(name="my_data:pair").load(seed=4).train)[0],
    ):
        assert not (other[:, 1:] == inputs).any()


def test_the_random_states_are_put_back(factories):
    train = FactoryData(name="my_data:pair").load(seed=3).train

    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()

    def seed_all():
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)

    seed_all()
    expected = draw()
    seed_all()
    everything(train)
    assert draw() == expected


def test_tensor_data_sets_and_sources_pass_straight_through(factories):
    assert isinstance(FactoryData(name="my_data:fast").load(seed=0).train, TensorSamples)
    assert isinstance(FactoryData(name="my_data:source").load(seed=0).train, TensorSamples)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("no_such_module:f", {}, r"data\.name: cannot import 'no_such_module'"),
        ("my_data:pear", {}, r"has no callable 'pear' \(did you mean 'pair'\?\)"),
        ("my_data:pair", {"size": 3}, r"data\.options: .*unexpected keyword argument 'size'; the factory takes"),
        ("my_data:nothing", {}, r"should return a Source or \(train, val, Task\), it returned a NoneType"),
        ("my_data:empty", {}, r"training set of 'my_data:empty' is empty"),
        ("my_data:iterable", {}, r"a generator, has no __len__"),
        ("my_data:unfit", {}, r"should have __len__ and __getitems__\(SampleKeys\), it is a Squares"),
    ],
)
def test_wrong_factories(factories, name, options, message):
    with pytest.raises(UserError, match=message):
        FactoryData(name=name, options=options).load(seed=0)


def test_a_sample_that_is_no_pair_is_named(factories):
    train = FactoryData(name="my_data:single").load(seed=0).train
    with pytest.raises(UserError, match=r"sample 1 of list should be a pair \(input, target\), it is of type int"):
        batch(train, [1])


# the sections as a whole


def test_names_are_unique_and_documented():
    names = [section.model_fields["name"].default for section in SOURCES if section is not FactoryData]
    assert len(set(names)) == len(names) == 7
    for section in SOURCES:
        assert all(field.description for field in section.model_fields.values()), section
        assert next(iter(section.model_fields)) == "name"


@pytest.mark.parametrize(
    ("section", "options"),
    [
        (Digits, {"val_fraction": 1.0}),
        (Digits, {"valfraction": 0.1}),
        (Text, {"path": "x", "context": 0}),
        (SyntheticImages, {"shape": [3, 0, 4]}),
        (Cifar10, {"path": "x", "augment": "mixup"}),
        (FactoryData, {"name": "no_colon"}),
        (Mnist, {}),
    ],
)
def test_values_out_of_range_are_refused(section, options):
    with pytest.raises(ValidationError):
        section(**options)


def test_workers_give_the_same_batches(mnist_folder):
    train = FashionMnist(path=str(mnist_folder), augment="crop_flip").load(seed=0).train
    wanted = [keys([1, 2, 3]), keys([19], epoch=1), keys(range(20))]
    loaders = [DataLoader(train, batch_sampler=wanted, num_workers=workers, collate_fn=_identity) for workers in (0, 2)]
    for here, there in zip(*loaders, strict=True):
        assert torch.equal(here[0], there[0]) and torch.equal(here[1], there[1])


def _identity(samples):
    return samples
