"""The CUDA kernels of cached_attention, through their launcher, against the reference in float64.

Emulated, the instructions mma, ldmatrix and cp.async are the plain versions in ``csrc/common/tile_mma.cuh`` and
``copy_async.cuh``, and those of Hopper are done late, at random (``csrc/common/sm90_emulation.h``): the same bits in
every order.
"""

import dataclasses

import pytest
import torch

from tests.cached_attention import checks
from tests.cached_attention.checks import WRAPPED, Case
from wam_kernels.cached_attention import cached_attention, config, kernel_cuda
from wam_kernels.runtime import cuda

BF16 = torch.bfloat16
CASES = [
    pytest.param(dataclasses.replace(case, dtype=BF16 if case.dtype == torch.float32 else case.dtype), id=param.id)
    for param in checks.CASES
    for case in param.values
]


@pytest.fixture(params=[False, True], ids=["mma", "streamed"])
def streamed(request):
    """Which part kernel."""
    if request.param:
        request.getfixturevalue("only_streamed")
    return request.param


@pytest.fixture
def only_streamed(machine):
    if machine.device == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")


def forward(case, q, k, v, streamed):
    scale = case.D**-0.5 if case.scale is None else case.scale
    return kernel_cuda.forward(q, k, v, case.ranges(), case.rows, scale, streamed)


def check(machine, case, streamed, orders=2):
    case = dataclasses.replace(case, device=machine.device)
    inputs = case.inputs()
    checks.assert_right(case, inputs, machine.run(lambda: forward(case, *inputs, streamed), orders=orders))


@pytest.mark.parametrize("case", CASES)
def test_shapes_and_dtypes(machine, case, streamed):
    check(machine, case, streamed)


@pytest.mark.parametrize("D", [8, 24, 32, 40, 64, 72, 80, 96, 104, 128])
def test_every_head_dim(machine, D, streamed):
    # 70 rows: a second tile of which one warp owns 6 rows and three own none; 3 steps or more, the last not full
    check(machine, Case([[[(1, 90), (92, 150)]]], (70,), 150, H=2, D=D, dtype=BF16), streamed)


@pytest.mark.parametrize("parts", [2, 3, 9])
def test_split_over_the_keys(machine, parts, monkeypatch, streamed):
    # 9 parts of at most 5 steps: the last ones have no slots, and no partial result that may be read
    for name in ("splits", "streamed_splits"):
        monkeypatch.setattr(config, name, lambda blocks, slots: parts)
    case = Case([[[(0, 130), (140, 199)], [(3, 9)]], [[(0, 1)], []]], (20, 3), 200, H=2, D=128, dtype=BF16)
    check(machine, case, streamed)
    check(machine, Case([[[(40, 64), (0, 17), (100, 203)]]], (5,), 210, H=1, D=64, dtype=torch.float16), streamed)
    # parts that begin and end inside a range of many steps
    check(machine, Case([[[(3, 500)]]], (5,), 500, H=1, D=64, dtype=BF16), streamed)


def test_steps_across_many_ranges(machine):
    ranges = [(3 * i, 3 * i + 2) for i in range(60)]
    check(machine, Case([[ranges[::-1], ranges[:7]]], (16, 16), 190, H=1, D=64, dtype=BF16), streamed=False)


def test_tiles_of_several_groups(machine, streamed):
    case = Case([[[(0, 70)], [], [(70, 90), (3, 40)], [(9, 10)]]], (70, 5, 0, 65), 96, H=1, dtype=BF16)
    check(machine, case, streamed)


def test_ranges_are_cut_off_at_the_cache(machine, streamed):
    check(machine, Case([[[(-4, 5), (70, 99)], [(90, 95), (0, 5)]]], (6, 2), 80, dtype=BF16), streamed)


def test_a_cache_without_slots(machine, streamed):
    case = Case([[[]]], (3,), 0, dtype=BF16, device=machine.device)
    out, lse = machine.run(lambda: forward(case, *case.inputs(), streamed))
    assert (out == 0).all() and (lse == -torch.inf).all()


def test_what_a_block_before_left_in_shared_memory_does_not_matter(machine, streamed):
    # infinities in every tile, also past the last channel and slot of what follows: 0 times one of them would be NaN
    before = Case([[[(0, 64)]]], (16,), 64, H=1, D=128, dtype=BF16, device=machine.device)
    machine.run(lambda: forward(before, *(torch.full_like(t, torch.inf) for t in before.inputs()), streamed))
    check(machine, Case([[[(3, 8)]]], (16,), 64, H=1, D=104, dtype=BF16), streamed)


def test_nan_stays(machine, streamed):
    def attend(case, inputs):
        return machine.run(lambda: forward(case, *inputs, streamed))

    checks.check_nan_stays(attend, BF16, machine.device)


@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_scale(machine, scale, streamed):
    check(machine, Case([[WRAPPED, []]], (17, 2), 80, H=1, dtype=BF16, scale=scale), streamed)


# a video ring of 180 slots and an action ring of 60, both wrapped round, and the own slots of both; ends are odd
RINGS = [(100, 180), (0, 63), (211, 240), (180, 195), (240, 277)]


@pytest.mark.parametrize("D, dtype", [(64, torch.float16), (128, BF16)])
def test_video_and_action_rows_on_one_stream_in_many_orders(machine, D, dtype, only_streamed, monkeypatch):
    # action rows attend to less: their warpgroup leaves steps out before, between and after its own
    monkeypatch.setattr(config, "streamed_splits", lambda blocks, slots: 2)
    action = [(20, 40), (100, 163), (240, 270)]
    check(machine, Case([[RINGS, action]], (128, 16), 280, H=1, D=D, dtype=dtype), True, orders=4)


def test_samples_that_share_a_row_of_the_cache(machine, streamed):
    case = Case([[RINGS, RINGS[:2]], [RINGS[2:], []]], (20, 3), 280, H=1, D=64, dtype=BF16, device=machine.device)
    many, inputs = checks.shared(case, 2)
    checks.assert_right(many, inputs, machine.run(lambda: forward(many, *inputs, streamed)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "samples, rows, N, D",
    [
        pytest.param([[RINGS, RINGS[:2]], [RINGS[2:], []]], (370, 30), 280, 128, id="three-tiles"),
        pytest.param([[[(700, 900), (0, 640), (903, 1031)], [(700, 900), (0, 640)]]], (128, 16), 1031, 128, id="long"),
        pytest.param([[[(700, 900), (0, 640), (903, 1031)], [(310, 707)]]], (128, 16), 1031, 64, id="long-64"),
    ],
)
def test_longer_streams_in_more_orders(machine, samples, rows, N, D, only_streamed):
    check(machine, Case(samples, rows, N, H=2, D=D, dtype=BF16), True, orders=6)


@pytest.mark.slow
def test_as_many_stretches_as_there_can_be(machine, only_streamed):
    # 32 ranges of each of three groups, every end on its own and at least 65 slots from the next: 191 pieces
    step, at = 65, iter(range(10_000))
    groups = [[], [], []]
    for _ in range(32):
        begins = [next(at) * step for _ in range(3)]
        ends = [next(at) * step for _ in range(3)]
        for group, begin, end in zip(groups, begins, ends, strict=True):
            group.append((begin, end))
    check(machine, Case([groups], (5, 6, 7), 192 * step, H=1, D=8, dtype=BF16), True, orders=1)


def test_a_slot_counts_once(machine, only_streamed):
    check(machine, Case([[[(0, 50), (40, 60), (10, 20)], [(55, 60)]]], (5, 3), 64, H=1, dtype=BF16), True)


def test_queries_that_share_a_cache(machine, only_streamed):
    """Candidates of one rollout: a batch stride of 0, the history and slots of their own."""
    case = Case([[[(3, 40), (40, 50)]], [[(3, 40), (50, 60)]]], (7,), 64, dtype=BF16, device=machine.device)
    q, k, v = case.inputs()
    for cache in (k, v):
        cache[0, 50:60] = cache[1, 50:60]
    expected = forward(case, q, k[:1].repeat(2, 1, 1, 1), v[:1].repeat(2, 1, 1, 1), True)
    got = machine.run(lambda: forward(case, q, k[:1].expand_as(k), v[:1].expand_as(v), True))
    assert expected[0].isfinite().all() and all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_grouped_heads(machine, only_streamed):
    case = Case([[RINGS]], (9,), 280, H=6, dtype=BF16, device=machine.device)
    q, k, v = case.inputs()
    k, v = k[:, :, :2], v[:, :, :2]
    expected = forward(case, q, k.repeat_interleave(3, 2), v.repeat_interleave(3, 2), True)
    got = machine.run(lambda: forward(case, q, k, v, True))
    assert expected[0].isfinite().all() and all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_strides_are_free(machine, streamed):
    case = Case([[[(5, 30), (33, 60)]], [[(5, 9)]]], (7,), 64, H=3, D=40, dtype=BF16, device=machine.device)
    q, k, v = case.inputs()
    expected = forward(case, q, k.contiguous(), v.contiguous(), streamed)
    strided = (
        torch.cat((q, q + 1), 2)[:, :, :3],
        k.transpose(1, 2).contiguous().transpose(1, 2),
        torch.stack((v, v), 1)[:, 1],
    )
    got = machine.run(lambda: forward(case, *strided, streamed))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_refusals_name_the_argument(machine, streamed):
    case = Case([[WRAPPED]], (5,), 80, dtype=BF16, device=machine.device)
    q, k, v = case.inputs()
    odd = torch.zeros(80 * 2 * 36 + 4, dtype=BF16, device=machine.device)

    def refuses(message, q=q, k=k, v=v, case=case):
        with pytest.raises(ValueError, match=f"cached_attention: {message}"):
            forward(case, q, k, v, streamed)

    if streamed:
        many = dataclasses.replace(case, samples=[[[(i, i + 1) for i in range(33)]]])
        refuses("ranges must have at most 32 of a group for the kernel by TMA, got 33; pass streamed=False", case=many)
    else:
        refuses("k_cache must have H=2 heads, got 1", k=k[:, :, :1], v=v[:, :, :1])
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


@pytest.mark.parametrize(
    "capability, shape, expand, ranges, expected",
    [
        ((9, 0), (2, 64, 2, 8), None, 32, True),
        ((8, 9), (2, 64, 2, 8), None, 32, False),
        ((12, 0), (2, 64, 2, 8), None, 32, False),
        ((9, 0), (2, 64, 2, 8), None, 33, False),
        ((9, 0), (1, 2**26, 1, 8), None, 1, False),
        ((9, 0), (1, 64, 2, 8), (2, 64, 2, 8), 1, True),
        ((9, 0), (2, 64, 1, 8), (2, 64, 2, 8), 1, False),
    ],
)
def test_which_part_kernel_a_call_takes(monkeypatch, capability, shape, expand, ranges, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    cuda.is_hopper.cache_clear()
    cache = torch.empty(shape, device="meta").expand(expand or shape)
    try:
        takes = kernel_cuda.takes_stream(cache, cache, torch.empty(cache.shape[0], 1, ranges, 2, device="meta"))
        assert takes == expected
        if expand and expected:  # one of them alone: TMA would need a stride of 0
            assert not kernel_cuda.takes_stream(cache, torch.empty(expand, device="meta"), torch.empty(2, 1, 1, 2))
    finally:
        cuda.is_hopper.cache_clear()


def test_the_public_op_names_the_way_out():
    case = Case([[WRAPPED]], (5,), 80)
    with pytest.raises(ValueError, match="cached_attention: impl='cuda' needs CUDA tensors, got cpu; use impl=None"):
        cached_attention(*case.inputs(), case.ranges(), group_rows=case.rows, impl="cuda")
