"""Values that no run has: refused in a line, at once, whatever their size."""

import os
import stat
import time

import pytest
import yaml
from runs import digits

from largebatch.cli import main
from largebatch.distributed import Ranks
from largebatch.training.run import train


def refused(capsys, *words):
    started = time.monotonic()
    assert main(["plan", *map(str, words)]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("largebatch: error: ") and "\n" not in said and len(said) < 600, said[:900]
    assert time.monotonic() - started < 20
    return said


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(digits().to_yaml())
    return path


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("schedule.epochs", "true", "schedule.epochs: expected a number, got true"),
        ("batch.size", "true", "batch.size: expected a number"),
        ("optimizer.lr", "1e40", "optimizer.lr: expected less than or equal to"),
        ("optimizer.weight_decay", "1e40", "optimizer.weight_decay: expected less than"),
        ("backend.timeout_seconds", "1e18", "backend.timeout_seconds: expected less than"),
        ("backend.timeout_seconds", "1e-300", "backend.timeout_seconds: expected greater than or equal to 1, got"),
        ("checkpoint.time_limit_minutes", "1e-300", "checkpoint.time_limit_minutes: expected 1e-09 or more, got"),
        ("checkpoint.every_minutes", "5e-324", "checkpoint.every_minutes: expected 1e-09 or more, got"),
        ("checkpoint.keep_every_epochs", "5e-324", "checkpoint.keep_every_epochs: expected 1e-15 or more, got"),
        ("evaluate.every_epochs", "5e-324", "evaluate.every_epochs: expected 1e-15 or more, got"),
        (
            "schedule",
            "{name: step, milestones_epochs: [1e-300], epochs: 1}",
            "schedule.milestones_epochs.0: expected 1e-15 or",
        ),
        ("seed", "null", "seed: expected a valid integer, got null"),
        ("batch", "null", "batch: expected a section with keys, got null"),
        ("schedule.epochs", "9223372036854775808", "schedule.epochs: expected less than"),
        ("schedule.epochs", "1000000000000", "no run has more than"),
        ("model.name", "x" * 300, "model.name: unknown 'xxx"),
        ("seed", "true", "seed: expected a number"),
        ("loader.num_workers", "9223372036854775808", "loader.num_workers: expected less than or equal to 1024"),
        ("loader.prefetch", "9223372036854775808", "loader.prefetch: expected less than"),
        ("model.hidden", "[2147483648, 2147483648]", "model.hidden.0: expected less than"),
        ("model", "{name: gpt, n_layer: 2147483648}", "model.n_layer: expected less than"),
        ("model", "{name: gpt, d_model: 2147483648}", "model.d_model: expected less than"),
        (
            "model",
            "{name: cnn, norm: batch, norm_group_size: 9223372036854775808}",
            "model.norm_group_size: expected less",
        ),
        ("data", "{name: image_folder, path: x, image_size: 1000000}", "data.image_size: expected less than"),
        ("data", "{name: synthetic_images, shape: [3, 1000000, 1000000]}", "data.shape.1: expected less than"),
        ("data", "{name: synthetic_images, num_samples: 9223372036854775808}", "data.num_samples: expected less than"),
        ("data", "{name: synthetic_images, num_classes: 1}", "a task of classification has 2 classes or more, got 1"),
        ("data", "{name: synthetic_images, noise: .inf}", "data.noise: expected a finite number"),
        ("log.project", "a/b", "log.project: expected 1 to 128 characters"),
        ("backend.ds_config", "{a: 1}", "backend.ds_config: got {'a': 1}, which engine 'ddp' does not take"),
        ("backend.offload", "true", "backend.offload: got True, which engine 'ddp' does not take"),
        (
            "backend",
            "{name: fsdp, squares_every: 2}",
            "backend.squares_every: got 2, which engine 'fsdp' does not take",
        ),
        ("backend", "{name: deepspeed, compile: true}", "backend.compile: got True, which engine 'deepspeed'"),
        ("backend", "{name: deepspeed}", "precision: DeepSpeed has no float64"),
        (
            "backend",
            "{name: accelerate, ds_config: {a: 1}}",
            "backend.ds_config: got {'a': 1}, which engine 'accelerate'",
        ),
        ("backend", "{name: accelerate, zero_stage: 1}", "backend.zero_stage: got 1, which engine 'accelerate'"),
        ("data", "{name: digits, name: digits}", "'name' is there twice"),
        ("model.name", "a." * 3000 + "b:c", "is no name of a module"),
        ("data." + "k" * 1000, "1", "unknown key"),
        ("batch.size", "[" * 3000, "cannot be read as a YAML value"),
        ("optimizer.betas", "[" + ", ".join(["0.9"] * 400) + "]", "optimizer"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_value_that_no_run_has(key, value, said, config, capsys):
    assert said in refused(capsys, config, f"--{key}", value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--warmup.epochs", "1000000"],
            "fills the whole run (1.5 epochs): the learning rate ends at 16 % of its value",
        ),
        (["--schedule.name", "inverse_sqrt", "--schedule.timescale_epochs", "1000"], "ends at 100 % of its value"),
        (["--schedule.name", "robbins_monro", "--schedule.timescale_epochs", "1.5"], "ends at 50 % of its value"),
        (
            ["--optimizer.name", "adamw", "--optimizer.lr", "1e-3", "--backend.squares_every", "1000000"],
            "the run's 11 updates measure the variance once",
        ),
    ],
    ids=lambda value: value[1] if isinstance(value, list) else "",
)
def test_what_comes_after_the_end_of_the_run_is_told(words, said, config, capsys):
    assert main(["plan", str(config), *words]) == 0
    assert said in " ".join(capsys.readouterr().out.split())


def test_names_that_are_too_long_for_a_file(config, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "x" * 300
    for words in (
        ["train", config, "--out", name],
        ["train", config, "--out", "a/" * 3000 + "b"],
        ["train", config, "--out", "new", "--resume", name],
        ["inspect", name],
        ["plan", config, "--data", f"{{name: text, path: {name}}}", "--model", "{name: gpt}"],
        ["plan", name],
    ):
        assert main([*map(str, words)]) == 2
        said = capsys.readouterr().err.strip()
        assert said.startswith("largebatch: error: ") and "too long" in said and "\n" not in said and len(said) < 500
    assert main(["train", str(config), "--out", "/dev/null/x"]) == 2
    assert "a folder above it is a file" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


@pytest.mark.parametrize("at", ["data", "model"])
def test_what_this_machine_cannot_hold(at, config, capsys):
    flags = {
        "data": "{name: synthetic_images, shape: [16384, 16384, 16384]}",
        "model": "{name: mlp, hidden: [1048576, 1048576, 1048576]}",
    }
    # The plan needs no memory for a model's weights.
    command = ["plan" if at == "data" else "train", str(config), f"--{at}", flags[at]]
    assert main(command + ([] if at == "data" else ["--out", str(config.parent / "out")])) == 2
    said = capsys.readouterr().err.strip()
    assert (
        said.startswith(f"largebatch: error: {at}: this machine has no memory for what it describes")
        and "\n" not in said
    )
    assert [path.name for path in config.parent.iterdir()] == ["run.yaml"]


@pytest.mark.parametrize("samples", [2**31, 10**13])
@pytest.mark.parametrize("realize", ["lr", "batch_then_lr"])
def test_a_plan_takes_no_longer_for_more_samples(samples, realize, config, capsys):
    data = f"{{name: synthetic_images, num_samples: {samples}}}"
    words = ["--data", data, "--batch.max_size", "8000", "--schedule.realize", realize, "--batch.size", "4000"]
    assert main(["plan", str(config)]) == 0  # what is imported on first use
    started = time.process_time()
    assert main(["plan", str(config), *words]) == 0
    assert time.process_time() - started < 1.0
    assert f"{samples:,} training samples" in " ".join(capsys.readouterr().out.split())


def test_a_key_that_is_there_twice(config, capsys):
    config.write_text(config.read_text() + "\nseed: 3\n")
    assert "'seed' is there twice" in refused(capsys, config)


def test_a_config_that_is_nested_too_deeply(config, capsys):
    config.write_text("a: " + "[" * 3000 + "]" * 3000)
    assert "nested more deeply" in refused(capsys, config)


def test_aliases_that_would_make_a_message_of_megabytes(config, capsys):
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [
        f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}]"
        for a, b in zip("abcdef", "bcdefg", strict=True)
    ]
    config.write_text("\n".join(lines) + "\nbatch: *g\n")
    refused(capsys, config)


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        ("{name: adamw, lr: 0.5, weight_decay: 2}", "take 2 of each weight, and turn its sign"),
        ("{name: sgd, lr: 0.5, weight_decay: 1}", "take 1 of each weight, and turn its sign"),
        ("{name: sgd, lr: 0.5, weight_decay: 1, momentum: 0.9, form: average}", "turn its sign"),
        (
            "{name: lamb, lr: 0.5}",
            "optimizer.lr: with the learning rate of batch size 32 lamb would move each layer by 1 of",
        ),
        ("{name: lars, lr: 500}", "lars would move each layer by 1 of its own length"),
        (
            "{name: lars, lr: 5, weight_decay: 0.1, decay_norm_and_bias: true}",
            "1 of each norm and bias, and turn its sign",
        ),
    ],
)
def test_weights_that_would_change_sign(optimizer, said, config, capsys):
    words = ["--batch", "{reference_size: 16, size: 32}", "--scaling.momentum", "keep"]
    if "lamb" in optimizer or "adamw" in optimizer:
        words = words[:2]
    assert said in refused(capsys, config, *words, "--optimizer", optimizer)


def test_a_layers_own_length_bounds_its_decay(config, capsys):
    words = ["--batch", "{reference_size: 16, size: 32}", "--optimizer", "{name: lars, lr: 5, weight_decay: 0.2}"]
    assert main(["plan", str(config), *words]) == 0


@pytest.mark.parametrize(
    "words",
    [
        ["--seed", "1", "--seed", "2"],
        ["--seed=1", "--seed", "1"],
        ["--world-size", "2", "--world-size", "2"],
        ["--world-size", "2", "--world", "3"],
    ],
    ids=" ".join,
)
def test_a_flag_that_is_there_twice(words, config, capsys):
    said = refused(capsys, config, *words)
    assert f"{'--seed' if 'seed' in words[0] else '--world'}" in said and "is there twice" in said


def test_a_headings_keys_may_all_be_left_out(config, capsys):
    config.write_text(config.read_text().split("log:")[0] + "log:\nprecision: fp64\n")
    assert main(["plan", str(config)]) == 0
    config.write_text(config.read_text().replace("fp64", ""))
    assert "precision: expected 'fp32', 'fp64', 'bf16' or 'fp16', got null" in refused(capsys, config)


def test_an_empty_out(config, capsys):
    for words in (["--out", ""], ["--out="]):
        assert main(["train", str(config), *words]) == 2
        assert "--out is empty" in capsys.readouterr().err


def test_weights_are_written_for_whom_the_umask_says(tmp_path):
    before = os.umask(0o022)
    try:
        train(digits(**{"schedule.epochs": 0.2}), tmp_path / "run", ranks=Ranks())
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "run").iterdir() if path.is_file()}
    assert modes["model.safetensors"] == modes["config.yaml"] == 0o644
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["seed"] == 0
