"""Safe reading of checkpoints from untrusted sources: only tensors are read.

torch.distributed.checkpoint stores its index as a pickle, which can call any function while it is loaded, and it also loads
entries other than tensors as pickles. Here the index may name only the classes of which an index of tensors consists, and
every entry must be a tensor in a file of the same folder.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    Metadata,
    StorageMeta,
    TensorStorageMetadata,
)

from largebatch.errors import UserError

INDEX = ".metadata"
_METADATA, _STORAGE = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
_CLASSES = "Metadata MetadataIndex StorageMeta TensorStorageMetadata ChunkStorageMetadata TensorProperties _MEM_FORMAT_ENCODING"
_NAMES = {(_METADATA, name) for name in _CLASSES.split()}
_NAMES |= {(_STORAGE, "_StorageInfo"), ("torch", "Size"), ("torch.serialization", "_get_layout")}
_NAMES |= {(module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "PurePosixPath")}


def _member_of(encoding: Any, name: str) -> Any:
    """Return a member of the memory format enumeration of an index; Python before 3.11.4 pickles it as a call of getattr."""
    if encoding is not _MEM_FORMAT_ENCODING or name not in _MEM_FORMAT_ENCODING.__members__:
        raise pickle.UnpicklingError("it names builtins.getattr for something else than a memory format")
    return _MEM_FORMAT_ENCODING[name]


class _Index(pickle.Unpickler):
    """An unpickler that resolves only a closed list of names."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the object with the given name, if an index of tensors may contain it.

        Raises:
            pickle.UnpicklingError: for every other name.
        """
        if (module, name) == ("builtins", "getattr"):
            return _member_of
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) not in _NAMES and not is_dtype:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no index of tensors has")
        return super().find_class(module, name)


class TensorReader(dcp.FileSystemReader):
    """torch.distributed.checkpoint's FileSystemReader, restricted to tensors."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Return the index.

        Raises:
            UserError: if it cannot be read, or if it has entries other than tensors in this folder.
        """
        metadata = read_index(Path(self.path))
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def read_index(path: Path) -> Metadata:
    """Return the index of a checkpoint.

    Raises:
        UserError: see `TensorReader.read_metadata`.
    """
    try:
        with (path / INDEX).open("rb") as file:
            metadata = _Index(file).load()
        if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
            raise TypeError("it is no index")
        for name, entry in metadata.state_dict_metadata.items():
            if not isinstance(name, str) or not isinstance(entry, TensorStorageMetadata):
                raise TypeError(f"its entry {str(name)[:80]!r} is no tensor")
        for info in metadata.storage_data.values():
            inside = Path(info.relative_path)
            if inside.name != str(info.relative_path) or getattr(info, "transform_descriptors", None):
                raise TypeError(f"it points to {str(info.relative_path)[:80]!r}, not to a file of tensors beside it")
    except Exception as error:
        reason = getattr(error, "strerror", None) or f"{error or type(error).__name__}"
        raise UserError(f"{path}: its index {INDEX} is not read: {reason}") from error
    return metadata


def read_into(path: Path, state: dict[str, torch.Tensor]) -> None:
    """Read tensors (plain ones or DTensors) from a checkpoint in place; of a DTensor each rank reads its own shard.

    Raises:
        UserError: if a tensor cannot be read.
    """
    try:
        dcp.load(state, storage_reader=TensorReader(path), no_dist=True)
    except CheckpointException as error:  # derived from BaseException
        causes = [failure for failure, _ in error.failures.values()]
        cause = causes[0] if causes else error
        raise UserError(
            f"{path}: cannot be read ({type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else ''})"
        ) from error
