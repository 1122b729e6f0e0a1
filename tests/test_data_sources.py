"""Every source: what comes out of it, and what a missing or broken file says."""

from __future__ import annotations

import gzip
import os
import pickle
import random
import sys
import types

import numpy as np
import pytest
import torch
from pydantic import ValidationError
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
from largebatch.data.sampler import SampleKeys
from largebatch.errors import UserError
from largebatch.task import Task


def keys(indices, epoch=0) -> SampleKeys:
    indices = np.asarray(indices, dtype=np.int64)
    return SampleKeys(np.full(len(indices), epoch, dtype=np.int64), indices)


def batch(samples, indices, epoch=0):
    return samples.__getitems__(keys(indices, epoch))


def everything(samples):
    return batch(samples, range(len(samples)))


# digits


def test_digits():
    source = Digits().load(seed=0)
    assert source.task == Task("classification", (1, 8, 8), 10)
    assert len(source.train) + len(source.val) == 1797 and len(source.val) == 359
    inputs, targets = everything(source.train)
    assert inputs.dtype == torch.float32 and targets.dtype == torch.int64
    assert abs(inputs.mean()) < 0.02 and abs(inputs.std() - 1) < 0.02
    assert set(targets.tolist()) == set(range(10))


def test_the_split_of_digits_is_the_same_for_every_seed_and_shares_no_image():
    one, other = Digits().load(seed=0), Digits().load(seed=1)
    assert torch.equal(everything(one.val)[0], everything(other.val)[0])
    train = {row.numpy().tobytes() for row in everything(one.train)[0]}
    assert not any(row.numpy().tobytes() in train for row in everything(one.val)[0])


def test_a_split_without_validation_samples_is_refused():
    with pytest.raises(UserError, match=r"data\.val_fraction: 0\.0001 of 1797 samples leaves 1797"):
        Digits(val_fraction=0.0001).load(seed=0)


# IDX files


def write_idx(folder, name, array, packed=False):
    array = np.asarray(array, dtype=np.uint8)
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    contents = header + array.tobytes()
    (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(contents) if packed else contents)


@pytest.fixture(params=[False, True], ids=["plain", "gz"])
def mnist_folder(request, tmp_path):
    rng = np.random.default_rng(0)
    for prefix, num in (("train", 20), ("t10k", 7)):
        write_idx(tmp_path, f"{prefix}-images-idx3-ubyte", rng.integers(0, 256, (num, 28, 28)), request.param)
        write_idx(tmp_path, f"{prefix}-labels-idx1-ubyte", np.arange(num) % 10, request.param)
    return tmp_path


@pytest.mark.parametrize("section", [Mnist, FashionMnist])
def test_idx_files(mnist_folder, section):
    source = section(path=str(mnist_folder)).load(seed=0)
    assert source.task == Task("classification", (1, 28, 28), 10)
    assert (len(source.train), len(source.val)) == (20, 7)
    inputs, targets = everything(source.train)
    expected = np.random.default_rng(0).integers(0, 256, (20, 28, 28)) / 255
    expected = (expected - section.mean[0]) / section.std[0]
    np.testing.assert_allclose(inputs[:, 0].numpy(), expected, atol=1e-6)  # float32, values up to 3
    assert targets.tolist() == [i % 10 for i in range(20)]


def test_only_the_first_images(mnist_folder):
    source = Mnist(path=str(mnist_folder), num_train=5).load(seed=0)
    assert (len(source.train), len(source.val)) == (5, 7)
    with pytest.raises(UserError, match=r"data\.num_train: 21 samples asked for, the training set has 20"):
        Mnist(path=str(mnist_folder), num_train=21).load(seed=0)


def test_augmentation_leaves_validation_alone(mnist_folder):
    source = FashionMnist(path=str(mnist_folder), augment="crop_flip").load(seed=0)
    plain = FashionMnist(path=str(mnist_folder)).load(seed=0)
    assert not torch.equal(everything(source.train)[0], everything(plain.train)[0])
    assert torch.equal(everything(source.val)[0], everything(plain.val)[0])


def cut(folder, name, change):
    """Rewrite a file, packed or not; `change` gets the bytes as they lie on disk."""
    file = next(folder.glob(name + "*"))
    file.write_bytes(change(file.read_bytes()))
    return file


def test_a_missing_idx_file(mnist_folder):
    next(mnist_folder.glob("t10k-labels*")).unlink()
    with pytest.raises(UserError, match=r"data\.path: no file 't10k-labels-idx1-ubyte' \(nor '.*\.gz'\) in '"):
        Mnist(path=str(mnist_folder)).load(seed=0)
    with pytest.raises(UserError, match=r"data\.path: nothing lies at '.*nowhere'"):
        Mnist(path=str(mnist_folder / "nowhere")).load(seed=0)


@pytest.mark.parametrize("mnist_folder", [True], indirect=True)
@pytest.mark.parametrize(
    "change",
    [
        lambda b: b[:100],
        lambda b: b[:-4],
        lambda b: b"not gzip",
        lambda b: b[:60] + bytes(40) + b[100:],
        lambda b: b"",
    ],
    ids=["short", "no checksum", "not gzip", "corrupt", "empty"],
)
def test_a_broken_gzip_file_is_named(mnist_folder, change):
    cut(mnist_folder, "train-images", change)
    with pytest.raises(UserError, match=r"data\.path: '.*train-images-idx3-ubyte\.gz' "):
        Mnist(path=str(mnist_folder)).load(seed=0)


@pytest.mark.parametrize("mnist_folder", [False], indirect=True)
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("train-images", lambda b: b[:-1], r"announces 20 x 28 x 28 values and should have 15696 bytes, it has 15695"),
        ("train-images", lambda b: b + b"x", r"should have 15696 bytes, it has 15697"),
        ("train-images", lambda b: b[:10], r"bytes, it has 10"),
        (
            "train-images",
            lambda b: b"\x00\x00\x0d\x03" + b[4:],
            r"should begin with the number 2051, it begins with 3331",
        ),
        ("train-labels", lambda b: b"", r"should begin with the number 2049"),
        ("train-labels", lambda b: b[:-1] + b"\x0a", r"should hold labels 0 to 9, it holds 10"),
        ("t10k-labels", lambda b: b"\x00\x00\x08\x01\x00\x00\x00\x02\x01\x01", r"holds 7 images, but '.*' 2 labels"),
        ("t10k-labels", lambda b: b"\x00\x00\x08\x01\x00\x00\x00\x00", r"announces 0 values"),
    ],
)
def test_a_wrong_idx_file_is_named_with_what_it_holds(mnist_folder, name, change, message):
    cut(mnist_folder, name, change)
    with pytest.raises(UserError, match=message):
        Mnist(path=str(mnist_folder)).load(seed=0)


def test_images_of_another_size_are_refused(mnist_folder):
    next(mnist_folder.glob("t10k-images*")).unlink()
    write_idx(mnist_folder, "t10k-images-idx3-ubyte", np.zeros((7, 32, 28)))
    with pytest.raises(UserError, match="should hold images of 28 x 28 pixels, it says 32 x 28"):
        Mnist(path=str(mnist_folder)).load(seed=0)


def test_real_fashion_mnist(data_folder):
    if not (data_folder / "fashion_mnist").is_dir():
        pytest.skip("no fashion_mnist in LARGEBATCH_DATA")
    source = FashionMnist(path=str(data_folder / "fashion_mnist")).load(seed=0)
    assert (len(source.train), len(source.val)) == (60_000, 10_000)
    inputs, targets = batch(source.train, range(0, 60_000, 10))
    assert abs(inputs.mean()) < 0.02 and abs(inputs.std() - 1) < 0.02  # the constants are those of the training set
    assert (torch.bincount(targets) > 500).all()


# CIFAR-10


@pytest.fixture
def cifar_folder(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        records = rng.integers(0, 256, (4, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        (folder / name).write_bytes(records.tobytes())
    return tmp_path


@pytest.mark.parametrize("inside", [False, True])
def test_cifar10(cifar_folder, inside):
    folder = cifar_folder / "cifar-10-batches-bin"
    source = Cifar10(path=str(folder if inside else cifar_folder), augment="none").load(seed=0)
    assert source.task == Task("classification", (3, 32, 32), 10)
    assert (len(source.train), len(source.val)) == (20, 4)
    record = np.frombuffer((folder / "data_batch_3.bin").read_bytes(), np.uint8).reshape(4, 3073)[1]
    inputs, targets = batch(source.train, [9])
    assert targets.item() == record[0]
    # The file's order: 1024 red, 1024 green, 1024 blue pixels, row by row.
    blue_5_7 = (record[1 + 2 * 1024 + 5 * 32 + 7] / 255 - 0.4465) / 0.2616
    assert inputs[0, 2, 5, 7].item() == pytest.approx(blue_5_7, abs=1e-6)


def test_cifar10_is_augmented_by_default(cifar_folder):
    source = Cifar10(path=str(cifar_folder)).load(seed=0)
    assert not torch.equal(everything(source.train)[0], batch(source.train, range(20), epoch=1)[0])


def test_wrong_cifar10_files(cifar_folder):
    file = cifar_folder / "cifar-10-batches-bin" / "data_batch_2.bin"
    contents = file.read_bytes()
    file.write_bytes(contents[:-3])
    with pytest.raises(
        UserError, match=r"data_batch_2\.bin' should be made of records of 3073 bytes, it has 12289 bytes"
    ):
        Cifar10(path=str(cifar_folder)).load(seed=0)
    file.write_bytes(b"\x63" + contents[1:])
    with pytest.raises(UserError, match="should hold labels 0 to 9, it holds 99"):
        Cifar10(path=str(cifar_folder)).load(seed=0)
    file.unlink()
    with pytest.raises(UserError, match=r"data\.path: no file 'data_batch_2\.bin' in '"):
        Cifar10(path=str(cifar_folder)).load(seed=0)


# text


def test_text(tmp_path):
    file = tmp_path / "input.txt"
    file.write_bytes(bytes(range(256)) * 4)
    source = Text(path=str(file), context=9, val_fraction=0.25).load(seed=0)
    assert source.task == Task("language_modeling", (9,), 256)
    assert (len(source.train), len(source.val)) == (76, 26)  # 1024 bytes are 102 windows of 10
    inputs, targets = batch(source.train, [0, 30])
    assert inputs.dtype == targets.dtype == torch.int64 and inputs.shape == targets.shape == (2, 9)
    assert inputs[1].tolist() == [(300 + i) % 256 for i in range(9)]
    assert targets[1].tolist() == [(301 + i) % 256 for i in range(9)]
    assert batch(source.val, [0])[0][0, 0].item() == 760 % 256


def test_wrong_text_files(tmp_path):
    with pytest.raises(UserError, match=r"data\.path: nothing lies at"):
        Text(path=str(tmp_path / "missing.txt")).load(seed=0)
    with pytest.raises(UserError, match=r"should be a text file, it is a folder"):
        Text(path=str(tmp_path)).load(seed=0)
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(UserError, match=r"should be a text file, it is a pipe or device"):
        Text(path=str(tmp_path / "pipe.txt")).load(seed=0)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match=r"has 0 bytes; a context of 128 needs 258 or more"):
        Text(path=str(tmp_path / "empty.txt")).load(seed=0)
    (tmp_path / "short.txt").write_bytes(b"hello")
    with pytest.raises(UserError, match=r"has 5 bytes; a context of 128 needs 258 or more"):
        Text(path=str(tmp_path / "short.txt")).load(seed=0)


def _own_memory():
    """Memory of this process that is no file's, bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


def test_a_text_is_mapped_and_not_read(tmp_path):
    file = tmp_path / "large.txt"
    file.write_bytes(bytes(range(256)) * 2**18)  # 64 MiB
    before = _own_memory()
    source = Text(path=str(file), context=127).load(seed=0)
    for start in range(0, len(source.train), 4096):
        batch(source.train, range(start, min(start + 4096, len(source.train))))
    assert _own_memory() - before < 2**24
    copy = pickle.loads(pickle.dumps(source.train))  # as a worker that is not forked gets it
    assert len(pickle.dumps(source.train)) < 1000 and torch.equal(
        batch(copy, [5, 99])[0], batch(source.train, [5, 99])[0]
    )


def test_a_text_that_is_shortened_is_told_of(tmp_path):
    """The kernel ends a process that reads a page which is gone."""
    file = tmp_path / "input.txt"
    file.write_bytes(bytes(range(256)) * 256)
    train = Text(path=str(file), context=9).load(seed=0).train
    with file.open("ab") as appended:
        appended.write(b"more")
    assert batch(train, [0])[0].tolist() == [list(range(9))]
    file.write_bytes(b"short")
    with pytest.raises(
        UserError, match=r"input\.txt' was shortened from 65,536 to 5 bytes while the run was reading it"
    ):
        batch(train, [0])


def test_real_text(data_folder):
    file = data_folder / "tinyshakespeare" / "input.txt"
    if not file.is_file():
        pytest.skip("no tinyshakespeare in LARGEBATCH_DATA")
    source = Text(path=str(file), context=64).load(seed=0)
    assert bytes(batch(source.train, [0])[0][0].tolist()).startswith(b"First Citizen:")


# synthetic images


def test_synthetic_images_of_imagenet_size_take_no_memory():
    source = SyntheticImages(shape=(3, 224, 224), num_classes=1000, num_samples=1_281_167, num_val=50_000).load(seed=0)
    assert (len(source.train), len(source.val)) == (1_281_167, 50_000)
    inputs, targets = batch(source.train, [0, 1_281_166])
    assert inputs.shape == (2, 3, 224, 224) and targets.tolist() == [0, 166]


def test_synthetic_images_are_a_function_of_seed_and_index():
    source = SyntheticImages(shape=(1, 12, 10), num_classes=3, num_samples=50).load(seed=4)
    inputs, targets = everything(source.train)
    again = SyntheticImages(shape=(1, 12, 10), num_classes=3, num_samples=50).load(seed=4)
    assert torch.equal(batch(again.train, [17], epoch=5)[0][0], inputs[17])
    assert torch.equal(targets, torch.arange(50) % 3)
    other = SyntheticImages(shape=(1, 12, 10), num_classes=3, num_samples=50).load(seed=5)
    assert not torch.equal(everything(other.train)[0], inputs)
    assert not torch.equal(batch(source.val, [0])[0][0], inputs[50 % 3])


def test_synthetic_noise_is_standard_normal_and_classes_are_learnable():
    source = SyntheticImages(shape=(2, 8, 8), num_classes=4, num_samples=4000, noise=2.0).load(seed=0)
    inputs, targets = everything(source.train)
    means = torch.stack([inputs[targets == label].mean(0) for label in range(4)])
    noise = inputs - means[targets]
    assert abs(noise.std().item() - 2.0) < 0.02
    # Neighbouring samples' noise: 128 numbers each, correlations of about 1/sqrt(128) that average out.
    assert abs((noise[1:].flatten(1) * noise[:-1].flatten(1)).mean().item() / 4) < 0.01
    val_inputs, val_targets = everything(source.val)
    nearest = torch.cdist(val_inputs.flatten(1), means.flatten(1)).argmin(1)
    assert (nearest == val_targets).float().mean() > 0.95


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
