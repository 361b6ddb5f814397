"""Triton kernels compiled for an H100 without one; Triton's cache keeps what it compiled before.

Not in a process with TRITON_INTERPRET=1: there ``triton.jit`` makes interpreted functions.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from wam_kernels.adaln import config as adaln_config
from wam_kernels.adaln import kernel_triton as adaln_kernels
from wam_kernels.block_attention import config as block_config
from wam_kernels.block_attention import kernel_triton as block_kernels
from wam_kernels.cached_attention import config as cached_config
from wam_kernels.cached_attention import kernel_triton as cached_kernels
from wam_kernels.plan import STEP_PART
from wam_kernels.qk_norm_rope import kernel_triton as qk_kernels

from .sass import Instruction, disassemble, tool

H100 = GPUTarget("cuda", 90, 32)
# of the arguments of kernels, without _ptr
INT32 = {
    "tiles", "rows", "bounds_row", "bounds", "full", "part", "ranges",
    "row_of_token", "segments", "row_begin", "row_segments",
}  # fmt: skip
FLOAT32 = {
    "lse", "lse2", "dlse", "delta", "out_part", "lse_part", "table", "partials", "gate", "shift", "scale", "gate_table",
    "shift_table", "scale_table",
}  # fmt: skip
BLOCK_ATTENTION = {
    "forward": (block_kernels.block_attention_fwd_kernel, block_config.forward),
    "dq": (block_kernels.block_attention_bwd_dq_kernel, block_config.dq),
    "dkdv": (block_kernels.block_attention_bwd_dkdv_kernel, block_config.dkdv),
}


@dataclass(frozen=True)
class Launch:
    """What a kernel is compiled with."""

    kernel: Any
    types: Mapping[str, str]  # Triton's name of the type of every argument that is no constant
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int

    def source(self) -> ASTSource:
        """With what the launchers' tensors guarantee: 16-byte bases, token and head strides that are multiples of 16.

        Raises:
            ValueError: an argument without a type.
        """
        names = [p.name for p in self.kernel.params]
        missing = [n for n in names if n not in self.types and n not in self.constants]
        if missing:
            raise ValueError(f"Launch: types must name every argument that is no constant, {missing} are missing")
        signature = {n: "constexpr" if n in self.constants else self.types[n] for n in names}
        free = {p.name for p in self.kernel.params if p.do_not_specialize}
        aligned = [n for n in names if n not in self.constants and n not in free and self.types[n] != "fp32"]
        attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
        return ASTSource(self.kernel, signature=signature, constexprs=dict(self.constants), attrs=attrs)

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def types_of(kernel: Any, constants: Mapping[str, Any], dtype: str) -> dict[str, str]:
    """Of a kernel's arguments that are no constants, for activations and weights of ``dtype``: bf16, fp16 or fp32."""

    def type_of(name: str) -> str:
        if (pointer := name.removesuffix("_ptr")) != name:
            return "*i32" if pointer in INT32 else "*fp32" if pointer in FLOAT32 else f"*{dtype}"
        return "fp32" if name in ("scale", "eps") else "i32"

    return {p.name: type_of(p.name) for p in kernel.params if p.name not in constants}


def block_attention(name: str, D: int, rows: int, dtype: str, *, ranges: int = 4, group: int = 1) -> tuple[Launch, ...]:
    """A kernel of ``BLOCK_ATTENTION`` for a tile of ``rows``: once, or once for each of dk and dv."""
    kernel, choose = BLOCK_ATTENTION[name]
    itemsize = 4 if dtype == "fp32" else 2
    launch = choose(D, itemsize, rows)
    constants = {
        "D": D, "BLOCK_R": launch.rows, "BLOCK_T": min(rows, 64), "BLOCK_P": STEP_PART,
        "BLOCK_D": block_config.block_d(D), "PIECES": rows // launch.rows, "RANGES": ranges, "GROUP": group,
        "PRECISION": "tf32x3" if dtype == "fp32" else "tf32",
    }  # fmt: skip
    outputs = block_config.dkdv_launches(D, itemsize) if name == "dkdv" else ({},)
    launches = (constants | output for output in outputs)
    return tuple(Launch(kernel, types_of(kernel, c, dtype), c, launch.num_warps, launch.num_stages) for c in launches)


def cached_attention(rows: int, D: int, dtype: torch.dtype) -> Launch:
    """The part kernel for groups of at most ``rows`` rows."""
    launch = cached_config.forward(rows, D, dtype.itemsize)
    constants = cached_kernels.launch_constants(launch, D, dtype)
    kernel = cached_kernels.cached_attention_part_kernel
    types = types_of(kernel, constants, {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype])
    return Launch(kernel, types, constants, launch.num_warps, launch.num_stages)


def adaln(backward: bool, D: int) -> Launch:
    """Gate, residual and adaptive norm with tables, in bf16."""
    constants: dict[str, Any] = {
        "D": D, "BLOCK_D": adaln_config.block_d(D), "HAS_GATE": True, "NORM": 1, "HAS_GATE_TABLE": True,
        "HAS_SCALE_TABLE": True, "STAGES": adaln_config.stages(D, 2), "weight_ptr": None,
    }  # fmt: skip
    if backward:
        kernel, warps = adaln_kernels.gate_residual_norm_bwd_kernel, adaln_config.backward_warps(D)
        constants |= {"HAS_DR": True}
    else:
        kernel, warps = adaln_kernels.gate_residual_norm_fwd_kernel, adaln_config.forward_warps(D)
        constants |= {"HAS_Y": True, "HAS_SHIFT_TABLE": True, "bias_ptr": None}
    return Launch(kernel, types_of(kernel, constants, "bf16"), constants, warps, num_stages=3)


def qk_norm_rope(backward: bool, heads: int, head_dim: int) -> Launch:
    """Over all heads together, with interleaved pairs, in bf16."""
    constants = qk_kernels.launch_constants(heads * head_dim, head_dim, False, True)
    warps = int(str(constants.pop("num_warps")))
    kernel = qk_kernels.qk_norm_rope_bwd_kernel if backward else qk_kernels.qk_norm_rope_fwd_kernel
    if not backward:
        constants["HAS_V"] = False
    return Launch(kernel, types_of(kernel, constants, "bf16"), constants, warps, num_stages=1)


@dataclass(frozen=True)
class Compiled:
    body: tuple[Instruction, ...]
    registers: int
    shared: int


def compile_sm90(launch: Launch) -> Compiled:
    """The machine code of a launch."""
    built = triton.compile(launch.source(), target=H100, options=launch.options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(built.asm["cubin"])
        (body,) = disassemble(path, None).values()
        usage = subprocess.run([tool("cuobjdump"), "-res-usage", path], capture_output=True, text=True, check=True)
    (registers,) = re.findall(r"REG:(\d+)", usage.stdout)
    return Compiled(tuple(body), int(registers), built.metadata.shared)
