"""Ranks that hold other configs, code, data, models or checkpoints: one line on each of them before anything can hang."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.distributed as dist
from runs import digits
from torch import nn

from largebatch.distributed import Meeting, Ranks
from largebatch.distributed import meeting as meeting_module
from largebatch.distributed.watch import name_ranks
from largebatch.errors import LostRankError, UserError
from largebatch.task import Task
from largebatch.training.agreement import difference, show_model, show_run
from largebatch.training.run import train

SHORT = {"schedule.epochs": 0.5, "warmup.name": "none", "warmup.epochs": 0.0}


def rank_here():
    return dist.get_rank() if dist.is_initialized() else 0


def said_by(rank, world_size, runs, folder, resume="never"):
    """Train, a config by rank; return what came of it."""
    try:
        train(runs[rank % len(runs)], folder, ranks=Ranks(rank, rank, world_size), resume=resume)
    except (ValueError, LostRankError) as error:
        return f"{type(error).__name__}: {error}"
    return "trained"


# What differs on the last rank, and how it is told.
CONFIGS = {
    "learning rate": ({"optimizer.lr": 0.03}, "optimizer.lr is 0.02 on rank 0, 0.03 on rank 1"),
    "seed": ({"seed": 7}, "seed is 0 on rank 0, 7 on rank 1"),
    "weight decay": ({"optimizer.weight_decay": 0.1}, "optimizer.weight_decay is 0.0 on rank 0, 0.1 on rank 1"),
    "batch size": ({"batch.size": 100}, "batch.size is 200 on rank 0, 100 on rank 1"),
    "batch size that does not fit": ({"batch.size": 10**6}, "batch.size is 200 on rank 0, 1,000,000 on rank 1"),
    "epochs": ({"schedule.epochs": 9}, "schedule.epochs is 0.5 on rank 0, 9.0 on rank 1"),
    "micro-batch": ({"batch.micro_size": 8}, "batch.micro_size is None on rank 0, 8 on rank 1"),
    "engine": ({"backend.name": "fsdp"}, "backend.name is ddp on rank 0, fsdp on rank 1"),
    "precision": ({"precision": "fp32"}, "precision is fp64 on rank 0, fp32 on rank 1"),
    "model": ({"model.hidden": [16]}, "model.hidden is [32] on rank 0, [16] on rank 1"),
    "evaluations": ({"evaluate.batch_size": 3}, "evaluate.batch_size is 50 on rank 0, 3 on rank 1"),
    "rows of the log": ({"log.every_updates": 2}, "log.every_updates is 1 on rank 0, 2 on rank 1"),
    "checkpoints": ({"checkpoint.every_epochs": 1}, "checkpoint.every_epochs is None on rank 0, 1.0 on rank 1"),
    "optimizer": ({"optimizer.name": "adamw", "optimizer.lr": 0.02}, "optimizer.name is sgd on rank 0, adamw on rank 1"),
    "time-out": ({"backend.timeout_seconds": 5}, "backend.timeout_seconds is 600.0 on rank 0, 5.0 on rank 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_another_config_on_a_rank_is_refused(name, rank_pool, tmp_path):
    changes, line = CONFIGS[name]
    said = rank_pool(2, said_by, [digits(**SHORT), digits(**{**SHORT, **changes})], tmp_path / "run")
    assert said[0] == said[1] and said[0].startswith("SharedError: the ranks were given different configs: ")
    assert line in said[0] and not (tmp_path / "run").exists()


def test_what_is_a_nodes_own_may_differ(rank_pool, tmp_path):
    """Where the data lies and who reads it there."""
    runs = [digits(**SHORT, **{"loader.prefetch": number}) for number in (2, 5)]
    assert rank_pool(2, said_by, runs, tmp_path / "run") == ["trained", "trained"]


def _resumes_alone(rank, world_size, folder):
    return said_by(rank, world_size, [digits(**SHORT)], folder, resume="auto" if rank == 0 else "never")


def test_one_rank_that_resumes_is_refused(rank_pool, tmp_path):
    said = rank_pool(2, _resumes_alone, tmp_path / "run")
    assert said[0] == said[1] and "--resume is given on rank 0, never on rank 1" in said[0]


def _resume_from_own_disk(rank, world_size, folders):
    """Each rank reads another file under the checkpoint's name, as if its node had a disk of its own."""
    from largebatch.training import run as run_module

    see = run_module.show_checkpoint
    run_module.show_checkpoint = lambda path: (
        {"checkpoint": {str(path): next(iter(see(folders[rank] / "checkpoints" / path.name)["checkpoint"].values()))}}
    )
    try:
        return said_by(rank, world_size, [digits(**SHORT)], folders[0], resume="auto")
    finally:
        run_module.show_checkpoint = see


def test_another_checkpoint_of_the_same_name_is_refused(rank_pool, tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder, rate in zip(folders, (0.02, 0.03), strict=True):
        train(digits(**SHORT, **{"optimizer.lr": rate}), folder, ranks=Ranks())
    said = rank_pool(2, _resume_from_own_disk, folders)
    assert (
        said[0] == said[1] and "--resume: the ranks see different checkpoints: rank 1 differs from rank 0 in" in said[0]
    )
    shutil.rmtree(folders[1] / "checkpoints")
    said = rank_pool(2, _resume_from_own_disk, folders)
    assert said[0] == said[1] and "SharedError: rank 1: --resume: " in said[0] and "is not there" in said[0]


class Rows(torch.utils.data.Dataset):
    """Rows of numbers, with what is wrong with them on rank 1 of two."""

    def __init__(self, num, wrong, first=0):
        generator = np.random.default_rng(5)
        self.inputs = torch.from_numpy(generator.normal(size=(num + first, 6)))[first:]
        self.targets = torch.from_numpy(generator.integers(0, 3, num + first))[first:]
        if rank_here() == 1:
            if wrong == "missing":
                self.inputs, self.targets = self.inputs[1:], self.targets[1:]
            elif wrong == "order":
                order = torch.arange(num).flip(0)
                self.inputs, self.targets = self.inputs[order], self.targets[order]
            elif wrong == "labels":
                self.targets = 2 - self.targets
            elif wrong == "shape":
                self.inputs = self.inputs[:, :5]
            elif wrong == "type":
                self.targets = self.targets.to(torch.int32)
            elif wrong == "rounding":
                self.inputs = self.inputs * (1 + 1e-7)
            elif wrong == "sample":
                self.inputs[num // 2] += 0.5
        self.wrong = wrong

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        inputs = self.inputs[index]
        if self.wrong == "own generator":
            inputs = inputs + np.random.default_rng().normal()
        return inputs, self.targets[index]


def rows(wrong="", half="train", kind="dataset", num=256):
    if wrong == "refused" and rank_here() == 1:
        raise UserError("data.path: nothing lies at '/data'")
    if wrong == "raises" and rank_here() == 1:
        raise ValueError("broken on purpose")
    halves = [Rows(num, wrong if half == "train" else "rounding" if wrong == "rounding" else ""),
              Rows(32, wrong if half == "val" else "", num)]  # fmt: skip
    if kind == "tensors":
        halves = [torch.utils.data.TensorDataset(h.inputs, h.targets) for h in halves]
    classes = 4 if wrong == "classes" and rank_here() == 1 else 3
    return *halves, Task("classification", (6,), classes)


def on_rows(wrong, half="train", kind="dataset", **changes):
    flags = {"data.name": "test_agreement:rows", "data.options": {"wrong": wrong, "half": half, "kind": kind},
             "batch.size": 64, "model.hidden": [8]}  # fmt: skip
    return digits(**{**SHORT, **flags, **changes})


DATA = {
    "missing": "train.samples is 256 on rank 0, 255 on rank 1",
    "order": "rank 1 differs from rank 0 in train.{part}",
    "labels": "rank 1 differs from rank 0 in train.{labels}",
    "sample": "rank 1 differs from rank 0 in train.{inputs}",
    "type": "int64",
    "classes": "task.num_outputs is 3 on rank 0, 4 on rank 1",
}


@pytest.mark.parametrize("kind", ["dataset", "tensors"])
@pytest.mark.parametrize("wrong", DATA)
def test_other_data_on_a_rank_is_refused(wrong, kind, rank_pool, tmp_path):
    if (wrong, kind) == ("sample", "dataset"):
        pytest.skip("16 places are looked at")
    said = rank_pool(2, said_by, [on_rows(wrong, kind=kind)], tmp_path / "run")
    names = (
        {"part": "samples_read", "labels": "samples_read"}
        if kind == "dataset"
        else {"part": "inputs.values, train.targets.bytes", "labels": "targets.bytes", "inputs": "inputs.values"}
    )
    assert said[0] == said[1] and said[0].startswith("SharedError: the ranks hold different data: "), said
    assert DATA[wrong].format_map(names) in said[0]
    assert not (tmp_path / "run").exists()


def test_other_validation_data_on_a_rank_is_refused(rank_pool):
    said = rank_pool(2, said_by, [on_rows("missing", "val")], None)
    assert said[0] == said[1] and "val.samples is 32 on rank 0, 31 on rank 1" in said[0]


@pytest.mark.parametrize(
    ("wrong", "kind"), [("rounding", "tensors"), ("rounding", "dataset"), ("own generator", "dataset")]
)
def test_what_is_no_other_data_is_let_through(wrong, kind, rank_pool):
    """Last digits, as another processor rounds them; samples that are others at each reading."""
    assert rank_pool(2, said_by, [on_rows(wrong, kind=kind)], None) == ["trained", "trained"]


def test_a_rank_that_cannot_load_its_data_tells_all(rank_pool, tmp_path):
    said = rank_pool(2, said_by, [on_rows("refused")], tmp_path / "run")
    assert said == ["SharedError: rank 1: data.path: nothing lies at '/data'"] * 2
    said = rank_pool(2, said_by, [digits(**SHORT, **{"data.name": "mnist", "data.path": "/data"})], tmp_path / "run")
    assert said[0] == said[1] and said[0].startswith("SharedError: data.path: nothing lies at '/data'")
    said = rank_pool(2, said_by, [on_rows("raises")], tmp_path / "run")
    assert said == ["LostRankError: rank 1: ValueError: broken on purpose", "ValueError: broken on purpose"]
    assert not (tmp_path / "run").exists()


def wider(task):
    return nn.Sequential(nn.Flatten(), nn.Linear(64 + rank_here(), 10))


def test_another_model_on_a_rank_is_refused(rank_pool):
    said = rank_pool(2, said_by, [digits(**SHORT, **{"model.name": "test_agreement:wider"})], None)
    assert said[0] == said[1] and said[0].startswith("SharedError: the ranks built different models: "), said
    assert "parameters is 650 on rank 0, 660 on rank 1" in said[0]


def test_where_ranks_differ_is_told_in_few_words():
    same, other = {"config": {"a": 1, "b": "x"}}, {"config": {"a": 2, "b": "x"}}
    assert difference([same, same]) is None and difference([same]) is None
    assert "a is 1 on rank 0, 2 on ranks 1, 3 to 5;" in difference([same, other, same, other, other, other])
    code = [{"code": {"net": f"#{rank // 2}", "only": "#1"}} for rank in range(4)]
    del code[0]["code"]["only"]
    assert difference(code) == (
        "the ranks run different code: ranks 2, 3 differ from rank 0 in net; copy the same files to every node"
    )
    many = [{"config": {f"key{k}": rank for k in range(9)}} for rank in (0, 1)]
    assert "key3 is 0 on rank 0, 1 on rank 1 and 5 more; start every rank" in difference(many)
    # The first section that differs explains the others, and one that a rank did not get to says nothing.
    first = {"versions": {"torch": "2.13.0"}, "model": {"parameters": 1}, "data": {"train": {"samples": 3}}}
    second = {"versions": {"torch": "2.14.1"}, "model": {"parameters": 2}}
    assert difference([first, second]) == (
        "the ranks run different versions: torch is 2.13.0 on rank 0, 2.14.1 on rank 1; install the same ones on every node"
    )
    assert name_ranks([0, 1, 2, 5, 7, 8]) == "ranks 0 to 2, 5, 7, 8" and name_ranks([4]) == "rank 4"


def test_what_a_rank_shows_names_the_code_in_use():
    shown = show_run(digits(), "never", None)
    assert shown["versions"]["torch"] == torch.__version__
    assert "largebatch.training.trainer" in shown["code"] and "test_agreement" in shown["code"]
    assert not any(name.startswith(("torch.", "numpy", "pytest", "json")) for name in shown["code"])
    assert "data.path" not in shown["config"] and shown["config"]["backend.device"] in ("cpu", "cuda")
    one, two = (show_model(nn.Linear(3, 2, bias=bias))["model"] for bias in (False, True))
    assert one["parameters"] == 6 and two["parameters"] == 8


def _meet_three_times(rank, world_size):
    """One rank is late, one mistaken, one broken; what the ranks came to each time."""
    found = []
    for wrong in (None, UserError("no"), KeyError("x")):
        meeting = Meeting(Ranks(rank, rank, world_size))
        try:
            with meeting.agree("something", lambda shown: None if len(shown) == world_size else "?") as shown:
                shown["rank"] = rank
                if wrong is not None and rank == world_size - 1:
                    raise wrong
            found.append("agreed")
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def test_ranks_meet_again_and_again_in_one_group(rank_pool):
    *others, last = rank_pool(4, _meet_three_times)
    assert others == [["agreed", "SharedError: rank 3: no", "LostRankError: rank 3: KeyError: 'x'"]] * 3
    assert last == ["agreed", "SharedError: rank 3: no", "KeyError: 'x'"]


def test_a_rank_that_does_not_come_is_named(monkeypatch):
    monkeypatch.setattr(meeting_module, "GRACE_SECONDS", 0.1)
    store = dist.HashStore()
    meeting = Meeting(Ranks())
    meeting.rank, meeting.world_size, meeting.seconds = 0, 3, 0.1
    meeting._notes = store
    store.set("place/1", "there, process 7")
    store.set("data/1", json.dumps({"shown": {}, "error": None, "is_own": False}))
    with (
        pytest.raises(LostRankError, match=r"no word from rank 2 \(which has not come\) on the data for 0 s"),
        meeting.agree("data", lambda shown: None),
    ):
        pass
    assert "no word" in json.loads(store.get("data/verdict"))["text"]
