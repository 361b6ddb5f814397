"""The kernels without products, one row (of a token; of q or of k) at a time: whether memory limits them, or issue."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from wam_kernels.roofline import gate_residual_ada_layer_norm, qk_norm_rope

from .model import predict_row
from .sass import Body, Loop, longest_turn

HEADS, HEAD_DIM, FRAME = 24, 128, 32  # of q and k; tokens that share a row of modulation
WIDTH = HEADS * HEAD_DIM
CUDA_WARPS = WIDTH // 16 // 32  # 16 channels a thread
# op -> what its CUDA kernels' mangled names end with at this width: two vectors of 8 channels a thread
CUDA_NAMES = {"adaln": "I13__nv_bfloat16Li2EE", "qk_norm_rope": "I13__nv_bfloat16Li8ELi2EE"}


@dataclass(frozen=True)
class CountedRow:
    op: str
    what: str  # forward or backward
    provider: str  # triton or cuda
    warps: int
    loop: Loop
    clocks: Mapping[str, float]

    @property
    def limit(self) -> str:
        return max(self.clocks, key=lambda name: self.clocks[name])

    @property
    def share_of_copy(self) -> float:
        """The most that the counted instructions allow."""
        return self.clocks["memory"] / max(self.clocks.values())


def compulsory_bytes(op: str, backward: bool) -> float:
    """Of one row, in bf16."""
    if op == "adaln":
        return gate_residual_ada_layer_norm(FRAME, 1, WIDTH, 2, backward=backward).bytes / FRAME
    return qk_norm_rope(1, HEADS, HEAD_DIM, 2, backward=backward).bytes / 2


def _counted(op: str, backward: bool, provider: str, warps: int, body: Body) -> CountedRow:
    loop = longest_turn(body, ("LDG",), ("STG",))  # over rows, or a kernel that takes one
    clocks = predict_row(loop, warps, compulsory_bytes(op, backward))
    return CountedRow(op, "backward" if backward else "forward", provider, warps, loop, clocks)


def triton_rows() -> Iterator[CountedRow]:
    from .aot import compile_sm90  # loads triton
    from .launches import adaln_backward, adaln_forward, qk_norm_rope

    for backward, adaln in ((False, adaln_forward), (True, adaln_backward)):
        what = "backward" if backward else "forward"
        for op, launch in (
            ("adaln", adaln(WIDTH, "bf16")),
            ("qk_norm_rope", qk_norm_rope(what, HEADS, HEAD_DIM, False, True, "bf16", "bf16")),
        ):
            yield _counted(op, backward, "triton", launch.num_warps, compile_sm90(launch).body)


def cuda_rows(bodies: Mapping[str, Body]) -> Iterator[CountedRow]:
    """Of the disassembled extension, by mangled name.

    Raises:
        ValueError: a kernel is not in it.
    """
    for op, ending in CUDA_NAMES.items():
        for backward in (False, True):
            name = f"{'backward' if backward else 'forward'}_kernel{ending}"
            body = next((b for n, b in bodies.items() if re.search(rf"{op}_detail\d+{name}", n)), None)
            if body is None:
                raise ValueError(f"static: no {name} of {op}; build the extension anew")
            yield _counted(op, backward, "cuda", CUDA_WARPS, body)
