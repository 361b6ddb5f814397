"""The folder that a training run leaves behind, and how it is written such that it is never half."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException

from .config import ModelConfig
from .model.dual_expert import WorldActionModel
from .runtime.json_fields import read_json
from .state_dicts import abridged, bare_names, check_finite, load_weights, not_here
from .text import FrozenText, Text, WordEmbedding
from .training_state import VALUES, SavedState, TrainingState, write_values
from .weight_files import INDEX, SAVE_ID, read_tensors, stamp

MODEL, CONFIG, EXTRA, TRAINING = "model.safetensors", "config.json", "extra.safetensors", "training"
WORDS, FROZEN = ("vocabulary", "text_tokens"), ("instructions", "text_tokens", "text_encoder")  # of a config.json
_TEXT_KEY = "text."  # prefix of the word embedding's tensors among the extra tensors

# Every file of a save holds the save's id, drawn anew each time: 16 hexadecimal digits. A save writes all its files to
# the subfolder <id>.part and then puts its config.json in place of the old one. That one rename makes it the
# checkpoint: a reader takes the files that still lie in the subfolder that config.json names from there.
_ID = re.compile(r"[0-9a-f]{16}")


@dataclass
class Checkpoint:
    """What :func:`load_checkpoint` finds; ``save_id`` is None in a folder that an older version wrote."""

    model: WorldActionModel
    text: Text | None
    extra: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict = field(default_factory=dict)
    training_state: SavedState | None = None
    folder: Path | None = None
    save_id: str | None = None


def save_checkpoint(
    folder: str | Path | Save,
    model: WorldActionModel,
    *,
    text: Text | None = None,
    extra: Mapping[str, Tensor] | None = None,
    metadata: dict | None = None,
    training_state: TrainingState | None = None,
) -> None:
    """Write ``model.safetensors``, ``config.json``, ``extra.safetensors`` and, if given, ``training/`` to ``folder``.

    Whenever it stops (an error, a full disk, a kill, a power cut), the folder holds all of the earlier save or all of
    this one, and so it does for whoever reads meanwhile. That takes room for both. Other files there are left alone.

    Args:
        folder: Made if it does not exist; files of an earlier save are replaced. Or a save that was begun there.
        model: The model, any dtype, on any device, also compiled or wrapped by DDP; not sharded.
        text: The word embedding trained with it, whose vocabulary goes to ``config.json``, or what a frozen encoder
            has made of its instructions.
        extra: Further tensors, for example of the latent codec; names must not start with ``text.``.
        metadata: Anything ``json.dumps`` takes: program, normalisation, codec sizes.
        training_state: For resume: optimizers, generator, step. Of a save that was begun with one, it is being written.

    Raises:
        ValueError: an extra tensor under a reserved name; tensors that are sharded or on the meta device; weights that
            are not finite.
        TypeError: a model of another class, an extra that is no tensor, metadata that JSON cannot hold.
        OSError: a file that cannot be written; the message names it. What was there before is unchanged.
    """
    save = folder if isinstance(folder, Save) else None
    state = training_state if save is None else save.training_state
    save_id = secrets.token_hex(8) if save is None else save.id
    if state is not None and SAVE_ID in state.values:
        raise ValueError(f"save_checkpoint: training_state must not have a value {SAVE_ID!r}, which is set here")
    json.dumps(None if state is None else dict(state.values))  # what JSON refuses is noticed before the files are
    with nullcontext() if save is None else save:
        files = _files(model, text, dict(extra or {}), metadata, save_id, state is not None)
        with Save(Path(cast(str, folder)), save_id, state) if save is None else nullcontext(save) as save:
            for name, write in files.items():
                save.write(name, write)
            save.commit()


def _files(
    model: WorldActionModel,
    text: Text | None,
    extra: dict[str, Tensor],
    metadata: dict | None,
    save_id: str,
    resumable: bool,
) -> dict[str, Callable[[Path], object]]:
    """What writes each file but the training state; what they would refuse is noticed here, before anything is."""
    reserved = sorted(name for name in extra if name.startswith(_TEXT_KEY))
    if reserved:
        raise ValueError(f"save_checkpoint: names of extra tensors must not start with {_TEXT_KEY!r}, got {reserved}")
    inner: nn.Module = model
    while not hasattr(inner, "config") and isinstance(wrapped := getattr(inner, "module", None), nn.Module):
        inner = wrapped  # DDP hides it
    model_config = getattr(inner, "config", None)
    if not isinstance(model_config, ModelConfig):
        raise TypeError(
            f"save_checkpoint: model must be a WorldActionModel, wrapped or not, got {type(model).__name__}"
        )
    config: dict[str, Any] = {"model": model_config.to_dict(), "metadata": metadata or {}}
    config["save"] = {"id": save_id, "training_state": resumable}
    if text is not None:
        config |= text.settings()
        extra |= {_TEXT_KEY + k: v for k, v in text.tensors().items()}
    settings = json.dumps(config, indent=1) + "\n"
    state = model.state_dict()
    weights, extra = _plain({name: state[key] for name, key in bare_names(state).items()}), _plain(extra)
    # nothing could load it, and it would take the place of what can be loaded
    check_finite(weights | {k: v for k, v in extra.items() if k.startswith(_TEXT_KEY)}, "save_checkpoint: ")

    def tensors(of: dict[str, Tensor]) -> Callable[[Path], None]:
        return lambda path: save_file(of, path, {"format": "pt", SAVE_ID: save_id})

    return {MODEL: tensors(weights), EXTRA: tensors(extra), CONFIG: lambda path: path.write_text(settings)}


class Save:
    """A save of a checkpoint: its folder is locked, and what an earlier one left is removed, until it ends.

    Args:
        folder: Of the checkpoint; made if it does not exist.
        save_id: 16 hexadecimal digits, drawn for this save.
        training_state: Begins to be written at once; on the first rank of several, the others write theirs to
            ``training``.

    Attributes:
        training: Where the training state goes.

    Raises:
        OSError: the folder cannot be written to.
    """

    def __init__(self, folder: Path, save_id: str, training_state: TrainingState | None = None) -> None:
        self.folder, self.id, self.training_state = folder, save_id, training_state
        self.part = folder / f"{save_id}.part"
        self.training = self.part / TRAINING
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = ExitStack()
        self._lock.enter_context(locked_folder(folder))
        _settle(folder)
        self.part.mkdir()
        self._writing: Future | None = None
        if training_state is not None:
            try:
                with self._named(TRAINING):
                    self._writing = training_state.write(self.training)
            except BaseException:
                self.end()
                raise

    def __enter__(self) -> Save:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def write(self, name: str, write: Callable[[Path], object]) -> None:
        """Let ``write`` write a file of the checkpoint."""
        with self._named(name):
            _write(self.part / name, write)

    def commit(self) -> None:
        """Make it the checkpoint, once the training state is written too."""
        if self.training_state is not None and self._writing is not None:
            with self._named(TRAINING):
                self._writing.result()
                write_values(self.training, {**self.training_state.values, SAVE_ID: self.id})
                for path in (self.training / VALUES, self.training):
                    _sync(path)
        _sync(self.part)
        (self.part / CONFIG).replace(self.folder / CONFIG)
        _sync(self.folder)

    def end(self) -> None:
        """Leave the folder as the earlier save or this one, whichever is the checkpoint."""
        if self._writing is not None:
            wait([self._writing])  # else it would go on in a folder that is removed
        with self._lock:
            _settle(self.folder)
        self._writing = None

    @contextmanager
    def _named(self, name: str) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
            raise OSError(
                f"save_checkpoint: cannot write {name} to {self.folder}: {_reason(error)}; "
                "what was there before is unchanged"
            ) from error


def load_checkpoint(folder: str | Path, device: torch.device | str = "cpu", *, training: bool = True) -> Checkpoint:
    """Read what :func:`save_checkpoint` wrote; the model is in float32, in eval mode, on ``device``.

    In place of ``model.safetensors`` there may be shards, with their ``model.safetensors.index.json``.

    Args:
        folder: May be written anew while this reads it.
        device: Of the model, the text embedding and the extra tensors.
        training: Also look into ``training/``, where there is one, which only a resume needs.

    Raises:
        ValueError: a missing or unreadable file, files of different saves, unknown or missing config fields, weights
            that do not fit or are left over; the message names the file.
    """
    folder = Path(folder)
    while True:
        before = _stamps(folder)
        try:
            return _load(folder, device, training)
        except ValueError:
            # a save meanwhile can take a file away between two looks; then the new one is whole
            if _stamps(folder) == before:
                raise


def saved_as(folder: Path) -> tuple[str | None, dict] | None:
    """Save id and metadata of the checkpoint in a folder; None where there is none.

    Raises:
        ValueError: a config.json that cannot be read.
    """
    if not (folder / CONFIG).exists():
        return None
    config = _read_config(folder / CONFIG)
    return _save_of(config, folder)[0], config.get("metadata", {})


def holds_checkpoint(path: str | Path) -> bool:
    """Whether a folder has the config.json of a checkpoint, not that of another system.

    Raises:
        ValueError: a config.json that cannot be read.
    """
    config = Path(path) / CONFIG
    return config.is_file() and isinstance(found := _read_config(config), dict) and "model" in found


def read_settings(folder: str | Path) -> dict[str, Any]:
    """What ``config.json`` holds: ``model``, and where they are there ``metadata`` and ``text_tokens``; no weights.

    Raises:
        ValueError: a file that is missing or malformed; the message names it.
    """
    path = Path(folder) / CONFIG
    config = _read_config(path)
    _save_of(config, path.parent)
    _check_entries(config, path)
    return config


def tensor_shape(folder: str | Path, file: str, name: str) -> list[int]:
    """Of a tensor in one of a checkpoint's safetensors files, whose numbers are not read.

    Raises:
        ValueError: the file or the tensor is missing, or it is no safetensors file.
    """
    folder = Path(folder)
    path = _path_of(folder, _save_of(_read_config(folder / CONFIG), folder)[0], file)
    try:
        with safe_open(path, "pt") as tensors:
            return tensors.get_slice(name).get_shape()
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: no shape of {name}: {error}") from error


def remove_checkpoint(folder: Path) -> None:
    """Remove the files of a checkpoint, where there is one, and no others."""
    if folder.is_dir():
        with locked_folder(folder):
            _settle(folder)
            for name in (CONFIG, MODEL, EXTRA):  # without the first, the others are none
                (folder / name).unlink(missing_ok=True)
            _remove_folder(folder / TRAINING)


@torch.inference_mode(False)
def _load(folder: Path, device: torch.device | str, training: bool) -> Checkpoint:
    config = _read_config(folder / CONFIG)
    save_id, resumable = _save_of(config, folder)
    _check_entries(config, folder / CONFIG)
    ids = {}
    (state, ids[MODEL]), (extra, ids[EXTRA]) = (
        _read_tensors(_path_of(folder, save_id, name), device) for name in (MODEL, EXTRA)
    )
    training_state = None
    path = _path_of(folder, save_id, TRAINING)
    # one that is not there was moved up, or gave way to that of the next save: reading fails, and is tried again
    if training and resumable and (save_id is not None or path.exists()):
        training_state = _read_training(path, folder)
        ids[TRAINING] = training_state.values.pop(SAVE_ID, None)
    _check_ids(folder, save_id, ids)
    with _about(folder / CONFIG):
        model = WorldActionModel(ModelConfig.from_dict(config["model"], "model")).to(device)
    with _about(folder / MODEL):
        _load_all(model, state)
    text: Text | None = None
    if "instructions" in config:
        with _about(folder / EXTRA):
            text = _frozen_text(config, extra).to(device)
        extra = {k: v for k, v in extra.items() if not k.startswith(_TEXT_KEY)}
    if "vocabulary" in config:
        with _about(folder / CONFIG):
            text = WordEmbedding(config["vocabulary"], model.config.text_dim, tokens=config["text_tokens"]).to(device)
        with _about(folder / EXTRA):
            # named as in the file
            _load_all(nn.ModuleDict({"text": text}), {k: v for k, v in extra.items() if k.startswith(_TEXT_KEY)})
        extra = {k: v for k, v in extra.items() if not k.startswith(_TEXT_KEY)}
        text.eval()
    return Checkpoint(model.eval(), text, extra, config.get("metadata", {}), training_state, folder, save_id)


def _frozen_text(config: dict, extra: Mapping[str, Tensor]) -> FrozenText:
    found = [extra.get(f"{_TEXT_KEY}{name}") for name in ("rows", "lengths")]
    if found[0] is None or found[1] is None:
        raise ValueError("text.rows and text.lengths must be there; save it again")
    rows, lengths = found[0], found[1].cpu()
    check_finite({"text.rows": rows})
    return FrozenText(
        config["instructions"], rows, lengths.tolist(), tokens=config["text_tokens"], made_by=config["text_encoder"]
    )


@contextmanager
def _about(path: Path) -> Iterator[None]:
    """What is wrong inside is wrong with this file."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _load_all(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """As :func:`load_weights`, but nothing may be left over or not finite."""
    unused = load_weights(module, state)
    if unused:
        raise ValueError(f"keys that the model does not have: {abridged(unused)}; save it again")
    # looked at here, because numbers of a wider dtype can become infinite
    check_finite(module.state_dict())


def _check_entries(config: dict, path: Path) -> None:
    known = {"model", "metadata", "save", *WORDS, *FROZEN}
    if not set(config) <= known:
        raise ValueError(f"{path}: unknown entries {sorted(set(config) - known)}; expected some of {sorted(known)}")
    if {*WORDS, *FROZEN} & set(config) not in (set(), {*WORDS}, {*FROZEN}):
        raise ValueError(
            f"{path}: {' and '.join(WORDS)}, or {', '.join(FROZEN)}, must all be there or all be missing; save it again"
        )
    if not isinstance(config.get("metadata", {}), dict):
        raise ValueError(f"{path}: metadata must be an object, got {config['metadata']!r}; save it again")


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, each with a memory of its own: safetensors refuses tensors that share theirs."""
    plain, taken = {}, set()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"save_checkpoint: {name} must be a tensor, got {type(value).__name__}")
        if not_here(value):
            raise ValueError(f"save_checkpoint: {name} {not_here(value)}")
        value = value.detach().cpu().contiguous()
        memory = value.untyped_storage().data_ptr()
        plain[name] = value.clone() if memory in taken else value
        taken.add(memory)
    return plain


# ---- saves that are all old or all new ----


def _save_of(config: dict, folder: Path) -> tuple[str | None, bool]:
    """Id of the save that a config.json belongs to, and whether it has a training state (None, True before ids)."""
    if not isinstance(config, dict) or "model" not in config:
        raise ValueError(f"load_checkpoint: {folder / CONFIG} must hold an object with a 'model' entry; save it again")
    if "save" not in config:
        return None, True
    match config["save"]:
        case {"id": str(save_id), "training_state": bool(resumable)} if _ID.fullmatch(save_id):  # it names a folder
            return save_id, resumable
    raise ValueError(
        f"load_checkpoint: {folder / CONFIG}: save must hold an id of 16 hexadecimal digits and whether there is a "
        f"training_state, got {config['save']!r}; save it again"
    )


def _path_of(folder: Path, save_id: str | None, name: str) -> Path:
    """Where a file of the current save lies: a save that was stopped, or goes on, has not moved all of them up."""
    path = folder / f"{save_id}.part" / name
    if not path.exists():
        path = folder / name
    shards = folder / (name + INDEX)
    return shards if shards.exists() and not path.exists() else path


def _check_ids(folder: Path, save_id: str | None, ids: dict[str, str | None]) -> None:
    # weights without an id come from another tool; what a training state goes on from must be this very save
    strict = save_id is None or TRAINING in ids
    other = {name: i for name, i in ids.items() if i != save_id and (strict or i is not None)}
    if other:
        named = ", ".join(f"{name} is of save {i or 'without id'}" for name, i in other.items())
        raise ValueError(
            f"load_checkpoint: {folder} mixes files of different saves: {CONFIG} is of save {save_id or 'without id'}, "
            f"{named}; take all of them from one save"
        )


def _stamps(folder: Path) -> list[tuple[int, int] | None]:
    return [stamp(folder / name) for name in (CONFIG, MODEL, EXTRA, TRAINING)]


@contextmanager
def locked_folder(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """One process at a time works in this folder: saves wait for each other, such as those of all ranks of a job.

    Raises:
        BlockingIOError: another one is there, and ``wait`` is False.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:  # not every file system has locks
            pass
        yield
    finally:
        os.close(handle)


def _settle(folder: Path) -> None:
    """Move the files of the current save up, and remove what saves that were stopped have left."""
    try:
        save_id, resumable = _save_of(read_json(folder / CONFIG), folder)
    except (FileNotFoundError, ValueError):  # none yet, or none that anything could be read from
        save_id, resumable = None, True
    for part in list(folder.glob("*.part")):
        if part.stem == save_id:
            for file in part.iterdir():
                if file.name == TRAINING:  # until then a reader finds the new one in the subfolder
                    _remove_folder(folder / TRAINING)
                file.replace(folder / file.name)
            _sync(folder)
            part.rmdir()
        elif _ID.fullmatch(part.stem):
            shutil.rmtree(part)
        elif part.stem in (CONFIG, MODEL, EXTRA):  # of an older version
            part.unlink()
    if not resumable:  # an older one would not belong to these weights
        _remove_folder(folder / TRAINING)


def _remove_folder(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)


def _write(path: Path, write: Callable[[Path], object]) -> None:
    path.touch()
    mode = path.stat().st_mode
    write(path)
    if path.stat().st_mode != mode:  # safetensors makes files that only their owner can read
        path.chmod(mode)
    _sync(path)


def _reason(error: BaseException) -> str:
    """What the operating system reported, where torch or safetensors hide it."""
    code = re.search(r"\(os error (\d+)\)", str(error))
    if code:
        return os.strerror(int(code[1]))
    failures = getattr(error, "failures", None)  # of ranks, of a training state
    cause: BaseException | None = next(iter(failures.values()))[0] if failures else error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error).partition("\n")[0]


def _sync(path: Path) -> None:
    """Wait until a file, or which files a folder has, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # not every file system can do that for folders
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def _read_config(path: Path):
    try:
        return read_json(path)
    except OSError as error:
        below = path.parent / "checkpoint"
        found = (below / CONFIG).exists()
        expected = f"there is one in {below}" if found else "expected a folder of save_checkpoint"
        raise ValueError(f"load_checkpoint: cannot read {path}: {error.strerror}; {expected}") from error


def _read_tensors(path: Path, device: torch.device | str) -> tuple[dict[str, Tensor], str | None]:
    try:
        return read_tensors(path, device)
    except ValueError as error:
        raise ValueError(f"load_checkpoint: {error}; expected a folder of save_checkpoint") from error


def _read_training(path: Path, folder: Path) -> SavedState:
    try:
        return SavedState(path, moves_to=folder / TRAINING)
    except ValueError as error:
        raise ValueError(f"load_checkpoint: {error}; resume from another checkpoint") from error
