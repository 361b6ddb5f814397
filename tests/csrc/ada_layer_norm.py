"""Cases, truth and error budget of csrc's ada_layer_norm, shared by the emulated and the compiled kernel's tests."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.budget import assert_within_budget

EPS = 1e-6
GUARD_ROWS = 2  # poisoned rows on both sides of y: a store outside y lands here
DTYPES = ("bfloat16", "float16", "float32")
SHAPES = [  # (rows, channels, rows of each frame); one row per code path, each with its reason
    pytest.param(5, 8, (5,), id="one-thread"),
    pytest.param(4, 256, (1, 3), id="exactly-one-warp"),
    pytest.param(7, 264, (2, 0, 5), id="second-warp-has-one-busy-lane-and-a-frame-is-empty"),
    pytest.param(9, 576, (1, 4, 3, 1), id="narrow-action-expert"),
    pytest.param(6, 3072, (4, 2), id="video-expert"),
    pytest.param(3, 8192, (2, 1), id="widest-block"),
    pytest.param(0, 64, (0,), id="no-rows"),
]


@dataclass(frozen=True)
class Case:
    x: Tensor  # [rows, channels]
    scale: Tensor  # [frames, channels] float32, like shift
    shift: Tensor
    frame_of_row: Tensor  # [rows] int32
    guarded_y: Tensor  # y between guard rows, all NaN

    @property
    def y(self) -> Tensor:
        return self.guarded_y[GUARD_ROWS:-GUARD_ROWS]

    def arguments(self) -> dict[str, int | float | str]:
        """What wam_kernels._C.ada_layer_norm takes, except the stream."""
        rows, channels = self.x.shape
        tensors = ("x", "scale", "shift", "frame_of_row", "y")
        addresses = {name: getattr(self, name).data_ptr() for name in tensors}
        dtype = str(self.x.dtype).removeprefix("torch.")
        shape = {"rows": rows, "frames": self.scale.shape[0], "channels": channels}
        return addresses | shape | {"eps": EPS, "dtype": dtype}

    def formula(self, dtype: torch.dtype) -> Tensor:
        """The definition, computed in ``dtype`` on the inputs as they were rounded."""
        x, scale, shift = (t.to(dtype) for t in (self.x, self.scale, self.shift))
        frame = self.frame_of_row.long()
        mean = x.mean(-1, keepdim=True)
        rstd = torch.rsqrt((x - mean).square().mean(-1, keepdim=True) + EPS)
        return (x - mean) * rstd * (1 + scale[frame]) + shift[frame]


def make_case(rows: int, channels: int, frame_rows: tuple[int, ...], dtype: str, device: str = "cpu") -> Case:
    g = torch.Generator().manual_seed(0)
    # rows far from zero: a variance from E[x^2] - mean^2 would lose its digits here
    x = torch.randn(rows, channels, generator=g) + 30 * torch.randn(rows, 1, generator=g)
    scale, shift = (torch.randn(len(frame_rows), channels, generator=g) for _ in range(2))
    frame_of_row = torch.repeat_interleave(torch.arange(len(frame_rows)), torch.tensor(frame_rows)).int()
    guarded_y = torch.full((rows + 2 * GUARD_ROWS, channels), torch.nan)
    dtype = getattr(torch, dtype)
    return Case(x.to(device, dtype), *(t.to(device) for t in (scale, shift, frame_of_row)), guarded_y.to(device, dtype))


def assert_correct(case: Case) -> None:
    """The kernel may err as much as eager float32 does after its one rounding, and little more."""
    outside = torch.cat([case.guarded_y[:GUARD_ROWS], case.guarded_y[-GUARD_ROWS:]])
    assert outside.isnan().all(), "stored outside y"
    eager = case.formula(torch.float32).to(case.x.dtype)
    assert_within_budget("y", case.y, eager, case.formula(torch.float64))
