"""The state of a run by name, written to disk and read back with torch.distributed.checkpoint.

Every tensor has the same name on every engine: ``model.NAME`` as in the model's own state_dict, and ``optimizer.NAME.SLOT``
for the slots of parameter NAME. Tensors are whole, or DTensors of which each rank writes its shard; they are resharded when
they are read. So a checkpoint can be loaded on any number of ranks and by any engine.
"""

from __future__ import annotations

import os
import random
import re
import warnings
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from largebatch.distributed.reading import INDEX, read_index, read_into
from largebatch.distributed.watch import cause_of
from largebatch.errors import UserError
from largebatch.moments import is_shadow
from largebatch.optim import is_shadow_group

MODEL, OPTIMIZER, RANDOM = "model.", "optimizer.", "random."


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if not is_shadow(p)}


def named_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the model's and the optimizer's tensors by name; they share memory with the originals."""
    state = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise UserError(f"model: '{name}' of its state_dict is no tensor, which a checkpoint cannot hold")
        state[MODEL + name] = value.detach()
    for name, parameter in _trained(model).items():
        for slot, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor | float):
                state[f"{OPTIMIZER}{name}.{slot}"] = slot_tensor(value)
    return state


def slot_tensor(value: Tensor | float) -> Tensor:
    """Return a slot of an optimizer's state in its checkpoint format: a count becomes a 0-dimensional tensor."""
    return value.detach() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)


def slot_value(optimizer: torch.optim.Optimizer, slot: str, saved: Tensor) -> Tensor | float:
    """Convert a slot from its checkpoint format (`slot_tensor`) to the form that the optimizer keeps."""
    return float(saved) if slot in getattr(optimizer, "count_names", ()) else saved


def group_state(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return the parameter groups without their parameters: hyper-parameters and counts of updates."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def load_group_state(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> None:
    """Load the counts that `group_state` returned; hyper-parameters come from the config and the schedule.

    A run that branches off may track squares if the original run did not, or the reverse: groups of shadows then take the
    counts of the group that follows them, or are dropped.

    Raises:
        UserError: if the number of parameter groups differs.
    """
    of_the_run = {*optimizer.defaults, "role", "used", "adapted"}
    own = optimizer.param_groups
    if len(own) != len(groups):
        trained = [saved for saved in groups if not is_shadow_group(saved)]
        places = [index for index, group in enumerate(own) if not is_shadow_group(group)]
        if len(trained) == 1:  # the parameters formed one group in the checkpoint
            trained *= len(places)
        if len(trained) != len(places):
            raise UserError(
                f"--resume: the checkpoint has {len(trained)} groups of parameters, this run {len(places)}; "
                "weight_decay and decay_norm_and_bias say how many there are"
            )
        # The first trained group at or after each place.
        groups = [trained[bisect_left(places, index)] for index in range(len(own))]
    for group, saved in zip(own, groups, strict=True):
        group.update({key: value for key, value in saved.items() if key not in of_the_run})


def random_state(rank: int) -> dict[str, Tensor]:
    """Return the states of this rank's random number generators (torch, its GPU, numpy, Python), by name."""
    _, keys, position, has_gauss, gauss = np.random.get_state()
    _, words, next_gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.array(keys, dtype=np.int64)),
        "numpy_rest": torch.tensor([position, has_gauss, gauss], dtype=torch.float64),
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor(float("nan") if next_gauss is None else next_gauss, dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return {f"{RANDOM}{rank}.{name}": value for name, value in state.items()}


def load_random_state(path: Path, rank: int) -> None:
    """Restore this rank's generators; they keep their state if the checkpoint has none for this rank."""
    prefix = f"{RANDOM}{rank}."
    names = [name for name in tensor_metadata(path) if name.startswith(prefix)]
    saved = {name.removeprefix(prefix): value for name, value in read_tensors(path, names).items()}
    if not saved:
        return
    torch.set_rng_state(saved["torch"])
    position, has_gauss, gauss = saved["numpy_rest"].tolist()
    np.random.set_state(("MT19937", saved["numpy"].numpy().astype(np.uint32), int(position), int(has_gauss), gauss))
    gauss = float(saved["python_gauss"])
    random.setstate((3, tuple(saved["python"].tolist()), None if gauss != gauss else gauss))
    if "cuda" in saved and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["cuda"])


class _Writer(dcp.FileSystemWriter):
    """A writer that replaces exceptions by a RuntimeError: not all can be pickled for the other ranks, which wait for them."""

    def write_data(self, *arguments: Any) -> Any:
        """Write this rank's tensors and shards."""
        try:
            return super().write_data(*arguments)
        except BaseException as error:
            raise RuntimeError(cause_of(error)) from None


def write_tensors(path: Path, state: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """Write tensors into an existing folder; a collective in which each rank of the group writes its part.

    Args:
        path: the folder, on a file system that all ranks share.
        state: tensors by name; a tensor that all ranks have is written by one of them.
        group: process group whose ranks write; None for this process only.
    """
    writer = _Writer(path, overwrite=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of a single process, which is intended
        dcp.save(dict(state), storage_writer=writer, process_group=group, no_dist=group is None)


def tensor_metadata(path: Path) -> dict[str, TensorStorageMetadata]:
    """Return the metadata (shape, dtype) of every tensor in a checkpoint, by name."""
    try:
        changed = (path / INDEX).stat().st_mtime_ns
    except OSError as error:
        raise UserError(f"{path}: its index {INDEX} is not read: {error.strerror}") from error
    return dict(_tensor_metadata(path, changed))


@lru_cache(maxsize=1)  # called repeatedly while one checkpoint is read
def _tensor_metadata(path: Path, _: int) -> dict[str, TensorStorageMetadata]:
    entries = read_index(path).state_dict_metadata
    return {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def _fill(path: Path, state: dict[str, Tensor]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read_into(path, state)


def read_tensors(path: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Return whole tensors of a checkpoint, in CPU memory."""
    metadata = tensor_metadata(path)
    state = {name: torch.empty(metadata[name].size, dtype=metadata[name].properties.dtype) for name in names}
    if state:
        _fill(path, state)
    return state


def check_names(path: Path, model: nn.Module) -> None:
    """Raise if a checkpoint is of another model.

    Raises:
        UserError: naming the first difference.
    """
    saved = {n.removeprefix(MODEL): tuple(m.size) for n, m in tensor_metadata(path).items() if n.startswith(MODEL)}
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for name in [*saved, *own]:
        if saved.get(name) != own.get(name):
            here, there = (f"{name} {shapes[name]}" if name in shapes else f"no {name}" for shapes in (own, saved))
            raise UserError(f"{path}: another model: the checkpoint has {there}, the config's model has {here}")


def load_named_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load a checkpoint, from any engine and any number of ranks, into a model and its optimizer.

    Raises:
        UserError: if the checkpoint is of another model; nothing is changed then.
    """
    check_names(path, model)
    metadata = tensor_metadata(path)
    state = {MODEL + name: value.detach() for name, value in model.state_dict().items()}
    slots: dict[nn.Parameter, dict[str, Tensor]] = {}
    for name, parameter in _trained(model).items():
        prefix = f"{OPTIMIZER}{name}."
        for key in [key for key in metadata if key.startswith(prefix) and "." not in key[len(prefix) :]]:
            size, dtype = metadata[key].size, metadata[key].properties.dtype
            # A slot with the parameter's shape has its layout (and sharding).
            whole = torch.Size(size) == parameter.shape
            value = torch.zeros_like(parameter, dtype=dtype) if whole else torch.zeros(size, dtype=dtype)
            state[key] = value.detach()
            slots.setdefault(parameter, {})[key[len(prefix) :]] = state[key]
    _fill(path, state)
    optimizer.state.clear()  # including parameters that had no state yet in the checkpoint
    for parameter, values in slots.items():
        optimizer.state[parameter].update({slot: slot_value(optimizer, slot, value) for slot, value in values.items()})


def export_weights(checkpoint: Path, path: Path) -> None:
    """Write the model of a checkpoint of any engine to a safetensors file, with the names of its state_dict.

    Args:
        checkpoint: the checkpoint.
        path: the file; it is written under a temporary name in the same folder, and renamed.

    Raises:
        OSError: if it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    names = [name for name in tensor_metadata(checkpoint) if name.startswith(MODEL)]
    weights = {name.removeprefix(MODEL): value for name, value in read_tensors(checkpoint, names).items()}
    beside = path.with_name(path.name + ".part")
    try:
        save_file(weights, beside, {"format": "pt"})
        umask = os.umask(0)  # safetensors makes the file readable only by the user, whatever the umask
        os.umask(umask)
        beside.chmod(0o666 & ~umask)
        beside.replace(path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        code = re.search(r"code: (\d+)", str(error)) if isinstance(error, SafetensorError) else None
        if code is None:
            raise error if isinstance(error, OSError) else OSError(0, str(error)) from error
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from error
