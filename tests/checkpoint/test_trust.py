"""A checkpoint from a stranger: nothing of it is executed, and what is wrong with it is one line."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from resumed import rewrite
from runs import digits
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from largebatch.checkpoint.folder import MANIFEST, STATE, CheckpointFolder, describe_file
from largebatch.cli import main
from largebatch.distributed import Ranks
from largebatch.distributed.reading import INDEX, read_index
from largebatch.distributed.state import export_weights, tensor_metadata
from largebatch.errors import UserError
from largebatch.training.run import train

SHORT = {"schedule.epochs": 0.5, "checkpoint.every_minutes": None, "checkpoint.every_epochs": 0.25, "warmup.name": "none",
         "warmup.epochs": 0.0}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr("largebatch.reporting.plots.plot_run", lambda *_: None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trust") / "run"
    train(digits(**SHORT), folder, ranks=Ranks())
    return folder


@pytest.fixture
def run(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    return folder


def newest(folder):
    return CheckpointFolder(folder / "checkpoints").saved()[-1]


def command(tmp_path, *words):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(digits(**SHORT).model_dump(mode="json")))
    return main(["train", str(config), *map(str, words)])


def line(capsys):
    said = capsys.readouterr().err.strip()
    assert said.startswith("largebatch: error: ") and "\n" not in said and len(said) < 1000, said
    return said


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return Path.touch, (Path(self.marker),)


def hidden_in(path, marker):
    """Return indices that would make the marker: the whole, within a whole one, and as an entry that is read as a pickle."""
    index = read_index(path)
    yield "instead", pickle.dumps(Payload(marker))
    index.planner_data = Payload(marker)
    yield "within", pickle.dumps(index)
    index = read_index(path)
    index.state_dict_metadata["model.evil"] = torch.distributed.checkpoint.metadata.BytesStorageMetadata()
    yield "entry", pickle.dumps(index)
    yield "os", b"cposix\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR."
    yield "builtins", b"cbuiltins\neval\n(S'open(\"" + str(marker).encode() + b'", "w")\'\ntR.'
    yield "torch", b"ctorch\nload\n(S'x'\ntR."
    yield "dtype by another name", b"ctorch\nhub.load\n."
    metadata = b"ctorch.distributed.checkpoint.metadata\n"
    yield "attribute", b"cbuiltins\ngetattr\n(" + metadata + b"Metadata\nS'__init__'\ntR."
    yield "attribute of a format", b"cbuiltins\ngetattr\n(" + metadata + b"_MEM_FORMAT_ENCODING\nS'__class__'\ntR."


@pytest.mark.parametrize("case", range(9))
def test_an_index_executes_nothing(case, run, tmp_path, capsys):
    marker, path = tmp_path / "marker", newest(run)
    name, data = list(hidden_in(path, marker))[case]
    rewrite(path, INDEX, data)
    for act in (lambda: tensor_metadata(path), lambda: export_weights(path, tmp_path / "w.safetensors")):
        with pytest.raises(UserError, match=r"its index \.metadata is not read"):
            act()
    assert main(["inspect", str(path)]) == 2, name
    line(capsys)
    assert command(tmp_path, "--resume", path, "--out", tmp_path / "branch") == 2
    line(capsys)
    (run / "summary.json").unlink()
    assert command(tmp_path, "--resume", "auto", "--out", run) == 2
    line(capsys)
    assert not marker.exists()


def _resume_on_rank(rank, world_size, folder):
    try:
        train(digits(**SHORT), folder, ranks=Ranks(rank, rank, world_size), resume="auto")
    except UserError as error:
        return str(error)
    return None


def test_an_index_executes_nothing_on_two_ranks(run, tmp_path, rank_pool):
    marker = tmp_path / "marker"
    rewrite(newest(run), INDEX, pickle.dumps(Payload(marker)))
    for message in rank_pool(2, _resume_on_rank, run):
        assert message is not None and "is not read" in message
    assert not marker.exists()


def test_an_index_of_before_is_read(run):
    """What torch.distributed.checkpoint itself wrote."""
    assert tensor_metadata(newest(run)).keys() >= {"model.1.weight", "random.0.torch"}


def test_an_index_that_an_earlier_python_wrote_is_read(run, monkeypatch):
    """Before 3.11.4, Debian's 3.11.2 too, members of an enumeration are pickled as getattr of it."""
    path = newest(run)
    before = read_index(path)
    monkeypatch.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", lambda self, _: (getattr, (type(self), self._name_)))
    data = pickle.dumps(before)
    assert b"getattr" in data
    rewrite(path, INDEX, data)
    assert read_index(path) == before


def test_a_file_outside_of_the_folder_is_not_opened(run, tmp_path, capsys):
    secret = tmp_path / "secret"
    secret.write_text("x")
    path = newest(run)
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"]["../../../secret"] = describe_file(secret)
    (path / MANIFEST).write_text(json.dumps(manifest))
    assert main(["inspect", str(path)]) == 1
    assert "no file of this folder" in " ".join(capsys.readouterr().out.split())
    index = read_index(newest(run))
    for info in index.storage_data.values():
        object.__setattr__(info, "relative_path", "../../../secret")
    rewrite(path, INDEX, pickle.dumps(index))
    with pytest.raises(UserError, match="not to a file of tensors beside it"):
        tensor_metadata(path)


EDITS = {
    "a list": lambda state: [state],
    "no progress": lambda state: {k: v for k, v in state.items() if k != "progress"},
    "no groups": lambda state: {k: v for k, v in state.items() if k != "groups"},
    "config a word": lambda state: state | {"config": "x"},
    "samples a word": lambda state: state | {"progress": state["progress"] | {"samples_seen": "many"}},
    "samples negative": lambda state: state | {"progress": state["progress"] | {"samples_seen": -5}},
    "no training samples": lambda state: state | {"num_train": 0},
    "groups of words": lambda state: state | {"groups": ["x"]},
    "versions a list": lambda state: state | {"versions": []},
    "another format": lambda state: state | {"format": "x"},
    "config without sections": lambda state: state | {"config": {}},
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_state_is_one_line(edit, run, tmp_path, capsys):
    path = newest(run)
    state = json.loads((path / STATE).read_text())
    rewrite(path, STATE, json.dumps(EDITS[edit](state)).encode())
    for words in (["inspect", str(path)], ["inspect", str(run)]):
        assert main(words) in (0, 1, 2)
        capsys.readouterr()
    for out in (run, tmp_path / "new"):
        assert command(tmp_path, "--resume", path, "--out", out) == 2
        line(capsys)


JUNK = {
    "index": lambda run: rewrite(newest(run), INDEX, b"junk"),
    "empty index": lambda run: rewrite(newest(run), INDEX, b""),
    "metrics": lambda run: (run / "metrics.jsonl").write_bytes(b"\xff\xfe\x00" * 9),
    "summary": lambda run: (run / "summary.json").write_text("{"),
    "summary of words": lambda run: (run / "summary.json").write_text('"x"'),
    "config": lambda run: (run / "config.yaml").write_text("a: [b"),
    "empty config": lambda run: (run / "config.yaml").write_text(""),
    "config of words": lambda run: (run / "config.yaml").write_text("x"),
    "config not text": lambda run: (run / "config.yaml").write_bytes(b"\xff\xfe"),
    "manifest": lambda run: (newest(run) / MANIFEST).write_text("[]"),
}


@pytest.mark.parametrize("kind", JUNK)
def test_junk_in_a_run_folder_is_one_line_or_survived(kind, run, tmp_path, capsys):
    JUNK[kind](run)
    assert main(["inspect", str(run)]) in (0, 1, 2)
    capsys.readouterr()
    code = command(tmp_path, "--resume", "auto", "--out", run)
    said = capsys.readouterr().err
    assert code in (0, 2) and "Traceback" not in said
