"""Folders of weights as other systems have them: safetensors, in shards or not, and diffusers' config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ..config import ModelConfig
from ..runtime.checks import choice, whole, writable_folder
from ..runtime.json_fields import read_json
from ..weight_files import INDEX, read_weights
from .layouts import LAYOUTS

CONFIG = "config.json"
SHARD_BYTES = 5 * 10**9
# diffusers' config.json: their field, ours
_FIELDS = {
    "num_attention_heads": "heads",
    "attention_head_dim": "head_dim",
    "num_layers": "layers",
    "ffn_dim": "ffn",
    "in_channels": "latent_channels",
    "out_channels": "latent_channels",
    "text_dim": "text_dim",
    "freq_dim": "freq_dim",
    "patch_size": "patch",
    "eps": "eps",
}
# what our model always has, whatever a config.json of diffusers may say
_FIXED = {"cross_attn_norm": True, "qk_norm": "rms_norm_across_heads"}
_CLASS = "WanTransformer3DModel"  # of both systems that write a config.json
_WITH_CONFIG = ("diffusers", "lingbot_va")


def read_folder(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a file, an index of shards or a folder, and sizes that a config.json beside them tells.

    Returns:
        The tensors by name, as :func:`wam_models.read_weights`, and fields for ``sizes_from``: of a config.json of
        diffusers ``head_dim``, ``patch`` and ``eps``, else none.

    Raises:
        ValueError: what ``read_weights`` refuses, torch pickles among it, and a config.json of diffusers with norms
            that our model does not have.
    """
    path = Path(path)
    state = read_weights(path)
    config_file = (path if path.is_dir() else path.parent) / CONFIG
    found = read_json(config_file) if config_file.is_file() else {}
    if not isinstance(found, dict) or found.get("_class_name") != _CLASS:
        return state, {}
    for name, value in _FIXED.items():
        if found.get(name, value) != value:
            raise ValueError(f"{config_file}: {name} must be {value!r}, which our model has, got {found[name]!r}")
    told = {_FIELDS[name]: found[name] for name in ("attention_head_dim", "patch_size", "eps") if name in found}
    return state, told


def write_folder(
    path: str | Path,
    layout: str,
    state: Mapping[str, Tensor],
    config: ModelConfig,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write what ``weights_to`` gave, as the system's own loader finds it: safetensors, in shards where it is large.

    Args:
        path: A folder, new or empty.
        layout: Of the keys; ``diffusers`` and ``lingbot_va`` get their config.json.
        state: Their tensors by name.
        config: Sizes of the model.
        shard_bytes: Most bytes of a file; a larger tensor has a file of its own.

    Raises:
        ValueError: a folder with something in it, or an unknown layout.
        OSError: no room.
    """
    path, table = Path(path), LAYOUTS[choice("write_folder: layout", layout, LAYOUTS)]
    whole("write_folder: shard_bytes", shard_bytes, 1)
    writable_folder("write_folder: path", path)
    if path.exists() and any(path.iterdir()):
        raise ValueError(f"write_folder: {path} must be new or empty, got {sorted(f.name for f in path.iterdir())[:3]}")
    path.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    room = shard_bytes
    for key, value in state.items():
        if value.nbytes > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][key] = value.detach().cpu().contiguous()
        room -= value.nbytes
    numbered = [f"{table.file}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    names = numbered if len(shards) > 1 else [f"{table.file}.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, path / name, {"format": "pt"})
    if len(shards) > 1:
        where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        index = {"metadata": {"total_size": sum(value.nbytes for value in state.values())}, "weight_map": where}
        (path / f"{table.file}.safetensors{INDEX}").write_text(json.dumps(index, indent=1) + "\n")
    if layout in _WITH_CONFIG:
        sizes = config.to_dict()
        settings = {"_class_name": _CLASS, "cross_attn_norm": True} | {n: sizes[ours] for n, ours in _FIELDS.items()}
        if layout == "lingbot_va":
            settings["action_dim"] = config.action_dim
        else:
            settings |= _FIXED
        (path / CONFIG).write_text(json.dumps(settings, indent=1) + "\n")
