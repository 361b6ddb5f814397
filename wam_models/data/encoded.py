"""Latents and text embeddings on disk: encoded once, read by every training.

A folder holds ``encoded.json`` (the codec, what was encoded), ``codec.safetensors``, ``objects/`` (one ``.npy`` file of
each content) and ``episodes/`` (which object each episode is). Every file is written whole or not at all, and is named
by what it holds, so that processes can share the work, and a run that was killed goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from ..runtime.files import new_file
from ..runtime.json_fields import read_json
from .clips import episode_frames
from .codec import Codec, SavedCodec
from .latents import CODECS, codec_kind
from .source import Source

ENCODED, CODEC, TEXTS = "encoded.json", "codec.safetensors", "texts.json"


class EncodedLatents:
    """The latents of a data set that ``wam encode`` wrote.

    Args:
        folder: Where they are.

    Raises:
        ValueError: no such folder, or a file of it that is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / ENCODED).exists():
            raise ValueError(f"{self.folder / ENCODED}: not found; name a folder that wam encode wrote")
        self.settings: dict[str, Any] = read_json(self.folder / ENCODED)
        if not isinstance(self.settings, dict) or not {"codec", "source", "actions_per_frame"} <= set(self.settings):
            raise ValueError(f"{self.folder / ENCODED}: must hold codec, source and actions_per_frame; encode again")

    @cached_property
    def codec(self) -> SavedCodec:
        """The codec that made them, its weights read from the folder."""
        kind = self.settings["codec"]
        try:
            state = safetensors.torch.load_file(self.folder / CODEC)
            return CODECS[kind["kind"]].from_state_dict(state, kind["config"])
        except (OSError, KeyError, safetensors.SafetensorError) as error:
            raise ValueError(f"{self.folder / CODEC}: cannot be read ({error}); encode again") from error

    def check(self, dataset: Source, actions_per_frame: int, codec: Codec | None = None) -> None:
        """Whether these are latents of this data set as it is now, of so many actions a frame, and of this codec.

        Raises:
            ValueError: they are not; the message names what differs.
        """
        if codec is not None and self.settings["codec"] != description(cast(SavedCodec, codec)):
            raise ValueError(f"{self.folder}: was encoded by another codec than the policy's; run wam encode with that")
        now = source_of(dataset)
        for name, held, wanted in (
            *((name, self.settings["source"].get(name), now[name]) for name in now),
            ("actions_per_frame", self.settings["actions_per_frame"], actions_per_frame),
        ):
            if held != wanted:
                raise ValueError(
                    f"{self.folder}: was encoded with {name} {held!r}, but {dataset.root} is now to be read with "
                    f"{wanted!r}; run wam encode again, into another folder"
                )

    def episode(self, number: int) -> OnDisk:
        """The latents ``[C, F, h, w]`` of an episode, read where they are sliced.

        Raises:
            ValueError: it was not encoded yet.
        """
        path = self.folder / f"episodes/{number:06d}.json"
        if not path.exists():
            raise ValueError(f"{path}: not found, so episode {number} is not encoded yet; run wam encode again")
        entry = read_json(path)
        return OnDisk(object_path(self.folder, entry["key"]), tuple(entry["shape"]))


class OnDisk:
    """An array in a file: ``array[...]`` reads no more than it returns, and holds no file open.

    Args:
        path: The ``.npy`` file.
        shape: Of the array.
    """

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        self.path, self.shape = path, shape

    def __getitem__(self, place: Any) -> np.ndarray:
        try:
            held = np.load(self.path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.path}: cannot be read ({error}); remove it and run wam encode again") from error
        if held.shape != self.shape:
            raise ValueError(f"{self.path}: holds {held.shape}, expected {self.shape}; remove it and encode again")
        return np.array(held[place])


def source_of(dataset: Source) -> dict[str, Any]:
    """What the frames of a data set come from: its metadata's contents, its files' sizes, and its cameras."""
    hashed = hashlib.blake2b(digest_size=16)
    for path in sorted(p for p in (dataset.root / "meta").rglob("*") if p.is_file()):
        hashed.update(path.read_bytes())
    for path in sorted(p for p in dataset.root.rglob("*") if p.is_file()):
        hashed.update(f"{path.relative_to(dataset.root)} {path.stat().st_size}\n".encode())
    return {"files": hashed.hexdigest(), "camera": dataset.camera, "picture_size": list(dataset.picture_size)}


def encode_dataset(
    dataset: Source,
    codec: SavedCodec,
    out: str | Path,
    *,
    actions_per_frame: int,
    part: int = 0,
    parts: int = 1,
    progress: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> tuple[int, int]:
    """Write the latents of every ``parts``-th episode, from number ``part`` on, that are not in the folder yet.

    They are those that a training would compute (``episode_frames``), bit for bit.

    Args:
        dataset: What to encode.
        codec: One of ``wam_models.data.latents.CODECS``; it is written too.
        out: The folder; another run's, of the same data set and codec, goes on.
        actions_per_frame: Actions from one latent frame to the next.
        part: Of the work, from 0.
        parts: Processes that share it.
        progress: Called with the numbers of the episodes and returning them, such as tqdm.

    Returns:
        How many episodes were encoded, and how many were there already.

    Raises:
        ValueError: a folder of another data set or codec, or what the reader and the codec raise.
        OSError: no room, or no right to write.
    """
    out = Path(out)
    state = {name: tensor.contiguous() for name, tensor in codec.state_dict().items()}
    made_by = description(codec)
    settings = {"codec": made_by, "source": source_of(dataset), "actions_per_frame": actions_per_frame}
    if (out / ENCODED).exists():
        held = EncodedLatents(out)
        if held.settings["codec"] != settings["codec"]:
            raise ValueError(f"{out}: holds latents of another codec; name another folder")
        held.check(dataset, actions_per_frame)
    else:
        with new_file(out / CODEC) as part_file:
            part_file.write_bytes(safetensors.torch.save(state))
        with new_file(out / ENCODED) as part_file:
            part_file.write_text(json.dumps(settings, indent=1) + "\n")
    done = kept = 0
    for number in progress(range(part, len(dataset.episodes), parts)):
        entry = out / f"episodes/{number:06d}.json"
        if entry.exists() and object_path(out, read_json(entry)["key"]).exists():
            kept += 1
            continue
        frames = np.ascontiguousarray(episode_frames(dataset, number, codec, actions_per_frame))
        key = key_of(made_by["weights"], json.dumps(made_by["config"], sort_keys=True), str(frames.shape), frames.data)
        if (path := object_path(out, key)).exists():
            shape = np.load(path, mmap_mode="r").shape
        else:
            latents = codec.encode(frames).numpy()
            shape = latents.shape
            with new_file(path) as part_file:
                np.save(part_file, np.ascontiguousarray(latents))
        with new_file(entry) as part_file:
            part_file.write_text(json.dumps({"key": key, "shape": list(shape)}))
        done += 1
    return done, kept


def description(codec: SavedCodec) -> dict[str, Any]:
    """What tells a codec from others, as JSON gives it back."""
    found = {"kind": codec_kind(codec), "config": codec.config, "weights": digest_of(codec.state_dict())}
    return json.loads(json.dumps(found))


def encode_texts(
    instructions: Iterable[str], encoder: Callable[[Sequence[str]], Tensor], made_by: str, out: str | Path
) -> int:
    """Write the embeddings of instructions that are not in the folder yet, and ``texts.json``; return how many.

    Args:
        instructions: Any; each is encoded by itself.
        encoder: As :func:`wam_models.text.umt5_encoder` makes one.
        made_by: What tells this encoder from others; see :func:`folder_digest`.
        out: The folder.

    Raises:
        ValueError: a folder of another encoder.
        OSError: no room, or no right to write.
    """
    if (Path(out) / TEXTS).exists() and encoder_of(out) != made_by:
        raise ValueError(f"{out}: holds texts of another encoder; name another folder")
    with new_file(Path(out) / TEXTS) as part_file:
        part_file.write_text(json.dumps({"made_by": made_by}) + "\n")
    written = 0
    for text in dict.fromkeys(instructions):
        path = object_path(Path(out), key_of(made_by, text))
        if not path.exists():
            with new_file(path) as part_file:
                np.save(part_file, encoder([text])[0].float().cpu().numpy())
            written += 1
    return written


def encoder_of(folder: str | Path) -> str:
    """What tells the encoder of a folder's texts from others.

    Raises:
        ValueError: no folder of :func:`encode_texts`.
    """
    path = Path(folder) / TEXTS
    if not path.exists():
        raise ValueError(f"{path}: not found; name a folder that wam encode --text wrote")
    held = read_json(path)
    if not isinstance(held, dict) or not isinstance(held.get("made_by"), str):
        raise ValueError(f"{path}: must hold made_by, got {held!r}; run wam encode --text again")
    return held["made_by"]


def holds_text(instruction: str, folder: str | Path) -> bool:
    """Whether a folder of :func:`encode_texts` has an instruction."""
    return object_path(Path(folder), key_of(encoder_of(folder), instruction)).exists()


def read_texts(instructions: Iterable[str], folder: str | Path) -> dict[str, Tensor]:
    """The embeddings ``[L, D]`` of instructions that :func:`encode_texts` wrote.

    Raises:
        ValueError: one that is not there, or cannot be read.
    """
    found, made_by = dict[str, Tensor](), encoder_of(folder)
    for text in dict.fromkeys(instructions):
        path = object_path(Path(folder), key_of(made_by, text))
        if not path.exists():
            raise ValueError(f"{path}: not found, so {text!r} is not encoded yet; run wam encode --text again")
        try:
            found[text] = torch.from_numpy(np.load(path))
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path}: cannot be read ({error}); remove it and run wam encode --text again") from error
    return found


def folder_digest(folder: str | Path) -> str:
    """Of the names and contents of a folder's files: what tells an encoder's weights from others."""
    hashed = hashlib.blake2b(digest_size=16)
    for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
        hashed.update(str(path.relative_to(folder)).encode())
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                hashed.update(block)
    return hashed.hexdigest()


def digest_of(state: Mapping[str, Tensor]) -> str:
    """Of tensors: names, dtypes, shapes and contents."""
    hashed = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(state.items()):
        hashed.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        hashed.update(cast(Any, tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()).data)
    return hashed.hexdigest()


def key_of(*contents: Any) -> str:
    """The name of what is made of these texts and buffers."""
    hashed = hashlib.blake2b(digest_size=20)
    for content in contents:
        content = content.encode() if isinstance(content, str) else content
        hashed.update(len(content).to_bytes(8, "little"))
        hashed.update(content)
    return hashed.hexdigest()


def object_path(folder: Path, key: str) -> Path:
    """Where the array of a key is."""
    return folder / "objects" / key[:2] / f"{key}.npy"
