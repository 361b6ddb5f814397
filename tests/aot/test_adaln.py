"""Every adaLN kernel compiled for sm_90: no spills at the widths that models have; and one key for all lengths."""

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from tests.aot.compile import compile_sm90
from wam_kernels.adaln import config, kernel_triton
from wam_kernels.frame_index import FrameIndex

MODULATION = {f"{name}_ptr" for name in ("gate", "shift", "scale", "gate_table", "shift_table", "scale_table")}
FLOAT32 = MODULATION | {"partials_ptr", "dgate_ptr", "dshift_ptr", "dscale_ptr"}
INDEX = {"row_of_token_ptr", "segments_ptr", "row_begin_ptr", "row_segments_ptr"}
NONE, ADAPTIVE, AFFINE = 0, 1, 2


def build(kernel, D: int, dtype: str, num_warps: int, constants: dict):
    """``constants`` are the flags; pointers that they leave out are None, as the launcher passes them."""
    constants = {"D": D} | constants
    has = {name.removeprefix("HAS_").lower() for name, value in constants.items() if name.startswith("HAS_") and value}
    has |= {NONE: set(), ADAPTIVE: {"shift", "scale"}, AFFINE: {"weight", "bias"}}[constants["NORM"]]
    optional = {"y", "gate", "shift", "scale", "gate_table", "shift_table", "scale_table", "weight", "bias", "dr"}
    types = {}
    for p in kernel.params:
        name = p.name.removesuffix("_ptr")
        if p.name.endswith("_ptr") and name in optional and name not in has and not (name == "y" and "gate" in has):
            constants[p.name] = None
        elif p.name in INDEX:
            types[p.name] = "*i32"
        elif p.name in FLOAT32:
            types[p.name] = "*fp32"
        elif p.name.endswith("_ptr"):
            types[p.name] = f"*{dtype}"
        elif p.name not in constants:
            types[p.name] = "fp32" if p.name == "eps" else "i32"
    return compile_sm90(kernel, types, constants, num_warps=num_warps, num_stages=3)


def flags(gate: bool, norm: int, tables: bool) -> dict:
    has_tables = {"HAS_GATE_TABLE": tables and gate, "HAS_SCALE_TABLE": tables and norm == ADAPTIVE}
    return {"HAS_GATE": gate, "NORM": norm} | has_tables


def forward(D: int, dtype: str, y: bool = True, gate: bool = True, norm: int = ADAPTIVE, tables: bool = True):
    constants = {"BLOCK_D": config.block_d(D), "HAS_Y": y, "HAS_SHIFT_TABLE": tables and norm == ADAPTIVE}
    kernel = kernel_triton.gate_residual_norm_fwd_kernel
    return build(kernel, D, dtype, config.forward_warps(D), constants | flags(gate, norm, tables))


def backward(D: int, dtype: str, dr: bool = True, gate: bool = True, norm: int = ADAPTIVE, tables: bool = True):
    constants = {"BLOCK_D": config.block_d(D), "HAS_DR": dr}
    kernel = kernel_triton.gate_residual_norm_bwd_kernel
    return build(kernel, D, dtype, config.backward_warps(D), constants | flags(gate, norm, tables))


@pytest.mark.parametrize("D", [576, 2048, 3072])
@pytest.mark.parametrize("kernel", [forward, backward])
def test_no_spills_at_the_widths_of_the_experts(kernel, D):
    built = kernel(D, "bf16")
    assert built.spill_bytes == 0
    # 16-byte accesses: bf16 rows move eight channels at a time
    assert "ld.global.v4.b32" in built.ptx and "st.global.v4.b32" in built.ptx


@pytest.mark.parametrize(
    "kernel, D, dtype, options",
    [
        pytest.param(forward, 3072, "bf16", {"y": False, "gate": False}, id="norm-forward"),
        pytest.param(backward, 3072, "bf16", {"dr": False, "gate": False}, id="norm-backward"),
        pytest.param(backward, 3072, "bf16", {"norm": AFFINE}, id="affine-backward"),
        pytest.param(backward, 3072, "bf16", {"norm": NONE}, id="gate-alone-backward"),
        pytest.param(backward, 3072, "fp32", {}, id="float32-backward"),
        pytest.param(forward, 8192, "bf16", {}, id="largest-D-forward"),
    ],
)
def test_other_variants_do_not_spill(kernel, D, dtype, options):
    assert kernel(D, dtype, **options).spill_bytes == 0


@pytest.mark.parametrize("norm", [NONE, ADAPTIVE])
def test_second_pass_does_not_spill(norm):
    constants = {"BLOCK_N": config.SUM_SEGMENTS, "BLOCK_D": config.SUM_CHANNELS, "HAS_GATE": True, "NORM": norm}
    assert build(kernel_triton.row_sums_kernel, 3072, "bf16", 4, constants).spill_bytes == 0


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
