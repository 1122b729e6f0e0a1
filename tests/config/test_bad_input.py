"""What a person gets wrong, and the one line they get for it: exit code 2, no traceback, nothing written."""

import gzip
import re
import struct

import pytest
import yaml

from largebatch.cli import main

GOOD = {
    "data": {"name": "digits"},
    "model": {"name": "mlp", "hidden": [16]},
    "batch": {"reference_size": 32, "size": 256},
    "optimizer": {"name": "sgd", "lr": 0.02, "momentum": 0.9},
    "schedule": {"name": "constant", "epochs": 1},
}

# name: (flags, the line after "largebatch: error: ")
FLAGS = {
    "unknown section": ("--optimiser.lr 0.1", r"optimiser: unknown key \(did you mean 'optimizer'\?\); a run knows data, model"),
    "unknown key": ("--optimizer.learning_rate 0.1", r"optimizer.learning_rate: unknown key; optimizer knows name, lr, "),
    "misspelt key": ("--batch.reference_sizes 3", r"batch.reference_sizes: unknown key \(did you mean 'reference_size'\?\)"),
    "key of another optimizer": ("--optimizer.betas [0.9,0.99]", r"optimizer.betas: unknown key"),
    "wrong type": ("--batch.size many", r"batch.size: expected a valid integer.*got 'many'"),
    "fraction of a sample": ("--batch.size 25.5", r"batch.size: expected a valid integer.*got 25.5"),
    "list for a number": ("--optimizer.lr [0.1]", r"optimizer.lr: expected a valid number, got \[0.1\]"),
    "number for a list": ("--model.hidden 64", r"model.hidden: expected a valid list, got 64"),
    "negative rate": ("--optimizer.lr -0.1", r"optimizer.lr: expected greater than 0, got -0.1"),
    "infinite rate": ("--optimizer.lr .inf", r"optimizer.lr: expected a finite number, got inf"),
    "momentum of one": ("--optimizer.momentum 1.0", r"optimizer.momentum: expected less than 1, got 1.0"),
    "no samples": ("--batch.size 0", r"batch.size: expected greater than or equal to 1, got 0"),
    "negative seed": ("--seed -1", r"seed: expected greater than or equal to 0, got -1"),
    "seed too large": ("--seed 100000000000000000000", r"seed: expected less than 9223372036854775808"),
    "nesterov without momentum": ("--optimizer.nesterov true --optimizer.momentum 0", r"optimizer: nesterov needs momentum > 0 and form sum"),
    "less than a sample": ("--schedule.epochs 0.0001", r"schedule.epochs: 0.0001 epochs of 1438 samples are less than one sample"),
    "square root for adagrad": ("--optimizer.name adagrad --scaling.rule sqrt", r"scaling.rule: sqrt holds for a root of a running average"),
    "a rule for quench": ("--optimizer.name quench --scaling.rule linear", r"scaling.rule: quench finds its own rate per sample.*expected none, got linear"),
    "an averaging rule for quench": ("--optimizer.name quench --scaling.beta2 keep", r"scaling.beta2: optimizer 'quench' has no such coefficient"),
    "quench that never steps": ("--optimizer.name quench", r"optimizer.K: the run's 1438 samples end before quench takes its first step, after 4096"),
    "quench without eps": ("--optimizer.name quench --optimizer.eps 0", r"optimizer.eps: expected greater than 0, got 0"),
    "variance of micro-batches": ("--optimizer.name quench --optimizer.sigma2 micro_batch", r"optimizer.sigma2: expected 'average' or 'sample', got 'micro_batch'"),
    "lars of no trust": ("--optimizer.name lars --optimizer.trust_coefficient 0", r"optimizer.trust_coefficient: expected greater than 0, got 0"),
    "second moments of lars": ("--optimizer.name lars --optimizer.second_moment sample", r"optimizer.second_moment: unknown key"),
    "square root for lamb's reference squares": (
        "--optimizer.name lamb --optimizer.second_moment sample --scaling.rule sqrt",
        r"scaling.rule: sqrt is for plain second moments \(optimizer.second_moment batch\); with 'sample'",
    ),
    "unknown precision": ("--precision fp8", r"precision: expected 'fp32', 'fp64', 'bf16' or 'fp16', got 'fp8'"),
    "unknown optimizer": ("--optimizer.name sdg", r"optimizer.name: unknown 'sdg' \(did you mean 'sgd'\?\); expected one of sgd, "),
    "unknown model": ("--model.name mpl", r"model.name: unknown 'mpl' \(did you mean 'mlp'\?\); expected one of mlp, cnn, "),
    "unknown data": ("--data.name digit", r"data.name: unknown 'digit' \(did you mean 'digits'\?\)"),
    "unknown schedule": ("--schedule.name cosin", r"schedule.name: unknown 'cosin' \(did you mean 'cosine'\?\)"),
    "unknown rule": ("--scaling.rule cubic", r"scaling.rule: expected 'linear', 'sqrt', 'adascale' or 'none', got 'cubic'"),
    "unknown averaging rule": ("--scaling.momentum halflife", r"scaling.momentum: expected .*'half_life'.*got 'halflife'"),
    "rule for a coefficient that is not there": ("--scaling.beta2 keep", r"scaling.beta2: optimizer 'sgd' has no such coefficient"),
    "more than the data": ("--batch.size 4096", r"batch.size: 4096 is more than the 1438 training samples; the nearest is 1438"),
    "batch that splits a norm's group": (
        "--model.name cnn --model.norm batch --batch.size 250",
        r"batch.size: expected a multiple of the norm's group of 32 samples, got 250; try 256",
    ),
    "micro-batch that splits a norm's group": (
        "--model.name cnn --model.norm batch --batch.micro_size 40",
        r"batch.micro_size: expected a multiple of the norm's group of 32 samples, got 40; try 32",
    ),
    "maximum under the start": (
        "--batch.max_size 64 --schedule.realize batch_then_lr",
        r"batch.max_size: expected at least batch.size 256, got 64",
    ),
    "growth without a maximum": ("--schedule.realize batch_then_lr", r"batch.max_size: missing; schedule.realize batch_then_lr"),
    "growth of an unscaled rate": (
        "--schedule.realize batch_then_lr --batch.max_size 512 --scaling.rule none",
        r"schedule.realize: 'batch_then_lr' needs a scaling.rule \(linear or sqrt\), got none",
    ),
    "growth past the data": (
        "--schedule.name cosine --schedule.realize batch",
        r"schedule.realize: the batch would grow past the 1438 training samples",
    ),
    "milestone past the end": (
        "--schedule.name step --schedule.milestones_epochs [1]",
        r"schedule.milestones_epochs: 1 lies at or past the end of the run",
    ),
    "milestones out of order": (
        "--schedule.name step --schedule.milestones_epochs [0.8,0.4]",
        r"schedule.milestones_epochs: expected rising epochs, got \[0.8, 0.4\]",
    ),
    "decay longer than the run": (
        "--schedule.name trapezoid --schedule.decay_epochs 2",
        r"schedule.decay_epochs: expected at most schedule.epochs \(1\), got 2",
    ),
    "warm-up of no length": ("--warmup.name gradual", r"warmup.epochs: 'gradual' needs a length > 0, got 0"),
    "model for other data": ("--model.name gpt", r"model.name: gpt .*sequences of tokens"),
    "factory that is not there": ("--model.name json:nothing", r"model.name: module 'json' has no callable 'nothing'"),
    "module that is not there": ("--model.name no_such_module:build", r"model.name: cannot import 'no_such_module'"),
    "missing data path": (
        "--data.name fashion_mnist --data.path /no/such/folder",
        r"data.path: .*'/no/such/folder'",
    ),
    "data path not given": ("--data.name cifar10", r"data.path: missing; add it to the config or pass --data.path VALUE"),
    "flag without a value": ("--batch.size", r"command line: --batch.size needs a value"),
    "stray word": ("256", r"command line: expected a flag like --batch.size 256, got '256'"),
    "section for a value": ("--batch 256", r"batch: expected a section with keys, got 256"),
    "value for a section": ("--seed.value 3", r"command line: --seed.value: 'seed' is not a section|seed: expected"),
    "unreadable value": ("--batch.size [1", r"command line: --batch.size: '\[1' cannot be read as a YAML value"),
}  # fmt: skip


def refused(capsys, *words: object) -> str:
    """Run the command line; return its one line of error."""
    assert main([str(word) for word in words]) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and err.startswith("largebatch: error: "), err
    assert "Traceback" not in err + out
    return err.removeprefix("largebatch: error: ").strip()


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    return path


@pytest.mark.parametrize("name", FLAGS)
def test_flags(name, config, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags, expected = FLAGS[name]
    line = refused(capsys, "train", config, "--out", tmp_path / "out", *flags.split())
    assert re.search(expected, line), line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.yaml"], "something was written"


FILES = {
    "not yaml": ("data: {name: digits\nmodel: ]", r"run.yaml, line 2, column \d+: not valid YAML"),
    "not a mapping": ("- data\n- model\n", r"run.yaml: expected sections \(data, model, batch, ...\), got list"),
    "empty": ("", r"run.yaml: expected sections \(data, model, batch, ...\), got NoneType"),
    "a section left out": (yaml.safe_dump({k: v for k, v in GOOD.items() if k != "batch"}), r"batch: missing; add it"),
    "a key left out": (
        yaml.safe_dump({**GOOD, "batch": {"size": 256}}),
        r"batch.reference_size: missing; add it to the config",
    ),
    "a section without its name": (
        yaml.safe_dump({**GOOD, "data": {"path": "x"}}),
        r"data.name: missing; say which one",
    ),
    "several mistakes": (
        yaml.safe_dump({**GOOD, "batch": {"size": 0, "reference_size": "x"}, "sede": 1}),
        r"batch.reference_size: expected a valid integer.*\(and 2 more\)",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_files(name, config, tmp_path, capsys):
    text, expected = FILES[name]
    config.write_text(text)
    line = refused(capsys, "train", config, "--out", tmp_path / "out")
    assert re.search(expected, line), line
    assert not (tmp_path / "out").exists()


def test_missing_config_names_the_nearest(config, tmp_path, capsys):
    line = refused(capsys, "train", tmp_path / "runn.yaml")
    assert line.endswith("runn.yaml: no such config file (did you mean 'run.yaml'?)")


def test_no_config(capsys):
    assert "name a config" in refused(capsys, "train")


def test_unknown_command(capsys):
    assert "invalid choice: 'trian'" in refused(capsys, "trian")


def test_out_that_holds_a_run(config, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.yaml").write_text(yaml.safe_dump(GOOD | {"seed": 0}))
    (out / "metrics.jsonl").write_text('{"step": 1, "samples": 64}\n')
    assert "already holds a run; continue it with --resume auto" in refused(capsys, "train", config, "--out", out)
    assert (out / "metrics.jsonl").read_text() == '{"step": 1, "samples": 64}\n'


def test_out_that_holds_the_config_itself(config, tmp_path, capsys):
    own = tmp_path / "config.yaml"
    own.write_text(config.read_text())
    for words in ([], ["--resume", "auto"]):
        assert "holds config.yaml, which no run wrote" in refused(capsys, "train", own, "--out", tmp_path, *words)
    assert own.read_text() == config.read_text()


def test_a_refused_run_leaves_its_folder_free(config, tmp_path, capsys):
    refused(capsys, "train", config, "--out", tmp_path / "out", "--batch.size", "4096")
    assert main(["train", str(config), "--out", str(tmp_path / "out")]) == 0


def test_out_that_is_a_file(config, tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    assert "is a file; name a folder" in refused(capsys, "train", config, "--out", tmp_path / "out")


def idx(path, magic, shape, body):
    with gzip.open(path, "wb") as file:
        file.write(struct.pack(f">{1 + len(shape)}i", magic, *shape) + body)


def mnist(folder):
    for part, count in (("train", 64), ("t10k", 32)):
        idx(folder / f"{part}-images-idx3-ubyte.gz", 2051, (count, 28, 28), bytes(784 * count))
        idx(folder / f"{part}-labels-idx1-ubyte.gz", 2049, (count,), bytes(count))


BROKEN = {
    "a file left out": (lambda f: (f / "t10k-labels-idx1-ubyte.gz").unlink(), "t10k-labels-idx1-ubyte"),
    "cut short": (
        lambda f: (f / "train-images-idx3-ubyte.gz").write_bytes((f / "train-images-idx3-ubyte.gz").read_bytes()[:60]),
        "train-images-idx3-ubyte",
    ),
    "not gzip": (
        lambda f: (f / "train-images-idx3-ubyte.gz").write_bytes(b"<html>404</html>"),
        "train-images-idx3-ubyte",
    ),
    "wrong magic number": (
        lambda f: idx(f / "train-labels-idx1-ubyte.gz", 7, (64,), bytes(64)),
        "train-labels-idx1-ubyte",
    ),
    "labels for other images": (lambda f: idx(f / "train-labels-idx1-ubyte.gz", 2049, (63,), bytes(63)), "63"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_data_files(name, config, tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    mnist(folder)
    spoil, named = BROKEN[name]
    spoil(folder)
    flags = ("--data.name", "mnist", "--data.path", folder, "--batch.size", 64)
    line = refused(capsys, "train", config, "--out", tmp_path / "out", *flags)
    assert line.startswith("data.path: ") and named in line, line
    assert not (tmp_path / "out").exists()


def test_too_many_ranks(config, capsys):
    line = refused(capsys, "plan", config, "--world-size", 300)
    assert line == "batch.size: 256 cannot be split over 300 ranks of at least 1; the nearest is 300"


def test_launcher_environment_in_part(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "zero")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert "start with torchrun" in refused(capsys, "train", config, "--out", tmp_path / "out")


def test_gpu_that_is_not_there(config, tmp_path, capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here, so asking for one is no mistake")
    line = refused(capsys, "train", config, "--out", tmp_path / "out", "--backend.device", "cuda")
    assert line == "backend.device: expected a GPU for 'cuda', found none; use --backend.device cpu"
    assert not (tmp_path / "out").exists()


def test_tracker_that_is_not_installed(config, tmp_path, capsys, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else found(name, *a))
    line = refused(capsys, "train", config, "--out", tmp_path / "out", "--log.trackers", "[wandb]")
    assert line == "log.trackers: wandb is not installed; pip install 'largebatch[wandb]'"


def test_a_warm_up_that_does_nothing_is_a_warning(config, capsys):
    flags = ["--batch.size", "32", "--warmup.name", "gradual", "--warmup.epochs", "0.5"]
    assert main(["plan", str(config), *flags]) == 0
    assert "it does nothing" in capsys.readouterr().out


def test_a_cut_epoch_with_momentum_is_a_warning(config, capsys):
    assert main(["plan", str(config), "--batch.at_epoch_end", "cut"]) == 0
    assert "optimizer.form velocity" in capsys.readouterr().out
    assert main(["plan", str(config), "--batch.at_epoch_end", "cut", "--optimizer.form", "velocity"]) == 0
    assert "optimizer.form velocity" not in capsys.readouterr().out


def test_a_setting_that_is_not_used_is_a_warning(config, tmp_path, capsys):
    flags = ["--batch.max_size", "512", "--batch.micro_size", "300", "--warmup.epochs", "2", "--model.name", "cnn"]
    assert main(["train", str(config), "--out", str(tmp_path / "out"), *flags]) == 0
    out = capsys.readouterr().out
    assert "batch.micro_size 300 is not used: no rank has more than 256" in out
    assert "batch.max_size is not used" in out and "warmup.epochs, start and realize are not used" in out
    assert "'cnn' has no hidden; left out" in out
