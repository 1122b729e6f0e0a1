"""YAML with the scalars of YAML 1.2. PyYAML by itself reads ``yes`` as true and ``12:00:00`` as 43,200 (YAML 1.1)."""

from __future__ import annotations

import re
from typing import Any

import yaml

TAG = "tag:yaml.org,2002:"
# Patterns of plain scalars that are not text, and their possible first characters. Every other plain scalar is text.
SCALARS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+(?:_[0-9]+)*|0x[0-9a-fA-F]+|0o[0-7]+", "-+0123456789"),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
    "null": (r"~|null|Null|NULL|", "~nN"),
    "merge": (r"<<", "<"),
}


class Loader(yaml.SafeLoader):
    """A safe loader that refuses duplicate keys in a mapping, because the first value would be lost without notice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping of a node.

        Raises:
            yaml.constructor.ConstructorError: for a key that is given twice.
        """
        seen = set()
        for key, _ in node.value:
            if not isinstance(key.value, str) or key.tag == TAG + "merge":
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"'{key.value[:77]}' is there twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int:
        """Return an integer: decimal even with leading zeros, hexadecimal after 0x, octal after 0o."""
        text = node.value.replace("_", "")
        return int(text, 0) if text[1:2] in ("x", "o") else int(text)


class Dumper(yaml.SafeDumper):
    """A safe dumper that quotes text which a YAML 1.1 or a YAML 1.2 reader would take for another type."""


Loader.yaml_implicit_resolvers = {}  # without those of the base class
Loader.add_constructor(TAG + "int", Loader.construct_number)
for _tag, (_pattern, _letters) in SCALARS.items():
    for _kind in (Loader, Dumper):
        _kind.add_implicit_resolver(TAG + _tag, re.compile(f"^(?:{_pattern})$"), [*_letters] + [""] * (_tag == "null"))


def load(text: str) -> Any:
    """Return the value of a YAML text.

    Raises:
        yaml.YAMLError, ValueError, RecursionError: if the text is not valid.
    """
    return yaml.load(text, Loader)  # Loader is a SafeLoader


def dump(values: Any) -> str:
    """Return values as YAML text, in their order."""
    return yaml.dump(values, Dumper=Dumper, sort_keys=False)


def load_flag(text: str) -> Any:
    """Return the value of a flag's text: a number, true, false, null, a list in brackets or a mapping in braces; else the text.

    Text in quotes is returned without them, and other text as it is, even if YAML would read part of it as a comment.

    Raises:
        yaml.YAMLError, ValueError, RecursionError: if brackets, braces or quotes are not closed.
    """
    plain = text.strip()
    if plain[:1] in tuple("[{'\""):
        return load(plain)
    is_word = any(re.fullmatch(SCALARS[tag][0], plain) for tag in ("bool", "int", "float", "null"))
    return load(plain) if is_word else text
