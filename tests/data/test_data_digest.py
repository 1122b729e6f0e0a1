"""What tells one data set from another, and what a run says that is resumed on another one."""

import json
import os
import shutil
import time

import numpy as np
import pytest
import torch
from runs import digits

from largebatch.checkpoint.folder import STATE, CheckpointFolder
from largebatch.data import ImageFolder, Source, TensorSamples, Text, changed_parts, digest
from largebatch.data.digest import _digest_of_tensor
from largebatch.data.factory import MapSamples
from largebatch.data.workers import LoaderConfig
from largebatch.distributed import Ranks
from largebatch.errors import UserError
from largebatch.task import Task
from largebatch.training.run import train

TASK = Task("classification", (4,), 3)


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr("largebatch.reporting.plots.plot_run", lambda *_: None)


def of(samples):
    """Return the digest of a set, as state.json holds it."""
    val = TensorSamples(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64))
    return json.loads(json.dumps(digest(Source(samples, val, TASK), LoaderConfig())))


def changes(ours, theirs):
    found = changed_parts(of(ours), of(theirs))
    assert found == changed_parts(of(theirs), of(ours))
    return found


def numbers(num=5000, kind=torch.float64):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(num, 4, generator=generator, dtype=torch.float64)
    return TensorSamples(
        inputs.to(kind) if kind.is_floating_point else (inputs * 50).to(kind),
        torch.randint(3, (num,), generator=generator),
    )


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16, torch.uint8, torch.int64])
def test_one_exchanged_sample_in_memory_is_seen(kind):
    whole = numbers(kind=kind)
    assert changes(whole, numbers(kind=kind)) == []
    for place in (0, 1, 2500, 4999):
        inputs = whole.inputs.clone()
        inputs[place] = inputs[(place + 7) % 5000]
        part = "values" if kind.is_floating_point else "bytes"
        assert changes(whole, TensorSamples(inputs, whole.targets)) == [f"train.inputs.{part}"], place
    order = torch.arange(5000)
    order[[10, 11]] = order[[11, 10]]
    assert "train.inputs" in changes(whole, TensorSamples(whole.inputs[order], whole.targets))[0]
    targets = whole.targets.clone()
    targets[77] = 2 - targets[77]
    if int(targets[77]) != int(whole.targets[77]):
        assert changes(whole, TensorSamples(whole.inputs, targets)) == ["train.targets.bytes"]


def test_last_digits_are_no_other_data():
    whole = numbers()
    noise = 1 + 1e-7 * torch.randn(5000, 4, dtype=torch.float64)
    assert changes(whole, TensorSamples(whole.inputs * noise, whole.targets)) == []
    assert changes(whole, TensorSamples(whole.inputs.float(), whole.targets)) == ["train.inputs.shape"]


def test_odd_tensors_have_a_digest():
    empty = torch.zeros(3, 0)
    for inputs in (empty, torch.full((3, 2), float("nan")), torch.tensor([[float("inf")]] * 3), torch.zeros(2, 3).T):
        samples = TensorSamples(inputs, torch.arange(3))
        assert changes(samples, samples) == []
    first = torch.ones(3, 2)
    assert changes(TensorSamples(first, torch.arange(3)), TensorSamples(first[:, ::2], torch.arange(3)))


def test_a_text_of_the_same_length_is_another(tmp_path):
    file = tmp_path / "text"
    contents = bytearray(np.random.default_rng(0).integers(97, 122, 40_000, dtype=np.uint8).tobytes())
    file.write_bytes(contents)
    one = digest(Text(path=str(file)).load(0), LoaderConfig())
    contents[20_000] ^= 1
    file.write_bytes(contents)
    two = digest(Text(path=str(file)).load(0), LoaderConfig())
    assert changed_parts(one, two) == ["train.windows.bytes"]


class Listed:
    """A set of the user's own: ``samples[place]``."""

    def __init__(self, samples, seconds=0.0):
        self.samples, self.seconds, self.asked = samples, seconds, []

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        time.sleep(self.seconds)
        self.asked.append(index)
        return self.samples[index]


def pairs(num=100, **keys):
    generator = torch.Generator().manual_seed(1)
    return Listed([(torch.randn(4, generator=generator), index % 3) for index in range(num)], **keys)


def test_a_set_of_the_users_own_is_read_in_a_few_places():
    first, shuffled = pairs(), pairs()
    shuffled.samples = shuffled.samples[1:] + shuffled.samples[:1]
    assert changes(MapSamples(first, 0), MapSamples(pairs(), 0)) == []
    assert changes(MapSamples(first, 0), MapSamples(shuffled, 0)) == ["train.samples_read"]
    assert len(set(first.asked)) == 16 and {0, 99} <= set(first.asked)
    assert changes(MapSamples(pairs(7), 0), MapSamples(pairs(7), 0)) == []

    class Drawing(Listed):
        def __getitem__(self, index):
            return self.samples[index][0] + float(np.random.default_rng().normal()), self.samples[index][1]

    known = of(MapSamples(Drawing(pairs().samples), 0))["train"]
    assert "samples_read" not in known and known["shape"] == "float32 [4], int64 []"


def test_slow_samples_cost_a_second():
    slow = pairs(seconds=0.2)
    started = time.monotonic()
    assert changes(MapSamples(slow, 0), MapSamples(pairs(), 0)) == []
    assert time.monotonic() - started < 2 * 1.0 + 2 * 0.8
    assert {0, 99} & set(slow.asked) and len(set(slow.asked)) < 8


def test_samples_of_many_sizes_are_looked_at_one_by_one():
    ragged = Listed([(torch.ones(1 + index % 5), index % 3) for index in range(40)])
    known = of(MapSamples(ragged, 0))["train"]
    assert "shape" not in known and len(known["samples_read"]) == 16


@pytest.fixture
def photos(tmp_path):
    """Twelve photographs in two classes, another four to validate on."""
    image = pytest.importorskip("PIL.Image")
    folder, generator = tmp_path / "photos", np.random.default_rng(0)
    for half, num in (("train", 6), ("val", 2)):
        for label, name in enumerate(("cat", "dog")):
            (folder / half / name).mkdir(parents=True)
            for number in range(num):
                pixels = generator.integers(0, 100, (16, 16, 3), dtype=np.uint8) + 120 * label
                image.fromarray(pixels.astype(np.uint8)).save(folder / half / name / f"{number}.png")
    return folder


def exchange(folder):
    """Put another photograph in the place of one."""
    shutil.copyfile(folder / "train" / "dog" / "1.png", folder / "train" / "cat" / "3.png")


def rename(folder):
    """Exchange the names of the two classes, whose files are named alike."""
    for half in ("train", "val"):
        for old, new in (("cat", "other"), ("dog", "cat"), ("other", "dog")):
            (folder / half / old).rename(folder / half / new)


def rename_one(folder):
    for half in ("train", "val"):
        (folder / half / "cat").rename(folder / half / "elk")


def rename_file(folder):
    (folder / "train" / "cat" / "3.png").rename(folder / "train" / "cat" / "9.png")


def move_file(folder):
    (folder / "train" / "cat" / "3.png").rename(folder / "train" / "dog" / "7.png")


def exchange_val(folder):
    shutil.copyfile(folder / "val" / "dog" / "1.png", folder / "val" / "cat" / "0.png")


def edit_in_place(folder):
    """Change a byte and neither length nor name."""
    file = folder / "train" / "cat" / "2.png"
    contents = bytearray(file.read_bytes())
    contents[-1] ^= 255
    file.write_bytes(contents)


CHANGES = {
    exchange: ["train.file_contents"],
    edit_in_place: ["train.file_contents"],
    rename: ["train.file_contents", "val.file_contents"],
    rename_one: ["train.files.bytes", "val.files.bytes"],
    rename_file: ["train.files.bytes"],
    move_file: ["train.files.bytes", "train.labels.bytes"],
    exchange_val: ["val.file_contents"],
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_other_photographs_are_seen(change, photos):
    def known():
        return digest(ImageFolder(path=str(photos), image_size=8).load(0), LoaderConfig())

    before = known()
    assert changed_parts(before, known()) == []
    for file in photos.rglob("*.png"):
        os.utime(file, (0, 0))  # copied elsewhere, at another time
    shutil.copytree(photos, photos.with_name("copy"))
    copy = digest(ImageFolder(path=str(photos.with_name("copy")), image_size=8).load(0), LoaderConfig())
    assert changed_parts(before, copy) == []
    change(photos)
    assert set(CHANGES[change]) <= set(changed_parts(before, known()))


def on_photos(photos, **changed):
    flags = {"data.name": "image_folder", "data.path": str(photos), "data.image_size": 8, "batch.reference_size": 4,
             "batch.size": 4, "model.hidden": [4], "schedule.epochs": 2, "warmup.name": "none", "warmup.epochs": 0.0,
             "checkpoint.every_epochs": 1, "checkpoint.every_minutes": None, "checkpoint.keep_last": 9}  # fmt: skip
    return digits(**{**flags, **changed})


def begin(photos, folder):
    """Train a run, and leave it as if it had been stopped in its middle."""
    train(on_photos(photos), folder, ranks=Ranks())
    saved = CheckpointFolder(folder / "checkpoints").saved()
    for path in saved[1:]:
        shutil.rmtree(path)
    return saved[0]


@pytest.mark.parametrize("change", [exchange, rename])
def test_a_run_is_not_resumed_on_other_photographs(change, photos, tmp_path, capsys):
    from rich.console import Console

    folder = tmp_path / "run"
    middle = begin(photos, folder)
    change(photos)
    with pytest.raises(UserError) as raised:
        train(on_photos(photos), folder, ranks=Ranks(), resume="auto")
    line = f"--resume: {middle} was written with other data, which differs in train.file_"
    assert str(raised.value).startswith(line) and "--checkpoint.same_data false" in str(raised.value)
    changed = on_photos(photos, **{"checkpoint.same_data": False})
    train(changed, folder, console=Console(width=300), ranks=Ranks(), resume="auto")
    assert f"warning: {middle} was written with other data, which differs in" in capsys.readouterr().out
    # What is written from there has the new data, on which the run goes on without a word.
    again = on_photos(photos, **{"schedule.epochs": 2})
    assert train(again, folder, ranks=Ranks(), resume="auto").summary.status == "finished"


def test_a_checkpoint_without_a_digest_is_resumed(photos, tmp_path):
    """As those that were written before there was one."""
    from resumed import rewrite

    middle = begin(photos, tmp_path / "run")
    state = json.loads((middle / STATE).read_text())
    assert (
        changed_parts(state.pop("data"), digest(ImageFolder(path=str(photos), image_size=8).load(0), LoaderConfig()))
        == []
    )
    rewrite(middle, STATE, json.dumps(state).encode())
    exchange(photos)
    assert train(on_photos(photos), tmp_path / "run", ranks=Ranks(), resume="auto").summary.status == "finished"


def test_junk_for_a_digest_is_one_line_or_passed_over():
    known = of(numbers(100))
    for junk in (
        None,
        [],
        "x",
        {"train": 3},
        {"train": {"inputs": {"values": "x"}}},
        {"train": {"inputs": {"values": [None]}}},
    ):
        assert isinstance(changed_parts(known, junk), list)


def test_columns_of_a_table_are_hashed_where_they_lie():
    """A single row counts as contiguous whatever its strides."""
    table = torch.arange(64 * 7).reshape(64, 7)
    for column in (table[:, 6], table.t()[6], table.flatten()[6::7]):
        found, plain = (_digest_of_tensor(c) for c in (column, column.clone()))
        assert found == plain
    assert _digest_of_tensor(table[1::2, 2]) != _digest_of_tensor(table[::2, 2])
