"""Every adaLN kernel compiled for sm_90: no spills at the widths that models have; and one key for all lengths."""

import re

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from bench.static.launches import ADAPTIVE, AFFINE, NONE, adaln_backward, adaln_forward, adaln_sums
from tests.aot.compile import compile_sm90
from wam_kernels.adaln import kernel_triton
from wam_kernels.frame_index import FrameIndex


@pytest.mark.parametrize("D", [576, 2048, 3072])
@pytest.mark.parametrize("kernel", [adaln_forward, adaln_backward])
def test_no_spills_at_the_widths_of_the_experts(kernel, D):
    built = compile_sm90(kernel(D, "bf16"))
    assert built.spill_bytes == 0
    # 16-byte accesses: bf16 rows move eight channels at a time; those of the next token come behind the arithmetic
    assert set(re.findall(r"cp\.async\.\w+\S* \[[^\]]*\], \[[^\]]*\], (\w+)", built.ptx)) >= {"0x10"}
    assert "st.global.v4.b32" in built.ptx
    if kernel is adaln_forward:
        assert built.registers <= 128  # 16 warps an SM


@pytest.mark.parametrize(
    "kernel, D, dtype, options",
    [
        pytest.param(adaln_forward, 3072, "bf16", {"y": False, "gate": False}, id="norm-forward"),
        pytest.param(adaln_backward, 3072, "bf16", {"dr": False, "gate": False}, id="norm-backward"),
        pytest.param(adaln_backward, 3072, "bf16", {"norm": AFFINE}, id="affine-backward"),
        pytest.param(adaln_backward, 3072, "bf16", {"norm": NONE}, id="gate-alone-backward"),
        pytest.param(adaln_backward, 3072, "fp32", {}, id="float32-backward"),
        pytest.param(adaln_forward, 8192, "bf16", {}, id="largest-D-forward"),
        pytest.param(adaln_backward, 3072, "bf16", {"rows": "bf16", "token_rows": True}, id="row-a-token-backward"),
    ],
)
def test_other_variants_do_not_spill(kernel, D, dtype, options):
    assert compile_sm90(kernel(D, dtype, **options)).spill_bytes == 0


@pytest.mark.parametrize("norm", [NONE, ADAPTIVE])
def test_second_pass_does_not_spill(norm):
    assert compile_sm90(adaln_sums(norm)).spill_bytes == 0


def launch_keys(index: FrameIndex, B: int, D: int) -> tuple[str, ...]:
    """What Triton would look its compiled kernels up by, with the arguments that the launchers pass."""
    backend, keys = make_backend(GPUTarget("cuda", 90, 32)), []

    class Launched:
        def __init__(self, kernel):
            self.bind = create_function_from_signature(kernel.signature, kernel.params, backend)

        def __getitem__(self, grid):
            def launch(*args, **options):
                _, specialization, options = self.bind(*args, **options, debug=False)
                keys.append(str((specialization, sorted(options.items()))))

            return launch

    S, F = index.length, index.frames
    x = torch.empty(B, S, D, dtype=torch.bfloat16)
    shift, scale, gate, *_ = torch.empty(B, F, 6, D).unbind(2)
    table = torch.empty(6, D)
    names = ("gate_residual_norm_fwd_kernel", "gate_residual_norm_bwd_kernel", "row_sums_kernel")
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(kernel_triton, name, Launched(getattr(kernel_triton, name)))
        tables = table[2], table[0], table[1]
        kernel_triton.forward(x, x, gate, shift, scale, *tables, None, None, index.row_of_token, 1e-6)
        sums = index.segments, index.row_begin, index.row_segments
        kernel_triton.backward(x, x, x, x, gate, scale, tables[0], tables[2], None, *sums, 1e-6)
    assert len(keys) == len(names)
    return tuple(keys)


def test_one_key_for_all_lengths():
    indices = [FrameIndex.from_runs([n] * frames) for n in (1, 5, 16, 32) for frames in (1, 7, 16)]
    indices += [FrameIndex.per_sample(n) for n in (1, 17, 144)]
    keys = {launch_keys(index, B, 64) for index in indices for B in (1, 2, 3)}
    assert len(keys) == 1
    # the test would pass on a constant: another width is another kernel
    assert launch_keys(indices[0], 1, 128) not in keys
