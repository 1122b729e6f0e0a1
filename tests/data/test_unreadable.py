"""Photographs that cannot be read: left out as if they had never been, or the run saved and stopped; at the start, what is none."""

import os
import shutil
import socket

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from jobs import assert_same_run, rows, summary, weights

from largebatch.checkpoint.folder import CheckpointFolder, read_state
from largebatch.cli import main
from largebatch.config.file import parse_config
from largebatch.data import ImageFolder
from largebatch.data.sampler import SampleKeys, global_batch
from largebatch.data.source import readable
from largebatch.distributed import Ranks
from largebatch.distributed.state import read_tensors, tensor_metadata
from largebatch.errors import UnreadableError, UserError
from largebatch.training.run import build_model, train

NUM_TRAIN, NUM_VAL, BATCH = 26, 8, 8
# An update of 8 each: of the second a whole micro-batch of 2 is missing, of the third one sample.
BROKEN = [int(i) for i in global_batch(0, NUM_TRAIN, 8, 8).indices[2:4]] + [
    int(global_batch(0, NUM_TRAIN, 16, 8).indices[7])
]


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr("largebatch.reporting.plots.plot_run", lambda *_: None)


def files_of(root, half):
    samples = getattr(ImageFolder(path=str(root), image_size=8, augment=False).load(seed=0), half)
    return [samples.root / os.fsdecode(name) for name in samples.files]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    from PIL import Image

    root, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for half, count in (("train", NUM_TRAIN // 2), ("val", NUM_VAL // 2)):
        for name in ("cat", "dog"):
            (root / half / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (10, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / half / name / f"{number:02d}.png")
    return root


@pytest.fixture
def broken(whole, tmp_path):
    """A copy of the folder with three training files and one of validation that cannot be read."""
    root = tmp_path / "photographs"
    shutil.copytree(whole, root)
    files = files_of(root, "train")
    files[BROKEN[0]].write_bytes(files[BROKEN[0]].read_bytes()[:100])
    files[BROKEN[1]].write_bytes(b"hello")
    files[BROKEN[2]].write_bytes(b"")
    files_of(root, "val")[3].write_bytes(b"no")
    return root


def photographs(root, **flags):
    values = {
        "data": {"name": "image_folder", "path": str(root), "image_size": 8, "augment": False},
        "model": {"name": "mlp", "hidden": [6]},
        "batch": {"reference_size": 4, "size": BATCH},
        "optimizer": {"name": "sgd", "lr": 0.02, "momentum": 0.9},
        "schedule": {"name": "constant", "epochs": 2},
        "evaluate": {"every_epochs": 1, "batch_size": 3},
        "log": {"every_updates": 1},
        "precision": "fp64",
        "backend": {"device": "cpu"},
    }
    for key, value in flags.items():
        section, _, name = key.rpartition(".")
        if name == "name" and values[section].get("name") != value:
            values[section] = {}
        if section:
            values.setdefault(section, {})[name] = value
        else:
            values[name] = value
    return parse_config(values)


SKIP = {"data.corrupt": "skip"}
OTHER = {"checkpoint.same_data": False}  # a file that was put back is other data


def _train_on_rank(rank, world_size, run, folder, resume):
    try:
        return train(run, folder, ranks=Ranks(rank, rank, world_size), resume=resume).summary
    except UserError as error:
        return error


def result_of(run, folder, world_size, rank_pool, resume="never"):
    if world_size == 1:
        return _train_on_rank(0, 1, run, folder, resume)
    results = rank_pool(world_size, _train_on_rank, run, folder, resume)
    assert len({str(result) if isinstance(result, UserError) else result.status for result in results}) == 1
    return results[0]


def by_hand(whole, run):
    """Train in a loop written out, on the samples that can be read; return losses of updates, validation, and weights."""
    source = ImageFolder(path=str(whole), image_size=8, augment=False).load(seed=0)
    model = build_model(run, source.task).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02 * 2, momentum=0.9)
    val = [i for i in range(NUM_VAL) if i != 3]
    losses, evaluations = [], []
    seen = 0
    while seen < 2 * NUM_TRAIN:
        size = min(BATCH, 2 * NUM_TRAIN - seen)
        keys = global_batch(0, NUM_TRAIN, seen, size)
        kept = np.array([i for i in keys.indices if i not in BROKEN])
        inputs, labels = source.train.__getitems__(SampleKeys(np.zeros_like(kept), kept))
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * size / 4
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs.double()), labels)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        seen += size
        if seen // NUM_TRAIN > (seen - size) // NUM_TRAIN:
            with torch.no_grad():
                inputs, labels = source.val.__getitems__(SampleKeys(np.zeros(len(val), dtype=np.int64), np.array(val)))
                outputs = model(inputs.double())
                evaluations.append(
                    (float(F.cross_entropy(outputs, labels)), float((outputs.argmax(1) == labels).double().mean()))
                )
    return losses, evaluations, model.state_dict()


CASES = {
    "one process": (1, {}),
    "a micro-batch without samples": (1, {"batch.micro_size": 2}),
    "workers": (1, {"batch.micro_size": 2, "loader.num_workers": 2}),
    "two ranks": (2, {}),
    "two ranks, a micro-batch without samples": (2, {"batch.micro_size": 1}),
    "three ranks, a rank without samples": (3, {}),
    "four ranks, a rank without samples": (4, {}),
    "fsdp": (2, {"backend.name": "fsdp", "batch.micro_size": 1}),
    "squares that are measured": (2, {"noise.measure": True, "batch.micro_size": 1}),
    "squares of samples that are measured": (2, {"noise.measure": True, "noise.per": "sample", "batch.micro_size": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_skipped_photograph_has_no_weight(case, whole, broken, tmp_path, rank_pool):
    """Weights, losses and scores are those of a loop over the others, divided by their number, in their order."""
    world_size, flags = CASES[case]
    run = photographs(broken, **SKIP, **flags)
    result = result_of(run, tmp_path / "run", world_size, rank_pool)
    losses, evaluations, expected = by_hand(whole, run)
    found = rows(tmp_path / "run")
    assert [row["loss"] for row in found if "loss" in row] == pytest.approx(losses, abs=1e-12)
    scores = [(row["val_loss"], row["val_accuracy"]) for row in found if "val_loss" in row]
    assert np.allclose(scores, evaluations, rtol=0, atol=1e-12) and len(scores) == 2
    for name, value in weights(tmp_path / "run").items():
        assert torch.allclose(value, expected[name], rtol=0, atol=1e-12), name
    events = [row["event"] for row in found if "event" in row]
    told = [event for event in events if event.startswith("left out, ")]
    # Each once: in its first epoch.
    assert len(told) == 3 and "left out, 2 in all: image '" in told[0] and "left out, 4 in all" in told[2]
    files = [*(files_of(broken, "train")[i] for i in BROKEN), files_of(broken, "val")[3]]
    assert all(sum(str(file) in event for event in told) == 1 for file in files)
    assert len(result.unreadable) == len(summary(tmp_path / "run")["unreadable"]) == 4
    assert [row.get("unreadable") for row in found if "loss" in row][:4] == [None, 2, 3, 3]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_skipped_photograph_has_no_weight_under_zero(stage, whole, broken, tmp_path, rank_pool):
    pytest.importorskip("deepspeed")
    flags = {"precision": "fp32", "backend.name": "deepspeed", "backend.zero_stage": stage, "batch.micro_size": 1}
    run = photographs(broken, **SKIP, **flags)
    result_of(run, tmp_path / "run", 2, rank_pool)
    losses, evaluations, expected = by_hand(whole, run)
    found = rows(tmp_path / "run")
    # float32: 24 bits, over 7 updates.
    assert [row["loss"] for row in found if "loss" in row] == pytest.approx(losses, rel=1e-5)
    assert [row["val_loss"] for row in found if "val_loss" in row] == pytest.approx(
        [loss for loss, _ in evaluations], rel=1e-5
    )
    for name, value in weights(tmp_path / "run").items():
        assert torch.allclose(value.double(), expected[name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("second_moment", ["micro_batch", "sample"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_second_moments_are_those_of_the_samples_that_are_left(
    second_moment, world_size, whole, broken, tmp_path, rank_pool
):
    """Adam's second moment after one update against its formula, with units of the sizes that came."""
    files = files_of(broken, "train")
    order = global_batch(0, NUM_TRAIN, 0, BATCH).indices
    for file, good in zip(files, files_of(whole, "train"), strict=True):
        shutil.copy(good, file)
    for place in (0, 4, 5):  # of micro-batches of two the first is halved, the third gone
        files[order[place]].write_bytes(b"")
    flags = {"optimizer.name": "adamw", "optimizer.lr": 1e-3, "optimizer.second_moment": second_moment, "batch.micro_size": 2,
             "schedule.epochs": BATCH / NUM_TRAIN, "optimizer.betas": [0.9, 0.99], "optimizer.max_grad_norm": 0.05,
             "scaling.beta2": "keep"}  # fmt: skip
    if second_moment == "sample":
        flags["optimizer.squares_samples"] = "all"
    run = photographs(broken, **SKIP, **flags)
    result_of(run, tmp_path / "run", world_size, rank_pool)

    source = ImageFolder(path=str(whole), image_size=8, augment=False).load(seed=0)
    model = build_model(run, source.task).double()
    pieces = [[order[1]], order[2:4], order[6:8]]
    if second_moment == "sample":
        pieces = [[index] for piece in pieces for index in piece]
    total = 5
    summands = []
    for piece in pieces:
        piece = np.array(piece)
        inputs, labels = source.train.__getitems__(SampleKeys(np.zeros_like(piece), piece))
        loss = F.cross_entropy(model(inputs.double()), labels, reduction="sum") / total
        summands.append(torch.autograd.grad(loss, list(model.parameters())))
    n = total**2 / sum(len(piece) ** 2 for piece in pieces)
    (path,) = CheckpointFolder(tmp_path / "run" / "checkpoints").saved()
    saved = read_tensors(path, tensor_metadata(path))
    kappa = total / 4
    a = (kappa - 1) / (n - 1)
    moments = []
    for parts in zip(*summands, strict=True):
        ghat, q = sum(parts), n * sum(part.square() for part in parts)
        moments.append((1 - a) * ghat.square() + a * q)
    clip = min(1.0, 0.05 / float(sum(moment.sum() for moment in moments)) ** 0.5)
    assert clip < 1  # to 1e-6 of the norm, which keeps a division by zero away
    for (name, _), moment, parts in zip(model.named_parameters(), moments, zip(*summands, strict=True), strict=True):
        got = saved[f"optimizer.{name}.exp_avg_sq"]
        floor = sum(parts).square() / kappa  # what a second moment may not fall below
        assert torch.allclose(got, 0.01 * clip**2 * torch.maximum(moment, floor), rtol=2e-6, atol=0), name
        assert torch.allclose(saved[f"optimizer.{name}.exp_avg"], 0.1 * clip * sum(parts), rtol=2e-6, atol=0), name


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_photograph_that_stops_the_run_costs_nothing(world_size, whole, broken, tmp_path, rank_pool):
    """The state before the update is saved; with the file back, or left out, the run is the one that never stopped."""
    expected = {}
    for name, root, flags in (("whole", whole, {}), ("skipped", broken, SKIP)):
        expected[name] = tmp_path / name
        result_of(photographs(root, **flags), expected[name], world_size, rank_pool)
    files, good = files_of(broken, "train"), files_of(whole, "train")
    stopped = tmp_path / "stopped"
    for number, again in enumerate(("never", "auto")):
        error = result_of(photographs(broken, **OTHER), stopped, world_size, rank_pool, again)
        assert isinstance(error, UnreadableError)
        assert f"everything up to update {number + 1} is in {stopped}" in str(error)
        assert "--data.corrupt skip, then continue with --resume auto --out" in str(error)
        named = [files[i] for i in ((BROKEN[0], BROKEN[1]) if number == 0 else (BROKEN[2],))]
        assert all(f"image '{file}' cannot be read" in str(error) for file in named)
        newest = CheckpointFolder(stopped / "checkpoints").saved()[-1]
        assert read_state(newest)["progress"]["samples_seen"] == 8 * (number + 1)
        if number == 0:
            shutil.copytree(stopped, tmp_path / "left out")
        for file in named:
            shutil.copy(good[files.index(file)], file)
    shutil.copy(good[BROKEN[2]], files[BROKEN[2]])
    shutil.copy(files_of(whole, "val")[3], files_of(broken, "val")[3])
    assert result_of(photographs(broken, **OTHER), stopped, world_size, rank_pool, "auto").status == "finished"
    assert_same_run(stopped, expected["whole"])
    for i in BROKEN:
        files[i].write_bytes(b"")
    files_of(broken, "val")[3].write_bytes(b"no")
    again = result_of(photographs(broken, **SKIP, **OTHER), tmp_path / "left out", world_size, rank_pool, "auto")
    assert again.status == "finished" and len(again.unreadable) == 4
    assert_same_run(tmp_path / "left out", expected["skipped"])


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_photograph_of_validation_that_stops_the_run_costs_nothing(world_size, whole, broken, tmp_path, rank_pool):
    """The evaluation that is owed comes first in the resumed run, at its end too."""
    for file, good in zip(files_of(broken, "train"), files_of(whole, "train"), strict=True):
        shutil.copy(good, file)
    result_of(photographs(whole), tmp_path / "whole", world_size, rank_pool)
    stopped, val = tmp_path / "stopped", files_of(broken, "val")[3]
    error = result_of(photographs(broken), stopped, world_size, rank_pool)
    assert (
        isinstance(error, UnreadableError)
        and "everything up to update 4 is in" in str(error)
        and str(val) in str(error)
    )
    shutil.copy(files_of(whole, "val")[3], val)
    assert result_of(photographs(broken, **OTHER), stopped, world_size, rank_pool, "auto").status == "finished"
    assert_same_run(stopped, tmp_path / "whole")

    val.write_bytes(b"")
    late = photographs(broken, **OTHER, **{"evaluate.every_epochs": 5})
    error = result_of(late, tmp_path / "late", world_size, rank_pool)
    assert "everything up to update 7 is in" in str(error)
    shutil.copy(files_of(whole, "val")[3], val)
    assert result_of(late, tmp_path / "late", world_size, rank_pool, "auto").status == "finished"
    assert summary(tmp_path / "late")["val_loss"] == summary(tmp_path / "whole")["val_loss"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_update_of_which_nothing_is_left_stops_the_run(world_size, broken, tmp_path, rank_pool):
    for file in files_of(broken, "train"):
        file.write_bytes(b"")
    error = result_of(photographs(broken, **SKIP), tmp_path / "run", world_size, rank_pool)
    assert "nothing is left of an update: image '" in str(error) and " and 3 more" in str(error)
    assert "everything up to update 0 is in" in str(error)


def test_a_resume_after_a_removal_says_what_it_will_do_and_does_it(broken, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(photographs(broken).model_dump(mode="json")))
    command = ["train", str(config), "--out", str(tmp_path / "run")]
    assert main(command) == 2
    assert "left out" not in capsys.readouterr().err
    for file in [files_of(broken, "train")[i] for i in BROKEN]:
        file.unlink()
    files_of(broken, "val")[3].unlink()
    assert main([*command, "--resume", "auto"]) == 2
    said = capsys.readouterr().err
    assert "26 training samples there, 23 here" in said and "--checkpoint.same_data false: an order of its own" in said
    assert main([*command, "--resume", "auto", "--checkpoint.same_data", "false"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "warning: continues on another data set: 26 training samples there, 23 here; an order of its own" in printed
    assert summary(tmp_path / "run")["samples"] == 2 * 23 and summary(tmp_path / "run")["status"] == "finished"
    # The updates after the first are those of the new order.
    samples = [row["samples"] for row in rows(tmp_path / "run") if "loss" in row]
    assert samples == [8, 16, 24, 32, 40, 46]


def test_what_is_named_like_a_photograph_and_is_none_is_left_out_at_the_start(whole, tmp_path, capsys):
    root = tmp_path / "photographs"
    shutil.copytree(whole, root)
    cat = root / "train" / "cat"
    for name in ("._3.png", ".hidden.JPG"):
        (cat / name).write_bytes(b"x")
    (cat / ".DS_Store").write_bytes(b"x")
    (cat / "notes.txt").write_bytes(b"x")
    (cat / "folder.png").mkdir()
    shutil.copy(cat / "00.png", cat / "folder.png" / "within.png")
    (root / "val" / "dog" / "empty.jpeg").mkdir()
    os.mkfifo(cat / "pipe.png")
    os.symlink("pipe.png", cat / "link to a pipe.png")
    listener = socket.socket(socket.AF_UNIX)
    os.chdir(cat)
    listener.bind("socket.png")
    os.chdir(tmp_path)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(photographs(root, **{"schedule.epochs": 0.5}).model_dump(mode="json")))
    assert main(["train", str(config), "--out", str(tmp_path / "run")]) == 0
    listener.close()
    printed = " ".join(capsys.readouterr().out.split())
    assert "26 training and 8 validation samples" in printed
    assert "none to read: 2 x folder, 2 x hidden file, 3 x pipe, socket or device" in printed


@pytest.mark.parametrize(("target", "why"), [("nowhere.png", "No such file"), ("zz.png", "Too many levels")])
def test_a_link_to_nothing_counts_and_cannot_be_read(target, why, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "photographs")
    (tmp_path / "photographs" / "train" / "cat" / "zz.png").symlink_to(target)
    train = ImageFolder(path=str(tmp_path / "photographs"), image_size=8).load(seed=0).train
    assert len(train) == NUM_TRAIN + 1
    indices = np.array([12, 13])
    *_, missing = train.__getitems__(SampleKeys(np.zeros_like(indices), indices))
    assert list(missing) == [1] and "zz.png' cannot be read (" in missing[1] and why in missing[1]


@pytest.mark.parametrize("missing", [{-1: "why"}, {2: "why"}, {"0": "why"}, {True: "why"}, [0]])
def test_what_a_data_set_says_of_its_rows_is_checked(missing):
    with pytest.raises(UserError, match=r"\{row: why\}"):
        readable((torch.zeros(2, 3), torch.zeros(2), missing))


def test_a_reason_may_be_anything():
    inputs, targets, missing = readable((torch.zeros(2, 3), torch.arange(2), {np.int64(0): ValueError("x"), 1: None}))
    assert missing == {0: "x", 1: "None"} and len(inputs) == len(targets) == 1
