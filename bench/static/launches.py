"""What the Triton kernels are compiled with: the arguments that the library's launchers would pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from triton.compiler import ASTSource

from wam_kernels.adaln import config as adaln_config
from wam_kernels.adaln import kernel_triton as adaln
from wam_kernels.block_attention import config as block_config
from wam_kernels.block_attention import kernel_triton as block
from wam_kernels.cached_attention import config as cached_config
from wam_kernels.cached_attention import kernel_triton as cached
from wam_kernels.plan import STEP_PART, tile_shape
from wam_kernels.qk_norm_rope import kernel_triton as qk

INT32 = {"ranges", "tiles", "rows", "bounds_row", "bounds", "full", "part"}
INT32 |= {"row_of_token", "segments", "row_begin", "row_segments"}
FLOAT32 = {"lse", "lse2", "dlse", "delta", "out_part", "lse_part", "table", "partials"}
FLOAT32 |= {"gate", "shift", "scale", "gate_table", "shift_table", "scale_table", "dgate", "dshift", "dscale"}
NONE, ADAPTIVE, AFFINE = 0, 1, 2  # norms of adaLN
MODULATION = ("gate", "shift", "scale", "gate_table", "shift_table", "scale_table")


@dataclass(frozen=True)
class Launch:
    """A compilation; ``types`` has Triton's names (``*bf16``, ``i32``) for every argument that is no constant."""

    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}

    def source(self) -> ASTSource:
        names = [p.name for p in self.kernel.params]
        signature = {n: "constexpr" if n in self.constants else self.types[n] for n in names}
        # what the launcher's tensors guarantee: 16-byte bases, and token and head strides that are multiples of 16
        free = {p.name for p in self.kernel.params if p.do_not_specialize}
        aligned = [n for n in names if n not in self.constants and n not in free and self.types[n] != "fp32"]
        attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
        return ASTSource(self.kernel, signature=signature, constexprs=dict(self.constants), attrs=attrs)


def of_kernel(
    kernel: Any, dtype: str, constants: Mapping[str, Any], num_warps: int, num_stages: int, **types: str
) -> Launch:
    """``types`` are those of tensors whose dtype is their own choice."""

    def type_of(name: str) -> str:
        if not name.endswith("_ptr"):
            return "fp32" if name in ("scale", "eps") else "i32"
        tensor = name.removesuffix("_ptr")
        return types.get(tensor) or ("*i32" if tensor in INT32 else "*fp32" if tensor in FLOAT32 else f"*{dtype}")

    arguments = {p.name: type_of(p.name) for p in kernel.params if p.name not in constants}
    return Launch(kernel, arguments, constants, num_warps, num_stages)


BLOCK_ATTENTION = {
    "forward": (block.block_attention_fwd_kernel, block_config.forward),
    "dq": (block.block_attention_bwd_dq_kernel, block_config.dq),
    "dkdv": (block.block_attention_bwd_dkdv_kernel, block_config.dkdv),
}
# rows of a tile, of plans with long and with short windows
LONG, SHORT = ({"forward": t.rows, "dq": t.rows, "dkdv": t.key_rows or t.rows} for t in map(tile_shape, (True, False)))


def block_attention(
    name: str, D: int, rows: int, dtype: str, ranges: int = 4, group: int = 1, **options: int
) -> tuple[Launch, ...]:
    """A kernel for a tile of ``rows``: once, or once for each of dk and dv."""
    kernel, choose = BLOCK_ATTENTION[name]
    itemsize = 4 if dtype == "fp32" else 2
    launch = choose(D, itemsize, rows)
    constants = {
        "D": D, "BLOCK_R": launch.rows, "BLOCK_T": min(rows, 64), "BLOCK_P": STEP_PART,
        "BLOCK_D": block_config.block_d(D), "PIECES": rows // launch.rows, "RANGES": ranges, "GROUP": group,
        "PRECISION": "tf32x3" if dtype == "fp32" else "tf32",
    }  # fmt: skip
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages} | options
    outputs = block_config.dkdv_launches(D, itemsize) if name == "dkdv" else ({},)
    warps_and_stages = options["num_warps"], options["num_stages"]
    return tuple(of_kernel(kernel, dtype, constants | o, *warps_and_stages) for o in outputs)


def cached_part(rows: int, D: int, dtype: str) -> Launch:
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    launch = cached_config.forward(rows, D, torch_dtype.itemsize)
    constants = cached.launch_constants(launch, D, torch_dtype)
    return of_kernel(cached.cached_attention_part_kernel, dtype, constants, launch.num_warps, launch.num_stages)


def cached_combine(D: int) -> Launch:
    constants = {"D": D, "BLOCK_M": cached.COMBINE_ROWS, "BLOCK_D": D}
    return of_kernel(cached.cached_attention_combine_kernel, "bf16", constants, 4, 3)


def _adaln(kernel: Any, D: int, dtype: str, num_warps: int, constants: dict[str, Any], rows: str = "fp32") -> Launch:
    """``constants`` are the flags; pointers that they leave out are None, as the launcher passes them.

    ``rows`` is the dtype of the modulation and, where they are stored by row, of its gradients.
    """
    constants = {"D": D} | constants
    has = {name.removeprefix("HAS_").lower() for name, value in constants.items() if name.startswith("HAS_") and value}
    has |= {NONE: set(), ADAPTIVE: {"shift", "scale"}, AFFINE: {"weight", "bias"}}[constants["NORM"]]
    optional = {"y", "gate", "shift", "scale", "gate_table", "shift_table", "scale_table", "weight", "bias", "dr"}
    absent = optional - has - ({"y"} if "gate" in has else set())
    if constants.get("TOKEN_ROWS"):
        absent |= {"segments"} | ({"dgate"} - {f"d{n}" for n in has}) | ({"dscale"} - {f"d{n}" for n in has})
        absent |= set() if constants["NORM"] == AFFINE else {"partials"}
    elif "TOKEN_ROWS" in constants:
        absent |= {"dgate", "dscale"}
    names = {p.name for p in kernel.params}
    constants |= {f"{n}_ptr": None for n in absent if f"{n}_ptr" in names}
    types = {n: f"*{rows}" for n in (*MODULATION, *(f"d{n}" for n in MODULATION))}
    return of_kernel(kernel, dtype, constants, num_warps, 3, **types)


def _flags(gate: bool, norm: int, tables: bool) -> dict[str, Any]:
    has_tables = {"HAS_GATE_TABLE": tables and gate, "HAS_SCALE_TABLE": tables and norm == ADAPTIVE}
    return {"HAS_GATE": gate, "NORM": norm} | has_tables


def _tile(D: int, dtype: str) -> dict[str, int]:
    return {"BLOCK_D": adaln_config.block_d(D), "STAGES": adaln_config.stages(D, 4 if dtype == "fp32" else 2)}


def adaln_forward(
    D: int, dtype: str, y: bool = True, gate: bool = True, norm: int = ADAPTIVE, tables: bool = True, rows: str = "fp32"
) -> Launch:
    constants = _tile(D, dtype) | {"HAS_Y": y, "HAS_SHIFT_TABLE": tables and norm == ADAPTIVE}
    kernel = adaln.gate_residual_norm_fwd_kernel
    return _adaln(kernel, D, dtype, adaln_config.forward_warps(D), constants | _flags(gate, norm, tables), rows)


def adaln_backward(
    D: int, dtype: str, dr: bool = True, gate: bool = True, norm: int = ADAPTIVE, tables: bool = True,
    rows: str = "fp32", token_rows: bool = False,
) -> Launch:  # fmt: skip
    constants = _tile(D, dtype) | {"HAS_DR": dr, "TOKEN_ROWS": token_rows}
    kernel = adaln.gate_residual_norm_bwd_kernel
    return _adaln(kernel, D, dtype, adaln_config.backward_warps(D), constants | _flags(gate, norm, tables), rows)


def adaln_sums(norm: int) -> Launch:
    tile = {"BLOCK_N": adaln_config.SUM_SEGMENTS, "BLOCK_D": adaln_config.SUM_CHANNELS}
    return _adaln(adaln.row_sums_kernel, 3072, "bf16", 4, tile | {"HAS_GATE": True, "NORM": norm})


def qk_norm_rope(
    name: str, heads: int, D: int, per_head: bool, interleaved: bool, dtype: str, weight: str, has_v: bool = False
) -> Launch:
    kernel = {"forward": qk.qk_norm_rope_fwd_kernel, "backward": qk.qk_norm_rope_bwd_kernel}[name]
    constants = qk.launch_constants(heads * D, D, per_head, interleaved)
    num_warps = int(str(constants.pop("num_warps")))
    if name == "forward":
        constants["HAS_V"] = has_v
    weights = {p.name.removesuffix("_ptr"): f"*{weight}" for p in kernel.params if p.name.startswith("weight")}
    return of_kernel(kernel, dtype, constants, num_warps, 1, **weights)


# One of every kernel, in the dtypes and head dims that models have, by name; small launches first.
EVERY: dict[str, Callable[[], tuple[Launch, ...]]] = {
    "adaln forward, D=3072 bf16": lambda: (adaln_forward(3072, "bf16"),),
    "adaln backward, D=3072 bf16": lambda: (adaln_backward(3072, "bf16"),),
    "adaln backward, D=3072 float32": lambda: (adaln_backward(3072, "fp32"),),
    "adaln sums": lambda: (adaln_sums(ADAPTIVE),),
    "qk_norm_rope forward, 24 x 128 bf16": lambda: (qk_norm_rope("forward", 24, 128, False, True, "bf16", "bf16"),),
    "qk_norm_rope backward, 24 x 128 bf16": lambda: (qk_norm_rope("backward", 24, 128, False, True, "bf16", "bf16"),),
    "cached_attention combine, D=128": lambda: (cached_combine(128),),
    "cached_attention part, D=128 bf16": lambda: (cached_part(128, 128, "bf16"),),
    "cached_attention part, D=64 float32": lambda: (cached_part(128, 64, "fp32"),),
    "block_attention forward, D=128 bf16": lambda: block_attention("forward", 128, LONG["forward"], "bf16"),
    "block_attention dq, D=128 bf16": lambda: block_attention("dq", 128, LONG["dq"], "bf16"),
    "block_attention dkdv, D=128 bf16": lambda: block_attention("dkdv", 128, LONG["dkdv"], "bf16"),
    "block_attention forward, D=64 float32": lambda: block_attention("forward", 64, LONG["forward"], "fp32"),
    "block_attention dq, D=64 float32": lambda: block_attention("dq", 64, LONG["dq"], "fp32"),
    "block_attention dkdv, D=64 float32": lambda: block_attention("dkdv", 64, LONG["dkdv"], "fp32"),
}
