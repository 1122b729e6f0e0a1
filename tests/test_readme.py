"""The README's Python runs, and its commands are the ones that CI calls."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SNIPPETS = [code for code in re.findall(r"```python\n(.*?)```", README, re.S) if "import largebatch" in code]


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippet(number):
    exec(compile(SNIPPETS[number], f"README.md, snippet {number}", "exec"), {})


def test_set_up_is_one_command_each():
    commands = re.findall(r"^python3 -m venv .*$", README, re.M)
    assert [command.rpartition("&& ")[2] for command in commands] == [
        "largebatch train configs/digits.yaml",
        "pytest -n 2",
    ]


@pytest.mark.parametrize("path", re.findall(r"\]\((?!http)([^)#]+)\)", README))
def test_links(path):
    assert (ROOT / path).exists()


def test_named_files_are_there():
    for path in re.findall(r"(?:configs|launch|docs|largebatch|tests)/[\w./]+\.(?:yaml|sh|md|py)", README):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("name", ["trainer.py", "step.py"])
def test_the_loop_is_quoted_as_it_stands(name):
    path = f"largebatch/training/{name}"
    quoted = re.search(rf"\]\({path}\)\)?:?\n\n```python\n(.*?)```", README, re.S)[1]
    code = [line.strip() for line in (ROOT / path).read_text().splitlines()]
    lines = [line.strip() for line in quoted.splitlines()]
    assert any(code[start : start + len(lines)] == lines for start in range(len(code)))
