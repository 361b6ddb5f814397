"""rope_table against cosines and sines of 50 digits."""

import mpmath  # comes with torch
import pytest
import torch

from wam_kernels.qk_norm_rope import rope_table

POSITIONS = [
    pytest.param([0.0, 0.0, 0.0], id="origin"),
    pytest.param([3.2, -1.0, -1.0], id="action-slot"),
    pytest.param([0.1, 1 / 3, -2 / 7], id="fractions"),
    pytest.param([999_999.0, 1e6, 123_456.7], id="long"),
    pytest.param([-1e6, -0.75, -4096.125], id="negative"),
]


def exact(position: list[float], split: tuple[int, ...], theta: float) -> list[list[float]]:
    with mpmath.workdps(50):
        angles = [
            mpmath.mpf(p) * mpmath.mpf(theta) ** (-mpmath.mpf(2 * i) / d)
            for p, d in zip(position, split, strict=True)
            for i in range(d // 2)
        ]
        return [[mpmath.cos(a), mpmath.sin(a)] for a in angles]


def largest_error(table: torch.Tensor, truth: list[list[float]]) -> float:
    return max(
        float(abs(mpmath.mpf(got) - want))
        for got_row, want_row in zip(table.tolist(), truth, strict=True)
        for got, want in zip(got_row, want_row, strict=True)
    )


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("head_dim, split", [(128, (44, 42, 42)), (32, (12, 10, 10)), (8, (4, 2, 2))])
def test_within_the_stated_error(position, head_dim, split):
    truth = exact(position, split, 10000.0)
    size = max(abs(p) for p in position)
    table = rope_table(torch.tensor([position], dtype=torch.float64), head_dim)
    assert table.shape == (1, head_dim // 2, 2) and table.dtype == torch.float32 and table.is_contiguous()
    assert largest_error(table[0], truth) <= 2**-25 + 1e-15 * size
    double = rope_table(torch.tensor([position], dtype=torch.float64), head_dim, dtype=torch.float64)
    assert largest_error(double[0], truth) <= 2**-52 + 1e-15 * size


def test_float32_positions_are_taken_at_their_value():
    positions = torch.tensor([[1e6, 0.1, -3.3]])
    assert torch.equal(rope_table(positions, 32), rope_table(positions.double(), 32))


def test_split_and_theta():
    position = [5.5, -2.0, 7.0]
    table = rope_table(torch.tensor([position]), 16, theta=100.0, split=(0, 10, 6))
    assert largest_error(table[0], exact(position, (0, 10, 6), 100.0)) <= 2**-24


def test_positions_of_each_sample():
    positions = torch.rand(2, 4, 7, 3, dtype=torch.float64) * 50
    table = rope_table(positions, 32)
    assert table.shape == (2, 4, 7, 16, 2) and table.is_contiguous()
    assert torch.equal(table[1, 2], rope_table(positions[1, 2], 32))


def test_no_tokens():
    assert rope_table(torch.zeros(0, 3), 16).shape == (0, 8, 2)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"positions": torch.zeros(4)}, r"positions must have shape \[..., S, 3\] \(frame, row, column\), got \[4\]"),
        ({"positions": torch.zeros(4, 2)}, r"positions must have shape \[..., S, 3\] .*got \[4, 2\]"),
        ({"positions": torch.zeros(4, 3).bfloat16()}, "positions must be float32 or float64, got torch.bfloat16"),
        ({"dtype": torch.bfloat16}, "dtype must be torch.float32 or torch.float64, got torch.bfloat16"),
        ({"head_dim": 15}, "head_dim must be even and at least 2, got 15"),
        ({"theta": 0.0}, "theta must be positive, got 0.0"),
        ({"theta": 10**400}, "theta must be a finite number, got inf"),
        ({"split": (8, 8, 2)}, r"split must be three even sizes that sum to head_dim=16, got \(8, 8, 2\)"),
        ({"split": (6, 5, 5)}, r"split must be three even sizes that sum to head_dim=16, got \(6, 5, 5\)"),
        ({"split": (8, 8)}, r"split must be three even sizes that sum to head_dim=16, got \(8, 8\)"),
    ],
)
def test_refusals_name_the_argument(change, message):
    with pytest.raises(ValueError, match="^rope_table: " + message):
        rope_table(**({"positions": torch.zeros(4, 3), "head_dim": 16} | change))
