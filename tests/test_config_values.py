"""Values that no run has: refused in a line, at once, whatever their size."""

import os
import stat
import time

import pytest
import yaml
from test_trainer import digits

from largebatch.cli import main
from largebatch.distributed import Ranks
from largebatch.run import train


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
        ("schedule.epochs", "9223372036854775808", "schedule.epochs: expected less than"),
        ("schedule.epochs", "1000000000000", "no run has more than"),
        ("model.name", "x" * 300, "model.name: unknown 'xxx"),
        ("batch.size", "[" * 3000, "cannot be read as a YAML value"),
        ("optimizer.betas", "[" + ", ".join(["0.9"] * 400) + "]", "optimizer"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_value_that_no_run_has(key, value, said, config, capsys):
    assert said in refused(capsys, config, f"--{key}", value)


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


def test_weights_that_would_change_sign(config, capsys):
    words = ["--optimizer.name", "adamw", "--optimizer.lr", "0.5", "--optimizer.weight_decay", "2"]
    assert "turn its sign" in refused(capsys, config, *words)


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
