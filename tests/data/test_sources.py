"""Every source: what comes out of it, and what a missing or broken file says."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
import torch
from samples import (
    batch,
    everything,
    mnist_folder,  # noqa: F401
    write_idx,
)

from largebatch.data import (
    Cifar10,
    Digits,
    FashionMnist,
    Mnist,
    SyntheticImages,
    Text,
)
from largebatch.errors import UserError
from largebatch.task import Task

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
