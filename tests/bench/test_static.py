"""Counting machine code: loops of a kernel by hand, clocks by hand, and the committed predictions against real ones."""

from collections.abc import Iterable

import pytest

from bench.rows import RESULTS, read
from bench.static.kernels import HEAD_DIMS, triton_kernels
from bench.static.model import (
    CLOCK,
    CPI,
    L2_BYTES,
    MEMORY_BYTES,
    SMS,
    TENSOR_SHARE,
    Block,
    chain_clocks,
    predict,
    predict_row,
)
from bench.static.sass import Loop, longest_turn, loops_with, parse, producer_steps, steps
from bench.suites.static import predicted, row_of
from tests.bench import machine_code

TOLERANCE = 0.03  # of a predicted speed; another patch of the compiler moves it by less


@pytest.fixture(params=[machine_code.cuobjdump, machine_code.nvdisasm], ids=["cuobjdump", "nvdisasm"])
def body(request):
    kernels = parse(request.param())
    assert list(kernels) == [machine_code.NAME]
    return kernels[machine_code.NAME]


def test_a_step_is_the_innermost_loop_with_a_product(body):
    (step,) = steps(body)
    assert [i.address for i in step.body] == list(range(0x40, 0x190, 0x10))
    # neither what waits behind the end nor the path of parted threads
    assert step.count("SYNCS") == 1 and step.count("SHFL") == 0
    # a predicate is no part of a name
    assert step.count("BRA") == 4 and step.count("HGMMA") == 3


def test_the_outer_loop_is_found_by_what_it_alone_has(body):
    (work,) = loops_with(body, ("ATOMG",))
    assert work.body[0].address == 0x20 and work.count("HGMMA") == 0


def test_producers_are_counted_apart(body):
    (turn,) = producer_steps(body)
    assert [i.address for i in turn.body] == [0x2A0, 0x2B0, 0x2C0, 0x2D0]


def test_clocks_by_hand(body):
    (step,) = steps(body)
    got = predict(step, Block(warps=8, threads=384, registers=168, shared=0, copied=16384))
    # columns: 64, 64, 128, each half of it in clocks, for two warpgroups
    assert got.clocks["tensor cores"] == pytest.approx((32 + 32 + 64) * 2 / TENSOR_SHARE)
    assert got.flops == 2 * (64 * 64 * 16 * 2 * 2 + 64 * 128 * 16 * 2) and got.instructions == 21
    assert got.clocks["issue"] == 21 * 8 / 4 and got.clocks["MUFU"] == 2 * 32 * 8 / 16
    # FMNMX, F2FP and ISETP; not FMUL and IMAD
    assert got.clocks["ALU"] == 3 * 32 * 8 / 64
    # first operands of the first two products from shared memory; LDS.128, STS, LDSM.4, LDGSTS.128 of every warp
    operands = 2 * (2 * (64 + 64) * 16 * 2 + 128 * 16 * 2)
    assert got.clocks["shared memory"] == (operands + 8 * (512 + 128 + 512 + 512) + 16384) / 128
    assert got.clocks["L2"] == pytest.approx(16384 / L2_BYTES)
    assert got.tflops == pytest.approx(got.flops / got.clocks[got.limit] * CLOCK * SMS / 1e12)
    # without TMA the copies of the warps themselves
    own = predict(step, Block(warps=4, threads=128, registers=168, shared=0))
    assert own.clocks["L2"] == pytest.approx(4 * 512 / L2_BYTES)


def test_blocks_of_an_sm():
    assert Block(8, 384, 168, 0).an_sm == 1  # registers
    assert Block(4, 128, 168, 81_920).an_sm == 2  # shared memory
    assert Block(4, 128, 32, 1024).an_sm == 16  # threads


def test_the_chain_waits_for_products():
    lines = [
        "HGMMA.64x256x16.F32.BF16 R24, R4, gdesc[UR4], R24, gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x0", "FMUL R5, R5, R8",
        "BRA 0x0",
    ]  # fmt: skip
    text = "\n".join(f"  /*{16 * n:04x}*/  {line} ;" for n, line in enumerate(lines))
    (loop,) = steps(parse(f"Function : one\n{text}\n")["one"])
    # 128 clocks of the product from its issue on, then two instructions; those before are behind the product
    assert chain_clocks(loop, wait=0) == 128 + 3 * CPI
    assert chain_clocks(loop, wait=500) == 500 + 4 * CPI  # the product is over before
    assert chain_clocks(loop, together=2, wait=0) == 256 + 3 * 2
    left = Loop(tuple(i if "DEPBAR" not in i.name else type(i)(i.address, i.name, "gsb0, 0x1") for i in loop.body))
    # one group may stay under way: bound by the tensor cores alone
    assert chain_clocks(left, wait=0) == 128


def test_a_row_by_hand():
    lines = [
        "MOV R1, R2", "LDG.E.128 R4, [R2.64]", "@P1 BRA 0x60", "MUFU.RSQ R5, R6", "FSEL R5, R5, R6, P0", "BRA 0x70",
        "FMUL R5, R5, R5", "STG.E.128 [R2.64], R4", "@P0 BRA 0x10", "EXIT",
    ]  # fmt: skip
    text = "\n".join(f"  /*{16 * n:04x}*/  {line} ;" for n, line in enumerate(lines))
    row = longest_turn(parse(f"Function : row\n{text}\n")["row"], ("LDG",), ("STG",))
    # one branch of two, the longer
    assert [i.address for i in row.body] == [0x10, 0x20, 0x30, 0x40, 0x50, 0x70, 0x80]
    clocks = predict_row(row, warps=6, compulsory=1000)
    assert clocks["issue"] == 7 * 6 / 4 and clocks["MUFU"] == 6 * 32 / 16 and clocks["ALU"] == 6 * 32 / 64
    assert clocks["memory"] == pytest.approx(1000 / MEMORY_BYTES) and clocks["shared memory"] == 0


# ---- the rows that are committed ----


def committed() -> dict[tuple, dict]:
    """The newest of each step; the file keeps older ones."""
    return {key(row): row for row in read(RESULTS / "static.jsonl") if row.get("predicted")}


def key(row: dict) -> tuple:
    return tuple(row[name] for name in ("op", "what", "provider", "D", "rows", "step"))


def require_committed(found: Iterable[dict]) -> None:
    known = committed()
    for row in found:
        before = known[key(row)]
        message = f"{key(row)}: {before} was recorded; if it is meant to change: python -m bench.suites static"
        assert row["limit"] == before["limit"], message
        speed = "TFLOP/s" if "TFLOP/s" in before else "%_of_copy"
        assert row[speed] == pytest.approx(before[speed], rel=TOLERANCE), message
        assert row["spills"] <= before["spills"], message


def needs_recorded_triton() -> None:
    triton = pytest.importorskip("triton")
    (recorded,) = {row["triton"] for row in committed().values()}
    if triton.__version__ != recorded:
        pytest.skip(f"predictions are of triton {recorded}, this is {triton.__version__}")


@pytest.mark.parametrize("D", HEAD_DIMS)
def test_the_forward_of_triton_is_as_fast_as_committed(D):
    needs_recorded_triton()
    require_committed(map(row_of, triton_kernels("block_attention", "forward", D)))


@pytest.mark.slow
def test_every_kernel_is_as_fast_as_committed():
    needs_recorded_triton()
    found = list(predicted())
    assert {key(row) for row in found} == set(committed())
    require_committed(found)
