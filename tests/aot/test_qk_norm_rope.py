"""The qk_norm_rope kernels compiled for sm_90: no spills, 16-byte accesses, one compilation for all lengths."""

import re

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from bench.static.launches import qk_norm_rope
from tests.aot.compile import compile_sm90
from wam_kernels.qk_norm_rope import kernel_triton


def accesses(ptx: str, what: str) -> set[int]:
    """Bytes of the ``ld.global`` or ``st.global`` of a kernel."""
    found = re.findall(rf"{what}\.global(?:\.\w+(?:::\w+)*)*?(?:\.v(\d))?\.b(\d+)", ptx)
    return {int(vector or 1) * int(bits) // 8 for vector, bits in found}


@pytest.mark.parametrize("name, has_v", [("forward", False), ("forward", True), ("backward", False)])
@pytest.mark.parametrize(
    "heads, D, per_head, interleaved, weight",
    [
        pytest.param(24, 128, False, True, "bf16", id="wan"),
        pytest.param(24, 128, False, True, "fp32", id="wan-fp32-weights"),
        pytest.param(16, 128, True, False, "bf16", id="cosmos"),
    ],
)
def test_compiles_without_spills_and_with_wide_accesses(name, has_v, heads, D, per_head, interleaved, weight):
    built = compile_sm90(qk_norm_rope(name, heads, D, per_head, interleaved, "bf16", weight, has_v))
    assert built.spill_bytes == 0
    assert 16 in accesses(built.ptx, "ld") and 16 in accesses(built.ptx, "st")


def forward_key(B: int, S: int, D: int, out: torch.Tensor, table_S: int) -> str:
    """What Triton would look its compiled forward up by, with the arguments that ``forward`` passes."""
    kernel = kernel_triton.qk_norm_rope_fwd_kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))
    qkv = torch.empty(B, S, 3 * 24 * D, dtype=torch.bfloat16, device="meta")
    strides = [*qkv.stride()[:2] * 3, *out.stride()[:3] * 3]
    x, weight, table = torch.empty(8, dtype=torch.bfloat16), torch.empty(8), torch.empty(8)  # only addresses take part
    constants = kernel_triton.launch_constants(24 * D, D, False, True)
    tensors = x, x, x, weight, weight, table, x, x, x
    _, specialization, options = bind(*tensors, *strides, S, table_S, 1e-6, HAS_V=True, **constants, debug=False)
    return str((specialization, sorted(options.items())))


def test_one_key_for_all_lengths_and_cache_slots():
    keys = set()
    for B, S in ((1, 1), (1, 16), (2, 33), (1, 144), (4, 4896), (1, 8704)):
        contiguous = torch.empty(B, S, 24, 128, device="meta")
        caches = [torch.empty(B, length, 24, 128, device="meta") for length in (S + 7, 2048 + S)]
        outs = contiguous, *(c[:, 7 : 7 + S] for c in caches)
        keys |= {forward_key(B, S, 128, out, table_S) for out in outs for table_S in (0, S)}
    assert len(keys) == 1
    # a constant would pass: another head dim is another kernel
    assert forward_key(1, 16, 64, torch.empty(1, 16, 24, 64, device="meta"), 0) not in keys
