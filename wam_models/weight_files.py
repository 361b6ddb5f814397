"""Safetensors files of weights, single and sharded."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .runtime.json_fields import read_json
from .state_dicts import abridged

SAVE_ID = "save_id"  # entry of a file that save_checkpoint wrote, see there
INDEX = ".index.json"  # ends the name of a list of shards, behind that of the file which they are in place of

_PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".pkl")


def read_weights(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Tensors of a ``.safetensors`` file, of the shards that a ``.safetensors.index.json`` lists, or of a folder.

    A folder must hold one index, or else one file.

    Raises:
        ValueError: nothing or several to read, a torch pickle, a damaged file, shards that are missing, lie elsewhere,
            or hold other tensors than the index says; the message names the file.
    """
    path = Path(path)
    _refuse_pickles(path)
    if path.is_dir():
        found = sorted(path.glob(f"*.safetensors{INDEX}")) or sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            raise ValueError(
                f"read_weights: {path} must hold one index of shards or one .safetensors file, got "
                f"{abridged([file.name for file in found])}; name the file to read"
            )
        path = found[0]
    return read_tensors(path, device)[0]


def _refuse_pickles(path: Path) -> None:
    """Reading a pickle runs what is in it."""
    inside = sorted(path.iterdir()) if path.is_dir() and not any(path.glob("*.safetensors")) else [path]
    pickled = [file for file in inside if file.suffix in _PICKLED]
    if pickled:
        raise ValueError(
            f"read_weights: {pickled[0]} is a torch pickle, which is not read, since that can run code; where it is "
            "from, save its tensors with safetensors.torch.save_file(torch.load(path, weights_only=True), ...), each "
            "under its name"
        )


def read_tensors(path: Path, device: torch.device | str) -> tuple[dict[str, Tensor], str | None]:
    """As :func:`read_weights` of a file, and the id of the save that it belongs to, None where there is none."""
    if path.name.endswith(INDEX):
        return _read_shards(path, device)
    before = stamp(path)
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"cannot read {path}: {type(error).__name__}: {reason}") from error
    # the file is opened twice in there, for names and for numbers
    if stamp(path) != before:
        raise ValueError(f"{path} was replaced while it was read; read it again")
    return tensors, metadata.get(SAVE_ID)


def _read_shards(index: Path, device: torch.device | str) -> tuple[dict[str, Tensor], str | None]:
    try:
        listed = read_json(index)
    except OSError as error:
        raise ValueError(f"cannot read {index}: {error.strerror}") from error
    where = listed.get("weight_map") if isinstance(listed, dict) else None
    if not isinstance(where, dict) or not where:
        raise ValueError(f"{index}: must hold a weight_map from names of tensors to files")
    outside = [name for name in where.values() if not isinstance(name, str) or Path(name).name != name]
    if outside:
        raise ValueError(f"{index}: weight_map must name files beside it, got {abridged(outside)}")
    shards = sorted(set(where.values()))
    missing = [name for name in shards if not (index.parent / name).is_file()]
    if missing:
        raise ValueError(
            f"{index}: {len(missing)} of {len(shards)} shards are missing, {abridged(missing)}; fetch them too"
        )
    tensors: dict[str, Tensor] = {}
    ids = set()
    for name in shards:
        held, save_id = read_tensors(index.parent / name, device)
        expected = {key for key, shard in where.items() if shard == name}
        if set(held) != expected:
            raise ValueError(
                f"{index.parent / name}: holds other tensors than {index.name} says: "
                f"lacks {abridged(sorted(expected - set(held)))}, has {abridged(sorted(set(held) - expected))} besides"
            )
        tensors |= held
        ids.add(save_id)
    if len(ids) > 1:
        raise ValueError(
            f"{index}: its shards are of different saves, {abridged(sorted(map(str, ids)))}; take all from one"
        )
    return tensors, ids.pop()


def stamp(path: Path) -> tuple[int, int] | None:
    """Changes when the file is replaced."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns
