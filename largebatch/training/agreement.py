"""Comparison of what all ranks of a run must have in common, with a one-line description of the first difference."""

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

# Each node may choose where it keeps the data and how many workers read it.
OF_THE_NODE = ("data.path", "loader.num_workers", "loader.prefetch")
# Libraries that determine what a model is and what a sample looks like, named by the module that is loaded if they are in use.
LIBRARIES = ("torch", "numpy", "torchvision", "timm", "transformers", "deepspeed", "accelerate", "PIL")
# The sections that are compared, in this order, because a difference in one section can cause differences in later ones.
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
    """Return the resolved config, and the versions and the code that are in use.

    Args:
        config: the config.
        resume: the value of ``--resume``. Only whether it is ``never`` is compared, because rank 0 chooses the checkpoint.
        folder: the run folder. Only whether it is given is compared, for the same reason.

    Raises:
        UserError: if `largebatch.distributed.resolve` refuses the backend or the precision.
    """
    shown = dict(leaves(config.model_dump(mode="json") | {"backend": None}))
    shown |= leaves({"backend": resolve(config.backend, config.precision).model_dump(mode="json")})
    shown |= {"--resume": "never" if resume == "never" else "given", "--out": "none" if folder is None else "given"}
    return {"config": {key: value for key, value in shown.items() if key not in OF_THE_NODE}, **_show_code()}


def show_model(model: nn.Module) -> Shown:
    """Return the names, shapes and types of a model's tensors, and the versions and the code that are in use now."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    described = [f"{name} {list(t.shape)} {t.dtype} {t.requires_grad}" for name, t in tensors]
    shown = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "names and shapes of tensors": HASHED + _hash("\n".join(described).encode()),
    }
    return {"model": shown, **_show_code()}


def show_checkpoint(path: Path) -> Shown:
    """Return a hash of a checkpoint's manifest, because nodes may have different checkpoints of the same name on local disks.

    Raises:
        UserError: if the checkpoint does not exist on this rank.
    """
    manifest = path / MANIFEST
    if not manifest.is_file():
        raise UserError(f"--resume: {path} is not there; the run folder must be on a file system all ranks share")
    return {"checkpoint": {str(path): _hash_file(str(manifest))}}


def _show_code() -> Shown:
    """Return library versions, and hashes of the loaded modules that are largebatch's or not installed, by name."""
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
    """Return one line that describes the difference between ranks, or None if there is none.

    Args:
        shown: for each rank, the result of `show_run` and `show_model`, with a digest of its data. A section that a rank lacks,
            because the rank failed earlier, is not compared.
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
    # Except in the config, compare only keys that all ranks have: a rank may load other modules, or run out of time for a hash.
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
