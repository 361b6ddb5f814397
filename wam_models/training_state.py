"""What a resume needs beside a policy: named tensors, on any number of ranks, and values.

A folder of ``torch.distributed.checkpoint``, with ``values.json`` beside its files. Sharded tensors are written by the
ranks that hold them, and are read onto another number of ranks, or one, as well.
"""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from .runtime.json_fields import read_json

VALUES = "values.json"
_KEY = "tensors"  # under which all of them are: torch does some work for each key of the outermost

# a run in one process has no process group, as is right
warnings.filterwarnings("ignore", "torch.distributed is disabled")


@dataclass(frozen=True, eq=False)
class TrainingState:
    """To be written: tensors by name, and values for JSON.

    Args:
        tensors: By name; sharded ones on all ranks.
        values: Anything for JSON.
        group: Of the ranks that write together, on the CPU; None where one process writes alone.
    """

    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]
    group: dist.ProcessGroup | None = None

    def write(self, folder: Path) -> Future:
        """Writes to the folder, which must not be there; goes on in a thread, from copies of the tensors.

        Every rank of the group must call it. The future of the first is done when all have written.
        """
        writer = dcp.FileSystemWriter(folder, sync_files=True)
        found = dcp.async_save(
            {_KEY: dict(self.tensors)}, storage_writer=writer, process_group=self.group, no_dist=self.group is None
        )
        return cast(Future, found)


class SavedState:
    """A training state as it lies in a folder; the tensors are read when they have a place.

    Args:
        folder: Where it is.
        moves_to: Where it may be moved to meanwhile.

    Attributes:
        folder: Where it is.
        values: As they were given.
        sizes: Shape of each tensor.
        dtypes: Its dtype.

    Raises:
        ValueError: files that are missing, damaged or hold more than tensors and plain values; the message names them.
    """

    def __init__(self, folder: Path, moves_to: Path | None = None) -> None:
        self.folder, self._moves_to = folder, moves_to
        try:
            values = read_json(folder / VALUES)
        except OSError as error:
            raise ValueError(f"cannot read {folder / VALUES}: {error.strerror}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{folder / VALUES}: must hold an object, got {type(values).__name__}")
        self.values: dict[str, Any] = dict(values)
        self._held = values
        held = _Reader(folder).read_metadata().state_dict_metadata
        found = {name.removeprefix(f"{_KEY}."): cast(TensorStorageMetadata, entry) for name, entry in held.items()}
        self.sizes = {name: list(entry.size) for name, entry in found.items()}
        self.dtypes = {name: entry.properties.dtype for name, entry in found.items()}

    def read(self, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
        """Puts numbers into tensors of these names, which have the saved shapes, in place; on all ranks of a group.

        Raises:
            ValueError: the files are damaged, or of a later save by now.
        """
        places = {_KEY: dict(tensors)}
        try:
            dcp.load(places, storage_reader=_Reader(self.folder), process_group=group, no_dist=group is None)
        except (Exception, dcp.CheckpointException) as error:  # what is damaged can raise anything
            if self._moves_to is not None and not self.folder.exists():
                self.folder, self._moves_to = self._moves_to, None
                return self.read(tensors, group)
            raise ValueError(f"cannot read {self.folder}: {_first_reason(error)}") from error
        if self._held not in self._values_now():
            raise ValueError(f"{self.folder} was replaced while it was read; read it again")

    def _values_now(self) -> Iterator[Any]:
        for folder in (self.folder, self._moves_to):
            with suppress(OSError, ValueError):
                if folder is not None:
                    yield read_json(folder / VALUES)

    def held(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Some of the tensors, whole, on the CPU.

        Raises:
            ValueError: as :meth:`read`.
        """
        found = {name: torch.empty(self.sizes[name], dtype=self.dtypes[name]) for name in names}
        self.read(found)
        return found


def write_values(folder: Path, values: Mapping[str, Any]) -> None:
    (folder / VALUES).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _first_reason(error: BaseException) -> str:
    """What went wrong first, on whichever rank."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


class _Reader(dcp.FileSystemReader):
    """Reads a pickle of sizes and places alone: another could run what is in it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            with path.open("rb") as file:
                found = _Unpickler(file).load()
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}") from error
        except Exception as error:  # of a damaged file it can be any
            raise ValueError(f"cannot read {path}: {type(error).__name__}: {error}") from error
        entries = getattr(found, "state_dict_metadata", None)
        if not isinstance(entries, dict) or not all(isinstance(e, TensorStorageMetadata) for e in entries.values()):
            raise ValueError(f"cannot read {path}: it holds more than tensors")
        if found.storage_meta is None:
            found.storage_meta = StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class _Unpickler(pickle.Unpickler):
    NAMES = {
        "torch.distributed.checkpoint.metadata": {
            "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "TensorProperties",
            "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.serialization": {"_get_layout"},
        "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
        "pathlib": {"PosixPath"},
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if name in self.NAMES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds more than tensors and plain values, {module}.{name}")
