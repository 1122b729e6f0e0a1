"""What every rank of a run must have alike, and the one line that says in what they differ."""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from largebatch.checkpoint.folder import MANIFEST
from largebatch.config.schema import Config
from largebatch.data.digest import HASHED, describe, is_same
from largebatch.distributed import name_ranks, resolve
from largebatch.errors import UserError, first_few
from largebatch.section import leaves

Shown = dict[str, Any]

# Where a node keeps the data and how many workers read it is its own affair.
OF_THE_NODE = ("data.path", "loader.num_workers", "loader.prefetch")
# Libraries that decide what a model is and what a sample looks like, by the module that shows whether they are in use.
LIBRARIES = ("torch", "numpy", "torchvision", "timm", "transformers", "deepspeed", "accelerate", "PIL")
# What is compared, in this order: a difference explains those that follow from it.
SECTIONS = {
    "config": ("the ranks were given different configs", "start every rank with one config and the same flags"),
    "versions": ("the ranks run different versions", "install the same ones on every node"),
    "code": ("the ranks run different code", "copy the same files to every node"),
    "data": (
        "the ranks hold different data",
        "every node needs the same samples in the same order, drawn from the run's seed if at all",
    ),
    "checkpoint": (
        "--resume: the ranks see different checkpoints",
        "the run folder must be on a file system all ranks share",
    ),
    "model": ("the ranks built different models", "a model has to come out the same in every process"),
}


def show_run(config: Config, resume: str, folder: Path | None) -> Shown:
    """Return the config with what was decided elsewhere, and the versions and the code that are in use.

    Args:
        config: the config.
        resume: what was asked for; where to is rank 0's to say.
        folder: the run folder, of which the same holds.

    Raises:
        UserError: for what `largebatch.distributed.resolve` refuses.
    """
    shown = dict(leaves(config.model_dump(mode="json") | {"backend": None}))
    shown |= leaves({"backend": resolve(config.backend, config.precision).model_dump(mode="json")})
    shown |= {"--resume": "never" if resume == "never" else "given", "--out": "none" if folder is None else "given"}
    return {"config": {key: value for key, value in shown.items() if key not in OF_THE_NODE}, **_show_code()}


def show_model(model: nn.Module) -> Shown:
    """Return the names, shapes and types of a model's tensors, and the code that is in use now."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    described = [f"{name} {list(t.shape)} {t.dtype} {t.requires_grad}" for name, t in tensors]
    shown = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "names and shapes of tensors": HASHED + _hash("\n".join(described).encode()),
    }
    return {"model": shown, **_show_code()}


def show_checkpoint(path: Path) -> Shown:
    """Return what tells a checkpoint from another of the same name, as each node may have on a disk of its own.

    Raises:
        UserError: if it is not there.
    """
    manifest = path / MANIFEST
    if not manifest.is_file():
        raise UserError(f"--resume: {path} is not there; the run folder must be on a file system all ranks share")
    return {"checkpoint": {str(path): _hash_file(str(manifest))}}


def _show_code() -> Shown:
    """Return the versions of libraries and hashes of the other modules that are loaded, by name."""
    known = {name: sys.modules[name] for name in LIBRARIES if name in sys.modules}
    versions = {name: str(getattr(module, "__version__", "unknown")) for name, module in known.items()}
    code = {}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if isinstance(file, str) and file.endswith(".py") and (_is_own(file) or name.split(".")[0] == "largebatch"):
            code[name] = _hash_file(file)
    return {"versions": versions, "code": code}


@cache
def _installed() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    return tuple({paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")})


def _is_own(file: str) -> bool:
    return os.path.isabs(file) and not file.startswith(_installed()) and "-packages" not in file


def _hash_file(file: str) -> str:
    try:
        return HASHED + _hash(Path(file).read_bytes())
    except OSError:
        return HASHED


def _hash(contents: bytes) -> str:
    return hashlib.blake2b(contents, digest_size=8).hexdigest()


def difference(shown: list[Shown]) -> str | None:
    """Return what differs between ranks in one line, None for nothing.

    Args:
        shown: of each rank, as `show_run` and `show_model` return it, with a digest of its data; a section that a rank lacks,
            because it failed before, is left out.
    """
    for section, (what, advice) in SECTIONS.items():
        found = _differences(section, {rank: dict(leaves(s[section])) for rank, s in enumerate(shown) if section in s})
        if found:
            return f"{what}: {first_few(found, most=4)}; {advice}"
    return None


def _differences(section: str, values: dict[int, Shown]) -> list[str]:
    if len(values) < 2:
        return []
    first, *others = values
    # A module that one rank alone has loaded, or a library, or what there was no time for, says nothing.
    keys = dict.fromkeys(key for own in values.values() for key in own)
    if section != "config":
        keys = {key: None for key in keys if all(key in own for own in values.values())}
    compare: Callable[..., bool] = is_same if section == "data" else _is_equal
    told: list[str] = []
    unnamed: dict[str, list[str]] = {}
    for key in keys:
        reference = values[first].get(key)
        differing = [rank for rank in others if not compare(values[rank].get(key), reference, key)]
        if not differing:
            continue
        here, there = describe(reference), describe(values[differing[0]].get(key))
        if here is None or there is None:
            unnamed.setdefault(name_ranks(differing), []).append(key)
        else:
            told.append(f"{key} is {here} on {name_ranks([first])}, {there} on {name_ranks(differing)}")
    for ranks, names in unnamed.items():
        verb = "differ" if ranks.startswith("ranks") else "differs"
        told.append(f"{ranks} {verb} from {name_ranks([first])} in {first_few(names, ', ', most=4)}")
    return told


def _is_equal(ours: Any, theirs: Any, _: str) -> bool:
    return bool(ours == theirs)
