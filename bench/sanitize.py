"""Every kernel once or twice at small shapes, for compute-sanitizer to watch.   python -m bench.sanitize

bench/gpu.sh runs it under memcheck and racecheck; on its own it is a quick test that the kernels run. The cases are the
tests' own; results are compared with the reference there, so a sanitizer's run also checks values.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable

import torch

from tests.adaln import checks as adaln
from tests.block_attention import checks as block_attention
from tests.cached_attention import checks as cached_attention
from tests.geometries import small
from tests.qk_norm_rope import checks as qk_norm_rope
from wam_kernels import compile_plan
from wam_models import doctor

KERNELS = ("triton", "cuda")


def block_attention_cases(impl: str) -> None:
    for plan in (compile_plan(small(chunk_size=1)), block_attention.ragged_plan()):
        plan = plan.to("cuda")
        inputs = block_attention.make_inputs(plan, plan.batch, 2, 64, torch.bfloat16, "cuda")
        block_attention.check_against_reference(plan, inputs, impl)


def adaln_cases(impl: str) -> None:
    index = adaln.SHARED.to("cuda")
    inputs = adaln.make_inputs(index, 2, 72, torch.bfloat16, "cuda")
    for variant in (adaln.FULL, adaln.VARIANTS["gate-and-affine-norm"]):
        adaln.check_against_reference(variant, index, inputs, impl)


def qk_norm_rope_cases(impl: str) -> None:
    for case in (qk_norm_rope.Case(2, 3, 24, 128, torch.bfloat16), qk_norm_rope.Case(1, 5, 5, 72)):
        for variant in ("wan", "cosmos"):
            on_gpu = dataclasses.replace(case, device="cuda")
            qk_norm_rope.check_against_reference(on_gpu, impl, **qk_norm_rope.VARIANTS[variant])


def cached_attention_cases(impl: str) -> None:
    case = cached_attention.Case(
        [[cached_attention.WRAPPED, [(64, 73)]], [[(0, 73)], []]], (33, 16), 80, H=3, D=64, dtype=torch.bfloat16
    )
    cached_attention.check_against_reference(dataclasses.replace(case, device="cuda"), impl)


CASES: dict[str, Callable[[str], None]] = {
    "block_attention": block_attention_cases,
    "ada_layer_norm": adaln_cases,
    "qk_norm_rope": qk_norm_rope_cases,
    "cached_attention": cached_attention_cases,
}


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("bench.sanitize: needs a CUDA device, found none")
    machine = doctor.probe()
    for backend in doctor.BACKENDS:
        if backend.impl not in KERNELS or backend.op not in CASES:
            continue
        missing = backend.missing(machine)
        if not missing:
            CASES[backend.op](backend.impl)
        print(f"{backend.op} {backend.impl}: {f'not run: {missing}' if missing else 'ok'}", flush=True)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
