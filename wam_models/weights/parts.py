"""Which parts of a model train: frozen components by name, and LoRA adapters, through ``peft``, on their linear maps.

Names are those of the checkpoint. An adapted linear map ``X`` becomes ``X.base_layer``, with ``X.lora_A`` and
``X.lora_B`` beside it; :func:`merged` turns all three into ``X`` again.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from ..runtime.checks import writable_folder
from ..state_dicts import abridged
from .layouts import PARTS

_BLOCKS = r"packed_block_stack\.packed_blocks\.\d+\."
# by name: how parameters of it begin; the word embedding is no part of the model
COMPONENTS = {
    "video": rf"core\.(?!proprio_)|{_BLOCKS}video_block\.",
    "video.blocks": rf"{_BLOCKS}video_block\.",
    "video.text": r"core\.text_proj\.",
    "action": rf"action_expert\.|core\.proprio_|{_BLOCKS}action_block\.",
    "action.blocks": rf"{_BLOCKS}action_block\.",
    "words": r"text\.",
}
_A, _B, _BASE = ".lora_A.default.weight", ".lora_B.default.weight", ".base_layer."


def named_by(components: Iterable[str], names: Collection[str], where: str) -> set[str]:
    """Which of the names (``model.core.proj_out.weight``, ``text.words.weight``) are of these components.

    Args:
        components: Of ``COMPONENTS``, or modules and parameters of the model by name.
        names: Of a learner's parameters.
        where: Begins messages.

    Raises:
        ValueError: a component that there is not.
    """
    found: set[str] = set()
    for component in components:
        begin = re.compile(COMPONENTS.get(component, rf"{re.escape(component)}(\.|$)"))
        held = {name for name in names if begin.match(name.removeprefix("model."))}
        if not held:
            raise ValueError(
                f"{where} must be some of {sorted(COMPONENTS)}, or modules of the model by name, got {component!r}"
            )
        found |= held
    return found


def choose_parts(
    learner: nn.Module, *, frozen: Collection[str], lora: Collection[str], lora_rank: int, lora_scale: float
) -> None:
    """Freeze parameters, and put adapters on linear maps, in place.

    Args:
        learner: Has ``model`` and ``text``, without adapters.
        frozen: Components that do not train.
        lora: Components that train through adapters alone; may be in ``frozen``.
        lora_rank: Of an adapter.
        lora_scale: What an adapter's product is multiplied by.

    Raises:
        ValueError: a component that there is not, one to adapt without a linear map, or nothing left to train.
        ModuleNotFoundError: adapters are asked for, and peft is not installed.
    """
    names = [name for name, _ in learner.named_parameters()]
    still = named_by(frozen, names, "TrainConfig: frozen")
    adapted = named_by(lora, names, "TrainConfig: lora")
    linears = [name for name, module in learner.named_modules() if isinstance(module, nn.Linear)]
    chosen = [name.removeprefix("model.") for name in linears if f"{name}.weight" in adapted]
    if lora and not chosen:
        raise ValueError(f"TrainConfig: lora must be of components with linear maps, got {list(lora)}")
    if chosen:
        _add_adapters(learner.get_submodule("model"), chosen, lora_rank, lora_scale)
    for name, p in learner.named_parameters():
        p.requires_grad_(is_adapter(name) or name.replace(_BASE, ".") not in still | adapted)
    if not any(p.requires_grad for p in learner.parameters()):
        raise ValueError(f"TrainConfig: frozen leaves nothing to train, got {list(frozen)}; leave a component out")


def frozen_streams(learner: nn.Module) -> tuple[str, ...]:
    """Streams, of ``video`` and ``action``, of which nothing trains, adapters included."""
    trains = {stream: False for stream in PARTS}
    present = set()
    for name, p in learner.named_parameters():
        for stream in PARTS:
            if re.match(COMPONENTS[stream], name.removeprefix("model.")):
                present.add(stream)
                trains[stream] |= p.requires_grad
    return tuple(stream for stream in PARTS if stream in present and not trains[stream])


def _add_adapters(model: nn.Module, linears: list[str], rank: int, scale: float) -> None:
    settings = _lora_config(linears, rank, scale)
    from peft import inject_adapter_in_model

    inject_adapter_in_model(settings, model)


def _lora_config(linears: list[str], rank: int, scale: float) -> Any:
    try:
        from peft import LoraConfig
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "TrainConfig: lora needs the package peft; pip install 'wam-kernels[lora]'", name="peft"
        ) from error
    settings: dict[str, Any] = {"r": rank, "lora_alpha": scale * rank, "target_modules": linears}
    return LoraConfig(**settings)


def write_adapters(folder: str | Path, adapters: Mapping[str, Tensor], *, rank: int, scale: float) -> None:
    """A folder as ``peft`` writes and reads it: ``PeftModel.from_pretrained(model, folder)``.

    Args:
        folder: Gets ``adapter_config.json`` and ``adapter_model.safetensors``.
        adapters: Of the model, by the learner's names, as :func:`adapters_of` gives them.
        rank: Of an adapter.
        scale: What an adapter's product is multiplied by.

    Raises:
        ValueError: a folder that cannot be written, or that holds anything.
        ModuleNotFoundError: peft is not installed.
    """
    named = {name.removeprefix("model.").replace(".default.", "."): value for name, value in adapters.items()}
    settings = _lora_config(sorted({name.partition(".lora_")[0] for name in named}), rank, scale)
    folder = Path(folder)
    writable_folder("write_adapters: folder", folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"write_adapters: folder must be new or empty, got {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    settings.save_pretrained(str(folder))
    held = {f"base_model.model.{name}": value.cpu().contiguous() for name, value in named.items()}
    save_file(held, folder / "adapter_model.safetensors", {"format": "pt"})


def is_adapter(name: str) -> bool:
    """Whether a parameter, by name, is of an adapter."""
    return ".lora_" in name


def adapters_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapters alone."""
    return {name: value for name, value in state.items() if is_adapter(name)}


def merged(state: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Weights without adapters: each adapted matrix W becomes ``W + scale B A``, summed in float32.

    Args:
        state: Of a learner or a model, with adapters or without.
        scale: As the adapters were made with.

    Raises:
        ValueError: an adapter whose linear map, or whose other half, is missing.
    """
    lost = [
        name
        for name in adapters_of(state)
        if not {f"{name.partition('.lora_')[0]}{end}" for end in (_A, _B, f"{_BASE}weight")} <= set(state)
    ]
    if lost:
        raise ValueError(f"merged: adapters without their other half or their linear map: {abridged(lost)}")
    plain = {}
    for name, value in state.items():
        linear = name.removesuffix(f"{_BASE}weight")
        if linear + _A in state and linear != name:
            update = state[linear + _B].float() @ state[linear + _A].float()
            value = (value.float() + scale * update).to(value.dtype)
        if not is_adapter(name):
            plain[name.replace(_BASE, ".")] = value
    return plain
