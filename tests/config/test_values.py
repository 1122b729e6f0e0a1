"""What stands in a config or a flag is what is meant: a text is a text, a number a number, and a section its own."""

from __future__ import annotations

import json

import pytest
import yaml
from runs import digits

from largebatch.config import yaml_text
from largebatch.config.file import load_config, parse_config, parse_flags
from largebatch.config.optimizers import OPTIMIZERS
from largebatch.config.schedules import SCHEDULES
from largebatch.config.schema import Config
from largebatch.data import SOURCES
from largebatch.errors import UserError
from largebatch.models import MODELS
from largebatch.section import Section, leaf_types
from largebatch.studies.bench import variants


@pytest.fixture
def load(tmp_path):
    """Return the run of a config's text and flags in words."""

    def load(*words, text=None):
        (tmp_path / "run.yaml").write_text(text or digits().to_yaml())
        return load_config(tmp_path / "run.yaml", parse_flags(words))[0]

    return load


TEXTS = [
    "t/run #1", "2024", "007", "1e3", "1.10", "null", "~", "true", "no", "12:00:00", "2024-01-05", "2021-13-45", "a: b", "[x]",
    "[x", "{a}", "'tis", "*star", "&and", "!bang", "- dash", "  spaces  ", "% @", "| fold", "$NAME", "0x10", "", "a\nb", "実験",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_a_flags_text_is_the_text(text, load):
    run = load("--data.name", "text", "--model.name", "gpt", "--data.path", text)
    assert run.data.path == text
    again = load(text=run.to_yaml())
    assert again.data.path == text and again == run
    assert yaml.safe_load(run.to_yaml())["data"]["path"] == text  # to who reads YAML 1.1 too


def test_quotes_around_the_whole_are_taken_away(load):
    for text, path in (("'2024'", "2024"), ('"a b"', "a b"), ("'it''s'", "it's"), ("'a' b", "'a' b")):
        assert load("--data.name", "text", "--model.name", "gpt", "--data.path", text).data.path == path


NUMBERS = {
    "256": 256, "0256": 256, "0o17": 15, "0x10": 16, "1_000": 1000, "1e3": 1000.0, "1.": 1.0, ".5": 0.5, "-.5": -0.5, "+3": 3,
    "1e-3": 0.001, "1E+3": 1000.0, "00": 0, "1.0e-05": 1e-05,
}  # fmt: skip
NO_NUMBERS = ["yes", "no", "on", "off", "y", "12:00:00", "1:30", "190:20:30", "2024-01-05", "1,000", "1__0", "1e", "0o9", "0xg",
              "0b11", "1.2.3", "--1", "_1", "1_", "NaN", "inf"]  # fmt: skip


@pytest.mark.parametrize("text", NUMBERS)
def test_a_number_is_read_as_people_read_it(text):
    for value in (yaml_text.load(text), yaml_text.load_flag(text), yaml_text.load(f"a: {text} # so")["a"]):
        assert value == NUMBERS[text] and type(value) is type(NUMBERS[text])


@pytest.mark.parametrize("text", NO_NUMBERS)
def test_what_is_no_number_is_a_text_and_refused_where_a_number_belongs(text, load):
    assert yaml_text.load(text) == yaml_text.load_flag(text) == text
    for key in ("batch.size", "schedule.epochs", "checkpoint.time_limit_minutes", "seed"):
        with pytest.raises(UserError, match=rf"{key}: .*got (the text )?'{text}'"):
            load(f"--{key}", text)


def test_words_of_yaml_are_read_alike_but_for_what_1_2_dropped():
    text = "{a: true, b: False, c: null, d: ~, e: , f: [1, 2.5, x], g: .inf, h: 'yes', i: \"0256\"}"
    assert yaml_text.load(text) == yaml.safe_load(text)
    assert yaml_text.load("base: &b {x: 1}\nown: {<<: *b, y: 2}")["own"] == {"x": 1, "y": 2}
    assert yaml_text.load("no: 1\n2024-01-05: 2") == {"no": 1, "2024-01-05": 2}


def every_section(section):
    yield section
    for info in section.model_fields.values():
        for member in leaf_types(info.annotation):
            if isinstance(member, type) and issubclass(member, Section):
                yield from every_section(member)


SECTIONS = sorted(
    {*every_section(Config), *SOURCES, *MODELS, *OPTIMIZERS, *SCHEDULES}, key=lambda section: section.__name__
)


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_no_key_of_any_section_takes_true_or_a_text_for_a_number(section):
    tried = 0
    for name, info in section.model_fields.items():
        members = set(leaf_types(info.annotation))
        if not members & {int, float} or members & {bool, str}:
            continue
        for value in (True, False, "1", "0.5", " 2 ", "1_000", [True], ["1"]):
            tried += 1
            with pytest.raises(ValueError) as raised:
                section.model_validate({name: value})
            kinds = [error["type"] for error in raised.value.errors() if error["loc"][0] == name]
            assert kinds, (name, value)
    assert tried or not any({int, float} & set(leaf_types(info.annotation)) for info in section.model_fields.values())


def test_a_text_in_place_of_a_number_is_named(load):
    text = digits().to_yaml().replace("size: 200", "size: '200'", 1)
    with pytest.raises(UserError, match=r"batch\.size: expected a number, got the text '200'"):
        load(text=text)
    with pytest.raises(UserError, match=r"schedule\.epochs: expected a number, got true"):
        load("--schedule.epochs", "true")
    with pytest.raises(UserError, match=r"optimizer\.momentum: expected a number, got the text '0\.9'"):
        load("--optimizer.momentum", "'0.9'")
    assert load("--scaling.momentum", "0.5").scaling.momentum == 0.5
    assert load("--scaling.momentum", "half_life").scaling.momentum == "half_life"


def test_a_number_in_place_of_a_text_says_how_it_is_written(load):
    text = digits(data={"name": "text", "path": "x"}, model={"name": "gpt"}).to_yaml().replace("path: x", "path: 2024")
    with pytest.raises(UserError, match=r"data\.path: expected a valid string; put it in quotes, got 2024"):
        load(text=text)


def test_sections_that_share_an_alias_are_changed_one_by_one(load):
    text = (
        "data: {name: digits}\nmodel: {name: mlp}\nbatch: {reference_size: 32, size: 64}\noptimizer: {name: sgd, lr: 0.1}\n"
        "schedule: &s {name: cosine, epochs: 3}\nwarmup: &w {name: gradual, epochs: 1}\nevaluate: &every {every_epochs: 1}\n"
        "log: {every_updates: 5}\ncheckpoint: *every\n"
    )
    run = load("--evaluate.every_epochs", "2", text=text)
    assert (run.evaluate.every_epochs, run.checkpoint.every_epochs) == (2, 1)
    run = load("--checkpoint.every_epochs", "3", "--evaluate.every_epochs", "2", text=text)
    assert (run.evaluate.every_epochs, run.checkpoint.every_epochs) == (2, 3)
    shared = yaml_text.load("a: &o {x: {y: 1}}\nb: *o")
    assert shared["a"] is shared["b"]  # which is why a flag copies what it writes into


def test_a_config_is_the_same_through_yaml_and_json():
    for run in variants(digits()).values():
        values = run.model_dump(mode="json")
        assert parse_config(yaml_text.load(run.to_yaml())) == parse_config(json.loads(json.dumps(values))) == run
