"""Every block-attention kernel compiled for sm_90: no spills, tensor cores, within an H100's shared memory."""

import pytest

from tests.aot.compile import compile_sm90
from wam_kernels.block_attention import config, kernel_triton
from wam_kernels.plan import STEP_PART

H100_SHARED = 232_448  # bytes that one block may use

KERNELS = {
    "forward": (kernel_triton._block_attention_fwd_kernel, config.forward),
    "dq": (kernel_triton._block_attention_bwd_dq_kernel, config.backward),
    "dkdv": (kernel_triton._block_attention_bwd_dkdv_kernel, config.backward),
}
FLOAT32 = {"lse_ptr", "lse2_ptr", "dlse_ptr", "delta_ptr"}
INDEX = {f"{name}_ptr" for name in ("tiles", "rows", "groups", "bounds", "full", "part")}


def build(name: str, D: int, rows: int, dtype: str, ranges: int, group: int = 1):
    kernel, choose = KERNELS[name]
    block_d = config.block_d(D)
    constants = {
        "D": D, "BLOCK_R": rows, "BLOCK_T": min(rows, 64), "BLOCK_P": STEP_PART, "BLOCK_D": block_d, "RANGES": ranges,
        "GROUP": group, "PRECISION": "tf32x3" if dtype == "fp32" else "tf32",
    }  # fmt: skip
    types = {}
    for p in kernel.params:
        if p.name in INDEX:
            types[p.name] = "*i32"
        elif p.name in FLOAT32:
            types[p.name] = "*fp32"
        elif p.name.endswith("_ptr"):
            types[p.name] = f"*{dtype}"
        elif p.name not in constants:
            types[p.name] = "fp32" if p.name == "scale" else "i32"
    launch = choose(D, 4 if dtype == "fp32" else 2, rows)
    return compile_sm90(kernel, types, constants, num_warps=launch.num_warps, num_stages=launch.num_stages)


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("name, rows", [*((name, 64) for name in KERNELS), ("forward", 128), ("dq", 128)])
def test_large_tiles_use_wgmma_without_spills(name, rows, D):
    built = build(name, D, rows, "bf16", ranges=4)
    assert built.spill_bytes == 0
    assert built.wgmma > 0 and not built.wgmma_serialised
    assert built.shared_bytes <= H100_SHARED
    # the loops over full and partial steps: one step's copies (k and v; q, dout, lse and delta) run behind another's
    assert built.copies_behind == ((4, 4) if name == "dkdv" else (2, 2))


@pytest.mark.parametrize(
    "name, D, rows, dtype, ranges",
    [
        pytest.param("forward", 128, 32, "bf16", 4, id="small-window-tile"),
        pytest.param("dq", 128, 32, "bf16", 4, id="small-window-tile-dq"),
        pytest.param("dkdv", 128, 32, "bf16", 4, id="small-window-tile-dkdv"),
        pytest.param("forward", 128, 64, "fp16", 6, id="prefix-columns"),
        pytest.param("forward", 72, 64, "bf16", 4, id="D-not-power-of-two"),
    ],
)
def test_other_launches_compile_without_spills(name, D, rows, dtype, ranges):
    built = build(name, D, rows, dtype, ranges)
    assert built.spill_bytes == 0
    assert built.shared_bytes <= H100_SHARED


@pytest.mark.parametrize("group", [2, 8])
@pytest.mark.parametrize("name", KERNELS)
def test_groups_of_query_heads_do_not_spill(name, group):
    built = build(name, 128, 64, "bf16", ranges=4, group=group)
    assert built.spill_bytes == 0
    assert built.wgmma > 0 and not built.wgmma_serialised


def test_a_group_of_one_costs_nothing():
    # turns over query heads and steps are told apart by a division, which must be gone where there is one head
    assert "div.s32" in build("dkdv", 128, 64, "bf16", ranges=4, group=2).ptx
    assert "div.s32" not in build("dkdv", 128, 64, "bf16", ranges=4).ptx


def test_pi_heads_fit():
    # pi-0.5: 8 query heads on 1 key head of 256 channels; the backward spills there, as it does without groups
    for name in KERNELS:
        assert build(name, 256, 64, "bf16", ranges=4, group=8).shared_bytes <= H100_SHARED


@pytest.mark.parametrize("D, dtype", [(256, "bf16"), (128, "fp32")])
@pytest.mark.parametrize("name", KERNELS)
def test_largest_launches_fit_in_shared_memory(name, D, dtype):
    # the edge of what config.fits_triton promises; the backward spills there, which costs speed only
    assert config.fits_triton(D, 4 if dtype == "fp32" else 2)
    assert build(name, D, 64, dtype, ranges=4).shared_bytes <= H100_SHARED
