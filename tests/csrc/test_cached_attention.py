"""The CUDA kernels of cached_attention, through their launcher, against the reference in float64.

Emulated, the instructions mma, ldmatrix and cp.async are the plain versions in ``csrc/common/tile_mma.cuh``.
"""

import dataclasses

import pytest
import torch

from tests.cached_attention import checks
from tests.cached_attention.checks import WRAPPED, Case
from wam_kernels.cached_attention import cached_attention, config, kernel_cuda

BF16 = torch.bfloat16
CASES = [
    pytest.param(dataclasses.replace(case, dtype=BF16 if case.dtype == torch.float32 else case.dtype), id=param.id)
    for param in checks.CASES
    for case in param.values
]


def forward(case, q, k, v):
    scale = case.D**-0.5 if case.scale is None else case.scale
    return kernel_cuda.forward(q, k, v, case.ranges(), case.rows, scale)


def check(machine, case):
    case = dataclasses.replace(case, device=machine.device)
    inputs = case.inputs()
    checks.assert_right(case, inputs, machine.run(lambda: forward(case, *inputs)))


@pytest.mark.parametrize("case", CASES)
def test_shapes_and_dtypes(machine, case):
    check(machine, case)


@pytest.mark.parametrize("D", [8, 24, 32, 40, 64, 80, 96, 104, 128])
def test_every_head_dim(machine, D):
    # 70 rows: a second tile of which one warp owns 6 rows and three own none; 3 steps or more, the last not full
    check(machine, Case([[[(1, 90), (92, 150)]]], (70,), 150, H=2, D=D, dtype=BF16))


@pytest.mark.parametrize("parts", [2, 3, 9])
def test_split_over_the_keys(machine, parts, monkeypatch):
    # 9 parts of at most 5 steps: the last ones have no slots, and no partial result that may be read
    monkeypatch.setattr(config, "splits", lambda tiles, slots: parts)
    check(machine, Case([[[(0, 130), (140, 199)], [(3, 9)]], [[(0, 1)], []]], (20, 3), 200, H=2, D=128, dtype=BF16))
    check(machine, Case([[[(40, 64), (0, 17), (100, 203)]]], (5,), 210, H=1, D=64, dtype=torch.float16))


def test_steps_across_many_ranges(machine):
    ranges = [(3 * i, 3 * i + 2) for i in range(60)]
    check(machine, Case([[ranges[::-1], ranges[:7]]], (16, 16), 190, H=1, D=64, dtype=BF16))


def test_tiles_of_several_groups(machine):
    check(machine, Case([[[(0, 70)], [], [(70, 90), (3, 40)], [(9, 10)]]], (70, 5, 0, 65), 96, H=1, dtype=BF16))


def test_ranges_are_cut_off_at_the_cache(machine):
    check(machine, Case([[[(-4, 5), (70, 99)], [(90, 95), (0, 5)]]], (6, 2), 80, dtype=BF16))


def test_a_cache_without_slots(machine):
    case = Case([[[]]], (3,), 0, dtype=BF16, device=machine.device)
    out, lse = machine.run(lambda: forward(case, *case.inputs()))
    assert (out == 0).all() and (lse == -torch.inf).all()


def test_what_a_block_before_left_in_shared_memory_does_not_matter(machine):
    # infinities in every tile, also past the last channel and slot of what follows: 0 times one of them would be NaN
    before = Case([[[(0, 64)]]], (16,), 64, H=1, D=128, dtype=BF16, device=machine.device)
    machine.run(lambda: forward(before, *(torch.full_like(t, torch.inf) for t in before.inputs())))
    check(machine, Case([[[(3, 8)]]], (16,), 64, H=1, D=104, dtype=BF16))


def test_nan_stays(machine):
    checks.check_nan_stays(lambda case, inputs: machine.run(lambda: forward(case, *inputs)), BF16, machine.device)


@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_scale(machine, scale):
    check(machine, Case([[WRAPPED, []]], (17, 2), 80, H=1, dtype=BF16, scale=scale))


def test_strides_are_free(machine):
    case = Case([[[(5, 30), (33, 60)]], [[(5, 9)]]], (7,), 64, H=3, D=40, dtype=BF16, device=machine.device)
    q, k, v = case.inputs()
    expected = forward(case, q, k.contiguous(), v.contiguous())
    strided = (
        torch.cat((q, q + 1), 2)[:, :, :3],
        k.transpose(1, 2).contiguous().transpose(1, 2),
        torch.stack((v, v), 1)[:, 1],
    )
    got = machine.run(lambda: forward(case, *strided))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_refusals_name_the_argument(machine):
    case = Case([[WRAPPED]], (5,), 80, dtype=BF16, device=machine.device)
    q, k, v = case.inputs()
    odd = torch.zeros(80 * 2 * 36 + 4, dtype=BF16, device=machine.device)

    def refuses(message, q=q, k=k, v=v, case=case):
        with pytest.raises(ValueError, match=f"cached_attention: {message}"):
            forward(case, q, k, v)

    refuses(
        r"v_cache's head stride must be a multiple of 8 elements \(16 bytes\), got 36; pass",
        v=odd[:-4].view(1, 80, 2, 36)[..., :32],
    )
    refuses(r"k_cache must be aligned to 16 bytes, got address \d+; pass", k=odd[4:5124].view(1, 80, 2, 32))
    refuses("q must be bfloat16 or float16 .*got float32; use impl='triton'", q=q.float(), k=k.float(), v=v.float())
    refuses(
        "ranges must have from 1 to 4 groups, got 5",
        case=dataclasses.replace(case, samples=[[WRAPPED] * 5], rows=(1,) * 5),
    )
    wide = dataclasses.replace(case, D=136)
    refuses("D must be a multiple of 8 from 8 to 128, got 136; use impl='reference'", *wide.inputs(), case=wide)


def test_the_public_op_names_the_way_out():
    case = Case([[WRAPPED]], (5,), 80)
    with pytest.raises(ValueError, match="cached_attention: impl='cuda' needs CUDA tensors, got cpu; use impl=None"):
        cached_attention(*case.inputs(), case.ranges(), group_rows=case.rows, impl="cuda")
