"""Every block-attention kernel compiled for sm_90: tensor cores, nothing computed twice, no spills, shared memory."""

from functools import cache

import pytest

from bench.static.launches import BLOCK_ATTENTION, LONG, SHORT, block_attention
from tests.aot.compile import Compiled, compile_sm90, repeated_products, resources, shared_bytes
from wam_kernels.block_attention import config
from wam_kernels.runtime.shared_memory import BLOCK_BYTES, compiling_for

H100_SHARED = BLOCK_BYTES[90]


@cache
def check(*args, **kwargs) -> tuple[Compiled, ...]:
    """The arguments of :func:`launches.block_attention`, compiled."""
    compiled = tuple(compile_sm90(launch) for launch in block_attention(*args, **kwargs))
    for built in compiled:
        assert built.shared_bytes <= H100_SHARED
        assert built.products and built.repeated == ()
    return compiled


# the other sizes are compiled to the end below
@pytest.mark.parametrize("D, dtype", [(72, "bf16"), (256, "bf16"), (64, "fp32"), (128, "fp32")])
def test_no_warps_compute_the_same_part_of_a_product(D, dtype):
    for name, rows in [*LONG.items(), *SHORT.items()]:
        assert not any(repeated_products(launch) for launch in block_attention(name, D, rows, dtype)), (name, rows)


def test_repeated_products_are_seen():
    # eight warps on 64 rows, as dq once had: both warpgroups compute all scores
    (launch,) = block_attention("dq", 128, 64, "bf16", num_warps=8)
    assert "[64, 64] by warps [8, 1] of [16, 32]" in repeated_products(launch)


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("name, rows", [*LONG.items(), ("forward", 128), ("dq", 128)])
def test_large_tiles_use_wgmma_without_spills(name, rows, D):
    (built,) = check(name, D, rows, "bf16")
    assert built.spill_bytes == 0
    assert built.wgmma > 0 and not built.wgmma_serialised
    if BLOCK_ATTENTION[name][1](D, 2, rows).num_stages == 3:
        # loops over full and partial steps: one step's copies (k and v; q, dout, lse and delta) run behind another's
        assert built.copies_behind == ((4, 4) if name == "dkdv" else (2, 2))
    elif rows == 64:
        # with two stages they are waited for, and another block of the SM computes meanwhile
        assert 2 * built.registers * 128 <= 65_536 and 2 * (built.shared_bytes + 1024) <= 233_472


def test_scores_are_scaled_once():
    # a full step of 64 x 64: what scales the sums, 64 a thread, and not much more; the scores are scaled in an FFMA
    (built,) = check("forward", 128, 64, "bf16")
    full = built.loops[0].count
    assert 64 <= full["FMUL"] < 64 + 8 and 32 <= full["FFMA"] < 32 + 8


@pytest.mark.parametrize(
    "name, D, rows, dtype, ranges",
    [
        *(pytest.param(name, 128, rows, "bf16", 4, id=f"small-window-tile-{name}") for name, rows in SHORT.items()),
        pytest.param("forward", 128, 64, "fp16", 6, id="prefix-columns"),
        pytest.param("forward", 72, 64, "bf16", 4, id="D-not-power-of-two"),
    ],
)
def test_other_launches_compile_without_spills(name, D, rows, dtype, ranges):
    (built,) = check(name, D, rows, dtype, ranges)
    assert built.spill_bytes == 0


def test_channels_that_are_masked_spill_outside_the_loops_only():
    (built,) = check("dkdv", 72, 128, "bf16")
    assert [loop.spills for loop in built.loops] == [0, 0]


def test_groups_of_query_heads_do_not_spill():
    # the forward and dq only read another address
    (built,) = check("dkdv", 128, 128, "bf16", group=8)
    assert [loop.spills for loop in built.loops] == [0, 0]
    assert built.wgmma > 0 and not built.wgmma_serialised


def test_a_group_of_one_costs_nothing():
    # turns over query heads and steps are told apart by a division, which must be gone where there is one head
    assert "div.s32" in check("dkdv", 128, 128, "bf16", group=8)[0].ptx
    assert "div.s32" not in check("dkdv", 128, 128, "bf16")[0].ptx


@pytest.mark.parametrize("name, rows", LONG.items())
def test_heads_of_pi(name, rows):
    # pi-0.5: 8 query heads on 1 key head of 256 channels. No sum spills, but a few addresses do
    for built in check(name, 256, rows, "bf16", group=8):
        full, part = built.loops
        assert full.spills < 0.015 * full.total and part.spills < 0.06 * part.total
        assert built.wgmma > 0 and not built.wgmma_serialised


@pytest.mark.parametrize("name, rows", LONG.items())
def test_largest_float32_fits_in_shared_memory(name, rows):
    # the edge of what config.fits_triton promises, with 256 bf16 channels; it spills, which costs speed only
    assert config.fits_triton(128, 4) and config.fits_triton(256, 2) and not config.fits_triton(136, 4)
    assert all(shared_bytes(launch) <= H100_SHARED for launch in block_attention(name, 128, rows, "fp32"))


@pytest.mark.parametrize(
    "D, dtype",
    [
        (128, "bf16"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((64, "bf16"), (64, "fp32"), (128, "fp32"), (256, "bf16"))
        ),
    ],
)
def test_launches_fit_the_least_shared_memory(D, dtype):
    """99 KB, as on 8.6, 8.9 and 12.0; ``test_versions.py`` has the other GPUs."""
    capability = 89
    with compiling_for(capability):
        launches = [launch for name, rows in LONG.items() for launch in block_attention(name, D, rows, dtype)]
    assert max(shared_bytes(launch, capability) for launch in launches) <= BLOCK_BYTES[capability]


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 89, 120])
def test_dk_and_dv_do_not_spill_beside_the_operands_of_mma_sync(capability):
    with compiling_for(capability):
        (launch,) = block_attention("dkdv", 128, LONG["dkdv"], "bf16")
    assert resources(launch, capability).stack_bytes == 0


def test_launches_of_an_h100_would_be_refused_elsewhere():
    # what compiling_for changes is needed: 129 KB where a block has 99
    (launch,) = block_attention("dkdv", 128, LONG["dkdv"], "bf16")
    assert BLOCK_BYTES[89] < shared_bytes(launch, 89) < H100_SHARED
